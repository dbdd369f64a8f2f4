//! Calls of several transactions (spec 14 sections 8, 11 and 12) of which only the
//! earlier ones were committed: what they have done, told from what was seen.
//!
//! What was seen only says which part to think of. That the part explains it is
//! checked as for every other call.

use crate::model::{BLOCK, Call, Context, Inode, Model, Reply};
use outrider_core::fs::api::{Ino, SetAttr};
use std::collections::{BTreeMap, BTreeSet};

/// What the earlier ones of a call's transactions did, if what was observed shows
/// that they, and not all, are there.
pub(super) fn part(call: &Call, state: &Model, observed: &Model) -> Option<Call> {
    let ino = call.changes_data_of()?;
    let (file, seen) = (state.get(ino)?, observed.get(ino)?);
    if !file.is_file() {
        return None;
    }
    let grown = (seen.size > file.size).then_some(seen.size);
    match call {
        Call::Write { .. } => part_of_write(call, file, seen, grown),
        Call::Fallocate { .. } => part_of_fallocate(call, grown?),
        // The size comes first, everything else last (spec 14 section 11).
        call => {
            let set = SetAttr {
                size: Some(call.resizes()?.1),
                ..SetAttr::default()
            };
            Some(Call::Setattr { ino, set })
        }
    }
}

fn part_of_write(call: &Call, file: &Inode, seen: &Inode, grown: Option<u64>) -> Option<Call> {
    let (offset, end) = reach(call, file)?;
    let filled = (offset / BLOCK..end.div_ceil(BLOCK))
        .rev()
        .find(|block| seen.blocks.contains_key(block) && !file.blocks.contains_key(block));
    // As little as shows: more of it may be there as a later write in place.
    let shown = filled.unwrap_or(offset / BLOCK);
    let stop = grown.unwrap_or((shown + 1) * BLOCK);
    beginning(call, (offset, end), stop)
}

/// Where a write begins and ends.
fn reach(call: &Call, file: &Inode) -> Option<(u64, u64)> {
    let Call::Write {
        offset,
        len,
        append,
        ..
    } = call
    else {
        return None;
    };
    let offset = if *append { file.size } else { *offset };
    Some((offset, offset + u64::from(*len)))
}

/// A write as far as `stop`, if that is within it.
fn beginning(call: &Call, (offset, end): (u64, u64), stop: u64) -> Option<Call> {
    let Call::Write { ino, tag, sync, .. } = call else {
        return None;
    };
    (offset + 1..end).contains(&stop).then(|| Call::Write {
        ino: *ino,
        offset,
        len: (stop - offset) as u32,
        tag: *tag,
        append: false,
        sync: *sync,
    })
}

fn part_of_fallocate(call: &Call, size: u64) -> Option<Call> {
    let Call::Fallocate {
        ino,
        keep: false,
        offset,
        len,
    } = call
    else {
        return None;
    };
    (offset + 1..offset + len)
        .contains(&size)
        .then(|| Call::Fallocate {
            ino: *ino,
            keep: false,
            offset: *offset,
            len: size - offset,
        })
}

/// What answers have shown of files: sizes, each with a number of blocks.
#[derive(Default)]
pub(super) struct Sights(BTreeMap<Ino, BTreeSet<(u64, u64)>>);

impl Sights {
    /// All that these answers show.
    pub fn of<'a>(replies: impl Iterator<Item = &'a Reply>) -> Self {
        let mut sights = Self::default();
        for reply in replies {
            if let Reply::Attr(attr) | Reply::Entry(attr) = reply {
                sights.add(attr.ino, attr.size, attr.blocks / (BLOCK / 512));
            }
        }
        sights
    }

    /// All that these answers and the state that was observed in the end show.
    pub fn new<'a>(replies: impl Iterator<Item = &'a Reply>, observed: &Model) -> Self {
        let mut sights = Self::of(replies);
        for (ino, inode) in &observed.inodes {
            sights.add(*ino, inode.size, inode.blocks.len() as u64);
        }
        sights
    }

    fn add(&mut self, ino: Ino, size: u64, blocks: u64) {
        self.0.entry(ino).or_default().insert((size, blocks));
    }

    /// The states in which a call may have left its file when only the earlier ones of
    /// its transactions were committed.
    pub fn parts(&self, call: &Call, state: &Model, cx: &Context) -> Vec<Model> {
        let about = call.changes_data_of().and_then(|ino| {
            let file = state.get(ino).filter(|inode| inode.is_file())?;
            Some((file, self.0.get(&ino)?))
        });
        let Some((file, seen)) = about else {
            return Vec::new();
        };
        seen.iter()
            .filter_map(|(size, blocks)| match call {
                Call::Write { .. } => {
                    let part = begun(call, file, (*size, *blocks))?;
                    state.take_effect(&part, None, cx)
                }
                Call::Fallocate { .. } => {
                    let grown = (*size > file.size).then_some(*size)?;
                    state.take_effect(&part_of_fallocate(call, grown)?, None, cx)
                }
                call => {
                    let (ino, cut) = call.resizes()?;
                    let first = cut == *size && *size <= file.size;
                    first.then(|| cut_short(state, ino, (*size, *blocks), cx))?
                }
            })
            .collect()
    }
}

/// Blocks behind the end of which any number may be left. Of more, all are, or as many as
/// an answer shows.
const LEFT_MAX: u64 = 64;

impl Sights {
    /// The states in which a truncation that failed may have left its file after it had
    /// set the size: none, some or all of the blocks behind it are freed. What answers
    /// show comes last.
    pub fn torn(&self, call: &Call, state: &Model, cx: &Context) -> Vec<Model> {
        let torn = || {
            let (ino, size) = call.resizes()?;
            let file = state.get(ino).filter(|file| size <= file.size)?;
            let behind = file.blocks.range(size.div_ceil(BLOCK)..).count() as u64;
            let all = file.blocks.len() as u64;
            let any = if behind <= LEFT_MAX { 1 } else { behind };
            let mut counts: Vec<u64> = (any..=behind).map(|left| all - behind + left).collect();
            let seen = self.0.get(&ino).into_iter().flatten();
            let seen: Vec<u64> = seen.filter(|s| s.0 == size).map(|s| s.1).collect();
            counts.retain(|count| !seen.contains(count));
            counts.extend(seen);
            let states = counts.into_iter();
            let states = states.filter_map(|blocks| cut_short(state, ino, (size, blocks), cx));
            Some(states.collect())
        };
        torn().unwrap_or_default()
    }
}

/// A truncation that has set the size and left some of the blocks behind it: they are
/// freed from the first on (spec 14 section 11).
fn cut_short(state: &Model, ino: Ino, (size, blocks): (u64, u64), cx: &Context) -> Option<Model> {
    let set = SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    let mut next = state.take_effect(&Call::Setattr { ino, set }, None, cx)?;
    let end = size.div_ceil(BLOCK);
    let behind = state.get(ino)?.blocks.range(end..);
    let left = blocks.checked_sub(next.get(ino)?.blocks.len() as u64)?;
    let left: Vec<_> = behind.rev().take(left as usize).collect();
    let inode = next.get_mut(ino);
    for (block, page) in left {
        inode.blocks.insert(*block, page.clone());
    }
    (inode.blocks.len() as u64 == blocks).then_some(next)
}

/// The beginning of a write that gives its file this size and this many blocks.
fn begun(call: &Call, file: &Inode, (size, blocks): (u64, u64)) -> Option<Call> {
    let (offset, end) = reach(call, file)?;
    let new = blocks.checked_sub(file.blocks.len() as u64)?;
    let mut fills =
        (offset / BLOCK..end.div_ceil(BLOCK)).filter(|block| !file.blocks.contains_key(block));
    let last = match new.checked_sub(1) {
        Some(before) => fills.nth(before as usize)?,
        None => offset / BLOCK,
    };
    let stop = if size > file.size {
        size
    } else {
        (last + 1) * BLOCK
    };
    // Whole blocks are mapped.
    let whole = stop.is_multiple_of(BLOCK);
    whole.then(|| beginning(call, (offset, end), stop))?
}

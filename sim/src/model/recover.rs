//! Comparison of what is there after a crash with a state of the model.
//!
//! Everything but file contents must be exactly that of the state. Contents
//! are written in place, so a byte may also show a later, uncommitted write to
//! it, or zero where a later truncate cleared it (spec 14 sections 20 and 24).
//! It never shows anything else.

use super::{BLOCK, Block, Call, Inode, Model, pattern_byte};
use outrider_core::fs::api::Ino;

/// Why an observed state is not this one.
pub type Difference = String;

/// What may show in place beside the state: calls that a cut leaves out, and
/// truncates whose last transactions it may leave out.
#[derive(Default)]
pub struct Later<'a> {
    calls: Vec<&'a Call>,
    cut_short: Vec<Ino>,
    /// Files whose truncation, cut short before, the calls may have finished.
    finished: Vec<Ino>,
    unsettled: Option<&'a Unsettled>,
    /// Calls since then that are part of the state.
    written: Vec<&'a Call>,
}

/// Contents that a mount showed after a crash although no flush will make them durable,
/// as one that covered them has failed: until they are written again a loss of power
/// takes them back.
#[derive(Clone, Debug, Default)]
pub struct Unsettled {
    pages: Vec<(Ino, u64, Block)>,
    calls: Vec<Call>,
}

impl Unsettled {
    /// What of `observed` is not as in `state`, the last one committed, and the
    /// calls that may have made the difference.
    pub fn new(state: &Model, observed: &Model, calls: &[&Call]) -> Self {
        let mut pages = Vec::new();
        for (ino, seen) in &observed.inodes {
            let Some(committed) = state.get(*ino) else {
                continue;
            };
            for (block, page) in &committed.blocks {
                let shown = seen.blocks.get(block).map(|page| page.digest());
                if shown.is_some_and(|digest| digest != page.digest()) {
                    pages.push((*ino, *block, page.clone()));
                }
            }
        }
        let about = |ino: Ino| pages.iter().any(|(file, _, _)| *file == ino);
        let calls = calls
            .iter()
            .filter(|call| call.writes_in().is_some_and(about))
            .map(|call| (*call).clone())
            .collect();
        Self { pages, calls }
    }

    /// What is left of it when this has been `written`.
    #[must_use]
    pub fn left(mut self, written: &[&Call]) -> Self {
        self.pages
            .retain(|(ino, block, _)| !settles(written, *ino, *block));
        self
    }

    /// Adds what was unsettled at an earlier crash and is so still.
    pub fn add(&mut self, earlier: Unsettled) {
        self.pages.extend(earlier.pages);
        self.calls.extend(earlier.calls);
    }

    fn explains(&self, ino: Ino, offset: u64, byte: u8) -> bool {
        let block = offset / BLOCK;
        let at = (offset % BLOCK) as usize;
        let of_block = || {
            let pages = self.pages.iter();
            pages.filter(|(file, number, _)| (*file, *number) == (ino, block))
        };
        of_block().any(|(_, _, page)| page.bytes()[at] == byte)
            || (of_block().next().is_some() && Later::new(&self.calls).explains(ino, offset, byte))
    }
}

/// Whether one of the calls has put the whole of a block on the device anew.
/// Of an append nobody knows where it went.
fn settles(calls: &[&Call], ino: Ino, block: u64) -> bool {
    calls.iter().any(|call| match call {
        Call::Write {
            ino: file,
            offset,
            len,
            append: false,
            ..
        } => {
            let end = offset + u64::from(*len);
            *file == ino && (offset / BLOCK..end.div_ceil(BLOCK)).contains(&block)
        }
        Call::WritePages {
            ino: file, offset, ..
        } => *file == ino && offset / BLOCK == block,
        call => {
            let cut = call.resizes();
            cut.is_some_and(|(file, size)| file == ino && size < (block + 1) * BLOCK)
        }
    })
}

impl<'a> Later<'a> {
    /// Calls that are not part of the state.
    pub fn new(calls: impl IntoIterator<Item = &'a Call>) -> Self {
        let mut calls: Vec<&Call> = calls.into_iter().collect();
        let finished = calls
            .iter()
            .filter_map(|call| call.finishes_truncation_of());
        let finished = finished.collect();
        calls.retain(|call| call.writes_in().is_some());
        Self {
            calls,
            finished,
            cut_short: Vec::new(),
            unsettled: None,
            written: Vec::new(),
        }
    }

    /// Contents of before an earlier crash, and what of the state was `written` since.
    #[must_use]
    pub fn with_unsettled(mut self, unsettled: &'a Unsettled, written: Vec<&'a Call>) -> Self {
        self.unsettled = Some(unsettled);
        self.written = written;
        self
    }

    /// Files whose truncation may have freed nothing yet (spec 14 section 11).
    #[must_use]
    pub fn with_cut_short(mut self, files: impl IntoIterator<Item = Ino>) -> Self {
        self.cut_short.extend(files);
        self
    }

    /// Whether one of the calls may have put `byte` at `offset` of the file.
    /// `size` is the file's size in the state, where an append may begin.
    fn explains(&self, ino: Ino, offset: u64, byte: u8) -> bool {
        let earlier = |unsettled: &Unsettled| {
            unsettled.explains(ino, offset, byte) && !settles(&self.written, ino, offset / BLOCK)
        };
        self.unsettled.is_some_and(earlier)
            || self.calls.iter().any(|call| match call {
                Call::Write {
                    ino: file,
                    offset: start,
                    len,
                    tag,
                    append,
                    ..
                } => {
                    let reach = *start..*start + u64::from(*len);
                    *file == ino
                        && (*append || reach.contains(&offset))
                        && byte == pattern_byte(*tag, offset)
                }
                Call::WritePages {
                    ino: file,
                    offset: start,
                    data,
                } => {
                    let at = offset.checked_sub(*start).map(|at| at as usize);
                    *file == ino && at.and_then(|at| data.0.get(at)) == Some(&byte)
                }
                call => {
                    let cut = call.resizes();
                    let cleared = cut.is_some_and(|(file, size)| file == ino && offset >= size);
                    byte == 0 && cleared
                }
            })
    }
}

impl Later<'_> {
    /// Whether a read that began at `offset` may have given `got`: what is in place
    /// may show calls that are not part of the state, where there was a place.
    pub fn explains_read(&self, ino: Ino, file: &Inode, offset: u64, len: u32, got: &[u8]) -> bool {
        let want = file.read(offset, u64::from(len));
        want.len() == got.len()
            && want.iter().zip(got).zip(offset..).all(|((want, got), at)| {
                let placed = || file.blocks.contains_key(&(at / BLOCK));
                want == got || placed() && self.explains(ino, at, *got)
            })
    }
}

impl Model {
    /// Compares what a crash leaves of this state with an observed one. `later`
    /// is asked only if nothing but contents differs.
    ///
    /// # Errors
    /// The first difference.
    pub fn recovered_as<'a>(
        &self,
        observed: &Model,
        later: impl Fn() -> Later<'a>,
    ) -> Result<(), Difference> {
        let kept = || self.inodes.iter().filter(|(_, inode)| inode.nlink > 0);
        if let Some((ino, _)) = kept().find(|(ino, _)| observed.get(**ino).is_none()) {
            return Err(format!("inode {ino} is missing"));
        }
        let expected = |ino: &Ino| self.get(*ino).is_some_and(|inode| inode.nlink > 0);
        if let Some(ino) = observed.inodes.keys().find(|ino| !expected(ino)) {
            return Err(format!("inode {ino} is not expected"));
        }
        let seen = |ino: &Ino| observed.get(*ino).expect("both have it");
        for (ino, expected) in kept() {
            compare_attributes(*ino, expected, seen(ino))?;
        }
        let differs = |want: &Inode, got: &Inode| {
            let digests = |inode: &Inode| -> Vec<_> {
                let pages = inode.blocks.iter();
                pages.map(|(block, page)| (*block, page.digest())).collect()
            };
            want.blocks.len() != got.blocks.len() || digests(want) != digests(got)
        };
        let differing: Vec<_> = kept()
            .filter(|(ino, want)| differs(want, seen(ino)))
            .collect();
        if differing.is_empty() {
            return Ok(());
        }
        let later = later();
        for (ino, expected) in differing {
            compare_data(*ino, expected, seen(ino), &later)?;
        }
        Ok(())
    }

    /// Which of `some` inodes differ from what was observed, contents aside.
    /// `None` if others do.
    pub fn differing(&self, observed: &Model, some: &[Ino]) -> Option<Vec<Ino>> {
        let same = |ino: Ino| match (self.get(ino), observed.get(ino)) {
            (Some(want), Some(got)) => {
                compare_attributes(ino, want, got).is_ok()
                    && want.blocks.keys().eq(got.blocks.keys())
            }
            (want, got) => want.is_none_or(|inode| inode.nlink == 0) && got.is_none(),
        };
        let both = self.inodes.keys().chain(observed.inodes.keys());
        if both.copied().any(|ino| !some.contains(&ino) && !same(ino)) {
            return None;
        }
        Some(some.iter().copied().filter(|ino| !same(*ino)).collect())
    }

    /// How many inodes are not as observed, contents aside: for telling which of
    /// several wrong states is the nearest.
    pub fn distance(&self, observed: &Model) -> usize {
        let same = |ino: &Ino| match (self.get(*ino), observed.get(*ino)) {
            (Some(want), Some(got)) => compare_attributes(*ino, want, got).is_ok(),
            (want, got) => want.is_none_or(|inode| inode.nlink == 0) && got.is_none(),
        };
        let all: std::collections::BTreeSet<&Ino> =
            self.inodes.keys().chain(observed.inodes.keys()).collect();
        all.into_iter().filter(|ino| !same(ino)).count()
    }
}

fn compare_attributes(ino: Ino, expected: &Inode, seen: &Inode) -> Result<(), Difference> {
    let differ = |what: &str, want: &dyn std::fmt::Debug, got: &dyn std::fmt::Debug| {
        Err(format!("inode {ino}: {what} is {got:?}, expected {want:?}"))
    };
    if expected.mode != seen.mode {
        return differ("mode", &expected.mode, &seen.mode);
    }
    if expected.nlink != seen.nlink {
        return differ("nlink", &expected.nlink, &seen.nlink);
    }
    if (expected.uid, expected.gid, expected.rdev) != (seen.uid, seen.gid, seen.rdev) {
        return differ(
            "owner",
            &(expected.uid, expected.gid),
            &(seen.uid, seen.gid),
        );
    }
    if expected.size != seen.size {
        return differ("size", &expected.size, &seen.size);
    }
    let times = [(expected.mtime, seen.mtime), (expected.ctime, seen.ctime)];
    for (name, (want, got)) in ["mtime", "ctime"].into_iter().zip(times) {
        if !want.admits(got.low) {
            return differ(name, &want, &got.low);
        }
    }
    if expected.xattrs != seen.xattrs {
        let want: Vec<_> = expected.xattrs.iter().map(|(n, v)| (n, v.len())).collect();
        let got: Vec<_> = seen.xattrs.iter().map(|(n, v)| (n, v.len())).collect();
        return differ("the set of xattrs", &want, &got);
    }
    if expected.target != seen.target {
        return differ("the target", &expected.target.len(), &seen.target.len());
    }
    if expected.is_dir() && expected.parent != seen.parent {
        return differ("the parent", &expected.parent, &seen.parent);
    }
    for (name, entry) in &expected.entries {
        let got = seen.entries.get(name).map(|entry| entry.ino);
        if got != Some(entry.ino) {
            return differ(&format!("the entry {name:?}"), &entry.ino, &got);
        }
    }
    if let Some(name) = seen
        .entries
        .keys()
        .find(|name| !expected.entries.contains_key(*name))
    {
        return Err(format!("inode {ino}: the entry {name:?} is not expected"));
    }
    // Entries are listed in the order in which they were made, as before the crash.
    let mut listed: Vec<_> = seen.entries.iter().collect();
    listed.sort_by_key(|(_, entry)| entry.born);
    let mut latest_start = 0;
    for (name, _) in listed {
        let (start, end) = expected.entries[name].born;
        if end < latest_start {
            return Err(format!(
                "inode {ino}: the entry {name:?} is listed too late"
            ));
        }
        latest_start = latest_start.max(start);
    }
    Ok(())
}

fn compare_data(ino: Ino, expected: &Inode, seen: &Inode, later: &Later) -> Result<(), Difference> {
    let end = expected.size.div_ceil(BLOCK);
    // Behind the end of a truncation that was cut short there may be any; of one that
    // somebody has come to finish, those that are freed last.
    let behind = |inode: &Inode| inode.blocks.range(end..).count();
    let freed = behind(expected).saturating_sub(behind(seen));
    let first = if later.cut_short.contains(&ino) {
        None
    } else if freed > 0 && later.finished.contains(&ino) {
        let kept = expected.blocks.range(end..).nth(freed);
        Some(kept.map_or(u64::MAX, |(block, _)| *block))
    } else {
        Some(end)
    };
    let counts = |block: &&u64| **block < end || first.is_some_and(|first| **block >= first);
    let want = expected.blocks.keys().filter(counts);
    if !want.eq(seen.blocks.keys().filter(counts)) {
        return Err(format!(
            "inode {ino}: written blocks are {:?}, expected {:?}",
            seen.blocks.keys().collect::<Vec<_>>(),
            expected.blocks.keys().collect::<Vec<_>>()
        ));
    }
    for (block, want) in expected.blocks.range(..end) {
        let got = &seen.blocks[block];
        if want.digest() == got.digest() {
            continue;
        }
        let pairs = want.bytes().iter().zip(got.bytes());
        for (index, (want, got)) in pairs.enumerate() {
            let offset = block * BLOCK + index as u64;
            if want != got && offset < expected.size && !later.explains(ino, offset, *got) {
                return Err(format!(
                    "inode {ino}: byte {offset} is {got:#04x}, expected {want:#04x} \
                     or a value of an uncommitted write"
                ));
            }
        }
    }
    Ok(())
}

//! Merging log trees into a part of fs_root (spec 02 section 16).
//!
//! Items of all inputs are collected in windows of bounded memory, combined by
//! key, then applied in key order to a copy of the destination.
//!
//! What can go wrong: applying a delta twice. Once a delta was combined in place
//! the code never walks again for it, even if the leaf gets thin; empty leaves
//! are legal.

use super::items::{Combined, combine_delta, is_delta, read_items};
use super::layout::{self, NONE, NewItem};
use super::walk::{Intent, Walked, leaf_has_room, low_mark, walk_dirty};
use super::{BtreeError, ItemRef, avl, hash};
use crate::block::{Cache, Tx};
use crate::env::{mutant, probe};
use crate::format::{BtreeRoot, ITEM_FLAG_DELETION, Key, KeyRange, LG_BLOCK_SIZE};
use std::collections::BTreeMap;

/// How far [`merge`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The whole range is merged.
    All,
    /// Everything before this key is merged: commit and go on from it (ERANGE).
    Until(Key),
}

/// An item of the inputs.
#[derive(Clone, Debug)]
struct Collected {
    seq: u64,
    flags: u8,
    value: Vec<u8>,
}

/// Items collected from all inputs within a range.
struct Window {
    range: KeyRange,
    items: BTreeMap<Key, Collected>,
    bytes: usize,
    limit: usize,
    failed: Option<BtreeError>,
}

impl Window {
    /// Adds an item by the collecting rule; drops the greatest if there are too many.
    fn add(&mut self, it: ItemRef<'_>) {
        if it.key > self.range.end || self.failed.is_some() {
            return;
        }
        if let Some(old) = self.items.get_mut(&it.key) {
            if is_delta(&it.key) && old.flags == 0 && it.flags == 0 {
                match combine_delta(&it.key, &mut old.value, it.value) {
                    Ok(Combined::Sum) => old.seq = old.seq.max(it.seq),
                    Ok(Combined::Null) => self.remove(&it.key),
                    Err(err) => self.failed = Some(err),
                }
                return;
            }
            // Mutant: breaks spec 05 section 6, the greatest seq wins.
            if old.seq >= it.seq || mutant("merge_keeps_first") {
                return;
            }
            self.remove(&it.key);
        }
        self.bytes += layout::item_bytes(it.value.len());
        let new = Collected {
            seq: it.seq,
            flags: it.flags,
            value: it.value.to_vec(),
        };
        self.items.insert(it.key, new);
        while self.bytes > self.limit && self.items.len() > 1 {
            probe("merge_window_full");
            let (key, _) = self.items.last_key_value().expect("two items");
            let key = *key;
            self.remove(&key);
            self.range.end = key.dec();
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(old) = self.items.remove(key) {
            self.bytes -= layout::item_bytes(old.value.len());
        }
    }

    /// Ends the window before `end` was reached.
    fn cut(&mut self, end: Key) {
        self.range.end = end;
        while let Some((key, _)) = self.items.last_key_value()
            && *key > end
        {
            let key = *key;
            self.remove(&key);
        }
    }

    /// Reads a bounded number of leaves of each input.
    async fn fill(&mut self, cache: &Cache, inputs: &[BtreeRoot]) -> Result<(), BtreeError> {
        let max_leaves = (self.limit / LG_BLOCK_SIZE).max(1);
        for input in inputs {
            let mut key = self.range.start;
            for leaf in 1.. {
                let mut range = KeyRange::new(key, self.range.end);
                read_items(cache, input, &key, &mut range, &mut |it| self.add(it)).await?;
                if let Some(err) = self.failed.take() {
                    return Err(err);
                }
                if range.end >= self.range.end {
                    break;
                }
                if leaf >= max_leaves {
                    self.cut(range.end);
                    break;
                }
                key = range.end.inc();
            }
        }
        Ok(())
    }
}

/// Applies all items of the log trees `inputs` within `range` to `root`, in
/// steps bounded by the policy. `subtree`: `root` is a level-1 block of a higher
/// tree (what `get_parent` gave for a tree of more than two levels).
///
/// # Errors
/// Any: the caller forgets all dirty blocks.
pub async fn merge(
    tx: &Tx,
    root: &mut BtreeRoot,
    inputs: &[BtreeRoot],
    range: KeyRange,
    subtree: bool,
) -> Result<Merged, BtreeError> {
    let mut start = range.start;
    loop {
        let mut window = Window {
            range: KeyRange::new(start, range.end),
            items: BTreeMap::new(),
            bytes: 0,
            limit: tx.policy().merge_window_bytes,
            failed: None,
        };
        window.fill(tx.cache(), inputs).await?;
        let end = window.range.end;
        let items: Vec<(Key, Collected)> = window.items.into_iter().collect();
        if let Some(key) = apply(tx, root, &items, subtree).await? {
            return Ok(Merged::Until(key));
        }
        if end >= range.end {
            return Ok(Merged::All);
        }
        start = end.inc();
    }
}

/// Why a leaf takes no more items now.
enum LeafEnd {
    /// The next item belongs to another leaf, or there is none.
    Done,
    /// Walk again for this item with this intent.
    Rewalk(Intent),
}

/// Applies items; the key of the first that did not fit in this step.
async fn apply(
    tx: &Tx,
    root: &mut BtreeRoot,
    items: &[(Key, Collected)],
    subtree: bool,
) -> Result<Option<Key>, BtreeError> {
    let plain = Intent {
        subtree,
        ..Intent::default()
    };
    let mut intent = plain;
    let mut done = 0;
    while let Some((key, it)) = items.get(done) {
        if step_is_full(tx) {
            probe("merge_step_full");
            return Ok(Some(*key));
        }
        let leaf = match walk_dirty(tx, root, key, intent).await? {
            Walked::Leaf(leaf) => leaf,
            Walked::SubtreeLimit => return Ok(Some(*key)),
            Walked::Empty if it.flags & ITEM_FLAG_DELETION != 0 => {
                done += 1;
                continue;
            }
            Walked::Empty => {
                intent.insert = Some(it.value.len());
                continue;
            }
        };
        let thin = |b: &[u8]| !leaf.is_root && layout::total_bytes(b) < low_mark(tx);
        if !intent.delete && tx.view(leaf.blkno, thin) {
            intent.delete = true;
            continue;
        }
        let end = tx.edit(leaf.blkno, |b| {
            let mut intent = intent;
            while let Some((key, it)) = items.get(done)
                && *key <= leaf.covered.end
            {
                if let Some(again) = apply_one(tx, b, key, it, intent, &thin)? {
                    return Ok(LeafEnd::Rewalk(again));
                }
                intent = plain;
                done += 1;
            }
            Ok::<_, BtreeError>(LeafEnd::Done)
        })?;
        intent = match end {
            LeafEnd::Done => plain,
            LeafEnd::Rewalk(again) => again,
        };
    }
    Ok(None)
}

fn step_is_full(tx: &Tx) -> bool {
    let policy = tx.policy();
    tx.dirty_blocks() as u64 >= policy.merge_dirty_blocks || tx.meta_low(policy.merge_alloc_low)
}

/// Applies one item to its leaf, or says how to walk again before.
fn apply_one(
    tx: &Tx,
    b: &mut [u8],
    key: &Key,
    it: &Collected,
    intent: Intent,
    thin: &dyn Fn(&[u8]) -> bool,
) -> Result<Option<Intent>, BtreeError> {
    let off = hash::search(b, key);
    if it.flags & ITEM_FLAG_DELETION != 0 {
        if off == NONE {
            return Ok(None);
        }
        if thin(b) && !intent.delete {
            return Ok(Some(Intent {
                delete: true,
                ..intent
            }));
        }
        layout::delete_item(b, off);
        return Ok(None);
    }
    if is_delta(key) && off != NONE {
        match combine_delta(key, layout::value_mut(b, off), &it.value)? {
            Combined::Sum => layout::item_mut(b, off).seq = it.seq.into(),
            Combined::Null => layout::delete_item(b, off),
        }
        if avl::first(b) == NONE {
            probe("merge_emptied_a_leaf");
        }
        return Ok(None);
    }
    if !leaf_has_room(tx, b, it.value.len()) {
        return Ok(Some(Intent {
            insert: Some(it.value.len()),
            ..intent
        }));
    }
    if off == NONE {
        let new = NewItem {
            key: *key,
            seq: it.seq,
            flags: it.flags,
            value: &it.value,
        };
        layout::create_item(b, new);
    } else {
        layout::update_item(b, off, &it.value);
        let stored = layout::item_mut(b, off);
        stored.seq = it.seq.into();
        stored.flags = it.flags;
    }
    Ok(None)
}

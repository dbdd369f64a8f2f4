//! Many items at once: reading a leaf, putting a sorted list, delta items
//! (spec 02 section 14).

use super::layout::{self, NONE, NewItem};
use super::ops::check_len;
use super::walk::{Intent, Walked, leaf_has_room, walk_dirty, walk_read};
use super::{BtreeError, ItemRef, ListItem, avl, hash};
use crate::block::{Cache, Tx};
use crate::format::{BtreeRoot, Key, KeyRange, ZONE_XATTR_TOTL};

/// Calls `f` for each item in key order of the one leaf that covers `key`, within
/// `range`, and narrows `range` to what the leaf covers. An empty tree has no
/// items and leaves the range alone.
///
/// # Errors
/// As [`super::lookup`].
pub async fn read_items(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
    range: &mut KeyRange,
    f: &mut dyn FnMut(ItemRef<'_>),
) -> Result<(), BtreeError> {
    let Some((_, block, covered)) = walk_read(cache, root, key, 0).await? else {
        return Ok(());
    };
    range.start = range.start.max(covered.start);
    range.end = range.end.min(covered.end);
    let b = block.bytes();
    let mut off = avl::at_or_after(b, &range.start);
    while off != NONE {
        let it = layout::item_ref(b, off);
        if it.key > range.end {
            break;
        }
        f(it);
        off = avl::next(b, off);
    }
    Ok(())
}

/// The result of combining two delta values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combined {
    /// The sum is not zero.
    Sum,
    /// Both the total and the count are zero: equivalent to no item.
    Null,
}

/// Whether items with this key are deltas in log trees.
pub fn is_delta(key: &Key) -> bool {
    key.zone == ZONE_XATTR_TOTL
}

/// Adds the delta `src` to `dst`, total and count, wrapping.
///
/// # Errors
/// `DeltaLength` unless both are 16 bytes; then nothing changed.
pub fn combine_delta(key: &Key, dst: &mut [u8], src: &[u8]) -> Result<Combined, BtreeError> {
    let bad = |len| BtreeError::DeltaLength { key: *key, len };
    let dst_len = dst.len();
    let dst: &mut [u8; 16] = dst.try_into().map_err(|_| bad(dst_len))?;
    let src: &[u8; 16] = src.try_into().map_err(|_| bad(src.len()))?;
    let word = |v: &[u8; 16], at: usize| {
        u64::from_le_bytes(v[at..at + 8].try_into().expect("eight bytes"))
    };
    let total = word(dst, 0).wrapping_add(word(src, 0));
    let count = word(dst, 8).wrapping_add(word(src, 8));
    dst[..8].copy_from_slice(&total.to_le_bytes());
    dst[8..].copy_from_slice(&count.to_le_bytes());
    Ok(if total == 0 && count == 0 {
        Combined::Null
    } else {
        Combined::Sum
    })
}

/// Puts items, sorted by key, in a log tree: each is inserted or overwrites the
/// item there; delta items are added up (a sum of zero stays stored). `done`
/// counts the items consumed; the call goes on from it. Combining deltas is not
/// idempotent: after an error start again from the root as it was before the
/// transaction, or call again with `done` as it is.
///
/// # Errors
/// Block errors, `ValueLength`, `DeltaLength`; a part of the list may be in the tree.
pub async fn insert_list(
    tx: &Tx,
    root: &mut BtreeRoot,
    list: &[ListItem],
    done: &mut usize,
) -> Result<(), BtreeError> {
    while let Some(first) = list.get(*done) {
        check_len(&first.key, first.value.len())?;
        let intent = Intent {
            insert: Some(first.value.len()),
            ..Intent::default()
        };
        let leaf = match walk_dirty(tx, root, &first.key, intent).await? {
            Walked::Leaf(leaf) => leaf,
            Walked::Empty | Walked::SubtreeLimit => unreachable!("a walk to insert makes a leaf"),
        };
        tx.edit(leaf.blkno, |b| {
            fill_leaf(tx, b, &leaf.covered.end, list, done)
        })?;
    }
    Ok(())
}

/// Puts items in one leaf while they belong there and fit.
fn fill_leaf(
    tx: &Tx,
    b: &mut [u8],
    end: &Key,
    list: &[ListItem],
    done: &mut usize,
) -> Result<(), BtreeError> {
    for it in &list[*done..] {
        if it.key > *end || !leaf_has_room(tx, b, it.value.len()) {
            break;
        }
        let off = hash::search(b, &it.key);
        if off == NONE {
            let new = NewItem {
                key: it.key,
                seq: it.seq,
                flags: it.flags,
                value: &it.value,
            };
            layout::create_item(b, new);
        } else {
            if is_delta(&it.key) && it.flags == 0 && layout::item(b, off).flags == 0 {
                combine_delta(&it.key, layout::value_mut(b, off), &it.value)?;
            } else {
                layout::update_item(b, off, &it.value);
            }
            let stored = layout::item_mut(b, off);
            stored.seq = it.seq.into();
            stored.flags = it.flags;
        }
        *done += 1;
    }
    Ok(())
}

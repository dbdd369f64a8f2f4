//! The bytes of one btree block: head, items array, gap, values, leaf hash table
//! (spec 01 section 8, spec 02 section 6).
//!
//! Items are named by the byte offset of their slot from the start of the block
//! ([`NONE`] = 0 for none). Offsets are trusted: blocks are validated when they
//! enter the cache, and our own stay valid.

use super::ItemRef;
use crate::format::{
    BTREE_HASH_START, BTREE_HEAD_SIZE, BTREE_ITEM_SIZE, BTREE_NODE_BASE, BTREE_VALUE_ALIGN,
    BlockRef, BtreeBlock, BtreeItem, DiskKey, Key, LG_BLOCK_SIZE, MAX_ITEM_VALUE,
};
use std::cmp::Ordering;
use zerocopy::{FromBytes, IntoBytes};

/// No item.
pub(super) const NONE: usize = 0;
/// Most bytes of an item with its value.
pub(super) const MAX_ITEM_BYTES: usize = BTREE_ITEM_SIZE + MAX_ITEM_VALUE;
/// Bytes of a child reference, the value of parent items.
pub(super) const REF_LEN: usize = size_of::<BlockRef>();

/// Bytes that a value of `len` takes.
pub(super) const fn value_bytes(len: usize) -> usize {
    len.next_multiple_of(BTREE_VALUE_ALIGN)
}

/// Bytes that an item with a value of `len` takes.
pub(super) const fn item_bytes(len: usize) -> usize {
    BTREE_ITEM_SIZE + value_bytes(len)
}

/// Offset of the slot with index `i`.
pub(super) const fn slot(i: usize) -> usize {
    BTREE_HEAD_SIZE + i * BTREE_ITEM_SIZE
}

/// Slot offset from an AVL link.
pub(super) fn from_link(link: u16) -> usize {
    if link == 0 {
        NONE
    } else {
        link as usize + BTREE_NODE_BASE
    }
}

/// AVL link from a slot offset.
pub(super) fn to_link(off: usize) -> u16 {
    if off == NONE {
        0
    } else {
        (off - BTREE_NODE_BASE) as u16
    }
}

pub(super) fn head(b: &[u8]) -> &BtreeBlock {
    BtreeBlock::ref_from_prefix(b).expect("a whole block").0
}

pub(super) fn head_mut(b: &mut [u8]) -> &mut BtreeBlock {
    BtreeBlock::mut_from_prefix(b).expect("a whole block").0
}

pub(super) fn item(b: &[u8], off: usize) -> &BtreeItem {
    BtreeItem::ref_from_bytes(&b[off..off + BTREE_ITEM_SIZE]).expect("an item's bytes")
}

pub(super) fn item_mut(b: &mut [u8], off: usize) -> &mut BtreeItem {
    BtreeItem::mut_from_bytes(&mut b[off..off + BTREE_ITEM_SIZE]).expect("an item's bytes")
}

pub(super) fn nr_items(b: &[u8]) -> usize {
    head(b).nr_items.get() as usize
}

pub(super) fn total_bytes(b: &[u8]) -> usize {
    head(b).total_item_bytes.get() as usize
}

pub(super) fn mid_free(b: &[u8]) -> usize {
    head(b).mid_free_len.get() as usize
}

pub(super) fn is_leaf(b: &[u8]) -> bool {
    head(b).level == 0
}

/// First byte after the values.
pub(super) const fn values_end(level: u8) -> usize {
    if level == 0 {
        BTREE_HASH_START
    } else {
        LG_BLOCK_SIZE
    }
}

pub(super) fn key(b: &[u8], off: usize) -> Key {
    item(b, off).key.key()
}

pub(super) fn value(b: &[u8], off: usize) -> &[u8] {
    let it = item(b, off);
    let at = it.val_off.get() as usize;
    &b[at..at + it.val_len.get() as usize]
}

pub(super) fn value_mut(b: &mut [u8], off: usize) -> &mut [u8] {
    let it = item(b, off);
    let (at, len) = (it.val_off.get() as usize, it.val_len.get() as usize);
    &mut b[at..at + len]
}

pub(super) fn item_ref(b: &[u8], off: usize) -> ItemRef<'_> {
    let it = item(b, off);
    ItemRef {
        key: it.key.key(),
        seq: it.seq.get(),
        flags: it.flags,
        value: value(b, off),
    }
}

/// The child reference of a parent item.
pub(super) fn child_ref(b: &[u8], off: usize) -> BlockRef {
    BlockRef::read_from_bytes(value(b, off)).expect("parent values are references")
}

/// Stores the child reference of a parent item.
pub(super) fn set_child_ref(b: &mut [u8], off: usize, block_ref: &BlockRef) {
    value_mut(b, off).copy_from_slice(block_ref.as_bytes());
}

/// Changes the key of a parent item; its order among the others stays.
pub(super) fn set_parent_key(b: &mut [u8], off: usize, key: Key) {
    item_mut(b, off).key = key.into();
}

/// Compares a key with a stored one in the order of the format.
#[inline]
pub(super) fn compare(key: &Key, stored: &DiskKey) -> Ordering {
    (key.zone.cmp(&stored.zone))
        .then_with(|| key.first.cmp(&stored.first.get()))
        .then_with(|| key.kind.cmp(&stored.kind))
        .then_with(|| key.second.cmp(&stored.second.get()))
        .then_with(|| key.third.cmp(&stored.third.get()))
        .then_with(|| key.fourth.cmp(&stored.fourth))
}

/// Makes a zeroed block (with its header) an empty btree block of `level`.
pub(super) fn init_block(b: &mut [u8], level: u8) {
    let gap = values_end(level) - BTREE_HEAD_SIZE;
    let head = head_mut(b);
    head.level = level;
    head.mid_free_len = (gap as u16).into();
}

/// Whether a value of `len` can be inserted without compacting, in a block that
/// holds at most `space` bytes of items.
pub(super) fn has_room(b: &[u8], len: usize, space: usize) -> bool {
    let need = item_bytes(len);
    mid_free(b) >= need && total_bytes(b) + need <= space
}

fn add_total(b: &mut [u8], plus: usize, minus: usize) {
    let total = total_bytes(b) + plus - minus;
    head_mut(b).total_item_bytes = (total as u16).into();
}

/// Takes value space from the end of the gap and copies `val` there; the
/// rounding bytes become zero. The gap must have it.
fn place_value(b: &mut [u8], val: &[u8]) -> usize {
    if val.is_empty() {
        return 0;
    }
    let (gap, size) = (mid_free(b), value_bytes(val.len()));
    let at = slot(nr_items(b)) + gap - size;
    b[at..at + val.len()].copy_from_slice(val);
    b[at + val.len()..at + size].fill(0);
    head_mut(b).mid_free_len = ((gap - size) as u16).into();
    at
}

/// What [`create_item`] stores.
#[derive(Clone, Copy)]
pub(super) struct NewItem<'a> {
    pub(super) key: Key,
    pub(super) seq: u64,
    pub(super) flags: u8,
    pub(super) value: &'a [u8],
}

/// Adds an item whose key is not in the block.
///
/// # Panics
/// If there is no room: callers make it first.
pub(super) fn create_item(b: &mut [u8], new: NewItem<'_>) {
    let len = new.value.len();
    assert!(
        mid_free(b) >= item_bytes(len),
        "no room for item {}",
        new.key
    );
    let at = super::avl::search(b, &new.key);
    assert!(at.node == NONE, "item {} is created twice", new.key);
    let off = slot(nr_items(b));
    let head = head_mut(b);
    head.mid_free_len -= BTREE_ITEM_SIZE as u16;
    head.nr_items += 1;
    let val_off = place_value(b, new.value);
    *item_mut(b, off) = BtreeItem {
        key: new.key.into(),
        seq: new.seq.into(),
        val_off: (val_off as u16).into(),
        val_len: (len as u16).into(),
        flags: new.flags,
        ..BtreeItem::default()
    };
    super::avl::insert(b, off, &at);
    if is_leaf(b) {
        super::hash::insert(b, off);
    }
    add_total(b, item_bytes(len), 0);
}

/// Removes an item. The last slot moves into its place: keep no slot across this.
pub(super) fn delete_item(b: &mut [u8], off: usize) {
    let len = item(b, off).val_len.get() as usize;
    let leaf = is_leaf(b);
    super::avl::remove(b, off);
    if leaf {
        super::hash::remove(b, off);
    }
    let last = slot(nr_items(b) - 1);
    let head = head_mut(b);
    head.nr_items -= 1;
    head.mid_free_len += BTREE_ITEM_SIZE as u16;
    add_total(b, 0, item_bytes(len));
    if off != last {
        if leaf {
            super::hash::change(b, last, off);
        }
        let moved = *item(b, last);
        *item_mut(b, off) = moved;
        super::avl::relocate(b, last, off);
    }
}

/// Replaces an item's value. Room for a whole item of the new length must be
/// there, but is not used if the space of the old value is just right.
pub(super) fn update_item(b: &mut [u8], off: usize, val: &[u8]) {
    let old = item(b, off).val_len.get() as usize;
    let val_off = if value_bytes(old) == value_bytes(val.len()) {
        let at = item(b, off).val_off.get() as usize;
        b[at..at + val.len()].copy_from_slice(val);
        b[at + val.len()..at + value_bytes(old)].fill(0);
        at
    } else {
        assert!(
            mid_free(b) >= value_bytes(val.len()),
            "no room for the value of item {}",
            key(b, off)
        );
        place_value(b, val)
    };
    let it = item_mut(b, off);
    it.val_off = (val_off as u16).into();
    it.val_len = (val.len() as u16).into();
    add_total(b, value_bytes(val.len()), value_bytes(old));
}

/// Closes the holes between values.
pub(super) fn compact(b: &mut [u8]) {
    let nr = nr_items(b);
    let mut values: Vec<(u16, u16, usize)> = (0..nr)
        .map(|i| (item(b, slot(i)), slot(i)))
        .filter(|(it, _)| it.val_len.get() > 0)
        .map(|(it, off)| (it.val_off.get(), it.val_len.get(), off))
        .collect();
    values.sort_unstable_by_key(|(at, ..)| std::cmp::Reverse(*at));
    let mut end = values_end(head(b).level);
    for (at, len, off) in values {
        let (at, size) = (at as usize, value_bytes(len as usize));
        end -= size;
        if end != at {
            b.copy_within(at..at + size, end);
            item_mut(b, off).val_off = (end as u16).into();
        }
    }
    head_mut(b).mid_free_len = ((end - slot(nr)) as u16).into();
}

/// Which end of the source items are moved from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// The first items of the right block, to the left one.
    Left,
    /// The last items of the left block, to the right one.
    Right,
}

/// Moves items until at least `to_move` bytes are moved or `src` is empty.
pub(super) fn move_items(dst: &mut [u8], src: &mut [u8], direction: Direction, to_move: usize) {
    let mut moved = 0;
    while moved < to_move {
        let off = match direction {
            Direction::Left => super::avl::first(src),
            Direction::Right => super::avl::last(src),
        };
        if off == NONE {
            return;
        }
        let it = item_ref(src, off);
        moved += item_bytes(it.value.len());
        let new = NewItem {
            key: it.key,
            seq: it.seq,
            flags: it.flags,
            value: it.value,
        };
        create_item(dst, new);
        delete_item(src, off);
    }
}

//! The hash table at the end of leaf blocks: linear probing, no tombstones
//! (spec 02 section 8).

use super::layout::{NONE, item};
use crate::format::{BTREE_HASH_BUCKETS, BTREE_HASH_START, Key, leaf_bucket_bytes};
use zerocopy::IntoBytes;

fn bucket(b: &[u8], nr: usize) -> usize {
    let at = BTREE_HASH_START + nr * 2;
    u16::from_le_bytes([b[at], b[at + 1]]) as usize
}

fn set_bucket(b: &mut [u8], nr: usize, off: usize) {
    let at = BTREE_HASH_START + nr * 2;
    b[at..at + 2].copy_from_slice(&(off as u16).to_le_bytes());
}

const fn after(nr: usize) -> usize {
    (nr + 1) % BTREE_HASH_BUCKETS
}

fn home(b: &[u8], off: usize) -> usize {
    let key: &[u8; 32] = item(b, off)
        .key
        .as_bytes()
        .try_into()
        .expect("a key's bytes");
    leaf_bucket_bytes(key)
}

/// The item with `key`, or none. Ends, because validated leaves have empty buckets.
pub(super) fn search(b: &[u8], key: &Key) -> usize {
    let bytes = key.to_bytes();
    let mut nr = leaf_bucket_bytes(&bytes);
    loop {
        let off = bucket(b, nr);
        if off == NONE || item(b, off).key.as_bytes() == bytes {
            return off;
        }
        nr = after(nr);
    }
}

/// Adds the item at `off`.
pub(super) fn insert(b: &mut [u8], off: usize) {
    let mut nr = home(b, off);
    while bucket(b, nr) != NONE {
        nr = after(nr);
    }
    set_bucket(b, nr, off);
}

/// The bucket that holds the item at `off`.
fn find(b: &[u8], off: usize) -> usize {
    let mut nr = home(b, off);
    while bucket(b, nr) != off {
        assert!(
            bucket(b, nr) != NONE,
            "item slot {off} is not in its leaf's hash table"
        );
        nr = after(nr);
    }
    nr
}

/// Removes the item at `off` and moves those up that it kept from their homes.
pub(super) fn remove(b: &mut [u8], off: usize) {
    let mut nr = find(b, off);
    set_bucket(b, nr, NONE);
    loop {
        nr = after(nr);
        let follower = bucket(b, nr);
        if follower == NONE {
            return;
        }
        set_bucket(b, nr, NONE);
        insert(b, follower);
    }
}

/// The item at slot `from` is about to move to slot `to`.
pub(super) fn change(b: &mut [u8], from: usize, to: usize) {
    let nr = find(b, from);
    set_bucket(b, nr, to);
}

/// Number of used buckets; `Err` with an offset that is no item of the block.
pub(super) fn count_used(b: &[u8], is_slot: impl Fn(usize) -> bool) -> Result<usize, usize> {
    let mut used = 0;
    for nr in 0..BTREE_HASH_BUCKETS {
        let off = bucket(b, nr);
        if off != NONE {
            used += 1;
            if !is_slot(off) {
                return Err(off);
            }
        }
    }
    Ok(used)
}

//! Looking at single validated blocks: for `check`, `print` and mkfs, which walk
//! or make trees by themselves.

use super::layout::{self, NONE, NewItem};
use super::{ItemRef, avl};
use crate::format::{BlockRef, Key, LG_BLOCK_SIZE};

/// A child of a parent block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    /// Greatest key that the child may hold.
    pub key: Key,
    /// The child.
    pub block_ref: BlockRef,
}

/// Calls `f` for each item of a block that [`super::verify_block`] accepted, in
/// key order.
pub fn block_items(bytes: &[u8], mut f: impl FnMut(ItemRef<'_>)) {
    let mut off = avl::first(bytes);
    while off != NONE {
        f(layout::item_ref(bytes, off));
        off = avl::next(bytes, off);
    }
}

/// The children of a parent block that [`super::verify_block`] accepted, in key order.
pub fn children(bytes: &[u8]) -> Vec<Child> {
    let mut out = Vec::with_capacity(layout::nr_items(bytes));
    let mut off = avl::first(bytes);
    while off != NONE {
        out.push(Child {
            key: layout::key(bytes, off),
            block_ref: layout::child_ref(bytes, off),
        });
        off = avl::next(bytes, off);
    }
    out
}

/// Makes a zeroed large block a leaf with `items`; the header is the caller's.
///
/// # Panics
/// If they do not fit, or two have the same key.
pub fn new_leaf<'a>(bytes: &mut [u8], items: impl IntoIterator<Item = ItemRef<'a>>) {
    assert_eq!(bytes.len(), LG_BLOCK_SIZE, "not a btree block");
    layout::init_block(bytes, 0);
    for it in items {
        let new = NewItem {
            key: it.key,
            seq: it.seq,
            flags: it.flags,
            value: it.value,
        };
        layout::create_item(bytes, new);
    }
}

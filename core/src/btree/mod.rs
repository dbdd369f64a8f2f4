//! Copy-on-write btrees of 64 KiB blocks: every metadata index of the volume
//! (spec 02).
//!
//! A root ([`crate::format::BtreeRoot`]) names a complete immutable version. Readers need no
//! lock: a block that was reused meanwhile fails its reference
//! ([`BtreeError::is_stale`]), and they start again with newer roots. Writers
//! change dirty copies in a [`crate::block::Tx`]; who may write a tree is the callers' matter.
//!
//! What can go wrong: offsets inside blocks are followed, so every block is
//! validated whole ([`verify_block`]) when it enters the cache. There is no
//! rollback inside a transaction: after an error in the middle of a change the
//! caller undoes it with further operations or abandons the transaction.

mod avl;
mod free;
mod hash;
mod items;
mod layout;
mod merge;
mod ops;
mod parents;
mod verify;
mod visit;
mod walk;

pub use free::free_blocks;
pub use items::{Combined, combine_delta, insert_list, is_delta, read_items};
pub use merge::{Merged, merge};
pub(crate) use ops::undo_insert;
pub use ops::{delete, dirty, force, insert, lookup, next, prev, rebalance, update};
pub use parents::{get_parent, parent_range, set_parent};
pub use verify::verify_block;
pub use visit::{Child, block_items, children, new_leaf};
pub use walk::check_root;

use crate::block::BlockError;
use crate::errno::Errno;
use crate::format::Key;
use bytes::Bytes;
use thiserror::Error;

/// An item with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Key.
    pub key: Key,
    /// Version of the item; 0 in server trees.
    pub seq: u64,
    /// `ITEM_FLAG_DELETION`.
    pub flags: u8,
    /// Value, at most 896 bytes.
    pub value: Bytes,
}

/// An item in a block, for callbacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ItemRef<'a> {
    /// Key.
    pub key: Key,
    /// Version of the item.
    pub seq: u64,
    /// `ITEM_FLAG_DELETION`.
    pub flags: u8,
    /// Value.
    pub value: &'a [u8],
}

/// An item to be put in a log tree by [`insert_list`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListItem {
    /// Key.
    pub key: Key,
    /// Version of the item.
    pub seq: u64,
    /// `ITEM_FLAG_DELETION`; then the value is empty.
    pub flags: u8,
    /// Value, at most 896 bytes.
    pub value: Bytes,
}

/// Why a btree operation failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BtreeError {
    /// A block could not be read, allocated or freed.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The key has no item.
    #[error("item {0} does not exist")]
    NotFound(Key),
    /// The key has an item already.
    #[error("item {0} exists already")]
    Exists(Key),
    /// The value is longer than any item's may be.
    #[error("the value of item {key} has {len} bytes, the most is 896")]
    ValueLength {
        /// Key of the item.
        key: Key,
        /// Length of the value.
        len: usize,
    },
    /// A delta item whose value is not a total and a count.
    #[error("delta item {key} has {len} bytes, expected 16")]
    DeltaLength {
        /// Key of the item.
        key: Key,
        /// Length found.
        len: usize,
    },
    /// A replacement for a level-1 block has another height (EINVAL).
    #[error("a parent block is replaced by a tree of height {height}, expected 2")]
    ParentHeight {
        /// Height of the replacement.
        height: u8,
    },
    /// A tree is higher than the format allows, or its reference and height disagree.
    #[error("root {block_ref} has height {height}")]
    BadRoot {
        /// Reference to the root block.
        block_ref: crate::format::BlockRef,
        /// Height.
        height: u8,
    },
}

impl BtreeError {
    /// Whether newer roots may help.
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Block(err) if err.is_stale())
    }

    /// The error number of the original for it.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Block(err) => err.errno(),
            Self::NotFound(_) => Errno::ENOENT,
            Self::Exists(_) => Errno::EEXIST,
            Self::ValueLength { .. } | Self::ParentHeight { .. } => Errno::EINVAL,
            Self::DeltaLength { .. } | Self::BadRoot { .. } => Errno::EIO,
        }
    }
}

#[cfg(test)]
mod tests;

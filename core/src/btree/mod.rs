//! Copy-on-write btrees of 64 KiB blocks: every metadata index of the volume
//! (spec 02).
//!
//! A root ([`BtreeRoot`]) names a complete immutable version. Readers need no
//! lock: a block that was reused meanwhile fails its reference
//! ([`BtreeError::is_stale`]), and they start again with newer roots. Writers
//! change dirty copies in a [`Tx`]; who may write a tree is the callers' matter.
//!
//! What can go wrong: offsets inside blocks are followed, so every block is
//! validated whole ([`verify_block`]) when it enters the cache. There is no
//! rollback inside a transaction: after an error in the middle of a change the
//! caller undoes it with further operations or abandons the transaction.

use crate::block::{BlockError, Cache, Corruption, Tx};
use crate::env::mutant;
use crate::errno::Errno;
use crate::format::{BtreeRoot, Key, KeyRange};
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

/// The item with `key` (spec 02 section 14).
///
/// # Errors
/// Read errors; stale roots.
pub async fn lookup(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
) -> Result<Option<Item>, BtreeError> {
    unreachable!("lands next: {cache:?} {root:?} {key}")
}

/// The first item at or after `key`.
///
/// # Errors
/// As [`lookup`].
pub async fn next(cache: &Cache, root: &BtreeRoot, key: &Key) -> Result<Option<Item>, BtreeError> {
    unreachable!("lands next: {cache:?} {root:?} {key}")
}

/// The last item at or before `key`.
///
/// # Errors
/// As [`lookup`].
pub async fn prev(cache: &Cache, root: &BtreeRoot, key: &Key) -> Result<Option<Item>, BtreeError> {
    unreachable!("lands next: {cache:?} {root:?} {key}")
}

/// Adds an item with seq 0 and no flags.
///
/// # Errors
/// `Exists`, `ValueLength`; block errors.
pub async fn insert(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    value: &[u8],
) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key} {value:?}")
}

/// Replaces the value of an existing item.
///
/// # Errors
/// `NotFound`, `ValueLength`; block errors.
pub async fn update(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    value: &[u8],
) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key} {value:?}")
}

/// Adds an item or replaces its value.
///
/// # Errors
/// `ValueLength`; block errors.
pub async fn force(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    value: &[u8],
) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key} {value:?}")
}

/// Removes an item.
///
/// # Errors
/// `NotFound`; block errors.
pub async fn delete(tx: &Tx, root: &mut BtreeRoot, key: &Key) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key}")
}

/// Makes the path to an existing item dirty, so that changing this item later in
/// the transaction reads and copies nothing.
///
/// # Errors
/// `NotFound`; block errors.
pub async fn dirty(tx: &Tx, root: &mut BtreeRoot, key: &Key) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key}")
}

/// Calls `f` for each item in key order of the one leaf that covers `key`, within
/// `range`, and narrows `range` to what the leaf covers. An empty tree has no
/// items and leaves the range alone.
///
/// # Errors
/// As [`lookup`].
pub async fn read_items(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
    range: &mut KeyRange,
    f: &mut dyn FnMut(ItemRef<'_>),
) -> Result<(), BtreeError> {
    f(ItemRef {
        key: *key,
        seq: 0,
        flags: 0,
        value: &[],
    });
    unreachable!("lands next: {cache:?} {root:?} {range}")
}

/// Puts items, sorted by key, in a log tree: each is inserted or overwrites the
/// item there; delta items are added up. `done` counts the items consumed.
/// Combining deltas is not idempotent: after an error start again from the root
/// as it was before the transaction.
///
/// # Errors
/// Block errors, `ValueLength`, `DeltaLength`; a part of the list may be in the tree.
pub async fn insert_list(
    tx: &Tx,
    root: &mut BtreeRoot,
    list: &[ListItem],
    done: &mut usize,
) -> Result<(), BtreeError> {
    unreachable!(
        "lands next: {tx:?} {root:?} {list:?} {done} {}",
        mutant("x")
    )
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
    key.zone == crate::format::ZONE_XATTR_TOTL
}

/// Adds the delta `src` to `dst` (spec 02 section 14).
///
/// # Errors
/// `DeltaLength` unless both are 16 bytes.
pub fn combine_delta(key: &Key, dst: &mut [u8], src: &[u8]) -> Result<Combined, BtreeError> {
    unreachable!("lands next: {key} {dst:?} {src:?}")
}

/// The keys reachable through the level-1 block on the path to `key`
/// (everything if the height is at most 2).
///
/// # Errors
/// As [`lookup`].
pub async fn parent_range(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
) -> Result<KeyRange, BtreeError> {
    unreachable!("lands next: {cache:?} {root:?} {key}")
}

/// A root for the level-1 block on the path to `key` (the whole tree if its
/// height is at most 2).
///
/// # Errors
/// As [`lookup`].
pub async fn get_parent(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
) -> Result<BtreeRoot, BtreeError> {
    unreachable!("lands next: {cache:?} {root:?} {key}")
}

/// Replaces the level-1 block on the path to `key`. Blocks are neither allocated
/// nor freed for the subtree itself: the caller splices the lists that account
/// for them in the same transaction.
///
/// # Errors
/// `ParentHeight`; block errors.
pub async fn set_parent(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    parent: &BtreeRoot,
) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key} {parent:?}")
}

/// Splits or joins every block on the path to `key` that needs it.
///
/// # Errors
/// Block errors.
pub async fn rebalance(tx: &Tx, root: &mut BtreeRoot, key: &Key) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key}")
}

/// How far [`merge`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The whole range is merged.
    All,
    /// Everything before this key is merged: commit and go on from it (ERANGE).
    Until(Key),
}

/// Applies all items of the log trees `inputs` within `range` to `root` (spec 02
/// section 16). `subtree`: `root` is a level-1 block of a higher tree.
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
    unreachable!("lands next: {tx:?} {root:?} {inputs:?} {range} {subtree}")
}

/// Frees blocks of a dead tree, at most `budget` of them, going on from `key`
/// (at first zeros), which becomes ones when all are freed (spec 02 section 17).
///
/// # Errors
/// Block errors.
pub async fn free_blocks(
    tx: &Tx,
    root: &BtreeRoot,
    key: &mut Key,
    budget: u32,
) -> Result<(), BtreeError> {
    unreachable!("lands next: {tx:?} {root:?} {key} {budget}")
}

/// Checks a whole btree block by itself: every invariant of spec 02 section 20
/// but those that need other blocks. `level` is the expected level.
///
/// # Errors
/// The first thing found to be wrong.
pub fn verify_block(bytes: &[u8], level: u8) -> Result<(), Corruption> {
    unreachable!("lands next: {} {level}", bytes.len())
}

//! Allocation of metadata and data blocks (spec 03): trees of free extents,
//! lists of single blocks, the data allocator of a mount.
//!
//! Frees never feed allocations of the same transaction: a block can be
//! allocated only after the commit that stopped referring to it is stable.
//!
//! What can go wrong: an extent that is inserted twice. Overlap is found when
//! inserting and is an error ([`AllocError::Overlap`]); it means a double free
//! somewhere before.

pub use crate::block::{Mark, Policy, Room, Tx};

use crate::block::{BlockError, Cache};
use crate::btree::BtreeError;
use crate::env::DeviceError;
use crate::errno::Errno;
use crate::format::{AllocListHead, AllocRoot, Key, LogTrees, SuperBlock};
use thiserror::Error;

/// Why an allocation or a free failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AllocError {
    /// A btree or block operation failed.
    #[error(transparent)]
    Btree(#[from] BtreeError),
    /// An extent that is inserted overlaps one that is there (a double free).
    #[error("free extent {start}+{len} overlaps {found_start}+{found_len}")]
    Overlap {
        /// First block of the extent that was to be inserted.
        start: u64,
        /// Its length.
        len: u64,
        /// First block of the stored extent.
        found_start: u64,
        /// Its length.
        found_len: u64,
    },
    /// The extent is not wholly inside one stored extent (EINVAL).
    #[error("extent {start}+{len} is not inside of one stored extent")]
    NotContained {
        /// First block.
        start: u64,
        /// Length.
        len: u64,
    },
    /// No extent is left (ENOENT).
    #[error("no free extent is left")]
    NoExtent,
    /// The extent reaches outside of the volume (EINVAL).
    #[error("extent {start}+{len} is outside of the volume's blocks {first}..{total}")]
    OutOfRange {
        /// First block.
        start: u64,
        /// Length.
        len: u64,
        /// First valid block.
        first: u64,
        /// Blocks of the device.
        total: u64,
    },
    /// The caller's budget is used up; progress was made and is valid (EINPROGRESS).
    #[error("the transaction's budget is used up, more remains to be done")]
    InProgress,
    /// No free block is left (ENOSPC).
    #[error("no free block is left")]
    NoSpace,
    /// The mount's data extents are used up: commit, be refilled, try again
    /// (ENOBUFS, never seen by users).
    #[error("no data block is left for this transaction")]
    Refill,
    /// A list operation was asked to work on the running allocator's own list.
    #[error("the list belongs to the running transaction")]
    RunningList,
    /// An item of an extent tree that makes no sense (EIO).
    #[error("free extent item {0} is malformed")]
    BadItem(Key),
}

impl From<BlockError> for AllocError {
    fn from(err: BlockError) -> Self {
        Self::Btree(BtreeError::Block(err))
    }
}

impl AllocError {
    /// Whether newer roots may help.
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Btree(err) if err.is_stale())
    }

    /// The error number of the original for it.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Btree(err) => err.errno(),
            Self::Overlap { .. }
            | Self::NotContained { .. }
            | Self::OutOfRange { .. }
            | Self::RunningList => Errno::EINVAL,
            Self::NoExtent => Errno::ENOENT,
            Self::InProgress => Errno(115),
            Self::NoSpace => Errno::ENOSPC,
            Self::Refill => Errno::ENOBUFS,
            Self::BadItem(_) => Errno::EIO,
        }
    }
}

/// A run of free blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeExtent {
    /// First block.
    pub start: u64,
    /// Number of blocks.
    pub len: u64,
}

/// List entries that one change of an extent tree of this height may use.
pub fn ext_mod(height: u8) -> u32 {
    15 * (u32::from(height) + 1)
}

/// Adds a free extent (resize, frees).
///
/// # Errors
/// `Overlap`; btree errors.
pub async fn insert_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    start: u64,
    len: u64,
) -> Result<(), AllocError> {
    unreachable!("lands next: {tx:?} {root:?} {start} {len}")
}

/// Removes a part of a free extent.
///
/// # Errors
/// `NotContained`, `NoExtent`; btree errors.
pub async fn remove_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    start: u64,
    len: u64,
) -> Result<(), AllocError> {
    unreachable!("lands next: {tx:?} {root:?} {start} {len}")
}

/// Takes up to `count` blocks from the largest order of extents, lowest address first.
///
/// # Errors
/// `NoExtent`; btree errors.
pub async fn alloc_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    count: u64,
) -> Result<FreeExtent, AllocError> {
    unreachable!("lands next: {tx:?} {root:?} {count}")
}

/// All free extents in address order.
///
/// # Errors
/// `BadItem`; btree errors.
pub async fn read_extents(
    cache: &Cache,
    root: &AllocRoot,
    f: &mut dyn FnMut(FreeExtent),
) -> Result<(), AllocError> {
    f(FreeExtent { start: 0, len: 0 });
    unreachable!("lands next: {cache:?} {root:?}")
}

/// Data zones, for the choice of [`move_extents`] (spec 03 section 9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zones {
    /// Small blocks of a zone.
    pub zone_blocks: u64,
    /// Zones that only the caller's mount uses.
    pub exclusive: [u64; 16],
    /// Zones that no mount uses.
    pub vacant: [u64; 16],
}

impl Zones {
    /// The zones as mount `rid` may use them, from all log trees items; `None` if
    /// the option is unset or unusable.
    pub fn for_mount(super_block: &SuperBlock, rid: u64, all: &[LogTrees]) -> Option<Self> {
        unreachable!("lands next: {super_block:?} {rid} {all:?}")
    }
}

/// Recomputes the zone bitmap of a log trees item from its data_avail (and zeroes
/// it if `zone_blocks` is 0).
///
/// # Errors
/// As [`read_extents`].
pub async fn set_zone_bits(
    cache: &Cache,
    lt: &mut LogTrees,
    zone_blocks: u64,
) -> Result<(), AllocError> {
    unreachable!("lands next: {cache:?} {lt:?} {zone_blocks}")
}

/// Moves `total` blocks from `src` to `dst` (spec 03 section 8). Both roots can
/// have changed even when an error is returned: store both. Success may mean
/// partial progress when the transaction is low: look at the lengths.
///
/// # Errors
/// `InProgress` if `budget` (0: none) is used up, `NoSpace` if not even one
/// extent could be moved, `NoExtent` if `src` has less; btree errors.
pub async fn move_extents(
    tx: &Tx,
    dst: &mut AllocRoot,
    src: &mut AllocRoot,
    total: u64,
    zones: Option<&Zones>,
    budget: u32,
) -> Result<(), AllocError> {
    unreachable!("lands next: {tx:?} {dst:?} {src:?} {total} {zones:?} {budget}")
}

/// Whether the transaction has room for `extents` changes of a tree and `extra` entries.
pub fn has_room(tx: &Tx, root: &AllocRoot, extents: u32, extra: u32) -> bool {
    tx.remaining()
        .fits(1 + ext_mod(root.root.height) * extents + extra)
}

/// Fills a list that has fewer than `lo` entries from `root` up to `target`; may
/// stop early with success when the transaction is low (spec 03 section 7).
///
/// # Errors
/// `NoSpace` if `root` is empty, `RunningList`; btree errors.
pub async fn fill_list(
    tx: &Tx,
    head: &mut AllocListHead,
    root: &mut AllocRoot,
    lo: u32,
    target: u32,
) -> Result<(), AllocError> {
    unreachable!("lands next: {tx:?} {head:?} {root:?} {lo} {target}")
}

/// Moves a list's blocks to `root` as extents; may stop early with success,
/// leaving the rest.
///
/// # Errors
/// `Overlap`, `RunningList`; btree errors.
pub async fn empty_list(
    tx: &Tx,
    head: &mut AllocListHead,
    root: &mut AllocRoot,
) -> Result<(), AllocError> {
    unreachable!("lands next: {tx:?} {head:?} {root:?}")
}

/// Puts the blocks of `src` in front of `dst`; `src` becomes empty, flags too.
///
/// # Errors
/// `RunningList`; block errors.
pub async fn splice_list(
    tx: &Tx,
    dst: &mut AllocListHead,
    src: &mut AllocListHead,
) -> Result<(), AllocError> {
    unreachable!("lands next: {tx:?} {dst:?} {src:?}")
}

/// Sets or clears the LOW flag of a list head.
pub fn set_list_low(head: &mut AllocListHead, low: bool) {
    head.flags = (head.flags.get() & !crate::format::ALLOC_FLAG_LOW | u32::from(low)).into();
}

/// Sets or clears the LOW flag of an extent tree.
pub fn set_root_low(root: &mut AllocRoot, low: bool) {
    root.flags = (root.flags.get() & !crate::format::ALLOC_FLAG_LOW | u32::from(low)).into();
}

/// Whether a list head has the LOW flag.
pub fn list_is_low(head: &AllocListHead) -> bool {
    head.flags.get() & crate::format::ALLOC_FLAG_LOW != 0
}

/// Whether an extent tree has the LOW flag.
pub fn root_is_low(root: &AllocRoot) -> bool {
    root.flags.get() & crate::format::ALLOC_FLAG_LOW != 0
}

/// The data allocator of one mount's transaction (spec 03 section 10). Calls are
/// one at a time.
#[derive(Clone, Debug)]
pub struct DataAlloc {
    /// Extents that may be allocated.
    pub avail: AllocRoot,
    /// Extents freed in this transaction.
    pub freed: AllocRoot,
    cached: FreeExtent,
}

impl DataAlloc {
    /// An allocator over the mount's two trees.
    pub fn new(avail: AllocRoot, freed: AllocRoot) -> Self {
        let cached = FreeExtent { start: 0, len: 0 };
        Self {
            avail,
            freed,
            cached,
        }
    }

    /// Takes up to `count` blocks.
    ///
    /// # Errors
    /// `Refill` to commit and try again, `NoSpace` if the volume is full too.
    pub async fn alloc_data(&mut self, tx: &Tx, count: u64) -> Result<FreeExtent, AllocError> {
        unreachable!("lands next: {tx:?} {count}")
    }

    /// Frees an extent; it can be allocated only after the transaction.
    ///
    /// # Errors
    /// `OutOfRange` against `total_data_blocks`, `Overlap`; btree errors.
    pub async fn free_data(
        &mut self,
        tx: &Tx,
        start: u64,
        len: u64,
        total_data_blocks: u64,
    ) -> Result<(), AllocError> {
        unreachable!("lands next: {tx:?} {start} {len} {total_data_blocks}")
    }

    /// Puts the rest of the cached extent back into the tree, before a commit.
    ///
    /// # Errors
    /// Btree errors.
    pub async fn return_cached(&mut self, tx: &Tx) -> Result<(), AllocError> {
        unreachable!("lands next: {tx:?}")
    }

    /// Blocks that can be allocated.
    pub fn total_len(&self) -> u64 {
        self.avail.total_len.get() + self.cached.len
    }

    /// Whether the mount should commit to be refilled (spec 03 section 18 rule 3).
    pub fn wants_refill(&self, policy: &Policy) -> bool {
        self.total_len() < policy.data_refill && !root_is_low(&self.avail)
    }
}

/// Who holds blocks of a total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The server.
    Server,
    /// A mount.
    Mount,
    /// A srch compaction.
    Srch,
    /// A log merge.
    LogMerge,
}

/// Free blocks in one structure (spec 03 section 19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Total {
    /// Kind of owner.
    pub owner: Owner,
    /// Which one: rid, compaction id, or a number of the server's structures.
    pub id: u64,
    /// Metadata (large) blocks, else data (small) blocks.
    pub meta: bool,
    /// Allocatable now, else freed and not yet reusable.
    pub avail: bool,
    /// Number of blocks.
    pub blocks: u64,
}

/// Reports every structure of free blocks of one super block, in the order of
/// spec 03 section 19.
///
/// # Errors
/// Stale reads: throw away what was reported and walk a newer super.
pub async fn read_totals(
    cache: &Cache,
    super_block: &SuperBlock,
    f: &mut dyn FnMut(Total),
) -> Result<(), AllocError> {
    f(Total {
        owner: Owner::Server,
        id: 0,
        meta: true,
        avail: true,
        blocks: 0,
    });
    unreachable!("lands next: {cache:?} {super_block:?}")
}

/// Sums for statfs of one super block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatfsSums {
    /// Free metadata blocks, freed ones counted.
    pub free_meta_blocks: u64,
    /// Free data blocks, freed ones counted.
    pub free_data_blocks: u64,
    /// Inodes, with the deltas of all log trees.
    pub inode_count: u64,
}

/// Sums all totals and inode counts (spec 03 section 19).
///
/// # Errors
/// As [`read_totals`].
pub async fn read_statfs(
    cache: &Cache,
    super_block: &SuperBlock,
) -> Result<StatfsSums, AllocError> {
    unreachable!("lands next: {cache:?} {super_block:?}")
}

/// A device error while opening, for callers that have only [`AllocError`].
impl From<DeviceError> for AllocError {
    fn from(err: DeviceError) -> Self {
        Self::from(BlockError::device(0, err))
    }
}

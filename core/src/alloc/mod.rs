//! Allocation of metadata and data blocks (spec 03): trees of free extents,
//! lists of single blocks, the data allocator of a mount.
//!
//! Frees never feed allocations of the same transaction: a block can be
//! allocated only after the commit that stopped referring to it is stable.
//!
//! What can go wrong: an extent that is inserted twice. Overlap is found when
//! inserting and is an error ([`AllocError::Overlap`]); it means a double free
//! somewhere before.

mod data;
mod free;
mod lists;
mod moves;
mod totals;
mod zones;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod world_tests;

pub use data::{DataAlloc, root_is_low, set_root_low};
pub use free::{alloc_extent, ext_mod, insert_extent, read_extents, remove_extent};
pub use lists::{
    empty_list, fill_list, has_room, list_is_low, recycle_list, set_list_low, splice_list,
    verify_list, widen_running,
};
pub use moves::move_extents;
pub use totals::{read_statfs, read_totals};
pub use zones::{Bitmap, Zones, has_zone, set_zone_bits, zones_of};

pub use crate::block::{Mark, Policy, Room, Tx};

use crate::block::BlockError;
use crate::btree::BtreeError;
use crate::env::DeviceError;
use crate::errno::Errno;
use crate::format::Key;
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

impl FreeExtent {
    /// Block after the last.
    pub fn end(&self) -> u64 {
        self.start + self.len
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

/// A device error while opening, for callers that have only [`AllocError`].
impl From<DeviceError> for AllocError {
    fn from(err: DeviceError) -> Self {
        Self::from(BlockError::device(0, err))
    }
}

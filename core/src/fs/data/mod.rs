//! File data: extents, buffers, reading, writing, truncation, preallocation
//! (spec 14).
//!
//! * [`extents`]: a file's extent items and the changes on them.
//! * [`prealloc`]: how much to allocate for a write, a pure function.
//! * [`pages`]: blocks written by users and not yet on the device.
//! * [`store`]: the data device, write-back, and what a commit waits for.
//! * `read`, `write`, `size` (truncate), `space` (fallocate, seek, fiemap, deletion).
//!
//! Data is buffered here, not in the kernel: the kernel writes through, a commit
//! starts all dirty blocks, waits for them and flushes before the transaction is
//! sent. Blocks are allocated when written, so a commit only does device I/O.
//!
//! What can go wrong:
//! * a block on the device before its old content may go: only blocks that the
//!   item says are ours, or that were allocated in this transaction, are written;
//! * two writes of one block under way at once: a block is written again only
//!   after its write under way has ended;
//! * a failed write forgotten: the block stays dirty and every commit fails until
//!   it is on the device.

mod extents;
mod pages;
mod prealloc;
mod read;
mod size;
mod space;
mod store;
mod write;

pub use pages::InodeData;
pub use store::DataStore;

/// Bytes of one block of file data.
pub(crate) const BLOCK: u64 = 4096;
/// Greatest logical block of a file.
pub(crate) const LAST_BLOCK: u64 = (1 << 52) - 1;
/// Greatest file size in bytes.
pub(crate) const MAX_SIZE: u64 = i64::MAX as u64;

/// FREE choices of the data layer, and the mount options of spec 17 section 2.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `data_prealloc_blocks`: most blocks preallocated at once.
    pub prealloc_blocks: u64,
    /// `data_prealloc_contig_only`: preallocate only for streaming writes.
    pub prealloc_contig_only: bool,
    /// Most blocks of one fallocate step.
    pub fallocate_step_blocks: u64,
    /// Extents removed in one transaction.
    pub extents_per_change: usize,
    /// Contiguous dirty bytes that are sent to the device at once.
    pub writeback_bytes: u64,
    /// Dirty bytes above which writers wait for the device.
    pub dirty_bytes_max: u64,
    /// Written bytes kept in memory until they are flushed, so that a failed flush
    /// can be made good. Beyond it a failed flush ends all commits of the mount.
    pub unflushed_bytes_max: u64,
    /// Requests up to which a commit writes file data durable by themselves, instead
    /// of a flush after all of them.
    pub fua_requests: usize,
    /// Bytes read ahead of a sequential reader; 0 for none.
    pub readahead_bytes: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            prealloc_blocks: 2048,
            prealloc_contig_only: true,
            fallocate_step_blocks: 32768,
            extents_per_change: 8,
            writeback_bytes: 1 << 20,
            dirty_bytes_max: 256 << 20,
            unflushed_bytes_max: 64 << 20,
            fua_requests: 2,
            readahead_bytes: 4 << 20,
        }
    }
}

/// Blocks that `size` bytes reach into.
pub(crate) const fn blocks_of(size: u64) -> u64 {
    size.div_ceil(BLOCK)
}

#[cfg(test)]
mod tests;

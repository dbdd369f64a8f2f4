//! The data allocator of a mount's transaction (spec 03 section 10).
//!
//! What can go wrong: freed data allocated again before the transaction that freed
//! it is durable; a crash would show the new content in the old file. What is freed
//! goes to a tree of its own, from which nothing is allocated.

use super::{AllocError, FreeExtent, Policy, Tx, alloc_extent, insert_extent};
use crate::env::probe;
use crate::format::{ALLOC_FLAG_LOW, AllocRoot, DATA_DEV_START_BLKNO};

/// Sets or clears the LOW flag of an extent tree.
pub fn set_root_low(root: &mut AllocRoot, low: bool) {
    root.flags = (root.flags.get() & !ALLOC_FLAG_LOW | u32::from(low)).into();
}

/// Whether an extent tree has the LOW flag.
pub fn root_is_low(root: &AllocRoot) -> bool {
    root.flags.get() & ALLOC_FLAG_LOW != 0
}

/// The data allocator of one mount's transaction. Calls are one at a time.
#[derive(Clone, Debug)]
pub struct DataAlloc {
    /// Extents that may be allocated.
    pub avail: AllocRoot,
    /// Extents freed in this transaction.
    pub freed: AllocRoot,
    cached: FreeExtent,
}

const NONE: FreeExtent = FreeExtent { start: 0, len: 0 };

impl DataAlloc {
    /// An allocator over the mount's two trees.
    pub fn new(avail: AllocRoot, freed: AllocRoot) -> Self {
        Self {
            avail,
            freed,
            cached: NONE,
        }
    }

    /// Takes up to `count` blocks. Small requests are cut from a cached extent, so
    /// that they are adjacent and change no tree.
    ///
    /// # Errors
    /// `Refill` to commit and try again, `NoSpace` if the volume is full too.
    ///
    /// # Panics
    /// If `count` is 0.
    pub async fn alloc_data(&mut self, tx: &Tx, count: u64) -> Result<FreeExtent, AllocError> {
        let chunk = tx.policy().data_cached;
        if count >= chunk && self.avail.total_len.get() > 0 {
            return alloc_extent(tx, &mut self.avail, count).await;
        }
        if self.cached.len == 0 {
            self.cached = match alloc_extent(tx, &mut self.avail, chunk).await {
                Err(AllocError::NoExtent) if root_is_low(&self.avail) => {
                    probe("alloc_data_no_space");
                    return Err(AllocError::NoSpace);
                }
                Err(AllocError::NoExtent) => {
                    probe("alloc_data_refill");
                    return Err(AllocError::Refill);
                }
                other => other?,
            };
        }
        let taken = FreeExtent {
            start: self.cached.start,
            len: self.cached.len.min(count),
        };
        self.cached.start += taken.len;
        self.cached.len -= taken.len;
        Ok(taken)
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
        let end = start.checked_add(len);
        let first = DATA_DEV_START_BLKNO;
        if len == 0 || start < first || end.is_none_or(|end| end > total_data_blocks) {
            let total = total_data_blocks;
            return Err(AllocError::OutOfRange {
                start,
                len,
                first,
                total,
            });
        }
        insert_extent(tx, &mut self.freed, start, len).await
    }

    /// Puts the rest of the cached extent back into the tree, before a commit.
    ///
    /// # Errors
    /// Btree errors; then the rest is still cached.
    pub async fn return_cached(&mut self, tx: &Tx) -> Result<(), AllocError> {
        if self.cached.len > 0 {
            insert_extent(tx, &mut self.avail, self.cached.start, self.cached.len).await?;
            self.cached = NONE;
        }
        Ok(())
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

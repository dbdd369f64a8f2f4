//! Every threshold of the block, btree and allocator layers that the spec marks
//! FREE (spec 02, 03 section 23). The defaults are production values, equal to
//! the original's; the simulator draws small ones so that full lists, splits and
//! ENOSPC come after hundreds of operations.

use crate::format::{ALLOC_LIST_MAX_BLOCKS, LG_BLOCK_SIZE};
use serde::{Deserialize, Serialize};

/// Thresholds. Blocks are large blocks (64 KiB) in `meta` fields, small blocks
/// (4 KiB) in `data` fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Clean blocks that a cache keeps at most.
    pub cache_blocks: usize,
    /// Adjacent blocks joined into one write at most.
    pub write_batch_blocks: usize,
    /// Block writes in flight at once.
    pub write_depth: usize,
    /// Requests up to which a mount's commit writes each durable by itself, instead
    /// of a flush after all of them.
    pub fua_requests: usize,
    /// Whether the devices need flushes for durability.
    pub flush: bool,
    /// Bytes of a btree block used for items before it is split; at least
    /// [`Policy::BTREE_SPACE_MIN`].
    pub btree_space: u16,
    /// Entries put in one alloc list block at most; at least [`Policy::LIST_MAX_MIN`].
    pub list_max: u32,
    /// A freed list with fewer free entries gets a new first block at the
    /// start of a transaction.
    pub list_rotate: u32,
    /// Metadata lists with fewer entries are filled ...
    pub meta_fill_lo: u32,
    /// ... up to this many.
    pub meta_fill_target: u32,
    /// Entries given to a log merge request (both lo and target).
    pub merge_fill: u32,
    /// Dirty blocks at which a log merge stops.
    pub merge_dirty_blocks: u64,
    /// A log merge stops when fewer blocks than this can be allocated.
    pub merge_alloc_low: u32,
    /// Bytes of log items that a merge holds in memory.
    pub merge_window_bytes: usize,
    /// Data blocks below which a mount's data_avail is refilled (and LOW) ...
    pub data_fill_lo: u64,
    /// ... up to this many.
    pub data_fill_target: u64,
    /// Data blocks below which a client commits to be refilled.
    pub data_refill: u64,
    /// Data allocations of this many blocks or more go to the tree; smaller
    /// ones are cut from a cached extent of this size.
    pub data_cached: u64,
    /// Data blocks that one step of fallocate asks for.
    pub fallocate_step: u64,
    /// Avail and freed entries that one holder of a server commit may use.
    pub commit_budget: u32,
    /// Entries that one `move_extents` of the server may use.
    pub move_budget: u32,
    /// Blocks freed by one step of `btree::free_blocks`.
    pub free_budget: u32,
    /// Entries used since the hold after which freeing loops commit.
    pub free_commit_limit: u32,
    /// Runs of freed blocks that a server commit takes back from a list at most; the
    /// rest waits for later commits. Not heeded when metadata is low.
    pub empty_runs: u32,
    /// Entries of the server's lists that one unit of splicing a merge may use:
    /// replacing, or rebalancing, one path of the fs root, and two spliced lists.
    pub splice_unit: u32,
    /// Margin kept by `move_extents` besides what one step needs.
    pub move_margin: u32,
    /// A client transaction with fewer entries left is committed.
    pub client_low: u32,
    /// Reserve: blocks kept for the server.
    pub reserve_server: u64,
    /// Reserve: blocks kept for each client.
    pub reserve_client: u64,
}

impl Policy {
    /// Least [`Policy::btree_space`]: below it a block that needs room could be
    /// neither split nor compacted (80 % of it must leave room for any item).
    pub const BTREE_SPACE_MIN: u16 = 5120;
    /// Least [`Policy::list_max`].
    pub const LIST_MAX_MIN: u32 = 8;

    /// Small values for tests and simulated worlds.
    pub fn small() -> Self {
        Self {
            cache_blocks: 64,
            write_batch_blocks: 4,
            btree_space: 8192,
            list_max: 600,
            list_rotate: 150,
            meta_fill_lo: 300,
            meta_fill_target: 600,
            merge_fill: 200,
            merge_dirty_blocks: 128,
            merge_window_bytes: 256 << 10,
            data_fill_lo: 1024,
            data_fill_target: 4096,
            data_refill: 256,
            data_cached: 64,
            fallocate_step: 512,
            commit_budget: 150,
            move_budget: 130,
            free_budget: 16,
            free_commit_limit: 100,
            reserve_server: 1200,
            reserve_client: 1400,
            ..Self::default()
        }
    }

    /// Metadata blocks kept back from operations that add items, with `clients`
    /// connected mounts (spec 03 section 17).
    pub fn reserve(&self, clients: u64) -> u64 {
        self.reserve_server + clients.max(1) * self.reserve_client
    }

    /// Whether a metadata tree of `free` blocks is so low that clients get the
    /// LOW flag and their log trees are finalized.
    pub fn meta_is_low(&self, free: u64, clients: u64) -> bool {
        free <= self.reserve(clients)
    }

    /// Checks the relations that the code relies on.
    ///
    /// # Panics
    /// If a value can not work; policies come from code, not from users.
    pub fn assert_sane(&self) {
        assert!(
            self.btree_space >= Self::BTREE_SPACE_MIN,
            "btree_space is too small"
        );
        assert!(
            self.list_max >= Self::LIST_MAX_MIN && self.list_max as usize <= ALLOC_LIST_MAX_BLOCKS,
            "list_max is out of range"
        );
        assert!(
            self.list_rotate >= 2 && self.list_rotate < self.list_max,
            "list_rotate is out of range"
        );
        assert!(
            self.cache_blocks > 0
                && self.write_batch_blocks > 0
                && self.write_depth > 0
                && self.data_cached > 0,
            "a size is zero"
        );
    }

    /// Checks what a server relies on besides: a list that counts as full enough to
    /// need no filling must admit a holder, with its budget and the commit's own. Else
    /// a worn list makes every holder wait for a commit that does not help.
    ///
    /// # Panics
    /// As [`Policy::assert_sane`].
    pub fn assert_serves(&self) {
        assert!(
            self.meta_fill_lo >= 2 * self.commit_budget
                && self.meta_fill_target >= self.meta_fill_lo
                && self.list_max >= self.meta_fill_target,
            "a list that is full enough admits no holder"
        );
        assert!(
            self.commit_budget > self.move_budget && self.commit_budget > self.free_commit_limit,
            "a holder may use more than its budget"
        );
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            cache_blocks: (256 << 20) / LG_BLOCK_SIZE,
            write_batch_blocks: 16,
            write_depth: 32,
            fua_requests: 2,
            flush: true,
            btree_space: crate::format::BTREE_PARENT_SPACE as u16,
            list_max: 8185,
            list_rotate: 8185 / 4,
            meta_fill_lo: 8185 / 2,
            meta_fill_target: 8185,
            merge_fill: 1028,
            merge_dirty_blocks: (64 << 20) / LG_BLOCK_SIZE as u64,
            merge_alloc_low: 10,
            merge_window_bytes: 2 << 20,
            data_fill_lo: 262_144,
            data_fill_target: 1_048_576,
            data_refill: 65_536,
            data_cached: 2048,
            fallocate_step: 32_768,
            commit_budget: 500,
            move_budget: 250,
            free_budget: 62,
            free_commit_limit: 375,
            empty_runs: u32::MAX,
            splice_unit: 64,
            move_margin: 50,
            client_low: 16,
            reserve_server: 2 * 8185,
            reserve_client: 8185 + 8185 + 1028 + 913,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_the_specs() {
        let policy = Policy::default();
        let reserves: Vec<u64> = (0..5).map(|n| policy.reserve(n)).collect();
        assert_eq!(reserves, [34681, 34681, 52992, 71303, 89614]);
        for policy in [policy, Policy::small()] {
            policy.assert_sane();
            policy.assert_serves();
        }
    }
}

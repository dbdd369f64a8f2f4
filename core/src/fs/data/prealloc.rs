//! How many blocks to allocate when a write meets an unmapped block (spec 14
//! section 6). The policy is free, but scripts count extents, so it is followed.

use super::Policy;

/// What the policy looks at.
#[derive(Clone, Copy, Debug)]
pub struct Hole {
    /// First block to be written.
    pub block: u64,
    /// Blocks to be written, all in this hole.
    pub wanted: u64,
    /// Whether the aligned region around `block` has an extent before it; only the
    /// region policy asks.
    pub region_in_use: bool,
    /// Start of the next extent after `block`, if there is one.
    pub next: Option<u64>,
    /// The inode's online block count before.
    pub online: u64,
}

/// First block and number of blocks to ask the allocator for. Always covers
/// `block`; never reaches an extent.
pub fn plan(hole: Hole, policy: &Policy) -> (u64, u64) {
    let Hole {
        block,
        wanted,
        region_in_use,
        next,
        online,
    } = hole;
    let limit = policy.prealloc_blocks;
    if policy.prealloc_contig_only {
        let mut count = 1;
        if block > 1 && block == online {
            count = next
                .map_or(limit, |next| next - block)
                .min(block)
                .min(limit);
        }
        return (block, count.max(wanted));
    }
    // Fill the aligned region around the block, as the file grows.
    let mut first = block - block % limit;
    let mut count = limit;
    if region_in_use {
        count -= block - first;
        first = block;
    }
    if let Some(next) = next
        && next < first + count
    {
        count = next - first;
    }
    count = count.min(online).max(1);
    if first + count < block + wanted {
        // More is written than the region holds: only what is written.
        count = count.max(wanted);
    }
    (first, count)
}

/// Where an allocation of `got` blocks goes that was planned from `first`: it
/// must cover `block`.
pub const fn place(first: u64, got: u64, block: u64) -> u64 {
    if first + got <= block {
        block - got + 1
    } else {
        first
    }
}

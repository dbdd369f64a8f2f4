//! The bloom block of a log tree: which locks it may have items of (spec 04
//! section 4.2). The bloom key is the start of the lock that covers an item.
//!
//! What can go wrong: bits set while the tree has no items, which makes readers
//! of the original fail (18, H3). Bits are set when a commit has put the items
//! in, never before.

use super::LogError;
use crate::block::{BlockError, Cache, Corruption, Tx};
use crate::env::probe;
use crate::format::{
    BLOOM_BITS_START, BLOOM_NRS, BlockRef, BloomBlock, Key, LG_BLOCK_SIZE, Magic, bloom_bits,
};
use crate::locks::Scope;
use zerocopy::FromBytes;

/// Byte of the block and mask of a bit.
fn place(bit: u32) -> (usize, u8) {
    (BLOOM_BITS_START + bit as usize / 8, 1 << (bit % 8))
}

fn is_set(block: &[u8], bit: u32) -> bool {
    let (byte, mask) = place(bit);
    block[byte] & mask != 0
}

/// Whether the tree with this bloom block may have items under a lock with these bits.
///
/// # Errors
/// Read errors; stale roots.
pub(super) async fn may_have(
    cache: &Cache,
    bloom_ref: &BlockRef,
    bits: &[u32; BLOOM_NRS],
) -> Result<bool, BlockError> {
    let block = cache.read_ref(bloom_ref, Magic::Bloom).await?;
    Ok(bits.iter().all(|bit| is_set(block.bytes(), *bit)))
}

/// Sets the bits of these locks, making the block if there is none. Copies it
/// only if a bit is missing.
///
/// # Errors
/// Block errors; nothing is set then.
pub(super) async fn set(
    tx: &Tx,
    bloom_ref: &mut BlockRef,
    scopes: &[Scope],
) -> Result<(), LogError> {
    let bits: Vec<u32> = scopes
        .iter()
        .flat_map(|s| bloom_bits(&s.range().start))
        .collect();
    if !bloom_ref.is_null() {
        let read = tx.cache().read_ref(bloom_ref, Magic::Bloom).await;
        let block = read.map_err(owned)?;
        if bits.iter().all(|bit| is_set(block.bytes(), *bit)) {
            probe("log.bloom_unchanged");
            return Ok(());
        }
    }
    tx.dirty_ref(bloom_ref, Magic::Bloom).await.map_err(owned)?;
    tx.edit(bloom_ref.blkno.get(), |block| {
        assert_eq!(block.len(), LG_BLOCK_SIZE);
        let mut added = 0;
        for bit in bits {
            let (byte, mask) = place(bit);
            added += u64::from(block[byte] & mask == 0);
            block[byte] |= mask;
        }
        let (head, _) = BloomBlock::mut_from_prefix(block).expect("a whole block");
        head.total_set = (head.total_set.get() + added).into();
    });
    Ok(())
}

/// Only we write this block: a stale one is a corrupt one.
fn owned(error: BlockError) -> LogError {
    let error = match error {
        BlockError::Stale { blkno, why } => BlockError::Corrupt(Corruption {
            blkno,
            what: format!("our own bloom block: {why}"),
        }),
        other => other,
    };
    error.into()
}

/// The bits of a lock named by its start key.
pub(super) fn bits_of(lock_start: &Key) -> [u32; BLOOM_NRS] {
    bloom_bits(lock_start)
}

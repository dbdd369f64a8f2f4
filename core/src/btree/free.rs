//! Freeing all blocks of a dead tree, in steps (spec 02 section 17).

use super::layout::{self, NONE};
use super::walk::{check_root, find_child, read_block};
use super::{BtreeError, avl};
use crate::block::{Block, BlockError, Tx};
use crate::env::probe;
use crate::format::{BlockRef, BtreeRoot, Key};
use std::rc::Rc;

/// The way to one level-1 block.
struct Path {
    block_ref: BlockRef,
    block: Rc<Block>,
    /// Parents above that have no child after the ones on this path: they go
    /// when everything below them is gone.
    ended: Vec<u64>,
    /// Where the rest of the tree goes on.
    next: Key,
}

async fn find_path(tx: &Tx, root: &BtreeRoot, key: &Key) -> Result<Path, BtreeError> {
    let (mut ended, mut next) = (Vec::new(), Key::ONES);
    let mut block_ref = root.block_ref;
    let mut level = root.height - 1;
    loop {
        let block = read_block(tx.cache(), &block_ref, level).await?;
        if level == 1 {
            return Ok(Path {
                block_ref,
                block,
                ended,
                next,
            });
        }
        let b = block.bytes();
        let off = find_child(b, &block_ref, key)?;
        if avl::next(b, off) == NONE {
            ended.push(block_ref.blkno.get());
        } else {
            ended.clear();
            next = layout::key(b, off).inc();
        }
        block_ref = layout::child_ref(b, off);
        level -= 1;
    }
}

/// Frees blocks of a dead tree, at most `budget` of them, going on from `key`
/// (at first zeros), which becomes ones when all are freed. The frees and the
/// new `key` must be stored by the same commit. Blocks are only read; the leaves
/// not even that.
///
/// The level-1 blocks are freed like all parents: the original leaks them.
///
/// # Errors
/// Block errors, `FreedFull` if there is no room for any progress; `key` always
/// matches what was freed.
///
/// # Panics
/// If `budget` does not exceed the tree's height by one: no step could be made.
pub async fn free_blocks(
    tx: &Tx,
    root: &BtreeRoot,
    key: &mut Key,
    budget: u32,
) -> Result<(), BtreeError> {
    check_root(root)?;
    assert!(
        budget > u32::from(root.height),
        "a budget of {budget} is too small"
    );
    if root.height < 2 {
        if root.height == 1 && !key.is_ones() {
            tx.free_meta(root.block_ref.blkno.get()).await?;
        }
        *key = Key::ONES;
        return Ok(());
    }
    let mut freed = 0;
    while !key.is_ones() {
        let path = find_path(tx, root, key).await?;
        let parents: Vec<u64> = path
            .ended
            .iter()
            .copied()
            .chain([path.block_ref.blkno.get()])
            .collect();
        for blkno in &parents {
            tx.check_range(*blkno)?;
        }
        let b = path.block.bytes();
        let mut off = find_child(b, &path.block_ref, key)?;
        let mut last = false;
        while !last {
            let need = 1 + parents.len() as u32;
            if freed + need > budget {
                return Ok(());
            }
            if tx.remaining().freed < need {
                probe("free_blocks_out_of_room");
                let none = BtreeError::Block(BlockError::FreedFull);
                return if freed > 0 { Ok(()) } else { Err(none) };
            }
            tx.free_meta(layout::child_ref(b, off).blkno.get()).await?;
            freed += 1;
            let after = avl::next(b, off);
            last = after == NONE;
            if !last {
                *key = layout::key(b, off).inc();
                off = after;
            }
        }
        for blkno in parents {
            tx.free_meta(blkno).await?;
            freed += 1;
        }
        *key = path.next;
    }
    Ok(())
}

//! Level-1 blocks, the unit that log merges are cut by (spec 02 section 15).

use super::BtreeError;
use super::layout;
use super::walk::{check_root, corrupt, find_child, read_block, walk_read};
use crate::block::{Cache, Tx};
use crate::format::{BlockRef, BtreeRoot, Key, KeyRange, Magic};

/// The keys reachable through the level-1 block on the path to `key`
/// (everything if the height is at most 2).
///
/// # Errors
/// As [`super::lookup`].
pub async fn parent_range(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
) -> Result<KeyRange, BtreeError> {
    if root.height <= 2 {
        check_root(root)?;
        return Ok(KeyRange::ALL);
    }
    let walked = walk_read(cache, root, key, 1).await?;
    let (_, _, covered) = walked.expect("a tree of three levels has level-1 blocks");
    Ok(KeyRange::new(covered.start, covered.end))
}

/// A root for the level-1 block on the path to `key` (the whole tree if its
/// height is at most 2).
///
/// # Errors
/// As [`super::lookup`].
pub async fn get_parent(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
) -> Result<BtreeRoot, BtreeError> {
    if root.height <= 2 {
        check_root(root)?;
        return Ok(*root);
    }
    let walked = walk_read(cache, root, key, 1).await?;
    let (block_ref, ..) = walked.expect("a tree of three levels has level-1 blocks");
    Ok(BtreeRoot::new(block_ref, 2))
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
    check_root(parent)?;
    if root.height <= 2 {
        *root = *parent;
        return Ok(());
    }
    if parent.height != 2 {
        return Err(BtreeError::ParentHeight {
            height: parent.height,
        });
    }
    check_root(root)?;
    let mut above: Option<(BlockRef, usize)> = None;
    let mut block_ref = root.block_ref;
    let mut level = root.height - 1;
    while level > 1 {
        let block = read_block(tx.cache(), &block_ref, level).await?;
        tx.dirty_from(&mut block_ref, &block, Magic::Btree).await?;
        set_ref(tx, root, above, &block_ref);
        let (off, child) = tx.view(block_ref.blkno.get(), |b| {
            let off = find_child(b, &block_ref, key)?;
            Ok::<_, BtreeError>((off, layout::child_ref(b, off)))
        })?;
        if child.is_null() {
            return Err(corrupt(&block_ref, format!("its child for {key} is null")));
        }
        above = Some((block_ref, off));
        block_ref = child;
        level -= 1;
    }
    set_ref(tx, root, above, &parent.block_ref);
    Ok(())
}

/// Stores a reference in the parent's item, or in the root.
fn set_ref(tx: &Tx, root: &mut BtreeRoot, above: Option<(BlockRef, usize)>, to: &BlockRef) {
    match above {
        None => root.block_ref = *to,
        Some((above, off)) => tx.edit(above.blkno.get(), |b| layout::set_child_ref(b, off, to)),
    }
}

//! Trees of free extents (spec 03 sections 2 and 3). Each extent is two items: by
//! its last block, to find neighbours, and by its order, to find large ones.
//!
//! What can go wrong: the two items, or `total_len`, telling different things. A
//! change is a few removes and inserts; if one fails those before it are undone,
//! and if that fails too the error says that the tree can not be used any more.

use super::{AllocError, FreeExtent};
use crate::block::{Cache, Tx};
use crate::btree::{self, Item};
use crate::format::{AllocRoot, Key, ZONE_FREE_EXTENT_BLKNO, ZONE_FREE_EXTENT_ORDER};

/// List entries that one change of an extent tree of this height may use.
pub fn ext_mod(height: u8) -> u32 {
    15 * (u32::from(height) + 1)
}

/// The extent that an item of either zone stands for.
fn parse(item: &Item) -> Result<FreeExtent, AllocError> {
    let key = item.key;
    let (last, len) = match key.zone {
        ZONE_FREE_EXTENT_BLKNO => (key.first, key.second),
        _ => (key.second, key.third),
    };
    let fits = len > 0 && last.checked_add(1).is_some_and(|end| end >= len);
    if !fits || !item.value.is_empty() {
        return Err(AllocError::BadItem(key));
    }
    Ok(FreeExtent {
        start: last + 1 - len,
        len,
    })
}

/// The first extent at or after `key` in its zone.
async fn next_in_zone(
    cache: &Cache,
    root: &AllocRoot,
    key: Key,
) -> Result<Option<FreeExtent>, AllocError> {
    match btree::next(cache, &root.root, &key).await? {
        Some(item) if item.key.zone == key.zone => Ok(Some(parse(&item)?)),
        _ => Ok(None),
    }
}

/// The first extent that ends at or after `block`.
pub(super) async fn next_by_block(
    cache: &Cache,
    root: &AllocRoot,
    block: u64,
) -> Result<Option<FreeExtent>, AllocError> {
    next_in_zone(cache, root, Key::free_extent_blkno(block, 1)).await
}

/// The first extent of `order` or less that ends at or after `block`, larger
/// orders first, lower addresses first within one.
pub(super) async fn next_by_order(
    cache: &Cache,
    root: &AllocRoot,
    order: u64,
    block: u64,
) -> Result<Option<FreeExtent>, AllocError> {
    let key = Key::new(ZONE_FREE_EXTENT_ORDER, u64::MAX - order, 0, block, 0, 0);
    next_in_zone(cache, root, key).await
}

/// The extent of the largest order, at the lowest address.
pub(super) async fn largest(
    cache: &Cache,
    root: &AllocRoot,
) -> Result<Option<FreeExtent>, AllocError> {
    next_by_order(cache, root, u64::MAX, 0).await
}

fn keys(extent: FreeExtent) -> [Key; 2] {
    let last = extent.start + (extent.len - 1);
    [
        Key::free_extent_blkno(last, extent.len),
        Key::free_extent_order(last, extent.len),
    ]
}

#[derive(Clone, Copy)]
enum Step {
    Remove(FreeExtent),
    Insert(FreeExtent),
}

impl Step {
    fn undo(self) -> Self {
        match self {
            Self::Remove(extent) => Self::Insert(extent),
            Self::Insert(extent) => Self::Remove(extent),
        }
    }

    /// Changes both items and the total, or neither.
    async fn apply(self, tx: &Tx, root: &mut AllocRoot) -> Result<(), AllocError> {
        let tree = &mut root.root;
        match self {
            Self::Insert(extent) => {
                let [by_block, by_order] = keys(extent);
                btree::insert(tx, tree, &by_block, &[]).await?;
                if let Err(err) = btree::insert(tx, tree, &by_order, &[]).await {
                    btree::delete(tx, tree, &by_block).await?;
                    return Err(err.into());
                }
                root.total_len += extent.len;
            }
            Self::Remove(extent) => {
                let [by_block, by_order] = keys(extent);
                btree::delete(tx, tree, &by_block).await?;
                if let Err(err) = btree::delete(tx, tree, &by_order).await {
                    btree::insert(tx, tree, &by_block, &[]).await?;
                    return Err(err.into());
                }
                root.total_len -= extent.len;
            }
        }
        Ok(())
    }
}

/// Applies all steps, or none.
async fn apply(tx: &Tx, root: &mut AllocRoot, steps: &[Step]) -> Result<(), AllocError> {
    for (at, step) in steps.iter().enumerate() {
        if let Err(err) = step.apply(tx, root).await {
            for done in steps[..at].iter().rev() {
                done.undo().apply(tx, root).await?;
            }
            return Err(err);
        }
    }
    Ok(())
}

/// Adds a free extent, joined with its neighbours (resize, frees).
///
/// # Errors
/// `Overlap`; btree errors.
pub async fn insert_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    start: u64,
    len: u64,
) -> Result<(), AllocError> {
    let end = start.checked_add(len).filter(|end| *end > start);
    let end = end.ok_or(AllocError::NotContained { start, len })?;
    let mut steps = Vec::with_capacity(3);
    let mut joined = FreeExtent { start, len };
    if let Some(right) = next_by_block(tx.cache(), root, start).await? {
        if right.start < end {
            let (found_start, found_len) = (right.start, right.len);
            return Err(AllocError::Overlap {
                start,
                len,
                found_start,
                found_len,
            });
        }
        if right.start == end {
            steps.push(Step::Remove(right));
            joined.len += right.len;
        }
    }
    if start > 0
        && let Some(left) = next_by_block(tx.cache(), root, start - 1).await?
        && left.start + left.len == start
    {
        steps.push(Step::Remove(left));
        joined.start = left.start;
        joined.len += left.len;
    }
    steps.push(Step::Insert(joined));
    apply(tx, root, &steps).await
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
    let found = next_by_block(tx.cache(), root, start).await?;
    let found = found.ok_or(AllocError::NoExtent)?;
    let outside = AllocError::NotContained { start, len };
    let end = start.checked_add(len).filter(|end| *end > start);
    let end = end.ok_or_else(|| outside.clone())?;
    let found_end = found.start + found.len;
    if found.start > start || found_end < end {
        return Err(outside);
    }
    let mut steps = vec![Step::Remove(found)];
    if found.start < start {
        let len = start - found.start;
        steps.push(Step::Insert(FreeExtent {
            start: found.start,
            len,
        }));
    }
    if found_end > end {
        steps.push(Step::Insert(FreeExtent {
            start: end,
            len: found_end - end,
        }));
    }
    apply(tx, root, &steps).await
}

/// Takes up to `count` blocks from the largest order of extents, lowest address first.
///
/// # Errors
/// `NoExtent`; btree errors.
///
/// # Panics
/// If `count` is 0.
pub async fn alloc_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    count: u64,
) -> Result<FreeExtent, AllocError> {
    assert!(count > 0, "allocating nothing");
    let found = largest(tx.cache(), root)
        .await?
        .ok_or(AllocError::NoExtent)?;
    let taken = FreeExtent {
        start: found.start,
        len: found.len.min(count),
    };
    let mut steps = vec![Step::Remove(found)];
    if found.len > taken.len {
        let (start, len) = (found.start + taken.len, found.len - taken.len);
        steps.push(Step::Insert(FreeExtent { start, len }));
    }
    apply(tx, root, &steps).await?;
    Ok(taken)
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
    let mut from = 0;
    while let Some(extent) = next_by_block(cache, root, from).await? {
        f(extent);
        match extent.start.checked_add(extent.len) {
            Some(end) => from = end,
            None => break,
        }
    }
    Ok(())
}

//! Free extent trees (spec 03 sections 2 and 3): each extent is two items with
//! empty values, one by its last block, one by its order.
//!
//! A change is a short list of item pairs to remove and to insert. If one fails
//! those before it are undone in reverse; an undo works on dirty blocks only, so
//! it needs no device.

use super::{AllocError, FreeExtent};
use crate::block::{Cache, Tx};
use crate::btree::{self, BtreeError};
use crate::format::{AllocRoot, Key, KeyRange, ZONE_FREE_EXTENT_BLKNO, ZONE_FREE_EXTENT_ORDER};

/// List entries that one change of an extent tree of this height may use.
pub fn ext_mod(height: u8) -> u32 {
    15 * (u32::from(height) + 1)
}

/// One step of a change.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Insert(FreeExtent),
    Remove(FreeExtent),
}

fn blkno_key(extent: &FreeExtent) -> Key {
    Key::free_extent_blkno(extent.end() - 1, extent.len)
}

fn order_key(extent: &FreeExtent) -> Key {
    Key::free_extent_order(extent.end() - 1, extent.len)
}

/// The extent that an item names.
fn decode(key: Key, value: &[u8]) -> Result<FreeExtent, AllocError> {
    let (last, len) = match key.zone {
        ZONE_FREE_EXTENT_BLKNO => (key.first, key.second),
        _ => (key.second, key.third),
    };
    let start = last.checked_add(1).and_then(|end| end.checked_sub(len));
    match start {
        Some(start) if len > 0 && value.is_empty() => Ok(FreeExtent { start, len }),
        _ => Err(AllocError::BadItem(key)),
    }
}

/// The first extent at or after `key` in its zone.
async fn next_in_zone(
    cache: &Cache,
    root: &AllocRoot,
    key: Key,
) -> Result<Option<FreeExtent>, AllocError> {
    match btree::next(cache, &root.root, &key).await? {
        Some(item) if item.key.zone == key.zone => decode(item.key, &item.value).map(Some),
        _ => Ok(None),
    }
}

/// The first extent that ends at or after `block`.
async fn next_ending(
    tx: &Tx,
    root: &AllocRoot,
    block: u64,
) -> Result<Option<FreeExtent>, AllocError> {
    next_in_zone(tx.cache(), root, Key::free_extent_blkno(block, 1)).await
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

/// An item that should be there is not, or the other way round: the two items
/// of an extent do not agree.
fn twin(err: BtreeError) -> AllocError {
    match err {
        BtreeError::Exists(key) | BtreeError::NotFound(key) => AllocError::BadItem(key),
        err => AllocError::Btree(err),
    }
}

const UNDO: &str = "undoing on dirty blocks within the transaction's budget";

async fn put_pair(tx: &Tx, root: &mut AllocRoot, extent: &FreeExtent) -> Result<(), AllocError> {
    let (first, second) = (blkno_key(extent), order_key(extent));
    btree::insert(tx, &mut root.root, &first, &[])
        .await
        .map_err(twin)?;
    if let Err(err) = btree::insert(tx, &mut root.root, &second, &[]).await {
        crate::env::probe("extent_item_undone");
        btree::undo_insert(tx, &mut root.root, &first)
            .await
            .expect(UNDO);
        return Err(twin(err));
    }
    root.total_len += extent.len;
    Ok(())
}

async fn take_pair(tx: &Tx, root: &mut AllocRoot, extent: &FreeExtent) -> Result<(), AllocError> {
    let (first, second) = (blkno_key(extent), order_key(extent));
    btree::delete(tx, &mut root.root, &first)
        .await
        .map_err(twin)?;
    if let Err(err) = btree::delete(tx, &mut root.root, &second).await {
        crate::env::probe("extent_item_undone");
        btree::insert(tx, &mut root.root, &first, &[])
            .await
            .expect(UNDO);
        return Err(twin(err));
    }
    root.total_len = root
        .total_len
        .get()
        .checked_sub(extent.len)
        .ok_or(AllocError::BadItem(first))?
        .into();
    Ok(())
}

async fn unput_pair(tx: &Tx, root: &mut AllocRoot, extent: &FreeExtent) {
    for key in [blkno_key(extent), order_key(extent)] {
        btree::undo_insert(tx, &mut root.root, &key)
            .await
            .expect(UNDO);
    }
    root.total_len -= extent.len;
}

/// Makes the steps; on an error those made are undone.
pub(super) async fn apply(tx: &Tx, root: &mut AllocRoot, steps: &[Step]) -> Result<(), AllocError> {
    for (done, step) in steps.iter().enumerate() {
        let res = match step {
            Step::Insert(extent) => put_pair(tx, root, extent).await,
            Step::Remove(extent) => take_pair(tx, root, extent).await,
        };
        if let Err(err) = res {
            undo(tx, root, &steps[..done]).await;
            return Err(err);
        }
    }
    Ok(())
}

/// Takes back steps that were made in this transaction.
///
/// # Panics
/// If the transaction's budget does not allow it.
pub(super) async fn undo(tx: &Tx, root: &mut AllocRoot, steps: &[Step]) {
    for step in steps.iter().rev() {
        match step {
            Step::Insert(extent) => unput_pair(tx, root, extent).await,
            Step::Remove(extent) => put_pair(tx, root, extent).await.expect(UNDO),
        }
    }
}

/// The steps that take `start..start+len` out of the extent that contains it.
pub(super) fn cut(found: FreeExtent, start: u64, len: u64) -> Vec<Step> {
    let mut steps = vec![Step::Remove(found)];
    if start > found.start {
        steps.push(Step::Insert(FreeExtent {
            start: found.start,
            len: start - found.start,
        }));
    }
    if start + len < found.end() {
        steps.push(Step::Insert(FreeExtent {
            start: start + len,
            len: found.end() - start - len,
        }));
    }
    steps
}

/// Adds a free extent (resize, frees), joined with its neighbours.
///
/// # Errors
/// `Overlap`, `NotContained` for an empty or wrapping extent; btree errors. Then
/// nothing changed.
pub async fn insert_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    start: u64,
    len: u64,
) -> Result<(), AllocError> {
    let Some(end) = start.checked_add(len).filter(|_| len > 0) else {
        return Err(AllocError::NotContained { start, len });
    };
    let mut joined = FreeExtent { start, len };
    let mut steps = Vec::with_capacity(3);
    if let Some(right) = next_ending(tx, root, start).await? {
        if right.start < end {
            crate::env::probe("free_extent_overlap");
            return Err(AllocError::Overlap {
                start,
                len,
                found_start: right.start,
                found_len: right.len,
            });
        }
        if right.start == end {
            steps.push(Step::Remove(right));
            joined.len += right.len;
        }
    }
    if start > 0
        && let Some(left) = next_ending(tx, root, start - 1).await?
        && left.end() == start
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
/// `NotContained`, `NoExtent`; btree errors. Then nothing changed.
pub async fn remove_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    start: u64,
    len: u64,
) -> Result<(), AllocError> {
    let found = next_ending(tx, root, start).await?;
    let found = found.ok_or(AllocError::NoExtent)?;
    let inside = len > 0
        && found.start <= start
        && start.checked_add(len).is_some_and(|end| end <= found.end());
    if !inside {
        return Err(AllocError::NotContained { start, len });
    }
    apply(tx, root, &cut(found, start, len)).await
}

/// Takes up to `count` blocks from the largest order of extents, lowest address first.
///
/// # Errors
/// `NoExtent`; btree errors. Then nothing changed.
///
/// # Panics
/// If `count` is 0.
pub async fn alloc_extent(
    tx: &Tx,
    root: &mut AllocRoot,
    count: u64,
) -> Result<FreeExtent, AllocError> {
    assert!(count > 0, "allocation of no blocks");
    let found = largest(tx.cache(), root)
        .await?
        .ok_or(AllocError::NoExtent)?;
    let len = found.len.min(count);
    apply(tx, root, &cut(found, found.start, len)).await?;
    Ok(FreeExtent {
        start: found.start,
        len,
    })
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
    let end = Key::new(
        ZONE_FREE_EXTENT_BLKNO,
        u64::MAX,
        u8::MAX,
        u64::MAX,
        u64::MAX,
        u8::MAX,
    );
    let mut at = Key::new(ZONE_FREE_EXTENT_BLKNO, 0, 0, 0, 0, 0);
    loop {
        let mut range = KeyRange::new(at, end);
        let mut bad = Ok(());
        btree::read_items(cache, &root.root, &at, &mut range, &mut |it| match decode(
            it.key, it.value,
        ) {
            Ok(extent) => f(extent),
            Err(err) => bad = Err(err),
        })
        .await?;
        bad?;
        if range.end >= end {
            return Ok(());
        }
        at = range.end.inc();
    }
}

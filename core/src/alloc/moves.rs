//! Moving free extents from one tree to another within a budget (spec 03 sections
//! 8 and 9).
//!
//! What can go wrong: progress that is lost. Both trees change extent by extent, so
//! the caller stores both whatever comes back; and a loop without progress, so a
//! fresh budget always admits one extent.

use super::free::{apply, cut, insert_extent, largest, next_by_order, undo};
use super::{AllocError, Bitmap, FreeExtent, Zones, ext_mod, has_zone, zones_of};
use crate::block::{Cache, Tx};
use crate::btree;
use crate::env::probe;
use crate::format::{AllocRoot, DATA_ALLOC_MAX_ZONES, free_extent_order};

/// Moves `total` blocks from `src` to `dst`. Both roots can have changed even when
/// an error is returned: store both. Success may mean partial progress when the
/// transaction is low: look at the lengths.
///
/// # Errors
/// `InProgress` if `budget` (0: none) is used up, `NoSpace` if not even one
/// extent could be moved, `NoExtent` if `src` has less; btree errors.
pub async fn move_extents(
    tx: &Tx,
    dst: &mut AllocRoot,
    src: &mut AllocRoot,
    total: u64,
    zones: Option<&Zones>,
    budget: u32,
) -> Result<(), AllocError> {
    // What a move needs follows from the heights: with a false one it would wait for ever
    // for a transaction with so much room.
    btree::check_root(&src.root)?;
    btree::check_root(&dst.root)?;
    let mark = tx.mark();
    let mut moved = 0;
    while moved < total {
        let need = ext_mod(src.root.height) + ext_mod(dst.root.height);
        if budget != 0 && moved > 0 && tx.low_since(mark, budget, need) {
            probe("move_extents_in_progress");
            return Err(AllocError::InProgress);
        }
        if !tx.remaining().fits(tx.policy().move_margin + need) {
            probe("move_extents_low");
            return if moved == 0 {
                Err(AllocError::NoSpace)
            } else {
                Ok(())
            };
        }
        let (stored, start) = pick(tx.cache(), src, zones).await?;
        let len = (stored.end() - start).min(total - moved);
        move_one(tx, dst, src, stored, FreeExtent { start, len }).await?;
        moved += len;
    }
    Ok(())
}

/// Moves a part of a stored extent; if it can not be inserted it is put back.
async fn move_one(
    tx: &Tx,
    dst: &mut AllocRoot,
    src: &mut AllocRoot,
    stored: FreeExtent,
    part: FreeExtent,
) -> Result<(), AllocError> {
    let steps = cut(stored, part.start, part.len);
    apply(tx, src, &steps).await?;
    if let Err(err) = insert_extent(tx, dst, part.start, part.len).await {
        probe("move_extents_undone");
        undo(tx, src, &steps).await;
        return Err(err);
    }
    Ok(())
}

/// The stored extent to move from next, and the block to start at.
async fn pick(
    cache: &Cache,
    src: &AllocRoot,
    zones: Option<&Zones>,
) -> Result<(FreeExtent, u64), AllocError> {
    let mut found = None;
    if let Some(zones) = zones {
        for map in [&zones.exclusive, &zones.vacant] {
            if found.is_none() {
                found = find_in_zones(cache, src, map, zones.zone_blocks).await?;
            }
        }
    }
    if found.is_none() {
        found = largest(cache, src)
            .await?
            .map(|extent| (extent, extent.start));
    }
    found.ok_or(AllocError::NoExtent)
}

/// The largest order first, the lowest zone first: the first extent that touches a
/// zone of `map`, and where it starts in the zone.
async fn find_in_zones(
    cache: &Cache,
    src: &AllocRoot,
    map: &Bitmap,
    zone_blocks: u64,
) -> Result<Option<(FreeExtent, u64)>, AllocError> {
    if zones_of(map).next().is_none() {
        return Ok(None);
    }
    let mut order = u64::MAX;
    while let Some(first) = next_by_order(cache, src, order, 0).await? {
        let current = free_extent_order(first.len);
        let found = find_in_order(cache, src, map, zone_blocks, current).await?;
        if found.is_some() || current == 0 {
            return Ok(found);
        }
        order = current - 1;
    }
    Ok(None)
}

async fn find_in_order(
    cache: &Cache,
    src: &AllocRoot,
    map: &Bitmap,
    zone_blocks: u64,
    order: u64,
) -> Result<Option<(FreeExtent, u64)>, AllocError> {
    let mut zone = 0;
    while zone < DATA_ALLOC_MAX_ZONES {
        if !has_zone(map, zone) {
            zone += 1;
            continue;
        }
        let zone_start = zone * zone_blocks;
        let next = next_by_order(cache, src, order, zone_start).await?;
        let Some(extent) = next.filter(|extent| free_extent_order(extent.len) == order) else {
            return Ok(None);
        };
        if extent.start < zone_start.saturating_add(zone_blocks) {
            return Ok(Some((extent, extent.start.max(zone_start))));
        }
        // No extent of this order touches a zone before this extent's.
        zone = extent.start / zone_blocks;
    }
    Ok(None)
}

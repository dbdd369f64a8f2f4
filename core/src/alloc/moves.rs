//! Moving free extents from one tree to another within a budget (spec 03 sections
//! 8 and 9).
//!
//! What can go wrong: progress that is lost. Both trees change extent by extent, so
//! the caller stores both whatever comes back; and a loop without progress, so a
//! fresh budget always admits one extent.

use super::free::{insert_extent, largest, next_by_order, remove_extent};
use super::{AllocError, Bitmap, FreeExtent, Zones, ext_mod, has_zone, zones_of};
use crate::block::{Cache, Tx};
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
        let extent = pick(tx.cache(), src, total - moved, zones).await?;
        move_one(tx, dst, src, extent).await?;
        moved += extent.len;
    }
    Ok(())
}

async fn move_one(
    tx: &Tx,
    dst: &mut AllocRoot,
    src: &mut AllocRoot,
    extent: FreeExtent,
) -> Result<(), AllocError> {
    remove_extent(tx, src, extent.start, extent.len).await?;
    if let Err(err) = insert_extent(tx, dst, extent.start, extent.len).await {
        insert_extent(tx, src, extent.start, extent.len).await?;
        return Err(err);
    }
    Ok(())
}

/// What to move next, at most `most` blocks.
async fn pick(
    cache: &Cache,
    src: &AllocRoot,
    most: u64,
    zones: Option<&Zones>,
) -> Result<FreeExtent, AllocError> {
    let mut found = None;
    if let Some(zones) = zones {
        for map in [&zones.exclusive, &zones.vacant] {
            if found.is_none() {
                found = find_in_zones(cache, src, map, zones.zone_blocks).await?;
            }
        }
    }
    if found.is_none() {
        found = largest(cache, src).await?;
    }
    let found = found.ok_or(AllocError::NoExtent)?;
    Ok(FreeExtent {
        start: found.start,
        len: found.len.min(most),
    })
}

/// The largest order first, the lowest zone first: the first extent that touches a
/// zone of `map`, cut so that it starts in the zone.
async fn find_in_zones(
    cache: &Cache,
    src: &AllocRoot,
    map: &Bitmap,
    zone_blocks: u64,
) -> Result<Option<FreeExtent>, AllocError> {
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
) -> Result<Option<FreeExtent>, AllocError> {
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
        if extent.start < zone_start + zone_blocks {
            let start = extent.start.max(zone_start);
            let len = extent.start + extent.len - start;
            return Ok(Some(FreeExtent { start, len }));
        }
        // No extent of this order touches a zone before this extent's.
        zone = extent.start / zone_blocks;
    }
    Ok(None)
}

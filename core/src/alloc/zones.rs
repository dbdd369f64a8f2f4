//! Zones of the data device: each mount gets data space from zones of its own
//! where possible (spec 03 section 9). The bitmaps are hints; nothing else depends
//! on them.
//!
//! What can go wrong: a zone number above 1023, from a zone size that does not
//! cover the device. It is left out everywhere, and the option counts as unset.

use super::{AllocError, read_extents};
use crate::block::Cache;
use crate::format::{DATA_ALLOC_MAX_ZONES, LogTrees, SuperBlock};

/// A bitmap of 1024 zones: zone n is bit n % 64 of word n / 64.
pub type Bitmap = [u64; 16];

/// Whether a zone is set; false for numbers out of range.
pub fn has_zone(map: &Bitmap, zone: u64) -> bool {
    zone < DATA_ALLOC_MAX_ZONES && map[(zone / 64) as usize] >> (zone % 64) & 1 != 0
}

fn set_zone(map: &mut Bitmap, zone: u64) {
    if zone < DATA_ALLOC_MAX_ZONES {
        map[(zone / 64) as usize] |= 1 << (zone % 64);
    }
}

/// The set zones in ascending order.
pub fn zones_of(map: &Bitmap) -> impl Iterator<Item = u64> + '_ {
    (0..DATA_ALLOC_MAX_ZONES).filter(|zone| has_zone(map, *zone))
}

/// Sets the zones of `zone_blocks` that `len` blocks from `start` touch.
fn set_range(map: &mut Bitmap, zone_blocks: u64, start: u64, len: u64) {
    if len == 0 {
        return;
    }
    let last = start.saturating_add(len - 1) / zone_blocks;
    for zone in start / zone_blocks..=last.min(DATA_ALLOC_MAX_ZONES - 1) {
        set_zone(map, zone);
    }
}

/// Data zones, for the choice of [`super::move_extents`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zones {
    /// Small blocks of a zone.
    pub zone_blocks: u64,
    /// Zones that only the caller's mount uses.
    pub exclusive: Bitmap,
    /// Zones that no mount uses.
    pub vacant: Bitmap,
}

impl Zones {
    /// The zones as mount `rid` may use them, from all log trees items; `None` if
    /// the option is unset or its zones do not cover the device.
    pub fn for_mount(super_block: &SuperBlock, rid: u64, all: &[LogTrees]) -> Option<Self> {
        let zone_blocks = super_block.volopt.data_zone_blocks()?;
        let total = super_block.total_data_blocks.get();
        if zone_blocks == 0 || zone_blocks.checked_mul(DATA_ALLOC_MAX_ZONES)? < total {
            return None;
        }
        let (mut own, mut foreign) = (Bitmap::default(), Bitmap::default());
        for log in all {
            let map = if log.rid.get() == rid {
                &mut own
            } else {
                &mut foreign
            };
            add_claims(map, zone_blocks, log);
        }
        let mut device = Bitmap::default();
        set_range(&mut device, zone_blocks, 0, total);
        let per_word = |f: &dyn Fn(usize) -> u64| std::array::from_fn(f);
        Some(Self {
            zone_blocks,
            exclusive: per_word(&|at| own[at] & !foreign[at]),
            vacant: per_word(&|at| device[at] & !own[at] & !foreign[at]),
        })
    }
}

/// Adds the zones that a log trees item claims, translated from its own zone size.
fn add_claims(map: &mut Bitmap, zone_blocks: u64, log: &LogTrees) {
    let size = log.data_alloc_zone_blocks.get();
    if size == 0 {
        return;
    }
    let claimed: Bitmap = log.data_alloc_zones.map(|word| word.get());
    for zone in zones_of(&claimed) {
        set_range(map, zone_blocks, zone.saturating_mul(size), size);
    }
}

/// Recomputes the zone bitmap of a log trees item from its data_avail (and zeroes
/// it if `zone_blocks` is 0).
///
/// # Errors
/// As [`read_extents`].
pub async fn set_zone_bits(
    cache: &Cache,
    lt: &mut LogTrees,
    zone_blocks: u64,
) -> Result<(), AllocError> {
    let mut map = Bitmap::default();
    if zone_blocks != 0 {
        read_extents(cache, &lt.data_avail, &mut |extent| {
            set_range(&mut map, zone_blocks, extent.start, extent.len);
        })
        .await?;
    }
    lt.data_alloc_zone_blocks = zone_blocks.into();
    lt.data_alloc_zones = map.map(Into::into);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT;

    fn log(rid: u64, zone_blocks: u64, zones: &[u64]) -> LogTrees {
        let mut map = Bitmap::default();
        zones.iter().for_each(|zone| set_zone(&mut map, *zone));
        LogTrees {
            rid: rid.into(),
            data_alloc_zone_blocks: zone_blocks.into(),
            data_alloc_zones: map.map(Into::into),
            ..LogTrees::default()
        }
    }

    fn sup(zone_blocks: u64, total: u64) -> SuperBlock {
        let mut sup = SuperBlock {
            total_data_blocks: total.into(),
            ..SuperBlock::default()
        };
        sup.volopt.set_bits = VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT.into();
        sup.volopt.data_alloc_zone_blocks = zone_blocks.into();
        sup
    }

    #[test]
    fn zones_are_exclusive_vacant_or_somebody_elses() {
        let logs = [log(1, 100, &[0, 1]), log(2, 100, &[1, 2]), log(1, 50, &[6])];
        let zones = Zones::for_mount(&sup(100, 650), 1, &logs).unwrap();
        assert_eq!(zones_of(&zones.exclusive).collect::<Vec<_>>(), [0, 3]);
        assert_eq!(zones_of(&zones.vacant).collect::<Vec<_>>(), [4, 5, 6]);
    }

    #[test]
    fn sizes_that_do_not_cover_the_device_count_as_unset() {
        assert_eq!(Zones::for_mount(&sup(100, 102_401), 1, &[]), None);
        assert!(Zones::for_mount(&sup(100, 102_400), 1, &[]).is_some());
        assert_eq!(Zones::for_mount(&SuperBlock::default(), 1, &[]), None);
        let log = log(2, 1 << 60, &[1023]);
        let zones = Zones::for_mount(&sup(100, 300), 1, &[log]).unwrap();
        assert_eq!(zones_of(&zones.vacant).collect::<Vec<_>>(), [0, 1, 2]);
    }
}

//! Sums over every structure that holds free blocks (spec 03 section 19).
//!
//! What can go wrong: a walk over stale roots that counts a part and starts again.
//! The caller throws away what was reported before an error; [`read_statfs`]
//! returns nothing but whole sums.

use super::{AllocError, Owner, StatfsSums, Total};
use crate::block::Cache;
use crate::btree;
use crate::format::{
    AllocListHead, AllocRoot, BtreeRoot, Key, LogMergeComplete, LogMergeRequest, LogTrees,
    SrchCompact, SuperBlock, TYPE_SRCH_BUSY, TYPE_SRCH_PENDING, ZONE_LOG_MERGE_COMPLETE,
    ZONE_LOG_MERGE_REQUEST, ZONE_LOG_TREES, ZONE_SRCH,
};
use zerocopy::FromBytes;

/// Calls `f` with the value of every item in `first..=last`.
async fn for_values<T: FromBytes>(
    cache: &Cache,
    root: &BtreeRoot,
    first: Key,
    last: Key,
    f: &mut dyn FnMut(T),
) -> Result<(), AllocError> {
    let mut from = first;
    while let Some(item) = btree::next(cache, root, &from).await? {
        if item.key > last {
            break;
        }
        let value = T::read_from_bytes(&item.value).map_err(|_| AllocError::BadItem(item.key))?;
        f(value);
        if item.key == last {
            break;
        }
        from = item.key.inc();
    }
    Ok(())
}

/// First and last key of a zone, or of one type in it.
fn span(zone: u8, kinds: std::ops::RangeInclusive<u8>) -> (Key, Key) {
    let all = u64::MAX;
    let (first, last) = if zone == ZONE_SRCH { (0, 0) } else { (0, all) };
    (
        Key::new(zone, first, *kinds.start(), 0, 0, 0),
        Key::new(zone, last, *kinds.end(), all, all, u8::MAX),
    )
}

/// Reports one owner's structures.
struct Report<'a> {
    owner: Owner,
    id: u64,
    f: &'a mut dyn FnMut(Total),
}

impl Report<'_> {
    fn meta(&mut self, avail: bool, blocks: u64) {
        let (owner, id) = (self.owner, self.id);
        (self.f)(Total {
            owner,
            id,
            meta: true,
            avail,
            blocks,
        });
    }

    fn lists(&mut self, avail: &AllocListHead, freed: &AllocListHead) {
        self.meta(true, avail.total_nr.get());
        self.meta(false, freed.total_nr.get());
    }

    fn data(&mut self, avail: bool, root: &AllocRoot) {
        let (owner, id, blocks) = (self.owner, self.id, root.total_len.get());
        (self.f)(Total {
            owner,
            id,
            meta: false,
            avail,
            blocks,
        });
    }
}

/// Reports every structure of free blocks of one super block, in the order of
/// spec 03 section 19.
///
/// # Errors
/// Stale reads: throw away what was reported and walk a newer super.
pub async fn read_totals(
    cache: &Cache,
    super_block: &SuperBlock,
    f: &mut dyn FnMut(Total),
) -> Result<(), AllocError> {
    let sup = super_block;
    let mut report = Report {
        owner: Owner::Server,
        id: 0,
        f,
    };
    for tree in &sup.meta_alloc {
        report.meta(true, tree.total_len.get());
    }
    report.data(true, &sup.data_alloc);
    report.id = 1;
    for list in &sup.server_meta_avail {
        report.meta(true, list.total_nr.get());
    }
    for list in &sup.server_meta_freed {
        report.meta(false, list.total_nr.get());
    }

    report.owner = Owner::Mount;
    let (first, last) = span(ZONE_LOG_TREES, 0..=u8::MAX);
    for_values(cache, &sup.logs_root, first, last, &mut |log: LogTrees| {
        report.id = log.rid.get();
        report.lists(&log.meta_avail, &log.meta_freed);
        report.data(true, &log.data_avail);
        report.data(false, &log.data_freed);
    })
    .await?;

    report.owner = Owner::Srch;
    let (first, last) = span(ZONE_SRCH, TYPE_SRCH_PENDING..=TYPE_SRCH_BUSY);
    for_values(
        cache,
        &sup.srch_root,
        first,
        last,
        &mut |compact: SrchCompact| {
            report.id = compact.id.get();
            report.lists(&compact.meta_avail, &compact.meta_freed);
        },
    )
    .await?;

    report.owner = Owner::LogMerge;
    let (first, last) = span(ZONE_LOG_MERGE_REQUEST, 0..=u8::MAX);
    for_values(
        cache,
        &sup.log_merge,
        first,
        last,
        &mut |request: LogMergeRequest| {
            report.id = request.rid.get();
            report.lists(&request.meta_avail, &request.meta_freed);
        },
    )
    .await?;
    let (first, last) = span(ZONE_LOG_MERGE_COMPLETE, 0..=u8::MAX);
    for_values(
        cache,
        &sup.log_merge,
        first,
        last,
        &mut |comp: LogMergeComplete| {
            report.id = comp.rid.get();
            report.lists(&comp.meta_avail, &comp.meta_freed);
        },
    )
    .await
}

/// Sums all totals and inode counts (spec 03 section 19).
///
/// # Errors
/// As [`read_totals`].
pub async fn read_statfs(
    cache: &Cache,
    super_block: &SuperBlock,
) -> Result<StatfsSums, AllocError> {
    let mut sums = StatfsSums {
        inode_count: super_block.inode_count.get(),
        ..Default::default()
    };
    read_totals(cache, super_block, &mut |total| {
        let sum = if total.meta {
            &mut sums.free_meta_blocks
        } else {
            &mut sums.free_data_blocks
        };
        *sum = sum.saturating_add(total.blocks);
    })
    .await?;
    let (first, last) = span(ZONE_LOG_TREES, 0..=u8::MAX);
    for_values(
        cache,
        &super_block.logs_root,
        first,
        last,
        &mut |log: LogTrees| {
            sums.inode_count = sums
                .inode_count
                .wrapping_add_signed(log.inode_count_delta.get());
        },
    )
    .await?;
    Ok(sums)
}

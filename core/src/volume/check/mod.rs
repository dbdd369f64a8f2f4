//! Checking a volume: every invariant of the specification that can be seen on
//! its devices, and a census that finds every block exactly once.
//!
//! Nothing is trusted: references are bounded and followed once, blocks are
//! verified, counts are recomputed, so no damage makes it panic or loop. A
//! volume that is mounted, or was when its hosts crashed, is judged by the last
//! stable super block; what running mounts hold is accounted for, not an error.
//!
//! Memory grows with the number of files (about 100 bytes each, for links and
//! indexes) and, by a bit for each block, with fragmented space; items
//! themselves are streamed.

mod block;
mod census;
mod cursor;
mod inode_state;
mod memo;
mod merged;
mod namespace;
mod quorum;
mod report;
mod server_trees;
mod srch;

#[cfg(test)]
mod tests;

pub use block::{ItemAt, Parsed, parse_btree_block};
pub use census::{Census, Claim};
pub use cursor::Progress;
pub use memo::Memo;
pub use report::{Kind, Problem, Report, Severity, State, Stats};
pub use srch::decode_entries;

use super::superblock::{MountSupers, parse_super, read_small};
use super::{VolumeError, check_data_zone_blocks, check_quorum_config};
use crate::env::{BlockDevice, DeviceRole};
use crate::format::*;
use cursor::{Ctx, Cursor, TreeSpec};
use merged::{Merged, Source, View};
use namespace::Namespace;
use server_trees::{ListUse, MergeState};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// How to check.
#[derive(Clone, Default)]
pub struct CheckOptions {
    /// Known leftovers of the original are errors too: for volumes that only
    /// this implementation wrote.
    pub strict: bool,
    /// Findings listed of each kind and severity; 0 means 100. All are counted.
    pub limit: usize,
    /// Told the blocks accounted for so far, and all blocks.
    pub progress: Option<Progress>,
    /// What earlier checks of the same metadata device remember, for who checks it again
    /// and again and sees every write to it. The report is that of a check without.
    pub memo: Option<Rc<Memo>>,
}

/// Ranges of leaked blocks that are listed one by one.
const MAX_LEAK_RANGES: usize = 20;

/// Checks a volume.
pub async fn check(
    meta: Rc<dyn BlockDevice>,
    data: Rc<dyn BlockDevice>,
    options: &CheckOptions,
) -> Report {
    let limit = if options.limit == 0 {
        100
    } else {
        options.limit
    };
    let mut report = Report::new(options.strict, limit);
    let Some(sb) = check_supers(&mut report, &*meta, &*data).await else {
        return report;
    };
    // A super block that counts more blocks than there are was reported; the
    // census goes by what is there.
    let mut bounded = sb;
    let meta_blocks = sb
        .total_meta_blocks
        .get()
        .min(meta.size() >> LG_BLOCK_SHIFT);
    let data_blocks = sb
        .total_data_blocks
        .get()
        .min(data.size() >> SM_BLOCK_SHIFT);
    bounded.total_meta_blocks.set(meta_blocks);
    bounded.total_data_blocks.set(data_blocks);
    if let Some(memo) = &options.memo {
        memo.begin(sb.hdr.fsid.get());
    }
    let ctx = Rc::new(Ctx {
        meta,
        fsid: sb.hdr.fsid.get(),
        sb: bounded,
        report: RefCell::new(report),
        referenced: RefCell::new(Census::new(meta_blocks)),
        free: RefCell::new(Census::new(meta_blocks)),
        pending: RefCell::new(Census::new(meta_blocks)),
        data_mapped: RefCell::new(Census::new(data_blocks)),
        data_free: RefCell::new(Census::new(data_blocks)),
        fs_damaged: Cell::new(false),
        damaged: Cell::new(false),
        progress: options.progress.clone(),
        memo: options.memo.clone(),
        spare: Cell::default(),
    });
    check_trees(&ctx).await;
    let mut report = ctx.report.replace(Report::default());
    finish_census(&ctx, &mut report);
    if let Some(memo) = &options.memo {
        memo.end();
    }
    report
}

/// Reads and compares both super blocks; `None` if there is nothing to go on.
async fn check_supers(
    report: &mut Report,
    meta: &dyn BlockDevice,
    data: &dyn BlockDevice,
) -> Option<SuperBlock> {
    let mut supers = Vec::new();
    for (dev, role) in [(meta, DeviceRole::Meta), (data, DeviceRole::Data)] {
        match read_checked_super(dev, role).await {
            Ok(sb) => supers.push(Some(sb)),
            Err(e) => {
                report.add(Problem::error(Kind::Super, e.to_string()).at(SUPER_BLKNO));
                supers.push(None);
            }
        }
    }
    let data_sb = supers.pop().flatten();
    let meta_sb = supers.pop().flatten()?;
    if let Some(data_sb) = data_sb {
        let both = MountSupers {
            meta: meta_sb,
            data: data_sb,
        };
        if let Err(e) = both.check(meta.size(), data.size()) {
            report.add(Problem::error(Kind::Super, e.to_string()).at(SUPER_BLKNO));
        }
    }
    report.state = State::Unmounted;
    Some(meta_sb)
}

async fn read_checked_super(
    dev: &dyn BlockDevice,
    role: DeviceRole,
) -> Result<SuperBlock, VolumeError> {
    let block = read_small(dev, role, SUPER_BLKNO).await?;
    parse_super(&block, role, None)
}

/// Checks of the super block alone.
fn check_super_fields(ctx: &Ctx) {
    let sb = &ctx.sb;
    let bad = |text: String| ctx.add(Problem::error(Kind::Super, text).at(SUPER_BLKNO));
    if let Err(e) = check_quorum_config(&sb.qconf) {
        bad(e.to_string());
    }
    if sb.qconf.slots.iter().any(|slot| slot.rest != [0; 24]) {
        let text = "unused bytes of quorum slots are not zero";
        ctx.add(Problem::note(Kind::Undefined, text).at(SUPER_BLKNO));
    }
    if sb.flags.get() & !SUPER_FLAG_IS_META_BDEV != 0 {
        bad(format!(
            "unknown flags {:#x} of the super block",
            sb.flags.get()
        ));
    }
    let options = &sb.volopt;
    if options.set_bits.get() & !VOLOPT_KNOWN_BITS != 0 {
        bad(format!(
            "unknown volume options {:#x}",
            options.set_bits.get()
        ));
    }
    match options.data_zone_blocks() {
        Some(zone) if check_data_zone_blocks(zone, sb.total_data_blocks.get()).is_err() => {
            let text = "the data zone size does not fit the data device; zones are ignored";
            ctx.add(Problem::note(Kind::Suspicious, text).at(SUPER_BLKNO));
        }
        None if options.data_alloc_zone_blocks.get() != 0 => {
            bad("an unset volume option has a value".into());
        }
        _ => {}
    }
    let next = sb.next_ino.get();
    if next < FIRST_INO {
        bad(format!("next_ino is {next}, below 1024"));
    }
}

/// Everything that is reached from the super block.
async fn check_trees(ctx: &Rc<Ctx>) {
    check_super_fields(ctx);
    let clients = server_trees::read_mounted_clients(ctx).await;
    let unmounted = ctx.sb.mounted_clients.is_empty() && clients.is_empty();
    if !unmounted {
        ctx.report.borrow_mut().state = State::InUse;
    }
    quorum::check_quorum(ctx, unmounted).await;
    let logs = server_trees::read_log_trees(ctx).await;
    ctx.report.borrow_mut().stats.log_trees = logs.len() as u64;
    let merge = server_trees::read_merge(ctx).await;
    server_trees::check_workers(ctx, &merge, &clients);
    let namespace = read_namespace(ctx, &logs, &merge).await;
    server_trees::check_merge_blocks(ctx, &merge).await;
    let (srch_entries, srch_freed) = srch::check_srch(ctx, &logs).await;
    server_trees::check_allocators(ctx, &logs).await;
    let completes = merge
        .completes
        .iter()
        .filter(|c| !server_trees::is_spliced(c));
    for comp in completes {
        let what = "a merge completion's meta_freed";
        server_trees::walk_list(ctx, &comp.meta_freed, what, ListUse::Pending).await;
    }
    for freed in &srch_freed {
        let what = "a srch compaction's meta_freed";
        server_trees::walk_list(ctx, freed, what, ListUse::Pending).await;
    }
    namespace.finish(&logs, &srch_entries);
}

/// Walks fs_root and all log trees side by side.
async fn read_namespace(ctx: &Rc<Ctx>, logs: &[LogTrees], merge: &MergeState) -> Namespace {
    let spec = |name: String| TreeSpec {
        name,
        fs: true,
        ..TreeSpec::default()
    };
    let fs_root = Cursor::new(ctx, &ctx.sb.fs_root, spec("fs_root".into()));
    let mut sources = vec![Source::new(fs_root, None, None, false)];
    for lt in logs {
        let bloom = server_trees::read_bloom(ctx, lt).await;
        let name = format!("log tree {:016x} nr {}", lt.rid.get(), lt.nr.get());
        let cursor = Cursor::new(ctx, &lt.item_root, spec(name));
        sources.push(Source::new(cursor, Some(*lt), bloom, merge.is_input(lt)));
    }
    let mut merged = Merged::new(ctx, merge.clone(), sources).await;
    let mut namespace = Namespace::new(ctx);
    while let Some(view) = merged.next().await {
        match view {
            View::Item(item) => namespace.item(&item),
            View::Totl(key, total, count) => namespace.totl(key, total, count),
        }
    }
    namespace
}

/// What nothing owns, and what two things own.
fn finish_census(ctx: &Ctx, report: &mut Report) {
    let (referenced, free) = (ctx.referenced.borrow(), ctx.free.borrow());
    let (mapped, data_free) = (ctx.data_mapped.borrow(), ctx.data_free.borrow());
    for block in Census::common(&referenced, &free, MAX_LEAK_RANGES) {
        let text = "a metadata block is both in use and free";
        report.add(Problem::error(Kind::Census, text).at(block));
    }
    for block in Census::common(&mapped, &data_free, MAX_LEAK_RANGES) {
        let text = "a data block is both mapped by a file and free";
        report.add(Problem::error(Kind::Census, text).at(block));
    }
    let meta_leaks = Census::missing(&[&referenced, &free], META_DEV_START_BLKNO);
    let data_leaks = Census::missing(&[&mapped, &data_free], DATA_DEV_START_BLKNO);
    let sum = |ranges: &[(u64, u64)]| ranges.iter().map(|r| r.1).sum::<u64>();
    report.stats.meta_referenced = referenced.count();
    report.stats.meta_free = free.count();
    report.stats.meta_leaked = sum(&meta_leaks);
    report.stats.data_mapped = mapped.count();
    report.stats.data_free = data_free.count();
    report.stats.data_leaked = sum(&data_leaks);
    let why = if ctx.damaged.get() {
        " (or by something that could not be read)"
    } else {
        ""
    };
    for (dev, leaks) in [("metadata", &meta_leaks), ("data", &data_leaks)] {
        for (start, len) in leaks.iter().take(MAX_LEAK_RANGES) {
            let text = format!("{len} {dev} blocks from {start} are owned by nothing{why}");
            report.add(Problem::note(Kind::Leak, text).at(*start));
        }
        if let Some(rest) = leaks.get(MAX_LEAK_RANGES..).filter(|rest| !rest.is_empty()) {
            let text = format!(
                "{} more {dev} blocks in {} ranges are owned by nothing{why}",
                sum(rest),
                rest.len()
            );
            report.add(Problem::note(Kind::Leak, text));
        }
    }
}

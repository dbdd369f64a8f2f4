//! The server's trees and what hangs on them: log trees, log merge, mounted
//! clients, allocators (spec 03 section 20, 04 section 17, 05 section 13).

use super::cursor::{Ctx, Cursor, Item, Parse, TreeSpec};
use super::report::{Kind, Problem};
use crate::format::*;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use zerocopy::{FromBytes, IntoBytes};

/// The state of a log merge.
#[derive(Clone, Debug, Default)]
pub(super) struct MergeState {
    pub status: Option<LogMergeStatus>,
    pub ranges: Vec<LogMergeRange>,
    pub requests: Vec<LogMergeRequest>,
    pub completes: Vec<LogMergeComplete>,
    pub freeing: Vec<LogMergeFreeing>,
}

/// Whether a completion's subtree is part of fs_root already.
pub(super) fn is_spliced(comp: &LogMergeComplete) -> bool {
    comp.meta_avail.block_ref.is_null() && comp.meta_freed.block_ref.is_null()
}

impl MergeState {
    /// Key ranges that are not merged yet, with a name for findings.
    fn unmerged(&self) -> Vec<(KeyRange, &'static str)> {
        let range = |start: &DiskKey, end: &DiskKey| KeyRange::new(start.key(), end.key());
        let ranges = self
            .ranges
            .iter()
            .map(|r| (range(&r.start, &r.end), "range"));
        let requests = self
            .requests
            .iter()
            .map(|r| (range(&r.start, &r.end), "request"));
        let completes = self.completes.iter().filter_map(|c| {
            if !is_spliced(c) {
                Some((range(&c.start, &c.end), "completion"))
            } else if c.flags.get() & LOG_MERGE_COMPLETE_FLAG_REMAIN != 0 {
                Some((range(&c.remain, &c.end), "remainder of a completion"))
            } else {
                None
            }
        });
        ranges.chain(requests).chain(completes).collect()
    }

    /// Whether the inputs' items of a key are part of fs_root.
    pub fn is_merged(&self, key: &Key) -> bool {
        self.status.is_some() && !self.unmerged().iter().any(|(range, _)| range.contains(key))
    }

    /// Whether a log tree is an input of the running merge.
    pub fn is_input(&self, lt: &LogTrees) -> bool {
        lt.is_finalized()
            && self
                .status
                .as_ref()
                .is_some_and(|s| lt.finalize_seq.get() < s.seq.get())
    }
}

/// Reads an item's value or reports it.
pub(super) fn value<T: FromBytes>(ctx: &Ctx, what: &'static str, item: &Item) -> Option<T> {
    match value_exact(what, item.value()) {
        Ok(value) => Some(value),
        Err(e) => {
            let problem = Problem::error(Kind::Item, e.to_string());
            ctx.add(problem.at(item.blkno).key(item.key));
            None
        }
    }
}

/// Reports an item whose key is not what its value says.
pub(super) fn check_key(ctx: &Ctx, what: &str, item: &Item, expected: Key) {
    if item.key != expected {
        let text = format!("the key of a {what} item does not fit its value");
        let problem = Problem::error(Kind::Item, text).at(item.blkno);
        ctx.add(problem.key(item.key).want(expected, item.key));
    }
}

pub(super) fn tree(ctx: &Rc<Ctx>, name: &str, root: &BtreeRoot) -> Cursor {
    let spec = TreeSpec {
        name: name.into(),
        ..TreeSpec::default()
    };
    Cursor::new(ctx, root, spec)
}

fn foreign(ctx: &Ctx, tree: &str, item: &Item) {
    let text = format!("{tree} holds an item that does not belong there");
    let problem = Problem::error(Kind::Item, text);
    ctx.add(problem.at(item.blkno).key(item.key));
}

/// Reads the log trees items and checks I1 to I4.
pub(super) async fn read_log_trees(ctx: &Rc<Ctx>) -> Vec<LogTrees> {
    let mut found = Vec::new();
    let mut cursor = tree(ctx, "logs_root", &ctx.sb.logs_root);
    while let Some(item) = cursor.next().await {
        if item.key.zone != ZONE_LOG_TREES {
            foreign(ctx, "logs_root", &item);
            continue;
        }
        let Some(lt) = value::<LogTrees>(ctx, "log trees", &item) else {
            // Without it everything the log tree owns is unknown.
            ctx.damaged.set(true);
            ctx.fs_damaged.set(true);
            continue;
        };
        check_key(
            ctx,
            "log trees",
            &item,
            Key::log_trees(lt.rid.get(), lt.nr.get()),
        );
        check_log_trees(ctx, item.key, &lt);
        found.push(lt);
    }
    check_log_trees_together(ctx, &found);
    found
}

fn check_log_trees(ctx: &Ctx, key: Key, lt: &LogTrees) {
    let bad = |text: &str| ctx.add(Problem::error(Kind::LogTrees, text).key(key));
    let [get, commit] = [lt.get_trans_seq.get(), lt.commit_trans_seq.get()];
    if commit > get {
        bad("a log tree committed a transaction it never opened");
    }
    ctx.check_seq("a log tree's transaction", key, get);
    if lt.nr.get() == 0 {
        bad("log trees are numbered from 1");
    }
    if lt.flags.get() & !LOG_TREES_FLAG_FINALIZED != 0 {
        bad("a log tree has unknown flags");
    }
    if lt.bloom_ref.is_null() && !lt.item_root.is_empty() {
        bad("a log tree has items but no bloom block");
    }
    if !lt.is_finalized() {
        if lt.finalize_seq.get() != 0 {
            bad("a log tree has a finalize_seq but is not finalized");
        }
        return;
    }
    if get != commit {
        bad("a finalized log tree has an open transaction");
    }
    if lt.finalize_seq.get() == 0 {
        bad("a finalized log tree has no finalize_seq");
    }
    ctx.check_seq("a log tree's finalization", key, lt.finalize_seq.get());
    let lists = [&lt.meta_avail, &lt.meta_freed];
    let roots = [&lt.data_avail, &lt.data_freed];
    if lists
        .iter()
        .any(|l| !l.block_ref.is_null() || l.total_nr.get() != 0)
        || roots
            .iter()
            .any(|r| !r.root.is_empty() || r.total_len.get() != 0)
    {
        bad("a finalized log tree still owns allocators");
    }
    if lt.srch_file != SrchFile::default() {
        bad("a finalized log tree still owns a srch file");
    }
}

/// One open log tree for each mount, the last; finalize seqs are unique.
fn check_log_trees_together(ctx: &Ctx, found: &[LogTrees]) {
    let mut seqs = BTreeSet::new();
    let mut last: BTreeMap<u64, u64> = BTreeMap::new();
    for lt in found {
        let greatest = last.entry(lt.rid.get()).or_default();
        *greatest = (*greatest).max(lt.nr.get());
    }
    for lt in found {
        let key = Key::log_trees(lt.rid.get(), lt.nr.get());
        let bad = |text: &str| ctx.add(Problem::error(Kind::LogTrees, text).key(key));
        if lt.is_finalized() {
            if !seqs.insert(lt.finalize_seq.get()) {
                bad("two log trees have the same finalize_seq");
            }
        } else if last[&lt.rid.get()] != lt.nr.get() {
            bad("a log tree that is not the mount's last is not finalized");
        }
    }
}

/// Reads the log merge items and checks M1 to M3.
pub(super) async fn read_merge(ctx: &Rc<Ctx>) -> MergeState {
    let mut merge = MergeState::default();
    let mut cursor = tree(ctx, "log_merge", &ctx.sb.log_merge);
    while let Some(item) = cursor.next().await {
        let key = |expected| check_key(ctx, "log merge", &item, expected);
        match item.key.zone {
            ZONE_LOG_MERGE_STATUS => {
                key(Key::log_merge_status());
                merge.status = value(ctx, "log merge status", &item);
            }
            ZONE_LOG_MERGE_RANGE => {
                if let Some(range) = value::<LogMergeRange>(ctx, "log merge range", &item) {
                    key(Key::log_merge_range(range.start.key()));
                    merge.ranges.push(range);
                }
            }
            ZONE_LOG_MERGE_REQUEST => {
                if let Some(req) = value::<LogMergeRequest>(ctx, "log merge request", &item) {
                    key(Key::log_merge_request(req.rid.get(), req.seq.get()));
                    merge.requests.push(req);
                }
            }
            ZONE_LOG_MERGE_COMPLETE => {
                if let Some(comp) = value::<LogMergeComplete>(ctx, "log merge completion", &item) {
                    key(Key::log_merge_complete(comp.seq.get()));
                    merge.completes.push(comp);
                }
            }
            ZONE_LOG_MERGE_FREEING => {
                if let Some(fr) = value::<LogMergeFreeing>(ctx, "log merge freeing", &item) {
                    key(Key::log_merge_freeing(fr.seq.get()));
                    merge.freeing.push(fr);
                }
            }
            _ => foreign(ctx, "log_merge", &item),
        }
    }
    check_merge(ctx, &merge);
    merge
}

fn check_merge(ctx: &Ctx, merge: &MergeState) {
    let bad = |text: String| ctx.add(Problem::error(Kind::LogMerge, text));
    let open = merge.ranges.len() + merge.requests.len() + merge.completes.len();
    let Some(status) = &merge.status else {
        if open > 0 {
            bad(format!(
                "{open} log merge items exist without a status item"
            ));
        }
        return;
    };
    ctx.check_seq("the log merge", Key::log_merge_status(), status.seq.get());
    let want = merge.requests.len() as u64;
    if status.nr_requests.get() != want {
        bad(format!(
            "the log merge counts {} requests of {want}",
            status.nr_requests.get()
        ));
    }
    let (have, want) = (status.nr_complete.get(), merge.completes.len() as u64);
    // A splice between commits holds the counter at 8 or more.
    if have != want && have < 8 {
        bad(format!("the log merge counts {have} completions of {want}"));
    }
    let mut ranges = merge.unmerged();
    ranges.sort_by_key(|(range, _)| (range.start, range.end));
    for (range, what) in &ranges {
        if range.start > range.end {
            bad(format!("a log merge {what} ends before it starts: {range}"));
        }
    }
    for pair in ranges.windows(2) {
        if pair[0].0.end >= pair[1].0.start {
            bad(format!(
                "a log merge {} and {} overlap at {}",
                pair[0].1, pair[1].1, pair[1].0.start
            ));
        }
    }
}

/// Blocks of merges: new subtrees, trees being freed, and lists.
pub(super) async fn check_merge_blocks(ctx: &Rc<Ctx>, merge: &MergeState) {
    for req in &merge.requests {
        walk_list(
            ctx,
            &req.meta_avail,
            "a merge request's meta_avail",
            ListUse::Free,
        )
        .await;
        walk_list(
            ctx,
            &req.meta_freed,
            "a merge request's meta_freed",
            ListUse::Free,
        )
        .await;
    }
    for comp in merge.completes.iter().filter(|comp| !is_spliced(comp)) {
        let spec = TreeSpec {
            name: "a merge completion's tree".into(),
            shared: true,
            subtree: true,
            ..TreeSpec::default()
        };
        Cursor::new(ctx, &comp.root, spec).drain().await;
        walk_list(
            ctx,
            &comp.meta_avail,
            "a merge completion's meta_avail",
            ListUse::Free,
        )
        .await;
    }
    for freeing in &merge.freeing {
        let spec = TreeSpec {
            name: "a merged log tree being freed".into(),
            from: Some(freeing.key.key()),
            ..TreeSpec::default()
        };
        Cursor::new(ctx, &freeing.root, spec).drain().await;
    }
}

/// Requests are out only at mounts that are there: who takes a mount back takes its
/// requests back first.
pub(super) fn check_workers(ctx: &Ctx, merge: &MergeState, clients: &BTreeSet<u64>) {
    for req in &merge.requests {
        if !clients.contains(&req.rid.get()) {
            let text = "a log merge request is out at a mount that is gone";
            let key = Key::log_merge_request(req.rid.get(), req.seq.get());
            ctx.add(Problem::error(Kind::LogMerge, text).key(key));
        }
    }
}

/// Reads the mounted clients; their rids.
pub(super) async fn read_mounted_clients(ctx: &Rc<Ctx>) -> BTreeSet<u64> {
    let mut cursor = tree(ctx, "mounted_clients", &ctx.sb.mounted_clients);
    let mut rids = BTreeSet::new();
    while let Some(item) = cursor.next().await {
        if item.key.zone != ZONE_MOUNTED_CLIENT {
            foreign(ctx, "mounted_clients", &item);
            continue;
        }
        check_key(
            ctx,
            "mounted client",
            &item,
            Key::mounted_client(item.key.first),
        );
        rids.insert(item.key.first);
        let Some(mc) = value::<MountedClient>(ctx, "mounted client", &item) else {
            continue;
        };
        let problem = |p: Problem| ctx.add(p.at(item.blkno).key(item.key));
        if mc.addr.v4().is_none() {
            problem(Problem::error(
                Kind::MountedClient,
                "a mounted client has no IPv4 address",
            ));
        }
        if mc.flags & !MOUNTED_CLIENT_FLAG_QUORUM != 0 {
            problem(Problem::error(
                Kind::MountedClient,
                "a mounted client has unknown flags",
            ));
        }
        if mc.addr.rest != [0; 24] || mc.pad != [0; 7] {
            let text = "a mounted client's unused bytes are not zero";
            problem(Problem::note(Kind::Undefined, text));
        }
    }
    rids
}

/// What the entries of a list are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ListUse {
    /// Free blocks.
    Free,
    /// Freed by unfinished work: stable structures may still refer to them.
    Pending,
}

/// A block of an allocator list.
struct ListPart {
    next: BlockRef,
    start: usize,
    nr: usize,
    /// `None` if they do not fit in the block.
    entries: Option<Entries>,
}

struct Entries {
    all: Vec<u64>,
    /// The same in ascending order, as starts and lengths: one of its own for each time
    /// that a block is there.
    runs: Vec<(u64, u64)>,
}

impl Entries {
    fn new(all: Vec<u64>) -> Self {
        let mut sorted = all.clone();
        sorted.sort_unstable();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for blkno in sorted {
            match runs.last_mut() {
                Some((start, len)) if start.checked_add(*len) == Some(blkno) => *len += 1,
                _ => runs.push((blkno, 1)),
            }
        }
        Self { all, runs }
    }
}

impl Parse for ListPart {
    const MAGIC: Magic = Magic::AllocList;

    fn parse(block: &[u8]) -> Self {
        let (lb, all) = AllocListBlock::read_from_prefix(block).expect("a whole block");
        let (start, nr) = (lb.start.get() as usize, lb.nr.get() as usize);
        let end = start.checked_add(nr);
        let entries = end.filter(|end| *end <= ALLOC_LIST_MAX_BLOCKS).map(|end| {
            let entries = all[start * 8..end * 8].chunks_exact(8);
            let number = |entry: &[u8]| u64::from_le_bytes(entry.try_into().expect("8 bytes"));
            Entries::new(entries.map(number).collect())
        });
        Self {
            next: lb.next,
            start,
            nr,
            entries,
        }
    }
}

/// Walks an allocator list, claims its blocks and entries, checks its counts.
pub(super) async fn walk_list(ctx: &Rc<Ctx>, head: &AllocListHead, what: &str, list: ListUse) {
    if head.flags.get() & !ALLOC_FLAG_LOW != 0 {
        let text = format!("{what}: unknown flags {:#x}", head.flags.get());
        ctx.add(Problem::error(Kind::Alloc, text));
    }
    let mut next = head.block_ref;
    let mut total = 0;
    let mut first = None;
    while !next.is_null() {
        let blkno = next.blkno.get();
        if !ctx.claim(blkno, what) {
            ctx.damaged.set(true);
            return;
        }
        let Some(part) = ctx.read::<ListPart>(&next, what).await else {
            return;
        };
        let Some(entries) = &part.entries else {
            let (start, nr) = (part.start, part.nr);
            let text = format!("{what}: entries {start}+{nr} do not fit in a list block");
            ctx.add(Problem::error(Kind::Alloc, text).at(blkno));
            ctx.damaged.set(true);
            return;
        };
        match list {
            ListUse::Free => {
                for (start, len) in &entries.runs {
                    ctx.claim_free(*start, *len, what);
                }
            }
            ListUse::Pending => {
                for blkno in &entries.all {
                    claim_pending(ctx, *blkno, what);
                }
            }
        }
        first = first.or(Some(part.nr as u64));
        total += part.nr as u64;
        next = part.next;
    }
    let want = |text: &str, expected: u64, found: u64| {
        if expected != found {
            let text = format!("{what}: {text}");
            ctx.add(Problem::error(Kind::Alloc, text).want(expected, found));
        }
    };
    want("total_nr is wrong", total, head.total_nr.get());
    want(
        "first_nr is wrong",
        first.unwrap_or(0),
        u64::from(head.first_nr.get()),
    );
}

fn claim_pending(ctx: &Ctx, blkno: u64, what: &str) {
    if ctx.referenced.borrow().contains(blkno) {
        if !ctx.pending.borrow_mut().insert(blkno) {
            let text = format!("{what} holds a block that other unfinished work freed too");
            ctx.add(Problem::error(Kind::Census, text).at(blkno));
        }
        return;
    }
    ctx.claim_free(blkno, 1, what);
}

/// Which device an extent tree is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    /// Large blocks of the metadata device.
    Meta,
    /// Small blocks of the data device.
    Data,
}

/// Walks a tree of free extents, claims its blocks and extents, checks that each
/// extent has its two items and that the sum is right.
pub(super) async fn walk_alloc_root(ctx: &Rc<Ctx>, root: &AllocRoot, what: &str, space: Space) {
    let mut by_blkno: Vec<(u64, u64)> = Vec::new();
    let mut by_order: Vec<(u64, u64)> = Vec::new();
    let damaged = ctx.damaged.replace(false);
    let mut cursor = tree(ctx, what, &root.root);
    while let Some(item) = cursor.next().await {
        let key = item.key;
        let ((last, len), expected) = match key.zone {
            ZONE_FREE_EXTENT_BLKNO => {
                let extent = (key.first, key.second);
                (extent, Key::free_extent_blkno(extent.0, extent.1))
            }
            ZONE_FREE_EXTENT_ORDER => {
                let extent = (key.second, key.third);
                (extent, Key::free_extent_order(extent.0, extent.1))
            }
            _ => {
                foreign(ctx, what, &item);
                continue;
            }
        };
        check_key(ctx, "free extent", &item, expected);
        let start = last.checked_add(1).and_then(|end| end.checked_sub(len));
        if !item.value().is_empty() || len == 0 || start.is_none() {
            let text = format!("{what}: a free extent item makes no sense");
            ctx.add(Problem::error(Kind::Alloc, text).at(item.blkno).key(key));
            continue;
        }
        if key.zone == ZONE_FREE_EXTENT_ORDER {
            by_order.push((last, len));
            continue;
        }
        by_blkno.push((last, len));
        match space {
            Space::Meta => ctx.claim_free(last + 1 - len, len, what),
            Space::Data => ctx.claim_data_free(last + 1 - len, len, what),
        }
    }
    let whole = !ctx.damaged.get();
    ctx.damaged.set(damaged || !whole);
    if whole {
        by_order.sort_unstable();
        compare_twins(ctx, what, &by_blkno, &by_order);
        let sum = by_blkno.iter().fold(0u64, |sum, e| sum.wrapping_add(e.1));
        if sum != root.total_len.get() {
            let text = format!("{what}: total_len is wrong");
            ctx.add(Problem::error(Kind::Alloc, text).want(sum, root.total_len.get()));
        }
    }
    if root.flags.get() & !ALLOC_FLAG_LOW != 0 || root.pad != [0; 4] {
        let text = format!(
            "{what}: unknown flags or padding {:?}",
            &root.as_bytes()[8..16]
        );
        ctx.add(Problem::error(Kind::Alloc, text));
    }
}

/// Both sorted lists must be equal.
fn compare_twins(ctx: &Ctx, what: &str, by_blkno: &[(u64, u64)], by_order: &[(u64, u64)]) {
    let (mut a, mut b) = (by_blkno.iter().peekable(), by_order.iter().peekable());
    loop {
        let order = match (a.peek(), b.peek()) {
            (None, None) => return,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(x), Some(y)) => x.cmp(y),
        };
        let (extent, missing) = match order {
            std::cmp::Ordering::Equal => {
                a.next();
                b.next();
                continue;
            }
            std::cmp::Ordering::Less => (a.next(), "order"),
            std::cmp::Ordering::Greater => (b.next(), "block number"),
        };
        if let Some((last, len)) = extent {
            let text = format!("{what}: the free extent of {len} blocks has no item by {missing}");
            ctx.add(Problem::error(Kind::Alloc, text).at(last + 1 - len));
        }
    }
}

/// A bloom block.
struct Bloom {
    bits: Rc<[u8]>,
    /// Bits that are set, and as the block counts them.
    set: u64,
    counted: u64,
}

impl Parse for Bloom {
    const MAGIC: Magic = Magic::Bloom;

    fn parse(block: &[u8]) -> Self {
        let (head, _) = BloomBlock::read_from_prefix(block).expect("a whole block");
        let bits = &block[BLOOM_BITS_START..];
        // Nearly all of them are zero.
        let words = bits.chunks(8).filter(|word| *word != [0; 8]);
        let ones = |word: &[u8]| word.iter().map(|b| u64::from(b.count_ones())).sum::<u64>();
        Self {
            bits: bits.into(),
            set: words.map(ones).sum(),
            counted: head.total_set.get(),
        }
    }
}

/// Reads a bloom block: its bits, if it is good.
pub(super) async fn read_bloom(ctx: &Rc<Ctx>, lt: &LogTrees) -> Option<Rc<[u8]>> {
    let r = &lt.bloom_ref;
    if r.is_null() || !ctx.claim(r.blkno.get(), "a log tree's bloom block") {
        return None;
    }
    let bloom = ctx.read::<Bloom>(r, "a log tree's bloom block").await?;
    if bloom.set != bloom.counted {
        let problem = Problem::error(Kind::Bloom, "a bloom block miscounts its bits");
        ctx.add(problem.at(r.blkno.get()).want(bloom.set, bloom.counted));
    }
    Some(Rc::clone(&bloom.bits))
}

/// The allocators of the super block and of all log trees.
pub(super) async fn check_allocators(ctx: &Rc<Ctx>, logs: &[LogTrees]) {
    let sb = ctx.sb;
    for (i, root) in sb.meta_alloc.iter().enumerate() {
        walk_alloc_root(ctx, root, &format!("meta_alloc[{i}]"), Space::Meta).await;
    }
    walk_alloc_root(ctx, &sb.data_alloc, "data_alloc", Space::Data).await;
    for (i, head) in sb.server_meta_avail.iter().enumerate() {
        walk_list(ctx, head, &format!("server_meta_avail[{i}]"), ListUse::Free).await;
    }
    for (i, head) in sb.server_meta_freed.iter().enumerate() {
        walk_list(ctx, head, &format!("server_meta_freed[{i}]"), ListUse::Free).await;
    }
    for lt in logs {
        let name = |what: &str| {
            format!(
                "{what} of log tree {:016x} nr {}",
                lt.rid.get(),
                lt.nr.get()
            )
        };
        walk_list(ctx, &lt.meta_avail, &name("meta_avail"), ListUse::Free).await;
        walk_list(ctx, &lt.meta_freed, &name("meta_freed"), ListUse::Free).await;
        walk_alloc_root(ctx, &lt.data_avail, &name("data_avail"), Space::Data).await;
        walk_alloc_root(ctx, &lt.data_freed, &name("data_freed"), Space::Data).await;
    }
}

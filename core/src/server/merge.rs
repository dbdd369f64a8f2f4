//! Log merging, the server's side: start a merge, hand out its work, splice what
//! comes back into the fs root, end it (spec 05).
//!
//! ```text
//! STATUS + one RANGE of everything
//!   RANGE --GET_LOG_MERGE--> REQUEST --COMMIT_LOG_MERGE--> COMPLETE --splice--> (RANGE)
//! no RANGE left: inputs become FREEING items, STATUS goes
//! ```
//!
//! What can go wrong:
//! * Two requests below one parent block of the fs root: its blocks are freed
//!   twice. `next_range_key` only moves upwards past whole parents, and starts
//!   over only after a splice.
//! * The fs root changing under a request. Only splicing changes it, and only
//!   while no request is out.
//! * Inputs that vanish one after the other: a deleted item shows again while the
//!   tree with its deletion is gone and one with an older value is not. All go in
//!   one commit, which nobody else shares.

use super::error::{OrFatal, Result, ServerError};
use super::items;
use super::log_trees::Progress;
use super::store::{Dirty, Store};
use crate::alloc::{self, AllocError, Mark};
use crate::btree;
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::{
    AllocListHead, BtreeRoot, Key, LOG_MERGE_COMPLETE_FLAG_ERROR, LOG_MERGE_COMPLETE_FLAG_REMAIN,
    LOG_MERGE_REQUEST_FLAG_SUBTREE, LogMergeComplete, LogMergeFreeing, LogMergeRange,
    LogMergeRequest, LogMergeStatus, LogTrees, ZONE_LOG_MERGE_COMPLETE, ZONE_LOG_MERGE_FREEING,
    ZONE_LOG_MERGE_RANGE,
};
use std::rc::Rc;

/// Requests and completions of one sweep; that many completions are spliced at once.
const SPLICE_BATCH: u64 = 8;

/// What one commit of GET_LOG_TREES found out about merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// Nothing to do, or a merge runs: open the transaction.
    Proceed,
    /// Something was done that must be durable first; ask again at once.
    Again,
    /// Other mounts have open trees: ask again in a while.
    Wait,
}

/// What one commit of GET_LOG_MERGE came to.
enum Step {
    /// Work for the client.
    Request(Box<LogMergeRequest>),
    /// Something was done; ask again.
    Again,
    /// All ranges are merged.
    End,
}

impl Store {
    async fn merge_status(&self, d: &Dirty) -> Result<Option<LogMergeStatus>> {
        items::get(&self.cache, &d.sup.log_merge, Key::log_merge_status()).await
    }

    async fn put_status(&self, d: &mut Dirty, status: &LogMergeStatus) -> Result<()> {
        items::put(
            &self.tx,
            &mut d.sup.log_merge,
            Key::log_merge_status(),
            status,
        )
        .await
    }

    /// One round of finalizing all log trees to start a merge (spec 05 section 3.2).
    /// The record of `rid` is not open.
    pub(super) async fn merge_round(&self, d: &mut Dirty, rid: u64) -> Result<Round> {
        let (mut ours, ours_stored) = self.current_log_trees(d, rid).await?;
        if ours.is_open() || self.merge_status(d).await?.is_some() {
            return Ok(Round::Proceed);
        }
        let newest = items::newest_of_each(&self.cache, &d.sup.logs_root).await?;
        let active = |log: &&LogTrees| log.rid.get() != rid && !log.is_finalized();
        let others: Vec<&LogTrees> = newest.iter().filter(active).collect();
        for log in &others {
            match self.require_mounted(d, log.rid.get()).await {
                Err(ServerError::NotMounted { rid }) => {
                    probe("server.merge.orphan_log_trees");
                    self.reclaim_log_tree(d, rid).await?;
                    return Ok(Round::Again);
                }
                other => other?,
            }
        }
        let saw_finalized = newest.iter().any(LogTrees::is_finalized);
        let finalize_ours = ours.item_root.height > self.policy.finalize_height
            || alloc::list_is_low(&ours.meta_avail);
        if !finalize_ours && !saw_finalized {
            probe("server.merge.no_finalized");
            return Ok(Round::Proceed);
        }
        self.ask_to_commit(&others);
        if ours_stored {
            probe("server.merge.finalize_ours");
            self.finalize(d, &mut ours, false).await?;
            return Ok(Round::Again);
        }
        if !others.is_empty() {
            return Ok(Round::Wait);
        }
        self.start_merge(d).await?;
        Ok(Round::Proceed)
    }

    /// Asks mounts to commit, each open transaction once.
    fn ask_to_commit(&self, others: &[&LogTrees]) {
        let sent = self.finalize_sent_seq.replace(self.core_seq());
        for log in others {
            if log.get_trans_seq.get() > sent {
                self.request_sync(log.rid.get());
            }
        }
    }

    /// Everybody's newest tree is finalized: no item to come is older than any in them.
    async fn start_merge(&self, d: &mut Dirty) -> Result<()> {
        probe("server.merge.start");
        self.merge_waits.set(0);
        self.insert_range(d, Key::ZEROS, Key::ONES)
            .await
            .or_fatal()?;
        let status = LogMergeStatus {
            seq: self.next_seq().into(),
            ..LogMergeStatus::default()
        };
        self.put_status(d, &status).await.or_fatal()
    }

    /// Adds a range still to be merged. Ranges whose starts differ in the zone only
    /// want the same key; the next free one serves, since ranges are found by
    /// looking at all of them.
    async fn insert_range(&self, d: &mut Dirty, start: Key, end: Key) -> Result<()> {
        assert!(start <= end, "a range from {start} to {end}");
        let mut key = Key::log_merge_range(start);
        while btree::lookup(&self.cache, &d.sup.log_merge, &key)
            .await?
            .is_some()
        {
            probe("server.merge.range_key_taken");
            key = key.inc();
        }
        let range = LogMergeRange {
            start: start.into(),
            end: end.into(),
        };
        items::put(&self.tx, &mut d.sup.log_merge, key, &range).await
    }

    /// All ranges with their item keys, which say nothing about their order.
    async fn ranges(&self, d: &Dirty) -> Result<Vec<(Key, LogMergeRange)>> {
        let (first, last) = items::zone(ZONE_LOG_MERGE_RANGE);
        items::all(&self.cache, &d.sup.log_merge, first, last).await
    }

    async fn completions(&self, d: &Dirty) -> Result<Vec<(Key, LogMergeComplete)>> {
        let (first, last) = items::zone(ZONE_LOG_MERGE_COMPLETE);
        items::all(&self.cache, &d.sup.log_merge, first, last).await
    }

    /// The log trees that a merge of this seq consumes.
    async fn merge_inputs(&self, d: &Dirty, seq: u64) -> Result<Vec<LogTrees>> {
        let mut logs = items::all_log_trees(&self.cache, &d.sup.logs_root).await?;
        logs.retain(|log| log.is_finalized() && log.finalize_seq.get() < seq);
        Ok(logs)
    }

    /// GET_LOG_MERGE: a part of the running merge for a mount to work on.
    ///
    /// # Errors
    /// ENOENT if there is nothing to do now.
    pub async fn get_log_merge(self: &Rc<Self>, rid: u64) -> Result<LogMergeRequest> {
        loop {
            // Most questions find no merge; they cost no commit.
            let status = self.merge_status(&*self.dirty().await).await?;
            if status.is_none() {
                return Err(ServerError::Refused(Errno::ENOENT));
            }
            match self.change(async |d| self.merge_step(d, rid).await).await? {
                Step::Request(request) => return Ok(*request),
                Step::Again => {}
                Step::End => self.end_merge().await?,
            }
        }
    }

    async fn merge_step(&self, d: &mut Dirty, rid: u64) -> Result<Step> {
        let nothing = || Err(ServerError::Refused(Errno::ENOENT));
        self.require_mounted(d, rid).await?;
        // A mount asks only when idle: a request it has was lost on the way.
        self.cancel_merge_requests(d, rid).await.or_fatal()?;
        loop {
            let Some(mut status) = self.merge_status(d).await? else {
                return nothing();
            };
            let from = status.next_range_key.key();
            let ranges = self.ranges(d).await?;
            let (nr_requests, nr_complete) = (status.nr_requests.get(), status.nr_complete.get());
            let next = ranges
                .iter()
                .filter(|(_, range)| range.start.key() >= from)
                .min_by_key(|(_, range)| range.start.key())
                .copied();
            if nr_requests == 0 && (next.is_none() || nr_complete >= SPLICE_BATCH) {
                return self.splice(d, &mut status).await;
            }
            let Some((range_key, range)) = next else {
                return nothing();
            };
            if nr_requests + nr_complete >= SPLICE_BATCH {
                return nothing();
            }
            let inputs = self.merge_inputs(d, status.seq.get()).await?;
            if let Some(first) = self.first_input_key(&inputs, &range).await? {
                return self
                    .hand_out(d, rid, &mut status, range_key, &range, first)
                    .await;
            }
            items::delete(&self.tx, &mut d.sup.log_merge, range_key)
                .await
                .or_fatal()?;
        }
    }

    /// The least key of any input within a range.
    async fn first_input_key(
        &self,
        inputs: &[LogTrees],
        range: &LogMergeRange,
    ) -> Result<Option<Key>> {
        let mut first: Option<Key> = None;
        for log in inputs {
            let found = btree::next(&self.cache, &log.item_root, &range.start.key()).await?;
            let key = found
                .map(|item| item.key)
                .filter(|key| *key <= range.end.key());
            first = first.into_iter().chain(key).min();
        }
        Ok(first)
    }

    /// Cuts the range below one parent block off and gives it to the mount.
    async fn hand_out(
        &self,
        d: &mut Dirty,
        rid: u64,
        status: &mut LogMergeStatus,
        range_key: Key,
        range: &LogMergeRange,
        first: Key,
    ) -> Result<Step> {
        let fs_root = d.sup.fs_root;
        let root = btree::get_parent(&self.cache, &fs_root, &first).await?;
        let parent = btree::parent_range(&self.cache, &fs_root, &first).await?;
        let end = parent.end.min(range.end.key());
        let meta_avail = self.merge_blocks(d).await?;
        let seq = self.next_seq();
        let subtree = fs_root.height > 2;
        let request = LogMergeRequest {
            meta_avail,
            logs_root: d.sup.logs_root,
            root,
            start: first.into(),
            end: end.into(),
            input_seq: status.seq,
            rid: rid.into(),
            seq: seq.into(),
            flags: if subtree {
                LOG_MERGE_REQUEST_FLAG_SUBTREE
            } else {
                0
            }
            .into(),
            ..LogMergeRequest::default()
        };
        let merge = &mut d.sup.log_merge;
        items::delete(&self.tx, merge, range_key).await.or_fatal()?;
        if range.end.key() > end {
            self.insert_range(d, end.inc(), range.end.key())
                .await
                .or_fatal()?;
        }
        let key = Key::log_merge_request(rid, seq);
        items::put(&self.tx, &mut d.sup.log_merge, key, &request)
            .await
            .or_fatal()?;
        let after = if parent.end.is_ones() {
            Key::ONES
        } else {
            parent.end.inc()
        };
        status.next_range_key = after.into();
        status.nr_requests += 1;
        self.put_status(d, status).await.or_fatal()?;
        Ok(Step::Request(Box::new(request)))
    }

    /// A list of free blocks for one request.
    async fn merge_blocks(&self, d: &mut Dirty) -> Result<AllocListHead> {
        let policy = self.cache.policy().clone();
        let mut head = AllocListHead::default();
        let fill = policy.merge_fill;
        match alloc::fill_list(&self.tx, &mut head, d.meta_avail(), fill, fill).await {
            Ok(()) | Err(AllocError::NoSpace) => {}
            Err(err) => return Err(ServerError::from(err).fatal()),
        }
        if head.first_nr.get() >= 4 * policy.merge_alloc_low {
            return Ok(head);
        }
        probe("server.merge.no_blocks");
        alloc::splice_list(&self.tx, d.other_freed(), &mut head)
            .await
            .or_fatal()?;
        Err(ServerError::NoSpace)
    }

    /// Takes the requests of a mount back that is gone, or has forgotten them.
    pub(super) async fn cancel_merge_requests(&self, d: &mut Dirty, rid: u64) -> Result<()> {
        let Some(mut status) = self.merge_status(d).await? else {
            return Ok(());
        };
        // Mutant: breaks spec 05 section 10, requests of the dead are done by others.
        if mutant("dead_keeps_merge_request") {
            return Ok(());
        }
        let first = Key::log_merge_request(rid, 0);
        let last = Key::log_merge_request(rid, u64::MAX);
        let found: Vec<(Key, LogMergeRequest)> =
            items::all(&self.cache, &d.sup.log_merge, first, last).await?;
        for (key, mut request) in found {
            probe("server.merge.request_cancelled");
            items::delete(&self.tx, &mut d.sup.log_merge, key).await?;
            self.put_back(d, &mut request).await?;
            status.nr_requests -= 1;
            self.put_status(d, &status).await?;
        }
        Ok(())
    }

    /// Undoes a request: its range is to be merged again, and its blocks, which
    /// nothing refers to, are free.
    async fn put_back(&self, d: &mut Dirty, request: &mut LogMergeRequest) -> Result<()> {
        self.insert_range(d, request.start.key(), request.end.key())
            .await?;
        alloc::splice_list(&self.tx, d.other_freed(), &mut request.meta_avail).await?;
        alloc::splice_list(&self.tx, d.other_freed(), &mut request.meta_freed).await?;
        Ok(())
    }

    /// COMMIT_LOG_MERGE: what a mount made of its request.
    ///
    /// # Errors
    /// ENOENT if there is no such request (any more).
    pub async fn commit_log_merge(self: &Rc<Self>, rid: u64, comp: LogMergeComplete) -> Result<()> {
        self.change(async |d| self.complete(d, rid, comp).await)
            .await
    }

    async fn complete(&self, d: &mut Dirty, rid: u64, comp: LogMergeComplete) -> Result<()> {
        let missing = || ServerError::Refused(Errno::ENOENT);
        let mut status = self.merge_status(d).await?.ok_or_else(missing)?;
        let key = Key::log_merge_request(rid, comp.seq.get());
        let stored: Option<LogMergeRequest> =
            items::get(&self.cache, &d.sup.log_merge, key).await?;
        let mut request = stored.ok_or_else(missing)?;
        if comp.rid.get() != rid {
            return Err(missing());
        }
        let failed = comp.flags.get() & LOG_MERGE_COMPLETE_FLAG_ERROR != 0;
        if !failed && !is_plausible(&request, &comp) {
            return Err(ServerError::Refused(Errno::EINVAL));
        }
        items::delete(&self.tx, &mut d.sup.log_merge, key)
            .await
            .or_fatal()?;
        if failed {
            probe("server.merge.request_failed");
            self.put_back(d, &mut request).await.or_fatal()?;
        } else {
            let key = Key::log_merge_complete(comp.seq.get());
            items::put(&self.tx, &mut d.sup.log_merge, key, &comp)
                .await
                .or_fatal()?;
            status.nr_complete += 1;
        }
        status.nr_requests -= 1;
        self.put_status(d, &status).await.or_fatal()
    }

    fn unit_fits(&self, mark: Mark) -> bool {
        let policy = self.cache.policy();
        let fits = !self
            .tx
            .low_since(mark, policy.commit_budget, policy.splice_unit);
        if !fits {
            probe("server.merge.splice_in_progress");
        }
        fits
    }

    /// Splices completions into the fs root as far as one hold's budget goes (spec
    /// 05 section 7). No request is out.
    async fn splice(&self, d: &mut Dirty, status: &mut LogMergeStatus) -> Result<Step> {
        let mark = self.tx.mark();
        if self.splice_parents(d, mark).await.or_fatal()? == Progress::More {
            return Ok(Step::Again);
        }
        if status.nr_complete.get() < SPLICE_BATCH {
            // No request may be handed out until the parents are rebalanced.
            status.nr_complete = SPLICE_BATCH.into();
            self.put_status(d, status).await.or_fatal()?;
        }
        if self.finish_completions(d, mark).await.or_fatal()? == Progress::More {
            return Ok(Step::Again);
        }
        if self.ranges(d).await?.is_empty() {
            return Ok(Step::End);
        }
        status.next_range_key = Key::ZEROS.into();
        status.nr_complete = 0.into();
        self.put_status(d, status).await.or_fatal()?;
        Ok(Step::Again)
    }

    /// Pass 1: the merged parents replace the old ones, whose blocks are freed in
    /// the same commit.
    async fn splice_parents(&self, d: &mut Dirty, mark: Mark) -> Result<Progress> {
        for (key, mut comp) in self.completions(d).await? {
            if comp.meta_avail.block_ref.is_null() && comp.meta_freed.block_ref.is_null() {
                continue;
            }
            if !self.unit_fits(mark) {
                return Ok(Progress::More);
            }
            probe("server.merge.splice");
            let start = comp.start.key();
            btree::set_parent(&self.tx, &mut d.sup.fs_root, &start, &comp.root).await?;
            alloc::splice_list(&self.tx, d.other_freed(), &mut comp.meta_avail).await?;
            alloc::splice_list(&self.tx, d.other_freed(), &mut comp.meta_freed).await?;
            items::put(&self.tx, &mut d.sup.log_merge, key, &comp).await?;
        }
        Ok(Progress::Done)
    }

    /// Pass 2: parents that ran out of room or items are rebalanced, and what was
    /// not merged is a range again.
    async fn finish_completions(&self, d: &mut Dirty, mark: Mark) -> Result<Progress> {
        for (key, comp) in self.completions(d).await? {
            if !self.unit_fits(mark) {
                return Ok(Progress::More);
            }
            if comp.flags.get() & LOG_MERGE_COMPLETE_FLAG_REMAIN != 0 {
                probe("server.merge.remain");
                let start = comp.start.key();
                btree::rebalance(&self.tx, &mut d.sup.fs_root, &start).await?;
                // Mutant: breaks spec 05 section 7, what remains is merged later.
                if !mutant("merge_remainder_dropped") {
                    self.insert_range(d, comp.remain.key(), comp.end.key())
                        .await?;
                }
            }
            items::delete(&self.tx, &mut d.sup.log_merge, key).await?;
        }
        Ok(Progress::Done)
    }

    /// Everything is in the fs root: all inputs go at once, in a commit that nobody
    /// else shares (spec 05 section 8). How many there are is not bounded, so that commit
    /// gets more room as it needs it.
    async fn end_merge(self: &Rc<Self>) -> Result<()> {
        let unit = self.cache.policy().splice_unit;
        let hold = self.hold_alone(2 * unit).await?;
        let result = self.remove_inputs(&mut *self.dirty().await).await;
        hold.apply(result).await?;
        self.kick_merge_free();
        Ok(())
    }

    /// Room in the lists while inputs are removed: one of them, a change of the tree that
    /// more blocks come from, and the commit's own.
    fn input_room(&self) -> u32 {
        let policy = self.cache.policy();
        2 * policy.splice_unit + policy.commit_budget
    }

    async fn remove_inputs(&self, d: &mut Dirty) -> Result<()> {
        let Some(status) = self.merge_status(d).await? else {
            return Ok(());
        };
        let busy = status.nr_requests.get() != 0
            || !self.ranges(d).await?.is_empty()
            || !self.completions(d).await?.is_empty();
        if busy {
            return Ok(());
        }
        let inputs = self.merge_inputs(d, status.seq.get()).await?;
        // A leaf of the log trees' records that is not nearly empty has two at least: no
        // more blocks than that are copied. Known to be there before anything is removed.
        let blocks = u64::from(self.tx.remaining().avail) + d.meta_avail().total_len.get();
        if blocks < u64::from(self.input_room()) + inputs.len() as u64 / 2 {
            probe("server.merge.end_no_space");
            return Err(ServerError::NoSpace);
        }
        probe("server.merge.end");
        for log in inputs {
            match alloc::widen_running(&self.tx, d.meta_avail(), self.input_room()).await {
                // What is left in the list was counted above.
                Ok(()) | Err(AllocError::NoSpace) => {}
                Err(err) => return Err(ServerError::from(err).fatal()),
            }
            self.remove_input(d, &log).await.or_fatal()?;
        }
        let key = Key::log_merge_status();
        items::delete(&self.tx, &mut d.sup.log_merge, key)
            .await
            .or_fatal()?;
        Ok(())
    }

    async fn remove_input(&self, d: &mut Dirty, log: &LogTrees) -> Result<()> {
        if log.item_root != BtreeRoot::default() {
            let seq = self.next_seq();
            let freeing = LogMergeFreeing {
                root: log.item_root,
                key: Key::ZEROS.into(),
                seq: seq.into(),
            };
            let key = Key::log_merge_freeing(seq);
            items::put(&self.tx, &mut d.sup.log_merge, key, &freeing).await?;
        }
        if !log.bloom_ref.is_null() {
            self.tx.free_meta(log.bloom_ref.blkno.get()).await?;
        }
        let key = Key::log_trees(log.rid.get(), log.nr.get());
        items::delete(&self.tx, &mut d.sup.logs_root, key).await?;
        let count = d
            .sup
            .inode_count
            .get()
            .wrapping_add_signed(log.inode_count_delta.get());
        d.sup.inode_count = count.into();
        Ok(())
    }

    /// Frees blocks of merged log trees, one commit's worth; `Done` if none is left.
    ///
    /// # Errors
    /// The server stops with any of them.
    pub async fn free_merged(self: &Rc<Self>) -> Result<Progress> {
        let (first, last) = items::zone(ZONE_LOG_MERGE_FREEING);
        let any = {
            let d = self.dirty().await;
            items::next::<LogMergeFreeing>(&self.cache, &d.sup.log_merge, first, last).await?
        };
        if any.is_none() {
            return Ok(Progress::Done);
        }
        self.change(async |d| self.free_some(d).await).await
    }

    async fn free_some(&self, d: &mut Dirty) -> Result<Progress> {
        let policy = self.cache.policy().clone();
        let mark = self.tx.mark();
        let (first, last) = items::zone(ZONE_LOG_MERGE_FREEING);
        loop {
            let root = &d.sup.log_merge;
            let next = items::next::<LogMergeFreeing>(&self.cache, root, first, last).await?;
            let Some((key, mut freeing)) = next else {
                return Ok(Progress::Done);
            };
            if self.tx.low_since(mark, policy.free_commit_limit, 0) {
                return Ok(Progress::More);
            }
            btree::dirty(&self.tx, &mut d.sup.log_merge, &key).await?;
            let mut at = freeing.key.key();
            let freed =
                btree::free_blocks(&self.tx, &freeing.root, &mut at, policy.free_budget).await;
            freed.or_fatal()?;
            // Mutant: breaks spec 05 section 9, blocks are freed once.
            if mutant("freeing_forgets_progress") && !at.is_ones() {
                at = freeing.key.key();
            }
            freeing.key = at.into();
            let root = &mut d.sup.log_merge;
            if at.is_ones() {
                items::delete(&self.tx, root, key).await.or_fatal()?;
            } else {
                items::put(&self.tx, root, key, &freeing).await.or_fatal()?;
            }
        }
    }
}

/// Whether a completion can belong to its request: what it says goes into the fs
/// root unseen.
fn is_plausible(request: &LogMergeRequest, comp: &LogMergeComplete) -> bool {
    let remain = comp.flags.get() & LOG_MERGE_COMPLETE_FLAG_REMAIN != 0;
    let subtree = request.flags.get() & LOG_MERGE_REQUEST_FLAG_SUBTREE != 0;
    let range = request.start.key()..=request.end.key();
    comp.start == request.start
        && comp.end == request.end
        && (!remain || range.contains(&comp.remain.key()))
        && (!subtree || comp.root.height == 2)
        && !(comp.meta_avail.block_ref.is_null() && comp.meta_freed.block_ref.is_null())
}

//! The life of a mount's log trees record: opened by GET_LOG_TREES, filled in by
//! COMMIT_LOG_TREES, finalized when its mount is gone or a merge is near
//! (spec 04 sections 9 to 11 and 16, 03 sections 14 and 15).
//!
//! ```text
//!           GET             COMMIT              GET
//! absent -------> OPEN ---------------> COMMITTED -----> OPEN ...
//!                  |                      |   | GET that finalizes
//!                  | reclaim      reclaim |   v
//!                  +--------> FINALIZED <-+---+  and a new OPEN record, nr + 1
//! ```
//!
//! What can go wrong: allocators that leave the record, or come to it, in another
//! commit than the one that stores it; their blocks would be owned twice or not at
//! all. So from the first change of an allocator to the store of the record every
//! error but "no space" is fatal, and the record is stored also after that one.

use super::error::{OrFatal, Result, ServerError};
use super::items;
use super::merge::Round;
use super::store::{Dirty, Store};
use crate::alloc::{self, AllocError, Zones};
use crate::btree;
use crate::env::{Duration, mutant, probe};
use crate::errno::Errno;
use crate::format::{
    AllocListHead, AllocRoot, BtreeRoot, Key, LOG_TREES_FLAG_FINALIZED, LogTrees,
    SRCH_LOG_ROTATE_BLOCKS, SrchFile,
};
use std::rc::Rc;

/// How many times the usual wait for a merge to start is waited at most: a mount that
/// lives and can not commit, which would never end it, must not hold up the others for long.
const MERGE_PATIENCE_MAX: u32 = 10;

/// Seqs from here on can not come from a sane peer.
const SEQ_LIMIT: u64 = 1 << 63;

/// Commits that give a mount's freed data back and move nothing, before the mount gets
/// its transaction with what is left. What others free is free two commits later.
const DRAINS_IN_VAIN: u32 = 4;

/// Refuses a record of a mount with roots that no tree has.
fn check_roots(log: &LogTrees) -> Result<()> {
    for root in [&log.item_root, &log.data_avail.root, &log.data_freed.root] {
        btree::check_root(root)?;
    }
    Ok(())
}

/// Whether a bounded move has moved everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Everything.
    Done,
    /// The budget ended it: commit, and go on (EINPROGRESS).
    More,
}

impl Store {
    /// Greatest item seq of all log trees, from which the core seq starts.
    pub(super) async fn greatest_item_seq(&self, logs_root: &BtreeRoot) -> Result<u64> {
        let logs = items::all_log_trees(&self.cache, logs_root).await?;
        Ok(logs
            .iter()
            .map(|log| log.max_item_seq.get())
            .max()
            .unwrap_or(0))
    }

    /// GET_LOG_TREES: opens the mount's next transaction, or returns the open one.
    ///
    /// # Errors
    /// The client asks again after any error; it says nothing about what was done.
    pub async fn get_log_trees(self: &Rc<Self>, rid: u64) -> Result<LogTrees> {
        let deadline = self.env().clock.now() + self.merge_patience();
        let mut pause = self.policy.finalize_poll_min;
        let (log, fresh) = loop {
            let late = self.env().clock.now() >= deadline;
            match self
                .change(async |d| self.open_or_wait(d, rid, late).await)
                .await?
            {
                Ok(opened) => break opened?,
                Err(Round::Wait) => {
                    self.env().sleep(pause).await;
                    pause = (pause * 3 / 2).min(self.policy.finalize_poll_max);
                }
                Err(_) => {}
            }
        };
        if fresh {
            self.drain_data_freed(log).await
        } else {
            probe("server.get_log_trees.resent");
            Ok(log)
        }
    }

    /// How long to wait for everybody else to finalize. Where commits take longer than
    /// the usual wait no merge would ever start: each mount would come, wait, and open its
    /// next transaction before the others had committed theirs, leaving one more finalized
    /// log tree each time, all of which every read has to look at. So the wait grows with
    /// each round of them that was in vain.
    fn merge_patience(&self) -> Duration {
        let rounds = self.merge_waits.get() / self.clients();
        self.policy.log_merge_wait_timeout * (1 + rounds).min(MERGE_PATIENCE_MAX)
    }

    /// Opens the transaction, unless something about a coming merge is first.
    async fn open_or_wait(
        &self,
        d: &mut Dirty,
        rid: u64,
        late: bool,
    ) -> Result<Result<Result<(LogTrees, bool)>, Round>> {
        self.require_mounted(d, rid).await?;
        match self.merge_round(d, rid).await? {
            Round::Wait if late => {
                probe("server.merge.wait_timeout");
                self.merge_waits
                    .set(self.merge_waits.get().saturating_add(1));
            }
            Round::Proceed => {}
            round => return Ok(Err(round)),
        }
        Ok(Ok(self.open_transaction(d, rid).await?))
    }

    /// The mount's newest record that is not finalized, or a new one that is not
    /// stored yet; the second value says whether it is stored.
    pub(super) async fn current_log_trees(&self, d: &Dirty, rid: u64) -> Result<(LogTrees, bool)> {
        let newest = items::newest_log_trees(&self.cache, &d.sup.logs_root, rid).await?;
        let nr = match newest {
            Some(log) if !log.is_finalized() => {
                let (get, commit) = (log.get_trans_seq.get(), log.commit_trans_seq.get());
                if get < commit {
                    let nr = log.nr.get();
                    return Err(ServerError::LogTreesSeqs {
                        rid,
                        nr,
                        get,
                        commit,
                    });
                }
                return Ok((log, true));
            }
            Some(finalized) => finalized.nr.get() + 1,
            None => 1,
        };
        let log = LogTrees {
            rid: rid.into(),
            nr: nr.into(),
            ..LogTrees::default()
        };
        Ok((log, false))
    }

    /// Whether the mount is mounted, as of the dirty state.
    pub(super) async fn require_mounted(&self, d: &Dirty, rid: u64) -> Result<()> {
        let key = Key::mounted_client(rid);
        match btree::lookup(&self.cache, &d.sup.mounted_clients, &key).await? {
            Some(_) => Ok(()),
            None => Err(ServerError::NotMounted { rid }),
        }
    }

    /// The first commit of GET_LOG_TREES; false with the record as it is if a
    /// transaction was open already. The inner error is "no space", with the record
    /// stored: it is committed too, since only commits make freed blocks free.
    async fn open_transaction(&self, d: &mut Dirty, rid: u64) -> Result<Result<(LogTrees, bool)>> {
        let (mut log, stored) = self.current_log_trees(d, rid).await?;
        if log.is_open() {
            return Ok(Ok((log, false)));
        }
        // The mount's word, from its last COMMIT_LOG_TREES: refused while nothing of
        // ours has changed.
        check_roots(&log)?;
        alloc::verify_list(&self.tx, &log.meta_freed).await?;
        let all = items::all_log_trees(&self.cache, &d.sup.logs_root).await?;
        let zones = Zones::for_mount(&self.stable(), rid, &all);
        let key = Key::log_trees(rid, log.nr.get());
        if stored {
            btree::dirty(&self.tx, &mut d.sup.logs_root, &key).await?;
        }
        let refilled = self.refill(d, &mut log, zones.as_ref()).await;
        match &refilled {
            Ok(()) => log.get_trans_seq = self.next_seq().into(),
            Err(ServerError::NoSpace) => probe("server.get_log_trees.no_space"),
            Err(err) => return Err(err.clone().fatal()),
        }
        items::put(&self.tx, &mut d.sup.logs_root, key, &log)
            .await
            .or_fatal()?;
        Ok(refilled.map(|()| (log, true)))
    }

    /// Takes back what the last transaction freed, and fills the allocators.
    async fn refill(&self, d: &mut Dirty, log: &mut LogTrees, zones: Option<&Zones>) -> Result<()> {
        let policy = self.cache.policy().clone();
        alloc::splice_list(&self.tx, d.other_freed(), &mut log.meta_freed).await?;
        // What does not fit in the budget is drained after this commit.
        self.take_extents(&mut d.sup.data_alloc, &mut log.data_freed)
            .await?;
        let meta = self.refill_meta(d, &mut log.meta_avail).await;
        let have = log.data_avail.total_len.get();
        if have < policy.data_fill_lo {
            let count = (policy.data_fill_target - have).min(d.sup.data_alloc.total_len.get());
            let (to, from) = (&mut log.data_avail, &mut d.sup.data_alloc);
            self.move_extents(to, from, count, zones).await?;
            // Low is the volume, not what one commit could move: as long as the server has
            // more, or is still taking it back, the mount comes again and gets it.
            let left = d.sup.data_alloc.total_len.get() + log.data_freed.total_len.get();
            let low = left == 0 && log.data_avail.total_len.get() < policy.data_fill_lo;
            alloc::set_root_low(&mut log.data_avail, low);
        }
        let zone_blocks = zones.map_or(0, |zones| zones.zone_blocks);
        alloc::set_zone_bits(&self.cache, log, zone_blocks).await?;
        meta
    }

    async fn refill_meta(&self, d: &mut Dirty, avail: &mut AllocListHead) -> Result<()> {
        let policy = self.cache.policy().clone();
        let (lo, target) = (policy.meta_fill_lo, policy.meta_fill_target);
        let filled = alloc::fill_list(&self.tx, avail, d.meta_avail(), lo, target).await;
        alloc::set_list_low(avail, d.meta_avail().total_len.get() <= self.reserve());
        match filled {
            // Enough for deletions to go on; the client sees LOW.
            Err(AllocError::NoSpace) if avail.first_nr.get() >= 4 * policy.client_low => Ok(()),
            Err(AllocError::NoSpace) => Err(ServerError::NoSpace),
            other => Ok(other?),
        }
    }

    /// Moves up to `total` blocks between extent trees within one move budget.
    async fn move_extents(
        &self,
        to: &mut AllocRoot,
        from: &mut AllocRoot,
        total: u64,
        zones: Option<&Zones>,
    ) -> Result<()> {
        if total == 0 {
            return Ok(());
        }
        let budget = self.cache.policy().move_budget;
        match alloc::move_extents(&self.tx, to, from, total, zones, budget).await {
            Ok(()) => Ok(()),
            // The lists of this commit are used up; the next one goes on.
            Err(AllocError::InProgress | AllocError::NoSpace) => {
                probe("server.move_in_progress");
                Ok(())
            }
            Err(err) => Err(err.into()),
        }
    }

    /// Moves a whole free extent tree into another, as far as the budget goes.
    pub(super) async fn take_extents(
        &self,
        to: &mut AllocRoot,
        from: &mut AllocRoot,
    ) -> Result<Progress> {
        self.move_extents(to, from, from.total_len.get(), None)
            .await?;
        match from.total_len.get() {
            0 => Ok(Progress::Done),
            _ => Ok(Progress::More),
        }
    }

    /// Until a mount's freed data is all back: commits of their own, each of them
    /// only if the record is still the same open transaction (spec 04 section 9,
    /// step 12). A record that refers to blocks of a failed commit is not given out.
    async fn drain_data_freed(self: &Rc<Self>, opened: LogTrees) -> Result<LogTrees> {
        let mut log = opened;
        let mut in_vain = 0;
        while log.data_freed.total_len.get() != 0 && in_vain < DRAINS_IN_VAIN {
            probe("server.get_log_trees.drain");
            let before = log.data_freed.total_len;
            log = self
                .change(async |d| self.drain_some(d, &opened).await)
                .await?;
            in_vain = match log.data_freed.total_len == before {
                true => in_vain + 1,
                false => 0,
            };
        }
        Ok(log)
    }

    async fn drain_some(&self, d: &mut Dirty, opened: &LogTrees) -> Result<LogTrees> {
        let key = Key::log_trees(opened.rid.get(), opened.nr.get());
        let stored: Option<LogTrees> = items::get(&self.cache, &d.sup.logs_root, key).await?;
        let mut log = stored.ok_or(ServerError::ItemMissing(key))?;
        if log.get_trans_seq != opened.get_trans_seq
            || log.commit_trans_seq != opened.commit_trans_seq
            || log.flags != opened.flags
        {
            probe("server.get_log_trees.overtaken");
            return Err(ServerError::Refused(Errno::EIO));
        }
        self.take_extents(&mut d.sup.data_alloc, &mut log.data_freed)
            .await
            .or_fatal()?;
        items::put(&self.tx, &mut d.sup.logs_root, key, &log)
            .await
            .or_fatal()?;
        Ok(log)
    }

    /// COMMIT_LOG_TREES: makes a mount's transaction durable and visible.
    ///
    /// # Errors
    /// EIO if it is not the transaction that is open, ENOENT if its record is gone.
    pub async fn commit_log_trees(self: &Rc<Self>, rid: u64, log: LogTrees) -> Result<()> {
        if log.rid.get() != rid || log.max_item_seq.get() >= SEQ_LIMIT {
            return Err(ServerError::Refused(Errno::EIO));
        }
        self.change(async |d| self.store_transaction(d, rid, log).await)
            .await
    }

    async fn store_transaction(&self, d: &mut Dirty, rid: u64, mut log: LogTrees) -> Result<()> {
        let key = Key::log_trees(rid, log.nr.get());
        let stored: Option<LogTrees> = items::get(&self.cache, &d.sup.logs_root, key).await?;
        let stored = stored.ok_or(ServerError::Refused(Errno::ENOENT))?;
        if stored.get_trans_seq != log.get_trans_seq {
            return Err(ServerError::Refused(Errno::EIO));
        }
        if stored.is_finalized() {
            // Reclaimed: its mount must not believe that this was kept.
            probe("server.commit_log_trees.finalized");
            return Err(ServerError::Refused(Errno::EIO));
        }
        if stored.commit_trans_seq == log.get_trans_seq {
            probe("server.commit_log_trees.resent");
            return Ok(());
        }
        check_roots(&log)?;
        btree::dirty(&self.tx, &mut d.sup.logs_root, &key).await?;
        self.rotate_srch(d, &mut log.srch_file, false)
            .await
            .or_fatal()?;
        log.commit_trans_seq = log.get_trans_seq;
        log.flags = stored.flags;
        log.finalize_seq = stored.finalize_seq;
        self.raise_core_seq(log.max_item_seq.get());
        items::put(&self.tx, &mut d.sup.logs_root, key, &log)
            .await
            .or_fatal()
    }

    /// Moves a srch log file into the srch tree: always with `force`, else when it
    /// is long enough (spec 06 section 5).
    pub(super) async fn rotate_srch(
        &self,
        d: &mut Dirty,
        file: &mut SrchFile,
        force: bool,
    ) -> Result<()> {
        let due = force || file.blocks.get() >= SRCH_LOG_ROTATE_BLOCKS;
        if file.block_ref.is_null() || !due {
            return Ok(());
        }
        probe("server.srch.rotated");
        let key = Key::srch_log(file.block_ref.blkno.get());
        // An old error path of the original can have left the item there already.
        items::put(&self.tx, &mut d.sup.srch_root, key, file).await?;
        *file = SrchFile::default();
        Ok(())
    }

    /// Takes everything a log tree owns but its items and bloom block, and marks it
    /// finalized when nothing is left. Stores the record in any case. `gone`: its
    /// mount is, so an open transaction ends here and its zones are free.
    ///
    /// # Errors
    /// All are fatal: allocators have moved.
    pub(super) async fn finalize(
        &self,
        d: &mut Dirty,
        log: &mut LogTrees,
        gone: bool,
    ) -> Result<Progress> {
        let mut progress = self.take_everything(d, log).await.or_fatal()?;
        // Mutant: breaks spec 04 section 16, nothing is finalized that owns blocks.
        if mutant("finalized_too_early") {
            progress = Progress::Done;
        }
        if progress == Progress::Done {
            if gone {
                log.commit_trans_seq = log.get_trans_seq;
                log.data_alloc_zone_blocks = 0.into();
                log.data_alloc_zones = Default::default();
            }
            log.flags = (log.flags.get() | LOG_TREES_FLAG_FINALIZED).into();
            log.finalize_seq = self.next_seq().into();
        }
        let key = Key::log_trees(log.rid.get(), log.nr.get());
        items::put(&self.tx, &mut d.sup.logs_root, key, log)
            .await
            .or_fatal()?;
        Ok(progress)
    }

    async fn take_everything(&self, d: &mut Dirty, log: &mut LogTrees) -> Result<Progress> {
        self.rotate_srch(d, &mut log.srch_file, true).await?;
        alloc::splice_list(&self.tx, d.other_freed(), &mut log.meta_freed).await?;
        if mutant("reclaim_skips_avail") {
            log.meta_avail = AllocListHead::default();
        }
        alloc::splice_list(&self.tx, d.other_freed(), &mut log.meta_avail).await?;
        for from in [&mut log.data_avail, &mut log.data_freed] {
            if self.take_extents(&mut d.sup.data_alloc, from).await? == Progress::More {
                probe("server.finalize.in_progress");
                return Ok(Progress::More);
            }
            *from = AllocRoot::default();
        }
        Ok(Progress::Done)
    }
}

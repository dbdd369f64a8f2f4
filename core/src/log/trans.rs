//! The open transaction: who is in it, and when nobody may enter (spec 04
//! section 5).
//!
//! A [`Hold`] is the right to change items; all of them are released before a
//! commit starts, so an operation is in one transaction whole.
//!
//! What can go wrong: a commit that runs out of blocks, which can not be undone.
//! Estimates from the size of dirty items are wrong when they lie far apart, so
//! items are put in the log tree in batches while operations go on: what earlier
//! batches used is known exactly, and a commit is forced while a whole batch with
//! its worst case, every item in a leaf of its own that splits, still fits.

use super::tree::Tree;
use super::{Inner, Life, Log, LogError};
use crate::alloc::{self, DataAlloc};
use crate::block::Tx;
use crate::env::{Time, mutant, probe};
use crate::format::LogTrees;
use std::cell::Cell;
use std::rc::Rc;
use tokio::sync::Mutex;

/// List entries that one pending item may need: the copies of a leaf and of a
/// share of its parents, and the new half of a split.
const BLOCKS_PER_ITEM: u32 = 3;
/// List entries for what a commit does besides items: bloom block, heights of the
/// trees, the cached data extent.
const COMMIT_BLOCKS: u32 = 16;

/// One transaction, from the response to GET_LOG_TREES on.
#[derive(Debug)]
pub(super) struct Open {
    /// Its seq: `get_trans_seq`.
    pub seq: u64,
    /// Its dirty blocks and metadata lists.
    pub tx: Tx,
    /// As the server gave it.
    pub record: LogTrees,
    pub tree: Mutex<Tree>,
    pub data: Mutex<DataAlloc>,
    wants_refill: Cell<bool>,
    inode_delta: Cell<i64>,
    /// Whether anybody was let in.
    used: Cell<bool>,
    /// When it was opened.
    since: Time,
}

impl Open {
    pub fn new(inner: &Inner, record: LogTrees) -> Self {
        let data = DataAlloc::new(record.data_avail, record.data_freed);
        Self {
            seq: record.get_trans_seq.get(),
            tx: Tx::new(inner.blocks.clone(), record.meta_avail, record.meta_freed),
            tree: Mutex::new(Tree::new(&record)),
            wants_refill: Cell::new(data.wants_refill(inner.blocks.policy())),
            data: Mutex::new(data),
            inode_delta: Cell::new(record.inode_count_delta.get()),
            used: Cell::new(false),
            since: inner.env.clock.now(),
            record,
        }
    }

    /// Whether anybody has entered it.
    pub fn is_used(&self) -> bool {
        self.used.get()
    }

    /// The record as COMMIT_LOG_TREES sends it, once every block is written.
    pub async fn committed_record(&self) -> LogTrees {
        let tree = self.tree.lock().await;
        let data = self.data.lock().await;
        let (meta_avail, meta_freed) = self.tx.heads();
        LogTrees {
            meta_avail,
            meta_freed,
            item_root: tree.item_root,
            bloom_ref: tree.bloom_ref,
            data_avail: data.avail,
            data_freed: data.freed,
            inode_count_delta: self.inode_delta.get().into(),
            max_item_seq: tree.max_item_seq.into(),
            ..self.record
        }
    }
}

/// The right to change items; dropping it releases the transaction. An operation
/// must not wait for a commit or for a cluster lock while it has one.
pub struct Hold {
    inner: Rc<Inner>,
    open: Rc<Open>,
}

impl Hold {
    /// One more hold of the same task: never waits.
    pub fn nested(&self) -> Hold {
        self.inner.enter(&self.open)
    }

    /// Seq of the transaction.
    pub fn trans_seq(&self) -> u64 {
        self.open.seq
    }

    /// The transaction, which must be of `inner`'s mount.
    pub(super) fn open(&self, inner: &Rc<Inner>) -> &Rc<Open> {
        assert!(Rc::ptr_eq(&self.inner, inner), "a hold of another mount");
        &self.open
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let left = self.inner.holders.get() - 1;
        self.inner.holders.set(left);
        if left == 0 && self.inner.writing.get() {
            self.inner.wake_commit.wake_all();
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hold({})", self.open.seq)
    }
}

/// What somebody who wants to hold has to do first.
enum Entry {
    Go(Hold),
    /// Wait until the commit is over.
    Wait,
    /// Put pending items in the tree.
    Insert(Rc<Open>),
    /// Wait for the next transaction.
    Commit(u64),
    /// Not even a fresh transaction has blocks.
    Starved(u64),
}

impl Inner {
    /// Whether the mount still commits.
    pub(super) fn check_alive(&self) -> Result<(), LogError> {
        match self.life.get() {
            Life::Severed => Err(LogError::Severed),
            _ => Ok(()),
        }
    }

    fn check_accepts(&self) -> Result<(), LogError> {
        match self.life.get() {
            Life::Running => Ok(()),
            Life::Severed => Err(LogError::Severed),
            Life::Ending | Life::Ended => Err(LogError::Shutdown),
        }
    }

    pub(super) fn trans_seq(&self) -> u64 {
        self.open.borrow().as_ref().map_or(0, |open| open.seq)
    }

    fn enter(self: &Rc<Self>, open: &Rc<Open>) -> Hold {
        self.holders.set(self.holders.get() + 1);
        open.used.set(true);
        Hold {
            inner: self.clone(),
            open: open.clone(),
        }
    }

    /// Pending items at which they are put in the tree.
    fn batch(&self) -> u32 {
        (self.blocks.policy().list_max / self.policy.pending_divisor).max(4)
    }

    fn try_enter(self: &Rc<Self>, allocating: bool) -> Result<Entry, LogError> {
        self.check_accepts()?;
        if self.writing.get() {
            return Ok(Entry::Wait);
        }
        let open = self.open.borrow().clone();
        let open = open.expect("a transaction is open unless one is being written");
        if allocating && alloc::list_is_low(&open.record.meta_avail) {
            probe("log.hold_enospc");
            // Whether space is low was decided when the transaction was opened. What
            // was deleted since then, or merged, shows only in the next one.
            if self.env.clock.now() >= open.since + self.policy.retry_delay {
                probe("log.hold_enospc_commits");
                self.trigger();
            }
            return Err(LogError::NoSpace);
        }
        let batch = self.batch();
        let pending = self.cache.borrow().stats().pending_items;
        if pending >= batch as usize {
            return Ok(Entry::Insert(open));
        }
        let changes = self.blocks.policy().client_low * (1 + self.holders.get());
        let room = BLOCKS_PER_ITEM * batch + COMMIT_BLOCKS + changes;
        // Mutant: breaks spec 04 section 5, a transaction ends before its blocks do.
        if !open.tx.remaining().fits(room) && !mutant("hold_ignores_room") {
            return Ok(match open.used.get() {
                true => Entry::Commit(open.seq),
                false if allocating => return Err(LogError::NoSpace),
                false => Entry::Starved(open.seq),
            });
        }
        if open.wants_refill.get() && open.used.get() {
            return Ok(Entry::Commit(open.seq));
        }
        Ok(Entry::Go(self.enter(&open)))
    }

    async fn next_transaction(&self, seq: u64) {
        self.trigger();
        let moved = || (self.trans_seq() != seq || self.life.get() != Life::Running).then_some(());
        self.changed.wait_for(moved).await;
    }
}

impl Log {
    /// Enters the transaction; waits while a commit is under way. Cluster locks
    /// are taken before. `allocating` operations add items or data; the others
    /// must work when space is low, so that space can be freed.
    ///
    /// # Errors
    /// `NoSpace` for allocating operations when metadata is low; `Severed`, `Shutdown`.
    pub async fn hold(&self, allocating: bool) -> Result<Hold, LogError> {
        let inner = &self.inner;
        loop {
            match inner.try_enter(allocating)? {
                Entry::Go(hold) => return Ok(hold),
                Entry::Wait => {
                    let over = || {
                        (!inner.writing.get() || inner.life.get() != Life::Running).then_some(())
                    };
                    inner.changed.wait_for(over).await;
                }
                Entry::Insert(open) => {
                    probe("log.insert_early");
                    if let Err(error) = inner.insert_pending(&open).await {
                        // The commit tries again until it works.
                        tracing::warn!(%error, "items could not be put in the log tree");
                        inner.next_transaction(open.seq).await;
                    }
                }
                Entry::Commit(seq) => {
                    probe("log.hold_commits");
                    inner.next_transaction(seq).await;
                }
                Entry::Starved(seq) => {
                    probe("log.hold_starved");
                    inner.env.sleep(inner.policy.retry_delay).await;
                    inner.next_transaction(seq).await;
                }
            }
        }
    }

    /// Seq of the open transaction; 0 before the first.
    pub fn trans_seq(&self) -> u64 {
        self.inner.trans_seq()
    }

    /// How many holds there are. A task that has one must not take locks: in a
    /// test with one task at a time, assert that this is 0 there.
    pub fn holders(&self) -> u32 {
        self.inner.holders.get()
    }

    /// Counts inodes created (+1) and finally deleted (-1), for statfs.
    pub fn inode_count_add(&self, hold: &Hold, by: i64) {
        let delta = &hold.open(&self.inner).inode_delta;
        delta.set(delta.get().wrapping_add(by));
    }

    /// Takes up to `count` data blocks: the first and how many.
    ///
    /// # Errors
    /// `NoData`: release everything, hold again, try again; `NoDataSpace`; block errors.
    pub async fn alloc_data(&self, hold: &Hold, count: u64) -> Result<(u64, u64), LogError> {
        let open = hold.open(&self.inner);
        let mut data = open.data.lock().await;
        let got = data.alloc_data(&open.tx, count).await;
        let wants_refill = data.wants_refill(self.inner.blocks.policy());
        open.wants_refill
            .set(wants_refill || matches!(got, Err(alloc::AllocError::Refill)));
        let extent = got?;
        Ok((extent.start, extent.len))
    }

    /// Frees data blocks; nobody allocates them before this transaction is durable.
    ///
    /// # Errors
    /// `Alloc` for blocks outside of the volume or freed twice; block errors.
    pub async fn free_data(&self, hold: &Hold, blkno: u64, count: u64) -> Result<(), LogError> {
        let open = hold.open(&self.inner);
        let mut data = open.data.lock().await;
        let total = self.inner.total_data_blocks.get();
        Ok(data.free_data(&open.tx, blkno, count, total).await?)
    }
}

//! A mount's items and its transaction (spec 04): the item cache, reads of the
//! forest of btrees, the open transaction and its commit.
//!
//! Every change to items takes the same way: dirty in the item cache, put in the
//! mount's own log tree, written and flushed, reported to the server with
//! COMMIT_LOG_TREES, durable with the server's next super block.
//!
//! What can go wrong, and who prevents it:
//! * old versions of items coming back: the read barrier and the two strikes
//!   (`forest`), negative entries until the commit is durable (`cache`);
//! * a commit that runs out of blocks half way: items are put in the tree in
//!   small batches while operations go on, so what is used up is known (`trans`);
//! * something reported durable that is not: the order of steps (`commit`);
//!   steps are retried until they succeed, and items are never put in the tree
//!   twice (`tree`).

mod bloom;
mod cache;
mod commit;
mod error;
mod forest;
mod items;
pub mod merge_worker;
mod trans;
mod tree;

#[cfg(test)]
mod tests;

pub use cache::CacheStats;
pub use error::{LogError, ServerError};
pub use trans::Hold;

use crate::block;
use crate::env::{BlockDevice, DeviceError, Duration, Env, LocalBoxFuture, Signal, Time};
use crate::format::{Key, KeyRange, LogTrees, NetRoots};
use cache::ItemCache;
use forest::Snapshot;
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use trans::Open;
use tree::Bloomed;

/// FREE choices of items and transactions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// An open transaction is committed at least this often.
    pub sync_delay: Duration,
    /// Pause between attempts after a failed commit.
    pub retry_delay: Duration,
    /// Bytes of items kept in memory; dirty ones may exceed it.
    pub cache_bytes: usize,
    /// Items of one page of the cache at most.
    pub page_items: usize,
    /// Dirty items that wait to be put in the log tree, as a fraction of an alloc
    /// list block: its capacity divided by this.
    pub pending_divisor: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            sync_delay: Duration::from_secs(10),
            retry_delay: Duration::from_secs(2),
            cache_bytes: 256 << 20,
            page_items: 64,
            pending_divisor: 16,
        }
    }
}

impl Policy {
    /// Small values for tests and simulated worlds.
    pub fn small() -> Self {
        Self {
            cache_bytes: 32 << 10,
            page_items: 4,
            pending_divisor: 32,
            ..Self::default()
        }
    }
}

/// The log's conversation with the server. Requests survive failovers; they end
/// when the server answered or the mount is severed.
pub trait Server {
    /// Opens the next transaction (spec 04 section 9).
    fn get_log_trees(&self) -> LocalBoxFuture<'static, Result<LogTrees, ServerError>>;
    /// Commits the open transaction (spec 04 section 10); done means durable.
    fn commit_log_trees(
        &self,
        trees: &LogTrees,
    ) -> LocalBoxFuture<'static, Result<(), ServerError>>;
    /// Roots of the last stable super block.
    fn get_roots(&self) -> LocalBoxFuture<'static, Result<NetRoots, ServerError>>;
    /// Greatest seq with no open transaction at or below it.
    fn get_last_seq(&self) -> LocalBoxFuture<'static, Result<u64, ServerError>>;
}

/// File data that a commit must have on the data device before it makes the
/// metadata that shows it durable (spec 04 section 6, steps 1 and 6).
pub trait DirtyData {
    /// Starts to write everything dirty. Called again by a retry: what an earlier
    /// attempt could not write is still dirty and is written again.
    fn start_writeback(&self);

    /// Completes when everything that was dirty at the last
    /// [`DirtyData::start_writeback`] is written.
    ///
    /// # Errors
    /// If a write failed since the last call. The data stays dirty: the error must
    /// come again until a later attempt wrote it.
    fn wait(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>>;

    /// Whether something was written that the device may still lose: a flush must
    /// succeed before the data can be called durable.
    fn needs_flush(&self) -> bool {
        true
    }

    /// What `wait` reported written was flushed too, or must be written again
    /// because the flush failed.
    fn flushed(&self, durable: bool) {
        let _ = durable;
    }
}

/// The life of a mount's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// Opening the first transaction, or running.
    Running,
    /// No new holds; one last commit.
    Ending,
    /// The last commit is done.
    Ended,
    /// Cut off; nothing is committed any more.
    Severed,
}

struct Inner {
    env: Env,
    blocks: Rc<block::Cache>,
    data_dev: Rc<dyn BlockDevice>,
    total_data_blocks: Cell<u64>,
    policy: Policy,
    server: Rc<dyn Server>,
    dirty_data: RefCell<Vec<Rc<dyn DirtyData>>>,

    cache: RefCell<ItemCache>,
    /// Counts commits after which older roots must not be read in (section 3.3).
    read_barrier: Cell<u64>,
    /// Roots in use, with the list of their log trees.
    snapshot: RefCell<Option<Rc<Snapshot>>>,
    /// Greatest refresh generation of any lock seen by a read.
    seen_gen: Cell<u64>,

    life: Cell<Life>,
    open: RefCell<Option<Rc<Open>>>,
    bloomed: RefCell<Bloomed>,
    holders: Cell<u32>,
    writing: Cell<bool>,
    triggered: Cell<bool>,
    /// The commit is durable and the next transaction is being opened.
    reopening: Cell<bool>,
    commits: Cell<u64>,
    deadline: Cell<Time>,
    /// Anything that a waiter may wait for has changed.
    changed: Signal,
    /// The last holder left, or the committer has something to do.
    wake_commit: Signal,
}

/// A transaction as it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransactionState {
    /// Seq of the open transaction; 0 before the first.
    pub seq: u64,
    /// Whether anybody has entered it.
    pub used: bool,
    /// Its dirty blocks.
    pub dirty_blocks: usize,
    /// Who has it held.
    pub holders: u32,
    /// Whether it is being committed.
    pub committing: bool,
    /// Commits that were completed.
    pub commits: u64,
}

/// A mount's items and transaction. Cheap to clone.
#[derive(Clone)]
pub struct Log {
    inner: Rc<Inner>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log")
            .field("life", &self.inner.life.get())
            .field("trans_seq", &self.trans_seq())
            .field("holders", &self.holders())
            .field("cache", &self.stats())
            .finish()
    }
}

impl Log {
    /// A log without an open transaction; [`Log::start`] opens the first.
    /// `data_dev` is flushed before commits; `total_data_blocks` are the volume's.
    pub fn new(
        env: Env,
        blocks: Rc<block::Cache>,
        data_dev: Rc<dyn BlockDevice>,
        total_data_blocks: u64,
        policy: Policy,
        server: Rc<dyn Server>,
    ) -> Self {
        assert!(policy.pending_divisor > 0, "pending_divisor is zero");
        let cache = ItemCache::new(policy.page_items);
        Self {
            inner: Rc::new(Inner {
                env,
                blocks,
                data_dev,
                total_data_blocks: Cell::new(total_data_blocks),
                policy,
                server,
                dirty_data: RefCell::default(),
                cache: RefCell::new(cache),
                read_barrier: Cell::new(0),
                snapshot: RefCell::default(),
                seen_gen: Cell::new(0),
                life: Cell::new(Life::Running),
                open: RefCell::default(),
                bloomed: RefCell::default(),
                holders: Cell::new(0),
                writing: Cell::new(true),
                triggered: Cell::new(false),
                reopening: Cell::new(false),
                commits: Cell::new(0),
                deadline: Cell::new(Time::default()),
                changed: Signal::default(),
                wake_commit: Signal::default(),
            }),
        }
    }

    /// Adds a holder of dirty file data that commits write out.
    pub fn register_dirty_data(&self, data: Rc<dyn DirtyData>) {
        self.inner.dirty_data.borrow_mut().push(data);
    }

    /// Sets the volume's data blocks after a resize.
    pub fn set_total_data_blocks(&self, total: u64) {
        self.inner.total_data_blocks.set(total);
    }

    /// Counters of the item cache.
    pub fn stats(&self) -> CacheStats {
        self.inner.cache.borrow().stats()
    }

    /// Ranges of keys that the item cache knows, and whether items in them are
    /// dirty. For checkers: each lies under a lock that this mount holds.
    pub fn cached_ranges(&self) -> Vec<(KeyRange, bool)> {
        self.inner.cache.borrow().ranges().collect()
    }

    /// The transaction as it stands, for status and for the simulator.
    pub fn transaction(&self) -> TransactionState {
        let inner = &*self.inner;
        let open = inner.open.borrow();
        TransactionState {
            seq: open.as_ref().map_or(0, |open| open.seq),
            used: open.as_ref().is_some_and(|open| open.is_used()),
            dirty_blocks: open.as_ref().map_or(0, |open| open.tx.dirty_blocks()),
            holders: inner.holders.get(),
            committing: open.is_some() && inner.writing.get(),
            commits: inner.commits.get(),
        }
    }

    /// Commits that were completed.
    pub fn commits(&self) -> u64 {
        self.inner.commits.get()
    }

    /// Whether anything dirty is cached in the range.
    pub fn has_dirty(&self, range: &KeyRange) -> bool {
        self.first_dirty(range).is_some()
    }

    /// The first dirty key in the range.
    pub fn first_dirty(&self, range: &KeyRange) -> Option<Key> {
        self.inner.cache.borrow().dirty_in(range)
    }

    /// Whether anything at all is cached in the range.
    pub fn has_cached(&self, range: &KeyRange) -> bool {
        self.inner.cache.borrow().has_any(range)
    }

    /// Drops everything cached in the range: its lock is given up. Dirty items
    /// were committed before, unless the mount is severed and loses them.
    ///
    /// # Panics
    /// If dirty items would be lost.
    pub fn invalidate(&self, range: &KeyRange) {
        if self.inner.life.get() != Life::Severed {
            let dirty = self.first_dirty(range);
            assert!(
                dirty.is_none(),
                "dirty item {dirty:?} in a lock that is given up"
            );
        }
        self.inner.cache.borrow_mut().invalidate(range);
    }

    /// Drops clean items until at most `bytes` are cached, as far as a bounded
    /// scan gets (memory pressure).
    pub fn reclaim(&self, bytes: usize) {
        self.inner.cache.borrow_mut().reclaim(bytes, None);
    }

    /// Checks the invariants of the item cache.
    ///
    /// # Panics
    /// If one is broken.
    pub fn assert_consistent(&self) {
        self.inner.cache.borrow().assert_consistent();
    }
}

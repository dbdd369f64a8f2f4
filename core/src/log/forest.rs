//! Reading the forest: fs_root and every log tree of one stable super (spec 04
//! section 13).
//!
//! Nothing keeps old versions alive for readers. A block that was reused fails
//! its reference; then everything read so far is thrown away and newer roots are
//! fetched. Roots that do not advance between two such failures mean corruption.
//!
//! What can go wrong: mixing two snapshots (loses deletions), and reading with
//! roots from before the lock was granted or before our own last commit (loses
//! what others or we wrote).

use super::cache::ReadItem;
use super::{Inner, Log, LogError, bloom};
use crate::block::StaleCheck;
use crate::btree;
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::{
    BlockRef, BtreeRoot, ITEM_FLAG_DELETION, Key, KeyRange, LogTrees, NetRoots, value_exact,
};
use crate::locks::LockGuard;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::rc::Rc;

/// One consistent version of all items.
#[derive(Debug)]
pub(super) struct Snapshot {
    roots: NetRoots,
    /// Locks granted up to this generation were granted before the roots were fetched.
    lock_gen: u64,
    /// Log trees with items, by rid and nr.
    trees: Vec<LogTree>,
}

#[derive(Clone, Copy, Debug)]
struct LogTree {
    bloom_ref: BlockRef,
    item_root: BtreeRoot,
}

/// The best version of a key so far.
struct Found {
    seq: u64,
    deletion: bool,
    value: Bytes,
}

/// Items by key, and the range they are complete in.
struct Around {
    items: BTreeMap<Key, Found>,
    range: KeyRange,
}

impl Around {
    /// The visible items of the final range.
    fn into_items(self) -> Vec<ReadItem> {
        let range = self.range;
        let valid = self.items.into_iter().filter(|(key, found)| {
            // Trees visited early were read with a wider range.
            range.contains(key) && !found.deletion
        });
        valid
            .map(|(key, found)| ReadItem {
                key,
                seq: found.seq,
                value: found.value,
            })
            .collect()
    }
}

impl Snapshot {
    fn refs(&self) -> [BlockRef; 2] {
        refs(&self.roots)
    }
}

/// The references that the two strikes rule compares.
fn refs(roots: &NetRoots) -> [BlockRef; 2] {
    [roots.fs_root.block_ref, roots.logs_root.block_ref]
}

impl Inner {
    /// Roots that are new enough for reads under locks granted up to `lock_gen`.
    async fn snapshot(
        &self,
        lock_gen: u64,
        stale: &mut StaleCheck,
    ) -> Result<Rc<Snapshot>, LogError> {
        loop {
            let have = self.snapshot.borrow().clone();
            if let Some(have) = have
                && lock_gen <= have.lock_gen
            {
                return Ok(have);
            }
            let (barrier, lock_gen) = (self.read_barrier.get(), self.seen_gen.get());
            let roots = self.server.get_roots().await?;
            let trees = match self.list_trees(&roots.logs_root).await {
                Ok(trees) => trees,
                Err(error) => {
                    self.retry_stale(error, refs(&roots), stale, &Key::ZEROS)?;
                    continue;
                }
            };
            let snapshot = Rc::new(Snapshot {
                roots,
                lock_gen,
                trees,
            });
            if barrier == self.read_barrier.get() {
                *self.snapshot.borrow_mut() = Some(snapshot.clone());
                return Ok(snapshot);
            }
            probe("log.roots_outrun");
        }
    }

    async fn list_trees(&self, logs_root: &BtreeRoot) -> Result<Vec<LogTree>, LogError> {
        let mut trees = Vec::new();
        let mut from = Key::log_trees(0, 0);
        while let Some(item) = btree::next(&self.blocks, logs_root, &from).await? {
            let record: LogTrees = value_exact("log_trees", &item.value).map_err(|error| {
                tracing::error!(key = %item.key, %error, "corrupt log_trees item");
                LogError::Server(Errno::EIO)
            })?;
            // No bloom block or no items: nothing to read (H3).
            if !record.bloom_ref.is_null() && !record.item_root.is_empty() {
                trees.push(LogTree {
                    bloom_ref: record.bloom_ref,
                    item_root: record.item_root,
                });
            }
            if item.key == Key::ONES {
                break;
            }
            from = item.key.inc();
        }
        Ok(trees)
    }

    /// After a failed read with the roots `used`: Ok to start over with newer
    /// roots, the error to give up.
    fn retry_stale(
        &self,
        error: LogError,
        used: [BlockRef; 2],
        stale: &mut StaleCheck,
        key: &Key,
    ) -> Result<(), LogError> {
        let mine = |have: &Rc<Snapshot>| have.refs() == used;
        let source = match error {
            LogError::Btree(source) if source.is_stale() => source,
            other => return Err(other),
        };
        if self.snapshot.borrow().as_ref().is_some_and(mine) {
            *self.snapshot.borrow_mut() = None;
        }
        if !stale.retry(used) {
            tracing::error!(%key, error = %source, "unreadable in two tries with the same roots");
            return Err(LogError::Corrupt { key: *key, source });
        }
        probe("log.stale_roots");
        Ok(())
    }

    /// All versions around `key` under one snapshot (section 13.2).
    async fn read_around(
        &self,
        snapshot: &Snapshot,
        key: &Key,
        lock: &KeyRange,
        around: &mut Around,
    ) -> Result<(), LogError> {
        let bits = bloom::bits_of(&lock.start);
        self.read_tree(&snapshot.roots.fs_root, key, around).await?;
        for tree in &snapshot.trees {
            if bloom::may_have(&self.blocks, &tree.bloom_ref, &bits).await? {
                self.read_tree(&tree.item_root, key, around).await?;
            } else {
                probe("log.bloom_skip");
            }
        }
        Ok(())
    }

    /// Adds the items of the leaf of `key` in one tree; the greatest seq wins,
    /// the tree read first among equals.
    async fn read_tree(
        &self,
        root: &BtreeRoot,
        key: &Key,
        around: &mut Around,
    ) -> Result<(), LogError> {
        if root.is_empty() {
            return Ok(());
        }
        let items = &mut around.items;
        let mut keep = |item: btree::ItemRef<'_>| {
            let old = items.get(&item.key);
            // Mutant: breaks spec 04 section 13.2, the greatest seq wins.
            let newer = |old: &Found| item.seq > old.seq && !mutant("first_tree_wins");
            if old.is_none_or(newer) {
                let found = Found {
                    seq: item.seq,
                    deletion: item.flags & ITEM_FLAG_DELETION != 0,
                    value: Bytes::copy_from_slice(item.value),
                };
                items.insert(item.key, found);
            }
        };
        Ok(btree::read_items(&self.blocks, root, key, &mut around.range, &mut keep).await?)
    }

    /// Makes the range around `key` known under a lock (section 3.3).
    ///
    /// # Errors
    /// Read errors, `Corrupt`, `Severed`.
    pub(super) async fn read_in(&self, guard: &LockGuard, key: &Key) -> Result<(), LogError> {
        let lock = guard.range();
        if !guard.mode().reads() {
            let cache = &mut *self.cache.borrow_mut();
            cache.insert_empty(key, &lock);
            cache.reclaim(self.policy.cache_bytes, Some(key));
            return Ok(());
        }
        let lock_gen = guard.refresh_gen();
        self.seen_gen.set(self.seen_gen.get().max(lock_gen));
        let mut stale = StaleCheck::new();
        let mut around = Around {
            items: BTreeMap::new(),
            range: lock,
        };
        loop {
            self.check_alive()?;
            let barrier = self.read_barrier.get();
            let snapshot = self.snapshot(lock_gen, &mut stale).await?;
            // Mutant: breaks spec 04 section 3.3, "discard all items collected so far".
            if !mutant("stale_keeps_items") {
                around.items.clear();
            }
            around.range = lock;
            if let Err(error) = self.read_around(&snapshot, key, &lock, &mut around).await {
                self.retry_stale(error, snapshot.refs(), &mut stale, key)?;
                continue;
            }
            self.env.spawner.yield_point("log.read_in").await;
            // Mutant: breaks the read barrier of spec 04 section 3.3.
            if barrier != self.read_barrier.get() && !mutant("read_barrier_skipped") {
                probe("log.read_barrier");
                continue;
            }
            let range = around.range;
            let cache = &mut *self.cache.borrow_mut();
            cache.insert_read(&range, around.into_items());
            cache.reclaim(self.policy.cache_bytes, Some(key));
            return Ok(());
        }
    }
}

impl Log {
    /// The smallest key at or after `key` with an item in any stable tree; only a
    /// hint for which lock to take next: it may be deleted, or too old to see
    /// (section 13.3).
    ///
    /// # Errors
    /// Read errors, `Corrupt`, `Severed`.
    pub async fn next_hint(&self, key: &Key) -> Result<Option<Key>, LogError> {
        let inner = &self.inner;
        let mut stale = StaleCheck::new();
        loop {
            inner.check_alive()?;
            let roots = inner.server.get_roots().await?;
            match self.first_in(&roots, key).await {
                Ok(first) => return Ok(first),
                Err(error) => inner.retry_stale(error, refs(&roots), &mut stale, key)?,
            }
        }
    }

    async fn first_in(&self, roots: &NetRoots, key: &Key) -> Result<Option<Key>, LogError> {
        let blocks = &self.inner.blocks;
        let mut first = None;
        let trees = self.inner.list_trees(&roots.logs_root).await?;
        let logs = trees.iter().map(|tree| &tree.item_root);
        for root in std::iter::once(&roots.fs_root).chain(logs) {
            let next = btree::next(blocks, root, key).await?.map(|item| item.key);
            first = match (first, next) {
                (Some(a), Some(b)) => Some(std::cmp::min::<Key>(a, b)),
                (a, b) => a.or(b),
            };
        }
        Ok(first)
    }

    /// Greatest seq with no open transaction at or below it, from the server.
    ///
    /// # Errors
    /// `Severed`, `Server`.
    pub async fn get_last_seq(&self) -> Result<u64, LogError> {
        Ok(self.inner.server.get_last_seq().await?)
    }
}

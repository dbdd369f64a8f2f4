//! The common recipe of every modifying operation (spec 12 sections 6 and 9):
//! the cluster locks of the inodes, then the index locks for the seqs that the
//! inodes will get, then the transaction; and a journal that undoes what was done
//! if the operation fails half way.
//!
//! ```text
//! let mut locked = fs.lock_inodes(&[ino], Mode::Write).await?; // 3 cluster locks
//! let _local = fs.local.alone(ino).await;                    // 1 node-local
//! let mut inode = fs.load(&locked, ino).await?;
//! let mut change = fs.change(&locked, &[inode.touch(true)], true).await?; // 7, 8
//! inode.size = 7;
//! let done = change.put_inode(&mut inode, true).await;
//! change.finish(done).await?;                                  // or undone
//! ```
//!
//! What can go wrong: waiting for a cluster lock while the transaction is held.
//! So all locks are had before [`Fs::change`] returns, and nothing in [`Change`]
//! takes one. A future that is inside a change must be run to its end: dropping
//! it leaves a half-done operation in the transaction.

use super::Fs;
use super::api::Ino;
use super::error::{FsError, FsResult};
use super::inode::Inode;
use super::table::group_of;
use super::xattr::Stored;
use crate::env::{mutant, probe};
use crate::format::{Key, XattrTotlVal};
use crate::locks::{LockGuard, Mode, Scope};
use crate::log::Hold;
use bytes::Bytes;

/// The cluster locks of one operation: inode groups, and zones taken after them.
#[derive(Debug, Default)]
pub struct Locked {
    guards: Vec<LockGuard>,
}

impl Locked {
    /// The lock that covers an inode's items.
    ///
    /// # Panics
    /// If the operation did not take it.
    pub fn of(&self, ino: Ino) -> &LockGuard {
        self.scope(Scope::InodeGroup(group_of(ino)))
    }

    /// The lock of a scope in its normal form.
    ///
    /// # Panics
    /// If the operation did not take it.
    pub fn scope(&self, scope: Scope) -> &LockGuard {
        let found = self.guards.iter().find(|guard| guard.scope() == scope);
        found.unwrap_or_else(|| panic!("the operation did not lock {scope:?}"))
    }

    /// The lock order of spec 10 section 12, which is the order of scopes. That no
    /// lock is waited for inside the transaction the borrow of [`Change`] sees to.
    fn allows(&self, scope: Scope) {
        let scope = scope.normal();
        let ascends = self.guards.last().is_none_or(|last| last.scope() < scope);
        assert!(ascends, "{scope:?} is locked after {:?}", self.guards);
    }

    /// Adds a lock that is already had.
    pub fn push(&mut self, guard: LockGuard) {
        self.guards.push(guard);
    }
}

/// What a change will do to one inode's index items.
#[derive(Clone, Copy, Debug)]
pub struct Touch {
    meta_seq: Option<u64>,
    data_seq: Option<u64>,
    sets_data: bool,
    deletes: bool,
}

impl Touch {
    /// A new inode: index items are only added.
    pub fn new_inode(is_reg: bool) -> Self {
        Touch {
            meta_seq: None,
            data_seq: None,
            sets_data: is_reg,
            deletes: false,
        }
    }
}

impl Inode {
    /// An update of this inode; `sets_data` if its data_seq moves too.
    pub fn touch(&self, sets_data: bool) -> Touch {
        Touch {
            meta_seq: Some(self.meta_seq),
            data_seq: self.is_reg().then_some(self.data_seq),
            sets_data: sets_data && self.is_reg(),
            deletes: false,
        }
    }

    /// Final deletion of this inode: its index items go.
    pub fn touch_delete(&self) -> Touch {
        Touch {
            meta_seq: Some(self.meta_seq),
            data_seq: self.is_reg().then_some(self.data_seq),
            sets_data: false,
            deletes: true,
        }
    }
}

enum Undo {
    Created(Key),
    Deleted(Key, Bytes),
    Updated(Key, Bytes),
    Forced {
        key: Key,
        primary: Ino,
        created: bool,
    },
    Delta(Key, u64, u64),
    Count(i64),
    Allocated {
        blkno: u64,
        count: u64,
    },
}

/// An operation inside the transaction. End it with [`Change::finish`].
pub struct Change<'a> {
    fs: &'a Fs,
    locked: &'a Locked,
    undo: Vec<Undo>,
    /// Data blocks to free if the operation succeeds: a free can not be undone.
    frees: Vec<(u64, u64)>,
    seq: u64,
    /// Released before the index locks are: fields are dropped in this order.
    hold: Hold,
    index: Vec<LockGuard>,
}

impl Fs {
    /// Takes the group locks of inodes in ascending order, each group once. For
    /// an operation that has no cluster lock yet.
    ///
    /// # Errors
    /// [`FsError::Lock`] if the mount is cut off or ending.
    pub async fn lock_inodes(&self, inos: &[Ino], mode: Mode) -> FsResult<Locked> {
        let mut locked = Locked {
            guards: Vec::with_capacity(4),
        };
        self.lock_inodes_after(&mut locked, inos, mode).await?;
        Ok(locked)
    }

    /// As [`Fs::lock_inodes`], after the locks that the operation has already
    /// (the rename lock).
    ///
    /// # Errors
    /// As [`Fs::lock_inodes`].
    pub async fn lock_inodes_after(
        &self,
        locked: &mut Locked,
        inos: &[Ino],
        mode: Mode,
    ) -> FsResult<()> {
        let mut groups = [0; 4];
        assert!(
            inos.len() <= groups.len(),
            "no operation has more than four inodes"
        );
        let groups = &mut groups[..inos.len()];
        for (group, ino) in groups.iter_mut().zip(inos) {
            *group = group_of(*ino);
        }
        groups.sort_unstable();
        let mut last = None;
        for &mut group in groups {
            if last == Some(group) {
                continue;
            }
            last = Some(group);
            let scope = Scope::InodeGroup(group);
            locked.allows(scope);
            let guard = if locked.guards.is_empty() {
                self.locks.lock_first(scope, mode).await?
            } else {
                self.locks.lock(scope, mode).await?
            };
            locked.guards.push(guard);
        }
        Ok(())
    }

    /// Adds the group lock of one more inode if its mode is at hand. Waits for nothing,
    /// so the order of locks does not matter; no operation that changes anything may
    /// use it.
    pub fn try_lock_inode(&self, locked: &mut Locked, ino: Ino, mode: Mode) -> bool {
        let scope = Scope::InodeGroup(group_of(ino));
        if locked.guards.iter().any(|guard| guard.scope() == scope) {
            return true;
        }
        let guard = self.locks.try_lock(scope, mode);
        let taken = guard.is_some();
        locked.guards.extend(guard);
        taken
    }

    /// Takes a zone lock (orphans, totl, indx, rename) after the ones already had.
    ///
    /// # Errors
    /// As [`Fs::lock_inodes`].
    pub async fn lock_zone(&self, locked: &mut Locked, scope: Scope, mode: Mode) -> FsResult<()> {
        locked.allows(scope);
        let guard = self.locks.lock(scope, mode).await?;
        locked.guards.push(guard);
        Ok(())
    }

    /// Reads an inode item under its lock.
    ///
    /// # Errors
    /// [`FsError::Gone`] if there is none.
    pub async fn load(&self, locked: &Locked, ino: Ino) -> FsResult<Inode> {
        self.load_under(locked.of(ino), ino).await
    }

    /// Reads an inode item under one lock.
    ///
    /// # Errors
    /// [`FsError::Gone`] if there is none.
    pub async fn load_under(&self, guard: &LockGuard, ino: Ino) -> FsResult<Inode> {
        let value = self.log.lookup(guard, &Key::inode(ino)).await?;
        let value = value.ok_or(FsError::Gone(ino))?;
        let mut inode = Inode::decode(ino, &value, self.config.fmt_vers)?;
        inode.stored = Some(value);
        if let Some(seen) = self.table.atime(ino) {
            inode.atime = seen;
        }
        Ok(inode)
    }

    /// Takes the index locks for the inodes to be touched and enters the
    /// transaction; starts over if the transaction changed in between. `allocating`
    /// operations get ENOSPC when metadata runs low, the others must work then.
    ///
    /// # Errors
    /// ENOSPC, or the mount was cut off.
    pub async fn change<'a>(
        &'a self,
        locked: &'a Locked,
        touched: &[Touch],
        allocating: bool,
    ) -> FsResult<Change<'a>> {
        // Operations of several changes, as a truncate is, meet commits in between;
        // and holds of several tasks exist at once.
        self.env.spawner.yield_point("fs.change").await;
        loop {
            let seq = self.log.trans_seq();
            let index = self.lock_index(touched, seq).await?;
            let hold = self.log.hold(allocating).await?;
            self.env.spawner.yield_point("fs.held").await;
            if self.log.trans_seq() == seq {
                return Ok(Change {
                    fs: self,
                    locked,
                    undo: Vec::new(),
                    frees: Vec::new(),
                    seq,
                    hold,
                    index,
                });
            }
            probe("fs.index_lock_retry");
        }
    }

    async fn lock_index(&self, touched: &[Touch], seq: u64) -> FsResult<Vec<LockGuard>> {
        let mut scopes: Vec<Scope> = Vec::with_capacity(touched.len() * 4);
        let mut add = |scope: Scope| {
            let scope = scope.normal();
            if !scopes.contains(&scope) {
                scopes.push(scope);
            }
        };
        for touch in touched {
            let sets_meta = !touch.deletes && touch.meta_seq != Some(seq);
            let sets_data = touch.sets_data && touch.data_seq != Some(seq);
            if sets_meta {
                add(Scope::MetaSeq(seq));
            }
            if sets_data {
                add(Scope::DataSeq(seq));
            }
            if let (true, Some(old)) = (sets_meta || touch.deletes, touch.meta_seq) {
                add(Scope::MetaSeq(old));
            }
            if let (true, Some(old)) = (sets_data || touch.deletes, touch.data_seq) {
                add(Scope::DataSeq(old));
            }
        }
        // Scope orders all meta_seq groups before all data_seq groups, as keys do.
        scopes.sort_unstable();
        let mut guards = Vec::with_capacity(scopes.len());
        for scope in scopes {
            guards.push(self.locks.lock(scope, Mode::WriteOnly).await?);
        }
        Ok(guards)
    }
}

impl<'a> Change<'a> {
    /// Seq of the transaction it is part of.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// The transaction hold, for data allocation.
    pub fn hold(&self) -> &Hold {
        &self.hold
    }

    /// The cluster locks of the operation.
    pub fn locked(&self) -> &'a Locked {
        self.locked
    }

    /// An xattr with all its parts.
    pub(super) async fn stored(&self, ino: Ino, name: &[u8]) -> FsResult<Option<Stored>> {
        self.fs.stored(self.locked, ino, name).await
    }

    fn covering(&self, key: &Key) -> &LockGuard {
        let scope = Scope::covering(key).expect("a filesystem item's key");
        let in_index = self.index.iter().find(|guard| guard.scope() == scope);
        in_index.unwrap_or_else(|| self.locked.scope(scope))
    }

    /// Creates an item that must not exist.
    ///
    /// # Errors
    /// EIO if it exists, or the item cache failed.
    pub async fn create(&mut self, key: Key, value: impl Into<Bytes>) -> FsResult<()> {
        self.fs
            .log
            .create(&self.hold, self.covering(&key), &key, value.into())
            .await?;
        self.undo.push(Undo::Created(key));
        Ok(())
    }

    /// Replaces an item's value; `old` is its value now.
    ///
    /// # Errors
    /// EIO if it does not exist, or the item cache failed.
    pub async fn update(&mut self, key: Key, value: impl Into<Bytes>, old: Bytes) -> FsResult<()> {
        self.fs
            .log
            .update(&self.hold, self.covering(&key), &key, value.into())
            .await?;
        self.undo.push(Undo::Updated(key, old));
        Ok(())
    }

    /// Deletes an item; `old` is its value.
    ///
    /// # Errors
    /// EIO if it does not exist, or the item cache failed.
    pub async fn delete(&mut self, key: Key, old: Bytes) -> FsResult<()> {
        self.fs
            .log
            .delete(&self.hold, self.covering(&key), &key)
            .await?;
        self.undo.push(Undo::Deleted(key, old));
        Ok(())
    }

    /// Creates or deletes an item under a WRITE_ONLY lock without reading; `primary`
    /// is the inode whose WRITE lock gives the right to do so.
    ///
    /// # Errors
    /// If the item cache failed.
    pub async fn force(&mut self, key: Key, primary: Ino, create: bool) -> FsResult<()> {
        self.forced(&key, primary, create).await?;
        self.undo.push(Undo::Forced {
            key,
            primary,
            created: create,
        });
        Ok(())
    }

    async fn forced(&self, key: &Key, primary: Ino, create: bool) -> FsResult<()> {
        let (guard, primary) = (self.covering(key), Some(self.locked.of(primary)));
        let log = &self.fs.log;
        if create {
            log.create_force(&self.hold, guard, key, Bytes::new(), primary)
                .await?;
        } else {
            log.delete_force(&self.hold, guard, key, primary).await?;
        }
        Ok(())
    }

    /// Adds to a total (spec 13 section 12); nothing if both are 0.
    ///
    /// # Errors
    /// If the item cache failed.
    pub async fn add_total(&mut self, key: Key, total: u64, count: u64) -> FsResult<()> {
        if total == 0 && count == 0 {
            return Ok(());
        }
        self.delta(&key, total, count).await?;
        self.undo.push(Undo::Delta(key, total, count));
        Ok(())
    }

    async fn delta(&self, key: &Key, total: u64, count: u64) -> FsResult<()> {
        let value = XattrTotlVal {
            total: total.into(),
            count: count.into(),
        };
        let value = Bytes::copy_from_slice(zerocopy::IntoBytes::as_bytes(&value));
        self.fs
            .log
            .delta(&self.hold, self.covering(key), key, value)
            .await?;
        Ok(())
    }

    /// Counts inodes for statfs.
    pub fn count_inodes(&mut self, by: i64) {
        self.fs.log.inode_count_add(&self.hold, by);
        self.undo.push(Undo::Count(by));
    }

    /// Notes data blocks that were allocated and are in use now: an undo frees them.
    pub(super) fn allocated(&mut self, blkno: u64, count: u64) {
        self.undo.push(Undo::Allocated { blkno, count });
    }

    /// Frees data blocks at the end of the operation, if it succeeds.
    pub(super) fn free_later(&mut self, blkno: u64, count: u64) {
        self.frees.push((blkno, count));
    }

    /// Creates the item and index items of a new inode, whose seqs are set.
    ///
    /// # Errors
    /// If the item cache failed.
    pub async fn create_inode(&mut self, inode: &mut Inode) -> FsResult<()> {
        inode.meta_seq = self.seq;
        inode.data_seq = self.seq;
        let value = self.encode(inode);
        self.create(Key::inode(inode.ino), value.clone()).await?;
        inode.stored = Some(value);
        self.force(Key::meta_seq(self.seq, inode.ino), inode.ino, true)
            .await?;
        if inode.is_reg() {
            self.force(Key::data_seq(self.seq, inode.ino), inode.ino, true)
                .await?;
        }
        Ok(())
    }

    /// Writes a changed inode that was loaded under its lock: sets its meta_seq,
    /// its data_seq too with `data`, moves the index items, updates the item.
    ///
    /// # Errors
    /// If the item cache failed.
    pub async fn put_inode(&mut self, inode: &mut Inode, data: bool) -> FsResult<()> {
        self.index_inode(inode, data).await?;
        self.store_inode(inode).await
    }

    /// [`Change::put_inode`] for several that change together. Whoever asks for
    /// attributes waits for nobody, so the inodes come last, with nothing to wait
    /// for between them.
    ///
    /// # Errors
    /// If the item cache failed.
    pub async fn put_inodes(
        &mut self,
        inodes: impl IntoIterator<Item = &mut Inode>,
    ) -> FsResult<()> {
        let mut inodes: Vec<&mut Inode> = inodes.into_iter().collect();
        for inode in &mut inodes {
            self.index_inode(inode, false).await?;
        }
        for inode in &mut inodes {
            self.store_inode(inode).await?;
        }
        Ok(())
    }

    async fn store_inode(&mut self, inode: &mut Inode) -> FsResult<()> {
        let value = self.encode(inode);
        let old = inode.stored.clone().expect("the inode was loaded");
        self.update(Key::inode(inode.ino), value.clone(), old)
            .await?;
        inode.stored = Some(value);
        Ok(())
    }

    /// Sets the seqs of an inode and moves its index items.
    async fn index_inode(&mut self, inode: &mut Inode, data: bool) -> FsResult<()> {
        let (old_meta, old_data) = (inode.meta_seq, inode.data_seq);
        inode.meta_seq = self.seq;
        if data {
            inode.data_seq = self.seq;
        }
        if old_meta != self.seq {
            self.force(Key::meta_seq(self.seq, inode.ino), inode.ino, true)
                .await?;
            // Mutant: breaks spec 12 section 5, one meta_seq item for each inode.
            if !mutant("old_index_item_kept") {
                self.force(Key::meta_seq(old_meta, inode.ino), inode.ino, false)
                    .await?;
            }
        }
        if inode.is_reg() && old_data != inode.data_seq {
            self.force(Key::data_seq(self.seq, inode.ino), inode.ino, true)
                .await?;
            self.force(Key::data_seq(old_data, inode.ino), inode.ino, false)
                .await?;
        }
        Ok(())
    }

    /// Deletes the item and the index items of an inode.
    ///
    /// # Errors
    /// If the item cache failed.
    pub async fn delete_inode(&mut self, inode: &Inode) -> FsResult<()> {
        self.force(Key::meta_seq(inode.meta_seq, inode.ino), inode.ino, false)
            .await?;
        if inode.is_reg() {
            self.force(Key::data_seq(inode.data_seq, inode.ino), inode.ino, false)
                .await?;
        }
        let old = inode.stored.clone().expect("the inode was loaded");
        self.delete(Key::inode(inode.ino), old).await
    }

    fn encode(&self, inode: &Inode) -> Bytes {
        Bytes::copy_from_slice(inode.encode().to_value(self.fs.config.fmt_vers))
    }

    /// Ends the change: keeps it if `done` is a success, else undoes it. The
    /// transaction and the index locks are released either way.
    ///
    /// # Errors
    /// The one given.
    pub async fn finish<T>(mut self, done: FsResult<T>) -> FsResult<T> {
        let done = match done {
            Ok(value) => self.free_data().await.map(|()| value),
            failed => failed,
        };
        if done.is_err() {
            self.undo().await;
        }
        done
    }

    /// Frees what the operation gave up. Once something is freed there is no way
    /// back: what can not be freed after that is lost space, not a failure.
    async fn free_data(&mut self) -> FsResult<()> {
        let mut any = false;
        for (blkno, count) in std::mem::take(&mut self.frees) {
            match self.fs.log.free_data(&self.hold, blkno, count).await {
                Ok(()) => any = true,
                Err(error) if !any => return Err(error.into()),
                Err(error) => {
                    probe("fs.blocks_lost");
                    tracing::error!(blkno, count, %error, "data blocks could not be freed");
                }
            }
        }
        Ok(())
    }

    /// Takes back everything done so far, last first.
    async fn undo(&mut self) {
        probe("fs.undo");
        while let Some(step) = self.undo.pop() {
            let done = match &step {
                Undo::Created(key) => self.undo_created(key).await,
                Undo::Deleted(key, old) => self.undo_deleted(key, old).await,
                Undo::Updated(key, old) => self.undo_updated(key, old).await,
                Undo::Forced {
                    key,
                    primary,
                    created,
                } => self.forced(key, *primary, !created).await,
                Undo::Delta(key, total, count) => {
                    self.delta(key, total.wrapping_neg(), count.wrapping_neg())
                        .await
                }
                Undo::Allocated { blkno, count } => {
                    let freed = self.fs.log.free_data(&self.hold, *blkno, *count).await;
                    freed.map_err(FsError::from)
                }
                Undo::Count(by) => {
                    self.fs.log.inode_count_add(&self.hold, -by);
                    Ok(())
                }
            };
            if let Err(error) = done {
                // Only a mount that is cut off gets here: its transaction is
                // thrown away whole.
                tracing::error!(%error, "an operation could not be undone");
            }
        }
    }

    async fn undo_created(&self, key: &Key) -> FsResult<()> {
        Ok(self
            .fs
            .log
            .delete(&self.hold, self.covering(key), key)
            .await?)
    }

    async fn undo_deleted(&self, key: &Key, old: &Bytes) -> FsResult<()> {
        Ok(self
            .fs
            .log
            .create(&self.hold, self.covering(key), key, old.clone())
            .await?)
    }

    async fn undo_updated(&self, key: &Key, old: &Bytes) -> FsResult<()> {
        Ok(self
            .fs
            .log
            .update(&self.hold, self.covering(key), key, old.clone())
            .await?)
    }
}

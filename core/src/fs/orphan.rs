//! Final deletion of inodes without names, and the scan that finds those that
//! nobody deleted (spec 11 sections 3 to 8).
//!
//! What can go wrong: deleting an inode that somebody has open, and deleting one
//! twice. An inode is deleted only under its group's WRITE lock, when its link
//! count is 0 and its bit is clear on every mount; one task of a mount at a time
//! tries; and the inode item is read again before anything is removed.

use super::Fs;
use super::api::Ino;
use super::change::Locked;
use super::error::{FsError, FsResult};
use super::inode::Inode;
use super::table::group_of;
use crate::env::{Duration, Either, HashMap, HashSet, mutant, probe, race};
use crate::format::{Key, OpenInoMap, OpenInoMapArgs, TYPE_ORPHAN, ZONE_ORPHAN};
use crate::locks::omap::{group_and_bit, has_bit};
use crate::locks::{LockGuard, Mode, Scope};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// First inode that can be an orphan.
const FIRST: Ino = 2;

/// What this mount knows about deletions.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    /// Inodes that a task of this mount deletes now.
    trying: RefCell<HashSet<Ino>>,
    /// Other mounts' bits of a group, good for one WRITE grant (its write seq).
    maps: RefCell<HashMap<Ino, (u64, Rc<OpenInoMap>)>>,
    counters: Counters,
}

/// Counters that tests and operators read (spec 11 section 8).
#[derive(Debug, Default)]
pub struct Counters {
    /// Scans started.
    pub scan: Cell<u64>,
    /// Orphan items seen by scans.
    pub scan_item: Cell<u64>,
    /// ... of inodes open here.
    pub scan_cached: Cell<u64>,
    /// ... of inodes open on another mount.
    pub scan_omap_set: Cell<u64>,
    /// ... that were tried.
    pub scan_attempts: Cell<u64>,
    /// Scans that ended in an error.
    pub scan_error: Cell<u64>,
    /// Scans that found nothing left to do.
    pub scan_empty: Cell<u64>,
    /// Inodes deleted.
    pub inode_deleted: Cell<u64>,
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

/// What an attempt to delete came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// There is nothing left of it.
    Gone,
    /// Somebody uses it, or it has a name again.
    Later,
}

struct Trying<'a> {
    orphans: &'a Orphans,
    ino: Ino,
}

impl Orphans {
    /// `None` if another task is at it. Only who set the mark clears it.
    fn try_mark(&self, ino: Ino) -> Option<Trying<'_>> {
        self.trying
            .borrow_mut()
            .insert(ino)
            .then_some(Trying { orphans: self, ino })
    }

    /// Forgets the other mounts' bits: the grant they were good for ends.
    pub fn revoke(&self, group: Ino) {
        self.maps.borrow_mut().remove(&group_of(group));
    }
}

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        self.orphans.trying.borrow_mut().remove(&self.ino);
    }
}

impl Fs {
    /// Counters of deletions and scans.
    pub fn orphan_counters(&self) -> &Counters {
        &self.orphans.counters
    }

    /// Deletes an inode that has lost its last name, if nobody has it open; else
    /// the last close, or a scan, will. Call without locks.
    pub(super) async fn delete_if_unused(&self, ino: Ino) {
        // Mutant: breaks spec 11 section 5, an open inode is not deleted.
        if self.table.is_open(ino) && !mutant("open_inode_deleted") {
            return;
        }
        match self.try_delete(ino).await {
            Ok(Attempt::Gone) => {}
            Ok(Attempt::Later) => probe("fs.delete_later"),
            Err(error) => {
                probe("fs.delete_failed");
                tracing::warn!(ino, %error, "an inode is left to the orphan scan");
            }
        }
    }

    /// After the last close: deletes the inode if it has no names, and if that is
    /// known without waiting for another node.
    pub(super) async fn evict(&self, ino: Ino) {
        let Some(guard) = self.locks.try_lock(Scope::InodeGroup(ino), Mode::Read) else {
            probe("fs.evict_uncovered");
            return;
        };
        let unlinked = matches!(self.load_under(&guard, ino).await, Ok(inode) if inode.nlink == 0);
        drop(guard);
        if unlinked {
            self.delete_if_unused(ino).await;
        }
    }

    async fn try_delete(&self, ino: Ino) -> FsResult<Attempt> {
        let mut locked = self.lock_inodes(&[ino], Mode::Write).await?;
        let _local = self.local.alone(ino).await;
        let others = self.others_open(locked.of(ino)).await?;
        let Some(_trying) = self.orphans.try_mark(ino) else {
            return Ok(Attempt::Later);
        };
        let open = self.table.is_open(ino) && !mutant("open_inode_deleted");
        if open || has_bit(&others, group_and_bit(ino).1) {
            return Ok(Attempt::Later);
        }
        let mut inode = match self.load(&locked, ino).await {
            Ok(inode) if inode.nlink == 0 => inode,
            Ok(_) => return Ok(Attempt::Later),
            Err(FsError::Gone(_)) => return Ok(Attempt::Gone),
            Err(error) => return Err(error),
        };
        self.lock_zone(&mut locked, Scope::Orphans, Mode::WriteOnly)
            .await?;
        if inode.is_reg() {
            self.data_free_all(&locked, &mut inode).await?;
        }
        if inode.next_xattr_id != 0 {
            self.delete_xattrs(&locked, ino).await?;
        }
        self.delete_last(&locked, ino).await?;
        self.table.prune(ino);
        count(&self.orphans.counters.inode_deleted);
        Ok(Attempt::Gone)
    }

    /// Index items, symlink pieces, inode and orphan item go together.
    async fn delete_last(&self, locked: &Locked, ino: Ino) -> FsResult<()> {
        // Earlier steps may have stored the inode.
        let inode = self.load(locked, ino).await?;
        let pieces = self.symlink_pieces(locked.of(ino), &inode).await?;
        let mut change = self.change(locked, &[inode.touch_delete()], false).await?;
        let done = async {
            for (key, value) in pieces {
                change.delete(key, value).await?;
            }
            change.delete_inode(&inode).await?;
            change.force(Key::orphan(ino), ino, false).await?;
            change.count_inodes(if mutant("orphan_deleted_twice") {
                -2
            } else {
                -1
            });
            Ok(())
        }
        .await;
        change.finish(done).await
    }

    async fn symlink_pieces(
        &self,
        guard: &LockGuard,
        inode: &Inode,
    ) -> FsResult<Vec<(Key, Bytes)>> {
        let mut pieces = Vec::new();
        if !inode.is_symlink() {
            return Ok(pieces);
        }
        let last = Key::symlink(inode.ino, u64::MAX);
        let mut key = Key::symlink(inode.ino, 0);
        while let Some((at, value)) = self.log.next(guard, &key, &last).await? {
            pieces.push((at, value));
            if at == last {
                break;
            }
            key = at.inc();
        }
        Ok(pieces)
    }

    /// Other mounts' bits of the group whose WRITE lock is held; asked once per
    /// grant, since nobody can set one while it lasts (spec 11 section 5).
    async fn others_open(&self, guard: &LockGuard) -> FsResult<Rc<OpenInoMap>> {
        let Scope::InodeGroup(group) = guard.scope() else {
            unreachable!("the lock of an inode group")
        };
        let write_seq = guard.write_seq();
        if let Some((seq, map)) = self.orphans.maps.borrow().get(&group)
            && *seq == write_seq
        {
            return Ok(map.clone());
        }
        let map = Rc::new(self.ask_open(group).await?);
        self.orphans
            .maps
            .borrow_mut()
            .insert(group, (write_seq, map.clone()));
        Ok(map)
    }

    async fn ask_open(&self, ino: Ino) -> FsResult<OpenInoMap> {
        let (group_nr, _) = group_and_bit(ino);
        let args = OpenInoMapArgs {
            group_nr: group_nr.into(),
            req_id: 0.into(),
        };
        self.server
            .open_ino_map(args)
            .await
            .map_err(FsError::Server)
    }

    /// Scans for orphans until the filesystem is stopped.
    pub(super) async fn scan_orphans_forever(&self) {
        loop {
            let delay = self.config.policy.orphan_scan_delay;
            let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX / 2);
            let low = micros / 5 * 4;
            let wait = self.env.entropy.range(low, low + micros / 5 * 2 + 1);
            let sleep = self.env.sleep(Duration::from_micros(wait));
            if let Either::Left(()) = race(self.stopped.wait(), sleep).await {
                return;
            }
            self.scan_orphans().await;
            self.table.prune_idle();
        }
    }

    /// One scan; true if nothing is left to do.
    pub async fn scan_orphans(&self) -> bool {
        let counters = &self.orphans.counters;
        count(&counters.scan);
        match self.scan_once().await {
            Ok(done) => {
                if done {
                    count(&counters.scan_empty);
                }
                done
            }
            Err(error) => {
                count(&counters.scan_error);
                tracing::debug!(%error, "an orphan scan ended early");
                false
            }
        }
    }

    async fn scan_once(&self) -> FsResult<bool> {
        let counters = &self.orphans.counters;
        let mut done = true;
        let mut map: Option<(Ino, OpenInoMap)> = None;
        let mut ino = FIRST;
        while let Some(key) = self.log.next_hint(&Key::orphan(ino)).await? {
            if key.zone != ZONE_ORPHAN || key.kind != TYPE_ORPHAN {
                break;
            }
            if self.stopped.is_open() {
                return Ok(false);
            }
            let orphan = key.second;
            count(&counters.scan_item);
            if self.table.is_open(orphan) {
                count(&counters.scan_cached);
                done = false;
            } else {
                let group = group_of(orphan);
                if map.as_ref().is_none_or(|(of, _)| *of != group) {
                    map = Some((group, self.ask_open(group).await?));
                }
                let open = map
                    .as_ref()
                    .is_some_and(|(_, m)| has_bit(m, group_and_bit(orphan).1));
                if open {
                    count(&counters.scan_omap_set);
                    done = false;
                } else {
                    count(&counters.scan_attempts);
                    done &= self.try_delete(orphan).await? == Attempt::Gone;
                }
            }
            let Some(next) = orphan.checked_add(1) else {
                break;
            };
            ino = next;
        }
        Ok(done)
    }
}

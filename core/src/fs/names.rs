//! Directory entries and lookup (spec 12 sections 8, 10, 18 and 19).
//!
//! An entry is three items with one value: by name hash, by position, and by the
//! inode it names. They are added and removed together.
//!
//! What can go wrong: believing a lookup after its lock was released. Every
//! modifying operation looks the name up again under its WRITE locks.

use super::Fs;
use super::api::{Entry, Ino};
use super::change::Change;
use super::error::{FsError, FsResult};
use super::inode::Inode;
use crate::env::{Duration, mutant, probe};
use crate::errno::Errno;
use crate::format::{self, Dirent, Key, NAME_MAX, ROOT_INO};
use crate::locks::{LockGuard, Mode};
use bytes::Bytes;

/// Walks that the volume's shape cannot explain end after so many steps.
const DEPTH_MAX: usize = 1 << 20;
/// A path that keeps changing is given up after so many attempts.
const PATH_ATTEMPTS: usize = 10;
/// A name whose inode vanishes under each lookup is given up after so many.
const LOOKUP_ATTEMPTS: usize = 100;

/// A directory entry as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Inode named.
    pub ino: Ino,
    /// Hash of the name, as stored.
    pub hash: u64,
    /// Position in the directory.
    pub pos: u64,
    /// `format::DT_*`.
    pub kind: u8,
    /// The value of its three items.
    pub value: Bytes,
}

impl Found {
    pub(super) fn parse(key: &Key, value: Bytes) -> FsResult<Self> {
        let (head, _) =
            Dirent::from_value(&value).map_err(|error| FsError::Value { key: *key, error })?;
        Ok(Self {
            ino: head.ino.get(),
            hash: head.hash.get(),
            pos: head.pos.get(),
            kind: head.kind,
            value,
        })
    }

    /// The name.
    pub fn name(&self) -> Bytes {
        self.value.slice(size_of::<Dirent>()..)
    }

    /// Whether it names a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == format::DT_DIR
    }
}

/// Refuses names that no directory can hold.
pub(super) fn check_name(name: &[u8]) -> FsResult<()> {
    if name.len() > NAME_MAX {
        return Err(Errno::ENAMETOOLONG.into());
    }
    if name.is_empty() {
        return Err(Errno::ENOENT.into());
    }
    if name == b"." || name == b".." || name.iter().any(|&b| b == 0 || b == b'/') {
        return Err(Errno::EINVAL.into());
    }
    Ok(())
}

/// Refuses a parent that is no directory, or was removed.
pub(super) fn check_dir(dir: &Inode) -> FsResult<()> {
    if !dir.is_dir() {
        return Err(Errno::ENOTDIR.into());
    }
    if dir.nlink == 0 {
        probe("fs.removed_parent");
        return Err(Errno::ENOENT.into());
    }
    Ok(())
}

impl Fs {
    /// Looks a name up in a directory, under the directory's lock.
    ///
    /// # Errors
    /// EIO on a malformed entry.
    pub(super) async fn find_entry(
        &self,
        guard: &LockGuard,
        dir: Ino,
        name: &[u8],
    ) -> FsResult<Option<Found>> {
        let hash = format::dirent_hash(name);
        let last = Key::dirent(dir, hash, u64::MAX);
        let mut key = Key::dirent(dir, hash, 0);
        while let Some((at, value)) = self.log.next(guard, &key, &last).await? {
            let found = Found::parse(&at, value)?;
            if found.value[size_of::<Dirent>()..] == *name {
                return Ok(Some(found));
            }
            probe("fs.name_hash_collision");
            if at == last {
                break;
            }
            key = at.inc();
        }
        Ok(None)
    }

    /// Looks a name up, taking and dropping the directory's locks: a hint for
    /// which inodes to lock.
    ///
    /// # Errors
    /// ENOTDIR, ESTALE if the directory is gone.
    pub(super) async fn peek(&self, dir: Ino, name: &[u8]) -> FsResult<Option<Found>> {
        let locked = self.lock_inodes(&[dir], Mode::Read).await?;
        let _local = self.local.shared(dir).await;
        let found = self.find_entry(locked.of(dir), dir, name).await?;
        if found.is_none() && !self.load(&locked, dir).await?.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        Ok(found)
    }

    /// LOOKUP (spec 12 section 10). `.` and `..` are for export handles.
    ///
    /// # Errors
    /// ENOENT, ENAMETOOLONG, ENOTDIR; ESTALE for handles of deleted inodes.
    ///
    /// The name leads to the inode when its attributes are read: a rename in between
    /// would show them with a name that was gone by then.
    pub(super) async fn do_lookup(&self, parent: Ino, name: &[u8]) -> FsResult<Entry> {
        match name {
            b"." => return self.by_handle(parent).await,
            b".." => {
                let up = self.parent_of(parent).await.map_err(stale)?;
                return self.by_handle(up).await;
            }
            _ => check_name(name)?,
        }
        let mut attempts = 0;
        loop {
            let before = self.revocations.get();
            if let Some(inode) = self.lookup_once(parent, name).await? {
                return Ok(self.entry(&inode, before));
            }
            probe("fs.lookup_again");
            attempts += 1;
            if attempts == LOOKUP_ATTEMPTS {
                return Err(Errno::ENOENT.into());
            }
        }
    }

    /// Reads the inode that a name has, both at one moment: who renames what this
    /// names must not come between. `None` if it must be looked up again.
    async fn lookup_once(&self, parent: Ino, name: &[u8]) -> FsResult<Option<Inode>> {
        let mut locked = self.lock_inodes(&[parent], Mode::Read).await?;
        let mut local = self.local.shared(parent).await;
        let found = self.find_entry(locked.of(parent), parent, name).await?;
        let Some(found) = found else {
            let is_dir = self.load(&locked, parent).await?.is_dir();
            return Err(if is_dir {
                Errno::ENOENT
            } else {
                Errno::ENOTDIR
            }
            .into());
        };
        // In nearly all cases the inode's lock is the directory's, or is here. To wait
        // for it, both have to be taken anew: in order of numbers.
        if !self.try_lock_inode(&mut locked, found.ino, Mode::Read) {
            probe("fs.lookup_waits");
            drop((local, locked));
            locked = self.lock_inodes(&[parent, found.ino], Mode::Read).await?;
            local = self.local.shared(parent).await;
            let again = self.find_entry(locked.of(parent), parent, name).await?;
            if again.is_none_or(|again| again.ino != found.ino) {
                return Ok(None);
            }
        }
        let loaded = self.load(&locked, found.ino).await;
        drop(local);
        match loaded {
            Ok(inode) if inode.nlink > 0 => Ok(Some(inode)),
            Ok(_) | Err(FsError::Gone(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens an inode by number (spec 12 section 19).
    async fn by_handle(&self, ino: Ino) -> FsResult<Entry> {
        let before = self.revocations.get();
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let inode = self.load(&locked, ino).await?;
        // Mutant: breaks spec 12 section 19.
        if inode.nlink == 0 && !mutant("deleted_handle_opens") {
            return Err(FsError::Gone(ino));
        }
        Ok(self.entry(&inode, before))
    }

    /// An entry for the kernel, which now knows the inode. Call under the
    /// inode's lock; `before` is `revocations` from before the parent was read.
    pub(super) fn entry(&self, inode: &Inode, before: u64) -> Entry {
        self.table.learn(inode.ino, inode.is_dir());
        Entry {
            attr: inode.attr(),
            entry_valid: self.valid_since(before),
            attr_valid: self.entry_attr_valid(inode.ino),
        }
    }

    /// How long something may be believed that was read when `revocations` was
    /// `before`, if the lock was not kept since.
    pub(super) fn valid_since(&self, before: u64) -> Duration {
        if self.revocations.get() == before {
            self.config.policy.cache_valid
        } else {
            probe("fs.entry_not_cached");
            Duration::ZERO
        }
    }

    /// First back reference of an inode at or after `(dir, pos)`, under its lock.
    async fn backref(
        &self,
        guard: &LockGuard,
        ino: Ino,
        dir: Ino,
        pos: u64,
    ) -> FsResult<Option<(Ino, Found)>> {
        let (first, last) = (
            Key::link_backref(ino, dir, pos),
            Key::link_backref(ino, u64::MAX, u64::MAX),
        );
        let Some((key, value)) = self.log.next(guard, &first, &last).await? else {
            return Ok(None);
        };
        Ok(Some((key.second, Found::parse(&key, value)?)))
    }

    /// Directory of the inode's first name.
    ///
    /// # Errors
    /// ENOENT if it has no name; the root is its own parent.
    pub(super) async fn parent_of(&self, ino: Ino) -> FsResult<Ino> {
        if ino == ROOT_INO {
            return Ok(ROOT_INO);
        }
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        match self.backref(locked.of(ino), ino, 0, 0).await? {
            Some((dir, _)) => Ok(dir),
            None => Err(Errno::ENOENT.into()),
        }
    }

    /// Up to `max` names of an inode as `(directory, entry)`, from `(dir, pos)` on,
    /// and whether there are no more.
    ///
    /// # Errors
    /// ENOENT if there are none.
    pub async fn next_backrefs(
        &self,
        ino: Ino,
        dir: Ino,
        pos: u64,
        max: usize,
    ) -> FsResult<(Vec<(Ino, Found)>, bool)> {
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let mut names: Vec<(Ino, Found)> = Vec::new();
        let mut from = Some((dir, pos));
        while let Some((dir, pos)) = from {
            let Some((dir, found)) = self.backref(locked.of(ino), ino, dir, pos).await? else {
                break;
            };
            if names.len() == max {
                return Ok((names, false));
            }
            let next = Key::link_backref(ino, dir, found.pos).inc();
            from = (next.first == ino && found.pos != u64::MAX).then_some((dir, found.pos + 1));
            names.push((dir, found));
        }
        if names.is_empty() {
            Err(Errno::ENOENT.into())
        } else {
            Ok((names, true))
        }
    }

    /// Name of `child` in `dir`, by its first back reference there.
    ///
    /// # Errors
    /// ENOENT if it has no name there.
    pub async fn name_in(&self, dir: Ino, child: Ino) -> FsResult<Bytes> {
        let locked = self.lock_inodes(&[child], Mode::Read).await?;
        match self.backref(locked.of(child), child, dir, 0).await? {
            Some((at, found)) if at == dir => Ok(found.name()),
            _ => Err(Errno::ENOENT.into()),
        }
    }

    /// Names on the way from the root to the inode, by its first name at or after
    /// `(dir, pos)`. Each step is right by itself; the whole may never have
    /// existed if renames ran meanwhile.
    ///
    /// # Errors
    /// ENOENT if it has no such name; ELOOP if parents keep vanishing.
    pub async fn path(&self, ino: Ino, dir: Ino, pos: u64) -> FsResult<Vec<Bytes>> {
        for _ in 0..PATH_ATTEMPTS {
            let (names, _) = self.next_backrefs(ino, dir, pos, 1).await?;
            let (mut at, first) = names.into_iter().next().expect("not empty");
            let mut path = vec![first.name()];
            while at != ROOT_INO && path.len() < DEPTH_MAX {
                match self.next_backrefs(at, 0, 0, 1).await {
                    Ok((mut up, _)) => {
                        let (parent, found) = up.remove(0);
                        path.push(found.name());
                        at = parent;
                    }
                    Err(error) if error.is(Errno::ENOENT) => break,
                    Err(error) => return Err(error),
                }
            }
            if at == ROOT_INO {
                path.reverse();
                return Ok(path);
            }
            probe("fs.path_again");
        }
        Err(Errno::ELOOP.into())
    }

    /// Directories from `dir` up to the root, both included. Under the rename
    /// lock, so only removals can happen meanwhile.
    ///
    /// # Errors
    /// ENOENT if a directory on the way was removed.
    pub(super) async fn ancestors(&self, dir: Ino) -> FsResult<Vec<Ino>> {
        let mut path = vec![dir];
        let mut at = dir;
        while at != ROOT_INO {
            at = self.parent_of(at).await?;
            path.push(at);
            if path.len() > DEPTH_MAX {
                return Err(Errno::ELOOP.into());
            }
        }
        Ok(path)
    }
}

/// Handles of inodes that are gone are stale.
fn stale(error: FsError) -> FsError {
    if error.is(Errno::ENOENT) {
        Errno::ESTALE.into()
    } else {
        error
    }
}

impl Change<'_> {
    /// Adds an entry: its three items.
    ///
    /// # Errors
    /// If the item cache failed.
    pub(super) async fn add_entry(
        &mut self,
        dir: Ino,
        name: &[u8],
        ino: Ino,
        pos: u64,
        kind: u8,
    ) -> FsResult<()> {
        let hash = format::dirent_hash(name);
        let head = Dirent {
            ino: ino.into(),
            hash: hash.into(),
            pos: pos.into(),
            kind,
            ..Dirent::default()
        };
        let value = Bytes::from(head.to_value(name));
        self.create(Key::dirent(dir, hash, pos), value.clone())
            .await?;
        self.create(Key::readdir(dir, pos), value.clone()).await?;
        self.create(Key::link_backref(ino, dir, pos), value).await
    }

    /// Removes an entry: its three items.
    ///
    /// # Errors
    /// If the item cache failed.
    pub(super) async fn remove_entry(&mut self, dir: Ino, found: &Found) -> FsResult<()> {
        let value = &found.value;
        self.delete(Key::dirent(dir, found.hash, found.pos), value.clone())
            .await?;
        self.delete(Key::readdir(dir, found.pos), value.clone())
            .await?;
        self.delete(Key::link_backref(found.ino, dir, found.pos), value.clone())
            .await
    }
}

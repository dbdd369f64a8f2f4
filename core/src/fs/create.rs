//! New inodes: mknod, create, mkdir, symlink, tmpfile (spec 12 sections 11, 14
//! and 16).
//!
//! What can go wrong: an inode without entry, or without orphan item, that is
//! committed. The name is verified absent before anything is written, and what
//! was written is undone if a later step fails.

use super::Fs;
use super::acl::NewAcls;
use super::api::{Caller, Ino};
use super::change::{Change, Locked, Touch};
use super::error::{FsError, FsResult};
use super::inode::{Inode, S_IFBLK, S_IFCHR, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, S_ISGID, S_IXGRP};
use super::names::{check_dir, check_name};
use super::pools::PoolKind;
use crate::env::mutant;
use crate::errno::Errno;
use crate::format::{DIRENT_LAST_POS, Key, MAX_ITEM_VALUE, SYMLINK_MAX, dirent_type};
use crate::locks::{Mode, Scope};
use bytes::Bytes;

/// What to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct New<'a> {
    /// Type and permission bits, not yet masked.
    pub mode: u32,
    /// Applied where no default ACL is.
    pub umask: u32,
    /// Device number of special files.
    pub rdev: u32,
    /// Target of a symlink.
    pub target: &'a [u8],
    /// Open it before it exists for others: for reading, or writing too.
    pub open: Option<bool>,
}

/// A new inode, and `revocations` from before its directory was read; `None` if
/// the name exists.
pub(super) type Made = Option<(Inode, u64)>;

impl New<'_> {
    fn kind(&self) -> PoolKind {
        if self.mode & S_IFMT == S_IFDIR {
            PoolKind::Dir
        } else {
            PoolKind::File
        }
    }
}

/// The next entry position of a directory; never given out again.
pub(super) fn take_pos(dir: &mut Inode) -> FsResult<u64> {
    let pos = dir.next_readdir_pos;
    if pos > DIRENT_LAST_POS {
        return Err(Errno::ENOSPC.into());
    }
    if !(mutant("readdir_pos_reused") && pos % 8 == 7) {
        dir.next_readdir_pos = pos + 1;
    }
    Ok(pos)
}

impl Fs {
    /// Makes an inode with a name.
    ///
    /// # Errors
    /// EEXIST is not among them: then there is no inode.
    pub(super) async fn make(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        new: New<'_>,
    ) -> FsResult<Made> {
        check_name(name)?;
        let kind = dirent_type(new.mode).ok_or(Errno::EINVAL)?;
        let ino = self.new_ino(new.kind()).await?;
        let before = self.revocations.get();
        let locked = self.lock_inodes(&[parent, ino], Mode::Write).await?;
        let _local = self.local.alone(parent).await;
        let mut dir = self.load(&locked, parent).await?;
        check_dir(&dir)?;
        if self
            .find_entry(locked.of(parent), parent, name)
            .await?
            .is_some()
        {
            return Ok(None);
        }
        let (mut inode, acls) = self.prepare(cx, &locked, &dir, ino, new).await?;
        let touched = [dir.touch(false), Touch::new_inode(inode.is_reg())];
        let mut change = self.change(&locked, &touched, true).await?;
        if let Some(write) = new.open {
            self.table.open(ino, write);
        }
        let done = async {
            change.put_new(&mut inode, &acls, new.target).await?;
            let pos = take_pos(&mut dir)?;
            change.add_entry(parent, name, ino, pos, kind).await?;
            dir.size += name.len() as u64;
            dir.mtime = inode.mtime;
            dir.changed(inode.mtime);
            if inode.is_dir() {
                dir.nlink = dir.nlink.checked_add(1).ok_or(Errno::EMLINK)?;
            }
            change.put_inode(&mut dir, false).await
        }
        .await;
        let done = change.finish(done).await;
        if let (Err(_), Some(write)) = (&done, new.open) {
            self.table.close(ino, write);
        }
        done?;
        Ok(Some((inode, before)))
    }

    /// Makes a file without a name, open (spec 12 section 16).
    ///
    /// # Errors
    /// As [`Fs::make`].
    pub(super) async fn make_tmpfile(
        &self,
        cx: &Caller,
        parent: Ino,
        new: New<'_>,
        write: bool,
    ) -> FsResult<Inode> {
        let ino = self.new_ino(PoolKind::File).await?;
        let mut locked = self.lock_inodes(&[parent, ino], Mode::Write).await?;
        let _local = self.local.shared(parent).await;
        let dir = self.load(&locked, parent).await?;
        check_dir(&dir)?;
        self.lock_zone(&mut locked, Scope::Orphans, Mode::WriteOnly)
            .await?;
        let (mut inode, acls) = self.prepare(cx, &locked, &dir, ino, new).await?;
        inode.nlink = 0;
        let mut change = self
            .change(&locked, &[Touch::new_inode(inode.is_reg())], true)
            .await?;
        self.table.open(ino, write);
        let done = async {
            if !mutant("orphan_item_missing") {
                change.force(Key::orphan(ino), ino, true).await?;
            }
            change.put_new(&mut inode, &acls, &[]).await
        }
        .await;
        let done = change.finish(done).await;
        if done.is_err() {
            self.table.close(ino, write);
        }
        done?;
        Ok(inode)
    }

    /// Owner, group, mode, ACLs and project of a new inode (sections 11 and 13.15).
    async fn prepare(
        &self,
        cx: &Caller,
        locked: &Locked,
        dir: &Inode,
        ino: Ino,
        new: New<'_>,
    ) -> FsResult<(Inode, NewAcls)> {
        let mut mode = new.mode;
        let mut gid = cx.gid;
        let is_dir = mode & S_IFMT == S_IFDIR;
        if dir.mode & S_ISGID != 0 {
            gid = dir.gid;
            if is_dir {
                mode |= S_ISGID;
            } else if mode & S_IXGRP != 0 && !cx.may_set_gid(gid) {
                mode &= !S_ISGID;
            }
        }
        let acls = if mode & S_IFMT == S_IFLNK {
            NewAcls::default()
        } else {
            self.new_acls(locked, dir, cx, gid, &mut mode, new.umask)
                .await?
        };
        let nlink = if is_dir { 2 } else { 1 };
        let mut inode = Inode::new(ino, mode, nlink, self.now());
        inode.uid = cx.uid;
        inode.gid = gid;
        inode.proj = dir.proj;
        inode.version = 1;
        if matches!(mode & S_IFMT, S_IFBLK | S_IFCHR) {
            inode.rdev = new.rdev;
        }
        if !new.target.is_empty() {
            inode.size = new.target.len() as u64 + 1;
        }
        Ok((inode, acls))
    }

    /// SYMLINK (spec 12 section 14).
    ///
    /// # Errors
    /// As [`Fs::make`]; ENOENT for an empty target, ENAMETOOLONG for a long one.
    pub(super) async fn make_symlink(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> FsResult<Made> {
        if target.is_empty() {
            return Err(Errno::ENOENT.into());
        }
        if target.len() >= SYMLINK_MAX {
            return Err(Errno::ENAMETOOLONG.into());
        }
        if target.contains(&0) {
            return Err(Errno::EINVAL.into());
        }
        let new = New {
            mode: S_IFLNK | 0o777,
            umask: 0,
            rdev: 0,
            target,
            open: None,
        };
        self.make(cx, parent, name, new).await
    }

    /// READLINK (spec 12 section 14).
    ///
    /// # Errors
    /// EINVAL if it is no symlink, EIO if its target is malformed.
    pub(super) async fn do_readlink(&self, ino: Ino) -> FsResult<Bytes> {
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let inode = self.load(&locked, ino).await?;
        if !inode.is_symlink() {
            return Err(Errno::EINVAL.into());
        }
        let corrupt = |nr, what| FsError::Corrupt {
            key: Key::symlink(ino, nr),
            what,
        };
        if inode.size == 0 || inode.size > SYMLINK_MAX as u64 {
            return Err(corrupt(0, "its inode has a size that no target has"));
        }
        let size = inode.size as usize;
        let mut target = Vec::with_capacity(size);
        let mut nr = 0;
        while target.len() < size {
            let key = Key::symlink(ino, nr);
            let piece = self.log.lookup(locked.of(ino), &key).await?;
            let piece = piece.ok_or_else(|| corrupt(nr, "missing piece of a target"))?;
            if piece.len() != MAX_ITEM_VALUE.min(size - target.len()) {
                return Err(corrupt(nr, "piece of a target has a wrong length"));
            }
            target.extend_from_slice(&piece);
            nr += 1;
        }
        if target.pop() != Some(0) {
            return Err(corrupt(nr - 1, "target does not end in a NUL"));
        }
        Ok(target.into())
    }
}

impl Change<'_> {
    /// Writes the items of a new inode but its entry: xattrs of its ACLs, target,
    /// inode and index items, and counts it.
    async fn put_new(&mut self, inode: &mut Inode, acls: &NewAcls, target: &[u8]) -> FsResult<()> {
        for (name, value) in acls.xattrs() {
            self.create_xattr(inode, name, value).await?;
        }
        if !target.is_empty() {
            let text = [target, &[0]].concat();
            for (nr, piece) in text.chunks(MAX_ITEM_VALUE).enumerate() {
                let key = Key::symlink(inode.ino, nr as u64);
                self.create(key, Bytes::copy_from_slice(piece)).await?;
            }
        }
        self.create_inode(inode).await?;
        self.count_inodes(1);
        Ok(())
    }
}

/// Fills the type in where `mknod` was given none.
pub(super) fn node_mode(mode: u32) -> u32 {
    if mode & S_IFMT == 0 {
        mode | S_IFREG
    } else {
        mode
    }
}

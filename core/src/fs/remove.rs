//! Taking names away and adding them: unlink, rmdir, link (spec 12 sections 12
//! and 13).
//!
//! What can go wrong: an inode whose last name goes, without an orphan item in
//! the same transaction: nobody would ever delete it. And an error that is lost
//! on the way out, or an undo of something that was never done: the journal of
//! [`Change`] undoes exactly what was done, and the first error is returned.

use super::Fs;
use super::api::Ino;
use super::change::{Change, Locked};
use super::error::{FsError, FsResult};
use super::inode::Inode;
use super::names::{Found, check_dir, check_name};
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::{Key, LINK_MAX};
use crate::locks::{Mode, Scope};

/// The inode that an entry names exists as long as the entry does.
pub(super) fn named(ino: Ino, loaded: FsResult<Inode>) -> FsResult<Inode> {
    loaded.map_err(|error| match error {
        FsError::Gone(_) => FsError::Corrupt {
            key: Key::inode(ino),
            what: "a directory entry names it, but it does not exist",
        },
        other => other,
    })
}

impl Fs {
    /// UNLINK and RMDIR.
    ///
    /// # Errors
    /// ENOENT, EISDIR, ENOTDIR, ENOTEMPTY; EPERM under retention.
    pub(super) async fn do_remove(&self, parent: Ino, name: &[u8], rmdir: bool) -> FsResult<()> {
        check_name(name)?;
        loop {
            let Some(seen) = self.peek(parent, name).await? else {
                return Err(Errno::ENOENT.into());
            };
            check_kind(&seen, rmdir)?;
            let locked = self.lock_inodes(&[parent, seen.ino], Mode::Write).await?;
            let local = self.local.all_alone(&mut [parent, seen.ino]).await;
            // Never the hash and position seen without the lock.
            let Some(found) = self.find_entry(locked.of(parent), parent, name).await? else {
                return Err(Errno::ENOENT.into());
            };
            if found.ino != seen.ino {
                probe("fs.remove_again");
                continue;
            }
            let orphaned = self.remove_locked(locked, parent, name, &found).await?;
            drop(local);
            if orphaned {
                self.delete_if_unused(found.ino).await;
            }
            return Ok(());
        }
    }

    /// True if the inode has no name any more.
    async fn remove_locked(
        &self,
        mut locked: Locked,
        parent: Ino,
        name: &[u8],
        found: &Found,
    ) -> FsResult<bool> {
        let mut dir = self.load(&locked, parent).await?;
        check_dir(&dir)?;
        let mut inode = named(found.ino, self.load(&locked, found.ino).await)?;
        if inode.is_dir() && inode.size != 0 {
            return Err(Errno::ENOTEMPTY.into());
        }
        if inode.is_retained() {
            return Err(Errno::EPERM.into());
        }
        let last = inode.is_last_link();
        if last {
            self.lock_zone(&mut locked, Scope::Orphans, Mode::WriteOnly)
                .await?;
        }
        let touched = [dir.touch(false), inode.touch(false)];
        let mut change = self.change(&locked, &touched, false).await?;
        let now = self.now();
        let done = async {
            if last {
                change.create_orphan(inode.ino).await?;
            }
            change.remove_entry(parent, found).await?;
            dir.size = dir.size.saturating_sub(name.len() as u64);
            if inode.is_dir() {
                dir.nlink = dir.nlink.saturating_sub(1);
            }
            inode.drop_link();
            dir.mtime = now;
            dir.changed(now);
            inode.changed(now);
            change.put_inodes([&mut dir, &mut inode]).await
        }
        .await;
        change.finish(done).await?;
        Ok(last)
    }

    /// LINK; returns the inode and `revocations` from before its new directory
    /// was read.
    ///
    /// # Errors
    /// EEXIST, EMLINK; EPERM for directories; ESTALE if the inode is gone.
    pub(super) async fn do_link(
        &self,
        ino: Ino,
        parent: Ino,
        name: &[u8],
    ) -> FsResult<(Inode, u64)> {
        check_name(name)?;
        let before = self.revocations.get();
        let mut locked = self.lock_inodes(&[parent, ino], Mode::Write).await?;
        let _local = self.local.all_alone(&mut [parent, ino]).await;
        let mut inode = self.load(&locked, ino).await?;
        if inode.is_dir() {
            return Err(Errno::EPERM.into());
        }
        let mut dir = self.load(&locked, parent).await?;
        check_dir(&dir)?;
        if self
            .find_entry(locked.of(parent), parent, name)
            .await?
            .is_some()
        {
            return Err(Errno::EEXIST.into());
        }
        if inode.nlink >= LINK_MAX {
            return Err(Errno::EMLINK.into());
        }
        let orphan = inode.nlink == 0;
        if orphan {
            // Only what is open may come back: nobody else deletes it then.
            if !self.table.is_open(ino) {
                probe("fs.link_of_deleted");
                return Err(Errno::ENOENT.into());
            }
            self.lock_zone(&mut locked, Scope::Orphans, Mode::WriteOnly)
                .await?;
        }
        let kind = crate::format::dirent_type(inode.mode).ok_or(Errno::EIO)?;
        let touched = [dir.touch(false), inode.touch(false)];
        let mut change = self.change(&locked, &touched, true).await?;
        let now = self.now();
        let done = async {
            if orphan {
                change.force(Key::orphan(ino), ino, false).await?;
            }
            let pos = super::create::take_pos(&mut dir)?;
            change.add_entry(parent, name, ino, pos, kind).await?;
            dir.size += name.len() as u64;
            dir.mtime = now;
            dir.changed(now);
            inode.nlink += 1;
            inode.changed(now);
            change.put_inodes([&mut dir, &mut inode]).await
        }
        .await;
        change.finish(done).await?;
        Ok((inode, before))
    }
}

fn check_kind(found: &Found, rmdir: bool) -> FsResult<()> {
    match (rmdir, found.is_dir()) {
        (true, false) => Err(Errno::ENOTDIR.into()),
        (false, true) => Err(Errno::EISDIR.into()),
        _ => Ok(()),
    }
}

impl Change<'_> {
    /// Creates the orphan item of an inode that loses its last name.
    pub(super) async fn create_orphan(&mut self, ino: Ino) -> FsResult<()> {
        if mutant("orphan_item_missing") {
            return Ok(());
        }
        self.force(Key::orphan(ino), ino, true).await
    }
}

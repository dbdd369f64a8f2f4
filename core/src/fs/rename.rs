//! Rename (spec 12 section 15).
//!
//! What can go wrong: two directories moved into each other, and a part of the
//! tree that hangs on nothing. A directory changes its parent only under the
//! rename lock, so the ancestors cannot change while they are compared.

use super::Fs;
use super::api::Ino;
use super::change::Locked;
use super::create::take_pos;
use super::error::{FsError, FsResult};
use super::inode::Inode;
use super::local::RENAME;
use super::names::{Found, check_dir, check_name};
use super::remove::named;
use crate::env::probe;
use crate::errno::Errno;
use crate::format::Key;
use crate::locks::{Mode, Scope};

/// The new name must not exist.
pub const RENAME_NOREPLACE: u32 = 1;

/// One side of a rename: a name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'a> {
    pub dir: Ino,
    pub name: &'a [u8],
}

/// The inodes of a rename. With one directory, `to_dir` is `None`.
struct Inodes {
    from_dir: Inode,
    to_dir: Option<Inode>,
    moved: Inode,
    replaced: Option<Inode>,
}

impl Fs {
    /// RENAME.
    ///
    /// # Errors
    /// EINVAL for unknown flags and for a directory moved into itself; ENOENT,
    /// EEXIST, ENOTDIR, EISDIR, ENOTEMPTY; EPERM under retention.
    pub(super) async fn do_rename(&self, from: Name<'_>, to: Name<'_>, flags: u32) -> FsResult<()> {
        if flags & !RENAME_NOREPLACE != 0 {
            return Err(Errno::EINVAL.into());
        }
        check_name(from.name)?;
        check_name(to.name)?;
        loop {
            let Some(old) = self.peek(from.dir, from.name).await? else {
                return Err(Errno::ENOENT.into());
            };
            let new = self.peek(to.dir, to.name).await?;
            if self
                .rename_once(from, to, flags, &old, new.as_ref())
                .await?
            {
                return Ok(());
            }
            probe("fs.rename_again");
        }
    }

    /// False if the names changed before the locks were had.
    async fn rename_once(
        &self,
        from: Name<'_>,
        to: Name<'_>,
        flags: u32,
        old: &Found,
        new: Option<&Found>,
    ) -> FsResult<bool> {
        let new_ino = new.map_or(old.ino, |new| new.ino);
        let crossing = from.dir != to.dir;
        let mut locked = Locked::default();
        let mut crossing_alone = None;
        if crossing {
            self.lock_zone(&mut locked, Scope::Rename, Mode::Write)
                .await?;
            crossing_alone = Some(self.local.alone(RENAME).await);
            if old.is_dir() || new.is_some_and(Found::is_dir) {
                self.check_ancestors(from.dir, to.dir, old.ino, new).await?;
            }
        }
        let inos = [from.dir, to.dir, old.ino, new_ino];
        self.lock_inodes_after(&mut locked, &inos, Mode::Write)
            .await?;
        let local = self.local.all_alone(&mut inos.clone()).await;
        let now_old = self
            .find_entry(locked.of(from.dir), from.dir, from.name)
            .await?;
        let now_new = self.find_entry(locked.of(to.dir), to.dir, to.name).await?;
        let Some(now_old) = now_old else {
            return Err(Errno::ENOENT.into());
        };
        let same = |a: Option<&Found>, b: Option<&Found>| a.map(|f| f.ino) == b.map(|f| f.ino);
        if now_old.ino != old.ino || !same(now_new.as_ref(), new) {
            return Ok(false);
        }
        let orphaned = self
            .rename_locked(locked, from, to, flags, &now_old, now_new.as_ref())
            .await?;
        drop((local, crossing_alone));
        if orphaned {
            self.delete_if_unused(new_ino).await;
        }
        Ok(true)
    }

    /// Refuses to move a directory below itself, holding only the rename lock.
    async fn check_ancestors(
        &self,
        from: Ino,
        to: Ino,
        old: Ino,
        new: Option<&Found>,
    ) -> FsResult<()> {
        let child_of = |path: &[Ino], dir: Ino| -> Option<Ino> {
            let at = path.iter().position(|&ino| ino == dir)?;
            Some(path[at.checked_sub(1)?])
        };
        let mut child = child_of(&self.ancestors(to).await?, from);
        if child.is_none() {
            child = child_of(&self.ancestors(from).await?, to);
        }
        if child == Some(old) {
            probe("fs.rename_into_itself");
            return Err(Errno::EINVAL.into());
        }
        if child.is_some() && child == new.map(|new| new.ino) {
            // The target holds the source: it is not empty.
            return Err(Errno::ENOTEMPTY.into());
        }
        Ok(())
    }

    /// True if the replaced inode has no name any more.
    async fn rename_locked(
        &self,
        mut locked: Locked,
        from: Name<'_>,
        to: Name<'_>,
        flags: u32,
        old: &Found,
        new: Option<&Found>,
    ) -> FsResult<bool> {
        let mut all = self.load_for_rename(&locked, from, to, old, new).await?;
        if new.is_some() && flags & RENAME_NOREPLACE != 0 {
            return Err(Errno::EEXIST.into());
        }
        if new.is_some_and(|new| new.ino == old.ino) {
            // Two names of one inode: nothing to do.
            return Ok(false);
        }
        check_replaced(&all.moved, all.replaced.as_ref())?;
        let last = all.replaced.as_ref().is_some_and(Inode::is_last_link);
        if last {
            self.lock_zone(&mut locked, Scope::Orphans, Mode::WriteOnly)
                .await?;
        }
        let touched: Vec<_> = all.each().map(|inode| inode.touch(false)).collect();
        let mut change = self.change(&locked, &touched, true).await?;
        let now = self.now();
        let done = async {
            let new_pos = take_pos(all.to_dir.as_mut().unwrap_or(&mut all.from_dir))?;
            change
                .add_entry(to.dir, to.name, old.ino, new_pos, old.kind)
                .await?;
            if let Some(new) = new {
                change.remove_entry(to.dir, new).await?;
            }
            change.remove_entry(from.dir, old).await?;
            if let (true, Some(replaced)) = (last, &all.replaced) {
                change.create_orphan(replaced.ino).await?;
            }
            all.count(from.name.len() as u64, to.name.len() as u64)?;
            for inode in all.each_mut() {
                if inode.is_dir() && (inode.ino == from.dir || inode.ino == to.dir) {
                    inode.mtime = now;
                }
                inode.changed(now);
            }
            change.put_inodes(all.each_mut()).await
        }
        .await;
        change.finish(done).await?;
        Ok(last)
    }

    async fn load_for_rename(
        &self,
        locked: &Locked,
        from: Name<'_>,
        to: Name<'_>,
        old: &Found,
        new: Option<&Found>,
    ) -> FsResult<Inodes> {
        let from_dir = self.load(locked, from.dir).await?;
        check_dir(&from_dir)?;
        let to_dir = if from.dir == to.dir {
            None
        } else {
            let dir = self.load(locked, to.dir).await?;
            check_dir(&dir)?;
            Some(dir)
        };
        let moved = named(old.ino, self.load(locked, old.ino).await)?;
        let replaced = match new {
            Some(new) if new.ino != old.ino => {
                Some(named(new.ino, self.load(locked, new.ino).await)?)
            }
            _ => None,
        };
        let twice = |ino: Ino| ino == from.dir || ino == to.dir;
        if twice(moved.ino) || replaced.as_ref().is_some_and(|r| twice(r.ino)) {
            // Only a directory that is its own entry could get here.
            return Err(FsError::Corrupt {
                key: Key::dirent(from.dir, old.hash, old.pos),
                what: "a directory contains itself",
            });
        }
        Ok(Inodes {
            from_dir,
            to_dir,
            moved,
            replaced,
        })
    }
}

/// What may be put over what (spec 12 section 15 step 5 and the VFS's type rules).
fn check_replaced(moved: &Inode, replaced: Option<&Inode>) -> FsResult<()> {
    if let Some(replaced) = replaced {
        match (moved.is_dir(), replaced.is_dir()) {
            (true, false) => return Err(Errno::ENOTDIR.into()),
            (false, true) => return Err(Errno::EISDIR.into()),
            (true, true) if replaced.size != 0 => return Err(Errno::ENOTEMPTY.into()),
            _ => {}
        }
    }
    if moved.is_retained() || replaced.is_some_and(Inode::is_retained) {
        return Err(Errno::EPERM.into());
    }
    Ok(())
}

impl Inodes {
    fn each(&self) -> impl Iterator<Item = &Inode> {
        [&self.from_dir, &self.moved]
            .into_iter()
            .chain(&self.to_dir)
            .chain(&self.replaced)
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut Inode> {
        [&mut self.from_dir, &mut self.moved]
            .into_iter()
            .chain(&mut self.to_dir)
            .chain(&mut self.replaced)
    }

    /// Sizes and link counts (step 10).
    fn count(&mut self, old_len: u64, new_len: u64) -> FsResult<()> {
        self.from_dir.size = self.from_dir.size.saturating_sub(old_len);
        let to_dir = self.to_dir.as_mut().unwrap_or(&mut self.from_dir);
        if let Some(replaced) = &mut self.replaced {
            if replaced.is_dir() {
                to_dir.nlink = to_dir.nlink.saturating_sub(1);
            }
            replaced.drop_link();
        } else {
            to_dir.size += new_len;
        }
        if let (true, Some(to_dir)) = (self.moved.is_dir(), &mut self.to_dir) {
            self.from_dir.nlink = self.from_dir.nlink.saturating_sub(1);
            to_dir.nlink = to_dir.nlink.checked_add(1).ok_or(Errno::EMLINK)?;
        }
        Ok(())
    }
}

//! [`Posix`] over [`Fs`]: one method per kernel request, errors as numbers.

use super::Fs;
use super::api::{
    Attr, Caller, DirEntry, Entry, FiemapExtent, Ino, Opened, Posix, SetAttr, StatFs, Whence,
    WriteData, WriteHow, XattrSet,
};
use super::create::{Made, New, node_mode};
use super::error::{FsError, FsResult};
use super::inode::{S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use super::remove::named;
use super::rename::Name;
use crate::env::{Duration, probe};
use crate::errno::Errno;
use crate::locks::Mode;
use bytes::Bytes;

const O_ACCMODE: u32 = 0o3;
const O_RDONLY: u32 = 0o0;
const O_WRONLY: u32 = 0o1;
const O_APPEND: u32 = 0o2000;
const O_EXCL: u32 = 0o200;
const O_TRUNC: u32 = 0o1000;
const O_DIRECT: u32 = 0o40000;

/// A name that comes and goes under each attempt to create it is given up after so
/// many.
const CREATE_ATTEMPTS: usize = 100;

fn writes(flags: u32) -> bool {
    flags & O_ACCMODE != 0
}

/// Whether pages bypass the kernel's cache. Appends do: the kernel would put their
/// data where it believes the end of the file to be, which another node may have
/// moved.
fn is_direct(flags: u32) -> bool {
    flags & O_DIRECT != 0 || writes(flags) && flags & O_APPEND != 0
}

/// Whether the kernel may have dirty pages by such a handle: through its cache, or
/// through a shared mapping, which takes a handle that can read and write.
fn dirties(flags: u32) -> bool {
    match flags & O_ACCMODE {
        O_RDONLY => false,
        O_WRONLY => !is_direct(flags),
        _ => true,
    }
}

/// The mode of a file's lock under which it is opened. Pages that the kernel has now
/// were given under what the lock is at the moment: from here on those that it may
/// dirty must be under WRITE.
fn mode_to_open(flags: u32) -> Mode {
    match dirties(flags) {
        true => Mode::Write,
        false => Mode::Read,
    }
}

/// Bit of a handle by which the kernel may dirty pages.
const FH_DIRTIES: u64 = 1;
/// Bit of a handle that bypasses the kernel's pages.
const FH_DIRECT: u64 = 2;

impl Fs {
    fn opened(&self, flags: u32) -> Opened {
        let nr = self.next_fh.get();
        self.next_fh.set(nr + 1);
        Opened {
            fh: nr << 2 | u64::from(is_direct(flags)) << 1 | u64::from(dirties(flags)),
            keep_cache: true,
            direct_io: is_direct(flags),
        }
    }

    async fn do_open(&self, ino: Ino, flags: u32, dir: bool) -> FsResult<Opened> {
        {
            let locked = self.lock_inodes(&[ino], mode_to_open(flags)).await?;
            // A deletion has the inode alone: the bit is set before or after it.
            let _local = self.local.shared(ino).await;
            let inode = self.load(&locked, ino).await?;
            if dir && !inode.is_dir() {
                return Err(Errno::ENOTDIR.into());
            }
            if !dir && inode.is_dir() && writes(flags) {
                return Err(Errno::EISDIR.into());
            }
            self.table.open(ino, dirties(flags));
        }
        Ok(self.opened(flags))
    }

    async fn do_release(&self, ino: Ino, fh: u64) {
        if self.table.close(ino, fh & FH_DIRTIES != 0) {
            self.evict(ino).await;
        }
    }

    /// The entry of something made, EEXIST if it existed.
    fn made(&self, made: Made) -> FsResult<Entry> {
        let (inode, before) = made.ok_or(Errno::EEXIST)?;
        Ok(self.entry(&inode, before))
    }

    /// CREATE: makes the name, or opens what another node or task made first.
    ///
    /// Between the failed making and the opening the name may go, or its inode:
    /// the kernel asked for a file to be there, so it is made after all. ESTALE
    /// would make the kernel walk a path that nobody changed.
    ///
    /// # Errors
    /// As [`Fs::make`] and [`Fs::do_open`]; EEXIST with `O_EXCL`. ESTALE if the
    /// name is no plain file: the kernel then walks the path again; or if it keeps
    /// changing for too long.
    async fn do_create(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        new: New<'_>,
        flags: u32,
    ) -> FsResult<(Entry, Opened)> {
        for _ in 0..CREATE_ATTEMPTS {
            if let Some((inode, before)) = self.make(cx, parent, name, new).await? {
                return Ok((self.entry(&inode, before), self.opened(flags)));
            }
            if flags & O_EXCL != 0 {
                return Err(Errno::EEXIST.into());
            }
            probe("fs.create_found_existing");
            match self.open_existing(cx, parent, name, flags).await {
                Err(error) if error.is(Errno::ENOENT) => probe("fs.create_again"),
                other => return other,
            }
        }
        Err(Errno::ESTALE.into())
    }

    /// Opens the file that a name has now; ENOENT if the name or its file went.
    ///
    /// Name and file are looked at under both locks: the answer tells of one moment,
    /// not of a name as it was and attributes as they became.
    async fn open_existing(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        flags: u32,
    ) -> FsResult<(Entry, Opened)> {
        let Some(seen) = self.peek(parent, name).await? else {
            return Err(Errno::ENOENT.into());
        };
        let ino = seen.ino;
        let before = self.revocations.get();
        let mut entry = {
            let locked = self
                .lock_inodes(&[parent, ino], mode_to_open(flags))
                .await?;
            let _local = self.local.all_alone(&mut [parent, ino]).await;
            let found = self.find_entry(locked.of(parent), parent, name).await?;
            if found.is_none_or(|found| found.ino != ino) {
                return Err(Errno::ENOENT.into());
            }
            let inode = named(ino, self.load(&locked, ino).await)?;
            if matches!(inode.mode & S_IFMT, S_IFLNK | S_IFDIR) {
                // The kernel has to walk the path again.
                return Err(Errno::ESTALE.into());
            }
            self.table.open(ino, dirties(flags));
            self.entry(&inode, before)
        };
        let opened = self.opened(flags);
        if flags & O_TRUNC != 0 {
            match self.cut_opened(cx, ino).await {
                Ok(attr) => entry.attr = attr,
                Err(error) => {
                    self.table.forget(ino, 1);
                    self.do_release(ino, opened.fh).await;
                    return Err(error);
                }
            }
            entry.entry_valid = entry.entry_valid.min(self.valid_since(before));
        }
        // The kernel takes the attributes of a created file for newer than any it
        // has: others write to this one, so they are not to be believed for longer
        // than this answer.
        entry.attr_valid = Duration::ZERO;
        Ok((entry, opened))
    }

    /// `O_TRUNC` of a file that was there when the kernel thought to create it. (Of one that
    /// it knows it truncates by a request of its own.)
    async fn cut_opened(&self, cx: &Caller, ino: Ino) -> FsResult<Attr> {
        let set = SetAttr {
            size: Some(0),
            kill_suidgid: cx.uid != 0,
            ..SetAttr::default()
        };
        Ok(self.do_setattr(ino, &set).await?.0)
    }
}

impl Posix for Fs {
    async fn lookup(&self, _cx: &Caller, parent: Ino, name: &[u8]) -> Result<Entry, Errno> {
        Ok(self.do_lookup(parent, name).await?)
    }

    fn forget(&self, ino: Ino, count: u64) {
        self.table.forget(ino, count);
        if !self.table.is_known(ino) {
            self.beliefs.forget(ino);
        }
    }

    async fn getattr(&self, _cx: &Caller, ino: Ino) -> Result<(Attr, Duration), Errno> {
        Ok(self.do_getattr(ino).await?)
    }

    async fn setattr(
        &self,
        _cx: &Caller,
        ino: Ino,
        set: &SetAttr,
    ) -> Result<(Attr, Duration), Errno> {
        Ok(self.do_setattr(ino, set).await?)
    }

    async fn readlink(&self, _cx: &Caller, ino: Ino) -> Result<Bytes, Errno> {
        Ok(self.do_readlink(ino).await?)
    }

    async fn mknod(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> Result<Entry, Errno> {
        let mode = node_mode(mode);
        if matches!(mode & S_IFMT, S_IFDIR | S_IFLNK) {
            return Err(Errno::EPERM);
        }
        let new = New {
            mode,
            umask,
            rdev,
            target: &[],
            open: None,
        };
        Ok(self.made(self.make(cx, parent, name, new).await?)?)
    }

    async fn mkdir(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> Result<Entry, Errno> {
        let mode = S_IFDIR | mode & 0o7777;
        let new = New {
            mode,
            umask,
            rdev: 0,
            target: &[],
            open: None,
        };
        Ok(self.made(self.make(cx, parent, name, new).await?)?)
    }

    async fn unlink(&self, _cx: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        Ok(self.do_remove(parent, name, false).await?)
    }

    async fn rmdir(&self, _cx: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        Ok(self.do_remove(parent, name, true).await?)
    }

    async fn symlink(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> Result<Entry, Errno> {
        Ok(self.made(self.make_symlink(cx, parent, name, target).await?)?)
    }

    async fn rename(
        &self,
        _cx: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        let (from, to) = (
            Name { dir: parent, name },
            Name {
                dir: new_parent,
                name: new_name,
            },
        );
        Ok(self.do_rename(from, to, flags).await?)
    }

    async fn link(
        &self,
        _cx: &Caller,
        ino: Ino,
        new_parent: Ino,
        new_name: &[u8],
    ) -> Result<Entry, Errno> {
        let (inode, before) = self.do_link(ino, new_parent, new_name).await?;
        Ok(self.entry(&inode, before))
    }

    async fn open(&self, _cx: &Caller, ino: Ino, flags: u32) -> Result<Opened, Errno> {
        Ok(self.do_open(ino, flags, false).await?)
    }

    async fn create(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
        flags: u32,
    ) -> Result<(Entry, Opened), Errno> {
        let mode = S_IFREG | mode & 0o7777;
        let new = New {
            mode,
            umask,
            rdev: 0,
            target: &[],
            open: Some(dirties(flags)),
        };
        Ok(self.do_create(cx, parent, name, new, flags).await?)
    }

    async fn tmpfile(
        &self,
        cx: &Caller,
        parent: Ino,
        mode: u32,
        umask: u32,
        flags: u32,
    ) -> Result<(Entry, Opened), Errno> {
        let mode = S_IFREG | mode & 0o7777;
        let new = New {
            mode,
            umask,
            rdev: 0,
            target: &[],
            open: None,
        };
        let inode = self.make_tmpfile(cx, parent, new, dirties(flags)).await?;
        Ok((
            self.entry(&inode, self.revocations.get()),
            self.opened(flags),
        ))
    }

    async fn read(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<Bytes>, Errno> {
        Ok(self.data_read(ino, offset, size).await?)
    }

    async fn write(
        &self,
        _cx: &Caller,
        ino: Ino,
        fh: u64,
        offset: u64,
        data: WriteData,
        how: WriteHow,
    ) -> Result<u32, Errno> {
        let direct = fh & FH_DIRECT != 0 && !how.from_pages;
        Ok(self.data_write(ino, offset, data, how, direct).await?)
    }

    async fn release(&self, ino: Ino, fh: u64) {
        self.do_release(ino, fh).await;
    }

    async fn fsync(&self, _cx: &Caller, _ino: Ino, _fh: u64, _datasync: bool) -> Result<(), Errno> {
        self.syncfs().await
    }

    async fn syncfs(&self) -> Result<(), Errno> {
        Ok(self.log.sync().await.map_err(FsError::from)?)
    }

    async fn setxattr(
        &self,
        cx: &Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: XattrSet,
    ) -> Result<(), Errno> {
        Ok(self.do_setxattr(cx, ino, name, Some(value), how).await?)
    }

    async fn getxattr(&self, _cx: &Caller, ino: Ino, name: &[u8]) -> Result<Bytes, Errno> {
        Ok(self.do_getxattr(ino, name).await?)
    }

    async fn listxattr(&self, _cx: &Caller, ino: Ino) -> Result<Bytes, Errno> {
        Ok(self.do_listxattr(ino, false).await?)
    }

    async fn removexattr(&self, cx: &Caller, ino: Ino, name: &[u8]) -> Result<(), Errno> {
        Ok(self
            .do_setxattr(cx, ino, name, None, XattrSet::Replace)
            .await?)
    }

    async fn opendir(&self, _cx: &Caller, ino: Ino, _flags: u32) -> Result<Opened, Errno> {
        Ok(self.do_open(ino, 0, true).await?)
    }

    async fn readdir(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        offset: u64,
        plus: bool,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), Errno> {
        Ok(self.do_readdir(ino, offset, plus, sink).await?)
    }

    async fn releasedir(&self, ino: Ino, fh: u64) {
        self.do_release(ino, fh).await;
    }

    async fn statfs(&self) -> Result<StatFs, Errno> {
        self.server.statfs().await
    }

    async fn fallocate(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        Ok(self.data_fallocate(ino, mode, offset, len).await?)
    }

    async fn lseek(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        offset: u64,
        whence: Whence,
    ) -> Result<u64, Errno> {
        Ok(self.data_lseek(ino, offset, whence).await?)
    }

    async fn fiemap(
        &self,
        _cx: &Caller,
        ino: Ino,
        start: u64,
        len: u64,
        max: usize,
    ) -> Result<Vec<FiemapExtent>, Errno> {
        Ok(self.data_fiemap(ino, start, len, max).await?)
    }
}

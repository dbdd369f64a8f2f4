//! Plays a script on a filesystem, without a kernel in between.

use super::script::Step;
use crate::model::{Call, Reply, pattern};
use outrider_core::env::AlignedBuf;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Caller, DirEntry, Ino, Posix, Whence, WriteData, WriteHow};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const O_RDWR: u32 = 2;
const O_CREAT: u32 = 0o100;
const O_EXCL: u32 = 0o200;
const KEEP_SIZE: u32 = 1;
const NOREPLACE: u32 = 1;
const UMASK: u32 = 0o022;
/// Entries that one reading of a directory gets.
const ENTRIES: usize = 50;

/// Who plays.
pub struct Player<P> {
    fs: Rc<P>,
    cx: Caller,
    open: RefCell<BTreeMap<u32, (Ino, u64)>>,
}

impl<P: Posix> Player<P> {
    /// A player on this filesystem.
    pub fn new(fs: Rc<P>) -> Self {
        Self {
            fs,
            cx: Caller::default(),
            open: RefCell::default(),
        }
    }

    /// Makes a call, and gives its answer.
    pub async fn play(&self, step: &Step) -> Reply {
        self.perform(step).await.unwrap_or_else(Reply::Err)
    }

    fn opened(&self, step: &Step, ino: Ino, fh: u64) {
        let file = step.file.expect("what opens a file has a number for it");
        self.open.borrow_mut().insert(file, (ino, fh));
    }

    async fn perform(&self, step: &Step) -> Result<Reply, Errno> {
        let (fs, cx) = (&*self.fs, &self.cx);
        let handle = || {
            let file = step.file.as_ref().ok_or(Errno::EBADF)?;
            let open = self.open.borrow().get(file).copied();
            open.map(|(_, fh)| fh).ok_or(Errno::EBADF)
        };
        Ok(match &step.call {
            Call::Lookup { dir, name } => {
                let entry = fs.lookup(cx, *dir, name).await?;
                if entry.attr.ino == 0 {
                    return Err(Errno::ENOENT);
                }
                Reply::Entry(entry.attr)
            }
            Call::Getattr { ino } => Reply::Attr(fs.getattr(cx, *ino).await?.0),
            Call::Setattr { ino, set } => Reply::Attr(fs.setattr(cx, *ino, set).await?.0),
            Call::Readlink { ino } => Reply::Bytes(fs.readlink(cx, *ino).await?),
            Call::Mknod {
                dir,
                name,
                mode,
                rdev,
            } => Reply::Entry(fs.mknod(cx, *dir, name, *mode, *rdev, UMASK).await?.attr),
            Call::Mkdir { dir, name, mode } => {
                Reply::Entry(fs.mkdir(cx, *dir, name, *mode, UMASK).await?.attr)
            }
            Call::Symlink { dir, name, target } => {
                Reply::Entry(fs.symlink(cx, *dir, name, target).await?.attr)
            }
            Call::Create {
                dir,
                name,
                mode,
                excl,
            } => {
                let flags = O_RDWR | O_CREAT | if *excl { O_EXCL } else { 0 };
                let (entry, opened) = fs.create(cx, *dir, name, *mode, UMASK, flags).await?;
                self.opened(step, entry.attr.ino, opened.fh);
                Reply::Entry(entry.attr)
            }
            Call::Tmpfile { dir, mode } => {
                let (entry, opened) = fs.tmpfile(cx, *dir, *mode, UMASK, O_RDWR).await?;
                self.opened(step, entry.attr.ino, opened.fh);
                Reply::Entry(entry.attr)
            }
            Call::Unlink { dir, name } => {
                fs.unlink(cx, *dir, name).await?;
                Reply::Done
            }
            Call::Rmdir { dir, name } => {
                fs.rmdir(cx, *dir, name).await?;
                Reply::Done
            }
            Call::Rename {
                dir,
                name,
                to,
                new,
                noreplace,
            } => {
                let flags = if *noreplace { NOREPLACE } else { 0 };
                fs.rename(cx, *dir, name, *to, new, flags).await?;
                Reply::Done
            }
            Call::Link { ino, dir, name } => {
                Reply::Entry(fs.link(cx, *ino, *dir, name).await?.attr)
            }
            Call::Open { ino } => {
                let opened = fs.open(cx, *ino, O_RDWR).await?;
                self.opened(step, *ino, opened.fh);
                Reply::Done
            }
            Call::Release { .. } => {
                let open = step
                    .file
                    .and_then(|file| self.open.borrow_mut().remove(&file));
                let (ino, fh) = open.ok_or(Errno::EBADF)?;
                fs.release(ino, fh).await;
                Reply::Done
            }
            Call::Read { ino, offset, len } => {
                let pieces = fs.read(cx, *ino, handle()?, *offset, *len).await?;
                Reply::Bytes(pieces.concat().into())
            }
            Call::Write {
                ino,
                offset,
                len,
                tag,
                sync,
                ..
            } => {
                let data = pattern(*tag, *offset, *len);
                // Whole blocks come in memory of their own, as from the kernel.
                let data = match !data.is_empty() && data.len().is_multiple_of(4096) {
                    true => WriteData::Blocks(AlignedBuf::copy_of(&data)),
                    false => data.into(),
                };
                let how = WriteHow {
                    sync: *sync,
                    ..WriteHow::default()
                };
                let fh = handle()?;
                Reply::Number(u64::from(fs.write(cx, *ino, fh, *offset, data, how).await?))
            }
            Call::Fsync { ino } => {
                fs.fsync(cx, *ino, handle()?, false).await?;
                Reply::Done
            }
            Call::Syncfs => {
                fs.syncfs().await?;
                Reply::Done
            }
            Call::Setxattr {
                ino,
                name,
                value,
                how,
            } => {
                fs.setxattr(cx, *ino, name, value, *how).await?;
                Reply::Done
            }
            Call::Getxattr { ino, name } => Reply::Bytes(fs.getxattr(cx, *ino, name).await?),
            Call::Listxattr { ino } => Reply::Bytes(fs.listxattr(cx, *ino).await?),
            Call::Removexattr { ino, name } => {
                fs.removexattr(cx, *ino, name).await?;
                Reply::Done
            }
            Call::Readdir { ino } => return self.readdir(*ino).await,
            Call::Statfs => Reply::Stat(fs.statfs().await?),
            Call::Fallocate {
                ino,
                keep,
                offset,
                len,
            } => {
                let mode = if *keep { KEEP_SIZE } else { 0 };
                let fh = handle()?;
                fs.fallocate(cx, *ino, fh, mode, *offset, *len).await?;
                Reply::Done
            }
            Call::Seek { ino, offset, hole } => {
                let whence = if *hole { Whence::Hole } else { Whence::Data };
                Reply::Number(fs.lseek(cx, *ino, handle()?, *offset, whence).await?)
            }
            Call::Fiemap { ino } => {
                Reply::Extents(fs.fiemap(cx, *ino, 0, u64::MAX, usize::MAX).await?)
            }
            // Nothing else is drawn (see `script`).
            #[allow(unreachable_patterns)]
            _ => return Err(Errno::ENOSYS),
        })
    }

    async fn readdir(&self, ino: Ino) -> Result<Reply, Errno> {
        let opened = self.fs.opendir(&self.cx, ino, 0).await?;
        let (mut names, mut at) = (Vec::new(), 0);
        let result = loop {
            let before = names.len();
            let (mut room, mut next) = (ENTRIES, at);
            let mut take = |entry: DirEntry| {
                if room == 0 {
                    return false;
                }
                room -= 1;
                next = entry.next;
                names.push((entry.ino, entry.dtype, entry.name));
                true
            };
            let sink: &mut dyn FnMut(DirEntry) -> bool = &mut take;
            let read = self.fs.readdir(&self.cx, ino, opened.fh, at, false, sink);
            if let Err(error) = read.await {
                break Err(error);
            }
            at = next;
            if names.len() == before {
                break Ok(Reply::Names(names));
            }
        };
        self.fs.releasedir(ino, opened.fh).await;
        result
    }
}

//! How each call of the model is put to a filesystem, and what it has answered. Whoever
//! asks says through which open file, and knows what to keep of the answer.

use crate::model::{Call, Reply, UMASK, pattern};
use bytes::Bytes;
use outrider_core::env::AlignedBuf;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{
    Caller, DirEntry, Entry, Ino, Opened, Posix, SetAttr, Whence, WriteData, WriteHow,
};

const O_RDWR: u32 = 2;
const O_CREAT: u32 = 0o100;
const O_EXCL: u32 = 0o200;
const O_DIRECT: u32 = 0o40_000;
/// `FALLOC_FL_KEEP_SIZE`.
const KEEP_SIZE: u32 = 1;
/// `RENAME_NOREPLACE`.
const NOREPLACE: u32 = 1;
/// Bytes of a block of file data.
const BLOCK: usize = 4096;

/// What a filesystem has answered.
#[derive(Debug)]
pub enum Answer {
    /// No more than what a program learns.
    Reply(Reply),
    /// An inode was found or made.
    Entry(Entry),
    /// A file was made, or found, and opened.
    Created(Entry, Opened),
    /// The file with this number was opened.
    Opened(Ino, Opened),
}

/// Makes a call, through the open file `fh` where it needs one.
///
/// # Errors
/// What the filesystem says; EBADF without an open file, and ENOSYS for what only pages of
/// a kernel can answer.
pub async fn ask<P: Posix>(
    fs: &P,
    cx: &Caller,
    call: &Call,
    fh: Option<u64>,
) -> Result<Answer, Errno> {
    let open = || fh.ok_or(Errno::EBADF);
    Ok(Answer::Reply(match call {
        Call::Lookup { dir, name } => {
            let entry = fs.lookup(cx, *dir, name).await?;
            return match entry.attr.ino {
                0 => Err(Errno::ENOENT),
                _ => Ok(Answer::Entry(entry)),
            };
        }
        // As a kernel asks that does not have the inode.
        Call::ByHandle { ino } => return fs.lookup(cx, *ino, b".").await.map(Answer::Entry),
        Call::HandleParent { ino } => return fs.lookup(cx, *ino, b"..").await.map(Answer::Entry),
        Call::Getattr { ino } => Reply::Attr(fs.getattr(cx, *ino).await?.0),
        Call::Setattr { ino, set } => Reply::Attr(fs.setattr(cx, *ino, set).await?.0),
        Call::Readlink { ino } => Reply::Bytes(fs.readlink(cx, *ino).await?),
        Call::Mknod {
            dir,
            name,
            mode,
            rdev,
        } => {
            let made = fs.mknod(cx, *dir, name, *mode, *rdev, UMASK).await;
            return made.map(Answer::Entry);
        }
        Call::Mkdir { dir, name, mode } => {
            let made = fs.mkdir(cx, *dir, name, *mode, UMASK).await;
            return made.map(Answer::Entry);
        }
        Call::Symlink { dir, name, target } => {
            let made = fs.symlink(cx, *dir, name, target).await;
            return made.map(Answer::Entry);
        }
        Call::Link { ino, dir, name } => {
            let made = fs.link(cx, *ino, *dir, name).await;
            return made.map(Answer::Entry);
        }
        Call::Create {
            dir,
            name,
            mode,
            excl,
        } => {
            let flags = O_RDWR | O_CREAT | if *excl { O_EXCL } else { 0 };
            let (entry, opened) = fs.create(cx, *dir, name, *mode, UMASK, flags).await?;
            return Ok(Answer::Created(entry, opened));
        }
        Call::Tmpfile { dir, mode } => {
            let (entry, opened) = fs.tmpfile(cx, *dir, *mode, UMASK, O_RDWR).await?;
            return Ok(Answer::Created(entry, opened));
        }
        Call::Open { ino } | Call::OpenDirect { ino } => {
            let direct = matches!(call, Call::OpenDirect { .. });
            let flags = O_RDWR | if direct { O_DIRECT } else { 0 };
            let opened = fs.open(cx, *ino, flags).await?;
            return Ok(Answer::Opened(*ino, opened));
        }
        // A kernel opens first, and then cuts.
        Call::OpenTrunc { ino } => {
            let opened = fs.open(cx, *ino, O_RDWR).await?;
            let set = SetAttr {
                size: Some(0),
                ..SetAttr::default()
            };
            if let Err(error) = fs.setattr(cx, *ino, &set).await {
                fs.release(*ino, opened.fh).await;
                return Err(error);
            }
            return Ok(Answer::Opened(*ino, opened));
        }
        Call::Release { ino } => {
            fs.release(*ino, open()?).await;
            Reply::Done
        }
        Call::Unlink { dir, name } => done(fs.unlink(cx, *dir, name).await)?,
        Call::Rmdir { dir, name } => done(fs.rmdir(cx, *dir, name).await)?,
        Call::Rename {
            dir,
            name,
            to,
            new,
            noreplace,
        } => {
            let flags = if *noreplace { NOREPLACE } else { 0 };
            done(fs.rename(cx, *dir, name, *to, new, flags).await)?
        }
        Call::Exchange {
            dir,
            name,
            to,
            new,
            flags,
        } => done(fs.rename(cx, *dir, name, *to, new, *flags).await)?,
        Call::Read { ino, offset, len } => {
            let pieces = fs.read(cx, *ino, open()?, *offset, *len).await?;
            Reply::Bytes(pieces.concat().into())
        }
        Call::Write {
            ino,
            offset,
            len,
            tag,
            append,
            sync,
        } => {
            let data = blocks(pattern(*tag, *offset, *len));
            let how = WriteHow {
                append: *append,
                sync: *sync,
                ..WriteHow::default()
            };
            let written = fs.write(cx, *ino, open()?, *offset, data, how).await?;
            Reply::Number(u64::from(written))
        }
        Call::Fsync { ino } => done(fs.fsync(cx, *ino, open()?, false).await)?,
        Call::Syncfs => done(fs.syncfs().await)?,
        Call::Setxattr {
            ino,
            name,
            value,
            how,
        } => done(fs.setxattr(cx, *ino, name, value, *how).await)?,
        Call::Getxattr { ino, name } => Reply::Bytes(fs.getxattr(cx, *ino, name).await?),
        Call::Listxattr { ino } => Reply::Bytes(fs.listxattr(cx, *ino).await?),
        Call::Removexattr { ino, name } => done(fs.removexattr(cx, *ino, name).await)?,
        Call::Readdir { ino } => list(fs, cx, *ino, || (false, 50), |_| ()).await?,
        Call::Statfs => Reply::Stat(fs.statfs().await?),
        Call::Fallocate {
            ino,
            keep,
            offset,
            len,
        } => {
            let mode = if *keep { KEEP_SIZE } else { 0 };
            done(fs.fallocate(cx, *ino, open()?, mode, *offset, *len).await)?
        }
        Call::Punch {
            ino,
            mode,
            offset,
            len,
        } => done(fs.fallocate(cx, *ino, open()?, *mode, *offset, *len).await)?,
        Call::Seek { ino, offset, hole } => {
            let whence = if *hole { Whence::Hole } else { Whence::Data };
            Reply::Number(fs.lseek(cx, *ino, open()?, *offset, whence).await?)
        }
        Call::Fiemap { ino } => Reply::Extents(fs.fiemap(cx, *ino, 0, u64::MAX, usize::MAX).await?),
        Call::MapRead { .. } | Call::MapWrite { .. } | Call::WritePages { .. } => {
            return Err(Errno::ENOSYS);
        }
    }))
}

fn done(result: Result<(), Errno>) -> Result<Reply, Errno> {
    result.map(|()| Reply::Done)
}

/// Data of a write: whole blocks come in memory of their own, as from the kernel.
pub fn blocks(data: Bytes) -> WriteData {
    match !data.is_empty() && data.len().is_multiple_of(BLOCK) {
        true => WriteData::Blocks(AlignedBuf::copy_of(&data)),
        false => data.into(),
    }
}

/// Reads a whole directory. Once it is open, `how` says whether the entries come with
/// their inodes, which `seen` is told, and how many at a time.
///
/// # Errors
/// What the filesystem says.
pub async fn list<P: Posix>(
    fs: &P,
    cx: &Caller,
    ino: Ino,
    how: impl FnOnce() -> (bool, usize),
    seen: impl Fn(&Entry),
) -> Result<Reply, Errno> {
    let opened = fs.opendir(cx, ino, 0).await?;
    let (plus, batch) = how();
    let (mut names, mut offset) = (Vec::new(), 0);
    let result = loop {
        let (before, at, mut room) = (names.len(), offset, batch);
        let mut take = |entry: DirEntry| {
            if room == 0 {
                return false;
            }
            room -= 1;
            offset = entry.next;
            entry.entry.iter().for_each(&seen);
            names.push((entry.ino, entry.dtype, entry.name));
            true
        };
        let sink: &mut dyn FnMut(DirEntry) -> bool = &mut take;
        if let Err(error) = fs.readdir(cx, ino, opened.fh, at, plus, sink).await {
            break Err(error);
        }
        if names.len() == before {
            break Ok(Reply::Names(names));
        }
    };
    fs.releasedir(ino, opened.fh).await;
    result
}

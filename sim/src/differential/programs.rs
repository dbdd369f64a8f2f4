//! Plays a script as programs do: with system calls, on a mounted directory.
//!
//! Inodes are found by the names that the script has given them, or as open files. Their
//! numbers may be others: a call that fails may use one up, and the kernel refuses some calls
//! by itself. What no program can ask through FUSE (extents) is left to the other side's word.

// This is the real machine.
#![allow(clippy::disallowed_types, clippy::disallowed_methods)]

use super::script::Step;
use crate::model::{Call, ROOT, Reply, pattern};
use bytes::Bytes;
use outrider_core::env::WallTime;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Attr, Ino, SetAttr, SetTime, StatFs, XattrSet};
use rustix::fs as sys;
use rustix::fs::{AtFlags, Mode, OFlags};
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{File, symlink_metadata};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Greatest value and list of extended attributes.
const XATTR_MAX: usize = 64 << 10;

/// The programs.
pub struct Programs {
    root: PathBuf,
    names: BTreeMap<(Ino, Bytes), Ino>,
    /// The script's number of an inode, by its number here.
    numbers: BTreeMap<Ino, Ino>,
    open: BTreeMap<u32, (Ino, File)>,
}

/// The number in the other side's word of an inode that is new here.
fn word_of(word: &Reply, here: Ino) -> Ino {
    match word {
        Reply::Entry(attr) => attr.ino,
        _ => here,
    }
}

fn to_reply(error: &Error) -> Reply {
    Reply::Err(Errno(error.raw_os_error().unwrap_or(5)))
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

/// A number as the filesystem keeps it: `major << 20 | minor`.
fn packed(rdev: u64) -> u32 {
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    (major << 20) | minor
}

impl Programs {
    /// Programs below a mount point.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            names: BTreeMap::new(),
            numbers: BTreeMap::new(),
            open: BTreeMap::new(),
        }
    }

    /// Makes a call; `word` is what the other side has answered to it.
    pub fn play(&mut self, step: &Step, word: &Reply) -> Reply {
        let reply = self.perform(step, word);
        let mut reply = reply.unwrap_or_else(|error| to_reply(&error));
        if let (Reply::Entry(attr), Reply::Entry(word)) = (&reply, word) {
            self.numbers.entry(attr.ino).or_insert(word.ino);
        }
        match &mut reply {
            Reply::Entry(attr) | Reply::Attr(attr) => attr.ino = self.number(attr.ino),
            Reply::Names(names) => {
                for (ino, _, _) in names {
                    *ino = self.number(*ino);
                }
            }
            _ => {}
        }
        self.learn(&step.call, &reply);
        reply
    }

    fn number(&self, here: Ino) -> Ino {
        self.numbers.get(&here).copied().unwrap_or(here)
    }

    fn learn(&mut self, call: &Call, reply: &Reply) {
        if matches!(reply, Reply::Err(_)) {
            return;
        }
        if let (Some((dir, name)), Reply::Entry(attr)) = (call.makes(), reply) {
            self.names.insert((dir, name.clone()), attr.ino);
        }
        match call {
            Call::Unlink { dir, name } | Call::Rmdir { dir, name } => {
                self.names.remove(&(*dir, name.clone()));
            }
            Call::Rename {
                dir, name, to, new, ..
            } => {
                if let Some(ino) = self.names.remove(&(*dir, name.clone())) {
                    self.names.insert((*to, new.clone()), ino);
                }
            }
            _ => {}
        }
    }

    /// A path of an inode, and whether it is a link that leads to it.
    fn path(&self, ino: Ino) -> Result<PathBuf> {
        if ino == ROOT {
            return Ok(self.root.clone());
        }
        let named = self.names.iter().find(|(_, of)| **of == ino);
        if let Some(((dir, name), _)) = named {
            return self.named(*dir, name);
        }
        let open = self.open.values().find(|(of, _)| *of == ino);
        let (_, file) = open.ok_or_else(|| Error::from_raw_os_error(libc::ESTALE))?;
        Ok(format!("/proc/self/fd/{}", file.as_raw_fd()).into())
    }

    fn named(&self, dir: Ino, name: &Bytes) -> Result<PathBuf> {
        Ok(self.path(dir)?.join(OsStr::from_bytes(name)))
    }

    fn file(&self, step: &Step) -> Result<&File> {
        let open = step.file.and_then(|file| self.open.get(&file));
        let open = open.ok_or_else(|| Error::from_raw_os_error(libc::EBADF))?;
        Ok(&open.1)
    }

    fn opened(&mut self, step: &Step, file: File, word: &Reply) -> Result<Attr> {
        let attr = attr_of(&file.metadata()?);
        let number = step.file.ok_or_else(|| Error::from(ErrorKind::Other))?;
        let known = self.numbers.get(&attr.ino).copied();
        self.open.insert(
            number,
            (known.unwrap_or_else(|| word_of(word, attr.ino)), file),
        );
        Ok(attr)
    }

    fn entry(&self, dir: Ino, name: &Bytes) -> Result<Reply> {
        let path = self.named(dir, name)?;
        Ok(Reply::Entry(attr_of(&symlink_metadata(path)?)))
    }

    fn attr(&self, ino: Ino) -> Result<Reply> {
        let path = self.path(ino)?;
        let follow = path.starts_with("/proc/self/fd");
        let metadata = match follow {
            true => std::fs::metadata(path)?,
            false => symlink_metadata(path)?,
        };
        Ok(Reply::Attr(attr_of(&metadata)))
    }

    fn perform(&mut self, step: &Step, word: &Reply) -> Result<Reply> {
        match &step.call {
            Call::Lookup { dir, name } => self.entry(*dir, name),
            Call::Getattr { ino } => self.attr(*ino),
            Call::Setattr { ino, set } => self.set(*ino, set),
            Call::Readlink { ino } => {
                let target = std::fs::read_link(self.path(*ino)?)?;
                Ok(Reply::Bytes(target.as_os_str().as_bytes().to_vec().into()))
            }
            Call::Mknod {
                dir,
                name,
                mode,
                rdev,
            } => {
                let kind = sys::FileType::from_raw_mode(*mode);
                let device = sys::makedev(rdev >> 20, rdev & 0xf_ffff);
                let path = self.named(*dir, name)?;
                sys::mknodat(sys::CWD, path, kind, permissions(*mode), device)?;
                self.entry(*dir, name)
            }
            Call::Mkdir { dir, name, mode } => {
                sys::mkdir(self.named(*dir, name)?, permissions(*mode))?;
                self.entry(*dir, name)
            }
            Call::Symlink { dir, name, target } => {
                sys::symlink(OsStr::from_bytes(target), self.named(*dir, name)?)?;
                self.entry(*dir, name)
            }
            Call::Create {
                dir,
                name,
                mode,
                excl,
            } => {
                let excl = if *excl { OFlags::EXCL } else { OFlags::empty() };
                let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | excl;
                let fd = sys::open(self.named(*dir, name)?, flags, permissions(*mode))?;
                Ok(Reply::Entry(self.opened(step, fd.into(), word)?))
            }
            Call::Tmpfile { dir, mode } => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                let fd = sys::open(self.path(*dir)?, flags, permissions(*mode))?;
                Ok(Reply::Entry(self.opened(step, fd.into(), word)?))
            }
            Call::Unlink { dir, name } => {
                sys::unlink(self.named(*dir, name)?)?;
                Ok(Reply::Done)
            }
            Call::Rmdir { dir, name } => {
                sys::rmdir(self.named(*dir, name)?)?;
                Ok(Reply::Done)
            }
            Call::Rename {
                dir,
                name,
                to,
                new,
                noreplace,
            } => {
                let flags = match noreplace {
                    true => sys::RenameFlags::NOREPLACE,
                    false => sys::RenameFlags::empty(),
                };
                let (from, to) = (self.named(*dir, name)?, self.named(*to, new)?);
                sys::renameat_with(sys::CWD, from, sys::CWD, to, flags)?;
                Ok(Reply::Done)
            }
            Call::Link { ino, dir, name } => {
                let (from, to) = (self.path(*ino)?, self.named(*dir, name)?);
                sys::linkat(sys::CWD, from, sys::CWD, to, AtFlags::empty())?;
                self.entry(*dir, name)
            }
            Call::Open { ino } | Call::OpenDirect { ino } | Call::OpenTrunc { ino } => {
                let path = self.path(*ino)?;
                let how = match step.call {
                    Call::OpenDirect { .. } => OFlags::DIRECT,
                    Call::OpenTrunc { .. } => OFlags::TRUNC,
                    _ => OFlags::empty(),
                };
                let fd = sys::open(path, OFlags::RDWR | OFlags::CLOEXEC | how, Mode::empty())?;
                self.opened(step, fd.into(), word)?;
                Ok(Reply::Done)
            }
            Call::Release { .. } => {
                let open = step.file.and_then(|file| self.open.remove(&file));
                match open {
                    Some(_) => Ok(Reply::Done),
                    None => Err(Error::from_raw_os_error(libc::EBADF)),
                }
            }
            Call::Statfs => self.statfs(),
            Call::Syncfs => {
                sys::syncfs(File::open(&self.root)?)?;
                Ok(Reply::Done)
            }
            Call::Readdir { ino } => self.readdir(*ino),
            Call::Setxattr { .. }
            | Call::Getxattr { .. }
            | Call::Listxattr { .. }
            | Call::Removexattr { .. } => self.xattr(&step.call),
            // FUSE has no way to ask for it.
            Call::Fiemap { .. } => Ok(word.clone()),
            _ => self.of_open_file(step),
        }
    }

    fn of_open_file(&self, step: &Step) -> Result<Reply> {
        let file = self.file(step)?;
        match &step.call {
            Call::Read { offset, len, .. } => {
                let mut bytes = vec![0; *len as usize];
                let mut got = 0;
                while got < bytes.len() {
                    let more = file.read_at(&mut bytes[got..], offset + got as u64)?;
                    if more == 0 {
                        break;
                    }
                    got += more;
                }
                bytes.truncate(got);
                Ok(Reply::Bytes(bytes.into()))
            }
            Call::Write {
                offset, len, tag, ..
            } => {
                let written = file.write_at(&pattern(*tag, *offset, *len), *offset)?;
                Ok(Reply::Number(written as u64))
            }
            Call::Fsync { .. } => {
                file.sync_all()?;
                Ok(Reply::Done)
            }
            Call::Fallocate {
                keep, offset, len, ..
            } => {
                let mode = match keep {
                    true => sys::FallocateFlags::KEEP_SIZE,
                    false => sys::FallocateFlags::empty(),
                };
                sys::fallocate(file, mode, *offset, *len)?;
                Ok(Reply::Done)
            }
            Call::Seek { offset, hole, .. } => {
                let from = match hole {
                    true => sys::SeekFrom::Hole(*offset),
                    false => sys::SeekFrom::Data(*offset),
                };
                Ok(Reply::Number(sys::seek(file, from)?))
            }
            _ => Err(Error::from_raw_os_error(libc::ENOSYS)),
        }
    }

    fn set(&self, ino: Ino, set: &SetAttr) -> Result<Reply> {
        let path = self.path(ino)?;
        if let Some(mode) = set.mode {
            sys::chmod(&path, permissions(mode))?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            std::os::unix::fs::chown(&path, set.uid, set.gid)?;
        }
        if let Some(size) = set.size {
            let text = CString::new(path.as_os_str().as_bytes())?;
            // SAFETY: a string that ends in NUL.
            let done = unsafe { libc::truncate(text.as_ptr(), size as libc::off_t) };
            if done != 0 {
                return Err(Error::last_os_error());
            }
        }
        if let (Some(SetTime::At(atime)), Some(SetTime::At(mtime))) = (set.atime, set.mtime) {
            let time = |time: WallTime| rustix::time::Timespec {
                tv_sec: time.sec,
                tv_nsec: i64::from(time.nsec),
            };
            let times = sys::Timestamps {
                last_access: time(atime),
                last_modification: time(mtime),
            };
            sys::utimensat(sys::CWD, &path, &times, AtFlags::empty())?;
        }
        self.attr(ino)
    }

    fn xattr(&self, call: &Call) -> Result<Reply> {
        let text = |name: &Bytes| OsStr::from_bytes(name).to_owned();
        match call {
            Call::Setxattr {
                ino,
                name,
                value,
                how,
            } => {
                let flags = match how {
                    XattrSet::Any => sys::XattrFlags::empty(),
                    XattrSet::Create => sys::XattrFlags::CREATE,
                    XattrSet::Replace => sys::XattrFlags::REPLACE,
                };
                sys::lsetxattr(self.path(*ino)?, text(name), value, flags)?;
                Ok(Reply::Done)
            }
            Call::Getxattr { ino, name } => {
                let mut value = vec![0; XATTR_MAX];
                let len = sys::lgetxattr(self.path(*ino)?, text(name), &mut value[..])?;
                value.truncate(len);
                Ok(Reply::Bytes(value.into()))
            }
            Call::Listxattr { ino } => {
                let mut list = vec![0; XATTR_MAX];
                let len = sys::llistxattr(self.path(*ino)?, &mut list[..])?;
                list.truncate(len);
                Ok(Reply::Bytes(list.into()))
            }
            Call::Removexattr { ino, name } => {
                sys::lremovexattr(self.path(*ino)?, text(name))?;
                Ok(Reply::Done)
            }
            _ => Err(Error::from_raw_os_error(libc::ENOSYS)),
        }
    }

    fn readdir(&self, ino: Ino) -> Result<Reply> {
        let dir = File::open(self.path(ino)?)?;
        let mut names = Vec::new();
        for entry in sys::Dir::read_from(dir)? {
            let entry = entry?;
            let dtype = (entry.file_type().as_raw_mode() >> 12) as u8;
            let name = Bytes::copy_from_slice(entry.file_name().to_bytes());
            names.push((entry.ino(), dtype, name));
        }
        Ok(Reply::Names(names))
    }

    fn statfs(&self) -> Result<Reply> {
        let stat = sys::statvfs(&self.root)?;
        Ok(Reply::Stat(StatFs {
            blocks: stat.f_blocks,
            free: stat.f_bfree,
            files: stat.f_files,
            files_free: stat.f_ffree,
        }))
    }
}

fn attr_of(metadata: &std::fs::Metadata) -> Attr {
    let time = |sec: i64, nsec: i64| WallTime {
        sec,
        nsec: nsec as u32,
    };
    let born = |created: SystemTime| {
        let since = created.duration_since(UNIX_EPOCH).unwrap_or_default();
        time(since.as_secs() as i64, i64::from(since.subsec_nanos()))
    };
    Attr {
        ino: metadata.ino(),
        size: metadata.size(),
        blocks: metadata.blocks(),
        atime: time(metadata.atime(), metadata.atime_nsec()),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        crtime: metadata.created().map_or(WallTime::default(), born),
        mode: metadata.mode(),
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: packed(metadata.rdev()),
    }
}

//! One request carried out on the model, and comparison of answers.

use super::acl::is_acl;
use super::{
    BLOCK, Block, Call, Context, Dirent, Inode, Model, Reply, S_IFDIR, S_IFLNK, S_IFREG, Stamp,
    new_inode,
};
use bytes::Bytes;
use outrider_core::env::WallTime;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Attr, Ino, SetAttr, SetTime, XattrSet};
use std::rc::Rc;

/// All errors that apply; which one is seen is not prescribed.
pub(super) type Errors = Vec<Errno>;

fn gone() -> Errors {
    vec![Errno::ENOENT, Errno::ESTALE]
}

/// Nanoseconds since 1970; `None` beyond their range (about year 2262).
pub fn wall_nanos(time: WallTime) -> Option<i64> {
    time.sec
        .checked_mul(1_000_000_000)?
        .checked_add(i64::from(time.nsec))
}

/// What the model would answer. Attributes are compared with the state instead.
#[derive(Debug)]
pub enum Expected {
    Done,
    /// The attributes of an inode, as an entry or by themselves.
    Attr(Ino),
    Bytes(Vec<u8>),
    /// Names, in any order, each ended by NUL.
    NameList,
    Number(u64),
    /// At most so many bytes written.
    Written(u64),
    /// At most so many bytes stored to a mapping.
    Stored(u64),
    Entries(Ino),
    Extents(Ino),
    Anything,
}

impl Model {
    pub(super) fn live(&self, ino: Ino) -> Result<&Inode, Errors> {
        self.get(ino).ok_or_else(gone)
    }

    fn dir(&self, ino: Ino) -> Result<&Inode, Errors> {
        let dir = self.live(ino)?;
        if dir.is_dir() {
            Ok(dir)
        } else {
            Err(vec![Errno::ENOTDIR])
        }
    }

    fn file(&self, ino: Ino) -> Result<&Inode, Errors> {
        let file = self.live(ino)?;
        if file.is_file() {
            Ok(file)
        } else {
            Err(vec![
                Errno::EINVAL,
                Errno::EISDIR,
                Errno::EOPNOTSUPP,
                Errno::EBADF,
                Errno::ENODEV,
            ])
        }
    }

    /// Errors of adding `name` to `dir`.
    fn may_add(&self, dir: Ino, name: &Bytes) -> Result<(), Errors> {
        let inode = self.dir(dir)?;
        let mut errors = Vec::new();
        if name.len() > 255 {
            errors.push(Errno::ENAMETOOLONG);
        }
        if inode.nlink == 0 {
            errors.extend(gone());
        }
        if inode.entries.contains_key(name) {
            errors.push(Errno::EEXIST);
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }

    fn add_entry(&mut self, dir: Ino, name: &Bytes, ino: Ino, cx: &Context) {
        let is_dir = self.get(ino).is_some_and(Inode::is_dir);
        let inode = self.get_mut(dir);
        inode.entries.insert(
            name.clone(),
            Dirent {
                ino,
                born: (cx.start, cx.end),
            },
        );
        inode.size += name.len() as u64;
        inode.nlink += u32::from(is_dir);
        inode.mtime.set(cx);
        inode.ctime.set(cx);
        if is_dir {
            self.get_mut(ino).parent = dir;
        }
    }

    fn remove_entry(&mut self, dir: Ino, name: &Bytes, cx: &Context) -> Ino {
        let inode = self.get_mut(dir);
        let entry = inode.entries.remove(name).expect("an entry checked before");
        inode.size -= name.len() as u64;
        inode.mtime.set(cx);
        inode.ctime.set(cx);
        let is_dir = self.get(entry.ino).is_some_and(Inode::is_dir);
        if is_dir {
            self.get_mut(dir).nlink -= 1;
        }
        entry.ino
    }

    fn drop_link(&mut self, ino: Ino, cx: &Context) {
        let inode = self.get_mut(ino);
        inode.nlink = if inode.is_dir() { 0 } else { inode.nlink - 1 };
        inode.ctime.set(cx);
    }

    /// The number of an inode that the call made: the one it answered with.
    fn made(&self, reply: Option<&Reply>) -> Result<Ino, Errors> {
        match reply {
            Some(Reply::Entry(attr)) if !self.inodes.contains_key(&attr.ino) => Ok(attr.ino),
            // A number in use: no state admits this answer.
            _ => Err(Vec::new()),
        }
    }

    /// Makes an inode in a directory, of which it inherits; with a name, or without one.
    fn make(
        &mut self,
        (dir, name): (Ino, Option<&Bytes>),
        mut inode: Inode,
        reply: Option<&Reply>,
        cx: &Context,
    ) -> Result<Expected, Errors> {
        let ino = self.made(reply)?;
        inode.inherit(self.live(dir)?);
        self.inodes.insert(ino, Rc::new(inode));
        if let Some(name) = name {
            self.add_entry(dir, name, ino, cx);
        }
        Ok(Expected::Attr(ino))
    }

    /// Carries out `call`. An inode it makes gets the number in `reply`.
    pub(super) fn execute(
        &mut self,
        call: &Call,
        reply: Option<&Reply>,
        cx: &Context,
    ) -> Result<Expected, Errors> {
        match call {
            Call::Lookup { dir, name } => {
                let entry = self.dir(*dir)?.entries.get(name);
                let entry = entry.ok_or_else(|| vec![Errno::ENOENT])?;
                Ok(Expected::Attr(entry.ino))
            }
            Call::Getattr { ino } => {
                self.live(*ino)?;
                Ok(Expected::Attr(*ino))
            }
            Call::Setattr { ino, set } => self.setattr(*ino, set, cx),
            Call::Readlink { ino } => Ok(Expected::Bytes(self.live(*ino)?.target.to_vec())),
            Call::Mknod {
                dir,
                name,
                mode,
                rdev,
            } => {
                self.may_add(*dir, name)?;
                self.make((*dir, Some(name)), new_inode(*mode, *rdev, cx), reply, cx)
            }
            Call::Mkdir { dir, name, mode } => {
                self.may_add(*dir, name)?;
                let mut inode = new_inode(S_IFDIR | mode, 0, cx);
                inode.nlink = 2;
                self.make((*dir, Some(name)), inode, reply, cx)
            }
            Call::Symlink { dir, name, target } => {
                self.may_add(*dir, name)?;
                let mut inode = new_inode(S_IFLNK | 0o777, 0, cx);
                inode.target = target.clone();
                inode.size = target.len() as u64 + 1;
                self.make((*dir, Some(name)), inode, reply, cx)
            }
            Call::Create {
                dir,
                name,
                mode,
                excl,
            } => self.create(*dir, name, *mode, *excl, reply, cx),
            Call::Tmpfile { dir, mode } => {
                if self.dir(*dir)?.nlink == 0 {
                    return Err(gone());
                }
                let mut inode = new_inode(S_IFREG | mode, 0, cx);
                inode.nlink = 0;
                inode.opens = 1;
                self.make((*dir, None), inode, reply, cx)
            }
            Call::Unlink { dir, name } => self.remove(*dir, name, false, cx),
            Call::Rmdir { dir, name } => self.remove(*dir, name, true, cx),
            Call::Rename {
                dir,
                name,
                to,
                new,
                noreplace,
            } => self.rename((*dir, name), (*to, new), *noreplace, cx),
            Call::Link { ino, dir, name } => {
                if self.live(*ino)?.is_dir() {
                    return Err(vec![Errno::EPERM]);
                }
                self.may_add(*dir, name)?;
                let inode = self.get_mut(*ino);
                inode.nlink += 1;
                inode.ctime.set(cx);
                self.add_entry(*dir, name, *ino, cx);
                Ok(Expected::Attr(*ino))
            }
            Call::Open { ino } | Call::OpenDirect { ino } => {
                self.live(*ino)?;
                self.get_mut(*ino).opens += 1;
                Ok(Expected::Done)
            }
            Call::OpenTrunc { ino } => {
                self.file(*ino)?;
                let inode = self.get_mut(*ino);
                inode.opens += 1;
                inode.truncate(0);
                inode.mtime.set(cx);
                inode.ctime.set(cx);
                Ok(Expected::Done)
            }
            Call::Release { ino } => {
                if self.inodes.contains_key(ino) {
                    let inode = self.get_mut(*ino);
                    inode.opens = inode.opens.saturating_sub(1);
                }
                Ok(Expected::Done)
            }
            Call::Read { ino, offset, len } | Call::MapRead { ino, offset, len } => Ok(
                Expected::Bytes(self.file(*ino)?.read(*offset, u64::from(*len))),
            ),
            Call::MapWrite {
                ino,
                offset,
                len,
                tag,
            } => {
                let room = self.file(*ino)?.size.saturating_sub(*offset);
                let most = u64::from(*len).min(room);
                // The program decides how far it goes.
                let stored = match reply {
                    Some(Reply::Number(number)) => *number,
                    _ => most,
                };
                if stored > 0 && stored <= most {
                    self.get_mut(*ino).store(*offset, *tag, stored);
                }
                Ok(Expected::Stored(most))
            }
            Call::WritePages { ino, offset, data } => {
                self.file(*ino)?;
                let inode = self.get_mut(*ino);
                inode.write_back(*offset, &data.0);
                inode.mtime.set(cx);
                inode.ctime.set(cx);
                Ok(Expected::Number(data.0.len() as u64))
            }
            Call::Write {
                ino,
                offset,
                len,
                tag,
                append,
                ..
            } => {
                let file = self.file(*ino)?;
                let offset = if *append { file.size } else { *offset };
                let taken = match reply {
                    Some(Reply::Number(number)) => (*number).min(u64::from(*len)),
                    _ => u64::from(*len),
                };
                let inode = self.get_mut(*ino);
                inode.write(offset, *tag, taken);
                inode.mtime.set(cx);
                inode.ctime.set(cx);
                Ok(Expected::Written(u64::from(*len)))
            }
            Call::Fsync { ino } => {
                self.live(*ino)?;
                Ok(Expected::Done)
            }
            Call::Syncfs => Ok(Expected::Done),
            Call::Setxattr {
                ino, name, value, ..
            } if is_acl(name) => self.set_acl(*ino, name, Some(value), cx),
            Call::Removexattr { ino, name } if is_acl(name) => self.set_acl(*ino, name, None, cx),
            Call::Setxattr {
                ino,
                name,
                value,
                how,
            } => {
                let exists = self.live(*ino)?.xattrs.contains_key(name);
                match how {
                    XattrSet::Create if exists => return Err(vec![Errno::EEXIST]),
                    XattrSet::Replace if !exists => return Err(vec![Errno::ENODATA]),
                    _ => {}
                }
                let inode = self.get_mut(*ino);
                inode.xattrs.insert(name.clone(), value.clone());
                inode.ctime.set(cx);
                Ok(Expected::Done)
            }
            Call::Getxattr { ino, name } => {
                let value = self.live(*ino)?.xattrs.get(name);
                let value = value.ok_or_else(|| vec![Errno::ENODATA])?;
                Ok(Expected::Bytes(value.to_vec()))
            }
            Call::Listxattr { ino } => {
                self.live(*ino)?;
                Ok(Expected::NameList)
            }
            Call::Removexattr { ino, name } => {
                if !self.live(*ino)?.xattrs.contains_key(name) {
                    return Err(vec![Errno::ENODATA]);
                }
                let inode = self.get_mut(*ino);
                inode.xattrs.remove(name);
                inode.ctime.set(cx);
                Ok(Expected::Done)
            }
            Call::Readdir { ino } => {
                self.dir(*ino)?;
                Ok(Expected::Entries(*ino))
            }
            Call::Statfs => Ok(Expected::Anything),
            Call::Fallocate {
                ino,
                keep,
                offset,
                len,
            } => {
                let size = self.file(*ino)?.size;
                let end = offset + len;
                self.get_mut(*ino).finish_truncate();
                if !keep && end > size {
                    let inode = self.get_mut(*ino);
                    inode.size = end;
                    inode.mtime.may_set(cx);
                    inode.ctime.may_set(cx);
                }
                Ok(Expected::Done)
            }
            Call::Seek { ino, offset, hole } => {
                let file = self.file(*ino)?;
                let at = seek(file, *offset, *hole).ok_or_else(|| vec![Errno::ENXIO])?;
                Ok(Expected::Number(at))
            }
            Call::Fiemap { ino } => {
                self.file(*ino)?;
                Ok(Expected::Extents(*ino))
            }
            Call::ByHandle { ino } => match self.live(*ino)?.nlink {
                0 => Err(gone()),
                _ => Ok(Expected::Attr(*ino)),
            },
            // Two lookups: while names move, of two moments.
            Call::HandleParent { .. } if cx.weak => Ok(Expected::Anything),
            Call::HandleParent { ino } => {
                let dir = self.dir(*ino)?;
                match dir.nlink {
                    0 => Err(gone()),
                    _ => Ok(Expected::Attr(dir.parent)),
                }
            }
            Call::Exchange { .. } => Err(vec![Errno::EINVAL]),
            Call::Punch { .. } => Err(vec![Errno::EOPNOTSUPP]),
        }
    }

    fn setattr(&mut self, ino: Ino, set: &SetAttr, cx: &Context) -> Result<Expected, Errors> {
        let inode = self.live(ino)?;
        if set.size.is_some() && !inode.is_file() {
            return Err(vec![Errno::EINVAL, Errno::EISDIR]);
        }
        let inode = self.get_mut(ino);
        if let Some(size) = set.size {
            inode.truncate(size);
            inode.mtime.set(cx);
        }
        if set.uid.is_some() || set.gid.is_some() {
            inode.lose_set_ids();
        }
        if let Some(mode) = set.mode {
            inode.chmod(mode);
        }
        inode.uid = set.uid.unwrap_or(inode.uid);
        inode.gid = set.gid.unwrap_or(inode.gid);
        match set.mtime {
            Some(SetTime::Now) => inode.mtime.set(cx),
            Some(SetTime::At(time)) => {
                inode.mtime = wall_nanos(time).map_or_else(Stamp::default, Stamp::exact);
            }
            None => {}
        }
        inode.ctime.set(cx);
        Ok(Expected::Attr(ino))
    }

    fn create(
        &mut self,
        dir: Ino,
        name: &Bytes,
        mode: u32,
        excl: bool,
        reply: Option<&Reply>,
        cx: &Context,
    ) -> Result<Expected, Errors> {
        let existing = self.dir(dir)?.entries.get(name).map(|entry| entry.ino);
        if let Some(ino) = existing
            && !excl
        {
            let inode = self.live(ino)?;
            if inode.is_dir() {
                return Err(vec![Errno::EISDIR, Errno::EEXIST, Errno::ESTALE]);
            }
            if !inode.is_file() && matches!(reply, Some(Reply::Err(_))) {
                // The kernel opens what is there by itself; a daemon asked to
                // create over it may only say so.
                return Err(vec![
                    Errno::EEXIST,
                    Errno::ELOOP,
                    Errno::EINVAL,
                    Errno::ENXIO,
                    Errno::ESTALE,
                ]);
            }
            // The file may also be reported as being there (spec 12 section 11).
            if matches!(reply, Some(Reply::Err(_))) {
                return Err(vec![Errno::EEXIST, Errno::ESTALE]);
            }
            self.get_mut(ino).opens += 1;
            return Ok(Expected::Attr(ino));
        }
        self.may_add(dir, name)?;
        let mut inode = new_inode(S_IFREG | mode, 0, cx);
        inode.opens = 1;
        self.make((dir, Some(name)), inode, reply, cx)
    }

    fn remove(
        &mut self,
        dir: Ino,
        name: &Bytes,
        directory: bool,
        cx: &Context,
    ) -> Result<Expected, Errors> {
        let entry = self.dir(dir)?.entries.get(name);
        let ino = entry.ok_or_else(|| vec![Errno::ENOENT])?.ino;
        let inode = self.live(ino)?;
        match (directory, inode.is_dir()) {
            (true, false) => return Err(vec![Errno::ENOTDIR]),
            (false, true) => return Err(vec![Errno::EISDIR, Errno::EPERM]),
            (true, true) if !inode.entries.is_empty() => return Err(vec![Errno::ENOTEMPTY]),
            _ => {}
        }
        self.remove_entry(dir, name, cx);
        self.drop_link(ino, cx);
        Ok(Expected::Done)
    }

    fn is_ancestor(&self, ancestor: Ino, mut ino: Ino) -> bool {
        loop {
            if ino == ancestor {
                return true;
            }
            match self.get(ino) {
                Some(inode) if ino != super::ROOT && inode.parent != ino => ino = inode.parent,
                _ => return false,
            }
        }
    }

    fn rename(
        &mut self,
        from: (Ino, &Bytes),
        to: (Ino, &Bytes),
        noreplace: bool,
        cx: &Context,
    ) -> Result<Expected, Errors> {
        let source = self.dir(from.0)?.entries.get(from.1).map(|entry| entry.ino);
        let target_dir = self.dir(to.0)?;
        let target = target_dir.entries.get(to.1).map(|entry| entry.ino);
        let mut errors = Vec::new();
        if to.1.len() > 255 {
            errors.push(Errno::ENAMETOOLONG);
        }
        if target_dir.nlink == 0 {
            errors.extend(gone());
        }
        let Some(source) = source else {
            errors.push(Errno::ENOENT);
            return Err(errors);
        };
        if noreplace && target.is_some() {
            errors.push(Errno::EEXIST);
        }
        let moved = self.live(source)?;
        if moved.is_dir() && self.is_ancestor(source, to.0) {
            errors.push(Errno::EINVAL);
        }
        if let Some(target) = target {
            if target == source && errors.is_empty() {
                return Ok(Expected::Done);
            }
            let replaced = self.live(target)?;
            match (moved.is_dir(), replaced.is_dir()) {
                (true, false) => errors.push(Errno::ENOTDIR),
                (false, true) => errors.push(Errno::EISDIR),
                _ => {}
            }
            if !replaced.entries.is_empty() {
                errors.push(Errno::ENOTEMPTY);
            }
            if replaced.is_dir() && self.is_ancestor(target, from.0) {
                errors.extend([Errno::ENOTEMPTY, Errno::EINVAL]);
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        if let Some(target) = target {
            self.remove_entry(to.0, to.1, cx);
            self.drop_link(target, cx);
        }
        self.remove_entry(from.0, from.1, cx);
        self.add_entry(to.0, to.1, source, cx);
        self.get_mut(source).ctime.set(cx);
        Ok(Expected::Done)
    }

    /// Whether the answer fits what was expected; learns exact times from it.
    pub(super) fn admits(
        &mut self,
        call: &Call,
        expected: Expected,
        reply: &Reply,
        cx: &Context,
    ) -> bool {
        match (expected, reply) {
            (_, Reply::Err(_)) => false,
            (Expected::Anything, _) | (Expected::Done, Reply::Done) => true,
            (Expected::Attr(ino), Reply::Entry(attr) | Reply::Attr(attr)) => {
                attr.ino == ino && (cx.weak || self.admits_attr(ino, attr))
            }
            (Expected::Attr(ino), Reply::Found(found)) => ino == *found,
            (Expected::Bytes(want), Reply::Bytes(got)) => cx.weak || want == got[..],
            (Expected::NameList, Reply::Bytes(got)) => self.admits_name_list(call, got),
            (Expected::Number(want), Reply::Number(got)) => cx.weak || want == *got,
            (Expected::Written(most), Reply::Number(got)) => {
                *got == most || (*got > 0 && *got < most && (cx.tolerance.space || cx.tolerance.io))
            }
            (Expected::Stored(most), Reply::Number(got)) => *got <= most,
            (Expected::Entries(dir), Reply::Names(names)) => {
                cx.weak || self.admits_names(dir, names)
            }
            (Expected::Extents(ino), Reply::Extents(extents)) => {
                let Some(file) = self.get(ino) else {
                    return false;
                };
                cx.weak
                    || extents
                        .iter()
                        .filter(|extent| extent.flags & 0x802 == 0)
                        .flat_map(|e| e.logical / BLOCK..(e.logical + e.length) / BLOCK)
                        .eq(file.blocks.keys().copied())
            }
            _ => false,
        }
    }

    fn admits_attr(&mut self, ino: Ino, attr: &Attr) -> bool {
        let Some(inode) = self.get(ino) else {
            return false;
        };
        let (Some(mtime), Some(ctime)) = (wall_nanos(attr.mtime), wall_nanos(attr.ctime)) else {
            return false;
        };
        // Its blocks go in several transactions (spec 11, spec 12 section 23).
        let half_deleted = inode.is_ghost() && attr.blocks < inode.blocks.len() as u64 * 8;
        let same = attr.mode == inode.mode
            && attr.nlink == inode.nlink
            && (attr.uid, attr.gid) == (inode.uid, inode.gid)
            && attr.rdev == inode.rdev
            && attr.size == inode.size
            && (attr.blocks == inode.blocks.len() as u64 * 8 || half_deleted)
            && inode.mtime.admits(mtime)
            && inode.ctime.admits(ctime);
        if same && (inode.mtime.low != inode.mtime.high || inode.ctime.low != inode.ctime.high) {
            let inode = self.get_mut(ino);
            (inode.mtime.low, inode.mtime.high) = (mtime, mtime);
            (inode.ctime.low, inode.ctime.high) = (ctime, ctime);
        }
        same
    }

    fn admits_name_list(&self, call: &Call, got: &Bytes) -> bool {
        let Call::Listxattr { ino } = call else {
            return false;
        };
        let Some(inode) = self.get(*ino) else {
            return false;
        };
        let mut names: Vec<&[u8]> = got.split(|byte| *byte == 0).collect();
        if names.pop().is_none_or(|last| !last.is_empty()) {
            return false;
        }
        names.sort_unstable();
        names
            .into_iter()
            .eq(inode.xattrs.keys().map(|name| &name[..]))
    }

    fn admits_names(&self, dir: Ino, names: &[(Ino, u8, Bytes)]) -> bool {
        let Some(inode) = self.get(dir) else {
            return false;
        };
        let [(own, 4, dot), (up, 4, dots), rest @ ..] = names else {
            // A removed directory may list nothing at all.
            return names.is_empty() && inode.nlink == 0;
        };
        if *own != dir || dot != "." || dots != ".." || (*up != inode.parent && inode.nlink > 0) {
            return false;
        }
        if rest.len() != inode.entries.len() {
            return false;
        }
        let mut latest_start = 0;
        let mut seen = std::collections::BTreeSet::new();
        rest.iter().all(|(ino, dtype, name)| {
            let Some(entry) = inode.entries.get(name) else {
                return false;
            };
            let in_order = entry.born.1 >= latest_start;
            latest_start = latest_start.max(entry.born.0);
            let typed = self.get(*ino).is_some_and(|inode| inode.dtype() == *dtype);
            in_order && entry.ino == *ino && typed && seen.insert(name.clone())
        })
    }
}

fn seek(file: &Inode, offset: u64, hole: bool) -> Option<u64> {
    if offset >= file.size {
        return None;
    }
    let start = offset / BLOCK;
    if hole {
        let mut block = start;
        for written in file.blocks.range(start..).map(|(block, _)| *block) {
            if written != block {
                break;
            }
            block += 1;
        }
        return Some((block * BLOCK).max(offset).min(file.size));
    }
    let (block, _): (&u64, &Block) = file.blocks.range(start..).next()?;
    let at = (block * BLOCK).max(offset);
    (at < file.size).then_some(at)
}

impl Model {
    /// The attributes of an inode, where its times are known.
    pub fn attr(&self, ino: Ino) -> Option<Attr> {
        let inode = self.get(ino)?;
        Some(Attr {
            ino,
            size: inode.size,
            blocks: inode.blocks.len() as u64 * 8,
            mtime: crate::model::wall_time(inode.mtime.low),
            ctime: crate::model::wall_time(inode.ctime.low),
            mode: inode.mode,
            nlink: inode.nlink,
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.rdev,
            ..Attr::default()
        })
    }

    /// Carries out a call as a filesystem would; an inode it makes is `ino`.
    pub fn answer(&mut self, call: &Call, ino: Ino, cx: &Context) -> Reply {
        let fresh = Reply::Entry(Attr {
            ino,
            ..Attr::default()
        });
        let expected = match self.execute(call, Some(&fresh), cx) {
            Ok(expected) => expected,
            Err(errors) => return Reply::Err(errors.first().copied().unwrap_or(Errno::EIO)),
        };
        match expected {
            Expected::Done => Reply::Done,
            Expected::Attr(ino) => Reply::Entry(self.attr(ino).unwrap_or_default()),
            Expected::Bytes(bytes) => Reply::Bytes(bytes.into()),
            Expected::Number(number) | Expected::Written(number) | Expected::Stored(number) => {
                Reply::Number(number)
            }
            Expected::Anything => Reply::Stat(outrider_core::fs::api::StatFs::default()),
            Expected::NameList => {
                let inode = call.subjects()[0].and_then(|ino| self.get(ino));
                let names = inode.map(|inode| inode.xattrs.keys().cloned().collect::<Vec<_>>());
                let names = names.unwrap_or_default();
                let list: Vec<u8> = names
                    .iter()
                    .flat_map(|name| name.iter().copied().chain([0]))
                    .collect();
                Reply::Bytes(list.into())
            }
            Expected::Entries(dir) => Reply::Names(self.listing(dir)),
            Expected::Extents(ino) => Reply::Extents(self.extents(ino)),
        }
    }

    fn listing(&self, dir: Ino) -> Vec<(Ino, u8, Bytes)> {
        let Some(inode) = self.get(dir) else {
            return Vec::new();
        };
        let mut entries: Vec<_> = inode.entries.iter().collect();
        entries.sort_by_key(|(_, entry)| entry.born);
        let dots = [(dir, "."), (inode.parent, "..")];
        let dots = dots.map(|(ino, dot)| (ino, 4, Bytes::from_static(dot.as_bytes())));
        let rest = entries.into_iter().map(|(name, entry)| {
            let dtype = self.get(entry.ino).map_or(0, Inode::dtype);
            (entry.ino, dtype, name.clone())
        });
        dots.into_iter().chain(rest).collect()
    }

    fn extents(&self, ino: Ino) -> Vec<outrider_core::fs::api::FiemapExtent> {
        let blocks = self.get(ino).map(|inode| inode.blocks.keys().copied());
        let extent = |block| outrider_core::fs::api::FiemapExtent {
            logical: block * BLOCK,
            physical: (block + 1000) * BLOCK,
            length: BLOCK,
            flags: 0,
        };
        blocks.into_iter().flatten().map(extent).collect()
    }
}

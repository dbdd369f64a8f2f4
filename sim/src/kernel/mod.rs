//! A model of the kernel between programs and the mount: what FUSE caches, and
//! what the VFS serializes.
//!
//! Names, attributes and pages are kept exactly as long as the filesystem said
//! or until it asks to forget them; so a missing invalidation gives an old
//! answer, which the oracle sees. Writes go through (no write-back cache).
//! Directory changes hold the directory's lock, writes and attribute changes
//! the inode's, as in Linux; calls are recorded inside those locks, since that
//! is when the filesystem is asked.
//!
//! A page being read is locked, as is one without contents of which a part is
//! being written: other calls that need it wait, so that what a read brings never
//! replaces what was written meanwhile.
//!
//! Forgetting pages waits for reads of that inode under way, and forgetting one
//! name takes the directory's lock, as the real notifications do: a filesystem
//! that waits for them while such a call waits for it hangs here, too.

mod caches;
mod pages;

pub use caches::{Caches, Notify};

use crate::ask::{Answer, ask, list};
use crate::model::acl::is_acl;
use crate::model::{Call, Reply, pattern};
use bytes::Bytes;
use caches::ALL;
use outrider_core::env::LocalBoxFuture;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Attr, Caller, Entry, Ino, Opened, Posix, WriteHow};
use std::ops::Range;
use std::rc::Rc;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

const PAGE: u64 = 4096;
/// `O_APPEND | O_RDWR`.
const O_APPEND_RDWR: u32 = 0o2002;
/// Bit of the number of an inode's lock that keeps stores through mappings out.
const MAPPING: Ino = 1 << 63;

/// Where calls and answers are written down.
pub trait Recorder {
    /// The filesystem (or its cache) is asked; gives a number.
    fn begin(&self, call: &Call) -> usize;
    /// The answer to a call.
    fn end(&self, number: usize, reply: &Reply);
}

/// Writes dirty pages back when the filesystem wants them.
pub trait Launder {
    /// Those of a range of a file's pages.
    fn write_back(&self, ino: Ino, pages: Range<u64>) -> LocalBoxFuture<'static, ()>;
}

#[allow(dead_code)] // held, not read
enum Held {
    Read(OwnedRwLockReadGuard<()>),
    Write(OwnedRwLockWriteGuard<()>),
}

/// An open file of the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    /// The inode.
    pub ino: Ino,
    /// What the filesystem calls it.
    pub fh: u64,
    /// It bypasses the pages.
    pub direct: bool,
}

/// The system call layer of one mount.
pub struct Kernel<P> {
    fs: Rc<P>,
    caches: Rc<Caches>,
    cx: Caller,
}

impl<P: Posix> Kernel<P> {
    /// The kernel in front of `fs`.
    pub fn new(fs: Rc<P>, caches: Rc<Caches>) -> Self {
        Self {
            fs,
            caches,
            cx: Caller::default(),
        }
    }

    /// Makes a call as a program would, with `fh` where it needs an open file.
    /// Gives the answer and, for calls that open, the handle.
    pub async fn call(
        &self,
        call: &Call,
        fh: Option<Handle>,
        recorder: &dyn Recorder,
    ) -> (Reply, Option<Handle>) {
        let direct = self.caches.enabled && fh.is_some_and(|handle| handle.direct);
        let _held = self.lock(call, direct).await;
        if let Some(reply) = self.refuse(call) {
            return (reply, None);
        }
        self.write_back_before(call, direct, recorder).await;
        let number = recorder.begin(call);
        let mut opened = None;
        let changes: Vec<Ino> = match call {
            call if call.is_read_only() || call.is_store() => Vec::new(),
            call => {
                let names = self.caches.inodes_of_names(call);
                call.subjects().into_iter().flatten().chain(names).collect()
            }
        };
        changes
            .iter()
            .for_each(|ino| self.caches.change_begins(*ino));
        let answer = match self.find(call).await {
            Ok(()) => Box::pin(self.perform(call, fh, &mut opened)).await,
            Err(error) => Err(error),
        };
        let reply = answer.unwrap_or_else(Reply::Err);
        self.count_open(call, opened);
        self.settle(call);
        changes.iter().for_each(|ino| self.caches.change_ends(*ino));
        recorder.end(number, &reply);
        if let Some((ino, _)) = call.resizes() {
            // Linux invalidates all pages then.
            let _ = self.write_back(ino, &ALL, recorder).await;
        }
        self.write_back_some(recorder).await;
        self.maybe_forget();
        (reply, opened)
    }

    /// Finds the inodes that the kernel does not know yet.
    async fn find(&self, call: &Call) -> Result<(), Errno> {
        if !self.caches.walks.get() {
            return Ok(());
        }
        if matches!(call, Call::ByHandle { .. }) {
            return Ok(());
        }
        for ino in call.subjects().into_iter().flatten() {
            let known = ino == crate::model::ROOT || {
                let maps = self.caches.maps.borrow();
                maps.lookups.contains_key(&ino) || maps.opens.contains_key(&ino)
            };
            if !known {
                self.fs.lookup(&self.cx, ino, b".").await?;
                self.caches.count_lookup(ino);
            }
        }
        Ok(())
    }

    fn count_open(&self, call: &Call, opened: Option<Handle>) {
        let mut maps = self.caches.maps.borrow_mut();
        if let Some(handle) = opened {
            *maps.opens.entry(handle.ino).or_default() += 1;
        }
        if let Call::Release { ino } = call
            && let Some(count) = maps.opens.get_mut(ino)
        {
            *count -= 1;
            if *count == 0 {
                maps.opens.remove(ino);
            }
        }
    }

    async fn lock(&self, call: &Call, direct: bool) -> Vec<Held> {
        if !self.caches.locking {
            return self.lock_end_of_file(call).await;
        }
        let mut shared = Vec::new();
        let mut exclusive = Vec::new();
        match call {
            // Linux lets stores come at any time. But a program that shrinks a file under
            // its own mapping, or reads beside it, can tell nobody what it expects.
            Call::MapWrite { ino, .. } => shared.extend([*ino, *ino | MAPPING]),
            Call::Read { ino, .. } if direct => exclusive.push(*ino | MAPPING),
            Call::Lookup { dir, .. } => shared.push(*dir),
            Call::Readdir { ino } => shared.push(*ino),
            // The rename mutex of the filesystem, as inode 0.
            Call::Rename { dir, to, .. } => {
                let (low, high) = (*dir.min(to), *dir.max(to));
                if low != high {
                    exclusive.push(0);
                    exclusive.push(low);
                }
                exclusive.push(high);
            }
            Call::Link { ino, dir, .. } => exclusive.extend([*dir, *ino]),
            Call::Setattr { ino, .. }
            | Call::OpenTrunc { ino }
            | Call::Write { ino, .. }
            | Call::Setxattr { ino, .. }
            | Call::Removexattr { ino, .. }
            | Call::Fallocate { ino, .. } => exclusive.push(*ino),
            _ => exclusive.extend(call.changes_entries_of().into_iter().flatten()),
        }
        let mut held = Vec::new();
        for ino in shared {
            let lock = self.caches.lock_of(ino);
            held.push(Held::Read(lock.read_owned().await));
        }
        for ino in exclusive {
            let lock = self.caches.lock_of(ino);
            held.push(Held::Write(lock.write_owned().await));
        }
        held
    }

    /// Where an append goes, and so which bytes it has, is decided by the caller
    /// in any case: while no other call moves the end of the file.
    async fn lock_end_of_file(&self, call: &Call) -> Vec<Held> {
        match call {
            Call::Write {
                ino, append: true, ..
            } => vec![Held::Write(self.caches.lock_of(*ino).write_owned().await)],
            Call::Write { ino, .. }
            | Call::Setattr { ino, .. }
            | Call::OpenTrunc { ino }
            | Call::Fallocate { ino, .. } => {
                vec![Held::Read(self.caches.lock_of(*ino).read_owned().await)]
            }
            _ => Vec::new(),
        }
    }

    /// What the VFS refuses or answers by itself.
    fn refuse(&self, call: &Call) -> Option<Reply> {
        let Call::Rename {
            dir,
            name,
            to,
            new,
            noreplace: false,
        } = call
        else {
            return None;
        };
        // Two names of one inode: nothing to do (spec 12 section 15). The cached
        // names say so only where the kernel looked them up.
        let (source, target) = (self.caches.name(*dir, name)?, self.caches.name(*to, new)?);
        (source == target && source != 0).then_some(Reply::Done)
    }

    fn entered(&self, entry: &Entry, version: u64) -> Reply {
        self.caches.count_lookup(entry.attr.ino);
        self.caches.keep_attr(entry.attr, entry.attr_valid, version);
        Reply::Entry(entry.attr)
    }

    fn opened(&self, ino: Ino, opened: &Opened) -> Handle {
        if !opened.keep_cache {
            self.caches.drop_pages(ino, &ALL);
        }
        Handle {
            ino,
            fh: opened.fh,
            direct: opened.direct_io,
        }
    }

    async fn perform(
        &self,
        call: &Call,
        fh: Option<Handle>,
        handle: &mut Option<Handle>,
    ) -> Result<Reply, Errno> {
        let epoch = self.caches.name_epoch.get();
        let direct = self.caches.enabled && fh.is_some_and(|handle| handle.direct);
        let fh = fh.map(|handle| handle.fh);
        let open = || fh.ok_or(Errno::EBADF);
        match call {
            Call::Lookup { dir, name } => return self.lookup(*dir, name).await,
            Call::Getattr { ino } => return Ok(Reply::Attr(self.getattr(*ino).await?)),
            Call::Read { ino, offset, len } if !direct => {
                let bytes = self.read(*ino, open()?, *offset, *len).await?;
                return Ok(Reply::Bytes(bytes));
            }
            Call::MapRead { ino, offset, len } => {
                let bytes = self.map_read((*ino, open()?), *offset, *len).await?;
                return Ok(Reply::Bytes(bytes));
            }
            Call::MapWrite {
                ino,
                offset,
                len,
                tag,
            } => return self.map_write((*ino, open()?), *offset, *len, *tag).await,
            Call::WritePages { .. } => unreachable!("only the kernel itself writes back"),
            Call::Write {
                ino,
                offset,
                len,
                tag,
                append,
                sync,
            } => {
                let at = if *append {
                    self.getattr(*ino).await?.size
                } else {
                    *offset
                };
                let data = pattern(*tag, at, *len);
                let how = WriteHow {
                    append: *append,
                    sync: *sync,
                    ..WriteHow::default()
                };
                if *append && self.caches.enabled && self.caches.walks.get() {
                    return self.append(*ino, at, data, how).await;
                }
                return match direct {
                    true => self.write_direct(*ino, open()?, at, data, how).await,
                    false => self.write(*ino, open()?, at, data, how).await,
                };
            }
            Call::Getxattr { ino, name } if is_acl(name) => {
                return Ok(Reply::Bytes(self.acl(*ino, name).await?));
            }
            Call::Readdir { ino } => {
                let rng = &self.caches.rng;
                let how = || (rng.chance(300), rng.pick(&[1, 3, 100]));
                let seen = |entry: &Entry| self.caches.count_lookup(entry.attr.ino);
                return list(&*self.fs, &self.cx, *ino, how, seen).await;
            }
            _ => {}
        }
        // It may find an inode that is there and changing: attributes from before a
        // change that has been answered meanwhile are not kept.
        let finds = matches!(
            call,
            Call::Create { .. } | Call::ByHandle { .. } | Call::HandleParent { .. }
        );
        let before = finds.then(|| self.caches.maps.borrow().versions.clone());
        let asking = ask(&*self.fs, &self.cx, call, fh);
        let answer = match call.resizes() {
            Some((ino, size)) => self.resize(ino, size, asking).await?,
            None => asking.await?,
        };
        let (entry, opened) = match answer {
            Answer::Reply(reply) => return Ok(reply),
            Answer::Opened(ino, opened) => {
                *handle = Some(self.opened(ino, &opened));
                return Ok(Reply::Done);
            }
            Answer::Entry(entry) => (entry, None),
            Answer::Created(entry, opened) => (entry, Some(opened)),
        };
        let ino = entry.attr.ino;
        *handle = opened.map(|opened| self.opened(ino, &opened));
        let version = before.map_or_else(|| self.caches.version(ino), |before| before.of(ino));
        if let Some((dir, name)) = call.makes() {
            self.caches
                .keep_name(dir, name, ino, entry.entry_valid, epoch);
        }
        Ok(self.entered(&entry, version))
    }

    async fn lookup(&self, dir: Ino, name: &Bytes) -> Result<Reply, Errno> {
        match self.caches.name(dir, name) {
            Some(0) => return Err(Errno::ENOENT),
            Some(ino) => return Ok(Reply::Found(ino)),
            None => {}
        }
        let epoch = self.caches.name_epoch.get();
        let before = self.caches.maps.borrow().versions.clone();
        let entry = self.fs.lookup(&self.cx, dir, name).await?;
        let ino = entry.attr.ino;
        self.caches
            .keep_name(dir, name, ino, entry.entry_valid, epoch);
        if ino == 0 {
            return Err(Errno::ENOENT);
        }
        Ok(self.entered(&entry, before.of(ino)))
    }

    async fn acl(&self, ino: Ino, name: &Bytes) -> Result<Bytes, Errno> {
        if let Some(known) = self.caches.acl(ino, name) {
            return known.ok_or(Errno::ENODATA);
        }
        let version = self.caches.version(ino);
        let answer = self.fs.getxattr(&self.cx, ino, name).await;
        match &answer {
            Ok(value) => {
                let value = Some(value.clone());
                self.caches.keep_acl(ino, name, value, version);
            }
            Err(Errno::ENODATA) => self.caches.keep_acl(ino, name, None, version),
            Err(_) => {}
        }
        answer
    }

    async fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        if let Some(attr) = self.caches.attr(ino) {
            return Ok(attr);
        }
        let version = self.caches.version(ino);
        let (attr, valid) = self.fs.getattr(&self.cx, ino).await?;
        self.caches.keep_attr(attr, valid, version);
        Ok(attr)
    }

    /// After a call: what it changed is no longer known.
    fn settle(&self, call: &Call) {
        let changes_nothing = call.is_read_only() || call.is_store();
        let only_opens = call.opens().is_some() && call.resizes().is_none();
        if changes_nothing || only_opens || matches!(call, Call::Release { .. }) {
            return;
        }
        for ino in call.subjects().into_iter().flatten() {
            self.caches.touch(ino);
        }
        match call {
            Call::Unlink { dir, name } | Call::Rmdir { dir, name } => {
                self.unlinked(*dir, name);
            }
            Call::Rename {
                dir, name, to, new, ..
            } => {
                self.unlinked(*to, new);
                self.unlinked(*dir, name);
            }
            _ => {}
        }
    }

    fn unlinked(&self, dir: Ino, name: &Bytes) {
        let old = self
            .caches
            .maps
            .borrow()
            .names
            .get(&(dir, name.clone()))
            .copied();
        match old {
            Some((ino, _)) if ino != 0 => self.caches.touch(ino),
            // The kernel would know the inode; here everybody's links may have changed.
            _ => {
                let mut maps = self.caches.maps.borrow_mut();
                maps.versions.all += 1;
                maps.attrs.clear();
            }
        }
        self.caches.drop_name(dir, name);
    }

    /// Under memory pressure the kernel forgets inodes nobody uses.
    fn maybe_forget(&self) {
        if !self.caches.rng.chance(20) {
            return;
        }
        let chosen = {
            let maps = self.caches.maps.borrow();
            let count = maps.lookups.len() as u64;
            if count == 0 {
                return;
            }
            let index = self.caches.rng.below(count) as usize;
            maps.lookups.iter().nth(index).map(|(ino, n)| (*ino, *n))
        };
        let Some((ino, count)) = chosen else { return };
        {
            let mut maps = self.caches.maps.borrow_mut();
            if maps.opens.contains_key(&ino) {
                return;
            }
            maps.forget(ino);
        }
        self.caches.drop_pages(ino, &ALL);
        self.fs.forget(ino, count);
    }
}

impl<P> Kernel<P> {
    /// The filesystem behind it.
    pub fn fs(&self) -> &Rc<P> {
        &self.fs
    }

    /// A handle kept for a while is not a reason to keep names.
    pub fn caches(&self) -> &Rc<Caches> {
        &self.caches
    }
}

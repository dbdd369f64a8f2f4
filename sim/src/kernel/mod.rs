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

use crate::backend::Sim;
use crate::model::{Call, Reply, pattern};
use crate::rng::Stream;
use bytes::Bytes;
use outrider_core::env::{AlignedBuf, LocalBoxFuture, Signal};
use outrider_core::errno::Errno;
use outrider_core::fs::api::{
    Attr, Caller, Entry, Ino, Inval, KernelCache, Opened, Posix, SetAttr, Whence, WriteData,
    WriteHow,
};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

const PAGE: u64 = 4096;
/// `O_RDWR`.
const O_RDWR: u32 = 2;
/// `O_APPEND | O_RDWR`.
const O_APPEND_RDWR: u32 = 0o2002;
/// `O_CREAT | O_RDWR`.
const O_CREAT_RDWR: u32 = 0o102;
/// `O_EXCL`.
const O_EXCL: u32 = 0o200;
/// `FALLOC_FL_KEEP_SIZE`.
const KEEP_SIZE: u32 = 1;
/// `RENAME_NOREPLACE`.
const NOREPLACE: u32 = 1;
const UMASK: u32 = 0o022;
/// In `Maps::changing`: an inode whose number the kernel's names do not tell.
const ANY: Ino = 0;

/// Where calls and answers are written down.
pub trait Recorder {
    /// The filesystem (or its cache) is asked; gives a number.
    fn begin(&self, call: &Call) -> usize;
    /// The answer to a call.
    fn end(&self, number: usize, reply: &Reply);
}

struct CachedAttr {
    attr: Attr,
    until: u64,
}

#[derive(Default)]
struct Pages {
    pages: BTreeMap<u64, Vec<u8>>,
    reading: u32,
    /// Pages without contents that a read fills or a write of a part of them holds.
    locked: BTreeSet<u64>,
}

#[derive(Default)]
struct Maps {
    names: BTreeMap<(Ino, Bytes), (Ino, u64)>,
    attrs: BTreeMap<Ino, CachedAttr>,
    versions: Versions,
    /// Calls under way that change an inode's attributes.
    changing: BTreeMap<Ino, u32>,
    pages: BTreeMap<Ino, Pages>,
    lookups: BTreeMap<Ino, u64>,
    opens: BTreeMap<Ino, u32>,
}

/// How often the attributes of each inode changed here.
#[derive(Clone, Default)]
struct Versions {
    each: BTreeMap<Ino, u64>,
    all: u64,
}

impl Versions {
    fn of(&self, ino: Ino) -> u64 {
        self.all + self.each.get(&ino).copied().unwrap_or(0)
    }
}

type Locks = RefCell<BTreeMap<Ino, Rc<LockOfInode>>>;

struct LockOfInode(std::sync::Arc<RwLock<()>>);

/// The caches of one mount, which the filesystem may tell to forget.
pub struct Caches {
    sim: Rc<Sim>,
    node: u32,
    rng: Stream,
    enabled: bool,
    locking: bool,
    maps: RefCell<Maps>,
    locks: Locks,
    reads_done: Signal,
    unlocked: Signal,
    name_epoch: Cell<u64>,
    walks: Cell<bool>,
}

impl Caches {
    /// Empty caches; `enabled` and `locking` as in the plan's configuration.
    pub fn new(sim: &Rc<Sim>, node: u32, life: u64, enabled: bool, locking: bool) -> Rc<Self> {
        let caches = Rc::new(Self {
            sim: Rc::clone(sim),
            node,
            rng: Stream::new(sim.seed, "kernel", life),
            enabled,
            locking,
            maps: RefCell::default(),
            locks: RefCell::default(),
            reads_done: Signal::default(),
            unlocked: Signal::default(),
            name_epoch: Cell::new(0),
            walks: Cell::new(false),
        });
        sim.know_kernel(node, &caches);
        caches
    }

    /// How much it keeps: names, attributes, pages, and inodes it has looked up.
    pub fn counts(&self) -> [usize; 4] {
        let maps = self.maps.borrow();
        let pages = maps.pages.values().map(|pages| pages.pages.len()).sum();
        [
            maps.names.len(),
            maps.attrs.len(),
            pages,
            maps.lookups.len(),
        ]
    }

    /// Lets the kernel find an inode (by its handle) before it asks about it, and
    /// keep it while it is open, as it must where others may take caches away:
    /// the filesystem invalidates only what the kernel got from it.
    pub fn walk(&self) {
        self.walks.set(true);
    }

    fn lock_of(&self, ino: Ino) -> std::sync::Arc<RwLock<()>> {
        let mut locks = self.locks.borrow_mut();
        let lock = locks
            .entry(ino)
            .or_insert_with(|| Rc::new(LockOfInode(std::sync::Arc::new(RwLock::new(())))));
        std::sync::Arc::clone(&lock.0)
    }

    fn name(&self, dir: Ino, name: &Bytes) -> Option<Ino> {
        let maps = self.maps.borrow();
        let (ino, until) = maps.names.get(&(dir, name.clone()))?;
        (self.enabled && *until > self.sim.now()).then_some(*ino)
    }

    fn attr(&self, ino: Ino) -> Option<Attr> {
        let maps = self.maps.borrow();
        let cached = maps.attrs.get(&ino)?;
        // Linux would show what it was until the change is answered, also to who has
        // seen the change by an uncached call. No filesystem can do anything about
        // that, so it is left out here.
        if maps.changing.contains_key(&ino) || maps.changing.contains_key(&ANY) {
            return None;
        }
        (self.enabled && cached.until > self.sim.now()).then_some(cached.attr)
    }

    fn version(&self, ino: Ino) -> u64 {
        self.maps.borrow().versions.of(ino)
    }

    fn change_begins(&self, ino: Ino) {
        *self.maps.borrow_mut().changing.entry(ino).or_default() += 1;
    }

    fn change_ends(&self, ino: Ino) {
        let changing = &mut self.maps.borrow_mut().changing;
        if let Some(count) = changing.get_mut(&ino) {
            *count -= 1;
            if *count == 0 {
                changing.remove(&ino);
            }
        }
    }

    /// The inodes whose names a call takes away or moves: their attributes change, too.
    fn inodes_of_names(&self, call: &Call) -> Vec<Ino> {
        let maps = self.maps.borrow();
        let of = |dir: &Ino, name: &Bytes| match maps.names.get(&(*dir, name.clone())) {
            Some((ino, _)) if *ino != 0 => *ino,
            _ => ANY,
        };
        match call {
            Call::Unlink { dir, name } | Call::Rmdir { dir, name } => vec![of(dir, name)],
            Call::Rename {
                dir, name, to, new, ..
            } => vec![of(dir, name), of(to, new)],
            _ => Vec::new(),
        }
    }

    /// The attributes of an inode changed here.
    fn touch(&self, ino: Ino) {
        let mut maps = self.maps.borrow_mut();
        *maps.versions.each.entry(ino).or_default() += 1;
        maps.attrs.remove(&ino);
    }

    /// Of answers that were under way together none is kept, as which of them is
    /// newer can not be told: a change may have come between them.
    fn keep_attr(&self, attr: Attr, valid: std::time::Duration, version: u64) {
        if !self.enabled || valid.is_zero() {
            return;
        }
        let alone = self.version(attr.ino) == version;
        self.touch(attr.ino);
        if alone {
            let until = self.sim.now().saturating_add(valid.as_nanos() as u64);
            let cached = CachedAttr { attr, until };
            self.maps.borrow_mut().attrs.insert(attr.ino, cached);
        }
    }

    fn keep_name(&self, dir: Ino, name: &Bytes, ino: Ino, valid: std::time::Duration, epoch: u64) {
        if self.enabled && !valid.is_zero() && self.name_epoch.get() == epoch {
            let until = self.sim.now().saturating_add(valid.as_nanos() as u64);
            let mut maps = self.maps.borrow_mut();
            maps.names.insert((dir, name.clone()), (ino, until));
        }
    }

    fn drop_name(&self, dir: Ino, name: &Bytes) {
        self.maps.borrow_mut().names.remove(&(dir, name.clone()));
    }

    fn count_lookup(&self, ino: Ino) {
        *self.maps.borrow_mut().lookups.entry(ino).or_default() += 1;
    }

    /// Waits until no page of a range is locked; then locks those of it that `f`
    /// chooses.
    async fn lock_pages(
        &self,
        ino: Ino,
        range: std::ops::Range<u64>,
        mut f: impl FnMut(&mut Pages) -> Vec<u64>,
    ) -> Vec<u64> {
        let free = || {
            let mut maps = self.maps.borrow_mut();
            let pages = maps.pages.entry(ino).or_default();
            if pages.locked.range(range.clone()).next().is_some() {
                return None;
            }
            let chosen = f(pages);
            pages.locked.extend(&chosen);
            Some(chosen)
        };
        self.unlocked.wait_for(free).await
    }

    fn unlock_pages(&self, ino: Ino, locked: &[u64]) {
        if let Some(pages) = self.maps.borrow_mut().pages.get_mut(&ino) {
            pages.locked.retain(|page| !locked.contains(page));
        }
        self.unlocked.wake_all();
    }

    fn drop_pages(&self, ino: Ino) {
        if let Some(pages) = self.maps.borrow_mut().pages.get_mut(&ino) {
            pages.pages.clear();
        }
    }

    /// Pages that are being read: what they bring is younger than all that the
    /// filesystem has answered so far.
    fn pages_to_come(&self, ino: Ino) -> BTreeSet<u64> {
        let maps = self.maps.borrow();
        let pages = maps.pages.get(&ino);
        let unknown = |pages: &Pages| {
            let locked = pages.locked.iter().copied();
            locked
                .filter(|page| !pages.pages.contains_key(page))
                .collect()
        };
        pages.map_or_else(BTreeSet::new, unknown)
    }

    /// Cuts the pages off at `size`, but not `younger` ones. Linux would cut those,
    /// too, when their reads have ended, although another node may have written more
    /// before that. No filesystem can do anything about it (docs/coherence.md), so it
    /// is left out here.
    fn drop_pages_from(&self, ino: Ino, size: u64, younger: &BTreeSet<u64>) {
        if let Some(pages) = self.maps.borrow_mut().pages.get_mut(&ino) {
            let first_gone = size.div_ceil(PAGE);
            pages
                .pages
                .retain(|page, _| *page < first_gone || younger.contains(page));
            let last = size / PAGE;
            if let Some(bytes) = pages.pages.get_mut(&last)
                && !younger.contains(&last)
            {
                bytes[(size % PAGE) as usize..].fill(0);
            }
        }
    }

    fn forget_one(&self, what: &Inval) {
        match what {
            Inval::Attr(ino) => self.touch(*ino),
            Inval::Pages(ino) | Inval::PageRange { ino, .. } => {
                self.touch(*ino);
                self.drop_pages(*ino);
            }
            Inval::Name { parent, name } => self.drop_name(*parent, name),
            Inval::AllNames => {
                self.name_epoch.set(self.name_epoch.get() + 1);
                self.maps.borrow_mut().names.clear();
            }
        }
    }
}

/// The face that the filesystem sees.
pub struct Notify(pub Rc<Caches>);

impl KernelCache for Notify {
    fn invalidate(&self, what: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        let caches = Rc::clone(&self.0);
        Box::pin(async move {
            let sim = &caches.sim;
            sim.trace.event(
                sim.now(),
                caches.node,
                "forget",
                &[what.len() as u64],
                || format!("{what:?}"),
            );
            if caches.rng.chance(300) {
                sim.sleep(caches.rng.below(300_000)).await;
            }
            for one in &what {
                match one {
                    Inval::Pages(ino) | Inval::PageRange { ino, .. } => {
                        let idle = || {
                            let maps = caches.maps.borrow();
                            let busy = maps.pages.get(ino).is_some_and(|p| p.reading > 0);
                            (!busy).then_some(())
                        };
                        caches.reads_done.wait_for(idle).await;
                    }
                    Inval::Name { parent, .. } if caches.locking => {
                        drop(caches.lock_of(*parent).write_owned().await);
                    }
                    _ => {}
                }
                caches.forget_one(one);
            }
            // This kernel knows an inode as soon as it is answered.
            Vec::new()
        })
    }
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
        let _held = self.lock(call).await;
        if let Some(reply) = self.refuse(call) {
            return (reply, None);
        }
        let number = recorder.begin(call);
        let mut opened = None;
        let changes: Vec<Ino> = match call {
            call if call.is_read_only() => Vec::new(),
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
        self.maybe_forget();
        (reply, opened)
    }

    /// Finds the inodes that the kernel does not know yet.
    async fn find(&self, call: &Call) -> Result<(), Errno> {
        if !self.caches.walks.get() {
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

    async fn lock(&self, call: &Call) -> Vec<Held> {
        if !self.caches.locking {
            return self.lock_end_of_file(call).await;
        }
        let mut shared = Vec::new();
        let mut exclusive = Vec::new();
        match call {
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
            Call::Write { ino, .. } | Call::Setattr { ino, .. } | Call::Fallocate { ino, .. } => {
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

    /// A new inode under a name.
    fn made(&self, dir: Ino, name: &Bytes, entry: &Entry, epoch: u64) -> Reply {
        let version = self.caches.version(entry.attr.ino);
        let reply = self.entered(entry, version);
        self.caches
            .keep_name(dir, name, entry.attr.ino, entry.entry_valid, epoch);
        reply
    }

    fn opened(&self, ino: Ino, opened: &Opened) -> Handle {
        if !opened.keep_cache {
            self.caches.drop_pages(ino);
        }
        Handle { ino, fh: opened.fh }
    }

    async fn perform(
        &self,
        call: &Call,
        fh: Option<Handle>,
        handle: &mut Option<Handle>,
    ) -> Result<Reply, Errno> {
        let (fs, cx) = (&*self.fs, &self.cx);
        let epoch = self.caches.name_epoch.get();
        let open = || fh.map(|handle| handle.fh).ok_or(Errno::EBADF);
        Ok(match call {
            Call::Lookup { dir, name } => return self.lookup(*dir, name).await,
            Call::Getattr { ino } => Reply::Attr(self.getattr(*ino).await?),
            Call::Setattr { ino, set } => return self.setattr(*ino, set).await,
            Call::Readlink { ino } => Reply::Bytes(fs.readlink(cx, *ino).await?),
            Call::Mknod {
                dir,
                name,
                mode,
                rdev,
            } => {
                let entry = fs.mknod(cx, *dir, name, *mode, *rdev, UMASK).await?;
                self.made(*dir, name, &entry, epoch)
            }
            Call::Mkdir { dir, name, mode } => {
                let entry = fs.mkdir(cx, *dir, name, *mode, UMASK).await?;
                self.made(*dir, name, &entry, epoch)
            }
            Call::Symlink { dir, name, target } => {
                let entry = fs.symlink(cx, *dir, name, target).await?;
                self.made(*dir, name, &entry, epoch)
            }
            Call::Create {
                dir,
                name,
                mode,
                excl,
            } => {
                let flags = O_CREAT_RDWR | if *excl { O_EXCL } else { 0 };
                // It may open a file that is there and changing: attributes from
                // before a change that has been answered meanwhile are not kept.
                let before = self.caches.maps.borrow().versions.clone();
                let (entry, opened) = fs.create(cx, *dir, name, *mode, UMASK, flags).await?;
                let ino = entry.attr.ino;
                *handle = Some(self.opened(ino, &opened));
                self.caches
                    .keep_name(*dir, name, ino, entry.entry_valid, epoch);
                self.entered(&entry, before.of(ino))
            }
            Call::Tmpfile { dir, mode } => {
                let (entry, opened) = fs.tmpfile(cx, *dir, *mode, UMASK, O_RDWR).await?;
                *handle = Some(self.opened(entry.attr.ino, &opened));
                let version = self.caches.version(entry.attr.ino);
                self.entered(&entry, version)
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
                let entry = fs.link(cx, *ino, *dir, name).await?;
                self.made(*dir, name, &entry, epoch)
            }
            Call::Open { ino } => {
                let opened = fs.open(cx, *ino, O_RDWR).await?;
                *handle = Some(self.opened(*ino, &opened));
                Reply::Done
            }
            Call::Release { ino } => {
                fs.release(*ino, open()?).await;
                Reply::Done
            }
            Call::Read { ino, offset, len } => {
                Reply::Bytes(self.read(*ino, open()?, *offset, *len).await?)
            }
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
                self.write(*ino, open()?, at, data, how).await?
            }
            Call::Fsync { ino } => {
                fs.fsync(cx, *ino, open()?, false).await?;
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
                fs.fallocate(cx, *ino, open()?, mode, *offset, *len).await?;
                Reply::Done
            }
            Call::Seek { ino, offset, hole } => {
                let whence = if *hole { Whence::Hole } else { Whence::Data };
                Reply::Number(fs.lseek(cx, *ino, open()?, *offset, whence).await?)
            }
            Call::Fiemap { ino } => {
                let all = fs.fiemap(cx, *ino, 0, u64::MAX, usize::MAX).await?;
                Reply::Extents(all)
            }
        })
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

    async fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        if let Some(attr) = self.caches.attr(ino) {
            return Ok(attr);
        }
        let version = self.caches.version(ino);
        let (attr, valid) = self.fs.getattr(&self.cx, ino).await?;
        self.caches.keep_attr(attr, valid, version);
        Ok(attr)
    }

    async fn setattr(&self, ino: Ino, set: &SetAttr) -> Result<Reply, Errno> {
        let (attr, _) = self.fs.setattr(&self.cx, ino, set).await?;
        if let Some(size) = set.size {
            let gone = size / PAGE..u64::MAX;
            let coming = self.caches.pages_to_come(ino);
            self.caches.lock_pages(ino, gone, |_| Vec::new()).await;
            self.caches.drop_pages_from(ino, size, &coming);
        }
        Ok(Reply::Attr(attr))
    }

    async fn readdir(&self, ino: Ino) -> Result<Reply, Errno> {
        let opened = self.fs.opendir(&self.cx, ino, 0).await?;
        let plus = self.caches.rng.chance(300);
        let batch = self.caches.rng.pick(&[1, 3, 100]);
        let mut names = Vec::new();
        let mut offset = 0;
        let result = loop {
            let (before, at) = (names.len(), offset);
            let mut room = batch;
            let mut sink = |entry: outrider_core::fs::api::DirEntry| {
                if room == 0 {
                    return false;
                }
                room -= 1;
                offset = entry.next;
                if let Some(entry) = &entry.entry {
                    self.caches.count_lookup(entry.attr.ino);
                }
                names.push((entry.ino, entry.dtype, entry.name));
                true
            };
            let sink: &mut dyn FnMut(outrider_core::fs::api::DirEntry) -> bool = &mut sink;
            let outcome = self
                .fs
                .readdir(&self.cx, ino, opened.fh, at, plus, sink)
                .await;
            if let Err(error) = outcome {
                break Err(error);
            }
            if names.len() == before {
                break Ok(Reply::Names(names));
            }
        };
        self.fs.releasedir(ino, opened.fh).await;
        result
    }

    async fn read(&self, ino: Ino, fh: u64, offset: u64, len: u32) -> Result<Bytes, Errno> {
        if !self.caches.enabled {
            let pieces = self.fs.read(&self.cx, ino, fh, offset, len).await?;
            return Ok(pieces.concat().into());
        }
        let size = self.getattr(ino).await?.size;
        let end = offset.saturating_add(u64::from(len)).min(size);
        if offset >= end {
            return Ok(Bytes::new());
        }
        let (first, last) = (offset / PAGE, (end - 1) / PAGE);
        let missing = |pages: &mut Pages| {
            pages.reading += 1;
            let mut unknown = (first..=last).filter(|page| !pages.pages.contains_key(page));
            let from = unknown.next();
            let to = unknown.next_back().or(from);
            from.zip(to)
                .map_or_else(Vec::new, |(from, to)| (from..=to).collect())
        };
        let missing = self.caches.lock_pages(ino, first..last + 1, missing).await;
        let mut result = Ok(());
        if let (Some(from), Some(to)) = (missing.first(), missing.last()) {
            result = self.fill(ino, fh, *from, *to).await;
        }
        let mut out = Vec::new();
        {
            let mut maps = self.caches.maps.borrow_mut();
            let pages = maps.pages.entry(ino).or_default();
            pages.reading -= 1;
            for page in first..=last {
                match pages.pages.get(&page) {
                    Some(bytes) => out.extend_from_slice(bytes),
                    None => out.resize(out.len() + PAGE as usize, 0),
                }
            }
        }
        self.caches.unlock_pages(ino, &missing);
        self.caches.reads_done.wake_all();
        result?;
        let skip = (offset - first * PAGE) as usize;
        Ok(Bytes::from(out).slice(skip..skip + (end - offset) as usize))
    }

    async fn fill(&self, ino: Ino, fh: u64, from: u64, to: u64) -> Result<(), Errno> {
        let len = ((to - from + 1) * PAGE) as u32;
        let pieces = self.fs.read(&self.cx, ino, fh, from * PAGE, len).await?;
        let mut bytes = pieces.concat();
        bytes.resize(len as usize, 0);
        let mut maps = self.caches.maps.borrow_mut();
        let pages = maps.pages.entry(ino).or_default();
        for (page, chunk) in (from..).zip(bytes.chunks(PAGE as usize)) {
            // A page written meanwhile is newer than what was read.
            pages.pages.entry(page).or_insert_with(|| chunk.to_vec());
        }
        Ok(())
    }

    async fn write(
        &self,
        ino: Ino,
        fh: u64,
        offset: u64,
        data: Bytes,
        how: WriteHow,
    ) -> Result<Reply, Errno> {
        let len = data.len() as u64;
        let mut locked = Vec::new();
        if self.caches.enabled {
            let range = offset / PAGE..(offset + len).div_ceil(PAGE);
            let place = |pages: &mut Pages| write_pages(&mut pages.pages, offset, &data);
            locked = self.caches.lock_pages(ino, range, place).await;
        }
        // Whole blocks come in memory of their own, as from the kernel.
        let data = match !data.is_empty() && data.len().is_multiple_of(PAGE as usize) {
            true => WriteData::Blocks(AlignedBuf::copy_of(&data)),
            false => data.into(),
        };
        let written = self.fs.write(&self.cx, ino, fh, offset, data, how).await;
        self.caches.unlock_pages(ino, &locked);
        if !written
            .as_ref()
            .is_ok_and(|written| u64::from(*written) == len)
        {
            self.caches.drop_pages(ino);
        }
        Ok(Reply::Number(u64::from(written?)))
    }

    /// Appends as a program does that opens the file for it. Such a handle bypasses
    /// the pages where the filesystem says so.
    async fn append(&self, ino: Ino, at: u64, data: Bytes, how: WriteHow) -> Result<Reply, Errno> {
        let opened = self.fs.open(&self.cx, ino, O_APPEND_RDWR).await?;
        let fh = self.opened(ino, &opened).fh;
        let written = if opened.direct_io {
            let written = self.fs.write(&self.cx, ino, fh, at, data.into(), how).await;
            written.map(|written| Reply::Number(u64::from(written)))
        } else {
            self.write(ino, fh, at, data, how).await
        };
        self.fs.release(ino, fh).await;
        written
    }

    /// After a call: what it changed is no longer known.
    fn settle(&self, call: &Call) {
        if call.is_read_only() || matches!(call, Call::Open { .. } | Call::Release { .. }) {
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
        if self.caches.walks.get() {
            if self.caches.maps.borrow().opens.contains_key(&ino) {
                return;
            }
            self.caches.drop_pages(ino);
        }
        {
            let mut maps = self.caches.maps.borrow_mut();
            maps.lookups.remove(&ino);
            maps.attrs.remove(&ino);
            maps.names
                .retain(|(dir, _), (target, _)| *dir != ino && *target != ino);
        }
        self.fs.forget(ino, count);
    }
}

/// Writes into the pages that are there. Gives those of which a part is written
/// and the rest is not known.
fn write_pages(pages: &mut BTreeMap<u64, Vec<u8>>, offset: u64, data: &Bytes) -> Vec<u64> {
    let end = offset + data.len() as u64;
    let mut unknown = Vec::new();
    for page in offset / PAGE..end.div_ceil(PAGE) {
        let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
        let bytes = &data[(from - offset) as usize..(to - offset) as usize];
        let within = (from - page * PAGE) as usize..(to - page * PAGE) as usize;
        if bytes.len() == PAGE as usize {
            pages.insert(page, bytes.to_vec());
        } else if let Some(kept) = pages.get_mut(&page) {
            kept[within].copy_from_slice(bytes);
        } else {
            unknown.push(page);
        }
    }
    unknown
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

impl std::fmt::Debug for Caches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caches").finish_non_exhaustive()
    }
}

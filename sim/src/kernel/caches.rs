//! What the kernel keeps of one mount: names, attributes, ACLs and pages, and how the
//! filesystem makes it forget them.

use super::{Launder, PAGE};
use crate::backend::Sim;
use crate::model::Call;
use crate::rng::Stream;
use bytes::Bytes;
use outrider_core::env::{LocalBoxFuture, Signal, probe};
use outrider_core::fs::api::{Attr, Ino, Inval, KernelCache};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use tokio::sync::RwLock;

/// In `Maps::changing`: an inode whose number the kernel's names do not tell.
const ANY: Ino = 0;
/// All pages of a file.
pub(super) const ALL: Range<u64> = 0..u64::MAX;

pub(super) struct CachedAttr {
    attr: Attr,
    until: u64,
}

/// The pages of a file.
#[derive(Default)]
pub(super) struct Pages {
    pub pages: BTreeMap<u64, Vec<u8>>,
    pub reading: u32,
    /// Pages that a read fills, and pages that a write under way holds: those without
    /// contents of which it writes a part, and those that are to be written back.
    pub locked: BTreeSet<u64>,
    /// Pages that programs have stored to through mappings and that were not written
    /// back since, with the end of what has to be.
    pub dirty: BTreeMap<u64, usize>,
    /// Pages that are being written back: nobody changes them.
    pub writing: BTreeSet<u64>,
    /// Changes of the size under way: nothing is written back meanwhile.
    pub resizing: u32,
    /// A handle to write back by.
    pub fh: u64,
    /// How often pages were dropped.
    pub dropped: u64,
}

impl Pages {
    fn drop_clean(&mut self, range: &Range<u64>) {
        let dirty = &self.dirty;
        let before = self.pages.len();
        self.pages
            .retain(|page, _| !range.contains(page) || dirty.contains_key(page));
        self.dropped += u64::from(self.pages.len() < before);
    }

    /// Whether pages of a range are dirty or being written back.
    fn is_behind(&self, range: &Range<u64>) -> bool {
        self.dirty.range(range.clone()).next().is_some()
            || self.writing.range(range.clone()).next().is_some()
    }
}

#[derive(Default)]
pub(super) struct Maps {
    pub names: BTreeMap<(Ino, Bytes), (Ino, u64)>,
    pub attrs: BTreeMap<Ino, CachedAttr>,
    /// ACLs by the name of their xattr; `None`: there is none.
    acls: BTreeMap<(Ino, Bytes), Option<Bytes>>,
    pub versions: Versions,
    /// Calls under way that change an inode's attributes.
    changing: BTreeMap<Ino, u32>,
    pub pages: BTreeMap<Ino, Pages>,
    pub lookups: BTreeMap<Ino, u64>,
    pub opens: BTreeMap<Ino, u32>,
}

impl Maps {
    /// The kernel forgets an inode that nobody uses.
    pub fn forget(&mut self, ino: Ino) {
        self.lookups.remove(&ino);
        self.attrs.remove(&ino);
        self.acls.retain(|(of, _), _| *of != ino);
        self.names
            .retain(|(dir, _), (target, _)| *dir != ino && *target != ino);
    }
}

/// How often the attributes of each inode changed here.
#[derive(Clone, Default)]
pub(super) struct Versions {
    each: BTreeMap<Ino, u64>,
    pub all: u64,
}

impl Versions {
    pub fn of(&self, ino: Ino) -> u64 {
        self.all + self.each.get(&ino).copied().unwrap_or(0)
    }
}

type Locks = RefCell<BTreeMap<Ino, Rc<LockOfInode>>>;

struct LockOfInode(std::sync::Arc<RwLock<()>>);

/// The caches of one mount, which the filesystem may tell to forget.
pub struct Caches {
    pub(super) sim: Rc<Sim>,
    node: u32,
    pub(super) rng: Stream,
    pub(super) enabled: bool,
    pub(super) locking: bool,
    pub(super) maps: RefCell<Maps>,
    locks: Locks,
    pub(super) reads_done: Signal,
    pub(super) unlocked: Signal,
    pub(super) name_epoch: Cell<u64>,
    pub(super) walks: Cell<bool>,
    launder: RefCell<Option<Rc<dyn Launder>>>,
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
            launder: RefCell::new(None),
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

    pub(super) fn lock_of(&self, ino: Ino) -> std::sync::Arc<RwLock<()>> {
        let mut locks = self.locks.borrow_mut();
        let lock = locks
            .entry(ino)
            .or_insert_with(|| Rc::new(LockOfInode(std::sync::Arc::new(RwLock::new(())))));
        std::sync::Arc::clone(&lock.0)
    }

    pub(super) fn name(&self, dir: Ino, name: &Bytes) -> Option<Ino> {
        let maps = self.maps.borrow();
        let (ino, until) = maps.names.get(&(dir, name.clone()))?;
        (self.enabled && *until > self.sim.now()).then_some(*ino)
    }

    pub(super) fn attr(&self, ino: Ino) -> Option<Attr> {
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

    pub(super) fn version(&self, ino: Ino) -> u64 {
        self.maps.borrow().versions.of(ino)
    }

    pub(super) fn change_begins(&self, ino: Ino) {
        *self.maps.borrow_mut().changing.entry(ino).or_default() += 1;
    }

    pub(super) fn change_ends(&self, ino: Ino) {
        let changing = &mut self.maps.borrow_mut().changing;
        if let Some(count) = changing.get_mut(&ino) {
            *count -= 1;
            if *count == 0 {
                changing.remove(&ino);
            }
        }
    }

    /// The inodes whose names a call takes away or moves: their attributes change, too.
    pub(super) fn inodes_of_names(&self, call: &Call) -> Vec<Ino> {
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
    pub(super) fn touch(&self, ino: Ino) {
        let mut maps = self.maps.borrow_mut();
        *maps.versions.each.entry(ino).or_default() += 1;
        maps.attrs.remove(&ino);
        maps.acls.retain(|(of, _), _| *of != ino);
    }

    /// An ACL, or that there is none, if it is known.
    pub(super) fn acl(&self, ino: Ino, name: &Bytes) -> Option<Option<Bytes>> {
        let maps = self.maps.borrow();
        // As for attributes.
        if !self.enabled || maps.changing.contains_key(&ino) {
            return None;
        }
        maps.acls.get(&(ino, name.clone())).cloned()
    }

    /// ACLs are kept until the inode's attributes are to be forgotten, however long
    /// those are good.
    pub(super) fn keep_acl(&self, ino: Ino, name: &Bytes, value: Option<Bytes>, version: u64) {
        if self.enabled && self.version(ino) == version {
            let mut maps = self.maps.borrow_mut();
            maps.acls.insert((ino, name.clone()), value);
        }
    }

    /// Who writes dirty pages back when the filesystem wants them.
    pub fn launder_with(&self, launder: Rc<dyn Launder>) {
        *self.launder.borrow_mut() = Some(launder);
    }

    /// Whether it keeps anything.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Files with dirty pages.
    pub(super) fn dirty_files(&self) -> Vec<Ino> {
        let maps = self.maps.borrow();
        let behind = maps.pages.iter().filter(|(_, pages)| pages.is_behind(&ALL));
        behind.map(|(ino, _)| *ino).collect()
    }

    /// Of answers that were under way together none is kept, as which of them is
    /// newer can not be told: a change may have come between them.
    pub(super) fn keep_attr(&self, attr: Attr, valid: std::time::Duration, version: u64) {
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

    pub(super) fn keep_name(
        &self,
        dir: Ino,
        name: &Bytes,
        ino: Ino,
        valid: std::time::Duration,
        epoch: u64,
    ) {
        if self.enabled && !valid.is_zero() && self.name_epoch.get() == epoch {
            let until = self.sim.now().saturating_add(valid.as_nanos() as u64);
            let mut maps = self.maps.borrow_mut();
            maps.names.insert((dir, name.clone()), (ino, until));
        }
    }

    pub(super) fn drop_name(&self, dir: Ino, name: &Bytes) {
        self.maps.borrow_mut().names.remove(&(dir, name.clone()));
    }

    pub(super) fn count_lookup(&self, ino: Ino) {
        *self.maps.borrow_mut().lookups.entry(ino).or_default() += 1;
    }

    /// Waits until no page of a range is locked or being written back; then locks those
    /// of it that `f` chooses.
    pub(super) async fn lock_pages(
        &self,
        ino: Ino,
        range: std::ops::Range<u64>,
        mut f: impl FnMut(&mut Pages) -> Vec<u64>,
    ) -> Vec<u64> {
        let free = || {
            let mut maps = self.maps.borrow_mut();
            let pages = maps.pages.entry(ino).or_default();
            let held = [&pages.locked, &pages.writing];
            if held
                .iter()
                .any(|held| held.range(range.clone()).next().is_some())
            {
                return None;
            }
            let chosen = f(pages);
            pages.locked.extend(&chosen);
            Some(chosen)
        };
        self.unlocked.wait_for(free).await
    }

    /// Waits until no page of a file is being written back, then does `f` to them.
    pub(super) async fn lock_written<T>(&self, ino: Ino, mut f: impl FnMut(&mut Pages) -> T) -> T {
        let free = || {
            let mut maps = self.maps.borrow_mut();
            let pages = maps.pages.entry(ino).or_default();
            pages.writing.is_empty().then(|| f(pages))
        };
        self.unlocked.wait_for(free).await
    }

    pub(super) fn unlock_pages(&self, ino: Ino, locked: &[u64]) {
        if let Some(pages) = self.maps.borrow_mut().pages.get_mut(&ino) {
            pages.locked.retain(|page| !locked.contains(page));
        }
        self.unlocked.wake_all();
    }

    /// Drops the pages of a range, but for dirty ones.
    pub(super) fn drop_pages(&self, ino: Ino, range: &Range<u64>) {
        if let Some(pages) = self.maps.borrow_mut().pages.get_mut(&ino) {
            pages.drop_clean(range);
        }
    }

    /// Makes a range of a file's pages go: waits for reads under way, writes dirty pages
    /// back.
    pub(super) async fn give_pages_back(&self, ino: Ino, range: &Range<u64>) {
        loop {
            let idle = || {
                let maps = self.maps.borrow();
                let busy = maps.pages.get(&ino).is_some_and(|p| p.reading > 0);
                (!busy).then_some(())
            };
            self.reads_done.wait_for(idle).await;
            let behind = {
                let maps = self.maps.borrow();
                maps.pages.get(&ino).is_some_and(|p| p.is_behind(range))
            };
            let launder = self.launder.borrow().clone();
            match launder.filter(|_| behind) {
                Some(launder) => {
                    probe("kernel.dirty_pages_taken_back");
                    launder.write_back(ino, range.clone()).await;
                }
                None => return self.drop_pages(ino, range),
            }
        }
    }

    /// Pages that are being read: what they bring is younger than all that the
    /// filesystem has answered so far.
    pub(super) fn pages_to_come(&self, ino: Ino) -> BTreeSet<u64> {
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
    pub(super) fn drop_pages_from(&self, ino: Ino, size: u64, younger: &BTreeSet<u64>) {
        if let Some(pages) = self.maps.borrow_mut().pages.get_mut(&ino) {
            let first_gone = size.div_ceil(PAGE);
            let stays = |page: &u64| *page < first_gone || younger.contains(page);
            pages.pages.retain(|page, _| stays(page));
            pages.dirty.retain(|page, _| stays(page));
            pages.dropped += 1;
            let last = size / PAGE;
            if let Some(bytes) = pages.pages.get_mut(&last)
                && !younger.contains(&last)
            {
                bytes[(size % PAGE) as usize..].fill(0);
                if let Some(end) = pages.dirty.get_mut(&last) {
                    *end = (*end).min((size % PAGE) as usize);
                }
            }
        }
    }

    fn forget_one(&self, what: &Inval) {
        match what {
            // Of pages it was just told by themselves.
            Inval::Attr(ino) | Inval::Pages(ino) | Inval::PageRange { ino, .. } => {
                self.touch(*ino);
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
                    Inval::Pages(ino) => caches.give_pages_back(*ino, &ALL).await,
                    Inval::PageRange { ino, start, len } => {
                        let range = start / PAGE..start.saturating_add(*len).div_ceil(PAGE);
                        caches.give_pages_back(*ino, &range).await;
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

impl std::fmt::Debug for Caches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caches").finish_non_exhaustive()
    }
}

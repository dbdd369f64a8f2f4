//! What this mount remembers about inodes beside their items: which are open,
//! which the kernel knows, and their file data buffers.
//!
//! * The *open map* (spec 11 section 4) has a bit for each inode with an open
//!   handle or an internal use. It is not set by what the kernel merely
//!   remembers, so an unlink elsewhere never waits for memory pressure here
//!   (spec 12 section 25).
//! * The *known* set is what the kernel got by entries and did not forget yet:
//!   what has to be invalidated when the inodes' lock is taken back.
//! * The *paged* set is what the kernel may have pages of: they are pulled back
//!   before the lock's mode is lowered, while the requests that this may wait for
//!   can still be served. While an inode is open for dirtying pages, they are only
//!   given out under WRITE; so under READ such an inode is not in the set, and
//!   nobody has to wait for a writer that itself waits for the lock.
//!
//! What can go wrong: a bit cleared too early, and an inode deleted under its
//! open file. A bit is set only under a lock of the inode's group (or before the
//! inode's item exists), and cleared before any attempt to delete.

use super::api::{Ino, Inval};
use super::data::InodeData;
use crate::env::{HashMap, WallTime, mutant};
use crate::format::{INODE_GROUP_NR, OpenInoMap, OpenInoMapArgs};
use crate::locks::omap::LocalMap;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// First inode number of the lock group of `ino`.
pub const fn group_of(ino: Ino) -> Ino {
    ino & !(INODE_GROUP_NR - 1)
}

/// In-memory state of one inode; exists while something needs it.
#[derive(Debug)]
pub struct InodeState {
    /// The inode.
    pub ino: Ino,
    opens: Cell<u32>,
    writers: Cell<u32>,
    /// File data buffers and their bookkeeping.
    pub data: InodeData,
}

impl InodeState {
    /// Number of open handles and internal uses.
    pub fn opens(&self) -> u32 {
        self.opens.get()
    }

    /// Number of handles open for writing.
    pub fn writers(&self) -> u32 {
        self.writers.get()
    }
}

/// What the kernel has of an inode.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    refs: u64,
    is_dir: bool,
    /// Last access seen here and not stored; lost when the kernel forgets the inode
    /// or its lock is taken back (spec 12 section 20).
    atime: Option<WallTime>,
}

/// Which pages the kernel may have of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Paged {
    All,
    /// Byte ranges (start, length), given out while pages were pulled back.
    Ranges(Vec<(u64, u64)>),
}

/// Ranges remembered of an inode before all of it counts as given out.
const RANGES_MAX: usize = 64;

/// A write that the kernel has asked for and that is not done.
#[derive(Debug)]
struct ComingWrite {
    id: u64,
    start: u64,
    end: u64,
    /// What of its pages was read meanwhile: first byte and the one after the last.
    overtaken: Option<(u64, u64)>,
}

/// The tables of one mount.
#[derive(Debug, Default)]
pub struct InodeTable {
    states: RefCell<HashMap<Ino, Rc<InodeState>>>,
    open: RefCell<LocalMap>,
    known: RefCell<BTreeMap<Ino, HashMap<Ino, Known>>>,
    paged: RefCell<BTreeMap<Ino, BTreeMap<Ino, Paged>>>,
    /// Groups whose pages are being pulled back.
    pulling: RefCell<BTreeSet<Ino>>,
    coming: RefCell<BTreeMap<Ino, Vec<ComingWrite>>>,
    next_write: Cell<u64>,
}

/// Notes which reads overtake a write, as long as it exists; see
/// [`InodeTable::write_comes`].
#[derive(Debug)]
pub struct WriteComes<'a> {
    table: &'a InodeTable,
    ino: Ino,
    id: u64,
}

impl WriteComes<'_> {
    /// The first byte and the length of what was read of the write's pages so far.
    pub fn overtaken(&self) -> Option<(u64, u64)> {
        let coming = self.table.coming.borrow();
        let own = coming
            .get(&self.ino)?
            .iter()
            .find(|one| one.id == self.id)?;
        own.overtaken.map(|(start, end)| (start, end - start))
    }
}

impl Drop for WriteComes<'_> {
    fn drop(&mut self) {
        let mut coming = self.table.coming.borrow_mut();
        if let Some(writes) = coming.get_mut(&self.ino) {
            writes.retain(|one| one.id != self.id);
            if writes.is_empty() {
                coming.remove(&self.ino);
            }
        }
    }
}

/// An open use of an inode: its open map bit is set while one exists.
#[derive(Debug)]
pub struct OpenUse<'a> {
    table: &'a InodeTable,
    /// `None` only while it is dropped.
    state: Option<Rc<InodeState>>,
}

impl InodeTable {
    /// The inode's state, made if there is none. It stays in the table while it
    /// is open or has file data; see [`InodeTable::prune`].
    pub fn state(&self, ino: Ino) -> Rc<InodeState> {
        let make = || {
            Rc::new(InodeState {
                ino,
                opens: Cell::new(0),
                writers: Cell::new(0),
                data: InodeData::default(),
            })
        };
        self.states
            .borrow_mut()
            .entry(ino)
            .or_insert_with(make)
            .clone()
    }

    /// The inode's state, if there is any.
    pub fn find(&self, ino: Ino) -> Option<Rc<InodeState>> {
        self.states.borrow().get(&ino).cloned()
    }

    /// States of all inodes of a lock group, in ascending order.
    pub fn in_group(&self, ino: Ino) -> Vec<Rc<InodeState>> {
        let group = group_of(ino);
        let states = self.states.borrow();
        let mut found: Vec<_> = states
            .values()
            .filter(|s| group_of(s.ino) == group)
            .cloned()
            .collect();
        found.sort_unstable_by_key(|s| s.ino);
        found
    }

    /// Drops the state of an inode that nothing needs any more.
    pub fn prune(&self, ino: Ino) {
        let mut states = self.states.borrow_mut();
        let idle =
            |s: &Rc<InodeState>| s.opens.get() == 0 && Rc::strong_count(s) == 1 && s.data.is_idle();
        if states.get(&ino).is_some_and(idle) {
            states.remove(&ino);
        }
    }

    /// Drops the states of all inodes that nothing needs any more.
    pub fn prune_idle(&self) {
        let mut states = self.states.borrow_mut();
        states.retain(|_, s| s.opens.get() > 0 || Rc::strong_count(s) > 1 || !s.data.is_idle());
    }

    /// Counts an opening. Call under a lock of the group that can read, after the
    /// inode item was seen, or before the item of a new inode is created.
    pub fn open(&self, ino: Ino, write: bool) -> Rc<InodeState> {
        let state = self.state(ino);
        state.opens.set(state.opens.get() + 1);
        if write {
            state.writers.set(state.writers.get() + 1);
        }
        self.open.borrow_mut().get(ino);
        state
    }

    /// Counts a closing; true if it was the last: the open map bit is clear now.
    /// A closing without opening changes nothing.
    pub fn close(&self, ino: Ino, write: bool) -> bool {
        let Some(state) = self.find(ino) else {
            return false;
        };
        if state.opens.get() == 0 {
            tracing::warn!(ino, "an inode was closed that is not open");
            return false;
        }
        state.opens.set(state.opens.get() - 1);
        if write {
            state.writers.set(state.writers.get().saturating_sub(1));
        }
        let last = self.open.borrow_mut().put(ino);
        drop(state);
        self.prune(ino);
        last
    }

    /// An internal use that counts as open until it is dropped.
    pub fn open_use(&self, ino: Ino) -> OpenUse<'_> {
        OpenUse {
            table: self,
            state: Some(self.open(ino, false)),
        }
    }

    /// Whether the open map bit of the inode is set.
    pub fn is_open(&self, ino: Ino) -> bool {
        self.open.borrow().is_open(ino)
    }

    /// Answer to OPEN_INO_MAP: the bits of a group, arguments echoed.
    pub fn answer(&self, args: &OpenInoMapArgs) -> OpenInoMap {
        self.open.borrow().answer(args)
    }

    /// The kernel got one more reference to the inode by an entry.
    pub fn learn(&self, ino: Ino, is_dir: bool) {
        let mut groups = self.known.borrow_mut();
        let known = groups
            .entry(group_of(ino))
            .or_default()
            .entry(ino)
            .or_default();
        known.refs += 1;
        known.is_dir = is_dir;
    }

    /// The kernel dropped `count` references.
    pub fn forget(&self, ino: Ino, count: u64) {
        let mut known = self.known.borrow_mut();
        let Some(group) = known.get_mut(&group_of(ino)) else {
            return;
        };
        let Some(have) = group.get_mut(&ino) else {
            return;
        };
        have.refs = have.refs.saturating_sub(count);
        if have.refs == 0 {
            self.unpage(ino);
            group.remove(&ino);
            if group.is_empty() {
                known.remove(&group_of(ino));
            }
        }
    }

    /// Whether the kernel has a reference to the inode.
    pub fn is_known(&self, ino: Ino) -> bool {
        let groups = self.known.borrow();
        let group = groups.get(&group_of(ino));
        group.is_some_and(|group| group.contains_key(&ino))
    }

    /// Notes that the kernel is being given pages, in the step that answers it.
    pub fn page(&self, ino: Ino, start: u64, len: u64) {
        let pulling = self.pulling.borrow().contains(&group_of(ino));
        let mut groups = self.paged.borrow_mut();
        let group = groups.entry(group_of(ino)).or_default();
        if !pulling {
            group.insert(ino, Paged::All);
            return;
        }
        let new = || Paged::Ranges(Vec::new());
        let paged = group.entry(ino).or_insert_with(new);
        if let Paged::Ranges(ranges) = paged {
            ranges.push((start, len.max(1)));
            if ranges.len() > RANGES_MAX {
                *paged = Paged::All;
            }
        }
    }

    /// A write came from the kernel's pages, and waits. The kernel has what it writes in
    /// its pages already and does not hold those: it may be made to drop them (for an
    /// invalidation that began before), and then read them again from here, before the
    /// write is done. What it reads then is old when it is, and nobody else knows.
    pub fn write_comes(&self, ino: Ino, start: u64, len: u64) -> WriteComes<'_> {
        let id = self.next_write.get();
        self.next_write.set(id + 1);
        let write = ComingWrite {
            id,
            start,
            end: start.saturating_add(len),
            overtaken: None,
        };
        self.coming.borrow_mut().entry(ino).or_default().push(write);
        WriteComes {
            table: self,
            ino,
            id,
        }
    }

    /// As [`InodeTable::page`], for what was read.
    pub fn page_read(&self, ino: Ino, start: u64, len: u64) {
        self.page(ino, start, len);
        let mut coming = self.coming.borrow_mut();
        let end = start.saturating_add(len);
        for write in coming.get_mut(&ino).into_iter().flatten() {
            let (from, to) = (start.max(write.start), end.min(write.end));
            if from < to {
                let (a, b) = write.overtaken.unwrap_or((from, to));
                write.overtaken = Some((a.min(from), b.max(to)));
            }
        }
    }

    /// Whether the kernel may have pages of the inode.
    pub fn is_paged(&self, ino: Ino) -> bool {
        let groups = self.paged.borrow();
        let group = groups.get(&group_of(ino));
        group.is_some_and(|group| group.contains_key(&ino))
    }

    fn unpage(&self, ino: Ino) {
        let mut groups = self.paged.borrow_mut();
        if let Some(group) = groups.get_mut(&group_of(ino)) {
            group.remove(&ino);
            if group.is_empty() {
                groups.remove(&group_of(ino));
            }
        }
    }

    /// Whether a handle is open here by which the kernel may dirty pages.
    pub fn may_dirty(&self, ino: Ino) -> bool {
        let states = self.states.borrow();
        states.get(&ino).is_some_and(|state| state.writers() > 0)
    }

    /// Inodes of the group whose pages must come back before the lock is lowered,
    /// to NULL or, if `dirty_only`, to READ.
    fn to_pull(&self, group: Ino, dirty_only: bool) -> Vec<Ino> {
        let groups = self.paged.borrow();
        let paged = groups.get(&group).into_iter().flat_map(BTreeMap::keys);
        // Mutant: breaks spec 12 section 25, pages that may be dirty.
        let goes = |ino: &Ino| !dirty_only || self.may_dirty(*ino) && !mutant("dirty_pages_stay");
        paged.copied().filter(goes).collect()
    }

    /// Whether nothing has to be pulled back.
    pub fn is_pulled(&self, ino: Ino, dirty_only: bool) -> bool {
        self.to_pull(group_of(ino), dirty_only).is_empty()
    }

    /// Takes what must be pulled back out of the set; what is given out from now on
    /// until [`InodeTable::pulled`] is noted range by range.
    pub fn pull(&self, ino: Ino, dirty_only: bool) -> Vec<Inval> {
        let group = group_of(ino);
        self.pulling.borrow_mut().insert(group);
        let mut what = Vec::new();
        for ino in self.to_pull(group, dirty_only) {
            let mut groups = self.paged.borrow_mut();
            match groups.get_mut(&group).and_then(|g| g.remove(&ino)) {
                Some(Paged::Ranges(ranges)) => {
                    let range = |(start, len)| Inval::PageRange { ino, start, len };
                    what.extend(ranges.into_iter().map(range));
                }
                _ => what.push(Inval::Pages(ino)),
            }
        }
        what
    }

    /// The lock of the group was lowered.
    pub fn pulled(&self, ino: Ino) {
        self.pulling.borrow_mut().remove(&group_of(ino));
    }

    /// When an inode that the kernel knows was accessed, if that is later than its
    /// item says.
    pub(super) fn atime(&self, ino: Ino) -> Option<WallTime> {
        let groups = self.known.borrow();
        groups.get(&group_of(ino))?.get(&ino)?.atime
    }

    /// Sets or forgets the time of the last access to an inode that the kernel knows.
    pub(super) fn set_atime(&self, ino: Ino, atime: Option<WallTime>) {
        let mut groups = self.known.borrow_mut();
        let group = groups.get_mut(&group_of(ino));
        if let Some(known) = group.and_then(|group| group.get_mut(&ino)) {
            known.atime = atime;
        }
    }

    /// Forgets the access times of a lock group.
    pub(super) fn forget_atimes(&self, ino: Ino) {
        let mut groups = self.known.borrow_mut();
        for known in groups.get_mut(&group_of(ino)).into_iter().flatten() {
            known.1.atime = None;
        }
    }

    /// Inodes of the group that the kernel has, and whether each is a directory, of
    /// which it may have names: known by entry, or open; ascending.
    pub fn known_in_group(&self, ino: Ino) -> Vec<(Ino, bool)> {
        let groups = self.known.borrow();
        let known = groups.get(&group_of(ino)).into_iter().flatten();
        let mut inos: Vec<(Ino, bool)> = known.map(|(&ino, known)| (ino, known.is_dir)).collect();
        let open = self.in_group(ino).into_iter().filter(|s| s.opens() > 0);
        inos.extend(open.map(|state| (state.ino, false)));
        inos.sort_unstable();
        inos.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            kept.1 |= same && next.1;
            same
        });
        inos
    }

    /// All inodes that the kernel has or that are open, ascending.
    pub fn everything(&self) -> Vec<Ino> {
        let groups: BTreeSet<Ino> = {
            let open = self.states.borrow();
            let open = open.keys().map(|ino| group_of(*ino));
            self.known.borrow().keys().copied().chain(open).collect()
        };
        let known = groups.iter().flat_map(|group| self.known_in_group(*group));
        known.map(|(ino, _)| ino).collect()
    }

    /// Inodes in use in ascending order, with the number of uses and of writers.
    pub fn in_use(&self) -> Vec<(Ino, u32, u32)> {
        let states = self.states.borrow();
        let used = states.values().filter(|state| state.opens() > 0);
        let mut all: Vec<_> = used.map(|s| (s.ino, s.opens(), s.writers())).collect();
        all.sort_unstable();
        all
    }

    /// Number of inodes the kernel knows.
    pub fn known_len(&self) -> usize {
        self.known.borrow().values().map(HashMap::len).sum()
    }

    /// Number of inodes with state in memory.
    pub fn state_len(&self) -> usize {
        self.states.borrow().len()
    }
}

impl std::ops::Deref for OpenUse<'_> {
    type Target = InodeState;
    fn deref(&self) -> &InodeState {
        self.state.as_ref().expect("not dropped yet")
    }
}

impl Drop for OpenUse<'_> {
    fn drop(&mut self) {
        if let Some(ino) = self.state.take().map(|state| state.ino) {
            self.table.close(ino, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_knows_what_was_read_of_its_range_before_it() {
        let table = InodeTable::default();
        let write = table.write_comes(1025, 5000, 10_000);
        let other = table.write_comes(1025, 100_000, 1);
        table.page_read(1026, 0, 1 << 20);
        table.page_read(1025, 0, 5000);
        assert_eq!(write.overtaken(), None);
        table.page_read(1025, 4096, 4096);
        table.page_read(1025, 12_288, 1 << 15);
        assert_eq!(write.overtaken(), Some((5000, 10_000)));
        assert_eq!(other.overtaken(), None);
        drop(write);
        table.page_read(1025, 98_304, 4096);
        assert_eq!(other.overtaken(), Some((100_000, 1)));
        drop(other);
        assert!(table.coming.borrow().is_empty());
    }

    #[test]
    fn the_bit_is_set_while_open_and_not_by_what_the_kernel_knows() {
        let table = InodeTable::default();
        table.learn(1030, true);
        assert!(!table.is_open(1030));
        table.open(1030, true);
        table.open(1030, false);
        assert!(table.is_open(1030));
        assert_eq!(table.find(1030).unwrap().writers(), 1);
        let args = OpenInoMapArgs {
            group_nr: 1.into(),
            req_id: 3.into(),
        };
        assert_eq!(table.answer(&args).bits[0].get(), 1 << 6);
        assert!(!table.close(1030, false));
        assert!(table.close(1030, true));
        assert!(!table.is_open(1030));
        assert_eq!(table.state_len(), 0);
        assert!(!table.close(1030, true), "a closing too many is ignored");
    }

    #[test]
    fn known_inodes_are_found_by_group_until_forgotten() {
        let table = InodeTable::default();
        for ino in [1025, 2050, 1024, 1025] {
            table.learn(ino, ino == 1024);
        }
        table.open(1026, false);
        let all = [(1024, true), (1025, false), (1026, false)];
        assert_eq!(table.known_in_group(1500), all);
        table.forget(1025, 1);
        table.forget(1024, 9);
        table.forget(7, 1);
        assert_eq!(table.known_in_group(1024), all[1..]);
        assert_eq!(table.known_len(), 2);
    }

    #[test]
    fn pages_given_out_while_others_are_pulled_are_pulled_by_range() {
        let table = InodeTable::default();
        table.learn(1025, false);
        table.page(1025, 0, 4096);
        table.page(1026, 0, 4096);
        table.open(1026, true);
        assert!(!table.is_pulled(1024, true));
        assert_eq!(table.pull(1024, true), [Inval::Pages(1026)]);
        assert!(table.is_pulled(1024, true) && !table.is_pulled(1024, false));
        table.page(1026, 8192, 4096);
        let range = Inval::PageRange {
            ino: 1026,
            start: 8192,
            len: 4096,
        };
        assert_eq!(table.pull(1024, false), [Inval::Pages(1025), range]);
        table.pulled(1024);
        table.page(1025, 8192, 4096);
        assert!(table.is_paged(1025));
        table.forget(1025, 1);
        assert!(
            table.is_pulled(1024, false),
            "a forgotten inode has no pages"
        );
    }

    #[test]
    fn access_times_are_kept_while_the_kernel_knows_the_inode() {
        let table = InodeTable::default();
        let at = Some(WallTime { sec: 7, nsec: 0 });
        table.set_atime(1030, at);
        assert_eq!(table.atime(1030), None, "nobody knows it");
        for ino in [1030, 1031, 2050] {
            table.learn(ino, true);
            table.set_atime(ino, at);
        }
        table.learn(1030, true);
        assert_eq!(table.atime(1030), at);
        table.forget(1030, 2);
        table.learn(1030, true);
        assert_eq!(table.atime(1030), None);
        table.forget_atimes(1024);
        assert_eq!((table.atime(1031), table.atime(2050)), (None, at));
    }

    #[test]
    fn an_internal_use_ends_with_its_guard() {
        let table = InodeTable::default();
        let inner = table.open_use(5);
        assert!(table.is_open(5));
        drop(inner);
        assert!(!table.is_open(5));
        assert_eq!(table.state_len(), 0);
    }
}

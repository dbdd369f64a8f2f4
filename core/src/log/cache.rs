//! The item cache: which items exist in the parts of the key space that this
//! mount holds locks on (spec 04 section 3). Plain data, no I/O.
//!
//! Pages are key ranges that never overlap, with all items of the range in key
//! order. A key outside of every page is unknown; a key inside a page without an
//! item is known to be absent. Pages stay inside one lock's range, because they
//! are made for one lock.
//!
//! What can go wrong:
//! * a dirty item leaving: reclaim and reads touch clean pages and unknown ranges only;
//! * a deleted item coming back: a deletion stays as a dirty negative entry until
//!   its commit is durable, so its range can not be read in again before.

use super::LogError;
use crate::btree::{self, Combined, ListItem};
use crate::env::{mutant, probe};
use crate::format::{ITEM_FLAG_DELETION, Key, KeyRange};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};

/// Changed in the open transaction.
const DIRTY: u8 = 1;
/// Changed since it was last put in the log tree.
const PENDING: u8 = 2;
/// An older version may be in some btree: deleting it needs a deletion item.
const PERSISTENT: u8 = 4;
/// Deleted; only while dirty.
const DELETION: u8 = 8;
/// A change to be added to what the trees hold; only while pending.
const DELTA: u8 = 16;

/// Bytes charged for an item besides its value: the entry and the value's allocation.
const ITEM_BYTES: usize = size_of::<Item>() + 48;
/// Bytes charged for a page besides its items.
const PAGE_BYTES: usize = size_of::<Page>() + 64;
/// Pages that one reclaim looks at, at most.
const RECLAIM_SCAN: usize = 512;

#[derive(Debug)]
struct Item {
    key: Key,
    value: Bytes,
    seq: u64,
    flags: u8,
}

impl Item {
    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Whether a reader sees it.
    fn is_visible(&self) -> bool {
        !self.has(DELETION | DELTA)
    }

    fn bytes(&self) -> usize {
        ITEM_BYTES + self.value.len()
    }
}

#[derive(Debug)]
struct Page {
    end: Key,
    items: Vec<Item>,
    dirty: u32,
    pending: u32,
    referenced: bool,
}

impl Page {
    fn empty(end: Key) -> Self {
        Self {
            end,
            items: Vec::new(),
            dirty: 0,
            pending: 0,
            referenced: true,
        }
    }

    fn find(&self, key: &Key) -> Place {
        self.items.binary_search_by(|item| item.key.cmp(key))
    }

    fn bytes(&self) -> usize {
        PAGE_BYTES + self.items.iter().map(Item::bytes).sum::<usize>()
    }

    fn recount(&mut self) {
        let count = |flag| self.items.iter().filter(|item| item.has(flag)).count() as u32;
        (self.dirty, self.pending) = (count(DIRTY), count(PENDING));
    }
}

/// What the cache knows of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing: read it in.
    Unknown,
    /// There is no such item.
    Absent,
    /// Its value.
    Value(Bytes),
}

/// What the cache knows of the first item in a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KnownNext {
    /// Nothing from this key on: read it in.
    Unknown(Key),
    /// There is none.
    None,
    /// The item.
    Item(Key, Bytes),
}

/// A change asked for a key that no page covers: read it in first.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UnknownKey;

/// Where a key's item is in its page, or would be.
type Place = Result<usize, usize>;

/// The outcome of a change: not known yet, or made or refused.
pub(super) type Change = Result<Result<(), LogError>, UnknownKey>;

/// Counters of the item cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Pages of known keys.
    pub pages: usize,
    /// Items, negative ones counted.
    pub items: usize,
    /// Estimated memory, in bytes.
    pub bytes: usize,
    /// Items changed in the open transaction.
    pub dirty_items: usize,
    /// Items that the open log tree does not have yet.
    pub pending_items: usize,
    /// Bytes of values and item headers of the pending items.
    pub pending_bytes: usize,
    /// Pages that left for others.
    pub reclaimed_pages: u64,
}

/// All pages of one mount.
#[derive(Debug)]
pub(super) struct ItemCache {
    pages: BTreeMap<Key, Page>,
    /// Starts of pages with dirty items.
    dirty_pages: BTreeSet<Key>,
    /// Starts of pages with pending items.
    pending_pages: BTreeSet<Key>,
    page_items: usize,
    stats: CacheStats,
    hand: Key,
}

/// An item that was read in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReadItem {
    pub key: Key,
    pub seq: u64,
    pub value: Bytes,
}

impl ItemCache {
    /// An empty cache whose pages hold at most `page_items` items.
    pub fn new(page_items: usize) -> Self {
        assert!(page_items >= 2, "a page must hold two items");
        Self {
            pages: BTreeMap::new(),
            dirty_pages: BTreeSet::new(),
            pending_pages: BTreeSet::new(),
            page_items,
            stats: CacheStats::default(),
            hand: Key::ZEROS,
        }
    }

    pub fn stats(&self) -> CacheStats {
        CacheStats {
            pages: self.pages.len(),
            ..self.stats
        }
    }

    fn page(&self, key: &Key) -> Option<(&Key, &Page)> {
        let found = self.pages.range(..=key).next_back();
        found.filter(|(_, page)| *key <= page.end)
    }

    fn page_mut(&mut self, key: &Key) -> Option<(Key, &mut Page)> {
        let (start, page) = self.pages.range_mut(..=key).next_back()?;
        if *key > page.end {
            return None;
        }
        page.referenced = true;
        Some((*start, page))
    }

    /// Whether a page covers `key`.
    pub fn knows(&self, key: &Key) -> bool {
        self.page(key).is_some()
    }

    /// What readers see under `key`.
    pub fn lookup(&mut self, key: &Key) -> Known {
        let Some((_, page)) = self.page_mut(key) else {
            return Known::Unknown;
        };
        match page.find(key) {
            Ok(at) if page.items[at].is_visible() => Known::Value(page.items[at].value.clone()),
            _ => Known::Absent,
        }
    }

    /// The first visible item in `from..=last`.
    pub fn next(&mut self, mut from: Key, last: &Key) -> KnownNext {
        while from <= *last {
            let Some((_, page)) = self.page_mut(&from) else {
                return KnownNext::Unknown(from);
            };
            let at = page.items.partition_point(|item| item.key < from);
            if let Some(item) = page.items[at..].iter().find(|item| item.is_visible()) {
                if item.key > *last {
                    return KnownNext::None;
                }
                return KnownNext::Item(item.key, item.value.clone());
            }
            if page.end == Key::ONES {
                break;
            }
            from = page.end.inc();
        }
        KnownNext::None
    }

    /// Applies `change` to the page of `key` and keeps all counts right.
    fn change(
        &mut self,
        key: &Key,
        change: impl FnOnce(&mut Page, Place) -> Result<(), LogError>,
    ) -> Change {
        let Some((start, page)) = self.page_mut(key) else {
            return Err(UnknownKey);
        };
        let at = page.find(key);
        let before = at.ok().map(|at| Counts::of(&page.items[at]));
        let len = page.items.len();
        if let Err(refused) = change(page, at) {
            return Ok(Err(refused));
        }
        // The change touched this key's item only: `at` is still its place.
        let place = at.unwrap_or_else(|at| at);
        let exists = page.items.get(place).is_some_and(|item| item.key == *key);
        let after = exists.then(|| Counts::of(&page.items[place]));
        debug_assert!(page.items.len().abs_diff(len) <= 1);
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        page.dirty = page.dirty - before.dirty as u32 + after.dirty as u32;
        page.pending = page.pending - before.pending as u32 + after.pending as u32;
        let (is_dirty, is_pending) = (page.dirty > 0, page.pending > 0);
        let full = page.items.len() > self.page_items;
        before.leave(&mut self.stats);
        after.enter(&mut self.stats);
        if before.dirty != after.dirty {
            file(&mut self.dirty_pages, start, is_dirty);
        }
        if before.pending != after.pending {
            file(&mut self.pending_pages, start, is_pending);
        }
        if full {
            self.split(start, place);
        }
        Ok(Ok(()))
    }

    /// Splits a page that became too full by the item at `place`: in the middle,
    /// or before an item that was appended (keys that only grow fill pages).
    fn split(&mut self, start: Key, place: usize) {
        let page = self.pages.get_mut(&start).expect("the page to split");
        let last = page.items.len() - 1;
        let cut = if place == last {
            last
        } else {
            page.items.len() / 2
        };
        let right_start = page.items[cut].key;
        let mut right = Page {
            items: page.items.split_off(cut),
            ..Page::empty(page.end)
        };
        page.end = right_start.dec();
        page.recount();
        right.recount();
        for (at, page) in [(start, &*page), (right_start, &right)] {
            file(&mut self.dirty_pages, at, page.dirty > 0);
            file(&mut self.pending_pages, at, page.pending > 0);
        }
        self.stats.bytes += PAGE_BYTES;
        self.pages.insert(right_start, right);
    }

    /// A new item; its key must be absent.
    pub fn create(&mut self, key: &Key, value: Bytes, seq: u64) -> Change {
        self.change(key, |page, place| {
            let new = |flags| Item {
                key: *key,
                value,
                seq,
                flags: flags | DIRTY | PENDING,
            };
            match place {
                Ok(at) if !page.items[at].has(DELETION) => return Err(LogError::Exists(*key)),
                Ok(at) => page.items[at] = new(page.items[at].flags & PERSISTENT),
                Err(at) => page.items.insert(at, new(0)),
            }
            Ok(())
        })
    }

    /// Another value (or the same one, for `None`) of an item that exists.
    pub fn update(&mut self, key: &Key, value: Option<Bytes>, seq: u64) -> Change {
        self.change(key, |page, place| {
            let (_, item) = visible_mut(page, place, key)?;
            if let Some(value) = value {
                item.value = value;
            }
            item.seq = seq;
            item.flags |= DIRTY | PENDING;
            Ok(())
        })
    }

    /// Deletes an item that exists.
    pub fn delete(&mut self, key: &Key, seq: u64) -> Change {
        self.change(key, |page, place| {
            let (at, item) = visible_mut(page, place, key)?;
            // Mutant: breaks spec 04 section 3.4, "delete": the trees keep the item.
            if item.has(PERSISTENT) && !mutant("deletion_item_dropped") {
                item.value = Bytes::new();
                item.seq = seq;
                item.flags = DIRTY | PENDING | PERSISTENT | DELETION;
            } else {
                page.items.remove(at);
            }
            Ok(())
        })
    }

    /// Writes an item, or a deletion for `None`, over whatever is there.
    pub fn force(&mut self, key: &Key, value: Option<Bytes>, seq: u64) -> Change {
        self.change(key, |page, place| {
            let deletion = if value.is_none() { DELETION } else { 0 };
            let new = Item {
                key: *key,
                value: value.unwrap_or_default(),
                seq,
                flags: DIRTY | PENDING | PERSISTENT | deletion,
            };
            match place {
                Ok(at) => page.items[at] = new,
                Err(at) => page.items.insert(at, new),
            }
            Ok(())
        })
    }

    /// Adds to the delta of a key (spec 04 section 3.5).
    pub fn delta(&mut self, key: &Key, value: Bytes, seq: u64) -> Change {
        self.change(key, |page, place| {
            let at = match place {
                Ok(at) => at,
                Err(at) => {
                    let flags = DIRTY | PENDING | DELTA;
                    let new = Item {
                        key: *key,
                        value,
                        seq,
                        flags,
                    };
                    page.items.insert(at, new);
                    return Ok(());
                }
            };
            let item = &mut page.items[at];
            if !item.has(DELTA) {
                return Err(LogError::NotDelta(*key));
            }
            let mut sum = item.value.to_vec();
            match btree::combine_delta(key, &mut sum, &value)? {
                Combined::Sum => {
                    item.value = sum.into();
                    item.seq = seq;
                }
                Combined::Null => {
                    page.items.remove(at);
                }
            }
            Ok(())
        })
    }

    /// Makes the unknown keys around `key` within `bounds` known and empty: for
    /// WRITE_ONLY locks, whose holders never read.
    pub fn insert_empty(&mut self, key: &Key, bounds: &KeyRange) {
        assert!(bounds.contains(key), "{key} is outside of {bounds}");
        if self.knows(key) {
            return;
        }
        let before = self.pages.range(..=key).next_back();
        let start = before.map_or(bounds.start, |(_, page)| bounds.start.max(page.end.inc()));
        let after = self.pages.range(key..).next();
        let end = after.map_or(bounds.end, |(next, _)| bounds.end.min(next.dec()));
        self.insert_page(start, Page::empty(end));
    }

    /// Adds what was read of `range`, `items` in key order, where nothing is
    /// known yet. What is known wins.
    pub fn insert_read(&mut self, range: &KeyRange, items: Vec<ReadItem>) {
        let mut items = items.into_iter().peekable();
        let mut at = range.start;
        loop {
            let covering = self.page(&at).map(|(_, page)| page.end);
            let end = match covering {
                Some(end) => {
                    while items.next_if(|item| item.key <= end).is_some() {}
                    end
                }
                None => {
                    let after = self.pages.range(at..=range.end).next();
                    let end = after.map_or(range.end, |(next, _)| next.dec());
                    self.insert_gap(at, end, &mut items);
                    end
                }
            };
            if end >= range.end {
                return;
            }
            at = end.inc();
        }
    }

    /// Fills an unknown range with pages that have some room to grow.
    fn insert_gap(
        &mut self,
        mut start: Key,
        end: Key,
        items: &mut std::iter::Peekable<std::vec::IntoIter<ReadItem>>,
    ) {
        let fill = (self.page_items * 3 / 4).max(1);
        loop {
            let mut page = Page::empty(end);
            while page.items.len() < fill
                && let Some(item) = items.next_if(|item| item.key <= end)
            {
                page.items.push(Item {
                    key: item.key,
                    value: item.value,
                    seq: item.seq,
                    flags: PERSISTENT,
                });
            }
            let more = items.peek().filter(|item| item.key <= end);
            let next_start = more.map(|item| item.key);
            if let Some(next) = next_start {
                page.end = next.dec();
            }
            self.insert_page(start, page);
            match next_start {
                Some(next) => start = next,
                None => return,
            }
        }
    }

    fn insert_page(&mut self, start: Key, page: Page) {
        assert!(start <= page.end, "page {start}..{} is empty", page.end);
        self.stats.bytes += page.bytes();
        self.stats.items += page.items.len();
        let old = self.pages.insert(start, page);
        assert!(old.is_none(), "two pages start at {start}");
    }

    fn remove_page(&mut self, start: &Key) -> Page {
        let page = self.pages.remove(start).expect("the page to remove");
        for item in &page.items {
            Counts::of(item).leave(&mut self.stats);
        }
        self.stats.bytes -= PAGE_BYTES;
        self.dirty_pages.remove(start);
        self.pending_pages.remove(start);
        page
    }

    /// Takes all pending items, in key order, to put them in the log tree. Deltas
    /// leave the cache: what comes later is added on top. The others stay dirty,
    /// and persistent, since the tree has a version of them from now on.
    pub fn take_pending(&mut self) -> Vec<ListItem> {
        let mut list = Vec::with_capacity(self.stats.pending_items);
        for start in std::mem::take(&mut self.pending_pages) {
            let page = self.pages.get_mut(&start).expect("pending pages exist");
            let stats = &mut self.stats;
            page.items.retain_mut(|item| {
                if !item.has(PENDING) {
                    return true;
                }
                Counts::of(item).leave(stats);
                list.push(ListItem {
                    key: item.key,
                    seq: item.seq,
                    flags: if item.has(DELETION) {
                        ITEM_FLAG_DELETION
                    } else {
                        0
                    },
                    value: item.value.clone(),
                });
                item.flags = item.flags & !PENDING | PERSISTENT;
                let stays = !item.has(DELTA);
                if stays {
                    Counts::of(item).enter(stats);
                }
                stays
            });
            page.recount();
            file(&mut self.dirty_pages, start, page.dirty > 0);
        }
        list
    }

    /// The transaction is durable: nothing is dirty any more (spec 04 section 3.6).
    pub fn clean(&mut self) {
        assert!(
            self.pending_pages.is_empty(),
            "pending items at the end of a commit"
        );
        for start in std::mem::take(&mut self.dirty_pages) {
            let page = self.pages.get_mut(&start).expect("dirty pages exist");
            let stats = &mut self.stats;
            page.items.retain_mut(|item| {
                if !item.has(DIRTY) {
                    return true;
                }
                Counts::of(item).leave(stats);
                let stays = !item.has(DELETION | DELTA);
                item.flags = PERSISTENT;
                if stays {
                    Counts::of(item).enter(stats);
                }
                stays
            });
            page.dirty = 0;
        }
        assert_eq!(
            self.stats.dirty_items, 0,
            "dirty items outside of dirty pages"
        );
    }

    /// Starts of the pages that share keys with `range`.
    fn overlapping<'a>(&'a self, range: &'a KeyRange) -> impl Iterator<Item = (Key, &'a Page)> {
        let first = self
            .page(&range.start)
            .map_or(range.start, |(start, _)| *start);
        let pages = self.pages.range(first..=range.end.max(first));
        pages.map(|(start, page)| (*start, page))
    }

    /// Every page: what is known, and whether it has dirty items. For checkers.
    pub fn ranges(&self) -> impl Iterator<Item = (KeyRange, bool)> + '_ {
        let pages = self.pages.iter();
        pages.map(|(start, page)| (KeyRange::new(*start, page.end), page.dirty > 0))
    }

    /// Whether anything is known of the range.
    pub fn has_any(&self, range: &KeyRange) -> bool {
        self.overlapping(range).next().is_some()
    }

    /// The first dirty key in the range.
    pub fn dirty_in(&self, range: &KeyRange) -> Option<Key> {
        let pages = self.overlapping(range).filter(|(_, page)| page.dirty > 0);
        let mut items = pages.flat_map(|(_, page)| &page.items);
        let found = items.find(|item| item.has(DIRTY) && range.contains(&item.key));
        found.map(|item| item.key)
    }

    /// Forgets everything known of the range, dirty or not; what lies outside of
    /// it stays.
    pub fn invalidate(&mut self, range: &KeyRange) {
        let starts: Vec<Key> = self.overlapping(range).map(|(start, _)| start).collect();
        for start in starts {
            let mut page = self.remove_page(&start);
            let end = page.end;
            if end > range.end {
                let cut = page.items.partition_point(|item| item.key <= range.end);
                let items = page.items.split_off(cut);
                self.insert_rest(range.end.inc(), end, items);
            }
            if start < range.start {
                let cut = page.items.partition_point(|item| item.key < range.start);
                page.items.truncate(cut);
                self.insert_rest(start, range.start.dec(), page.items);
            }
        }
    }

    fn insert_rest(&mut self, start: Key, end: Key, items: Vec<Item>) {
        let mut page = Page {
            items,
            ..Page::empty(end)
        };
        page.recount();
        for item in &page.items {
            Counts::of(item).enter(&mut self.stats);
        }
        // `insert_page` counts items and bytes: take them back out.
        self.stats.items -= page.items.len();
        self.stats.bytes -= page.bytes() - PAGE_BYTES;
        file(&mut self.dirty_pages, start, page.dirty > 0);
        file(&mut self.pending_pages, start, page.pending > 0);
        self.insert_page(start, page);
    }

    /// Drops clean pages that were not used lately until at most `limit` bytes
    /// are cached, sparing the page of `keep`; looks at a bounded number of pages.
    pub fn reclaim(&mut self, limit: usize, keep: Option<&Key>) {
        let keep = keep.and_then(|key| self.page(key)).map(|(start, _)| *start);
        for _ in 0..RECLAIM_SCAN {
            if self.stats.bytes <= limit {
                return;
            }
            let Some((&start, page)) = self.pages.range_mut(self.hand..).next() else {
                if self.hand == Key::ZEROS {
                    return;
                }
                self.hand = Key::ZEROS;
                continue;
            };
            self.hand = page.end;
            if self.hand != Key::ONES {
                self.hand = self.hand.inc();
            }
            let spared = std::mem::take(&mut page.referenced) || page.dirty > 0;
            if spared || Some(start) == keep {
                continue;
            }
            probe("log.cache_reclaim");
            self.remove_page(&start);
            self.stats.reclaimed_pages += 1;
        }
    }

    /// Checks every invariant; for tests and the simulator.
    ///
    /// # Panics
    /// If one is broken.
    pub fn assert_consistent(&self) {
        let mut last: Option<Key> = None;
        let mut sum = CacheStats {
            pages: self.pages.len(),
            reclaimed_pages: self.stats.reclaimed_pages,
            ..CacheStats::default()
        };
        for (start, page) in &self.pages {
            assert!(
                last.is_none_or(|last| last < *start),
                "pages overlap at {start}"
            );
            assert!(*start <= page.end, "page {start} ends before it starts");
            for pair in page.items.windows(2) {
                assert!(pair[0].key < pair[1].key, "items out of order");
            }
            let inside = |item: &Item| *start <= item.key && item.key <= page.end;
            assert!(
                page.items.iter().all(inside),
                "an item outside of page {start}"
            );
            sum.bytes += PAGE_BYTES;
            page.items
                .iter()
                .for_each(|item| Counts::of(item).enter(&mut sum));
            let count = |flag| page.items.iter().filter(|item| item.has(flag)).count() as u32;
            assert_eq!((page.dirty, page.pending), (count(DIRTY), count(PENDING)));
            assert_eq!(self.dirty_pages.contains(start), page.dirty > 0);
            assert_eq!(self.pending_pages.contains(start), page.pending > 0);
            for item in &page.items {
                assert!(item.has(DIRTY) || !item.has(DELETION | PENDING | DELTA));
            }
            last = Some(page.end);
        }
        assert_eq!(sum, self.stats(), "the counters");
    }
}

fn visible_mut<'a>(
    page: &'a mut Page,
    place: Place,
    key: &Key,
) -> Result<(usize, &'a mut Item), LogError> {
    match place {
        Ok(at) if page.items[at].is_visible() => Ok((at, &mut page.items[at])),
        _ => Err(LogError::NotFound(*key)),
    }
}

/// Puts a page's start in a set of starts, or takes it out.
fn file(set: &mut BTreeSet<Key>, start: Key, belongs: bool) {
    if belongs {
        set.insert(start);
    } else {
        set.remove(&start);
    }
}

/// What one item adds to the counters.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    items: usize,
    bytes: usize,
    dirty: usize,
    pending: usize,
    pending_bytes: usize,
}

impl Counts {
    fn of(item: &Item) -> Self {
        let pending = usize::from(item.has(PENDING));
        Self {
            items: 1,
            bytes: item.bytes(),
            dirty: usize::from(item.has(DIRTY)),
            pending,
            pending_bytes: pending * item.bytes(),
        }
    }

    fn enter(self, stats: &mut CacheStats) {
        stats.items += self.items;
        stats.bytes += self.bytes;
        stats.dirty_items += self.dirty;
        stats.pending_items += self.pending;
        stats.pending_bytes += self.pending_bytes;
    }

    fn leave(self, stats: &mut CacheStats) {
        stats.items -= self.items;
        stats.bytes -= self.bytes;
        stats.dirty_items -= self.dirty;
        stats.pending_items -= self.pending;
        stats.pending_bytes -= self.pending_bytes;
    }
}

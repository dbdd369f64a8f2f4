//! The item cache against a plain map: what it knows is right, what is dirty stays.

use crate::btree::ListItem;
use crate::env::Entropy;
use crate::env::testing::TestEntropy;
use crate::format::{ITEM_FLAG_DELETION, Key, KeyRange};
use crate::log::LogError;
use crate::log::cache::{Change, ItemCache, Known, KnownNext, ReadItem, UnknownKey};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::rc::Rc;

const KEYS: u64 = 60;

fn key(nr: u64) -> Key {
    Key::inode(nr + 1)
}

fn value(nr: u64) -> Bytes {
    Bytes::copy_from_slice(&nr.to_le_bytes())
}

fn all() -> KeyRange {
    KeyRange::new(key(0), key(KEYS - 1))
}

/// The cache, what is stable, and what the open transaction made of it.
struct World {
    rng: Rc<TestEntropy>,
    cache: ItemCache,
    /// As in the btrees of the last commit.
    stable: BTreeMap<Key, Bytes>,
    /// As in the open log tree: deletions are `None`.
    tree: BTreeMap<Key, Option<Bytes>>,
    now: BTreeMap<Key, Bytes>,
    next_value: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            rng: TestEntropy::new(seed),
            cache: ItemCache::new(4),
            stable: BTreeMap::new(),
            tree: BTreeMap::new(),
            now: BTreeMap::new(),
            next_value: 0,
        }
    }

    fn pick(&self) -> Key {
        key(self.rng.range(0, KEYS))
    }

    /// Reads a random range around the key, as a leaf of a btree would cover it.
    fn read_in(&mut self, at: &Key) {
        let nr = at.first - 1;
        let start = nr - self.rng.range(0, nr.min(12) + 1);
        let end = nr + self.rng.range(0, (KEYS - 1 - nr).min(12) + 1);
        // Up to the next inode, so that keys between two are covered too.
        let range = KeyRange::new(key(start), key(end + 1).dec());
        let items = self.stable.range(range.start..=range.end);
        let items = items.map(|(key, value)| ReadItem {
            key: *key,
            seq: 1,
            value: value.clone(),
        });
        let items = items.collect();
        self.cache.insert_read(&range, items);
        assert!(self.cache.knows(at));
    }

    fn change(
        &mut self,
        at: &Key,
        mut change: impl FnMut(&mut ItemCache) -> Change,
    ) -> Result<(), LogError> {
        loop {
            match change(&mut self.cache) {
                Ok(done) => return done,
                Err(UnknownKey) => self.read_in(at),
            }
        }
    }

    fn create_update_or_delete(&mut self) {
        let at = self.pick();
        self.next_value += 1;
        let new = value(self.next_value);
        let exists = self.now.contains_key(&at);
        match self.rng.range(0, 4) {
            0 => {
                let done = self.change(&at, |cache| cache.create(&at, new.clone(), 5));
                assert_eq!(done.is_ok(), !exists);
                if exists {
                    assert_eq!(done, Err(LogError::Exists(at)));
                } else {
                    self.now.insert(at, new);
                }
            }
            1 => {
                let done = self.change(&at, |cache| cache.update(&at, Some(new.clone()), 5));
                assert_eq!(done.is_ok(), exists);
                if exists {
                    self.now.insert(at, new);
                }
            }
            2 => {
                let done = self.change(&at, |cache| cache.delete(&at, 5));
                assert_eq!(done, exists.then_some(()).ok_or(LogError::NotFound(at)));
                self.now.remove(&at);
            }
            _ => {
                let done = self.change(&at, |cache| cache.update(&at, None, 5));
                assert_eq!(done.is_ok(), exists);
            }
        }
    }

    fn look(&mut self) {
        let at = self.pick();
        loop {
            match self.cache.lookup(&at) {
                Known::Unknown => self.read_in(&at),
                Known::Absent => return assert!(!self.now.contains_key(&at), "{at} was lost"),
                Known::Value(value) => return assert_eq!(Some(&value), self.now.get(&at)),
            }
        }
    }

    fn look_next(&mut self) {
        let (from, last) = (self.pick(), self.pick());
        let expected = match from <= last {
            true => self.now.range(from..=last).next(),
            false => None,
        };
        let expected = expected.map(|(key, value)| (*key, value.clone()));
        loop {
            match self.cache.next(from, &last) {
                KnownNext::Unknown(at) => self.read_in(&at),
                KnownNext::None => return assert_eq!(expected, None),
                KnownNext::Item(key, value) => return assert_eq!(expected, Some((key, value))),
            }
        }
    }

    fn insert_pending(&mut self) {
        let list = self.cache.take_pending();
        assert!(list.windows(2).all(|pair| pair[0].key < pair[1].key));
        for ListItem {
            key, flags, value, ..
        } in list
        {
            let deleted = flags & ITEM_FLAG_DELETION != 0;
            self.tree.insert(key, (!deleted).then_some(value));
        }
        assert_eq!(self.cache.stats().pending_items, 0);
    }

    fn commit(&mut self) {
        self.insert_pending();
        for (key, value) in std::mem::take(&mut self.tree) {
            match value {
                Some(value) => self.stable.insert(key, value),
                None => self.stable.remove(&key),
            };
        }
        assert_eq!(self.stable, self.now, "the commit is what was done");
        self.cache.clean();
        assert_eq!(self.cache.dirty_in(&all()), None);
    }

    fn invalidate_clean(&mut self) {
        let (a, b) = (self.pick(), self.pick());
        let range = KeyRange::new(a.min(b), a.max(b));
        if self.cache.dirty_in(&range).is_none() {
            self.cache.invalidate(&range);
            assert!(!self.cache.has_any(&range));
        }
    }

    fn step(&mut self) {
        match self.rng.range(0, 100) {
            0..50 => self.create_update_or_delete(),
            50..70 => self.look(),
            70..85 => self.look_next(),
            85..88 => self.commit(),
            88..92 => self.insert_pending(),
            92..96 => self.invalidate_clean(),
            _ => self.cache.reclaim(self.rng.range(0, 4000) as usize, None),
        }
        self.cache.assert_consistent();
    }
}

#[test]
fn cached_items_are_those_of_a_map_through_commits_reclaim_and_invalidation() {
    for seed in 0..60 {
        let mut world = World::new(seed);
        for _ in 0..600 {
            world.step();
        }
    }
}

#[test]
fn what_is_known_wins_over_what_is_read() {
    let mut cache = ItemCache::new(4);
    cache.insert_read(&KeyRange::new(key(10), key(12)), vec![]);
    cache.create(&key(11), value(1), 9).unwrap().unwrap();
    let old = (0..30).map(|nr| ReadItem {
        key: key(nr),
        seq: 1,
        value: value(99),
    });
    cache.insert_read(&all(), old.collect());
    assert_eq!(cache.lookup(&key(10)), Known::Absent);
    assert_eq!(cache.lookup(&key(11)), Known::Value(value(1)));
    assert_eq!(cache.lookup(&key(12)), Known::Absent);
    assert_eq!(cache.lookup(&key(13)), Known::Value(value(99)));
    assert_eq!(cache.lookup(&key(30)), Known::Absent);
    cache.assert_consistent();
}

#[test]
fn an_item_that_no_tree_can_have_is_forgotten_and_others_leave_a_deletion() {
    let mut cache = ItemCache::new(4);
    let read = ReadItem {
        key: key(1),
        seq: 1,
        value: value(1),
    };
    cache.insert_read(&all(), vec![read]);
    cache.create(&key(2), value(2), 9).unwrap().unwrap();
    cache.delete(&key(2), 9).unwrap().unwrap();
    cache.delete(&key(1), 9).unwrap().unwrap();
    // Created again where a deletion is: still persistent.
    cache.create(&key(1), value(3), 9).unwrap().unwrap();
    cache.delete(&key(1), 10).unwrap().unwrap();
    let list = cache.take_pending();
    assert_eq!(list.len(), 1);
    assert_eq!(
        (list[0].key, list[0].seq, list[0].flags),
        (key(1), 10, ITEM_FLAG_DELETION)
    );
    // The deletion is in the tree, not yet durable: it must not be reclaimed.
    cache.reclaim(0, None);
    assert_eq!(cache.lookup(&key(1)), Known::Absent);
    // An item that went into the tree needs a deletion from now on.
    cache.create(&key(2), value(4), 10).unwrap().unwrap();
    assert_eq!(cache.take_pending().len(), 1);
    cache.delete(&key(2), 10).unwrap().unwrap();
    assert_eq!(cache.take_pending()[0].flags, ITEM_FLAG_DELETION);
}

#[test]
fn forced_items_need_no_reading_and_deletions_are_always_written() {
    let mut cache = ItemCache::new(4);
    assert_eq!(cache.force(&key(3), None, 7), Err(UnknownKey));
    cache.insert_empty(&key(3), &all());
    cache.force(&key(3), None, 7).unwrap().unwrap();
    cache.force(&key(4), Some(value(4)), 7).unwrap().unwrap();
    cache.force(&key(4), None, 8).unwrap().unwrap();
    let flags: Vec<_> = cache
        .take_pending()
        .iter()
        .map(|item| (item.key, item.flags))
        .collect();
    assert_eq!(
        flags,
        [(key(3), ITEM_FLAG_DELETION), (key(4), ITEM_FLAG_DELETION)]
    );
    cache.clean();
    assert_eq!(cache.stats().items, 0);
    cache.assert_consistent();
}

#[test]
fn an_empty_range_is_bounded_by_its_lock_and_by_what_is_known() {
    let mut cache = ItemCache::new(4);
    cache.insert_read(&KeyRange::new(key(5), key(6)), vec![]);
    cache.insert_read(&KeyRange::new(key(20), key(21)), vec![]);
    cache.insert_empty(&key(10), &KeyRange::new(key(1), key(30)));
    assert!(!cache.knows(&key(4)) && cache.knows(&key(7)) && cache.knows(&key(19)));
    cache.insert_empty(&key(25), &KeyRange::new(key(1), key(30)));
    assert!(cache.knows(&key(22)) && cache.knows(&key(30)) && !cache.knows(&key(31)));
    cache.assert_consistent();
}

#[test]
fn a_cached_lookup_takes_well_under_a_microsecond_of_work() {
    // Not a timing test: bounds how many pages and items a lookup can touch.
    let mut cache = ItemCache::new(64);
    let range = KeyRange::new(Key::ZEROS, Key::ONES);
    cache.insert_read(&range, vec![]);
    for nr in 0..10_000 {
        cache.create(&key(nr), value(nr), 1).unwrap().unwrap();
    }
    let stats = cache.stats();
    // Keys that only grow fill their pages.
    assert!(stats.pages <= 10_000 / 64 + 2, "{stats:?}");
    cache.assert_consistent();
}

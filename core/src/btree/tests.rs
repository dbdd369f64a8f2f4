//! Tests of the btree: the spec's vectors, and random operations against a map.

use super::layout;
use super::*;
use crate::block::testvol::{Vol, tree_blocks};
use crate::block::{Policy, Tx};
use crate::env::Entropy;
use crate::env::testing::{TestEntropy, block_on};
use crate::format::{BtreeRoot, ITEM_FLAG_DELETION, KeyRange, Magic, leaf_bucket};
use std::collections::BTreeMap;

fn key(i: u64) -> Key {
    Key::inode(i)
}

fn leaf_bytes(vol: &Vol, root: &BtreeRoot) -> Vec<u8> {
    block_on(vol.cache.read_ref(&root.block_ref, Magic::Btree))
        .unwrap()
        .bytes()
        .to_vec()
}

/// One row of spec 02 section 21 table A.
fn row(b: &[u8], slot: usize) -> [u64; 7] {
    let it = layout::item(b, layout::slot(slot));
    let node = it.node;
    [
        it.key.first.get(),
        node.parent.get().into(),
        node.left.get().into(),
        node.right.get().into(),
        node.height.into(),
        it.val_off.get().into(),
        it.val_len.get().into(),
    ]
}

fn counters(b: &[u8]) -> [u16; 4] {
    let head = layout::head(b);
    [
        head.item_root.get(),
        head.nr_items.get(),
        head.total_item_bytes.get(),
        head.mid_free_len.get(),
    ]
}

fn bucket_at(b: &[u8], nr: usize) -> u16 {
    let at = crate::format::BTREE_HASH_START + nr * 2;
    u16::from_le_bytes([b[at], b[at + 1]])
}

#[test]
fn seven_items_in_a_leaf_lie_as_the_original_lays_them() {
    let vol = Vol::new(1, 64, Policy::default());
    let mut root = BtreeRoot::default();
    for i in 1..=7_u64 {
        block_on(insert(&vol.tx, &mut root, &key(i), &vec![0xab; i as usize])).unwrap();
    }
    let b = leaf_bytes(&vol, &root);
    assert_eq!(counters(&b), [184, 7, 448, 62016]);
    let rows = [
        [1, 72, 0, 0, 1, 62504, 1],
        [2, 184, 16, 128, 2, 62496, 2],
        [3, 72, 0, 0, 1, 62488, 3],
        [4, 0, 72, 296, 3, 62480, 4],
        [5, 296, 0, 0, 1, 62472, 5],
        [6, 184, 240, 352, 2, 62464, 6],
        [7, 296, 0, 0, 1, 62456, 7],
    ];
    let buckets = [1040, 1019, 66, 189, 1156, 423, 1390];
    for (slot, expected) in rows.iter().enumerate() {
        assert_eq!(row(&b, slot), *expected, "slot {slot}");
        assert_eq!(leaf_bucket(&key(slot as u64 + 1)), buckets[slot]);
        assert_eq!(
            bucket_at(&b, buckets[slot]) as usize,
            layout::slot(slot),
            "slot {slot}"
        );
    }
    block_on(delete(&vol.tx, &mut root, &key(4))).unwrap();
    let b = leaf_bytes(&vol, &root);
    assert_eq!(counters(&b), [240, 6, 384, 62072]);
    assert_eq!(row(&b, 3), [7, 296, 0, 0, 1, 62456, 7]);
    assert_eq!(row(&b, 4), [5, 0, 72, 296, 3, 62472, 5]);
    assert_eq!(row(&b, 5), [6, 240, 0, 184, 2, 62464, 6]);
    assert_eq!(row(&b, 1)[1], 240);
    assert_eq!(bucket_at(&b, 1390), 216);
    block_on(update(&vol.tx, &mut root, &key(2), &[1; 20])).unwrap();
    let b = leaf_bytes(&vol, &root);
    assert_eq!(row(&b, 1)[5], 62432);
    assert_eq!(counters(&b)[2..], [400, 62048]);
    verify_block(&b, 0).unwrap();
}

/// Number of items of each leaf, in key order.
fn leaf_sizes(vol: &Vol, root: &BtreeRoot) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut at = Key::ZEROS;
    if root.height == 0 {
        return sizes;
    }
    loop {
        let (mut range, mut nr) = (KeyRange::ALL, 0);
        block_on(read_items(&vol.cache, root, &at, &mut range, &mut |_| {
            nr += 1;
        }))
        .unwrap();
        sizes.push(nr);
        if range.end.is_ones() {
            break;
        }
        at = range.end.inc();
    }
    sizes
}

fn insert_range(vol: &Vol, root: &mut BtreeRoot, range: impl Iterator<Item = u64>, len: usize) {
    let value = vec![7; len];
    block_on(async {
        for i in range {
            insert(&vol.tx, root, &key(i), &value).await.unwrap();
        }
    });
}

#[test]
fn a_leaf_holds_1115_items_and_splits_in_halves() {
    let vol = Vol::new(1, 64, Policy::default());
    let mut root = BtreeRoot::default();
    insert_range(&vol, &mut root, 1..=1115, 0);
    assert_eq!((root.height, leaf_sizes(&vol, &root)), (1, vec![1115]));
    assert_eq!(counters(&leaf_bytes(&vol, &root))[2], 62440);
    insert_range(&vol, &mut root, 1116..=1116, 0);
    assert_eq!((root.height, leaf_sizes(&vol, &root)), (2, vec![558, 558]));
}

#[test]
fn ascending_and_descending_loads_have_the_shapes_of_the_original() {
    let vol = Vol::new(1, 256, Policy::default());
    let mut root = BtreeRoot::default();
    insert_range(&vol, &mut root, 1..=20000, 0);
    let sizes = leaf_sizes(&vol, &root);
    assert_eq!((root.height, sizes.len()), (2, 35));
    assert!(sizes[..34].iter().all(|nr| *nr == 558));

    let vol = Vol::new(1, 256, Policy::default());
    let mut root = BtreeRoot::default();
    insert_range(&vol, &mut root, 1..=10000, 100);
    let sizes = leaf_sizes(&vol, &root);
    assert_eq!((root.height, sizes.len(), sizes[50]), (2, 51, 250));
    assert!(sizes[..50].iter().all(|nr| *nr == 195));
    block_on(async {
        for i in (1..=10000).filter(|i| i % 10 != 0) {
            delete(&vol.tx, &mut root, &key(i)).await.unwrap();
        }
    });
    // The vector has 112 and 186 at the ends: the partial join of section 13 as
    // written moves one item more than the original did.
    let left = [111, 117, 117, 117, 117, 117, 117, 187];
    assert_eq!((root.height, &leaf_sizes(&vol, &root)[..]), (2, &left[..]));
    block_on(async {
        for i in (1..=10000).filter(|i| i % 10 == 0) {
            delete(&vol.tx, &mut root, &key(i)).await.unwrap();
        }
    });
    assert_eq!(root, BtreeRoot::default());

    let mut root = BtreeRoot::default();
    let vol = Vol::new(1, 256, Policy::default());
    insert_range(&vol, &mut root, (1..=10000).rev(), 100);
    let sizes = leaf_sizes(&vol, &root);
    assert_eq!((root.height, sizes.len(), sizes[0]), (2, 51, 250));
    assert!(sizes[1..].iter().all(|nr| *nr == 195));
}

#[test]
fn a_tree_of_three_levels_is_freed_whole_with_its_level_1_blocks() {
    let mut vol = Vol::new(1, 2048, Policy::default());
    let mut root = BtreeRoot::default();
    let list: Vec<ListItem> = (1..=30000)
        .map(|i| ListItem {
            key: key(i),
            seq: i,
            flags: 0,
            value: Bytes::from(vec![3; 896]),
        })
        .collect();
    let mut done = 0;
    block_on(insert_list(&vol.tx, &mut root, &list, &mut done)).unwrap();
    let blocks = tree_blocks(&vol.cache, &root);
    let at_level = |level| blocks.iter().filter(|(_, l)| *l == level).count();
    assert_eq!([at_level(2), at_level(1), at_level(0)], [1, 2, 909]);
    vol.commit();
    vol.census(&[root], &[], &[]);
    let mut progress = Key::ZEROS;
    let mut steps = 0;
    while !progress.is_ones() {
        block_on(free_blocks(&vol.tx, &root, &mut progress, 62)).unwrap();
        vol.commit();
        vol.reopen();
        steps += 1;
    }
    assert!(steps >= 912 / 62, "{steps} steps");
    vol.census(&[], &[], &[]);
}

struct Model {
    vol: Vol,
    root: BtreeRoot,
    map: BTreeMap<Key, (u64, Vec<u8>)>,
    rng: std::rc::Rc<TestEntropy>,
    keys: u64,
}

impl Model {
    fn random_key(&self) -> Key {
        let i = self.rng.range(1, self.keys);
        Key::dirent(i % 7, i / 3, i)
    }

    fn random_value(&self) -> Vec<u8> {
        let len = match self.rng.range(0, 4) {
            0 => 0,
            1 => self.rng.range(0, 897),
            _ => self.rng.range(0, 64),
        };
        (0..len).map(|_| self.rng.next_u64() as u8).collect()
    }

    fn random_list(&self) -> Vec<ListItem> {
        let mut list: BTreeMap<Key, ListItem> = BTreeMap::new();
        for _ in 0..self.rng.range(1, 200) {
            let item = ListItem {
                key: self.random_key(),
                seq: self.rng.next_u64(),
                flags: 0,
                value: self.random_value().into(),
            };
            list.insert(item.key, item);
        }
        list.into_values().collect()
    }

    async fn one_op(&mut self) -> Result<(), BtreeError> {
        let key = self.random_key();
        let value = self.random_value();
        let (tx, root) = (&self.vol.tx, &mut self.root);
        let there = self.map.contains_key(&key);
        match self.rng.range(0, 100) {
            0..35 => match insert(tx, root, &key, &value).await {
                Err(BtreeError::Exists(_)) => assert!(there),
                res => {
                    res?;
                    assert!(!there);
                    self.map.insert(key, (0, value));
                }
            },
            35..45 => match update(tx, root, &key, &value).await {
                Err(BtreeError::NotFound(_)) => assert!(!there),
                res => {
                    res?;
                    self.map.get_mut(&key).unwrap().1 = value;
                }
            },
            45..55 => {
                force(tx, root, &key, &value).await?;
                self.map.entry(key).or_default().1 = value;
            }
            55..88 => {
                let key = match self.map.range(key..).next() {
                    Some((key, _)) if self.rng.chance(3, 4) => *key,
                    _ => key,
                };
                match delete(tx, root, &key).await {
                    Err(BtreeError::NotFound(_)) => assert!(!self.map.contains_key(&key)),
                    res => {
                        res?;
                        assert!(self.map.remove(&key).is_some());
                    }
                }
            }
            88..90 => match dirty(tx, root, &key).await {
                Err(BtreeError::NotFound(_)) => assert!(!there),
                res => res?,
            },
            90..91 => rebalance(tx, root, &key).await?,
            91..93 => {
                let list = self.random_list();
                let mut done = 0;
                let res = insert_list(&self.vol.tx, &mut self.root, &list, &mut done).await;
                for it in &list[..done] {
                    self.map.insert(it.key, (it.seq, it.value.to_vec()));
                }
                res?;
            }
            93..96 => {
                let found = lookup(&self.vol.cache, root, &key).await?;
                assert_eq!(
                    found.map(|it| it.value.to_vec()),
                    self.map.get(&key).map(|it| it.1.clone())
                );
            }
            96..98 => {
                let found = next(&self.vol.cache, root, &key).await?;
                let expected = self.map.range(key..).next();
                assert_eq!(found.map(|it| it.key), expected.map(|(key, _)| *key));
            }
            _ => {
                let found = prev(&self.vol.cache, root, &key).await?;
                let expected = self.map.range(..=key).next_back();
                assert_eq!(found.map(|it| it.key), expected.map(|(key, _)| *key));
            }
        }
        Ok(())
    }

    fn compare(&self, root: &BtreeRoot, map: &BTreeMap<Key, (u64, Vec<u8>)>) {
        let mut at = Key::ZEROS;
        let mut found = BTreeMap::new();
        loop {
            let mut range = KeyRange::ALL;
            block_on(read_items(
                &self.vol.cache,
                root,
                &at,
                &mut range,
                &mut |it| {
                    found.insert(it.key, (it.seq, it.value.to_vec()));
                },
            ))
            .unwrap();
            if range.end.is_ones() {
                break;
            }
            at = range.end.inc();
        }
        assert!(
            found == *map,
            "{} items, expected {}",
            found.len(),
            map.len()
        );
    }
}

fn small_policy(rng: &TestEntropy) -> Policy {
    Policy {
        cache_blocks: [1, 4, 1000][rng.range(0, 3) as usize],
        list_max: 2000,
        list_rotate: 500,
        btree_space: [5120, 8192, 65488][rng.range(0, 3) as usize],
        ..Policy::default()
    }
}

/// Random operations, commits, reopenings, crashes and I/O errors. After an
/// error the transaction is abandoned; the last commit must be whole.
fn random_run(seed: u64, faults: bool) {
    let rng = TestEntropy::new(seed);
    let policy = small_policy(&rng);
    let vol = Vol::new(seed, 1500, policy);
    let keys = [40, 600, 4000][rng.range(0, 3) as usize];
    let mut model = Model {
        vol,
        root: BtreeRoot::default(),
        map: BTreeMap::new(),
        rng: rng.clone(),
        keys,
    };
    for _ in 0..rng.range(4, 12) {
        let stable = (model.root, model.map.clone());
        if faults {
            let (ops, rng) = (rng.range(5, 400), rng.clone());
            let mut left = ops;
            model.vol.dev.set_fault(Some(Box::new(move |_| {
                left = left.saturating_sub(1);
                left == 0 && rng.chance(1, 3)
            })));
        }
        let mut failed = false;
        for _ in 0..rng.range(1, 400) {
            let res = block_on(model.one_op());
            if let Err(err) = res {
                assert!(faults, "seed {seed}: {err}");
                failed = true;
                break;
            }
        }
        if !failed {
            model.vol.tx.prepare_commit();
            failed = block_on(model.vol.tx.write()).is_err();
            if failed && rng.chance(1, 2) {
                model.vol.dev.set_fault(None);
                block_on(model.vol.tx.write()).expect("the second attempt");
                failed = false;
            }
        }
        model.vol.dev.set_fault(None);
        if failed {
            model.vol.tx.forget_all();
            (model.root, model.map) = stable;
            if rng.chance(1, 2) {
                model.vol.dev.power_loss(&*rng);
            }
        } else {
            model.vol.recycle();
        }
        if rng.chance(1, 3) {
            model.vol.reopen();
        }
        model.compare(&model.root, &model.map);
        model.vol.census(&[model.root], &[], &[]);
    }
}

#[test]
fn random_operations_equal_a_map_and_lose_no_block() {
    for seed in 0..24 {
        random_run(seed, false);
    }
}

#[test]
fn io_errors_and_power_loss_leave_the_last_commit_whole() {
    for seed in 1000..1024 {
        random_run(seed, true);
    }
}

#[test]
fn running_out_of_blocks_at_any_allocation_leaves_a_tree_to_abandon() {
    for spare in 2..40 {
        let policy = Policy {
            btree_space: Policy::BTREE_SPACE_MIN,
            ..Policy::default()
        };
        let vol = Vol::new(spare, 4 + spare, policy);
        let mut root = BtreeRoot::default();
        let mut failed = false;
        for i in 0..2000_u64 {
            let value = vec![1; (i % 700) as usize];
            match block_on(insert(
                &vol.tx,
                &mut root,
                &key(i * 7919 % 2000 + 1),
                &value,
            )) {
                Ok(()) => {}
                Err(BtreeError::Block(crate::block::BlockError::NoSpace)) => {
                    failed = true;
                    break;
                }
                Err(err) => panic!("{err}"),
            }
        }
        assert!(failed || spare > 30, "{spare} spare blocks were enough");
        // Even the dirty tree is whole: errors come before changes.
        tree_blocks(&vol.cache, &root);
        vol.census(&[root], &[], &[]);
        vol.tx.forget_all();
        vol.census(&[], &[], &[]);
    }
}

fn totl(i: u64) -> Key {
    Key::xattr_totl(1, i, 0)
}

fn totl_value(total: i64, count: i64) -> Vec<u8> {
    [total.to_le_bytes(), count.to_le_bytes()].concat()
}

fn log_of(vol: &Vol, items: Vec<ListItem>) -> BtreeRoot {
    let (mut root, mut done) = (BtreeRoot::default(), 0);
    block_on(insert_list(&vol.tx, &mut root, &items, &mut done)).unwrap();
    assert_eq!(done, items.len());
    root
}

fn list_item(key: Key, seq: u64, value: Vec<u8>) -> ListItem {
    ListItem {
        key,
        seq,
        flags: 0,
        value: value.into(),
    }
}

#[test]
fn leaves_emptied_by_deltas_are_joined_by_the_next_merge() {
    let vol = Vol::new(3, 400, Policy::default());
    let plus = log_of(
        &vol,
        (0..5000)
            .map(|i| list_item(totl(i), 10, totl_value(5, 1)))
            .collect(),
    );
    let minus = log_of(
        &vol,
        (0..5000)
            .map(|i| list_item(totl(i), 11, totl_value(-5, -1)))
            .collect(),
    );
    let again = log_of(
        &vol,
        (0..5000)
            .map(|i| list_item(totl(i), 12, totl_value(1, 1)))
            .collect(),
    );
    let mut root = BtreeRoot::default();
    let all = KeyRange::ALL;
    let res = block_on(merge(&vol.tx, &mut root, &[plus], all, false));
    assert_eq!(res, Ok(Merged::All));
    assert!(leaf_sizes(&vol, &root).len() > 1);
    let res = block_on(merge(&vol.tx, &mut root, &[minus], all, false));
    assert_eq!(res, Ok(Merged::All));
    assert!(leaf_sizes(&vol, &root).iter().all(|nr| *nr == 0));
    assert_eq!(block_on(next(&vol.cache, &root, &Key::ZEROS)), Ok(None));
    vol.census(&[root, plus, minus, again], &[], &[]);
    let res = block_on(merge(&vol.tx, &mut root, &[again], all, false));
    assert_eq!(res, Ok(Merged::All));
    let found = block_on(lookup(&vol.cache, &root, &totl(77)))
        .unwrap()
        .unwrap();
    assert_eq!((found.seq, &found.value[..]), (12, &totl_value(1, 1)[..]));
    vol.census(&[root, plus, minus, again], &[], &[]);
}

#[test]
fn merging_in_small_windows_and_steps_equals_merging_maps() {
    for seed in 0..24 {
        let rng = TestEntropy::new(seed);
        let policy = Policy {
            merge_window_bytes: [4096, 65536, 2 << 20][rng.range(0, 3) as usize],
            merge_dirty_blocks: [6, 40, 100_000][rng.range(0, 3) as usize],
            ..small_policy(&rng)
        };
        let mut vol = Vol::new(seed, 1900, policy);
        let mut expected: BTreeMap<Key, (u64, u8, Vec<u8>)> = BTreeMap::new();
        let mut inputs = Vec::new();
        for tree in 0..rng.range(1, 5) {
            let mut items: BTreeMap<Key, ListItem> = BTreeMap::new();
            for _ in 0..rng.range(0, 900) {
                let i = rng.range(1, 1500);
                let seq = rng.range(1, 1 << 40) * 8 + tree;
                let item = match rng.range(0, 10) {
                    0..2 => list_item(totl(i), seq, totl_value(rng.range(0, 9) as i64 - 4, 1)),
                    2..4 => ListItem {
                        flags: ITEM_FLAG_DELETION,
                        ..list_item(key(i), seq, vec![])
                    },
                    _ => list_item(key(i), seq, vec![9; rng.range(0, 300) as usize]),
                };
                items.insert(item.key, item);
            }
            for it in items.values() {
                let new = (it.seq, it.flags, it.value.to_vec());
                match expected.get_mut(&it.key) {
                    Some(old) if is_delta(&it.key) => {
                        combine_delta(&it.key, &mut old.2, &it.value).unwrap();
                        old.0 = old.0.max(it.seq);
                    }
                    Some(old) if old.0 > it.seq => {}
                    _ => {
                        expected.insert(it.key, new);
                    }
                }
            }
            inputs.push(log_of(&vol, items.into_values().collect()));
        }
        expected.retain(|_, it| it.1 == 0);
        vol.commit();
        let mut root = BtreeRoot::default();
        let mut range = KeyRange::ALL;
        loop {
            match block_on(merge(&vol.tx, &mut root, &inputs, range, false)).unwrap() {
                Merged::All => break,
                Merged::Until(key) => {
                    assert!(key >= range.start);
                    range.start = key;
                    vol.commit();
                }
            }
        }
        let mut owners = inputs.clone();
        owners.push(root);
        vol.census(&owners, &[], &[]);
        let mut found = BTreeMap::new();
        let mut at = Key::ZEROS;
        while let Some(it) = block_on(next(&vol.cache, &root, &at)).unwrap() {
            at = it.key.inc();
            found.insert(it.key, (it.seq, it.flags, it.value.to_vec()));
        }
        assert!(
            found == expected,
            "seed {seed}: {} {}",
            found.len(),
            expected.len()
        );
    }
}

/// What a server and its merging clients do: each level-1 range is cut out,
/// merged by itself, put back, and rebalanced where a merge could not go on.
fn merge_by_parents(vol: &mut Vol, root: &mut BtreeRoot, log: &BtreeRoot, others: &[BtreeRoot]) {
    let mut key = Key::ZEROS;
    let mut steps = 0;
    loop {
        steps += 1;
        assert!(steps < 3000, "no progress at {key}");
        let mut range = block_on(parent_range(&vol.cache, root, &key)).unwrap();
        let mut parent = block_on(get_parent(&vol.cache, root, &key)).unwrap();
        let end = range.end;
        range.start = key;
        let subtree = root.height > 2;
        let res = block_on(merge(&vol.tx, &mut parent, &[*log], range, subtree)).unwrap();
        block_on(set_parent(&vol.tx, root, &key, &parent)).unwrap();
        let next = match res {
            Merged::All if end.is_ones() => break,
            Merged::All => end.inc(),
            Merged::Until(next) => next,
        };
        block_on(rebalance(&vol.tx, root, &next)).unwrap();
        key = next;
        vol.commit();
        let mut roots = others.to_vec();
        roots.push(*root);
        if steps % 8 == 0 {
            vol.census(&roots, &[], &[]);
        }
    }
    vol.commit();
}

#[test]
fn merges_cut_by_level_1_blocks_equal_a_map() {
    for seed in 0..8 {
        let rng = TestEntropy::new(seed);
        let policy = Policy {
            btree_space: Policy::BTREE_SPACE_MIN,
            cache_blocks: [8, 2000][rng.range(0, 2) as usize],
            merge_dirty_blocks: [12, 100_000][rng.range(0, 2) as usize],
            ..Policy::default()
        };
        let mut vol = Vol::new(seed, 5000, policy);
        let (mut root, mut model) = (BtreeRoot::default(), BTreeMap::new());
        for round in 1..6 {
            let mut items = BTreeMap::new();
            let (from, spread) = (rng.range(1, 4000), rng.range(1, 8000));
            for _ in 0..rng.range(1, 3000) {
                let at = key(from + rng.range(0, spread));
                let deletes = round % 2 == 0 && rng.chance(4, 5);
                let mut item = list_item(at, round, vec![2; rng.range(0, 200) as usize]);
                if deletes {
                    (item.flags, item.value) = (ITEM_FLAG_DELETION, Bytes::new());
                }
                items.insert(at, item);
            }
            for it in items.values() {
                match it.flags {
                    0 => model.insert(it.key, (it.seq, it.value.to_vec())),
                    _ => model.remove(&it.key),
                };
            }
            let log = log_of(&vol, items.into_values().collect());
            merge_by_parents(&mut vol, &mut root, &log, &[log]);
            vol.census(&[root, log], &[], &[]);
            let mut progress = Key::ZEROS;
            while !progress.is_ones() {
                block_on(free_blocks(&vol.tx, &log, &mut progress, 30)).unwrap();
                vol.commit();
            }
            vol.census(&[root], &[], &[]);
            let mut found = BTreeMap::new();
            let mut at = Key::ZEROS;
            while let Some(it) = block_on(next(&vol.cache, &root, &at)).unwrap() {
                at = it.key.inc();
                found.insert(it.key, (it.seq, it.value.to_vec()));
            }
            assert!(found == model, "seed {seed} round {round}");
        }
    }
}

#[test]
fn level_1_blocks_are_taken_out_changed_and_put_back() {
    let policy = Policy {
        btree_space: Policy::BTREE_SPACE_MIN,
        ..Policy::default()
    };
    let vol = Vol::new(5, 4000, policy);
    let mut root = BtreeRoot::default();
    insert_range(&vol, &mut root, 1..=9000, 60);
    assert_eq!(root.height, 3);
    let tx: &Tx = &vol.tx;
    let at = key(4000);
    let range = block_on(parent_range(&vol.cache, &root, &at)).unwrap();
    assert!(range.contains(&at) && !range.start.is_zeros() && !range.end.is_ones());
    let mut parent = block_on(get_parent(&vol.cache, &root, &at)).unwrap();
    assert_eq!(parent.height, 2);
    let log = log_of(&vol, vec![list_item(at, 99, vec![1])]);
    let res = block_on(merge(tx, &mut parent, &[log], range, true)).unwrap();
    assert_eq!(res, Merged::All);
    block_on(set_parent(tx, &mut root, &at, &parent)).unwrap();
    let found = block_on(lookup(&vol.cache, &root, &at)).unwrap().unwrap();
    assert_eq!((found.seq, &found.value[..]), (99, &[1][..]));
    tree_blocks(&vol.cache, &root);
    let wrong = BtreeRoot::new(parent.block_ref, 1);
    let res = block_on(set_parent(tx, &mut root, &at, &wrong));
    assert_eq!(res, Err(BtreeError::ParentHeight { height: 1 }));
}

#[test]
fn an_empty_tree_has_no_items_and_errors_name_their_keys() {
    let vol = Vol::new(1, 64, Policy::default());
    let (tx, cache) = (&vol.tx, &vol.cache);
    let mut root = BtreeRoot::default();
    block_on(async {
        assert_eq!(lookup(cache, &root, &key(1)).await, Ok(None));
        assert_eq!(next(cache, &root, &key(1)).await, Ok(None));
        assert_eq!(prev(cache, &root, &key(1)).await, Ok(None));
        let mut range = KeyRange::ALL;
        let none = &mut |_: ItemRef<'_>| panic!("an item in an empty tree");
        read_items(cache, &root, &key(1), &mut range, none)
            .await
            .unwrap();
        assert_eq!(range, KeyRange::ALL);
        let missing = Err(BtreeError::NotFound(key(1)));
        assert_eq!(update(tx, &mut root, &key(1), &[]).await, missing);
        assert_eq!(delete(tx, &mut root, &key(1)).await, missing);
        assert_eq!(dirty(tx, &mut root, &key(1)).await, missing);
        assert_eq!(root, BtreeRoot::default());
        let long = insert(tx, &mut root, &key(1), &[0; 897]).await.unwrap_err();
        assert_eq!(long.errno(), Errno::EINVAL);
        let bad = BtreeRoot::new(Default::default(), 3);
        assert!(matches!(
            lookup(cache, &bad, &key(1)).await,
            Err(BtreeError::BadRoot { .. })
        ));
    });
}

#[test]
fn a_damaged_block_is_refused_and_never_panics() {
    let vol = Vol::new(9, 64, Policy::default());
    let rng = TestEntropy::new(9);
    let mut root = BtreeRoot::default();
    for i in 0..300 {
        let len = rng.range(0, 200) as usize;
        block_on(insert(
            &vol.tx,
            &mut root,
            &key(i * 37 % 301),
            &vec![5; len],
        ))
        .unwrap();
    }
    let good = leaf_bytes(&vol, &root);
    verify_block(&good, 0).unwrap();
    assert!(verify_block(&good, 1).is_err());
    let mut refused = 0;
    for _ in 0..3000 {
        let mut bad = good.clone();
        for _ in 0..rng.range(1, 4) {
            let at = match rng.range(0, 3) {
                0 => rng.range(32, 48),
                1 => rng.range(48, 48 + 56 * 300),
                _ => rng.range(62512, 65536),
            };
            bad[at as usize] = rng.next_u64() as u8;
        }
        refused += usize::from(verify_block(&bad, 0).is_err());
    }
    assert!(
        refused > 1500,
        "only {refused} of 3000 damaged blocks were refused"
    );
}

#[cfg(feature = "mutants")]
#[test]
fn planted_bugs_are_found_by_random_operations() {
    use crate::env::set_mutant;
    use std::panic::catch_unwind;
    for (name, faults) in [
        ("join_wrong_parent_key", false),
        ("freed_block_reused", true),
    ] {
        set_mutant(Some(name));
        let found = (0..60).any(|seed| catch_unwind(|| random_run(seed, faults)).is_err());
        set_mutant(None);
        assert!(found, "{name} was not found");
    }
}

#[test]
fn the_first_change_of_a_leaf_of_mkfs_corrects_its_heights() {
    for (add, remove) in [(key(5), None), (key(3), None), (key(9), Some(key(2)))] {
        let vol = Vol::new(1, 64, Policy::default());
        let mut root = BtreeRoot::default();
        // As mkfs writes: the greater key is the root, its height 0.
        for i in [4, 2] {
            block_on(insert(&vol.tx, &mut root, &key(i), &[1])).unwrap();
        }
        let blkno = root.block_ref.blkno.get();
        vol.tx.edit(blkno, |b| {
            let off = super::avl::root(b);
            layout::item_mut(b, off).node.height = 0;
        });
        verify_block(&leaf_bytes(&vol, &root), 0).unwrap();
        if let Some(gone) = remove {
            block_on(delete(&vol.tx, &mut root, &gone)).unwrap();
        }
        for new in [add, key(6), key(7)] {
            block_on(insert(&vol.tx, &mut root, &new, &[])).unwrap();
        }
        verify_block(&leaf_bytes(&vol, &root), 0).unwrap();
    }
}

//! Btrees with damaged blocks, under every operation: single blocks with any content,
//! and whole trees of which some bytes were changed, all with good CRCs.

use super::Source;
use crate::alloc::{self, AllocError};
use crate::block::{BlockError, Cache, Policy, Tx, list_head_of};
use crate::btree::{
    self, BtreeError, ItemRef, ListItem, block_items, children, delete, dirty, force, free_blocks,
    get_parent, insert, insert_list, lookup, merge, next, parent_range, prev, read_items,
    rebalance, set_parent, update, verify_block,
};
use crate::env::testing::{MemDevice, TestEntropy, block_on};
use crate::format::{
    AllocListHead, AllocRoot, BlockRef, BtreeRoot, ITEM_FLAG_DELETION, Key, KeyRange,
    LG_BLOCK_SHIFT, LG_BLOCK_SIZE, Magic, ZONE_FREE_EXTENT_ORDER, ZONE_XATTR_TOTL, init_header,
    seal,
};
use crate::volume::check::parse_btree_block;
use bytes::Bytes;
use std::rc::Rc;

const FSID: u64 = 0x1122_3344_5566_7788;
/// Large blocks of the device.
const BLOCKS: u64 = 700;
/// Where the list of available blocks is; what comes before is damaged.
const LIST: u64 = 300;
/// Operations in one run.
const STEPS: usize = 24;

/// A device with blocks in it and a transaction to change them.
struct Bench {
    cache: Rc<Cache>,
    tx: Tx,
}

fn policy(window: usize) -> Policy {
    Policy {
        btree_space: Policy::BTREE_SPACE_MIN,
        merge_window_bytes: window,
        ..Policy::small()
    }
}

fn write_block(device: &MemDevice, blkno: u64, block: &mut [u8]) {
    seal(block);
    device.poke(blkno << LG_BLOCK_SHIFT, block);
}

impl Bench {
    fn over(device: &MemDevice) -> Self {
        let mut block = vec![0; LG_BLOCK_SIZE];
        let entries: Vec<u64> = (LIST + 1..BLOCKS).collect();
        let head = list_head_of(&mut block, BlockRef::new(LIST, 1), &entries);
        init_header(&mut block, Magic::AllocList, FSID, LIST, 1);
        write_block(device, LIST, &mut block);
        let entropy = TestEntropy::new(3);
        let cache = Cache::new(device.handle(), entropy, FSID, Rc::new(policy(4096)));
        let tx = Tx::new(cache.clone(), head, AllocListHead::default());
        Self { cache, tx }
    }
}

/// One block with any content as the root of a tree: a leaf, or a parent whose
/// children are sound leaves. Nothing is asked of blocks that the judge refuses.
pub fn block(bytes: &[u8]) {
    let mut block = vec![0; LG_BLOCK_SIZE];
    let n = bytes.len().min(LG_BLOCK_SIZE);
    block[..n].copy_from_slice(&bytes[..n]);
    let level = parse_btree_block(&block).level;
    if verify_block(&block, level).is_err() {
        return;
    }
    block_items(&block, |_| {});
    let device = MemDevice::new(BLOCKS << LG_BLOCK_SHIFT);
    if level > 0 {
        let nr = children(&block).len();
        adopt(&mut block, nr);
        write_leaves(&device);
    }
    init_header(&mut block, Magic::Btree, FSID, 2, 7);
    write_block(&device, 2, &mut block);
    let mut keys = Vec::new();
    block_items(&block, |it| keys.push(it.key));
    let root = BtreeRoot::new(BlockRef::new(2, 7), level + 1);
    let bench = Bench::over(&device);
    // The operations: those of the bytes at the end of the block's last value.
    let steps = &block[LG_BLOCK_SIZE - 64..];
    operate(
        &bench,
        root,
        BtreeRoot::default(),
        &keys,
        &mut Source::new(steps),
    );
}

/// Leaves of one to three items, at blocks 3 to 6.
fn write_leaves(device: &MemDevice) {
    for n in 0..4_u64 {
        let items: Vec<_> = (0..n % 4)
            .map(|i| (Key::inode(i * 5 + n), vec![n as u8; 40 * i as usize]))
            .collect();
        let mut block = vec![0; LG_BLOCK_SIZE];
        let refs = items.iter().map(|(key, value)| ItemRef {
            key: *key,
            seq: 0,
            flags: 0,
            value,
        });
        btree::new_leaf(&mut block, refs);
        init_header(&mut block, Magic::Btree, FSID, 3 + n, 3 + n);
        write_block(device, 3 + n, &mut block);
    }
}

/// Points the children of a parent at those leaves.
fn adopt(block: &mut [u8], nr: usize) {
    let parsed = parse_btree_block(block);
    for (i, item) in parsed.items.iter().enumerate().take(nr) {
        let child = 3 + i as u64 % 4;
        let bytes = [child.to_le_bytes(), child.to_le_bytes()].concat();
        block[item.val_off..item.val_off + 16].copy_from_slice(&bytes);
    }
}

/// Sound trees, to be damaged.
pub struct Trees {
    device: MemDevice,
    /// A tree of items, one of log items, one of free extents.
    roots: [BtreeRoot; 3],
    free: u64,
    used: u64,
    keys: Vec<Key>,
}

impl Default for Trees {
    fn default() -> Self {
        Self::new()
    }
}

fn totl(n: u64) -> Key {
    Key::new(ZONE_XATTR_TOTL, n, 0, 1, 2, 0)
}

impl Trees {
    /// Makes them.
    pub fn new() -> Self {
        let device = MemDevice::new(BLOCKS << LG_BLOCK_SHIFT);
        let mut block = vec![0; LG_BLOCK_SIZE];
        let entries: Vec<u64> = (2..LIST - 1).collect();
        let head = list_head_of(&mut block, BlockRef::new(LIST - 1, 1), &entries);
        init_header(&mut block, Magic::AllocList, FSID, LIST - 1, 1);
        write_block(&device, LIST - 1, &mut block);
        let entropy = TestEntropy::new(3);
        let cache = Cache::new(device.handle(), entropy, FSID, Rc::new(policy(4096)));
        let tx = Tx::new(cache, head, AllocListHead::default());
        let mut keys: Vec<Key> = (1..160).map(|n| Key::inode(n * 3)).collect();
        keys.extend((1..20).map(totl));
        let (mut items, mut log, mut extents) = (
            BtreeRoot::default(),
            BtreeRoot::default(),
            AllocRoot::default(),
        );
        block_on(async {
            for (n, key) in keys.iter().enumerate() {
                let len = if n < 159 { n * 7 % 300 } else { 16 };
                let value = vec![n as u8; len];
                insert(&tx, &mut items, key, &value).await.expect("insert");
            }
            let list: Vec<ListItem> = (1..100)
                .map(|n| {
                    let key = if n < 90 {
                        Key::inode(n * 5)
                    } else {
                        totl(n - 80)
                    };
                    let gone = n % 3 == 0 && n < 90;
                    let len = if n < 90 { n as usize * 3 } else { 16 };
                    ListItem {
                        key,
                        seq: n,
                        flags: if gone { ITEM_FLAG_DELETION } else { 0 },
                        value: Bytes::from(vec![1; if gone { 0 } else { len }]),
                    }
                })
                .collect();
            let mut sorted = list;
            sorted.sort_by_key(|item| item.key);
            let listed = insert_list(&tx, &mut log, &sorted, &mut 0).await;
            listed.expect("a log tree");
            for n in 0..90_u64 {
                let added = alloc::insert_extent(&tx, &mut extents, 10_000 + n * 50, 1 + n % 30);
                added.await.expect("an extent");
            }
            tx.prepare_commit();
            tx.write().await.expect("written");
        });
        let used = LIST - 1 - u64::from(tx.remaining().avail);
        Self {
            device,
            roots: [items, log, extents.root],
            free: extents.total_len.get(),
            used: used.min(LIST - 3),
            keys,
        }
    }

    /// Damages a copy as the bytes say, and operates on it.
    pub fn exercise(&self, bytes: &[u8]) {
        let mut source = Source::new(bytes);
        let device = self.device.snapshot();
        let edits = 1 + source.u8() % 6;
        for _ in 0..edits {
            let blkno = 2 + u64::from(source.u16()) % self.used;
            let mut block = device.peek(blkno << LG_BLOCK_SHIFT, LG_BLOCK_SIZE);
            let how = source.u8();
            self.edit(&mut block, how, &mut source);
            write_block(&device, blkno, &mut block);
        }
        let bench = Bench::over(&device);
        if source.u8().is_multiple_of(4) {
            return self.extents(&bench, &mut source);
        }
        operate(
            &bench,
            self.roots[0],
            self.roots[1],
            &self.keys,
            &mut source,
        );
    }

    /// Bytes anywhere, or fields of one item: its key, most of all.
    fn edit(&self, block: &mut [u8], how: u8, source: &mut Source<'_>) {
        let parsed = parse_btree_block(block);
        let at = usize::from(source.u16());
        if how & 0x80 != 0 && parsed.level == 0 {
            let by = i64::from(source.u8() as i8) * i64::from(1 + how % 16);
            return shift(block, by);
        }
        if !how.is_multiple_of(4) && !parsed.items.is_empty() {
            let slot = 48 + 56 * (at % parsed.items.len());
            // The fields that the order of items hangs on, and values.
            let (from, len) = match how % 4 {
                1 => (slot, 8),
                2 => (slot + usize::from(source.u8()) % 56, 2),
                _ => {
                    let item = parsed.items[at % parsed.items.len()];
                    (item.val_off, item.val_len.min(16))
                }
            };
            let new = source.take(len);
            block[from..from + new.len()].copy_from_slice(new);
            return;
        }
        let new = source.take(1 + usize::from(how >> 4));
        let at = at % (LG_BLOCK_SIZE - 32 - new.len()) + 32;
        block[at..at + new.len()].copy_from_slice(new);
    }

    fn extents(&self, bench: &Bench, source: &mut Source<'_>) {
        let tx = &bench.tx;
        let mut root = AllocRoot {
            total_len: self.free.into(),
            root: self.roots[2],
            ..AllocRoot::default()
        };
        let mut other = AllocRoot::default();
        block_on(async {
            for _ in 0..STEPS {
                if !tx.remaining().fits(150) {
                    return;
                }
                let start = 9_990 + u64::from(source.u16()) % 4_700;
                let len = 1 + u64::from(source.u8() % 40);
                let what = source.u8() % 5;
                let result = match what {
                    0 => alloc::insert_extent(tx, &mut root, start, len).await,
                    1 => alloc::remove_extent(tx, &mut root, start, len).await,
                    2 => alloc::alloc_extent(tx, &mut root, len).await.map(|_| ()),
                    3 => alloc::read_extents(&bench.cache, &root, &mut |_| {}).await,
                    _ => alloc::move_extents(tx, &mut other, &mut root, len, None, 120).await,
                };
                // Whoever finds an extent tree broken abandons the transaction.
                if matches!(result, Err(AllocError::Btree(BtreeError::Block(_)))) {
                    return;
                }
            }
        });
    }
}

/// Moves all keys of a leaf: it stays sound by itself, but is in the wrong place.
fn shift(block: &mut [u8], by: i64) {
    if verify_block(block, 0).is_err() {
        return;
    }
    let mut items = Vec::new();
    block_items(block, |it| {
        let mut key = it.key;
        match key.zone {
            // The free extents by their order, and all others.
            ZONE_FREE_EXTENT_ORDER => key.second = key.second.wrapping_add_signed(by),
            _ => key.first = key.first.wrapping_add_signed(by),
        }
        items.push((key, it.seq, it.flags, it.value.to_vec()));
    });
    items.sort_by_key(|item| item.0);
    items.dedup_by_key(|item| item.0);
    let header = block[..32].to_vec();
    block.fill(0);
    let refs = items.iter().map(|(key, seq, flags, value)| ItemRef {
        key: *key,
        seq: *seq,
        flags: *flags,
        value,
    });
    btree::new_leaf(block, refs);
    block[..32].copy_from_slice(&header);
}

/// Operations on a tree, as the bytes say. An error of a changing one ends the run:
/// the transaction is abandoned then.
fn operate(bench: &Bench, root: BtreeRoot, log: BtreeRoot, keys: &[Key], source: &mut Source<'_>) {
    let (cache, tx) = (&bench.cache, &bench.tx);
    let mut root = root;
    block_on(async {
        for _ in 0..STEPS {
            let what = source.u8();
            let near = keys
                .get(usize::from(source.u16()) % keys.len().max(1))
                .copied()
                .unwrap_or(Key::ZEROS);
            let key = match what >> 4 {
                0 => near.inc(),
                1 => near.dec(),
                2 => Key::ONES,
                _ => near,
            };
            let value = vec![what; usize::from(source.u8()) * 3];
            if !tx.remaining().fits(100) {
                return;
            }
            let changed = match what % 16 {
                0 => lookup(cache, &root, &key).await.map(|_| ()).or(Ok(())),
                1 => next(cache, &root, &key).await.map(|_| ()).or(Ok(())),
                2 => prev(cache, &root, &key).await.map(|_| ()).or(Ok(())),
                3 => {
                    let mut range = KeyRange::ALL;
                    let skip = &mut |_: ItemRef<'_>| {};
                    let read = read_items(cache, &root, &key, &mut range, skip);
                    read.await.or(Ok(()))
                }
                4 => parent_range(cache, &root, &key)
                    .await
                    .map(|_| ())
                    .or(Ok(())),
                5 => match get_parent(cache, &root, &key).await {
                    Ok(parent) => set_parent(tx, &mut root, &key, &parent).await,
                    Err(_) => Ok(()),
                },
                6 | 7 => insert(tx, &mut root, &key, &value).await,
                8 => update(tx, &mut root, &key, &value).await,
                9 => force(tx, &mut root, &key, &value).await,
                10 | 11 => delete(tx, &mut root, &key).await,
                12 => dirty(tx, &mut root, &key).await,
                13 => rebalance(tx, &mut root, &key).await,
                14 => {
                    let subtree = root.height > 2;
                    match get_parent(cache, &root, &key).await {
                        Ok(mut parent) => {
                            let range = parent_range(cache, &root, &key).await;
                            let range = range.unwrap_or(KeyRange::ALL);
                            let merged = merge(tx, &mut parent, &[log], range, subtree).await;
                            match merged {
                                Ok(_) => set_parent(tx, &mut root, &key, &parent).await,
                                Err(error) => Err(error),
                            }
                        }
                        Err(_) => Ok(()),
                    }
                }
                _ => {
                    let mut at = key;
                    let budget = u32::from(root.height) + 20;
                    let freed = free_blocks(tx, &root, &mut at, budget).await;
                    // Nothing refers to the tree any more.
                    return drop(freed);
                }
            };
            if matches!(
                changed,
                Err(BtreeError::Block(_) | BtreeError::BadRoot { .. })
            ) {
                return;
            }
        }
        tx.prepare_commit();
        match tx.write().await {
            Ok(()) | Err(BlockError::Corrupt(_)) => {}
            Err(error) => panic!("a memory device failed: {error}"),
        }
    });
}

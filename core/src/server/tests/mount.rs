//! A mount as the server's allocators see it: it builds transactions in the free
//! blocks it was given, and hands them in.

use super::FSID;
use crate::alloc::{AllocError, DataAlloc, FreeExtent};
use crate::block::{Cache, Policy, Tx};
use crate::btree::{self, ListItem};
use crate::env::Entropy;
use crate::env::testing::TestWorld;
use crate::format::*;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Items by key: their seq and value, `None` for a deletion.
pub type Items = BTreeMap<Key, (u64, Option<Bytes>)>;

/// One mount.
pub struct Mount {
    pub rid: u64,
    /// The open record, or the committed one until the next is opened.
    pub log: LogTrees,
    cache: Rc<Cache>,
    /// Data that files of this mount's committed transactions use.
    pub used: Vec<FreeExtent>,
}

/// A transaction that was written and waits to be handed in.
pub struct Written {
    pub log: LogTrees,
    pub items: Items,
    used: Vec<FreeExtent>,
}

impl Mount {
    pub fn new(world: &TestWorld, rid: u64, policy: &Policy) -> Self {
        let entropy = world.entropy.clone();
        let dev = world.meta.handle();
        Self {
            rid,
            log: LogTrees::default(),
            cache: Cache::new(dev, entropy, FSID, Rc::new(policy.clone())),
            used: Vec::new(),
        }
    }

    /// Builds a transaction of `count` items on top of the open record: blocks
    /// written and flushed, nothing handed in.
    pub async fn build(&self, world: &TestWorld, count: u64) -> Written {
        let mut log = self.log;
        let tx = Tx::new(self.cache.clone(), log.meta_avail, log.meta_freed);
        let seq = log.get_trans_seq.get();
        let items = random_items(world, self.rid, seq, count);
        let list: Vec<ListItem> = items.iter().map(list_item).collect();
        let mut done = 0;
        btree::insert_list(&tx, &mut log.item_root, &list, &mut done)
            .await
            .expect("items fit in a transaction");
        if !list.is_empty() {
            log.max_item_seq = log.max_item_seq.get().max(seq).into();
            set_bloom(&tx, &mut log.bloom_ref, &items).await;
        }
        let used = self.change_data(world, &tx, &mut log).await;
        tx.prepare_commit();
        tx.write().await.expect("the mount's blocks are written");
        (log.meta_avail, log.meta_freed) = keep_flags(&log, tx.heads());
        Written { log, items, used }
    }

    /// Allocates and frees some data.
    async fn change_data(&self, world: &TestWorld, tx: &Tx, log: &mut LogTrees) -> Vec<FreeExtent> {
        let mut used = self.used.clone();
        let mut data = DataAlloc::new(log.data_avail, log.data_freed);
        for _ in 0..world.entropy.range(0, 4) {
            match data.alloc_data(tx, world.entropy.range(1, 90)).await {
                Ok(extent) => used.push(extent),
                Err(AllocError::Refill | AllocError::NoSpace) => break,
                Err(err) => panic!("alloc_data: {err}"),
            }
        }
        for _ in 0..world.entropy.range(0, 4) {
            if used.is_empty() {
                break;
            }
            let at = world.entropy.range(0, used.len() as u64) as usize;
            let extent = used.swap_remove(at);
            let total = world.data.handle().size() >> SM_BLOCK_SHIFT;
            data.free_data(tx, extent.start, extent.len, total)
                .await
                .expect("free_data");
        }
        data.return_cached(tx).await.expect("return_cached");
        (log.data_avail, log.data_freed) = (data.avail, data.freed);
        used
    }

    /// The server took the transaction.
    pub fn committed(&mut self, written: &Written) {
        self.log = written.log;
        self.log.commit_trans_seq = self.log.get_trans_seq;
        self.used = written.used.clone();
    }
}

/// The flags of the heads are the server's.
fn keep_flags(
    log: &LogTrees,
    (mut avail, mut freed): (AllocListHead, AllocListHead),
) -> (AllocListHead, AllocListHead) {
    avail.flags = log.meta_avail.flags;
    freed.flags = log.meta_freed.flags;
    (avail, freed)
}

fn list_item((key, (seq, value)): (&Key, &(u64, Option<Bytes>))) -> ListItem {
    ListItem {
        key: *key,
        seq: *seq,
        flags: if value.is_none() {
            ITEM_FLAG_DELETION
        } else {
            0
        },
        value: value.clone().unwrap_or_default(),
    }
}

fn random_items(world: &TestWorld, rid: u64, seq: u64, count: u64) -> Items {
    let item = |_| {
        // Each mount has inode groups of its own, as if it held their locks.
        let ino = rid * 10 * 1024 + world.entropy.range(0, 2500);
        let kind = world.entropy.range(0, 3);
        let key = match kind {
            0 => Key::inode(ino),
            1 => Key::readdir(ino, world.entropy.range(2, 50)),
            _ => Key::xattr(ino, 7, world.entropy.range(0, 9), 0),
        };
        let len = world.entropy.range(0, 600) as usize;
        let value = (world.entropy.range(0, 3) > 0).then(|| Bytes::from(vec![rid as u8; len]));
        (key, (seq, value))
    };
    (0..count).map(item).collect()
}

/// Start key of the lock that covers an item of [`random_items`].
pub fn lock_start(key: &Key) -> Key {
    assert_eq!(key.zone, ZONE_FS);
    Key::new(ZONE_FS, key.first & !1023, 0, 0, 0, 0)
}

async fn set_bloom(tx: &Tx, block_ref: &mut BlockRef, items: &Items) {
    tx.dirty_ref(block_ref, Magic::Bloom)
        .await
        .expect("bloom block");
    tx.edit(block_ref.blkno.get(), |bytes| {
        for bit in items.keys().flat_map(|key| bloom_bits(&lock_start(key))) {
            let byte = &mut bytes[BLOOM_BITS_START + bit as usize / 8];
            let mask = 1 << (bit % 8);
            if *byte & mask == 0 {
                *byte |= mask;
                let total = u64::from_le_bytes(bytes[32..40].try_into().unwrap()) + 1;
                bytes[32..40].copy_from_slice(&total.to_le_bytes());
            }
        }
    });
}

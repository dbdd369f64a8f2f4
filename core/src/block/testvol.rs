//! A bare volume for unit tests of blocks, btrees and allocators: a device, a
//! transaction whose lists hold every free block, and a census of all blocks.

use super::{Cache, Policy, Tx, list_entries, list_head_of};
use crate::btree;
use crate::env::Entropy;
use crate::env::testing::{MemDevice, TestEntropy, block_on};
use crate::format::{
    AllocListHead, BlockRef, BtreeRoot, Key, LG_BLOCK_SHIFT, LG_BLOCK_SIZE, META_DEV_START_BLKNO,
    Magic, init_header, seal,
};
use std::collections::BTreeMap;
use std::rc::Rc;

pub(crate) const FSID: u64 = 0x1122_3344_5566_7788;

/// See the head of this file.
pub(crate) struct Vol {
    pub(crate) dev: MemDevice,
    pub(crate) entropy: Rc<TestEntropy>,
    pub(crate) cache: Rc<Cache>,
    pub(crate) tx: Tx,
    pub(crate) policy: Rc<Policy>,
}

impl Vol {
    /// A volume of `blocks` large blocks, all but one free, as after mkfs: the
    /// avail list is in block 3 and begins with 4.
    pub(crate) fn new(seed: u64, blocks: u64, policy: Policy) -> Self {
        let dev = MemDevice::new(blocks << LG_BLOCK_SHIFT);
        let entries: Vec<u64> = (4..blocks).chain([2]).collect();
        let avail = write_list(&dev, 3, 1, &entries);
        let mut vol = Self::over(dev, seed, policy, avail);
        vol.reset(avail);
        vol
    }

    fn over(dev: MemDevice, seed: u64, policy: Policy, avail: AllocListHead) -> Self {
        let entropy = TestEntropy::new(seed);
        let policy = Rc::new(policy);
        let cache = Cache::new(dev.handle(), entropy.clone(), FSID, policy.clone());
        let tx = Tx::new(cache.clone(), avail, AllocListHead::default());
        Self {
            dev,
            entropy,
            cache,
            tx,
            policy,
        }
    }

    fn reset(&mut self, avail: AllocListHead) {
        self.tx.set_heads(avail, AllocListHead::default());
    }

    /// A cold cache and a new transaction with the same lists.
    pub(crate) fn reopen(&mut self) {
        assert_eq!(self.tx.dirty_blocks(), 0, "reopened with dirty blocks");
        let (avail, freed) = self.tx.heads();
        let seed = self.entropy.next_u64();
        let next = Self::over(self.dev.clone(), seed, (*self.policy).clone(), avail);
        next.tx.set_heads(avail, freed);
        *self = next;
    }

    /// Entries of a whole list, and the list blocks themselves.
    pub(crate) fn list(&self, head: &AllocListHead) -> (Vec<u64>, Vec<u64>) {
        let (mut entries, mut blocks) = (Vec::new(), Vec::new());
        let mut next = head.block_ref;
        let mut first = true;
        while !next.is_null() {
            let block = block_on(self.cache.read_ref(&next, Magic::AllocList)).expect("list block");
            let (some, after) = list_entries(block.bytes()).expect("a good list block");
            if std::mem::take(&mut first) {
                assert_eq!(some.len(), head.first_nr.get() as usize, "first_nr");
            }
            entries.extend(some);
            blocks.push(next.blkno.get());
            next = after;
        }
        assert_eq!(entries.len() as u64, head.total_nr.get(), "total_nr");
        (entries, blocks)
    }

    /// Writes the transaction, then gives the freed blocks back to avail: what a
    /// server does over two commits.
    pub(crate) fn commit(&mut self) {
        self.tx.prepare_commit();
        block_on(self.tx.write()).expect("write");
        self.recycle();
    }

    /// Gives the freed blocks of a written transaction back to avail.
    pub(crate) fn recycle(&mut self) {
        let (avail, freed) = self.tx.heads();
        let (mut entries, list_blocks) = self.list(&avail);
        let (freed_entries, freed_blocks) = self.list(&freed);
        entries.extend(freed_entries);
        entries.extend(freed_blocks);
        entries.extend(&list_blocks[1..]);
        entries.sort_unstable();
        let seq = self.entropy.next_u64();
        let avail = write_list(&self.dev, list_blocks[0], seq, &entries);
        self.reset(avail);
    }

    /// Counts every block of the volume: each must be in exactly one place.
    pub(crate) fn census(
        &self,
        roots: &[BtreeRoot],
        lists: &[AllocListHead],
        extents: &[(u64, u64)],
    ) {
        let mut owners: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        let mut own = |blkno: u64, who: String| owners.entry(blkno).or_default().push(who);
        for (i, root) in roots.iter().enumerate() {
            for (blkno, level) in tree_blocks(&self.cache, root) {
                own(blkno, format!("tree {i} level {level}"));
            }
        }
        let (avail, freed) = self.tx.heads();
        for (i, head) in [avail, freed].iter().chain(lists).enumerate() {
            let (entries, blocks) = self.list(head);
            blocks
                .iter()
                .for_each(|b| own(*b, format!("list block of {i}")));
            entries
                .iter()
                .for_each(|b| own(*b, format!("entry of list {i}")));
        }
        for (start, len) in extents {
            (*start..start + len).for_each(|b| own(b, "free extent".into()));
        }
        for blkno in META_DEV_START_BLKNO..self.cache.total_blocks() {
            let found = owners.remove(&blkno).unwrap_or_default();
            assert_eq!(found.len(), 1, "block {blkno} is in {found:?}");
        }
        assert!(
            owners.is_empty(),
            "blocks outside of the volume: {owners:?}"
        );
    }
}

fn write_list(dev: &MemDevice, blkno: u64, seq: u64, entries: &[u64]) -> AllocListHead {
    let mut block = vec![0; LG_BLOCK_SIZE];
    let head = list_head_of(&mut block, BlockRef::new(blkno, seq), entries);
    init_header(&mut block, Magic::AllocList, FSID, blkno, seq);
    seal(&mut block);
    dev.poke(blkno << LG_BLOCK_SHIFT, &block);
    head
}

/// Every block of a tree with its level, checked: structure, levels, key ranges.
pub(crate) fn tree_blocks(cache: &Rc<Cache>, root: &BtreeRoot) -> Vec<(u64, u8)> {
    let mut out = Vec::new();
    if root.height > 0 {
        visit(
            cache,
            &root.block_ref,
            root.height - 1,
            Key::ZEROS,
            Key::ONES,
            &mut out,
        );
    }
    out
}

fn visit(
    cache: &Rc<Cache>,
    block_ref: &BlockRef,
    level: u8,
    start: Key,
    end: Key,
    out: &mut Vec<(u64, u8)>,
) {
    let block = block_on(cache.read_ref(block_ref, Magic::Btree)).expect("tree block");
    btree::verify_block(block.bytes(), level).expect("a good block");
    out.push((block_ref.blkno.get(), level));
    if level == 0 {
        btree::block_items(block.bytes(), |it| {
            assert!(
                start <= it.key && it.key <= end,
                "{} is out of its leaf",
                it.key
            );
        });
        return;
    }
    let mut start = start;
    let children = btree::children(block.bytes());
    assert_eq!(children.last().map(|c| c.key), Some(end), "last parent key");
    for child in children {
        visit(cache, &child.block_ref, level - 1, start, child.key, out);
        start = child.key.inc();
    }
}

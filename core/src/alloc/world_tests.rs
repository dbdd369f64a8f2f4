//! A small server and one client over one device: double-buffered lists, two
//! metadata trees, refills, returns, commits that fail and are repeated, client
//! transactions that are abandoned. After each server commit every metadata
//! block and every data block is counted (spec 03 section 20).

use super::*;
use crate::block::testvol::{FSID, tree_blocks};
use crate::block::{Cache, list_entries, list_head_of};
use crate::btree;
use crate::env::Entropy;
use crate::env::testing::{MemDevice, TestEntropy, block_on};
use crate::format::{
    AllocListHead, AllocRoot, BlockRef, BtreeRoot, Key, LG_BLOCK_SHIFT, LG_BLOCK_SIZE, Magic,
    init_header, seal,
};
use std::collections::BTreeMap;
use std::rc::Rc;

const META: u64 = 1500;
const DATA: u64 = 6000;

/// What the super block and one log trees item hold.
#[derive(Clone, Copy, Default)]
struct Super {
    meta_alloc: [AllocRoot; 2],
    avail: [AllocListHead; 2],
    freed: [AllocListHead; 2],
    data_alloc: AllocRoot,
    client: Client,
}

#[derive(Clone, Copy, Default)]
struct Client {
    avail: AllocListHead,
    freed: AllocListHead,
    data_avail: AllocRoot,
    data_freed: AllocRoot,
    items: BtreeRoot,
}

struct World {
    dev: MemDevice,
    rng: Rc<TestEntropy>,
    policy: Rc<Policy>,
    server: Tx,
    sup: Super,
    cur: usize,
    from: usize,
    /// The state of the last server commit, with the data mapped then.
    stable: (Super, BTreeMap<u64, u64>),
    mapped: BTreeMap<u64, u64>,
}

fn policy(rng: &TestEntropy) -> Policy {
    Policy {
        cache_blocks: [2, 50][rng.range(0, 2) as usize],
        btree_space: Policy::BTREE_SPACE_MIN,
        list_max: 300,
        list_rotate: 75,
        meta_fill_lo: 150,
        meta_fill_target: 300,
        data_fill_lo: 500,
        data_fill_target: 1500,
        data_cached: 32,
        move_budget: 130,
        move_margin: 20,
        ..Policy::default()
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let rng = TestEntropy::new(seed);
        let policy = Rc::new(policy(&rng));
        let dev = MemDevice::new(META << LG_BLOCK_SHIFT);
        let mut sup = Super::default();
        sup.avail[0] = list(&dev, 3, 4..230);
        sup.avail[1] = list(&dev, 2, 230..450);
        let cache = Cache::new(dev.handle(), rng.clone(), FSID, policy.clone());
        let server = Tx::new(cache, sup.avail[0], sup.freed[0]);
        let mut world = Self {
            dev,
            rng,
            policy,
            server,
            sup,
            cur: 0,
            from: 0,
            stable: (sup, BTreeMap::new()),
            mapped: BTreeMap::new(),
        };
        block_on(async {
            let (tx, sup) = (&world.server, &mut world.sup);
            insert_extent(tx, &mut sup.meta_alloc[0], 450, 600)
                .await
                .unwrap();
            insert_extent(tx, &mut sup.meta_alloc[1], 1050, META - 1050)
                .await
                .unwrap();
            insert_extent(tx, &mut sup.data_alloc, 64, DATA - 64)
                .await
                .unwrap();
        });
        world
    }

    fn client_tx(&self) -> Tx {
        let cache = Cache::new(
            self.dev.handle(),
            self.rng.clone(),
            FSID,
            self.policy.clone(),
        );
        Tx::new(cache, self.sup.client.avail, self.sup.client.freed)
    }

    /// Spec 03 section 12; a failed attempt is repeated as a whole.
    async fn try_commit(&mut self) -> Result<(), AllocError> {
        let (other, from) = (self.cur ^ 1, self.from);
        let (tx, sup) = (&self.server, &mut self.sup);
        let (lo, target) = (self.policy.meta_fill_lo, self.policy.meta_fill_target);
        // Some commits do without the trees.
        if self.rng.range(0, 3) == 0 {
            let (freed, avail) = (&mut sup.freed[other], &mut sup.avail[other]);
            recycle_list(tx, freed, avail, lo, target).await?;
        }
        fill_list(
            tx,
            &mut sup.avail[other],
            &mut sup.meta_alloc[from],
            lo,
            target,
        )
        .await?;
        let runs = self.rng.range(0, 40) as u32;
        let freed = &mut sup.freed[other];
        empty_list(tx, freed, &mut sup.meta_alloc[from ^ 1], runs).await?;
        tx.prepare_commit();
        tx.write().await?;
        (sup.avail[self.cur], sup.freed[self.cur]) = tx.heads();
        Ok(())
    }

    fn commit(&mut self) {
        let mut tries = 0;
        while let Err(err) = block_on(self.try_commit()) {
            tries += 1;
            assert!(tries < 50, "{err}");
        }
        self.stable = (self.sup, self.mapped.clone());
        self.cur ^= 1;
        self.server
            .set_heads(self.sup.avail[self.cur], self.sup.freed[self.cur]);
        let [from, to] = [self.from, self.from ^ 1].map(|i| self.sup.meta_alloc[i].total_len.get());
        if from < 300 && to > from {
            self.from ^= 1;
        }
    }

    /// Spec 03 section 14: takes back what the client freed, refills it.
    async fn open_client(&mut self) -> Result<(), AllocError> {
        let (other, from) = (self.cur ^ 1, self.from);
        let (tx, sup, policy) = (&self.server, &mut self.sup, &self.policy);
        splice_list(tx, &mut sup.freed[other], &mut sup.client.freed).await?;
        let len = sup.client.data_freed.total_len.get();
        let budget = policy.move_budget;
        let (data, freed) = (&mut sup.data_alloc, &mut sup.client.data_freed);
        match move_extents(tx, data, freed, len, None, budget).await {
            Err(AllocError::InProgress | AllocError::NoSpace) => {}
            res => res?,
        }
        let (lo, target) = (policy.meta_fill_lo, policy.meta_fill_target);
        fill_list(
            tx,
            &mut sup.client.avail,
            &mut sup.meta_alloc[from],
            lo,
            target,
        )
        .await?;
        let have = sup.client.data_avail.total_len.get();
        if have < policy.data_fill_lo {
            let want = (policy.data_fill_target - have).min(sup.data_alloc.total_len.get());
            let avail = &mut sup.client.data_avail;
            match move_extents(tx, avail, &mut sup.data_alloc, want, None, budget).await {
                Err(AllocError::InProgress | AllocError::NoSpace) => {}
                res => res?,
            }
        }
        Ok(())
    }

    /// One client transaction: items, data allocated and freed.
    async fn run_client(&self, tx: &Tx) -> Result<(Client, BTreeMap<u64, u64>), AllocError> {
        let mut client = self.sup.client;
        let mut mapped = self.mapped.clone();
        let mut data = DataAlloc::new(client.data_avail, client.data_freed);
        for _ in 0..self.rng.range(1, 60) {
            if tx.meta_low(60) {
                break;
            }
            if self.rng.chance(1, 2) {
                let count = self.rng.range(1, 100);
                match data.alloc_data(tx, count).await {
                    Err(AllocError::Refill) => {}
                    got => {
                        let got = got?;
                        mapped.insert(got.start, got.len);
                    }
                }
            } else if !mapped.is_empty() {
                let nth = self.rng.range(0, mapped.len() as u64) as usize;
                let (start, len) = mapped.iter().nth(nth).map(|(s, l)| (*s, *l)).unwrap();
                mapped.remove(&start);
                let part = self.rng.range(1, len + 1);
                data.free_data(tx, start, part, DATA).await?;
                if part < len {
                    mapped.insert(start + part, len - part);
                }
            }
            let key = Key::inode(self.rng.range(1, 3000));
            let value = vec![1; self.rng.range(0, 600) as usize];
            if self.rng.chance(2, 3) {
                btree::force(tx, &mut client.items, &key, &value).await?;
            } else {
                match btree::delete(tx, &mut client.items, &key).await {
                    Err(BtreeError::NotFound(_)) => {}
                    res => res?,
                }
            }
        }
        data.return_cached(tx).await?;
        tx.prepare_commit();
        tx.write().await?;
        (client.data_avail, client.data_freed) = (data.avail, data.freed);
        (client.avail, client.freed) = tx.heads();
        Ok((client, mapped))
    }

    /// Counts all blocks of the stable state through a cold cache.
    fn census(&self) {
        let cache = Cache::new(
            self.dev.handle(),
            self.rng.clone(),
            FSID,
            self.policy.clone(),
        );
        let (sup, mapped) = &self.stable;
        let client = &sup.client;
        let mut meta: BTreeMap<u64, &str> = BTreeMap::new();
        let mut own = |blkno, who| {
            let before = meta.insert(blkno, who);
            assert_eq!(before, None, "block {blkno} of {who}");
        };
        let allocs = [
            (&sup.meta_alloc[0], "meta_alloc 0"),
            (&sup.meta_alloc[1], "meta_alloc 1"),
            (&sup.data_alloc, "data_alloc"),
            (&client.data_avail, "data_avail"),
            (&client.data_freed, "data_freed"),
        ];
        for (root, who) in allocs {
            tree_blocks(&cache, &root.root)
                .iter()
                .for_each(|b| own(b.0, who));
        }
        tree_blocks(&cache, &client.items)
            .iter()
            .for_each(|b| own(b.0, "items"));
        for root in &sup.meta_alloc {
            for (start, len) in extents_of(&cache, root) {
                (start..start + len).for_each(|b| own(b, "free extent"));
            }
        }
        let lists = sup
            .avail
            .iter()
            .chain(&sup.freed)
            .chain([&client.avail, &client.freed]);
        for head in lists {
            let (mut next, mut nr) = (head.block_ref, 0);
            while !next.is_null() {
                own(next.blkno.get(), "list block");
                let block = block_on(cache.read_ref(&next, Magic::AllocList)).unwrap();
                let (entries, after) = list_entries(block.bytes()).unwrap();
                nr += entries.len() as u64;
                entries.iter().for_each(|b| own(*b, "list entry"));
                next = after;
            }
            assert_eq!(nr, head.total_nr.get());
        }
        assert_eq!(meta.len() as u64, META - 2, "metadata blocks");
        assert_eq!(meta.first_key_value().map(|b| *b.0), Some(2));
        let mut data: Vec<(u64, u64)> = mapped.iter().map(|(s, l)| (*s, *l)).collect();
        for root in [&sup.data_alloc, &client.data_avail, &client.data_freed] {
            data.extend(extents_of(&cache, root));
        }
        data.sort_unstable();
        let mut at = 64;
        for (start, len) in data {
            assert_eq!(start, at, "data block");
            at = start + len;
        }
        assert_eq!(at, DATA);
    }
}

fn list(dev: &MemDevice, blkno: u64, entries: std::ops::Range<u64>) -> AllocListHead {
    let mut block = vec![0; LG_BLOCK_SIZE];
    let entries: Vec<u64> = entries.collect();
    let head = list_head_of(&mut block, BlockRef::new(blkno, 1), &entries);
    init_header(&mut block, Magic::AllocList, FSID, blkno, 1);
    seal(&mut block);
    dev.poke(blkno << LG_BLOCK_SHIFT, &block);
    head
}

fn extents_of(cache: &Rc<Cache>, root: &AllocRoot) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    block_on(read_extents(cache, root, &mut |e| {
        out.push((e.start, e.len))
    }))
    .unwrap();
    let total: u64 = out.iter().map(|e| e.1).sum();
    assert_eq!(total, root.total_len.get());
    out
}

fn run(seed: u64, faults: bool) {
    let mut world = World::new(seed);
    world.commit();
    world.census();
    for round in 0..16 {
        if faults {
            let rng = world.rng.clone();
            world
                .dev
                .set_fault(Some(Box::new(move |_| rng.chance(1, 60))));
        }
        // A request that failed half way leaves what it did: the next commit
        // has it, and the client asks again.
        let mut opened = false;
        while !opened {
            opened = match block_on(world.open_client()) {
                Ok(()) => true,
                Err(AllocError::NoSpace) => true,
                Err(AllocError::Btree(BtreeError::Block(BlockError::Io { .. }))) => false,
                Err(err) => panic!("seed {seed} round {round}: {err}"),
            };
            world.commit();
        }
        world.dev.set_fault(None);
        world.census();
        if faults {
            let rng = world.rng.clone();
            world
                .dev
                .set_fault(Some(Box::new(move |_| rng.chance(1, 300))));
        }
        let tx = world.client_tx();
        let done = block_on(world.run_client(&tx));
        world.dev.set_fault(None);
        match done {
            Ok((client, mapped)) => (world.sup.client, world.mapped) = (client, mapped),
            Err(err) => assert!(faults, "seed {seed} round {round}: {err}"),
        }
        world.commit();
        world.census();
    }
}

#[test]
fn a_server_and_a_client_lose_no_block() {
    for seed in 0..2 {
        run(seed, false);
    }
}

#[test]
fn a_server_and_a_client_lose_no_block_through_io_errors() {
    for seed in 100..104 {
        run(seed, true);
    }
}

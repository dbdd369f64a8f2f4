//! Random histories of mounts, transactions, merges and reclaims under power loss
//! and I/O errors at any request of the server. After each: every block is counted
//! once, what was acknowledged is there, and what was not is there whole or not at
//! all.

use super::census::{Census, census};
use super::mount::{Items, Mount, Written};
use super::{addr, block_policy, open, volume};
use crate::alloc::FreeExtent;
use crate::block::Cache;
use crate::env::testing::TestWorld;
use crate::env::{Entropy, Gate};
use crate::format::*;
use crate::log::merge_worker::merge_request;
use crate::server::{Progress, ServerError, Store};
use bytes::Bytes;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

struct Client {
    mount: Mount,
    /// A transaction is open here.
    open: bool,
    /// Handed in, with the outcome unknown.
    pending: Option<Written>,
    /// Its reclaim has begun.
    leaving: bool,
    /// What the server acknowledged, over all transactions.
    acked: Items,
}

struct Cluster {
    world: TestWorld,
    store: Rc<Store>,
    clients: Vec<Client>,
    next_rid: u64,
    /// What mounts left behind that are gone.
    left: Items,
    left_used: Vec<FreeExtent>,
    crashes: u64,
    /// The power went.
    dead: Rc<Cell<bool>>,
}

fn shadow(base: &Items, more: &Items) -> BTreeMap<Key, Bytes> {
    let mut all = base.clone();
    all.extend(more.clone());
    all.into_iter()
        .filter_map(|(key, (_, value))| Some((key, value?)))
        .collect()
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let world = volume(seed);
        let store = world.block_on(open(&world));
        let made = census(&world.meta).expect("mkfs makes a good volume");
        Self {
            world,
            store,
            clients: Vec::new(),
            next_rid: 1,
            left: made.items_of(&made.sup.fs_root),
            left_used: Vec::new(),
            crashes: 0,
            dead: Rc::default(),
        }
    }

    fn draw(&self, n: u64) -> u64 {
        self.world.entropy.range(0, n)
    }

    /// Lets one request of the server fail somewhere ahead: for good (the power
    /// goes), or once.
    fn arm(&self) {
        let (at, power) = (Cell::new(self.draw(40)), self.draw(3) > 0);
        let (dev, dead) = (self.world.meta.clone(), self.dead.clone());
        self.world.meta.set_fault(Some(Box::new(move |_| {
            let left = at.get();
            at.set(left.saturating_sub(1));
            if power && left == 0 {
                dev.set_shut(true);
                dead.set(true);
            }
            left == 0 && (power || at.replace(u64::MAX) == 0)
        })));
    }

    fn disarm(&self) {
        self.world.meta.set_fault(None);
    }

    /// One random step; `Err` if the server answered with an error.
    fn step(&mut self) -> Result<(), ServerError> {
        let who = self.draw(self.clients.len().max(1) as u64) as usize;
        match self.draw(16) {
            0 | 1 if self.clients.len() < 3 => self.mount(),
            _ if self.clients.is_empty() => self.mount(),
            _ if self.clients[who].leaving => self.reclaim(who),
            0..=8 if self.clients[who].open => self.commit(who),
            0..=8 => self.get(who),
            9 => self.all_get(),
            10 => self.reclaim(who),
            11..=13 => self.merge(who),
            14 => self.free_merged(),
            _ => self.look(),
        }
    }

    fn mount(&mut self) -> Result<(), ServerError> {
        let rid = self.next_rid;
        let client = Client {
            mount: Mount::new(&self.world, rid, &block_policy()),
            open: false,
            pending: None,
            leaving: false,
            acked: Items::new(),
        };
        let done = self
            .store
            .insert_mounted(rid, addr(7), rid.is_multiple_of(2));
        self.world.block_on(done)?;
        self.next_rid += 1;
        self.clients.push(client);
        Ok(())
    }

    fn get(&mut self, who: usize) -> Result<(), ServerError> {
        let client = &mut self.clients[who];
        let log = self
            .world
            .block_on(self.store.get_log_trees(client.mount.rid))?;
        assert!(log.is_open());
        client.mount.log = log;
        client.open = true;
        // A resend finds the same transaction.
        let again = self
            .world
            .block_on(self.store.get_log_trees(client.mount.rid))?;
        assert_eq!(again, log);
        Ok(())
    }

    /// Every mount that may asks at once: they share commits.
    fn all_get(&mut self) -> Result<(), ServerError> {
        let mut waits = Vec::new();
        for (at, client) in self.clients.iter().enumerate().filter(|(_, c)| !c.open) {
            if client.pending.is_some() || client.leaving {
                continue;
            }
            let (gate, rid, store) = (Gate::default(), client.mount.rid, self.store.clone());
            let result = Rc::new(std::cell::RefCell::new(None));
            waits.push((at, gate.clone(), result.clone()));
            self.world.env().spawn("get", async move {
                *result.borrow_mut() = Some(store.get_log_trees(rid).await);
                gate.open();
            });
        }
        let mut outcome = Ok(());
        for (at, gate, result) in waits {
            self.world.block_on(gate.wait());
            match result.take().expect("it ran") {
                Ok(log) => {
                    self.clients[at].mount.log = log;
                    self.clients[at].open = true;
                }
                Err(err) => outcome = Err(err),
            }
        }
        outcome
    }

    fn commit(&mut self, who: usize) -> Result<(), ServerError> {
        if self.clients[who].pending.is_none() && !self.dead.get() {
            self.disarm();
            let count = 1 + self.draw(60);
            let built = self.clients[who].mount.build(&self.world, count);
            self.clients[who].pending = Some(self.world.block_on(built));
            if self.draw(3) == 0 {
                self.arm();
            }
        }
        let client = &mut self.clients[who];
        let Some(written) = &client.pending else {
            return Ok(());
        };
        let sent = self.store.commit_log_trees(client.mount.rid, written.log);
        self.world.block_on(sent)?;
        client.took();
        Ok(())
    }

    fn reclaim(&mut self, who: usize) -> Result<(), ServerError> {
        let rid = self.clients[who].mount.rid;
        self.clients[who].leaving = true;
        while self.world.block_on(self.store.reclaim_pass(rid))? == Progress::More {}
        self.world.block_on(self.store.delete_mounted(&[rid]))?;
        let mut client = self.clients.swap_remove(who);
        // What was not acknowledged may have come through; the census tells.
        let seen = self.census().expect("reclaim leaves a good volume");
        if client
            .pending
            .as_ref()
            .is_some_and(|written| is_stored(&seen, written))
        {
            client.took();
        }
        self.left.extend(client.acked);
        self.left_used.extend(client.mount.used);
        Ok(())
    }

    fn merge(&mut self, who: usize) -> Result<(), ServerError> {
        let rid = self.clients[who].mount.rid;
        let request = match self.world.block_on(self.store.get_log_merge(rid)) {
            Err(ServerError::Refused(_)) => return Ok(()),
            other => other?,
        };
        if self.dead.get() || self.draw(5) == 0 {
            // Forgotten: the next question gets it back.
            return Ok(());
        }
        self.world.meta.set_fault(None);
        let comp = self.world.block_on(self.do_merge(&request));
        if self.draw(3) == 0 {
            self.arm();
        }
        let sent = self.store.commit_log_merge(rid, comp);
        match self.world.block_on(sent) {
            Err(ServerError::Refused(_)) => Ok(()),
            other => other,
        }
    }

    /// A mount's part of a merge.
    async fn do_merge(&self, request: &LogMergeRequest) -> LogMergeComplete {
        let policy = Rc::new(block_policy());
        let entropy = self.world.entropy.clone();
        let cache = Cache::new(self.world.meta.handle(), entropy, super::FSID, policy);
        let mut comp = merge_request(&cache, request).await;
        assert_eq!(comp.flags.get() & LOG_MERGE_COMPLETE_FLAG_ERROR, 0);
        if self.draw(6) == 0 {
            comp.flags = LOG_MERGE_COMPLETE_FLAG_ERROR.into();
        }
        comp
    }

    fn free_merged(&mut self) -> Result<(), ServerError> {
        while self.world.block_on(self.store.free_merged())? == Progress::More {}
        Ok(())
    }

    fn look(&mut self) -> Result<(), ServerError> {
        let statfs = self.world.block_on(self.store.statfs())?;
        assert!(statfs.free_meta_blocks.get() < statfs.total_meta_blocks.get());
        self.world.block_on(self.store.last_seq())?;
        let ino = self.world.block_on(self.store.alloc_inodes(10))?;
        assert_eq!(ino.nr.get(), 10);
        Ok(())
    }

    fn census(&self) -> Result<Census, String> {
        census(&self.world.meta)
    }

    /// The server is gone; what does the volume hold?
    fn fail_over(&mut self, power_loss: bool) -> Result<(), String> {
        self.disarm();
        self.store.fail(ServerError::Stopping);
        self.world.block_on(self.store.close());
        if power_loss {
            self.world.meta.power_loss(&*self.world.entropy);
        }
        self.world.meta.set_shut(false);
        self.dead.set(false);
        self.crashes += 1;
        let seen = self.census()?;
        self.check(&seen)?;
        self.store = self.world.block_on(open(&self.world));
        Ok(())
    }

    /// Compares the volume with what was promised.
    fn check(&mut self, seen: &Census) -> Result<(), String> {
        let visible = seen.visible();
        let mut used: u64 = self.left_used.iter().map(|extent| extent.len).sum();
        let mut expected = shadow(&self.left, &Items::new());
        for client in &mut self.clients {
            let rid = client.mount.rid;
            if !seen.mounted.contains(&rid) && !client.leaving {
                return Err(format!("mount {rid} was promised to be recorded"));
            }
            if client
                .pending
                .as_ref()
                .is_some_and(|written| is_stored(seen, written))
            {
                client.took();
            }
            used += client
                .mount
                .used
                .iter()
                .map(|extent| extent.len)
                .sum::<u64>();
            expected.extend(shadow(&client.acked, &Items::new()));
        }
        if visible != expected {
            let lost: Vec<_> = expected
                .keys()
                .filter(|k| !visible.contains_key(k))
                .collect();
            let extra: Vec<_> = visible
                .keys()
                .filter(|k| !expected.contains_key(k))
                .collect();
            return Err(format!("items lost: {lost:?}, too many: {extra:?}"));
        }
        let total = seen.sup.total_data_blocks.get() - DATA_DEV_START_BLKNO;
        if seen.free_data + used != total {
            return Err(format!(
                "{} free and {used} used of {total} data blocks",
                seen.free_data
            ));
        }
        Ok(())
    }
}

impl Client {
    /// The pending transaction is durable.
    fn took(&mut self) {
        let written = self.pending.take().expect("a pending transaction");
        self.mount.committed(&written);
        self.acked.extend(written.items);
        self.open = false;
    }
}

/// Whether a log tree is, or was when it was finalized, what this transaction made
/// it: there is no other way to its root.
fn is_stored(seen: &Census, written: &Written) -> bool {
    let log = &written.log;
    seen.logs.iter().any(|stored| {
        stored.rid == log.rid && stored.nr == log.nr && stored.item_root == log.item_root
    })
}

/// Runs one history; an error names what broke.
fn history(seed: u64, steps: u64) -> Result<Cluster, String> {
    let mut cluster = Cluster::new(seed);
    cluster.world.meta.set_yields(seed % 2 == 1);
    for _ in 0..steps {
        if cluster.draw(8) == 0 {
            cluster.arm();
        }
        let result = cluster.step();
        cluster.disarm();
        let failed = cluster.store.failure().is_some() || cluster.dead.get();
        match result {
            Err(_) if failed => cluster.fail_over(true)?,
            Err(err) => tracing::debug!(%err, "a step failed"),
            Ok(()) if failed => cluster.fail_over(true)?,
            Ok(()) => {}
        }
        if cluster.draw(30) == 0 {
            let power_loss = cluster.draw(2) == 0;
            cluster.fail_over(power_loss)?;
        }
    }
    cluster.fail_over(true)?;
    Ok(cluster)
}

/// Rare places that the histories below must reach, or they test less than they say.
const REACHED: [&str; 14] = [
    "server.commit.failed",
    "server.get_log_trees.resent",
    "server.get_log_trees.drain",
    "server.reclaim.open_transaction",
    "server.finalize.in_progress",
    "server.merge.start",
    "server.merge.finalize_ours",
    "server.merge.request_cancelled",
    "server.merge.request_failed",
    "server.merge.splice",
    "server.merge.remain",
    "server.merge.end",
    "server.merge.wait_timeout",
    "server.commit.trees_swapped",
];

#[test]
fn histories_survive_power_loss_and_errors() {
    use crate::env::set_probe_sink;
    let seen: Rc<std::cell::RefCell<BTreeMap<&'static str, u64>>> = Rc::default();
    let sink = seen.clone();
    set_probe_sink(Some(Box::new(move |name| {
        *sink.borrow_mut().entry(name).or_default() += 1
    })));
    let (mut crashes, mut commits) = (0, 0);
    let seeds: u64 = std::env::var("SEEDS").map_or(5, |n| n.parse().expect("a number"));
    for seed in 0..seeds {
        match history(seed, 120) {
            Ok(cluster) => {
                crashes += cluster.crashes;
                commits += cluster.store.stable().hdr.seq.get();
            }
            Err(err) => panic!("seed {seed}: {err}"),
        }
    }
    set_probe_sink(None);
    assert!(
        crashes > 12 && commits > 250,
        "{crashes} crashes, {commits} commits"
    );
    let seen = seen.borrow();
    let missed: Vec<_> = REACHED
        .iter()
        .filter(|name| !seen.contains_key(*name))
        .collect();
    assert!(missed.is_empty(), "never reached: {missed:?} of {seen:?}");
}

#[cfg(feature = "mutants")]
#[test]
fn planted_bugs_are_found() {
    use crate::env::set_mutant;
    for name in [
        "super_before_flush",
        "commit_not_durable_reply",
        "reclaim_skips_avail",
    ] {
        set_mutant(Some(name));
        let found = (0..60)
            .find(|seed| std::panic::catch_unwind(|| history(*seed, 120).is_err()).unwrap_or(true));
        set_mutant(None);
        assert!(found.is_some(), "{name} was not found");
    }
}

//! The server's copy of the volume: the super block on the device, the one that
//! is being changed, and the commits that turn the second into the first
//! (spec 04 sections 8 and 14, 03 sections 11 to 13).
//!
//! All changes go through [`Store::hold`], then [`Store::dirty`], then
//! [`Hold::apply`], in this order: hold first, lock second, so that whoever waits
//! to hold never keeps others from finishing.
//!
//! Order on the device: every dirty block, flush, the super with FUA. Only then
//! does anybody learn of the new state.
//!
//! What can go wrong:
//! * An answer before the super is durable. Every handler that changes something
//!   answers with what [`Hold::apply`] returned.
//! * Half of a change committed. A handler that can not go on in the middle
//!   returns [`ServerError::Fatal`]; from then on nothing is committed, and the
//!   server stops with the device as it was.
//! * A super write that failed: nobody knows which super is on the device. The
//!   same: stop, and let the next server read it.
//! * A block write or flush that failed: nothing refers to those blocks yet. The
//!   appliers get the error, and the next commit writes everything again.

use super::Policy;
use super::error::{OrFatal, Result, ServerError};
use super::gate::{Entry, Gate, Room};
use crate::alloc::{self, AllocError};
use crate::block::{Cache, Tx};
use crate::env::{BlockDevice, DeviceRole, Env, Gate as Door, Notify, Signal, mutant, probe};
use crate::format::{AllocListHead, AllocRoot, LG_BLOCK_SHIFT, SM_BLOCK_SHIFT, SuperBlock};
use crate::volume;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tokio::sync::{MutexGuard, oneshot};

/// Commits in a row that may fail to make room before a holder is refused.
const ROOM_TRIES: u32 = 8;

/// Asks the mount with this rid to commit its open transaction.
pub type SyncHook = Rc<dyn Fn(u64)>;

/// The state that handlers change, under [`Store::dirty`].
#[derive(Debug)]
pub struct Dirty {
    /// The super of the next commit.
    pub sup: SuperBlock,
    /// Which pair of server lists the transaction runs on.
    cur: usize,
    /// Which metadata tree fills are taken from; the other takes what is freed.
    avail_tree: usize,
}

impl Dirty {
    /// The freed list of the idle pair: where lists that come back are spliced.
    pub fn other_freed(&mut self) -> &mut AllocListHead {
        &mut self.sup.server_meta_freed[self.cur ^ 1]
    }

    /// The metadata tree that may be allocated from.
    pub fn meta_avail(&mut self) -> &mut AllocRoot {
        &mut self.sup.meta_alloc[self.avail_tree]
    }
}

/// See the head of this file.
pub struct Store {
    env: Env,
    pub(super) policy: Policy,
    meta: Rc<dyn BlockDevice>,
    data: Rc<dyn BlockDevice>,
    pub(super) cache: Rc<Cache>,
    /// The running transaction.
    pub(super) tx: Tx,
    dirty: tokio::sync::Mutex<Dirty>,
    stable: RefCell<Rc<SuperBlock>>,
    core_seq: Cell<u64>,
    clients: Cell<u64>,
    gate: RefCell<Gate>,
    gate_changed: Signal,
    appliers: RefCell<Vec<oneshot::Sender<Result<()>>>>,
    failure: RefCell<Option<ServerError>>,
    failed: Door,
    commits: Cell<u64>,
    /// Core seq up to which open transactions were asked to commit for a merge.
    pub(super) finalize_sent_seq: Cell<u64>,
    /// Times that somebody has waited in vain for a merge to start, since the last did.
    pub(super) merge_waits: Cell<u32>,
    sync_hook: RefCell<Option<SyncHook>>,
    merge_free: Notify,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Store(seq {}, {} commits)",
            self.core_seq.get(),
            self.commits.get()
        )
    }
}

/// Which list pair and which metadata tree a new server starts with (spec 03 section 11).
fn choose_roles(sup: &SuperBlock) -> (usize, usize) {
    let avail = &sup.server_meta_avail;
    let trees = &sup.meta_alloc;
    (
        usize::from(avail[0].total_nr.get() < avail[1].total_nr.get()),
        usize::from(trees[0].total_len.get() < trees[1].total_len.get()),
    )
}

impl Store {
    /// Reads the super block and prepares the first commit (spec 09 section 6,
    /// steps 4 to 6). Earlier leaders are fenced by now.
    ///
    /// # Errors
    /// If the super block or the log trees can not be read.
    pub async fn open(
        env: &Env,
        policy: Policy,
        block_policy: Rc<crate::block::Policy>,
        fsid: u64,
    ) -> Result<Rc<Self>> {
        block_policy.assert_serves();
        let meta = env.devices.open(DeviceRole::Meta)?;
        let data = env.devices.open(DeviceRole::Data)?;
        let clock = &*env.clock;
        let sup = volume::read_super_retrying(&*meta, DeviceRole::Meta, Some(fsid), clock).await?;
        let entropy = env.entropy.clone();
        let cache = Cache::new(meta.clone(), entropy, fsid, block_policy.clone());
        cache.set_total_blocks(sup.total_meta_blocks.get());
        let (cur, avail_tree) = choose_roles(&sup);
        let tx = Tx::new(
            cache.clone(),
            sup.server_meta_avail[cur],
            sup.server_meta_freed[cur],
        );
        let store = Rc::new(Self {
            env: env.clone(),
            policy,
            meta,
            data,
            cache,
            tx,
            // Mutant: breaks spec 04 section 4, seqs go on where the last server ended.
            core_seq: Cell::new(if mutant("core_seq_restarts") {
                0
            } else {
                sup.seq.get()
            }),
            stable: RefCell::new(Rc::new(sup)),
            dirty: tokio::sync::Mutex::new(Dirty {
                sup,
                cur,
                avail_tree,
            }),
            clients: Cell::new(0),
            gate: RefCell::new(Gate::new(block_policy.commit_budget)),
            gate_changed: Signal::default(),
            appliers: RefCell::default(),
            failure: RefCell::default(),
            failed: Door::default(),
            commits: Cell::new(0),
            finalize_sent_seq: Cell::new(0),
            merge_waits: Cell::new(0),
            sync_hook: RefCell::default(),
            merge_free: Notify::new(),
        });
        let greatest = store.greatest_item_seq(&sup.logs_root).await?;
        if !mutant("core_seq_restarts") {
            store.raise_core_seq(greatest);
        }
        Ok(store)
    }

    /// Draws the next core seq.
    pub fn next_seq(&self) -> u64 {
        self.core_seq.set(self.core_seq.get() + 1);
        self.core_seq.get()
    }

    /// The last core seq drawn.
    pub fn core_seq(&self) -> u64 {
        self.core_seq.get()
    }

    /// Makes the core seq at least `seq`.
    pub fn raise_core_seq(&self, seq: u64) {
        self.core_seq.set(self.core_seq.get().max(seq));
    }

    /// The last super that is durable.
    pub fn stable(&self) -> Rc<SuperBlock> {
        self.stable.borrow().clone()
    }

    /// Commits so far.
    pub fn commits(&self) -> u64 {
        self.commits.get()
    }

    /// Small blocks of the data device.
    pub(super) fn data_device_blocks(&self) -> u64 {
        self.data.size() >> SM_BLOCK_SHIFT
    }

    /// Makes durable what mounts have written to the data device.
    ///
    /// # Errors
    /// The device's.
    pub(super) async fn flush_data(&self) -> Result<()> {
        // Mutant: what a dead mount wrote in place is shown, and may vanish again.
        if !self.cache.policy().flush || mutant("dead_data_not_flushed") {
            return Ok(());
        }
        Ok(self.data.flush().await?)
    }

    /// Large blocks of the metadata device.
    pub(super) fn meta_device_blocks(&self) -> u64 {
        self.meta.size() >> LG_BLOCK_SHIFT
    }

    /// The seams.
    pub(super) fn env(&self) -> &Env {
        &self.env
    }

    /// Sets the number of connected clients, which the reserve depends on.
    pub fn set_clients(&self, clients: u64) {
        self.clients.set(clients);
    }

    /// Connected clients, one at least.
    pub(super) fn clients(&self) -> u32 {
        u32::try_from(self.clients.get().max(1)).unwrap_or(u32::MAX)
    }

    /// Metadata blocks kept back from operations that add items (03 section 17).
    pub(super) fn reserve(&self) -> u64 {
        self.cache.policy().reserve(self.clients.get())
    }

    /// Sets how mounts are asked to commit (SYNC_LOG_TREES); `None` to stop asking.
    pub fn set_sync_hook(&self, hook: Option<SyncHook>) {
        *self.sync_hook.borrow_mut() = hook;
    }

    /// Asks a mount to commit its transaction soon. Losing it is harmless.
    pub(super) fn request_sync(&self, rid: u64) {
        let hook = self.sync_hook.borrow().clone();
        if let Some(hook) = hook {
            hook(rid);
        }
    }

    /// Lets the task go on that frees merged log trees.
    pub(super) fn kick_merge_free(&self) {
        self.merge_free.notify_one();
    }

    /// Waits until there may be merged log trees to free.
    pub async fn wait_merge_free(&self) {
        self.merge_free.notified().await;
    }

    /// Why the server must stop, if it must.
    pub fn failure(&self) -> Option<ServerError> {
        self.failure.borrow().clone()
    }

    /// Waits until the server must stop.
    pub async fn wait_failed(&self) -> ServerError {
        self.failed.wait().await;
        self.failure().expect("set before the door opens")
    }

    /// Ends all committing: the server stops. The first reason is kept.
    pub fn fail(&self, err: ServerError) {
        self.failure.borrow_mut().get_or_insert(err);
        self.failed.open();
        self.gate_changed.wake_all();
    }

    fn check_alive(&self) -> Result<()> {
        match &*self.failure.borrow() {
            None => Ok(()),
            Some(_) => Err(ServerError::Stopping),
        }
    }

    fn room(&self) -> Room {
        let left = self.tx.remaining();
        Room {
            avail: left.avail,
            freed: left.freed,
        }
    }

    /// Enters the open commit. Waits while one is written or has no room left.
    ///
    /// # Errors
    /// If the server stops, or no commit makes room.
    pub async fn hold(self: &Rc<Self>) -> Result<Hold> {
        self.enter(|gate, room| gate.hold(room)).await
    }

    /// Enters a commit that nobody else shares, with room for `need` entries.
    ///
    /// # Errors
    /// As [`Store::hold`].
    pub async fn hold_alone(self: &Rc<Self>, need: u32) -> Result<Hold> {
        self.enter(|gate, room| gate.hold_alone(room, need)).await
    }

    async fn enter(self: &Rc<Self>, ask: impl Fn(&mut Gate, Room) -> Entry) -> Result<Hold> {
        for _ in 0..ROOM_TRIES {
            let entry = self
                .gate_changed
                .wait_for(|| {
                    if let Err(err) = self.check_alive() {
                        return Some(Err(err));
                    }
                    match ask(&mut self.gate.borrow_mut(), self.room()) {
                        Entry::Wait => None,
                        entry => Some(Ok(entry)),
                    }
                })
                .await?;
            if entry == Entry::Held {
                return Ok(Hold {
                    store: Some(self.clone()),
                });
            }
            probe("server.commit.for_room");
            self.commit_now().await?;
        }
        probe("server.commit.no_room");
        Err(ServerError::NoSpace)
    }

    /// The dirty state, for who holds the commit, or only reads.
    pub async fn dirty(&self) -> MutexGuard<'_, Dirty> {
        self.dirty.lock().await
    }

    /// Runs `f` on the dirty state in a hold of its own and applies its result.
    ///
    /// # Errors
    /// What `f` returns, or why the commit failed.
    pub async fn change<T>(
        self: &Rc<Self>,
        f: impl AsyncFnOnce(&mut Dirty) -> Result<T>,
    ) -> Result<T> {
        let hold = self.hold().await?;
        let result = f(&mut *self.dirty().await).await;
        hold.apply(result).await
    }

    fn leave(self: &Rc<Self>, apply: bool) {
        if self.gate.borrow_mut().leave(apply) {
            let store = self.clone();
            self.env.spawn("server_commit", async move {
                // The appliers hear of an error.
                let _ = store.commit_now().await;
            });
        } else {
            self.gate_changed.wake_all();
        }
    }

    /// Runs the commit that the gate is marked with, and answers the appliers.
    async fn commit_now(self: &Rc<Self>) -> Result<()> {
        let result = match self.check_alive() {
            Ok(()) => self.commit().await,
            Err(err) => Err(err),
        };
        if let Err(err) = &result {
            probe("server.commit.failed");
            tracing::warn!(%err, "server commit failed");
            if err.is_fatal() {
                self.fail(err.clone());
            }
        }
        for applier in self.appliers.take() {
            // An applier that went away does not care.
            let _ = applier.send(result.clone());
        }
        self.gate.borrow_mut().committed();
        self.gate_changed.wake_all();
        result
    }

    /// One commit (spec 03 section 12). Nobody holds.
    async fn commit(&self) -> Result<()> {
        let dirty = &mut *self.dirty.lock().await;
        self.exchange_lists(dirty).await.or_fatal()?;
        self.tx.prepare_commit();
        let early = mutant("super_before_flush");
        if early {
            self.tx.write_blocks().await?;
        } else {
            self.tx.write().await?;
        }
        self.env
            .spawner
            .yield_point("server_commit.blocks_stable")
            .await;
        self.check_alive()?;
        let (avail, freed) = self.tx.heads();
        // Mutant: breaks spec 03 section 12, some super blocks list as free what their own
        // commit has used. The next one is right again.
        let late = mutant("avail_head_late") && dirty.sup.hdr.seq.get() % 16 == 9;
        if !late {
            dirty.sup.server_meta_avail[dirty.cur] = avail;
        }
        dirty.sup.server_meta_freed[dirty.cur] = freed;
        dirty.sup.seq = self.core_seq.get().into();
        dirty.sup.hdr.seq += 1;
        volume::write_super(&*self.meta, DeviceRole::Meta, &dirty.sup)
            .await
            .or_fatal()?;
        if late {
            dirty.sup.server_meta_avail[dirty.cur] = avail;
        }
        if early {
            self.tx.flush().await?;
        }
        self.publish(dirty);
        Ok(())
    }

    /// Refills the idle avail list and empties the idle freed list (spec 03 sections 12
    /// and 17).
    async fn exchange_lists(&self, dirty: &mut Dirty) -> Result<()> {
        let (other, from) = (dirty.cur ^ 1, dirty.avail_tree);
        let policy = self.cache.policy().clone();
        let sup = &mut dirty.sup;
        // As long as little is left, no commit may cost more blocks than it takes back:
        // what was freed is used again without the way through the trees, and all of it
        // is taken back. Else commits eat what the trees have while the freed lists grow,
        // and a server whose running list can not pay for a change of a tree any more
        // never gets at those again.
        let free = sup.meta_alloc[from].total_len.get();
        let low = policy.meta_is_low(free, self.clients.get());
        let (lo, target) = (policy.meta_fill_lo, policy.meta_fill_target);
        if low {
            let freed = &mut sup.server_meta_freed[other];
            let avail = &mut sup.server_meta_avail[other];
            alloc::recycle_list(&self.tx, freed, avail, lo, target).await?;
        }
        let filled = alloc::fill_list(
            &self.tx,
            &mut sup.server_meta_avail[other],
            &mut sup.meta_alloc[from],
            lo,
            target,
        )
        .await;
        match filled {
            Ok(()) => {}
            // The list keeps what it got; holders look at its count.
            Err(AllocError::NoSpace) => probe("server.commit.avail_short"),
            Err(err) => return Err(err.into()),
        }
        let runs = if low { u32::MAX } else { policy.empty_runs };
        let (freed, to) = (&mut sup.server_meta_freed[other], from ^ 1);
        alloc::empty_list(&self.tx, freed, &mut sup.meta_alloc[to], runs).await?;
        Ok(())
    }

    /// The super is durable: everybody may know, and the roles change.
    fn publish(&self, dirty: &mut Dirty) {
        self.commits.set(self.commits.get() + 1);
        self.cache
            .set_total_blocks(dirty.sup.total_meta_blocks.get());
        *self.stable.borrow_mut() = Rc::new(dirty.sup);
        dirty.cur ^= 1;
        let (avail, freed) = (dirty.sup.server_meta_avail, dirty.sup.server_meta_freed);
        self.tx.set_heads(avail[dirty.cur], freed[dirty.cur]);
        let [from, to] = [dirty.avail_tree, dirty.avail_tree ^ 1];
        let len = |tree: usize| dirty.sup.meta_alloc[tree].total_len.get();
        if len(from) < 2 * self.reserve() && len(to) > len(from) {
            probe("server.commit.trees_swapped");
            dirty.avail_tree = to;
        }
    }

    /// Waits until no commit runs and drops what is not committed. The store is
    /// failed by now, so none starts any more.
    pub async fn close(&self) {
        assert!(self.failed.is_open(), "closing a store that still commits");
        self.gate_changed
            .wait_for(|| {
                let gate = self.gate.borrow();
                (!gate.is_committing() && gate.holders() == 0).then_some(())
            })
            .await;
        let _dirty = self.dirty.lock().await;
        self.tx.forget_all();
    }
}

/// A share in the open commit. Dropped without [`Hold::apply`] it leaves what was
/// changed to the next commit.
#[derive(Debug)]
#[must_use]
pub struct Hold {
    store: Option<Rc<Store>>,
}

impl Hold {
    /// Leaves; with a success waits until everything changed is durable.
    ///
    /// # Errors
    /// The given error, at once, or why the commit failed.
    pub async fn apply<T>(mut self, result: Result<T>) -> Result<T> {
        let store = self.store.take().expect("applied once");
        let value = match result {
            Ok(value) => value,
            Err(err) => {
                if err.is_fatal() {
                    store.fail(err.clone());
                }
                store.leave(false);
                return Err(err);
            }
        };
        let (tx, rx) = oneshot::channel();
        store.appliers.borrow_mut().push(tx);
        store.leave(true);
        if mutant("commit_not_durable_reply") {
            return Ok(value);
        }
        match rx.await {
            Ok(Ok(())) => Ok(value),
            Ok(Err(err)) => Err(err),
            Err(_) => Err(ServerError::Stopping),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(store) = self.store.take() {
            store.leave(false);
        }
    }
}

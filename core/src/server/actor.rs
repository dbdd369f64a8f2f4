//! The life of one server instance (spec 09 section 6), and what its tasks share.
//!
//! What can go wrong: reading the super before every earlier leader is dead, and
//! saying "down" while something can still write. [`run`] shows the order of the
//! start; [`Server::stop`] that of the end. Tasks are never aborted in the middle
//! of a change: they are told, and waited for.

use super::error::{Result, ServerError};
use super::farewell::Farewells;
use super::fence::Fences;
use super::hooks::Hooks;
use super::peers::Peers;
use super::recovery::Recovery;
use super::store::Store;
use super::{FenceReason, FenceRequest, Handle, ServerConfig, Status};
use crate::env::{
    DeviceRole, Duration, Either, Env, Gate as Door, Listener, Signal, mutant, probe, race,
};
use crate::format::{QuorumBlock, QuorumEventKind, SuperBlock};
use crate::guard::{Standing, WriteGuard};
use crate::locks::omap::OmapServer;
use crate::locks::server::LockServer;
use crate::notice::Notice;
use crate::quorum::{
    LeaderCandidate, Slots, fence_candidates, gives_way, has_slot, steps_down, superseded,
};
use crate::volume;
use crate::wire::listener::{Connections, ListenerConfig, Origin};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;

/// Time between two looks for clients that are provably dead.
const DEAD_LOOK: Duration = Duration::from_millis(250);
/// Time between two log lines about clients that can not be looked for.
const DEAD_LOOK_NOTICE: Duration = Duration::from_secs(10);
/// Time between two looks whether an earlier leader has stopped.
const LEADER_LOOK: Duration = Duration::from_millis(20);
/// Time between two looks for another leader, while earlier ones are fenced.
const REPLACED_LOOK: Duration = Duration::from_millis(100);

/// One server instance.
pub(super) struct Server {
    pub(super) env: Env,
    pub(super) config: ServerConfig,
    pub(super) store: Rc<Store>,
    pub(super) fences: Rc<Fences>,
    pub(super) peers: RefCell<Option<Rc<dyn Peers>>>,
    pub(super) locks: RefCell<LockServer>,
    pub(super) omap: RefCell<OmapServer>,
    pub(super) recovery: RefCell<Recovery>,
    /// Something is not awaited any more, or the server stops.
    pub(super) recovery_changed: Signal,
    /// Opens when all clients of the earlier server have recovered or are gone.
    pub(super) all_recovered: Door,
    pub(super) farewells: Farewells,
    /// Requests that the lock server or the open map will answer.
    pub(super) origins: RefCell<BTreeMap<(u64, u64), Origin>>,
    /// Clients with a session.
    pub(super) clients: RefCell<BTreeSet<u64>>,
    /// Mounts whose reclaim has begun, or is done: nothing of them is served.
    pub(super) departed: RefCell<BTreeSet<u64>>,
    /// Mounts that were fenced: they never come back.
    pub(super) fenced: RefCell<BTreeSet<u64>>,
    /// One reclaim at a time.
    pub(super) reclaiming: tokio::sync::Mutex<()>,
    /// Opens when the server is to stop.
    pub(super) stopping: Door,
    tasks: Cell<usize>,
    tasks_changed: Signal,
}

impl Server {
    /// A server over an open store, which waits for the clients in `mounted`.
    pub(super) fn new(
        env: &Env,
        config: ServerConfig,
        store: Rc<Store>,
        fences: Rc<Fences>,
        mounted: &[u64],
    ) -> Rc<Self> {
        let recovery = Recovery::prepare(mounted.iter().copied());
        let all_recovered = Door::default();
        if recovery.is_finished() {
            all_recovered.open();
        }
        Rc::new(Self {
            env: env.clone(),
            config,
            store,
            fences,
            peers: RefCell::default(),
            locks: RefCell::new(LockServer::recovering(mounted.iter().copied())),
            omap: RefCell::new(OmapServer::new(!recovery.is_finished())),
            recovery: RefCell::new(recovery),
            recovery_changed: Signal::default(),
            all_recovered,
            farewells: Farewells::default(),
            origins: RefCell::default(),
            clients: RefCell::default(),
            departed: RefCell::default(),
            fenced: RefCell::default(),
            reclaiming: tokio::sync::Mutex::new(()),
            stopping: Door::default(),
            tasks: Cell::new(0),
            tasks_changed: Signal::default(),
        })
    }

    /// The way to the clients; `None` before the start and after the end.
    pub(super) fn peers(&self) -> Option<Rc<dyn Peers>> {
        self.peers.borrow().clone()
    }

    /// Starts a task that the stop waits for.
    pub(super) fn spawn(
        self: &Rc<Self>,
        name: &'static str,
        task: impl Future<Output = ()> + 'static,
    ) {
        /// Counts down also when the task is dropped.
        struct Running(Rc<Server>);
        impl Drop for Running {
            fn drop(&mut self) {
                self.0.tasks.set(self.0.tasks.get() - 1);
                self.0.tasks_changed.wake_all();
            }
        }
        self.tasks.set(self.tasks.get() + 1);
        let running = Running(self.clone());
        self.env.spawn(name, async move {
            let _running = running;
            task.await;
        });
    }

    /// The server can not go on: it stops, and drops what is not committed.
    pub(super) fn fail(&self, err: ServerError) {
        if !matches!(err, ServerError::Stopping) {
            tracing::error!(%err, "the server stops");
        }
        self.store.fail(err);
    }

    /// Waits for `wait`; `None` if the server stops first.
    pub(super) async fn unless_stopping<T>(&self, wait: impl Future<Output = T>) -> Option<T> {
        match race(self.stopping.wait(), wait).await {
            Either::Left(()) => None,
            Either::Right(out) => Some(out),
        }
    }

    /// Starts what runs beside the requests.
    pub(super) fn start_tasks(self: &Rc<Self>) {
        let server = self.clone();
        self.store
            .set_sync_hook(Some(Rc::new(move |rid| server.ask_to_commit(rid))));
        for (name, task) in [
            (
                "server_recovery",
                Box::pin(self.clone().watch_recovery()) as crate::env::LocalBoxFuture<'static, ()>,
            ),
            ("server_reclaim", Box::pin(self.clone().reclaim_fenced())),
            ("server_farewell", Box::pin(self.clone().answer_farewells())),
            ("server_report", Box::pin(self.clone().report_when_asked())),
            ("server_absent", Box::pin(self.clone().look_for_dead())),
            (
                "server_merge_free",
                Box::pin(self.clone().free_merged_trees()),
            ),
        ] {
            self.spawn(name, task);
        }
    }

    /// After the recovery timeout everybody still awaited is fenced.
    async fn watch_recovery(self: Rc<Self>) {
        let clock = &*self.env.clock;
        let deadline = clock.now() + self.config.policy.recovery_timeout;
        let over = race(self.all_recovered.wait(), clock.sleep_until(deadline));
        if self.unless_stopping(over).await != Some(Either::Right(())) {
            return;
        }
        let late = self.recovery.borrow_mut().expire();
        // Who does not come is no longer waited for.
        self.farewells.kick();
        for rid in late {
            match self.store.mounted_addr(rid).await {
                Ok(Some(addr)) => {
                    let reason = FenceReason::ClientRecovery;
                    self.fences.start(FenceRequest { rid, addr, reason });
                }
                // Reclaimed just now; `gone` follows.
                Ok(None) if self.departed.borrow().contains(&rid) => {}
                Ok(None) => return self.fail(ServerError::NotMounted { rid }.fatal()),
                Err(err) => return self.fail(err.fatal()),
            }
        }
    }

    /// Has mounts that are away, and of which the agent can prove that they are gone,
    /// fenced and reclaimed at once: waiting for them to come back would only keep the
    /// others from their locks.
    async fn look_for_dead(self: Rc<Self>) {
        if !self.config.fence.can_prove() {
            return;
        }
        let mut notice = Notice::new(DEAD_LOOK_NOTICE);
        loop {
            let pause = self.env.sleep(DEAD_LOOK);
            if self.unless_stopping(pause).await.is_none() {
                return;
            }
            let mounted = match self.store.mounted().await {
                Ok(mounted) => mounted,
                // Not an empty list: nobody is known to be alive or dead. Who is awaited
                // is fenced after the usual time if this goes on.
                Err(err) => {
                    probe("server.absent.list_unreadable");
                    if let Some(more) = notice.admit(self.env.clock.now()) {
                        tracing::warn!(%err, more, "looking for mounts that are dead");
                    }
                    continue;
                }
            };
            for (rid, client) in mounted {
                let here = self.peers().is_none_or(|peers| peers.is_connected(rid));
                if here || self.departed.borrow().contains(&rid) || self.fences.contains(rid) {
                    continue;
                }
                if !self.config.fence.is_gone(rid) {
                    continue;
                }
                probe("server.fence.proved_gone");
                let nowhere = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
                let addr = client.addr.v4().unwrap_or(nowhere);
                let reason = match self.recovery.borrow().awaits(rid) {
                    true => FenceReason::ClientRecovery,
                    false => FenceReason::ClientReconnect,
                };
                self.fences.start(FenceRequest { rid, addr, reason });
            }
        }
    }

    /// Reclaims mounts as they are fenced. A failed fence stops the server.
    async fn reclaim_fenced(self: Rc<Self>) {
        while let Some((request, result)) = self.unless_stopping(self.fences.next_ended()).await {
            let rid = request.rid;
            if let Err(err) = result {
                probe("server.fence.failed");
                return self.fail(ServerError::from(err).fatal());
            }
            self.fenced.borrow_mut().insert(rid);
            if let Some(peers) = self.peers() {
                peers.drop_client(rid);
            }
            if let Err(err) = self.reclaim_dead(rid).await {
                return self.fail(err.fatal());
            }
            self.fences.remove(rid);
            // Farewells may have waited for it.
            self.farewells.kick();
        }
    }

    /// Takes back everything of a mount that was fenced, durably (spec 09 section 10).
    ///
    /// It may have written data in place that no commit of its own has flushed (spec 14
    /// section 20). Others read that as soon as they get its locks, and what they were
    /// shown once must not change again: so it is flushed before.
    async fn reclaim_dead(self: &Rc<Self>, rid: u64) -> Result<()> {
        self.store.flush_data().await?;
        self.reclaim_all(&[rid]).await
    }

    /// Takes back everything of mounts that said farewell or were fenced. Their items
    /// are deleted together, last: of a majority that leaves together nobody stays
    /// behind, whenever this server ends.
    pub(super) async fn reclaim_all(self: &Rc<Self>, rids: &[u64]) -> Result<()> {
        let _one = self.reclaiming.lock().await;
        self.departed.borrow_mut().extend(rids);
        for &rid in rids {
            tracing::info!(rid = format_args!("{rid:016x}"), "reclaiming");
            loop {
                self.forget_locks(rid);
                self.env.spawner.yield_point("server.reclaim").await;
                if self.store.reclaim_pass(rid).await? == super::Progress::Done {
                    break;
                }
                probe("server.reclaim.in_progress");
            }
        }
        self.store.delete_mounted(rids).await?;
        for &rid in rids {
            self.forget_locks(rid);
            let mut actions = Vec::new();
            self.omap.borrow_mut().remove_client(rid, &mut actions);
            self.send_omap(actions);
            let outcomes = self.recovery.borrow_mut().gone(rid);
            self.locks_told(rid);
            self.recovered(outcomes);
        }
        Ok(())
    }

    /// Frees blocks of merged log trees: those of an earlier server at once, then
    /// after each merge.
    async fn free_merged_trees(self: Rc<Self>) {
        loop {
            match self.store.free_merged().await {
                Ok(super::Progress::More) => continue,
                Ok(super::Progress::Done) => {}
                Err(err) if err.is_fatal() => return self.fail(err),
                Err(ServerError::Stopping) => return,
                Err(err) => {
                    // Nothing was changed: a failed commit. Try again later.
                    tracing::warn!(%err, "freeing merged log trees");
                    let pause = self.env.sleep(crate::env::Duration::from_secs(1));
                    if self.unless_stopping(pause).await.is_none() {
                        return;
                    }
                    continue;
                }
            }
            if self
                .unless_stopping(self.store.wait_merge_free())
                .await
                .is_none()
            {
                return;
            }
        }
    }

    /// The end, in order: nobody can reach us, every task has finished, nothing is
    /// written any more, all state is forgotten.
    pub(super) async fn stop(self: &Rc<Self>) {
        self.store.fail(ServerError::Stopping);
        self.store.set_sync_hook(None);
        let peers = self.peers.borrow_mut().take();
        if let Some(peers) = peers {
            peers.shutdown().await;
        }
        self.stopping.open();
        self.recovery_changed.wake_all();
        self.tasks_changed
            .wait_for(|| (self.tasks.get() == 0).then_some(()))
            .await;
        self.store.close().await;
        self.fences.clear();
        self.origins.borrow_mut().clear();
    }
}

/// Fences every earlier leader that may still write (spec 09 section 9.2).
pub(super) async fn fence_leaders(
    env: &Env,
    config: &ServerConfig,
    fences: &Rc<Fences>,
) -> Result<()> {
    let meta = env.devices.open(DeviceRole::Meta)?;
    // Only for the slots, which never change while anybody is mounted.
    let sup = read_super(env, &*meta, config.fsid).await?;
    let slots = Slots::of(&sup.qconf);
    let leaders = leaders_to_fence(env, config, &*meta, &slots).await?;
    for leader in leaders {
        let addr = slots
            .addr(leader.slot)
            .expect("candidates come from present slots");
        let reason = FenceReason::QuorumBlockLeader;
        fences.start(FenceRequest {
            rid: leader.rid,
            addr,
            reason,
        });
    }
    // Mutant: breaks spec 09 section 9.2, nothing is written before that.
    if mutant("leader_fence_not_awaited") {
        return Ok(());
    }
    let fenced = fences.wait_all(config.policy.leader_fence_timeout);
    match race(fenced, wait_replaced(env, config, &*meta, &slots)).await {
        Either::Left(fenced) => Ok(fenced?),
        Either::Right(error) => Err(error),
    }
}

/// Completes when another leader shows for whom this one is to stop: of a greater term,
/// or of the same and with the better right. It may have recorded its election after this
/// one looked, and waits.
async fn wait_replaced(
    env: &Env,
    config: &ServerConfig,
    meta: &dyn crate::env::BlockDevice,
    slots: &Slots,
) -> ServerError {
    loop {
        env.sleep(REPLACED_LOOK).await;
        // What can not be read says nothing.
        if let Ok(blocks) = read_blocks(config, meta, slots).await
            && let Err(error) = check_not_replaced(config, slots, &blocks)
        {
            return error;
        }
    }
}

async fn read_blocks(
    config: &ServerConfig,
    meta: &dyn crate::env::BlockDevice,
    slots: &Slots,
) -> Result<Vec<(usize, QuorumBlock)>> {
    let mut blocks = Vec::new();
    for (slot, _) in slots.iter() {
        let block = volume::read_quorum_block(meta, config.fsid, slot).await?;
        blocks.push((slot, block));
    }
    Ok(blocks)
}

/// An error if another leader has the better right to serve.
fn check_not_replaced(
    config: &ServerConfig,
    slots: &Slots,
    blocks: &[(usize, QuorumBlock)],
) -> Result<()> {
    let term = config.term;
    if superseded(term, blocks.iter().map(|(_, block)| block)) {
        probe("server.fence.superseded");
        return Err(ServerError::Superseded { term });
    }
    let own_slot = slots.iter().find(|(_, addr)| *addr == config.addr);
    let by_slot = blocks.iter().map(|(slot, block)| (*slot, block));
    let gone = |rid| config.fence.is_gone(rid);
    if own_slot.is_some_and(|(slot, _)| gives_way(term, slot, by_slot, gone)) {
        probe("server.fence.gives_way");
        return Err(ServerError::GivesWay { term });
    }
    Ok(())
}

/// The earlier leaders that must be fenced. One that lives and was only outvoted, by a
/// member that was cut off and came back with a greater term, learns of it by a
/// message and stops by itself within moments: it gets these moments. What shows
/// that it knows is its own block, not a message, so it does not matter who hears whom.
/// One of the same term learns of us from our block, and gives way.
async fn leaders_to_fence(
    env: &Env,
    config: &ServerConfig,
    meta: &dyn crate::env::BlockDevice,
    slots: &Slots,
) -> Result<Vec<LeaderCandidate>> {
    let began = env.clock.now();
    loop {
        let blocks = read_blocks(config, meta, slots).await?;
        check_not_replaced(config, slots, &blocks)?;
        let by_slot = blocks.iter().map(|(slot, block)| (*slot, block));
        let leaders = fence_candidates(config.term, config.rid, by_slot);
        let waited = env.clock.now().since(began);
        let may_stop = |leader: &LeaderCandidate| {
            let block = blocks.iter().find(|(slot, _)| *slot == leader.slot);
            let (_, block) = block.expect("a candidate's block was read");
            let knows = steps_down(leader, block) || leader.term == config.term;
            let patience = match knows {
                true => config.policy.leader_stop_patience,
                false => config.policy.leader_grace,
            };
            has_slot(leader, block) && waited < patience && !config.fence.is_gone(leader.rid)
        };
        if !leaders.iter().any(may_stop) {
            return Ok(leaders);
        }
        probe("server.fence.leader_may_stop");
        env.sleep(LEADER_LOOK).await;
    }
}

async fn read_super(
    env: &Env,
    meta: &dyn crate::env::BlockDevice,
    fsid: u64,
) -> Result<SuperBlock> {
    let clock = &*env.clock;
    Ok(volume::read_super_retrying(meta, DeviceRole::Meta, Some(fsid), clock).await?)
}

/// Whether another leader came after `term`. Its ELECT event is durable before its
/// server fences anybody or touches anything.
///
/// # Errors
/// If the quorum blocks can not be read.
pub async fn is_replaced(env: &Env, fsid: u64, term: u64) -> Result<bool> {
    let meta = env.devices.open(DeviceRole::Meta)?;
    let sup = read_super(env, &*meta, fsid).await?;
    for (slot, _) in Slots::of(&sup.qconf).iter() {
        let block = volume::read_quorum_block(&*meta, fsid, slot).await?;
        if block.event(QuorumEventKind::Elect).term.get() > term {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Keeps a server that was paused and replaced meanwhile from writing.
fn guard(env: &Env, config: &ServerConfig) -> Rc<WriteGuard> {
    let guard = WriteGuard::new(env, config.policy.write_check);
    let (env, fsid, term) = (env.clone(), config.fsid, config.term);
    guard.set_look(Rc::new(move || {
        let env = env.clone();
        Box::pin(async move {
            match is_replaced(&env, fsid, term).await {
                Ok(true) => Ok(Standing::Lost),
                Ok(false) => Ok(Standing::Good),
                Err(error) => Err(error.to_string()),
            }
        })
    }));
    guard
}

/// The start, in order (spec 09 section 6). Only reads, so it may be dropped.
async fn start(
    env: &Env,
    guard: &Rc<WriteGuard>,
    config: &ServerConfig,
    fences: &Rc<Fences>,
    handle: &Handle,
) -> Result<(Rc<Server>, Box<dyn Listener>)> {
    fence_leaders(env, config, fences).await?;
    handle.set(Status::Fenced);
    handle.may_serve().await;
    let listener = env.net.listen(config.addr).await?;
    let block_policy = Rc::new(config.block_policy.clone());
    let guarded = guard.env();
    let store = Store::open(&guarded, config.policy.clone(), block_policy, config.fsid).await?;
    let mounted: Vec<u64> = store
        .mounted()
        .await?
        .into_iter()
        .map(|(rid, _)| rid)
        .collect();
    let server = Server::new(env, config.clone(), store, fences.clone(), &mounted);
    Ok((server, listener))
}

/// The whole life of one server instance (spec 09 section 6). Returns when the
/// server is down: nothing of it can write any more.
pub async fn run(env: Env, config: ServerConfig, handle: Handle) {
    handle.set(Status::Starting);
    let (term, rid) = (config.term, config.rid);
    tracing::info!(term, rid = format_args!("{rid:016x}"), "server starts");
    let fences = Fences::new(&env, config.fence.clone(), config.policy.fence_timeout);
    let guard = guard(&env, &config);
    let starting = start(&env, &guard, &config, &fences, &handle);
    match race(handle.stop_asked(), starting).await {
        Either::Right(Ok((server, listener))) => serve(&server, &guard, listener, &handle).await,
        Either::Right(Err(err)) => {
            probe("server.start_failed");
            tracing::error!(%err, "the server could not start");
        }
        Either::Left(()) => probe("server.stopped_while_starting"),
    }
    handle.set(Status::Stopping);
    fences.clear();
    guard.shut();
    config.reports.clear();
    tracing::info!(term, "server is down");
    handle.set(Status::Down);
}

async fn serve(
    server: &Rc<Server>,
    guard: &Rc<WriteGuard>,
    listener: Box<dyn Listener>,
    handle: &Handle,
) {
    /// Connections own the server that owns them: breaks the circle, also when
    /// the actor is dropped.
    struct Forget<'a>(&'a Server);
    impl Drop for Forget<'_> {
        fn drop(&mut self) {
            self.0.store.set_sync_hook(None);
            let peers = self.0.peers.borrow_mut().take();
            drop(peers);
        }
    }
    let _forget = Forget(server);
    let sup = server.store.stable();
    let policy = &server.config.policy;
    let mut config =
        ListenerConfig::new(server.config.fsid, sup.fmt_vers.get(), server.config.term);
    config.reconnect_timeout = policy.reconnect_timeout;
    let hooks = Rc::new(Hooks(server.clone()));
    let connections = Connections::start(&server.env, listener, config, hooks);
    *server.peers.borrow_mut() = Some(Rc::new(connections));
    server.start_tasks();
    handle.set(Status::Up);
    probe("server.up");
    let failed = race(guard.lost(), server.store.wait_failed());
    match race(handle.stop_asked(), failed).await {
        Either::Left(()) => {}
        Either::Right(Either::Left(())) => {
            probe("server.replaced");
            tracing::error!("another leader came after this one: it stops without a word more");
        }
        Either::Right(Either::Right(err)) => tracing::error!(%err, "the server stops by itself"),
    }
    handle.set(Status::Stopping);
    server.stop().await;
}

//! One mount, assembled: devices and super blocks, quorum agent, client, locks,
//! log, filesystem; in the order of spec 08 section 11, and taken down in the
//! reverse one.
//!
//! ```text
//!  quorum actor ──starts──▶ server actor          (own threads, own device handles)
//!        ▲ handle                 ▲ wire protocol
//!        └────────── mount actor ─┘
//!            Client ─ Locks ─ Log ─ Fs
//! ```
//!
//! What can go wrong: an order that strands somebody. The farewell needs this
//! mount's own server, so the agent ends after it; an inode deleted at unmount
//! needs locks, transactions and the server, so the filesystem ends first.

mod glue;

use crate::block::{self, Cache};
use crate::client::{Client, ClientConfig};
use crate::env::{
    BlockDevice, DeviceError, DeviceRole, Duration, Either, Env, Gate, mutant, probe, race, timeout,
};
use crate::errno::Errno;
use crate::format::SuperBlock;
use crate::fs::api::KernelCache;
use crate::fs::{self, Fs, FsError};
use crate::guard::{Standing, WriteGuard};
use crate::locks::{self, LockError, Locks, Mode};
use crate::log::merge_worker::MergeWorker;
use crate::log::{self, Log, LogError};
use crate::quorum::{self, AgentConfig, AgentError, AgentHandle, AgentStop, ConfigError, Slots};
use crate::secure::{ClusterKey, secured};
use crate::server::{self, FenceAgent, LastingAgent};
use crate::volume::{MountSupers, VolumeError, check_key, read_mount_supers};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use thiserror::Error;

/// How long writes in flight are waited for when the mount is lost.
const IN_FLIGHT_PATIENCE: Duration = Duration::from_secs(10);

/// How long the kernel may take to forget.
const FORGET_PATIENCE: Duration = Duration::from_secs(2);

/// The root directory.
const ROOT: u64 = 1;

/// Everything a mount is told: options of spec 17 section 2 and FREE choices.
#[derive(Clone)]
pub struct NodeConfig {
    /// Quorum member in this slot; `None` is a plain client.
    pub quorum_slot: Option<usize>,
    /// `quorum_heartbeat_timeout_ms`.
    pub heartbeat_timeout: Duration,
    /// `tcp_keepalive_timeout_ms`.
    pub keepalive: Duration,
    /// Who makes dead mounts really dead, should this mount become leader.
    pub fence: Arc<dyn FenceAgent>,
    /// Block cache, btrees and allocators.
    pub block: block::Policy,
    /// Item cache and transactions.
    pub log: log::Policy,
    /// Pause of the merge worker after a round without work.
    pub merge_pause: Duration,
    /// Lock client.
    pub locks: locks::Policy,
    /// Filesystem and file data.
    pub fs: fs::Policy,
    /// Election times.
    pub quorum: quorum::Policy,
    /// Server.
    pub server: server::Policy,
    /// How long this mount may be without a server before it gives up, as if the cluster
    /// had declared it dead; `None` waits for ever, as the original does. Longer than a
    /// cluster with fence agents that work needs to elect a leader, to fence who is
    /// missing and to recover: who is out of touch for longer is not missed any more, or
    /// there is no cluster, and its users are to learn of it.
    pub out_of_touch: Option<Duration>,
    /// The volume's cluster key; `None` trusts the network.
    pub cluster_key: Option<ClusterKey>,
}

impl NodeConfig {
    /// Production defaults.
    pub fn new(quorum_slot: Option<usize>, fence: Arc<dyn FenceAgent>) -> Self {
        Self {
            quorum_slot,
            heartbeat_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(24),
            fence,
            block: block::Policy::default(),
            log: log::Policy::default(),
            merge_pause: Duration::from_secs(5),
            locks: locks::Policy::default(),
            fs: fs::Policy::default(),
            quorum: quorum::Policy::default(),
            server: server::Policy::default(),
            out_of_touch: Some(Duration::from_secs(300)),
            cluster_key: None,
        }
    }
}

impl NodeConfig {
    /// How long a look at the volume is good for before a write: long before anybody
    /// could have declared this mount dead.
    fn write_check(&self) -> Duration {
        self.server.write_check.min(self.heartbeat_timeout / 2)
    }
}

/// Why a mount failed.
#[derive(Debug, Error)]
pub enum MountError {
    /// The super blocks do not fit together, or cannot be read.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A device could not be opened.
    #[error("the {role:?} device: {source}")]
    Device {
        /// Which.
        role: DeviceRole,
        /// What the system said.
        source: DeviceError,
    },
    /// The quorum configuration does not allow this slot.
    #[error(transparent)]
    Slots(#[from] ConfigError),
    /// The quorum agent could not take part.
    #[error("quorum: {0}")]
    Quorum(Arc<AgentError>),
    /// The first transaction could not be opened.
    #[error("opening the first transaction: {0}")]
    Log(#[from] LogError),
    /// The root directory could not be read.
    #[error("reading the root directory: {0}")]
    Root(#[from] FsError),
    /// The mount was told to give up while it waited.
    #[error("the mount was given up while it waited")]
    GivenUp,
}

impl MountError {
    /// The number that mount(2) would give.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Volume(error) => error.mount_errno(),
            Self::Slots(_) => Errno::EINVAL,
            Self::Device { .. } | Self::Quorum(_) => Errno::EIO,
            Self::Log(error) => error.clone().into(),
            Self::Root(error) => error.errno(),
            Self::GivenUp => Errno::EINTR,
        }
    }
}

/// Why an unmount was not clean.
#[derive(Clone, Debug, Error)]
pub enum UnmountError {
    /// The last commit did not succeed.
    #[error("the last commit failed, what was not synced is lost: {0}")]
    Lost(LogError),
    /// Everything is committed, but this mount could not tell that it left.
    #[error("everything is committed, but the quorum slot is still marked as in use: {0}")]
    Quorum(Arc<AgentError>),
}

impl UnmountError {
    /// The number that a program would give.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Lost(error) => error.clone().into(),
            Self::Quorum(_) => Errno::EIO,
        }
    }
}

/// A running mount. Lives on the mount actor's thread.
pub struct Mount {
    env: Env,
    rid: u64,
    supers: MountSupers,
    agent: Option<AgentHandle>,
    client: Client,
    locks: Locks,
    log: Rc<Log>,
    fs: Rc<Fs>,
    blocks: Rc<Cache>,
    merge_pause: Duration,
    merges: RefCell<Option<Rc<MergeWorker>>>,
    /// Opened when the mount can not go on by itself: it was fenced or evicted.
    evicted: Gate,
    guard: Rc<WriteGuard>,
    reports: server::ReportBoard,
    write_check: Duration,
    out_of_touch: Option<Duration>,
}

impl Mount {
    /// Mounts the volume on `env.devices` as `rid`. Waits as long as it takes to find a server
    /// and to be admitted; opening `give_up` ends the wait as a forced unmount.
    ///
    /// # Errors
    /// As [`MountError`]; nothing is left running.
    pub async fn start(
        env: &Env,
        rid: u64,
        config: NodeConfig,
        kernel: Rc<dyn KernelCache>,
        give_up: &Gate,
    ) -> Result<Rc<Mount>, MountError> {
        let env = &secured(env, config.cluster_key.as_ref());
        let guard = WriteGuard::new(env, config.write_check());
        let guarded = guard.env();
        let meta = open(&guarded, DeviceRole::Meta)?;
        let data = open(&guarded, DeviceRole::Data)?;
        let supers = read_mount_supers(&*meta, &*data, &*env.clock).await?;
        check_key(
            &*meta,
            supers.meta.hdr.fsid.get(),
            config.cluster_key.as_ref(),
        )
        .await?;
        let reports = server::ReportBoard::default();
        let agent = start_agent(env, rid, &config, &supers.meta, &reports).await?;
        let parts = (agent, reports);
        let mount = Mount::assemble(&guard, rid, config, supers, parts, (meta, data), kernel);
        let started = match crate::env::race(mount.begin(), give_up.wait()).await {
            crate::env::Either::Left(result) => result,
            crate::env::Either::Right(()) => Err(MountError::GivenUp),
        };
        match started {
            Ok(()) => Ok(mount),
            Err(error) => {
                probe("node.mount_failed");
                mount.force_unmount().await;
                Err(error)
            }
        }
    }

    fn assemble(
        guard: &Rc<WriteGuard>,
        rid: u64,
        config: NodeConfig,
        supers: MountSupers,
        (agent, reports): (Option<AgentHandle>, server::ReportBoard),
        (meta, data): (Rc<dyn BlockDevice>, Rc<dyn BlockDevice>),
        kernel: Rc<dyn KernelCache>,
    ) -> Rc<Mount> {
        let env = &guard.env();
        let fsid = supers.meta.hdr.fsid.get();
        let fmt_vers = supers.meta.fmt_vers.get();
        let limit = config.write_check();
        let client_config = ClientConfig {
            keepalive: config.keepalive,
            ..ClientConfig::new(rid, fsid, fmt_vers, agent.is_some())
        };
        let client = Client::new(env, meta.clone(), client_config);
        guard.set_look(glue::standing(&client, limit));
        let requests = Rc::new(glue::Requests {
            client: client.clone(),
        });
        let locks = Locks::new(env.clone(), config.locks, requests.clone());
        let blocks = Cache::new(meta, env.entropy.clone(), fsid, Rc::new(config.block));
        let total_data_blocks = supers.meta.total_data_blocks.get();
        let log = Rc::new(Log::new(
            env.clone(),
            blocks.clone(),
            data.clone(),
            total_data_blocks,
            config.log,
            requests.clone(),
        ));
        let fs = Fs::new(
            env.clone(),
            log.clone(),
            locks.clone(),
            requests,
            kernel,
            data,
            fs::Config {
                fmt_vers,
                policy: config.fs,
            },
        );
        locks.set_hooks(Rc::new(glue::Hooks {
            log: log.clone(),
            fs: fs.clone(),
        }));
        log.register_dirty_data(Rc::new(fs.data.clone()));
        Rc::new(Mount {
            env: env.clone(),
            rid,
            supers,
            agent,
            client,
            locks,
            log,
            fs,
            blocks,
            merge_pause: config.merge_pause,
            merges: RefCell::new(None),
            evicted: Gate::default(),
            guard: guard.clone(),
            reports,
            write_check: limit,
            out_of_touch: config.out_of_touch,
        })
    }

    /// Connects, reads the root, opens the first transaction, starts the
    /// background work.
    async fn begin(self: &Rc<Self>) -> Result<(), MountError> {
        self.client.start(Rc::new(glue::Messages {
            locks: self.locks.clone(),
            log: self.log.clone(),
            fs: self.fs.clone(),
        }));
        let locked = self.fs.lock_inodes(&[ROOT], Mode::Read).await?;
        self.fs.load(&locked, ROOT).await?;
        drop(locked);
        self.log.start();
        self.log.opened().await?;
        self.fs.start();
        let requests = Rc::new(glue::Requests {
            client: self.client.clone(),
        });
        let worker = MergeWorker::start(&self.env, self.blocks.clone(), requests, self.merge_pause);
        *self.merges.borrow_mut() = Some(worker);
        let (client, evicted) = (self.client.clone(), self.evicted.clone());
        let (env, guard) = (self.env.clone(), self.guard.clone());
        let out_of_touch = self.out_of_touch;
        self.env.spawn("evicted", async move {
            let declared_dead = race(client.evicted(), guard.lost());
            let why = race(declared_dead, too_long_alone(&env, &client, out_of_touch)).await;
            let alone = matches!(why, Either::Right(()));
            if alone {
                probe("node.out_of_touch");
                tracing::error!("no server was reached for too long");
            } else {
                guard.shut();
            }
            // Of one that is alone nobody has given anything away yet, and it writes nothing
            // new (`guard`): what is in flight ends before its users get errors.
            let deadline = env.clock.now() + IN_FLIGHT_PATIENCE;
            if timeout(&*env.clock, deadline, guard.idle()).await.is_none() {
                tracing::error!("a device does not end the writes it was given");
            }
            if !alone {
                tracing::error!("this mount was declared dead by its cluster");
            }
            tracing::error!("this mount gives up");
            evicted.open();
            guard.shut();
        });
        Ok(())
    }

    /// Clean unmount (spec 08 section 11): deletes what is unlinked and no longer
    /// open, commits, says farewell, ends the quorum agent. The caller has stopped
    /// sending requests.
    ///
    /// # Errors
    /// As [`UnmountError`]: the mount has ended, but the cluster may have to fence it.
    pub async fn unmount(&self) -> Result<(), UnmountError> {
        self.fs.stop();
        while !self.fs.is_idle() {
            self.env.sleep(Duration::from_millis(1)).await;
        }
        let worker = self.merges.borrow_mut().take();
        if let Some(worker) = worker {
            worker.stop().await;
        }
        // Mutant: breaks the order of spec 08 section 11, commit before farewell.
        if mutant("farewell_before_commit") {
            self.client.farewell().await;
        }
        // Before the locks stop: until all is committed an invalidation still waits
        // for the commit of what it gives away.
        let committed = self.log.shutdown().await;
        self.locks.stop(LockError::Shutdown);
        self.client.farewell().await;
        self.guard.shut();
        self.client.sever();
        self.log.sever();
        let left = match &self.agent {
            Some(agent) => {
                agent.stop(AgentStop::Unmount);
                agent.ended().await
            }
            None => Ok(()),
        };
        committed.map_err(UnmountError::Lost)?;
        left.map_err(UnmountError::Quorum)
    }

    /// Forced unmount: nothing more is sent or begun; what was not committed is
    /// lost. Writes already handed to a device may still end: the mount counts as
    /// gone when its device handles are closed, which the `local` fence agent asks for.
    pub async fn force_unmount(&self) {
        probe("node.force_unmount");
        self.guard.shut();
        self.log.sever();
        self.client.sever();
        self.locks.stop(LockError::Severed);
        self.fs.stop();
        self.fs.data.abandon();
        if let Some(agent) = &self.agent {
            agent.stop(AgentStop::Forced);
            // It wrote nothing and promised nothing: how it ended changes nothing.
            let _ = agent.ended().await;
        }
    }

    /// The filesystem, for the FUSE front or the simulator's kernel model.
    pub fn fs(&self) -> &Rc<Fs> {
        &self.fs
    }

    /// The log, for `sync` and for checks.
    pub fn log(&self) -> &Rc<Log> {
        &self.log
    }

    /// The cache of metadata blocks, for status.
    pub fn blocks(&self) -> &Rc<Cache> {
        &self.blocks
    }

    /// The locks, for status and for checks.
    pub fn locks(&self) -> &Locks {
        &self.locks
    }

    /// Completes when the cluster declared this mount dead, or could not be reached for too
    /// long: the caller forces the unmount.
    pub async fn evicted(&self) {
        self.evicted.wait().await;
    }

    /// Whether [`Mount::evicted`] has completed.
    pub fn is_evicted(&self) -> bool {
        self.evicted.is_open()
    }

    /// Id of this mount.
    pub fn rid(&self) -> u64 {
        self.rid
    }

    /// The super blocks as read at mount.
    pub fn supers(&self) -> &MountSupers {
        &self.supers
    }

    /// Changes the option `quorum_heartbeat_timeout_ms`; nothing for plain clients.
    pub fn set_heartbeat_timeout(&self, timeout: Duration) {
        if let Some(agent) = &self.agent {
            agent.set_heartbeat_timeout(timeout);
        }
    }

    /// The client, for status.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The server's reports, should it run in this mount.
    pub fn reports(&self) -> &server::ReportBoard {
        &self.reports
    }

    /// Whether this mount, and its server if it leads, can show at this moment that
    /// they may write: the volume says so, and says so now. What it learns on the way
    /// counts: a mount that is lost stops writing.
    pub async fn may_write(&self) -> bool {
        let began = self.env.clock.now();
        if self.guard.look_now().await != Ok(Standing::Good) {
            return false;
        }
        if let Some(term) = self.leads_in() {
            let fsid = self.supers.meta.hdr.fsid.get();
            match server::is_replaced(&self.env, fsid, term).await {
                Ok(false) => {}
                // A later leader, or nobody knows.
                Ok(true) | Err(_) => return false,
            }
        }
        // The looks may have taken long, or this mount was stopped meanwhile.
        !self.guard.is_shut() && self.env.clock.now().since(began) <= self.write_check
    }

    /// The term in which this mount leads, or still serves.
    fn leads_in(&self) -> Option<u64> {
        let term = self.agent.as_ref()?.status().member.server_start_term;
        (term != 0).then_some(term)
    }

    /// Ends the right to write and has the mount forced to end, as when the cluster
    /// declared it dead.
    pub fn give_up(&self) {
        self.guard.shut();
        self.evicted.open();
    }

    /// Whether no write of this mount is in flight.
    pub fn is_quiet(&self) -> bool {
        self.guard.is_idle()
    }

    /// Makes the kernel forget everything: nothing of it is true for long when this
    /// mount is lost. Waits at most as long as a stuck page may take.
    pub async fn forget_kernel_caches(&self) {
        let deadline = self.env.clock.now() + FORGET_PATIENCE;
        let forgotten = self.fs.forget_everything();
        if timeout(&*self.env.clock, deadline, forgotten)
            .await
            .is_none()
        {
            tracing::warn!("the kernel does not give up pages of a lost mount");
        }
    }

    /// The quorum agent's status, of members.
    pub fn quorum_status(&self) -> Option<quorum::AgentStatus> {
        self.agent.as_ref().map(AgentHandle::status)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.locks.clear_hooks();
        // Its look at the volume has parts of the mount, which have the guard.
        self.guard.shut();
    }
}

/// Completes when the client has been without a server for that long; noticed within half
/// as much again. Never without a limit.
///
/// A mount that is cut off has stopped writing long before: its look at the volume says
/// that nobody knows (`guard`), so nothing of it lands late. What this ends is the
/// waiting of its users, if no agent ever fences it: they get EIO.
async fn too_long_alone(env: &Env, client: &Client, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    loop {
        match client.detached_for() {
            Some(alone) if alone >= limit => return,
            Some(alone) => env.sleep(limit - alone).await,
            None => env.sleep(limit / 2).await,
        }
    }
}

fn open(env: &Env, role: DeviceRole) -> Result<Rc<dyn BlockDevice>, MountError> {
    env.devices
        .open(role)
        .map_err(|source| MountError::Device { role, source })
}

async fn start_agent(
    env: &Env,
    rid: u64,
    config: &NodeConfig,
    meta: &SuperBlock,
    reports: &server::ReportBoard,
) -> Result<Option<AgentHandle>, MountError> {
    let Some(slot) = config.quorum_slot else {
        return Ok(None);
    };
    let slots = Slots::checked(&meta.qconf, slot)?;
    let addr = slots.addr(slot).expect("a checked own slot is present");
    let fsid = meta.hdr.fsid.get();
    let server = server::Policy {
        write_check: config.write_check(),
        ..config.server.clone()
    };
    let block = config.block.clone();
    let (fence, cluster_key) = (config.fence.clone(), config.cluster_key.clone());
    let reports = reports.clone();
    let agent_config = AgentConfig {
        fsid,
        rid,
        slot,
        slots,
        policy: config.quorum,
        cluster_key: config.cluster_key.clone(),
    };
    let make = Box::new(move |env: &Env| -> Rc<dyn quorum::ServerStarter> {
        let fence = LastingAgent::new(env, fence, server.fence_timeout);
        Rc::new(glue::Starter {
            fsid,
            rid,
            addr,
            policy: server,
            block,
            fence,
            cluster_key,
            reports,
        })
    });
    let agent = AgentHandle::spawn(env, agent_config, config.heartbeat_timeout, make);
    agent.started().await.map_err(MountError::Quorum)?;
    Ok(Some(agent))
}

#[cfg(test)]
mod golden_tests;

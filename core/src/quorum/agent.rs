//! The quorum agent: an actor of its own that carries the brain's messages,
//! writes its events and starts and stops the server (spec 09 section 5).
//!
//! What can go wrong: a leader that falls silent because it waits. The loop never
//! waits for the server; it waits for the device only where an event must be
//! durable before the next effect. And a server that outlives its agent: whatever
//! ends the service, the server is stopped and waited for first.
//!
//! A member whose own block could not be written steps out: its server is stopped
//! and the others elect another leader. It does not stay out as the original's
//! does, for then one I/O error would end the only member's service, and with it
//! the volume's, until somebody unmounts: it takes part again as soon as it can
//! record that its server stopped. A slot that another mount uses is left for good.

use super::block::{BlockIo, QuorumBlockError};
use super::brain::{Brain, Effect, Input, Message, MessageKind, Policy, ServerPhase, Status};
use super::config::Slots;
use super::leaders::stop_would_hide;
use super::leaders::unresolved;
use crate::env::watch;
use crate::env::{
    Datagram, DeviceError, DeviceRole, Duration, Either, Env, LocalBoxFuture, NetError, probe, race,
};
use crate::format::QuorumEventKind;
use crate::secure::{ClusterKey, secured};
use bytes::Bytes;
use std::rc::Rc;
use std::sync::Arc;
use thiserror::Error;

/// One run of the own server.
pub trait ServerInstance {
    /// Where it is. `Down` only when it can not write any more.
    fn phase(&self) -> ServerPhase;
    /// Tells it that FENCE is recorded: from now on it may write.
    fn may_serve(&self);
    /// Asks it to stop; does not wait. Asking again does nothing.
    fn stop(&self);
    /// Completes when the phase differs from the last one seen here; never again
    /// after `Down`. Cancel safe.
    fn changed(&mut self) -> LocalBoxFuture<'_, ()>;
}

/// Starts the own server.
pub trait ServerStarter {
    /// Starts it for `term`, as an actor of its own; returns at once.
    fn start(&self, env: &Env, term: u64) -> Box<dyn ServerInstance>;
}

/// Makes the starter on the agent's own thread.
pub type MakeStarter = Box<dyn FnOnce(&Env) -> Rc<dyn ServerStarter> + Send>;

/// A member. Crosses to the agent's thread.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Volume id.
    pub fsid: u64,
    /// The mount.
    pub rid: u64,
    /// Own slot.
    pub slot: usize,
    /// All slots, checked.
    pub slots: Slots,
    /// Times of the election.
    pub policy: Policy,
    /// Cluster key, for the actor's own network.
    pub cluster_key: Option<ClusterKey>,
}

/// Whether the agent is to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentStop {
    /// Go on.
    Run,
    /// Unmount: stop the server, record STOP and END.
    Unmount,
    /// Forced unmount: stop the server; send and write nothing.
    Forced,
}

/// Why the quorum service of this mount ended.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AgentError {
    /// The slot's address could not be bound: the mount fails.
    #[error("quorum slot {slot}: {error}")]
    Bind {
        /// Own slot.
        slot: usize,
        /// What the system said.
        error: NetError,
    },
    /// The metadata device could not be opened.
    #[error("metadata device: {0}")]
    Open(DeviceError),
    /// An event could not be recorded.
    #[error(transparent)]
    Block(#[from] QuorumBlockError),
    /// The datagram socket failed.
    #[error("receiving quorum messages: {0}")]
    Receive(NetError),
}

impl AgentError {
    /// Whether the member may take part again when what failed works.
    fn may_pass(&self) -> bool {
        match self {
            Self::Block(QuorumBlockError::Device { error, .. }) => *error != DeviceError::Shut,
            Self::Block(QuorumBlockError::ForeignRid { .. }) => false,
            Self::Block(_) | Self::Receive(_) => true,
            Self::Bind { .. } | Self::Open(_) => false,
        }
    }
}

/// How far the agent is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AgentPhase {
    /// Binding, reading the blocks, writing BEGIN.
    #[default]
    Starting,
    /// Taking part.
    Running,
    /// Ended, cleanly or with an error; its server can not write any more.
    Ended(Result<(), Arc<AgentError>>),
}

/// What the agent publishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentStatus {
    /// How far it is.
    pub phase: AgentPhase,
    /// The member's state as of the last turn.
    pub member: Status,
}

/// The mount's hold on its agent. Crosses threads.
#[derive(Clone, Debug)]
pub struct AgentHandle {
    stop: Arc<watch::Sender<AgentStop>>,
    heartbeat_timeout: Arc<watch::Sender<Duration>>,
    status: watch::Receiver<AgentStatus>,
}

impl AgentHandle {
    /// Starts the agent as an actor of its own.
    pub fn spawn(
        env: &Env,
        config: AgentConfig,
        heartbeat_timeout: Duration,
        starter: MakeStarter,
    ) -> AgentHandle {
        let (stop_tx, stop) = watch::channel(AgentStop::Run);
        let (heartbeat_tx, heartbeat_timeout) = watch::channel(heartbeat_timeout);
        let (status_tx, status) = watch::channel(AgentStatus::default());
        let main = move |env: Env| -> LocalBoxFuture<'static, ()> {
            Box::pin(async move {
                let env = secured(&env, config.cluster_key.as_ref());
                let starter = starter(&env);
                let inputs = Inputs {
                    stop,
                    heartbeat_timeout,
                };
                let result = run(&env, config, starter, inputs, &status_tx).await;
                if let Err(error) = &result {
                    tracing::error!(%error, "the quorum service of this mount ended");
                }
                let phase = AgentPhase::Ended(result.map_err(Arc::new));
                status_tx.send_modify(|status| status.phase = phase);
            })
        };
        env.spawner.spawn_actor("quorum", Box::new(main));
        AgentHandle {
            stop: Arc::new(stop_tx),
            heartbeat_timeout: Arc::new(heartbeat_tx),
            status,
        }
    }

    /// The latest status.
    pub fn status(&self) -> AgentStatus {
        self.status.borrow().clone()
    }

    /// Waits until the agent takes part.
    ///
    /// # Errors
    /// If it ended before that: the mount fails.
    pub async fn started(&self) -> Result<(), Arc<AgentError>> {
        let mut status = self.status.clone();
        let seen = status.wait_for(|s| s.phase != AgentPhase::Starting).await;
        match &seen {
            Ok(AgentStatus {
                phase: AgentPhase::Ended(Err(error)),
                ..
            }) => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// Waits until the agent has ended; an agent whose thread is gone has.
    ///
    /// # Errors
    /// Why it did not end cleanly: its block shows a member that still runs.
    pub async fn ended(&self) -> Result<(), Arc<AgentError>> {
        let mut status = self.status.clone();
        let ended = status.wait_for(|s| matches!(s.phase, AgentPhase::Ended(_)));
        match &ended.await {
            Ok(AgentStatus {
                phase: AgentPhase::Ended(result),
                ..
            }) => result.clone(),
            _ => Ok(()),
        }
    }

    /// Tells the agent to end; [`AgentHandle::ended`] waits for it.
    pub fn stop(&self, how: AgentStop) {
        self.stop.send_replace(how);
    }

    /// Changes the option quorum_heartbeat_timeout_ms.
    pub fn set_heartbeat_timeout(&self, timeout: Duration) {
        self.heartbeat_timeout.send_replace(timeout);
    }
}

/// What the mount tells its agent.
#[derive(Debug)]
pub struct Inputs {
    /// Whether to go on.
    pub stop: watch::Receiver<AgentStop>,
    /// Option quorum_heartbeat_timeout_ms.
    pub heartbeat_timeout: watch::Receiver<Duration>,
}

/// The whole life of an agent. When this returns, its server can not write any more.
///
/// # Errors
/// Why the service ended before it was asked to.
pub async fn run(
    env: &Env,
    config: AgentConfig,
    starter: Rc<dyn ServerStarter>,
    inputs: Inputs,
    status: &watch::Sender<AgentStatus>,
) -> Result<(), AgentError> {
    let mut agent = Agent::start(env, config, starter, inputs).await?;
    status.send_modify(|s| s.phase = AgentPhase::Running);
    loop {
        let served = agent.serve(status).await;
        agent.stop_server(served.is_ok()).await;
        let Err(error) = served else {
            return agent.resign().await;
        };
        probe("quorum_service_failed");
        if !error.may_pass() {
            return Err(error);
        }
        tracing::error!(%error, "this mount leaves the quorum until its block can be written");
        if !agent.rejoin(status).await? {
            return agent.resign().await;
        }
        probe("quorum_rejoined");
        tracing::info!("this mount takes part in the quorum again");
    }
}

/// The greatest term of all readable blocks, and whether one shows a leader that
/// did not record its stop (spec 09 section 5.2). The own block must be readable: terms
/// never go back there, even if the next read, before it is written, succeeds; and in a
/// cluster of one nobody else knows them.
///
/// # Errors
/// If the own block can not be read.
async fn survey(io: &BlockIo, slots: &Slots, own: usize) -> Result<(u64, bool), QuorumBlockError> {
    let (mut term, mut leader) = (0, false);
    for (slot, _) in slots.iter() {
        let block = match io.read(slot).await {
            Ok(block) => block,
            Err(error) if slot == own => return Err(error),
            Err(error) => {
                probe("quorum_start_skips_bad_block");
                tracing::warn!(%error, "quorum block skipped");
                continue;
            }
        };
        let events = block.events.iter().filter(|event| event.rid.get() != 0);
        term = events.map(|event| event.term.get()).fold(term, u64::max);
        leader |= unresolved(&block);
    }
    Ok((term, leader))
}

struct Agent {
    env: Env,
    config: AgentConfig,
    io: BlockIo,
    socket: Rc<dyn Datagram>,
    starter: Rc<dyn ServerStarter>,
    server: Option<Box<dyn ServerInstance>>,
    inputs: Inputs,
    brain: Brain,
    /// The server went down since the last turn: take another one at once.
    again: bool,
}

/// What woke the loop.
enum Woken {
    Datagram(Result<Bytes, NetError>),
    Other,
}

impl Agent {
    /// Spec 09 section 5.2.
    async fn start(
        env: &Env,
        config: AgentConfig,
        starter: Rc<dyn ServerStarter>,
        inputs: Inputs,
    ) -> Result<Self, AgentError> {
        let slot = config.slot;
        let addr = config.slots.addr(slot).expect("the own slot was checked");
        let dev = env.devices.open(DeviceRole::Meta);
        let io = BlockIo::new(dev.map_err(AgentError::Open)?, config.fsid);
        let socket = env.net.bind_datagram(addr).await;
        let socket = socket.map_err(|error| AgentError::Bind { slot, error })?;
        let (term, leader) = survey(&io, &config.slots, slot).await?;
        io.update(
            slot,
            QuorumEventKind::Begin,
            config.rid,
            term,
            env.clock.now(),
        )
        .await?;
        let input = Input {
            now: env.clock.now(),
            message: None,
            server: ServerPhase::Down,
            heartbeat_timeout: *inputs.heartbeat_timeout.borrow(),
            random: env.entropy.next_u64(),
        };
        let brain = Brain::new(config.policy, &config.slots, slot, term, leader, input);
        Ok(Self {
            env: env.clone(),
            config,
            io,
            socket,
            starter,
            server: None,
            inputs,
            brain,
            again: false,
        })
    }

    /// Waits, with the own server down, until the member can take part again; false
    /// if the mount ends before.
    async fn rejoin(&mut self, status: &watch::Sender<AgentStatus>) -> Result<bool, AgentError> {
        let member = self.brain.status();
        status.send_modify(|s| {
            s.member = Status {
                slot: member.slot,
                term: member.term,
                timeout: member.timeout,
                ..Status::default()
            };
        });
        loop {
            let pause = self.env.sleep(self.config.policy.rejoin_pause);
            // The mount's word wakes this as well; one that vanished says nothing.
            if let Either::Left(Err(_)) = race(self.inputs.stop.changed(), pause).await {
                self.env.sleep(self.config.policy.rejoin_pause).await;
            }
            if *self.inputs.stop.borrow() != AgentStop::Run {
                return Ok(false);
            }
            match self.begin_again().await {
                Ok(()) => return Ok(true),
                Err(error) if error.may_pass() => {
                    probe("quorum_rejoin_failed");
                    tracing::debug!(%error, "not yet in the quorum again");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Records that the server of the own, unfinished leadership is down, and
    /// starts over as a follower.
    async fn begin_again(&mut self) -> Result<(), AgentError> {
        self.write_stop().await?;
        let (seen, leader) = survey(&self.io, &self.config.slots, self.config.slot).await?;
        let term = seen.max(self.brain.status().term);
        self.write(QuorumEventKind::Term, term).await?;
        let input = Input {
            now: self.env.clock.now(),
            message: None,
            server: ServerPhase::Down,
            heartbeat_timeout: *self.inputs.heartbeat_timeout.borrow(),
            random: self.env.entropy.next_u64(),
        };
        let AgentConfig {
            slot,
            policy,
            ref slots,
            ..
        } = self.config;
        self.brain = Brain::new(policy, slots, slot, term, leader, input);
        Ok(())
    }

    /// Writes STOP for the leadership that the own block shows, once its server is
    /// down: what this mount knows of it may never have reached the device.
    async fn write_stop(&self) -> Result<(), QuorumBlockError> {
        let block = self.io.read(self.config.slot).await?;
        let elect = block.event(QuorumEventKind::Elect);
        let stop = block.event(QuorumEventKind::Stop).term.get();
        if elect.rid.get() != self.config.rid || elect.term.get() <= stop {
            return Ok(());
        }
        self.write(QuorumEventKind::Stop, elect.term.get()).await
    }

    /// The loop, until the mount ends it.
    async fn serve(&mut self, status: &watch::Sender<AgentStatus>) -> Result<(), AgentError> {
        loop {
            self.publish(status);
            let woken = self.wait().await;
            if *self.inputs.stop.borrow() != AgentStop::Run {
                return Ok(());
            }
            let message = match woken {
                Woken::Other => None,
                Woken::Datagram(received) => {
                    let bytes = received.map_err(AgentError::Receive)?;
                    let message = Message::parse(&bytes, self.config.fsid, &self.config.slots);
                    if message.is_none() {
                        probe("quorum_bad_datagram");
                    }
                    message
                }
            };
            let effects = self.brain.step(Input {
                now: self.env.clock.now(),
                message,
                server: self.server_phase(),
                heartbeat_timeout: *self.inputs.heartbeat_timeout.borrow(),
                random: self.env.entropy.next_u64(),
            });
            self.publish(status);
            for effect in effects {
                self.carry_out(effect).await?;
            }
            if self.server_phase() == ServerPhase::Down && self.server.take().is_some() {
                // The turn before saw it alive, or recorded its STOP: look again.
                self.again = self.brain.status().server_start_term != 0;
            }
        }
    }

    fn publish(&self, status: &watch::Sender<AgentStatus>) {
        let member = self.brain.status();
        status.send_if_modified(|s| {
            let changed = s.member != member;
            s.member = member;
            changed
        });
    }

    fn server_phase(&self) -> ServerPhase {
        self.server
            .as_ref()
            .map_or(ServerPhase::Down, |server| server.phase())
    }

    /// Waits for a datagram, the timeout, the mount or the server.
    async fn wait(&mut self) -> Woken {
        if std::mem::take(&mut self.again) {
            return Woken::Other;
        }
        let timer = self.env.clock.sleep_until(self.brain.timeout());
        let server = self.server.as_mut();
        let server = async {
            match server {
                Some(server) => server.changed().await,
                None => std::future::pending().await,
            }
        };
        let stop = &mut self.inputs.stop;
        let stop = async {
            if stop.changed().await.is_err() {
                // The mount vanished without a word: go on as a member until the
                // process ends with it.
                std::future::pending::<()>().await;
            }
        };
        // Datagrams first: a heartbeat that is there counts before a timeout.
        let other = race(stop, race(server, timer));
        match race(self.socket.recv_from(), other).await {
            Either::Left(received) => Woken::Datagram(received.map(|(bytes, _)| bytes)),
            Either::Right(_) => Woken::Other,
        }
    }

    async fn carry_out(&mut self, effect: Effect) -> Result<(), AgentError> {
        match effect {
            Effect::Write(kind, term) => self.write(kind, term).await?,
            Effect::SendToOthers(kind, term) => self.send_to_others(kind, term).await,
            Effect::Send(slot, kind, term) => self.send(slot, kind, term).await,
            Effect::StartServer(term) => {
                assert!(self.server_phase() == ServerPhase::Down, "one server");
                self.server = Some(self.starter.start(&self.env, term));
            }
            Effect::MayServe => {
                if let Some(server) = &self.server {
                    server.may_serve();
                }
            }
            Effect::StopServer => {
                if let Some(server) = &self.server {
                    server.stop();
                }
            }
        }
        Ok(())
    }

    async fn write(&self, kind: QuorumEventKind, term: u64) -> Result<(), QuorumBlockError> {
        tracing::info!(event = kind.name(), term, "quorum");
        let AgentConfig { slot, rid, .. } = self.config;
        if kind == QuorumEventKind::Stop {
            let mut blocks = Vec::new();
            for (slot, _) in self.config.slots.iter() {
                blocks.push((slot, self.io.read(slot).await?));
            }
            if stop_would_hide(rid, slot, &blocks) {
                probe("quorum_stop_left_out");
                tracing::warn!(term, "an earlier mount of this slot is not fenced: no STOP");
                return Ok(());
            }
        }
        self.io
            .update(slot, kind, rid, term, self.env.clock.now())
            .await
    }

    fn is_forced(&self) -> bool {
        *self.inputs.stop.borrow() == AgentStop::Forced
    }

    async fn send(&self, slot: usize, kind: MessageKind, term: u64) {
        let Some(addr) = self.config.slots.addr(slot).filter(|_| !self.is_forced()) else {
            return;
        };
        let from = self.config.slot;
        let message = Message { kind, from, term };
        let bytes = message.to_bytes(self.config.fsid).into();
        // Unreliable by design: what is lost is sent again or times out.
        let _ = self.socket.send_to(bytes, addr).await;
    }

    async fn send_to_others(&self, kind: MessageKind, term: u64) {
        for (slot, _) in self.config.slots.iter() {
            if slot != self.config.slot {
                self.send(slot, kind, term).await;
            }
        }
    }

    /// Stops the own server and waits until it is down. A leader that still may
    /// speak goes on with its heartbeats: until the server is down nobody else can
    /// serve anyway.
    async fn stop_server(&mut self, speak: bool) {
        let term = self.brain.status().term;
        let leads = self.brain.status().is_leader();
        let interval = self.config.policy.heartbeat_interval;
        if let Some(server) = &self.server {
            server.stop();
        }
        while self.server_phase() != ServerPhase::Down {
            let pause = self.env.sleep(interval);
            if let Some(server) = self.server.as_mut() {
                race(server.changed(), pause).await;
            }
            if speak && leads {
                self.send_to_others(MessageKind::Heartbeat, term).await;
            }
        }
    }

    /// Spec 09 section 5.5, with each event durable before the others are told.
    async fn resign(&self) -> Result<(), AgentError> {
        if self.is_forced() {
            return Ok(());
        }
        let member = self.brain.status();
        if member.server_start_term > 0 {
            self.write_stop().await?;
            self.send_to_others(MessageKind::Resignation, member.term)
                .await;
        }
        Ok(self.write(QuorumEventKind::End, member.term).await?)
    }
}

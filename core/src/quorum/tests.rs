//! Spec 09 section 16, and the rules of sections 2 to 5.

use super::agent::{
    AgentConfig, AgentError, AgentStatus, AgentStop, ServerInstance, ServerStarter,
};
use super::brain::{Brain, Effect, Input, Message, MessageKind, Policy, ServerPhase};
use super::config::{ConfigError, Slots};
use super::leaders::{LeaderCandidate, fence_candidates, find_server, stop_would_hide, superseded};
use crate::env::testing::{TestEntropy, TestWorld};
use crate::env::testnet::{TestNet, TestNetHandle};
use crate::env::{Duration, Entropy, Env, LocalBoxFuture, Signal, Time};
use crate::format::{
    InetAddr, Magic, QUORUM_BLKNO, QuorumBlock, QuorumConfig, QuorumEventKind, SM_BLOCK_SIZE,
    init_header, seal,
};
use crate::secure::{ClusterKey, secured};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use tokio::sync::watch;

const A: u64 = 0xa;
const B: u64 = 0xb;
const C: u64 = 0xc;
const OWN: u64 = 0x9;
const T: u64 = 9;

fn block(elect: (u64, u64), fence: (u64, u64), stop: (u64, u64)) -> QuorumBlock {
    let mut block = QuorumBlock::default();
    let events = [
        (QuorumEventKind::Elect, elect),
        (QuorumEventKind::Fence, fence),
        (QuorumEventKind::Stop, stop),
    ];
    for (kind, (term, rid)) in events {
        let event = &mut block.events[kind as usize];
        event.term.set(term);
        event.rid.set(rid);
    }
    block
}

fn fenced(blocks: &[QuorumBlock]) -> Vec<(u64, u64)> {
    fence_candidates(T, OWN, blocks.iter().enumerate())
        .into_iter()
        .map(|LeaderCandidate { rid, term, .. }| (rid, term))
        .collect()
}

#[test]
fn the_server_is_the_leader_that_fenced_the_other_of_its_term() {
    let found = |blocks: &[QuorumBlock]| find_server(blocks.iter().enumerate());
    let elected = block((7, A), (0, 0), (0, 0));
    let serves = block((7, B), (7, B), (0, 0));
    assert_eq!(found(&[elected, serves]), Some(1));
    assert_eq!(found(&[serves, elected]), Some(0));
    assert_eq!(found(&[elected, elected]), Some(0), "the lowest slot");
    assert_eq!(found(&[serves, block((8, C), (0, 0), (0, 0))]), Some(1));
    assert_eq!(found(&[block((7, A), (7, A), (7, A))]), None);
}

#[test]
fn the_fence_decisions_of_the_spec() {
    let stopped7 = block((7, C), (7, C), (7, C));
    assert_eq!(fenced(&[stopped7, block((8, A), (8, A), (0, 0))]), [(A, 8)]);
    let s0 = block((7, A), (0, 0), (0, 0));
    assert_eq!(fenced(&[s0, block((8, C), (8, C), (8, C))]), []);
    let two = block((8, B), (5, A), (0, 0));
    assert_eq!(fenced(&[two, QuorumBlock::default()]), [(B, 8), (A, 5)]);
    assert_eq!(fenced(&[two, stopped7]), [(B, 8)]);
    assert!(!superseded(T, &[stopped7, two]));
    assert!(superseded(T, &[block((10, C), (0, 0), (0, 0))]));
    assert!(
        superseded(T, &[block((10, C), (10, C), (10, C))]),
        "also if it has stopped again"
    );
    // A served in this slot at 7; OWN was elected there at 8 and could not fence it.
    let heir = block((8, OWN), (7, A), (0, 0));
    assert!(stop_would_hide(OWN, 0, &[(0, heir)]));
    assert!(stop_would_hide(OWN, 0, &[(0, heir), (1, stopped7)]));
    let fenced9 = block((9, C), (9, C), (9, C));
    assert!(!stop_would_hide(OWN, 0, &[(0, heir), (1, fenced9)]));
    let came_up = block((8, OWN), (8, OWN), (0, 0));
    assert!(!stop_would_hide(OWN, 0, &[(0, came_up)]));
    let own = block((9, OWN), (0, 0), (0, 0));
    assert_eq!(fenced(&[own, block((10, C), (0, 0), (0, 0))]), []);
}

// ---- slots and messages ----

fn config(addrs: &[(u16, u32, u16)]) -> QuorumConfig {
    let mut config = QuorumConfig::default();
    for (slot, ip, port) in addrs {
        let addr = SocketAddrV4::new(Ipv4Addr::from(*ip), *port);
        config.slots[usize::from(*slot)] = InetAddr::from_v4(addr);
    }
    config
}

const LOCAL: u32 = 0x7f00_0001;

fn slots(n: u16) -> Slots {
    let addrs: Vec<_> = (0..n).map(|i| (i, LOCAL, 7000 + i)).collect();
    Slots::checked(&config(&addrs), 0).expect("good slots")
}

#[test]
fn slots_are_checked() {
    use ConfigError as E;
    let check = |addrs: &[_], own| Slots::checked(&config(addrs), own).err();
    assert_eq!(check(&[], 0), Some(E::Empty));
    assert_eq!(check(&[(1, LOCAL, 1)], 0), Some(E::NotPresent(0)));
    assert_eq!(check(&[(1, LOCAL, 1)], 1), None);
    let bad = [
        (0xe000_0001, 1),
        (u32::MAX, 1),
        (0x0001_0203, 1),
        (LOCAL, 0),
        (LOCAL, u16::MAX),
    ];
    for (ip, port) in bad {
        let got = check(&[(2, LOCAL, 5), (3, ip, port)], 2);
        assert!(matches!(got, Some(E::Address { slot: 3, .. })), "{got:?}");
    }
    let got = check(&[(0, LOCAL, 5), (4, LOCAL, 6), (9, LOCAL, 5)], 0);
    assert!(
        matches!(
            got,
            Some(E::Duplicate {
                first: 0,
                second: 9,
                ..
            })
        ),
        "{got:?}"
    );
}

#[test]
fn votes_that_make_a_leader() {
    let needed: Vec<usize> = [1, 2, 3, 4, 5, 7, 15]
        .map(|n| slots(n).votes_needed())
        .into();
    assert_eq!(needed, [1, 1, 2, 3, 3, 4, 8]);
}

#[test]
fn datagrams_of_the_spec() {
    let fsid = 0x1122_3344_5566_7788;
    let head = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
    let cases = [
        (MessageKind::RequestVote, 0, 0x4bc0_71bc_u32),
        (MessageKind::Vote, 2, 0xd9ea_8909),
        (MessageKind::Heartbeat, 0, 0xf4a7_523d),
        (MessageKind::Resignation, 0, 0x29e2_f885),
    ];
    let slots = slots(3);
    for (kind, from, crc) in cases {
        let message = Message {
            kind,
            from,
            term: 7,
        };
        let mut bytes = head.to_vec();
        bytes.extend([0; 8]);
        bytes.extend([7, 0, 0, 0, 0, 0, 0, 0, kind as u8, from as u8, 0, 0]);
        bytes.extend(crc.to_le_bytes());
        assert_eq!(message.to_bytes(fsid), bytes);
        assert_eq!(Message::parse(&bytes, fsid, &slots), Some(message));
        assert_eq!(Message::parse(&bytes, fsid + 1, &slots), None);
        assert_eq!(Message::parse(&bytes[..31], fsid, &slots), None);
        for at in 0..32 {
            let mut bad = bytes.clone();
            bad[at] ^= 0x40;
            assert_eq!(Message::parse(&bad, fsid, &slots), None, "byte {at}");
        }
    }
    let absent = Message {
        kind: MessageKind::Vote,
        from: 3,
        term: 7,
    };
    assert_eq!(
        Message::parse(&absent.to_bytes(fsid), fsid, &slots),
        None,
        "no such slot"
    );
}

// ---- brains against each other ----

/// Members whose messages are lost, delayed and doubled, and that restart.
struct Cluster {
    entropy: Rc<TestEntropy>,
    slots: Slots,
    now: Time,
    brains: Vec<Brain>,
    /// The persisted term of each member.
    durable: Vec<u64>,
    servers: Vec<ServerPhase>,
    /// Messages on their way: (to, message).
    mail: Vec<(usize, Message)>,
    /// Who was elected in each term.
    elected: BTreeMap<u64, Vec<usize>>,
}

const HEARTBEAT: Duration = Duration::from_secs(10);

impl Cluster {
    fn new(seed: u64, n: u16) -> Self {
        let mut cluster = Self {
            entropy: TestEntropy::new(seed),
            slots: slots(n),
            now: Time(1_000_000_000),
            brains: Vec::new(),
            durable: vec![0; usize::from(n)],
            servers: vec![ServerPhase::Down; usize::from(n)],
            mail: Vec::new(),
            elected: BTreeMap::new(),
        };
        for slot in 0..usize::from(n) {
            let brain = cluster.fresh(slot);
            cluster.brains.push(brain);
        }
        cluster
    }

    fn input(&self, slot: usize, message: Option<Message>) -> Input {
        Input {
            now: self.now,
            message,
            server: self.servers[slot],
            heartbeat_timeout: HEARTBEAT,
            random: self.entropy.next_u64(),
        }
    }

    fn fresh(&self, slot: usize) -> Brain {
        let term = self.durable.iter().copied().max().unwrap_or(0);
        let mut input = self.input(slot, None);
        input.server = ServerPhase::Down;
        Brain::new(Policy::default(), &self.slots, slot, term, false, input)
    }

    fn turn(&mut self, slot: usize, message: Option<Message>) {
        let input = self.input(slot, message);
        for effect in self.brains[slot].step(input) {
            self.carry_out(slot, effect);
        }
    }

    fn carry_out(&mut self, slot: usize, effect: Effect) {
        match effect {
            Effect::Write(kind, term) => {
                if kind == QuorumEventKind::Term {
                    assert!(term > self.durable[slot], "terms only grow");
                    self.durable[slot] = term;
                }
                if kind == QuorumEventKind::Elect {
                    self.elected.entry(term).or_default().push(slot);
                }
                if kind == QuorumEventKind::Fence {
                    assert_eq!(self.servers[slot], ServerPhase::Fenced);
                }
                if kind == QuorumEventKind::Stop {
                    assert_eq!(self.servers[slot], ServerPhase::Down);
                }
            }
            Effect::Send(to, kind, term) => self.send(slot, to, kind, term),
            Effect::SendToOthers(kind, term) => {
                for to in (0..self.brains.len()).filter(|to| *to != slot) {
                    self.send(slot, to, kind, term);
                }
            }
            Effect::StartServer(_) => {
                assert_eq!(self.servers[slot], ServerPhase::Down, "one server");
                self.servers[slot] = ServerPhase::Starting;
            }
            Effect::MayServe => {
                if self.servers[slot] == ServerPhase::Fenced {
                    self.servers[slot] = ServerPhase::Up;
                }
            }
            Effect::StopServer => self.servers[slot] = ServerPhase::Stopping,
        }
    }

    fn send(&mut self, from: usize, to: usize, kind: MessageKind, term: u64) {
        assert!(
            self.durable[from] >= term,
            "sent before its term is durable"
        );
        self.mail.push((to, Message { kind, from, term }));
    }

    /// Something happens: mostly a delivery or a timeout.
    fn step(&mut self, faults: bool) {
        let n = self.brains.len() as u64;
        let any = self.entropy.range(0, n) as usize;
        let roll = self.entropy.range(0, 100);
        if !self.mail.is_empty() && (roll < 60 || !faults) {
            let pick = self.entropy.range(0, self.mail.len() as u64) as usize;
            let (to, message) = self.mail[pick];
            if !faults || self.entropy.chance(9, 10) {
                self.mail.swap_remove(pick);
            }
            if !faults || self.entropy.chance(4, 5) {
                self.turn(to, Some(message));
            }
            return;
        }
        match roll {
            _ if !faults => {}
            60..70 => {
                self.servers[any] = match self.servers[any] {
                    ServerPhase::Starting => ServerPhase::Fenced,
                    ServerPhase::Stopping => ServerPhase::Down,
                    other => other,
                };
            }
            70..72 => {
                // The member's host dies; another mount takes the slot.
                self.servers[any] = ServerPhase::Down;
                self.brains[any] = self.fresh(any);
            }
            72..73 if self.servers[any] == ServerPhase::Up => {
                self.servers[any] = ServerPhase::Stopping;
            }
            _ => {}
        }
        self.time_passes();
    }

    /// The next timeout comes, or servers get on.
    fn time_passes(&mut self) {
        let next = self.brains.iter().map(Brain::timeout).min();
        self.now = self.now.max(next.expect("members"));
        for slot in 0..self.brains.len() {
            if self.brains[slot].timeout() <= self.now {
                self.turn(slot, None);
            }
        }
    }
}

#[test]
fn no_term_has_two_leaders_and_a_healed_cluster_has_one() {
    for seed in 0..150 {
        let n = 3 + (seed % 3) as u16;
        let mut cluster = Cluster::new(seed, n);
        for _ in 0..2000 {
            cluster.step(true);
        }
        for (term, leaders) in &cluster.elected {
            assert_eq!(leaders.len(), 1, "seed {seed}: term {term}");
        }
        cluster.mail.clear();
        // Healed: servers move on, nothing is lost; a minute is plenty.
        let end = cluster.now + Duration::from_secs(60);
        while cluster.now < end {
            for slot in 0..usize::from(n) {
                cluster.servers[slot] = match cluster.servers[slot] {
                    ServerPhase::Starting => ServerPhase::Fenced,
                    ServerPhase::Stopping => ServerPhase::Down,
                    other => other,
                };
                cluster.turn(slot, None);
            }
            while !cluster.mail.is_empty() {
                cluster.step(false);
            }
            cluster.time_passes();
        }
        let leaders = cluster.brains.iter().filter(|b| b.status().is_leader());
        assert_eq!(leaders.count(), 1, "seed {seed}");
        let up = cluster.servers.iter().filter(|s| **s == ServerPhase::Up);
        assert_eq!(up.count(), 1, "seed {seed}");
    }
}

fn lone(now: u64, slots: &Slots, term: u64) -> (Brain, Input) {
    let input = Input {
        now: Time(now),
        message: None,
        server: ServerPhase::Down,
        heartbeat_timeout: HEARTBEAT,
        random: 0,
    };
    let brain = Brain::new(Policy::default(), slots, 0, term, false, input);
    (brain, input)
}

#[test]
fn a_single_slot_elects_itself_in_one_turn() {
    use QuorumEventKind::{Elect, Fence, Stop, Term};
    let (mut brain, mut input) = lone(5, &slots(1), 6);
    let effects = brain.step(input);
    let wanted = [
        Effect::Write(Term, 7),
        Effect::SendToOthers(MessageKind::RequestVote, 7),
        Effect::Write(Elect, 7),
        Effect::SendToOthers(MessageKind::Heartbeat, 7),
        Effect::StartServer(7),
    ];
    assert_eq!(effects, wanted);
    input.server = ServerPhase::Fenced;
    assert_eq!(
        brain.step(input),
        [Effect::Write(Fence, 7), Effect::MayServe],
        "recorded before the server may write"
    );
    assert_eq!(brain.step(input), [], "FENCE is written once");
    input.server = ServerPhase::Up;
    assert_eq!(brain.step(input), []);
    // The server stops by itself: resign, record it, and run again.
    input.server = ServerPhase::Down;
    let effects = brain.step(input);
    let wanted = [
        Effect::Write(Stop, 7),
        Effect::SendToOthers(MessageKind::Resignation, 7),
    ];
    assert_eq!(effects, wanted);
    input.now = brain.timeout();
    assert!(brain.step(input).contains(&Effect::StartServer(8)));
}

#[test]
fn a_deposed_leader_stops_its_server_before_it_runs_again() {
    let (mut brain, mut input) = lone(5, &slots(2), 6);
    input.now = brain.timeout();
    assert!(brain.step(input).contains(&Effect::StartServer(7)));
    input.server = ServerPhase::Up;
    input.message = Some(Message {
        kind: MessageKind::RequestVote,
        from: 1,
        term: 9,
    });
    let effects = brain.step(input);
    let wanted = [
        Effect::Write(QuorumEventKind::Term, 9),
        Effect::StopServer,
        Effect::Send(1, MessageKind::Vote, 9),
    ];
    assert_eq!(effects, wanted);
    // One vote for each term.
    input.message = Some(Message {
        from: 0,
        ..input.message.expect("set")
    });
    input.server = ServerPhase::Stopping;
    assert_eq!(brain.step(input), []);
    input.message = None;
    input.now = brain.timeout();
    assert_eq!(brain.step(input), [], "no election while the server stops");
    input.server = ServerPhase::Down;
    assert_eq!(
        brain.step(input),
        [Effect::Write(QuorumEventKind::Stop, 7)],
        "no resignation of one that was deposed"
    );
    input.now = brain.timeout();
    assert!(brain.step(input).contains(&Effect::StartServer(10)));
}

#[test]
fn no_vote_in_the_term_of_the_start_and_no_election_after_a_message() {
    let (mut brain, mut input) = lone(5, &slots(3), 6);
    input.message = Some(Message {
        kind: MessageKind::RequestVote,
        from: 1,
        term: 6,
    });
    assert_eq!(brain.step(input), []);
    input.message = Some(Message {
        kind: MessageKind::Heartbeat,
        from: 1,
        term: 6,
    });
    input.now = brain.timeout() + Duration::from_secs(1);
    assert_eq!(brain.step(input), [], "a late heartbeat is one");
    assert_eq!(brain.timeout(), input.now + HEARTBEAT);
    input.message = Some(Message {
        kind: MessageKind::Resignation,
        from: 1,
        term: 6,
    });
    brain.step(input);
    assert_eq!(
        brain.timeout(),
        input.now + Policy::default().election_timeout
    );
}

#[test]
fn a_leader_goes_on_sending_after_a_heartbeat_of_its_own_term() {
    let (mut brain, mut input) = lone(5, &slots(2), 6);
    input.now = brain.timeout();
    brain.step(input);
    input.server = ServerPhase::Starting;
    input.message = Some(Message {
        kind: MessageKind::Heartbeat,
        from: 1,
        term: 7,
    });
    brain.step(input);
    input.message = None;
    input.now = input.now + Duration::from_millis(100);
    let beat = Effect::SendToOthers(MessageKind::Heartbeat, 7);
    assert_eq!(brain.step(input), [beat]);
}

// ---- the agent ----

const FSID: u64 = 0x1122_3344_5566_7788;

/// A server that obeys after a moment.
struct FakeServer {
    phase: Rc<Cell<ServerPhase>>,
    changed: Rc<Signal>,
    seen: ServerPhase,
}

impl ServerInstance for FakeServer {
    fn phase(&self) -> ServerPhase {
        self.phase.get()
    }
    fn may_serve(&self) {
        if self.phase.get() == ServerPhase::Fenced {
            self.phase.set(ServerPhase::Up);
            self.changed.wake_all();
        }
    }
    fn stop(&self) {
        if self.phase.get() != ServerPhase::Down {
            self.phase.set(ServerPhase::Stopping);
            self.changed.wake_all();
        }
    }
    fn changed(&mut self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {
            let (phase, seen) = (&self.phase, self.seen);
            let differs = || (phase.get() != seen).then(|| phase.get());
            self.seen = self.changed.wait_for(differs).await;
        })
    }
}

/// A started server: its term, its phase and what tells of changes.
type Started = (u64, Rc<Cell<ServerPhase>>, Rc<Signal>);

/// Starts fake servers and remembers them.
#[derive(Default)]
struct FakeStarter {
    started: RefCell<Vec<Started>>,
}

impl ServerStarter for FakeStarter {
    fn start(&self, env: &Env, term: u64) -> Box<dyn ServerInstance> {
        let phase = Rc::new(Cell::new(ServerPhase::Starting));
        let changed: Rc<Signal> = Rc::default();
        let mut started = self.started.borrow_mut();
        started.push((term, phase.clone(), changed.clone()));
        let (env, at, wake) = (env.clone(), phase.clone(), changed.clone());
        env.clone().spawn("fake server", async move {
            env.sleep(Duration::from_millis(50)).await;
            if at.get() == ServerPhase::Starting {
                at.set(ServerPhase::Fenced);
                wake.wake_all();
            }
            let stopping = || (at.get() == ServerPhase::Stopping).then_some(());
            wake.wait_for(stopping).await;
            env.sleep(Duration::from_millis(300)).await;
            at.set(ServerPhase::Down);
            wake.wake_all();
        });
        Box::new(FakeServer {
            phase,
            changed,
            seen: ServerPhase::Starting,
        })
    }
}

struct Member {
    starter: Rc<FakeStarter>,
    stop: watch::Sender<AgentStop>,
    status: watch::Receiver<AgentStatus>,
    _heartbeat: watch::Sender<Duration>,
    ended: Rc<RefCell<Option<Result<(), AgentError>>>>,
}

struct Agents {
    key: Option<ClusterKey>,
    world: TestWorld,
    slots: Slots,
}

impl Agents {
    fn new(n: u16) -> Self {
        let net = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
        let world = TestWorld::with_network(3, 1 << 20, 1 << 20, net);
        for slot in 0..15_u64 {
            let mut block = vec![0; SM_BLOCK_SIZE];
            init_header(&mut block, Magic::Quorum, FSID, QUORUM_BLKNO + slot, 1);
            seal(&mut block);
            world.meta.poke(super::block::offset(slot as usize), &block);
        }
        Self {
            key: None,
            world,
            slots: slots(n),
        }
    }

    fn member(&self, slot: usize, rid: u64) -> Member {
        self.member_with(slot, rid, self.key.as_ref())
    }

    fn member_with(&self, slot: usize, rid: u64, key: Option<&ClusterKey>) -> Member {
        let (stop, stop_rx) = watch::channel(AgentStop::Run);
        let (heartbeat, heartbeat_timeout) = watch::channel(HEARTBEAT);
        let (status_tx, status) = watch::channel(AgentStatus::default());
        let starter = Rc::new(FakeStarter::default());
        let ended: Rc<RefCell<Option<_>>> = Rc::default();
        let member = Member {
            starter: starter.clone(),
            stop,
            status,
            _heartbeat: heartbeat,
            ended: ended.clone(),
        };
        let config = AgentConfig {
            fsid: FSID,
            rid,
            slot,
            slots: self.slots.clone(),
            policy: Policy::default(),
            cluster_key: None,
        };
        let env = secured(&self.world.env(), key);
        let inputs = super::agent::Inputs {
            stop: stop_rx,
            heartbeat_timeout,
        };
        self.world.env().spawn("agent", async move {
            let result = super::agent::run(&env, config, starter, inputs, &status_tx).await;
            ended.replace(Some(result));
        });
        member
    }

    async fn block(&self, slot: usize) -> QuorumBlock {
        let io = super::BlockIo::new(self.world.meta.handle(), FSID);
        io.read(slot).await.expect("a valid block")
    }

    async fn terms(&self, slot: usize) -> [u64; 6] {
        self.block(slot).await.events.map(|event| event.term.get())
    }

    async fn pass(&self, ms: u64) {
        self.world.env().sleep(Duration::from_millis(ms)).await;
    }
}

impl Member {
    fn is_leader(&self) -> bool {
        self.status.borrow().member.is_leader()
    }
}

#[test]
fn one_member_leads_at_once_and_leaves_a_clean_block() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let member = agents.member(0, A);
        agents.pass(1).await;
        assert!(member.is_leader());
        assert_eq!(agents.terms(0).await, [0, 1, 1, 0, 0, 0]);
        agents.pass(60).await;
        assert_eq!(agents.terms(0).await, [0, 1, 1, 1, 0, 0]);
        member.stop.send_replace(AgentStop::Unmount);
        agents.pass(100).await;
        assert_eq!(agents.terms(0).await[4], 0, "STOP waits for the server");
        agents.pass(300).await;
        assert_eq!(agents.terms(0).await, [0, 1, 1, 1, 1, 1]);
        assert_eq!(*member.ended.borrow(), Some(Ok(())));
        assert!(!agents.block(0).await.may_be_running());
        // The next mount in the slot goes on from there.
        let next = agents.member(0, B);
        agents.pass(100).await;
        assert!(next.is_leader());
        assert_eq!(agents.terms(0).await, [1, 2, 2, 2, 1, 1]);
    });
}

#[test]
fn a_forced_end_writes_nothing_more_but_stops_the_server() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let member = agents.member(0, A);
        agents.pass(100).await;
        let before = agents.block(0).await;
        member.stop.send_replace(AgentStop::Forced);
        agents.pass(1000).await;
        assert_eq!(*member.ended.borrow(), Some(Ok(())));
        assert_eq!(agents.block(0).await, before);
        let started = member.starter.started.borrow();
        assert_eq!(started[0].1.get(), ServerPhase::Down);
    });
}

#[test]
fn a_foreign_mount_in_the_slot_ends_the_service_and_its_server() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let member = agents.member(0, A);
        agents.pass(10).await;
        // Another host mounts with the same slot while our server starts.
        let io = super::BlockIo::new(agents.world.meta.handle(), FSID);
        let begin = QuorumEventKind::Begin;
        let written = io.update(0, begin, B, 1, Time(0)).await;
        written.expect("written");
        agents.pass(1000).await;
        let ended = member.ended.borrow().clone();
        assert!(
            matches!(
                ended,
                Some(Err(AgentError::Block(
                    super::QuorumBlockError::ForeignRid { found: B, .. }
                )))
            ),
            "{ended:?}"
        );
        let started = member.starter.started.borrow();
        assert_eq!(started[0].1.get(), ServerPhase::Down);
    });
}

#[test]
fn a_member_whose_block_fails_stops_its_server_and_takes_part_again() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let member = agents.member(0, A);
        agents.pass(10).await;
        let meta = &agents.world.meta;
        meta.set_fault(Some(Box::new(|op| op.op == "write")));
        agents.pass(3000).await;
        assert_eq!(*member.ended.borrow(), None);
        assert!(!member.is_leader());
        let first = member.starter.started.borrow()[0].1.clone();
        assert_eq!(first.get(), ServerPhase::Down);
        assert_eq!(member.starter.started.borrow().len(), 1);
        assert_eq!(agents.terms(0).await, [0, 1, 1, 0, 0, 0]);

        meta.set_fault(None);
        agents.pass(1000).await;
        assert!(member.is_leader());
        // Its first leadership is over, and it does not fence itself.
        assert_eq!(agents.terms(0).await, [0, 2, 2, 2, 1, 0]);
        let started: Vec<u64> = member
            .starter
            .started
            .borrow()
            .iter()
            .map(|s| s.0)
            .collect();
        assert_eq!(started, [1, 2]);
        member.stop.send_replace(AgentStop::Unmount);
        agents.pass(1000).await;
        assert_eq!(*member.ended.borrow(), Some(Ok(())));
        assert!(!agents.block(0).await.may_be_running());
    });
}

#[test]
fn a_leader_that_could_not_fence_leaves_the_earlier_mount_of_its_slot_to_the_next() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let member = agents.member(0, A);
        agents.pass(100).await;
        // A vanishes with its server up; B's server can not fence it and goes down.
        member.stop.send_replace(AgentStop::Forced);
        agents.pass(1000).await;
        let next = agents.member(0, B);
        agents.pass(10).await;
        let (term, phase, changed) = next.starter.started.borrow()[0].clone();
        assert_eq!(term, 2);
        phase.set(ServerPhase::Down);
        changed.wake_all();
        agents.pass(10).await;
        assert!(!next.is_leader(), "it resigned");
        let block = agents.block(0).await;
        let to_fence = fence_candidates(3, B, [(0, &block)]);
        assert_eq!(to_fence.iter().map(|c| c.rid).collect::<Vec<_>>(), [A]);
        // The next term's server comes up, so A is fenced: then it may stop.
        agents.pass(1000).await;
        assert!(next.is_leader());
        next.stop.send_replace(AgentStop::Unmount);
        agents.pass(1000).await;
        assert_eq!(*next.ended.borrow(), Some(Ok(())));
        let block = agents.block(0).await;
        assert_eq!(fence_candidates(9, A, [(0, &block)]), []);
    });
}

#[test]
fn a_member_that_is_out_ends_when_the_mount_does() {
    for how in [AgentStop::Unmount, AgentStop::Forced] {
        let agents = Agents::new(1);
        agents.world.block_on(async {
            let member = agents.member(0, A);
            agents.pass(10).await;
            let meta = &agents.world.meta;
            meta.set_fault(Some(Box::new(|op| op.op == "write")));
            agents.pass(3000).await;
            member.stop.send_replace(how);
            agents.pass(10).await;
            let ended = member.ended.borrow().clone();
            assert_eq!(ended.expect("ended").is_err(), how == AgentStop::Unmount);
        });
    }
}

#[test]
fn a_member_that_is_out_does_not_take_its_slot_back_from_another_mount() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let member = agents.member(0, A);
        agents.pass(10).await;
        let meta = &agents.world.meta;
        meta.set_fault(Some(Box::new(|op| op.op == "write")));
        agents.pass(2000).await;
        meta.set_fault(None);
        let io = super::BlockIo::new(meta.handle(), FSID);
        let begin = QuorumEventKind::Begin;
        let written = io.update(0, begin, B, 1, Time(0)).await;
        written.expect("written");
        let before = agents.block(0).await;
        agents.pass(2000).await;
        assert_eq!(agents.block(0).await, before);
        assert!(matches!(
            *member.ended.borrow(),
            Some(Err(AgentError::Block(
                super::QuorumBlockError::ForeignRid { found: B, .. }
            )))
        ));
    });
}

#[test]
fn three_members_replace_a_leader_that_leaves_or_falls_silent() {
    replace_leaders(Agents::new(3));
}

#[test]
fn so_do_three_members_with_a_cluster_key() {
    replace_leaders(Agents {
        key: Some(ClusterKey::from_bytes(&[3; 32])),
        ..Agents::new(3)
    });
}

#[test]
fn a_member_with_another_key_or_none_elects_nobody_and_deposes_nobody() {
    for stranger in [None, Some(ClusterKey::from_bytes(&[4; 32]))] {
        let agents = Agents {
            key: Some(ClusterKey::from_bytes(&[3; 32])),
            ..Agents::new(3)
        };
        agents.world.block_on(async {
            let members = [agents.member(0, A), agents.member(1, B)];
            agents.pass(3000).await;
            let leads = members
                .iter()
                .position(Member::is_leader)
                .expect("a leader");
            let before = agents.terms(leads).await;
            let alone = agents.member_with(2, C, stranger.as_ref());
            agents.pass(60_000).await;
            assert!(!alone.is_leader(), "two votes of three are needed");
            assert!(members[leads].is_leader());
            assert_eq!(agents.terms(leads).await, before, "no new term");
        });
    }
}

fn replace_leaders(agents: Agents) {
    agents.world.block_on(async {
        let mut members: Vec<Member> = (0..3)
            .map(|slot| agents.member(slot, A + slot as u64))
            .collect();
        agents.pass(3000).await;
        let leader = |members: &[Member]| {
            let leaders: Vec<usize> = (0..members.len())
                .filter(|n| members[*n].is_leader())
                .collect();
            assert_eq!(leaders.len(), 1, "leaders {leaders:?}");
            leaders[0]
        };
        let first = leader(&members);
        let rid = |member: usize, members: &[Member]| members[member].status.borrow().member.slot;
        assert_eq!(rid(first, &members), first);
        // Leaves politely: the others need no more than an election.
        members[first].stop.send_replace(AgentStop::Unmount);
        agents.pass(3000).await;
        let gone = members.remove(first);
        assert_eq!(*gone.ended.borrow(), Some(Ok(())));
        let second = leader(&members);
        // Falls silent: the last one can not win alone.
        members[second].stop.send_replace(AgentStop::Forced);
        agents.pass(30_000).await;
        let last = members.remove(1 - second);
        assert!(!last.is_leader(), "one vote of three is no majority");
        let back = agents.member(first, C + 9);
        agents.pass(30_000).await;
        assert!(last.is_leader() ^ back.is_leader());
    });
}

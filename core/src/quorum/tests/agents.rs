//! Agents over a network and a device in memory, with servers that only pretend.

use super::*;
use crate::env::testing::DeviceOp;

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
            world
                .meta
                .poke(crate::quorum::block::offset(slot as usize), &block);
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
        let inputs = crate::quorum::agent::Inputs {
            stop: stop_rx,
            heartbeat_timeout,
        };
        self.world.env().spawn("agent", async move {
            let result = crate::quorum::agent::run(&env, config, starter, inputs, &status_tx).await;
            ended.replace(Some(result));
        });
        member
    }

    async fn block(&self, slot: usize) -> QuorumBlock {
        let io = BlockIo::new(self.world.meta.handle(), FSID);
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
fn a_member_that_cannot_read_its_own_block_does_not_begin_with_a_lower_term() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let member = agents.member(0, A);
        agents.pass(100).await;
        member.stop.send_replace(AgentStop::Unmount);
        agents.pass(1000).await;
        let before = agents.terms(0).await;
        assert_eq!(before, [0, 1, 1, 1, 1, 1]);
        // Once: to be written it can be read again.
        let failed = Cell::new(false);
        let once = move |op: DeviceOp| op.op == "read" && !failed.replace(true);
        agents.world.meta.set_fault(Some(Box::new(once)));
        let next = agents.member(0, B);
        agents.pass(100).await;
        assert!(!next.is_leader());
        let ended = next.ended.borrow().clone();
        let read = matches!(
            ended,
            Some(Err(AgentError::Block(QuorumBlockError::Device {
                slot: 0,
                ..
            })))
        );
        assert!(read, "{ended:?}");
        assert_eq!(agents.terms(0).await, before);
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
        let io = BlockIo::new(agents.world.meta.handle(), FSID);
        let begin = QuorumEventKind::Begin;
        let written = io.update(0, begin, B, 1, Time(0)).await;
        written.expect("written");
        agents.pass(1000).await;
        let ended = member.ended.borrow().clone();
        assert!(
            matches!(
                ended,
                Some(Err(AgentError::Block(QuorumBlockError::ForeignRid {
                    found: B,
                    ..
                })))
            ),
            "{ended:?}"
        );
        let started = member.starter.started.borrow();
        assert_eq!(started[0].1.get(), ServerPhase::Down);
    });
}

#[test]
fn a_block_with_a_number_that_nobody_counts_to_is_damaged() {
    let agents = Agents::new(1);
    agents.world.block_on(async {
        let io = BlockIo::new(agents.world.meta.handle(), FSID);
        let begin = QuorumEventKind::Begin;
        let written = io.update(0, begin, A, u64::MAX, Time(0)).await;
        written.expect("written");
        let damaged = QuorumBlockError::Number {
            slot: 0,
            what: "a term",
            found: u64::MAX,
        };
        assert_eq!(io.read(0).await.err(), Some(damaged.clone()));
        // It is named, and nobody counts on from it.
        let member = agents.member(0, A);
        agents.pass(100).await;
        assert_eq!(io.read(0).await.err(), Some(damaged));
        assert!(!member.is_leader());
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
        let io = BlockIo::new(meta.handle(), FSID);
        let begin = QuorumEventKind::Begin;
        let written = io.update(0, begin, B, 1, Time(0)).await;
        written.expect("written");
        let before = agents.block(0).await;
        agents.pass(2000).await;
        assert_eq!(agents.block(0).await, before);
        assert!(matches!(
            *member.ended.borrow(),
            Some(Err(AgentError::Block(QuorumBlockError::ForeignRid {
                found: B,
                ..
            })))
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

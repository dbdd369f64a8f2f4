//! Quorum: every captured datagram is one of ours, and three of our agents that go
//! through what the captured members went through send the same messages and
//! leave the same blocks, but for times.

use super::FSID;
use super::pcap::{self, unzstd};
use bytes::Bytes;
use outrider_core::env::testing::{MemDevice, TestWorld};
use outrider_core::env::testnet::{TestNet, TestNetHandle};
use outrider_core::env::watch;
use outrider_core::env::{
    Datagram, Duration, Entropy, Env, Listener, LocalBoxFuture, NetError, Network, Signal, Stream,
    WallTime,
};
use outrider_core::format::{
    QUORUM_BLKNO, QuorumBlock, QuorumEvent, SM_BLOCK_SIZE, SuperBlock, Timespec,
};
use outrider_core::quorum::agent::{Inputs, run};
use outrider_core::quorum::brain::{Message, MessageKind};
use outrider_core::quorum::{
    AgentConfig, AgentStatus, AgentStop, Policy, ServerInstance, ServerPhase, ServerStarter, Slots,
};
use outrider_core::volume::{MkfsOptions, mkfs};
use std::cell::{Cell, RefCell};
use std::net::SocketAddrV4;
use std::rc::Rc;
use zerocopy::FromBytes;

const PORT: u16 = 19700;
const MEMBERS: usize = 3;
/// The mounts in the order in which they appear: slots 0, 1, 2, then 0 and 1 again.
const RIDS: [u64; 3] = [
    0x8264_e536_a17f_9fc9,
    0x0b85_3fed_78c3_7163,
    0xe86d_9e09_7881_4751,
];
/// First small block of the images.
const FIRST: u64 = 16;

/// A message as the test compares it: kind, sender, receiver, term.
type Said = (MessageKind, usize, usize, u64);

fn config() -> Slots {
    let image = unzstd("quorum.00-mkfs.bin.zst");
    let sb = SuperBlock::from_block(&image[..SM_BLOCK_SIZE]);
    assert_eq!(sb.hdr.fsid.get(), FSID);
    Slots::checked(&sb.qconf, 0).expect("good slots")
}

/// What each member said, with a run of heartbeats of one term as one.
fn in_short(said: impl IntoIterator<Item = Said>) -> Vec<Vec<Said>> {
    let mut out = vec![Vec::new(); MEMBERS];
    for said in said {
        let (kind, from, ..) = said;
        let before: &mut Vec<Said> = &mut out[from];
        if kind != MessageKind::Heartbeat || !before.contains(&said) {
            before.push(said);
        }
    }
    out
}

/// All captured quorum messages.
fn captured() -> Vec<Said> {
    let slots = config();
    let udp = pcap::read("cluster.pcap.zst").udp;
    udp.iter()
        .filter(|datagram| datagram.to != 9999)
        .map(|datagram| {
            let message = Message::parse(&datagram.bytes, FSID, &slots).expect("a message");
            assert_eq!(message.to_bytes(FSID), datagram.bytes, "encodes the same");
            assert_eq!(datagram.from, PORT + message.from as u16);
            let to = usize::from(datagram.to - PORT);
            (message.kind, message.from, to, message.term)
        })
        .collect()
}

#[test]
fn every_quorum_datagram_of_the_original_is_one_of_ours() {
    let all = captured();
    let count = |kind| all.iter().filter(|(k, ..)| *k == kind).count();
    println!("{} datagrams", all.len());
    assert_eq!(count(MessageKind::Heartbeat), 1742);
    assert_eq!(count(MessageKind::RequestVote), 12);
    assert_eq!(count(MessageKind::Vote), 4);
    assert_eq!(count(MessageKind::Resignation), 4);
}

#[test]
fn mkfs_writes_the_quorum_blocks_of_the_original() {
    let image = unzstd("quorum.00-mkfs.bin.zst");
    let sb = SuperBlock::from_block(&image[..SM_BLOCK_SIZE]);
    let (meta, data) = (MemDevice::new(64 << 30), MemDevice::new(64 << 30));
    let slots = sb.qconf.present().map(|(nr, addr)| (nr as u64, addr));
    let options = MkfsOptions {
        slots: slots.collect(),
        fsid: Some(FSID),
        uuid: Some(sb.uuid),
        ..MkfsOptions::default()
    };
    let world = TestWorld::new(1, 4096, 4096);
    let now = WallTime { sec: 0, nsec: 0 };
    let env = world.env();
    let made = mkfs(&meta, &data, &*env.entropy, now, &options);
    world.block_on(made).expect("made");
    let ours = meta.peek(FIRST * SM_BLOCK_SIZE as u64, image.len());
    for block in 1..image.len() / SM_BLOCK_SIZE {
        let range = block * SM_BLOCK_SIZE..(block + 1) * SM_BLOCK_SIZE;
        assert_eq!(
            ours[range.clone()],
            image[range],
            "block {}",
            FIRST + block as u64
        );
    }
}

// ---- our agents in the captured members' place ----

/// Latency of a datagram. With none, two members that time out together would not
/// both stand for election.
const LATENCY: Duration = Duration::from_millis(1);

/// Notes what is sent, and delivers it a moment later.
struct Recorder {
    net: TestNetHandle,
    env: RefCell<Option<Env>>,
    said: Rc<RefCell<Vec<Said>>>,
}

struct RecordedSocket {
    socket: Rc<dyn Datagram>,
    env: Env,
    said: Rc<RefCell<Vec<Said>>>,
}

impl Datagram for RecordedSocket {
    fn send_to(&self, bytes: Bytes, to: SocketAddrV4) -> LocalBoxFuture<'_, Result<(), NetError>> {
        let message = Message::parse(&bytes, FSID, &config()).expect("a message");
        let receiver = usize::from(to.port() - PORT);
        self.said
            .borrow_mut()
            .push((message.kind, message.from, receiver, message.term));
        let (env, socket) = (self.env.clone(), self.socket.clone());
        self.env.spawn("in flight", async move {
            env.sleep(LATENCY).await;
            let _ = socket.send_to(bytes, to).await;
        });
        Box::pin(async { Ok(()) })
    }
    fn recv_from(&self) -> LocalBoxFuture<'_, Result<(Bytes, SocketAddrV4), NetError>> {
        self.socket.recv_from()
    }
}

impl Network for Recorder {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        let binding = self.net.bind_datagram(addr);
        let env = self.env.borrow().clone().expect("set at start");
        let said = self.said.clone();
        Box::pin(async move {
            let socket = binding.await?;
            let recorded: Rc<dyn Datagram> = Rc::new(RecordedSocket { socket, env, said });
            Ok(recorded)
        })
    }
    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        self.net.listen(addr)
    }
    fn connect(
        &self,
        addr: SocketAddrV4,
        keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        self.net.connect(addr, keepalive)
    }
}

/// Jitter of a member's election timeouts, as a number of milliseconds of 100.
#[derive(Default)]
struct Jitter(Cell<u64>);

impl Entropy for Jitter {
    fn next_u64(&self) -> u64 {
        (u64::MAX / 100).wrapping_mul(self.0.get())
    }
}

/// A server that comes up, and goes down, when the script says so.
#[derive(Default)]
struct Script {
    phase: Cell<Option<ServerPhase>>,
    changed: Signal,
}

impl Script {
    fn set(&self, phase: ServerPhase) {
        self.phase.set(Some(phase));
        self.changed.wake_all();
    }
    fn get(&self) -> ServerPhase {
        self.phase.get().unwrap_or(ServerPhase::Down)
    }
}

struct Instance {
    script: Rc<Script>,
    seen: ServerPhase,
}

impl ServerInstance for Instance {
    fn phase(&self) -> ServerPhase {
        self.script.get()
    }
    fn may_serve(&self) {
        self.script.set(ServerPhase::Up);
    }
    fn stop(&self) {
        // Nothing to write back in this server: it is down at once.
        self.script.set(ServerPhase::Down);
    }
    fn changed(&mut self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {
            let (script, seen) = (&self.script, self.seen);
            let differs = || Some(script.get()).filter(|phase| *phase != seen);
            self.seen = script.changed.wait_for(differs).await;
        })
    }
}

struct Starter(Rc<Script>);

impl ServerStarter for Starter {
    fn start(&self, _env: &Env, _term: u64) -> Box<dyn ServerInstance> {
        self.0.set(ServerPhase::Starting);
        Box::new(Instance {
            script: self.0.clone(),
            seen: ServerPhase::Starting,
        })
    }
}

struct Member {
    server: Rc<Script>,
    jitter: Rc<Jitter>,
    stop: watch::Sender<AgentStop>,
    status: watch::Receiver<AgentStatus>,
    _heartbeat: watch::Sender<Duration>,
}

struct Cluster {
    world: TestWorld,
    said: Rc<RefCell<Vec<Said>>>,
    env: Env,
}

impl Cluster {
    fn new() -> Self {
        let said: Rc<RefCell<Vec<Said>>> = Rc::default();
        let net = Rc::new(Recorder {
            net: TestNetHandle(Rc::new(TestNet::default())),
            env: RefCell::new(None),
            said: said.clone(),
        });
        let world = TestWorld::with_network(1, 1 << 20, 1 << 20, net.clone());
        net.env.replace(Some(world.env()));
        let image = unzstd("quorum.00-mkfs.bin.zst");
        world.meta.poke(FIRST * SM_BLOCK_SIZE as u64, &image);
        let env = world.env();
        Self { world, said, env }
    }

    fn mount(&self, slot: usize, rid: u64, jitter: u64) -> Member {
        let (stop, stop_rx) = watch::channel(AgentStop::Run);
        let (heartbeat, heartbeat_timeout) = watch::channel(Duration::from_secs(10));
        let (status_tx, status) = watch::channel(AgentStatus::default());
        let member = Member {
            server: Rc::default(),
            jitter: Rc::new(Jitter(Cell::new(jitter))),
            stop,
            status,
            _heartbeat: heartbeat,
        };
        let config = AgentConfig {
            fsid: FSID,
            rid,
            slot,
            slots: config(),
            policy: Policy::default(),
            cluster_key: None,
        };
        let mut env = self.env.clone();
        env.entropy = member.jitter.clone();
        let starter = Rc::new(Starter(member.server.clone()));
        self.env.spawn("agent", async move {
            let inputs = Inputs {
                stop: stop_rx,
                heartbeat_timeout,
            };
            let ended = run(&env, config, starter, inputs, &status_tx).await;
            ended.expect("the service ends well");
        });
        member
    }

    async fn pass(&self, ms: u64) {
        self.env.sleep(Duration::from_millis(ms)).await;
    }

    /// Compares all quorum blocks with the captured ones of this step.
    fn compare(&self, step: &str) {
        let image = unzstd(&format!("quorum.{step}.bin.zst"));
        for (slot, theirs) in image.chunks_exact(SM_BLOCK_SIZE).skip(1).enumerate() {
            let at = (QUORUM_BLKNO + slot as u64) * SM_BLOCK_SIZE as u64;
            let ours = self.world.meta.peek(at, SM_BLOCK_SIZE);
            let (ours, rest) = QuorumBlock::read_from_prefix(&ours).expect("a block");
            let (theirs, their_rest) = QuorumBlock::read_from_prefix(theirs).expect("a block");
            assert_eq!(timeless(ours), timeless(theirs), "slot {slot} at {step}");
            assert_eq!(rest, their_rest, "the rest of slot {slot} at {step}");
        }
    }
}

/// A block without its times, and without the CRC that covers them.
fn timeless(mut block: QuorumBlock) -> QuorumBlock {
    block.hdr.crc.set(0);
    block.events = block.events.map(|event| QuorumEvent {
        ts: Timespec::default(),
        ..event
    });
    block
}

impl Member {
    fn leads(&self) -> bool {
        self.status.borrow().member.is_leader()
    }
}

/// The rid that a later mount wrote into a slot, which is drawn at random.
fn rid_in(step: &str, slot: usize) -> u64 {
    let image = unzstd(&format!("quorum.{step}.bin.zst"));
    let block = &image[(slot + 1) * SM_BLOCK_SIZE..];
    let (block, _) = QuorumBlock::read_from_prefix(block).expect("a block");
    block.events[0].rid.get()
}

#[test]
fn our_members_say_and_record_what_the_captured_ones_did() {
    let cluster = Cluster::new();
    cluster.world.block_on(async {
        cluster.compare("00-mkfs");
        // The first member stands for election once before the others are there.
        let s0 = cluster.mount(0, RIDS[0], 14);
        cluster.pass(330).await;
        let s1 = cluster.mount(1, RIDS[1], 50);
        let s2 = cluster.mount(2, RIDS[2], 90);
        cluster.pass(500).await;
        assert!(s0.leads());
        s0.server.set(ServerPhase::Fenced);
        cluster.pass(1000).await;
        cluster.compare("01-mounted");
        cluster.pass(20_000).await;
        cluster.compare("02-active");
        // The leader unmounts; slot 1 is the first to notice.
        s0.stop.send_replace(AgentStop::Unmount);
        cluster.pass(1000).await;
        assert!(s1.leads());
        s1.server.set(ServerPhase::Fenced);
        cluster.pass(1000).await;
        cluster.compare("03-leader-unmounted");
        let s0 = cluster.mount(0, rid_in("04-remounted", 0), 90);
        cluster.pass(1000).await;
        cluster.compare("04-remounted");
        // The leader is cut off. The others time out together, split their votes,
        // and slot 2 is faster the second time.
        s1.stop.send_replace(AgentStop::Forced);
        s2.jitter.0.set(10);
        cluster.pass(13_000).await;
        assert!(s2.leads() && !s0.leads());
        cluster.compare("05-leader-forced");
        s2.server.set(ServerPhase::Fenced);
        cluster.pass(1000).await;
        cluster.compare("06-leader-fenced");
        let s1 = cluster.mount(1, rid_in("07-client-fenced", 1), 50);
        cluster.pass(1000).await;
        cluster.compare("07-client-fenced");
        for member in [&s0, &s1, &s2] {
            member.stop.send_replace(AgentStop::Unmount);
        }
        cluster.pass(1000).await;
        cluster.compare("08-final");
    });
    let ours = in_short(cluster.said.take());
    let theirs = in_short(captured());
    for (slot, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert_eq!(ours, theirs, "slot {slot}");
    }
}

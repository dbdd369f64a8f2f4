//! Client and listener over a simulated TCP that partitions, holds, resets and
//! crashes hosts, with strangers among them, without and with a cluster key: every
//! request is answered once, whatever happens to the network.

#![allow(
    missing_docs,
    clippy::disallowed_types,
    reason = "a test; turmoil's epoch is a constant SystemTime"
)]

mod host;

use bytes::Bytes;
use outrider_core::client::{Client, ClientConfig, Incoming};
use outrider_core::env::testing::{MemDevice, TestEntropy};
use outrider_core::env::{Duration, Entropy, Env, LocalBoxFuture, NetError, timeout};
use outrider_core::errno::Errno;
use outrider_core::format::{
    InetAddr, Key, Magic, NetCmd, NetLock, OpenInoMap, OpenInoMapArgs, QUORUM_BLKNO, QuorumBlock,
    QuorumEventKind, SM_BLOCK_SIZE, SUPER_BLKNO, SuperBlock, init_header, seal,
};
use outrider_core::secure::{ClusterKey, secured};
use outrider_core::wire::{Connections, GreetingInfo, ListenerConfig, Origin, ServerHooks};
use outrider_net::transport::{Connected, Connecting, Transport, TransportNetwork};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::SystemTime;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};
use turmoil::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use turmoil::net::{TcpListener, TcpStream, UdpSocket};

const FSID: u64 = 0x1122_3344_5566_7788;
const PORT: u16 = 7000;
const KEEPALIVE: Duration = Duration::from_secs(2);
const CLIENTS: u64 = 3;
const REQUESTS: u64 = 60;
/// Milliseconds after which nothing breaks any more.
const FAULT_STEPS: u64 = 20_000;

/// turmoil's sockets. Hosts there bind the unspecified address only.
struct Turmoil;

/// Stands for keepalive and user timeout, which turmoil has not: it never sends a
/// lost segment again, so a connection that lost one stays silent for ever.
struct Impatient {
    socket: OwnedReadHalf,
    limit: Duration,
    silence: Pin<Box<Sleep>>,
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(done) = Pin::new(&mut self.socket).poll_read(cx, buf) {
            let deadline = Instant::now() + self.limit;
            self.silence.as_mut().reset(deadline);
            return Poll::Ready(done);
        }
        let silent = self.silence.as_mut().poll(cx);
        silent.map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

fn split(stream: TcpStream, limit: Duration) -> io::Result<Connected<Impatient, OwnedWriteHalf>> {
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    let (socket, writer) = stream.into_split();
    let reader = Impatient {
        socket,
        limit,
        silence: Box::pin(tokio::time::sleep(limit)),
    };
    Ok(Connected {
        reader,
        writer,
        local,
        peer,
    })
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
}

impl Transport for Turmoil {
    type Reader = Impatient;
    type Writer = OwnedWriteHalf;
    type Listener = TcpListener;
    type Socket = UdpSocket;

    fn connect(&self, addr: SocketAddrV4, keepalive: Duration) -> Connecting<'static, Self> {
        Box::pin(async move { split(TcpStream::connect(SocketAddr::V4(addr)).await?, keepalive) })
    }
    fn listen(&self, addr: SocketAddrV4) -> LocalBoxFuture<'static, io::Result<TcpListener>> {
        Box::pin(TcpListener::bind(any(addr.port())))
    }
    fn listener_addr(listener: &TcpListener) -> io::Result<SocketAddr> {
        listener.local_addr()
    }
    fn accept<'a>(&'a self, listener: &'a TcpListener) -> Connecting<'a, Self> {
        Box::pin(async move { split(listener.accept().await?.0, KEEPALIVE) })
    }
    fn bind(&self, addr: SocketAddrV4) -> LocalBoxFuture<'static, io::Result<UdpSocket>> {
        Box::pin(UdpSocket::bind(any(addr.port())))
    }
    fn send_to<'a>(
        socket: &'a UdpSocket,
        bytes: &'a [u8],
        to: SocketAddrV4,
    ) -> LocalBoxFuture<'a, io::Result<()>> {
        Box::pin(async move { socket.send_to(bytes, SocketAddr::V4(to)).await.map(|_| ()) })
    }
    fn recv_from<'a>(
        socket: &'a UdpSocket,
        buf: &'a mut [u8],
    ) -> LocalBoxFuture<'a, io::Result<(usize, SocketAddr)>> {
        Box::pin(socket.recv_from(buf))
    }
}

fn poke(meta: &MemDevice, blkno: u64, magic: Magic, body: &[u8]) {
    let mut block = vec![0; SM_BLOCK_SIZE];
    block[..body.len()].copy_from_slice(body);
    init_header(&mut block, magic, FSID, blkno, 1);
    seal(&mut block);
    meta.poke(blkno * SM_BLOCK_SIZE as u64, &block);
}

fn write_super(meta: &MemDevice, addrs: &[Ipv4Addr]) {
    let mut sb = SuperBlock::default();
    sb.fmt_vers.set(2);
    for (slot, ip) in addrs.iter().enumerate() {
        sb.qconf.slots[slot] = InetAddr::from_v4(SocketAddrV4::new(*ip, PORT));
        write_elect(meta, slot, 0);
    }
    poke(meta, SUPER_BLKNO, Magic::Super, zerocopy_bytes(&sb));
}

fn write_elect(meta: &MemDevice, slot: usize, term: u64) {
    let mut block = QuorumBlock::default();
    block.events[QuorumEventKind::Elect as usize].term.set(term);
    let blkno = QUORUM_BLKNO + slot as u64;
    poke(meta, blkno, Magic::Quorum, zerocopy_bytes(&block));
}

fn zerocopy_bytes<T: zerocopy::IntoBytes + zerocopy::Immutable>(value: &T) -> &[u8] {
    value.as_bytes()
}

/// Answers everything with the request's number after a while.
struct Server {
    env: Env,
    conns: RefCell<Option<Connections>>,
    handled: RefCell<BTreeSet<(u64, u64)>>,
}

impl ServerHooks for Server {
    fn greet(&self, _greeting: GreetingInfo) -> LocalBoxFuture<'_, Result<(), Errno>> {
        Box::pin(async {
            self.env.sleep(Duration::from_millis(3)).await;
            Ok(())
        })
    }
    fn attached(&self, _rid: u64) {}
    fn gone(&self, _rid: u64) {}
    fn request(&self, origin: Origin, _payload: Bytes) {
        let fresh = self.handled.borrow_mut().insert((origin.rid, origin.id));
        assert!(fresh, "{origin:?} handled twice");
        let pause = Duration::from_millis(self.env.entropy.range(0, 20));
        let (env, conns) = (self.env.clone(), self.conns.borrow().clone());
        self.env.spawn("handler", async move {
            env.sleep(pause).await;
            let id = Bytes::copy_from_slice(&origin.id.to_le_bytes());
            let _ = conns.expect("set at start").respond(&origin, Ok(id));
        });
    }
    fn response(
        &self,
        _rid: u64,
        _id: u64,
        _cmd: NetCmd,
        _body: Result<Bytes, Errno>,
    ) -> Result<(), Errno> {
        Ok(())
    }
    fn reconnect_timeout(&self, _rid: u64, _last_peer: SocketAddrV4) {}
    fn listener_failed(&self, error: NetError) {
        panic!("{error}");
    }
}

/// A host that leads in the next term each time it starts.
async fn serve(
    meta: MemDevice,
    slot: usize,
    terms: Rc<Cell<u64>>,
    key: Option<ClusterKey>,
) -> turmoil::Result {
    let term = terms.get() + 1;
    terms.set(term);
    let net = Rc::new(TransportNetwork::new(Turmoil));
    let env = secured(&host::env(net, meta.clone(), term), key.as_ref());
    let addr = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT);
    let listener = env.net.listen(addr).await.expect("a free port");
    let server = Rc::new(Server {
        env: env.clone(),
        conns: RefCell::new(None),
        handled: RefCell::default(),
    });
    // Longer than any partition here: nobody is to be fenced.
    let mut config = ListenerConfig::new(FSID, 2, term);
    config.reconnect_timeout = Duration::from_secs(600);
    let conns = Connections::start(&env, listener, config, server.clone());
    server.conns.replace(Some(conns));
    write_elect(&meta, slot, term);
    loop {
        // A connection is cut now and then while messages are on their way.
        env.sleep(Duration::from_millis(env.entropy.range(300, 1500)))
            .await;
        let conns = server.conns.borrow().clone().expect("set above");
        conns.break_connection(env.entropy.range(1, CLIENTS + 1));
    }
}

struct Mount;

impl Incoming for Mount {
    fn lock_grant(&self, _lock: NetLock) -> bool {
        true
    }
    fn lock_invalidate(&self, _lock: NetLock, _answer: Box<dyn FnOnce(NetLock)>) {}
    fn lock_recover(&self, _start: Key, _max: usize) -> Vec<NetLock> {
        Vec::new()
    }
    fn open_ino_map(&self, _args: OpenInoMapArgs) -> OpenInoMap {
        OpenInoMap::default()
    }
    fn sync_log_trees(&self) {}
}

async fn mount(
    meta: MemDevice,
    rid: u64,
    answered: Rc<Cell<u64>>,
    key: Option<ClusterKey>,
) -> turmoil::Result {
    let net = Rc::new(TransportNetwork::new(Turmoil));
    let env = secured(&host::env(net, meta.clone(), rid), key.as_ref());
    let mut config = ClientConfig::new(rid, FSID, 2, false);
    config.keepalive = KEEPALIVE;
    let client = Client::new(&env, meta.handle(), config);
    client.start(Rc::new(Mount));
    let mut last = 0;
    for _ in 0..REQUESTS {
        let id = client.get_last_seq().await.expect("an answer");
        assert!(id > last, "answers belong to their requests");
        last = id;
        answered.set(answered.get() + 1);
        env.sleep(Duration::from_millis(50)).await;
    }
    client.sever();
    Ok(())
}

/// Connects again and again, and says nothing, half of a greeting, garbage, or what
/// another cluster's node would.
async fn stranger(servers: [Ipv4Addr; 2], seed: u64, key: Option<ClusterKey>) -> turmoil::Result {
    let net = Rc::new(TransportNetwork::new(Turmoil));
    let plain = host::env(net, MemDevice::new(4096), seed);
    let other = ClusterKey::from_bytes(&[0x55; 32]);
    let env = secured(&plain, key.map(|_| other).as_ref());
    let mut held = VecDeque::new();
    loop {
        plain
            .sleep(Duration::from_millis(plain.entropy.range(1, 60)))
            .await;
        let addr = SocketAddrV4::new(servers[plain.entropy.range(0, 2) as usize], PORT);
        let net = if plain.entropy.range(0, 2) == 0 {
            &plain.net
        } else {
            &env.net
        };
        let Ok(mut stream) = net.connect(addr, KEEPALIVE).await else {
            continue;
        };
        let mut bytes = vec![0; plain.entropy.range(0, 200) as usize];
        bytes
            .iter_mut()
            .for_each(|b| *b = plain.entropy.next_u64() as u8);
        let deadline = plain.clock.now() + Duration::from_millis(50);
        let writing = stream.writer.write(Bytes::from(bytes));
        let _ = timeout(&*plain.clock, deadline, writing).await;
        held.push_back(stream);
        if held.len() > 20 {
            held.pop_front();
        }
    }
}

/// One run; returns how long it took and how many terms there were.
fn run(seed: u64, key: Option<&ClusterKey>) -> (Duration, u64) {
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .epoch(SystemTime::UNIX_EPOCH)
        .simulation_duration(Duration::from_secs(600))
        .enable_random_order()
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(80))
        .build();
    let meta = MemDevice::new(1 << 20);
    let terms = Rc::new(Cell::new(0));
    for slot in 0..2_usize {
        let (meta, terms, key) = (meta.clone(), terms.clone(), key.cloned());
        sim.host(format!("server{slot}"), move || {
            serve(meta.clone(), slot, terms.clone(), key.clone())
        });
    }
    let ip = |name: &str, sim: &turmoil::Sim<'_>| match sim.lookup(name) {
        std::net::IpAddr::V4(ip) => ip,
        other => panic!("{other} is no IPv4 address"),
    };
    let servers = [ip("server0", &sim), ip("server1", &sim)];
    write_super(&meta, &servers);
    let stranger_key = key.cloned();
    sim.host("stranger", move || {
        stranger(servers, seed, stranger_key.clone())
    });
    let answered = Rc::new(Cell::new(0));
    for rid in 1..=CLIENTS {
        sim.client(
            format!("client{rid}"),
            mount(meta.clone(), rid, answered.clone(), key.cloned()),
        );
    }
    let entropy = TestEntropy::new(seed);
    let mut steps = 0_u64;
    while !sim.step().expect("no host fails") {
        steps += 1;
        if steps == FAULT_STEPS {
            heal(&sim);
        } else if steps.is_multiple_of(400) && steps < FAULT_STEPS {
            break_something(&mut sim, &entropy);
        }
    }
    assert_eq!(answered.get(), CLIENTS * REQUESTS);
    (sim.elapsed(), terms.get())
}

fn break_something(sim: &mut turmoil::Sim<'_>, entropy: &TestEntropy) {
    let server = format!("server{}", entropy.range(0, 2));
    let client = format!("client{}", entropy.range(1, CLIENTS + 1));
    match entropy.range(0, 8) {
        0 | 1 => sim.partition(client, server),
        2 => sim.partition_oneway(client, server),
        3 => sim.partition_oneway(server, client),
        4 => sim.hold(client, server),
        5 => sim.bounce(server),
        _ => heal(sim),
    }
}

fn heal(sim: &turmoil::Sim<'_>) {
    for server in ["server0", "server1"] {
        for rid in 1..=CLIENTS {
            sim.release(format!("client{rid}"), server);
            sim.repair(format!("client{rid}"), server);
        }
    }
}

#[test]
fn requests_survive_partitions_holds_resets_and_crashes_among_strangers() {
    let mut failovers = 0;
    for seed in 0..10 {
        let (elapsed, terms) = run(seed, None);
        assert_eq!((elapsed, terms), run(seed, None), "seed {seed} replays");
        failovers += terms - 2;
    }
    assert!(failovers > 0, "some server crashed");
}

#[test]
fn so_they_do_with_a_cluster_key() {
    let key = ClusterKey::from_bytes(&[7; 32]);
    let mut failovers = 0;
    for seed in 100..110 {
        let (elapsed, terms) = run(seed, Some(&key));
        let again = run(seed, Some(&key));
        assert_eq!((elapsed, terms), again, "seed {seed} replays");
        failovers += terms - 2;
    }
    assert!(failovers > 0, "some server crashed");
}

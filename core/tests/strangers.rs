//! A server's listener among strangers: whatever they do, clients are served, nobody
//! is fenced for it, and nothing piles up.

#![allow(missing_docs, reason = "a test")]

use bytes::Bytes;
use outrider_core::env::testing::{TestEntropy, TestWorld};
use outrider_core::env::testnet::{TestNet, TestNetHandle};
use outrider_core::env::{
    Duration, Entropy, Env, Listener, LocalBoxFuture, NetError, Network, Stream, pause, timeout,
};
use outrider_core::errno::Errno;
use outrider_core::format::{NetCmd, NetGreeting};
use outrider_core::secure::{ClusterKey, secured};
use outrider_core::wire::{
    Connections, Decoder, Frame, GreetingInfo, ListenerConfig, Origin, ServerHooks, greeting,
};
use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;

const FSID: u64 = 7;
const TERM: u64 = 3;
const ADDR: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7000);
const KEEPALIVE: Duration = Duration::from_secs(24);

#[derive(Default)]
struct Hooks {
    conns: RefCell<Option<Connections>>,
    greeted: Cell<u32>,
    asked: Cell<u32>,
    fenced: Cell<u32>,
}

impl ServerHooks for Hooks {
    fn greet(&self, _greeting: GreetingInfo) -> LocalBoxFuture<'_, Result<(), Errno>> {
        self.greeted.set(self.greeted.get() + 1);
        Box::pin(async { Ok(()) })
    }
    fn attached(&self, _rid: u64) {}
    fn gone(&self, _rid: u64) {}
    fn request(&self, origin: Origin, payload: Bytes) {
        self.asked.set(self.asked.get() + 1);
        let conns = self.conns.borrow();
        let _ = conns.as_ref().expect("set").respond(&origin, Ok(payload));
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
    fn reconnect_timeout(&self, _rid: u64, _last_peer: SocketAddrV4) {
        self.fenced.set(self.fenced.get() + 1);
    }
    fn listener_failed(&self, error: NetError) {
        panic!("{error}");
    }
}

/// Says that connections come from wherever the test says.
struct FromAnywhere {
    inner: Box<dyn Listener>,
    host: Rc<Cell<Ipv4Addr>>,
}

impl Listener for FromAnywhere {
    fn accept(&mut self) -> LocalBoxFuture<'_, Result<Stream, NetError>> {
        Box::pin(async {
            let mut stream = self.inner.accept().await?;
            stream.peer.set_ip(self.host.get());
            Ok(stream)
        })
    }
    fn local_addr(&self) -> SocketAddrV4 {
        self.inner.local_addr()
    }
}

struct Server {
    world: TestWorld,
    /// Network of everybody without a key.
    plain: Env,
    /// Network of the server and its clients.
    env: Env,
    hooks: Rc<Hooks>,
    host: Rc<Cell<Ipv4Addr>>,
}

impl Server {
    fn start(key: Option<ClusterKey>, change: impl FnOnce(&mut ListenerConfig)) -> Self {
        let net = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
        let world = TestWorld::with_network(1, 1 << 20, 1 << 20, net);
        let plain = world.env();
        let env = secured(&plain, key.as_ref());
        let hooks = Rc::new(Hooks::default());
        let host = Rc::new(Cell::new(Ipv4Addr::LOCALHOST));
        let mut config = ListenerConfig::new(FSID, 2, TERM);
        change(&mut config);
        let inner = world.block_on(env.net.listen(ADDR)).expect("listen");
        let listener = Box::new(FromAnywhere {
            inner,
            host: host.clone(),
        });
        let conns = Connections::start(&env, listener, config, hooks.clone());
        hooks.conns.replace(Some(conns));
        Self {
            world,
            plain,
            env,
            hooks,
            host,
        }
    }

    async fn connect(&self, net: &Rc<dyn Network>) -> Stream {
        let stream = net.connect(ADDR, KEEPALIVE).await.expect("connect");
        pause().await;
        stream
    }

    async fn client(&self, rid: u64) -> Client {
        let stream = self.connect(&self.env.net).await;
        let mut client = Client {
            env: self.env.clone(),
            stream,
            decoder: Decoder::default(),
            seq: 1,
        };
        let asked = NetGreeting {
            fsid: FSID.into(),
            fmt_vers: 2.into(),
            server_term: 0.into(),
            rid: rid.into(),
            flags: 0.into(),
        };
        let request = greeting::request(1, 0, 1, &asked);
        client.write(request.to_bytes()).await;
        let answer = client.next().await.expect("an answer to the greeting");
        assert_eq!(greeting::accept_response(&answer, &asked), Ok(TERM));
        client
    }
}

struct Client {
    env: Env,
    stream: Stream,
    decoder: Decoder,
    seq: u64,
}

impl Client {
    async fn write(&mut self, bytes: Bytes) {
        let written = self.stream.writer.write(bytes).await;
        written.expect("written");
    }

    async fn next(&mut self) -> Option<Frame> {
        let deadline = self.env.clock.now() + Duration::from_secs(5);
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("a message") {
                return Some(frame);
            }
            let read = timeout(&*self.env.clock, deadline, self.stream.reader.read()).await;
            let chunk = read.expect("an answer in time").ok()?;
            if chunk.is_empty() {
                return None;
            }
            self.decoder.push(&chunk);
        }
    }

    fn request(&mut self, acked: u64) -> Bytes {
        self.seq += 1;
        let frame = Frame {
            seq: self.seq,
            recv_seq: acked,
            id: self.seq,
            cmd: NetCmd::GetRoots,
            response: false,
            body: Ok(Bytes::from(vec![5; 1000])),
        };
        frame.to_bytes()
    }

    async fn ask(&mut self) {
        let request = self.request(self.seq);
        self.write(request).await;
        let answer = self.next().await.expect("an answer");
        assert_eq!((answer.id, answer.response), (self.seq, true));
    }
}

#[test]
fn thousands_that_never_greet_cost_nobody_a_place() {
    for key in [None, Some(ClusterKey::from_bytes(&[9; 32]))] {
        let server = Server::start(key, |config| config.max_strangers = 50);
        server.world.block_on(async {
            let mut early = server.client(1).await;
            // From another host, and slow: it must not go for the flood's sake.
            server.host.set(Ipv4Addr::new(10, 0, 0, 1));
            let mut slow = server.connect(&server.plain.net).await;
            server.host.set(Ipv4Addr::new(10, 0, 0, 2));
            let (mut flood, mut clients) = (Vec::new(), Vec::new());
            for n in 0..3000 {
                flood.push(server.connect(&server.plain.net).await);
                if n % 500 == 0 {
                    early.ask().await;
                    let mut client = server.client(100 + n).await;
                    client.ask().await;
                    clients.push(client);
                }
            }
            let mut open = 0;
            for stream in &mut flood {
                let now = server.plain.clock.now();
                let read = timeout(&*server.plain.clock, now, stream.reader.read()).await;
                open += u32::from(read.is_none());
            }
            assert!((40..=50).contains(&open), "{open} of the flood are kept");
            let now = server.plain.clock.now();
            let read = timeout(&*server.plain.clock, now, slow.reader.read()).await;
            assert!(
                read.is_none(),
                "the slow one of the other host is still there"
            );
            early.ask().await;
            // Then silence: all of them go in time, and nobody is fenced.
            server.plain.sleep(Duration::from_secs(19)).await;
            early.ask().await;
            server.plain.sleep(Duration::from_secs(2)).await;
            assert_eq!(slow.reader.read().await, Ok(Bytes::new()));
            early.ask().await;
            assert_eq!(server.hooks.greeted.get(), 7);
        });
        assert_eq!(server.hooks.fenced.get(), 0);
    }
}

#[test]
fn garbage_of_all_kinds_is_dropped_and_fences_nobody() {
    for key in [None, Some(ClusterKey::from_bytes(&[9; 32]))] {
        let server = Server::start(key, |_| {});
        let entropy = TestEntropy::new(5);
        server.world.block_on(async {
            let mut client = server.client(1).await;
            for n in 0..2000_u64 {
                let mut stream = server.connect(&server.plain.net).await;
                let mut bytes = vec![0; entropy.range(0, 300) as usize];
                match n % 4 {
                    0 => bytes.iter_mut().for_each(|b| *b = entropy.next_u64() as u8),
                    // A valid message that is no greeting.
                    1 => bytes = client.request(0).to_vec(),
                    // A greeting of another volume.
                    2 => {
                        let other = NetGreeting::default();
                        bytes = greeting::request(1, 0, 1, &other).to_bytes().to_vec();
                    }
                    _ => bytes.fill(n as u8),
                }
                let _ = stream.writer.write(Bytes::from(bytes)).await;
                if n % 3 == 0 {
                    let _ = stream.writer.shutdown().await;
                }
                if n % 100 == 0 {
                    client.ask().await;
                }
            }
            server.plain.sleep(Duration::from_secs(60)).await;
            client.ask().await;
        });
        assert_eq!(server.hooks.greeted.get(), 1, "only the client was judged");
        assert_eq!(server.hooks.fenced.get(), 0);
    }
}

#[test]
fn a_client_that_acknowledges_nothing_is_cut_off_before_it_costs_memory() {
    let server = Server::start(None, |config| config.max_kept = 256 << 10);
    server.world.block_on(async {
        let mut rude = server.client(1).await;
        let mut polite = server.client(2).await;
        let mut cut = false;
        for _ in 0..2000 {
            let request = rude.request(0);
            cut |= rude.stream.writer.write(request).await.is_err();
            pause().await;
            cut |= rude.next().await.is_none();
            if cut {
                break;
            }
        }
        assert!(cut, "it is cut off");
        assert!(server.hooks.asked.get() < 500, "soon");
        polite.ask().await;
    });
}

#[test]
fn a_flood_of_one_client_does_not_hold_up_another() {
    let server = Server::start(None, |_| {});
    server.world.block_on(async {
        let mut flood = server.client(1).await;
        let mut other = server.client(2).await;
        for _ in 0..2000 {
            let request = flood.request(flood.seq);
            flood.write(request).await;
        }
        let before = server.hooks.asked.get();
        other.ask().await;
        let between = server.hooks.asked.get() - before;
        assert!(between < 500, "{between} of the flood came first");
    });
}

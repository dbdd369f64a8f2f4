//! A client and a server's listener, joined by a network that cuts chunks and
//! connections anywhere.

use super::{Client, ClientConfig, ClientError, Incoming};
use crate::block::Policy;
use crate::block::testvol::Vol;
use crate::btree;
use crate::env::testing::{TestEntropy, TestWorld, block_on, yield_now};
use crate::env::testnet::{TestNet, TestNetHandle};
use crate::env::{
    Datagram, Duration, Entropy, Env, Listener, LocalBoxFuture, NetError, Network, Stream,
    StreamReader, StreamWriter,
};
use crate::errno::Errno;
use crate::format::{
    BtreeRoot, Key, LG_BLOCK_SHIFT, Magic, MountedClient, NetCmd, NetGreeting, NetLock, OpenInoMap,
    OpenInoMapArgs, QUORUM_BLKNO, QuorumBlock, QuorumEventKind, SM_BLOCK_SIZE, SUPER_BLKNO,
    SuperBlock, init_header, seal,
};
use crate::wire::{
    Connections, Decoder, Frame, GreetingInfo, ListenerConfig, Origin, ServerHooks, greeting,
};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use zerocopy::IntoBytes;

const FSID: u64 = 0x1122_3344_5566_7788;
const RID: u64 = 0xa1b2_c3d4_e5f6_0718;

fn slot_addr(slot: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7000 + slot)
}

/// A network that breaks connections after a random number of bytes.
struct Faulty {
    inner: TestNetHandle,
    entropy: Rc<TestEntropy>,
    /// Most bytes before a break; 0 for none.
    lifetime: Rc<Cell<u64>>,
}

/// Bytes that may still pass; `None` without limit.
#[derive(Clone)]
struct Budget(Rc<Cell<Option<u64>>>, Rc<TestEntropy>);

impl Budget {
    /// Takes up to `len` bytes; less than that is the end of the connection.
    fn take(&self, len: usize) -> usize {
        let Some(left) = self.0.get() else { return len };
        let taken = left.min(len as u64);
        self.0.set(Some(left - taken));
        taken as usize
    }
}

struct FaultyReader(Box<dyn StreamReader>, Budget, Bytes);

impl StreamReader for FaultyReader {
    fn read(&mut self) -> LocalBoxFuture<'_, Result<Bytes, NetError>> {
        Box::pin(async {
            if self.2.is_empty() {
                self.2 = self.0.read().await?;
                if self.2.is_empty() {
                    return Ok(Bytes::new());
                }
            }
            let piece = self.1.1.range(1, self.2.len() as u64 + 1) as usize;
            if self.1.take(piece) < piece {
                return Err(NetError::Reset);
            }
            Ok(self.2.split_to(piece))
        })
    }
}

struct FaultyWriter(Box<dyn StreamWriter>, Budget);

impl StreamWriter for FaultyWriter {
    fn write(&mut self, bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async move {
            let part = self.1.take(bytes.len());
            if part > 0 {
                self.0.write(bytes.slice(..part)).await?;
            }
            if part < bytes.len() {
                return Err(NetError::Reset);
            }
            Ok(())
        })
    }
    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>> {
        self.0.shutdown()
    }
}

impl Network for Faulty {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        self.inner.bind_datagram(addr)
    }
    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        self.inner.listen(addr)
    }
    fn connect(
        &self,
        addr: SocketAddrV4,
        keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        let connecting = self.inner.connect(addr, keepalive);
        let left = match self.lifetime.get() {
            0 => None,
            max => Some(self.entropy.range(0, max)),
        };
        let budget = Budget(Rc::new(Cell::new(left)), self.entropy.clone());
        Box::pin(async move {
            let stream = connecting.await?;
            Ok(Stream {
                reader: Box::new(FaultyReader(stream.reader, budget.clone(), Bytes::new())),
                writer: Box::new(FaultyWriter(stream.writer, budget)),
                ..stream
            })
        })
    }
}

struct World {
    world: TestWorld,
    lifetime: Rc<Cell<u64>>,
}

impl World {
    fn new(seed: u64) -> Self {
        let lifetime = Rc::new(Cell::new(0));
        let net = Rc::new(Faulty {
            inner: TestNetHandle(Rc::new(TestNet::default())),
            entropy: TestEntropy::new(seed ^ 0xfeed),
            lifetime: lifetime.clone(),
        });
        let world = TestWorld::with_network(seed, 1 << 20, 1 << 20, net);
        let this = Self { world, lifetime };
        this.write_super(BtreeRoot::default());
        for slot in 0..3 {
            this.write_quorum(slot, 0, 0);
        }
        this
    }

    fn poke(&self, blkno: u64, magic: Magic, body: &[u8]) {
        let mut block = vec![0; SM_BLOCK_SIZE];
        block[..body.len()].copy_from_slice(body);
        init_header(&mut block, magic, FSID, blkno, 1);
        seal(&mut block);
        self.world.meta.poke(blkno * SM_BLOCK_SIZE as u64, &block);
    }

    /// Whether the mount is on the list of mounted clients.
    fn set_mounted(&self, mounted: bool) {
        let mut root = BtreeRoot::default();
        if mounted {
            let vol = Vol::new(1, 16, Policy::default());
            let key = Key::mounted_client(RID);
            let item = MountedClient::default();
            block_on(async {
                let inserted = btree::insert(&vol.tx, &mut root, &key, item.as_bytes());
                inserted.await.expect("inserted");
                vol.tx.prepare_commit();
                vol.tx.write().await.expect("written");
            });
            let start = 2 << LG_BLOCK_SHIFT;
            let blocks = vol.dev.peek(start, 14 << LG_BLOCK_SHIFT);
            self.world.meta.poke(start, &blocks);
        }
        self.write_super(root);
    }

    fn write_super(&self, mounted_clients: BtreeRoot) {
        let mut sb = SuperBlock {
            mounted_clients,
            ..SuperBlock::default()
        };
        sb.fmt_vers.set(2);
        for slot in 0..3 {
            sb.qconf.slots[slot] = crate::format::InetAddr::from_v4(slot_addr(slot as u16));
        }
        self.poke(SUPER_BLKNO, Magic::Super, sb.as_bytes());
    }

    fn write_quorum(&self, slot: u64, elect: u64, stop: u64) {
        let mut block = QuorumBlock::default();
        block.events[QuorumEventKind::Elect as usize]
            .term
            .set(elect);
        block.events[QuorumEventKind::Stop as usize].term.set(stop);
        self.poke(QUORUM_BLKNO + slot, Magic::Quorum, block.as_bytes());
    }

    fn env(&self) -> Env {
        self.world.env()
    }

    fn client(&self, rid: u64, mount: &Rc<Mount>) -> Client {
        let meta = self.world.meta.handle();
        let config = ClientConfig::new(rid, FSID, 2, true);
        let client = Client::new(&self.env(), meta, config);
        client.start(mount.clone());
        client
    }

    /// A server of `term` in `slot`, and its quorum record.
    async fn server(&self, slot: u16, term: u64) -> Rc<Server> {
        self.write_quorum(u64::from(slot), term, 0);
        let listener = self.env().net.listen(slot_addr(slot)).await.expect("free");
        let server = Rc::new(Server {
            env: self.env(),
            entropy: self.world.entropy.clone(),
            term,
            ..Server::new(self.env(), self.world.entropy.clone())
        });
        let config = ListenerConfig::new(FSID, 2, term);
        let conns = Connections::start(&self.env(), listener, config, server.clone());
        server.conns.replace(Some(conns));
        server
    }
}

/// What a mount sees.
#[derive(Default)]
struct Mount {
    invalidated: RefCell<Vec<u64>>,
    granted: RefCell<BTreeSet<u64>>,
    /// So many grants are refused.
    refuses: Cell<u32>,
    synced: Cell<u32>,
}

impl Incoming for Mount {
    fn lock_grant(&self, lock: NetLock) -> bool {
        if let Some(left) = self.refuses.get().checked_sub(1) {
            self.refuses.set(left);
            return false;
        }
        let fresh = self.granted.borrow_mut().insert(lock.write_seq.get());
        assert!(fresh, "granted twice");
        true
    }
    fn lock_invalidate(&self, lock: NetLock, answer: Box<dyn FnOnce(NetLock)>) {
        self.invalidated.borrow_mut().push(lock.write_seq.get());
        answer(lock);
    }
    fn lock_recover(&self, start: Key, max: usize) -> Vec<NetLock> {
        assert_eq!(max, 22);
        let lock = NetLock {
            new_mode: 1,
            ..NetLock::default()
        };
        if start.is_zeros() {
            vec![lock; 22]
        } else {
            Vec::new()
        }
    }
    fn open_ino_map(&self, args: OpenInoMapArgs) -> OpenInoMap {
        OpenInoMap {
            args,
            bits: [3.into(); 16],
        }
    }
    fn sync_log_trees(&self) {
        self.synced.set(self.synced.get() + 1);
    }
}

/// A server that answers GET_LAST_SEQ with the request's number, after a while.
struct Server {
    env: Env,
    entropy: Rc<TestEntropy>,
    term: u64,
    conns: RefCell<Option<Connections>>,
    refuse: Cell<Option<Errno>>,
    greeted: RefCell<Vec<GreetingInfo>>,
    attached: RefCell<BTreeMap<u64, i32>>,
    handled: RefCell<BTreeSet<(u64, u64)>>,
    responses: RefCell<Vec<(NetCmd, usize)>>,
    expired: RefCell<Vec<u64>>,
    /// Requests are swallowed.
    mute: Cell<bool>,
    /// What lock requests are answered with instead, the last one first.
    lies: RefCell<Vec<Result<Bytes, Errno>>>,
    /// The first lock request stays queued whatever it was answered with: another one
    /// for the lock is a breach.
    queues: Cell<bool>,
}

impl Server {
    fn new(env: Env, entropy: Rc<TestEntropy>) -> Self {
        Self {
            env,
            entropy,
            term: 0,
            conns: RefCell::default(),
            refuse: Cell::new(None),
            greeted: RefCell::default(),
            attached: RefCell::default(),
            handled: RefCell::default(),
            responses: RefCell::default(),
            expired: RefCell::default(),
            mute: Cell::new(false),
            lies: RefCell::default(),
            queues: Cell::default(),
        }
    }

    fn conns(&self) -> Connections {
        self.conns.borrow().clone().expect("started")
    }

    fn up(&self, rid: u64) -> i32 {
        self.attached.borrow().get(&rid).copied().unwrap_or(0)
    }
}

impl ServerHooks for Server {
    fn greet(&self, greeting: GreetingInfo) -> LocalBoxFuture<'_, Result<(), Errno>> {
        self.greeted.borrow_mut().push(greeting);
        Box::pin(async {
            let pause = Duration::from_micros(self.entropy.range(0, 3000));
            self.env.sleep(pause).await;
            self.refuse.get().map_or(Ok(()), Err)
        })
    }
    fn attached(&self, rid: u64) {
        *self.attached.borrow_mut().entry(rid).or_default() += 1;
        assert_eq!(self.up(rid), 1, "one session for each rid");
    }
    fn gone(&self, rid: u64) {
        *self.attached.borrow_mut().entry(rid).or_default() -= 1;
        assert_eq!(self.up(rid), 0);
    }
    fn request(&self, origin: Origin, payload: Bytes) {
        let fresh = self.handled.borrow_mut().insert((origin.rid, origin.id));
        assert!(fresh, "{origin:?} handled twice by term {}", self.term);
        if self.mute.get() {
            return;
        }
        let lied = self.lies.borrow().is_empty();
        if origin.cmd == NetCmd::Lock && self.queues.get() && lied {
            self.conns().break_connection(origin.rid);
            return;
        }
        let body = match origin.cmd {
            NetCmd::GetLastSeq => Ok(Bytes::copy_from_slice(&origin.id.to_le_bytes())),
            NetCmd::AllocInodes => Ok(Bytes::from_static(&[0; 16])),
            NetCmd::Lock => self.lies.borrow_mut().pop().unwrap_or(Ok(payload)),
            _ => Ok(Bytes::new()),
        };
        let pause = Duration::from_micros(self.entropy.range(0, 5000));
        let (conns, env) = (self.conns(), self.env.clone());
        self.env.spawn("handler", async move {
            env.sleep(pause).await;
            // The session may be gone with the client.
            let _ = conns.respond(&origin, body);
        });
    }
    fn response(
        &self,
        rid: u64,
        _id: u64,
        cmd: NetCmd,
        body: Result<Bytes, Errno>,
    ) -> Result<(), Errno> {
        assert_eq!(self.up(rid), 1);
        self.responses.borrow_mut().push((cmd, body?.len()));
        Ok(())
    }
    fn reconnect_timeout(&self, rid: u64, _last_peer: SocketAddrV4) {
        self.expired.borrow_mut().push(rid);
    }
    fn listener_failed(&self, error: NetError) {
        panic!("{error}");
    }
}

async fn until(env: &Env, what: &str, done: impl Fn() -> bool) {
    for _ in 0..100_000 {
        if done() {
            return;
        }
        env.sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

#[test]
fn requests_are_answered_once_through_broken_connections() {
    for seed in 0..30 {
        let w = World::new(seed);
        let env = w.env();
        w.world.block_on(async {
            let server = w.server(1, 5).await;
            let mount = Rc::new(Mount::default());
            let client = w.client(RID, &mount);
            w.lifetime.set(600);
            let answered = Rc::new(Cell::new(0));
            for n in 0..40_u64 {
                let (one, answered, pause) = (
                    client.clone(),
                    answered.clone(),
                    env.sleep(Duration::from_millis(n * 3)),
                );
                env.spawn("asker", async move {
                    pause.await;
                    one.get_last_seq().await.expect("answered");
                    answered.set(answered.get() + 1);
                });
                let lock = NetLock {
                    write_seq: (n + 1).into(),
                    ..NetLock::default()
                };
                client.lock(&lock).expect("not severed");
            }
            until(&env, "attached", || server.up(RID) == 1).await;
            for n in 1..=40_u64 {
                let lock = NetLock {
                    write_seq: n.into(),
                    ..NetLock::default()
                };
                let payload = Bytes::copy_from_slice(lock.as_bytes());
                let conns = server.conns();
                conns.request(RID, NetCmd::Lock, payload).expect("attached");
                env.sleep(Duration::from_millis(2)).await;
            }
            w.lifetime.set(0);
            until(&env, "all answered", || {
                answered.get() == 40
                    && mount.granted.borrow().len() == 40
                    && server.responses.borrow().len() == 40
            })
            .await;
            let order: Vec<u64> = (1..=40).collect();
            assert_eq!(*mount.invalidated.borrow(), order, "in order, once");
            assert!(server.expired.borrow().is_empty());
            server.conns().shutdown().await;
            client.sever();
        });
    }
}

#[test]
fn a_new_server_gets_everything_unanswered() {
    for seed in 0..20 {
        let w = World::new(seed);
        let env = w.env();
        w.world.block_on(async {
            let first = w.server(0, 5).await;
            first.mute.set(true);
            let client = w.client(RID, &Rc::new(Mount::default()));
            let answered = Rc::new(Cell::new(0));
            for _ in 0..10 {
                let (one, answered) = (client.clone(), answered.clone());
                env.spawn("asker", async move {
                    one.get_last_seq().await.expect("answered");
                    answered.set(answered.get() + 1);
                });
            }
            until(&env, "seen", || first.handled.borrow().len() == 10).await;
            first.conns().shutdown().await;
            w.write_quorum(0, 5, 5);
            let second = w.server(2, 6).await;
            until(&env, "answered", || answered.get() == 10).await;
            assert_eq!(client.server_term(), 6);
            let greeting = second.greeted.borrow()[0];
            assert_eq!((greeting.client_term, greeting.first_contact), (5, true));
            // The new server asks for what it must learn.
            for key in [Key::ZEROS, Key::ONES] {
                let key = Bytes::copy_from_slice(&key.to_bytes());
                let asked = second.conns().request(RID, NetCmd::LockRecover, key);
                asked.expect("attached");
            }
            let args = Bytes::from_static(&[0; 16]);
            let asked = second.conns().request(RID, NetCmd::OpenInoMap, args);
            asked.expect("attached");
            let sync = NetCmd::SyncLogTrees;
            let asked = second.conns().request(RID, sync, Bytes::new());
            asked.expect("attached");
            until(&env, "answers", || second.responses.borrow().len() == 4).await;
            assert_eq!(
                *second.responses.borrow(),
                [
                    (NetCmd::LockRecover, 1064),
                    (NetCmd::LockRecover, 8),
                    (NetCmd::OpenInoMap, 144),
                    (sync, 0)
                ]
            );
            client.sever();
        });
    }
}

#[test]
fn a_client_leaves_a_leader_that_was_stopped_in_its_tracks_for_its_successor() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        // It keeps its connections, and never answers.
        let paused = w.server(0, 5).await;
        paused.mute.set(true);
        let client = w.client(RID, &Rc::new(Mount::default()));
        until(&env, "greeted", || client.server_term() == 5).await;
        env.sleep(Duration::from_secs(12)).await;
        assert_eq!(client.detached_for(), None, "nobody else leads");
        let start = env.clock.now();
        let successor = w.server(2, 6).await;
        until(&env, "greeted", || client.server_term() == 6).await;
        let took = env.clock.now().since(start);
        assert!(took < Duration::from_secs(10), "{took:?} of 30 seconds");
        assert_eq!(successor.greeted.borrow()[0].client_term, 5);
        client.sever();
    });
}

#[test]
fn a_client_that_stays_away_is_reported_once_and_one_that_said_farewell_never() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        let server = w.server(1, 5).await;
        let gone = w.client(RID, &Rc::new(Mount::default()));
        let polite = w.client(7, &Rc::new(Mount::default()));
        until(&env, "both", || server.conns().clients().len() == 2).await;
        gone.sever();
        assert_eq!(gone.get_roots().await, Err(ClientError::Severed));
        polite.farewell().await;
        assert_eq!(polite.get_roots().await, Err(ClientError::Closed));
        until(&env, "freed", || server.up(7) == 0).await;
        assert_eq!(server.up(RID), 1);
        env.sleep(Duration::from_millis(19_900)).await;
        assert!(server.expired.borrow().is_empty());
        env.sleep(Duration::from_secs(60)).await;
        assert_eq!(*server.expired.borrow(), [RID]);
        assert_eq!(server.up(RID), 0);
        let late = server.conns().request(RID, NetCmd::Lock, Bytes::new());
        assert!(late.is_err());
    });
}

#[test]
fn a_lock_that_was_granted_otherwise_is_asked_for_again() {
    let asked = NetLock {
        key: Key::mounted_client(7).into(),
        write_seq: 3.into(),
        new_mode: 1,
        ..NetLock::default()
    };
    let answer = |lock: NetLock| Ok(Bytes::copy_from_slice(lock.as_bytes()));
    let other_mode = NetLock {
        new_mode: 2,
        ..asked
    };
    let other_key = NetLock {
        key: Key::mounted_client(8).into(),
        ..asked
    };
    let lies = [
        Some(answer(other_mode)),
        Some(answer(other_key)),
        Some(Ok(Bytes::from_static(&[0; 5]))),
        Some(Err(Errno::EIO)),
        // Right as far as the client can see, but not for the mount.
        None,
    ];
    for lie in lies {
        let w = World::new(1);
        let env = w.env();
        w.world.block_on(async {
            let server = w.server(1, 5).await;
            let mount = Rc::new(Mount::default());
            mount.refuses.set(u32::from(lie.is_none()));
            server.lies.replace(lie.into_iter().collect());
            let client = w.client(RID, &mount);
            until(&env, "attached", || server.up(RID) == 1).await;
            client.lock(&asked).expect("not severed");
            until(&env, "granted", || mount.granted.borrow().contains(&3)).await;
            assert_eq!(server.handled.borrow().len(), 2, "asked twice");
            assert_eq!(server.greeted.borrow().len(), 2, "on two connections");
            assert!(client.get_last_seq().await.is_ok());
        });
    }
}

#[test]
fn a_server_that_grants_otherwise_for_ever_keeps_nobody_busy() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        let server = w.server(1, 5).await;
        let mount = Rc::new(Mount::default());
        mount.refuses.set(u32::MAX);
        let client = w.client(RID, &mount);
        client.lock(&NetLock::default()).expect("not severed");
        env.sleep(Duration::from_secs(2)).await;
        let asked = server.handled.borrow().len();
        assert!((2..=20).contains(&asked), "asked {asked} times");
        // Another server leads, and does better.
        let next = w.server(2, 6).await;
        until(&env, "found", || next.up(RID) == 1).await;
        mount.refuses.set(0);
        until(&env, "granted", || !mount.granted.borrow().is_empty()).await;
    });
}

/// The server has received the second request and will not see it again, and answers the
/// first one under a number that is not asked for any more: the next leader has to. All
/// else goes on.
#[test]
fn a_lock_that_is_still_queued_after_a_false_answer_is_granted_by_the_next_leader() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        let server = w.server(1, 5).await;
        let mount = Rc::new(Mount::default());
        server.lies.replace(vec![Err(Errno::EIO)]);
        server.queues.set(true);
        let client = w.client(RID, &mount);
        let asked = NetLock {
            write_seq: 3.into(),
            ..NetLock::default()
        };
        client.lock(&asked).expect("not severed");
        // One connection is closed by the client, and one by the server.
        until(&env, "third", || server.greeted.borrow().len() == 3).await;
        for _ in 0..20 {
            assert!(client.get_last_seq().await.is_ok());
            env.sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(server.greeted.borrow().len(), 3, "one connection since");
        assert_eq!(server.handled.borrow().len(), 2 + 20, "asked twice");
        assert!(mount.granted.borrow().is_empty());
        let next = w.server(2, 6).await;
        server.conns().break_connection(RID);
        until(&env, "found", || next.up(RID) == 1).await;
        until(&env, "granted", || mount.granted.borrow().contains(&3)).await;
        assert_eq!(next.handled.borrow().len(), 1, "asked once");
    });
}

/// As one does that takes each of this client's messages for a breach.
#[test]
fn a_server_that_closes_every_connection_keeps_nobody_busy() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        let server = w.server(1, 5).await;
        let mount = Rc::new(Mount::default());
        let client = w.client(RID, &mount);
        let end = env.clock.now() + Duration::from_secs(2);
        while env.clock.now() < end {
            if server.up(RID) == 1 {
                server.conns().break_connection(RID);
            }
            env.sleep(Duration::from_millis(1)).await;
        }
        let greeted = server.greeted.borrow().len();
        assert!((2..=25).contains(&greeted), "greeted {greeted} times");
        until(&env, "there", || server.up(RID) == 1).await;
        assert!(client.get_last_seq().await.is_ok());
    });
}

#[test]
fn a_severed_client_gives_up_what_waits() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        let server = w.server(1, 5).await;
        server.mute.set(true);
        let client = w.client(RID, &Rc::new(Mount::default()));
        let (one, task_env) = (client.clone(), env.clone());
        env.spawn("sever", async move {
            task_env.sleep(Duration::from_secs(2)).await;
            one.sever();
        });
        assert_eq!(client.get_log_trees().await, Err(ClientError::Aborted));
        assert_eq!(client.statfs().await, Err(ClientError::Severed));
        assert!(client.is_severed());
    });
}

#[test]
fn answers_are_checked() {
    let w = World::new(1);
    w.world.block_on(async {
        let _server = w.server(1, 5).await;
        let client = w.client(RID, &Rc::new(Mount::default()));
        // The test's server answers all zero bytes, or none.
        assert_eq!(
            client.alloc_inodes(10).await,
            Err(ClientError::Inodes(Errno::ENOSPC))
        );
        assert_eq!(
            client.get_log_trees().await.err(),
            Some(ClientError::Length {
                expected: 472,
                found: 0
            })
        );
        assert_eq!(client.resize_devices(0, 0).await, Ok(()));
    });
}

/// Sends bytes to the server and reads until it closes.
async fn scan(env: &Env, slot: u16, bytes: &[u8]) -> Vec<u8> {
    let keepalive = Duration::from_secs(24);
    let connecting = env.net.connect(slot_addr(slot), keepalive);
    let mut stream = connecting.await.expect("listens");
    let sent = stream.writer.write(Bytes::copy_from_slice(bytes)).await;
    sent.expect("written");
    let mut all = Vec::new();
    while let Ok(chunk) = stream.reader.read().await {
        if chunk.is_empty() {
            break;
        }
        all.extend_from_slice(&chunk);
    }
    all
}

fn hello(id: u64, term: u64, rid: u64, flags: u64, fsid: u64) -> Bytes {
    let message = NetGreeting {
        fsid: fsid.into(),
        fmt_vers: 2.into(),
        server_term: term.into(),
        rid: rid.into(),
        flags: flags.into(),
    };
    greeting::request(1, 0, id, &message).to_bytes()
}

#[test]
fn strangers_get_nothing_and_get_nobody_fenced() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        let server = w.server(1, 5).await;
        assert!(
            scan(
                &env,
                1,
                b"GET / HTTP/1.1\r\nHost: outrider.example.org\r\n\r\n"
            )
            .await
            .is_empty()
        );
        // A message before the greeting, and a silent one.
        let early = Frame {
            seq: 1,
            recv_seq: 0,
            id: 1,
            cmd: NetCmd::Statfs,
            response: false,
            body: Ok(Bytes::new()),
        };
        assert!(scan(&env, 1, &early.to_bytes()).await.is_empty());
        assert!(scan(&env, 1, b"").await.is_empty());
        assert!(server.greeted.borrow().is_empty(), "no hook was asked");
        // Refusals that the listener decides alone.
        let wrong = [
            hello(1, 0, RID, 0, FSID + 1),
            hello(1, 0, 0, 0, FSID),
            hello(1, 0, u64::MAX, 0, FSID),
        ];
        for bytes in wrong {
            let answer = scan(&env, 1, &bytes).await;
            let mut decoder = Decoder::default();
            decoder.push(&answer);
            let refusal = decoder.next_frame().expect("valid").expect("whole");
            assert_eq!(refusal.body, Err(Errno::EINVAL));
        }
        assert!(server.greeted.borrow().is_empty());
        // Refused by the server.
        server.refuse.set(Some(Errno::EIO));
        assert_eq!(scan(&env, 1, &hello(1, 0, RID, 0, FSID)).await.len(), 32);
        server.refuse.set(None);
        // A reconnect without a session, and the same with the farewell flag.
        assert_eq!(scan(&env, 1, &hello(9, 5, RID, 0, FSID)).await.len(), 32);
        assert_eq!(server.up(RID), 0);
        env.sleep(Duration::from_secs(100)).await;
        assert!(server.expired.borrow().is_empty(), "nobody is fenced");
    });
}

#[test]
fn a_later_socket_of_a_client_takes_its_session_over() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        let server = w.server(1, 5).await;
        let sockets: Rc<RefCell<BTreeMap<u64, usize>>> = Rc::default();
        let open = |id: u64, term: u64| {
            let (env, sockets) = (env.clone(), sockets.clone());
            w.env().spawn("socket", async move {
                let len = scan(&env, 1, &hello(id, term, RID, 0, FSID)).await.len();
                sockets.borrow_mut().insert(id, len);
            });
        };
        open(3, 0);
        until(&env, "first", || server.up(RID) == 1).await;
        // An attempt that was made earlier and comes later is refused.
        open(2, 5);
        until(&env, "refused", || sockets.borrow().contains_key(&2)).await;
        assert_eq!(sockets.borrow()[&2], 32);
        // A later one takes over: the old socket ends, the session stays.
        open(4, 5);
        until(&env, "moved", || sockets.borrow().contains_key(&3)).await;
        assert_eq!(sockets.borrow()[&3], 72);
        assert_eq!(server.up(RID), 1);
        // So does a first greeting that was sent again.
        open(5, 0);
        until(&env, "moved again", || sockets.borrow().contains_key(&4)).await;
        assert_eq!(server.up(RID), 1);
        server.conns().break_connection(RID);
        until(&env, "broken", || sockets.borrow().contains_key(&5)).await;
        assert_eq!(server.up(RID), 1, "waits for its client");
        server.conns().drop_client(RID);
        assert_eq!(server.up(RID), 0);
        env.sleep(Duration::from_secs(60)).await;
        assert!(server.expired.borrow().is_empty());
        server.conns().shutdown().await;
        yield_now().await;
    });
}

/// Only the answer to the farewell is lost: the missing item tells.
#[test]
fn a_farewell_without_an_answer_ends_when_the_item_is_gone() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        w.set_mounted(true);
        let server = w.server(1, 5).await;
        let client = w.client(RID, &Rc::new(Mount::default()));
        until(&env, "up", || client.server_term() == 5).await;
        server.mute.set(true);
        let done = Rc::new(Cell::new(false));
        let (one, flag) = (client.clone(), done.clone());
        env.spawn("unmount", async move {
            one.farewell().await;
            flag.set(true);
        });
        until(&env, "asked", || !server.handled.borrow().is_empty()).await;
        // The server breaks the connection, and the client comes back: with the flag.
        server.conns().break_connection(RID);
        until(&env, "back", || server.greeted.borrow().len() == 2).await;
        assert!(server.greeted.borrow()[1].farewell);
        server.conns().shutdown().await;
        w.write_quorum(1, 5, 5);
        env.sleep(Duration::from_secs(5)).await;
        assert!(!done.get(), "the item is still there");
        // The next server has reclaimed it, and is gone as well.
        w.set_mounted(false);
        until(&env, "done", || done.get()).await;
    });
}

#[test]
fn a_mount_that_was_fenced_finds_out() {
    let w = World::new(1);
    let env = w.env();
    w.world.block_on(async {
        w.set_mounted(true);
        let server = w.server(1, 5).await;
        let client = w.client(RID, &Rc::new(Mount::default()));
        until(&env, "up", || client.server_term() == 5).await;
        let evicted = Rc::new(Cell::new(false));
        let (wait, flag) = (client.evicted(), evicted.clone());
        env.spawn("evicted", async move {
            wait.await;
            flag.set(true);
        });
        // Refused for another reason: it is still on the list.
        server.refuse.set(Some(Errno::EIO));
        server.conns().break_connection(RID);
        env.sleep(Duration::from_secs(5)).await;
        assert!(!evicted.get());
        server.refuse.set(Some(Errno::EINVAL));
        w.set_mounted(false);
        until(&env, "evicted", || evicted.get()).await;
        client.sever();
    });
}

//! Messages that say something else than what their sender meant: between mounts and
//! a server, after framing, and between quorum members.

use super::{AllGone, NoKernel, Source, network};
use crate::env::testing::{MemDevice, TestWorld};
use crate::env::testnet::TestNetHandle;
use crate::env::{
    Datagram, Duration, Entropy, Env, Gate, Listener, LocalBoxFuture, NetError, Network, Stream,
    StreamReader, StreamWriter, Time, timeout,
};
use crate::format::{InetAddr, QuorumConfig};
use crate::fs::api::{Caller, Posix, WriteData, WriteHow, XattrSet};
use crate::node::{Mount, NodeConfig};
use crate::quorum::brain::{Brain, Input, Message, ServerPhase};
use crate::quorum::{Policy, Slots};
use crate::volume::{MkfsOptions, mkfs};
use crate::wire::Decoder;
use bytes::{Bytes, BytesMut};
use std::cell::RefCell;
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;

/// Turns of the executor that one run may take.
const TURNS: u64 = 2_000_000;
const PATIENCE: Duration = Duration::from_secs(100);
const HEAD: usize = 32;

/// What is done to the messages that pass, one instruction after the other.
struct Script {
    bytes: Vec<u8>,
    at: usize,
    skip: u8,
}

impl Script {
    /// Changes a message, or leaves it as it is.
    fn pass(&mut self, message: &mut BytesMut) {
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        let mut source = Source::new(&self.bytes[self.at.min(self.bytes.len())..]);
        if source.is_empty() {
            return;
        }
        self.skip = source.u8();
        let how = source.u8();
        let mut used = 2;
        let payload = message.len() - HEAD;
        match how % 8 {
            0..=3 if payload > 0 => {
                let at = usize::from(source.u16()) % payload + HEAD;
                let n = [1, 2, 4, 8][usize::from(how % 4)].min(message.len() - at);
                let new = source.take(n);
                message[at..at + new.len()].copy_from_slice(new);
                used += 2 + n;
            }
            4 => {
                let len = usize::from(source.u16() % 600);
                message.resize(HEAD + len, how);
                message[24..26].copy_from_slice(&(len as u16).to_le_bytes());
                used += 2;
            }
            // Command, flags, error.
            5 => {
                message[26 + usize::from(how >> 3) % 3] = source.u8();
                used += 1;
            }
            // Any byte of the head.
            6 => {
                message[usize::from(how >> 3)] = source.u8();
                used += 1;
            }
            _ => message[HEAD..].fill(source.u8()),
        }
        self.at += used;
    }
}

/// Messages of one direction of a connection, as whole ones.
#[derive(Default)]
struct Tap(Decoder);

impl Tap {
    fn pass(&mut self, script: &RefCell<Script>, bytes: &[u8]) -> Bytes {
        self.0.push(bytes);
        let mut out = BytesMut::new();
        while let Ok(Some(frame)) = self.0.next_frame() {
            let mut message = BytesMut::from(&frame.to_bytes()[..]);
            script.borrow_mut().pass(&mut message);
            out.extend_from_slice(&message);
        }
        out.freeze()
    }
}

struct TapReader(Box<dyn StreamReader>, Tap, Rc<RefCell<Script>>);

impl StreamReader for TapReader {
    fn read(&mut self) -> LocalBoxFuture<'_, Result<Bytes, NetError>> {
        Box::pin(async {
            loop {
                let chunk = self.0.read().await?;
                if chunk.is_empty() {
                    return Ok(chunk);
                }
                let passed = self.1.pass(&self.2, &chunk);
                if !passed.is_empty() {
                    return Ok(passed);
                }
            }
        })
    }
}

struct TapWriter(Box<dyn StreamWriter>, Tap, Rc<RefCell<Script>>);

impl StreamWriter for TapWriter {
    fn write(&mut self, bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>> {
        let passed = self.1.pass(&self.2, &bytes);
        self.0.write(passed)
    }
    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>> {
        self.0.shutdown()
    }
}

/// A network that changes what clients and servers tell each other.
struct Tapped {
    inner: Rc<TestNetHandle>,
    script: Rc<RefCell<Script>>,
}

impl Network for Tapped {
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
        let script = self.script.clone();
        Box::pin(async move {
            let stream = connecting.await?;
            let reader = TapReader(stream.reader, Tap::default(), script.clone());
            let writer = TapWriter(stream.writer, Tap::default(), script);
            Ok(Stream {
                reader: Box::new(reader),
                writer: Box::new(writer),
                ..stream
            })
        })
    }
}

/// A new volume, for many runs.
pub struct Wires {
    meta: MemDevice,
    data: MemDevice,
}

impl Default for Wires {
    fn default() -> Self {
        Self::new()
    }
}

impl Wires {
    /// Makes the volume.
    pub fn new() -> Self {
        let world = TestWorld::with_network(11, 256 << 20, 64 << 20, network());
        let options = MkfsOptions {
            slots: vec![(0, "127.0.0.1:8000".parse().expect("an address"))],
            allow_small: true,
            ..MkfsOptions::default()
        };
        let (meta, data) = (world.meta.handle(), world.data.handle());
        let env = world.env();
        let wall = env.clock.wall();
        let made = world.block_on(mkfs(&*meta, &*data, &*env.entropy, wall, &options));
        made.expect("mkfs");
        Self {
            meta: world.meta.snapshot(),
            data: world.data.snapshot(),
        }
    }

    /// Two mounts, a member and a client, work while their messages are changed as the
    /// bytes say.
    ///
    /// # Panics
    /// If they do not end.
    pub fn exercise(&self, bytes: &[u8]) {
        let script = Rc::new(RefCell::new(Script {
            bytes: bytes.to_vec(),
            at: 0,
            skip: 0,
        }));
        let inner = network();
        let net = Rc::new(Tapped { inner, script });
        let world = TestWorld::over(9, self.meta.snapshot(), self.data.snapshot(), net);
        let env = world.env();
        let ended = world.exec.drive(work(&env), TURNS);
        assert!(ended.is_some(), "no end within {TURNS} turns");
    }
}

async fn mount(env: &Env, rid: u64, slot: Option<usize>) -> Option<Rc<Mount>> {
    let mut config = NodeConfig::new(slot, Arc::new(AllGone));
    config.block = crate::block::Policy {
        reserve_server: 300,
        reserve_client: 300,
        ..crate::block::Policy::small()
    };
    config.server.finalize_height = 0;
    let give_up = Gate::default();
    let (clock, gate) = (env.clock.clone(), give_up.clone());
    env.spawn("impatience", async move {
        clock.sleep_until(clock.now() + PATIENCE).await;
        gate.open();
    });
    let mounted = Mount::start(env, rid, config, Rc::new(NoKernel), &give_up).await;
    mounted.ok()
}

async fn work(env: &Env) {
    let member = mount(env, 0x77, Some(0)).await;
    let client = match member {
        Some(_) => mount(env, 0x88, None).await,
        None => None,
    };
    let mounts: Vec<Rc<Mount>> = member.into_iter().chain(client).collect();
    let deadline = env.clock.now() + PATIENCE;
    let calls = async {
        for round in 0..2_u8 {
            for mount in &mounts {
                calls(mount, round).await;
            }
        }
    };
    let in_time = timeout(&*env.clock, deadline, calls).await.is_some();
    for mount in mounts.iter().rev() {
        let deadline = env.clock.now() + PATIENCE;
        let left = match in_time {
            true => timeout(&*env.clock, deadline, mount.unmount()).await,
            false => None,
        };
        if !matches!(left, Some(Ok(()))) {
            mount.force_unmount().await;
        }
    }
}

/// Calls that make locks, transactions, maps and merges move. How they end is the
/// messages' matter.
async fn calls(mount: &Rc<Mount>, round: u8) {
    let fs = mount.fs();
    let cx = Caller {
        pid: 1,
        ..Caller::default()
    };
    let name = [b'a' + round];
    if let Ok((entry, opened)) = fs.create(&cx, 1, &name, 0o644, 0, 2).await {
        let ino = entry.attr.ino;
        let data = WriteData::from(Bytes::from(vec![round; 5000]));
        let how = WriteHow::default();
        let _ = fs.write(&cx, ino, opened.fh, 0, data, how).await;
        let value = [round; 30];
        let _ = fs
            .setxattr(&cx, ino, b"user.x", &value, XattrSet::Any)
            .await;
        let _ = fs.read(&cx, ino, opened.fh, 0, 8192).await;
        let _ = fs.unlink(&cx, 1, &name).await;
        fs.release(ino, opened.fh).await;
    }
    let _ = fs.mkdir(&cx, 1, &[b'A' + round], 0o755, 0).await;
    let _ = fs.lookup(&cx, 1, &name).await;
    let _ = fs.statfs().await;
    let _ = fs.syncfs().await;
}

/// Quorum datagrams with good CRCs, and what a member makes of them.
pub fn datagrams(bytes: &[u8]) {
    const FSID: u64 = 7;
    let mut config = QuorumConfig::default();
    for slot in 0..3_u16 {
        let addr = SocketAddrV4::new([127, 0, 0, 1].into(), 7000 + slot);
        config.slots[usize::from(slot)] = InetAddr::from_v4(addr);
    }
    let slots = Slots::of(&config);
    let mut source = Source::new(bytes);
    let mut now = Time(0);
    let input = |source: &mut Source<'_>, now, message| Input {
        now,
        message,
        server: [
            ServerPhase::Down,
            ServerPhase::Starting,
            ServerPhase::Fenced,
            ServerPhase::Up,
            ServerPhase::Stopping,
        ][usize::from(source.u8() % 5)],
        heartbeat_timeout: Duration::from_secs(10),
        random: u64::from(source.u16()) << 48,
    };
    let first = input(&mut source, now, None);
    let term = u64::from(source.u8());
    let unresolved = source.u8().is_multiple_of(2);
    let mut brain = Brain::new(Policy::default(), &slots, 0, term, unresolved, first);
    while !source.is_empty() {
        let mut datagram = source
            .take(size_of::<crate::format::QuorumMessage>())
            .to_vec();
        let how = source.u8();
        if how & 1 == 0 && datagram.len() > 8 {
            datagram[..8].copy_from_slice(&FSID.to_le_bytes());
        }
        let message = Message::parse(&datagram, FSID, &slots).or_else(|| {
            let mut message: crate::format::QuorumMessage =
                zerocopy::FromBytes::read_from_bytes(&datagram).ok()?;
            message.fsid = FSID.into();
            message.seal();
            Message::parse(zerocopy::IntoBytes::as_bytes(&message), FSID, &slots)
        });
        now = now + Duration::from_millis(u64::from(source.u16()));
        brain.step(input(&mut source, now, message));
    }
}

/// Instructions drawn from a seed.
pub fn draw(entropy: &dyn Entropy) -> Vec<u8> {
    let n = entropy.range(4, 60);
    let small = entropy.range(1, 256);
    let byte = |i: u64| match i % 3 {
        0 => entropy.range(0, small) as u8,
        _ => entropy.next_u64() as u8,
    };
    (0..n).map(byte).collect()
}

//! What a holder of the key notices (nothing), and what others can do (nothing).

use super::*;
use crate::env::testing::TestWorld;
use crate::env::testnet::{TestNet, TestNetHandle};
use crate::env::{StreamReader, timeout};
use bytes::{Bytes, BytesMut};
use std::cell::RefCell;
use std::net::Ipv4Addr;

const KEEPALIVE: Duration = Duration::from_secs(24);

fn addr(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

fn key(seed: u8) -> ClusterKey {
    ClusterKey::from_bytes(&[seed; 32])
}

fn world() -> TestWorld {
    let net = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
    TestWorld::with_network(1, 1 << 20, 1 << 20, net)
}

#[test]
fn a_network_with_a_key_is_a_network() {
    let world = world();
    let env = secured(&world.env(), Some(&key(1)));
    let addr = |n| addr(1000 + n);
    world.block_on(crate::env::conformance_net::check_network(&env, addr));
}

#[test]
fn a_key_comes_back_from_its_file_and_is_not_shown() {
    let world = world();
    let text = ClusterKey::generate(&*world.env().entropy);
    let made = ClusterKey::parse(&text).expect("a key");
    assert_eq!(
        ClusterKey::parse(&format!("\n{}\n", *text)),
        Ok(made.clone())
    );
    let digits = text.trim_end().rsplit(' ').next().expect("the digits");
    assert!(!format!("{made:?} {}", made.id()).contains(digits));
    assert_ne!(
        ClusterKey::parse(&ClusterKey::generate(&*world.env().entropy)),
        Ok(made)
    );
    let twice = format!("{}{}", *text, *text);
    for (text, error) in [
        ("", KeyError::Absent),
        ("# nothing here", KeyError::Absent),
        ("a passphrase", KeyError::Absent),
        (twice.as_str(), KeyError::Several),
        ("outrider-cluster-key-1 abc", KeyError::Digits),
        (&text[..text.len() - 3], KeyError::Digits),
        (&text.replace(&digits[..1], "x"), KeyError::Digits),
    ] {
        let parsed = ClusterKey::parse(text);
        assert!(
            parsed == Err(error) || parsed == Err(KeyError::Absent),
            "{text}: {parsed:?}"
        );
    }
}

/// Connects `near` to a listener of `far` and gives both ends.
async fn pair(near: &Env, far: &Env, port: u16) -> (Stream, Stream) {
    let mut listener = far.net.listen(addr(port)).await.expect("listen");
    let near = near.net.connect(addr(port), KEEPALIVE).await;
    let far = listener.accept().await.expect("accept");
    (near.expect("connect"), far)
}

async fn read(env: &Env, reader: &mut dyn StreamReader) -> Result<Bytes, NetError> {
    let deadline = env.clock.now() + Duration::from_secs(1);
    let read = timeout(&*env.clock, deadline, reader.read()).await;
    read.unwrap_or(Err(NetError::TimedOut))
}

#[test]
fn another_key_or_none_is_refused_with_the_reason_at_both_ends() {
    let world = world();
    let plain = world.env();
    let (one, two) = (
        secured(&plain, Some(&key(1))),
        secured(&plain, Some(&key(2))),
    );
    world.block_on(async {
        // Another key: neither end reads a byte of what the other has to say.
        let (mut near, mut far) = pair(&one, &two, 1).await;
        let hello = near.writer.write(Bytes::from_static(b"hello"));
        let _ = timeout(&*one.clock, one.clock.now() + Duration::from_secs(1), hello).await;
        let refused = read(&two, &mut *far.reader).await;
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("another cluster key")
        );
        drop(far);
        let told = read(&one, &mut *near.reader).await.unwrap_err();
        assert!(told.to_string().contains("another cluster key"), "{told}");

        // None, towards a node with one.
        let (mut near, mut far) = pair(&plain, &one, 2).await;
        let greeting = Bytes::from(vec![1; 72]);
        near.writer.write(greeting).await.expect("written");
        let refused = read(&one, &mut *far.reader).await.unwrap_err();
        assert!(
            refused.to_string().contains("does not use a cluster key"),
            "{refused}"
        );
        drop(far);
        assert_eq!(
            near.reader.read().await,
            Ok(Bytes::new()),
            "and learns nothing"
        );

        // One, towards a node with none.
        let (mut near, mut far) = pair(&one, &plain, 3).await;
        let heard = far.reader.read().await.expect("heard");
        far.writer
            .write(Bytes::from(vec![1; 72]))
            .await
            .expect("written");
        assert!(heard.starts_with(b"ORNOISE1"));
        let told = read(&one, &mut *near.reader).await.unwrap_err();
        assert!(
            told.to_string().contains("does not use a cluster key"),
            "{told}"
        );
    });
}

/// What a test does to bytes on their way.
type Change = Rc<dyn Fn(&mut Vec<u8>)>;

/// A network that lets a test read, change and repeat what is sent.
struct Tapped {
    net: TestNetHandle,
    streams: Rc<RefCell<Vec<Bytes>>>,
    /// Changes what is written to streams.
    change: Change,
}

struct TappedWriter {
    inner: Box<dyn crate::env::StreamWriter>,
    streams: Rc<RefCell<Vec<Bytes>>>,
    change: Change,
}

impl crate::env::StreamWriter for TappedWriter {
    fn write(&mut self, bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>> {
        let mut bytes = bytes.to_vec();
        (self.change)(&mut bytes);
        let bytes = Bytes::from(bytes);
        self.streams.borrow_mut().push(bytes.clone());
        self.inner.write(bytes)
    }
    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>> {
        self.inner.shutdown()
    }
}

impl Network for Tapped {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        self.net.bind_datagram(addr)
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
        let connecting = self.net.connect(addr, keepalive);
        let (streams, change) = (self.streams.clone(), self.change.clone());
        Box::pin(async move {
            let mut stream = connecting.await?;
            let inner = stream.writer;
            stream.writer = Box::new(TappedWriter {
                inner,
                streams,
                change,
            });
            Ok(stream)
        })
    }
}

fn tapped(change: impl Fn(&mut Vec<u8>) + 'static) -> (TestWorld, Rc<RefCell<Vec<Bytes>>>) {
    let streams: Rc<RefCell<Vec<Bytes>>> = Rc::default();
    let net = Rc::new(Tapped {
        net: TestNetHandle(Rc::new(TestNet::default())),
        streams: streams.clone(),
        change: Rc::new(change),
    });
    let world = TestWorld::with_network(1, 1 << 20, 1 << 20, net);
    (world, streams)
}

#[test]
fn what_is_sent_can_not_be_read_changed_or_repeated() {
    let (world, streams) = tapped(|_| {});
    let env = secured(&world.env(), Some(&key(1)));
    let secret = Bytes::from_static(b"the secret of the volume");
    world.block_on(async {
        let (mut near, mut far) = pair(&env, &env, 1).await;
        near.writer.write(secret.clone()).await.expect("written");
        assert_eq!(read(&env, &mut *far.reader).await, Ok(secret.clone()));
    });
    let sent = streams.take();
    assert_eq!(sent.len(), 2, "the handshake and a record");
    let all = sent.concat();
    assert!(
        !all.windows(8)
            .any(|bytes| secret.windows(8).any(|s| s == bytes))
    );
    // The whole connection again, byte for byte, from somebody without the key.
    world.block_on(async {
        let mut listener = env.net.listen(addr(2)).await.expect("listen");
        let near = world.env().net.connect(addr(2), KEEPALIVE).await;
        let mut near = near.expect("connect");
        let mut far = listener.accept().await.expect("accept");
        near.writer.write(Bytes::from(all)).await.expect("written");
        let told = read(&env, &mut *far.reader).await.unwrap_err();
        assert!(matches!(told, NetError::Untrusted(_)), "{told}");
    });
    // One bit changed, in each byte of a record, and the record twice.
    for at in 0..secret.len() + 16 + 2 {
        let (world, _) = tapped(move |bytes| {
            if bytes[0] == 0 {
                bytes[at] ^= 0x20;
            }
        });
        let env = secured(&world.env(), Some(&key(1)));
        world.block_on(async {
            let (mut near, mut far) = pair(&env, &env, 1).await;
            near.writer.write(secret.clone()).await.expect("written");
            drop(near);
            let told = read(&env, &mut *far.reader).await;
            assert!(told.is_err(), "byte {at}: {told:?}");
        });
    }
    let (world, _) = tapped(|bytes| {
        if bytes[0] == 0 {
            bytes.extend_from_within(..);
        }
    });
    let env = secured(&world.env(), Some(&key(1)));
    world.block_on(async {
        let (mut near, mut far) = pair(&env, &env, 1).await;
        near.writer.write(secret.clone()).await.expect("written");
        let told = read(&env, &mut *far.reader).await;
        assert!(matches!(told, Err(NetError::Untrusted(_))), "{told:?}");
    });
}

#[test]
fn every_cut_of_the_stream_is_read_the_same() {
    let world = world();
    let plain = world.env();
    let env = secured(&plain, Some(&key(1)));
    world.block_on(async {
        // A relay that hands on one byte at a time.
        let mut outside = plain.net.listen(addr(1)).await.expect("listen");
        let mut listener = env.net.listen(addr(2)).await.expect("listen");
        let relay = plain.clone();
        plain.spawn("relay", async move {
            let near = outside.accept().await.expect("accept");
            let far = relay
                .net
                .connect(addr(2), KEEPALIVE)
                .await
                .expect("connect");
            let down = async |mut from: Box<dyn StreamReader>,
                              mut to: Box<dyn crate::env::StreamWriter>| {
                while let Ok(chunk) = from.read().await
                    && !chunk.is_empty()
                {
                    for byte in chunk {
                        let _ = to.write(Bytes::copy_from_slice(&[byte])).await;
                    }
                }
                let _ = to.shutdown().await;
            };
            let there = down(near.reader, far.writer);
            crate::env::race(there, down(far.reader, near.writer)).await;
        });
        let mut near = env.net.connect(addr(1), KEEPALIVE).await.expect("connect");
        let mut far = listener.accept().await.expect("accept");
        let sent: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
        near.writer
            .write(Bytes::from(sent.clone()))
            .await
            .expect("written");
        let mut got = BytesMut::new();
        while got.len() < sent.len() {
            got.extend_from_slice(&read(&env, &mut *far.reader).await.expect("read"));
        }
        assert_eq!(got, sent);
    });
}

// ---- datagrams ----

/// Everything that a member receives within a moment.
async fn received(env: &Env, socket: &Rc<dyn Datagram>) -> Vec<Bytes> {
    let mut all = Vec::new();
    let deadline = env.clock.now() + Duration::from_millis(20);
    while let Some(got) = timeout(&*env.clock, deadline, socket.recv_from()).await {
        all.push(got.expect("receive").0);
    }
    all
}

fn text(n: u8) -> Bytes {
    Bytes::from(format!("message number {n}, 32 bytes long"))
}

/// A socket on which everything that `to` is sent can be seen and sent again.
async fn spy(env: &Env, port: u16) -> Rc<dyn Datagram> {
    env.net.bind_datagram(addr(port)).await.expect("bind")
}

#[test]
fn datagrams_arrive_once_and_the_first_too() {
    let world = world();
    let env = secured(&world.env(), Some(&key(1)));
    world.block_on(async {
        let one = spy(&env, 1).await;
        let two = spy(&env, 2).await;
        // The first causes a challenge, and is sent again.
        one.send_to(text(1), addr(2)).await.expect("sent");
        assert_eq!(received(&env, &two).await, [text(1)]);
        for n in 2..100 {
            one.send_to(text(n), addr(2)).await.expect("sent");
        }
        let expected: Vec<Bytes> = (2..100).map(text).collect();
        assert_eq!(received(&env, &two).await, expected);
        two.send_to(text(1), addr(1)).await.expect("sent");
        assert_eq!(received(&env, &one).await, [text(1)]);
    });
}

#[test]
fn strangers_datagrams_reach_nobody() {
    let world = world();
    let plain = world.env();
    let (env, other) = (
        secured(&plain, Some(&key(1))),
        secured(&plain, Some(&key(2))),
    );
    world.block_on(async {
        let member = spy(&env, 1).await;
        let stranger = spy(&plain, 2).await;
        let wrong = spy(&other, 3).await;
        for n in 0..50 {
            stranger.send_to(text(n), addr(1)).await.expect("sent");
            stranger
                .send_to(Bytes::from(vec![n; usize::from(n) * 9]), addr(1))
                .await
                .expect("sent");
            wrong.send_to(text(n), addr(1)).await.expect("sent");
        }
        assert_eq!(received(&env, &member).await, Vec::<Bytes>::new());
        let answers = received(&plain, &stranger).await;
        assert_eq!(answers, Vec::<Bytes>::new(), "not even an answer");
        assert_eq!(received(&other, &wrong).await, Vec::<Bytes>::new());
    });
}

/// Packets that a member sends to somebody who can only record them.
async fn record(env: &Env, plain: &Env, from: u16, to: u16, times: u8) -> Vec<Bytes> {
    let ear = spy(plain, to).await;
    let member = spy(env, from).await;
    for n in 0..times {
        member.send_to(text(n), addr(to)).await.expect("sent");
    }
    received(plain, &ear).await
}

#[test]
fn recorded_datagrams_are_never_taken_by_a_restarted_member_or_by_another() {
    let world = world();
    let plain = world.env();
    let env = secured(&plain, Some(&key(1)));
    world.block_on(async {
        // Recorded in an earlier life of member 1 and of member 2.
        let old = record(&env, &plain, 1, 2, 40).await;
        assert_eq!(old.len(), 40);
        let mallory = spy(&plain, 99).await;
        let two = spy(&env, 2).await;
        for packet in &old {
            mallory
                .send_to(packet.clone(), addr(2))
                .await
                .expect("sent");
        }
        assert_eq!(
            received(&env, &two).await,
            Vec::<Bytes>::new(),
            "member 1 is dead"
        );
        // Member 1 lives again, and answers challenges: its old words count nothing.
        let one = spy(&env, 1).await;
        for packet in &old {
            mallory
                .send_to(packet.clone(), addr(2))
                .await
                .expect("sent");
        }
        assert_eq!(
            received(&env, &two).await,
            Vec::<Bytes>::new(),
            "an earlier life"
        );
        one.send_to(text(77), addr(2)).await.expect("sent");
        assert_eq!(received(&env, &two).await, [text(77)]);
        // Meant for member 2, sent to member 3; and back to where they came from.
        let three = spy(&env, 3).await;
        for packet in &old {
            for port in [3, 1] {
                mallory
                    .send_to(packet.clone(), addr(port))
                    .await
                    .expect("sent");
            }
        }
        assert_eq!(received(&env, &three).await, Vec::<Bytes>::new());
        assert_eq!(received(&env, &one).await, Vec::<Bytes>::new());
    });
}

/// Everything that is sent on its way from one member to another, in both
/// directions, seen by a relay between them.
#[test]
fn a_repeated_datagram_of_a_living_member_is_taken_once() {
    let world = world();
    let env = secured(&world.env(), Some(&key(1)));
    world.block_on(async {
        let mut state = datagram::tests_support::pair(&key(1), &*env.entropy, addr(1), addr(2));
        let taken = state.send_and_repeat(&env, 200, 3);
        assert_eq!(
            taken, 200,
            "each once, in any order, however often repeated"
        );
    });
}

//! What every network must do, written against the seam alone and run over each
//! backend: the simulated, the real, and those of tests.
//!
//! A backend gives an [`Env`] whose tasks run while the returned future is polled,
//! and addresses that nothing else uses.

use super::{Duration, Env, NetError, Stream, race, timeout};
use bytes::Bytes;
use std::cell::RefCell;
use std::future::Future;
use std::net::SocketAddrV4;
use std::rc::Rc;

/// Longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);
const KEEPALIVE: Duration = Duration::from_secs(24);

async fn patiently<T>(env: &Env, what: &str, future: impl Future<Output = T>) -> T {
    let deadline = env.clock.now() + PATIENCE;
    let done = timeout(&*env.clock, deadline, future).await;
    done.unwrap_or_else(|| panic!("{what} took longer than {PATIENCE:?}"))
}

/// Both ends of a new connection: the connecting one and the accepted one.
async fn pair(env: &Env, addr: SocketAddrV4) -> (Stream, Stream) {
    let mut listener = env.net.listen(addr).await.expect("listen");
    let accepted = Rc::new(RefCell::new(None));
    let slot = accepted.clone();
    let accepting = env.spawn("accept", async move {
        let stream = listener.accept().await.expect("accept");
        slot.replace(Some(stream));
    });
    let near = patiently(env, "connect", env.net.connect(addr, KEEPALIVE)).await;
    let near = near.expect("connect to a listener");
    patiently(env, "accept", async {
        while !accepting.is_finished() {
            env.sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let far = accepted.borrow_mut().take().expect("accepted");
    (near, far)
}

/// Reads until the end of the stream.
async fn read_all(stream: &mut Stream) -> Result<Vec<u8>, NetError> {
    let mut all = Vec::new();
    loop {
        let chunk = stream.reader.read().await?;
        if chunk.is_empty() {
            return Ok(all);
        }
        all.extend_from_slice(&chunk);
    }
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ salt)
        .collect()
}

/// Runs every check. `addr(n)` is the n-th free address of this node, n below 16.
///
/// # Panics
/// If the network does not keep its contract.
pub async fn check_network(env: &Env, addr: impl Fn(u16) -> SocketAddrV4) {
    addresses_are_told(env, addr(0)).await;
    bytes_arrive_in_order_both_ways(env, addr(1)).await;
    half_close_lets_the_other_half_live(env, addr(2)).await;
    dropping_both_halves_ends_the_peer(env, addr(3)).await;
    nobody_listens(env, addr(4)).await;
    an_address_is_bound_once(env, addr(5)).await;
    a_dropped_listener_frees_its_address(env, addr(6)).await;
    a_cancelled_read_loses_nothing(env, addr(7)).await;
    a_slow_reader_gets_everything(env, addr(8)).await;
    datagrams_keep_their_bounds(env, addr(9), addr(10)).await;
    datagrams_to_nobody_are_lost_silently(env, addr(11), addr(12)).await;
    tcp_and_udp_share_an_address(env, addr(13)).await;
}

async fn addresses_are_told(env: &Env, addr: SocketAddrV4) {
    let (near, far) = pair(env, addr).await;
    assert_eq!(near.peer, addr);
    assert_eq!(far.local, addr);
    assert_eq!(near.local, far.peer);
}

async fn bytes_arrive_in_order_both_ways(env: &Env, addr: SocketAddrV4) {
    let (mut near, mut far) = pair(env, addr).await;
    for (len, salt) in [(1, 1), (100, 2), (70_000, 3)] {
        for _ in 0..2 {
            let sent = pattern(len, salt);
            let writing = near.writer.write(Bytes::from(sent.clone()));
            let reading = async {
                let mut got = Vec::new();
                while got.len() < len {
                    let chunk = far.reader.read().await.expect("read");
                    assert!(!chunk.is_empty(), "end of stream after {}", got.len());
                    got.extend_from_slice(&chunk);
                }
                got
            };
            let got = patiently(env, "echo", both(writing, reading)).await;
            got.0.expect("write");
            assert!(got.1 == sent, "{len} bytes came differently");
            std::mem::swap(&mut near, &mut far);
        }
    }
}

/// Runs both futures to their ends.
async fn both<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let (mut a, mut b) = (Box::pin(a), Box::pin(b));
    match race(&mut a, &mut b).await {
        super::Either::Left(out) => (out, b.await),
        super::Either::Right(out) => (a.await, out),
    }
}

async fn half_close_lets_the_other_half_live(env: &Env, addr: SocketAddrV4) {
    let (mut near, mut far) = pair(env, addr).await;
    let question = near.writer.write(Bytes::from_static(b"question"));
    question.await.expect("write");
    near.writer.shutdown().await.expect("half close");
    let heard = patiently(env, "half close", read_all(&mut far)).await;
    assert_eq!(heard.expect("read"), b"question");
    far.writer
        .write(Bytes::from_static(b"answer"))
        .await
        .expect("write after the peer's half close");
    far.writer.shutdown().await.expect("half close");
    let heard = patiently(env, "answer", read_all(&mut near)).await;
    assert_eq!(heard.expect("read"), b"answer");
}

async fn dropping_both_halves_ends_the_peer(env: &Env, addr: SocketAddrV4) {
    let (near, mut far) = pair(env, addr).await;
    drop(near);
    let end = patiently(env, "close", far.reader.read()).await;
    assert!(
        matches!(&end, Ok(chunk) if chunk.is_empty()) || end == Err(NetError::Reset),
        "a closed connection reads as its end, not {end:?}"
    );
    // Writing goes wrong too, at latest when the peer's refusal came back.
    patiently(env, "write to a closed peer", async {
        while far.writer.write(Bytes::from_static(b"x")).await.is_ok() {
            env.sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn nobody_listens(env: &Env, addr: SocketAddrV4) {
    let refused = patiently(env, "refusal", env.net.connect(addr, KEEPALIVE)).await;
    assert_eq!(refused.err(), Some(NetError::Refused(addr)));
}

async fn an_address_is_bound_once(env: &Env, addr: SocketAddrV4) {
    let _first = env.net.listen(addr).await.expect("listen");
    let second = env.net.listen(addr).await;
    assert_eq!(second.err(), Some(NetError::AddrInUse(addr)));
    let _socket = env.net.bind_datagram(addr).await.expect("bind");
    let second = env.net.bind_datagram(addr).await;
    assert_eq!(second.err(), Some(NetError::AddrInUse(addr)));
}

async fn a_dropped_listener_frees_its_address(env: &Env, addr: SocketAddrV4) {
    for _ in 0..3 {
        let (near, far) = pair(env, addr).await;
        drop((near, far));
    }
}

async fn a_cancelled_read_loses_nothing(env: &Env, addr: SocketAddrV4) {
    let (mut near, mut far) = pair(env, addr).await;
    let sent = pattern(3000, 9);
    let bytes = sent.clone();
    env.spawn("writer", async move {
        for chunk in bytes.chunks(100) {
            let chunk = Bytes::copy_from_slice(chunk);
            near.writer.write(chunk).await.expect("write");
        }
        near.writer.shutdown().await.expect("half close");
        // Keeps the reading half alive until the peer closes.
        let _ = near.reader.read().await;
    });
    let mut got = Vec::new();
    let read = async {
        loop {
            let now = env.clock.now();
            match timeout(&*env.clock, now, far.reader.read()).await {
                None => env.sleep(Duration::from_micros(100)).await,
                Some(chunk) => {
                    let chunk = chunk.expect("read");
                    if chunk.is_empty() {
                        break;
                    }
                    got.extend_from_slice(&chunk);
                }
            }
        }
    };
    patiently(env, "cancelled reads", read).await;
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
}

async fn a_slow_reader_gets_everything(env: &Env, addr: SocketAddrV4) {
    let (mut near, mut far) = pair(env, addr).await;
    let sent = pattern(1 << 20, 5);
    let bytes = Bytes::from(sent.clone());
    let writing = async {
        for start in (0..bytes.len()).step_by(50_000) {
            let end = bytes.len().min(start + 50_000);
            near.writer.write(bytes.slice(start..end)).await?;
        }
        near.writer.shutdown().await
    };
    let reading = async {
        env.sleep(Duration::from_millis(20)).await;
        read_all(&mut far).await
    };
    let (written, read) = patiently(env, "slow reader", both(writing, reading)).await;
    written.expect("write");
    assert!(read.expect("read") == sent, "not what was sent");
}

async fn datagrams_keep_their_bounds(env: &Env, one: SocketAddrV4, two: SocketAddrV4) {
    let near = env.net.bind_datagram(one).await.expect("bind");
    let far = env.net.bind_datagram(two).await.expect("bind");
    patiently(env, "datagrams", async {
        for len in [1_usize, 32, 1000] {
            let sent = Bytes::from(pattern(len, 1));
            // Loss is allowed: ask until one comes through.
            loop {
                near.send_to(sent.clone(), two).await.expect("send");
                let deadline = env.clock.now() + Duration::from_millis(200);
                let got = timeout(&*env.clock, deadline, far.recv_from()).await;
                let Some(got) = got else { continue };
                let (bytes, from) = got.expect("receive");
                assert_eq!(from, one);
                if bytes.len() == len {
                    assert_eq!(bytes, sent);
                    break;
                }
            }
        }
    })
    .await;
}

async fn datagrams_to_nobody_are_lost_silently(env: &Env, one: SocketAddrV4, two: SocketAddrV4) {
    let socket = env.net.bind_datagram(one).await.expect("bind");
    for _ in 0..3 {
        let sent = socket.send_to(Bytes::from_static(b"hello?"), two).await;
        sent.expect("loss is silent");
        let deadline = env.clock.now() + Duration::from_millis(5);
        let got = timeout(&*env.clock, deadline, socket.recv_from()).await;
        assert!(got.is_none(), "nobody answers: {got:?}");
    }
}

async fn tcp_and_udp_share_an_address(env: &Env, addr: SocketAddrV4) {
    let _socket = env.net.bind_datagram(addr).await.expect("bind");
    let _pair = pair(env, addr).await;
}

#[cfg(test)]
mod tests {
    use super::super::testing::TestWorld;
    use super::super::testnet::{TestNet, TestNetHandle};
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn the_network_of_tests_conforms() {
        let net = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
        let world = TestWorld::with_network(1, 1 << 20, 1 << 20, net);
        let addr = |n| SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1000 + n);
        world.block_on(check_network(&world.env(), addr));
    }
}

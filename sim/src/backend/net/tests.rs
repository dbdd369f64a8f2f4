use super::super::Host;
use super::super::tests::simulate;
use super::*;
use outrider_core::env::{Duration, Either, Env, race};
use std::net::SocketAddrV4;

const KEEPALIVE: Duration = Duration::from_secs(10);

async fn pair(env: &Env, port: u16) -> (Stream, Stream) {
    let addr = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), port);
    let mut listener = env.net.listen(addr).await.unwrap();
    let client = env.net.connect(addr, KEEPALIVE).await.unwrap();
    (client, listener.accept().await.unwrap())
}

#[test]
fn bytes_arrive_whole_in_order_and_the_end_is_seen() {
    simulate(1, async |host: Host| {
        let env = host.env("a");
        let (mut client, mut server) = pair(&env, 1000).await;
        let sent: Vec<u8> = (0..200u8).cycle().take(5000).collect();
        for piece in sent.chunks(700) {
            let piece = Bytes::copy_from_slice(piece);
            client.writer.write(piece).await.unwrap();
        }
        client.writer.shutdown().await.unwrap();
        let mut got = Vec::new();
        let mut pieces = 0;
        loop {
            let piece = server.reader.read().await.unwrap();
            if piece.is_empty() {
                break;
            }
            pieces += 1;
            got.extend_from_slice(&piece);
        }
        assert_eq!(got, sent);
        assert!(pieces > 8, "cut into {pieces}");
        // The other direction still works after a half close.
        server.writer.write(Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(client.reader.read().await.unwrap(), "x");
    });
}

#[test]
fn a_dead_process_resets_and_refuses() {
    simulate(2, async |host: Host| {
        let env = host.env("a");
        let other = Host {
            life: Life::new(),
            ..host.clone()
        };
        let addr = SocketAddrV4::new(host.node.ip, 1000);
        let mut listener = other.env("b").net.listen(addr).await.unwrap();
        let again = env.net.listen(addr).await;
        assert!(matches!(again, Err(NetError::AddrInUse(_))));
        let mut client = env.net.connect(addr, KEEPALIVE).await.unwrap();
        let _server = listener.accept().await.unwrap();
        other.life.kill();
        host.net.end_of(&other.life, false);
        assert_eq!(client.reader.read().await, Err(NetError::Reset));
        let refused = env.net.connect(addr, KEEPALIVE).await;
        assert!(matches!(refused, Err(NetError::Refused(_))));
    });
}

#[test]
fn a_partition_holds_then_delivers_or_times_out() {
    simulate(3, async |host: Host| {
        let env = host.env("a");
        let (mut client, mut server) = pair(&env, 1000).await;
        let ip = host.node.ip;
        host.net.cut(ip, ip);
        client
            .writer
            .write(Bytes::from_static(b"late"))
            .await
            .unwrap();
        env.sleep(Duration::from_secs(1)).await;
        host.net.heal();
        let mut got = Vec::new();
        while got.len() < 4 {
            got.extend_from_slice(&server.reader.read().await.unwrap());
        }
        assert_eq!(got, b"late");
        host.net.cut(ip, ip);
        let start = host.sim.now();
        assert_eq!(server.reader.read().await, Err(NetError::TimedOut));
        assert!(host.sim.now() - start >= 10_000_000_000);
    });
}

#[test]
fn datagrams_are_lost_doubled_and_overtaken() {
    simulate(4, async |host: Host| {
        host.net.set_links(Links {
            loss: 200,
            double: 200,
            ..Links::default()
        });
        let env = host.env("a");
        let to = SocketAddrV4::new(host.node.ip, 5);
        let inbox = env.net.bind_datagram(to).await.unwrap();
        let from = SocketAddrV4::new(host.node.ip, 6);
        let outbox = env.net.bind_datagram(from).await.unwrap();
        for n in 0..100u8 {
            outbox
                .send_to(Bytes::copy_from_slice(&[n]), to)
                .await
                .unwrap();
        }
        env.sleep(Duration::from_millis(1)).await;
        let mut got = Vec::new();
        while let Either::Left(received) = race(inbox.recv_from(), std::future::ready(())).await {
            let (bytes, sender) = received.unwrap();
            assert_eq!(sender, from);
            got.push(bytes[0]);
        }
        assert!(got.windows(2).any(|w| w[0] > w[1]), "some overtake");
        let distinct: BTreeSet<u8> = got.iter().copied().collect();
        assert!(distinct.len() < 100, "some are lost");
        assert!(got.len() > distinct.len(), "some are doubled");
    });
}

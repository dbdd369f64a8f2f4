//! The operating system's sockets keep the contract of the network seam.

#![allow(
    missing_docs,
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a test of the real machine"
)]

mod host;

use outrider_core::env::Duration;
use outrider_core::env::conformance_net::check_network;
use outrider_core::env::testing::MemDevice;
use outrider_net::NetThread;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;

/// A port range that a concurrent run of this test is unlikely to use.
fn first_port() -> u16 {
    15_000 + (std::process::id() % 1000) as u16 * 16
}

#[test]
fn real_sockets_conform() {
    let reactor = NetThread::start().expect("a reactor thread");
    let tcp = reactor.sockets(Duration::from_secs(24));
    // The actor's own executor is another runtime, without a reactor for sockets.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("an executor");
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        let env = host::env(Rc::new(tcp.network()), MemDevice::new(1 << 16), 1);
        let port = first_port();
        let addr = |n| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port + n);
        check_network(&env, addr).await;
    });
}

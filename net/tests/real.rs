//! The operating system's sockets keep the contract of the network seam.

#![allow(missing_docs, reason = "a test")]

use outrider_core::env::conformance_net::check_network;
use outrider_core::env::{
    ActorMain, BlockDevice, Clock, DeviceError, DeviceRole, Devices, Duration, Entropy, Env,
    LocalBoxFuture, Spawner, Task, Time, WallTime,
};
use outrider_net::NetThread;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use std::time::Instant;

/// Seams of a tokio thread: real time, local tasks, no devices.
struct Host(Instant);

impl Clock for Host {
    fn now(&self) -> Time {
        Time(self.0.elapsed().as_nanos() as u64)
    }
    fn wall(&self) -> WallTime {
        WallTime::default()
    }
    fn sleep_until(&self, deadline: Time) -> LocalBoxFuture<'static, ()> {
        let at = self.0 + Duration::from_nanos(deadline.nanos());
        Box::pin(async move {
            if at > Instant::now() {
                tokio::time::sleep_until(at.into()).await;
            }
        })
    }
}

impl Entropy for Host {
    fn next_u64(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}

impl Devices for Host {
    fn open(&self, _role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError> {
        Err(DeviceError::Shut)
    }
}

struct Running(tokio::task::JoinHandle<()>);

impl Task for Running {
    fn abort(&self) {
        self.0.abort();
    }
    fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl Spawner for Host {
    fn spawn_local(&self, _name: &'static str, task: LocalBoxFuture<'static, ()>) -> Rc<dyn Task> {
        Rc::new(Running(tokio::task::spawn_local(task)))
    }
    fn spawn_actor(&self, name: &str, _main: ActorMain) {
        panic!("no actor {name} in this test");
    }
    fn yield_point(&self, _name: &'static str) -> LocalBoxFuture<'static, ()> {
        Box::pin(tokio::task::yield_now())
    }
}

/// A port range that a concurrent run of this test is unlikely to use.
fn first_port() -> u16 {
    20_000 + (std::process::id() % 1000) as u16 * 16
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
        let host = Rc::new(Host(Instant::now()));
        let env = Env {
            clock: host.clone(),
            net: Rc::new(tcp.network()),
            entropy: host.clone(),
            spawner: host.clone(),
            devices: host,
        };
        let port = first_port();
        let addr = |n| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port + n);
        check_network(&env, addr).await;
    });
}

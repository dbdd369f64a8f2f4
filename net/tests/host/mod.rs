//! Seams of a tokio thread: tokio's time, local tasks, one device in memory.

use outrider_core::env::testing::{MemDevice, TestEntropy};
use outrider_core::env::{
    ActorMain, BlockDevice, Clock, DeviceError, DeviceRole, Devices, Duration, Env, LocalBoxFuture,
    Network, Spawner, Task, Time, WallTime,
};
use std::rc::Rc;
use tokio::time::Instant;

struct Host {
    start: Instant,
    meta: MemDevice,
}

/// The seams of an actor that runs in a `LocalSet` with a timer.
pub fn env(net: Rc<dyn Network>, meta: MemDevice, seed: u64) -> Env {
    let start = Instant::now();
    let host = Rc::new(Host { start, meta });
    Env {
        clock: host.clone(),
        net,
        entropy: TestEntropy::new(seed),
        spawner: host.clone(),
        devices: host,
    }
}

impl Clock for Host {
    fn now(&self) -> Time {
        Time(self.start.elapsed().as_nanos() as u64)
    }
    fn wall(&self) -> WallTime {
        WallTime::default()
    }
    fn sleep_until(&self, deadline: Time) -> LocalBoxFuture<'static, ()> {
        let at = self.start + Duration::from_nanos(deadline.nanos());
        Box::pin(async move {
            if at > Instant::now() {
                tokio::time::sleep_until(at).await;
            }
        })
    }
}

impl Devices for Host {
    fn open(&self, _role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError> {
        Ok(self.meta.handle())
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

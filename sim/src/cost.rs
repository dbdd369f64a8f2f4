//! What creating files costs in a cluster, by model: every mount makes files in a
//! directory of its own and syncs; simulated time, messages, commits and device requests
//! are counted.
//!
//! The model: machines run at once, each create takes its machine [`CPU`] beside what is
//! waited for; links and devices have the usual delays of a world without faults. Devices
//! serve any number of requests at once and code takes no other time, so the figures tell
//! who waits for whom, not how fast a machine is: `tests/accept/multi_bench.py` does.

use crate::backend::disk::{Disks, Timing};
use crate::backend::net::{Links, SimNet};
use crate::backend::{Host, Life, Node, Sim};
use crate::model::S_IFREG;
use crate::trace::Trace;
use crate::world::on_fresh_thread;
use outrider_core::env::{DeviceRole, Duration, Env, Gate, LocalBoxFuture, set_probe_sink};
use outrider_core::format::{SM_BLOCK_SIZE, SUPER_BLKNO};
use outrider_core::fs::api::{Caller, Inval, KernelCache, Posix};
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_core::volume::{MkfsOptions, mkfs};
use std::cell::RefCell;
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;

/// Time of a machine's processor for one create, in nanoseconds: what a mount through
/// FUSE needs (docs/performance.md).
pub const CPU: u64 = 35_000;

const PORT: u16 = 12_345;
const ROOT: u64 = 1;
const META: u64 = 64 << 30;
const DATA: u64 = 64 << 30;

/// Who works.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// A name for people.
    pub name: &'static str,
    /// Mounts; the first one is the only quorum member and so has the server.
    pub mounts: u32,
    /// The first one that works; all from there on do.
    pub first: u32,
}

/// The cases of the command.
pub const CASES: [Case; 5] = [
    Case {
        name: "leader alone",
        mounts: 1,
        first: 0,
    },
    Case {
        name: "client alone",
        mounts: 2,
        first: 1,
    },
    Case {
        name: "leader and client",
        mounts: 2,
        first: 0,
    },
    Case {
        name: "two clients",
        mounts: 3,
        first: 1,
    },
    Case {
        name: "four clients",
        mounts: 5,
        first: 1,
    },
];

/// What it came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Files made, by all mounts together.
    pub files: u64,
    /// Simulated nanoseconds until the last mount had synced.
    pub nanos: u64,
    /// Messages between machines on connections, acknowledgements among them.
    pub messages: u64,
    /// Datagrams of the quorum.
    pub datagrams: u64,
    /// Commits of mounts.
    pub commits: u64,
    /// Commits of the server.
    pub server_commits: u64,
    /// Requests to the devices.
    pub requests: u64,
    /// Bytes written to the devices.
    pub bytes: u64,
}

impl Figures {
    /// Files a simulated second.
    pub fn rate(&self) -> f64 {
        self.files as f64 * 1e9 / self.nanos as f64
    }

    /// Something for each file.
    pub fn each(&self, count: u64) -> f64 {
        count as f64 / self.files as f64
    }
}

/// Programs that keep nothing: no kernel has to forget.
struct NoKernel;

impl KernelCache for NoKernel {
    fn invalidate(&self, _what: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

/// Nobody dies here.
struct NoFence;

impl FenceAgent for NoFence {
    fn fence(
        &self,
        _env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        let detail = "nobody has died".to_owned();
        let rid = request.rid;
        Box::pin(std::future::ready(Err(FenceError::Failed { rid, detail })))
    }
}

/// Runs a case: each working mount makes `files` files.
///
/// # Errors
/// What failed, in words.
pub fn measure(case: Case, files: u32) -> Result<Figures, String> {
    on_fresh_thread(move || {
        let runtime = madsim::runtime::Runtime::with_seed_and_config(0, madsim::Config::default());
        runtime.block_on(world(case, files))
    })?
}

async fn world(case: Case, files: u32) -> Result<Figures, String> {
    let figures = Rc::new(RefCell::new(Figures::default()));
    let counted = Rc::clone(&figures);
    let sim = Sim::new(
        0,
        Trace::new(Some(Box::new(move |event| {
            let counted = &mut *counted.borrow_mut();
            match event.kind {
                "send" if event.text.contains(" of term ") => counted.datagrams += 1,
                "send" => counted.messages += 1,
                "read" | "write" | "flush" => counted.requests += 1,
                _ => {}
            }
        }))),
    );
    sim.set_yield(0);
    sim.set_poll_cost(1);
    sim.set_poll_limit(u64::MAX);
    let counted = Rc::clone(&figures);
    set_probe_sink(Some(Box::new(move |name| {
        counted.borrow_mut().commits += u64::from(name == "log.commit.answered");
    })));
    let disks = Disks::new(&sim, META, DATA, Timing::default());
    let counted = Rc::clone(&figures);
    disks.add_watch(move |landed| {
        let counted = &mut *counted.borrow_mut();
        counted.bytes += landed.bufs.iter().map(|buf| buf.len() as u64).sum::<u64>();
        let sup =
            landed.role == DeviceRole::Meta && landed.offset == SUPER_BLKNO * SM_BLOCK_SIZE as u64;
        counted.server_commits += u64::from(sup);
    });
    let net = SimNet::new(&sim, Links::default());
    let hosts: Vec<Host> = (0..case.mounts)
        .map(|number| Host {
            sim: Rc::clone(&sim),
            node: Node::new(number, 0, 1_700_000_000_000_000_000),
            life: Life::new(),
            net: Rc::clone(&net),
            disks: Rc::clone(&disks),
        })
        .collect();
    make(&hosts[0]).await?;
    let mut mounts = Vec::new();
    for host in &hosts {
        mounts.push(mount(host).await?);
    }
    let working = || hosts.iter().zip(&mounts).skip(case.first as usize);
    let (caller, mut dirs) = (Caller::default(), Vec::new());
    for (host, mount) in working() {
        let name = format!("of{}", host.node.id);
        let dir = mount.fs().mkdir(&caller, ROOT, name.as_bytes(), 0o755, 0);
        dirs.push(
            dir.await
                .map_err(|errno| format!("mkdir: {errno}"))?
                .attr
                .ino,
        );
        mount
            .fs()
            .syncfs()
            .await
            .map_err(|errno| format!("sync: {errno}"))?;
    }
    figures.take();
    let began = sim.now();
    let tasks: Vec<_> = working()
        .zip(&dirs)
        .map(|((host, mount), dir)| work(host.env("work"), Rc::clone(mount), *dir, files))
        .map(madsim::task::spawn_local)
        .collect();
    for task in tasks {
        task.await.map_err(|error| error.to_string())??;
    }
    let mut figures = figures.take();
    figures.nanos = sim.now() - began;
    figures.files = u64::from(files) * dirs.len() as u64;
    set_probe_sink(None);
    for mount in mounts.iter().rev() {
        mount.unmount().await.map_err(|error| error.to_string())?;
    }
    disks.end();
    sim.end().await;
    Ok(figures)
}

async fn make(host: &Host) -> Result<(), String> {
    let env = host.env("mkfs");
    let open = |role| env.devices.open(role).map_err(|error| error.to_string());
    let (meta, data) = (open(DeviceRole::Meta)?, open(DeviceRole::Data)?);
    let options = MkfsOptions {
        slots: vec![(0, SocketAddrV4::new(Node::address(0), PORT))],
        ..MkfsOptions::default()
    };
    let made = mkfs(&*meta, &*data, &*env.entropy, env.clock.wall(), &options).await;
    made.map(drop).map_err(|error| error.to_string())
}

async fn mount(host: &Host) -> Result<Rc<Mount>, String> {
    let env = host.env("mount");
    let slot = (host.node.id == 0).then_some(0);
    let config = NodeConfig::new(slot, Arc::new(NoFence));
    let (rid, kernel) = (env.entropy.rid(), Rc::new(NoKernel));
    let mount = Mount::start(&env, rid, config, kernel, &Gate::default()).await;
    mount.map_err(|error| error.to_string())
}

async fn work(env: Env, mount: Rc<Mount>, dir: u64, files: u32) -> Result<(), String> {
    let caller = Caller::default();
    for number in 0..files {
        env.sleep(Duration::from_nanos(CPU)).await;
        let name = format!("f{number}");
        let made = mount
            .fs()
            .mknod(&caller, dir, name.as_bytes(), S_IFREG | 0o644, 0, 0);
        made.await
            .map_err(|errno| format!("create {name}: {errno}"))?;
    }
    mount
        .fs()
        .syncfs()
        .await
        .map_err(|errno| format!("sync: {errno}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mounts_create_faster_than_one_and_creates_need_no_messages() {
        let [alone, client, both] =
            [CASES[0], CASES[1], CASES[2]].map(|case| measure(case, 2_000).expect("a run"));
        let best = alone.rate().max(client.rate());
        assert!(
            both.rate() > 1.5 * best,
            "{both:?} against {alone:?} and {client:?}"
        );
        assert!(both.each(both.messages) < 0.1, "{both:?}");
        assert!(both.each(both.commits) < 0.01, "{both:?}");
    }
}

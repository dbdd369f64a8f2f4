//! Outrider itself as the system under test: `node::Mount` in a cluster of one.

use super::commits;
use super::invariants::Watched;
use super::{MountError, System};
use crate::backend::{Host, Node};
use crate::plan::Plan;
use outrider_core::env::{BlockDevice, DeviceRole, Duration, Env, Gate, LocalBoxFuture, Time};
use outrider_core::fs::Fs;
use outrider_core::fs::api::KernelCache;
use outrider_core::locks::Mode;
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::secure::ClusterKey;
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_core::volume::check::check;
use outrider_core::volume::{MkfsOptions, VolumeError, mkfs, read_super, write_super};
use outrider_core::{block, log};
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Port of the one quorum member.
const PORT: u16 = 12_345;

/// Makes a new volume one that has had as many transactions.
async fn come_to_seq(meta: &dyn BlockDevice, seq: u64) -> Result<(), VolumeError> {
    let mut sb = read_super(meta, DeviceRole::Meta, None).await?;
    sb.seq.set(seq);
    write_super(meta, DeviceRole::Meta, &sb).await
}

/// A mount of Outrider.
pub struct Outrider {
    mount: Rc<Mount>,
    /// Keeps the actor's task set alive.
    _env: Env,
}

/// How long a slow fence takes: longer than a leader waits, so it is done for one that
/// asks again. A power switch does not turn back when nobody waits for it any more.
const SLOW: Duration = Duration::from_secs(20);

/// Fences at once, slowly, after failures, or after hanging: dead mounts of a
/// world of one node are dead, so it tells the truth.
struct SimFence {
    manner: u8,
    asked: AtomicU32,
    /// When the first one asked, in nanoseconds and one more; 0 before.
    since: AtomicU64,
}

impl FenceAgent for SimFence {
    fn can_prove(&self) -> bool {
        super::cluster::fencer().is_some_and(|fencer| fencer.can_prove())
    }

    fn is_gone(&self, rid: u64) -> bool {
        super::cluster::fencer().is_some_and(|fencer| fencer.is_gone(rid))
    }

    fn fence(
        &self,
        env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        if let Some(fencer) = super::cluster::fencer() {
            return fencer.fence(env, request);
        }
        let first = self.asked.fetch_add(1, Ordering::Relaxed) < 1;
        let (manner, env) = (self.manner, env.clone());
        let now = env.clock.now();
        if first {
            self.since.store(now.nanos() + 1, Ordering::Relaxed);
        }
        let done = Time(self.since.load(Ordering::Relaxed)) + SLOW;
        Box::pin(async move {
            match manner {
                1 => env.clock.sleep_until(done).await,
                2 if first => {
                    env.sleep(Duration::from_millis(500)).await;
                    return Err(FenceError::Failed {
                        rid: request.rid,
                        detail: "the simulated agent failed".to_owned(),
                    });
                }
                3 if first => env.sleep(Duration::from_secs(100_000)).await,
                _ => env.sleep(Duration::from_micros(300)).await,
            }
            Ok(())
        })
    }
}

fn config(host: &Host, plan: &Plan) -> NodeConfig {
    let agent = Arc::new(SimFence {
        manner: plan.config.fence,
        asked: AtomicU32::new(0),
        since: AtomicU64::new(0),
    });
    let mut config = NodeConfig::new(Some(0), agent);
    if let Some(cluster) = &plan.cluster {
        let number = host.node.id as usize;
        config.quorum_slot = cluster.nodes[number].member.then_some(number);
        let millis = |millis: u32| Duration::from_millis(u64::from(millis));
        config.heartbeat_timeout = millis(cluster.heartbeat_ms);
        config.keepalive = millis(cluster.keepalive_ms);
        config.server.keepalive_timeout = millis(cluster.keepalive_ms);
        config.server.recovery_timeout = millis(cluster.recovery_ms);
        config.server.reconnect_timeout = millis(cluster.reconnect_ms);
        config.cluster_key = key(plan);
        config.out_of_touch =
            (cluster.out_of_touch_ms > 0).then_some(millis(cluster.out_of_touch_ms));
    }
    config.block = block::Policy::small();
    if plan.config.squeeze >= 1 {
        config.log = log::Policy::small();
        config.fs.data.dirty_bytes_max = 256 << 10;
        config.fs.data.writeback_bytes = 64 << 10;
        config.fs.data.readahead_bytes = 16 << 10;
        config.fs.data.prealloc_blocks = 16;
        config.fs.inode_batch = 1024;
    }
    if plan.config.squeeze >= 2 {
        config.block.cache_blocks = 24;
        config.log.cache_bytes = 8 << 10;
        config.locks.idle_count = 32;
        config.fs.readdir_batch = 2;
        config.fs.data.extents_per_change = 2;
        config.fs.data.dirty_bytes_max = 64 << 10;
        config.fs.orphan_scan_delay = Duration::from_secs(2);
        config.log.sync_delay = Duration::from_secs(2);
    }
    if plan.config.squeeze >= 3 {
        config.block.cache_blocks = 12;
        config.log.cache_bytes = 2 << 10;
        config.fs.inodes_per_lock = 3;
        config.fs.data.prealloc_contig_only = false;
    }
    plan.config.stress.apply(&mut config);
    config
}

/// The volume's cluster key, if it has one: any will do.
fn key(plan: &Plan) -> Option<ClusterKey> {
    let keyed = plan.cluster.as_ref().is_some_and(|cluster| cluster.keyed);
    keyed.then(|| ClusterKey::from_bytes(&[0x5a; 32]))
}

/// The quorum slots: the members' addresses.
fn slots(host: &Host, plan: &Plan) -> Vec<(u64, SocketAddrV4)> {
    let Some(cluster) = &plan.cluster else {
        return vec![(0, SocketAddrV4::new(host.node.ip, PORT))];
    };
    let members = (0..cluster.nodes.len()).filter(|number| cluster.nodes[*number].member);
    members
        .map(|number| {
            (
                number as u64,
                SocketAddrV4::new(Node::address(number as u32), PORT),
            )
        })
        .collect()
}

impl System for Outrider {
    type Volume = ();
    type Fs = Fs;

    async fn make(host: &Host, plan: &Plan) -> Result<Rc<()>, String> {
        let env = host.env("mkfs");
        let open = |role| env.devices.open(role).map_err(|error| error.to_string());
        let (meta, data) = (open(DeviceRole::Meta)?, open(DeviceRole::Data)?);
        let options = MkfsOptions {
            fmt_vers: plan.config.format_version,
            slots: slots(host, plan),
            allow_small: true,
            cluster_key: key(plan).map(|key| key.id()),
            ..MkfsOptions::default()
        };
        mkfs(&*meta, &*data, &*env.entropy, env.clock.wall(), &options)
            .await
            .map_err(|error| error.to_string())?;
        if plan.config.first_seq > 0 {
            come_to_seq(&*meta, plan.config.first_seq)
                .await
                .map_err(|error| error.to_string())?;
        }
        Ok(Rc::new(()))
    }

    async fn mount(
        host: &Host,
        plan: &Plan,
        _volume: &Rc<()>,
        cache: Rc<dyn KernelCache>,
    ) -> Result<Rc<Self>, MountError> {
        let env = host.env("mount");
        let rid = env.entropy.rid();
        host.life.set_rid(rid);
        let mount = Mount::start(&env, rid, config(host, plan), cache, &Gate::default()).await;
        let mount = mount.map_err(|error| MountError(error.to_string()))?;
        host.sim.watch(Watched {
            mount: Rc::downgrade(&mount),
            life: Rc::clone(&host.life),
        });
        Ok(Rc::new(Self { mount, _env: env }))
    }

    fn fs(self: &Rc<Self>) -> Rc<Fs> {
        Rc::clone(self.mount.fs())
    }

    async fn unmount(self: Rc<Self>) -> Result<(), String> {
        self.mount
            .unmount()
            .await
            .map_err(|error| error.to_string())
    }

    async fn force_unmount(self: Rc<Self>) {
        self.mount.force_unmount().await;
    }

    async fn evicted(&self) {
        self.mount.evicted().await;
    }

    fn is_evicted(&self) -> bool {
        self.mount.is_evicted()
    }

    fn waits(&self) -> String {
        let table = self.mount.locks().table();
        let busy = table.iter().filter(|lock| {
            let used = lock.users.iter().any(|count| *count > 0);
            lock.waiters > 0 || used || lock.invalidating.is_some() || lock.mode != Mode::Null
        });
        busy.map(|lock| {
            format!(
                "\n  lock {:?}: {:?}, invalidating {:?}, users {:?}, {} wait",
                lock.scope, lock.mode, lock.invalidating, lock.users, lock.waiters
            )
        })
        .collect()
    }

    async fn check(host: &Host, _volume: &Rc<()>, _clean: bool) -> Result<(), String> {
        let env = host.env("check");
        let open = |role| env.devices.open(role).map_err(|error| error.to_string());
        let (meta, data) = (open(DeviceRole::Meta)?, open(DeviceRole::Data)?);
        let report = check(meta, data, &commits::options(None)).await;
        commits::verdict(&report)?;
        let commits = host.sim.commits();
        commits.map_or(Ok(()), |commits| commits.compare(&report))
    }
}

//! Machines with their clocks, and the seams of the processes on them.

use super::life::{Life, spawn};
use super::{Sim, disk, net};
use crate::model::wall_time;
use crate::rng::Stream;
use outrider_core::env::{
    ActorMain, BlockDevice, Clock, DeviceError, DeviceRole, Devices, Env, LocalBoxFuture, Spawner,
    Task, Time, WallTime,
};
use std::cell::Cell;
use std::net::Ipv4Addr;
use std::rc::Rc;

/// One machine: its address and its clocks, which outlive its processes.
pub struct Node {
    /// Number, as in the trace.
    pub id: u32,
    /// Address.
    pub ip: Ipv4Addr,
    drift_ppm: Cell<i64>,
    wall_offset: Cell<i64>,
}

impl Node {
    /// Node number `id` at 10.0.0.`id`+1, with a clock of this drift and this
    /// wall time (nanoseconds since 1970) at the start of the world.
    pub fn new(id: u32, drift_ppm: i64, wall: i64) -> Rc<Self> {
        Rc::new(Self {
            id,
            ip: Self::address(id),
            drift_ppm: Cell::new(drift_ppm),
            wall_offset: Cell::new(wall),
        })
    }

    /// The address of node number `id`.
    pub fn address(id: u32) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, (id >> 8) as u8, (id & 255) as u8 + 1)
    }

    /// Steps the wall clock by some nanoseconds.
    pub fn step_wall(&self, nanos: i64) {
        self.wall_offset.set(self.wall_offset.get() + nanos);
    }

    fn local(&self, now: u64) -> u64 {
        let shift = i128::from(now) * i128::from(self.drift_ppm.get()) / 1_000_000;
        (i128::from(now) + shift) as u64
    }

    fn real(&self, local: u64) -> u64 {
        let real = i128::from(local) * 1_000_000 / (1_000_000 + i128::from(self.drift_ppm.get()));
        u64::try_from(real + 1).unwrap_or(u64::MAX)
    }

    /// Nanoseconds since 1970 on this node's wall clock.
    pub fn wall_nanos(&self, now: u64) -> i64 {
        self.wall_offset.get() + self.local(now) as i64
    }
}

struct SimClock {
    sim: Rc<Sim>,
    node: Rc<Node>,
}

impl Clock for SimClock {
    fn now(&self) -> Time {
        Time(self.node.local(self.sim.now()))
    }
    fn wall(&self) -> WallTime {
        wall_time(self.node.wall_nanos(self.sim.now()))
    }
    fn sleep_until(&self, deadline: Time) -> LocalBoxFuture<'static, ()> {
        let at = if self.node.drift_ppm.get() == 0 {
            deadline.nanos()
        } else {
            self.node.real(deadline.nanos())
        };
        Box::pin(self.sim.sleep_until(at))
    }
}

/// What a process of a node is made of; builds the [`Env`] of each of its actors.
#[derive(Clone)]
pub struct Host {
    /// The world.
    pub sim: Rc<Sim>,
    /// The machine.
    pub node: Rc<Node>,
    /// This run of the process (or of the actor).
    pub life: Rc<Life>,
    /// The machine's network.
    pub net: Rc<net::SimNet>,
    /// The shared devices.
    pub disks: Rc<disk::Disks>,
}

impl Host {
    /// The seams of an actor of this process.
    pub fn env(&self, name: &str) -> Env {
        self.actor(name).0
    }

    /// The seams of an actor, and its life.
    fn actor(&self, name: &str) -> (Env, Rc<Life>) {
        let number = self.sim.next_actor.get();
        self.sim.next_actor.set(number + 1);
        let host = Self {
            life: self.life.child(name),
            ..self.clone()
        };
        let life = Rc::clone(&host.life);
        let env = Env {
            clock: Rc::new(SimClock {
                sim: Rc::clone(&host.sim),
                node: Rc::clone(&host.node),
            }),
            net: Rc::new(net::NodeNet::new(&host)),
            entropy: Rc::new(Stream::new(host.sim.seed, name, number)),
            devices: Rc::new(host.clone()),
            spawner: Rc::new(SimSpawner { host }),
        };
        (env, life)
    }
}

impl Devices for Host {
    fn open(&self, role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError> {
        Ok(self.disks.open(self, role))
    }
}

struct SimSpawner {
    host: Host,
}

impl Spawner for SimSpawner {
    fn spawn_local(&self, _name: &'static str, task: LocalBoxFuture<'static, ()>) -> Rc<dyn Task> {
        spawn(&self.host.sim, &self.host.life, task)
    }

    fn spawn_actor(&self, name: &str, main: ActorMain) {
        let (env, life) = self.host.actor(name);
        if !self.host.life.is_alive() {
            return;
        }
        let own = Rc::clone(&life);
        let future = main(env);
        spawn(
            &self.host.sim,
            &life,
            Box::pin(async move {
                future.await;
                own.kill();
            }),
        );
    }

    fn yield_point(&self, name: &'static str) -> LocalBoxFuture<'static, ()> {
        let sim = &self.host.sim;
        if let Some(by) = sim.hold(name) {
            return Box::pin(sim.sleep(by));
        }
        if !sim.rng.chance(sim.yield_permille.get()) {
            return Box::pin(std::future::ready(()));
        }
        if sim.rng.chance(100) {
            return Box::pin(sim.sleep(1000 + sim.rng.below(200_000)));
        }
        Box::pin(madsim::task::yield_now())
    }
}

//! The fence agents: one for the whole world, behind the seam that every
//! server uses. The simulated host can really end a mount, and knows it; on
//! demand the agent is slow, fails, is never heard of, takes only the devices
//! away, or lies.

use super::{Cluster, SECOND, System};
use crate::plan::cluster::Agents;
use crate::world::life::Fate;
use outrider_core::env::{Duration, Env, LocalBoxFuture};
use outrider_core::server::{FenceError, FenceRequest};
use std::cell::RefCell;
use std::rc::{Rc, Weak};

/// Something that ends mounts.
pub trait Fencer {
    /// As `FenceAgent::fence`.
    fn fence(
        &self,
        env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>>;

    /// As `FenceAgent::can_prove`.
    fn can_prove(&self) -> bool;

    /// As `FenceAgent::is_gone`.
    fn is_gone(&self, rid: u64) -> bool;
}

thread_local! {
    // The seam's agents may cross threads and can not hold a world; each world
    // has a thread of its own.
    static FENCER: RefCell<Option<Rc<dyn Fencer>>> = const { RefCell::new(None) };
}

/// The fencer of the world that runs on this thread, if it is one of several nodes.
pub fn fencer() -> Option<Rc<dyn Fencer>> {
    FENCER.with(|cell| cell.borrow().clone())
}

struct Host<S: System>(Weak<Cluster<S>>);

pub(super) fn install<S: System>(world: &Rc<Cluster<S>>) {
    let host: Rc<dyn Fencer> = Rc::new(Host(Rc::downgrade(world)));
    FENCER.with(|cell| *cell.borrow_mut() = Some(host));
}

pub(super) fn remove() {
    FENCER.with(|cell| cell.borrow_mut().take());
}

impl<S: System> Fencer for Host<S> {
    fn can_prove(&self) -> bool {
        let world = self.0.upgrade();
        world.is_some_and(|world| world.agents.get() == Agents::Local)
    }

    fn is_gone(&self, rid: u64) -> bool {
        let Some(world) = self.0.upgrade().filter(|_| self.can_prove()) else {
            return false;
        };
        // The host sees the process of every mount there ever was, and that it is stopped
        // only.
        world.fate_of(rid).is_some_and(|fate| fate.is_dead())
    }

    fn fence(
        &self,
        env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        let Some(world) = self.0.upgrade() else {
            return Box::pin(std::future::pending());
        };
        let (weak, env, rid) = (self.0.clone(), env.clone(), request.rid);
        let manner = world.agents.get();
        let nth = world.asked.get();
        world.asked.set(nth + 1);
        let delay = match manner {
            Agents::Slow => 100_000_000 + world.rng.below(12 * SECOND),
            Agents::Hang if nth < 2 => 100_000 * SECOND,
            _ => 200_000 + world.rng.below(300_000_000),
        };
        world.note(0, "fence", &[rid, u64::from(nth)], || {
            format!("{rid:016x} {} at {}", request.reason.name(), request.addr)
        });
        Box::pin(async move {
            env.sleep(Duration::from_nanos(delay)).await;
            let Some(world) = weak.upgrade() else {
                return std::future::pending().await;
            };
            if manner == Agents::Fail && nth < 2 {
                return Err(FenceError::Failed {
                    rid,
                    detail: "the simulated agent failed".to_owned(),
                });
            }
            world.make_dead(rid, manner);
            if world.rng.chance(200) {
                // Asked twice, as after the death of the one who asked.
                world.make_dead(rid, manner);
            }
            Ok(())
        })
    }
}

impl<S: System> Cluster<S> {
    fn fate_of(&self, rid: u64) -> Option<Rc<Fate>> {
        let fates = self.fates.borrow();
        fates
            .iter()
            .find(|fate| fate.host.life.rid() == rid)
            .cloned()
    }

    /// The mount of a seat.
    pub(super) fn fate_at(&self, seat: u32) -> Option<Rc<Fate>> {
        self.fates.borrow().get(seat as usize - 1).cloned()
    }

    /// Makes sure that a mount can not write any more, or says so.
    fn make_dead(&self, rid: u64, manner: Agents) {
        let Some(fate) = self.fate_of(rid) else {
            let text = format!("somebody asks to fence {rid:016x}, which never was a mount");
            return self.condemn("fence", text);
        };
        let seat = fate.host.life.seat();
        let node = fate.host.node.id;
        let lies = manner == Agents::Lie && !fate.is_dead() && self.rng.chance(600);
        let now = self.sim.now();
        self.note(node, "FENCED", &[u64::from(seat), u64::from(lies)], || {
            format!("{rid:016x}{}", if lies { ", a lie" } else { "" })
        });
        self.sim.unwatch(seat);
        if fate.is_dead() {
            // Nothing of it is in flight any more.
        } else if lies {
            self.declare(&fate);
        } else if manner == Agents::Bar {
            self.disks.bar(node);
            self.declare(&fate);
        } else {
            fate.kill(None);
        }
        self.acked.borrow_mut().entry(seat).or_insert((now, lies));
        self.calm_after(now + 60 * SECOND);
    }

    /// A mount that lives counts as dead from now on.
    fn declare(&self, fate: &Fate) {
        if fate.is_condemned() {
            return;
        }
        fate.condemned.open();
        self.died(fate.host.life.seat());
    }
}

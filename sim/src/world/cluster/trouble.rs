//! What goes wrong in a round, started and ended at its times.

use super::{Cluster, System};
use crate::backend::net::Links;
use crate::plan::DiskFault;
use crate::plan::cluster::{Part, Round, Trouble};
use crate::trace::Link;
use std::rc::Rc;

fn members(set: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |number| set >> number & 1 == 1)
}

impl<S: System> Cluster<S> {
    /// Calls `f` with the world some nanoseconds from now.
    fn after(self: &Rc<Self>, nanos: u64, f: impl FnOnce(&Rc<Self>) + 'static) {
        let weak = Rc::downgrade(self);
        self.sim.call_at(self.sim.now() + nanos, move || {
            if let Some(world) = weak.upgrade() {
                f(&world);
            }
        });
    }

    /// Starts all troubles of a round.
    pub(super) fn stir(self: &Rc<Self>, round: &Round) {
        for trouble in &round.troubles {
            self.start(trouble);
        }
        if let Some((at, loss)) = round.blackout {
            let number = self.round.get();
            self.calm_after(self.sim.now() + at);
            self.after(at, move |world| {
                if world.round.get() == number {
                    world.blackout(loss);
                }
            });
        }
    }

    /// Cuts (or mends) everything from `left` to `right`, and back unless `one_way`.
    pub(super) fn cut(&self, left: u16, right: u16, one_way: bool, apart: bool) {
        for near in members(left) {
            for far in members(right) {
                let (near, far) = (self.machines[near].node.ip, self.machines[far].node.ip);
                self.cut_one(near, far, apart);
                if !one_way {
                    self.cut_one(far, near, apart);
                }
            }
        }
    }

    fn cut_one(&self, from: std::net::Ipv4Addr, to: std::net::Ipv4Addr, apart: bool) {
        let mut cuts = self.cuts.borrow_mut();
        let count = cuts.entry((from, to)).or_default();
        if apart {
            *count += 1;
            if *count == 1 {
                self.net.cut(from, to);
            }
        } else {
            *count -= 1;
            if *count == 0 {
                self.net.mend(from, to);
            }
        }
    }

    fn start(self: &Rc<Self>, trouble: &Trouble) {
        let now = self.sim.now();
        let (nodes, from, until) = trouble.span();
        for node in members(nodes).filter(|node| *node < self.machines.len()) {
            let link = Link::Until(now + until);
            let trace = &self.sim.trace;
            trace.remark(now + from, node as u32, "fault", link, || {
                format!("{trouble:?}")
            });
        }
        match trouble.clone() {
            Trouble::Cut {
                left,
                right,
                one_way,
                flap,
                from,
                until,
            } => {
                self.calm_after(now + until);
                let step = if flap == 0 { until - from } else { flap };
                let mut at = from;
                while at < until {
                    let end = (at + step).min(until);
                    let change = move |apart| {
                        move |world: &Rc<Self>| {
                            world.note(0, "cut", &[u64::from(apart)], || {
                                format!("{left:#b} from {right:#b} {one_way} {apart}")
                            });
                            world.cut(left, right, one_way, apart);
                        }
                    };
                    self.after(at, change(true));
                    self.after(end, change(false));
                    at = end + step;
                }
            }
            Trouble::Bad {
                nodes,
                loss,
                double,
                delay,
                window,
                from,
                until,
            } => {
                self.calm_after(now + until);
                let usual = Links::default();
                let links = Links {
                    delay: usual.delay + delay,
                    spread: usual.spread + delay,
                    loss: u64::from(loss),
                    double: u64::from(double),
                    window: window as usize,
                    ..usual
                };
                self.after(from, move |world| world.special(nodes, Some(links)));
                self.after(until, move |world| world.special(nodes, None));
            }
            Trouble::Reset { node, at } => self.after(at, move |world| {
                let ip = world.machines[usize::from(node)].node.ip;
                world.note(u32::from(node), "reset", &[], String::new);
                world.net.reset_between(ip, None);
            }),
            Trouble::Pause {
                node,
                part,
                from,
                until,
            } => {
                self.calm_after(now + until);
                let node = usize::from(node);
                self.after(from, move |world| world.pause(node, part, until - from));
            }
            Trouble::WallStep { node, at, by } => self.after(at, move |world| {
                let machine = &world.machines[usize::from(node)];
                let now = world.sim.now();
                let before = machine.node.wall_nanos(now);
                machine.node.step_wall(by);
                machine.steps.borrow_mut().push((now, before, before + by));
            }),
            Trouble::Disk(mut fault) => {
                match &mut fault {
                    DiskFault::Error { from, until, .. } | DiskFault::Stall { from, until, .. } => {
                        *from += now;
                        *until += now;
                        self.calm_after(*until);
                    }
                }
                self.disks.add_fault(fault);
            }
        }
    }

    fn special(&self, nodes: u16, links: Option<Links>) {
        for one in members(nodes).filter(|number| *number < self.machines.len()) {
            for other in (0..self.machines.len()).filter(|other| *other != one) {
                let (one, other) = (self.machines[one].node.ip, self.machines[other].node.ip);
                self.net.set_special(one, other, links);
                self.net.set_special(other, one, links);
            }
        }
    }

    /// Lets something stand still for a while.
    fn pause(self: &Rc<Self>, number: usize, part: Part, nanos: u64) {
        let Some(seat) = self.machines[number].seat.borrow().clone() else {
            return;
        };
        if seat.fate.is_dead() {
            return;
        }
        self.note(number as u32, "pause", &[nanos], || format!("{part:?}"));
        let name = match part {
            Part::Machine | Part::Process => None,
            Part::Quorum => Some("quorum"),
            Part::Server => Some("server"),
            Part::Mount => Some("mount"),
        };
        let others = ((1u16 << self.machines.len()) - 1) & !(1 << number);
        let node = self.machines[number].node.id;
        if part == Part::Machine {
            self.disks.freeze(node);
            self.cut(1 << number, others, false, true);
        }
        let life = Rc::clone(&seat.fate.host.life);
        life.pause(name, true);
        self.after(nanos, move |world| {
            world.note(number as u32, "resume", &[], || format!("{part:?}"));
            if part == Part::Machine {
                world.disks.thaw(node);
                world.cut(1 << number, others, false, false);
            }
            life.pause(name, false);
        });
    }
}

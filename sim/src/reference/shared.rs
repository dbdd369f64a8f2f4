//! The reference in a world of several nodes: one state that all see, and for
//! each mount the calls that it has not committed. What others touch is committed
//! first, as the handover of a lock does; what a dead mount had not committed
//! never happened.

use super::Reference;
use crate::backend::Life;
use crate::model::{Call, Context, Model, Reply, S_IFDIR};
use outrider_core::errno::Errno;
use outrider_core::fs::api::Ino;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

struct Step {
    seat: u32,
    call: Call,
    ino: Ino,
    cx: Context,
    touched: BTreeSet<Ino>,
}

struct Inner {
    durable: Model,
    state: Model,
    /// Not committed, in order.
    steps: Vec<Step>,
    mounts: Vec<Rc<Life>>,
    opens: Vec<(u32, Ino)>,
    /// What was there some time ago, for one of the flaws.
    old: Model,
}

/// What all mounts share.
pub(super) struct Shared(RefCell<Inner>);

impl Default for Shared {
    fn default() -> Self {
        let root = Model::new(S_IFDIR | 0o755);
        Self(RefCell::new(Inner {
            durable: root.clone(),
            state: root.clone(),
            steps: Vec::new(),
            mounts: Vec::new(),
            opens: Vec::new(),
            old: root,
        }))
    }
}

impl Shared {
    /// Makes what a mount has done durable.
    pub fn commit(&self, seat: u32) {
        self.0.borrow_mut().commit(|step| step.seat == seat);
    }

    /// Shows what is durable.
    pub fn with_durable<T>(&self, look: impl FnOnce(&Model) -> T) -> T {
        look(&self.0.borrow().durable)
    }

    /// Carries out a call of a mount.
    pub fn execute(&self, mount: &Reference, call: &Call) -> Reply {
        let life = &mount.host.life;
        if !life.is_alive() {
            // It died in the step in which it asked.
            return Reply::Err(Errno::EIO);
        }
        let mut inner = self.0.borrow_mut();
        if !inner.mounts.iter().any(|known| Rc::ptr_eq(known, life)) {
            inner.mounts.push(Rc::clone(life));
        }
        inner.bury(mount.flawed("death_loses_half"));
        let seat = life.seat();
        if call == &Call::Syncfs || matches!(call, Call::Fsync { .. }) {
            inner.commit(|step| step.seat == seat);
        }
        let touched = inner.touched(call);
        if !mount.flawed("handover_without_commit") {
            let everything = matches!(call, Call::Rename { .. });
            let seats: BTreeSet<u32> = inner
                .steps
                .iter()
                .filter(|step| step.seat != seat)
                .filter(|step| everything || !step.touched.is_disjoint(&touched))
                .map(|step| step.seat)
                .collect();
            inner.commit(|step| seats.contains(&step.seat));
        }
        let now = mount.host.sim.now();
        let wall = mount.host.node.wall_nanos(now);
        let ino = mount.volume.next_ino.get();
        mount.volume.next_ino.set(ino + 1);
        let cx = Context {
            start: ino,
            end: ino,
            wall: (wall, wall),
            ..Context::default()
        };
        if call.is_read_only() && mount.flawed("stale_reads") && mount.rng.chance(100) {
            return inner.old.clone().answer(call, ino, &cx);
        }
        if mount.rng.chance(100) {
            inner.old = inner.state.clone();
        }
        let reply = inner.state.answer(call, ino, &cx);
        match (call, &reply) {
            (Call::Create { .. } | Call::Tmpfile { .. }, Reply::Entry(attr)) => {
                inner.opens.push((seat, attr.ino));
            }
            (call, Reply::Done) if call.opens().is_some() => {
                inner.opens.extend(call.opens().map(|ino| (seat, ino)));
            }
            (Call::Release { ino }, _) => {
                let own = inner.opens.iter().position(|open| *open == (seat, *ino));
                own.map(|own| inner.opens.remove(own));
            }
            _ => {}
        }
        let failed = matches!(reply, Reply::Err(_));
        if !failed && !call.is_read_only() {
            let mut touched = touched;
            if let Reply::Entry(attr) = &reply {
                touched.insert(attr.ino);
            }
            let sync = matches!(call, Call::Write { sync: true, .. });
            inner.steps.push(Step {
                seat,
                call: call.clone(),
                ino,
                cx,
                touched,
            });
            if sync {
                inner.commit(|step| step.seat == seat);
            }
        }
        reply
    }
}

impl Inner {
    fn commit(&mut self, chosen: impl Fn(&Step) -> bool) {
        for step in self.steps.extract_if(.., |step| chosen(step)) {
            self.durable.answer(&step.call, step.ino, &step.cx);
        }
    }

    /// The inodes that a call looks at or changes.
    fn touched(&self, call: &Call) -> BTreeSet<Ino> {
        let named = |dir: &Ino, name| {
            let dir = self.state.get(*dir)?;
            dir.entries.get(name).map(|entry| entry.ino)
        };
        let mut touched: BTreeSet<Ino> = call.subjects().into_iter().flatten().collect();
        match call {
            Call::Lookup { dir, name }
            | Call::Create { dir, name, .. }
            | Call::Unlink { dir, name }
            | Call::Rmdir { dir, name } => touched.extend(named(dir, name)),
            Call::Rename {
                dir, name, to, new, ..
            } => {
                touched.extend(named(dir, name));
                touched.extend(named(to, new));
            }
            Call::HandleParent { ino } => {
                touched.extend(self.state.get(*ino).map(|dir| dir.parent));
            }
            _ => {}
        }
        touched
    }

    /// Takes back what dead mounts have not committed.
    fn bury(&mut self, half: bool) {
        let dead: BTreeSet<u32> = self
            .mounts
            .iter()
            .filter(|life| !life.is_alive())
            .map(|life| life.seat())
            .collect();
        if dead.is_empty() {
            return;
        }
        self.mounts.retain(|life| life.is_alive());
        let mut count = 0;
        self.steps.retain(|step| {
            let lost = dead.contains(&step.seat);
            count += u32::from(lost);
            !lost || (half && count % 2 == 0)
        });
        self.opens.retain(|(seat, _)| !dead.contains(seat));
        let mut state = self.durable.clone();
        for step in &self.steps {
            state.answer(&step.call, step.ino, &step.cx);
        }
        let inos: Vec<Ino> = state.inodes.keys().copied().collect();
        for ino in inos {
            let count = self.opens.iter().filter(|(_, open)| *open == ino).count();
            let inode = state.get_mut(ino);
            inode.opens = count as u32;
            if inode.nlink == 0 && count == 0 {
                state.inodes.remove(&ino);
            }
        }
        self.state = state;
    }
}

//! The seams over the simulator: virtual time, tasks, disks and a network of our own.
//!
//! madsim gives the executor (which ready task runs next is drawn from the
//! seed), the clock, and the guard that no real time or real randomness slips
//! in. One millisecond of its time is one microsecond of ours, since its
//! shortest timer is a millisecond; timers are kept in a queue of our own,
//! because a madsim timer can not be cancelled.

pub mod disk;
pub mod flying;
mod host;
mod life;
pub mod net;
mod risk;
mod said;

pub use host::{Host, Node};
pub use life::{Life, spawn};

use crate::kernel::Caches;
use crate::rng::Stream;
use crate::stress::Held;
use crate::trace::Trace;
use crate::world::commits::Commits;
use crate::world::invariants::{self, Watched};
use madsim::task::AbortHandle;
use outrider_core::env::{Duration, Either, race};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

/// Nanoseconds of the executor's time in one of ours.
const SCALE: u64 = 1000;

/// Something to do when a moment has come.
type Look = Box<dyn FnOnce(&Sim)>;

enum Action {
    Wake(Waker),
    Call(Box<dyn FnOnce()>),
}

/// What all nodes of a world share: time, trace, and the knobs of the executor.
pub struct Sim {
    /// The seed.
    pub seed: u64,
    /// Events.
    pub trace: Trace,
    time: madsim::time::TimeHandle,
    timers: RefCell<BTreeMap<(u64, u64), Action>>,
    next_timer: Cell<u64>,
    earlier: tokio::sync::Notify,
    polls: Cell<u64>,
    poll_limit: Cell<u64>,
    poll_cost: Cell<u64>,
    yield_permille: Cell<u64>,
    held: RefCell<Option<Held>>,
    /// Mounts whose invariants are looked at.
    watched: RefCell<Vec<Watched>>,
    /// The kernels, by node.
    kernels: RefCell<Vec<(u32, Weak<Caches>)>>,
    /// Every task that has not ended.
    tasks: RefCell<BTreeMap<u64, AbortHandle>>,
    /// The task that fires the timers.
    driver: RefCell<Option<madsim::task::JoinHandle<()>>>,
    rng: Stream,
    next_actor: Cell<u64>,
    /// The mount whose task runs now, and the last probe that each has reached.
    running: Cell<u32>,
    running_node: Cell<u32>,
    reached: RefCell<BTreeMap<u32, &'static str>>,
    /// What is to be done when a mount comes to a probe, by seat.
    steps: RefCell<BTreeMap<u32, Step>>,
    next_task: Cell<u64>,
    /// Nanoseconds by which slow reads were delayed, all of them together.
    delayed: Cell<u64>,
    /// What is to be done between two steps, by when, and when the first is.
    looks: RefCell<BTreeMap<u64, Vec<Look>>>,
    next_look: Cell<u64>,
    /// Who checks the devices at commits.
    commits: RefCell<Option<Rc<Commits>>>,
}

/// Something to be done when a probe was reached so many times more.
struct Step {
    probe: &'static str,
    left: u8,
    then: Box<dyn FnOnce()>,
}

impl Sim {
    /// Nanoseconds by which reads were made slow until now: a lower bound for how long
    /// work that waits for them can take.
    pub fn delayed(&self) -> u64 {
        self.delayed.get()
    }

    fn note_delay(&self, by: u64) {
        self.delayed.set(self.delayed.get().saturating_add(by));
    }

    /// Must be called inside the executor; starts the timer task.
    pub fn new(seed: u64, trace: Trace) -> Rc<Self> {
        let sim = Rc::new(Self {
            seed,
            trace,
            time: madsim::time::TimeHandle::current(),
            timers: RefCell::default(),
            next_timer: Cell::new(0),
            earlier: tokio::sync::Notify::new(),
            polls: Cell::new(0),
            poll_limit: Cell::new(8_000_000),
            poll_cost: Cell::new(100),
            yield_permille: Cell::new(200),
            held: RefCell::default(),
            watched: RefCell::default(),
            kernels: RefCell::default(),
            tasks: RefCell::default(),
            driver: RefCell::default(),
            rng: Stream::new(seed, "executor", 0),
            next_actor: Cell::new(0),
            running: Cell::new(0),
            running_node: Cell::new(0),
            reached: RefCell::default(),
            steps: RefCell::default(),
            next_task: Cell::new(0),
            delayed: Cell::new(0),
            looks: RefCell::default(),
            next_look: Cell::new(u64::MAX),
            commits: RefCell::default(),
        });
        let driver = madsim::task::spawn_local(run_timers(Rc::downgrade(&sim)));
        *sim.driver.borrow_mut() = Some(driver);
        sim
    }

    /// Nanoseconds since the world began.
    pub fn now(&self) -> u64 {
        (self.time.elapsed().as_nanos() / u128::from(SCALE)) as u64
    }

    /// Sets how often a yield point yields, in thousandths.
    pub fn set_yield(&self, permille: u64) {
        self.yield_permille.set(permille);
    }

    /// Sets where tasks are held up.
    pub fn set_held(&self, held: Option<Held>) {
        *self.held.borrow_mut() = held;
    }

    /// How long a task is held up that has come to a yield point.
    fn hold(&self, point: &str) -> Option<u64> {
        let held = self.held.borrow();
        let held = held.as_ref().filter(|held| held.point == point)?;
        let by = self.rng.chance(u64::from(held.permille));
        let by = by.then(|| self.rng.below(held.by))?;
        self.note_delay(by);
        let (now, node) = (self.now(), self.running_node());
        self.trace.event(now, node, "held", &[by], || {
            format!("{point} for {} ms", by / 1_000_000)
        });
        Some(by)
    }

    /// Sets how many polls the world may take.
    pub fn set_poll_limit(&self, limit: u64) {
        self.poll_limit.set(limit);
    }

    /// Sets how long one poll of a task takes, in nanoseconds.
    pub fn set_poll_cost(&self, nanos: u64) {
        self.poll_cost.set(nanos);
    }

    /// Notes that the mount whose task runs has reached a probe.
    pub fn note_probe(&self, name: &'static str) {
        let seat = self.running.get();
        if seat != 0 {
            self.reached.borrow_mut().insert(seat, name);
            self.step(seat, name);
        }
    }

    /// Calls `f` when the mount of this seat has come to a probe so many times: as soon as
    /// the task waits that came to it.
    pub fn set_step(&self, seat: u32, probe: &'static str, times: u8, f: impl FnOnce() + 'static) {
        let step = Step {
            probe,
            left: times.max(1),
            then: Box::new(f),
        };
        self.steps.borrow_mut().insert(seat, step);
    }

    /// Forgets what [`Sim::set_step`] was told.
    pub fn clear_step(&self, seat: u32) {
        self.steps.borrow_mut().remove(&seat);
    }

    fn step(&self, seat: u32, name: &str) {
        let mut steps = self.steps.borrow_mut();
        let Some(step) = steps.get_mut(&seat).filter(|step| step.probe == name) else {
            return;
        };
        step.left -= 1;
        if step.left == 0 {
            let step = steps.remove(&seat).expect("as found");
            self.add(self.now(), Action::Call(step.then));
        }
    }

    /// The node whose task runs.
    pub fn running_node(&self) -> u32 {
        self.running_node.get()
    }

    /// The last probe that a mount has reached.
    pub fn last_probe(&self, seat: u32) -> Option<&'static str> {
        self.reached.borrow().get(&seat).copied()
    }

    /// Number of polls so far.
    pub fn polls(&self) -> u64 {
        self.polls.get()
    }

    /// Looks at a mount's invariants from now on, as long as it lives.
    pub fn watch(&self, mount: Watched) {
        let mut watched = self.watched.borrow_mut();
        watched.retain(|old| old.life.is_alive() && old.mount.strong_count() > 0);
        watched.push(mount);
    }

    /// Remembers who checks the devices at commits.
    pub fn set_commits(&self, commits: Rc<Commits>) {
        *self.commits.borrow_mut() = Some(commits);
    }

    /// Who checks the devices at commits.
    pub fn commits(&self) -> Option<Rc<Commits>> {
        self.commits.borrow().clone()
    }

    /// Calls `f` with each mount that is looked at and lives.
    pub fn each_mount(&self, mut f: impl FnMut(&Rc<outrider_core::node::Mount>, &Rc<Life>)) {
        let watched = self.watched.borrow();
        for one in watched.iter().filter(|one| one.life.is_alive()) {
            if let Some(mount) = one.mount.upgrade() {
                f(&mount, &one.life);
            }
        }
    }

    /// Remembers the kernel of a new mount.
    pub fn know_kernel(&self, node: u32, caches: &Rc<Caches>) {
        let mut kernels = self.kernels.borrow_mut();
        kernels.retain(|(_, caches)| caches.strong_count() > 0);
        kernels.push((node, Rc::downgrade(caches)));
    }

    /// The kernel of a node's last mount, if it is still there.
    pub fn kernel_of(&self, node: u32) -> Option<Rc<Caches>> {
        let kernels = self.kernels.borrow();
        let mut own = kernels.iter().rev().filter(|(other, _)| *other == node);
        own.find_map(|(_, caches)| caches.upgrade())
    }

    /// Looks no longer at the mount of this seat: it was fenced, and its locks are
    /// others' to have, whatever it believes.
    pub fn unwatch(&self, seat: u32) {
        self.watched
            .borrow_mut()
            .retain(|watched| watched.life.seat() != seat);
    }

    /// Ends the world: drops all tasks and timers. Tasks own the channels that
    /// own their wakers, and timers hold devices that hold the timers, so
    /// without this a world would never give its memory back.
    pub async fn end(&self) {
        for abort in self.tasks.borrow().values() {
            abort.abort();
        }
        // An aborted task is dropped when the executor next picks it.
        while !self.tasks.borrow().is_empty() {
            madsim::task::yield_now().await;
        }
        self.watched.take();
        self.commits.take();
        let looks = self.looks.take();
        drop(looks);
        let driver = self.driver.take();
        if let Some(driver) = driver {
            driver.abort();
            let _ = driver.await;
        }
        let timers = self.timers.take();
        // Outside of the borrow: a timer may own a sleep, which looks for its own.
        drop(timers);
    }

    fn add(&self, at: u64, action: Action) -> (u64, u64) {
        let id = self.next_timer.get();
        self.next_timer.set(id + 1);
        let key = (at, id);
        let mut timers = self.timers.borrow_mut();
        let first = timers.keys().next().is_none_or(|first| key < *first);
        timers.insert(key, action);
        if first {
            self.earlier.notify_one();
        }
        key
    }

    /// Calls `f` at `at`, unless the world ends first.
    pub fn call_at(&self, at: u64, f: impl FnOnce() + 'static) {
        self.add(at, Action::Call(Box::new(f)));
    }

    /// Waits until `at`.
    pub fn sleep_until(self: &Rc<Self>, at: u64) -> Sleep {
        Sleep {
            sim: Rc::clone(self),
            at,
            key: None,
        }
    }

    /// Waits for some nanoseconds.
    pub fn sleep(self: &Rc<Self>, nanos: u64) -> Sleep {
        self.sleep_until(self.now() + nanos)
    }

    /// Calls `f` once, before the first step of a task and before the first timer at or
    /// after `at`. Unlike a timer this is no event of the world: that somebody waits for
    /// the moment changes nothing before it.
    pub fn look_at(&self, at: u64, f: impl FnOnce(&Sim) + 'static) {
        let mut looks = self.looks.borrow_mut();
        looks.entry(at).or_default().push(Box::new(f));
        let first = looks.keys().next().copied();
        self.next_look.set(first.unwrap_or(u64::MAX));
    }

    fn look_if_due(&self) {
        while self.next_look.get() != u64::MAX && self.now() >= self.next_look.get() {
            let due = {
                let mut looks = self.looks.borrow_mut();
                let due = looks.pop_first();
                let first = looks.keys().next().copied();
                self.next_look.set(first.unwrap_or(u64::MAX));
                due
            };
            for look in due.into_iter().flat_map(|(_, looks)| looks) {
                look(self);
            }
        }
    }

    fn fire_due(&self) {
        self.look_if_due();
        loop {
            let due = {
                let mut timers = self.timers.borrow_mut();
                match timers.first_entry() {
                    Some(entry) if entry.key().0 <= self.now() => entry.remove(),
                    _ => return,
                }
            };
            match due {
                Action::Wake(waker) => waker.wake(),
                Action::Call(call) => call(),
            }
        }
    }

    fn count_poll(&self) {
        let polls = self.polls.get() + 1;
        self.polls.set(polls);
        assert!(
            polls < self.poll_limit.get(),
            "livelock: {polls} polls by {} ns of simulated time",
            self.now()
        );
        if polls.is_multiple_of(invariants::EVERY)
            && let Some(text) = invariants::broken(&self.watched.borrow())
        {
            panic!("{}{text}", invariants::BROKEN);
        }
        self.time
            .advance(Duration::from_nanos(self.poll_cost.get() * SCALE));
        self.look_if_due();
    }
}

/// Turns all randomness of the world that runs on this thread to other numbers: its own
/// streams, and what the executor draws, whose stream goes on elsewhere.
pub fn turn_randomness(to: u64) {
    use madsim::rand::RngCore as _;
    crate::rng::turn(to);
    let mut executor = madsim::rand::thread_rng();
    for _ in 0..=crate::trace::digest(&to.to_le_bytes()) % 65_536 {
        executor.next_u64();
    }
}

async fn run_timers(sim: Weak<Sim>) {
    loop {
        let (next, earlier) = {
            let Some(sim) = sim.upgrade() else { return };
            sim.fire_due();
            let next = sim.timers.borrow().keys().next().map(|key| key.0);
            (next, Rc::clone(&sim))
        };
        let wait = async {
            match next {
                Some(at) => {
                    let now = earlier.now();
                    let nanos = at.saturating_sub(now).saturating_mul(SCALE);
                    madsim::time::sleep(Duration::from_nanos(nanos)).await;
                }
                None => std::future::pending().await,
            }
        };
        match race(earlier.earlier.notified(), wait).await {
            Either::Left(()) | Either::Right(()) => {}
        }
    }
}

/// Completes at a moment; forgets its timer when dropped.
pub struct Sleep {
    sim: Rc<Sim>,
    at: u64,
    key: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.sim.now() >= self.at {
            return Poll::Ready(());
        }
        let action = Action::Wake(cx.waker().clone());
        match self.key {
            Some(key) if self.sim.timers.borrow().contains_key(&key) => {
                self.sim.timers.borrow_mut().insert(key, action);
            }
            _ => self.key = Some(self.sim.add(self.at, action)),
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.sim.timers.borrow_mut().remove(&key);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

//! The seams over the simulator: virtual time, tasks, disks and a network of our own.
//!
//! madsim gives the executor (which ready task runs next is drawn from the
//! seed), the clock, and the guard that no real time or real randomness slips
//! in. One millisecond of its time is one microsecond of ours, since its
//! shortest timer is a millisecond; timers are kept in a queue of our own,
//! because a madsim timer can not be cancelled.
//!
//! A [`Life`] is one run of a process: killing it stops all its tasks before
//! they are polled again, as the end of a process does.

pub mod disk;
pub mod flying;
pub mod net;
mod risk;
mod said;

use crate::kernel::Caches;
use crate::model::wall_time;
use crate::rng::Stream;
use crate::stress::Held;
use crate::trace::Trace;
use crate::world::invariants::{self, Watched};
use madsim::task::AbortHandle;
use outrider_core::env::{
    ActorMain, Clock, Devices, Duration, Either, Env, LocalBoxFuture, Spawner, Task, Time,
    WallTime, race,
};
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

/// One run of a process, or of an actor in it.
pub struct Life {
    alive: Cell<bool>,
    tasks: RefCell<BTreeMap<u64, AbortHandle>>,
    children: RefCell<Vec<Weak<Life>>>,
    name: RefCell<String>,
    seat: Cell<u32>,
    node: Cell<u32>,
    rid: Cell<u64>,
    /// While `Some`, no task is polled; who wanted to be is woken afterwards.
    paused: RefCell<Option<Vec<Waker>>>,
}

impl Life {
    /// A new life without tasks.
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            alive: Cell::new(true),
            tasks: RefCell::default(),
            children: RefCell::default(),
            name: RefCell::default(),
            seat: Cell::new(0),
            node: Cell::new(0),
            rid: Cell::new(0),
            paused: RefCell::default(),
        })
    }

    /// A life of the mount with this number on this node (worlds of several nodes).
    pub fn of_seat(seat: u32, node: u32) -> Rc<Self> {
        let life = Self::new();
        life.seat.set(seat);
        life.node.set(node);
        life
    }

    /// The node that it runs on.
    pub fn node(&self) -> u32 {
        self.node.get()
    }

    /// Whether it stands still.
    pub fn is_paused(&self) -> bool {
        self.paused.borrow().is_some()
    }

    /// The number of the mount it belongs to; 0 in worlds of one node.
    pub fn seat(&self) -> u32 {
        self.seat.get()
    }

    /// The id under which its mount is known to the cluster; 0 before it has one.
    pub fn rid(&self) -> u64 {
        self.rid.get()
    }

    /// Notes the id of its mount.
    pub fn set_rid(&self, rid: u64) {
        self.rid.set(rid);
    }

    fn child(self: &Rc<Self>, name: &str) -> Rc<Self> {
        let child = Self::new();
        child.alive.set(self.alive.get());
        child.seat.set(self.seat.get());
        child.node.set(self.node.get());
        name.clone_into(&mut child.name.borrow_mut());
        if self.paused.borrow().is_some() {
            *child.paused.borrow_mut() = Some(Vec::new());
        }
        let mut children = self.children.borrow_mut();
        children.retain(|child| child.strong_count() > 0);
        children.push(Rc::downgrade(&child));
        child
    }

    /// Whether its tasks may run.
    pub fn is_alive(&self) -> bool {
        self.alive.get()
    }

    /// Ends it: none of its tasks is polled again.
    pub fn kill(&self) {
        self.alive.set(false);
        for child in self.children.take() {
            if let Some(child) = child.upgrade() {
                child.kill();
            }
        }
        for abort in self.tasks.borrow().values() {
            abort.abort();
        }
    }

    /// Stops (or lets go on) all its tasks and actors, or only the actors of one
    /// name, wherever they are, as a scheduler that does not run them would.
    pub fn pause(&self, only: Option<&str>, stop: bool) {
        let chosen = only.is_none_or(|name| *self.name.borrow() == name);
        if chosen {
            let mut paused = self.paused.borrow_mut();
            if stop && paused.is_none() {
                *paused = Some(Vec::new());
            } else if !stop {
                for waker in paused.take().into_iter().flatten() {
                    waker.wake();
                }
            }
        }
        // An actor's actors are its own: they stop with it only if they are chosen.
        let children = self.children.borrow().clone();
        for child in children.iter().filter_map(Weak::upgrade) {
            child.pause(only, stop);
        }
    }

    /// Number of tasks that have not ended, in it and in its actors.
    pub fn tasks(&self) -> usize {
        let own = self.tasks.borrow().len();
        let children = self.children.borrow();
        own + children
            .iter()
            .filter_map(Weak::upgrade)
            .map(|child| child.tasks())
            .sum::<usize>()
    }
}

struct Guarded {
    sim: Rc<Sim>,
    life: Rc<Life>,
    id: u64,
    aborted: Rc<Cell<bool>>,
    future: Option<LocalBoxFuture<'static, ()>>,
}

impl Future for Guarded {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if !self.life.is_alive() || self.aborted.get() {
            self.future = None;
            return Poll::Ready(());
        }
        if let Some(parked) = &mut *self.life.paused.borrow_mut() {
            parked.push(cx.waker().clone());
            return Poll::Pending;
        }
        self.sim.count_poll();
        self.sim.running.set(self.life.seat());
        self.sim.running_node.set(self.life.node.get());
        let Some(future) = &mut self.future else {
            return Poll::Ready(());
        };
        let out = future.as_mut().poll(cx);
        if out.is_ready() {
            self.future = None;
        }
        out
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.future = None;
        self.aborted.set(true);
        self.life.tasks.borrow_mut().remove(&self.id);
        self.sim.tasks.borrow_mut().remove(&self.id);
    }
}

struct SimTask {
    abort: AbortHandle,
    ended: Rc<Cell<bool>>,
}

impl Task for SimTask {
    fn abort(&self) {
        self.ended.set(true);
        self.abort.abort();
    }
    fn is_finished(&self) -> bool {
        self.ended.get()
    }
}

/// Starts a task that belongs to `life`.
pub fn spawn(sim: &Rc<Sim>, life: &Rc<Life>, future: LocalBoxFuture<'static, ()>) -> Rc<dyn Task> {
    let id = sim.next_task.get();
    sim.next_task.set(id + 1);
    let ended = Rc::new(Cell::new(false));
    let guarded = Guarded {
        sim: Rc::clone(sim),
        life: Rc::clone(life),
        id,
        aborted: Rc::clone(&ended),
        future: Some(future),
    };
    let abort = madsim::task::spawn_local(guarded).abort_handle();
    sim.tasks.borrow_mut().insert(id, abort.clone());
    life.tasks.borrow_mut().insert(id, abort.clone());
    Rc::new(SimTask { abort, ended })
}

/// One machine: its address and its clocks, which outlive its processes.
pub struct Node {
    /// Number, as in the trace.
    pub id: u32,
    /// Address.
    pub ip: std::net::Ipv4Addr,
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
    pub fn address(id: u32) -> std::net::Ipv4Addr {
        std::net::Ipv4Addr::new(10, 0, (id >> 8) as u8, (id & 255) as u8 + 1)
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
        let number = self.sim.next_actor.get();
        self.sim.next_actor.set(number + 1);
        let host = Self {
            life: self.life.child(name),
            ..self.clone()
        };
        Env {
            clock: Rc::new(SimClock {
                sim: Rc::clone(&host.sim),
                node: Rc::clone(&host.node),
            }),
            net: Rc::new(net::NodeNet::new(&host)),
            entropy: Rc::new(Stream::new(host.sim.seed, name, number)),
            devices: Rc::new(host.clone()),
            spawner: Rc::new(SimSpawner { host }),
        }
    }
}

impl Devices for Host {
    fn open(
        &self,
        role: outrider_core::env::DeviceRole,
    ) -> Result<Rc<dyn outrider_core::env::BlockDevice>, outrider_core::env::DeviceError> {
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
        let env = self.host.env(name);
        // The actor's life is the child that `env` made: its last.
        let life = self
            .host
            .life
            .children
            .borrow()
            .last()
            .and_then(Weak::upgrade);
        let (Some(life), true) = (life, self.host.life.is_alive()) else {
            return;
        };
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use outrider_core::env::{DeviceRole, conformance, conformance_clock, conformance_net};
    use std::net::SocketAddrV4;

    /// Runs a world made of `f` on a fresh thread, as the executor demands.
    pub fn simulate<F, T>(seed: u64, f: F) -> T
    where
        F: AsyncFnOnce(Host) -> T + Send + 'static,
        T: Send + 'static,
    {
        crate::world::on_fresh_thread(move || {
            let runtime =
                madsim::runtime::Runtime::with_seed_and_config(seed, madsim::Config::default());
            runtime.block_on(async move {
                let sim = Sim::new(seed, Trace::default());
                let node = Node::new(0, 0, 1_700_000_000_000_000_000);
                let host = Host {
                    net: net::SimNet::new(&sim, net::Links::default()),
                    disks: disk::Disks::new(&sim, 1 << 20, 1 << 20, disk::Timing::default()),
                    life: Life::new(),
                    sim,
                    node,
                };
                f(host).await
            })
        })
        .expect("the world must not panic")
    }

    #[test]
    fn simulated_devices_networks_and_clocks_keep_their_contracts() {
        for seed in 0..8 {
            simulate(seed, async |host: Host| {
                let disks = disk::Disks::new(&host.sim, 8 << 20, 8 << 20, disk::Timing::default());
                let host = Host { disks, ..host };
                let env = host.env("conformance");
                for role in [DeviceRole::Meta, DeviceRole::Data] {
                    let device = host.disks.open(&host, role);
                    conformance::check_device(device, &*env.entropy).await;
                }
                conformance::check_devices(&*env.devices).await;
                conformance_clock::check_clock(&env, true).await;
                let ip = host.node.ip;
                let addr = |number| SocketAddrV4::new(ip, 5000 + number);
                conformance_net::check_network(&env, addr).await;
            });
        }
    }

    #[test]
    fn microseconds_exist_and_dropped_sleeps_leave_nothing() {
        simulate(1, async |host: Host| {
            let env = host.env("a");
            let start = env.clock.now();
            env.sleep(Duration::from_micros(5)).await;
            let took = env.clock.now().since(start);
            assert!((5..8).contains(&took.as_micros()), "{took:?}");
            for _ in 0..100 {
                let long = env.sleep(Duration::from_secs(100));
                let short = env.sleep(Duration::from_micros(1));
                assert_eq!(race(long, short).await, Either::Right(()));
            }
            assert_eq!(host.sim.timers.borrow().len(), 0);
            assert!(env.clock.now().since(start) < Duration::from_millis(1));
        });
    }

    #[test]
    fn a_killed_life_never_runs_again() {
        simulate(2, async |host: Host| {
            let env = host.env("a");
            let count = Rc::new(Cell::new(0));
            let inner = Rc::clone(&count);
            let ticker = env.clone();
            let task = env.spawn("tick", async move {
                loop {
                    ticker.sleep(Duration::from_micros(10)).await;
                    inner.set(inner.get() + 1);
                }
            });
            host.sim.sleep(105_000).await;
            assert!((9..=10).contains(&count.get()), "{}", count.get());
            let before = count.get();
            host.life.kill();
            host.sim.sleep(1_000_000).await;
            assert_eq!(count.get(), before);
            assert!(task.is_finished());
            assert_eq!(host.life.tasks(), 0);
            assert_eq!(Rc::strong_count(&count), 1, "its futures are dropped");
        });
    }

    #[test]
    fn an_actor_ends_with_its_tasks() {
        simulate(3, async |host: Host| {
            let env = host.env("a");
            let (tell, told) = tokio::sync::oneshot::channel::<u64>();
            env.spawner.spawn_actor(
                "b",
                Box::new(move |env| {
                    Box::pin(async move {
                        let ticker = env.clone();
                        env.spawn("forever", async move {
                            loop {
                                ticker.sleep(Duration::from_micros(10)).await;
                            }
                        });
                        env.sleep(Duration::from_micros(50)).await;
                        let _ = tell.send(7);
                    })
                }),
            );
            assert_eq!(told.await, Ok(7));
            host.sim.sleep(100_000).await;
            assert_eq!(host.life.tasks(), 0);
        });
    }

    #[test]
    fn clocks_drift_and_wall_clocks_step() {
        simulate(4, async |mut host: Host| {
            host.node = Node::new(0, 100_000, 0);
            let env = host.env("a");
            env.sleep(Duration::from_millis(11)).await;
            let real = host.sim.now();
            assert!((9_999_000..10_010_000).contains(&real), "{real}");
            let before = env.clock.wall();
            host.node.step_wall(-5_000_000_000);
            assert!(env.clock.wall() < before);
            assert!(env.clock.now() >= Time(11_000_000));
        });
    }
}

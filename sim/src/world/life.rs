//! One life of the mount after the other.

use super::audit::{Auditor, observe};
use super::workload::{Desk, Scene};
use super::{MountError, System, World};
use crate::backend::{Host, spawn};
use crate::disk_model::Survival;
use crate::kernel::{Caches, Kernel, Notify};
use crate::model::Model;
use crate::oracle::Violation;
use crate::plan::steps;
use crate::plan::{DiskFault, End, Fault, LifePlan, Loss, When, Window};
use crate::trace::Link;
use outrider_core::env::{Either, Gate, race};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

const SECOND: u64 = 1_000_000_000;
/// How long a mount, an unmount, a window of calls may take once nothing is
/// wrong, in nanoseconds.
pub(super) const BOUND: u64 = 240 * SECOND;
/// How much longer it may take for reads that the world itself makes slow: as long as
/// they were delayed in the meantime, up to this. With a second for every third read a
/// window of hundreds of calls, each of them prompt, needs more than the bound.
const SLOW_READS_MAX: u64 = 1680 * SECOND;
/// The number of the life in which everything is well.
const LAST: u64 = 1000;

pub(super) fn violation(kind: &'static str, text: impl Into<String>) -> Violation {
    Violation {
        kind,
        text: text.into(),
    }
}

/// Whether a mount lives, and how to end it.
pub(super) struct Fate {
    pub(super) host: Host,
    pub(super) died: Gate,
    severed: Gate,
    /// Whether the mount has given up by itself.
    gave_up: RefCell<Option<Box<dyn Fn() -> bool>>>,
    /// Opens when its cluster was told that it is dead, whether it is or not.
    pub(super) condemned: Gate,
    /// World time when the last fault ends.
    pub(super) calm: Rc<Cell<u64>>,
    /// Operations left until the end, if the plan counts them.
    countdown: Cell<Option<u32>>,
    action: RefCell<Option<End>>,
    /// The step at which it was struck, if the plan named one.
    pub(super) struck_at: Cell<Option<&'static str>>,
    /// Other machines use the devices, too.
    shared: bool,
    /// Told at once when the process dies otherwise than in peace.
    pub(super) on_death: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Fate {
    /// The fate of a process of `host`.
    pub(super) fn new(host: &Host, calm: Rc<Cell<u64>>, shared: bool) -> Rc<Self> {
        Rc::new(Self {
            host: host.clone(),
            died: Gate::default(),
            severed: Gate::default(),
            gave_up: RefCell::default(),
            condemned: Gate::default(),
            calm,
            countdown: Cell::new(None),
            action: RefCell::new(None),
            struck_at: Cell::new(None),
            shared,
            on_death: RefCell::default(),
        })
    }

    /// Ends the process now; with `survival` the machine's power, too. Shared
    /// devices keep their power.
    pub(super) fn kill(&self, survival: Option<Survival>) {
        if self.died.is_open() {
            return;
        }
        let sim = &self.host.sim;
        let args = [survival.map_or(0, |survival| survival as u64 + 1)];
        sim.trace
            .event(sim.now(), self.host.node.id, "DEATH", &args, || {
                survival.map_or("killed".to_owned(), |survival| {
                    let kept = match survival {
                        Survival::None => "what was flushed",
                        Survival::All => "everything",
                        Survival::Sectors => "some sectors of what was not flushed",
                        Survival::Writes => "some writes of what was not flushed",
                    };
                    format!("power loss, keeps {kept}")
                })
            });
        self.host.life.kill();
        let (net, disks, node) = (&self.host.net, &self.host.disks, &self.host.node);
        if self.shared {
            match survival {
                Some(_) => net.darken(node.ip, &self.host.life),
                None => net.end_of(&self.host.life, false),
            }
            disks.clear_trap_of(node.id);
            disks.end_of(node.id);
        } else {
            net.end_of(&self.host.life, survival.is_some());
            disks.clear_trap();
            disks.crash(survival);
        }
        self.died.open();
        let told = self.on_death.take();
        if let Some(told) = told {
            told();
        }
    }

    /// Forgets what the plan had for it.
    pub(super) fn disarm(&self) {
        self.action.take();
        self.countdown.set(None);
        self.host.sim.clear_step(self.host.life.seat());
        if self.shared {
            self.host.disks.clear_trap_of(self.host.node.id);
        }
    }

    /// Whether answers to it count no more.
    pub(super) fn is_condemned(&self) -> bool {
        self.condemned.is_open()
    }

    pub(super) async fn wait_severed(&self) {
        self.severed.wait().await;
    }

    /// Does what the plan has for the end of this life.
    fn strike(&self) {
        match self.action.take() {
            Some(End::Kill(_)) => self.kill(None),
            Some(End::PowerLoss(_, loss)) => self.kill(Some(survival(loss))),
            Some(End::ForceUnmount(_)) => {
                let sim = &self.host.sim;
                let now = sim.now();
                sim.trace
                    .event(now, self.host.node.id, "SEVER", &[], String::new);
                self.severed.open();
            }
            Some(End::Unmount) | None => {}
        }
    }

    /// Lets the end of this life come at the n-th write or flush from now.
    pub(super) fn doom(self: &Rc<Self>, requests: u64) {
        if self.action.borrow().is_some() {
            let weak = Rc::downgrade(self);
            let strike = move || {
                if let Some(fate) = weak.upgrade() {
                    fate.strike();
                }
            };
            if self.shared {
                let node = self.host.node.id;
                self.host.disks.set_trap_of(node, requests, strike);
            } else {
                self.host.disks.set_trap(requests, strike);
            }
        }
    }

    /// Lets the end of this life come at a step of the crash tables.
    fn doom_at(self: &Rc<Self>, place: u8, times: u8) {
        let Some(probe) = steps::probe_at(place) else {
            return; // A plan of a later version.
        };
        let weak = Rc::downgrade(self);
        let seat = self.host.life.seat();
        self.host.sim.set_step(seat, probe, times, move || {
            if let Some(fate) = weak.upgrade() {
                fate.struck_at.set(Some(probe));
                fate.strike();
            }
        });
    }

    /// It gives up by itself: what it answers from now on is as of a mount that is
    /// unmounted by force.
    pub(super) fn give_up(&self) {
        let sim = &self.host.sim;
        let (now, node) = (sim.now(), self.host.node.id);
        sim.trace.event(now, node, "GIVES UP", &[], String::new);
        self.severed.open();
    }

    /// A call begins.
    pub(super) fn count_call(&self) {
        if let Some(left) = self.countdown.get() {
            self.countdown.set(left.checked_sub(1));
            if left == 0 {
                self.strike();
            }
        }
    }

    pub(super) fn is_dead(&self) -> bool {
        self.died.is_open()
    }

    pub(super) fn is_severed(&self) -> bool {
        let gave_up = || {
            self.gave_up
                .borrow()
                .as_ref()
                .is_some_and(|gave_up| gave_up())
        };
        self.severed.is_open() || (!self.is_condemned() && gave_up())
    }

    /// Whether it has given up by itself, or is to be severed, and has not ended yet.
    pub(super) fn is_giving_up(&self) -> bool {
        self.is_severed() && !self.is_dead() && !self.is_condemned()
    }

    /// How to see that the mount has given up by itself.
    pub(super) fn gives_up_with(&self, gave_up: impl Fn() -> bool + 'static) {
        *self.gave_up.borrow_mut() = Some(Box::new(gave_up));
    }
}

pub(super) fn survival(loss: Loss) -> Survival {
    match loss {
        Loss::AllUnflushed => Survival::None,
        Loss::Nothing => Survival::All,
        Loss::Sectors => Survival::Sectors,
        Loss::Writes => Survival::Writes,
    }
}

/// How a wait ended.
pub(super) enum Waited<T> {
    Done(T),
    Died,
}

/// Runs `task` in the mount's process until it ends, the process dies, or its
/// time is up.
pub(super) async fn within<T: 'static>(
    fate: &Rc<Fate>,
    what: &'static str,
    task: impl Future<Output = T> + 'static,
) -> Result<Waited<T>, Violation> {
    let (tell, told) = tokio::sync::oneshot::channel();
    let host = &fate.host;
    spawn(
        &host.sim,
        &host.life,
        Box::pin(async move {
            let _ = tell.send(task.await);
        }),
    );
    let deadline = host.sim.now().max(fate.calm.get()) + BOUND;
    let delayed = host.sim.delayed();
    let ended = async {
        match told.await {
            Ok(out) => Waited::Done(out),
            Err(_) => std::future::pending().await,
        }
    };
    let died = async {
        fate.died.wait().await;
        Waited::Died
    };
    let either = async {
        match race(ended, died).await {
            Either::Left(waited) | Either::Right(waited) => waited,
        }
    };
    let mut either = std::pin::pin!(either);
    let mut until = deadline;
    loop {
        let waited = race(either.as_mut(), host.sim.sleep_until(until)).await;
        if let Either::Left(waited) = waited {
            return Ok(waited);
        }
        let slow = (host.sim.delayed() - delayed).min(SLOW_READS_MAX);
        if deadline + slow <= until {
            let text = format!("{what} did not end within {} s", (BOUND + slow) / SECOND);
            return Err(violation("liveness", text));
        }
        until = deadline + slow;
    }
}

/// Starts the faults of a life, as seen from `now`.
fn schedule<S: System>(world: &Rc<World<S>>, life: &LifePlan, now: u64) -> u64 {
    let mut calm = now;
    for fault in &life.faults {
        let (from, until) = fault.span();
        let trace = &world.sim.trace;
        trace.remark(now + from, 0, "fault", Link::Until(now + until), || {
            format!("{fault:?}")
        });
        match fault.clone() {
            Fault::Disk(mut fault) => {
                match &mut fault {
                    DiskFault::Error { from, until, .. } | DiskFault::Stall { from, until, .. } => {
                        *from += now;
                        *until += now;
                        calm = calm.max(*until);
                    }
                }
                world.disks.add_fault(fault);
            }
            Fault::WallStep { at, by } => {
                let (sim, node) = (Rc::clone(&world.sim), Rc::clone(&world.node));
                let steps = Rc::clone(&world.steps);
                world.sim.call_at(now + at, move || {
                    let before = node.wall_nanos(sim.now());
                    node.step_wall(by);
                    steps.borrow_mut().push((sim.now(), before, before + by));
                });
            }
            Fault::ResetStreams { at } => {
                let net = Rc::clone(&world.net);
                world.sim.call_at(now + at, move || net.reset_all());
            }
            Fault::Partition { from, until } => {
                let (net, ip) = (Rc::clone(&world.net), world.node.ip);
                world.sim.call_at(now + from, move || net.cut(ip, ip));
                let net = Rc::clone(&world.net);
                world.sim.call_at(now + until, move || net.heal());
                calm = calm.max(now + until);
            }
        }
    }
    calm
}

/// Prepares the end that the plan has for this life.
pub(super) fn arm(fate: &Rc<Fate>, end: End, now: u64) {
    let when = match end {
        End::Unmount => return,
        End::Kill(when) | End::PowerLoss(when, _) | End::ForceUnmount(when) => when,
    };
    *fate.action.borrow_mut() = Some(end);
    match when {
        When::Time(at) => {
            let fate = Rc::downgrade(fate);
            let sim = fate.upgrade().map(|fate| Rc::clone(&fate.host.sim));
            sim.expect("just made").call_at(now + at, move || {
                if let Some(fate) = fate.upgrade() {
                    fate.strike();
                }
            });
        }
        When::Request(nth) => fate.doom(nth),
        When::Operations(count) => fate.countdown.set(Some(count)),
        When::Step(place, times) => fate.doom_at(place, times),
    }
}

/// Runs all lives of the plan, and a last one in which everything is well.
pub(super) async fn all_lives<S: System>(world: &Rc<World<S>>) -> Result<(), Violation> {
    for (number, life) in world.plan.lives.iter().enumerate() {
        world.note("LIFE", &[number as u64], || {
            format!(
                "{number}: {} faults, ends {:?}",
                life.faults.len(),
                life.end
            )
        });
        let clean = Box::pin(one_life(world, life, number as u64)).await?;
        world.disks.heal();
        world.net.heal();
        check(world, clean).await?;
    }
    let last = LifePlan {
        windows: Vec::new(),
        faults: Vec::new(),
        end: End::Unmount,
    };
    world.note("LAST", &[], || "everything is healed".to_owned());
    if !Box::pin(one_life(world, &last, LAST)).await? {
        return Err(violation("liveness", "the last life did not end cleanly"));
    }
    check(world, true).await
}

async fn check<S: System>(world: &Rc<World<S>>, clean: bool) -> Result<(), Violation> {
    let host = world.host();
    let result = S::check(&host, &world.volume, clean).await;
    world.note(
        "check",
        &[u64::from(clean), u64::from(result.is_ok())],
        || format!("{result:?}"),
    );
    result.map_err(|text| violation("check", text))
}

/// One life. True if it ended with a clean unmount.
async fn one_life<S: System>(
    world: &Rc<World<S>>,
    life: &LifePlan,
    number: u64,
) -> Result<bool, Violation> {
    let host = world.host();
    let now = world.sim.now();
    let calm = Rc::new(Cell::new(schedule(world, life, now)));
    let fate = Fate::new(&host, calm, false);
    arm(&fate, life.end, now);
    let clean = live(world, life, number, &fate).await;
    fate.action.take();
    fate.kill(None);
    // What the dead process held is dropped when its tasks are next scheduled.
    world.sim.sleep(10_000).await;
    clean
}

async fn mount<S: System>(
    world: &Rc<World<S>>,
    life: &LifePlan,
    fate: &Rc<Fate>,
    caches: &Rc<Caches>,
) -> Result<Option<Rc<S>>, Violation> {
    let faulty = !life.faults.is_empty();
    loop {
        let (again, cache) = (Rc::clone(world), Rc::clone(caches));
        let host = fate.host.clone();
        let attempt = async move {
            let cache = Rc::new(Notify(cache));
            S::mount(&host, &again.plan, &again.volume, cache).await
        };
        match within(fate, "the mount", attempt).await? {
            Waited::Died => return Ok(None),
            Waited::Done(Ok(mount)) => return Ok(Some(mount)),
            Waited::Done(Err(MountError(text))) => {
                world.note("refused", &[], || text.clone());
                if !faulty || world.sim.now() > fate.calm.get() + BOUND {
                    return Err(violation("mount", text));
                }
                world.sim.sleep(SECOND).await;
            }
        }
    }
}

async fn live<S: System>(
    world: &Rc<World<S>>,
    life: &LifePlan,
    number: u64,
    fate: &Rc<Fate>,
) -> Result<bool, Violation> {
    let config = &world.plan.config;
    let caches = Caches::new(
        &world.sim,
        world.node.id,
        number,
        config.kernel_caches,
        config.kernel_locks,
    );
    let Some(mount) = mount(world, life, fate, &caches).await? else {
        return Ok(false);
    };
    world.note("mounted", &[], String::new);
    let cut_off = cut_off_when_severed(world, fate, &mount);
    let scene = Rc::new(Scene {
        kernel: Kernel::new(mount.fs(), caches),
        desk: Desk::new(world, life, fate),
        table: RefCell::default(),
    });
    scene.give_launder();
    if !look_around(world, fate, &scene).await? {
        return Ok(false);
    }
    for window in &life.windows {
        if fate.is_severed() || !run_window(world, fate, &scene, window).await? {
            break;
        }
    }
    if number == LAST {
        follow_to_the_end(world, fate, &scene).await?;
    }
    if fate.is_dead() {
        return Ok(false);
    }
    if fate.is_severed() {
        within(fate, "the forced unmount", cut_off).await?;
        return Ok(false);
    }
    leave(world, fate, &scene, mount).await
}

/// Lets the mount be unmounted by force as soon as the plan says so, whatever is under
/// way; completes when it is.
fn cut_off_when_severed<S: System>(
    world: &Rc<World<S>>,
    fate: &Rc<Fate>,
    mount: &Rc<S>,
) -> impl Future<Output = ()> + use<S> {
    let (mount, waiting) = (Rc::clone(mount), Rc::clone(fate));
    let (tell, told) = tokio::sync::oneshot::channel();
    spawn(
        &world.sim,
        &fate.host.life,
        Box::pin(async move {
            waiting.wait_severed().await;
            mount.force_unmount().await;
            let _ = tell.send(());
        }),
    );
    async move {
        if told.await.is_err() {
            // It died before.
            std::future::pending().await
        }
    }
}

/// Reads everything and judges what the last life left.
async fn look_around<S: System>(
    world: &Rc<World<S>>,
    fate: &Rc<Fate>,
    scene: &Rc<Scene<S::Fs>>,
) -> Result<bool, Violation> {
    let inner = Rc::clone(scene);
    let auditor = Auditor::patient(&world.sim, fate);
    let seen = within(fate, "reading everything", async move {
        observe(&inner.kernel, &auditor).await
    });
    let observed: Model = match seen.await? {
        Waited::Died => return Ok(false),
        Waited::Done(Ok(observed)) => observed,
        Waited::Done(Err(_)) if fate.is_severed() => return Ok(false),
        Waited::Done(Err(text)) => return Err(violation("audit", text)),
    };
    let doubtful = fate.host.disks.shows_doomed_data();
    world.oracle.borrow_mut().doubt_data(doubtful);
    world.oracle.borrow_mut().recovered(&observed)?;
    scene.table.borrow_mut().fill(&observed);
    world.note("judged", &[observed.inodes.len() as u64], || {
        format!("{} inodes recovered", observed.inodes.len())
    });
    Ok(true)
}

/// Runs a window of the workload. False if the process is dead or severed.
async fn run_window<S: System>(
    world: &Rc<World<S>>,
    fate: &Rc<Fate>,
    scene: &Rc<Scene<S::Fs>>,
    window: &Window,
) -> Result<bool, Violation> {
    let mut ends = Vec::new();
    for ops in &window.tasks {
        let (scene, ops) = (Rc::clone(scene), ops.clone());
        let (tell, told) = tokio::sync::oneshot::channel();
        spawn(
            &world.sim,
            &fate.host.life,
            Box::pin(async move {
                scene.run(&ops).await;
                let _ = tell.send(());
            }),
        );
        ends.push(told);
    }
    let (inner, audit, sync) = (Rc::clone(scene), window.audit, window.sync);
    let calm = fate.is_severed();
    let auditor = Auditor::hurried(&world.sim, fate);
    let all = async move {
        for end in ends {
            let _ = end.await;
        }
        let mut result = Ok(());
        if sync && !calm {
            inner.sync().await;
        }
        if audit && !calm {
            result = observe(&inner.recorded(), &auditor).await.map(drop);
        }
        result
    };
    let waited = within(fate, "a window of calls", all).await;
    let waited = waited.map_err(|failure| scene.desk.name_hanging(failure))?;
    match waited {
        Waited::Died => Ok(false),
        // It died in the very step that ended the window.
        Waited::Done(_) if fate.is_dead() => Ok(false),
        // What an audit could not read shows in the recorded answers.
        Waited::Done(_) => {
            world.oracle.borrow_mut().quiet()?;
            world.followers.borrow().verdict()?;
            Ok(!fate.is_severed())
        }
    }
}

/// Lets all followers come to where nothing is left to see, and judges what they saw.
async fn follow_to_the_end<S: System>(
    world: &Rc<World<S>>,
    fate: &Rc<Fate>,
    scene: &Rc<Scene<S::Fs>>,
) -> Result<(), Violation> {
    let (inner, state) = (Rc::clone(scene), world.oracle.borrow().state().clone());
    let following = async move { inner.follow_to_the_end(&state).await };
    if let Waited::Done(followed) = within(fate, "the last walks", following).await? {
        followed.map_err(|text| violation("walk", text))?;
    }
    world.followers.borrow().verdict()
}

/// Closes what is open and unmounts.
async fn leave<S: System>(
    world: &Rc<World<S>>,
    fate: &Rc<Fate>,
    scene: &Rc<Scene<S::Fs>>,
    mount: Rc<S>,
) -> Result<bool, Violation> {
    let inner = Rc::clone(scene);
    let closed = within(
        fate,
        "closing files",
        async move { inner.close_all().await },
    );
    if matches!(closed.await?, Waited::Died) || fate.is_dead() {
        return Ok(false);
    }
    world.oracle.borrow_mut().quiet()?;
    match within(fate, "the unmount", mount.unmount()).await? {
        Waited::Died => Ok(false),
        Waited::Done(Ok(())) => {
            world.oracle.borrow_mut().promise_all();
            world.note("unmounted", &[], String::new);
            Ok(true)
        }
        Waited::Done(Err(text))
            if world.sim.now() <= fate.calm.get() + BOUND || fate.is_severed() =>
        {
            world.note("refused", &[1], || text);
            Ok(false)
        }
        Waited::Done(Err(text)) => Err(violation("unmount", text)),
    }
}

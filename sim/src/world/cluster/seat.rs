//! One mount after the other on one machine: it mounts, works, and ends as the
//! plan, a fence agent or the cluster wants.

use super::{Cluster, PATIENCE, SECOND, violation};
use crate::backend::{Host, Life};
use crate::kernel::{Caches, Kernel, Notify};
use crate::model::Tolerance;
use crate::oracle::Violation;
use crate::plan::cluster::{Ending, How, Round};
use crate::plan::steps;
use crate::plan::{DiskFault, End, Loss, PlanOp, When};
use crate::world::life::{Fate, Waited, arm, within};
use crate::world::workload::{Desk, Office, Scene};
use crate::world::{MountError, System};
use outrider_core::env::{Either, Gate, probe, race};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

/// One mount.
pub(super) struct Seat<S: System> {
    pub fate: Rc<Fate>,
    mounted: RefCell<Option<Mounted<S>>>,
}

struct Mounted<S: System> {
    mount: Rc<S>,
    scene: Rc<Scene<S::Fs>>,
}

/// How the work of a mount went.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Went {
    /// All done.
    Well,
    /// It is dead, or was declared so, or is to be severed.
    Wrong,
    /// The process gave up before it was mounted.
    Refused,
}

impl<S: System> Seat<S> {
    /// The machine's number.
    pub fn number(&self) -> usize {
        self.fate.host.node.id as usize
    }

    /// Whether it is mounted and nobody has declared it dead.
    pub fn is_well(&self) -> bool {
        !self.fate.is_dead()
            && !self.fate.is_condemned()
            && !self.fate.is_severed()
            && self.mounted.borrow().is_some()
    }

    /// The programs. Only of a mount that is up.
    pub fn scene(&self) -> Rc<Scene<S::Fs>> {
        let mounted = self.mounted.borrow();
        Rc::clone(&mounted.as_ref().expect("a mount that is up").scene)
    }

    /// The mount, if it is up.
    pub fn mount(&self) -> Option<Rc<S>> {
        let mounted = self.mounted.borrow();
        mounted.as_ref().map(|mounted| Rc::clone(&mounted.mount))
    }

    /// Runs something in the mount's process, in time. `None` if the mount is
    /// dead, declared dead, or to be severed before it ends.
    pub async fn stage<T: 'static>(
        &self,
        what: &'static str,
        task: impl Future<Output = T> + 'static,
    ) -> Result<Option<T>, Violation> {
        let fate = &self.fate;
        let gone = race(fate.condemned.wait(), fate.wait_severed());
        match race(within(fate, what, task), gone).await {
            Either::Left(Ok(Waited::Done(out))) if !fate.is_dead() => Ok(Some(out)),
            Either::Left(Ok(_)) | Either::Right(_) => Ok(None),
            Either::Left(Err(failure)) => {
                let text = format!("node {}: {}", self.number(), failure.text);
                Err(Violation { text, ..failure })
            }
        }
    }
}

/// Everybody leaves, and nobody comes back.
pub(super) fn all_leave(count: usize) -> Vec<Ending> {
    let end = |node| Ending {
        node,
        when: When::Time(0),
        how: How::Leave,
        back: u64::MAX,
    };
    (0..count as u8).map(end).collect()
}

/// How many nodes still have something to do in a round.
pub(super) struct Busy {
    count: Cell<usize>,
    over: Gate,
}

impl Busy {
    /// For so many nodes.
    pub fn new(count: usize) -> Rc<Self> {
        Rc::new(Self {
            count: Cell::new(count),
            over: Gate::default(),
        })
    }

    /// One of them has done its part.
    pub fn done(&self) {
        self.count.set(self.count.get() - 1);
        if self.count.get() == 0 {
            self.over.open();
        }
    }
}

/// One node's part of a round. A node that has done its part is there for the
/// others until all have.
pub(super) async fn drive<S: System>(
    world: &Rc<Cluster<S>>,
    number: usize,
    round: &Rc<Round>,
    busy: &Busy,
) -> Result<(), Violation> {
    let mut ending = round
        .ends
        .iter()
        .find(|end| usize::from(end.node) == number)
        .copied();
    let back = ending.map_or(SECOND, |ending| ending.back);
    let mut tasks: Vec<Vec<PlanOp>> = round
        .tasks
        .iter()
        .filter(|task| usize::from(task.node) == number)
        .map(|task| task.ops.clone())
        .collect();
    loop {
        while world.checking.get() {
            world
                .checked
                .wait_for(|| (!world.checking.get()).then_some(()))
                .await;
        }
        let seat = take_seat(world, number).await?;
        if let Some(ending) = ending {
            prepare(world, &seat, ending);
        }
        let went = match mount(world, &seat).await? {
            Went::Well => work(world, &seat, std::mem::take(&mut tasks)).await?,
            Went::Wrong => Went::Wrong,
            Went::Refused => {
                world.sim.sleep(SECOND).await;
                continue;
            }
        };
        let leaves = ending.is_some_and(|ending| ending.how == How::Leave);
        if went == Went::Well && !leaves {
            busy.done();
            let fate = &seat.fate;
            let unwell = race(
                fate.died.wait(),
                race(fate.condemned.wait(), fate.wait_severed()),
            );
            if let Either::Left(()) = race(busy.over.wait(), unwell).await {
                seat.fate.disarm();
                return Ok(());
            }
            busy.count.set(busy.count.get() + 1);
        }
        ending = None;
        if went == Went::Well && leaves {
            leave(world, &seat).await?;
        }
        retire(world, &seat).await?;
        if back == u64::MAX {
            busy.done();
            return Ok(());
        }
        world.sim.sleep(back).await;
    }
}

/// The mount that is there, or a new one.
async fn take_seat<S: System>(
    world: &Rc<Cluster<S>>,
    number: usize,
) -> Result<Rc<Seat<S>>, Violation> {
    let machine = &world.machines[number];
    let old = machine.seat.borrow().clone();
    if let Some(old) = old {
        if old.is_well() {
            return Ok(old);
        }
        retire(world, &old).await?;
    }
    let node = &machine.node;
    world.disks.admit(node.id);
    world.net.lighten(node.ip);
    let seat_number = world.fates.borrow().len() as u32 + 1;
    let host = Host {
        sim: Rc::clone(&world.sim),
        node: Rc::clone(node),
        life: Life::of_seat(seat_number, node.id),
        net: Rc::clone(&world.net),
        disks: Rc::clone(&world.disks),
    };
    let fate = Fate::new(&host, Rc::clone(&world.calm), true);
    world.fates.borrow_mut().push(Rc::clone(&fate));
    let weak = Rc::downgrade(world);
    let (condemned, node_id) = (fate.condemned.clone(), node.id);
    let own = Rc::downgrade(&fate);
    *fate.on_death.borrow_mut() = Some(Box::new(move || {
        let Some(world) = weak.upgrade() else { return };
        world.note(node_id, "dead", &[u64::from(seat_number)], String::new);
        world.calm_after(world.sim.now() + 60 * SECOND);
        let struck_at = own.upgrade().and_then(|fate| fate.struck_at.get());
        let last = struck_at.or_else(|| world.sim.last_probe(seat_number));
        if let Some(step) = last.and_then(steps::death_after) {
            probe(step);
        }
        if !condemned.is_open() {
            world.died(seat_number);
        }
    }));
    let seat = Rc::new(Seat {
        fate,
        mounted: RefCell::default(),
    });
    *machine.seat.borrow_mut() = Some(Rc::clone(&seat));
    Ok(seat)
}

/// Arms the end that the plan has for a mount.
fn prepare<S: System>(world: &Rc<Cluster<S>>, seat: &Rc<Seat<S>>, ending: Ending) {
    let end = match ending.how {
        How::Kill => End::Kill(ending.when),
        How::Power => End::PowerLoss(ending.when, Loss::Nothing),
        How::Force => End::ForceUnmount(ending.when),
        How::Leave => return,
    };
    if let When::Time(at) = ending.when {
        world.calm_after(world.sim.now() + at);
    }
    arm(&seat.fate, end, world.sim.now());
}

fn tolerance<S: System>(world: &Cluster<S>) -> Tolerance {
    let rounds = world.cluster().rounds.iter();
    let mut troubles = rounds.flat_map(|round| &round.troubles);
    Tolerance {
        io: troubles.any(|trouble| {
            matches!(
                trouble,
                crate::plan::cluster::Trouble::Disk(DiskFault::Error { .. })
            )
        }),
        space: false,
        link: false,
    }
}

async fn mount<S: System>(world: &Rc<Cluster<S>>, seat: &Rc<Seat<S>>) -> Result<Went, Violation> {
    if seat.is_well() {
        return Ok(Went::Well);
    }
    let (fate, config) = (&seat.fate, &world.plan.config);
    let life = u64::from(fate.host.life.seat());
    let caches = Caches::new(
        &world.sim,
        fate.host.node.id,
        life,
        config.kernel_caches && S::TELLS_OTHER_KERNELS,
        config.kernel_locks,
    );
    caches.walk();
    let (plan, volume) = (Rc::clone(&world.plan), Rc::clone(&world.volume));
    let (host, cache) = (fate.host.clone(), Rc::new(Notify(Rc::clone(&caches))));
    let attempt = async move { S::mount(&host, &plan, &volume, cache).await };
    match seat.stage("the mount", attempt).await? {
        None => Ok(Went::Wrong),
        Some(Err(MountError(text))) => {
            world.note(fate.host.node.id, "refused", &[], || text.clone());
            if world.sim.now() > world.calm.get() + PATIENCE {
                return Err(violation("mount", text));
            }
            // A command that failed: its process ends, and nobody has used it. The
            // cluster may know it all the same, and fence it.
            fate.disarm();
            fate.on_death.take();
            fate.kill(None);
            Ok(Went::Refused)
        }
        Some(Ok(mount)) => {
            let machine = &world.machines[seat.number()];
            let office = Office {
                node: Rc::clone(&machine.node),
                oracle: Rc::clone(&world.oracle),
                followers: Rc::clone(&world.followers),
                steps: Rc::clone(&machine.steps),
                tags: Rc::clone(&world.tags),
                calls: Rc::clone(&world.calls),
                tolerance: tolerance(world),
            };
            let scene = Rc::new(Scene {
                kernel: Kernel::new(mount.fs(), caches),
                desk: Desk::of_seat(office, fate),
                table: RefCell::default(),
            });
            scene.give_launder();
            scene.table.borrow_mut().know(world.oracle.borrow().state());
            // Its answers are those of a severed mount from the moment on in which it gives
            // up, whenever the task that waits for that is scheduled.
            let weak = Rc::downgrade(&mount);
            fate.gives_up_with(move || weak.upgrade().is_some_and(|mount| mount.is_evicted()));
            let (own, its) = (Rc::clone(&mount), Rc::downgrade(fate));
            let watch = async move {
                own.evicted().await;
                let fate = its.upgrade().filter(|fate| !fate.is_condemned());
                if let Some(fate) = fate {
                    // Nobody has declared it dead: it was out of touch for too long.
                    fate.give_up();
                }
            };
            crate::backend::spawn(&world.sim, &fate.host.life, Box::pin(watch));
            *seat.mounted.borrow_mut() = Some(Mounted { mount, scene });
            world.note(fate.host.node.id, "mounted", &[life], String::new);
            Ok(Went::Well)
        }
    }
}

async fn work<S: System>(
    world: &Rc<Cluster<S>>,
    seat: &Rc<Seat<S>>,
    tasks: Vec<Vec<PlanOp>>,
) -> Result<Went, Violation> {
    let mut ends = Vec::new();
    for ops in tasks {
        let scene = seat.scene();
        let (tell, told) = tokio::sync::oneshot::channel();
        let run = async move {
            scene.run(&ops).await;
            let _ = tell.send(());
        };
        crate::backend::spawn(&world.sim, &seat.fate.host.life, Box::pin(run));
        ends.push(told);
    }
    let all = async move {
        for end in ends {
            let _ = end.await;
        }
    };
    let done = seat.stage("the work of a round", all).await?;
    Ok(match done {
        Some(()) if seat.is_well() => Went::Well,
        _ => Went::Wrong,
    })
}

/// Closes what is open and unmounts.
async fn leave<S: System>(world: &Rc<Cluster<S>>, seat: &Rc<Seat<S>>) -> Result<(), Violation> {
    let scene = seat.scene();
    let closing = async move { scene.close_all().await };
    if seat.stage("closing files", closing).await?.is_none() {
        return Ok(());
    }
    let Some(mount) = seat.mount() else {
        return Ok(());
    };
    match seat.stage("the unmount", mount.unmount()).await? {
        Some(Ok(())) => {
            let number = seat.fate.host.life.seat();
            world.oracle.borrow_mut().left(number);
            world.note(seat.fate.host.node.id, "unmounted", &[], String::new);
            seat.fate.on_death.take();
            Ok(())
        }
        Some(Err(text)) if world.sim.now() <= world.calm.get() + PATIENCE => {
            world.note(seat.fate.host.node.id, "refused", &[1], || text);
            Ok(())
        }
        Some(Err(text)) => Err(violation("unmount", text)),
        None => Ok(()),
    }
}

/// Ends what is left of a mount. One that was declared dead and lives gets the
/// time to find out by itself, as its front would.
async fn retire<S: System>(world: &Rc<Cluster<S>>, seat: &Rc<Seat<S>>) -> Result<(), Violation> {
    let fate = &seat.fate;
    fate.disarm();
    if !fate.is_dead() {
        if let Some(mount) = seat.mount() {
            if fate.is_condemned() && !fate.is_severed() {
                let own = Rc::clone(&mount);
                let told = async move { own.evicted().await };
                let waited = race(
                    within(fate, "the eviction", told),
                    world.sim.sleep(40 * SECOND),
                );
                if let Either::Right(()) = waited.await {
                    world.note(fate.host.node.id, "unaware", &[], String::new);
                }
            }
            if fate.is_condemned() || fate.is_severed() {
                let forced = mount.force_unmount();
                within(fate, "the forced unmount", forced).await?;
            }
        }
        fate.kill(None);
    }
    seat.mounted.take();
    // What the dead process held is dropped when its tasks are next scheduled.
    world.sim.sleep(10_000).await;
    Ok(())
}

//! A world of several nodes over one pair of devices: rounds of work under
//! faults and deaths, each ended by a moment of quiet in which the judge looks
//! at the answers of all mounts together; then a core of nodes that must go on
//! while the others are broken for ever; then everything healed, read from
//! every node, left and checked.
//!
//! Whose cache is it: the devices and their volatile cache are the storage's.
//! The end of a process or a machine loses its requests in flight, and the
//! storage keeps what it had acknowledged; only a blackout loses what nobody
//! had flushed.
//!
//! Each mount has a seat, numbered through the world: the judge, the fence
//! agents and the devices know it by that. A mount that ended otherwise than in
//! peace, or that a fence agent declared dead, is a death: the next moment of
//! quiet judges what it has taken along (`oracle::deaths`).

mod fencing;
mod seat;
mod trouble;
mod watch;

pub use fencing::{Fencer, fencer};

use super::life::{BOUND, Fate, violation};
use super::{Outcome, System};
use crate::backend::disk::Disks;
use crate::backend::net::SimNet;
use crate::backend::{Host, Life, Node, Sim, spawn};
use crate::disk_model::Survival;
use crate::model::{Model, S_IFDIR};
use crate::oracle::walk::Followers;
use crate::oracle::{Death, Oracle, Violation};
use crate::plan::cluster::{Agents, Broken, ClusterPlan, Round};
use crate::plan::{Loss, Plan};
use crate::rng::Stream;
use crate::world::audit::{Auditor, observe};
use crate::world::commits::until_broken;
use outrider_core::env::{Either, Gate, LocalBoxFuture, Signal, race};
use seat::{Busy, Seat};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::Ipv4Addr;
use std::rc::Rc;

const SECOND: u64 = 1_000_000_000;

/// What a world is made from.
pub(super) struct Parts {
    pub plan: Plan,
    pub sim: Rc<Sim>,
    pub net: Rc<SimNet>,
    pub disks: Rc<Disks>,
    pub first: Rc<Node>,
}

/// A machine and who is mounted on it.
struct Machine<S: System> {
    node: Rc<Node>,
    steps: Rc<RefCell<Vec<(u64, i64, i64)>>>,
    seat: RefCell<Option<Rc<Seat<S>>>>,
}

/// A running world.
pub(super) struct Cluster<S: System> {
    plan: Rc<Plan>,
    sim: Rc<Sim>,
    net: Rc<SimNet>,
    disks: Rc<Disks>,
    volume: Rc<S::Volume>,
    rng: Stream,
    oracle: Rc<RefCell<Oracle>>,
    followers: Rc<RefCell<Followers>>,
    tags: Rc<Cell<u64>>,
    calls: Rc<Cell<u64>>,
    /// World time when the last trouble ends.
    calm: Rc<Cell<u64>>,
    machines: Vec<Machine<S>>,
    /// All mounts there ever were; seat numbers count from 1.
    fates: RefCell<Vec<Rc<Fate>>>,
    deaths: RefCell<Vec<Death>>,
    agents: Cell<Agents>,
    asked: Cell<u32>,
    /// Mounts that an agent said were dead, when, and whether that was a lie.
    acked: RefCell<BTreeMap<u32, (u64, bool)>>,
    /// Mounts that live on though the volume does not list them, and since when.
    unlisted: RefCell<BTreeMap<u32, u64>>,
    /// Cuts in force, by direction.
    cuts: RefCell<BTreeMap<(Ipv4Addr, Ipv4Addr), u32>>,
    /// Nobody mounts while the devices are being checked.
    checking: Cell<bool>,
    checked: Signal,
    round: Cell<u32>,
    super_seen: Cell<(u64, u32)>,
    verdict: RefCell<Option<Violation>>,
    doom: Gate,
}

/// Runs the world.
pub(super) async fn world<S: System>(
    parts: Parts,
    volume: Rc<S::Volume>,
    outcome: &mut Outcome,
) -> Result<(), Violation> {
    let plan = Rc::new(parts.plan);
    let cluster = plan.cluster.as_ref().expect("a plan of several nodes");
    let now = parts.sim.now();
    let machines = cluster.nodes.iter().enumerate().map(|(number, node)| {
        let wall = parts.first.wall_nanos(now) - now as i64 + node.wall_skew;
        Machine {
            node: Node::new(number as u32, i64::from(node.drift_ppm), wall),
            steps: Rc::default(),
            seat: RefCell::default(),
        }
    });
    let world = Rc::new(Cluster::<S> {
        machines: machines.collect(),
        rng: Stream::new(plan.seed, "cluster world", 0),
        oracle: Rc::new(RefCell::new(Oracle::new(Model::new(S_IFDIR | 0o755)))),
        followers: Rc::default(),
        agents: Cell::new(cluster.agents),
        plan: Rc::clone(&plan),
        sim: parts.sim,
        net: parts.net,
        disks: parts.disks,
        volume,
        tags: Rc::default(),
        calls: Rc::default(),
        calm: Rc::new(Cell::new(now)),
        fates: RefCell::default(),
        deaths: RefCell::default(),
        asked: Cell::new(0),
        acked: RefCell::default(),
        unlisted: RefCell::default(),
        cuts: RefCell::default(),
        checking: Cell::new(false),
        checked: Signal::default(),
        round: Cell::new(0),
        super_seen: Cell::new((0, 0)),
        verdict: RefCell::default(),
        doom: Gate::default(),
    });
    fencing::install(&world);
    watch::install(&world);
    let all = until_broken(&world.sim, Box::pin(world.all()));
    let result = match race(world.doom.wait(), all).await {
        Either::Left(()) => Ok(()),
        Either::Right(result) => result,
    };
    let result = result.map_err(|failure| world.name_waiting(failure));
    let verdict = world.verdict.take();
    fencing::remove();
    outcome.unjudged = world.oracle.borrow().unjudged();
    outcome.steps = world.oracle.borrow().steps();
    outcome.calls = world.calls.get();
    world.end();
    match verdict {
        Some(verdict) if verdict.kind == watch::LIED => {
            outcome.blamed = Some(verdict.text);
            Ok(())
        }
        Some(verdict) => Err(verdict),
        None => result,
    }
}

impl<S: System> Cluster<S> {
    fn cluster(&self) -> &ClusterPlan {
        self.plan.cluster.as_ref().expect("a plan of several nodes")
    }

    fn note(&self, node: u32, kind: &'static str, args: &[u64], text: impl FnOnce() -> String) {
        self.sim.trace.event(self.sim.now(), node, kind, args, text);
    }

    /// Something was seen that ends the world.
    fn condemn(&self, kind: &'static str, text: String) {
        let mut verdict = self.verdict.borrow_mut();
        if verdict.is_none() {
            *verdict = Some(violation(kind, text));
            self.doom.open();
        }
    }

    /// Trouble lasts until `at`.
    fn calm_after(&self, at: u64) {
        self.calm.set(self.calm.get().max(at));
    }

    /// Adds to a failure of liveness who waits for what.
    fn name_waiting(&self, mut failure: Violation) -> Violation {
        if failure.kind != "liveness" {
            return failure;
        }
        for machine in &self.machines {
            let Some(seat) = machine.seat.borrow().clone() else {
                continue;
            };
            let Some(mount) = seat.mount() else { continue };
            let heading = format!(
                "\n node {}, mount {}:",
                seat.number(),
                seat.fate.host.life.seat()
            );
            failure.text.push_str(&heading);
            failure = seat.scene().desk.name_hanging(failure);
            failure.text.push_str(&mount.waits());
        }
        failure
    }

    /// Stops everything: nothing may go on while the outcome is read.
    fn end(&self) {
        for fate in self.fates.borrow().iter() {
            fate.on_death.take();
            fate.kill(None);
        }
    }

    async fn all(self: &Rc<Self>) -> Result<(), Violation> {
        let rounds = self.cluster().rounds.clone();
        for (number, round) in rounds.into_iter().enumerate() {
            self.note(0, "ROUND", &[number as u64], || {
                format!(
                    "{number}: {:?}, {:?}, blackout {:?}",
                    round.troubles, round.ends, round.blackout
                )
            });
            self.play(Rc::new(round)).await?;
        }
        self.core().await?;
        self.last().await
    }

    /// One round, and the judgement after it.
    async fn play(self: &Rc<Self>, round: Rc<Round>) -> Result<(), Violation> {
        self.round.set(self.round.get() + 1);
        self.stir(&round);
        let everybody: Vec<usize> = (0..self.machines.len()).collect();
        self.work(everybody.clone(), &round).await?;
        self.settle(everybody, &round, &round.sync, &round.audit)
            .await
    }

    /// Lets these nodes do their part of a round; ends when all have.
    async fn work(self: &Rc<Self>, nodes: Vec<usize>, round: &Rc<Round>) -> Result<(), Violation> {
        self.work_beside(nodes, round, Box::pin(std::future::ready(Ok(()))))
            .await
    }

    /// As [`Cluster::work`], while something else goes on: until that has ended, too,
    /// whoever dies is mounted again. Without, the last one alive might wait for ever
    /// for a majority.
    async fn work_beside(
        self: &Rc<Self>,
        nodes: Vec<usize>,
        round: &Rc<Round>,
        beside: LocalBoxFuture<'static, Result<(), Violation>>,
    ) -> Result<(), Violation> {
        let driving = Life::new();
        let busy = Busy::new(nodes.len() + 1);
        let mut ends = Vec::new();
        let (tell, told) = tokio::sync::oneshot::channel();
        let over = Rc::clone(&busy);
        let aside = async move {
            let result = beside.await;
            over.done();
            let _ = tell.send(result);
        };
        spawn(&self.sim, &driving, Box::pin(aside));
        ends.push(told);
        for number in nodes {
            let (tell, told) = tokio::sync::oneshot::channel();
            let (world, round, busy) = (Rc::clone(self), Rc::clone(round), Rc::clone(&busy));
            let drive = async move {
                let result = Box::pin(seat::drive(&world, number, &round, &busy)).await;
                let _ = tell.send(result);
            };
            spawn(&self.sim, &driving, Box::pin(drive));
            ends.push(told);
        }
        let mut result = Ok(());
        while !ends.is_empty() && result.is_ok() {
            result = first_of(&mut ends).await;
        }
        driving.kill();
        result
    }

    /// The mounts that are up and that nobody has declared dead.
    fn seated(&self) -> Vec<Rc<Seat<S>>> {
        let seats = self.machines.iter();
        seats
            .filter_map(|machine| machine.seat.borrow().clone())
            .filter(|seat| seat.is_well())
            .collect()
    }

    /// A mount that has given up by itself and whose process has not ended yet.
    fn giving_up(&self) -> Option<Rc<Fate>> {
        let fates = self.fates.borrow();
        fates.iter().find(|fate| fate.is_giving_up()).cloned()
    }

    /// A moment of quiet among `nodes`.
    async fn settle(
        self: &Rc<Self>,
        nodes: Vec<usize>,
        round: &Rc<Round>,
        sync: &[u8],
        audit: &[u8],
    ) -> Result<(), Violation> {
        let (world, round) = (Rc::clone(self), Rc::clone(round));
        let (sync, audit) = (sync.to_vec(), audit.to_vec());
        let look = async move { world.look(&round, &sync, &audit).await };
        let idle = Rc::new(Round::default());
        self.work_beside(nodes, &idle, Box::pin(look)).await
    }

    /// Syncs, reads, and judges what was answered.
    async fn look(
        self: &Rc<Self>,
        round: &Round,
        sync: &[u8],
        audit: &[u8],
    ) -> Result<(), Violation> {
        for seat in self.seated() {
            let number = seat.number() as u8;
            let (sync, audit) = (sync.contains(&number), audit.contains(&number));
            if !sync && !audit || !seat.is_well() {
                continue;
            }
            let (scene, fate) = (seat.scene(), Rc::clone(&seat.fate));
            let auditor = Auditor::hurried(&self.sim, &fate);
            let look = async move {
                if sync {
                    scene.sync().await;
                }
                if audit {
                    // What it can not read shows in the recorded answers.
                    let _ = observe(&scene.recorded(), &auditor).await;
                }
            };
            seat.stage("a sync or an audit", look).await?;
        }
        self.judge(round).await?;
        self.followers.borrow().verdict()?;
        let oracle = self.oracle.borrow();
        for seat in self.seated() {
            seat.scene().table.borrow_mut().know(oracle.state());
        }
        Ok(())
    }

    async fn judge(self: &Rc<Self>, round: &Round) -> Result<(), Violation> {
        let mut observer = usize::from(round.observer);
        loop {
            // Its calls are open, or end with errors, until its process has ended; only
            // then is it a death.
            if let Some(fate) = self.giving_up() {
                fate.died.wait().await;
                continue;
            }
            if self.deaths.borrow().is_empty() {
                return self.oracle.borrow_mut().quiet();
            }
            let before = self.deaths.borrow().len();
            // What those who live have done is not to be in question as well.
            for seat in self.seated() {
                if !seat.is_well() {
                    continue; // It died meanwhile.
                }
                let scene = seat.scene();
                seat.stage("a sync", async move { scene.sync().await })
                    .await?;
            }
            let observed = self.observe(observer).await?;
            observer = (observer + 1) % self.machines.len();
            let Some(observed) = observed else { continue };
            if self.deaths.borrow().len() > before || self.giving_up().is_some() {
                continue; // Somebody died meanwhile, or is about to: look again.
            }
            let deaths = self.deaths.take();
            self.note(0, "judged", &[deaths.len() as u64], || {
                format!("{deaths:?}")
            });
            let mut oracle = self.oracle.borrow_mut();
            oracle.doubt_data(self.disks.shows_doomed_data());
            return oracle.lost(&deaths, &observed);
        }
    }

    /// Reads everything from one node, or another if that one is not well.
    /// `None`: it died, or there is nobody.
    async fn observe(self: &Rc<Self>, number: usize) -> Result<Option<Model>, Violation> {
        let seats = self.seated();
        let own = seats.iter().find(|seat| seat.number() == number);
        let Some(seat) = own.or_else(|| seats.first()) else {
            self.sim.sleep(SECOND).await;
            return Ok(None);
        };
        let (scene, auditor) = (seat.scene(), Auditor::patient(&self.sim, &seat.fate));
        let look = async move { observe(&scene.kernel, &auditor).await };
        match seat.stage("reading everything", look).await? {
            None => Ok(None),
            Some(Ok(observed)) => Ok(Some(observed)),
            Some(Err(_)) if !seat.is_well() => Ok(None),
            Some(Err(text)) => Err(violation("audit", text)),
        }
    }

    /// All machines and the storage lose power. When they have it again, the
    /// devices are checked before anybody mounts.
    fn blackout(self: &Rc<Self>, loss: Loss) {
        let survival = super::life::survival(loss);
        self.note(0, "BLACKOUT", &[survival as u64], || {
            format!("{survival:?}")
        });
        for fate in self.fates.borrow().clone() {
            fate.kill(Some(Survival::All));
        }
        self.disks.crash(Some(survival));
        self.oracle.borrow_mut().storage_lost_power();
        self.super_after_blackout();
        // Who checks is not to meet what was wrong with the storage before.
        self.disks.heal();
        self.checking.set(true);
        let world = Rc::clone(self);
        let check = async move {
            world.sim.sleep(SECOND).await;
            if let Err(failure) = world.check(false).await {
                world.condemn(failure.kind, failure.text);
            }
            world.checking.set(false);
            world.checked.wake_all();
        };
        spawn(&self.sim, &Life::new(), Box::pin(check));
    }

    /// A host outside of the cluster.
    fn observer(&self) -> Host {
        Host {
            sim: Rc::clone(&self.sim),
            node: Node::new(200, 0, 0),
            life: Life::new(),
            net: Rc::clone(&self.net),
            disks: Rc::clone(&self.disks),
        }
    }

    async fn check(&self, clean: bool) -> Result<(), Violation> {
        let result = S::check(&self.observer(), &self.volume, clean).await;
        let args = [u64::from(clean), u64::from(result.is_ok())];
        self.note(0, "check", &args, || format!("{result:?}"));
        result.map_err(|text| violation("check", text))
    }

    /// Waits until no trouble is left.
    async fn heal(&self) {
        self.round.set(self.round.get() + 1);
        self.sim.sleep_until(self.calm.get() + 1).await;
        self.disks.heal();
    }

    /// A core goes on while the others are broken for ever.
    async fn core(self: &Rc<Self>) -> Result<(), Violation> {
        let cluster = self.cluster();
        let core = cluster.core;
        if core == 0 {
            return Ok(());
        }
        self.heal().await;
        if matches!(self.agents.get(), Agents::Fail | Agents::Hang | Agents::Lie) {
            self.agents.set(Agents::Prompt);
        }
        let idle = Rc::new(Round::default());
        self.work((0..self.machines.len()).collect(), &idle).await?;
        let broken = cluster.broken;
        self.note(0, "CORE", &[u64::from(core)], || {
            format!("{core:#b} goes on, the others are {broken:?}")
        });
        let is_core = |number: &usize| core >> number & 1 == 1;
        let others: Vec<usize> = (0..self.machines.len()).filter(|n| !is_core(n)).collect();
        for number in &others {
            self.break_down(*number, broken, true);
        }
        let round = Rc::new(cluster.core_round.clone());
        let nodes: Vec<usize> = (0..self.machines.len()).filter(is_core).collect();
        let observer = nodes[usize::from(round.observer) % nodes.len()];
        let round = Rc::new(Round {
            observer: observer as u8,
            ..Round::clone(&round)
        });
        self.work(nodes.clone(), &round).await?;
        // The others may be far from well: only the core looks.
        let in_core = |list: &[u8]| -> Vec<u8> {
            let in_core = list.iter().filter(|n| is_core(&usize::from(**n)));
            in_core.copied().collect()
        };
        let (sync, audit) = (in_core(&round.sync), in_core(&round.audit));
        for number in &others {
            self.abandon(*number);
        }
        let result = self.settle(nodes, &round, &sync, &audit).await;
        for number in &others {
            self.break_down(*number, broken, false);
        }
        result
    }

    /// Breaks a node, or takes that back.
    fn break_down(self: &Rc<Self>, number: usize, how: Broken, broken: bool) {
        let seat = self.machines[number].seat.borrow().clone();
        match (how, seat) {
            (Broken::Dead, Some(seat)) if broken => seat.fate.kill(None),
            (Broken::Dark, Some(seat)) if broken => seat.fate.kill(Some(Survival::All)),
            (Broken::Still, seat) => {
                // The whole machine: of a stopped process alone nobody would know.
                let node = self.machines[number].node.id;
                let all = (1 << self.machines.len()) - 1;
                self.cut(1 << number, all & !(1 << number), false, broken);
                if broken {
                    self.disks.freeze(node);
                } else {
                    self.disks.thaw(node);
                }
                if let Some(seat) = seat {
                    seat.fate.host.life.pause(None, broken);
                }
            }
            (Broken::Alone, _) => {
                let all = (1 << self.machines.len()) - 1;
                self.cut(1 << number, all & !(1 << number), false, broken);
            }
            _ => {}
        }
    }

    /// A mount is dead, or counts so, from now on.
    fn died(&self, seat: u32) {
        let at = self.oracle.borrow_mut().moment();
        self.deaths.borrow_mut().push(Death { seat, at });
    }

    /// Whatever is mounted there counts no more: it is broken for ever. So does one that
    /// has given up: nobody ends its process before everything is healed.
    fn abandon(&self, number: usize) {
        if let Some(seat) = self.machines[number].seat.borrow().clone()
            && (seat.is_well() || seat.fate.is_giving_up())
        {
            seat.fate.condemned.open();
            self.died(seat.fate.host.life.seat());
        }
    }

    /// Lets all followers come to where nothing is left to see, and judges what they saw.
    async fn follow_to_the_end(&self) -> Result<(), Violation> {
        let Some(seat) = self.seated().into_iter().next() else {
            return Ok(());
        };
        let (scene, state) = (seat.scene(), self.oracle.borrow().state().clone());
        let following = async move { scene.follow_to_the_end(&state).await };
        if let Some(followed) = seat.stage("the last walks", following).await? {
            followed.map_err(|text| violation("walk", text))?;
        }
        self.followers.borrow().verdict()
    }

    /// Everything is healed: all nodes mount, read, follow the indexes, and leave.
    async fn last(self: &Rc<Self>) -> Result<(), Violation> {
        self.note(0, "LAST", &[], || "everything is healed".to_owned());
        self.heal().await;
        let idle = Rc::new(Round::default());
        let all: Vec<usize> = (0..self.machines.len()).collect();
        let audit: Vec<u8> = all.iter().map(|number| *number as u8).collect();
        loop {
            self.work(all.clone(), &idle).await?;
            self.settle(all.clone(), &idle, &[], &audit).await?;
            if self.seated().len() == self.machines.len() && self.deaths.borrow().is_empty() {
                break;
            }
        }
        self.follow_to_the_end().await?;
        let leaving = Rc::new(Round {
            blackout: None,
            ends: seat::all_leave(self.machines.len()),
            ..Round::default()
        });
        self.work(all, &leaving).await?;
        self.oracle.borrow_mut().quiet()?;
        self.check(true).await
    }
}

type Ends = Vec<tokio::sync::oneshot::Receiver<Result<(), Violation>>>;

/// Waits for whoever ends first, and takes it out.
async fn first_of(ends: &mut Ends) -> Result<(), Violation> {
    let (index, result) = std::future::poll_fn(|cx| {
        let mut ended = ends.iter_mut().enumerate().filter_map(|(index, end)| {
            match std::pin::Pin::new(end).poll(cx) {
                std::task::Poll::Ready(result) => Some((index, result)),
                std::task::Poll::Pending => None,
            }
        });
        match ended.next() {
            Some(first) => std::task::Poll::Ready(first),
            None => std::task::Poll::Pending,
        }
    })
    .await;
    ends.remove(index);
    result.unwrap_or(Ok(()))
}

/// How long a stage may take once everything is calm, in nanoseconds.
const PATIENCE: u64 = BOUND;

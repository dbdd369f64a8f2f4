//! Makes a failing plan small: fewer nodes, lives, rounds, operations and faults,
//! simpler values, with the same failure kept.
//!
//! Parts are taken away in chunks that get smaller (delta debugging), coarse parts
//! first, until nothing more can go; then values are made simpler. Whoever calls
//! says which of a batch of plans still fails ([`shrink`]), so batches can run in
//! parallel; the first of a batch that fails is kept, so the result is the same
//! whatever the number of threads.
//!
//! What can go wrong: another failure creeps in. A plan counts only if it fails in
//! the same way ([`crate::case::signature`]), and with a planted bug only if it
//! passes without.

use crate::plan::cluster::{Agents, Ending, Round, Trouble};
use crate::plan::{Config, End, Fault, LifePlan, Loss, Plan, PlanOp, When, Window};
use crate::stress::Stress;

/// A part of a plan that can be taken away. Numbers are places in the plan, outermost
/// first; a round numbered as many as there are rounds is that of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Life(usize),
    Round(usize),
    Core,
    Window(usize, usize),
    Task(usize, usize),
    Fault(usize, usize),
    Trouble(usize, usize),
    Ending(usize, usize),
    Blackout(usize),
    Op(usize, usize, usize, usize),
    TaskOp(usize, usize, usize),
    Sync(usize, usize),
    Audit(usize, usize),
    RoundSync(usize, usize),
    RoundAudit(usize, usize),
}

/// The kinds of parts, in the order in which they are tried.
type Chooser = fn(&Part) -> bool;
const PASSES: [Chooser; 6] = [
    |part| matches!(part, Part::Life(..) | Part::Round(..) | Part::Core),
    |part| matches!(part, Part::Window(..) | Part::Task(..)),
    |part| {
        matches!(
            part,
            Part::Fault(..) | Part::Trouble(..) | Part::Ending(..) | Part::Blackout(..)
        )
    },
    |part| matches!(part, Part::Op(..) | Part::TaskOp(..)),
    |part| matches!(part, Part::Sync(..) | Part::RoundSync(..)),
    |part| matches!(part, Part::Audit(..) | Part::RoundAudit(..)),
];

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Operations left.
    pub operations: usize,
    /// Faults left.
    pub faults: usize,
    /// Plans tried so far.
    pub tried: u64,
}

/// Runs plans of a batch and gives the number of the first that still fails in the
/// same way, with the seed under which it does.
pub type FirstFailing<'a> = dyn FnMut(&[Plan]) -> Option<(usize, u64)> + 'a;

/// Makes `plan` small. `first_failing` gets at most `batch` plans at a time; `better` is
/// told of each smaller plan that was found.
pub fn shrink(
    plan: &Plan,
    batch: usize,
    first_failing: &mut FirstFailing,
    better: &mut dyn FnMut(&Plan, Progress),
) -> Plan {
    let mut shrinker = Shrinker {
        best: plan.clone(),
        batch: batch.max(1),
        tried: 0,
        first_failing,
        better,
    };
    loop {
        let before = shrinker.best.clone();
        for pass in PASSES {
            shrinker.take_away(pass);
        }
        shrinker.simplify();
        if shrinker.best == before {
            return before;
        }
    }
}

struct Shrinker<'a, 'b> {
    best: Plan,
    batch: usize,
    tried: u64,
    first_failing: &'a mut FirstFailing<'b>,
    better: &'a mut dyn FnMut(&Plan, Progress),
}

impl Shrinker<'_, '_> {
    /// Keeps the first of the plans that still fails and gives its number.
    fn attempt(&mut self, plans: &[Plan]) -> Option<usize> {
        for (number, batch) in plans.chunks(self.batch).enumerate() {
            self.tried += batch.len() as u64;
            if let Some((index, seed)) = (self.first_failing)(batch) {
                self.best = Plan {
                    seed,
                    ..batch[index].clone()
                };
                let progress = Progress {
                    operations: self.best.operations(),
                    faults: faults(&self.best),
                    tried: self.tried,
                };
                (self.better)(&self.best, progress);
                return Some(number * self.batch + index);
            }
        }
        None
    }

    /// Makes one thing after the other simpler.
    fn simplify(&mut self) {
        let mut at = 0;
        loop {
            let mut plans = simpler(&self.best);
            let plans = plans.split_off(at.min(plans.len()));
            let Some(index) = self.attempt(&plans) else {
                return;
            };
            // Those before it were tried in vain; what is as simple as can be is not in
            // the list, so the next has its place, or a change of the same thing.
            at += index;
        }
    }

    /// Takes parts of one kind away, in chunks that get smaller.
    fn take_away(&mut self, pass: Chooser) {
        let parts_now =
            |best: &Plan| -> Vec<Part> { parts(best).into_iter().filter(pass).collect() };
        let mut left = parts_now(&self.best);
        let mut size = left.len();
        while size > 0 {
            let mut at = 0;
            loop {
                let chunks: Vec<&[Part]> = left[at.min(left.len())..].chunks(size).collect();
                let plans: Vec<Plan> = chunks
                    .iter()
                    .map(|chunk| without(&self.best, chunk))
                    .collect();
                let Some(index) = self.attempt(&plans) else {
                    break;
                };
                // Those before it were tried in vain; it is gone, so the next has its place.
                at += index * size;
                left = parts_now(&self.best);
            }
            size = size.min(left.len()) / 2;
        }
    }
}

/// Number of faults in a plan: those of devices, clocks and links, the deaths and the
/// blackouts.
pub fn faults(plan: &Plan) -> usize {
    let one = |life: &LifePlan| life.faults.len() + usize::from(life.end != End::Unmount);
    let round = |round: &Round| {
        round.troubles.len() + round.ends.len() + usize::from(round.blackout.is_some())
    };
    let many = plan.cluster.as_ref().map_or(0, |cluster| {
        let rounds = cluster.rounds.iter().chain([&cluster.core_round]);
        rounds.map(round).sum::<usize>() + usize::from(cluster.core != 0)
    });
    plan.lives.iter().map(one).sum::<usize>() + many
}

/// The rounds of a cluster, that of the core last.
fn rounds(plan: &Plan) -> Vec<&Round> {
    let Some(cluster) = &plan.cluster else {
        return Vec::new();
    };
    let core = std::iter::once(&cluster.core_round);
    cluster.rounds.iter().chain(core).collect()
}

/// All parts, in the order of their places.
fn parts(plan: &Plan) -> Vec<Part> {
    let mut parts = Vec::new();
    for (l, life) in plan.lives.iter().enumerate() {
        if plan.lives.len() > 1 {
            parts.push(Part::Life(l));
        }
        parts.extend((0..life.faults.len()).map(|f| Part::Fault(l, f)));
        for (w, window) in life.windows.iter().enumerate() {
            parts.push(Part::Window(l, w));
            if window.sync {
                parts.push(Part::Sync(l, w));
            }
            if window.audit {
                parts.push(Part::Audit(l, w));
            }
            for (t, task) in window.tasks.iter().enumerate() {
                parts.extend((0..task.len()).map(|o| Part::Op(l, w, t, o)));
            }
        }
    }
    let all = rounds(plan);
    for (r, round) in all.iter().enumerate() {
        if r + 1 < all.len() {
            parts.push(Part::Round(r));
        } else if plan
            .cluster
            .as_ref()
            .is_some_and(|cluster| cluster.core != 0)
        {
            parts.push(Part::Core);
        }
        if round.blackout.is_some() {
            parts.push(Part::Blackout(r));
        }
        parts.extend((0..round.troubles.len()).map(|n| Part::Trouble(r, n)));
        parts.extend((0..round.ends.len()).map(|n| Part::Ending(r, n)));
        parts.extend((0..round.sync.len()).map(|n| Part::RoundSync(r, n)));
        parts.extend((0..round.audit.len()).map(|n| Part::RoundAudit(r, n)));
        for (t, task) in round.tasks.iter().enumerate() {
            parts.push(Part::Task(r, t));
            parts.extend((0..task.ops.len()).map(|o| Part::TaskOp(r, t, o)));
        }
    }
    parts
}

/// Keeps the elements of a list whose places are not `gone`.
fn keep<T>(list: &mut Vec<T>, gone: impl Fn(usize) -> bool) {
    let mut place = 0;
    list.retain(|_| {
        place += 1;
        !gone(place - 1)
    });
}

/// The plan without some of its parts.
fn without(plan: &Plan, gone: &[Part]) -> Plan {
    let gone: std::collections::BTreeSet<Part> = gone.iter().copied().collect();
    let gone = |part: Part| gone.contains(&part);
    let mut plan = plan.clone();
    for (l, life) in plan.lives.iter_mut().enumerate() {
        // What ends after so many operations ends at the same place.
        let mut before = 0;
        let mut left_out = 0;
        let limit = match life.end {
            End::Kill(When::Operations(n))
            | End::PowerLoss(When::Operations(n), _)
            | End::ForceUnmount(When::Operations(n)) => n,
            _ => 0,
        };
        for (w, window) in life.windows.iter_mut().enumerate() {
            for (t, task) in window.tasks.iter_mut().enumerate() {
                for o in 0..task.len() {
                    before += 1;
                    let out = gone(Part::Window(l, w)) || gone(Part::Op(l, w, t, o));
                    left_out += u32::from(out && before <= limit);
                }
                keep(task, |o| gone(Part::Op(l, w, t, o)));
            }
            window.sync &= !gone(Part::Sync(l, w));
            window.audit &= !gone(Part::Audit(l, w));
        }
        if let End::Kill(When::Operations(n))
        | End::PowerLoss(When::Operations(n), _)
        | End::ForceUnmount(When::Operations(n)) = &mut life.end
        {
            *n -= left_out;
        }
        keep(&mut life.windows, |w| gone(Part::Window(l, w)));
        keep(&mut life.faults, |f| gone(Part::Fault(l, f)));
    }
    keep(&mut plan.lives, |l| gone(Part::Life(l)));
    if let Some(cluster) = &mut plan.cluster {
        let core = cluster.rounds.len();
        let all = cluster.rounds.iter_mut().chain([&mut cluster.core_round]);
        for (r, round) in all.enumerate() {
            for (t, task) in round.tasks.iter_mut().enumerate() {
                keep(&mut task.ops, |o| gone(Part::TaskOp(r, t, o)));
            }
            keep(&mut round.tasks, |t| gone(Part::Task(r, t)));
            keep(&mut round.troubles, |n| gone(Part::Trouble(r, n)));
            keep(&mut round.ends, |n| gone(Part::Ending(r, n)));
            keep(&mut round.sync, |n| gone(Part::RoundSync(r, n)));
            keep(&mut round.audit, |n| gone(Part::RoundAudit(r, n)));
            if gone(Part::Blackout(r)) {
                round.blackout = None;
            }
            if gone(Part::Core) && r == core {
                *round = Round::default();
            }
        }
        if gone(Part::Core) {
            cluster.core = 0;
        }
        keep(&mut cluster.rounds, |r| gone(Part::Round(r)));
    }
    if plan.lives.is_empty() && plan.cluster.is_none() {
        plan.lives.push(LifePlan {
            windows: Vec::new(),
            faults: Vec::new(),
            end: End::Unmount,
        });
    }
    plan
}

/// All plans that are simpler in one thing.
fn simpler(plan: &Plan) -> Vec<Plan> {
    let mut plans = Vec::new();
    let mut push = |change: &mut dyn FnMut(&mut Plan)| {
        let mut changed = plan.clone();
        change(&mut changed);
        if changed != *plan {
            plans.push(changed);
        }
    };
    push(&mut |plan| plan.config.first_seq = 0);
    if let Some(cluster) = &plan.cluster {
        for node in (1..cluster.nodes.len()).rev() {
            push(&mut |plan| without_node(plan, node));
        }
        push(&mut |plan| {
            let cluster = plan.cluster.as_mut().expect("a cluster");
            cluster.agents = Agents::Prompt;
        });
        push(&mut |plan| plan.cluster.as_mut().expect("a cluster").keyed = false);
        // The last phase as a round in which nobody is broken.
        push(&mut |plan| {
            let cluster = plan.cluster.as_mut().expect("a cluster");
            if cluster.core != 0 {
                cluster.core = 0;
                cluster.rounds.push(std::mem::take(&mut cluster.core_round));
            }
        });
        push(&mut |plan| {
            for node in &mut plan.cluster.as_mut().expect("a cluster").nodes {
                node.drift_ppm = 0;
                node.wall_skew = 0;
            }
        });
    }
    for change in CONFIG_CHANGES {
        push(&mut |plan| change(&mut plan.config));
    }
    for change in STRESS_CHANGES {
        push(&mut |plan| change(&mut plan.config.stress));
    }
    for (l, life) in plan.lives.iter().enumerate() {
        for end in simpler_ends(life.end) {
            push(&mut |plan| plan.lives[l].end = end);
        }
        for w in 0..life.windows.len() {
            push(&mut |plan| join_windows(&mut plan.lives[l].windows, w));
            push(&mut |plan| in_one_task(&mut plan.lives[l].windows[w]));
            for (t, task) in life.windows[w].tasks.iter().enumerate() {
                for (o, op) in task.iter().enumerate() {
                    for op in simpler_ops(op) {
                        push(&mut |plan| plan.lives[l].windows[w].tasks[t][o] = op.clone());
                    }
                }
            }
        }
        for f in 0..life.faults.len() {
            push(&mut |plan| halve_fault(&mut plan.lives[l].faults[f]));
        }
    }
    for (r, round) in rounds(plan).into_iter().enumerate() {
        let of = |plan: &mut Plan, change: &mut dyn FnMut(&mut Round)| {
            let cluster = plan.cluster.as_mut().expect("a cluster");
            let core = &mut cluster.core_round;
            change(cluster.rounds.get_mut(r).unwrap_or(core));
        };
        for (t, task) in round.tasks.iter().enumerate() {
            push(&mut |plan| of(plan, &mut |round| round.tasks[t].node = 0));
            for (o, op) in task.ops.iter().enumerate() {
                for op in simpler_ops(op) {
                    push(&mut |plan| of(plan, &mut |round| round.tasks[t].ops[o] = op.clone()));
                }
            }
        }
        for n in 0..round.troubles.len() {
            push(&mut |plan| of(plan, &mut |round| halve_trouble(&mut round.troubles[n])));
        }
        for n in 0..round.ends.len() {
            push(&mut |plan| {
                of(plan, &mut |round| {
                    let Ending { back, .. } = &mut round.ends[n];
                    *back = 0;
                });
            });
        }
    }
    plans
}

const CONFIG_CHANGES: [fn(&mut Config); 10] = [
    |config| config.check_every = 1,
    |config| config.stress = Stress::default(),
    |config| config.squeeze = 0,
    |config| config.fence = 0,
    |config| config.drift_ppm = 0,
    |config| config.disk_speed = 1,
    |config| config.yield_permille = 0,
    |config| config.poll_cost = 200,
    |config| config.kernel_caches = false,
    |config| config.format_version = 2,
];

const STRESS_CHANGES: [fn(&mut Stress); 10] = [
    |stress| stress.btree_space = 0,
    |stress| stress.idle_locks = 0,
    |stress| stress.inodes_per_lock = 0,
    |stress| stress.cache_blocks = 0,
    |stress| stress.item_bytes = 0,
    |stress| stress.extents_per_change = 0,
    |stress| stress.finalize_height = 0,
    |stress| stress.merge_blocks = 0,
    |stress| (stress.slow_reads, stress.slow_by) = (0, 0),
    |stress| stress.held = None,
];

/// A life's end that is easier to understand.
fn simpler_ends(end: End) -> Vec<End> {
    match end {
        End::Unmount => Vec::new(),
        End::Kill(_) => vec![End::Unmount],
        End::ForceUnmount(when) => vec![End::Unmount, End::Kill(when)],
        End::PowerLoss(when, Loss::AllUnflushed) => vec![End::Unmount, End::Kill(when)],
        End::PowerLoss(when, _) => vec![
            End::Unmount,
            End::Kill(when),
            End::PowerLoss(when, Loss::AllUnflushed),
        ],
    }
}

/// Lets window `w` and the one after it be one.
fn join_windows(windows: &mut Vec<Window>, w: usize) {
    if w + 1 < windows.len() {
        let next = windows.remove(w + 1);
        let window = &mut windows[w];
        let tasks = window.tasks.len().max(next.tasks.len());
        window.tasks.resize(tasks, Vec::new());
        for (task, more) in window.tasks.iter_mut().zip(next.tasks) {
            task.extend(more);
        }
        window.sync |= next.sync;
        window.audit |= next.audit;
    }
}

/// One operation after the other.
fn in_one_task(window: &mut Window) {
    if window.tasks.iter().filter(|task| !task.is_empty()).count() > 1 || window.tasks.len() > 1 {
        window.tasks = vec![window.tasks.concat()];
    }
}

/// Operations with smaller values.
fn simpler_ops(op: &PlanOp) -> Vec<PlanOp> {
    let mut ops = Vec::new();
    let mut push = |change: &mut dyn FnMut(&mut PlanOp)| {
        let mut changed = op.clone();
        change(&mut changed);
        if changed != *op {
            ops.push(changed);
        }
    };
    match op {
        PlanOp::Write { .. } | PlanOp::Read { .. } | PlanOp::Append { .. } => {
            for small in [1, 4096] {
                push(&mut |op| {
                    if let PlanOp::Write { len, .. }
                    | PlanOp::Read { len, .. }
                    | PlanOp::Append { len, .. } = op
                    {
                        *len = (*len).min(small);
                    }
                });
            }
            push(&mut |op| {
                if let PlanOp::Write { offset, .. } | PlanOp::Read { offset, .. } = op {
                    *offset = 0;
                }
            });
            push(&mut |op| {
                if let PlanOp::Write { sync, .. } = op {
                    *sync = false;
                }
            });
        }
        PlanOp::Truncate { .. } => push(&mut |op| {
            if let PlanOp::Truncate { size, .. } = op {
                *size = 0;
            }
        }),
        PlanOp::Setxattr { .. } => push(&mut |op| {
            if let PlanOp::Setxattr { len, .. } = op {
                *len = (*len).min(5);
            }
        }),
        PlanOp::Symlink { .. } => push(&mut |op| {
            if let PlanOp::Symlink { len, .. } = op {
                *len = 4;
            }
        }),
        PlanOp::Pause { .. } => push(&mut |op| {
            if let PlanOp::Pause { micros } = op {
                *micros = (*micros).min(10);
            }
        }),
        PlanOp::Create { .. } => push(&mut |op| {
            if let PlanOp::Create { excl, hold, .. } = op {
                *excl = false;
                *hold = false;
            }
        }),
        PlanOp::Posix(op) => ops.extend(op.simpler().into_iter().map(PlanOp::Posix)),
        _ => {}
    }
    ops
}

fn halve(from: u64, until: &mut u64) {
    *until = from + (until.saturating_sub(from)) / 2;
}

/// A fault that lasts half as long.
fn halve_fault(fault: &mut Fault) {
    use crate::plan::DiskFault;
    match fault {
        Fault::Disk(
            DiskFault::Error { from, until, .. } | DiskFault::Stall { from, until, .. },
        )
        | Fault::Partition { from, until } => halve(*from, until),
        Fault::WallStep { .. } | Fault::ResetStreams { .. } => {}
    }
}

/// A trouble that lasts half as long, and all the time.
fn halve_trouble(trouble: &mut Trouble) {
    match trouble {
        Trouble::Cut {
            flap, from, until, ..
        } => {
            *flap = 0;
            halve(*from, until);
        }
        Trouble::Bad { from, until, .. } | Trouble::Pause { from, until, .. } => {
            halve(*from, until);
        }
        Trouble::Reset { .. } | Trouble::WallStep { .. } | Trouble::Disk(_) => {}
    }
}

/// The world without one node (never the first); the others move up.
fn without_node(plan: &mut Plan, gone: usize) {
    let Some(cluster) = &mut plan.cluster else {
        return;
    };
    let members = cluster.members();
    if cluster.nodes.len() <= 1 || (cluster.nodes[gone].member && members <= 1) {
        return;
    }
    cluster.nodes.remove(gone);
    let bits = |set: u16| (set & ((1 << gone) - 1)) | ((set >> (gone + 1)) << gone);
    let moved = |node: u8| node - u8::from(usize::from(node) > gone);
    let is = |node: u8| usize::from(node) == gone;
    cluster.core = bits(cluster.core);
    for round in cluster.rounds.iter_mut().chain([&mut cluster.core_round]) {
        round.tasks.retain(|task| !is(task.node));
        round.ends.retain(|end| !is(end.node));
        round.sync.retain(|node| !is(*node));
        round.audit.retain(|node| !is(*node));
        for task in &mut round.tasks {
            task.node = moved(task.node);
        }
        for end in &mut round.ends {
            end.node = moved(end.node);
        }
        for node in round.sync.iter_mut().chain(&mut round.audit) {
            *node = moved(*node);
        }
        round.observer = if is(round.observer) {
            0
        } else {
            moved(round.observer)
        };
        round.troubles.retain_mut(|trouble| match trouble {
            Trouble::Cut { left, right, .. } => {
                (*left, *right) = (bits(*left), bits(*right));
                *left != 0 && *right != 0
            }
            Trouble::Bad { nodes, .. } => {
                *nodes = bits(*nodes);
                *nodes != 0
            }
            Trouble::Reset { node, .. }
            | Trouble::Pause { node, .. }
            | Trouble::WallStep { node, .. } => {
                let stays = !is(*node);
                *node = if stays { moved(*node) } else { 0 };
                stays
            }
            Trouble::Disk(_) => true,
        });
    }
    // The core stays a majority.
    let slots = (1u16 << cluster.members()) - 1;
    if cluster.core != 0 && (cluster.core & slots).count_ones() as usize <= cluster.members() / 2 {
        cluster.core |= slots;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Profile;

    fn shrunk(plan: &Plan, batch: usize, fails: &dyn Fn(&Plan) -> bool) -> Plan {
        let mut tried = 0;
        shrink(
            plan,
            batch,
            &mut |plans| {
                tried += plans.len();
                let first = plans.iter().position(fails);
                first.map(|first| (first, plans[first].seed))
            },
            &mut |plan, progress| {
                assert_eq!(progress.operations, plan.operations());
                assert_eq!(progress.faults, faults(plan));
            },
        )
    }

    fn ops(plan: &Plan) -> Vec<PlanOp> {
        let lives = plan.lives.iter().flat_map(|life| &life.windows);
        let alone = lives.flat_map(|window| &window.tasks).flatten();
        let tasks = rounds(plan).into_iter().flat_map(|round| &round.tasks);
        alone
            .chain(tasks.flat_map(|task| &task.ops))
            .cloned()
            .collect()
    }

    #[test]
    fn only_what_the_failure_needs_is_left() {
        let fails = |plan: &Plan| {
            let ops = ops(plan);
            let rename = ops
                .iter()
                .position(|op| matches!(op, PlanOp::Rename { .. }));
            let unlink = ops
                .iter()
                .rposition(|op| matches!(op, PlanOp::Unlink { .. }));
            rename
                .zip(unlink)
                .is_some_and(|(rename, unlink)| rename < unlink)
        };
        for seed in 0..12 {
            for profile in [Profile::Default, Profile::Cluster] {
                let plan = Plan::from_seed(seed, Some(profile));
                if !fails(&plan) {
                    continue;
                }
                let small = shrunk(&plan, 1, &fails);
                assert!(fails(&small));
                assert_eq!(small.operations(), 2, "{small:?}");
                assert_eq!(faults(&small), 0, "{small:?}");
                assert_eq!(small, shrunk(&plan, 7, &fails), "whatever the batch");
                if let Some(cluster) = &small.cluster {
                    assert_eq!(cluster.nodes.len(), 1);
                }
            }
        }
    }

    #[test]
    fn a_life_that_ends_after_some_operations_ends_at_the_same_one() {
        let mut plan = Plan::from_seed(3, Some(Profile::Default));
        let total = plan.lives[0]
            .windows
            .iter()
            .flat_map(|w| &w.tasks)
            .flatten()
            .count();
        plan.lives[0].end = End::Kill(When::Operations(total as u32));
        let first = Part::Op(0, 0, 0, 0);
        let End::Kill(When::Operations(left)) = without(&plan, &[first]).lives[0].end else {
            panic!("the end has changed");
        };
        assert_eq!(left as usize, total - 1);
    }

    #[test]
    fn every_part_can_go_and_takes_only_itself_along() {
        for profile in [Profile::Default, Profile::Cluster] {
            let plan = Plan::from_seed(5, Some(profile));
            for part in parts(&plan) {
                let less = without(&plan, &[part]);
                assert_ne!(less, plan, "{part:?}");
                let lost = plan.operations() - less.operations();
                match part {
                    Part::Op(..) | Part::TaskOp(..) => assert_eq!(lost, 1),
                    Part::Life(..) | Part::Round(..) | Part::Core => {}
                    Part::Window(..) | Part::Task(..) => {}
                    _ => assert_eq!(lost, 0, "{part:?}"),
                }
            }
        }
    }

    #[test]
    fn a_node_can_go_wherever_it_is_named() {
        for seed in 0..40 {
            let plan = Plan::from_seed(seed, Some(Profile::Cluster));
            let count = plan
                .cluster
                .as_ref()
                .map_or(0, |cluster| cluster.nodes.len());
            for gone in 1..count {
                let mut less = plan.clone();
                without_node(&mut less, gone);
                let cluster = less.cluster.expect("a cluster");
                let most = (1u32 << cluster.nodes.len()) - 1;
                assert!(cluster.members() > 0);
                assert_eq!(u32::from(cluster.core) & !most, 0);
                for round in cluster.rounds.iter().chain([&cluster.core_round]) {
                    let named = round.tasks.iter().map(|task| task.node);
                    let named = named.chain(round.ends.iter().map(|end| end.node));
                    let mut named = named.chain(round.sync.iter().chain(&round.audit).copied());
                    assert!(named.all(|node| usize::from(node) < cluster.nodes.len()));
                }
            }
        }
    }
}

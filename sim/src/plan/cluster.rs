//! The plan of a world of several nodes: who they are, what they do in each
//! round, what goes wrong meanwhile, and who is left in the end.
//!
//! All of it is drawn from streams of its own, so that plans of one node stay
//! as they are.

use super::tuning::Knobs;
use super::{Config, DiskFault, DiskOp, Loss, Mix, PlanOp, When, draw_op, steps};
use crate::plan::Device;
use crate::rng::Stream;

use serde::{Deserialize, Serialize};

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlan {
    /// Whether it is a quorum member (its slot is its number).
    pub member: bool,
    /// Drift of its clock in parts per million.
    pub drift_ppm: i32,
    /// Nanoseconds its wall clock is ahead of the first node's.
    pub wall_skew: i64,
}

/// How the fence agents behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Agents {
    /// Kill the mount at once.
    Prompt,
    /// Kill it after some seconds.
    Slow,
    /// Fail at first, then work.
    Fail,
    /// Are never heard of at first, then work.
    Hang,
    /// Take the machine's access to the devices away; its process lives on.
    Bar,
    /// Sometimes say that they did it, and did nothing.
    Lie,
    /// Kill it at once, as `Prompt`, and know which processes have ended: of those nobody
    /// waits whether they come back. One that is stopped has not.
    Local,
}

/// Which part of a node stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// The whole machine, with its queued writes and its network.
    Machine,
    /// Its process; the kernel goes on.
    Process,
    /// The quorum agent alone.
    Quorum,
    /// The server alone.
    Server,
    /// The mount alone.
    Mount,
}

/// What goes wrong in a round. Times are nanoseconds after its start; sets of
/// nodes are bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // `from` and `until` are what they say
pub enum Trouble {
    /// Nothing goes from `left` to `right`, nor back unless `one_way`.
    Cut {
        /// Nodes on one side.
        left: u16,
        /// Nodes on the other.
        right: u16,
        /// Only what goes from left to right is lost.
        one_way: bool,
        /// Cut and whole in turns this long; 0: cut all the time.
        flap: u64,
        from: u64,
        until: u64,
    },
    /// Links between these nodes and all others are bad.
    Bad {
        /// The nodes.
        nodes: u16,
        /// Datagrams lost, and pieces of streams sent again, in thousandths.
        loss: u32,
        /// Datagrams doubled, in thousandths.
        double: u32,
        /// Nanoseconds added to each way; also how far datagrams overtake.
        delay: u64,
        /// Bytes a stream takes before the writer waits.
        window: u32,
        from: u64,
        until: u64,
    },
    /// The streams of a node break.
    Reset {
        /// The node.
        node: u8,
        /// When.
        at: u64,
    },
    /// Something stands still.
    Pause {
        /// The node.
        node: u8,
        /// What of it.
        part: Part,
        from: u64,
        until: u64,
    },
    /// The wall clock of a node steps.
    WallStep {
        /// The node.
        node: u8,
        /// When.
        at: u64,
        /// By how many nanoseconds.
        by: i64,
    },
    /// A device fails, for everybody.
    Disk(DiskFault),
}

impl Trouble {
    /// Which nodes it is about (bits), and when it begins and ends.
    pub fn span(&self) -> (u16, u64, u64) {
        match self {
            Trouble::Cut {
                left,
                right,
                from,
                until,
                ..
            } => (left | right, *from, *until),
            Trouble::Bad {
                nodes, from, until, ..
            } => (*nodes, *from, *until),
            Trouble::Pause {
                node, from, until, ..
            } => (1 << node, *from, *until),
            Trouble::Reset { node, at } | Trouble::WallStep { node, at, .. } => {
                (1 << node, *at, *at)
            }
            Trouble::Disk(
                DiskFault::Error { from, until, .. } | DiskFault::Stall { from, until, .. },
            ) => (u16::MAX, *from, *until),
        }
    }
}

/// How a mount ends in the midst of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// Its process is killed.
    Kill,
    /// Its machine loses power.
    Power,
    /// It is forced to unmount.
    Force,
    /// It unmounts cleanly, after its operations.
    Leave,
}

/// The end of one mount, and its return.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The node.
    pub node: u8,
    /// When, counted from the start of the round (or of the mount, if later).
    pub when: When,
    /// How.
    pub how: How,
    /// Nanoseconds until it mounts again.
    pub back: u64,
}

/// What one task of a node does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// The node.
    pub node: u8,
    /// Its operations.
    pub ops: Vec<PlanOp>,
}

/// A stretch of work between two moments of quiet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// What the nodes do.
    pub tasks: Vec<Task>,
    /// What goes wrong.
    pub troubles: Vec<Trouble>,
    /// Mounts that end, at most one for each node.
    pub ends: Vec<Ending>,
    /// All machines and the storage lose power at this time.
    pub blackout: Option<(u64, Loss)>,
    /// Nodes that sync in the quiet after it.
    pub sync: Vec<u8>,
    /// Nodes that read everything in the quiet after it.
    pub audit: Vec<u8>,
    /// The node that looks at what deaths have left.
    pub observer: u8,
}

/// How the nodes outside the core are broken for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Broken {
    /// Dead.
    Dead,
    /// Without power.
    Dark,
    /// Cut off from everybody.
    Alone,
    /// Standing still.
    Still,
}

/// A world of several nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterPlan {
    /// The nodes.
    pub nodes: Vec<NodePlan>,
    /// Option quorum_heartbeat_timeout_ms.
    pub heartbeat_ms: u32,
    /// Option tcp_keepalive_timeout_ms.
    pub keepalive_ms: u32,
    /// How long a server waits for clients of the one before.
    pub recovery_ms: u32,
    /// How long it waits for one that lost its connection.
    pub reconnect_ms: u32,
    /// How long a mount may be without a server before it gives up; 0: for ever.
    #[serde(default)]
    pub out_of_touch_ms: u32,
    /// Whether the volume has a cluster key, and all that passes between nodes is
    /// encrypted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keyed: bool,
    /// Fence agents.
    pub agents: Agents,
    /// What happens.
    pub rounds: Vec<Round>,
    /// The last phase: nodes that must go on (bits), while the others are
    /// broken for ever. 0: no such phase.
    pub core: u16,
    /// How the others are broken.
    pub broken: Broken,
    /// What the core does then.
    pub core_round: Round,
}

impl ClusterPlan {
    /// Number of operations.
    pub fn operations(&self) -> usize {
        let rounds = self.rounds.iter().chain([&self.core_round]);
        let tasks = rounds.flat_map(|round| &round.tasks);
        tasks.map(|task| task.ops.len()).sum()
    }

    /// Number of quorum members.
    pub fn members(&self) -> usize {
        self.nodes.iter().filter(|node| node.member).count()
    }

    /// A few words about it.
    pub fn header(&self) -> String {
        let count = |f: fn(&Round) -> usize| self.rounds.iter().map(f).sum::<usize>();
        format!(
            "cluster of {} nodes, {} in the quorum, {} rounds, {} troubles, {} ends, {} blackouts, \
             agents {:?}, heartbeat {} ms, core {:#b} ({:?}){}",
            self.nodes.len(),
            self.members(),
            self.rounds.len(),
            count(|round| round.troubles.len()),
            count(|round| round.ends.len()),
            count(|round| usize::from(round.blackout.is_some())),
            self.agents,
            self.heartbeat_ms,
            self.core,
            self.broken,
            if self.keyed { ", with a key" } else { "" },
        )
    }
}

const SECOND: u64 = 1_000_000_000;

/// Which kinds of trouble a world has.
struct Swarm {
    cuts: u64,
    bad: u64,
    resets: u64,
    pauses: u64,
    steps: u64,
    disk: u64,
    deaths: u64,
    blackout: u64,
    rolling: bool,
}

impl Swarm {
    fn draw(rng: &Stream) -> Self {
        let on = |permille: u64| if rng.chance(450) { permille } else { 0 };
        Self {
            cuts: on(350),
            bad: on(300),
            resets: on(250),
            pauses: on(350),
            steps: on(150),
            disk: on(100),
            deaths: if rng.chance(700) { 300 } else { 0 },
            blackout: on(120),
            rolling: rng.chance(120),
        }
    }

    /// What somebody wants to be other than drawn.
    fn tuned(self, knobs: &Knobs) -> Self {
        Self {
            cuts: knobs.chance("cluster.cuts", self.cuts),
            bad: knobs.chance("cluster.bad", self.bad),
            resets: knobs.chance("cluster.resets", self.resets),
            pauses: knobs.chance("cluster.pauses", self.pauses),
            steps: knobs.chance("cluster.steps", self.steps),
            disk: knobs.chance("cluster.disk", self.disk),
            deaths: knobs.chance("cluster.deaths", self.deaths),
            blackout: knobs.chance("cluster.blackout", self.blackout),
            rolling: knobs.flag("cluster.rolling", self.rolling),
        }
    }
}

/// From a stream of its own: the rest of a seed's plan stays what it is.
fn draw_keyed(seed: u64) -> bool {
    Stream::new(seed, "cluster key", 0).chance(200)
}

/// Draws the cluster of a seed.
pub(super) fn draw(seed: u64, config: &Config, mix: &Mix, knobs: &Knobs) -> ClusterPlan {
    let rng = Stream::new(seed, "cluster", 0);
    let count = 2 + rng.weighted(&[5, 6, 4, 2, 1, 1, 1, 1]);
    let count = knobs.count("cluster.nodes", count as u64) as usize;
    // Every node a member, or some; the first one always is.
    let members = if rng.chance(500) {
        count
    } else {
        1 + rng.below(count as u64) as usize
    };
    let members = (knobs.count("cluster.members", members as u64) as usize).min(count);
    let nodes = (0..count)
        .map(|number| NodePlan {
            member: number < members,
            drift_ppm: rng.pick(&[0, 0, 0, -100, 100, -20_000, 20_000]),
            wall_skew: rng.pick(&[0, 0, -3 * SECOND as i64, 40 * SECOND as i64]),
        })
        .collect();
    let swarm = Swarm::draw(&rng).tuned(knobs);
    let cx = Draw {
        rng: &rng,
        config,
        mix,
        count,
        members,
        operations: knobs.given("cluster.operations"),
    };
    let rounds = knobs.count("cluster.rounds", 2 + rng.below(6));
    let rounds = (0..rounds)
        .map(|number| cx.round(&swarm, number as usize))
        .collect();
    // A majority of the members, and any others.
    let mut core = 0;
    while (core & ((1u16 << members) - 1)).count_ones() as usize <= members / 2 {
        core |= 1 << rng.below(members as u64);
    }
    for number in members..count {
        core |= u16::from(rng.chance(500)) << number;
    }
    let millis = |key, drawn: &[u64]| knobs.count(key, rng.pick(drawn)) as u32;
    let mut plan = ClusterPlan {
        nodes,
        heartbeat_ms: millis("cluster.heartbeat_ms", &[2_000, 3_000, 10_000]),
        keepalive_ms: millis("cluster.keepalive_ms", &[3_000, 10_000, 24_000]),
        recovery_ms: rng.pick(&[5_000, 10_000, 30_000]),
        reconnect_ms: rng.pick(&[2_000, 5_000, 20_000]),
        out_of_touch_ms: 0,
        keyed: knobs.flag("cluster.keyed", draw_keyed(seed)),
        agents: knobs.name("cluster.agents", draw_agents(seed, &rng)),
        rounds,
        core,
        broken: rng.pick(&[Broken::Dead, Broken::Dark, Broken::Alone, Broken::Still]),
        core_round: cx.work(16, true),
    };
    strike(seed, &mut plan);
    die_at_steps(seed, knobs, &mut plan);
    lose_touch(seed, &mut plan);
    if !knobs.flag("cluster.core", true) {
        plan.core = 0;
    }
    plan
}

/// In some worlds mounts stand still for long and are declared dead meanwhile, by
/// agents that leave them alive: they go on writing when they wake up, or find out.
fn strike(seed: u64, plan: &mut ClusterPlan) {
    // A stream of its own: other seeds keep their plans.
    let rng = Stream::new(seed, "strike", 0);
    if !rng.chance(60) {
        return;
    }
    plan.agents = rng.pick(&[Agents::Bar, Agents::Lie]);
    plan.heartbeat_ms = 2_000;
    plan.keepalive_ms = 3_000;
    plan.recovery_ms = 5_000;
    plan.reconnect_ms = 2_000;
    for round in &mut plan.rounds {
        let from = rng.below(2 * SECOND);
        round.troubles.push(Trouble::Pause {
            node: rng.below(plan.nodes.len() as u64) as u8,
            part: rng.pick(&[Part::Machine, Part::Process, Part::Process]),
            from,
            until: from + 15 * SECOND + rng.below(25 * SECOND),
        });
    }
}

/// In some worlds mounts die when they come to one step of the crash tables, whoever
/// does so first: deaths at some time or request seldom hit the rare ones.
fn die_at_steps(seed: u64, knobs: &Knobs, plan: &mut ClusterPlan) {
    // A stream of its own: other seeds keep their plans.
    let rng = Stream::new(seed, "steps", 0);
    let some = rng.chance(knobs.chance("cluster.at_steps", 250));
    if !some {
        return;
    }
    let rare = [
        "death.while_fencing_absent_client",
        "death.after_recovery_expired",
        "death.after_recovery",
        "death.after_leader_was_deposed",
    ];
    for round in &mut plan.rounds {
        let step = match rng.chance(400) {
            true => steps::place_of(rng.pick(&rare)),
            false => rng.below(u64::from(steps::COUNT)) as u8,
        };
        // Only of a server or a leader; any other may not be the first to come there.
        let times = rng.pick(&[1, 1, 1, 2, 5]);
        for node in 0..plan.nodes.len() as u8 {
            if !rng.chance(600) || round.ends.iter().any(|end| end.node == node) {
                continue;
            }
            round.ends.push(Ending {
                node,
                when: When::Step(step, times),
                how: rng.pick(&[How::Kill, How::Kill, How::Power]),
                back: rng.below(rng.pick(&[1_000_000, SECOND, 5 * SECOND])),
            });
        }
    }
}

/// How the fence agents behave.
fn draw_agents(seed: u64, rng: &Stream) -> Agents {
    let drawn = [
        Agents::Prompt,
        Agents::Slow,
        Agents::Fail,
        Agents::Hang,
        Agents::Bar,
        Agents::Lie,
    ][rng.weighted(&[8, 2, 1, 1, 2, 1])];
    // A stream of its own: other seeds keep their plans.
    let sees = Stream::new(seed, "local agents", 0).chance(350);
    match drawn {
        Agents::Prompt if sees => Agents::Local,
        drawn => drawn,
    }
}

/// In some worlds mounts do not wait for ever for a server.
fn lose_touch(seed: u64, plan: &mut ClusterPlan) {
    let rng = Stream::new(seed, "out of touch", 0);
    if rng.chance(200) {
        plan.out_of_touch_ms = rng.pick(&[10_000, 25_000, 60_000]);
    }
}

struct Draw<'a> {
    rng: &'a Stream,
    config: &'a Config,
    mix: &'a Mix,
    count: usize,
    members: usize,
    /// Operations of a round, if they are not drawn.
    operations: Option<u64>,
}

impl Draw<'_> {
    fn node(&self) -> u8 {
        self.rng.below(self.count as u64) as u8
    }

    /// A random set of nodes, not empty and not all.
    fn some_nodes(&self) -> u16 {
        1 + self.rng.below((1 << self.count) - 2) as u16
    }

    /// Operations of a round. Few at a time: the judge tries their orders.
    fn work(&self, most: u64, everybody: bool) -> Round {
        let rng = self.rng;
        let mut tasks: Vec<Task> = Vec::new();
        for node in 0..self.count as u8 {
            if everybody || rng.chance(800) {
                let twice = self.count <= 4 && rng.chance(300);
                for _ in 0..=u8::from(twice) {
                    tasks.push(Task {
                        node,
                        ops: Vec::new(),
                    });
                }
            }
        }
        if tasks.is_empty() {
            tasks.push(Task {
                node: self.node(),
                ops: Vec::new(),
            });
        }
        let ops = most.max(tasks.len() as u64);
        for number in 0..ops {
            let task = (number % tasks.len() as u64) as usize;
            tasks[task].ops.push(draw_op(rng, self.config, self.mix));
        }
        let chosen = |permille: u64| -> Vec<u8> {
            let all = 0..self.count as u8;
            all.filter(|_| rng.chance(permille)).collect()
        };
        Round {
            tasks,
            sync: chosen(500),
            audit: chosen(if rng.chance(500) { 400 } else { 0 }),
            observer: self.node(),
            ..Round::default()
        }
    }

    fn span(&self) -> (u64, u64) {
        let from = self.rng.below(3 * SECOND);
        let long = self
            .rng
            .pick(&[SECOND / 20, SECOND, 8 * SECOND, 40 * SECOND]);
        (from, from + 1 + self.rng.below(long))
    }

    fn round(&self, swarm: &Swarm, number: usize) -> Round {
        let rng = self.rng;
        let drawn = rng.pick(&[8, 14, 24]);
        let most = self.operations.unwrap_or(drawn);
        let mut round = self.work(most, false);
        let troubles = &mut round.troubles;
        while rng.chance(swarm.cuts) {
            let left = self.some_nodes();
            let others = !left & ((1 << self.count) - 1);
            let (from, until) = self.span();
            troubles.push(Trouble::Cut {
                left,
                right: others,
                one_way: rng.chance(300),
                flap: rng.pick(&[0, 0, 0, SECOND / 3, 4 * SECOND]),
                from,
                until,
            });
        }
        while rng.chance(swarm.bad) {
            let (from, until) = self.span();
            troubles.push(Trouble::Bad {
                nodes: self.some_nodes(),
                loss: rng.pick(&[0, 50, 300, 800]),
                double: rng.pick(&[0, 100, 500]),
                delay: rng.pick(&[0, 1_000_000, 50_000_000, 400_000_000]),
                window: rng.pick(&[100, 4_096, 1 << 20]),
                from,
                until,
            });
        }
        while rng.chance(swarm.resets) {
            troubles.push(Trouble::Reset {
                node: self.node(),
                at: rng.below(3 * SECOND),
            });
        }
        while rng.chance(swarm.pauses) {
            let (from, until) = self.span();
            troubles.push(Trouble::Pause {
                node: self.node(),
                part: rng.pick(&[
                    Part::Machine,
                    Part::Process,
                    Part::Quorum,
                    Part::Server,
                    Part::Mount,
                ]),
                from,
                until,
            });
        }
        while rng.chance(swarm.steps) {
            let by = rng.pick(&[-3600, -1, 1, 3600]);
            troubles.push(Trouble::WallStep {
                node: self.node(),
                at: rng.below(3 * SECOND),
                by: by * SECOND as i64,
            });
        }
        while rng.chance(swarm.disk) {
            troubles.push(Trouble::Disk(self.disk_fault()));
        }
        for node in 0..self.count as u8 {
            if rng.chance(swarm.deaths) {
                round.ends.push(self.ending(node));
            }
        }
        if swarm.rolling {
            let node = (number % self.count) as u8;
            round.ends.retain(|end| end.node != node);
            let mut end = self.ending(node);
            if self.may_leave(node) && rng.chance(600) {
                end.how = How::Leave;
            }
            round.ends.push(end);
        }
        if rng.chance(swarm.blackout) {
            let loss = rng.pick(&[
                Loss::AllUnflushed,
                Loss::Nothing,
                Loss::Sectors,
                Loss::Writes,
            ]);
            round.blackout = Some((rng.below(4 * SECOND), loss));
        }
        round
    }

    /// The only member can not leave while others are mounted (spec 08 section 9).
    fn may_leave(&self, node: u8) -> bool {
        usize::from(node) >= self.members || self.members > 1
    }

    fn ending(&self, node: u8) -> Ending {
        let rng = self.rng;
        let when = match rng.below(6) {
            0 => When::Time(rng.below(4 * SECOND)),
            1 | 2 => When::Request(1 + rng.below(20)),
            3 => When::Request(1 + rng.below(150)),
            _ => When::Operations(rng.below(12) as u32),
        };
        let how = match rng.below(8) {
            0..=2 => How::Kill,
            3..=5 => How::Power,
            6 => How::Force,
            _ if self.may_leave(node) => How::Leave,
            _ => How::Kill,
        };
        let back = rng.pick(&[1_000_000, SECOND, 5 * SECOND, 60 * SECOND]);
        Ending {
            node,
            when,
            how,
            back: rng.below(back),
        }
    }

    fn disk_fault(&self) -> DiskFault {
        let rng = self.rng;
        let device = rng.pick(&[Device::Meta, Device::Meta, Device::Data]);
        let (from, until) = self.span();
        if rng.chance(400) {
            let until = until.min(from + 4 * SECOND);
            return DiskFault::Stall {
                device,
                from,
                until,
            };
        }
        DiskFault::Error {
            device,
            op: rng.pick(&[DiskOp::Read, DiskOp::Write, DiskOp::Flush]),
            from,
            until: until.min(from + 5 * SECOND),
            times: rng.pick(&[1, 1, 5, 1000]),
            permille: rng.pick(&[100, 500, 1000]),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::plan::{Plan, Profile};

    #[test]
    fn clusters_have_a_majority_in_their_core_and_survive_saving() {
        for seed in 0..200 {
            let plan = Plan::from_seed(seed, Some(Profile::Cluster));
            let cluster = plan.cluster.clone().unwrap();
            assert!((2..=9).contains(&cluster.nodes.len()));
            let members = cluster.members();
            let core = cluster.core & ((1 << members) - 1);
            assert!(core.count_ones() as usize > members / 2);
            let saved = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&saved).unwrap(), plan);
        }
    }
}

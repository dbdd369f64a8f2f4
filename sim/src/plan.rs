//! What a world does, as data: operations, faults, and how each life of the
//! mount ends. A plan follows from a seed, but once written down it needs no
//! seed: it can be saved, replayed and shrunk.
//!
//! Operations name objects by small numbers that the workload resolves against
//! what exists when they run, so a plan stays meaningful when parts are removed.

pub mod cluster;
mod draw;
pub mod posix;
pub mod steps;
pub mod tuning;

use crate::rng::Stream;
use crate::stress::{Held, Stress, add_bursts};
use cluster::ClusterPlan;
use draw::{Mix, draw_len, draw_offset, draw_op};
use outrider_core::env::DeviceRole;
use posix::PosixOp;
use serde::{Deserialize, Serialize};
use tuning::{Knobs, Tuning};

/// One of the volume's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// The metadata device.
    Meta,
    /// The data device.
    Data,
}

impl Device {
    /// As the seam names it.
    pub fn role(self) -> DeviceRole {
        match self {
            Device::Meta => DeviceRole::Meta,
            Device::Data => DeviceRole::Data,
        }
    }
}

/// A kind of request to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskOp {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush.
    Flush,
}

impl DiskOp {
    /// Its name in the trace.
    pub fn event(self) -> &'static str {
        match self {
            DiskOp::Read => "read",
            DiskOp::Write => "write",
            DiskOp::Flush => "flush",
        }
    }
}

/// A fault of a device. Times are nanoseconds of the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskFault {
    /// Requests fail with an I/O error.
    Error {
        /// Which device.
        device: Device,
        /// Which requests.
        op: DiskOp,
        /// From when.
        from: u64,
        /// Until when.
        until: u64,
        /// How many at most.
        times: u32,
        /// Chance that a request fails, in thousandths.
        permille: u32,
    },
    /// Requests that would complete in this time complete at its end.
    Stall {
        /// Which device.
        device: Device,
        /// From when.
        from: u64,
        /// Until when.
        until: u64,
    },
}

impl DiskFault {
    /// Which device it is about.
    pub fn role(&self) -> DeviceRole {
        match self {
            DiskFault::Error { device, .. } | DiskFault::Stall { device, .. } => device.role(),
        }
    }
}

/// What else may go wrong while a mount lives. Times are nanoseconds after the
/// mount was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// A device fault; its times count from the mount, too.
    Disk(DiskFault),
    /// The wall clock steps.
    WallStep {
        /// When.
        at: u64,
        /// By how many nanoseconds.
        by: i64,
    },
    /// Every stream breaks.
    ResetStreams {
        /// When.
        at: u64,
    },
    /// Nothing passes between the node and itself.
    Partition {
        /// From when.
        from: u64,
        /// Until when.
        until: u64,
    },
}

impl Fault {
    /// When it begins and ends.
    pub fn span(&self) -> (u64, u64) {
        match self {
            Fault::Disk(
                DiskFault::Error { from, until, .. } | DiskFault::Stall { from, until, .. },
            )
            | Fault::Partition { from, until } => (*from, *until),
            Fault::WallStep { at, .. } | Fault::ResetStreams { at } => (*at, *at),
        }
    }
}

/// How a life of the mount ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// A clean unmount after the last window.
    Unmount,
    /// The process is killed.
    Kill(When),
    /// The machine loses power.
    PowerLoss(When, Loss),
    /// A forced unmount, then the process ends.
    ForceUnmount(When),
}

/// When a life ends, if not by a clean unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum When {
    /// Nanoseconds after the mount was asked for.
    Time(u64),
    /// At the n-th write or flush after the mount was asked for.
    Request(u64),
    /// After so many operations have been asked for.
    Operations(u32),
    /// When the mount has come to a step of the crash tables (`steps`), by its
    /// place there, for so many times.
    Step(u8, u8),
}

/// What a power loss leaves (see `disk_model::Survival`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loss {
    /// Only flushed data.
    AllUnflushed,
    /// Nothing.
    Nothing,
    /// Sectors at random.
    Sectors,
    /// Writes at random.
    Writes,
}

/// One operation. Objects are numbers to be resolved modulo what exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are what their names say, in `fs::api` terms
pub enum PlanOp {
    Lookup {
        dir: u16,
        name: u8,
    },
    Getattr {
        obj: u16,
    },
    Chmod {
        obj: u16,
        mode: u16,
    },
    Chown {
        obj: u16,
        uid: u8,
        gid: u8,
    },
    Utimes {
        obj: u16,
        at: i64,
    },
    Truncate {
        file: u16,
        size: u64,
    },
    Readlink {
        obj: u16,
    },
    Mknod {
        dir: u16,
        name: u8,
        kind: u8,
    },
    Mkdir {
        dir: u16,
        name: u8,
    },
    Create {
        dir: u16,
        name: u8,
        excl: bool,
        hold: bool,
    },
    Tmpfile {
        dir: u16,
    },
    Symlink {
        dir: u16,
        name: u8,
        len: u16,
    },
    Unlink {
        dir: u16,
        name: u8,
    },
    Rmdir {
        dir: u16,
        name: u8,
    },
    Rename {
        dir: u16,
        name: u8,
        to: u16,
        new: u8,
        noreplace: bool,
    },
    Link {
        file: u16,
        dir: u16,
        name: u8,
    },
    Open {
        file: u16,
    },
    Close {
        file: u16,
    },
    Read {
        file: u16,
        offset: u64,
        len: u32,
    },
    Write {
        file: u16,
        offset: u64,
        len: u32,
        sync: bool,
    },
    Append {
        file: u16,
        len: u32,
    },
    Fsync {
        file: u16,
        datasync: bool,
    },
    Syncfs,
    Setxattr {
        obj: u16,
        name: u8,
        len: u16,
        how: u8,
    },
    Getxattr {
        obj: u16,
        name: u8,
    },
    Listxattr {
        obj: u16,
    },
    Removexattr {
        obj: u16,
        name: u8,
    },
    Readdir {
        dir: u16,
        plus: bool,
    },
    Statfs,
    Fallocate {
        file: u16,
        keep: bool,
        offset: u64,
        len: u64,
    },
    Seek {
        file: u16,
        offset: u64,
        hole: bool,
    },
    Fiemap {
        file: u16,
    },
    Pause {
        micros: u32,
    },
    /// Something of the less usual part of POSIX.
    Posix(PosixOp),
    /// A follower asks what has changed since it last asked (`oracle::walk`).
    Walk {
        follower: u8,
        max: u16,
    },
    /// The end of this life, if it is to come, comes at the n-th write or flush from now.
    Doom {
        requests: u16,
    },
}

/// The kinds of operations, for weights.
pub const OP_KINDS: usize = 32;

/// A stretch of the workload between two moments of quiet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// One list of operations for each task.
    pub tasks: Vec<Vec<PlanOp>>,
    /// Whether the filesystem is synced in the quiet after it.
    pub sync: bool,
    /// Whether everything is read and compared in the quiet after it.
    pub audit: bool,
}

/// One life of the mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifePlan {
    /// What the workload does.
    pub windows: Vec<Window>,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// How it ends.
    pub end: End,
}

/// What kind of trouble a world is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, PartialOrd, Ord)]
pub enum Profile {
    /// Crashes and power losses.
    Default,
    /// Device errors, once and lasting, and stalls.
    DiskErrors,
    /// Devices so small that they fill up.
    Full,
    /// Mounts and unmounts that meet a fault.
    Lifecycle,
    /// Wall clocks that step, fast and slow clocks.
    Clock,
    /// Caches so small that everything is evicted all the time.
    Memory,
    /// Several nodes over one pair of devices.
    Cluster,
}

/// The profiles of worlds of one node, in the order in which seeds visit them.
pub const PROFILES: [Profile; 6] = [
    Profile::Default,
    Profile::DiskErrors,
    Profile::Full,
    Profile::Lifecycle,
    Profile::Clock,
    Profile::Memory,
];

/// What is drawn for a whole world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Kind of trouble.
    pub profile: Profile,
    /// Bytes of the metadata device.
    pub meta_size: u64,
    /// Bytes of the data device.
    pub data_size: u64,
    /// The format version of the volume (1 or 2).
    pub format_version: u64,
    /// Whether the model of the kernel keeps names, attributes and pages.
    pub kernel_caches: bool,
    /// Whether it serializes operations as the kernel's inode locks do.
    pub kernel_locks: bool,
    /// How many names the workload uses.
    pub names: u8,
    /// How many xattr names it uses.
    pub xattrs: u8,
    /// Chance that a yield point yields, in thousandths.
    pub yield_permille: u16,
    /// Nanoseconds a poll takes.
    pub poll_cost: u32,
    /// Device latency: 0 fast, 1 usual, 2 slow.
    pub disk_speed: u8,
    /// Drift of the node's clock in parts per million.
    pub drift_ppm: i32,
    /// Draw for the small policies: how far caches and budgets are from their
    /// defaults (0: defaults).
    pub squeeze: u8,
    /// How the fence agent behaves: 0 at once, 1 slow, 2 fails at first, 3 hangs at first.
    pub fence: u8,
    /// The seq that the new volume has come to, if not its usual one: near the end of what
    /// one lock covers of an index.
    #[serde(default)]
    pub first_seq: u64,
    /// What else is small, slow or frequent.
    #[serde(default)]
    pub stress: Stress,
    /// The devices are checked at every so many commits; 0 for none.
    #[serde(default = "usual_checks")]
    pub check_every: u32,
}

/// All commits would take half of the time of a world (`docs/simulator.md`); which ones
/// it is differs between seeds.
fn usual_checks() -> u32 {
    4
}

/// A whole world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Where it came from; also feeds the executor, the disks and the network.
    pub seed: u64,
    /// What holds for the whole world.
    pub config: Config,
    /// Lives of the mount, one after the other.
    pub lives: Vec<LifePlan>,
    /// The nodes and their rounds, in a world of several; then `lives` is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterPlan>,
}

impl Plan {
    /// Number of operations in it.
    pub fn operations(&self) -> usize {
        self.lives
            .iter()
            .flat_map(|life| &life.windows)
            .flat_map(|window| &window.tasks)
            .map(Vec::len)
            .sum::<usize>()
            + self.cluster.as_ref().map_or(0, ClusterPlan::operations)
    }

    /// Whether operations may fail with an I/O error.
    pub fn has_disk_errors(&self) -> bool {
        self.lives
            .iter()
            .flat_map(|life| &life.faults)
            .any(|fault| matches!(fault, Fault::Disk(DiskFault::Error { .. })))
    }

    /// One line that says what the world is like.
    pub fn header(&self) -> String {
        if let Some(cluster) = &self.cluster {
            let operations = self.operations();
            let header = cluster.header();
            return format!(
                "seed {} {header}: {operations} operations; {:?}",
                self.seed, self.config
            );
        }
        let ends: Vec<String> = self
            .lives
            .iter()
            .map(|life| format!("{:?}", life.end))
            .collect();
        format!(
            "seed {} profile {:?}: {} operations in {} lives ending {}; {:?}",
            self.seed,
            self.config.profile,
            self.operations(),
            self.lives.len(),
            ends.join(", "),
            self.config
        )
    }

    /// The plan of a seed with what [`Plan::from_seed`] draws and, in most of the
    /// seeds, with sizes drawn tiny, slow reads, faults and bursts that fit together.
    pub fn stressed(seed: u64, profile: Option<Profile>) -> Plan {
        Self::tuned(seed, &Tuning::of(profile), true).0
    }

    /// The plan of a seed with what somebody wants to be other than drawn, with `stress`
    /// as [`Plan::stressed`]; and what was drawn.
    pub fn tuned(seed: u64, tuning: &Tuning, stress: bool) -> (Plan, Knobs) {
        let knobs = tuning.of_seed(seed);
        let mut plan = Self::draw(seed, tuning.profile, &knobs);
        if stress && plan.cluster.is_some() {
            plan.config.stress.held = Some(Held::draw(seed));
            knobs.config(&mut plan.config);
        } else if stress {
            plan.config.stress = Stress::draw(seed, plan.config.profile);
            plan.config.stress.clone().resize(&mut plan.config);
            knobs.config(&mut plan.config);
            add_bursts(seed, &mut plan.config, &mut plan.lives);
        }
        (plan, knobs)
    }

    /// Draws the plan of a seed; the profile follows from the seed unless given.
    pub fn from_seed(seed: u64, profile: Option<Profile>) -> Plan {
        Self::draw(seed, profile, &Knobs::default())
    }

    fn draw(seed: u64, profile: Option<Profile>, knobs: &Knobs) -> Plan {
        let rng = Stream::new(seed, "plan", 0);
        let drawn = PROFILES[rng.weighted(&[8, 3, 3, 3, 1, 2])];
        let profile = profile.unwrap_or(drawn);
        let mut config = draw_config(&rng, profile);
        config.first_seq = draw_first_seq(seed);
        if profile == Profile::Cluster {
            // Every mount keeps blocks of its own.
            config.meta_size = 16_384 * MIB;
        }
        knobs.config(&mut config);
        let mix = Mix::draw(&rng, seed, &config, knobs);
        if profile == Profile::Cluster {
            return Plan {
                seed,
                cluster: Some(cluster::draw(seed, &config, &mix, knobs)),
                config,
                lives: Vec::new(),
            };
        }
        let lives = knobs.count("workload.lives", 1 + rng.weighted(&[1, 4, 3, 2]) as u64);
        let total = knobs.count("workload.operations", 200 + rng.below(200));
        let drawing = LifeDraw {
            rng: &rng,
            config: &config,
            mix: &mix,
            knobs,
        };
        let lives = (0..lives)
            .map(|life| drawing.life(total / lives + 1, life + 1 == lives))
            .collect();
        Plan {
            seed,
            config,
            lives,
            cluster: None,
        }
    }
}

const MIB: u64 = 1 << 20;

/// From a stream of its own: the rest of a seed's plan stays what it is.
fn draw_first_seq(seed: u64) -> u64 {
    let rng = Stream::new(seed, "first seq", 0);
    match rng.below(4) {
        0 => rng.pick(&[1, 2, 1 << 30]) * 1024 - rng.below(60),
        _ => 0,
    }
}

fn draw_config(rng: &Stream, profile: Profile) -> Config {
    let tiny = profile == Profile::Full;
    let kernel_caches = rng.chance(750);
    Config {
        profile,
        meta_size: if tiny { 256 * MIB } else { 2048 * MIB },
        data_size: if tiny { 64 * MIB } else { 4096 * MIB },
        format_version: 1 + rng.below(2),
        kernel_caches,
        // Without its locks the kernel's caches would not be right by themselves.
        kernel_locks: kernel_caches || rng.chance(300),
        names: rng.pick(&[2, 4, 8, 16, 40]),
        xattrs: rng.pick(&[1, 3, 8]),
        yield_permille: rng.pick(&[0, 50, 200, 500, 900]),
        poll_cost: rng.pick(&[50, 200, 2_000]),
        disk_speed: rng.below(3) as u8,
        drift_ppm: if profile == Profile::Clock {
            rng.pick(&[-50_000, -200, 200, 50_000])
        } else {
            rng.pick(&[0, 0, -100, 100])
        },
        squeeze: match profile {
            Profile::Memory => 2 + rng.below(2) as u8,
            _ => rng.below(3) as u8,
        },
        fence: rng.weighted(&[6, 1, 1, 1]) as u8,
        first_seq: 0,
        stress: Stress::default(),
        check_every: usual_checks(),
    }
}

/// What the lives of one node are drawn with.
struct LifeDraw<'a> {
    rng: &'a Stream,
    config: &'a Config,
    mix: &'a Mix,
    knobs: &'a Knobs,
}

impl LifeDraw<'_> {
    fn life(&self, ops: u64, last: bool) -> LifePlan {
        let (rng, mix) = (self.rng, self.mix);
        let mut windows = Vec::new();
        let mut left = ops;
        while left > 0 {
            let count = left.min(mix.window);
            left -= count;
            let mut window = Window {
                tasks: vec![Vec::new(); mix.tasks as usize],
                sync: rng.chance(self.knobs.chance("workload.sync", 400)),
                audit: rng.chance(self.knobs.chance("workload.audit", 300)),
            };
            for n in 0..count {
                let task = (n % mix.tasks) as usize;
                window.tasks[task].push(draw_op(rng, self.config, mix));
            }
            windows.push(window);
        }
        let end = self.end(ops, last);
        LifePlan {
            windows,
            faults: self.faults(),
            end,
        }
    }

    fn end(&self, ops: u64, last: bool) -> End {
        let (rng, knobs, profile) = (self.rng, self.knobs, self.config.profile);
        if last && rng.chance(knobs.chance("ends.clean_last", 500)) {
            return End::Unmount;
        }
        let when = match rng.below(6) {
            0 => When::Time(rng.below(20_000_000_000)),
            1 | 2 => When::Request(1 + rng.below(60)),
            3 => When::Request(1 + rng.below(400)),
            _ => When::Operations(rng.below(ops + 1) as u32),
        };
        let force = if profile == Profile::Lifecycle {
            300
        } else {
            50
        };
        if rng.chance(knobs.chance("ends.force", force)) {
            return End::ForceUnmount(when);
        }
        let given = ["ends.unmount", "ends.kill", "ends.power"].map(|key| knobs.given(key));
        let way = rng.below(8);
        let way = match given.map(Option::unwrap_or_default) {
            [0, 0, 0] => way,
            // The first of each kind, and any of the power losses.
            weights => match rng.weighted(&weights.map(|weight| weight as u32)) {
                0 => 0,
                1 => 1,
                _ => 3 + rng.below(5),
            },
        };
        match way {
            0 => End::Unmount,
            1 | 2 => End::Kill(when),
            3 => End::PowerLoss(when, Loss::AllUnflushed),
            4 => End::PowerLoss(when, Loss::Nothing),
            5 => End::PowerLoss(when, Loss::Writes),
            _ => End::PowerLoss(when, Loss::Sectors),
        }
    }

    fn faults(&self) -> Vec<Fault> {
        let (rng, knobs, profile) = (self.rng, self.knobs, self.config.profile);
        let mut faults = Vec::new();
        let device = || rng.pick(&[Device::Meta, Device::Meta, Device::Data]);
        let stall = |faults: &mut Vec<Fault>| {
            let from = rng.below(15_000_000_000);
            faults.push(Fault::Disk(DiskFault::Stall {
                device: device(),
                from,
                until: from + rng.below(4_000_000_000),
            }));
        };
        let (errors, steps) = match profile {
            Profile::DiskErrors | Profile::Lifecycle => (1 + rng.below(4), 0),
            Profile::Clock => (0, 1 + rng.below(4)),
            Profile::Default | Profile::Full | Profile::Memory | Profile::Cluster => (0, 0),
        };
        for _ in 0..knobs.count("faults.errors", errors) {
            let early = profile == Profile::Lifecycle;
            let from = rng.below(if early { 2_000_000_000 } else { 20_000_000_000 });
            let lasting = rng.chance(300);
            faults.push(Fault::Disk(DiskFault::Error {
                device: device(),
                op: rng.pick(&[DiskOp::Read, DiskOp::Write, DiskOp::Flush]),
                from,
                until: from
                    + rng.below(if lasting {
                        8_000_000_000
                    } else {
                        1_000_000_000
                    }),
                times: if lasting { 1000 } else { 1 },
                permille: rng.pick(&[100, 500, 1000]),
            }));
        }
        for _ in 0..knobs.count("faults.wall_steps", steps) {
            let by = rng.pick(&[
                -86_400_000_000_000,
                -1_000_000_000,
                1_000_000_000,
                86_400_000_000_000,
            ]);
            faults.push(Fault::WallStep {
                at: rng.below(15_000_000_000),
                by,
            });
        }
        let stalls = match profile {
            Profile::DiskErrors | Profile::Lifecycle => 300,
            Profile::Clock => 0,
            Profile::Default | Profile::Full | Profile::Memory | Profile::Cluster => 150,
        };
        let stalls = knobs.chance("faults.stall", stalls);
        // A clock's worlds draw nothing here.
        if stalls > 0 && rng.chance(stalls) {
            stall(&mut faults);
        }
        if rng.chance(knobs.chance("faults.reset", 100)) {
            faults.push(Fault::ResetStreams {
                at: rng.below(20_000_000_000),
            });
        }
        if rng.chance(knobs.chance("faults.partition", 50)) {
            let from = rng.below(15_000_000_000);
            faults.push(Fault::Partition {
                from,
                until: from + rng.below(3_000_000_000),
            });
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_plan_and_plans_survive_saving() {
        for seed in 0..50 {
            let plan = Plan::from_seed(seed, None);
            assert_eq!(plan, Plan::from_seed(seed, None));
            assert!(plan.operations() >= 200);
            let saved = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&saved).unwrap(), plan);
        }
    }

    #[test]
    fn seeds_reach_every_profile_and_every_end() {
        let mut profiles = std::collections::BTreeSet::new();
        let mut ends = std::collections::BTreeSet::new();
        for seed in 0..300 {
            let plan = Plan::from_seed(seed, None);
            profiles.insert(plan.config.profile);
            for life in &plan.lives {
                ends.insert(
                    format!("{:?}", life.end)
                        .chars()
                        .take(4)
                        .collect::<String>(),
                );
            }
        }
        assert_eq!(profiles.len(), PROFILES.len());
        assert_eq!(ends.len(), 4, "{ends:?}");
    }
}

//! What makes rare things frequent: tiny blocks, lists, caches and lock tables,
//! reads that are now and then very slow, and bursts of operations that lead to
//! states a random mix seldom visits.
//!
//! Everything here is drawn from streams of its own, so a seed keeps the rest of
//! its plan; half of all worlds have none of it. What can go wrong: a world so
//! tight that it does nothing but fail. Every size stays above what one operation
//! needs, and running out of space is a permitted answer where `tight` is set.

use crate::plan::{Config, End, LifePlan, Loss, PlanOp, Profile, When, Window};
use crate::rng::Stream;
use outrider_core::node::NodeConfig;
use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
/// Metadata of tight worlds: the first list of mkfs, the server's two lists, a mount's
/// list and the reserve, and little more.
const TIGHT_META: u64 = 128 * MIB;
const CRAMPED_META: u64 = 80 * MIB;
/// Names that only bursts use.
const BURST_NAMES: u8 = 100;

/// Sizes and delays beyond the usual ones. The default changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stress {
    /// Bytes used of a btree block; 0 leaves it.
    pub btree_space: u16,
    /// Locks kept while idle; 0 leaves it.
    pub idle_locks: u32,
    /// Inodes that share a lock; 0 leaves it.
    pub inodes_per_lock: u32,
    /// Blocks cached by each cache; 0 leaves it.
    pub cache_blocks: u32,
    /// Bytes of items cached; 0 leaves it.
    pub item_bytes: u32,
    /// Extents removed in one transaction; 0 leaves it.
    pub extents_per_change: u8,
    /// Height above which a log tree is merged; 0 leaves it.
    pub finalize_height: u8,
    /// Dirty blocks at which a step of a merge ends; 0 leaves it.
    pub merge_blocks: u8,
    /// Half the usual lists and reserves, on a metadata device so small that freed
    /// blocks are soon used again.
    pub tight: bool,
    /// With `tight`: a device that is full, but for the reserve, when it is new. Most
    /// calls that need space are refused; deleting and leaving must work all the same.
    pub cramped: bool,
    /// Chance that a read is slow, in thousandths ...
    pub slow_reads: u16,
    /// ... and how slow, in nanoseconds at most.
    pub slow_by: u64,
}

impl Stress {
    /// Draws it for a seed.
    pub fn draw(seed: u64, profile: Profile) -> Self {
        let rng = Stream::new(seed, "stress", 0);
        if rng.chance(500) {
            return Self::default();
        }
        let some = |permille, value: u32| if rng.chance(permille) { value } else { 0 };
        let slow = rng.chance(500);
        let mut stress = Self {
            btree_space: some(600, 5120) as u16,
            idle_locks: some(500, rng.pick(&[1, 2, 6])),
            inodes_per_lock: some(600, rng.pick(&[1, 2, 5])),
            cache_blocks: some(500, rng.pick(&[2, 6, 16])),
            item_bytes: some(600, rng.pick(&[1, 1024, 4096])),
            extents_per_change: some(600, rng.pick(&[1, 2])) as u8,
            finalize_height: some(600, 1) as u8,
            tight: profile != Profile::Full && rng.chance(400),
            cramped: false,
            slow_reads: if slow { rng.pick(&[20, 100, 300]) } else { 0 },
            slow_by: rng.pick(&[5_000_000, 50_000_000, 1_000_000_000]),
            merge_blocks: some(500, rng.pick(&[16, 24])) as u8,
        };
        if stress.tight {
            // Blocks are used again while somebody reads what they were.
            stress.cache_blocks = 2;
            stress.item_bytes = 1024;
            stress.slow_reads = rng.pick(&[30, 100]);
            stress.slow_by = rng.pick(&[100_000_000, 1_000_000_000]);
            stress.cramped = rng.chance(200);
        }
        stress
    }

    /// Whether it changes nothing.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Changes what is drawn for the whole world.
    pub fn resize(&self, config: &mut Config) {
        if self.tight {
            config.meta_size = if self.cramped {
                CRAMPED_META
            } else {
                TIGHT_META
            };
        }
    }

    /// Changes a node's choices.
    pub fn apply(&self, config: &mut NodeConfig) {
        let block = &mut config.block;
        if self.btree_space > 0 {
            block.btree_space = self.btree_space;
        }
        if self.merge_blocks > 0 {
            block.merge_dirty_blocks = u64::from(self.merge_blocks);
            block.merge_window_bytes = 16 << 10;
        }
        if self.cache_blocks > 0 {
            block.cache_blocks = self.cache_blocks as usize;
        }
        if self.tight {
            block.list_max = 300;
            block.list_rotate = 75;
            block.meta_fill_lo = 220;
            block.meta_fill_target = 240;
            block.client_low = 8;
            block.merge_fill = 60;
            block.commit_budget = 75;
            block.move_budget = 65;
            block.free_budget = 8;
            block.free_commit_limit = 50;
            block.reserve_server = 100;
            block.reserve_client = 150;
        }
        if self.item_bytes > 0 {
            config.log.cache_bytes = self.item_bytes as usize;
        }
        if self.idle_locks > 0 {
            config.locks.idle_count = self.idle_locks as usize;
        }
        if self.inodes_per_lock > 0 {
            config.fs.inodes_per_lock = u64::from(self.inodes_per_lock);
        }
        if self.extents_per_change > 0 {
            config.fs.data.extents_per_change = usize::from(self.extents_per_change);
        }
        if self.finalize_height > 0 {
            config.server.finalize_height = self.finalize_height;
        }
    }
}

/// Adds bursts to the lives of a stressed world.
pub fn add_bursts(seed: u64, config: &Config, lives: &mut [LifePlan]) {
    if config.stress.is_none() {
        return;
    }
    let rng = Stream::new(seed, "bursts", 0);
    let mut torn = false;
    for number in 0..lives.len() {
        let last = number + 1 == lives.len();
        let life = &mut lives[number];
        if std::mem::take(&mut torn) {
            life.windows.insert(0, grow_everything(&rng));
        }
        if !rng.chance(500) {
            continue;
        }
        let at = rng.below(life.windows.len() as u64 + 1) as usize;
        let burst = match rng.below(3) {
            0 => churn(&rng),
            1 => hot_objects(&rng),
            _ if last => hot_objects(&rng),
            _ => {
                torn = true;
                life.end = End::PowerLoss(When::Operations(u32::MAX), loss(&rng));
                torn_truncates(&rng)
            }
        };
        life.windows.splice(at..at, burst);
        if torn {
            // What follows the burst would outlive the crash it is about.
            life.windows.truncate(at + 2);
        }
    }
    if config.stress.tight {
        keep_sizes(lives);
    }
}

fn loss(rng: &Stream) -> Loss {
    rng.pick(&[
        Loss::AllUnflushed,
        Loss::Nothing,
        Loss::Sectors,
        Loss::Writes,
    ])
}

fn any(rng: &Stream) -> u16 {
    rng.below(1 << 16) as u16
}

/// A growing fallocate that runs out of space may stop anywhere.
fn keep_sizes(lives: &mut [LifePlan]) {
    let windows = lives.iter_mut().flat_map(|life| &mut life.windows);
    for op in windows.flat_map(|window| window.tasks.iter_mut().flatten()) {
        if let PlanOp::Fallocate { keep, .. } = op {
            *keep = true;
        }
    }
}

/// Makes many items, lets them be merged, deletes most of them: trees grow
/// leaves and lose them, and blocks are used again.
fn churn(rng: &Stream) -> Vec<Window> {
    let count = rng.pick(&[20u8, 50, 100]);
    let mut made = Vec::new();
    for n in 0..count {
        let (dir, name) = (0, BURST_NAMES + n);
        made.push(PlanOp::Create {
            dir,
            name,
            excl: false,
            hold: false,
        });
        if rng.chance(700) {
            made.push(PlanOp::Setxattr {
                obj: any(rng),
                name: rng.below(8) as u8,
                len: rng.pick(&[100, 870, 896, 3000]),
                how: 0,
            });
        }
    }
    let mut gone: Vec<PlanOp> = Vec::new();
    for n in 0..count {
        let (dir, name) = (0, BURST_NAMES + n);
        let op = if rng.chance(900) {
            PlanOp::Unlink { dir, name }
        } else {
            PlanOp::Removexattr {
                obj: any(rng),
                name: rng.below(8) as u8,
            }
        };
        gone.insert(rng.below(gone.len() as u64 + 1) as usize, op);
    }
    let pause = || vec![PlanOp::Pause { micros: 6_000_000 }, PlanOp::Syncfs];
    let window = |tasks, sync| Window {
        tasks,
        sync,
        audit: rng.chance(200),
    };
    let deal = |ops: Vec<PlanOp>, hands: usize| {
        let mut tasks = vec![Vec::new(); hands];
        for (n, op) in ops.into_iter().enumerate() {
            tasks[n % hands].push(op);
        }
        tasks
    };
    vec![
        window(deal(made, rng.pick(&[1, 2])), true),
        window(vec![pause()], true),
        window(deal(gone, rng.pick(&[1, 3])), rng.chance(500)),
        window(vec![pause()], rng.chance(500)),
    ]
}

/// A few objects that are changed, synced and read by several tasks at once.
fn hot_objects(rng: &Stream) -> Vec<Window> {
    let tasks = rng.pick(&[3u64, 5, 8]);
    let objects: Vec<u16> = (0..3).map(|_| any(rng)).collect();
    let op = |writer: bool| {
        let obj = rng.pick(&objects);
        let (dir, name) = (0, rng.below(4) as u8);
        let xattr = rng.below(3) as u8;
        if !writer {
            return match rng.below(4) {
                0 => PlanOp::Lookup { dir, name },
                1 => PlanOp::Getattr { obj },
                2 => PlanOp::Listxattr { obj },
                _ => PlanOp::Getxattr { obj, name: xattr },
            };
        }
        match rng.below(8) {
            0..=2 => PlanOp::Setxattr {
                obj,
                name: xattr,
                len: rng.pick(&[5, 100]),
                how: 0,
            },
            3 => PlanOp::Removexattr { obj, name: xattr },
            4 => PlanOp::Chmod {
                obj,
                mode: rng.below(0o1000) as u16,
            },
            5 => PlanOp::Create {
                dir,
                name,
                excl: false,
                hold: false,
            },
            _ => PlanOp::Syncfs,
        }
    };
    let window = |_| Window {
        tasks: (0..tasks)
            .map(|task| (0..10).map(|_| op(task % 2 == 0)).collect())
            .collect(),
        sync: rng.chance(300),
        audit: rng.chance(300),
    };
    (0..3).map(window).collect()
}

/// Files of many extents that are cut while others sync, and a crash in between.
fn torn_truncates(rng: &Stream) -> Vec<Window> {
    let files: Vec<u16> = (0..5).map(|_| any(rng)).collect();
    let mut wrote = vec![PlanOp::Create {
        dir: 0,
        name: 0,
        excl: false,
        hold: false,
    }];
    for block in 0..16u64 {
        wrote.extend(files.iter().map(|file| PlanOp::Write {
            file: *file,
            offset: block * 8192,
            len: 4096,
            sync: false,
        }));
    }
    let cut = |file: &u16| {
        vec![PlanOp::Truncate {
            file: *file,
            size: rng.below(3) * 3000,
        }]
    };
    let mut tasks: Vec<Vec<PlanOp>> = files.iter().map(cut).collect();
    for _ in 0..3 {
        let micros = rng.pick(&[0, 1, 100, 2_000]);
        let mut syncs = vec![PlanOp::Pause { micros }];
        syncs.resize(7, PlanOp::Syncfs);
        tasks.push(syncs);
    }
    tasks[0].insert(
        0,
        PlanOp::Doom {
            requests: 1 + rng.below(120) as u16,
        },
    );
    let window = |tasks, sync| Window {
        tasks,
        sync,
        audit: false,
    };
    vec![window(vec![wrote], true), window(tasks, false)]
}

/// Makes every file longer: what lies behind the old ends must be zeros.
fn grow_everything(rng: &Stream) -> Window {
    let grow = |file| PlanOp::Truncate {
        file,
        size: 200_000 + rng.below(5000),
    };
    Window {
        tasks: vec![(0..24).map(grow).collect()],
        sync: false,
        audit: true,
    }
}

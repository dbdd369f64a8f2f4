//! What makes rare things frequent: tiny blocks, lists, caches and lock tables,
//! reads that are now and then very slow, and bursts of operations that lead to
//! states a random mix seldom visits.
//!
//! Most worlds are about one thing, their [`Theme`]: sizes, faults and operations
//! that meet at one kind of state. What is rare as a product of independent draws
//! is frequent there.
//!
//! Everything here is drawn from streams of its own, so a seed keeps the rest of
//! its plan. What can go wrong: a world so tight that it does nothing but fail.
//! Every size stays above what one operation needs, lists stay in the relations
//! that the server's gate relies on, and running out of space is a permitted answer
//! where `tight` is set.

mod bursts;

use crate::plan::{Config, Profile};
use crate::rng::Stream;
use outrider_core::node::NodeConfig;
use serde::{Deserialize, Serialize};

pub use bursts::add_bursts;

const MIB: u64 = 1 << 20;
/// Metadata of tight worlds: the first list of mkfs, the server's two lists, a mount's
/// list and the reserve, and little more.
const TIGHT_META: u64 = 144 * MIB;
const CRAMPED_META: u64 = 80 * MIB;

/// What a stressed world is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Theme {
    /// Any sizes, any bursts.
    Mixed,
    /// Truncates that a power loss interrupts.
    Torn,
    /// Commits that fail again and again, with items that change all the time.
    Flaky,
    /// Flushes that fail, and a power loss soon after.
    Unflushed,
    /// Transactions that grow until their blocks run out.
    Fat,
    /// Lists of freed blocks that nobody empties.
    Worn,
    /// Merges, frees and takeovers that are cut off in the middle.
    Merging,
    /// Mounts that are cut off while everybody waits for locks.
    Severed,
    /// Reads that overlap commits.
    Late,
    /// Reads that are held up while what they are about is deleted and merged.
    Outrun,
    /// File data of a killed mount that nobody has flushed, and a power loss soon after.
    Bereft,
    /// Reads of blocks that are used again meanwhile.
    Reuse,
}

/// Themes with their weights; the rest of a thousand has none.
const THEMES: [(Theme, u64); 12] = [
    (Theme::Mixed, 220),
    (Theme::Torn, 60),
    (Theme::Flaky, 60),
    (Theme::Unflushed, 60),
    (Theme::Fat, 60),
    (Theme::Worn, 60),
    (Theme::Merging, 80),
    (Theme::Severed, 60),
    (Theme::Late, 90),
    (Theme::Reuse, 130),
    // New ones come last: the seeds of the others keep theirs.
    (Theme::Outrun, 60),
    (Theme::Bereft, 50),
];

impl Theme {
    /// Draws it for a seed.
    pub fn draw(seed: u64) -> Option<Self> {
        let mut number = Stream::new(seed, "theme", 0).below(1000);
        for (theme, weight) in THEMES {
            if number < weight {
                return Some(theme);
            }
            number -= weight;
        }
        None
    }
}

/// A place of core where tasks are held up now and then: as if a thread were not
/// scheduled, or the last block it waits for came late.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Name of the yield point.
    pub point: String,
    /// Chance of a hold-up, in thousandths.
    pub permille: u16,
    /// How long, in nanoseconds at most.
    pub by: u64,
}

/// The yield points of core where holding a task up for long is worth while.
const POINTS: [&str; 11] = [
    "log.read_in",
    "log.commit.items",
    "log.commit.written",
    "log.commit.flushed",
    "log.commit.answered",
    "server.reclaim",
    "server_commit.blocks_stable",
    "fs.change",
    "fs.held",
    "locks.revoke.committed",
    "locks.revoke.dropped",
];

impl Held {
    /// Draws one for a seed, at any point.
    pub fn draw(seed: u64) -> Self {
        let rng = Stream::new(seed, "held", 0);
        let (permille, by) = rng.pick(&[
            (500, 5_000_000),
            (100, 100_000_000),
            (20, 2_000_000_000),
            (5, 8_000_000_000),
        ]);
        Self {
            point: rng.pick(&POINTS).to_owned(),
            permille,
            by,
        }
    }
}

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
    /// Whether every transaction's log tree is merged at once.
    pub merge_always: bool,
    /// Dirty blocks at which a step of a merge ends; 0 leaves it.
    pub merge_blocks: u8,
    /// A metadata device so small that freed blocks are soon used again; with short
    /// lists.
    pub tight: bool,
    /// With `tight`: a device that is full, but for the reserve, when it is new. Most
    /// calls that need space are refused; deleting and leaving must work all the same.
    pub cramped: bool,
    /// A quarter of the usual lists, budgets and reserves.
    pub short_lists: bool,
    /// Runs of freed blocks taken back in one commit; 0 leaves it.
    pub empty_runs: u8,
    /// Entries that one move of free extents may use; 0 leaves it.
    pub move_budget: u8,
    /// Fraction of a list at which pending items are put in the tree; 0 leaves it.
    pub pending_divisor: u32,
    /// Whether commits and file data are always made durable by flushes.
    pub always_flush: bool,
    /// Chance that a read is slow, in thousandths ...
    pub slow_reads: u16,
    /// ... and how slow, in nanoseconds at most.
    pub slow_by: u64,
    /// Where tasks are held up.
    pub held: Option<Held>,
}

impl Stress {
    /// Draws it for a seed.
    pub fn draw(seed: u64, profile: Profile) -> Self {
        let rng = Stream::new(seed, "stress", 0);
        match Theme::draw(seed) {
            None => Self::default(),
            Some(Theme::Mixed) => Self::mixed(&rng, profile),
            Some(theme) => Self::of_theme(theme, &rng),
        }
    }

    fn mixed(rng: &Stream, profile: Profile) -> Self {
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
            merge_always: rng.chance(150),
            tight: profile != Profile::Full && rng.chance(400),
            cramped: false,
            short_lists: rng.chance(300),
            empty_runs: some(200, rng.pick(&[4, 20])) as u8,
            move_budget: some(300, rng.pick(&[1, 20])) as u8,
            pending_divisor: some(300, rng.pick(&[1000, 60])),
            always_flush: rng.chance(200),
            slow_reads: if slow { rng.pick(&[20, 100, 300]) } else { 0 },
            slow_by: rng.pick(&[5_000_000, 50_000_000, 1_000_000_000]),
            merge_blocks: some(500, rng.pick(&[16, 24])) as u8,
            held: None,
        };
        if stress.slow_reads == 300 {
            // Nothing would end in time otherwise.
            stress.slow_by = stress.slow_by.min(50_000_000);
        }
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

    fn of_theme(theme: Theme, rng: &Stream) -> Self {
        let usual = Self::default();
        // A reader that waits for seconds while commits and merges go on, or many
        // that wait a little.
        let late = rng.pick(&[(5, 3_000_000_000), (10, 1_000_000_000), (100, 50_000_000)]);
        match theme {
            Theme::Mixed | Theme::Bereft => usual,
            Theme::Torn => Self {
                extents_per_change: 1,
                inodes_per_lock: rng.pick(&[0, 1]),
                ..usual
            },
            Theme::Flaky => Self {
                pending_divisor: 1000,
                item_bytes: rng.pick(&[0, 1024]),
                always_flush: rng.chance(500),
                ..usual
            },
            Theme::Unflushed => Self {
                always_flush: true,
                ..usual
            },
            Theme::Fat => Self {
                btree_space: 5120,
                short_lists: true,
                pending_divisor: rng.pick(&[0, 1000]),
                ..usual
            },
            Theme::Worn => Self {
                btree_space: 5120,
                short_lists: true,
                finalize_height: rng.pick(&[1, 2]),
                empty_runs: rng.pick(&[1, 2, 4]),
                ..usual
            },
            Theme::Merging => Self {
                btree_space: 5120,
                finalize_height: 1,
                move_budget: rng.pick(&[0, 1, 1]),
                merge_blocks: rng.pick(&[0, 16]),
                slow_reads: rng.pick(&[0, 300]),
                slow_by: 20_000_000,
                cache_blocks: rng.pick(&[0, 6]),
                ..usual
            },
            Theme::Severed => Self {
                idle_locks: 1,
                inodes_per_lock: 1,
                item_bytes: 1,
                ..usual
            },
            Theme::Late => Self {
                btree_space: rng.pick(&[0, 5120]),
                cache_blocks: 2,
                item_bytes: rng.pick(&[1024, 2048, 4096]),
                slow_reads: late.0,
                slow_by: late.1,
                merge_always: rng.chance(600),
                ..usual
            },
            Theme::Outrun => Self {
                merge_always: true,
                item_bytes: rng.pick(&[2048, 4096, 8192]),
                held: Some(Held {
                    point: "log.read_in".into(),
                    permille: rng.pick(&[20, 50, 100]),
                    by: rng.pick(&[5, 20]) * 1_000_000_000,
                }),
                ..usual
            },
            Theme::Reuse => Self {
                btree_space: 5120,
                // The server's blocks stay, those of a reader of everything do not.
                cache_blocks: rng.pick(&[12, 16]),
                item_bytes: 1024,
                finalize_height: 1,
                tight: true,
                slow_reads: rng.pick(&[20, 40]),
                slow_by: rng.pick(&[50_000_000, 150_000_000]),
                ..usual
            },
        }
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
        if self.tight || self.short_lists {
            // A holder needs its budget and the commit's, a merge's end two units
            // and a budget; a list that is not filled must have that, and a freed
            // list that is not rotated room for it.
            block.list_max = 160;
            block.list_rotate = 100;
            block.meta_fill_lo = 140;
            block.meta_fill_target = 150;
            block.client_low = 8;
            block.merge_fill = 60;
            block.commit_budget = 48;
            block.splice_unit = 24;
            block.move_budget = 46;
            block.free_budget = 8;
            block.free_commit_limit = 40;
            block.reserve_server = 300;
            block.reserve_client = 370;
        }
        if self.tight {
            // What is free is in use all the time.
            block.reserve_server = 200;
            block.reserve_client = 50;
        }
        if self.empty_runs > 0 {
            block.empty_runs = u32::from(self.empty_runs);
        }
        if self.move_budget > 0 {
            block.move_budget = u32::from(self.move_budget);
        }
        if self.always_flush {
            block.fua_requests = 0;
            config.fs.data.fua_requests = 0;
        }
        if self.pending_divisor > 0 {
            config.log.pending_divisor = self.pending_divisor;
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
        if self.merge_always {
            config.server.finalize_height = 0;
        }
    }
}

//! How the operations of a world are drawn.

use super::tuning::{self, Knobs};
use super::{Config, MIB, OP_KINDS, PlanOp, Profile, posix};
use crate::oracle::walk::FOLLOWERS;
use crate::rng::Stream;
use outrider_core::env::Entropy;

/// What the operations of a world are like.
pub(super) struct Mix {
    pub(super) weights: [u32; OP_KINDS],
    pub(super) tasks: u64,
    pub(super) window: u64,
    pub(super) big: bool,
    pub(super) max_file: u64,
    pub(super) posix: posix::Share,
    walks: Walks,
}

/// How often followers of the inode indexes ask what has changed. From a stream of its
/// own, in place of other operations: those of a seed stay what they are.
struct Walks {
    rng: Stream,
    permille: u64,
}

impl Walks {
    fn draw(seed: u64, knobs: &Knobs) -> Self {
        let rng = Stream::new(seed, "walks", 0);
        let permille = knobs.chance("workload.walks", rng.pick(&[0, 0, 30, 120]));
        Self { rng, permille }
    }

    fn instead(&self) -> Option<PlanOp> {
        let rng = &self.rng;
        (self.permille > 0 && rng.chance(self.permille)).then(|| PlanOp::Walk {
            follower: rng.below(u64::from(FOLLOWERS)) as u8,
            max: rng.pick(&[1, 2, 5, 20, 1000]),
        })
    }
}

impl Mix {
    pub(super) fn draw(rng: &Stream, seed: u64, config: &Config, knobs: &Knobs) -> Self {
        let profile = config.profile;
        #[rustfmt::skip]
        let mut weights: [u32; OP_KINDS] = [
            // lookup getattr chmod chown utimes truncate readlink mknod mkdir create
            10, 10, 4, 2, 3, 8, 2, 2, 8, 16,
            // tmpfile symlink unlink rmdir rename link open close read write
            2, 3, 10, 5, 12, 5, 6, 5, 14, 26,
            // append fsync syncfs setxattr getxattr listxattr removexattr readdir statfs fallocate
            6, 5, 1, 8, 4, 2, 3, 8, 1, 4,
            // seek fiemap
            3, 1,
        ];
        // Swarm: each world leaves out some kinds and is fond of others.
        for weight in &mut weights {
            match rng.below(8) {
                0 => *weight = 0,
                1 => *weight *= 4,
                _ => {}
            }
        }
        let create = 9;
        weights[create] = weights[create].max(4);
        let write = 19;
        if profile == Profile::Full {
            weights[write] = weights[write].max(40);
            weights[29] = weights[29].max(10);
        }
        knobs.weights(&tuning::OPERATIONS, &mut weights);
        if weights.iter().all(|weight| *weight == 0) {
            weights[1] = 1;
        }
        let tasks = if config.kernel_locks {
            rng.pick(&[1, 2, 4, 8])
        } else {
            rng.pick(&[1, 2, 3])
        };
        let window = rng.pick(&[6, 12, 24, 40]);
        let big = profile == Profile::Full || rng.chance(200);
        let max_file = rng.pick(&[10_000, 100_000, 1_000_000]);
        Self {
            weights,
            tasks: knobs.count("workload.tasks", tasks),
            window: knobs.count("workload.window", window),
            big: knobs.flag("workload.big", big),
            max_file: knobs.count("workload.max_file", max_file),
            posix: posix::Share::draw(seed, config, knobs),
            walks: Walks::draw(seed, knobs),
        }
    }
}

pub(super) fn draw_offset(rng: &Stream, mix: &Mix) -> u64 {
    match rng.below(10) {
        0 => 0,
        1..=4 => rng.below(mix.max_file.min(20_000)),
        5 | 6 => rng.below(mix.max_file),
        7 | 8 => rng.below(mix.max_file.div_ceil(4096)) * 4096,
        _ if mix.big => rng.below(1 << 40),
        _ => rng.below(mix.max_file * 4),
    }
}

pub(super) fn draw_len(rng: &Stream, mix: &Mix) -> u32 {
    match rng.below(12) {
        0 => 1,
        1..=6 => 1 + rng.below(5_000) as u32,
        7..=9 => 1 + rng.below(40_000) as u32,
        10 => 4096 * (1 + rng.below(8) as u32),
        _ if mix.big => 1 + rng.below(1 << 20) as u32,
        _ => 1 + rng.below(100_000) as u32,
    }
}

pub(super) fn draw_op(rng: &Stream, config: &Config, mix: &Mix) -> PlanOp {
    let usual = draw_usual(rng, config, mix);
    let other = mix.posix.instead(config, mix).map(PlanOp::Posix);
    let walk = mix.walks.instead();
    walk.or(other).unwrap_or(usual)
}

fn draw_usual(rng: &Stream, config: &Config, mix: &Mix) -> PlanOp {
    if rng.chance(30) {
        let micros = rng.pick(&[10, 1_000, 100_000, 3_000_000]);
        return PlanOp::Pause { micros };
    }
    let any = || rng.below(1 << 16) as u16;
    // Few directories, and the root often: contention is where the bugs are.
    let dir = || if rng.chance(400) { 0 } else { any() };
    let name = || rng.below(u64::from(config.names)) as u8;
    let xattr = || rng.below(u64::from(config.xattrs)) as u8;
    match rng.weighted(&mix.weights) {
        0 => PlanOp::Lookup {
            dir: dir(),
            name: name(),
        },
        1 => PlanOp::Getattr { obj: any() },
        2 => PlanOp::Chmod {
            obj: any(),
            mode: rng.below(0o1000) as u16,
        },
        3 => PlanOp::Chown {
            obj: any(),
            uid: rng.below(4) as u8,
            gid: rng.below(4) as u8,
        },
        4 => PlanOp::Utimes {
            obj: any(),
            at: rng.range(0, 1 << 62) as i64 - (1 << 60),
        },
        5 => PlanOp::Truncate {
            file: any(),
            size: draw_offset(rng, mix),
        },
        6 => PlanOp::Readlink { obj: any() },
        7 => PlanOp::Mknod {
            dir: dir(),
            name: name(),
            kind: rng.below(4) as u8,
        },
        8 => PlanOp::Mkdir {
            dir: dir(),
            name: name(),
        },
        9 => PlanOp::Create {
            dir: dir(),
            name: name(),
            excl: rng.chance(300),
            hold: rng.chance(500),
        },
        10 => PlanOp::Tmpfile { dir: dir() },
        11 => PlanOp::Symlink {
            dir: dir(),
            name: name(),
            len: 1 + rng.pick(&[3, 100, 895, 896, 2000, 4094]),
        },
        12 => PlanOp::Unlink {
            dir: dir(),
            name: name(),
        },
        13 => PlanOp::Rmdir {
            dir: dir(),
            name: name(),
        },
        14 => PlanOp::Rename {
            dir: dir(),
            name: name(),
            to: dir(),
            new: name(),
            noreplace: rng.chance(200),
        },
        15 => PlanOp::Link {
            file: any(),
            dir: dir(),
            name: name(),
        },
        16 => PlanOp::Open { file: any() },
        17 => PlanOp::Close { file: any() },
        18 => PlanOp::Read {
            file: any(),
            offset: draw_offset(rng, mix),
            len: draw_len(rng, mix),
        },
        19 => PlanOp::Write {
            file: any(),
            offset: draw_offset(rng, mix),
            len: draw_len(rng, mix),
            sync: rng.chance(30),
        },
        20 => PlanOp::Append {
            file: any(),
            len: draw_len(rng, mix),
        },
        21 => PlanOp::Fsync {
            file: any(),
            datasync: rng.chance(500),
        },
        22 => PlanOp::Syncfs,
        23 => PlanOp::Setxattr {
            obj: any(),
            name: xattr(),
            len: rng.pick(&[0, 5, 100, 870, 896, 1800, 9_000, 65_535]),
            how: rng.weighted(&[6, 1, 1]) as u8,
        },
        24 => PlanOp::Getxattr {
            obj: any(),
            name: xattr(),
        },
        25 => PlanOp::Listxattr { obj: any() },
        26 => PlanOp::Removexattr {
            obj: any(),
            name: xattr(),
        },
        27 => PlanOp::Readdir {
            dir: dir(),
            plus: rng.chance(300),
        },
        28 => PlanOp::Statfs,
        29 => PlanOp::Fallocate {
            file: any(),
            // A failed growing fallocate may stop anywhere: keep the size where it can fail.
            keep: matches!(
                config.profile,
                Profile::Full | Profile::DiskErrors | Profile::Lifecycle
            ) || rng.chance(500),
            offset: draw_offset(rng, mix),
            len: if mix.big {
                1 + rng.below(16 * MIB)
            } else {
                u64::from(draw_len(rng, mix))
            },
        },
        30 => PlanOp::Seek {
            file: any(),
            offset: draw_offset(rng, mix),
            hole: rng.chance(500),
        },
        _ => PlanOp::Fiemap { file: any() },
    }
}

//! Operations of the less usual part of POSIX: ACLs, set-id bits, export handles,
//! direct I/O, shared mappings, and requests that must be refused.
//!
//! They are drawn from a stream of their own, in place of some of the others: a seed's
//! other operations stay what they are.

use super::tuning::Knobs;
use super::{Config, Mix, Profile, draw_len, draw_offset};
use crate::rng::Stream;
use serde::{Deserialize, Serialize};

/// One of these operations. Objects are numbers to be resolved modulo what exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are what their names say
pub enum PosixOp {
    /// Sets the access ACL of anything, or the default ACL (of a directory, if `dir`).
    SetAcl {
        obj: u16,
        default: bool,
        dir: bool,
        /// What kind of ACL; some of them are malformed.
        shape: u8,
        /// Bits for its entries.
        perms: u16,
    },
    /// Reads an ACL.
    GetAcl { obj: u16, default: bool },
    /// Removes an ACL.
    RemoveAcl { obj: u16, default: bool },
    /// A chmod that may set the set-id bits and the sticky bit.
    ChmodBits { obj: u16, mode: u16 },
    /// Finds an inode by its export handle, whether it still exists or not.
    OpenHandle { obj: u16 },
    /// Finds a directory's parent by its export handle.
    HandleParent { dir: u16 },
    /// `RENAME_EXCHANGE` and other flags that are refused.
    Exchange {
        dir: u16,
        name: u8,
        to: u16,
        new: u8,
        flags: u8,
    },
    /// A mode of fallocate that is refused.
    Punch {
        file: u16,
        mode: u8,
        offset: u64,
        len: u64,
    },
    /// Reads with `O_DIRECT`.
    ReadDirect { file: u16, offset: u64, len: u32 },
    /// Writes with `O_DIRECT`.
    WriteDirect {
        file: u16,
        offset: u64,
        len: u32,
        sync: bool,
    },
    /// Reads one page through a shared mapping.
    MapRead { file: u16, offset: u64, len: u16 },
    /// Stores into pages of a shared mapping; the kernel writes them back later.
    MapWrite { file: u16, offset: u64, len: u32 },
    /// `msync`.
    Msync { file: u16 },
    /// Opens with `O_TRUNC`, and keeps it open or not.
    OpenTrunc { file: u16, hold: bool },
}

/// The kinds of these operations, for weights.
pub const KINDS: usize = 14;

/// Their names, in the order of their weights.
pub const NAMES: [&str; KINDS] = [
    "setacl",
    "getacl",
    "removeacl",
    "chmodbits",
    "openhandle",
    "handleparent",
    "exchange",
    "punch",
    "opentrunc",
    "readdirect",
    "writedirect",
    "mapread",
    "mapwrite",
    "msync",
];

/// The first of those that need the kernel's pages.
const MAPS: usize = 11;

/// How often these operations come in a world, and which.
pub(super) struct Share {
    rng: Stream,
    permille: u64,
    weights: [u32; KINDS],
}

impl Share {
    /// What a seed draws.
    pub(super) fn draw(seed: u64, config: &Config, knobs: &Knobs) -> Self {
        let rng = Stream::new(seed, "posix", 0);
        let permille = match config.profile {
            // There are few operations, and only what nodes share is of interest.
            Profile::Cluster => rng.pick(&[0, 100, 300, 500]),
            _ => rng.pick(&[0, 60, 150, 350]),
        };
        let mut weights = [10, 8, 3, 4, 7, 2, 1, 2, 3, 7, 9, 5, 16, 3];
        // Swarm, as for the other operations.
        for weight in &mut weights {
            match rng.below(6) {
                0 => *weight = 0,
                1 => *weight *= 4,
                _ => {}
            }
        }
        knobs.weights(&NAMES, &mut weights);
        if !config.kernel_caches {
            // Without its pages the kernel's model has nothing to map.
            weights[MAPS..].fill(0);
        }
        let any = weights.iter().any(|weight| *weight > 0);
        let permille = knobs.chance("workload.posix", permille);
        Self {
            permille: if any { permille } else { 0 },
            rng,
            weights,
        }
    }

    /// Now and then another operation than was drawn.
    pub(super) fn instead(&self, config: &Config, mix: &Mix) -> Option<PosixOp> {
        let rng = &self.rng;
        (self.permille > 0 && rng.chance(self.permille)).then(|| self.draw_op(config, mix))
    }

    fn draw_op(&self, config: &Config, mix: &Mix) -> PosixOp {
        let rng = &self.rng;
        let any = || rng.below(1 << 16) as u16;
        // Few objects, and a few of them often: contention is where the bugs are.
        let hot = || match rng.chance(500) {
            true => rng.below(3) as u16,
            false => any(),
        };
        let dir = || if rng.chance(400) { 0 } else { any() };
        let name = || rng.below(u64::from(config.names)) as u8;
        match rng.weighted(&self.weights) {
            0 => PosixOp::SetAcl {
                obj: hot(),
                default: rng.chance(500),
                dir: rng.chance(850),
                shape: rng.below(256) as u8,
                perms: any(),
            },
            1 => PosixOp::GetAcl {
                obj: hot(),
                default: rng.chance(400),
            },
            2 => PosixOp::RemoveAcl {
                obj: hot(),
                default: rng.chance(400),
            },
            3 => PosixOp::ChmodBits {
                obj: hot(),
                mode: rng.below(0o10_000) as u16,
            },
            4 => PosixOp::OpenHandle { obj: any() },
            5 => PosixOp::HandleParent { dir: any() },
            6 => PosixOp::Exchange {
                dir: dir(),
                name: name(),
                to: dir(),
                new: name(),
                flags: rng.pick(&[2, 4, 6, 3]),
            },
            7 => PosixOp::Punch {
                file: any(),
                // PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE.
                mode: rng.pick(&[3, 8, 16, 17, 32, 64]),
                offset: draw_offset(rng, mix),
                len: u64::from(draw_len(rng, mix)),
            },
            8 => PosixOp::OpenTrunc {
                file: hot(),
                hold: rng.chance(300),
            },
            9 => PosixOp::ReadDirect {
                file: hot(),
                offset: draw_offset(rng, mix),
                len: draw_len(rng, mix),
            },
            10 => PosixOp::WriteDirect {
                file: hot(),
                offset: draw_offset(rng, mix),
                len: draw_len(rng, mix),
                sync: rng.chance(100),
            },
            11 => PosixOp::MapRead {
                file: hot(),
                offset: place(rng, mix),
                len: 1 + rng.below(4096) as u16,
            },
            12 => PosixOp::MapWrite {
                file: hot(),
                offset: place(rng, mix),
                len: match rng.below(4) {
                    0 => 1 + rng.below(20) as u32,
                    1 => 4096,
                    _ => 1 + rng.below(9_000) as u32,
                },
            },
            _ => PosixOp::Msync { file: hot() },
        }
    }
}

/// An offset in a mapping: resolved modulo the file's size, so it is always in it.
fn place(rng: &Stream, mix: &Mix) -> u64 {
    if rng.chance(500) {
        rng.below(20_000)
    } else {
        draw_offset(rng, mix)
    }
}

impl PosixOp {
    /// The same with smaller values.
    pub(crate) fn simpler(&self) -> Vec<PosixOp> {
        let mut all = Vec::new();
        let mut push = |change: &mut dyn FnMut(&mut PosixOp)| {
            let mut changed = self.clone();
            change(&mut changed);
            if changed != *self {
                all.push(changed);
            }
        };
        for small in [1, 4096] {
            push(&mut |op| {
                if let PosixOp::ReadDirect { len, .. }
                | PosixOp::WriteDirect { len, .. }
                | PosixOp::MapWrite { len, .. } = op
                {
                    *len = (*len).min(small);
                }
            });
        }
        push(&mut |op| {
            if let PosixOp::ReadDirect { offset, .. }
            | PosixOp::WriteDirect { offset, .. }
            | PosixOp::MapRead { offset, .. }
            | PosixOp::MapWrite { offset, .. }
            | PosixOp::Punch { offset, .. } = op
            {
                *offset = 0;
            }
        });
        push(&mut |op| match op {
            PosixOp::WriteDirect { sync, .. } => *sync = false,
            PosixOp::OpenTrunc { hold, .. } => *hold = false,
            // The simplest ACL that the mode does not say.
            PosixOp::SetAcl { shape, .. } => *shape = 1,
            PosixOp::ChmodBits { mode, .. } => *mode &= 0o777,
            _ => {}
        });
        all
    }

    /// The file that it is about, if it must be one.
    pub(crate) fn file(&self) -> Option<u16> {
        match self {
            PosixOp::Punch { file, .. }
            | PosixOp::ReadDirect { file, .. }
            | PosixOp::WriteDirect { file, .. }
            | PosixOp::MapRead { file, .. }
            | PosixOp::MapWrite { file, .. }
            | PosixOp::Msync { file }
            | PosixOp::OpenTrunc { file, .. } => Some(*file),
            _ => None,
        }
    }
}

//! Cluster locks: ranges of item keys, and what a mount may do inside them
//! (spec 10).
//!
//! * [`Scope`] and [`Mode`]: the fixed ranges every node uses, and the modes.
//! * [`server::LockServer`]: the server's brain, granting and invalidating.
//! * [`client::LockClient`]: the mount's brain, one state machine per lock.
//! * [`Locks`]: the mount's async face over that brain.
//! * [`omap`]: who has which inode open, asked before an inode is deleted (spec 11).
//!
//! What can go wrong: a lock answered before what it covered was committed and
//! dropped. The order lives in one place, `facade::revoke`, and nowhere else.

pub mod client;
mod facade;
pub mod omap;
mod scope;
pub mod server;

pub use facade::{LockError, LockGuard, LockHooks, LockTransport, Locks, Respond};
pub use scope::Scope;

use crate::env::Duration;
use crate::format::{Key, NetLock};

/// What a lock permits (spec 10 section 3). The discriminants are the wire's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// Nothing; asked for to give a lock up.
    #[default]
    Null = 0,
    /// Read, cache clean items.
    Read = 1,
    /// Read and write, alone.
    Write = 2,
    /// Create, delete and add deltas without reading, shared among writers.
    WriteOnly = 3,
}

impl Mode {
    /// Number of modes, for tables indexed by mode.
    pub const COUNT: usize = 4;

    /// The mode of a wire byte.
    pub const fn from_wire(byte: u8) -> Option<Mode> {
        match byte {
            0 => Some(Mode::Null),
            1 => Some(Mode::Read),
            2 => Some(Mode::Write),
            3 => Some(Mode::WriteOnly),
            _ => None,
        }
    }

    /// Whether items may be read under it.
    pub const fn reads(self) -> bool {
        matches!(self, Mode::Read | Mode::Write)
    }

    /// Whether items may be changed under it.
    pub const fn writes(self) -> bool {
        matches!(self, Mode::Write | Mode::WriteOnly)
    }

    /// Whether a lock granted in this mode serves a task that wants `wanted`.
    pub const fn satisfies(self, wanted: Mode) -> bool {
        self as u8 == wanted as u8 || matches!((self, wanted), (Mode::Write, Mode::Read))
    }

    /// What is left of this mode after an invalidation down to `new`: never more
    /// than either (spec 10 section 16.3).
    pub const fn lowered_to(self, new: Mode) -> Mode {
        match (self, new) {
            (Mode::Write | Mode::Read, Mode::Read) => Mode::Read,
            _ => Mode::Null,
        }
    }
}

/// A lock message with zero padding.
pub(crate) fn net_lock(key: &Key, write_seq: u64, old: Mode, new: Mode) -> NetLock {
    NetLock {
        key: (*key).into(),
        write_seq: write_seq.into(),
        old_mode: old as u8,
        new_mode: new as u8,
        ..NetLock::default()
    }
}

/// FREE choices of the lock client (spec 10 section 13).
#[derive(Clone, Debug)]
pub struct Policy {
    /// Lock objects kept before idle ones are given back (`lock_idle_count`, 32..=100000).
    pub idle_count: usize,
    /// How long a revocation may be prepared before tasks that the old mode serves
    /// are let in again: the kernel may not be able to drop a page that such a task
    /// has locked (spec 10 section 18).
    pub prepare_grace: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            idle_count: 10_000,
            prepare_grace: Duration::from_millis(2),
        }
    }
}

#[cfg(test)]
mod tests;

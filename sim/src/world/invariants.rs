//! Invariants of locks and caches over all mounts at once (spec 10 section 15,
//! spec 07), looked at between two steps of the executor. Nobody is asked and
//! nothing is awaited: looking changes nothing.
//!
//! What can go wrong: judging a mount that is no more. A process that ended, or a
//! mount that was severed, holds nothing: its locks are others' to have. So are those
//! of a mount that has said farewell, from when the server hears it (spec 08 section
//! 9), which is before the mount hears the answer.

use crate::backend::Life;
use outrider_core::locks::{Mode, Scope, client::LockState};
use outrider_core::node::Mount;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

/// How the panic begins that ends a world with a broken invariant.
pub const BROKEN: &str = "invariant broken: ";
/// Steps of the executor between two looks.
pub const EVERY: u64 = 64;

/// A mount that is looked at while it lives.
pub struct Watched {
    /// The mount.
    pub mount: Weak<Mount>,
    /// The process it runs in.
    pub life: Rc<Life>,
}

/// What a mount still has of a lock: until an invalidation is answered, the mode
/// before it.
fn held(state: &LockState) -> Mode {
    state.invalidating.unwrap_or(state.mode)
}

/// Whether two mounts may have these modes of one lock.
fn fit(a: Mode, b: Mode) -> bool {
    use Mode::{Null, Read, WriteOnly};
    matches!(
        (a, b),
        (Null, _) | (_, Null) | (Read, Read) | (WriteOnly, WriteOnly)
    )
}

/// The first invariant that is broken.
pub fn broken(watched: &[Watched]) -> Option<String> {
    let mut everywhere: BTreeMap<_, (u64, Mode)> = BTreeMap::new();
    let alive = watched.iter().filter(|w| w.life.is_alive());
    for mount in alive.filter_map(|w| w.mount.upgrade()) {
        if mount.log().is_severed() {
            continue;
        }
        let (rid, table) = (mount.rid(), mount.locks().table());
        if let Some(text) = of_one(&mount, &table) {
            return Some(format!("mount {rid:016x}: {text}"));
        }
        if has_left(&mount, &table) {
            continue;
        }
        for state in &table {
            let (key, mode) = (state.scope.range().start, held(state));
            let other = *everywhere.entry(key).or_insert((rid, mode));
            if other.0 != rid && !fit(other.1, mode) {
                return Some(format!(
                    "lock {key}: mount {:016x} has {:?} and mount {rid:016x} has {mode:?}",
                    other.0, other.1
                ));
            }
            if mode.writes() || !other.1.writes() && mode != Mode::Null {
                everywhere.insert(key, (rid, mode));
            }
        }
    }
    None
}

/// Whether a mount makes no use of the locks it still lists, and never will: it takes
/// no more, nobody uses one, and nothing waits to be written under one.
fn has_left(mount: &Mount, table: &[LockState]) -> bool {
    let used = |state: &LockState| state.users.iter().any(|users| *users > 0);
    let dirty = || mount.log().cached_ranges().iter().any(|(_, dirty)| *dirty);
    mount.locks().is_stopped() && !table.iter().any(used) && !dirty()
}

/// What must hold within one mount.
fn of_one(mount: &Mount, table: &[LockState]) -> Option<String> {
    mount.log().assert_consistent();
    let mut modes: BTreeMap<_, Mode> = BTreeMap::new();
    for state in table {
        modes.insert(state.scope.range().start, held(state));
        for mode in [Mode::Read, Mode::Write, Mode::WriteOnly] {
            if state.users[mode as usize] > 0 && !held(state).satisfies(mode) {
                return Some(format!(
                    "{:?} is used as {mode:?} under {:?}",
                    state.scope, state.mode
                ));
            }
        }
    }
    for (range, dirty) in mount.log().cached_ranges() {
        let Some(scope) = Scope::covering(&range.start) else {
            return Some(format!(
                "items of {} are cached, which no lock covers",
                range.start
            ));
        };
        if !scope.range().contains(&range.end) {
            return Some(format!("a page of {scope:?} reaches to {}", range.end));
        }
        let mode = modes.get(&scope.range().start).copied().unwrap_or_default();
        // Nobody reads what a mount that ends still has in memory.
        let idle = mount.locks().is_stopped() && !dirty;
        if mode == Mode::Null && !idle || dirty && !mode.writes() {
            let how = if dirty { "dirty items" } else { "items" };
            let lock = table.iter().find(|state| state.scope == scope);
            return Some(format!(
                "{how} of {scope:?} from {} to {} are cached under {mode:?}: {lock:?}",
                range.start, range.end
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_two_mounts_fit_as_the_table_says() {
        use Mode::{Null, Read, Write, WriteOnly};
        for mode in [Null, Read, Write, WriteOnly] {
            assert!(fit(Null, mode) && fit(mode, Null));
            assert_eq!(fit(Write, mode), mode == Null);
        }
        assert!(fit(Read, Read) && fit(WriteOnly, WriteOnly));
        assert!(!fit(Read, WriteOnly) && !fit(WriteOnly, Read));
    }
}

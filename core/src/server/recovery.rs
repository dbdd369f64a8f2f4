//! What a new server still waits for from the clients of the one before it
//! (spec 09 section 7): their greeting, and their locks.
//!
//! What can go wrong: a lock granted, or an open inode map answered, while a
//! client that nobody heard from may still hold or use something. So all rids
//! are prepared before the first connection is accepted, and one leaves only by
//! telling everything or by being fenced and reclaimed.

use crate::env::probe;
use std::collections::BTreeMap;

/// What is awaited of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// That it greets.
    Greeting,
    /// That it tells its locks.
    Locks,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Awaited {
    greeting: bool,
    locks: bool,
}

/// What follows from an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The last greeting that was awaited is there: open inode maps may be asked for.
    AllGreeted,
    /// The locks of this client are known (or it is gone): its farewell may proceed.
    LocksFinished(u64),
    /// The last locks that were awaited are there: locks may be granted, and the
    /// timer ends.
    AllRecovered,
}

/// The tracker of one server instance.
#[derive(Clone, Debug, Default)]
pub struct Recovery {
    awaited: BTreeMap<u64, Awaited>,
    expired: bool,
}

impl Recovery {
    /// Waits for both kinds from each of `rids`, the mounted clients at server start.
    pub fn prepare(rids: impl IntoIterator<Item = u64>) -> Self {
        let both = Awaited {
            greeting: true,
            locks: true,
        };
        Self {
            awaited: rids.into_iter().map(|rid| (rid, both)).collect(),
            expired: false,
        }
    }

    /// Whether anything is awaited of the client.
    pub fn awaits(&self, rid: u64) -> bool {
        self.awaited.contains_key(&rid)
    }

    /// A client has greeted. Its locks stay awaited.
    pub fn greeted(&mut self, rid: u64) -> Vec<Outcome> {
        self.finish(rid, &[Kind::Greeting])
    }

    /// A client has told all its locks.
    pub fn locks_told(&mut self, rid: u64) -> Vec<Outcome> {
        self.finish(rid, &[Kind::Locks])
    }

    /// A client was fenced and reclaimed; nothing is awaited of it any more.
    pub fn gone(&mut self, rid: u64) -> Vec<Outcome> {
        self.finish(rid, &[Kind::Greeting, Kind::Locks])
    }

    fn finish(&mut self, rid: u64, kinds: &[Kind]) -> Vec<Outcome> {
        let mut out = Vec::new();
        let Some(awaited) = self.awaited.get_mut(&rid) else {
            return out;
        };
        let before = *awaited;
        for kind in kinds {
            match kind {
                Kind::Greeting => awaited.greeting = false,
                Kind::Locks => awaited.locks = false,
            }
        }
        let after = *awaited;
        if after == Awaited::default() {
            self.awaited.remove(&rid);
        }
        if before.greeting && !after.greeting && !self.any_pending(Kind::Greeting) {
            out.push(Outcome::AllGreeted);
        }
        if before.locks && !after.locks {
            out.push(Outcome::LocksFinished(rid));
        }
        if before != after && self.awaited.is_empty() {
            probe("server.recovery.all");
            out.push(Outcome::AllRecovered);
        }
        out
    }

    /// The time is over: the clients to fence, each once. They stay awaited until
    /// they are gone, also if they come back meanwhile.
    pub fn expire(&mut self) -> Vec<u64> {
        assert!(!self.expired, "the recovery timer runs once");
        self.expired = true;
        if !self.awaited.is_empty() {
            probe("server.recovery.expired");
        }
        self.awaited.keys().copied().collect()
    }

    /// Whether this is awaited of `rid`.
    pub fn is_pending(&self, rid: u64, kind: Kind) -> bool {
        self.awaited.get(&rid).is_some_and(|awaited| match kind {
            Kind::Greeting => awaited.greeting,
            Kind::Locks => awaited.locks,
        })
    }

    /// Whether this is awaited of anybody.
    pub fn any_pending(&self, kind: Kind) -> bool {
        self.awaited.keys().any(|rid| self.is_pending(*rid, kind))
    }

    /// Whether clients of the server before may still come: some have not greeted, and
    /// their time is not up.
    pub fn may_come(&self) -> bool {
        !self.expired && self.any_pending(Kind::Greeting)
    }

    /// Whether nothing is awaited.
    pub fn is_finished(&self) -> bool {
        self.awaited.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nobody_mounted_means_nothing_to_wait_for() {
        let recovery = Recovery::prepare([]);
        assert!(recovery.is_finished());
        assert!(!recovery.any_pending(Kind::Greeting));
    }

    #[test]
    fn greetings_of_all_open_the_maps_and_locks_of_all_the_grants() {
        let mut r = Recovery::prepare([1, 2]);
        assert_eq!(r.greeted(1), []);
        assert_eq!(r.greeted(1), [], "a second greeting changes nothing");
        assert_eq!(r.greeted(2), [Outcome::AllGreeted]);
        assert_eq!(r.locks_told(2), [Outcome::LocksFinished(2)]);
        assert_eq!(
            r.locks_told(1),
            [Outcome::LocksFinished(1), Outcome::AllRecovered]
        );
        assert_eq!(r.locks_told(1), []);
        assert!(r.is_finished());
    }

    #[test]
    fn a_client_that_comes_back_too_late_is_fenced_all_the_same() {
        let mut r = Recovery::prepare([1, 2]);
        r.greeted(1);
        r.locks_told(1);
        assert_eq!(r.expire(), [2]);
        assert_eq!(r.greeted(2), [Outcome::AllGreeted]);
        assert_eq!(
            r.gone(2),
            [Outcome::LocksFinished(2), Outcome::AllRecovered]
        );
    }

    #[test]
    fn a_new_client_is_not_waited_for() {
        let mut r = Recovery::prepare([1]);
        assert_eq!(r.greeted(9), []);
        assert_eq!(r.gone(9), []);
        assert!(!r.is_finished());
    }

    proptest! {
        #[test]
        fn everything_is_announced_exactly_once(
            rids in proptest::collection::btree_set(1u64..6, 0..5),
            events in proptest::collection::vec((1u64..8, 0u8..3), 0..60),
        ) {
            let mut r = Recovery::prepare(rids.clone());
            let mut seen = Vec::new();
            let tail = rids.iter().map(|rid| (*rid, 2));
            for (rid, what) in events.into_iter().chain(tail) {
                seen.extend(match what {
                    0 => r.greeted(rid),
                    1 => r.locks_told(rid),
                    _ => r.gone(rid),
                });
            }
            prop_assert!(r.is_finished());
            let count = |o: Outcome| seen.iter().filter(|s| **s == o).count();
            let expected = usize::from(!rids.is_empty());
            prop_assert_eq!(count(Outcome::AllGreeted), expected);
            prop_assert_eq!(count(Outcome::AllRecovered), expected);
            for rid in &rids {
                prop_assert_eq!(count(Outcome::LocksFinished(*rid)), 1);
            }
            if expected == 1 {
                prop_assert_eq!(seen.last(), Some(&Outcome::AllRecovered));
            }
        }
    }
}

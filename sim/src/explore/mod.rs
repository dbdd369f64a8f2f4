//! Exhaustive exploration of the protocol brains: every order of every event
//! within small bounds, instead of the orders a seed happens to draw.
//!
//! The brains of core are plain state machines, so a handful of them, the
//! messages between them and what is durable make one value. [`search`] visits
//! all values that can be reached, breadth first, checks each, and shows the
//! shortest way to one that is wrong.
//!
//! * [`election`]: quorum members, their blocks, servers, fences (spec 09 section 14).
//! * [`locks`]: lock server, lock clients and the recovery tracker (spec 10 section 15).
//!
//! What can go wrong: a model that leaves out the move that breaks the real
//! system. Each model says in its head what it allows; planted bugs test that it
//! sees anything at all.

pub mod election;
pub mod locks;
pub mod scenarios;

use outrider_core::env::HashMap;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};

/// A system that can be explored.
pub trait System {
    /// All of it at one moment.
    type State: Clone;
    /// Something that may happen.
    type Event: Clone + Debug;
    /// Where it begins.
    fn initial(&self) -> Self::State;
    /// What may happen in this state.
    fn events(&self, state: &Self::State) -> Vec<Self::Event>;
    /// The state after an event.
    ///
    /// # Errors
    /// What must never happen, if it does on the way.
    fn apply(&self, state: &Self::State, event: &Self::Event) -> Result<Self::State, String>;
    /// Checks a state. `last`: nothing more can happen in it.
    ///
    /// # Errors
    /// The invariant that does not hold.
    fn check(&self, state: &Self::State, last: bool) -> Result<(), String>;
    /// Feeds everything that tells states apart.
    fn hash(&self, state: &Self::State, hasher: &mut dyn Hasher);
}

/// What an exploration saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// States visited.
    pub states: u64,
    /// Events taken.
    pub events: u64,
    /// Events from the beginning to the farthest state.
    pub depth: u32,
    /// Whether every state was visited; if not, the limit ended the search.
    pub complete: bool,
    /// The invariant broken, and the events that lead there.
    pub violation: Option<(String, Vec<String>)>,
}

/// How a state was reached first.
struct Way<E> {
    from: u64,
    event: Option<E>,
}

/// Visits all states, at most `limit`, and stops at the first wrong one.
///
/// States are remembered by a 64 bit fingerprint: of ten million states one is
/// taken for another with a chance of about one to a few hundred thousand.
pub fn search<S: System>(system: &S, limit: u64) -> Report {
    let mut report = Report::default();
    let mut ways: HashMap<u64, Way<S::Event>> = HashMap::default();
    let mut queue = VecDeque::new();
    let first = system.initial();
    let mark = fingerprint(system, &first);
    ways.insert(
        mark,
        Way {
            from: mark,
            event: None,
        },
    );
    queue.push_back((first, mark, 0));
    while let Some((state, mark, depth)) = queue.pop_front() {
        report.states += 1;
        report.depth = depth;
        let events = system.events(&state);
        if let Err(broken) = system.check(&state, events.is_empty()) {
            report.violation = Some((broken, way_to(&ways, mark)));
            return report;
        }
        if report.states == limit {
            return report;
        }
        for event in events {
            report.events += 1;
            let next = match system.apply(&state, &event) {
                Ok(next) => next,
                Err(broken) => {
                    let mut way = way_to(&ways, mark);
                    way.push(format!("{event:?}"));
                    report.violation = Some((broken, way));
                    return report;
                }
            };
            let seen = fingerprint(system, &next);
            ways.entry(seen).or_insert_with(|| {
                queue.push_back((next, seen, depth + 1));
                Way {
                    from: mark,
                    event: Some(event),
                }
            });
        }
    }
    report.complete = true;
    report
}

fn fingerprint<S: System>(system: &S, state: &S::State) -> u64 {
    // Keys of this hasher are fixed: equal in every process.
    let mut hasher = DefaultHasher::new();
    system.hash(state, &mut hasher);
    hasher.finish()
}

fn way_to<E: Debug>(ways: &HashMap<u64, Way<E>>, mut mark: u64) -> Vec<String> {
    let mut out = Vec::new();
    while let Some(Way {
        from,
        event: Some(event),
    }) = ways.get(&mark)
    {
        out.push(format!("{event:?}"));
        mark = *from;
    }
    out.reverse();
    out
}

/// Hashes a value into a hasher behind a reference.
fn feed<T: Hash + ?Sized>(value: &T, hasher: &mut dyn Hasher) {
    struct Through<'a>(&'a mut dyn Hasher);
    impl Hasher for Through<'_> {
        fn finish(&self) -> u64 {
            self.0.finish()
        }
        fn write(&mut self, bytes: &[u8]) {
            self.0.write(bytes);
        }
    }
    value.hash(&mut Through(hasher));
}

#[cfg(test)]
mod tests;

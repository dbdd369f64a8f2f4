//! All orders of a window's calls that explain its answers, as the states they
//! end in: each state once, found when asked for.
//!
//! The search goes from call to call. Which calls are placed and the state they
//! led to decide everything that follows, so no such pair is visited twice.

use super::Record;
use super::parts::Sights;
use crate::model::{Model, Reply};
use crate::trace::digest;
use outrider_core::env::HashSet;

/// What a search came to.
pub(super) enum Found {
    /// An order ends in this state.
    State(Model),
    /// There are no more.
    NoMore,
    /// It took too many steps.
    GaveUp,
}

struct Frame {
    state: Model,
    picked: Option<usize>,
    candidates: Vec<usize>,
    next: usize,
    variants: Vec<Model>,
}

/// Where it got stuck, having placed most calls.
#[derive(Clone, Default)]
pub(super) struct Stuck {
    pub placed: usize,
    pub state: Model,
    pub candidates: Vec<usize>,
}

/// A search under way.
pub(super) struct Search {
    done: Vec<bool>,
    placed: usize,
    /// Digest of `done`.
    marks: u64,
    stack: Vec<Frame>,
    visited: HashSet<(u64, u64)>,
    /// What the answers show of files, if a truncation failed.
    sights: Option<Sights>,
    stuck: Option<Stuck>,
}

/// A number that stands for a call in the digest of those that are done.
pub(super) fn mark_of(index: usize) -> u64 {
    digest(&(index as u64 + 1).to_le_bytes())
}

/// The calls that may come next: those that began before any other ended.
fn candidates(records: &[Record], done: &[bool]) -> Vec<usize> {
    let open = || (0..records.len()).filter(|index| !done[*index]);
    let Some(first_end) = open().map(|index| records[index].end()).min() else {
        return Vec::new();
    };
    let mut found: Vec<usize> = open()
        .filter(|index| records[*index].began <= first_end)
        .collect();
    found.sort_by_key(|index| (records[*index].end(), *index));
    found
}

impl Search {
    /// From a state on.
    pub fn new(start: Model, records: &[Record]) -> Self {
        let done = vec![false; records.len()];
        let halves = |record: &Record| record.is_uncertain() && record.call.resizes().is_some();
        let replies = || records.iter().filter_map(|record| record.reply.as_ref());
        let sights = records.iter().any(halves).then(|| Sights::of(replies()));
        let first = Frame {
            state: start,
            picked: None,
            candidates: candidates(records, &done),
            next: 0,
            variants: Vec::new(),
        };
        Self {
            done,
            placed: 0,
            marks: 0,
            stack: vec![first],
            visited: HashSet::default(),
            sights,
            stuck: None,
        }
    }

    /// Where it got stuck with the most calls placed.
    pub fn stuck(&self) -> Option<&Stuck> {
        self.stuck.as_ref()
    }

    fn mark(&mut self, index: usize, done: bool) {
        self.done[index] = done;
        self.marks ^= mark_of(index);
        self.placed = if done {
            self.placed + 1
        } else {
            self.placed - 1
        };
    }

    /// The state that another order ends in. `steps` is what is left of the bound.
    pub fn next(&mut self, records: &[Record], steps: &mut u64) -> Found {
        while let Some(frame) = self.stack.last_mut() {
            if let Some(state) = frame.variants.pop() {
                if !self.visited.insert((self.marks, state.digest())) {
                    continue;
                }
                if self.placed == records.len() {
                    return Found::State(state);
                }
                self.stack.push(Frame {
                    state,
                    picked: None,
                    candidates: candidates(records, &self.done),
                    next: 0,
                    variants: Vec::new(),
                });
                continue;
            }
            if let Some(picked) = frame.picked.take() {
                self.mark(picked, false);
                continue;
            }
            if records.is_empty() {
                let only = self.stack.pop().expect("a frame");
                return Found::State(only.state);
            }
            let Some(&index) = frame.candidates.get(frame.next) else {
                self.leave();
                continue;
            };
            if *steps == 0 {
                return Found::GaveUp;
            }
            *steps -= 1;
            frame.next += 1;
            self.place(index, records);
        }
        Found::NoMore
    }

    fn place(&mut self, index: usize, records: &[Record]) {
        let frame = self.stack.last_mut().expect("a frame");
        let record = &records[index];
        let reply: &Reply = record.reply.as_ref().expect("all calls have ended");
        frame.variants = frame.state.apply(&record.call, reply, &record.cx);
        if frame.variants.is_empty() {
            return;
        }
        if let Some(sights) = self.sights.as_ref()
            && record.is_uncertain()
        {
            // Of its transactions the first ones may be there. The last is tried first.
            let torn = sights.torn(&record.call, &frame.state, &record.cx);
            frame.variants.splice(0..0, torn);
        }
        frame.picked = Some(index);
        let before = frame.state.digest();
        if record.call.is_read_only() && frame.variants.iter().all(|s| s.digest() == before) {
            // It changes nothing, nor tells of two times which one it was: if it fits
            // here, no other place is better.
            frame.next = frame.candidates.len();
        }
        self.mark(index, true);
    }

    fn leave(&mut self) {
        let frame = self.stack.pop().expect("a frame");
        let further = |stuck: &Stuck| self.placed > stuck.placed;
        if self.stuck.as_ref().is_none_or(further) {
            self.stuck = Some(Stuck {
                placed: self.placed,
                state: frame.state,
                candidates: frame.candidates,
            });
        }
    }
}

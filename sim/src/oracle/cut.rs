//! What a crash left: the search for the prefix of the calls that it shows.
//!
//! A commit takes everything that was done before it and nothing after (spec 04
//! section 15), so the state must be that of some calls, in an order that explains
//! their answers, and of none that began when one of the others had not been done
//! and was over. A call made of several transactions (spec 14 sections 8, 11, 12)
//! may be there in part.

use super::chain::{Chain, Nth};
use super::parts::part;
use super::search::mark_of;
use super::{Record, Violation};
use crate::model::recover::{Later, Unsettled};
use crate::model::{Call, Model, Reply};
use outrider_core::env::HashSet;
use outrider_core::fs::api::Ino;

/// Judges what was recovered; gives what of it is not durable. `None` if the
/// search was given up. `unsettled` is what was not durable at the crash before.
pub(super) fn judge(
    chain: &mut Chain,
    observed: &Model,
    unsettled: &Unsettled,
    steps: &mut u64,
) -> Option<Result<Unsettled, Violation>> {
    let last = chain.len() - 1;
    // What was promised is there; so nothing before it can be all there is.
    let promised = |window: &usize| chain.records(*window).iter().any(Record::is_promised);
    let oldest = (0..=last).rev().find(promised).unwrap_or(0);
    for number in 0.. {
        let mut more = false;
        for window in (oldest..=last).rev() {
            match chain.nth(window, number, steps) {
                Nth::State => more = true,
                Nth::NoMore => continue,
                Nth::GaveUp => return None,
            }
            let mut cut = Cut::new(chain, window, (observed, unsettled), steps);
            if cut.step(chain.state(window, number)) {
                return Some(Ok(cut.shown()));
            }
            if cut.gave_up {
                return None;
            }
        }
        if !more {
            break;
        }
    }
    let text = explain(chain, oldest..=last, (observed, unsettled));
    Some(Err(Violation {
        kind: "durability",
        text,
    }))
}

/// The prefix that is nearest to what was recovered, in words.
fn explain(
    chain: &Chain,
    windows: std::ops::RangeInclusive<usize>,
    seen: (&Model, &Unsettled),
) -> String {
    let mut nearest: Option<Near> = None;
    for window in windows.rev() {
        let mut steps = 2000;
        let mut cut = Cut::new(chain, window, seen, &mut steps);
        cut.measuring = true;
        cut.step(chain.state(window, 0));
        let nearer = |new: &Near| nearest.as_ref().is_none_or(|old| new.key() < old.key());
        if let Some(new) = cut.nearest.filter(nearer) {
            nearest = Some(new);
        }
    }
    let Some(near) = nearest else {
        return "what was recovered lacks what was promised".to_owned();
    };
    format!(
        "what was recovered is no state that the calls passed through; \
         nearest (without {} of the last calls, {} inodes differ): {}",
        near.missing, near.distance, near.text
    )
}

struct Near {
    distance: usize,
    missing: usize,
    text: String,
}

impl Near {
    fn key(&self) -> (usize, usize) {
        (self.distance, self.missing)
    }
}

/// The search in one window.
struct Cut<'a> {
    /// The calls that do something.
    records: Vec<&'a Record>,
    done: Vec<bool>,
    /// Digest of `done`.
    marks: u64,
    /// Calls of earlier windows that have happened.
    earlier: Vec<&'a Call>,
    /// Calls of later windows.
    later: Vec<&'a Call>,
    observed: &'a Model,
    /// Inodes that were recovered but that no answer has named.
    strangers: Vec<Ino>,
    visited: HashSet<(u64, u64)>,
    steps: &'a mut u64,
    gave_up: bool,
    measuring: bool,
    nearest: Option<Near>,
    /// What was not durable at the crash before.
    unsettled: &'a Unsettled,
    /// The state that was found.
    found: Option<Model>,
}

impl<'a> Cut<'a> {
    fn new(
        chain: &'a Chain,
        window: usize,
        (observed, unsettled): (&'a Model, &'a Unsettled),
        steps: &'a mut u64,
    ) -> Self {
        let records: Vec<&Record> = chain
            .records(window)
            .iter()
            .filter(|record| record.has_effect() && !is_nameless(record))
            .collect();
        let of = |windows: std::ops::Range<usize>| windows.flat_map(|window| chain.records(window));
        let earlier = of(0..window)
            .filter(|record| record.has_effect() && !record.is_uncertain())
            .map(|record| &record.call)
            .collect();
        let later = of(window + 1..chain.len())
            .map(|record| &record.call)
            .collect();
        let named: HashSet<Ino> = (0..=window)
            .flat_map(|window| chain.records(window))
            .filter_map(|record| match &record.reply {
                Some(Reply::Entry(attr)) => Some(attr.ino),
                _ => None,
            })
            .collect();
        let before = chain.state(window, 0);
        let is_stranger = |ino: &Ino| before.get(*ino).is_none() && !named.contains(ino);
        Self {
            done: vec![false; records.len()],
            records,
            marks: 0,
            earlier,
            later,
            observed,
            strangers: observed
                .inodes
                .keys()
                .copied()
                .filter(is_stranger)
                .collect(),
            visited: HashSet::default(),
            steps,
            gave_up: false,
            measuring: false,
            nearest: None,
            unsettled,
            found: None,
        }
    }

    /// Whether this state, or one that further calls lead to, is the one.
    fn step(&mut self, state: &Model) -> bool {
        if *self.steps == 0 {
            self.gave_up = true;
            return false;
        }
        *self.steps -= 1;
        let next = self.candidates();
        if self.may_end() && self.is_it(state, &next) {
            return true;
        }
        for index in next {
            self.mark(index, true);
            for after in self.effects(state, index) {
                let new = self.visited.insert((self.marks, after.digest()));
                if new && self.step(&after) {
                    return true;
                }
                if self.gave_up {
                    return false;
                }
            }
            self.mark(index, false);
        }
        false
    }

    fn mark(&mut self, index: usize, done: bool) {
        self.done[index] = done;
        self.marks ^= mark_of(index);
    }

    fn left_out(&self) -> impl Iterator<Item = usize> {
        (0..self.records.len()).filter(|index| !self.done[*index])
    }

    /// Whether everything is there that was promised.
    fn may_end(&self) -> bool {
        self.left_out()
            .all(|index| !self.records[index].is_promised())
    }

    /// The calls that may come next: those that began before another one, which
    /// certainly did something and is not there, ended.
    fn candidates(&self) -> Vec<usize> {
        let first_end = self
            .left_out()
            .filter(|index| !self.records[*index].is_uncertain())
            .map(|index| self.records[index].end())
            .min()
            .unwrap_or(u64::MAX);
        let done = (0..self.records.len()).filter(|index| self.done[*index]);
        let latest = done.map(|index| self.records[index].began).max();
        self.left_out()
            .filter(|index| {
                let record = self.records[*index];
                // What failed did nothing after it had said so.
                let too_late = record.is_uncertain() && latest > Some(record.end());
                record.began <= first_end && !too_late
            })
            .collect()
    }

    /// The states that a call may lead to.
    fn effects(&self, state: &Model, index: usize) -> Vec<Model> {
        let record = self.records[index];
        let mut states = Vec::new();
        if let Some(reply) = &record.reply {
            states = state.apply(&record.call, reply, &record.cx);
            if !record.is_uncertain() {
                return states;
            }
            states.retain(|after| after.digest() != state.digest());
        }
        let mut cx = record.cx;
        if record.reply.is_none() {
            // It may have run at any time until now.
            cx.wall.1 = i64::MAX;
        }
        states.extend(state.take_effect(&record.call, None, &cx));
        if is_making(&record.call) {
            // The number is not known; the inode may be gone again.
            let gone = (1 << 60) + index as Ino;
            let strangers = self.strangers.iter().copied().chain([gone]);
            let strange = strangers.filter(|ino| state.get(*ino).is_none());
            states
                .extend(strange.filter_map(|ino| state.take_effect(&record.call, Some(ino), &cx)));
        }
        states
    }

    fn later(&self) -> Later<'a> {
        let left_out = self.left_out().map(|index| &self.records[index].call);
        let calls: Vec<&'a Call> = left_out.chain(self.later.iter().copied()).collect();
        let cut_short = (0..self.records.len()).filter_map(|index| {
            let record = self.records[index];
            let cut = record.call.resizes().filter(|_| !record.is_promised());
            cut.map(|(ino, _)| ino)
        });
        Later::new(calls)
            .with_cut_short(cut_short)
            .with_unsettled(self.unsettled, self.written())
    }

    /// The calls that are in the state.
    fn written(&self) -> Vec<&'a Call> {
        let done = (0..self.records.len()).filter(|index| self.done[*index]);
        let done = done.map(|index| &self.records[index].call);
        self.earlier.iter().copied().chain(done).collect()
    }

    /// What was recovered without being of the state.
    fn shown(&self) -> Unsettled {
        let state = self.found.as_ref().expect("a state was found");
        let left_out = self.left_out().map(|index| &self.records[index].call);
        let calls: Vec<&Call> = left_out.chain(self.later.iter().copied()).collect();
        let mut shown = Unsettled::new(state, self.observed, &calls);
        shown.add(self.unsettled.clone().left(&self.written()));
        shown
    }

    /// Whether what was recovered is this state, perhaps with parts of the calls
    /// that may come next.
    fn is_it(&mut self, state: &Model, next: &[usize]) -> bool {
        let Err(text) = state.recovered_as(self.observed, || self.later()) else {
            self.found = Some(state.clone());
            return true;
        };
        if self.measuring {
            self.measure(state, text);
        }
        // A part of a call helps only where its file is not as it was recovered.
        let file = |index: &usize| self.records[*index].call.changes_data_of();
        let files: Vec<Ino> = next.iter().filter_map(file).collect();
        if files.is_empty() {
            return false;
        }
        let Some(differing) = state.differing(self.observed, &files) else {
            return false;
        };
        let helps = |index: &usize| file(index).is_some_and(|ino| differing.contains(&ino));
        let partial: Vec<usize> = next.iter().copied().filter(helps).collect();
        !partial.is_empty() && self.is_it_with_parts(state, &partial)
    }

    fn is_it_with_parts(&mut self, state: &Model, partial: &[usize]) -> bool {
        let [index, rest @ ..] = partial else {
            let found = state.recovered_as(self.observed, || self.later()).is_ok();
            self.found = found.then(|| state.clone());
            return found;
        };
        if self.is_it_with_parts(state, rest) {
            return true;
        }
        let record = self.records[*index];
        let mut cx = record.cx;
        if record.reply.is_none() {
            cx.wall.1 = i64::MAX;
        }
        part(&record.call, state, self.observed)
            .and_then(|part| state.take_effect(&part, None, &cx))
            .is_some_and(|after| self.is_it_with_parts(&after, rest))
    }

    fn measure(&mut self, state: &Model, text: String) {
        let new = Near {
            distance: state.distance(self.observed),
            missing: self.left_out().count() + self.later.len(),
            text,
        };
        let further = |old: &Near| new.key() < old.key();
        if self.nearest.as_ref().is_none_or(further) {
            self.nearest = Some(new);
        }
    }
}

/// It makes a file that nobody can name: if nobody knows of it, it is gone.
pub(super) fn is_nameless(record: &Record) -> bool {
    matches!(record.call, Call::Tmpfile { .. }) && record.is_uncertain()
}

pub(super) fn is_making(call: &Call) -> bool {
    matches!(
        call,
        Call::Mknod { .. } | Call::Mkdir { .. } | Call::Symlink { .. } | Call::Create { .. }
    )
}

//! The windows since the last known state, each with the states it may have ended
//! in. They are found one at a time, and only as many as are needed: the second
//! one of a window when no order of the next window's calls fits the first.

use super::Record;
use super::explain::explain;
use super::search::{Found, Search, Stuck};
use crate::model::Model;
use outrider_core::env::HashSet;

/// What is known of the n-th state after a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nth {
    /// It is in [`Chain::state`].
    State,
    /// There are not so many.
    NoMore,
    /// Looking for it took too many steps.
    GaveUp,
}

struct Link {
    records: Vec<Record>,
    /// The states it may have ended in, as far as they have been found.
    after: Vec<Model>,
    known: HashSet<u64>,
    /// The search from one of the states before it, and how many have been taken.
    search: Option<Search>,
    taken: usize,
    stuck: Option<Stuck>,
}

/// Windows, one after the other.
pub(super) struct Chain {
    first: Vec<Model>,
    links: Vec<Link>,
}

/// How many windows are kept in question. What came before them is settled: one
/// of the states found for it is the true one.
const LENGTH: usize = 200;

impl Chain {
    /// From a known state on.
    pub fn new(state: Model) -> Self {
        Self {
            first: vec![state],
            links: Vec::new(),
        }
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.links.len()
    }

    /// Another window.
    pub fn push(&mut self, records: Vec<Record>) {
        if self.links.len() == LENGTH {
            let oldest = self.links.remove(0);
            if !oldest.after.is_empty() {
                self.first = oldest.after;
            }
            if let Some(next) = self.links.first_mut() {
                next.taken = next.taken.min(self.first.len());
            }
        }
        self.links.push(Link {
            records,
            after: Vec::new(),
            known: HashSet::default(),
            search: None,
            taken: 0,
            stuck: None,
        });
    }

    /// The calls of a window.
    pub fn records(&self, window: usize) -> &[Record] {
        &self.links[window].records
    }

    /// All calls.
    pub fn records_mut(&mut self) -> impl Iterator<Item = &mut Record> {
        self.links.iter_mut().flat_map(|link| &mut link.records)
    }

    /// The states found so far after `windows` windows.
    fn states(&self, windows: usize) -> &[Model] {
        match windows.checked_sub(1) {
            None => &self.first,
            Some(last) => &self.links[last].after,
        }
    }

    /// A state after `windows` windows that [`Chain::nth`] has found.
    pub fn state(&self, windows: usize, number: usize) -> &Model {
        &self.states(windows)[number]
    }

    /// The first state found, after as many windows as possible.
    pub fn last(&self) -> &Model {
        let found = (0..=self.links.len()).rev();
        let mut states = found.filter_map(|windows| self.states(windows).first());
        states.next().expect("the chain starts from a state")
    }

    /// Looks for the n-th state that all may have been in after `windows` windows.
    pub fn nth(&mut self, windows: usize, number: usize, steps: &mut u64) -> Nth {
        while self.states(windows).len() <= number {
            if windows == 0 {
                return Nth::NoMore;
            }
            let link = &mut self.links[windows - 1];
            let Some(search) = &mut link.search else {
                let before = link.taken;
                match self.nth(windows - 1, before, steps) {
                    Nth::State => {}
                    other => return other,
                }
                let state = self.state(windows - 1, before).clone();
                let link = &mut self.links[windows - 1];
                link.taken += 1;
                link.search = Some(Search::new(state, &link.records));
                continue;
            };
            match search.next(&link.records, steps) {
                Found::State(state) => {
                    if link.known.insert(state.digest()) {
                        link.after.push(state);
                    }
                }
                Found::NoMore => {
                    let further = |old: &Stuck| {
                        let new = search.stuck();
                        new.is_some_and(|new| new.placed > old.placed)
                    };
                    if link.stuck.as_ref().is_none_or(further) {
                        link.stuck = search.stuck().cloned();
                    }
                    link.search = None;
                }
                Found::GaveUp => return Nth::GaveUp,
            }
        }
        Nth::State
    }

    /// Why no order of the last window's calls explains their answers.
    pub fn explain(&self) -> String {
        let link = self.links.last().expect("a window");
        match &link.stuck {
            Some(stuck) => explain(&stuck.state, &link.records, &stuck.candidates),
            None => "no order of the calls explains the answers".to_owned(),
        }
    }
}

//! The judge: were the answers those of a filesystem, and is what a crash left
//! one of the states it was allowed to leave?
//!
//! Calls are recorded in the order in which they began and ended. In each moment
//! of quiet the calls since the last one are put in an order that respects this
//! and in which the model gives every answer that was seen (linearizability, by
//! search). Often several orders do, and they need not end in the same state: the
//! next one is looked for when what came later does not fit the first (`chain`).
//!
//! After a crash the state that was recovered must be that of some prefix of such
//! an order, with everything in it that an fsync had promised (`cut`; spec 04 I16,
//! spec 12 section 23, spec 14 sections 20 and 24).
//!
//! The searches are bounded. A window whose search is given up counts as not
//! judged, and so do all after it until the next mount shows what is there: files
//! that are open and have no name cannot be seen before.

mod chain;
mod cut;
mod deaths;
mod explain;
mod parts;
mod search;
pub mod walk;

use crate::model::recover::Unsettled;
use crate::model::{Call, Context, Model, Reply};
use chain::{Chain, Nth};
pub use deaths::Death;
use outrider_core::errno::Errno;
use outrider_core::fs::api::Ino;
use std::collections::BTreeMap;

/// A call and what became of it.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was asked.
    pub call: Call,
    /// What was answered, unless the mount died first.
    pub reply: Option<Reply>,
    /// Under which conditions. Its start and end are numbers of the oracle's own
    /// count of beginnings and ends: no two are equal, as times may be.
    pub cx: Context,
    /// World times of beginning and end.
    at: (u64, u64),
    began: u64,
    /// An fsync or an unmount has promised it.
    durable: bool,
}

impl Record {
    /// When it ended, in the oracle's own count.
    fn end(&self) -> u64 {
        if self.reply.is_some() {
            self.cx.end
        } else {
            u64::MAX
        }
    }

    /// Whether it may have taken effect or not: no answer, or an error that says little.
    fn is_uncertain(&self) -> bool {
        match &self.reply {
            None => true,
            Some(Reply::Err(error)) => matches!(
                *error,
                Errno::EIO
                    | Errno::ENOSPC
                    | Errno::ENOLINK
                    | Errno::ESHUTDOWN
                    | Errno::ENOTCONN
                    | Errno::ECONNABORTED
            ),
            Some(_) => false,
        }
    }

    fn has_effect(&self) -> bool {
        !self.call.is_read_only()
            && !self.call.is_store()
            && !matches!(
                self.call,
                Call::Open { .. } | Call::OpenDirect { .. } | Call::Release { .. }
            )
            && (self.is_uncertain() || !matches!(self.reply, Some(Reply::Err(_))))
    }

    /// Something was done that an fsync has promised.
    fn is_promised(&self) -> bool {
        self.durable && self.has_effect() && !self.is_uncertain()
    }
}

/// Something that no correct filesystem does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which promise was broken.
    pub kind: &'static str,
    /// What was seen and what was expected.
    pub text: String,
}

/// Judge of one mount's history.
pub struct Oracle {
    chain: Chain,
    current: Vec<Record>,
    /// What the last crash showed and no flush makes durable.
    unsettled: Unsettled,
    /// Beginnings and ends so far.
    count: u64,
    /// The state is not known: a search was given up.
    lost: bool,
    unjudged: u64,
    steps: u64,
    /// Steps that the searches of one judgement may take.
    budget: u64,
    /// Files that each mount has open, for worlds of several nodes.
    opens: BTreeMap<(u32, Ino), u32>,
    /// Something of those who live was not durable when a death was judged: it
    /// is not known any more what their own deaths may take along.
    shaky: bool,
    /// The storage has lost power since deaths were judged.
    power_lost: bool,
    /// See [`Oracle::doubt_data`].
    doubtful: bool,
}

/// How many steps the searches of one judgement may take.
const BUDGET: u64 = 100_000;

/// Beginnings and ends are counted from here, so that all are after what an
/// observed state says of itself.
const FIRST: u64 = 1 << 32;

impl Oracle {
    /// Starts from a state that is durable.
    pub fn new(state: Model) -> Self {
        Self {
            chain: Chain::new(state),
            current: Vec::new(),
            unsettled: Unsettled::default(),
            count: FIRST,
            lost: false,
            unjudged: 0,
            steps: 0,
            budget: BUDGET,
            opens: BTreeMap::new(),
            shaky: false,
            power_lost: false,
            doubtful: false,
        }
    }

    /// Whether the data device shows something, from now on, that no flush will make
    /// durable: one that covered it has failed. What a mount shows otherwise stays, as
    /// the data of the dead is flushed before anybody sees it.
    pub fn doubt_data(&mut self, doubtful: bool) {
        self.doubtful = doubtful;
    }

    /// A state in which the calls so far may have left everything.
    pub fn state(&self) -> &Model {
        self.chain.last()
    }

    /// Windows whose search was given up, and those after them.
    pub fn unjudged(&self) -> u64 {
        self.unjudged
    }

    /// Steps of all searches so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn tick(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    /// A call begins; the number is for [`Oracle::end`].
    pub fn begin(&mut self, call: Call, cx: Context) -> usize {
        let began = self.tick();
        let at = (cx.start, cx.end);
        self.current.push(Record {
            call,
            reply: None,
            cx: Context {
                start: began,
                end: u64::MAX,
                ..cx
            },
            at,
            began,
            durable: false,
        });
        self.current.len() - 1
    }

    /// A call was answered.
    pub fn end(&mut self, number: usize, reply: Reply, cx: Context) {
        let ended = self.tick();
        let record = &mut self.current[number];
        record.reply = Some(reply);
        record.at = (cx.start, cx.end);
        record.cx = Context {
            start: record.began,
            end: ended,
            ..cx
        };
        let promised = !matches!(record.reply, Some(Reply::Err(_)))
            && match record.call {
                Call::Fsync { .. } | Call::Syncfs => true,
                Call::Write { sync, .. } => {
                    record.durable = sync;
                    sync
                }
                _ => false,
            };
        let (began, seat) = (record.began, record.cx.seat);
        self.count_opens(number);
        if promised {
            self.promise_before(began, seat);
        }
    }

    /// Everything of this mount that ended before is durable from now on.
    fn promise_before(&mut self, count: u64, seat: u32) {
        for record in self.chain.records_mut().chain(&mut self.current) {
            if record.cx.seat == seat && record.end() < count {
                record.durable = true;
            }
        }
    }

    /// A clean unmount ended: all is durable.
    pub fn promise_all(&mut self) {
        self.promise_before(u64::MAX, 0);
    }

    /// All calls have ended: judges those since the last time.
    ///
    /// # Errors
    /// If no order of the calls explains the answers.
    pub fn quiet(&mut self) -> Result<(), Violation> {
        assert!(
            self.current.iter().all(|record| record.reply.is_some()),
            "quiet means that every call has ended"
        );
        self.close_window();
        if self.lost {
            self.unjudged += 1;
            return Ok(());
        }
        let mut left = self.budget;
        let last = self.chain.len();
        let outcome = self.chain.nth(last, 0, &mut left);
        self.steps += self.budget - left;
        match outcome {
            Nth::State => Ok(()),
            Nth::GaveUp => {
                self.unjudged += 1;
                self.lost = true;
                Ok(())
            }
            Nth::NoMore => Err(Violation {
                kind: "answers",
                text: self.chain.explain(),
            }),
        }
    }

    fn close_window(&mut self) {
        let mut records = std::mem::take(&mut self.current);
        mark_weak(&mut records, &BTreeMap::new());
        self.chain.push(records);
    }

    /// The mount died and another one shows `observed`: judges it and goes on from there.
    ///
    /// # Errors
    /// If no allowed state is what was observed.
    pub fn recovered(&mut self, observed: &Model) -> Result<(), Violation> {
        self.close_window();
        let mut left = self.budget;
        let verdict = if self.lost {
            Some(Ok(Unsettled::default()))
        } else {
            cut::judge(&mut self.chain, observed, &self.unsettled, &mut left)
        };
        self.steps += self.budget - left;
        if verdict.is_none() {
            self.unjudged += 1;
        }
        let shown = verdict.unwrap_or(Ok(Unsettled::default()))?;
        self.unsettled = if self.doubtful {
            shown
        } else {
            Unsettled::default()
        };
        self.lost = false;
        self.chain = Chain::new(observed.clone());
        Ok(())
    }
}

/// Marks readers that ran while the same object changed in several steps. Who is `dead`
/// since some moment changes nothing after it.
fn mark_weak(records: &mut [Record], dead: &BTreeMap<u32, u64>) {
    let over = |record: &Record| {
        let death = dead.get(&record.cx.seat).copied();
        record.end().min(death.unwrap_or(u64::MAX))
    };
    for reader in 0..records.len() {
        let subject = match &records[reader].call {
            call if !call.is_read_only() && call.opens().is_none() => {
                // Answers with attributes come from after the change.
                match (&call, &records[reader].reply) {
                    (_, Some(Reply::Entry(attr) | Reply::Attr(attr))) => Some(attr.ino),
                    _ => None,
                }
            }
            Call::Lookup { .. } => match &records[reader].reply {
                Some(Reply::Entry(attr)) => Some(attr.ino),
                _ => None,
            },
            call => call.subjects()[0],
        };
        let Some(subject) = subject else { continue };
        let listing = matches!(records[reader].call, Call::Readdir { .. });
        let climbing = matches!(records[reader].call, Call::HandleParent { .. });
        let (start, end) = (records[reader].began, records[reader].end());
        let overlapped = records.iter().enumerate().any(|(index, other)| {
            index != reader
                && other.began <= end
                && over(other) >= start
                && (other.call.changes_data_of() == Some(subject)
                    || (climbing && other.call.changes_entries_of() != [None, None])
                    || (listing && other.call.changes_entries_of().contains(&Some(subject))))
        });
        records[reader].cx.weak = overlapped;
    }
}

#[cfg(test)]
mod posix_tests;
#[cfg(test)]
mod tests;

//! The judge: were the answers those of a filesystem, and is what a crash left
//! one of the states it was allowed to leave?
//!
//! Calls are recorded with the times at which they began and ended. In each
//! moment of quiet the calls since the last one are put in an order that
//! respects those times and in which the model gives every answer that was
//! seen (linearizability, by search). After a crash the state that was
//! recovered must be that of some prefix of such an order, with everything in
//! it that an fsync had promised (spec 04 I16, spec 12 section 23, spec 14
//! sections 20 and 24).
//!
//! The search is bounded: beyond the bound a window counts as not judged and
//! the model continues from what the last audit saw.

use crate::model::recover::Later;
use crate::model::{Call, Context, Model, Reply, S_IFREG};
use outrider_core::errno::Errno;
use outrider_core::fs::api::Ino;
use std::collections::BTreeSet;

/// A call and what became of it.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was asked.
    pub call: Call,
    /// What was answered, unless the mount died first.
    pub reply: Option<Reply>,
    /// When, and under which conditions.
    pub cx: Context,
    /// An fsync or an unmount has promised it.
    durable: bool,
}

impl Record {
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
            && !matches!(self.call, Call::Open { .. } | Call::Release { .. })
            && (self.is_uncertain() || !matches!(self.reply, Some(Reply::Err(_))))
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

struct Window {
    before: Model,
    records: Vec<Record>,
}

/// Judge of one mount's history.
pub struct Oracle {
    state: Model,
    windows: Vec<Window>,
    current: Vec<Record>,
    unjudged: u64,
}

/// How many steps a search may take.
const BUDGET: u64 = 60_000;

impl Oracle {
    /// Starts from a state that is durable.
    pub fn new(state: Model) -> Self {
        Self {
            state,
            windows: Vec::new(),
            current: Vec::new(),
            unjudged: 0,
        }
    }

    /// The state after the last window.
    pub fn state(&self) -> &Model {
        &self.state
    }

    /// Windows whose search was given up.
    pub fn unjudged(&self) -> u64 {
        self.unjudged
    }

    /// A call begins; the number is for [`Oracle::end`].
    pub fn begin(&mut self, call: Call, cx: Context) -> usize {
        self.current.push(Record {
            call,
            reply: None,
            cx,
            durable: false,
        });
        self.current.len() - 1
    }

    /// A call was answered.
    pub fn end(&mut self, number: usize, reply: Reply, cx: Context) {
        let record = &mut self.current[number];
        record.reply = Some(reply);
        record.cx = cx;
        let promised = !matches!(record.reply, Some(Reply::Err(_)))
            && match record.call {
                Call::Fsync { .. } | Call::Syncfs => true,
                Call::Write { sync, .. } => {
                    record.durable = sync;
                    sync
                }
                _ => false,
            };
        if promised {
            let start = record.cx.start;
            self.promise_before(start);
        }
    }

    /// Everything that ended before `time` is durable from now on.
    fn promise_before(&mut self, time: u64) {
        let windows = self.windows.iter_mut().flat_map(|w| &mut w.records);
        for record in windows.chain(&mut self.current) {
            if record.end() < time {
                record.durable = true;
            }
        }
    }

    /// A clean unmount ended: all is durable.
    pub fn promise_all(&mut self) {
        self.promise_before(u64::MAX);
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
        let mut records = std::mem::take(&mut self.current);
        mark_weak(&mut records);
        let after = match linearize(&self.state, &records) {
            Outcome::Found(state) => state,
            Outcome::Impossible(text) => {
                return Err(Violation {
                    kind: "answers",
                    text,
                });
            }
            Outcome::GaveUp(state) => {
                self.unjudged += 1;
                state
            }
        };
        self.windows.push(Window {
            before: std::mem::replace(&mut self.state, after),
            records,
        });
        self.forget_settled();
        Ok(())
    }

    /// A state in the past can not come back once everything after it is durable.
    fn forget_settled(&mut self) {
        let open = |window: &Window| window.records.iter().any(|r| r.has_effect() && !r.durable);
        let last = self.windows.len().saturating_sub(1);
        let settled = self.windows[..last].iter().position(open).unwrap_or(last);
        self.windows.drain(..settled);
    }

    /// The mount died and another one shows `observed`: judges it and goes on from there.
    ///
    /// # Errors
    /// If no allowed state is what was observed.
    pub fn recovered(&mut self, observed: &Model) -> Result<(), Violation> {
        let mut records = std::mem::take(&mut self.current);
        mark_weak(&mut records);
        self.windows.push(Window {
            before: self.state.clone(),
            records,
        });
        let mut nearest = None;
        for index in (0..self.windows.len()).rev() {
            let later: Vec<&Call> = self.windows[index + 1..]
                .iter()
                .flat_map(|window| &window.records)
                .map(|record| &record.call)
                .collect();
            let mut cut = Cut {
                window: &self.windows[index],
                later,
                observed,
                visited: BTreeSet::new(),
                steps: 0,
                nearest: None,
            };
            if let Some(state) = cut.find() {
                self.state = state;
                self.windows.clear();
                return Ok(());
            }
            if cut.steps >= BUDGET {
                self.unjudged += 1;
                self.state = observed.clone();
                self.windows.clear();
                return Ok(());
            }
            nearest = nearest.or(cut.nearest);
            let promised = |record: &Record| record.durable && record.has_effect();
            if self.windows[index].records.iter().any(promised) {
                break;
            }
        }
        let (missing, text) = nearest.unwrap_or_default();
        Err(Violation {
            kind: "durability",
            text: format!(
                "what was recovered is no state that the calls passed through; \
                 nearest (without {missing} of the last calls): {text}"
            ),
        })
    }
}

/// Marks readers that ran while the same object changed in several steps.
fn mark_weak(records: &mut [Record]) {
    for reader in 0..records.len() {
        let subject = match &records[reader].call {
            call if !call.is_read_only() && !matches!(call, Call::Open { .. }) => {
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
        let (start, end) = (records[reader].cx.start, records[reader].end());
        let overlapped = records.iter().enumerate().any(|(index, other)| {
            index != reader
                && other.cx.start <= end
                && other.end() >= start
                && (other.call.changes_data_of() == Some(subject)
                    || (listing && other.call.changes_entries_of().contains(&Some(subject))))
        });
        records[reader].cx.weak = overlapped;
    }
}

enum Outcome {
    Found(Model),
    Impossible(String),
    GaveUp(Model),
}

struct Frame {
    state: Model,
    picked: Option<usize>,
    candidates: Vec<usize>,
    next: usize,
    variants: Vec<Model>,
}

/// The calls that may come next: those that began before any other ended.
fn candidates(records: &[Record], done: &[bool], from: usize) -> Vec<usize> {
    let first_end = (from..records.len())
        .filter(|index| !done[*index])
        .map(|index| records[index].end())
        .min();
    let Some(first_end) = first_end else {
        return Vec::new();
    };
    let mut found: Vec<usize> = (from..records.len())
        .filter(|index| !done[*index] && records[*index].cx.start <= first_end)
        .collect();
    found.sort_by_key(|index| (records[*index].end(), *index));
    found
}

/// Finds an order of the calls in which the model gives every answer.
fn linearize(start: &Model, records: &[Record]) -> Outcome {
    let mut done = vec![false; records.len()];
    let mut count = 0;
    let mut steps = 0;
    let mut deepest = (0, start.clone(), String::new());
    let mut stack = vec![Frame {
        state: start.clone(),
        picked: None,
        candidates: candidates(records, &done, 0),
        next: 0,
        variants: Vec::new(),
    }];
    loop {
        let placed = stack.last().is_some_and(|frame| frame.picked.is_none());
        if count == records.len() && placed {
            let last = stack.pop().expect("the search is not empty");
            return Outcome::Found(last.state);
        }
        let Some(frame) = stack.last_mut() else {
            return Outcome::Impossible(deepest.2);
        };
        let variant = frame.variants.pop();
        let Some(state) = variant else {
            if let Some(picked) = frame.picked.take() {
                done[picked] = false;
                count -= 1;
            }
            let Some(&index) = frame.candidates.get(frame.next) else {
                if count >= deepest.0 && deepest.2.is_empty() || count > deepest.0 {
                    let text = explain(&frame.state, records, &frame.candidates);
                    deepest = (count, frame.state.clone(), text);
                }
                stack.pop();
                // The frame below has its pick undone when it looks for another variant.
                continue;
            };
            frame.next += 1;
            steps += 1;
            if steps > BUDGET {
                return Outcome::GaveUp(deepest.1);
            }
            let record = &records[index];
            let reply = record.reply.as_ref().expect("all calls have ended");
            frame.variants = frame.state.apply(&record.call, reply, &record.cx);
            if !frame.variants.is_empty() {
                frame.picked = Some(index);
                done[index] = true;
                count += 1;
                if record.call.is_read_only() {
                    // It changes nothing: if it fits here, no other place is better.
                    frame.next = frame.candidates.len();
                }
            }
            continue;
        };
        let from = done.iter().position(|done| !done).unwrap_or(0);
        stack.push(Frame {
            state,
            picked: None,
            candidates: candidates(records, &done, from),
            next: 0,
            variants: Vec::new(),
        });
    }
}

fn explain(state: &Model, records: &[Record], candidates: &[usize]) -> String {
    let mut lines = vec!["no order of the calls explains the answers; stuck at:".to_owned()];
    for record in candidates.iter().map(|index| &records[*index]).take(6) {
        let reply = record.reply.as_ref();
        let answer = reply.map_or_else(|| "(no answer)".to_owned(), |r| format!("{r:?}"));
        let mut answer = answer;
        answer.truncate(600);
        let mut call = format!("{:?}", record.call);
        call.truncate(300);
        lines.push(format!(
            "  [{}..{}] {call} -> {answer}",
            record.cx.start, record.cx.end
        ));
        let mut about: Vec<Ino> = record.call.subjects().into_iter().flatten().collect();
        if let Some(Reply::Entry(attr)) = reply {
            about.push(attr.ino);
        }
        for ino in about {
            lines.push(format!("    model: {}", describe(state, ino)));
        }
    }
    lines.join("\n")
}

fn describe(state: &Model, ino: Ino) -> String {
    let Some(inode) = state.get(ino) else {
        return format!("inode {ino} never existed or is gone");
    };
    let names: Vec<String> = inode
        .entries
        .iter()
        .map(|(name, entry)| {
            let mut name = String::from_utf8_lossy(name).into_owned();
            name.truncate(12);
            format!("{name}:{}", entry.ino)
        })
        .collect();
    format!(
        "inode {ino} mode {:o} nlink {} uid {} gid {} size {} opens {} mtime {}..{} ctime {}..{} \
         blocks {:?} xattrs {:?} entries [{}]",
        inode.mode,
        inode.nlink,
        inode.uid,
        inode.gid,
        inode.size,
        inode.opens,
        inode.mtime.low,
        inode.mtime.high,
        inode.ctime.low,
        inode.ctime.high,
        inode.blocks.keys().take(20).collect::<Vec<_>>(),
        inode.xattrs.keys().collect::<Vec<_>>(),
        names.join(" ")
    )
}

/// The search for the state that a crash left, in one window.
struct Cut<'a> {
    window: &'a Window,
    later: Vec<&'a Call>,
    observed: &'a Model,
    visited: BTreeSet<(Vec<bool>, Vec<usize>)>,
    steps: u64,
    nearest: Option<(usize, String)>,
}

impl Cut<'_> {
    fn find(&mut self) -> Option<Model> {
        let window = self.window;
        let records: Vec<&Record> = window.records.iter().filter(|r| r.has_effect()).collect();
        let done = vec![false; records.len()];
        self.step(&records, window.before.clone(), done)
    }

    fn step(&mut self, records: &[&Record], state: Model, done: Vec<bool>) -> Option<Model> {
        self.steps += 1;
        if self.steps >= BUDGET {
            return None;
        }
        // A call that was answered with an error was promised to nobody, whatever
        // was made durable after it.
        let kept =
            |index: usize| done[index] || !records[index].durable || records[index].is_uncertain();
        if (0..records.len()).all(kept)
            && let Some(state) = self.compare(records, &state, &done)
        {
            return Some(state);
        }
        let first_end = (0..records.len())
            .filter(|index| !done[*index] && !records[*index].is_uncertain())
            .map(|index| records[index].end())
            .min()
            .unwrap_or(u64::MAX);
        for index in 0..records.len() {
            let record = records[index];
            if done[index] || record.cx.start > first_end {
                continue;
            }
            let mut next_done = done.clone();
            next_done[index] = true;
            for (number, next) in self.effects(&state, record).into_iter().enumerate() {
                // Orders of the same calls mostly lead to the same state.
                if self.visited.insert((next_done.clone(), vec![number]))
                    || self.conflicts(records, &done, index)
                {
                    let found = self.step(records, next, next_done.clone());
                    if found.is_some() {
                        return found;
                    }
                }
            }
        }
        None
    }

    /// Whether the call touches what another one running with it touches.
    fn conflicts(&self, records: &[&Record], done: &[bool], index: usize) -> bool {
        let own = records[index];
        let subjects = own.call.subjects();
        records.iter().enumerate().any(|(other, record)| {
            other != index
                && done[other]
                && record.cx.start <= own.end()
                && record.end() >= own.cx.start
                && record
                    .call
                    .subjects()
                    .iter()
                    .flatten()
                    .any(|ino| subjects.contains(&Some(*ino)))
        })
    }

    fn effects(&self, state: &Model, record: &Record) -> Vec<Model> {
        if !record.is_uncertain() {
            let reply = record.reply.as_ref().expect("a certain call has an answer");
            return state.apply(&record.call, reply, &record.cx);
        }
        let mut cx = record.cx;
        if record.reply.is_none() {
            // It may have run at any time until now.
            cx.wall = (cx.wall.0.min(cx.wall.1), i64::MAX);
        }
        let ino = self.made(state, &record.call);
        state
            .take_effect(&record.call, ino, &cx)
            .into_iter()
            .collect()
    }

    /// The number of the inode that an unanswered call would have made.
    fn made(&self, state: &Model, call: &Call) -> Option<Ino> {
        let (Call::Mknod { dir, name, .. }
        | Call::Mkdir { dir, name, .. }
        | Call::Symlink { dir, name, .. }
        | Call::Create { dir, name, .. }) = call
        else {
            return None;
        };
        let seen = self.observed.get(*dir)?.entries.get(name)?.ino;
        state.get(seen).is_none().then_some(seen)
    }

    fn compare(&mut self, records: &[&Record], state: &Model, done: &[bool]) -> Option<Model> {
        let left_out = || {
            (0..records.len())
                .filter(|index| !done[*index])
                .map(|index| &records[index].call)
        };
        let later = Later::new(left_out().chain(self.later.iter().copied()));
        let text = match state.recovered_as(self.observed, &later) {
            Ok(state) => return Some(state),
            Err(text) => text,
        };
        // Large writes and preallocations are made in several transactions.
        for index in (0..records.len()).filter(|index| !done[*index]) {
            for part in parts(&records[index].call, state, self.observed) {
                let mut cx = records[index].cx;
                cx.wall.1 = if records[index].reply.is_none() {
                    i64::MAX
                } else {
                    cx.wall.1
                };
                let after = state.take_effect(&part, None, &cx);
                let found = after.and_then(|s| s.recovered_as(self.observed, &later).ok());
                if found.is_some() {
                    return found;
                }
            }
        }
        let missing = left_out().count() + self.later.len();
        if self
            .nearest
            .as_ref()
            .is_none_or(|(least, _)| missing < *least)
        {
            self.nearest = Some((missing, text));
        }
        None
    }
}

/// What of a call an earlier one of its transactions may have done.
fn parts(call: &Call, state: &Model, observed: &Model) -> Vec<Call> {
    let Some(ino) = call.changes_data_of() else {
        return Vec::new();
    };
    let (Some(file), Some(seen)) = (state.get(ino), observed.get(ino)) else {
        return Vec::new();
    };
    match call {
        Call::Write {
            offset,
            len,
            tag,
            append,
            sync,
            ..
        } if *len > 4096 && file.mode & S_IFREG != 0 => {
            let offset = if *append { file.size } else { *offset };
            let end = offset + u64::from(*len);
            let mut stops: Vec<u64> = (offset / 4096 + 1..=end / 4096).map(|b| b * 4096).collect();
            if file.size < seen.size {
                stops = vec![seen.size];
            }
            stops
                .into_iter()
                .filter(|stop| (offset + 1..end).contains(stop))
                .map(|stop| Call::Write {
                    ino,
                    offset,
                    len: (stop - offset) as u32,
                    tag: *tag,
                    append: false,
                    sync: *sync,
                })
                .collect()
        }
        Call::Fallocate {
            keep: false,
            offset,
            len,
            ..
        } if (file.size + 1..offset + len).contains(&seen.size) && seen.size > *offset => {
            vec![Call::Fallocate {
                ino,
                keep: false,
                offset: *offset,
                len: seen.size - offset,
            }]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests;

//! The judge of mounts that die while others go on.
//!
//! A mount's open transaction is lost whole when it dies, and nobody else has
//! seen anything of it, since a lock is handed over only after a commit (spec 10
//! section 8). So for each dead mount there is a moment such that its calls
//! before it are kept and those after it never happened, and there must be an
//! order of all that is left in which the model gives every answer that the
//! others saw, and which ends in what an observer saw afterwards. What a dead
//! mount was told before it died must still have been right at that time.
//!
//! The moment is searched for each mount by itself first: what one has lost no
//! other one has touched.

use super::chain::{Chain, Nth};
use super::cut::{is_making, is_nameless};
use super::explain::explain;
use super::parts::{Sights, part};
use super::search::mark_of;
use super::{Oracle, Record, Violation, mark_weak};
use crate::model::recover::{Later, Unsettled};
use crate::model::{Call, Context, Model, Reply};
use outrider_core::env::HashSet;
use outrider_core::fs::api::Ino;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// A mount that does nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Death {
    /// Which mount (see `Context::seat`).
    pub seat: u32,
    /// When it ended, or when its cluster knew it to be dead ([`Oracle::moment`]).
    pub at: u64,
}

/// What the search may do with a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It happened, with this answer.
    Certain,
    /// It may have happened, with this answer if there is one.
    Possible,
}

struct Item<'a> {
    record: &'a Record,
    role: Role,
}

impl Item<'_> {
    fn end(&self) -> u64 {
        match self.role {
            Role::Certain => self.record.end(),
            Role::Possible => u64::MAX,
        }
    }
}

/// Steps for one choice of what is lost, while choosing.
const QUICK: u64 = 1_500;
/// Choices tried before it is given up.
const CHOICES: usize = 400;
/// Of explanations that are equally near so many bytes are shown.
const TEXT: usize = 8_000;
/// How many of the states that came before are tried. Calls that overlap, and changes
/// that failed, leave many: where there are more, nothing was refuted.
const STATES: usize = 40;

/// What became of a search.
enum Ended {
    Found(Box<Model>),
    /// How many inodes differ at best, and how.
    Nothing(usize, String),
    GaveUp(usize, String),
}

/// A search for an order of calls whose end is acceptable.
struct Search<'a, 'b> {
    items: &'a [Item<'b>],
    /// The state after the deaths, as somebody saw it; `None`: any end will do.
    observed: Option<&'a Model>,
    lost: Vec<&'a Call>,
    /// What the storage's loss of power may have taken back.
    unsettled: Option<&'a Unsettled>,
    /// Files whose truncation may have been cut short.
    cut_short: Vec<Ino>,
    /// Inodes that nobody's answer has named.
    strangers: Vec<Ino>,
    /// What was seen of files.
    sights: Option<&'a Sights>,
    done: Vec<bool>,
    marks: u64,
    visited: HashSet<(u64, u64)>,
    left: u64,
    best: (usize, String),
    furthest: usize,
}

impl<'a, 'b> Search<'a, 'b> {
    fn new(items: &'a [Item<'b>], observed: Option<&'a Model>, start: &Model) -> Self {
        let named: BTreeSet<Ino> = items
            .iter()
            .filter_map(|item| match &item.record.reply {
                Some(Reply::Entry(attr)) if is_making(&item.record.call) => Some(attr.ino),
                _ => None,
            })
            .collect();
        let mut strangers: BTreeSet<Ino> = BTreeSet::new();
        strangers.extend(observed.iter().flat_map(|model| model.inodes.keys()));
        for item in items {
            match &item.record.reply {
                Some(Reply::Entry(attr) | Reply::Attr(attr)) => {
                    strangers.insert(attr.ino);
                }
                Some(Reply::Found(ino)) => {
                    strangers.insert(*ino);
                }
                Some(Reply::Names(names)) => strangers.extend(names.iter().map(|name| name.0)),
                _ => {}
            }
        }
        strangers.retain(|ino| start.get(*ino).is_none() && !named.contains(ino));
        Self {
            done: vec![false; items.len()],
            items,
            observed,
            lost: Vec::new(),
            unsettled: None,
            cut_short: Vec::new(),
            strangers: strangers.into_iter().collect(),
            sights: None,
            marks: 0,
            visited: HashSet::default(),
            left: 0,
            best: (usize::MAX, String::new()),
            furthest: 0,
        }
    }

    fn run(mut self, start: &Model, budget: u64, spent: &Cell<u64>) -> Ended {
        self.left = budget;
        let found = self.step(start);
        spent.set(spent.get() + budget - self.left);
        match found {
            Some(model) => Ended::Found(Box::new(model)),
            None if self.left == 0 => Ended::GaveUp(self.best.0, self.best.1),
            None => Ended::Nothing(self.best.0, self.best.1),
        }
    }

    fn open(&self) -> impl Iterator<Item = usize> {
        (0..self.items.len()).filter(|index| !self.done[*index])
    }

    fn step(&mut self, state: &Model) -> Option<Model> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let certain = |index: usize| self.items[index].role == Role::Certain;
        if !self.open().any(certain)
            && let Some(end) = self.compare(state)
        {
            return Some(end);
        }
        let first_end = self.open().map(|index| self.items[index].end()).min()?;
        let mut next: Vec<usize> = self
            .open()
            .filter(|index| self.items[*index].record.began <= first_end)
            .collect();
        next.sort_by_key(|index| (self.items[*index].end(), *index));
        let placed = self.done.iter().filter(|done| **done).count();
        if self.best.0 == usize::MAX && placed >= self.furthest {
            self.furthest = placed;
            self.best.1.clear();
        }
        let mut stuck = true;
        for index in next.iter().copied() {
            let item = &self.items[index];
            let only = item.role == Role::Certain && item.record.call.is_read_only();
            let states = self.effects(state, item);
            stuck &= states.is_empty();
            self.mark(index, true);
            for after in &states {
                if self.visited.insert((self.marks, after.digest()))
                    && let Some(found) = self.step(after)
                {
                    return Some(found);
                }
            }
            self.mark(index, false);
            if only && !states.is_empty() {
                return None; // If it fits here no other place is better.
            }
        }
        if stuck && self.best.0 == usize::MAX && self.best.1.is_empty() && placed == self.furthest {
            let records: Vec<Record> = next
                .iter()
                .filter(|index| certain(**index))
                .map(|index| self.items[*index].record.clone())
                .collect();
            let all: Vec<usize> = (0..records.len()).collect();
            self.best.1 = explain(state, &records, &all);
        }
        None
    }

    fn mark(&mut self, index: usize, done: bool) {
        self.done[index] = done;
        self.marks ^= mark_of(index);
    }

    fn effects(&self, state: &Model, item: &Item) -> Vec<Model> {
        let record = item.record;
        let mut states = Vec::new();
        if let Some(reply) = &record.reply {
            states = state.apply(&record.call, reply, &record.cx);
            if states.is_empty() && self.shows_lost(state, &record.call, reply) {
                states.push(state.clone());
            }
            if item.role == Role::Certain {
                return states;
            }
            if !record.is_uncertain() {
                states.extend(self.parts(state, record, &record.cx));
                return states;
            }
        }
        // Nobody knows: it may have run at any time since.
        let mut cx = record.cx;
        if record.reply.is_none() {
            cx.wall.1 = i64::MAX;
        }
        if is_making(&record.call) {
            let unknown = self.strangers.iter().copied().chain([1 << 60]);
            let unknown = unknown.filter(|ino| state.get(*ino).is_none());
            states
                .extend(unknown.filter_map(|ino| state.take_effect(&record.call, Some(ino), &cx)));
        }
        states.extend(state.take_effect(&record.call, None, &cx));
        states.extend(self.parts(state, record, &cx));
        states
    }

    /// What is there if only some transactions of a call were committed.
    fn parts(&self, state: &Model, record: &Record, cx: &Context) -> Vec<Model> {
        let sights = self.sights.into_iter();
        sights
            .flat_map(|sights| sights.parts(&record.call, state, cx))
            .collect()
    }

    /// Whether a read shows what calls have written that are lost, or not there yet:
    /// data is written in place before the transaction is committed, so it stays where there was a block
    /// (spec 14 section 20).
    fn shows_lost(&self, state: &Model, call: &Call, reply: &Reply) -> bool {
        let (Some((ino, offset, len)), Reply::Bytes(got)) = (call.reads(), reply) else {
            return false;
        };
        let open = self.open().map(|index| &self.items[index]);
        let possible = open.filter(|item| item.role == Role::Possible);
        let calls = possible.map(|item| &item.record.call);
        let mut later = Later::new(calls.chain(self.lost.iter().copied()));
        if let Some(unsettled) = self.unsettled {
            later = later.with_unsettled(unsettled, self.written());
        }
        state
            .get(ino)
            .is_some_and(|file| later.explains_read(ino, file, offset, len, got))
    }

    fn later(&self) -> Later<'a> {
        let left_out = self.open().map(|index| &self.items[index].record.call);
        let calls: Vec<&'a Call> = left_out.chain(self.lost.iter().copied()).collect();
        let later = Later::new(calls).with_cut_short(self.cut_short.iter().copied());
        match self.unsettled {
            Some(unsettled) => later.with_unsettled(unsettled, self.written()),
            None => later,
        }
    }

    /// The calls that are in the state.
    fn written(&self) -> Vec<&'a Call> {
        let done = (0..self.items.len()).filter(|index| self.done[*index]);
        done.map(|index| &self.items[index].record.call).collect()
    }

    fn compare(&mut self, state: &Model) -> Option<Model> {
        let Some(observed) = self.observed else {
            return Some(state.clone());
        };
        let Err(text) = state.recovered_as(observed, || self.later()) else {
            return Some(state.clone());
        };
        // Large writes and truncates are made in several transactions.
        let partial: Vec<usize> = self
            .open()
            .filter(|index| self.items[*index].record.call.changes_data_of().is_some())
            .collect();
        for index in partial {
            let record = self.items[index].record;
            let mut cx = record.cx;
            if record.reply.is_none() {
                cx.wall.1 = i64::MAX;
            }
            let after = part(&record.call, state, observed)
                .and_then(|part| state.take_effect(&part, None, &cx));
            if let Some(after) = after
                && after.recovered_as(observed, || self.later()).is_ok()
            {
                return Some(after);
            }
        }
        let differ = state.distance(observed);
        if differ < self.best.0 {
            self.best = (differ, text);
        }
        None
    }
}

/// A choice of what is lost: for each dead mount when its transaction began.
type Choice = BTreeMap<u32, u64>;

impl Oracle {
    /// A number for this moment, between the beginnings and ends of calls.
    pub fn moment(&mut self) -> u64 {
        self.tick()
    }

    /// Keeps the books about who has which file open.
    pub(super) fn count_opens(&mut self, number: usize) {
        let record = &self.current[number];
        let seat = record.cx.seat;
        let opened = match (&record.call, &record.reply) {
            (call, Some(Reply::Done)) if call.opens().is_some() => call.opens(),
            (Call::Create { .. } | Call::Tmpfile { .. }, Some(Reply::Entry(attr))) => {
                Some(attr.ino)
            }
            (Call::Release { ino }, _) => {
                if let Some(count) = self.opens.get_mut(&(seat, *ino)) {
                    *count = count.saturating_sub(1);
                }
                None
            }
            _ => None,
        };
        if let Some(ino) = opened {
            *self.opens.entry((seat, ino)).or_default() += 1;
        }
    }

    /// The storage has lost power: what was seen and never flushed may be gone when
    /// the deaths of this moment are judged.
    pub fn storage_lost_power(&mut self) {
        self.power_lost = true;
    }

    /// A mount has left cleanly: all of it is durable.
    pub fn left(&mut self, seat: u32) {
        self.promise_before(u64::MAX, seat);
        self.opens.retain(|(of, _), _| *of != seat);
    }

    /// Mounts died while others went on; all calls of the others have ended and
    /// are synced, and `observed` is what one of them (or a new one) shows now.
    /// Goes on from there.
    ///
    /// # Errors
    /// If the answers, or what is there now, have no explanation.
    pub fn lost(&mut self, deaths: &[Death], observed: &Model) -> Result<(), Violation> {
        let dead: BTreeMap<u32, u64> = deaths.iter().map(|d| (d.seat, d.at)).collect();
        let mut current = std::mem::take(&mut self.current);
        let lives = |record: &Record| !dead.contains_key(&record.cx.seat);
        assert!(
            current.iter().all(|r| r.reply.is_some() || !lives(r)),
            "every call of those who live has ended"
        );
        mark_weak(&mut current, &dead);
        let fragile = |record: &Record| record.has_effect() && !record.durable;
        let shaky = current.iter().any(|r| lives(r) && fragile(r))
            || self.chain.records_mut().any(|r| lives(r) && fragile(r));
        let written: Vec<Call> = current
            .iter()
            .chain(self.chain.records_mut().map(|record| &*record))
            .filter(|r| !lives(r) && r.call.writes_in().is_some())
            .map(|r| r.call.clone())
            .collect();
        let promised: Vec<Call> = current
            .iter()
            .chain(self.chain.records_mut().map(|record| &*record))
            .filter(|r| r.is_promised() && r.call.writes_in().is_some())
            .map(|r| r.call.clone())
            .collect();
        let promised: Vec<&Call> = promised.iter().collect();
        let earlier = std::mem::take(&mut self.unsettled).left(&promised);
        let gone = std::mem::take(&mut self.power_lost).then_some(&earlier);
        let mut left = self.budget;
        let verdict = if self.lost {
            None
        } else {
            judge(
                &mut self.chain,
                &dead,
                (&current, gone),
                observed,
                &mut left,
            )
        };
        self.steps += self.budget - left;
        let state = match verdict {
            Some(Ok(state)) => {
                // What a dead mount has written in place is seen.
                if self.doubtful {
                    let calls: Vec<&Call> = written.iter().collect();
                    self.unsettled = Unsettled::new(&state, observed, &calls);
                    if gone.is_none() {
                        self.unsettled.add(earlier);
                    }
                }
                *state
            }
            Some(Err(violation)) if !self.shaky => return Err(violation),
            Some(Err(_)) | None => {
                self.unjudged += 1;
                observed.clone()
            }
        };
        self.lost = false;
        self.shaky = shaky;
        self.opens.retain(|(seat, _), _| !dead.contains_key(seat));
        self.chain = Chain::new(self.after_deaths(observed, &state));
        Ok(())
    }

    /// What was observed, with the open files of those who live, which may have no name.
    fn after_deaths(&self, observed: &Model, state: &Model) -> Model {
        let mut opens: BTreeMap<Ino, u32> = BTreeMap::new();
        for ((_, ino), count) in &self.opens {
            *opens.entry(*ino).or_default() += count;
        }
        let mut next = observed.clone();
        for (ino, count) in opens.into_iter().filter(|(_, count)| *count > 0) {
            if next.get(ino).is_none() {
                let Some(inode) = state.inodes.get(&ino).filter(|inode| inode.nlink == 0) else {
                    continue;
                };
                next.inodes.insert(ino, Rc::clone(inode));
            }
            next.get_mut(ino).opens = count;
        }
        next
    }
}

/// The state that explains everything, or what is wrong; `None`: given up.
fn judge(
    chain: &mut Chain,
    dead: &BTreeMap<u32, u64>,
    (current, unsettled): (&[Record], Option<&Unsettled>),
    observed: &Model,
    left: &mut u64,
) -> Option<Result<Box<Model>, Violation>> {
    // Nothing is lost of windows in which everything of the dead is durable.
    let at_risk = |record: &Record| {
        dead.contains_key(&record.cx.seat) && record.has_effect() && !record.durable
    };
    let last = chain.len();
    let first = (0..last)
        .find(|window| chain.records(*window).iter().any(at_risk))
        .unwrap_or(last);
    let earlier: Vec<Record> = (first..last)
        .flat_map(|window| chain.records(window))
        .filter(|record| record.has_effect())
        .cloned()
        .collect();
    let mut answers = None;
    let mut text = String::new();
    for number in 0..STATES {
        match chain.nth(last, number, left) {
            Nth::State => {}
            Nth::NoMore => break,
            Nth::GaveUp => return None,
        }
        match told_before(chain.state(last, number), dead, current, left) {
            Some(Ok(())) => {
                answers = Some(Ok(()));
                break;
            }
            Some(Err(violation)) => answers = answers.or(Some(Err(violation))),
            None => return None,
        }
    }
    if let Some(Err(violation)) = answers {
        let all = matches!(chain.nth(last, STATES, left), Nth::NoMore);
        return all.then_some(Err(violation));
    }
    let lives = |record: &&Record| !dead.contains_key(&record.cx.seat);
    let now = current
        .iter()
        .filter(|record| lives(record) || record.has_effect());
    let records: Vec<Record> = earlier.into_iter().chain(now.cloned()).collect();
    for number in 0..STATES {
        match chain.nth(first, number, left) {
            Nth::State => {}
            Nth::NoMore => break,
            Nth::GaveUp => return None,
        }
        let chooser = Chooser {
            dead,
            records: &records,
            base: chain.state(first, number),
            observed,
            unsettled,
            sights: Sights::new(records.iter().filter_map(|r| r.reply.as_ref()), observed),
            budget: *left,
            spent: Cell::new(0),
        };
        let chosen = chooser.choose();
        *left = left.saturating_sub(chooser.spent.get());
        match chosen {
            Chosen::This(state) => return Some(Ok(state)),
            Chosen::None(why) if text.is_empty() => text = why,
            Chosen::None(_) => {}
            Chosen::TooMany => return None,
        }
    }
    if !matches!(chain.nth(first, STATES, left), Nth::NoMore) {
        return None;
    }
    Some(Err(Violation {
        kind: "durability",
        text: format!("what deaths left has no explanation; nearest: {text}"),
    }))
}

/// Judges what everybody was told until the first death. `None`: given up.
fn told_before(
    state: &Model,
    dead: &BTreeMap<u32, u64>,
    current: &[Record],
    left: &mut u64,
) -> Option<Result<(), Violation>> {
    let first = dead.values().min().copied().unwrap_or(u64::MAX);
    let items: Vec<Item> = current
        .iter()
        .filter(|record| record.began < first)
        .filter(|record| record.reply.is_some() || record.has_effect())
        .map(|record| {
            let certain = record.end() < first && record.reply.is_some();
            let role = if certain {
                Role::Certain
            } else {
                Role::Possible
            };
            Item { record, role }
        })
        .collect();
    let spent = Cell::new(0);
    let budget = *left / 2;
    let ended = Search::new(&items, None, state).run(state, budget, &spent);
    *left -= spent.get();
    match ended {
        Ended::Nothing(_, text) => Some(Err(Violation {
            kind: "answers",
            text: format!("before a mount died: {text}"),
        })),
        Ended::Found(_) => Some(Ok(())),
        Ended::GaveUp(..) => None,
    }
}

enum Chosen {
    This(Box<Model>),
    None(String),
    TooMany,
}

struct Chooser<'a> {
    dead: &'a BTreeMap<u32, u64>,
    records: &'a [Record],
    base: &'a Model,
    observed: &'a Model,
    unsettled: Option<&'a Unsettled>,
    sights: Sights,
    budget: u64,
    spent: Cell<u64>,
}

impl Chooser<'_> {
    fn attempt(&self, choice: &Choice, budget: u64) -> Ended {
        let mut items = Vec::new();
        let mut lost: Vec<&Call> = Vec::new();
        let mut cut_short = Vec::new();
        for record in self.records {
            let uncertain = record.is_uncertain();
            let dies = self.dead.contains_key(&record.cx.seat);
            let from = choice.get(&record.cx.seat).copied().unwrap_or(u64::MAX);
            if let Some((ino, _)) = record.call.resizes()
                && dies
                && !record.is_promised()
            {
                cut_short.push(ino);
            }
            let role = if !dies || (record.durable && !uncertain) {
                Role::Certain
            } else if record.began >= from || is_nameless(record) {
                lost.push(&record.call);
                continue;
            } else if record.end() >= from || uncertain {
                Role::Possible
            } else {
                Role::Certain
            };
            items.push(Item { record, role });
        }
        let mut search = Search::new(&items, Some(self.observed), self.base);
        search.lost = lost;
        search.unsettled = self.unsettled;
        search.cut_short = cut_short;
        search.sights = Some(&self.sights);
        search.run(self.base, budget, &self.spent)
    }

    /// When a dead mount's last transaction may have begun, the latest first: before
    /// one of its calls began; or while one was under way, after another that had
    /// begun later, which is then kept, or between two transactions of its own.
    fn times(&self, seat: u32) -> Vec<u64> {
        let of_seat = self.records.iter().filter(|r| r.cx.seat == seat);
        let fragile: Vec<&Record> = of_seat
            .filter(|record| !record.durable && record.has_effect())
            .collect();
        let outlasts = |long: &Record, short: &Record| {
            long.began < short.began && short.end() < long.end() && long.end() < u64::MAX
        };
        let in_steps =
            |record: &Record| record.call.changes_data_of().is_some() && record.end() < u64::MAX;
        let late = fragile
            .iter()
            .filter(|long| in_steps(long) || fragile.iter().any(|short| outlasts(long, short)))
            .map(|long| long.end());
        let mut times: Vec<u64> = fragile.iter().map(|r| r.began).chain(late).collect();
        times.sort_unstable();
        times.dedup();
        times.push(u64::MAX);
        times.reverse();
        times
    }

    fn choose(&self) -> Chosen {
        let seats: Vec<u32> = self.dead.keys().copied().collect();
        let options: Vec<Vec<u64>> = seats.iter().map(|seat| self.times(*seat)).collect();
        let choice = |at: &[usize]| -> Choice {
            let times = at.iter().zip(&options).map(|(at, times)| times[*at]);
            seats.iter().copied().zip(times).collect()
        };
        let mut tried: BTreeMap<Vec<usize>, usize> = BTreeMap::new();
        let gave_up = Cell::new(false);
        let mut nearest = (usize::MAX, String::new());
        let mut attempt = |at: &[usize], budget: u64| -> Result<Box<Model>, usize> {
            let budget = budget.min(self.budget.saturating_sub(self.spent.get()));
            let (differ, text) = match self.attempt(&choice(at), budget) {
                Ended::Found(model) => return Ok(model),
                Ended::Nothing(differ, text) => (differ, text),
                Ended::GaveUp(differ, text) => {
                    gave_up.set(true);
                    (differ, text)
                }
            };
            if differ < nearest.0 || nearest.1.is_empty() {
                nearest = (differ, text);
            } else if differ == nearest.0 && nearest.1.len() < TEXT && nearest.1 != text {
                nearest.1 = format!("{}\n or: {text}", nearest.1);
            }
            Err(differ)
        };
        let mut best = vec![0; seats.len()];
        for _ in 0..2 {
            for seat in 0..seats.len() {
                let mut least = (usize::MAX, best[seat]);
                for index in 0..options[seat].len() {
                    let mut at = best.clone();
                    at[seat] = index;
                    let differ = match tried.get(&at).copied() {
                        Some(differ) => differ,
                        None => match attempt(&at, QUICK) {
                            Ok(model) => return Chosen::This(model),
                            Err(differ) => differ,
                        },
                    };
                    tried.insert(at, differ);
                    if differ < least.0 {
                        least = (differ, index);
                    }
                }
                best[seat] = least.1;
            }
        }
        // Thoroughly: all, if they are not too many, the nearest ones first.
        let total: usize = options.iter().map(Vec::len).fold(1, usize::saturating_mul);
        let all = if total <= CHOICES {
            every(&options)
        } else {
            tried.keys().cloned().collect()
        };
        let mut all: Vec<(usize, Vec<usize>)> = all
            .into_iter()
            .map(|at| (tried.get(&at).copied().unwrap_or(usize::MAX), at))
            .collect();
        all.sort();
        if gave_up.get() || total > tried.len() {
            gave_up.set(false);
            for (_, at) in &all {
                if let Ok(model) = attempt(at, self.budget / 8) {
                    return Chosen::This(model);
                }
            }
        }
        if gave_up.get() || total > CHOICES {
            return Chosen::TooMany;
        }
        Chosen::None(nearest.1)
    }
}

/// All combinations of indices.
fn every(options: &[Vec<u64>]) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for times in options {
        let longer = all.iter().flat_map(|at| {
            (0..times.len()).map(move |index| {
                let mut at: Vec<usize> = at.clone();
                at.push(index);
                at
            })
        });
        all = longer.collect();
    }
    all
}

//! When did a failure become inevitable? A run is bisected in time: up to a moment it is
//! what its seed says, event for event, and from then on all randomness (the order of
//! tasks, latencies, losses, whether a fault strikes) is other. How often the same
//! failure comes all the same, as a function of that moment, is a curve that rises where
//! the failure was decided.
//!
//! Moments are counted in events, not in seconds, since worlds idle for minutes. First a
//! coarse grid is looked at; then, as long as two moments differ by more than chance
//! explains, one in the middle between them.
//!
//! What can go wrong: seeing a jump where there is chance. Two moments differ only if
//! their intervals of confidence (Wilson, 99%: there are many pairs) have nothing in
//! common. The other way round, a rise that is spread over many events is reported as
//! the stretch that it is.

use crate::trace::{Event, Link};
use std::collections::BTreeMap;

/// Stretches that are split at a time.
const SPLITS: usize = 4;
/// The least difference between two moments that is looked into.
const JUMP: f64 = 0.2;
/// Normal quantiles of intervals of confidence: those that are shown (95%), and those
/// that must be apart (99%).
const SHOWN: f64 = 1.959_964;
const APART: f64 = 2.575_829;
/// A failure is inevitable if it comes in this share of all later runs, and at no later
/// moment in less than the second one.
const INEVITABLE: (f64, f64) = (0.95, 0.85);
/// Most events named for one jump.
const NAMED: usize = 12;

/// What came of the runs that left the way of the seed at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Those that failed in the same way.
    pub same: u32,
    /// Those that failed in another way.
    pub other: u32,
    /// All of them.
    pub runs: u32,
}

/// One moment of the curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Until when (nanoseconds) the runs do what the seed says.
    pub at: u64,
    /// Number of moments at which something has happened by then.
    pub moment: usize,
    /// What came of them.
    pub counts: Counts,
}

impl Point {
    /// The share of the runs that failed in the same way.
    pub fn share(&self) -> f64 {
        f64::from(self.counts.same) / f64::from(self.counts.runs.max(1))
    }

    /// Where the probability lies, with 95% confidence.
    pub fn interval(&self) -> (f64, f64) {
        wilson(self.counts.same, self.counts.runs, SHOWN)
    }

    fn differs(&self, other: &Point) -> bool {
        let interval = |point: &Point| wilson(point.counts.same, point.counts.runs, APART);
        let (own, others) = (interval(self), interval(other));
        let apart = own.1 < others.0 || others.1 < own.0;
        apart && (self.share() - other.share()).abs() >= JUMP
    }
}

/// Wilson's interval of confidence for a probability, of which `hits` out of `runs` were
/// seen, with the normal quantile `z`.
pub fn wilson(hits: u32, runs: u32, z: f64) -> (f64, f64) {
    if runs == 0 {
        return (0.0, 1.0);
    }
    let n = f64::from(runs);
    let p = f64::from(hits) / n;
    let middle = p + z * z / (2.0 * n);
    let spread = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    let whole = 1.0 + z * z / n;
    (
        ((middle - spread) / whole).max(0.0),
        ((middle + spread) / whole).min(1.0),
    )
}

/// The shortest stretch between two moments that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jump {
    /// Before it.
    pub before: Point,
    /// After it.
    pub after: Point,
}

impl Jump {
    fn over(points: &[Point], (from, until): (usize, usize)) -> Self {
        let (before, after) = (points[from], points[until]);
        Self { before, after }
    }

    fn height(&self) -> f64 {
        (self.after.share() - self.before.share()).abs()
    }
}

/// The curve of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Curve {
    /// In the order of time.
    pub points: Vec<Point>,
    /// Whether every jump was followed as far as it goes.
    pub complete: bool,
}

/// The times at which something happened, in order, each once.
pub fn moments(events: &[Event]) -> Vec<u64> {
    let numbered = events.iter().filter(|event| event.number.is_some());
    let mut all: Vec<u64> = numbered.map(|event| event.nanos).collect();
    all.sort_unstable();
    all.dedup();
    all
}

impl Curve {
    /// Draws the curve of a run whose events came at `moments`. At most `most` moments
    /// are looked at. `look` says what comes of runs that go other ways from these times
    /// on, in order; of the first ones only if time is up.
    pub fn draw(
        moments: &[u64],
        coarse: usize,
        most: usize,
        mut look: impl FnMut(&[u64]) -> Vec<Counts>,
    ) -> Curve {
        let mut found: BTreeMap<usize, Point> = BTreeMap::new();
        let last = moments.len();
        let mut wanted: Vec<usize> = (0..=coarse).map(|n| n * last / coarse).collect();
        wanted.dedup();
        loop {
            wanted.truncate(most.saturating_sub(found.len()));
            if wanted.is_empty() {
                let points: Vec<Point> = found.into_values().collect();
                let complete = splits(&points).is_empty();
                return Curve { points, complete };
            }
            let times: Vec<u64> = wanted.iter().map(|n| time_of(moments, *n)).collect();
            let counts = look(&times);
            let late = counts.len() < times.len();
            for ((moment, at), counts) in wanted.iter().zip(times).zip(counts) {
                let point = Point {
                    at,
                    moment: *moment,
                    counts,
                };
                found.insert(*moment, point);
            }
            let points: Vec<Point> = found.values().copied().collect();
            if late {
                let complete = false;
                return Curve { points, complete };
            }
            wanted = splits(&points);
            wanted.truncate(SPLITS);
        }
    }

    /// Where it jumps, the highest first.
    pub fn jumps(&self) -> Vec<Jump> {
        let all = stretches(&self.points).into_iter();
        all.map(|stretch| Jump::over(&self.points, stretch))
            .collect()
    }

    /// The first moment from which on the failure comes (nearly) always.
    pub fn inevitable(&self) -> Option<Point> {
        let (mut same, mut runs, mut first) = (0, 0, None);
        for point in self.points.iter().rev() {
            same += point.counts.same;
            runs += point.counts.runs;
            if point.share() < INEVITABLE.1 {
                break;
            }
            if f64::from(same) >= INEVITABLE.0 * f64::from(runs) {
                first = Some(*point);
            }
        }
        first
    }
}

/// Other randomness begins just after what happened at the last of `count` moments.
fn time_of(moments: &[u64], count: usize) -> u64 {
    count.checked_sub(1).map_or(0, |last| moments[last] + 1)
}

/// The shortest stretches, as places of points, whose ends differ, the highest first;
/// none reaches into another one.
fn stretches(points: &[Point]) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = Vec::new();
    for (from, point) in points.iter().enumerate().rev() {
        let later = points.iter().skip(from + 1);
        let until = later.take_while(|later| !point.differs(later)).count() + from + 1;
        // One that begins later and ends no later is shorter.
        let shorter = all.last().is_some_and(|last| last.1 <= until);
        if until < points.len() && !shorter {
            all.push((from, until));
        }
    }
    let height = |stretch: &(usize, usize)| Jump::over(points, *stretch).height();
    all.sort_by(|one, other| height(other).total_cmp(&height(one)).then(one.cmp(other)));
    let mut chosen: Vec<(usize, usize)> = Vec::new();
    for (from, until) in all {
        let apart = |other: &(usize, usize)| until <= other.0 || other.1 <= from;
        if chosen.iter().all(apart) {
            chosen.push((from, until));
        }
    }
    chosen
}

/// The middle of the widest gap in each stretch whose ends differ.
fn splits(points: &[Point]) -> Vec<usize> {
    let middles = stretches(points).into_iter().filter_map(|(from, until)| {
        let gaps = points[from..=until].windows(2);
        let gaps = gaps.map(|pair| (pair[0].moment, pair[1].moment));
        let (low, high) = gaps.max_by_key(|(low, high)| (high - low, usize::MAX - low))?;
        (high - low > 1).then_some(usize::midpoint(low, high))
    });
    middles.collect()
}

/// What happened in a stretch of a run: the events that say most, in order, and how
/// many others there were of each kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Happened {
    /// The events that say most.
    pub named: Vec<Event>,
    /// How many others.
    pub others: BTreeMap<&'static str, usize>,
    /// The first ones after it: what is drawn before them may be what matters.
    pub then: Vec<Event>,
}

/// How much an event says: 0 most.
fn rank(event: &Event) -> u32 {
    match event.kind {
        "DEATH" | "SEVER" | "FENCED" | "FAILURE" | "BLACKOUT" | "fence" | "cut" | "lost"
        | "pause" | "resume" | "reset" | "fault" => 0,
        "mounted" | "unmounted" | "refused" | "judged" | "check" | "ROUND" | "CORE" | "LAST"
        | "LIFE" | "dead" => 1,
        "probe" => 2,
        "flush" | "left" | "unflushed" | "durable" => 3,
        "read" | "write" | "send" | "arrive" => 5,
        _ if event.text.starts_with(['?', '!']) => 1,
        _ => 4,
    }
}

/// What happened after `from` and until `until` (nanoseconds), with the ends of faults.
pub fn happened(events: &[Event], from: u64, until: u64) -> Happened {
    let mut inside: Vec<Event> = Vec::new();
    let mut then: Vec<Event> = Vec::new();
    let mut place = |event: Event| {
        if event.nanos >= until {
            if event.number.is_some() && then.len() < 3 {
                then.push(event);
            }
        } else if event.nanos >= from {
            inside.push(event);
        }
    };
    for event in events {
        if let Link::Until(end) = event.link
            && end > event.nanos
        {
            place(Event {
                nanos: end,
                text: format!("ends: {}", event.text),
                link: Link::None,
                ..event.clone()
            });
        }
        place(event.clone());
    }
    inside.sort_by_key(|event| event.nanos);
    let mut ranks: Vec<u32> = inside.iter().map(rank).collect();
    ranks.sort_unstable();
    // Everything below this rank is named, and of it as many as there is room for.
    let least = ranks.get(NAMED).copied().unwrap_or(u32::MAX);
    let mut room = NAMED - ranks.iter().take_while(|rank| **rank < least).count();
    let mut happened = Happened {
        then,
        ..Happened::default()
    };
    for event in inside {
        let own = rank(&event);
        if own < least || own == least && room > 0 {
            room -= usize::from(own == least);
            happened.named.push(event);
        } else {
            *happened.others.entry(event.kind).or_default() += 1;
        }
    }
    happened
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilsons_interval_is_as_in_the_tables() {
        let near = |(low, high): (f64, f64), a: f64, b: f64| {
            assert!(
                (low - a).abs() < 5e-4 && (high - b).abs() < 5e-4,
                "{low} {high}"
            );
        };
        near(wilson(0, 10, SHOWN), 0.0, 0.2775);
        near(wilson(5, 10, SHOWN), 0.2366, 0.7634);
        near(wilson(40, 40, SHOWN), 0.9124, 1.0);
        assert_eq!(wilson(0, 0, SHOWN), (0.0, 1.0));
    }

    fn counts(same: u32) -> Counts {
        Counts {
            same,
            other: 0,
            runs: 40,
        }
    }

    /// The curve if so many of the runs that leave at a moment fail.
    fn drawn(moments: impl Iterator<Item = u64>, most: usize, same: impl Fn(u64) -> u32) -> Curve {
        let moments: Vec<u64> = moments.collect();
        let mut asked = 0;
        let curve = Curve::draw(&moments, 12, most, |times| {
            asked += times.len();
            times.iter().map(|at| counts(same(*at))).collect()
        });
        assert_eq!(asked, curve.points.len());
        curve
    }

    #[test]
    fn a_jump_is_followed_to_the_event() {
        let moments = (1..=1000).map(|n| n * 100);
        let curve = drawn(moments, 60, |at| if at > 61_700 { 40 } else { 8 });
        assert!(curve.complete);
        let asked = curve.points.len();
        assert!(asked < 24, "{asked}");
        let jumps = curve.jumps();
        assert_eq!(jumps.len(), 1);
        // With 616 moments fixed it is open, with the 617th it is decided.
        assert_eq!((jumps[0].before.moment, jumps[0].after.moment), (616, 617));
        assert_eq!((jumps[0].before.at, jumps[0].after.at), (61_601, 61_701));
        assert_eq!(curve.inevitable().unwrap().moment, 617);
    }

    #[test]
    fn a_rise_that_is_spread_is_one_stretch() {
        // From 10% to 100% between the 500th and the 600th, in small steps.
        let same = |at: u64| (4 + at.saturating_sub(500) * 36 / 100).min(40) as u32;
        let curve = drawn(1..=1200, 60, same);
        let jumps = curve.jumps();
        assert!(!jumps.is_empty());
        for jump in &jumps {
            assert!(jump.before.at >= 480 && jump.after.at <= 620, "{jump:?}");
        }
        assert!((560..=620).contains(&curve.inevitable().unwrap().at));
    }

    #[test]
    fn chance_is_no_jump_and_the_bounds_are_kept() {
        let curve = drawn(1..=1000, 60, |at| 18 + (at % 5) as u32);
        assert_eq!((curve.points.len(), curve.jumps().len()), (13, 0));
        assert!(curve.complete && curve.inevitable().is_none());

        let two_steps = |at: u64| 20 * (u32::from(at > 300) + u32::from(at > 700));
        let bounded = drawn(1..=1000, 15, two_steps);
        assert_eq!((bounded.points.len(), bounded.complete), (15, false));
        let whole = drawn(1..=1000, 60, two_steps);
        assert_eq!((whole.jumps().len(), whole.complete), (2, true));

        let moments: Vec<u64> = (1..=1000).collect();
        let mut calls = 0;
        let late = Curve::draw(&moments, 12, 60, |times| {
            calls += 1;
            let finished = if calls < 3 { 99 } else { 1 };
            let times = times.iter().take(finished);
            times.map(|at| counts(two_steps(*at))).collect()
        });
        assert!(!late.complete);
        assert_eq!(late.points.len(), 13 + 2 + 1);
    }

    #[test]
    fn of_a_long_stretch_the_events_that_say_most_are_named() {
        let event = |nanos, kind, text: &str, link| Event {
            nanos,
            number: Some(nanos),
            node: 0,
            kind,
            text: text.to_owned(),
            link,
        };
        let mut events: Vec<Event> = (0..100)
            .map(|n| event(n, "read", "Meta", Link::None))
            .collect();
        events.push(event(30, "create", "?4 Create", Link::None));
        events.push(event(5, "fault", "a stall", Link::Until(40)));
        let found = happened(&events, 20, 50);
        let kinds: Vec<&str> = found.named.iter().map(|event| event.kind).collect();
        assert_eq!(found.named.len(), NAMED);
        assert!(kinds.contains(&"create") && kinds.contains(&"fault"));
        assert_eq!(found.others, BTreeMap::from([("read", 32 - NAMED)]));
        assert_eq!(found.then.len(), 3);
        assert_eq!(found.then[0].nanos, 50);
    }
}

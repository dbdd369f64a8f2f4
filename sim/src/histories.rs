//! The judge of answers is judged: histories of several clients, of which it is known
//! whether they are right, and what the judge says of them.
//!
//! Right ones come from a sequential run of the model: every call takes effect at one
//! point, and begins somewhere before and ends somewhere after it, so that calls of
//! different clients overlap. Wrong ones are right ones in which one answer was replaced
//! by one that no order of the calls explains. Why not is checked on the history itself,
//! without the model and without an order (see [`Lie`]).
//!
//! What can go wrong: a lie that is none. Each is told only where its reason holds, for
//! every order: what must have happened before has ended before the call began, and what
//! could excuse it begins after the call has ended, or never.

use crate::model::{Call, Context, Model, ROOT, Reply, S_IFDIR};
use crate::oracle::{Oracle, Violation};
use crate::rng::Stream;
use bytes::Bytes;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Attr, Ino, XattrSet};

/// Time between the points of two calls.
const STEP: u64 = 1_000;
/// The first inode that a history makes.
const FIRST: Ino = 1024;

/// A call of a history.
#[derive(Clone, Debug)]
pub struct Op {
    /// Who.
    pub client: usize,
    /// What.
    pub call: Call,
    /// The answer.
    pub reply: Reply,
    /// When it began.
    pub start: u64,
    /// When it ended.
    pub end: u64,
}

/// What was planted, and why no order explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lie {
    /// A value that had been replaced or removed before the call began: only one call
    /// ever set it, and that had ended before the replacement began.
    Stale,
    /// A value whose only setter begins after the call has ended.
    Future,
    /// A name is said not to exist: it was made before the call began, and nobody took it
    /// away before the call ended.
    LostName,
    /// The same, and an exclusive create of the name succeeds.
    MadeTwice,
    /// A name is removed that nobody made before the call ended.
    RemovedNothing,
}

/// All lies.
pub const LIES: [Lie; 5] = [
    Lie::Stale,
    Lie::Future,
    Lie::LostName,
    Lie::MadeTwice,
    Lie::RemovedNothing,
];

/// How large histories are.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Clients.
    pub clients: usize,
    /// Calls of all of them.
    pub operations: usize,
    /// After so many calls comes a moment of quiet; 0: never.
    pub window: usize,
}

fn name(rng: &Stream) -> Bytes {
    Bytes::from(format!("n{}", rng.below(12)))
}

fn xattr(rng: &Stream) -> Bytes {
    Bytes::from(format!("user.x{}", rng.below(2)))
}

/// A call that asks for something which may be there; `tag` is nobody else's.
fn draw_call(rng: &Stream, model: &Model, tag: u64) -> Call {
    let files: Vec<Ino> = model
        .inodes
        .iter()
        .filter(|(ino, inode)| **ino != ROOT && inode.nlink > 0)
        .map(|(ino, _)| *ino)
        .collect();
    let any = || match files.len() {
        0 => ROOT,
        count => files[rng.below(count as u64) as usize],
    };
    let dir = ROOT;
    match rng.weighted(&[12, 5, 12, 4, 3, 3, 24, 24, 6, 6, 4, 4, 4]) {
        0 => Call::Create {
            dir,
            name: name(rng),
            mode: 0o644,
            excl: true,
        },
        1 => Call::Mkdir {
            dir,
            name: name(rng),
            mode: 0o755,
        },
        2 => Call::Lookup {
            dir,
            name: name(rng),
        },
        3 => Call::Unlink {
            dir,
            name: name(rng),
        },
        4 => Call::Rmdir {
            dir,
            name: name(rng),
        },
        5 => Call::Rename {
            dir,
            name: name(rng),
            to: dir,
            new: name(rng),
            noreplace: rng.chance(500),
        },
        6 => Call::Getxattr {
            ino: any(),
            name: xattr(rng),
        },
        7 => Call::Setxattr {
            ino: any(),
            name: xattr(rng),
            value: Bytes::from(format!("value {tag}")),
            how: XattrSet::Any,
        },
        8 => Call::Getattr { ino: any() },
        9 => Call::Removexattr {
            ino: any(),
            name: xattr(rng),
        },
        10 => Call::Readdir { ino: ROOT },
        11 => Call::Link {
            ino: any(),
            dir,
            name: name(rng),
        },
        _ => Call::Listxattr { ino: any() },
    }
}

/// A right history, in the order of the points at which its calls take effect.
pub fn right(rng: &Stream, size: Size) -> Vec<Op> {
    let mut model = Model::new(S_IFDIR | 0o755);
    let mut ops: Vec<Op> = (0..size.operations)
        .map(|number| {
            let at = (number as u64 + 1) * STEP;
            let call = draw_call(rng, &model, number as u64);
            let cx = Context {
                start: at,
                end: at,
                wall: (at as i64, at as i64),
                ..Context::default()
            };
            let reply = model.answer(&call, FIRST + number as u64, &cx);
            let client = rng.below(size.clients as u64) as usize;
            Op {
                client,
                call,
                reply,
                start: at,
                end: at,
            }
        })
        .collect();
    stretch(rng, &mut ops, size);
    ops
}

/// Lets calls begin before and end after their points. A client's next call begins after
/// its last one has ended, and a window's after all of the one before.
fn stretch(rng: &Stream, ops: &mut [Op], size: Size) {
    // How much of the time between its points a client waits for an answer.
    let tenths = rng.pick(&[1, 5, 9, 10]);
    let window = match size.window {
        0 => ops.len().max(1),
        window => window,
    };
    for client in 0..size.clients {
        let own: Vec<usize> = (0..ops.len())
            .filter(|n| ops[*n].client == client)
            .collect();
        for (place, number) in own.iter().enumerate() {
            let at = ops[*number].start;
            let first = (number / window * window) as u64 * STEP + STEP / 2;
            let before = place.checked_sub(1).map_or(0, |last| ops[own[last]].end);
            let room = at - before.max(first) - 2;
            let start = at - 1 - rng.below(room * tenths / 10 + 1).min(room);
            let last = ((number / window + 1) * window) as u64 * STEP + STEP / 2;
            // The next one needs a moment before its point.
            let next = own.get(place + 1).map_or(u64::MAX, |next| ops[*next].start);
            let room = last.min(next - 2) - at - 1;
            let end = at + 1 + rng.below(room * tenths / 10 + 1).min(room);
            let op = &mut ops[*number];
            (op.start, op.end) = (start, end);
        }
    }
}

/// The name that a call makes, if it succeeded.
fn makes(op: &Op) -> Option<&Bytes> {
    match (&op.call, &op.reply) {
        (_, Reply::Err(_)) => None,
        (Call::Create { name, .. } | Call::Mkdir { name, .. } | Call::Link { name, .. }, _) => {
            Some(name)
        }
        (Call::Rename { new, .. }, _) => Some(new),
        _ => None,
    }
}

/// Whether a call may take a name away.
fn takes(op: &Op, taken: &Bytes) -> bool {
    match &op.call {
        Call::Unlink { name, .. } | Call::Rmdir { name, .. } | Call::Rename { name, .. } => {
            name == taken && !matches!(op.reply, Reply::Err(_))
        }
        _ => false,
    }
}

/// The value that a call gives an attribute; `None` inside if it takes it away.
fn sets<'a>(op: &'a Op, of: Ino, which: &Bytes) -> Option<Option<&'a Bytes>> {
    match (&op.call, &op.reply) {
        (_, Reply::Err(_)) => None,
        (
            Call::Setxattr {
                ino, name, value, ..
            },
            _,
        ) if *ino == of && name == which => Some(Some(value)),
        (Call::Removexattr { ino, name }, _) if *ino == of && name == which => Some(None),
        _ => None,
    }
}

/// An answer that no order explains, for call number `at`.
fn lie_at(ops: &[Op], at: usize, lie: Lie) -> Option<Reply> {
    let own = &ops[at];
    let before = |op: &Op| op.end < own.start;
    let made_before = |name: &Bytes| {
        let made = ops.iter().any(|op| before(op) && makes(op) == Some(name));
        made && !ops.iter().any(|op| op.start < own.end && takes(op, name))
    };
    match (lie, &own.call, &own.reply) {
        (Lie::Stale, Call::Getxattr { ino, name }, _) => {
            let old = ops.iter().find_map(|first| {
                let value = sets(first, *ino, name)??;
                let replaced = ops.iter().any(|next| {
                    sets(next, *ino, name).is_some() && first.end < next.start && before(next)
                });
                replaced.then(|| Reply::Bytes(value.clone()))
            })?;
            Some(old)
        }
        (Lie::Future, Call::Getxattr { ino, name }, _) => ops.iter().find_map(|later| {
            let value = sets(later, *ino, name)??;
            (later.start > own.end).then(|| Reply::Bytes(value.clone()))
        }),
        (Lie::LostName, Call::Lookup { name, .. }, Reply::Entry(_)) => {
            made_before(name).then_some(Reply::Err(Errno::ENOENT))
        }
        (Lie::MadeTwice, Call::Create { name, .. }, Reply::Err(Errno::EEXIST)) => {
            let attr = Attr {
                ino: FIRST + at as u64,
                mode: crate::model::S_IFREG | 0o644,
                nlink: 1,
                mtime: crate::model::wall_time(own.start as i64),
                ctime: crate::model::wall_time(own.start as i64),
                ..Attr::default()
            };
            made_before(name).then_some(Reply::Entry(attr))
        }
        (Lie::RemovedNothing, Call::Unlink { name, .. }, Reply::Err(Errno::ENOENT)) => {
            let made = |op: &Op| op.start < own.end && makes(op) == Some(name);
            (!ops.iter().any(made)).then_some(Reply::Done)
        }
        _ => None,
    }
}

/// Plants one lie; false if there is no place for it.
pub fn plant(rng: &Stream, ops: &mut [Op], lie: Lie) -> bool {
    let from = rng.below(ops.len() as u64) as usize;
    for step in 0..ops.len() {
        let at = (from + step) % ops.len();
        if let Some(reply) = lie_at(ops, at, lie) {
            ops[at].reply = reply;
            return true;
        }
    }
    false
}

/// What the judge said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Some order explains all answers.
    Right,
    /// None does.
    Wrong(Violation),
    /// The search was given up.
    GaveUp,
}

/// Lets the judge see a history; also the steps it took.
pub fn judge(ops: &[Op], window: usize) -> (Verdict, u64) {
    let mut oracle = Oracle::new(Model::new(S_IFDIR | 0o755));
    let window = if window == 0 {
        ops.len().max(1)
    } else {
        window
    };
    for part in ops.chunks(window) {
        let mut events: Vec<(u64, bool, usize)> = Vec::new();
        for (number, op) in part.iter().enumerate() {
            events.push((op.start, false, number));
            events.push((op.end, true, number));
        }
        events.sort_unstable();
        let mut numbers = vec![0; part.len()];
        for (time, ends, number) in events {
            let op = &part[number];
            let cx = Context {
                start: op.start,
                end: time,
                wall: (op.start as i64, time as i64),
                ..Context::default()
            };
            if ends {
                oracle.end(numbers[number], op.reply.clone(), cx);
            } else {
                numbers[number] = oracle.begin(op.call.clone(), cx);
            }
        }
        if let Err(violation) = oracle.quiet() {
            return (Verdict::Wrong(violation), oracle.steps());
        }
    }
    match oracle.unjudged() {
        0 => (Verdict::Right, oracle.steps()),
        _ => (Verdict::GaveUp, oracle.steps()),
    }
}

/// One history of a trial: half of them are wrong, if there is a place for a lie.
pub fn trial(seed: u64, size: Size) -> (Vec<Op>, Option<Lie>) {
    let rng = Stream::new(seed, "histories", 0);
    let mut ops = right(&rng, size);
    if seed.is_multiple_of(2) {
        return (ops, None);
    }
    let first = rng.below(LIES.len() as u64) as usize;
    for step in 0..LIES.len() {
        let lie = LIES[(first + step) % LIES.len()];
        if plant(&rng, &mut ops, lie) {
            return (ops, Some(lie));
        }
    }
    (ops, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const USUAL: Size = Size {
        clients: 6,
        operations: 200,
        window: 40,
    };

    #[test]
    fn calls_of_one_client_follow_each_other_and_others_overlap() {
        let mut overlaps = 0;
        for seed in 0..20 {
            let (ops, _) = trial(seed, USUAL);
            for client in 0..USUAL.clients {
                let own: Vec<&Op> = ops.iter().filter(|op| op.client == client).collect();
                assert!(own.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
            for (number, op) in ops.iter().enumerate() {
                let point = (number as u64 + 1) * STEP;
                assert!(op.start < point && point < op.end);
                let window = number / USUAL.window;
                let others = ops.iter().enumerate();
                let later = others.filter(|(other, _)| other / USUAL.window > window);
                assert!(later.into_iter().all(|(_, other)| other.start > op.end));
            }
            let pairs = ops.windows(2);
            overlaps += pairs.filter(|pair| pair[0].end > pair[1].start).count();
        }
        assert!(overlaps > 400, "{overlaps}");
    }

    #[test]
    fn no_verdict_of_a_history_is_wrong() {
        let mut seen: BTreeMap<Option<Lie>, u32> = BTreeMap::new();
        for seed in 0..400 {
            let (ops, lie) = trial(seed, USUAL);
            let (verdict, _) = judge(&ops, USUAL.window);
            match lie {
                None => assert_eq!(verdict, Verdict::Right, "history {seed}"),
                Some(_) => assert!(
                    matches!(verdict, Verdict::Wrong(_)),
                    "history {seed}: {lie:?}"
                ),
            }
            *seen.entry(lie).or_default() += 1;
        }
        assert_eq!(seen.len(), LIES.len() + 1, "{seen:?}");
        assert!(seen.values().all(|count| *count >= 10), "{seen:?}");
    }

    /// Right histories that were refused once: a reader whose answer tells which of two
    /// times an inode has was placed where it fitted first, and nowhere else.
    #[test]
    fn a_reader_that_tells_times_apart_may_belong_elsewhere() {
        for seed in [752, 4998, 8538, 8608] {
            let (ops, lie) = trial(seed, USUAL);
            assert_eq!(lie, None);
            assert_eq!(
                judge(&ops, USUAL.window).0,
                Verdict::Right,
                "history {seed}"
            );
        }
    }

    /// Tries every order that the times allow, and nothing else.
    fn brute_force(ops: &[(Op, Context)], state: &Model, done: &mut Vec<bool>) -> bool {
        if done.iter().all(|done| *done) {
            return true;
        }
        for next in 0..ops.len() {
            let (op, cx) = &ops[next];
            let open = |other: &usize| !done[*other] && *other != next;
            if done[next] || (0..ops.len()).filter(open).any(|o| ops[o].1.end < cx.start) {
                continue;
            }
            done[next] = true;
            let states = state.apply(&op.call, &op.reply, cx);
            let found = states.iter().any(|state| brute_force(ops, state, done));
            done[next] = false;
            if found {
                return true;
            }
        }
        false
    }

    /// Small histories with answers exchanged at random, of which nobody knows whether
    /// they are right: the judge's search and one that tries everything agree.
    #[test]
    fn the_search_agrees_with_one_that_tries_every_order() {
        let size = Size {
            clients: 3,
            operations: 6,
            window: 0,
        };
        let mut verdicts = [0, 0];
        for seed in 0..1500 {
            let rng = Stream::new(seed, "small histories", 0);
            let mut ops = right(&rng, size);
            for _ in 0..rng.below(3) {
                let (one, other) = (rng.below(6) as usize, rng.below(6) as usize);
                let reply = ops[one].reply.clone();
                ops[one].reply = std::mem::replace(&mut ops[other].reply, reply);
            }
            // As the judge has them: counted, and told what overlaps.
            let mut times: Vec<u64> = ops.iter().flat_map(|op| [op.start, op.end]).collect();
            times.sort_unstable();
            let count = |time: u64| (1 << 32) + 1 + times.partition_point(|t| *t < time) as u64;
            let listing = |call: &Call| matches!(call, Call::Readdir { .. });
            let contexts: Vec<(Op, Context)> = ops
                .iter()
                .map(|op| {
                    let cx = Context {
                        start: count(op.start),
                        end: count(op.end),
                        wall: (op.start as i64, op.end as i64),
                        weak: listing(&op.call)
                            && ops.iter().any(|other| {
                                other.start <= op.end
                                    && other.end >= op.start
                                    && other.call.changes_entries_of().contains(&Some(ROOT))
                            }),
                        ..Context::default()
                    };
                    (op.clone(), cx)
                })
                .collect();
            let start = Model::new(S_IFDIR | 0o755);
            let explained = brute_force(&contexts, &start, &mut vec![false; ops.len()]);
            let (verdict, _) = judge(&ops, 0);
            let said = match verdict {
                Verdict::Right => true,
                Verdict::Wrong(_) => false,
                Verdict::GaveUp => panic!("six calls are not too many"),
            };
            assert_eq!(said, explained, "history {seed}: {ops:#?}");
            verdicts[usize::from(said)] += 1;
        }
        assert!(verdicts.iter().all(|count| *count > 200), "{verdicts:?}");
    }
}

use super::*;
use crate::model::{ROOT, S_IFDIR, S_IFREG, Stamp};
use bytes::Bytes;
use outrider_core::env::WallTime;
use outrider_core::fs::api::{Attr, Ino};

fn cx(start: u64, end: u64) -> Context {
    Context {
        start,
        end,
        wall: (0, 0),
        ..Context::default()
    }
}

fn create(text: &'static str) -> Call {
    Call::Create {
        dir: ROOT,
        name: Bytes::from_static(text.as_bytes()),
        mode: 0o644,
        excl: true,
    }
}

fn made(ino: Ino) -> Reply {
    let time = WallTime { sec: 0, nsec: 0 };
    Reply::Entry(Attr {
        ino,
        mode: S_IFREG | 0o644,
        nlink: 1,
        mtime: time,
        ctime: time,
        ..Attr::default()
    })
}

fn oracle() -> Oracle {
    let mut root = Model::new(S_IFDIR | 0o755);
    let inode = root.get_mut(ROOT);
    inode.mtime = Stamp::exact(0);
    inode.ctime = Stamp::exact(0);
    Oracle::new(root)
}

/// Lets calls begin and end at their times; what is equal overlaps.
fn play(oracle: &mut Oracle, calls: &[(Call, Reply, u64, u64)]) {
    let mut events = Vec::new();
    for (index, (_, _, start, end)) in calls.iter().enumerate() {
        events.extend([(*start, false, index), (*end, true, index)]);
    }
    events.sort_unstable();
    let mut numbers = vec![0; calls.len()];
    for (time, ends, index) in events {
        let (call, reply, start, end) = &calls[index];
        if ends {
            oracle.end(numbers[index], reply.clone(), cx(*start, *end));
        } else {
            numbers[index] = oracle.begin(call.clone(), cx(time, time));
        }
    }
}

fn run(oracle: &mut Oracle, call: Call, reply: Reply, start: u64, end: u64) {
    let number = oracle.begin(call, cx(start, start));
    oracle.end(number, reply, cx(start, end));
}

#[test]
fn overlapping_calls_may_have_happened_in_either_order() {
    let lookup = Call::Lookup {
        dir: ROOT,
        name: Bytes::from_static(b"a"),
    };
    let absent = Reply::Err(Errno::ENOENT);
    let mut o = oracle();
    play(
        &mut o,
        &[
            (create("a"), made(1024), 10, 20),
            (lookup.clone(), absent.clone(), 15, 30),
            (lookup.clone(), made(1024), 15, 16),
        ],
    );
    o.quiet().unwrap();
    let mut o = oracle();
    run(&mut o, create("a"), made(1024), 10, 20);
    run(&mut o, lookup, absent, 25, 30);
    assert_eq!(o.quiet().unwrap_err().kind, "answers");
}

#[test]
fn one_of_two_exclusive_creates_must_fail() {
    let mut o = oracle();
    let failed = Reply::Err(Errno::EEXIST);
    play(
        &mut o,
        &[
            (create("a"), failed, 10, 20),
            (create("a"), made(1024), 11, 21),
        ],
    );
    o.quiet().unwrap();
    let mut o = oracle();
    play(
        &mut o,
        &[
            (create("a"), made(1025), 10, 20),
            (create("a"), made(1024), 11, 21),
        ],
    );
    o.quiet().unwrap_err();
}

#[test]
fn a_crash_may_lose_a_suffix_but_not_what_was_synced_and_not_a_middle() {
    let after = |names: &[(&'static str, Ino)]| {
        let mut o = oracle();
        for (name, ino) in names {
            run(&mut o, create(name), made(*ino), 1, 2);
        }
        o.quiet().unwrap();
        o.state().after_crash()
    };
    let start = |sync: bool| {
        let mut o = oracle();
        run(&mut o, create("a"), made(1024), 10, 20);
        if sync {
            run(&mut o, Call::Syncfs, Reply::Done, 21, 22);
        }
        o.quiet().unwrap();
        run(&mut o, create("b"), made(1025), 30, 40);
        o.begin(create("c"), cx(50, 50));
        o
    };
    start(false).recovered(&after(&[])).unwrap();
    start(false).recovered(&after(&[("a", 1024)])).unwrap();
    let two = after(&[("a", 1024), ("b", 1025)]);
    start(true).recovered(&two).unwrap();
    let three = after(&[("a", 1024), ("b", 1025), ("c", 1026)]);
    start(true).recovered(&three).unwrap();
    // Synced, but gone.
    let lost = start(true).recovered(&after(&[])).unwrap_err();
    assert_eq!(lost.kind, "durability");
    // The later one without the earlier one.
    let mut middle = start(false);
    let result = middle.recovered(&after(&[("b", 1025)]));
    assert!(
        result.is_err(),
        "{:?} {}",
        middle.state(),
        middle.unjudged()
    );
    // Something nobody made.
    start(false).recovered(&after(&[("x", 1030)])).unwrap_err();
}

#[test]
fn a_window_of_reads_makes_nothing_durable() {
    let after = |names: &[(&'static str, Ino)]| {
        let mut o = oracle();
        for (name, ino) in names {
            run(&mut o, create(name), made(*ino), 1, 2);
        }
        o.quiet().unwrap();
        o.state().after_crash()
    };
    let start = |sync: bool| {
        let mut o = oracle();
        run(&mut o, create("a"), made(1024), 10, 20);
        o.quiet().unwrap();
        run(&mut o, create("b"), made(1025), 30, 40);
        if sync {
            run(&mut o, Call::Syncfs, Reply::Done, 41, 42);
        }
        o.quiet().unwrap();
        let lookup = Call::Lookup {
            dir: ROOT,
            name: Bytes::from_static(b"a"),
        };
        for time in [50, 60] {
            run(&mut o, lookup.clone(), made(1024), time, time + 1);
            o.quiet().unwrap();
        }
        o
    };
    let (one, two) = (after(&[("a", 1024)]), after(&[("a", 1024), ("b", 1025)]));
    for state in [&after(&[]), &one, &two] {
        start(false).recovered(state).unwrap();
    }
    start(true).recovered(&two).unwrap();
    for state in [&after(&[]), &one] {
        let lost = start(true).recovered(state).unwrap_err();
        assert_eq!(lost.kind, "durability");
    }
}

use super::*;
use crate::model::{ROOT, S_IFDIR, S_IFREG, Stamp};
use bytes::Bytes;
use outrider_core::env::WallTime;
use outrider_core::fs::api::{Attr, Ino, SetAttr};

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

fn name(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn lookup(text: &'static str) -> Call {
    Call::Lookup {
        dir: ROOT,
        name: name(text),
    }
}

fn write(ino: Ino, offset: u64, len: u32, tag: u64) -> Call {
    Call::Write {
        ino,
        offset,
        len,
        tag,
        append: false,
        sync: false,
    }
}

fn chmod(ino: Ino, mode: u32) -> Call {
    let set = SetAttr {
        mode: Some(mode),
        ..SetAttr::default()
    };
    Call::Setattr { ino, set }
}

fn truncate(ino: Ino, size: u64) -> Call {
    let set = SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    Call::Setattr { ino, set }
}

/// The answer that gives the attributes of a file.
fn attr(ino: Ino, mode: u32, size: u64, blocks: u64) -> Reply {
    let Reply::Entry(attr) = made(ino) else {
        unreachable!("made gives an entry");
    };
    Reply::Attr(Attr {
        mode: S_IFREG | mode,
        size,
        blocks: blocks * 8,
        ..attr
    })
}

/// The state after some calls, one after the other.
fn state_after(calls: &[(Call, Reply)]) -> Model {
    let mut o = oracle();
    for (call, reply) in calls {
        run(&mut o, call.clone(), reply.clone(), 1, 2);
    }
    o.quiet().unwrap();
    o.state().after_crash()
}

/// An oracle whose volume holds file 1024 with 4 blocks of tag 1, durable.
fn with_file() -> Oracle {
    let mut o = oracle();
    for (call, reply) in file() {
        run(&mut o, call, reply, 1, 2);
    }
    run(&mut o, Call::Syncfs, Reply::Done, 3, 4);
    o.quiet().unwrap();
    o
}

fn file() -> [(Call, Reply); 2] {
    [
        (create("f"), made(1024)),
        (write(1024, 0, 16384, 1), Reply::Number(16384)),
    ]
}

fn refused(o: &mut Oracle, observed: &Model) {
    let violation = o.recovered(observed).unwrap_err();
    assert_eq!(violation.kind, "durability", "{}", violation.text);
    assert_eq!(o.unjudged(), 0);
}

#[test]
fn one_moment_has_an_order() {
    let mut o = oracle();
    run(&mut o, create("a"), made(1024), 10, 10);
    run(&mut o, lookup("a"), made(1024), 10, 10);
    o.quiet().unwrap();
    let mut o = oracle();
    run(&mut o, create("a"), made(1024), 10, 10);
    run(&mut o, lookup("a"), Reply::Err(Errno::ENOENT), 10, 10);
    assert_eq!(o.quiet().unwrap_err().kind, "answers");
}

#[test]
fn what_a_later_window_shows_decides_an_order_of_an_earlier_one() {
    let start = || {
        let mut o = with_file();
        let full = Reply::Number(4096);
        play(
            &mut o,
            &[
                (write(1024, 0, 4096, 7), full.clone(), 10, 20),
                (write(1024, 0, 4096, 8), full, 11, 21),
            ],
        );
        o.quiet().unwrap();
        // Nothing that tells them apart.
        run(&mut o, lookup("f"), attr_entry(), 30, 31);
        o.quiet().unwrap();
        o
    };
    let read = Call::Read {
        ino: 1024,
        offset: 0,
        len: 4096,
    };
    let bytes = |tag| Reply::Bytes(crate::model::pattern(tag, 0, 4096));
    for tag in [7, 8] {
        let mut o = start();
        run(&mut o, read.clone(), bytes(tag), 40, 41);
        o.quiet().unwrap();
        // From now on it is known.
        run(&mut o, read.clone(), bytes(15 - tag), 50, 51);
        assert_eq!(o.quiet().unwrap_err().kind, "answers");
    }
    let mut o = start();
    run(&mut o, read.clone(), bytes(1), 40, 41);
    assert_eq!(o.quiet().unwrap_err().kind, "answers");
    // After a crash, too.
    let [first, second] = file();
    let both = |tags: [u64; 2]| {
        let full = Reply::Number(4096);
        let mut calls = vec![first.clone(), second.clone()];
        calls.extend(tags.map(|tag| (write(1024, 0, 4096, tag), full.clone())));
        state_after(&calls)
    };
    for tags in [[7, 8], [8, 7]] {
        let mut o = start();
        run(&mut o, Call::Syncfs, Reply::Done, 60, 61);
        o.quiet().unwrap();
        o.recovered(&both(tags)).unwrap();
        let mut o = start();
        run(&mut o, Call::Syncfs, Reply::Done, 60, 61);
        o.quiet().unwrap();
        refused(&mut o, &both([7, 9]));
    }
}

fn attr_entry() -> Reply {
    let Reply::Attr(attr) = attr(1024, 0o644, 16384, 4) else {
        unreachable!("attr gives attributes");
    };
    Reply::Entry(attr)
}

#[test]
fn a_tangle_of_calls_is_judged() {
    let names: Vec<&'static str> = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"].to_vec();
    let tangle = || -> Vec<(Call, Reply, u64, u64)> {
        let creates = names.iter().enumerate().map(|(index, name)| {
            let ino = 1024 + index as Ino;
            (
                create(name),
                made(ino),
                10 + index as u64,
                100 + index as u64,
            )
        });
        let lookups = names.iter().enumerate().map(|(index, name)| {
            let ino = 1024 + index as Ino;
            let reply = if index % 2 == 0 {
                made(ino)
            } else {
                Reply::Err(Errno::ENOENT)
            };
            (lookup(name), reply, 30, 95)
        });
        creates.chain(lookups).collect()
    };
    let mut o = oracle();
    play(&mut o, &tangle());
    o.quiet().unwrap();
    let mut o = oracle();
    let mut calls = tangle();
    // One thing is wrong: it is gone after it was made.
    calls.push((lookup("j"), Reply::Err(Errno::ENOENT), 120, 130));
    play(&mut o, &calls);
    assert_eq!(o.quiet().unwrap_err().kind, "answers");
    assert_eq!(o.unjudged(), 0);
    // Any of them may be there after a crash, but no more than those.
    let some = |chosen: &[usize]| {
        let calls: Vec<_> = chosen
            .iter()
            .map(|index| (create(names[*index]), made(1024 + *index as Ino)))
            .collect();
        state_after(&calls)
    };
    let crashed = || {
        let mut o = oracle();
        play(&mut o, &tangle());
        o.quiet().unwrap();
        o
    };
    crashed().recovered(&some(&[7, 2, 9])).unwrap();
    let mut twice = some(&[7, 2]);
    twice.get_mut(ROOT).nlink += 1;
    refused(&mut crashed(), &twice);
}

#[test]
fn what_nobody_answered_may_have_happened() {
    let rename = Call::Rename {
        dir: ROOT,
        name: name("c"),
        to: ROOT,
        new: name("d"),
        noreplace: false,
    };
    let start = || {
        let mut o = oracle();
        o.begin(create("c"), cx(10, 10));
        run(&mut o, rename.clone(), Reply::Done, 20, 30);
        let unlink = Call::Unlink {
            dir: ROOT,
            name: name("d"),
        };
        o.begin(unlink, cx(40, 40));
        o
    };
    let created = (create("c"), made(1030));
    start().recovered(&state_after(&[])).unwrap();
    let made_only = state_after(std::slice::from_ref(&created));
    start().recovered(&made_only).unwrap();
    let moved = state_after(&[created.clone(), (rename.clone(), Reply::Done)]);
    start().recovered(&moved).unwrap();
    let other = state_after(&[created, (create("d"), made(1031))]);
    refused(&mut start(), &other);
}

#[test]
fn a_truncation_that_fails_half_way_leaves_the_blocks_that_are_freed_last() {
    let judged = |size: u64, seen: &[(u64, u64)]| {
        let mut o = with_file();
        let mut faulty = cx(10, 20);
        faulty.tolerance.io = true;
        let set = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        let number = o.begin(Call::Setattr { ino: 1024, set }, faulty);
        o.end(number, Reply::Err(Errno::EIO), faulty);
        for (size, blocks) in seen {
            let look = Call::Getattr { ino: 1024 };
            run(&mut o, look, attr(1024, 0o644, *size, *blocks), 30, 40);
        }
        o.quiet().map_err(|violation| violation.kind)
    };
    let possible = [(16384, 4), (5000, 2), (5000, 3), (5000, 4)];
    for seen in possible {
        assert_eq!(judged(5000, &[seen]), Ok(()), "{seen:?}");
    }
    for seen in [(5000, 1), (5000, 5), (6000, 4), (16384, 3)] {
        assert_eq!(judged(5000, &[seen]), Err("answers"), "{seen:?}");
    }
    // Nobody goes on with it before the next change.
    assert_eq!(judged(5000, &[(5000, 4), (5000, 3)]), Err("answers"));
    // Nobody has seen how many are left, but the next mount.
    let recovered = |size: u64, blocks: &[u64]| {
        let mut o = with_file();
        let mut faulty = cx(10, 20);
        faulty.tolerance.io = true;
        let call = Call::OpenTrunc { ino: 1024 };
        let number = o.begin(call, faulty);
        o.end(number, Reply::Err(Errno::EIO), faulty);
        o.quiet().unwrap();
        // Something later is durable.
        let other = (create("g"), made(1025));
        run(&mut o, other.0.clone(), other.1.clone(), 30, 40);
        run(&mut o, Call::Syncfs, Reply::Done, 50, 60);
        o.quiet().unwrap();
        let [first, second] = file();
        let mut seen = state_after(&[first, second, other]);
        let inode = seen.get_mut(1024);
        inode.size = size;
        inode.blocks.retain(|block, _| blocks.contains(block));
        o.recovered(&seen).map_err(|violation| violation.kind)
    };
    for left in [&[][..], &[3], &[2, 3], &[0, 1, 2, 3]] {
        assert_eq!(recovered(0, left), Ok(()), "{left:?}");
    }
    for left in [&[0][..], &[1, 3], &[0, 1, 2]] {
        assert_eq!(recovered(0, left), Err("durability"), "{left:?}");
    }
    assert_eq!(recovered(16384, &[0, 1, 2, 3]), Ok(()));
    assert_eq!(recovered(16384, &[1, 2, 3]), Err("durability"));
}

#[test]
fn what_failed_did_nothing_after_it_said_so() {
    let start = || {
        let mut o = with_file();
        let mut faulty = cx(10, 20);
        faulty.tolerance.io = true;
        let number = o.begin(chmod(1024, 0o600), faulty);
        o.end(number, Reply::Err(Errno::EIO), faulty);
        let done = attr(1024, 0o700, 16384, 4);
        run(&mut o, chmod(1024, 0o700), done, 30, 40);
        o
    };
    let with_mode = |mode| {
        let [first, second] = file();
        let changed = (chmod(1024, mode), attr(1024, mode, 16384, 4));
        state_after(&[first, second, changed])
    };
    for mode in [0o644, 0o600, 0o700] {
        start().recovered(&with_mode(mode)).unwrap();
    }
    refused(&mut start(), &with_mode(0o640));
    // Once the second one is promised the first cannot show.
    let synced = || {
        let mut o = start();
        run(&mut o, Call::Syncfs, Reply::Done, 50, 60);
        o
    };
    synced().recovered(&with_mode(0o700)).unwrap();
    refused(&mut synced(), &with_mode(0o600));
}

#[test]
fn parts_of_large_writes_may_be_there_but_nothing_after_what_is_missing() {
    let start = || {
        let mut o = oracle();
        for (name, ino) in [("a", 1024), ("b", 1025)] {
            run(&mut o, create(name), made(ino), 1, 2);
        }
        run(&mut o, Call::Syncfs, Reply::Done, 3, 4);
        o.quiet().unwrap();
        o
    };
    let base = [(create("a"), made(1024)), (create("b"), made(1025))];
    let wrote = |ino, len: u32| (write(ino, 0, len, 5), Reply::Number(u64::from(len)));
    let state = |writes: &[(Call, Reply)]| {
        let calls: Vec<_> = base.iter().chain(writes).cloned().collect();
        state_after(&calls)
    };
    let both = || {
        let mut o = start();
        o.begin(write(1024, 0, 20_000, 5), cx(10, 10));
        o.begin(write(1025, 0, 20_000, 5), cx(11, 11));
        o
    };
    both().recovered(&state(&[])).unwrap();
    both().recovered(&state(&[wrote(1024, 8192)])).unwrap();
    let parts = state(&[wrote(1024, 4096), wrote(1025, 12288)]);
    both().recovered(&parts).unwrap();
    let mut wrong = parts.clone();
    wrong.get_mut(1025).size = 20_000;
    refused(&mut both(), &wrong);
    // One after the other: a part of the second one needs all of the first.
    let sequence = || {
        let mut o = start();
        run(
            &mut o,
            write(1024, 0, 20_000, 5),
            Reply::Number(20_000),
            10,
            20,
        );
        o.begin(write(1025, 0, 20_000, 5), cx(21, 21));
        o
    };
    let whole = state(&[wrote(1024, 20_000), wrote(1025, 4096)]);
    sequence().recovered(&whole).unwrap();
    refused(&mut sequence(), &parts);
}

#[test]
fn blocks_behind_the_end_are_left_by_a_truncate_that_was_not_promised() {
    let start = |sync: bool| {
        let mut o = with_file();
        run(
            &mut o,
            truncate(1024, 5000),
            attr(1024, 0o644, 5000, 2),
            10,
            20,
        );
        if sync {
            run(&mut o, Call::Syncfs, Reply::Done, 30, 40);
        }
        o
    };
    let [first, second] = file();
    let long = state_after(&[first.clone(), second.clone()]);
    let cut = (truncate(1024, 5000), attr(1024, 0o644, 5000, 2));
    let short = state_after(&[first, second, cut]);
    let mut between = short.clone();
    let left = std::rc::Rc::clone(&long.get(1024).unwrap().blocks[&3]);
    between.get_mut(1024).blocks.insert(3, left);
    for state in [&long, &between, &short] {
        start(false).recovered(state).unwrap();
    }
    start(true).recovered(&short).unwrap();
    refused(&mut start(true), &between);
    refused(&mut start(true), &long);
}

#[test]
fn names_are_listed_after_a_crash_as_they_were_made() {
    let start = || {
        let mut o = oracle();
        run(&mut o, create("b"), made(1024), 10, 20);
        run(&mut o, create("a"), made(1025), 30, 40);
        run(&mut o, Call::Syncfs, Reply::Done, 50, 60);
        o
    };
    let calls = [(create("b"), made(1024)), (create("a"), made(1025))];
    let right = state_after(&calls);
    start().recovered(&right).unwrap();
    let mut wrong = right.clone();
    let root = wrong.get_mut(ROOT);
    let (a, b) = (root.entries[&name("a")], root.entries[&name("b")]);
    root.entries.get_mut(&name("a")).unwrap().born = b.born;
    root.entries.get_mut(&name("b")).unwrap().born = a.born;
    refused(&mut start(), &wrong);
}

#[test]
fn after_a_search_was_given_up_nothing_is_judged_until_the_state_is_seen() {
    let mut o = oracle();
    o.budget = 1;
    run(&mut o, create("a"), made(1024), 10, 20);
    run(&mut o, create("b"), made(1025), 30, 40);
    o.quiet().unwrap();
    o.budget = BUDGET;
    // Wrong, or not: nobody knows.
    run(&mut o, lookup("a"), Reply::Err(Errno::ENOENT), 50, 60);
    o.quiet().unwrap();
    assert_eq!(o.unjudged(), 2);
    o.recovered(&state_after(&[(create("b"), made(1025))]))
        .unwrap();
    run(&mut o, lookup("a"), Reply::Err(Errno::ENOENT), 70, 80);
    o.quiet().unwrap();
    run(&mut o, lookup("b"), Reply::Err(Errno::ENOENT), 90, 91);
    assert_eq!(o.quiet().unwrap_err().kind, "answers");
    assert_eq!(o.unjudged(), 2);
}

#[test]
fn what_was_shown_stays_unless_a_flush_of_it_has_failed() {
    let [first, second] = file();
    let with_page = |tag| {
        let over = (write(1024, 0, 4096, tag), Reply::Number(4096));
        let mut seen = state_after(&[first.clone(), second.clone()]);
        let changed = state_after(&[first.clone(), second.clone(), over]);
        let page = std::rc::Rc::clone(&changed.get(1024).unwrap().blocks[&0]);
        seen.get_mut(1024).blocks.insert(0, page);
        seen
    };
    let old = state_after(&[first.clone(), second.clone()]);
    // Two writes in place, neither committed; the mount after the crash shows one.
    let shown = |doubtful| {
        let mut o = with_file();
        for tag in [2, 3] {
            run(
                &mut o,
                write(1024, 0, 4096, tag),
                Reply::Number(4096),
                10,
                20,
            );
        }
        o.doubt_data(doubtful);
        o.recovered(&with_page(3)).unwrap();
        o
    };
    shown(false).recovered(&with_page(3)).unwrap();
    refused(&mut shown(false), &old);
    refused(&mut shown(false), &with_page(2));
    for state in [&old, &with_page(2), &with_page(3)] {
        shown(true).recovered(state).unwrap();
    }
    refused(&mut shown(true), &with_page(4));
    // Over several crashes, too.
    let mut o = shown(true);
    o.recovered(&with_page(2)).unwrap();
    o.recovered(&with_page(3)).unwrap();
    o.recovered(&old).unwrap();
    // Whatever else is committed; but not once it is written again.
    let committed = |block: u64| {
        let mut o = shown(true);
        let mode = attr(1024, 0o600, 16384, 4);
        run(&mut o, chmod(1024, 0o600), mode, 30, 40);
        let call = write(1024, block * 4096, 10, 5);
        run(&mut o, call, Reply::Number(10), 50, 60);
        run(&mut o, Call::Syncfs, Reply::Done, 70, 80);
        o
    };
    let after = |mut state: Model, block: u64| {
        state.get_mut(1024).mode = S_IFREG | 0o600;
        let call = write(1024, block * 4096, 10, 5);
        let mut next = state.apply(&call, &Reply::Number(10), &cx(50, 60));
        next.remove(0)
    };
    for state in [&old, &with_page(2), &with_page(3)] {
        committed(1).recovered(&after(state.clone(), 1)).unwrap();
    }
    refused(&mut committed(1), &after(with_page(4), 1));
    committed(0).recovered(&after(with_page(3), 0)).unwrap();
    refused(&mut committed(0), &after(old.clone(), 0));
    refused(&mut committed(0), &after(with_page(2), 0));
}

#[test]
fn who_is_cut_off_may_have_shown_a_write_that_then_failed_to_be_committed() {
    let start = |sync: bool| {
        let mut o = oracle();
        run(&mut o, create("a"), made(1024), 10, 20);
        let mut severed = cx(30, 60);
        severed.tolerance.link = true;
        let call = Call::Write {
            ino: 1024,
            offset: 0,
            len: 5000,
            tag: 1,
            append: false,
            sync,
        };
        let number = o.begin(call, severed);
        let seek = Call::Seek {
            ino: 1024,
            offset: 4112,
            hole: true,
        };
        run(&mut o, seek, Reply::Number(5000), 40, 50);
        o.end(number, Reply::Err(Errno::ENOLINK), severed);
        o
    };
    start(true).quiet().unwrap();
    assert_eq!(start(false).quiet().unwrap_err().kind, "answers");
    // What came before was committed; the write may be or not, but nothing else.
    let empty = state_after(&[(create("a"), made(1024))]);
    let wrote = (write(1024, 0, 5000, 1), Reply::Number(5000));
    let full = state_after(&[(create("a"), made(1024)), wrote]);
    start(true).recovered(&empty).unwrap();
    start(true).recovered(&full).unwrap();
    let other = (write(1024, 0, 5000, 2), Reply::Number(5000));
    let other = state_after(&[(create("a"), made(1024)), other]);
    refused(&mut start(true), &other);
}

/// One call of a mount, all of it after what came before.
fn by(oracle: &mut Oracle, seat: u32, call: Call, reply: Reply) {
    let cx = Context { seat, ..cx(0, 0) };
    let number = oracle.begin(call, cx);
    oracle.end(number, reply, cx);
}

fn first_block(tag: u64) -> (Call, Reply) {
    let call = Call::Write {
        ino: 7,
        offset: 0,
        len: 4096,
        tag,
        append: false,
        sync: false,
    };
    (call, Reply::Number(4096))
}

fn state_of(calls: &[(Call, Reply)]) -> Model {
    let mut oracle = oracle();
    for (call, reply) in calls {
        by(&mut oracle, 2, call.clone(), reply.clone());
    }
    oracle.quiet().expect("these answers are right");
    oracle.state().clone()
}

#[test]
fn a_commit_may_keep_a_call_and_lose_one_that_began_before_it_and_ended_after_it() {
    let attempt = |observed: &Model| {
        let mut oracle = oracle();
        let one = Context {
            seat: 1,
            ..cx(0, 0)
        };
        let long = oracle.begin(create("a"), one);
        by(&mut oracle, 1, create("b"), made(8));
        oracle.end(long, made(7), one);
        by(&mut oracle, 1, create("c"), made(9));
        let at = oracle.moment();
        oracle.lost(&[Death { seat: 1, at }], observed)
    };
    assert_eq!(attempt(&state_of(&[(create("b"), made(8))])), Ok(()));
    let both = [(create("a"), made(7)), (create("b"), made(8))];
    assert_eq!(attempt(&state_of(&both)), Ok(()));
    let suffix_only = attempt(&state_of(&[(create("c"), made(9))]));
    assert!(suffix_only.is_err(), "it began when both others had ended");
}

#[test]
fn a_read_may_show_what_a_dead_mount_wrote_in_place_and_nothing_else() {
    let file = (create("a"), made(7));
    let attempt = |blocks: &[u64], shown: u64, observed: &[u64]| {
        let mut oracle = oracle();
        by(&mut oracle, 2, file.0.clone(), file.1.clone());
        for tag in blocks {
            let (call, reply) = first_block(*tag);
            by(&mut oracle, 2, call, reply);
        }
        by(&mut oracle, 2, Call::Syncfs, Reply::Done);
        let (call, reply) = first_block(2);
        by(&mut oracle, 1, call, reply);
        let at = oracle.moment();
        let read = Call::Read {
            ino: 7,
            offset: 0,
            len: 4096,
        };
        let bytes = crate::model::pattern(shown, 0, 4096);
        by(&mut oracle, 2, read, Reply::Bytes(bytes));
        let writes = observed.iter().map(|tag| first_block(*tag));
        let calls: Vec<(Call, Reply)> = [file.clone()].into_iter().chain(writes).collect();
        oracle.lost(&[Death { seat: 1, at }], &state_of(&calls))
    };
    assert_eq!(attempt(&[1], 1, &[1]), Ok(()), "all of it is lost");
    assert_eq!(attempt(&[1], 2, &[1, 2]), Ok(()), "it stayed in place");
    assert!(attempt(&[1], 3, &[1]).is_err(), "nobody wrote that");
    assert!(attempt(&[], 2, &[]).is_err(), "there was no place for it");
}

/// Whether mount 1 may have ended in `call`, or after its answer, if mount 2 then did
/// and saw all of `seen` and `end` is what is there.
fn cut_off(call: &Call, answer: Option<Reply>, seen: &[(Call, Reply)], end: &Model) -> bool {
    let mut oracle = oracle();
    by(&mut oracle, 2, create("a"), made(7));
    by(
        &mut oracle,
        2,
        write(7, 0, 20_000, 1),
        Reply::Number(20_000),
    );
    by(&mut oracle, 2, create("b"), made(8));
    by(&mut oracle, 2, Call::Syncfs, Reply::Done);
    let one = Context {
        seat: 1,
        ..cx(0, 0)
    };
    let number = oracle.begin(call.clone(), one);
    if let Some(answer) = answer {
        oracle.end(number, answer, one);
    }
    let at = oracle.moment();
    for (call, reply) in seen {
        by(&mut oracle, 2, call.clone(), reply.clone());
    }
    by(&mut oracle, 2, Call::Syncfs, Reply::Done);
    oracle.lost(&[Death { seat: 1, at }], end).is_ok()
}

fn getattr(ino: Ino, size: u64, blocks: u64) -> (Call, Reply) {
    (Call::Getattr { ino }, attr(ino, 0o644, size, blocks))
}

#[test]
fn others_may_see_a_truncation_that_a_dead_mount_has_not_finished() {
    let long = [
        (create("a"), made(7)),
        (write(7, 0, 20_000, 1), Reply::Number(20_000)),
        (create("b"), made(8)),
    ];
    let cut = (truncate(7, 5000), attr(7, 0o644, 5000, 2));
    let short: Vec<_> = long.iter().cloned().chain([cut.clone()]).collect();
    let (long, short) = (state_of(&long), state_of(&short));
    let with_left = |blocks: &[u64]| {
        let mut state = short.clone();
        for block in blocks {
            let page = std::rc::Rc::clone(&long.get(7).unwrap().blocks[block]);
            state.get_mut(7).blocks.insert(*block, page);
        }
        state
    };
    let ends = |seen: &[(Call, Reply)], end: &Model| {
        let unanswered = cut_off(&cut.0, None, seen, end);
        let answered = cut_off(&cut.0, Some(cut.1.clone()), seen, end);
        assert_eq!(unanswered, answered, "its last transactions may be lost");
        answered
    };
    for (blocks, left) in [(5, &[2, 3, 4][..]), (4, &[3, 4]), (3, &[4]), (2, &[])] {
        assert!(ends(&[getattr(7, 5000, blocks)], &with_left(left)));
    }
    assert!(ends(&[], &with_left(&[3, 4])));
    assert!(ends(&[getattr(7, 20_000, 5)], &long), "nothing of it");
    let wrong = [
        getattr(7, 5000, 6),
        getattr(7, 5000, 1),
        getattr(7, 6000, 4),
        getattr(7, 20_000, 4),
        getattr(8, 5000, 2),
    ];
    for seen in wrong {
        assert!(!ends(std::slice::from_ref(&seen), &with_left(&[3, 4])));
    }
    // Nobody works at it any more, until a write finishes it.
    assert!(!ends(
        &[getattr(7, 5000, 4), getattr(7, 5000, 3)],
        &with_left(&[4])
    ));
    assert!(!ends(
        &[getattr(7, 5000, 2), getattr(7, 20_000, 5)],
        &with_left(&[])
    ));
    let over = (write(7, 0, 10, 2), Reply::Number(10));
    let written = short.apply(&over.0, &over.1, &cx(0, 0)).remove(0);
    let seen = [getattr(7, 5000, 4), over.clone(), getattr(7, 5000, 2)];
    assert!(ends(&seen, &written));
    let seen = [getattr(7, 5000, 4), over, getattr(7, 5000, 4)];
    assert!(!ends(&seen, &written));
}

#[test]
fn others_may_see_the_beginning_of_a_write_that_a_dead_mount_has_not_finished() {
    let base = [
        (create("a"), made(7)),
        (write(7, 0, 20_000, 1), Reply::Number(20_000)),
        (create("b"), made(8)),
    ];
    let wrote = |len: u32| (write(8, 0, len, 5), Reply::Number(u64::from(len)));
    let after = |len: u32| {
        let calls: Vec<_> = base.iter().cloned().chain([wrote(len)]).collect();
        state_of(&calls)
    };
    let ends = |seen: &[(Call, Reply)], end: &Model| {
        let unanswered = cut_off(&wrote(20_000).0, None, seen, end);
        let answered = cut_off(&wrote(20_000).0, Some(wrote(20_000).1), seen, end);
        assert_eq!(unanswered, answered, "its last transactions may be lost");
        answered
    };
    let read = |len: u32, tag| {
        let call = Call::Read {
            ino: 8,
            offset: 0,
            len: 32_768,
        };
        (call, Reply::Bytes(crate::model::pattern(tag, 0, len)))
    };
    // Somebody saw it, and then wrote more: in the end only that shows.
    let more = (write(8, 8192, 20_000, 6), Reply::Number(20_000));
    let end = after(8192).apply(&more.0, &more.1, &cx(0, 0)).remove(0);
    let seen = |first| [first, more.clone()];
    assert!(ends(&seen(getattr(8, 8192, 2)), &end));
    assert!(ends(
        &[getattr(8, 8192, 2), read(8192, 5), more.clone()],
        &end
    ));
    assert!(!ends(
        &[getattr(8, 8192, 2), read(8192, 4), more.clone()],
        &end
    ));
    assert!(!ends(
        &[getattr(8, 8192, 2), read(4096, 5), more.clone()],
        &end
    ));
    assert!(!ends(&seen(getattr(8, 8192, 3)), &end));
    assert!(
        !ends(&seen(getattr(8, 8000, 2)), &end),
        "whole blocks are there"
    );
    assert!(!ends(&seen(getattr(8, 4096, 1)), &end), "less was seen");
    assert!(!ends(
        &[getattr(8, 8192, 2), getattr(8, 12_288, 3), more.clone()],
        &end
    ));
}

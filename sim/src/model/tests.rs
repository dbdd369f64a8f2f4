use super::recover::Later;
use super::*;
use outrider_core::env::WallTime;
use outrider_core::fs::api::SetAttr;

fn cx(time: u64) -> Context {
    Context {
        start: time,
        end: time + 1,
        wall: (time as i64, time as i64),
        ..Context::default()
    }
}

fn name(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn attr(ino: Ino, mode: u32, nlink: u32, size: u64, blocks: u64, time: i64) -> Attr {
    let time = WallTime {
        sec: 0,
        nsec: time as u32,
    };
    Attr {
        ino,
        mode,
        nlink,
        size,
        blocks,
        mtime: time,
        ctime: time,
        ..Attr::default()
    }
}

fn create(state: &Model, text: &'static str, ino: Ino, time: u64) -> Model {
    let call = Call::Create {
        dir: ROOT,
        name: name(text),
        mode: 0o644,
        excl: true,
    };
    let reply = Reply::Entry(attr(ino, S_IFREG | 0o644, 1, 0, 0, time as i64));
    let mut next = state.apply(&call, &reply, &cx(time));
    assert_eq!(next.len(), 1);
    next.remove(0)
}

fn write(state: &Model, ino: Ino, offset: u64, len: u32, tag: u64, time: u64) -> (Call, Model) {
    let call = Call::Write {
        ino,
        offset,
        len,
        tag,
        append: false,
        sync: false,
    };
    let mut next = state.apply(&call, &Reply::Number(u64::from(len)), &cx(time));
    assert_eq!(next.len(), 1);
    (call, next.remove(0))
}

#[test]
fn names_sizes_and_links_follow_the_rules() {
    let state = create(&Model::new(S_IFDIR | 0o755), "a", 1024, 5);
    let root = state.get(ROOT).unwrap();
    assert_eq!((root.size, root.nlink), (1, 2));
    let link = Call::Link {
        ino: 1024,
        dir: ROOT,
        name: name("bb"),
    };
    let wrong = Reply::Entry(attr(1024, S_IFREG | 0o644, 1, 0, 0, 6));
    assert!(
        state.apply(&link, &wrong, &cx(6)).is_empty(),
        "nlink must be 2"
    );
    let mut right = attr(1024, S_IFREG | 0o644, 2, 0, 0, 6);
    right.mtime.nsec = 5;
    let state = state.apply(&link, &Reply::Entry(right), &cx(6)).remove(0);
    assert_eq!(state.get(ROOT).unwrap().size, 3);
    let again = state.apply(&link, &Reply::Err(Errno::EEXIST), &cx(7));
    assert_eq!(again.len(), 1);
    assert!(
        state
            .apply(&link, &Reply::Err(Errno::ENOENT), &cx(7))
            .is_empty()
    );
}

#[test]
fn readdir_order_is_that_of_creation() {
    let state = create(&Model::new(S_IFDIR | 0o755), "b", 1024, 5);
    let state = create(&state, "a", 1025, 10);
    let dots = [(ROOT, 4, name(".")), (ROOT, 4, name(".."))];
    let list = |rest: [(Ino, &'static str); 2]| {
        let rest = rest.map(|(ino, text)| (ino, 8, name(text)));
        Reply::Names(dots.iter().cloned().chain(rest).collect())
    };
    let call = Call::Readdir { ino: ROOT };
    let right = list([(1024, "b"), (1025, "a")]);
    assert_eq!(state.apply(&call, &right, &cx(20)).len(), 1);
    let wrong = list([(1025, "a"), (1024, "b")]);
    assert!(state.apply(&call, &wrong, &cx(20)).is_empty());
    let twice = list([(1024, "b"), (1024, "b")]);
    assert!(state.apply(&call, &twice, &cx(20)).is_empty());
}

#[test]
fn truncated_bytes_read_as_zeros_when_the_file_grows_again() {
    let state = create(&Model::new(S_IFDIR | 0o755), "a", 1024, 5);
    let (_, state) = write(&state, 1024, 0, 9000, 1, 6);
    let mut inode = state.get(1024).unwrap().clone();
    inode.truncate(100);
    inode.truncate(9000);
    assert_eq!(inode.blocks.len(), 1);
    let bytes = inode.read(0, 10_000);
    assert_eq!(bytes.len(), 9000);
    assert!(bytes[..100].iter().all(|byte| *byte != 0));
    assert!(bytes[100..].iter().all(|byte| *byte == 0));
}

#[test]
fn recovery_accepts_committed_states_and_in_place_overwrites_only() {
    let base = create(&Model::new(S_IFDIR | 0o755), "a", 1024, 5);
    let (_, before) = write(&base, 1024, 0, 5000, 1, 6);
    let (call, after) = write(&before, 1024, 100, 10, 2, 7);
    let observe = |state: &Model, data: &Model| {
        let mut seen = state.after_crash();
        for inode in seen.inodes.values_mut() {
            let inode = Rc::make_mut(inode);
            inode.memo.forget();
            inode.mtime = Stamp::exact(inode.mtime.low);
            inode.ctime = Stamp::exact(inode.ctime.low);
        }
        seen.get_mut(1024).blocks = data.get(1024).unwrap().blocks.clone();
        seen
    };
    let none = Later::default;
    let overwrite = || Later::new([&call]);
    let same = before.recovered_as(&observe(&before, &before), none);
    assert_eq!(same, Ok(()));
    // Later bytes may be there, but only if they were written.
    let torn = observe(&before, &after);
    assert!(before.recovered_as(&torn, none).is_err());
    assert!(before.recovered_as(&torn, overwrite).is_ok());
    // The state says the write is there: old bytes are a loss.
    let lost = observe(&after, &before);
    let text = after.recovered_as(&lost, none).unwrap_err();
    assert!(text.contains("byte 100"), "{text}");
    // A transaction is there whole or not at all.
    let whole = base.recovered_as(&observe(&before, &before), overwrite);
    assert!(whole.is_err());
}

#[test]
fn blocks_behind_the_end_are_left_only_by_a_truncate_cut_short() {
    let base = create(&Model::new(S_IFDIR | 0o755), "a", 1024, 5);
    let (_, long) = write(&base, 1024, 0, 20_000, 1, 6);
    let mut short = long.clone();
    short.get_mut(1024).truncate(5000);
    // The size is there, the blocks have not been freed.
    let mut seen = short.after_crash();
    for ino in [ROOT, 1024] {
        let inode = seen.get_mut(ino);
        inode.mtime = Stamp::exact(inode.mtime.low);
        inode.ctime = Stamp::exact(inode.ctime.low);
    }
    let old = long.get(1024).unwrap().blocks.clone();
    let freed = seen.clone();
    seen.get_mut(1024).blocks.insert(4, Rc::clone(&old[&4]));
    let none = Later::default;
    assert!(short.recovered_as(&freed, none).is_ok());
    assert!(short.recovered_as(&seen, none).is_err());
    let cut_short = || Later::default().with_cut_short([1024]);
    assert!(short.recovered_as(&freed, cut_short).is_ok());
    assert!(short.recovered_as(&seen, cut_short).is_ok());
    // A block within the size is no leftover.
    let mut hole = short.clone();
    hole.get_mut(1024).blocks.remove(&1);
    assert!(hole.recovered_as(&seen, cut_short).is_err());
    // The next write finishes it ...
    let (next_write, next) = write(&seen, 1024, 0, 10, 2, 9);
    assert_eq!(next.get(1024).unwrap().blocks.len(), 2);
    // ... in a transaction of its own, which frees from the first block on: after the
    // next crash that may be there without the write.
    seen.get_mut(1024).blocks.insert(3, Rc::clone(&old[&3]));
    let finishing = || Later::new([&next_write]);
    assert!(seen.recovered_as(&seen, none).is_ok());
    assert!(seen.recovered_as(&freed, none).is_err());
    for (left, right) in [(&[][..], true), (&[4], true), (&[3], false)] {
        let mut after = freed.clone();
        for block in left {
            let page = Rc::clone(&old[block]);
            after.get_mut(1024).blocks.insert(*block, page);
        }
        let judged = seen.recovered_as(&after, finishing);
        assert_eq!(judged.is_ok(), right, "{left:?}");
        let more = after.recovered_as(&seen, finishing);
        assert!(more.is_err(), "what was freed does not come back");
    }
}

#[test]
fn failures_are_tolerated_only_where_faults_are() {
    let state = create(&Model::new(S_IFDIR | 0o755), "a", 1024, 5);
    let call = Call::Setattr {
        ino: 1024,
        set: SetAttr {
            size: Some(10),
            ..SetAttr::default()
        },
    };
    let failed = Reply::Err(Errno::EIO);
    assert!(state.apply(&call, &failed, &cx(9)).is_empty());
    let mut faulty = cx(9);
    faulty.tolerance.io = true;
    assert_eq!(state.apply(&call, &failed, &faulty).len(), 2, "done or not");
    faulty.tolerance.space = true;
    let full = Reply::Err(Errno::ENOSPC);
    assert!(
        state.apply(&call, &full, &faulty).is_empty(),
        "truncate never allocates"
    );
}

#[test]
fn only_an_unlinked_and_closed_file_may_show_fewer_blocks() {
    let base = create(&Model::new(S_IFDIR | 0o755), "a", 1024, 5);
    let (_, linked) = write(&base, 1024, 0, 8192, 1, 6);
    let unlink = Call::Unlink {
        dir: ROOT,
        name: name("a"),
    };
    let open = linked.apply(&unlink, &Reply::Done, &cx(7)).remove(0);
    let release = Call::Release { ino: 1024 };
    let closed = open.apply(&release, &Reply::Done, &cx(8)).remove(0);
    let getattr = Call::Getattr { ino: 1024 };
    let answer = |nlink, blocks| {
        let mut attr = attr(1024, S_IFREG | 0o644, nlink, 8192, blocks, 6);
        attr.ctime.nsec = if nlink == 0 { 7 } else { 6 };
        Reply::Attr(attr)
    };
    let admits = |state: &Model, nlink, blocks| {
        let states = state.apply(&getattr, &answer(nlink, blocks), &cx(9));
        !states.is_empty()
    };
    assert!(admits(&linked, 1, 16) && !admits(&linked, 1, 8));
    assert!(admits(&open, 0, 16) && !admits(&open, 0, 8));
    assert!(admits(&closed, 0, 16) && admits(&closed, 0, 8) && admits(&closed, 0, 0));
    assert!(!admits(&closed, 0, 24), "it does not grow");
}

#[test]
fn a_synchronous_write_that_fails_may_be_there_only_if_its_commit_was_cut_off() {
    let state = create(&Model::new(S_IFDIR | 0o755), "a", 1024, 5);
    let call = |sync| Call::Write {
        ino: 1024,
        offset: 0,
        len: 5000,
        tag: 1,
        append: false,
        sync,
    };
    let sizes = |sync, error, link| -> Vec<u64> {
        let mut cx = cx(9);
        cx.tolerance.link = link;
        cx.tolerance.io = true;
        let states = state.apply(&call(sync), &Reply::Err(error), &cx);
        let sizes = states.iter().map(|state| state.get(1024).unwrap().size);
        sizes.collect()
    };
    assert_eq!(sizes(true, Errno::ENOLINK, true), [0, 5000]);
    assert_eq!(sizes(false, Errno::ENOLINK, true), [0]);
    assert_eq!(sizes(true, Errno::EIO, false), [0]);
    assert!(sizes(true, Errno::ENOLINK, false).is_empty());
}

//! What the model says of mappings, direct I/O, handles and refused requests.

use super::*;
use outrider_core::fs::api::SetAttr;

const FILE: Ino = 1024;

fn cx(time: u64) -> Context {
    Context {
        start: time,
        end: time + 1,
        ..Context::default()
    }
}

/// A file of 5000 bytes, all of write 1.
fn with_file() -> Model {
    let mut state = Model::new(S_IFDIR | 0o755);
    let create = Call::Create {
        dir: ROOT,
        name: Bytes::from_static(b"f"),
        mode: 0o666,
        excl: true,
    };
    state.answer(&create, FILE, &cx(1));
    let write = Call::Write {
        ino: FILE,
        offset: 0,
        len: 5000,
        tag: 1,
        append: false,
        sync: false,
    };
    state.answer(&write, 0, &cx(3));
    state
}

fn store(offset: u64, len: u32, tag: u64) -> Call {
    Call::MapWrite {
        ino: FILE,
        offset,
        len,
        tag,
    }
}

fn read(offset: u64, len: u32) -> Call {
    Call::Read {
        ino: FILE,
        offset,
        len,
    }
}

fn truncate(size: u64) -> Call {
    let set = SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    Call::Setattr { ino: FILE, set }
}

fn allows(state: &Model, call: &Call, reply: Reply) -> bool {
    !state.apply(call, &reply, &cx(50)).is_empty()
}

#[test]
fn everybody_sees_what_was_stored_and_a_crash_takes_it_along() {
    let old = with_file();
    let mut state = old.clone();
    assert_eq!(
        state.answer(&store(10, 20, 2), 0, &cx(5)),
        Reply::Number(20)
    );
    let stored = pattern(2, 10, 20);
    for call in [
        read(10, 20),
        Call::MapRead {
            ino: FILE,
            offset: 10,
            len: 20,
        },
    ] {
        assert!(allows(&state, &call, Reply::Bytes(stored.clone())));
        assert!(!allows(&state, &call, Reply::Bytes(pattern(1, 10, 20))));
    }
    assert_ne!(state.digest(), old.digest());
    assert_eq!(state.attr(FILE), old.attr(FILE), "nothing was written");
    let after = state.after_crash();
    assert_eq!(after.get(FILE).unwrap().read(10, 20), pattern(1, 10, 20));
}

#[test]
fn a_page_that_is_written_back_is_there_like_any_other() {
    let mut state = with_file();
    state.answer(&store(4990, 100, 2), 0, &cx(5));
    let page = state.get(FILE).unwrap().read(4096, 4096);
    assert_eq!(page.len(), 904, "no store reaches beyond the file");
    let call = Call::WritePages {
        ino: FILE,
        offset: 4096,
        data: Contents(page.into()),
    };
    state.answer(&call, 0, &cx(7));
    let file = state.get(FILE).unwrap();
    assert!(file.dirty.is_empty());
    assert_eq!((file.size, file.blocks.len()), (5000, 2));
    let after = state.after_crash();
    assert_eq!(
        after.get(FILE).unwrap().read(4990, 10),
        pattern(2, 4990, 10)
    );
}

#[test]
fn a_store_further_than_the_file_and_one_that_was_lost_are_refused() {
    let state = with_file();
    assert!(!allows(&state, &store(4990, 100, 2), Reply::Number(11)));
    assert!(allows(&state, &store(4990, 100, 2), Reply::Number(10)));
    assert!(!allows(&state, &store(6000, 1, 2), Reply::Number(1)));
    // What could not be written back is gone, if devices may fail.
    let mut state = state;
    state.answer(&store(0, 4096, 2), 0, &cx(5));
    let call = Call::WritePages {
        ino: FILE,
        offset: 0,
        data: Contents(pattern(2, 0, 4096)),
    };
    let failed = Reply::Err(Errno::EIO);
    assert!(!allows(&state, &call, failed.clone()));
    let mut fragile = cx(7);
    fragile.tolerance.io = true;
    let after = state.apply(&call, &failed, &fragile);
    assert_eq!(after.len(), 1);
    assert_eq!(after[0].get(FILE).unwrap().read(0, 9), pattern(1, 0, 9));
}

#[test]
fn truncation_cuts_what_was_stored() {
    let mut state = with_file();
    state.answer(&store(0, 4096, 2), 0, &cx(5));
    state.answer(&truncate(100), 0, &cx(7));
    state.answer(&truncate(5000), 0, &cx(9));
    let bytes = state.get(FILE).unwrap().read(0, 4096);
    assert_eq!(bytes[..100], pattern(2, 0, 100));
    assert!(bytes[100..].iter().all(|byte| *byte == 0));
    // A write beside the mapping is seen through it.
    let write = Call::Write {
        ino: FILE,
        offset: 50,
        len: 10,
        tag: 3,
        append: false,
        sync: false,
    };
    state.answer(&write, 0, &cx(11));
    assert_eq!(state.get(FILE).unwrap().read(50, 10), pattern(3, 50, 10));
}

#[test]
fn the_handle_of_what_was_deleted_is_stale_and_that_of_what_is_there_is_not() {
    let mut state = with_file();
    let call = Call::ByHandle { ino: FILE };
    let found = Reply::Entry(state.attr(FILE).unwrap());
    let stale = Reply::Err(Errno::ESTALE);
    assert!(allows(&state, &call, found.clone()));
    assert!(!allows(&state, &call, stale.clone()));
    let unlink = Call::Unlink {
        dir: ROOT,
        name: Bytes::from_static(b"f"),
    };
    // Held open or not: it has no name.
    for closed in [false, true] {
        if closed {
            state.answer(&Call::Release { ino: FILE }, 0, &cx(7));
        } else {
            state.answer(&unlink, 0, &cx(5));
        }
        let gone = Reply::Entry(state.attr(FILE).unwrap());
        assert!(!allows(&state, &call, gone));
        assert!(allows(&state, &call, stale.clone()));
    }
}

#[test]
fn a_directory_has_one_parent_at_a_time() {
    let mut state = Model::new(S_IFDIR | 0o755);
    for (dir, name, ino, time) in [(ROOT, "a", 7, 1), (ROOT, "b", 8, 3), (7, "c", 9, 5)] {
        let mkdir = Call::Mkdir {
            dir,
            name: Bytes::from_static(name.as_bytes()),
            mode: 0o777,
        };
        state.answer(&mkdir, ino, &cx(time));
    }
    let call = Call::HandleParent { ino: 9 };
    let is = |state: &Model, ino| Reply::Entry(state.attr(ino).unwrap());
    assert!(allows(&state, &call, is(&state, 7)));
    assert!(!allows(&state, &call, is(&state, 8)));
    assert!(!allows(&state, &call, Reply::Err(Errno::ESTALE)));
    let mut moving = cx(50);
    moving.weak = true;
    for reply in [is(&state, 8), Reply::Err(Errno::ESTALE)] {
        assert!(!state.apply(&call, &reply, &moving).is_empty());
    }
}

#[test]
fn what_must_be_refused_is_not_done() {
    let state = with_file();
    let exchange = Call::Exchange {
        dir: ROOT,
        name: Bytes::from_static(b"f"),
        to: ROOT,
        new: Bytes::from_static(b"f"),
        flags: 2,
    };
    let punch = Call::Punch {
        ino: FILE,
        mode: 3,
        offset: 0,
        len: 4096,
    };
    for (call, error) in [(exchange, Errno::EINVAL), (punch, Errno::EOPNOTSUPP)] {
        assert!(allows(&state, &call, Reply::Err(error)));
        assert!(!allows(&state, &call, Reply::Done));
        assert!(!allows(&state, &call, Reply::Err(Errno::EPERM)));
    }
}

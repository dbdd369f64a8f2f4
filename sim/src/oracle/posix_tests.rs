//! Histories with mappings, and what a crash may take along of them.

use super::*;
use crate::model::{Contents, ROOT, S_IFDIR, Stamp, pattern};
use bytes::Bytes;
use std::rc::Rc;

const FILE: Ino = 1024;

/// A judge, and a right filesystem that answers what it hears.
struct Stage {
    oracle: Oracle,
    state: Model,
    time: u64,
}

impl Stage {
    /// With a file of one page, all of write 1, that is open and synced.
    fn new() -> Self {
        let mut state = Model::new(S_IFDIR | 0o755);
        let root = state.get_mut(ROOT);
        root.mtime = Stamp::exact(0);
        root.ctime = Stamp::exact(0);
        let mut stage = Self {
            oracle: Oracle::new(state.clone()),
            state,
            time: 0,
        };
        stage.call(Call::Create {
            dir: ROOT,
            name: Bytes::from_static(b"f"),
            mode: 0o666,
            excl: true,
        });
        stage.call(Call::Write {
            ino: FILE,
            offset: 0,
            len: 4096,
            tag: 1,
            append: false,
            sync: false,
        });
        stage.call(Call::Syncfs);
        stage
    }

    fn cx(&mut self) -> Context {
        self.time += 2;
        Context {
            start: self.time,
            end: self.time + 1,
            ..Context::default()
        }
    }

    fn told(&mut self, call: Call, reply: Reply) {
        let cx = self.cx();
        let number = self.oracle.begin(call, cx);
        self.oracle.end(number, reply, cx);
    }

    fn call(&mut self, call: Call) {
        let cx = self.cx();
        let reply = self.state.answer(&call, FILE, &cx);
        self.told(call, reply);
    }

    fn store(&mut self, tag: u64) {
        self.call(Call::MapWrite {
            ino: FILE,
            offset: 0,
            len: 100,
            tag,
        });
    }

    fn write_back(&mut self) {
        let data = Contents(self.state.get(FILE).unwrap().read(0, 4096).into());
        self.call(Call::WritePages {
            ino: FILE,
            offset: 0,
            data,
        });
    }

    /// What another mount finds whose file has these first bytes.
    fn recovered(&mut self, first: Bytes) -> Result<(), Violation> {
        let mut found = self.state.after_crash();
        let file = found.get_mut(FILE);
        let page = file.blocks.get_mut(&0).unwrap();
        let page = Rc::make_mut(page).bytes_mut();
        page[..first.len()].copy_from_slice(&first);
        self.oracle.recovered(&found)
    }
}

fn read(len: u32) -> Call {
    Call::Read {
        ino: FILE,
        offset: 0,
        len,
    }
}

#[test]
fn a_read_that_does_not_see_a_store_is_refused_on_every_mount() {
    for seat in [0, 7] {
        for (tag, right) in [(2, true), (1, false)] {
            let mut stage = Stage::new();
            stage.store(2);
            let cx = Context { seat, ..stage.cx() };
            let number = stage.oracle.begin(read(100), cx);
            let reply = Reply::Bytes(pattern(tag, 0, 100));
            stage.oracle.end(number, reply, cx);
            stage.write_back();
            assert_eq!(stage.oracle.quiet().is_ok(), right, "{seat} {tag}");
        }
    }
}

#[test]
fn what_was_stored_and_synced_is_there_after_a_crash() {
    for (tag, right) in [(2, true), (1, false)] {
        let mut stage = Stage::new();
        stage.store(2);
        stage.write_back();
        stage.call(Call::Fsync { ino: FILE });
        stage.oracle.quiet().unwrap();
        assert_eq!(
            stage.recovered(pattern(tag, 0, 100)).is_ok(),
            right,
            "{tag}"
        );
    }
}

#[test]
fn what_nobody_wrote_back_is_lost_and_nothing_half_is_there() {
    for (first, right) in [
        (pattern(1, 0, 100), true),
        // The kernel has told nobody about it.
        (pattern(2, 0, 100), false),
    ] {
        let mut stage = Stage::new();
        stage.store(2);
        stage.oracle.quiet().unwrap();
        assert_eq!(stage.recovered(first).is_ok(), right);
    }
    // Written in place and not committed, both may show; nothing else may.
    for (tag, right) in [(1, true), (2, true), (3, false)] {
        let mut stage = Stage::new();
        let before = stage.state.clone();
        stage.store(2);
        stage.write_back();
        stage.oracle.quiet().unwrap();
        stage.state = before;
        assert_eq!(
            stage.recovered(pattern(tag, 0, 100)).is_ok(),
            right,
            "{tag}"
        );
    }
}

#[test]
fn a_failed_write_back_takes_the_store_along() {
    let mut stage = Stage::new();
    stage.store(2);
    let mut cx = stage.cx();
    cx.tolerance.io = true;
    let call = Call::WritePages {
        ino: FILE,
        offset: 0,
        data: Contents(pattern(2, 0, 4096)),
    };
    let number = stage.oracle.begin(call, cx);
    stage.oracle.end(number, Reply::Err(Errno::EIO), cx);
    stage.told(read(100), Reply::Bytes(pattern(1, 0, 100)));
    stage.oracle.quiet().unwrap();
}

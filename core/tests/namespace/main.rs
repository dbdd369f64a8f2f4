//! The namespace against a model, with a fault at any item operation, and the
//! promises of the spec one by one.
//!
//! The filesystem layer is compiled here once more over a log in memory
//! (`log.rs`), which can fail at each item operation and shows every item, so
//! the invariants of spec 12 section 22 are checked after each step. How the
//! layers work together is the simulator's to test.
#![allow(dead_code, unused_imports, missing_docs, unreachable_pub)]

#[path = "../../src/fs/mod.rs"]
mod fs;
mod log;
#[path = "../model/mod.rs"]
mod model;

pub(crate) use outrider_core::{env, errno, format, locks};

use crate::env::Entropy;
use crate::env::testing::{TestEntropy, TestWorld};
use crate::env::{LocalBoxFuture, WallTime};
use crate::errno::Errno as E;
use crate::format::{Dirent, Key, KeyRange, NetLock, ROOT_INO};
use crate::format::{OpenInoMap, OpenInoMapArgs};
use crate::fs::api::Ino;
use crate::fs::api::{Caller, Inval, KernelCache, Posix, SetAttr, SetTime, StatFs, XattrSet};
use crate::fs::inode::{S_IFDIR, S_IFIFO, S_IFMT, S_IFREG};
use crate::fs::*;
use crate::fs::{api, tags};
use crate::locks::{LockError, LockHooks, LockTransport, Locks, Mode, Scope};
use crate::log::Log;
use crate::model::{Model, Node};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::rc::Rc;

/// Grants everything at once, as a server with one client would.
#[derive(Default)]
struct GrantAll {
    locks: RefCell<Option<Locks>>,
    seq: Cell<u64>,
}

impl LockTransport for GrantAll {
    fn request(&self, mut lock: NetLock) -> Result<(), LockError> {
        self.seq.set(self.seq.get() + 1);
        lock.write_seq = self.seq.get().into();
        let locks = self.locks.borrow().clone().unwrap();
        locks.on_grant(&lock);
        Ok(())
    }
}

struct Hooks(Rc<Log>);

impl LockHooks for Hooks {
    fn trans_seq(&self) -> u64 {
        self.0.trans_seq()
    }
    fn commit(&self) -> LocalBoxFuture<'static, ()> {
        Box::pin(async {})
    }
    fn revoke(&self, _: Scope, _: Mode) -> LocalBoxFuture<'static, ()> {
        Box::pin(async {})
    }
    fn has_cached(&self, _: &KeyRange, _: bool) -> bool {
        false
    }
}

#[derive(Default)]
struct Kernel(RefCell<Vec<Inval>>);

impl KernelCache for Kernel {
    fn invalidate(&self, what: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        self.0.borrow_mut().extend(what);
        Box::pin(async { Vec::new() })
    }
}

#[derive(Default)]
struct Server {
    next_ino: Cell<u64>,
    open_elsewhere: RefCell<BTreeSet<Ino>>,
}

impl ServerRequests for Server {
    fn alloc_inodes(&self, count: u64) -> LocalBoxFuture<'static, Result<(Ino, u64), E>> {
        let ino = self.next_ino.get();
        self.next_ino.set(ino + count);
        Box::pin(async move { Ok((ino, count)) })
    }
    fn statfs(&self) -> LocalBoxFuture<'static, Result<StatFs, E>> {
        Box::pin(async { Ok(StatFs::default()) })
    }
    fn open_ino_map(&self, args: OpenInoMapArgs) -> LocalBoxFuture<'static, Result<OpenInoMap, E>> {
        let mut map = OpenInoMap {
            args,
            ..OpenInoMap::default()
        };
        for ino in self
            .open_elsewhere
            .borrow()
            .iter()
            .filter(|i| **i >> 10 == args.group_nr.get())
        {
            let bit = ino & 1023;
            let word = &mut map.bits[(bit / 64) as usize];
            *word = (word.get() | 1 << (bit % 64)).into();
        }
        Box::pin(async move { Ok(map) })
    }
}

struct World {
    world: TestWorld,
    fs: Rc<Fs>,
    log: Rc<Log>,
    kernel: Rc<Kernel>,
    server: Rc<Server>,
}

static ROOT: Caller = Caller {
    uid: 0,
    gid: 0,
    pid: 1,
    groups: Vec::new(),
};

fn user(uid: u32, gid: u32) -> Caller {
    Caller {
        uid,
        gid,
        pid: 1,
        groups: Vec::new(),
    }
}

impl World {
    fn new(fmt_vers: u64) -> Self {
        let world = TestWorld::new(1, 1 << 20, 1 << 20);
        let log = Rc::new(Log::default());
        log.seq.set(5000);
        let transport = Rc::new(GrantAll::default());
        let locks = Locks::new(
            world.env(),
            crate::locks::Policy::default(),
            transport.clone(),
        );
        *transport.locks.borrow_mut() = Some(locks.clone());
        locks.set_hooks(Rc::new(Hooks(log.clone())));
        let kernel = Rc::new(Kernel::default());
        let server = Rc::new(Server::default());
        server.next_ino.set(1024);
        let config = Config {
            fmt_vers,
            policy: Policy::default(),
        };
        let fs = Fs::new(
            world.env(),
            log.clone(),
            locks,
            server.clone(),
            kernel.clone(),
            world.data.handle(),
            config,
        );
        let root = Inode::new(ROOT_INO, S_IFDIR | 0o755, 2, WallTime::default());
        let value = Bytes::copy_from_slice(root.encode().to_value(fmt_vers));
        log.items.borrow_mut().insert(Key::inode(ROOT_INO), value);
        log.items
            .borrow_mut()
            .insert(Key::meta_seq(0, ROOT_INO), Bytes::new());
        Self {
            world,
            fs,
            log,
            kernel,
            server,
        }
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.world.block_on(future)
    }

    fn mkdir(&self, parent: Ino, name: &str) -> Result<Ino, E> {
        self.run(self.fs.mkdir(&ROOT, parent, name.as_bytes(), 0o777, 0o22))
            .map(|e| e.attr.ino)
    }
    fn create(&self, parent: Ino, name: &str) -> Result<(Ino, u64), E> {
        let made = self.run(
            self.fs
                .create(&ROOT, parent, name.as_bytes(), 0o666, 0o22, 0o302),
        );
        made.map(|(e, o)| (e.attr.ino, o.fh))
    }
    fn file(&self, parent: Ino, name: &str) -> Ino {
        let (ino, fh) = self.create(parent, name).unwrap();
        self.run(self.fs.release(ino, fh));
        ino
    }
    fn lookup(&self, parent: Ino, name: &str) -> Result<api::Attr, E> {
        let entry = self.run(self.fs.lookup(&ROOT, parent, name.as_bytes()))?;
        self.fs.forget(entry.attr.ino, 1);
        Ok(entry.attr)
    }
    fn attr(&self, ino: Ino) -> Result<api::Attr, E> {
        self.run(self.fs.getattr(&ROOT, ino)).map(|(attr, _)| attr)
    }
    fn unlink(&self, parent: Ino, name: &str) -> Result<(), E> {
        self.run(self.fs.unlink(&ROOT, parent, name.as_bytes()))
    }
    fn rmdir(&self, parent: Ino, name: &str) -> Result<(), E> {
        self.run(self.fs.rmdir(&ROOT, parent, name.as_bytes()))
    }
    fn rename(&self, from: Ino, a: &str, to: Ino, b: &str, flags: u32) -> Result<(), E> {
        self.run(
            self.fs
                .rename(&ROOT, from, a.as_bytes(), to, b.as_bytes(), flags),
        )
    }
    fn list(&self, dir: Ino) -> Vec<(String, Ino, u64)> {
        let mut names = Vec::new();
        self.run(self.fs.readdir(&ROOT, dir, 0, 0, false, &mut |e| {
            names.push((String::from_utf8(e.name.to_vec()).unwrap(), e.ino, e.next));
            true
        }))
        .unwrap();
        names
    }
    fn set(&self, ino: Ino, name: &str, value: &[u8]) -> Result<(), E> {
        self.run(
            self.fs
                .setxattr(&ROOT, ino, name.as_bytes(), value, XattrSet::Any),
        )
    }
    fn get(&self, ino: Ino, name: &str) -> Result<Vec<u8>, E> {
        self.run(self.fs.getxattr(&ROOT, ino, name.as_bytes()))
            .map(|v| v.to_vec())
    }
    fn remove(&self, ino: Ino, name: &str) -> Result<(), E> {
        self.run(self.fs.removexattr(&ROOT, ino, name.as_bytes()))
    }
    fn names(&self, ino: Ino) -> Vec<String> {
        let list = self.run(self.fs.listxattr(&ROOT, ino)).unwrap();
        let mut names: Vec<String> = list
            .split(|b| *b == 0)
            .filter(|n| !n.is_empty())
            .map(|n| String::from_utf8(n.to_vec()).unwrap())
            .collect();
        names.sort();
        names
    }
    fn has(&self, key: Key) -> bool {
        self.log.items.borrow().contains_key(&key)
    }
    fn set_flags(&self, ino: Ino, flags: u32) {
        let mut items = self.log.items.borrow_mut();
        let value = items.get_mut(&Key::inode(ino)).unwrap();
        let mut inode = Inode::decode(ino, value, 2).unwrap();
        inode.flags = flags;
        *value = Bytes::copy_from_slice(inode.encode().to_value(2));
    }

    /// The invariants of spec 12 section 22, 11 section 12 and 13 section 17.
    fn check(&self) {
        let items = self.log.items.borrow();
        let mut inodes = BTreeMap::new();
        let mut used: BTreeMap<Ino, u64> = BTreeMap::new();
        let (mut entries, mut parts) = (BTreeMap::new(), BTreeMap::new());
        let mut counts = [0usize; 3];
        let mut names = BTreeSet::new();
        for (key, value) in items.iter() {
            if key.zone == format::ZONE_FS {
                used.insert(key.first, 0);
            }
            match (key.zone, key.kind) {
                (format::ZONE_FS, format::TYPE_INODE) => {
                    inodes.insert(key.first, Inode::decode(key.first, value, 2).unwrap());
                }
                (format::ZONE_FS, format::TYPE_DIRENT) => {
                    let (head, name) = Dirent::from_value(value).unwrap();
                    assert_eq!(head.hash.get(), format::dirent_hash(name));
                    assert_eq!((head.hash.get(), head.pos.get()), (key.second, key.third));
                    let (ino, pos) = (head.ino.get(), head.pos.get());
                    for twin in [
                        Key::readdir(key.first, pos),
                        Key::link_backref(ino, key.first, pos),
                    ] {
                        assert_eq!(items.get(&twin), Some(value), "{twin}");
                    }
                    assert!(names.insert((key.first, name.to_vec())), "name twice");
                    entries.insert((key.first, pos), (ino, head.kind, name.len() as u64));
                    counts[0] += 1;
                }
                (format::ZONE_FS, format::TYPE_READDIR) => counts[1] += 1,
                (format::ZONE_FS, format::TYPE_LINK_BACKREF) => counts[2] += 1,
                (format::ZONE_FS, format::TYPE_XATTR) => {
                    parts.insert(
                        (key.first, key.second, key.third, key.fourth),
                        value.clone(),
                    );
                }
                _ => {}
            }
        }
        assert_eq!(counts, [counts[0]; 3], "each entry has three items");
        for (ino, inode) in &inodes {
            let mine: Vec<_> = entries.iter().filter(|((d, _), _)| d == ino).collect();
            assert_eq!(self_orphan(&items, *ino), inode.nlink == 0, "orphan {ino}");
            let refs = entries
                .values()
                .filter(|(target, ..)| target == ino)
                .count() as u32;
            if inode.is_dir() {
                let subdirs = mine
                    .iter()
                    .filter(|(_, (_, k, _))| *k == format::DT_DIR)
                    .count();
                let expected = if *ino == ROOT_INO || refs == 1 {
                    2 + subdirs as u32
                } else {
                    0
                };
                assert_eq!(inode.nlink, expected, "nlink of directory {ino}");
                assert_eq!(
                    inode.size,
                    mine.iter().map(|(_, (.., len))| len).sum::<u64>()
                );
                assert!(
                    mine.iter()
                        .all(|((_, pos), _)| *pos < inode.next_readdir_pos)
                );
            } else {
                assert_eq!(inode.nlink, refs, "nlink of {ino}");
                assert!(mine.is_empty());
            }
            for (_, (target, kind, _)) in mine {
                let target = &inodes[target];
                assert_eq!(format::dirent_type(target.mode), Some(*kind));
            }
            assert!(
                items.contains_key(&Key::meta_seq(inode.meta_seq, *ino)),
                "meta index {ino}"
            );
            let data = items.contains_key(&Key::data_seq(inode.data_seq, *ino));
            assert_eq!(data, inode.is_reg(), "data index {ino}");
        }
        let index = items
            .keys()
            .filter(|k| k.zone == format::ZONE_INODE_INDEX)
            .count();
        let regular = inodes.values().filter(|i| i.is_reg()).count();
        assert_eq!(index, inodes.len() + regular, "no stray index items");
        let orphans = items
            .keys()
            .filter(|k| k.zone == format::ZONE_ORPHAN)
            .count();
        assert_eq!(orphans, inodes.values().filter(|i| i.nlink == 0).count());
        assert!(
            used.keys().all(|ino| inodes.contains_key(ino)),
            "items without inode"
        );
        assert_eq!(self.log.count.get() + 1, inodes.len() as i64, "inode count");
        check_xattrs(&items, &inodes, &parts);
    }
}

fn self_orphan(items: &BTreeMap<Key, Bytes>, ino: Ino) -> bool {
    items.contains_key(&Key::orphan(ino))
}

type Parts = BTreeMap<(Ino, u64, u64, u8), Bytes>;

fn check_xattrs(items: &BTreeMap<Key, Bytes>, inodes: &BTreeMap<Ino, Inode>, parts: &Parts) {
    let mut totals: BTreeMap<Key, (u64, u64)> = BTreeMap::new();
    let mut indexed = BTreeSet::new();
    let mut expected = 0;
    for (&(ino, hash, id, part), first) in parts.iter().filter(|(k, _)| k.3 == 0) {
        let (val_len, name_len) = (u16::from_le_bytes([first[0], first[1]]), first[2]);
        let total = 8 + usize::from(name_len) + usize::from(val_len);
        let nr = total.div_ceil(896);
        expected += nr;
        let lens: usize = (0..nr)
            .map(|p| parts[&(ino, hash, id, part + p as u8)].len())
            .sum();
        assert_eq!(lens, total);
        let name = &first[8..8 + usize::from(name_len)];
        assert_eq!(u64::from(format::xattr_hash(name)), hash);
        assert!(id < inodes[&ino].next_xattr_id);
        let tags = tags::Tags::parse(name).unwrap();
        if tags.totl {
            let sum = totals.entry(tags::totl_key(name).unwrap()).or_default();
            let value = tags::parse_number(&first[8 + name.len()..]).unwrap();
            *sum = (sum.0.wrapping_add(value), sum.1 + 1);
        }
        if tags.indx {
            let (major, minor) = tags::indx_numbers(name).unwrap();
            indexed.insert(Key::xattr_indx(major, minor, ino, id));
        }
    }
    assert_eq!(parts.len(), expected, "no stray xattr parts");
    let stored: BTreeSet<Key> = items
        .keys()
        .filter(|k| k.zone == format::ZONE_XATTR_INDX)
        .copied()
        .collect();
    assert_eq!(stored, indexed);
    totals.retain(|_, sum| *sum != (0, 0));
    for (key, (total, count)) in &totals {
        let value = [total.to_le_bytes(), count.to_le_bytes()].concat();
        assert_eq!(items[key], value[..]);
    }
    let all = items
        .keys()
        .filter(|k| k.zone == format::ZONE_XATTR_TOTL)
        .count();
    assert_eq!(all, totals.len());
}

#[test]
fn a_new_file_has_all_its_items() {
    let w = World::new(2);
    let dir = w.mkdir(1, "dir").unwrap();
    let ino = w.file(dir, "file");
    assert_eq!(w.attr(ROOT_INO).unwrap().nlink, 3);
    let attr = w.lookup(dir, "file").unwrap();
    assert_eq!((attr.ino, attr.mode, attr.nlink), (ino, S_IFREG | 0o644, 1));
    assert_ne!(
        dir & !1023,
        ino & !1023,
        "directories and files use different groups"
    );
    assert!(w.has(Key::data_seq(5000, ino)) && w.has(Key::meta_seq(5000, ino)));
    assert_eq!(w.attr(dir).unwrap().size, 4);
    w.check();
}

#[test]
fn create_completes_on_the_first_poll() {
    let w = World::new(2);
    w.file(1, "warm");
    w.world.exec.make_yields_free();
    let mut future = std::pin::pin!(w.fs.create(&ROOT, 1, b"f", 0o644, 0, 2));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(future.as_mut().poll(&mut cx).is_ready());
}

#[test]
fn names_are_checked() {
    let w = World::new(2);
    let long = "x".repeat(256);
    assert_eq!(w.mkdir(1, &long), Err(E::ENAMETOOLONG));
    assert_eq!(w.lookup(1, &long), Err(E::ENAMETOOLONG));
    assert!(w.mkdir(1, &long[..255]).is_ok());
    assert_eq!(w.lookup(1, "nothing"), Err(E::ENOENT));
    let file = w.file(1, "file");
    assert_eq!(w.lookup(file, "x"), Err(E::ENOTDIR));
    assert_eq!(w.mkdir(file, "x"), Err(E::ENOTDIR));
    assert_eq!(w.mkdir(1, "file"), Err(E::EEXIST));
    assert_eq!(w.mkdir(77777, "x"), Err(E::ESTALE));
    w.check();
}

#[test]
fn removal_checks_types_and_emptiness() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    w.file(dir, "f");
    assert_eq!(w.unlink(1, "d"), Err(E::EISDIR));
    assert_eq!(w.rmdir(dir, "f"), Err(E::ENOTDIR));
    assert_eq!(w.rmdir(1, "d"), Err(E::ENOTEMPTY));
    w.unlink(dir, "f").unwrap();
    w.rmdir(1, "d").unwrap();
    assert_eq!(w.attr(dir), Err(E::ESTALE), "deleted in the call");
    assert_eq!(w.mkdir(dir, "x"), Err(E::ESTALE));
    w.check();
    assert_eq!(w.log.count.get(), 0);
}

#[test]
fn an_open_file_outlives_its_name() {
    let w = World::new(2);
    let (ino, fh) = w.create(1, "f").unwrap();
    w.unlink(1, "f").unwrap();
    assert_eq!(w.attr(ino).unwrap().nlink, 0);
    w.check();
    assert_eq!(w.run(w.fs.lookup(&ROOT, ino, b".")), Err(E::ESTALE));
    let again = w.run(w.fs.open(&ROOT, ino, 0)).unwrap();
    w.run(w.fs.release(ino, fh));
    assert!(w.attr(ino).is_ok());
    w.run(w.fs.release(ino, again.fh));
    assert_eq!(w.attr(ino), Err(E::ESTALE));
    w.check();
}

#[test]
fn a_removed_open_directory_takes_no_entries() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let fh = w.run(w.fs.opendir(&ROOT, dir, 0)).unwrap().fh;
    w.rmdir(1, "d").unwrap();
    assert_eq!(w.mkdir(dir, "x"), Err(E::ENOENT));
    let file = w.file(1, "f");
    assert_eq!(w.run(w.fs.link(&ROOT, file, dir, b"x")), Err(E::ENOENT));
    assert_eq!(w.rename(1, "f", dir, "x", 0), Err(E::ENOENT));
    w.check();
    w.run(w.fs.releasedir(dir, fh));
    w.check();
    assert_eq!(w.fs.table.state_len(), 0);
}

#[test]
fn a_tmpfile_lives_while_open_or_linked() {
    let w = World::new(2);
    let (entry, opened) = w.run(w.fs.tmpfile(&ROOT, 1, 0o600, 0, 2)).unwrap();
    let ino = entry.attr.ino;
    assert_eq!(entry.attr.nlink, 0);
    w.check();
    let linked = w.run(w.fs.link(&ROOT, ino, 1, b"named")).unwrap();
    assert_eq!(linked.attr.nlink, 1);
    w.run(w.fs.release(ino, opened.fh));
    assert_eq!(w.lookup(1, "named").unwrap().ino, ino);
    w.check();
    let (entry, opened) = w.run(w.fs.tmpfile(&ROOT, 1, 0o600, 0, 2)).unwrap();
    w.run(w.fs.release(entry.attr.ino, opened.fh));
    assert_eq!(w.attr(entry.attr.ino), Err(E::ESTALE));
    w.check();
}

#[test]
fn hard_links_count() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let ino = w.file(1, "a");
    w.run(w.fs.link(&ROOT, ino, dir, b"b")).unwrap();
    assert_eq!(w.run(w.fs.link(&ROOT, ino, dir, b"b")), Err(E::EEXIST));
    assert_eq!(w.run(w.fs.link(&ROOT, dir, 1, b"c")), Err(E::EPERM));
    assert_eq!(w.attr(ino).unwrap().nlink, 2);
    w.rename(1, "a", dir, "b", 0).unwrap();
    assert_eq!(w.attr(ino).unwrap().nlink, 2, "two names of one inode stay");
    w.unlink(1, "a").unwrap();
    assert_eq!(w.attr(ino).unwrap().nlink, 1);
    let (names, end) = w.run(w.fs.next_backrefs(ino, 0, 0, 9)).unwrap();
    assert!(end && names.len() == 1 && names[0].0 == dir);
    let path = w.run(w.fs.path(ino, 0, 0)).unwrap();
    assert_eq!(path, [&b"d"[..], b"b"]);
    w.check();
}

#[test]
fn rename_keeps_the_tree_a_tree() {
    let w = World::new(2);
    let a = w.mkdir(1, "a").unwrap();
    let b = w.mkdir(a, "b").unwrap();
    let c = w.mkdir(b, "c").unwrap();
    assert_eq!(w.rename(1, "a", c, "x", 0), Err(E::EINVAL));
    assert_eq!(w.rename(1, "a", a, "x", 0), Err(E::EINVAL));
    assert_eq!(w.rename(b, "c", 1, "a", 0), Err(E::ENOTEMPTY));
    w.file(b, "f");
    assert_eq!(w.rename(b, "f", 1, "a", 0), Err(E::ENOTEMPTY));
    assert_eq!(w.rename(b, "f", b, "c", 0), Err(E::EISDIR));
    assert_eq!(w.rename(b, "c", b, "f", 0), Err(E::ENOTDIR));
    assert_eq!(w.rename(1, "a", 1, "z", 2), Err(E::EINVAL));
    assert_eq!(
        w.rename(b, "f", 1, "a", 1),
        Err(E::ENOTEMPTY),
        "the path is checked first"
    );
    w.rename(b, "c", 1, "c", 0).unwrap();
    assert_eq!((w.attr(1).unwrap().nlink, w.attr(b).unwrap().nlink), (4, 2));
    w.rename(1, "c", a, "b2", 0).unwrap();
    assert_eq!(w.rename(a, "b2", a, "b", 0), Err(E::ENOTEMPTY));
    assert_eq!(w.rename(a, "b2", a, "b", 1), Err(E::EEXIST));
    w.check();
    assert_eq!(w.run(w.fs.lookup(&ROOT, c, b"..")).unwrap().attr.ino, a);
}

#[test]
fn readdir_goes_on_where_it_was() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    for n in 0..10 {
        w.file(dir, &format!("f{n}"));
    }
    w.unlink(dir, "f3").unwrap();
    let all = w.list(dir);
    assert_eq!(all[0], (".".into(), dir, 1));
    assert_eq!(all[1], ("..".into(), ROOT_INO, 2));
    assert_eq!(all[4].2, 6, "the position of the next existing entry");
    assert_eq!(all.last().unwrap().2, 12, "one past the last");
    for (at, (_, _, next)) in all.iter().enumerate() {
        let mut rest = Vec::new();
        w.run(w.fs.readdir(&ROOT, dir, 0, *next, true, &mut |e| {
            assert!(e.entry.is_none_or(|entry| entry.attr.ino == e.ino));
            rest.push(e.name.to_vec());
            true
        }))
        .unwrap();
        let names: Vec<_> = all[at + 1..]
            .iter()
            .map(|e| e.0.as_bytes().to_vec())
            .collect();
        assert_eq!(rest, names);
    }
}

#[test]
fn symlinks_hold_any_target() {
    let w = World::new(2);
    for len in [1, 895, 896, 1791, 1792, 4095] {
        let target = "t".repeat(len);
        let name = format!("s{len}");
        let entry = w
            .run(w.fs.symlink(&ROOT, 1, name.as_bytes(), target.as_bytes()))
            .unwrap();
        assert_eq!(entry.attr.size, len as u64 + 1);
        assert_eq!(entry.attr.mode & 0o7777, 0o777);
        assert_eq!(
            w.run(w.fs.readlink(&ROOT, entry.attr.ino)).unwrap(),
            target.as_bytes()
        );
        w.unlink(1, &name).unwrap();
        w.check();
    }
    assert_eq!(
        w.run(w.fs.symlink(&ROOT, 1, b"s", &[b'x'; 4096])),
        Err(E::ENAMETOOLONG)
    );
    assert_eq!(w.run(w.fs.symlink(&ROOT, 1, b"s", b"")), Err(E::ENOENT));
    assert_eq!(w.run(w.fs.readlink(&ROOT, 1)), Err(E::EINVAL));
}

#[test]
fn groups_follow_a_setgid_directory() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let set = SetAttr {
        mode: Some(0o2777),
        gid: Some(50),
        ..SetAttr::default()
    };
    w.run(w.fs.setattr(&ROOT, dir, &set)).unwrap();
    let cx = user(7, 8);
    let sub = w.run(w.fs.mkdir(&cx, dir, b"sub", 0o755, 0)).unwrap().attr;
    assert_eq!((sub.uid, sub.gid, sub.mode), (7, 50, S_IFDIR | 0o2755));
    let file = w
        .run(w.fs.mknod(&cx, dir, b"f", S_IFREG | 0o2755, 0, 0))
        .unwrap()
        .attr;
    assert_eq!(
        (file.gid, file.mode),
        (50, S_IFREG | 0o755),
        "not in the group"
    );
    let plain = w
        .run(w.fs.mknod(&cx, 1, b"p", S_IFIFO | 0o666, 0, 0o27))
        .unwrap()
        .attr;
    assert_eq!((plain.gid, plain.mode), (8, S_IFIFO | 0o640));
    let dev = w
        .run(w.fs.mknod(&ROOT, 1, b"null", 0o020666, 1 << 20 | 3, 0))
        .unwrap()
        .attr;
    assert_eq!(dev.rdev, 0x0010_0003);
    w.check();
}

#[test]
fn setattr_strips_and_stamps() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    w.set(ino, "security.capability", b"cap").unwrap();
    let mode = SetAttr {
        mode: Some(0o6755),
        ..SetAttr::default()
    };
    assert_eq!(
        w.run(w.fs.setattr(&ROOT, ino, &mode)).unwrap().0.mode & 0o7777,
        0o6755
    );
    let owner = SetAttr {
        uid: Some(9),
        ..SetAttr::default()
    };
    let attr = w.run(w.fs.setattr(&ROOT, ino, &owner)).unwrap().0;
    assert_eq!((attr.mode & 0o7777, attr.uid), (0o755, 9));
    assert_eq!(w.get(ino, "security.capability"), Err(E::ENODATA));
    let at = WallTime { sec: -5, nsec: 7 };
    let times = SetAttr {
        mtime: Some(SetTime::At(at)),
        atime: Some(SetTime::Now),
        ..SetAttr::default()
    };
    let attr = w.run(w.fs.setattr(&ROOT, ino, &times)).unwrap().0;
    assert_eq!(attr.mtime, at);
    let size = SetAttr {
        size: Some(1),
        ..SetAttr::default()
    };
    assert_eq!(w.run(w.fs.setattr(&ROOT, 1, &size)), Err(E::EISDIR));
    w.check();
}

#[test]
fn retention_forbids_change_but_not_links() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    w.file(1, "g");
    w.set(ino, "user.a", b"1").unwrap();
    w.set_flags(ino, 2);
    assert_eq!(w.unlink(1, "f"), Err(E::EPERM));
    assert_eq!(w.rename(1, "f", 1, "h", 0), Err(E::EPERM));
    assert_eq!(w.rename(1, "g", 1, "f", 0), Err(E::EPERM));
    let mode = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    assert_eq!(w.run(w.fs.setattr(&ROOT, ino, &mode)), Err(E::EPERM));
    assert_eq!(w.set(ino, "user.a", b"2"), Err(E::EPERM));
    assert_eq!(w.remove(ino, "user.a"), Err(E::EPERM));
    w.set(ino, "trusted.a", b"2").unwrap();
    w.run(w.fs.link(&ROOT, ino, 1, b"link")).unwrap();
    w.check();
}

#[test]
fn xattrs_of_every_size_come_back() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    let sizes = [
        0, 1, 879, 880, 881, 1775, 1776, 5000, 65535, 900, 3, 65535, 0,
    ];
    for (n, size) in sizes.into_iter().enumerate() {
        let value = vec![n as u8; size];
        w.set(ino, "user.test", &value).unwrap();
        assert_eq!(w.get(ino, "user.test").unwrap(), value);
        w.check();
    }
    assert_eq!(w.set(ino, "user.test", &[0; 65536]), Err(E::E2BIG));
    assert_eq!(w.names(ino), ["user.test"]);
    w.remove(ino, "user.test").unwrap();
    assert_eq!(w.remove(ino, "user.test"), Err(E::ENODATA));
    assert_eq!(w.get(ino, "user.test"), Err(E::ENODATA));
    w.check();
    let value = w.run(w.fs.setxattr(&ROOT, ino, b"user.x", b"", XattrSet::Replace));
    assert_eq!(value, Err(E::ENODATA));
    w.set(ino, "user.x", b"").unwrap();
    let value = w.run(w.fs.setxattr(&ROOT, ino, b"user.x", b"", XattrSet::Create));
    assert_eq!(value, Err(E::EEXIST));
}

#[test]
fn the_first_xattr_has_the_bytes_of_the_spec() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    w.set(ino, "user.test", b"value").unwrap();
    let key = Key::xattr(ino, 0xf217_78d1, 0, 0);
    let value = [&[5, 0, 9, 0, 0, 0, 0, 0], &b"user.testvalue"[..]].concat();
    assert_eq!(w.log.items.borrow()[&key], value[..]);
}

#[test]
fn xattr_names_have_their_namespaces() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    for (name, error) in [
        ("user.", E::EINVAL),
        ("trusted.", E::EINVAL),
        ("system.foo", E::EOPNOTSUPP),
        ("nodot", E::EOPNOTSUPP),
        ("scoutfs.foobar", E::EINVAL),
        ("scoutfs.hide.hide.x", E::EINVAL),
        ("scoutfs.totl.a.b.1.2", E::EINVAL),
        ("scoutfs.indx.t.256.1", E::EINVAL),
    ] {
        assert_eq!(w.set(ino, name, b"1"), Err(error), "{name}");
    }
    let fifo = w
        .run(w.fs.mknod(&ROOT, 1, b"p", S_IFIFO, 0, 0))
        .unwrap()
        .attr
        .ino;
    assert_eq!(w.set(fifo, "user.a", b""), Err(E::EPERM));
    w.set(fifo, "trusted.a", b"").unwrap();
    w.set(ino, "scoutfs.hide.a", b"").unwrap();
    w.set(ino, "scoutfs.foo", b"").unwrap();
    let denied = w.run(w.fs.setxattr(&user(5, 5), ino, b"scoutfs.hide.b", b"", XattrSet::Any));
    assert_eq!(denied, Err(E::EPERM));
    assert_eq!(w.names(ino), ["scoutfs.foo"]);
    w.check();
}

#[test]
fn totals_and_indexes_follow_their_xattrs() {
    let w = World::new(2);
    let (a, b) = (w.file(1, "a"), w.file(1, "b"));
    w.set(a, "scoutfs.totl.t.1.2.3", b"10").unwrap();
    w.set(b, "scoutfs.totl.x.1.2.3", b"5").unwrap();
    w.check();
    w.set(a, "scoutfs.totl.t.1.2.3", b"7").unwrap();
    w.check();
    assert_eq!(w.set(a, "scoutfs.totl.t.1.2.3", b"x"), Err(E::EINVAL));
    w.set(a, "scoutfs.indx.t.5.100", b"").unwrap();
    w.set(a, "scoutfs.indx.t.5.100", b"").unwrap();
    w.set(a, "scoutfs.indx.u.5.100", b"").unwrap();
    assert_eq!(w.set(a, "scoutfs.indx.v.5.100", b"1"), Err(E::EINVAL));
    w.check();
    w.remove(a, "scoutfs.indx.u.5.100").unwrap();
    w.check();
    w.unlink(1, "a").unwrap();
    w.unlink(1, "b").unwrap();
    w.check();
    let zones: BTreeSet<u8> = w.log.items.borrow().keys().map(|k| k.zone).collect();
    assert_eq!(
        zones,
        BTreeSet::from([format::ZONE_INODE_INDEX, format::ZONE_FS])
    );
}

fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut out = vec![2, 0, 0, 0];
    for (tag, perm, id) in entries {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&perm.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    out
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const NO: u32 = u32::MAX;

#[test]
fn acls_and_modes_follow_each_other() {
    let w = World::new(2);
    let ino = w.file(1, "f");
    let full = acl(&[
        (1, 6, NO),
        (2, 4, 1000),
        (4, 4, NO),
        (16, 6, NO),
        (32, 0, NO),
    ]);
    w.set(ino, ACCESS, &full).unwrap();
    assert_eq!(w.attr(ino).unwrap().mode & 0o777, 0o660);
    assert_eq!(w.get(ino, ACCESS).unwrap(), full);
    let chmod = SetAttr {
        mode: Some(0o751),
        ..SetAttr::default()
    };
    w.run(w.fs.setattr(&ROOT, ino, &chmod)).unwrap();
    let expected = acl(&[
        (1, 7, NO),
        (2, 4, 1000),
        (4, 4, NO),
        (16, 5, NO),
        (32, 1, NO),
    ]);
    assert_eq!(w.get(ino, ACCESS).unwrap(), expected);
    let base = acl(&[(1, 6, NO), (4, 0, NO), (32, 0, NO)]);
    w.set(ino, ACCESS, &base).unwrap();
    assert_eq!(w.get(ino, ACCESS), Err(E::ENODATA));
    assert_eq!(w.attr(ino).unwrap().mode & 0o777, 0o600);
    w.remove(ino, ACCESS).unwrap();
    assert_eq!(w.set(ino, DEFAULT, &base), Err(E::EINVAL));
    assert_eq!(w.set(ino, ACCESS, &base[..12]), Err(E::EINVAL));
    let denied = w.run(w.fs.setxattr(&user(5, 5), ino, ACCESS.as_bytes(), &base, XattrSet::Any));
    assert_eq!(denied, Err(E::EPERM));
    w.check();
}

#[test]
fn a_default_acl_replaces_the_umask() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let default = acl(&[
        (1, 7, NO),
        (2, 7, 1000),
        (4, 5, NO),
        (16, 7, NO),
        (32, 5, NO),
    ]);
    w.set(dir, DEFAULT, &default).unwrap();
    let ino = w.file(dir, "f");
    assert_eq!(
        w.attr(ino).unwrap().mode & 0o777,
        0o664,
        "the umask is not applied"
    );
    let access = acl(&[
        (1, 6, NO),
        (2, 7, 1000),
        (4, 5, NO),
        (16, 6, NO),
        (32, 4, NO),
    ]);
    assert_eq!(w.get(ino, ACCESS).unwrap(), access);
    assert_eq!(w.get(ino, DEFAULT), Err(E::ENODATA));
    let sub = w.mkdir(dir, "sub").unwrap();
    assert_eq!(w.get(sub, DEFAULT).unwrap(), default);
    assert_eq!(w.attr(sub).unwrap().mode & 0o777, 0o775);
    let link = w
        .run(w.fs.symlink(&ROOT, dir, b"s", b"t"))
        .unwrap()
        .attr
        .ino;
    assert_eq!(w.get(link, ACCESS), Err(E::ENODATA));
    let base = acl(&[(1, 7, NO), (4, 0, NO), (32, 0, NO)]);
    w.set(dir, DEFAULT, &base).unwrap();
    let ino = w.file(dir, "g");
    assert_eq!(w.attr(ino).unwrap().mode & 0o777, 0o600);
    assert_eq!(w.get(ino, ACCESS), Err(E::ENODATA));
    w.check();
}

#[test]
fn the_scan_deletes_what_nobody_has_open() {
    let w = World::new(2);
    let (kept, kept_fh) = w.create(1, "kept").unwrap();
    let elsewhere = w.file(1, "elsewhere");
    w.server.open_elsewhere.borrow_mut().insert(elsewhere);
    w.unlink(1, "kept").unwrap();
    w.unlink(1, "elsewhere").unwrap();
    assert!(w.attr(elsewhere).is_ok());
    assert!(!w.run(w.fs.scan_orphans()));
    let counters = w.fs.orphan_counters();
    assert_eq!(
        (counters.scan_cached.get(), counters.scan_omap_set.get()),
        (1, 1)
    );
    w.server.open_elsewhere.borrow_mut().clear();
    // The answer is good for one grant: taking the lock back ends it.
    w.run(w.fs.revoke(Scope::InodeGroup(elsewhere), Mode::Null));
    w.run(w.fs.scan_orphans());
    assert_eq!(w.attr(elsewhere), Err(E::ESTALE));
    w.run(w.fs.release(kept, kept_fh));
    assert_eq!(w.attr(kept), Err(E::ESTALE));
    assert!(w.run(w.fs.scan_orphans()));
    assert_eq!(counters.inode_deleted.get(), 2);
    w.check();
}

#[test]
fn a_revoked_group_is_forgotten_by_the_kernel() {
    let w = World::new(2);
    let dir = w.mkdir(1, "d").unwrap();
    let file = w.file(dir, "f");
    w.run(w.fs.revoke(Scope::InodeGroup(file), Mode::Null));
    assert_eq!(w.kernel.0.take(), [Inval::Attr(file)]);
    w.run(w.fs.revoke(Scope::InodeGroup(dir), Mode::Null));
    assert_eq!(w.kernel.0.take(), [Inval::AllNames, Inval::Attr(dir)]);
    w.run(w.fs.revoke(Scope::InodeGroup(1), Mode::Null));
    // Nobody was told anything of the root that could be believed.
    assert_eq!(w.kernel.0.take(), [Inval::AllNames]);
    w.fs.forget(file, 1);
    w.run(w.fs.revoke(Scope::InodeGroup(file), Mode::Null));
    w.run(w.fs.revoke(Scope::Orphans, Mode::Null));
    assert!(w.kernel.0.take().is_empty());
}

#[test]
fn old_volumes_keep_short_inodes() {
    let w = World::new(1);
    let ino = w.file(1, "f");
    assert_eq!(w.log.items.borrow()[&Key::inode(ino)].len(), 160);
    assert_eq!(w.set(ino, "scoutfs.indx.t.5.100", b""), Err(E::EOPNOTSUPP));
}

/// Names and xattrs of everything, from the filesystem.
fn compare(w: &World, model: &Model) {
    for (&ino, node) in &model.nodes {
        let attr = w.attr(ino).unwrap();
        assert_eq!(attr.nlink, node.nlink, "nlink of {ino}");
        assert_eq!(
            w.names(ino),
            node.xattrs.keys().cloned().collect::<Vec<_>>()
        );
        for (name, value) in &node.xattrs {
            assert_eq!(&w.get(ino, name).unwrap(), value);
        }
        if let Some(children) = &node.children {
            let mut listed: Vec<_> = w.list(ino).into_iter().map(|(n, i, _)| (n, i)).collect();
            listed.drain(..2);
            listed.sort();
            assert_eq!(listed, children.clone().into_iter().collect::<Vec<_>>());
            for (name, child) in children {
                assert_eq!(w.lookup(ino, name).unwrap().ino, *child);
            }
        }
    }
}

fn is_fault(error: E) -> bool {
    matches!(error, E::ENOSPC | E::EIO)
}

struct Walk {
    w: World,
    model: Model,
    rng: Rc<TestEntropy>,
    handles: Vec<(Ino, u64)>,
    faults: bool,
}

impl Walk {
    fn new(seed: u64, faults: bool) -> Self {
        let rng = TestEntropy::new(seed);
        Self {
            w: World::new(2),
            model: Model::rooted(1),
            rng,
            handles: Vec::new(),
            faults,
        }
    }
    fn name(&self) -> String {
        ["a", "b", "c", "d", "file-1", "abcdefgh"][self.rng.range(0, 6) as usize].into()
    }
    fn any(&self) -> Ino {
        let all: Vec<Ino> = self.model.nodes.keys().copied().collect();
        all[self.rng.range(0, all.len() as u64) as usize]
    }
    fn any_dir(&self) -> Ino {
        let live = |i: &Ino| self.model.is_dir(*i);
        let all: Vec<Ino> = self.model.nodes.keys().copied().filter(live).collect();
        // Sometimes not a directory at all.
        if self.rng.chance(1, 30) {
            self.any()
        } else {
            all[self.rng.range(0, all.len() as u64) as usize]
        }
    }

    /// Compares an outcome; true if the model is to follow.
    fn agree<T: std::fmt::Debug>(&self, got: &Result<T, E>, want: Result<bool, E>) -> bool {
        self.w.log.fail_in.set(None);
        match (got, want) {
            (Ok(_), Ok(done)) => done,
            (Err(error), _) if self.faults && is_fault(*error) => false,
            (Err(got), Err(want)) => {
                assert_eq!(*got, want);
                false
            }
            (got, want) => panic!("got {got:?}, want {want:?}"),
        }
    }

    fn step(&mut self) {
        if self.faults && self.rng.chance(1, 2) {
            self.w.log.fail_in.set(Some(self.rng.range(0, 30) as u32));
        }
        if self.rng.chance(1, 10) {
            self.w
                .log
                .seq
                .set(self.w.log.seq.get() + self.rng.range(1, 1500));
        }
        let (dir, name) = (self.any_dir(), self.name());
        match self.rng.range(0, 13) {
            0 | 1 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = self.w.mkdir(dir, &name);
                if self.agree(&got, want) {
                    self.model.add(dir, &name, got.unwrap(), true);
                }
            }
            2..=4 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = self.w.create(dir, &name);
                if self.agree(&got, want) {
                    let (ino, fh) = got.unwrap();
                    self.model.add(dir, &name, ino, false);
                    self.model.nodes.get_mut(&ino).unwrap().open = 1;
                    self.handles.push((ino, fh));
                }
            }
            5 | 6 => {
                let rmdir = self.rng.chance(1, 2);
                let want = self.model.removed(dir, &name, rmdir).map(|_| true);
                let got = if rmdir {
                    self.w.rmdir(dir, &name)
                } else {
                    self.w.unlink(dir, &name)
                };
                if self.agree(&got, want) {
                    self.model.drop_name(dir, &name);
                }
            }
            7 | 8 => self.rename(dir, &name),
            9 => self.link(dir, &name),
            10 => self.xattr(),
            11 => {
                let ino = self.any();
                let got = self.w.run(self.w.fs.open(&ROOT, ino, 0));
                if self.agree(&got, Ok(true)) {
                    self.model.nodes.get_mut(&ino).unwrap().open += 1;
                    self.handles.push((ino, got.unwrap().fh));
                }
            }
            _ => {
                if !self.handles.is_empty() {
                    let at = self.rng.range(0, self.handles.len() as u64) as usize;
                    let (ino, fh) = self.handles.swap_remove(at);
                    self.w.run(self.w.fs.release(ino, fh));
                    self.w.log.fail_in.set(None);
                    self.model.nodes.get_mut(&ino).unwrap().open -= 1;
                    self.model.reap(ino);
                }
            }
        }
        self.w.log.fail_in.set(None);
        self.w.check();
    }

    fn rename(&mut self, dir: Ino, name: &str) {
        let (to, new) = (self.any_dir(), self.name());
        let noreplace = self.rng.chance(1, 4);
        let want = self.model.may_rename(dir, name, to, &new, noreplace);
        let got = self.w.rename(dir, name, to, &new, u32::from(noreplace));
        // A removed directory has no way up: the walk says so, whatever else is wrong.
        if got == Err(E::ENOENT)
            && (self.model.nodes[&to].nlink == 0 || self.model.nodes[&dir].nlink == 0)
        {
            return;
        }
        if self.agree(&got, want) {
            self.model.rename(dir, name, to, &new);
        }
    }

    fn link(&mut self, dir: Ino, name: &str) {
        let ino = self.any();
        let want = if self.model.is_dir(ino) {
            Err(E::EPERM)
        } else {
            self.model.parent_for_new(dir, name).map(|()| true)
        };
        let got = self.w.run(self.w.fs.link(&ROOT, ino, dir, name.as_bytes()));
        if self.agree(&got, want) {
            self.model.children(dir).insert(name.into(), ino);
            self.model.nodes.get_mut(&ino).unwrap().nlink += 1;
        }
    }

    fn xattr(&mut self) {
        let ino = self.any();
        let name = [
            "user.a",
            "trusted.b",
            "scoutfs.totl.x.1.1.1",
            "scoutfs.indx.x.1.1",
        ][self.rng.range(0, 4) as usize];
        let had = self.model.nodes[&ino].xattrs.contains_key(name);
        if self.rng.chance(1, 3) {
            let got = self.w.remove(ino, name);
            if self.agree(&got, if had { Ok(true) } else { Err(E::ENODATA) }) {
                self.model.nodes.get_mut(&ino).unwrap().xattrs.remove(name);
            }
            return;
        }
        let value = match name {
            "scoutfs.totl.x.1.1.1" => self.rng.range(0, 100).to_string().into_bytes(),
            "scoutfs.indx.x.1.1" => Vec::new(),
            _ => vec![7; self.rng.range(0, 3000) as usize],
        };
        let got = self.w.set(ino, name, &value);
        if self.agree(&got, Ok(true)) {
            // Tagged names without the hide tag are listed.
            self.model
                .nodes
                .get_mut(&ino)
                .unwrap()
                .xattrs
                .insert(name.into(), value);
        }
    }

    fn finish(mut self) {
        compare(&self.w, &self.model);
        for (ino, fh) in std::mem::take(&mut self.handles) {
            self.w.run(self.w.fs.release(ino, fh));
            self.model.nodes.get_mut(&ino).unwrap().open -= 1;
            self.model.reap(ino);
        }
        self.w.run(self.w.fs.scan_orphans());
        self.w.check();
        compare(&self.w, &self.model);
        assert_eq!(self.w.log.count.get() + 1, self.model.nodes.len() as i64);
        assert_eq!(
            (self.w.fs.table.state_len(), self.w.fs.local.in_use()),
            (0, 0)
        );
    }
}

#[test]
fn the_namespace_does_what_the_model_does() {
    for seed in 0..25 {
        let mut walk = Walk::new(seed, false);
        for _ in 0..300 {
            walk.step();
        }
        walk.finish();
    }
}

#[test]
fn a_failed_operation_leaves_nothing_behind() {
    for seed in 0..25 {
        let mut walk = Walk::new(seed, true);
        for _ in 0..300 {
            walk.step();
        }
        walk.finish();
    }
}

#[test]
fn entry_types_are_shown_as_stat_types() {
    let w = World::new(2);
    w.run(w.fs.mknod(&ROOT, 1, b"p", S_IFIFO, 0, 0)).unwrap();
    let mut seen = Vec::new();
    w.run(w.fs.readdir(&ROOT, 1, 0, 2, false, &mut |e| {
        seen.push(u32::from(e.dtype) << 12);
        true
    }))
    .unwrap();
    assert_eq!(seen, [S_IFIFO & S_IFMT]);
}

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
mod index;
mod log;
#[path = "../model/mod.rs"]
mod model;
mod promises;
mod walk;

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
        let kernel = Rc::new(Kernel::default());
        let server = Rc::new(Server::default());
        server.next_ino.set(1024);
        let fs = Self::mount(&world, &log, &kernel, &server, fmt_vers);
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

    /// A mount that is granted every lock.
    fn mount(
        world: &TestWorld,
        log: &Rc<Log>,
        kernel: &Rc<Kernel>,
        server: &Rc<Server>,
        fmt_vers: u64,
    ) -> Rc<Fs> {
        let transport = Rc::new(GrantAll::default());
        let policy = crate::locks::Policy::default();
        let locks = Locks::new(world.env(), policy, transport.clone());
        *transport.locks.borrow_mut() = Some(locks.clone());
        locks.set_hooks(Rc::new(Hooks(log.clone())));
        let config = Config {
            fmt_vers,
            policy: Policy::default(),
        };
        Fs::new(
            world.env(),
            log.clone(),
            locks,
            server.clone(),
            kernel.clone(),
            world.data.handle(),
            config,
        )
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

//! A whole mount over devices in memory: random operations against a model,
//! fsync, power loss, mounting again. What was synced is there, and what is there
//! is the state after some operation, whole.
#![allow(dead_code)]

mod model;

use model::{Model, Node};
use outrider_core::env::testing::{TestEntropy, TestWorld};
use outrider_core::env::testnet::{TestNet, TestNetHandle};
use outrider_core::env::{Entropy, Env, Gate, LocalBoxFuture};
use outrider_core::errno::Errno as E;
use outrider_core::fs::Fs;
use outrider_core::fs::api::{Caller, Inval, KernelCache, Posix, SetAttr, WriteHow, XattrSet};
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_core::volume::{MkfsOptions, mkfs};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

pub(crate) use outrider_core::errno;

static ROOT: Caller = Caller {
    uid: 0,
    gid: 0,
    pid: 1,
    groups: Vec::new(),
};

struct NoKernel;

impl KernelCache for NoKernel {
    fn invalidate(&self, _: Vec<Inval>) -> LocalBoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// The crashed mounts of these tests are gone for good.
struct AssumeDead;

impl FenceAgent for AssumeDead {
    fn fence(&self, _: &Env, _: FenceRequest) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// What a path shows: type and link count, contents or names, xattrs.
type Shown = BTreeMap<String, (bool, u32, Vec<u8>, BTreeMap<String, Vec<u8>>)>;

struct Mounted {
    world: TestWorld,
    mount: Rc<Mount>,
}

fn network() -> Rc<TestNetHandle> {
    Rc::new(TestNetHandle(Rc::new(TestNet::default())))
}

impl Mounted {
    fn make(seed: u64) -> Self {
        let world = TestWorld::with_network(seed, 64 << 30, 128 << 30, network());
        let (meta, data) = (world.meta.handle(), world.data.handle());
        let options = MkfsOptions {
            slots: vec![(0, "127.0.0.1:8000".parse().unwrap())],
            allow_small: true,
            ..MkfsOptions::default()
        };
        let (env, wall) = (world.env(), world.env().clock.wall());
        world
            .block_on(mkfs(&*meta, &*data, &*env.entropy, wall, &options))
            .unwrap();
        Self::over(world)
    }

    fn over(world: TestWorld) -> Self {
        let env = world.env();
        let config = NodeConfig::new(Some(0), Arc::new(AssumeDead));
        let rid = world.entropy.rid();
        let mount = world.block_on(async {
            Mount::start(&env, rid, config, Rc::new(NoKernel), &Gate::default())
                .await
                .unwrap_or_else(|error| panic!("mount: {error}"))
        });
        Self { world, mount }
    }

    /// The power goes; what was not flushed may be lost. Then it is mounted again.
    fn crash(self) -> Self {
        let Self { world, mount } = self;
        world.meta.power_loss(&*world.entropy);
        world.data.power_loss(&*world.entropy);
        let (meta, data) = (world.meta.snapshot(), world.data.snapshot());
        let seed = world.entropy.next_u64();
        // Nothing of the old node runs any more.
        std::mem::forget((world, mount));
        Self::over(TestWorld::over(seed, meta, data, network()))
    }

    fn unmount(self) -> TestWorld {
        self.world.block_on(self.mount.unmount());
        self.world
    }

    fn fs(&self) -> Rc<Fs> {
        self.mount.fs().clone()
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.world.block_on(future)
    }

    fn read(&self, ino: u64) -> Vec<u8> {
        let fs = self.fs();
        self.run(async {
            let opened = fs.open(&ROOT, ino, 0).await.unwrap();
            let pieces = fs.read(&ROOT, ino, opened.fh, 0, 1 << 20).await.unwrap();
            fs.release(ino, opened.fh).await;
            pieces.concat()
        })
    }

    fn write(&self, ino: u64, offset: u64, data: &[u8]) -> Result<u32, E> {
        let fs = self.fs();
        let data = bytes::Bytes::copy_from_slice(data);
        self.run(fs.write(&ROOT, ino, 0, offset, data, WriteHow::default()))
    }

    fn xattrs(&self, ino: u64) -> BTreeMap<String, Vec<u8>> {
        let fs = self.fs();
        let list = self.run(fs.listxattr(&ROOT, ino)).unwrap();
        let names = list.split(|b| *b == 0).filter(|n| !n.is_empty());
        names
            .map(|name| {
                let value = self.run(fs.getxattr(&ROOT, ino, name)).unwrap();
                (String::from_utf8(name.to_vec()).unwrap(), value.to_vec())
            })
            .collect()
    }

    fn shown(&self) -> Shown {
        let mut shown = Shown::new();
        let mut todo = vec![(String::new(), 1)];
        let fs = self.fs();
        while let Some((path, ino)) = todo.pop() {
            let (attr, _) = self.run(fs.getattr(&ROOT, ino)).unwrap();
            let is_dir = attr.mode & 0o170_000 == 0o040_000;
            if is_dir {
                let mut sink = |e: outrider_core::fs::api::DirEntry| {
                    let name = String::from_utf8(e.name.to_vec()).unwrap();
                    todo.push((format!("{path}/{name}"), e.ino));
                    true
                };
                self.run(fs.readdir(&ROOT, ino, 0, 2, false, &mut sink))
                    .unwrap();
            }
            let data = if is_dir { Vec::new() } else { self.read(ino) };
            let xattrs = self.xattrs(ino);
            shown.insert(path, (is_dir, attr.nlink, data, xattrs));
        }
        shown
    }
}

fn shown(model: &Model) -> Shown {
    let mut shown = Shown::new();
    let mut todo = vec![(String::new(), 1)];
    while let Some((path, ino)) = todo.pop() {
        let node = &model.nodes[&ino];
        for (name, child) in node.children.iter().flatten() {
            todo.push((format!("{path}/{name}"), *child));
        }
        let is_dir = node.children.is_some();
        let of = (is_dir, node.nlink, node.data.clone(), node.xattrs.clone());
        shown.insert(path, of);
    }
    shown
}

struct Walk {
    m: Option<Mounted>,
    model: Model,
    rng: Rc<TestEntropy>,
    handles: Vec<(u64, u64)>,
    /// States since the last sync, that one first.
    since: Vec<Shown>,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let model = Model::new();
        Self {
            m: Some(Mounted::make(seed)),
            since: vec![shown(&model)],
            model,
            rng: TestEntropy::new(seed ^ 0x5eed),
            handles: Vec::new(),
        }
    }

    fn m(&self) -> &Mounted {
        self.m.as_ref().unwrap()
    }

    fn below(&self, n: u64) -> u64 {
        self.rng.range(0, n)
    }

    fn name(&self) -> String {
        ["a", "b", "c", "d", "file-1", "abcdefgh"][self.below(6) as usize].into()
    }

    fn pick(&self, dirs: bool) -> Option<u64> {
        let is = |(_, node): &(&u64, &Node)| node.children.is_some() == dirs;
        let all: Vec<u64> = self
            .model
            .nodes
            .iter()
            .filter(is)
            .map(|(i, _)| *i)
            .collect();
        (!all.is_empty()).then(|| all[self.below(all.len() as u64) as usize])
    }

    /// Whether the model is to follow.
    fn agree<T: std::fmt::Debug>(got: &Result<T, E>, want: Result<bool, E>) -> bool {
        match (got, want) {
            (Ok(_), Ok(done)) => done,
            (Err(got), Err(want)) => {
                assert_eq!(*got, want);
                false
            }
            (got, want) => panic!("got {got:?}, want {want:?}"),
        }
    }

    fn step(&mut self) {
        let fs = self.m().fs();
        let dir = self.pick(true).unwrap();
        let name = self.name();
        let bytes = name.as_bytes();
        match self.below(14) {
            0 | 1 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = self.m().run(fs.mkdir(&ROOT, dir, bytes, 0o755, 0));
                if Self::agree(&got, want) {
                    self.model.add(dir, &name, got.unwrap().attr.ino, true);
                }
            }
            2..=4 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = self.m().run(fs.create(&ROOT, dir, bytes, 0o644, 0, 0o302));
                if Self::agree(&got, want) {
                    let (entry, opened) = got.unwrap();
                    let ino = entry.attr.ino;
                    self.model.add(dir, &name, ino, false);
                    self.model.nodes.get_mut(&ino).unwrap().open = 1;
                    self.handles.push((ino, opened.fh));
                }
            }
            5 => {
                let rmdir = self.below(2) == 0;
                let want = self.model.removed(dir, &name, rmdir).map(|_| true);
                let got = if rmdir {
                    self.m().run(fs.rmdir(&ROOT, dir, bytes))
                } else {
                    self.m().run(fs.unlink(&ROOT, dir, bytes))
                };
                if Self::agree(&got, want) {
                    self.model.drop_name(dir, &name);
                }
            }
            6 | 7 => self.rename(dir, &name),
            8 => self.write(),
            9 => self.truncate(),
            10 => self.xattr(),
            11 => self.close(),
            12 => {
                let Some(ino) = self.pick(false) else { return };
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = self.m().run(fs.link(&ROOT, ino, dir, bytes));
                if Self::agree(&got, want) {
                    self.model.children(dir).insert(name, ino);
                    self.model.nodes.get_mut(&ino).unwrap().nlink += 1;
                }
            }
            _ => {
                if self.below(3) == 0 {
                    self.m().run(fs.syncfs()).unwrap();
                    self.since.clear();
                }
            }
        }
        self.since.push(shown(&self.model));
    }

    fn rename(&mut self, dir: u64, name: &str) {
        let (to, new) = (self.pick(true).unwrap(), self.name());
        let noreplace = self.below(4) == 0;
        let want = self.model.may_rename(dir, name, to, &new, noreplace);
        let (from, fs) = (name.as_bytes(), self.m().fs());
        let flags = u32::from(noreplace);
        let got = self
            .m()
            .run(fs.rename(&ROOT, dir, from, to, new.as_bytes(), flags));
        if Self::agree(&got, want) {
            self.model.rename(dir, name, to, &new);
        }
    }

    fn write(&mut self) {
        let Some(ino) = self.pick(false) else { return };
        let offset = self.below(40_000);
        let byte = self.rng.next_u64() as u8;
        let data = vec![byte; 1 + self.below(20_000) as usize];
        let got = self.m().write(ino, offset, &data);
        assert_eq!(got, Ok(data.len() as u32));
        let old = &mut self.model.nodes.get_mut(&ino).unwrap().data;
        let end = offset as usize + data.len();
        old.resize(old.len().max(end), 0);
        old[offset as usize..end].copy_from_slice(&data);
    }

    fn truncate(&mut self) {
        let Some(ino) = self.pick(false) else { return };
        let size = self.below(50_000);
        let (set, fs) = (
            SetAttr {
                size: Some(size),
                ..SetAttr::default()
            },
            self.m().fs(),
        );
        self.m().run(fs.setattr(&ROOT, ino, &set)).unwrap();
        self.model
            .nodes
            .get_mut(&ino)
            .unwrap()
            .data
            .resize(size as usize, 0);
    }

    fn xattr(&mut self) {
        let ino = self.pick(self.below(2) == 0).unwrap_or(1);
        let name = ["user.a", "trusted.b"][self.below(2) as usize];
        let value = vec![7; self.below(3000) as usize];
        let fs = self.m().fs();
        self.m()
            .run(fs.setxattr(&ROOT, ino, name.as_bytes(), &value, XattrSet::Any))
            .unwrap();
        let node = self.model.nodes.get_mut(&ino).unwrap();
        node.xattrs.insert(name.into(), value);
    }

    fn close(&mut self) {
        if self.handles.is_empty() {
            return;
        }
        let at = self.below(self.handles.len() as u64) as usize;
        let (ino, fh) = self.handles.swap_remove(at);
        let fs = self.m().fs();
        self.m().run(fs.release(ino, fh));
        self.model.nodes.get_mut(&ino).unwrap().open -= 1;
        self.model.reap(ino);
    }

    fn crash(&mut self) {
        self.m = Some(self.m.take().unwrap().crash());
        let now = self.m().shown();
        assert!(
            self.since.contains(&now),
            "after the crash: not the state after any operation since the last sync"
        );
        self.rebuild(now);
    }

    /// The model of what is there, with the numbers it has.
    fn rebuild(&mut self, now: Shown) {
        self.handles.clear();
        self.model = Model::new();
        let fs = self.m().fs();
        let mut inos = BTreeMap::from([(String::new(), 1)]);
        for (path, (is_dir, nlink, data, xattrs)) in &now {
            if path.is_empty() {
                self.model.nodes.get_mut(&1).unwrap().xattrs = xattrs.clone();
                continue;
            }
            let (parent, name) = path.rsplit_once('/').unwrap();
            let dir = inos[parent];
            let ino = self
                .m()
                .run(fs.lookup(&ROOT, dir, name.as_bytes()))
                .unwrap()
                .attr
                .ino;
            inos.insert(path.clone(), ino);
            self.model.children(dir).insert(name.into(), ino);
            let node = self.model.nodes.entry(ino).or_default();
            node.nlink = *nlink;
            node.data = data.clone();
            node.xattrs = xattrs.clone();
            if *is_dir {
                node.children.get_or_insert_default();
            }
        }
        self.model.nodes.get_mut(&1).unwrap().nlink = now[""].1;
        assert_eq!(shown(&self.model), now);
        self.since = vec![now];
    }
}

#[test]
fn a_volume_is_made_mounted_used_and_mounted_again() {
    let m = Mounted::make(1);
    let fs = m.fs();
    let (entry, opened) = m.run(fs.create(&ROOT, 1, b"file", 0o644, 0, 2)).unwrap();
    let ino = entry.attr.ino;
    assert_eq!(m.write(ino, 5000, b"hello"), Ok(5));
    m.run(fs.release(ino, opened.fh));
    let m = Mounted::over(m.unmount());
    let mut expected = vec![0; 5000];
    expected.extend_from_slice(b"hello");
    assert_eq!(m.read(ino), expected);
    m.unmount();
}

#[test]
fn what_was_synced_survives_power_loss() {
    for seed in 0..8 {
        let mut walk = Walk::new(seed);
        for _ in 0..4 {
            for _ in 0..60 {
                walk.step();
            }
            walk.crash();
        }
        for _ in 0..40 {
            walk.step();
        }
        let want = shown(&walk.model);
        let m = Mounted::over(walk.m.take().unwrap().unmount());
        assert_eq!(m.shown(), want);
        m.unmount();
    }
}

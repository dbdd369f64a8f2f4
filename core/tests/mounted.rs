//! A whole mount over devices in memory: random operations against a model,
//! fsync, power loss, mounting again. What was synced is there, and what is there
//! is the state after some operation, whole.
#![allow(dead_code)]

mod model;

use model::{Model, Node};
use outrider_core::env::testing::{TestEntropy, TestWorld};
use outrider_core::env::testnet::{TestNet, TestNetHandle};
use outrider_core::env::{DeviceRole, Duration, Entropy, Env, Gate, LocalBoxFuture};
use outrider_core::errno::Errno as E;
use outrider_core::fs::Fs;
use outrider_core::fs::api::{Caller, Inval, KernelCache, Posix, SetAttr, WriteHow, XattrSet};
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::secure::ClusterKey;
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_core::volume::{CheckOptions, MkfsOptions, check, mkfs, read_key_record, read_super};
use std::cell::RefCell;
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
    fn invalidate(&self, _: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        Box::pin(std::future::ready(Vec::new()))
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
type Node4 = (bool, u32, Vec<u8>, BTreeMap<String, Vec<u8>>);
type Shown = BTreeMap<String, Node4>;

struct Mounted {
    world: TestWorld,
    mount: Rc<Mount>,
}

fn network() -> Rc<TestNetHandle> {
    Rc::new(TestNetHandle(Rc::new(TestNet::default())))
}

/// Defaults, or small values that make rare things common.
fn config(rng: &TestEntropy) -> NodeConfig {
    let mut config = NodeConfig::new(Some(0), Arc::new(AssumeDead));
    if rng.chance(1, 2) {
        config.log = outrider_core::log::Policy::small();
    }
    if rng.chance(1, 2) {
        // Log trees are merged all the time.
        config.block = outrider_core::block::Policy {
            reserve_server: 300,
            reserve_client: 300,
            btree_space: outrider_core::block::Policy::BTREE_SPACE_MIN,
            merge_dirty_blocks: rng.range(2, 60),
            ..outrider_core::block::Policy::small()
        };
        config.server.finalize_height = rng.range(0, 2) as u8;
        config.merge_pause = Duration::from_millis(rng.range(1, 400));
    }
    let fs = &mut config.fs;
    if rng.chance(1, 2) {
        fs.inode_batch = rng.range(1, 100);
        fs.inodes_per_lock = rng.range(1, 1025);
        fs.readdir_batch = rng.range(1, 5) as usize;
    }
    if rng.chance(1, 2) {
        fs.data.prealloc_blocks = rng.range(1, 40);
        fs.data.prealloc_contig_only = rng.chance(1, 2);
        fs.data.writeback_bytes = rng.range(4096, 100_000);
        fs.data.dirty_bytes_max = rng.range(4096, 100_000);
        fs.data.extents_per_change = rng.range(1, 4) as usize;
    }
    config
}

/// Every invariant of the specification holds on the devices.
fn is_sound(world: &TestWorld) {
    let options = CheckOptions {
        strict: true,
        ..CheckOptions::default()
    };
    let devices = (world.meta.snapshot(), world.data.snapshot());
    let report = world.block_on(check(devices.0.handle(), devices.1.handle(), &options));
    assert!(report.is_clean(), "{:#?}", report.problems);
}

impl Mounted {
    fn make(seed: u64) -> Self {
        Self::over(Self::volume(seed, 64 << 30, 128 << 30))
    }

    /// A world with a new volume on devices of these sizes.
    fn volume(seed: u64, meta_bytes: u64, data_bytes: u64) -> TestWorld {
        let world = TestWorld::with_network(seed, meta_bytes, data_bytes, network());
        let (meta, data) = (world.meta.handle(), world.data.handle());
        let key = ClusterKey::from_bytes(&[7; 32]);
        let options = MkfsOptions {
            slots: vec![(0, "127.0.0.1:8000".parse().unwrap())],
            allow_small: true,
            cluster_key: (seed % 2 == 1).then(|| key.id()),
            ..MkfsOptions::default()
        };
        let (env, wall) = (world.env(), world.env().clock.wall());
        world
            .block_on(mkfs(&*meta, &*data, &*env.entropy, wall, &options))
            .unwrap();
        world
    }

    /// The volume's key, if it has one.
    fn key(world: &TestWorld) -> Option<ClusterKey> {
        let meta = world.meta.handle();
        world.block_on(async {
            let supers = read_super(&*meta, DeviceRole::Meta, None).await.unwrap();
            let record = read_key_record(&*meta, supers.hdr.fsid.get()).await;
            record.unwrap().map(|_| ClusterKey::from_bytes(&[7; 32]))
        })
    }

    fn over(world: TestWorld) -> Self {
        let config = config(&world.entropy);
        Self::over_with(world, config)
    }

    fn over_with(world: TestWorld, mut config: NodeConfig) -> Self {
        let env = world.env();
        // Volumes with a key behave as those without one, in everything here.
        config.cluster_key = Self::key(&world);
        world.meta.set_yields(world.entropy.chance(1, 2));
        world.data.set_yields(world.entropy.chance(1, 2));
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
        is_sound(&world);
        // Nothing of the old node runs any more.
        std::mem::forget((world, mount));
        Self::over(TestWorld::over(seed, meta, data, network()))
    }

    fn unmount(self) -> TestWorld {
        let left = self.world.block_on(self.mount.unmount());
        left.expect("a clean unmount");
        is_sound(&self.world);
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
        self.run(fs.write(&ROOT, ino, 0, offset, data.into(), WriteHow::default()))
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

    fn inos(&self) -> BTreeMap<String, u64> {
        let mut inos = BTreeMap::new();
        let mut todo = vec![(String::new(), 1)];
        let fs = self.fs();
        while let Some((path, ino)) = todo.pop() {
            let mut sink = |e: outrider_core::fs::api::DirEntry| {
                let name = String::from_utf8(e.name.to_vec()).unwrap();
                todo.push((format!("{path}/{name}"), e.ino));
                true
            };
            let _ = self.run(fs.readdir(&ROOT, ino, 0, 2, false, &mut sink));
            inos.insert(path, ino);
        }
        inos
    }

    fn shown(&self) -> Shown {
        self.shown_below(1)
    }

    fn shown_below(&self, root: u64) -> Shown {
        let mut shown = Shown::new();
        let mut todo = vec![(String::new(), root)];
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
    let mut todo = vec![(String::new(), model.root)];
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

/// Compares what is there with what should be, and names the first difference.
fn same(found: &Shown, expected: &Shown) {
    let (a, b): (Vec<_>, Vec<_>) = (found.keys().collect(), expected.keys().collect());
    assert_eq!(a, b);
    for (path, node) in found {
        let want = &expected[path];
        assert_eq!(
            (node.0, node.1, node.2.len()),
            (want.0, want.1, want.2.len()),
            "{path}"
        );
        assert_eq!(node.3, want.3, "xattrs of {path}");
        let differs = node
            .2
            .iter()
            .zip(&want.2)
            .enumerate()
            .filter(|(_, (a, b))| a != b);
        let at: Vec<usize> = differs.map(|(at, _)| at).collect();
        if let (Some(first), Some(last)) = (at.first(), at.last()) {
            let bytes = (node.2[*first], want.2[*first]);
            panic!(
                "{path}: {} bytes of {} differ in {first}..={last}, there {bytes:?}",
                at.len(),
                node.2.len()
            );
        }
    }
}

/// Polls a future so many times, other tasks in between; whether it ended.
async fn polled(mut future: std::pin::Pin<&mut impl Future<Output = ()>>, times: u64) -> bool {
    for _ in 0..times {
        let poll = std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx)));
        if poll.await.is_ready() {
            return true;
        }
        outrider_core::env::testing::yield_now().await;
    }
    false
}

fn contents(model: &Model) -> BTreeMap<u64, Vec<u8>> {
    let data = |(ino, node): (&u64, &Node)| (*ino, node.data.clone());
    model.nodes.iter().map(data).collect()
}

/// Random operations below one directory, and what they must come to.
struct Walk {
    fs: Rc<Fs>,
    model: Model,
    rng: Rc<TestEntropy>,
    handles: Vec<(u64, u64)>,
    synced: bool,
}

impl Walk {
    fn new(fs: Rc<Fs>, root: u64, seed: u64) -> Self {
        Self {
            fs,
            model: Model::rooted(root),
            rng: TestEntropy::new(seed ^ 0x5eed),
            handles: Vec::new(),
            synced: false,
        }
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

    async fn step(&mut self) {
        self.synced = false;
        let fs = self.fs.clone();
        let dir = self.pick(true).unwrap();
        let name = self.name();
        let bytes = name.as_bytes();
        match self.below(14) {
            0 | 1 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = fs.mkdir(&ROOT, dir, bytes, 0o755, 0).await;
                if Self::agree(&got, want) {
                    self.model.add(dir, &name, got.unwrap().attr.ino, true);
                }
            }
            2..=4 => {
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = fs.create(&ROOT, dir, bytes, 0o644, 0, 0o302).await;
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
                    fs.rmdir(&ROOT, dir, bytes).await
                } else {
                    fs.unlink(&ROOT, dir, bytes).await
                };
                if Self::agree(&got, want) {
                    self.model.drop_name(dir, &name);
                }
            }
            6 | 7 => self.rename(dir, &name).await,
            8 => self.write().await,
            9 => self.truncate().await,
            10 => self.xattr().await,
            11 => self.close().await,
            12 => {
                let Some(ino) = self.pick(false) else { return };
                let want = self.model.parent_for_new(dir, &name).map(|()| true);
                let got = fs.link(&ROOT, ino, dir, bytes).await;
                if Self::agree(&got, want) {
                    self.model.children(dir).insert(name, ino);
                    self.model.nodes.get_mut(&ino).unwrap().nlink += 1;
                }
            }
            _ => {
                if self.below(3) == 0 {
                    fs.syncfs().await.unwrap();
                    self.synced = true;
                }
            }
        }
    }

    async fn rename(&mut self, dir: u64, name: &str) {
        let (to, new) = (self.pick(true).unwrap(), self.name());
        let noreplace = self.below(4) == 0;
        let want = self.model.may_rename(dir, name, to, &new, noreplace);
        let (from, fs) = (name.as_bytes(), self.fs.clone());
        let flags = u32::from(noreplace);
        let got = fs.rename(&ROOT, dir, from, to, new.as_bytes(), flags).await;
        if Self::agree(&got, want) {
            self.model.rename(dir, name, to, &new);
        }
    }

    async fn write(&mut self) {
        let Some(ino) = self.pick(false) else { return };
        let offset = self.below(40_000);
        let byte = self.rng.next_u64() as u8;
        let data = vec![byte; 1 + self.below(20_000) as usize];
        let bytes = bytes::Bytes::copy_from_slice(&data);
        let got = self
            .fs
            .write(&ROOT, ino, 0, offset, bytes.into(), WriteHow::default())
            .await;
        assert_eq!(got, Ok(data.len() as u32));
        let old = &mut self.model.nodes.get_mut(&ino).unwrap().data;
        let end = offset as usize + data.len();
        old.resize(old.len().max(end), 0);
        old[offset as usize..end].copy_from_slice(&data);
    }

    async fn truncate(&mut self) {
        let Some(ino) = self.pick(false) else { return };
        let size = self.below(50_000);
        let (set, fs) = (
            SetAttr {
                size: Some(size),
                ..SetAttr::default()
            },
            self.fs.clone(),
        );
        fs.setattr(&ROOT, ino, &set).await.unwrap();
        self.model
            .nodes
            .get_mut(&ino)
            .unwrap()
            .data
            .resize(size as usize, 0);
    }

    async fn xattr(&mut self) {
        let ino = self.pick(self.below(2) == 0).unwrap_or(self.model.root);
        let name = ["user.a", "trusted.b"][self.below(2) as usize];
        let value = vec![7; self.below(3000) as usize];
        let fs = self.fs.clone();
        fs.setxattr(&ROOT, ino, name.as_bytes(), &value, XattrSet::Any)
            .await
            .unwrap();
        let node = self.model.nodes.get_mut(&ino).unwrap();
        node.xattrs.insert(name.into(), value);
    }

    async fn close(&mut self) {
        if self.handles.is_empty() {
            return;
        }
        let at = self.below(self.handles.len() as u64) as usize;
        let (ino, fh) = self.handles.swap_remove(at);
        let fs = self.fs.clone();
        fs.release(ino, fh).await;
        self.model.nodes.get_mut(&ino).unwrap().open -= 1;
        self.model.reap(ino);
    }
}

/// A walk over a whole volume, and every state since the last sync.
struct Crasher {
    m: Option<Mounted>,
    walk: Walk,
    /// That of the sync first, with the contents of files by number.
    since: Vec<(Shown, BTreeMap<u64, Vec<u8>>)>,
}

impl Crasher {
    fn new(seed: u64) -> Self {
        let m = Mounted::make(seed);
        let walk = Walk::new(m.fs(), 1, seed);
        let since = vec![(shown(&walk.model), contents(&walk.model))];
        Self {
            m: Some(m),
            walk,
            since,
        }
    }

    fn m(&self) -> &Mounted {
        self.m.as_ref().unwrap()
    }

    fn step(&mut self) {
        let m = self.m.as_ref().unwrap();
        m.run(self.walk.step());
        if m.world.entropy.chance(1, 12) {
            // Time for log merges.
            m.run(m.world.env().sleep(Duration::from_millis(500)));
        }
        if self.walk.synced {
            self.since.clear();
        }
        let model = &self.walk.model;
        self.since.push((shown(model), contents(model)));
    }

    /// As [`Crasher::crash`], while an operation and perhaps a commit are under way.
    fn crash_in_step(&mut self) {
        let m = self.m();
        m.world.meta.set_yields(true);
        m.world.data.set_yields(true);
        let polls = self.walk.rng.range(0, 60);
        if self.walk.below(2) == 0 {
            let log = m.mount.log().clone();
            m.world
                .env()
                .spawn("sync", async move { _ = log.sync().await });
        }
        let done = {
            let step = self.walk.step();
            let step = std::pin::pin!(step);
            self.m.as_ref().unwrap().run(polled(step, polls))
        };
        let model = &self.walk.model;
        if done && self.walk.synced {
            self.since.clear();
        }
        if done {
            self.since.push((shown(model), contents(model)));
            self.crash();
        } else {
            // Nobody was told: the model that follows is what was found.
            self.crash_to_any();
        }
    }

    /// The cut operation is not in the model: only soundness is checked, and that
    /// what was synced and untouched is there is left to the other crashes.
    fn crash_to_any(&mut self) {
        self.m = self.m.take().map(Mounted::crash);
        self.walk.fs = self.m().fs();
        let now = self.m().shown();
        self.m().run(self.walk.fs.scan_orphans());
        self.rebuild(now);
    }

    fn crash(&mut self) {
        self.m = self.m.take().map(Mounted::crash);
        self.walk.fs = self.m().fs();
        let now = self.m().shown();
        let inos = self.m().inos();
        let explained = (0..self.since.len()).any(|at| self.explains(at, &now, &inos));
        if !explained {
            self.report(&now);
        }
        assert!(
            explained,
            "after the crash: not the state after any operation since the last sync"
        );
        self.rebuild(now);
    }

    /// Whether `now` is the state after operation `at`. Data is written in place,
    /// so each byte may also be what a later operation wrote (spec 14 section 20).
    fn explains(&self, at: usize, now: &Shown, inos: &BTreeMap<String, u64>) -> bool {
        let (then, _) = &self.since[at];
        let same =
            |a: &Node4, b: &Node4| (a.0, a.1, a.2.len(), &a.3) == (b.0, b.1, b.2.len(), &b.3);
        if now.len() != then.len()
            || !now
                .iter()
                .zip(then)
                .all(|(a, b)| a.0 == b.0 && same(a.1, b.1))
        {
            return false;
        }
        now.iter().all(|(path, node)| {
            let ino = inos[path];
            node.2.iter().enumerate().all(|(i, byte)| {
                let later = self.since[at..]
                    .iter()
                    .filter_map(|(_, data)| data.get(&ino));
                node.0 || later.clone().any(|data| data.get(i).unwrap_or(&0) == byte)
            })
        })
    }

    fn report(&self, now: &Shown) {
        for (at, (then, _)) in self.since.iter().enumerate() {
            let short = |s: &Shown| -> Vec<String> {
                s.iter()
                    .map(|(p, n)| format!("{p}:{}:{}", n.1, n.2.len()))
                    .collect()
            };
            let (a, b) = (short(then), short(now));
            let lost: Vec<_> = a.iter().filter(|x| !b.contains(x)).collect();
            let more: Vec<_> = b.iter().filter(|x| !a.contains(x)).collect();
            println!("state {at}: missing {lost:?}, not expected {more:?}");
        }
    }

    /// The model of what is there, with the numbers it has.
    fn rebuild(&mut self, now: Shown) {
        self.walk.handles.clear();
        self.walk.model = Model::rooted(1);
        let fs = self.m().fs();
        let mut inos = BTreeMap::from([(String::new(), 1)]);
        for (path, (is_dir, nlink, data, xattrs)) in &now {
            if path.is_empty() {
                self.walk.model.nodes.get_mut(&1).unwrap().xattrs = xattrs.clone();
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
            self.walk.model.children(dir).insert(name.into(), ino);
            let node = self.walk.model.nodes.entry(ino).or_default();
            node.nlink = *nlink;
            node.data = data.clone();
            node.xattrs = xattrs.clone();
            if *is_dir {
                node.children.get_or_insert_default();
            }
        }
        self.walk.model.nodes.get_mut(&1).unwrap().nlink = now[""].1;
        assert_eq!(shown(&self.walk.model), now);
        self.since = vec![(now, contents(&self.walk.model))];
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
    let seeds: u64 = std::env::var("SEEDS").map_or(8, |s| s.parse().unwrap());
    for seed in 0..seeds {
        if std::env::var("SEEDS").is_ok() {
            println!("seed {seed}");
        }
        let mut walk = Crasher::new(seed);
        for _ in 0..4 {
            for _ in 0..60 {
                walk.step();
            }
            walk.crash();
        }
        for _ in 0..40 {
            walk.step();
        }
        let want = shown(&walk.walk.model);
        let m = Mounted::over(walk.m.take().unwrap().unmount());
        same(&m.shown(), &want);
        m.unmount();
    }
}

#[test]
fn tasks_of_one_mount_do_not_disturb_each_other() {
    let seeds: u64 = std::env::var("SEEDS").map_or(4, |s| s.parse().unwrap());
    for seed in 0..seeds {
        let m = Mounted::make(seed);
        m.world.meta.set_yields(true);
        m.world.data.set_yields(true);
        let fs = m.fs();
        let walks: Vec<Walk> = (0..6)
            .map(|n| {
                let name = format!("top{n}");
                let top = m
                    .run(fs.mkdir(&ROOT, 1, name.as_bytes(), 0o755, 0))
                    .unwrap();
                Walk::new(fs.clone(), top.attr.ino, seed * 100 + n)
            })
            .collect();
        let done = Rc::new(RefCell::new(Vec::new()));
        for mut walk in walks {
            let done = done.clone();
            m.world.env().spawn("walk", async move {
                for _ in 0..150 {
                    walk.step().await;
                }
                done.borrow_mut().push(walk);
            });
        }
        let env = m.world.env();
        m.run(async {
            while done.borrow().len() < 6 {
                env.sleep(Duration::from_millis(1)).await;
            }
        });
        let m = Mounted::over(m.unmount());
        for walk in done.take() {
            same(&m.shown_below(walk.model.root), &shown(&walk.model));
        }
        m.unmount();
    }
}

#[test]
fn what_was_unlinked_while_open_is_deleted_after_a_crash() {
    for seed in 0..4 {
        let m = Mounted::make(seed);
        let fs = m.fs();
        let (named, _) = m.run(fs.create(&ROOT, 1, b"f", 0o644, 0, 2)).unwrap();
        let (nameless, _) = m.run(fs.tmpfile(&ROOT, 1, 0o600, 0, 2)).unwrap();
        let inos = [named.attr.ino, nameless.attr.ino];
        for ino in inos {
            m.write(ino, 3, &[9; 50_000]).unwrap();
            m.run(fs.setxattr(&ROOT, ino, b"user.a", &[1; 2000], XattrSet::Any))
                .unwrap();
        }
        m.run(fs.unlink(&ROOT, 1, b"f")).unwrap();
        m.run(fs.syncfs()).unwrap();
        assert_eq!(m.read(inos[0])[3..], [9; 50_000]);
        let m = m.crash();
        let fs = m.fs();
        for ino in inos {
            let attr = m.run(fs.getattr(&ROOT, ino)).unwrap().0;
            assert_eq!(attr.nlink, 0, "still there, for the scan");
        }
        assert!(m.run(fs.scan_orphans()));
        for ino in inos {
            assert_eq!(m.run(fs.getattr(&ROOT, ino)), Err(E::ESTALE));
        }
        let counters = fs.orphan_counters();
        assert_eq!(counters.inode_deleted.get(), 2);
        let m = Mounted::over(m.unmount());
        m.run(m.fs().scan_orphans());
        assert_eq!(m.fs().orphan_counters().inode_deleted.get(), 0);
        m.unmount();
    }
}

#[test]
fn a_crash_in_the_middle_of_an_operation_leaves_all_or_nothing_of_it() {
    let seeds: u64 = std::env::var("SEEDS").map_or(8, |s| s.parse().unwrap());
    for seed in 0..seeds {
        let mut crasher = Crasher::new(seed + 1000);
        for _ in 0..6 {
            for _ in 0..15 {
                crasher.step();
            }
            crasher.crash_in_step();
        }
        crasher.m.take().unwrap().unmount();
    }
}

/// A small volume, with reserves to its size.
fn small(seed: u64, meta_bytes: u64, data_bytes: u64) -> (TestWorld, NodeConfig) {
    let world = Mounted::volume(seed, meta_bytes, data_bytes);
    let mut config = config(&world.entropy);
    config.block = outrider_core::block::Policy::small();
    (world, config)
}

#[test]
fn a_volume_out_of_data_space_takes_back_what_is_deleted() {
    for seed in 0..2 {
        let (world, config) = small(seed, 512 << 20, 64 << 20);
        let m = Mounted::over_with(world, config.clone());
        let fs = m.fs();
        let mut files = Vec::new();
        let full = loop {
            let name = format!("f{}", files.len());
            let made = m.run(fs.create(&ROOT, 1, name.as_bytes(), 0o644, 0, 2));
            let (entry, opened) = made.unwrap();
            m.run(fs.release(entry.attr.ino, opened.fh));
            let wrote = m.write(entry.attr.ino, 0, &vec![1; 1 << 20]);
            files.push((name, entry.attr.ino, wrote.unwrap_or(0)));
            match wrote {
                Ok(len) if len == 1 << 20 => assert!(files.len() < 200, "it fits?"),
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(full, E::ENOSPC);
        let (_, ino, len) = &files[0];
        assert_eq!(m.read(*ino), vec![1; *len as usize]);
        for (name, ..) in &files {
            m.run(fs.unlink(&ROOT, 1, name.as_bytes())).unwrap();
        }
        // The freed blocks go through a commit, and what the mount may hold.
        let mut tries = 0;
        let name = b"again";
        let (entry, _) = m.run(fs.create(&ROOT, 1, name, 0o644, 0, 2)).unwrap();
        while m.write(entry.attr.ino, 0, &vec![2; 1 << 20]) != Ok(1 << 20) {
            m.run(fs.syncfs()).unwrap();
            tries += 1;
            assert!(tries < 20, "the space did not come back");
        }
        let m = Mounted::over_with(m.unmount(), config);
        assert_eq!(m.read(entry.attr.ino), vec![2; 1 << 20]);
        m.unmount();
    }
}

#[test]
fn a_volume_out_of_metadata_space_can_still_delete() {
    for seed in 0..2 {
        let (world, config) = small(seed, 280 << 20, 256 << 20);
        let m = Mounted::over_with(world, config.clone());
        let fs = m.fs();
        let mut made = Vec::new();
        let full = loop {
            let name = format!("{:0>200}", made.len());
            match m.run(fs.mknod(&ROOT, 1, name.as_bytes(), 0o100_644, 0, 0)) {
                Ok(_) => made.push(name),
                Err(error) => break error,
            }
            assert!(made.len() < 200_000, "it fits?");
        };
        assert_eq!(full, E::ENOSPC);
        for name in &made {
            m.run(fs.unlink(&ROOT, 1, name.as_bytes())).unwrap();
        }
        m.run(fs.syncfs()).unwrap();
        let m = Mounted::over_with(m.unmount(), config);
        assert_eq!(m.shown().len(), 1);
        m.unmount();
    }
}

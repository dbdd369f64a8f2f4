//! A whole mount with small budgets, so that log trees are merged all the time:
//! files come and go while their items move into the fs root, power is lost in
//! between, deleted space comes back, and a check finds every block once.

use outrider_core::block;
use outrider_core::env::testing::TestWorld;
use outrider_core::env::testnet::{TestNet, TestNetHandle};
use outrider_core::env::{Duration, Entropy, Env, Gate, LocalBoxFuture, ProbeSink, set_probe_sink};
use outrider_core::fs::Fs;
use outrider_core::fs::api::{Caller, Inval, KernelCache, Posix, WriteHow};
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_core::volume::{CheckOptions, MkfsOptions, check, mkfs};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

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

struct AssumeDead;

impl FenceAgent for AssumeDead {
    fn fence(&self, _: &Env, _: FenceRequest) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn network() -> Rc<TestNetHandle> {
    Rc::new(TestNetHandle(Rc::new(TestNet::default())))
}

fn config() -> NodeConfig {
    let mut config = NodeConfig::new(Some(0), Arc::new(AssumeDead));
    config.block = block::Policy {
        reserve_server: 300,
        reserve_client: 300,
        ..block::Policy::small()
    };
    config.block.btree_space = block::Policy::BTREE_SPACE_MIN;
    config.server.finalize_height = 1;
    config.merge_pause = Duration::from_millis(200);
    config
}

struct Mounted {
    world: TestWorld,
    mount: Rc<Mount>,
}

impl Mounted {
    fn make(seed: u64) -> Self {
        let world = TestWorld::with_network(seed, 1 << 30, 1 << 30, network());
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
        let (env, rid) = (world.env(), world.entropy.rid());
        let never = Gate::default();
        let mount = Mount::start(&env, rid, config(), Rc::new(NoKernel), &never);
        let mount = world
            .block_on(mount)
            .unwrap_or_else(|err| panic!("mount: {err}"));
        Self { world, mount }
    }

    fn crash(self) -> Self {
        let Self { world, mount } = self;
        world.meta.power_loss(&*world.entropy);
        world.data.power_loss(&*world.entropy);
        let (meta, data) = (world.meta.snapshot(), world.data.snapshot());
        let seed = world.entropy.next_u64();
        std::mem::forget((world, mount));
        Self::over(TestWorld::over(seed, meta, data, network()))
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.world.block_on(future)
    }

    fn wait(&self, secs: u64) {
        self.run(self.world.env().sleep(Duration::from_secs(secs)));
    }

    fn fs(&self) -> Rc<Fs> {
        self.mount.fs().clone()
    }

    fn sync(&self) {
        self.run(self.fs().syncfs()).unwrap();
    }
}

type Counts = Rc<RefCell<BTreeMap<&'static str, u64>>>;

fn count_probes() -> Counts {
    let counts: Counts = Rc::default();
    let sink = counts.clone();
    let note: ProbeSink = Box::new(move |name| *sink.borrow_mut().entry(name).or_default() += 1);
    set_probe_sink(Some(note));
    counts
}

/// Files by name: inode number and the byte their pages are full of.
type Files = BTreeMap<String, (u64, u8)>;

fn create(m: &Mounted, files: &mut Files, name: String, fill: u8) {
    let fs = m.fs();
    let ino = m.run(async {
        let (entry, opened) = fs
            .create(&ROOT, 1, name.as_bytes(), 0o100_644, 0, 2)
            .await
            .expect("create");
        let ino = entry.attr.ino;
        let data = bytes::Bytes::from(vec![fill; 9000]);
        fs.write(&ROOT, ino, opened.fh, 0, data.into(), WriteHow::default())
            .await
            .expect("write");
        fs.release(ino, opened.fh).await;
        fs.forget(ino, 1);
        ino
    });
    files.insert(name, (ino, fill));
}

fn remove(m: &Mounted, files: &mut Files, name: &str) {
    m.run(m.fs().unlink(&ROOT, 1, name.as_bytes()))
        .expect("unlink");
    files.remove(name);
}

fn verify(m: &Mounted, files: &Files) {
    let fs = m.fs();
    for (name, (ino, fill)) in files {
        let found = m.run(async {
            let entry = fs.lookup(&ROOT, 1, name.as_bytes()).await.expect("lookup");
            let opened = fs.open(&ROOT, entry.attr.ino, 0).await.expect("open");
            let pieces = fs.read(&ROOT, entry.attr.ino, opened.fh, 0, 1 << 20).await;
            fs.release(entry.attr.ino, opened.fh).await;
            fs.forget(entry.attr.ino, 1);
            (entry.attr.ino, pieces.expect("read").concat())
        });
        assert_eq!(found.0, *ino);
        assert_eq!(found.1, vec![*fill; 9000], "{name}");
    }
}

fn names(m: &Mounted) -> usize {
    let mut count = 0;
    let mut sink = |_| {
        count += 1;
        true
    };
    m.run(m.fs().readdir(&ROOT, 1, 0, 2, false, &mut sink))
        .expect("readdir");
    count
}

#[test]
fn files_survive_merges_and_deleted_space_comes_back() {
    for seed in 1..3 {
        let counts = count_probes();
        let mut m = Mounted::make(seed);
        let mut files = Files::new();
        let before = m.run(m.fs().statfs()).unwrap();
        for round in 0..8_u64 {
            for nr in 0..60 {
                create(&m, &mut files, format!("{round}-{nr}"), nr as u8);
            }
            if round > 1 {
                let old: Vec<String> = files.keys().take(40).cloned().collect();
                old.iter().for_each(|name| remove(&m, &mut files, name));
            }
            m.sync();
            m.wait(m.world.entropy.range(0, 4));
            if round % 3 == 2 {
                m = m.crash();
            }
            verify(&m, &files);
        }
        for name in files.clone().keys() {
            remove(&m, &mut files, name);
        }
        m.sync();
        // Deleted files are found by the orphan scan at the latest, after a merge;
        // merges go on while mounts commit.
        for _ in 0..12 {
            m.wait(11);
            m.sync();
        }
        assert_eq!(names(&m), 0);
        let after = m.run(m.fs().statfs()).unwrap();
        assert_eq!(after.files_free, before.files_free);
        m.run(m.mount.unmount()).expect("a clean unmount");
        set_probe_sink(None);
        for name in [
            "server.merge.end",
            "server.merge.finalize_ours",
            "server.merge.splice",
        ] {
            let count = counts.borrow().get(name).copied().unwrap_or(0);
            assert!(count > 2, "{name} was reached {count} times: {counts:?}");
        }
        let options = CheckOptions {
            strict: true,
            ..CheckOptions::default()
        };
        let (meta, data) = (m.world.meta.handle(), m.world.data.handle());
        let report = m.world.block_on(check(meta, data, &options));
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.stats.data_mapped, 0, "all data is free again");
    }
}

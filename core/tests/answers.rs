//! What a whole mount answers when names come and go under a call, when there is
//! nothing to sync, and when it cannot leave cleanly.

use outrider_core::env::testing::TestWorld;
use outrider_core::env::testnet::{TestNet, TestNetHandle};
use outrider_core::env::{Duration, Entropy, Env, Gate, LocalBoxFuture, set_probe_sink};
use outrider_core::errno::Errno as E;
use outrider_core::fs::Fs;
use outrider_core::fs::api::{Caller, Inval, KernelCache, Posix, WriteHow};
use outrider_core::node::{Mount, NodeConfig, UnmountError};
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
/// `O_RDWR`.
const RDWR: u32 = 2;
/// `O_RDWR | O_TRUNC`.
const TRUNC: u32 = 0o1002;
/// The quorum blocks of a metadata device.
const QUORUM_BLOCKS: std::ops::Range<u64> = 17 * 4096..32 * 4096;

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

struct Mounted {
    world: TestWorld,
    mount: Rc<Mount>,
}

impl Mounted {
    fn new(seed: u64) -> Self {
        let net = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
        let world = TestWorld::with_network(seed, 64 << 30, 64 << 30, net);
        let (meta, data, env) = (world.meta.handle(), world.data.handle(), world.env());
        let options = MkfsOptions {
            slots: vec![(0, "127.0.0.1:8000".parse().expect("an address"))],
            ..MkfsOptions::default()
        };
        let made = mkfs(&*meta, &*data, &*env.entropy, env.clock.wall(), &options);
        world.block_on(made).expect("a volume");
        let config = NodeConfig::new(Some(0), Arc::new(AssumeDead));
        let rid = world.entropy.rid();
        let give_up = Gate::default();
        let mount = Mount::start(&env, rid, config, Rc::new(NoKernel), &give_up);
        let mount = world.block_on(mount).expect("a mount");
        Self { world, mount }
    }

    fn fs(&self) -> Rc<Fs> {
        Rc::clone(self.mount.fs())
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.world.block_on(future)
    }

    fn is_sound(&self) {
        let (meta, data) = (self.world.meta.snapshot(), self.world.data.snapshot());
        let options = CheckOptions::default();
        let report = self.run(check(meta.handle(), data.handle(), &options));
        assert!(report.is_clean(), "{:#?}", report.problems);
    }
}

/// Counts probes while it exists.
struct Probes(Rc<RefCell<BTreeMap<&'static str, u64>>>);

impl Probes {
    fn new() -> Self {
        let counts: Rc<RefCell<BTreeMap<_, _>>> = Rc::default();
        let counted = Rc::clone(&counts);
        set_probe_sink(Some(Box::new(move |name| {
            *counted.borrow_mut().entry(name).or_default() += 1;
        })));
        Self(counts)
    }

    fn count(&self, name: &str) -> u64 {
        self.0.borrow().get(name).copied().unwrap_or(0)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        set_probe_sink(None);
    }
}

#[test]
fn a_create_makes_the_file_when_the_one_it_found_goes_away() {
    let probes = Probes::new();
    for seed in 0..2 {
        let m = Mounted::new(seed);
        m.world.meta.set_yields(true);
        let (fs, env) = (m.fs(), m.world.env());
        let done: Rc<Gate> = Rc::default();
        for nr in 0..3 {
            let (fs, env, done) = (Rc::clone(&fs), env.clone(), Rc::clone(&done));
            m.world.env().spawn("unlink", async move {
                while !done.is_open() {
                    match fs.unlink(&ROOT, 1, b"name").await {
                        Ok(()) | Err(E::ENOENT) => {}
                        Err(error) => panic!("unlink: {error}"),
                    }
                    // Commits make changes wait half way.
                    fs.syncfs().await.expect("synced");
                    env.sleep(Duration::from_micros(env.entropy.next_u64() % (20 + nr)))
                        .await;
                }
            });
        }
        // Memory pressure: looking a name up and reading its inode wait for blocks.
        let (log, clock, done_too) = (m.mount.log().clone(), env.clone(), Rc::clone(&done));
        m.world.env().spawn("pressure", async move {
            while !done_too.is_open() {
                log.reclaim(0);
                clock.sleep(Duration::from_micros(3)).await;
            }
        });
        m.run(async {
            for _ in 0..200 {
                let made = fs.create(&ROOT, 1, b"name", 0o644, 0, RDWR).await;
                let (entry, opened) = made.expect("a create without O_EXCL gives a file");
                fs.release(entry.attr.ino, opened.fh).await;
                env.sleep(Duration::from_micros(env.entropy.next_u64() % 20))
                    .await;
            }
            done.open();
            env.sleep(Duration::from_secs(20)).await;
            assert_eq!(m.mount.unmount().await.map_err(|e| e.to_string()), Ok(()));
        });
        m.is_sound();
    }
    assert!(probes.count("fs.create_again") > 0, "the race was not run");
}

#[test]
fn a_create_that_found_a_file_answers_what_it_is_after_it_was_opened() {
    let m = Mounted::new(1);
    let fs = m.fs();
    m.run(async {
        let (made, opened) = fs
            .create(&ROOT, 1, b"f", 0o644, 0, RDWR)
            .await
            .expect("made");
        assert!(!made.attr_valid.is_zero());
        let ino = made.attr.ino;
        let data = bytes::Bytes::from_static(b"contents");
        let how = WriteHow::default();
        fs.write(&ROOT, ino, opened.fh, 0, data.into(), how)
            .await
            .expect("written");
        let (found, _) = fs
            .create(&ROOT, 1, b"f", 0o644, 0, RDWR)
            .await
            .expect("found");
        assert_eq!((found.attr.ino, found.attr.size), (ino, 8));
        // The kernel would take them for newer than what a writer left meanwhile.
        assert!(found.attr_valid.is_zero());
        let (cut, _) = fs
            .create(&ROOT, 1, b"f", 0o644, 0, TRUNC)
            .await
            .expect("cut off");
        assert_eq!((cut.attr.ino, cut.attr.size), (ino, 0));
        let excl = fs.create(&ROOT, 1, b"f", 0o644, 0, RDWR | 0o200).await;
        assert_eq!(excl.err(), Some(E::EEXIST));
        fs.mkdir(&ROOT, 1, b"d", 0o755, 0).await.expect("made");
        let dir = fs.create(&ROOT, 1, b"d", 0o644, 0, RDWR).await;
        assert_eq!(
            dir.err(),
            Some(E::ESTALE),
            "the kernel walks the path again"
        );
    });
}

#[test]
fn a_sync_of_a_clean_mount_commits_nothing() {
    let m = Mounted::new(2);
    let fs = m.fs();
    m.run(async {
        let (entry, opened) = fs
            .create(&ROOT, 1, b"f", 0o644, 0, RDWR)
            .await
            .expect("made");
        let ino = entry.attr.ino;
        fs.fsync(&ROOT, ino, opened.fh, false)
            .await
            .expect("synced");
        // The next transaction is open a moment later.
        m.world.env().sleep(Duration::from_millis(100)).await;
        let (commits, writes) = (m.mount.log().commits(), m.world.meta.counts().1);
        for _ in 0..10 {
            fs.syncfs().await.expect("synced");
            fs.fsync(&ROOT, ino, opened.fh, true).await.expect("synced");
        }
        assert_eq!(m.mount.log().commits(), commits);
        assert_eq!(m.world.meta.counts().1, writes);
        let data = bytes::Bytes::from_static(b"contents");
        let how = WriteHow::default();
        fs.write(&ROOT, ino, opened.fh, 0, data.into(), how)
            .await
            .expect("written");
        fs.syncfs().await.expect("synced");
        assert_eq!(m.mount.log().commits(), commits + 1);
    });
}

#[test]
fn an_unmount_says_that_its_last_commit_failed() {
    let m = Mounted::new(3);
    let fs = m.fs();
    m.run(async {
        fs.create(&ROOT, 1, b"f", 0o644, 0, RDWR)
            .await
            .expect("made");
        // Cut off, as by a cluster that declared it dead.
        m.mount.log().sever();
        let left = m.mount.unmount().await;
        assert!(matches!(left, Err(UnmountError::Lost(_))), "{left:?}");
    });
}

#[test]
fn an_unmount_says_that_its_slot_is_still_marked_as_in_use() {
    let m = Mounted::new(4);
    let fs = m.fs();
    m.run(async {
        fs.create(&ROOT, 1, b"f", 0o644, 0, RDWR)
            .await
            .expect("made");
        let quorum = |op: outrider_core::env::testing::DeviceOp| {
            op.op == "write" && QUORUM_BLOCKS.contains(&op.offset)
        };
        m.world.meta.set_fault(Some(Box::new(quorum)));
        let left = m.mount.unmount().await;
        assert!(matches!(left, Err(UnmountError::Quorum(_))), "{left:?}");
        m.world.meta.set_fault(None);
    });
    m.is_sound();
}

#[test]
fn reading_a_file_moves_its_access_time_in_memory_and_writes_nothing() {
    let m = Mounted::new(5);
    let fs = m.fs();
    m.run(async {
        let env = m.world.env();
        let made = fs.create(&ROOT, 1, b"f", 0o644, 0, RDWR).await;
        let (entry, opened) = made.expect("made");
        let (ino, fh) = (entry.attr.ino, opened.fh);
        let how = WriteHow::default();
        let data = bytes::Bytes::from_static(b"contents");
        fs.write(&ROOT, ino, fh, 0, data.into(), how)
            .await
            .expect("written");
        fs.syncfs().await.expect("synced");
        env.sleep(Duration::from_secs(5)).await;
        let atime = async || {
            let got = fs.getattr(&ROOT, ino).await;
            got.expect("its attributes").0.atime
        };
        let (before, commits) = (atime().await, m.mount.log().commits());
        fs.read(&ROOT, ino, fh, 0, 100).await.expect("read");
        let read = atime().await;
        assert!(read > before, "{read:?} after {before:?}");
        fs.release(ino, fh).await;
        assert_eq!(atime().await, read, "closing does not take it back");
        fs.syncfs().await.expect("synced");
        assert_eq!(m.mount.log().commits(), commits, "nothing was written");
        // Later than the last change: the next read does not move it (relatime).
        env.sleep(Duration::from_secs(5)).await;
        fs.read(&ROOT, ino, fh, 0, 100).await.expect("read");
        assert_eq!(atime().await, read);
        m.mount.unmount().await.expect("a clean unmount");
    });
}

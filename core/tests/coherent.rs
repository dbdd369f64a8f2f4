//! Two mounts of one volume, over the test network, with a model of what is awkward
//! about a kernel's page cache: a page that a READ under way has locked can not be
//! dropped, and a dirty one is written before it is dropped (spec 10 section 18).
//!
//! What can go wrong: a deadlock. The tests' executor fails when nothing can go on.

#![allow(clippy::disallowed_types)]

use bytes::Bytes;
use outrider_core::env::testing::TestWorld;
use outrider_core::env::testnet::{TestNet, TestNetHandle};
use outrider_core::env::{Duration, Entropy, Env, Gate, HashMap, LocalBoxFuture, Signal, timeout};
use outrider_core::fs::Fs;
use outrider_core::fs::api::{Caller, Inval, KernelCache, Posix, SetAttr, WriteHow, XattrSet};
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_core::volume::{MkfsOptions, mkfs};
use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

static ROOT: Caller = Caller {
    uid: 0,
    gid: 0,
    pid: 1,
    groups: Vec::new(),
};
const O_RDWR: u32 = 0o2;
const O_CREAT: u32 = 0o100;

struct AssumeDead;

impl FenceAgent for AssumeDead {
    fn fence(&self, _: &Env, _: FenceRequest) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The page cache of one node, as far as it can be in the way.
#[derive(Default)]
struct Pages {
    fs: RefCell<Option<Rc<Fs>>>,
    /// READs under way by inode.
    reading: RefCell<HashMap<u64, u32>>,
    read: Signal,
    /// A page dirtied through a mapping: handle and content of byte 0 on.
    dirty: RefCell<HashMap<u64, (u64, Bytes)>>,
    dropped: RefCell<Vec<Inval>>,
}

struct Kernel(Rc<Pages>);

impl KernelCache for Kernel {
    fn invalidate(&self, what: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        let pages = self.0.clone();
        Box::pin(async move {
            for one in what {
                if let Inval::Pages(ino) | Inval::PageRange { ino, .. } = one {
                    let idle = || {
                        let reading = pages.reading.borrow();
                        (reading.get(&ino).copied().unwrap_or(0) == 0).then_some(())
                    };
                    pages.read.wait_for(idle).await;
                    let dirty = pages.dirty.borrow_mut().remove(&ino);
                    if let Some((fh, data)) = dirty {
                        let fs = pages.fs.borrow().clone().unwrap();
                        let how = WriteHow {
                            from_pages: true,
                            ..WriteHow::default()
                        };
                        fs.write(&ROOT, ino, fh, 0, data.into(), how).await.unwrap();
                    }
                }
                pages.dropped.borrow_mut().push(one);
            }
            Vec::new()
        })
    }
}

impl Pages {
    fn fs(&self) -> Rc<Fs> {
        self.fs.borrow().clone().unwrap()
    }

    /// A READ that holds its pages until it is answered.
    async fn read(&self, ino: u64, fh: u64) -> Vec<u8> {
        *self.reading.borrow_mut().entry(ino).or_default() += 1;
        let fs = self.fs();
        let read = fs.read(&ROOT, ino, fh, 0, 4096).await.unwrap().concat();
        *self.reading.borrow_mut().get_mut(&ino).unwrap() -= 1;
        self.read.wake_all();
        read
    }
}

struct Pair {
    world: TestWorld,
    mounts: Vec<Rc<Mount>>,
    pages: Vec<Rc<Pages>>,
}

impl Pair {
    fn new(seed: u64) -> Self {
        Self::with(seed, |_| ())
    }

    fn with(seed: u64, change: impl Fn(&mut NodeConfig)) -> Self {
        let network = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
        let world = TestWorld::with_network(seed, 64 << 30, 128 << 30, network);
        let options = MkfsOptions {
            slots: vec![(0, "127.0.0.1:8000".parse().unwrap())],
            allow_small: true,
            ..MkfsOptions::default()
        };
        let env = world.env();
        let (meta, data) = (world.meta.handle(), world.data.handle());
        let made = mkfs(&*meta, &*data, &*env.entropy, env.clock.wall(), &options);
        world.block_on(made).unwrap();
        let (mut mounts, mut pages) = (Vec::new(), Vec::new());
        for slot in [Some(0), None] {
            let mut config = NodeConfig::new(slot, Arc::new(AssumeDead));
            // Some operations span groups, and directories do not share theirs.
            config.fs.inodes_per_lock = world.entropy.range(1, 20);
            change(&mut config);
            let cache = Rc::new(Pages::default());
            let kernel = Rc::new(Kernel(cache.clone()));
            let rid = world.entropy.rid();
            let mount = world.block_on(async {
                Mount::start(&env, rid, config, kernel, &Gate::default())
                    .await
                    .unwrap_or_else(|error| panic!("mount: {error}"))
            });
            *cache.fs.borrow_mut() = Some(mount.fs().clone());
            mounts.push(mount);
            pages.push(cache);
        }
        Self {
            world,
            mounts,
            pages,
        }
    }

    /// Runs, and fails if it does not end.
    fn run<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        let env = self.world.env();
        self.world.block_on(async {
            let deadline = env.clock.now() + Duration::from_secs(60);
            let ended = timeout(&*env.clock, deadline, future).await;
            ended.unwrap_or_else(|| panic!("{what} does not end"))
        })
    }

    fn fs(&self, node: usize) -> Rc<Fs> {
        self.mounts[node].fs().clone()
    }

    fn create(&self, name: &str) -> (u64, u64) {
        let fs = self.fs(0);
        let flags = O_RDWR | O_CREAT;
        let made = fs.create(&ROOT, 1, name.as_bytes(), 0o644, 0, flags);
        let (entry, opened) = self.run("create", made).unwrap();
        (entry.attr.ino, opened.fh)
    }

    fn unmount(self) {
        for mount in self.mounts.iter().rev() {
            self.world
                .block_on(mount.unmount())
                .expect("a clean unmount");
        }
    }
}

async fn put(fs: &Fs, ino: u64, fh: u64, data: &'static [u8]) {
    let data = Bytes::from_static(data);
    let how = WriteHow::default();
    let written = fs.write(&ROOT, ino, fh, 0, data.clone().into(), how).await;
    assert_eq!(written, Ok(data.len() as u32));
}

#[test]
fn a_page_held_by_a_read_that_waits_does_not_hold_up_a_revocation() {
    for seed in 0..6 {
        let pair = Pair::new(seed);
        let (ino, fh) = pair.create("f");
        let fs = [pair.fs(0), pair.fs(1)];
        pair.run("write", put(&fs[0], ino, fh, b"old"));
        pair.run("release", fs[0].release(ino, fh));
        let other = pair.run("open", fs[1].open(&ROOT, ino, 0)).unwrap().fh;
        pair.run("read", pair.pages[1].read(ino, other));
        let own = pair.run("open", fs[0].open(&ROOT, ino, O_RDWR)).unwrap().fh;
        pair.run("read", pair.pages[1].read(ino, other));
        // The write takes the lock away; readers keep coming, each with its page.
        let env = pair.world.env();
        let read = async {
            let mut last = Vec::new();
            for _ in 0..30 {
                last = pair.pages[1].read(ino, other).await;
                env.sleep(Duration::from_micros(env.entropy.range(0, 400)))
                    .await;
            }
            last
        };
        let write = async {
            for _ in 0..10 {
                put(&fs[0], ino, own, b"new").await;
                env.sleep(Duration::from_micros(env.entropy.range(0, 400)))
                    .await;
            }
        };
        let (last, ()) = pair.run("reads against writes", both(read, write));
        assert_eq!(last, b"new", "seed {seed}");
        pair.unmount();
    }
}

#[test]
fn a_read_with_its_page_passes_a_task_that_waits_for_a_higher_mode() {
    for seed in 0..6 {
        let pair = Pair::new(seed);
        let (ino, fh) = pair.create("f");
        let fs = [pair.fs(0), pair.fs(1)];
        pair.run("release", fs[0].release(ino, fh));
        let env = pair.world.env();
        let handles: Vec<u64> = (0..2)
            .map(|node| pair.run("open", fs[node].open(&ROOT, ino, 0)).unwrap().fh)
            .collect();
        // Both want WRITE again and again, with READ in hand and pages held.
        let node = |at: usize| {
            let (fs, pages, env) = (fs[at].clone(), pair.pages[at].clone(), env.clone());
            let fh = handles[at];
            async move {
                let read = async {
                    for _ in 0..15 {
                        pages.read(ino, fh).await;
                        env.sleep(Duration::from_micros(env.entropy.range(0, 300)))
                            .await;
                    }
                };
                let set = async {
                    for nr in 0..15u8 {
                        let value = [nr];
                        let set = fs.setxattr(&ROOT, ino, b"user.x", &value, XattrSet::Any);
                        set.await.unwrap();
                        let mode = SetAttr {
                            mode: Some(0o600 + u32::from(nr)),
                            ..SetAttr::default()
                        };
                        fs.setattr(&ROOT, ino, &mode).await.unwrap();
                    }
                };
                both(read, set).await;
            }
        };
        pair.run("reads against setxattr", both(node(0), node(1)));
        pair.unmount();
    }
}

#[test]
fn what_a_mapping_dirtied_is_written_before_another_node_reads() {
    for seed in 0..6 {
        let pair = Pair::new(seed);
        let (ino, fh) = pair.create("f");
        let fs = [pair.fs(0), pair.fs(1)];
        pair.run("write", put(&fs[0], ino, fh, b"0"));
        let other = pair.run("open", fs[1].open(&ROOT, ino, 0)).unwrap().fh;
        for nr in 1..10u8 {
            // A fault reads the page by the writable handle, then a store dirties it.
            pair.run("fault", pair.pages[0].read(ino, fh));
            let text = Bytes::from(vec![b'0' + nr]);
            let pages = &pair.pages[0];
            pages.dirty.borrow_mut().insert(ino, (fh, text.clone()));
            let read = pair.run("read elsewhere", pair.pages[1].read(ino, other));
            assert_eq!(read, text, "seed {seed}");
        }
        pair.unmount();
    }
}

#[test]
fn a_file_open_for_writing_is_not_shared_in_pages_under_read() {
    let pair = Pair::new(3);
    let (ino, fh) = pair.create("f");
    let fs = [pair.fs(0), pair.fs(1)];
    pair.run("write", put(&fs[0], ino, fh, b"text"));
    let other = pair.run("open", fs[1].open(&ROOT, ino, O_RDWR)).unwrap().fh;
    pair.run("fault", pair.pages[1].read(ino, other));
    for _ in 0..3 {
        for (at, fh) in [(0, fh), (1, other)] {
            pair.pages[1 - at].dropped.borrow_mut().clear();
            pair.run("fault", pair.pages[at].read(ino, fh));
            let dropped = pair.pages[1 - at].dropped.borrow();
            let has = |one: &Inval| matches!(one, Inval::Pages(of) if *of == ino);
            assert!(dropped.iter().any(has), "the other node has given it back");
        }
    }
    pair.unmount();
}

#[test]
fn names_and_attributes_of_a_revoked_group_are_forgotten() {
    let pair = Pair::new(5);
    let fs = [pair.fs(0), pair.fs(1)];
    let made = pair.run("mkdir", fs[0].mkdir(&ROOT, 1, b"d", 0o755, 0));
    let dir = made.unwrap().attr.ino;
    let seen = pair.run("lookup", fs[1].lookup(&ROOT, 1, b"d")).unwrap();
    assert_eq!(seen.attr.ino, dir);
    let missing = pair.run("lookup", fs[1].lookup(&ROOT, dir, b"f"));
    assert!(missing.is_err());
    pair.pages[1].dropped.borrow_mut().clear();
    pair.run("mkdir", fs[0].mkdir(&ROOT, dir, b"f", 0o755, 0))
        .unwrap();
    let dropped = pair.pages[1].dropped.borrow().clone();
    assert!(dropped.contains(&Inval::AllNames) && dropped.contains(&Inval::Attr(dir)));
    pair.run("lookup", fs[1].lookup(&ROOT, dir, b"f")).unwrap();
    pair.unmount();
}

/// A notification that meets an answer on its way to its caller makes the kernel throw
/// the answer away, so attributes under a lock that goes around are good for one call.
#[test]
fn attributes_under_a_lock_that_goes_around_need_no_notification() {
    let pair = Pair::new(6);
    let (ino, fh) = pair.create("f");
    let fs = [pair.fs(0), pair.fs(1)];
    let env = pair.world.env();
    let told = |node: usize| {
        let dropped = std::mem::take(&mut *pair.pages[node].dropped.borrow_mut());
        dropped.contains(&Inval::Attr(ino))
    };
    pair.run("lookup", fs[1].lookup(&ROOT, 1, b"f")).unwrap();
    pair.run("write", put(&fs[0], ino, fh, b"a"));
    assert!(told(1), "what it was told to believe");
    for _ in 0..5 {
        let (attr, valid) = pair.run("getattr", fs[1].getattr(&ROOT, ino)).unwrap();
        assert_eq!((attr.size, valid), (1, Duration::ZERO));
        pair.run("write", put(&fs[0], ino, fh, b"a"));
        assert!(!told(1));
    }
    // Left alone for a while, it is believed again.
    pair.run("getattr", fs[1].getattr(&ROOT, ino)).unwrap();
    pair.run("pause", env.sleep(Duration::from_millis(100)));
    let (_, valid) = pair.run("getattr", fs[1].getattr(&ROOT, ino)).unwrap();
    assert!(valid > Duration::from_secs(1));
    pair.run("write", put(&fs[0], ino, fh, b"a"));
    assert!(told(1));
    pair.run("release", fs[0].release(ino, fh));
    pair.unmount();
}

#[test]
fn idle_locks_are_bounded() {
    let pair = Pair::with(7, |config| {
        config.fs.inodes_per_lock = 1;
        config.locks.idle_count = 32;
    });
    let fs = pair.fs(0);
    for nr in 0..200 {
        let name = format!("f{nr}");
        let made = fs.mkdir(&ROOT, 1, name.as_bytes(), 0o755, 0);
        pair.run("mkdir", made).unwrap();
        // Time passes, as it does on a machine: a lock is given back when the kernel
        // has taken the answers that were given under it.
        let env = pair.world.env();
        pair.run("pause", env.sleep(Duration::from_millis(1)));
        let held = pair.mounts[0].locks().table().len();
        assert!(held <= 32 + 16, "{held} locks are held");
    }
    // What was given back is had again.
    let other = pair.fs(1);
    for nr in 0..200 {
        let name = format!("f{nr}");
        let seen = pair.run("lookup", other.lookup(&ROOT, 1, name.as_bytes()));
        assert_eq!(seen.unwrap().attr.nlink, 2);
    }
    pair.unmount();
}

#[test]
fn the_last_majority_leaves_together_and_ends() {
    for seed in 0..4 {
        let network = Rc::new(TestNetHandle(Rc::new(TestNet::default())));
        let world = TestWorld::with_network(seed, 64 << 30, 128 << 30, network);
        let slot = |nr: u64| (nr, format!("127.0.0.{}:8000", nr + 1));
        let slots = (0..3)
            .map(slot)
            .map(|(nr, addr)| (nr, addr.parse().unwrap()));
        let options = MkfsOptions {
            slots: slots.collect(),
            allow_small: true,
            ..MkfsOptions::default()
        };
        let env = world.env();
        let (meta, data) = (world.meta.handle(), world.data.handle());
        let made = mkfs(&*meta, &*data, &*env.entropy, env.clock.wall(), &options);
        world.block_on(made).unwrap();
        let start = |slot| {
            let (env, rid) = (env.clone(), world.entropy.rid());
            async move {
                let config = NodeConfig::new(Some(slot), Arc::new(AssumeDead));
                let kernel = Rc::new(Kernel(Rc::default()));
                let never = Gate::default();
                let mount = Mount::start(&env, rid, config, kernel, &never);
                mount.await.unwrap_or_else(|error| panic!("mount: {error}"))
            }
        };
        let (a, b) = world.block_on(both(start(0), start(1)));
        let ended = world.block_on(async {
            let deadline = env.clock.now() + Duration::from_secs(100);
            let leave = both(a.unmount(), b.unmount());
            timeout(&*env.clock, deadline, leave).await
        });
        assert!(ended.is_some(), "seed {seed}: one is left behind");
    }
}

async fn both<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> (A, B) {
    let (mut a, mut b) = (std::pin::pin!(a), std::pin::pin!(b));
    let (mut left, mut right) = (None, None);
    std::future::poll_fn(|cx| {
        use std::task::Poll;
        if left.is_none()
            && let Poll::Ready(value) = a.as_mut().poll(cx)
        {
            left = Some(value);
        }
        if right.is_none()
            && let Poll::Ready(value) = b.as_mut().poll(cx)
        {
            right = Some(value);
        }
        match (&left, &right) {
            (Some(_), Some(_)) => Poll::Ready(()),
            _ => Poll::Pending,
        }
    })
    .await;
    (left.unwrap(), right.unwrap())
}

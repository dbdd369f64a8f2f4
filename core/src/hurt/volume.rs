//! Whole volumes with damaged blocks: checked, printed, mounted, read, changed, left.

use super::{AllGone, NoKernel, Source, network};
use crate::block;
use crate::env::testing::{MemDevice, TestWorld};
use crate::env::{Duration, Entropy, Gate, timeout};
use crate::errno::Errno;
use crate::format::{LG_BLOCK_SIZE, seal};
use crate::fs::Fs;
use crate::fs::api::{Caller, Posix, SetAttr, WriteData, WriteHow, XattrSet};
use crate::node::{Mount, NodeConfig};
use crate::volume::golden::golden;
use crate::volume::print::{PrintOptions, print};
use crate::volume::{CheckOptions, MkfsOptions, Report, check, mkfs};
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

/// Turns of the executor that one damaged volume may take in all its stages.
const TURNS: u64 = 3_000_000;
/// Device reads after which a stage counts as running away.
const READS: u64 = 400_000;
/// Simulated time that a mount, a call or an unmount is waited for.
const PATIENCE: Duration = Duration::from_secs(150);
/// Objects that a walk visits.
const VISITS: usize = 48;

/// A volume to be damaged.
pub struct Subject {
    meta: MemDevice,
    data: MemDevice,
    /// Offsets and lengths of the metadata that a check reads.
    blocks: Vec<(u64, usize)>,
    small: bool,
}

/// A change of one block's bytes.
#[derive(Clone, Debug)]
pub struct Damage {
    /// Which of [`Subject::blocks`], by its number.
    pub block: usize,
    /// First byte.
    pub offset: usize,
    /// The new bytes.
    pub bytes: Vec<u8>,
    /// Whether the block gets a good CRC afterwards.
    pub sealed: bool,
}

/// What became of a damaged volume.
#[derive(Debug)]
pub struct Outcome {
    /// What the check said of the damage.
    pub before: Report,
    /// Whether it could be mounted; else the mount's error.
    pub mounted: Result<(), String>,
    /// The errors that calls ended with.
    pub errors: BTreeSet<i32>,
    /// Calls that ended well.
    pub good: u32,
    /// Whether the unmount was clean.
    pub left: bool,
    /// What the check said at the end.
    pub after: Report,
}

fn config(small: bool) -> NodeConfig {
    let mut config = NodeConfig::new(Some(0), Arc::new(AllGone));
    if small {
        config.block = block::Policy {
            reserve_server: 300,
            reserve_client: 300,
            btree_space: block::Policy::BTREE_SPACE_MIN,
            ..block::Policy::small()
        };
        config.log = crate::log::Policy::small();
        config.server.finalize_height = 1;
    }
    config
}

fn root() -> Caller {
    Caller {
        pid: 1,
        ..Caller::default()
    }
}

impl Subject {
    /// A volume that the original made, by its name.
    pub fn golden(name: &str) -> Self {
        let volume = golden(name);
        Self::over(volume.meta, volume.data, false)
    }

    /// Two small volumes of ours with some of everything: one that was left in peace,
    /// and one whose power failed.
    pub fn made() -> [Self; 2] {
        let world = TestWorld::with_network(11, 256 << 20, 64 << 20, network());
        let env = world.env();
        let options = MkfsOptions {
            slots: vec![(0, "127.0.0.1:8000".parse().expect("an address"))],
            allow_small: true,
            ..MkfsOptions::default()
        };
        world.block_on(async {
            let (meta, data) = (world.meta.handle(), world.data.handle());
            let wall = env.clock.wall();
            let made = mkfs(&*meta, &*data, &*env.entropy, wall, &options).await;
            made.expect("mkfs");
            let never = Gate::default();
            let mount = Mount::start(&env, 77, config(true), Rc::new(NoKernel), &never);
            let mount = mount.await.unwrap_or_else(|e| panic!("mount: {e}"));
            populate(mount.fs()).await;
            mount.fs().syncfs().await.expect("sync");
            // Time for merges.
            env.sleep(Duration::from_secs(30)).await;
            populate_more(mount.fs()).await;
            mount.fs().syncfs().await.expect("sync");
            let crashed = Self::over(world.meta.snapshot(), world.data.snapshot(), true);
            mount.unmount().await.expect("a clean unmount");
            let clean = Self::over(world.meta.snapshot(), world.data.snapshot(), true);
            [clean, crashed]
        })
    }

    fn over(meta: MemDevice, data: MemDevice, small: bool) -> Self {
        let reads = Rc::new(RefCell::new(BTreeSet::new()));
        let seen = reads.clone();
        meta.set_fault(Some(Box::new(move |op| {
            seen.borrow_mut().insert((op.offset, op.len));
            false
        })));
        let devices = (meta.handle(), data.handle());
        let options = CheckOptions::default();
        let report = crate::env::testing::block_on(check(devices.0, devices.1, &options));
        assert_eq!(report.errors, 0, "a sound volume: {:?}", report.problems);
        meta.set_fault(None);
        let blocks = reads.take().into_iter().collect();
        Self {
            meta,
            data,
            blocks,
            small,
        }
    }

    /// How many blocks can be damaged.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The content of the large blocks, for start corpora.
    pub fn large_blocks(&self) -> Vec<Vec<u8>> {
        let large = self.blocks.iter().filter(|b| b.1 == LG_BLOCK_SIZE);
        large.map(|b| self.meta.peek(b.0, b.1)).collect()
    }

    /// Damage drawn from a seed, of the kinds that storage and software bugs make.
    pub fn draw(&self, entropy: &dyn Entropy) -> Vec<Damage> {
        (0..=entropy.range(0, 3))
            .map(|_| {
                let block = entropy.range(0, self.blocks.len() as u64) as usize;
                let len = self.blocks[block].1 as u64;
                let used = if entropy.range(0, 2) == 0 { 400 } else { len };
                let (offset, n) = match entropy.range(0, 8) {
                    0 => (32, len - 32),
                    1..=4 => (entropy.range(4, used - 8), 8),
                    _ => (entropy.range(4, used), 1),
                };
                let noise = entropy.range(0, 4) > 0;
                let bytes = (0..n).map(|_| if noise { entropy.next_u64() as u8 } else { 0 });
                Damage {
                    block,
                    offset: offset as usize,
                    bytes: bytes.collect(),
                    sealed: entropy.range(0, 4) > 0,
                }
            })
            .collect()
    }

    /// Damage from a fuzzer's bytes: up to eight changes.
    pub fn parse(&self, source: &mut Source<'_>) -> Vec<Damage> {
        let mut all = Vec::new();
        while !source.is_empty() && all.len() < 8 {
            let block = usize::from(source.u16()) % self.blocks.len();
            let how = source.u8();
            let len = self.blocks[block].1;
            let mut offset = usize::from(source.u16());
            if how & 1 == 0 {
                // Heads and first items are where most of the meaning is.
                offset %= 512;
            }
            let n = [1, 2, 8, 24][usize::from(how >> 1 & 3)];
            all.push(Damage {
                block,
                offset: offset.min(len - 1),
                bytes: source.take(n).to_vec(),
                sealed: how & 0x38 != 0,
            });
        }
        all
    }

    fn hurt(&self, damage: &[Damage]) -> (MemDevice, MemDevice) {
        let meta = self.meta.snapshot();
        for change in damage {
            let (at, len) = self.blocks[change.block];
            let mut block = meta.peek(at, len);
            let end = (change.offset + change.bytes.len()).min(len);
            block[change.offset..end].copy_from_slice(&change.bytes[..end - change.offset]);
            if change.sealed {
                seal(&mut block);
            }
            meta.poke(at, &block);
        }
        (meta, self.data.snapshot())
    }

    /// Damages a copy and uses it in every way.
    ///
    /// # Panics
    /// If anything does not end in its bounds. Panics of the code under test go on.
    pub fn exercise(&self, damage: &[Damage]) -> Outcome {
        let (meta, data) = self.hurt(damage);
        let before = run_check(&meta, &data);
        run_print(&meta);
        let world = TestWorld::over(5, meta, data, network());
        limit_reads(&world.meta);
        let used = world.exec.drive(use_it(&world, config(self.small)), TURNS);
        let (mounted, calls, left) =
            used.unwrap_or_else(|| panic!("no end within {TURNS} turns: {damage:?}"));
        let (meta, data) = (world.meta.snapshot(), world.data.snapshot());
        let after = run_check(&meta, &data);
        Outcome {
            before,
            mounted,
            errors: calls.errors,
            good: calls.good,
            left,
            after,
        }
    }
}

/// Makes a device panic when it is read without end.
fn limit_reads(device: &MemDevice) {
    let mut left = READS;
    device.set_fault(Some(Box::new(move |op| {
        if op.op == "read" {
            left = left.checked_sub(1).expect("reads without end");
        }
        false
    })));
}

fn run_check(meta: &MemDevice, data: &MemDevice) -> Report {
    let meta = meta.snapshot();
    limit_reads(&meta);
    let world = TestWorld::over(5, meta, data.clone(), network());
    let (meta, data) = (world.meta.handle(), world.data.handle());
    let options = CheckOptions::default();
    let checked = world.exec.drive(check(meta, data, &options), TURNS);
    checked.expect("a check that ends")
}

fn run_print(meta: &MemDevice) {
    let meta = meta.snapshot();
    limit_reads(&meta);
    let mut shown = 0;
    let mut sink = |record: crate::volume::print::Record| shown += record.to_string().len();
    // It may well not begin: the super block can be what is damaged.
    let _ = crate::env::testing::block_on(print(meta.handle(), PrintOptions::default(), &mut sink));
}

#[derive(Default)]
struct Calls {
    errors: BTreeSet<i32>,
    good: u32,
    stuck: bool,
}

impl Calls {
    fn note<T>(&mut self, result: Option<Result<T, Errno>>) -> Option<T> {
        match result {
            Some(Ok(value)) => {
                self.good += 1;
                Some(value)
            }
            Some(Err(errno)) => {
                self.errors.insert(errno.0);
                None
            }
            None => {
                self.stuck = true;
                None
            }
        }
    }
}

/// Makes a call with patience, unless one was given up already.
macro_rules! call {
    ($env:expr, $calls:expr, $call:expr) => {
        if $calls.stuck {
            None
        } else {
            let deadline = $env.clock.now() + PATIENCE;
            let result = timeout(&*$env.clock, deadline, $call).await;
            $calls.note(result)
        }
    };
}

async fn use_it(world: &TestWorld, config: NodeConfig) -> (Result<(), String>, Calls, bool) {
    let env = world.env();
    let give_up = Gate::default();
    let (clock, gate) = (env.clock.clone(), give_up.clone());
    env.spawn("impatience", async move {
        clock.sleep_until(clock.now() + PATIENCE).await;
        gate.open();
    });
    let mut calls = Calls::default();
    let mount = match Mount::start(&env, 99, config, Rc::new(NoKernel), &give_up).await {
        Ok(mount) => mount,
        Err(error) => return (Err(error.to_string()), calls, false),
    };
    let fs = mount.fs().clone();
    let found = walk(&env, &fs, &mut calls).await;
    change(&env, &fs, &mut calls, &found).await;
    let left = match calls.stuck {
        true => None,
        false => timeout(&*env.clock, env.clock.now() + PATIENCE, mount.unmount()).await,
    };
    let clean = matches!(left, Some(Ok(())));
    if !clean {
        mount.force_unmount().await;
    }
    (Ok(()), calls, clean)
}

/// What a walk found: parent, name, number, mode.
type Found = Vec<(u64, Bytes, u64, u32)>;

async fn walk(env: &crate::env::Env, fs: &Rc<Fs>, calls: &mut Calls) -> Found {
    let cx = &root();
    let mut found = Found::new();
    let mut seen = BTreeSet::from([1]);
    let mut todo = vec![1];
    while let Some(dir) = todo.pop() {
        let Some(opened) = call!(env, calls, fs.opendir(cx, dir, 0)) else {
            continue;
        };
        let mut names = Vec::new();
        let mut sink = |entry: crate::fs::api::DirEntry| {
            names.push((entry.name, entry.ino));
            names.len() < VISITS
        };
        let plus = dir % 2 == 1;
        call!(
            env,
            calls,
            fs.readdir(cx, dir, opened.fh, 0, plus, &mut sink)
        );
        fs.releasedir(dir, opened.fh).await;
        for (name, _) in names {
            if found.len() >= VISITS || calls.stuck {
                return found;
            }
            if name == "." || name == ".." {
                continue;
            }
            let Some(entry) = call!(env, calls, fs.lookup(cx, dir, &name)) else {
                continue;
            };
            let (ino, mode) = (entry.attr.ino, entry.attr.mode);
            look_at(env, fs, calls, ino, mode).await;
            found.push((dir, name, ino, mode));
            if mode & 0o170_000 == 0o040_000 && seen.insert(ino) {
                todo.push(ino);
            }
        }
    }
    call!(env, calls, fs.statfs());
    found
}

async fn look_at(env: &crate::env::Env, fs: &Rc<Fs>, calls: &mut Calls, ino: u64, mode: u32) {
    let cx = &root();
    call!(env, calls, fs.getattr(cx, ino));
    if let Some(list) = call!(env, calls, fs.listxattr(cx, ino)) {
        for name in list
            .split(|b| *b == 0)
            .filter(|name| !name.is_empty())
            .take(4)
        {
            call!(env, calls, fs.getxattr(cx, ino, name));
        }
    }
    match mode & 0o170_000 {
        0o120_000 => {
            call!(env, calls, fs.readlink(cx, ino));
        }
        0o100_000 => {
            call!(env, calls, fs.fiemap(cx, ino, 0, u64::MAX, 100));
            if let Some(opened) = call!(env, calls, fs.open(cx, ino, 0)) {
                call!(env, calls, fs.read(cx, ino, opened.fh, 0, 128 << 10));
                let whence = crate::fs::api::Whence::Hole;
                call!(env, calls, fs.lseek(cx, ino, opened.fh, 0, whence));
                fs.release(ino, opened.fh).await;
            }
        }
        _ => {}
    }
}

async fn change(env: &crate::env::Env, fs: &Rc<Fs>, calls: &mut Calls, found: &Found) {
    let cx = &root();
    let bytes = |len: usize| WriteData::from(Bytes::from(vec![0x5a; len]));
    if let Some((entry, opened)) = call!(env, calls, fs.create(cx, 1, b"new", 0o644, 0, 2)) {
        let ino = entry.attr.ino;
        let how = WriteHow::default();
        call!(
            env,
            calls,
            fs.write(cx, ino, opened.fh, 5000, bytes(9000), how)
        );
        call!(env, calls, fs.fsync(cx, ino, opened.fh, false));
        fs.release(ino, opened.fh).await;
    }
    call!(env, calls, fs.mkdir(cx, 1, b"newdir", 0o755, 0));
    call!(env, calls, fs.symlink(cx, 1, b"newlink", b"over there"));
    for (n, (parent, name, ino, mode)) in found.iter().enumerate().take(40) {
        let (parent, ino) = (*parent, *ino);
        match n % 6 {
            0 => {
                let value = [7; 300];
                let set = fs.setxattr(cx, ino, b"user.new", &value, XattrSet::Any);
                call!(env, calls, set);
            }
            1 if mode & 0o170_000 == 0o100_000 => {
                let set = SetAttr {
                    size: Some(3000),
                    ..SetAttr::default()
                };
                call!(env, calls, fs.setattr(cx, ino, &set));
            }
            2 => {
                let to = format!("moved{n}");
                call!(env, calls, fs.rename(cx, parent, name, 1, to.as_bytes(), 0));
            }
            3 if mode & 0o170_000 == 0o040_000 => {
                call!(env, calls, fs.rmdir(cx, parent, name));
            }
            3 => {
                call!(env, calls, fs.unlink(cx, parent, name));
            }
            4 if mode & 0o170_000 == 0o100_000 => {
                if let Some(opened) = call!(env, calls, fs.open(cx, ino, 2)) {
                    let how = WriteHow::default();
                    call!(
                        env,
                        calls,
                        fs.write(cx, ino, opened.fh, 100, bytes(6000), how)
                    );
                    call!(env, calls, fs.fallocate(cx, ino, opened.fh, 0, 0, 1 << 20));
                    fs.release(ino, opened.fh).await;
                }
            }
            _ => {
                let to = format!("link{n}");
                call!(env, calls, fs.link(cx, ino, 1, to.as_bytes()));
            }
        }
    }
    call!(env, calls, fs.syncfs());
}

async fn populate(fs: &Rc<Fs>) {
    let cx = &root();
    let dir = fs.mkdir(cx, 1, b"dir", 0o755, 0).await.expect("mkdir");
    for n in 0..60_u64 {
        let parent = if n % 3 == 0 { 1 } else { dir.attr.ino };
        let name = format!("file-{n}");
        let made = fs.create(cx, parent, name.as_bytes(), 0o644, 0, 2).await;
        let (entry, opened) = made.expect("create");
        let ino = entry.attr.ino;
        for piece in 0..n % 4 {
            let data = WriteData::from(Bytes::from(vec![n as u8; 5000]));
            let how = WriteHow::default();
            let at = piece * 40_000;
            let wrote = fs.write(cx, ino, opened.fh, at, data, how).await;
            wrote.expect("write");
        }
        if n % 5 == 0 {
            let value = vec![n as u8; 20 + 40 * n as usize];
            let set = fs.setxattr(cx, ino, b"user.some", &value, XattrSet::Any);
            set.await.expect("setxattr");
        }
        fs.release(ino, opened.fh).await;
    }
    let target = [b'x'; 1500];
    fs.symlink(cx, 1, b"long", &target).await.expect("symlink");
}

async fn populate_more(fs: &Rc<Fs>) {
    let cx = &root();
    for n in 0..20_u64 {
        let parent = 1;
        let name = format!("file-{}", 3 * n);
        if n % 2 == 0 {
            let gone = fs.unlink(cx, parent, name.as_bytes()).await;
            gone.expect("unlink");
        } else {
            let to = format!("renamed-{n}");
            let moved = fs.rename(cx, parent, name.as_bytes(), 1, to.as_bytes(), 0);
            moved.await.expect("rename");
        }
    }
    // Open, without a name: an orphan of the crash.
    let made = fs.create(cx, 1, b"orphan", 0o644, 0, 2).await;
    made.expect("create");
    fs.unlink(cx, 1, b"orphan").await.expect("unlink");
}

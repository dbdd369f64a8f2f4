//! Are the simulated backends like the real ones? One script, without faults, is played
//! on the same core: over simulated devices, network and clock, and over files, io_uring,
//! TCP and the machine's clock. Every answer must be the same, and so must be what is left:
//! every record of metadata, at the same place, and every block of file data, byte for byte,
//! but for what time and chance decide. A third time it is played by programs on a mounted
//! directory, through the kernel: there the answers must be the same.
//!
//! Volume, mount and options are equal on both sides, to the ids that are drawn at random
//! elsewhere. Timers that commit or scan by themselves are put off until the script has
//! ended, as nobody can say where in a script the real clock would let them strike.
//!
//! What can go wrong: a script whose playing takes longer than the timers are put off.

mod player;
mod programs;
pub mod real;
pub mod script;
mod volume;

pub use volume::Left;

use crate::backend::disk::{Disks, Timing};
use crate::backend::net::{Links, SimNet};
use crate::backend::{Host, Life, Node, Sim};
use crate::model::Reply;
use crate::rng::Stream;
use crate::trace::Trace;
use crate::world::on_fresh_thread;
use outrider_core::env::{
    DeviceRole, Duration, Env, Gate, LocalBoxFuture, WallTime, set_mutant, set_probe_sink,
};
use outrider_core::fs::api::{Attr, Inval, KernelCache, StatFs};
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_core::volume::{MkfsOptions, mkfs};
use player::Player;
use script::{Author, Step};
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;

/// Sizes of the devices.
pub const META_SIZE: u64 = 8 << 30;
/// See [`META_SIZE`].
pub const DATA_SIZE: u64 = 8 << 30;
/// Under which the one mount of each side is known.
const RID: u64 = 0x5157_6173_2064_6966;
const FSID: u64 = 0x0d1f_fe2e_0000_0001;
/// No timer strikes before.
const LATER: Duration = Duration::from_secs(100_000);
/// How far outside of a run a time may lie that a clock has set, in seconds.
const SLACK: i64 = 5;

/// What was heard on one side.
#[derive(Debug)]
pub struct Heard {
    /// The script as it was played.
    pub steps: Vec<Step>,
    /// The answer to each step.
    pub replies: Vec<Reply>,
    /// When it began and ended, by the clock of the side.
    pub span: (WallTime, WallTime),
    /// What is on its devices; nothing where the kernel had a say in it.
    pub left: Option<Left>,
}

/// A difference of two sides.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    /// The number of the step, if it was an answer.
    pub step: Option<usize>,
    /// What is different.
    pub text: String,
}

/// What comes next: drawn, or as it was drawn for the other side.
pub enum Source {
    /// From a seed, for about so many calls.
    Draw(u64, usize),
    /// As before.
    Again(Vec<Step>),
}

enum Next {
    Author(Box<Author>),
    Again(std::vec::IntoIter<Step>),
}

impl Next {
    fn step(&mut self) -> Option<Step> {
        match self {
            Next::Author(author) => author.next_step(),
            Next::Again(steps) => steps.next(),
        }
    }
}

/// The programs of this kernel keep nothing.
struct Nothing;

impl KernelCache for Nothing {
    fn invalidate(&self, _: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

/// Nobody else ever mounts these volumes.
struct Nobody;

impl FenceAgent for Nobody {
    fn fence(&self, _: &Env, _: FenceRequest) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn config() -> NodeConfig {
    let mut config = NodeConfig::new(Some(0), Arc::new(Nobody));
    config.log.sync_delay = LATER;
    config.fs.orphan_scan_delay = LATER;
    config
}

fn says(error: &dyn std::fmt::Display) -> String {
    error.to_string()
}

/// Makes the volume.
async fn make(env: &Env, server: SocketAddrV4) -> Result<(), String> {
    let open = |role| env.devices.open(role).map_err(|error| says(&error));
    let (meta, data) = (open(DeviceRole::Meta)?, open(DeviceRole::Data)?);
    let options = MkfsOptions {
        slots: vec![(0, server)],
        allow_small: true,
        fsid: Some(FSID),
        uuid: Some(*b"outrider differs"),
        ..MkfsOptions::default()
    };
    let chance = Stream::new(0, "differential volume", 0);
    let made = mkfs(&*meta, &*data, &chance, WallTime::default(), &options).await;
    made.map(drop).map_err(|error| says(&error))
}

/// Makes a volume, mounts it, plays, unmounts it, and reads what is left.
async fn play(env: Env, server: SocketAddrV4, source: Source) -> Result<Heard, String> {
    make(&env, server).await?;
    let begun = env.clock.wall();
    let mount = Mount::start(&env, RID, config(), Rc::new(Nothing), &Gate::default()).await;
    let mount = mount.map_err(|error| says(&error))?;
    let player = Player::new(Rc::clone(mount.fs()));
    let mut next = match source {
        Source::Draw(seed, calls) => Next::Author(Box::new(Author::new(seed, calls))),
        Source::Again(steps) => Next::Again(steps.into_iter()),
    };
    let (mut steps, mut replies) = (Vec::new(), Vec::new());
    while let Some(step) = next.step() {
        let reply = player.play(&step).await;
        if let Next::Author(author) = &mut next {
            author.learn(&step, &reply);
        }
        steps.push(step);
        replies.push(reply);
    }
    let span = (begun, env.clock.wall());
    drop(player);
    mount.unmount().await.map_err(|error| says(&error))?;
    drop(mount);
    let left = Some(volume::left(&env, &replies).await?);
    Ok(Heard {
        steps,
        replies,
        span,
        left,
    })
}

/// Plays on the simulated side.
///
/// # Errors
/// What made it impossible.
pub fn simulated(seed: u64, source: Source) -> Result<Heard, String> {
    let port = 12_345;
    on_fresh_thread(move || {
        set_mutant(None);
        set_probe_sink(None);
        let config = madsim::Config::default();
        let runtime = madsim::runtime::Runtime::with_seed_and_config(seed, config);
        runtime.block_on(async move {
            let sim = Sim::new(seed, Trace::default());
            let node = Node::new(0, 0, 1_700_000_000_000_000_000);
            let disks = Disks::new(&sim, META_SIZE, DATA_SIZE, Timing::default());
            let host = Host {
                net: SimNet::new(&sim, Links::default()),
                disks: Rc::clone(&disks),
                life: Life::new(),
                sim: Rc::clone(&sim),
                node,
            };
            let server = SocketAddrV4::new(host.node.ip, port);
            let heard = play(host.env("mount"), server, source).await;
            host.life.kill();
            sim.end().await;
            disks.end();
            heard
        })
    })?
}

/// A time without what a clock decides.
fn calm(time: WallTime, (begun, ended): (WallTime, WallTime)) -> WallTime {
    match (begun.sec - SLACK..=ended.sec + SLACK).contains(&time.sec) {
        true => WallTime { sec: -1, nsec: 0 },
        false => time,
    }
}

fn calm_attr(attr: &Attr, span: (WallTime, WallTime), atimes: bool) -> Attr {
    Attr {
        atime: match atimes {
            true => calm(attr.atime, span),
            false => WallTime::default(),
        },
        mtime: calm(attr.mtime, span),
        ctime: calm(attr.ctime, span),
        crtime: calm(attr.crtime, span),
        ..*attr
    }
}

fn calm_reply(reply: &Reply, span: (WallTime, WallTime), atimes: bool) -> Reply {
    match reply {
        Reply::Entry(attr) => Reply::Entry(calm_attr(attr, span, atimes)),
        Reply::Attr(attr) => Reply::Attr(calm_attr(attr, span, atimes)),
        // What is free is a matter of how far the server has come by then.
        Reply::Stat(stat) => Reply::Stat(StatFs {
            free: 0,
            files_free: 0,
            ..*stat
        }),
        other => other.clone(),
    }
}

/// All differences, or as many as anybody wants to read.
pub fn compare(one: &Heard, other: &Heard, most: usize) -> Vec<Difference> {
    let mut all = Vec::new();
    for (number, step) in one.steps.iter().enumerate() {
        // What the kernel's cache answers is read without the filesystem hearing of it.
        let atimes = one.left.is_some() && other.left.is_some();
        let calm_reply = |reply: &Reply, span| calm_reply(reply, span, atimes);
        let left = calm_reply(&one.replies[number], one.span);
        let right = other.replies.get(number);
        let right = right.map(|reply| calm_reply(reply, other.span));
        if right.as_ref() != Some(&left) {
            let text = format!("{:?}: {left:?} and {right:?}", step.call);
            all.push(Difference {
                step: Some(number),
                text: clip(&text),
            });
        }
    }
    if let (Some(left), Some(right)) = (&one.left, &other.left) {
        compare_left(left, right, &mut all);
    }
    all.truncate(most);
    all
}

fn clip(text: &str) -> String {
    text.chars().take(600).collect()
}

fn compare_left(one: &Left, other: &Left, all: &mut Vec<Difference>) {
    let (left, right) = (&one.records, &other.records);
    if left.len() != right.len() {
        let text = format!("{} and {} records of metadata", left.len(), right.len());
        all.push(Difference { step: None, text });
    }
    for (left, right) in left.iter().zip(right).filter(|(left, right)| left != right) {
        let text = clip(left) + "\n  and " + &clip(right);
        all.push(Difference { step: None, text });
    }
    let (left, right) = (&one.blocks, &other.blocks);
    for (at, digest) in left {
        if right.get(at) != Some(digest) {
            let text = format!("the block at {at:#x} of the data device");
            all.push(Difference { step: None, text });
        }
    }
}

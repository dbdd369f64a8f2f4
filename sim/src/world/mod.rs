//! A world of one node (those of several are in `cluster`), from an empty pair of devices to the last check:
//! make the volume, then life after life of the mount: mount, look at
//! everything and judge what the last crash left, run the workload under
//! faults, end as the plan says. At the end all faults are healed, and
//! everything must work, be there, and check clean.
//!
//! Every wait has a bound in simulated time: what takes longer is a failure of
//! liveness, with the calls that hang.

mod audit;
pub mod cluster;
pub mod commits;
mod contents;
mod follow;
pub mod invariants;
mod life;
pub mod node;
mod posix;
pub mod snapshot;
mod workload;

use crate::backend::disk::{Disks, Timing};
use crate::backend::net::{Links, SimNet};
use crate::backend::{Host, Life, Node, Sim, turn_randomness};
use crate::model::{Model, S_IFDIR};
use crate::oracle::walk::Followers;
use crate::oracle::{Oracle, Violation};
use crate::plan::Plan;
use crate::trace::{Sink, Trace};
use outrider_core::env::{set_mutant, set_probe_sink};
use outrider_core::fs::api::{Archive, KernelCache, Posix};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Why a mount did not come up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountError(pub String);

/// What is under test: something that can be mounted.
#[allow(async_fn_in_trait)] // one thread
pub trait System: Sized + 'static {
    /// What stays between mounts, beside the devices.
    type Volume: 'static;
    /// The mounted filesystem.
    type Fs: Posix + Archive + 'static;

    /// Makes the volume on the devices of `host`.
    async fn make(host: &Host, plan: &Plan) -> Result<Rc<Self::Volume>, String>;
    /// Mounts it.
    async fn mount(
        host: &Host,
        plan: &Plan,
        volume: &Rc<Self::Volume>,
        cache: Rc<dyn KernelCache>,
    ) -> Result<Rc<Self>, MountError>;
    /// The mounted filesystem.
    fn fs(self: &Rc<Self>) -> Rc<Self::Fs>;
    /// Unmounts it; everything is durable when it succeeds.
    async fn unmount(self: Rc<Self>) -> Result<(), String>;
    /// Gives up what is not durable.
    async fn force_unmount(self: Rc<Self>);
    /// Whether it tells the kernels of other mounts what they must forget. Without that
    /// a kernel that keeps anything is not right in a world of several nodes.
    const TELLS_OTHER_KERNELS: bool = true;
    /// Completes when the cluster has declared this mount dead, or it has given up.
    async fn evicted(&self) {
        std::future::pending().await
    }
    /// Whether [`System::evicted`] has completed.
    fn is_evicted(&self) -> bool {
        false
    }
    /// What waits in it, for a failure of liveness.
    fn waits(&self) -> String {
        String::new()
    }
    /// Checks the devices; `clean` after an unmount.
    async fn check(host: &Host, volume: &Rc<Self::Volume>, clean: bool) -> Result<(), String>;
}

/// What a world came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Digest of all events.
    pub event_hash: u64,
    /// Digest of both devices at the end.
    pub image_hash: u64,
    /// Number of events.
    pub events: u64,
    /// Polls of tasks.
    pub polls: u64,
    /// Simulated nanoseconds.
    pub nanos: u64,
    /// Calls answered or left unanswered.
    pub calls: u64,
    /// Windows whose judgement was given up.
    pub unjudged: u64,
    /// Steps of the judge's searches.
    pub steps: u64,
    /// Probes reached, with counts.
    pub probes: BTreeMap<&'static str, u64>,
    /// What went wrong.
    pub failure: Option<Violation>,
    /// What somebody outside of the filesystem did wrong, which ended the world:
    /// a fence agent that lied.
    pub blamed: Option<String>,
    /// Where it left the way of its seed, if it was to.
    pub forked: Option<Forked>,
}

/// Another way from a moment on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// Nanoseconds of the world: until then it does what its seed says.
    pub at: u64,
    /// From then on its randomness follows from this; `None` lets it go on as it does.
    pub to: Option<u64>,
}

/// What was behind a world when it came to its [`Fork`]: equal for all ways of a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forked {
    /// Events.
    pub events: u64,
    /// Their digest.
    pub hash: u64,
    /// Polls of tasks.
    pub polls: u64,
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes panics of worlds remembered instead of printed. Call once per process.
pub fn remember_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().name() != Some("world") {
            return usual(info);
        }
        let text = info.payload_as_str().unwrap_or("a panic without a message");
        let place = info
            .location()
            .map(|at| format!("{}:{}", at.file(), at.line()))
            .unwrap_or_default();
        let mut text = format!("{text} (at {place})");
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            text = format!("{text}\n{}", std::backtrace::Backtrace::force_capture());
        }
        PANIC.with(|cell| cell.borrow_mut().get_or_insert(text).len());
    }));
}

/// Runs `f` on a thread of its own, as the executor demands: thread-local state
/// of a second world on one thread would differ.
///
/// # Errors
/// The message of its panic.
#[allow(clippy::disallowed_methods)]
pub fn on_fresh_thread<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    std::thread::Builder::new()
        .name("world".to_owned())
        .stack_size(16 << 20)
        .spawn(move || {
            catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
                let remembered = PANIC.with(|cell| cell.borrow_mut().take());
                let text = || panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                remembered
                    .or_else(text)
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "a panic without a message".to_owned())
            })
        })
        .expect("a thread for the world")
        .join()
        .unwrap_or_else(|_| Err("the world's thread died".to_owned()))
}

/// How to run a world, beside its plan.
#[derive(Default)]
pub struct Options {
    /// A planted bug to switch on.
    pub mutant: Option<&'static str>,
    /// Where the events go.
    pub sink: Option<Box<dyn FnOnce() -> Sink + Send>>,
    /// Where to leave the way of the seed.
    pub fork: Option<Fork>,
    /// When to look at its state.
    pub moments: Option<snapshot::Moments>,
    /// Where to add the processor time that the world took, in nanoseconds.
    pub spent: Option<Arc<AtomicU64>>,
}

/// Processor time of this thread in nanoseconds. Asked for outside of the executor, which
/// would tell the time of its world.
fn cpu_nanos() -> u64 {
    // SAFETY: plain figures, written by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage
    };
    [usage.ru_utime, usage.ru_stime]
        .iter()
        .map(|time| time.tv_sec as u64 * 1_000_000_000 + time.tv_usec as u64 * 1000)
        .sum()
}

/// Runs a whole world on a fresh thread.
pub fn run<S: System>(plan: &Plan, options: Options) -> Outcome {
    let seed = plan.seed;
    let plan = plan.clone();
    // Beside the outcome: a panic has none.
    let forked = Arc::new(OnceLock::new());
    let noted = Arc::clone(&forked);
    let result = on_fresh_thread(move || {
        set_mutant(options.mutant);
        let sink = options.sink.map(|make| make());
        let looks = Looks {
            fork: options.fork.map(|fork| (fork, noted)),
            moments: options.moments,
        };
        let runtime =
            madsim::runtime::Runtime::with_seed_and_config(seed, madsim::Config::default());
        let outcome = runtime.block_on(world::<S>(plan, sink, looks));
        if let Some(spent) = options.spent {
            spent.fetch_add(cpu_nanos(), Ordering::Relaxed);
        }
        outcome
    });
    let outcome = result.unwrap_or_else(|panic| Outcome {
        seed,
        failure: Some(Violation {
            kind: if panic.starts_with(invariants::BROKEN) {
                "invariant"
            } else {
                "panic"
            },
            text: panic,
        }),
        ..Outcome::default()
    });
    Outcome {
        forked: forked.get().copied(),
        ..outcome
    }
}

/// Lets the world leave the way of its seed when the time has come.
fn prepare_fork(sim: &Sim, fork: Fork, noted: Arc<OnceLock<Forked>>) {
    sim.look_at(fork.at, move |sim| {
        let behind = Forked {
            events: sim.trace.count(),
            hash: sim.trace.hash(),
            polls: sim.polls(),
        };
        noted.set(behind).expect("a world forks once");
        if let Some(to) = fork.to {
            turn_randomness(to);
        }
    });
}

/// What all parts of a running world share.
struct World<S: System> {
    plan: Plan,
    sim: Rc<Sim>,
    node: Rc<Node>,
    net: Rc<SimNet>,
    disks: Rc<Disks>,
    volume: Rc<S::Volume>,
    oracle: Rc<RefCell<Oracle>>,
    followers: Rc<RefCell<Followers>>,
    steps: Rc<RefCell<Vec<(u64, i64, i64)>>>,
    tags: Rc<std::cell::Cell<u64>>,
    calls: std::cell::Cell<u64>,
}

impl<S: System> World<S> {
    fn host(&self) -> Host {
        Host {
            sim: Rc::clone(&self.sim),
            node: Rc::clone(&self.node),
            life: Life::new(),
            net: Rc::clone(&self.net),
            disks: Rc::clone(&self.disks),
        }
    }

    fn note(&self, kind: &'static str, args: &[u64], text: impl FnOnce() -> String) {
        let now = self.sim.now();
        self.sim.trace.event(now, self.node.id, kind, args, text);
    }
}

/// What is done between two steps, beside the world.
struct Looks {
    fork: Option<(Fork, Arc<OnceLock<Forked>>)>,
    moments: Option<snapshot::Moments>,
}

async fn world<S: System>(plan: Plan, sink: Option<Sink>, looks: Looks) -> Outcome {
    let calls = snapshot::Calls::default();
    let sink = match &looks.moments {
        Some(_) => Some(snapshot::noting(&calls, sink)),
        None => sink,
    };
    let sim = Sim::new(plan.seed, Trace::new(sink));
    if let Some((fork, noted)) = looks.fork {
        prepare_fork(&sim, fork, noted);
    }
    sim.set_yield(u64::from(plan.config.yield_permille));
    sim.set_held(plan.config.stress.held.clone());
    sim.set_poll_cost(u64::from(plan.config.poll_cost));
    let probes: Rc<RefCell<BTreeMap<&'static str, u64>>> = Rc::default();
    let (counted, tracing) = (Rc::clone(&probes), Rc::downgrade(&sim));
    set_probe_sink(Some(Box::new(move |name| {
        *counted.borrow_mut().entry(name).or_default() += 1;
        if let Some(sim) = tracing.upgrade() {
            sim.note_probe(name);
            let now = sim.now();
            let node = sim.running_node();
            sim.trace.event(now, node, "probe", &[], || name.to_owned());
        }
    })));
    let config = &plan.config;
    let timing = match config.disk_speed {
        0 => Timing {
            base: 5_000,
            spread: 5_000,
            flush: 10_000,
            per_sector: 100,
        },
        1 => Timing::default(),
        _ => Timing {
            base: 2_000_000,
            spread: 10_000_000,
            flush: 20_000_000,
            per_sector: 20_000,
        },
    };
    let wall = 1_700_000_000_000_000_000 + (plan.seed as i64 & 0xffff_ffff);
    let node = Node::new(0, i64::from(config.drift_ppm), wall);
    let mut outcome = Outcome {
        seed: plan.seed,
        ..Outcome::default()
    };
    let net = SimNet::new(&sim, Links::default());
    let disks = Disks::new(&sim, config.meta_size, config.data_size, timing);
    disks.set_slow_reads(u64::from(config.stress.slow_reads), config.stress.slow_by);
    if let Some(moments) = looks.moments {
        let looker = snapshot::Looker {
            moments: RefCell::new(moments),
            calls,
            net: Rc::downgrade(&net),
            disks: Rc::downgrade(&disks),
            nodes: plan.cluster.as_ref().map_or(1, |c| c.nodes.len()),
        };
        Rc::new(looker).start(&sim);
    }
    let host = Host {
        sim: Rc::clone(&sim),
        node: Rc::clone(&node),
        life: Life::new(),
        net: Rc::clone(&net),
        disks: Rc::clone(&disks),
    };
    let made = S::make(&host, &plan).await;
    commits::Commits::install(&sim, &disks, plan.config.check_every);
    let result = match made {
        Err(text) => Err(Violation { kind: "mkfs", text }),
        Ok(volume) if plan.cluster.is_some() => {
            let parts = cluster::Parts {
                plan,
                sim: Rc::clone(&sim),
                net,
                disks: Rc::clone(&disks),
                first: node,
            };
            cluster::world::<S>(parts, volume, &mut outcome).await
        }
        Ok(volume) => {
            let world = Rc::new(World::<S> {
                plan,
                sim: Rc::clone(&sim),
                node,
                net,
                disks: Rc::clone(&disks),
                volume,
                oracle: Rc::new(RefCell::new(Oracle::new(Model::new(S_IFDIR | 0o755)))),
                followers: Rc::default(),
                steps: Rc::default(),
                tags: Rc::default(),
                calls: std::cell::Cell::new(0),
            });
            let result = commits::until_broken(&sim, life::all_lives(&world)).await;
            outcome.unjudged = world.oracle.borrow().unjudged();
            outcome.steps = world.oracle.borrow().steps();
            outcome.calls = world.calls.get();
            result
        }
    };
    if let Err(failure) = &result {
        sim.trace.event(sim.now(), 0, "FAILURE", &[], || {
            format!("{}: {}", failure.kind, failure.text)
        });
    }
    outcome.failure = result.err();
    outcome.event_hash = sim.trace.hash();
    outcome.events = sim.trace.count();
    outcome.image_hash = disks.hash();
    outcome.polls = sim.polls();
    outcome.nanos = sim.now();
    set_probe_sink(None);
    outcome.probes = probes.take();
    sim.end().await;
    disks.end();
    outcome
}

#[cfg(test)]
mod tests;

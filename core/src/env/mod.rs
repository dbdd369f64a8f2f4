//! The seams: everything in core that is not computation comes through here.
//!
//! Core never learns the time, a random number, the order of a hash map, or a
//! byte from a device or a peer in any other way, so the same code runs on real
//! machines and in the seeded simulator (docs/design.md section 3).
//!
//! What can go wrong: a second way in. The lints in `clippy.toml` refuse the
//! usual ones; the two-process determinism check finds the rest.

mod buf;
mod channel;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
#[cfg(any(test, feature = "testing"))]
pub mod conformance_clock;
#[cfg(any(test, feature = "testing"))]
pub mod conformance_net;
mod device;
mod net;
mod probe;
mod race;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(any(test, feature = "testing"))]
pub mod testnet;
mod time;
pub mod watch;

pub use buf::{ALIGN, AlignedBuf, IoBuf};
pub use channel::{Gate, Notify, Signal};
pub use device::{BlockDevice, DeviceError, DeviceRole, Devices, WriteFlags};
pub use net::{Datagram, Listener, NetError, Network, Stream, StreamReader, StreamWriter};
pub use probe::{ProbeSink, mutant, probe, set_mutant, set_probe_sink};
pub use race::{Either, pause, race, timeout};
pub use time::{Clock, Duration, Time, WallTime};

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// A boxed future that stays on its actor's thread.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The hasher of every map in core: no seed, equal in every process.
pub type BuildHasher = rustc_hash::FxBuildHasher;
/// A hash map with a fixed hasher. Its iteration order must never reach a
/// message, a block or a log line: sort first, or use a `BTreeMap`.
pub type HashMap<K, V> = hashbrown::HashMap<K, V, BuildHasher>;
/// A hash set with a fixed hasher; see [`HashMap`].
pub type HashSet<K> = hashbrown::HashSet<K, BuildHasher>;

/// Random numbers: seeded in the simulator, the system's in production.
pub trait Entropy {
    /// The next 64 random bits.
    fn next_u64(&self) -> u64;

    /// A uniform number in `[low, high)`.
    ///
    /// # Panics
    /// If the range is empty.
    fn range(&self, low: u64, high: u64) -> u64 {
        assert!(low < high, "empty range {low}..{high}");
        // Lemire's multiplication; the bias is below 2^-32 for the ranges in use.
        low + ((u128::from(self.next_u64()) * u128::from(high - low)) >> 64) as u64
    }

    /// A random number that is neither 0 nor all ones, as rids must be (spec 17 section 1).
    fn rid(&self) -> u64 {
        loop {
            let n = self.next_u64();
            if n != 0 && n != u64::MAX {
                return n;
            }
        }
    }
}

/// A started local task. Dropping it leaves the task running.
pub trait Task {
    /// Drops the task's future at its next suspension point (or at once, if it is not running).
    fn abort(&self);
    /// Whether the task has ended or was aborted.
    fn is_finished(&self) -> bool;
}

/// What an actor runs: called once on the actor's own thread (or simulated task set)
/// with the seams that belong to that actor.
pub type ActorMain = Box<dyn FnOnce(Env) -> LocalBoxFuture<'static, ()> + Send>;

/// Starts tasks and actors.
pub trait Spawner {
    /// Starts a task on the calling actor's thread.
    fn spawn_local(&self, name: &'static str, task: LocalBoxFuture<'static, ()>) -> Rc<dyn Task>;

    /// Starts an actor: its own thread in production, its own task group in the
    /// simulator. It ends when its main future ends; its local tasks end with it.
    fn spawn_actor(&self, name: &str, main: ActorMain);

    /// A point where other ready tasks may run. Free in production; in the
    /// simulator it yields or not by seed. Core places it where the original had a race.
    fn yield_point(&self, name: &'static str) -> LocalBoxFuture<'static, ()>;
}

/// One actor's seams. Cheap to clone; never crosses threads.
#[derive(Clone)]
pub struct Env {
    /// Monotonic and wall time.
    pub clock: Rc<dyn Clock>,
    /// Datagrams and streams.
    pub net: Rc<dyn Network>,
    /// Random numbers.
    pub entropy: Rc<dyn Entropy>,
    /// Tasks and actors.
    pub spawner: Rc<dyn Spawner>,
    /// The volume's two devices, to be opened by each actor for itself.
    pub devices: Rc<dyn Devices>,
}

impl Env {
    /// Starts a task on this actor's thread.
    pub fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + 'static,
    ) -> Rc<dyn Task> {
        self.spawner.spawn_local(name, Box::pin(task))
    }

    /// Waits for `duration` of monotonic time.
    pub fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        self.clock.sleep_until(self.clock.now() + duration)
    }
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env").finish_non_exhaustive()
    }
}

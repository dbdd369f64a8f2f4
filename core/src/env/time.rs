//! Time: a monotonic clock for timers, a wall clock for what users see.
//!
//! What can go wrong: deciding by the wall clock. It steps; only time stamps of
//! inodes and of quorum events come from it.

use super::LocalBoxFuture;

pub use std::time::Duration;

/// A monotonic instant: nanoseconds since some start of the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// Nanoseconds since the start.
    pub const fn nanos(self) -> u64 {
        self.0
    }

    /// How much later `self` is than `earlier`; zero if it is not.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Time {
    type Output = Time;
    fn add(self, rhs: Duration) -> Time {
        Time(
            self.0
                .saturating_add(u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

/// Wall-clock time: signed seconds since 1970 and nanoseconds below 10^9.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WallTime {
    /// Seconds since 1970-01-01 00:00 UTC; may be negative.
    pub sec: i64,
    /// Nanoseconds, 0..10^9.
    pub nsec: u32,
}

/// The clocks of one node.
pub trait Clock {
    /// Monotonic time; never goes backwards.
    fn now(&self) -> Time;
    /// Wall time; may step in either direction.
    fn wall(&self) -> WallTime;
    /// Completes once `now() >= deadline`.
    fn sleep_until(&self, deadline: Time) -> LocalBoxFuture<'static, ()>;
}

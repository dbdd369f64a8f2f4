//! The real machine below the filesystem: block devices over io_uring, and the
//! threads that actors run on.
//!
//! * [`Runtime`] starts actors, each on a thread of its own with one loop over
//!   one ring: disk completions, timers, readiness of files, wake-ups from other
//!   threads ([`rt`]).
//! * [`FileDevice`] is `BlockDevice` over files, loop devices and raw devices,
//!   with `O_DIRECT` ([`device`]).
//! * [`lock`] proves that another process has let go of a device.
//!
//! What can go wrong: io_uring is forbidden on some hosts (seccomp, sysctl).
//! Then a pool of threads makes the same system calls one by one, and a warning
//! says so.

// This crate is the real machine: clocks, threads and hash maps are its business.
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros
)]

pub mod device;
pub mod lock;
mod pool;
pub mod reactor;
pub mod rt;
mod wake;

pub use device::{FileDevice, OpenError, OpenOptions, VolumeFiles};
pub use reactor::{Engine, IoConfig, Reactor};
pub use rt::{Runtime, RuntimeConfig, spawn_polled};

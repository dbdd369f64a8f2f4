//! The FUSE front: requests in, answers and invalidations out; and what a
//! mount needs of its host.
//!
//! * [`session`] reads requests and polls each one's future once in place;
//! * `caller` writes into the memory of who waits for an ioctl;
//! * [`notify`] tells the kernel what to forget;
//! * [`kernel`] makes and ends the mount;
//! * [`options`] are what a mount is told;
//! * [`fence`] records mounts on this host, kills one and proves that it is gone;
//! * [`asking`] shows fence requests to agents outside;
//! * [`rundir`] is what the original shows in sysfs;
//! * [`scsi`] takes and takes away keys of persistent reservations.
//!
//! What can go wrong is told at the head of each.

// This crate faces the real kernel: threads, clocks and hash maps are its business.
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros
)]

pub mod abi;
pub mod asking;
mod caller;
pub mod counters;
pub mod daemon;
pub mod fence;
pub mod ioctl;
pub mod kernel;
pub mod key_file;
pub mod notify;
pub mod options;
pub mod reply;
pub mod request;
pub mod rundir;
pub mod scsi;
mod serve;
pub mod session;
pub mod show;
pub mod watchdog;

pub use notify::Notifier;
pub use session::{Agreed, Ended, Session, SessionOptions};

//! Network over real TCP and UDP (spec 08 section 5).
//!
//! One thread runs a tokio reactor for all sockets of the process. Actors read and
//! write their sockets themselves, on their own threads and executors; the reactor
//! only tells them when a socket is ready. So no byte is copied between threads and
//! a slow reader slows its sender down, as TCP wants it.
//!
//! * [`transport`]: the seams' traits over any sockets with tokio's traits.
//! * [`tcp`]: the operating system's sockets and their options.
//!
//! What can go wrong: a host that dies with data in flight is noticed after many
//! minutes. Keepalive covers an idle connection and the user timeout one with
//! unacknowledged data; both are set on every socket, at both ends.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    reason = "this crate faces the real machine: threads and sockets are its work"
)]

pub mod tcp;
pub mod transport;

pub use tcp::{NetThread, RealNetwork, Tcp};
pub use transport::{Transport, TransportNetwork};

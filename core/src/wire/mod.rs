//! Messages between mounts and the server: framing, reliable connections and the
//! server's side of accepting them (spec 08 sections 2 to 5).
//!
//! * [`frame`]: bytes to messages and back, and what makes a message invalid.
//! * [`error`]: error codes of the wire.
//! * [`greeting`]: the first message in each direction, and what it decides.
//! * [`conn`]: the brain of one reliable connection, which outlives sockets.
//! * [`listener`]: all client connections of a server.
//!
//! What can go wrong: a message handled twice or never after a reconnect, an
//! answer that reaches another server than the one that asked, a port scan that
//! gets somebody fenced. [`conn::Conn`] and [`listener::Connections`] each say
//! how they prevent theirs.

pub mod conn;
pub mod error;
pub mod frame;
pub mod greeting;
pub mod listener;

pub use conn::{Conn, Received};
pub use error::{errno_from_wire, wire_from_errno};
pub use frame::{Decoder, Frame, FrameError};
pub use listener::{Connections, GreetingInfo, ListenerConfig, NotConnected, Origin, ServerHooks};

use crate::format::NetCmd;

/// Commands that a client handles as requests (spec 08 section 7).
pub const fn client_handles(cmd: NetCmd) -> bool {
    matches!(
        cmd,
        NetCmd::SyncLogTrees | NetCmd::Lock | NetCmd::LockRecover | NetCmd::OpenInoMap
    )
}

#[cfg(test)]
mod tests;

//! The server's way to its clients, as a trait so that tests can stand in for them.

use crate::env::LocalBoxFuture;
use crate::errno::Errno;
use crate::format::NetCmd;
use crate::wire::listener::{Connections, NotConnected, Origin};
use bytes::Bytes;

/// Sends to clients by rid; see [`Connections`], which it mirrors.
pub trait Peers {
    /// Queues the answer to a request.
    ///
    /// # Errors
    /// If the session that asked is gone.
    fn respond(&self, to: &Origin, body: Result<Bytes, Errno>) -> Result<(), NotConnected>;
    /// Queues a request and returns its id.
    ///
    /// # Errors
    /// If the client has no session.
    fn request(&self, rid: u64, cmd: NetCmd, payload: Bytes) -> Result<u64, NotConnected>;
    /// Whether the client has a socket now.
    fn is_connected(&self, rid: u64) -> bool;
    /// Closes the client's socket; it may reconnect.
    fn break_connection(&self, rid: u64);
    /// Closes the client's socket and forgets it.
    fn drop_client(&self, rid: u64);
    /// Forgets everybody. No hook is called any more; completes when none runs.
    fn shutdown(&self) -> LocalBoxFuture<'_, ()>;
}

impl Peers for Connections {
    fn respond(&self, to: &Origin, body: Result<Bytes, Errno>) -> Result<(), NotConnected> {
        Connections::respond(self, to, body)
    }
    fn request(&self, rid: u64, cmd: NetCmd, payload: Bytes) -> Result<u64, NotConnected> {
        Connections::request(self, rid, cmd, payload)
    }
    fn is_connected(&self, rid: u64) -> bool {
        Connections::is_connected(self, rid)
    }
    fn break_connection(&self, rid: u64) {
        Connections::break_connection(self, rid);
    }
    fn drop_client(&self, rid: u64) {
        Connections::drop_client(self, rid);
    }
    fn shutdown(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(Connections::shutdown(self))
    }
}

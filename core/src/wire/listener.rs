//! All client connections of a server (spec 08 sections 4 and 5).
//!
//! A *session* is what the spec calls a connection object that completed its
//! greeting: one for each rid, with the reliable state in [`Conn`](super::Conn).
//! Sockets come and go below it. A socket that never greets belongs to no session,
//! so nobody is ever fenced for a port scan; and since a rid has exactly one
//! session, moving to a new socket is one assignment that nothing can get between
//! (spec 08 sections 13.6 and 13.8).

use super::frame::Frame;
use crate::env::{Duration, Env, LocalBoxFuture, NetError};
use crate::errno::Errno;
use crate::format::NetCmd;
use bytes::Bytes;
use std::net::SocketAddrV4;
use std::rc::Rc;
use thiserror::Error;

/// What a server's connections are started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerConfig {
    /// Volume id.
    pub fsid: u64,
    /// Format version of the volume.
    pub fmt_vers: u64,
    /// This server's term, greater than 0.
    pub term: u64,
    /// How long a client may stay away before [`ServerHooks::reconnect_timeout`].
    pub reconnect_timeout: Duration,
    /// How long a new socket may take to send its greeting.
    pub greeting_timeout: Duration,
    /// Most sockets that have not greeted yet; more are closed at once.
    pub max_strangers: usize,
    /// Most bytes written in one call.
    pub write_chunk: usize,
    /// Unsent bytes of a session above which nothing more is read from its client.
    pub max_unsent: usize,
}

impl ListenerConfig {
    /// The usual limits for a server of `term`.
    pub const fn new(fsid: u64, fmt_vers: u64, term: u64) -> Self {
        Self {
            fsid,
            fmt_vers,
            term,
            reconnect_timeout: Duration::from_secs(20),
            greeting_timeout: Duration::from_secs(20),
            max_strangers: 1024,
            write_chunk: 64 << 10,
            max_unsent: 4 << 20,
        }
    }
}

/// A greeting whose fsid, format version and length are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GreetingInfo {
    /// The mount.
    pub rid: u64,
    /// The client's end of the connection.
    pub peer: SocketAddrV4,
    /// Whether the mount is a quorum member.
    pub quorum: bool,
    /// Whether the client is unmounting with its farewell pending.
    pub farewell: bool,
    /// Term of the last server the client greeted; 0 if none.
    pub client_term: u64,
    /// Whether `client_term` is not this server's term.
    pub first_contact: bool,
}

/// Which request is answered: it names the client *and* the session that the
/// request came from, so a late answer never reaches another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The client.
    pub rid: u64,
    /// The client's session.
    pub session: u64,
    /// Number of the request.
    pub id: u64,
    /// Command of the request.
    pub cmd: NetCmd,
}

/// The client has no session (ENOTCONN), or another one than the request came from.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("client {rid:016x} is not connected")]
pub struct NotConnected {
    /// The client.
    pub rid: u64,
}

/// What the server does about its clients. All calls come on the server's own
/// actor, never while a [`Connections`] method of another caller runs; they may
/// call [`Connections`] themselves.
pub trait ServerHooks {
    /// Decides about a greeting (spec 08 section 4, server steps 2 and 3). Nothing
    /// else of this client is handled meanwhile. For `client_term` 0 the mounted
    /// client item is inserted and durable when this completes; for another term
    /// the item must exist, unless the client says farewell. At first contact the
    /// client is on the open map list *before* its greeting recovery ends.
    ///
    /// # Errors
    /// The greeting is refused with this error and the socket closed.
    fn greet(&self, greeting: GreetingInfo) -> LocalBoxFuture<'_, Result<(), Errno>>;

    /// The client has a session now (`nr_clients` up; start of lock recovery, if it
    /// is pending). Called once for each session, before its first request.
    fn attached(&self, rid: u64);

    /// The session is freed: `nr_clients` down, queued farewells of `rid` dropped.
    /// Called once for each [`ServerHooks::attached`], but not at shutdown.
    fn gone(&self, rid: u64);

    /// A request, in the order of arrival. Must not wait: long work is spawned.
    fn request(&self, origin: Origin, payload: Bytes);

    /// The answer to request `id` of this server.
    ///
    /// # Errors
    /// The answer is against the protocol: the connection is broken.
    fn response(
        &self,
        rid: u64,
        id: u64,
        cmd: NetCmd,
        body: Result<Bytes, Errno>,
    ) -> Result<(), Errno>;

    /// The client did not come back in time: fence it. Its session is freed next.
    fn reconnect_timeout(&self, rid: u64, last_peer: SocketAddrV4);

    /// The listening socket failed: the server stops itself.
    fn listener_failed(&self, error: NetError);
}

/// The connections of one server. Cheap to clone.
#[derive(Clone)]
pub struct Connections {
    _inner: Rc<()>,
}

impl Connections {
    /// Starts to accept connections on `listener`.
    pub fn start(
        _env: &Env,
        _listener: Box<dyn crate::env::Listener>,
        _config: ListenerConfig,
        _hooks: Rc<dyn ServerHooks>,
    ) -> Connections {
        unreachable!("lands next")
    }

    /// Queues the answer to a request; an error is sent without payload.
    ///
    /// # Errors
    /// If the session that asked is gone. A session that waits for its client to
    /// reconnect counts as there.
    pub fn respond(&self, _to: &Origin, _body: Result<Bytes, Errno>) -> Result<(), NotConnected> {
        unreachable!("lands next")
    }

    /// Queues a request to a client and returns its id.
    ///
    /// # Errors
    /// If the client has no session.
    pub fn request(&self, _rid: u64, _cmd: NetCmd, _payload: Bytes) -> Result<u64, NotConnected> {
        unreachable!("lands next")
    }

    /// Closes the client's socket; its session waits for it to reconnect.
    pub fn break_connection(&self, _rid: u64) {
        unreachable!("lands next")
    }

    /// Closes the client's socket and frees its session, as after a fence.
    pub fn drop_client(&self, _rid: u64) {
        unreachable!("lands next")
    }

    /// Clients with a session and their last known addresses, by rid.
    pub fn clients(&self) -> Vec<(u64, SocketAddrV4)> {
        unreachable!("lands next")
    }

    /// Stops listening, closes every socket and frees every session, without
    /// fencing anybody. No hook is called any more once this returns.
    pub fn shutdown(&self) {
        unreachable!("lands next")
    }
}

#[allow(unused)]
type Sketch = Frame;

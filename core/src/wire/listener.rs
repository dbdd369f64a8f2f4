//! All client connections of a server (spec 08 sections 4 and 5).
//!
//! A *session* is what the spec calls a connection object that completed its
//! greeting: one for each rid, with the reliable state in [`Conn`](super::Conn).
//! Sockets come and go below it. A socket that never greets belongs to no session,
//! so nobody is ever fenced for a port scan; and since a rid has exactly one
//! session, moving to a new socket is one assignment that nothing can get between
//! (spec 08 sections 13.6 and 13.8).

mod socket;

use super::conn::{Conn, Received};
use super::frame::{Decoder, Frame};
use super::greeting::{self, Attach};
use crate::env::{
    Duration, Either, Env, Gate, LocalBoxFuture, NetError, Signal, Stream, StreamReader,
    StreamWriter, Task, pause, probe, race, timeout,
};
use crate::errno::Errno;
use crate::format::{NetCmd, NetGreeting};
use crate::notice::Notice;
use bytes::{Bytes, BytesMut};
use socket::{SocketEnd, Strangers, accept_loop};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use thiserror::Error;

/// Time between two log lines about dropped connections of one kind.
const NOTICE: Duration = Duration::from_secs(10);
/// Connections accepted, and messages read from one client, before others of the
/// actor get a turn: a flood is always ready.
const ACCEPTS_PER_TURN: u64 = 16;
const FRAMES_PER_TURN: u64 = 64;

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
    /// Most sockets that have not greeted yet. For one more, the oldest of the
    /// address that has most of them is closed.
    pub max_strangers: usize,
    /// Most bytes written in one call.
    pub write_chunk: usize,
    /// Unsent bytes of a session above which nothing more is read from its client.
    pub max_unsent: usize,
    /// Bytes kept for a client, above which it is against the protocol not to
    /// acknowledge them.
    pub max_kept: usize,
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
            max_strangers: 256,
            write_chunk: 64 << 10,
            max_unsent: 4 << 20,
            max_kept: 64 << 20,
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
    /// Called once for each [`ServerHooks::attached`], but not at shutdown. A queued
    /// farewell needs no answer then: the client sends it again, or finds its
    /// mounted client item gone.
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

/// Commands that a server handles as requests (spec 08 section 7).
const fn handles(cmd: NetCmd) -> bool {
    !matches!(
        cmd,
        NetCmd::Greeting | NetCmd::SyncLogTrees | NetCmd::LockRecover
    )
}

/// One client's connection object.
struct Session {
    id: u64,
    rid: u64,
    state: RefCell<SessionState>,
    /// There is something to write.
    to_write: Signal,
    /// Something was written.
    written: Signal,
}

struct SessionState {
    conn: Conn,
    /// Id of the greeting that attached the socket: larger is more recent.
    greeting_id: u64,
    peer: SocketAddrV4,
    /// A FAREWELL response was handed to the socket.
    saw_farewell: bool,
    /// Closes the socket that is up, if one is.
    socket: Option<Gate>,
    /// Waits for the client to reconnect.
    waiting: Option<Rc<dyn Task>>,
}

struct Inner {
    env: Env,
    config: ListenerConfig,
    hooks: RefCell<Option<Rc<dyn ServerHooks>>>,
    sessions: RefCell<BTreeMap<u64, Rc<Session>>>,
    next_session: Cell<u64>,
    /// Sockets that have not greeted yet.
    strangers: RefCell<Strangers>,
    /// Log lines about dropped connections, by reason.
    dropped: RefCell<BTreeMap<&'static str, Notice>>,
    closed: Gate,
    /// Tasks that still run: sockets and the accept loop.
    tasks: Cell<usize>,
    ended: Signal,
}

/// Counts a running task.
struct Running(Rc<Inner>);

impl Running {
    fn new(inner: &Rc<Inner>) -> Self {
        inner.tasks.set(inner.tasks.get() + 1);
        Self(inner.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.tasks.set(self.0.tasks.get() - 1);
        self.0.ended.wake_all();
    }
}

/// The connections of one server. Cheap to clone.
#[derive(Clone)]
pub struct Connections {
    inner: Rc<Inner>,
}

impl Connections {
    /// Starts to accept connections on `listener`.
    pub fn start(
        env: &Env,
        listener: Box<dyn crate::env::Listener>,
        config: ListenerConfig,
        hooks: Rc<dyn ServerHooks>,
    ) -> Connections {
        let inner = Rc::new(Inner {
            env: env.clone(),
            config,
            hooks: RefCell::new(Some(hooks)),
            sessions: RefCell::default(),
            next_session: Cell::new(1),
            strangers: RefCell::default(),
            dropped: RefCell::default(),
            closed: Gate::default(),
            tasks: Cell::new(0),
            ended: Signal::default(),
        });
        let running = Running::new(&inner);
        env.spawn("accept", accept_loop(running, listener));
        Connections { inner }
    }

    /// Queues the answer to a request; an error is sent without payload.
    ///
    /// # Errors
    /// If the session that asked is gone. A session that waits for its client to
    /// reconnect counts as there.
    pub fn respond(&self, to: &Origin, body: Result<Bytes, Errno>) -> Result<(), NotConnected> {
        let session = self.inner.session(to.rid)?;
        if session.id != to.session {
            probe("response_to_freed_session");
            return Err(NotConnected { rid: to.rid });
        }
        let mut state = session.state.borrow_mut();
        let epoch = state.conn.epoch();
        state.conn.respond(epoch, to.id, to.cmd, body);
        drop(state);
        session.to_write.wake_all();
        Ok(())
    }

    /// Queues a request to a client and returns its id.
    ///
    /// # Errors
    /// If the client has no session.
    ///
    /// # Panics
    /// If clients do not handle `cmd`: the original's would read past its table.
    pub fn request(&self, rid: u64, cmd: NetCmd, payload: Bytes) -> Result<u64, NotConnected> {
        assert!(
            super::client_handles(cmd),
            "request {cmd:?} to a client that has no handler"
        );
        let session = self.inner.session(rid)?;
        let id = session.state.borrow_mut().conn.request(cmd, payload);
        session.to_write.wake_all();
        Ok(id)
    }

    /// Whether the client has a socket now, not only a session.
    pub fn is_connected(&self, rid: u64) -> bool {
        let session = self.inner.session(rid);
        session.is_ok_and(|session| session.state.borrow().socket.is_some())
    }

    /// Closes the client's socket; its session waits for it to reconnect.
    pub fn break_connection(&self, rid: u64) {
        if let Ok(session) = self.inner.session(rid)
            && let Some(gate) = &session.state.borrow().socket
        {
            gate.open();
        }
    }

    /// Closes the client's socket and frees its session, as after a fence.
    pub fn drop_client(&self, rid: u64) {
        if let Ok(session) = self.inner.session(rid) {
            self.inner.free(&session);
        }
    }

    /// Clients with a session and their last known addresses, by rid.
    pub fn clients(&self) -> Vec<(u64, SocketAddrV4)> {
        let sessions = self.inner.sessions.borrow();
        sessions
            .iter()
            .map(|(rid, session)| (*rid, session.state.borrow().peer))
            .collect()
    }

    /// Stops listening, closes every socket and frees every session, without
    /// fencing anybody. No hook is called any more from now on; completes when the
    /// last task has ended, so a greeting hook that still waits is waited for.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        inner.hooks.borrow_mut().take();
        inner.closed.open();
        let sessions = std::mem::take(&mut *inner.sessions.borrow_mut());
        for session in sessions.values() {
            session.close();
        }
        inner
            .ended
            .wait_for(|| (inner.tasks.get() == 0).then_some(()))
            .await;
    }
}

impl Session {
    /// Closes the socket and stops waiting for another one.
    fn close(&self) {
        let mut state = self.state.borrow_mut();
        if let Some(gate) = state.socket.take() {
            gate.open();
        }
        if let Some(waiting) = state.waiting.take() {
            waiting.abort();
        }
        state.conn.detach();
    }

    /// Moves to a new socket; what the old one still does has no effect.
    fn attach(&self, id: u64, peer: SocketAddrV4, term: u64) -> Gate {
        self.close();
        let gate = Gate::default();
        let mut state = self.state.borrow_mut();
        state.greeting_id = id;
        state.peer = peer;
        state.socket = Some(gate.clone());
        state.conn.attach(term);
        gate
    }
}

impl Inner {
    fn session(&self, rid: u64) -> Result<Rc<Session>, NotConnected> {
        let sessions = self.sessions.borrow();
        sessions.get(&rid).cloned().ok_or(NotConnected { rid })
    }

    fn hooks(&self) -> Option<Rc<dyn ServerHooks>> {
        self.hooks.borrow().clone()
    }

    fn is_current(&self, session: &Session) -> bool {
        let sessions = self.sessions.borrow();
        sessions
            .get(&session.rid)
            .is_some_and(|s| s.id == session.id)
    }

    fn free(&self, session: &Session) {
        if !self.is_current(session) {
            return;
        }
        self.sessions.borrow_mut().remove(&session.rid);
        session.close();
        if let Some(hooks) = self.hooks() {
            hooks.gone(session.rid);
        }
    }

    fn new_session(&self, rid: u64, peer: SocketAddrV4) -> Rc<Session> {
        let id = self.next_session.get();
        self.next_session.set(id + 1);
        let session = Rc::new(Session {
            id,
            rid,
            state: RefCell::new(SessionState {
                conn: Conn::server(self.config.term),
                greeting_id: 0,
                peer,
                saw_farewell: false,
                socket: None,
                waiting: None,
            }),
            to_write: Signal::default(),
            written: Signal::default(),
        });
        self.sessions.borrow_mut().insert(rid, session.clone());
        session
    }

    /// Finds or makes the session for an accepted greeting and attaches the socket.
    /// All in one step: nothing can be sent to the rid in between (13.8).
    fn attach(&self, id: u64, info: &GreetingInfo) -> Option<Attached> {
        let old = self.session(info.rid).ok();
        let current = old.as_ref().map(|session| {
            let state = session.state.borrow();
            greeting::Current {
                greeting_id: state.greeting_id,
                used: state.conn.recv_seq() > 0,
            }
        });
        let (session, is_new) = match (greeting::decide(current, id, info), old) {
            (Attach::Refuse, _) => {
                probe("greeting_refused_stale");
                return None;
            }
            (Attach::Move, Some(session)) => {
                probe("session_moved");
                (session, false)
            }
            (Attach::Replace, Some(old)) => {
                probe("session_replaced");
                self.free(&old);
                (self.new_session(info.rid, info.peer), true)
            }
            _ => (self.new_session(info.rid, info.peer), true),
        };
        let seq = session.state.borrow_mut().conn.greeting_response();
        let gate = session.attach(id, info.peer, self.config.term);
        if is_new && let Some(hooks) = self.hooks() {
            hooks.attached(info.rid);
        }
        Some(Attached { session, gate, seq })
    }

    /// Says that a connection without a session ended, at a bounded rate.
    fn dropped(&self, peer: SocketAddrV4, end: &SocketEnd) {
        if self.closed.is_open() {
            return;
        }
        let kind = end.kind();
        let mut notices = self.dropped.borrow_mut();
        let notice = notices.entry(kind).or_insert(Notice::new(NOTICE));
        if let Some(more) = notice.admit(self.env.clock.now()) {
            tracing::warn!(%peer, kind, more, "connection dropped: {end}");
        }
    }

    fn answer(&self, rid: u64) -> NetGreeting {
        NetGreeting {
            fsid: self.config.fsid.into(),
            fmt_vers: self.config.fmt_vers.into(),
            server_term: self.config.term.into(),
            rid: rid.into(),
            flags: 0.into(),
        }
    }
}

/// A socket that greeted.
struct Attached {
    session: Rc<Session>,
    /// Opens when this socket is to be closed.
    gate: Gate,
    /// Seq of the greeting response.
    seq: u64,
}

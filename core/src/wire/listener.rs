//! All client connections of a server (spec 08 sections 4 and 5).
//!
//! A *session* is what the spec calls a connection object that completed its
//! greeting: one for each rid, with the reliable state in [`Conn`](super::Conn).
//! Sockets come and go below it. A socket that never greets belongs to no session,
//! so nobody is ever fenced for a port scan; and since a rid has exactly one
//! session, moving to a new socket is one assignment that nothing can get between
//! (spec 08 sections 13.6 and 13.8).

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

async fn accept_loop(running: Running, mut listener: Box<dyn crate::env::Listener>) {
    let inner = &running.0;
    let mut accepted = 0_u64;
    loop {
        match race(inner.closed.wait(), listener.accept()).await {
            Either::Left(()) => return,
            Either::Right(Ok(stream)) => {
                accepted += 1;
                if accepted.is_multiple_of(ACCEPTS_PER_TURN) {
                    pause().await;
                }
                let Some(stranger) = Stranger::new(inner, stream.peer) else {
                    inner.dropped(stream.peer, &SocketEnd::Crowded);
                    continue;
                };
                let running = Running::new(inner);
                let socket = socket(running, stranger, stream);
                inner.env.spawn("client socket", socket);
            }
            Either::Right(Err(error)) => {
                tracing::error!(%error, "the listening socket failed");
                if let Some(hooks) = inner.hooks() {
                    hooks.listener_failed(error);
                }
                return;
            }
        }
    }
}

/// Why a socket ended; for the log.
#[derive(Debug, Error)]
enum SocketEnd {
    #[error("the client closed it")]
    Eof,
    #[error("{0}")]
    Net(#[from] NetError),
    #[error("{0}")]
    Frame(#[from] super::FrameError),
    #[error("message {0:?} has no business here")]
    Unexpected(NetCmd),
    #[error("answer to {0:?} against the protocol: {1}")]
    Protocol(NetCmd, Errno),
    #[error("it was to be closed")]
    Asked,
    #[error("others without a greeting needed its place")]
    Crowded,
    #[error("the client does not acknowledge what it is sent")]
    Unacknowledged,
}

async fn next_frame(
    reader: &mut dyn StreamReader,
    decoder: &mut Decoder,
) -> Result<Frame, SocketEnd> {
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return Ok(frame);
        }
        let chunk = reader.read().await?;
        if chunk.is_empty() {
            return Err(SocketEnd::Eof);
        }
        decoder.push(&chunk);
    }
}

impl SocketEnd {
    /// What kind of end it is, for the log.
    const fn kind(&self) -> &'static str {
        match self {
            Self::Eof | Self::Net(NetError::Reset) => "closed without a greeting",
            Self::Net(NetError::Untrusted(_)) => "cluster key",
            Self::Net(NetError::TimedOut) => "silent",
            Self::Net(_) => "network",
            Self::Frame(_) => "garbage",
            Self::Unexpected(_) => "out of place",
            Self::Protocol(..) => "refused",
            Self::Asked => "closed",
            Self::Crowded => "crowded out",
            Self::Unacknowledged => "no acknowledgements",
        }
    }
}

/// Sockets that have not greeted, oldest first.
#[derive(Default)]
struct Strangers {
    next: u64,
    sockets: BTreeMap<u64, (Ipv4Addr, Gate)>,
}

impl Strangers {
    /// The one to go for another one: the oldest of the address with most of them,
    /// so that one host's flood does not cost another its place. Those whose
    /// greeting is being judged stay.
    fn victim(&self) -> Option<&Gate> {
        let mut counts: BTreeMap<Ipv4Addr, u32> = BTreeMap::new();
        for (ip, _) in self.waiting() {
            *counts.entry(*ip).or_default() += 1;
        }
        let (crowd, _) = counts.iter().max_by_key(|(_, count)| **count)?;
        self.waiting()
            .find(|(ip, _)| ip == crowd)
            .map(|(_, gate)| gate)
    }

    fn waiting(&self) -> impl Iterator<Item = &(Ipv4Addr, Gate)> {
        self.sockets.values().filter(|(_, gate)| !gate.is_open())
    }
}

/// A socket that has not greeted.
struct Stranger {
    inner: Rc<Inner>,
    nr: u64,
    /// Opens when another one needs the place.
    crowded: Gate,
}

impl Stranger {
    /// Takes a place; `None` if there is none and nobody to give one up.
    fn new(inner: &Rc<Inner>, peer: SocketAddrV4) -> Option<Self> {
        let mut strangers = inner.strangers.borrow_mut();
        if strangers.sockets.len() >= inner.config.max_strangers {
            probe("too_many_strangers");
            strangers.victim()?.open();
        }
        let nr = strangers.next;
        strangers.next += 1;
        let crowded = Gate::default();
        strangers.sockets.insert(nr, (*peer.ip(), crowded.clone()));
        Some(Self {
            inner: inner.clone(),
            nr,
            crowded,
        })
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.inner.strangers.borrow_mut().sockets.remove(&self.nr);
    }
}

/// The life of one accepted socket.
async fn socket(running: Running, stranger: Stranger, stream: Stream) {
    let inner = &running.0;
    let Stream {
        mut reader,
        mut writer,
        peer,
        ..
    } = stream;
    let mut decoder = Decoder::default();
    let greeted = greet(
        inner,
        stranger,
        peer,
        (&mut *reader, &mut *writer),
        &mut decoder,
    );
    let (attached, first) = match greeted.await {
        Ok(greeted) => greeted,
        Err(end) => {
            inner.dropped(peer, &end);
            return;
        }
    };
    let Attached { session, gate, .. } = &attached;
    let io = race(
        read_loop(inner, session, gate, &mut *reader, &mut decoder),
        write_loop(inner, session, &mut *writer, first),
    );
    let end = match race(gate.wait(), io).await {
        Either::Left(()) => SocketEnd::Asked,
        Either::Right(Either::Left(end) | Either::Right(end)) => end,
    };
    tracing::info!(rid = %format_args!("{:016x}", session.rid), %peer, %end, "client disconnected");
    socket_down(inner, session, gate);
}

/// Reads and judges the greeting; gives the attached session and the response's bytes.
async fn greet(
    inner: &Rc<Inner>,
    stranger: Stranger,
    peer: SocketAddrV4,
    (reader, writer): (&mut dyn StreamReader, &mut dyn StreamWriter),
    decoder: &mut Decoder,
) -> Result<(Attached, Bytes), SocketEnd> {
    let clock = &inner.env.clock;
    let deadline = clock.now() + inner.config.greeting_timeout;
    let first = timeout(&**clock, deadline, next_frame(reader, decoder));
    let unwanted = race(inner.closed.wait(), stranger.crowded.wait());
    let frame = match race(unwanted, first).await {
        Either::Left(Either::Left(())) => return Err(SocketEnd::Asked),
        Either::Left(Either::Right(())) => return Err(SocketEnd::Crowded),
        Either::Right(None) => {
            probe("greeting_timeout");
            return Err(SocketEnd::Net(NetError::TimedOut));
        }
        Either::Right(Some(frame)) => frame?,
    };
    let (NetCmd::Greeting, false, Ok(payload)) = (frame.cmd, frame.response, &frame.body) else {
        probe("message_before_greeting");
        return Err(SocketEnd::Unexpected(frame.cmd));
    };
    let c = &inner.config;
    let judged = match greeting::judge_request(payload, peer, c.fsid, c.fmt_vers, c.term) {
        Err(errno) => Err(errno),
        Ok(info) => {
            let hooks = inner.hooks().ok_or(SocketEnd::Asked)?;
            // Not to be crowded out any more, but still taking a place.
            stranger.crowded.open();
            hooks.greet(info).await.map(|()| info)
        }
    };
    if inner.closed.is_open() {
        return Err(SocketEnd::Asked);
    }
    let attached = judged.and_then(|info| inner.attach(frame.id, &info).ok_or(Errno::EINVAL));
    match attached {
        Ok(attached) => {
            let rid = attached.session.rid;
            tracing::info!(rid = %format_args!("{rid:016x}"), %peer, "client connected");
            let first = greeting::response(attached.seq, frame.id, Ok(inner.answer(rid)));
            Ok((attached, first.to_bytes()))
        }
        Err(errno) => {
            probe("greeting_refused");
            let refusal = greeting::response(1, frame.id, Err(errno)).to_bytes();
            let sent = async {
                writer.write(refusal).await?;
                writer.shutdown().await
            };
            let _ = timeout(&**clock, clock.now() + c.greeting_timeout, sent).await;
            Err(SocketEnd::Protocol(NetCmd::Greeting, errno))
        }
    }
}

async fn read_loop(
    inner: &Inner,
    session: &Rc<Session>,
    gate: &Gate,
    reader: &mut dyn StreamReader,
    decoder: &mut Decoder,
) -> SocketEnd {
    let mut frames = 0_u64;
    loop {
        // A client that does not read its answers gets nothing more done.
        let full = || session.state.borrow().conn.unsent() > inner.config.max_unsent;
        if full() {
            probe("slow_reader_paused");
            session.written.wait_for(|| (!full()).then_some(())).await;
        }
        let frame = match next_frame(reader, decoder).await {
            Ok(frame) => frame,
            Err(end) => return end,
        };
        if let Err(end) = dispatch(inner, session, frame) {
            return end;
        }
        frames += 1;
        if frames.is_multiple_of(FRAMES_PER_TURN) {
            if session.state.borrow().conn.kept() > inner.config.max_kept {
                probe("client_does_not_acknowledge");
                return SocketEnd::Unacknowledged;
            }
            pause().await;
        }
        if gate.is_open() {
            return SocketEnd::Asked;
        }
    }
}

fn dispatch(inner: &Inner, session: &Session, frame: Frame) -> Result<(), SocketEnd> {
    let cmd = frame.cmd;
    if cmd == NetCmd::Greeting || (!frame.response && !handles(cmd)) {
        return Err(SocketEnd::Unexpected(cmd));
    }
    let received = session.state.borrow_mut().conn.receive(frame);
    let Some(hooks) = inner.hooks() else {
        return Err(SocketEnd::Asked);
    };
    match received {
        Received::Nothing => Ok(()),
        Received::Request {
            id, cmd, payload, ..
        } => {
            let origin = Origin {
                rid: session.rid,
                session: session.id,
                id,
                cmd,
            };
            hooks.request(origin, payload);
            Ok(())
        }
        Received::Response { id, cmd, body } => hooks
            .response(session.rid, id, cmd, body)
            .map_err(|errno| SocketEnd::Protocol(cmd, errno)),
    }
}

async fn write_loop(
    inner: &Inner,
    session: &Session,
    writer: &mut dyn StreamWriter,
    first: Bytes,
) -> SocketEnd {
    if let Err(error) = writer.write(first).await {
        return error.into();
    }
    loop {
        let batch = || {
            let mut state = session.state.borrow_mut();
            let mut out = BytesMut::new();
            let mut farewell = false;
            while out.len() < inner.config.write_chunk
                && let Some(frame) = state.conn.next_frame()
            {
                farewell |= frame.cmd == NetCmd::Farewell && frame.response;
                frame.encode(&mut out);
            }
            (!out.is_empty()).then(|| (out.freeze(), farewell))
        };
        let (out, farewell) = session.to_write.wait_for(batch).await;
        // Marked before the write completes: the client may close the moment it has
        // the answer. A client that did not get it finds its item gone.
        session.state.borrow_mut().saw_farewell |= farewell;
        if let Err(error) = writer.write(out).await {
            return error.into();
        }
        session.written.wake_all();
    }
}

/// The socket of `gate` is gone. Unless another one took over, the session waits
/// for its client, or is freed if the client said farewell.
fn socket_down(inner: &Rc<Inner>, session: &Rc<Session>, gate: &Gate) {
    let mut state = session.state.borrow_mut();
    if !state.socket.as_ref().is_some_and(|mine| mine.same(gate)) {
        return;
    }
    state.socket = None;
    state.conn.detach();
    if state.saw_farewell {
        drop(state);
        inner.free(session);
        return;
    }
    let (inner, this) = (inner.clone(), session.clone());
    let env = inner.env.clone();
    let deadline = env.clock.now() + inner.config.reconnect_timeout;
    state.waiting = Some(env.spawn("reconnect wait", async move {
        inner.env.clock.sleep_until(deadline).await;
        // Cleared first, so that freeing the session does not abort this very task.
        this.state.borrow_mut().waiting = None;
        if let Some(hooks) = inner.hooks()
            && inner.is_current(&this)
        {
            probe("client_reconnect_timeout");
            let peer = this.state.borrow().peer;
            hooks.reconnect_timeout(this.rid, peer);
            inner.free(&this);
        }
    }));
}

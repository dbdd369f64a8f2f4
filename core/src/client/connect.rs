//! The client's connection task: find the server, greet it, carry messages, and
//! all over again when that fails (spec 08 sections 4 and 6).
//!
//! What can go wrong: a server that accepts and then stays silent. Connecting and
//! greeting are bounded; after the greeting the transport's keepalive is.

use super::{ClientError, Incoming, Inner, Life, LocateError};
use crate::env::{
    Duration, Either, NetError, Stream, StreamReader, StreamWriter, probe, race, timeout,
};
use crate::errno::Errno;
use crate::format::{
    Key, NET_GREETING_FLAG_FAREWELL, NET_GREETING_FLAG_QUORUM, NET_LOCK_MAX_RECOVER_NR, NetCmd,
    NetGreeting, NetLock, NetLockRecover, OpenInoMapArgs,
};
use crate::notice::Notice;
use crate::wire::greeting::{self, GreetingError};
use crate::wire::{Decoder, Frame, FrameError, Received, client_handles};
use bytes::{Bytes, BytesMut};
use std::net::SocketAddrV4;
use std::rc::{Rc, Weak};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Time between two log lines about attempts that end alike.
const NOTICE: Duration = Duration::from_secs(10);
/// Bytes written in one call, about.
const WRITE_CHUNK: usize = 64 << 10;

/// Why an attempt or a connection ended.
#[derive(Debug, Error)]
enum ConnectError {
    #[error(transparent)]
    Locate(#[from] LocateError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Greeting(#[from] GreetingError),
    #[error("the server closed the connection")]
    Eof,
    #[error("another server leads, at {0}")]
    Replaced(SocketAddrV4),
    #[error("message {0:?} of the server has no business here")]
    Unexpected(NetCmd),
    #[error("message {0:?} of the server has a wrong length")]
    Length(NetCmd),
    #[error(
        "lock {} in mode {} was asked for, and {} in mode {} granted, of one held in mode {}",
        Key::from(.asked.key), .asked.new_mode,
        Key::from(.granted.key), .granted.new_mode, .granted.old_mode
    )]
    Grant { asked: NetLock, granted: NetLock },
    #[error("the server at {server} broke the protocol: {what}")]
    Broken {
        server: SocketAddrV4,
        what: Box<ConnectError>,
    },
}

impl ConnectError {
    /// Whether a correct server never gives reason for it.
    fn is_breach(&self) -> bool {
        matches!(
            self,
            Self::Frame(_) | Self::Unexpected(_) | Self::Length(_) | Self::Grant { .. }
        )
    }
}

/// Runs until the client is severed or has said farewell.
pub(super) async fn run(inner: Rc<Inner>) {
    /// The handler usually owns this client: breaks the circle, also when the
    /// task is dropped.
    struct Forget(Rc<Inner>);
    impl Drop for Forget {
        fn drop(&mut self) {
            let handler = self.0.incoming.borrow_mut().take();
            drop(handler);
        }
    }
    let _forget = Forget(inner.clone());
    match race(inner.stop.wait(), reconnect_for_ever(&inner)).await {
        Either::Left(()) => tracing::debug!("client connection closed"),
        Either::Right(()) => probe("farewell_by_missing_item"),
    }
    inner.conn.borrow_mut().detach();
    inner.ended.open();
}

/// Attempt after attempt; returns only when a farewell needs no answer any more.
async fn reconnect_for_ever(inner: &Rc<Inner>) {
    let mut notice = Notice::new(NOTICE);
    let mut last = String::new();
    loop {
        if farewell_done(inner).await {
            return;
        }
        let began = inner.env.clock.now();
        let ended = attempt(inner).await;
        let was_greeted = inner.conn.borrow().is_attached();
        inner.conn.borrow_mut().detach();
        // Ten attempts each second with one result need not fill the log.
        let why = ended.to_string();
        let broken = matches!(ended, ConnectError::Broken { .. });
        if why != last || was_greeted && !broken {
            notice = Notice::new(NOTICE);
        }
        if let Some(more) = notice.admit(inner.env.clock.now()) {
            if broken {
                tracing::error!(%ended, more, "the connection to the server is closed");
            } else {
                tracing::info!(%ended, more, "no connection to the server");
            }
        }
        last = why;
        if matches!(
            ended,
            ConnectError::Greeting(GreetingError::Refused(_)) | ConnectError::Eof
        ) {
            look_for_eviction(inner).await;
        }
        let tries = if was_greeted {
            0
        } else {
            inner.tries.get() + 1
        };
        inner.tries.set(tries);
        if was_greeted {
            inner.detached.set(Some(inner.env.clock.now()));
            probe("client_reconnects");
        }
        // One that ends as soon as it is made, again and again, must not keep both ends busy.
        let short = inner.env.clock.now() < began + inner.config.backoff;
        if short || !was_greeted {
            // Who was fenced is not let in again; the mount's end is near.
            let times = if inner.evicted.is_open() { 10 } else { 1 };
            inner.env.sleep(inner.config.backoff * times).await;
        }
    }
}

/// Whether a farewell is pending and the mounted client item is gone: then the
/// server has reclaimed this mount and only its answer was lost.
async fn farewell_done(inner: &Inner) -> bool {
    let Some(id) = inner.farewell.get() else {
        return false;
    };
    match inner.locator.is_mounted(inner.config.rid).await {
        Ok(false) => {
            if let Some(waiter) = inner.waiters.borrow_mut().remove(&id) {
                let _ = waiter.send(Ok(Bytes::new()));
            }
            true
        }
        Ok(true) => false,
        Err(error) => {
            tracing::info!(%error, "can not tell whether the farewell is done");
            false
        }
    }
}

/// A server that closes or refuses a mount it should know may have fenced it.
async fn look_for_eviction(inner: &Inner) {
    let greeted_before = inner.conn.borrow().peer_term() != 0;
    if !greeted_before || inner.farewell.get().is_some() || inner.life.get() != Life::Open {
        return;
    }
    if let Ok(false) = inner.locator.is_mounted(inner.config.rid).await
        && inner.farewell.get().is_none()
    {
        probe("client_evicted");
        if !inner.evicted.is_open() {
            tracing::error!("this mount was fenced: it is not on the list of mounted clients");
        }
        inner.evicted.open();
    }
}

/// One attempt, from finding the server to the end of the connection.
async fn attempt(inner: &Rc<Inner>) -> ConnectError {
    let addrs = match inner.locator.find_servers().await {
        Ok(addrs) => addrs,
        Err(error) => return error.into(),
    };
    // Where two may be the server each is tried in turn.
    let addr = addrs[inner.tries.get() % addrs.len()];
    match race(talk(inner, addr), watch_for_another(inner, addr)).await {
        Either::Left(error) | Either::Right(error) => error,
    }
}

/// Completes when the quorum blocks name another server than the one at `addr`. A
/// server whose host or process was stopped in its tracks keeps its connections: its
/// kernel acknowledges everything. Who waited for it would be late for its successor.
async fn watch_for_another(inner: &Inner, addr: SocketAddrV4) -> ConnectError {
    loop {
        inner.env.sleep(inner.config.server_check).await;
        match inner.locator.find_servers().await {
            Ok(others) if !others.contains(&addr) => {
                probe("client_leaves_for_another_server");
                return ConnectError::Replaced(others[0]);
            }
            // Not readable is no answer.
            Ok(_) | Err(_) => {}
        }
    }
}

async fn talk(inner: &Rc<Inner>, addr: SocketAddrV4) -> ConnectError {
    let connected = async {
        let clock = &inner.env.clock;
        let deadline = clock.now() + inner.config.connect_timeout;
        let connect = inner.env.net.connect(addr, inner.config.keepalive);
        let stream = timeout(&**clock, deadline, connect).await;
        let mut stream = stream.unwrap_or(Err(NetError::TimedOut))?;
        let deadline = clock.now() + inner.config.keepalive;
        let mut decoder = Decoder::default();
        let greeted = timeout(&**clock, deadline, greet(inner, &mut stream, &mut decoder)).await;
        let term = greeted.unwrap_or(Err(NetError::TimedOut.into()))?;
        Ok((stream, decoder, term))
    };
    let (stream, mut decoder, term) = match connected.await {
        Ok(connected) => connected,
        Err(error) => return error,
    };
    tracing::info!(server = %stream.peer, term, "connected to the server");
    inner.conn.borrow_mut().attach(term);
    inner.detached.set(None);
    let Stream {
        mut reader,
        mut writer,
        ..
    } = stream;
    let reading = read_loop(inner, &mut *reader, &mut decoder);
    match race(reading, write_loop(inner, &mut *writer)).await {
        Either::Left(error) if error.is_breach() => ConnectError::Broken {
            server: addr,
            what: Box::new(error),
        },
        Either::Left(error) | Either::Right(error) => error,
    }
}

async fn next_frame(
    reader: &mut dyn StreamReader,
    decoder: &mut Decoder,
) -> Result<Frame, ConnectError> {
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return Ok(frame);
        }
        let chunk = reader.read().await?;
        if chunk.is_empty() {
            return Err(ConnectError::Eof);
        }
        decoder.push(&chunk);
    }
}

/// Sends the greeting and judges the answer: the server's term.
async fn greet(
    inner: &Inner,
    stream: &mut Stream,
    decoder: &mut Decoder,
) -> Result<u64, ConnectError> {
    let config = &inner.config;
    let mut flags = 0;
    if inner.farewell.get().is_some() {
        flags |= NET_GREETING_FLAG_FAREWELL;
    }
    if config.quorum {
        flags |= NET_GREETING_FLAG_QUORUM;
    }
    let (greeting, request) = {
        let mut conn = inner.conn.borrow_mut();
        let greeting = NetGreeting {
            fsid: config.fsid.into(),
            fmt_vers: config.fmt_vers.into(),
            server_term: conn.peer_term().into(),
            rid: config.rid.into(),
            flags: flags.into(),
        };
        let (seq, id) = conn.greeting_request();
        let request = greeting::request(seq, conn.recv_seq(), id, &greeting);
        (greeting, request)
    };
    stream.writer.write(request.to_bytes()).await?;
    let answer = next_frame(&mut *stream.reader, decoder).await?;
    Ok(greeting::accept_response(&answer, &greeting)?)
}

async fn write_loop(inner: &Inner, writer: &mut dyn StreamWriter) -> ConnectError {
    loop {
        let batch = || {
            let mut conn = inner.conn.borrow_mut();
            let mut out = BytesMut::new();
            while out.len() < WRITE_CHUNK
                && let Some(frame) = conn.next_frame()
            {
                frame.encode(&mut out);
            }
            (!out.is_empty()).then(|| out.freeze())
        };
        let out = inner.to_write.wait_for(batch).await;
        if let Err(error) = writer.write(out).await {
            return error.into();
        }
    }
}

async fn read_loop(
    inner: &Rc<Inner>,
    reader: &mut dyn StreamReader,
    decoder: &mut Decoder,
) -> ConnectError {
    loop {
        let frame = match next_frame(reader, decoder).await {
            Ok(frame) => frame,
            Err(error) => return error,
        };
        if let Err(error) = dispatch(inner, frame) {
            return error;
        }
        if inner.stop.is_open() {
            // Severed by a handler: what is behind this message is not for us.
            return std::future::pending().await;
        }
    }
}

fn dispatch(inner: &Rc<Inner>, frame: Frame) -> Result<(), ConnectError> {
    let cmd = frame.cmd;
    if cmd == NetCmd::Greeting && frame.response {
        // The original's server can send it twice on one socket.
        probe("duplicate_greeting_response_ignored");
        return Ok(());
    }
    if !frame.response && !client_handles(cmd) {
        return Err(ConnectError::Unexpected(cmd));
    }
    let received = inner.conn.borrow_mut().receive(frame);
    let incoming = inner.incoming.borrow().clone();
    let incoming = incoming.expect("set before the task was started");
    match received {
        Received::Nothing => Ok(()),
        Received::Response {
            cmd: NetCmd::Lock,
            asked,
            body,
            ..
        } => {
            let result = granted(&*incoming, &asked, body);
            if result.is_err() {
                probe("client_grant_refused");
                // Who waits for the lock would wait for ever. Not sent before the next
                // connection; a client that is severed or has left needs no lock.
                let _ = inner.submit(NetCmd::Lock, &asked);
            }
            result
        }
        Received::Response { id, body, .. } => {
            let waiter = inner.waiters.borrow_mut().remove(&id);
            if let Some(waiter) = waiter {
                // Nobody may wait any more.
                let _ = waiter.send(body.map_err(ClientError::Server));
            }
            Ok(())
        }
        Received::Request {
            epoch,
            id,
            cmd,
            payload,
        } => asked(inner, &*incoming, (epoch, id, cmd), &payload),
    }
}

/// The answer to a lock request.
fn granted(
    incoming: &dyn Incoming,
    asked: &[u8],
    body: Result<Bytes, Errno>,
) -> Result<(), ConnectError> {
    // A server never answers LOCK with an error (spec 08 section 8).
    let body = body.map_err(|_| ConnectError::Unexpected(NetCmd::Lock))?;
    let granted =
        NetLock::read_from_bytes(&body).map_err(|_| ConnectError::Length(NetCmd::Lock))?;
    let asked = NetLock::read_from_bytes(asked).expect("as it was sent");
    let fits = granted.key == asked.key && granted.new_mode == asked.new_mode;
    if !fits || !incoming.lock_grant(granted) {
        return Err(ConnectError::Grant { asked, granted });
    }
    Ok(())
}

/// A request of the server.
fn asked(
    inner: &Rc<Inner>,
    incoming: &dyn Incoming,
    (epoch, id, cmd): (u64, u64, NetCmd),
    payload: &[u8],
) -> Result<(), ConnectError> {
    let answer = match cmd {
        NetCmd::Lock => {
            let lock = NetLock::read_from_bytes(payload).map_err(|_| ConnectError::Length(cmd))?;
            let weak: Weak<Inner> = Rc::downgrade(inner);
            let answer = Box::new(move |lock: NetLock| {
                if let Some(inner) = weak.upgrade() {
                    let bytes = Bytes::copy_from_slice(lock.as_bytes());
                    inner.respond(epoch, id, cmd, Ok(bytes));
                }
            });
            incoming.lock_invalidate(lock, answer);
            return Ok(());
        }
        NetCmd::SyncLogTrees => {
            // Answered at once: the server wants no promise, only a start.
            inner.respond(epoch, id, cmd, Ok(Bytes::new()));
            if inner.farewell.get().is_none() {
                incoming.sync_log_trees();
            }
            return Ok(());
        }
        NetCmd::LockRecover => recover(incoming, payload),
        NetCmd::OpenInoMap => OpenInoMapArgs::read_from_bytes(payload)
            .map(|args| Bytes::copy_from_slice(incoming.open_ino_map(args).as_bytes()))
            .map_err(|_| Errno::EINVAL),
        _ => return Err(ConnectError::Unexpected(cmd)),
    };
    inner.respond(epoch, id, cmd, answer);
    Ok(())
}

/// The answer to LOCK_RECOVER: a count and that many locks.
fn recover(incoming: &dyn Incoming, payload: &[u8]) -> Result<Bytes, Errno> {
    let start: &[u8; 32] = payload.try_into().map_err(|_| Errno::EINVAL)?;
    let locks = incoming.lock_recover(Key::from_bytes(start), NET_LOCK_MAX_RECOVER_NR);
    assert!(
        locks.len() <= NET_LOCK_MAX_RECOVER_NR,
        "{} locks are more than a message holds",
        locks.len()
    );
    let head = NetLockRecover {
        nr: (locks.len() as u16).into(),
        pad: [0; 6],
    };
    let mut out = BytesMut::from(head.as_bytes());
    for lock in &locks {
        out.extend_from_slice(lock.as_bytes());
    }
    Ok(out.freeze())
}

//! Sockets: from the connection that is accepted, over the greeting, to its end.
//!
//! Until a peer has greeted it is a stranger: strangers are few, have little time and
//! room, and give way to newer ones. After it, one task reads and one writes for the
//! session that the socket belongs to.

use super::*;

pub(super) async fn accept_loop(running: Running, mut listener: Box<dyn crate::env::Listener>) {
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
pub(super) enum SocketEnd {
    #[error("the client closed it")]
    Eof,
    #[error("{0}")]
    Net(#[from] NetError),
    #[error("{0}")]
    Frame(#[from] crate::wire::FrameError),
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
    pub(super) const fn kind(&self) -> &'static str {
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
pub(super) struct Strangers {
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
        Received::Response { id, cmd, body, .. } => hooks
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

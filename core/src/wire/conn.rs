//! The brain of one reliable connection (spec 08 section 3): numbers, resends,
//! acknowledgements and what happens when the other end is another server.
//!
//! It does no I/O. Its owner attaches it to a socket once the greeting succeeded,
//! takes frames to write from [`Conn::next_frame`], hands frames in with
//! [`Conn::receive`], and detaches it when the socket goes down.
//!
//! What can go wrong, and what prevents it:
//! * a message overtakes an earlier one after a reconnect and the earlier one is
//!   taken for a duplicate (13.1): there is one queue, ordered by seq, and a cursor
//!   that only moves up on one socket;
//! * an answer reaches another server than the one that asked (13.2): every
//!   received request carries the *epoch* of its peer, and an answer of an older
//!   epoch is dropped;
//! * a greeting is written twice (13.5): greetings are never in the queue.

use super::frame::{Frame, HEADER_LEN};
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::NetCmd;
use bytes::Bytes;
use std::collections::BTreeMap;

/// A message that was submitted and is not retired yet.
#[derive(Clone, Debug)]
struct Message {
    id: u64,
    cmd: NetCmd,
    response: bool,
    body: Result<Bytes, Errno>,
}

impl Message {
    fn size(&self) -> usize {
        HEADER_LEN + self.body.as_ref().map_or(0, Bytes::len)
    }
}

/// What a received message means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// It was received before, or answers nothing that is still asked: ignore it.
    Nothing,
    /// A request, to be answered with [`Conn::respond`] under the same epoch.
    Request {
        /// Whose request it is; see [`Conn::epoch`].
        epoch: u64,
        /// Number of the request.
        id: u64,
        /// Command.
        cmd: NetCmd,
        /// Payload.
        payload: Bytes,
    },
    /// The answer to an own request.
    Response {
        /// Number of the request.
        id: u64,
        /// Command.
        cmd: NetCmd,
        /// Payload of the request.
        asked: Bytes,
        /// Payload or error.
        body: Result<Bytes, Errno>,
    },
}

/// State of one connection object.
#[derive(Clone, Debug)]
pub struct Conn {
    next_send_seq: u64,
    next_send_id: u64,
    recv_seq: u64,
    /// Everything not retired, by seq: the send queue and the resend queue in one.
    queue: BTreeMap<u64, Message>,
    /// Own requests without an answer: id to command and seq.
    pending: BTreeMap<u64, (NetCmd, u64)>,
    /// Whether a socket is up and its greeting done.
    attached: bool,
    /// Greatest seq written to this socket; those above are unsent.
    written: u64,
    /// Bytes of the unsent messages.
    unsent: usize,
    /// Bytes of all messages kept.
    kept: usize,
    /// Term of the peer; 0 before the first greeting.
    peer_term: u64,
    epoch: u64,
}

impl Conn {
    /// The client's object, which has greeted nobody yet.
    pub fn client() -> Self {
        Self::new(1, 0)
    }

    /// A server's object for one client. Request ids start far from those of other
    /// servers (spec 08 section 3), so that a late answer to another one matches nothing.
    pub fn server(term: u64) -> Self {
        Self::new(((term & 0xffff_ffff) << 32) + 1, term)
    }

    fn new(next_send_id: u64, peer_term: u64) -> Self {
        Self {
            next_send_seq: 1,
            next_send_id,
            recv_seq: 0,
            queue: BTreeMap::new(),
            pending: BTreeMap::new(),
            attached: false,
            written: 0,
            unsent: 0,
            kept: 0,
            peer_term,
            epoch: 0,
        }
    }

    /// Term of the last server greeted; 0 if none.
    pub const fn peer_term(&self) -> u64 {
        self.peer_term
    }

    /// Counts the peers this connection had; a received request belongs to one of them.
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Greatest seq received.
    pub const fn recv_seq(&self) -> u64 {
        self.recv_seq
    }

    /// Whether a socket is up and greeted.
    pub const fn is_attached(&self) -> bool {
        self.attached
    }

    /// Bytes that wait to be written to the socket that is up.
    pub const fn unsent(&self) -> usize {
        self.unsent
    }

    /// Bytes of all messages kept, written or not: answers that the peer did not
    /// acknowledge, requests that it did not answer, and what is unsent.
    pub const fn kept(&self) -> usize {
        self.kept
    }

    /// Messages kept, written or not.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Requests without an answer.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    fn take_seq(&mut self) -> u64 {
        let seq = self.next_send_seq;
        self.next_send_seq += 1;
        seq
    }

    /// Numbers for a greeting request: seq and id.
    pub fn greeting_request(&mut self) -> (u64, u64) {
        let id = self.next_send_id;
        self.next_send_id += 1;
        (self.take_seq(), id)
    }

    /// Seq for a greeting response.
    pub fn greeting_response(&mut self) -> u64 {
        self.take_seq()
    }

    fn submit(&mut self, message: Message) {
        let seq = self.take_seq();
        if !message.response {
            let old = self.pending.insert(message.id, (message.cmd, seq));
            assert!(old.is_none(), "request id {} used twice", message.id);
        }
        if self.attached {
            self.unsent += message.size();
        }
        self.kept += message.size();
        self.queue.insert(seq, message);
    }

    /// Submits a request and returns its id.
    pub fn request(&mut self, cmd: NetCmd, payload: Bytes) -> u64 {
        let id = self.next_send_id;
        self.next_send_id += 1;
        self.submit(Message {
            id,
            cmd,
            response: false,
            body: Ok(payload),
        });
        id
    }

    /// Submits the answer to a request received in `epoch`. `false`: that peer is
    /// gone, and the answer with it.
    pub fn respond(
        &mut self,
        epoch: u64,
        id: u64,
        cmd: NetCmd,
        body: Result<Bytes, Errno>,
    ) -> bool {
        if epoch != self.epoch {
            probe("response_of_old_epoch_dropped");
            return false;
        }
        self.submit(Message {
            id,
            cmd,
            response: true,
            body,
        });
        true
    }

    /// A socket is up and its greeting succeeded with the server of `term`:
    /// everything queued is to be written, in seq order. With another term the peer
    /// knows nothing of what the last one sent or asked.
    ///
    /// # Panics
    /// If a socket is attached already.
    pub fn attach(&mut self, term: u64) {
        assert!(!self.attached, "one socket at a time");
        if term != self.peer_term {
            if self.peer_term != 0 {
                probe("conn_failover");
            }
            self.peer_term = term;
            self.epoch += 1;
            self.recv_seq = 0;
            self.queue.retain(|_, m| !m.response);
            self.kept = self.queue.values().map(Message::size).sum();
        }
        self.attached = true;
        self.written = 0;
        // Mutant: breaks spec 08 section 4, what was not retired is sent again.
        if mutant("reconnect_resends_nothing") && self.epoch > 1 {
            self.written = self.queue.last_key_value().map_or(0, |(seq, _)| *seq);
            self.unsent = 0;
            return;
        }
        self.unsent = self.queue.values().map(Message::size).sum();
    }

    /// The socket went down. Nothing is lost; what was written may be written again.
    pub fn detach(&mut self) {
        self.attached = false;
        self.written = 0;
        self.unsent = 0;
    }

    /// The next message for the socket, with its acknowledgement as of now.
    /// `None` if there is none, or no socket.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if !self.attached {
            return None;
        }
        let (&seq, message) = self.queue.range(self.written + 1..).next()?;
        self.written = seq;
        self.unsent -= message.size();
        Some(Frame {
            seq,
            recv_seq: self.recv_seq,
            id: message.id,
            cmd: message.cmd,
            response: message.response,
            body: message.body.clone(),
        })
    }

    fn retire(&mut self, seq: u64) -> Option<Message> {
        let message = self.queue.remove(&seq)?;
        self.kept -= message.size();
        if self.attached && seq > self.written {
            self.unsent -= message.size();
        }
        Some(message)
    }

    /// Frees own responses that the peer has received, up to `acked`.
    fn retire_responses(&mut self, acked: u64) {
        let done: Vec<u64> = self
            .queue
            .range(..=acked)
            .filter(|(_, m)| m.response)
            .map(|(seq, _)| *seq)
            .collect();
        for seq in done {
            self.retire(seq);
        }
    }

    /// Takes a message that is no greeting.
    ///
    /// # Panics
    /// If no socket is attached: nothing is received before the greeting.
    pub fn receive(&mut self, frame: Frame) -> Received {
        assert!(self.attached, "a message before the greeting");
        // Mutant: breaks spec 08 section 4, a repeated message is dropped.
        if frame.seq <= self.recv_seq && !mutant("repeated_message_taken") {
            probe("duplicate_message_dropped");
            return Received::Nothing;
        }
        self.recv_seq = frame.seq;
        self.retire_responses(frame.recv_seq);
        let Frame { id, cmd, body, .. } = frame;
        if frame.response {
            return match self.pending.get(&id) {
                Some(&(asked, seq)) if asked == cmd => {
                    self.pending.remove(&id);
                    let request = self.retire(seq);
                    let asked = request.and_then(|request| request.body.ok());
                    Received::Response {
                        id,
                        cmd,
                        asked: asked.expect("a request is kept until its answer"),
                        body,
                    }
                }
                _ => {
                    probe("response_matches_nothing");
                    Received::Nothing
                }
            };
        }
        Received::Request {
            epoch: self.epoch,
            id,
            cmd,
            payload: body.expect("the decoder refuses requests with errors"),
        }
    }
}

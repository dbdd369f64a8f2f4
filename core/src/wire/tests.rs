//! The byte examples of spec 08 section 14, and the promises of section 3 between
//! two brains whose bytes are cut anywhere.

use super::conn::{Conn, Received};
use super::frame::{Decoder, Frame, FrameError, HEADER_LEN};
use super::greeting;
use crate::env::Entropy;
use crate::env::testing::TestEntropy;
use crate::errno::Errno;
use crate::format::{NetCmd, NetGreeting};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use zerocopy::IntoBytes;

fn hex(text: &str) -> Vec<u8> {
    text.split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect()
}

fn decode(bytes: &[u8]) -> Frame {
    let mut decoder = Decoder::default();
    decoder.push(bytes);
    let frame = decoder.next_frame().expect("valid").expect("whole");
    assert_eq!(decoder.next_frame(), Ok(None));
    frame
}

/// Encodes to exactly these bytes, and back.
fn check(frame: &Frame, text: &str) {
    let bytes = hex(text);
    assert_eq!(frame.to_bytes(), bytes);
    assert_eq!(decode(&bytes), *frame);
}

fn greeting(server_term: u64, flags: u64) -> NetGreeting {
    NetGreeting {
        fsid: 0x1122_3344_5566_7788.into(),
        fmt_vers: 2.into(),
        server_term: server_term.into(),
        rid: 0xa1b2_c3d4_e5f6_0718.into(),
        flags: flags.into(),
    }
}

fn frame(seq: u64, recv_seq: u64, id: u64, cmd: NetCmd, response: bool, data: &str) -> Frame {
    Frame {
        seq,
        recv_seq,
        id,
        cmd,
        response,
        body: Ok(hex(data).into()),
    }
}

#[test]
fn greetings_of_the_spec() {
    let first = greeting(0, 2);
    let request = greeting::request(1, 0, 1, &first);
    check(
        &request,
        "01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
         01 00 00 00 00 00 00 00 28 00 00 00 00 00 00 00
         88 77 66 55 44 33 22 11 02 00 00 00 00 00 00 00
         00 00 00 00 00 00 00 00 18 07 f6 e5 d4 c3 b2 a1
         02 00 00 00 00 00 00 00",
    );
    let answer = greeting::response(1, 1, Ok(greeting(7, 0)));
    check(
        &answer,
        "01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
         01 00 00 00 00 00 00 00 28 00 00 01 00 00 00 00
         88 77 66 55 44 33 22 11 02 00 00 00 00 00 00 00
         07 00 00 00 00 00 00 00 18 07 f6 e5 d4 c3 b2 a1
         00 00 00 00 00 00 00 00",
    );
    assert_eq!(greeting::accept_response(&answer, &first), Ok(7));
    let refusal = greeting::response(1, 1, Err(Errno::EINVAL));
    check(
        &refusal,
        "01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
         01 00 00 00 00 00 00 00 00 00 00 01 05 00 00 00",
    );
    assert_eq!(
        greeting::accept_response(&refusal, &first),
        Err(greeting::GreetingError::Refused(Errno::EINVAL))
    );
    check(
        &greeting::request(57, 0, 41, &greeting(7, 3)),
        "39 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
         29 00 00 00 00 00 00 00 28 00 00 00 00 00 00 00
         88 77 66 55 44 33 22 11 02 00 00 00 00 00 00 00
         07 00 00 00 00 00 00 00 18 07 f6 e5 d4 c3 b2 a1
         03 00 00 00 00 00 00 00",
    );
}

#[test]
fn other_messages_of_the_spec() {
    let key0 = "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
                00 00 00 00 00 00 00 00 00 10 00 00 00 00 00 00";
    let lock0 = format!("{key0} 00 00 00 00 00 00 00 00 00 01 00 00 00 00 00 00");
    check(
        &frame(2, 0, 2, NetCmd::Lock, false, &lock0),
        &format!(
            "02 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
             02 00 00 00 00 00 00 00 30 00 07 00 00 00 00 00 {lock0}"
        ),
    );
    check(
        &frame(2, 2, 2, NetCmd::Lock, true, &lock0),
        &format!(
            "02 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00
             02 00 00 00 00 00 00 00 30 00 07 01 00 00 00 00 {lock0}"
        ),
    );
    check(
        &frame(
            6,
            4,
            5,
            NetCmd::AllocInodes,
            false,
            "00 28 00 00 00 00 00 00",
        ),
        "06 00 00 00 00 00 00 00 04 00 00 00 00 00 00 00
         05 00 00 00 00 00 00 00 08 00 01 00 00 00 00 00
         00 28 00 00 00 00 00 00",
    );
    let range = "00 10 00 00 00 00 00 00 00 28 00 00 00 00 00 00";
    check(
        &frame(5, 6, 5, NetCmd::AllocInodes, true, range),
        "05 00 00 00 00 00 00 00 06 00 00 00 00 00 00 00
         05 00 00 00 00 00 00 00 10 00 01 01 00 00 00 00
         00 10 00 00 00 00 00 00 00 28 00 00 00 00 00 00",
    );
    check(
        &frame(58, 0, 42, NetCmd::Farewell, false, ""),
        "3a 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
         2a 00 00 00 00 00 00 00 00 00 13 00 00 00 00 00",
    );
    check(
        &frame(31, 58, 42, NetCmd::Farewell, true, ""),
        "1f 00 00 00 00 00 00 00 3a 00 00 00 00 00 00 00
         2a 00 00 00 00 00 00 00 00 00 13 01 00 00 00 00",
    );
}

/// The client's numbers come out as in the spec's examples.
#[test]
fn a_conversation_numbers_its_messages_as_the_spec_does() {
    let mut client = Conn::client();
    assert_eq!(client.greeting_request(), (1, 1));
    client.attach(7);
    let mut server = Conn::server(7);
    assert_eq!(server.greeting_response(), 1);
    server.attach(7);
    let id = client.request(NetCmd::Lock, Bytes::from_static(b"read"));
    let sent = client.next_frame().expect("to send");
    assert_eq!((sent.seq, sent.recv_seq, id), (2, 0, 2));
    let Received::Request { epoch, id, cmd, .. } = server.receive(sent) else {
        panic!("a request")
    };
    assert!(server.respond(epoch, id, cmd, Ok(Bytes::new())));
    let grant = server.next_frame().expect("to send");
    assert_eq!((grant.seq, grant.recv_seq, grant.id), (2, 2, 2));
    assert!(matches!(
        client.receive(grant),
        Received::Response { id: 2, .. }
    ));
    assert_eq!((client.queued(), client.pending()), (0, 0));
}

#[test]
fn invalid_headers_are_refused_before_the_payload_comes() {
    let good = frame(1, 0, 1, NetCmd::Statfs, false, "").to_bytes();
    let bad = |at: usize, value: u8| {
        let mut bytes = good.to_vec();
        bytes[at] = value;
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        decoder.next_frame().expect_err("invalid")
    };
    assert_eq!(bad(0, 0), FrameError::ZeroSeq);
    assert_eq!(bad(16, 0), FrameError::ZeroId);
    assert_eq!(bad(26, 20), FrameError::Command(20));
    assert_eq!(bad(27, 2), FrameError::Flags(2));
    assert_eq!(bad(28, 7), FrameError::ErrorCode(7));
    assert_eq!(bad(25, 5), FrameError::TooLong(5 << 8));
    let code = 3;
    let cmd = NetCmd::Statfs;
    assert_eq!(bad(28, code), FrameError::RequestError { cmd, code });
    // 1100 bytes are just right.
    let mut bytes = good.to_vec();
    bytes[24..26].copy_from_slice(&1100_u16.to_le_bytes());
    let mut decoder = Decoder::default();
    decoder.push(&bytes);
    assert_eq!(decoder.next_frame(), Ok(None));
    decoder.push(&[7; 1100]);
    let whole = decoder.next_frame().expect("valid").expect("whole");
    assert_eq!(whole.body.map(|data| data.len()), Ok(1100));
}

#[test]
fn padding_is_ignored_and_errors_hide_the_payload() {
    let mut bytes = frame(9, 0, 9, NetCmd::Statfs, true, "01 02 03")
        .to_bytes()
        .to_vec();
    bytes[28] = 4;
    bytes[29..32].fill(0xff);
    assert_eq!(decode(&bytes).body, Err(Errno::ENOSPC));
}

#[test]
fn messages_survive_any_chunking() {
    let mut stream = BytesMut::new();
    let mut sent = Vec::new();
    for seq in 1..40 {
        let data = "5a ".repeat(seq as usize % 7);
        let one = frame(seq, seq / 2, seq, NetCmd::Statfs, seq % 3 == 0, &data);
        one.encode(&mut stream);
        sent.push(one);
    }
    for step in 1..stream.len().min(90) {
        let mut decoder = Decoder::default();
        let mut got = Vec::new();
        for chunk in stream.chunks(step) {
            decoder.push(chunk);
            while let Some(frame) = decoder.next_frame().expect("valid") {
                got.push(frame);
            }
        }
        assert_eq!(got, sent, "in chunks of {step}");
    }
}

/// Garbage never panics and never makes the decoder hoard.
#[test]
fn garbage_is_an_error_or_a_message() {
    let entropy = TestEntropy::new(3);
    for _ in 0..2000 {
        let mut decoder = Decoder::default();
        let mut head = frame(1, 0, 1, NetCmd::Statfs, false, "")
            .to_bytes()
            .to_vec();
        for _ in 0..entropy.range(1, 5) {
            let at = entropy.range(0, HEADER_LEN as u64) as usize;
            head[at] = entropy.next_u64() as u8;
        }
        decoder.push(&head);
        let _ = decoder.next_frame();
    }
}

/// One direction of a socket.
#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    decoder: Decoder,
}

/// A client and its servers, joined by pipes that break.
struct Pair {
    entropy: std::rc::Rc<TestEntropy>,
    client: Conn,
    server: Conn,
    term: u64,
    /// Client to server, server to client; `None` while no socket is up.
    pipes: Option<[Pipe; 2]>,
    asked: BTreeSet<u64>,
    answered: BTreeMap<u64, u64>,
    /// Requests handled by the server of this term, in order.
    handled: Vec<u64>,
    /// Handlers that have not answered: (term, epoch, id), at client and server.
    open: [Vec<(u64, u64, u64)>; 2],
    server_asked: BTreeSet<u64>,
    server_answered: BTreeSet<u64>,
    client_handled: BTreeSet<u64>,
}

impl Pair {
    fn new(seed: u64) -> Self {
        Self {
            entropy: TestEntropy::new(seed),
            client: Conn::client(),
            server: Conn::server(1),
            term: 1,
            pipes: None,
            asked: BTreeSet::new(),
            answered: BTreeMap::new(),
            handled: Vec::new(),
            open: [Vec::new(), Vec::new()],
            server_asked: BTreeSet::new(),
            server_answered: BTreeSet::new(),
            client_handled: BTreeSet::new(),
        }
    }

    fn connect(&mut self) {
        if self.pipes.is_none() {
            self.client.greeting_request();
            // The greeting may be lost after the server attached: it greets again.
            self.server.detach();
            self.server.attach(self.term);
            if self.entropy.chance(3, 4) {
                self.client.attach(self.term);
                self.pipes = Some(Default::default());
            }
        }
    }

    fn disconnect(&mut self) {
        self.pipes = None;
        self.client.detach();
        self.server.detach();
    }

    fn fail_over(&mut self) {
        self.disconnect();
        self.term += 1;
        self.server = Conn::server(self.term);
        self.handled.clear();
        self.open[1].clear();
        self.server_asked.clear();
        self.server_answered.clear();
        self.client_handled.clear();
    }

    fn write(&mut self, side: usize) {
        let Some(pipes) = &mut self.pipes else { return };
        let conn = [&mut self.client, &mut self.server];
        let [client, server] = conn;
        let conn = if side == 0 { client } else { server };
        if let Some(frame) = conn.next_frame() {
            pipes[side].bytes.extend(frame.to_bytes());
        }
    }

    /// Moves some bytes and handles what becomes whole.
    fn read(&mut self, side: usize) {
        let Some(pipes) = &mut self.pipes else { return };
        let pipe = &mut pipes[1 - side];
        let n = self.entropy.range(0, pipe.bytes.len() as u64 + 1) as usize;
        let chunk: Vec<u8> = pipe.bytes.drain(..n).collect();
        pipe.decoder.push(&chunk);
        let mut frames = Vec::new();
        while let Some(frame) = pipe.decoder.next_frame().expect("valid") {
            frames.push(frame);
        }
        for frame in frames {
            if side == 0 {
                let received = self.client.receive(frame);
                self.client_got(received);
            } else {
                let received = self.server.receive(frame);
                self.server_got(received);
            }
        }
    }

    fn client_got(&mut self, received: Received) {
        match received {
            Received::Nothing => {}
            Received::Request { epoch, id, .. } => {
                assert!(self.client_handled.insert(id), "request {id} handled twice");
                self.open[0].push((self.term, epoch, id));
            }
            Received::Response { id, body, .. } => {
                let times = self.answered.entry(id).or_default();
                *times += 1;
                assert_eq!(*times, 1, "request {id} answered twice");
                assert_eq!(body, Ok(Bytes::copy_from_slice(id.as_bytes())));
            }
        }
    }

    fn server_got(&mut self, received: Received) {
        match received {
            Received::Nothing => {}
            Received::Request { epoch, id, .. } => {
                let last = self.handled.last().copied().unwrap_or(0);
                assert!(id > last, "request {id} after {last} at one server");
                self.handled.push(id);
                self.open[1].push((self.term, epoch, id));
            }
            Received::Response { id, body, .. } => {
                assert!(self.server_asked.contains(&id), "an answer of another term");
                assert!(self.server_answered.insert(id), "answered twice");
                let mine = [id.as_bytes(), self.term.as_bytes()].concat();
                assert_eq!(body, Ok(Bytes::from(mine)), "the answer to another request");
            }
        }
    }

    /// Answers some open request, in any order, also ones of dead servers.
    fn answer(&mut self, side: usize) {
        let open = &mut self.open[side];
        if open.is_empty() {
            return;
        }
        let pick = self.entropy.range(0, open.len() as u64) as usize;
        let (term, epoch, id) = open.swap_remove(pick);
        if side == 0 {
            let body = [id.as_bytes(), term.as_bytes()].concat();
            self.client
                .respond(epoch, id, NetCmd::OpenInoMap, Ok(body.into()));
        } else {
            let body = Bytes::copy_from_slice(id.as_bytes());
            assert!(self.server.respond(epoch, id, NetCmd::Statfs, Ok(body)));
        }
    }

    fn step(&mut self) {
        let side = self.entropy.range(0, 2) as usize;
        match self.entropy.range(0, 100) {
            0..10 => {
                let id = self.client.request(NetCmd::Statfs, Bytes::new());
                self.asked.insert(id);
            }
            10..18 => {
                let id = self.server.request(NetCmd::OpenInoMap, Bytes::new());
                self.server_asked.insert(id);
            }
            18..40 => self.write(side),
            40..60 => self.read(side),
            60..80 => self.answer(side),
            80..92 => self.connect(),
            92..97 => self.disconnect(),
            _ if self.entropy.chance(1, 10) => self.fail_over(),
            _ => {}
        }
    }

    /// Everything heals: whatever was asked is answered.
    fn heal(&mut self) {
        for _ in 0..10_000 {
            self.connect();
            for side in [0, 1] {
                self.write(side);
                self.read(side);
                self.answer(side);
            }
            if self.asked.len() == self.answered.len() && self.server_asked == self.server_answered
            {
                return;
            }
        }
        panic!("requests without an answer: a message was lost");
    }
}

#[test]
fn every_request_is_handled_and_answered_once_through_any_disconnects() {
    for seed in 0..400 {
        let mut pair = Pair::new(seed);
        for _ in 0..600 {
            pair.step();
        }
        pair.heal();
        assert_eq!(pair.client.pending(), 0);
        assert_eq!(pair.server.pending(), 0);
    }
}

/// One fixed exchange, cut after every single byte of either direction.
#[test]
fn a_cut_at_any_byte_loses_and_repeats_nothing() {
    let mut cuts = 0;
    for side in [0, 1] {
        for cut in 0.. {
            let mut pair = Pair::new(1);
            pair.client.attach(1);
            pair.server.attach(1);
            pair.pipes = Some(Default::default());
            for _ in 0..3 {
                pair.asked
                    .insert(pair.client.request(NetCmd::Statfs, Bytes::new()));
                pair.server_asked
                    .insert(pair.server.request(NetCmd::OpenInoMap, Bytes::new()));
            }
            let mut passed = 0;
            let cut_it = 'run: {
                for _ in 0..200 {
                    for at in [0, 1] {
                        pair.write(at);
                        pair.answer(at);
                        let pipes = pair.pipes.as_mut().expect("up");
                        let bytes: Vec<u8> = pipes[1 - at].bytes.drain(..).collect();
                        for byte in bytes {
                            if 1 - at == side {
                                if passed == cut {
                                    break 'run true;
                                }
                                passed += 1;
                            }
                            let pipes = pair.pipes.as_mut().expect("up");
                            pipes[1 - at].bytes.push_back(byte);
                            // All or nothing of one byte: ask until it went.
                            while !pair.pipes.as_ref().expect("up")[1 - at].bytes.is_empty() {
                                pair.read(at);
                            }
                        }
                    }
                }
                false
            };
            if !cut_it {
                break;
            }
            cuts += 1;
            pair.disconnect();
            pair.heal();
        }
    }
    assert!(cuts > 400, "only {cuts} places to cut");
}

#[test]
fn the_resend_queue_is_in_seq_order_whatever_was_written() {
    let mut conn = Conn::client();
    conn.attach(1);
    for _ in 0..3 {
        conn.request(NetCmd::Statfs, Bytes::new());
    }
    let first = conn.next_frame().expect("one").seq;
    conn.detach();
    conn.request(NetCmd::Statfs, Bytes::new());
    conn.greeting_request();
    conn.attach(1);
    let resent: Vec<u64> = std::iter::from_fn(|| conn.next_frame())
        .map(|f| f.seq)
        .collect();
    assert_eq!(resent, [first, first + 1, first + 2, first + 3]);
}

#[test]
fn answers_to_an_old_server_are_dropped() {
    let mut conn = Conn::client();
    conn.attach(1);
    let ask = |seq| frame(seq, 0, 1, NetCmd::Lock, false, "");
    let Received::Request { epoch, .. } = conn.receive(ask(5)) else {
        panic!("a request")
    };
    let Received::Request { epoch: early, .. } = conn.receive(ask(6)) else {
        panic!("a request")
    };
    assert!(conn.respond(early, 1, NetCmd::Lock, Ok(Bytes::new())));
    conn.detach();
    conn.attach(2);
    // Neither the queued one nor the late one reaches the new server, which starts
    // its own numbers again.
    assert_eq!(conn.next_frame(), None);
    assert!(!conn.respond(epoch, 1, NetCmd::Lock, Ok(Bytes::new())));
    assert!(matches!(conn.receive(ask(1)), Received::Request { .. }));
}

//! The capture of a cluster of the original at work: every message of every
//! connection decodes, encodes to the same bytes, and is the message that our own
//! connection brains put on the wire in the same place; every quorum datagram is
//! one of ours.
//!
//! The capture: three quorum members and a plain client in one kernel. Work of all
//! kinds, a leader that leaves, one that is cut off and fenced, a client that is
//! fenced, the unmount of all.

#![allow(missing_docs, reason = "a test")]

mod messages;
mod pcap;
mod quorum;

use outrider_core::format::{NetCmd, NetGreeting};
use outrider_core::wire::greeting;
use outrider_core::wire::{Conn, Decoder, Frame, Received};
use pcap::{Port, Tcp};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use zerocopy::FromBytes;

/// The volume.
pub const FSID: u64 = 0x3faf_610b_9267_a768;
const CAPTURE: &str = "cluster.pcap.zst";

/// A message and where it was seen.
#[derive(Clone)]
struct Sent {
    /// The client's port and the server's.
    ports: (Port, Port),
    from_client: bool,
    frame: Frame,
}

/// Cuts all streams into messages, in the order in which their last bytes came.
fn decode(capture: Vec<Tcp>) -> (Vec<Sent>, u32) {
    let mut decoders: BTreeMap<(Port, Port), Decoder> = BTreeMap::new();
    let mut clients = BTreeSet::new();
    let (mut sent, mut refused) = (Vec::new(), 0);
    for event in capture {
        match event {
            Tcp::Refused(..) => refused += 1,
            Tcp::Open(client, server) => {
                decoders.insert((client, server), Decoder::default());
                decoders.insert((server, client), Decoder::default());
                clients.insert((client, server));
            }
            Tcp::Bytes(from, to, bytes) => {
                let from_client = clients.contains(&(from, to));
                let ports = if from_client { (from, to) } else { (to, from) };
                let decoder = decoders.get_mut(&(from, to)).expect("was opened");
                decoder.push(&bytes);
                let mut again = Vec::new();
                while let Some(frame) = decoder.next_frame().expect("a valid message") {
                    again.extend_from_slice(&frame.to_bytes());
                    sent.push(Sent {
                        ports,
                        from_client,
                        frame,
                    });
                }
                // The original wrote whole messages each time, so both end together.
                assert_eq!(again, bytes, "padding and all");
            }
            Tcp::Fin(from, to) => {
                let decoder = decoders.remove(&(from, to)).expect("was opened");
                let empty = format!("{:?}", Decoder::default());
                assert_eq!(format!("{decoder:?}"), empty, "{from} to {to} ends whole");
            }
        }
    }
    (sent, refused)
}

/// One end of a connection, played by our own brain.
struct End {
    conn: Conn,
    /// All that the captured end submitted, by seq. Submitting is not seen on the
    /// wire: what waits for a greeting has a lower seq and is written later.
    plan: BTreeMap<u64, Frame>,
    /// Requests received and not answered yet: epoch by id.
    asked: BTreeMap<u64, u64>,
    /// What the other end sent and this one was not seen to have received.
    incoming: VecDeque<Frame>,
    /// Seq of the last message on this socket.
    last: u64,
}

impl End {
    fn new(conn: Conn, plan: BTreeMap<u64, Frame>) -> Self {
        Self {
            conn,
            plan,
            asked: BTreeMap::new(),
            incoming: VecDeque::new(),
            last: 0,
        }
    }

    /// Receives what the captured end had received when it wrote `acked`.
    fn receive_up_to(&mut self, acked: u64) {
        while self.incoming.front().is_some_and(|f| f.seq <= acked) {
            let frame = self.incoming.pop_front().expect("just seen");
            let again = frame.seq <= self.conn.recv_seq();
            match self.conn.receive(frame.clone()) {
                Received::Request { epoch, id, .. } => {
                    self.asked.insert(id, epoch);
                }
                Received::Response { .. } => {}
                Received::Nothing => assert!(again, "{frame:?} is lost"),
            }
        }
        assert_eq!(self.conn.recv_seq(), acked, "acknowledges what was sent");
    }

    /// Submits everything with a seq up to this one.
    fn submit_up_to(&mut self, seq: u64) {
        while let Some(first) = self.plan.first_entry().filter(|e| *e.key() <= seq) {
            let frame = first.remove();
            if frame.cmd == NetCmd::Greeting {
                continue;
            }
            match (frame.body, frame.response) {
                (Ok(payload), false) => {
                    self.conn.request(frame.cmd, payload);
                }
                (body, _) => {
                    let epoch = self.asked.remove(&frame.id).expect("an answered request");
                    assert!(self.conn.respond(epoch, frame.id, frame.cmd, body));
                }
            }
        }
    }

    /// Whether the captured end writes this message a second time on one socket.
    /// The original does so now and then (with a later `recv_seq`); receivers must
    /// take the second for a duplicate, and ours never sends one.
    fn repeats(&mut self, frame: &Frame) -> bool {
        let repeats = frame.seq <= self.last;
        self.last = self.last.max(frame.seq);
        repeats
    }

    /// The message that our brain sends where the captured end sent `frame`.
    fn send_like(&mut self, frame: &Frame) -> Frame {
        self.receive_up_to(frame.recv_seq);
        self.submit_up_to(frame.seq);
        let next = self.conn.next_frame();
        next.unwrap_or_else(|| panic!("nothing to send where it sent {frame:?}"))
    }
}

/// One socket and the server's end of it.
struct Socket {
    rid: u64,
    /// The client's greeting, until it is answered.
    greeting: Option<(u64, NetGreeting)>,
    server: End,
    term: u64,
}

fn greeting_of(frame: &Frame) -> NetGreeting {
    let payload = frame.body.as_ref().expect("no error");
    NetGreeting::read_from_bytes(payload).expect("a greeting")
}

struct Replay {
    clients: BTreeMap<u64, End>,
    sockets: BTreeMap<(Port, Port), Socket>,
    /// Greetings after which something waited to be sent.
    resent: u32,
    /// Messages that the original wrote twice on one socket.
    repeated: u32,
}

impl Replay {
    /// Gives each end what it is going to submit.
    fn new(all: &[Sent]) -> Self {
        let mut clients: BTreeMap<u64, End> = BTreeMap::new();
        let mut sockets: BTreeMap<(Port, Port), Socket> = BTreeMap::new();
        for Sent {
            ports,
            from_client,
            frame,
        } in all
        {
            let socket = sockets.entry(*ports).or_insert_with(|| {
                let rid = greeting_of(frame).rid.get();
                let conn = Conn::server(0);
                Socket {
                    rid,
                    greeting: None,
                    server: End::new(conn, BTreeMap::new()),
                    term: 0,
                }
            });
            let client = clients.entry(socket.rid);
            let client = client.or_insert_with(|| End::new(Conn::client(), BTreeMap::new()));
            let end = if *from_client {
                client
            } else {
                &mut socket.server
            };
            end.plan.entry(frame.seq).or_insert_with(|| frame.clone());
        }
        Self {
            clients,
            sockets,
            resent: 0,
            repeated: 0,
        }
    }

    fn step(&mut self, sent: Sent) {
        let Sent {
            ports,
            from_client,
            frame,
        } = sent;
        let socket = self.sockets.get_mut(&ports).expect("has a greeting");
        let client = self.clients.get_mut(&socket.rid).expect("has a greeting");
        match (frame.cmd, from_client) {
            (NetCmd::Greeting, true) => greet(client, socket, &frame),
            (NetCmd::Greeting, false) => {
                is_greeted(client, socket, &frame);
                self.resent += u32::from(client.conn.unsent() > 0);
            }
            (_, true) => {
                if client.repeats(&frame) {
                    self.repeated += 1;
                } else {
                    let ours = client.send_like(&frame);
                    assert_eq!(ours, frame, "of client {:016x}", socket.rid);
                }
                let mut frame = frame;
                if frame.response {
                    // Our server knows its request by the number that it would give.
                    frame.id |= socket.term << 32;
                }
                socket.server.incoming.push_back(frame);
            }
            (_, false) if socket.server.repeats(&frame) => {
                self.repeated += 1;
                client.incoming.push_back(frame);
            }
            (_, false) => {
                let mut ours = socket.server.send_like(&frame);
                if !ours.response {
                    // Ours start apart for each term, so that late answers match nothing.
                    assert_eq!(ours.id >> 32, socket.term);
                    ours.id &= 0xffff_ffff;
                }
                assert_eq!(ours, frame, "to client {:016x}", socket.rid);
                client.incoming.push_back(frame);
            }
        }
    }
}

/// A client's end takes a new socket.
fn greet(client: &mut End, socket: &mut Socket, frame: &Frame) {
    let asked = greeting_of(frame);
    assert_eq!(asked.fsid.get(), FSID);
    // The last of the socket before.
    client.receive_up_to(frame.recv_seq);
    client.conn.detach();
    client.incoming.clear();
    client.last = 0;
    assert_eq!(asked.server_term.get(), client.conn.peer_term());
    client.submit_up_to(frame.seq);
    let (seq, id) = client.conn.greeting_request();
    let ours = greeting::request(seq, client.conn.recv_seq(), id, &asked);
    assert_eq!(ours, *frame, "of client {:016x}", socket.rid);
    socket.greeting = Some((id, asked));
}

fn is_greeted(client: &mut End, socket: &mut Socket, frame: &Frame) {
    let (id, asked) = socket.greeting.take().expect("one answer for one greeting");
    let term = greeting::accept_response(frame, &asked).expect("accepted");
    socket.term = term;
    socket.server.conn = Conn::server(term);
    let answer = NetGreeting {
        server_term: term.into(),
        flags: 0.into(),
        ..asked
    };
    let seq = socket.server.conn.greeting_response();
    assert_eq!(greeting::response(seq, id, Ok(answer)), *frame);
    socket.server.conn.attach(term);
    client.conn.attach(term);
}

#[test]
fn every_message_of_the_original_is_the_one_we_would_send() {
    let (sent, refused) = decode(pcap::read(CAPTURE).tcp);
    let mut counts: BTreeMap<(u8, bool), u32> = BTreeMap::new();
    for Sent { frame, .. } in &sent {
        *counts.entry((frame.cmd as u8, frame.response)).or_default() += 1;
        let encoded = messages::reencode(frame);
        let payload = frame.body.as_deref().unwrap_or_default();
        assert_eq!(encoded, payload, "{:?} comes back as itself", frame.cmd);
    }
    let mut replay = Replay::new(&sent);
    let (messages, sockets) = (sent.len(), replay.sockets.len());
    for sent in sent {
        replay.step(sent);
    }
    println!("{messages} messages, {sockets} connections, {refused} refused");
    for ((cmd, response), n) in &counts {
        let cmd = NetCmd::from_value(*cmd).expect("decoded");
        let what = if *response { "responses" } else { "requests" };
        println!("{n:6} {cmd:?} {what}");
    }
    assert_eq!(sockets, 12, "connections that were made");
    assert_eq!(replay.repeated, 1, "the original repeated itself once");
    assert!(replay.resent > 0, "some client had something to send again");
    for (rid, client) in &replay.clients {
        assert!(client.plan.is_empty(), "{rid:016x} sent everything");
    }
}

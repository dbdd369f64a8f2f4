//! Quorum datagrams between holders of the key: encrypted, each accepted once, and
//! only from a sender that proved to be alive.
//!
//! A packet, all integers little endian; the first 40 bytes are authenticated, the
//! rest encrypted by XChaCha20-Poly1305:
//!
//! | off | size | |
//! |---|---|---|
//! | 0 | 4 | `ORQ1` |
//! | 4 | 1 | kind: 0 data, 1 challenge, 2 answer |
//! | 5 | 3 | zero |
//! | 8 | 6 | address and port of the sender's socket |
//! | 14 | 6 | address and port that it is meant for |
//! | 20 | 4 | zero |
//! | 24 | 8 | session: random, for each time the sender bound its socket |
//! | 32 | 8 | counter, from 1 in each session |
//! | 40 | 8 | number of the challenge; 0 in data |
//! | 48 | n | the datagram |
//! | 48+n | 16 | tag |
//!
//! **Replay.** A receiver takes data only of the session in which it knows the
//! sender to live, and each counter once. A session that it does not know, after a
//! restart of either, it challenges with a random number; the sender's answer proves
//! that the session is alive now. So nothing has to survive a restart, no clock has
//! to agree, and packets recorded in an earlier life of either end, or meant for
//! another member, are never taken. The datagram that caused the challenge is lost;
//! a sender that is challenged sends its last one again, if it is recent.
//!
//! What can go wrong: floods. Whatever does not authenticate is dropped with a
//! counted log line; it costs one decryption and no memory. Challenges go to the
//! authenticated address, a hundred a second at most, so nothing can be amplified.

use super::{ClusterKey, Seams};
use crate::env::{
    Clock, Datagram, Duration, Entropy, LocalBoxFuture, NetError, Signal, Task, Time, pause, probe,
};
use crate::notice::Notice;
use bytes::{BufMut, Bytes, BytesMut};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;

const MAGIC: &[u8; 4] = b"ORQ1";
const HEAD_LEN: usize = 40;
const TAG_LEN: usize = 16;
/// How long the answer to a challenge counts.
const CHALLENGE_TIMEOUT: Duration = Duration::from_millis(500);
/// Least time between two packets with one challenge.
const CHALLENGE_AGAIN: Duration = Duration::from_millis(10);
/// How old the last datagram may be that is sent again after a challenge.
const AGAIN: Duration = Duration::from_millis(250);
/// Datagrams that wait for the actor; older ones are dropped first.
const QUEUE_MAX: usize = 256;
/// Peers that are remembered. Only holders of the key get here.
const PEERS_MAX: usize = 64;
/// Packets handled between two pauses in which others of the actor run.
const TURN: u64 = 32;
/// Time between two log lines of one kind.
const NOTICE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Data = 0,
    Challenge = 1,
    Answer = 2,
}

/// A packet that authenticated.
struct Opened {
    kind: Kind,
    from: SocketAddrV4,
    to: SocketAddrV4,
    session: u64,
    counter: u64,
    challenge: u64,
    payload: Bytes,
}

/// The counters of a live session that were seen: the greatest, and which of the 64
/// up to it.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    greatest: u64,
    seen: u64,
}

impl Window {
    /// Whether `counter` is new; it is not any more after this.
    fn take(&mut self, counter: u64) -> bool {
        if counter > self.greatest {
            let ahead = counter - self.greatest;
            self.seen = self.seen.checked_shl(ahead.min(64) as u32).unwrap_or(0) | 1;
            self.greatest = counter;
            return true;
        }
        let behind = self.greatest - counter;
        let bit = 1_u64.checked_shl(behind.min(64) as u32).unwrap_or(0);
        let new = bit != 0 && self.seen & bit == 0;
        self.seen |= bit;
        new
    }
}

/// A challenge without an answer.
#[derive(Clone, Copy)]
struct Asked {
    number: u64,
    /// Since when it counts.
    since: Time,
    /// When it was sent last.
    sent: Time,
}

#[derive(Default)]
struct Peer {
    /// The session that answered a challenge of ours.
    live: Option<(u64, Window)>,
    /// A challenge without an answer.
    challenge: Option<Asked>,
    /// The last datagram sent to it.
    last: Option<(Bytes, Time)>,
}

/// What is to be done about a packet.
enum Verdict {
    Deliver(Bytes, SocketAddrV4),
    Send(Vec<(Bytes, SocketAddrV4)>),
    Drop,
}

struct State {
    key: XChaCha20Poly1305,
    me: SocketAddrV4,
    session: u64,
    counter: u64,
    peers: BTreeMap<SocketAddrV4, Peer>,
    forged: Notice,
    replayed: Notice,
}

fn put_addr(out: &mut BytesMut, addr: SocketAddrV4) {
    out.put_u32_le(u32::from(*addr.ip()));
    out.put_u16_le(addr.port());
}

fn addr_at(bytes: &[u8]) -> SocketAddrV4 {
    let ip = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
    let port = u16::from_le_bytes(bytes[4..6].try_into().expect("two bytes"));
    SocketAddrV4::new(Ipv4Addr::from(ip), port)
}

fn u64_at(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
}

/// Never twice for one key: the session is random and the counter never repeats.
fn nonce(head: &[u8]) -> XNonce {
    let mut nonce = [0; 24];
    nonce[..16].copy_from_slice(&head[24..40]);
    nonce[16..22].copy_from_slice(&head[8..14]);
    nonce.into()
}

impl State {
    fn new(key: &ClusterKey, entropy: &dyn Entropy, me: SocketAddrV4) -> Self {
        Self {
            key: XChaCha20Poly1305::new(key.datagram().into()),
            me,
            session: entropy.next_u64(),
            counter: 0,
            peers: BTreeMap::new(),
            forged: Notice::new(NOTICE),
            replayed: Notice::new(NOTICE),
        }
    }

    fn seal(&mut self, kind: Kind, to: SocketAddrV4, challenge: u64, payload: &[u8]) -> Bytes {
        self.counter += 1;
        let mut out = BytesMut::with_capacity(HEAD_LEN + 8 + payload.len() + TAG_LEN);
        out.extend_from_slice(MAGIC);
        out.put_u32_le(kind as u32);
        put_addr(&mut out, self.me);
        put_addr(&mut out, to);
        out.put_u32_le(0);
        out.put_u64_le(self.session);
        out.put_u64_le(self.counter);
        let mut plain = challenge.to_le_bytes().to_vec();
        plain.extend_from_slice(payload);
        let sealed = self.key.encrypt(
            &nonce(&out),
            Payload {
                msg: &plain,
                aad: &out,
            },
        );
        out.extend_from_slice(&sealed.expect("a datagram is never too long"));
        out.freeze()
    }

    fn open(&self, packet: &[u8]) -> Option<Opened> {
        let (head, sealed) = packet.split_at_checked(HEAD_LEN)?;
        let kind = match u32::from_le_bytes(head[4..8].try_into().expect("four bytes")) {
            0 => Kind::Data,
            1 => Kind::Challenge,
            2 => Kind::Answer,
            _ => return None,
        };
        if head[..4] != *MAGIC {
            return None;
        }
        let payload = Payload {
            msg: sealed,
            aad: head,
        };
        let plain = self.key.decrypt(&nonce(head), payload).ok()?;
        let (challenge, payload) = plain.split_at_checked(8)?;
        Some(Opened {
            kind,
            from: addr_at(&head[8..]),
            to: addr_at(&head[14..]),
            session: u64_at(&head[24..]),
            counter: u64_at(&head[32..]),
            challenge: u64_at(challenge),
            payload: Bytes::copy_from_slice(payload),
        })
    }

    /// What one's own datagram becomes on the wire.
    fn send(&mut self, payload: &Bytes, to: SocketAddrV4, now: Time) -> Bytes {
        if self.peers.len() < PEERS_MAX || self.peers.contains_key(&to) {
            self.peers.entry(to).or_default().last = Some((payload.clone(), now));
        }
        self.seal(Kind::Data, to, 0, payload)
    }

    fn receive(
        &mut self,
        packet: &[u8],
        udp_from: SocketAddrV4,
        now: Time,
        entropy: &dyn Entropy,
    ) -> Verdict {
        let Some(opened) = self.open(packet) else {
            probe("secure_datagram_forged");
            if let Some(more) = self.forged.admit(now) {
                tracing::warn!(
                    from = %udp_from, len = packet.len(), more,
                    "quorum datagram dropped: not made with this cluster's key"
                );
            }
            return Verdict::Drop;
        };
        if opened.to != self.me || opened.from == self.me {
            return self.replayed(&opened, "it is meant for another member", now);
        }
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&opened.from) {
            return Verdict::Drop;
        }
        match opened.kind {
            Kind::Data => self.data(opened, now, entropy),
            Kind::Challenge => self.challenged(&opened, now),
            Kind::Answer => self.answered(&opened, now),
        }
    }

    fn replayed(&mut self, opened: &Opened, why: &str, now: Time) -> Verdict {
        probe("secure_datagram_replayed");
        if let Some(more) = self.replayed.admit(now) {
            tracing::warn!(from = %opened.from, why, more, "quorum datagram dropped: repeated");
        }
        Verdict::Drop
    }

    fn data(&mut self, opened: Opened, now: Time, entropy: &dyn Entropy) -> Verdict {
        let peer = self.peers.entry(opened.from).or_default();
        if let Some((session, window)) = &mut peer.live
            && *session == opened.session
        {
            if window.take(opened.counter) {
                return Verdict::Deliver(opened.payload, opened.from);
            }
            return self.replayed(&opened, "it came before", now);
        }
        // One number at a time, so that nobody can outdate it by repeating packets
        // until its answer is too late; sent again, since those who made it may be
        // dead, and this one is not.
        let current = peer.challenge.filter(|a| now < a.since + CHALLENGE_TIMEOUT);
        let mut asked = match current {
            Some(asked) if now < asked.sent + CHALLENGE_AGAIN => return Verdict::Drop,
            Some(asked) => asked,
            None => Asked {
                number: entropy.next_u64(),
                since: now,
                sent: now,
            },
        };
        asked.sent = now;
        peer.challenge = Some(asked);
        probe("secure_challenge");
        let packet = self.seal(Kind::Challenge, opened.from, asked.number, &[]);
        Verdict::Send(vec![(packet, opened.from)])
    }

    /// A peer does not know this session: prove that it lives.
    fn challenged(&mut self, opened: &Opened, now: Time) -> Verdict {
        let to = opened.from;
        let mut out = vec![(self.seal(Kind::Answer, to, opened.challenge, &[]), to)];
        // What made it ask was not taken. Once only: a repeated challenge repeats nothing.
        let last = self.peers.entry(to).or_default().last.take();
        if let Some((payload, _)) = last.filter(|(_, at)| now < *at + AGAIN) {
            out.push((self.seal(Kind::Data, to, 0, &payload), to));
        }
        Verdict::Send(out)
    }

    fn answered(&mut self, opened: &Opened, now: Time) -> Verdict {
        let peer = self.peers.entry(opened.from).or_default();
        let asked = peer.challenge.filter(|asked| {
            asked.number == opened.challenge && now < asked.since + CHALLENGE_TIMEOUT
        });
        if asked.is_none() {
            return self.replayed(opened, "nobody asked", now);
        }
        peer.challenge = None;
        if !matches!(peer.live, Some((session, _)) if session == opened.session) {
            probe("secure_session_proved");
            let mut window = Window::default();
            window.take(opened.counter);
            // Nothing sent before the answer is taken, whether it was seen or not.
            window.seen = u64::MAX;
            peer.live = Some((opened.session, window));
        }
        Verdict::Drop
    }
}

struct Shared {
    state: RefCell<State>,
    queue: RefCell<VecDeque<(Bytes, SocketAddrV4)>>,
    failed: RefCell<Option<NetError>>,
    arrived: Signal,
}

struct SecureDatagram {
    shared: Rc<Shared>,
    socket: Rc<dyn Datagram>,
    clock: Rc<dyn Clock>,
    pump: Rc<dyn Task>,
}

impl Drop for SecureDatagram {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

/// Wraps a socket bound to `me`, the address by which others know it.
pub(super) fn secure(
    seams: &Seams,
    key: &ClusterKey,
    socket: Rc<dyn Datagram>,
    me: SocketAddrV4,
) -> Rc<dyn Datagram> {
    let shared = Rc::new(Shared {
        state: RefCell::new(State::new(key, &*seams.entropy, me)),
        queue: RefCell::default(),
        failed: RefCell::new(None),
        arrived: Signal::default(),
    });
    // A task of its own, so that challenges are answered whatever the actor does.
    let pump = pump(seams.clone(), shared.clone(), socket.clone());
    let pump = seams
        .spawner
        .spawn_local("quorum datagrams", Box::pin(pump));
    Rc::new(SecureDatagram {
        shared,
        socket,
        clock: seams.clock.clone(),
        pump,
    })
}

async fn pump(seams: Seams, shared: Rc<Shared>, socket: Rc<dyn Datagram>) {
    let mut turn = 0_u64;
    loop {
        turn += 1;
        let (packet, from) = match socket.recv_from().await {
            Ok(received) => received,
            Err(error) => {
                shared.failed.replace(Some(error));
                shared.arrived.wake_all();
                return;
            }
        };
        let now = seams.clock.now();
        let verdict = shared
            .state
            .borrow_mut()
            .receive(&packet, from, now, &*seams.entropy);
        match verdict {
            Verdict::Drop => {}
            Verdict::Deliver(payload, from) => {
                let mut queue = shared.queue.borrow_mut();
                if queue.len() == QUEUE_MAX {
                    queue.pop_front();
                }
                queue.push_back((payload, from));
                shared.arrived.wake_all();
            }
            Verdict::Send(packets) => {
                for (packet, to) in packets {
                    let _ = socket.send_to(packet, to).await;
                }
            }
        }
        if turn.is_multiple_of(TURN) {
            pause().await;
        }
    }
}

impl Datagram for SecureDatagram {
    fn send_to(&self, bytes: Bytes, to: SocketAddrV4) -> LocalBoxFuture<'_, Result<(), NetError>> {
        let now = self.clock.now();
        let packet = self.shared.state.borrow_mut().send(&bytes, to, now);
        self.socket.send_to(packet, to)
    }

    fn recv_from(&self) -> LocalBoxFuture<'_, Result<(Bytes, SocketAddrV4), NetError>> {
        Box::pin(async {
            let next = || match self.shared.queue.borrow_mut().pop_front() {
                Some(received) => Some(Ok(received)),
                None => self.shared.failed.borrow().clone().map(Err),
            };
            self.shared.arrived.wait_for(next).await
        })
    }
}

/// Two members without sockets, for tests that repeat and reorder packets.
#[cfg(test)]
pub(super) mod tests_support {
    use super::*;
    use crate::env::Env;

    pub(crate) struct Pair {
        one: State,
        two: State,
    }

    pub(crate) fn pair(
        key: &ClusterKey,
        entropy: &dyn Entropy,
        one: SocketAddrV4,
        two: SocketAddrV4,
    ) -> Pair {
        Pair {
            one: State::new(key, entropy, one),
            two: State::new(key, entropy, two),
        }
    }

    impl Pair {
        /// Sends `count` datagrams, each `times` times, shuffled within short
        /// reach; returns how many were delivered.
        pub(crate) fn send_and_repeat(&mut self, env: &Env, count: usize, times: usize) -> usize {
            let entropy = &*env.entropy;
            let (one, two) = (self.one.me, self.two.me);
            let now = env.clock.now();
            let hello = self.one.seal(Kind::Data, two, 0, b"hello");
            let Verdict::Send(asked) = self.two.receive(&hello, one, now, entropy) else {
                panic!("an unknown session is challenged");
            };
            let Verdict::Send(answers) = self.one.receive(&asked[0].0, two, now, entropy) else {
                panic!("a challenge is answered");
            };
            for (answer, _) in &answers {
                assert!(matches!(
                    self.two.receive(answer, one, now, entropy),
                    Verdict::Drop
                ));
            }
            let again = self.two.receive(&hello, one, now, entropy);
            assert!(matches!(again, Verdict::Drop), "sent before the answer");
            let again = self.two.receive(&answers[0].0, one, now, entropy);
            assert!(matches!(again, Verdict::Drop), "an answer counts once");
            let mut packets: Vec<Bytes> = (0..count)
                .map(|n| self.one.send(&Bytes::from(n.to_string()), two, now))
                .flat_map(|packet| vec![packet; times])
                .collect();
            for at in 0..packets.len() {
                let reach = (at + 30).min(packets.len());
                let other = entropy.range(at as u64, reach as u64) as usize;
                packets.swap(at, other);
            }
            let taken = packets.iter().filter(|packet| {
                let verdict = self.two.receive(packet, one, now, entropy);
                matches!(verdict, Verdict::Deliver(..))
            });
            taken.count()
        }
    }
}

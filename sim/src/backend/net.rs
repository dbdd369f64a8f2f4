//! A network in memory: datagrams and byte streams between any number of nodes.
//!
//! Streams are cut at any byte, delayed, and delivered in order; a partition
//! holds what is under way and, past the keepalive time, breaks the stream on
//! both sides. Datagrams may be lost, doubled or overtaken. A process that ends
//! resets its streams; a machine that loses power is silent.

mod sockets;

pub use sockets::NodeNet;

use super::flying::{Flying, Ledger, Waiting};
use super::{Life, Sim};
use crate::rng::Stream as Rng;
use bytes::Bytes;
use outrider_core::env::{NetError, Signal, Stream};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::{Rc, Weak};

/// How links behave. Times in nanoseconds, chances in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Links {
    /// Shortest delay.
    pub delay: u64,
    /// Random addition.
    pub spread: u64,
    /// Datagrams lost.
    pub loss: u64,
    /// Datagrams doubled.
    pub double: u64,
    /// Chance that a piece of a stream is cut in two.
    pub cut: u64,
    /// Bytes a stream takes before the writer waits.
    pub window: usize,
}

impl Default for Links {
    fn default() -> Self {
        Self {
            delay: 20_000,
            spread: 80_000,
            loss: 0,
            double: 0,
            cut: 200,
            window: 1 << 20,
        }
    }
}

/// Where datagrams, or streams that were not accepted yet, arrive.
struct Socket<T> {
    life: Rc<Life>,
    queue: RefCell<VecDeque<T>>,
    signal: Signal,
}

/// The sockets of one kind. Those that nobody has any more, or whose processes have ended,
/// take no address.
type Sockets<T> = RefCell<BTreeMap<SocketAddrV4, Weak<Socket<T>>>>;

/// One direction of a stream.
struct Pipe {
    from: Ipv4Addr,
    to: Ipv4Addr,
    /// Arrived, not yet read.
    arrived: RefCell<VecDeque<Bytes>>,
    /// Stopped by a partition, in order. `None` is the end of the stream.
    held: RefCell<VecDeque<Option<Bytes>>>,
    in_flight: Cell<usize>,
    last_arrival: Cell<u64>,
    ended: Cell<bool>,
    error: RefCell<Option<NetError>>,
    reader_gone: Cell<bool>,
    writer_done: Cell<bool>,
    signal: Signal,
}

struct Link {
    pipes: [Weak<Pipe>; 2],
    lives: [Rc<Life>; 2],
    keepalive: u64,
    silent_since: Cell<Option<u64>>,
}

/// The network of a world.
pub struct SimNet {
    pub(super) sim: Rc<Sim>,
    rng: Rng,
    links: Cell<Links>,
    /// Links that behave otherwise, by direction.
    special: RefCell<BTreeMap<(Ipv4Addr, Ipv4Addr), Links>>,
    /// Machines without power: nobody answers there.
    dark: RefCell<BTreeSet<Ipv4Addr>>,
    cut_off: RefCell<BTreeSet<(Ipv4Addr, Ipv4Addr)>>,
    datagrams: Sockets<(Bytes, SocketAddrV4)>,
    listeners: Sockets<Stream>,
    streams: RefCell<Vec<Link>>,
    flying: Rc<Ledger<Flying>>,
    next_port: Cell<u16>,
}

impl SimNet {
    /// A network without partitions.
    pub fn new(sim: &Rc<Sim>, links: Links) -> Rc<Self> {
        Rc::new(Self {
            sim: Rc::clone(sim),
            rng: Rng::new(sim.seed, "network", 0),
            links: Cell::new(links),
            special: RefCell::default(),
            dark: RefCell::default(),
            cut_off: RefCell::default(),
            datagrams: RefCell::default(),
            listeners: RefCell::default(),
            streams: RefCell::default(),
            flying: Rc::default(),
            next_port: Cell::new(20_000),
        })
    }

    /// Changes how links behave.
    pub fn set_links(&self, links: Links) {
        self.links.set(links);
    }

    /// Stops what goes from `from` to `to` (one direction).
    pub fn cut(self: &Rc<Self>, from: Ipv4Addr, to: Ipv4Addr) {
        self.cut_off.borrow_mut().insert((from, to));
        for link in self.streams.borrow().iter() {
            let Some(pipe) = link.pipes[0].upgrade().or_else(|| link.pipes[1].upgrade()) else {
                continue;
            };
            let ends = [(pipe.from, pipe.to), (pipe.to, pipe.from)];
            if ends.contains(&(from, to)) {
                self.fall_silent(link);
            }
        }
    }

    /// Ends a cut in one direction; what it held arrives now.
    pub fn mend(&self, from: Ipv4Addr, to: Ipv4Addr) {
        self.cut_off.borrow_mut().remove(&(from, to));
        let whole = !self.is_cut(to, from);
        for link in self.streams.borrow().iter() {
            for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                let ends = (pipe.from, pipe.to);
                if ends == (from, to) {
                    pipe.let_go();
                }
                if whole && (ends == (from, to) || ends == (to, from)) && link.both_live() {
                    link.silent_since.set(None);
                }
            }
        }
    }

    /// Lets the link in one direction behave as `links` say, or as all others again.
    pub fn set_special(&self, from: Ipv4Addr, to: Ipv4Addr, links: Option<Links>) {
        let mut special = self.special.borrow_mut();
        match links {
            Some(links) => special.insert((from, to), links),
            None => special.remove(&(from, to)),
        };
    }

    /// Breaks the streams between two machines, or of one with everybody.
    pub fn reset_between(&self, one: Ipv4Addr, other: Option<Ipv4Addr>) {
        self.streams.borrow_mut().retain(|link| {
            let pipe = link.pipes.iter().find_map(Weak::upgrade);
            let hit = pipe.is_some_and(|pipe| {
                let ends = [pipe.from, pipe.to];
                ends.contains(&one) && other.is_none_or(|other| ends.contains(&other))
            });
            if hit {
                link.fail(&NetError::Reset);
            }
            !hit
        });
    }

    /// A machine lost its power: its sockets are gone and nobody is told. Others
    /// find out when their keepalive time is over.
    pub fn darken(self: &Rc<Self>, ip: Ipv4Addr, life: &Rc<Life>) {
        self.end_of(life, true);
        self.dark.borrow_mut().insert(ip);
        for link in self.streams.borrow().iter() {
            if !link.both_live() {
                self.fall_silent(link);
            }
        }
    }

    /// A machine has power again: it resets streams it knows nothing of.
    pub fn lighten(&self, ip: Ipv4Addr) {
        if !self.dark.borrow_mut().remove(&ip) {
            return;
        }
        self.streams.borrow_mut().retain(|link| {
            let pipe = link.pipes.iter().find_map(Weak::upgrade);
            let of_ip = pipe.is_some_and(|pipe| pipe.from == ip || pipe.to == ip);
            let stale = of_ip && !link.both_live();
            if stale {
                link.fail(&NetError::Reset);
            }
            !stale
        });
    }

    fn links_of(&self, from: Ipv4Addr, to: Ipv4Addr) -> Links {
        let special = self.special.borrow();
        special
            .get(&(from, to))
            .copied()
            .unwrap_or(self.links.get())
    }

    /// From now on one end of a stream hears nothing of the other.
    fn fall_silent(self: &Rc<Self>, link: &Link) {
        if link.silent_since.get().is_some() {
            return;
        }
        let now = self.sim.now();
        link.silent_since.set(Some(now));
        let net = Rc::downgrade(self);
        self.sim.call_at(now + link.keepalive, move || {
            if let Some(net) = net.upgrade() {
                net.time_out_silent();
            }
        });
    }

    fn time_out_silent(&self) {
        let now = self.sim.now();
        for link in self.streams.borrow().iter() {
            if link
                .silent_since
                .get()
                .is_some_and(|since| now >= since + link.keepalive)
            {
                link.fail(&NetError::TimedOut);
            }
        }
    }

    /// Ends all partitions; what they held arrives now.
    pub fn heal(&self) {
        self.cut_off.borrow_mut().clear();
        for link in self.streams.borrow().iter() {
            link.silent_since.set(None);
            for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                pipe.let_go();
            }
        }
    }

    /// A process ended: its sockets close. With `silent` (power loss) nobody is told.
    pub fn end_of(&self, life: &Rc<Life>, silent: bool) {
        let is = |other: &Rc<Life>| Rc::ptr_eq(other, life) || !other.is_alive();
        self.datagrams
            .borrow_mut()
            .retain(|_, socket| socket.upgrade().is_some_and(|socket| !is(&socket.life)));
        self.listeners
            .borrow_mut()
            .retain(|_, socket| socket.upgrade().is_some_and(|socket| !is(&socket.life)));
        self.streams.borrow_mut().retain(|link| {
            if !link.lives.iter().any(is) {
                return true;
            }
            if !silent {
                link.fail(&NetError::Reset);
            }
            silent
        });
    }

    /// Breaks every stream, as a failing switch would.
    pub fn reset_all(&self) {
        for link in self.streams.take() {
            link.fail(&NetError::Reset);
        }
    }

    /// What is on its way, what waits in streams, and which directions are cut.
    pub fn under_way(&self) -> (Vec<Flying>, Vec<Waiting>, Vec<(Ipv4Addr, Ipv4Addr)>) {
        let streams = self.streams.borrow();
        let pipes = streams.iter().flat_map(|link| &link.pipes);
        let waiting = pipes.filter_map(Weak::upgrade).map(|pipe| Waiting {
            from: pipe.from,
            to: pipe.to,
            unread: pipe.arrived.borrow().iter().map(Bytes::len).sum(),
            held: pipe.held.borrow().len(),
        });
        (
            self.flying.list(),
            waiting.filter(|w| w.unread > 0 || w.held > 0).collect(),
            self.cut_off.borrow().iter().copied().collect(),
        )
    }

    fn is_cut(&self, from: Ipv4Addr, to: Ipv4Addr) -> bool {
        self.cut_off.borrow().contains(&(from, to))
    }

    fn delay(&self, from: Ipv4Addr, to: Ipv4Addr) -> u64 {
        let links = self.links_of(from, to);
        links.delay + self.rng.below(links.spread + 1)
    }

    /// What a stream waits for a piece that is lost and sent again.
    fn resend(&self, from: Ipv4Addr, to: Ipv4Addr) -> u64 {
        let loss = self.links_of(from, to).loss;
        let mut wait = 0;
        let mut pause = 200_000_000;
        while loss > 0 && self.rng.chance(loss) && wait < 5_000_000_000 {
            wait += pause;
            pause *= 2;
        }
        wait
    }

    fn free_port(&self) -> u16 {
        let port = self.next_port.get();
        self.next_port
            .set(if port == u16::MAX { 20_000 } else { port + 1 });
        port
    }
}

impl Link {
    /// Whether both ends still have their processes.
    fn both_live(&self) -> bool {
        self.lives.iter().all(|life| life.is_alive())
    }

    /// Breaks it at both ends.
    fn fail(&self, error: &NetError) {
        for pipe in self.pipes.iter().filter_map(Weak::upgrade) {
            pipe.fail(error.clone());
        }
    }
}

impl Pipe {
    fn new(from: Ipv4Addr, to: Ipv4Addr) -> Rc<Self> {
        Rc::new(Self {
            from,
            to,
            arrived: RefCell::default(),
            held: RefCell::default(),
            in_flight: Cell::new(0),
            last_arrival: Cell::new(0),
            ended: Cell::new(false),
            error: RefCell::new(None),
            reader_gone: Cell::new(false),
            writer_done: Cell::new(false),
            signal: Signal::default(),
        })
    }

    fn fail(&self, error: NetError) {
        self.error.borrow_mut().get_or_insert(error);
        self.signal.wake_all();
    }

    fn arrive(&self, piece: Option<Bytes>) {
        match piece {
            Some(bytes) => self.arrived.borrow_mut().push_back(bytes),
            None => self.ended.set(true),
        }
        self.signal.wake_all();
    }

    /// What was held arrives.
    fn let_go(&self) {
        for piece in self.held.take() {
            self.arrive(piece);
        }
    }

    /// Sends a piece (or the end) towards the reader; `message` is what ends with it.
    fn send(self: &Rc<Self>, net: &Rc<SimNet>, piece: Option<Bytes>, message: Option<u64>) {
        let delay = net.delay(self.from, self.to) + net.resend(self.from, self.to);
        let at = (net.sim.now() + delay).max(self.last_arrival.get() + 1);
        self.last_arrival.set(at);
        let (pipe, net_again) = (Rc::clone(self), Rc::downgrade(net));
        let flying = net.flying.enter(Flying {
            from: self.from,
            to: self.to,
            datagram: false,
            bytes: piece.as_ref().map_or(0, Bytes::len),
            sent: net.sim.now(),
            arrives: at,
        });
        net.sim.call_at(at, move || {
            drop(flying);
            let Some(net) = net_again.upgrade() else {
                return;
            };
            if let Some(message) = message {
                net.arrives(message, pipe.to);
            }
            if pipe.reader_gone.get() && piece.is_some() {
                pipe.fail(NetError::Reset);
            } else if net.is_cut(pipe.from, pipe.to) || !pipe.held.borrow().is_empty() {
                pipe.held.borrow_mut().push_back(piece);
            } else {
                pipe.arrive(piece);
            }
        });
    }
}

#[cfg(test)]
mod tests;

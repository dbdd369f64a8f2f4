//! A network in memory: datagrams and byte streams between any number of nodes.
//!
//! Streams are cut at any byte, delayed, and delivered in order; a partition
//! holds what is under way and, past the keepalive time, breaks the stream on
//! both sides. Datagrams may be lost, doubled or overtaken. A process that ends
//! resets its streams; a machine that loses power is silent.

use super::flying::{Flying, Ledger, Waiting};
use super::said::{datagram, frames};
use super::{Host, Life, Sim};
use crate::rng::Stream as Rng;
use bytes::Bytes;
use outrider_core::env::{
    Datagram, Duration, Entropy, Listener, LocalBoxFuture, NetError, Network, Signal, Stream,
    StreamReader, StreamWriter,
};
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

type Inbox = RefCell<VecDeque<(Bytes, SocketAddrV4)>>;

struct DatagramSocket {
    addr: SocketAddrV4,
    life: Rc<Life>,
    inbox: Inbox,
    signal: Signal,
}

struct ListenSocket {
    life: Rc<Life>,
    backlog: RefCell<VecDeque<Stream>>,
    signal: Signal,
}

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
    datagrams: RefCell<BTreeMap<SocketAddrV4, Weak<DatagramSocket>>>,
    listeners: RefCell<BTreeMap<SocketAddrV4, Weak<ListenSocket>>>,
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
        let now = self.sim.now();
        for link in self.streams.borrow().iter() {
            let Some(pipe) = link.pipes[0].upgrade().or_else(|| link.pipes[1].upgrade()) else {
                continue;
            };
            let ends = [(pipe.from, pipe.to), (pipe.to, pipe.from)];
            if ends.contains(&(from, to)) && link.silent_since.get().is_none() {
                link.silent_since.set(Some(now));
                let net = Rc::downgrade(self);
                self.sim.call_at(now + link.keepalive, move || {
                    if let Some(net) = net.upgrade() {
                        net.time_out_silent();
                    }
                });
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
                    for piece in pipe.held.take() {
                        pipe.arrive(piece);
                    }
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
                for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                    pipe.fail(NetError::Reset);
                }
            }
            !hit
        });
    }

    /// A machine lost its power: its sockets are gone and nobody is told. Others
    /// find out when their keepalive time is over.
    pub fn darken(self: &Rc<Self>, ip: Ipv4Addr, life: &Rc<Life>) {
        self.end_of(life, true);
        self.dark.borrow_mut().insert(ip);
        let now = self.sim.now();
        for link in self.streams.borrow().iter() {
            if !link.both_live() && link.silent_since.get().is_none() {
                link.silent_since.set(Some(now));
                let net = Rc::downgrade(self);
                self.sim.call_at(now + link.keepalive, move || {
                    if let Some(net) = net.upgrade() {
                        net.time_out_silent();
                    }
                });
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
                for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                    pipe.fail(NetError::Reset);
                }
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

    fn time_out_silent(&self) {
        let now = self.sim.now();
        for link in self.streams.borrow().iter() {
            if link
                .silent_since
                .get()
                .is_some_and(|since| now >= since + link.keepalive)
            {
                for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                    pipe.fail(NetError::TimedOut);
                }
            }
        }
    }

    /// Ends all partitions; what they held arrives now.
    pub fn heal(&self) {
        self.cut_off.borrow_mut().clear();
        for link in self.streams.borrow().iter() {
            link.silent_since.set(None);
            for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                for piece in pipe.held.take() {
                    pipe.arrive(piece);
                }
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
                for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                    pipe.fail(NetError::Reset);
                }
            }
            silent
        });
    }

    /// Breaks every stream, as a failing switch would.
    pub fn reset_all(&self) {
        for link in self.streams.take() {
            for pipe in link.pipes.iter().filter_map(Weak::upgrade) {
                pipe.fail(NetError::Reset);
            }
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

struct Reader {
    pipe: Rc<Pipe>,
}

impl StreamReader for Reader {
    fn read(&mut self) -> LocalBoxFuture<'_, Result<Bytes, NetError>> {
        let pipe = &self.pipe;
        Box::pin(pipe.signal.wait_for(move || {
            if let Some(bytes) = pipe.arrived.borrow_mut().pop_front() {
                pipe.in_flight.set(pipe.in_flight.get() - bytes.len());
                pipe.signal.wake_all();
                return Some(Ok(bytes));
            }
            if let Some(error) = &*pipe.error.borrow() {
                return Some(Err(error.clone()));
            }
            pipe.ended.get().then(|| Ok(Bytes::new()))
        }))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.pipe.reader_gone.set(true);
        self.pipe.arrived.take();
        self.pipe.signal.wake_all();
    }
}

struct Writer {
    net: Rc<SimNet>,
    pipe: Rc<Pipe>,
}

impl StreamWriter for Writer {
    fn write(&mut self, mut bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async move {
            let (net, pipe) = (&self.net, &self.pipe);
            let links = net.links_of(pipe.from, pipe.to);
            if pipe.writer_done.get() {
                return Err(NetError::Other("written after shutdown".to_owned()));
            }
            pipe.signal
                .wait_for(|| {
                    if let Some(error) = &*pipe.error.borrow() {
                        return Some(Err(error.clone()));
                    }
                    (pipe.in_flight.get() < links.window).then_some(Ok(()))
                })
                .await?;
            pipe.in_flight.set(pipe.in_flight.get() + bytes.len());
            let message = net.leaves(pipe.from, pipe.to, || frames(&bytes));
            while bytes.len() > 1 && net.rng.chance(links.cut) {
                let at = net.rng.range(1, bytes.len() as u64) as usize;
                pipe.send(net, Some(bytes.split_to(at)), None);
            }
            if !bytes.is_empty() {
                pipe.send(net, Some(bytes), message);
            }
            Ok(())
        })
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>> {
        self.finish();
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Writer {
    fn finish(&mut self) {
        if !self.pipe.writer_done.replace(true) {
            self.pipe.send(&self.net, None, None);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.finish();
    }
}

struct DatagramHandle {
    net: Rc<SimNet>,
    socket: Rc<DatagramSocket>,
}

impl Drop for DatagramHandle {
    fn drop(&mut self) {
        self.net.datagrams.borrow_mut().remove(&self.socket.addr);
    }
}

impl Datagram for DatagramHandle {
    fn send_to(&self, bytes: Bytes, to: SocketAddrV4) -> LocalBoxFuture<'_, Result<(), NetError>> {
        let (net, from) = (&self.net, self.socket.addr);
        let links = net.links_of(*from.ip(), *to.ip());
        let copies = match (net.rng.chance(links.loss), net.rng.chance(links.double)) {
            (true, _) => 0,
            (false, true) => 2,
            (false, false) => 1,
        };
        let message = net.leaves(*from.ip(), *to.ip(), || datagram(&bytes));
        for _ in 0..copies {
            let (weak, bytes) = (Rc::downgrade(net), bytes.clone());
            let delay = net.delay(*from.ip(), *to.ip());
            let now = net.sim.now();
            let flying = net.flying.enter(Flying {
                from: *from.ip(),
                to: *to.ip(),
                datagram: true,
                bytes: bytes.len(),
                sent: now,
                arrives: now + delay,
            });
            net.sim.call_at(now + delay, move || {
                drop(flying);
                let Some(net) = weak.upgrade() else { return };
                let socket = net.datagrams.borrow().get(&to).and_then(Weak::upgrade);
                if let Some(socket) = socket
                    && !net.is_cut(*from.ip(), *to.ip())
                {
                    if let Some(message) = message {
                        net.arrives(message, *to.ip());
                    }
                    socket.inbox.borrow_mut().push_back((bytes, from));
                    socket.signal.wake_all();
                }
            });
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn recv_from(&self) -> LocalBoxFuture<'_, Result<(Bytes, SocketAddrV4), NetError>> {
        let socket = &self.socket;
        Box::pin(
            socket
                .signal
                .wait_for(move || socket.inbox.borrow_mut().pop_front().map(Ok)),
        )
    }
}

struct ListenHandle {
    net: Rc<SimNet>,
    socket: Rc<ListenSocket>,
    addr: SocketAddrV4,
}

impl Drop for ListenHandle {
    fn drop(&mut self) {
        self.net.listeners.borrow_mut().remove(&self.addr);
    }
}

impl Listener for ListenHandle {
    fn accept(&mut self) -> LocalBoxFuture<'_, Result<Stream, NetError>> {
        let socket = &self.socket;
        Box::pin(
            socket
                .signal
                .wait_for(move || socket.backlog.borrow_mut().pop_front().map(Ok)),
        )
    }
    fn local_addr(&self) -> SocketAddrV4 {
        self.addr
    }
}

/// The network as one process sees it.
pub struct NodeNet {
    net: Rc<SimNet>,
    ip: Ipv4Addr,
    life: Rc<Life>,
    sim: Rc<Sim>,
}

impl NodeNet {
    /// The network of a process.
    pub fn new(host: &Host) -> Self {
        Self {
            net: Rc::clone(&host.net),
            ip: host.node.ip,
            life: Rc::clone(&host.life),
            sim: Rc::clone(&host.sim),
        }
    }

    fn bind(&self, addr: SocketAddrV4) -> SocketAddrV4 {
        let ip = if addr.ip().is_unspecified() {
            self.ip
        } else {
            *addr.ip()
        };
        let port = match addr.port() {
            0 => self.net.free_port(),
            port => port,
        };
        SocketAddrV4::new(ip, port)
    }
}

impl Network for NodeNet {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        let addr = self.bind(addr);
        let taken = self
            .net
            .datagrams
            .borrow()
            .get(&addr)
            .is_some_and(|socket| {
                socket
                    .upgrade()
                    .is_some_and(|socket| socket.life.is_alive())
            });
        if taken {
            return Box::pin(std::future::ready(Err(NetError::AddrInUse(addr))));
        }
        let socket = Rc::new(DatagramSocket {
            addr,
            life: Rc::clone(&self.life),
            inbox: RefCell::default(),
            signal: Signal::default(),
        });
        let weak = Rc::downgrade(&socket);
        self.net.datagrams.borrow_mut().insert(addr, weak);
        let handle: Rc<dyn Datagram> = Rc::new(DatagramHandle {
            net: Rc::clone(&self.net),
            socket,
        });
        Box::pin(std::future::ready(Ok(handle)))
    }

    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        let addr = self.bind(addr);
        let taken = self
            .net
            .listeners
            .borrow()
            .get(&addr)
            .is_some_and(|socket| {
                socket
                    .upgrade()
                    .is_some_and(|socket| socket.life.is_alive())
            });
        if taken {
            return Box::pin(std::future::ready(Err(NetError::AddrInUse(addr))));
        }
        let socket = Rc::new(ListenSocket {
            life: Rc::clone(&self.life),
            backlog: RefCell::default(),
            signal: Signal::default(),
        });
        let weak = Rc::downgrade(&socket);
        self.net.listeners.borrow_mut().insert(addr, weak);
        let handle: Box<dyn Listener> = Box::new(ListenHandle {
            net: Rc::clone(&self.net),
            socket,
            addr,
        });
        Box::pin(std::future::ready(Ok(handle)))
    }

    fn connect(
        &self,
        addr: SocketAddrV4,
        keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        let (net, sim, life) = (
            Rc::clone(&self.net),
            Rc::clone(&self.sim),
            Rc::clone(&self.life),
        );
        let local = SocketAddrV4::new(self.ip, net.free_port());
        Box::pin(async move {
            let (near, far) = (*local.ip(), *addr.ip());
            sim.sleep(net.delay(near, far) + net.delay(far, near)).await;
            if net.dark.borrow().contains(&far) {
                sim.sleep(keepalive.as_nanos() as u64).await;
                return Err(NetError::TimedOut);
            }
            if net.is_cut(*local.ip(), *addr.ip()) || net.is_cut(*addr.ip(), *local.ip()) {
                sim.sleep(keepalive.as_nanos() as u64).await;
                return Err(NetError::TimedOut);
            }
            let listener = net.listeners.borrow().get(&addr).and_then(Weak::upgrade);
            let Some(listener) = listener.filter(|listener| listener.life.is_alive()) else {
                return Err(NetError::Refused(addr));
            };
            let there = Pipe::new(*local.ip(), *addr.ip());
            let back = Pipe::new(*addr.ip(), *local.ip());
            let mut streams = net.streams.borrow_mut();
            streams.retain(|link| link.pipes.iter().any(|pipe| pipe.strong_count() > 0));
            streams.push(Link {
                pipes: [Rc::downgrade(&there), Rc::downgrade(&back)],
                lives: [Rc::clone(&life), Rc::clone(&listener.life)],
                keepalive: keepalive.as_nanos() as u64,
                silent_since: Cell::new(None),
            });
            drop(streams);
            let end = |read: &Rc<Pipe>, write: &Rc<Pipe>, local, peer| Stream {
                reader: Box::new(Reader {
                    pipe: Rc::clone(read),
                }),
                writer: Box::new(Writer {
                    net: Rc::clone(&net),
                    pipe: Rc::clone(write),
                }),
                local,
                peer,
            };
            let accepted = end(&there, &back, addr, local);
            listener.backlog.borrow_mut().push_back(accepted);
            listener.signal.wake_all();
            Ok(end(&back, &there, local, addr))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::simulate;
    use super::*;
    use outrider_core::env::Env;

    const KEEPALIVE: Duration = Duration::from_secs(10);

    async fn pair(env: &Env, port: u16) -> (Stream, Stream) {
        let addr = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), port);
        let mut listener = env.net.listen(addr).await.unwrap();
        let client = env.net.connect(addr, KEEPALIVE).await.unwrap();
        (client, listener.accept().await.unwrap())
    }

    #[test]
    fn bytes_arrive_whole_in_order_and_the_end_is_seen() {
        simulate(1, async |host: Host| {
            let env = host.env("a");
            let (mut client, mut server) = pair(&env, 1000).await;
            let sent: Vec<u8> = (0..200u8).cycle().take(5000).collect();
            for piece in sent.chunks(700) {
                let piece = Bytes::copy_from_slice(piece);
                client.writer.write(piece).await.unwrap();
            }
            client.writer.shutdown().await.unwrap();
            let mut got = Vec::new();
            let mut pieces = 0;
            loop {
                let piece = server.reader.read().await.unwrap();
                if piece.is_empty() {
                    break;
                }
                pieces += 1;
                got.extend_from_slice(&piece);
            }
            assert_eq!(got, sent);
            assert!(pieces > 8, "cut into {pieces}");
            // The other direction still works after a half close.
            server.writer.write(Bytes::from_static(b"x")).await.unwrap();
            assert_eq!(client.reader.read().await.unwrap(), "x");
        });
    }

    #[test]
    fn a_dead_process_resets_and_refuses() {
        simulate(2, async |host: Host| {
            let env = host.env("a");
            let other = Host {
                life: Life::new(),
                ..host.clone()
            };
            let addr = SocketAddrV4::new(host.node.ip, 1000);
            let mut listener = other.env("b").net.listen(addr).await.unwrap();
            let again = env.net.listen(addr).await;
            assert!(matches!(again, Err(NetError::AddrInUse(_))));
            let mut client = env.net.connect(addr, KEEPALIVE).await.unwrap();
            let _server = listener.accept().await.unwrap();
            other.life.kill();
            host.net.end_of(&other.life, false);
            assert_eq!(client.reader.read().await, Err(NetError::Reset));
            let refused = env.net.connect(addr, KEEPALIVE).await;
            assert!(matches!(refused, Err(NetError::Refused(_))));
        });
    }

    #[test]
    fn a_partition_holds_then_delivers_or_times_out() {
        simulate(3, async |host: Host| {
            let env = host.env("a");
            let (mut client, mut server) = pair(&env, 1000).await;
            let ip = host.node.ip;
            host.net.cut(ip, ip);
            client
                .writer
                .write(Bytes::from_static(b"late"))
                .await
                .unwrap();
            env.sleep(Duration::from_secs(1)).await;
            host.net.heal();
            let mut got = Vec::new();
            while got.len() < 4 {
                got.extend_from_slice(&server.reader.read().await.unwrap());
            }
            assert_eq!(got, b"late");
            host.net.cut(ip, ip);
            let start = host.sim.now();
            assert_eq!(server.reader.read().await, Err(NetError::TimedOut));
            assert!(host.sim.now() - start >= 10_000_000_000);
        });
    }

    #[test]
    fn datagrams_are_lost_doubled_and_overtaken() {
        simulate(4, async |host: Host| {
            host.net.set_links(Links {
                loss: 200,
                double: 200,
                ..Links::default()
            });
            let env = host.env("a");
            let to = SocketAddrV4::new(host.node.ip, 5);
            let inbox = env.net.bind_datagram(to).await.unwrap();
            let from = SocketAddrV4::new(host.node.ip, 6);
            let outbox = env.net.bind_datagram(from).await.unwrap();
            for n in 0..100u8 {
                outbox
                    .send_to(Bytes::copy_from_slice(&[n]), to)
                    .await
                    .unwrap();
            }
            env.sleep(Duration::from_millis(1)).await;
            let mut got = Vec::new();
            while let Either::Left(received) = race(inbox.recv_from(), std::future::ready(())).await
            {
                let (bytes, sender) = received.unwrap();
                assert_eq!(sender, from);
                got.push(bytes[0]);
            }
            assert!(got.windows(2).any(|w| w[0] > w[1]), "some overtake");
            let distinct: BTreeSet<u8> = got.iter().copied().collect();
            assert!(distinct.len() < 100, "some are lost");
            assert!(got.len() > distinct.len(), "some are doubled");
        });
    }

    use outrider_core::env::{Either, race};
}

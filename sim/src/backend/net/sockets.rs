//! The network as processes see it: their sockets, and their ends of streams.

use super::super::said::{datagram, frames};
use super::super::{Host, Life, Sim};
use super::{Flying, Link, Pipe, SimNet, Socket, Sockets};
use bytes::Bytes;
use outrider_core::env::{
    Datagram, Duration, Entropy, Listener, LocalBoxFuture, NetError, Network, Signal, Stream,
    StreamReader, StreamWriter,
};
use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::{Rc, Weak};

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
    socket: Rc<Socket<(Bytes, SocketAddrV4)>>,
    addr: SocketAddrV4,
}

impl Drop for DatagramHandle {
    fn drop(&mut self) {
        self.net.datagrams.borrow_mut().remove(&self.addr);
    }
}

impl Datagram for DatagramHandle {
    fn send_to(&self, bytes: Bytes, to: SocketAddrV4) -> LocalBoxFuture<'_, Result<(), NetError>> {
        let (net, from) = (&self.net, self.addr);
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
                    socket.queue.borrow_mut().push_back((bytes, from));
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
                .wait_for(move || socket.queue.borrow_mut().pop_front().map(Ok)),
        )
    }
}

struct ListenHandle {
    net: Rc<SimNet>,
    socket: Rc<Socket<Stream>>,
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
                .wait_for(move || socket.queue.borrow_mut().pop_front().map(Ok)),
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

    /// A new socket at this address.
    fn socket<T>(
        &self,
        sockets: &Sockets<T>,
        addr: SocketAddrV4,
    ) -> Result<Rc<Socket<T>>, NetError> {
        let old = sockets.borrow().get(&addr).and_then(Weak::upgrade);
        if old.is_some_and(|old| old.life.is_alive()) {
            return Err(NetError::AddrInUse(addr));
        }
        let socket = Rc::new(Socket {
            life: Rc::clone(&self.life),
            queue: RefCell::default(),
            signal: Signal::default(),
        });
        sockets.borrow_mut().insert(addr, Rc::downgrade(&socket));
        Ok(socket)
    }
}

impl Network for NodeNet {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        let addr = self.bind(addr);
        let socket = match self.socket(&self.net.datagrams, addr) {
            Ok(socket) => socket,
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
        let handle: Rc<dyn Datagram> = Rc::new(DatagramHandle {
            net: Rc::clone(&self.net),
            socket,
            addr,
        });
        Box::pin(std::future::ready(Ok(handle)))
    }

    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        let addr = self.bind(addr);
        let socket = match self.socket(&self.net.listeners, addr) {
            Ok(socket) => socket,
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
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
            listener.queue.borrow_mut().push_back(accepted);
            listener.signal.wake_all();
            Ok(end(&back, &there, local, addr))
        })
    }
}

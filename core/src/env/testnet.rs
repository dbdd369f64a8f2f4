//! A network in memory for tests of one node: streams and datagrams between
//! addresses, delivered at once and in order. Faults are the simulator's work.

use super::{
    Datagram, Duration, Listener, LocalBoxFuture, NetError, Network, Signal, Stream, StreamReader,
    StreamWriter,
};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV4;
use std::rc::{Rc, Weak};

type Received = (Bytes, SocketAddrV4);

/// Everything that is bound.
#[derive(Default)]
pub struct TestNet {
    listeners: RefCell<BTreeMap<SocketAddrV4, Weak<Queue<Stream>>>>,
    sockets: RefCell<BTreeMap<SocketAddrV4, Weak<Queue<Received>>>>,
    next_port: Cell<u16>,
}

/// What arrives somewhere; closed when its sender is gone.
struct Queue<T> {
    items: RefCell<VecDeque<T>>,
    closed: Cell<bool>,
    changed: Signal,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            items: RefCell::default(),
            closed: Cell::new(false),
            changed: Signal::default(),
        }
    }
}

impl<T> Queue<T> {
    fn push(&self, item: T) {
        self.items.borrow_mut().push_back(item);
        self.changed.wake_all();
    }

    fn close(&self) {
        self.closed.set(true);
        self.changed.wake_all();
    }

    /// The next item; `None` once it is closed and empty.
    async fn pop(&self) -> Option<T> {
        let next = || match self.items.borrow_mut().pop_front() {
            Some(item) => Some(Some(item)),
            None => self.closed.get().then_some(None),
        };
        self.changed.wait_for(next).await
    }
}

struct Reader(Rc<Queue<Bytes>>);

impl StreamReader for Reader {
    fn read(&mut self) -> LocalBoxFuture<'_, Result<Bytes, NetError>> {
        Box::pin(async { Ok(self.0.pop().await.unwrap_or_default()) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Writer(Rc<Queue<Bytes>>);

impl StreamWriter for Writer {
    fn write(&mut self, bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async move {
            if self.0.closed.get() {
                return Err(NetError::Reset);
            }
            if !bytes.is_empty() {
                self.0.push(bytes);
            }
            Ok(())
        })
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>> {
        self.0.close();
        Box::pin(async { Ok(()) })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Listening {
    net: Rc<TestNet>,
    addr: SocketAddrV4,
    queue: Rc<Queue<Stream>>,
}

impl Listener for Listening {
    fn accept(&mut self) -> LocalBoxFuture<'_, Result<Stream, NetError>> {
        Box::pin(async { self.queue.pop().await.ok_or(NetError::Reset) })
    }

    fn local_addr(&self) -> SocketAddrV4 {
        self.addr
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.net.listeners.borrow_mut().remove(&self.addr);
    }
}

struct Socket {
    net: Rc<TestNet>,
    addr: SocketAddrV4,
    queue: Rc<Queue<Received>>,
}

impl Datagram for Socket {
    fn send_to(&self, bytes: Bytes, to: SocketAddrV4) -> LocalBoxFuture<'_, Result<(), NetError>> {
        let target = self.net.sockets.borrow().get(&to).and_then(Weak::upgrade);
        if let Some(queue) = target {
            queue.push((bytes, self.addr));
        }
        Box::pin(async { Ok(()) })
    }

    fn recv_from(&self) -> LocalBoxFuture<'_, Result<Received, NetError>> {
        Box::pin(async { self.queue.pop().await.ok_or(NetError::Reset) })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.net.sockets.borrow_mut().remove(&self.addr);
    }
}

/// A node's handle on the network.
pub struct TestNetHandle(pub Rc<TestNet>);

impl Network for TestNetHandle {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        let net = self.0.clone();
        Box::pin(async move {
            if net.sockets.borrow().contains_key(&addr) {
                return Err(NetError::AddrInUse(addr));
            }
            let queue = Rc::new(Queue::default());
            net.sockets.borrow_mut().insert(addr, Rc::downgrade(&queue));
            Ok(Rc::new(Socket { net, addr, queue }) as Rc<dyn Datagram>)
        })
    }

    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        let net = self.0.clone();
        Box::pin(async move {
            if net.listeners.borrow().contains_key(&addr) {
                return Err(NetError::AddrInUse(addr));
            }
            let queue = Rc::new(Queue::default());
            net.listeners
                .borrow_mut()
                .insert(addr, Rc::downgrade(&queue));
            Ok(Box::new(Listening { net, addr, queue }) as Box<dyn Listener>)
        })
    }

    fn connect(
        &self,
        addr: SocketAddrV4,
        _keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        let net = self.0.clone();
        Box::pin(async move {
            let listener = net.listeners.borrow().get(&addr).and_then(Weak::upgrade);
            let Some(listener) = listener else {
                return Err(NetError::Refused(addr));
            };
            let port = 40_000 + net.next_port.get();
            net.next_port.set(net.next_port.get() + 1);
            let own = SocketAddrV4::new(*addr.ip(), port);
            let (up, down) = (Rc::new(Queue::default()), Rc::new(Queue::default()));
            let end = |read: &Rc<Queue<Bytes>>, write: &Rc<Queue<Bytes>>, local, peer| Stream {
                reader: Box::new(Reader(read.clone())),
                writer: Box::new(Writer(write.clone())),
                local,
                peer,
            };
            listener.push(end(&up, &down, addr, own));
            Ok(end(&down, &up, own, addr))
        })
    }
}

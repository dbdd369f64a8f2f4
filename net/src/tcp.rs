//! The operating system's sockets, on a reactor thread shared by all actors of the
//! process, with the options of spec 08 section 5.

use crate::transport::{Connected, Connecting, Transport, TransportNetwork};
use outrider_core::env::{Duration, LocalBoxFuture};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::future::Future;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 255;
/// Probes that may stay unanswered on an idle connection, one each second.
const KEEPALIVE_PROBES: u32 = 3;
/// Bytes of datagrams that may wait to be received.
const DATAGRAM_BUFFER: usize = 1 << 20;
/// Pause after an accept that failed for want of memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Network of one actor over the operating system's sockets.
pub type RealNetwork = TransportNetwork<Tcp>;

/// The reactor thread. It ends when this is dropped; sockets fail from then on.
#[derive(Debug)]
pub struct NetThread {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl NetThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system gives no thread or no reactor.
    pub fn start() -> io::Result<NetThread> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("outrider-net".into())
            .spawn(move || {
                // Ends when the sender is used or dropped.
                let _ = runtime.block_on(stopped);
            })?;
        Ok(NetThread {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Sockets for an actor. `accept_keepalive` is the limit of silence on accepted
    /// connections (option tcp_keepalive_timeout_ms of the own mount).
    pub fn sockets(&self, accept_keepalive: Duration) -> Tcp {
        Tcp {
            reactor: self.handle.clone(),
            accept_keepalive,
        }
    }
}

impl Drop for NetThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A reactor that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// The operating system's sockets. Crosses threads; each actor makes its own
/// [`RealNetwork`] of it.
#[derive(Clone, Debug)]
pub struct Tcp {
    reactor: Handle,
    accept_keepalive: Duration,
}

/// Polls a future where sockets register with the reactor.
struct Entered<F> {
    reactor: Handle,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Entered<F> {
    type Output = F::Output;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        let _entered = this.reactor.enter();
        this.future.as_mut().poll(cx)
    }
}

impl Tcp {
    /// The network of the calling actor.
    pub fn network(&self) -> RealNetwork {
        TransportNetwork::new(self.clone())
    }

    fn entered<'a, F>(&self, future: F) -> LocalBoxFuture<'a, F::Output>
    where
        F: Future + 'a,
    {
        Box::pin(Entered {
            reactor: self.reactor.clone(),
            future: Box::pin(future),
        })
    }
}

/// Sets the options of a connected socket for a limit of silence.
fn set_options(socket: &SockRef<'_>, keepalive: Duration) -> io::Result<()> {
    let probes = Duration::from_secs(u64::from(KEEPALIVE_PROBES));
    let idle = Duration::from_secs(keepalive.as_secs().saturating_sub(probes.as_secs()).max(1));
    let params = TcpKeepalive::new()
        .with_time(idle)
        .with_interval(Duration::from_secs(1))
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&params)?;
    socket.set_tcp_user_timeout(Some(keepalive))?;
    socket.set_tcp_nodelay(true)
}

fn split(stream: TcpStream) -> io::Result<Connected<OwnedReadHalf, OwnedWriteHalf>> {
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    let (reader, writer) = stream.into_split();
    Ok(Connected {
        reader,
        writer,
        local,
        peer,
    })
}

/// Whether an accept may be tried again, and whether only after a pause.
fn accept_again(error: &io::Error) -> Option<bool> {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = 105;
    const ENOMEM: i32 = 12;
    match error.kind() {
        io::ErrorKind::ConnectionAborted
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::Interrupted => Some(false),
        _ => match error.raw_os_error() {
            Some(ENFILE | EMFILE | ENOBUFS | ENOMEM) => Some(true),
            _ => None,
        },
    }
}

impl Transport for Tcp {
    type Reader = OwnedReadHalf;
    type Writer = OwnedWriteHalf;
    type Listener = TcpListener;
    type Socket = UdpSocket;

    fn connect(&self, addr: SocketAddrV4, keepalive: Duration) -> Connecting<'static, Self> {
        self.entered(async move {
            let socket = TcpSocket::new_v4()?;
            set_options(&SockRef::from(&socket), keepalive)?;
            split(socket.connect(SocketAddr::V4(addr)).await?)
        })
    }

    fn listen(&self, addr: SocketAddrV4) -> LocalBoxFuture<'static, io::Result<TcpListener>> {
        self.entered(async move {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            socket.set_reuse_address(true)?;
            socket.bind(&addr.into())?;
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        })
    }

    fn listener_addr(listener: &TcpListener) -> io::Result<SocketAddr> {
        listener.local_addr()
    }

    fn accept<'a>(&'a self, listener: &'a TcpListener) -> Connecting<'a, Self> {
        self.entered(async move {
            loop {
                let accepted = listener.accept().await.and_then(|(stream, _)| {
                    set_options(&SockRef::from(&stream), self.accept_keepalive)?;
                    split(stream)
                });
                let error = match accepted {
                    Ok(connected) => return Ok(connected),
                    // A connection that died between accept and here.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => continue,
                    Err(error) => error,
                };
                match accept_again(&error) {
                    None => return Err(error),
                    Some(false) => {}
                    Some(true) => {
                        tracing::warn!(%error, "can not accept a connection now");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        })
    }

    fn bind(&self, addr: SocketAddrV4) -> LocalBoxFuture<'static, io::Result<UdpSocket>> {
        self.entered(async move {
            let socket = std::net::UdpSocket::bind(addr)?;
            socket.set_nonblocking(true)?;
            // Room for heartbeats among a flood; the system may give less.
            let _ = SockRef::from(&socket).set_recv_buffer_size(DATAGRAM_BUFFER);
            UdpSocket::from_std(socket)
        })
    }

    fn send_to<'a>(
        socket: &'a UdpSocket,
        bytes: &'a [u8],
        to: SocketAddrV4,
    ) -> LocalBoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            socket.send_to(bytes, SocketAddr::V4(to)).await?;
            Ok(())
        })
    }

    fn recv_from<'a>(
        socket: &'a UdpSocket,
        buf: &'a mut [u8],
    ) -> LocalBoxFuture<'a, io::Result<(usize, SocketAddr)>> {
        Box::pin(socket.recv_from(buf))
    }
}

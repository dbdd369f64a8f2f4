//! The network seam over any sockets that have tokio's traits: the operating
//! system's, or a simulated network's for tests.

use bytes::{Bytes, BytesMut};
use outrider_core::env::{
    Datagram, Duration, Listener, LocalBoxFuture, NetError, Network, Stream, StreamReader,
    StreamWriter,
};
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::rc::Rc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most bytes read in one call.
const READ_CHUNK: usize = 64 << 10;
/// Longest datagram that is received whole; quorum's have 32 bytes.
const DATAGRAM_MAX: usize = 2048;

/// A connected socket, split.
pub struct Connected<R, W> {
    /// Reading half.
    pub reader: R,
    /// Writing half. Shutting it down is a half close.
    pub writer: W,
    /// Own address.
    pub local: SocketAddr,
    /// The peer's address.
    pub peer: SocketAddr,
}

/// Future of a connection on transport `T`.
pub type Connecting<'a, T> =
    LocalBoxFuture<'a, io::Result<Connected<<T as Transport>::Reader, <T as Transport>::Writer>>>;

/// A family of sockets. Futures may be dropped at any time.
pub trait Transport: 'static {
    /// Reading half of a stream.
    type Reader: AsyncRead + Unpin + 'static;
    /// Writing half of a stream.
    type Writer: AsyncWrite + Unpin + 'static;
    /// A listening socket.
    type Listener: 'static;
    /// A datagram socket.
    type Socket: 'static;

    /// Connects a stream, with the options for this limit of silence.
    fn connect(&self, addr: SocketAddrV4, keepalive: Duration) -> Connecting<'static, Self>
    where
        Self: Sized;

    /// Listens for streams.
    fn listen(&self, addr: SocketAddrV4) -> LocalBoxFuture<'static, io::Result<Self::Listener>>;

    /// Address of a listening socket.
    ///
    /// # Errors
    /// If the system does not tell.
    fn listener_addr(listener: &Self::Listener) -> io::Result<SocketAddr>;

    /// The next connection of a listening socket.
    fn accept<'a>(&'a self, listener: &'a Self::Listener) -> Connecting<'a, Self>
    where
        Self: Sized;

    /// Binds a datagram socket.
    fn bind(&self, addr: SocketAddrV4) -> LocalBoxFuture<'static, io::Result<Self::Socket>>;

    /// Sends a datagram; it may be lost.
    fn send_to<'a>(
        socket: &'a Self::Socket,
        bytes: &'a [u8],
        to: SocketAddrV4,
    ) -> LocalBoxFuture<'a, io::Result<()>>;

    /// Receives a datagram.
    fn recv_from<'a>(
        socket: &'a Self::Socket,
        buf: &'a mut [u8],
    ) -> LocalBoxFuture<'a, io::Result<(usize, SocketAddr)>>;
}

/// [`Network`] over a transport, for one actor.
pub struct TransportNetwork<T> {
    transport: Rc<T>,
}

impl<T: Transport> TransportNetwork<T> {
    /// The network of one actor.
    pub fn new(transport: T) -> Self {
        Self {
            transport: Rc::new(transport),
        }
    }
}

/// What a system error means to core.
fn net_error(error: &io::Error, addr: Option<SocketAddrV4>) -> NetError {
    use io::ErrorKind as Kind;
    match (error.kind(), addr) {
        (Kind::ConnectionRefused, Some(addr)) => NetError::Refused(addr),
        (Kind::AddrInUse, Some(addr)) => NetError::AddrInUse(addr),
        (
            Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::NotConnected
            | Kind::UnexpectedEof,
            _,
        ) => NetError::Reset,
        (Kind::TimedOut, _) => NetError::TimedOut,
        (_, Some(addr)) => NetError::Other(format!("{addr}: {error}")),
        (_, None) => NetError::Other(error.to_string()),
    }
}

fn v4(addr: SocketAddr) -> Result<SocketAddrV4, NetError> {
    match addr {
        SocketAddr::V4(addr) => Ok(addr),
        SocketAddr::V6(addr) => Err(NetError::Other(format!("{addr} is no IPv4 address"))),
    }
}

struct Reader<R> {
    socket: R,
    buf: BytesMut,
}

impl<R: AsyncRead + Unpin> StreamReader for Reader<R> {
    fn read(&mut self) -> LocalBoxFuture<'_, Result<Bytes, NetError>> {
        Box::pin(async move {
            self.buf.reserve(READ_CHUNK);
            // `read_buf` is cancel safe: dropped, it has read nothing.
            let read = self.socket.read_buf(&mut self.buf).await;
            read.map_err(|error| net_error(&error, None))?;
            Ok(self.buf.split().freeze())
        })
    }
}

struct Writer<W> {
    socket: W,
}

impl<W: AsyncWrite + Unpin> StreamWriter for Writer<W> {
    fn write(&mut self, bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async move {
            let written = self.socket.write_all(&bytes).await;
            written.map_err(|error| net_error(&error, None))
        })
    }
    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async move {
            let shut = self.socket.shutdown().await;
            shut.map_err(|error| net_error(&error, None))
        })
    }
}

fn stream<R, W>(connected: Connected<R, W>) -> Result<Stream, NetError>
where
    R: AsyncRead + Unpin + 'static,
    W: AsyncWrite + Unpin + 'static,
{
    Ok(Stream {
        local: v4(connected.local)?,
        peer: v4(connected.peer)?,
        reader: Box::new(Reader {
            socket: connected.reader,
            buf: BytesMut::new(),
        }),
        writer: Box::new(Writer {
            socket: connected.writer,
        }),
    })
}

struct Accepting<T: Transport> {
    transport: Rc<T>,
    socket: T::Listener,
    addr: SocketAddrV4,
}

impl<T: Transport> Listener for Accepting<T> {
    fn accept(&mut self) -> LocalBoxFuture<'_, Result<Stream, NetError>> {
        Box::pin(async move {
            let accepted = self.transport.accept(&self.socket).await;
            stream(accepted.map_err(|error| net_error(&error, None))?)
        })
    }
    fn local_addr(&self) -> SocketAddrV4 {
        self.addr
    }
}

struct Socket<T: Transport> {
    socket: T::Socket,
}

impl<T: Transport> Datagram for Socket<T> {
    fn send_to(&self, bytes: Bytes, to: SocketAddrV4) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async move {
            let sent = T::send_to(&self.socket, &bytes, to).await;
            sent.map_err(|error| net_error(&error, None))
        })
    }
    fn recv_from(&self) -> LocalBoxFuture<'_, Result<(Bytes, SocketAddrV4), NetError>> {
        Box::pin(async move {
            let mut buf = [0; DATAGRAM_MAX];
            let received = T::recv_from(&self.socket, &mut buf).await;
            let (len, from) = received.map_err(|error| net_error(&error, None))?;
            Ok((Bytes::copy_from_slice(&buf[..len]), v4(from)?))
        })
    }
}

impl<T: Transport> Network for TransportNetwork<T> {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        let binding = self.transport.bind(addr);
        Box::pin(async move {
            let bound = binding.await;
            let socket = bound.map_err(|error| net_error(&error, Some(addr)))?;
            let socket: Rc<dyn Datagram> = Rc::new(Socket::<T> { socket });
            Ok(socket)
        })
    }

    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        let transport = self.transport.clone();
        Box::pin(async move {
            let failed = |error: io::Error| net_error(&error, Some(addr));
            let socket = transport.listen(addr).await.map_err(failed)?;
            let addr = v4(T::listener_addr(&socket).map_err(failed)?)?;
            let listener: Box<dyn Listener> = Box::new(Accepting {
                transport,
                socket,
                addr,
            });
            Ok(listener)
        })
    }

    fn connect(
        &self,
        addr: SocketAddrV4,
        keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        let connecting = self.transport.connect(addr, keepalive);
        Box::pin(async move {
            let connected = connecting.await;
            stream(connected.map_err(|error| net_error(&error, Some(addr)))?)
        })
    }
}

//! The network seam: datagrams for quorum, byte streams for everything else.
//!
//! A stream is chunks of bytes without message boundaries: framing is the
//! `wire` module's work, so a simulator may cut a chunk at any byte.

use super::LocalBoxFuture;
use bytes::Bytes;
use std::net::SocketAddrV4;
use std::rc::Rc;
use thiserror::Error;

/// Why a network call failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NetError {
    /// Nobody listens there.
    #[error("connection to {0} refused")]
    Refused(SocketAddrV4),
    /// The peer or the network dropped the connection.
    #[error("connection reset")]
    Reset,
    /// No answer within the keepalive timeout.
    #[error("connection timed out")]
    TimedOut,
    /// The address is already bound.
    #[error("address {0} is in use")]
    AddrInUse(SocketAddrV4),
    /// The peer did not prove that it has the cluster key.
    #[error("{0}")]
    Untrusted(&'static str),
    /// Anything else the system said.
    #[error("network error: {0}")]
    Other(String),
}

/// Reading half of a stream.
pub trait StreamReader {
    /// The next bytes, at least one; an empty result is the peer's half close.
    /// Cancel safe: dropping the future loses nothing.
    fn read(&mut self) -> LocalBoxFuture<'_, Result<Bytes, NetError>>;
}

/// Writing half of a stream. Dropping both halves closes the connection.
pub trait StreamWriter {
    /// Hands bytes over in order; completes when the transport took them.
    fn write(&mut self, bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>>;
    /// Half close: the peer reads an end of file.
    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>>;
}

/// A connected stream.
pub struct Stream {
    /// Reading half.
    pub reader: Box<dyn StreamReader>,
    /// Writing half.
    pub writer: Box<dyn StreamWriter>,
    /// Own address.
    pub local: SocketAddrV4,
    /// The peer's address.
    pub peer: SocketAddrV4,
}

/// A listening socket. Dropping it closes it.
pub trait Listener {
    /// The next connection. Cancel safe.
    fn accept(&mut self) -> LocalBoxFuture<'_, Result<Stream, NetError>>;
    /// The bound address.
    fn local_addr(&self) -> SocketAddrV4;
}

/// A datagram socket. Dropping the last handle closes it.
pub trait Datagram {
    /// Sends one datagram; loss is silent.
    fn send_to(&self, bytes: Bytes, to: SocketAddrV4) -> LocalBoxFuture<'_, Result<(), NetError>>;
    /// The next datagram and its sender. Cancel safe.
    fn recv_from(&self) -> LocalBoxFuture<'_, Result<(Bytes, SocketAddrV4), NetError>>;
}

/// One node's network.
pub trait Network {
    /// Binds a datagram socket.
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>>;
    /// Listens for streams. Port 0 lets the system choose.
    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>>;
    /// Connects a stream. `keepalive` bounds how long silence or unacknowledged
    /// data is tolerated before the stream fails with [`NetError::TimedOut`].
    fn connect(
        &self,
        addr: SocketAddrV4,
        keepalive: super::Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>>;
}

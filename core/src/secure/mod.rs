//! The cluster key: mutual authentication and encryption of every connection,
//! authenticated quorum datagrams.
//!
//! The original trusts its network, and so does a volume without a key: that is the
//! choice for clusters with original nodes in them. With a key, [`secured`] wraps
//! the network seam of an actor, and everything above it stays as it is:
//!
//! * [`stream`]: connections, by the Noise handshake NNpsk0;
//! * [`datagram`]: quorum messages, encrypted, each accepted once;
//! * [`key`]: the key, its file, and what of it may be known.
//!
//! All randomness comes through the entropy seam and all time through the clock, so
//! the simulator runs the same code and replays it.
//!
//! What it protects against: whoever can reach the ports, read, change, repeat or
//! hold back packets, but has no key. Such a one can learn nothing but who talks to
//! whom when, and can do no more than cut the network can. What it does not protect
//! against: a holder of the key, and whoever can write to the shared devices.

pub mod datagram;
pub mod key;
pub mod stream;

pub use key::{ClusterKey, KeyError, KeyId};

use crate::env::{
    Clock, Datagram, Duration, Entropy, Env, Listener, LocalBoxFuture, NetError, Network, Spawner,
    Stream,
};
use std::net::SocketAddrV4;
use std::rc::Rc;

/// The actor's seams with `key` on its network; without a key, as they are.
pub fn secured(env: &Env, key: Option<&ClusterKey>) -> Env {
    let Some(key) = key else {
        return env.clone();
    };
    Env {
        net: Rc::new(SecureNetwork {
            seams: Seams::of(env),
            key: key.clone(),
        }),
        ..env.clone()
    }
}

/// The seams that the wrapper needs. Not the whole [`Env`]: its network will be
/// the wrapper itself.
#[derive(Clone)]
pub(crate) struct Seams {
    net: Rc<dyn Network>,
    clock: Rc<dyn Clock>,
    entropy: Rc<dyn Entropy>,
    spawner: Rc<dyn Spawner>,
}

impl Seams {
    fn of(env: &Env) -> Self {
        Self {
            net: env.net.clone(),
            clock: env.clock.clone(),
            entropy: env.entropy.clone(),
            spawner: env.spawner.clone(),
        }
    }
}

/// A network on which only holders of the key are heard.
struct SecureNetwork {
    seams: Seams,
    key: ClusterKey,
}

struct SecureListener {
    seams: Seams,
    key: ClusterKey,
    inner: Box<dyn Listener>,
}

impl Listener for SecureListener {
    fn accept(&mut self) -> LocalBoxFuture<'_, Result<Stream, NetError>> {
        Box::pin(async {
            let stream = self.inner.accept().await?;
            // The handshake runs by itself: a slow peer holds up nobody else.
            let side = stream::Side::Accepted;
            Ok(stream::secure(&self.seams, &self.key, stream, side))
        })
    }

    fn local_addr(&self) -> SocketAddrV4 {
        self.inner.local_addr()
    }
}

impl Network for SecureNetwork {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        let (seams, key) = (self.seams.clone(), self.key.clone());
        Box::pin(async move {
            let socket = seams.net.bind_datagram(addr).await?;
            Ok(datagram::secure(&seams, &key, socket, addr))
        })
    }

    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        let (seams, key) = (self.seams.clone(), self.key.clone());
        Box::pin(async move {
            let inner = seams.net.listen(addr).await?;
            let listener: Box<dyn Listener> = Box::new(SecureListener { seams, key, inner });
            Ok(listener)
        })
    }

    fn connect(
        &self,
        addr: SocketAddrV4,
        keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        let (seams, key) = (self.seams.clone(), self.key.clone());
        Box::pin(async move {
            let stream = seams.net.connect(addr, keepalive).await?;
            let side = stream::Side::Connected;
            Ok(stream::secure(&seams, &key, stream, side))
        })
    }
}

#[cfg(test)]
mod tests;

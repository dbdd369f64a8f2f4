//! Runs a future on the calling thread.
//!
//! The tools' devices do their work inside the poll, so nothing ever
//! has to wake anybody; a future that is not ready is simply polled again.

use outrider_core::env::{Entropy, WallTime};
use std::cell::RefCell;
use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{SystemTime, UNIX_EPOCH};

/// Polls `future` until it is done.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return value;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The wall clock; a time before 1970 reads as 1970.
pub fn wall_now() -> WallTime {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    WallTime {
        sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nsec: since.subsec_nanos(),
    }
}

/// Random numbers of the system.
#[derive(Debug)]
pub struct SystemEntropy(RefCell<File>);

impl SystemEntropy {
    /// Opens the system's source.
    ///
    /// # Errors
    /// If `/dev/urandom` can not be opened.
    pub fn new() -> std::io::Result<Self> {
        File::open("/dev/urandom").map(|f| Self(RefCell::new(f)))
    }
}

impl Entropy for SystemEntropy {
    fn next_u64(&self) -> u64 {
        let mut bytes = [0; 8];
        let read = self.0.borrow_mut().read_exact(&mut bytes);
        read.expect("/dev/urandom gives as many bytes as are asked for");
        u64::from_le_bytes(bytes)
    }
}

//! Waiting within one actor. Across actors use `tokio::sync` channels, but
//! for [`watch`](super::watch): they need no runtime and wake in the order of arrival.

pub use tokio::sync::Notify;

use std::cell::Cell;
use std::rc::Rc;

/// A value that tasks of one actor wait on to change: state plus a wake-up.
#[derive(Debug, Default)]
pub struct Signal {
    notify: Notify,
}

impl Signal {
    /// Wakes every task that waits now.
    pub fn wake_all(&self) {
        self.notify.notify_waiters();
    }

    /// Waits until `ready` gives a value, asking again after each wake-up.
    pub async fn wait_for<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(value) = ready() {
                return value;
            }
            let notified = self.notify.notified();
            // No await lies between the test and this registration on a
            // single-threaded actor, so no wake-up is lost.
            notified.await;
        }
    }
}

/// A door that opens once: cancellation, or "started".
#[derive(Clone, Debug, Default)]
pub struct Gate {
    inner: Rc<(Cell<bool>, Signal)>,
}

impl Gate {
    /// Opens the gate; later waits return at once.
    pub fn open(&self) {
        self.inner.0.set(true);
        self.inner.1.wake_all();
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.inner.0.get()
    }

    /// Whether both are the same gate.
    pub fn same(&self, other: &Gate) -> bool {
        Rc::ptr_eq(&self.inner, &other.inner)
    }

    /// Waits until it is open.
    pub async fn wait(&self) {
        self.inner.1.wait_for(|| self.is_open().then_some(())).await;
    }
}

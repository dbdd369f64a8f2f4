//! A value that one actor changes and others look at and wait for, across threads.
//!
//! As `tokio::sync::watch`, whose waiters wake in an order drawn by a generator that all
//! worlds of a process share as soon as any crate switches tokio's `rt` feature on: two
//! waiters are then enough for a seed to go two ways. These wake in the order in which
//! they came.
//!
//! What can go wrong: a value borrowed for long. The one who changes it waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

#[derive(Debug, Default)]
struct Shared<T> {
    value: Mutex<T>,
    /// One more with each change.
    version: AtomicU64,
    closed: AtomicBool,
    changed: Notify,
}

impl<T> Shared<T> {
    fn value(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nobody is left who could change the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nobody is left who could change it")]
pub struct Closed;

/// Changes the value.
#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

/// Looks at the value and waits for changes.
#[derive(Debug)]
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

/// Both ends of a value that begins as `value`.
pub fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
    let sender = Sender::new(value);
    let receiver = sender.subscribe();
    (sender, receiver)
}

impl<T> Sender<T> {
    /// One end; the others are made by [`Sender::subscribe`].
    pub fn new(value: T) -> Self {
        Self(Arc::new(Shared {
            value: Mutex::new(value),
            version: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            changed: Notify::new(),
        }))
    }

    /// Replaces the value; gives the old one.
    pub fn send_replace(&self, value: T) -> T {
        let mut new = value;
        self.send_modify(|old| std::mem::swap(old, &mut new));
        new
    }

    /// Changes the value.
    pub fn send_modify(&self, change: impl FnOnce(&mut T)) {
        self.send_if_modified(|value| {
            change(value);
            true
        });
    }

    /// Changes the value if `change` says that it did; gives what that says.
    pub fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let mut value = self.0.value();
        let changed = change(&mut value);
        if changed {
            self.0.version.fetch_add(1, Ordering::SeqCst);
        }
        drop(value);
        if changed {
            self.0.changed.notify_waiters();
        }
        changed
    }

    /// The value now.
    pub fn borrow(&self) -> MutexGuard<'_, T> {
        self.0.value()
    }

    /// A receiver that has seen the value as it is now.
    pub fn subscribe(&self) -> Receiver<T> {
        Receiver {
            seen: self.0.version.load(Ordering::SeqCst),
            shared: Arc::clone(&self.0),
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            seen: self.seen,
        }
    }
}

impl<T> Receiver<T> {
    /// The value now; a change that was not seen stays so.
    pub fn borrow(&self) -> MutexGuard<'_, T> {
        self.shared.value()
    }

    /// The value now, which counts as seen.
    pub fn borrow_and_update(&mut self) -> MutexGuard<'_, T> {
        let value = self.shared.value();
        self.seen = self.shared.version.load(Ordering::SeqCst);
        value
    }

    /// Whether nobody is left who could change the value.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::SeqCst)
    }

    /// Waits for a change that was not seen yet; then it is.
    ///
    /// # Errors
    /// If there is none, and nobody is left to make one.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        loop {
            // Registered before the look: a change in between wakes it.
            let mut notified = std::pin::pin!(self.shared.changed.notified());
            notified.as_mut().enable();
            let version = self.shared.version.load(Ordering::SeqCst);
            if version != self.seen {
                self.seen = version;
                return Ok(());
            }
            if self.is_closed() {
                return Err(Closed);
            }
            notified.await;
        }
    }

    /// Waits until the value is as `wanted`; gives a copy of it.
    ///
    /// # Errors
    /// If it is not, and nobody is left to change it.
    pub async fn wait_for(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Result<T, Closed>
    where
        T: Clone,
    {
        loop {
            {
                let value = self.borrow_and_update();
                if wanted(&value) {
                    return Ok(value.clone());
                }
            }
            self.changed().await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::testing::{TestWorld, block_on};
    use std::cell::RefCell;
    use std::rc::Rc;

    #[test]
    fn changes_are_seen_once_and_the_end_after_the_last_of_them() {
        block_on(async {
            let (sender, mut receiver) = channel(1);
            let mut other = receiver.clone();
            assert_eq!(sender.send_replace(2), 1);
            assert_eq!(receiver.changed().await, Ok(()));
            assert_eq!(*receiver.borrow(), 2);
            assert!(!sender.send_if_modified(|_| false));
            drop(sender);
            assert_eq!(receiver.changed().await, Err(Closed));
            assert_eq!(other.changed().await, Ok(()));
            assert_eq!(other.changed().await, Err(Closed));
            assert_eq!(other.wait_for(|value| *value == 2).await, Ok(2));
            assert!(other.wait_for(|value| *value == 3).await.is_err());
        });
    }

    #[test]
    fn waiters_wake_in_the_order_in_which_they_came() {
        let world = TestWorld::new(1, 1 << 20, 1 << 20);
        let env = world.env();
        let order: Rc<RefCell<Vec<u32>>> = Rc::default();
        let (sender, receiver) = channel(0);
        for waiter in 0..40 {
            let (mut receiver, order) = (receiver.clone(), order.clone());
            env.spawn("waiter", async move {
                let _ = receiver.wait_for(|value| *value == 1).await;
                order.borrow_mut().push(waiter);
            });
        }
        world.block_on(async {
            env.sleep(crate::env::Duration::from_millis(1)).await;
            sender.send_replace(1);
            env.sleep(crate::env::Duration::from_millis(1)).await;
        });
        assert_eq!(*order.borrow(), (0..40).collect::<Vec<_>>());
    }
}

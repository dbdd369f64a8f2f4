//! Wake-ups of an actor's thread: a queue of ready tasks, and an eventfd for
//! when the thread sleeps.
//!
//! What can go wrong: a lost wake-up. The thread announces its sleep, then looks
//! at the queue once more; a waker fills the queue, then looks for a sleeper.
//! One of them sees the other (both orders are sequentially consistent).

use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The shared end of one actor's loop.
#[derive(Debug)]
pub(crate) struct WakeQueue {
    ready: Mutex<Vec<usize>>,
    sleeping: AtomicBool,
    eventfd: OwnedFd,
}

impl WakeQueue {
    /// An empty queue.
    ///
    /// # Errors
    /// If the system has no file descriptor left.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            ready: Mutex::default(),
            sleeping: AtomicBool::new(false),
            // Blocking, so that a ring's read waits for the next wake-up.
            eventfd: eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    /// Queues a task and wakes the thread if it sleeps. Callable from any thread.
    pub(crate) fn push(&self, task: usize) {
        self.ready.lock().expect("the queue's lock").push(task);
        self.kick();
    }

    /// Wakes the thread if it sleeps.
    pub(crate) fn kick(&self) {
        if self.sleeping.load(Ordering::SeqCst) && self.sleeping.swap(false, Ordering::SeqCst) {
            // It can fail only when the counter is full, which is a wake-up too.
            let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
        }
    }

    /// Moves the ready tasks to `into`, in the order of their wake-ups.
    pub(crate) fn take(&self, into: &mut Vec<usize>) {
        into.append(&mut self.ready.lock().expect("the queue's lock"));
    }

    /// Announces sleep; false if there is something to do instead.
    pub(crate) fn try_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        if self.ready.lock().expect("the queue's lock").is_empty() {
            return true;
        }
        self.sleeping.store(false, Ordering::SeqCst);
        false
    }

    /// Ends the sleep.
    pub(crate) fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// The eventfd's number, for the ring.
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

impl AsFd for WakeQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

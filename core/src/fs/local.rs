//! Mutexes of this node, one per inode (spec 12 section 9). A cluster lock is
//! granted to the mount, not to a task, so it does not keep two tasks of one mount
//! apart; these do.
//!
//! They come right after the cluster locks of inode groups in the lock order, not
//! before them as the original's: a request of the kernel that holds pages must get
//! as far as its inode under the mode that the mount has, also while another task
//! waits for a higher one (spec 10 section 18). So whoever holds a mutex has all its
//! group locks, and never waits for another. Several are taken in ascending order.
//! Number 0 is no inode: it serialises renames between directories, and follows the
//! rename lock.
//!
//! What can go wrong: waiting for a group lock while holding one of these. A
//! revocation then waits for a task that waits for the mutex, whose holder waits
//! for the revocation.

use super::api::Ino;
use crate::env::HashMap;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// The number that serialises renames between directories.
pub const RENAME: Ino = 0;

#[derive(Debug, Default)]
struct Table {
    locks: RefCell<HashMap<Ino, Arc<RwLock<()>>>>,
}

/// All local mutexes of a mount.
#[derive(Clone, Debug, Default)]
pub struct LocalLocks {
    table: Rc<Table>,
}

#[derive(Debug)]
enum Held {
    Shared(#[allow(dead_code)] OwnedRwLockReadGuard<()>),
    Alone(#[allow(dead_code)] OwnedRwLockWriteGuard<()>),
}

/// One use of a local mutex; dropping it ends the use.
#[derive(Debug)]
pub struct LocalGuard {
    table: Rc<Table>,
    ino: Ino,
    held: Option<Held>,
}

impl LocalLocks {
    fn entry(&self, ino: Ino) -> Arc<RwLock<()>> {
        self.table
            .locks
            .borrow_mut()
            .entry(ino)
            .or_default()
            .clone()
    }

    fn guard(&self, ino: Ino, held: Held) -> LocalGuard {
        LocalGuard {
            table: self.table.clone(),
            ino,
            held: Some(held),
        }
    }

    /// Takes the inode together with other readers; first come, first served.
    pub async fn shared(&self, ino: Ino) -> LocalGuard {
        let lock = self.entry(ino);
        let held = match lock.clone().try_read_owned() {
            Ok(held) => held,
            Err(_) => lock.read_owned().await,
        };
        self.guard(ino, Held::Shared(held))
    }

    /// Takes the inode alone.
    pub async fn alone(&self, ino: Ino) -> LocalGuard {
        let lock = self.entry(ino);
        let held = match lock.clone().try_write_owned() {
            Ok(held) => held,
            Err(_) => lock.write_owned().await,
        };
        self.guard(ino, Held::Alone(held))
    }

    /// Takes the inode alone if nobody has it.
    pub fn try_alone(&self, ino: Ino) -> Option<LocalGuard> {
        let held = self.entry(ino).try_write_owned().ok()?;
        Some(self.guard(ino, Held::Alone(held)))
    }

    /// Takes several inodes alone, in ascending order; duplicates are taken once.
    pub async fn all_alone(&self, inos: &mut [Ino]) -> Vec<LocalGuard> {
        inos.sort_unstable();
        let mut guards: Vec<LocalGuard> = Vec::with_capacity(inos.len());
        for &ino in inos.iter() {
            if guards.last().is_none_or(|last| last.ino != ino) {
                guards.push(self.alone(ino).await);
            }
        }
        guards
    }

    /// Number of inodes that somebody has or waits for; 0 on an idle mount.
    pub fn in_use(&self) -> usize {
        self.table.locks.borrow().len()
    }
}

impl Drop for LocalGuard {
    fn drop(&mut self) {
        self.held = None;
        let mut locks = self.table.locks.borrow_mut();
        // One reference is the table's own: nobody has it and nobody waits.
        if locks
            .get(&self.ino)
            .is_some_and(|lock| Arc::strong_count(lock) == 1)
        {
            locks.remove(&self.ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        match poll(pin!(future)) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("would wait"),
        }
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        let locks = LocalLocks::default();
        let first = now(locks.shared(7));
        let second = now(locks.shared(7));
        let mut writer = pin!(locks.alone(7));
        assert!(poll(writer.as_mut()).is_pending());
        drop(first);
        assert!(poll(writer.as_mut()).is_pending());
        drop(second);
        let Poll::Ready(guard) = poll(writer.as_mut()) else {
            panic!("not admitted")
        };
        assert!(locks.try_alone(7).is_none());
        drop(guard);
        assert_eq!(locks.in_use(), 0, "idle entries are dropped");
    }

    #[test]
    fn a_waiting_writer_goes_before_later_readers() {
        let locks = LocalLocks::default();
        let reader = now(locks.shared(7));
        let mut writer = pin!(locks.alone(7));
        assert!(poll(writer.as_mut()).is_pending());
        let mut late = pin!(locks.shared(7));
        assert!(poll(late.as_mut()).is_pending());
        drop(reader);
        assert!(poll(late.as_mut()).is_pending());
        assert!(poll(writer.as_mut()).is_ready());
    }

    #[test]
    fn several_are_taken_in_order_and_once() {
        let locks = LocalLocks::default();
        let guards = now(locks.all_alone(&mut [9, RENAME, 3, 9]));
        let inos: Vec<Ino> = guards.iter().map(|g| g.ino).collect();
        assert_eq!(inos, [0, 3, 9]);
    }

    #[test]
    fn a_waiter_that_goes_away_leaves_nothing() {
        let locks = LocalLocks::default();
        let held = now(locks.alone(5));
        {
            let mut waiter = pin!(locks.shared(5));
            assert!(poll(waiter.as_mut()).is_pending());
        }
        drop(held);
        assert_eq!(locks.in_use(), 0);
    }
}

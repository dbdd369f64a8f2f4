//! A log in memory: one plain map of items, no transactions, and a fault at any
//! item operation that the test asks for. It has the face of `outrider_core::log`
//! as far as the filesystem layer uses it.

use crate::env::{DeviceError, LocalBoxFuture};
use crate::errno::Errno;
use crate::format::Key;
use crate::locks::LockGuard;
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use thiserror::Error;

#[derive(Clone, Debug, Error)]
pub enum LogError {
    #[error("item {0} exists")]
    Exists(Key),
    #[error("item {0} does not exist")]
    NotFound(Key),
    #[error("no metadata space left")]
    NoSpace,
    #[error("no data space left")]
    NoDataSpace,
    #[error("no data blocks left in this transaction")]
    NoData,
}

impl From<LogError> for Errno {
    fn from(error: LogError) -> Errno {
        match error {
            LogError::NoSpace | LogError::NoDataSpace => Errno::ENOSPC,
            LogError::NoData => Errno::ENOBUFS,
            LogError::Exists(_) | LogError::NotFound(_) => Errno::EIO,
        }
    }
}

pub trait DirtyData {
    fn start_writeback(&self);
    fn wait(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>>;
    fn needs_flush(&self) -> bool {
        true
    }
    fn flushed(&self, durable: bool) {
        let _ = durable;
    }
}

#[derive(Debug)]
pub struct Hold(Rc<Cell<u32>>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[derive(Debug, Default)]
pub struct Log {
    pub items: RefCell<BTreeMap<Key, Bytes>>,
    holders: Rc<Cell<u32>>,
    /// Seq of the open transaction.
    pub seq: Cell<u64>,
    /// Sum of what was added to the inode count.
    pub count: Cell<i64>,
    /// Item operations that succeed before one fails.
    pub fail_in: Cell<Option<u32>>,
}

type R<T> = Result<T, LogError>;

impl Log {
    fn enter(&self, guard: &LockGuard, key: &Key) -> R<()> {
        assert!(guard.covers(key), "{key} is not under {guard:?}");
        match self.fail_in.get() {
            Some(0) => {
                self.fail_in.set(None);
                Err(LogError::NoSpace)
            }
            Some(n) => {
                self.fail_in.set(Some(n - 1));
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub fn trans_seq(&self) -> u64 {
        self.seq.get()
    }

    pub async fn hold(&self, _allocating: bool) -> R<Hold> {
        self.holders.set(self.holders.get() + 1);
        Ok(Hold(self.holders.clone()))
    }

    pub async fn sync(&self) -> R<()> {
        self.seq.set(self.seq.get() + 1);
        Ok(())
    }

    pub fn register_dirty_data(&self, _: Rc<dyn DirtyData>) {}

    pub async fn lookup(&self, guard: &LockGuard, key: &Key) -> R<Option<Bytes>> {
        self.enter(guard, key)?;
        Ok(self.items.borrow().get(key).cloned())
    }

    pub async fn next(&self, guard: &LockGuard, key: &Key, last: &Key) -> R<Option<(Key, Bytes)>> {
        self.enter(guard, key)?;
        let last = guard.range().end.min(*last);
        if *key > last {
            return Ok(None);
        }
        let items = self.items.borrow();
        Ok(items
            .range(*key..=last)
            .next()
            .map(|(key, value)| (*key, value.clone())))
    }

    pub async fn next_hint(&self, key: &Key) -> R<Option<Key>> {
        Ok(self
            .items
            .borrow()
            .range(*key..)
            .next()
            .map(|(key, _)| *key))
    }

    /// Nobody else has a transaction.
    pub async fn get_last_seq(&self) -> R<u64> {
        Ok(self.seq.get() - 1)
    }

    pub async fn create(&self, _: &Hold, guard: &LockGuard, key: &Key, value: Bytes) -> R<()> {
        self.enter(guard, key)?;
        let old = self.items.borrow_mut().insert(*key, value);
        assert!(old.is_none(), "{key} exists");
        Ok(())
    }

    pub async fn update(&self, _: &Hold, guard: &LockGuard, key: &Key, value: Bytes) -> R<()> {
        self.enter(guard, key)?;
        let old = self.items.borrow_mut().insert(*key, value);
        assert!(old.is_some(), "{key} does not exist");
        Ok(())
    }

    pub async fn delete(&self, _: &Hold, guard: &LockGuard, key: &Key) -> R<()> {
        self.enter(guard, key)?;
        let old = self.items.borrow_mut().remove(key);
        assert!(old.is_some(), "{key} does not exist");
        Ok(())
    }

    pub async fn create_force(
        &self,
        _: &Hold,
        guard: &LockGuard,
        key: &Key,
        value: Bytes,
        _primary: Option<&LockGuard>,
    ) -> R<()> {
        self.enter(guard, key)?;
        self.items.borrow_mut().insert(*key, value);
        Ok(())
    }

    pub async fn delete_force(
        &self,
        _: &Hold,
        guard: &LockGuard,
        key: &Key,
        _primary: Option<&LockGuard>,
    ) -> R<()> {
        self.enter(guard, key)?;
        self.items.borrow_mut().remove(key);
        Ok(())
    }

    pub async fn delta(&self, _: &Hold, guard: &LockGuard, key: &Key, value: Bytes) -> R<()> {
        self.enter(guard, key)?;
        let word = |bytes: &[u8], at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
        };
        let mut items = self.items.borrow_mut();
        let old = items
            .remove(key)
            .unwrap_or_else(|| Bytes::from_static(&[0; 16]));
        let sum = [0, 8].map(|at| word(&old, at).wrapping_add(word(&value, at)));
        if sum != [0, 0] {
            items.insert(*key, sum.map(u64::to_le_bytes).concat().into());
        }
        Ok(())
    }

    pub fn inode_count_add(&self, _: &Hold, by: i64) {
        self.count.set(self.count.get() + by);
    }

    pub async fn alloc_data(&self, _: &Hold, _count: u64) -> R<(u64, u64)> {
        Err(LogError::NoDataSpace)
    }

    pub async fn free_data(&self, _: &Hold, _blkno: u64, _count: u64) -> R<()> {
        Ok(())
    }
}

//! A mount's items and its transactions (spec 04).

pub mod merge_worker;

use crate::env::{DeviceError, LocalBoxFuture};
use crate::errno::Errno;
use crate::format::Key;
use crate::locks::LockGuard;
use bytes::Bytes;
use thiserror::Error;

/// Why an item operation or a transaction failed.
#[derive(Clone, Debug, Error)]
pub enum LogError {
    /// An item that was to be created exists.
    #[error("item {0} exists")]
    Exists(Key),
    /// An item that was to be changed does not exist.
    #[error("item {0} does not exist")]
    NotFound(Key),
    /// The server has no more metadata blocks to give.
    #[error("no metadata space left")]
    NoSpace,
    /// This transaction has no more data blocks: leave it, and try again.
    #[error("the transaction's data blocks are used up")]
    NoData,
}

impl From<LogError> for Errno {
    fn from(error: LogError) -> Errno {
        match error {
            LogError::NoSpace => Errno::ENOSPC,
            LogError::NoData => Errno::ENOBUFS,
            LogError::Exists(_) | LogError::NotFound(_) => Errno::EIO,
        }
    }
}

/// File data that has to be on the device before a commit.
pub trait DirtyData {
    /// Starts writing all of it.
    fn start_writeback(&self);
    /// Completes when all that was dirty at the start is on the device.
    fn wait(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>>;
}

/// One use of the open transaction; dropping it ends the use.
#[derive(Debug)]
pub struct Hold(());

/// The items and the transaction of one mount.
#[derive(Debug, Default)]
pub struct Log(());

type R<T> = Result<T, LogError>;

#[allow(missing_docs)]
impl Log {
    pub fn trans_seq(&self) -> u64 {
        unreachable!("lands next")
    }
    pub async fn hold(&self, _allocating: bool) -> R<Hold> {
        unreachable!("lands next")
    }
    pub async fn sync(&self) -> R<()> {
        unreachable!("lands next")
    }
    pub async fn lookup(&self, _: &LockGuard, _: &Key) -> R<Option<Bytes>> {
        unreachable!("lands next")
    }
    pub async fn next(&self, _: &LockGuard, _: &Key, _last: &Key) -> R<Option<(Key, Bytes)>> {
        unreachable!("lands next")
    }
    pub async fn next_hint(&self, _: &Key) -> R<Option<Key>> {
        unreachable!("lands next")
    }
    pub async fn create(&self, _: &Hold, _: &LockGuard, _: &Key, _: Bytes) -> R<()> {
        unreachable!("lands next")
    }
    pub async fn update(&self, _: &Hold, _: &LockGuard, _: &Key, _: Bytes) -> R<()> {
        unreachable!("lands next")
    }
    pub async fn delete(&self, _: &Hold, _: &LockGuard, _: &Key) -> R<()> {
        unreachable!("lands next")
    }
    pub async fn create_force(
        &self,
        _: &Hold,
        _: &LockGuard,
        _: &Key,
        _: Bytes,
        _primary: Option<&LockGuard>,
    ) -> R<()> {
        unreachable!("lands next")
    }
    pub async fn delete_force(
        &self,
        _: &Hold,
        _: &LockGuard,
        _: &Key,
        _primary: Option<&LockGuard>,
    ) -> R<()> {
        unreachable!("lands next")
    }
    pub async fn delta(&self, _: &Hold, _: &LockGuard, _: &Key, _: Bytes) -> R<()> {
        unreachable!("lands next")
    }
    pub fn inode_count_add(&self, _: &Hold, _by: i64) {
        unreachable!("lands next")
    }
    pub async fn alloc_data(&self, _: &Hold, _count: u64) -> R<(u64, u64)> {
        unreachable!("lands next")
    }
    pub async fn free_data(&self, _: &Hold, _blkno: u64, _count: u64) -> R<()> {
        unreachable!("lands next")
    }
}

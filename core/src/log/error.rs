//! Errors of items and transactions.

use crate::alloc::AllocError;
use crate::block::BlockError;
use crate::btree::BtreeError;
use crate::env::DeviceError;
use crate::errno::Errno;
use crate::format::Key;
use crate::locks::{Mode, Scope};
use thiserror::Error;

/// Why an item operation, a transaction or a commit failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LogError {
    /// The item exists already (EEXIST).
    #[error("item {0} exists already")]
    Exists(Key),
    /// The item does not exist (ENOENT).
    #[error("item {0} does not exist")]
    NotFound(Key),
    /// The key is outside of the lock that was named (EINVAL, a programming error).
    #[error("item {key} is not covered by the lock of {scope:?}")]
    NotCovered {
        /// The key.
        key: Key,
        /// What the lock covers.
        scope: Scope,
    },
    /// The lock was taken in a mode that does not permit this (EINVAL, a programming error).
    #[error("an operation that needs mode {needed:?} was called under {had:?}")]
    WrongMode {
        /// What the operation needs.
        needed: Mode,
        /// How the lock was taken.
        had: Mode,
    },
    /// The value is longer than any item's may be (EINVAL).
    #[error("the value of item {key} has {len} bytes, the most is 896")]
    ValueTooLong {
        /// The key.
        key: Key,
        /// Bytes given.
        len: usize,
    },
    /// The stored value does not have the length that its kind has (EIO).
    #[error("the value of item {key} has {found} bytes, expected {expected}")]
    ValueLength {
        /// The key.
        key: Key,
        /// Bytes expected, or the most.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// A delta for a key that holds an ordinary item, or that never has deltas (EIO).
    #[error("item {0} does not take deltas")]
    NotDelta(Key),
    /// Metadata space is low: nothing may be added (ENOSPC).
    #[error("no metadata space is left")]
    NoSpace,
    /// The volume has no free data blocks (ENOSPC).
    #[error("no data space is left")]
    NoDataSpace,
    /// This transaction's data blocks are used up: release, hold again (which
    /// waits for a refill), try again. Never seen by users (ENOBUFS).
    #[error("no data blocks are left in this transaction")]
    NoData,
    /// The same roots were unreadable twice: blocks are corrupt (EIO).
    #[error("items around {key} are unreadable: {source}")]
    Corrupt {
        /// The key that was read.
        key: Key,
        /// What was wrong with a block.
        source: BtreeError,
    },
    /// A btree or block operation failed.
    #[error(transparent)]
    Btree(#[from] BtreeError),
    /// An allocation or a free failed.
    #[error(transparent)]
    Alloc(AllocError),
    /// File data could not be written or flushed.
    #[error("file data: {0}")]
    Data(DeviceError),
    /// The server answered a request with an error.
    #[error("the server answered {0}")]
    Server(Errno),
    /// The mount was cut off: everything not committed is lost (ENOLINK).
    #[error("the mount is severed from its cluster")]
    Severed,
    /// The mount is ending and takes no more changes (ESHUTDOWN).
    #[error("the mount is shutting down")]
    Shutdown,
}

impl LogError {
    /// The error number of the original for it.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Exists(_) => Errno::EEXIST,
            Self::NotFound(_) => Errno::ENOENT,
            Self::NotCovered { .. } | Self::WrongMode { .. } | Self::ValueTooLong { .. } => {
                Errno::EINVAL
            }
            Self::ValueLength { .. } | Self::NotDelta(_) | Self::Corrupt { .. } => Errno::EIO,
            Self::NoSpace | Self::NoDataSpace => Errno::ENOSPC,
            Self::NoData => Errno::ENOBUFS,
            Self::Btree(error) => error.errno(),
            Self::Alloc(error) => error.errno(),
            Self::Data(DeviceError::Shut) | Self::Severed => Errno::ENOLINK,
            Self::Data(_) => Errno::EIO,
            Self::Server(errno) => *errno,
            Self::Shutdown => Errno::ESHUTDOWN,
        }
    }

    /// Whether trying again is useless: the mount is cut off.
    pub(super) fn is_severed(&self) -> bool {
        self.errno() == Errno::ENOLINK
    }
}

impl From<LogError> for Errno {
    /// As users see it. Operations look before they change: an item that exists
    /// or is missing against expectation is damage.
    fn from(error: LogError) -> Errno {
        match error {
            LogError::Exists(_) | LogError::NotFound(_) => Errno::EIO,
            error => error.errno(),
        }
    }
}

impl From<BlockError> for LogError {
    fn from(error: BlockError) -> Self {
        Self::Btree(BtreeError::Block(error))
    }
}

impl From<AllocError> for LogError {
    fn from(error: AllocError) -> Self {
        match error {
            AllocError::Refill => Self::NoData,
            AllocError::NoSpace => Self::NoDataSpace,
            AllocError::Btree(error) => Self::Btree(error),
            other => Self::Alloc(other),
        }
    }
}

/// Why a request of the log to the server failed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ServerError {
    /// The mount was severed from its server; trying again is useless.
    #[error("the mount is severed from its server")]
    Severed,
    /// The server failed or answered with an error: whether the request took
    /// effect is not known.
    #[error("the server answered {0}")]
    Failed(Errno),
}

impl From<ServerError> for LogError {
    fn from(error: ServerError) -> Self {
        match error {
            ServerError::Severed => Self::Severed,
            ServerError::Failed(errno) => Self::Server(errno),
        }
    }
}

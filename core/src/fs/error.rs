//! Errors of the filesystem layer, and the one place where they become the
//! numbers that users see.

use super::api::Ino;
use crate::env::{DeviceError, probe};
use crate::errno::Errno;
use crate::format::{Key, ValueError};
use crate::locks::LockError;
use crate::log::LogError;
use thiserror::Error;

/// Why an operation failed.
#[derive(Clone, Debug, Error)]
pub enum FsError {
    /// The operation is refused by the rules of POSIX or of the spec.
    #[error("{0}")]
    Refused(Errno),
    /// The inode named by number does not exist any more.
    #[error("inode {0} is gone")]
    Gone(Ino),
    /// An item has a value that its kind cannot have.
    #[error("item {key} is corrupt: {what}")]
    Corrupt {
        /// The item.
        key: Key,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An item has a value of the wrong length.
    #[error("item {key} is corrupt: {error}")]
    Value {
        /// The item.
        key: Key,
        /// What is wrong with it.
        error: ValueError,
    },
    /// The item cache or the transaction failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A cluster lock could not be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The data device failed.
    #[error(transparent)]
    Device(DeviceError),
    /// The data is in the archive only.
    #[error("block {block} of inode {ino} is offline")]
    Offline {
        /// The inode.
        ino: Ino,
        /// Its logical block.
        block: u64,
    },
    /// A request to the server failed.
    #[error("the server answered {0}")]
    Server(Errno),
}

/// What operations of this layer return.
pub type FsResult<T> = Result<T, FsError>;

impl FsError {
    /// The number reported to the caller.
    pub fn errno(&self) -> Errno {
        match self {
            FsError::Refused(errno) | FsError::Server(errno) => *errno,
            // The kernel looks the name up again.
            FsError::Gone(_) => Errno::ESTALE,
            FsError::Corrupt { .. } | FsError::Value { .. } => {
                probe("fs.corrupt_item");
                tracing::error!(error = %self, "corrupt item");
                Errno::EIO
            }
            FsError::Device(DeviceError::Shut) => Errno::ENOLINK,
            FsError::Device(_) | FsError::Offline { .. } => Errno::EIO,
            // Items that must, or must not, be there: never an answer to a user.
            FsError::Log(LogError::Exists(_) | LogError::NotFound(_)) => {
                probe("fs.unexpected_item");
                tracing::error!(error = %self, "an item contradicts another");
                Errno::EIO
            }
            FsError::Log(error) => error.clone().into(),
            FsError::Lock(error) => (*error).into(),
        }
    }

    /// Whether space ran out, for good or until the next transaction.
    pub fn is_no_space(&self) -> bool {
        matches!(
            self,
            FsError::Log(LogError::NoData | LogError::NoDataSpace | LogError::NoSpace)
        )
    }

    /// Whether it is this refusal.
    pub fn is(&self, errno: Errno) -> bool {
        matches!(self, FsError::Refused(e) if *e == errno)
    }
}

impl From<Errno> for FsError {
    fn from(errno: Errno) -> Self {
        FsError::Refused(errno)
    }
}

impl From<FsError> for Errno {
    fn from(error: FsError) -> Self {
        error.errno()
    }
}

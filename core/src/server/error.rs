//! Why the server could not do something, and what its client hears.

use super::fence::FenceError;
use crate::alloc::AllocError;
use crate::block::BlockError;
use crate::btree::BtreeError;
use crate::env::{DeviceError, NetError};
use crate::errno::Errno;
use crate::format::Key;
use crate::volume::VolumeError;
use thiserror::Error;

/// A failure of a request, of a background task, or of the whole server.
#[derive(Clone, Debug, Error)]
pub enum ServerError {
    /// Metadata could not be read or written.
    #[error("{0}")]
    Block(#[from] BlockError),
    /// A btree of the server could not be read or changed.
    #[error("{0}")]
    Btree(#[from] BtreeError),
    /// An allocator could not be read or changed.
    #[error("{0}")]
    Alloc(#[from] AllocError),
    /// An item of the server's trees has an impossible length.
    #[error("item {key} has a value of {found} bytes where {expected} are due")]
    ItemSize {
        /// The item.
        key: Key,
        /// Its length in bytes.
        found: usize,
        /// The only right length.
        expected: usize,
    },
    /// An item of the server's trees is not where it must be.
    #[error("item {0} is missing")]
    ItemMissing(Key),
    /// A log trees item says that more was committed than opened.
    #[error("log tree {rid:016x}.{nr} was committed at seq {commit} but opened at {get}")]
    LogTreesSeqs {
        /// The mount.
        rid: u64,
        /// Number of the tree.
        nr: u64,
        /// get_trans_seq.
        get: u64,
        /// commit_trans_seq.
        commit: u64,
    },
    /// The super block or a quorum block can not be read, or is not this volume's.
    #[error("{0}")]
    Volume(#[from] VolumeError),
    /// A device failed in another way than a metadata block.
    #[error("{0}")]
    Device(#[from] DeviceError),
    /// The listening socket.
    #[error("{0}")]
    Net(#[from] NetError),
    /// A leader of a later term was elected meanwhile.
    #[error("a leader of a later term than {term} was elected: this server does not start")]
    Superseded {
        /// Our term.
        term: u64,
    },
    /// Another leader of the same term has the better right to serve.
    #[error("another leader of term {term} was elected and goes first: this server does not start")]
    GivesWay {
        /// Our term.
        term: u64,
    },
    /// Someone could not be fenced.
    #[error("{0}")]
    Fence(#[from] FenceError),
    /// No metadata is left to work with.
    #[error("the metadata device has no free blocks left for the server")]
    NoSpace,
    /// The mount has no mounted client item, or is being reclaimed.
    #[error("mount {rid:016x} is not mounted any more")]
    NotMounted {
        /// The mount.
        rid: u64,
    },
    /// The request is wrong, or its answer is an error that is no failure.
    #[error("request refused: {0}")]
    Refused(Errno),
    /// A step of several failed in the middle: memory no longer is a state that
    /// may be committed. The server drops it and stops.
    #[error("metadata could not be changed consistently: {0}")]
    Fatal(Box<ServerError>),
    /// The server stops.
    #[error("the server is stopping")]
    Stopping,
}

impl ServerError {
    /// Marks an error after which the dirty state must not be committed.
    pub(crate) fn fatal(self) -> Self {
        match self {
            Self::Fatal(_) | Self::Stopping => self,
            other => Self::Fatal(Box::new(other)),
        }
    }

    /// Whether the server must stop.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Fatal(_))
    }

    /// Whether newer roots may help.
    pub(crate) fn is_stale(&self) -> bool {
        match self {
            Self::Block(err) => err.is_stale(),
            Self::Btree(err) => err.is_stale(),
            Self::Alloc(err) => err.is_stale(),
            _ => false,
        }
    }

    /// Whether the client hears nothing: its server is about to vanish, and it
    /// will ask the next one.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(self, Self::Fatal(_) | Self::Stopping) || self.errno() == Errno::ENOLINK
    }

    /// What the client hears.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Block(err) => err.errno(),
            Self::Btree(err) => err.errno(),
            Self::Alloc(err) => err.errno(),
            Self::Volume(err) => err.errno(),
            Self::LogTreesSeqs { .. } => Errno::EINVAL,
            Self::ItemSize { .. } | Self::ItemMissing(_) => Errno::EIO,
            Self::Device(DeviceError::Shut) => Errno::ENOLINK,
            Self::Device(_)
            | Self::Net(_)
            | Self::Fence(_)
            | Self::Superseded { .. }
            | Self::GivesWay { .. } => Errno::EIO,
            Self::NoSpace => Errno::ENOSPC,
            Self::NotMounted { .. } => Errno::EINVAL,
            Self::Refused(errno) => *errno,
            Self::Fatal(inner) => inner.errno(),
            Self::Stopping => Errno::ENOLINK,
        }
    }
}

/// Short for everything in here.
pub(crate) type Result<T, E = ServerError> = std::result::Result<T, E>;

/// Marks any error as [`ServerError::Fatal`].
pub(crate) trait OrFatal<T> {
    /// The value, or the error as one that stops the server.
    fn or_fatal(self) -> Result<T>;
}

impl<T, E: Into<ServerError>> OrFatal<T> for std::result::Result<T, E> {
    fn or_fatal(self) -> Result<T> {
        self.map_err(|err| err.into().fatal())
    }
}

//! Metadata blocks: verified reads, a cache, copy on write, ordered write-out
//! (spec 02 sections 2 to 5, spec 03 sections 4 and 5).
//!
//! A block that was handed out never changes: cached blocks are immutable
//! shared buffers, and changing a block means a new buffer under a new block
//! number. Only blocks that are dirty in a [`Tx`] are changed in place, and even
//! then a reader that still holds the buffer keeps its old content.
//!
//! What can go wrong: a block that does not match its reference. It is either
//! an old reference to a block that was reused meanwhile, or corruption; the
//! two look alike ([`BlockError::Stale`]) and [`StaleCheck`] tells them apart.

mod cache;
mod list;
mod policy;
mod stale;
mod tx;

pub use cache::{Cache, CacheStats};
pub(crate) use list::{ListBlock, ListBlockMut};
pub use list::{list_entries, list_head_of, verify_list};
pub use policy::Policy;
pub use stale::StaleCheck;
pub use tx::{Mark, Room, Tx};

use crate::env::{DeviceError, IoBuf};
use crate::errno::Errno;
use crate::format::HeaderError;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use thiserror::Error;

/// Why a metadata block could not be had.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BlockError {
    /// The device failed.
    #[error("metadata block {blkno}: {source}")]
    Io {
        /// Large block number.
        blkno: u64,
        /// What the device said.
        source: DeviceError,
    },
    /// The flush after writing failed: nothing since the last one is durable.
    #[error("flush of the metadata device: {0}")]
    Flush(DeviceError),
    /// The block is not the version that the reference names, twice in a row:
    /// an old reference, or corruption (ESTALE).
    #[error("metadata block {blkno} is stale or corrupt: {why}")]
    Stale {
        /// Large block number.
        blkno: u64,
        /// The difference.
        why: HeaderError,
    },
    /// The block is the right version but its content makes no sense.
    #[error("{0}")]
    Corrupt(Corruption),
    /// A reference names a block that the volume does not have.
    #[error("metadata block {blkno} is outside of the volume's blocks 2..{total}")]
    OutOfRange {
        /// Large block number.
        blkno: u64,
        /// Large blocks of the volume.
        total: u64,
    },
    /// The transaction's list of available blocks is empty (a violated budget).
    #[error("no metadata block is left for this transaction")]
    NoSpace,
    /// The transaction's list of freed blocks is full (a violated budget).
    #[error("the list of freed metadata blocks is full")]
    FreedFull,
    /// The device was shut for this mount.
    #[error("the metadata device was shut for this mount")]
    Shut,
}

impl BlockError {
    /// From a failed request for `blkno`.
    pub(crate) fn device(blkno: u64, source: DeviceError) -> Self {
        match source {
            DeviceError::Shut => Self::Shut,
            source => Self::Io { blkno, source },
        }
    }

    /// Whether newer roots may help.
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Stale { .. })
    }

    /// The error number of the original for it.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Stale { .. } => Errno::ESTALE,
            Self::NoSpace => Errno::ENOSPC,
            Self::OutOfRange { .. } => Errno::EINVAL,
            Self::Shut | Self::Flush(DeviceError::Shut) => Errno::ENOLINK,
            Self::Io { .. } | Self::Flush(_) | Self::Corrupt(_) | Self::FreedFull => Errno::EIO,
        }
    }

    /// For structures that only their owner reads: stale is corrupt there.
    pub(crate) fn owned(self) -> Self {
        match self {
            Self::Stale { blkno, why } => Self::Corrupt(Corruption {
                blkno,
                what: format!("a block that only we write: {why}"),
            }),
            other => other,
        }
    }
}

/// What is wrong inside a block.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("metadata block {blkno} is corrupt: {what}")]
pub struct Corruption {
    /// Large block number, from the block's header.
    pub blkno: u64,
    /// What was found, and what was expected.
    pub what: String,
}

/// One version of a metadata block, immutable while anybody else holds it.
#[derive(Clone, Debug)]
pub struct Block {
    buf: IoBuf,
    /// Whether the owner of this kind of block has checked its structure.
    checked: Cell<bool>,
}

impl Block {
    pub(crate) fn new(buf: IoBuf, checked: bool) -> Self {
        Self {
            buf,
            checked: Cell::new(checked),
        }
    }

    /// The block's 65536 bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buf
    }

    /// The shared buffer, for writes and replies without a copy.
    pub fn buf(&self) -> &IoBuf {
        &self.buf
    }

    /// Runs `check` on the content once in the life of this buffer.
    ///
    /// # Errors
    /// What `check` found; the next call runs it again.
    pub fn check_once(
        &self,
        check: impl FnOnce(&[u8]) -> Result<(), Corruption>,
    ) -> Result<(), BlockError> {
        if !self.checked.get() {
            check(&self.buf).map_err(BlockError::Corrupt)?;
            self.checked.set(true);
        }
        Ok(())
    }

    /// The content for changing: copied first if anybody else holds it.
    pub(crate) fn make_mut(this: &mut Rc<Block>) -> &mut [u8] {
        let block = Rc::make_mut(this);
        let buf: &mut crate::env::AlignedBuf = Arc::make_mut(&mut block.buf);
        buf
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod testvol;

//! Reading and writing quorum blocks (spec 09 section 4): one 4 KiB block for each
//! slot, written only by the mount that uses the slot, read by everybody.
//!
//! What can go wrong: going on before an event is durable, or writing over the
//! block of another mount in the same slot. Every update is a verified read and
//! one FUA write of the whole block, by the agent alone.

use super::brain::TERM_LIMIT;
use crate::env::{AlignedBuf, BlockDevice, DeviceError, Time, WriteFlags};
use crate::format::{
    HeaderError, Magic, QUORUM_BLKNO, QUORUM_MAX_SLOTS, QuorumBlock, QuorumEvent, QuorumEventKind,
    SM_BLOCK_SIZE, SUPER_BLKNO, SuperBlock, Timespec, seal, verify,
};
use std::rc::Rc;
use std::sync::Arc;
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Why a super or quorum block could not be read or written (EIO).
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum QuorumBlockError {
    /// The device failed.
    #[error("quorum slot {slot}: {error}")]
    Device {
        /// The slot.
        slot: usize,
        /// What the device said.
        error: DeviceError,
    },
    /// The block is not this slot's block of this volume.
    #[error("quorum slot {slot}: {error}")]
    Header {
        /// The slot.
        slot: usize,
        /// What differs.
        error: HeaderError,
    },
    /// It holds a number that counting never reaches.
    #[error("quorum slot {slot}: {what} {found:#x} is damaged: nothing counts that far")]
    Number {
        /// The slot.
        slot: usize,
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// Another mount uses the own slot.
    #[error("quorum slot {slot} is used by mount {found:016x} as well as by this one, {own:016x}")]
    ForeignRid {
        /// The slot.
        slot: usize,
        /// The own mount.
        own: u64,
        /// The mount in the block's BEGIN event.
        found: u64,
    },
    /// The super block can not be read.
    #[error("super block: {0}")]
    SuperDevice(DeviceError),
    /// The super block is not one, or another volume's.
    #[error("super block: {0}")]
    SuperHeader(HeaderError),
}

/// Byte offset of a slot's block.
pub const fn offset(slot: usize) -> u64 {
    (QUORUM_BLKNO + slot as u64) * SM_BLOCK_SIZE as u64
}

/// Changes `block` as one update does: counts it and records the event.
pub fn record(block: &mut QuorumBlock, kind: QuorumEventKind, rid: u64, term: u64, at: Time) {
    let write_nr = block.write_nr.get() + 1;
    block.write_nr.set(write_nr);
    let (sec, nsec) = (at.nanos() / 1_000_000_000, at.nanos() % 1_000_000_000);
    block.events[kind as usize] = QuorumEvent {
        write_nr: write_nr.into(),
        rid: rid.into(),
        term: term.into(),
        ts: Timespec::new(sec as i64, nsec as u32),
    };
}

/// Super and quorum blocks of one volume, straight from the metadata device.
#[derive(Clone)]
pub struct BlockIo {
    dev: Rc<dyn BlockDevice>,
    fsid: u64,
}

impl BlockIo {
    /// For the volume `fsid` on metadata device `dev`.
    pub fn new(dev: Rc<dyn BlockDevice>, fsid: u64) -> Self {
        Self { dev, fsid }
    }

    async fn read_verified(
        &self,
        blkno: u64,
        magic: Magic,
    ) -> Result<AlignedBuf, Result<DeviceError, HeaderError>> {
        let buf = AlignedBuf::zeroed(SM_BLOCK_SIZE);
        let (buf, done) = self.dev.read(blkno * SM_BLOCK_SIZE as u64, buf).await;
        done.map_err(Ok)?;
        verify(&buf, magic, Some(self.fsid), blkno, None).map_err(Err)?;
        Ok(buf)
    }

    /// Reads and verifies the super block.
    ///
    /// # Errors
    /// If the device fails or the block is not the volume's super block.
    pub async fn read_super(&self) -> Result<SuperBlock, QuorumBlockError> {
        match self.read_verified(SUPER_BLKNO, Magic::Super).await {
            Ok(buf) => Ok(SuperBlock::from_block(&buf)),
            Err(Ok(error)) => Err(QuorumBlockError::SuperDevice(error)),
            Err(Err(error)) => Err(QuorumBlockError::SuperHeader(error)),
        }
    }

    /// Reads and verifies a slot's block.
    ///
    /// # Errors
    /// If the device fails or the block is not that slot's.
    ///
    /// # Panics
    /// If there is no such slot.
    pub async fn read(&self, slot: usize) -> Result<QuorumBlock, QuorumBlockError> {
        Ok(self.read_whole(slot).await?.0)
    }

    async fn read_whole(&self, slot: usize) -> Result<(QuorumBlock, AlignedBuf), QuorumBlockError> {
        assert!(slot < QUORUM_MAX_SLOTS, "no quorum slot {slot}");
        let read = self.read_verified(QUORUM_BLKNO + slot as u64, Magic::Quorum);
        let buf = read.await.map_err(|error| match error {
            Ok(error) => QuorumBlockError::Device { slot, error },
            Err(error) => QuorumBlockError::Header { slot, error },
        })?;
        let (block, _) = QuorumBlock::read_from_prefix(&buf).expect("a whole block was read");
        let numbers = std::iter::once(("the number of writes", block.write_nr.get())).chain(
            block
                .events
                .iter()
                .map(|event| ("a term", event.term.get())),
        );
        for (what, found) in numbers {
            if found >= TERM_LIMIT {
                return Err(QuorumBlockError::Number { slot, what, found });
            }
        }
        Ok((block, buf))
    }

    /// Records an event in the own slot's block, durably. Only BEGIN may take over
    /// a block that another mount used.
    ///
    /// # Errors
    /// If the block can not be read, verified or written, or another mount uses the
    /// slot. The quorum service of this mount must end then.
    pub async fn update(
        &self,
        slot: usize,
        kind: QuorumEventKind,
        rid: u64,
        term: u64,
        at: Time,
    ) -> Result<(), QuorumBlockError> {
        let (mut block, mut buf) = self.read_whole(slot).await?;
        let found = block.event(QuorumEventKind::Begin).rid.get();
        if kind != QuorumEventKind::Begin && found != rid {
            return Err(QuorumBlockError::ForeignRid {
                slot,
                own: rid,
                found,
            });
        }
        record(&mut block, kind, rid, term, at);
        buf[..size_of::<QuorumBlock>()].copy_from_slice(block.as_bytes());
        seal(&mut buf);
        let written = self
            .dev
            .write(offset(slot), vec![Arc::new(buf)], WriteFlags { fua: true });
        written
            .await
            .map_err(|error| QuorumBlockError::Device { slot, error })
    }
}

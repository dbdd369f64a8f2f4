//! The block device seam and the contract that core may lean on.

use super::{AlignedBuf, IoBuf, LocalBoxFuture};
use std::rc::Rc;
use thiserror::Error;

/// Which of the volume's two devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceRole {
    /// The metadata device.
    Meta,
    /// The data device.
    Data,
}

/// Why a device request failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The device reported an I/O error, or the medium is bad there.
    #[error("device I/O error on {op} of {len} bytes at byte {offset}: {detail}")]
    Io {
        /// `read`, `write` or `flush`.
        op: &'static str,
        /// Byte offset of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// What the system said.
        detail: String,
    },
    /// The request reaches past the end of the device.
    #[error("{op} of {len} bytes at byte {offset} is past the end of the device ({size} bytes)")]
    OutOfRange {
        /// `read` or `write`.
        op: &'static str,
        /// Byte offset of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Size of the device in bytes.
        size: u64,
    },
    /// The device was shut: a forced unmount or a fenced node (ENOLINK).
    #[error("the device was shut for this mount")]
    Shut,
}

/// How a write is to be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Forced unit access: durable when complete.
    pub fua: bool,
}

/// A device of fixed-size storage, shared by all nodes.
///
/// # Contract
/// Stated here and relied on nowhere else:
/// * offsets and lengths are multiples of 4096; a 4 KiB aligned block is written atomically;
/// * a write is durable only after a flush that *started after it completed*, or with FUA;
/// * writes not yet durable may survive a crash in any subset, torn at 4 KiB;
/// * concurrent overlapping writes leave either content;
/// * a read may see another node's write half done, at 4 KiB granularity;
/// * after a failed flush or write nothing of what it covered may be taken as durable.
pub trait BlockDevice {
    /// Size in bytes, rounded down to a multiple of 4096.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`; gives the buffer back in both cases.
    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalBoxFuture<'static, (AlignedBuf, Result<(), DeviceError>)>;

    /// Writes the buffers one after the other from `offset`.
    fn write(
        &self,
        offset: u64,
        bufs: Vec<IoBuf>,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), DeviceError>>;

    /// Makes every write that completed before this call durable.
    fn flush(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>>;
}

/// Opens the volume's devices for the calling actor.
pub trait Devices {
    /// A handle that belongs to the calling actor.
    ///
    /// # Errors
    /// If the device can not be opened; the text names it.
    fn open(&self, role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError>;
}

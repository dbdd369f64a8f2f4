//! Sealing and verifying block headers (spec 01 section 2).

use super::consts::{Magic, SM_BLOCK_SIZE};
use super::hash::crc32c;
use super::structs::{BlockHeader, BlockRef};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Why a block is not the one that was looked for.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// The CRC does not match the content: a torn or damaged block.
    #[error("block CRC is {found:08x}, its content gives {expected:08x}")]
    Crc {
        /// CRC of the content.
        expected: u32,
        /// CRC stored in the header.
        found: u32,
    },
    /// The block is of another kind.
    #[error("block magic is {found:08x}, expected {expected:08x} ({})", magic_name(*.expected))]
    Magic {
        /// Magic of the kind that was looked for.
        expected: u32,
        /// Magic in the header.
        found: u32,
    },
    /// The block belongs to another volume.
    #[error("block fsid is {found:016x}, expected {expected:016x}")]
    Fsid {
        /// The volume's id.
        expected: u64,
        /// Id in the header.
        found: u64,
    },
    /// The block thinks it lives elsewhere: a misdirected write.
    #[error("block number in the header is {found}, expected {expected}")]
    Blkno {
        /// Where it was read.
        expected: u64,
        /// Number in the header.
        found: u64,
    },
    /// The block is another version than the reference names.
    #[error("block seq is {found:016x}, the reference has {expected:016x}")]
    Seq {
        /// Seq of the reference.
        expected: u64,
        /// Seq in the header.
        found: u64,
    },
}

fn magic_name(value: u32) -> &'static str {
    Magic::from_value(value).map_or("unknown", Magic::name)
}

/// Copies the header out of a block.
///
/// # Panics
/// If `block` is shorter than a header.
pub fn read_header(block: &[u8]) -> BlockHeader {
    let (hdr, _) = BlockHeader::read_from_prefix(block).expect("a block holds its header");
    hdr
}

/// Writes the header's fields, leaving the CRC to [`seal`].
///
/// # Panics
/// If `block` is shorter than a header.
pub fn init_header(block: &mut [u8], magic: Magic, fsid: u64, blkno: u64, seq: u64) {
    let hdr = BlockHeader {
        crc: 0.into(),
        magic: magic.value().into(),
        fsid: fsid.into(),
        seq: seq.into(),
        blkno: blkno.into(),
    };
    block[..size_of::<BlockHeader>()].copy_from_slice(hdr.as_bytes());
}

/// CRC of a block's content: all bytes after the crc field.
pub fn block_crc(block: &[u8]) -> u32 {
    crc32c(&block[4..])
}

/// Computes and stores the CRC. `block` must be the whole block with its tail.
///
/// # Panics
/// If `block` is not the size of a block.
pub fn seal(block: &mut [u8]) {
    assert!(
        block.len() == SM_BLOCK_SIZE || block.len() == super::LG_BLOCK_SIZE,
        "sealing {} bytes that are not a block",
        block.len()
    );
    let crc = block_crc(block);
    block[..4].copy_from_slice(&crc.to_le_bytes());
}

/// Checks CRC, magic, fsid (if given), blkno and seq (if given), in this order.
///
/// # Errors
/// The first difference found.
///
/// # Panics
/// If `block` is shorter than a header.
pub fn verify(
    block: &[u8],
    magic: Magic,
    fsid: Option<u64>,
    blkno: u64,
    seq: Option<u64>,
) -> Result<(), HeaderError> {
    let hdr = read_header(block);
    let crc = block_crc(block);
    if hdr.crc.get() != crc {
        return Err(HeaderError::Crc {
            expected: crc,
            found: hdr.crc.get(),
        });
    }
    if hdr.magic.get() != magic.value() {
        return Err(HeaderError::Magic {
            expected: magic.value(),
            found: hdr.magic.get(),
        });
    }
    if let Some(expected) = fsid.filter(|f| *f != hdr.fsid.get()) {
        return Err(HeaderError::Fsid {
            expected,
            found: hdr.fsid.get(),
        });
    }
    if hdr.blkno.get() != blkno {
        return Err(HeaderError::Blkno {
            expected: blkno,
            found: hdr.blkno.get(),
        });
    }
    if let Some(expected) = seq.filter(|s| *s != hdr.seq.get()) {
        return Err(HeaderError::Seq {
            expected,
            found: hdr.seq.get(),
        });
    }
    Ok(())
}

/// As [`verify`], against a reference.
///
/// # Errors
/// The first difference found.
pub fn verify_ref(
    block: &[u8],
    magic: Magic,
    fsid: u64,
    block_ref: &BlockRef,
) -> Result<(), HeaderError> {
    verify(
        block,
        magic,
        Some(fsid),
        block_ref.blkno.get(),
        Some(block_ref.seq.get()),
    )
}

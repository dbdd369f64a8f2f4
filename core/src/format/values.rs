//! Small helpers of the structures: null references, addresses, times, and item
//! values whose length says something (spec 01 sections 3, 9 and 12).

use super::consts::*;
use super::items::*;
use super::structs::*;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// An item value that does not have the length or content of its kind (EIO).
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ValueError {
    /// Wrong length.
    #[error("{what} value has {found} bytes, expected {expected}")]
    Length {
        /// The kind of value.
        what: &'static str,
        /// Bytes expected (the least, where several lengths are good).
        expected: usize,
        /// Bytes found.
        found: usize,
    },
}

impl BlockRef {
    /// A reference.
    pub fn new(blkno: u64, seq: u64) -> Self {
        Self {
            blkno: blkno.into(),
            seq: seq.into(),
        }
    }

    /// Whether it refers to nothing.
    pub fn is_null(&self) -> bool {
        self.blkno.get() == 0
    }
}

impl fmt::Display for BlockRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:016x}", self.blkno.get(), self.seq.get())
    }
}

impl BtreeRoot {
    /// A root of `height` levels.
    pub fn new(block_ref: BlockRef, height: u8) -> Self {
        Self {
            block_ref,
            height,
            pad: [0; 7],
        }
    }

    /// Whether the tree has no blocks.
    pub fn is_empty(&self) -> bool {
        self.height == 0 && self.block_ref.is_null()
    }
}

impl Timespec {
    /// A time from seconds and nanoseconds.
    pub fn new(sec: i64, nsec: u32) -> Self {
        Self {
            sec: sec.into(),
            nsec: nsec.into(),
            pad: [0; 4],
        }
    }
}

impl From<crate::env::WallTime> for Timespec {
    fn from(t: crate::env::WallTime) -> Self {
        Self::new(t.sec, t.nsec)
    }
}

impl InetAddr {
    /// The address of an IPv4 socket.
    pub fn from_v4(addr: SocketAddrV4) -> Self {
        Self {
            family: AF_IPV4.into(),
            port: addr.port().into(),
            addr: u32::from(*addr.ip()).into(),
            rest: [0; 24],
        }
    }

    /// The IPv4 socket address; `None` for an empty slot or another family.
    pub fn v4(&self) -> Option<SocketAddrV4> {
        (self.family.get() == AF_IPV4)
            .then(|| SocketAddrV4::new(Ipv4Addr::from(self.addr.get()), self.port.get()))
    }

    /// Whether both are the same address: undefined bytes are not compared.
    pub fn same(&self, other: &InetAddr) -> bool {
        self.family == other.family && self.addr == other.addr && self.port == other.port
    }
}

impl QuorumConfig {
    /// The present slots with their addresses, in slot order.
    pub fn present(&self) -> impl Iterator<Item = (usize, SocketAddrV4)> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(nr, slot)| Some((nr, slot.v4()?)))
    }
}

impl QuorumBlock {
    /// The record of an event.
    pub fn event(&self, kind: QuorumEventKind) -> &QuorumEvent {
        &self.events[kind as usize]
    }

    /// Whether an agent may still run in this slot (spec 01 section 6).
    pub fn may_be_running(&self) -> bool {
        let nr = |kind| self.event(kind).write_nr.get();
        nr(QuorumEventKind::Begin) > nr(QuorumEventKind::End)
    }
}

impl VolumeOptions {
    /// The data zone size in small blocks, if the option is set.
    pub fn data_zone_blocks(&self) -> Option<u64> {
        (self.set_bits.get() & VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT != 0)
            .then(|| self.data_alloc_zone_blocks.get())
    }
}

impl SuperBlock {
    /// The super block at the start of a small block.
    ///
    /// # Panics
    /// If `block` is shorter than the structure.
    pub fn from_block(block: &[u8]) -> Self {
        let (sb, _) = Self::read_from_prefix(block).expect("a small block holds a super block");
        sb
    }

    /// Whether this is the metadata device's copy.
    pub fn is_meta(&self) -> bool {
        self.flags.get() & SUPER_FLAG_IS_META_BDEV != 0
    }
}

impl LogTrees {
    /// Whether a transaction is open (spec 01 section 10).
    pub fn is_open(&self) -> bool {
        self.get_trans_seq.get() > self.commit_trans_seq.get()
    }

    /// Whether it takes no more items.
    pub fn is_finalized(&self) -> bool {
        self.flags.get() & LOG_TREES_FLAG_FINALIZED != 0
    }
}

impl Inode {
    /// Bytes of an inode item as written in a format version.
    pub const fn size_for(fmt_vers: u64) -> usize {
        if fmt_vers < 2 {
            INODE_V1_SIZE
        } else {
            INODE_V2_SIZE
        }
    }

    /// Reads an inode item by the rule of spec 01 section 12.
    ///
    /// # Errors
    /// [`ValueError::Length`] if the length is not one that `fmt_vers` may hold.
    pub fn from_value(value: &[u8], fmt_vers: u64) -> Result<Self, ValueError> {
        let good = value.len() == INODE_V1_SIZE || (value.len() == INODE_V2_SIZE && fmt_vers >= 2);
        if !good {
            return Err(ValueError::Length {
                what: "inode",
                expected: Self::size_for(fmt_vers),
                found: value.len(),
            });
        }
        let mut inode = Self::default();
        inode.as_mut_bytes()[..value.len()].copy_from_slice(value);
        Ok(inode)
    }

    /// The bytes of the item in a format version.
    pub fn to_value(&self, fmt_vers: u64) -> &[u8] {
        &self.as_bytes()[..Self::size_for(fmt_vers)]
    }
}

impl Dirent {
    /// Splits a directory entry value in head and name.
    ///
    /// # Errors
    /// [`ValueError::Length`] if the name is not 1 to 255 bytes long.
    pub fn from_value(value: &[u8]) -> Result<(Self, &[u8]), ValueError> {
        match Self::read_from_prefix(value) {
            Ok((head, name)) if (1..=NAME_MAX).contains(&name.len()) => Ok((head, name)),
            _ => Err(ValueError::Length {
                what: "dirent",
                expected: size_of::<Self>() + 1,
                found: value.len(),
            }),
        }
    }

    /// The value of an entry: head and name.
    pub fn to_value(&self, name: &[u8]) -> Vec<u8> {
        [self.as_bytes(), name].concat()
    }
}

/// Dirent type of a Linux mode, if it has a known file type.
pub const fn dirent_type(mode: u32) -> Option<u8> {
    Some(match mode & 0o170_000 {
        0o010_000 => DT_FIFO,
        0o020_000 => DT_CHR,
        0o040_000 => DT_DIR,
        0o060_000 => DT_BLK,
        0o100_000 => DT_REG,
        0o120_000 => DT_LNK,
        0o140_000 => DT_SOCK,
        _ => return None,
    })
}

/// Reads a fixed-size structure that must fill the whole value.
///
/// # Errors
/// [`ValueError::Length`] if the length differs.
pub fn value_exact<T: FromBytes>(what: &'static str, value: &[u8]) -> Result<T, ValueError> {
    T::read_from_bytes(value).map_err(|_| ValueError::Length {
        what,
        expected: size_of::<T>(),
        found: value.len(),
    })
}

//! Messages between nodes (spec 08 sections 2, 4 and 8; 09 section 3; 10 section 4; 11 section 2).

use super::structs::*;
use zerocopy::little_endian::{U16, U32, U64};

disk_struct! {
/// Head of every message of a connection; `data_len` bytes follow.
NetHeader, 32 {
    /// Sender's sequence number, from 1.
    0 seq: U64,
    /// Greatest seq the sender has received.
    8 recv_seq: U64,
    /// Number of the request.
    16 id: U64,
    /// Bytes of payload.
    24 data_len: U16,
    /// Command, see [`NetCmd`].
    26 cmd: u8,
    /// [`super::NET_FLAG_RESPONSE`].
    27 flags: u8,
    /// Error code of a response.
    28 error: u8,
    /// Zero.
    29 pad: [u8; 3],
}}

disk_struct! {
/// First message of a connection, in both directions.
NetGreeting, 40 {
    /// Volume id.
    0 fsid: U64,
    /// Format version.
    8 fmt_vers: U64,
    /// Term of the server greeted last, or of this server in responses.
    16 server_term: U64,
    /// Mount.
    24 rid: U64,
    /// `NET_GREETING_FLAG_*`.
    32 flags: U64,
}}

disk_struct! {
/// Response to ALLOC_INODES.
NetInodeAlloc, 16 {
    /// First inode number.
    0 ino: U64,
    /// Number of inode numbers.
    8 nr: U64,
}}

disk_struct! {
/// Response to GET_ROOTS.
NetRoots, 72 {
    /// Merged items.
    0 fs_root: BtreeRoot,
    /// Log trees.
    24 logs_root: BtreeRoot,
    /// Srch files.
    48 srch_root: BtreeRoot,
}}

disk_struct! {
/// A lock request, grant, invalidation or answer.
NetLock, 48 {
    /// Start key of the lock.
    0 key: DiskKey,
    /// Write seq of a grant or of a recovered lock.
    32 write_seq: U64,
    /// Mode before.
    40 old_mode: u8,
    /// Mode after.
    41 new_mode: u8,
    /// Ignored.
    42 pad: [u8; 6],
}}

disk_struct! {
/// Head of a response to LOCK_RECOVER; `nr` locks follow.
NetLockRecover, 8 {
    /// Number of locks.
    0 nr: U16,
    /// Zero.
    2 pad: [u8; 6],
}}

disk_struct! {
/// Request of RESIZE_DEVICES.
NetResizeDevices, 16 {
    /// Large blocks of the metadata device, 0 for no change.
    0 new_total_meta_blocks: U64,
    /// Small blocks of the data device, 0 for no change.
    8 new_total_data_blocks: U64,
}}

disk_struct! {
/// Response to STATFS.
NetStatfs, 56 {
    /// Volume uuid.
    0 uuid: [u8; 16],
    /// Free large blocks of the metadata device.
    16 free_meta_blocks: U64,
    /// Large blocks of the metadata device.
    24 total_meta_blocks: U64,
    /// Free small blocks of the data device.
    32 free_data_blocks: U64,
    /// Small blocks of the data device.
    40 total_data_blocks: U64,
    /// Inodes.
    48 inode_count: U64,
}}

disk_struct! {
/// Request of OPEN_INO_MAP.
OpenInoMapArgs, 16 {
    /// Inode group: inode number / 1024.
    0 group_nr: U64,
    /// Number of the request.
    8 req_id: U64,
}}

disk_struct! {
/// Response to OPEN_INO_MAP.
OpenInoMap, 144 {
    /// The request.
    0 args: OpenInoMapArgs,
    /// Bit n % 64 of word n / 64: inode n of the group is open somewhere.
    16 bits: [U64; 16],
}}

disk_struct! {
/// A quorum datagram.
QuorumMessage, 32 {
    /// Volume id.
    0 fsid: U64,
    /// Zero.
    8 version: U64,
    /// Term.
    16 term: U64,
    /// `QUORUM_MSG_*`.
    24 kind: u8,
    /// Sender's slot.
    25 from: u8,
    /// Zero.
    26 pad: [u8; 2],
    /// CRC of the bytes before.
    28 crc: U32,
}}

/// Commands of the network protocol (spec 08 section 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum NetCmd {
    /// First message of a connection.
    Greeting = 0,
    /// Get inode numbers.
    AllocInodes = 1,
    /// Open a transaction.
    GetLogTrees = 2,
    /// Commit a transaction.
    CommitLogTrees = 3,
    /// Server asks for a commit.
    SyncLogTrees = 4,
    /// Get the stable roots.
    GetRoots = 5,
    /// Get the greatest seq with no open transaction below.
    GetLastSeq = 6,
    /// Lock request, grant, invalidation.
    Lock = 7,
    /// Server asks for the client's locks.
    LockRecover = 8,
    /// Get srch compaction work.
    SrchGetCompact = 9,
    /// Hand in srch compaction work.
    SrchCommitCompact = 10,
    /// Get log merge work.
    GetLogMerge = 11,
    /// Hand in log merge work.
    CommitLogMerge = 12,
    /// Ask which inodes of a group are open.
    OpenInoMap = 13,
    /// Get volume options.
    GetVolopt = 14,
    /// Set volume options.
    SetVolopt = 15,
    /// Clear volume options.
    ClearVolopt = 16,
    /// Grow the devices.
    ResizeDevices = 17,
    /// Get free space and counts.
    Statfs = 18,
    /// Unmounting.
    Farewell = 19,
}

impl NetCmd {
    /// The command with this number, if it is one.
    pub const fn from_value(value: u8) -> Option<Self> {
        Some(match value {
            0 => Self::Greeting,
            1 => Self::AllocInodes,
            2 => Self::GetLogTrees,
            3 => Self::CommitLogTrees,
            4 => Self::SyncLogTrees,
            5 => Self::GetRoots,
            6 => Self::GetLastSeq,
            7 => Self::Lock,
            8 => Self::LockRecover,
            9 => Self::SrchGetCompact,
            10 => Self::SrchCommitCompact,
            11 => Self::GetLogMerge,
            12 => Self::CommitLogMerge,
            13 => Self::OpenInoMap,
            14 => Self::GetVolopt,
            15 => Self::SetVolopt,
            16 => Self::ClearVolopt,
            17 => Self::ResizeDevices,
            18 => Self::Statfs,
            19 => Self::Farewell,
            _ => return None,
        })
    }
}

impl QuorumMessage {
    /// Fills in the CRC.
    pub fn seal(&mut self) {
        self.crc.set(self.computed_crc());
    }

    /// Whether the CRC is right.
    pub fn crc_ok(&self) -> bool {
        self.crc.get() == self.computed_crc()
    }

    fn computed_crc(&self) -> u32 {
        super::crc32c(&zerocopy::IntoBytes::as_bytes(self)[..28])
    }
}

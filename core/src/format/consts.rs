//! Numbers of the format: block sizes, magics, zones, types, flags and limits
//! (spec 01 sections 1, 2, 8, 9, 11 and 18).

/// Size of a small block in bytes: super blocks, quorum blocks, file data.
pub const SM_BLOCK_SIZE: usize = 4096;
/// log2 of [`SM_BLOCK_SIZE`].
pub const SM_BLOCK_SHIFT: u32 = 12;
/// Size of a large block in bytes: every metadata block but super and quorum blocks.
pub const LG_BLOCK_SIZE: usize = 65536;
/// log2 of [`LG_BLOCK_SIZE`].
pub const LG_BLOCK_SHIFT: u32 = 16;
/// Small blocks in a large block.
pub const SM_PER_LG: u64 = 16;

/// Small block number of the super block on both devices.
pub const SUPER_BLKNO: u64 = 16;
/// Small block number of the quorum block of slot 0.
pub const QUORUM_BLKNO: u64 = 17;
/// Number of quorum blocks, equal to [`QUORUM_MAX_SLOTS`].
pub const QUORUM_BLOCKS: u64 = 15;
/// Number of quorum slots.
pub const QUORUM_MAX_SLOTS: usize = 15;
/// First large block number that may be allocated on the metadata device.
pub const META_DEV_START_BLKNO: u64 = 2;
/// First small block number that may be allocated on the data device.
pub const DATA_DEV_START_BLKNO: u64 = 64;

/// Smallest supported format version.
pub const FORMAT_VERSION_MIN: u64 = 1;
/// Greatest supported format version, and the default of the tools.
pub const FORMAT_VERSION_MAX: u64 = 2;

/// [`super::SuperBlock::flags`]: set in the metadata device's copy only.
pub const SUPER_FLAG_IS_META_BDEV: u64 = 1;

/// [`super::InetAddr::family`]: an empty slot.
pub const AF_NONE: u16 = 0;
/// [`super::InetAddr::family`]: IPv4.
pub const AF_IPV4: u16 = 1;
/// [`super::InetAddr::family`]: IPv6, reserved and never used.
pub const AF_IPV6: u16 = 2;

/// Volume option number of `data_alloc_zone_blocks`.
pub const VOLOPT_DATA_ALLOC_ZONE_BLOCKS_NR: u32 = 0;
/// Bit of `data_alloc_zone_blocks` in [`super::VolumeOptions::set_bits`].
pub const VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT: u64 = 1;
/// All option bits that have a meaning.
pub const VOLOPT_KNOWN_BITS: u64 = VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT;
/// Least `data_alloc_zone_blocks` in small blocks: 4 GiB.
pub const DATA_ZONE_BLOCKS_MIN: u64 = 1 << 20;
/// Number of data zones that the bitmaps of log trees hold.
pub const DATA_ALLOC_MAX_ZONES: u64 = 1024;

/// Greatest item value in bytes.
pub const MAX_ITEM_VALUE: usize = 896;
/// Alignment of item values in a btree block, in bytes.
pub const BTREE_VALUE_ALIGN: usize = 8;
/// Size of the head of a btree block in bytes.
pub const BTREE_HEAD_SIZE: usize = 48;
/// Size of an item in a btree block in bytes, value not counted.
pub const BTREE_ITEM_SIZE: usize = 56;
/// Byte of a btree block that AVL node offsets count from.
pub const BTREE_NODE_BASE: usize = 32;
/// Buckets of the hash table at the end of leaf blocks.
pub const BTREE_HASH_BUCKETS: usize = 1512;
/// Size of the hash table at the end of leaf blocks, in bytes.
pub const BTREE_HASH_BYTES: usize = BTREE_HASH_BUCKETS * 2;
/// Byte of a leaf block at which the hash table starts.
pub const BTREE_HASH_START: usize = LG_BLOCK_SIZE - BTREE_HASH_BYTES;
/// Bytes for items and values in a leaf block.
pub const BTREE_LEAF_SPACE: usize = LG_BLOCK_SIZE - BTREE_HEAD_SIZE - BTREE_HASH_BYTES;
/// Bytes for items and values in a parent block.
pub const BTREE_PARENT_SPACE: usize = LG_BLOCK_SIZE - BTREE_HEAD_SIZE;
/// Greatest height of a btree.
pub const BTREE_MAX_HEIGHT: u8 = 20;
/// [`super::BtreeItem::flags`]: the key does not exist as of the item's seq.
pub const ITEM_FLAG_DELETION: u8 = 1;

/// Entries of an alloc list block.
pub const ALLOC_LIST_MAX_BLOCKS: usize = 8185;
/// Flag of allocator roots and list heads: the server could not fill it to its target.
pub const ALLOC_FLAG_LOW: u32 = 1;

/// Bits of a bloom block.
pub const BLOOM_BITS: u32 = 523_968;
/// Bits set for one key.
pub const BLOOM_NRS: usize = 3;
/// Byte of a bloom block at which the bits start.
pub const BLOOM_BITS_START: usize = 40;

/// [`super::LogTrees::flags`]: the log tree takes no more items.
pub const LOG_TREES_FLAG_FINALIZED: u64 = 1;
/// [`super::MountedClient::flags`]: the mount is a quorum member.
pub const MOUNTED_CLIENT_FLAG_QUORUM: u8 = 1;

/// Zone of the seq indexes of inodes.
pub const ZONE_INODE_INDEX: u8 = 4;
/// Zone of orphan items.
pub const ZONE_ORPHAN: u8 = 8;
/// Zone of quota rules.
pub const ZONE_QUOTA: u8 = 10;
/// Zone of totals over xattrs.
pub const ZONE_XATTR_TOTL: u8 = 12;
/// Zone of the index over xattrs.
pub const ZONE_XATTR_INDX: u8 = 14;
/// Zone of inodes and what belongs to them.
pub const ZONE_FS: u8 = 16;
/// Zone of lock names that have no items.
pub const ZONE_LOCK: u8 = 20;
/// Zone of log trees items.
pub const ZONE_LOG_TREES: u8 = 24;
/// Zone of mounted client items.
pub const ZONE_MOUNTED_CLIENT: u8 = 28;
/// Zone of srch file and compaction items.
pub const ZONE_SRCH: u8 = 32;
/// Zone of free extents by block number.
pub const ZONE_FREE_EXTENT_BLKNO: u8 = 36;
/// Zone of free extents by length.
pub const ZONE_FREE_EXTENT_ORDER: u8 = 40;
/// Zone of the status item of a log merge.
pub const ZONE_LOG_MERGE_STATUS: u8 = 44;
/// Zone of the ranges of a log merge that are still to be merged.
pub const ZONE_LOG_MERGE_RANGE: u8 = 48;
/// Zone of the requests of a log merge.
pub const ZONE_LOG_MERGE_REQUEST: u8 = 52;
/// Zone of the completions of a log merge.
pub const ZONE_LOG_MERGE_COMPLETE: u8 = 56;
/// Zone of merged log trees whose blocks are being freed.
pub const ZONE_LOG_MERGE_FREEING: u8 = 60;

/// Type in [`ZONE_INODE_INDEX`]: by meta_seq.
pub const TYPE_META_SEQ: u8 = 4;
/// Type in [`ZONE_INODE_INDEX`]: by data_seq.
pub const TYPE_DATA_SEQ: u8 = 8;
/// Type in [`ZONE_ORPHAN`].
pub const TYPE_ORPHAN: u8 = 4;
/// Type in [`ZONE_QUOTA`].
pub const TYPE_QUOTA_RULE: u8 = 4;
/// Type in [`ZONE_FS`]: the inode.
pub const TYPE_INODE: u8 = 4;
/// Type in [`ZONE_FS`]: a part of an xattr.
pub const TYPE_XATTR: u8 = 8;
/// Type in [`ZONE_FS`]: a directory entry by name hash.
pub const TYPE_DIRENT: u8 = 12;
/// Type in [`ZONE_FS`]: a directory entry by position.
pub const TYPE_READDIR: u8 = 16;
/// Type in [`ZONE_FS`]: a directory entry by the inode it names.
pub const TYPE_LINK_BACKREF: u8 = 20;
/// Type in [`ZONE_FS`]: a piece of a symlink target.
pub const TYPE_SYMLINK: u8 = 24;
/// Type in [`ZONE_FS`]: a file extent.
pub const TYPE_DATA_EXTENT: u8 = 28;
/// Type in [`ZONE_LOCK`]: the rename lock.
pub const TYPE_RENAME: u8 = 4;
/// Type in [`ZONE_SRCH`]: a rotated log file.
pub const TYPE_SRCH_LOG: u8 = 4;
/// Type in [`ZONE_SRCH`]: a sorted file.
pub const TYPE_SRCH_BLOCKS: u8 = 8;
/// Type in [`ZONE_SRCH`]: a compaction that nobody works on.
pub const TYPE_SRCH_PENDING: u8 = 12;
/// Type in [`ZONE_SRCH`]: a compaction that a mount works on.
pub const TYPE_SRCH_BUSY: u8 = 16;

/// Inode number of the root directory.
pub const ROOT_INO: u64 = 1;
/// First inode number after the root that may be allocated.
pub const FIRST_INO: u64 = 1024;
/// Inodes in a lock group (and in an open inode map).
pub const INODE_GROUP_NR: u64 = 1024;
/// First position of a stored directory entry.
pub const DIRENT_FIRST_POS: u64 = 2;
/// Last position of a stored directory entry.
pub const DIRENT_LAST_POS: u64 = u64::MAX - 1;

/// Bytes of an inode item in format version 1.
pub const INODE_V1_SIZE: usize = 160;
/// Bytes of an inode item in format version 2.
pub const INODE_V2_SIZE: usize = 168;
/// [`super::Inode::flags`]: an interrupted truncate must be finished.
pub const INODE_FLAG_TRUNCATE: u32 = 1;
/// [`super::Inode::flags`]: retention; format version 2 only.
pub const INODE_FLAG_RETENTION: u32 = 2;

/// Longest file name in bytes.
pub const NAME_MAX: usize = 255;
/// Longest symlink target in bytes, its NUL counted.
pub const SYMLINK_MAX: usize = 4096;
/// Greatest link count.
pub const LINK_MAX: u32 = i32::MAX as u32;
/// Longest xattr name in bytes.
pub const XATTR_MAX_NAME_LEN: usize = 255;
/// Longest xattr value in bytes.
pub const XATTR_MAX_VAL_LEN: usize = 65535;
/// Most parts of an xattr.
pub const XATTR_MAX_PARTS: usize = 74;
/// Longest text value of a totl xattr.
pub const XATTR_TOTL_MAX_TEXT: usize = 23;
/// Greatest logical block of a file.
pub const MAX_IBLOCK: u64 = (1 << 52) - 1;

/// [`super::DataExtentVal::flags`]: the blocks were released to the archive.
pub const EXTENT_FLAG_OFFLINE: u8 = 1;
/// [`super::DataExtentVal::flags`]: allocated, reads as zeros.
pub const EXTENT_FLAG_UNWRITTEN: u8 = 2;

/// Dirent type: fifo.
pub const DT_FIFO: u8 = 0;
/// Dirent type: character device.
pub const DT_CHR: u8 = 1;
/// Dirent type: directory.
pub const DT_DIR: u8 = 2;
/// Dirent type: block device.
pub const DT_BLK: u8 = 3;
/// Dirent type: regular file.
pub const DT_REG: u8 = 4;
/// Dirent type: symbolic link.
pub const DT_LNK: u8 = 5;
/// Dirent type: socket.
pub const DT_SOCK: u8 = 6;
/// Dirent type: whiteout.
pub const DT_WHT: u8 = 7;

/// Quota rule operation: number of inodes.
pub const QUOTA_OP_INODE: u8 = 0;
/// Quota rule operation: data blocks.
pub const QUOTA_OP_DATA: u8 = 1;
/// [`super::QuotaRuleVal::rule_flags`]: compare the totl's count, not its total.
pub const QUOTA_RULE_FLAG_TOTL_COUNT: u8 = 1;
/// [`super::QuotaRuleVal::name_source`]: the literal value.
pub const QUOTA_NAME_LITERAL: u8 = 0;
/// [`super::QuotaRuleVal::name_source`]: the inode's project id.
pub const QUOTA_NAME_PROJ: u8 = 1;
/// [`super::QuotaRuleVal::name_source`]: the inode's uid.
pub const QUOTA_NAME_UID: u8 = 2;
/// [`super::QuotaRuleVal::name_source`]: the inode's gid.
pub const QUOTA_NAME_GID: u8 = 3;
/// [`super::QuotaRuleVal::name_flags`]: the rule applies only where the name's value matches.
pub const QUOTA_NAME_FLAG_SELECT: u8 = 1;

/// References of a srch parent block.
pub const SRCH_PARENT_REFS: usize = 4094;
/// Byte of a srch leaf block at which the entries start.
pub const SRCH_ENTRIES_START: usize = 112;
/// Greatest `entry_bytes` at which one more entry may start.
pub const SRCH_SAFE_BYTES: usize = LG_BLOCK_SIZE - SRCH_ENTRIES_START - SRCH_ENTRY_MAX_BYTES;
/// Most bytes of an encoded srch entry.
pub const SRCH_ENTRY_MAX_BYTES: usize = 26;
/// Blocks at which a srch log file is rotated.
pub const SRCH_LOG_ROTATE_BLOCKS: u64 = 16;
/// Files joined by one compaction.
pub const SRCH_COMPACT_NR: usize = 4;
/// [`super::SrchCompact::flags`]: the inputs are unsorted log files.
pub const SRCH_COMPACT_FLAG_LOG: u8 = 1;
/// [`super::SrchCompact::flags`]: the inputs are sorted files.
pub const SRCH_COMPACT_FLAG_SORTED: u8 = 2;
/// [`super::SrchCompact::flags`]: the inputs are being deleted.
pub const SRCH_COMPACT_FLAG_DELETE: u8 = 4;
/// [`super::SrchCompact::flags`]: this step is done.
pub const SRCH_COMPACT_FLAG_DONE: u8 = 16;
/// [`super::SrchCompact::flags`]: the client gave up.
pub const SRCH_COMPACT_FLAG_ERROR: u8 = 32;

/// [`super::LogMergeRequest::flags`]: the root is a subtree, its root block must stay a parent's child.
pub const LOG_MERGE_REQUEST_FLAG_SUBTREE: u64 = 1;
/// [`super::LogMergeComplete::flags`]: the client gave up.
pub const LOG_MERGE_COMPLETE_FLAG_ERROR: u64 = 1;
/// [`super::LogMergeComplete::flags`]: `remain..end` is still to be merged.
pub const LOG_MERGE_COMPLETE_FLAG_REMAIN: u64 = 2;

/// Longest payload of a network message in bytes.
pub const NET_MAX_DATA_LEN: usize = 1100;
/// [`super::NetHeader::flags`]: the message is a response.
pub const NET_FLAG_RESPONSE: u8 = 1;
/// [`super::NetGreeting::flags`]: the client is unmounting.
pub const NET_GREETING_FLAG_FAREWELL: u64 = 1;
/// [`super::NetGreeting::flags`]: the client is a quorum member.
pub const NET_GREETING_FLAG_QUORUM: u64 = 2;
/// Most locks in one LOCK_RECOVER response.
pub const NET_LOCK_MAX_RECOVER_NR: usize = 22;

/// Quorum message: ask for a vote.
pub const QUORUM_MSG_REQUEST_VOTE: u8 = 0;
/// Quorum message: a vote.
pub const QUORUM_MSG_VOTE: u8 = 1;
/// Quorum message: the leader lives.
pub const QUORUM_MSG_HEARTBEAT: u8 = 2;
/// Quorum message: the leader steps down.
pub const QUORUM_MSG_RESIGNATION: u8 = 3;

/// The kind of a block: its magic number (spec 01 section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Magic {
    /// Super block, 4 KiB.
    Super = 0x103c_428b,
    /// Quorum block, 4 KiB.
    Quorum = 0xbc31_0868,
    /// Btree block, 64 KiB.
    Btree = 0xe597_f96d,
    /// Bloom block, 64 KiB.
    Bloom = 0x3199_5604,
    /// Srch leaf block, 64 KiB.
    SrchBlock = 0x897e_4a7d,
    /// Srch parent block, 64 KiB.
    SrchParent = 0xb23a_2a05,
    /// Alloc list block, 64 KiB.
    AllocList = 0x8a93_ac83,
}

impl Magic {
    /// The number stored in block headers.
    pub const fn value(self) -> u32 {
        self as u32
    }

    /// The kind with this number, if it is one.
    pub const fn from_value(value: u32) -> Option<Self> {
        Some(match value {
            0x103c_428b => Self::Super,
            0xbc31_0868 => Self::Quorum,
            0xe597_f96d => Self::Btree,
            0x3199_5604 => Self::Bloom,
            0x897e_4a7d => Self::SrchBlock,
            0xb23a_2a05 => Self::SrchParent,
            0x8a93_ac83 => Self::AllocList,
            _ => return None,
        })
    }

    /// Bytes of a block of this kind.
    pub const fn block_size(self) -> usize {
        match self {
            Self::Super | Self::Quorum => SM_BLOCK_SIZE,
            _ => LG_BLOCK_SIZE,
        }
    }

    /// The name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Super => "super",
            Self::Quorum => "quorum",
            Self::Btree => "btree",
            Self::Bloom => "bloom",
            Self::SrchBlock => "srch block",
            Self::SrchParent => "srch parent",
            Self::AllocList => "alloc list",
        }
    }
}

impl std::fmt::Display for Magic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A quorum event: the index of its record in a quorum block (spec 01 section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum QuorumEventKind {
    /// The agent starts.
    Begin = 0,
    /// A new greatest term was persisted.
    Term = 1,
    /// Won an election.
    Elect = 2,
    /// The server has fenced all earlier leaders.
    Fence = 3,
    /// The server stopped.
    Stop = 4,
    /// The agent ends cleanly.
    End = 5,
}

impl QuorumEventKind {
    /// All kinds in the order of their records.
    pub const ALL: [Self; 6] = [
        Self::Begin,
        Self::Term,
        Self::Elect,
        Self::Fence,
        Self::Stop,
        Self::End,
    ];

    /// The name used in messages and by `print`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Term => "term",
            Self::Elect => "elect",
            Self::Fence => "fence",
            Self::Stop => "stop",
            Self::End => "end",
        }
    }
}

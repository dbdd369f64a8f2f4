//! Values of items (spec 01 sections 12 and 13) and blocks of srch files (section 14).

use super::consts::*;
use super::structs::*;
use zerocopy::little_endian::{U16, U32, U64};

disk_struct! {
/// An inode. Format version 1 stores the first [`INODE_V1_SIZE`] bytes.
Inode, 168 {
    /// File size in bytes; directory: sum of name lengths; symlink: target with its NUL.
    0 size: U64,
    /// Transaction seq of the last metadata change.
    8 meta_seq: U64,
    /// Transaction seq of the last data change.
    16 data_seq: U64,
    /// Counts changes of contents.
    24 data_version: U64,
    /// Blocks mapped and written.
    32 online_blocks: U64,
    /// Blocks offline.
    40 offline_blocks: U64,
    /// Directory: next entry position.
    48 next_readdir_pos: U64,
    /// Next xattr id.
    56 next_xattr_id: U64,
    /// i_version.
    64 version: U64,
    /// Link count.
    72 nlink: U32,
    /// Owner.
    76 uid: U32,
    /// Group.
    80 gid: U32,
    /// Type and permissions.
    84 mode: U32,
    /// Kernel internal device number: `major << 20 | minor`.
    88 rdev: U32,
    /// [`INODE_FLAG_TRUNCATE`], [`INODE_FLAG_RETENTION`].
    92 flags: U32,
    /// Access time.
    96 atime: Timespec,
    /// Change time.
    112 ctime: Timespec,
    /// Modification time.
    128 mtime: Timespec,
    /// Creation time.
    144 crtime: Timespec,
    /// Project id, format version 2.
    160 proj: U64,
}}

disk_struct! {
/// Head of a directory entry; the name follows.
Dirent, 32 {
    /// Inode the entry names.
    0 ino: U64,
    /// Hash of the name.
    8 hash: U64,
    /// Position in the directory.
    16 pos: U64,
    /// Type, `DT_*`.
    24 kind: u8,
    /// Zero.
    25 pad: [u8; 7],
}}

disk_struct! {
/// Head of the first part of an xattr; name and value follow.
Xattr, 8 {
    /// Bytes of the value.
    0 val_len: U16,
    /// Bytes of the name.
    2 name_len: u8,
    /// Zero.
    3 pad: [u8; 5],
}}

disk_struct! {
/// Value of a file extent item.
DataExtentVal, 16 {
    /// First data block, 0 if unmapped.
    0 blkno: U64,
    /// [`EXTENT_FLAG_OFFLINE`], [`EXTENT_FLAG_UNWRITTEN`].
    8 flags: u8,
    /// Zero.
    9 pad: [u8; 7],
}}

disk_struct! {
/// Value of a total; a delta in log trees. Signed arithmetic modulo 2^64.
XattrTotlVal, 16 {
    /// Sum of values.
    0 total: U64,
    /// Number of values.
    8 count: U64,
}}

disk_struct! {
/// Value of a quota rule.
QuotaRuleVal, 48 {
    /// The three numbers of the totl's name.
    0 name_val: [U64; 3],
    /// Limit.
    24 limit: U64,
    /// Priority, greatest first.
    32 prio: u8,
    /// [`QUOTA_OP_INODE`] or [`QUOTA_OP_DATA`].
    33 op: u8,
    /// [`QUOTA_RULE_FLAG_TOTL_COUNT`].
    34 rule_flags: u8,
    /// Where each name number comes from.
    35 name_source: [u8; 3],
    /// [`QUOTA_NAME_FLAG_SELECT`] for each name number.
    38 name_flags: [u8; 3],
    /// Zero.
    41 pad: [u8; 7],
}}

disk_struct! {
/// Value of a mounted client item.
MountedClient, 40 {
    /// Address of the client's connection.
    0 addr: InetAddr,
    /// [`MOUNTED_CLIENT_FLAG_QUORUM`].
    32 flags: u8,
    /// Undefined when written by the original; written as zero.
    33 pad: [u8; 7],
}}

disk_struct! {
/// An input of a srch compaction and how far it was read.
SrchCompactInput, 104 {
    /// The file.
    0 sfl: SrchFile,
    /// Leaf block reached.
    88 blk: U64,
    /// Byte reached in that block.
    96 pos: U64,
}}

disk_struct! {
/// State of a srch compaction.
SrchCompact, 584 {
    /// Metadata blocks the compaction may allocate.
    0 meta_avail: AllocListHead,
    /// Metadata blocks the compaction freed.
    32 meta_freed: AllocListHead,
    /// Root block of the first input.
    64 id: U64,
    /// Number of inputs.
    72 nr: u8,
    /// `SRCH_COMPACT_FLAG_*`.
    73 flags: u8,
    /// Zero.
    74 pad: [u8; 6],
    /// Output file.
    80 out: SrchFile,
    /// Inputs, the first `nr` are valid.
    168 input: [SrchCompactInput; SRCH_COMPACT_NR],
}}

disk_struct! {
/// Status of a log merge.
LogMergeStatus, 56 {
    /// Next range to hand out.
    0 next_range_key: DiskKey,
    /// Requests given out.
    32 nr_requests: U64,
    /// Requests completed and not yet spliced.
    40 nr_complete: U64,
    /// Seq of the merge: log trees finalized up to it are merged.
    48 seq: U64,
}}

disk_struct! {
/// A range of keys still to be merged.
LogMergeRange, 64 {
    /// First key.
    0 start: DiskKey,
    /// Last key.
    32 end: DiskKey,
}}

disk_struct! {
/// A merge request.
LogMergeRequest, 208 {
    /// Metadata blocks the merge may allocate.
    0 meta_avail: AllocListHead,
    /// Metadata blocks the merge freed.
    32 meta_freed: AllocListHead,
    /// Log trees at the start of the merge.
    64 logs_root: BtreeRoot,
    /// Subtree of the fs root to merge into.
    88 root: BtreeRoot,
    /// First key.
    112 start: DiskKey,
    /// Last key.
    144 end: DiskKey,
    /// Log trees finalized up to this seq are inputs.
    176 input_seq: U64,
    /// Mount that works on it.
    184 rid: U64,
    /// Number of the request.
    192 seq: U64,
    /// [`LOG_MERGE_REQUEST_FLAG_SUBTREE`].
    200 flags: U64,
}}

disk_struct! {
/// A finished merge request.
LogMergeComplete, 208 {
    /// Metadata blocks left over.
    0 meta_avail: AllocListHead,
    /// Metadata blocks the merge freed.
    32 meta_freed: AllocListHead,
    /// The merged subtree.
    64 root: BtreeRoot,
    /// First key of the request.
    88 start: DiskKey,
    /// Last key of the request.
    120 end: DiskKey,
    /// First key that is not merged, with [`LOG_MERGE_COMPLETE_FLAG_REMAIN`].
    152 remain: DiskKey,
    /// Mount that worked on it.
    184 rid: U64,
    /// Number of the request.
    192 seq: U64,
    /// `LOG_MERGE_COMPLETE_FLAG_*`.
    200 flags: U64,
}}

disk_struct! {
/// A merged log tree whose blocks are being freed.
LogMergeFreeing, 64 {
    /// The log btree.
    0 root: BtreeRoot,
    /// Leaves before this key are freed.
    24 key: DiskKey,
    /// Number of the item.
    56 seq: U64,
}}

disk_struct! {
/// Head of a srch leaf block; the encoded entries follow.
SrchBlock, 112 {
    /// Block header.
    0 hdr: BlockHeader,
    /// Least entry.
    32 first: SrchEntry,
    /// Greatest entry.
    56 last: SrchEntry,
    /// Entry appended last.
    80 tail: SrchEntry,
    /// Number of entries.
    104 entry_nr: U32,
    /// Bytes of the encoded entries.
    108 entry_bytes: U32,
}}

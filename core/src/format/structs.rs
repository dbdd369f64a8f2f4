//! Structures of blocks and roots, exact to the byte (spec 01 sections 2 to 10).
//!
//! They are the in-memory state as well: fields are little endian integers with
//! `get` and `set`. Sizes and offsets are asserted when compiling, so a wrong
//! field can not be built.

use super::consts::*;
use zerocopy::little_endian::{I64, U16, U32, U64};

/// Declares a structure of the format with its size and the offset of each field.
macro_rules! disk_struct {
    ($(#[$meta:meta])* $name:ident, $size:literal {
        $( $(#[$fmeta:meta])* $off:literal $field:ident : $ty:ty ),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout,
            zerocopy::Immutable, zerocopy::Unaligned,
        )]
        #[repr(C)]
        pub struct $name {
            $( $(#[$fmeta])* pub $field: $ty, )*
        }

        impl Default for $name {
            /// All bytes zero.
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }

        const _: () = {
            assert!(std::mem::size_of::<$name>() == $size);
            $( assert!(std::mem::offset_of!($name, $field) == $off); )*
        };
    };
}
pub(super) use disk_struct;

disk_struct! {
/// Head of every block but file data.
BlockHeader, 32 {
    /// CRC of the rest of the block.
    0 crc: U32,
    /// Kind of the block, see [`Magic`].
    4 magic: U32,
    /// Volume id.
    8 fsid: U64,
    /// Version of this copy of the block.
    16 seq: U64,
    /// Own number, in units of this block's size.
    24 blkno: U64,
}}

disk_struct! {
/// Reference to a large block of the metadata device. `blkno` 0 is the null reference.
BlockRef, 16 {
    /// Large block number.
    0 blkno: U64,
    /// The seq that the block's header must have.
    8 seq: U64,
}}

disk_struct! {
/// A point in time.
Timespec, 16 {
    /// Seconds since 1970, signed.
    0 sec: I64,
    /// Nanoseconds.
    8 nsec: U32,
    /// Zero.
    12 pad: [u8; 4],
}}

disk_struct! {
/// A key as stored; see [`super::Key`] for the native form.
DiskKey, 32 {
    /// First.
    0 first: U64,
    /// Second.
    8 second: U64,
    /// Third.
    16 third: U64,
    /// Fourth.
    24 fourth: u8,
    /// Zone.
    25 zone: u8,
    /// Type.
    26 kind: u8,
    /// Zero.
    27 pad: [u8; 5],
}}

disk_struct! {
/// An internet address. Numbers are little endian, not in network order.
InetAddr, 32 {
    /// [`AF_NONE`] or [`AF_IPV4`].
    0 family: U16,
    /// Port.
    2 port: U16,
    /// IPv4 address as a number.
    4 addr: U32,
    /// Undefined when written by the original; ignored by readers, written as zero.
    8 rest: [u8; 24],
}}

disk_struct! {
/// The cluster's members.
QuorumConfig, 488 {
    /// Counts changes of the configuration.
    0 version: U64,
    /// Address of each slot; an empty slot has family [`AF_NONE`].
    8 slots: [InetAddr; QUORUM_MAX_SLOTS],
}}

disk_struct! {
/// Options of the volume that a running cluster can change.
VolumeOptions, 520 {
    /// Bit n: option n is set.
    0 set_bits: U64,
    /// Small blocks of one data zone.
    8 data_alloc_zone_blocks: U64,
    /// Options of the future, zero.
    16 reserved: [U64; 63],
}}

disk_struct! {
/// Root of a btree. Height 0 with a null reference is an empty tree.
BtreeRoot, 24 {
    /// Root block.
    0 block_ref: BlockRef,
    /// Levels of the tree.
    16 height: u8,
    /// Zero.
    17 pad: [u8; 7],
}}

disk_struct! {
/// Head of a btree block.
BtreeBlock, 48 {
    /// Block header.
    0 hdr: BlockHeader,
    /// Node offset of the root of the AVL tree, 0 if there are no items.
    32 item_root: U16,
    /// Number of items.
    34 nr_items: U16,
    /// Sum over items of 56 + the value's length rounded up to 8.
    36 total_item_bytes: U16,
    /// Bytes of the gap between items and values.
    38 mid_free_len: U16,
    /// 0 in leaves.
    40 level: u8,
    /// Zero.
    41 pad: [u8; 7],
}}

disk_struct! {
/// Links of an item in its block's AVL tree: offsets from byte 32 of the block.
AvlNode, 8 {
    /// Parent, 0 in the root.
    0 parent: U16,
    /// Left child, 0 if none.
    2 left: U16,
    /// Right child, 0 if none.
    4 right: U16,
    /// Height of the subtree, 1 without children.
    6 height: u8,
    /// Zero.
    7 pad: u8,
}}

disk_struct! {
/// An item in a btree block.
BtreeItem, 56 {
    /// AVL links.
    0 node: AvlNode,
    /// Key.
    8 key: DiskKey,
    /// Version of the item.
    40 seq: U64,
    /// Byte of the block at which the value starts, 0 without a value.
    48 val_off: U16,
    /// Bytes of the value.
    50 val_len: U16,
    /// [`ITEM_FLAG_DELETION`].
    52 flags: u8,
    /// Zero.
    53 pad: [u8; 3],
}}

disk_struct! {
/// Head of a list of metadata block numbers.
AllocListHead, 32 {
    /// First block of the list.
    0 block_ref: BlockRef,
    /// Block numbers in all blocks of the list.
    16 total_nr: U64,
    /// Block numbers in the first block.
    24 first_nr: U32,
    /// [`ALLOC_FLAG_LOW`].
    28 flags: U32,
}}

disk_struct! {
/// Head of an alloc list block; the block numbers follow.
AllocListBlock, 56 {
    /// Block header.
    0 hdr: BlockHeader,
    /// Next block of the list.
    32 next: BlockRef,
    /// Index of the first valid entry.
    48 start: U32,
    /// Number of valid entries.
    52 nr: U32,
}}

disk_struct! {
/// A tree of free extents.
AllocRoot, 40 {
    /// Sum of the extents' lengths.
    0 total_len: U64,
    /// [`ALLOC_FLAG_LOW`].
    8 flags: U32,
    /// Zero.
    12 pad: [u8; 4],
    /// The extents.
    16 root: BtreeRoot,
}}

disk_struct! {
/// The super block: the root of the volume.
SuperBlock, 1488 {
    /// Block header.
    0 hdr: BlockHeader,
    /// Unused, zero.
    32 id: U64,
    /// Format version.
    40 fmt_vers: U64,
    /// [`SUPER_FLAG_IS_META_BDEV`].
    48 flags: U64,
    /// Volume uuid.
    56 uuid: [u8; 16],
    /// Core sequence number.
    72 seq: U64,
    /// Next inode number never yet handed out.
    80 next_ino: U64,
    /// Inodes in the fs root.
    88 inode_count: U64,
    /// Large blocks of the metadata device, from 0.
    96 total_meta_blocks: U64,
    /// Small blocks of the data device, from 0.
    104 total_data_blocks: U64,
    /// Quorum members.
    112 qconf: QuorumConfig,
    /// Free metadata extents.
    600 meta_alloc: [AllocRoot; 2],
    /// Free data extents.
    680 data_alloc: AllocRoot,
    /// Blocks that the server may allocate, double buffered.
    720 server_meta_avail: [AllocListHead; 2],
    /// Blocks that the server freed, double buffered.
    784 server_meta_freed: [AllocListHead; 2],
    /// Merged items of the filesystem.
    848 fs_root: BtreeRoot,
    /// Log trees items.
    872 logs_root: BtreeRoot,
    /// State of a log merge.
    896 log_merge: BtreeRoot,
    /// Mounted client items.
    920 mounted_clients: BtreeRoot,
    /// Srch files and compactions.
    944 srch_root: BtreeRoot,
    /// Volume options.
    968 volopt: VolumeOptions,
}}

disk_struct! {
/// An event in a quorum block.
QuorumEvent, 40 {
    /// The block's write_nr when the event was written.
    0 write_nr: U64,
    /// Mount that wrote it.
    8 rid: U64,
    /// Term.
    16 term: U64,
    /// Clock of the writer, for people.
    24 ts: Timespec,
}}

disk_struct! {
/// Persistent state of a quorum slot.
QuorumBlock, 280 {
    /// Block header.
    0 hdr: BlockHeader,
    /// Counts writes of this block.
    32 write_nr: U64,
    /// One record for each [`QuorumEventKind`].
    40 events: [QuorumEvent; 6],
}}

disk_struct! {
/// Head of a bloom block; the bits follow.
BloomBlock, 40 {
    /// Block header.
    0 hdr: BlockHeader,
    /// Number of set bits.
    32 total_set: U64,
}}

disk_struct! {
/// An entry of a srch file, ordered by hash, ino, id.
SrchEntry, 24 {
    /// Hash of the xattr's name.
    0 hash: U64,
    /// Inode number.
    8 ino: U64,
    /// Id of the xattr.
    16 id: U64,
}}

disk_struct! {
/// A srch file: leaf blocks under a radix of parents.
SrchFile, 88 {
    /// Least entry.
    0 first: SrchEntry,
    /// Greatest entry.
    24 last: SrchEntry,
    /// Root block.
    48 block_ref: BlockRef,
    /// Number of leaf blocks.
    64 blocks: U64,
    /// Number of entries.
    72 entries: U64,
    /// Levels.
    80 height: u8,
    /// Zero.
    81 pad: [u8; 7],
}}

disk_struct! {
/// State of one log tree of one mount.
LogTrees, 472 {
    /// Metadata blocks the mount may allocate.
    0 meta_avail: AllocListHead,
    /// Metadata blocks the mount freed.
    32 meta_freed: AllocListHead,
    /// The log btree.
    64 item_root: BtreeRoot,
    /// Bloom block of the log btree.
    88 bloom_ref: BlockRef,
    /// Data extents the mount may allocate.
    104 data_avail: AllocRoot,
    /// Data extents the mount freed.
    144 data_freed: AllocRoot,
    /// Srch log file being written.
    184 srch_file: SrchFile,
    /// Zone size used for the bitmap, 0 for none.
    272 data_alloc_zone_blocks: U64,
    /// Zone n is bit n % 64 of word n / 64.
    280 data_alloc_zones: [U64; 16],
    /// Inodes created minus deleted in this log.
    408 inode_count_delta: I64,
    /// Seq of the transaction opened last.
    416 get_trans_seq: U64,
    /// Seq of the transaction committed last.
    424 commit_trans_seq: U64,
    /// Greatest item seq of the last commit.
    432 max_item_seq: U64,
    /// Seq at which it was finalized.
    440 finalize_seq: U64,
    /// Mount.
    448 rid: U64,
    /// Number of this log tree within the mount, from 1.
    456 nr: U64,
    /// [`LOG_TREES_FLAG_FINALIZED`].
    464 flags: U64,
}}

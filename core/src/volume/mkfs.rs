//! Making a volume (spec 01 section 19).
//!
//! The blocks are those of the original, but for two things: the AVL heights in
//! leaf blocks are right, and the metadata device is flushed before its super
//! block makes it a volume. A crash in between leaves no volume.

use super::VolumeError;
use super::key_record::write_key_record;
use super::superblock::{check_data_zone_blocks, check_quorum_config, write_super};
use crate::env::{
    AlignedBuf, BlockDevice, DeviceError, DeviceRole, Entropy, IoBuf, WallTime, WriteFlags,
};
use crate::format::*;
use crate::secure::KeyId;
use std::net::SocketAddrV4;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Least bytes of either device unless small devices are allowed: 64 GiB.
pub const MIN_DEVICE_BYTES: u64 = 64 << 30;
/// Least large blocks of a metadata device that can hold what mkfs writes.
pub const MIN_META_BLOCKS: u64 = FIRST_FREE_BLKNO + 2;
/// Least small blocks of a data device: one that can be allocated.
pub const MIN_DATA_BLOCKS: u64 = DATA_DEV_START_BLKNO + 1;

const FS_ROOT_BLKNO: u64 = 2;
const AVAIL_BLKNO: u64 = 3;
const AVAIL_FIRST: u64 = 4;
const AVAIL_NR: u64 = 1024;
const DATA_ALLOC_BLKNO: u64 = 1028;
const META_ALLOC_BLKNO: [u64; 2] = [1029, 1030];
const FIRST_FREE_BLKNO: u64 = 1031;
/// Header seq of everything mkfs writes.
const MKFS_SEQ: u64 = 1;

/// What the operator chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MkfsOptions {
    /// Format version, 1 or 2.
    pub fmt_vers: u64,
    /// Quorum slots: number and address.
    pub slots: Vec<(u64, SocketAddrV4)>,
    /// Data zone size in small blocks.
    pub data_alloc_zone_blocks: Option<u64>,
    /// Use at most this many bytes of the metadata device.
    pub max_meta_bytes: Option<u64>,
    /// Use at most this many bytes of the data device.
    pub max_data_bytes: Option<u64>,
    /// Accept devices below [`MIN_DEVICE_BYTES`].
    pub allow_small: bool,
    /// Volume id; drawn at random if `None`.
    pub fsid: Option<u64>,
    /// Volume uuid; drawn at random if `None`.
    pub uuid: Option<[u8; 16]>,
    /// Id of the cluster key; `None` trusts the network, as the original does.
    pub cluster_key: Option<KeyId>,
    /// User and group who own the root directory.
    pub owner: (u32, u32),
}

impl Default for MkfsOptions {
    /// The newest format version, no slots (one must be added), no limits.
    fn default() -> Self {
        Self {
            fmt_vers: FORMAT_VERSION_MAX,
            slots: Vec::new(),
            data_alloc_zone_blocks: None,
            max_meta_bytes: None,
            max_data_bytes: None,
            allow_small: false,
            fsid: None,
            uuid: None,
            cluster_key: None,
            owner: (0, 0),
        }
    }
}

/// What was made, or would be.
#[derive(Clone, Debug, PartialEq)]
pub struct MkfsSummary {
    /// The metadata device's super block.
    pub sb: SuperBlock,
    /// Things the operator should know, one sentence each.
    pub notices: Vec<String>,
}

/// Checks the options against the devices' sizes in bytes and lays the volume
/// out; nothing is written.
///
/// # Errors
/// The option or size that is not allowed.
pub fn plan_mkfs(
    meta_bytes: u64,
    data_bytes: u64,
    entropy: &dyn Entropy,
    options: &MkfsOptions,
) -> Result<MkfsSummary, VolumeError> {
    let mut notices = Vec::new();
    if !(FORMAT_VERSION_MIN..=FORMAT_VERSION_MAX).contains(&options.fmt_vers) {
        return Err(VolumeError::FormatVersion {
            role: DeviceRole::Meta,
            found: options.fmt_vers,
        });
    }
    let qconf = quorum_config(&options.slots)?;
    let mut size = |role, bytes, max, shift, least| {
        usable_blocks(
            role,
            bytes,
            max,
            shift,
            least,
            options.allow_small,
            &mut notices,
        )
    };
    let meta_blocks = size(
        DeviceRole::Meta,
        meta_bytes,
        options.max_meta_bytes,
        LG_BLOCK_SHIFT,
        MIN_META_BLOCKS,
    )?;
    let data_blocks = size(
        DeviceRole::Data,
        data_bytes,
        options.max_data_bytes,
        SM_BLOCK_SHIFT,
        MIN_DATA_BLOCKS,
    )?;
    let mut volopt = VolumeOptions::default();
    if let Some(zone_blocks) = options.data_alloc_zone_blocks {
        check_data_zone_blocks(zone_blocks, data_blocks)?;
        volopt.set_bits.set(VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT);
        volopt.data_alloc_zone_blocks.set(zone_blocks);
    }
    let mut sb = base_super(meta_blocks, data_blocks);
    sb.fmt_vers.set(options.fmt_vers);
    sb.uuid = options.uuid.unwrap_or_else(|| random_uuid(entropy));
    sb.hdr
        .fsid
        .set(options.fsid.unwrap_or_else(|| entropy.rid()));
    sb.qconf = qconf;
    sb.volopt = volopt;
    Ok(MkfsSummary { sb, notices })
}

/// Makes a volume on two devices. What was there before is lost.
///
/// # Errors
/// As [`plan_mkfs`], before anything is written; or a device error.
pub async fn mkfs(
    meta: &dyn BlockDevice,
    data: &dyn BlockDevice,
    entropy: &dyn Entropy,
    now: WallTime,
    options: &MkfsOptions,
) -> Result<MkfsSummary, VolumeError> {
    let summary = plan_mkfs(meta.size(), data.size(), entropy, options)?;
    let sb = &summary.sb;
    let fsid = sb.hdr.fsid.get();
    write_meta_blocks(meta, sb, root_inode(now, options.owner)).await?;
    if options.cluster_key.is_some() {
        // Without a key what is there stays: it belongs to no volume of this id.
        write_key_record(meta, fsid, options.cluster_key).await?;
    }
    for slot in 0..QUORUM_BLOCKS {
        let mut block = AlignedBuf::zeroed(SM_BLOCK_SIZE);
        init_header(
            &mut block,
            Magic::Quorum,
            fsid,
            QUORUM_BLKNO + slot,
            MKFS_SEQ,
        );
        seal(&mut block);
        let offset = (QUORUM_BLKNO + slot) << SM_BLOCK_SHIFT;
        write(meta, DeviceRole::Meta, offset, block).await?;
    }
    let data_sb = SuperBlock {
        flags: 0.into(),
        ..*sb
    };
    write_super(data, DeviceRole::Data, &data_sb).await?;
    flush(data, DeviceRole::Data).await?;
    flush(meta, DeviceRole::Meta).await?;
    write_super(meta, DeviceRole::Meta, sb).await?;
    flush(meta, DeviceRole::Meta).await?;
    Ok(summary)
}

async fn write(
    dev: &dyn BlockDevice,
    role: DeviceRole,
    offset: u64,
    block: AlignedBuf,
) -> Result<(), VolumeError> {
    let block: IoBuf = Arc::new(block);
    let done = dev.write(offset, vec![block], WriteFlags::default()).await;
    done.map_err(|source| device_error(role, source))
}

async fn flush(dev: &dyn BlockDevice, role: DeviceRole) -> Result<(), VolumeError> {
    dev.flush()
        .await
        .map_err(|source| device_error(role, source))
}

fn device_error(role: DeviceRole, source: DeviceError) -> VolumeError {
    VolumeError::Device { role, source }
}

/// Blocks of a device that the volume may use.
fn usable_blocks(
    role: DeviceRole,
    bytes: u64,
    max: Option<u64>,
    shift: u32,
    least_blocks: u64,
    allow_small: bool,
    notices: &mut Vec<String>,
) -> Result<u64, VolumeError> {
    let name = match role {
        DeviceRole::Meta => "metadata",
        DeviceRole::Data => "data",
    };
    let mut usable = bytes;
    if let Some(max) = max {
        let rounded = max >> shift << shift;
        if rounded != max {
            notices.push(format!(
                "the maximum {name} size {max} was rounded down to {rounded} bytes"
            ));
        }
        if rounded > bytes {
            notices.push(format!(
                "the maximum {name} size {rounded} exceeds the device's {bytes} bytes and was ignored"
            ));
        } else {
            usable = rounded;
        }
    }
    let too_small = |needed, can_allow| VolumeError::TooSmall {
        role,
        found: usable,
        needed,
        can_allow,
    };
    if usable >> shift < least_blocks {
        return Err(too_small(least_blocks << shift, false));
    }
    if usable < MIN_DEVICE_BYTES {
        if !allow_small {
            return Err(too_small(MIN_DEVICE_BYTES, true));
        }
        const GIB: u64 = 1 << 30;
        notices.push(format!(
            "{}.{:02} GiB is too small for the minimum 64 GiB {name} device, allowing it as asked",
            usable / GIB,
            usable % GIB * 100 / GIB
        ));
    }
    Ok(usable >> shift)
}

/// The stored form of slots given by number and address, checked.
///
/// # Errors
/// The rule of spec 01 section 6 that is broken.
pub(super) fn quorum_config(slots: &[(u64, SocketAddrV4)]) -> Result<QuorumConfig, VolumeError> {
    let mut qconf = QuorumConfig {
        version: 1.into(),
        ..QuorumConfig::default()
    };
    for (nr, addr) in slots {
        let index = usize::try_from(*nr)
            .ok()
            .filter(|nr| *nr < QUORUM_MAX_SLOTS)
            .ok_or(VolumeError::SlotRange(*nr))?;
        if qconf.slots[index].family.get() != AF_NONE {
            return Err(VolumeError::SlotTwice(index));
        }
        if addr.ip().is_unspecified() || addr.ip().is_broadcast() || addr.port() == 0 {
            return Err(VolumeError::SlotBadAddress(index, *addr));
        }
        qconf.slots[index] = InetAddr::from_v4(*addr);
    }
    check_quorum_config(&qconf)?;
    Ok(qconf)
}

/// A random uuid of version 4.
fn random_uuid(entropy: &dyn Entropy) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&entropy.next_u64().to_le_bytes());
    uuid[8..].copy_from_slice(&entropy.next_u64().to_le_bytes());
    uuid[6] = (uuid[6] & 0x0f) | 0x40;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    uuid
}

/// The metadata super block, without identity and options.
fn base_super(meta_blocks: u64, data_blocks: u64) -> SuperBlock {
    let free = meta_blocks - FIRST_FREE_BLKNO;
    let half = free.div_ceil(2);
    let alloc_root = |total_len: u64, blkno| AllocRoot {
        total_len: total_len.into(),
        root: BtreeRoot::new(BlockRef::new(blkno, MKFS_SEQ), 1),
        ..AllocRoot::default()
    };
    let mut sb = SuperBlock {
        flags: SUPER_FLAG_IS_META_BDEV.into(),
        seq: 1.into(),
        next_ino: FIRST_INO.into(),
        inode_count: 1.into(),
        total_meta_blocks: meta_blocks.into(),
        total_data_blocks: data_blocks.into(),
        meta_alloc: [
            alloc_root(half, META_ALLOC_BLKNO[0]),
            alloc_root(free - half, META_ALLOC_BLKNO[1]),
        ],
        data_alloc: alloc_root(data_blocks - DATA_DEV_START_BLKNO, DATA_ALLOC_BLKNO),
        fs_root: BtreeRoot::new(BlockRef::new(FS_ROOT_BLKNO, MKFS_SEQ), 1),
        ..SuperBlock::default()
    };
    sb.hdr.magic.set(Magic::Super.value());
    sb.hdr.blkno.set(SUPER_BLKNO);
    sb.hdr.seq.set(MKFS_SEQ);
    sb.server_meta_avail[0] = AllocListHead {
        block_ref: BlockRef::new(AVAIL_BLKNO, MKFS_SEQ),
        total_nr: AVAIL_NR.into(),
        first_nr: (AVAIL_NR as u32).into(),
        flags: 0.into(),
    };
    sb
}

/// Writes the large blocks.
async fn write_meta_blocks(
    meta: &dyn BlockDevice,
    sb: &SuperBlock,
    inode: Inode,
) -> Result<(), VolumeError> {
    let fsid = sb.hdr.fsid.get();
    let lens = sb.meta_alloc.map(|root| root.total_len.get());
    let fs_items = [
        (Key::meta_seq(0, ROOT_INO), &[][..]),
        (Key::inode(ROOT_INO), inode.to_value(sb.fmt_vers.get())),
    ];
    let data_len = sb.data_alloc.total_len.get();
    let blocks = [
        (FS_ROOT_BLKNO, leaf(fsid, FS_ROOT_BLKNO, fs_items)),
        (AVAIL_BLKNO, avail_block(fsid)),
        (
            DATA_ALLOC_BLKNO,
            extent_leaf(fsid, DATA_ALLOC_BLKNO, DATA_DEV_START_BLKNO, data_len),
        ),
        (
            META_ALLOC_BLKNO[0],
            extent_leaf(fsid, META_ALLOC_BLKNO[0], FIRST_FREE_BLKNO, lens[0]),
        ),
        (
            META_ALLOC_BLKNO[1],
            extent_leaf(
                fsid,
                META_ALLOC_BLKNO[1],
                FIRST_FREE_BLKNO + lens[0],
                lens[1],
            ),
        ),
    ];
    for (blkno, block) in blocks {
        write(meta, DeviceRole::Meta, blkno << LG_BLOCK_SHIFT, block).await?;
    }
    Ok(())
}

/// The root directory. Times have microseconds, as those of the original.
fn root_inode(now: WallTime, (uid, gid): (u32, u32)) -> Inode {
    let now = Timespec::new(now.sec, now.nsec / 1000 * 1000);
    Inode {
        nlink: 2.into(),
        uid: uid.into(),
        gid: gid.into(),
        mode: 0o040_755.into(),
        next_readdir_pos: DIRENT_FIRST_POS.into(),
        atime: now,
        ctime: now,
        mtime: now,
        crtime: now,
        ..Inode::default()
    }
}

/// The list block of the blocks that the first server may allocate.
fn avail_block(fsid: u64) -> AlignedBuf {
    let mut block = AlignedBuf::zeroed(LG_BLOCK_SIZE);
    init_header(&mut block, Magic::AllocList, fsid, AVAIL_BLKNO, MKFS_SEQ);
    let nr_at = std::mem::offset_of!(AllocListBlock, nr);
    block[nr_at..nr_at + 4].copy_from_slice(&(AVAIL_NR as u32).to_le_bytes());
    let entries = &mut block[size_of::<AllocListBlock>()..];
    for (entry, blkno) in entries
        .chunks_exact_mut(8)
        .zip(AVAIL_FIRST..AVAIL_FIRST + AVAIL_NR)
    {
        entry.copy_from_slice(&blkno.to_le_bytes());
    }
    seal(&mut block);
    block
}

/// The leaf of a tree with one free extent.
fn extent_leaf(fsid: u64, blkno: u64, start: u64, len: u64) -> AlignedBuf {
    let last = start + len - 1;
    let items = [
        (Key::free_extent_blkno(last, len), &[][..]),
        (Key::free_extent_order(last, len), &[][..]),
    ];
    leaf(fsid, blkno, items)
}

/// A leaf block of two items in key order; the second is the AVL root.
fn leaf(fsid: u64, blkno: u64, items: [(Key, &[u8]); 2]) -> AlignedBuf {
    let mut block = AlignedBuf::zeroed(LG_BLOCK_SIZE);
    init_header(&mut block, Magic::Btree, fsid, blkno, MKFS_SEQ);
    let item_at = |i: usize| BTREE_HEAD_SIZE + i * BTREE_ITEM_SIZE;
    let node_of = |i: usize| (item_at(i) - BTREE_NODE_BASE) as u16;
    let nodes = [
        AvlNode {
            parent: node_of(1).into(),
            height: 1,
            ..AvlNode::default()
        },
        AvlNode {
            left: node_of(0).into(),
            height: 2,
            ..AvlNode::default()
        },
    ];
    let mut value_end = BTREE_HASH_START;
    let mut item_bytes = 0;
    for (i, (key, value)) in items.into_iter().enumerate() {
        let room = value.len().next_multiple_of(BTREE_VALUE_ALIGN);
        value_end -= room;
        item_bytes += BTREE_ITEM_SIZE + room;
        let item = BtreeItem {
            node: nodes[i],
            key: key.into(),
            seq: 1.into(),
            val_off: if room > 0 { value_end as u16 } else { 0 }.into(),
            val_len: (value.len() as u16).into(),
            ..BtreeItem::default()
        };
        block[item_at(i)..item_at(i + 1)].copy_from_slice(item.as_bytes());
        block[value_end..value_end + value.len()].copy_from_slice(value);
        insert_hash(&mut block, &key, item_at(i) as u16);
    }
    let head = BtreeBlock {
        hdr: read_header(&block),
        item_root: node_of(1).into(),
        nr_items: (items.len() as u16).into(),
        total_item_bytes: (item_bytes as u16).into(),
        mid_free_len: ((value_end - item_at(items.len())) as u16).into(),
        ..BtreeBlock::default()
    };
    block[..BTREE_HEAD_SIZE].copy_from_slice(head.as_bytes());
    seal(&mut block);
    block
}

/// Puts an item's offset in the first free bucket from its home.
fn insert_hash(block: &mut [u8], key: &Key, offset: u16) {
    let mut bucket = leaf_bucket(key);
    loop {
        let at = BTREE_HASH_START + bucket * 2;
        if block[at..at + 2] == [0, 0] {
            block[at..at + 2].copy_from_slice(&offset.to_le_bytes());
            return;
        }
        bucket = (bucket + 1) % BTREE_HASH_BUCKETS;
    }
}

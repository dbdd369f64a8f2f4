//! Reading and writing super and quorum blocks, and the checks made at mount
//! (spec 01 sections 5, 6, 20 and 22).
//!
//! What can go wrong: another node overwrites the super in place while it is
//! read. A bad CRC is believed only after a few tries.

use super::VolumeError;
use crate::env::{AlignedBuf, BlockDevice, Clock, DeviceRole, Duration, WriteFlags, probe};
use crate::format::*;
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// Tries before a bad CRC of a super block is believed.
const SUPER_TRIES: u32 = 5;
/// Pause between those tries.
const SUPER_RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Reads one small block.
///
/// # Errors
/// What the device says.
pub async fn read_small(
    dev: &dyn BlockDevice,
    role: DeviceRole,
    blkno: u64,
) -> Result<AlignedBuf, VolumeError> {
    let buf = AlignedBuf::zeroed(SM_BLOCK_SIZE);
    let (buf, result) = dev.read(blkno << SM_BLOCK_SHIFT, buf).await;
    result.map_err(|source| VolumeError::Device { role, source })?;
    Ok(buf)
}

/// Reads one large block.
///
/// # Errors
/// What the device says.
pub async fn read_large(dev: &dyn BlockDevice, blkno: u64) -> Result<AlignedBuf, VolumeError> {
    let buf = AlignedBuf::zeroed(LG_BLOCK_SIZE);
    let (buf, result) = dev.read(blkno << LG_BLOCK_SHIFT, buf).await;
    result.map_err(|source| VolumeError::Device {
        role: DeviceRole::Meta,
        source,
    })?;
    Ok(buf)
}

/// Verifies a small block's header and gives its super block.
///
/// # Errors
/// [`VolumeError::Header`], [`VolumeError::FormatVersion`].
pub fn parse_super(
    block: &[u8],
    role: DeviceRole,
    fsid: Option<u64>,
) -> Result<SuperBlock, VolumeError> {
    verify(block, Magic::Super, fsid, SUPER_BLKNO, None).map_err(|source| VolumeError::Header {
        role,
        what: "super",
        blkno: SUPER_BLKNO,
        source,
    })?;
    let sb = SuperBlock::from_block(block);
    let found = sb.fmt_vers.get();
    if !(FORMAT_VERSION_MIN..=FORMAT_VERSION_MAX).contains(&found) {
        return Err(VolumeError::FormatVersion { role, found });
    }
    Ok(sb)
}

/// Reads and verifies the super block of a device.
///
/// # Errors
/// [`VolumeError::Device`], [`VolumeError::Header`], [`VolumeError::FormatVersion`].
pub async fn read_super(
    dev: &dyn BlockDevice,
    role: DeviceRole,
    fsid: Option<u64>,
) -> Result<SuperBlock, VolumeError> {
    let block = read_small(dev, role, SUPER_BLKNO).await?;
    parse_super(&block, role, fsid)
}

/// As [`read_super`], for a super block that a server may be overwriting: a bad
/// CRC is read again a few times.
///
/// # Errors
/// As [`read_super`].
pub async fn read_super_retrying(
    dev: &dyn BlockDevice,
    role: DeviceRole,
    fsid: Option<u64>,
    clock: &dyn Clock,
) -> Result<SuperBlock, VolumeError> {
    for _ in 1..SUPER_TRIES {
        match read_super(dev, role, fsid).await {
            Err(VolumeError::Header {
                source: HeaderError::Crc { .. },
                ..
            }) => {
                probe("super_crc_retry");
                clock.sleep_until(clock.now() + SUPER_RETRY_PAUSE).await;
            }
            other => return other,
        }
    }
    read_super(dev, role, fsid).await
}

/// Seals a super block and writes it; durable when this returns.
///
/// # Errors
/// What the device says.
pub async fn write_super(
    dev: &dyn BlockDevice,
    role: DeviceRole,
    sb: &SuperBlock,
) -> Result<(), VolumeError> {
    let mut block = AlignedBuf::zeroed(SM_BLOCK_SIZE);
    block[..size_of::<SuperBlock>()].copy_from_slice(sb.as_bytes());
    seal(&mut block);
    dev.write(
        SUPER_BLKNO << SM_BLOCK_SHIFT,
        vec![Arc::new(block)],
        WriteFlags { fua: true },
    )
    .await
    .map_err(|source| VolumeError::Device { role, source })
}

/// The super blocks of a volume's devices, checked as for a mount.
#[derive(Clone, Copy, Debug)]
pub struct MountSupers {
    /// The metadata device's.
    pub meta: SuperBlock,
    /// The data device's; it only identifies the volume.
    pub data: SuperBlock,
}

/// Reads both super blocks and makes the checks of spec 01 section 22.
///
/// # Errors
/// The first check that fails; see [`VolumeError::mount_errno`].
pub async fn read_mount_supers(
    meta: &dyn BlockDevice,
    data: &dyn BlockDevice,
    clock: &dyn Clock,
) -> Result<MountSupers, VolumeError> {
    let supers = MountSupers {
        meta: read_super_retrying(meta, DeviceRole::Meta, None, clock).await?,
        data: read_super_retrying(data, DeviceRole::Data, None, clock).await?,
    };
    supers.check(meta.size(), data.size())?;
    Ok(supers)
}

impl MountSupers {
    /// The checks that compare the super blocks with the devices and each other.
    ///
    /// # Errors
    /// The first that fails.
    pub fn check(&self, meta_bytes: u64, data_bytes: u64) -> Result<(), VolumeError> {
        for (role, sb) in [
            (DeviceRole::Meta, &self.meta),
            (DeviceRole::Data, &self.data),
        ] {
            let sizes = [
                (
                    DeviceRole::Meta,
                    sb.total_meta_blocks.get(),
                    meta_bytes >> LG_BLOCK_SHIFT,
                ),
                (
                    DeviceRole::Data,
                    sb.total_data_blocks.get(),
                    data_bytes >> SM_BLOCK_SHIFT,
                ),
            ];
            for (counted, blocks, found) in sizes {
                if blocks > found {
                    return Err(VolumeError::DeviceTooSmall {
                        role,
                        counted,
                        blocks,
                        found,
                    });
                }
            }
        }
        check_meta_flags(&self.meta, &self.data)?;
        let mismatch =
            |what, meta: String, data: String| Err(VolumeError::Mismatch { what, meta, data });
        let (m, d) = (&self.meta, &self.data);
        if m.uuid != d.uuid {
            return mismatch("uuid", hex(&m.uuid), hex(&d.uuid));
        }
        if m.fmt_vers != d.fmt_vers {
            let text = |sb: &SuperBlock| sb.fmt_vers.get().to_string();
            return mismatch("format version", text(m), text(d));
        }
        if m.hdr.fsid != d.hdr.fsid {
            let text = |sb: &SuperBlock| format!("{:016x}", sb.hdr.fsid.get());
            return mismatch("fsid", text(m), text(d));
        }
        Ok(())
    }
}

/// Checks that only the metadata device's super block has the metadata flag.
///
/// # Errors
/// [`VolumeError::MetaFlag`].
pub(super) fn check_meta_flags(meta: &SuperBlock, data: &SuperBlock) -> Result<(), VolumeError> {
    if !meta.is_meta() {
        return Err(VolumeError::MetaFlag {
            role: DeviceRole::Meta,
            marked: false,
        });
    }
    if data.is_meta() {
        return Err(VolumeError::MetaFlag {
            role: DeviceRole::Data,
            marked: true,
        });
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Reads and verifies the quorum block of a slot.
///
/// # Errors
/// [`VolumeError::Device`], [`VolumeError::Header`].
pub async fn read_quorum_block(
    meta: &dyn BlockDevice,
    fsid: u64,
    slot: usize,
) -> Result<QuorumBlock, VolumeError> {
    let role = DeviceRole::Meta;
    let blkno = QUORUM_BLKNO + slot as u64;
    let block = read_small(meta, role, blkno).await?;
    verify(&block, Magic::Quorum, Some(fsid), blkno, None).map_err(|source| {
        VolumeError::Header {
            role,
            what: "quorum",
            blkno,
            source,
        }
    })?;
    let (qb, _) = QuorumBlock::read_from_prefix(&block).expect("a small block holds it");
    Ok(qb)
}

/// Checks a quorum configuration by rules 1 to 3 of spec 01 section 6.
///
/// # Errors
/// The first rule broken.
pub fn check_quorum_config(qconf: &QuorumConfig) -> Result<(), VolumeError> {
    for (nr, slot) in qconf.slots.iter().enumerate() {
        let family = slot.family.get();
        if family != AF_NONE && family != AF_IPV4 {
            return Err(VolumeError::SlotFamily(nr, family));
        }
    }
    let present: Vec<_> = qconf.present().collect();
    if present.is_empty() {
        return Err(VolumeError::NoSlots);
    }
    for (i, (nr, addr)) in present.iter().enumerate() {
        if let Some((other, _)) = present[..i].iter().find(|(_, a)| a == addr) {
            return Err(VolumeError::SlotAddress(*other, *nr, *addr));
        }
    }
    Ok(())
}

/// Checks a data zone size against a data device of `total_data_blocks` small
/// blocks (spec 01 section 7, with the stricter rule that 1024 zones cover it).
///
/// # Errors
/// [`VolumeError::ZoneBlocks`].
pub fn check_data_zone_blocks(found: u64, total_data_blocks: u64) -> Result<(), VolumeError> {
    let least = total_data_blocks
        .div_ceil(DATA_ALLOC_MAX_ZONES)
        .max(DATA_ZONE_BLOCKS_MIN);
    if found < least || found > total_data_blocks {
        return Err(VolumeError::ZoneBlocks {
            found,
            least,
            most: total_data_blocks,
        });
    }
    Ok(())
}

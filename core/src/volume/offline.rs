//! Changes of a cleanly unmounted volume (spec 01 section 20).
//!
//! The in-use check is no lock: another host may mount meanwhile. The operator
//! must prevent that, which is why the commands want an explicit flag.

use super::VolumeError;
use super::key_record::write_key_record;
use super::mkfs::quorum_config;
use super::superblock::{check_meta_flags, read_quorum_block, read_super, write_super};
use crate::env::{BlockDevice, DeviceRole};
use crate::format::*;
use crate::secure::KeyId;
use std::net::SocketAddrV4;

/// Header seq that offline changes leave in super blocks.
const OFFLINE_SEQ: u64 = 1;

/// What a change did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// Everything was as wanted already; nothing was written.
    Unchanged,
    /// Super blocks were written.
    Changed,
}

/// Refuses a volume that a mount may be using.
///
/// # Errors
/// [`VolumeError::MountedClients`], [`VolumeError::QuorumActive`] (EBUSY), or a
/// block that can not be read.
pub async fn check_not_in_use(meta: &dyn BlockDevice, sb: &SuperBlock) -> Result<(), VolumeError> {
    if !sb.mounted_clients.block_ref.is_null() {
        return Err(VolumeError::MountedClients);
    }
    for (slot, _) in sb.qconf.present() {
        let block = read_quorum_block(meta, sb.hdr.fsid.get(), slot).await?;
        if block.may_be_running() {
            return Err(VolumeError::QuorumActive {
                slot,
                rid: block.event(QuorumEventKind::Begin).rid.get(),
            });
        }
    }
    Ok(())
}

/// Raises the format version of both super blocks to `target`. Running it again
/// after a failure in between repairs the volume.
///
/// # Errors
/// In the order of the checks: unreadable or foreign super blocks, wrong flags,
/// in use, [`VolumeError::Downgrade`].
pub async fn change_format_version(
    meta: &dyn BlockDevice,
    data: &dyn BlockDevice,
    target: u64,
) -> Result<ChangeOutcome, VolumeError> {
    if !(FORMAT_VERSION_MIN..=FORMAT_VERSION_MAX).contains(&target) {
        return Err(VolumeError::FormatVersion {
            role: DeviceRole::Meta,
            found: target,
        });
    }
    let meta_sb = read_super(meta, DeviceRole::Meta, None).await?;
    let fsid = Some(meta_sb.hdr.fsid.get());
    let data_sb = read_super(data, DeviceRole::Data, fsid).await?;
    let found = [meta_sb.fmt_vers.get(), data_sb.fmt_vers.get()];
    if found == [target; 2] {
        return Ok(ChangeOutcome::Unchanged);
    }
    check_meta_flags(&meta_sb, &data_sb)?;
    check_not_in_use(meta, &meta_sb).await?;
    if let Some(found) = found.into_iter().find(|v| *v > target) {
        return Err(VolumeError::Downgrade { found, target });
    }
    for (dev, role, mut sb) in [
        (meta, DeviceRole::Meta, meta_sb),
        (data, DeviceRole::Data, data_sb),
    ] {
        if sb.fmt_vers.get() != target {
            sb.fmt_vers.set(target);
            sb.hdr.seq.set(OFFLINE_SEQ);
            write_super(dev, role, &sb).await?;
        }
    }
    Ok(ChangeOutcome::Changed)
}

/// Replaces all quorum slots; the configuration's version goes up by one.
/// Returns the new super block.
///
/// # Errors
/// Bad slots, an unreadable super block, one that is not a metadata device's, or
/// a volume in use.
pub async fn change_quorum_config(
    meta: &dyn BlockDevice,
    slots: &[(u64, SocketAddrV4)],
) -> Result<SuperBlock, VolumeError> {
    let new = quorum_config(slots)?;
    let mut sb = read_super(meta, DeviceRole::Meta, None).await?;
    if !sb.is_meta() {
        return Err(VolumeError::MetaFlag {
            role: DeviceRole::Meta,
            marked: false,
        });
    }
    check_not_in_use(meta, &sb).await?;
    sb.qconf = QuorumConfig {
        version: (sb.qconf.version.get().wrapping_add(1)).into(),
        ..new
    };
    sb.hdr.seq.set(OFFLINE_SEQ);
    write_super(meta, DeviceRole::Meta, &sb).await?;
    Ok(sb)
}

/// Gives an unmounted volume a cluster key, another one, or none. Returns the super
/// block, which is unchanged.
///
/// # Errors
/// An unreadable super block, one that is not a metadata device's, or a volume in use.
pub async fn change_cluster_key(
    meta: &dyn BlockDevice,
    key: Option<KeyId>,
) -> Result<SuperBlock, VolumeError> {
    let sb = read_super(meta, DeviceRole::Meta, None).await?;
    if !sb.is_meta() {
        return Err(VolumeError::MetaFlag {
            role: DeviceRole::Meta,
            marked: false,
        });
    }
    check_not_in_use(meta, &sb).await?;
    write_key_record(meta, sb.hdr.fsid.get(), key).await?;
    Ok(sb)
}

/// Checks that the volume has no data and that a device of `data_bytes` bytes
/// (if given) could become its new data device.
///
/// # Errors
/// In use, [`VolumeError::DataInUse`], or a device that is too small.
pub async fn verify_empty_data_device(
    meta: &dyn BlockDevice,
    data_bytes: Option<u64>,
) -> Result<SuperBlock, VolumeError> {
    let sb = read_super(meta, DeviceRole::Meta, None).await?;
    if !sb.is_meta() {
        return Err(VolumeError::MetaFlag {
            role: DeviceRole::Meta,
            marked: false,
        });
    }
    check_not_in_use(meta, &sb).await?;
    let total = sb.total_data_blocks.get();
    let used = total
        .wrapping_sub(DATA_DEV_START_BLKNO)
        .wrapping_sub(sb.data_alloc.total_len.get());
    if used != 0 {
        return Err(VolumeError::DataInUse { used });
    }
    if let Some(found) = data_bytes
        .map(|b| b >> SM_BLOCK_SHIFT)
        .filter(|b| *b < total)
    {
        return Err(VolumeError::DeviceTooSmall {
            role: DeviceRole::Meta,
            counted: DeviceRole::Data,
            blocks: total,
            found,
        });
    }
    Ok(sb)
}

/// Makes `data` the volume's data device. What it held is lost.
///
/// # Errors
/// As [`verify_empty_data_device`], or the write's.
pub async fn prepare_empty_data_device(
    meta: &dyn BlockDevice,
    data: &dyn BlockDevice,
) -> Result<SuperBlock, VolumeError> {
    let sb = verify_empty_data_device(meta, Some(data.size())).await?;
    let mut new = SuperBlock {
        id: sb.id,
        fmt_vers: sb.fmt_vers,
        flags: (sb.flags.get() & !SUPER_FLAG_IS_META_BDEV).into(),
        uuid: sb.uuid,
        seq: sb.seq,
        total_meta_blocks: sb.total_meta_blocks,
        total_data_blocks: sb.total_data_blocks,
        ..SuperBlock::default()
    };
    new.hdr.magic.set(Magic::Super.value());
    new.hdr.fsid = sb.hdr.fsid;
    new.hdr.blkno.set(SUPER_BLKNO);
    new.hdr.seq.set(OFFLINE_SEQ);
    write_super(data, DeviceRole::Data, &new).await?;
    Ok(new)
}

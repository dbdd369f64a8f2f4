//! What can go wrong with a volume as a whole.

use crate::env::{DeviceError, DeviceRole};
use crate::errno::Errno;
use crate::format::HeaderError;
use crate::secure::KeyId;
use std::net::SocketAddrV4;
use thiserror::Error;

/// Why a volume can not be made, changed or mounted.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum VolumeError {
    /// The device failed.
    #[error("{}: {source}", role_name(*.role))]
    Device {
        /// Which device.
        role: DeviceRole,
        /// What it said.
        source: DeviceError,
    },
    /// A super or quorum block does not verify.
    #[error("{} block {blkno} of the {} device: {source}", .what, role_name(*.role))]
    Header {
        /// Which device.
        role: DeviceRole,
        /// `super` or `quorum`.
        what: &'static str,
        /// Small block number.
        blkno: u64,
        /// The difference.
        source: HeaderError,
    },
    /// The format version is not supported.
    #[error("format version {found} of the {} device is outside the supported 1-2", role_name(*.role))]
    FormatVersion {
        /// Which device.
        role: DeviceRole,
        /// Version found.
        found: u64,
    },
    /// The super block says the device is larger than it is.
    #[error(
        "the super block of the {} device counts {blocks} {} blocks, the device has {found}",
        role_name(*.role), role_name(*.counted)
    )]
    DeviceTooSmall {
        /// The device whose super block it is.
        role: DeviceRole,
        /// The device that is too small.
        counted: DeviceRole,
        /// Blocks by the super block.
        blocks: u64,
        /// Blocks of the device.
        found: u64,
    },
    /// The devices were given the wrong way round, or neither is of the kind.
    #[error("the {} device's super block {} marked as a metadata device", role_name(*.role), if *.marked {"is"} else {"is not"})]
    MetaFlag {
        /// Which device.
        role: DeviceRole,
        /// Whether the flag is set.
        marked: bool,
    },
    /// The devices belong to different volumes.
    #[error("the devices belong to different volumes: {what} {meta} on metadata, {data} on data")]
    Mismatch {
        /// `uuid`, `fsid` or `format version`.
        what: &'static str,
        /// On the metadata device.
        meta: String,
        /// On the data device.
        data: String,
    },
    /// The device is smaller than a volume needs.
    #[error(
        "the {} device has {found} bytes, less than the {needed} a volume needs{}",
        role_name(*.role), if *.can_allow { "; small devices must be allowed explicitly" } else { "" }
    )]
    TooSmall {
        /// Which device.
        role: DeviceRole,
        /// Bytes of the device or of the given maximum.
        found: u64,
        /// Bytes needed.
        needed: u64,
        /// Whether allowing small sizes would accept it.
        can_allow: bool,
    },
    /// No quorum slot was given.
    #[error("at least one quorum slot must be configured")]
    NoSlots,
    /// A quorum slot number out of range.
    #[error("quorum slot number {0} is outside 0-14")]
    SlotRange(u64),
    /// A quorum slot was given twice.
    #[error("quorum slot {0} is given twice")]
    SlotTwice(usize),
    /// Two slots have the same address.
    #[error("quorum slots {0} and {1} have the same address {2}")]
    SlotAddress(usize, usize, SocketAddrV4),
    /// An address that no host can have.
    #[error("quorum slot {0} has the unusable address {1}")]
    SlotBadAddress(usize, SocketAddrV4),
    /// A stored slot is of an unknown family.
    #[error("quorum slot {0} has the unknown address family {1}")]
    SlotFamily(usize, u16),
    /// The data zone size is not allowed.
    #[error(
        "data_alloc_zone_blocks {found} must be from {least} to {most} small blocks for this data device"
    )]
    ZoneBlocks {
        /// Given value.
        found: u64,
        /// Least allowed.
        least: u64,
        /// Most allowed.
        most: u64,
    },
    /// Mounts are recorded in the super block.
    #[error("the volume is in use: its mounted_clients tree is not empty")]
    MountedClients,
    /// A quorum member may be running.
    #[error("the volume is in use: quorum slot {slot} was begun by rid {rid:016x} and not ended")]
    QuorumActive {
        /// Slot.
        slot: usize,
        /// Mount that began.
        rid: u64,
    },
    /// The mount does not have the volume's cluster key.
    #[error("{}", key_text(.volume, .given))]
    Key {
        /// Id of the volume's key, if it has one.
        volume: Option<KeyId>,
        /// Id of the key that the mount was given, if it was given one.
        given: Option<KeyId>,
    },
    /// The record of the volume's cluster key is damaged.
    #[error(
        "the record of the volume's cluster key (small block {} of the metadata device) is damaged; \
         outrider change-cluster-key writes it again",
        super::KEY_RECORD_BLKNO
    )]
    KeyRecord,
    /// The volume's version is above the target.
    #[error("format version can not be lowered from {found} to {target}")]
    Downgrade {
        /// Version of a super block.
        found: u64,
        /// Version asked for.
        target: u64,
    },
    /// Data blocks are in use.
    #[error("{used} data blocks are in use; the data device can not be replaced by an empty one")]
    DataInUse {
        /// Small blocks that are not in the server's free extents.
        used: u64,
    },
}

fn key_text(volume: &Option<KeyId>, given: &Option<KeyId>) -> String {
    match (volume, given) {
        (Some(volume), None) => format!(
            "this volume has a cluster key ({volume}), and none was given: \
             mount with -o cluster_key=FILE"
        ),
        (None, Some(given)) => format!(
            "this volume has no cluster key, and {given} was given: mount without cluster_key, \
             or give it that key with outrider change-cluster-key"
        ),
        (Some(volume), Some(given)) => {
            format!("this volume's cluster key is {volume}, not {given}, which was given")
        }
        (None, None) => "neither the volume nor the mount has a cluster key".to_owned(),
    }
}

fn role_name(role: DeviceRole) -> &'static str {
    match role {
        DeviceRole::Meta => "metadata",
        DeviceRole::Data => "data",
    }
}

impl VolumeError {
    /// The error number that the commands report (spec 01 sections 19 to 22).
    pub fn errno(&self) -> Errno {
        match self {
            Self::Device {
                source: DeviceError::Shut,
                ..
            } => Errno::ENOLINK,
            Self::Device { .. } | Self::Header { .. } => Errno::EIO,
            Self::MountedClients | Self::QuorumActive { .. } => Errno::EBUSY,
            Self::Downgrade { .. } | Self::Key { .. } => Errno::EPERM,
            _ => Errno::EINVAL,
        }
    }

    /// The error number of a failed mount: everything but a device error
    /// (EIO) and a wrong cluster key (EPERM) is EINVAL (spec 01 section 22).
    pub fn mount_errno(&self) -> Errno {
        match self {
            Self::Device { .. } | Self::Key { .. } => self.errno(),
            _ => Errno::EINVAL,
        }
    }
}

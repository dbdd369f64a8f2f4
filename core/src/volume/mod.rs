//! Whole volumes: making them, changing them offline, checking every invariant,
//! printing what they hold (spec 01 sections 19 to 25, 17 sections 11 and 12).
//!
//! Everything works over [`crate::env::BlockDevice`], so the tools, the
//! simulator and the tests run the same code. Reading trusts nothing: every
//! block is verified and every offset checked.

pub mod check;
mod error;
mod key_record;
mod mkfs;
mod offline;
pub mod print;
mod superblock;

pub use check::{CheckOptions, Report, check};
pub use error::VolumeError;
pub use key_record::{KEY_RECORD_BLKNO, check_key, read_key_record, write_key_record};
pub use mkfs::{
    MIN_DATA_BLOCKS, MIN_DEVICE_BYTES, MIN_META_BLOCKS, MkfsOptions, MkfsSummary, mkfs, plan_mkfs,
};
pub use offline::{
    ChangeOutcome, change_cluster_key, change_format_version, change_quorum_config,
    check_not_in_use, prepare_empty_data_device, verify_empty_data_device,
};
pub use superblock::{
    MountSupers, check_data_zone_blocks, check_quorum_config, parse_super, read_large,
    read_mount_supers, read_quorum_block, read_small, read_super, read_super_retrying, write_super,
};

#[cfg(any(test, feature = "testing"))]
pub mod golden;
#[cfg(test)]
mod tests;

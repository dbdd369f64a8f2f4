//! `outrider change-cluster-key META`: give an unmounted volume a cluster key,
//! another one, or none.

use super::keygen::read_key;
use crate::block_on::block_on;
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use outrider_core::secure::ClusterKey;
use outrider_core::volume::change_cluster_key;
use std::path::PathBuf;

/// Give an unmounted volume a cluster key, another one, or none.
///
/// Only the key's id is stored on the metadata device, so that a mount with another
/// key or none fails with the reason. No host may mount the volume meanwhile.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider change-cluster-key -F --key /etc/outrider/volume.key /dev/vdb\n  \
    outrider change-cluster-key -F --none /dev/vdb")]
pub struct Args {
    /// The volume is unmounted everywhere. Required.
    #[arg(short = 'F', long, required = true)]
    offline: bool,
    /// File of the new key, made by outrider keygen.
    #[arg(long, value_name = "FILE", required_unless_present = "none")]
    key: Option<PathBuf>,
    /// No key: trust the network, as the original does.
    #[arg(long, conflicts_with = "key")]
    none: bool,
    /// Metadata device.
    #[arg(value_name = "META")]
    meta: PathBuf,
}

impl Args {
    /// Changes it and says what it is now.
    pub fn run(self) -> Result<(), CmdError> {
        let key = self.key.as_deref().map(read_key).transpose()?;
        let meta = FileDevice::open(&self.meta, Access::Exclusive)?;
        let id = key.as_ref().map(ClusterKey::id);
        let sb = block_on(change_cluster_key(&meta, id))?;
        let fsid = sb.hdr.fsid.get();
        match id {
            Some(id) => println!("Volume {fsid:016x} has the cluster key {id} now."),
            None => println!("Volume {fsid:016x} has no cluster key now: it trusts its network."),
        }
        Ok(())
    }
}

//! `outrider keygen FILE`: make a cluster key.

use crate::block_on::SystemEntropy;
use crate::error::CmdError;
use outrider_core::errno::Errno;
use outrider_mount::key_file::{self, KeyFileError};
use std::path::{Path, PathBuf};

/// Make a cluster key in a new file.
///
/// With a cluster key every connection between the mounts of a volume is mutually
/// authenticated and encrypted, and nobody without it can learn, change or stop
/// anything by the cluster's ports. Copy the file to each host over a secure way; it
/// must be readable by its owner only. Without a key the volume trusts its network,
/// as the original does: the choice for clusters with original nodes in them.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider keygen /etc/outrider/volume.key\n  \
    outrider mkfs --cluster-key /etc/outrider/volume.key -Q 0,10.0.0.1,12345 /dev/vdb /dev/vdc\n  \
    outrider mount -o metadev_path=/dev/vdb,quorum_slot_nr=0,cluster_key=/etc/outrider/volume.key \\\n    \
    /dev/vdc /mnt/volume\n  \
    outrider keygen --id /etc/outrider/volume.key")]
pub struct Args {
    /// Print the id of the key that FILE holds; make none.
    #[arg(long)]
    id: bool,
    /// File of the key. A new one is readable by its owner only; an existing file is
    /// never written over.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Args {
    /// Makes the key, or reads it, and prints its id.
    pub fn run(self) -> Result<(), CmdError> {
        let key = if self.id {
            read_key(&self.file)?
        } else {
            create_key(&self.file)?
        };
        println!("{}", key.id());
        Ok(())
    }
}

fn failed(error: KeyFileError) -> CmdError {
    CmdError::new(Errno(error.raw_os_error()), error)
}

/// Makes a key in a new file.
pub fn create_key(path: &Path) -> Result<outrider_core::secure::ClusterKey, CmdError> {
    let entropy =
        SystemEntropy::new().map_err(|e| CmdError::io("open", Path::new("/dev/urandom"), &e))?;
    key_file::create(path, &entropy).map_err(failed)
}

/// The key that a file holds.
pub fn read_key(path: &Path) -> Result<outrider_core::secure::ClusterKey, CmdError> {
    key_file::read(path).map_err(failed)
}

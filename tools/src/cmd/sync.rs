//! `outrider sync PATH`: make a mount's changes durable.
//!
//! `sync(2)` and `syncfs(2)` send nothing to an ordinary FUSE mount, so programs
//! that rely on them wait for the regular commit; this does not.

use crate::error::CmdError;
use outrider_mount::ioctl;
use std::fs::File;
use std::path::PathBuf;

/// Commit all changes of the mounts that hold the given files or directories.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Any file or directory of a mounted volume.
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
}

impl Args {
    /// Returns when everything that was changed before is durable.
    pub fn run(self) -> Result<(), CmdError> {
        for path in &self.paths {
            let file = File::open(path).map_err(|e| CmdError::io("open", path, &e))?;
            ioctl::sync(&file).map_err(|e| CmdError::io("sync", path, &e))?;
        }
        Ok(())
    }
}

//! `outrider umount DIR`: unmount and wait until everything is committed.

use crate::error::CmdError;
use outrider_core::errno::Errno;
use outrider_disk::lock::wait_file_unlocked;
use outrider_mount::daemon;
use outrider_mount::kernel::{self, Unmount};
use std::path::PathBuf;

/// Unmount a volume; returns when its daemon has committed and ended.
///
/// `umount(8)` returns earlier, when the kernel is done, unless it finds this
/// program as /sbin/umount.fuse.outrider.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Examples:\n  outrider umount /mnt/volume\n  outrider umount -f /mnt/volume"
)]
pub struct Args {
    /// Force: what was not synced is lost, and the mount has to be fenced.
    #[arg(short, long)]
    force: bool,
    /// Take it out of the tree now, end it when its last user leaves.
    #[arg(short, long)]
    lazy: bool,
    /// The mounted directory.
    dir: PathBuf,
}

impl Args {
    /// Does it.
    pub fn run(self) -> Result<(), CmdError> {
        let dir = daemon::full_path(&self.dir);
        let run_file = daemon::run_file(&dir)
            .map_err(|e| CmdError::new(Errno::EIO, format!("run directory: {e}")))?;
        let how = Unmount {
            force: self.force,
            lazy: self.lazy,
        };
        kernel::unmount(&dir, how).map_err(|e| CmdError::io("unmount", &dir, &e))?;
        if self.lazy {
            return Ok(());
        }
        if let Ok(file) = std::fs::File::open(&run_file) {
            wait_file_unlocked(&file).map_err(|e| CmdError::io("wait for", &run_file, &e))?;
        }
        Ok(())
    }
}

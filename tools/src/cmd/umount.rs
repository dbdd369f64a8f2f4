//! `outrider umount DIR`: unmount and wait until everything is committed.

use crate::error::CmdError;
use outrider_core::errno::Errno;
use outrider_disk::lock::wait_file_unlocked;
use outrider_mount::daemon::{self, Word};
use outrider_mount::kernel::{self, Unmount};
use std::path::PathBuf;

/// Unmount a volume; returns when its daemon has committed and ended.
///
/// `umount(8)` returns earlier, when the kernel is done, unless it finds this
/// program as /sbin/umount.fuse.outrider; newer ones look for it only where the mount
/// has an entry in /run/mount/utab, which the option _netdev makes `mount -t` write.
/// A mount at the same place waits for the daemon before it in any case.
///
/// Exit code 0: everything is committed (with -f: the mount has ended). 1: it is
/// still mounted, or it has ended without committing everything; stderr says which.
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
        // Before the unmount: whoever mounts here next starts a new word in it.
        let file = std::fs::File::open(&run_file);
        kernel::unmount(&dir, how).map_err(|e| CmdError::io("unmount", &dir, &e))?;
        if self.lazy {
            return Ok(());
        }
        let Ok(file) = file else { return Ok(()) };
        wait_file_unlocked(&file).map_err(|e| CmdError::io("wait for", &run_file, &e))?;
        let word = Word::read(&file).map_err(|e| CmdError::io("read", &run_file, &e))?;
        self.judge(word)
    }

    /// What the daemon's last word means for who asked for the unmount.
    fn judge(&self, word: Word) -> Result<(), CmdError> {
        match word {
            Word::Clean => Ok(()),
            Word::Forced(said) if self.force => {
                eprintln!("{said}");
                Ok(())
            }
            Word::Forced(said) => Err(CmdError::new(Errno::EIO, said)),
            Word::Failed(errno, said) => Err(CmdError::new(errno, said)),
            Word::None => Err(CmdError::new(
                Errno::EIO,
                "it is unmounted, but its daemon was gone or killed: what was not synced is lost",
            )),
        }
    }
}

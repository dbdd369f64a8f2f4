//! `outrider mount DATA DIR`: mount a volume (spec 17 section 1).

use crate::error::CmdError;
use outrider_core::errno::Errno;
use outrider_mount::daemon::{self, DaemonConfig};
use outrider_mount::options::MountOptions;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Mount a volume at a directory.
///
/// Returns when the mount is usable and leaves a daemon behind; with --foreground
/// it stays. After a crash the mount waits until its predecessor is proved gone:
/// fence=local (the default) proves it for mounts of this host, fence=assume-dead
/// is your word that no other mount of the volume can exist any more.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider mount -o metadev_path=/dev/vdb,quorum_slot_nr=0 /dev/vdc /mnt/volume\n  \
    outrider mount --foreground -o metadev_path=meta,quorum_slot_nr=0 data dir\n  \
    mount -t fuse.outrider -o metadev_path=/dev/vdb /dev/vdc /mnt/volume\n    \
    (with a link named /sbin/mount.fuse.outrider to this program)")]
pub struct Args {
    /// Options, comma separated: metadev_path=DEVICE (required), quorum_slot_nr=N,
    /// fence=local|assume-dead, cluster_key=FILE, noacl, ro, and the others of the manual.
    #[arg(short, value_name = "OPTIONS")]
    options: String,
    /// Stay in the foreground; SIGINT or SIGTERM unmounts.
    #[arg(short, long)]
    foreground: bool,
    /// File descriptor to report to when the mount is usable.
    #[arg(long, hide = true)]
    ready_fd: Option<i32>,
    /// Data device.
    data: PathBuf,
    /// Directory.
    dir: PathBuf,
}

impl Args {
    /// Does it.
    pub fn run(self) -> Result<(), CmdError> {
        let options = MountOptions::parse(&self.options)
            .map_err(|error| CmdError::new(Errno::EINVAL, error))?;
        if !self.foreground {
            return self.in_background();
        }
        super::log_to_stderr();
        let config = DaemonConfig {
            data: self.data,
            mountpoint: self.dir,
            options,
        };
        let ready_fd = self.ready_fd;
        daemon::run(&config, move || report_ready(ready_fd))
            .map_err(|error| CmdError::new(error.errno(), error))
    }

    /// Starts a daemon and waits until it is ready or has failed.
    fn in_background(self) -> Result<(), CmdError> {
        let fail = |what: &'static str| {
            move |e: std::io::Error| CmdError::new(Errno::EIO, format!("{what}: {e}"))
        };
        let program = std::env::current_exe().map_err(fail("own program"))?;
        let run_file = daemon::run_file(&self.dir).map_err(fail("run directory"))?;
        let log = run_file.with_extension("log");
        let log_file = std::fs::File::create(&log).map_err(|e| CmdError::io("create", &log, &e))?;
        let (mut reader, writer) = std::io::pipe().map_err(fail("pipe"))?;
        let fd = writer.as_raw_fd();
        let mut command = Command::new(program);
        command
            .args([
                "mount",
                "--foreground",
                "--ready-fd",
                &fd.to_string(),
                "-o",
                &self.options,
            ])
            .arg("--")
            .args([absolute(&self.data), absolute(&self.dir)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file);
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::setsid();
                libc::fcntl(fd, libc::F_SETFD, 0);
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(fail("starting the daemon"))?;
        drop(writer);
        let mut answer = [0; 1];
        if matches!(reader.read(&mut answer), Ok(1)) {
            return Ok(());
        }
        let _ = child.wait();
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        Err(CmdError::new(Errno::EIO, said.trim_end()))
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn report_ready(fd: Option<i32>) {
    match fd {
        // SAFETY: the parent passed this descriptor to us alone.
        Some(fd) => {
            let mut pipe = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
            let _ = pipe.write_all(b"+");
        }
        None => println!("ready"),
    }
}

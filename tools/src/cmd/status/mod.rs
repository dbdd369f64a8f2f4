//! `outrider status`: clusters at a glance.
//!
//! * [`gather`]: what the runtime directories of this host's mounts and the quorum
//!   blocks on the metadata devices say, as one JSON value for each volume.
//! * [`text`]: the same for people.
//!
//! What can go wrong: a volume whose leader runs on another host. Then only its quorum
//! blocks and the mounts of this host are known, and the text says so.

mod gather;
mod text;

use crate::error::CmdError;
use outrider_core::errno::Errno;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Show clusters at a glance: leader, term, members, clients, locks, commits, merge
/// backlog, and who waits for whom.
///
/// Without arguments all volumes that have a mount on this host. What the server knows
/// (clients, locks, waits) is shown on the host of the leader; on others the quorum
/// blocks of the metadata device tell who leads.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider status                         all volumes mounted on this host\n  \
    outrider status /mnt/data               the volume mounted there\n  \
    outrider status /dev/mapper/meta        the volume on this metadata device\n  \
    outrider status --watch                 anew each second, until Ctrl-C\n  \
    outrider status --json | jq '.volumes[].leader'")]
pub struct Args {
    /// Mount points, or metadata devices; all mounts of this host if none.
    #[arg(value_name = "MOUNT|META")]
    paths: Vec<PathBuf>,
    /// One JSON object, for scripts.
    #[arg(long)]
    json: bool,
    /// Show it again and again, SECONDS apart.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
    /// Where the mounts' runtime directories are, if they were mounted with `-o run_dir`.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

impl Args {
    /// Does it.
    pub fn run(self) -> Result<(), CmdError> {
        let base = self.run_dir.clone();
        let base = base.unwrap_or_else(outrider_mount::rundir::default_base);
        loop {
            let volumes = gather::volumes(&base, &self.paths)?;
            let mut out = if self.json {
                format!("{:#}\n", json!({ "volumes": volumes }))
            } else {
                text::all(&volumes, &base)
            };
            if self.watch.is_some() && !self.json {
                // Home, and clear what is below.
                out = format!("\x1b[H\x1b[J{out}");
            }
            let mut stdout = std::io::stdout().lock();
            let written = stdout.write_all(out.as_bytes());
            match written.and_then(|()| stdout.flush()) {
                // The reader has seen enough.
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                Err(e) => return Err(CmdError::new(Errno::EIO, format!("output: {e}"))),
                Ok(()) => {}
            }
            match self.watch {
                Some(seconds) => std::thread::sleep(Duration::from_secs(seconds)),
                None => return Ok(()),
            }
        }
    }
}

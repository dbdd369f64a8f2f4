//! The commands. Each has a file with its `Args` (clap) and `run`.

pub mod bench;
pub mod change_cluster_key;
pub mod change_format_version;
pub mod change_quorum_config;
pub mod check;
pub mod completions;
pub mod fenced;
pub mod get_fiemap;
pub mod keygen;
pub mod man;
pub mod mkfs;
pub mod mount;
pub mod prepare_empty_data_device;
pub mod print;
pub mod stat;
pub mod status;
pub mod sync;
pub mod umount;
pub mod up;
pub mod walk_inodes;

use crate::error::CmdError;
use clap::Subcommand;
use outrider_core::errno::Errno;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make a volume on two devices
    Mkfs(mkfs::Args),
    /// Check every invariant of a volume
    Check(check::Args),
    /// Mount a volume
    Mount(mount::Args),
    /// Unmount a volume and wait until it is committed
    Umount(umount::Args),
    /// Make a volume in two files and mount it, no flags needed
    Up(up::Args),
    /// Show clusters at a glance: leader, members, clients, locks, who waits for whom
    Status(status::Args),
    /// Answer the fence requests of mounts on this host
    Fenced(fenced::Args),
    /// Print all metadata of a volume
    Print(print::Args),
    /// Raise the format version of an unmounted volume
    ChangeFormatVersion(change_format_version::Args),
    /// Replace the quorum slots of an unmounted volume
    ChangeQuorumConfig(change_quorum_config::Args),
    /// Make a cluster key
    Keygen(keygen::Args),
    /// Give an unmounted volume a cluster key, another one, or none
    ChangeClusterKey(change_cluster_key::Args),
    /// Make an empty data device for an unmounted volume that holds no data
    PrepareEmptyDataDevice(prepare_empty_data_device::Args),
    /// List the extents of a file
    GetFiemap(get_fiemap::Args),
    /// Show seqs, version and blocks of a file
    Stat(stat::Args),
    /// List inodes in the order in which they last changed
    WalkInodes(walk_inodes::Args),
    /// Make a mount's changes durable
    Sync(sync::Args),
    /// Measure a directory, or two side by side
    Bench(bench::Args),
    /// Print the completion script of a shell
    Completions(completions::Args),
    /// Write the manual pages to a directory
    Man(man::Args),
}

impl Command {
    /// The name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mkfs(_) => "mkfs",
            Self::Check(_) => "check",
            Self::Mount(_) => "mount",
            Self::Umount(_) => "umount",
            Self::Up(_) => "up",
            Self::Status(_) => "status",
            Self::Fenced(_) => "fenced",
            Self::Print(_) => "print",
            Self::ChangeFormatVersion(_) => "change-format-version",
            Self::ChangeQuorumConfig(_) => "change-quorum-config",
            Self::Keygen(_) => "keygen",
            Self::ChangeClusterKey(_) => "change-cluster-key",
            Self::PrepareEmptyDataDevice(_) => "prepare-empty-data-device",
            Self::GetFiemap(_) => "get-fiemap",
            Self::Stat(_) => "stat",
            Self::WalkInodes(_) => "walk-inodes",
            Self::Sync(_) => "sync",
            Self::Bench(_) => "bench",
            Self::Completions(_) => "completions",
            Self::Man(_) => "man",
        }
    }

    /// Does it.
    pub fn run(self) -> Result<ExitCode, CmdError> {
        match self {
            Self::Mkfs(args) => done(args.run()),
            Self::Check(args) => args.run(),
            Self::Mount(args) => done(args.run()),
            Self::Umount(args) => done(args.run()),
            Self::Up(args) => done(args.run()),
            Self::Status(args) => done(args.run()),
            Self::Fenced(args) => args.run(),
            Self::Print(args) => done(args.run()),
            Self::ChangeFormatVersion(args) => done(args.run()),
            Self::ChangeQuorumConfig(args) => done(args.run()),
            Self::Keygen(args) => done(args.run()),
            Self::ChangeClusterKey(args) => done(args.run()),
            Self::PrepareEmptyDataDevice(args) => done(args.run()),
            Self::GetFiemap(args) => done(args.run()),
            Self::Stat(args) => done(args.run()),
            Self::WalkInodes(args) => done(args.run()),
            Self::Sync(args) => done(args.run()),
            Self::Bench(args) => done(bench::run(&args).map_err(|e| CmdError::new(Errno::EIO, e))),
            Self::Completions(args) => done(args.run()),
            Self::Man(args) => done(args.run()),
        }
    }
}

fn done(result: Result<(), CmdError>) -> Result<ExitCode, CmdError> {
    result.map(|()| ExitCode::SUCCESS)
}

/// Where a command finds its mount if it is not told: `SCOUTFS_MOUNT_PATH`, or the
/// current directory (spec 17 section 9).
fn mount_path(given: Option<&Path>) -> PathBuf {
    let from_environment = || std::env::var_os("SCOUTFS_MOUNT_PATH").map(PathBuf::from);
    given
        .map(Path::to_owned)
        .or_else(from_environment)
        .unwrap_or_else(|| PathBuf::from("."))
}

/// Sends the log of a daemon in the foreground to stderr; `OUTRIDER_LOG` chooses
/// what (like `info` or `outrider_core::server=debug`), warnings by default.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("OUTRIDER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}

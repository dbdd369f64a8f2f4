//! The commands. Each has a file with its `Args` (clap) and `run`.

pub mod bench;
pub mod change_format_version;
pub mod change_quorum_config;
pub mod check;
pub mod completions;
pub mod man;
pub mod mkfs;
pub mod prepare_empty_data_device;

use crate::error::CmdError;
use clap::Subcommand;
use outrider_core::errno::Errno;
use std::process::ExitCode;

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make a volume on two devices
    Mkfs(mkfs::Args),
    /// Check every invariant of a volume
    Check(check::Args),
    /// Raise the format version of an unmounted volume
    ChangeFormatVersion(change_format_version::Args),
    /// Replace the quorum slots of an unmounted volume
    ChangeQuorumConfig(change_quorum_config::Args),
    /// Make an empty data device for an unmounted volume that holds no data
    PrepareEmptyDataDevice(prepare_empty_data_device::Args),
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
            Self::ChangeFormatVersion(_) => "change-format-version",
            Self::ChangeQuorumConfig(_) => "change-quorum-config",
            Self::PrepareEmptyDataDevice(_) => "prepare-empty-data-device",
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
            Self::ChangeFormatVersion(args) => done(args.run()),
            Self::ChangeQuorumConfig(args) => done(args.run()),
            Self::PrepareEmptyDataDevice(args) => done(args.run()),
            Self::Bench(args) => done(bench::run(&args).map_err(|e| CmdError::new(Errno::EIO, e))),
            Self::Completions(args) => done(args.run()),
            Self::Man(args) => done(args.run()),
        }
    }
}

fn done(result: Result<(), CmdError>) -> Result<ExitCode, CmdError> {
    result.map(|()| ExitCode::SUCCESS)
}

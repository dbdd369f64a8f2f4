//! `outrider man DIR`.

use crate::error::CmdError;
use clap::CommandFactory;
use std::path::PathBuf;

/// Write the manual pages to a directory.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  outrider man /usr/local/share/man/man8")]
pub struct Args {
    /// An existing directory; one page for the program and one for each command.
    dir: PathBuf,
}

impl Args {
    /// Writes the pages.
    pub fn run(self) -> Result<(), CmdError> {
        clap_mangen::generate_to(crate::Cli::command(), &self.dir)
            .map_err(|e| CmdError::io("write manual pages to", &self.dir, &e))
    }
}

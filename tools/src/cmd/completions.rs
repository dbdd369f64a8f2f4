//! `outrider completions SHELL`.

use crate::error::CmdError;
use clap::CommandFactory;

/// Print the completion script of a shell.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider completions bash > /etc/bash_completion.d/outrider\n  \
    outrider completions fish > ~/.config/fish/completions/outrider.fish")]
pub struct Args {
    /// The shell.
    shell: clap_complete::Shell,
}

impl Args {
    /// Prints it on stdout.
    pub fn run(self) -> Result<(), CmdError> {
        let mut command = crate::Cli::command();
        let mut stdout = std::io::stdout();
        clap_complete::generate(self.shell, &mut command, "outrider", &mut stdout);
        Ok(())
    }
}

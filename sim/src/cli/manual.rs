//! The manual pages and the completion scripts of this program.

use clap::CommandFactory;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "Example:\n  outrider-sim man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// An existing directory; one page for the program and one for each command.
    dir: PathBuf,
}

/// Writes the manual pages.
pub fn man(args: &ManArgs) -> Result<bool, String> {
    let written = clap_mangen::generate_to(super::Args::command(), &args.dir);
    written.map_err(|error| format!("{}: {error}", args.dir.display()))?;
    Ok(true)
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim completions bash > /etc/bash_completion.d/outrider-sim\n  \
    outrider-sim completions fish > ~/.config/fish/completions/outrider-sim.fish")]
pub struct CompletionsArgs {
    /// The shell.
    shell: clap_complete::Shell,
}

/// Prints the completion script of a shell.
pub fn completions(args: &CompletionsArgs) {
    let mut command = super::Args::command();
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "outrider-sim", &mut script);
    print!("{}", String::from_utf8_lossy(&script));
}

#[cfg(test)]
mod tests {
    use super::super::Args;
    use super::*;

    #[test]
    fn every_command_has_a_page_and_examples() {
        let dir = tempfile::tempdir().unwrap();
        let args = ManArgs {
            dir: dir.path().to_owned(),
        };
        assert_eq!(man(&args), Ok(true));
        for command in Args::command().get_subcommands() {
            let name = command.get_name();
            let page = dir.path().join(format!("outrider-sim-{name}.1"));
            let text = std::fs::read_to_string(&page).unwrap();
            assert!(text.contains("Example"), "{name} has no example");
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("outrider-sim "), "{name}: {help}");
        }
    }
}

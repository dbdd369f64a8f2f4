//! `outrider`: the operator's binary. Each command is one file below `cmd/`.
//!
//! Exit codes and messages are those of spec 17 section 9: 0 success, 1 a
//! command that failed or does not exist, 64 bad usage. Called by another name
//! (a link named `scoutfs`), messages use that name.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    reason = "this crate faces the real machine: clocks and threads are its job"
)]

mod block_on;
mod cmd;
mod error;
mod filedev;
mod helper;
mod known;
mod number;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use std::process::ExitCode;

/// ScoutFS volumes: make, check, print, change and use them.
#[derive(Parser, Debug)]
#[command(
    name = "outrider",
    version,
    infer_long_args = true,
    subcommand_required = true,
    after_help = "Supported format version: 1-2"
)]
struct Cli {
    #[command(subcommand)]
    command: cmd::Command,
}

fn main() -> ExitCode {
    let args = helper::rewrite(std::env::args_os().collect());
    let program = program_name(args.first());
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(e) => return usage_error(&program, &args, &e),
    };
    let name = cli.command.name();
    match cli.command.run() {
        Ok(code) => code,
        Err(e) => {
            e.report(&program, name);
            ExitCode::FAILURE
        }
    }
}

/// The base name under which the program was called.
fn program_name(arg0: Option<&std::ffi::OsString>) -> String {
    arg0.map(std::path::Path::new)
        .and_then(|path| path.file_name())
        .map_or_else(
            || "outrider".into(),
            |name| name.to_string_lossy().into_owned(),
        )
}

/// Reports a command line that clap refused.
fn usage_error(program: &str, args: &[std::ffi::OsString], e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A closed pipe is the reader's choice.
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    let command = args.get(1).map(|arg| arg.to_string_lossy().into_owned());
    let known = command
        .as_deref()
        .is_some_and(|name| Cli::command().find_subcommand(name).is_some());
    if !known {
        let name = command.unwrap_or_default();
        eprintln!("{program}: unrecognized command: '{name}'");
        eprintln!("{}", Cli::command().render_help());
        return ExitCode::FAILURE;
    }
    let name = command.unwrap_or_default();
    let text = e.render().to_string();
    let message = text.trim_start_matches("error: ");
    let message = message.split("\n\n").next().unwrap_or(message);
    eprintln!("{name}: {message}");
    eprintln!("Try `{name} --help' or `{name} --usage' for more information.");
    ExitCode::from(64)
}

//! `outrider-sim`: sweeps of seeds, replays, planted bugs.

#![recursion_limit = "256"]

#[cfg(madsim)]
mod cli;

#[cfg(madsim)]
fn main() -> std::process::ExitCode {
    cli::main()
}

#[cfg(not(madsim))]
fn main() -> std::process::ExitCode {
    eprintln!(
        "outrider-sim was built without its executor: run cargo inside the workspace, whose \
         .cargo/config.toml sets `--cfg madsim`, and without RUSTFLAGS in the environment \
         (or with RUSTFLAGS=\"--cfg madsim\" added to it)"
    );
    std::process::ExitCode::from(2)
}

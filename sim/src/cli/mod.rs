//! The command line. Exit codes: 0 clean, 1 failures found, 2 could not run.

mod cost;
mod explain;
mod explore;
mod mutants;
mod replay;
mod report;
mod show;
mod shrink;
mod sweep;

use clap::{Parser, Subcommand};
use outrider_sim::case::Case;
use outrider_sim::plan::{PROFILES, Plan, Profile};
use outrider_sim::reference::Reference;
use outrider_sim::world::{self, Options, Outcome, node::Outrider};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "outrider-sim",
    about = "Simulates worlds built from seeds and judges them"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run many seeds.
    Sweep(sweep::Args),
    /// Run one world again: a seed, or a saved plan.
    Replay(replay::Args),
    /// Make a page of a run, to look at.
    Show(show::Args),
    /// Find the first event in which two runs differ.
    Diff(show::DiffArgs),
    /// Find the moment at which a failure became inevitable.
    Explain(explain::Args),
    /// Make a failing world small.
    Shrink(shrink::Args),
    /// List the planted bugs, or hunt for them.
    Mutants(mutants::Args),
    /// Explore the protocol brains exhaustively within small bounds.
    Explore(explore::Args),
    /// Count what creating files costs in a cluster.
    Cost(cost::Args),
    /// Run the saved plans that once failed.
    Corpus {
        /// Where they are.
        #[arg(default_value = "seeds")]
        dir: PathBuf,
    },
}

/// How a run is drawn, where it is named by a seed, and which bug it has.
#[derive(clap::Args)]
struct Drawn {
    /// The profile of the seed, if not its own.
    #[arg(long, value_parser = parse_profile)]
    profile: Option<Profile>,
    /// Draw tiny sizes, slow reads, faults and bursts in most of the seeds as well.
    #[arg(long)]
    stress: bool,
    /// The planted bug to switch on.
    #[arg(long)]
    mutant: Option<String>,
}

impl Drawn {
    /// The flags that say the same, each after a space.
    fn as_flags(&self) -> String {
        let mut flags = String::new();
        if let Some(profile) = self.profile {
            flags += &format!(" --profile {}", format!("{profile:?}").to_lowercase());
        }
        if self.stress {
            flags += " --stress";
        }
        if let Some(mutant) = &self.mutant {
            flags += &format!(" --mutant {mutant}");
        }
        flags
    }

    /// What a command line names: the plan of a seed, or a file.
    fn case(&self, what: &str) -> Result<Case, String> {
        let mut case = match what.parse::<u64>() {
            Ok(seed) => Case::of(draw(seed, self.profile, self.stress)),
            Err(_) => Case::load(Path::new(what))?,
        };
        if let Some(name) = &self.mutant {
            case.mutant = Some(name.clone());
        }
        Ok(case)
    }
}

fn parse_profile(text: &str) -> Result<Profile, String> {
    let name = |profile: &Profile| format!("{profile:?}").to_lowercase();
    let all = || PROFILES.into_iter().chain([Profile::Cluster]);
    all().find(|p| name(p) == text).ok_or_else(|| {
        let names: Vec<String> = all().map(|p| name(&p)).collect();
        format!("profiles are {}", names.join(", "))
    })
}

/// Runs the program.
pub fn main() -> ExitCode {
    // A reader of our output that has seen enough ends us quietly, as it does others.
    // SAFETY: no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    world::remember_panics();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let result = match args.command {
        Command::Sweep(args) => sweep::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Diff(args) => show::diff(&args),
        Command::Show(args) => show::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Shrink(args) => shrink::run(&args),
        Command::Mutants(args) => mutants::run(&args),
        Command::Explore(args) => explore::run(&args),
        Command::Cost(args) => cost::run(&args),
        Command::Corpus { dir } => corpus(&dir),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(text) => {
            eprintln!("outrider-sim: {text}");
            ExitCode::from(2)
        }
    }
}

/// Runs a plan on Outrider, or on the reference.
fn run_plan(plan: &Plan, reference: bool, mutant: Option<&'static str>) -> Outcome {
    run_with(
        plan,
        reference,
        Options {
            mutant,
            ..Options::default()
        },
    )
}

fn run_with(plan: &Plan, reference: bool, options: Options) -> Outcome {
    if reference {
        world::run::<Reference>(plan, options)
    } else {
        world::run::<Outrider>(plan, options)
    }
}

/// The plan of a seed, with `stress` also what is drawn to be tiny, slow or frequent.
fn draw(seed: u64, profile: Option<Profile>, stress: bool) -> Plan {
    if stress {
        Plan::stressed(seed, profile)
    } else {
        Plan::from_seed(seed, profile)
    }
}

/// The planted bug of a case.
fn planted(case: &Case) -> Result<Option<&'static str>, String> {
    case.mutant.as_deref().map(mutants::find).transpose()
}

fn corpus(dir: &Path) -> Result<bool, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "json"))
        .collect();
    files.sort();
    let mut failed = 0;
    for file in &files {
        let outcome = run_plan(&Case::load(file)?.plan, false, None);
        if let Some(failure) = outcome.failure {
            failed += 1;
            println!("{}: {}: {}", file.display(), failure.kind, failure.text);
            println!(
                "  replay with: outrider-sim replay {} --log",
                file.display()
            );
        }
    }
    println!("{} plans, {failed} failed", files.len());
    Ok(failed == 0)
}

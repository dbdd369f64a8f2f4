//! The command line. Exit codes: 0 clean, 1 failures found, 2 could not run.

mod commit;
mod cost;
mod diff;
mod differential;
mod explain;
mod explore;
mod histories;
mod manual;
mod mutants;
mod replay;
mod report;
mod show;
mod shrink;
mod spent;
mod sweep;

use clap::{Parser, Subcommand};
use outrider_sim::case::Case;
use outrider_sim::plan::tuning::{self, Tuning};
use outrider_sim::plan::{PROFILES, Plan, Profile};
use outrider_sim::reference::Reference;
use outrider_sim::world::{self, Options, Outcome, node::Outrider};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "outrider-sim",
    version,
    about = "Simulates worlds built from seeds and judges them",
    after_help = "Examples:\n  \
        outrider-sim sweep --seeds 1000 --save failures\n  \
        outrider-sim shrink failures/check-17.json -o small.json\n  \
        outrider-sim show small.json -o run.html\n\n\
        docs/simulator.md leads from a red build to an understanding, with pictures.\n\
        Exit codes: 0 clean; 1 failures found; 2 could not run."
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
    /// Find the first event in which two runs differ, or this program and another commit's.
    Diff(diff::Args),
    /// Find the moment at which a failure became inevitable.
    Explain(explain::Args),
    /// Make a failing world small.
    Shrink(shrink::Args),
    /// List the planted bugs, or hunt for them.
    Mutants(mutants::Args),
    /// Explore the protocol brains exhaustively within small bounds.
    Explore(explore::Args),
    /// List the profiles and the keys of what a seed draws.
    #[command(after_help = "Examples:\n  outrider-sim profiles\n  \
        outrider-sim profiles crash > mine.toml\n  outrider-sim sweep --profile mine.toml")]
    Profiles {
        /// Print this one, as a file to begin with.
        name: Option<String>,
    },
    /// Judge histories of which it is known whether they are right.
    JudgeHistories(histories::Args),
    /// Count what creating files costs in a cluster.
    Cost(cost::Args),
    /// Compare the simulated backends with the real ones, call by call.
    Differential(differential::Args),
    /// Run the saved plans that once failed.
    #[command(
        after_help = "Examples:\n  outrider-sim corpus\n  outrider-sim corpus seeds/open\n\n\
        Exit code 0: none fails; 1: some do; 2: it could not run."
    )]
    Corpus {
        /// Where they are.
        #[arg(default_value = "seeds")]
        dir: PathBuf,
    },
    /// Print the completion script of a shell.
    Completions(manual::CompletionsArgs),
    /// Write the manual pages to a directory.
    Man(manual::ManArgs),
}

/// How seeds are drawn.
#[derive(clap::Args)]
struct Drawing {
    /// The profile of the seed, if not its own: a name, or a file *.toml or *.json
    /// (see `outrider-sim profiles`).
    #[arg(long, value_name = "NAME|FILE")]
    profile: Option<String>,
    /// Replace what a seed draws for a key, by one of some values; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE,...")]
    set: Vec<String>,
    /// Draw tiny sizes, slow reads, faults and bursts in most of the seeds as well.
    #[arg(long)]
    stress: bool,
}

/// As [`Drawing`], read and found well.
pub struct Way {
    tuning: Tuning,
    stress: bool,
    flags: String,
}

impl Drawing {
    /// The arguments that say the same.
    fn arguments(&self) -> Vec<String> {
        let mut all = Vec::new();
        if let Some(profile) = &self.profile {
            all.extend(["--profile".to_owned(), profile.clone()]);
        }
        for text in &self.set {
            all.extend(["--set".to_owned(), text.clone()]);
        }
        if self.stress {
            all.push("--stress".to_owned());
        }
        all
    }

    fn read(&self) -> Result<Way, String> {
        let mut tuning = match &self.profile {
            Some(name) => Tuning::load(name)?,
            None => Tuning::default(),
        };
        for text in &self.set {
            tuning.set(text)?;
        }
        let arguments = self.arguments();
        Ok(Way {
            tuning,
            stress: self.stress,
            flags: arguments.iter().map(|text| format!(" {text}")).collect(),
        })
    }
}

impl Way {
    /// A profile, or each seed's own.
    fn of(profile: Option<Profile>, stress: bool) -> Self {
        Self {
            tuning: Tuning::of(profile),
            stress,
            flags: String::new(),
        }
    }

    /// The plan of a seed.
    fn draw(&self, seed: u64) -> Plan {
        Plan::tuned(seed, &self.tuning, self.stress).0
    }
}

/// How a run is drawn, where it is named by a seed, and which bug it has.
#[derive(clap::Args)]
struct Drawn {
    #[command(flatten)]
    drawing: Drawing,
    /// The planted bug to switch on.
    #[arg(long)]
    mutant: Option<String>,
}

impl Drawn {
    /// The flags that say the same, each after a space.
    fn as_flags(&self) -> String {
        let mut flags = self.drawing.read().map_or(String::new(), |way| way.flags);
        if let Some(mutant) = &self.mutant {
            flags += &format!(" --mutant {mutant}");
        }
        flags
    }

    /// What a command line names: the plan of a seed, or a file.
    fn case(&self, what: &str) -> Result<Case, String> {
        let way = self.drawing.read()?;
        let mut case = match what.parse::<u64>() {
            Ok(seed) => Case::of(way.draw(seed)),
            Err(_) if way.flags.is_empty() => Case::load(Path::new(what))?,
            Err(_) => {
                let flags = &way.flags;
                return Err(format!(
                    "{what} is a plan that is drawn:{flags} is for seeds"
                ));
            }
        };
        if let Some(name) = &self.mutant {
            case.mutant = Some(name.clone());
        }
        Ok(case)
    }

    /// What was drawn for a seed, in lines; empty for a file.
    fn swarm(&self, what: &str) -> Result<String, String> {
        let way = self.drawing.read()?;
        let tuned = |seed| Plan::tuned(seed, &way.tuning, way.stress).1.header();
        Ok(what.parse::<u64>().map_or(String::new(), tuned))
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
        Command::Diff(args) => diff::run(&args),
        Command::Show(args) => show::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Shrink(args) => shrink::run(&args),
        Command::Mutants(args) => mutants::run(&args),
        Command::Explore(args) => explore::run(&args),
        Command::Profiles { name } => profiles(name.as_deref()),
        Command::JudgeHistories(args) => histories::run(&args),
        Command::Cost(args) => cost::run(&args),
        Command::Differential(args) => differential::run(&args),
        Command::Corpus { dir } => corpus(&dir),
        Command::Completions(args) => {
            manual::completions(&args);
            Ok(true)
        }
        Command::Man(args) => manual::man(&args),
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

/// The planted bug of a case.
fn planted(case: &Case) -> Result<Option<&'static str>, String> {
    case.mutant.as_deref().map(mutants::find).transpose()
}

fn profiles(name: Option<&str>) -> Result<bool, String> {
    if let Some(name) = name {
        Tuning::load(name)?;
        match tuning::text_of(name) {
            Some(text) => print!("{text}"),
            None => println!("base = {name:?}"),
        }
        return Ok(true);
    }
    println!("profiles: {}\n", tuning::names().join(", "));
    println!("keys, in a file as `cluster.cuts = 0.5` or in tables, and for --set:");
    print!("{}", tuning::keys());
    Ok(true)
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

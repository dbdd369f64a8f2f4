//! A run as a page, or for the Perfetto trace viewer.

use super::{case, parse_profile, planted};
use outrider_sim::plan::Profile;
use outrider_sim::show::{Facts, page, perfetto};
use outrider_sim::trace::Event;
use outrider_sim::world::{self, Options, node::Outrider};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim show small.json -o run.html\n  \
    outrider-sim show 17 --profile cluster -o run.html --perfetto run.trace.json")]
pub struct Args {
    /// A seed, or a file with a plan.
    what: String,
    /// The page.
    #[arg(short, long, default_value = "run.html")]
    output: PathBuf,
    /// Write the run for the Perfetto trace viewer (ui.perfetto.dev), too.
    #[arg(long)]
    perfetto: Option<PathBuf>,
    /// The profile of the seed, if not its own.
    #[arg(long, value_parser = parse_profile)]
    profile: Option<Profile>,
    /// Draw tiny sizes, slow reads and bursts in half of the seeds as well.
    #[arg(long)]
    stress: bool,
    /// The planted bug to switch on.
    #[arg(long)]
    mutant: Option<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    let case = case(
        &args.what,
        args.profile,
        args.stress,
        args.mutant.as_deref(),
    )?;
    let events = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&events);
    let outcome = world::run::<Outrider>(
        &case.plan,
        Options {
            mutant: planted(&case)?,
            sink: Some(Box::new(move || {
                Box::new(move |event| kept.lock().expect("one thread").push(event))
            })),
        },
    );
    let events: Vec<Event> = std::mem::take(&mut *events.lock().expect("the world has ended"));
    let failure = outcome.failure.as_ref();
    let facts = Facts {
        failure: failure.map(|failure| (failure.kind.to_owned(), failure.text.clone())),
        mutant: case.mutant.clone(),
        command: format!("outrider-sim replay {} --log", args.what),
    };
    let write = |file: &PathBuf, text: String| {
        std::fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
    };
    write(&args.output, page(&case.plan, &events, &facts))?;
    if let Some(file) = &args.perfetto {
        write(file, perfetto(&events))?;
    }
    println!(
        "{}: {} events; {}",
        args.output.display(),
        events.len(),
        match failure {
            Some(failure) => format!("FAILED ({})", failure.kind),
            None => "no failure".to_owned(),
        }
    );
    Ok(true)
}

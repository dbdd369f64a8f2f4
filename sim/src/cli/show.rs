//! A run as a page, or for the Perfetto trace viewer.

use super::{Drawn, planted};
use outrider_sim::case::Case;
use outrider_sim::show::{Facts, page, perfetto};
use outrider_sim::trace::Event;
use outrider_sim::world::{self, Options, Outcome, node::Outrider};
use std::path::{Path, PathBuf};
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
    #[command(flatten)]
    drawn: Drawn,
}

/// Runs a case and keeps its events.
pub fn record(case: &Case) -> Result<(Outcome, Vec<Event>), String> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&events);
    let outcome = world::run::<Outrider>(
        &case.plan,
        Options {
            mutant: planted(case)?,
            sink: Some(Box::new(move || {
                Box::new(move |event| kept.lock().expect("one thread").push(event))
            })),
            ..Options::default()
        },
    );
    let events = std::mem::take(&mut *events.lock().expect("the world has ended"));
    Ok((outcome, events))
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    std::fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
}

/// Writes the page of a run.
pub fn write_page(file: &Path, case: &Case, events: &[Event], facts: &Facts) -> Result<(), String> {
    write(file, &page(&case.plan, events, facts))
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    let case = args.drawn.case(&args.what)?;
    let (outcome, events) = record(&case)?;
    let failure = outcome.failure.as_ref();
    let facts = Facts {
        command: format!(
            "outrider-sim replay {}{} --log",
            args.what,
            args.drawn.as_flags()
        ),
        ..Facts::of(&case, &outcome)
    };
    write_page(&args.output, &case, &events, &facts)?;
    if let Some(file) = &args.perfetto {
        write(file, &perfetto(&events))?;
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

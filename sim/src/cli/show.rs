//! A run as a page, or for the Perfetto trace viewer; the first difference of two.

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

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim diff small.json smaller.json\n  \
    outrider-sim diff small.json small.json --without-mutant\n\n\
    Exit code 0: they do the same; 1: they differ.")]
pub struct DiffArgs {
    /// A seed, or a file with a plan.
    one: String,
    /// Another one.
    other: String,
    #[command(flatten)]
    drawn: Drawn,
    /// Switch the planted bug of the other one off: what does the bug change first?
    #[arg(long)]
    without_mutant: bool,
    /// How many events to show before and after.
    #[arg(long, default_value_t = 8)]
    context: usize,
}

/// Runs the command `diff`.
pub fn diff(args: &DiffArgs) -> Result<bool, String> {
    let (one, mut other) = (args.drawn.case(&args.one)?, args.drawn.case(&args.other)?);
    if args.without_mutant {
        other.mutant = None;
    }
    let (ended, left) = record(&one)?;
    let (other_ended, right) = record(&other)?;
    let pairs = left.iter().zip(&right);
    let same = pairs.take_while(|(left, right)| left == right).count();
    if same == left.len() && same == right.len() {
        println!("{same} events, all the same");
        return Ok(true);
    }
    for event in &left[same.saturating_sub(args.context)..same] {
        println!("  {}", event.line());
    }
    for (sign, events) in [('-', &left), ('+', &right)] {
        for event in events.iter().skip(same).take(args.context) {
            println!("{sign} {}", event.line());
        }
    }
    println!(
        "the first {same} events are the same, of {} and {}",
        left.len(),
        right.len()
    );
    for (sign, outcome) in [('-', ended), ('+', other_ended)] {
        match outcome.failure {
            Some(failure) => println!("{sign} FAILED ({}): {}", failure.kind, failure.text),
            None => println!("{sign} no failure"),
        }
    }
    Ok(false)
}

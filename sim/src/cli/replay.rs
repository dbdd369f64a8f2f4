//! One world again: what it came to, its events, and its state at any moment.
//!
//! What can go wrong: a moment that the world never reaches, as it ends before. That is
//! an error, not silence.

use super::{Drawn, planted, run_with};
use outrider_core::env::BlockDevice;
use outrider_core::volume::print::{PrintOptions, Record, print, print_block};
use outrider_sim::case::{Case, signature};
use outrider_sim::disk_model::{Medium, Still};
use outrider_sim::trace::Sink;
use outrider_sim::world::snapshot::{Moments, Snapshot};
use outrider_sim::world::{Options, Outcome};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim replay small.json --log\n  \
    outrider-sim replay small.json --at 7.577s\n  \
    outrider-sim replay small.json --at 7.577s --block 103\n  \
    outrider-sim replay 4 --profile cluster --snapshot-every 10s --json\n\n\
    Exit code 0: no failure; 1: it fails; 2: it could not run.")]
pub struct Args {
    /// A seed, or a file with a plan.
    what: String,
    /// Print one line per event, in simulated time.
    #[arg(long)]
    log: bool,
    /// With --log: only those of one node.
    #[arg(long, requires = "log")]
    node: Option<u32>,
    /// With --log: only those that contain this text.
    #[arg(long, requires = "log")]
    filter: Option<String>,
    /// With --log: only those from this many seconds on.
    #[arg(long, requires = "log")]
    since: Option<f64>,
    /// With --log: only those until this many seconds.
    #[arg(long, requires = "log")]
    until: Option<f64>,
    #[command(flatten)]
    drawn: Drawn,
    /// Write the plan to a file.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Show the state at this time of the world (12.5s, 300ms, 40us): who is mounted, locks,
    /// transactions, caches, quorum, calls, what is under way. May be given again.
    #[arg(long, value_name = "TIME", value_parser = parse_nanos)]
    at: Vec<u64>,
    /// Show the state each time this long has passed.
    #[arg(long, value_name = "DURATION", value_parser = parse_nanos)]
    snapshot_every: Option<u64>,
    /// With --at: print this 64 KiB block of the metadata device as it was then. Number 1
    /// has the super block and those of the quorum.
    #[arg(long, value_name = "NUMBER", requires = "at")]
    block: Vec<u64>,
    /// With --at: print all metadata as they were then.
    #[arg(long, requires = "at")]
    print: bool,
    /// Print one JSON object for each state, record of metadata, and for the outcome.
    #[arg(long, conflicts_with = "log")]
    json: bool,
    /// Run a filesystem in memory that is right by construction: tests the judge.
    #[arg(long)]
    reference: bool,
}

/// A time with its unit; seconds without one.
fn parse_nanos(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no time such as 12.5s, 300ms, 40us or 70ns");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "s" | "" => 1e9,
        "ms" => 1e6,
        "us" => 1e3,
        "ns" => 1.0,
        _ => return Err(wrong()),
    };
    // As the lines of events have it: 7.577398.893 is 7.577398893.
    let digits = match digits.splitn(3, '.').collect::<Vec<_>>()[..] {
        [sec, micros, nanos] if micros.len() == 6 => format!("{sec}.{micros}{nanos}"),
        _ => digits.to_owned(),
    };
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    let nanos = (number * unit).round();
    if !(1.0..1e18).contains(&nanos) {
        return Err(wrong());
    }
    Ok(nanos as u64)
}

/// The metadata devices at the moments that were asked for.
type Kept = Arc<Mutex<BTreeMap<u64, Medium>>>;

impl Args {
    /// Prints the events that are asked for.
    fn sink(&self) -> Option<Box<dyn FnOnce() -> Sink + Send>> {
        if !self.log {
            return None;
        }
        let (node, filter) = (self.node, self.filter.clone());
        let nanos = |seconds: f64| (seconds * 1e9) as u64;
        let from = self.since.map_or(0, nanos);
        let until = self.until.map_or(u64::MAX, nanos);
        Some(Box::new(move || {
            Box::new(move |event| {
                if event.nanos < from
                    || event.nanos > until
                    || node.is_some_and(|node| node != event.node)
                {
                    return;
                }
                let line = event.line();
                if filter.as_ref().is_none_or(|text| line.contains(text)) {
                    println!("{line}");
                }
            })
        }))
    }

    /// When to look, and what to do then.
    fn moments(&self, kept: &Kept) -> Option<Moments> {
        if self.at.is_empty() && self.snapshot_every.is_none() {
            return None;
        }
        let (json, kept, wanted) = (self.json, Arc::clone(kept), self.at.clone());
        let each = move |snapshot: Snapshot, medium: Medium| {
            if json {
                println!("{}", serde_json::json!({ "state": snapshot }));
            } else {
                println!("{snapshot}");
            }
            if wanted.contains(&snapshot.nanos) {
                kept.lock()
                    .expect("one world")
                    .insert(snapshot.nanos, medium);
            }
        };
        Some(Moments {
            at: self.at.clone(),
            every: self.snapshot_every,
            each: Box::new(each),
        })
    }

    /// Prints the metadata that were kept.
    fn print_metadata(&self, kept: &Kept) -> Result<(), String> {
        let kept = kept.lock().expect("the world has ended");
        for at in &self.at {
            let Some(medium) = kept.get(at) else {
                return Err(format!("the run has ended before {} s", *at as f64 / 1e9));
            };
            let device: Rc<dyn BlockDevice> = Rc::new(Still(medium.clone()));
            let mut write = |record: Record| {
                if self.json {
                    println!("{}", serde_json::json!(record));
                } else {
                    println!("{record}");
                }
            };
            for number in &self.block {
                let printed = now(print_block(Rc::clone(&device), *number, &mut write));
                printed.map_err(|error| format!("block {number}: {error}"))?;
            }
            if self.print {
                let printed = now(print(device, PrintOptions::default(), &mut write));
                printed.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }
}

/// The result of something that never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(out) => out,
        Poll::Pending => unreachable!("a device in memory answers at once"),
    }
}

fn to_json(outcome: &Outcome) -> serde_json::Value {
    let failure = outcome.failure.as_ref();
    serde_json::json!({ "outcome": {
        "seed": outcome.seed,
        "calls": outcome.calls,
        "events": outcome.events,
        "nanos": outcome.nanos,
        "event_hash": format!("{:016x}", outcome.event_hash),
        "image_hash": format!("{:016x}", outcome.image_hash),
        "unjudged": outcome.unjudged,
        "probes": outcome.probes,
        "blamed": outcome.blamed,
        "failure": failure.map(|failure| serde_json::json!({
            "kind": failure.kind, "signature": signature(failure), "text": failure.text,
        })),
    }})
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    let recorded = args.drawn.case(&args.what)?;
    let (plan, mutant) = (&recorded.plan, planted(&recorded)?);
    if !args.json {
        println!("{}", plan.header());
        let swarm = args.drawn.swarm(&args.what)?;
        if !swarm.is_empty() {
            println!("{swarm}");
        }
    }
    let kept = Arc::default();
    let options = Options {
        mutant,
        sink: args.sink(),
        moments: args.moments(&kept),
        ..Options::default()
    };
    let outcome = run_with(plan, args.reference, options);
    args.print_metadata(&kept)?;
    if let Some(file) = &args.save {
        let failed = Case::failed(plan.clone(), mutant, &outcome);
        failed
            .unwrap_or_else(|| Case::of(plan.clone()))
            .save(file)?;
    }
    if args.json {
        println!("{}", to_json(&outcome));
        return Ok(outcome.failure.is_none());
    }
    println!(
        "{} calls judged in {} steps, {} events, {} polls, {}.{:03} simulated seconds, \
         events {:016x}, image {:016x}",
        outcome.calls,
        outcome.steps,
        outcome.events,
        outcome.polls,
        outcome.nanos / 1_000_000_000,
        outcome.nanos / 1_000_000 % 1000,
        outcome.event_hash,
        outcome.image_hash
    );
    for (probe, count) in &outcome.probes {
        println!("  reached {probe} {count} times");
    }
    if outcome.unjudged > 0 {
        println!("{} windows were too tangled to judge", outcome.unjudged);
    }
    if let Some(blamed) = &outcome.blamed {
        println!("ended by a lying fence agent: {blamed}");
    }
    match &outcome.failure {
        None => println!("no failure"),
        Some(failure) => println!("FAILED ({}): {}", failure.kind, failure.text),
    }
    if recorded.is_as_recorded(&outcome) == Some(false) {
        println!(
            "this is not what was recorded: the code has changed since{}",
            recorded
                .commit
                .map_or(String::new(), |c| format!(" commit {c}"))
        );
    }
    Ok(outcome.failure.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_units() {
        for (text, nanos) in [
            ("12.5s", 12_500_000_000),
            ("3", 3_000_000_000),
            ("7.577398.893", 7_577_398_893),
            ("300ms", 300_000_000),
            ("40us", 40_000),
            ("70ns", 70),
        ] {
            assert_eq!(parse_nanos(text), Ok(nanos), "{text}");
        }
        for text in ["", "s", "-1s", "0", "1h", "1e30", "1.2.3.4"] {
            assert!(parse_nanos(text).is_err(), "{text}");
        }
    }
}

//! When a failure became inevitable: many runs that leave the way of the seed at a
//! moment, and how many of them fail all the same (`outrider_sim::explain`).
//!
//! What can go wrong: runs that are not the seed's before that moment. Every run says
//! what was behind it when it left; all have to say the same, event for event.

use super::show::{record, write_page};
use super::sweep::all_processors;
use super::{Drawn, planted};
use indicatif::{ProgressBar, ProgressStyle};
use outrider_sim::case::{Case, signature};
use outrider_sim::explain::{Counts, Curve, Jump, Point, happened, moments};
use outrider_sim::show::Facts;
use outrider_sim::trace::{Event, digest, seconds};
use outrider_sim::world::{self, Fork, Options, Outcome, node::Outrider};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Moments of the first, coarse look, beside the beginning.
const COARSE: usize = 12;
/// Jumps that are told in words.
const TOLD: usize = 4;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim explain failures/check-17.json\n  \
    outrider-sim explain small.json -o run.html --samples 100\n  \
    outrider-sim explain 3 --stress --mutant freeing_forgets_progress --json\n\n\
    Shrink it first: what is left is less to look at, and runs faster.\n\
    Exit code 0: it was explained; 2: it does not fail, or could not run.")]
pub struct Args {
    /// A seed, or a file with a plan that fails.
    what: String,
    /// Write a page of the run, with the curve above its lanes.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Runs at each moment.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(5..))]
    samples: u32,
    /// Moments to look at, at most.
    #[arg(long, default_value_t = 48)]
    moments: usize,
    /// Stop after this many seconds, with what is known by then.
    #[arg(long, default_value_t = 300)]
    time_budget: u64,
    /// Worlds at a time; the number of processors unless given.
    #[arg(long)]
    jobs: Option<usize>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    drawn: Drawn,
}

/// Runs the case on other ways.
struct Search<'a> {
    case: &'a Case,
    mutant: Option<&'static str>,
    base: &'a Outcome,
    signature: &'a str,
    samples: u32,
    jobs: usize,
}

impl Search<'_> {
    fn run(&self, fork: Fork) -> Outcome {
        let options = Options {
            mutant: self.mutant,
            fork: Some(fork),
            ..Options::default()
        };
        world::run::<Outrider>(&self.case.plan, options)
    }

    /// The way of run number `sample` from `at` on; number 0 stays on the seed's.
    fn way(&self, at: u64, sample: u32) -> Fork {
        let words = [self.case.plan.seed, at, u64::from(sample)];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        Fork {
            at,
            to: (sample > 0).then(|| digest(&bytes)),
        }
    }

    /// Runs all ways from these moments, until it is late: as many of the moments, from
    /// the first on, as were finished.
    ///
    /// # Errors
    /// A run that was not the seed's until then.
    fn look(
        &self,
        times: &[u64],
        late: &(dyn Fn() -> bool + Sync),
        bar: &ProgressBar,
    ) -> Result<Vec<Counts>, String> {
        let each = self.samples as usize + 1;
        let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= times.len() * each || late() {
                            return;
                        }
                        let at = times[number / each];
                        let outcome = self.run(self.way(at, (number % each) as u32));
                        bar.inc(1);
                        let mut outcomes = outcomes.lock().expect("no worker panics");
                        outcomes.push((number, outcome));
                    }
                });
            }
        });
        let mut outcomes = outcomes.into_inner().expect("no worker panics");
        outcomes.sort_by_key(|(number, _)| *number);
        let mut all = Vec::new();
        for (place, at) in times.iter().enumerate() {
            let own: Vec<&Outcome> = outcomes
                .iter()
                .filter(|(number, _)| number / each == place)
                .map(|(_, outcome)| outcome)
                .collect();
            if own.len() < each {
                break;
            }
            all.push(self.count(*at, &own)?);
        }
        Ok(all)
    }

    /// Counts the runs of one moment; the first of them has stayed on the seed's way.
    fn count(&self, at: u64, outcomes: &[&Outcome]) -> Result<Counts, String> {
        let stayed = outcomes[0];
        let as_before = Outcome {
            forked: None,
            ..stayed.clone()
        };
        if as_before != *self.base || outcomes.iter().any(|o| o.forked != stayed.forked) {
            return Err(format!(
                "the runs that fork at {at} ns were not the same before: determinism is broken"
            ));
        }
        let mut counts = Counts::default();
        for outcome in &outcomes[1..] {
            counts.runs += 1;
            match outcome.failure.as_ref().map(signature) {
                Some(own) if own == self.signature => counts.same += 1,
                Some(_) => counts.other += 1,
                None => {}
            }
        }
        Ok(counts)
    }
}

/// Runs the command.
#[allow(clippy::disallowed_types, clippy::disallowed_methods)] // how long it takes, outside any world
pub fn run(args: &Args) -> Result<bool, String> {
    let begun = std::time::Instant::now();
    let case = args.drawn.case(&args.what)?;
    let (base, events) = record(&case)?;
    let Some(failure) = &base.failure else {
        return Err(format!("{} does not fail: nothing to explain", args.what));
    };
    let own = signature(failure);
    let search = Search {
        case: &case,
        mutant: planted(&case)?,
        base: &base,
        signature: &own,
        samples: args.samples,
        jobs: args.jobs.unwrap_or_else(all_processors).max(1),
    };
    let bar = if args.json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(0)
    };
    let style = "{elapsed_precise} {wide_bar} {pos}/{len} runs, {per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    let late = || begun.elapsed().as_secs() >= args.time_budget;
    let mut problem = None;
    let curve = Curve::draw(&moments(&events), COARSE, args.moments, |times| {
        bar.inc_length(times.len() as u64 * (u64::from(args.samples) + 1));
        search.look(times, &late, &bar).unwrap_or_else(|text| {
            problem = Some(text);
            Vec::new()
        })
    });
    bar.finish_and_clear();
    if let Some(text) = problem {
        return Err(text);
    }
    if curve.points.is_empty() {
        return Err("the time was up before the first moment was looked at".to_owned());
    }
    let story = Story {
        curve: &curve,
        events: &events,
        case: &case,
        signature: &own,
    };
    let told = story.to_json();
    if let Some(file) = &args.output {
        let facts = Facts {
            command: format!(
                "outrider-sim explain {}{}",
                args.what,
                args.drawn.as_flags()
            ),
            explain: Some(told.clone()),
            ..Facts::of(&case, &base)
        };
        write_page(file, &case, &events, &facts)?;
    }
    if args.json {
        println!("{told}");
    } else {
        story.print();
        if let Some(file) = &args.output {
            println!("\nthe curve over the run: {}", file.display());
        }
    }
    Ok(true)
}

/// What is told of it.
struct Story<'a> {
    curve: &'a Curve,
    events: &'a [Event],
    case: &'a Case,
    signature: &'a str,
}

impl Story<'_> {
    /// Number of events before a moment.
    fn fixed(&self, point: &Point) -> usize {
        let numbered = self.events.iter().filter(|e| e.number.is_some());
        numbered.filter(|event| event.nanos < point.at).count()
    }

    fn failed_at(&self) -> u64 {
        let numbered = self.events.iter().filter(|e| e.number.is_some());
        numbered.map(|event| event.nanos).max().unwrap_or(0)
    }

    fn print(&self) {
        let plan = &self.case.plan;
        println!("{}", plan.header());
        println!(
            "{}: seen {} s after the start\n",
            self.signature,
            seconds(self.failed_at())
        );
        println!(
            "  up to here as the seed has it      how often the same failure comes all the same"
        );
        for point in &self.curve.points {
            let (low, high) = point.interval();
            let filled = (point.share() * 30.0).round() as usize;
            let other = match point.counts.other {
                0 => String::new(),
                other => format!(", {other} otherwise"),
            };
            println!(
                "{:>17} s {:>7} events  {}{} {:>4.0}%  ({:.0} to {:.0}; {} of {}{other})",
                seconds(point.at),
                self.fixed(point),
                "█".repeat(filled),
                "·".repeat(30 - filled),
                point.share() * 100.0,
                low * 100.0,
                high * 100.0,
                point.counts.same,
                point.counts.runs,
            );
        }
        let jumps = self.curve.jumps();
        for jump in jumps.iter().take(TOLD) {
            self.print_jump(jump);
        }
        if jumps.len() > TOLD {
            println!("\n... and {} smaller jumps", jumps.len() - TOLD);
        }
        println!("\n{}", self.verdict(&jumps));
        if !self.curve.complete {
            println!(
                "time or moments were up before every jump was followed to its events: \
                 --time-budget, --moments"
            );
        }
    }

    fn print_jump(&self, jump: &Jump) {
        let found = happened(self.events, jump.before.at, jump.after.at);
        let sign = if jump.after.share() > jump.before.share() {
            "rises"
        } else {
            "falls"
        };
        println!(
            "\nit {sign} from {:.0}% to {:.0}% when this has happened:",
            jump.before.share() * 100.0,
            jump.after.share() * 100.0
        );
        for event in &found.named {
            println!("  {}", shortened(event));
        }
        if !found.others.is_empty() {
            let others = found.others.iter();
            let others: Vec<String> = others.map(|(kind, n)| format!("{n} {kind}")).collect();
            println!("  and {}", others.join(", "));
        }
        if !found.then.is_empty() {
            println!("  (what is drawn there shows in what comes next:)");
        }
        for event in &found.then {
            println!("    {}", shortened(event));
        }
    }

    /// The answer in one sentence.
    fn verdict(&self, jumps: &[Jump]) -> String {
        let first = &self.curve.points[0];
        let begins = format!(
            "with other randomness from the start it fails in {} of {} runs",
            first.counts.same, first.counts.runs
        );
        match self.curve.inevitable() {
            Some(point) if point.at == 0 => {
                format!("{begins}: the plan alone makes it fail, in (nearly) any order of events")
            }
            Some(point) => {
                let runs = self.curve.points.iter().filter(|p| p.at >= point.at);
                let (same, all) = runs.fold((0, 0), |(same, all), p| {
                    (same + p.counts.same, all + p.counts.runs)
                });
                format!(
                    "{begins}; from {} s on it is inevitable ({same} of {all} runs)",
                    seconds(point.at)
                )
            }
            None if jumps.is_empty() => format!("{begins}, and no moment changes that much"),
            None => format!("{begins}; it is open until the end"),
        }
    }

    fn to_json(&self) -> Value {
        let point = |point: &Point| {
            let (low, high) = point.interval();
            json!({
                "nanos": point.at, "events": self.fixed(point), "same": point.counts.same,
                "other": point.counts.other, "runs": point.counts.runs,
                "share": point.share(), "low": low, "high": high,
            })
        };
        let lines = |events: &[Event]| events.iter().map(Event::line).collect::<Vec<String>>();
        let jumps = self.curve.jumps();
        let told: Vec<Value> = jumps
            .iter()
            .map(|jump| {
                let found = happened(self.events, jump.before.at, jump.after.at);
                json!({
                    "from": jump.before.at, "until": jump.after.at,
                    "before": jump.before.share(), "after": jump.after.share(),
                    "happened": lines(&found.named), "others": found.others,
                    "then": lines(&found.then),
                })
            })
            .collect();
        json!({
            "seed": self.case.plan.seed,
            "mutant": self.case.mutant,
            "signature": self.signature,
            "failed_at": self.failed_at(),
            "points": self.curve.points.iter().map(point).collect::<Vec<Value>>(),
            "jumps": told,
            "inevitable": self.curve.inevitable().map(|point| point.at),
            "verdict": self.verdict(&jumps),
            "complete": self.curve.complete,
        })
    }
}

/// The line of an event, of a length that can be read.
fn shortened(event: &Event) -> String {
    let line = event.line();
    match line.char_indices().nth(160) {
        Some((at, _)) => format!("{} ...", &line[..at]),
        None => line,
    }
}

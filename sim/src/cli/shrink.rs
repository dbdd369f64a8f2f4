//! A failing world made small.
//!
//! A plan that has lost something fails in another order of events, if at all: so others
//! are tried for each. How many follows from the failure: first a few, and when nothing
//! gets smaller any more, as many as the plan itself needs to fail again.
//!
//! What can go wrong: a run that is interrupted. Each smaller plan is written at
//! once, so the file always has the smallest so far, and goes on from there.

use super::sweep::all_processors;
use super::{Drawn, planted, run_plan};
use indicatif::{ProgressBar, ProgressStyle};
use outrider_sim::case::{Case, signature};
use outrider_sim::plan::Plan;
use outrider_sim::shrink::{Progress, faults, shrink};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim shrink seeds/open/check-17.json\n  \
    outrider-sim shrink 17 --profile cluster -o small.json\n  \
    outrider-sim shrink 0 --mutant freed_block_reused -o small.json\n\n\
    Interrupt it when it is small enough: the file has the smallest so far.")]
pub struct Args {
    /// A seed, or a file with a plan that fails.
    what: String,
    /// Where the small one goes; without it, FILE.small.json or SEED.small.json.
    #[arg(short, long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    drawn: Drawn,
    /// Worlds at a time; the number of processors unless given.
    #[arg(long)]
    jobs: Option<usize>,
    /// Other orders of events to try at most for each plan in which the failure is gone. A
    /// failure that comes by chance needs more of them than one that always comes.
    #[arg(long, default_value_t = 300)]
    tries: u64,
    /// Stop after this many seconds.
    #[arg(long)]
    time_budget: Option<u64>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Other orders of events that are tried at first.
const FEW: u64 = 3;
/// Failures of which a plan's chance to fail is estimated.
const ENOUGH: u64 = 5;

/// How many orders it takes to fail in one of them nearly always (95%): three times those
/// between two failures, as far as `most` orders tell.
fn orders_needed(most: u64, mut fails: impl FnMut(u64) -> bool) -> u64 {
    let mut failed = 0;
    for number in 1..=most {
        failed += u64::from(fails(number));
        if failed == ENOUGH {
            return (3 * number).div_ceil(ENOUGH).min(most);
        }
    }
    most
}

/// What is looked for.
struct Search<'a> {
    signature: String,
    mutant: Option<&'static str>,
    /// Other orders of events that are tried now.
    tries: u64,
    jobs: usize,
    late: &'a (dyn Fn() -> bool + Sync),
}

/// A seed for another order of events; number 0 is the plan's own.
fn seed(plan: &Plan, number: u64) -> u64 {
    plan.seed.wrapping_add(number.wrapping_mul(1_000_003))
}

impl Search<'_> {
    /// Whether a plan fails in the way that is looked for under a seed.
    fn fails(&self, plan: &Plan, seed: u64) -> bool {
        let plan = Plan {
            seed,
            ..plan.clone()
        };
        let failure = run_plan(&plan, false, self.mutant).failure;
        let same = failure.is_some_and(|failure| signature(&failure) == self.signature);
        same && (self.mutant.is_none() || run_plan(&plan, false, None).failure.is_none())
    }

    /// The seed under which a plan fails in the way that is looked for: its own, or one
    /// of some others, which change the order of events.
    fn seed_of(&self, plan: &Plan) -> Option<u64> {
        let mut seeds = (0..=self.tries).map(|number| seed(plan, number));
        seeds.find(|seed| !(self.late)() && self.fails(plan, *seed))
    }

    /// How many other orders a plan needs, and `most` at most.
    fn needed(&self, plan: &Plan, most: u64) -> u64 {
        orders_needed(most, |number| {
            (self.late)() || self.fails(plan, seed(plan, number))
        })
    }

    /// The first plan that fails, with its seed; plans are run several at a time.
    fn first_failing(&self, plans: &[Plan]) -> Option<(usize, u64)> {
        let next = AtomicUsize::new(0);
        let first = Mutex::new(None::<(usize, u64)>);
        std::thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let found = *first.lock().expect("no worker panics");
                        // One before it has failed: nobody asks for this one.
                        if number >= plans.len() || found.is_some_and(|(n, _)| n < number) {
                            return;
                        }
                        if let Some(seed) = self.seed_of(&plans[number]) {
                            let mut first = first.lock().expect("no worker panics");
                            if first.is_none_or(|(n, _)| number < n) {
                                *first = Some((number, seed));
                            }
                        }
                    }
                });
            }
        });
        first.into_inner().expect("no worker panics")
    }
}

/// Runs the command.
#[allow(clippy::disallowed_types, clippy::disallowed_methods)] // how long it takes, outside any world
pub fn run(args: &Args) -> Result<bool, String> {
    let begun = std::time::Instant::now();
    let given = args.drawn.case(&args.what)?;
    let mutant = planted(&given)?;
    let output = args.output.clone().unwrap_or_else(|| {
        let stem = args.what.strip_suffix(".json").unwrap_or(&args.what);
        PathBuf::from(format!("{stem}.small.json"))
    });
    let outcome = run_plan(&given.plan, false, mutant);
    let Some(failure) = &outcome.failure else {
        return Err(format!("{} does not fail: nothing to shrink", args.what));
    };
    let late = || {
        args.time_budget
            .is_some_and(|s| begun.elapsed().as_secs() >= s)
    };
    let mut search = Search {
        signature: signature(failure),
        mutant,
        tries: args.tries.min(FEW),
        jobs: args.jobs.unwrap_or_else(all_processors).max(1),
        late: &late,
    };
    let write = |plan: &Plan| -> Result<Case, String> {
        let outcome = run_plan(plan, false, mutant);
        let case = Case::failed(plan.clone(), mutant, &outcome)
            .ok_or("a plan failed once and not again: determinism is broken")?;
        case.save(&output)?;
        Ok(case)
    };
    let mut kept = write(&given.plan)?;
    let bar = if args.json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new_spinner()
    };
    let style = "{elapsed_precise} {spinner} {msg}";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut problem = None;
    let mut best = given.plan.clone();
    let mut tried_before = 0;
    loop {
        let mut tried_now = 0;
        best = shrink(
            &best,
            4 * search.jobs,
            &mut |plans| {
                if late() {
                    return None;
                }
                tried_now += plans.len() as u64;
                search.first_failing(plans)
            },
            &mut |plan, progress| {
                let Progress {
                    operations,
                    faults,
                    tried,
                } = progress;
                bar.set_message(format!(
                    "{operations} operations, {faults} faults, {} plans tried, in {} orders each",
                    tried_before + tried,
                    search.tries + 1
                ));
                match write(plan) {
                    Ok(case) => kept = case,
                    Err(text) => problem = Some(text),
                }
            },
        );
        tried_before += tried_now;
        let needed = search.needed(&best, args.tries);
        if needed <= search.tries || late() || problem.is_some() {
            break;
        }
        search.tries = needed;
    }
    bar.finish_and_clear();
    if let Some(text) = problem {
        return Err(text);
    }
    let seen = kept.seen.as_ref().ok_or("nothing was seen")?;
    let (operations, faults) = (kept.plan.operations(), faults(&kept.plan));
    let from = given.plan.operations();
    let seconds = begun.elapsed().as_secs_f64();
    if args.json {
        let summary = serde_json::json!({
            "file": output, "signature": seen.signature, "text": seen.text,
            "operations": operations, "operations_before": from,
            "faults": faults, "seconds": seconds, "complete": !late(),
        });
        println!("{summary}");
    } else {
        println!(
            "{from} operations became {operations}, with {faults} faults, in {seconds:.1} s{}: {}",
            if late() {
                " (time is up: it may get smaller)"
            } else {
                ""
            },
            output.display()
        );
        println!("{}", kept.plan.header());
        println!("FAILED ({}): {}", seen.kind, seen.text);
        println!(
            "look at it with: outrider-sim replay {} --log",
            output.display()
        );
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_fails_by_chance_needs_more_orders() {
        assert_eq!(orders_needed(300, |_| true), FEW);
        assert_eq!(orders_needed(300, |number| number % 10 == 0), 30);
        assert_eq!(orders_needed(300, |number| number % 50 == 0), 150);
        assert_eq!(orders_needed(300, |number| number % 250 == 0), 300);
        assert_eq!(orders_needed(0, |_| true), 0);
    }
}

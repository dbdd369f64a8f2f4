//! How well the judge judges: many histories, right and wrong ones (`histories`).

use super::sweep::all_processors;
use indicatif::{ProgressBar, ProgressStyle};
use outrider_sim::histories::{Lie, Size, Verdict, judge, trial};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim judge-histories\n  \
    outrider-sim judge-histories --histories 1000 --operations 400 --clients 9 --json\n\n\
    Exit code 0: no verdict is wrong; 1: some are.")]
pub struct Args {
    /// How many histories.
    #[arg(long, default_value_t = 10_000)]
    histories: u64,
    /// Calls of each.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    operations: u64,
    /// Clients, whose calls overlap.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=64))]
    clients: u64,
    /// Calls between two moments of quiet; 0: there are none before the end.
    #[arg(long, default_value_t = 40)]
    window: usize,
    /// The first history.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// At a time; the number of processors unless given.
    #[arg(long)]
    jobs: Option<usize>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What became of the histories of one kind.
#[derive(Default)]
struct Tally {
    judged: u64,
    wrong: Vec<u64>,
    gave_up: u64,
    steps: u64,
    micros: Vec<u64>,
}

/// Runs the command.
#[allow(clippy::disallowed_types, clippy::disallowed_methods)] // how long it takes, outside any world
pub fn run(args: &Args) -> Result<bool, String> {
    let size = Size {
        clients: args.clients as usize,
        operations: args.operations as usize,
        window: args.window,
    };
    let bar = if args.json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(args.histories)
    };
    let style = "{elapsed_precise} {wide_bar} {pos}/{len} histories, {per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    let next = AtomicU64::new(0);
    let tallies: Mutex<BTreeMap<Option<Lie>, Tally>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.unwrap_or_else(all_processors).max(1) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= args.histories {
                        return;
                    }
                    let seed = args.from + number;
                    let (ops, lie) = trial(seed, size);
                    let begun = std::time::Instant::now();
                    let (verdict, steps) = judge(&ops, size.window);
                    let micros = begun.elapsed().as_micros() as u64;
                    let mut tallies = tallies.lock().expect("no worker panics");
                    let tally = tallies.entry(lie).or_default();
                    tally.judged += 1;
                    tally.steps += steps;
                    tally.micros.push(micros);
                    match (verdict, lie) {
                        (Verdict::GaveUp, _) => tally.gave_up += 1,
                        (Verdict::Right, None) | (Verdict::Wrong(_), Some(_)) => {}
                        _ => tally.wrong.push(seed),
                    }
                    drop(tallies);
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut tallies = tallies.into_inner().expect("no worker panics");
    for tally in tallies.values_mut() {
        tally.micros.sort_unstable();
        tally.wrong.sort_unstable();
    }
    print(args, &tallies);
    Ok(tallies.values().all(|tally| tally.wrong.is_empty()))
}

fn print(args: &Args, tallies: &BTreeMap<Option<Lie>, Tally>) {
    let name = |lie: &Option<Lie>| lie.map_or("right".to_owned(), |lie| format!("{lie:?}"));
    let at = |tally: &Tally, percent: usize| {
        let last = tally.micros.len().saturating_sub(1);
        tally.micros.get(last * percent / 100).copied().unwrap_or(0)
    };
    if args.json {
        let kinds: Vec<_> = tallies
            .iter()
            .map(|(lie, tally)| {
                json!({
                    "kind": name(lie), "histories": tally.judged, "wrong_verdicts": tally.wrong,
                    "given_up": tally.gave_up, "steps": tally.steps,
                    "micros_median": at(tally, 50), "micros_99": at(tally, 99),
                    "micros_most": at(tally, 100),
                })
            })
            .collect();
        println!("{}", json!({ "kinds": kinds }));
        return;
    }
    println!(
        "{} histories of {} calls by {} clients",
        args.histories, args.operations, args.clients
    );
    println!("kind            histories  wrong verdicts  given up   median     99%    most (ms)");
    for (lie, tally) in tallies {
        let millis = |percent| at(tally, percent) as f64 / 1000.0;
        println!(
            "{:15} {:>9} {:>15} {:>9} {:>8.2} {:>7.2} {:>7.2}",
            name(lie),
            tally.judged,
            tally.wrong.len(),
            tally.gave_up,
            millis(50),
            millis(99),
            millis(100),
        );
        if !tally.wrong.is_empty() {
            println!("  WRONG: {:?}", &tally.wrong[..tally.wrong.len().min(20)]);
        }
    }
}

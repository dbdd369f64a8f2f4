//! Many seeds on several threads.

use super::report::{Shard, annotation, junit};
use super::{Drawing, Way, run_plan};
use indicatif::{ProgressBar, ProgressStyle};
use outrider_sim::case::{Case, signature};
use outrider_sim::oracle::Violation;
use outrider_sim::plan::Profile;
use outrider_sim::world::{Outcome, cluster::steps};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim sweep --seeds 1000\n  \
    outrider-sim sweep --seeds 100000 --shard 3/8 --save failures --junit sweep.xml\n  \
    outrider-sim sweep --profile cluster --time-budget 600\n\n\
    Exit code 0: no seed fails; 1: some do; 2: it could not run.\n\
    Below GitLab's `parallel`, in a Slurm job array and in an indexed Kubernetes job the\n\
    shard follows from the environment. In GitHub's actions failures become annotations.")]
pub struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// How many at a time; the number of processors unless given.
    #[arg(long)]
    jobs: Option<usize>,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Start no more seeds after this many seconds.
    #[arg(long)]
    time_budget: Option<u64>,
    /// Print SEED EVENT_HASH IMAGE_HASH for every seed.
    #[arg(long)]
    hashes: bool,
    #[command(flatten)]
    drawing: Drawing,
    /// Run a filesystem in memory that is right by construction: tests the judge.
    #[arg(long)]
    reference: bool,
    /// Write the plans of failing seeds into this directory, as KIND-SEED.json.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Only every N-th seed, beginning with the K-th: K/N.
    #[arg(long, value_parser = Shard::parse)]
    shard: Option<Shard>,
    /// Write a JUnit file.
    #[arg(long)]
    junit: Option<PathBuf>,
    /// Let one seed in a hundred fail on purpose: does the pipeline report it?
    #[arg(long)]
    canary: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What a sweep found.
pub struct Found {
    /// Outcomes by seed.
    pub outcomes: BTreeMap<u64, Outcome>,
    /// Wall clock seconds.
    pub seconds: f64,
}

/// How to sweep.
pub struct Hunt {
    /// First seed.
    pub from: u64,
    /// Number of seeds.
    pub seeds: u64,
    /// Threads.
    pub jobs: usize,
    /// Seconds after which no more seeds are started.
    pub budget: Option<u64>,
    /// How seeds are drawn.
    pub way: Way,
    /// The reference instead of Outrider.
    pub reference: bool,
    /// Planted bug.
    pub mutant: Option<&'static str>,
    /// Stop at the first failure.
    pub stop_at_first: bool,
    /// Say nothing about failures.
    pub quiet: bool,
}

/// Runs the seeds of a hunt.
pub fn hunt(hunt: &Hunt, bar: &ProgressBar) -> Found {
    hunt_shard(hunt, Shard::WHOLE, false, bar)
}

#[allow(clippy::disallowed_types, clippy::disallowed_methods)] // how long the sweep takes, outside any world
fn hunt_shard(hunt: &Hunt, shard: Shard, canary: bool, bar: &ProgressBar) -> Found {
    let seeds = shard.len(hunt.seeds);
    let start = std::time::Instant::now();
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let outcomes = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..hunt.jobs {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let late = hunt.budget.is_some_and(|s| start.elapsed().as_secs() >= s);
                    if index >= seeds || late || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let seed = hunt.from + shard.nth(index);
                    let plan = hunt.way.draw(seed);
                    let mut outcome = run_plan(&plan, hunt.reference, hunt.mutant);
                    // A seed that fails without the planted bug proves nothing about it.
                    if hunt.mutant.is_some()
                        && outcome.failure.is_some()
                        && run_plan(&plan, hunt.reference, None).failure.is_some()
                    {
                        outcome.failure = None;
                    }
                    if canary && seed.is_multiple_of(100) {
                        outcome.failure.get_or_insert(Violation {
                            kind: "canary",
                            text: "this seed fails on purpose".to_owned(),
                        });
                    }
                    if outcome.failure.is_some() {
                        if hunt.stop_at_first {
                            stop.store(true, Ordering::Relaxed);
                        }
                        if !hunt.quiet {
                            bar.suspend(|| eprintln!("{}", report(&outcome, &hunt.way)));
                        }
                    }
                    outcomes
                        .lock()
                        .expect("no worker panics")
                        .insert(seed, outcome);
                    bar.inc(1);
                }
            });
        }
    });
    Found {
        outcomes: outcomes.into_inner().expect("no worker panics"),
        seconds: start.elapsed().as_secs_f64(),
    }
}

fn report(outcome: &Outcome, way: &Way) -> String {
    let Some(failure) = &outcome.failure else {
        return String::new();
    };
    let mut text = failure.text.clone();
    if text.len() > 700 {
        let cut = (0..=700).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(cut.unwrap_or(0));
        text.push_str(" ...");
    }
    format!(
        "seed {} FAILED ({}): {text}\n  {}",
        outcome.seed,
        failure.kind,
        command(outcome.seed, way)
    )
}

fn command(seed: u64, way: &Way) -> String {
    format!("replay with: outrider-sim replay {seed}{} --log", way.flags)
}

/// All processors.
pub fn all_processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    let given = Shard::from_environment(|name| std::env::var(name).ok())?;
    let shard = args.shard.or(given).unwrap_or(Shard::WHOLE);
    let bar = if args.json || args.hashes {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(shard.len(args.seeds))
    };
    let style = "{elapsed_precise} {wide_bar} {pos}/{len} seeds, {per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    let hunt = Hunt {
        from: args.from,
        seeds: args.seeds,
        jobs: args.jobs.unwrap_or_else(all_processors).max(1),
        budget: args.time_budget,
        way: args.drawing.read()?,
        reference: args.reference,
        mutant: None,
        stop_at_first: false,
        quiet: args.json || args.hashes,
    };
    let found = hunt_shard(&hunt, shard, args.canary, &bar);
    bar.finish_and_clear();
    let replay = |seed| command(seed, &hunt.way);
    if let Some(file) = &args.junit {
        let outcomes: Vec<&Outcome> = found.outcomes.values().collect();
        let text = junit(&outcomes, found.seconds, replay);
        std::fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    if std::env::var_os("GITHUB_ACTIONS").is_some() {
        // GitHub shows ten of a step; the others are in the log.
        for outcome in found.outcomes.values() {
            if let Some(line) = annotation(outcome, &replay(outcome.seed)) {
                eprintln!("{line}");
            }
        }
    }
    if let Some(dir) = &args.save {
        save_failing(&found, &hunt.way, dir)?;
    }
    if args.hashes {
        for (seed, outcome) in &found.outcomes {
            println!(
                "{seed} {:016x} {:016x}",
                outcome.event_hash, outcome.image_hash
            );
        }
    }
    let failed: Vec<&Outcome> = found
        .outcomes
        .values()
        .filter(|outcome| outcome.failure.is_some())
        .collect();
    if args.json {
        print_json(&found, &failed);
    } else if !args.hashes {
        print_summary(&found, &failed, &hunt.way);
    }
    Ok(failed.is_empty())
}

fn save_failing(found: &Found, way: &Way, dir: &Path) -> Result<(), String> {
    for outcome in found.outcomes.values() {
        let plan = way.draw(outcome.seed);
        if let (Some(failure), Some(case)) = (&outcome.failure, Case::failed(plan, None, outcome)) {
            std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
            case.save(&dir.join(format!("{}-{}.json", failure.kind, outcome.seed)))?;
        }
    }
    Ok(())
}

fn totals(found: &Found) -> (u64, u64, u64) {
    let sum = |f: fn(&Outcome) -> u64| found.outcomes.values().map(f).sum();
    (sum(|o| o.calls), sum(|o| o.nanos), sum(|o| o.unjudged))
}

fn print_summary(found: &Found, failed: &[&Outcome], way: &Way) {
    let (calls, nanos, unjudged) = totals(found);
    let seeds = found.outcomes.len();
    println!(
        "{seeds} seeds, {} failed, {calls} calls, {unjudged} windows not judged; {:.1} s, \
         {:.0} seeds per minute, {:.0} simulated seconds per second",
        failed.len(),
        found.seconds,
        seeds as f64 * 60.0 / found.seconds,
        nanos as f64 / 1e9 / found.seconds
    );
    let mut probes: BTreeMap<&str, u64> = BTreeMap::new();
    for (probe, count) in found.outcomes.values().flat_map(|o| &o.probes) {
        *probes.entry(probe).or_default() += count;
    }
    let reached: Vec<String> = probes.iter().map(|(p, n)| format!("{p} {n}")).collect();
    println!("reached: {}", reached.join(", "));
    if way.tuning.profile == Some(Profile::Cluster) {
        let missed: Vec<&str> = steps::all().filter(|p| !probes.contains_key(p)).collect();
        println!("steps of the crash tables never hit: {}", missed.join(", "));
        let blamed = found.outcomes.values().filter(|o| o.blamed.is_some());
        println!("ended by a lying fence agent: {}", blamed.count());
    }
    let mut kinds: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for outcome in failed {
        let kind = outcome.failure.as_ref().map_or(String::new(), signature);
        kinds.entry(kind).or_default().push(outcome.seed);
    }
    for (kind, seeds) in kinds {
        println!(
            "{kind}: {} seeds, as {:?}",
            seeds.len(),
            &seeds[..seeds.len().min(12)]
        );
    }
    for outcome in failed {
        println!("seed {} {}", outcome.seed, command(outcome.seed, way));
    }
}

fn print_json(found: &Found, failed: &[&Outcome]) {
    let (calls, nanos, unjudged) = totals(found);
    let failures: Vec<serde_json::Value> = failed
        .iter()
        .map(|outcome| {
            let failure = outcome.failure.as_ref();
            serde_json::json!({
                "seed": outcome.seed,
                "kind": failure.map_or("", |failure| failure.kind),
                "signature": failure.map_or(String::new(), signature),
                "text": failure.map_or("", |failure| failure.text.as_str()),
            })
        })
        .collect();
    let summary = serde_json::json!({
        "seeds": found.outcomes.len(),
        "failed": failed.len(),
        "failures": failures,
        "calls": calls,
        "unjudged": unjudged,
        "simulated_seconds": nanos as f64 / 1e9,
        "seconds": found.seconds,
    });
    println!("{summary}");
}

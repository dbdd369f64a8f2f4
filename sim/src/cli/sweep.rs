//! Many seeds on several threads.

use super::report::{Shard, annotation, junit};
use super::spent::{self, Spent};
use super::{Drawing, Way, mutants, run_plan, run_with};
use indicatif::{ProgressBar, ProgressStyle};
use outrider_sim::case::{Case, signature};
use outrider_sim::oracle::Violation;
use outrider_sim::plan::Profile;
use outrider_sim::plan::steps;
use outrider_sim::world::{Options, Outcome};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim sweep --seeds 1000\n  \
    outrider-sim sweep --seeds 100000 --shard 3/8 --save failures --junit sweep.xml\n  \
    outrider-sim sweep --profile cluster --time-budget 600\n  \
    outrider-sim sweep --stress --seeds 200 --mutant dead_data_not_flushed\n  \
    outrider-sim sweep --profile cluster --set cluster.nodes=3 --seeds 100 --jobs 1 --each\n\n\
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
    /// Switch this planted bug on: a sweep as a new user meets it, with something to find.
    #[arg(long, conflicts_with = "reference")]
    mutant: Option<String>,
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
    /// Print a line of JSON for each seed: what its plan has, what it took.
    #[arg(long, conflicts_with = "hashes")]
    each: bool,
}

/// What a sweep found.
pub struct Found {
    /// Outcomes by seed.
    pub outcomes: BTreeMap<u64, Outcome>,
    /// Probes reached by all of them, with counts; those of the outcomes are in here.
    pub probes: BTreeMap<&'static str, u64>,
    /// What each seed took, in the order of the seeds.
    pub spent: Vec<Spent>,
    /// Memory of the process when half of the seeds had run.
    pub memory_at_half: u64,
    /// Wall clock seconds.
    pub seconds: f64,
}

/// What is known while it runs.
#[derive(Default)]
struct Ran {
    outcomes: BTreeMap<u64, Outcome>,
    probes: BTreeMap<&'static str, u64>,
    spent: BTreeMap<u64, Spent>,
    memory_at_half: u64,
}

impl Ran {
    /// Adds a seed. A sweep of any length keeps little of each: not what it has reached.
    fn add(&mut self, mut outcome: Outcome, spent: Spent, half: u64) {
        for (probe, count) in std::mem::take(&mut outcome.probes) {
            *self.probes.entry(probe).or_default() += count;
        }
        self.spent.insert(outcome.seed, spent);
        self.outcomes.insert(outcome.seed, outcome);
        if self.outcomes.len() as u64 == half {
            self.memory_at_half = spent::memory();
        }
    }
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
    let ran = Mutex::new(Ran::default());
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
                    let cpu = Arc::new(AtomicU64::new(0));
                    let options = Options {
                        mutant: hunt.mutant,
                        spent: Some(Arc::clone(&cpu)),
                        ..Options::default()
                    };
                    let mut outcome = run_with(&plan, hunt.reference, options);
                    let spent = Spent::new(&plan, &outcome, cpu.load(Ordering::Relaxed));
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
                            bar.suspend(|| eprintln!("{}", report(&outcome, hunt)));
                        }
                    }
                    let mut ran = ran.lock().expect("no worker panics");
                    ran.add(outcome, spent, seeds.div_ceil(2));
                    bar.inc(1);
                }
            });
        }
    });
    let ran = ran.into_inner().expect("no worker panics");
    Found {
        outcomes: ran.outcomes,
        probes: ran.probes,
        spent: ran.spent.into_values().collect(),
        memory_at_half: ran.memory_at_half,
        seconds: start.elapsed().as_secs_f64(),
    }
}

fn report(outcome: &Outcome, hunt: &Hunt) -> String {
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
        command(outcome.seed, &hunt.way, hunt.mutant)
    )
}

fn command(seed: u64, way: &Way, mutant: Option<&str>) -> String {
    let mutant = mutant.map_or(String::new(), |name| format!(" --mutant {name}"));
    format!(
        "replay with: outrider-sim replay {seed}{}{mutant} --log",
        way.flags
    )
}

/// All processors.
pub fn all_processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    let given = Shard::from_environment(|name| std::env::var(name).ok())?;
    let shard = args.shard.or(given).unwrap_or(Shard::WHOLE);
    let bar = if args.json || args.hashes || args.each {
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
        mutant: args.mutant.as_deref().map(mutants::find).transpose()?,
        stop_at_first: false,
        quiet: args.json || args.hashes || args.each,
    };
    let found = hunt_shard(&hunt, shard, args.canary, &bar);
    bar.finish_and_clear();
    let replay = |seed| command(seed, &hunt.way, hunt.mutant);
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
        save_failing(&found, &hunt, dir)?;
    }
    if args.hashes {
        for (seed, outcome) in &found.outcomes {
            println!(
                "{seed} {:016x} {:016x}",
                outcome.event_hash, outcome.image_hash
            );
        }
    }
    for spent in found.spent.iter().filter(|_| args.each) {
        println!("{}", spent.to_json());
    }
    let failed: Vec<&Outcome> = found
        .outcomes
        .values()
        .filter(|outcome| outcome.failure.is_some())
        .collect();
    if args.json {
        print_json(&found, &failed);
    } else if !args.hashes && !args.each {
        print_summary(&found, &failed, &hunt);
    }
    Ok(failed.is_empty())
}

fn save_failing(found: &Found, hunt: &Hunt, dir: &Path) -> Result<(), String> {
    for outcome in found.outcomes.values() {
        let Some(failure) = &outcome.failure else {
            continue;
        };
        let plan = hunt.way.draw(outcome.seed);
        if let Some(case) = Case::failed(plan, hunt.mutant, outcome) {
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

fn print_summary(found: &Found, failed: &[&Outcome], hunt: &Hunt) {
    let (calls, nanos, unjudged) = totals(found);
    let way = &hunt.way;
    let seeds = found.outcomes.len();
    println!(
        "{seeds} seeds, {} failed, {calls} calls, {unjudged} windows not judged; {:.1} s, \
         {:.0} seeds per minute, {:.0} simulated seconds per second",
        failed.len(),
        found.seconds,
        seeds as f64 * 60.0 / found.seconds,
        nanos as f64 / 1e9 / found.seconds
    );
    let (operations, faults) = extent(found);
    let [median, nine, most] = spent::quantiles(&found.spent);
    println!(
        "{operations} operations and {faults} faults planned; processor time of a seed: median \
         {median:.3} s, 90% within {nine:.3} s, most {most:.3} s; at most {} MiB of memory",
        spent::peak_memory() >> 20
    );
    let probes = &found.probes;
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
        let command = command(outcome.seed, way, hunt.mutant);
        println!("seed {} {command}", outcome.seed);
    }
}

/// Operations and faults of all plans.
fn extent(found: &Found) -> (usize, usize) {
    let extents = found.spent.iter().map(Spent::extent);
    extents.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
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
    let (operations, faults) = extent(found);
    let [median, nine, most] = spent::quantiles(&found.spent);
    let summary = serde_json::json!({
        "operations": operations,
        "faults": faults,
        "cpu_seconds": { "median": median, "p90": nine, "max": most },
        "memory_bytes": {
            "peak": spent::peak_memory(), "at_half": found.memory_at_half, "at_end": spent::memory(),
        },
        "probes": found.probes,
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

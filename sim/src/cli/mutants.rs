//! Planted bugs: which exist, how long a sweep needs to find each, and the page
//! of figures (`docs/mutants.md`).
//!
//! A bug of the protocol brains is hunted by the exploration that is meant for it,
//! one that needs several nodes in worlds of several, all others in stressed worlds
//! of one node.
//!
//! What can go wrong: a bug counted as found by a world that fails anyway. A seed,
//! or an exploration, counts only if it passes without the bug.

use super::sweep::{Hunt, all_processors, hunt};
use super::{Way, parse_profile};
use indicatif::{ProgressBar, ProgressStyle};
use outrider_sim::explore::scenarios::{self, Scenario};
use outrider_sim::plan::Profile;
use outrider_sim::world::on_fresh_thread;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// How many nodes a world needs to show a bug.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nodes {
    One,
    Many,
}
use Nodes::{Many, One};

/// A planted bug.
struct Mutant {
    name: &'static str,
    /// Class of spec 18 section 4.
    class: u8,
    nodes: Nodes,
    /// What it breaks, with the row of spec 18 or the section it is about.
    what: &'static str,
}

impl Mutant {
    /// The worlds that it is hunted in: those of one node as their seeds draw them,
    /// or those of several.
    fn profile(&self) -> Option<Profile> {
        (self.nodes == Many).then_some(Profile::Cluster)
    }
}

const fn m(name: &'static str, class: u8, nodes: Nodes, what: &'static str) -> Mutant {
    Mutant {
        name,
        class,
        nodes,
        what,
    }
}

#[rustfmt::skip]
static MUTANTS: [Mutant; 57] = [
    m("super_before_flush", 1, One, "the super is written before its blocks are flushed (04 s6, 18 A18)"),
    m("commit_not_durable_reply", 1, One, "a commit is answered before the super is written (18 A18)"),
    m("commit_retries_deltas", 1, One, "a retried commit applies its items again (04 H1)"),
    m("fsync_answers_early", 1, One, "fsync answers when the commit has only begun (04 I16)"),
    m("repeated_message_taken", 1, One, "a message sent again after a reconnect is taken twice (08 s4, 18 A13)"),
    m("reconnect_resends_nothing", 1, One, "what a broken connection swallowed is not sent again (08 s4, 18 B19)"),
    m("invalidate_before_commit", 2, One, "a lock is given back before the commit (10 s15)"),
    m("kernel_cache_not_invalidated", 2, Many, "the kernel is not told to forget (12 s25)"),
    m("dirty_pages_stay", 2, Many, "pages that mappings have changed stay in the kernel when others may read (12 s25)"),
    m("written_pages_not_awaited", 2, Many, "a lock is given back before the kernel has written its dirty pages (14 s28)"),
    m("acl_not_taken_back", 2, Many, "the kernel is not told to forget an ACL (13 s15)"),
    m("direct_write_leaves_pages", 2, One, "a direct write leaves old pages in the kernel (14 s9)"),
    m("early_grant_applied", 2, Many, "a grant that overtakes the end of a revocation is taken at once (10 s8)"),
    m("recovery_tells_new_mode", 2, Many, "a recovering server is told the mode of after the invalidation that still runs (18 A34)"),
    m("write_after_a_pause_unchecked", 3, Many, "who was paused writes without a look at the volume (18 B18)"),
    m("fence_recorded_late", 3, Many, "a server serves before FENCE is in its quorum block (09 s6)"),
    m("stop_hides_predecessor", 3, Many, "STOP is recorded though an earlier leader is not fenced (09 s9)"),
    m("leader_fence_not_awaited", 3, Many, "a server starts before the earlier leader is fenced (18 C9)"),
    m("stale_leader_starts", 4, Many, "a server is started for a term that is over (09 s5)"),
    m("votes_twice", 4, Many, "a quorum member votes twice in one term (18 B18)"),
    m("freed_block_reused", 5, One, "a block freed in a transaction is reused in the same one (03 s9)"),
    m("reclaim_skips_avail", 5, One, "reclaim of a dead mount loses its free blocks (18 A32)"),
    m("avail_head_late", 5, One, "some super blocks list as free what their own commit has used (03 s12)"),
    m("data_not_flushed", 5, One, "a commit does not flush the data device (14 s20)"),
    m("dead_data_not_flushed", 5, One, "what a dead mount wrote in place is shown before it is flushed (14 s20)"),
    m("truncate_flag_not_persisted", 5, One, "an interrupted truncate is not finished (14 s11)"),
    m("tail_not_zeroed", 5, One, "truncate leaves old bytes behind the new end (18 A29)"),
    m("freeing_forgets_progress", 5, One, "blocks of a merged tree are freed again in the next commit (05 s9)"),
    m("finalized_too_early", 5, One, "a log tree is finalized while it owns free extents (18 A32)"),
    m("freed_list_not_rotated", 6, One, "a nearly full freed list gets no new first block (18 A1, A12)"),
    m("hold_ignores_room", 6, One, "holders enter a transaction that has no room for them (18 A35)"),
    m("read_barrier_skipped", 7, One, "a read-in may overtake a commit (18 B2)"),
    m("stale_keeps_items", 7, One, "a retry after stale blocks keeps items of the old roots (18 B16)"),
    m("stale_block_believed", 7, One, "a block that was reused is taken for the old one (18 B16)"),
    m("deletion_item_dropped", 8, One, "a deletion item is dropped while older versions exist (18 A39)"),
    m("core_seq_restarts", 8, One, "seqs of a new server start before those of the last one (18 B20)"),
    m("first_tree_wins", 8, One, "readers take the version of the first tree, not the newest (18 A39)"),
    m("merge_keeps_first", 8, One, "a merge takes the version of its first input, not the newest (18 B14, B15)"),
    m("old_index_item_kept", 9, One, "an inode has two meta_seq items (18 A28)"),
    m("walk_beyond_last_seq", 9, Many, "a walk shows what may yet be lost, and passes what is older (15 s3)"),
    m("walk_ends_with_range", 9, One, "a walk does not go on behind a lock's range (15 s3)"),
    m("last_seq_ignores_open", 9, Many, "open transactions do not hold the committed seq back (04 s12)"),
    m("merge_remainder_dropped", 9, One, "what a bounded merge left over is never merged (18 A6)"),
    m("dead_keeps_merge_request", 10, One, "merge requests of dead mounts are never done (18 A10)"),
    m("orphan_deleted_twice", 11, One, "two tasks delete one inode (18 A38)"),
    m("orphan_item_missing", 11, One, "the last unlink leaves no orphan item (12 s7)"),
    m("open_inode_deleted", 11, One, "an unlinked inode is deleted while it is open (18 A38)"),
    m("farewell_before_commit", 12, One, "an unmount says farewell before its last commit (08 s11)"),
    m("stop_leaves_waiters", 12, One, "a severed mount leaves tasks waiting for locks (18 A4, C7)"),
    m("join_wrong_parent_key", 13, One, "a join leaves the parent's key of before (02 s22)"),
    m("acl_not_inherited", 13, One, "what is made in a directory gets no ACL from it (13 s15)"),
    m("chmod_leaves_acl", 13, One, "a chmod leaves the access ACL as it was (13 s15)"),
    m("deleted_handle_opens", 13, One, "the handle of a deleted inode still opens it (12 s19)"),
    m("readdir_pos_reused", 13, One, "directory positions are reused (12 s8)"),
    m("revoked_asks_for_nobody", 13, One, "who came to a lock during its revocation waits for ever (18 A19)"),
    m("flush_error_ignored", 14, One, "a commit goes on after a failed flush (04 s14)"),
    m("write_error_ignored", 14, One, "file data that could not be written counts as written (14 s20)"),
];

/// Seeds of one start begin here times the start's number.
const START_STRIDE: u64 = 100_000;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim mutants --list\n  \
    outrider-sim mutants dead_data_not_flushed\n  \
    outrider-sim mutants --all --write --starts 5 --total-budget 3600\n\n\
    A seed counts only if it passes without the bug.\n\
    Exit code 0: all were found; 1: one was not; 2: it could not run.")]
pub struct Args {
    /// The bug to hunt for.
    name: Option<String>,
    /// Only list them.
    #[arg(long)]
    list: bool,
    /// Hunt for all of them, as without a name.
    #[arg(long, conflicts_with = "name")]
    all: bool,
    /// Give up after this many seeds.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// Give up after this many seconds for each start of each bug.
    #[arg(long, default_value_t = 120)]
    time_budget: u64,
    /// Begin no other hunt after this many seconds; a later run goes on from there.
    #[arg(long)]
    total_budget: Option<u64>,
    /// Hunt from this many first seeds and take the median: 1, or 5 for the page.
    #[arg(long)]
    starts: Option<u64>,
    /// Hunt in worlds of this kind instead of those that suit each bug.
    #[arg(long, value_parser = parse_profile)]
    profile: Option<Profile>,
    /// Worlds at a time; the number of processors unless given.
    #[arg(long)]
    jobs: Option<usize>,
    /// Write the page of figures. Hunts that the state file has are not repeated.
    #[arg(long, conflicts_with = "profile")]
    write: bool,
    /// The page.
    #[arg(long, default_value = "docs/mutants.md")]
    page: PathBuf,
    /// What earlier runs found, for --write.
    #[arg(long, default_value = "target/mutants.json")]
    state: PathBuf,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What one hunt came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Hunted {
    /// The seed that found it.
    seed: Option<u64>,
    /// Seeds until then, or all that were run.
    seeds: u64,
    /// It was no stressed world that found it.
    #[serde(default)]
    plain: bool,
    /// The exploration that found it.
    #[serde(default)]
    explored: Option<String>,
    /// States that an exploration visited.
    #[serde(default)]
    states: u64,
    /// Wall clock seconds.
    seconds: f64,
    /// Which oracle saw it.
    kind: String,
}

impl Hunted {
    fn found(&self) -> bool {
        self.seed.is_some() || self.explored.is_some()
    }
}

/// Hunts by bug and start.
type Results = BTreeMap<String, BTreeMap<u64, Hunted>>;

/// The static name of a planted bug.
pub fn find(name: &str) -> Result<&'static str, String> {
    known(name).map(|mutant| mutant.name)
}

fn known(name: &str) -> Result<&'static Mutant, String> {
    let found = MUTANTS.iter().find(|known| known.name == name);
    found.ok_or_else(|| format!("no planted bug is named {name}: see `mutants --list`"))
}

/// The exploration that is meant for a bug, unless another way was asked for.
fn exploration(name: &str, profile: Option<Profile>) -> Option<&'static Scenario> {
    let (_, scenario) = scenarios::MUTANTS.iter().find(|(bug, _)| *bug == name)?;
    let found = || scenarios::SCENARIOS.iter().find(|s| s.name == *scenario);
    profile.is_none().then(found).flatten()
}

/// States visited at most when a bug is hunted by an exploration.
const EXPLORED: u64 = 20_000_000;

#[allow(clippy::disallowed_types, clippy::disallowed_methods)] // how long it takes, outside any world
fn explore(scenario: &'static Scenario, name: &'static str) -> Result<Hunted, String> {
    let begun = std::time::Instant::now();
    let run = |mutant| {
        on_fresh_thread(move || {
            outrider_core::env::set_mutant(mutant);
            scenario.run(EXPLORED)
        })
    };
    let report = run(Some(name))?;
    let seconds = begun.elapsed().as_secs_f64();
    let found = report.violation.is_some() && run(None)?.violation.is_none();
    Ok(Hunted {
        seed: None,
        plain: false,
        seeds: 0,
        explored: found.then(|| scenario.name.to_owned()),
        states: report.states,
        seconds,
        kind: if found { "explore" } else { "" }.to_owned(),
    })
}

fn hunt_one(args: &Args, mutant: &Mutant, start: u64) -> Result<Hunted, String> {
    if let Some(scenario) = exploration(mutant.name, args.profile) {
        return explore(scenario, mutant.name);
    }
    let stressed = hunt_seeds(args, mutant, start, true);
    if stressed.seed.is_some() || mutant.nodes == Many {
        return Ok(stressed);
    }
    // Some bugs need the longer and plainer worlds.
    let plain = hunt_seeds(args, mutant, start, false);
    Ok(Hunted {
        seeds: stressed.seeds + plain.seeds,
        seconds: stressed.seconds + plain.seconds,
        plain: plain.seed.is_some(),
        ..plain
    })
}

/// Hunts in stressed worlds or in plain ones.
fn hunt_seeds(args: &Args, mutant: &Mutant, start: u64, stress: bool) -> Hunted {
    let from = start * START_STRIDE;
    let found = hunt(
        &Hunt {
            from,
            seeds: args.seeds,
            jobs: args.jobs.unwrap_or_else(all_processors).max(1),
            budget: Some(args.time_budget),
            way: Way::of(args.profile.or(mutant.profile()), stress),
            reference: false,
            mutant: Some(mutant.name),
            stop_at_first: true,
            quiet: true,
        },
        &ProgressBar::hidden(),
    );
    let first = found.outcomes.values().find(|o| o.failure.is_some());
    let failure = first.and_then(|outcome| outcome.failure.as_ref());
    Hunted {
        seed: first.map(|outcome| outcome.seed),
        seeds: first.map_or(found.outcomes.len() as u64, |o| o.seed - from + 1),
        plain: false,
        explored: None,
        states: 0,
        seconds: found.seconds,
        kind: failure.map_or(String::new(), |failure| failure.kind.to_owned()),
    }
}

/// Runs the command.
#[allow(clippy::disallowed_types, clippy::disallowed_methods)] // how long the hunts take, outside any world
pub fn run(args: &Args) -> Result<bool, String> {
    if args.list {
        for mutant in &MUTANTS {
            let nodes = if mutant.nodes == Many {
                " (many nodes)"
            } else {
                ""
            };
            println!(
                "{:30} class {:2}  {}{nodes}",
                mutant.name, mutant.class, mutant.what
            );
        }
        return Ok(true);
    }
    let chosen = match &args.name {
        Some(name) => vec![known(name)?],
        None => MUTANTS.iter().collect(),
    };
    let usual = if args.write { 5 } else { 1 };
    let starts = args.starts.unwrap_or(usual).max(1);
    let mut results = if args.write {
        load(&args.state)?
    } else {
        Results::new()
    };
    let bar = progress(args, chosen.len() as u64 * starts)?;
    let begun = std::time::Instant::now();
    let mut complete = true;
    for mutant in &chosen {
        let name = mutant.name;
        // An exploration begins nowhere else.
        let explored = exploration(name, args.profile).is_some();
        for start in 0..starts {
            bar.set_message(name);
            let before = results.get(name);
            if start > 0 && explored || before.is_some_and(|hunts| hunts.contains_key(&start)) {
                bar.inc(1);
                continue;
            }
            if args
                .total_budget
                .is_some_and(|s| begun.elapsed().as_secs() >= s)
            {
                complete = false;
                break;
            }
            let hunted = hunt_one(args, mutant, start)?;
            if !args.json {
                bar.suspend(|| println!("{}", line(name, start, &hunted)));
            }
            results
                .entry(name.to_owned())
                .or_default()
                .insert(start, hunted);
            if args.write {
                save(&args.state, &results)?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    if args.write {
        let text = page(&results, args);
        std::fs::write(&args.page, text).map_err(|e| format!("{}: {e}", args.page.display()))?;
    }
    if args.json {
        let text = serde_json::to_string(&results).map_err(|e| e.to_string())?;
        println!("{text}");
    }
    let found = |mutant: &&&Mutant| {
        let hunts = results.get(mutant.name);
        hunts.is_some_and(|hunts| hunts.values().any(Hunted::found))
    };
    let found = chosen.iter().filter(found).count();
    if !args.json && chosen.len() > 1 {
        println!("{found} of {} planted bugs found", chosen.len());
    }
    Ok(complete && found == chosen.len())
}

fn progress(args: &Args, hunts: u64) -> Result<ProgressBar, String> {
    if args.json {
        return Ok(ProgressBar::hidden());
    }
    let bar = ProgressBar::new(hunts);
    let style = "{elapsed_precise} {wide_bar} {pos}/{len} hunts, {msg}";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    Ok(bar)
}

fn line(name: &str, start: u64, hunted: &Hunted) -> String {
    let extent = match hunted.states {
        0 => format!("{} seeds", hunted.seeds),
        states => format!("{states} states"),
    };
    let verdict = match (&hunted.seed, &hunted.explored) {
        (Some(seed), _) => format!("found by seed {seed} ({})", hunted.kind),
        (None, Some(scenario)) => format!("found by explore {scenario}"),
        (None, None) => "NOT FOUND".to_owned(),
    };
    format!(
        "{name:30} start {start}: {verdict}, {extent}, {:.1} s",
        hunted.seconds
    )
}

fn load(file: &Path) -> Result<Results, String> {
    match std::fs::read_to_string(file) {
        Ok(text) => serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Results::new()),
        Err(error) => Err(format!("{}: {error}", file.display())),
    }
}

fn save(file: &Path, results: &Results) -> Result<(), String> {
    let text = serde_json::to_string_pretty(results).map_err(|e| e.to_string())?;
    std::fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
}

/// The middle of the starts; `None` if less than half of them found it.
fn median(mut found: Vec<f64>, starts: usize) -> Option<f64> {
    found.sort_by(f64::total_cmp);
    found.get(starts.saturating_sub(1) / 2).copied()
}

fn page(results: &Results, args: &Args) -> String {
    let mut text = format!(
        "# Planted bugs\n\n\
         Written by `outrider-sim mutants --all --write`. Each bug is compiled into the simulator\n\
         only, and switched on for a sweep of up to {} stressed seeds (at most {} s), then of as\n\
         many plain ones, from each of several first seeds. A seed counts if it fails with the bug and passes without it. Figures are\n\
         medians over the starts; classes are those of spec 18 section 4. Bugs of the protocol\n\
         brains are found by an exploration, which has states instead of seeds. The last column is\n\
         what shows the bug to `outrider-sim`, with `--log` for a replay line by line.\n\n\
         | class | bug | what it breaks | found | seeds | seconds | seen by | shown by |\n\
         |---|---|---|---|---|---|---|---|\n",
        args.seeds, args.time_budget
    );
    let none = BTreeMap::new();
    for mutant in &MUTANTS {
        let hunts = results.get(mutant.name).unwrap_or(&none);
        let found: Vec<&Hunted> = hunts.values().filter(|h| h.found()).collect();
        let number = |of: fn(&Hunted) -> f64, digits: usize| {
            median(found.iter().map(|h| of(h)).collect(), hunts.len())
                .map_or("-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let mut kinds: Vec<&str> = found.iter().map(|h| h.kind.as_str()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let first = found.first();
        let extent = match first.map_or(0, |hunted| hunted.states) {
            0 => number(|h| h.seeds as f64, 0),
            states => format!("{states} states"),
        };
        let nodes = if mutant.nodes == Many {
            " Needs many nodes."
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "| {} | `{}` | {}.{nodes} | {} of {} | {extent} | {} | {} | {} |",
            mutant.class,
            mutant.name,
            mutant.what,
            found.len(),
            hunts.len(),
            number(|h| h.seconds, 1),
            kinds.join(", "),
            first.map_or(String::new(), |hunted| shown_by(mutant, hunted)),
        );
    }
    text
}

/// The command that shows a bug.
fn shown_by(mutant: &Mutant, hunted: &Hunted) -> String {
    let name = mutant.name;
    match (hunted.seed, &hunted.explored) {
        (Some(seed), _) => {
            let worlds = match mutant.profile() {
                Some(Profile::Cluster) => " --profile cluster",
                _ if hunted.plain => "",
                _ => " --stress",
            };
            format!("`replay {seed}{worlds} --mutant {name}`")
        }
        (None, Some(scenario)) => format!("`explore {scenario} --mutant {name}`"),
        (None, None) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_found_by_less_than_half_of_the_starts_has_no_median() {
        assert_eq!(median(vec![9.0, 1.0, 5.0], 5), Some(9.0));
        assert_eq!(median(vec![9.0, 1.0], 5), None);
        assert_eq!(median(vec![3.0], 1), Some(3.0));
        assert_eq!(median(Vec::new(), 0), None);
    }

    #[test]
    fn bugs_of_the_brains_are_known_and_have_an_exploration() {
        for (bug, _) in scenarios::MUTANTS {
            assert!(find(bug).is_ok());
            assert!(exploration(bug, None).is_some());
            assert!(exploration(bug, Some(Profile::Cluster)).is_none());
        }
        assert!(exploration("super_before_flush", None).is_none());
        let many = known("votes_twice").unwrap();
        assert_eq!(many.profile(), Some(Profile::Cluster));
    }

    #[test]
    fn names_are_unique_and_classes_are_the_specs() {
        let mut names: Vec<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), MUTANTS.len());
        assert!(
            MUTANTS
                .iter()
                .all(|mutant| (1..=15).contains(&mutant.class))
        );
    }
}

//! Planted bugs: which exist, and how long a sweep needs to find each.

use super::sweep::{Hunt, all_processors, hunt};
use indicatif::ProgressBar;

/// Name and what it breaks, with the row of spec 18 or the section it is about.
const MUTANTS: [(&str, &str); 19] = [
    (
        "freed_block_reused",
        "a block freed in a transaction is reused in the same one (03 s9)",
    ),
    (
        "join_wrong_parent_key",
        "a join leaves the parent's key of before (02 s22)",
    ),
    (
        "super_before_flush",
        "the super is written before its blocks are flushed (04 s6, 18 A18)",
    ),
    (
        "commit_not_durable_reply",
        "a commit is answered before the super is written (18 A18)",
    ),
    (
        "reclaim_skips_avail",
        "reclaim of a dead mount loses its free blocks (18 A32)",
    ),
    (
        "read_barrier_skipped",
        "a read-in may overtake a commit (18 B2)",
    ),
    (
        "stale_keeps_items",
        "a retry after stale blocks keeps items of the old roots (18 B16)",
    ),
    (
        "deletion_item_dropped",
        "a deletion item is dropped while older versions exist (18 A39)",
    ),
    (
        "commit_retries_deltas",
        "a retried commit applies its items again (04 H1)",
    ),
    (
        "data_not_flushed",
        "a commit does not flush the data device (14 s20)",
    ),
    (
        "orphan_deleted_twice",
        "two tasks delete one inode (18 A38)",
    ),
    (
        "orphan_item_missing",
        "the last unlink leaves no orphan item (12 s7)",
    ),
    (
        "readdir_pos_reused",
        "directory positions are reused (12 s8)",
    ),
    (
        "truncate_flag_not_persisted",
        "an interrupted truncate is not finished (14 s11)",
    ),
    (
        "tail_not_zeroed",
        "truncate leaves old bytes behind the new end (18 A29)",
    ),
    (
        "invalidate_before_commit",
        "a lock is given back before the commit (10 s15)",
    ),
    (
        "kernel_cache_not_invalidated",
        "the kernel is not told to forget (12 s25)",
    ),
    (
        "farewell_before_commit",
        "an unmount says farewell before its last commit (08 s11)",
    ),
    (
        "fsync_answers_early",
        "fsync answers when the commit has only begun (04 I16)",
    ),
];

#[derive(clap::Args)]
pub struct Args {
    /// The bug to hunt for; all unless given.
    name: Option<String>,
    /// Only list them.
    #[arg(long)]
    list: bool,
    /// Give up after this many seeds.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// Give up after this many seconds for each.
    #[arg(long, default_value_t = 120)]
    time_budget: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// The static name of a planted bug.
pub fn find(name: &str) -> Result<&'static str, String> {
    let found = MUTANTS.iter().find(|(known, _)| *known == name);
    found
        .map(|(name, _)| *name)
        .ok_or_else(|| format!("no planted bug is named {name}: see `mutants --list`"))
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    if args.list {
        for (name, what) in MUTANTS {
            println!("{name:30} {what}");
        }
        return Ok(true);
    }
    let chosen = match &args.name {
        Some(name) => vec![find(name)?],
        None => MUTANTS.iter().map(|(name, _)| *name).collect(),
    };
    let mut all_found = true;
    let mut results = Vec::new();
    for name in chosen {
        let found = hunt(
            &Hunt {
                from: 0,
                seeds: args.seeds,
                jobs: all_processors(),
                budget: Some(args.time_budget),
                profile: None,
                reference: false,
                mutant: Some(name),
                stop_at_first: true,
                quiet: true,
            },
            &ProgressBar::hidden(),
        );
        let first = found.outcomes.values().find(|o| o.failure.is_some());
        all_found &= first.is_some();
        let (seeds, seconds) = (found.outcomes.len(), found.seconds);
        let how = first.and_then(|outcome| outcome.failure.as_ref());
        results.push(serde_json::json!({
            "mutant": name,
            "found": first.is_some(),
            "seed": first.map(|outcome| outcome.seed),
            "kind": how.map(|failure| failure.kind),
            "seeds": seeds,
            "seconds": seconds,
        }));
        if !args.json {
            let verdict = match (first, how) {
                (Some(outcome), Some(failure)) => {
                    format!("found by seed {} ({})", outcome.seed, failure.kind)
                }
                _ => "NOT FOUND".to_owned(),
            };
            println!("{name:30} {verdict}, {seeds} seeds, {seconds:.1} s");
        }
    }
    if args.json {
        println!("{}", serde_json::Value::Array(results));
    }
    Ok(all_found)
}

//! `cost`: what creating files costs in a cluster, by model.

use outrider_sim::cost::{CASES, CPU, Figures, measure};
use serde_json::json;

/// What to measure.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  outrider-sim cost\n  outrider-sim cost --files 50000 --json")]
pub struct Args {
    /// Files that each mount makes.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    files: u32,
    /// A line of JSON for each case.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    if !args.json {
        println!(
            "creates in directories of their own, then a sync; each takes its machine {} us\n\n\
             | who | creates/s | messages | commits | server commits | requests | bytes written |\n\
             |---|---|---|---|---|---|---|",
            CPU / 1_000
        );
    }
    let mut alone = 0.0f64;
    for case in CASES {
        let figures = measure(case, args.files).map_err(|e| format!("{}: {e}", case.name))?;
        let rate = figures.rate();
        let one = case.mounts - case.first == 1;
        if one {
            alone = alone.max(rate);
        }
        if args.json {
            println!("{}", to_json(case.name, &figures, rate / alone));
            continue;
        }
        let ratio = if one {
            String::new()
        } else {
            format!(" ({:.2} of one)", rate / alone)
        };
        let each = |count| figures.each(count);
        println!(
            "| {} | {rate:.0}{ratio} | {:.4} | {:.5} | {:.5} | {:.3} | {:.0} |",
            case.name,
            each(figures.messages),
            each(figures.commits),
            each(figures.server_commits),
            each(figures.requests),
            each(figures.bytes),
        );
    }
    if !args.json {
        println!("\nAll but the rate: for each create.");
    }
    Ok(true)
}

fn to_json(name: &str, figures: &Figures, ratio: f64) -> serde_json::Value {
    json!({
        "case": name,
        "files": figures.files,
        "nanos": figures.nanos,
        "creates_per_second": figures.rate(),
        "of_one": ratio,
        "messages": figures.messages,
        "datagrams": figures.datagrams,
        "commits": figures.commits,
        "server_commits": figures.server_commits,
        "requests": figures.requests,
        "bytes_written": figures.bytes,
    })
}

//! `explore`: every order of events within small bounds.

use indicatif::HumanCount;
use outrider_sim::explore::scenarios::{MUTANTS, SCENARIOS};
use serde_json::json;

/// What to explore.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  outrider-sim explore --list\n  outrider-sim explore\n  outrider-sim explore three-members --limit 50000000 --json"
)]
pub struct Args {
    /// Configurations to explore; all if none is named.
    names: Vec<String>,
    /// List the configurations and end.
    #[arg(long)]
    list: bool,
    /// States to visit at most in each configuration.
    #[arg(long, default_value_t = 20_000_000)]
    limit: u64,
    /// A line of JSON for each configuration.
    #[arg(long)]
    json: bool,
    /// Switch a planted bug on.
    #[arg(long)]
    mutant: Option<String>,
}

/// Runs the command; false if an invariant was broken.
pub fn run(args: &Args) -> Result<bool, String> {
    if args.list {
        for scenario in &SCENARIOS {
            println!("{:20} {}", scenario.name, scenario.about);
        }
        return Ok(true);
    }
    if let Some(unknown) = args
        .names
        .iter()
        .find(|name| SCENARIOS.iter().all(|s| s.name != **name))
    {
        return Err(format!(
            "no configuration is called {unknown}; see explore --list"
        ));
    }
    let mutant = args.mutant.as_deref().map(planted).transpose()?;
    outrider_core::env::set_mutant(mutant);
    let mut clean = true;
    let named = |name: &str| args.names.is_empty() || args.names.iter().any(|n| n == name);
    for scenario in SCENARIOS.iter().filter(|s| named(s.name)) {
        let report = scenario.run(args.limit);
        clean &= report.violation.is_none();
        if args.json {
            println!("{}", to_json(scenario.name, &report));
            continue;
        }
        let extent = if report.complete {
            "all states"
        } else if report.violation.is_some() {
            "ended by a violation"
        } else {
            "not all states: the limit ended it"
        };
        println!(
            "{:20} {} states, {} events, depth {}, {extent}",
            scenario.name,
            HumanCount(report.states),
            HumanCount(report.events),
            report.depth
        );
        if let Some((broken, way)) = &report.violation {
            println!("  BROKEN: {broken}");
            for event in way {
                println!("    {event}");
            }
        }
    }
    Ok(clean)
}

fn planted(name: &str) -> Result<&'static str, String> {
    let known = MUTANTS.iter().find(|(mutant, _)| *mutant == name);
    known.map(|(mutant, _)| *mutant).ok_or_else(|| {
        let names: Vec<&str> = MUTANTS.iter().map(|(mutant, _)| *mutant).collect();
        format!("planted bugs of the brains are {}", names.join(", "))
    })
}

fn to_json(name: &str, report: &outrider_sim::explore::Report) -> serde_json::Value {
    json!({
        "configuration": name,
        "states": report.states,
        "events": report.events,
        "depth": report.depth,
        "complete": report.complete,
        "violation": report.violation.as_ref().map(|(broken, way)| json!({"broken": broken, "events": way})),
    })
}

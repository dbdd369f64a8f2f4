//! One script on the simulated backends and on the real ones.

use outrider_sim::differential::{Difference, Heard, Source, compare, real, simulated};
use std::path::PathBuf;

/// Differences that are told.
const TOLD: usize = 8;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    outrider-sim differential\n  \
    outrider-sim differential --from 7 --seeds 20 --calls 2000\n  \
    outrider-sim differential --dir /mnt/disk --engine threads --json\n  \
    sudo outrider-sim differential --mount\n\n\
    The same calls on the same core: over simulated devices, network and clock, and over\n\
    two sparse files, io_uring and TCP on this machine. Answers must be equal, and so must\n\
    be what is left on the devices, but for times and numbers drawn by chance. With --mount\n\
    programs make the calls once more, on a mounted directory.\n\n\
    Exit code 0: no difference; 1: there is one; 2: it could not run.")]
pub struct Args {
    /// How many scripts.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// The seed of the first.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// About how many calls in each.
    #[arg(long, default_value_t = 600)]
    calls: usize,
    /// Where to make the files; the system's directory for temporary ones unless given.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// How system calls are made: by io_uring where the system allows it, or by threads.
    #[arg(long, default_value = "auto", value_parser = ["auto", "threads"])]
    engine: String,
    /// Play each script on a mounted directory, too: through FUSE and the kernel.
    #[arg(long)]
    mount: bool,
    /// Print one JSON object for each script and side.
    #[arg(long)]
    json: bool,
}

/// A directory that is gone with its owner.
struct Place(PathBuf);

impl Place {
    fn new(args: &Args) -> Result<Self, String> {
        let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
        let path = parent.join(format!("outrider-differential-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    if let Some(why) = real::cannot_mount().filter(|_| args.mount) {
        return Err(why.to_owned());
    }
    let place = Place::new(args)?;
    let (dir, threads) = (place.0.as_path(), args.engine == "threads");
    let mut same = true;
    for seed in args.from..args.from + args.seeds {
        let says = |side: &str, text: &str| format!("seed {seed}, {side}: {text}");
        let one = simulated(seed, Source::Draw(seed, args.calls));
        let one = one.map_err(|text| says("simulated", &text))?;
        let other = real::real(dir, threads, Source::Again(one.steps.clone()));
        let mut sides = vec![("real", other)];
        if args.mount {
            sides.push(("mounted", real::mounted(dir, threads, &one)));
        }
        for (side, other) in sides {
            let other = other.map_err(|text| says(side, &text))?;
            let differences = compare(&one, &other, TOLD);
            same &= differences.is_empty();
            tell(args, seed, side, &other, &differences);
        }
    }
    Ok(same)
}

fn tell(args: &Args, seed: u64, side: &str, heard: &Heard, differences: &[Difference]) {
    let calls = heard.replies.len();
    let left = heard.left.as_ref();
    let (records, blocks) = left.map_or((0, 0), |left| (left.records.len(), left.blocks.len()));
    if args.json {
        let texts: Vec<&str> = differences.iter().map(|d| d.text.as_str()).collect();
        let line = serde_json::json!({
            "seed": seed, "side": side, "calls": calls, "records": records, "blocks": blocks,
            "differences": texts,
        });
        println!("{line}");
        return;
    }
    let verdict = match differences.len() {
        0 => "all equal".to_owned(),
        TOLD => format!("{TOLD} differences or more"),
        some => format!("{some} differences"),
    };
    let left = match left {
        Some(_) => format!(", {records} records of metadata, {blocks} blocks of data"),
        None => String::new(),
    };
    println!("seed {seed}, {side}: {calls} answers{left}: {verdict}");
    for Difference { step, text } in differences {
        let place = step.map_or("left on the devices".to_owned(), |n| format!("step {n}"));
        println!("  {place}: {text}");
    }
}

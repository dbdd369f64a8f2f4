//! `outrider bench DIR`: rates of metadata operations, data and fsync in a
//! directory; with `--against DIR2` the same phases in both directories in turn,
//! so that a ratio compares like with like on a machine that is never quiet.
//!
//! What can go wrong: measuring the page cache. Cold phases drop the kernel's
//! caches, which only root may; without that they are left out, not faked.

use rustix::fs::{Advice, Mode, OFlags, fadvise, open};
use serde::Serialize;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Measure a directory, or two side by side.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider bench /mnt/volume\n  \
    outrider bench /mnt/volume --against /mnt/ext4 --size 1G --json\n  \
    outrider bench /mnt/volume --only create,stat,unlink --files 50000")]
pub struct Args {
    /// Directory to measure; files are made in a subdirectory and removed again.
    dir: PathBuf,
    /// A second directory: each phase runs in both, and ratios are printed.
    #[arg(long, value_name = "DIR2")]
    against: Option<PathBuf>,
    /// Files for the metadata phases.
    #[arg(long, default_value_t = 10_000)]
    files: usize,
    /// Bytes for the data phases (suffixes K, M, G).
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    size: u64,
    /// fsyncs of a small file.
    #[arg(long, default_value_t = 200)]
    fsyncs: usize,
    /// Times each phase runs in each directory; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only these phases, comma separated.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Results as JSON.
    #[arg(long)]
    json: bool,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a size"))?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes >= BLOCK as u64)
        .ok_or_else(|| format!("{text:?} is not a size of at least 1M"))
}

/// Bytes of one sequential read or write.
const BLOCK: usize = 1 << 20;
/// Bytes of one random read or write, and of the file that is fsynced.
const PAGE: usize = 4096;
/// Files in one directory of the metadata phases.
const PER_DIR: usize = 1000;
/// Random reads or writes in one run.
const RANDOM_OPS: u64 = 2000;

/// Why a benchmark stopped.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {source}", path.display())]
pub struct BenchError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn named<T>(what: &'static str, path: &Path, result: io::Result<T>) -> Result<T, BenchError> {
    result.map_err(|source| BenchError {
        what,
        path: path.to_owned(),
        source,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Create,
    Stat,
    StatCold,
    Readdir,
    Rename,
    Unlink,
    SeqWrite,
    SeqReadCold,
    RandRead,
    RandWrite,
    Fsync,
}

impl Phase {
    const ALL: [Phase; 11] = [
        Phase::Create,
        Phase::Stat,
        Phase::StatCold,
        Phase::Readdir,
        Phase::Rename,
        Phase::Unlink,
        Phase::SeqWrite,
        Phase::SeqReadCold,
        Phase::RandRead,
        Phase::RandWrite,
        Phase::Fsync,
    ];

    const fn name(self) -> &'static str {
        match self {
            Phase::Create => "create",
            Phase::Stat => "stat",
            Phase::StatCold => "stat_cold",
            Phase::Readdir => "readdir",
            Phase::Rename => "rename",
            Phase::Unlink => "unlink",
            Phase::SeqWrite => "seq_write",
            Phase::SeqReadCold => "seq_read_cold",
            Phase::RandRead => "rand_read_4k",
            Phase::RandWrite => "rand_write_4k",
            Phase::Fsync => "fsync_small",
        }
    }

    const fn unit(self) -> &'static str {
        match self {
            Phase::SeqWrite | Phase::SeqReadCold => "MB/s",
            Phase::Fsync => "us median",
            _ => "op/s",
        }
    }

    const fn needs_cold_cache(self) -> bool {
        matches!(self, Phase::StatCold | Phase::SeqReadCold)
    }

    /// Whether a smaller figure is better.
    const fn is_latency(self) -> bool {
        matches!(self, Phase::Fsync)
    }
}

/// One phase's figures.
#[derive(Debug, Serialize)]
struct Row {
    phase: &'static str,
    unit: &'static str,
    /// Median over the rounds.
    value: f64,
    rounds: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<f64>,
    /// How many times better than `against` (above 1 is better, also for latencies).
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
}

/// Runs the benchmark and prints it.
///
/// # Errors
/// If a directory cannot be used; the text names the file.
pub fn run(args: &Args) -> Result<(), BenchError> {
    let mut spots = vec![Spot::new(&args.dir)?];
    if let Some(dir) = &args.against {
        spots.push(Spot::new(dir)?);
    }
    let cold = drop_caches(&args.dir).is_ok();
    let mut rows = Vec::new();
    for phase in Phase::ALL {
        // Each phase brings the directory into the state that it starts from.
        if !args.only.is_empty() && !args.only.iter().any(|p| p == phase.name()) {
            continue;
        }
        if !cold && phase.needs_cold_cache() {
            eprintln!(
                "{}: left out, only root can drop the kernel's caches",
                phase.name()
            );
            continue;
        }
        let row = measure(phase, args, &spots)?;
        if !args.json {
            print_row(&row);
        }
        rows.push(row);
    }
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&rows).expect("rows are plain data")
        );
    }
    Ok(())
}

fn print_row(row: &Row) {
    print!("{:<14} {:>12.1} {:<9}", row.phase, row.value, row.unit);
    if let (Some(other), Some(ratio)) = (row.against, row.ratio) {
        print!("  against {other:>12.1}  ratio {ratio:>6.2}");
    }
    println!();
}

fn measure(phase: Phase, args: &Args, spots: &[Spot]) -> Result<Row, BenchError> {
    let mut figures = vec![Vec::new(); spots.len()];
    for round in 0..args.rounds.max(1) {
        // In turn, and the other way round every second time.
        let mut order: Vec<usize> = (0..spots.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            spots[at].prepare(phase, args)?;
            figures[at].push(spots[at].run(phase, args)?);
        }
    }
    let value = median(&figures[0]);
    let against = figures.get(1).map(|f| median(f));
    let ratio = against.map(|other| {
        if phase.is_latency() {
            other / value
        } else {
            value / other
        }
    });
    let rounds = figures.swap_remove(0);
    Ok(Row {
        phase: phase.name(),
        unit: phase.unit(),
        value,
        rounds,
        against,
        ratio,
    })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Writes out the file system of `dir`, no other, and drops the kernel's caches.
fn drop_caches(dir: &Path) -> io::Result<()> {
    rustix::fs::syncfs(File::open(dir)?)?;
    fs::write("/proc/sys/vm/drop_caches", "3")
}

/// One directory under measurement; removes its files when dropped.
struct Spot {
    root: PathBuf,
}

impl Drop for Spot {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.root) {
            eprintln!("{} was left behind: {error}", self.root.display());
        }
    }
}

impl Spot {
    fn new(dir: &Path) -> Result<Self, BenchError> {
        let root = dir.join(format!("outrider-bench.{}", std::process::id()));
        named("cannot make", &root, fs::create_dir(&root))?;
        Ok(Self { root })
    }

    fn file(&self, n: usize) -> PathBuf {
        self.root.join(format!("d{}/f{n}", n / PER_DIR))
    }

    fn renamed(&self, n: usize) -> PathBuf {
        self.root.join(format!("d{}/r{n}", n / PER_DIR))
    }

    fn big(&self) -> PathBuf {
        self.root.join("big")
    }

    /// Brings the directory into the state the phase starts from, untimed.
    fn prepare(&self, phase: Phase, args: &Args) -> Result<(), BenchError> {
        match phase {
            Phase::Create => self.clear_files(args),
            Phase::Stat | Phase::Readdir | Phase::Rename | Phase::Unlink => self.fill_files(args),
            Phase::StatCold => {
                self.fill_files(args)?;
                named(
                    "cannot drop caches for",
                    &self.root,
                    drop_caches(&self.root),
                )
            }
            Phase::SeqWrite => match fs::remove_file(self.big()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    named("cannot remove", &self.big(), Err(error))
                }
                _ => Ok(()),
            },
            Phase::SeqReadCold => {
                self.fill_big(args)?;
                named(
                    "cannot drop caches for",
                    &self.root,
                    drop_caches(&self.root),
                )
            }
            Phase::RandRead | Phase::RandWrite => self.fill_big(args),
            Phase::Fsync => Ok(()),
        }
    }

    fn clear_files(&self, args: &Args) -> Result<(), BenchError> {
        for n in 0..args.files {
            let _ = fs::remove_file(self.file(n));
            let _ = fs::remove_file(self.renamed(n));
            if n % PER_DIR == 0 {
                let dir = self.root.join(format!("d{}", n / PER_DIR));
                named("cannot make", &dir, fs::create_dir_all(&dir))?;
            }
        }
        Ok(())
    }

    fn fill_files(&self, args: &Args) -> Result<(), BenchError> {
        let complete = self.file(0).exists() && self.file(args.files - 1).exists();
        if complete {
            return Ok(());
        }
        self.clear_files(args)?;
        self.create_files(args)
    }

    fn create_files(&self, args: &Args) -> Result<(), BenchError> {
        for n in 0..args.files {
            let path = self.file(n);
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let made = open(&path, flags, Mode::from_raw_mode(0o644));
            named("cannot create", &path, made.map_err(Into::into))?;
        }
        Ok(())
    }

    fn fill_big(&self, args: &Args) -> Result<(), BenchError> {
        let complete = fs::metadata(self.big()).is_ok_and(|m| m.len() >= args.size);
        if complete {
            Ok(())
        } else {
            self.write_big(args)
        }
    }

    fn write_big(&self, args: &Args) -> Result<(), BenchError> {
        let path = self.big();
        let block: Vec<u8> = (0..BLOCK).map(|i| (i * 31 + i / 257) as u8).collect();
        let file = named("cannot create", &path, File::create(&path))?;
        for n in 0..args.size / BLOCK as u64 {
            named(
                "cannot write",
                &path,
                file.write_all_at(&block, n * BLOCK as u64),
            )?;
        }
        named("cannot fsync", &path, file.sync_all())
    }

    /// Runs the phase; returns its figure in the phase's unit.
    fn run(&self, phase: Phase, args: &Args) -> Result<f64, BenchError> {
        let start = Instant::now();
        let ops = match phase {
            Phase::Create => self.create_files(args).map(|()| args.files as u64),
            Phase::Stat | Phase::StatCold => self.stat_files(args),
            Phase::Readdir => self.read_dirs(args),
            Phase::Rename => self.rename_files(args),
            Phase::Unlink => self.unlink_files(args),
            Phase::SeqWrite => self.write_big(args).map(|()| args.size / BLOCK as u64),
            Phase::SeqReadCold => self.read_big(),
            Phase::RandRead => self.random(args, false),
            Phase::RandWrite => self.random(args, true),
            Phase::Fsync => return self.fsync_small(args),
        }?;
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        let rate = ops as f64 / seconds;
        Ok(match phase {
            Phase::SeqWrite | Phase::SeqReadCold => rate * BLOCK as f64 / 1e6,
            _ => rate,
        })
    }

    fn stat_files(&self, args: &Args) -> Result<u64, BenchError> {
        for n in 0..args.files {
            let path = self.file(n);
            named("cannot stat", &path, fs::symlink_metadata(&path))?;
        }
        Ok(args.files as u64)
    }

    fn read_dirs(&self, args: &Args) -> Result<u64, BenchError> {
        let mut seen = 0;
        for n in (0..args.files).step_by(PER_DIR) {
            let dir = self.root.join(format!("d{}", n / PER_DIR));
            for entry in named("cannot read", &dir, fs::read_dir(&dir))? {
                named("cannot read", &dir, entry)?;
                seen += 1;
            }
        }
        Ok(seen)
    }

    fn rename_files(&self, args: &Args) -> Result<u64, BenchError> {
        for n in 0..args.files {
            let (from, to) = (self.file(n), self.renamed(n));
            named("cannot rename", &from, fs::rename(&from, &to))?;
        }
        Ok(args.files as u64)
    }

    fn unlink_files(&self, args: &Args) -> Result<u64, BenchError> {
        for n in 0..args.files {
            let path = self.file(n);
            named("cannot unlink", &path, fs::remove_file(&path))?;
        }
        Ok(args.files as u64)
    }

    fn read_big(&self) -> Result<u64, BenchError> {
        let path = self.big();
        let file = named("cannot open", &path, File::open(&path))?;
        let size = named("cannot stat", &path, file.metadata())?.size();
        let mut block = vec![0; BLOCK];
        for n in 0..size / BLOCK as u64 {
            named(
                "cannot read",
                &path,
                file.read_exact_at(&mut block, n * BLOCK as u64),
            )?;
        }
        Ok(size / BLOCK as u64)
    }

    fn random(&self, args: &Args, write: bool) -> Result<u64, BenchError> {
        let path = self.big();
        let opened = File::options().read(true).write(write).open(&path);
        let file = named("cannot open", &path, opened)?;
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        let pages = args.size / PAGE as u64;
        let mut page = vec![0x5a; PAGE];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..RANDOM_OPS {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (state >> 20) % pages * PAGE as u64;
            let done = if write {
                file.write_all_at(&page, at)
            } else {
                file.read_exact_at(&mut page, at)
            };
            named("cannot read or write", &path, done)?;
        }
        if write {
            named("cannot fsync", &path, file.sync_all())?;
        }
        Ok(RANDOM_OPS)
    }

    fn fsync_small(&self, args: &Args) -> Result<f64, BenchError> {
        let path = self.root.join("small");
        let file = named("cannot create", &path, File::create(&path))?;
        let mut times: Vec<Duration> = Vec::with_capacity(args.fsyncs);
        for n in 0..args.fsyncs.max(1) {
            let page = vec![n as u8; PAGE];
            let start = Instant::now();
            named("cannot write", &path, file.write_all_at(&page, 0))?;
            named("cannot fsync", &path, file.sync_all())?;
            times.push(start.elapsed());
        }
        times.sort();
        Ok(times[times.len() / 2].as_secs_f64() * 1e6)
    }
}

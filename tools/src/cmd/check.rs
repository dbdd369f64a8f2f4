//! `outrider check META DATA`: every invariant of a volume.

use crate::block_on::block_on;
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use crate::number::human;
use indicatif::{ProgressBar, ProgressStyle};
use outrider_core::volume::check::{CheckOptions, Report, Severity, State, check};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

/// Exit code if an invariant is broken.
const BROKEN: u8 = 1;
/// Exit code if the volume could not be checked.
const UNCHECKED: u8 = 2;

/// Check every invariant of a volume; nothing is written.
///
/// Best on an unmounted volume. On a mounted one the last stable state is
/// checked, and blocks that change meanwhile may look wrong: run it again.
/// Exit code 0: no invariant is broken; 1: one is; 2: it could not be checked.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider check /dev/vdb /dev/vdc\n  \
    outrider check --strict --json /dev/vdb /dev/vdc | jq '.problems[].text'")]
pub struct Args {
    /// Count known leftovers of the original implementation as errors.
    #[arg(long)]
    strict: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Print only errors.
    #[arg(short, long)]
    quiet: bool,
    /// List at most this many findings of each kind; all are counted.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Metadata device.
    #[arg(value_name = "META")]
    meta: PathBuf,
    /// Data device.
    #[arg(value_name = "DATA")]
    data: PathBuf,
}

impl Args {
    /// Checks and prints what was found.
    pub fn run(self) -> Result<ExitCode, CmdError> {
        let meta = FileDevice::open(&self.meta, Access::Read)?;
        let data = FileDevice::open(&self.data, Access::Read)?;
        // Shown on a terminal only.
        let style = "{spinner} {bar:30} {pos}/{len} blocks accounted for, {elapsed}";
        let bar = ProgressBar::new(0).with_style(
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        let shown = bar.clone();
        let options = CheckOptions {
            strict: self.strict,
            limit: self.limit,
            progress: Some(Rc::new(move |done, total| {
                shown.set_length(total);
                shown.set_position(done);
            })),
            memo: None,
        };
        let report = block_on(check(Rc::new(meta), Rc::new(data), &options));
        bar.finish_and_clear();
        if self.json {
            println!("{}", serde_json::json!(report));
        } else {
            self.print(&report);
        }
        Ok(match (report.state, report.errors) {
            (State::Unreadable, _) => ExitCode::from(UNCHECKED),
            (_, 0) => ExitCode::SUCCESS,
            _ => ExitCode::from(BROKEN),
        })
    }

    fn print(&self, report: &Report) {
        for problem in &report.problems {
            if !self.quiet || problem.severity == Severity::Error {
                println!("{problem}");
            }
        }
        if report.state == State::Unreadable {
            println!("the volume could not be checked: its super block is not readable");
            return;
        }
        if self.quiet && report.is_clean() {
            return;
        }
        let s = &report.stats;
        let state = match report.state {
            State::InUse => "mounted, or not unmounted cleanly",
            _ => "unmounted",
        };
        println!("state:      {state}");
        println!(
            "metadata:   {} in use, {} free, {} owned by nothing",
            human(s.meta_referenced << 16),
            human(s.meta_free << 16),
            human(s.meta_leaked << 16)
        );
        println!(
            "data:       {} in use, {} free, {} owned by nothing",
            human(s.data_mapped << 12),
            human(s.data_free << 12),
            human(s.data_leaked << 12)
        );
        println!(
            "contents:   {} inodes, {} entries, {} xattrs, {} extents, {} orphans, {} log trees",
            s.inodes, s.entries, s.xattrs, s.extents, s.orphans, s.log_trees
        );
        println!(
            "result:     {} errors, {} notes",
            report.errors, report.notes
        );
    }
}

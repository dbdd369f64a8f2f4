//! `outrider print META`: all metadata of a volume (spec 17 section 12).

use crate::block_on::block_on;
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use outrider_core::volume::print::{PrintOptions, print};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::rc::Rc;

/// Print all metadata of a volume, for people or as one JSON object a line.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider print /dev/vdb | less\n  \
    outrider print --json /dev/vdb | jq 'select(.value.kind == \"inode\").value'")]
pub struct Args {
    /// Leave out items of the filesystem, free extents, list and srch entries.
    #[arg(short = 'S', long)]
    skip_likely_huge: bool,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
    /// Metadata device.
    #[arg(value_name = "META")]
    meta: PathBuf,
}

impl Args {
    /// Prints it on stdout.
    pub fn run(self) -> Result<(), CmdError> {
        let meta = FileDevice::open(&self.meta, Access::Read)?;
        let options = PrintOptions {
            skip_huge: self.skip_likely_huge,
        };
        let mut stdout = BufWriter::new(std::io::stdout().lock());
        let mut write = |record: outrider_core::volume::print::Record| {
            let written = if self.json {
                writeln!(stdout, "{}", serde_json::json!(record))
            } else {
                writeln!(stdout, "{record}")
            };
            if written.is_err() {
                // Nobody reads on: a closed pipe is the reader's choice.
                std::process::exit(0);
            }
        };
        block_on(print(Rc::new(meta), options, &mut write))?;
        // As above.
        let _ = stdout.flush();
        Ok(())
    }
}

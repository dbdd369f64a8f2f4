//! `outrider get-fiemap FILE`: the extents of a file (spec 17 section 10).
//!
//! The kernel never passes FIEMAP to a FUSE mount, so this uses the mount's own
//! ioctl (spec 14 section 28).

use crate::error::CmdError;
use outrider_core::fs::api::FiemapExtent;
use outrider_mount::ioctl;
use std::fmt::Write;
use std::fs::File;
use std::path::PathBuf;

const LAST: u32 = 0x1;
const UNKNOWN: u32 = 0x2;
const UNWRITTEN: u32 = 0x800;
const BLOCK: u64 = 4096;

/// List the extents of a file.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Print only positions on the data device.
    #[arg(short = 'P', long, conflicts_with = "logical")]
    physical: bool,
    /// Print only positions in the file.
    #[arg(short = 'L', long)]
    logical: bool,
    /// Print bytes, not blocks of 4096.
    #[arg(short = 'b', long)]
    byte: bool,
    /// A file on a mounted volume.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Args {
    /// Prints one line for each extent.
    pub fn run(self) -> Result<(), CmdError> {
        let file = File::open(&self.file).map_err(|e| CmdError::io("open", &self.file, &e))?;
        let extents =
            ioctl::fiemap(&file, 0).map_err(|e| CmdError::ioctl("get_fiemap ioctl failed", &e))?;
        print!("{}", self.text(&extents));
        Ok(())
    }

    fn text(&self, extents: &[FiemapExtent]) -> String {
        let unit = if self.byte { 1 } else { BLOCK };
        let mut out = String::new();
        for (nr, extent) in extents.iter().enumerate() {
            let (logical, physical) = (extent.logical / unit, extent.physical / unit);
            let offset = match (self.physical, self.logical) {
                (true, _) => physical.to_string(),
                (_, true) => logical.to_string(),
                _ => format!("{logical} {physical}"),
            };
            let flag = |bit, letter| if extent.flags & bit != 0 { letter } else { '.' };
            let flags: String = [flag(UNKNOWN, 'O'), flag(UNWRITTEN, 'U'), flag(LAST, 'L')]
                .iter()
                .collect();
            let length = extent.length / unit;
            writeln!(
                out,
                "{nr}: offset: {offset} length: {length} flags: {flags}"
            )
            .expect("a string takes everything");
        }
        writeln!(out, "extents: {}", extents.len()).expect("a string takes everything");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_printed_as_scripts_expect() {
        let extents = [
            FiemapExtent {
                logical: 0,
                physical: 8192,
                length: 4096,
                flags: 0,
            },
            FiemapExtent {
                logical: 8192,
                physical: 0,
                length: 12288,
                flags: UNKNOWN | LAST,
            },
        ];
        let mut args = Args {
            physical: false,
            logical: false,
            byte: false,
            file: PathBuf::new(),
        };
        assert_eq!(
            args.text(&extents),
            "0: offset: 0 2 length: 1 flags: ...\n\
             1: offset: 2 0 length: 3 flags: O.L\n\
             extents: 2\n"
        );
        args.byte = true;
        args.logical = true;
        assert_eq!(
            args.text(&extents[1..]),
            "0: offset: 8192 length: 12288 flags: O.L\nextents: 1\n"
        );
    }
}

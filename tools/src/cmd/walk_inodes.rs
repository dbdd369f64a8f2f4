//! `outrider walk-inodes INDEX FIRST LAST`: inodes by when they last changed (spec 17
//! section 10).
//!
//! An archive agent keeps the last entry that it was shown and goes on behind it: it
//! sees every inode that has changed since, at the seq of its last change, without
//! reading directories. What can go wrong: a mount that goes away in the middle; what
//! was printed stays right.

use crate::error::CmdError;
use crate::number::parse_u64;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{IndexEntry, InodeIndex};
use outrider_mount::ioctl::{self, WalkEntry};
use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::PathBuf;

/// Entries asked for at a time.
const BATCH: usize = 16_384;
/// Entries between two headings.
const HEADING: u64 = 25;

/// List inodes in the order in which they last changed.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider walk-inodes meta_seq 0 -1\n  \
    outrider walk-inodes -p /mnt/volume data_seq 4711.0.1025 -1\n  \
    outrider walk-inodes --json meta_seq 0 -1 | jq .ino\n\n\
    Only what is durable on all mounts is listed: to see what was just changed, sync first\n\
    (`outrider sync PATH`) on the mounts that changed something.")]
pub struct Args {
    /// Any file or directory of the mounted volume; without it $SCOUTFS_MOUNT_PATH, or
    /// the current directory.
    #[arg(short, long, value_name = "PATH")]
    path: Option<PathBuf>,
    /// Print one JSON object for each entry.
    #[arg(long)]
    json: bool,
    /// Order: by the last change of an inode, or of a file's contents.
    #[arg(value_name = "INDEX", value_parser = ["meta_seq", "data_seq"])]
    index: String,
    /// First place to list, `SEQ[.0[.INODE]]`; -1 is the greatest number.
    #[arg(value_name = "FIRST", allow_hyphen_values = true)]
    first: String,
    /// Last place to list.
    #[arg(value_name = "LAST", allow_hyphen_values = true)]
    last: String,
}

impl Args {
    /// Prints one line for each entry.
    pub fn run(self) -> Result<(), CmdError> {
        let index = match &self.index[..] {
            "meta_seq" => InodeIndex::MetaSeq,
            _ => InodeIndex::DataSeq,
        };
        let (first, last) = (place(&self.first, 0)?, place(&self.last, u64::MAX)?);
        let path = super::mount_path(self.path.as_deref());
        let file = File::open(&path).map_err(|e| CmdError::io("open", &path, &e))?;
        let mut printer = Printer {
            out: BufWriter::new(io::stdout().lock()),
            json: self.json,
            count: 0,
        };
        let mut from = Some(first);
        let mut entries = vec![WalkEntry::default(); BATCH];
        while let Some(first) = from {
            let given = ioctl::walk_inodes(&file, index, first, last, &mut entries)
                .map_err(|e| CmdError::ioctl("walk_inodes ioctl failed", &e))?;
            let Some(end) = entries[..given].last() else {
                break;
            };
            from = IndexEntry::from(*end).next();
            match printer.print(&entries[..given]) {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
                printed => printed.map_err(|e| CmdError::new(Errno::EIO, e))?,
            }
        }
        Ok(())
    }
}

/// A place in an index; `rest` is the inode if none is named.
fn place(text: &str, rest: u64) -> Result<IndexEntry, CmdError> {
    let number = |text: &str| match text {
        "-1" => Ok(u64::MAX),
        text => parse_u64(text).map_err(|(errno, text)| CmdError::new(errno, text)),
    };
    let parts: Vec<&str> = text.split('.').collect();
    match parts[..] {
        [major] => Ok(IndexEntry {
            major: number(major)?,
            ino: rest,
        }),
        [major, minor] | [major, minor, _] => {
            number(minor)?;
            Ok(IndexEntry {
                major: number(major)?,
                ino: parts.get(2).map_or(Ok(rest), |ino| number(ino))?,
            })
        }
        _ => {
            let text = format!("invalid place in an index: '{text}'");
            Err(CmdError::new(Errno::EINVAL, text))
        }
    }
}

struct Printer<W> {
    out: W,
    json: bool,
    count: u64,
}

impl<W: Write> Printer<W> {
    /// Prints entries as soon as they are there: who reads them may be waiting.
    fn print(&mut self, entries: &[WalkEntry]) -> io::Result<()> {
        for entry in entries {
            let (number, major, minor, ino) = (self.count, entry.major, entry.minor, entry.ino);
            self.count += 1;
            if self.json {
                let line = serde_json::json!({"major": major, "minor": minor, "ino": ino});
                writeln!(self.out, "{line}")?;
                continue;
            }
            if number % HEADING == 0 {
                let (n, m, i) = ("#", "major", "ino");
                writeln!(self.out, "{n:<20} {m:<20} {:<10} {i:<20}", "minor")?;
            }
            writeln!(self.out, "{number:<20} {major:<20} {minor:<10} {ino:<20}")?;
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_scripts_write_them() {
        let at = |text: &str, rest| {
            let place = place(text, rest).unwrap();
            (place.major, place.ino)
        };
        assert_eq!(at("7", 0), (7, 0));
        assert_eq!(at("-1", u64::MAX), (u64::MAX, u64::MAX));
        assert_eq!(at("0x10.0", 5), (16, 5));
        assert_eq!(at("7.0.1025", 5), (7, 1025));
        assert_eq!(at("7.0.-1", 5), (7, u64::MAX));
        for wrong in [
            "",
            "x",
            "7.",
            "7.0.",
            "7.0.1.2",
            "-2",
            "7.x.1",
            "99999999999999999999",
        ] {
            assert!(place(wrong, 0).is_err(), "{wrong}");
        }
    }

    #[test]
    fn headings_come_back_every_25_entries() {
        let entry = |ino| WalkEntry {
            major: 9,
            ino,
            ..WalkEntry::default()
        };
        let entries: Vec<_> = (1000..1030).map(entry).collect();
        let mut printer = Printer {
            out: Vec::new(),
            json: false,
            count: 0,
        };
        printer.print(&entries).unwrap();
        let text = String::from_utf8(printer.out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 32);
        let heading = "#                    major                minor      ino                 ";
        assert_eq!((lines[0], lines[26]), (heading, heading));
        let row = "25                   9                    0          1025                ";
        assert_eq!(lines[27], row);
    }
}

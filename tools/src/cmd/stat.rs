//! `outrider stat FILE`: what `stat` does not tell (spec 17 section 10).

use crate::error::CmdError;
use outrider_core::errno::Errno;
use outrider_mount::ioctl::{self, StatMoreOut};
use std::fs::File;
use std::path::PathBuf;

/// Show seqs, version and blocks of a file or directory.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider stat /mnt/volume/file\n  \
    outrider stat -s data_version /mnt/volume/file\n\n\
    A mount that cannot answer is told on stderr, with exit code 0: scripts look at what\n\
    is printed.")]
pub struct Args {
    /// Print only the value of this field.
    #[arg(short, long, value_name = "NAME")]
    single_field: Option<String>,
    /// Print one JSON object.
    #[arg(long, conflicts_with = "single_field")]
    json: bool,
    /// A file or directory on a mounted volume.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Args {
    /// Prints a line for each field.
    pub fn run(self) -> Result<(), CmdError> {
        let file = File::open(&self.file).map_err(|e| CmdError::io("open", &self.file, &e))?;
        let stat = match ioctl::stat_more(&file) {
            Ok(stat) => stat,
            Err(error) => {
                eprintln!("{}", CmdError::ioctl("ioctl failed", &error));
                return Ok(());
            }
        };
        print!("{}", self.text(&stat)?);
        Ok(())
    }

    fn text(&self, stat: &StatMoreOut) -> Result<String, CmdError> {
        let crtime = format!("{}.{:09}", stat.crtime_sec, stat.crtime_nsec);
        let fields = [
            ("meta_seq", stat.meta_seq.to_string()),
            ("data_seq", stat.data_seq.to_string()),
            ("data_version", stat.data_version.to_string()),
            ("online_blocks", stat.online_blocks.to_string()),
            ("offline_blocks", stat.offline_blocks.to_string()),
            ("crtime", crtime),
        ];
        if self.json {
            let object = serde_json::json!({
                "meta_seq": stat.meta_seq,
                "data_seq": stat.data_seq,
                "data_version": stat.data_version,
                "online_blocks": stat.online_blocks,
                "offline_blocks": stat.offline_blocks,
                "crtime": {"sec": stat.crtime_sec, "nsec": stat.crtime_nsec},
            });
            return Ok(format!("{object}\n"));
        }
        let Some(wanted) = &self.single_field else {
            let lines = fields.map(|(name, value)| format!("{name:<17} {value}\n"));
            return Ok(lines.concat());
        };
        let found = fields.into_iter().find(|(name, _)| name == wanted);
        let (_, value) = found
            .ok_or_else(|| CmdError::new(Errno::EINVAL, format!("unknown field: '{wanted}'")))?;
        Ok(format!("{value}\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_printed_as_scripts_expect() {
        let stat = StatMoreOut {
            meta_seq: 12,
            data_seq: 11,
            data_version: 3,
            online_blocks: 5,
            offline_blocks: 0,
            crtime_sec: 1_700_000_000,
            crtime_nsec: 42,
            pad: 0,
        };
        let mut args = Args {
            single_field: None,
            json: false,
            file: PathBuf::new(),
        };
        assert_eq!(
            args.text(&stat).unwrap(),
            "meta_seq          12\ndata_seq          11\ndata_version      3\n\
             online_blocks     5\noffline_blocks    0\n\
             crtime            1700000000.000000042\n"
        );
        args.single_field = Some("data_seq".into());
        assert_eq!(args.text(&stat).unwrap(), "11\n");
        args.single_field = Some("size".into());
        assert!(args.text(&stat).is_err());
        args.single_field = None;
        args.json = true;
        let json: serde_json::Value = serde_json::from_str(&args.text(&stat).unwrap()).unwrap();
        assert_eq!(json["crtime"]["nsec"], 42);
    }
}

//! `outrider change-format-version META DATA` (spec 17 section 11, 01 section 20).

use crate::block_on::block_on;
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use crate::number::parse_u64;
use outrider_core::format::FORMAT_VERSION_MAX;
use outrider_core::volume::{ChangeOutcome, change_format_version};
use std::path::PathBuf;

/// Raise the format version of an unmounted volume.
///
/// No host may mount it meanwhile. A run that was interrupted is finished by
/// running it again; until then the volume does not mount.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  outrider change-format-version -F -V 2 /dev/vdb /dev/vdc")]
pub struct Args {
    /// The volume is unmounted everywhere. Required.
    #[arg(short = 'F', long, required = true)]
    offline: bool,
    /// New format version; the default is the newest supported.
    #[arg(short = 'V', long, value_name = "VERS")]
    format_version: Option<String>,
    /// Metadata device.
    #[arg(value_name = "META")]
    meta: PathBuf,
    /// Data device.
    #[arg(value_name = "DATA")]
    data: PathBuf,
}

impl Args {
    /// Changes it.
    pub fn run(self) -> Result<(), CmdError> {
        let target = match &self.format_version {
            Some(text) => parse_u64(text).map_err(|(errno, text)| CmdError::new(errno, text))?,
            None => FORMAT_VERSION_MAX,
        };
        let meta = FileDevice::open(&self.meta, Access::Exclusive)?;
        let data = FileDevice::open(&self.data, Access::Exclusive)?;
        match block_on(change_format_version(&meta, &data, target))? {
            ChangeOutcome::Unchanged => {
                println!("both devices already have format version {target}")
            }
            ChangeOutcome::Changed => println!("the format version is now {target}"),
        }
        Ok(())
    }
}

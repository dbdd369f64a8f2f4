//! `outrider prepare-empty-data-device META DATA` (spec 17 section 11, 01 section 20).

use crate::block_on::block_on;
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use outrider_core::env::BlockDevice;
use outrider_core::errno::Errno;
use outrider_core::volume::{VolumeError, prepare_empty_data_device, verify_empty_data_device};
use std::path::PathBuf;

/// Make an empty data device for an unmounted volume that holds no data.
///
/// The volume must have been unmounted cleanly and have every data block free.
/// What the new device held is lost.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider prepare-empty-data-device --check /dev/vdb\n  \
    outrider prepare-empty-data-device /dev/vdb /dev/vdd")]
pub struct Args {
    /// Only check; nothing is written and DATA may be left out.
    #[arg(short, long)]
    check: bool,
    /// Metadata device.
    #[arg(value_name = "META")]
    meta: PathBuf,
    /// New data device.
    #[arg(value_name = "DATA", required_unless_present = "check")]
    data: Option<PathBuf>,
}

impl Args {
    /// Checks, and writes the new data device's super block.
    pub fn run(self) -> Result<(), CmdError> {
        let access = if self.check {
            Access::Read
        } else {
            Access::Exclusive
        };
        let meta = FileDevice::open(&self.meta, access)?;
        let data = self
            .data
            .as_deref()
            .map(|path| FileDevice::open(path, access));
        let data = data.transpose()?;
        if self.check {
            return match block_on(verify_empty_data_device(&meta, data.map(|d| d.size()))) {
                Ok(_) => {
                    println!("All checks passed.");
                    Ok(())
                }
                Err(e) => Err(check_failed(e)),
            };
        }
        let Some(data) = data else {
            return Err(CmdError::new(Errno::EINVAL, "no data device was given"));
        };
        block_on(prepare_empty_data_device(&meta, &data))?;
        Ok(())
    }
}

fn check_failed(e: VolumeError) -> CmdError {
    println!(
        "Errors were found that must be addressed before a new empty data device could be \
         prepared and used."
    );
    e.into()
}

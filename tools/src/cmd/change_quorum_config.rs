//! `outrider change-quorum-config META` (spec 17 section 11, 01 section 20).

use super::mkfs::{parse_slots, print_quorum};
use crate::block_on::block_on;
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use outrider_core::volume::change_quorum_config;
use std::path::PathBuf;

/// Replace the quorum slots of an unmounted volume.
///
/// The slots given are all slots the volume will have. No host may mount it
/// meanwhile.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  \
    outrider change-quorum-config -F -Q 0,10.0.0.1,12345 -Q 1,10.0.0.2,12345 /dev/vdb")]
pub struct Args {
    /// The volume is unmounted everywhere. Required.
    #[arg(short = 'F', long, required = true)]
    offline: bool,
    /// Quorum slot: number 0-14, IPv4 address and port of a member. Repeat for each member.
    #[arg(
        short = 'Q',
        long = "quorum-slot",
        value_name = "NR,ADDR,PORT",
        required = true
    )]
    quorum_slot: Vec<String>,
    /// Metadata device.
    #[arg(value_name = "META")]
    meta: PathBuf,
}

impl Args {
    /// Replaces them and prints the new configuration.
    pub fn run(self) -> Result<(), CmdError> {
        let slots = parse_slots(&self.quorum_slot)?;
        let meta = FileDevice::open(&self.meta, Access::Exclusive)?;
        let sb = block_on(change_quorum_config(&meta, &slots))?;
        println!("Changed the quorum configuration:");
        print_quorum(&sb);
        Ok(())
    }
}

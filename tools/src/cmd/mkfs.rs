//! `outrider mkfs META DATA`: make a volume (spec 17 section 11, 01 section 19).

use super::keygen::read_key;
use crate::block_on::{SystemEntropy, block_on, wall_now};
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use crate::number::{human, parse_size, parse_u64};
use outrider_core::errno::Errno;
use outrider_core::format::{FORMAT_VERSION_MAX, SuperBlock};
use outrider_core::volume::{self, MkfsOptions};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};

/// Make a volume on a metadata device and a data device.
///
/// Both may be block devices or files. What they held is lost; without --force,
/// devices with recognized contents are refused.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider mkfs -Q 0,10.0.0.1,12345 /dev/vdb /dev/vdc\n  \
    outrider mkfs -Q 0,10.0.0.1,12345 -Q 1,10.0.0.2,12345 -Q 2,10.0.0.3,12345 /dev/vdb /dev/vdc\n  \
    outrider mkfs --cluster-key volume.key -Q 0,10.0.0.1,12345 /dev/vdb /dev/vdc\n  \
    truncate -s 16G meta data && outrider mkfs -A -Q 0,127.0.0.1,12345 meta data")]
pub struct Args {
    /// Quorum slot: number 0-14, IPv4 address and port of a member. Repeat for each member.
    #[arg(
        short = 'Q',
        long = "quorum-slot",
        value_name = "NR,ADDR,PORT",
        required = true
    )]
    quorum_slot: Vec<String>,
    /// Overwrite recognized contents.
    #[arg(short, long)]
    force: bool,
    /// Accept devices smaller than 64 GiB.
    #[arg(short = 'A', long)]
    allow_small_size: bool,
    /// Use at most this much of the metadata device.
    #[arg(short, long, value_name = "SIZE")]
    max_meta_size: Option<String>,
    /// Use at most this much of the data device.
    #[arg(short = 'd', long, value_name = "SIZE")]
    max_data_size: Option<String>,
    /// Give each mount data from its own zones of this many 4 KiB blocks.
    #[arg(short = 'z', long, value_name = "BLOCKS")]
    data_alloc_zone_blocks: Option<String>,
    /// Format version, 1 or 2.
    #[arg(short = 'V', long, value_name = "VERS")]
    format_version: Option<String>,
    /// File of the cluster key, made by outrider keygen. Without one the volume
    /// trusts its network, as the original does.
    #[arg(long, value_name = "FILE")]
    cluster_key: Option<PathBuf>,
    /// Metadata device.
    #[arg(value_name = "META")]
    meta: PathBuf,
    /// Data device.
    #[arg(value_name = "DATA")]
    data: PathBuf,
}

impl Args {
    /// Makes the volume and prints what was made.
    pub fn run(self) -> Result<(), CmdError> {
        let options = self.options()?;
        if self.same_device() {
            let text = "the metadata and the data device are the same";
            return Err(CmdError::new(Errno::EINVAL, text));
        }
        let meta = FileDevice::open(&self.meta, Access::Exclusive)?;
        let data = FileDevice::open(&self.data, Access::Exclusive)?;
        if !self.force {
            refuse_contents(&self.meta, &meta)?;
            refuse_contents(&self.data, &data)?;
        }
        let entropy = SystemEntropy::new()
            .map_err(|e| CmdError::io("open", Path::new("/dev/urandom"), &e))?;
        let made = block_on(volume::mkfs(&meta, &data, &entropy, wall_now(), &options))?;
        for notice in &made.notices {
            eprintln!("mkfs: {notice}");
        }
        print_summary(&self.meta, &self.data, &made.sb);
        if let Some(id) = options.cluster_key {
            println!("  cluster key:            {id}");
        }
        Ok(())
    }

    fn options(&self) -> Result<MkfsOptions, CmdError> {
        let size = |text: &Option<String>| text.as_deref().map(parse_size).transpose();
        let invalid = |(errno, text)| CmdError::new(errno, text);
        let zone = self.data_alloc_zone_blocks.as_deref().map(parse_u64);
        let vers = self.format_version.as_deref().map(parse_u64);
        let zone = zone.transpose().map_err(invalid)?;
        if zone == Some(0) {
            let text = "the data zone size must not be 0";
            return Err(CmdError::new(Errno::EINVAL, text));
        }
        let key = self.cluster_key.as_deref().map(read_key).transpose()?;
        Ok(MkfsOptions {
            fmt_vers: vers
                .transpose()
                .map_err(invalid)?
                .unwrap_or(FORMAT_VERSION_MAX),
            slots: parse_slots(&self.quorum_slot)?,
            data_alloc_zone_blocks: zone,
            max_meta_bytes: size(&self.max_meta_size).map_err(invalid)?,
            max_data_bytes: size(&self.max_data_size).map_err(invalid)?,
            allow_small: self.allow_small_size,
            cluster_key: key.map(|key| key.id()),
            ..MkfsOptions::default()
        })
    }

    fn same_device(&self) -> bool {
        match (self.meta.canonicalize(), self.data.canonicalize()) {
            (Ok(meta), Ok(data)) => meta == data,
            _ => false,
        }
    }
}

/// Parses `-Q` values.
pub fn parse_slots(texts: &[String]) -> Result<Vec<(u64, SocketAddrV4)>, CmdError> {
    texts.iter().map(|text| parse_slot(text)).collect()
}

fn parse_slot(text: &str) -> Result<(u64, SocketAddrV4), CmdError> {
    let invalid = |why: &str| {
        CmdError::new(
            Errno::EINVAL,
            format!("invalid quorum slot '{text}': {why}, expected NR,ADDR,PORT"),
        )
    };
    let fields: Vec<&str> = text.split(',').collect();
    let [nr, addr, port] = fields[..] else {
        return Err(invalid("it does not have three fields"));
    };
    let nr = parse_u64(nr).map_err(|_| invalid("bad slot number"))?;
    let addr: Ipv4Addr = addr.parse().map_err(|_| invalid("bad IPv4 address"))?;
    let port = parse_u64(port)
        .ok()
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0)
        .ok_or_else(|| invalid("bad port"))?;
    Ok((nr, SocketAddrV4::new(addr, port)))
}

fn refuse_contents(path: &Path, dev: &FileDevice) -> Result<(), CmdError> {
    let found = block_on(crate::known::recognize(dev))
        .map_err(|e| CmdError::new(Errno::EIO, format!("'{}': {e}", path.display())))?;
    match found {
        None => Ok(()),
        Some(kind) => Err(CmdError::new(
            Errno::EINVAL,
            format!(
                "'{}' already holds {kind}; use -f to overwrite it",
                path.display()
            ),
        )),
    }
}

fn print_summary(meta: &Path, data: &Path, sb: &SuperBlock) {
    let meta_blocks = sb.total_meta_blocks.get();
    let data_blocks = sb.total_data_blocks.get();
    println!("Created scoutfs filesystem:");
    println!("  meta device path:       {}", meta.display());
    println!("  data device path:       {}", data.display());
    println!("  fsid:                   {:x}", sb.hdr.fsid.get());
    println!(
        "  uuid:                   {}",
        uuid::Uuid::from_bytes(sb.uuid)
    );
    println!("  format version:         {}", sb.fmt_vers.get());
    println!(
        "  64KB metadata blocks:   {meta_blocks} ({})",
        human(meta_blocks << 16)
    );
    println!(
        "  4KB data blocks:        {data_blocks} ({})",
        human(data_blocks << 12)
    );
    print_quorum(sb);
}

/// The quorum lines of the summary, also printed after a change.
pub fn print_quorum(sb: &SuperBlock) {
    println!("  quorum config version:  {}", sb.qconf.version.get());
    let mut label = "  quorum slots:         ";
    for (nr, addr) in sb.qconf.present() {
        println!("{label}{nr:>3}: {addr}");
        label = "                        ";
    }
}

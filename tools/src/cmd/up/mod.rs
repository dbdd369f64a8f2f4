//! `outrider up [DIR]`: a volume in two files, made on first use and mounted; no
//! flags needed.

use crate::block_on::{SystemEntropy, block_on, wall_now};
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use outrider_core::errno::Errno;
use outrider_core::format::FORMAT_VERSION_MAX;
use outrider_core::volume::{self, MIN_DEVICE_BYTES, MkfsOptions};
use outrider_mount::daemon::{self, DaemonConfig};
use outrider_mount::options::MountOptions;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::{Path, PathBuf};

/// Make a volume in two sparse files (once) and mount it.
///
/// The volume stays in DIR for next time; nothing else on the machine is touched.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  outrider up\n  outrider up /srv/volume")]
pub struct Args {
    /// Where the files `meta` and `data` and the mount point `mnt/0` are.
    #[arg(default_value = "outrider-volume")]
    dir: PathBuf,
}

impl Args {
    /// Does it.
    pub fn run(self) -> Result<(), CmdError> {
        super::log_to_stderr();
        let mountpoint = self.dir.join("mnt/0");
        let parent = self.dir.join("mnt");
        fs::create_dir_all(&parent).map_err(|e| CmdError::io("make", &parent, &e))?;
        match fs::create_dir(&mountpoint) {
            // It exists, or a killed daemon's mount still covers it.
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(CmdError::io("make", &mountpoint, &e));
            }
            _ => {}
        }
        let (meta, data) = (self.dir.join("meta"), self.dir.join("data"));
        if !meta.exists() || !data.exists() {
            make_volume(&meta, &data)?;
        }
        let options = MountOptions {
            metadev_path: meta,
            quorum_slot: Some(0),
            // Alone on this machine: a dead predecessor is told by its record, not
            // by its silence.
            heartbeat_timeout: std::time::Duration::from_millis(2000),
            ..MountOptions::default()
        };
        let shown = daemon::full_path(&mountpoint);
        let config = DaemonConfig {
            data,
            mountpoint,
            options,
        };
        let ready = || {
            println!("ready: {}", shown.display());
            println!("Ctrl-C (or SIGTERM) unmounts; the volume stays for next time.");
        };
        daemon::run(&config, ready).map_err(|error| CmdError::new(error.errno(), error))?;
        println!("unmounted");
        Ok(())
    }
}

/// Makes the files under other names first, so that a half-made volume is never
/// taken for a volume.
fn make_volume(meta: &Path, data: &Path) -> Result<(), CmdError> {
    let sparse = |path: &Path| -> Result<PathBuf, CmdError> {
        let path = path.with_extension("new");
        let file = File::create(&path).map_err(|e| CmdError::io("create", &path, &e))?;
        file.set_len(MIN_DEVICE_BYTES)
            .map_err(|e| CmdError::io("extend", &path, &e))?;
        Ok(path)
    };
    let (new_meta, new_data) = (sparse(meta)?, sparse(data)?);
    let options = MkfsOptions {
        fmt_vers: FORMAT_VERSION_MAX,
        slots: vec![(0, free_address()?)],
        data_alloc_zone_blocks: None,
        max_meta_bytes: None,
        max_data_bytes: None,
        allow_small: false,
        fsid: None,
        uuid: None,
    };
    let entropy = SystemEntropy::new()
        .map_err(|e| CmdError::new(Errno::EIO, format!("random numbers: {e}")))?;
    {
        let meta_device = FileDevice::open(&new_meta, Access::Exclusive)?;
        let data_device = FileDevice::open(&new_data, Access::Exclusive)?;
        let made = volume::mkfs(&meta_device, &data_device, &entropy, wall_now(), &options);
        block_on(made)?;
    }
    for (from, to) in [(&new_data, data), (&new_meta, meta)] {
        fs::rename(from, to).map_err(|e| CmdError::io("rename", from, &e))?;
    }
    Ok(())
}

/// A loopback address with a port that nobody uses now.
fn free_address() -> Result<SocketAddrV4, CmdError> {
    for _ in 0..100 {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
            .map_err(|e| CmdError::new(Errno::EIO, format!("binding a port of 127.0.0.1: {e}")))?;
        let port = socket.local_addr().map(|addr| addr.port()).unwrap_or(0);
        let tcp = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        if port != 0 && port != u16::MAX && tcp.is_ok() {
            return Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        }
    }
    Err(CmdError::new(Errno::EIO, "no free port on 127.0.0.1"))
}

//! The agents of `outrider fenced`: each makes sure that one mount can never write
//! again, or says why it is not sure.

use super::Request;
use outrider_mount::fence::{Progress, Registry, fence_here};
use outrider_mount::scsi::{self, run_limited};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Time between two looks at a process that ends.
const POLL: Duration = Duration::from_millis(20);

/// Who acts.
#[derive(Clone, Debug)]
pub enum Agent {
    /// A program; exit code 0 means fenced.
    Command {
        /// The program.
        run: PathBuf,
        /// Its arguments.
        args: Vec<String>,
    },
    /// Kills mounts of this host and proves that they are gone.
    Local,
    /// Takes away keys of SCSI-3 persistent reservations.
    Scsi {
        /// The volume's devices; those of the mount that asks if there are none.
        devices: Vec<PathBuf>,
    },
}

impl Agent {
    /// Fences, within `limit`.
    ///
    /// # Errors
    /// Why the mount may still write.
    pub fn fence(&self, request: &Request, limit: Duration) -> Result<String, String> {
        match self {
            Self::Command { run, args } => {
                let mut command = Command::new(run);
                command
                    .args(args)
                    .env("SCOUTFS_FENCED_REQ_RID", &request.rid)
                    .env("SCOUTFS_FENCED_REQ_IP", &request.ip)
                    .env("OUTRIDER_FENCED_REQ_REASON", &request.reason)
                    .env("OUTRIDER_FENCED_REQ_FSID", &request.fsid);
                run_limited(&mut command, limit)
                    .map(|said| said.trim().replace('\n', "; "))
                    .map_err(|e| e.to_string())
            }
            Self::Local => local(request, limit),
            Self::Scsi { devices } => by_keys(request, devices),
        }
    }
}

fn number(what: &str, text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16).map_err(|_| format!("{what} {text:?} is no number"))
}

fn local(request: &Request, limit: Duration) -> Result<String, String> {
    let registry = Registry::open().map_err(|e| format!("registry of mounts: {e}"))?;
    let (fsid, rid) = (number("fsid", &request.fsid)?, number("rid", &request.rid)?);
    let deadline = Instant::now() + limit;
    let mut first = true;
    loop {
        match fence_here(&registry, fsid, rid, first)? {
            Progress::Fenced(why) => return Ok(why.to_owned()),
            Progress::Waiting(why) if Instant::now() >= deadline => {
                return Err(format!("it does not end: {why}"));
            }
            Progress::Waiting(_) => std::thread::sleep(POLL),
        }
        first = false;
    }
}

fn by_keys(request: &Request, devices: &[PathBuf]) -> Result<String, String> {
    let victim = number("rid", &request.rid)?;
    let own = number("rid", &request.own_rid)?;
    let found;
    let devices = match devices {
        [] => {
            found = devices_of(&request.mount)?;
            &found
        }
        given => given,
    };
    for device in devices {
        scsi::fence(device, own, victim).map_err(|e| e.to_string())?;
    }
    Ok(format!("key {victim:x} is off {} devices", devices.len()))
}

/// The devices of the mount whose runtime directory this is.
fn devices_of(mount: &Path) -> Result<Vec<PathBuf>, String> {
    let read = |name: &str| {
        let path = mount.join(name);
        fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
    };
    let meta = PathBuf::from(read("mount_options/metadev_path")?.trim_end());
    let data = read("data_device_maj_min")?;
    let data = data.trim_end();
    if data == "0:0" || !meta.is_absolute() {
        return Err("the devices of this mount are not known by number; give --device".to_owned());
    }
    Ok(vec![meta, Path::new("/dev/block").join(data)])
}

//! Making and ending the mount itself: `mount(2)` as root, `fusermount3` for
//! everybody else.
//!
//! What can go wrong: no permission on `/dev/fuse`; `fusermount3` missing or
//! refusing `allow_other`; a busy mount point at the end (then the mount is
//! detached, and really ends when its last user leaves).

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use thiserror::Error;

/// Type of the mount as the kernel shows it.
pub const FS_TYPE: &str = "fuse.outrider";

/// Why a mount could not be made or ended.
#[derive(Debug, Error)]
pub enum KernelError {
    /// `/dev/fuse` can not be opened.
    #[error("/dev/fuse: {0} (is the fuse module loaded, and may you open it?)")]
    Device(io::Error),
    /// The mount point is unusable.
    #[error("{path}: {source}")]
    Mountpoint {
        /// The mount point.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `fusermount3` is missing or refused.
    #[error("fusermount3: {0}")]
    Helper(String),
}

/// How the mount appears in the kernel.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Source shown in the table of mounts: the data device.
    pub fsname: String,
    /// Let users other than the mounting one in.
    pub allow_other: bool,
    /// Refuse changes.
    pub read_only: bool,
    /// Honour setuid bits (root only).
    pub suid: bool,
    /// Honour device files (root only).
    pub dev: bool,
    /// Allow programs to run.
    pub exec: bool,
    /// No access times.
    pub noatime: bool,
}

impl Default for KernelOptions {
    /// What a user gets; root mounts usually want `suid`, `dev` and `allow_other`.
    fn default() -> Self {
        Self {
            fsname: "outrider".into(),
            allow_other: false,
            read_only: false,
            suid: false,
            dev: false,
            exec: true,
            noatime: false,
        }
    }
}

/// Whether this process mounts by itself.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Makes the mount; returns the open, non-blocking device.
///
/// # Errors
/// [`KernelError`], which names what was refused.
pub fn mount(mountpoint: &Path, options: &KernelOptions) -> Result<OwnedFd, KernelError> {
    let fd = if is_root() {
        mount_direct(mountpoint, options)?
    } else {
        mount_by_helper(mountpoint, options)?
    };
    rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK).map_err(|e| KernelError::Device(e.into()))?;
    Ok(fd)
}

fn bad_mountpoint(path: &Path, source: impl Into<io::Error>) -> KernelError {
    KernelError::Mountpoint {
        path: path.to_owned(),
        source: source.into(),
    }
}

/// Checks a mount point before anything expensive is started.
///
/// # Errors
/// If it is not a directory that can be looked at.
pub fn check_mountpoint(path: &Path) -> Result<(), KernelError> {
    let meta = std::fs::metadata(path).map_err(|e| bad_mountpoint(path, e))?;
    if !meta.is_dir() {
        return Err(bad_mountpoint(path, Errno::NOTDIR));
    }
    Ok(())
}

fn mount_direct(mountpoint: &Path, options: &KernelOptions) -> Result<OwnedFd, KernelError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/dev/fuse", flags, Mode::empty())
        .map_err(|e| KernelError::Device(e.into()))?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        fd.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, options.read_only);
    flags.set(MountFlags::NOSUID, !options.suid);
    flags.set(MountFlags::NODEV, !options.dev);
    flags.set(MountFlags::NOEXEC, !options.exec);
    flags.set(MountFlags::NOATIME, options.noatime);
    let data = CString::new(data).expect("options without NUL");
    rustix::mount::mount(
        options.fsname.as_str(),
        mountpoint,
        FS_TYPE,
        flags,
        data.as_c_str(),
    )
    .map_err(|e| bad_mountpoint(mountpoint, e))?;
    Ok(fd)
}

fn helper_options(options: &KernelOptions) -> String {
    // Commas separate options there.
    let fsname = options.fsname.replace('\\', "\\\\").replace(',', "\\,");
    let mut text = format!("default_permissions,subtype=outrider,fsname={fsname}");
    for (on, name) in [
        (options.allow_other, ",allow_other"),
        (options.read_only, ",ro"),
        (!options.exec, ",noexec"),
        (options.noatime, ",noatime"),
    ] {
        if on {
            text.push_str(name);
        }
    }
    text
}

fn mount_by_helper(mountpoint: &Path, options: &KernelOptions) -> Result<OwnedFd, KernelError> {
    let fail = |err: io::Error| KernelError::Helper(err.to_string());
    let (ours, theirs) = UnixStream::pair().map_err(fail)?;
    let theirs = OwnedFd::from(theirs);
    // The helper inherits its end of the pair.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).map_err(|e| fail(e.into()))?;
    let mut child = Command::new("fusermount3")
        .arg("-o")
        .arg(helper_options(options))
        .arg("--")
        .arg(mountpoint)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .map_err(fail)?;
    drop(theirs);
    let received = receive_fd(&ours);
    let mut text = String::new();
    if let Some(mut err) = child.stderr.take() {
        use std::io::Read;
        let _ = err.read_to_string(&mut text);
    }
    let status = child.wait().map_err(fail)?;
    match received {
        Ok(Some(fd)) if status.success() => Ok(fd),
        _ => Err(KernelError::Helper(if text.trim().is_empty() {
            format!("it ended with {status}")
        } else {
            text.trim().trim_start_matches("fusermount3: ").to_owned()
        })),
    }
}

fn receive_fd(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    let mut data = [IoSliceMut::new(&mut byte)];
    recvmsg(socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            return Ok(fds.next());
        }
    }
    Ok(None)
}

/// How to unmount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmount {
    /// Abort the connection: requests fail, nothing more is written.
    pub force: bool,
    /// Take it from the tree now, end it when its last user leaves.
    pub lazy: bool,
}

/// Ends the mount. Blocks while the kernel sends last requests to the daemon, so
/// the daemon calls it from a thread that serves none.
///
/// # Errors
/// `EBUSY` if it is in use, `EINVAL` if nothing is mounted there.
pub fn unmount(mountpoint: &Path, how: Unmount) -> io::Result<()> {
    if how.force {
        abort_connection(mountpoint);
    }
    if is_root() {
        let mut flags = UnmountFlags::NOFOLLOW;
        flags.set(UnmountFlags::FORCE, how.force);
        flags.set(UnmountFlags::DETACH, how.lazy);
        return Ok(rustix::mount::unmount(mountpoint, flags)?);
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u").arg("-q");
    if how.lazy {
        command.arg("-z");
    }
    let status = command.arg("--").arg(mountpoint).status()?;
    match status.success() {
        true => Ok(()),
        false => Err(Errno::BUSY.into()),
    }
}

/// Aborts the connection by its file, where there is one: a daemon that is idle when
/// it is unmounted by force alone could not tell it from a clean unmount, although
/// the kernel may have thrown pages of mappings away.
fn abort_connection(mountpoint: &Path) {
    let Ok(mounts) = mounts() else { return };
    let Some(mounted) = mounts.iter().rev().find(|m| m.mountpoint == mountpoint) else {
        return;
    };
    if let Some((_, minor)) = mounted.device.split_once(':') {
        // Not there: the control filesystem is not mounted, or it is not our mount.
        let _ = std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
    }
}

/// A FUSE mount of ours in the kernel's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Device number, `major:minor`; the minor is the connection's number.
    pub device: String,
    /// Where.
    pub mountpoint: PathBuf,
    /// The source shown.
    pub source: String,
}

fn unescape(text: &str) -> Vec<u8> {
    let (mut out, mut bytes) = (Vec::new(), text.bytes());
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let digits = [bytes.next(), bytes.next(), bytes.next()];
        let value = digits
            .into_iter()
            .flatten()
            .fold(0u32, |v, d| v * 8 + u32::from(d.wrapping_sub(b'0')));
        out.push(value as u8);
    }
    out
}

/// Every mount of our type in a mount table (`/proc/self/mountinfo`).
pub fn parse_mounts(table: &str) -> Vec<Mounted> {
    let mut found = Vec::new();
    for line in table.lines() {
        let Some((front, back)) = line.split_once(" - ") else {
            continue;
        };
        let (front, back): (Vec<_>, Vec<_>) =
            (front.split(' ').collect(), back.split(' ').collect());
        if front.len() < 5 || back.len() < 2 || back[0] != FS_TYPE {
            continue;
        }
        found.push(Mounted {
            device: front[2].to_owned(),
            mountpoint: PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(front[4]))),
            source: String::from_utf8_lossy(&unescape(back[1])).into_owned(),
        });
    }
    found
}

/// The mounts of our type that exist now.
///
/// # Errors
/// If `/proc` is not there.
pub fn mounts() -> io::Result<Vec<Mounted>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(parse_mounts(&String::from_utf8_lossy(&table)))
}

/// Lets the kernel read ahead as much as one request holds. Best effort: root only.
pub fn widen_readahead(device: &str, kib: u32) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(err) = std::fs::write(&path, kib.to_string()) {
        tracing::debug!(path, error = %err, "read ahead stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_mounts_are_found_in_the_table() {
        let table = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            50 22 0:45 / /mnt/a\\040b rw,nosuid shared:5 - fuse.outrider /dev/x rw,user_id=0\n\
            51 22 0:46 / /mnt/c rw - fuse.other y rw\n";
        let found = parse_mounts(table);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].device, "0:45");
        assert_eq!(found[0].mountpoint, Path::new("/mnt/a b"));
        assert_eq!(found[0].source, "/dev/x");
    }
}

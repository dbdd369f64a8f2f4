//! Certain self-fencing: something outside of the mount's own code ends it when it
//! does not show in time that it may write (`-o watchdog=`).
//!
//! The write guard makes late writes improbable: a mount that was stopped between its
//! look at the volume and the write that follows can not know. A watchdog makes them
//! impossible, if its time is shorter than the time after which others may declare
//! this mount dead:
//!
//! * `helper`: a process that kills the mount (SIGKILL works on a stopped one too).
//!   It shares the host's fate: it helps against a mount that hangs, is stopped, or is
//!   cut off, and not against a whole machine that stands still and comes back.
//! * a path like `/dev/watchdog`: the machine's watchdog, which resets it. Certain in
//!   any case; one mount has it for itself.
//!
//! It is told "alive" only right after the volume itself said that this mount may
//! write, and that its server, if it leads, was not replaced. So a mount that cannot
//! reach its leader for long, or whose devices do not answer, is ended as well.
//!
//! What can go wrong: a watchdog that runs after the mount has ended. A clean end
//! disarms it; so does a forced one when no write is in flight any more.

use crate::options::{MountOptions, WatchdogChoice};
use outrider_core::env::Duration;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// What the helper is told.
const ALIVE: u8 = b'+';
const END: u8 = b'.';
/// What disarms the machine's watchdog when it is closed (its "magic close").
const MAGIC: &[u8] = b"V";

/// An armed, or still sleeping, watchdog.
#[derive(Debug)]
pub struct Watchdog {
    kind: Kind,
    timeout: Duration,
}

#[derive(Debug)]
enum Kind {
    /// The write end of the pipe that the helper reads.
    Helper(File),
    /// Opened with the first sign of life, since that starts it.
    Device {
        path: std::path::PathBuf,
        open: Option<File>,
    },
}

/// The machine's watchdog counts whole seconds.
fn whole_seconds(timeout: Duration) -> i32 {
    i32::try_from(timeout.as_secs().max(1)).unwrap_or(i32::MAX)
}

impl Watchdog {
    /// Makes the one that the options ask for. The helper is forked: there must be no
    /// other thread yet.
    ///
    /// # Errors
    /// What the system says.
    pub fn prepare(options: &MountOptions) -> io::Result<Option<Self>> {
        let timeout = options.watchdog_time();
        let kind = match &options.watchdog {
            None => return Ok(None),
            Some(WatchdogChoice::Helper) => Kind::Helper(fork_helper(timeout)?),
            Some(WatchdogChoice::Device(path)) => {
                // A name that is wrong is told now, not when the mount is in use.
                std::fs::metadata(path)?;
                Kind::Device {
                    path: path.clone(),
                    open: None,
                }
            }
        };
        Ok(Some(Self { kind, timeout }))
    }

    /// Time after which a silent mount is ended.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Says that the mount may write at this moment. The first word arms it.
    ///
    /// # Errors
    /// The watchdog is gone: nobody would end this mount.
    pub fn alive(&mut self) -> io::Result<()> {
        match &mut self.kind {
            Kind::Helper(pipe) => pipe.write_all(&[ALIVE]),
            Kind::Device { path, open } => {
                let file = match open {
                    Some(file) => file,
                    None => open.insert(open_device(path, self.timeout)?),
                };
                file.write_all(b"+")
            }
        }
    }

    /// The mount has ended and writes nothing any more.
    pub fn disarm(mut self) {
        let done = match &mut self.kind {
            Kind::Helper(pipe) => pipe.write_all(&[END]),
            Kind::Device { open, .. } => open.as_mut().map_or(Ok(()), |file| file.write_all(MAGIC)),
        };
        if let Err(error) = done {
            tracing::warn!(%error, "the watchdog can not be disarmed");
        }
    }
}

/// `WDIOC_SETTIMEOUT`: `_IOWR('W', 6, int)`.
const SET_TIMEOUT: libc::c_ulong = 0xc004_5706;

fn open_device(path: &Path, timeout: Duration) -> io::Result<File> {
    let file = File::options().write(true).open(path)?;
    let mut seconds: libc::c_int = whole_seconds(timeout);
    let asked = seconds;
    // SAFETY: the call reads and writes the one number.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), SET_TIMEOUT as _, &raw mut seconds) };
    if set < 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(path = %path.display(), %error, "the watchdog keeps its own time");
    } else if seconds > asked {
        tracing::warn!(
            asked,
            got = seconds,
            "the watchdog takes longer than it should"
        );
    }
    Ok(file)
}

/// Forks the helper; returns the pipe to it.
fn fork_helper(timeout: Duration) -> io::Result<File> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both ends.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were made just now and belong to nobody else.
    let (reader, writer) =
        unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    let own = i32::try_from(std::process::id())
        .ok()
        .and_then(Pid::from_raw);
    let own = own.ok_or_else(|| io::Error::other("the own process has no id"))?;
    let mount = pidfd_open(own, PidfdFlags::empty())?;
    let millis = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: there is one thread, so the child has everything that it uses; it uses
    // system calls only, and never returns.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = watch(reader.as_raw_fd(), &mount, millis);
            // SAFETY: ends this process and nothing else.
            unsafe { libc::_exit(code) }
        }
        _ => Ok(File::from(writer)),
    }
}

/// The helper's life: silent until the first word, then a word within each `millis`,
/// or the mount dies.
fn watch(pipe: RawFd, mount: &OwnedFd, millis: libc::c_int) -> i32 {
    keep_only(pipe, mount.as_raw_fd());
    // SAFETY: plain system calls. A session of its own, so that a Ctrl-C or Ctrl-Z for
    // the mount is not for the helper.
    unsafe {
        libc::setsid();
        let name = c"outrider-watch";
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE] {
            libc::signal(signal, libc::SIG_IGN);
        }
    }
    let mut patience = -1;
    loop {
        let mut wait = libc::pollfd {
            fd: pipe,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one descriptor, as said.
        let ready = unsafe { libc::poll(&raw mut wait, 1, patience) };
        if ready < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) {
            continue;
        }
        if ready <= 0 {
            // Silent for too long; or nobody can tell any more, which is the same.
            let _ = pidfd_send_signal(mount, Signal::KILL);
            return 1;
        }
        let mut words = [0u8; 64];
        // SAFETY: the buffer is as long as said.
        let len = unsafe { libc::read(pipe, words.as_mut_ptr().cast(), words.len()) };
        match usize::try_from(len) {
            // The mount has ended, one way or another.
            Ok(0) => return 0,
            Ok(len) if words[..len].contains(&END) => return 0,
            Ok(_) => patience = millis,
            Err(_) => return 1,
        }
    }
}

/// Closes every other descriptor: the helper must not hold locks, devices or pipes of
/// the mount.
fn keep_only(one: RawFd, other: RawFd) {
    let (low, high) = (i64::from(one.min(other)), i64::from(one.max(other)));
    let last = i64::from(u32::MAX);
    for (from, to) in [(0, low - 1), (low + 1, high - 1), (high + 1, last)] {
        if from <= to {
            // SAFETY: closes descriptors that this process, which execs nothing and
            // shares none, does not use.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_device_is_fed_and_disarmed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog");
        std::fs::write(&path, "").unwrap();
        let text = format!("metadev_path=/dev/x,watchdog={}", path.display());
        let options = MountOptions::parse(&text).unwrap();
        let mut dog = Watchdog::prepare(&options).unwrap().unwrap();
        let said = |path: &Path| {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(said(&path), "", "it sleeps until the mount is there");
        dog.alive().unwrap();
        dog.alive().unwrap();
        assert_eq!(said(&path), "++");
        dog.disarm();
        assert_eq!(said(&path), "++V");
        let missing = MountOptions::parse("metadev_path=/dev/x,watchdog=/nowhere/w").unwrap();
        assert!(Watchdog::prepare(&missing).is_err());
    }

    #[test]
    fn its_time_is_below_the_heartbeat_timeout() {
        let options = |text: &str| MountOptions::parse(text).unwrap();
        let time = |text: &str| options(text).watchdog_time().as_millis();
        let base = "metadev_path=/dev/x,quorum_heartbeat_timeout_ms=4000,watchdog=helper";
        assert_eq!(time(base), 3000);
        assert_eq!(time(&format!("{base},watchdog_timeout_ms=1500")), 1500);
        assert_eq!(whole_seconds(Duration::from_millis(500)), 1);
        assert_eq!(whole_seconds(Duration::from_millis(7500)), 7);
    }
}

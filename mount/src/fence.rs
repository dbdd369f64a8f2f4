//! Making dead mounts really dead on one host (spec 09 section 9): what each
//! mount leaves on record here, and agents that judge by it.
//!
//! * [`LocalAgent`] *proves* that a mount's process is gone: the host was booted
//!   since, or the process ended and the kernel has closed its devices, requests in
//!   flight included. One that still runs (hung, stopped, or cut off) is killed first.
//! * [`AssumeDead`] takes the operator's word for volumes whose mounts cannot exist
//!   any more.
//!
//! What can go wrong: a mount that runs on another host. This host has no record of
//! it, so nothing is proved and the agent fails with the reason; only a record made
//! here counts, and it stays until a clean unmount removes it.

use outrider_core::env::{Duration, Env, LocalBoxFuture};
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use outrider_disk::lock::is_live;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Time between two looks at a process that is still ending.
const POLL: Duration = Duration::from_millis(20);
/// How long an ending process is waited for, within the server's own limit.
const PATIENCE_POLLS: u32 = 600;

/// What a mount leaves on record while it exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The mount, 16 hex digits.
    pub rid: String,
    /// The volume, 16 hex digits.
    pub fsid: String,
    /// Identifies this run of the host's kernel.
    pub boot_id: String,
    /// Its process.
    pub pid: u32,
    /// When that process started, in the kernel's clock ticks.
    pub start_time: u64,
    /// Metadata device.
    pub meta: PathBuf,
    /// Data device.
    pub data: PathBuf,
}

/// The records of all mounts on this host.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

/// Removes its record when the unmount was clean.
#[derive(Debug)]
pub struct Registered {
    path: PathBuf,
}

impl Registry {
    /// The host's registry: `OUTRIDER_STATE_DIR`, or `/var/lib/outrider` for root,
    /// or `outrider` under the user's state directory. Records must survive a
    /// reboot: a record of an earlier boot is what proves that its mount is gone.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open() -> io::Result<Self> {
        let base = match std::env::var_os("OUTRIDER_STATE_DIR") {
            Some(dir) => PathBuf::from(dir),
            None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/outrider"),
            None => user_state_dir()?.join("outrider"),
        };
        Self::at(base.join("mounts"))
    }

    /// A registry in a directory of the caller's choice.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn at(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", dir.display())))?;
        Ok(Self { dir })
    }

    fn path(&self, fsid: u64, rid: u64) -> PathBuf {
        self.dir.join(format!("{fsid:016x}.{rid:016x}.json"))
    }

    /// Puts this process on record as mount `rid`, durably. To be done before the
    /// mount does anything that others could see.
    ///
    /// # Errors
    /// What the system says.
    pub fn register(
        &self,
        fsid: u64,
        rid: u64,
        meta: &Path,
        data: &Path,
    ) -> io::Result<Registered> {
        let pid = std::process::id();
        let start_time =
            start_time_of(pid)?.ok_or_else(|| io::Error::other("this process is not in /proc"))?;
        let record = Record {
            rid: format!("{rid:016x}"),
            fsid: format!("{fsid:016x}"),
            boot_id: boot_id()?,
            pid,
            start_time,
            meta: fs::canonicalize(meta)?,
            data: fs::canonicalize(data)?,
        };
        let path = self.path(fsid, rid);
        let mut file = File::create(&path)?;
        file.write_all(&serde_json::to_vec_pretty(&record)?)?;
        file.sync_all()?;
        File::open(&self.dir)?.sync_all()?;
        Ok(Registered { path })
    }

    /// The record of a mount, if it ran on this host and was not unmounted cleanly.
    ///
    /// # Errors
    /// If it cannot be read or is not a record.
    pub fn find(&self, fsid: u64, rid: u64) -> io::Result<Option<Record>> {
        match fs::read(self.path(fsid, rid)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Forgets a mount that was fenced and reclaimed.
    pub fn forget(&self, fsid: u64, rid: u64) {
        let _ = fs::remove_file(self.path(fsid, rid));
    }
}

impl Registered {
    /// The unmount was clean: nothing of this mount is left anywhere.
    pub fn unregister(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a mount's record was left behind");
        }
    }
}

fn user_state_dir() -> io::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("XDG_STATE_HOME") {
        return Ok(PathBuf::from(dir));
    }
    std::env::var_os("HOME")
        .map(|home| PathBuf::from(home).join(".local/state"))
        .ok_or_else(|| io::Error::other("neither XDG_STATE_HOME nor HOME is set"))
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// When a process started, in clock ticks since boot; `None` if there is none, or
/// it has ended and only its parent has not asked yet how.
fn start_time_of(pid: u32) -> io::Result<Option<u64>> {
    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A process that ends while it is read.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    // The name in parentheses may hold anything; field 22 is the 20th after it.
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    if rest.starts_with(['Z', 'X']) {
        return Ok(None);
    }
    let field = rest.split(' ').nth(19).and_then(|text| text.parse().ok());
    field
        .map(Some)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not readable")))
}

/// What is known of a mount's process.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It can never write again; why.
    Gone(&'static str),
    /// It may write; why.
    Alive(String),
}

fn judge(record: &Record, rid: u64) -> io::Result<Verdict> {
    if record.boot_id != boot_id()? {
        return Ok(Verdict::Gone("this host was booted since"));
    }
    for path in [&record.meta, &record.data] {
        match File::open(path) {
            Ok(file) if is_live(&file, rid)? => {
                return Ok(Verdict::Alive(format!(
                    "process {} has {} open",
                    record.pid,
                    path.display()
                )));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if start_time_of(record.pid)? == Some(record.start_time) {
        return Ok(Verdict::Alive(format!(
            "process {} still exists",
            record.pid
        )));
    }
    Ok(Verdict::Gone(
        "its process ended and its devices are closed",
    ))
}

/// Kills the process of a mount, if it still is that process: a pid alone may have
/// been given to another one since. Returns whether there was one to kill.
///
/// # Errors
/// What the system says, as for a process of another user; or that the mount is in
/// this very process.
fn kill(record: &Record) -> io::Result<bool> {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    if record.boot_id != boot_id()? {
        return Ok(false);
    }
    let Some(pid) = i32::try_from(record.pid).ok().and_then(Pid::from_raw) else {
        return Err(io::Error::other(format!("{} is no pid", record.pid)));
    };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    // The descriptor is of the process that had the pid when it was opened; if it
    // still has it now and started when the record says, it is the mount's.
    if start_time_of(record.pid)? != Some(record.start_time) {
        return Ok(false);
    }
    if record.pid == std::process::id() {
        return Err(io::Error::other("it runs in the process that asks"));
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// How far the fence of a mount on this host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It can never write again; why that is sure.
    Fenced(&'static str),
    /// It was killed, or ends, and is still there; what is seen of it.
    Waiting(String),
}

/// One step of fencing mount `rid` on this host: kill it if it runs, and look whether
/// it is gone. To be repeated while it is waited for; `first` is for the log.
///
/// # Errors
/// There is no record of it here, so nothing can be proved; or it can not be killed.
pub fn fence_here(
    registry: &Registry,
    fsid: u64,
    rid: u64,
    first: bool,
) -> Result<Progress, String> {
    let text = |e: io::Error| e.to_string();
    let Some(record) = registry.find(fsid, rid).map_err(text)? else {
        return Err(
            "there is no record of it on this host, so it may run on another; \
             if it cannot exist any more, mount with -o fence=assume-dead"
                .to_owned(),
        );
    };
    match judge(&record, rid).map_err(text)? {
        // The record stays: a server that dies before it reclaimed the mount leaves
        // the same question to the next one.
        Verdict::Gone(why) => Ok(Progress::Fenced(why)),
        Verdict::Alive(why) => {
            if kill(&record).map_err(|e| format!("{why}: {e}"))? && first {
                tracing::warn!(rid = format_args!("{rid:016x}"), why, "killed a mount");
            }
            Ok(Progress::Waiting(why))
        }
    }
}

/// Makes sure that a mount's process on this host is gone, and proves it.
#[derive(Clone, Debug)]
pub struct LocalAgent {
    registry: Registry,
    fsid: u64,
}

impl LocalAgent {
    /// Judges mounts of volume `fsid` by the registry.
    pub fn new(registry: Registry, fsid: u64) -> Self {
        Self { registry, fsid }
    }

    async fn prove(self, env: Env, rid: u64) -> Result<(), FenceError> {
        let failed = |detail: String| FenceError::Failed { rid, detail };
        for poll in 0..PATIENCE_POLLS {
            if let Progress::Fenced(why) =
                fence_here(&self.registry, self.fsid, rid, poll == 0).map_err(failed)?
            {
                tracing::info!(rid = format_args!("{rid:016x}"), why, "mount is fenced");
                return Ok(());
            }
            env.sleep(POLL).await;
        }
        Err(failed("its process on this host does not end".to_owned()))
    }
}

impl FenceAgent for LocalAgent {
    fn fence(
        &self,
        env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        Box::pin(self.clone().prove(env.clone(), request.rid))
    }

    fn can_prove(&self) -> bool {
        true
    }

    fn is_gone(&self, rid: u64) -> bool {
        let record = self.registry.find(self.fsid, rid).ok().flatten();
        let judged = record.map(|record| judge(&record, rid));
        matches!(judged, Some(Ok(Verdict::Gone(_))))
    }
}

/// Takes the operator's word that every mount that is asked about is gone.
#[derive(Clone, Copy, Debug)]
pub struct AssumeDead;

impl FenceAgent for AssumeDead {
    fn fence(
        &self,
        _env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        tracing::warn!(
            rid = format_args!("{:016x}", request.rid),
            "mount is taken for dead on the operator's word"
        );
        Box::pin(std::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_disk::lock::hold_liveness;

    fn registered(dir: &Path) -> (Registry, Record, PathBuf) {
        let meta = dir.join("meta");
        fs::write(&meta, b"x").unwrap();
        let registry = Registry::at(dir.join("mounts")).unwrap();
        registry.register(1, 2, &meta, &meta).unwrap();
        let record = registry.find(1, 2).unwrap().unwrap();
        (registry, record, meta)
    }

    #[test]
    fn a_process_that_exists_is_not_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, mut record, _) = registered(dir.path());
        assert!(matches!(judge(&record, 2).unwrap(), Verdict::Alive(_)));
        let agent = LocalAgent::new(registry.clone(), 1);
        assert!(!agent.is_gone(2));
        record.start_time += 1;
        fs::write(registry.path(1, 2), serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(agent.is_gone(2), "another process has its pid");
        registry.forget(1, 2);
        assert!(!agent.is_gone(2), "nothing is known of it any more");
    }

    #[test]
    fn a_reused_pid_and_closed_devices_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut record, meta) = registered(dir.path());
        record.start_time += 1;
        let held = File::options().read(true).write(true).open(&meta).unwrap();
        hold_liveness(&held, 2).unwrap();
        assert!(matches!(judge(&record, 2).unwrap(), Verdict::Alive(_)));
        drop(held);
        assert!(matches!(judge(&record, 2).unwrap(), Verdict::Gone(_)));
    }

    #[test]
    fn a_stopped_process_is_killed_and_one_with_its_pid_only_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut record, _) = registered(dir.path());
        assert!(kill(&record).is_err(), "not the asker itself");
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        record.pid = child.id();
        let started = start_time_of(record.pid).unwrap().unwrap();
        record.start_time = started + 1;
        assert!(!kill(&record).unwrap());
        assert!(child.try_wait().unwrap().is_none(), "another process lives");
        record.start_time = started;
        // SAFETY: a signal to our own child, which was not waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGSTOP) };
        assert!(kill(&record).unwrap());
        // Ended, though nobody has waited for it.
        while start_time_of(record.pid).unwrap().is_some() {
            std::thread::yield_now();
        }
        assert!(!kill(&record).unwrap());
        assert!(matches!(judge(&record, 2).unwrap(), Verdict::Gone(_)));
        child.wait().unwrap();
    }

    #[test]
    fn another_boot_is_proof_and_a_clean_unmount_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, mut record, meta) = registered(dir.path());
        record.boot_id = "another".to_owned();
        assert!(matches!(judge(&record, 2).unwrap(), Verdict::Gone(_)));
        registry.register(1, 3, &meta, &meta).unwrap().unregister();
        assert_eq!(registry.find(1, 3).unwrap(), None);
    }
}

//! One mount from its start to its end: the record on this host, the actors, the
//! kernel's mount, signals, the unmount.
//!
//! | what ends it | what is done |
//! |---|---|
//! | `umount` | commit, farewell, quorum agent, record removed |
//! | SIGTERM, SIGINT, SIGHUP | the same, after unmounting; detached if it is busy |
//! | the connection's `abort` file; `umount -f` while somebody waits for an answer | forced: nothing more is written |
//! | `umount -f` of an idle mount | as `umount`: the kernel lets it look the same |
//! | declared dead by the cluster | forced; its users get EIO for some seconds before |
//!
//! What can go wrong: an unmount that returns before the daemon has committed. The
//! daemon holds a lock on its run file until its very end, and the umount helpers
//! wait for that lock.

use crate::asking::Asking;
use crate::counters::Counters;
use crate::fence::{AssumeDead, LocalAgent, Registry};
use crate::kernel::{self, KernelError, KernelOptions, Unmount};
use crate::key_file::{self, KeyFileError};
use crate::notify::Notifier;
use crate::options::{FenceChoice, MountOptions};
use crate::rundir::{self, Facts, RunDir};
use crate::scsi;
use crate::session::{Ended, Session, SessionOptions};
use crate::show;
use crate::watchdog::Watchdog;
use outrider_core::env::{DeviceRole, Duration, Either, Env, Gate, race};
use outrider_core::errno::Errno;
use outrider_core::node::{Mount, MountError, UnmountError};
use outrider_core::secure::ClusterKey;
use outrider_core::server::FenceAgent;
use outrider_core::volume::{MountSupers, VolumeError, read_mount_supers};
use outrider_disk::lock::try_lock_file;
use outrider_disk::{IoConfig, Reactor, Runtime, RuntimeConfig, VolumeFiles};
use outrider_net::NetThread;
use rustix::fd::OwnedFd;
use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use thiserror::Error;

/// How long a busy mount may go on after the first signal before it is detached.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// How long users of a detached mount may go on.
const DETACHED_PATIENCE: Duration = Duration::from_secs(5);

/// How long users of a mount that was declared dead are answered EIO before it ends.
const LOST_PATIENCE: Duration = Duration::from_secs(5);
/// How long a mount waits for the daemon of the one before, and how often it looks.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(60);
const PREDECESSOR_PERIOD: Duration = Duration::from_millis(20);

/// What to mount where.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// Data device; the metadata device is in the options.
    pub data: PathBuf,
    /// Where.
    pub mountpoint: PathBuf,
    /// How.
    pub options: MountOptions,
}

/// Why a mount failed, or ended badly.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// A path cannot be used.
    #[error("{path}: {source}")]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A part of the machine is missing.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel's mount failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The super blocks cannot be read.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The volume could not be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The cluster key cannot be read.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The unmount was not clean.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// The mount was cut off; what was not synced is lost.
    #[error("the mount was forced to end: what was not synced is lost")]
    Forced,
}

impl DaemonError {
    /// The number that mount(2) would give.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Mount(error) => error.errno(),
            Self::Volume(error) => error.mount_errno(),
            Self::Unmount(error) => error.errno(),
            Self::Path { source, .. } | Self::System { source, .. } => {
                Errno(source.raw_os_error().unwrap_or(Errno::EIO.0))
            }
            Self::Key(error) => Errno(error.raw_os_error()),
            Self::Kernel(_) | Self::Forced => Errno::EIO,
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::System { what, source }
}

/// The file whose lock a daemon holds while it lives.
///
/// # Errors
/// If the directory of run files cannot be made.
pub fn run_file(mountpoint: &Path) -> io::Result<PathBuf> {
    let dir = rundir::default_base();
    fs::create_dir_all(&dir)?;
    let name: String = full_path(mountpoint)
        .as_os_str()
        .as_bytes()
        .iter()
        .map(|&byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02x}"),
        })
        .collect();
    Ok(dir.join(name))
}

/// The mount point's path without links, found without looking at the mount
/// itself, whose daemon may be dead.
pub fn full_path(mountpoint: &Path) -> PathBuf {
    let absolute = std::path::absolute(mountpoint).unwrap_or_else(|_| mountpoint.to_owned());
    match (
        absolute.parent().and_then(|dir| fs::canonicalize(dir).ok()),
        absolute.file_name(),
    ) {
        (Some(dir), Some(name)) => dir.join(name),
        _ => absolute,
    }
}

/// Takes away what a daemon that was killed left mounted here. The run file is
/// held, so no daemon of ours serves it.
fn detach_dead(mountpoint: &Path) {
    let dead = std::fs::metadata(mountpoint)
        .is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN));
    if dead {
        tracing::warn!(path = %mountpoint.display(), "detaching a mount whose daemon is gone");
        let _ = kernel::unmount(
            mountpoint,
            Unmount {
                lazy: true,
                ..Unmount::default()
            },
        );
    }
}

/// Mounts and serves until the mount ends. `ready` runs when it is usable.
///
/// # Errors
/// As [`DaemonError`]; after an error nothing is mounted.
pub fn run(config: &DaemonConfig, ready: impl FnOnce()) -> Result<(), DaemonError> {
    // Once it is mounted, looking at it would wait for ourselves.
    let mountpoint = full_path(&config.mountpoint);
    let config = &DaemonConfig {
        mountpoint,
        ..config.clone()
    };
    let key = config.options.cluster_key.as_deref().map(key_file::read);
    let key = key.transpose()?;
    // While there is one thread.
    let watchdog = Watchdog::prepare(&config.options).map_err(system("watchdog"))?;
    raise_descriptor_limit();
    let held = hold_run_file(&config.mountpoint)?;
    detach_dead(&config.mountpoint);
    kernel::check_mountpoint(&config.mountpoint)?;
    // Blocked before any thread starts, so that every thread has them blocked.
    let signals = Arc::new(signal_fd().map_err(system("signalfd"))?);
    let net = NetThread::start().map_err(system("network thread"))?;
    let sockets = net.sockets(config.options.keepalive);
    let rid = random_rid().map_err(system("random numbers"))?;
    let mut volume = VolumeFiles::new(&config.options.metadev_path, &config.data);
    volume.liveness = Some(rid);
    let counters = Counters::default();
    let counted = counters.clone();
    let runtime = Runtime::new(RuntimeConfig {
        network: Arc::new(move || {
            // Called once on each actor's thread.
            counted.count_here();
            Rc::new(sockets.network())
        }),
        volume: Some(volume),
        io: IoConfig::default(),
    });
    let result = runtime
        .run(|env| {
            let own = Own {
                rid,
                key,
                watchdog,
                counters,
            };
            serve(env, config, own, signals, ready)
        })
        .map_err(system("event loop"))
        .and_then(|served| served);
    runtime.join();
    drop(net);
    if let Err(error) = leave_word(&held, &result) {
        tracing::warn!(%error, "the run file does not say how this mount ended");
    }
    drop(held);
    result
}

/// Lets this process have as many descriptors as the system allows: strangers'
/// sockets must not cost it its own.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    );
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of descriptors stays as it is");
    }
}

/// How a daemon's run file says that it ended well.
const CLEAN: &str = "clean";

/// Writes into the run file how the mount ended, for the umount helpers.
fn leave_word(held: &File, result: &Result<(), DaemonError>) -> io::Result<()> {
    let word = match result {
        Ok(()) => CLEAN.to_owned(),
        Err(DaemonError::Forced) => format!("forced {} {}", Errno::EIO.0, DaemonError::Forced),
        Err(error) => format!("failed {} {error}", error.errno().0),
    };
    let mut held = held;
    io::Write::write_all(&mut held, format!("{word}\n").as_bytes())
}

/// How the daemon of a run file ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// Everything was committed.
    Clean,
    /// It was forced to end: what was not synced is lost.
    Forced(String),
    /// It could not end cleanly.
    Failed(Errno, String),
    /// It said nothing: it was killed, or it still runs.
    None,
}

impl Word {
    /// Reads a run file; call it when nobody holds its lock any more.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(file: &File) -> io::Result<Self> {
        let text = {
            use std::io::{Read, Seek};
            let mut file = file;
            let mut text = String::new();
            file.rewind()?;
            file.read_to_string(&mut text)?;
            text
        };
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let Some((_pid, word)) = text.split_once('\n') else {
            return Self::None;
        };
        let word = word.trim_end();
        let mut parts = word.splitn(3, ' ');
        let (kind, errno, said) = (parts.next(), parts.next(), parts.next());
        let errno = errno.and_then(|errno| errno.parse().ok()).map(Errno);
        match (kind, errno, said) {
            (Some(CLEAN), None, None) => Self::Clean,
            (Some("forced"), Some(_), Some(said)) => Self::Forced(said.to_owned()),
            (Some("failed"), Some(errno), Some(said)) => Self::Failed(errno, said.to_owned()),
            _ => Self::None,
        }
    }
}

fn hold_run_file(mountpoint: &Path) -> Result<File, DaemonError> {
    let path = run_file(mountpoint).map_err(system("run directory"))?;
    let fail = |source| DaemonError::Path {
        path: path.clone(),
        source,
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(fail)?;
    if !wait_for_predecessor(&file, mountpoint).map_err(fail)? {
        return Err(DaemonError::Path {
            path: mountpoint.to_owned(),
            source: io::Error::other("another daemon serves this mount point"),
        });
    }
    file.set_len(0).map_err(fail)?;
    io::Write::write_all(&mut &file, format!("{}\n", std::process::id()).as_bytes())
        .map_err(fail)?;
    Ok(file)
}

/// Locks the run file; false if the mount point is in use. `umount(8)` may return
/// before the daemon has committed: one that still holds the file while nothing is
/// mounted there is on its way out.
#[allow(clippy::disallowed_methods)] // no actor runs yet
fn wait_for_predecessor(file: &File, mountpoint: &Path) -> io::Result<bool> {
    let rounds = PREDECESSOR_PATIENCE.as_nanos() / PREDECESSOR_PERIOD.as_nanos();
    for round in 0..rounds {
        if try_lock_file(file)? {
            return Ok(true);
        }
        if kernel::mounts()?.iter().any(|m| m.mountpoint == mountpoint) {
            return Ok(false);
        }
        if round == 0 {
            tracing::info!("waiting for the daemon of the mount before to end");
        }
        std::thread::sleep(PREDECESSOR_PERIOD);
    }
    Ok(false)
}

/// What a mount is given beside its options.
struct Own {
    rid: u64,
    key: Option<ClusterKey>,
    watchdog: Option<Watchdog>,
    counters: Counters,
}

async fn serve(
    env: Env,
    config: &DaemonConfig,
    own: Own,
    signals: Arc<OwnedFd>,
    ready: impl FnOnce(),
) -> Result<(), DaemonError> {
    let Own {
        rid,
        key,
        watchdog,
        counters,
    } = own;
    let options = &config.options;
    let supers = read_supers(&env).await?;
    let fsid = supers.meta.hdr.fsid.get();
    let registry = Registry::open().map_err(system("registry of mounts"))?;
    let registered = registry
        .register(fsid, rid, &options.metadev_path, &config.data)
        .map_err(system("registry of mounts"))?;
    let shown = Rc::new(RefCell::new(make_run_dir(config, rid, &supers)?));
    let fence_dir = shown.borrow().as_ref().map(RunDir::fence_dir);
    let fence = fence_agent(options.fence, registry, fsid, fence_dir);
    let keys = take_keys(config, rid)?;
    let notifier = Rc::new(Notifier::new().map_err(system("notifier thread"))?);
    let give_up = Gate::default();
    let mut node = options.node_config(fence);
    node.cluster_key = key;
    let mut mounting = pin!(Mount::start(&env, rid, node, notifier.clone(), &give_up));
    let mount = match race(mounting.as_mut(), next_signal(&signals)).await {
        Either::Left(mounted) => mounted?,
        Either::Right(()) => {
            // Its actors have to end before the process can.
            give_up.open();
            if let Ok(mount) = mounting.await {
                mount.force_unmount().await;
            }
            return Err(MountError::GivenUp.into());
        }
    };
    show::show_state(&env, &mount, &shown, counters);
    let watchdog = Rc::new(RefCell::new(watchdog));
    feed(&env, &mount, &watchdog);
    let served = serve_kernel(&env, config, &mount, &notifier, &signals, ready).await;
    let ended = match served {
        Ok(Ended::Aborted) => {
            mount.force_unmount().await;
            Err(DaemonError::Forced)
        }
        // After an error nobody has used it: it leaves as cleanly as one who was never
        // there. Who is declared dead meanwhile would wait for an answer for ever.
        other => match race(mount.unmount(), mount.evicted()).await {
            Either::Left(Ok(())) => {
                give_keys_back(&keys, rid);
                registered.unregister();
                other.map(drop)
            }
            // Without a clean end the record stays: it is what proves to the next
            // mount that this one is gone.
            Either::Left(Err(left)) => {
                tracing::error!(error = %left, "unmount");
                other.and(Err(left.into()))
            }
            Either::Right(()) => {
                mount.force_unmount().await;
                Err(DaemonError::Forced)
            }
        },
    };
    shown.take();
    // After a forced end a write may still be on its way: then it is its work.
    let dog = watchdog.borrow_mut().take();
    if let Some(dog) = dog.filter(|_| mount.is_quiet()) {
        dog.disarm();
    }
    ended
}

/// Registers the keys by which this mount can be fenced; the devices that have them.
fn take_keys(config: &DaemonConfig, rid: u64) -> Result<Vec<PathBuf>, DaemonError> {
    if !config.options.scsi_pr {
        return Ok(Vec::new());
    }
    let devices = vec![config.options.metadev_path.clone(), config.data.clone()];
    for device in &devices {
        scsi::register(device, rid).map_err(system("persistent reservation"))?;
    }
    Ok(devices)
}

fn give_keys_back(devices: &[PathBuf], rid: u64) {
    for device in devices {
        if let Err(error) = scsi::unregister(device, rid) {
            tracing::warn!(%error, "a key was left behind");
        }
    }
}

/// Makes the runtime directory. Without one a mount does its work all the same, unless
/// fencing needs it or it was asked for by name.
fn make_run_dir(
    config: &DaemonConfig,
    rid: u64,
    supers: &MountSupers,
) -> Result<Option<RunDir>, DaemonError> {
    let options = &config.options;
    let base = options.run_dir.clone().unwrap_or_else(rundir::default_base);
    let facts = Facts {
        fsid: supers.meta.hdr.fsid.get(),
        rid,
        format_version: supers.meta.fmt_vers.get(),
        data: &config.data,
        mountpoint: &config.mountpoint,
        options,
    };
    match RunDir::create(&base, &facts) {
        Ok(dir) => Ok(Some(dir)),
        Err(source) if options.run_dir.is_some() || options.fence == FenceChoice::Agent => {
            Err(system("runtime directory")(source))
        }
        Err(error) => {
            tracing::warn!(%error, "there is no runtime directory");
            Ok(None)
        }
    }
}

/// Who fences, should this mount lead.
fn fence_agent(
    choice: FenceChoice,
    registry: Registry,
    fsid: u64,
    dir: Option<PathBuf>,
) -> Arc<dyn FenceAgent> {
    let own: Option<Arc<dyn FenceAgent>> = match choice {
        FenceChoice::Local => Some(Arc::new(LocalAgent::new(registry, fsid))),
        FenceChoice::Agent => None,
        FenceChoice::AssumeDead => Some(Arc::new(AssumeDead)),
    };
    match (dir, own) {
        (None, Some(own)) => own,
        // Without a directory the choice was refused before.
        (dir, own) => Arc::new(Asking::new(dir.unwrap_or_default(), own)),
    }
}

/// Tells the watchdog that the mount lives, each time that it has shown that it may
/// write, until the mount ends.
fn feed(env: &Env, mount: &Rc<Mount>, watchdog: &Rc<RefCell<Option<Watchdog>>>) {
    let period = match watchdog.borrow().as_ref() {
        Some(dog) => dog.timeout() / 4,
        None => return,
    };
    let (env, mount, watchdog) = (env.clone(), Rc::downgrade(mount), watchdog.clone());
    env.clone().spawn("watchdog", async move {
        while let Some(mount) = mount.upgrade() {
            let may_write = mount.may_write().await;
            match watchdog.borrow_mut().as_mut() {
                None => return,
                Some(dog) if may_write => {
                    if let Err(error) = dog.alive() {
                        tracing::error!(%error, "the watchdog is gone: this mount gives up");
                        mount.give_up();
                        return;
                    }
                }
                Some(_) => tracing::warn!("this mount can not show that it may write"),
            }
            drop(mount);
            env.sleep(period).await;
        }
    });
}

async fn read_supers(env: &Env) -> Result<MountSupers, DaemonError> {
    let open = |role| {
        env.devices
            .open(role)
            .map_err(|source| MountError::Device { role, source })
    };
    let (meta, data) = (open(DeviceRole::Meta)?, open(DeviceRole::Data)?);
    Ok(read_mount_supers(&*meta, &*data, &*env.clock).await?)
}

async fn serve_kernel(
    env: &Env,
    config: &DaemonConfig,
    mount: &Rc<Mount>,
    notifier: &Rc<Notifier>,
    signals: &Arc<OwnedFd>,
    ready: impl FnOnce(),
) -> Result<Ended, DaemonError> {
    let options = &config.options;
    let has = |flag: &str| options.flags.iter().any(|f| f == flag);
    let root = kernel::is_root();
    let kernel_options = KernelOptions {
        fsname: config.data.display().to_string(),
        allow_other: options.allow_other || root,
        read_only: options.read_only,
        suid: root && !has("nosuid"),
        dev: root && !has("nodev"),
        exec: !has("noexec"),
        noatime: has("noatime"),
    };
    let fd = Arc::new(kernel::mount(&config.mountpoint, &kernel_options)?);
    let session_options = SessionOptions {
        birth_time: options.birth_time,
        ..SessionOptions::default()
    };
    let session = Session::new(fd.clone(), session_options);
    let running = {
        let session = session.clone();
        let fs = mount.fs().clone();
        async move { session.run(fs).await }
    };
    let agreed = {
        let (session, notifier) = (session.clone(), notifier.clone());
        let mountpoint = config.mountpoint.clone();
        async move {
            session.ready().await;
            notifier.attach(fd, session.agreed());
            widen_readahead(&mountpoint);
            ready();
            std::future::pending::<()>().await;
        }
    };
    let asked = end_when_asked(env, config, mount, signals);
    let outcome = match race(race(running, agreed), asked).await {
        Either::Left(Either::Left(ended)) => ended.map_err(system("/dev/fuse")),
        Either::Left(Either::Right(())) => unreachable!("the hook never ends"),
        Either::Right(ended) => Ok(ended),
    };
    if outcome.is_ok() {
        let bounded = env.clock.now() + DETACHED_PATIENCE;
        outrider_core::env::timeout(&*env.clock, bounded, session.drained()).await;
    }
    outcome
}

/// Ends the kernel's mount on a signal, or gives up when the cluster says so. The
/// session's own end is what usually finishes the race; this finishes it for
/// users that do not leave.
async fn end_when_asked(
    env: &Env,
    config: &DaemonConfig,
    mount: &Rc<Mount>,
    signals: &Arc<OwnedFd>,
) -> Ended {
    match race(next_signal(signals), mount.evicted()).await {
        Either::Left(()) => {}
        Either::Right(()) => {
            // What waits is answered now, and what comes is, as by a device that is
            // gone. Nothing that the kernel remembers is true any more.
            mount.force_unmount().await;
            mount.forget_kernel_caches().await;
            env.sleep(LOST_PATIENCE).await;
            let lazy_and_by_force = Unmount {
                force: true,
                lazy: true,
            };
            let _ = detach(config, lazy_and_by_force).await;
            return Ended::Aborted;
        }
    }
    tracing::info!("unmounting on a signal");
    let deadline = env.clock.now() + BUSY_PATIENCE;
    while !detach(config, Unmount::default()).await.unwrap_or(false) {
        if env.clock.now() >= deadline {
            tracing::warn!("the mount is busy: it is detached, and ends in a moment");
            let _ = detach(
                config,
                Unmount {
                    lazy: true,
                    ..Unmount::default()
                },
            )
            .await;
            break;
        }
        env.sleep(Duration::from_millis(50)).await;
    }
    env.sleep(DETACHED_PATIENCE).await;
    Ended::Unmounted
}

/// Unmounts on a thread of its own: the kernel still sends requests meanwhile.
/// The answer is whether it worked.
fn detach(config: &DaemonConfig, how: Unmount) -> tokio::sync::oneshot::Receiver<bool> {
    let (done, wait) = tokio::sync::oneshot::channel();
    let mountpoint = config.mountpoint.clone();
    std::thread::spawn(move || {
        let _ = done.send(kernel::unmount(&mountpoint, how).is_ok());
    });
    wait
}

fn widen_readahead(mountpoint: &Path) {
    const READAHEAD_KIB: u32 = 1024;
    let Ok(mounts) = kernel::mounts() else { return };
    if let Some(mounted) = mounts.iter().rev().find(|m| m.mountpoint == mountpoint) {
        kernel::widen_readahead(&mounted.device, READAHEAD_KIB);
    }
}

fn random_rid() -> io::Result<u64> {
    loop {
        let mut bytes = [0; 8];
        io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
        let rid = u64::from_ne_bytes(bytes);
        if rid != 0 && rid != u64::MAX {
            return Ok(rid);
        }
    }
}

/// Blocks the signals that end a daemon and makes them readable.
fn signal_fd() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use, and the calls only
    // read it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

async fn next_signal(signals: &Arc<OwnedFd>) {
    let reactor = Reactor::current();
    loop {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&**signals, &mut info) {
            Ok(len) if len == info.len() => return,
            _ => {
                reactor.readable(signals).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(result: &Result<(), DaemonError>) -> Word {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"123\n").unwrap();
        assert_eq!(Word::read(&file).unwrap(), Word::None, "it still runs");
        leave_word(&file, result).unwrap();
        Word::read(&file).unwrap()
    }

    #[test]
    #[allow(clippy::disallowed_methods)] // real threads and files
    fn a_mount_waits_for_the_daemon_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let leaving = File::create(&path).unwrap();
        assert!(try_lock_file(&leaving).unwrap());
        let ends = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(100));
            drop(leaving);
        });
        let next = File::options().write(true).open(&path).unwrap();
        assert!(wait_for_predecessor(&next, dir.path()).unwrap());
        ends.join().unwrap();
        // Where something of ours is mounted, nobody waits.
        let other = File::options().write(true).open(&path).unwrap();
        let mounted = kernel::mounts().unwrap();
        if let Some(mounted) = mounted.first() {
            assert!(!wait_for_predecessor(&other, &mounted.mountpoint).unwrap());
        }
    }

    #[test]
    fn a_daemons_word_is_read_back() {
        assert_eq!(told(&Ok(())), Word::Clean);
        let forced = Err(DaemonError::Forced);
        assert!(matches!(told(&forced), Word::Forced(said) if said.contains("lost")));
        let lost = UnmountError::Lost(outrider_core::log::LogError::Severed);
        let said = lost.to_string();
        let errno = lost.errno();
        assert_eq!(told(&Err(lost.into())), Word::Failed(errno, said));
        for torn in ["", "123", "123\n", "123\nfailed 5", "123\nfai"] {
            assert_eq!(Word::parse(torn), Word::None, "{torn:?}");
        }
    }
}

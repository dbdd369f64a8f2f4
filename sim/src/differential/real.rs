//! The real sides: files, io_uring (or a pool of threads), TCP, the machine's clock and its
//! threads; without the kernel, or as a mounted directory.

// This is the real machine: clocks, threads and hash maps are its business.
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros
)]

use super::programs::Programs;
use super::{DATA_SIZE, Heard, META_SIZE, RID, Source, config, make, play, says, volume};
use outrider_core::env::{Duration, Env, Gate, WallTime};
use outrider_core::node::Mount;
use outrider_disk::{Engine, IoConfig, Runtime, RuntimeConfig, VolumeFiles};
use outrider_mount::kernel::{self, KernelOptions, Unmount};
use outrider_mount::{Ended, Notifier, Session, SessionOptions};
use outrider_net::NetThread;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{SystemTime, UNIX_EPOCH};

/// How long a connection may be silent.
const KEEPALIVE: Duration = Duration::from_secs(24);

/// Plays on the real side, in two sparse files below `dir` that are made for it.
///
/// # Errors
/// What made it impossible.
pub fn real(dir: &Path, threads: bool, source: Source) -> Result<Heard, String> {
    let (runtime, _net) = runtime(dir, threads)?;
    let server = SocketAddrV4::new(Ipv4Addr::LOCALHOST, free_port()?);
    let heard = runtime.run(|env| play(env, server, source));
    runtime.join();
    heard.map_err(|error| says(&error))?
}

/// Over two sparse files below `dir` that are made for it. The thread of the network ends
/// with what is given beside it.
fn runtime(dir: &Path, threads: bool) -> Result<(Runtime, NetThread), String> {
    let (meta, data) = (dir.join("meta"), dir.join("data"));
    for (path, size) in [(&meta, META_SIZE), (&data, DATA_SIZE)] {
        let made = File::create(path).and_then(|file| file.set_len(size));
        made.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let net = NetThread::start().map_err(|error| error.to_string())?;
    let sockets = net.sockets(KEEPALIVE);
    let engine = match threads {
        true => Engine::Threads,
        false => Engine::Auto,
    };
    let runtime = Runtime::new(RuntimeConfig {
        network: Arc::new(move || Rc::new(sockets.network())),
        volume: Some(VolumeFiles::new(meta, data)),
        io: IoConfig {
            engine,
            ..IoConfig::default()
        },
    });
    Ok((runtime, net))
}

/// Why nothing can be mounted here, if so.
pub fn cannot_mount() -> Option<&'static str> {
    let able = kernel::is_root() && Path::new("/dev/fuse").exists();
    (!able).then_some("mounting needs root and /dev/fuse")
}

/// Plays on a mounted directory what was played elsewhere.
///
/// # Errors
/// What made it impossible.
pub fn mounted(dir: &Path, threads: bool, one: &Heard) -> Result<Heard, String> {
    let at = dir.join("mnt");
    std::fs::create_dir_all(&at).map_err(|error| format!("{}: {error}", at.display()))?;
    let (runtime, _net) = runtime(dir, threads)?;
    let server = SocketAddrV4::new(Ipv4Addr::LOCALHOST, free_port()?);
    let (ready, wait) = mpsc::channel();
    let place = at.clone();
    let daemon = std::thread::spawn(move || {
        let ended = runtime.run(|env| serve(env, server, place, ready));
        runtime.join();
        ended.map_err(|error| says(&error))?
    });
    // The daemon tells in its result why it is not ready.
    let heard = wait.recv().ok().map(|()| {
        let heard = play_programs(&at, one);
        (heard, kernel::unmount(&at, Unmount::default()))
    });
    let ended = daemon.join();
    ended.map_err(|_| "the daemon panicked".to_owned())??;
    let (heard, unmounted) = heard.ok_or("the mount was never ready")?;
    unmounted.map_err(|error| format!("unmount: {error}"))?;
    Ok(heard)
}

async fn serve(
    env: Env,
    server: SocketAddrV4,
    at: PathBuf,
    ready: mpsc::Sender<()>,
) -> Result<(), String> {
    make(&env, server).await?;
    let notifier = Rc::new(Notifier::new().map_err(|error| says(&error))?);
    let cache = Rc::clone(&notifier);
    let mount = Mount::start(&env, RID, config(), cache, &Gate::default()).await;
    let mount = mount.map_err(|error| says(&error))?;
    let options = KernelOptions {
        suid: true,
        dev: true,
        ..KernelOptions::default()
    };
    let fd = Arc::new(kernel::mount(&at, &options).map_err(|error| says(&error))?);
    let session_options = SessionOptions {
        birth_time: true,
        ..SessionOptions::default()
    };
    let session = Session::new(Arc::clone(&fd), session_options);
    let waiting = Rc::clone(&session);
    env.spawn("ready", async move {
        waiting.ready().await;
        notifier.attach(fd, waiting.agreed());
        // Nobody waits any more where the player has given up.
        let _ = ready.send(());
    });
    let ended = session.run(Rc::clone(mount.fs())).await;
    session.drained().await;
    if ended.map_err(|error| says(&error))? != Ended::Unmounted {
        mount.force_unmount().await;
        return Err("the mount was aborted".to_owned());
    }
    mount.unmount().await.map_err(|error| says(&error))?;
    drop(mount);
    volume::left(&env, &[]).await.map(drop)
}

fn play_programs(at: &Path, one: &Heard) -> Heard {
    let begun = now();
    let mut programs = Programs::new(at);
    let steps = one.steps.iter().zip(&one.replies);
    let replies = steps
        .map(|(step, word)| programs.play(step, word))
        .collect();
    Heard {
        steps: one.steps.clone(),
        replies,
        span: (begun, now()),
        left: None,
    }
}

fn now() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.unwrap_or_default();
    WallTime {
        sec: since.as_secs() as i64,
        nsec: since.subsec_nanos(),
    }
}

/// A port that nobody listens on.
fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let addr = listener.and_then(|listener| listener.local_addr());
    addr.map(|addr| addr.port())
        .map_err(|error| error.to_string())
}

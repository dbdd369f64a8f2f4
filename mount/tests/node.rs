//! A whole node over files, real sockets and a real mount: made, used,
//! unmounted, mounted again.
//!
//! Needs root and `/dev/fuse`; without them the tests say so and pass.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    missing_docs
)]

use outrider_core::env::{DeviceRole, Duration, Env, Gate};
use outrider_core::node::{Mount, NodeConfig};
use outrider_core::volume::{CheckOptions, MkfsOptions, check, mkfs};
use outrider_disk::{IoConfig, Runtime, RuntimeConfig, VolumeFiles};
use outrider_mount::fence::AssumeDead;
use outrider_mount::kernel::{self, KernelOptions, Unmount};
use outrider_mount::{Ended, Notifier, Session, SessionOptions};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

struct Node {
    dir: tempfile::TempDir,
    net: outrider_net::NetThread,
    thread: Option<JoinHandle<Ended>>,
}

fn runtime(net: &outrider_net::NetThread, dir: &Path, rid: u64) -> Runtime {
    let tcp = net.sockets(Duration::from_secs(24));
    let mut volume = VolumeFiles::new(dir.join("meta"), dir.join("data"));
    volume.liveness = Some(rid);
    Runtime::new(RuntimeConfig {
        network: Arc::new(move || Rc::new(tcp.network())),
        volume: Some(volume),
        io: IoConfig::default(),
    })
}

async fn serve(env: Env, rid: u64, mnt: PathBuf, ready: std::sync::mpsc::Sender<()>) -> Ended {
    let notifier = Rc::new(Notifier::new().unwrap());
    let config = NodeConfig::new(Some(0), Arc::new(AssumeDead));
    let mount = Mount::start(&env, rid, config, notifier.clone(), &Gate::default())
        .await
        .unwrap_or_else(|error| panic!("mount: {error}"));
    let options = KernelOptions {
        allow_other: true,
        suid: true,
        dev: true,
        ..KernelOptions::default()
    };
    let fd = Arc::new(kernel::mount(&mnt, &options).unwrap());
    let session = Session::new(fd.clone(), SessionOptions::default());
    let s = session.clone();
    env.spawn("ready", async move {
        s.ready().await;
        notifier.attach(fd, s.agreed());
        ready.send(()).unwrap();
    });
    let ended = session.run(mount.fs().clone()).await.unwrap();
    session.drained().await;
    match ended {
        Ended::Unmounted => mount.unmount().await.unwrap(),
        Ended::Aborted => mount.force_unmount().await,
    }
    ended
}

impl Node {
    fn make() -> Option<Self> {
        Self::of_sizes(64 << 30, 64 << 30)
    }

    fn of_sizes(meta: u64, data: u64) -> Option<Self> {
        if !kernel::is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for (name, size) in [("meta", meta), ("data", data)] {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_len(size).unwrap();
        }
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let net = outrider_net::NetThread::start().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let options = MkfsOptions {
            slots: vec![(0, format!("127.0.0.1:{port}").parse().unwrap())],
            allow_small: true,
            ..MkfsOptions::default()
        };
        runtime(&net, dir.path(), 1)
            .run(|env| async move {
                let meta = env.devices.open(DeviceRole::Meta).unwrap();
                let data = env.devices.open(DeviceRole::Data).unwrap();
                mkfs(&*meta, &*data, &*env.entropy, env.clock.wall(), &options)
                    .await
                    .unwrap();
            })
            .unwrap();
        let mut node = Self {
            dir,
            net,
            thread: None,
        };
        node.mount();
        Some(node)
    }

    fn mount(&mut self) {
        let rid = u64::from(std::process::id()) << 20 | self.dir.path().as_os_str().len() as u64;
        let (mnt, rt) = (
            self.dir.path().join("mnt"),
            runtime(&self.net, self.dir.path(), rid),
        );
        let (ready, wait) = std::sync::mpsc::channel();
        self.thread = Some(std::thread::spawn(move || {
            let ended = rt.run(|env| serve(env, rid, mnt, ready)).unwrap();
            rt.join();
            ended
        }));
        wait.recv_timeout(std::time::Duration::from_secs(60))
            .unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("mnt").join(name)
    }

    fn unmount(&mut self) -> Ended {
        kernel::unmount(&self.path(""), Unmount::default()).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let how = Unmount {
                force: true,
                lazy: true,
            };
            let _ = kernel::unmount(&self.path(""), how);
        }
    }
}

#[test]
fn what_was_written_is_there_after_a_remount() {
    let Some(mut n) = Node::make() else { return };
    fs::create_dir_all(n.path("a/b/c")).unwrap();
    let big: Vec<u8> = (0..3_000_000u32)
        .map(|x| (x.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    fs::write(n.path("a/b/c/big"), &big).unwrap();
    fs::write(n.path("a/small"), b"small").unwrap();
    let f = OpenOptions::new()
        .append(true)
        .open(n.path("a/small"))
        .unwrap();
    (&f).write_all(b" and appended").unwrap();
    f.sync_all().unwrap();
    drop(f);
    std::os::unix::fs::symlink("b/c/big", n.path("a/link")).unwrap();
    let sparse = File::create(n.path("sparse")).unwrap();
    sparse.write_all_at(b"end", 1 << 40).unwrap();
    drop(sparse);
    fs::rename(n.path("a/small"), n.path("moved")).unwrap();
    for nr in 0..500 {
        fs::write(n.path(&format!("a/b/f{nr}")), format!("file {nr}")).unwrap();
    }
    assert!(fs::read(n.path("a/b/c/big")).unwrap() == big);
    assert_eq!(n.unmount(), Ended::Unmounted);
    n.mount();
    assert!(fs::read(n.path("a/link")).unwrap() == big);
    assert_eq!(fs::read(n.path("moved")).unwrap(), b"small and appended");
    assert_eq!(
        fs::metadata(n.path("sparse")).unwrap().size(),
        (1 << 40) + 3
    );
    assert!(fs::metadata(n.path("sparse")).unwrap().blocks() <= 16);
    assert_eq!(fs::read_dir(n.path("a/b")).unwrap().count(), 501);
    for nr in 0..500 {
        let text = fs::read_to_string(n.path(&format!("a/b/f{nr}"))).unwrap();
        assert_eq!(text, format!("file {nr}"));
    }
    fs::remove_dir_all(n.path("a")).unwrap();
    assert_eq!(n.unmount(), Ended::Unmounted);
}

#[test]
fn a_warm_create_costs_little() {
    let Some(mut n) = Node::make() else { return };
    fs::create_dir(n.path("d")).unwrap();
    let start = Instant::now();
    for nr in 0..3000 {
        File::create_new(n.path(&format!("d/{nr}"))).unwrap();
    }
    let create = 3000.0 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for nr in 0..3000 {
        fs::metadata(n.path(&format!("d/{nr}"))).unwrap();
    }
    let stat = 3000.0 / start.elapsed().as_secs_f64();
    eprintln!("{create:.0} create/s, {stat:.0} stat/s");
    assert_eq!(n.unmount(), Ended::Unmounted);
}

impl Node {
    /// The volume, which is not mounted, has every property that a volume must have.
    fn is_sound(&self) {
        let report = runtime(&self.net, self.dir.path(), 2).run(|env| async move {
            let meta = env.devices.open(DeviceRole::Meta).unwrap();
            let data = env.devices.open(DeviceRole::Data).unwrap();
            let options = CheckOptions {
                strict: true,
                ..CheckOptions::default()
            };
            check(meta, data, &options).await
        });
        let report = report.unwrap();
        assert!(report.is_clean(), "{:#?}", report.problems);
    }
}

/// Repeats a call that is refused while space is short, for a minute: what was deleted
/// comes back with commits and merges.
fn soon<T>(mut call: impl FnMut() -> std::io::Result<T>) -> T {
    let start = Instant::now();
    loop {
        match call() {
            Err(error) if is_full(&error) && start.elapsed().as_secs() < 60 => {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            result => return result.unwrap(),
        }
    }
}

fn is_full(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOSPC)
}

/// Makes files in `dir` until the volume is full; how many.
fn fill(dir: &Path, make: impl Fn(&Path) -> std::io::Result<()>) -> usize {
    soon(|| fs::create_dir(dir));
    let mut made = 0;
    loop {
        assert!(made < 100_000, "the volume does not get full");
        match make(&dir.join(format!("{made}"))) {
            Ok(()) => made += 1,
            Err(error) => {
                assert!(is_full(&error), "{error}");
                return made;
            }
        }
    }
}

/// A file whose metadata is large.
fn heavy(path: &Path) -> std::io::Result<()> {
    File::create_new(path)?;
    let value = [b'x'; 60_000];
    rustix::fs::setxattr(path, "user.x", &value, rustix::fs::XattrFlags::empty())?;
    Ok(())
}

/// A file of 8 MiB that is on the devices.
fn long(path: &Path) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&vec![b'y'; 8 << 20])?;
    file.sync_all()
}

#[test]
fn a_full_volume_refuses_deletes_and_takes_files_again() {
    // The metadata that an allocating call may use is what exceeds the reserve.
    let Some(mut n) = Node::of_sizes(6 << 30, 200 << 20) else {
        return;
    };
    let data = fill(&n.path("data"), long);
    assert!((15..=26).contains(&data), "{data} long files");
    fs::remove_dir_all(n.path("data")).unwrap();
    let heavies = fill(&n.path("meta"), heavy);
    assert!(heavies > 500, "{heavies} heavy files");
    // What adds nothing goes on, and so does leaving.
    let first = OpenOptions::new().write(true).open(n.path("meta/0"));
    first.unwrap().set_len(0).unwrap();
    assert_eq!(n.unmount(), Ended::Unmounted);
    n.is_sound();
    n.mount();
    fs::remove_dir_all(n.path("meta")).unwrap();
    // The metadata can be what is short now: what was deleted comes back slowly.
    let data = fill(&n.path("data"), long);
    assert!((1..=26).contains(&data), "{data} long files");
    fs::remove_dir_all(n.path("data")).unwrap();
    soon(|| fs::write(n.path("last"), b"there is room again"));
    assert_eq!(n.unmount(), Ended::Unmounted);
    n.is_sound();
}

//! The front over real mounts, with a filesystem in memory behind it.
//!
//! Needs root and `/dev/fuse`; without them the tests say so and pass.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    missing_docs
)]

mod memfs;

use memfs::MemFs;
use outrider_core::env::{Datagram, Duration, Listener, LocalBoxFuture, NetError, Network, Stream};
use outrider_core::fs::api::{IndexEntry, InodeIndex, Inval, KernelCache};
use outrider_disk::{IoConfig, Runtime, RuntimeConfig};
use outrider_mount::kernel::{self, KernelOptions, Unmount};
use outrider_mount::{Ended, Notifier, Session, SessionOptions, ioctl};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

struct NoNetwork;

impl Network for NoNetwork {
    fn bind_datagram(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        Box::pin(async move { Err(NetError::AddrInUse(addr)) })
    }
    fn listen(
        &self,
        addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        Box::pin(async move { Err(NetError::AddrInUse(addr)) })
    }
    fn connect(
        &self,
        addr: SocketAddrV4,
        _keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        Box::pin(async move { Err(NetError::Refused(addr)) })
    }
}

/// What a test may ask the filesystem's thread to do.
enum Ask {
    Invalidate(Vec<Inval>, std::sync::mpsc::Sender<()>),
    Unblock,
    AttrValid(Duration),
    /// Changes a file behind the kernel's back.
    Poke(u64, Vec<u8>),
    Counts(std::sync::mpsc::Sender<(u32, u64, u64)>),
}

struct Mount {
    dir: tempfile::TempDir,
    ask: tokio::sync::mpsc::UnboundedSender<Ask>,
    thread: Option<JoinHandle<Ended>>,
}

fn mount() -> Option<Mount> {
    mount_with(SessionOptions::default())
}

fn mount_with(session_options: SessionOptions) -> Option<Mount> {
    if !kernel::is_root() || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: needs root and /dev/fuse");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = KernelOptions {
        fsname: "memory".into(),
        allow_other: true,
        suid: true,
        dev: true,
        ..KernelOptions::default()
    };
    let fd = Arc::new(kernel::mount(dir.path(), &options).unwrap());
    let (ask, asked) = tokio::sync::mpsc::unbounded_channel();
    let thread = std::thread::spawn(move || serve(fd, session_options, asked));
    Some(Mount {
        dir,
        ask,
        thread: Some(thread),
    })
}

fn serve(
    fd: Arc<std::os::fd::OwnedFd>,
    options: SessionOptions,
    mut asked: tokio::sync::mpsc::UnboundedReceiver<Ask>,
) -> Ended {
    let runtime = Runtime::new(RuntimeConfig {
        network: Arc::new(|| Rc::new(NoNetwork)),
        volume: None,
        io: IoConfig::default(),
    });
    let main = |env: outrider_core::env::Env| async move {
        let fs = Rc::new(MemFs::new(&env));
        let session = Session::new(Arc::clone(&fd), options);
        let notifier = Rc::new(Notifier::new().unwrap());
        let (s, n, m) = (Rc::clone(&session), Rc::clone(&notifier), Rc::clone(&fs));
        env.spawn("ask", async move {
            s.ready().await;
            n.attach(fd, s.agreed());
            while let Some(ask) = asked.recv().await {
                match ask {
                    Ask::Invalidate(what, done) => {
                        n.invalidate(what).await;
                        done.send(()).unwrap();
                    }
                    Ask::Unblock => m.blocked.open(),
                    Ask::AttrValid(valid) => m.attr_valid.set(valid),
                    Ask::Poke(ino, data) => {
                        use outrider_core::fs::api::Posix;
                        let cx = Default::default();
                        let how = Default::default();
                        m.write(&cx, ino, 0, 0, bytes::Bytes::from(data).into(), how)
                            .await
                            .unwrap();
                    }
                    Ask::Counts(to) => {
                        let counts = (m.syncs.get(), m.forgotten.get(), m.released.get());
                        to.send(counts).unwrap();
                    }
                }
            }
        });
        session.run(fs).await.unwrap()
    };
    runtime.run(main).unwrap()
}

impl Mount {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn invalidate(&self, what: Vec<Inval>) {
        let (done, wait) = std::sync::mpsc::channel();
        assert!(self.ask.send(Ask::Invalidate(what, done)).is_ok());
        wait.recv_timeout(std::time::Duration::from_secs(10))
            .unwrap();
    }

    fn ask(&self, ask: Ask) {
        assert!(self.ask.send(ask).is_ok());
        // Asked in order: an empty invalidation waits for the ones before.
        self.invalidate(vec![]);
    }

    fn counts(&self) -> (u32, u64, u64) {
        let (to, from) = std::sync::mpsc::channel();
        assert!(self.ask.send(Ask::Counts(to)).is_ok());
        from.recv().unwrap()
    }

    fn end(mut self, how: Unmount) -> Ended {
        kernel::unmount(self.dir.path(), how).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let lazy = Unmount {
                force: true,
                lazy: true,
            };
            let _ = kernel::unmount(self.dir.path(), lazy);
        }
    }
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn c(path: &Path) -> CString {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn check(res: impl Into<i64>) -> std::io::Result<i64> {
    match res.into() {
        n if n < 0 => Err(std::io::Error::last_os_error()),
        n => Ok(n),
    }
}

#[test]
fn files_directories_and_links() {
    let Some(m) = mount() else { return };
    fs::write(m.path("a"), b"hello").unwrap();
    assert_eq!(fs::read(m.path("a")).unwrap(), b"hello");
    fs::create_dir(m.path("d")).unwrap();
    fs::hard_link(m.path("a"), m.path("d/b")).unwrap();
    assert_eq!(fs::metadata(m.path("a")).unwrap().nlink(), 2);
    symlink("d/b", m.path("s")).unwrap();
    assert_eq!(fs::read_link(m.path("s")).unwrap(), Path::new("d/b"));
    assert_eq!(fs::read(m.path("s")).unwrap(), b"hello");
    assert_eq!(errno(fs::remove_dir(m.path("d"))), libc::ENOTEMPTY);
    fs::remove_file(m.path("d/b")).unwrap();
    fs::remove_dir(m.path("d")).unwrap();
    assert_eq!(errno(fs::metadata(m.path("gone"))), libc::ENOENT);
    let name = "x".repeat(256);
    assert_eq!(errno(File::create(m.path(&name))), libc::ENAMETOOLONG);
    File::create(m.path(&name[..255])).unwrap();
    // A file that lives on without a name.
    let mut f = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("a"))
        .unwrap();
    fs::remove_file(m.path("a")).unwrap();
    f.write_all(b"HE").unwrap();
    f.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    f.read_to_string(&mut text).unwrap();
    assert_eq!(text, "HEllo");
    drop(f);
    // Devices and pipes keep their numbers.
    for (name, mode, dev) in [
        ("c", libc::S_IFCHR, libc::makedev(1, 70000)),
        ("p", libc::S_IFIFO, 0),
    ] {
        // SAFETY: a valid path.
        check(unsafe { libc::mknod(c(&m.path(name)).as_ptr(), mode | 0o640, dev) }).unwrap();
        let meta = fs::symlink_metadata(m.path(name)).unwrap();
        assert_eq!((meta.mode(), meta.rdev()), (mode | 0o640, dev));
    }
    assert_eq!(m.end(Unmount::default()), Ended::Unmounted);
}

#[test]
fn the_time_of_birth_is_told_where_it_is_wanted() {
    for birth_time in [false, true] {
        let options = SessionOptions {
            birth_time,
            ..SessionOptions::default()
        };
        let Some(m) = mount_with(options) else { return };
        fs::write(m.path("f"), "x").unwrap();
        let meta = fs::metadata(m.path("f")).unwrap();
        assert_eq!((meta.len(), meta.created().is_ok()), (1, birth_time));
        assert_eq!(m.end(Unmount::default()), Ended::Unmounted);
    }
}

#[test]
fn large_and_direct_io_arrive_whole() {
    let Some(m) = mount() else { return };
    let data: Vec<u8> = (0..5_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    fs::write(m.path("big"), &data).unwrap();
    assert!(fs::read(m.path("big")).unwrap() == data);
    let ino = fs::metadata(m.path("big")).unwrap().ino();
    m.invalidate(vec![Inval::Pages(ino)]);
    assert!(fs::read(m.path("big")).unwrap() == data);
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(m.path("big"))
        .unwrap();
    let mut buf = outrider_core::env::AlignedBuf::zeroed(1 << 20);
    direct.read_exact_at(&mut buf, 4096).unwrap();
    assert!(buf[..] == data[4096..4096 + (1 << 20)]);
    direct.write_all_at(&buf, 0).unwrap();
    assert!(fs::read(m.path("big")).unwrap()[..1 << 20] == buf[..]);
    // Append, truncate, extend.
    let mut f = OpenOptions::new().append(true).open(m.path("big")).unwrap();
    f.write_all(b"tail").unwrap();
    assert_eq!(f.metadata().unwrap().len(), 5_000_004);
    f.set_len(10).unwrap();
    f.set_len(8192).unwrap();
    let now = fs::read(m.path("big")).unwrap();
    assert!(now.len() == 8192 && now[10..].iter().all(|&b| b == 0));
    File::create(m.path("big")).unwrap();
    assert_eq!(fs::metadata(m.path("big")).unwrap().len(), 0);
}

/// A kernel that left the truncation to `OPEN` would cut it, and refuse only then.
#[test]
fn a_program_that_runs_is_not_cut() {
    let Some(mount) = mount() else { return };
    let program = mount.path("program");
    fs::copy("/bin/sleep", &program).unwrap();
    let size = fs::metadata(&program).unwrap().len();
    let mut child = std::process::Command::new(&program)
        .arg("60")
        .spawn()
        .unwrap();
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        // SAFETY: a path that ends in NUL.
        let fd = unsafe { libc::open(c(&program).as_ptr(), flags | libc::O_TRUNC) };
        assert_eq!(errno(check(fd)), libc::ETXTBSY);
    }
    assert_eq!(fs::metadata(&program).unwrap().len(), size);
    assert!(child.try_wait().unwrap().is_none(), "it still runs");
    child.kill().unwrap();
    child.wait().unwrap();
    // Nobody runs it: now it may be cut.
    fs::File::options()
        .write(true)
        .truncate(true)
        .open(&program)
        .unwrap();
    assert_eq!(fs::metadata(&program).unwrap().len(), 0);
}

#[test]
fn mappings_are_written_back() {
    let Some(m) = mount() else { return };
    fs::write(m.path("map"), vec![b'x'; 3 * 4096]).unwrap();
    let f = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("map"))
        .unwrap();
    // SAFETY: a mapping of an open file, used within its bounds and unmapped once.
    unsafe {
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(
            std::ptr::null_mut(),
            12288,
            flags,
            libc::MAP_SHARED,
            f.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>(), 12288);
        assert_eq!(bytes[5000], b'x');
        bytes[5000] = b'y';
        check(libc::msync(at, 12288, libc::MS_SYNC)).unwrap();
        bytes[0] = b'z';
        check(libc::munmap(at, 12288)).unwrap();
    }
    drop(f);
    let ino = fs::metadata(m.path("map")).unwrap().ino();
    m.invalidate(vec![Inval::Pages(ino)]);
    let now = fs::read(m.path("map")).unwrap();
    assert_eq!((now[0], now[5000], now[4999]), (b'z', b'y', b'x'));
}

#[test]
fn attributes_times_and_modes() {
    let Some(m) = mount() else { return };
    let f = File::create(m.path("f")).unwrap();
    fs::set_permissions(m.path("f"), fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(m.path("f"), Some(12), Some(34)).unwrap();
    let meta = f.metadata().unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (12, 34, 0o755)
    );
    let when = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    f.set_times(fs::FileTimes::new().set_accessed(when).set_modified(when))
        .unwrap();
    let meta = fs::metadata(m.path("f")).unwrap();
    assert_eq!(meta.modified().unwrap(), when);
    assert_eq!(meta.atime_nsec(), 123_456_789);
    // Times before 1970.
    let old = std::time::UNIX_EPOCH - std::time::Duration::new(1000, 0);
    f.set_modified(old).unwrap();
    m.invalidate(vec![Inval::Attr(meta.ino())]);
    assert_eq!(fs::metadata(m.path("f")).unwrap().mtime(), -1000);
    // SAFETY: plain numbers.
    let before = unsafe { libc::umask(0o077) };
    File::create(m.path("masked")).unwrap();
    fs::create_dir(m.path("masked-dir")).unwrap();
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    assert_eq!(
        fs::metadata(m.path("masked")).unwrap().mode() & 0o777,
        0o600
    );
    assert_eq!(
        fs::metadata(m.path("masked-dir")).unwrap().mode() & 0o777,
        0o700
    );
    // SAFETY: a zeroed statvfs and a valid path.
    let stat = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        check(libc::statvfs(c(m.dir.path()).as_ptr(), &mut stat)).unwrap();
        stat
    };
    assert_eq!(
        (stat.f_bsize, stat.f_blocks, stat.f_bfree),
        (4096, 1000, 500)
    );
    assert_eq!(stat.f_namemax, 255);
}

fn setxattr(path: &Path, name: &str, value: &[u8], flags: i32) -> std::io::Result<i64> {
    let name = CString::new(name).unwrap();
    // SAFETY: valid strings and a buffer with its length.
    check(unsafe {
        libc::lsetxattr(
            c(path).as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
}

fn getxattr(path: &Path, name: &str, size: usize) -> std::io::Result<Vec<u8>> {
    let name = CString::new(name).unwrap();
    let mut buf = vec![0u8; size];
    // SAFETY: valid strings and a buffer with its length.
    let len = check(unsafe {
        libc::lgetxattr(
            c(path).as_ptr(),
            name.as_ptr(),
            buf.as_mut_ptr().cast(),
            size,
        ) as i64
    })?;
    buf.resize(len as usize, 0);
    Ok(buf)
}

#[test]
fn xattrs_of_every_namespace() {
    let Some(m) = mount() else { return };
    let f = m.path("f");
    File::create(&f).unwrap();
    for name in ["user.a", "trusted.b", "security.c", "scoutfs.hide.d"] {
        setxattr(&f, name, b"value", 0).unwrap();
        assert_eq!(getxattr(&f, name, 100).unwrap(), b"value");
    }
    assert_eq!(
        errno(setxattr(&f, "user.a", b"", libc::XATTR_CREATE)),
        libc::EEXIST
    );
    assert_eq!(
        errno(setxattr(&f, "user.n", b"", libc::XATTR_REPLACE)),
        libc::ENODATA
    );
    assert_eq!(getxattr(&f, "user.a", 0).unwrap().len(), 5);
    assert_eq!(errno(getxattr(&f, "user.a", 4)), libc::ERANGE);
    assert_eq!(errno(getxattr(&f, "user.n", 4)), libc::ENODATA);
    let big = vec![7u8; 65536];
    setxattr(&f, "user.big", &big, 0).unwrap();
    assert!(getxattr(&f, "user.big", 65536).unwrap() == big);
    let mut list = vec![0u8; 1000];
    // SAFETY: a buffer with its length.
    let len = unsafe { libc::listxattr(c(&f).as_ptr(), list.as_mut_ptr().cast(), 1000) };
    let list = String::from_utf8_lossy(&list[..len as usize]).into_owned();
    assert_eq!(list.split_terminator('\0').count(), 5, "{list}");
    // SAFETY: valid strings.
    check(unsafe { libc::removexattr(c(&f).as_ptr(), c"user.a".as_ptr()) }).unwrap();
    assert_eq!(errno(getxattr(&f, "user.a", 4)), libc::ENODATA);
}

fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        out.extend(tag.to_le_bytes());
        out.extend(perm.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

#[test]
fn acls_decide_access_and_are_inherited() {
    let Some(m) = mount() else { return };
    fs::write(m.path("f"), b"secret").unwrap();
    let none = u32::MAX;
    let access = acl(&[
        (1, 6, none),
        (2, 4, 1234),
        (4, 0, none),
        (16, 4, none),
        (32, 0, none),
    ]);
    setxattr(&m.path("f"), "system.posix_acl_access", &access, 0).unwrap();
    assert_eq!(
        getxattr(&m.path("f"), "system.posix_acl_access", 200).unwrap(),
        access
    );
    m.invalidate(vec![Inval::Attr(fs::metadata(m.path("f")).unwrap().ino())]);
    assert_eq!(fs::metadata(m.path("f")).unwrap().mode() & 0o777, 0o640);
    // umask does not apply where a default ACL does.
    fs::create_dir(m.path("d")).unwrap();
    setxattr(&m.path("d"), "system.posix_acl_default", &access, 0).unwrap();
    File::create(m.path("d/x")).unwrap();
    assert_eq!(
        getxattr(&m.path("d/x"), "system.posix_acl_access", 200).unwrap(),
        access
    );
    fs::set_permissions(m.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = c(&m.path("f"));
    for (uid, want) in [(1234u32, 0), (1235, libc::EACCES)] {
        // SAFETY: the child only changes its ids, opens a file and exits.
        let status = unsafe {
            match libc::fork() {
                0 => {
                    libc::setgroups(0, std::ptr::null());
                    libc::setgid(uid);
                    libc::setuid(uid);
                    let fd = libc::open(path.as_ptr(), libc::O_RDONLY);
                    libc::_exit(if fd < 0 { *libc::__errno_location() } else { 0 });
                }
                pid => {
                    let mut status = 0;
                    libc::waitpid(pid, &mut status, 0);
                    libc::WEXITSTATUS(status)
                }
            }
        };
        assert_eq!(status, want, "uid {uid}");
    }
}

#[test]
fn renames_with_flags_and_unnamed_files() {
    let Some(m) = mount() else { return };
    fs::write(m.path("a"), b"A").unwrap();
    fs::write(m.path("b"), b"B").unwrap();
    let rename2 = |from: &str, to: &str, flags: u32| {
        // SAFETY: valid paths.
        check(unsafe {
            libc::renameat2(
                libc::AT_FDCWD,
                c(&m.path(from)).as_ptr(),
                libc::AT_FDCWD,
                c(&m.path(to)).as_ptr(),
                flags,
            )
        })
    };
    assert_eq!(
        errno(rename2("a", "b", libc::RENAME_NOREPLACE)),
        libc::EEXIST
    );
    rename2("a", "b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(m.path("a")).unwrap(), b"B");
    rename2("a", "b", 0).unwrap();
    assert_eq!(fs::read(m.path("b")).unwrap(), b"B");
    assert_eq!(
        errno(rename2("b", "c", libc::RENAME_WHITEOUT)),
        libc::EINVAL
    );
    let f = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(m.dir.path())
        .unwrap();
    (&f).write_all(b"late").unwrap();
    assert_eq!(f.metadata().unwrap().nlink(), 0);
    let from = CString::new(format!("/proc/self/fd/{}", f.as_raw_fd())).unwrap();
    // SAFETY: valid paths.
    check(unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            c(&m.path("named")).as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    })
    .unwrap();
    assert_eq!(fs::read(m.path("named")).unwrap(), b"late");
}

#[test]
fn a_directory_of_a_hundred_thousand() {
    let Some(m) = mount() else { return };
    fs::create_dir(m.path("d")).unwrap();
    const COUNT: usize = 100_000;
    let start = Instant::now();
    for n in 0..COUNT {
        File::create_new(m.path(&format!("d/file-{n}"))).unwrap();
    }
    let made = start.elapsed();
    let start = Instant::now();
    let names: std::collections::HashSet<_> = fs::read_dir(m.path("d"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), COUNT);
    eprintln!(
        "{:.0} create+close/s, readdir of {COUNT} in {:?}",
        COUNT as f64 / made.as_secs_f64(),
        start.elapsed()
    );
    // Reading goes on where it was while names go away.
    let mut seen = 0;
    for entry in fs::read_dir(m.path("d")).unwrap() {
        let entry = entry.unwrap();
        seen += 1;
        if seen % 10 == 0 {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    assert_eq!(seen, COUNT);
    assert_eq!(
        fs::read_dir(m.path("d")).unwrap().count(),
        COUNT - COUNT / 10
    );
}

#[test]
fn ioctls_of_ours_and_of_others() {
    let Some(m) = mount() else { return };
    let f = File::create(m.path("f")).unwrap();
    let dir = File::open(m.dir.path()).unwrap();
    ioctl::sync(&dir).unwrap();
    ioctl::sync(&f).unwrap();
    f.sync_all().unwrap();
    assert_eq!(m.counts().0, 3);
    f.set_len(250 * 4096).unwrap();
    let extents = ioctl::fiemap(&f, 0).unwrap();
    assert_eq!(extents.len(), 250);
    assert_eq!(extents[249].physical, 256 * 4096);
    assert_eq!(ioctl::fiemap(&f, 100 * 4096).unwrap().len(), 150);
    // STAT_MORE of another size is another ioctl.
    for command in [0x8040_E805u64, 0x5401, 0xE8C5] {
        let mut arg = [0u8; 256];
        // SAFETY: a buffer as large as any of the commands says.
        let res = unsafe { libc::ioctl(f.as_raw_fd(), command as _, arg.as_mut_ptr()) };
        assert_eq!(errno(check(res)), libc::ENOTTY, "{command:x}");
    }
    let tmp = tempfile::tempfile().unwrap();
    assert!(ioctl::sync(&tmp).is_err());
}

/// Memory of whole pages.
struct Mapping(*mut libc::c_void, usize);

impl Mapping {
    /// Of a file, or of nothing.
    fn new(file: Option<&File>, len: usize) -> Self {
        let (kind, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, unmapped once.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, kind, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self(at, len)
    }

    fn at(&self) -> u64 {
        self.0 as u64
    }

    /// Takes the rights to what is behind `from`, which nobody here uses.
    fn forbid(&self, from: usize) {
        // SAFETY: within the mapping.
        let taken =
            unsafe { libc::mprotect(self.0.byte_add(from), self.1 - from, libc::PROT_NONE) };
        check(taken).unwrap();
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: its own mapping.
        check(unsafe { libc::munmap(self.0, self.1) }).unwrap();
    }
}

/// Lets SIGUSR1 interrupt system calls, and do nothing else.
fn interruptible() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a handler that does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        check(libc::sigaction(
            libc::SIGUSR1,
            &raw const action,
            std::ptr::null_mut(),
        ))
        .unwrap();
    }
}

/// WALK_INODES as a program in C makes it.
fn walk(file: &File, args: &ioctl::WalkInodes) -> std::io::Result<i64> {
    // SAFETY: the struct is as large as the command says; what it points to is the
    // kernel's to check.
    check(unsafe { libc::ioctl(file.as_raw_fd(), ioctl::WALK_INODES as _, args) })
}

#[test]
fn walks_write_into_the_caller_s_memory() {
    let Some(m) = mount() else { return };
    let dir = File::open(m.dir.path()).unwrap();
    let (first, last) = (IndexEntry::default(), IndexEntry::LAST);
    let mut into = vec![ioctl::WalkEntry::default(); 20_000];
    let count = memfs::INDEXED as usize;
    let given = ioctl::walk_inodes(&dir, InodeIndex::MetaSeq, first, last, &mut into).unwrap();
    assert_eq!(given, count);
    for (entry, ino) in into[..given].iter().zip(1..) {
        assert_eq!((entry.major, entry.ino, entry.minor), (2 * ino, ino, 0));
    }
    assert_eq!(into[given].ino, 0, "nothing behind them");
    let from = IndexEntry { major: 7, ino: 9 };
    let to = IndexEntry { major: 12, ino: 6 };
    let given = ioctl::walk_inodes(&dir, InodeIndex::DataSeq, from, to, &mut into).unwrap();
    assert_eq!((given, into[0].ino, into[2].ino), (3, 4, 6));
    let given = ioctl::walk_inodes(&dir, InodeIndex::DataSeq, first, last, &mut into[..5000]);
    assert_eq!(given.unwrap(), 5000);
    let file = File::create(m.path("f")).unwrap();
    let args = |entries_ptr, nr_entries, index| ioctl::WalkInodes {
        last: last.into(),
        entries_ptr,
        nr_entries,
        index,
        pad: [7; 11],
        ..ioctl::WalkInodes::default()
    };
    let place = into.as_mut_ptr() as u64;
    assert_eq!(walk(&file, &args(place, 3, 0)).unwrap(), 3);
    assert_eq!(walk(&file, &args(place, 0, 0)).unwrap(), 0);
    assert_eq!(errno(walk(&file, &args(place, 3, 2))), libc::EINVAL);
    for bad in [0, 8, 1 << 60, u64::MAX - 16] {
        assert_eq!(
            errno(walk(&file, &args(bad, 3, 0))),
            libc::EFAULT,
            "{bad:x}"
        );
    }
    // It ends in the middle of what is not there.
    let pages = Mapping::new(None, 8192);
    pages.forbid(4096);
    assert_eq!(errno(walk(&file, &args(pages.at(), 200, 0))), libc::EFAULT);
    // Memory that is a file of this very mount.
    file.set_len(100 * 4096).unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("f"))
        .unwrap();
    let pages = Mapping::new(Some(&file), 100 * 4096);
    assert_eq!(walk(&file, &args(pages.at(), 17_000, 1)).unwrap(), 10_000);
    drop(pages);
    file.sync_all().unwrap();
    let bytes = fs::read(m.path("f")).unwrap();
    assert_eq!(bytes[24 * 9_999..][..8], 20_000u64.to_ne_bytes());
}

#[test]
fn an_interrupted_walk_writes_nothing() {
    let Some(m) = mount() else { return };
    let dir = File::open(m.dir.path()).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn(move || {
        interruptible();
        // SAFETY: it names this thread.
        tell.send(unsafe { libc::pthread_self() } as usize).unwrap();
        let mut into = vec![ioctl::WalkEntry::default(); 10];
        let given = ioctl::walk_inodes(
            &dir,
            InodeIndex::MetaSeq,
            IndexEntry {
                major: u64::MAX,
                ino: 0,
            },
            IndexEntry::LAST,
            &mut into,
        );
        errno(given.map(|given| given as i32))
    });
    let thread = told.recv().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    // SAFETY: the thread has not been joined.
    unsafe { libc::pthread_kill(thread as _, libc::SIGUSR1) };
    assert_eq!(waiting.join().unwrap(), libc::EINTR);
    m.ask(Ask::Unblock);
}

#[test]
fn more_of_an_inode() {
    let Some(m) = mount() else { return };
    fs::write(m.path("f"), vec![1u8; 10_000]).unwrap();
    let stat = ioctl::stat_more(&File::open(m.path("f")).unwrap()).unwrap();
    let seqs = (stat.meta_seq, stat.data_seq, stat.data_version);
    assert_eq!(
        (seqs, stat.online_blocks, stat.offline_blocks),
        ((1, 2, 3), 3, 5)
    );
    assert!(stat.crtime_sec > 1_700_000_000);
    let dir = File::open(m.dir.path()).unwrap();
    assert_eq!(ioctl::stat_more(&dir).unwrap().meta_seq, 1);
}

#[test]
fn seeks_allocations_and_copies() {
    let Some(m) = mount() else { return };
    fs::write(m.path("f"), vec![1u8; 10_000]).unwrap();
    let f = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("f"))
        .unwrap();
    let seek = |offset, whence| {
        // SAFETY: plain numbers.
        check(unsafe { libc::lseek(f.as_raw_fd(), offset, whence) })
    };
    assert_eq!(seek(5, libc::SEEK_DATA).unwrap(), 5);
    assert_eq!(seek(5, libc::SEEK_HOLE).unwrap(), 10_000);
    assert_eq!(errno(seek(10_000, libc::SEEK_DATA)), libc::ENXIO);
    // SAFETY: plain numbers.
    let fallocate = |mode| check(unsafe { libc::fallocate(f.as_raw_fd(), mode, 0, 20_000) });
    fallocate(0).unwrap();
    assert_eq!(f.metadata().unwrap().len(), 20_000);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(errno(fallocate(punch)), libc::EOPNOTSUPP);
    assert_eq!(fs::copy(m.path("f"), m.path("g")).unwrap(), 20_000);
    assert!(fs::read(m.path("g")).unwrap()[..10_000] == vec![1u8; 10_000]);
}

#[test]
fn the_kernel_forgets_when_told() {
    let Some(m) = mount() else { return };
    fs::write(m.path("f"), b"old").unwrap();
    let ino = fs::metadata(m.path("f")).unwrap().ino();
    assert_eq!(fs::read(m.path("f")).unwrap(), b"old");
    // Reading makes the access time uncertain: this asks for it.
    assert_eq!(fs::metadata(m.path("f")).unwrap().len(), 3);
    m.ask(Ask::Poke(ino, b"newer".to_vec()));
    assert_eq!(fs::metadata(m.path("f")).unwrap().len(), 3, "cached");
    m.invalidate(vec![Inval::Attr(ino)]);
    assert_eq!(fs::metadata(m.path("f")).unwrap().len(), 5);
    m.invalidate(vec![Inval::Pages(ino)]);
    assert_eq!(fs::read(m.path("f")).unwrap(), b"newer");
    // Names: by themselves and all at once; a working directory stays one.
    m.invalidate(vec![
        Inval::Name {
            parent: 1,
            name: "f".into(),
        },
        Inval::Name {
            parent: 1,
            name: "never-seen".into(),
        },
        Inval::Attr(99_999),
        Inval::AllNames,
    ]);
    assert_eq!(fs::read(m.path("f")).unwrap(), b"newer");
}

#[test]
fn waiting_requests_are_parked_and_interrupted() {
    let Some(m) = mount() else { return };
    let f = m.path("f");
    File::create(&f).unwrap();
    setxattr(&f, "user.slow", b"late", 0).unwrap();
    let started = Instant::now();
    let slow: Vec<_> = (0..4)
        .map(|_| {
            let f = f.clone();
            std::thread::spawn(move || getxattr(&f, "user.slow", 10).unwrap())
        })
        .collect();
    // Others are served meanwhile.
    for n in 0..100 {
        File::create(m.path(&format!("n{n}"))).unwrap();
    }
    assert!(
        started.elapsed().as_millis() < 290,
        "{:?}",
        started.elapsed()
    );
    for thread in slow {
        assert_eq!(thread.join().unwrap(), b"late");
    }
    // SAFETY: the child waits in a system call until it is killed.
    let child = unsafe {
        match libc::fork() {
            0 => {
                let mut buf = [0u8; 16];
                let path = c(&f);
                libc::lgetxattr(
                    path.as_ptr(),
                    c"user.block".as_ptr(),
                    buf.as_mut_ptr().cast(),
                    16,
                );
                libc::_exit(0)
            }
            pid => pid,
        }
    };
    std::thread::sleep(std::time::Duration::from_millis(100));
    let started = Instant::now();
    // SAFETY: our own child.
    unsafe {
        libc::kill(child, libc::SIGTERM);
        let mut status = 0;
        libc::waitpid(child, &mut status, 0);
        assert!(libc::WIFSIGNALED(status));
    }
    assert!(started.elapsed().as_secs() < 5);
    m.ask(Ask::Unblock);
    fs::metadata(&f).unwrap();
    assert_eq!(m.end(Unmount::default()), Ended::Unmounted);
}

#[test]
fn a_forced_unmount_with_waiters_is_an_abort() {
    let Some(m) = mount() else { return };
    let f = m.path("f");
    File::create(&f).unwrap();
    let waiter = std::thread::spawn(move || errno(getxattr(&f, "user.block", 10)));
    std::thread::sleep(std::time::Duration::from_millis(100));
    let busy = kernel::unmount(m.dir.path(), Unmount::default());
    assert_eq!(errno(busy), libc::EBUSY);
    let how = Unmount {
        force: true,
        lazy: true,
    };
    assert_eq!(m.end(how), Ended::Aborted);
    assert_eq!(waiter.join().unwrap(), libc::ECONNABORTED);
}

#[test]
fn handles_are_found_again() {
    let Some(m) = mount() else { return };
    fs::create_dir(m.path("d")).unwrap();
    fs::write(m.path("d/f"), b"handle").unwrap();
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        data: [u8; 128],
    }
    let mut handle = Handle {
        bytes: 128,
        kind: 0,
        data: [0; 128],
    };
    let mut mount_id = 0i32;
    let root = File::open(m.dir.path()).unwrap();
    // SAFETY: a handle buffer with its size.
    unsafe {
        let at = std::ptr::from_mut(&mut handle).cast::<libc::c_void>();
        let path = c(&m.path("d/f"));
        check(libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            at,
            &raw mut mount_id,
            0,
        ))
        .unwrap();
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        m.invalidate(vec![Inval::AllNames]);
        let fd = check(libc::syscall(
            libc::SYS_open_by_handle_at,
            root.as_raw_fd(),
            at,
            libc::O_RDONLY,
        ))
        .unwrap();
        let mut buf = [0u8; 6];
        check(libc::read(fd as i32, buf.as_mut_ptr().cast(), 6) as i64).unwrap();
        assert_eq!(&buf, b"handle");
        libc::close(fd as i32);
    }
}

#[test]
fn rates_of_stat_and_create() {
    let Some(m) = mount() else { return };
    File::create(m.path("f")).unwrap();
    m.ask(Ask::AttrValid(Duration::ZERO));
    let path = c(&m.path("f"));
    let rate = |count: u32, mut f: Box<dyn FnMut(u32)>| {
        let mut best = 0f64;
        for round in 0..3 {
            let start = Instant::now();
            for n in 0..count {
                f(round * count + n);
            }
            best = best.max(f64::from(count) / start.elapsed().as_secs_f64());
        }
        best
    };
    let stat = rate(
        20_000,
        Box::new(move |_| {
            // SAFETY: a valid path and a zeroed buffer.
            unsafe {
                let mut stat: libc::stat = std::mem::zeroed();
                assert_eq!(libc::stat(path.as_ptr(), &mut stat), 0);
            }
        }),
    );
    m.ask(Ask::AttrValid(Duration::from_secs(60)));
    let dir = m.dir.path().to_owned();
    let create = rate(
        10_000,
        Box::new(move |n| drop(File::create_new(dir.join(format!("c{n}"))).unwrap())),
    );
    eprintln!("{stat:.0} stat/s, {create:.0} create+close/s");
    // Loose bounds: debug builds on busy machines pass them too.
    assert!(stat > 3_000.0 && create > 1_000.0);
}

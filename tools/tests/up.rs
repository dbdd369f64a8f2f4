//! `outrider up --nodes`: a cluster on one machine, as a newcomer uses it.
//!
//! Needs root (or fusermount3) and `/dev/fuse`; without them the tests say so and pass.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    missing_docs
)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

struct Up {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    dir: PathBuf,
}

fn outrider() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrider"));
    command.env("OUTRIDER_STATE_DIR", state_dir());
    command
}

fn state_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("up-state")
}

fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists()
        && (rustix::process::geteuid().is_root() || Path::new("/usr/bin/fusermount3").exists());
    if !can {
        eprintln!("skipped: needs /dev/fuse, and root or fusermount3");
    }
    can
}

impl Up {
    fn start(dir: &Path, args: &[&str]) -> Self {
        let mut child = outrider()
            .arg("up")
            .args(args)
            .arg(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                eprintln!("up: {line}");
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            seen: Vec::new(),
            dir: dir.to_owned(),
        }
    }

    /// Waits for a line that starts like this, and returns it.
    fn expect(&mut self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| {
                panic!("no line {start:?}; there was {:#?}", self.seen);
            });
            self.seen.push(line.clone());
            if line.starts_with(start) {
                return line;
            }
        }
    }

    fn order(&self, order: &[&str]) -> Output {
        outrider()
            .arg("up")
            .args(order)
            .arg(&self.dir)
            .output()
            .unwrap()
    }

    fn obeyed(&self, order: &[&str]) -> String {
        let output = self.order(order);
        assert!(output.status.success(), "{order:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until one leads that is not `before`.
    fn wait_leader(&self, before: Option<usize>) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.leader() {
                Some(leader) if Some(leader) != before => return leader,
                _ => assert!(Instant::now() < deadline, "nobody leads"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn leader(&self) -> Option<usize> {
        let list = self.obeyed(&["--list"]);
        let line = list.lines().find(|line| line.contains("leader of term"))?;
        line.split(':').next()?.parse().ok()
    }

    fn mount(&self, node: usize) -> PathBuf {
        self.dir.join("mnt").join(node.to_string())
    }

    /// Ends it as Ctrl-C does; the exit code.
    fn end(mut self) -> Option<i32> {
        // SAFETY: a signal to our own child, which was not waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        self.expect("unmounted");
        self.child.wait().unwrap().code()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            for _ in 0..2 {
                // SAFETY: as above.
                unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
                std::thread::sleep(Duration::from_millis(500));
            }
            let _ = self.child.wait();
        }
    }
}

#[test]
fn survivors_of_a_killed_and_of_a_paused_leader_go_on_and_it_comes_back() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut up = Up::start(dir.path(), &["--nodes", "3"]);
    let ready = up.expect("ready: ");
    assert_eq!(ready.split(' ').count(), 4, "{ready}");
    for node in 0..3 {
        let pid = fs::read_to_string(dir.path().join(format!("run/{node}.pid"))).unwrap();
        assert!(Path::new("/proc").join(pid.trim()).exists());
    }
    fs::write(up.mount(0).join("a"), "from 0").unwrap();
    assert_eq!(fs::read(up.mount(1).join("a")).unwrap(), b"from 0");
    assert_eq!(fs::read(up.mount(2).join("a")).unwrap(), b"from 0");
    for how in ["--kill", "--pause"] {
        let leader = up.wait_leader(None);
        up.obeyed(&[how, "leader"]);
        let others: Vec<usize> = (0..3).filter(|node| *node != leader).collect();
        let file = format!("after {how}");
        fs::write(up.mount(others[0]).join(&file), &file).unwrap();
        assert_eq!(
            fs::read_to_string(up.mount(others[1]).join(&file)).unwrap(),
            file
        );
        // A paused one was killed by the fence agent.
        up.expect(&format!("mount {leader} (pid"));
        up.obeyed(&["--restart", &leader.to_string()]);
        assert_eq!(
            fs::read_to_string(up.mount(leader).join(&file)).unwrap(),
            file
        );
    }
    assert!(!up.order(&["--kill", "7"]).status.success());
    assert!(!up.order(&["--kill", "nobody"]).status.success());
    let meta = dir.path().join("meta");
    let data = dir.path().join("data");
    assert_eq!(up.end(), Some(0));
    let check = outrider().arg("check").args([meta, data]).output().unwrap();
    assert!(check.status.success(), "{check:?}");
    // The same volume for one mount: its slots are fitted, its files are there.
    let mut alone = Up::start(dir.path(), &[]);
    alone.expect("ready: ");
    assert_eq!(fs::read(alone.mount(0).join("a")).unwrap(), b"from 0");
    assert_eq!(alone.end(), Some(0));
}

/// Ends a daemon with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_cluster_that_fences_by_an_agent_outside_goes_on_when_that_has_answered() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = dir.path().join("base");
    let options = format!("fence=agent,run_dir={}", base.display());
    let mut up = Up::start(dir.path(), &["--nodes", "3", "-o", &options]);
    up.expect("ready: ");
    let leader = up.wait_leader(None);
    let mounts: Vec<PathBuf> = fs::read_dir(&base)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(mounts.len(), 3);
    let leads = |mount: &&PathBuf| fs::read(mount.join("quorum/is_leader")).unwrap() == b"1";
    let deadline = Instant::now() + PATIENCE;
    while mounts.iter().filter(leads).count() != 1 {
        assert!(Instant::now() < deadline, "one of them leads");
        std::thread::sleep(Duration::from_millis(50));
    }
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    fs::write(up.mount(one).join("file"), "before").unwrap();
    up.obeyed(&["--kill", "leader"]);
    // Nobody has fenced it: its successor shows the request and waits.
    let pattern = |mount: &PathBuf| {
        let requests = fs::read_dir(mount.join("fence")).into_iter().flatten();
        requests
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.join("reason").exists())
    };
    let request = loop {
        assert!(Instant::now() < deadline, "no fence request");
        if let Some(request) = mounts.iter().find_map(pattern) {
            break request;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(
        fs::read_to_string(request.join("reason")).unwrap(),
        "quorum_block_leader"
    );
    let daemon = outrider()
        .args(["fenced", "--agent", "local", "--delay", "0", "--base"])
        .arg(&base)
        .spawn()
        .unwrap();
    let _daemon = Daemon(daemon);
    fs::write(up.mount(one).join("file"), "after").unwrap();
    assert_eq!(fs::read(up.mount(two).join("file")).unwrap(), b"after");
    up.obeyed(&["--restart", &leader.to_string()]);
    assert_eq!(up.end(), Some(0));
    assert_eq!(fs::read_dir(&base).unwrap().count(), 0);
}

#[test]
fn a_leader_that_was_paused_and_given_up_finds_that_out_before_it_writes() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // An agent that lies: the paused mount is declared dead and nobody kills it.
    let options = ["--nodes", "3", "-o", "fence=assume-dead"];
    let mut up = Up::start(dir.path(), &options);
    up.expect("ready: ");
    let leader = up.wait_leader(None);
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    let file = up.mount(leader).join("theirs");
    let busy = std::thread::spawn(move || {
        for round in 0_u64.. {
            let written = fs::write(&file, round.to_string().repeat(1000))
                .and_then(|()| fs::File::open(&file)?.sync_all());
            if let Err(error) = written {
                return error;
            }
        }
        unreachable!("it ends with an error")
    });
    std::thread::sleep(Duration::from_millis(500));
    up.obeyed(&["--pause", "leader"]);
    let text = |n: usize| format!("file {n} ").repeat(2000);
    fs::create_dir(up.mount(one).join("d")).unwrap();
    for n in 0..50 {
        let path = up.mount(one).join(format!("d/{n}"));
        fs::write(&path, text(n)).unwrap();
        fs::File::open(&path).unwrap().sync_all().unwrap();
    }
    up.wait_leader(Some(leader));
    up.obeyed(&["--resume", &leader.to_string()]);
    up.expect(&format!("mount {leader} (pid"));
    let error = busy.join().unwrap();
    eprintln!("its users were told: {error}");
    let log = fs::read_to_string(dir.path().join(format!("run/{leader}.log"))).unwrap();
    assert!(log.contains("declared dead"), "{log}");
    for n in 0..50 {
        let read = fs::read_to_string(up.mount(two).join(format!("d/{n}"))).unwrap();
        assert!(read == text(n), "file {n}");
    }
    up.obeyed(&["--restart", &leader.to_string()]);
    let (meta, data) = (dir.path().join("meta"), dir.path().join("data"));
    assert_eq!(up.end(), Some(0));
    let check = outrider().arg("check").args([meta, data]).output().unwrap();
    assert!(check.status.success(), "{check:?}");
}

#[test]
fn a_second_cluster_in_the_same_place_and_orders_to_nobody_are_refused() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut up = Up::start(dir.path(), &["--nodes", "2"]);
    up.expect("ready: ");
    let second = up.order(&["--nodes", "2"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another `outrider up` runs"));
    let dir = up.dir.clone();
    assert_eq!(up.end(), Some(0));
    let nobody = outrider()
        .args(["up", "--list"])
        .arg(&dir)
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("no `outrider up --nodes` runs"));
}

/// A signal that comes before the mount is ready ends it as well, at whatever step it is.
#[test]
fn a_signal_while_it_starts_ends_it() {
    if !can_mount() {
        return;
    }
    for delay in (0..=200).step_by(20) {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut up = Up::start(dir.path(), &[]);
        // Its signals are blocked, and wait to be read, once it holds the lock of the place.
        let deadline = Instant::now() + PATIENCE;
        while !dir.path().join("run/lock").exists() {
            assert!(Instant::now() < deadline, "it does not start");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        // SAFETY: a signal to our own child, which was not waited for.
        unsafe { libc::kill(up.child.id() as i32, libc::SIGTERM) };
        while up.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "{delay} ms: it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

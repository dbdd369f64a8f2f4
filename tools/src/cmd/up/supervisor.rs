//! A cluster on one machine: a process for each mount, started, watched, ordered
//! about and ended together.
//!
//! ```text
//!  signals ─┐
//!  exits   ─┼─ threads ──▶ one queue ──▶ this thread: all state, all decisions
//!  ready   ─┤
//!  orders  ─┘
//! ```
//!
//! | event | what is done |
//! |---|---|
//! | a mount is ready | its pid is in run/N.pid; when all are, `ready:` is printed |
//! | a mount dies | it is reported; the others go on |
//! | SIGINT, SIGTERM, SIGHUP | all are continued and unmounted at once; exit 0 |
//! | the same again | what still runs is killed; exit 1 |
//!
//! What can go wrong: a signal to a process that has ended meanwhile and whose pid
//! was given to another. Each is addressed by a pidfd taken before it could be reaped.
//! Mounts that lose this process unmount themselves (the kernel tells them).

use super::control::{self, Order};
use super::volume;
use crate::error::CmdError;
use outrider_core::errno::Errno;
use outrider_disk::lock::try_lock_file;
use outrider_mount::kernel::{self, Unmount};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Time between two looks at logs and quorum blocks.
const POLL: Duration = Duration::from_millis(250);
/// Most bytes of one log shown at a time.
const LOG_CHUNK: u64 = 64 << 10;

/// What to run.
pub struct Cluster {
    /// The directory, absolute.
    pub dir: PathBuf,
    /// How many mounts.
    pub nodes: usize,
    /// How many of them are quorum members.
    pub slots: usize,
    /// Mount options of the user.
    pub options: String,
}

enum Event {
    Ready {
        node: usize,
        life: u64,
        fine: bool,
    },
    Exited {
        node: usize,
        life: u64,
        status: io::Result<ExitStatus>,
    },
    Asked {
        order: Option<Order>,
        peer: UnixStream,
    },
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Its process was started.
    Mounting,
    /// It is usable.
    Mounted,
    /// It was sent SIGSTOP.
    Paused,
    /// It was asked to unmount.
    Unmounting,
    /// There is no process.
    Gone,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Mounting => "mounting",
            Self::Mounted => "mounted",
            Self::Paused => "paused",
            Self::Unmounting => "unmounting",
            Self::Gone => "gone",
        }
    }
}

struct Node {
    mountpoint: PathBuf,
    pid_file: PathBuf,
    log: PathBuf,
    /// How much of the log was shown.
    shown: u64,
    state: State,
    /// Counts its processes: an event of an earlier one is not of this one.
    life: u64,
    process: Option<(u32, OwnedFd)>,
    /// To be mounted again when its process has ended.
    again: bool,
    /// Orders that are answered when what they asked for is there, or cannot be.
    waiting: Vec<(UnixStream, Wanted)>,
}

/// What ends an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Mounted,
    Unmounted,
    Killed,
}

/// What became of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Became {
    Mounted,
    Unmounted,
    Dead,
}

impl Became {
    /// The answer to an order, if it is time for one.
    fn answers(self, wanted: Wanted) -> Option<Result<&'static str, ()>> {
        match (self, wanted) {
            (Self::Mounted, Wanted::Mounted) => Some(Ok("mounted")),
            (Self::Mounted, _) => None,
            (Self::Unmounted, Wanted::Unmounted) => Some(Ok("unmounted")),
            (_, Wanted::Killed) => Some(Ok("gone")),
            (_, Wanted::Mounted) | (Self::Dead, Wanted::Unmounted) => Some(Err(())),
        }
    }
}

/// Proof that no other process runs a cluster in the same directory.
pub struct Held {
    run: PathBuf,
    _lock: File,
}

/// Claims the directory.
pub fn hold(dir: &Path) -> Result<Held, CmdError> {
    let run = dir.join("run");
    fs::create_dir_all(&run).map_err(|e| CmdError::io("make", &run, &e))?;
    let path = run.join("lock");
    let lock = File::create(&path).map_err(|e| CmdError::io("create", &path, &e))?;
    match try_lock_file(&lock) {
        Ok(true) => Ok(Held { run, _lock: lock }),
        Ok(false) => Err(CmdError::new(
            Errno::EBUSY,
            format!("another `outrider up` runs in '{}'", dir.display()),
        )),
        Err(e) => Err(CmdError::io("lock", &path, &e)),
    }
}

struct Supervisor {
    cluster: Cluster,
    nodes: Vec<Node>,
    events: Sender<Event>,
    queue: Receiver<Event>,
    leader: Option<(usize, u64)>,
    announced: bool,
    ending: bool,
    /// A mount that did not end well after all were asked to end.
    bad_end: bool,
}

/// Runs the cluster until a signal ends it.
pub fn run(held: &Held, cluster: Cluster) -> Result<(), CmdError> {
    let system =
        |what: &'static str| move |e: io::Error| CmdError::new(Errno::EIO, format!("{what}: {e}"));
    // Before any thread, so that none takes them in another way.
    let signals = block_signals();
    let (events, queue) = channel();
    let listener = control::listen(&held.run).map_err(system("control socket"))?;
    watch_signals(signals, events.clone());
    {
        let events = events.clone();
        std::thread::spawn(move || {
            for peer in listener.incoming().flatten() {
                let events = events.clone();
                // A slow peer keeps only its own thread.
                std::thread::spawn(move || {
                    if let Ok(order) = control::read_order(&peer) {
                        let _ = events.send(Event::Asked { order, peer });
                    }
                });
            }
        });
    }
    let nodes = (0..cluster.nodes).map(|node| Node::new(&cluster.dir, &held.run, node));
    let mut supervisor = Supervisor {
        nodes: nodes.collect(),
        cluster,
        events,
        queue,
        leader: None,
        announced: false,
        ending: false,
        bad_end: false,
    };
    for node in 0..supervisor.nodes.len() {
        supervisor.spawn(node)?;
    }
    supervisor.serve();
    let _ = fs::remove_file(held.run.join("control"));
    supervisor.result()
}

impl Node {
    fn new(dir: &Path, run: &Path, node: usize) -> Self {
        let log = run.join(format!("{node}.log"));
        Self {
            mountpoint: outrider_mount::daemon::full_path(&super::mountpoint(dir, node)),
            pid_file: run.join(format!("{node}.pid")),
            shown: fs::metadata(&log).map_or(0, |meta| meta.len()),
            log,
            state: State::Gone,
            life: 0,
            process: None,
            again: false,
            waiting: Vec::new(),
        }
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match &self.process {
            Some((_, pidfd)) => Ok(pidfd_send_signal(pidfd, signal)?),
            None => Err(io::Error::other("it does not run")),
        }
    }

    /// Shows what its daemon has logged since the last look.
    fn show_log(&mut self, node: usize) {
        let Ok(mut file) = File::open(&self.log) else {
            return;
        };
        let mut text = Vec::new();
        let read = file
            .seek(SeekFrom::Start(self.shown))
            .and_then(|_| file.take(LOG_CHUNK).read_to_end(&mut text));
        // Whole lines, unless one is longer than everything.
        let end = match text.iter().rposition(|byte| *byte == b'\n') {
            Some(last) => last + 1,
            None if text.len() as u64 == LOG_CHUNK => text.len(),
            None => return,
        };
        if read.is_ok() {
            self.shown += end as u64;
            for line in String::from_utf8_lossy(&text[..end]).lines() {
                eprintln!("[{node}] {line}");
            }
        }
    }

    fn answer(&mut self, became: Became) {
        let (mount, log) = (self.mountpoint.display(), self.log.display());
        self.waiting.retain_mut(|(peer, wanted)| {
            let Some(answer) = became.answers(*wanted) else {
                return true;
            };
            // A peer that is gone needs no answer.
            let _ = match answer {
                Ok(done) => writeln!(peer, "ok {done}: {mount}"),
                Err(()) => writeln!(peer, "error {mount} ended; see {log}"),
            };
            false
        });
    }
}

impl Supervisor {
    fn serve(&mut self) {
        while !self.is_over() {
            match self.queue.recv_timeout(POLL) {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => self.look(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("a sender is in self"),
            }
        }
        self.look();
    }

    fn is_over(&self) -> bool {
        (self.ending || !self.announced) && self.nodes.iter().all(|n| n.state == State::Gone)
    }

    fn result(&self) -> Result<(), CmdError> {
        for node in &self.nodes {
            // What a daemon that died left in the tree; harmless if there is nothing.
            let lazy = Unmount {
                lazy: true,
                ..Unmount::default()
            };
            let left = fs::metadata(&node.mountpoint)
                .is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
            if left {
                let _ = kernel::unmount(&node.mountpoint, lazy);
            }
        }
        if !self.announced {
            let text = format!(
                "no mount became ready; see {}",
                self.cluster.dir.join("run/*.log").display()
            );
            return Err(CmdError::new(Errno::EIO, text));
        }
        if self.bad_end {
            return Err(CmdError::new(
                Errno::EIO,
                "not every mount ended cleanly; what was not synced there is lost",
            ));
        }
        println!("unmounted");
        Ok(())
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Ready { node, life, fine } if self.nodes[node].life == life => {
                self.ready(node, fine);
            }
            Event::Exited { node, life, status } if self.nodes[node].life == life => {
                self.exited(node, status);
            }
            Event::Ready { .. } | Event::Exited { .. } => {}
            Event::Asked { order, peer } => self.asked(order, peer),
            Event::End => self.end(),
        }
    }

    /// Starts the process of a mount.
    fn spawn(&mut self, number: usize) -> Result<(), CmdError> {
        let member = (number < self.cluster.slots).then_some(number);
        let node = &mut self.nodes[number];
        node.life += 1;
        let (child, ready) = start(&self.cluster, node, member)
            .map_err(|e| CmdError::new(Errno::EIO, format!("starting mount {number}: {e}")))?;
        let pid = child.id();
        let fail =
            |e: io::Error| CmdError::new(Errno::EIO, format!("watching mount {number}: {e}"));
        let raw = rustix::process::Pid::from_child(&child);
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(|e| fail(e.into()))?;
        fs::write(&node.pid_file, format!("{pid}\n"))
            .map_err(|e| CmdError::io("write", &node.pid_file, &e))?;
        node.process = Some((pid, pidfd));
        node.state = State::Mounting;
        node.again = false;
        watch(child, ready, number, node.life, self.events.clone());
        Ok(())
    }

    fn ready(&mut self, number: usize, fine: bool) {
        let node = &mut self.nodes[number];
        if fine && node.state == State::Mounting {
            node.state = State::Mounted;
            node.answer(Became::Mounted);
            if self.announced {
                println!("mount {number} is back: {}", node.mountpoint.display());
            }
        }
        self.announce();
    }

    /// Tells once that everything that can be used can be used.
    fn announce(&mut self) {
        let settled = |n: &Node| !matches!(n.state, State::Mounting | State::Unmounting);
        if self.announced || self.ending || !self.nodes.iter().all(settled) {
            return;
        }
        let usable = self.nodes.iter().filter(|n| n.state != State::Gone);
        let paths: Vec<String> = usable.map(|n| n.mountpoint.display().to_string()).collect();
        if paths.is_empty() {
            return;
        }
        self.announced = true;
        let dir = self.cluster.dir.display();
        println!("ready: {}", paths.join(" "));
        println!("Try, in another terminal: outrider up --kill leader {dir}");
        println!("Ctrl-C (or SIGTERM) unmounts all; the volume stays for next time.");
    }

    fn exited(&mut self, number: usize, status: io::Result<ExitStatus>) {
        let node = &mut self.nodes[number];
        node.show_log(number);
        let _ = fs::remove_file(&node.pid_file);
        let pid = node.process.take().map_or(0, |(pid, _)| pid);
        let asked = node.state == State::Unmounting;
        node.state = State::Gone;
        let how = match &status {
            Ok(status) if status.success() => "was unmounted".to_owned(),
            Ok(status) => match status.signal() {
                Some(signal) => format!("was ended by signal {signal}"),
                None => format!("failed ({status})"),
            },
            Err(e) => format!("cannot be watched any more: {e}"),
        };
        let fine = status.is_ok_and(|status| status.success());
        if self.ending && asked && !fine {
            self.bad_end = true;
        }
        if !(self.ending && fine) {
            println!(
                "mount {number} (pid {pid}) {how}: {}",
                node.mountpoint.display()
            );
        }
        if node.again && !self.ending {
            if let Err(error) = self.spawn(number) {
                error.report("outrider", "up");
                self.nodes[number].answer(Became::Dead);
            }
        } else {
            node.answer(match asked && fine {
                true => Became::Unmounted,
                false => Became::Dead,
            });
        }
        self.announce();
    }

    /// Unmounts all at once; the second time kills what is left.
    fn end(&mut self) {
        for node in &mut self.nodes {
            if node.state == State::Gone {
                continue;
            }
            // The process may have ended just now: its exit follows.
            if self.ending {
                let _ = node.signal(Signal::KILL);
                continue;
            }
            // A mount that was paused finds out what it missed, and ends as it can.
            let _ = node.signal(Signal::CONT);
            let _ = node.signal(Signal::TERM);
            node.state = State::Unmounting;
        }
        match self.ending {
            false => println!("unmounting; once more kills what does not end"),
            true => self.bad_end = true,
        }
        self.ending = true;
    }

    fn asked(&mut self, order: Option<Order>, mut peer: UnixStream) {
        let answered = match order {
            None => Err("unknown order".to_owned()),
            Some(_) if self.ending => Err("the cluster is being unmounted".to_owned()),
            Some(Order::List) => Ok(Some(self.list())),
            Some(order) => self.obey(order, &peer).map(|done| done.map(str::to_owned)),
        };
        // A peer that is gone needs no answer.
        let _ = match answered {
            Ok(Some(text)) => write!(peer, "ok {text}"),
            Ok(None) => Ok(()),
            Err(text) => writeln!(peer, "error {text}"),
        };
    }

    /// Does what was asked; `None` if the answer comes when the mount is there, or gone.
    fn obey(&mut self, order: Order, peer: &UnixStream) -> Result<Option<&'static str>, String> {
        let (Order::Kill(who)
        | Order::Pause(who)
        | Order::Resume(who)
        | Order::Restart(who)
        | Order::Stop(who)) = &order
        else {
            return Err("unknown order".to_owned());
        };
        let number = self.find(who)?;
        let later = |node: &mut Node, wanted| -> Result<Option<&'static str>, String> {
            let peer = peer.try_clone().map_err(|e| e.to_string())?;
            node.waiting.push((peer, wanted));
            Ok(None)
        };
        let node = &mut self.nodes[number];
        let sent = |result: io::Result<()>| result.map_err(|e| format!("mount {number}: {e}"));
        println!("{order}: mount {number}, {}", node.state.name());
        match order {
            Order::Kill(_) => {
                sent(node.signal(Signal::KILL))?;
                later(node, Wanted::Killed)
            }
            Order::Pause(_) => {
                sent(node.signal(Signal::STOP))?;
                node.state = State::Paused;
                Ok(Some("paused\n"))
            }
            Order::Resume(_) => {
                sent(node.signal(Signal::CONT))?;
                if node.state == State::Paused {
                    node.state = State::Mounted;
                }
                Ok(Some("resumed\n"))
            }
            Order::Stop(_) => {
                let _ = node.signal(Signal::CONT);
                sent(node.signal(Signal::TERM))?;
                node.state = State::Unmounting;
                later(node, Wanted::Unmounted)
            }
            Order::Restart(_) if node.state == State::Gone => {
                later(node, Wanted::Mounted)?;
                if let Err(error) = self.spawn(number) {
                    error.report("outrider", "up");
                    self.nodes[number].answer(Became::Dead);
                }
                Ok(None)
            }
            Order::Restart(_) => {
                let _ = node.signal(Signal::CONT);
                sent(node.signal(Signal::TERM))?;
                node.state = State::Unmounting;
                node.again = true;
                later(node, Wanted::Mounted)
            }
            Order::List => unreachable!("answered by the caller"),
        }
    }

    fn find(&self, who: &str) -> Result<usize, String> {
        if who == "leader" {
            return match volume::leader(&self.cluster.dir.join("meta")) {
                Some((node, _)) if self.is_there(node) => Ok(node),
                _ => Err("nobody leads at the moment; try again".to_owned()),
            };
        }
        let number: usize = who
            .parse()
            .map_err(|_| format!("{who:?} is neither a number nor `leader`"))?;
        match number < self.nodes.len() {
            true => Ok(number),
            false => Err(format!(
                "there is no mount {number}: 0 to {} are there",
                self.nodes.len() - 1
            )),
        }
    }

    fn is_there(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(|n| n.state != State::Gone)
    }

    fn list(&self) -> String {
        let leader = volume::leader(&self.cluster.dir.join("meta"));
        let mut text = String::from("mounts:\n");
        for (number, node) in self.nodes.iter().enumerate() {
            let pid = match &node.process {
                Some((pid, _)) => format!("pid {pid}"),
                None => "no process".to_owned(),
            };
            let role = match leader {
                Some((slot, term)) if slot == number && self.is_there(slot) => {
                    format!(", leader of term {term}")
                }
                _ if number < self.cluster.slots => ", quorum member".to_owned(),
                _ => String::new(),
            };
            let mount = node.mountpoint.display();
            text += &format!("{number}: {}, {pid}{role}: {mount}\n", node.state.name());
        }
        text
    }

    /// Shows what the mounts logged, and who leads if that changed.
    fn look(&mut self) {
        for (number, node) in self.nodes.iter_mut().enumerate() {
            node.show_log(number);
        }
        let leader = volume::leader(&self.cluster.dir.join("meta"));
        if let Some((slot, term)) = leader
            && leader != self.leader
            && self.is_there(slot)
            && !self.ending
        {
            println!("leader: mount {slot} (term {term})");
            self.leader = leader;
        }
    }
}

/// Starts a mount's daemon; the pipe gives one byte when it is ready.
fn start(cluster: &Cluster, node: &Node, member: Option<usize>) -> io::Result<(Child, PipeReader)> {
    let mut options = super::option_text(cluster.nodes, &cluster.options, &cluster.dir);
    if let Some(slot) = member {
        options += &format!(",quorum_slot_nr={slot}");
    }
    let log = File::options().create(true).append(true).open(&node.log)?;
    let (reader, writer) = io::pipe()?;
    let fd = writer.as_raw_fd();
    let parent = std::process::id();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["mount", "--foreground", "--ready-fd", &fd.to_string()])
        .args(["-o", &options, "--"])
        .arg(cluster.dir.join("data"))
        .arg(&node.mountpoint)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // A terminal's Ctrl-C is for the supervisor, which tells all.
            libc::setpgid(0, 0);
            // This thread is the process's first: it ends with the process.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            if libc::getppid() != parent as i32 {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::fcntl(fd, libc::F_SETFD, 0);
            Ok(())
        });
    }
    Ok((command.spawn()?, reader))
}

/// Reports when a mount is ready, and how its process ends.
fn watch(mut child: Child, mut ready: PipeReader, node: usize, life: u64, events: Sender<Event>) {
    let told = events.clone();
    std::thread::spawn(move || {
        let fine = matches!(ready.read(&mut [0; 1]), Ok(1));
        let _ = told.send(Event::Ready { node, life, fine });
    });
    std::thread::spawn(move || {
        let status = child.wait();
        let _ = events.send(Event::Exited { node, life, status });
    });
}

/// Blocks the signals that end a cluster, in this thread and those to come.
fn block_signals() -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset, and the calls only use it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    }
}

fn watch_signals(set: libc::sigset_t, events: Sender<Event>) {
    std::thread::spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: the set was made by block_signals.
            let result = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
            if result == 0 && events.send(Event::End).is_err() {
                return;
            }
        }
    });
}

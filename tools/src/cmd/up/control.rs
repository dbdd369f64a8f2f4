//! Orders to a running `outrider up --nodes`: one line over a socket in DIR/run, the
//! answer until the end of the stream, `ok` or `error` at the start of its first line.
//!
//! What can go wrong: a socket path longer than the system allows (108 bytes). Both
//! sides name it through `/proc/self/fd`, which is always short.

use crate::error::CmdError;
use outrider_core::errno::Errno;
use rustix::fs::{Mode, OFlags};
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a peer may take for its line.
const LINE_PATIENCE: Duration = Duration::from_secs(5);
/// Longest line taken.
const LINE_MAX: u64 = 256;

/// What to do with a mount, given by its number or as `leader`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// `kill -9`.
    Kill(String),
    /// SIGSTOP.
    Pause(String),
    /// SIGCONT.
    Resume(String),
    /// Unmount if it runs, mount again.
    Restart(String),
    /// Unmount.
    Stop(String),
    /// Tell the state of all.
    List,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(who) => write!(f, "kill {who}"),
            Self::Pause(who) => write!(f, "pause {who}"),
            Self::Resume(who) => write!(f, "resume {who}"),
            Self::Restart(who) => write!(f, "restart {who}"),
            Self::Stop(who) => write!(f, "stop {who}"),
            Self::List => f.write_str("list"),
        }
    }
}

impl Order {
    /// The reverse of `Display`.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (verb, who) = (words.next()?, words.next());
        if words.next().is_some() {
            return None;
        }
        let make = match verb {
            "kill" => Self::Kill,
            "pause" => Self::Pause,
            "resume" => Self::Resume,
            "restart" => Self::Restart,
            "stop" => Self::Stop,
            "list" if who.is_none() => return Some(Self::List),
            _ => return None,
        };
        who.map(|who| make(who.to_owned()))
    }
}

/// The short name of the socket in `run`; valid while the descriptor is open.
fn socket_path(run: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let dir = rustix::fs::open(run, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/control", dir.as_raw_fd()));
    Ok((dir, path))
}

/// Makes the socket. The caller holds the directory's lock, so an old one is dead.
pub fn listen(run: &Path) -> io::Result<UnixListener> {
    let (_dir, path) = socket_path(run)?;
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    UnixListener::bind(path)
}

/// Reads the order of a peer that connected.
pub fn read_order(stream: &UnixStream) -> io::Result<Option<Order>> {
    stream.set_read_timeout(Some(LINE_PATIENCE))?;
    stream.set_write_timeout(Some(LINE_PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_MAX)).read_line(&mut line)?;
    Ok(Order::parse(&line))
}

/// Sends an order to the cluster in `dir`, waits until it is done, prints the answer.
pub fn send(dir: &Path, order: &Order) -> Result<(), CmdError> {
    let run = dir.join("run");
    let nobody = |e: io::Error| {
        CmdError::new(
            Errno(e.raw_os_error().unwrap_or(Errno::EIO.0)),
            format!("no `outrider up --nodes` runs in '{}': {e}", dir.display()),
        )
    };
    let (_dir, path) = socket_path(&run).map_err(nobody)?;
    let mut stream = UnixStream::connect(path).map_err(nobody)?;
    let mut answer = String::new();
    writeln!(stream, "{order}")
        .and_then(|()| stream.read_to_string(&mut answer))
        .map_err(|e| CmdError::new(Errno::EIO, format!("asking the running cluster: {e}")))?;
    match answer.split_once(' ').unwrap_or((answer.trim_end(), "")) {
        ("ok", text) => {
            print!("{text}");
            Ok(())
        }
        ("error", text) => Err(CmdError::new(Errno::EINVAL, text.trim_end())),
        _ => Err(CmdError::new(
            Errno::EIO,
            "the cluster ended before it answered",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_were_written() {
        let who = || "2".to_owned();
        for order in [
            Order::Kill(who()),
            Order::Pause(who()),
            Order::Resume("leader".into()),
            Order::Restart(who()),
            Order::Stop(who()),
            Order::List,
        ] {
            assert_eq!(Order::parse(&order.to_string()), Some(order));
        }
        for wrong in ["", "kill", "list 1", "kill 1 2", "explode 1"] {
            assert_eq!(Order::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_long_directory_has_a_socket_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("x".repeat(120)).join("run");
        std::fs::create_dir_all(&run).unwrap();
        drop(listen(&run).unwrap());
        let refused = send(run.parent().unwrap(), &Order::List);
        assert!(refused.is_err());
        let listener = listen(&run).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let order = read_order(&stream).unwrap();
            stream.write_all(b"ok fine\n").unwrap();
            order
        });
        send(run.parent().unwrap(), &Order::List).unwrap();
        assert_eq!(server.join().unwrap(), Some(Order::List));
    }
}

//! `outrider fenced`: the fence daemon (spec 09 section 9.1). It answers the requests
//! that mounts of this host show in `BASE/f.*.r.*/fence/RID/`, by an agent.
//!
//! What can go wrong:
//! * An agent that hangs: it is killed, and tried again.
//! * An agent that fails: it is tried again while the request stands; then `error` is
//!   written, the server gives up, and another one asks anew.
//! * A slow agent for one mount: requests are served side by side, one agent for each.
//! * A request that vanishes in the middle: nothing is written, nothing is wrong.
//! * Requests of a mount that is dead itself: its directory's lock is free, and nobody
//!   waits for an answer.

mod agents;
mod config;

use crate::error::CmdError;
use agents::Agent;
use config::Config;
use outrider_core::errno::Errno;
use outrider_disk::lock::try_lock_file;
use outrider_mount::rundir;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// Answer the fence requests of mounts on this host.
///
/// Runs beside the mounts of every quorum member. The configuration file is the
/// original's: SCOUTFS_FENCED_DELAY (seconds between two looks, 2), SCOUTFS_FENCED_RUN
/// (program) and SCOUTFS_FENCED_RUN_ARGS. The program is run for each request with
/// SCOUTFS_FENCED_REQ_RID and SCOUTFS_FENCED_REQ_IP in its environment; exit code 0 says
/// that the mount can never write again, queued writes included.
///
/// Agents: `command` runs that program. `local` kills the mount's process on this host
/// and proves that it is gone, for clusters on one machine. `scsi` takes its key of
/// SCSI-3 persistent reservations away with sg_persist; mount with -o scsi_pr then.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider fenced\n  \
    outrider fenced --config /etc/scoutfs/scoutfs-fenced.conf --json\n  \
    outrider fenced --agent scsi --device /dev/mapper/meta --device /dev/mapper/data\n  \
    outrider fenced --run /usr/local/sbin/power-off --arg --quick --once\n\n\
    Exit code with --once: 0 all requests were fenced (or there were none), 1 some were not.")]
pub struct Args {
    /// Configuration file [default: $SCOUTFS_FENCED_CONFIG_FILE, or
    /// /etc/scoutfs/scoutfs-fenced.conf if it is there].
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the runtime directories of mounts are; may be repeated.
    #[arg(short, long, value_name = "DIR")]
    base: Vec<PathBuf>,
    /// Who fences.
    #[arg(short, long, value_enum, default_value_t = Choice::Command)]
    agent: Choice,
    /// Program of the `command` agent, instead of the file's.
    #[arg(long, value_name = "PROGRAM")]
    run: Option<PathBuf>,
    /// Argument of that program; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    arg: Vec<String>,
    /// Device of the `scsi` agent; may be repeated.
    #[arg(long, value_name = "DEVICE")]
    device: Vec<PathBuf>,
    /// Seconds between two looks, instead of the file's.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=3600))]
    delay: Option<u64>,
    /// Seconds after which an agent is killed. A leader waits 15 seconds for the fence
    /// of its predecessors and 30 for others.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
    /// How often a failed agent is tried again before `error` is written.
    #[arg(long, value_name = "N", default_value_t = 2)]
    retries: u32,
    /// Answer what is there now, then end.
    #[arg(long)]
    once: bool,
    /// Log as JSON, one object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    Command,
    Local,
    Scsi,
}

/// A request that waits for an answer.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its directory.
    dir: PathBuf,
    /// The directory of the mount that asks.
    mount: PathBuf,
    /// The mount that asks, 16 hex digits.
    own_rid: String,
    /// The volume, 16 hex digits.
    fsid: String,
    /// The mount to fence, 16 hex digits.
    rid: String,
    /// Where it was seen last.
    ip: String,
    /// Why.
    reason: String,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Fenced,
    Failed,
    Withdrawn,
}

/// One line of the log.
#[derive(Serialize)]
struct Line<'a> {
    time: f64,
    event: &'a str,
    rid: &'a str,
    ip: &'a str,
    reason: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
    seconds: f64,
}

#[derive(Clone)]
struct Daemon {
    agent: Agent,
    limit: Duration,
    tries: u32,
    json: bool,
}

impl Args {
    /// Does it.
    pub fn run(self) -> Result<ExitCode, CmdError> {
        let config = self.read_config()?;
        let delay = self.delay.map(Duration::from_secs).or(config.delay);
        let delay = delay.unwrap_or(Duration::from_secs(2));
        let (once, mut bases) = (self.once, self.base.clone());
        if bases.is_empty() {
            bases.push(rundir::default_base());
        }
        let daemon = Daemon {
            limit: Duration::from_secs(self.timeout),
            tries: self.retries + 1,
            json: self.json,
            agent: self.agent(config)?,
        };
        Ok(match once {
            true => daemon.once(&bases),
            false => daemon.for_ever(&bases, delay),
        })
    }

    fn read_config(&self) -> Result<Config, CmdError> {
        let named = self
            .config
            .clone()
            .or_else(|| std::env::var_os("SCOUTFS_FENCED_CONFIG_FILE").map(PathBuf::from));
        let path = named.clone().unwrap_or_else(|| config::DEFAULT_PATH.into());
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound && named.is_none() => {
                return Ok(Config::default());
            }
            Err(e) => return Err(CmdError::io("read", &path, &e)),
        };
        Config::parse(&text)
            .map_err(|why| CmdError::new(Errno::EINVAL, format!("{}: {why}", path.display())))
    }

    fn agent(self, config: Config) -> Result<Agent, CmdError> {
        match self.agent {
            Choice::Local => Ok(Agent::Local),
            Choice::Scsi => Ok(Agent::Scsi {
                devices: self.device,
            }),
            Choice::Command => {
                let args = match self.run {
                    Some(_) => self.arg,
                    None => config.args,
                };
                let run = self.run.or(config.run).ok_or_else(|| {
                    let text = "no program to run: give --run, or SCOUTFS_FENCED_RUN in the \
                                configuration file, or another --agent";
                    CmdError::new(Errno::EINVAL, text)
                })?;
                Ok(Agent::Command { run, args })
            }
        }
    }
}

impl Daemon {
    fn for_ever(&self, bases: &[PathBuf], delay: Duration) -> ! {
        let mut working: BTreeMap<PathBuf, JoinHandle<End>> = BTreeMap::new();
        loop {
            working.retain(|_, worker| !worker.is_finished());
            for request in bases.iter().flat_map(|base| requests(base)) {
                let daemon = self.clone();
                working
                    .entry(request.dir.clone())
                    .or_insert_with(|| std::thread::spawn(move || daemon.answer(&request)));
            }
            // Even with no delay there is one: a loop without is a burden for nobody's good.
            std::thread::sleep(delay.max(Duration::from_millis(50)));
        }
    }

    fn once(&self, bases: &[PathBuf]) -> ExitCode {
        let workers: Vec<JoinHandle<End>> = bases
            .iter()
            .flat_map(|base| requests(base))
            .map(|request| {
                let daemon = self.clone();
                std::thread::spawn(move || daemon.answer(&request))
            })
            .collect();
        // All are waited for, whatever the first of them says.
        let ends: Vec<End> = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or(End::Failed))
            .collect();
        match ends.contains(&End::Failed) {
            false => ExitCode::SUCCESS,
            true => ExitCode::FAILURE,
        }
    }

    /// Fences one mount and writes the answer.
    fn answer(&self, request: &Request) -> End {
        let start = Instant::now();
        self.log(request, start, "request", "");
        for attempt in 1..=self.tries {
            if !request.dir.exists() {
                self.log(request, start, "withdrawn", "");
                return End::Withdrawn;
            }
            match self.agent.fence(request, self.limit) {
                Ok(said) => return self.finish(request, start, End::Fenced, &said),
                Err(why) if attempt == self.tries => {
                    return self.finish(request, start, End::Failed, &why);
                }
                Err(why) => {
                    self.log(request, start, "retry", &why);
                    std::thread::sleep(Duration::from_millis(500));
                }
            }
        }
        unreachable!("the last attempt returns")
    }

    fn finish(&self, request: &Request, start: Instant, end: End, detail: &str) -> End {
        let (file, event) = match end {
            End::Fenced => ("fenced", "fenced"),
            _ => ("error", "failed"),
        };
        match write_answer(&request.dir.join(file)) {
            Ok(()) => {
                self.log(request, start, event, detail);
                end
            }
            Err(_) if !request.dir.exists() => {
                self.log(request, start, "withdrawn", detail);
                End::Withdrawn
            }
            Err(e) => {
                let text = format!("the answer {file} could not be written: {e}; {detail}");
                self.log(request, start, "failed", &text);
                End::Failed
            }
        }
    }

    fn log(&self, request: &Request, start: Instant, event: &str, detail: &str) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let line = Line {
            time: now.unwrap_or_default().as_secs_f64(),
            event,
            rid: &request.rid,
            ip: &request.ip,
            reason: &request.reason,
            detail,
            seconds: start.elapsed().as_secs_f64(),
        };
        let text = match self.json {
            true => serde_json::to_string(&line).unwrap_or_default(),
            false => {
                let (rid, ip, reason) = (line.rid, line.ip, line.reason);
                let head = format!(
                    "{event}: mount {rid} at {ip} ({reason}), {:.1} s",
                    line.seconds
                );
                match detail.is_empty() {
                    true => head,
                    false => format!("{head}: {detail}"),
                }
            }
        };
        // A reader that is gone must not end the daemon.
        let _ = writeln!(io::stdout(), "{text}");
    }
}

/// Any write answers. The file must be there: a request that was withdrawn has none.
fn write_answer(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(b"1")
}

/// The requests below a base that wait for an answer.
fn requests(base: &Path) -> Vec<Request> {
    let list = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    let mut out = Vec::new();
    for mount in list(base) {
        let name = mount.file_name().to_string_lossy().into_owned();
        if !name.starts_with("f.") || is_dead(&mount.path()) {
            continue;
        }
        for entry in list(&mount.path().join("fence")) {
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            // What vanishes while it is read was withdrawn.
            out.extend(read_request(&mount.path(), &entry.path()).ok().flatten());
        }
    }
    out
}

/// Whether the mount whose directory this is does not live any more. A directory
/// without a lock file is the original's.
fn is_dead(mount: &Path) -> bool {
    File::open(mount.join(".lock")).is_ok_and(|lock| try_lock_file(&lock).unwrap_or(false))
}

fn read_request(mount: &Path, dir: &Path) -> io::Result<Option<Request>> {
    let read = |path: PathBuf| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let flag = |name: &str| read(dir.join(name)).map(|text| text != "0");
    if flag("fenced")? || flag("error")? {
        return Ok(None);
    }
    Ok(Some(Request {
        rid: read(dir.join("rid"))?,
        ip: read(dir.join("ipv4_addr"))?,
        reason: read(dir.join("reason"))?,
        fsid: read(mount.join("fsid"))?,
        own_rid: read(mount.join("rid"))?,
        dir: dir.to_owned(),
        mount: mount.to_owned(),
    }))
}

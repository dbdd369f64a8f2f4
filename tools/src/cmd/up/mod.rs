//! `outrider up [--nodes N] [DIR]`: a volume in two files, made on first use and
//! mounted once or several times; no flags needed.
//!
//! * [`volume`]: the two files, and the quorum slots that fit the number of mounts.
//! * [`supervisor`]: a process for each mount, watched.
//! * [`control`]: `--kill`, `--pause`, `--resume`, `--restart` of a running cluster.

mod control;
mod supervisor;
mod volume;

use crate::error::CmdError;
use control::Order;
use outrider_core::errno::Errno;
use outrider_mount::daemon::{self, DaemonConfig};
use outrider_mount::options::MountOptions;
use std::fs;
use std::path::{Path, PathBuf};

/// Most mounts on one machine: a process and several threads each.
const NODES_MAX: u64 = 64;
/// The heartbeat timeout of a mount that is alone: a dead predecessor is told by
/// its record, not by its silence.
const ALONE_HEARTBEAT_MS: u64 = 2000;
/// The heartbeat timeout among several mounts: a busy machine must not look dead.
const CLUSTER_HEARTBEAT_MS: u64 = 3000;

/// Make a volume in two sparse files (once) and mount it, once or several times.
///
/// The volume stays in DIR for next time; nothing else on the machine is touched.
/// With --nodes it is a cluster on one machine: a process for each mount, mounted at
/// DIR/mnt/0, DIR/mnt/1 and so on, its pid in DIR/run/N.pid and its log in DIR/run/N.log.
/// The first three are quorum members. Kill or pause one, and watch the others go on:
/// the `local` fence agent makes sure that a mount that was given up is really dead.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    outrider up\n  \
    outrider up /srv/volume\n  \
    outrider up --nodes 3 --cluster-key     encrypted, with a key of its own\n  \
    outrider up --nodes 3 /srv/volume       (and in another terminal:)\n  \
    outrider up --kill leader /srv/volume   kill -9 the mount that leads\n  \
    outrider up --restart 0 /srv/volume     mount it again\n  \
    outrider up --pause 1 /srv/volume       SIGSTOP, and --resume 1 for SIGCONT\n  \
    outrider up --list /srv/volume          who is there, and who leads")]
pub struct Args {
    /// How many mounts, each in a process of its own.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=NODES_MAX))]
    nodes: Option<u64>,
    /// More mount options for every mount, as for `outrider mount`.
    #[arg(short, long, value_name = "OPTIONS")]
    options: Option<String>,
    /// First port to try for the quorum slots; the next ones follow it.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..65535))]
    port: Option<u16>,
    /// Make the volume with a cluster key, in DIR/cluster.key: its mounts authenticate
    /// each other and encrypt what they say. A volume that has one uses it in any case.
    #[arg(long)]
    cluster_key: bool,
    #[command(flatten)]
    order: Orders,
    /// Where the files `meta` and `data` and the mount points `mnt/N` are.
    #[arg(default_value = "outrider-volume")]
    dir: PathBuf,
}

/// Orders to a running `up --nodes`. `K` is a mount's number, or `leader`.
#[derive(clap::Args, Debug)]
#[group(multiple = false, conflicts_with_all = ["nodes", "options", "port", "cluster_key"])]
struct Orders {
    /// Kill mount K (a number, or `leader`) of the running cluster, as by kill -9.
    #[arg(long, value_name = "K")]
    kill: Option<String>,
    /// Stop mount K in its tracks (SIGSTOP).
    #[arg(long, value_name = "K")]
    pause: Option<String>,
    /// Let mount K go on (SIGCONT).
    #[arg(long, value_name = "K")]
    resume: Option<String>,
    /// Mount K again; one that runs is unmounted first.
    #[arg(long, value_name = "K")]
    restart: Option<String>,
    /// Unmount mount K cleanly and leave it out.
    #[arg(long, value_name = "K")]
    stop: Option<String>,
    /// List the mounts of the running cluster.
    #[arg(long)]
    list: bool,
}

impl Orders {
    fn order(self) -> Option<Order> {
        let choice = [
            self.kill.map(Order::Kill),
            self.pause.map(Order::Pause),
            self.resume.map(Order::Resume),
            self.restart.map(Order::Restart),
            self.stop.map(Order::Stop),
            self.list.then_some(Order::List),
        ];
        choice.into_iter().flatten().next()
    }
}

impl Args {
    /// Does it.
    pub fn run(self) -> Result<(), CmdError> {
        if let Some(order) = self.order.order() {
            return control::send(&self.dir, &order);
        }
        super::log_to_stderr();
        let nodes = self.nodes.unwrap_or(1) as usize;
        // Refused before anything is made.
        let options = node_options(nodes, self.options.as_deref(), &self.dir)?;
        for node in 0..nodes {
            make_dir(&mountpoint(&self.dir, node))?;
        }
        let held = supervisor::hold(&self.dir)?;
        let slots = volume::settle(&self.dir, nodes, self.port, self.cluster_key)?;
        let key = volume::key(&self.dir).map(|path| format!("cluster_key={}", path.display()));
        let extra: Vec<String> = key.into_iter().chain(self.options).collect();
        let extra = extra.join(",");
        let options = match extra.is_empty() {
            true => options,
            false => node_options(nodes, Some(&extra), &self.dir)?,
        };
        if self.nodes.is_none() {
            return alone(&self.dir, options);
        }
        let dir = fs::canonicalize(&self.dir).map_err(|e| CmdError::io("find", &self.dir, &e))?;
        let options = extra;
        let cluster = supervisor::Cluster {
            dir,
            nodes,
            slots,
            options,
        };
        supervisor::run(&held, cluster)
    }
}

fn mountpoint(dir: &Path, node: usize) -> PathBuf {
    dir.join("mnt").join(node.to_string())
}

fn make_dir(path: &Path) -> Result<(), CmdError> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|e| CmdError::io("make", parent, &e))?;
    match fs::create_dir(path) {
        // It exists, or a killed daemon's mount still covers it.
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(CmdError::io("make", path, &e))
        }
        _ => Ok(()),
    }
}

/// What `-o` gives for a cluster of this size, checked.
fn node_options(nodes: usize, extra: Option<&str>, dir: &Path) -> Result<MountOptions, CmdError> {
    let text = option_text(nodes, extra.unwrap_or_default(), dir);
    let options =
        MountOptions::parse(&text).map_err(|error| CmdError::new(Errno::EINVAL, error))?;
    if options.quorum_slot.is_some() {
        let text = "quorum_slot_nr is given by the number of the mount";
        return Err(CmdError::new(Errno::EINVAL, text));
    }
    Ok(options)
}

/// The options of every mount, slots aside. Those of the user come last and win.
fn option_text(nodes: usize, extra: &str, dir: &Path) -> String {
    let heartbeat = if nodes == 1 {
        ALONE_HEARTBEAT_MS
    } else {
        CLUSTER_HEARTBEAT_MS
    };
    format!(
        "metadev_path={},quorum_heartbeat_timeout_ms={heartbeat},{extra}",
        dir.join("meta").display()
    )
}

/// One mount, in this process.
fn alone(dir: &Path, mut options: MountOptions) -> Result<(), CmdError> {
    options.quorum_slot = Some(0);
    let mountpoint = mountpoint(dir, 0);
    let shown = daemon::full_path(&mountpoint);
    let config = DaemonConfig {
        data: dir.join("data"),
        mountpoint,
        options,
    };
    let ready = || {
        println!("ready: {}", shown.display());
        println!("Ctrl-C (or SIGTERM) unmounts; the volume stays for next time.");
    };
    daemon::run(&config, ready).map_err(|error| CmdError::new(error.errno(), error))?;
    println!("unmounted");
    Ok(())
}

//! The state of a world at a moment, for people and programs to read: who is mounted
//! with which locks, transactions and caches, what the quorum believes, which calls wait
//! for an answer, and what is under way on devices and network.
//!
//! Looking changes nothing: a run that is looked at does the same as one that is not.
//! What can go wrong: state that somebody works on in this very step. Looks come between
//! two steps of the executor, when nobody does.

use crate::backend::Sim;
use crate::backend::disk::Disks;
use crate::backend::flying::{Flying, Request, Waiting};
use crate::backend::net::SimNet;
use crate::disk_model::Medium;
use crate::plan::DiskFault;
use crate::trace::{Event, Sink, seconds};
use outrider_core::env::DeviceRole;
use outrider_core::locks::Mode;
use outrider_core::locks::client::LockState;
use outrider_core::node::Mount;
use serde::Serialize;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::rc::{Rc, Weak};

/// When to look.
pub struct Moments {
    /// At these nanoseconds of the world.
    pub at: Vec<u64>,
    /// And every so many nanoseconds.
    pub every: Option<u64>,
    /// Told what is there, with the contents of the metadata device.
    pub each: Box<dyn FnMut(Snapshot, Medium) + Send>,
}

/// A lock that a mount has or wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lock {
    /// What it covers.
    pub lock: String,
    /// The mode that tasks may use.
    pub mode: String,
    /// The mode that is being taken away.
    pub invalidating: Option<String>,
    /// Users: readers, writers, those that only write.
    pub users: [u32; 3],
    /// Tasks that wait, as above.
    pub waiting: [u32; 3],
}

/// A quorum member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its slot.
    pub slot: usize,
    /// Its term.
    pub term: u64,
    /// Follower, candidate or leader.
    pub role: String,
    /// Term of its server; 0 if it has none.
    pub server_term: u64,
    /// Whether its server has fenced the leaders before it.
    pub server_fenced: bool,
    /// Whom it voted for in this term.
    pub voted_for: Option<usize>,
}

/// The open transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Transaction {
    /// Its seq.
    pub seq: u64,
    /// Whether anybody has entered it.
    pub used: bool,
    /// Who is in it.
    pub holders: u32,
    /// Whether it is being committed.
    pub committing: bool,
    /// Its dirty blocks.
    pub dirty_blocks: usize,
    /// Items changed in it.
    pub dirty_items: usize,
    /// Bytes of file data that no device has.
    pub dirty_data_bytes: u64,
    /// Commits of this mount so far.
    pub commits: u64,
}

/// What is kept in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Caches {
    /// Metadata blocks: clean, dirty.
    pub blocks: (usize, usize),
    /// Pages of items, items, and bytes of them.
    pub items: (usize, usize, usize),
    /// Inodes with state, and inodes that the kernel knows.
    pub inodes: (usize, usize),
    /// The kernel's names, attributes, pages and looked up inodes.
    pub kernel: Option<[usize; 4]>,
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MountState {
    /// Where.
    pub node: u32,
    /// Its number in a world of several nodes.
    pub seat: u32,
    /// Its id, as 16 hex digits.
    pub rid: String,
    /// Its process stands still.
    pub paused: bool,
    /// It was cut off: nothing of it counts any more.
    pub severed: bool,
    /// Tasks of its process.
    pub tasks: usize,
    /// Of quorum members.
    pub quorum: Option<Member>,
    /// Term of the server that it talks to.
    pub server_term: u64,
    /// Nanoseconds without a connection to a server.
    pub detached: Option<u64>,
    /// The transaction.
    pub transaction: Transaction,
    /// Caches.
    pub caches: Caches,
    /// Its locks: in use, wanted, or kept.
    pub locks: Vec<Lock>,
    /// Open inodes, with uses and writers.
    pub open: Vec<(u64, u32, u32)>,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// The moment that was asked for, in nanoseconds: all before it has happened.
    pub nanos: u64,
    /// Events so far.
    pub events: u64,
    /// Their digest.
    pub digest: String,
    /// Polls of tasks so far.
    pub polls: u64,
    /// How many nodes there are.
    pub nodes: usize,
    /// Who is mounted.
    pub mounts: Vec<MountState>,
    /// Calls without an answer, by node.
    pub calls: Vec<(u32, String)>,
    /// Requests that no device has ended.
    pub requests: Vec<Request>,
    /// Faults of devices in force.
    pub faults: Vec<DiskFault>,
    /// Machines whose requests do not end, and those whose requests are refused.
    pub frozen: Vec<u32>,
    /// See above.
    pub barred: Vec<u32>,
    /// What is on its way.
    pub flying: Vec<Flying>,
    /// What waits in streams.
    pub streams: Vec<Waiting>,
    /// Directions that are cut.
    pub cut: Vec<(Ipv4Addr, Ipv4Addr)>,
}

fn lock(state: &LockState) -> Lock {
    let name = |mode: Mode| format!("{mode:?}");
    let counts = |all: [u32; Mode::COUNT]| [all[1], all[2], all[3]];
    Lock {
        lock: format!("{:?}", state.scope),
        mode: name(state.mode),
        invalidating: state.invalidating.map(name),
        users: counts(state.users),
        waiting: counts(state.wanted),
    }
}

fn mount_state(sim: &Sim, mount: &Mount, life: &crate::backend::Life) -> MountState {
    let (log, fs) = (mount.log(), mount.fs());
    let (open, items) = (log.transaction(), log.stats());
    let member = mount.quorum_status().map(|status| status.member);
    MountState {
        node: life.node(),
        seat: life.seat(),
        rid: format!("{:016x}", mount.rid()),
        paused: life.is_paused(),
        severed: log.is_severed(),
        tasks: life.tasks(),
        quorum: member.map(|member| Member {
            slot: member.slot,
            term: member.term,
            role: format!("{:?}", member.role).to_lowercase(),
            server_term: member.server_start_term,
            server_fenced: member.server_fenced,
            voted_for: member.vote_for,
        }),
        server_term: mount.client().server_term(),
        detached: mount.client().detached_for().map(|t| t.as_nanos() as u64),
        transaction: Transaction {
            seq: open.seq,
            used: open.used,
            holders: open.holders,
            committing: open.committing,
            dirty_blocks: open.dirty_blocks,
            dirty_items: items.dirty_items,
            dirty_data_bytes: fs.dirty_data_bytes(),
            commits: open.commits,
        },
        caches: Caches {
            blocks: mount.blocks().len(),
            items: (items.pages, items.items, items.bytes),
            inodes: fs.inode_counts(),
            kernel: sim.kernel_of(life.node()).map(|kernel| kernel.counts()),
        },
        locks: mount.locks().table().iter().map(lock).collect(),
        open: fs.open_inodes(),
    }
}

/// Calls that have begun and not ended, by node and number.
pub(super) type Calls = Rc<RefCell<BTreeMap<(u32, u64), String>>>;

/// A sink that also notes which calls are under way.
pub(super) fn noting(calls: &Calls, mut sink: Option<Sink>) -> Sink {
    let calls = Rc::clone(calls);
    Box::new(move |event: Event| {
        let number = |text: &str| text.split(' ').next().and_then(|n| n.parse().ok());
        if let Some(number) = event.text.strip_prefix('?').and_then(number) {
            let place = (event.node, number);
            let text = format!("{} {}", event.kind, event.text);
            calls.borrow_mut().insert(place, text);
        } else if let Some(number) = event.text.strip_prefix('!').and_then(number) {
            calls.borrow_mut().remove(&(event.node, number));
        } else if matches!(event.kind, "DEATH" | "SEVER") {
            calls
                .borrow_mut()
                .retain(|(node, _), _| *node != event.node);
        }
        if let Some(sink) = &mut sink {
            sink(event);
        }
    })
}

/// Who looks.
pub(super) struct Looker {
    pub moments: RefCell<Moments>,
    pub calls: Calls,
    pub net: Weak<SimNet>,
    pub disks: Weak<Disks>,
    pub nodes: usize,
}

impl Looker {
    /// Looks whenever it is wanted, from now on.
    pub fn start(self: &Rc<Self>, sim: &Rc<Sim>) {
        for at in self.moments.borrow().at.clone() {
            let own = Rc::clone(self);
            sim.look_at(at, move |sim| own.look(sim, at));
        }
        self.go_on(sim, 0);
    }

    fn go_on(self: &Rc<Self>, sim: &Sim, after: u64) {
        let Some(every) = self.moments.borrow().every else {
            return;
        };
        // The world may have slept longer.
        let at = (after.max(sim.now()) / every + 1) * every;
        let own = Rc::clone(self);
        sim.look_at(at, move |sim| {
            own.look(sim, at);
            own.go_on(sim, at);
        });
    }

    fn look(&self, sim: &Sim, at: u64) {
        let (Some(net), Some(disks)) = (self.net.upgrade(), self.disks.upgrade()) else {
            return;
        };
        let mut mounts = Vec::new();
        sim.each_mount(|mount, life| mounts.push(mount_state(sim, mount, life)));
        mounts.sort_by_key(|mount| (mount.node, mount.seat));
        let calls = self.calls.borrow();
        let (faults, frozen, barred) = disks.troubles(at);
        let (flying, streams, cut) = net.under_way();
        let snapshot = Snapshot {
            nanos: at,
            events: sim.trace.count(),
            digest: format!("{:016x}", sim.trace.hash()),
            polls: sim.polls(),
            nodes: self.nodes,
            mounts,
            calls: calls
                .iter()
                .map(|((node, _), call)| (*node, call.clone()))
                .collect(),
            requests: disks.under_way(),
            faults,
            frozen,
            barred,
            flying,
            streams,
            cut,
        };
        let medium = disks.medium(DeviceRole::Meta);
        (self.moments.borrow_mut().each)(snapshot, medium);
    }
}

fn by_mode(counts: [u32; 3]) -> String {
    let names = ["read", "write", "write only"];
    let some = counts.iter().zip(names).filter(|(count, _)| **count > 0);
    let some: Vec<String> = some
        .map(|(count, name)| format!("{count} {name}"))
        .collect();
    some.join(", ")
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.lock, self.mode)?;
        if let Some(mode) = &self.invalidating {
            write!(f, ", {mode} is being given back")?;
        }
        for (what, counts) in [("used", self.users), ("awaited", self.waiting)] {
            if counts != [0; 3] {
                write!(f, ", {what} by {}", by_mode(counts))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for MountState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "node {}: mount {}, {} tasks",
            self.node, self.rid, self.tasks
        )?;
        if self.seat > 0 {
            write!(f, ", number {}", self.seat)?;
        }
        for (set, what) in [(self.paused, "stands still"), (self.severed, "is cut off")] {
            if set {
                write!(f, ", {what}")?;
            }
        }
        match &self.quorum {
            None => write!(f, "\n  no member of the quorum")?,
            Some(member) => {
                write!(
                    f,
                    "\n  quorum: slot {}, {} in term {}",
                    member.slot, member.role, member.term
                )?;
                if let Some(slot) = member.voted_for {
                    write!(f, ", voted for {slot}")?;
                }
                if member.server_term > 0 {
                    let fenced = if member.server_fenced {
                        ""
                    } else {
                        ", has yet to fence"
                    };
                    write!(f, "; its server has term {}{fenced}", member.server_term)?;
                }
            }
        }
        write!(f, "\n  server: term {}", self.server_term)?;
        if let Some(nanos) = self.detached {
            write!(f, ", without a connection for {} s", seconds(nanos))?;
        }
        let open = &self.transaction;
        let how = match (open.committing, open.used) {
            (true, _) => "is being committed",
            (false, true) => "open",
            (false, false) => "open and unused",
        };
        write!(
            f,
            "\n  transaction {}: {how}, {} holders, {} dirty blocks, {} dirty items, {} dirty bytes \
             of data; {} commits",
            open.seq,
            open.holders,
            open.dirty_blocks,
            open.dirty_items,
            open.dirty_data_bytes,
            open.commits
        )?;
        let caches = &self.caches;
        write!(
            f,
            "\n  caches: {} clean and {} dirty blocks; {} items in {} pages, {} bytes; {} inodes, \
             the kernel knows {}",
            caches.blocks.0,
            caches.blocks.1,
            caches.items.1,
            caches.items.0,
            caches.items.2,
            caches.inodes.0,
            caches.inodes.1
        )?;
        if let Some([names, attrs, pages, looked_up]) = caches.kernel {
            write!(
                f,
                "\n  kernel: {names} names, {attrs} attributes, {pages} pages, {looked_up} inodes \
                 looked up"
            )?;
        }
        for (ino, uses, writers) in &self.open {
            write!(
                f,
                "\n  inode {ino} is open: {uses} uses, {writers} for writing"
            )?;
        }
        for lock in &self.locks {
            write!(f, "\n  lock {lock}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "== {} s: {} events ({}), {} polls",
            seconds(self.nanos),
            self.events,
            self.digest,
            self.polls
        )?;
        for node in 0..self.nodes as u32 {
            let mut own = self
                .mounts
                .iter()
                .filter(|mount| mount.node == node)
                .peekable();
            if own.peek().is_none() {
                write!(f, "\nnode {node}: nothing is mounted")?;
            }
            for mount in own {
                write!(f, "\n{mount}")?;
            }
            for (_, call) in self.calls.iter().filter(|(other, _)| *other == node) {
                write!(f, "\n  no answer yet: {call}")?;
            }
        }
        write!(f, "\ndevices: {} requests under way", self.requests.len())?;
        for request in &self.requests {
            write!(
                f,
                "\n  n{} {} {:?} {:#x}+{:#x} since {} s, {} {} s",
                request.node,
                request.op.event(),
                request.device,
                request.offset,
                request.len,
                seconds(request.asked),
                // Its machine stands still, or has until now.
                if request.ends < self.nanos {
                    "overdue since"
                } else {
                    "ends at"
                },
                seconds(request.ends)
            )?;
        }
        for fault in &self.faults {
            write!(f, "\n  fault: {fault:?}")?;
        }
        for (nodes, what) in [(&self.frozen, "stand still"), (&self.barred, "are barred")] {
            if !nodes.is_empty() {
                write!(f, "\n  nodes {nodes:?} {what}")?;
            }
        }
        write!(
            f,
            "\nnetwork: {} pieces and datagrams under way",
            self.flying.len()
        )?;
        for flying in &self.flying {
            let what = if flying.datagram {
                "datagram"
            } else {
                "stream"
            };
            write!(
                f,
                "\n  {} to {}: {what}, {} bytes, arrives at {} s",
                flying.from,
                flying.to,
                flying.bytes,
                seconds(flying.arrives)
            )?;
        }
        for stream in &self.streams {
            write!(
                f,
                "\n  {} to {}: {} bytes not taken, {} pieces held back",
                stream.from, stream.to, stream.unread, stream.held
            )?;
        }
        for (from, to) in &self.cut {
            write!(f, "\n  cut: {from} to {to}")?;
        }
        Ok(())
    }
}

//! What a server tells about itself to who watches: its clients, locks, commits,
//! merge backlog, and who waits for whom. Made when it is asked for, so it costs
//! nothing otherwise.
//!
//! What can go wrong: nothing that matters. A report is a copy of one moment, and
//! may be of a server that is gone when it is read.

use super::actor::Server;
use super::error::Result;
use super::{Store, items};
use crate::env::probe;
use crate::env::watch;
use crate::format::{Key, LogMergeStatus, LogTrees};
use crate::locks::Mode;
use crate::locks::server::{List, TableEntry};
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;

/// Most waiting lock requests in a report.
const WAITS_MAX: usize = 64;

/// See the head of this file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerReport {
    /// Term it was elected for.
    pub term: u64,
    /// Commits of this server.
    pub commits: u64,
    /// Its last seq.
    pub seq: u64,
    /// Mounted clients by rid.
    pub clients: Vec<ClientReport>,
    /// Mounts that are being fenced, and why.
    pub fencing: Vec<(u64, &'static str)>,
    /// Locks that somebody has, and grants in each mode.
    pub locks: usize,
    /// Grants in each mode, by its number.
    pub granted: [usize; Mode::COUNT],
    /// Requests that wait, in key order; at most 64 of them.
    pub waits: Vec<LockWait>,
    /// How many wait.
    pub waiting: usize,
    /// The merge backlog.
    pub merge: MergeReport,
    /// Free and all 64 KiB blocks of the metadata device.
    pub meta_blocks: (u64, u64),
    /// Free and all 4 KiB blocks of the data device.
    pub data_blocks: (u64, u64),
}

/// One client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientReport {
    /// The mount.
    pub rid: u64,
    /// Where it first came from.
    pub addr: SocketAddrV4,
    /// It has a connection now.
    pub connected: bool,
    /// The server waits for it to come back and tell its locks.
    pub recovering: bool,
}

/// A lock request that is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockWait {
    /// Start key of the lock.
    pub key: Key,
    /// Who waits.
    pub rid: u64,
    /// For which mode.
    pub mode: Mode,
    /// Those that have the lock or were asked to give it up: for whom is waited.
    pub holders: Vec<(u64, Mode)>,
}

/// Log trees and the merge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeReport {
    /// Log trees that mounts work on.
    pub open: usize,
    /// Log trees that are finished and wait to be merged.
    pub finalized: usize,
    /// A merge runs.
    pub running: bool,
}

/// Where a report is asked for and left. Crosses threads.
#[derive(Clone, Debug)]
pub struct ReportBoard {
    asked: Arc<watch::Sender<u64>>,
    report: Arc<watch::Sender<Option<Arc<ServerReport>>>>,
}

impl Default for ReportBoard {
    fn default() -> Self {
        Self {
            asked: Arc::new(watch::Sender::new(0)),
            report: Arc::new(watch::Sender::new(None)),
        }
    }
}

impl ReportBoard {
    /// Asks for a report; it is there in a moment.
    pub fn ask(&self) {
        self.asked.send_modify(|nr| *nr += 1);
    }

    /// The last report; `None` if no server runs here or nobody has asked it.
    pub fn report(&self) -> Option<Arc<ServerReport>> {
        self.report.borrow().clone()
    }

    fn leave(&self, report: Option<ServerReport>) {
        self.report.send_replace(report.map(Arc::new));
    }

    /// No server runs here any more.
    pub(super) fn clear(&self) {
        self.leave(None);
    }
}

impl Server {
    /// Answers whoever asks, until the server stops.
    pub(super) async fn report_when_asked(self: Rc<Self>) {
        let board = self.config.reports.clone();
        let mut asked = board.asked.subscribe();
        while let Some(Ok(())) = self.unless_stopping(asked.changed()).await {
            match self.report().await {
                Ok(report) => board.leave(Some(report)),
                Err(error) => {
                    probe("server.report_failed");
                    tracing::debug!(%error, "no report of the server");
                }
            }
        }
    }

    async fn report(&self) -> Result<ServerReport> {
        let mounted = self.store.mounted().await?;
        let figures = self.store.statfs().await?;
        let merge = self.store.merge_report().await?;
        let peers = self.peers();
        let recovery = self.recovery.borrow();
        let clients = mounted.iter().map(|(rid, client)| ClientReport {
            rid: *rid,
            addr: client
                .addr
                .v4()
                .unwrap_or(SocketAddrV4::new([0; 4].into(), 0)),
            connected: peers.as_ref().is_some_and(|peers| peers.is_connected(*rid)),
            recovering: recovery.awaits(*rid),
        });
        let mut report = ServerReport {
            term: self.config.term,
            commits: self.store.commits(),
            seq: self.store.core_seq(),
            clients: clients.collect(),
            fencing: self.fences.pending_reasons(),
            merge,
            meta_blocks: (
                figures.free_meta_blocks.get(),
                figures.total_meta_blocks.get(),
            ),
            data_blocks: (
                figures.free_data_blocks.get(),
                figures.total_data_blocks.get(),
            ),
            ..ServerReport::default()
        };
        report.count_locks(self.locks.borrow().table());
        Ok(report)
    }
}

impl ServerReport {
    fn count_locks(&mut self, table: impl Iterator<Item = TableEntry>) {
        let mut by_lock: BTreeMap<Key, Vec<TableEntry>> = BTreeMap::new();
        for entry in table {
            by_lock.entry(entry.key).or_default().push(entry);
        }
        for (key, entries) in by_lock {
            let held = entries.iter().filter(|e| e.list != List::Requested);
            let holders: Vec<_> = held.map(|e| (e.rid, e.mode)).collect();
            for entry in &entries {
                match entry.list {
                    List::Granted => self.granted[entry.mode as usize] += 1,
                    List::Invalidated => {}
                    List::Requested => {
                        self.waiting += 1;
                        if self.waits.len() < WAITS_MAX {
                            self.waits.push(LockWait {
                                key,
                                rid: entry.rid,
                                mode: entry.mode,
                                holders: holders.clone(),
                            });
                        }
                    }
                }
            }
            self.locks += usize::from(!holders.is_empty());
        }
    }
}

impl Store {
    async fn merge_report(&self) -> Result<MergeReport> {
        self.retry_stale(async |sup| {
            let logs = items::all_log_trees(&self.cache, &sup.logs_root).await?;
            let finalized = logs.iter().filter(|log| LogTrees::is_finalized(log));
            let finalized = finalized.count();
            let status: Option<LogMergeStatus> =
                items::get(&self.cache, &sup.log_merge, Key::log_merge_status()).await?;
            Ok(MergeReport {
                open: logs.len() - finalized,
                finalized,
                running: status.is_some(),
            })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_whom_is_told() {
        let entry = |key, rid, mode, list| TableEntry {
            key,
            rid,
            mode,
            list,
        };
        let (one, two) = (Key::inode(1), Key::inode(2));
        let table = [
            entry(one, 7, Mode::Read, List::Granted),
            entry(one, 8, Mode::Read, List::Granted),
            entry(two, 9, Mode::Write, List::Requested),
            entry(two, 7, Mode::Null, List::Invalidated),
        ];
        let mut report = ServerReport::default();
        report.count_locks(table.into_iter());
        assert_eq!((report.locks, report.waiting), (2, 1));
        assert_eq!(report.granted[Mode::Read as usize], 2);
        let wait = &report.waits[0];
        assert_eq!((wait.key, wait.rid, wait.mode), (two, 9, Mode::Write));
        assert_eq!(wait.holders, [(7, Mode::Null)]);
    }
}

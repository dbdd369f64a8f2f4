//! The lock server's brain: per lock a list of grants, a FIFO of requests and
//! the clients asked to give up (spec 10 sections 3, 5, 6, 10, 11).
//!
//! What can go wrong: granting while somebody may still write. Two rules guard
//! that: no grant on a lock while any invalidation of it is unanswered, and none
//! at all while a client of an earlier server has not told its locks. An entry
//! goes away only by an answer or by [`LockServer::remove_client`], which the
//! caller runs for a clean farewell or after a fence, never for a lost connection.

use super::{Mode, net_lock};
use crate::env::probe;
use crate::format::{Key, NetLock};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use thiserror::Error;

/// A message to send, in this order per lock and client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Answer to the client's request `id`.
    Grant {
        /// The client.
        rid: u64,
        /// The request's message id.
        id: u64,
        /// The grant.
        lock: NetLock,
    },
    /// A request to the client to give up or lower its lock.
    Invalidate {
        /// The client.
        rid: u64,
        /// The invalidation.
        lock: NetLock,
    },
}

/// A message that no correct client sends: its connection is to be broken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LockProtocolError {
    /// A mode byte above 3.
    #[error("client {rid:016x} sent lock mode {mode} for {key}; modes are 0..3")]
    BadMode {
        /// The client.
        rid: u64,
        /// The lock's start key.
        key: Key,
        /// The byte.
        mode: u8,
    },
    /// Key padding that is not zero, or a key that names no lock.
    #[error("client {rid:016x} named {key}, which is not the start of any lock's range")]
    BadKey {
        /// The client.
        rid: u64,
        /// The key.
        key: Key,
    },
    /// A second request for a lock before the first was answered.
    #[error("client {rid:016x} asked for lock {key} twice")]
    SecondRequest {
        /// The client.
        rid: u64,
        /// The lock's start key.
        key: Key,
    },
    /// An answer to an invalidation nobody sent.
    #[error("client {rid:016x} answered an invalidation of lock {key} that was not sent")]
    NotInvalidated {
        /// The client.
        rid: u64,
        /// The lock's start key.
        key: Key,
    },
    /// An answer that keeps more than the server asked to give up.
    #[error(
        "client {rid:016x} kept mode {kept:?} of lock {key} where {asked:?} was the most allowed"
    )]
    KeptTooMuch {
        /// The client.
        rid: u64,
        /// The lock's start key.
        key: Key,
        /// What it says it kept.
        kept: Mode,
        /// What it was asked for.
        asked: Mode,
    },
    /// A lock reported twice in recovery.
    #[error("client {rid:016x} reported lock {key} twice in recovery")]
    RecoveredTwice {
        /// The client.
        rid: u64,
        /// The lock's start key.
        key: Key,
    },
    /// Recovery entries out of ascending order.
    #[error("client {rid:016x} reported lock {key} out of order in recovery")]
    RecoveredOutOfOrder {
        /// The client.
        rid: u64,
        /// The lock's start key.
        key: Key,
    },
    /// A recovery answer from a client that owes none.
    #[error("client {rid:016x} sent lock recovery that is not pending")]
    NotRecovering {
        /// The client.
        rid: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    rid: u64,
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Revoked {
    rid: u64,
    asked: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    rid: u64,
    id: u64,
    mode: Mode,
}

#[derive(Clone, Debug, Default)]
struct Lock {
    granted: Vec<Entry>,
    requested: VecDeque<Request>,
    invalidated: Vec<Revoked>,
}

impl Lock {
    fn is_empty(&self) -> bool {
        self.granted.is_empty() && self.requested.is_empty() && self.invalidated.is_empty()
    }
}

/// The lock table of one server instance.
#[derive(Clone, Debug, Default)]
pub struct LockServer {
    locks: BTreeMap<Key, Lock>,
    recovering: BTreeMap<u64, Option<Key>>,
}

/// One line of the table, for people and checkers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// The lock's start key.
    pub key: Key,
    /// The client.
    pub rid: u64,
    /// Mode granted, requested, or asked to keep.
    pub mode: Mode,
    /// Which list it stands in.
    pub list: List,
}

/// The three lists of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// What a client may have.
    Granted,
    /// Waiting for an answer from us.
    Requested,
    /// Asked to give up.
    Invalidated,
}

/// Whether an existing grant stands in the way of a request, and what it must
/// be lowered to (the two tables of spec 10 section 3).
fn conflict(granted: Entry, request: Request) -> Option<Mode> {
    use Mode::{Null, Read, Write, WriteOnly};
    let compatible = if granted.rid == request.rid {
        matches!(
            (granted.mode, request.mode),
            (Read, Read | Write) | (WriteOnly, WriteOnly)
        )
    } else {
        matches!(
            (granted.mode, request.mode),
            (_, Null) | (Null, _) | (Read, Read) | (WriteOnly, WriteOnly)
        )
    };
    let target = if granted.mode == Write && request.mode == Read {
        Read
    } else {
        Null
    };
    (!compatible).then_some(target)
}

impl LockServer {
    /// An empty table that grants nothing until each of `rids` has told its
    /// locks or was removed.
    pub fn recovering(rids: impl IntoIterator<Item = u64>) -> Self {
        Self {
            locks: BTreeMap::new(),
            recovering: rids.into_iter().map(|rid| (rid, None)).collect(),
        }
    }

    /// A client's request. `next_seq` draws the next core seq.
    ///
    /// # Errors
    /// If no correct client sends this; break its connection.
    pub fn request(
        &mut self,
        rid: u64,
        id: u64,
        msg: &NetLock,
        next_seq: &mut dyn FnMut() -> u64,
        out: &mut Vec<Action>,
    ) -> Result<(), LockProtocolError> {
        let (key, mode) = checked(rid, msg)?;
        let lock = self.locks.entry(key).or_default();
        if lock.requested.iter().any(|r| r.rid == rid) {
            return Err(LockProtocolError::SecondRequest { rid, key });
        }
        lock.requested.push_back(Request { rid, id, mode });
        self.process(&key, next_seq, out);
        Ok(())
    }

    /// A client's answer to an invalidation. It may keep less than asked, never more.
    ///
    /// # Errors
    /// If no correct client sends this; break its connection.
    pub fn response(
        &mut self,
        rid: u64,
        msg: &NetLock,
        next_seq: &mut dyn FnMut() -> u64,
        out: &mut Vec<Action>,
    ) -> Result<(), LockProtocolError> {
        let (key, kept) = checked(rid, msg)?;
        let lock = self
            .locks
            .get_mut(&key)
            .ok_or(LockProtocolError::NotInvalidated { rid, key })?;
        let at = lock
            .invalidated
            .iter()
            .position(|e| e.rid == rid)
            .ok_or(LockProtocolError::NotInvalidated { rid, key })?;
        let asked = lock.invalidated[at].asked;
        if kept != Mode::Null && kept != asked {
            return Err(LockProtocolError::KeptTooMuch {
                rid,
                key,
                kept,
                asked,
            });
        }
        lock.invalidated.remove(at);
        if kept != Mode::Null {
            lock.granted.push(Entry { rid, mode: kept });
        }
        self.process(&key, next_seq, out);
        Ok(())
    }

    /// The key from which to ask `rid` for its next locks: zeros at first.
    /// `None` if it owes no recovery.
    pub fn recovery_cursor(&self, rid: u64) -> Option<Key> {
        self.recovering
            .get(&rid)
            .map(|last| last.map_or(Key::ZEROS, |key| key.inc()))
    }

    /// A batch of locks a client holds from an earlier server, in ascending
    /// order. Returns the greatest write seq among them, to raise the core seq
    /// by, and whether the batch was empty: then the client has told all, and
    /// the caller runs [`LockServer::recovered`].
    ///
    /// # Errors
    /// If no correct client sends this; nothing of the batch was taken.
    pub fn recover(
        &mut self,
        rid: u64,
        batch: &[NetLock],
    ) -> Result<(u64, bool), LockProtocolError> {
        let mut last = *self
            .recovering
            .get(&rid)
            .ok_or(LockProtocolError::NotRecovering { rid })?;
        let mut entries = Vec::with_capacity(batch.len());
        let mut greatest = 0;
        for msg in batch {
            let (key, mode) = checked(rid, msg)?;
            if last.is_some_and(|last| last >= key) {
                return Err(LockProtocolError::RecoveredOutOfOrder { rid, key });
            }
            let held = self.locks.get(&key);
            if held.is_some_and(|lock| lock.granted.iter().any(|e| e.rid == rid)) {
                return Err(LockProtocolError::RecoveredTwice { rid, key });
            }
            last = Some(key);
            greatest = greatest.max(msg.write_seq.get());
            entries.push((key, mode));
        }
        for (key, mode) in entries {
            let lock = self.locks.entry(key).or_default();
            lock.granted.push(Entry { rid, mode });
        }
        self.recovering.insert(rid, last);
        Ok((greatest, batch.is_empty()))
    }

    /// Marks a client's recovery finished; when it was the last, every lock with
    /// waiting requests is looked at again.
    pub fn recovered(
        &mut self,
        rid: u64,
        next_seq: &mut dyn FnMut() -> u64,
        out: &mut Vec<Action>,
    ) {
        if self.recovering.remove(&rid).is_some() {
            self.process_all_if_recovered(next_seq, out);
        }
    }

    /// Whether any client still owes recovery.
    pub fn is_recovering(&self) -> bool {
        !self.recovering.is_empty()
    }

    /// Forgets a client that left cleanly, or was fenced. Idempotent. A pending
    /// recovery of it stays pending until [`LockServer::recovered`], which the
    /// caller runs when its reclaim is complete.
    pub fn remove_client(
        &mut self,
        rid: u64,
        next_seq: &mut dyn FnMut() -> u64,
        out: &mut Vec<Action>,
    ) {
        let mut touched = Vec::new();
        for (key, lock) in &mut self.locks {
            let before = lock.granted.len() + lock.requested.len() + lock.invalidated.len();
            lock.granted.retain(|e| e.rid != rid);
            lock.requested.retain(|r| r.rid != rid);
            lock.invalidated.retain(|e| e.rid != rid);
            if before != lock.granted.len() + lock.requested.len() + lock.invalidated.len() {
                touched.push(*key);
            }
        }
        for key in touched {
            self.process(&key, next_seq, out);
        }
    }

    /// The whole table in key order.
    pub fn table(&self) -> impl Iterator<Item = TableEntry> + '_ {
        self.locks.iter().flat_map(|(&key, lock)| {
            let granted = lock.granted.iter().map(|e| (e.rid, e.mode, List::Granted));
            let requested = lock
                .requested
                .iter()
                .map(|r| (r.rid, r.mode, List::Requested));
            let revoked = lock
                .invalidated
                .iter()
                .map(|e| (e.rid, e.asked, List::Invalidated));
            granted
                .chain(requested)
                .chain(revoked)
                .map(move |(rid, mode, list)| TableEntry {
                    key,
                    rid,
                    mode,
                    list,
                })
        })
    }

    /// Clients named anywhere in the table (spec 10 section 15, invariant 9).
    pub fn clients(&self) -> BTreeSet<u64> {
        self.table().map(|e| e.rid).collect()
    }

    fn process_all_if_recovered(
        &mut self,
        next_seq: &mut dyn FnMut() -> u64,
        out: &mut Vec<Action>,
    ) {
        if self.is_recovering() {
            return;
        }
        probe("lock_server.recovered");
        let waiting: Vec<Key> = self
            .locks
            .iter()
            .filter(|(_, lock)| !lock.requested.is_empty())
            .map(|(key, _)| *key)
            .collect();
        for key in waiting {
            self.process(&key, next_seq, out);
        }
    }

    /// Grants from the head of the FIFO as far as it goes, or sends the
    /// invalidations the head needs.
    fn process(&mut self, key: &Key, next_seq: &mut dyn FnMut() -> u64, out: &mut Vec<Action>) {
        let recovering = self.is_recovering();
        let Some(lock) = self.locks.get_mut(key) else {
            return;
        };
        while lock.invalidated.is_empty() && !recovering {
            let Some(&request) = lock.requested.front() else {
                break;
            };
            revoke_conflicting(key, lock, request, out);
            if lock.invalidated.is_empty() {
                lock.requested.pop_front();
                grant(key, lock, request, next_seq, out);
            }
        }
        if lock.is_empty() {
            self.locks.remove(key);
        }
    }
}

fn revoke_conflicting(key: &Key, lock: &mut Lock, request: Request, out: &mut Vec<Action>) {
    let mut kept = Vec::with_capacity(lock.granted.len());
    for &entry in &lock.granted {
        match conflict(entry, request) {
            None => kept.push(entry),
            Some(asked) => {
                lock.invalidated.push(Revoked {
                    rid: entry.rid,
                    asked,
                });
                out.push(Action::Invalidate {
                    rid: entry.rid,
                    lock: net_lock(key, 0, entry.mode, asked),
                });
            }
        }
    }
    lock.granted = kept;
}

fn grant(
    key: &Key,
    lock: &mut Lock,
    request: Request,
    next_seq: &mut dyn FnMut() -> u64,
    out: &mut Vec<Action>,
) {
    let Request { rid, id, mode } = request;
    let old = lock
        .granted
        .iter()
        .position(|e| e.rid == rid)
        .map_or(Mode::Null, |at| lock.granted.remove(at).mode);
    let write_seq = if mode.writes() { next_seq() } else { 0 };
    out.push(Action::Grant {
        rid,
        id,
        lock: net_lock(key, write_seq, old, mode),
    });
    if mode != Mode::Null {
        lock.granted.push(Entry { rid, mode });
    }
}

/// The message's key and new mode, if both are sane.
fn checked(rid: u64, msg: &NetLock) -> Result<(Key, Mode), LockProtocolError> {
    let key = Key::from(msg.key);
    let mode = Mode::from_wire(msg.new_mode).ok_or(LockProtocolError::BadMode {
        rid,
        key,
        mode: msg.new_mode,
    })?;
    if super::Scope::from_start(&key).is_none() {
        return Err(LockProtocolError::BadKey { rid, key });
    }
    Ok((key, mode))
}

//! The open inode map: an inode without links may be deleted only when no mount
//! has it open. Each mount keeps a bit per inode in groups of 1024; who wants to
//! delete holds the group's WRITE lock and asks the server for everybody else's
//! bits (spec 11).
//!
//! What can go wrong: an answer that misses a client, and an inode deleted under
//! its open file. So a client is on the list before its greeting recovery ends,
//! and leaves a pending request only by its answer or by its reclaim.

use crate::env::{HashMap, probe};
use crate::format::{OpenInoMap, OpenInoMapArgs};
use std::collections::{BTreeMap, BTreeSet};

/// Words in a group's map: 1024 bits.
pub const WORDS: usize = 16;

/// Group of an inode number and its bit in the group.
pub const fn group_and_bit(ino: u64) -> (u64, usize) {
    (ino >> 10, (ino & 1023) as usize)
}

/// Whether bit `bit` is set.
pub fn has_bit(map: &OpenInoMap, bit: usize) -> bool {
    map.bits[bit / 64].get() >> (bit % 64) & 1 != 0
}

/// This mount's open inodes, counted.
#[derive(Debug, Default)]
pub struct LocalMap {
    groups: HashMap<u64, Group>,
    counts: HashMap<u64, u32>,
}

#[derive(Debug, Default)]
struct Group {
    bits: [u64; WORDS],
}

impl LocalMap {
    /// One more reference to an inode. Call under a lock of its group that can read.
    pub fn get(&mut self, ino: u64) {
        let count = self.counts.entry(ino).or_insert(0);
        *count += 1;
        if *count == 1 {
            let (group, bit) = group_and_bit(ino);
            self.groups.entry(group).or_default().bits[bit / 64] |= 1 << (bit % 64);
        }
    }

    /// One reference less; true if it was the last: the bit is clear now and an
    /// inode without links is to be deleted.
    ///
    /// # Panics
    /// If there was none.
    pub fn put(&mut self, ino: u64) -> bool {
        let count = self.counts.get_mut(&ino).expect("a put matches a get");
        *count -= 1;
        if *count > 0 {
            return false;
        }
        self.counts.remove(&ino);
        let (group, bit) = group_and_bit(ino);
        let words = self
            .groups
            .get_mut(&group)
            .expect("an open inode's group exists");
        words.bits[bit / 64] &= !(1 << (bit % 64));
        if words.bits == [0; WORDS] {
            self.groups.remove(&group);
        }
        true
    }

    /// Whether the inode is open here.
    pub fn is_open(&self, ino: u64) -> bool {
        self.counts.contains_key(&ino)
    }

    /// The answer to the server's question: the group's bits, arguments echoed.
    pub fn answer(&self, args: &OpenInoMapArgs) -> OpenInoMap {
        let bits = self
            .groups
            .get(&args.group_nr.get())
            .map_or([0; WORDS], |g| g.bits);
        OpenInoMap {
            args: *args,
            bits: bits.map(Into::into),
        }
    }
}

/// What the server is to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask a client for its bits.
    Ask {
        /// The client.
        rid: u64,
        /// The question.
        args: OpenInoMapArgs,
    },
    /// Answer the requester's message `id`.
    Answer {
        /// The requester.
        rid: u64,
        /// Its message id.
        id: u64,
        /// Everybody else's bits.
        map: OpenInoMap,
    },
}

#[derive(Clone, Debug)]
struct Pending {
    rid: u64,
    id: u64,
    group_nr: u64,
    waiting_for: BTreeSet<u64>,
    bits: [u64; WORDS],
}

impl Pending {
    fn answer(&self, req_id: u64) -> Action {
        let args = OpenInoMapArgs {
            group_nr: self.group_nr.into(),
            req_id: req_id.into(),
        };
        let map = OpenInoMap {
            args,
            bits: self.bits.map(Into::into),
        };
        Action::Answer {
            rid: self.rid,
            id: self.id,
            map,
        }
    }
}

/// The server's brain.
#[derive(Clone, Debug, Default)]
pub struct OmapServer {
    clients: BTreeSet<u64>,
    pending: BTreeMap<u64, Pending>,
    queued: Vec<(u64, u64, u64)>,
    recovering: bool,
    last_req: u64,
}

impl OmapServer {
    /// No clients. With `recovering` requests are kept until [`OmapServer::recovered`].
    pub fn new(recovering: bool) -> Self {
        Self {
            recovering,
            ..Self::default()
        }
    }

    /// Adds a client; before its greeting recovery is marked finished.
    pub fn add_client(&mut self, rid: u64) {
        self.clients.insert(rid);
    }

    /// All clients of the earlier server have greeted or were reclaimed.
    pub fn recovered(&mut self, out: &mut Vec<Action>) {
        self.recovering = false;
        for (rid, id, group_nr) in std::mem::take(&mut self.queued) {
            probe("omap.queued_in_recovery");
            self.start(rid, id, group_nr, out);
        }
    }

    /// A client asks for everybody else's bits of a group.
    pub fn request(&mut self, rid: u64, id: u64, args: &OpenInoMapArgs, out: &mut Vec<Action>) {
        if self.recovering {
            self.queued.push((rid, id, args.group_nr.get()));
        } else {
            self.start(rid, id, args.group_nr.get(), out);
        }
    }

    /// A client's bits. Unknown or repeated answers are dropped.
    pub fn response(&mut self, rid: u64, map: &OpenInoMap, out: &mut Vec<Action>) {
        let req_id = map.args.req_id.get();
        let Some(pending) = self.pending.get_mut(&req_id) else {
            return;
        };
        if pending.waiting_for.remove(&rid) {
            for (word, more) in pending.bits.iter_mut().zip(&map.bits) {
                *word |= more.get();
            }
            self.finish_if_complete(req_id, out);
        }
    }

    /// A client has a new session: what its old one was asked, or what could not be
    /// sent while it had none, is asked again.
    pub fn ask_again(&self, rid: u64, out: &mut Vec<Action>) {
        for (&req_id, pending) in &self.pending {
            if pending.waiting_for.contains(&rid) {
                probe("omap.asked_again");
                let args = OpenInoMapArgs {
                    group_nr: pending.group_nr.into(),
                    req_id: req_id.into(),
                };
                out.push(Action::Ask { rid, args });
            }
        }
    }

    /// A client left, or was fenced and reclaimed: its caches are gone and its
    /// bits no longer count.
    pub fn remove_client(&mut self, rid: u64, out: &mut Vec<Action>) {
        self.clients.remove(&rid);
        self.queued.retain(|&(who, ..)| who != rid);
        self.pending.retain(|_, pending| pending.rid != rid);
        let asked: Vec<u64> = self
            .pending
            .iter_mut()
            .filter_map(|(&req_id, pending)| pending.waiting_for.remove(&rid).then_some(req_id))
            .collect();
        for req_id in asked {
            probe("omap.answered_by_reclaim");
            self.finish_if_complete(req_id, out);
        }
    }

    fn start(&mut self, rid: u64, id: u64, group_nr: u64, out: &mut Vec<Action>) {
        self.last_req += 1;
        let req_id = self.last_req;
        let mut waiting_for = self.clients.clone();
        waiting_for.remove(&rid);
        let args = OpenInoMapArgs {
            group_nr: group_nr.into(),
            req_id: req_id.into(),
        };
        out.extend(waiting_for.iter().map(|&rid| Action::Ask { rid, args }));
        let pending = Pending {
            rid,
            id,
            group_nr,
            waiting_for,
            bits: [0; WORDS],
        };
        self.pending.insert(req_id, pending);
        self.finish_if_complete(req_id, out);
    }

    fn finish_if_complete(&mut self, req_id: u64, out: &mut Vec<Action>) {
        if self
            .pending
            .get(&req_id)
            .is_some_and(|p| p.waiting_for.is_empty())
        {
            let pending = self.pending.remove(&req_id).expect("just seen");
            out.push(pending.answer(req_id));
        }
    }
}

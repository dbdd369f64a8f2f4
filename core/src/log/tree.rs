//! Putting dirty items in the mount's log tree, exactly once (spec 04 section 4.1
//! and step 2 of section 6).
//!
//! What can go wrong: a failure in the middle of a list. Delta items are added to
//! what the tree has, so nothing may be put in twice: the list and how much of it
//! is done live here, not in the attempt, and the next attempt goes on there.

use super::{Inner, LogError, bloom};
use crate::block::Tx;
use crate::btree::{self, ListItem};
use crate::env::{mutant, probe};
use crate::format::{BlockRef, BtreeRoot, LogTrees};
use crate::locks::Scope;
use std::collections::BTreeSet;

/// The writable side of the open log tree.
#[derive(Debug)]
pub(super) struct Tree {
    pub item_root: BtreeRoot,
    pub bloom_ref: BlockRef,
    pub max_item_seq: u64,
    /// Items on their way into the tree; the first `done` are in it.
    list: Vec<ListItem>,
    done: usize,
    /// Locks that cover the items put in by this transaction.
    scopes: BTreeSet<Scope>,
    /// For a planted bug only: everything put in so far.
    applied: Vec<ListItem>,
}

/// Locks whose bits the bloom block of log tree `nr` is known to have.
#[derive(Debug, Default)]
pub(super) struct Bloomed {
    nr: u64,
    scopes: BTreeSet<Scope>,
}

impl Bloomed {
    /// Forgets everything if `record` is another tree, or has no bloom block.
    pub fn follow(&mut self, record: &LogTrees) {
        if self.nr != record.nr.get() || record.bloom_ref.is_null() {
            self.nr = record.nr.get();
            self.scopes.clear();
        }
    }
}

impl Tree {
    pub fn new(record: &LogTrees) -> Self {
        Self {
            item_root: record.item_root,
            bloom_ref: record.bloom_ref,
            max_item_seq: record.max_item_seq.get(),
            list: Vec::new(),
            done: 0,
            scopes: BTreeSet::new(),
            applied: Vec::new(),
        }
    }

    /// Starts a new list; the last one is in the tree.
    fn start(&mut self, list: Vec<ListItem>) {
        assert!(self.list.is_empty(), "a list is replaced before it is done");
        for item in &list {
            let scope = Scope::covering(&item.key);
            self.scopes
                .insert(scope.expect("cached items are covered by locks"));
        }
        self.list = list;
    }

    /// Puts the rest of the list in the tree.
    async fn insert_rest(&mut self, tx: &Tx) -> Result<(), LogError> {
        if self.list.is_empty() {
            return Ok(());
        }
        if self.done > 0 {
            probe("log.insert_resumed");
        }
        let Self {
            item_root,
            list,
            done,
            ..
        } = self;
        btree::insert_list(tx, item_root, list, done).await?;
        assert_eq!(
            *done,
            list.len(),
            "a list that is done was not put in whole"
        );
        let seqs = list.iter().map(|item| item.seq);
        self.max_item_seq = seqs.fold(self.max_item_seq, u64::max);
        if mutant("commit_retries_deltas") {
            self.applied.append(&mut self.list.clone());
        }
        self.list.clear();
        self.done = 0;
        Ok(())
    }

    /// A commit is tried again.
    pub fn note_retry(&mut self) {
        // Mutant: breaks spec 04 section 6, "step 2 is applied exactly once"
        // (18, H1): deltas are added a second time.
        if mutant("commit_retries_deltas") && self.list.is_empty() {
            self.list = std::mem::take(&mut self.applied);
            self.list.sort_by_key(|item| item.key);
            self.list.dedup_by_key(|item| item.key);
        }
    }

    /// Sets the bloom bits of every lock with items in the tree (section 4.2).
    pub async fn set_bloom(
        &mut self,
        tx: &Tx,
        bloomed: &std::cell::RefCell<Bloomed>,
    ) -> Result<(), LogError> {
        let new: Vec<Scope> = {
            let bloomed = bloomed.borrow();
            self.scopes.difference(&bloomed.scopes).copied().collect()
        };
        if new.is_empty() {
            return Ok(());
        }
        assert!(!self.item_root.is_empty(), "bloom bits for an empty tree");
        bloom::set(tx, &mut self.bloom_ref, &new).await?;
        bloomed.borrow_mut().scopes.extend(new);
        Ok(())
    }
}

impl Inner {
    /// Puts every pending item in the open log tree. Operations may go on
    /// meanwhile; what they change later is pending again.
    ///
    /// # Errors
    /// Any; the next call goes on where this one stopped.
    pub(super) async fn insert_pending(&self, open: &super::Open) -> Result<(), LogError> {
        let mut tree = open.tree.lock().await;
        loop {
            tree.insert_rest(&open.tx).await?;
            let list = self.cache.borrow_mut().take_pending();
            if list.is_empty() {
                return Ok(());
            }
            tree.start(list);
        }
    }
}

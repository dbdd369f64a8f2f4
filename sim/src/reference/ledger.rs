//! The inode indexes of the reference: at which seq each durable inode was last seen
//! to have changed. A seq is given out for each look that finds changes.

use super::Reference;
use crate::model::{Inode, Model};
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Archive, IndexEntry, Ino, InodeIndex, StatMore};
use std::collections::BTreeMap;
use std::rc::Rc;

/// The seqs of all inodes.
#[derive(Default)]
pub(super) struct Ledger {
    seq: u64,
    inodes: BTreeMap<Ino, (Rc<Inode>, u64)>,
}

impl Ledger {
    /// Notes what has changed.
    fn look(&mut self, durable: &Model) {
        let next = self.seq + 1;
        self.inodes
            .retain(|ino, _| durable.inodes.contains_key(ino));
        for (ino, inode) in &durable.inodes {
            match self.inodes.get(ino) {
                Some((known, _)) if Rc::ptr_eq(known, inode) => {}
                _ => {
                    self.inodes.insert(*ino, (Rc::clone(inode), next));
                    self.seq = next;
                }
            }
        }
    }

    fn entries(&self, index: InodeIndex) -> Vec<IndexEntry> {
        let listed = |inode: &Inode| index == InodeIndex::MetaSeq || inode.is_file();
        let all = self.inodes.iter().filter(|(_, (inode, _))| listed(inode));
        let mut all: Vec<IndexEntry> = all
            .map(|(ino, (_, seq))| IndexEntry {
                major: *seq,
                ino: *ino,
            })
            .collect();
        all.sort_unstable();
        all
    }
}

impl Reference {
    fn look(&self) -> std::cell::RefMut<'_, Ledger> {
        let mut ledger = self.volume.ledger.borrow_mut();
        match &self.volume.cluster {
            Some(shared) => shared.with_durable(|durable| ledger.look(durable)),
            None => ledger.look(&self.volume.durable.borrow()),
        }
        ledger
    }

    /// Others may be scheduled before and after an answer.
    async fn pause(&self) {
        if self.rng.chance(400) {
            self.host.sim.sleep(self.rng.below(100_000)).await;
        }
    }
}

impl Archive for Reference {
    async fn walk_inodes(
        &self,
        index: InodeIndex,
        first: IndexEntry,
        last: IndexEntry,
        max: usize,
    ) -> Result<Vec<IndexEntry>, Errno> {
        self.pause().await;
        let mut found = self.look().entries(index);
        found.retain(|entry| (first..=last).contains(entry));
        found.truncate(max);
        if self.flawed("walk_skips") && found.len() > 1 && self.rng.chance(200) {
            found.remove(0);
        }
        self.pause().await;
        Ok(found)
    }

    async fn committed_seq(&self) -> Result<u64, Errno> {
        self.pause().await;
        let seq = self.look().seq;
        let behind = self.flawed("committed_seq_falls") && self.rng.chance(200);
        Ok(if behind { seq.saturating_sub(3) } else { seq })
    }

    async fn stat_more(&self, ino: Ino) -> Result<StatMore, Errno> {
        let ledger = self.look();
        let (_, seq) = ledger.inodes.get(&ino).ok_or(Errno::ESTALE)?;
        Ok(StatMore {
            meta_seq: *seq,
            data_seq: *seq,
            ..StatMore::default()
        })
    }
}

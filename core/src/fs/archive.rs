//! What archive agents ask for: which inodes have changed since they last looked
//! (spec 15 sections 3 and 7).
//!
//! Every change moves its inode to the seq of the transaction it is part of, in the
//! index items of `Change`. A walk shows what is stable, in order, and remembers
//! nothing: who asks goes on after the last entry shown.
//!
//! What can go wrong: an entry that appears before one already shown is never seen by
//! who goes on from there. So a walk ends at the seq below which no transaction of any
//! mount is open; and it reads each range under its lock, for which others, and this
//! mount as well, must have committed what they changed there.

use super::Fs;
use super::api::{Archive, IndexEntry, Ino, InodeIndex, StatMore};
use super::error::FsResult;
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::Key;
use crate::locks::{Mode, Scope};

impl InodeIndex {
    fn key(self, at: IndexEntry) -> Key {
        match self {
            Self::MetaSeq => Key::meta_seq(at.major, at.ino),
            Self::DataSeq => Key::data_seq(at.major, at.ino),
        }
    }

    fn scope(self, at: IndexEntry) -> Scope {
        match self {
            Self::MetaSeq => Scope::MetaSeq(at.major),
            Self::DataSeq => Scope::DataSeq(at.major),
        }
        .normal()
    }
}

/// The entry that an index item is.
fn entry(key: &Key) -> IndexEntry {
    IndexEntry {
        major: key.second,
        ino: key.third,
    }
}

impl Fs {
    /// Collects entries until there are `max` or no more.
    async fn walk(
        &self,
        index: InodeIndex,
        first: IndexEntry,
        mut last: IndexEntry,
        max: usize,
        found: &mut Vec<IndexEntry>,
    ) -> FsResult<()> {
        let stable = self.log.get_last_seq().await?;
        // Mutant: breaks spec 15 section 3, step 2.
        if last.major > stable && !mutant("walk_beyond_last_seq") {
            probe("fs.walk_ends_at_last_seq");
            last = IndexEntry {
                major: stable,
                ..IndexEntry::LAST
            };
        }
        let mut at = first;
        while at <= last && found.len() < max {
            if !self.walk_range(index, at, last, max, found).await? {
                return Ok(());
            }
            let behind = index.scope(at).range().end.inc();
            probe("fs.walk_next_range");
            // Mutant: breaks spec 15 section 3, step 3.
            if mutant("walk_ends_with_range") {
                return Ok(());
            }
            match self.log.next_hint(&behind).await? {
                Some(key) if key <= index.key(last) => at = entry(&key),
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Collects the entries of one lock's range; whether there may be more behind it.
    async fn walk_range(
        &self,
        index: InodeIndex,
        mut at: IndexEntry,
        last: IndexEntry,
        max: usize,
        found: &mut Vec<IndexEntry>,
    ) -> FsResult<bool> {
        let guard = self.locks.lock_first(index.scope(at), Mode::Read).await?;
        let end = index.key(last);
        while found.len() < max {
            let next = self.log.next(&guard, &index.key(at), &end).await?;
            let Some((key, _)) = next else {
                return Ok(true);
            };
            found.push(entry(&key));
            match entry(&key).next() {
                Some(next) if next <= last && guard.covers(&index.key(next)) => at = next,
                Some(next) => return Ok(next <= last),
                None => return Ok(false),
            }
        }
        Ok(false)
    }
}

impl Archive for Fs {
    async fn walk_inodes(
        &self,
        index: InodeIndex,
        first: IndexEntry,
        last: IndexEntry,
        max: usize,
    ) -> Result<Vec<IndexEntry>, Errno> {
        let mut found = Vec::new();
        if max == 0 || first > last {
            return Ok(found);
        }
        match self.walk(index, first, last, max, &mut found).await {
            Err(error) if found.is_empty() => Err(error.into()),
            _ => Ok(found),
        }
    }

    async fn committed_seq(&self) -> Result<u64, Errno> {
        let seq: FsResult<u64> = self.log.get_last_seq().await.map_err(Into::into);
        Ok(seq?)
    }

    async fn stat_more(&self, ino: Ino) -> Result<StatMore, Errno> {
        let stat = async || -> FsResult<StatMore> {
            let locked = self.lock_inodes(&[ino], Mode::Read).await?;
            let inode = self.load(&locked, ino).await?;
            Ok(StatMore {
                meta_seq: inode.meta_seq,
                data_seq: inode.data_seq,
                data_version: inode.data_version,
                online_blocks: inode.online_blocks,
                offline_blocks: inode.offline_blocks,
                crtime: inode.crtime,
            })
        };
        Ok(stat().await?)
    }
}

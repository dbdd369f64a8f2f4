//! Reading directories (spec 12 section 17).
//!
//! An offset is the position to continue from. Positions are never reused and
//! never move, so no entry is returned twice or missed, whatever happens between
//! two reads.
//!
//! What can go wrong: working for the caller with the lock held. Entries are read
//! in batches under the lock and handed out after it was released.

use super::Fs;
use super::api::{DirEntry, Entry, Ino};
use super::error::FsResult;
use super::names::Found;
use crate::env::{Duration, probe};
use crate::errno::Errno;
use crate::format::{self, DIRENT_FIRST_POS, DIRENT_LAST_POS, Key};
use crate::locks::{LockGuard, Mode, Scope};
use bytes::Bytes;

/// `d_type` of a stored entry type.
pub const fn dtype(kind: u8) -> u8 {
    match kind {
        format::DT_FIFO => 1,
        format::DT_CHR => 2,
        format::DT_DIR => 4,
        format::DT_BLK => 6,
        format::DT_REG => 8,
        format::DT_LNK => 10,
        format::DT_SOCK => 12,
        format::DT_WHT => 14,
        _ => 0,
    }
}

/// Entries of one batch, and whether the directory ends after them.
struct Batch {
    entries: Vec<(Found, Option<super::Inode>)>,
    /// Position of the entry after the last one.
    next: Option<u64>,
    /// `revocations` from before the directory was read.
    before: u64,
}

impl Fs {
    /// READDIR and READDIRPLUS: entries from `offset` on until `sink` is full.
    ///
    /// # Errors
    /// ENOTDIR, ESTALE; EIO for a malformed entry, if none came before it.
    pub(super) async fn do_readdir(
        &self,
        ino: Ino,
        offset: u64,
        plus: bool,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> FsResult<()> {
        let mut pos = offset.max(DIRENT_FIRST_POS);
        let mut first = true;
        loop {
            let parent = if first && offset < 2 {
                Some(self.parent_or_self(ino).await?)
            } else {
                None
            };
            let batch = self.read_batch(ino, pos, plus).await;
            if first && !self.emit_dots(ino, offset, parent, sink) {
                return Ok(());
            }
            let batch = match batch {
                Ok(batch) => batch,
                Err((seen, error)) => {
                    // The entries before the malformed one are delivered.
                    let any = !seen.entries.is_empty();
                    self.emit(&seen, sink);
                    return if any { Ok(()) } else { Err(error) };
                }
            };
            first = false;
            if !self.emit(&batch, sink) {
                return Ok(());
            }
            match batch.next {
                Some(next) => pos = next,
                None => return Ok(()),
            }
            probe("fs.readdir_next_batch");
        }
    }

    /// The number shown for `..`; of a removed directory its own.
    async fn parent_or_self(&self, ino: Ino) -> FsResult<Ino> {
        match self.parent_of(ino).await {
            Err(error) if error.is(Errno::ENOENT) => Ok(ino),
            other => other,
        }
    }

    fn emit_dots(
        &self,
        ino: Ino,
        offset: u64,
        parent: Option<Ino>,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> bool {
        let mut dot = |ino, next, name: &'static [u8]| {
            let name = Bytes::from_static(name);
            sink(DirEntry {
                ino,
                next,
                dtype: dtype(format::DT_DIR),
                name,
                entry: None,
            })
        };
        if offset == 0 && !dot(ino, 1, b".") {
            return false;
        }
        match parent {
            Some(parent) => dot(parent, DIRENT_FIRST_POS, b".."),
            None => true,
        }
    }

    fn emit(&self, batch: &Batch, sink: &mut dyn FnMut(DirEntry) -> bool) -> bool {
        let positions = batch
            .entries
            .iter()
            .skip(1)
            .map(|(found, _)| Some(found.pos));
        for ((found, inode), next) in batch.entries.iter().zip(positions.chain([batch.next])) {
            let entry = inode.as_ref().map(|inode| Entry {
                attr: inode.attr(),
                entry_valid: self.valid_since(batch.before),
                attr_valid: match self.valid_since(batch.before) {
                    Duration::ZERO => Duration::ZERO,
                    _ => self.entry_attr_valid(inode.ino),
                },
            });
            let taken = sink(DirEntry {
                ino: found.ino,
                next: next.unwrap_or(found.pos + 1),
                dtype: dtype(found.kind),
                name: found.name(),
                entry,
            });
            if !taken {
                return false;
            }
            if let Some(inode) = inode {
                self.table.learn(inode.ino, inode.is_dir());
            }
        }
        true
    }

    async fn read_batch(
        &self,
        ino: Ino,
        pos: u64,
        plus: bool,
    ) -> Result<Batch, (Batch, super::FsError)> {
        let mut batch = Batch {
            entries: Vec::new(),
            next: None,
            before: self.revocations.get(),
        };
        match self.fill_batch(&mut batch, ino, pos, plus).await {
            Ok(()) => Ok(batch),
            Err(error) => Err((batch, error)),
        }
    }

    async fn fill_batch(&self, batch: &mut Batch, ino: Ino, pos: u64, plus: bool) -> FsResult<()> {
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let _local = self.local.shared(ino).await;
        let dir = self.load(&locked, ino).await?;
        if !dir.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        self.accessed(&dir);
        let last = Key::readdir(ino, DIRENT_LAST_POS);
        let mut pos = pos;
        while pos <= DIRENT_LAST_POS {
            let from = Key::readdir(ino, pos);
            let Some((key, value)) = self.log.next(locked.of(ino), &from, &last).await? else {
                return Ok(());
            };
            if batch.entries.len() >= self.config.policy.readdir_batch.max(1) {
                batch.next = Some(key.second);
                return Ok(());
            }
            let found = Found::parse(&key, value)?;
            let inode = if plus {
                self.peek_inode(locked.of(ino), found.ino).await
            } else {
                None
            };
            batch.entries.push((found, inode));
            pos = key.second + 1;
        }
        Ok(())
    }

    /// An inode whose lock is at hand: never waits for another node.
    async fn peek_inode(&self, dir: &LockGuard, ino: Ino) -> Option<super::Inode> {
        let scope = Scope::InodeGroup(ino).normal();
        let own;
        let guard = if dir.scope() == scope {
            dir
        } else {
            own = self.locks.try_lock(scope, Mode::Read)?;
            &own
        };
        self.load_under(guard, ino)
            .await
            .ok()
            .filter(|inode| inode.nlink > 0)
    }
}

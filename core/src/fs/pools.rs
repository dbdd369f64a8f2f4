//! Inode numbers: batches granted by the server, used from two pools of this
//! node, so that its directories and files come from different lock groups and
//! different nodes never share one (spec 12 section 3).
//!
//! What can go wrong: a number used twice. Numbers only come from grants, each is
//! taken out of its pool without an await in between, and grants are never
//! returned; what is left at unmount or crash is lost.

use super::api::Ino;
use super::error::{FsError, FsResult};
use super::{Fs, Policy};
use crate::env::probe;
use crate::errno::Errno;
use crate::format::INODE_GROUP_NR;
use std::cell::Cell;

/// What a number is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolKind {
    /// A directory.
    Dir,
    /// Anything else.
    File,
}

#[derive(Debug, Default)]
struct Pool {
    next: Cell<Ino>,
    left: Cell<u64>,
}

impl Pool {
    fn take(&self, per_lock: u64) -> Option<Ino> {
        let ino = self.next.get();
        if self.left.get() == 0 {
            return None;
        }
        self.advance(1);
        if per_lock != INODE_GROUP_NR {
            let used = self.next.get() & (INODE_GROUP_NR - 1);
            if used >= per_lock {
                self.advance((INODE_GROUP_NR - used).min(self.left.get()));
            }
        }
        Some(ino)
    }

    fn advance(&self, by: u64) {
        self.next.set(self.next.get() + by);
        self.left.set(self.left.get() - by);
    }
}

/// Both pools of a mount.
#[derive(Debug)]
pub(super) struct InodePools {
    dirs: Pool,
    files: Pool,
    per_lock: u64,
}

impl InodePools {
    pub(super) fn new(policy: &Policy) -> Self {
        Self {
            dirs: Pool::default(),
            files: Pool::default(),
            per_lock: policy.inodes_per_lock.clamp(1, INODE_GROUP_NR),
        }
    }

    fn pool(&self, kind: PoolKind) -> &Pool {
        match kind {
            PoolKind::Dir if self.per_lock == INODE_GROUP_NR => &self.dirs,
            _ => &self.files,
        }
    }
}

impl Fs {
    /// A fresh inode number.
    ///
    /// # Errors
    /// ENOSPC if the volume has none left, or the mount was cut off.
    pub(super) async fn new_ino(&self, kind: PoolKind) -> FsResult<Ino> {
        let pool = self.pools.pool(kind);
        loop {
            if let Some(ino) = pool.take(self.pools.per_lock) {
                return Ok(ino);
            }
            let count = self.config.policy.inode_batch.max(1);
            let (ino, nr) = self
                .server
                .alloc_inodes(count)
                .await
                .map_err(FsError::Server)?;
            if nr == 0 {
                return Err(Errno::ENOSPC.into());
            }
            if ino == 0 || ino.checked_add(nr - 1).is_none() {
                return Err(Errno::EINVAL.into());
            }
            if pool.left.get() == 0 {
                pool.next.set(ino);
                pool.left.set(nr);
            } else {
                // Another task refilled meanwhile: this grant is lost, harmlessly.
                probe("fs.inode_grant_dropped");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(start: Ino, nr: u64, per_lock: u64) -> Vec<Ino> {
        let pool = Pool {
            next: Cell::new(start),
            left: Cell::new(nr),
        };
        std::iter::from_fn(|| pool.take(per_lock)).collect()
    }

    #[test]
    fn all_numbers_of_a_grant_are_used() {
        assert_eq!(taken(1024, 2048, 1024), (1024..3072).collect::<Vec<_>>());
    }

    #[test]
    fn at_most_so_many_numbers_of_a_group_are_used() {
        assert_eq!(taken(1024, 3072, 2), [1024, 1025, 2048, 2049, 3072, 3073]);
        assert_eq!(taken(1024, 1030, 1), [1024, 2048]);
        assert_eq!(
            taken(2050, 10, 2),
            [2050],
            "a grant that starts inside a group"
        );
    }
}

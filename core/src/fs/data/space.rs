//! Preallocation, seeking, extent listing, and freeing a deleted file's blocks
//! (spec 14 sections 12 and 13, spec 11 section 6 step 7).

use super::super::Fs;
use super::super::api::{FiemapExtent, Ino, Whence};
use super::super::change::{Change, Locked};
use super::super::error::{FsError, FsResult};
use super::super::inode::Inode;
use super::extents::{Extent, set};
use super::{BLOCK, LAST_BLOCK, MAX_SIZE, blocks_of};
use crate::env::probe;
use crate::errno::Errno;
use crate::format::{EXTENT_FLAG_OFFLINE, EXTENT_FLAG_UNWRITTEN, INODE_FLAG_TRUNCATE};
use crate::locks::Mode;
use crate::log::LogError;

/// `FALLOC_FL_KEEP_SIZE`.
const KEEP_SIZE: u32 = 1;

/// `FIEMAP_EXTENT_LAST`.
const FIEMAP_LAST: u32 = 0x1;
/// `FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC`: offline data.
const FIEMAP_OFFLINE: u32 = 0x2 | 0x4;
/// `FIEMAP_EXTENT_UNWRITTEN`.
const FIEMAP_UNWRITTEN: u32 = 0x800;

impl Fs {
    /// Maps unwritten blocks over the holes of a range.
    pub(in super::super) async fn data_fallocate(
        &self,
        ino: Ino,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> FsResult<()> {
        if mode & !KEEP_SIZE != 0 {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if len == 0 {
            return Ok(());
        }
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        if end > MAX_SIZE {
            return Err(Errno::EFBIG.into());
        }
        let locked = self.lock_inodes(&[ino], Mode::Write).await?;
        let _local = self.local.alone(ino).await;
        let mut inode = self.load(&locked, ino).await?;
        if !inode.is_reg() {
            return Err(if inode.is_dir() {
                Errno::EISDIR
            } else {
                Errno::ENODEV
            }
            .into());
        }
        if inode.is_retained() {
            return Err(Errno::EPERM.into());
        }
        if inode.flags & INODE_FLAG_TRUNCATE != 0 {
            probe("data.truncate_finished_later");
            self.finish_truncate(&locked, &mut inode).await?;
        }
        if mode & KEEP_SIZE == 0 && end > inode.size {
            let state = self.table.state(ino);
            self.zero_old_tail(&locked, &inode, &state, u64::MAX)
                .await?;
        }
        let keep_size = mode & KEEP_SIZE != 0;
        let mut at = offset / BLOCK;
        while at < blocks_of(end) {
            at = self
                .fallocate_step(&locked, &mut inode, at, end, keep_size)
                .await?;
        }
        Ok(())
    }

    /// One transaction of a fallocate from block `at`; returns the block after
    /// what it did. With the data supply used up before anything was done it
    /// returns `at`, and entering the next transaction waits for a refill.
    async fn fallocate_step(
        &self,
        locked: &Locked,
        inode: &mut Inode,
        at: u64,
        end: u64,
        keep_size: bool,
    ) -> FsResult<u64> {
        let mut change = self.change(locked, &[inode.touch(false)], true).await?;
        let mut next = at;
        let mut failure = None;
        for _ in 0..self.data.policy().extents_per_change {
            if next >= blocks_of(end) {
                break;
            }
            match self
                .fallocate_extent(&mut change, inode, next, blocks_of(end))
                .await
            {
                Ok(done) => next = done,
                Err(error) if error.is_no_space() => {
                    failure = Some(error);
                    break;
                }
                Err(error) => return change.finish(Err(error)).await,
            }
        }
        let done = if next > at {
            let reached = end.min(next * BLOCK);
            if !keep_size && reached > inode.size {
                inode.size = reached;
                inode.data_version += 1;
                let now = self.env.clock.wall();
                inode.mtime = now;
                inode.changed(now);
            }
            change.put_inode(inode, false).await
        } else {
            Ok(())
        };
        if let Some(state) = self.table.find(inode.ino) {
            state.data.changed();
        }
        change.finish(done).await?;
        match failure {
            Some(FsError::Log(LogError::NoData)) | None => Ok(next),
            Some(error) => Err(error),
        }
    }

    /// Skips what is mapped at `block`, or maps a run there.
    async fn fallocate_extent(
        &self,
        change: &mut Change<'_>,
        inode: &mut Inode,
        block: u64,
        stop: u64,
    ) -> FsResult<u64> {
        let guard = change.locked().of(inode.ino);
        let next = self.next_extent(guard, inode.ino, block).await?;
        let (upto, flags) = match next {
            Some(e) if e.start <= block && e.is_mapped() => return Ok(e.end().min(stop)),
            Some(e) if e.start <= block => (e.end(), e.flags & EXTENT_FLAG_OFFLINE),
            Some(e) => (e.start, 0),
            None => (stop, 0),
        };
        let count = (upto.min(stop) - block).min(self.data.policy().fallocate_step_blocks);
        let (blkno, got) = self.log.alloc_data(change.hold(), count).await?;
        let flags = flags | EXTENT_FLAG_UNWRITTEN;
        let extent = Extent {
            start: block,
            len: got,
            blkno,
            flags,
        };
        if let Err(error) = set(self, change, inode, extent).await {
            self.log.free_data(change.hold(), blkno, got).await?;
            return Err(error);
        }
        change.allocated(blkno, got);
        Ok(extent.end())
    }

    /// Next data or hole at or after `offset`; offline counts as data.
    pub(in super::super) async fn data_lseek(
        &self,
        ino: Ino,
        offset: u64,
        whence: Whence,
    ) -> FsResult<u64> {
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let _local = self.local.shared(ino).await;
        let guard = locked.of(ino);
        let inode = self.load_under(guard, ino).await?;
        if offset >= inode.size {
            return Err(Errno::ENXIO.into());
        }
        let stop = blocks_of(inode.size);
        let mut at = offset / BLOCK;
        loop {
            let extent = self
                .next_extent(guard, ino, at)
                .await?
                .filter(|e| e.start < stop);
            let found = match (whence, extent) {
                (Whence::Data, None) => return Err(Errno::ENXIO.into()),
                (Whence::Hole, None) => Some(at),
                (Whence::Hole, Some(e)) if e.start > at || !is_data(&e) => Some(at),
                (Whence::Data, Some(e)) if is_data(&e) => Some(e.start.max(at)),
                (_, Some(e)) => {
                    at = e.end();
                    None
                }
            };
            if let Some(block) = found {
                return Ok((block * BLOCK).max(offset).min(inode.size));
            }
            if at >= stop {
                return match whence {
                    Whence::Hole => Ok(inode.size),
                    Whence::Data => Err(Errno::ENXIO.into()),
                };
            }
        }
    }

    /// Extents from byte `start` on, those past the size too, at most `max`.
    pub(in super::super) async fn data_fiemap(
        &self,
        ino: Ino,
        start: u64,
        len: u64,
        max: usize,
    ) -> FsResult<Vec<FiemapExtent>> {
        if len == 0 {
            return Err(Errno::EINVAL.into());
        }
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let _local = self.local.shared(ino).await;
        let guard = locked.of(ino);
        self.load_under(guard, ino).await?;
        let stop = start
            .saturating_add(len)
            .div_ceil(BLOCK)
            .min(LAST_BLOCK + 1);
        let mut found = Vec::new();
        let mut at = start / BLOCK;
        while at < stop && found.len() < max {
            let Some(extent) = self.next_extent(guard, ino, at).await? else {
                break;
            };
            if extent.start >= stop {
                break;
            }
            at = extent.end();
            let is_last = at > LAST_BLOCK || self.next_extent(guard, ino, at).await?.is_none();
            found.push(fiemap_extent(&extent, is_last));
        }
        Ok(found)
    }

    /// Frees all blocks of a deleted file. Its size and counts do not matter any
    /// more; an interrupted deletion goes on where it stopped.
    pub(in super::super) async fn data_free_all(
        &self,
        locked: &Locked,
        inode: &mut Inode,
    ) -> FsResult<()> {
        if let Some(state) = self.table.find(inode.ino) {
            state.data.changed();
            state.data.drop_from(0);
        }
        self.remove_extents(locked, inode, 0).await
    }

    /// The lock of a group was taken back: nothing read before may be used again.
    pub(in super::super) fn data_revoke_group(&self, ino: Ino) {
        probe("data.revoke");
        for state in self.table.in_group(ino) {
            state.data.drop_clean();
            let number = state.ino;
            drop(state);
            self.table.prune(number);
        }
    }
}

fn is_data(extent: &Extent) -> bool {
    extent.is_written() || extent.is_offline()
}

fn fiemap_extent(extent: &Extent, is_last: bool) -> FiemapExtent {
    let (physical, flags) = if extent.is_offline() {
        (0, FIEMAP_OFFLINE)
    } else if extent.is_written() {
        (extent.blkno * BLOCK, 0)
    } else {
        (extent.blkno * BLOCK, FIEMAP_UNWRITTEN)
    };
    FiemapExtent {
        logical: extent.start * BLOCK,
        physical,
        length: extent.len * BLOCK,
        flags: flags | if is_last { FIEMAP_LAST } else { 0 },
    }
}

//! Changing a file's size (spec 14 section 11). Shrinking sets the size and the
//! TRUNCATE flag in one transaction, then removes extents in as many as it takes;
//! whoever finds the flag, after a crash too, finishes the work first.
//!
//! What can go wrong: old bytes that come back when the file grows again. The rest
//! of the last block is zeroed as dirty data of the transaction that shrinks.

use super::super::Fs;
use super::super::change::Locked;
use super::super::error::{FsError, FsResult};
use super::super::inode::Inode;
use super::extents::{Extent, remove, set};
use super::write::OldBlocks;
use super::{BLOCK, LAST_BLOCK, MAX_SIZE, blocks_of};
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::INODE_FLAG_TRUNCATE;

impl Fs {
    /// Sets the size of a regular file: steps 2 to 7. The caller holds the inode
    /// alone and under WRITE, and stores what else the setattr changes in a change
    /// of its own (step 8).
    pub(in super::super) async fn data_set_size(
        &self,
        locked: &Locked,
        inode: &mut Inode,
        size: u64,
    ) -> FsResult<()> {
        if size > MAX_SIZE {
            return Err(Errno::EFBIG.into());
        }
        if inode.is_retained() {
            return Err(Errno::EPERM.into());
        }
        if inode.flags & INODE_FLAG_TRUNCATE != 0 {
            probe("data.truncate_finished_later");
            self.finish_truncate(locked, inode).await?;
        }
        if size > 0 && size != inode.size {
            self.require_online(locked, inode, size).await?;
        }
        let truncates = size <= inode.size;
        self.move_size(locked, inode, size, truncates).await?;
        if truncates {
            self.finish_truncate(locked, inode).await?;
        }
        Ok(())
    }

    /// Transaction A: the new size is there, and what has to follow is marked.
    async fn move_size(
        &self,
        locked: &Locked,
        inode: &mut Inode,
        size: u64,
        truncates: bool,
    ) -> FsResult<()> {
        let state = self.table.state(inode.ino);
        // The block whose rest must be zero: the new last one, or the old last
        // one of a file that grows.
        let cut = inode.size.min(size);
        let block = cut / BLOCK;
        let mut old = OldBlocks::default();
        let zeroes = !cut.is_multiple_of(BLOCK) && size != inode.size;
        let blkno = if zeroes {
            self.mapped_at(locked, inode, block).await?
        } else {
            None
        };
        if blkno.is_some() {
            match state.data.copy_of(block) {
                Some(buf) => _ = old.insert(block, buf),
                None => self.read_raw(locked, inode, block, &mut old).await?,
            }
        }
        let mut change = self.change(locked, &[inode.touch(true)], false).await?;
        let now = self.env.clock.wall();
        if size != inode.size {
            inode.data_version += 1;
        }
        inode.size = size;
        inode.mtime = now;
        if truncates && !mutant("truncate_flag_not_persisted") {
            inode.flags |= INODE_FLAG_TRUNCATE;
        }
        inode.changed(now);
        let done = change.put_inode(inode, true).await;
        if done.is_ok() {
            state.data.changed();
            if let Some(blkno) = blkno
                && !mutant("tail_not_zeroed")
            {
                let zeros = vec![0; (BLOCK - cut % BLOCK) as usize];
                state
                    .data
                    .write(cut, &zeros, blkno, &|block| old.get(&block).cloned());
                self.data.dirtied(&state);
            }
            state.data.drop_from(blocks_of(size));
        }
        change.finish(done).await?;
        drop(state);
        self.table.prune(inode.ino);
        Ok(())
    }

    /// Removes what lies past the size, then clears the flag. Safe to repeat.
    pub(in super::super) async fn finish_truncate(
        &self,
        locked: &Locked,
        inode: &mut Inode,
    ) -> FsResult<()> {
        self.remove_extents(locked, inode, blocks_of(inode.size))
            .await?;
        let mut change = self.change(locked, &[inode.touch(false)], false).await?;
        inode.flags &= !INODE_FLAG_TRUNCATE;
        let done = change.put_inode(inode, false).await;
        change.finish(done).await
    }

    /// Removes all extents from `block` on and frees their blocks, a few in each
    /// transaction.
    pub(super) async fn remove_extents(
        &self,
        locked: &Locked,
        inode: &mut Inode,
        block: u64,
    ) -> FsResult<()> {
        let guard = locked.of(inode.ino);
        // What is gone is behind it: to skip its deletion items from the front for every
        // extent takes quadratic time.
        let mut from = block;
        while from <= LAST_BLOCK && self.next_extent(guard, inode.ino, from).await?.is_some() {
            let mut change = self.change(locked, &[inode.touch(false)], false).await?;
            let done = async {
                for _ in 0..self.data.policy().extents_per_change {
                    if from > LAST_BLOCK {
                        break;
                    }
                    let next = self.next_extent(guard, inode.ino, from).await?;
                    let Some(extent) = next else { break };
                    from = extent.end();
                    let gone = extent.part(block.max(extent.start), extent.end());
                    if gone.len == extent.len {
                        remove(&mut change, inode, extent).await?;
                    } else {
                        let hole = Extent {
                            blkno: 0,
                            flags: 0,
                            ..gone
                        };
                        set(self, &mut change, inode, hole).await?;
                    }
                    if gone.is_mapped() {
                        self.free_blocks(&mut change, gone)?;
                    }
                }
                change.put_inode(inode, false).await
            };
            let done = done.await;
            change.finish(done).await?;
            probe("data.extents_removed");
        }
        Ok(())
    }

    pub(super) fn free_blocks(
        &self,
        change: &mut super::super::change::Change<'_>,
        extent: Extent,
    ) -> FsResult<()> {
        if extent.end() - extent.start + extent.blkno > self.data.device_blocks() {
            let key = crate::format::Key::data_extent(0, extent.end() - 1, extent.len);
            return Err(FsError::Corrupt {
                key,
                what: "the extent's blocks are past the device",
            });
        }
        change.free_later(extent.blkno, extent.len);
        Ok(())
    }
}

//! Writing (spec 14 section 8). One request is one change: mapping, size and the
//! inode's seqs go into the transaction together with the data that the same
//! commit writes out.
//!
//! What can go wrong: showing another file's old bytes. A newly mapped block is
//! filled with zeros around what is written, and a block that keeps old content is
//! read before the transaction is entered.

use super::super::Fs;
use super::super::api::{Ino, Inval, WriteData, WriteHow};
use super::super::change::{Change, Locked};
use super::super::error::{FsError, FsResult};
use super::super::inode::Inode;
use super::super::table::InodeState;
use super::extents::{Extent, set};
use super::prealloc::{self, Hole};
use super::read::offline;
use super::{BLOCK, MAX_SIZE, blocks_of};
use crate::env::{HashMap, IoBuf, mutant, probe};
use crate::errno::Errno;
use crate::format::{EXTENT_FLAG_UNWRITTEN, INODE_FLAG_TRUNCATE};
use crate::locks::Mode;
use crate::log::LogError;
use bytes::Bytes;
use std::rc::Rc;
use std::sync::Arc;

/// Old contents of blocks that a write covers in part, by logical block.
pub(super) type OldBlocks = HashMap<u64, IoBuf>;

impl Fs {
    /// Writes `data` at `offset`; returns how many bytes were taken: fewer than
    /// given only where space ran out.
    pub(in super::super) async fn data_write(
        &self,
        ino: Ino,
        offset: u64,
        mut data: WriteData,
        how: WriteHow,
        direct: bool,
    ) -> FsResult<u32> {
        if data.is_empty() {
            return Ok(0);
        }
        let comes = self.table.write_comes(ino, offset, data.len() as u64);
        self.data.throttle().await;
        // Held for all of it, so that no other write comes in between.
        let locked = self.lock_inodes(&[ino], Mode::Write).await?;
        let local = self.local.alone(ino).await;
        let whole = data.len();
        let (mut done, mut at, mut next) = (0, offset, how);
        let mut first = None;
        while done < whole {
            match self.write_once(&locked, ino, at, &mut data, next).await {
                // The transaction's data supply is used up: entering the next
                // transaction waits for a refill.
                Err(FsError::Log(LogError::NoData)) => probe("data.refill"),
                // What has been written is said; the next write meets the error.
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
                Ok((start, bytes)) => {
                    first.get_or_insert(start);
                    done += bytes as usize;
                    // Less than asked for: either space or this transaction's supply
                    // ran out, and trying to write the rest tells which.
                    at = start + bytes;
                    next.append = false;
                    if done < whole {
                        data = Bytes::copy_from_slice(&data[bytes as usize..]).into();
                    }
                }
            }
        }
        let (start, len) = (first.unwrap_or(offset), done as u64);
        if !direct {
            self.table.page(ino, start, len);
        }
        let overtaken = comes.overtaken();
        drop((comes, local, locked));
        if direct {
            self.forget_written(ino, start, len).await;
        } else if start != offset {
            self.forget_misplaced(ino);
        } else if let Some((start, len)) = overtaken {
            // The kernel holds none of these pages for this write, or it could not have
            // read them: it does not wait for the answer of this write to drop them.
            probe("data.read_overtakes_write");
            let range = Inval::PageRange { ino, start, len };
            self.kernel.invalidate(vec![range]).await;
        }
        if how.sync {
            self.log.sync().await?;
        }
        Ok(u32::try_from(done).expect("no more than was given"))
    }

    /// Pages of other handles that show what was there before a direct write.
    async fn forget_written(&self, ino: Ino, start: u64, len: u64) {
        // Mutant: breaks spec 14 section 9.
        if self.table.is_paged(ino) && !mutant("direct_write_leaves_pages") {
            probe("data.direct_write_beside_pages");
            let range = Inval::PageRange { ino, start, len };
            self.kernel.invalidate(vec![range]).await;
        }
    }

    /// A handle was made to append after it was opened: the kernel has put the
    /// data at its own idea of the end. It holds that page until it is answered.
    fn forget_misplaced(&self, ino: Ino) {
        probe("data.misplaced_append");
        let forget = self.kernel.invalidate(vec![Inval::Pages(ino)]);
        self.env.spawn("forget_misplaced", async move {
            forget.await;
        });
    }

    /// Writes what fits one transaction; where it began and how many bytes it took.
    async fn write_once(
        &self,
        locked: &Locked,
        ino: Ino,
        offset: u64,
        data: &mut WriteData,
        how: WriteHow,
    ) -> FsResult<(u64, u64)> {
        let mut inode = self.load(locked, ino).await?;
        if !inode.is_reg() {
            return Err(Errno::EINVAL.into());
        }
        let append = how.append && !how.from_pages;
        let offset = if append { inode.size } else { offset };
        let end = end_of_write(offset, data.len())?;
        if inode.is_retained() {
            return Err(Errno::EPERM.into());
        }
        if inode.flags & INODE_FLAG_TRUNCATE != 0 {
            probe("data.truncate_finished_later");
            self.finish_truncate(locked, &mut inode).await?;
        }
        self.require_online(locked, &inode, inode.size).await?;
        let state = self.table.state(ino);
        if offset > inode.size {
            self.zero_old_tail(locked, &inode, &state, offset / BLOCK)
                .await?;
        }
        let old = self.old_edges(locked, &inode, &state, offset, end).await?;

        let mut change = self.change(locked, &[inode.touch(true)], true).await?;
        let done = self
            .write_in(
                &mut change,
                &mut inode,
                (offset, end),
                data,
                how,
                &state,
                &old,
            )
            .await;
        Ok((offset, change.finish(done).await?))
    }

    /// The part of a write inside the transaction.
    #[allow(clippy::too_many_arguments)] // one call, split for reading
    async fn write_in(
        &self,
        change: &mut Change<'_>,
        inode: &mut Inode,
        (offset, end): (u64, u64),
        data: &mut WriteData,
        how: WriteHow,
        state: &Rc<InodeState>,
        old: &OldBlocks,
    ) -> FsResult<u64> {
        let mapped = self
            .map_for_write(change, inode, offset / BLOCK, blocks_of(end))
            .await?;
        let last = mapped.last().expect("at least one block was mapped");
        let end = end.min(last.end() * BLOCK);
        if how.kill_suidgid {
            self.strip_privs(change, inode).await?;
        }
        let now = self.env.clock.wall();
        inode.size = inode.size.max(end);
        inode.data_version += 1;
        inode.mtime = now;
        inode.changed(now);
        change.put_inode(inode, true).await?;
        // Nothing fails from here on: the buffers get the data while the
        // transaction is held, so the commit that has the mapping has the data.
        state.data.changed();
        if let [run] = mapped[..]
            && take_blocks(data, state, run, (offset, end))
        {
            self.data.dirtied(state);
            return Ok(end - offset);
        }
        for run in &mapped {
            let from = offset.max(run.start * BLOCK);
            let to = end.min(run.end() * BLOCK);
            if from < to {
                let bytes = &data[(from - offset) as usize..(to - offset) as usize];
                let blkno = run.blkno + (from / BLOCK - run.start);
                state
                    .data
                    .write(from, bytes, blkno, &|block| old.get(&block).cloned());
            }
        }
        self.data.dirtied(state);
        Ok(end - offset)
    }

    /// Maps blocks `[block, stop)` and marks them written; what could be mapped
    /// before space ran out, if that is anything.
    async fn map_for_write(
        &self,
        change: &mut Change<'_>,
        inode: &mut Inode,
        block: u64,
        stop: u64,
    ) -> FsResult<Vec<Extent>> {
        let mut mapped: Vec<Extent> = Vec::new();
        let mut at = block;
        while at < stop {
            match self.map_piece(change, inode, at, stop).await {
                Ok(extent) => {
                    at = extent.end();
                    mapped.push(extent);
                }
                Err(error) if mapped.is_empty() || !error.is_no_space() => return Err(error),
                Err(_) => {
                    probe("data.short_write");
                    break;
                }
            }
        }
        Ok(mapped)
    }

    /// Maps a run of blocks from `block` on, at most to `stop`.
    async fn map_piece(
        &self,
        change: &mut Change<'_>,
        inode: &mut Inode,
        block: u64,
        stop: u64,
    ) -> FsResult<Extent> {
        let ino = inode.ino;
        let guard = change.locked().of(ino);
        let next = self.next_extent(guard, ino, block).await?;
        if let Some(extent) = next.filter(|e| e.start <= block) {
            if !extent.is_mapped() || extent.is_offline() {
                return Err(offline(ino, block));
            }
            let part = Extent {
                flags: 0,
                ..extent.part(block, stop)
            };
            if !extent.is_written() {
                set(self, change, inode, part).await?;
            }
            return Ok(part);
        }
        let next = next.map(|e| e.start);
        let hole = Hole {
            block,
            wanted: next.unwrap_or(stop).min(stop) - block,
            region_in_use: self.region_in_use(change, inode, block).await?,
            next,
            online: inode.online_blocks,
        };
        let (first, count) = prealloc::plan(hole, self.data.policy());
        let (blkno, got) = self.log.alloc_data(change.hold(), count).await?;
        let first = prealloc::place(first, got, block);
        let whole = Extent {
            start: first,
            len: got,
            blkno,
            flags: EXTENT_FLAG_UNWRITTEN,
        };
        let part = Extent {
            flags: 0,
            ..whole.part(block, (block + hole.wanted).min(whole.end()))
        };
        let done = async {
            if whole.len > part.len {
                set(self, change, inode, whole).await?;
            }
            set(self, change, inode, part).await
        };
        if let Err(error) = done.await {
            self.log.free_data(change.hold(), blkno, got).await?;
            return Err(error);
        }
        change.allocated(blkno, got);
        Ok(part)
    }

    /// Whether the aligned region around `block` has an extent that starts before
    /// it; asked only where the policy fills regions.
    async fn region_in_use(
        &self,
        change: &Change<'_>,
        inode: &Inode,
        block: u64,
    ) -> FsResult<bool> {
        let policy = self.data.policy();
        if policy.prealloc_contig_only {
            return Ok(false);
        }
        let region = block - block % policy.prealloc_blocks;
        let guard = change.locked().of(inode.ino);
        let next = self.next_extent(guard, inode.ino, region).await?;
        Ok(next.is_some_and(|e| e.start < block))
    }

    /// Refuses to go on while any of the first `size` bytes is only in the archive.
    pub(super) async fn require_online(
        &self,
        locked: &Locked,
        inode: &Inode,
        size: u64,
    ) -> FsResult<()> {
        if inode.offline_blocks == 0 {
            return Ok(());
        }
        let guard = locked.of(inode.ino);
        let extents = self
            .extents_in(guard, inode.ino, 0, blocks_of(size))
            .await?;
        match extents.iter().find(|e| e.is_offline()) {
            Some(extent) => Err(offline(inode.ino, extent.start)),
            None => Ok(()),
        }
    }

    /// Old contents of the first and the last block of a write that covers them
    /// in part, where they hold data that is not buffered.
    async fn old_edges(
        &self,
        locked: &Locked,
        inode: &Inode,
        state: &InodeState,
        offset: u64,
        end: u64,
    ) -> FsResult<OldBlocks> {
        let mut old = OldBlocks::default();
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        if !offset.is_multiple_of(BLOCK) {
            self.read_old(locked, inode, state, first, &mut old).await?;
        }
        // Past the old size there is nothing to keep behind the new bytes.
        let keeps_tail = !end.is_multiple_of(BLOCK) && end < inode.size;
        if keeps_tail {
            self.read_old(locked, inode, state, last, &mut old).await?;
        }
        Ok(old)
    }

    /// Reads a block's old content, with zeros past the file's size, which foreign
    /// volumes may not have there.
    async fn read_old(
        &self,
        locked: &Locked,
        inode: &Inode,
        state: &InodeState,
        block: u64,
        old: &mut OldBlocks,
    ) -> FsResult<()> {
        if old.contains_key(&block) || block * BLOCK >= inode.size {
            return Ok(());
        }
        if let Some(buf) = state.data.copy_of(block) {
            old.insert(block, buf);
            return Ok(());
        }
        let guard = locked.of(inode.ino);
        let extent = self.next_extent(guard, inode.ino, block).await?;
        let Some(extent) = extent.filter(|e| e.start <= block && e.is_written()) else {
            return Ok(());
        };
        let blkno = extent.part(block, block + 1).blkno;
        let mut buf = self.data.read(blkno, 1).await.map_err(FsError::Device)?;
        let valid = (inode.size - block * BLOCK).min(BLOCK) as usize;
        if valid < BLOCK as usize {
            Arc::make_mut(&mut buf)[valid..].fill(0);
        }
        old.insert(block, buf);
        Ok(())
    }

    /// Before the file grows past the block that holds its last byte: on volumes
    /// of other writers the rest of that block may not be zero.
    pub(super) async fn zero_old_tail(
        &self,
        locked: &Locked,
        inode: &Inode,
        state: &Rc<InodeState>,
        next_block: u64,
    ) -> FsResult<()> {
        let last = inode.size / BLOCK;
        if inode.size.is_multiple_of(BLOCK) || last == next_block || state.data.has(last) {
            return Ok(());
        }
        let mut old = OldBlocks::default();
        self.read_raw(locked, inode, last, &mut old).await?;
        let Some((buf, blkno)) = old
            .remove(&last)
            .zip(self.mapped_at(locked, inode, last).await?)
        else {
            return Ok(());
        };
        let from = (inode.size % BLOCK) as usize;
        if buf[from..].iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        probe("data.foreign_tail_zeroed");
        // Held without changing an item: the bytes are past the size, so nobody
        // sees them before the write that follows.
        let hold = self.log.hold(false).await?;
        let zeros = vec![0; BLOCK as usize - from];
        state
            .data
            .write(inode.size, &zeros, blkno, &|_| Some(buf.clone()));
        self.data.dirtied(state);
        drop(hold);
        Ok(())
    }

    /// The data block of a written logical block.
    pub(super) async fn mapped_at(
        &self,
        locked: &Locked,
        inode: &Inode,
        block: u64,
    ) -> FsResult<Option<u64>> {
        let extent = self
            .next_extent(locked.of(inode.ino), inode.ino, block)
            .await?;
        let extent = extent.filter(|e| e.start <= block && e.is_written());
        Ok(extent.map(|e| e.part(block, block + 1).blkno))
    }

    /// Reads a written block as the device has it.
    pub(super) async fn read_raw(
        &self,
        locked: &Locked,
        inode: &Inode,
        block: u64,
        old: &mut OldBlocks,
    ) -> FsResult<()> {
        if let Some(blkno) = self.mapped_at(locked, inode, block).await? {
            let buf = self.data.read(blkno, 1).await.map_err(FsError::Device)?;
            old.insert(block, buf);
        }
        Ok(())
    }
}

/// Makes the memory of a write that covers exactly a run of blocks, none of them
/// buffered, the buffer of those blocks: it goes to the device without a copy.
fn take_blocks(
    data: &mut WriteData,
    state: &InodeState,
    run: Extent,
    (offset, end): (u64, u64),
) -> bool {
    let WriteData::Blocks(buf) = data else {
        return false;
    };
    let whole = offset == run.start * BLOCK && end - offset == buf.len() as u64;
    if !whole || run.len != buf.len() as u64 / BLOCK || state.data.has_any(run.start, run.end()) {
        return false;
    }
    probe("data.write_without_copy");
    let taken = std::mem::replace(data, WriteData::Copied(Bytes::new()));
    let WriteData::Blocks(buf) = taken else {
        unreachable!("just matched")
    };
    state.data.adopt(run.start, run.blkno, buf);
    true
}

/// Byte after a write's last.
fn end_of_write(offset: u64, len: usize) -> FsResult<u64> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= MAX_SIZE => Ok(end),
        _ => Err(Errno::EFBIG.into()),
    }
}

//! Reading (spec 14 section 7): buffered blocks, blocks read ahead, the device,
//! and zeros where nothing was written.

use super::super::Fs;
use super::super::api::Ino;
use super::super::error::{FsError, FsResult};
use super::super::table::InodeState;
use super::extents::Extent;
use super::pages::{Run, shared};
use super::{BLOCK, blocks_of};
use crate::env::{Signal, probe};
use crate::errno::Errno;
use crate::locks::{LockGuard, Mode};
use bytes::Bytes;
use std::cell::RefCell;
use std::rc::Rc;

/// Blocks of one request to the device.
const REQUEST_BLOCKS: u64 = 256;
/// Reads in a row after which the next ones are read ahead.
const STREAK: u32 = 2;

static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

impl Fs {
    /// Reads up to `size` bytes at `offset`; short only at the end of the file.
    pub(in super::super) async fn data_read(
        &self,
        ino: Ino,
        offset: u64,
        size: u32,
    ) -> FsResult<Vec<Bytes>> {
        loop {
            // What the kernel may dirty it only gets under WRITE.
            let mode = match self.table.may_dirty(ino) {
                true => Mode::Write,
                false => Mode::Read,
            };
            let locked = self.lock_inodes(&[ino], mode).await?;
            let _local = self.local.shared(ino).await;
            let guard = locked.of(ino);
            let pieces = self.read_under(guard, ino, offset, size).await?;
            let outdated = mode == Mode::Read && self.table.may_dirty(ino);
            if outdated && guard.granted() != Mode::Write {
                // Opened for writing meanwhile, and the lock lowered since.
                probe("data.read_again");
                continue;
            }
            self.table.page_read(ino, offset, u64::from(size));
            return Ok(pieces);
        }
    }

    async fn read_under(
        &self,
        guard: &LockGuard,
        ino: Ino,
        offset: u64,
        size: u32,
    ) -> FsResult<Vec<Bytes>> {
        let inode = self.load_under(guard, ino).await?;
        if inode.is_dir() {
            return Err(Errno::EISDIR.into());
        }
        if size > 0 {
            self.accessed(&inode);
        }
        let end = inode.size.min(offset.saturating_add(u64::from(size)));
        if offset >= end {
            return Ok(Vec::new());
        }
        let state = self.table.state(ino);
        let mut pieces = Vec::new();
        let mut at = offset / BLOCK;
        let stop = blocks_of(end);
        while at < stop {
            let extent = self.next_extent(guard, ino, at).await?;
            at = match extent.filter(|e| e.start < stop) {
                None => push_zeros(&mut pieces, at, stop),
                Some(e) if e.start > at => push_zeros(&mut pieces, at, e.start),
                Some(e) if e.is_offline() => return Err(offline(ino, at)),
                Some(e) if !e.is_written() => push_zeros(&mut pieces, at, e.end().min(stop)),
                Some(e) => {
                    let part = e.part(at, stop);
                    // Before the read: the reader's next request may come while
                    // this one waits, and must be seen to follow it.
                    self.read_ahead(guard, &state, e, part, inode.size);
                    self.read_written(&state, part, &mut pieces).await?;
                    part.end()
                }
            };
        }
        drop(state);
        self.table.prune(ino);
        self.data.still_buffered().map_err(FsError::Device)?;
        Ok(trim(pieces, offset % BLOCK, end - offset))
    }

    /// Reads a written run of blocks.
    async fn read_written(
        &self,
        state: &Rc<InodeState>,
        part: Extent,
        pieces: &mut Vec<Bytes>,
    ) -> FsResult<()> {
        let mut at = part.start;
        while at < part.end() {
            let upto = match state.data.read(at, part.end()) {
                Ok(bytes) => {
                    at += bytes.len() as u64 / BLOCK;
                    pieces.push(bytes);
                    continue;
                }
                Err(upto) => upto.min(at + REQUEST_BLOCKS),
            };
            let ahead = state.data.ahead.borrow().run_at(at);
            if let Some((start, run)) = ahead {
                let upto = upto.min(start + run.blocks);
                if let Some(bytes) = from_run(&run, at - start, upto - start).await {
                    pieces.push(bytes);
                    at = upto;
                    continue;
                }
            }
            let blkno = part.blkno + (at - part.start);
            let buf = self
                .data
                .read(blkno, upto - at)
                .await
                .map_err(FsError::Device)?;
            pieces.push(shared(&buf));
            at = upto;
        }
        Ok(())
    }

    /// Keeps a window of the extent on its way for a sequential reader. `_guard`
    /// shows that the inode's lock is held while the mapping is used; a change of
    /// the file, or the lock's loss, drops the window.
    fn read_ahead(
        &self,
        _guard: &LockGuard,
        state: &Rc<InodeState>,
        extent: Extent,
        part: Extent,
        size: u64,
    ) {
        let window = self.data.policy().readahead_bytes / BLOCK;
        let mut ahead = state.data.ahead.borrow_mut();
        let sequential = part.start == ahead.expected || ahead.run_at(part.start).is_some();
        ahead.streak = if sequential {
            ahead.streak.saturating_add(1)
        } else {
            0
        };
        ahead.expected = part.end();
        if ahead.streak < STREAK || window == 0 {
            return;
        }
        // Runs behind the reader are done with; a little stays for reads that
        // arrive out of order.
        let behind = part.start.saturating_sub(REQUEST_BLOCKS);
        ahead.runs.retain(|&start, run| start + run.blocks > behind);
        let stop = (part.end() + window).min(extent.end()).min(blocks_of(size));
        let mut at = ahead.asked.max(part.end());
        if at > part.end() + window || at < part.start {
            at = part.end();
        }
        // Whole requests only, so that a reader does not cause many small ones.
        while at < stop && (stop - at >= REQUEST_BLOCKS || stop == extent.end()) {
            let blocks = (stop - at).min(REQUEST_BLOCKS);
            if state.data.has_any(at, at + blocks) {
                // The device does not have it yet, and what it has would outlive the
                // buffer.
                probe("data.read_ahead_stops_at_buffer");
                break;
            }
            let run = Rc::new(Run {
                blocks,
                content: RefCell::new(None),
                arrived: Signal::default(),
            });
            ahead.runs.insert(at, run.clone());
            let store = self.data.clone();
            let blkno = extent.blkno + (at - extent.start);
            self.data.spawn("read_ahead", async move {
                let content = store.read(blkno, blocks).await.ok();
                *run.content.borrow_mut() = Some(content);
                run.arrived.wake_all();
            });
            probe("data.read_ahead");
            at += blocks;
        }
        ahead.asked = at;
    }
}

async fn from_run(run: &Run, from: u64, to: u64) -> Option<Bytes> {
    let content = run.arrived.wait_for(|| run.content.borrow().clone()).await;
    // A failed read ahead is tried again by the reader, who reports the error.
    content.map(|buf| shared(&buf).slice((from * BLOCK) as usize..(to * BLOCK) as usize))
}

/// Data that is only in the archive: waiting for it comes with staging; until
/// then a read is an error, never zeros.
pub(super) fn offline(ino: Ino, block: u64) -> FsError {
    probe("data.offline");
    FsError::Offline { ino, block }
}

fn push_zeros(pieces: &mut Vec<Bytes>, from: u64, to: u64) -> u64 {
    let mut bytes = (to - from) * BLOCK;
    while bytes > 0 {
        let piece = bytes.min(ZEROS.len() as u64);
        pieces.push(Bytes::from_static(&ZEROS[..piece as usize]));
        bytes -= piece;
    }
    to
}

/// Cuts the first `skip` bytes off and ends after `len` more.
fn trim(pieces: Vec<Bytes>, skip: u64, len: u64) -> Vec<Bytes> {
    let (mut skip, mut len) = (skip as usize, len as usize);
    let mut out = Vec::with_capacity(pieces.len());
    for mut piece in pieces {
        let cut = skip.min(piece.len());
        skip -= cut;
        bytes::Buf::advance(&mut piece, cut);
        piece.truncate(len);
        len -= piece.len();
        if !piece.is_empty() {
            out.push(piece);
        }
    }
    out
}

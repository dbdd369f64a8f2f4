//! Blocks that users wrote and the device does not have yet, per inode; and
//! blocks read ahead.
//!
//! A *segment* is a run of blocks of one file that is contiguous on the device
//! too, in one buffer. A segment on its way to the device shares its buffer with
//! the request; writing into it again copies it first, so what the device gets is
//! always one moment's content.
//!
//! What can go wrong: losing a write that lands in a segment while it is being
//! written. Such a segment is dirty again, and goes out again after the write
//! under way has ended, never at the same time.

use super::BLOCK;
use crate::env::{AlignedBuf, IoBuf, Signal};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// Most blocks in one segment.
const SEGMENT_BLOCKS: u64 = 256;

#[derive(Debug)]
struct Segment {
    blkno: u64,
    buf: IoBuf,
    dirty: bool,
    writing: bool,
}

impl Segment {
    fn blocks(&self) -> u64 {
        self.buf.len() as u64 / BLOCK
    }
}

/// Data buffers of one inode.
#[derive(Debug, Default)]
pub struct InodeData {
    segments: RefCell<BTreeMap<u64, Segment>>,
    dirty_blocks: Cell<u64>,
    writing: Cell<u32>,
    pub(super) ahead: RefCell<ReadAhead>,
}

/// One batch for the device: contiguous in the file and on the device.
#[derive(Debug)]
pub(super) struct Batch {
    /// First logical block.
    pub start: u64,
    /// First data block.
    pub blkno: u64,
    /// The content, in order.
    pub bufs: Vec<IoBuf>,
}

impl Batch {
    /// Bytes of the batch.
    pub fn bytes(&self) -> u64 {
        self.bufs.iter().map(|buf| buf.len() as u64).sum()
    }
}

impl InodeData {
    /// Whether it has nothing that must be kept.
    pub fn is_idle(&self) -> bool {
        self.dirty_blocks.get() == 0 && self.writing.get() == 0
    }

    /// Blocks that are not on the device.
    pub(super) fn dirty_blocks(&self) -> u64 {
        self.dirty_blocks.get()
    }

    /// Notes that content or mapping changed: what was read ahead is dropped.
    pub(super) fn changed(&self) {
        self.ahead.borrow_mut().clear();
    }

    /// Where the segment that has `block` ends, or the next one starts.
    fn segment_at(&self, block: u64) -> Option<(u64, u64)> {
        let segments = self.segments.borrow();
        let (&start, segment) = segments.range(..=block).next_back()?;
        (block < start + segment.blocks()).then_some((start, start + segment.blocks()))
    }

    /// Whether the block is buffered.
    pub(super) fn has(&self, block: u64) -> bool {
        self.segment_at(block).is_some()
    }

    /// Whether any of the blocks `[block, end)` is buffered.
    pub(super) fn has_any(&self, block: u64, end: u64) -> bool {
        let segments = self.segments.borrow();
        let before = segments.range(..end).next_back();
        before.is_some_and(|(start, segment)| start + segment.blocks() > block)
    }

    /// Makes `buf` the dirty content of blocks from `block` on, none of which is
    /// buffered; they are mapped from `blkno` on.
    pub(super) fn adopt(&self, block: u64, blkno: u64, buf: AlignedBuf) {
        let segment = Segment {
            blkno,
            buf: Arc::new(buf),
            dirty: true,
            writing: false,
        };
        let blocks = segment.blocks();
        assert!(
            !self.has_any(block, block + blocks),
            "blocks from {block} on are buffered twice"
        );
        self.dirty_blocks.set(self.dirty_blocks.get() + blocks);
        self.segments.borrow_mut().insert(block, segment);
    }

    /// Content of a buffered block. A buffer may be written out and dropped at any
    /// wait, so who needs the content after a wait takes it along.
    pub(super) fn copy_of(&self, block: u64) -> Option<IoBuf> {
        let bytes = self.read(block, block + 1).ok()?;
        Some(Arc::new(AlignedBuf::copy_of(&bytes)))
    }

    /// The buffered part at the front of blocks `[block, end)`, or how far the
    /// unbuffered part reaches.
    pub(super) fn read(&self, block: u64, end: u64) -> Result<Bytes, u64> {
        let segments = self.segments.borrow();
        if let Some((&start, segment)) = segments.range(..=block).next_back()
            && block < start + segment.blocks()
        {
            let from = ((block - start) * BLOCK) as usize;
            let to = ((end.min(start + segment.blocks()) - start) * BLOCK) as usize;
            return Ok(shared(&segment.buf).slice(from..to));
        }
        let next = segments
            .range(block..)
            .next()
            .map_or(end, |(&start, _)| start);
        Err(next.min(end))
    }

    /// Copies `data` to byte `offset` of the file. All its blocks are mapped from
    /// `blkno` on. Where a block is only partly covered and not buffered, the rest
    /// comes from `base`: its old content, or zeros if there is none.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        blkno: u64,
        base: &dyn Fn(u64) -> Option<IoBuf>,
    ) {
        let first = offset / BLOCK;
        let mut at = offset;
        let end = offset + data.len() as u64;
        while at < end {
            let block = at / BLOCK;
            if self.segment_at(block).is_none() {
                self.add_segment(
                    block,
                    end.div_ceil(BLOCK),
                    blkno + (block - first),
                    (at, end),
                    base,
                );
            }
            let (start, stop) = self.segment_at(block).expect("just added");
            let upto = end.min(stop * BLOCK);
            let from = (at - offset) as usize;
            let to = (upto - offset) as usize;
            self.copy_into(start, at, &data[from..to]);
            at = upto;
        }
    }

    /// Adds an unbuffered segment from `block` up to `end` or the next segment.
    fn add_segment(
        &self,
        block: u64,
        end: u64,
        blkno: u64,
        (from, to): (u64, u64),
        base: &dyn Fn(u64) -> Option<IoBuf>,
    ) {
        let next = self
            .segments
            .borrow()
            .range(block..)
            .next()
            .map_or(end, |(&s, _)| s);
        let stop = next.min(end).min(block + SEGMENT_BLOCKS);
        let len = ((stop - block) * BLOCK) as usize;
        let whole = from <= block * BLOCK && to >= stop * BLOCK;
        let mut buf = match whole {
            // The caller fills all of it.
            true => AlignedBuf::to_fill(len),
            false => AlignedBuf::zeroed(len),
        };
        let mut fill = |b: u64| {
            if let Some(old) = base(b) {
                let at = ((b - block) * BLOCK) as usize;
                buf[at..at + BLOCK as usize].copy_from_slice(&old);
            }
        };
        if from > block * BLOCK {
            fill(block);
        }
        let last = stop - 1;
        if to < stop * BLOCK && (last != block || from <= block * BLOCK) {
            fill(last);
        }
        let segment = Segment {
            blkno,
            buf: Arc::new(buf),
            dirty: false,
            writing: false,
        };
        self.segments.borrow_mut().insert(block, segment);
    }

    fn copy_into(&self, start: u64, offset: u64, data: &[u8]) {
        let mut segments = self.segments.borrow_mut();
        let segment = segments.get_mut(&start).expect("the segment exists");
        let at = (offset - start * BLOCK) as usize;
        // Copies the buffer first if the device, or a reader, still has it.
        Arc::make_mut(&mut segment.buf)[at..at + data.len()].copy_from_slice(data);
        if !segment.dirty {
            segment.dirty = true;
            self.dirty_blocks
                .set(self.dirty_blocks.get() + segment.blocks());
        }
    }

    /// Forgets blocks from `block` on, whose mapping goes. Writes under way end by
    /// themselves; a commit waits for them.
    pub(super) fn drop_from(&self, block: u64) {
        let mut segments = self.segments.borrow_mut();
        let straddling = segments
            .range(..block)
            .next_back()
            .map(|(&start, segment)| (start, segment.blocks()))
            .filter(|(start, blocks)| start + blocks > block);
        if let Some((start, _)) = straddling {
            self.cut(&mut segments, start, block);
        }
        let gone = segments.split_off(&block);
        let dirty: u64 = gone.values().filter(|s| s.dirty).map(Segment::blocks).sum();
        self.dirty_blocks.set(self.dirty_blocks.get() - dirty);
    }

    /// Shortens the segment at `start` to end before `block`.
    fn cut(&self, segments: &mut BTreeMap<u64, Segment>, start: u64, block: u64) {
        let segment = segments.get_mut(&start).expect("the segment exists");
        if segment.dirty {
            let gone = start + segment.blocks() - block;
            self.dirty_blocks.set(self.dirty_blocks.get() - gone);
        }
        let keep = ((block - start) * BLOCK) as usize;
        segment.buf = Arc::new(AlignedBuf::copy_of(&segment.buf[..keep]));
    }

    /// The next batch to write at or after `block`, at most `max` bytes: marks it
    /// as being written. Segments whose write is under way are passed over; their
    /// end brings them back.
    pub(super) fn next_batch(&self, block: u64, max: u64) -> Option<Batch> {
        let mut segments = self.segments.borrow_mut();
        let mut batch: Option<Batch> = None;
        let mut bytes = 0;
        for (&start, segment) in segments.range_mut(block..) {
            if !segment.dirty || segment.writing {
                if batch.is_some() {
                    break;
                }
                continue;
            }
            if let Some(have) = &batch {
                let blocks = bytes / BLOCK;
                let follows = start == have.start + blocks && segment.blkno == have.blkno + blocks;
                if !follows || bytes + segment.buf.len() as u64 > max {
                    break;
                }
            }
            segment.dirty = false;
            segment.writing = true;
            self.dirty_blocks
                .set(self.dirty_blocks.get() - segment.blocks());
            bytes += segment.buf.len() as u64;
            let batch = batch.get_or_insert(Batch {
                start,
                blkno: segment.blkno,
                bufs: Vec::new(),
            });
            batch.bufs.push(segment.buf.clone());
        }
        if batch.is_some() {
            self.writing.set(self.writing.get() + 1);
        }
        batch
    }

    /// A batch's write ended. After a failure its blocks are dirty again. A
    /// segment of one block at the end of the file stays buffered for the next
    /// append; the rest goes: the kernel has the pages.
    pub(super) fn written(&self, batch: &Batch, ok: bool) {
        self.writing.set(self.writing.get() - 1);
        let mut segments = self.segments.borrow_mut();
        let last = segments.keys().next_back().copied();
        let mut start = batch.start;
        for buf in &batch.bufs {
            let blocks = buf.len() as u64 / BLOCK;
            let blkno = batch.blkno + (start - batch.start);
            // The segment may have been cut or replaced meanwhile.
            let same = segments
                .get_mut(&start)
                .filter(|s| s.writing && s.blkno == blkno);
            if let Some(segment) = same {
                segment.writing = false;
                if !ok && !segment.dirty {
                    segment.dirty = true;
                    self.dirty_blocks
                        .set(self.dirty_blocks.get() + segment.blocks());
                }
                let tail = blocks == 1 && last == Some(start);
                if !segment.dirty && !tail {
                    segments.remove(&start);
                }
            }
            start += blocks;
        }
    }

    /// Drops clean buffers: the lock that covered them goes.
    pub(super) fn drop_clean(&self) {
        self.segments
            .borrow_mut()
            .retain(|_, s| s.dirty || s.writing);
        self.changed();
    }
}

/// The buffer's bytes without copying.
pub(super) fn shared(buf: &IoBuf) -> Bytes {
    Bytes::from_owner(SharedBuf(buf.clone()))
}

struct SharedBuf(IoBuf);

impl AsRef<[u8]> for SharedBuf {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Runs of blocks read before they were asked for.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// Where the next read of a sequential reader starts.
    pub expected: u64,
    /// Sequential reads in a row.
    pub streak: u32,
    /// End of what was asked from the device, in blocks.
    pub asked: u64,
    /// Runs by first block.
    pub runs: BTreeMap<u64, Rc<Run>>,
}

/// One run on its way from the device, or there.
#[derive(Debug)]
pub(super) struct Run {
    /// Number of blocks.
    pub blocks: u64,
    /// `None` while it is on its way; an inner `None` if the read failed.
    pub content: RefCell<Option<Option<IoBuf>>>,
    /// Wakes readers that wait for it.
    pub arrived: Signal,
}

impl ReadAhead {
    fn clear(&mut self) {
        self.runs.clear();
        self.asked = 0;
    }

    /// The run that has `block`.
    pub fn run_at(&self, block: u64) -> Option<(u64, Rc<Run>)> {
        let (&start, run) = self.runs.range(..=block).next_back()?;
        (block < start + run.blocks).then(|| (start, run.clone()))
    }
}

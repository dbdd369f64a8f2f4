//! The buffers against a plain array of bytes, and the preallocation policy.

use super::pages::InodeData;
use super::prealloc::{Hole, place, plan};
use super::{BLOCK, Policy};
use crate::env::{AlignedBuf, IoBuf};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

const BLOCKS: u64 = 24;

/// A file of `BLOCKS` blocks whose block n is mapped at n + 100, with a gap in
/// the mapping in the middle, so that batches must break there.
fn blkno_of(block: u64) -> u64 {
    block + if block < BLOCKS / 2 { 100 } else { 900 }
}

struct Model {
    data: InodeData,
    expected: Vec<u8>,
    device: Vec<u8>,
    in_flight: Vec<super::pages::Batch>,
}

impl Model {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        self.expected[offset as usize..end as usize].copy_from_slice(bytes);
        let half = BLOCKS / 2 * BLOCK;
        let device = &self.device;
        let old = |block: u64| -> Option<IoBuf> {
            let at = (block * BLOCK) as usize;
            Some(Arc::new(AlignedBuf::copy_of(
                &device[at..at + BLOCK as usize],
            )))
        };
        let cut = half.clamp(offset, end);
        for (from, to) in [(offset, cut), (cut, end)] {
            if from < to {
                let piece = &bytes[(from - offset) as usize..(to - offset) as usize];
                let (first, last) = (from / BLOCK, to.div_ceil(BLOCK));
                let whole = from.is_multiple_of(BLOCK) && to.is_multiple_of(BLOCK);
                if whole && !self.data.has_any(first, last) {
                    let buf = AlignedBuf::copy_of(piece);
                    self.data.adopt(first, blkno_of(first), buf);
                } else {
                    self.data.write(from, piece, blkno_of(first), &old);
                }
            }
        }
    }

    fn submit(&mut self, from: u64) {
        if let Some(batch) = self.data.next_batch(from, 6 * BLOCK) {
            for other in &self.in_flight {
                let (a, b) = (batch.start, batch.start + batch.bytes() / BLOCK);
                let (c, d) = (other.start, other.start + other.bytes() / BLOCK);
                assert!(b <= c || d <= a, "two writes of one block at once");
            }
            assert_eq!(batch.blkno, blkno_of(batch.start));
            self.in_flight.push(batch);
        }
    }

    fn complete(&mut self, index: usize, ok: bool) {
        let batch = self.in_flight.swap_remove(index);
        if ok {
            let mut at = (batch.start * BLOCK) as usize;
            for buf in &batch.bufs {
                self.device[at..at + buf.len()].copy_from_slice(buf);
                at += buf.len();
            }
        }
        self.data.written(&batch, ok);
    }

    fn check_reads(&self) {
        let mut block = 0;
        while block < BLOCKS {
            let at = (block * BLOCK) as usize;
            match self.data.read(block, BLOCKS) {
                Ok(bytes) => {
                    assert_eq!(bytes, self.expected[at..at + bytes.len()]);
                    block += bytes.len() as u64 / BLOCK;
                }
                Err(upto) => {
                    let to = (upto * BLOCK) as usize;
                    assert_eq!(self.device[at..to], self.expected[at..to]);
                    block = upto;
                }
            }
        }
    }
}

#[test]
fn buffers_and_device_together_are_the_file() {
    for seed in 0..200 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let bytes = (BLOCKS * BLOCK) as usize;
        let mut model = Model {
            data: InodeData::default(),
            expected: vec![0; bytes],
            device: vec![0; bytes],
            in_flight: Vec::new(),
        };
        for step in 0..300 {
            match rng.random_range(0..8) {
                0..=2 => {
                    let mut offset = rng.random_range(0..bytes as u64);
                    let most = (bytes as u64 - offset).min(5 * BLOCK);
                    let mut len = rng.random_range(1..=most) as usize;
                    if step % 2 == 0 {
                        // Whole blocks, which come in memory of their own.
                        offset -= offset % BLOCK;
                        len = len.next_multiple_of(BLOCK as usize);
                    }
                    model.write(offset, &vec![step as u8 ^ seed as u8; len]);
                }
                3 | 4 => model.submit(rng.random_range(0..BLOCKS)),
                5 | 6 if !model.in_flight.is_empty() => {
                    let index = rng.random_range(0..model.in_flight.len());
                    let ok = rng.random_range(0..4) > 0;
                    model.complete(index, ok);
                }
                _ => {
                    // Truncate, as far as nothing is on its way past the cut.
                    let block = rng.random_range(0..BLOCKS);
                    if model.in_flight.is_empty() && rng.random_range(0..4) == 0 {
                        model.data.drop_from(block);
                        let at = (block * BLOCK) as usize;
                        let device = model.device[at..].to_vec();
                        model.expected[at..].copy_from_slice(&device);
                    }
                }
            }
            model.check_reads();
        }
        while !model.data.is_idle() {
            model.submit(0);
            while !model.in_flight.is_empty() {
                model.complete(0, true);
            }
        }
        assert_eq!(model.device, model.expected, "seed {seed}");
        assert_eq!(model.data.dirty_blocks(), 0);
    }
}

fn hole(block: u64, online: u64) -> Hole {
    Hole {
        block,
        wanted: 1,
        region_in_use: false,
        next: None,
        online,
    }
}

#[test]
fn streaming_writes_preallocate_what_the_file_has() {
    let policy = Policy {
        prealloc_blocks: 32,
        ..Policy::default()
    };
    assert_eq!(plan(hole(0, 0), &policy), (0, 1));
    assert_eq!(plan(hole(1, 1), &policy), (1, 1));
    assert_eq!(plan(hole(2, 2), &policy), (2, 2));
    assert_eq!(plan(hole(16, 16), &policy), (16, 16));
    assert_eq!(plan(hole(64, 64), &policy), (64, 32));
    assert_eq!(plan(hole(64, 60), &policy), (64, 1), "not streaming");
    assert_eq!(
        plan(
            Hole {
                next: Some(70),
                ..hole(64, 64)
            },
            &policy
        ),
        (64, 6)
    );
    assert_eq!(
        plan(
            Hole {
                wanted: 40,
                ..hole(64, 64)
            },
            &policy
        ),
        (64, 40)
    );
}

/// The table of spec 14 section 26 for P = 8: blocks written into a file of 12
/// online blocks, and which region each write asks for.
#[test]
fn regions_are_filled_up_to_their_neighbours() {
    let policy = Policy {
        prealloc_blocks: 8,
        prealloc_contig_only: false,
        ..Policy::default()
    };
    let ask = |block, region_in_use, next, online| {
        plan(
            Hole {
                block,
                wanted: 1,
                region_in_use,
                next: Some(next),
                online,
            },
            &policy,
        )
    };
    assert_eq!(ask(0, false, 24, 12), (0, 8));
    assert_eq!(ask(15, false, 24, 13), (8, 8));
    assert_eq!(ask(25, true, 32, 15), (25, 7));
    assert_eq!(ask(39, true, 40, 16), (39, 1));
    assert_eq!(ask(44, true, 55, 17), (44, 4));
    assert_eq!(ask(62, false, 63, 19), (56, 7));
    assert_eq!(ask(92, true, 95, 22), (92, 3));
}

#[test]
fn a_short_allocation_still_covers_the_block() {
    assert_eq!(place(8, 8, 15), 8);
    assert_eq!(place(8, 3, 15), 13);
    assert_eq!(place(8, 1, 15), 15);
}

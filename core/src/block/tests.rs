//! Tests of the cache's stale rules and of transactions under failures.

use super::testvol::{FSID, Vol};
use super::*;
use crate::env::testing::{Executor, TestClock, block_on};
use crate::env::{Either, race};
use crate::format::{
    AllocListHead, BlockRef, LG_BLOCK_SHIFT, LG_BLOCK_SIZE, Magic, init_header, seal,
};
use std::cell::RefCell;
use std::future::Future;

/// Writes a bloom block with `fill` in its body, past the cache.
fn poke(vol: &Vol, blkno: u64, seq: u64, fill: u8) -> BlockRef {
    let mut block = vec![fill; LG_BLOCK_SIZE];
    init_header(&mut block, Magic::Bloom, FSID, blkno, seq);
    seal(&mut block);
    vol.dev.poke(blkno << LG_BLOCK_SHIFT, &block);
    BlockRef::new(blkno, seq)
}

fn read(vol: &Vol, block_ref: &BlockRef) -> Result<Rc<Block>, BlockError> {
    block_on(vol.cache.read_ref(block_ref, Magic::Bloom))
}

#[test]
fn an_old_cached_copy_is_dropped_once_and_an_old_reference_is_stale() {
    let vol = Vol::new(1, 64, Policy::default());
    let old = poke(&vol, 10, 100, 1);
    let held = read(&vol, &old).unwrap();
    let new = poke(&vol, 10, 200, 2);
    assert_eq!(read(&vol, &new).unwrap().bytes()[4096], 2);
    assert_eq!(held.bytes()[4096], 1, "a reader keeps its copy");
    assert_eq!(vol.cache.stats().dropped_stale, 1);
    let err = read(&vol, &old).unwrap_err();
    assert!(err.is_stale() && err.errno() == Errno::ESTALE, "{err}");
    assert_eq!(read(&vol, &new).unwrap().bytes()[4096], 2);
    let wrong = block_on(vol.cache.read_ref(&new, Magic::Btree)).unwrap_err();
    assert!(wrong.is_stale());
}

#[test]
fn damage_is_stale_and_references_outside_of_the_device_are_corrupt() {
    let vol = Vol::new(1, 64, Policy::default());
    let block_ref = poke(&vol, 10, 100, 1);
    let mut page = vol.dev.peek((10 << LG_BLOCK_SHIFT) + 8192, 4096);
    page[7] ^= 1;
    vol.dev.poke((10 << LG_BLOCK_SHIFT) + 8192, &page);
    let reads = vol.cache.stats().reads;
    let err = read(&vol, &block_ref).unwrap_err();
    assert!(matches!(
        err,
        BlockError::Stale {
            why: HeaderError::Crc { .. },
            ..
        }
    ));
    assert_eq!(vol.cache.stats().reads, reads + 2, "read twice");
    for blkno in [0, 1, 64, u64::MAX] {
        let err = read(&vol, &BlockRef::new(blkno, 1)).unwrap_err();
        assert_eq!(err.errno(), Errno::EIO, "{err}");
    }
    vol.dev.set_shut(true);
    let err = read(&vol, &BlockRef::new(11, 1)).unwrap_err();
    assert_eq!(
        (err.clone(), err.errno()),
        (BlockError::Shut, Errno::ENOLINK)
    );
}

#[test]
fn a_dirty_copy_is_never_dropped_for_an_old_reference() {
    let vol = Vol::new(1, 64, Policy::default());
    let mut block_ref = BlockRef::default();
    block_on(vol.tx.dirty_ref(&mut block_ref, Magic::Bloom)).unwrap();
    let reads = vol.cache.stats().reads;
    let old = BlockRef::new(block_ref.blkno.get(), 1);
    assert!(read(&vol, &old).unwrap_err().is_stale());
    assert_eq!(vol.cache.stats().reads, reads, "not read again");
    assert!(vol.tx.is_dirty(block_ref.blkno.get()));
    read(&vol, &block_ref).unwrap();
}

#[test]
fn misses_of_one_block_share_one_read_even_if_the_reader_goes_away() {
    let vol = Vol::new(1, 64, Policy::default());
    vol.dev.set_yields(true);
    let block_ref = poke(&vol, 10, 100, 1);
    let exec = Executor::new(TestClock::new());
    let got = Rc::new(RefCell::new(0));
    for _ in 0..5 {
        let (cache, got) = (vol.cache.clone(), got.clone());
        let reader = async move {
            cache.read_ref(&block_ref, Magic::Bloom).await.unwrap();
            *got.borrow_mut() += 1;
        };
        exec.spawn("reader", Box::pin(reader));
    }
    exec.block_on(async {
        while *got.borrow() < 5 {
            crate::env::testing::yield_now().await;
        }
    });
    assert_eq!(vol.cache.stats().reads, 1);
    vol.cache.drop_clean();
    let first = vol.cache.read_ref(&block_ref, Magic::Bloom);
    let second = async {
        // Joins the first read, which the race then drops.
        let mut joined = Box::pin(vol.cache.read_ref(&block_ref, Magic::Bloom));
        let probe = race(async {}, &mut joined).await;
        assert!(matches!(probe, Either::Left(())));
        joined.await
    };
    exec.block_on(async {
        let mut first = Box::pin(first);
        let mut second = Box::pin(second);
        std::future::poll_fn(|cx| {
            assert!(first.as_mut().poll(cx).is_pending());
            assert!(second.as_mut().poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        drop(first);
        second.await.unwrap();
    });
    assert_eq!(vol.cache.stats().reads, 3);
}

#[test]
fn clean_blocks_are_evicted_and_dirty_ones_are_not() {
    let policy = Policy {
        cache_blocks: 4,
        ..Policy::default()
    };
    let vol = Vol::new(1, 200, policy);
    let mut dirty = Vec::new();
    for _ in 0..10 {
        let mut block_ref = BlockRef::default();
        block_on(vol.tx.dirty_ref(&mut block_ref, Magic::Bloom)).unwrap();
        dirty.push(block_ref);
    }
    for blkno in 100..140 {
        let block_ref = poke(&vol, blkno, 5, 0);
        read(&vol, &block_ref).unwrap();
        assert!(vol.cache.len().0 <= 4);
    }
    let (clean, pinned) = vol.cache.len();
    assert_eq!(
        (clean, pinned),
        (4, 12),
        "ten blocks and two lists are dirty"
    );
    for block_ref in &dirty {
        read(&vol, block_ref).unwrap();
    }
    vol.tx.prepare_commit();
    block_on(vol.tx.write()).unwrap();
    assert_eq!(vol.cache.len(), (4, 0));
    for block_ref in &dirty {
        read(&vol, block_ref).unwrap();
    }
}

#[test]
fn copy_on_write_leaves_readers_their_content_and_copies_once() {
    let vol = Vol::new(1, 64, Policy::default());
    let old_ref = poke(&vol, 40, 100, 1);
    let mut block_ref = old_ref;
    block_on(vol.tx.dirty_ref(&mut block_ref, Magic::Bloom)).unwrap();
    assert_ne!(block_ref.blkno, old_ref.blkno);
    assert_ne!(block_ref.seq, old_ref.seq);
    let blkno = block_ref.blkno.get();
    let before = read(&vol, &block_ref).unwrap();
    vol.tx.edit(blkno, |b| b[4096] = 9);
    assert_eq!((before.bytes()[4096], before.bytes()[4097]), (1, 1));
    assert_eq!(read(&vol, &block_ref).unwrap().bytes()[4096], 9);
    let mut again = block_ref;
    block_on(vol.tx.dirty_ref(&mut again, Magic::Bloom)).unwrap();
    assert_eq!(again, block_ref, "dirty blocks are changed in place");
    vol.tx.prepare_commit();
    block_on(vol.tx.write()).unwrap();
    assert_eq!(
        read(&vol, &old_ref).unwrap().bytes()[4096],
        1,
        "the old version stays"
    );
    block_on(vol.tx.dirty_ref(&mut again, Magic::Bloom)).unwrap();
    assert_ne!(again, block_ref, "clean again after the commit");
    let (_, freed) = vol.tx.heads();
    let (entries, _) = vol.list(&freed);
    assert!(entries.contains(&40) && entries.contains(&blkno));
}

#[test]
fn failed_writes_and_flushes_leave_everything_dirty() {
    let policy = Policy {
        write_batch_blocks: 2,
        write_depth: 2,
        ..Policy::default()
    };
    let vol = Vol::new(1, 64, policy);
    let mut block_ref = BlockRef::default();
    for _ in 0..9 {
        block_ref = BlockRef::default();
        block_on(vol.tx.dirty_ref(&mut block_ref, Magic::Bloom)).unwrap();
    }
    vol.tx.prepare_commit();
    let dirty = vol.tx.dirty_blknos();
    for fails in ["write", "flush"] {
        vol.dev.set_fault(Some(Box::new(move |op| op.op == fails)));
        let err = block_on(vol.tx.write()).unwrap_err();
        assert_eq!(err.errno(), Errno::EIO);
        assert_eq!(vol.tx.dirty_blknos(), dirty);
    }
    vol.dev.set_fault(None);
    let (_, writes, flushes) = vol.dev.counts();
    block_on(vol.tx.write()).unwrap();
    let (_, more_writes, more_flushes) = vol.dev.counts();
    assert_eq!(more_flushes, flushes + 1);
    // Block 2, then 4 to 13: adjacent ones two by two.
    assert_eq!((dirty.len(), more_writes - writes), (11, 6));
    assert_eq!(vol.tx.dirty_blocks(), 0);
    vol.cache.drop_clean();
    read(&vol, &block_ref).unwrap();
}

#[test]
fn a_nearly_full_freed_list_is_rotated_and_counts_as_room() {
    let policy = Policy {
        list_max: 20,
        list_rotate: 5,
        ..Policy::default()
    };
    let vol = Vol::new(1, 200, policy);
    for blkno in 100..115 {
        block_on(vol.tx.free_meta(blkno)).unwrap();
    }
    // Fifteen and the first list block.
    assert_eq!(vol.tx.remaining().freed, 4);
    assert!(vol.tx.meta_low(5));
    vol.tx.prepare_commit();
    block_on(vol.tx.write()).unwrap();
    assert_eq!(vol.tx.remaining().freed, 18, "the next use rotates");
    block_on(vol.tx.free_meta(150)).unwrap();
    let (_, freed) = vol.tx.heads();
    // The old first list block is not freed: it is the second of the chain.
    assert_eq!((freed.first_nr.get(), freed.total_nr.get()), (2, 18));
    let (_, blocks) = vol.list(&freed);
    assert_eq!(blocks.len(), 2);
    assert_eq!(vol.tx.remaining().freed, 18);
    for blkno in 151..169 {
        block_on(vol.tx.free_meta(blkno)).unwrap();
    }
    let full = block_on(vol.tx.free_meta(170)).unwrap_err();
    assert_eq!(
        (full.clone(), full.errno()),
        (BlockError::FreedFull, Errno::EIO)
    );
    let outside = block_on(vol.tx.free_meta(200)).unwrap_err();
    assert_eq!(outside.errno(), Errno::EINVAL);
}

#[test]
fn lists_that_can_not_be_read_or_lie_change_nothing() {
    let vol = Vol::new(1, 64, Policy::default());
    let (avail, freed) = vol.tx.heads();
    vol.dev.set_fault(Some(Box::new(|_| true)));
    assert_eq!(
        block_on(vol.tx.alloc_meta()).unwrap_err().errno(),
        Errno::EIO
    );
    assert_eq!((vol.tx.heads(), vol.tx.dirty_blocks()), ((avail, freed), 0));
    vol.dev.set_fault(None);
    let lies = AllocListHead {
        first_nr: 7.into(),
        ..avail
    };
    vol.tx.set_heads(lies, freed);
    let err = block_on(vol.tx.alloc_meta()).unwrap_err();
    assert!(matches!(err, BlockError::Corrupt(_)), "{err}");
    let stale = AllocListHead {
        block_ref: BlockRef::new(3, 77),
        ..avail
    };
    vol.tx.set_heads(stale, freed);
    let err = block_on(vol.tx.alloc_meta()).unwrap_err();
    assert_eq!(err.errno(), Errno::EIO, "only we write lists: {err}");
    vol.tx.set_heads(AllocListHead::default(), freed);
    assert_eq!(block_on(vol.tx.alloc_meta()), Err(BlockError::NoSpace));
    vol.tx.set_heads(avail, freed);
    block_on(vol.tx.alloc_meta()).unwrap();
    vol.tx.forget_all();
    assert_eq!((vol.tx.heads(), vol.tx.dirty_blocks()), ((avail, freed), 0));
    assert_eq!(vol.cache.len().1, 0);
}

//! The vectors of spec 03 section 24, and random loads with every block counted.

use super::*;
use crate::block::{Cache, ListBlockMut, list_head_of};
use crate::env::Entropy;
use crate::env::testing::{MemDevice, TestEntropy, block_on};
use crate::format::{AllocListHead, AllocRoot, BlockRef, LG_BLOCK_SIZE, Magic, init_header, seal};
use std::collections::BTreeSet;
use std::rc::Rc;

/// A transaction with plenty of blocks, on an otherwise empty device.
fn tx() -> Tx {
    let dev = MemDevice::new(20_000 * LG_BLOCK_SIZE as u64);
    let mut block = vec![0; LG_BLOCK_SIZE];
    let entries: Vec<u64> = (8..8000).collect();
    let head = list_head_of(&mut block, BlockRef::new(2, 1), &entries);
    init_header(&mut block, Magic::AllocList, 7, 2, 1);
    seal(&mut block);
    dev.poke(2 * LG_BLOCK_SIZE as u64, &block);
    let policy = Rc::new(Policy::default());
    let cache = Cache::new(dev.handle(), TestEntropy::new(1), 7, policy);
    Tx::new(cache, head, AllocListHead::default())
}

fn extents(tx: &Tx, root: &AllocRoot) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut note = |e: FreeExtent| found.push((e.start, e.len));
    block_on(read_extents(tx.cache(), root, &mut note)).unwrap();
    let total: u64 = found.iter().map(|(_, len)| len).sum();
    assert_eq!(total, root.total_len.get());
    found
}

fn tree(tx: &Tx, list: &[(u64, u64)]) -> AllocRoot {
    let mut root = AllocRoot::default();
    for (start, len) in list {
        block_on(insert_extent(tx, &mut root, *start, *len)).unwrap();
    }
    root
}

#[test]
fn extents_join_split_and_refuse_overlaps() {
    let tx = tx();
    let mut root = tree(&tx, &[(100, 10), (120, 5), (110, 10)]);
    assert_eq!(extents(&tx, &root), [(100, 25)]);
    block_on(remove_extent(&tx, &mut root, 105, 5)).unwrap();
    assert_eq!(extents(&tx, &root), [(100, 5), (110, 15)]);
    let err = block_on(insert_extent(&tx, &mut root, 107, 10)).unwrap_err();
    assert!(matches!(err, AllocError::Overlap { .. }));
    let err = block_on(remove_extent(&tx, &mut root, 100, 6)).unwrap_err();
    assert!(matches!(err, AllocError::NotContained { .. }));
    for (start, len) in [(200, 8), (300, 64)] {
        block_on(insert_extent(&tx, &mut root, start, len)).unwrap();
    }
    assert_eq!(
        extents(&tx, &root),
        [(100, 5), (110, 15), (200, 8), (300, 64)]
    );

    let mut dst = AllocRoot::default();
    block_on(move_extents(&tx, &mut dst, &mut root, 70, None, 0)).unwrap();
    assert_eq!(extents(&tx, &root), [(100, 5), (116, 9), (200, 8)]);
    assert_eq!(extents(&tx, &dst), [(110, 6), (300, 64)]);
    let err = block_on(move_extents(&tx, &mut dst, &mut root, 1000, None, 0)).unwrap_err();
    assert_eq!(err, AllocError::NoExtent);
    assert_eq!(extents(&tx, &root), []);
    assert_eq!(
        extents(&tx, &dst),
        [(100, 5), (110, 15), (200, 8), (300, 64)]
    );
}

#[test]
fn moves_prefer_exclusive_then_vacant_zones() {
    let tx = tx();
    let mut src = tree(
        &tx,
        &[(64, 10000), (20000, 5000), (30000, 300), (45000, 4000)],
    );
    let mut dst = AllocRoot::default();
    let mut zones = Zones {
        zone_blocks: 10000,
        exclusive: [0; 16],
        vacant: [0; 16],
    };
    zones.exclusive[0] = 1 << 3;
    zones.vacant[0] = 1 | 1 << 4;
    let mut go = |count| {
        block_on(move_extents(
            &tx,
            &mut dst,
            &mut src,
            count,
            Some(&zones),
            0,
        ))
        .unwrap();
        (extents(&tx, &src), extents(&tx, &dst))
    };
    let (left, got) = go(200);
    assert_eq!(
        left,
        [(64, 10000), (20000, 5000), (30200, 100), (45000, 4000)]
    );
    assert_eq!(got, [(30000, 200)]);
    let (left, got) = go(1000);
    assert_eq!(left, [(964, 9100), (20000, 5000), (45000, 4000)]);
    assert_eq!(got, [(64, 900), (30000, 300)]);
    let (left, got) = go(14000);
    assert_eq!(left, [(20900, 4100)]);
    assert_eq!(
        got,
        [(64, 10000), (20000, 900), (30000, 300), (45000, 4000)]
    );

    let mut data = DataAlloc::new(src, AllocRoot::default());
    let ext = |start, len| FreeExtent { start, len };
    assert_eq!(block_on(data.alloc_data(&tx, 5)).unwrap(), ext(20900, 5));
    assert_eq!(data.total_len(), 4095);
    assert_eq!(
        block_on(data.alloc_data(&tx, 5000)).unwrap(),
        ext(22948, 2052)
    );
    block_on(data.return_cached(&tx)).unwrap();
    assert_eq!(extents(&tx, &data.avail), [(20905, 2043)]);
    for (start, len) in [(63, 1), (64, 0), (99, 2)] {
        let err = block_on(data.free_data(&tx, start, len, 100)).unwrap_err();
        assert!(matches!(err, AllocError::OutOfRange { .. }));
    }
    block_on(data.free_data(&tx, 99, 1, 100)).unwrap();
    assert_eq!(extents(&tx, &data.freed), [(99, 1)]);
}

#[test]
fn an_empty_allocator_asks_for_a_refill_unless_the_volume_is_low() {
    let tx = tx();
    let mut data = DataAlloc::new(AllocRoot::default(), AllocRoot::default());
    assert_eq!(block_on(data.alloc_data(&tx, 1)), Err(AllocError::Refill));
    set_root_low(&mut data.avail, true);
    assert_eq!(block_on(data.alloc_data(&tx, 1)), Err(AllocError::NoSpace));
    assert_eq!(
        block_on(data.alloc_data(&tx, 9000)),
        Err(AllocError::NoSpace)
    );
}

#[test]
fn a_budget_bounds_a_move_but_one_extent_always_moves() {
    let tx = tx();
    let list: Vec<(u64, u64)> = (0..200).map(|i| (i * 10, 3)).collect();
    let (mut src, mut dst) = (tree(&tx, &list), AllocRoot::default());
    let mut calls = 0;
    while src.total_len.get() > 0 {
        let (before, total) = (src.total_len.get(), src.total_len.get());
        match block_on(move_extents(&tx, &mut dst, &mut src, total, None, 1)) {
            Ok(()) | Err(AllocError::InProgress) => {}
            Err(err) => panic!("{err}"),
        }
        assert!(src.total_len.get() < before);
        calls += 1;
    }
    assert_eq!(calls, 200);
}

/// Blocks of a list, by walking its chain.
fn entries(tx: &Tx, head: &AllocListHead) -> Vec<u64> {
    let (mut all, mut next) = (Vec::new(), head.block_ref);
    while !next.is_null() {
        let block = block_on(tx.read_list(&next)).unwrap();
        let (mut found, after) = crate::block::list_entries(block.bytes()).unwrap();
        all.append(&mut found);
        next = after;
    }
    assert_eq!(all.len() as u64, head.total_nr.get());
    all
}

#[test]
fn lists_fill_splice_and_empty_without_losing_a_block() {
    let tx = tx();
    let entropy = TestEntropy::new(3);
    let mut root = tree(&tx, &[(10_000, 500), (11_000, 40), (12_000, 3)]);
    let whole: BTreeSet<u64> = [(10_000, 500), (11_000, 40), (12_000, 3)]
        .into_iter()
        .flat_map(|(start, len)| start..start + len)
        .collect();
    let mut heads = [AllocListHead::default(); 3];
    for _ in 0..200 {
        let at = entropy.range(0, 3) as usize;
        match entropy.range(0, 4) {
            3 => {
                let target = entropy.range(1, 200) as u32;
                let mut src = std::mem::take(&mut heads[(at + 1) % 3]);
                block_on(recycle_list(&tx, &mut src, &mut heads[at], target, target)).unwrap();
                let got = heads[at].first_nr.get();
                assert!(got >= target || src == AllocListHead::default(), "{got}");
                heads[(at + 1) % 3] = src;
            }
            0 => {
                let target = entropy.range(1, 200) as u32;
                let filled = fill_list(&tx, &mut heads[at], &mut root, target, target);
                assert!(matches!(
                    block_on(filled),
                    Ok(()) | Err(AllocError::NoSpace)
                ));
            }
            1 => {
                let mut src = std::mem::take(&mut heads[(at + 1) % 3]);
                block_on(splice_list(&tx, &mut heads[at], &mut src)).unwrap();
                assert_eq!(src, AllocListHead::default());
            }
            _ => block_on(empty_list(&tx, &mut heads[at], &mut root, u32::MAX)).unwrap(),
        }
        let lists = heads.iter().flat_map(|head| entries(&tx, head));
        let free = extents(&tx, &root)
            .into_iter()
            .flat_map(|(start, len)| start..start + len);
        let all: Vec<u64> = lists.chain(free).collect();
        assert_eq!(all.len(), whole.len());
        assert_eq!(all.into_iter().collect::<BTreeSet<_>>(), whole);
    }
}

#[test]
fn a_list_that_is_not_what_its_head_says_is_not_taken_over() {
    let tx = tx();
    let mut root = tree(&tx, &[(10_000, 500)]);
    let (mut dst, mut src) = (AllocListHead::default(), AllocListHead::default());
    block_on(fill_list(&tx, &mut dst, &mut root, 30, 30)).unwrap();
    block_on(fill_list(&tx, &mut src, &mut root, 40, 40)).unwrap();
    let wrong = |f: &dyn Fn(&mut AllocListHead)| {
        let mut head = src;
        f(&mut head);
        head
    };
    let nothing = AllocListHead::default();
    for mut head in [
        wrong(&|h| h.first_nr = 39.into()),
        wrong(&|h| h.first_nr = 0.into()),
        wrong(&|h| h.total_nr = 41.into()),
        wrong(&|h| h.total_nr = u64::MAX.into()),
        wrong(&|h| h.block_ref = nothing.block_ref),
        wrong(&|h| h.block_ref.seq += 1),
    ] {
        let before = (dst, head);
        let taken = block_on(splice_list(&tx, &mut dst, &mut head));
        assert!(matches!(taken, Err(AllocError::Btree(_))), "{taken:?}");
        assert_eq!((dst, head), before);
    }
    // One that leads back to itself.
    tx.edit(src.block_ref.blkno.get(), |b| {
        ListBlockMut::new(b).head().next = src.block_ref;
    });
    let taken = block_on(splice_list(&tx, &mut dst, &mut src));
    assert!(matches!(taken, Err(AllocError::Btree(_))), "{taken:?}");
}

#[test]
fn the_running_lists_are_not_touched() {
    let tx = tx();
    let mut root = tree(&tx, &[(10_000, 5)]);
    let (mut running, _) = tx.heads();
    let refused = Err(AllocError::RunningList);
    let filled = fill_list(&tx, &mut running, &mut root, 8185, 8185);
    assert_eq!(block_on(filled), refused);
    assert_eq!(
        block_on(empty_list(&tx, &mut running, &mut root, 1)),
        refused
    );
    let mut other = AllocListHead::default();
    let recycled = recycle_list(&tx, &mut running, &mut other, 1, 1);
    assert_eq!(block_on(recycled), refused);
    assert_eq!(
        block_on(splice_list(&tx, &mut other, &mut running)),
        refused
    );
}

//! The check against volumes of the original, fresh volumes, and damage.

use super::*;
use crate::env::Entropy;
use crate::env::testing::{TestEntropy, block_on};
use crate::volume::golden::{Golden, golden};

fn run(volume: &Golden, strict: bool) -> Report {
    let options = CheckOptions {
        strict,
        ..CheckOptions::default()
    };
    block_on(check(volume.meta.handle(), volume.data.handle(), &options))
}

fn show(report: &Report) -> String {
    let lines = report.problems.iter().take(40).map(|p| format!("{p}\n"));
    lines.collect::<String>() + &format!("{:?}", report.stats)
}

#[test]
fn fresh_volumes_of_the_original_are_clean() {
    for name in ["a", "a1", "asmall"] {
        let report = run(&golden(name), false);
        assert!(report.is_clean(), "{name}: {}", show(&report));
        assert_eq!(report.state, State::Unmounted);
        assert_eq!(report.stats.inodes, 1);
        assert_eq!(report.stats.meta_leaked, 0);
        let kinds: Vec<Kind> = report.problems.iter().map(|p| p.kind).collect();
        assert!(kinds.contains(&Kind::MkfsHeight), "{name}: {kinds:?}");
        assert!(!run(&golden(name), true).is_clean());
    }
}

#[test]
fn a_populated_volume_of_the_original_is_clean() {
    let report = run(&golden("b"), false);
    assert!(report.is_clean(), "{}", show(&report));
    assert_eq!(report.state, State::Unmounted);
    // The level 1 parent of its merged log tree, which the original never frees.
    assert_eq!(report.stats.meta_leaked, 1);
    // One entry for each path of the manifest but the root.
    assert_eq!(report.stats.entries, 5315);
    assert_eq!(report.stats.data_leaked, 0);
}

#[test]
fn a_crashed_volume_of_the_original_is_clean() {
    let report = run(&golden("c1"), false);
    assert!(report.is_clean(), "{}", show(&report));
    assert_eq!(report.state, State::InUse);
}

/// Offsets and sizes of the blocks that a check of the volume reads.
fn blocks_read(volume: &Golden) -> Vec<(u64, usize)> {
    let reads = Rc::new(RefCell::new(Vec::new()));
    let seen = reads.clone();
    volume.meta.set_fault(Some(Box::new(move |op| {
        seen.borrow_mut().push((op.offset, op.len));
        false
    })));
    run(volume, false);
    volume.meta.set_fault(None);
    reads.take()
}

fn copy(volume: &Golden) -> Golden {
    Golden {
        meta: volume.meta.snapshot(),
        data: volume.data.clone(),
    }
}

/// Changes a block and gives it a good CRC.
fn edit(volume: &Golden, (offset, len): (u64, usize), change: impl FnOnce(&mut [u8])) {
    let mut block = volume.meta.peek(offset, len);
    change(&mut block);
    seal(&mut block);
    volume.meta.poke(offset, &block);
}

fn edit_super(volume: &Golden, change: impl FnOnce(&mut SuperBlock)) {
    edit(
        volume,
        (SUPER_BLKNO << SM_BLOCK_SHIFT, SM_BLOCK_SIZE),
        |b| {
            let mut sb = SuperBlock::from_block(b);
            change(&mut sb);
            b[..size_of::<SuperBlock>()].copy_from_slice(zerocopy::IntoBytes::as_bytes(&sb));
        },
    );
}

/// Damages blocks at random, with good CRCs; no check may panic or run away, and
/// of the damage, some of which hits unused bytes, at least a part must be named.
fn survive_damage(name: &str, seed: u64, rounds: u64, percent: u64) {
    let volume = golden(name);
    let blocks = blocks_read(&volume);
    let total = blocks.len() as u64;
    let entropy = TestEntropy::new(seed);
    let mut named = 0;
    for round in 0..rounds {
        let hurt = copy(&volume);
        for _ in 0..=entropy.range(0, 3) {
            let block = blocks[entropy.range(0, total) as usize];
            edit(&hurt, block, |b| damage(&*entropy, b));
        }
        let before = hurt.meta.counts().0;
        let report = run(&hurt, false);
        let reads = hurt.meta.counts().0 - before;
        assert!(
            reads <= 4 * total,
            "{name} seed {seed} round {round}: {reads} reads"
        );
        named += u64::from(report.errors > 0);
    }
    assert!(
        named * 100 >= rounds * percent,
        "{name}: only {named} of {rounds} named"
    );
}

/// Random bytes, a random field, a block of noise, or a block of zeros.
fn damage(entropy: &dyn Entropy, block: &mut [u8]) {
    let header = size_of::<BlockHeader>();
    let used = if entropy.range(0, 2) == 0 {
        400
    } else {
        block.len() as u64
    };
    match entropy.range(0, 8) {
        0 => block[header..].fill(0),
        1 => block[header..].fill_with(|| entropy.next_u64() as u8),
        2..=4 => {
            let at = entropy.range(header as u64, used.min(block.len() as u64 - 8)) as usize;
            block[at..at + 8].copy_from_slice(&entropy.next_u64().to_le_bytes());
        }
        _ => {
            for _ in 0..4 {
                let at = entropy.range(4, used) as usize;
                block[at] = entropy.next_u64() as u8;
            }
        }
    }
}

#[test]
fn random_damage_is_survived_and_named() {
    survive_damage("b", 1, 8, 60);
    survive_damage("c1", 2, 20, 50);
    survive_damage("asmall", 3, 80, 40);
}

fn run_with(volume: &Golden, memo: Option<&Rc<Memo>>) -> Report {
    let options = CheckOptions {
        memo: memo.cloned(),
        ..CheckOptions::default()
    };
    block_on(check(volume.meta.handle(), volume.data.handle(), &options))
}

/// Changes a volume again and again and takes most of it back again; after each change
/// a check that remembers the earlier ones must say what one says that does not.
fn remember(name: &str, seed: u64, rounds: u64) {
    let good = golden(name);
    let volume = copy(&good);
    let blocks = blocks_read(&volume);
    let entropy = TestEntropy::new(seed);
    let memo = Rc::new(Memo::default());
    let mut hurt: Vec<(u64, usize)> = Vec::new();
    let mut different = 0;
    let mut last = run_with(&volume, Some(&memo));
    for round in 0..rounds {
        for _ in 0..entropy.range(0, 3) {
            let block = blocks[entropy.range(0, blocks.len() as u64) as usize];
            edit(&volume, block, |b| damage(&*entropy, b));
            memo.forget(block.0, block.1 as u64);
            hurt.push(block);
        }
        // Two whole blocks change places, with the numbers that they should have there.
        if entropy.range(0, 4) == 0 {
            let pick = |_| blocks[entropy.range(0, blocks.len() as u64) as usize];
            let [a, b] = [0, 1].map(pick);
            if a.1 == b.1 {
                let [of_a, of_b] = [a, b].map(|at| volume.meta.peek(at.0, at.1));
                for (at, bytes) in [(a, of_b), (b, of_a)] {
                    volume.meta.poke(at.0, &bytes);
                    let blkno = at.0 / at.1 as u64;
                    edit(&volume, at, |block| {
                        let at = std::mem::offset_of!(BlockHeader, blkno);
                        block[at..at + 8].copy_from_slice(&blkno.to_le_bytes());
                    });
                    memo.forget(at.0, at.1 as u64);
                    hurt.push(at);
                }
            }
        }
        while !hurt.is_empty() && entropy.range(0, 3) > 0 {
            let at = entropy.range(0, hurt.len() as u64) as usize;
            let block = hurt.swap_remove(at);
            volume.meta.poke(block.0, &good.meta.peek(block.0, block.1));
            memo.forget(block.0, block.1 as u64);
        }
        let (incremental, whole) = (run_with(&volume, Some(&memo)), run_with(&volume, None));
        assert!(
            incremental == whole,
            "{name} seed {seed} round {round}:\n{}\n{}",
            show(&incremental),
            show(&whole)
        );
        different += u64::from(whole != last);
        last = whole;
    }
    assert!(different > rounds / 4, "{name}: only {different} changes");
}

#[test]
fn a_check_that_remembers_says_what_a_whole_one_says() {
    remember("b", 1, 12);
    remember("c1", 2, 60);
    remember("asmall", 3, 200);
}

#[test]
fn a_check_that_remembers_reads_what_has_changed() {
    let volume = copy(&golden("c1"));
    let memo = Rc::new(Memo::default());
    let reads = || {
        let before = volume.meta.counts().0;
        let report = run_with(&volume, Some(&memo));
        assert!(report.is_clean() && report.stats.blocks_read > 10);
        let small = QUORUM_MAX_SLOTS as u64;
        assert_eq!(memo.len() as u64, report.stats.blocks_read + small);
        volume.meta.counts().0 - before
    };
    let whole = reads();
    // Only the super block.
    assert_eq!(reads(), 1);
    let large: Vec<_> = blocks_read(&volume)
        .into_iter()
        .filter(|b| b.1 == LG_BLOCK_SIZE)
        .collect();
    assert_eq!(whole, 1 + (QUORUM_MAX_SLOTS + large.len()) as u64);
    memo.forget(large[3].0 + 5000, 1);
    assert_eq!(reads(), 2);
    memo.forget(large[3].0, 1);
    assert_eq!(reads(), 2);
    memo.forget(large[3].0 + LG_BLOCK_SIZE as u64 - 1, 1);
    assert_eq!(reads(), 2);
    memo.forget(large[3].0, 0);
    assert_eq!(reads(), 1);
    memo.forget((QUORUM_BLKNO << SM_BLOCK_SHIFT) - 1, 2);
    assert_eq!(reads(), 2);
    memo.forget_all();
    assert!(memo.is_empty());
    assert_eq!(reads(), whole);
    // Another volume on the same device.
    memo.begin(7);
    assert!(memo.is_empty());
}

#[test]
fn damage_of_the_super_block_is_named() {
    let volume = golden("c1");
    let entropy = TestEntropy::new(9);
    for _ in 0..60 {
        let hurt = copy(&volume);
        let at = entropy.range(600, 968) as usize;
        let super_block = (SUPER_BLKNO << SM_BLOCK_SHIFT, SM_BLOCK_SIZE);
        edit(&hurt, super_block, |b| b[at] ^= 1 << entropy.range(0, 8));
        run(&hurt, false);
    }
    let named = |kind: Kind, change: &dyn Fn(&mut SuperBlock)| {
        let hurt = copy(&volume);
        edit_super(&hurt, change);
        let report = run(&hurt, false);
        let kinds = report
            .problems
            .iter()
            .filter(|p| p.severity == Severity::Error);
        assert!(
            kinds.clone().any(|p| p.kind == kind),
            "{kind:?}: {}",
            show(&report)
        );
    };
    named(Kind::Count, &|sb| sb.inode_count += 1);
    named(Kind::Count, &|sb| sb.seq.set(3));
    named(Kind::Inode, &|sb| sb.next_ino.set(1500));
    named(Kind::Alloc, &|sb| sb.data_alloc.total_len += 1);
    named(Kind::Alloc, &|sb| sb.server_meta_avail[0].first_nr += 1);
    named(Kind::Tree, &|sb| sb.fs_root.height = 21);
    named(Kind::Tree, &|sb| sb.fs_root.height = 2);
    named(Kind::Block, &|sb| sb.fs_root.block_ref.seq.set(4));
    named(Kind::Block, &|sb| sb.fs_root.block_ref.blkno.set(u64::MAX));
    named(Kind::Census, &|sb| sb.meta_alloc[0] = sb.meta_alloc[1]);
    named(Kind::Census, &|sb| {
        sb.server_meta_freed[1] = sb.server_meta_freed[0]
    });
    named(Kind::Census, &|sb| sb.srch_root = sb.logs_root);
    named(Kind::Quorum, &|sb| sb.hdr.fsid.set(5));
    named(Kind::Super, &|sb| sb.flags.set(0));
}

#[test]
fn an_unreadable_super_is_not_checked() {
    let volume = golden("asmall");
    volume
        .meta
        .poke(SUPER_BLKNO << SM_BLOCK_SHIFT, &[0; SM_BLOCK_SIZE]);
    let report = run(&volume, false);
    assert_eq!(report.state, State::Unreadable);
    assert!(!report.is_clean());
}

#[test]
fn read_errors_are_named() {
    let volume = golden("c1");
    for (offset, _) in blocks_read(&volume) {
        let hurt = copy(&volume);
        let hook = move |op: crate::env::testing::DeviceOp| op.offset == offset;
        hurt.meta.set_fault(Some(Box::new(hook)));
        assert!(!run(&hurt, false).is_clean(), "read error at {offset}");
    }
}

/// Finds the leaf that holds a key and changes the item's value there.
fn edit_value(volume: &Golden, find: impl Fn(&Key) -> bool, change: impl FnOnce(&mut [u8])) {
    for (offset, len) in blocks_read(volume)
        .into_iter()
        .filter(|b| b.1 == LG_BLOCK_SIZE)
    {
        let block = volume.meta.peek(offset, len);
        let magic = read_header(&block).magic.get();
        if magic != Magic::Btree.value() {
            continue;
        }
        let parsed = parse_btree_block(&block);
        let item = parsed
            .items
            .iter()
            .find(|i| parsed.level == 0 && find(&i.key));
        if let Some(item) = item.copied() {
            edit(volume, (offset, len), |b| {
                change(&mut b[item.val_off..item.val_off + item.val_len]);
            });
            return;
        }
    }
    panic!("no such item");
}

#[test]
fn wrong_values_of_items_are_named() {
    let volume = golden("b");
    let named = |kind: Kind, find: fn(&Key) -> bool, change: &dyn Fn(&mut [u8])| {
        let hurt = copy(&volume);
        edit_value(&hurt, find, change);
        let report = run(&hurt, false);
        assert!(
            report
                .problems
                .iter()
                .any(|p| p.severity == Severity::Error && p.kind == kind),
            "{kind:?}: {}",
            show(&report)
        );
    };
    fn is(k: &Key, kind: u8) -> bool {
        k.zone == ZONE_FS && k.kind == kind
    }
    // Link count, size of the root directory, next_readdir_pos, online_blocks.
    named(Kind::Inode, |k| is(k, TYPE_INODE), &|v| v[72] += 1);
    named(Kind::Inode, |k| *k == Key::inode(1), &|v| v[0] += 1);
    named(Kind::Inode, |k| *k == Key::inode(1), &|v| v[48] = 2);
    named(Kind::Inode, |k| is(k, TYPE_INODE) && k.first > 2000, &|v| {
        v[32] += 1
    });
    named(Kind::Index, |k| is(k, TYPE_INODE), &|v| v[8] -= 1);
    named(Kind::Dirent, |k| is(k, TYPE_DIRENT), &|v| v[32] ^= 1);
    named(Kind::Dirent, |k| is(k, TYPE_DIRENT), &|v| v[0] ^= 1);
    named(Kind::Dirent, |k| is(k, TYPE_READDIR), &|v| v[24] ^= 1);
    named(Kind::Dirent, |k| is(k, TYPE_LINK_BACKREF), &|v| v[32] ^= 1);
    named(Kind::Symlink, |k| is(k, TYPE_SYMLINK), &|v| v[0] = 0);
    named(Kind::Xattr, |k| is(k, TYPE_XATTR) && k.fourth == 0, &|v| {
        v[9] ^= 1
    });
    named(Kind::Census, |k| is(k, TYPE_DATA_EXTENT), &|v| v[0] ^= 1);
    named(Kind::Extent, |k| is(k, TYPE_DATA_EXTENT), &|v| v[8] = 4);
    named(Kind::Totl, |k| k.zone == ZONE_XATTR_TOTL, &|v| v[0] ^= 1);
    named(Kind::Quota, |k| k.zone == ZONE_QUOTA, &|v| v[33] ^= 1);
    named(Kind::Srch, |k| k.zone == ZONE_SRCH, &|v| v[72] += 1);
}

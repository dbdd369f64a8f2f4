//! Walks over the inode indexes (spec 15 section 3).

use super::*;
use crate::fs::api::{Archive, IndexEntry, InodeIndex};

/// Another mount of the volume, with locks of its own: it need not take back those that
/// the first one changes indexes with.
fn another(w: &World) -> Rc<Fs> {
    World::mount(&w.world, &w.log, &w.kernel, &w.server, 2)
}

fn at(major: u64, ino: Ino) -> IndexEntry {
    IndexEntry { major, ino }
}

fn walk(
    w: &World,
    index: InodeIndex,
    from: IndexEntry,
    to: IndexEntry,
    max: usize,
) -> Vec<(u64, Ino)> {
    let found = w.run(another(w).walk_inodes(index, from, to, max)).unwrap();
    found.iter().map(|entry| (entry.major, entry.ino)).collect()
}

fn all(w: &World, index: InodeIndex) -> Vec<(u64, Ino)> {
    walk(w, index, IndexEntry::default(), IndexEntry::LAST, 1000)
}

/// Ends the transaction, and lets the next one have this seq.
fn commit_to(w: &World, seq: u64) {
    w.log.seq.set(seq);
}

#[test]
fn inodes_are_listed_at_their_last_change_and_only_when_committed() {
    let w = World::new(2);
    let (dir, (file, _)) = (
        w.mkdir(ROOT_INO, "d").unwrap(),
        w.create(ROOT_INO, "f").unwrap(),
    );
    assert_eq!(
        all(&w, InodeIndex::MetaSeq),
        [],
        "the root has moved as well"
    );
    commit_to(&w, 5001);
    let made = [(5000, 1), (5000, dir), (5000, file)];
    assert_eq!(all(&w, InodeIndex::MetaSeq), made);
    assert_eq!(all(&w, InodeIndex::DataSeq), [(5000, file)], "only files");
    // The change moves it; nothing of the open transaction is shown.
    w.mkdir(dir, "below").unwrap();
    assert_eq!(all(&w, InodeIndex::MetaSeq), [(5000, 1), (5000, file)]);
    commit_to(&w, 5002);
    let shown = all(&w, InodeIndex::MetaSeq);
    assert_eq!(shown[..2], [(5000, 1), (5000, file)]);
    assert!(shown.contains(&(5001, dir)) && shown.len() == 4);
    assert_eq!(w.run(w.fs.committed_seq()), Ok(5001));
}

#[test]
fn a_walk_keeps_to_its_bounds() {
    let w = World::new(2);
    let inos: Vec<Ino> = (0..9)
        .map(|n| w.create(ROOT_INO, &n.to_string()).unwrap().0)
        .collect();
    commit_to(&w, 5001);
    let files: Vec<_> = inos.iter().map(|ino| (5000, *ino)).collect();
    let data = |from, to, max| walk(&w, InodeIndex::DataSeq, from, to, max);
    assert_eq!(data(at(5000, inos[3]), IndexEntry::LAST, 2), files[3..5]);
    assert_eq!(data(at(0, 0), at(5000, inos[1]), 99), files[..2]);
    assert_eq!(data(at(5000, inos[4]), at(5000, inos[4]), 99), files[4..5]);
    assert_eq!(data(at(5000, inos[8] + 1), IndexEntry::LAST, 99), []);
    assert_eq!(data(at(5001, 0), at(5000, 0), 99), [], "first behind last");
    assert_eq!(data(at(0, 0), IndexEntry::LAST, 0), []);
    // One after the other, as an agent does.
    let mut from = Some(IndexEntry::default());
    let mut one_by_one = Vec::new();
    while let Some(place) = from {
        let next = data(place, IndexEntry::LAST, 1);
        from = next
            .first()
            .and_then(|(major, ino)| at(*major, *ino).next());
        one_by_one.extend(next);
    }
    assert_eq!(one_by_one, files);
}

#[test]
fn a_walk_goes_on_from_lock_to_lock() {
    let w = World::new(2);
    let mut files = Vec::new();
    // The last of one lock's seqs, the first of the next one's, and far away.
    for seq in [5119, 5120, 9000, 1 << 40] {
        commit_to(&w, seq);
        files.push((seq, w.create(ROOT_INO, &seq.to_string()).unwrap().0));
    }
    commit_to(&w, (1 << 40) + 1);
    assert_eq!(all(&w, InodeIndex::DataSeq), files);
    assert_eq!(
        walk(&w, InodeIndex::DataSeq, at(5120, 0), at(9000, u64::MAX), 9),
        files[1..3]
    );
    let root = (1 << 40, ROOT_INO);
    assert_eq!(all(&w, InodeIndex::MetaSeq)[3], root);
}

#[test]
fn errors_give_what_was_found_before() {
    let w = World::new(2);
    for n in 0..3 {
        w.create(ROOT_INO, &n.to_string()).unwrap();
    }
    commit_to(&w, 5001);
    let walk =
        || w.run(another(&w).walk_inodes(InodeIndex::DataSeq, at(0, 0), IndexEntry::LAST, 9));
    // First the range of seq 0, then the files.
    for (successes, found) in [(0, None), (1, None), (2, Some(1)), (3, Some(2))] {
        w.log.fail_in.set(Some(successes));
        let walked = walk().map(|found| found.len());
        assert_eq!(walked, found.ok_or(E::ENOSPC), "{successes}");
    }
    w.log.fail_in.set(None);
    assert_eq!(walk().map(|found| found.len()), Ok(3));
}

#[test]
fn more_of_an_inode() {
    let w = World::new(2);
    let (file, _) = w.create(ROOT_INO, "f").unwrap();
    commit_to(&w, 5001);
    let set = SetAttr {
        size: Some(5000),
        ..SetAttr::default()
    };
    w.run(w.fs.setattr(&ROOT, file, &set)).unwrap();
    commit_to(&w, 5002);
    let set = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    w.run(w.fs.setattr(&ROOT, file, &set)).unwrap();
    let stat = w.run(w.fs.stat_more(file)).unwrap();
    assert_eq!((stat.meta_seq, stat.data_seq), (5002, 5001));
    assert_eq!((stat.online_blocks, stat.offline_blocks), (0, 0));
    assert_eq!(w.run(w.fs.stat_more(99_999)), Err(E::ESTALE));
}

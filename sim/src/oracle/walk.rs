//! The contract of the walks over the inode indexes (spec 15 sections 3 and 26):
//! whoever remembers how far it came, and goes on from there, misses no change at or
//! below the committed seq, whatever dies in between; and that seq never falls.
//!
//! Followers are archive agents. One goes on behind the last entry it was shown; one
//! also trusts the committed seq: when nothing is left to be shown it goes on behind
//! the seq that it had asked for before. What they know outlives every mount, and they
//! may ask another one each time. At the end, when all is well, each goes on until
//! nothing is left, and must have been shown every inode at its last seq.
//!
//! What can go wrong: judging an answer that never came. A step whose mount dies leaves
//! the follower where it was; that it takes part in a step ends with the step's task.

use super::Violation;
use outrider_core::fs::api::{IndexEntry, Ino, InodeIndex, StatMore};
use std::collections::BTreeSet;
use std::rc::{Rc, Weak};

/// Followers in a world: one of each index that goes by entries, and one that trusts
/// the committed seq.
pub const FOLLOWERS: u8 = 4;

/// A place in an index, for people: the seq and the inode.
pub fn place(entry: &IndexEntry) -> String {
    format!("{}.{}", entry.major, entry.ino)
}

struct Follower {
    index: InodeIndex,
    trusts_seq: bool,
    at: Option<IndexEntry>,
    seen: BTreeSet<(Ino, u64)>,
    busy: Weak<()>,
}

/// A step that a follower takes. The follower is busy until this is dropped.
pub struct Step {
    number: usize,
    /// What it walks.
    pub index: InodeIndex,
    /// Where it goes on.
    pub from: IndexEntry,
    /// No answer to come may be below: answers that there were before it was asked.
    floor: u64,
    _busy: Rc<()>,
}

/// All followers of a world.
pub struct Followers {
    all: Vec<Follower>,
    /// The greatest committed seq that was told so far.
    told: u64,
    broken: Option<String>,
}

impl Default for Followers {
    fn default() -> Self {
        let follower = |number: u8| Follower {
            index: match number % 2 {
                0 => InodeIndex::MetaSeq,
                _ => InodeIndex::DataSeq,
            },
            trusts_seq: number >= 2,
            at: Some(IndexEntry::default()),
            seen: BTreeSet::new(),
            busy: Weak::new(),
        };
        Self {
            all: (0..FOLLOWERS).map(follower).collect(),
            told: 0,
            broken: None,
        }
    }
}

impl Followers {
    /// A follower begins a step; `None` if it is at one, or has nowhere to go.
    pub fn begin(&mut self, number: u8) -> Option<Step> {
        let number = usize::from(number % FOLLOWERS);
        let follower = &mut self.all[number];
        if follower.busy.strong_count() > 0 {
            return None;
        }
        let busy = Rc::new(());
        follower.busy = Rc::downgrade(&busy);
        Some(Step {
            number,
            index: follower.index,
            from: follower.at?,
            floor: self.told,
            _busy: busy,
        })
    }

    /// The committed seq that the follower was told in this step.
    pub fn committed(&mut self, step: &Step, seq: u64) {
        if seq < step.floor {
            let floor = step.floor;
            self.breaks(format!("the committed seq fell from {floor} to {seq}"));
        }
        self.told = self.told.max(seq);
    }

    /// What the follower was shown, at most `max` entries, and the committed seq that it
    /// had been told before.
    pub fn walked(&mut self, step: &Step, seq: u64, max: usize, shown: &[IndexEntry]) {
        let index = step.index;
        if shown.len() > max {
            let count = shown.len();
            self.breaks(format!(
                "{count} entries of {index:?} where {max} were wanted"
            ));
        }
        let mut from = Some(step.from);
        for entry in shown {
            if from.is_none_or(|from| *entry < from) {
                let (entry, from) = (place(entry), from.as_ref().map(place));
                self.breaks(format!("{entry} of {index:?} is not at or behind {from:?}"));
            }
            from = entry.next();
        }
        let follower = &mut self.all[step.number];
        let seen = shown.iter().map(|entry| (entry.ino, entry.major));
        follower.seen.extend(seen);
        follower.at = from;
        if shown.is_empty() && follower.trusts_seq {
            let behind = IndexEntry {
                major: seq,
                ..IndexEntry::LAST
            };
            follower.at = follower.at.max(behind.next());
        }
    }

    /// Nothing was left to be shown to any of them, after the committed seq had been
    /// `seq`; this is an inode as it is now.
    pub fn last(&mut self, seq: u64, ino: Ino, is_file: bool, stat: &StatMore) {
        let mut missed = Vec::new();
        for (number, follower) in self.all.iter().enumerate() {
            let major = match follower.index {
                InodeIndex::MetaSeq => stat.meta_seq,
                InodeIndex::DataSeq if is_file => stat.data_seq,
                InodeIndex::DataSeq => continue,
            };
            if major <= seq && !follower.seen.contains(&(ino, major)) {
                missed.push(format!(
                    "follower {number} of {:?} was never shown inode {ino} at {major}, and has \
                     come to {}; the committed seq is {seq}",
                    follower.index,
                    follower.at.as_ref().map_or("the end".to_owned(), place)
                ));
            }
        }
        missed.into_iter().for_each(|text| self.breaks(text));
    }

    fn breaks(&mut self, text: String) {
        self.broken.get_or_insert(text);
    }

    /// Steps that have not ended, for a failure of liveness.
    pub fn walking(&self) -> Vec<String> {
        let all = self.all.iter().enumerate();
        all.filter(|(_, follower)| follower.busy.strong_count() > 0)
            .map(|(number, follower)| {
                let (index, at) = (follower.index, follower.at.as_ref().map(place));
                format!("step of follower {number} of {index:?} from {at:?}")
            })
            .collect()
    }

    /// What was broken first.
    ///
    /// # Errors
    /// That.
    pub fn verdict(&self) -> Result<(), Violation> {
        match &self.broken {
            None => Ok(()),
            Some(text) => Err(Violation {
                kind: "walk",
                text: text.clone(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(major: u64, ino: Ino) -> IndexEntry {
        IndexEntry { major, ino }
    }

    /// Followers 0 and 2 take a step each.
    fn step(all: &mut Followers, seq: u64, shown: &[IndexEntry]) {
        for number in [0, 2] {
            let step = all.begin(number).expect("not busy");
            all.committed(&step, seq);
            let shown: Vec<_> = shown.iter().filter(|e| **e >= step.from).copied().collect();
            all.walked(&step, seq, 9, &shown);
        }
    }

    fn stat(meta_seq: u64) -> StatMore {
        StatMore {
            meta_seq,
            data_seq: 7,
            ..StatMore::default()
        }
    }

    fn broken(all: &Followers) -> String {
        all.verdict().expect_err("something is broken").text
    }

    #[test]
    fn an_inode_that_moves_is_seen_at_its_last_seq() {
        let mut all = Followers::default();
        step(&mut all, 5, &[at(3, 1), at(5, 2)]);
        step(&mut all, 8, &[at(5, 2), at(8, 1)]);
        step(&mut all, 8, &[]);
        all.last(8, 1, false, &stat(8));
        all.last(8, 2, false, &stat(5));
        // It is behind what is committed: to be shown later.
        all.last(8, 3, false, &stat(9));
        assert_eq!(all.verdict(), Ok(()));
    }

    #[test]
    fn an_inode_that_was_never_shown_is_missed() {
        let mut all = Followers::default();
        step(&mut all, 5, &[at(3, 1), at(5, 2)]);
        all.last(5, 1, false, &stat(3));
        assert_eq!(all.verdict(), Ok(()));
        all.last(5, 4, false, &stat(5));
        assert!(broken(&all).contains("never shown inode 4 at 5"));
    }

    #[test]
    fn an_entry_that_appears_behind_the_follower_is_missed() {
        let mut all = Followers::default();
        step(&mut all, 5, &[at(5, 2)]);
        // Who asks from there is not shown what was added before.
        step(&mut all, 6, &[at(4, 1), at(6, 9)]);
        all.last(6, 1, false, &stat(4));
        assert!(broken(&all).contains("follower 0"));
    }

    #[test]
    fn only_who_trusts_the_seq_misses_what_is_committed_below_it() {
        let mut all = Followers::default();
        step(&mut all, 9, &[]);
        step(&mut all, 9, &[at(8, 1)]);
        all.last(9, 1, false, &stat(8));
        assert!(broken(&all).contains("follower 2"));
    }

    #[test]
    fn files_are_followed_by_contents_too() {
        let mut all = Followers::default();
        step(&mut all, 9, &[at(9, 1)]);
        all.last(9, 1, true, &stat(9));
        assert!(broken(&all).contains("follower 1 of DataSeq"));
    }

    #[test]
    fn the_committed_seq_may_not_fall() {
        let mut all = Followers::default();
        let early = all.begin(0).expect("not busy");
        step_alone(&mut all, 2, 9);
        // It was asked before the other was answered.
        all.committed(&early, 7);
        assert_eq!(all.verdict(), Ok(()));
        drop(early);
        step_alone(&mut all, 0, 8);
        assert_eq!(broken(&all), "the committed seq fell from 9 to 8");
    }

    fn step_alone(all: &mut Followers, number: u8, seq: u64) {
        let step = all.begin(number).expect("not busy");
        all.committed(&step, seq);
    }

    #[test]
    fn entries_out_of_order_twice_or_too_many_are_refused() {
        for shown in [
            [at(5, 2), at(5, 1)],
            [at(5, 2), at(5, 2)],
            [at(1, 1), at(1, 2)],
        ] {
            let mut all = Followers::default();
            let first = all.begin(0).expect("not busy");
            all.walked(&first, 9, 1, &[at(4, 1)]);
            drop(first);
            assert_eq!(all.verdict(), Ok(()));
            let step = all.begin(0).expect("not busy");
            all.walked(&step, 9, 2, &shown);
            assert!(broken(&all).contains("not at or behind"), "{shown:?}");
        }
        let mut all = Followers::default();
        let step = all.begin(0).expect("not busy");
        all.walked(&step, 9, 1, &[at(5, 1), at(5, 2)]);
        assert!(broken(&all).contains("2 entries"));
    }

    #[test]
    fn a_follower_takes_one_step_at_a_time() {
        let mut all = Followers::default();
        let step = all.begin(0);
        assert!(step.is_some() && all.begin(0).is_none() && all.begin(4).is_none());
        assert_eq!(all.walking().len(), 1);
        // Its mount dies: no answer.
        drop(step);
        assert_eq!(all.begin(0).expect("not busy").from, IndexEntry::default());
    }
}

//! Which attributes the kernel was told it may believe until their lock is taken
//! back, and to which it is better not to say so.
//!
//! A notification that reaches the kernel between an answer with attributes and the
//! moment at which the caller that asked for them runs makes the kernel throw the
//! answer away, and the caller goes on with what was there before: a file that has
//! grown since reads as short as it was. Nothing tells when a caller has run. So
//! attributes are given to believe only where no notification is near:
//!
//! * A lock that was taken back and came again has to stay for [`SETTLED`] before
//!   GETATTR's answers are to be believed. Until then each is good for itself only, and
//!   taking the lock back needs no notification. An entry's attributes are always to be
//!   believed: the caller goes on with them to an open, and would find the inode gone if
//!   it had to ask again and somebody replaced the file meanwhile.
//! * While anything of a group is believed, its answers of the last [`CONSUMED`] are left
//!   alone before the kernel is notified.
//!
//! What can go wrong: a caller that does not run for longer than that, just when a
//! lock is taken. Its one read may then be short.

use super::api::Ino;
use super::table::group_of;
use crate::env::{Duration, Time};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// How long a lock that came back must stay until its attributes are given to believe.
pub const SETTLED: Duration = Duration::from_millis(20);
/// How long a caller has to take its answer.
pub const CONSUMED: Duration = Duration::from_millis(1);

/// Groups remembered that nothing is believed of.
const QUIET_MAX: usize = 4096;

/// When a lock came back.
#[derive(Clone, Copy, Debug, Default)]
enum Since {
    /// It was never away.
    #[default]
    Ever,
    /// It is away, or nobody has asked since it came.
    Away,
    /// The first who asked.
    Asked(Time),
}

#[derive(Debug, Default)]
struct Group {
    since: Since,
    /// When the last attributes were given.
    given: Option<Time>,
    inos: BTreeSet<Ino>,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Beliefs {
    groups: RefCell<BTreeMap<Ino, Group>>,
}

impl Beliefs {
    /// Whether attributes of the inode may be given to believe; if so it is noted that
    /// they are. Call under the lock, in the step that answers.
    pub fn give(&self, ino: Ino, now: Time) -> bool {
        let mut groups = self.groups.borrow_mut();
        let group = groups.entry(group_of(ino)).or_default();
        group.given = Some(now);
        let settled = match group.since {
            Since::Ever => true,
            Since::Away => {
                group.since = Since::Asked(now);
                false
            }
            Since::Asked(at) => now.since(at) >= SETTLED,
        };
        if settled {
            group.inos.insert(ino);
        }
        settled
    }

    /// Notes that the kernel believes something of the inode, however long its lock is
    /// here: an entry's attributes, or an ACL.
    pub fn keeps(&self, ino: Ino, now: Time) {
        let mut groups = self.groups.borrow_mut();
        let group = groups.entry(group_of(ino)).or_default();
        group.given = Some(now);
        group.inos.insert(ino);
    }

    /// The lock is taken back: the inodes of the group that the kernel believes
    /// something of, and the time before which it should not be told to forget it.
    pub fn take(&self, ino: Ino) -> (Vec<Ino>, Option<Time>) {
        let mut groups = self.groups.borrow_mut();
        let group = groups.insert(
            group_of(ino),
            Group {
                since: Since::Away,
                ..Group::default()
            },
        );
        if groups.len() > QUIET_MAX {
            groups.retain(|_, group| !group.inos.is_empty());
        }
        let Some(group) = group else {
            return (Vec::new(), None);
        };
        let given = group.given.filter(|_| !group.inos.is_empty());
        let until = given.map(|given| given + CONSUMED);
        (group.inos.into_iter().collect(), until)
    }

    /// The kernel forgot the inode.
    pub fn forget(&self, ino: Ino) {
        let mut groups = self.groups.borrow_mut();
        if let Some(group) = groups.get_mut(&group_of(ino)) {
            group.inos.remove(&ino);
            if group.inos.is_empty() && matches!(group.since, Since::Ever) {
                groups.remove(&group_of(ino));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time(ms * 1_000_000)
    }

    #[test]
    fn attributes_of_a_lock_that_goes_around_are_not_believed() {
        let beliefs = Beliefs::default();
        assert!(beliefs.give(5, at(0)), "it was never taken");
        assert!(beliefs.give(6, at(1)));
        assert_eq!(beliefs.take(7), (vec![5, 6], Some(at(2))));
        for ms in [10, 20, 29] {
            assert!(!beliefs.give(5, at(ms)), "it came back a moment ago");
        }
        assert_eq!(beliefs.take(5), (Vec::new(), None), "nothing to be told");
        assert!(!beliefs.give(5, at(40)));
        assert!(beliefs.give(5, at(60)), "it has settled");
        assert!(beliefs.give(1024, at(0)), "another lock");
        beliefs.forget(5);
        assert!(beliefs.take(5).0.is_empty());
    }

    #[test]
    fn what_the_kernel_keeps_anyway_is_forgotten_too() {
        let beliefs = Beliefs::default();
        beliefs.take(5);
        assert!(!beliefs.give(5, at(0)));
        beliefs.keeps(5, at(1));
        assert!(!beliefs.give(6, at(3)));
        let until = at(4);
        assert_eq!(
            beliefs.take(5),
            (vec![5], Some(until)),
            "the answer about 6 too"
        );
    }
}

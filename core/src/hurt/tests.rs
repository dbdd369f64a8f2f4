//! Seeded damage in the ordinary tests: a few hundred cases of each kind.

use super::volume::Subject;
use super::{messages, tree};
use crate::env::Entropy;
use crate::env::testing::TestEntropy;
use crate::errno::Errno;

/// Runs `cases` damaged copies; how many the check named.
fn survive(subject: &Subject, seed: u64, cases: u32) -> (u32, u32) {
    let entropy = TestEntropy::new(seed);
    let (mut named, mut refused) = (0, 0);
    for case in 0..cases {
        let damage = subject.draw(&*entropy);
        let outcome = subject.exercise(&damage);
        let shown = || format!("seed {seed} case {case}: {damage:?}");
        if outcome.before.errors > 0 {
            named += 1;
            let names = outcome.before.problems.iter();
            assert!(
                names.clone().any(|p| !p.to_string().is_empty()),
                "{}",
                shown()
            );
        }
        refused += u32::from(outcome.errors.contains(&Errno::EIO.0));
    }
    (named, refused)
}

#[test]
fn damaged_volumes_give_errors_to_users_and_names_to_the_checker() {
    let (mut named, mut refused) = (0, 0);
    for (n, subject) in Subject::made().iter().enumerate() {
        let counts = survive(subject, 100 + n as u64, 60);
        named += counts.0;
        refused += counts.1;
    }
    assert!(named > 50, "only {named} of 120 were named");
    assert!(refused > 10, "only {refused} of 120 were noticed by users");
}

#[test]
fn damaged_volumes_of_the_original_give_errors_too() {
    let (named, _) = survive(&Subject::golden("c1"), 7, 12);
    assert!(named > 4, "only {named} of 12 were named");
    survive(&Subject::golden("asmall"), 8, 20);
}

#[test]
fn damaged_trees_end_operations_with_errors() {
    let trees = tree::Trees::new();
    let entropy = TestEntropy::new(31);
    for _ in 0..2000 {
        let len = entropy.range(10, 200);
        let bytes: Vec<u8> = (0..len).map(|_| entropy.next_u64() as u8).collect();
        trees.exercise(&bytes);
    }
}

/// A COMMIT_LOG_TREES whose freed list has another count than its head says went into the
/// server's own list. Found by the fuzz target, which takes the first byte for itself.
const FREED_LIST_NOT_AS_TOLD: &[u8] = include_bytes!("inputs/messages-freed-list-not-as-told");
/// A grant that says that the lock was not held, of one with cached items.
const GRANT_OF_A_HELD_LOCK: &[u8] = include_bytes!("inputs/messages-grant-of-a-held-lock");
/// A COMMIT_LOG_TREES with a root higher than trees are: what it had freed was given back
/// in commit after commit, none of which had room for so high a tree.
const ROOT_OF_NO_TREE: &[u8] = include_bytes!("inputs/messages-root-of-no-tree");
/// A datagram with the greatest term that there is: the next election had no greater one.
const GREATEST_TERM: &[u8] = include_bytes!("inputs/datagrams-greatest-term");

#[test]
fn changed_messages_harm_nobody() {
    let wires = messages::Wires::new();
    wires.exercise(&FREED_LIST_NOT_AS_TOLD[1..]);
    wires.exercise(&GRANT_OF_A_HELD_LOCK[1..]);
    wires.exercise(&ROOT_OF_NO_TREE[1..]);
    messages::datagrams(&GREATEST_TERM[1..]);
    let entropy = TestEntropy::new(41);
    for _ in 0..60 {
        wires.exercise(&messages::draw(&*entropy));
    }
    for _ in 0..2000 {
        let len = entropy.range(10, 400);
        let bytes: Vec<u8> = (0..len).map(|_| entropy.next_u64() as u8).collect();
        messages::datagrams(&bytes);
    }
}

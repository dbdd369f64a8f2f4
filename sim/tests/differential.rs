//! The simulated backends against the real ones, in short: same calls, same answers, same
//! metadata at the same places, same bytes. `outrider-sim differential` does more of it.
#![cfg(madsim)]

use outrider_core::errno::Errno;
use outrider_sim::differential::{Difference, Heard, Left, Source, compare, real, simulated};
use outrider_sim::model::Reply;

const CALLS: usize = 250;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

fn none() -> Vec<Difference> {
    Vec::new()
}

#[test]
fn real_and_simulated_backends_answer_and_leave_the_same() {
    for (seed, threads) in [(0, false), (1, true)] {
        let dir = directory();
        let one = simulated(seed, Source::Draw(seed, CALLS)).expect("a simulated run");
        let other = real::real(dir.path(), threads, Source::Again(one.steps.clone()));
        let other = other.expect("a run on the real machine");
        assert_eq!(compare(&one, &other, 5), none());
        let left = one.left.as_ref().expect("what is left");
        assert!(one.replies.len() > CALLS && left.records.len() > 200);
        assert!(left.blocks.len() > 10, "{}", left.blocks.len());
        let failed = |reply: &&Reply| matches!(reply, Reply::Err(_));
        let failed = one.replies.iter().filter(failed).count();
        assert!(failed < one.replies.len() / 3, "{failed} calls failed");
    }
}

#[test]
fn programs_on_a_mount_are_answered_as_in_the_simulator() {
    if let Some(why) = real::cannot_mount() {
        println!("skipped: {why}");
        return;
    }
    let dir = directory();
    let one = simulated(3, Source::Draw(3, CALLS)).expect("a simulated run");
    let other = real::mounted(dir.path(), false, &one).expect("a run on a mount");
    assert_eq!(compare(&one, &other, 5), none());
}

fn left(heard: &mut Heard) -> &mut Left {
    heard.left.as_mut().expect("what is left")
}

#[test]
fn neither_the_order_of_tasks_nor_a_lie_goes_unnoticed() {
    let play = |seed, source| simulated(seed, source).expect("a simulated run");
    let one = play(1, Source::Draw(7, CALLS));
    // Another order of tasks, other latencies: the same answers.
    let mut other = play(2, Source::Again(one.steps.clone()));
    assert_eq!(compare(&one, &other, 5), none());
    let at = other.replies.len() / 2;
    let answer = std::mem::replace(&mut other.replies[at], Reply::Err(Errno::EIO));
    assert_eq!(compare(&one, &other, 5)[0].step, Some(at));
    other.replies[at] = answer;
    *left(&mut other)
        .blocks
        .values_mut()
        .next()
        .expect("some data") ^= 1;
    let found = compare(&one, &other, 5);
    assert!(
        found.len() == 1 && found[0].text.contains("block at"),
        "{found:?}"
    );
    *left(&mut other)
        .blocks
        .values_mut()
        .next()
        .expect("some data") ^= 1;
    left(&mut other).records.pop();
    assert!(compare(&one, &other, 5)[0].text.contains("records"));
}

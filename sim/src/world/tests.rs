//! The judge is judged: the right reference passes, each wrong one is caught.

use super::*;
use crate::plan::{Plan, Profile};
use crate::reference::{CLUSTER_FLAWS, FLAWS, Reference};
use crate::world::node::Outrider;

fn run_reference(seed: u64, mutant: Option<&'static str>) -> Outcome {
    let options = Options {
        mutant,
        ..Options::default()
    };
    run::<Reference>(&Plan::stressed(seed, None), options)
}

#[test]
fn the_right_reference_passes() {
    let failing: Vec<_> = (0..120)
        .filter_map(|seed| Some((seed, run_reference(seed, None).failure?)))
        .collect();
    assert_eq!(failing, []);
}

#[test]
fn no_window_of_the_reference_is_given_up() {
    let unjudged: u64 = (200..260)
        .map(|seed| run_reference(seed, None).unjudged)
        .sum();
    assert_eq!(unjudged, 0);
}

#[test]
fn a_seed_gives_the_same_events_twice() {
    for seed in 0..10 {
        let (first, second) = (run_reference(seed, None), run_reference(seed, None));
        assert_eq!(first, second);
        assert!(first.events > 100);
    }
}

#[test]
fn every_wrong_reference_is_caught() {
    for flaw in FLAWS {
        let found = (0..150).find(|seed| run_reference(*seed, Some(flaw)).failure.is_some());
        assert!(found.is_some(), "{flaw} was not found");
    }
}

fn run_cluster(seed: u64, mutant: Option<&'static str>) -> Outcome {
    let options = Options {
        mutant,
        ..Options::default()
    };
    run::<Reference>(&Plan::from_seed(seed, Some(Profile::Cluster)), options)
}

#[test]
fn the_right_reference_passes_on_several_nodes() {
    let outcomes: Vec<_> = (0..80).map(|seed| run_cluster(seed, None)).collect();
    let failing: Vec<_> = outcomes
        .iter()
        .filter_map(|outcome| Some((outcome.seed, outcome.failure.as_ref()?)))
        .collect();
    assert_eq!(failing, []);
    let unjudged: u64 = outcomes.iter().map(|outcome| outcome.unjudged).sum();
    assert!(unjudged < 8, "{unjudged} windows were not judged");
}

#[test]
fn every_wrong_reference_is_caught_on_several_nodes() {
    for flaw in CLUSTER_FLAWS {
        let found = (0..100).find(|seed| run_cluster(*seed, Some(flaw)).failure.is_some());
        assert!(found.is_some(), "{flaw} was not found");
    }
}

/// A world of the filesystem itself, checked at every so many commits. In a debug build
/// each of these checks is compared with one that remembers nothing.
fn run_checked(mut plan: Plan, every: u32, mutant: Option<&'static str>) -> Outcome {
    plan.config.check_every = every;
    let options = Options {
        mutant,
        ..Options::default()
    };
    run::<Outrider>(&plan, options)
}

#[test]
fn checks_at_commits_change_nothing_and_find_nothing() {
    for seed in 0..3 {
        for plan in [
            Plan::from_seed(seed, None),
            Plan::from_seed(seed, Some(Profile::Cluster)),
        ] {
            let checked = run_checked(plan.clone(), 1, None);
            assert_eq!(checked.failure, None);
            assert_eq!(checked, run_checked(plan, 0, None));
        }
    }
}

#[test]
fn what_one_commit_shows_and_the_next_puts_right_is_found() {
    let mutant = Some("avail_head_late");
    let (mut found, mut only) = (0, 0);
    for seed in 0..12 {
        let plan = Plan::from_seed(seed, None);
        let Some(failure) = run_checked(plan.clone(), 1, mutant).failure else {
            continue;
        };
        assert_eq!(failure.kind, "check");
        assert!(
            failure.text.contains(" s, when node 0 had written"),
            "{failure:?}"
        );
        found += 1;
        only += u32::from(run_checked(plan, 0, mutant).failure.is_none());
    }
    assert!(
        found >= 3 && only >= 1,
        "{found} found, {only} of them only so"
    );
}

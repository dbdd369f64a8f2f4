//! The judge is judged: the right reference passes, each wrong one is caught.

use super::*;
use crate::plan::{Plan, Profile};
use crate::reference::{CLUSTER_FLAWS, FLAWS, Reference};

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

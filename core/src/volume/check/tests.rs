//! The check against volumes of the original, fresh volumes, and damage.

use super::*;
use crate::env::testing::block_on;
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

//! The small configurations, and proof that the search sees planted bugs;
//! `outrider-sim explore` runs all of them.

use super::Report;
use super::scenarios::SCENARIOS;
use outrider_core::env::set_mutant;

const LIMIT: u64 = 400_000;

fn explore(name: &str) -> Report {
    let scenario = SCENARIOS.iter().find(|s| s.name == name);
    scenario.expect("a scenario").run(LIMIT)
}

#[test]
fn the_small_configurations_keep_every_invariant_in_every_order() {
    for scenario in SCENARIOS.iter().filter(|s| s.small) {
        let report = scenario.run(LIMIT);
        if let Some((broken, way)) = &report.violation {
            panic!("{}: {broken}\n  {}", scenario.name, way.join("\n  "));
        }
        assert!(
            report.complete,
            "{} is too large: {report:?}",
            scenario.name
        );
    }
}

/// Runs a scenario with a planted bug and returns what was broken.
fn broken(mutant: &'static str, scenario: &str) -> String {
    set_mutant(Some(mutant));
    let report = explore(scenario);
    set_mutant(None);
    report.violation.expect("a planted bug is seen").0
}

#[test]
fn a_leader_that_was_slow_to_record_its_election_is_seen() {
    let text = broken("stale_leader_starts", "two-members");
    assert!(text.contains("two mounts may write"), "{text}");
}

#[test]
fn a_server_that_writes_before_its_fence_is_recorded_is_seen() {
    let text = broken("fence_recorded_late", "lone-member");
    assert!(text.contains("two mounts may write"), "{text}");
}

#[test]
fn a_stop_that_hides_an_unfenced_predecessor_is_seen() {
    let text = broken("stop_hides_predecessor", "lone-member");
    assert!(text.contains("two mounts may write"), "{text}");
}

#[test]
fn a_grant_taken_while_the_cleanup_runs_is_seen() {
    let text = broken("early_grant_applied", "readers-and-writer");
    assert!(text.contains("cleans up"), "{text}");
}

#[test]
fn a_mount_that_tells_less_than_it_has_in_recovery_is_seen() {
    let text = broken("recovery_tells_new_mode", "readers-and-writer");
    assert!(text.contains("the server records less"), "{text}");
}

#[test]
fn a_waiter_that_nobody_asks_for_after_a_revocation_is_seen() {
    let text = broken("revoked_asks_for_nobody", "readers-and-writer");
    assert!(text.contains("waits for ever"), "{text}");
}

#[test]
fn a_member_that_votes_twice_is_seen() {
    let text = broken("votes_twice", "three-members");
    assert!(text.contains("votes twice"), "{text}");
}

//! Earlier leaders: those that step down by themselves are not fenced, all others are.

use super::protocol::Agent;
use super::{FSID, addr, block_policy, volume_of};
use crate::env::testing::TestWorld;
use crate::env::{DeviceRole, Duration, Env, Time};
use crate::format::QuorumEventKind as Kind;
use crate::quorum::BlockIo;
use crate::server::actor::fence_leaders;
use crate::server::fence::Fences;
use crate::server::{Policy, ServerConfig, ServerError};
use std::sync::Arc;

const OLD: u64 = 2000;
const OLD_TERM: u64 = 6;
const TERM: u64 = 9;

fn io(env: &Env) -> BlockIo {
    let meta = env.devices.open(DeviceRole::Meta).unwrap();
    BlockIo::new(meta, FSID)
}

async fn record(env: &Env, kind: Kind, rid: u64, term: u64) {
    let written = io(env).update(1, kind, rid, term, Time(1)).await;
    written.unwrap();
}

/// What comes of fencing the leaders before, which takes how long and fences whom, for
/// the leader of `slot`: `before` is recorded of the old leader in slot 1, and later what
/// `events` say, in milliseconds. The agent knows already that `dead` are.
fn decided(
    slot: u16,
    before: &[(Kind, u64)],
    events: Vec<(u64, Kind, u64, u64)>,
    dead: &[u64],
) -> (Result<(), ServerError>, Vec<u64>, Duration) {
    let world: TestWorld = volume_of(7, 3);
    let env = world.env();
    let agent = Arc::new(Agent::default());
    agent.gone.lock().unwrap().extend(dead);
    let config = ServerConfig {
        fsid: FSID,
        rid: 1000,
        term: TERM,
        addr: addr(19700 + slot),
        policy: Policy::default(),
        block_policy: block_policy(),
        fence: agent.clone(),
        cluster_key: None,
        reports: crate::server::ReportBoard::default(),
    };
    world.block_on(async {
        for (kind, term) in before {
            record(&env, *kind, OLD, *term).await;
        }
        let fences = Fences::new(&env, agent.clone(), config.policy.fence_timeout);
        let began = env.clock.now();
        let other = env.clone();
        let _writer = env.spawn("old leader", async move {
            for (ms, kind, rid, term) in events {
                let at = began + Duration::from_millis(ms);
                other.clock.sleep_until(at).await;
                record(&other, kind, rid, term).await;
            }
        });
        let result = fence_leaders(&env, &config, &fences).await;
        let took = env.clock.now().since(began);
        let asked = agent.asked().iter().map(|r| r.rid).collect();
        (result, asked, took)
    })
}

/// What is recorded in the slot of a leader of an earlier term, and when, in
/// milliseconds; which mounts are fenced, and how long that took to be decided.
fn fenced(events: &[(u64, Kind, u64, u64)]) -> (Vec<u64>, Duration) {
    let before = [
        (Kind::Begin, 1),
        (Kind::Elect, OLD_TERM),
        (Kind::Fence, OLD_TERM),
    ];
    let (result, asked, took) = decided(0, &before, events.to_vec(), &[]);
    result.unwrap();
    (asked, took)
}

#[test]
fn a_leader_that_learns_of_the_election_and_stops_is_not_fenced() {
    let events = &[
        (50, Kind::Term, OLD, TERM),
        (900, Kind::Stop, OLD, OLD_TERM),
    ];
    let (asked, took) = fenced(events);
    assert!(asked.is_empty(), "{asked:?}");
    assert!(took < Duration::from_millis(1000), "{took:?}");
}

#[test]
fn a_silent_leader_is_fenced_after_a_moment() {
    let (asked, took) = fenced(&[]);
    assert_eq!(asked, [OLD]);
    // The agent takes a second.
    let decided = took - Duration::from_secs(1);
    assert!(decided < Policy::default().leader_grace * 2, "{decided:?}");
}

#[test]
fn a_leader_on_a_busy_machine_has_time_to_learn_of_the_election() {
    let events = &[
        (400, Kind::Term, OLD, TERM),
        (900, Kind::Stop, OLD, OLD_TERM),
    ];
    let (asked, _) = fenced(events);
    assert!(asked.is_empty(), "{asked:?}");
}

#[test]
fn a_leader_that_never_gets_to_its_stop_is_fenced() {
    let (asked, took) = fenced(&[(50, Kind::Term, OLD, TERM)]);
    assert_eq!(asked, [OLD]);
    let policy = Policy::default();
    assert!(took > policy.leader_stop_patience, "{took:?}");
    assert!(took < policy.leader_stop_patience * 2, "{took:?}");
}

#[test]
fn a_leader_whose_slot_another_mount_has_is_fenced_at_once() {
    let (asked, took) = fenced(&[(0, Kind::Begin, 3000, TERM)]);
    assert_eq!(asked, [OLD]);
    assert!(took < Duration::from_millis(1050), "{took:?}");
}

/// What the leader of `slot` comes to if another of its term is in slot 1, which
/// records these events, in milliseconds after it.
fn twin(
    slot: u16,
    events: &[(u64, Kind)],
    dead: &[u64],
) -> (Option<ServerError>, Vec<u64>, Duration) {
    let before = [(Kind::Begin, 1), (Kind::Elect, TERM)];
    let events = events.iter().map(|(ms, kind)| (*ms, *kind, OLD, TERM));
    let (result, asked, took) = decided(slot, &before, events.collect(), dead);
    (result.err(), asked, took)
}

fn gave_way(result: &Option<ServerError>) -> bool {
    matches!(result, Some(ServerError::GivesWay { term: TERM }))
}

#[test]
fn of_two_leaders_of_one_term_that_of_the_higher_slot_gives_way() {
    let (result, asked, took) = twin(2, &[], &[]);
    assert!(gave_way(&result), "{result:?}");
    assert!(asked.is_empty(), "{asked:?}");
    assert!(took < Duration::from_millis(100), "{took:?}");
}

#[test]
fn of_two_leaders_of_one_term_that_of_the_lower_slot_waits_for_the_other() {
    let (result, asked, took) = twin(0, &[(2000, Kind::Stop)], &[]);
    assert!(result.is_none() && asked.is_empty(), "{result:?} {asked:?}");
    assert!(took > Duration::from_secs(2), "{took:?}");
    let (result, asked, took) = twin(0, &[], &[]);
    assert!(result.is_none() && asked == [OLD], "{result:?} {asked:?}");
    assert!(took > Policy::default().leader_stop_patience, "{took:?}");
}

#[test]
fn of_two_leaders_of_one_term_none_is_in_the_way_of_one_that_serves() {
    let (result, asked, _) = twin(0, &[(1000, Kind::Fence)], &[]);
    assert!(gave_way(&result), "{result:?}");
    assert!(asked.is_empty(), "{asked:?}");
}

#[test]
fn a_leader_of_the_same_term_that_is_known_to_be_dead_is_fenced_at_once() {
    for slot in [0, 2] {
        let (result, asked, took) = twin(slot, &[], &[OLD]);
        assert!(result.is_none() && asked == [OLD], "{result:?} {asked:?}");
        assert!(took < Duration::from_millis(1100), "{took:?}");
    }
}

//! A member that was cut off comes back with a great term and asks for votes: whoever
//! hears the leader does not listen, the leader itself does.

use super::brain::{Brain, Effect, Input, Message, MessageKind, Policy, ServerPhase};
use super::config::Slots;
use crate::env::{Duration, Time};
use crate::format::{InetAddr, QuorumConfig, QuorumEventKind};
use std::net::{Ipv4Addr, SocketAddrV4};

const TERM: u64 = 5;
const GREATER: u64 = 46;

fn at(ms: u64) -> Time {
    Time(ms * 1_000_000)
}

fn input(ms: u64, message: Option<(MessageKind, usize, u64)>) -> Input {
    Input {
        now: at(ms),
        message: message.map(|(kind, from, term)| Message { kind, from, term }),
        server: ServerPhase::Down,
        heartbeat_timeout: Duration::from_secs(2),
        random: 0,
    }
}

/// Slot 1 of three, which hears slot 0 lead in [`TERM`] at 1000 ms.
fn follower() -> Brain {
    let mut config = QuorumConfig::default();
    for slot in 0..3 {
        let addr = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7000 + slot as u16);
        config.slots[slot] = InetAddr::from_v4(addr);
    }
    let slots = Slots::of(&config);
    let mut brain = Brain::new(Policy::default(), &slots, 1, 1, false, input(0, None));
    brain.step(input(1000, Some((MessageKind::Heartbeat, 0, TERM))));
    assert_eq!(brain.status().term, TERM);
    brain
}

fn ask(brain: &mut Brain, ms: u64) -> Vec<Effect> {
    brain.step(input(ms, Some((MessageKind::RequestVote, 2, GREATER))))
}

const VOTES: [Effect; 2] = [
    Effect::Write(QuorumEventKind::Term, GREATER),
    Effect::Send(2, MessageKind::Vote, GREATER),
];

#[test]
fn who_hears_the_leader_does_not_vote_against_it() {
    let mut brain = follower();
    assert_eq!(ask(&mut brain, 1250), []);
    assert_eq!(brain.status().term, TERM, "as if the request was lost");
    brain.step(input(1260, Some((MessageKind::Heartbeat, 0, TERM))));
    assert_eq!(ask(&mut brain, 1500), []);
    // The leader has fallen silent; its timeout is far away.
    assert_eq!(ask(&mut brain, 1600), VOTES);
}

#[test]
fn a_leader_that_resigns_is_trusted_no_more() {
    let mut brain = follower();
    brain.step(input(1010, Some((MessageKind::Resignation, 0, TERM))));
    assert_eq!(ask(&mut brain, 1020), VOTES);
}

#[test]
fn another_leader_is_followed_at_once() {
    let mut brain = follower();
    let effects = brain.step(input(1010, Some((MessageKind::Heartbeat, 2, GREATER))));
    assert_eq!(effects, VOTES[..1]);
    assert_eq!(brain.status().term, GREATER);
}

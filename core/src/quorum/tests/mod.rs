//! Spec 09 section 16, and the rules of sections 2 to 5.

mod agents;
mod brains;

use super::agent::{
    AgentConfig, AgentError, AgentStatus, AgentStop, ServerInstance, ServerStarter,
};
use super::block::{BlockIo, QuorumBlockError};
use super::brain::{Brain, Effect, Input, Message, MessageKind, Policy, ServerPhase, TERM_LIMIT};
use super::config::{ConfigError, Slots};
use super::leaders::{LeaderCandidate, fence_candidates, find_server, stop_would_hide, superseded};
use crate::env::testing::{TestEntropy, TestWorld};
use crate::env::testnet::{TestNet, TestNetHandle};
use crate::env::watch;
use crate::env::{Duration, Entropy, Env, LocalBoxFuture, Signal, Time};
use crate::format::{
    InetAddr, Magic, QUORUM_BLKNO, QuorumBlock, QuorumConfig, QuorumEventKind, SM_BLOCK_SIZE,
    init_header, seal,
};
use crate::secure::{ClusterKey, secured};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;

const A: u64 = 0xa;
const B: u64 = 0xb;
const C: u64 = 0xc;
const OWN: u64 = 0x9;
const T: u64 = 9;
const HEARTBEAT: Duration = Duration::from_secs(10);

fn block(elect: (u64, u64), fence: (u64, u64), stop: (u64, u64)) -> QuorumBlock {
    let mut block = QuorumBlock::default();
    let events = [
        (QuorumEventKind::Elect, elect),
        (QuorumEventKind::Fence, fence),
        (QuorumEventKind::Stop, stop),
    ];
    for (kind, (term, rid)) in events {
        let event = &mut block.events[kind as usize];
        event.term.set(term);
        event.rid.set(rid);
    }
    block
}

fn fenced(blocks: &[QuorumBlock]) -> Vec<(u64, u64)> {
    fence_candidates(T, OWN, blocks.iter().enumerate())
        .into_iter()
        .map(|LeaderCandidate { rid, term, .. }| (rid, term))
        .collect()
}

#[test]
fn the_server_is_the_leader_that_fenced_the_other_of_its_term() {
    let found = |blocks: &[QuorumBlock]| find_server(blocks.iter().enumerate());
    let elected = block((7, A), (0, 0), (0, 0));
    let serves = block((7, B), (7, B), (0, 0));
    assert_eq!(found(&[elected, serves]), Some(1));
    assert_eq!(found(&[serves, elected]), Some(0));
    assert_eq!(found(&[elected, elected]), Some(0), "the lowest slot");
    assert_eq!(found(&[serves, block((8, C), (0, 0), (0, 0))]), Some(1));
    assert_eq!(found(&[block((7, A), (7, A), (7, A))]), None);
}

#[test]
fn the_fence_decisions_of_the_spec() {
    let stopped7 = block((7, C), (7, C), (7, C));
    assert_eq!(fenced(&[stopped7, block((8, A), (8, A), (0, 0))]), [(A, 8)]);
    let s0 = block((7, A), (0, 0), (0, 0));
    assert_eq!(fenced(&[s0, block((8, C), (8, C), (8, C))]), []);
    let two = block((8, B), (5, A), (0, 0));
    assert_eq!(fenced(&[two, QuorumBlock::default()]), [(B, 8), (A, 5)]);
    assert_eq!(fenced(&[two, stopped7]), [(B, 8)]);
    assert!(!superseded(T, &[stopped7, two]));
    assert!(superseded(T, &[block((10, C), (0, 0), (0, 0))]));
    assert!(
        superseded(T, &[block((10, C), (10, C), (10, C))]),
        "also if it has stopped again"
    );
    // A served in this slot at 7; OWN was elected there at 8 and could not fence it.
    let heir = block((8, OWN), (7, A), (0, 0));
    assert!(stop_would_hide(OWN, 0, &[(0, heir)]));
    assert!(stop_would_hide(OWN, 0, &[(0, heir), (1, stopped7)]));
    let fenced9 = block((9, C), (9, C), (9, C));
    assert!(!stop_would_hide(OWN, 0, &[(0, heir), (1, fenced9)]));
    let came_up = block((8, OWN), (8, OWN), (0, 0));
    assert!(!stop_would_hide(OWN, 0, &[(0, came_up)]));
    let own = block((9, OWN), (0, 0), (0, 0));
    assert_eq!(fenced(&[own, block((10, C), (0, 0), (0, 0))]), []);
}

fn config(addrs: &[(u16, u32, u16)]) -> QuorumConfig {
    let mut config = QuorumConfig::default();
    for (slot, ip, port) in addrs {
        let addr = SocketAddrV4::new(Ipv4Addr::from(*ip), *port);
        config.slots[usize::from(*slot)] = InetAddr::from_v4(addr);
    }
    config
}

const LOCAL: u32 = 0x7f00_0001;

fn slots(n: u16) -> Slots {
    let addrs: Vec<_> = (0..n).map(|i| (i, LOCAL, 7000 + i)).collect();
    Slots::checked(&config(&addrs), 0).expect("good slots")
}

#[test]
fn slots_are_checked() {
    use ConfigError as E;
    let check = |addrs: &[_], own| Slots::checked(&config(addrs), own).err();
    assert_eq!(check(&[], 0), Some(E::Empty));
    assert_eq!(check(&[(1, LOCAL, 1)], 0), Some(E::NotPresent(0)));
    assert_eq!(check(&[(1, LOCAL, 1)], 1), None);
    let bad = [
        (0xe000_0001, 1),
        (u32::MAX, 1),
        (0x0001_0203, 1),
        (LOCAL, 0),
        (LOCAL, u16::MAX),
    ];
    for (ip, port) in bad {
        let got = check(&[(2, LOCAL, 5), (3, ip, port)], 2);
        assert!(matches!(got, Some(E::Address { slot: 3, .. })), "{got:?}");
    }
    let got = check(&[(0, LOCAL, 5), (4, LOCAL, 6), (9, LOCAL, 5)], 0);
    assert!(
        matches!(
            got,
            Some(E::Duplicate {
                first: 0,
                second: 9,
                ..
            })
        ),
        "{got:?}"
    );
}

#[test]
fn votes_that_make_a_leader() {
    let needed: Vec<usize> = [1, 2, 3, 4, 5, 7, 15]
        .map(|n| slots(n).votes_needed())
        .into();
    assert_eq!(needed, [1, 1, 2, 3, 3, 4, 8]);
}

#[test]
fn datagrams_of_the_spec() {
    let fsid = 0x1122_3344_5566_7788;
    let head = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
    let cases = [
        (MessageKind::RequestVote, 0, 0x4bc0_71bc_u32),
        (MessageKind::Vote, 2, 0xd9ea_8909),
        (MessageKind::Heartbeat, 0, 0xf4a7_523d),
        (MessageKind::Resignation, 0, 0x29e2_f885),
    ];
    let slots = slots(3);
    for (kind, from, crc) in cases {
        let message = Message {
            kind,
            from,
            term: 7,
        };
        let mut bytes = head.to_vec();
        bytes.extend([0; 8]);
        bytes.extend([7, 0, 0, 0, 0, 0, 0, 0, kind as u8, from as u8, 0, 0]);
        bytes.extend(crc.to_le_bytes());
        assert_eq!(message.to_bytes(fsid), bytes);
        assert_eq!(Message::parse(&bytes, fsid, &slots), Some(message));
        assert_eq!(Message::parse(&bytes, fsid + 1, &slots), None);
        assert_eq!(Message::parse(&bytes[..31], fsid, &slots), None);
        for at in 0..32 {
            let mut bad = bytes.clone();
            bad[at] ^= 0x40;
            assert_eq!(Message::parse(&bad, fsid, &slots), None, "byte {at}");
        }
    }
    let absent = Message {
        kind: MessageKind::Vote,
        from: 3,
        term: 7,
    };
    assert_eq!(
        Message::parse(&absent.to_bytes(fsid), fsid, &slots),
        None,
        "no such slot"
    );
    for (term, heard) in [
        (TERM_LIMIT - 1, true),
        (TERM_LIMIT, false),
        (u64::MAX, false),
    ] {
        let far = Message {
            kind: MessageKind::RequestVote,
            from: 0,
            term,
        };
        let parsed = Message::parse(&far.to_bytes(fsid), fsid, &slots);
        assert_eq!(parsed, heard.then_some(far), "a term that nobody counts to");
    }
}

//! Spec 09 section 16, and the rules of sections 2 to 5.

use super::leaders::{LeaderCandidate, fence_candidates};
use crate::format::{QuorumBlock, QuorumEventKind};

const A: u64 = 0xa;
const B: u64 = 0xb;
const C: u64 = 0xc;
const OWN: u64 = 0x9;
const T: u64 = 9;

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
fn the_fence_decisions_of_the_spec() {
    let stopped7 = block((7, C), (7, C), (7, C));
    assert_eq!(fenced(&[stopped7, block((8, A), (8, A), (0, 0))]), [(A, 8)]);
    let s0 = block((7, A), (0, 0), (0, 0));
    assert_eq!(fenced(&[s0, block((8, C), (8, C), (8, C))]), []);
    let two = block((8, B), (5, A), (0, 0));
    assert_eq!(fenced(&[two, QuorumBlock::default()]), [(B, 8), (A, 5)]);
    assert_eq!(fenced(&[two, stopped7]), [(B, 8)]);
    let own = block((9, OWN), (0, 0), (0, 0));
    assert_eq!(fenced(&[own, block((10, C), (0, 0), (0, 0))]), []);
}

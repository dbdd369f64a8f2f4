//! What quorum blocks say about leaders (spec 09 sections 4 and 9.2, 08 section 6).
//! Pure functions.

use crate::format::{QuorumBlock, QuorumEventKind};

fn term(block: &QuorumBlock, kind: QuorumEventKind) -> u64 {
    block.event(kind).term.get()
}

/// Whether a slot's last leader did not record that its server stopped.
pub fn unresolved(block: &QuorumBlock) -> bool {
    term(block, QuorumEventKind::Elect) > term(block, QuorumEventKind::Stop)
}

/// The slot of the server: the unresolved leader of the greatest term. `None`: there is none.
pub fn find_server<'a>(
    blocks: impl IntoIterator<Item = (usize, &'a QuorumBlock)>,
) -> Option<usize> {
    blocks
        .into_iter()
        .filter(|(_, block)| unresolved(block))
        // The lowest slot of those of the same term, as the original's walk.
        .min_by_key(|(slot, block)| {
            (
                std::cmp::Reverse(term(block, QuorumEventKind::Elect)),
                *slot,
            )
        })
        .map(|(slot, _)| slot)
}

/// An earlier leader that may still write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeaderCandidate {
    /// Slot that it led from: its address is where to fence it.
    pub slot: usize,
    /// The mount.
    pub rid: u64,
    /// Term it led in.
    pub term: u64,
}

/// The earlier leaders that the leader of `own_term`, mount `own_rid`, must fence
/// before its server touches anything (spec 09 section 9.2). `blocks` are *all*
/// present slots' blocks, by slot; a block that can not be read must fail the start.
pub fn fence_candidates<'a>(
    own_term: u64,
    own_rid: u64,
    blocks: impl IntoIterator<Item = (usize, &'a QuorumBlock)>,
) -> Vec<LeaderCandidate> {
    let mut fenced = 0;
    let mut old = Vec::new();
    for (slot, block) in blocks {
        let elect = block.event(QuorumEventKind::Elect);
        let fence = block.event(QuorumEventKind::Fence);
        let stop = term(block, QuorumEventKind::Stop);
        let mut add = |event: &crate::format::QuorumEvent| {
            old.push(LeaderCandidate {
                slot,
                rid: event.rid.get(),
                term: event.term.get(),
            });
        };
        if elect.term.get() > stop {
            add(elect);
        }
        // An older mount in this slot whose server came up and that vanished; a
        // newer mount was elected here since.
        if fence.term.get() > stop && fence.term.get() < elect.term.get() {
            add(fence);
        }
        fenced = fenced.max(fence.term.get());
    }
    old.retain(|c| c.term != 0 && c.term >= fenced && c.term <= own_term && c.rid != own_rid);
    old
}

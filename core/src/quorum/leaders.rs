//! What quorum blocks say about leaders (spec 09 sections 4 and 9.2, 08 section 6).
//! Pure functions.

use crate::env::mutant;
use crate::format::{QuorumBlock, QuorumEventKind};

fn term(block: &QuorumBlock, kind: QuorumEventKind) -> u64 {
    block.event(kind).term.get()
}

/// Whether a slot's last leader did not record that its server stopped.
pub fn unresolved(block: &QuorumBlock) -> bool {
    term(block, QuorumEventKind::Elect) > term(block, QuorumEventKind::Stop)
}

/// The slot of the server: the unresolved leader of the greatest term. `None`: there is none.
///
/// Where one vote is enough there can be two of one term. Only one serves: who has
/// fenced the other and recorded FENCE. The other's block stays as it is, also when
/// another mount takes its slot, which hears the leader and is never elected.
pub fn find_server<'a>(
    blocks: impl IntoIterator<Item = (usize, &'a QuorumBlock)>,
) -> Option<usize> {
    find_servers(blocks).first().copied()
}

/// The slots in which the server may be, the likeliest first: all unresolved leaders of
/// the greatest term. Of two that have fenced in one term one fenced the other, and no
/// block says which.
pub fn find_servers<'a>(blocks: impl IntoIterator<Item = (usize, &'a QuorumBlock)>) -> Vec<usize> {
    let elect = |block: &QuorumBlock| term(block, QuorumEventKind::Elect);
    let blocks = blocks.into_iter().filter(|(_, block)| unresolved(block));
    let mut leaders: Vec<(usize, &QuorumBlock)> = blocks.collect();
    let greatest = leaders.iter().map(|(_, block)| elect(block)).max();
    leaders.retain(|(_, block)| Some(elect(block)) == greatest);
    // One that serves first, else that of the lowest slot, as the original's walk.
    leaders.sort_by_key(|(slot, block)| {
        let serves = term(block, QuorumEventKind::Fence) == elect(block);
        (!serves, *slot)
    });
    leaders.into_iter().map(|(slot, _)| slot).collect()
}

/// Whether a leader of a greater term than `own_term` shows: the server of
/// `own_term` must not start. Of two elected leaders each records ELECT before it
/// reads the others' blocks, so one sees the other: the greater fences the lesser,
/// unless it read too early, and then the lesser sees the greater, here. Without
/// this rule a leader that was slow to record its election would start beside a
/// later one (the original does).
pub fn superseded<'a>(own_term: u64, blocks: impl IntoIterator<Item = &'a QuorumBlock>) -> bool {
    if mutant("stale_leader_starts") {
        return false;
    }
    blocks.into_iter().any(|block| {
        term(block, QuorumEventKind::Elect).max(term(block, QuorumEventKind::Fence)) > own_term
    })
}

/// Whether the leader of `own_term` in `own_slot` is to give way to another of the same
/// term, whose mount has its slot still: its server must not start. Where one vote is
/// enough, two members that start together elect themselves in one term, and each finds
/// the other's ELECT. If both fenced, both would be dead. So one of them steps back as
/// if it had been outvoted: for one that has recorded FENCE and may serve already, else
/// for the one of the lower slot, which gives the other time to record its STOP. One
/// that was wrong to do so, since the other is dead, is elected again in the next term,
/// and fences it then.
///
/// Not for mounts that are known to be `gone`: those are fenced at once.
pub fn gives_way<'a>(
    own_term: u64,
    own_slot: usize,
    blocks: impl IntoIterator<Item = (usize, &'a QuorumBlock)>,
    gone: impl Fn(u64) -> bool,
) -> bool {
    blocks.into_iter().any(|(slot, block)| {
        let elect = block.event(QuorumEventKind::Elect);
        let twin = slot != own_slot
            && elect.term.get() == own_term
            && unresolved(block)
            && block.event(QuorumEventKind::Begin).rid == elect.rid;
        let serves = term(block, QuorumEventKind::Fence) == own_term;
        twin && (serves || slot < own_slot) && !gone(elect.rid.get())
    })
}

/// Whether STOP in the block of `own_slot` would hide an earlier mount of this slot
/// that led, may still write, and that nobody has fenced: readers take a FENCE
/// below STOP as done with. That happens when a server stops before it has fenced
/// its predecessor. STOP is then left out: the next leader fences us needlessly,
/// if we are still there, but fences the predecessor too.
pub fn stop_would_hide(own_rid: u64, own_slot: usize, blocks: &[(usize, QuorumBlock)]) -> bool {
    if mutant("stop_hides_predecessor") {
        return false;
    }
    let kind = QuorumEventKind::Fence;
    let greatest = blocks.iter().map(|(_, block)| term(block, kind)).max();
    let own = blocks.iter().find(|(slot, _)| *slot == own_slot);
    own.is_some_and(|(_, block)| {
        let fence = block.event(kind);
        fence.rid.get() != own_rid
            && fence.term.get() > term(block, QuorumEventKind::Stop)
            && Some(fence.term.get()) == greatest
    })
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

/// Whether an earlier leader's mount is there and knows that it leads no more: it has
/// recorded a term above the one it led in. It then stops its server and records
/// that. If it were fenced it would lose what it has not committed, for nothing.
pub fn steps_down(candidate: &LeaderCandidate, block: &QuorumBlock) -> bool {
    let seen = block.event(QuorumEventKind::Term);
    seen.rid.get() == candidate.rid && seen.term.get() > candidate.term
}

/// Whether an earlier leader's mount has its slot still, so that it could record
/// that it steps down.
pub fn has_slot(candidate: &LeaderCandidate, block: &QuorumBlock) -> bool {
    block.event(QuorumEventKind::Begin).rid.get() == candidate.rid
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

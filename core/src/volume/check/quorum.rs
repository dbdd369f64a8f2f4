//! Quorum blocks (spec 09 section 14, 1 to 4).

use super::cursor::Ctx;
use super::report::{Kind, Problem};
use crate::format::*;
use crate::volume::{VolumeError, read_quorum_block};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Reads and checks the blocks of all slots.
pub(super) async fn check_quorum(ctx: &Rc<Ctx>, unmounted: bool) {
    let mut blocks = Vec::new();
    for slot in 0..QUORUM_MAX_SLOTS {
        let blkno = QUORUM_BLKNO + slot as u64;
        match read(ctx, slot, blkno).await {
            Ok(block) => {
                check_block(ctx, slot, &block);
                blocks.push((slot, *block));
            }
            Err(e) => {
                ctx.add(Problem::error(Kind::Quorum, e.to_string()).at(blkno));
            }
        }
    }
    if unmounted {
        check_unmounted(ctx, &blocks);
    }
}

/// Reads a block, or remembers it.
async fn read(ctx: &Ctx, slot: usize, blkno: u64) -> Result<Rc<QuorumBlock>, VolumeError> {
    // Nothing refers to it, so there is no seq that it must have.
    let (offset, r) = (blkno << SM_BLOCK_SHIFT, BlockRef::new(blkno, 0));
    if let Some(known) = ctx.memo.as_ref().and_then(|memo| memo.find(offset, &r)) {
        return Ok(known);
    }
    let block = Rc::new(read_quorum_block(&*ctx.meta, ctx.fsid, slot).await?);
    if let Some(memo) = &ctx.memo {
        memo.keep(offset, SM_BLOCK_SIZE, &r, block.clone());
    }
    Ok(block)
}

fn check_block(ctx: &Ctx, slot: usize, block: &QuorumBlock) {
    let bad = |text: String| {
        ctx.add(Problem::error(Kind::Quorum, text).at(QUORUM_BLKNO + slot as u64));
    };
    let nrs: Vec<u64> = block.events.iter().map(|e| e.write_nr.get()).collect();
    let greatest = nrs.iter().copied().max().unwrap_or(0);
    if block.write_nr.get() != greatest {
        bad(format!(
            "the block of quorum slot {slot} has write_nr {}, its last event {greatest}",
            block.write_nr.get()
        ));
    }
    let written: Vec<u64> = nrs.into_iter().filter(|nr| *nr != 0).collect();
    if written.iter().collect::<BTreeSet<_>>().len() != written.len() {
        bad(format!(
            "two events of quorum slot {slot} have the same write_nr"
        ));
    }
    let term = |kind| block.event(kind).term.get();
    let elect = term(QuorumEventKind::Elect);
    if term(QuorumEventKind::Fence) > elect || term(QuorumEventKind::Stop) > elect {
        bad(format!(
            "quorum slot {slot} fenced or stopped in a term it was not elected in"
        ));
    }
}

/// Without mounts no leader may be left that was neither stopped nor fenced.
fn check_unmounted(ctx: &Ctx, blocks: &[(usize, QuorumBlock)]) {
    let term = |block: &QuorumBlock, kind| block.event(kind).term.get();
    let fences = blocks.iter().map(|(_, b)| term(b, QuorumEventKind::Fence));
    let fenced = fences.max().unwrap_or(0);
    let present: Vec<usize> = ctx.sb.qconf.present().map(|(slot, _)| slot).collect();
    for (slot, block) in blocks.iter().filter(|(slot, _)| present.contains(slot)) {
        let elect = term(block, QuorumEventKind::Elect);
        if elect > term(block, QuorumEventKind::Stop) && elect >= fenced && elect > 0 {
            let text = format!(
                "no mount is recorded, but the leader of quorum slot {slot} in term {elect} \
                 neither stopped nor was fenced"
            );
            let problem = Problem::note(Kind::Suspicious, text);
            ctx.add(problem.at(QUORUM_BLKNO + *slot as u64));
        }
    }
}

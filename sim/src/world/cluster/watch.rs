//! What the simulator sees and no node does: who writes where and when (spec 09
//! section 14). Which locks all mounts together have is looked at in
//! [`crate::world::invariants`].

use super::{Cluster, System};
use crate::backend::disk::Landed;
use outrider_core::env::DeviceRole;
use outrider_core::format::{QUORUM_BLKNO, QUORUM_MAX_SLOTS, SUPER_BLKNO};
use std::rc::Rc;

/// The kind of verdict that is the fault of an agent outside.
pub(super) const LIED: &str = "lying fence agent";

const SMALL_BLOCK: u64 = 4096;

pub(super) fn install<S: System>(world: &Rc<Cluster<S>>) {
    let weak = Rc::downgrade(world);
    world.disks.set_watch(move |landed| {
        if let Some(world) = weak.upgrade() {
            world.landed(landed);
        }
    });
}

/// The seq of a block's header (spec 01 section 2): of a super block one more with each
/// commit.
fn seq_of(block: &[u8]) -> Option<u64> {
    let seq = block.get(16..24)?.try_into().ok()?;
    Some(u64::from_le_bytes(seq))
}

impl<S: System> Cluster<S> {
    /// A write reached a device.
    fn landed(&self, landed: &Landed<'_>) {
        let acked = self.acked.borrow().get(&landed.seat).copied();
        if let Some((at, lied)) = acked {
            let text = format!(
                "node {}, mount {}: its write at {:#x} of {:?} arrived after an agent had said, \
                 at {}.{:09}, that it was fenced",
                landed.node,
                landed.seat,
                landed.offset,
                landed.role,
                at / super::SECOND,
                at % super::SECOND,
            );
            return self.condemn(if lied { LIED } else { "late write" }, text);
        }
        if landed.role != DeviceRole::Meta {
            return;
        }
        let block = landed.offset / SMALL_BLOCK;
        if block == SUPER_BLKNO {
            self.super_landed(landed);
        }
        let slots = QUORUM_BLKNO..QUORUM_BLKNO + QUORUM_MAX_SLOTS as u64;
        if slots.contains(&block) && block - QUORUM_BLKNO != u64::from(landed.node) {
            let slot = block - QUORUM_BLKNO;
            let text = format!("node {} wrote the quorum block of slot {slot}", landed.node);
            self.condemn("quorum", text);
        }
    }

    /// A super block that was written may be lost: the next one follows the one that
    /// is there.
    pub(super) fn super_after_blackout(&self) {
        let mut block = [0; SMALL_BLOCK as usize];
        let medium = self.disks.medium(DeviceRole::Meta);
        medium.read(SUPER_BLKNO * SMALL_BLOCK, &mut block);
        self.super_seen.set((seq_of(&block).unwrap_or(0), 0));
    }

    fn super_landed(&self, landed: &Landed<'_>) {
        let bytes = landed.bufs.first().map(|buf| &buf[..]).unwrap_or_default();
        let Some(seq) = seq_of(bytes) else {
            return self.condemn("super", "a super block that is too short".to_owned());
        };
        let (last, writer) = self.super_seen.get();
        if writer != landed.seat && seq <= last {
            let text = format!(
                "two servers: mount {} wrote super block {seq} after mount {writer} had written \
                 {last}",
                landed.seat
            );
            self.condemn("two servers", text);
        }
        self.super_seen.set((seq.max(last), landed.seat));
    }
}

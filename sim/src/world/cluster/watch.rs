//! What the simulator sees and no node does: who writes where and when, and
//! which locks all mounts together have (spec 09 section 14, spec 10 section 15).

use super::{Cluster, System};
use crate::backend::disk::Landed;
use outrider_core::env::DeviceRole;
use outrider_core::format::{QUORUM_BLKNO, QUORUM_MAX_SLOTS, SUPER_BLKNO};
use outrider_core::locks::Mode;
use std::collections::BTreeMap;
use std::rc::Rc;

/// The kind of verdict that is the fault of an agent outside.
pub(super) const LIED: &str = "lying fence agent";

const SMALL_BLOCK: u64 = 4096;
/// How often locks are compared, in nanoseconds.
const PERIOD: u64 = 50_000_000;

pub(super) fn install<S: System>(world: &Rc<Cluster<S>>) {
    let weak = Rc::downgrade(world);
    world.disks.set_watch(move |landed| {
        if let Some(world) = weak.upgrade() {
            world.landed(landed);
        }
    });
    look_again(world);
}

fn look_again<S: System>(world: &Rc<Cluster<S>>) {
    let weak = Rc::downgrade(world);
    let at = world.sim.now() + PERIOD;
    world.sim.call_at(at, move || {
        if let Some(world) = weak.upgrade() {
            world.check_locks();
            look_again(&world);
        }
    });
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

    fn super_landed(&self, landed: &Landed<'_>) {
        let bytes = landed.bufs.first().map(|buf| &buf[..]).unwrap_or_default();
        // The seq of the block header (spec 01 section 2), one more with each commit.
        let Some(seq) = bytes.get(16..24).and_then(|seq| seq.try_into().ok()) else {
            return self.condemn("super", "a super block that is too short".to_owned());
        };
        let (seq, (last, writer)) = (u64::from_le_bytes(seq), self.super_seen.get());
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

    /// No two mounts have modes of one lock that exclude each other.
    pub(super) fn check_locks(&self) {
        let mut held: BTreeMap<_, Vec<(u32, Mode)>> = BTreeMap::new();
        for seat in self.seated() {
            let Some(mount) = seat.mount() else { continue };
            for (key, mode) in mount.locks() {
                if mode != Mode::Null {
                    let number = seat.fate.host.life.seat();
                    held.entry(key).or_default().push((number, mode));
                }
            }
        }
        for (key, modes) in held {
            let together = |one: Mode, other: Mode| one == other && one != Mode::Write;
            let apart = modes
                .iter()
                .enumerate()
                .any(|(at, (_, one))| modes[..at].iter().any(|(_, other)| !together(*one, *other)));
            if apart {
                let text = format!("lock {key} is held by mounts {modes:?}");
                return self.condemn("locks", text);
            }
        }
    }
}

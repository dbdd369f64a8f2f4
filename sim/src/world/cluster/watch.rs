//! What the simulator sees and no node does: who writes where and when (spec 09
//! section 14), and whether a mount goes on writing after the volume has struck it from
//! its list (`outrider_core::guard`), whatever an agent said. Which locks all mounts together have is looked at in
//! [`crate::world::invariants`].

use super::{Cluster, System};
use crate::backend::disk::Landed;
use outrider_core::client::Locator;
use outrider_core::env::{DeviceRole, IoBuf};
use outrider_core::format::{QUORUM_BLKNO, QUORUM_MAX_SLOTS, SUPER_BLKNO, SuperBlock};
use outrider_core::server::Policy;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The kind of verdict that is the fault of an agent outside.
pub(super) const LIED: &str = "lying fence agent";

const SMALL_BLOCK: u64 = 4096;

pub(super) fn install<S: System>(world: &Rc<Cluster<S>>) {
    let weak = Rc::downgrade(world);
    world.disks.add_watch(move |landed| {
        if let Some(world) = weak.upgrade() {
            world.landed(landed);
        }
    });
    let weak = Rc::downgrade(world);
    world.disks.set_asked(move |seat, role, offset| {
        if let Some(world) = weak.upgrade() {
            world.asked_to_write(seat, role, offset);
        }
    });
}

fn is_quorum_block(role: DeviceRole, offset: u64) -> bool {
    let slots = QUORUM_BLKNO..QUORUM_BLKNO + QUORUM_MAX_SLOTS as u64;
    role == DeviceRole::Meta && slots.contains(&(offset / SMALL_BLOCK))
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
            self.look_for_unlisted(landed.bufs);
        }
        if is_quorum_block(landed.role, landed.offset)
            && block - QUORUM_BLKNO != u64::from(landed.node)
        {
            let slot = block - QUORUM_BLKNO;
            let text = format!("node {} wrote the quorum block of slot {slot}", landed.node);
            self.condemn("quorum", text);
        }
    }

    /// Looks which of the mounts that were declared dead, and live, the volume does not
    /// list any more.
    fn look_for_unlisted(&self, sup: &[IoBuf]) {
        let seats = self.acked.borrow().keys().copied().collect::<Vec<_>>();
        for seat in seats {
            let fate = self.fate_at(seat);
            let Some(fate) = fate.filter(|fate| !fate.is_dead()) else {
                continue;
            };
            if self.unlisted.borrow().contains_key(&seat) {
                continue;
            }
            let rid = fate.host.life.rid();
            if self.lists(sup, rid) == Some(false) {
                self.unlisted.borrow_mut().insert(seat, self.sim.now());
            }
        }
    }

    /// Whether the volume lists a mount; `None` if that can not be seen now.
    fn lists(&self, sup: &[IoBuf], rid: u64) -> Option<bool> {
        let sup = SuperBlock::from_block(
            sup.first()
                .filter(|sup| sup.len() >= SMALL_BLOCK as usize)?,
        );
        let (fsid, version) = (sup.hdr.fsid.get(), sup.fmt_vers.get());
        let env = self.observer().env("watch");
        let locator = Locator::new(&env, self.disks.bare(DeviceRole::Meta), fsid, version);
        let look = pin!(locator.is_mounted(rid));
        match look.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(listed)) => Some(listed),
            _ => None,
        }
    }

    /// A mount hands a write to a device. A look at the volume is good for so long, and
    /// each later write takes another; only quorum blocks are for everybody to write.
    fn asked_to_write(&self, seat: u32, role: DeviceRole, offset: u64) {
        let Some(since) = self.unlisted.borrow().get(&seat).copied() else {
            return;
        };
        // Clocks of nodes drift by less than a twentieth.
        let good_for = self.good_for(role) / 20 * 21;
        let now = self.sim.now();
        if is_quorum_block(role, offset) || now <= since + good_for {
            return;
        }
        let text = format!(
            "mount {seat} hands over a write at {offset:#x} of {role:?}, {} ms after the volume \
             did not list it any more",
            (now - since) / 1_000_000
        );
        self.condemn("unchecked write", text);
    }

    /// How long a look at the volume is good for, in nanoseconds. Data are written by
    /// mounts only, metadata by servers, too, whose looks are good for longer.
    fn good_for(&self, role: DeviceRole) -> u64 {
        let server = Policy::default().write_check.as_nanos() as u64;
        match role {
            DeviceRole::Meta => server,
            DeviceRole::Data => server.min(u64::from(self.cluster().heartbeat_ms) * 1_000_000 / 2),
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

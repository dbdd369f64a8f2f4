//! What the devices would lose, in words, for who reads a replay along: what is in a
//! volatile cache only, what a loss of power has taken, what became of writes that were
//! under way when their process ended.
//!
//! Nothing of it is done in a sweep, and nothing of it is part of the digest.

use super::Sim;
use crate::disk_model::SECTOR;
use crate::trace::Link;
use outrider_core::env::DeviceRole;
use std::cell::RefCell;
use std::collections::BTreeSet;

/// How many stretches of lost sectors are told one by one.
const TOLD: usize = 6;

/// Whether somebody was told that a device has something to lose.
#[derive(Default)]
pub(super) struct Risk {
    /// Nodes some of whose writes are in the cache only.
    of: RefCell<BTreeSet<u32>>,
}

impl Risk {
    /// Tells of each node whose writes a loss of power can now take back, or no more.
    pub fn tell(&self, sim: &Sim, role: DeviceRole, unsettled: impl FnOnce() -> BTreeSet<u32>) {
        if !sim.trace.is_logging() {
            return;
        }
        let (now, was) = (unsettled(), self.of.take());
        for node in was.difference(&now) {
            sim.trace
                .remark(sim.now(), *node, "durable", Link::None, || {
                    format!("{role:?}: nothing of it can be lost any more")
                });
        }
        for node in now.difference(&was) {
            sim.trace
                .remark(sim.now(), *node, "unflushed", Link::None, || {
                    format!("{role:?}: some of it is in the device's cache only")
                });
        }
        *self.of.borrow_mut() = now;
    }
}

/// Tells what of the sectors from `offset` on reached a device: a write that was under
/// way when its process ended.
pub(super) fn tell_left(sim: &Sim, node: u32, role: DeviceRole, offset: u64, landed: &[bool]) {
    sim.trace.remark(sim.now(), node, "left", Link::None, || {
        let kept = landed.iter().filter(|landed| **landed).count();
        let what = match kept {
            0 => "never reached the device".to_owned(),
            all if all == landed.len() => "reached the device, unflushed".to_owned(),
            some => format!("{some} of {} sectors reached the device", landed.len()),
        };
        let len = landed.len() * SECTOR;
        format!("{role:?} {offset:#x}+{len:#x} was under way: {what}")
    });
}

/// Tells which sectors a loss of power has taken back.
pub(super) fn tell_lost(sim: &Sim, role: DeviceRole, lost: &[(u64, u32)]) {
    if !sim.trace.is_logging() {
        return;
    }
    let stretches = stretches(lost);
    let sector = SECTOR as u64;
    for (first, count, node) in stretches.iter().take(TOLD) {
        sim.trace.remark(sim.now(), *node, "lost", Link::None, || {
            let (at, len) = (first * sector, count * sector);
            format!("{role:?} {at:#x}+{len:#x} was written and never flushed: it is as before")
        });
    }
    if let Some((_, _, node)) = stretches.get(TOLD) {
        sim.trace.remark(sim.now(), *node, "lost", Link::None, || {
            format!("{role:?}: {} more stretches", stretches.len() - TOLD)
        });
    }
}

/// First sector, number of sectors and writer of what lies side by side.
fn stretches(sectors: &[(u64, u32)]) -> Vec<(u64, u64, u32)> {
    let mut out: Vec<(u64, u64, u32)> = Vec::new();
    for (number, node) in sectors {
        match out.last_mut() {
            Some((first, count, by)) if *first + *count == *number && by == node => *count += 1,
            _ => out.push((*number, 1, *node)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_side_by_side_of_one_writer_are_told_as_one() {
        let sectors = [(3, 0), (4, 0), (5, 1), (9, 1)];
        assert_eq!(stretches(&sectors), [(3, 2, 0), (5, 1, 1), (9, 1, 1)]);
    }
}

//! Simulated block devices: the medium of `disk_model`, with latency, stalls,
//! errors, crashes, and a trap that fires at the n-th request.
//!
//! A request goes on without its future, as one in a device's queue does: a
//! write takes effect when it completes. At a crash each sector of each write
//! in flight may have reached the medium or not.

use super::flying::{Ledger, Request};
use super::risk::{self, Risk};
use super::{Host, Life, Sim};
use crate::disk_model::{Holder, Medium, SECTOR, Still, Survival};
use crate::plan::{DiskFault, DiskOp};
use crate::rng::Stream;
use outrider_core::env::{
    AlignedBuf, BlockDevice, DeviceError, DeviceRole, IoBuf, LocalBoxFuture, WriteFlags,
};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use tokio::sync::oneshot;

/// How long requests take, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Shortest request.
    pub base: u64,
    /// Random addition to each request.
    pub spread: u64,
    /// Addition for a flush.
    pub flush: u64,
    /// Addition for each 4 KiB.
    pub per_sector: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            base: 60_000,
            spread: 60_000,
            flush: 200_000,
            per_sector: 2_000,
        }
    }
}

struct Flight {
    offset: u64,
    bufs: Vec<IoBuf>,
    fua: bool,
    node: u32,
    seat: u32,
}

/// What happens when a request completes.
type End = Box<dyn FnOnce()>;
type Trap = (u64, Box<dyn FnOnce()>);

/// A write that reached a medium, or part of one.
pub struct Landed<'a> {
    /// Which device.
    pub role: DeviceRole,
    /// The machine it came from.
    pub node: u32,
    /// The mount it came from (see [`Life::seat`]).
    pub seat: u32,
    /// Where.
    pub offset: u64,
    /// What.
    pub bufs: &'a [IoBuf],
}

type Watch = Rc<dyn Fn(&Landed<'_>)>;

/// A write that a living mount asks for, by its seat; where, on which device.
type Asked = Rc<dyn Fn(u32, DeviceRole, u64)>;

/// What the devices know about the machines that use them.
///
/// The volatile cache belongs to the storage, which all machines share: the end
/// of one machine loses only its requests in flight, each sector by chance; the
/// end of the storage ([`Disks::crash`] with a survival) loses what was not
/// flushed, whoever wrote it.
#[derive(Default)]
struct Machines {
    /// Requests of earlier epochs never complete.
    epochs: RefCell<BTreeMap<u32, u64>>,
    /// Traps by machine.
    traps: RefCell<BTreeMap<u32, Trap>>,
    /// Machines whose requests are refused: their registration was taken away.
    barred: RefCell<BTreeSet<u32>>,
    /// Machines that stand still: their requests end when they go on.
    frozen: RefCell<BTreeMap<u32, Vec<End>>>,
    watches: RefCell<Vec<Watch>>,
    asked: RefCell<Option<Asked>>,
}

impl Machines {
    fn epoch(&self, node: u32) -> u64 {
        self.epochs.borrow().get(&node).copied().unwrap_or(0)
    }
}

struct Disk {
    sim: Rc<Sim>,
    role: DeviceRole,
    rng: Stream,
    timing: Cell<Timing>,
    slow_rng: Stream,
    /// Chance of a slow read in thousandths, and how slow at most in nanoseconds.
    slow_reads: Cell<(u64, u64)>,
    medium: RefCell<Medium>,
    flights: RefCell<BTreeMap<u64, Flight>>,
    asked: Rc<Ledger<Request>>,
    risk: Risk,
    next_id: Cell<u64>,
    faults: RefCell<Vec<DiskFault>>,
    epoch: Cell<u64>,
    trap: Rc<RefCell<Option<Trap>>>,
    requests: Rc<Cell<u64>>,
    machines: Rc<Machines>,
}

/// The two devices of the volume.
pub struct Disks {
    meta: Rc<Disk>,
    data: Rc<Disk>,
    trap: Rc<RefCell<Option<Trap>>>,
    requests: Rc<Cell<u64>>,
    machines: Rc<Machines>,
}

impl Disks {
    /// Empty devices of these sizes, in bytes.
    pub fn new(sim: &Rc<Sim>, meta: u64, data: u64, timing: Timing) -> Rc<Self> {
        let trap = Rc::new(RefCell::new(None));
        let requests = Rc::new(Cell::new(0));
        let machines = Rc::new(Machines::default());
        let disk = |role, size, name| {
            Rc::new(Disk {
                sim: Rc::clone(sim),
                role,
                rng: Stream::new(sim.seed, name, 0),
                timing: Cell::new(timing),
                slow_rng: Stream::new(sim.seed, name, 1),
                slow_reads: Cell::new((0, 1)),
                medium: RefCell::new(Medium::new(size)),
                flights: RefCell::default(),
                asked: Rc::default(),
                risk: Risk::default(),
                next_id: Cell::new(0),
                faults: RefCell::default(),
                epoch: Cell::new(0),
                trap: Rc::clone(&trap),
                requests: Rc::clone(&requests),
                machines: Rc::clone(&machines),
            })
        };
        Rc::new(Self {
            meta: disk(DeviceRole::Meta, meta, "meta disk"),
            data: disk(DeviceRole::Data, data, "data disk"),
            trap,
            requests,
            machines,
        })
    }

    fn disk(&self, role: DeviceRole) -> &Rc<Disk> {
        match role {
            DeviceRole::Meta => &self.meta,
            DeviceRole::Data => &self.data,
        }
    }

    /// A handle for a process.
    pub fn open(&self, host: &Host, role: DeviceRole) -> Rc<dyn BlockDevice> {
        Rc::new(Handle {
            disk: Rc::clone(self.disk(role)),
            life: Rc::clone(&host.life),
            node: host.node.id,
        })
    }

    /// Makes some reads slow: a chance in thousandths, and nanoseconds at most.
    pub fn set_slow_reads(&self, permille: u64, by: u64) {
        for disk in [&self.meta, &self.data] {
            disk.slow_reads.set((permille, by));
        }
    }

    /// Adds a fault; it begins and ends by itself.
    pub fn add_fault(&self, fault: DiskFault) {
        self.disk(fault.role()).faults.borrow_mut().push(fault);
    }

    /// Ends all faults: the devices work from now on.
    pub fn heal(&self) {
        self.meta.faults.borrow_mut().clear();
        self.data.faults.borrow_mut().clear();
    }

    /// Calls `f` when the `nth` write or flush from now is asked for.
    pub fn set_trap(&self, nth: u64, f: impl FnOnce() + 'static) {
        *self.trap.borrow_mut() = Some((nth, Box::new(f)));
    }

    /// The world is over: gives their contents back, whoever still holds them.
    pub fn end(&self) {
        self.clear_trap();
        self.machines.traps.take();
        self.machines.watches.take();
        self.machines.asked.take();
        // Requests of machines that stand still own the devices.
        let parked = self.machines.frozen.take();
        drop(parked);
        for disk in [&self.meta, &self.data] {
            disk.flights.borrow_mut().clear();
            let size = disk.medium.borrow().size();
            *disk.medium.borrow_mut() = Medium::new(size);
        }
    }

    /// Forgets the trap.
    pub fn clear_trap(&self) {
        *self.trap.borrow_mut() = None;
    }

    /// Number of writes and flushes asked for so far.
    pub fn requests(&self) -> u64 {
        self.requests.get()
    }

    /// The process that used the devices is gone: requests in flight end here.
    /// With `survival`, power is lost too.
    pub fn crash(&self, survival: Option<Survival>) {
        self.meta.crash(survival);
        self.data.crash(survival);
    }

    /// Calls `f` when the `nth` write or flush of machine `node` from now is asked for.
    pub fn set_trap_of(&self, node: u32, nth: u64, f: impl FnOnce() + 'static) {
        let mut traps = self.machines.traps.borrow_mut();
        traps.insert(node, (nth, Box::new(f)));
    }

    /// Forgets the trap of machine `node`.
    pub fn clear_trap_of(&self, node: u32) {
        self.machines.traps.borrow_mut().remove(&node);
    }

    /// Machine `node` (or its one process) is gone: its requests in flight end
    /// here, each sector written or not. What completed stays with the storage.
    pub fn end_of(&self, node: u32) {
        *self.machines.epochs.borrow_mut().entry(node).or_default() += 1;
        if let Some(parked) = self.machines.frozen.borrow_mut().get_mut(&node) {
            parked.clear();
        }
        self.meta.end_of(node);
        self.data.end_of(node);
    }

    /// Refuses requests of machine `node` from now on, as storage does after its
    /// registration was taken away. Of its writes in flight each sector is written or
    /// not, now; then all its requests in flight end with an error, as the machine may
    /// live and wait for them.
    pub fn bar(&self, node: u32) {
        self.meta.end_of(node);
        self.data.end_of(node);
        self.machines.barred.borrow_mut().insert(node);
    }

    /// Takes requests of machine `node` again.
    pub fn admit(&self, node: u32) {
        self.machines.barred.borrow_mut().remove(&node);
    }

    /// Machine `node` stands still: its requests do not end until [`Disks::thaw`].
    pub fn freeze(&self, node: u32) {
        self.machines.frozen.borrow_mut().entry(node).or_default();
    }

    /// Machine `node` goes on: its queued requests end one after the other, in any order.
    pub fn thaw(&self, node: u32) {
        let parked = self.machines.frozen.borrow_mut().remove(&node);
        let disk = &self.meta;
        for end in parked.into_iter().flatten() {
            let at = disk.sim.now() + disk.rng.below(2_000_000);
            disk.sim.call_at(at, end);
        }
    }

    /// Tells `watch`, too, of every write that reaches a medium.
    pub fn add_watch(&self, watch: impl Fn(&Landed<'_>) + 'static) {
        self.machines.watches.borrow_mut().push(Rc::new(watch));
    }

    /// Requests that have not ended.
    pub fn under_way(&self) -> Vec<Request> {
        let mut all = self.meta.asked.list();
        all.extend(self.data.asked.list());
        all.sort_by_key(|request| request.asked);
        all
    }

    /// Faults that may strike at `now`, machines that stand still, and machines whose
    /// requests are refused.
    pub fn troubles(&self, now: u64) -> (Vec<DiskFault>, Vec<u32>, Vec<u32>) {
        let in_force = |fault: &DiskFault| match fault {
            DiskFault::Error { from, until, .. } | DiskFault::Stall { from, until, .. } => {
                (*from..*until).contains(&now)
            }
        };
        let faults = [&self.meta, &self.data].into_iter().flat_map(|disk| {
            let faults = disk.faults.borrow();
            let own: Vec<DiskFault> = faults.iter().filter(|f| in_force(f)).cloned().collect();
            own
        });
        (
            faults.collect(),
            self.machines.frozen.borrow().keys().copied().collect(),
            self.machines.barred.borrow().iter().copied().collect(),
        )
    }

    /// Tells `asked` of every write of a living mount when it is handed over, also of
    /// one that is refused.
    pub fn set_asked(&self, asked: impl Fn(u32, DeviceRole, u64) + 'static) {
        *self.machines.asked.borrow_mut() = Some(Rc::new(asked));
    }

    /// What is on a device now.
    pub fn medium(&self, role: DeviceRole) -> Medium {
        self.disk(role).medium.borrow().clone()
    }

    /// Whether the data device shows contents that no flush will make durable: one that
    /// covered them has failed.
    pub fn shows_doomed_data(&self) -> bool {
        self.data.medium.borrow().shows_doomed()
    }

    /// A device as it is, whenever it is asked: reading takes no time and is no event.
    pub fn bare(&self, role: DeviceRole) -> Rc<dyn BlockDevice> {
        Rc::new(Still(Rc::clone(self.disk(role))))
    }

    /// What of a device may have changed: see [`Medium::take_changes`].
    pub fn take_changes(&self, role: DeviceRole) -> Option<Vec<(u64, u64)>> {
        self.disk(role).medium.borrow_mut().take_changes()
    }

    /// Digest of both devices.
    pub fn hash(&self) -> u64 {
        let mut digest = crate::trace::Digest::default();
        digest.word(self.meta.medium.borrow().hash());
        digest.word(self.data.medium.borrow().hash());
        digest.value()
    }
}

impl Holder for Rc<Disk> {
    fn with<T>(&self, f: impl FnOnce(&Medium) -> T) -> T {
        f(&self.medium.borrow())
    }
}

impl Disk {
    fn crash(&self, survival: Option<Survival>) {
        self.asked.keep(|_| false);
        self.epoch.set(self.epoch.get() + 1);
        let mut medium = self.medium.borrow_mut();
        let keep = self.rng.below(3);
        for flight in self.flights.take().into_values() {
            let mut landed = Vec::new();
            medium.write_some(flight.offset, &flight.bufs, flight.node, false, |_| {
                let kept = match keep {
                    0 => false,
                    1 => true,
                    _ => self.rng.chance(500),
                };
                landed.push(kept);
                kept
            });
            risk::tell_left(&self.sim, flight.node, self.role, flight.offset, &landed);
        }
        if let Some(survival) = survival {
            let lost = medium.lose_power(survival, &self.rng);
            risk::tell_lost(&self.sim, self.role, &lost);
        }
        drop(medium);
        self.tell_risk();
    }

    fn tell_risk(&self) {
        self.risk.tell(&self.sim, self.role, || {
            self.medium.borrow().unsettled_writers()
        });
    }

    fn end_of(&self, node: u32) {
        self.asked.keep(|request| request.node != node);
        let gone: Vec<u64> = {
            let flights = self.flights.borrow();
            let of_node = flights.iter().filter(|(_, flight)| flight.node == node);
            of_node.map(|(id, _)| *id).collect()
        };
        let keep = self.rng.below(3);
        for id in gone {
            let Some(flight) = self.flights.borrow_mut().remove(&id) else {
                continue;
            };
            self.land(&flight, |_| match keep {
                0 => false,
                1 => true,
                _ => self.rng.chance(500),
            });
        }
    }

    /// Writes those sectors of a request that `keep` chooses.
    fn land(&self, flight: &Flight, mut keep: impl FnMut(u64) -> bool) {
        let mut landed = Vec::new();
        let mut medium = self.medium.borrow_mut();
        medium.write_some(flight.offset, &flight.bufs, flight.node, false, |sector| {
            let kept = keep(sector);
            landed.push(kept);
            kept
        });
        drop(medium);
        risk::tell_left(&self.sim, flight.node, self.role, flight.offset, &landed);
        self.tell_risk();
        if landed.contains(&true) {
            self.tell(flight);
        }
    }

    fn tell(&self, flight: &Flight) {
        let watches = self.machines.watches.borrow().clone();
        for watch in watches {
            watch(&Landed {
                role: self.role,
                node: flight.node,
                seat: flight.seat,
                offset: flight.offset,
                bufs: &flight.bufs,
            });
        }
    }

    fn role_word(&self) -> u64 {
        match self.role {
            DeviceRole::Meta => 0,
            DeviceRole::Data => 1,
        }
    }

    fn duration(&self, op: DiskOp, len: u64) -> u64 {
        let timing = self.timing.get();
        let flush = if op == DiskOp::Flush { timing.flush } else { 0 };
        let sectors = len / SECTOR as u64;
        let (permille, by) = self.slow_reads.get();
        let slow = if op == DiskOp::Read && self.slow_rng.chance(permille) {
            self.slow_rng.below(by + 1)
        } else {
            0
        };
        self.sim.note_delay(slow);
        slow + timing.base + self.rng.below(timing.spread + 1) + flush + sectors * timing.per_sector
    }

    /// When a request that would complete at `at` completes, given the stalls.
    fn after_stalls(&self, mut at: u64) -> u64 {
        for fault in self.faults.borrow().iter() {
            if let DiskFault::Stall { from, until, .. } = fault
                && (*from..*until).contains(&at)
            {
                at = *until;
            }
        }
        at
    }

    /// Whether the request fails, by the errors in force.
    fn fails(&self, op: DiskOp) -> bool {
        let now = self.sim.now();
        let mut failed = false;
        self.faults.borrow_mut().retain_mut(|fault| {
            if let DiskFault::Error {
                op: which,
                from,
                until,
                times,
                permille,
                ..
            } = fault
                && *which == op
                && (*from..*until).contains(&now)
                && !failed
                && self.rng.chance(u64::from(*permille))
            {
                failed = true;
                *times -= 1;
                return *times > 0;
            }
            true
        });
        failed
    }

    fn spring_trap(&self, node: u32) {
        self.requests.set(self.requests.get() + 1);
        let own = {
            let mut traps = self.machines.traps.borrow_mut();
            match traps.get_mut(&node) {
                Some((left, _)) if *left > 1 => {
                    *left -= 1;
                    None
                }
                _ => traps.remove(&node),
            }
        };
        if let Some((_, call)) = own {
            call();
        }
        let sprung = {
            let mut trap = self.trap.borrow_mut();
            match &mut *trap {
                Some((left, _)) if *left > 1 => {
                    *left -= 1;
                    None
                }
                _ => trap.take(),
            }
        };
        if let Some((_, call)) = sprung {
            call();
        }
    }
}

struct Handle {
    disk: Rc<Disk>,
    life: Rc<Life>,
    node: u32,
}

impl Handle {
    fn check(&self, op: &'static str, offset: u64, len: u64) -> Result<(), DeviceError> {
        assert!(
            offset.is_multiple_of(SECTOR as u64) && len.is_multiple_of(SECTOR as u64),
            "{op} of {len} bytes at {offset} is not aligned"
        );
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(DeviceError::OutOfRange {
                op,
                offset,
                len,
                size,
            });
        }
        if !self.life.is_alive() {
            return Err(DeviceError::Shut);
        }
        if self.disk.machines.barred.borrow().contains(&self.node) {
            return Err(Ended::Refused.error(op, offset, len));
        }
        Ok(())
    }

    /// Completes a request later, unless a crash comes first.
    fn complete<T: 'static>(
        &self,
        op: DiskOp,
        offset: u64,
        len: u64,
        finish: impl FnOnce(&Disk, Ended) -> T + 'static,
    ) -> oneshot::Receiver<T> {
        let (tell, told) = oneshot::channel();
        let disk = Rc::clone(&self.disk);
        let (node, epoch) = (self.node, disk.epoch.get());
        let own_epoch = disk.machines.epoch(node);
        let now = disk.sim.now();
        let at = disk.after_stalls(now + disk.duration(op, len));
        let (sim, machines) = (Rc::clone(&disk.sim), Rc::clone(&disk.machines));
        let asked = disk.asked.enter(Request {
            node,
            device: disk.role,
            op,
            offset,
            len,
            asked: now,
            ends: at,
        });
        let end = move || {
            drop(asked);
            if disk.epoch.get() != epoch || disk.machines.epoch(node) != own_epoch {
                return;
            }
            let ended = if disk.machines.barred.borrow().contains(&node) {
                Ended::Refused
            } else if disk.fails(op) {
                Ended::Failed
            } else {
                Ended::Well
            };
            let args = [disk.role_word(), op as u64, offset, len, ended as u64];
            disk.sim
                .trace
                .event(disk.sim.now(), node, op.event(), &args, || {
                    let outcome = match ended {
                        Ended::Well => "",
                        Ended::Failed => " FAILED",
                        Ended::Refused => " REFUSED",
                    };
                    format!("{:?} {offset:#x}+{len:#x}{outcome}", disk.role)
                });
            let out = finish(&disk, ended);
            let _ = tell.send(out);
        };
        sim.call_at(at, move || {
            if let Some(parked) = machines.frozen.borrow_mut().get_mut(&node) {
                return parked.push(Box::new(end));
            }
            end();
        });
        told
    }
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Well,
    /// An injected error.
    Failed,
    /// The machine was barred while the request was in flight.
    Refused,
}

impl Ended {
    fn error(self, op: &'static str, offset: u64, len: u64) -> DeviceError {
        let detail = match self {
            Ended::Refused => "reservation conflict",
            _ => "injected",
        };
        DeviceError::Io {
            op,
            offset,
            len,
            detail: detail.to_owned(),
        }
    }
}

/// Waits for a request whose owner may be gone by the time it ends.
async fn outcome<T>(told: oneshot::Receiver<T>) -> T {
    match told.await {
        Ok(out) => out,
        // Only a crash drops the sender, and then nobody of this life runs again.
        Err(_) => std::future::pending().await,
    }
}

impl BlockDevice for Handle {
    fn size(&self) -> u64 {
        self.disk.medium.borrow().size()
    }

    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalBoxFuture<'static, (AlignedBuf, Result<(), DeviceError>)> {
        let len = buf.len() as u64;
        if let Err(error) = self.check("read", offset, len) {
            return Box::pin(std::future::ready((buf, Err(error))));
        }
        let mut buf = buf;
        let told = self.complete(DiskOp::Read, offset, len, move |disk, ended| {
            if ended != Ended::Well {
                return (buf, Err(ended.error("read", offset, len)));
            }
            let medium = disk.medium.borrow();
            medium.read(offset, &mut buf);
            // A write in flight may be seen half done, sector by sector.
            for flight in disk.flights.borrow().values() {
                let mut at = flight.offset;
                for sector in flight.bufs.iter().flat_map(|buf| buf.chunks(SECTOR)) {
                    if (offset..offset + len).contains(&at) && disk.rng.chance(500) {
                        let into = (at - offset) as usize;
                        buf[into..into + SECTOR].copy_from_slice(sector);
                    }
                    at += SECTOR as u64;
                }
            }
            (buf, Ok(()))
        });
        Box::pin(outcome(told))
    }

    fn write(
        &self,
        offset: u64,
        bufs: Vec<IoBuf>,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        let asked = self.disk.machines.asked.borrow().clone();
        if let Some(asked) = asked.filter(|_| self.life.is_alive()) {
            asked(self.life.seat(), self.disk.role, offset);
        }
        if let Err(error) = self.check("write", offset, len) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let disk = &self.disk;
        let id = disk.next_id.get();
        disk.next_id.set(id + 1);
        disk.flights.borrow_mut().insert(
            id,
            Flight {
                offset,
                bufs,
                fua: flags.fua,
                node: self.node,
                seat: self.life.seat(),
            },
        );
        let told = self.complete(DiskOp::Write, offset, len, move |disk, ended| {
            if ended == Ended::Refused {
                // Its sectors landed, or not, when the machine was barred.
                return Err(ended.error("write", offset, len));
            }
            let flight = disk.flights.borrow_mut().remove(&id);
            let flight = flight.expect("a write in flight until it completes");
            if ended == Ended::Failed {
                disk.land(&flight, |_| disk.rng.chance(500));
                return Err(ended.error("write", offset, len));
            }
            let mut medium = disk.medium.borrow_mut();
            medium.write(flight.offset, &flight.bufs, flight.node, flight.fua);
            drop(medium);
            disk.tell_risk();
            disk.tell(&flight);
            Ok(())
        });
        disk.spring_trap(self.node);
        Box::pin(outcome(told))
    }

    fn flush(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        if let Err(error) = self.check("flush", 0, 0) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let point = self.disk.medium.borrow().flush_point();
        let node = self.node;
        let told = self.complete(DiskOp::Flush, 0, 0, move |disk, ended| {
            let mut medium = disk.medium.borrow_mut();
            if ended == Ended::Failed {
                medium.fail_flush(point, node, &disk.rng);
            }
            if ended != Ended::Well {
                return Err(ended.error("flush", 0, 0));
            }
            medium.settle(point);
            drop(medium);
            disk.tell_risk();
            Ok(())
        });
        self.disk.spring_trap(self.node);
        Box::pin(outcome(told))
    }
}

#[cfg(test)]
mod tests;

//! The data device and write-back: what users wrote reaches the device early in
//! large requests, and completely before a commit (spec 04 section 6 steps 1 and 6).
//!
//! What can go wrong: reporting a write that failed as durable. A failed batch is
//! dirty again and stays in the count of what a commit waits for, so the commit
//! fails and is tried again until the blocks are on the device.

use super::super::table::InodeState;
use super::pages::Batch;
use super::{BLOCK, Policy};
use crate::env::{
    AlignedBuf, BlockDevice, DeviceError, Env, IoBuf, LocalBoxFuture, Signal, WriteFlags, mutant,
    probe,
};
use crate::log::DirtyData;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// Bytes of one request to the device.
const REQUEST_BYTES: u64 = 1 << 20;

struct Shared {
    env: Env,
    device: Rc<dyn BlockDevice>,
    policy: Policy,
    /// Inodes that may have dirty blocks, by number.
    dirty: RefCell<BTreeMap<u64, Rc<InodeState>>>,
    in_flight_bytes: Cell<u64>,
    in_flight: Cell<u64>,
    failed: RefCell<Option<DeviceError>>,
    /// Written since the last flush that succeeded, in order.
    unflushed: RefCell<Unflushed>,
    changed: Signal,
    /// What was dirty is forgotten: the device does not have what was written.
    abandoned: Cell<bool>,
}

/// What a device may still lose: kept so that it can be written again after a
/// flush that failed, as far as memory allows.
#[derive(Default)]
struct Unflushed {
    batches: Vec<Batch>,
    bytes: u64,
    /// More was written than is kept.
    overflowed: bool,
    /// A flush failed: write everything again before the next.
    redo: bool,
    /// A flush failed and not everything was kept: no commit may succeed again.
    lost: bool,
}

/// The data device of a mount and everything not yet on it. Cheap to clone.
#[derive(Clone)]
pub struct DataStore {
    shared: Rc<Shared>,
}

impl DataStore {
    /// Nothing dirty yet.
    pub fn new(env: Env, device: Rc<dyn BlockDevice>, policy: Policy) -> Self {
        Self {
            shared: Rc::new(Shared {
                env,
                device,
                policy,
                dirty: RefCell::default(),
                in_flight_bytes: Cell::new(0),
                in_flight: Cell::new(0),
                failed: RefCell::new(None),
                unflushed: RefCell::default(),
                changed: Signal::default(),
                abandoned: Cell::new(false),
            }),
        }
    }

    /// The FREE choices in force.
    pub fn policy(&self) -> &Policy {
        &self.shared.policy
    }

    /// Data blocks that fit the device.
    pub(super) fn device_blocks(&self) -> u64 {
        self.shared.device.size() / BLOCK
    }

    /// Reads `blocks` blocks from data block `blkno`.
    pub(super) async fn read(&self, blkno: u64, blocks: u64) -> Result<IoBuf, DeviceError> {
        let buf = AlignedBuf::to_fill((blocks * BLOCK) as usize);
        let (buf, result) = self.shared.device.read(blkno * BLOCK, buf).await;
        result.map(|()| Arc::new(buf))
    }

    /// For who has read, of buffered blocks too.
    ///
    /// # Errors
    /// `Shut` once they are forgotten: what was read instead may be older.
    pub(super) fn still_buffered(&self) -> Result<(), DeviceError> {
        match self.shared.abandoned.get() {
            true => Err(DeviceError::Shut),
            false => Ok(()),
        }
    }

    /// Starts a task of this actor.
    pub(super) fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + 'static) {
        self.shared.env.spawn(name, task);
    }

    /// Notes that the inode got dirty blocks; sends them off where they are many.
    pub(super) fn dirtied(&self, state: &Rc<InodeState>) {
        self.shared
            .dirty
            .borrow_mut()
            .entry(state.ino)
            .or_insert_with(|| state.clone());
        if state.data.dirty_blocks() * BLOCK >= self.shared.policy.writeback_bytes {
            self.write_inode(state);
        }
    }

    /// Waits until few enough bytes are on their way. Call before any lock is taken.
    pub(super) async fn throttle(&self) {
        let shared = &self.shared;
        let max = shared.policy.dirty_bytes_max;
        if shared.in_flight_bytes.get() <= max {
            return;
        }
        probe("data.throttle");
        shared
            .changed
            .wait_for(|| (shared.in_flight_bytes.get() <= max).then_some(()))
            .await;
    }

    /// Bytes buffered or on their way, for status and oracles.
    pub fn dirty_bytes(&self) -> u64 {
        let dirty = self.shared.dirty.borrow();
        let buffered: u64 = dirty.values().map(|s| s.data.dirty_blocks() * BLOCK).sum();
        buffered + self.shared.in_flight_bytes.get()
    }

    /// Forgets everything that is not on the device: forced unmount.
    pub fn abandon(&self) {
        self.shared.abandoned.set(true);
        for state in std::mem::take(&mut *self.shared.dirty.borrow_mut()).into_values() {
            state.data.drop_from(0);
        }
    }

    /// Sends all dirty blocks of an inode.
    fn write_inode(&self, state: &Rc<InodeState>) {
        for batch in batches(state) {
            self.submit(state.clone(), batch, false);
        }
    }

    /// Sends a batch; `durable`: it needs no flush when it has ended.
    fn submit(&self, state: Rc<InodeState>, batch: Batch, durable: bool) {
        let shared = self.shared.clone();
        shared.in_flight.set(shared.in_flight.get() + 1);
        shared
            .in_flight_bytes
            .set(shared.in_flight_bytes.get() + batch.bytes());
        let request = shared.device.write(
            batch.blkno * BLOCK,
            batch.bufs.clone(),
            WriteFlags { fua: durable },
        );
        let store = self.clone();
        self.spawn("data_write", async move {
            let result = request.await;
            // Mutant: breaks spec 14 section 20, what was not written stays dirty.
            let result = if mutant("write_error_ignored") {
                Ok(())
            } else {
                result
            };
            state.data.written(&batch, result.is_ok());
            shared.in_flight.set(shared.in_flight.get() - 1);
            shared
                .in_flight_bytes
                .set(shared.in_flight_bytes.get() - batch.bytes());
            if result.is_ok() {
                if !durable {
                    shared.keep_until_flushed(batch);
                }
            } else if let Err(error) = result {
                probe("data.write_failed");
                tracing::error!(ino = state.ino, %error, "file data was not written");
                *shared.failed.borrow_mut() = Some(error);
            }
            store.settle(&state);
            shared.changed.wake_all();
        });
    }

    /// After a write ended: an inode without dirty blocks leaves the table.
    fn settle(&self, state: &Rc<InodeState>) {
        if state.data.is_idle() {
            self.shared.dirty.borrow_mut().remove(&state.ino);
        }
    }

    fn start_all(&self) {
        *self.shared.failed.borrow_mut() = None;
        let states: Vec<_> = self.shared.dirty.borrow().values().cloned().collect();
        // Where little is dirty and no flush is due anyway, writes that are durable
        // when they end save the flush.
        let mut durable = !self.needs_flush() && self.shared.in_flight.get() == 0;
        let mut writes = Vec::new();
        for state in &states {
            writes.extend(batches(state).map(|batch| (state.clone(), batch)));
        }
        durable &= writes.len() <= self.shared.policy.fua_requests;
        if durable && !writes.is_empty() {
            probe("data.written_durably");
        }
        for (state, batch) in writes {
            self.submit(state, batch, durable);
        }
        for state in states {
            self.settle(&state);
        }
    }

    /// After a flush that failed nothing written since the last good one can be
    /// relied on: it is written again, oldest first.
    async fn redo_unflushed(&self) -> Result<(), DeviceError> {
        let shared = &self.shared;
        if shared.unflushed.borrow().lost {
            return Err(DeviceError::Io {
                op: "flush",
                offset: 0,
                len: 0,
                detail: "an earlier flush failed and what it covered is not in memory any more"
                    .to_owned(),
            });
        }
        if !std::mem::take(&mut shared.unflushed.borrow_mut().redo) {
            return Ok(());
        }
        probe("data.redo_after_failed_flush");
        // Newer writes of the same blocks must not be overtaken: they end first,
        // are kept behind the older ones, and are written again after them.
        shared
            .changed
            .wait_for(|| (shared.in_flight.get() == 0).then_some(()))
            .await;
        let writes: Vec<_> = {
            let kept = shared.unflushed.borrow();
            kept.batches
                .iter()
                .map(|b| (b.blkno, b.bufs.clone()))
                .collect()
        };
        for (blkno, bufs) in writes {
            let write = shared
                .device
                .write(blkno * BLOCK, bufs, WriteFlags::default());
            if let Err(error) = write.await {
                shared.unflushed.borrow_mut().redo = true;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn wait_all(self) -> Result<(), DeviceError> {
        self.redo_unflushed().await?;
        loop {
            let shared = &self.shared;
            shared
                .changed
                .wait_for(|| (shared.in_flight.get() == 0).then_some(()))
                .await;
            if let Some(error) = shared.failed.borrow_mut().take() {
                return Err(error);
            }
            // Blocks written again while their write was under way.
            if shared.dirty.borrow().is_empty() {
                return Ok(());
            }
            self.start_all();
            if self.shared.in_flight.get() == 0 {
                return Ok(());
            }
        }
    }
}

impl DirtyData for DataStore {
    fn start_writeback(&self) {
        self.start_all();
    }

    fn wait(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        Box::pin(self.clone().wait_all())
    }

    fn needs_flush(&self) -> bool {
        let kept = self.shared.unflushed.borrow();
        kept.bytes > 0 || kept.redo || kept.lost
    }

    fn flushed(&self, durable: bool) {
        let mut kept = self.shared.unflushed.borrow_mut();
        if durable {
            *kept = Unflushed::default();
        } else if kept.overflowed {
            kept.lost = true;
        } else {
            kept.redo = true;
        }
    }
}

/// All dirty blocks of an inode as batches; each is marked as being written when it
/// is taken.
fn batches(state: &InodeState) -> impl Iterator<Item = Batch> + '_ {
    let mut from = 0;
    std::iter::from_fn(move || {
        let batch = state.data.next_batch(from, REQUEST_BYTES)?;
        from = batch.start + batch.bytes() / BLOCK;
        Some(batch)
    })
}

impl Shared {
    fn keep_until_flushed(&self, batch: Batch) {
        let mut kept = self.unflushed.borrow_mut();
        kept.bytes += batch.bytes();
        if kept.overflowed || kept.bytes > self.policy.unflushed_bytes_max {
            kept.overflowed = true;
            kept.batches.clear();
        } else {
            kept.batches.push(batch);
        }
    }
}

impl std::fmt::Debug for DataStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataStore")
            .field("dirty_bytes", &self.dirty_bytes())
            .finish()
    }
}

//! Small seams for unit tests: a memory device, seeded entropy, a clock moved
//! by hand, and an executor that polls local tasks in turn.
//!
//! Not the simulator: no scheduling by seed, no network. It exists so that a
//! module can be tested alone, with I/O errors and power loss, in microseconds.
//! What can go wrong: a test that waits for something nobody will do; the
//! executor then panics with "deadlock" instead of hanging.

use super::{
    ActorMain, AlignedBuf, BlockDevice, Clock, Datagram, DeviceError, DeviceRole, Devices,
    Duration, Entropy, Env, IoBuf, Listener, LocalBoxFuture, NetError, Network, Spawner, Stream,
    Task, Time, WallTime, WriteFlags,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddrV4;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

const PAGE: usize = 4096;

/// Seeded random numbers (SplitMix64).
#[derive(Debug)]
pub struct TestEntropy(Cell<u64>);

impl TestEntropy {
    /// A generator started from `seed`.
    pub fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self(Cell::new(seed)))
    }

    /// Whether a coin that shows heads `num` times in `den` shows heads.
    pub fn chance(&self, num: u64, den: u64) -> bool {
        self.range(0, den) < num
    }
}

impl Entropy for TestEntropy {
    fn next_u64(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// A clock that moves only when told, or when the executor has nothing else to do.
#[derive(Debug, Default)]
pub struct TestClock {
    now: Cell<u64>,
    next_id: Cell<u64>,
    timers: RefCell<BTreeMap<(u64, u64), Waker>>,
}

impl TestClock {
    /// A clock at time zero.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Moves time on and wakes the timers that are due.
    pub fn advance(&self, by: Duration) {
        let now = (Time(self.now.get()) + by).nanos();
        self.now.set(now);
        let later = self.timers.borrow_mut().split_off(&(now + 1, 0));
        let due = self.timers.replace(later);
        due.into_values().for_each(Waker::wake);
    }

    /// Moves time to the earliest timer; false if there is none.
    pub fn advance_to_next_timer(&self) -> bool {
        let first = self.timers.borrow().keys().next().map(|(at, _)| *at);
        let Some(at) = first else { return false };
        self.advance(Duration::from_nanos(at.saturating_sub(self.now.get())));
        true
    }
}

/// The clock as actors see it.
struct ClockHandle(Rc<TestClock>);

struct Sleep {
    clock: Rc<TestClock>,
    deadline: u64,
    id: Option<u64>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.clock.now.get() >= self.deadline {
            return Poll::Ready(());
        }
        let id = match self.id {
            Some(id) => id,
            None => {
                let id = self.clock.next_id.get();
                self.clock.next_id.set(id + 1);
                self.id = Some(id);
                id
            }
        };
        let key = (self.deadline, id);
        self.clock
            .timers
            .borrow_mut()
            .insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.clock.timers.borrow_mut().remove(&(self.deadline, id));
        }
    }
}

impl Clock for ClockHandle {
    fn now(&self) -> Time {
        Time(self.0.now.get())
    }
    fn wall(&self) -> WallTime {
        let nanos = self.0.now.get();
        WallTime {
            sec: 1_700_000_000 + (nanos / 1_000_000_000) as i64,
            nsec: (nanos % 1_000_000_000) as u32,
        }
    }
    fn sleep_until(&self, deadline: Time) -> LocalBoxFuture<'static, ()> {
        Box::pin(Sleep {
            clock: self.0.clone(),
            deadline: deadline.nanos(),
            id: None,
        })
    }
}

/// A request that a [`MemDevice`] is about to serve, for fault hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceOp {
    /// `read`, `write` or `flush`.
    pub op: &'static str,
    /// Byte offset; 0 for a flush.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub len: usize,
    /// Number of the request since the device was made, from 0.
    pub index: u64,
}

/// Decides whether a request fails: true is an I/O error.
pub type FaultHook = Box<dyn FnMut(DeviceOp) -> bool>;

type Page = Arc<[u8; PAGE]>;

#[derive(Default)]
struct MemState {
    current: BTreeMap<u64, Page>,
    /// Contents of pages written since the last flush, oldest first; the first
    /// entry is the durable one (`None`: never written).
    unflushed: BTreeMap<u64, Vec<Option<Page>>>,
    hook: Option<FaultHook>,
    reads: u64,
    writes: u64,
    flushes: u64,
    shut: bool,
    yields: bool,
}

/// A sparse device in memory with a volatile write cache, power loss and faults.
/// Clones share the medium.
#[derive(Clone)]
pub struct MemDevice {
    size: u64,
    state: Rc<RefCell<MemState>>,
}

impl MemDevice {
    /// A device of `size` bytes, all zero.
    pub fn new(size: u64) -> Self {
        assert!(size.is_multiple_of(PAGE as u64), "odd device size {size}");
        Self {
            size,
            state: Rc::default(),
        }
    }

    /// The device as core sees it.
    pub fn handle(&self) -> Rc<dyn BlockDevice> {
        Rc::new(self.clone())
    }

    /// Makes every request suspend once before it completes, so that tasks interleave.
    pub fn set_yields(&self, yields: bool) {
        self.state.borrow_mut().yields = yields;
    }

    /// Installs a fault hook, asked before each request.
    pub fn set_fault(&self, hook: Option<FaultHook>) {
        self.state.borrow_mut().hook = hook;
    }

    /// Shuts the device: every request fails with [`DeviceError::Shut`].
    pub fn set_shut(&self, shut: bool) {
        self.state.borrow_mut().shut = shut;
    }

    /// Reads, writes and flushes served so far.
    pub fn counts(&self) -> (u64, u64, u64) {
        let state = self.state.borrow();
        (state.reads, state.writes, state.flushes)
    }

    /// Power loss: each page written since the last flush keeps any one of the
    /// contents it had since then.
    pub fn power_loss(&self, entropy: &dyn Entropy) {
        let mut state = self.state.borrow_mut();
        let unflushed = std::mem::take(&mut state.unflushed);
        for (page, mut versions) in unflushed {
            versions.push(state.current.get(&page).cloned());
            let pick = entropy.range(0, versions.len() as u64) as usize;
            match versions.swap_remove(pick) {
                Some(data) => state.current.insert(page, data),
                None => state.current.remove(&page),
            };
        }
    }

    /// Bytes of the current content, past the fault hooks.
    ///
    /// # Panics
    /// If the range is not whole pages of the device.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.check_range("read", offset, len).expect("in range");
        self.state.borrow().copy_out(offset, &mut out);
        out
    }

    /// Changes the current content, past hooks and the write cache.
    ///
    /// # Panics
    /// If the range is not whole pages of the device.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        self.check_range("write", offset, bytes.len())
            .expect("in range");
        let mut state = self.state.borrow_mut();
        for (i, page) in bytes.chunks_exact(PAGE).enumerate() {
            let page: [u8; PAGE] = page.try_into().expect("a whole page");
            let nr = offset / PAGE as u64 + i as u64;
            state.current.insert(nr, Arc::new(page));
        }
    }

    /// An independent device with the current content, all of it durable.
    pub fn snapshot(&self) -> MemDevice {
        let copy = MemDevice::new(self.size);
        copy.state.borrow_mut().current = self.state.borrow().current.clone();
        copy
    }

    fn check_range(&self, op: &'static str, offset: u64, len: usize) -> Result<(), DeviceError> {
        assert!(
            offset.is_multiple_of(PAGE as u64) && len.is_multiple_of(PAGE),
            "unaligned {op} of {len} bytes at {offset}"
        );
        let len = len as u64;
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(DeviceError::OutOfRange {
                op,
                offset,
                len,
                size: self.size,
            }),
        }
    }

    fn admit(&self, op: &'static str, offset: u64, len: usize) -> Result<(), DeviceError> {
        let mut state = self.state.borrow_mut();
        if state.shut {
            return Err(DeviceError::Shut);
        }
        let index = state.reads + state.writes + state.flushes;
        match op {
            "read" => state.reads += 1,
            "write" => state.writes += 1,
            _ => state.flushes += 1,
        }
        let mut hook = state.hook.take();
        drop(state);
        let fails = hook.as_mut().is_some_and(|hook| {
            hook(DeviceOp {
                op,
                offset,
                len,
                index,
            })
        });
        let mut state = self.state.borrow_mut();
        if state.hook.is_none() {
            state.hook = hook;
        }
        if fails {
            return Err(DeviceError::Io {
                op,
                offset,
                len: len as u64,
                detail: "injected".into(),
            });
        }
        Ok(())
    }

    async fn pause(&self) {
        if self.state.borrow().yields {
            yield_now().await;
        }
    }
}

impl MemState {
    fn copy_out(&self, offset: u64, out: &mut [u8]) {
        for (i, chunk) in out.chunks_exact_mut(PAGE).enumerate() {
            match self.current.get(&(offset / PAGE as u64 + i as u64)) {
                Some(page) => chunk.copy_from_slice(&page[..]),
                None => chunk.fill(0),
            }
        }
    }

    fn copy_in(&mut self, offset: u64, bytes: &[u8], fua: bool) {
        for (i, chunk) in bytes.chunks_exact(PAGE).enumerate() {
            let nr = offset / PAGE as u64 + i as u64;
            let page: [u8; PAGE] = chunk.try_into().expect("a whole page");
            let old = self.current.insert(nr, Arc::new(page));
            if fua {
                self.unflushed.remove(&nr);
            } else {
                self.unflushed.entry(nr).or_default().push(old);
            }
        }
    }
}

impl BlockDevice for MemDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(
        &self,
        offset: u64,
        mut buf: AlignedBuf,
    ) -> LocalBoxFuture<'static, (AlignedBuf, Result<(), DeviceError>)> {
        let dev = self.clone();
        Box::pin(async move {
            let res = dev
                .check_range("read", offset, buf.len())
                .and_then(|()| dev.admit("read", offset, buf.len()));
            if res.is_ok() {
                dev.state.borrow().copy_out(offset, &mut buf);
            }
            dev.pause().await;
            (buf, res)
        })
    }

    fn write(
        &self,
        offset: u64,
        bufs: Vec<IoBuf>,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        let dev = self.clone();
        Box::pin(async move {
            let len = bufs.iter().map(|buf| buf.len()).sum();
            dev.check_range("write", offset, len)?;
            dev.admit("write", offset, len)?;
            dev.pause().await;
            let mut at = offset;
            for buf in bufs {
                dev.state.borrow_mut().copy_in(at, &buf, flags.fua);
                at += buf.len() as u64;
            }
            Ok(())
        })
    }

    fn flush(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        let dev = self.clone();
        Box::pin(async move {
            dev.admit("flush", 0, 0)?;
            dev.pause().await;
            dev.state.borrow_mut().unflushed.clear();
            Ok(())
        })
    }
}

/// Lets every other ready task run once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(move |cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

struct TaskSlot {
    name: String,
    future: RefCell<Option<LocalBoxFuture<'static, ()>>>,
    ready: Arc<Flag>,
    aborted: Cell<bool>,
}

impl Task for TaskSlot {
    fn abort(&self) {
        self.aborted.set(true);
        self.ready.0.store(true, Ordering::Release);
    }
    fn is_finished(&self) -> bool {
        self.aborted.get()
            || self
                .future
                .try_borrow()
                .is_ok_and(|future| future.is_none())
    }
}

/// Polls local tasks in turn on the calling thread.
pub struct Executor {
    clock: Rc<TestClock>,
    tasks: RefCell<Vec<Rc<TaskSlot>>>,
    yields_are_free: Cell<bool>,
}

impl Executor {
    /// An executor that moves `clock` when every task waits.
    pub fn new(clock: Rc<TestClock>) -> Rc<Self> {
        Rc::new(Self {
            clock,
            tasks: RefCell::default(),
            yields_are_free: Cell::new(false),
        })
    }

    /// Nobody yields at yield points from now on, as in production.
    pub fn make_yields_free(&self) {
        self.yields_are_free.set(true);
    }

    /// Starts a task.
    pub fn spawn(&self, name: &str, future: LocalBoxFuture<'static, ()>) -> Rc<dyn Task> {
        let slot = Rc::new(TaskSlot {
            name: name.to_owned(),
            future: RefCell::new(Some(future)),
            ready: Arc::new(Flag(AtomicBool::new(true))),
            aborted: Cell::new(false),
        });
        self.tasks.borrow_mut().push(slot.clone());
        slot
    }

    /// Polls each ready task once; whether there was one.
    fn turn(&self) -> bool {
        let tasks = self.tasks.borrow().clone();
        let mut progress = false;
        for slot in tasks {
            if !slot.ready.0.swap(false, Ordering::AcqRel) {
                continue;
            }
            progress = true;
            let mut future = slot.future.borrow_mut();
            if slot.aborted.get() {
                *future = None;
            }
            let Some(running) = future.as_mut() else {
                continue;
            };
            let waker = Waker::from(slot.ready.clone());
            let polled = running.as_mut().poll(&mut Context::from_waker(&waker));
            if polled.is_ready() || slot.aborted.get() {
                *future = None;
            }
        }
        self.tasks
            .borrow_mut()
            .retain(|slot| slot.future.borrow().is_some());
        progress
    }

    /// Runs `future` and all tasks until `future` is done.
    ///
    /// # Panics
    /// If everything waits and no timer is set.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.drive(future, u64::MAX)
            .expect("a run without a limit ends with its future")
    }

    /// As [`Executor::block_on`], for at most so many turns, each of which polls every
    /// ready task or moves the clock. `None` if they are used up.
    ///
    /// # Panics
    /// If everything waits and no timer is set.
    pub fn drive<T>(&self, future: impl Future<Output = T>, turns: u64) -> Option<T> {
        let mut future = std::pin::pin!(future);
        let main = Arc::new(Flag(AtomicBool::new(true)));
        let waker = Waker::from(main.clone());
        for _ in 0..turns {
            let mut progress = false;
            if main.0.swap(false, Ordering::AcqRel) {
                progress = true;
                let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
                if let Poll::Ready(out) = polled {
                    return Some(out);
                }
            }
            progress |= self.turn();
            if !progress && !self.clock.advance_to_next_timer() {
                let names: Vec<_> = self
                    .tasks
                    .borrow()
                    .iter()
                    .map(|slot| slot.name.clone())
                    .collect();
                panic!("deadlock: the main future and all tasks wait: {names:?}");
            }
        }
        None
    }
}

/// Runs a future that needs no tasks and no timers.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    Executor::new(TestClock::new()).block_on(future)
}

struct TestSpawner {
    exec: Weak<Executor>,
    env: RefCell<Option<Weak<dyn Fn() -> Env>>>,
}

impl Spawner for TestSpawner {
    fn spawn_local(&self, name: &'static str, task: LocalBoxFuture<'static, ()>) -> Rc<dyn Task> {
        let exec = self
            .exec
            .upgrade()
            .expect("the executor outlives its tasks");
        exec.spawn(name, task)
    }
    fn spawn_actor(&self, name: &str, main: ActorMain) {
        let exec = self
            .exec
            .upgrade()
            .expect("the executor outlives its tasks");
        let make = self.env.borrow().as_ref().and_then(Weak::upgrade);
        let env = make.expect("the test world outlives its actors")();
        exec.spawn(name, main(env));
    }
    fn yield_point(&self, _name: &'static str) -> LocalBoxFuture<'static, ()> {
        let exec = self.exec.upgrade();
        if exec.is_some_and(|exec| exec.yields_are_free.get()) {
            return Box::pin(std::future::ready(()));
        }
        Box::pin(yield_now())
    }
}

/// A network without peers: nothing can be reached.
struct NoNetwork;

impl Network for NoNetwork {
    fn bind_datagram(
        &self,
        _addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Rc<dyn Datagram>, NetError>> {
        Box::pin(async { Err(NetError::Other("no network in this test".into())) })
    }
    fn listen(
        &self,
        _addr: SocketAddrV4,
    ) -> LocalBoxFuture<'static, Result<Box<dyn Listener>, NetError>> {
        Box::pin(async { Err(NetError::Other("no network in this test".into())) })
    }
    fn connect(
        &self,
        addr: SocketAddrV4,
        _keepalive: Duration,
    ) -> LocalBoxFuture<'static, Result<Stream, NetError>> {
        Box::pin(async move { Err(NetError::Refused(addr)) })
    }
}

struct TestDevices {
    meta: MemDevice,
    data: MemDevice,
}

impl Devices for TestDevices {
    fn open(&self, role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError> {
        Ok(match role {
            DeviceRole::Meta => self.meta.handle(),
            DeviceRole::Data => self.data.handle(),
        })
    }
}

/// One node's seams over memory: devices, clock, entropy, executor.
pub struct TestWorld {
    /// The metadata device.
    pub meta: MemDevice,
    /// The data device.
    pub data: MemDevice,
    /// The clock that `env` reads.
    pub clock: Rc<TestClock>,
    /// The random numbers that `env` draws.
    pub entropy: Rc<TestEntropy>,
    /// Runs everything.
    pub exec: Rc<Executor>,
    make_env: Rc<dyn Fn() -> Env>,
}

impl TestWorld {
    /// Empty devices of the given sizes in bytes; no network.
    pub fn new(seed: u64, meta_bytes: u64, data_bytes: u64) -> Self {
        Self::with_network(seed, meta_bytes, data_bytes, Rc::new(NoNetwork))
    }

    /// As [`TestWorld::new`], with a network of the test's own.
    pub fn with_network(seed: u64, meta_bytes: u64, data_bytes: u64, net: Rc<dyn Network>) -> Self {
        let (meta, data) = (MemDevice::new(meta_bytes), MemDevice::new(data_bytes));
        Self::over(seed, meta, data, net)
    }

    /// A world over devices that exist already.
    pub fn over(seed: u64, meta: MemDevice, data: MemDevice, net: Rc<dyn Network>) -> Self {
        let clock = TestClock::new();
        let entropy = TestEntropy::new(seed);
        let exec = Executor::new(clock.clone());
        let spawner = Rc::new(TestSpawner {
            exec: Rc::downgrade(&exec),
            env: RefCell::new(None),
        });
        let env = Env {
            clock: Rc::new(ClockHandle(clock.clone())),
            net,
            entropy: entropy.clone(),
            spawner: spawner.clone(),
            devices: Rc::new(TestDevices {
                meta: meta.clone(),
                data: data.clone(),
            }),
        };
        let make_env: Rc<dyn Fn() -> Env> = Rc::new(move || env.clone());
        *spawner.env.borrow_mut() = Some(Rc::downgrade(&make_env));
        Self {
            meta,
            data,
            clock,
            entropy,
            exec,
            make_env,
        }
    }

    /// The seams for an actor.
    pub fn env(&self) -> Env {
        (self.make_env)()
    }

    /// Runs a future with this world's tasks and timers.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.exec.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_tasks_run_in_the_order_of_their_deadlines() {
        let world = TestWorld::new(1, 1 << 20, 1 << 20);
        let env = world.env();
        let order = Rc::new(RefCell::new(Vec::new()));
        for secs in [3_u64, 1, 2] {
            let (env, order) = (env.clone(), order.clone());
            world.env().spawn("sleeper", async move {
                env.sleep(Duration::from_secs(secs)).await;
                order.borrow_mut().push(secs);
            });
        }
        world.block_on(env.sleep(Duration::from_secs(4)));
        assert_eq!(*order.borrow(), [1, 2, 3]);
    }

    #[test]
    fn unflushed_writes_may_be_lost_and_flushed_ones_are_not() {
        let entropy = TestEntropy::new(7);
        let mut lost = 0;
        for _ in 0..64 {
            let dev = MemDevice::new(1 << 16);
            let page = |byte| Arc::new(AlignedBuf::copy_of(&[byte; PAGE]));
            block_on(async {
                dev.write(0, vec![page(1)], WriteFlags::default())
                    .await
                    .unwrap();
                dev.flush().await.unwrap();
                dev.write(0, vec![page(2), page(3)], WriteFlags::default())
                    .await
                    .unwrap();
                dev.write(8192, vec![page(4)], WriteFlags { fua: true })
                    .await
                    .unwrap();
            });
            dev.power_loss(&*entropy);
            let image = dev.peek(0, 3 * PAGE);
            assert!(matches!(image[0], 1 | 2) && matches!(image[PAGE], 0 | 3));
            assert_eq!(image[2 * PAGE], 4);
            lost += usize::from(image[0] == 1);
        }
        assert!(lost > 8 && lost < 56, "{lost} of 64 lost");
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn a_wait_that_nobody_ends_panics() {
        block_on(std::future::pending::<()>());
    }
}

//! Actors on threads: the production side of `Spawner`, `Clock` and `Entropy`.
//!
//! Each actor has one thread and one loop: run ready tasks, give the kernel what
//! they asked for, sleep until a completion, a timer or a wake-up. Futures never
//! leave their thread; wakers may be used from any.
//!
//! What can go wrong: a panic in an actor. Its state is then unknown, and other
//! actors would wait for it for ever, so the process is aborted: the kernel
//! closes the devices, and the cluster fences and recovers the mount.

use crate::device::VolumeFiles;
use crate::reactor::{IoConfig, Reactor};
use crate::wake::WakeQueue;
use outrider_core::env::{
    ActorMain, BlockDevice, Clock, DeviceError, DeviceRole, Devices, Duration, Entropy, Env,
    LocalBoxFuture, Network, Spawner, Task, Time, WallTime,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::JoinHandle;

/// Task polls between two looks at the kernel.
const POLLS_PER_TURN: usize = 64;
/// The task number of an actor's main future.
const MAIN: usize = usize::MAX;

/// Makes an actor's network: called on the actor's thread.
pub type NetworkFactory = Arc<dyn Fn() -> Rc<dyn Network> + Send + Sync>;

/// What a runtime gives its actors.
#[derive(Clone)]
pub struct RuntimeConfig {
    /// Each actor's network.
    pub network: NetworkFactory,
    /// The volume's devices; without them `Devices::open` fails.
    pub volume: Option<VolumeFiles>,
    /// How system calls are made.
    pub io: IoConfig,
}

struct Shared {
    config: RuntimeConfig,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Starts actors. Cheap to clone; may be used from any thread.
#[derive(Clone)]
pub struct Runtime(Arc<Shared>);

impl Runtime {
    /// A runtime without actors.
    pub fn new(config: RuntimeConfig) -> Self {
        Self(Arc::new(Shared {
            config,
            threads: Mutex::default(),
        }))
    }

    /// Runs an actor on the calling thread until its main future ends.
    ///
    /// # Errors
    /// If the thread's ring or eventfd can not be made.
    pub fn run<T, F: Future<Output = T>>(&self, main: impl FnOnce(Env) -> F) -> std::io::Result<T> {
        let exec = Executor::new(self)?;
        let env = exec.env(self);
        Ok(exec.block_on(main(env)))
    }

    /// Starts an actor on a thread of its own.
    pub fn spawn(&self, name: &str, main: ActorMain) {
        let runtime = self.clone();
        let label = name.to_owned();
        let thread = std::thread::Builder::new()
            .name(label.clone())
            .spawn(move || runtime.actor(&label, main))
            .expect("a thread for an actor");
        let mut threads = self.0.threads.lock().expect("the list of threads");
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    fn actor(&self, name: &str, main: ActorMain) {
        let run = std::panic::AssertUnwindSafe(|| self.run(main));
        match std::panic::catch_unwind(run) {
            Ok(Ok(())) => tracing::debug!(actor = name, "ended"),
            Ok(Err(err)) => {
                tracing::error!(actor = name, error = %err, "could not start: aborting");
                eprintln!("outrider: actor {name} could not start: {err}");
                std::process::abort();
            }
            Err(_) => {
                tracing::error!(actor = name, "panicked: aborting the process");
                std::process::abort();
            }
        }
    }

    /// Waits until every started actor has ended.
    pub fn join(&self) {
        loop {
            let next = self.0.threads.lock().expect("the list of threads").pop();
            let Some(thread) = next else { return };
            // A panic has aborted the process already.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").finish_non_exhaustive()
    }
}

/// One task's waker; it lives as long as the slot and is used again by the next
/// task there, for which a late wake-up is one poll too many and no harm.
struct TaskWaker {
    queue: Arc<WakeQueue>,
    task: usize,
    queued: AtomicBool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.queue.push(self.task);
        }
    }
}

struct Slot {
    future: Option<LocalBoxFuture<'static, ()>>,
    handle: Option<Rc<TaskHandle>>,
    node: Arc<TaskWaker>,
    waker: Waker,
}

struct TaskHandle {
    exec: Weak<Executor>,
    slot: usize,
    finished: Cell<bool>,
    aborted: Cell<bool>,
}

impl Task for TaskHandle {
    fn abort(&self) {
        if self.finished.get() || self.aborted.replace(true) {
            return;
        }
        if let Some(exec) = self.exec.upgrade() {
            exec.abort(self.slot);
        }
    }

    fn is_finished(&self) -> bool {
        self.finished.get() || self.aborted.get()
    }
}

/// One actor's tasks and timers.
struct Executor {
    reactor: Rc<Reactor>,
    queue: Arc<WakeQueue>,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<usize>>,
    timers: RefCell<BTreeMap<(u64, u64), Waker>>,
    next_timer: Cell<u64>,
}

thread_local! {
    static EXECUTOR: RefCell<Weak<Executor>> = const { RefCell::new(Weak::new()) };
}

impl Executor {
    fn new(runtime: &Runtime) -> std::io::Result<Rc<Self>> {
        let queue = Arc::new(WakeQueue::new()?);
        let reactor = Reactor::new(runtime.0.config.io, Arc::clone(&queue))?;
        Reactor::set_current(Some(Rc::clone(&reactor)));
        let exec = Rc::new(Self {
            reactor,
            queue,
            slots: RefCell::default(),
            free: RefCell::default(),
            timers: RefCell::default(),
            next_timer: Cell::new(0),
        });
        EXECUTOR.with(|cell| cell.replace(Rc::downgrade(&exec)));
        Ok(exec)
    }

    fn env(self: &Rc<Self>, runtime: &Runtime) -> Env {
        let devices: Rc<dyn Devices> = match &runtime.0.config.volume {
            Some(files) => Rc::new(files.clone()),
            None => Rc::new(NoDevices),
        };
        Env {
            clock: Rc::new(SystemClock(Rc::downgrade(self))),
            net: (runtime.0.config.network)(),
            entropy: Rc::new(SystemEntropy::default()),
            spawner: Rc::new(ThreadSpawner {
                exec: Rc::downgrade(self),
                runtime: runtime.clone(),
            }),
            devices,
        }
    }

    fn block_on<T>(self: &Rc<Self>, main: impl Future<Output = T>) -> T {
        let mut main = pin!(main);
        let node = Arc::new(TaskWaker {
            queue: Arc::clone(&self.queue),
            task: MAIN,
            queued: AtomicBool::new(false),
        });
        let waker = Waker::from(Arc::clone(&node));
        node.wake_by_ref();
        let mut ready = Vec::new();
        loop {
            self.queue.take(&mut ready);
            for (nr, task) in std::mem::take(&mut ready).into_iter().enumerate() {
                if task != MAIN {
                    self.run_slot(task);
                } else {
                    node.queued.store(false, Ordering::SeqCst);
                    if let Poll::Ready(out) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                        return out;
                    }
                }
                if nr % POLLS_PER_TURN == POLLS_PER_TURN - 1 {
                    self.reactor.turn(Some(Duration::ZERO));
                }
            }
            self.fire_timers();
            self.sleep();
        }
    }

    /// Waits for the next completion, timer or wake-up.
    fn sleep(&self) {
        if !self.queue.try_sleep() {
            self.reactor.turn(Some(Duration::ZERO));
            return;
        }
        let next = self.timers.borrow().keys().next().map(|(at, _)| *at);
        let limit = next.map(|at| Duration::from_nanos(at.saturating_sub(monotonic())));
        self.reactor.turn(limit);
        if next.is_some() {
            self.fire_timers();
        }
    }

    fn fire_timers(&self) {
        let Some(next) = self.timers.borrow().keys().next().map(|(at, _)| *at) else {
            return;
        };
        let now = monotonic();
        if next > now {
            return;
        }
        let due = {
            let mut timers = self.timers.borrow_mut();
            let later = timers.split_off(&(now + 1, 0));
            std::mem::replace(&mut *timers, later)
        };
        due.into_values().for_each(Waker::wake);
    }

    fn add(
        self: &Rc<Self>,
        future: Option<LocalBoxFuture<'static, ()>>,
        handle: bool,
    ) -> (usize, Option<Rc<TaskHandle>>) {
        let mut slots = self.slots.borrow_mut();
        let slot = match self.free.borrow_mut().pop() {
            Some(slot) => slot,
            None => {
                let node = Arc::new(TaskWaker {
                    queue: Arc::clone(&self.queue),
                    task: slots.len(),
                    queued: AtomicBool::new(false),
                });
                slots.push(Slot {
                    future: None,
                    handle: None,
                    waker: Waker::from(Arc::clone(&node)),
                    node,
                });
                slots.len() - 1
            }
        };
        let handle = handle.then(|| {
            Rc::new(TaskHandle {
                exec: Rc::downgrade(self),
                slot,
                finished: Cell::new(false),
                aborted: Cell::new(false),
            })
        });
        slots[slot].future = future;
        slots[slot].handle.clone_from(&handle);
        (slot, handle)
    }

    fn run_slot(&self, slot: usize) {
        let (mut future, waker) = {
            let mut slots = self.slots.borrow_mut();
            let entry = &mut slots[slot];
            entry.node.queued.store(false, Ordering::SeqCst);
            // No future: a late wake-up of a task that has ended.
            let Some(future) = entry.future.take() else {
                return;
            };
            (future, entry.waker.clone())
        };
        let ended = future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        self.put_back(slot, future, ended);
    }

    fn put_back(&self, slot: usize, future: LocalBoxFuture<'static, ()>, ended: bool) {
        let mut slots = self.slots.borrow_mut();
        let entry = &mut slots[slot];
        let aborted = entry.handle.as_ref().is_some_and(|h| h.aborted.get());
        if !ended && !aborted {
            entry.future = Some(future);
            return;
        }
        let handle = entry.handle.take();
        self.free.borrow_mut().push(slot);
        drop(slots);
        if let Some(handle) = handle {
            handle.finished.set(true);
        }
        // Dropped last: its destructors may spawn.
        drop(future);
    }

    fn abort(&self, slot: usize) {
        let mut slots = self.slots.borrow_mut();
        // While it runs, its future is not here; `put_back` drops it then.
        let Some(future) = slots[slot].future.take() else {
            return;
        };
        drop(slots);
        self.put_back(slot, future, true);
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // Tasks hold requests, requests hold the reactor: tasks go first.
        let futures: Vec<_> = self
            .slots
            .borrow_mut()
            .iter_mut()
            .filter_map(|slot| slot.future.take())
            .collect();
        drop(futures);
        self.timers.borrow_mut().clear();
        Reactor::set_current(None);
    }
}

/// Starts a task and polls it once at once; it is parked only if it waits.
/// Returns whether it ended already. Only on an actor's thread.
///
/// `started` learns a handle of the parked task before anything else runs.
pub fn spawn_polled(
    future: LocalBoxFuture<'static, ()>,
    started: impl FnOnce(Rc<dyn Task>),
) -> bool {
    let exec = EXECUTOR
        .with(|cell| cell.borrow().upgrade())
        .expect("tasks exist only on an actor's thread");
    let (slot, _) = exec.add(None, false);
    let waker = exec.slots.borrow()[slot].waker.clone();
    let mut future = future;
    let ended = future
        .as_mut()
        .poll(&mut Context::from_waker(&waker))
        .is_ready();
    if !ended {
        let handle = Rc::new(TaskHandle {
            exec: Rc::downgrade(&exec),
            slot,
            finished: Cell::new(false),
            aborted: Cell::new(false),
        });
        exec.slots.borrow_mut()[slot].handle = Some(Rc::clone(&handle));
        started(handle);
    }
    exec.put_back(slot, future, ended);
    ended
}

struct ThreadSpawner {
    exec: Weak<Executor>,
    runtime: Runtime,
}

/// A task handle for tasks spawned while the actor ends.
struct Ended;

impl Task for Ended {
    fn abort(&self) {}
    fn is_finished(&self) -> bool {
        true
    }
}

/// A future without state, so that its box needs no memory.
struct Nothing;

impl Future for Nothing {
    type Output = ();
    fn poll(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

impl Spawner for ThreadSpawner {
    fn spawn_local(&self, _name: &'static str, task: LocalBoxFuture<'static, ()>) -> Rc<dyn Task> {
        let Some(exec) = self.exec.upgrade() else {
            return Rc::new(Ended);
        };
        let (slot, handle) = exec.add(Some(task), true);
        let node = Arc::clone(&exec.slots.borrow()[slot].node);
        node.wake_by_ref();
        handle.expect("a handle was asked for")
    }

    fn spawn_actor(&self, name: &str, main: ActorMain) {
        self.runtime.spawn(name, main);
    }

    fn yield_point(&self, _name: &'static str) -> LocalBoxFuture<'static, ()> {
        Box::pin(Nothing)
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

struct SystemClock(Weak<Executor>);

impl Clock for SystemClock {
    fn now(&self) -> Time {
        Time(monotonic())
    }

    fn wall(&self) -> WallTime {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        WallTime {
            sec: now.tv_sec,
            nsec: now.tv_nsec as u32,
        }
    }

    fn sleep_until(&self, deadline: Time) -> LocalBoxFuture<'static, ()> {
        Box::pin(Sleep {
            exec: self.0.clone(),
            deadline: deadline.nanos(),
            id: None,
        })
    }
}

struct Sleep {
    exec: Weak<Executor>,
    deadline: u64,
    id: Option<u64>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if monotonic() >= self.deadline {
            return Poll::Ready(());
        }
        // An actor that ends runs no timers.
        let Some(exec) = self.exec.upgrade() else {
            return Poll::Pending;
        };
        let id = *self.id.get_or_insert_with(|| {
            let id = exec.next_timer.get();
            exec.next_timer.set(id + 1);
            id
        });
        let key = (self.deadline, id);
        exec.timers.borrow_mut().insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let (Some(id), Some(exec)) = (self.id, self.exec.upgrade())
            && let Ok(mut timers) = exec.timers.try_borrow_mut()
        {
            timers.remove(&(self.deadline, id));
        }
    }
}

/// The system's random numbers, fetched in pieces.
#[derive(Default)]
struct SystemEntropy(RefCell<Vec<u64>>);

impl Entropy for SystemEntropy {
    fn next_u64(&self) -> u64 {
        let mut pool = self.0.borrow_mut();
        if let Some(n) = pool.pop() {
            return n;
        }
        let mut bytes = [0u8; 256];
        let mut filled = 0;
        while filled < bytes.len() {
            // At most 256 bytes come whole, and the call fails only if interrupted early in boot.
            match rustix::rand::getrandom(
                &mut bytes[filled..],
                rustix::rand::GetRandomFlags::empty(),
            ) {
                Ok(n) => filled += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(err) => panic!("the system has no random numbers: {err}"),
            }
        }
        pool.extend(
            bytes
                .chunks_exact(8)
                .map(|c| u64::from_ne_bytes(c.try_into().expect("8 bytes"))),
        );
        pool.pop().expect("the pool was just filled")
    }
}

/// For programs that open devices by path.
struct NoDevices;

impl Devices for NoDevices {
    fn open(&self, role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError> {
        Err(DeviceError::Io {
            op: "open",
            offset: 0,
            len: 0,
            detail: format!("this program was given no {role:?} device"),
        })
    }
}

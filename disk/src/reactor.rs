//! One actor's I/O: requests in, completions out, on the actor's own thread.
//!
//! A request's buffers and file stay in the reactor until the kernel is done
//! with them, even if nobody waits for the result any more: a dropped future
//! never frees memory under a running read.
//!
//! What can go wrong: io_uring refused (then [`Engine::Threads`] serves); the
//! ring's queue full (requests wait in a backlog); the reactor dropped with
//! requests running (it waits for them).

use crate::pool::Pool;
use crate::wake::WakeQueue;
use io_uring::{IoUring, opcode, squeue, types};
use outrider_core::env::{AlignedBuf, Duration, IoBuf};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// How system calls are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, or threads with a warning where it is forbidden.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// A pool of threads.
    Threads,
}

/// Parameters of a reactor.
#[derive(Clone, Copy, Debug)]
pub struct IoConfig {
    /// How system calls are made.
    pub engine: Engine,
    /// Disk requests given to the kernel at once by one actor.
    pub queue_depth: usize,
}

impl Default for IoConfig {
    fn default() -> Self {
        Self {
            engine: Engine::Auto,
            queue_depth: 64,
        }
    }
}

/// Ring slots: disk requests, polls, cancellations and the wake-up read.
const RING_ENTRIES: u32 = 256;
const TOKEN_WAKE: u64 = u64::MAX;
const TOKEN_IGNORE: u64 = u64::MAX - 1;

/// A system call to make. The pointers are valid while the request's slot lives.
#[derive(Clone, Copy)]
pub(crate) enum Request {
    Read {
        fd: RawFd,
        ptr: *mut u8,
        len: usize,
        offset: u64,
    },
    Write {
        fd: RawFd,
        iov: *const libc::iovec,
        count: usize,
        offset: u64,
        durable: bool,
    },
    DataSync {
        fd: RawFd,
    },
    Poll {
        fd: RawFd,
        events: i16,
    },
}

impl Request {
    fn entry(&self) -> squeue::Entry {
        match *self {
            Self::Read {
                fd,
                ptr,
                len,
                offset,
            } => opcode::Read::new(types::Fd(fd), ptr, len as u32)
                .offset(offset)
                .build(),
            Self::Write {
                fd,
                iov,
                count,
                offset,
                durable,
            } => opcode::Writev::new(types::Fd(fd), iov, count as u32)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC as _ } else { 0 })
                .build(),
            Self::DataSync { fd } => opcode::Fsync::new(types::Fd(fd))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Self::Poll { fd, events } => {
                opcode::PollAdd::new(types::Fd(fd), events as u16 as u32).build()
            }
        }
    }

    /// Makes the call on this thread; the result is as in a ring's completion.
    pub(crate) fn run_blocking(&self) -> i32 {
        loop {
            // SAFETY: the reactor keeps file and buffers until the completion was
            // collected; lengths are those of the buffers.
            let res = unsafe {
                match *self {
                    Self::Read {
                        fd,
                        ptr,
                        len,
                        offset,
                    } => libc::pread64(fd, ptr.cast(), len, offset as i64),
                    Self::Write {
                        fd,
                        iov,
                        count,
                        offset,
                        durable,
                    } => {
                        let flags = if durable { libc::RWF_DSYNC } else { 0 };
                        libc::pwritev2(fd, iov, count as i32, offset as i64, flags)
                    }
                    Self::DataSync { fd } => libc::fdatasync(fd) as isize,
                    Self::Poll { .. } => unreachable!("polls are the loop's own work"),
                }
            };
            if res >= 0 {
                return res as i32;
            }
            let errno = io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO);
            if errno != libc::EINTR {
                return -errno;
            }
        }
    }
}

/// What a request needs while the kernel works on it.
#[derive(Default)]
pub(crate) struct Keep {
    /// Never read: it keeps the file open.
    #[allow(dead_code)]
    pub(crate) file: Option<Arc<OwnedFd>>,
    pub(crate) read: Option<AlignedBuf>,
    pub(crate) write: Vec<IoBuf>,
    pub(crate) iov: Vec<libc::iovec>,
}

enum Slot {
    Free,
    Waiting {
        waker: Option<Waker>,
        keep: Keep,
    },
    /// Nobody waits any more; the kernel still works.
    Orphan(#[allow(dead_code)] Keep),
    Done {
        res: i32,
        keep: Keep,
    },
}

enum Backend {
    Ring(Box<IoUring>),
    Pool {
        pool: Pool,
        polls: Vec<(usize, RawFd, i16)>,
    },
}

struct Inner {
    backend: Backend,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Disk requests that wait for a place.
    backlog: VecDeque<(usize, Request)>,
    /// Polls and cancellations that wait for a ring slot.
    control: VecDeque<squeue::Entry>,
    /// Which slots are disk requests given to the kernel.
    disk_running: usize,
    is_disk: Vec<bool>,
    running: usize,
    wake_armed: bool,
}

/// One actor's reactor. It never leaves its thread.
pub struct Reactor {
    inner: RefCell<Inner>,
    wake: Arc<WakeQueue>,
    wake_buf: Box<Cell<u64>>,
    depth: usize,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

impl Reactor {
    /// A reactor for the calling thread.
    ///
    /// # Errors
    /// If io_uring was demanded and is refused, or file descriptors ran out.
    pub(crate) fn new(config: IoConfig, wake: Arc<WakeQueue>) -> io::Result<Rc<Self>> {
        let backend = match config.engine {
            Engine::Threads => Self::pool(&wake),
            Engine::Uring => Backend::Ring(Box::new(open_ring()?)),
            Engine::Auto => match open_ring() {
                Ok(ring) => Backend::Ring(Box::new(ring)),
                Err(err) => {
                    warn_no_ring(&err);
                    Self::pool(&wake)
                }
            },
        };
        Ok(Rc::new(Self {
            inner: RefCell::new(Inner {
                backend,
                slots: Vec::new(),
                free: Vec::new(),
                backlog: VecDeque::new(),
                control: VecDeque::new(),
                disk_running: 0,
                is_disk: Vec::new(),
                running: 0,
                wake_armed: false,
            }),
            wake,
            wake_buf: Box::new(Cell::new(0)),
            depth: config.queue_depth.clamp(1, RING_ENTRIES as usize / 2),
        }))
    }

    fn pool(wake: &Arc<WakeQueue>) -> Backend {
        Backend::Pool {
            pool: Pool::new(Arc::clone(wake)),
            polls: Vec::new(),
        }
    }

    /// The reactor of the calling actor's thread.
    ///
    /// # Panics
    /// On a thread that [`crate::Runtime`] did not start.
    pub fn current() -> Rc<Reactor> {
        CURRENT
            .with(|cell| cell.borrow().clone())
            .expect("a reactor exists only on an actor's thread")
    }

    pub(crate) fn set_current(reactor: Option<Rc<Reactor>>) {
        let old = CURRENT.with(|cell| cell.replace(reactor));
        drop(old);
    }

    /// Whether io_uring is in use (else a pool of threads).
    pub fn uses_ring(&self) -> bool {
        matches!(self.inner.borrow().backend, Backend::Ring(_))
    }

    /// Completes when `file` may be read without waiting, or has an error or
    /// hang-up to report. Returns the `POLL*` bits, or a negative errno.
    pub fn readable(self: &Rc<Self>, file: &Arc<OwnedFd>) -> Op {
        let keep = Keep {
            file: Some(Arc::clone(file)),
            ..Keep::default()
        };
        let request = Request::Poll {
            fd: file.as_raw_fd(),
            events: libc::POLLIN,
        };
        self.start(request, keep)
    }

    /// Starts a request; it reaches the kernel when the thread's loop turns.
    pub(crate) fn start(self: &Rc<Self>, request: Request, keep: Keep) -> Op {
        let mut inner = self.inner.borrow_mut();
        let index = match inner.free.pop() {
            Some(index) => index,
            None => {
                inner.slots.push(Slot::Free);
                inner.is_disk.push(false);
                inner.slots.len() - 1
            }
        };
        inner.slots[index] = Slot::Waiting { waker: None, keep };
        let poll = matches!(request, Request::Poll { .. });
        inner.is_disk[index] = !poll;
        if poll {
            inner.running += 1;
            match &mut inner.backend {
                Backend::Ring(_) => {
                    let entry = request.entry().user_data(index as u64);
                    inner.control.push_back(entry);
                }
                Backend::Pool { polls, .. } => {
                    let Request::Poll { fd, events } = request else {
                        unreachable!("just matched")
                    };
                    polls.push((index, fd, events));
                }
            }
        } else {
            inner.backlog.push_back((index, request));
        }
        Op {
            reactor: Rc::clone(self),
            index,
            taken: false,
        }
    }

    /// Gives queued requests to the kernel and collects completions, waiting for
    /// one at most `limit` (`None`: without limit; zero: not at all).
    pub(crate) fn turn(&self, limit: Option<Duration>) {
        let mut done = Vec::new();
        self.inner
            .borrow_mut()
            .turn(limit, self.depth, &self.wake, &self.wake_buf, &mut done);
        // This thread looks at its queue next: it needs no wake-up from itself.
        self.wake.awake();
        for (index, res) in done {
            self.complete(index, res);
        }
    }

    fn complete(&self, index: usize, res: i32) {
        let mut inner = self.inner.borrow_mut();
        inner.running -= 1;
        if inner.is_disk[index] {
            inner.disk_running -= 1;
        }
        match std::mem::replace(&mut inner.slots[index], Slot::Free) {
            Slot::Waiting { waker, keep } => {
                inner.slots[index] = Slot::Done { res, keep };
                drop(inner);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Slot::Orphan(keep) => {
                inner.free.push(index);
                drop(inner);
                drop(keep);
            }
            Slot::Free | Slot::Done { .. } => panic!("completion {index} of no request"),
        }
    }

    /// Nobody waits for a request any more.
    fn abandon(&self, index: usize) {
        let mut inner = self.inner.borrow_mut();
        let gone = match std::mem::replace(&mut inner.slots[index], Slot::Free) {
            Slot::Waiting { keep, .. } => {
                if let Some(at) = inner.backlog.iter().position(|(i, _)| *i == index) {
                    inner.backlog.remove(at);
                    inner.free.push(index);
                    Some(keep)
                } else {
                    inner.slots[index] = Slot::Orphan(keep);
                    if !inner.is_disk[index] {
                        inner.cancel_poll(index);
                    }
                    None
                }
            }
            Slot::Done { keep, .. } => {
                inner.free.push(index);
                Some(keep)
            }
            Slot::Free | Slot::Orphan(_) => panic!("request {index} abandoned twice"),
        };
        drop(inner);
        drop(gone);
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // Buffers may be freed only when the kernel has let go of them.
        let inner = self.inner.get_mut();
        inner.backlog.clear();
        let waiting: Vec<usize> = (0..inner.slots.len())
            .filter(|&i| !inner.is_disk[i])
            .filter(|&i| matches!(inner.slots[i], Slot::Waiting { .. } | Slot::Orphan(_)))
            .collect();
        for index in waiting {
            inner.cancel_poll(index);
        }
        while self.inner.get_mut().running > 0 {
            self.turn(Some(Duration::from_millis(100)));
        }
        self.inner.get_mut().disarm_wake();
    }
}

impl Inner {
    fn cancel_poll(&mut self, index: usize) {
        match &mut self.backend {
            Backend::Ring(_) => {
                let entry = opcode::PollRemove::new(index as u64).build();
                self.control.push_back(entry.user_data(TOKEN_IGNORE));
            }
            Backend::Pool { polls, .. } => {
                polls.retain(|(i, _, _)| *i != index);
                self.running -= 1;
                self.slots[index] = Slot::Free;
                self.free.push(index);
            }
        }
    }

    fn disarm_wake(&mut self) {
        if !self.wake_armed {
            return;
        }
        let Backend::Ring(ring) = &mut self.backend else {
            return;
        };
        let entry = opcode::AsyncCancel::new(TOKEN_WAKE).build();
        // SAFETY: a cancellation has no buffers.
        let pushed = unsafe { ring.submission().push(&entry.user_data(TOKEN_IGNORE)) };
        while pushed.is_ok() && self.wake_armed {
            if ring.submit_and_wait(1).is_err() {
                return;
            }
            if ring.completion().any(|c| c.user_data() == TOKEN_WAKE) {
                self.wake_armed = false;
            }
        }
    }

    fn turn(
        &mut self,
        limit: Option<Duration>,
        depth: usize,
        wake: &WakeQueue,
        wake_buf: &Cell<u64>,
        done: &mut Vec<(usize, i32)>,
    ) {
        match &mut self.backend {
            Backend::Ring(_) => self.turn_ring(limit, depth, wake, wake_buf, done),
            Backend::Pool { .. } => self.turn_pool(limit, depth, wake, done),
        }
    }

    fn turn_ring(
        &mut self,
        limit: Option<Duration>,
        depth: usize,
        wake: &WakeQueue,
        wake_buf: &Cell<u64>,
        done: &mut Vec<(usize, i32)>,
    ) {
        let Backend::Ring(ring) = &mut self.backend else {
            unreachable!("the caller matched it")
        };
        let (submitter, mut queue, mut completions) = ring.split();
        if !self.wake_armed && !queue.is_full() {
            let fd = types::Fd(wake.raw_fd());
            let entry = opcode::Read::new(fd, wake_buf.as_ptr().cast(), 8).build();
            // SAFETY: the buffer lives in the reactor, which disarms before it goes.
            unsafe { queue.push(&entry.user_data(TOKEN_WAKE)) }.expect("room was checked");
            self.wake_armed = true;
        }
        while !queue.is_full()
            && let Some(entry) = self.control.pop_front()
        {
            // SAFETY: polls and cancellations have no buffers; files are kept.
            unsafe { queue.push(&entry) }.expect("room was checked");
        }
        while !queue.is_full()
            && self.disk_running < depth
            && let Some((index, request)) = self.backlog.pop_front()
        {
            // SAFETY: the slot keeps file and buffers until the completion.
            unsafe { queue.push(&request.entry().user_data(index as u64)) }
                .expect("room was checked");
            self.disk_running += 1;
            self.running += 1;
        }
        queue.sync();
        completions.sync();
        let wait = limit != Some(Duration::ZERO) && completions.is_empty();
        let result = match (wait, limit) {
            (false, _) if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() => Ok(0),
            (false, _) => submitter.submit(),
            (true, None) => submitter.submit_and_wait(1),
            (true, Some(limit)) => {
                let limit = types::Timespec::from(limit);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
            }
        };
        match result.map_err(|e| e.raw_os_error()) {
            Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(errno) => panic!("io_uring_enter failed with errno {errno:?}"),
        }
        completions.sync();
        for entry in &mut completions {
            match entry.user_data() {
                TOKEN_WAKE => self.wake_armed = false,
                TOKEN_IGNORE => {}
                index => done.push((index as usize, entry.result())),
            }
        }
    }

    fn turn_pool(
        &mut self,
        limit: Option<Duration>,
        depth: usize,
        wake: &WakeQueue,
        done: &mut Vec<(usize, i32)>,
    ) {
        let Backend::Pool { pool, polls } = &mut self.backend else {
            unreachable!("the caller matched it")
        };
        while self.disk_running < depth
            && let Some((index, request)) = self.backlog.pop_front()
        {
            pool.submit(index, request);
            self.disk_running += 1;
            self.running += 1;
        }
        let wait = limit != Some(Duration::ZERO) && !pool.has_done();
        if wait || !polls.is_empty() {
            let mut fds = vec![pollfd(wake.raw_fd(), libc::POLLIN)];
            fds.extend(polls.iter().map(|&(_, fd, events)| pollfd(fd, events)));
            let millis = match (wait, limit) {
                (false, _) => 0,
                (true, None) => -1,
                (true, Some(limit)) => {
                    let up = limit.as_nanos().div_ceil(1_000_000);
                    i32::try_from(up).unwrap_or(i32::MAX)
                }
            };
            // SAFETY: the array is ours and its length is given.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
            if fds[0].revents != 0 {
                let mut count = [0u8; 8];
                let _ = rustix::io::read(wake, &mut count);
            }
            let ready: Vec<(usize, i32)> = polls
                .iter()
                .zip(&fds[1..])
                .filter(|(_, fd)| fd.revents != 0)
                .map(|((index, _, _), fd)| (*index, i32::from(fd.revents)))
                .collect();
            polls.retain(|(index, _, _)| !ready.iter().any(|(i, _)| i == index));
            done.extend(ready);
        }
        pool.collect(done);
    }
}

fn pollfd(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// A request under way. Dropping it abandons the result, never the buffers.
#[must_use = "a request's result must be awaited"]
pub struct Op {
    reactor: Rc<Reactor>,
    index: usize,
    taken: bool,
}

impl Op {
    pub(crate) fn poll_keep(&mut self, cx: &mut Context<'_>) -> Poll<(i32, Keep)> {
        assert!(!self.taken, "a finished request was polled again");
        let mut inner = self.reactor.inner.borrow_mut();
        match &mut inner.slots[self.index] {
            Slot::Waiting { waker, .. } => {
                match waker {
                    Some(old) if old.will_wake(cx.waker()) => {}
                    _ => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            slot @ Slot::Done { .. } => {
                let Slot::Done { res, keep } = std::mem::replace(slot, Slot::Free) else {
                    unreachable!("just matched")
                };
                inner.free.push(self.index);
                self.taken = true;
                Poll::Ready((res, keep))
            }
            Slot::Free | Slot::Orphan(_) => panic!("a request lost its slot"),
        }
    }

    /// The result and what the request kept.
    pub(crate) async fn finish(mut self) -> (i32, Keep) {
        std::future::poll_fn(move |cx| self.poll_keep(cx)).await
    }
}

impl Future for Op {
    type Output = i32;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        self.poll_keep(cx).map(|(res, _)| res)
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if !self.taken {
            self.reactor.abandon(self.index);
        }
    }
}

fn open_ring() -> io::Result<IoUring> {
    let fast = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(RING_ENTRIES * 4)
        .build(RING_ENTRIES);
    let ring = match fast {
        Ok(ring) => ring,
        // Kernels before 6.1 do not know the flags above.
        Err(err) if err.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .setup_cqsize(RING_ENTRIES * 4)
            .build(RING_ENTRIES)?,
        Err(err) => return Err(err),
    };
    if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel's io_uring is too old (5.11 is needed)",
        ));
    }
    Ok(ring)
}

fn warn_no_ring(err: &io::Error) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        tracing::warn!(
            error = %err,
            "io_uring can not be used here; a pool of threads makes the disk requests, \
             which costs speed and nothing else"
        );
    });
}

//! Threads that make blocking system calls, for hosts without io_uring.

use crate::reactor::Request;
use crate::wake::WakeQueue;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

/// How many threads one actor may use.
const THREADS: usize = 8;

struct Job {
    index: usize,
    request: Request,
}

// SAFETY: the pointers in the request are kept valid by the reactor until the
// job's completion was collected, whichever thread runs it.
unsafe impl Send for Job {}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    done: Vec<(usize, i32)>,
    idle: usize,
    threads: usize,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    more: Condvar,
    wake: Arc<WakeQueue>,
}

/// One actor's pool. Threads start when there is work for them.
pub(crate) struct Pool(Arc<Shared>);

impl Pool {
    pub(crate) fn new(wake: Arc<WakeQueue>) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            more: Condvar::new(),
            wake,
        }))
    }

    /// Queues a request.
    pub(crate) fn submit(&self, index: usize, request: Request) {
        let mut state = self.0.state.lock().expect("the pool's lock");
        state.jobs.push_back(Job { index, request });
        if state.idle < state.jobs.len() && state.threads < THREADS {
            state.threads += 1;
            let shared = Arc::clone(&self.0);
            std::thread::Builder::new()
                .name("outrider-io".into())
                .spawn(move || shared.work())
                .expect("a thread for disk I/O");
        }
        self.0.more.notify_one();
    }

    /// Moves completions to `into`.
    pub(crate) fn collect(&self, into: &mut Vec<(usize, i32)>) {
        into.append(&mut self.0.state.lock().expect("the pool's lock").done);
    }

    /// Whether completions wait to be collected.
    pub(crate) fn has_done(&self) -> bool {
        !self
            .0
            .state
            .lock()
            .expect("the pool's lock")
            .done
            .is_empty()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.0.state.lock().expect("the pool's lock").stop = true;
        self.0.more.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock().expect("the pool's lock");
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                let res = job.request.run_blocking();
                state = self.state.lock().expect("the pool's lock");
                state.done.push((job.index, res));
                self.wake.kick();
            } else if state.stop {
                return;
            } else {
                state.idle += 1;
                state = self.more.wait(state).expect("the pool's lock");
                state.idle -= 1;
            }
        }
    }
}

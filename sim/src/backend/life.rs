//! A [`Life`] is one run of a process: killing it stops all its tasks before
//! they are polled again, as the end of a process does.

use super::Sim;
use madsim::task::AbortHandle;
use outrider_core::env::{LocalBoxFuture, Task};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

/// One run of a process, or of an actor in it.
pub struct Life {
    alive: Cell<bool>,
    tasks: RefCell<BTreeMap<u64, AbortHandle>>,
    children: RefCell<Vec<Weak<Life>>>,
    name: RefCell<String>,
    seat: Cell<u32>,
    node: Cell<u32>,
    rid: Cell<u64>,
    /// While `Some`, no task is polled; who wanted to be is woken afterwards.
    paused: RefCell<Option<Vec<Waker>>>,
    /// Whether it is the whole process that stands still: then actors that begin do, too.
    whole: Cell<bool>,
}

impl Life {
    /// A new life without tasks.
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            alive: Cell::new(true),
            tasks: RefCell::default(),
            children: RefCell::default(),
            name: RefCell::default(),
            seat: Cell::new(0),
            node: Cell::new(0),
            rid: Cell::new(0),
            paused: RefCell::default(),
            whole: Cell::new(false),
        })
    }

    /// A life of the mount with this number on this node (worlds of several nodes).
    pub fn of_seat(seat: u32, node: u32) -> Rc<Self> {
        let life = Self::new();
        life.seat.set(seat);
        life.node.set(node);
        life
    }

    /// The node that it runs on.
    pub fn node(&self) -> u32 {
        self.node.get()
    }

    /// Whether it stands still.
    pub fn is_paused(&self) -> bool {
        self.paused.borrow().is_some()
    }

    /// The number of the mount it belongs to; 0 in worlds of one node.
    pub fn seat(&self) -> u32 {
        self.seat.get()
    }

    /// The id under which its mount is known to the cluster; 0 before it has one.
    pub fn rid(&self) -> u64 {
        self.rid.get()
    }

    /// Notes the id of its mount.
    pub fn set_rid(&self, rid: u64) {
        self.rid.set(rid);
    }

    /// The life of an actor of it.
    pub(super) fn child(self: &Rc<Self>, name: &str) -> Rc<Self> {
        let child = Self::new();
        child.alive.set(self.alive.get());
        child.seat.set(self.seat.get());
        child.node.set(self.node.get());
        name.clone_into(&mut child.name.borrow_mut());
        // Of an actor that stands still by its name those of other names go on.
        if self.whole.get() {
            child.whole.set(true);
            *child.paused.borrow_mut() = Some(Vec::new());
        }
        let mut children = self.children.borrow_mut();
        children.retain(|child| child.strong_count() > 0);
        children.push(Rc::downgrade(&child));
        child
    }

    /// Whether its tasks may run.
    pub fn is_alive(&self) -> bool {
        self.alive.get()
    }

    /// Ends it: none of its tasks is polled again.
    pub fn kill(&self) {
        self.alive.set(false);
        for child in self.children.take() {
            if let Some(child) = child.upgrade() {
                child.kill();
            }
        }
        for abort in self.tasks.borrow().values() {
            abort.abort();
        }
    }

    /// Stops (or lets go on) all its tasks and actors, or only the actors of one
    /// name, wherever they are, as a scheduler that does not run them would.
    pub fn pause(&self, only: Option<&str>, stop: bool) {
        let chosen = only.is_none_or(|name| *self.name.borrow() == name);
        if chosen {
            self.whole.set(stop && only.is_none());
            let mut paused = self.paused.borrow_mut();
            if stop && paused.is_none() {
                *paused = Some(Vec::new());
            } else if !stop {
                for waker in paused.take().into_iter().flatten() {
                    waker.wake();
                }
            }
        }
        // An actor's actors are its own: they stop with it only if they are chosen.
        let children = self.children.borrow().clone();
        for child in children.iter().filter_map(Weak::upgrade) {
            child.pause(only, stop);
        }
    }

    /// Number of tasks that have not ended, in it and in its actors.
    pub fn tasks(&self) -> usize {
        let own = self.tasks.borrow().len();
        let children = self.children.borrow();
        own + children
            .iter()
            .filter_map(Weak::upgrade)
            .map(|child| child.tasks())
            .sum::<usize>()
    }
}

struct Guarded {
    sim: Rc<Sim>,
    life: Rc<Life>,
    id: u64,
    aborted: Rc<Cell<bool>>,
    future: Option<LocalBoxFuture<'static, ()>>,
}

impl Future for Guarded {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if !self.life.is_alive() || self.aborted.get() {
            self.future = None;
            return Poll::Ready(());
        }
        if let Some(parked) = &mut *self.life.paused.borrow_mut() {
            parked.push(cx.waker().clone());
            return Poll::Pending;
        }
        self.sim.count_poll();
        self.sim.running.set(self.life.seat());
        self.sim.running_node.set(self.life.node.get());
        let Some(future) = &mut self.future else {
            return Poll::Ready(());
        };
        let out = future.as_mut().poll(cx);
        if out.is_ready() {
            self.future = None;
        }
        out
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.future = None;
        self.aborted.set(true);
        self.life.tasks.borrow_mut().remove(&self.id);
        self.sim.tasks.borrow_mut().remove(&self.id);
    }
}

struct SimTask {
    abort: AbortHandle,
    ended: Rc<Cell<bool>>,
}

impl Task for SimTask {
    fn abort(&self) {
        self.ended.set(true);
        self.abort.abort();
    }
    fn is_finished(&self) -> bool {
        self.ended.get()
    }
}

/// Starts a task that belongs to `life`.
pub fn spawn(sim: &Rc<Sim>, life: &Rc<Life>, future: LocalBoxFuture<'static, ()>) -> Rc<dyn Task> {
    let id = sim.next_task.get();
    sim.next_task.set(id + 1);
    let ended = Rc::new(Cell::new(false));
    let guarded = Guarded {
        sim: Rc::clone(sim),
        life: Rc::clone(life),
        id,
        aborted: Rc::clone(&ended),
        future: Some(future),
    };
    let abort = madsim::task::spawn_local(guarded).abort_handle();
    sim.tasks.borrow_mut().insert(id, abort.clone());
    life.tasks.borrow_mut().insert(id, abort.clone());
    Rc::new(SimTask { abort, ended })
}

//! The mount's async face of its locks: waiting, guards, and the one place where
//! a revocation is carried out in order (spec 10 section 8): pull the kernel's pages
//! back, lower the mode, commit, drop what is cached, answer.

use super::client::{
    Acquired, Action, Granted, LockClient, LockId, LockState, Revocation, Token, WaiterId,
};
use super::{Mode, Policy, Scope};
use crate::env::{Duration, Either, Env, HashMap, LocalBoxFuture, Signal, mutant, probe, race};
use crate::errno::Errno;
use crate::format::{Key, KeyRange, NetLock};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use thiserror::Error;
use tokio::sync::oneshot;

/// Why a lock was not had.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum LockError {
    /// The mount was cut off from the cluster (forced unmount, fenced).
    #[error("the mount is severed from its cluster")]
    Severed,
    /// The mount is ending and takes no more locks.
    #[error("the mount is shutting down")]
    Shutdown,
}

impl From<LockError> for Errno {
    fn from(error: LockError) -> Errno {
        match error {
            LockError::Severed => Errno::EIO,
            LockError::Shutdown => Errno::ESHUTDOWN,
        }
    }
}

/// Sends one answer to an invalidation.
pub type Respond = Box<dyn FnOnce(NetLock)>;

/// Where lock requests go: the client's connection.
pub trait LockTransport {
    /// Queues a lock request.
    ///
    /// # Errors
    /// If the mount is severed.
    fn request(&self, lock: NetLock) -> Result<(), LockError>;
}

/// What the mount does when a lock is taken back.
pub trait LockHooks {
    /// Seq of the open transaction.
    fn trans_seq(&self) -> u64;
    /// Commits the open transaction; completes when it is durable, or when the
    /// mount is severed.
    fn commit(&self) -> LocalBoxFuture<'static, ()>;
    /// One attempt to pull back what must come while the old mode is in force:
    /// pages that the kernel has, dirty ones too. The requests that it may wait for
    /// are served meanwhile, so it may have to be called again.
    fn prepare(&self, scope: Scope, new: Mode) -> LocalBoxFuture<'static, ()> {
        let _ = (scope, new);
        Box::pin(std::future::ready(()))
    }
    /// Whether nothing is left to pull back.
    fn is_prepared(&self, scope: Scope, new: Mode) -> bool {
        let _ = (scope, new);
        true
    }
    /// Drops everything cached under the lock: items, inodes, the kernel's names
    /// and attributes; with READ left only what needed WRITE.
    fn revoke(&self, scope: Scope, new: Mode) -> LocalBoxFuture<'static, ()>;
    /// Whether anything dirty, or with `any` anything at all, is cached in the range.
    fn has_cached(&self, range: &KeyRange, any: bool) -> bool;
}

struct Inner {
    env: Env,
    brain: RefCell<LockClient>,
    transport: Rc<dyn LockTransport>,
    hooks: RefCell<Option<Rc<dyn LockHooks>>>,
    waiting: RefCell<HashMap<WaiterId, oneshot::Sender<Result<(), LockError>>>>,
    /// Users of a lock whose revocation is being prepared have gone.
    fits: Signal,
    prepare_grace: Duration,
    answers: RefCell<HashMap<Token, Respond>>,
    next_id: Cell<u64>,
    stopped: Cell<Option<LockError>>,
}

/// All locks of one mount. Cheap to clone.
#[derive(Clone)]
pub struct Locks {
    inner: Rc<Inner>,
}

/// One use of a lock; dropping it ends the use. Cloning adds a use, which never
/// waits: the way to take the same lock twice in one operation.
pub struct LockGuard {
    inner: Rc<Inner>,
    id: LockId,
    scope: Scope,
    mode: Mode,
}

impl Locks {
    /// No locks yet; requests go to `transport`.
    pub fn new(env: Env, policy: Policy, transport: Rc<dyn LockTransport>) -> Self {
        Self {
            inner: Rc::new(Inner {
                env,
                fits: Signal::default(),
                prepare_grace: policy.prepare_grace,
                brain: RefCell::new(LockClient::new(policy)),
                transport,
                hooks: RefCell::new(None),
                waiting: RefCell::default(),
                answers: RefCell::default(),
                next_id: Cell::new(0),
                stopped: Cell::new(None),
            }),
        }
    }

    /// Sets what runs when a lock is taken back. Must be set before the first lock.
    pub fn set_hooks(&self, hooks: Rc<dyn LockHooks>) {
        *self.inner.hooks.borrow_mut() = Some(hooks);
    }

    /// Forgets the hooks, which usually own these locks, once the mount is gone.
    pub fn clear_hooks(&self) {
        let hooks = self.inner.hooks.borrow_mut().take();
        drop(hooks);
    }

    /// Takes the lock if its mode is cached: no wait, no message.
    pub fn try_lock(&self, scope: Scope, mode: Mode) -> Option<LockGuard> {
        let scope = scope.normal();
        if self.inner.stopped.get().is_some() {
            return None;
        }
        let id = self.inner.brain.borrow_mut().try_acquire(scope, mode)?;
        Some(LockGuard {
            inner: self.inner.clone(),
            id,
            scope,
            mode,
        })
    }

    /// Takes the lock, waiting for other holders as long as it takes. Completes
    /// at once if the mode is cached, also while the server wants the lock back,
    /// so an operation that holds other locks cannot deadlock here.
    ///
    /// # Errors
    /// If the mount is severed or shutting down.
    pub async fn lock(&self, scope: Scope, mode: Mode) -> Result<LockGuard, LockError> {
        self.acquire(scope, mode, false).await
    }

    /// As [`Locks::lock`], for the first lock of an operation: lets an
    /// invalidation that waits for this lock's users go first.
    ///
    /// # Errors
    /// As [`Locks::lock`].
    pub async fn lock_first(&self, scope: Scope, mode: Mode) -> Result<LockGuard, LockError> {
        self.acquire(scope, mode, true).await
    }

    async fn acquire(
        &self,
        scope: Scope,
        mode: Mode,
        yielding: bool,
    ) -> Result<LockGuard, LockError> {
        let scope = scope.normal();
        if let Some(error) = self.inner.stopped.get() {
            return Err(error);
        }
        let waiter = self.inner.next_id();
        let mut out = Vec::new();
        let got = self
            .inner
            .brain
            .borrow_mut()
            .acquire(scope, mode, yielding, waiter, &mut out);
        if let Acquired::Now(id) = got {
            self.inner.carry_out(out);
            return Ok(LockGuard {
                inner: self.inner.clone(),
                id,
                scope,
                mode,
            });
        }
        let (admit, admitted) = oneshot::channel();
        self.inner.waiting.borrow_mut().insert(waiter, admit);
        let mut wait = Wait {
            inner: &self.inner,
            scope,
            mode,
            waiter,
            done: false,
        };
        self.inner.carry_out(out);
        let result = admitted.await.unwrap_or(Err(LockError::Severed));
        // On an error the waiter may still be queued: `wait` takes it out.
        wait.done = result.is_ok();
        result?;
        let id = self
            .inner
            .brain
            .borrow()
            .id_of(scope)
            .expect("an admitted waiter's lock exists");
        Ok(LockGuard {
            inner: self.inner.clone(),
            id,
            scope,
            mode,
        })
    }

    /// A grant from the server, in the order of arrival. `false`: it is not what was
    /// asked for, and changed nothing; who waits for it still does.
    pub fn on_grant(&self, msg: &NetLock) -> bool {
        let mut out = Vec::new();
        let granted = self.inner.brain.borrow_mut().grant(msg, &mut out);
        let range = Scope::from_start(&Key::from(msg.key)).map(Scope::range);
        if granted == Granted::Applied
            && let (Some(range), Some(hooks)) = (range, self.inner.hooks())
        {
            let keeps = [msg.old_mode, msg.new_mode]
                .iter()
                .all(|&mode| Mode::from_wire(mode).is_some_and(Mode::reads));
            assert!(
                !hooks.has_cached(&range, false) && (keeps || !hooks.has_cached(&range, true)),
                "lock {} was granted while items of it are cached",
                range.start
            );
        }
        self.inner.carry_out(out);
        granted != Granted::NotAsked
    }

    /// An invalidation from the server, in the order of arrival.
    pub fn on_invalidate(&self, msg: &NetLock, respond: Respond) {
        let token = self.inner.next_id();
        self.inner.answers.borrow_mut().insert(token, respond);
        let mut out = Vec::new();
        self.inner
            .brain
            .borrow_mut()
            .invalidate(token, msg, &mut out);
        self.inner.carry_out(out);
    }

    /// Answer to a recovering server: at most `max` locks from `start` on.
    pub fn on_recover(&self, start: &Key, max: usize) -> Vec<NetLock> {
        self.inner.brain.borrow().recover(start, max)
    }

    /// Fails all waiters and refuses new locks: unmount (nothing is cached or
    /// dirty any more) or a severed mount. Invalidations are still answered.
    pub fn stop(&self, why: LockError) {
        if self.inner.stopped.get().is_none() {
            self.inner.stopped.set(Some(why));
        }
        // Mutant: breaks spec 10 section 14, no waiter outlives the mount.
        if mutant("stop_leaves_waiters") {
            return;
        }
        let mut waiting: Vec<_> = self.inner.waiting.borrow_mut().drain().collect();
        waiting.sort_unstable_by_key(|(id, _)| *id);
        for (_, waiter) in waiting {
            let _ = waiter.send(Err(why));
        }
    }

    /// Gives all idle locks back to the server.
    pub fn purge_idle(&self) {
        let mut out = Vec::new();
        self.inner.brain.borrow_mut().purge_idle(&mut out);
        self.inner.carry_out(out);
    }

    /// Whether locks are refused: the mount ends.
    pub fn is_stopped(&self) -> bool {
        self.inner.stopped.get().is_some()
    }

    /// State of every lock, for status and for the simulator's oracles.
    pub fn table(&self) -> Vec<LockState> {
        self.inner.brain.borrow().table()
    }
}

impl Inner {
    fn next_id(&self) -> u64 {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        id
    }

    fn hooks(&self) -> Option<Rc<dyn LockHooks>> {
        self.hooks.borrow().clone()
    }

    fn carry_out(self: &Rc<Self>, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Request(msg) => self.request(msg),
                Action::Admit(waiter) => {
                    let sender = self.waiting.borrow_mut().remove(&waiter);
                    // A waiter that went away is released by its `Wait`.
                    let _ = sender.map(|s| s.send(Ok(())));
                }
                Action::Prepare(scope) => {
                    let inner = self.clone();
                    self.env
                        .spawn("revoke", async move { revoke(&inner, scope).await });
                }
                Action::Fits(_) => self.fits.wake_all(),
                Action::Respond(token, msg) => {
                    let respond = self.answers.borrow_mut().remove(&token);
                    respond.expect("an invalidation is answered once")(msg);
                }
            }
        }
    }

    fn request(&self, msg: NetLock) {
        if let Err(error) = self.transport.request(msg) {
            let scope = Scope::from_start(&Key::from(msg.key)).expect("our own lock name");
            self.brain.borrow_mut().request_failed(scope);
            // Severed: every waiter of every lock fails, not only this lock's.
            self.stopped.set(Some(error));
            let mut waiting: Vec<_> = self.waiting.borrow_mut().drain().collect();
            waiting.sort_unstable_by_key(|(id, _)| *id);
            for (_, waiter) in waiting {
                let _ = waiter.send(Err(error));
            }
        }
    }
}

/// The order that everything rests on: pull back, lower, commit, drop, answer.
async fn revoke(inner: &Rc<Inner>, scope: Scope) {
    probe("locks.revoke");
    let r = prepare(inner, scope).await;
    if let Some(hooks) = inner.hooks() {
        if inner.stopped.get().is_none() {
            let open = r.dirty_trans_seq == Some(hooks.trans_seq());
            if open && !mutant("invalidate_before_commit") {
                probe("locks.revoke_commits");
                hooks.commit().await;
            }
            inner
                .env
                .spawner
                .yield_point("locks.revoke.committed")
                .await;
            hooks.revoke(r.scope, r.new).await;
        }
        inner.env.spawner.yield_point("locks.revoke.dropped").await;
    }
    let mut out = Vec::new();
    inner.brain.borrow_mut().revoked(r.scope, &mut out);
    inner.carry_out(out);
}

/// Pulls back what must come under the old mode, waits for users in the way, and
/// lowers the mode in the same step in which it sees that nothing is left.
async fn prepare(inner: &Rc<Inner>, scope: Scope) -> Revocation {
    loop {
        let new = inner.brain.borrow_mut().target(scope);
        let hooks = inner.hooks().filter(|_| inner.stopped.get().is_none());
        if let Some(hooks) = &hooks
            && !hooks.is_prepared(scope, new)
        {
            prepare_once(inner, &**hooks, scope, new).await;
        }
        let lower = || {
            let stopped = inner.stopped.get().is_some();
            let ready = |hooks: &Rc<dyn LockHooks>| stopped || hooks.is_prepared(scope, new);
            if !hooks.as_ref().is_none_or(ready) {
                return Some(None);
            }
            inner.brain.borrow_mut().lower(scope).map(Some)
        };
        if let Some(lowered) = inner.fits.wait_for(lower).await {
            return lowered;
        }
        probe("locks.prepare_again");
    }
}

async fn prepare_once(inner: &Rc<Inner>, hooks: &dyn LockHooks, scope: Scope, new: Mode) {
    let mut work = hooks.prepare(scope, new);
    let grace = inner.env.sleep(inner.prepare_grace);
    if let Either::Left(()) = race(&mut work, grace).await {
        return;
    }
    // What it waits for is held by a task that waits for this lock.
    probe("locks.let_in");
    let mut out = Vec::new();
    inner.brain.borrow_mut().let_in(scope, &mut out);
    inner.carry_out(out);
    work.await;
    inner.brain.borrow_mut().shut(scope);
}

/// A queued waiter; dropping it before it was admitted takes it out again.
struct Wait<'a> {
    inner: &'a Rc<Inner>,
    scope: Scope,
    mode: Mode,
    waiter: WaiterId,
    done: bool,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        probe("locks.wait_cancelled");
        let was_waiting = self
            .inner
            .waiting
            .borrow_mut()
            .remove(&self.waiter)
            .is_some();
        let mut brain = self.inner.brain.borrow_mut();
        if brain.cancel_wait(self.scope, self.waiter) || was_waiting {
            return;
        }
        // Admitted, but nobody took it: end the use.
        let Some(id) = brain.id_of(self.scope) else {
            return;
        };
        drop(brain);
        drop(LockGuard {
            inner: self.inner.clone(),
            id,
            scope: self.scope,
            mode: self.mode,
        });
    }
}

impl LockGuard {
    /// What it covers.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// The keys it covers; the start is the lock's name and the bloom key.
    pub fn range(&self) -> KeyRange {
        self.scope.range()
    }

    /// The mode this use asked for. The granted mode may be WRITE where READ was asked.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The granted mode.
    pub fn granted(&self) -> Mode {
        self.inner.brain.borrow().grant_of(self.id).0
    }

    /// Write seq of the grant; 0 under READ.
    pub fn write_seq(&self) -> u64 {
        self.inner.brain.borrow().grant_of(self.id).1
    }

    /// Moves each time read permission is newly gained.
    pub fn refresh_gen(&self) -> u64 {
        self.inner.brain.borrow().grant_of(self.id).2
    }

    /// Whether the key lies in its range.
    pub fn covers(&self, key: &Key) -> bool {
        Scope::covering(key) == Some(self.scope)
    }
}

impl Clone for LockGuard {
    fn clone(&self) -> Self {
        self.inner.brain.borrow_mut().add_user(self.id, self.mode);
        Self {
            inner: self.inner.clone(),
            id: self.id,
            scope: self.scope,
            mode: self.mode,
        }
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        let trans_seq = self.inner.hooks().map_or(0, |hooks| hooks.trans_seq());
        let mut out = Vec::new();
        self.inner
            .brain
            .borrow_mut()
            .release(self.id, self.mode, trans_seq, &mut out);
        self.inner.carry_out(out);
    }
}

impl std::fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LockGuard({:?} {:?})", self.scope, self.mode)
    }
}

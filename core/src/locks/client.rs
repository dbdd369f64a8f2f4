//! The lock client's brain: what this mount may do under each lock, who of its
//! tasks uses it, who waits, and what the server asked back (spec 10 sections 7, 8).
//!
//! A plain state machine: calls in, [`Action`]s out. [`super::Locks`] carries the
//! actions out and runs a revocation in two steps: [`Action::Prepare`] while the
//! old mode is in force, which [`LockClient::lower`] ends, then the cleanup, which
//! [`LockClient::revoked`] ends.
//!
//! What can go wrong, and where it is prevented:
//! * a revocation raising a mode, after a failover repeats it: a mode only goes
//!   down in [`LockClient::start_revoke`] (section 16.3);
//! * a grant lost to a revocation before its waiter ran, for ever: waiters are
//!   admitted by the grant itself (section 9.8);
//! * a grant of a new server while the cleanup for the old one still runs, which
//!   would drop what is written under the new grant: such a grant is kept until
//!   the cleanup has ended (section 7: in order, per lock);
//! * stale inodes after read permission was lost unnoticed: `refresh_gen` moves by
//!   our own previous mode, not by the message's (section 16.4).

use super::{Mode, Policy, Scope, net_lock};
use crate::env::{HashMap, mutant, probe};
use crate::format::{Key, NetLock};
use std::collections::VecDeque;

/// Names one waiting task.
pub type WaiterId = u64;
/// Names one received invalidation, for its answer.
pub type Token = u64;

/// What the caller must carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a lock request to the server.
    Request(NetLock),
    /// This waiter now holds the lock (its user is counted already).
    Admit(WaiterId),
    /// An invalidation arrived: pull back what must come under the old mode, then
    /// call [`LockClient::lower`] until it succeeds.
    Prepare(Scope),
    /// The users of a lock that is being prepared fit the lower mode now.
    Fits(Scope),
    /// Answer the invalidation.
    Respond(Token, NetLock),
}

/// The cleanup of one invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// The lock.
    pub scope: Scope,
    /// The mode until now.
    pub old: Mode,
    /// The mode from now on.
    pub new: Mode,
    /// If `old` could write: the transaction in which a writer last unlocked. If
    /// that one is still open it must be committed before anything is dropped.
    pub dirty_trans_seq: Option<u64>,
}

/// What `acquire` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// The caller is a user.
    Now(LockId),
    /// The waiter will be admitted by an action later.
    Wait,
}

/// What `grant` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// The new mode is in force.
    Applied,
    /// A cleanup runs; the grant waits for its end.
    Kept,
    /// A broken server: no request was pending, or another one. Nothing changed, and
    /// a request that was pending is to be made again.
    NotAsked,
}

/// A lock's slot; stable while the lock has users or waiters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockId(u32);

#[derive(Clone, Debug)]
struct Invalidation {
    token: Token,
    msg: NetLock,
    new: Mode,
}

#[derive(Clone, Debug)]
struct Waiter {
    id: WaiterId,
    mode: Mode,
}

#[derive(Clone, Debug)]
struct Lock {
    scope: Scope,
    key: Key,
    mode: Mode,
    /// A revocation is being prepared; the mode is still in force.
    preparing: bool,
    /// While it is prepared: tasks that the mode serves are let in, since the
    /// preparation waits for them.
    gate_open: bool,
    /// Mode before the cleanup that is running.
    invalidating: Option<Mode>,
    /// The mode of the request that is under way.
    asked: Option<Mode>,
    /// A grant that came while a cleanup ran.
    early_grant: Option<NetLock>,
    invalidations: VecDeque<Invalidation>,
    users: [u32; Mode::COUNT],
    waiters: VecDeque<Waiter>,
    write_seq: u64,
    refresh_gen: u64,
    dirty_trans_seq: u64,
    /// Used since the idle clock last passed.
    recent: bool,
}

impl Lock {
    fn has_users(&self) -> bool {
        self.users.iter().any(|&n| n != 0)
    }

    fn is_idle(&self) -> bool {
        self.asked.is_none()
            && self.invalidations.is_empty()
            && self.waiters.is_empty()
            && !self.has_users()
    }

    /// Whether all users may stay under `new`.
    fn users_fit(&self, new: Mode) -> bool {
        match new {
            Mode::Read => {
                self.users[Mode::Write as usize] == 0 && self.users[Mode::WriteOnly as usize] == 0
            }
            _ => !self.has_users(),
        }
    }

    /// Whether an invalidation waits that a user in `mode` would hold up.
    fn is_wanted_back_from(&self, mode: Mode) -> bool {
        if self.gate_open {
            return false;
        }
        self.invalidations
            .front()
            .is_some_and(|inv| !inv.new.satisfies(mode))
    }
}

/// State of one lock, for checkers and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockState {
    /// The lock.
    pub scope: Scope,
    /// The mode tasks may use.
    pub mode: Mode,
    /// The mode whose cleanup is running, if any: what this mount really still has.
    pub invalidating: Option<Mode>,
    /// Users by mode.
    pub users: [u32; Mode::COUNT],
    /// Waiting tasks.
    pub waiters: usize,
    /// Waiting tasks by the mode they want.
    pub wanted: [u32; Mode::COUNT],
    /// The last grant's write seq.
    pub write_seq: u64,
    /// Moves when read permission is newly gained.
    pub refresh_gen: u64,
}

/// All locks of one mount.
#[derive(Clone, Debug)]
pub struct LockClient {
    slots: Vec<Option<Lock>>,
    free: Vec<u32>,
    by_scope: HashMap<Scope, u32>,
    next_gen: u64,
    clock_hand: usize,
    policy: Policy,
}

impl LockClient {
    /// No locks.
    pub fn new(policy: Policy) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_scope: HashMap::default(),
            next_gen: 0,
            clock_hand: 0,
            policy,
        }
    }

    /// Takes the lock if its mode is at hand; no message, no waiting.
    pub fn try_acquire(&mut self, scope: Scope, mode: Mode) -> Option<LockId> {
        let slot = *self.by_scope.get(&scope)?;
        let lock = self.slots[slot as usize]
            .as_mut()
            .expect("an indexed lock exists");
        if !lock.mode.satisfies(mode) {
            return None;
        }
        lock.users[mode as usize] += 1;
        lock.recent = true;
        Some(LockId(slot))
    }

    /// Takes the lock or queues `waiter`. With `yielding` the caller holds no
    /// lock yet and lets a waiting invalidation go first; without, it may already
    /// hold this very lock, and making it wait could deadlock (section 13).
    ///
    /// # Panics
    /// If `mode` is NULL.
    pub fn acquire(
        &mut self,
        scope: Scope,
        mode: Mode,
        yielding: bool,
        waiter: WaiterId,
        out: &mut Vec<Action>,
    ) -> Acquired {
        assert_ne!(mode, Mode::Null, "a task cannot hold NULL");
        self.shrink(out);
        let slot = self.find_or_create(scope);
        let lock = self.lock_mut(slot);
        lock.recent = true;
        if lock.mode.satisfies(mode) && !(yielding && lock.is_wanted_back_from(mode)) {
            lock.users[mode as usize] += 1;
            return Acquired::Now(LockId(slot));
        }
        lock.waiters.push_back(Waiter { id: waiter, mode });
        self.ask_for_waiters(slot, out);
        Acquired::Wait
    }

    /// Takes a waiter out of its queue. False if it was admitted already (the
    /// caller then releases what it was given).
    pub fn cancel_wait(&mut self, scope: Scope, waiter: WaiterId) -> bool {
        let Some(&slot) = self.by_scope.get(&scope) else {
            return false;
        };
        let lock = self.lock_mut(slot);
        let Some(at) = lock.waiters.iter().position(|w| w.id == waiter) else {
            return false;
        };
        lock.waiters.remove(at);
        self.free_if_idle_null(slot);
        true
    }

    /// The lock's slot for an admitted waiter.
    pub fn id_of(&self, scope: Scope) -> Option<LockId> {
        self.by_scope.get(&scope).map(|&slot| LockId(slot))
    }

    /// One more user of a lock that the caller already uses in this mode.
    pub fn add_user(&mut self, id: LockId, mode: Mode) {
        let lock = self.lock_mut(id.0);
        assert!(
            lock.users[mode as usize] > 0,
            "a lock can only be shared by a user of it"
        );
        lock.users[mode as usize] += 1;
    }

    /// Ends one use. `trans_seq` is the open transaction's.
    pub fn release(&mut self, id: LockId, mode: Mode, trans_seq: u64, out: &mut Vec<Action>) {
        let lock = self.lock_mut(id.0);
        let users = &mut lock.users[mode as usize];
        *users = users.checked_sub(1).expect("a release matches an acquire");
        if mode.writes() {
            lock.dirty_trans_seq = trans_seq;
        }
        self.tell_if_fits(id.0, out);
        self.free_if_idle_null(id.0);
    }

    /// The granted mode, write seq and refresh generation of a lock in use.
    pub fn grant_of(&self, id: LockId) -> (Mode, u64, u64) {
        let lock = self.lock(id.0);
        (lock.mode, lock.write_seq, lock.refresh_gen)
    }

    /// The server's grant.
    pub fn grant(&mut self, msg: &NetLock, out: &mut Vec<Action>) -> Granted {
        let Some(slot) = self.slot_of(&Key::from(msg.key)) else {
            return Granted::NotAsked;
        };
        let Some(mode) = Mode::from_wire(msg.new_mode) else {
            return Granted::NotAsked;
        };
        let gen_if_gained = self.next_gen + 1;
        let lock = self.lock_mut(slot);
        if lock.asked != Some(mode) || lock.early_grant.is_some() {
            return Granted::NotAsked;
        }
        if lock.invalidating.is_some() && !mutant("early_grant_applied") {
            probe("lock_client.early_grant");
            lock.early_grant = Some(*msg);
            return Granted::Kept;
        }
        // Only READ is raised; anything else is taken back before (section 3). Items
        // would be left over from the old mode, or would be ours to keep though nobody
        // would ever take them back.
        let known = Mode::from_wire(msg.old_mode).is_some_and(Mode::reads);
        let raised = lock.mode.reads() && mode.reads() && known;
        if lock.mode != Mode::Null && !raised {
            return Granted::NotAsked;
        }
        lock.asked = None;
        let gained = mode.reads() && !lock.mode.reads();
        if gained {
            lock.refresh_gen = gen_if_gained;
        }
        lock.mode = mode;
        lock.write_seq = msg.write_seq.get();
        if gained {
            self.next_gen = gen_if_gained;
        }
        self.admit(slot, out);
        self.ask_for_waiters(slot, out);
        self.free_if_idle_null(slot);
        Granted::Applied
    }

    /// A request could not be sent (forced unmount): the waiters stay queued
    /// for the caller to fail.
    pub fn request_failed(&mut self, scope: Scope) {
        if let Some(&slot) = self.by_scope.get(&scope) {
            self.lock_mut(slot).asked = None;
            self.free_if_idle_null(slot);
        }
    }

    /// The server's invalidation. A lock we do not have is answered at once with
    /// NULL; duplicates across failovers queue up and are answered in turn.
    pub fn invalidate(&mut self, token: Token, msg: &NetLock, out: &mut Vec<Action>) {
        let key = Key::from(msg.key);
        let new = Mode::from_wire(msg.new_mode).unwrap_or(Mode::Null);
        let Some(slot) = self.slot_of(&key) else {
            probe("lock_client.invalidate_unknown");
            out.push(Action::Respond(
                token,
                net_lock(&key, 0, Mode::Null, Mode::Null),
            ));
            return;
        };
        let lock = self.lock_mut(slot);
        lock.invalidations.push_back(Invalidation {
            token,
            msg: *msg,
            new,
        });
        if lock.invalidations.len() > 1 {
            probe("lock_client.invalidate_queued");
        }
        self.start_revoke(slot, out);
    }

    /// The cleanup of a revocation is done: answer, and go on with the next.
    pub fn revoked(&mut self, scope: Scope, out: &mut Vec<Action>) {
        let slot = *self
            .by_scope
            .get(&scope)
            .expect("a lock being revoked exists");
        let lock = self.lock_mut(slot);
        assert!(
            lock.invalidating.take().is_some(),
            "only a running revocation ends"
        );
        let inv = lock
            .invalidations
            .pop_front()
            .expect("a revocation has its invalidation");
        let old = Mode::from_wire(inv.msg.old_mode).unwrap_or(Mode::Null);
        let answer = net_lock(&lock.key, 0, old, lock.mode);
        out.push(Action::Respond(inv.token, answer));
        if let Some(grant) = lock.early_grant.take() {
            // Its request is still under way.
            if self.grant(&grant, out) != Granted::Applied {
                // Whoever waits is asked for again below, or when the next cleanup ends.
                probe("lock_client.early_grant_refused");
                tracing::error!(key = %Key::from(grant.key), "the server granted a lock that nobody has so");
                self.lock_mut(slot).asked = None;
            }
        }
        let Some(lock) = self.slots[slot as usize].as_mut() else {
            return;
        };
        if lock.invalidations.is_empty() {
            self.admit(slot, out);
            // Mutant: breaks spec 10 section 9, who came meanwhile is asked for.
            if !mutant("revoked_asks_for_nobody") {
                self.ask_for_waiters(slot, out);
            }
        } else {
            self.start_revoke(slot, out);
        }
        self.free_if_idle_null(slot);
    }

    /// At most `max` locks from `start` on, as a recovering server wants them:
    /// the old mode while a cleanup runs (section 10.3), or what an early grant
    /// will make of it.
    pub fn recover(&self, start: &Key, max: usize) -> Vec<NetLock> {
        let mut held: Vec<&Lock> = self
            .slots
            .iter()
            .flatten()
            .filter(|lock| lock.key >= *start)
            .collect();
        held.sort_unstable_by_key(|lock| lock.key);
        held.truncate(max);
        held.iter()
            .map(|lock| {
                let early = lock.early_grant.as_ref();
                let granted = early.and_then(|grant| Mode::from_wire(grant.new_mode));
                // Mutant: breaks spec 10 section 10.3, what we really still have.
                let old = lock
                    .invalidating
                    .filter(|_| !mutant("recovery_tells_new_mode"));
                let mode = granted.or(old).unwrap_or(lock.mode);
                let seq = early.map_or(0, |grant| grant.write_seq.get());
                net_lock(&lock.key, lock.write_seq.max(seq), mode, mode)
            })
            .collect()
    }

    /// Gives every idle lock back, as the `statfs_lock_purge` trigger does.
    pub fn purge_idle(&mut self, out: &mut Vec<Action>) {
        for slot in 0..self.slots.len() {
            self.give_back_if_idle(slot, out);
        }
    }

    /// State of every lock, ordered by key.
    pub fn table(&self) -> Vec<LockState> {
        let mut held: Vec<&Lock> = self.slots.iter().flatten().collect();
        held.sort_unstable_by_key(|lock| lock.key);
        held.iter()
            .map(|lock| LockState {
                scope: lock.scope,
                mode: lock.mode,
                invalidating: lock.invalidating,
                users: lock.users,
                waiters: lock.waiters.len(),
                wanted: lock
                    .waiters
                    .iter()
                    .fold([0; Mode::COUNT], |mut by, waiter| {
                        by[waiter.mode as usize] += 1;
                        by
                    }),
                write_seq: lock.write_seq,
                refresh_gen: lock.refresh_gen,
            })
            .collect()
    }

    /// Lock objects in memory.
    pub fn len(&self) -> usize {
        self.by_scope.len()
    }

    /// Whether there is no lock object.
    pub fn is_empty(&self) -> bool {
        self.by_scope.is_empty()
    }

    fn lock(&self, slot: u32) -> &Lock {
        self.slots[slot as usize]
            .as_ref()
            .expect("a lock in use exists")
    }

    fn lock_mut(&mut self, slot: u32) -> &mut Lock {
        self.slots[slot as usize]
            .as_mut()
            .expect("a lock in use exists")
    }

    fn slot_of(&self, key: &Key) -> Option<u32> {
        self.by_scope.get(&Scope::from_start(key)?).copied()
    }

    fn find_or_create(&mut self, scope: Scope) -> u32 {
        if let Some(&slot) = self.by_scope.get(&scope) {
            return slot;
        }
        let lock = Lock {
            scope,
            key: scope.range().start,
            mode: Mode::Null,
            preparing: false,
            gate_open: false,
            invalidating: None,
            asked: None,
            early_grant: None,
            invalidations: VecDeque::new(),
            users: [0; Mode::COUNT],
            waiters: VecDeque::new(),
            write_seq: 0,
            refresh_gen: 0,
            dirty_trans_seq: 0,
            recent: true,
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 locks")
        });
        self.slots[slot as usize] = Some(lock);
        self.by_scope.insert(scope, slot);
        slot
    }

    fn free_if_idle_null(&mut self, slot: u32) {
        let lock = self.lock(slot);
        if lock.mode == Mode::Null && lock.invalidating.is_none() && lock.is_idle() {
            let scope = lock.scope;
            self.slots[slot as usize] = None;
            self.free.push(slot);
            self.by_scope.remove(&scope);
        }
    }

    /// Lets in every waiter that the current mode serves. A grant thus always
    /// gives its waiters a turn, also when an invalidation came right behind it.
    fn admit(&mut self, slot: u32, out: &mut Vec<Action>) {
        let lock = self.lock_mut(slot);
        let mode = lock.mode;
        let users = &mut lock.users;
        lock.waiters.retain(|waiter| {
            let serves = mode.satisfies(waiter.mode);
            if serves {
                users[waiter.mode as usize] += 1;
                out.push(Action::Admit(waiter.id));
            }
            !serves
        });
    }

    /// Sends a request for the first waiter, unless one is on its way or a
    /// cleanup runs (its end asks again).
    fn ask_for_waiters(&mut self, slot: u32, out: &mut Vec<Action>) {
        let lock = self.lock_mut(slot);
        if lock.asked.is_some() {
            return;
        }
        let mode = lock.mode;
        // A yielding waiter may be served by the present mode; it is let in when
        // the invalidation it yields to has gone.
        let Some(wanted) = lock
            .waiters
            .iter()
            .find(|w| !mode.satisfies(w.mode))
            .map(|w| w.mode)
        else {
            return;
        };
        lock.asked = Some(wanted);
        out.push(Action::Request(net_lock(&lock.key, 0, mode, wanted)));
    }

    /// Begins to prepare the first queued invalidation.
    fn start_revoke(&mut self, slot: u32, out: &mut Vec<Action>) {
        let lock = self.lock_mut(slot);
        if lock.invalidations.is_empty() || lock.preparing || lock.invalidating.is_some() {
            return;
        }
        lock.preparing = true;
        out.push(Action::Prepare(lock.scope));
    }

    /// Tells who prepares a revocation that its users fit now.
    fn tell_if_fits(&self, slot: u32, out: &mut Vec<Action>) {
        let lock = self.lock(slot);
        let fits = |inv: &Invalidation| lock.users_fit(inv.new);
        if lock.preparing && lock.invalidations.front().is_some_and(fits) {
            out.push(Action::Fits(lock.scope));
        }
    }

    fn being_prepared(&mut self, scope: Scope) -> &mut Lock {
        let slot = self
            .by_scope
            .get(&scope)
            .expect("a lock being revoked exists");
        let slot = *slot;
        let lock = self.lock_mut(slot);
        assert!(lock.preparing, "a preparation runs");
        lock
    }

    /// The mode that the revocation being prepared will leave.
    pub fn target(&mut self, scope: Scope) -> Mode {
        let lock = self.being_prepared(scope);
        let inv = lock.invalidations.front();
        lock.mode
            .lowered_to(inv.expect("a revocation has its invalidation").new)
    }

    /// Lets tasks in that the mode still in force serves: the preparation waits
    /// for something that they hold.
    pub fn let_in(&mut self, scope: Scope, out: &mut Vec<Action>) {
        self.being_prepared(scope).gate_open = true;
        let slot = self.by_scope[&scope];
        self.admit(slot, out);
    }

    /// Ends [`LockClient::let_in`].
    pub fn shut(&mut self, scope: Scope) {
        self.being_prepared(scope).gate_open = false;
    }

    /// Lowers the mode, so that no task that needs more can come in, and begins
    /// the cleanup; `None` while users are in the way.
    pub fn lower(&mut self, scope: Scope) -> Option<Revocation> {
        let lock = self.being_prepared(scope);
        let inv = lock.invalidations.front();
        let wanted = inv.expect("a revocation has its invalidation").new;
        if !lock.users_fit(wanted) {
            return None;
        }
        let old = lock.mode;
        let new = old.lowered_to(wanted);
        lock.preparing = false;
        lock.gate_open = false;
        lock.mode = new;
        lock.invalidating = Some(old);
        Some(Revocation {
            scope,
            old,
            new,
            dirty_trans_seq: old.writes().then_some(lock.dirty_trans_seq),
        })
    }

    /// Gives back one lock that was idle for a whole turn of the clock hand, if
    /// there are more locks than the policy keeps.
    fn shrink(&mut self, out: &mut Vec<Action>) {
        const LOOK_AT: usize = 16;
        if self.by_scope.len() <= self.policy.idle_count {
            return;
        }
        for _ in 0..LOOK_AT.min(self.slots.len()) {
            self.clock_hand = (self.clock_hand + 1) % self.slots.len();
            if let Some(lock) = &mut self.slots[self.clock_hand]
                && std::mem::take(&mut lock.recent)
            {
                continue;
            }
            if self.give_back_if_idle(self.clock_hand, out) {
                probe("lock_client.shrink");
                return;
            }
        }
    }

    fn give_back_if_idle(&mut self, slot: usize, out: &mut Vec<Action>) -> bool {
        let Some(lock) = &mut self.slots[slot] else {
            return false;
        };
        if !lock.is_idle() || lock.mode == Mode::Null || lock.invalidating.is_some() {
            return false;
        }
        lock.asked = Some(Mode::Null);
        out.push(Action::Request(net_lock(
            &lock.key,
            0,
            lock.mode,
            Mode::Null,
        )));
        true
    }
}

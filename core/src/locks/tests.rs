//! The two brains against each other: random messages, delays, cancelled waits,
//! slow cleanups and server failovers, with the invariants of spec 10 section 15
//! checked after each step.

use super::client::{
    Acquired, Action as ClientAction, Granted, LockClient, LockId, Revocation, Token,
};
use super::server::{Action as ServerAction, List, LockProtocolError, LockServer};
use super::{Mode, Policy, Scope, net_lock};
use crate::format::{Key, NetLock};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, VecDeque};

const SCOPES: [Scope; 3] = [Scope::InodeGroup(0), Scope::MetaSeq(0), Scope::Rename];

/// What travels from the server to one client.
enum Down {
    Grant(NetLock),
    Invalidate(NetLock),
}

/// What travels from one client to the server.
enum Up {
    Request(NetLock),
    Response(NetLock),
}

struct Client {
    brain: LockClient,
    down: VecDeque<Down>,
    up: VecDeque<Up>,
    held: Vec<(Scope, LockId, Mode)>,
    waits: BTreeMap<u64, (Scope, Mode)>,
    preparing: Vec<Scope>,
    cleanups: Vec<Revocation>,
    /// Invalidations received, by token: the server epoch each came from.
    tokens: BTreeMap<Token, u64>,
    next_id: u64,
    pending: BTreeMap<Key, NetLock>,
}

struct World {
    rng: ChaCha8Rng,
    server: LockServer,
    epoch: u64,
    seq: u64,
    clients: Vec<Client>,
    last_write_seq: BTreeMap<Key, u64>,
    grants: u64,
}

impl World {
    fn new(seed: u64, clients: usize) -> Self {
        let client = || Client {
            brain: LockClient::new(Policy {
                idle_count: 1,
                ..Policy::default()
            }),
            down: VecDeque::new(),
            up: VecDeque::new(),
            held: Vec::new(),
            waits: BTreeMap::new(),
            preparing: Vec::new(),
            cleanups: Vec::new(),
            tokens: BTreeMap::new(),
            next_id: 0,
            pending: BTreeMap::new(),
        };
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            server: LockServer::default(),
            epoch: 1,
            seq: 100,
            clients: (0..clients).map(|_| client()).collect(),
            last_write_seq: BTreeMap::new(),
            grants: 0,
        }
    }

    fn pick(&mut self, n: usize) -> usize {
        self.rng.random_range(0..n)
    }

    fn client_actions(&mut self, at: usize, actions: Vec<ClientAction>) {
        let client = &mut self.clients[at];
        for action in actions {
            match action {
                ClientAction::Request(msg) => {
                    let old = client.pending.insert(Key::from(msg.key), msg);
                    assert!(old.is_none(), "one request at a time per lock");
                    client.up.push_back(Up::Request(msg));
                }
                ClientAction::Admit(waiter) => {
                    let (scope, mode) = client.waits.remove(&waiter).expect("admitted once");
                    let id = client.brain.id_of(scope).expect("an admitted lock exists");
                    client.held.push((scope, id, mode));
                }
                ClientAction::Prepare(scope) => client.preparing.push(scope),
                ClientAction::Fits(_) => {}
                ClientAction::Respond(token, msg) => {
                    if client.tokens.remove(&token) == Some(self.epoch) {
                        client.up.push_back(Up::Response(msg));
                    }
                }
            }
        }
    }

    fn server_actions(&mut self, actions: Vec<ServerAction>) {
        for action in actions {
            match action {
                ServerAction::Grant { rid, lock, .. } => {
                    if Mode::from_wire(lock.new_mode).unwrap().writes() {
                        let last = self.last_write_seq.entry(Key::from(lock.key)).or_insert(0);
                        assert!(lock.write_seq.get() > *last, "write seqs grow");
                        *last = lock.write_seq.get();
                    }
                    self.grants += 1;
                    self.clients[rid as usize].down.push_back(Down::Grant(lock));
                }
                ServerAction::Invalidate { rid, lock } => {
                    self.clients[rid as usize]
                        .down
                        .push_back(Down::Invalidate(lock));
                }
            }
        }
    }

    fn deliver_up(&mut self, at: usize) {
        let Some(msg) = self.clients[at].up.pop_front() else {
            return;
        };
        let mut out = Vec::new();
        let seq = &mut self.seq;
        let mut next = || {
            *seq += 1;
            *seq
        };
        match msg {
            Up::Request(lock) => {
                self.server
                    .request(at as u64, 1, &lock, &mut next, &mut out)
                    .unwrap();
            }
            Up::Response(lock) => {
                self.server
                    .response(at as u64, &lock, &mut next, &mut out)
                    .unwrap();
            }
        }
        self.server_actions(out);
    }

    fn deliver_down(&mut self, at: usize) {
        let Some(msg) = self.clients[at].down.pop_front() else {
            return;
        };
        let mut out = Vec::new();
        let client = &mut self.clients[at];
        match msg {
            Down::Grant(lock) => {
                client.pending.remove(&Key::from(lock.key));
                assert_ne!(
                    client.brain.grant(&lock, &mut out),
                    Granted::NotAsked,
                    "a grant answers a request"
                );
            }
            Down::Invalidate(lock) => {
                client.next_id += 1;
                let token = client.next_id;
                client.tokens.insert(token, self.epoch);
                client.brain.invalidate(token, &lock, &mut out);
            }
        }
        self.client_actions(at, out);
    }

    fn acquire(&mut self, at: usize) {
        let scope = SCOPES[self.pick(SCOPES.len())];
        let mode = match (scope, self.pick(2)) {
            (Scope::MetaSeq(_), 0) => Mode::WriteOnly,
            (_, 0) => Mode::Write,
            _ => Mode::Read,
        };
        // Like an operation: never a second lock while one is held, but for nesting.
        let client = &mut self.clients[at];
        if client.held.len() > 2 || client.waits.len() > 2 {
            return;
        }
        client.next_id += 1;
        let waiter = client.next_id;
        let yielding = client.held.is_empty();
        client.waits.insert(waiter, (scope, mode));
        let mut out = Vec::new();
        if let Acquired::Now(id) = client
            .brain
            .acquire(scope, mode, yielding, waiter, &mut out)
        {
            client.waits.remove(&waiter);
            client.held.push((scope, id, mode));
        }
        self.client_actions(at, out);
    }

    fn release(&mut self, at: usize, index: usize) {
        let client = &mut self.clients[at];
        let (_, id, mode) = client.held.swap_remove(index);
        let mut out = Vec::new();
        client.brain.release(id, mode, 7, &mut out);
        self.client_actions(at, out);
    }

    /// Tries to end a preparation; now and then lets those in who are held off.
    fn prepare(&mut self, at: usize, index: usize) {
        let let_in = self.pick(3) == 0;
        let client = &mut self.clients[at];
        let scope = client.preparing[index];
        if let_in {
            let mut out = Vec::new();
            client.brain.let_in(scope, &mut out);
            self.client_actions(at, out);
            self.clients[at].brain.shut(scope);
            return;
        }
        let target = client.brain.target(scope);
        if let Some(revocation) = client.brain.lower(scope) {
            assert_eq!(revocation.new, target);
            client.preparing.swap_remove(index);
            client.cleanups.push(revocation);
        }
    }

    fn finish_cleanup(&mut self, at: usize, index: usize) {
        let revocation = self.clients[at].cleanups.swap_remove(index);
        let mut out = Vec::new();
        self.clients[at].brain.revoked(revocation.scope, &mut out);
        self.client_actions(at, out);
    }

    fn cancel(&mut self, at: usize) {
        let client = &mut self.clients[at];
        let Some((&waiter, &(scope, _))) = client.waits.first_key_value() else {
            return;
        };
        if client.brain.cancel_wait(scope, waiter) {
            client.waits.remove(&waiter);
        }
    }

    /// A new server: messages in flight are lost, pending requests are resent,
    /// locks are told.
    fn fail_over(&mut self) {
        self.epoch += 1;
        self.server = LockServer::recovering(0..self.clients.len() as u64);
        for client in &mut self.clients {
            client.down.clear();
            client.up.clear();
            client
                .up
                .extend(client.pending.values().map(|msg| Up::Request(*msg)));
        }
        for at in 0..self.clients.len() {
            if self.pick(2) == 0 {
                self.deliver_up(at);
            }
            let rid = at as u64;
            let mut out = Vec::new();
            while let Some(cursor) = self.server.recovery_cursor(rid) {
                let batch = self.clients[at].brain.recover(&cursor, 1);
                let (greatest, done) = self.server.recover(rid, &batch).unwrap();
                self.seq = self.seq.max(greatest);
                if done {
                    let seq = &mut self.seq;
                    let mut next = || {
                        *seq += 1;
                        *seq
                    };
                    self.server.recovered(rid, &mut next, &mut out);
                }
            }
            self.server_actions(out);
        }
    }

    fn step(&mut self) {
        let at = self.pick(self.clients.len());
        match self.pick(12) {
            0..=2 => self.deliver_up(at),
            3..=5 => self.deliver_down(at),
            6 | 7 => self.acquire(at),
            8 => {
                let n = self.clients[at].held.len();
                if n > 0 {
                    let index = self.pick(n);
                    self.release(at, index);
                }
            }
            9 | 10 => {
                let n = self.clients[at].preparing.len();
                if n > 0 {
                    let index = self.pick(n);
                    self.prepare(at, index);
                }
                let n = self.clients[at].cleanups.len();
                if n > 0 {
                    let index = self.pick(n);
                    self.finish_cleanup(at, index);
                }
            }
            _ => match self.rng.next_u64() % 16 {
                0 => self.fail_over(),
                1..=4 => self.cancel(at),
                _ => {}
            },
        }
        self.check();
    }

    /// Invariants 1, 2 and 7 of spec 10 section 15.
    fn check(&self) {
        for scope in SCOPES {
            let actual: Vec<Mode> = self
                .clients
                .iter()
                .flat_map(|c| c.brain.table())
                .filter(|lock| lock.scope == scope)
                .map(|lock| lock.invalidating.unwrap_or(lock.mode))
                .filter(|mode| *mode != Mode::Null)
                .collect();
            let write = actual.contains(&Mode::Write);
            assert!(
                !write || actual.len() == 1,
                "{scope:?}: WRITE is alone: {actual:?}"
            );
            assert!(
                !(actual.contains(&Mode::Read) && actual.contains(&Mode::WriteOnly)),
                "{scope:?}: READ and WRITE_ONLY together"
            );
        }
        for client in &self.clients {
            for (scope, _, mode) in &client.held {
                let lock = client
                    .brain
                    .table()
                    .into_iter()
                    .find(|l| l.scope == *scope)
                    .unwrap();
                assert!(
                    lock.mode.satisfies(*mode),
                    "{scope:?} is held in {mode:?} under {lock:?}"
                );
            }
        }
    }

    /// Everything is delivered, cleaned up and released until all is quiet:
    /// nobody may be left waiting.
    fn drain(&mut self) {
        for _ in 0..10_000 {
            let mut busy = false;
            for at in 0..self.clients.len() {
                while !self.clients[at].held.is_empty() {
                    self.release(at, 0);
                    busy = true;
                }
                // It may have let somebody in, who has to be released first.
                if !self.clients[at].preparing.is_empty() {
                    self.prepare(at, 0);
                    busy = true;
                }
                while !self.clients[at].cleanups.is_empty() {
                    self.finish_cleanup(at, 0);
                    busy = true;
                }
                busy |= !self.clients[at].up.is_empty() || !self.clients[at].down.is_empty();
                self.deliver_up(at);
                self.deliver_down(at);
            }
            self.check();
            if !busy {
                break;
            }
        }
        for client in &self.clients {
            assert!(
                client.waits.is_empty(),
                "a waiter was forgotten: {:?}",
                client.waits
            );
            assert!(client.pending.is_empty(), "a request was never answered");
        }
        assert!(
            self.server.table().all(|e| e.list == List::Granted),
            "the server still waits for somebody"
        );
    }
}

#[test]
fn modes_stay_compatible_and_nobody_is_forgotten() {
    let mut grants = 0;
    for seed in 0..300 {
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        for _ in 0..400 {
            world.step();
        }
        world.drain();
        grants += world.grants;
    }
    assert!(grants > 5_000, "the worlds did something: {grants} grants");
}

fn grant_of(out: &[ServerAction]) -> Vec<(u64, u8, u8)> {
    out.iter()
        .filter_map(|a| match a {
            ServerAction::Grant { rid, lock, .. } => Some((*rid, lock.old_mode, lock.new_mode)),
            ServerAction::Invalidate { .. } => None,
        })
        .collect()
}

/// The crossing of spec 10 section 9.7: the server's record counts, not what
/// the client thought when it asked.
#[test]
fn crossing_upgrade_is_granted_from_null() {
    let key = Scope::InodeGroup(0).range().start;
    let mut server = LockServer::default();
    let mut seq = 0;
    let mut next = || {
        seq += 1;
        seq
    };
    let mut out = Vec::new();
    server
        .request(
            1,
            1,
            &net_lock(&key, 0, Mode::Null, Mode::Read),
            &mut next,
            &mut out,
        )
        .unwrap();
    server
        .request(
            2,
            1,
            &net_lock(&key, 0, Mode::Null, Mode::Write),
            &mut next,
            &mut out,
        )
        .unwrap();
    server
        .request(
            1,
            2,
            &net_lock(&key, 0, Mode::Read, Mode::Write),
            &mut next,
            &mut out,
        )
        .unwrap();
    out.clear();
    server
        .response(
            1,
            &net_lock(&key, 0, Mode::Read, Mode::Null),
            &mut next,
            &mut out,
        )
        .unwrap();
    assert_eq!(grant_of(&out), [(2, 0, 2)]);
    out.clear();
    server
        .response(
            2,
            &net_lock(&key, 0, Mode::Write, Mode::Null),
            &mut next,
            &mut out,
        )
        .unwrap();
    assert_eq!(grant_of(&out), [(1, 0, 2)]);
}

#[test]
fn upgrade_without_sharing_keeps_the_old_mode() {
    let key = Scope::InodeGroup(0).range().start;
    let mut server = LockServer::default();
    let mut out = Vec::new();
    let mut next = || 9;
    server
        .request(
            1,
            1,
            &net_lock(&key, 0, Mode::Null, Mode::Read),
            &mut next,
            &mut out,
        )
        .unwrap();
    server
        .request(
            1,
            2,
            &net_lock(&key, 0, Mode::Read, Mode::Write),
            &mut next,
            &mut out,
        )
        .unwrap();
    assert_eq!(grant_of(&out), [(1, 0, 1), (1, 1, 2)]);
}

#[test]
fn release_invalidates_the_holder_first() {
    let key = Scope::InodeGroup(0).range().start;
    let mut server = LockServer::default();
    let mut out = Vec::new();
    let mut next = || 9;
    server
        .request(
            1,
            1,
            &net_lock(&key, 0, Mode::Null, Mode::Write),
            &mut next,
            &mut out,
        )
        .unwrap();
    out.clear();
    server
        .request(
            1,
            2,
            &net_lock(&key, 0, Mode::Write, Mode::Null),
            &mut next,
            &mut out,
        )
        .unwrap();
    let inv = net_lock(&key, 0, Mode::Write, Mode::Null);
    assert_eq!(out, [ServerAction::Invalidate { rid: 1, lock: inv }]);
    out.clear();
    server.response(1, &inv, &mut next, &mut out).unwrap();
    assert_eq!(grant_of(&out), [(1, 0, 0)]);
    assert_eq!(
        server.table().count(),
        0,
        "nothing is kept of a lock nobody has"
    );
}

#[test]
fn broken_clients_are_named() {
    let key = Scope::InodeGroup(0).range().start;
    let mut server = LockServer::default();
    let mut out = Vec::new();
    let mut next = || 9;
    let mut bad = net_lock(&key, 0, Mode::Null, Mode::Read);
    bad.new_mode = 4;
    let error = server.request(1, 1, &bad, &mut next, &mut out).unwrap_err();
    assert!(matches!(error, LockProtocolError::BadMode { mode: 4, .. }));
    let inside = Key { first: 5, ..key };
    let error = server
        .request(
            1,
            1,
            &net_lock(&inside, 0, Mode::Null, Mode::Read),
            &mut next,
            &mut out,
        )
        .unwrap_err();
    assert!(matches!(error, LockProtocolError::BadKey { .. }));
    let error = server
        .response(
            1,
            &net_lock(&key, 0, Mode::Write, Mode::Null),
            &mut next,
            &mut out,
        )
        .unwrap_err();
    assert!(matches!(error, LockProtocolError::NotInvalidated { .. }));
    assert!(out.is_empty());
    // Granted, and wanted by another: who waits for it must not ask again.
    let read = net_lock(&key, 0, Mode::Null, Mode::Read);
    let write = net_lock(&key, 0, Mode::Null, Mode::Write);
    assert_eq!(server.request(1, 1, &read, &mut next, &mut out), Ok(()));
    assert_eq!(server.request(2, 1, &write, &mut next, &mut out), Ok(()));
    let before = out.clone();
    let error = server.request(2, 2, &write, &mut next, &mut out);
    let named = LockProtocolError::SecondRequest { rid: 2, key };
    assert_eq!(error, Err(named));
    assert_eq!(out, before, "and nothing is done");
    // The first one is as good as before.
    let back = net_lock(&key, 0, Mode::Read, Mode::Null);
    assert_eq!(server.response(1, &back, &mut next, &mut out), Ok(()));
    assert_eq!(grant_of(&out[before.len()..]), [(2, 0, 2)]);
}

/// An invalidation repeated after a failover must not raise a mode (section 16.3).
#[test]
fn repeated_downgrade_does_not_raise_null_to_read() {
    let scope = Scope::InodeGroup(0);
    let key = scope.range().start;
    let mut brain = LockClient::new(Policy::default());
    let mut out = Vec::new();
    assert_eq!(
        brain.acquire(scope, Mode::Write, true, 1, &mut out),
        Acquired::Wait
    );
    brain.grant(&net_lock(&key, 5, Mode::Null, Mode::Write), &mut out);
    brain.invalidate(1, &net_lock(&key, 0, Mode::Write, Mode::Null), &mut out);
    brain.invalidate(2, &net_lock(&key, 0, Mode::Write, Mode::Read), &mut out);
    let id = brain.id_of(scope).unwrap();
    out.clear();
    assert_eq!(brain.lower(scope), None, "a user is in the way");
    brain.release(id, Mode::Write, 0, &mut out);
    assert_eq!(out, [ClientAction::Fits(scope)]);
    assert_eq!(brain.lower(scope).unwrap().new, Mode::Null);
    brain.revoked(scope, &mut out);
    assert_eq!(brain.lower(scope).unwrap().new, Mode::Null);
    brain.revoked(scope, &mut out);
    let answers: Vec<u8> = out
        .iter()
        .filter_map(|a| match a {
            ClientAction::Respond(_, msg) => Some(msg.new_mode),
            _ => None,
        })
        .collect();
    assert_eq!(answers, [Mode::Null as u8, Mode::Null as u8]);
}

#[test]
fn scopes_are_found_from_the_keys_they_cover() {
    for scope in [
        Scope::InodeGroup(5000).normal(),
        Scope::MetaSeq(5000).normal(),
        Scope::DataSeq(5000).normal(),
        Scope::Orphans,
        Scope::Quota,
        Scope::Totl,
        Scope::Indx,
        Scope::Rename,
    ] {
        let range = scope.range();
        assert_eq!(Scope::from_start(&range.start), Some(scope));
        assert_eq!(Scope::covering(&range.end), Some(scope));
    }
    assert_eq!(
        Scope::from_start(&Key {
            first: 1,
            ..Scope::Quota.range().start
        }),
        None
    );
}

mod omap {
    use super::super::omap::{Action, LocalMap, OmapServer, has_bit};
    use crate::format::OpenInoMapArgs;

    fn args(group_nr: u64) -> OpenInoMapArgs {
        OpenInoMapArgs {
            group_nr: group_nr.into(),
            ..OpenInoMapArgs::default()
        }
    }

    #[test]
    fn a_lone_client_is_answered_at_once() {
        let mut server = OmapServer::new(false);
        let mut out = Vec::new();
        server.request(1, 4, &args(4), &mut out);
        assert!(matches!(&out[..], [Action::Answer { rid: 1, id: 4, .. }]));
    }

    #[test]
    fn every_other_client_is_asked_or_reclaimed() {
        let mut server = OmapServer::new(true);
        (1..=3).for_each(|rid| server.add_client(rid));
        let mut out = Vec::new();
        server.request(1, 4, &args(4), &mut out);
        assert!(
            out.is_empty(),
            "nobody is asked while clients may be missing"
        );
        server.recovered(&mut out);
        assert_eq!(out.len(), 2);
        let Action::Ask { rid: 2, args } = out[0] else {
            panic!("{out:?}")
        };
        let mut local = LocalMap::default();
        local.get(5000);
        out.clear();
        server.response(2, &local.answer(&args), &mut out);
        server.response(2, &local.answer(&args), &mut out);
        assert!(out.is_empty());
        server.remove_client(3, &mut out);
        let [Action::Answer { rid: 1, id: 4, map }] = &out[..] else {
            panic!("{out:?}")
        };
        assert!(has_bit(map, 904));
        assert_eq!(
            map.bits.iter().map(|w| w.get().count_ones()).sum::<u32>(),
            1
        );
    }

    /// A mount is on the list before it can be sent anything: what was asked meanwhile
    /// comes once it can.
    #[test]
    fn who_could_not_be_asked_is_asked_when_it_comes() {
        let mut server = OmapServer::new(false);
        (1..=3).for_each(|rid| server.add_client(rid));
        let mut out = Vec::new();
        server.request(1, 4, &args(4), &mut out);
        let Action::Ask { rid: 2, args } = out[0] else {
            panic!("{out:?}")
        };
        out.clear();
        server.ask_again(2, &mut out);
        let [
            Action::Ask {
                rid: 2,
                args: again,
            },
        ] = &out[..]
        else {
            panic!("{out:?}")
        };
        assert_eq!(*again, args);
        out.clear();
        server.response(2, &LocalMap::default().answer(&args), &mut out);
        server.ask_again(2, &mut out);
        server.ask_again(1, &mut out);
        assert!(out.is_empty(), "who answered, or asks itself, is not asked");
    }

    #[test]
    fn bits_follow_the_counts() {
        let mut local = LocalMap::default();
        local.get(5000);
        local.get(5000);
        assert!(!local.put(5000));
        assert!(local.is_open(5000));
        assert!(local.put(5000));
        assert!(!has_bit(&local.answer(&args(4)), 904));
    }
}

/// After a failover a new server may grant an upgrade on the strength of the old
/// mode it was told, while the cleanup for the old server still drops items: what
/// is written under the new grant must not be dropped with them.
#[test]
fn a_grant_during_a_cleanup_waits_for_its_end() {
    let scope = Scope::InodeGroup(0);
    let key = scope.range().start;
    let mut client = LockClient::new(Policy::default());
    let mut out = Vec::new();
    client.acquire(scope, Mode::Read, false, 1, &mut out);
    let read = net_lock(&key, 0, Mode::Null, Mode::Read);
    assert_eq!(client.grant(&read, &mut out), Granted::Applied);
    let id = client.id_of(scope).expect("a held lock");
    client.acquire(scope, Mode::Write, false, 2, &mut out);
    client.invalidate(7, &net_lock(&key, 0, Mode::Read, Mode::Null), &mut out);
    client.release(id, Mode::Read, 1, &mut out);
    assert!(out.contains(&ClientAction::Fits(scope)));
    assert!(client.lower(scope).is_some());
    out.clear();
    let write = net_lock(&key, 5, Mode::Read, Mode::Write);
    assert_eq!(client.grant(&write, &mut out), Granted::Kept);
    assert_eq!(out, [], "nobody writes beside the cleanup");
    let told = client.recover(&Key::ZEROS, 9);
    assert_eq!((told[0].new_mode, told[0].write_seq.get()), (2, 5));
    client.revoked(scope, &mut out);
    assert!(out.contains(&ClientAction::Admit(2)));
    assert_eq!(client.grant_of(id).0, Mode::Write);
}

/// What the server takes for granted, after a grant that was refused, is in the way of
/// the request that follows, and is taken back. Unless it goes along with what is asked:
/// then the next server helps, which hears what is really held.
#[test]
fn asking_again_helps_whatever_the_server_believes() {
    use Mode::{Null, Read, Write, WriteOnly};
    let scope = Scope::InodeGroup(0);
    let key = scope.range().start;
    let modes = [Null, Read, Write, WriteOnly];
    let all = |held| modes.map(|believed| modes.map(|wanted| (held, believed, wanted)));
    let cases = modes.map(all);
    let mut stubborn = Vec::new();
    for (held, believed, wanted) in cases.into_iter().flatten().flatten() {
        if held.satisfies(wanted) || wanted == Null {
            continue;
        }
        let mut seq = 10;
        let mut next_seq = || {
            seq += 1;
            seq
        };
        let serve = |told: &[NetLock], next_seq: &mut dyn FnMut() -> u64| {
            let mut server = LockServer::recovering([1]);
            server.recover(1, told).expect("recovered");
            server.recovered(1, next_seq, &mut Vec::new());
            server
        };
        let told = net_lock(&key, 0, believed, believed);
        let mut server = serve(&[told], &mut next_seq);
        let mut down = Vec::new();
        let mut client = LockClient::new(Policy::default());
        let mut up = Vec::new();
        if held != Null {
            client.acquire(scope, held, false, 1, &mut up);
            let grant = net_lock(&key, 1, Null, held);
            assert_eq!(client.grant(&grant, &mut up), Granted::Applied);
            let id = client.id_of(scope).expect("a held lock");
            client.release(id, held, 1, &mut up);
            up.clear();
        }
        client.acquire(scope, wanted, false, 2, &mut up);
        let asked = net_lock(&key, 0, held, wanted);
        let mut refused = 0;
        let mut admitted = false;
        while !up.is_empty() || !down.is_empty() {
            for action in std::mem::take(&mut up) {
                let taken = match action {
                    ClientAction::Request(msg) => {
                        server.request(1, 1, &msg, &mut next_seq, &mut down)
                    }
                    ClientAction::Respond(_, msg) => {
                        server.response(1, &msg, &mut next_seq, &mut down)
                    }
                    ClientAction::Prepare(scope) => {
                        assert!(client.lower(scope).is_some(), "nobody uses it");
                        client.revoked(scope, &mut up);
                        Ok(())
                    }
                    ClientAction::Admit(2) => {
                        admitted = true;
                        Ok(())
                    }
                    ClientAction::Admit(_) | ClientAction::Fits(_) => Ok(()),
                };
                assert_eq!(taken, Ok(()), "{held:?} {believed:?} {wanted:?}");
            }
            for action in std::mem::take(&mut down) {
                match action {
                    ServerAction::Invalidate { lock, .. } => client.invalidate(3, &lock, &mut up),
                    ServerAction::Grant { lock, .. } => {
                        if client.grant(&lock, &mut up) == Granted::NotAsked {
                            refused += 1;
                            assert!(refused < 4, "{held:?} {believed:?} {wanted:?}");
                            if refused == 3 {
                                stubborn.push((held, believed, wanted));
                                server = serve(&client.recover(&Key::ZEROS, 9), &mut next_seq);
                            }
                            up.push(ClientAction::Request(asked));
                        }
                    }
                }
            }
        }
        assert!(admitted, "{held:?} {believed:?} {wanted:?}");
    }
    let without_a_conflict = [
        (Read, WriteOnly, WriteOnly),
        (Write, WriteOnly, WriteOnly),
        (WriteOnly, Read, Read),
    ];
    assert_eq!(stubborn, without_a_conflict);
}

/// Such a grant is refused only when the cleanup has ended, and its request with it.
#[test]
fn a_kept_grant_that_is_refused_is_asked_for_again() {
    let scope = Scope::InodeGroup(0);
    let key = scope.range().start;
    let mut client = LockClient::new(Policy::default());
    let mut out = Vec::new();
    client.acquire(scope, Mode::Write, false, 1, &mut out);
    let write = net_lock(&key, 3, Mode::Null, Mode::Write);
    assert_eq!(client.grant(&write, &mut out), Granted::Applied);
    let id = client.id_of(scope).expect("a held lock");
    client.release(id, Mode::Write, 1, &mut out);
    client.invalidate(7, &net_lock(&key, 0, Mode::Write, Mode::Read), &mut out);
    assert!(client.lower(scope).is_some());
    client.acquire(scope, Mode::Write, false, 2, &mut out);
    // READ is kept, which the server takes for gone.
    assert_eq!(client.grant(&write, &mut out), Granted::Kept);
    out.clear();
    client.revoked(scope, &mut out);
    let request = net_lock(&key, 0, Mode::Read, Mode::Write);
    assert!(out.contains(&ClientAction::Request(request)), "{out:?}");
    let better = net_lock(&key, 4, Mode::Read, Mode::Write);
    assert_eq!(client.grant(&better, &mut out), Granted::Applied);
    assert!(out.contains(&ClientAction::Admit(2)));
}

#[test]
fn a_grant_that_nobody_asked_for_changes_nothing() {
    let scope = Scope::InodeGroup(0);
    let key = scope.range().start;
    let mut brain = LockClient::new(Policy::default());
    let mut out = Vec::new();
    let grant = |brain: &mut LockClient, old, new| {
        brain.grant(&net_lock(&key, 0, old, new), &mut Vec::new())
    };
    assert_eq!(grant(&mut brain, Mode::Null, Mode::Read), Granted::NotAsked);
    brain.acquire(scope, Mode::Read, false, 1, &mut out);
    // Another mode than was asked for, in a good message or in a bad one.
    assert_eq!(
        grant(&mut brain, Mode::Null, Mode::Write),
        Granted::NotAsked
    );
    assert_eq!(grant(&mut brain, Mode::Null, Mode::Read), Granted::Applied);
    assert_eq!(grant(&mut brain, Mode::Null, Mode::Read), Granted::NotAsked);
    brain.acquire(scope, Mode::Write, false, 2, &mut out);
    // Items may be cached under what is held: the server must know of it.
    assert_eq!(
        grant(&mut brain, Mode::Null, Mode::Write),
        Granted::NotAsked
    );
    assert_eq!(grant(&mut brain, Mode::Read, Mode::Write), Granted::Applied);
}

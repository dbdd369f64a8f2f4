//! Cluster locks, explored: the real [`LockServer`], [`LockClient`]s and
//! [`Recovery`] tracker, with the messages between them.
//!
//! Allowed to happen, in any order: a task asking for a lock in any of the modes
//! of the bounds, a task done with it, an idle lock given back, the cleanup of a
//! revocation ending late, requests and answers of a client overtaking each other,
//! the server dying and another one recovering from the clients, a client dying
//! and being fenced, before, during and after recovery. Messages of the server
//! reach a client in order (spec 10 section 4). Repeats and losses inside a
//! connection are the wire's affair (spec 08) and not part of this model; what a
//! failover loses is.
//! Bounded: tasks of each client, failovers, deaths, releases.

use super::{System, feed};
use outrider_core::format::{Key, NetLock};
use outrider_core::locks::client::{self, Acquired, Granted, LockClient, Token, WaiterId};
use outrider_core::locks::server::{self, List, LockServer};
use outrider_core::locks::{Mode, Policy, Scope};
use outrider_core::server::recovery::{Kind as RecoveryKind, Recovery};
use std::collections::{BTreeMap, VecDeque};
use std::hash::Hasher;
use zerocopy::IntoBytes;

/// The bounds of an exploration.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// What each client's tasks do: lock number and mode, in this order.
    pub tasks: Vec<Vec<(usize, Mode)>>,
    /// Server failovers in all.
    pub failovers: u8,
    /// Deaths of clients in all.
    pub deaths: u8,
    /// Voluntary releases of idle locks in all.
    pub releases: u8,
    /// Locks in one recovery message.
    pub batch: usize,
}

/// Clients and servers of small bounds.
pub struct Cluster {
    bounds: Bounds,
    scopes: Vec<Scope>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum ToServer {
    Request { id: u64, lock: Vec<u8> },
    Answer { lock: Vec<u8> },
    Recovered(Vec<Vec<u8>>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum ToClient {
    Grant { lock: Vec<u8> },
    Invalidate { lock: Vec<u8> },
    Recover { start: Vec<u8> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Task {
    Idle,
    Waiting,
    Holding,
    Done,
}

#[derive(Clone)]
struct Client {
    alive: bool,
    /// Greeted the present server.
    connected: bool,
    locks: LockClient,
    tasks: Vec<Task>,
    /// Requests sent and not answered, by lock, to be sent again elsewhere.
    pending: BTreeMap<usize, Vec<u8>>,
    /// Cleanups that run.
    revoking: Vec<usize>,
    /// Invalidations whose answer this server awaits; those of earlier ones are
    /// answered to nobody.
    tokens: Vec<Token>,
    next_token: Token,
    inbox: VecDeque<ToClient>,
}

#[derive(Clone)]
struct Server {
    locks: LockServer,
    recovery: Recovery,
    expired: bool,
    inbox: Vec<(usize, ToServer)>,
    /// Core seq.
    seq: u64,
}

/// Everything at one moment.
#[derive(Clone)]
pub struct State {
    clients: Vec<Client>,
    server: Server,
    /// Rids on the list of mounted clients.
    mounted: Vec<bool>,
    failovers: u8,
    deaths: u8,
    releases: u8,
}

/// Something that may happen; the first number is a client.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Happening {
    Ask {
        client: usize,
        task: usize,
    },
    Release {
        client: usize,
        task: usize,
    },
    GiveBackIdle(usize),
    CleanedUp {
        client: usize,
        lock: usize,
    },
    ClientReceives(usize),
    ServerReceives(usize),
    Failover,
    Greet(usize),
    /// The recovery timer ends.
    Expire,
    Die(usize),
    /// A dead or late client was fenced, and what it left is taken back.
    Reclaim(usize),
}

fn rid(client: usize) -> u64 {
    client as u64 + 1
}

fn bytes(lock: &NetLock) -> Vec<u8> {
    lock.as_bytes().to_vec()
}

fn lock_of(bytes: &[u8]) -> NetLock {
    zerocopy::FromBytes::read_from_bytes(bytes).expect("a lock message of our own")
}

/// What a client really may do: the mode before a cleanup that still runs.
fn actual(state: &client::LockState) -> Mode {
    state.invalidating.unwrap_or(state.mode)
}

fn compatible(a: Mode, b: Mode) -> bool {
    a == Mode::Null || b == Mode::Null || (a == b && a != Mode::Write)
}

fn rank(mode: Mode) -> u8 {
    match mode {
        Mode::Null => 0,
        Mode::Read => 1,
        Mode::Write => 2,
        Mode::WriteOnly => 1,
    }
}

impl Cluster {
    /// Fresh clients and a server that nobody has to tell anything.
    pub fn new(bounds: Bounds) -> Self {
        // Inode groups 0, 1, ...: any locks do, the brains treat all alike.
        let scopes = (0..2).map(|n| Scope::InodeGroup(n * 1024)).collect();
        Self { bounds, scopes }
    }

    fn lock_nr(&self, key: &Key) -> usize {
        let at = |scope: &Scope| scope.range().start == *key;
        self.scopes
            .iter()
            .position(at)
            .expect("a lock of the model")
    }

    fn waiter(&self, task: usize) -> WaiterId {
        task as WaiterId
    }

    fn client_actions(&self, state: &mut State, who: usize, out: Vec<client::Action>) {
        for action in out {
            let client = &mut state.clients[who];
            match action {
                client::Action::Request(lock) => {
                    let nr = self.lock_nr(&Key::from(lock.key));
                    client.pending.insert(nr, bytes(&lock));
                    if client.connected {
                        let (id, lock) = (nr as u64, bytes(&lock));
                        let request = ToServer::Request { id, lock };
                        state.server.inbox.push((who, request));
                    }
                }
                client::Action::Admit(waiter) => {
                    client.tasks[waiter as usize] = Task::Holding;
                }
                // There is no kernel here whose pages would have to come back first.
                client::Action::Prepare(scope) | client::Action::Fits(scope) => {
                    if client.locks.lower(scope).is_some() {
                        client.revoking.push(self.lock_nr(&scope.range().start));
                        client.revoking.sort_unstable();
                    }
                }
                client::Action::Respond(token, lock) => {
                    let known = client.tokens.iter().position(|t| *t == token);
                    if let Some(at) = known {
                        client.tokens.remove(at);
                        let lock = bytes(&lock);
                        state.server.inbox.push((who, ToServer::Answer { lock }));
                    }
                }
            }
        }
    }

    fn server_actions(&self, state: &mut State, out: Vec<server::Action>) -> Result<(), String> {
        for action in out {
            match action {
                server::Action::Grant { rid, lock, .. } => {
                    let mode = Mode::from_wire(lock.new_mode).expect("a mode of ours");
                    let key = Key::from(lock.key);
                    if mode.writes() {
                        self.check_write_seq(state, &key, lock.write_seq.get())?;
                    }
                    self.to_client(state, rid, ToClient::Grant { lock: bytes(&lock) });
                }
                server::Action::Invalidate { rid, lock } => {
                    let lock = bytes(&lock);
                    self.to_client(state, rid, ToClient::Invalidate { lock });
                }
            }
        }
        Ok(())
    }

    fn check_write_seq(&self, state: &State, key: &Key, seq: u64) -> Result<(), String> {
        for (who, client) in state.clients.iter().enumerate() {
            let held = client.locks.table();
            let older = held
                .iter()
                .filter(|lock| lock.scope.range().start == *key && actual(lock).writes());
            if client.alive && older.map(|lock| lock.write_seq).any(|held| held >= seq) {
                return Err(format!(
                    "write seq {seq} is not above that of client {who} (section 15, 5)"
                ));
            }
        }
        Ok(())
    }

    fn to_client(&self, state: &mut State, rid: u64, message: ToClient) {
        let client = &mut state.clients[rid as usize - 1];
        // Not connected: the send fails, and its fence and reclaim go on from there.
        if client.connected {
            client.inbox.push_back(message);
        }
    }

    fn client_receives(&self, state: &mut State, who: usize) -> Result<(), String> {
        let client = &mut state.clients[who];
        let mut out = Vec::new();
        match client.inbox.pop_front().expect("a message") {
            ToClient::Grant { lock } => {
                let lock = lock_of(&lock);
                let nr = self.lock_nr(&Key::from(lock.key));
                let old = Mode::from_wire(lock.old_mode).expect("a mode");
                let new = Mode::from_wire(lock.new_mode).expect("a mode");
                let held = self.mode_of(client, nr);
                // More than it has is possible: the client may have finished an older
                // revocation after it told the new server (section 16.4).
                if rank(held) > rank(old) {
                    return Err(format!(
                        "grant says client {who} had {old:?} of lock {nr}, it has {held:?}"
                    ));
                }
                client.pending.remove(&nr);
                if client.locks.grant(&lock, &mut out) == Granted::NotAsked {
                    return Err(format!(
                        "client {who} is granted {new:?} that it did not ask for"
                    ));
                }
            }
            ToClient::Invalidate { lock } => {
                let token = client.next_token;
                client.next_token += 1;
                client.tokens.push(token);
                client.locks.invalidate(token, &lock_of(&lock), &mut out);
            }
            ToClient::Recover { start } => {
                let start = Key::from_bytes(start.as_slice().try_into().expect("a key"));
                let held = client.locks.recover(&start, self.bounds.batch);
                let held = held.iter().map(bytes).collect();
                state.server.inbox.push((who, ToServer::Recovered(held)));
            }
        }
        self.client_actions(state, who, out);
        Ok(())
    }

    fn mode_of(&self, client: &Client, nr: usize) -> Mode {
        let table = client.locks.table();
        let lock = table.iter().find(|lock| lock.scope == self.scopes[nr]);
        lock.map_or(Mode::Null, actual)
    }

    fn server_receives(&self, state: &mut State, at: usize) -> Result<(), String> {
        let (who, message) = state.server.inbox.remove(at);
        let server = &mut state.server;
        let mut out = Vec::new();
        let seq = &mut server.seq;
        let mut next_seq = || {
            *seq += 1;
            *seq
        };
        match message {
            ToServer::Request { id, lock } => server
                .locks
                .request(rid(who), id, &lock_of(&lock), &mut next_seq, &mut out)
                .map_err(|e| e.to_string())?,
            ToServer::Answer { lock } => server
                .locks
                .response(rid(who), &lock_of(&lock), &mut next_seq, &mut out)
                .map_err(|e| e.to_string())?,
            ToServer::Recovered(batch) => {
                let batch: Vec<NetLock> = batch.iter().map(|b| lock_of(b)).collect();
                let told = server.locks.recover(rid(who), &batch);
                let (greatest, all) = told.map_err(|e| e.to_string())?;
                server.seq = server.seq.max(greatest);
                if all {
                    server.recovery.locks_told(rid(who));
                    let seq = &mut server.seq;
                    let mut next_seq = || {
                        *seq += 1;
                        *seq
                    };
                    server.locks.recovered(rid(who), &mut next_seq, &mut out);
                } else {
                    self.ask_recovery(state, who);
                }
            }
        }
        self.server_actions(state, out)
    }

    fn ask_recovery(&self, state: &mut State, who: usize) {
        if let Some(start) = state.server.locks.recovery_cursor(rid(who)) {
            let start = start.to_bytes().to_vec();
            self.to_client(state, rid(who), ToClient::Recover { start });
        }
    }

    fn greet(&self, state: &mut State, who: usize) {
        let client = &mut state.clients[who];
        client.connected = true;
        for (nr, lock) in &client.pending {
            let (id, lock) = (*nr as u64, lock.clone());
            let request = ToServer::Request { id, lock };
            state.server.inbox.push((who, request));
        }
        if !state.mounted[who] {
            state.mounted[who] = true;
        }
        state.server.recovery.greeted(rid(who));
        if state
            .server
            .recovery
            .is_pending(rid(who), RecoveryKind::Locks)
        {
            self.ask_recovery(state, who);
        }
    }

    fn failover(&self, state: &mut State) {
        state.failovers += 1;
        for client in &mut state.clients {
            client.connected = false;
            client.inbox.clear();
            client.tokens.clear();
        }
        let mounted = (0..state.mounted.len()).filter(|who| state.mounted[*who]);
        let rids: Vec<u64> = mounted.map(rid).collect();
        state.server = Server {
            locks: LockServer::recovering(rids.iter().copied()),
            recovery: Recovery::prepare(rids),
            expired: false,
            inbox: Vec::new(),
            seq: 0,
        };
    }

    /// Whether the server may have this client fenced now.
    fn may_reclaim(&self, state: &State, who: usize) -> bool {
        let late = state.server.expired
            && (state
                .server
                .recovery
                .is_pending(rid(who), RecoveryKind::Locks)
                || state
                    .server
                    .recovery
                    .is_pending(rid(who), RecoveryKind::Greeting));
        let recovering = state
            .server
            .recovery
            .is_pending(rid(who), RecoveryKind::Greeting);
        state.mounted[who] && (late || (!state.clients[who].alive && !recovering))
    }

    fn reclaim(&self, state: &mut State, who: usize) -> Result<(), String> {
        // Fenced: it does nothing any more, whatever it believes.
        kill(&mut state.clients[who]);
        state.server.inbox.retain(|(from, _)| *from != who);
        let server = &mut state.server;
        let mut out = Vec::new();
        let seq = &mut server.seq;
        let mut next_seq = || {
            *seq += 1;
            *seq
        };
        server
            .locks
            .remove_client(rid(who), &mut next_seq, &mut out);
        server.recovery.gone(rid(who));
        server.locks.recovered(rid(who), &mut next_seq, &mut out);
        state.mounted[who] = false;
        self.server_actions(state, out)
    }

    fn blank_client(&self, tasks: usize) -> Client {
        Client {
            alive: true,
            connected: false,
            locks: LockClient::new(Policy::default()),
            tasks: vec![Task::Idle; tasks],
            pending: BTreeMap::new(),
            revoking: Vec::new(),
            tokens: Vec::new(),
            next_token: 0,
            inbox: VecDeque::new(),
        }
    }
}

fn kill(client: &mut Client) {
    client.alive = false;
    client.connected = false;
    client.inbox.clear();
    client.pending.clear();
    client.revoking.clear();
    client.tokens.clear();
}

impl System for Cluster {
    type State = State;
    type Event = Happening;

    fn initial(&self) -> State {
        let tasks = self.bounds.tasks.iter().map(Vec::len);
        let clients: Vec<Client> = tasks.map(|n| self.blank_client(n)).collect();
        let mut state = State {
            mounted: vec![false; clients.len()],
            server: Server {
                locks: LockServer::default(),
                recovery: Recovery::default(),
                expired: false,
                inbox: Vec::new(),
                seq: 0,
            },
            clients,
            failovers: 0,
            deaths: 0,
            releases: 0,
        };
        for who in 0..state.clients.len() {
            self.greet(&mut state, who);
        }
        state
    }

    fn events(&self, state: &State) -> Vec<Happening> {
        let mut out = Vec::new();
        for (client, c) in state.clients.iter().enumerate() {
            if self.may_reclaim(state, client) {
                out.push(Happening::Reclaim(client));
            }
            if !c.alive {
                continue;
            }
            for (task, at) in c.tasks.iter().enumerate() {
                match at {
                    Task::Idle => out.push(Happening::Ask { client, task }),
                    Task::Holding => out.push(Happening::Release { client, task }),
                    Task::Waiting | Task::Done => {}
                }
            }
            let idle = |l: &client::LockState| l.mode != Mode::Null && l.waiters == 0;
            if state.releases < self.bounds.releases && c.locks.table().iter().any(idle) {
                out.push(Happening::GiveBackIdle(client));
            }
            for lock in &c.revoking {
                let lock = *lock;
                out.push(Happening::CleanedUp { client, lock });
            }
            if !c.inbox.is_empty() {
                out.push(Happening::ClientReceives(client));
            }
            if !c.connected {
                out.push(Happening::Greet(client));
            }
            if state.deaths < self.bounds.deaths {
                out.push(Happening::Die(client));
            }
        }
        for at in 0..state.server.inbox.len() {
            out.push(Happening::ServerReceives(at));
        }
        if state.failovers < self.bounds.failovers {
            out.push(Happening::Failover);
        }
        // Late clients are fenced whether they live or not; with all well connected
        // the timer never matters.
        if !state.server.recovery.is_finished() && !state.server.expired {
            out.push(Happening::Expire);
        }
        out
    }

    fn apply(&self, state: &State, event: &Happening) -> Result<State, String> {
        let mut next = state.clone();
        let mut out = Vec::new();
        match *event {
            Happening::Ask { client, task } => {
                let (lock, mode) = self.bounds.tasks[client][task];
                let c = &mut next.clients[client];
                let scope = self.scopes[lock];
                let waiter = self.waiter(task);
                let got = c.locks.acquire(scope, mode, true, waiter, &mut out);
                c.tasks[task] = match got {
                    Acquired::Now(_) => Task::Holding,
                    Acquired::Wait => Task::Waiting,
                };
                self.client_actions(&mut next, client, out);
            }
            Happening::Release { client, task } => {
                let (lock, mode) = self.bounds.tasks[client][task];
                let c = &mut next.clients[client];
                let id = c.locks.id_of(self.scopes[lock]).expect("a held lock");
                c.locks.release(id, mode, 1, &mut out);
                c.tasks[task] = Task::Done;
                self.client_actions(&mut next, client, out);
            }
            Happening::GiveBackIdle(client) => {
                next.releases += 1;
                next.clients[client].locks.purge_idle(&mut out);
                self.client_actions(&mut next, client, out);
            }
            Happening::CleanedUp { client, lock } => {
                let c = &mut next.clients[client];
                c.revoking.retain(|nr| *nr != lock);
                c.locks.revoked(self.scopes[lock], &mut out);
                self.client_actions(&mut next, client, out);
            }
            Happening::ClientReceives(client) => self.client_receives(&mut next, client)?,
            Happening::ServerReceives(at) => self.server_receives(&mut next, at)?,
            Happening::Failover => self.failover(&mut next),
            Happening::Greet(client) => self.greet(&mut next, client),
            Happening::Expire => {
                next.server.expired = true;
                next.server.recovery.expire();
            }
            Happening::Die(client) => {
                next.deaths += 1;
                kill(&mut next.clients[client]);
            }
            Happening::Reclaim(client) => self.reclaim(&mut next, client)?,
        }
        // In any order: the order of arrival must not tell states apart.
        next.server
            .inbox
            .sort_by_key(|message| format!("{message:?}"));
        Ok(next)
    }

    fn check(&self, state: &State, last: bool) -> Result<(), String> {
        for (nr, scope) in self.scopes.iter().enumerate() {
            // A dead client that was not reclaimed may still have writes on their way.
            let modes: Vec<(usize, Mode)> = (0..state.clients.len())
                .filter(|who| state.mounted[*who])
                .map(|who| {
                    let table = state.clients[who].locks.table();
                    let lock = table.iter().find(|lock| lock.scope == *scope);
                    (who, lock.map_or(Mode::Null, actual))
                })
                .collect();
            for (a, first) in &modes {
                for (b, second) in &modes {
                    if a < b && !compatible(*first, *second) {
                        return Err(format!(
                            "lock {nr}: client {a} has {first:?}, client {b} {second:?} (section 15, 1)"
                        ));
                    }
                }
            }
            self.check_table(state, nr, &modes)?;
        }
        let strangers = state.server.locks.clients();
        if let Some(rid) = strangers
            .iter()
            .find(|rid| !state.mounted[**rid as usize - 1])
        {
            return Err(format!(
                "the table names client {rid}, which is not mounted (9)"
            ));
        }
        for (who, client) in state.clients.iter().enumerate() {
            // What a user changes while the cleanup drops the items would be lost.
            let harmed = |l: &client::LockState| {
                l.invalidating.is_some() && l.users[Mode::Write as usize] > 0
            };
            if client.alive && client.locks.table().iter().any(harmed) {
                return Err(format!("client {who} writes under a lock it cleans up"));
            }
        }
        if last {
            self.check_end(state)?;
        }
        Ok(())
    }

    fn hash(&self, state: &State, hasher: &mut dyn Hasher) {
        for client in &state.clients {
            feed(&(client.alive, client.connected), hasher);
            feed(&format!("{:?}", client.locks), hasher);
            feed(&client.tasks, hasher);
            feed(&client.pending, hasher);
            feed(&client.revoking, hasher);
            // Tokens only name; what counts is which of the queue are answered.
            feed(&(&client.tokens, client.next_token), hasher);
            feed(&client.inbox, hasher);
        }
        feed(&format!("{:?}", state.server.locks), hasher);
        feed(&format!("{:?}", state.server.recovery), hasher);
        feed(&(state.server.expired, state.server.seq), hasher);
        feed(&state.server.inbox, hasher);
        feed(&state.mounted, hasher);
        feed(&(state.failovers, state.deaths, state.releases), hasher);
    }
}

impl Cluster {
    /// The server's entry of a client is at least what the client has, unless its
    /// answer or its recovery is still on the way (section 15, 2).
    fn check_table(&self, state: &State, nr: usize, modes: &[(usize, Mode)]) -> Result<(), String> {
        if !state.server.recovery.is_finished() {
            return Ok(());
        }
        let key = self.scopes[nr].range().start;
        for (who, mode) in modes {
            let recorded = state
                .server
                .locks
                .table()
                .filter(|e| e.key == key && e.rid == rid(*who))
                .map(|e| match e.list {
                    List::Granted => rank(e.mode),
                    // Asked to give up: may have anything until it answers.
                    List::Invalidated => u8::MAX,
                    List::Requested => 0,
                })
                .max()
                .unwrap_or(0);
            if rank(*mode) > recorded {
                return Err(format!(
                    "client {who} has {mode:?} of lock {nr}, the server records less (section 15, 2)"
                ));
            }
        }
        Ok(())
    }

    /// Nothing more happens: then nobody may wait.
    fn check_end(&self, state: &State) -> Result<(), String> {
        for (who, client) in state.clients.iter().enumerate() {
            if client.alive && client.tasks.iter().any(|t| *t != Task::Done) {
                return Err(format!(
                    "client {who} waits for ever: tasks {:?} (section 15, 8)",
                    client.tasks
                ));
            }
        }
        Ok(())
    }
}

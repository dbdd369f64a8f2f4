//! Clients as they come, ask and go: greetings, requests by command, answers to
//! our own requests (spec 08 sections 4, 7 and 8).
//!
//! Locks and open inode maps are handled in place, in the order of arrival;
//! everything else is a task of its own, so that nothing waits behind a commit.
//!
//! What can go wrong: serving a mount that is being reclaimed, or was. Its
//! requests are dropped, and it can not greet again after a fence.

use super::actor::Server;
use super::error::{Result, ServerError};
use super::recovery::{Kind, Outcome};
use super::{FenceReason, FenceRequest};
use crate::env::{LocalBoxFuture, NetError, probe};
use crate::errno::Errno;
use crate::format::{
    DiskKey, Key, LogMergeComplete, LogTrees, NET_LOCK_MAX_RECOVER_NR, NetCmd, NetLock,
    NetLockRecover, NetResizeDevices, OpenInoMap, OpenInoMapArgs, SrchCompact, VolumeOptions,
};
use crate::locks::omap;
use crate::locks::server as locks;
use crate::wire::listener::{GreetingInfo, Origin, ServerHooks};
use bytes::Bytes;
use std::net::SocketAddrV4;
use std::rc::Rc;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The server as its connections see it.
pub(super) struct Hooks(pub(super) Rc<Server>);

/// Bytes of a structure.
fn bytes<T: IntoBytes + Immutable>(value: &T) -> Bytes {
    Bytes::copy_from_slice(value.as_bytes())
}

/// A payload of exactly this structure.
fn exactly<T: FromBytes>(payload: &[u8]) -> Result<T> {
    T::read_from_bytes(payload).map_err(|_| ServerError::Refused(Errno::EINVAL))
}

/// A payload that must be empty.
fn nothing(payload: &[u8]) -> Result<()> {
    if payload.is_empty() {
        Ok(())
    } else {
        Err(ServerError::Refused(Errno::EINVAL))
    }
}

impl ServerHooks for Hooks {
    fn greet(&self, greeting: GreetingInfo) -> LocalBoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async move {
            let result = self.0.greet(greeting).await;
            result.map_err(|err| {
                tracing::info!(rid = format_args!("{:016x}", greeting.rid), %err, "greeting refused");
                if err.is_fatal() {
                    self.0.fail(err.clone());
                }
                err.errno()
            })
        })
    }

    fn attached(&self, rid: u64) {
        self.0.clients.borrow_mut().insert(rid);
        self.0.count_clients();
        self.0.ask_for_locks(rid);
        self.0.greeted(rid);
    }

    fn gone(&self, rid: u64) {
        self.0.clients.borrow_mut().remove(&rid);
        self.0.count_clients();
        self.0.farewells.forget(rid);
        self.0
            .origins
            .borrow_mut()
            .retain(|(who, _), _| *who != rid);
    }

    fn request(&self, origin: Origin, payload: Bytes) {
        self.0.dispatch(origin, payload);
    }

    fn response(
        &self,
        rid: u64,
        _id: u64,
        cmd: NetCmd,
        body: std::result::Result<Bytes, Errno>,
    ) -> std::result::Result<(), Errno> {
        self.0.answered(rid, cmd, body)
    }

    fn reconnect_timeout(&self, rid: u64, last_peer: SocketAddrV4) {
        let server = self.0.clone();
        self.0.spawn("server_reconnect_timeout", async move {
            server.fence_absent(rid, last_peer).await;
        });
    }

    fn listener_failed(&self, error: NetError) {
        self.0.fail(ServerError::from(error).fatal());
    }
}

impl Server {
    /// Decides about a greeting. The client is on the open map's list here, before it
    /// is no longer waited for ([`Server::greeted`]): nobody may be told about open
    /// inodes without it.
    async fn greet(self: &Rc<Self>, greeting: GreetingInfo) -> Result<()> {
        let rid = greeting.rid;
        let refuse = || Err(ServerError::NotMounted { rid });
        if self.fenced.borrow().contains(&rid) {
            probe("server.greeting.after_fence");
            return refuse();
        }
        if greeting.client_term == 0 {
            if self.departed.borrow().contains(&rid) {
                return refuse();
            }
            self.store
                .insert_mounted(rid, greeting.peer, greeting.quorum)
                .await?;
        } else if !greeting.farewell && !self.store.is_mounted(rid).await? {
            probe("server.greeting.reclaimed_mount");
            return refuse();
        }
        if greeting.first_contact && !self.departed.borrow().contains(&rid) {
            self.omap.borrow_mut().add_client(rid);
        }
        self.farewells.kick();
        Ok(())
    }

    /// A client can be asked now, so it is no longer waited for. Not earlier: the
    /// last one to greet would miss the questions that waited for it.
    fn greeted(&self, rid: u64) {
        let mut actions = Vec::new();
        self.omap.borrow().ask_again(rid, &mut actions);
        self.send_omap(actions);
        let outcomes = self.recovery.borrow_mut().greeted(rid);
        self.recovered(outcomes);
    }

    fn count_clients(&self) {
        self.store.set_clients(self.clients.borrow().len() as u64);
    }

    /// A client stayed away too long: it is fenced, unless it left cleanly and only
    /// the last answer did not reach it.
    async fn fence_absent(self: Rc<Self>, rid: u64, addr: SocketAddrV4) {
        match self.store.is_mounted(rid).await {
            Ok(true) if !self.departed.borrow().contains(&rid) => {
                let reason = FenceReason::ClientReconnect;
                self.fences.start(FenceRequest { rid, addr, reason });
            }
            Ok(_) => probe("server.reconnect_timeout.left_already"),
            Err(err) => self.fail(err.fatal()),
        }
    }

    fn break_connection(&self, rid: u64) {
        if let Some(peers) = self.peers() {
            peers.break_connection(rid);
        }
    }

    fn dispatch(self: &Rc<Self>, origin: Origin, payload: Bytes) {
        if self.departed.borrow().contains(&origin.rid) && origin.cmd != NetCmd::Farewell {
            probe("server.request.departed");
            return;
        }
        let broken = match origin.cmd {
            NetCmd::Lock => self.lock_requested(origin, &payload).is_err(),
            NetCmd::OpenInoMap => self.map_requested(origin, &payload),
            NetCmd::Farewell if payload.is_empty() => {
                self.farewells.push(origin);
                false
            }
            NetCmd::GetLogMerge if !payload.is_empty() => true,
            NetCmd::CommitLogMerge if payload.len() != size_of::<LogMergeComplete>() => true,
            NetCmd::Farewell | NetCmd::Greeting | NetCmd::SyncLogTrees | NetCmd::LockRecover => {
                true
            }
            _ => {
                let server = self.clone();
                self.spawn("server_request", async move {
                    server.serve(origin, payload).await
                });
                false
            }
        };
        if broken {
            probe("server.request.protocol_error");
            self.break_connection(origin.rid);
        }
    }

    /// Runs one request that may wait, and answers it.
    async fn serve(self: Rc<Self>, origin: Origin, payload: Bytes) {
        let result = self.execute(origin, &payload).await;
        if let Err(err) = &result {
            if err.is_fatal() {
                self.fail(err.clone());
            }
            if err.is_silent() {
                return;
            }
        }
        let Some(peers) = self.peers() else { return };
        // A client that is not there asks the next server, or is gone.
        let _ = peers.respond(&origin, result.map_err(|err| err.errno()));
    }

    async fn execute(self: &Rc<Self>, origin: Origin, payload: &[u8]) -> Result<Bytes> {
        let (rid, store) = (origin.rid, &self.store);
        match origin.cmd {
            NetCmd::AllocInodes => {
                let count = exactly::<U64>(payload)?.get();
                Ok(bytes(&store.alloc_inodes(count).await?))
            }
            NetCmd::GetLogTrees => {
                nothing(payload)?;
                self.wait_for_locks_of(rid).await?;
                Ok(bytes(&store.get_log_trees(rid).await?))
            }
            NetCmd::CommitLogTrees => {
                let log: LogTrees = exactly(payload)?;
                store
                    .commit_log_trees(rid, log)
                    .await
                    .map(|()| Bytes::new())
            }
            NetCmd::GetRoots => {
                nothing(payload)?;
                Ok(bytes(&store.roots()))
            }
            NetCmd::GetLastSeq => {
                nothing(payload)?;
                Ok(bytes(&U64::new(store.last_seq().await?)))
            }
            NetCmd::SrchGetCompact => {
                nothing(payload)?;
                Ok(bytes(&SrchCompact::default()))
            }
            NetCmd::SrchCommitCompact => {
                exactly::<SrchCompact>(payload)?;
                Err(ServerError::Refused(Errno::ENOENT))
            }
            NetCmd::GetLogMerge => Ok(bytes(&store.get_log_merge(rid).await?)),
            NetCmd::CommitLogMerge => {
                let comp: LogMergeComplete = exactly(payload)?;
                store
                    .commit_log_merge(rid, comp)
                    .await
                    .map(|()| Bytes::new())
            }
            NetCmd::GetVolopt => {
                nothing(payload)?;
                Ok(bytes(&store.volopt()))
            }
            NetCmd::SetVolopt => {
                let wanted: VolumeOptions = exactly(payload)?;
                store.set_volopt(wanted).await.map(|()| Bytes::new())
            }
            NetCmd::ClearVolopt => {
                let unwanted: VolumeOptions = exactly(payload)?;
                store.clear_volopt(unwanted).await.map(|()| Bytes::new())
            }
            NetCmd::ResizeDevices => {
                let wanted: NetResizeDevices = exactly(payload)?;
                store.resize(wanted).await.map(|()| Bytes::new())
            }
            NetCmd::Statfs => {
                nothing(payload)?;
                Ok(bytes(&store.statfs().await?))
            }
            NetCmd::Greeting
            | NetCmd::SyncLogTrees
            | NetCmd::Lock
            | NetCmd::LockRecover
            | NetCmd::OpenInoMap
            | NetCmd::Farewell => unreachable!("{:?} is not served by a task", origin.cmd),
        }
    }

    /// A client's next transaction waits until its locks are known: the seqs of the
    /// transaction must be above the write seqs of locks it holds (spec 04 H5).
    async fn wait_for_locks_of(&self, rid: u64) -> Result<()> {
        self.recovery_changed
            .wait_for(|| {
                if self.stopping.is_open() {
                    return Some(Err(ServerError::Stopping));
                }
                (!self.recovery.borrow().is_pending(rid, Kind::Locks)).then_some(Ok(()))
            })
            .await
    }

    /// Asks a client to commit its transaction soon.
    pub(super) fn ask_to_commit(&self, rid: u64) {
        if let Some(peers) = self.peers() {
            // Not connected: it commits in time, or is fenced.
            let _ = peers.request(rid, NetCmd::SyncLogTrees, Bytes::new());
        }
    }

    fn answered(
        self: &Rc<Self>,
        rid: u64,
        cmd: NetCmd,
        body: std::result::Result<Bytes, Errno>,
    ) -> std::result::Result<(), Errno> {
        if self.departed.borrow().contains(&rid) {
            return Ok(());
        }
        match cmd {
            // A hint; nothing depends on the answer.
            NetCmd::SyncLogTrees => Ok(()),
            NetCmd::Lock => self.invalidated(rid, &body?),
            NetCmd::LockRecover => self.told_locks(rid, &body?),
            NetCmd::OpenInoMap => {
                let map = OpenInoMap::read_from_bytes(&body?).map_err(|_| Errno::EINVAL)?;
                let mut actions = Vec::new();
                self.omap.borrow_mut().response(rid, &map, &mut actions);
                self.send_omap(actions);
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }

    // Locks.

    fn lock_requested(&self, origin: Origin, payload: &[u8]) -> std::result::Result<(), Errno> {
        let msg = NetLock::read_from_bytes(payload).map_err(|_| Errno::EINVAL)?;
        self.origins
            .borrow_mut()
            .insert((origin.rid, origin.id), origin);
        self.with_locks(|locks, next_seq, out| {
            locks.request(origin.rid, origin.id, &msg, next_seq, out)
        })
    }

    fn invalidated(&self, rid: u64, body: &[u8]) -> std::result::Result<(), Errno> {
        let msg = NetLock::read_from_bytes(body).map_err(|_| Errno::EINVAL)?;
        self.with_locks(|locks, next_seq, out| locks.response(rid, &msg, next_seq, out))
    }

    /// Runs one step of the lock server and sends what follows.
    fn with_locks(
        &self,
        step: impl FnOnce(
            &mut locks::LockServer,
            &mut dyn FnMut() -> u64,
            &mut Vec<locks::Action>,
        ) -> std::result::Result<(), locks::LockProtocolError>,
    ) -> std::result::Result<(), Errno> {
        let mut actions = Vec::new();
        let mut next_seq = || self.store.next_seq();
        let result = step(&mut self.locks.borrow_mut(), &mut next_seq, &mut actions);
        self.send_locks(actions);
        result.map_err(|err| {
            tracing::warn!(%err, "lock protocol");
            Errno::EINVAL
        })
    }

    fn send_locks(&self, actions: Vec<locks::Action>) {
        let Some(peers) = self.peers() else { return };
        for action in actions {
            // Who is not connected is waited for until it returns or is fenced.
            match action {
                locks::Action::Grant { rid, id, lock } => {
                    let origin = self.origins.borrow_mut().remove(&(rid, id));
                    if let Some(origin) = origin {
                        let _ = peers.respond(&origin, Ok(bytes(&lock)));
                    }
                }
                locks::Action::Invalidate { rid, lock } => {
                    let _ = peers.request(rid, NetCmd::Lock, bytes(&lock));
                }
            }
        }
    }

    /// Forgets the locks of a mount that is gone; others may get them now.
    pub(super) fn forget_locks(&self, rid: u64) {
        let _infallible = self.with_locks(|locks, next_seq, out| {
            locks.remove_client(rid, next_seq, out);
            Ok(())
        });
    }

    /// Sends the next LOCK_RECOVER to a client whose locks are awaited.
    fn ask_for_locks(&self, rid: u64) {
        let cursor = self.locks.borrow().recovery_cursor(rid);
        if let (Some(key), Some(peers)) = (cursor, self.peers()) {
            let key: DiskKey = Key::into(key);
            let _ = peers.request(rid, NetCmd::LockRecover, bytes(&key));
        }
    }

    fn told_locks(&self, rid: u64, body: &[u8]) -> std::result::Result<(), Errno> {
        let batch = parse_lock_recover(body).ok_or(Errno::EINVAL)?;
        let recovered = self.locks.borrow_mut().recover(rid, &batch);
        let (write_seq, done) = recovered.map_err(|err| {
            tracing::warn!(%err, "lock recovery");
            Errno::EINVAL
        })?;
        self.store.raise_core_seq(write_seq);
        if !done {
            self.ask_for_locks(rid);
            return Ok(());
        }
        let outcomes = self.recovery.borrow_mut().locks_told(rid);
        self.locks_told(rid);
        self.recovered(outcomes);
        Ok(())
    }

    /// No locks of this client are awaited any more.
    pub(super) fn locks_told(&self, rid: u64) {
        let _infallible = self.with_locks(|locks, next_seq, out| {
            locks.recovered(rid, next_seq, out);
            Ok(())
        });
    }

    // Open inode maps.

    /// True if the connection is to be broken.
    fn map_requested(&self, origin: Origin, payload: &[u8]) -> bool {
        let Ok(args) = OpenInoMapArgs::read_from_bytes(payload) else {
            if let Some(peers) = self.peers() {
                let _ = peers.respond(&origin, Err(Errno::EINVAL));
            }
            return false;
        };
        self.origins
            .borrow_mut()
            .insert((origin.rid, origin.id), origin);
        let mut actions = Vec::new();
        self.omap
            .borrow_mut()
            .request(origin.rid, origin.id, &args, &mut actions);
        self.send_omap(actions);
        false
    }

    pub(super) fn send_omap(&self, actions: Vec<omap::Action>) {
        let Some(peers) = self.peers() else { return };
        for action in actions {
            match action {
                omap::Action::Ask { rid, args } => {
                    let _ = peers.request(rid, NetCmd::OpenInoMap, bytes(&args));
                }
                omap::Action::Answer { rid, id, map } => {
                    let origin = self.origins.borrow_mut().remove(&(rid, id));
                    if let Some(origin) = origin {
                        let _ = peers.respond(&origin, Ok(bytes(&map)));
                    }
                }
            }
        }
    }

    /// What follows when something is no longer awaited.
    pub(super) fn recovered(&self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::AllGreeted => {
                    let mut actions = Vec::new();
                    self.omap.borrow_mut().recovered(&mut actions);
                    self.send_omap(actions);
                    self.farewells.kick();
                }
                Outcome::LocksFinished(_) => self.farewells.kick(),
                Outcome::AllRecovered => self.all_recovered.open(),
            }
        }
        self.recovery_changed.wake_all();
    }
}

/// The locks in a LOCK_RECOVER response; `None` if it is malformed.
fn parse_lock_recover(body: &[u8]) -> Option<Vec<NetLock>> {
    let (head, rest) = NetLockRecover::read_from_prefix(body).ok()?;
    let nr = usize::from(head.nr.get());
    if nr > NET_LOCK_MAX_RECOVER_NR || rest.len() != nr * size_of::<NetLock>() {
        return None;
    }
    let locks = <[NetLock]>::ref_from_bytes(rest).ok()?;
    Some(locks.to_vec())
}

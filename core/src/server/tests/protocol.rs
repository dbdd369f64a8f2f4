//! Greetings, recovery, farewells and fences, with clients that only count what
//! they are sent.

use super::{FSID, addr, block_policy, open, volume, volume_of};
use crate::env::testing::TestWorld;
use crate::env::{Duration, Env, LocalBoxFuture};
use crate::errno::Errno;
use crate::format::*;
use crate::server::actor::Server;
use crate::server::fence::Fences;
use crate::server::hooks::Hooks;
use crate::server::{
    FenceAgent, FenceError, FenceReason, FenceRequest, Peers, Policy, ServerConfig,
};
use crate::wire::listener::{GreetingInfo, NotConnected, Origin, ServerHooks};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use zerocopy::{FromBytes, IntoBytes};

const TERM: u64 = 7;

/// Fences everybody after a second, or fails.
#[derive(Default)]
pub(super) struct Agent {
    asked: Mutex<Vec<FenceRequest>>,
    fails: bool,
    /// These are provably gone.
    pub(super) gone: Mutex<BTreeSet<u64>>,
    proves: bool,
}

impl Agent {
    /// What it was asked so far.
    pub(super) fn asked(&self) -> Vec<FenceRequest> {
        self.asked.lock().unwrap().clone()
    }
}

impl FenceAgent for Agent {
    fn fence(
        &self,
        env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        self.asked.lock().unwrap().push(request);
        let (fails, wait) = (self.fails, env.sleep(Duration::from_secs(1)));
        Box::pin(async move {
            wait.await;
            let err = FenceError::Failed {
                rid: request.rid,
                detail: "out of order".into(),
            };
            if fails { Err(err) } else { Ok(()) }
        })
    }

    fn can_prove(&self) -> bool {
        self.proves
    }

    fn is_gone(&self, rid: u64) -> bool {
        self.gone.lock().unwrap().contains(&rid)
    }
}

/// What clients were sent.
#[derive(Default)]
struct Wire {
    connected: RefCell<BTreeSet<u64>>,
    answers: RefCell<Vec<(Origin, Result<Bytes, Errno>)>>,
    requests: RefCell<Vec<(u64, NetCmd, Bytes)>>,
    broken: RefCell<Vec<u64>>,
    ids: Cell<u64>,
    /// Called with each answer.
    watch: RefCell<Option<Watch>>,
}

type Watch = Rc<dyn Fn(&Origin)>;

impl Peers for Wire {
    fn respond(&self, to: &Origin, body: Result<Bytes, Errno>) -> Result<(), NotConnected> {
        if !self.connected.borrow().contains(&to.rid) {
            return Err(NotConnected { rid: to.rid });
        }
        if let Some(watch) = &*self.watch.borrow() {
            watch(to);
        }
        self.answers.borrow_mut().push((*to, body));
        Ok(())
    }
    fn request(&self, rid: u64, cmd: NetCmd, payload: Bytes) -> Result<u64, NotConnected> {
        if !self.connected.borrow().contains(&rid) {
            return Err(NotConnected { rid });
        }
        self.requests.borrow_mut().push((rid, cmd, payload));
        Ok(1)
    }
    fn is_connected(&self, rid: u64) -> bool {
        self.connected.borrow().contains(&rid)
    }
    fn break_connection(&self, rid: u64) {
        self.broken.borrow_mut().push(rid);
    }
    fn drop_client(&self, rid: u64) {
        self.connected.borrow_mut().remove(&rid);
    }
    fn shutdown(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

struct Instance {
    server: Rc<Server>,
    wire: Rc<Wire>,
    agent: Arc<Agent>,
    hooks: Hooks,
}

impl Instance {
    async fn start(world: &TestWorld, fails: bool) -> Self {
        let store = open(world).await;
        let mounted: Vec<u64> = store
            .mounted()
            .await
            .unwrap()
            .iter()
            .map(|(rid, _)| *rid)
            .collect();
        let agent = Arc::new(Agent {
            fails,
            proves: true,
            ..Agent::default()
        });
        let config = ServerConfig {
            fsid: FSID,
            rid: 1000,
            term: TERM,
            addr: addr(19700),
            policy: Policy::default(),
            block_policy: block_policy(),
            fence: agent.clone(),
            cluster_key: None,
            reports: crate::server::ReportBoard::default(),
        };
        let env = world.env();
        let fences = Fences::new(&env, agent.clone(), config.policy.fence_timeout);
        let server = Server::new(&env, config, store, fences, &mounted);
        let wire = Rc::new(Wire::default());
        *server.peers.borrow_mut() = Some(wire.clone());
        server.start_tasks();
        Self {
            hooks: Hooks(server.clone()),
            server,
            wire,
            agent,
        }
    }

    async fn greet(&self, rid: u64, client_term: u64, farewell: bool) -> Result<(), Errno> {
        let greeting = GreetingInfo {
            rid,
            peer: addr(rid as u16),
            quorum: rid < 10,
            farewell,
            client_term,
            first_contact: client_term != TERM,
        };
        self.hooks.greet(greeting).await?;
        self.wire.connected.borrow_mut().insert(rid);
        self.hooks.attached(rid);
        Ok(())
    }

    fn ask(&self, rid: u64, cmd: NetCmd, payload: &[u8]) -> Origin {
        self.wire.ids.set(self.wire.ids.get() + 1);
        let origin = Origin {
            rid,
            session: 1,
            id: self.wire.ids.get(),
            cmd,
        };
        self.hooks.request(origin, Bytes::copy_from_slice(payload));
        origin
    }

    fn answer_to(&self, origin: &Origin) -> Option<Result<Bytes, Errno>> {
        let answers = self.wire.answers.borrow();
        answers
            .iter()
            .find(|(to, _)| to == origin)
            .map(|(_, body)| body.clone())
    }

    async fn call(
        &self,
        world: &TestWorld,
        rid: u64,
        cmd: NetCmd,
        payload: &[u8],
    ) -> Result<Bytes, Errno> {
        let origin = self.ask(rid, cmd, payload);
        loop {
            if let Some(answer) = self.answer_to(&origin) {
                return answer;
            }
            world.env().sleep(Duration::from_millis(1)).await;
        }
    }

    fn lock(&self, rid: u64, group: u64, mode: u8) -> Origin {
        let key = Key::new(ZONE_FS, group * 1024, 0, 0, 0, 0);
        let msg = NetLock {
            key: key.into(),
            new_mode: mode,
            ..NetLock::default()
        };
        self.ask(rid, NetCmd::Lock, msg.as_bytes())
    }

    fn tell_locks(&self, rid: u64, locks: &[NetLock]) -> Result<(), Errno> {
        let mut body = vec![0; 8];
        body[0] = locks.len() as u8;
        body.extend(locks.iter().flat_map(|lock| lock.as_bytes().to_vec()));
        self.hooks
            .response(rid, 1, NetCmd::LockRecover, Ok(body.into()))
    }

    fn sent(&self, rid: u64, cmd: NetCmd) -> usize {
        let requests = self.wire.requests.borrow();
        requests
            .iter()
            .filter(|(to, what, _)| (*to, *what) == (rid, cmd))
            .count()
    }
}

#[test]
fn a_mount_is_recorded_before_it_is_greeted_and_gone_after_its_farewell() {
    let world = volume(1);
    world.block_on(async {
        let server = Instance::start(&world, false).await;
        server.greet(5, 0, false).await.unwrap();
        let stable = server.server.store.stable();
        assert_ne!(stable.mounted_clients, BtreeRoot::default());
        let log = server
            .call(&world, 5, NetCmd::GetLogTrees, &[])
            .await
            .unwrap();
        assert!(LogTrees::read_from_bytes(&log).unwrap().is_open());
        let grant = server.lock(5, 1, 2);
        assert!(server.answer_to(&grant).is_some());
        server.call(&world, 5, NetCmd::Farewell, &[]).await.unwrap();
        assert!(!server.server.store.is_mounted(5).await.unwrap());
        assert!(server.server.locks.borrow().clients().is_empty());
        server.server.stop().await;
    });
    let seen = super::census::census(&world.meta).unwrap();
    assert!(seen.mounted.is_empty() && seen.logs[0].is_finalized());
}

#[test]
fn every_command_answers_or_breaks_the_connection() {
    let world = volume(2);
    world.block_on(async {
        let server = Instance::start(&world, false).await;
        server.greet(5, 0, false).await.unwrap();
        let roots = server.call(&world, 5, NetCmd::GetRoots, &[]).await.unwrap();
        assert_eq!(roots.len(), 72);
        assert_eq!(
            server
                .call(&world, 5, NetCmd::GetLastSeq, &[])
                .await
                .unwrap()
                .len(),
            8
        );
        assert_eq!(
            server
                .call(&world, 5, NetCmd::Statfs, &[])
                .await
                .unwrap()
                .len(),
            56
        );
        assert_eq!(
            server
                .call(&world, 5, NetCmd::GetVolopt, &[])
                .await
                .unwrap()
                .len(),
            520
        );
        let compact = server
            .call(&world, 5, NetCmd::SrchGetCompact, &[])
            .await
            .unwrap();
        assert_eq!(&compact[..], &[0; 584]);
        for (cmd, payload, errno) in [
            (NetCmd::SrchCommitCompact, 584, Errno::ENOENT),
            (NetCmd::GetLogMerge, 0, Errno::ENOENT),
            (NetCmd::CommitLogMerge, 208, Errno::ENOENT),
            (NetCmd::AllocInodes, 7, Errno::EINVAL),
            (NetCmd::GetLogTrees, 1, Errno::EINVAL),
            (NetCmd::CommitLogTrees, 471, Errno::EINVAL),
            (NetCmd::SetVolopt, 1, Errno::EINVAL),
            (NetCmd::ResizeDevices, 8, Errno::EINVAL),
            (NetCmd::OpenInoMap, 15, Errno::EINVAL),
        ] {
            let got = server.call(&world, 5, cmd, &vec![0; payload]).await;
            assert_eq!(got, Err(errno), "{cmd:?}");
        }
        let ino = server
            .call(&world, 5, NetCmd::AllocInodes, &8u64.to_le_bytes())
            .await;
        assert_eq!(ino.unwrap().len(), 16);
        for (cmd, payload) in [
            (NetCmd::Lock, 47),
            (NetCmd::GetLogMerge, 1),
            (NetCmd::CommitLogMerge, 207),
            (NetCmd::Farewell, 1),
            (NetCmd::SyncLogTrees, 0),
            (NetCmd::LockRecover, 0),
        ] {
            server.wire.broken.borrow_mut().clear();
            server.ask(5, cmd, &vec![0; payload]);
            assert_eq!(*server.wire.broken.borrow(), [5], "{cmd:?}");
        }
        server.server.stop().await;
    });
}

#[test]
fn nothing_is_granted_until_everybody_told_their_locks() {
    let world = volume(3);
    world.block_on(async {
        let first = Instance::start(&world, false).await;
        for rid in [5, 6] {
            first.greet(rid, 0, false).await.unwrap();
        }
        first.server.stop().await;

        let server = Instance::start(&world, false).await;
        server.greet(5, TERM - 1, false).await.unwrap();
        server.greet(20, 0, false).await.unwrap();
        assert_eq!(server.sent(5, NetCmd::LockRecover), 1);
        assert_eq!(server.sent(20, NetCmd::LockRecover), 0);
        let wanted = server.lock(20, 3, 2);
        let map = server.ask(20, NetCmd::OpenInoMap, OpenInoMapArgs::default().as_bytes());
        let get = server.ask(5, NetCmd::GetLogTrees, &[]);
        let held = NetLock {
            key: Key::new(ZONE_FS, 3 * 1024, 0, 0, 0, 0).into(),
            write_seq: 5000.into(),
            old_mode: 2,
            new_mode: 2,
            ..NetLock::default()
        };
        server.tell_locks(5, &[held]).unwrap();
        world.env().sleep(Duration::from_millis(10)).await;
        assert!(
            server.answer_to(&get).is_none(),
            "its locks are not all known"
        );
        server.tell_locks(5, &[]).unwrap();
        assert!(server.tell_locks(5, &[]).is_err(), "not pending any more");
        world.env().sleep(Duration::from_millis(50)).await;
        let log = server.answer_to(&get).expect("answered").unwrap();
        let log = LogTrees::read_from_bytes(&log).unwrap();
        assert!(
            log.get_trans_seq.get() > 5000,
            "above the write seq it holds"
        );
        assert!(server.answer_to(&wanted).is_none(), "6 is still awaited");
        assert_eq!(server.sent(5, NetCmd::OpenInoMap), 0);

        server.greet(6, TERM - 1, false).await.unwrap();
        assert_eq!(server.sent(5, NetCmd::OpenInoMap), 1);
        assert_eq!(server.sent(6, NetCmd::OpenInoMap), 1);
        assert!(server.answer_to(&map).is_none());
        server.tell_locks(6, &[]).unwrap();
        assert_eq!(server.sent(5, NetCmd::Lock), 1, "5 is asked to give up");
        server.server.stop().await;
    });
}

#[test]
fn who_does_not_come_back_is_fenced_and_reclaimed() {
    let world = volume(4);
    world.block_on(async {
        let first = Instance::start(&world, false).await;
        for rid in [5, 6] {
            first.greet(rid, 0, false).await.unwrap();
            first
                .call(&world, rid, NetCmd::GetLogTrees, &[])
                .await
                .unwrap();
        }
        first.server.stop().await;

        let server = Instance::start(&world, false).await;
        server.greet(5, TERM - 1, false).await.unwrap();
        server.tell_locks(5, &[]).unwrap();
        let wanted = server.lock(5, 3, 2);
        world.env().sleep(Duration::from_secs(29)).await;
        assert!(server.agent.asked.lock().unwrap().is_empty());
        assert!(server.answer_to(&wanted).is_none());
        world.env().sleep(Duration::from_secs(3)).await;
        let asked = server.agent.asked.lock().unwrap().clone();
        let expected = FenceRequest {
            rid: 6,
            addr: addr(6),
            reason: FenceReason::ClientRecovery,
        };
        assert_eq!(asked, [expected]);
        assert!(server.answer_to(&wanted).is_some());
        assert_eq!(server.greet(6, TERM - 1, false).await, Err(Errno::EINVAL));
        assert_eq!(server.greet(6, 0, false).await, Err(Errno::EINVAL));
        let farewell = server.call(&world, 5, NetCmd::Farewell, &[]).await;
        assert_eq!(farewell, Ok(Bytes::new()));
        server.server.stop().await;
    });
    let seen = super::census::census(&world.meta).unwrap();
    assert!(seen.mounted.is_empty());
    assert!(seen.logs.iter().all(LogTrees::is_finalized));
}

#[test]
fn a_client_that_is_away_and_provably_gone_is_fenced_at_once() {
    let world = volume(11);
    world.block_on(async {
        let server = Instance::start(&world, false).await;
        for rid in [5, 6, 7] {
            server.greet(rid, 0, false).await.unwrap();
        }
        // 5 has a connection, 7 may come back.
        for rid in [6, 7] {
            server.wire.connected.borrow_mut().remove(&rid);
        }
        server.agent.gone.lock().unwrap().extend([5, 6]);
        world.env().sleep(Duration::from_secs(3)).await;
        let asked: Vec<_> = server
            .agent
            .asked()
            .iter()
            .map(|r| (r.rid, r.reason))
            .collect();
        assert_eq!(asked, [(6, FenceReason::ClientReconnect)]);
        let left: Vec<u64> = server
            .server
            .store
            .mounted()
            .await
            .unwrap()
            .iter()
            .map(|m| m.0)
            .collect();
        assert_eq!(left, [5, 7], "it is reclaimed");
        server.server.stop().await;
    });
}

#[test]
fn a_failed_fence_stops_the_server() {
    let world = volume(5);
    world.block_on(async {
        let server = Instance::start(&world, true).await;
        server.greet(5, 0, false).await.unwrap();
        server.hooks.reconnect_timeout(5, addr(9));
        server.hooks.gone(5);
        server.server.store.wait_failed().await;
        server.server.stop().await;
        assert!(server.agent.asked.lock().unwrap().len() == 1);
    });
    assert_eq!(super::census::census(&world.meta).unwrap().mounted, [5]);
}

#[test]
fn the_last_majority_is_gone_from_the_record_before_one_of_it_is_answered() {
    let world = volume_of(7, 3);
    world.block_on(async {
        let server = Instance::start(&world, false).await;
        for rid in [5, 6, 77] {
            server.greet(rid, 0, false).await.unwrap();
        }
        let first = server.ask(5, NetCmd::Farewell, &[]);
        server.ask(6, NetCmd::Farewell, &[]);
        world.env().sleep(Duration::from_secs(1)).await;
        assert!(server.answer_to(&first).is_none(), "a mount is left");
        let store = Rc::downgrade(&server.server);
        let answered = Rc::new(Cell::new(0));
        let seen = answered.clone();
        *server.wire.watch.borrow_mut() = Some(Rc::new(move |to: &Origin| {
            let server = store.upgrade().expect("it answers");
            let left = server.store.stable().mounted_clients;
            // Whoever is answered may be the mount of this very server, which ends now.
            if to.rid < 10 {
                assert!(left.block_ref.is_null(), "{} was answered first", to.rid);
                seen.set(seen.get() + 1);
            }
        }));
        server
            .call(&world, 77, NetCmd::Farewell, &[])
            .await
            .unwrap();
        while answered.get() < 2 {
            world.env().sleep(Duration::from_millis(1)).await;
        }
        server.server.stop().await;
    });
    let seen = super::census::census(&world.meta).unwrap();
    assert!(seen.mounted.is_empty());
}

#[test]
fn the_last_majority_waits_for_one_of_it_whose_locks_are_awaited() {
    let world = volume_of(8, 3);
    world.block_on(async {
        let before = Instance::start(&world, false).await;
        for rid in [5, 6] {
            before.greet(rid, 0, false).await.unwrap();
        }
        before.server.stop().await;
        let server = Instance::start(&world, false).await;
        for rid in [5, 6] {
            server.greet(rid, TERM - 1, true).await.unwrap();
        }
        server.tell_locks(5, &[]).unwrap();
        let first = server.ask(5, NetCmd::Farewell, &[]);
        let second = server.ask(6, NetCmd::Farewell, &[]);
        world.env().sleep(Duration::from_secs(1)).await;
        assert!(server.answer_to(&first).is_none(), "6 would be left alone");
        server.tell_locks(6, &[]).unwrap();
        while server.answer_to(&second).is_none() {
            world.env().sleep(Duration::from_millis(1)).await;
        }
        assert!(server.answer_to(&first).is_some());
        server.server.stop().await;
    });
}

#[test]
fn a_client_that_left_is_not_fenced() {
    let world = volume(6);
    world.block_on(async {
        let server = Instance::start(&world, false).await;
        server.greet(5, 0, false).await.unwrap();
        server.call(&world, 5, NetCmd::Farewell, &[]).await.unwrap();
        server.hooks.reconnect_timeout(5, addr(9));
        world.env().sleep(Duration::from_secs(5)).await;
        assert!(server.agent.asked.lock().unwrap().is_empty());
        // Its answer was lost: it comes again.
        server.greet(5, TERM, true).await.unwrap();
        server.call(&world, 5, NetCmd::Farewell, &[]).await.unwrap();
        assert_eq!(server.greet(77, TERM - 2, false).await, Err(Errno::EINVAL));
        server.server.stop().await;
    });
}

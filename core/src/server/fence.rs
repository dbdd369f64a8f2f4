//! Fencing: making sure that a mount can never write to the volume again
//! (spec 09 section 9). The server only asks; an agent outside acts.
//!
//! What can go wrong: taking an unfinished fence for a finished one. A request
//! ends as fenced or in error; silence becomes an error after a limit; and every
//! error stops the server. At most one request per rid exists, since an earlier
//! leader is often an unrecovered client as well.

use crate::env::{Duration, Env, LocalBoxFuture, Signal, probe, timeout};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;
use thiserror::Error;

/// Why a mount is to be fenced (spec 09 section 9.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceReason {
    /// It was leader and did not record that it stopped.
    QuorumBlockLeader,
    /// It did not come back to the new server in time.
    ClientRecovery,
    /// It did not reconnect in time.
    ClientReconnect,
}

impl FenceReason {
    /// The name that agents know.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QuorumBlockLeader => "quorum_block_leader",
            Self::ClientRecovery => "client_recovery",
            Self::ClientReconnect => "client_reconnect",
        }
    }
}

/// A mount to be fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FenceRequest {
    /// The mount.
    pub rid: u64,
    /// Where it was last seen: a hint for the agent.
    pub addr: SocketAddrV4,
    /// Why.
    pub reason: FenceReason,
}

/// Why a mount could not be fenced.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FenceError {
    /// The agent says that it could not do it.
    #[error("mount {rid:016x} could not be fenced: {detail}")]
    Failed {
        /// The mount.
        rid: u64,
        /// What the agent said.
        detail: String,
    },
    /// The agent did not answer in time.
    #[error("fencing mount {rid:016x} took longer than {limit:?}")]
    TimedOut {
        /// The mount.
        rid: u64,
        /// The limit.
        limit: Duration,
    },
    /// Earlier leaders were not all fenced in time.
    #[error("earlier leaders were not all fenced within {limit:?}; still waiting for {}", rids(.waiting))]
    LeadersTimedOut {
        /// Who is missing.
        waiting: Vec<u64>,
        /// The limit.
        limit: Duration,
    },
}

fn rids(list: &[u64]) -> String {
    let names: Vec<String> = list.iter().map(|rid| format!("{rid:016x}")).collect();
    names.join(", ")
}

/// Makes mounts unable to write.
///
/// # Contract
/// `Ok` only when it is certain that the mount can never again write to either
/// device, queued writes included. A mount that does not exist counts as fenced
/// only if the agent can see every host that may run it. Asking again for a
/// fenced mount is harmless. The future may be dropped at any point: the server
/// stopped or its patience ended.
pub trait FenceAgent: Send + Sync {
    /// Fences one mount. The future runs on the server's thread; it may use the
    /// server's `env` to wait.
    fn fence(
        &self,
        env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>>;

    /// Whether [`FenceAgent::is_gone`] can ever be true.
    fn can_prove(&self) -> bool {
        false
    }

    /// Whether it is certain at this moment, without doing anything to it, that the
    /// mount can never write again: its process ended. Nobody then has to wait
    /// whether it comes back. Quick; does not wait.
    fn is_gone(&self, rid: u64) -> bool {
        let _ = rid;
        false
    }
}

/// How far a request has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FenceState {
    /// The agent works on it.
    Pending,
    /// The mount is fenced and can be reclaimed.
    Fenced,
    /// It could not be fenced.
    Failed(FenceError),
}

#[derive(Debug)]
struct Pending {
    request: FenceRequest,
    state: FenceState,
}

/// The fence requests of one server instance.
pub struct Fences {
    env: Env,
    agent: Arc<dyn FenceAgent>,
    limit: Duration,
    requests: RefCell<BTreeMap<u64, Pending>>,
    tasks: RefCell<Vec<Rc<dyn crate::env::Task>>>,
    changed: Signal,
}

impl Fences {
    /// No requests. `limit` is the time for one mount.
    pub fn new(env: &Env, agent: Arc<dyn FenceAgent>, limit: Duration) -> Rc<Self> {
        Rc::new(Self {
            env: env.clone(),
            agent,
            limit,
            requests: RefCell::default(),
            tasks: RefCell::default(),
            changed: Signal::default(),
        })
    }

    /// Asks the agent to fence a mount; does nothing if that was asked already
    /// and is not reclaimed yet. Returns whether the request is new.
    pub fn start(self: &Rc<Self>, request: FenceRequest) -> bool {
        assert!(
            request.rid != 0 && request.rid != u64::MAX,
            "fencing nobody"
        );
        let rid = request.rid;
        let pending = Pending {
            request,
            state: FenceState::Pending,
        };
        {
            let mut requests = self.requests.borrow_mut();
            if requests.contains_key(&rid) {
                probe("server.fence.duplicate");
                return false;
            }
            requests.insert(rid, pending);
        }
        probe(match request.reason {
            FenceReason::QuorumBlockLeader => "server.fence.leader",
            FenceReason::ClientRecovery => "server.fence.recovery",
            FenceReason::ClientReconnect => "server.fence.reconnect",
        });
        tracing::info!(
            rid = format_args!("{rid:016x}"),
            addr = %request.addr,
            reason = request.reason.name(),
            "fencing"
        );
        let fences = Rc::clone(self);
        let task = self
            .env
            .spawn("fence", async move { fences.run(request).await });
        let mut tasks = self.tasks.borrow_mut();
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
        true
    }

    async fn run(self: Rc<Self>, request: FenceRequest) {
        let rid = request.rid;
        let deadline = self.env.clock.now() + self.limit;
        let asked = self.agent.fence(&self.env, request);
        let state = match timeout(&*self.env.clock, deadline, asked).await {
            Some(Ok(())) => FenceState::Fenced,
            Some(Err(err)) => FenceState::Failed(err),
            None => FenceState::Failed(FenceError::TimedOut {
                rid,
                limit: self.limit,
            }),
        };
        tracing::info!(rid = format_args!("{rid:016x}"), ?state, "fence ended");
        if let Some(pending) = self.requests.borrow_mut().get_mut(&rid) {
            pending.state = state;
        }
        self.changed.wake_all();
    }

    /// Waits until every request is fenced, at most `limit` in total.
    ///
    /// # Errors
    /// If any request failed, or the time is over. No error may be ignored: what
    /// was to be fenced may still write (spec 09 section 15.1).
    pub async fn wait_all(&self, limit: Duration) -> Result<(), FenceError> {
        let deadline = self.env.clock.now() + limit;
        let done = self.changed.wait_for(|| {
            let requests = self.requests.borrow();
            let failed = requests.values().find_map(|p| match &p.state {
                FenceState::Failed(err) => Some(err.clone()),
                _ => None,
            });
            match failed {
                Some(err) => Some(Err(err)),
                None => requests
                    .values()
                    .all(|p| p.state == FenceState::Fenced)
                    .then_some(Ok(())),
            }
        });
        match timeout(&*self.env.clock, deadline, done).await {
            Some(result) => result,
            None => Err(FenceError::LeadersTimedOut {
                waiting: self.pending(),
                limit,
            }),
        }
    }

    /// Waits for a request that has ended, the least rid first.
    pub async fn next_ended(&self) -> (FenceRequest, Result<(), FenceError>) {
        self.changed
            .wait_for(|| {
                self.requests
                    .borrow()
                    .values()
                    .find_map(|p| match &p.state {
                        FenceState::Pending => None,
                        FenceState::Fenced => Some((p.request, Ok(()))),
                        FenceState::Failed(err) => Some((p.request, Err(err.clone()))),
                    })
            })
            .await
    }

    /// Forgets the request of a mount that was reclaimed.
    pub fn remove(&self, rid: u64) {
        self.requests.borrow_mut().remove(&rid);
        self.changed.wake_all();
    }

    /// Whether a request for `rid` exists, ended or not.
    pub fn contains(&self, rid: u64) -> bool {
        self.requests.borrow().contains_key(&rid)
    }

    /// The mounts whose fence has not ended.
    pub fn pending(&self) -> Vec<u64> {
        self.requests
            .borrow()
            .iter()
            .filter(|(_, p)| p.state == FenceState::Pending)
            .map(|(rid, _)| *rid)
            .collect()
    }

    /// The mounts that are not reclaimed yet, and why they are fenced.
    pub fn pending_reasons(&self) -> Vec<(u64, &'static str)> {
        let requests = self.requests.borrow();
        let named = requests
            .iter()
            .map(|(rid, p)| (*rid, p.request.reason.name()));
        named.collect()
    }

    /// Forgets everything: the server stops.
    pub fn clear(&self) {
        for task in self.tasks.borrow_mut().drain(..) {
            task.abort();
        }
        self.requests.borrow_mut().clear();
        self.changed.wake_all();
    }
}

impl std::fmt::Debug for Fences {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fences")
            .field("requests", &self.requests)
            .finish_non_exhaustive()
    }
}

//! Fence work that outlives the server that asked for it.
//!
//! An agent has 30 s for one mount, a new leader waits 15 s for all of them, and
//! then its server stops and the next one asks again (spec 09 sections 9.1 and 9.2).
//! Were the work dropped with the server, an agent that needs 20 s to switch a
//! machine off would start over for ever. So it runs on as a task of the quorum
//! agent: who asks again for a mount joins the work under way, and what was fenced
//! stays fenced, since no other mount ever gets the same rid.
//!
//! What can go wrong: remembering a failure, or work that hangs. Both are forgotten:
//! the next who asks starts over.

use super::fence::{FenceAgent, FenceError, FenceRequest};
use crate::env::{Duration, Env, LocalBoxFuture, Signal, probe, timeout};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

type Answer = Result<(), FenceError>;
type Ask = (FenceRequest, oneshot::Sender<Answer>);

/// Hands requests to a [`FenceAgent`] that works on a task of its own.
pub struct LastingAgent {
    asks: mpsc::UnboundedSender<Ask>,
    agent: Arc<dyn FenceAgent>,
}

impl std::fmt::Debug for LastingAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LastingAgent").finish_non_exhaustive()
    }
}

/// The fencing of one mount.
#[derive(Default)]
struct Work {
    answer: RefCell<Option<Answer>>,
    done: Signal,
}

struct Worker {
    env: Env,
    agent: Arc<dyn FenceAgent>,
    limit: Duration,
    works: RefCell<BTreeMap<u64, Rc<Work>>>,
}

impl LastingAgent {
    /// Lets `agent` work on tasks of `env`'s actor, `limit` long for each mount.
    pub fn new(env: &Env, agent: Arc<dyn FenceAgent>, limit: Duration) -> Arc<Self> {
        let (asks, mut asked) = mpsc::unbounded_channel::<Ask>();
        let worker = Rc::new(Worker {
            env: env.clone(),
            agent: agent.clone(),
            limit,
            works: RefCell::default(),
        });
        env.spawn("fencing", async move {
            while let Some((request, tell)) = asked.recv().await {
                let work = worker.work(request);
                worker.env.spawn("fenced", async move {
                    let answer = || work.answer.borrow().clone();
                    // Who asked may be gone: its server stopped.
                    let _ = tell.send(work.done.wait_for(answer).await);
                });
            }
        });
        Arc::new(Self { asks, agent })
    }
}

impl Worker {
    /// The work on a mount: the one under way or done, or a new one.
    fn work(self: &Rc<Self>, request: FenceRequest) -> Rc<Work> {
        if let Some(work) = self.works.borrow().get(&request.rid) {
            probe("server.fence.joined");
            return Rc::clone(work);
        }
        let work: Rc<Work> = Rc::default();
        self.works
            .borrow_mut()
            .insert(request.rid, Rc::clone(&work));
        let (worker, running) = (Rc::clone(self), Rc::clone(&work));
        self.env.spawn("fence_work", async move {
            let (rid, limit) = (request.rid, worker.limit);
            let deadline = worker.env.clock.now() + limit;
            let asked = worker.agent.fence(&worker.env, request);
            let answer = timeout(&*worker.env.clock, deadline, asked).await;
            let answer = answer.unwrap_or(Err(FenceError::TimedOut { rid, limit }));
            if answer.is_err() {
                worker.works.borrow_mut().remove(&rid);
            }
            running.answer.replace(Some(answer));
            running.done.wake_all();
        });
        work
    }
}

impl FenceAgent for LastingAgent {
    fn fence(&self, _env: &Env, request: FenceRequest) -> LocalBoxFuture<'static, Answer> {
        let (tell, told) = oneshot::channel();
        let lost = || FenceError::Failed {
            rid: request.rid,
            detail: "the quorum agent of this mount has ended".to_owned(),
        };
        let sent = self.asks.send((request, tell)).map_err(|_| lost());
        let lost = lost();
        Box::pin(async move {
            sent?;
            told.await.unwrap_or(Err(lost))
        })
    }

    fn can_prove(&self) -> bool {
        self.agent.can_prove()
    }

    fn is_gone(&self, rid: u64) -> bool {
        self.agent.is_gone(rid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::testing::TestWorld;
    use crate::server::fence::{FenceReason, Fences};
    use std::net::{Ipv4Addr, SocketAddrV4};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Needs 20 s; its first attempts hang or fail.
    #[derive(Default)]
    struct Slow {
        asked: AtomicU32,
        hangs: u32,
        fails: u32,
    }

    impl FenceAgent for Slow {
        fn fence(&self, env: &Env, request: FenceRequest) -> LocalBoxFuture<'static, Answer> {
            let nth = self.asked.fetch_add(1, Ordering::Relaxed);
            let (env, hangs, fails) = (env.clone(), nth < self.hangs, nth < self.fails);
            Box::pin(async move {
                if hangs {
                    std::future::pending::<()>().await;
                }
                env.sleep(Duration::from_secs(20)).await;
                let error = FenceError::Failed {
                    rid: request.rid,
                    detail: "out of order".to_owned(),
                };
                if fails { Err(error) } else { Ok(()) }
            })
        }
    }

    const LEADERS: Duration = Duration::from_secs(15);
    const ONE: Duration = Duration::from_secs(30);

    /// A server that starts, waits for the fence of a leader, and stops.
    async fn server(env: &Env, agent: &Arc<LastingAgent>) -> Answer {
        let fences = Fences::new(env, agent.clone(), ONE);
        fences.start(FenceRequest {
            rid: 7,
            addr: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1),
            reason: FenceReason::QuorumBlockLeader,
        });
        let result = fences.wait_all(LEADERS).await;
        fences.clear();
        result
    }

    fn attempts(slow: Slow, wanted: &[bool]) -> u32 {
        let world = TestWorld::new(1, 1 << 20, 1 << 20);
        let slow = Arc::new(slow);
        world.block_on(async {
            let env = world.env();
            let agent = LastingAgent::new(&env, slow.clone(), ONE);
            for (nth, ok) in wanted.iter().enumerate() {
                let result = server(&env, &agent).await;
                assert_eq!(result.is_ok(), *ok, "attempt {nth}: {result:?}");
            }
        });
        slow.asked.load(Ordering::Relaxed)
    }

    #[test]
    fn a_later_server_joins_work_that_an_earlier_one_gave_up() {
        // Done at 20 s, in the second server's time; the third need not ask.
        assert_eq!(attempts(Slow::default(), &[false, true, true]), 1);
    }

    #[test]
    fn work_that_failed_or_hung_is_started_over() {
        let fails = Slow {
            fails: 1,
            ..Slow::default()
        };
        // Fails at 20 s, in the second server's time; begun again at once by the third.
        assert_eq!(attempts(fails, &[false, false, false, true]), 2);
        let hangs = Slow {
            hangs: 1,
            ..Slow::default()
        };
        // Given up at 30 s.
        assert_eq!(attempts(hangs, &[false, false, false, true]), 2);
    }
}

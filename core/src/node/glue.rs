//! Small adapters between the parts of a mount: each implements one part's trait
//! by another part's calls.

use crate::block;
use crate::client::{Client, ClientError, Incoming};
use crate::env::{Duration, Env, LocalBoxFuture};
use crate::errno::Errno;
use crate::format::{
    Key, KeyRange, LogMergeComplete, LogMergeRequest, LogTrees, NetLock, NetRoots, OpenInoMap,
    OpenInoMapArgs,
};
use crate::fs::api::{Ino, StatFs};
use crate::fs::{Fs, ServerRequests};
use crate::guard::{Look, Standing};
use crate::locks::{LockError, LockHooks, LockTransport, Locks, Mode, Scope};
use crate::log::merge_worker::MergeServer;
use crate::log::{self, Log, ServerError};
use crate::quorum::{ServerInstance, ServerStarter};
use crate::secure::ClusterKey;
use crate::server::{self, Control, FenceAgent, ServerConfig};
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;

/// Requests to the server, for all parts.
pub(super) struct Requests {
    pub client: Client,
}

fn server_error(error: ClientError) -> ServerError {
    match error {
        ClientError::Severed | ClientError::Aborted | ClientError::Closed => ServerError::Severed,
        other => ServerError::Failed(errno(other)),
    }
}

fn errno(error: ClientError) -> Errno {
    match error {
        ClientError::Severed | ClientError::Closed => Errno::ENOLINK,
        ClientError::Aborted => Errno::ECONNABORTED,
        ClientError::Server(errno) | ClientError::Inodes(errno) => errno,
        ClientError::Length { .. } => Errno::EIO,
    }
}

impl LockTransport for Requests {
    fn request(&self, lock: NetLock) -> Result<(), LockError> {
        self.client.lock(&lock).map_err(|_| LockError::Severed)
    }
}

impl log::Server for Requests {
    fn get_log_trees(&self) -> LocalBoxFuture<'static, Result<LogTrees, ServerError>> {
        let client = self.client.clone();
        Box::pin(async move { client.get_log_trees().await.map_err(server_error) })
    }

    fn commit_log_trees(
        &self,
        trees: &LogTrees,
    ) -> LocalBoxFuture<'static, Result<(), ServerError>> {
        let (client, trees) = (self.client.clone(), *trees);
        Box::pin(async move { client.commit_log_trees(&trees).await.map_err(server_error) })
    }

    fn get_roots(&self) -> LocalBoxFuture<'static, Result<NetRoots, ServerError>> {
        let client = self.client.clone();
        Box::pin(async move { client.get_roots().await.map_err(server_error) })
    }

    fn get_last_seq(&self) -> LocalBoxFuture<'static, Result<u64, ServerError>> {
        let client = self.client.clone();
        Box::pin(async move { client.get_last_seq().await.map_err(server_error) })
    }
}

impl MergeServer for Requests {
    fn get_log_merge(&self) -> LocalBoxFuture<'static, Result<LogMergeRequest, Errno>> {
        let client = self.client.clone();
        Box::pin(async move { client.get_log_merge().await.map_err(errno) })
    }

    fn commit_log_merge(
        &self,
        done: &LogMergeComplete,
    ) -> LocalBoxFuture<'static, Result<(), Errno>> {
        let (client, done) = (self.client.clone(), *done);
        Box::pin(async move { client.commit_log_merge(&done).await.map_err(errno) })
    }
}

impl ServerRequests for Requests {
    fn alloc_inodes(&self, count: u64) -> LocalBoxFuture<'static, Result<(Ino, u64), Errno>> {
        let client = self.client.clone();
        Box::pin(async move { client.alloc_inodes(count).await.map_err(errno) })
    }

    fn statfs(&self) -> LocalBoxFuture<'static, Result<StatFs, Errno>> {
        let client = self.client.clone();
        Box::pin(async move {
            let figures = client.statfs().await.map_err(errno)?;
            let (total_meta, total_data) = (
                figures.total_meta_blocks.get(),
                figures.total_data_blocks.get(),
            );
            let files = total_meta.saturating_mul(65536 / 2048);
            Ok(StatFs {
                blocks: total_meta.saturating_mul(16).saturating_add(total_data),
                free: figures
                    .free_meta_blocks
                    .get()
                    .saturating_mul(16)
                    .saturating_add(figures.free_data_blocks.get()),
                files,
                files_free: files.saturating_sub(figures.inode_count.get()),
            })
        })
    }

    fn open_ino_map(
        &self,
        args: OpenInoMapArgs,
    ) -> LocalBoxFuture<'static, Result<OpenInoMap, Errno>> {
        let client = self.client.clone();
        Box::pin(async move {
            client
                .open_ino_map(args.group_nr.get())
                .await
                .map_err(errno)
        })
    }
}

/// Whether a mount may still write: the volume lists it, and it was not out of touch
/// for longer than `limit`, when others may be about to declare it dead.
pub(super) fn standing(client: &Client, limit: Duration) -> Look {
    let client = client.clone();
    Rc::new(move || {
        let client = client.clone();
        Box::pin(async move {
            match client.is_listed().await {
                Ok(false) => Ok(Standing::Lost),
                Ok(true) if client.detached_for().is_some_and(|time| time > limit) => {
                    Ok(Standing::Doubtful)
                }
                Ok(true) => Ok(Standing::Good),
                Err(error) => Err(error.to_string()),
            }
        })
    })
}

/// Messages from the server, for all parts.
pub(super) struct Messages {
    pub locks: Locks,
    pub log: Rc<Log>,
    pub fs: Rc<Fs>,
}

impl Incoming for Messages {
    fn lock_grant(&self, lock: NetLock) -> bool {
        self.locks.on_grant(&lock)
    }

    fn lock_invalidate(&self, lock: NetLock, answer: Box<dyn FnOnce(NetLock)>) {
        self.locks.on_invalidate(&lock, answer);
    }

    fn lock_recover(&self, start: Key, max: usize) -> Vec<NetLock> {
        self.locks.on_recover(&start, max)
    }

    fn open_ino_map(&self, args: OpenInoMapArgs) -> OpenInoMap {
        self.fs.open_ino_map(&args)
    }

    fn sync_log_trees(&self) {
        self.log.trigger_commit();
    }
}

/// What happens when a lock is taken back.
pub(super) struct Hooks {
    pub log: Rc<Log>,
    pub fs: Rc<Fs>,
}

impl LockHooks for Hooks {
    fn trans_seq(&self) -> u64 {
        self.log.trans_seq()
    }

    fn commit(&self) -> LocalBoxFuture<'static, ()> {
        let log = self.log.clone();
        Box::pin(async move {
            // It fails only for a mount that is cut off, whose answer nobody hears.
            if let Err(error) = log.sync().await {
                tracing::warn!(%error, "a lock is given back without its commit");
            }
        })
    }

    fn prepare(&self, scope: Scope, new: Mode) -> LocalBoxFuture<'static, ()> {
        let fs = self.fs.clone();
        Box::pin(async move { fs.pull_pages(scope, new).await })
    }

    fn is_prepared(&self, scope: Scope, new: Mode) -> bool {
        self.fs.pages_pulled(scope, new)
    }

    fn revoke(&self, scope: Scope, new: Mode) -> LocalBoxFuture<'static, ()> {
        let (log, fs) = (self.log.clone(), self.fs.clone());
        Box::pin(async move {
            fs.revoke(scope, new).await;
            if new == Mode::Null {
                log.invalidate(&scope.range());
            }
        })
    }

    fn has_cached(&self, range: &KeyRange, any: bool) -> bool {
        if any {
            self.log.has_cached(range)
        } else {
            self.log.has_dirty(range)
        }
    }
}

/// Starts the server when the agent is elected. Crosses to the agent's thread.
pub(super) struct Starter {
    pub fsid: u64,
    pub rid: u64,
    pub addr: SocketAddrV4,
    pub policy: server::Policy,
    pub block: block::Policy,
    pub fence: Arc<dyn FenceAgent>,
    pub cluster_key: Option<ClusterKey>,
    pub reports: server::ReportBoard,
}

impl ServerStarter for Starter {
    fn start(&self, env: &Env, term: u64) -> Box<dyn ServerInstance> {
        let config = ServerConfig {
            fsid: self.fsid,
            rid: self.rid,
            term,
            addr: self.addr,
            policy: self.policy.clone(),
            block_policy: self.block.clone(),
            fence: self.fence.clone(),
            cluster_key: self.cluster_key.clone(),
            reports: self.reports.clone(),
        };
        Box::new(Control::start(env, config))
    }
}

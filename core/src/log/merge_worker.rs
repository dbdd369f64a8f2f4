//! A mount's part in merging log trees into the fs root: ask the server for a
//! part of the running merge, do it in blocks of its own, hand it in (spec 05
//! section 5).
//!
//! Independent of the mount's transactions: own allocator, own dirty blocks. What
//! can go wrong costs nothing but time: nothing refers to what was written until
//! the server took the result, and a result marked as failed is thrown away whole.
//!
//! What can go wrong: handing in blocks that are not on the device. The result is
//! sent only after they were written and flushed.

use crate::block::{BlockError, Cache, Tx};
use crate::btree::{self, BtreeError, Merged};
use crate::env::{Duration, Either, Env, Gate, LocalBoxFuture, probe, race};
use crate::errno::Errno;
use crate::format::{
    BtreeRoot, Key, KeyRange, LOG_MERGE_COMPLETE_FLAG_ERROR, LOG_MERGE_COMPLETE_FLAG_REMAIN,
    LOG_MERGE_REQUEST_FLAG_SUBTREE, LogMergeComplete, LogMergeRequest, LogTrees,
};
use std::rc::Rc;
use thiserror::Error;
use zerocopy::FromBytes;

/// The worker's conversation with the server. Requests survive failovers.
pub trait MergeServer {
    /// Asks for work (GET_LOG_MERGE); ENOENT if there is none now.
    fn get_log_merge(&self) -> LocalBoxFuture<'static, Result<LogMergeRequest, Errno>>;
    /// Hands work in (COMMIT_LOG_MERGE); ENOENT if the server does not want it any more.
    fn commit_log_merge(
        &self,
        done: &LogMergeComplete,
    ) -> LocalBoxFuture<'static, Result<(), Errno>>;
}

/// Why a request could not be done; somebody will do it again.
#[derive(Clone, Debug, Error)]
pub enum MergeError {
    /// Blocks could not be read or written.
    #[error("{0}")]
    Btree(#[from] BtreeError),
    /// A log trees item of the wrong length.
    #[error("log trees item {key} has {len} bytes")]
    LogTreesLength {
        /// The item.
        key: Key,
        /// Its length in bytes.
        len: usize,
    },
}

impl From<BlockError> for MergeError {
    fn from(err: BlockError) -> Self {
        Self::Btree(err.into())
    }
}

/// The item trees that a request consumes.
async fn inputs(cache: &Cache, request: &LogMergeRequest) -> Result<Vec<BtreeRoot>, MergeError> {
    let mut found = Vec::new();
    let mut from = Key::log_trees(0, 0);
    let last = Key::log_trees(u64::MAX, u64::MAX);
    while let Some(item) = btree::next(cache, &request.logs_root, &from).await? {
        if item.key > last {
            break;
        }
        let (key, len) = (item.key, item.value.len());
        let log = LogTrees::read_from_bytes(&item.value)
            .map_err(|_| MergeError::LogTreesLength { key, len })?;
        let merged = log.is_finalized() && log.finalize_seq.get() < request.input_seq.get();
        if merged && log.item_root.height > 0 {
            found.push(log.item_root);
        }
        from = item.key.inc();
    }
    Ok(found)
}

/// Does one request and returns what to hand in: blocks written and durable, or
/// the error flag, with which the server ignores everything else.
pub async fn merge_request(cache: &Rc<Cache>, request: &LogMergeRequest) -> LogMergeComplete {
    let mut comp = LogMergeComplete {
        root: request.root,
        start: request.start,
        end: request.end,
        remain: request.end,
        rid: request.rid,
        seq: request.seq,
        ..LogMergeComplete::default()
    };
    let tx = Tx::new(cache.clone(), request.meta_avail, request.meta_freed);
    if let Err(err) = merge(&tx, request, &mut comp).await {
        probe("log.merge.failed");
        tracing::warn!(%err, "a log merge request failed");
        comp.flags = LOG_MERGE_COMPLETE_FLAG_ERROR.into();
    }
    (comp.meta_avail, comp.meta_freed) = tx.heads();
    comp
}

async fn merge(
    tx: &Tx,
    request: &LogMergeRequest,
    comp: &mut LogMergeComplete,
) -> Result<(), MergeError> {
    let inputs = inputs(tx.cache(), request).await?;
    if !inputs.is_empty() {
        let range = KeyRange::new(request.start.key(), request.end.key());
        let subtree = request.flags.get() & LOG_MERGE_REQUEST_FLAG_SUBTREE != 0;
        let merged = btree::merge(tx, &mut comp.root, &inputs, range, subtree).await?;
        if let Merged::Until(key) = merged {
            probe("log.merge.remain");
            comp.flags = LOG_MERGE_COMPLETE_FLAG_REMAIN.into();
            comp.remain = key.into();
        }
    }
    tx.prepare_commit();
    tx.write().await?;
    Ok(())
}

/// The worker of one mount.
pub struct MergeWorker {
    stop: Gate,
    stopped: Gate,
}

impl MergeWorker {
    /// Starts asking for work: after `delay` at first, at once after work was done,
    /// after `delay` again when there is none or something failed.
    pub fn start(
        env: &Env,
        cache: Rc<Cache>,
        server: Rc<dyn MergeServer>,
        delay: Duration,
    ) -> Rc<Self> {
        let worker = Rc::new(Self {
            stop: Gate::default(),
            stopped: Gate::default(),
        });
        let (task, env) = (worker.clone(), env.clone());
        env.clone().spawn("log_merge_worker", async move {
            let mut pause = delay;
            while let Either::Right(()) = race(task.stop.wait(), env.sleep(pause)).await {
                pause = match round(&cache, &*server).await {
                    Ok(()) => Duration::ZERO,
                    Err(_) => delay,
                };
            }
            task.stopped.open();
        });
        worker
    }

    /// Stops asking; completes when the request at hand was handed in.
    pub async fn stop(&self) {
        self.stop.open();
        self.stopped.wait().await;
    }
}

async fn round(cache: &Rc<Cache>, server: &dyn MergeServer) -> Result<(), Errno> {
    let request = server.get_log_merge().await?;
    let comp = merge_request(cache, &request).await;
    server.commit_log_merge(&comp).await?;
    if comp.flags.get() & LOG_MERGE_COMPLETE_FLAG_ERROR != 0 {
        return Err(Errno::EIO);
    }
    Ok(())
}

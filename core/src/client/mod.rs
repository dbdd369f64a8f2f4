//! A mount's end of the protocol (spec 08 sections 4, 6, 8 and 9): finds the
//! server, stays connected through failures of either, and offers the commands as
//! async functions.
//!
//! What can go wrong: a request that is sent and never answered although a server
//! lives. There is no timeout on requests; instead the connection is made again
//! for ever, everything unanswered is sent again, and only [`Client::sever`]
//! gives up.

use crate::env::{BlockDevice, Duration, Env, LocalBoxFuture};
use crate::errno::Errno;
use crate::format::{
    Key, LogMergeComplete, LogMergeRequest, LogTrees, NetLock, NetRoots, NetStatfs, OpenInoMap,
    OpenInoMapArgs, SrchCompact, VolumeOptions,
};
use std::rc::Rc;
use thiserror::Error;

/// What a client needs to know of its mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The mount.
    pub rid: u64,
    /// Volume id.
    pub fsid: u64,
    /// Format version of the mounted super block.
    pub fmt_vers: u64,
    /// Whether the mount has a quorum slot.
    pub quorum: bool,
    /// Limit of silence on the connection (option tcp_keepalive_timeout_ms).
    pub keepalive: Duration,
    /// Limit of one attempt to connect.
    pub connect_timeout: Duration,
    /// Pause between attempts.
    pub backoff: Duration,
}

impl ClientConfig {
    /// With the original's times.
    pub const fn new(rid: u64, fsid: u64, fmt_vers: u64, quorum: bool) -> Self {
        Self {
            rid,
            fsid,
            fmt_vers,
            quorum,
            keepalive: Duration::from_secs(24),
            connect_timeout: Duration::from_secs(1),
            backoff: Duration::from_millis(100),
        }
    }
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ClientError {
    /// The mount was severed before the request was made (ENOLINK).
    #[error("the mount was severed from its server")]
    Severed,
    /// The mount was severed while the request waited (ECONNABORTED).
    #[error("the request was given up with the mount")]
    Aborted,
    /// The server answered with an error.
    #[error("the server answered {0}")]
    Server(Errno),
    /// The answer has another length than the command's (EMSGSIZE).
    #[error("the server's answer has {found} bytes instead of {expected}")]
    Length {
        /// Length of a right answer.
        expected: usize,
        /// Length of this one.
        found: usize,
    },
    /// No inode numbers are left, or nonsense ones were given (spec 08 section 8).
    #[error("no inode numbers: {0}")]
    Inodes(Errno),
}

/// What a mount does with messages from the server. LOCK messages arrive in their
/// order on the wire, synchronously: the handler must not wait.
pub trait Incoming {
    /// A lock was granted.
    fn lock_grant(&self, lock: NetLock);
    /// A lock is to be given back; answered whenever that is done.
    fn lock_invalidate(&self, lock: NetLock, answer: Box<dyn FnOnce(NetLock)>);
    /// The locks held from `start` on, in key order, at most `max` (lock recovery).
    fn lock_recover(&self, start: Key, max: usize) -> Vec<NetLock>;
    /// Which inodes of the group are open here.
    fn open_ino_map(&self, args: OpenInoMapArgs) -> OpenInoMap;
    /// The server would like a commit soon. Not to be waited for.
    fn sync_log_trees(&self);
}

/// A mount's connection to whatever server there is. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    _inner: Rc<()>,
}

#[allow(clippy::unused_async, reason = "signatures first")]
impl Client {
    /// A client that does not connect yet.
    pub fn new(_env: &Env, _meta: Rc<dyn BlockDevice>, _config: ClientConfig) -> Client {
        unreachable!("lands next")
    }

    /// Starts to connect, and to hand messages to `incoming`.
    pub fn start(&self, _incoming: Rc<dyn Incoming>) {
        unreachable!("lands next")
    }

    /// Sends a lock request; the grant comes to [`Incoming::lock_grant`].
    ///
    /// # Errors
    /// If severed.
    pub fn lock(&self, _lock: &NetLock) -> Result<(), ClientError> {
        unreachable!("lands next")
    }

    /// Gets up to `count` new inode numbers: first number and how many.
    ///
    /// # Errors
    /// As [`ClientError`]; [`ClientError::Inodes`] if there are none.
    pub async fn alloc_inodes(&self, _count: u64) -> Result<(u64, u64), ClientError> {
        unreachable!("lands next")
    }

    /// Opens the next transaction.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_log_trees(&self) -> Result<LogTrees, ClientError> {
        unreachable!("lands next")
    }

    /// Commits the open transaction. Every block it references must be stable.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn commit_log_trees(&self, _trees: &LogTrees) -> Result<(), ClientError> {
        unreachable!("lands next")
    }

    /// Roots of the last durable server commit.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_roots(&self) -> Result<NetRoots, ClientError> {
        unreachable!("lands next")
    }

    /// Greatest seq with no open transaction at or below it.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_last_seq(&self) -> Result<u64, ClientError> {
        unreachable!("lands next")
    }

    /// Free space and counts of the volume.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn statfs(&self) -> Result<NetStatfs, ClientError> {
        unreachable!("lands next")
    }

    /// Which inodes of a group are open on any mount.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn open_ino_map(&self, _group_nr: u64) -> Result<OpenInoMap, ClientError> {
        unreachable!("lands next")
    }

    /// The volume's options.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_volopt(&self) -> Result<VolumeOptions, ClientError> {
        unreachable!("lands next")
    }

    /// Sets the options whose bits are set.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn set_volopt(&self, _options: &VolumeOptions) -> Result<(), ClientError> {
        unreachable!("lands next")
    }

    /// Clears the options whose bits are set.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn clear_volopt(&self, _options: &VolumeOptions) -> Result<(), ClientError> {
        unreachable!("lands next")
    }

    /// Grows the devices to these totals, in large metadata and small data blocks;
    /// 0 leaves one as it is.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn resize_devices(&self, _meta: u64, _data: u64) -> Result<(), ClientError> {
        unreachable!("lands next")
    }

    /// Gets srch compaction work; `nr` is 0 if there is none.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn srch_get_compact(&self) -> Result<SrchCompact, ClientError> {
        unreachable!("lands next")
    }

    /// Hands srch compaction work in.
    ///
    /// # Errors
    /// As [`ClientError`]; ENOENT is no harm.
    pub async fn srch_commit_compact(&self, _done: &SrchCompact) -> Result<(), ClientError> {
        unreachable!("lands next")
    }

    /// Gets log merge work; the server answers ENOENT if there is none.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_log_merge(&self) -> Result<LogMergeRequest, ClientError> {
        unreachable!("lands next")
    }

    /// Hands log merge work in.
    ///
    /// # Errors
    /// As [`ClientError`]; ENOENT is no harm.
    pub async fn commit_log_merge(&self, _done: &LogMergeComplete) -> Result<(), ClientError> {
        unreachable!("lands next")
    }

    /// Says farewell and waits until the server freed everything of this mount
    /// (spec 08 section 9), then closes the connection for good. Returns at once if
    /// no server ever greeted this mount, or after [`Client::sever`].
    pub async fn farewell(&self) {
        unreachable!("lands next")
    }

    /// Forced unmount: closes the connection for good. Waiting requests end with
    /// [`ClientError::Aborted`], new ones with [`ClientError::Severed`].
    pub fn sever(&self) {
        unreachable!("lands next")
    }

    /// Whether [`Client::sever`] was called.
    pub fn is_severed(&self) -> bool {
        unreachable!("lands next")
    }

    /// Term of the last server greeted; 0 if none.
    pub fn server_term(&self) -> u64 {
        unreachable!("lands next")
    }

    /// Completes when a current super has no mounted client item for this mount
    /// although it is not unmounting: it was fenced and reclaimed, and should sever
    /// itself (spec 08 section 15).
    pub fn evicted(&self) -> LocalBoxFuture<'static, ()> {
        unreachable!("lands next")
    }
}

//! A mount's end of the protocol (spec 08 sections 4, 6, 8 and 9): finds the
//! server, stays connected through failures of either, and offers the commands as
//! async functions.
//!
//! What can go wrong: a request that is sent and never answered although a server
//! lives. There is no timeout on requests; instead the connection is made again
//! for ever, everything unanswered is sent again, and only [`Client::sever`]
//! gives up. A grant that is handled before the invalidation that came ahead of it:
//! LOCK messages are handed over one by one as they arrive. And a grant that can not be
//! right: its caller would wait for ever, as the request is answered. The connection is
//! closed, as after any message that breaks the protocol, and the lock asked for again on
//! the next one. What the server takes for granted it takes back then (spec 10 section 3:
//! another mode of the same client is in the way of a request, too).

mod connect;
mod locate;

pub use locate::{LocateError, Locator};

use crate::env::{BlockDevice, Duration, Env, Gate, LocalBoxFuture, Signal, Time, probe};
use crate::errno::Errno;
use crate::format::{
    Key, LogMergeComplete, LogMergeRequest, LogTrees, NetCmd, NetInodeAlloc, NetLock,
    NetResizeDevices, NetRoots, NetStatfs, OpenInoMap, OpenInoMapArgs, SrchCompact, VolumeOptions,
};
use crate::wire::Conn;
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use thiserror::Error;
use tokio::sync::oneshot;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes};

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
    /// Time between two looks at who leads, while connected. A new server waits 30
    /// seconds for the clients of the one before.
    pub server_check: Duration,
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
            server_check: Duration::from_secs(5),
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
    /// The connection was closed after the farewell (ESHUTDOWN).
    #[error("the mount has said farewell")]
    Closed,
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

impl ClientError {
    /// The error number of the original for it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Severed => Errno::ENOLINK,
            Self::Aborted => Errno::ECONNABORTED,
            Self::Closed => Errno::ESHUTDOWN,
            Self::Server(errno) | Self::Inodes(errno) => errno,
            Self::Length { .. } => Errno::EMSGSIZE,
        }
    }
}

impl From<ClientError> for Errno {
    fn from(error: ClientError) -> Errno {
        error.errno()
    }
}

/// What a mount does with messages from the server. LOCK messages arrive in their
/// order on the wire, synchronously: the handler must not wait.
pub trait Incoming {
    /// A lock was granted as it was asked for. `false` refuses the grant, which then
    /// has changed nothing: the connection is closed, and the lock asked for again.
    fn lock_grant(&self, lock: NetLock) -> bool;
    /// A lock is to be given back; answered whenever that is done.
    fn lock_invalidate(&self, lock: NetLock, answer: Box<dyn FnOnce(NetLock)>);
    /// The locks held from `start` on, in key order, at most `max` (lock recovery).
    fn lock_recover(&self, start: Key, max: usize) -> Vec<NetLock>;
    /// Which inodes of the group are open here.
    fn open_ino_map(&self, args: OpenInoMapArgs) -> OpenInoMap;
    /// The server would like a commit soon. Not to be waited for.
    fn sync_log_trees(&self);
}

/// Where the answer to a request goes.
type Waiter = oneshot::Sender<Result<Bytes, ClientError>>;

/// What became of the connection for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// Not started, or running.
    Open,
    /// Forced unmount.
    Severed,
    /// Said farewell.
    Closed,
}

struct Inner {
    env: Env,
    config: ClientConfig,
    locator: Locator,
    conn: RefCell<Conn>,
    waiters: RefCell<BTreeMap<u64, Waiter>>,
    incoming: RefCell<Option<Rc<dyn Incoming>>>,
    life: Cell<Life>,
    /// Id of the FAREWELL request, once it was made.
    farewell: Cell<Option<u64>>,
    /// There is something to write.
    to_write: Signal,
    /// Opens when the connection is to end.
    stop: Gate,
    /// Opens when the connection's task has ended.
    ended: Gate,
    evicted: Gate,
    /// Attempts in vain since the last connection.
    tries: Cell<usize>,
    /// Since when there is no connection, after there was one.
    detached: Cell<Option<Time>>,
}

/// A mount's connection to whatever server there is. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Rc<Inner>,
}

/// Reads a whole answer.
fn exact<T: FromBytes>(bytes: &[u8]) -> Result<T, ClientError> {
    T::read_from_bytes(bytes).map_err(|_| ClientError::Length {
        expected: size_of::<T>(),
        found: bytes.len(),
    })
}

impl Inner {
    fn submit(&self, cmd: NetCmd, payload: &[u8]) -> Result<u64, ClientError> {
        match self.life.get() {
            Life::Open => {}
            Life::Severed => return Err(ClientError::Severed),
            Life::Closed => return Err(ClientError::Closed),
        }
        let payload = Bytes::copy_from_slice(payload);
        let id = self.conn.borrow_mut().request(cmd, payload);
        self.to_write.wake_all();
        Ok(id)
    }

    /// Answers a request of the server, unless that server is gone.
    fn respond(&self, epoch: u64, id: u64, cmd: NetCmd, body: Result<Bytes, Errno>) {
        if self.life.get() == Life::Open && self.conn.borrow_mut().respond(epoch, id, cmd, body) {
            self.to_write.wake_all();
        }
    }

    /// Ends the connection for good and every request that waits with it.
    fn end(&self, life: Life) {
        if self.life.get() == Life::Open {
            self.life.set(life);
        }
        self.stop.open();
        // Waking runs no other task's code here: each sees it when polled next.
        for (_, waiter) in std::mem::take(&mut *self.waiters.borrow_mut()) {
            let _ = waiter.send(Err(ClientError::Aborted));
        }
    }
}

impl Client {
    /// A client that does not connect yet. `meta` is the metadata device.
    pub fn new(env: &Env, meta: Rc<dyn BlockDevice>, config: ClientConfig) -> Client {
        let locator = Locator::new(env, meta, config.fsid, config.fmt_vers);
        Client {
            inner: Rc::new(Inner {
                env: env.clone(),
                config,
                locator,
                conn: RefCell::new(Conn::client()),
                waiters: RefCell::default(),
                incoming: RefCell::new(None),
                life: Cell::new(Life::Open),
                farewell: Cell::new(None),
                to_write: Signal::default(),
                stop: Gate::default(),
                ended: Gate::default(),
                evicted: Gate::default(),
                tries: Cell::default(),
                detached: Cell::default(),
            }),
        }
    }

    /// Starts to connect, and to hand messages to `incoming`.
    ///
    /// # Panics
    /// If it was started before.
    pub fn start(&self, incoming: Rc<dyn Incoming>) {
        let old = self.inner.incoming.borrow_mut().replace(incoming);
        assert!(
            old.is_none() && !self.inner.ended.is_open(),
            "a client is started once"
        );
        self.inner
            .env
            .spawn("client", connect::run(self.inner.clone()));
    }

    /// Sends a request and waits for its answer, through any number of reconnects.
    /// Dropping the future gives up the answer, not the request.
    async fn ask(&self, cmd: NetCmd, payload: &[u8]) -> Result<Bytes, ClientError> {
        let id = self.inner.submit(cmd, payload)?;
        let (send, receive) = oneshot::channel();
        self.inner.waiters.borrow_mut().insert(id, send);
        receive.await.unwrap_or(Err(ClientError::Aborted))
    }

    async fn ask_for<T: FromBytes>(&self, cmd: NetCmd, payload: &[u8]) -> Result<T, ClientError> {
        exact(&self.ask(cmd, payload).await?)
    }

    async fn tell<T: IntoBytes + Immutable>(
        &self,
        cmd: NetCmd,
        what: &T,
    ) -> Result<(), ClientError> {
        match self.ask(cmd, what.as_bytes()).await?.len() {
            0 => Ok(()),
            found => Err(ClientError::Length { expected: 0, found }),
        }
    }

    /// Sends a lock request; the grant comes to [`Incoming::lock_grant`].
    ///
    /// # Errors
    /// If severed.
    pub fn lock(&self, lock: &NetLock) -> Result<(), ClientError> {
        self.inner.submit(NetCmd::Lock, lock.as_bytes()).map(|_| ())
    }

    /// Gets up to `count` new inode numbers: first number and how many.
    ///
    /// # Errors
    /// As [`ClientError`]; [`ClientError::Inodes`] if there are none.
    pub async fn alloc_inodes(&self, count: u64) -> Result<(u64, u64), ClientError> {
        let count = U64::new(count);
        let got: NetInodeAlloc = self.ask_for(NetCmd::AllocInodes, count.as_bytes()).await?;
        match (got.ino.get(), got.nr.get()) {
            (_, 0) => Err(ClientError::Inodes(Errno::ENOSPC)),
            (ino, nr) if ino.checked_add(nr - 1).is_none() => {
                Err(ClientError::Inodes(Errno::EINVAL))
            }
            got => Ok(got),
        }
    }

    /// Opens the next transaction.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_log_trees(&self) -> Result<LogTrees, ClientError> {
        self.ask_for(NetCmd::GetLogTrees, &[]).await
    }

    /// Commits the open transaction. Every block it references must be stable.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn commit_log_trees(&self, trees: &LogTrees) -> Result<(), ClientError> {
        self.tell(NetCmd::CommitLogTrees, trees).await
    }

    /// Roots of the last durable server commit.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_roots(&self) -> Result<NetRoots, ClientError> {
        self.ask_for(NetCmd::GetRoots, &[]).await
    }

    /// Greatest seq with no open transaction at or below it.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_last_seq(&self) -> Result<u64, ClientError> {
        let seq: U64 = self.ask_for(NetCmd::GetLastSeq, &[]).await?;
        Ok(seq.get())
    }

    /// Free space and counts of the volume.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn statfs(&self) -> Result<NetStatfs, ClientError> {
        self.ask_for(NetCmd::Statfs, &[]).await
    }

    /// Which inodes of a group are open on any mount.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn open_ino_map(&self, group_nr: u64) -> Result<OpenInoMap, ClientError> {
        let args = OpenInoMapArgs {
            group_nr: group_nr.into(),
            req_id: 0.into(),
        };
        self.ask_for(NetCmd::OpenInoMap, args.as_bytes()).await
    }

    /// The volume's options.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_volopt(&self) -> Result<VolumeOptions, ClientError> {
        self.ask_for(NetCmd::GetVolopt, &[]).await
    }

    /// Sets the options whose bits are set.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn set_volopt(&self, options: &VolumeOptions) -> Result<(), ClientError> {
        self.tell(NetCmd::SetVolopt, options).await
    }

    /// Clears the options whose bits are set.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn clear_volopt(&self, options: &VolumeOptions) -> Result<(), ClientError> {
        self.tell(NetCmd::ClearVolopt, options).await
    }

    /// Grows the devices to these totals, in large metadata and small data blocks;
    /// 0 leaves one as it is.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn resize_devices(&self, meta: u64, data: u64) -> Result<(), ClientError> {
        let totals = NetResizeDevices {
            new_total_meta_blocks: meta.into(),
            new_total_data_blocks: data.into(),
        };
        self.tell(NetCmd::ResizeDevices, &totals).await
    }

    /// Gets srch compaction work; `nr` is 0 if there is none.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn srch_get_compact(&self) -> Result<SrchCompact, ClientError> {
        self.ask_for(NetCmd::SrchGetCompact, &[]).await
    }

    /// Hands srch compaction work in.
    ///
    /// # Errors
    /// As [`ClientError`]; ENOENT is no harm.
    pub async fn srch_commit_compact(&self, done: &SrchCompact) -> Result<(), ClientError> {
        self.tell(NetCmd::SrchCommitCompact, done).await
    }

    /// Gets log merge work; the server answers ENOENT if there is none.
    ///
    /// # Errors
    /// As [`ClientError`].
    pub async fn get_log_merge(&self) -> Result<LogMergeRequest, ClientError> {
        self.ask_for(NetCmd::GetLogMerge, &[]).await
    }

    /// Hands log merge work in.
    ///
    /// # Errors
    /// As [`ClientError`]; ENOENT is no harm.
    pub async fn commit_log_merge(&self, done: &LogMergeComplete) -> Result<(), ClientError> {
        self.tell(NetCmd::CommitLogMerge, done).await
    }

    /// Says farewell and waits until the server freed everything of this mount
    /// (spec 08 section 9), then closes the connection for good. Returns at once if
    /// no server ever greeted this mount, or after [`Client::sever`].
    pub async fn farewell(&self) {
        let inner = &self.inner;
        if inner.conn.borrow().peer_term() != 0
            && let Ok(id) = inner.submit(NetCmd::Farewell, &[])
        {
            // In the same step as the request: greetings carry the flag from here on.
            inner.farewell.set(Some(id));
            let (send, receive) = oneshot::channel();
            inner.waiters.borrow_mut().insert(id, send);
            if let Ok(Err(error)) = receive.await {
                tracing::warn!(%error, "farewell");
            }
        }
        inner.end(Life::Closed);
        if inner.incoming.borrow().is_some() {
            inner.ended.wait().await;
        }
    }

    /// Forced unmount: closes the connection for good. Waiting requests end with
    /// [`ClientError::Aborted`], new ones with [`ClientError::Severed`].
    pub fn sever(&self) {
        probe("client_severed");
        self.inner.end(Life::Severed);
    }

    /// Whether [`Client::sever`] was called.
    pub fn is_severed(&self) -> bool {
        self.inner.life.get() == Life::Severed
    }

    /// How long there has been no connection to a server; `None` while there is one,
    /// and before the first.
    pub fn detached_for(&self) -> Option<Duration> {
        let since = self.inner.detached.get()?;
        Some(self.inner.env.clock.now().since(since))
    }

    /// Whether the volume still lists this mount, read from the device.
    ///
    /// # Errors
    /// As [`LocateError`]: no answer.
    pub async fn is_listed(&self) -> Result<bool, LocateError> {
        self.inner.locator.is_mounted(self.inner.config.rid).await
    }

    /// Term of the last server greeted; 0 if none.
    pub fn server_term(&self) -> u64 {
        self.inner.conn.borrow().peer_term()
    }

    /// Completes when a current super has no mounted client item for this mount
    /// although it is not unmounting: it was fenced and reclaimed, and should sever
    /// itself (spec 08 section 15).
    pub fn evicted(&self) -> LocalBoxFuture<'static, ()> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.evicted.wait().await })
    }
}

#[cfg(test)]
mod tests;

//! What the kernel must forget: notifications, sent by a thread that serves no
//! requests.
//!
//! The kernel takes an inode's page locks to drop pages, and a directory's lock
//! to drop a name; a request that this daemon has not answered yet may hold
//! them. A thread of its own may wait for those, the one that answers may not.
//!
//! What can go wrong: the kernel does not know the inode or name (ENOENT: then
//! there is nothing to forget, unless the caller that asked for it has not run since
//! it was answered: the filesystem is told, and knows); the mount is gone (then
//! there is nothing to forget either).

use crate::abi::{self, notify};
use crate::session::Agreed;
use outrider_core::env::LocalBoxFuture;
use outrider_core::fs::api::{Inval, KernelCache};
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use zerocopy::IntoBytes;

struct Batch {
    what: Vec<Inval>,
    done: tokio::sync::oneshot::Sender<Vec<Inval>>,
}

/// The kernel's caches of one mount. Before [`Notifier::attach`] there are none,
/// and forgetting is immediate.
pub struct Notifier {
    queue: Sender<Batch>,
    target: Arc<OnceLock<Target>>,
}

struct Target {
    fd: Arc<OwnedFd>,
    agreed: Agreed,
}

impl Notifier {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn new() -> std::io::Result<Self> {
        let (queue, jobs) = channel();
        let target = Arc::new(OnceLock::new());
        let shared = Arc::clone(&target);
        std::thread::Builder::new()
            .name("outrider-notify".into())
            .spawn(move || work(&jobs, &shared))?;
        Ok(Self { queue, target })
    }

    /// The mount exists and has agreed with the kernel.
    pub fn attach(&self, fd: Arc<OwnedFd>, agreed: Agreed) {
        let _ = self.target.set(Target { fd, agreed });
    }
}

impl KernelCache for Notifier {
    fn invalidate(&self, what: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        if what.is_empty() || self.target.get().is_none() {
            return Box::pin(std::future::ready(Vec::new()));
        }
        let (done, wait) = tokio::sync::oneshot::channel();
        let sent = self.queue.send(Batch { what, done });
        Box::pin(async move {
            // The thread ends only after its last batch.
            match sent {
                Ok(()) => wait.await.unwrap_or_default(),
                Err(_) => Vec::new(),
            }
        })
    }
}

fn work(jobs: &Receiver<Batch>, target: &OnceLock<Target>) {
    while let Ok(batch) = jobs.recv() {
        let mut unknown = batch.what;
        match target.get() {
            Some(target) => unknown.retain(|what| !target.forget(what)),
            None => unknown.clear(),
        }
        let _ = batch.done.send(unknown);
    }
}

impl Target {
    /// False if the kernel does not know the inode.
    fn forget(&self, what: &Inval) -> bool {
        match what {
            // A negative offset leaves the pages alone and takes no lock.
            Inval::Attr(ino) => self.inode(*ino, -1, 0),
            Inval::Pages(ino) => self.inode(*ino, 0, 0),
            Inval::PageRange { ino, start, len } => {
                // No file reaches beyond what fits; a length of 0 means all.
                let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
                let start = number(*start);
                self.inode(*ino, start, number(*len).min(i64::MAX - start).max(1))
            }
            Inval::Name { parent, name } => self.name(*parent, name),
            // Without the epoch no name was given a time to live.
            Inval::AllNames if self.agreed.inc_epoch() => self.send(notify::INC_EPOCH, &[]),
            Inval::AllNames => true,
        }
    }

    fn inode(&self, ino: u64, off: i64, len: i64) -> bool {
        let out = abi::InvalInodeOut { ino, off, len };
        self.send(notify::INVAL_INODE, &[out.as_bytes()])
    }

    fn name(&self, parent: u64, name: &[u8]) -> bool {
        // Expiring keeps the kernel's entry, and with it `getcwd` below it.
        let expire = self.agreed.flags & abi::init::HAS_EXPIRE_ONLY != 0;
        let out = abi::InvalEntryOut {
            parent,
            namelen: name.len() as u32,
            flags: if expire { abi::EXPIRE_ONLY } else { 0 },
        };
        self.send(notify::INVAL_ENTRY, &[out.as_bytes(), name, b"\0"])
    }

    fn send(&self, code: i32, parts: &[&[u8]]) -> bool {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        let header = abi::OutHeader {
            len: (size_of::<abi::OutHeader>() + len) as u32,
            error: code,
            unique: 0,
        };
        let mut slices = vec![IoSlice::new(header.as_bytes())];
        slices.extend(parts.iter().map(|p| IoSlice::new(p)));
        match rustix::io::writev(&*self.fd, &slices) {
            Ok(_) | Err(rustix::io::Errno::NODEV) => true,
            Err(rustix::io::Errno::NOENT) => false,
            Err(err) => {
                tracing::warn!(code, error = %err, "the kernel refused a notification");
                true
            }
        }
    }
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Notifier").finish_non_exhaustive()
    }
}

//! The POSIX face of the volume: inodes, directories, xattrs, ACLs, file data
//! (spec 11 to 14 and the retention rules of 16).
//!
//! [`Fs`] is one mount's filesystem. It keeps nothing of the volume in memory:
//! inodes and entries are read from the item cache under cluster locks each time.
//! What it has of its own: pools of inode numbers, the open map, what the kernel
//! knows, file data buffers, and mutexes between the tasks of the mount.
//!
//! * [`change`]: the recipe of every modifying operation, and its undo.
//! * `names`, `create`, `remove`, `rename`, `readdir`: directories (spec 12).
//! * [`xattr`], [`tags`], [`acl`]: extended attributes (spec 13).
//! * [`orphan`]: final deletion and the orphan scan (spec 11).
//! * [`data`]: file contents (spec 14).
//!
//! What can go wrong: a half-applied operation that is committed, a cluster lock
//! awaited inside the transaction, the kernel believing what another node has
//! changed. The first two are settled in [`change`], the third in [`Fs::revoke`].

mod acl;
pub mod api;
mod attr;
pub mod change;
mod create;
pub mod data;
pub mod error;
pub mod inode;
pub mod local;
mod names;
mod orphan;
mod pools;
mod posix;
mod readdir;
mod remove;
mod rename;
pub mod table;
pub mod tags;
mod xattr;

pub use change::{Change, Locked, Touch};
pub use error::{FsError, FsResult};
pub use inode::Inode;
pub use names::Found;
pub use orphan::Counters as OrphanCounters;
pub use pools::PoolKind;
pub use rename::RENAME_NOREPLACE;

use crate::env::{BlockDevice, Duration, Env, Gate, LocalBoxFuture, Task, WallTime, mutant, probe};
use crate::errno::Errno;
use crate::format::{OpenInoMap, OpenInoMapArgs, ROOT_INO};
use crate::locks::{Locks, Mode, Scope};
use crate::log::Log;
use api::{Ino, Inval, KernelCache, StatFs};
use data::DataStore;
use local::LocalLocks;
use orphan::Orphans;
use pools::InodePools;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use table::{InodeTable, group_of};

/// What the filesystem asks of the server, beside locks and commits.
pub trait ServerRequests {
    /// Takes inode numbers; the answer is the first number and how many, none if
    /// there are no more (spec 12 section 3).
    fn alloc_inodes(&self, count: u64) -> LocalBoxFuture<'static, Result<(Ino, u64), Errno>>;
    /// Figures of the volume from the server's stable super block.
    fn statfs(&self) -> LocalBoxFuture<'static, Result<StatFs, Errno>>;
    /// Which inodes of a group other mounts have open (spec 11 section 5).
    fn open_ino_map(
        &self,
        args: OpenInoMapArgs,
    ) -> LocalBoxFuture<'static, Result<OpenInoMap, Errno>>;
}

/// How access times move when a file is read. They are kept in memory only and
/// reach the item with the next change (spec 12 section 20).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtimePolicy {
    /// Never.
    Never,
    /// If not later than the last change, or older than a day.
    #[default]
    Relative,
    /// At each read.
    Always,
}

/// FREE choices of this layer, and mount options that belong to it.
#[derive(Clone, Debug)]
pub struct Policy {
    /// How long the kernel may believe names and attributes whose lock is held.
    pub cache_valid: Duration,
    /// Inode numbers asked for at a time.
    pub inode_batch: u64,
    /// Inodes used of each lock group, 1..=1024 (`ino_alloc_per_lock`).
    pub inodes_per_lock: u64,
    /// Time between orphan scans (`orphan_scan_delay_ms`), scattered by a fifth.
    pub orphan_scan_delay: Duration,
    /// POSIX ACLs (`acl`, off by `noacl`).
    pub acl: bool,
    /// Access times.
    pub atime: AtimePolicy,
    /// Entries read under one lock use.
    pub readdir_batch: usize,
    /// Choices of the file data layer.
    pub data: data::Policy,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            cache_valid: Duration::from_secs(3600),
            inode_batch: 10240,
            inodes_per_lock: 1024,
            orphan_scan_delay: Duration::from_secs(10),
            acl: true,
            atime: AtimePolicy::default(),
            readdir_batch: 256,
            data: data::Policy::default(),
        }
    }
}

/// What does not change while mounted.
#[derive(Clone, Debug)]
pub struct Config {
    /// Format version of the volume: length of inode items, retention, projects.
    pub fmt_vers: u64,
    /// FREE choices and mount options.
    pub policy: Policy,
}

/// One mount's filesystem.
pub struct Fs {
    pub(crate) env: Env,
    pub(crate) log: Rc<Log>,
    pub(crate) locks: Locks,
    pub(crate) server: Rc<dyn ServerRequests>,
    pub(crate) kernel: Rc<dyn KernelCache>,
    pub(crate) config: Config,
    pub(crate) data: DataStore,
    pub(crate) local: LocalLocks,
    pub(crate) table: InodeTable,
    pools: InodePools,
    orphans: Orphans,
    next_fh: Cell<u64>,
    /// Grows when a lock is taken back: what was read before may be stale.
    revocations: Cell<u64>,
    stopped: Gate,
    scanner: RefCell<Option<Rc<dyn Task>>>,
    me: Weak<Fs>,
}

impl Fs {
    /// The filesystem of a mount. Nothing runs in the background until
    /// [`Fs::start`].
    pub fn new(
        env: Env,
        log: Rc<Log>,
        locks: Locks,
        server: Rc<dyn ServerRequests>,
        kernel: Rc<dyn KernelCache>,
        data_device: Rc<dyn BlockDevice>,
        config: Config,
    ) -> Rc<Fs> {
        let data = DataStore::new(env.clone(), data_device, config.policy.data.clone());
        Rc::new_cyclic(|me| Fs {
            pools: InodePools::new(&config.policy),
            env,
            log,
            locks,
            server,
            kernel,
            config,
            data,
            local: LocalLocks::default(),
            table: InodeTable::default(),
            orphans: Orphans::default(),
            next_fh: Cell::new(0),
            revocations: Cell::new(0),
            stopped: Gate::default(),
            scanner: RefCell::new(None),
            me: me.clone(),
        })
    }

    /// Starts the background work: the orphan scan.
    pub fn start(&self) {
        let Some(me) = self.me.upgrade() else { return };
        let scan = self
            .env
            .spawn("orphans", async move { me.scan_orphans_forever().await });
        *self.scanner.borrow_mut() = Some(scan);
    }

    /// Asks the background work to end; to be called before the locks and the
    /// log are stopped. What runs ends at its next step.
    pub fn stop(&self) {
        self.stopped.open();
    }

    /// Whether the background work has ended.
    pub fn is_idle(&self) -> bool {
        self.scanner
            .borrow()
            .as_ref()
            .is_none_or(|task| task.is_finished())
    }

    /// Drops what this layer and the kernel remember under a lock that is taken
    /// back, after what was written under it was committed. Takes no locks.
    ///
    /// An answer computed before this was already given, so it is on the list of
    /// what to forget; one computed later sees that `revocations` has moved.
    pub async fn revoke(&self, scope: Scope, new: Mode) {
        let Scope::InodeGroup(ino) = scope else {
            return;
        };
        if new == Mode::Null {
            self.revocations.set(self.revocations.get() + 1);
        }
        self.orphans.revoke(ino);
        if new == Mode::Null {
            self.data_revoke_group(ino);
        }
        for state in self.table.in_group(ino) {
            state.atime.set(None);
        }
        let what = self.kernel_must_forget(ino, new);
        if !what.is_empty() {
            probe("fs.kernel_forgets");
            // Mutant: breaks spec 12 section 25.
            if !mutant("kernel_cache_not_invalidated") {
                self.kernel.invalidate(what).await;
            }
        }
    }

    /// What the kernel may have cached under the lock of a group. With READ left
    /// only pages go that could be written through a mapping.
    fn kernel_must_forget(&self, ino: Ino, new: Mode) -> Vec<Inval> {
        if new != Mode::Null {
            let writable = self
                .table
                .in_group(ino)
                .into_iter()
                .filter(|s| s.writers() > 0);
            return writable.map(|state| Inval::Pages(state.ino)).collect();
        }
        let mut known = self.table.known_in_group(ino);
        if group_of(ino) == group_of(ROOT_INO) && !known.iter().any(|(ino, _)| *ino == ROOT_INO) {
            known.insert(0, (ROOT_INO, false));
        }
        let mut what = Vec::with_capacity(known.len() + 1);
        if !known.is_empty() {
            what.push(Inval::AllNames);
        }
        what.extend(known.into_iter().map(|(ino, is_reg)| {
            if is_reg {
                Inval::Pages(ino)
            } else {
                Inval::Attr(ino)
            }
        }));
        what
    }

    /// Answer to OPEN_INO_MAP: which inodes of a group are open here.
    pub fn open_ino_map(&self, args: &OpenInoMapArgs) -> OpenInoMap {
        self.table.answer(args)
    }

    /// The node's wall clock, as stamped on inodes.
    pub(crate) fn now(&self) -> WallTime {
        self.env.clock.wall()
    }

    /// Policy in use.
    pub fn policy(&self) -> &Policy {
        &self.config.policy
    }
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").finish_non_exhaustive()
    }
}

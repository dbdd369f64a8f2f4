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
//! * `archive`: what archive agents ask for (spec 15).
//!
//! What can go wrong: a half-applied operation that is committed, a cluster lock
//! awaited inside the transaction, the kernel believing what another node has
//! changed. The first two are settled in [`change`], the third in [`Fs::revoke`].

mod acl;
pub mod api;
mod archive;
mod attr;
pub mod belief;
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
use belief::Beliefs;
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

/// How long the kernel may take to look at an answer that gave it an inode.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(2);
/// Time between looks at whether it has.
const UNKNOWN_PAUSE: Duration = Duration::from_micros(200);

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
    beliefs: Beliefs,
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
            beliefs: Beliefs::default(),
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

    /// One attempt to pull the kernel's pages back that may not stay when a lock is
    /// lowered to `new`. The lock still has its old mode, under which the requests
    /// are served that the kernel may wait for: reads that hold pages, and writes of
    /// dirty ones. They may give out more pages; see [`Fs::pages_pulled`].
    pub async fn pull_pages(&self, scope: Scope, new: Mode) {
        let Scope::InodeGroup(ino) = scope else {
            return;
        };
        let what = self.table.pull(ino, new != Mode::Null);
        if !what.is_empty() {
            probe("fs.kernel_gives_pages_back");
            // Mutant: breaks spec 14 section 28, the order of write-back and commit.
            if mutant("written_pages_not_awaited") {
                let forget = self.kernel.invalidate(what);
                self.env.spawn("pull_pages", async move {
                    forget.await;
                });
                return;
            }
            // Mutant: breaks spec 12 section 25.
            if !mutant("kernel_cache_not_invalidated") {
                // An inode that the kernel does not know has no pages.
                self.kernel.invalidate(what).await;
            }
        }
    }

    /// Whether no pages are out that may not stay when the lock is lowered to `new`.
    pub fn pages_pulled(&self, scope: Scope, new: Mode) -> bool {
        match scope {
            Scope::InodeGroup(ino) => self.table.is_pulled(ino, new != Mode::Null),
            _ => true,
        }
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
        self.table.pulled(ino);
        self.orphans.revoke(ino);
        self.table.forget_atimes(ino);
        if new != Mode::Null {
            return;
        }
        self.revocations.set(self.revocations.get() + 1);
        self.data_revoke_group(ino);
        let (believed, until) = self.beliefs.take(ino);
        let what = self.kernel_must_forget(ino, believed);
        if let Some(until) = until.filter(|until| self.env.clock.now() < *until) {
            probe("fs.kernel_takes_its_answers_first");
            self.env.clock.sleep_until(until).await;
        }
        if !what.is_empty() {
            probe("fs.kernel_forgets");
            // Mutant: breaks spec 12 section 25.
            if !mutant("kernel_cache_not_invalidated") {
                self.make_kernel_forget(ino, what).await;
            }
        }
    }

    /// Repeats what is about inodes that the kernel does not know yet, although
    /// their entries were given: it makes them when the caller of the request runs.
    async fn make_kernel_forget(&self, ino: Ino, mut what: Vec<Inval>) {
        let deadline = self.env.clock.now() + UNKNOWN_PATIENCE;
        loop {
            what = self.kernel.invalidate(what).await;
            if what.is_empty() {
                return;
            }
            let known = self.table.known_in_group(ino);
            let is_known = |of: Ino| known.binary_search_by_key(&of, |(ino, _)| *ino).is_ok();
            what.retain(|one| matches!(one, Inval::Attr(of) if *of != ROOT_INO && is_known(*of)));
            if what.is_empty() || self.stopped.is_open() {
                return;
            }
            if self.env.clock.now() >= deadline {
                tracing::warn!(?what, "the kernel never looked at the entries of inodes");
                return;
            }
            probe("fs.kernel_not_yet_knows");
            self.env.sleep(UNKNOWN_PAUSE).await;
        }
    }

    /// What the kernel may have cached under the lock of a group, beside pages:
    /// names in its directories, and attributes of those that it may believe.
    fn kernel_must_forget(&self, ino: Ino, believed: Vec<Ino>) -> Vec<Inval> {
        let known = self.table.known_in_group(ino);
        let mut what = Vec::with_capacity(believed.len() + 1);
        // The root is known without an entry.
        let has_root = group_of(ino) == group_of(ROOT_INO);
        // Names are cached under the lock of their directory.
        if has_root || known.iter().any(|(_, is_dir)| *is_dir) {
            what.push(Inval::AllNames);
        }
        what.extend(believed.into_iter().map(Inval::Attr));
        what
    }

    /// How long the kernel may believe attributes that come with a name.
    fn entry_attr_valid(&self, ino: Ino) -> Duration {
        self.beliefs.keeps(ino, self.env.clock.now());
        self.config.policy.cache_valid
    }

    /// How long the kernel may believe attributes of an inode. Call under its lock,
    /// in the step that answers.
    fn attr_valid(&self, ino: Ino) -> Duration {
        if self.beliefs.give(ino, self.env.clock.now()) {
            self.config.policy.cache_valid
        } else {
            probe("fs.attributes_not_cached");
            Duration::ZERO
        }
    }

    /// Makes the kernel forget all names, attributes and pages.
    pub async fn forget_everything(&self) {
        let mut what = vec![Inval::AllNames, Inval::Pages(ROOT_INO)];
        what.extend(self.table.everything().into_iter().map(Inval::Pages));
        self.kernel.invalidate(what).await;
    }

    /// Answer to OPEN_INO_MAP: which inodes of a group are open here.
    pub fn open_ino_map(&self, args: &OpenInoMapArgs) -> OpenInoMap {
        self.table.answer(args)
    }

    /// Inodes with state in memory, and those the kernel knows; for status.
    pub fn inode_counts(&self) -> (usize, usize) {
        (self.table.state_len(), self.table.known_len())
    }

    /// Inodes in use, with their uses and those that may write; for status.
    pub fn open_inodes(&self) -> Vec<(api::Ino, u32, u32)> {
        self.table.in_use()
    }

    /// Bytes of file data that no device has; for status.
    pub fn dirty_data_bytes(&self) -> u64 {
        self.data.dirty_bytes()
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

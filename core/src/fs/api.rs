//! What stands between the filesystem and its two callers: the FUSE front, and
//! the simulator's workload behind its model of the kernel's caches.
//!
//! [`Posix`] is one method per kernel request. Permission checks by mode and
//! ACL are the kernel's (`default_permissions`); everything that can change
//! between that check and the operation is checked again under cluster locks.
//! [`KernelCache`] goes the other way: what the kernel must forget before a
//! cluster lock is given up.

use crate::env::{AlignedBuf, Duration, LocalBoxFuture, WallTime};
use crate::errno::Errno;
use bytes::Bytes;

/// An inode number. 1 is the root; numbers are never reused.
pub type Ino = u64;

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// Process (thread) id, 0 if outside our pid namespace.
    pub pid: u32,
    /// Supplementary groups, where the transport knows them.
    pub groups: Vec<u32>,
}

/// Attributes of an inode, in `stat` terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Size in bytes.
    pub size: u64,
    /// 512-byte units: 8 for each online or offline block.
    pub blocks: u64,
    /// Last access.
    pub atime: WallTime,
    /// Last contents change.
    pub mtime: WallTime,
    /// Last inode change.
    pub ctime: WallTime,
    /// Creation.
    pub crtime: WallTime,
    /// Type and permission bits.
    pub mode: u32,
    /// Link count.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, `major << 20 | minor` (spec 12 section 2).
    pub rdev: u32,
}

/// An inode as named by a lookup, and how long the kernel may believe it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The inode's attributes.
    pub attr: Attr,
    /// How long the name may be cached; it is invalidated earlier if its lock is revoked.
    pub entry_valid: Duration,
    /// How long the attributes may be cached.
    pub attr_valid: Duration,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The node's clock.
    Now,
    /// This time.
    At(WallTime),
}

/// What `setattr` changes; `None` leaves a field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits (type bits are ignored).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size: truncate or extend.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Change time, where the kernel dictates it.
    pub ctime: Option<WallTime>,
    /// Strip setuid, setgid and capabilities (`FATTR_KILL_SUIDGID`).
    pub kill_suidgid: bool,
}

/// An opened file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Handle for later requests.
    pub fh: u64,
    /// The kernel may keep pages it has from before (`FOPEN_KEEP_CACHE`).
    pub keep_cache: bool,
    /// Pages must bypass the kernel's cache (`FOPEN_DIRECT_IO`).
    pub direct_io: bool,
}

/// One directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode named.
    pub ino: Ino,
    /// Position to continue from after this entry (`d_off`, spec 12 section 17).
    pub next: u64,
    /// `DT_*` type.
    pub dtype: u8,
    /// Name bytes.
    pub name: Bytes,
    /// With `readdirplus`: the inode, if it could be had without waiting for another node.
    pub entry: Option<Entry>,
}

/// The bytes of a write.
#[derive(Debug)]
pub enum WriteData {
    /// Bytes that are copied to where they are kept.
    Copied(Bytes),
    /// Whole blocks in memory of their own, which may become the file system's.
    Blocks(AlignedBuf),
}

impl std::ops::Deref for WriteData {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Copied(bytes) => bytes,
            Self::Blocks(buf) => buf,
        }
    }
}

impl From<Bytes> for WriteData {
    fn from(bytes: Bytes) -> Self {
        Self::Copied(bytes)
    }
}

/// How a write arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteHow {
    /// Write-back of pages dirtied through a mapping (`FUSE_WRITE_CACHE`).
    pub from_pages: bool,
    /// The file was opened with `O_APPEND`.
    pub append: bool,
    /// `O_SYNC` or `O_DSYNC`: commit before answering.
    pub sync: bool,
    /// Strip setuid, setgid and capabilities.
    pub kill_suidgid: bool,
}

/// `lseek` kinds the daemon answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// `SEEK_DATA`.
    Data,
    /// `SEEK_HOLE`.
    Hole,
}

/// `statfs` figures; block size is 4096 (spec 03 section 19).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatFs {
    /// Total 4 KiB blocks.
    pub blocks: u64,
    /// Free 4 KiB blocks.
    pub free: u64,
    /// Total inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
}

/// One extent for `get-fiemap` (FUSE never passes FIEMAP; spec 14 section 13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FiemapExtent {
    /// Byte offset in the file.
    pub logical: u64,
    /// Byte offset on the data device; 0 for offline extents.
    pub physical: u64,
    /// Length in bytes.
    pub length: u64,
    /// `FIEMAP_EXTENT_*` flags.
    pub flags: u32,
}

/// Setting an xattr: what must hold before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XattrSet {
    /// Create or replace.
    #[default]
    Any,
    /// `XATTR_CREATE`: must not exist (EEXIST).
    Create,
    /// `XATTR_REPLACE`: must exist (ENODATA).
    Replace,
}

/// The filesystem, one method per kernel request. Every future may be polled
/// once in place and answers without waiting where the locks and items are cached.
#[allow(async_fn_in_trait)] // one thread per actor: futures need not be `Send`
pub trait Posix {
    /// Finds `name` in `parent`. Names `.` and `..` open an inode by number or
    /// its parent, for export handles (ESTALE if gone).
    async fn lookup(&self, cx: &Caller, parent: Ino, name: &[u8]) -> Result<Entry, Errno>;
    /// The kernel drops `count` references it got from entries.
    fn forget(&self, ino: Ino, count: u64);
    /// Attributes, and how long they may be cached.
    async fn getattr(&self, cx: &Caller, ino: Ino) -> Result<(Attr, Duration), Errno>;
    /// Changes attributes; returns the new ones.
    async fn setattr(
        &self,
        cx: &Caller,
        ino: Ino,
        set: &SetAttr,
    ) -> Result<(Attr, Duration), Errno>;
    /// Target of a symbolic link, without the NUL.
    async fn readlink(&self, cx: &Caller, ino: Ino) -> Result<Bytes, Errno>;
    /// Makes a file of any type but directory and symlink. `mode` is not yet
    /// masked: `umask` applies only where no default ACL does.
    async fn mknod(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> Result<Entry, Errno>;
    /// Makes a directory.
    async fn mkdir(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> Result<Entry, Errno>;
    /// Removes a non-directory name.
    async fn unlink(&self, cx: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno>;
    /// Removes an empty directory.
    async fn rmdir(&self, cx: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno>;
    /// Makes a symbolic link.
    async fn symlink(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> Result<Entry, Errno>;
    /// Renames; `flags` are `RENAME_*` bits.
    async fn rename(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: u32,
    ) -> Result<(), Errno>;
    /// Adds a name to an inode.
    async fn link(
        &self,
        cx: &Caller,
        ino: Ino,
        new_parent: Ino,
        new_name: &[u8],
    ) -> Result<Entry, Errno>;
    /// Opens a file; `flags` are `O_*` bits, without `O_TRUNC`: that comes as a
    /// truncation of its own.
    async fn open(&self, cx: &Caller, ino: Ino, flags: u32) -> Result<Opened, Errno>;
    /// Creates and opens a file in one step (opens it if it exists and `O_EXCL` is not set).
    async fn create(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
        flags: u32,
    ) -> Result<(Entry, Opened), Errno>;
    /// Makes and opens a file without a name (`O_TMPFILE`).
    async fn tmpfile(
        &self,
        cx: &Caller,
        parent: Ino,
        mode: u32,
        umask: u32,
        flags: u32,
    ) -> Result<(Entry, Opened), Errno>;
    /// Reads up to `size` bytes at `offset`; short only at the end of the file.
    /// The pieces follow each other.
    async fn read(
        &self,
        cx: &Caller,
        ino: Ino,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<Bytes>, Errno>;
    /// Writes; returns how many bytes were taken.
    async fn write(
        &self,
        cx: &Caller,
        ino: Ino,
        fh: u64,
        offset: u64,
        data: WriteData,
        how: WriteHow,
    ) -> Result<u32, Errno>;
    /// Closes a handle of `open`, `create` or `tmpfile`.
    async fn release(&self, ino: Ino, fh: u64);
    /// Commits the mount's transaction (spec 04 section 7.2).
    async fn fsync(&self, cx: &Caller, ino: Ino, fh: u64, datasync: bool) -> Result<(), Errno>;
    /// Commits the mount's transaction.
    async fn syncfs(&self) -> Result<(), Errno>;
    /// Sets an extended attribute.
    async fn setxattr(
        &self,
        cx: &Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: XattrSet,
    ) -> Result<(), Errno>;
    /// Value of an extended attribute (ENODATA if absent).
    async fn getxattr(&self, cx: &Caller, ino: Ino, name: &[u8]) -> Result<Bytes, Errno>;
    /// Names of the extended attributes, each ended by a NUL.
    async fn listxattr(&self, cx: &Caller, ino: Ino) -> Result<Bytes, Errno>;
    /// Removes an extended attribute.
    async fn removexattr(&self, cx: &Caller, ino: Ino, name: &[u8]) -> Result<(), Errno>;
    /// Opens a directory.
    async fn opendir(&self, cx: &Caller, ino: Ino, flags: u32) -> Result<Opened, Errno>;
    /// Entries from `offset` on, `.` and `..` included; `sink` returns false when full.
    async fn readdir(
        &self,
        cx: &Caller,
        ino: Ino,
        fh: u64,
        offset: u64,
        plus: bool,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), Errno>;
    /// Closes a handle of `opendir`.
    async fn releasedir(&self, ino: Ino, fh: u64);
    /// Figures of the volume.
    async fn statfs(&self) -> Result<StatFs, Errno>;
    /// Preallocates; `mode` are `FALLOC_FL_*` bits.
    async fn fallocate(
        &self,
        cx: &Caller,
        ino: Ino,
        fh: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno>;
    /// Next data or hole at or after `offset`.
    async fn lseek(
        &self,
        cx: &Caller,
        ino: Ino,
        fh: u64,
        offset: u64,
        whence: Whence,
    ) -> Result<u64, Errno>;
    /// Extents of a file from byte `start`, at most `max`.
    async fn fiemap(
        &self,
        cx: &Caller,
        ino: Ino,
        start: u64,
        len: u64,
        max: usize,
    ) -> Result<Vec<FiemapExtent>, Errno>;
}

/// Which index of inodes to walk, with its number in the ioctl (spec 15 section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum InodeIndex {
    /// All inodes, by the seq of their last change.
    MetaSeq = 0,
    /// Regular files, by the seq of the last change of their contents.
    DataSeq = 1,
}

/// A place in an index of inodes, in the order of the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct IndexEntry {
    /// Seq of the change.
    pub major: u64,
    /// The inode.
    pub ino: Ino,
}

impl IndexEntry {
    /// Behind all others.
    pub const LAST: Self = Self {
        major: u64::MAX,
        ino: Ino::MAX,
    };

    /// The next place, from which to go on after this one; `None` after the last.
    pub fn next(self) -> Option<Self> {
        match self.ino.checked_add(1) {
            Some(ino) => Some(Self { ino, ..self }),
            None => Some(Self {
                major: self.major.checked_add(1)?,
                ino: 0,
            }),
        }
    }
}

/// What `stat` does not tell (spec 15 section 7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatMore {
    /// Seq of the last change.
    pub meta_seq: u64,
    /// Seq of the last change of contents or size; only of files is it in an index.
    pub data_seq: u64,
    /// Version of the contents, as archive agents know it.
    pub data_version: u64,
    /// Blocks of 4096 bytes that are on the device.
    pub online_blocks: u64,
    /// Blocks of 4096 bytes that only the archive has.
    pub offline_blocks: u64,
    /// Time of creation.
    pub crtime: WallTime,
}

/// What archive agents ask for, beside files (spec 15).
#[allow(async_fn_in_trait)] // one thread per actor: futures need not be `Send`
pub trait Archive {
    /// Entries of an index from `first` to `last`, both included, in order, at most
    /// `max`; none only if there are none that are stable. Nothing is shown of a
    /// transaction that may yet be lost, or that is younger than such a one: so an entry
    /// never appears before one that was shown already. An error after some entries
    /// gives these.
    async fn walk_inodes(
        &self,
        index: InodeIndex,
        first: IndexEntry,
        last: IndexEntry,
        max: usize,
    ) -> Result<Vec<IndexEntry>, Errno>;
    /// The seq up to which all transactions of all mounts are durable. Never falls.
    async fn committed_seq(&self) -> Result<u64, Errno>;
    /// The rest of an inode's attributes (ESTALE if gone).
    async fn stat_more(&self, ino: Ino) -> Result<StatMore, Errno>;
}

/// One thing the kernel must forget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inval {
    /// Attributes and ACLs of an inode (takes no kernel locks).
    Attr(Ino),
    /// Attributes and all pages of an inode; dirty pages are written first.
    Pages(Ino),
    /// Attributes, and the pages of a range.
    PageRange {
        /// The inode.
        ino: Ino,
        /// First byte.
        start: u64,
        /// Number of bytes, not 0.
        len: u64,
    },
    /// A name (positive or negative) in a directory.
    Name {
        /// The directory.
        parent: Ino,
        /// The name.
        name: Bytes,
    },
    /// All names everywhere (the epoch bump, where the kernel has it; else every
    /// name the front knows).
    AllNames,
}

/// The kernel's caches, as seen by the filesystem.
pub trait KernelCache {
    /// Makes the kernel forget; completes when it has. Dropping pages waits for
    /// requests under way that hold them. Never called while a transaction is held.
    ///
    /// Gives back what is about an inode that the kernel does not know: it has
    /// forgotten it, or it has not yet looked at the answer by which it will know it.
    fn invalidate(&self, what: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>>;
}

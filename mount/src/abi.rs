//! The FUSE kernel interface, versions 7.31 to 7.45: opcodes, flags and the
//! structures that cross `/dev/fuse`, in the machine's own byte order.
//!
//! Sizes are asserted at compile time; field names are the kernel's.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version spoken.
pub const MAJOR: u32 = 7;
/// Newest minor version known here.
pub const MINOR: u32 = 45;
/// Oldest minor version served (Linux 5.4).
pub const MINOR_MIN: u32 = 31;
/// First minor version with `NOTIFY_INC_EPOCH`.
pub const MINOR_INC_EPOCH: u32 = 44;

macro_rules! opcodes {
    ($($name:ident = $value:literal,)*) => {
        /// Request numbers.
        #[allow(missing_docs)] // the names are the kernel's
        pub mod op {
            $(pub const $name: u32 = $value;)*
            /// The kernel's name of a request, for logs.
            pub const fn name(opcode: u32) -> &'static str {
                match opcode { $($value => stringify!($name),)* _ => "unknown" }
            }
        }
    };
}

opcodes! {
    LOOKUP = 1, FORGET = 2, GETATTR = 3, SETATTR = 4, READLINK = 5, SYMLINK = 6,
    MKNOD = 8, MKDIR = 9, UNLINK = 10, RMDIR = 11, RENAME = 12, LINK = 13,
    OPEN = 14, READ = 15, WRITE = 16, STATFS = 17, RELEASE = 18, FSYNC = 20,
    SETXATTR = 21, GETXATTR = 22, LISTXATTR = 23, REMOVEXATTR = 24, FLUSH = 25,
    INIT = 26, OPENDIR = 27, READDIR = 28, RELEASEDIR = 29, FSYNCDIR = 30,
    GETLK = 31, SETLK = 32, SETLKW = 33, ACCESS = 34, CREATE = 35, INTERRUPT = 36,
    BMAP = 37, DESTROY = 38, IOCTL = 39, POLL = 40, NOTIFY_REPLY = 41,
    BATCH_FORGET = 42, FALLOCATE = 43, READDIRPLUS = 44, RENAME2 = 45, LSEEK = 46,
    COPY_FILE_RANGE = 47, SETUPMAPPING = 48, REMOVEMAPPING = 49, SYNCFS = 50,
    TMPFILE = 51, STATX = 52, COPY_FILE_RANGE_64 = 53,
}

/// Flags of INIT, both words as one.
#[allow(missing_docs)] // the names are the kernel's
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const HAS_IOCTL_DIR: u64 = 1 << 11;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
    pub const HAS_EXPIRE_ONLY: u64 = 1 << 35;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// Bits of [`SetattrIn::valid`].
#[allow(missing_docs)] // the names are the kernel's
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const CTIME: u32 = 1 << 10;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FOPEN_*`: answer of OPEN.
#[allow(missing_docs)]
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
}

/// `FUSE_WRITE_CACHE`: pages dirtied through a mapping; the handle is a guess.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `FUSE_IOCTL_DIR` and the kinds that are not served: 32-bit callers.
pub const IOCTL_COMPAT: u32 = 1 << 0 | 1 << 3 | 1 << 5;
/// Extension with the caller's supplementary group that matters.
pub const EXT_GROUPS: u32 = 32;
/// `FUSE_EXPIRE_ONLY`: keep the name, ask again at its next use.
pub const EXPIRE_ONLY: u32 = 1 << 0;

/// Notification codes.
#[allow(missing_docs)]
pub mod notify {
    pub const INVAL_INODE: i32 = 2;
    pub const INVAL_ENTRY: i32 = 3;
    pub const INC_EPOCH: i32 = 8;
}

macro_rules! abi {
    ($($(#[$doc:meta])* $name:ident[$size:literal] { $($field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[allow(missing_docs)] // the names are the kernel's
            #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
            #[repr(C)]
            pub struct $name { $(pub $field: $ty,)* }
            const _: () = assert!(size_of::<$name>() == $size);
        )*
    };
}

abi! {
    /// Head of every request.
    InHeader[40] {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Head of every answer and notification.
    OutHeader[16] { len: u32, error: i32, unique: u64, }
    /// Attributes.
    AttrBlock[88] {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32,
        uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// Answer of LOOKUP and of everything that makes a name.
    EntryOut[128] {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: AttrBlock,
    }
    /// Answer of GETATTR and SETATTR.
    AttrOut[104] { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: AttrBlock, }
    /// FORGET.
    ForgetIn[8] { nlookup: u64, }
    /// One of BATCH_FORGET.
    ForgetOne[16] { nodeid: u64, nlookup: u64, }
    /// Head of BATCH_FORGET.
    BatchForgetIn[8] { count: u32, dummy: u32, }
    /// GETATTR.
    GetattrIn[16] { getattr_flags: u32, dummy: u32, fh: u64, }
    /// SETATTR.
    SetattrIn[88] {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64,
        atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    /// MKNOD.
    MknodIn[16] { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// MKDIR.
    MkdirIn[8] { mode: u32, umask: u32, }
    /// RENAME.
    RenameIn[8] { newdir: u64, }
    /// RENAME2.
    Rename2In[16] { newdir: u64, flags: u32, padding: u32, }
    /// LINK.
    LinkIn[8] { oldnodeid: u64, }
    /// OPEN and OPENDIR.
    OpenIn[8] { flags: u32, open_flags: u32, }
    /// CREATE and TMPFILE.
    CreateIn[16] { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// Answer of OPEN.
    OpenOut[16] { fh: u64, open_flags: u32, padding: u32, }
    /// RELEASE and RELEASEDIR.
    ReleaseIn[24] { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// READ, READDIR and READDIRPLUS.
    ReadIn[40] {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// WRITE.
    WriteIn[40] {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// Answer of WRITE.
    WriteOut[8] { size: u32, padding: u32, }
    /// Answer of STATFS.
    StatfsOut[80] {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64,
        bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
    }
    /// FSYNC and FSYNCDIR.
    FsyncIn[16] { fh: u64, fsync_flags: u32, padding: u32, }
    /// SETXATTR without the extension.
    SetxattrCompatIn[8] { size: u32, flags: u32, }
    /// SETXATTR.
    SetxattrIn[16] { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    /// GETXATTR and LISTXATTR.
    GetxattrIn[8] { size: u32, padding: u32, }
    /// Their answer to a question for the size.
    GetxattrOut[8] { size: u32, padding: u32, }
    /// INIT, as far as 7.31 has it.
    InitIn[16] { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    /// Answer of INIT.
    InitOut[64] {
        major: u32, minor: u32, max_readahead: u32, flags: u32,
        max_background: u16, congestion_threshold: u16, max_write: u32, time_gran: u32,
        max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    /// INTERRUPT.
    InterruptIn[8] { unique: u64, }
    /// IOCTL.
    IoctlIn[32] { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    /// Answer of IOCTL.
    IoctlOut[16] { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    /// FALLOCATE.
    FallocateIn[32] { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// LSEEK.
    LseekIn[24] { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// Answer of LSEEK.
    LseekOut[8] { offset: u64, }
    /// A directory entry; the name follows, padded to 8 bytes.
    DirentHead[24] { ino: u64, off: u64, namelen: u32, kind: u32, }
    /// Notification: forget an inode's attributes and pages.
    InvalInodeOut[24] { ino: u64, off: i64, len: i64, }
    /// Notification: forget a name, which follows with a NUL.
    InvalEntryOut[16] { parent: u64, namelen: u32, flags: u32, }
    /// STATX.
    StatxIn[24] { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// A time of STATX.
    SxTime[16] { sec: i64, nsec: u32, reserved: i32, }
    /// Answer of STATX.
    StatxOut[288] {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2],
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32,
        mode: u16, spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64,
        atime: SxTime, btime: SxTime, ctime: SxTime, mtime: SxTime,
        rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    /// Head of a request extension.
    ExtHeader[8] { size: u32, kind: u32, }
}

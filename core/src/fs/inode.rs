//! An inode in memory: every field of its item (spec 12 section 2), and what
//! users see of it.
//!
//! There is no inode cache: attributes are read from the inode item each time,
//! under the inode's lock; the item cache is the cache.
//!
//! What can go wrong: an index item that does not match the stored seqs. The
//! fields `meta_seq` and `data_seq` hold what the item on disk says, and only
//! [`super::Change::put_inode`] moves them, together with the index items.

use super::api::{Attr, Ino};
use super::error::{FsError, FsResult};
use crate::env::WallTime;
use crate::format::{self, Key, Timespec};
use bytes::Bytes;

/// Mode bits of the file type.
pub const S_IFMT: u32 = 0o170_000;
/// Socket.
pub const S_IFSOCK: u32 = 0o140_000;
/// Symbolic link.
pub const S_IFLNK: u32 = 0o120_000;
/// Regular file.
pub const S_IFREG: u32 = 0o100_000;
/// Block device.
pub const S_IFBLK: u32 = 0o060_000;
/// Directory.
pub const S_IFDIR: u32 = 0o040_000;
/// Character device.
pub const S_IFCHR: u32 = 0o020_000;
/// FIFO.
pub const S_IFIFO: u32 = 0o010_000;
/// Set user id on execution.
pub const S_ISUID: u32 = 0o4000;
/// Set group id on execution; on directories: new entries get the directory's group.
pub const S_ISGID: u32 = 0o2000;
/// Execution by the group.
pub const S_IXGRP: u32 = 0o010;

/// An inode's item, in native integers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub ino: Ino,
    /// Bytes; directory: sum of name lengths; symlink: target and NUL.
    pub size: u64,
    /// Seq under which the META_SEQ index has it.
    pub meta_seq: u64,
    /// Seq under which the DATA_SEQ index has it, if it is a regular file.
    pub data_seq: u64,
    /// Counts changes of contents.
    pub data_version: u64,
    /// 4 KiB blocks mapped and written.
    pub online_blocks: u64,
    /// 4 KiB blocks offline.
    pub offline_blocks: u64,
    /// Next entry position of a directory.
    pub next_readdir_pos: u64,
    /// Next xattr id; 0 means that it never had an xattr.
    pub next_xattr_id: u64,
    /// Change counter.
    pub version: u64,
    /// Link count.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Type and permissions.
    pub mode: u32,
    /// Device number, `major << 20 | minor`.
    pub rdev: u32,
    /// `INODE_FLAG_*`; unknown bits are kept.
    pub flags: u32,
    /// Last access.
    pub atime: WallTime,
    /// Last inode change.
    pub ctime: WallTime,
    /// Last contents change.
    pub mtime: WallTime,
    /// Creation.
    pub crtime: WallTime,
    /// Project id; 0 in format version 1.
    pub proj: u64,
    /// The item's value as it was read: what an undo puts back.
    pub(super) stored: Option<Bytes>,
}

fn from_disk(time: Timespec) -> WallTime {
    // The kernel refuses nanoseconds of a second or more.
    WallTime {
        sec: time.sec.get(),
        nsec: time.nsec.get().min(999_999_999),
    }
}

fn to_disk(time: WallTime) -> Timespec {
    Timespec::new(time.sec, time.nsec)
}

impl Inode {
    /// A new inode with nothing in it; all four times are `now`.
    pub fn new(ino: Ino, mode: u32, nlink: u32, now: WallTime) -> Self {
        Self {
            ino,
            size: 0,
            meta_seq: 0,
            data_seq: 0,
            data_version: 0,
            online_blocks: 0,
            offline_blocks: 0,
            next_readdir_pos: format::DIRENT_FIRST_POS,
            next_xattr_id: 0,
            version: 0,
            nlink,
            uid: 0,
            gid: 0,
            mode,
            rdev: 0,
            flags: 0,
            atime: now,
            ctime: now,
            mtime: now,
            crtime: now,
            proj: 0,
            stored: None,
        }
    }

    /// Reads the value of an inode item.
    ///
    /// # Errors
    /// [`FsError::Value`] if its length is not one of the volume's format version.
    pub fn decode(ino: Ino, value: &[u8], fmt_vers: u64) -> FsResult<Self> {
        let d = format::Inode::from_value(value, fmt_vers).map_err(|error| FsError::Value {
            key: Key::inode(ino),
            error,
        })?;
        Ok(Self {
            ino,
            size: d.size.get(),
            meta_seq: d.meta_seq.get(),
            data_seq: d.data_seq.get(),
            data_version: d.data_version.get(),
            online_blocks: d.online_blocks.get(),
            offline_blocks: d.offline_blocks.get(),
            next_readdir_pos: d.next_readdir_pos.get(),
            next_xattr_id: d.next_xattr_id.get(),
            version: d.version.get(),
            nlink: d.nlink.get(),
            uid: d.uid.get(),
            gid: d.gid.get(),
            mode: d.mode.get(),
            rdev: d.rdev.get(),
            flags: d.flags.get(),
            atime: from_disk(d.atime),
            ctime: from_disk(d.ctime),
            mtime: from_disk(d.mtime),
            crtime: from_disk(d.crtime),
            proj: d.proj.get(),
            stored: None,
        })
    }

    /// The item's fields; `to_value` of the result gives the bytes to store.
    pub fn encode(&self) -> format::Inode {
        format::Inode {
            size: self.size.into(),
            meta_seq: self.meta_seq.into(),
            data_seq: self.data_seq.into(),
            data_version: self.data_version.into(),
            online_blocks: self.online_blocks.into(),
            offline_blocks: self.offline_blocks.into(),
            next_readdir_pos: self.next_readdir_pos.into(),
            next_xattr_id: self.next_xattr_id.into(),
            version: self.version.into(),
            nlink: self.nlink.into(),
            uid: self.uid.into(),
            gid: self.gid.into(),
            mode: self.mode.into(),
            rdev: self.rdev.into(),
            flags: self.flags.into(),
            atime: to_disk(self.atime),
            ctime: to_disk(self.ctime),
            mtime: to_disk(self.mtime),
            crtime: to_disk(self.crtime),
            proj: self.proj.into(),
        }
    }

    /// What `stat` shows (spec 12 section 2).
    pub fn attr(&self) -> Attr {
        Attr {
            ino: self.ino,
            size: self.size,
            blocks: self
                .online_blocks
                .saturating_add(self.offline_blocks)
                .saturating_mul(8),
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            crtime: self.crtime,
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
        }
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_reg(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    /// Whether it is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.mode & S_IFMT == S_IFLNK
    }

    /// Whether changing it is forbidden (spec 16 section 11).
    pub fn is_retained(&self) -> bool {
        self.flags & format::INODE_FLAG_RETENTION != 0
    }

    /// Whether removing one name leaves it without any: one name, or an empty
    /// directory's name and its `.` (spec 11 section 3).
    pub fn is_last_link(&self) -> bool {
        self.nlink <= if self.is_dir() { 2 } else { 1 }
    }

    /// Takes one name away.
    pub fn drop_link(&mut self) {
        let by = if self.is_dir() { 2 } else { 1 };
        self.nlink = self.nlink.saturating_sub(by);
    }

    /// Notes a change: the change counter grows and `ctime` moves.
    pub fn changed(&mut self, now: WallTime) {
        self.version = self.version.wrapping_add(1);
        self.ctime = now;
    }

    /// Clears set-user-id, and set-group-id where it means execution, as writes,
    /// truncates and changes of owner by the unprivileged do.
    pub fn strip_ids(&mut self) {
        if self.is_dir() {
            return;
        }
        self.mode &= !S_ISUID;
        if self.mode & S_IXGRP != 0 {
            self.mode &= !S_ISGID;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno::Errno;

    fn sample() -> Inode {
        let time = |sec| WallTime {
            sec,
            nsec: 999_999_999,
        };
        Inode {
            size: 5,
            meta_seq: 7,
            data_seq: 6,
            proj: 9,
            flags: 0x8000_0003,
            atime: time(-1),
            ..Inode::new(1030, S_IFREG | 0o640, 1, time(1_700_000_000))
        }
    }

    #[test]
    fn survives_its_encoding() {
        let inode = sample();
        let disk = inode.encode();
        assert_eq!(Inode::decode(1030, disk.to_value(2), 2).unwrap(), inode);
        assert_eq!(&disk.to_value(2)[96..104], &[0xff; 8], "seconds are signed");
    }

    #[test]
    fn lengths_follow_the_format_version() {
        let disk = sample().encode();
        assert_eq!(disk.to_value(1).len(), 160);
        let old = Inode::decode(1030, disk.to_value(1), 2).unwrap();
        assert_eq!(old.proj, 0);
        for (len, fmt_vers) in [(168, 1), (159, 2), (0, 2), (169, 2)] {
            let error = Inode::decode(1030, &vec![0; len], fmt_vers).unwrap_err();
            assert_eq!(error.errno(), Errno::EIO);
        }
    }

    #[test]
    fn stat_counts_online_and_offline_blocks() {
        let inode = Inode {
            online_blocks: 3,
            offline_blocks: 2,
            ..sample()
        };
        assert_eq!(inode.attr().blocks, 40);
    }

    #[test]
    fn set_ids_are_stripped_where_they_mean_execution() {
        let strip = |mode| {
            let mut inode = Inode::new(1, mode, 1, WallTime::default());
            inode.strip_ids();
            inode.mode
        };
        assert_eq!(strip(S_IFREG | 0o6755), S_IFREG | 0o755);
        assert_eq!(strip(S_IFREG | 0o6745), S_IFREG | 0o2745);
        assert_eq!(strip(S_IFDIR | 0o6755), S_IFDIR | 0o6755);
    }
}

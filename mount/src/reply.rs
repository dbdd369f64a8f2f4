//! Answers in the kernel's form: attributes, entries, directory blocks.

use crate::abi;
use outrider_core::env::Duration;
use outrider_core::env::WallTime;
use outrider_core::fs::api::{Attr, DirEntry, Entry, Opened, SetAttr, SetTime, StatFs};
use zerocopy::IntoBytes;

/// What the session may promise the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    /// Names may be cached: they can all be taken back at once.
    pub names: bool,
}

/// `major << 20 | minor` to the kernel's form.
pub fn rdev_out(rdev: u32) -> u32 {
    let (major, minor) = (rdev >> 20, rdev & 0xf_ffff);
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

/// The kernel's form of a device number to `major << 20 | minor`.
pub fn rdev_in(rdev: u32) -> u32 {
    let major = (rdev >> 8) & 0xfff;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    major << 20 | minor
}

/// Attributes in the kernel's form.
pub fn attr(attr: &Attr) -> abi::AttrBlock {
    abi::AttrBlock {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.atime.sec as u64,
        mtime: attr.mtime.sec as u64,
        ctime: attr.ctime.sec as u64,
        atimensec: attr.atime.nsec,
        mtimensec: attr.mtime.nsec,
        ctimensec: attr.ctime.nsec,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: rdev_out(attr.rdev),
        blksize: 4096,
        flags: 0,
    }
}

/// Answer of GETATTR and SETATTR.
pub fn attr_out(value: &Attr, valid: Duration) -> abi::AttrOut {
    abi::AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        dummy: 0,
        attr: attr(value),
    }
}

/// Answer of LOOKUP and others.
pub fn entry_out(entry: &Entry, promise: Promise) -> abi::EntryOut {
    let names = if promise.names {
        entry.entry_valid
    } else {
        Duration::ZERO
    };
    abi::EntryOut {
        nodeid: entry.attr.ino,
        generation: 0,
        entry_valid: names.as_secs(),
        attr_valid: entry.attr_valid.as_secs(),
        entry_valid_nsec: names.subsec_nanos(),
        attr_valid_nsec: entry.attr_valid.subsec_nanos(),
        attr: attr(&entry.attr),
    }
}

/// Answer of OPEN and OPENDIR.
pub fn open_out(opened: &Opened) -> abi::OpenOut {
    let mut flags = 0;
    if opened.keep_cache {
        flags |= abi::fopen::KEEP_CACHE;
    }
    if opened.direct_io {
        flags |= abi::fopen::DIRECT_IO;
    }
    abi::OpenOut {
        fh: opened.fh,
        open_flags: flags,
        padding: 0,
    }
}

/// Answer of STATFS.
pub fn statfs_out(stat: &StatFs) -> abi::StatfsOut {
    abi::StatfsOut {
        blocks: stat.blocks,
        bfree: stat.free,
        bavail: stat.free,
        files: stat.files,
        ffree: stat.files_free,
        bsize: 4096,
        namelen: 255,
        frsize: 4096,
        ..abi::StatfsOut::default()
    }
}

fn sx_time(time: WallTime) -> abi::SxTime {
    abi::SxTime {
        sec: time.sec,
        nsec: time.nsec,
        reserved: 0,
    }
}

/// Answer of STATX: the basic attributes and the time of birth.
pub fn statx_out(attr: &Attr, valid: Duration) -> abi::StatxOut {
    const BASIC_AND_BTIME: u32 = 0x7ff | 0x800;
    abi::StatxOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        mask: BASIC_AND_BTIME,
        blksize: 4096,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: attr.mode as u16,
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: sx_time(attr.atime),
        btime: sx_time(attr.crtime),
        ctime: sx_time(attr.ctime),
        mtime: sx_time(attr.mtime),
        rdev_major: attr.rdev >> 20,
        rdev_minor: attr.rdev & 0xf_ffff,
        ..abi::StatxOut::default()
    }
}

fn wall(sec: u64, nsec: u32) -> WallTime {
    WallTime {
        sec: sec as i64,
        // The kernel never sends more; core relies on it.
        nsec: nsec.min(999_999_999),
    }
}

/// What a SETATTR asks for.
pub fn setattr_in(args: &abi::SetattrIn) -> SetAttr {
    use abi::fattr;
    let has = |bit| args.valid & bit != 0;
    let time = |bit, now, sec, nsec| match (has(bit), has(now)) {
        (_, true) => Some(SetTime::Now),
        (true, false) => Some(SetTime::At(wall(sec, nsec))),
        (false, false) => None,
    };
    SetAttr {
        mode: has(fattr::MODE).then_some(args.mode),
        uid: has(fattr::UID).then_some(args.uid),
        gid: has(fattr::GID).then_some(args.gid),
        size: has(fattr::SIZE).then_some(args.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, args.atime, args.atimensec),
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, args.mtime, args.mtimensec),
        ctime: has(fattr::CTIME).then(|| wall(args.ctime, args.ctimensec)),
        kill_suidgid: has(fattr::KILL_SUIDGID),
    }
}

/// A directory block being filled, for READDIR and READDIRPLUS.
#[derive(Debug)]
pub struct DirBlock {
    bytes: Vec<u8>,
    limit: usize,
    plus: bool,
    promise: Promise,
    /// Inodes to which the block gives the kernel a reference.
    pub looked_up: Vec<u64>,
}

impl DirBlock {
    /// An empty block of at most `limit` bytes.
    pub fn new(limit: usize, plus: bool, promise: Promise) -> Self {
        Self {
            bytes: Vec::with_capacity(limit.min(1 << 20)),
            limit,
            plus,
            promise,
            looked_up: Vec::new(),
        }
    }

    /// Adds an entry; false if it does not fit.
    pub fn push(&mut self, entry: &DirEntry) -> bool {
        let head = if self.plus {
            size_of::<abi::EntryOut>()
        } else {
            0
        } + size_of::<abi::DirentHead>();
        let len = (head + entry.name.len()).next_multiple_of(8);
        if self.bytes.len() + len > self.limit {
            return false;
        }
        let end = self.bytes.len() + len;
        if self.plus {
            let dots = &entry.name[..] == b"." || &entry.name[..] == b"..";
            // The kernel takes no reference for dots, and none where there is no inode.
            let out = match &entry.entry {
                Some(found) if !dots => {
                    self.looked_up.push(found.attr.ino);
                    entry_out(found, self.promise)
                }
                _ => abi::EntryOut::default(),
            };
            self.bytes.extend_from_slice(out.as_bytes());
        }
        let dirent = abi::DirentHead {
            ino: entry.ino,
            off: entry.next,
            namelen: entry.name.len() as u32,
            kind: u32::from(entry.dtype),
        };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(&entry.name);
        self.bytes.resize(end, 0);
        true
    }

    /// The filled part.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn device_numbers_survive_the_way_in_and_out() {
        for (major, minor) in [(1u32, 3u32), (259, 65537), (4095, 0xf_ffff), (0, 0)] {
            let rdev = major << 20 | minor;
            assert_eq!(rdev_in(rdev_out(rdev)), rdev);
        }
        assert_eq!(rdev_out(1 << 20 | 3), 0x103);
    }

    #[test]
    fn a_directory_block_never_grows_past_its_limit() {
        let promise = Promise { names: true };
        for plus in [false, true] {
            let mut block = DirBlock::new(1000, plus, promise);
            let mut count = 0;
            loop {
                let entry = DirEntry {
                    ino: 5,
                    next: count + 1,
                    dtype: 8,
                    name: Bytes::from(format!("name-{count}")),
                    entry: Some(Entry::default()),
                };
                if !block.push(&entry) {
                    break;
                }
                count += 1;
                assert!(block.bytes().len() <= 1000);
                assert!(block.bytes().len().is_multiple_of(8));
            }
            assert_eq!(count, if plus { 6 } else { 31 });
            assert_eq!(block.looked_up.len() as u64, if plus { count } else { 0 });
        }
    }
}

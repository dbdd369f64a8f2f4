//! Ioctls: of the archive interface (spec 15) WALK_INODES and STAT_MORE; and private
//! ones, for what FUSE has no request for: `sync` of the mount, and the extents of a
//! file (the kernel answers FIEMAP itself with EOPNOTSUPP).
//!
//! All use the letter 0xE8; the private ones have numbers far from the 1..25 of the
//! archive interface. Only "restricted" ioctls reach a daemon: sizes follow the
//! command's own bits, so answers have a fixed size, and what a struct points to is
//! written by other means (`caller`). Unknown numbers: ENOTTY.

use crate::abi;
use crate::caller;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{
    Archive, Caller, FiemapExtent, IndexEntry, InodeIndex, Posix, StatMore,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Extents in one answer.
pub const EXTENTS: usize = 100;

/// Commits the mount's transaction: `_IO(0xE8, 0xC0)`.
pub const SYNC: u32 = 0xE8C0;
/// Lists extents: `_IOWR(0xE8, 0xC1, Fiemap)`.
pub const FIEMAP: u32 = 3 << 30 | (size_of::<Fiemap>() as u32) << 16 | 0xE8C1;

/// One extent.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Extent {
    /// Byte offset in the file.
    pub logical: u64,
    /// Byte offset on the data device; 0 for offline extents.
    pub physical: u64,
    /// Length in bytes.
    pub length: u64,
    /// `FIEMAP_EXTENT_*` bits.
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}

/// Argument of [`FIEMAP`], in and out.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Fiemap {
    /// In: first byte of interest.
    pub start: u64,
    /// In: length in bytes, not 0.
    pub len: u64,
    /// In: most extents wanted; out: extents given.
    pub count: u32,
    /// Zero.
    pub pad: u32,
    /// Out.
    pub extents: [Extent; EXTENTS],
}

const _: () = assert!(size_of::<Fiemap>() == 3224);

/// Lists changed inodes: `_IOW(0xE8, 1, WalkInodes)` (spec 15 section 3).
pub const WALK_INODES: u32 = 1 << 30 | (size_of::<WalkInodes>() as u32) << 16 | 0xE801;
/// The rest of an inode's attributes: `_IOR(0xE8, 5, StatMoreOut)` (spec 15 section 7).
pub const STAT_MORE: u32 = 2 << 30 | (size_of::<StatMoreOut>() as u32) << 16 | 0xE805;

const _: () = assert!(WALK_INODES == 0x4048_E801 && STAT_MORE == 0x8038_E805);

/// Entries that one look at an index brings, however many are wanted.
const WALK_BATCH: usize = 4096;

/// An entry of an index of inodes.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct WalkEntry {
    /// Seq of the change.
    pub major: u64,
    /// The inode.
    pub ino: u64,
    /// Zero.
    pub minor: u32,
    /// Zero.
    pub pad: u32,
}

impl From<WalkEntry> for IndexEntry {
    fn from(entry: WalkEntry) -> Self {
        Self {
            major: entry.major,
            ino: entry.ino,
        }
    }
}

impl From<IndexEntry> for WalkEntry {
    fn from(entry: IndexEntry) -> Self {
        Self {
            major: entry.major,
            ino: entry.ino,
            ..Self::default()
        }
    }
}

/// Argument of [`WALK_INODES`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct WalkInodes {
    /// First entry wanted.
    pub first: WalkEntry,
    /// Last entry wanted.
    pub last: WalkEntry,
    /// Where the caller wants them: an array of [`WalkEntry`].
    pub entries_ptr: u64,
    /// How many there is place for.
    pub nr_entries: u32,
    /// 0 by `meta_seq`, 1 by `data_seq`.
    pub index: u8,
    /// Ignored.
    pub pad: [u8; 11],
}

/// Answer of [`STAT_MORE`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
#[allow(missing_docs)] // as in `StatMore`
pub struct StatMoreOut {
    pub meta_seq: u64,
    pub data_seq: u64,
    pub data_version: u64,
    pub online_blocks: u64,
    pub offline_blocks: u64,
    pub crtime_sec: u64,
    pub crtime_nsec: u32,
    pub pad: u32,
}

impl From<StatMore> for StatMoreOut {
    fn from(stat: StatMore) -> Self {
        Self {
            meta_seq: stat.meta_seq,
            data_seq: stat.data_seq,
            data_version: stat.data_version,
            online_blocks: stat.online_blocks,
            offline_blocks: stat.offline_blocks,
            crtime_sec: stat.crtime.sec as u64,
            crtime_nsec: stat.crtime.nsec,
            pad: 0,
        }
    }
}

impl Default for Fiemap {
    fn default() -> Self {
        Self {
            start: 0,
            len: 0,
            count: 0,
            pad: 0,
            extents: [Extent::default(); EXTENTS],
        }
    }
}

/// What an ioctl returns, and the bytes that go back to the caller.
type Answer = (i32, Vec<u8>);

/// Serves an ioctl.
pub(crate) async fn serve<P: Posix + Archive>(
    posix: &P,
    cx: &Caller,
    caller: &caller::Caller,
    ino: u64,
    args: &abi::IoctlIn,
    data: &[u8],
) -> Result<Answer, Errno> {
    if args.flags & abi::IOCTL_COMPAT != 0 {
        return Err(Errno::ENOTTY);
    }
    match args.cmd {
        SYNC => {
            posix.syncfs().await?;
            Ok((0, Vec::new()))
        }
        FIEMAP => {
            let mut map = Fiemap::read_from_bytes(data).map_err(|_| Errno::EINVAL)?;
            if args.out_size as usize != size_of::<Fiemap>() {
                return Err(Errno::EINVAL);
            }
            let max = (map.count as usize).min(EXTENTS);
            let found = posix.fiemap(cx, ino, map.start, map.len, max).await?;
            map.extents = [Extent::default(); EXTENTS];
            map.count = found.len().min(max) as u32;
            for (slot, extent) in map.extents.iter_mut().zip(found.iter().take(max)) {
                *slot = Extent {
                    logical: extent.logical,
                    physical: extent.physical,
                    length: extent.length,
                    flags: extent.flags,
                    pad: 0,
                };
            }
            Ok((0, map.as_bytes().to_vec()))
        }
        WALK_INODES => {
            let walk = WalkInodes::read_from_bytes(data).map_err(|_| Errno::EINVAL)?;
            Ok((serve_walk(posix, caller, &walk).await?, Vec::new()))
        }
        STAT_MORE => {
            let stat = StatMoreOut::from(posix.stat_more(ino).await?);
            Ok((0, stat.as_bytes().to_vec()))
        }
        _ => Err(Errno::ENOTTY),
    }
}

/// How many entries the caller was given.
async fn serve_walk<P: Archive>(
    posix: &P,
    caller: &caller::Caller,
    walk: &WalkInodes,
) -> Result<i32, Errno> {
    let index = match walk.index {
        0 => InodeIndex::MetaSeq,
        1 => InodeIndex::DataSeq,
        _ => return Err(Errno::EINVAL),
    };
    let wanted = walk.nr_entries.min(i32::MAX as u32) as usize;
    let (mut from, last) = (Some(walk.first.into()), walk.last.into());
    let mut given = 0;
    while let Some(first) = from.filter(|_| given < wanted) {
        let batch = WALK_BATCH.min(wanted - given);
        let found = match posix.walk_inodes(index, first, last, batch).await {
            // What was given stays given.
            Err(_) if given > 0 => break,
            found => found?,
        };
        let Some(end) = found.last() else { break };
        from = end.next();
        let entries: Vec<WalkEntry> = found.iter().map(|entry| (*entry).into()).collect();
        let place = (given * size_of::<WalkEntry>()) as u64;
        let address = walk.entries_ptr.checked_add(place).ok_or(Errno::EFAULT)?;
        match caller.write(address, entries.as_bytes().to_vec()).await {
            Err(_) if given > 0 => break,
            written => written?,
        }
        given += found.len();
    }
    Ok(given as i32)
}

fn call(file: &impl AsFd, command: u32, arg: *mut u8) -> io::Result<i32> {
    // SAFETY: `arg` points to as many bytes as the command's size bits say, or
    // is not used by the command.
    let res = unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            libc::c_ulong::from(command) as _,
            arg,
        )
    };
    if res < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(res)
}

/// Caller's side of [`WALK_INODES`]: entries from `first` to `last`, both included, at
/// most as many as `into` has place for; how many there are now. `file` is any file or
/// directory of the mount.
///
/// # Errors
/// What the mount says; ENOTTY if it is not one of ours.
pub fn walk_inodes(
    file: &impl AsFd,
    index: InodeIndex,
    first: IndexEntry,
    last: IndexEntry,
    into: &mut [WalkEntry],
) -> io::Result<usize> {
    let mut walk = WalkInodes {
        first: first.into(),
        last: last.into(),
        entries_ptr: into.as_mut_ptr() as u64,
        nr_entries: into.len().try_into().unwrap_or(u32::MAX),
        index: index as u8,
        ..WalkInodes::default()
    };
    let given = call(file, WALK_INODES, std::ptr::from_mut(&mut walk).cast())?;
    Ok((given as usize).min(into.len()))
}

/// Caller's side of [`STAT_MORE`].
///
/// # Errors
/// What the mount says; ENOTTY if the file is not on one of ours.
pub fn stat_more(file: &impl AsFd) -> io::Result<StatMoreOut> {
    let mut stat = StatMoreOut::default();
    call(file, STAT_MORE, std::ptr::from_mut(&mut stat).cast())?;
    Ok(stat)
}

/// Caller's side of [`SYNC`]: `file` is any file or directory of the mount.
///
/// # Errors
/// What the mount says; ENOTTY if it is not one of ours.
pub fn sync(file: &impl AsFd) -> io::Result<()> {
    call(file, SYNC, std::ptr::null_mut()).map(drop)
}

/// Caller's side of [`FIEMAP`]: all extents of a file from byte `start` on.
///
/// # Errors
/// What the mount says; ENOTTY if the file is not on one of ours.
pub fn fiemap(file: &impl AsFd, start: u64) -> io::Result<Vec<FiemapExtent>> {
    const LAST: u32 = 1;
    let (mut found, mut start) = (Vec::new(), start);
    loop {
        let mut map = Fiemap {
            start,
            len: u64::MAX - start,
            count: EXTENTS as u32,
            ..Fiemap::default()
        };
        call(file, FIEMAP, std::ptr::from_mut(&mut map).cast())?;
        let got = &map.extents[..(map.count as usize).min(EXTENTS)];
        found.extend(got.iter().map(|e| FiemapExtent {
            logical: e.logical,
            physical: e.physical,
            length: e.length,
            flags: e.flags,
        }));
        match got.last() {
            Some(last) if last.flags & LAST == 0 => start = last.logical + last.length,
            _ => return Ok(found),
        }
    }
}

//! Private ioctls, for what FUSE has no request for: `sync` of the mount, and
//! the extents of a file (the kernel answers FIEMAP itself with EOPNOTSUPP).
//!
//! They use the volume's letter 0xE8 with numbers far from the 1..25 of the
//! archive interface. Only "restricted" ioctls reach a daemon: sizes follow the
//! command's own bits, so answers have a fixed size. Unknown numbers: ENOTTY.

use crate::abi;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Caller, FiemapExtent, Posix};
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

/// Serves an ioctl; the bytes go back to the caller.
pub(crate) async fn serve<P: Posix>(
    posix: &P,
    cx: &Caller,
    ino: u64,
    args: &abi::IoctlIn,
    data: &[u8],
) -> Result<Vec<u8>, Errno> {
    if args.flags & abi::IOCTL_COMPAT != 0 {
        return Err(Errno::ENOTTY);
    }
    match args.cmd {
        SYNC => {
            posix.syncfs().await?;
            Ok(Vec::new())
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
            Ok(map.as_bytes().to_vec())
        }
        _ => Err(Errno::ENOTTY),
    }
}

fn call(file: &impl AsFd, command: u32, arg: *mut u8) -> io::Result<()> {
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
    Ok(())
}

/// Caller's side of [`SYNC`]: `file` is any file or directory of the mount.
///
/// # Errors
/// What the mount says; ENOTTY if it is not one of ours.
pub fn sync(file: &impl AsFd) -> io::Result<()> {
    call(file, SYNC, std::ptr::null_mut())
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

//! `BlockDevice` over a file, a loop device or a raw device.
//!
//! Requests bypass the page cache (`O_DIRECT`) where the file system allows it.
//! FUA is a write with `RWF_DSYNC`; where that is not supported, a write followed
//! by `fdatasync`. A flush is `fdatasync`, which flushes the device's own cache too.
//!
//! What can go wrong: short transfers (continued, and an end of file in the
//! middle of a device is an error); a file system without direct I/O (used
//! buffered, with a warning: coherent on one host only); a device shut for a
//! forced unmount (every later request fails with [`DeviceError::Shut`]).

use crate::reactor::{Keep, Reactor, Request};
use outrider_core::env::{
    ALIGN, AlignedBuf, BlockDevice, DeviceError, DeviceRole, Devices, IoBuf, LocalBoxFuture,
    WriteFlags,
};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Buffers per system call (`IOV_MAX`).
const BUFS_PER_CALL: usize = 1024;
/// Bytes per system call, well below the kernel's limit.
const BYTES_PER_CALL: usize = 64 << 20;

/// Why a device could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// The device or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is neither a block device nor a regular file.
    #[error("{path} is neither a block device nor a regular file")]
    Kind {
        /// What was named.
        path: PathBuf,
    },
    /// Something else has the block device open exclusively.
    #[error("{path} is in use (mounted, or held by another program)")]
    Busy {
        /// The device.
        path: PathBuf,
    },
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Claim a block device, so that neither a kernel mount nor another claimant
    /// has it. Mounts of one volume on one host share their devices and must not.
    pub exclusive: bool,
}

/// Opens a file or device for direct I/O; the second value tells whether the
/// page cache is bypassed.
fn open_file(path: &Path, options: OpenOptions) -> Result<(OwnedFd, bool), OpenError> {
    let fail = |source| OpenError::Io {
        path: path.to_owned(),
        source,
    };
    let kind = std::fs::metadata(path).map_err(fail)?.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        return Err(OpenError::Kind {
            path: path.to_owned(),
        });
    }
    let open = |extra: i32| {
        let claim = if options.exclusive && kind.is_block_device() {
            libc::O_EXCL
        } else {
            0
        };
        std::fs::OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(extra | claim)
            .open(path)
    };
    let opened = match open(libc::O_DIRECT) {
        Ok(file) => Ok((file, true)),
        Err(err) if err.raw_os_error() == Some(libc::EINVAL) => open(0).map(|file| {
            tracing::warn!(
                path = %path.display(),
                "direct I/O is not possible here; requests go through the page cache, \
                 so the volume must not be used from another host"
            );
            (file, false)
        }),
        Err(err) => Err(err),
    };
    match opened {
        Ok((file, direct)) => Ok((file.into(), direct)),
        Err(err) if err.raw_os_error() == Some(libc::EBUSY) => Err(OpenError::Busy {
            path: path.to_owned(),
        }),
        Err(err) => Err(fail(err)),
    }
}

/// Size in bytes of an open file or block device.
///
/// # Errors
/// What the system says.
pub fn size_of(file: &impl AsFd) -> io::Result<u64> {
    let stat = rustix::fs::fstat(file)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::BlockDevice {
        return Ok(stat.st_size as u64);
    }
    let mut size = 0u64;
    // BLKGETSIZE64: `_IOR(0x12, 114, size_t)`.
    // SAFETY: the kernel writes 8 bytes to `size`.
    let res = unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            0x8008_1272,
            std::ptr::from_mut(&mut size),
        )
    };
    if res < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(size)
}

/// A switch that stops all I/O of a mount: forced unmount.
#[derive(Clone, Debug, Default)]
pub struct Shutter(Arc<AtomicBool>);

impl Shutter {
    /// Fails every request from now on. Requests already given to the kernel end
    /// by themselves.
    pub fn shut(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was shut.
    pub fn is_shut(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// An open device that belongs to one actor.
pub struct FileDevice {
    inner: Rc<Inner>,
}

struct Inner {
    file: Arc<OwnedFd>,
    reactor: Rc<Reactor>,
    size: u64,
    shutter: Shutter,
    /// `RWF_DSYNC` works here.
    dsync: Cell<bool>,
}

impl FileDevice {
    /// Opens a device for the calling actor.
    ///
    /// # Errors
    /// [`OpenError`], which names the device.
    ///
    /// # Panics
    /// On a thread that is not an actor's (see [`crate::Runtime`]).
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self, OpenError> {
        Self::open_with(path, options, Shutter::default())
    }

    /// As [`FileDevice::open`], stopped by `shutter`.
    ///
    /// # Errors
    /// As [`FileDevice::open`].
    pub fn open_with(
        path: &Path,
        options: OpenOptions,
        shutter: Shutter,
    ) -> Result<Self, OpenError> {
        let (file, _direct) = open_file(path, options)?;
        let size = size_of(&file).map_err(|source| OpenError::Io {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            inner: Rc::new(Inner {
                file: Arc::new(file),
                reactor: Reactor::current(),
                size: size / ALIGN as u64 * ALIGN as u64,
                shutter,
                dsync: Cell::new(true),
            }),
        })
    }

    /// The open file, for locks on it (they end when its last user is gone).
    pub fn file(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }
}

impl std::fmt::Debug for FileDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileDevice")
            .field("fd", &self.inner.file)
            .field("size", &self.inner.size)
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn check(&self, op: &'static str, offset: u64, len: u64) -> Result<(), DeviceError> {
        assert!(
            offset.is_multiple_of(ALIGN as u64) && len.is_multiple_of(ALIGN as u64),
            "unaligned {op} of {len} bytes at byte {offset}"
        );
        if self.shutter.is_shut() {
            return Err(DeviceError::Shut);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(DeviceError::OutOfRange {
                op,
                offset,
                len,
                size: self.size,
            }),
        }
    }

    fn keep(&self) -> Keep {
        Keep {
            file: Some(Arc::clone(&self.file)),
            ..Keep::default()
        }
    }

    async fn read(
        self: Rc<Self>,
        offset: u64,
        mut buf: AlignedBuf,
    ) -> (AlignedBuf, Result<(), DeviceError>) {
        let len = buf.len();
        if let Err(err) = self.check("read", offset, len as u64) {
            return (buf, Err(err));
        }
        let mut done = 0;
        while done < len {
            let request = Request::Read {
                fd: self.file.as_raw_fd(),
                // SAFETY: `done` is below the buffer's length.
                ptr: unsafe { buf.as_mut_ptr().add(done) },
                len: (len - done).min(BYTES_PER_CALL),
                offset: offset + done as u64,
            };
            let mut keep = self.keep();
            keep.read = Some(buf);
            let (res, keep) = self.reactor.start(request, keep).finish().await;
            buf = keep.read.expect("the request kept its buffer");
            match progress(res, "read", offset, len as u64) {
                Ok(n) => done += n,
                Err(err) => return (buf, Err(err)),
            }
        }
        (buf, Ok(()))
    }

    async fn write(
        self: Rc<Self>,
        offset: u64,
        mut bufs: Vec<IoBuf>,
        flags: WriteFlags,
    ) -> Result<(), DeviceError> {
        let len: u64 = bufs.iter().map(|b| b.len() as u64).sum();
        self.check("write", offset, len)?;
        let durable = flags.fua && self.dsync.get();
        let (mut first, mut skip, mut done) = (0usize, 0usize, 0u64);
        while done < len {
            let iov = io_vectors(&bufs[first..], skip);
            let request = Request::Write {
                fd: self.file.as_raw_fd(),
                iov: iov.as_ptr(),
                count: iov.len(),
                offset: offset + done,
                durable,
            };
            let mut keep = self.keep();
            keep.write = bufs;
            keep.iov = iov;
            let (res, keep) = self.reactor.start(request, keep).finish().await;
            bufs = keep.write;
            if durable && (res == -libc::EOPNOTSUPP || res == -libc::EINVAL) {
                self.dsync.set(false);
                tracing::warn!(fd = ?self.file, "no durable writes here: using write and flush");
                return Box::pin(self.write(offset, bufs, flags)).await;
            }
            let n = progress(res, "write", offset, len)?;
            done += n as u64;
            skip += n;
            while first < bufs.len() && skip >= bufs[first].len() {
                skip -= bufs[first].len();
                first += 1;
            }
        }
        if flags.fua && !durable {
            self.sync().await?;
        }
        Ok(())
    }

    async fn sync(&self) -> Result<(), DeviceError> {
        if self.shutter.is_shut() {
            return Err(DeviceError::Shut);
        }
        let request = Request::DataSync {
            fd: self.file.as_raw_fd(),
        };
        let (res, _) = self.reactor.start(request, self.keep()).finish().await;
        if res < 0 {
            return Err(failed(res, "flush", 0, self.size));
        }
        Ok(())
    }
}

/// The next system call's vectors: the buffers from `skip` bytes into the first.
fn io_vectors(bufs: &[IoBuf], skip: usize) -> Vec<libc::iovec> {
    let mut bytes = 0;
    let mut iov = Vec::with_capacity(bufs.len().min(BUFS_PER_CALL));
    for (nr, buf) in bufs.iter().take(BUFS_PER_CALL).enumerate() {
        if bytes >= BYTES_PER_CALL {
            break;
        }
        let part = if nr == 0 { &buf[skip..] } else { &buf[..] };
        bytes += part.len();
        iov.push(libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        });
    }
    iov
}

fn failed(res: i32, op: &'static str, offset: u64, len: u64) -> DeviceError {
    DeviceError::Io {
        op,
        offset,
        len,
        detail: io::Error::from_raw_os_error(-res).to_string(),
    }
}

fn progress(res: i32, op: &'static str, offset: u64, len: u64) -> Result<usize, DeviceError> {
    match res {
        0 => Err(DeviceError::Io {
            op,
            offset,
            len,
            detail: "the device ended early".into(),
        }),
        n if n > 0 => Ok(n as usize),
        err if err == -libc::EINTR || err == -libc::EAGAIN => Ok(0),
        err => Err(failed(err, op, offset, len)),
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.inner.size
    }

    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalBoxFuture<'static, (AlignedBuf, Result<(), DeviceError>)> {
        Box::pin(Rc::clone(&self.inner).read(offset, buf))
    }

    fn write(
        &self,
        offset: u64,
        bufs: Vec<IoBuf>,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        Box::pin(Rc::clone(&self.inner).write(offset, bufs, flags))
    }

    fn flush(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.sync().await })
    }
}

/// The files of a volume's two devices, from which each actor opens its own.
#[derive(Clone, Debug)]
pub struct VolumeFiles {
    /// The metadata device.
    pub meta: PathBuf,
    /// The data device.
    pub data: PathBuf,
    /// How they are opened.
    pub options: OpenOptions,
    /// Stops the I/O of all actors at once.
    pub shutter: Shutter,
    /// Locks that each opened metadata device takes (shared), so that another
    /// process can see whether this mount has let go of it.
    pub liveness: Option<u64>,
}

impl VolumeFiles {
    /// Devices opened for reading and writing, shared with other mounts.
    pub fn new(meta: impl Into<PathBuf>, data: impl Into<PathBuf>) -> Self {
        Self {
            meta: meta.into(),
            data: data.into(),
            options: OpenOptions::default(),
            shutter: Shutter::default(),
            liveness: None,
        }
    }
}

impl Devices for VolumeFiles {
    fn open(&self, role: DeviceRole) -> Result<Rc<dyn BlockDevice>, DeviceError> {
        let path = match role {
            DeviceRole::Meta => &self.meta,
            DeviceRole::Data => &self.data,
        };
        let fail = |detail: String| DeviceError::Io {
            op: "open",
            offset: 0,
            len: 0,
            detail,
        };
        let device = FileDevice::open_with(path, self.options, self.shutter.clone())
            .map_err(|err| fail(err.to_string()))?;
        if let Some(id) = self.liveness {
            crate::lock::hold_liveness(&device.file(), id)
                .map_err(|err| fail(format!("{}: {err}", path.display())))?;
        }
        Ok(Rc::new(device))
    }
}

/// What tells a device apart on this host: device and inode number of a regular
/// file, or the number of a block device.
///
/// # Errors
/// What the system says.
pub fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::metadata(path)?;
    if meta.file_type().is_block_device() {
        return Ok((meta.rdev(), 0));
    }
    Ok((meta.dev(), meta.ino()))
}

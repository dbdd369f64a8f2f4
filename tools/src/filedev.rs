//! A [`BlockDevice`] over a file or a block device, for commands that have a
//! volume to themselves: synchronous calls inside ready futures.
//!
//! Other hosts may have written the device, so the page cache is passed by
//! O_DIRECT; where the filesystem of a plain file refuses it, the file's cached
//! pages are dropped first.

use crate::error::CmdError;
use outrider_core::env::{AlignedBuf, BlockDevice, DeviceError, IoBuf, LocalBoxFuture, WriteFlags};
use outrider_core::errno::Errno;
use outrider_disk::lock::try_alone;
use rustix::fs::{Advice, OFlags, fadvise};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;

/// The kernel may close a daemon's devices a moment after the daemon ended.
const CLOSING_POLLS: u32 = 50;
const CLOSING_POLL: std::time::Duration = std::time::Duration::from_millis(20);

/// What a command wants to do with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only, beside whoever else uses it.
    Read,
    /// Read and write; refused while a mount on this host, or anybody who claims a
    /// block device, uses it. Mounts are kept away until it is closed.
    Exclusive,
}

/// An open file or block device.
#[derive(Clone, Debug)]
pub struct FileDevice {
    file: Rc<File>,
    size: u64,
}

impl FileDevice {
    /// Opens a device.
    ///
    /// # Errors
    /// If it can not be opened, or is neither a file nor a block device.
    pub fn open(path: &Path, access: Access) -> Result<Self, CmdError> {
        let kind = std::fs::metadata(path)
            .map_err(|e| CmdError::io("open", path, &e))?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let text = format!("'{}' is neither a file nor a block device", path.display());
            return Err(CmdError::new(Errno::EINVAL, text));
        }
        let mut flags = OFlags::DIRECT;
        if access == Access::Exclusive && kind.is_block_device() {
            flags |= OFlags::EXCL;
        }
        let open = |flags: OFlags| {
            OpenOptions::new()
                .read(true)
                .write(access == Access::Exclusive)
                .custom_flags(flags.bits().cast_signed())
                .open(path)
        };
        let mut file = match open(flags) {
            Err(e) if e.raw_os_error() == Some(Errno::EINVAL.0) => open(flags - OFlags::DIRECT),
            other => other,
        }
        .map_err(|e| CmdError::io("open", path, &e))?;
        if access == Access::Exclusive {
            keep_mounts_away(&file, path)?;
        }
        // Only a hint: without O_DIRECT it is the best there is.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|e| CmdError::io("find the size of", path, &e))?;
        Ok(Self {
            file: Rc::new(file),
            size: size >> 12 << 12,
        })
    }

    fn check(&self, op: &'static str, offset: u64, len: u64) -> Result<(), DeviceError> {
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
}

/// Mounts share their devices, so the kernel's own claim (`O_EXCL`) is not theirs.
fn keep_mounts_away(file: &File, path: &Path) -> Result<(), CmdError> {
    for _ in 0..CLOSING_POLLS {
        match try_alone(file) {
            Ok(true) => return Ok(()),
            Ok(false) => std::thread::sleep(CLOSING_POLL),
            Err(e) => return Err(CmdError::io("lock", path, &e)),
        }
    }
    let text = format!("'{}' is in use by a mount on this host", path.display());
    Err(CmdError::new(Errno::EBUSY, text))
}

fn io_error(op: &'static str, offset: u64, len: u64, e: &std::io::Error) -> DeviceError {
    DeviceError::Io {
        op,
        offset,
        len,
        detail: e.to_string(),
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(
        &self,
        offset: u64,
        mut buf: AlignedBuf,
    ) -> LocalBoxFuture<'static, (AlignedBuf, Result<(), DeviceError>)> {
        let len = buf.len() as u64;
        let result = self.check("read", offset, len).and_then(|()| {
            self.file
                .read_exact_at(&mut buf, offset)
                .map_err(|e| io_error("read", offset, len, &e))
        });
        Box::pin(std::future::ready((buf, result)))
    }

    fn write(
        &self,
        offset: u64,
        bufs: Vec<IoBuf>,
        flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        let total = bufs.iter().map(|b| b.len() as u64).sum();
        let result = self.check("write", offset, total).and_then(|()| {
            let mut at = offset;
            for buf in &bufs {
                self.file
                    .write_all_at(buf, at)
                    .map_err(|e| io_error("write", at, buf.len() as u64, &e))?;
                at += buf.len() as u64;
            }
            if flags.fua {
                self.file
                    .sync_data()
                    .map_err(|e| io_error("flush", offset, total, &e))?;
            }
            Ok(())
        });
        Box::pin(std::future::ready(result))
    }

    fn flush(&self) -> LocalBoxFuture<'static, Result<(), DeviceError>> {
        let result = self
            .file
            .sync_data()
            .map_err(|e| io_error("flush", 0, 0, &e));
        Box::pin(std::future::ready(result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_on::block_on;
    use std::sync::Arc;

    #[test]
    fn a_file_is_a_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * 4096 + 5).unwrap();
        let dev = FileDevice::open(file.path(), Access::Exclusive).unwrap();
        assert_eq!(dev.size(), 3 * 4096);
        let bufs = vec![
            Arc::new(AlignedBuf::copy_of(&[1; 4096])),
            Arc::new(AlignedBuf::copy_of(&[2; 4096])),
        ];
        block_on(dev.write(4096, bufs, WriteFlags { fua: true })).unwrap();
        let (buf, read) = block_on(dev.read(4096, AlignedBuf::zeroed(8192)));
        read.unwrap();
        assert!(buf[..4096].iter().all(|b| *b == 1) && buf[4096..].iter().all(|b| *b == 2));
        let (_, past) = block_on(dev.read(2 * 4096, AlignedBuf::zeroed(8192)));
        assert!(matches!(past, Err(DeviceError::OutOfRange { .. })));
        block_on(dev.flush()).unwrap();
    }

    #[test]
    fn directories_and_missing_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FileDevice::open(dir.path(), Access::Read).is_err());
        assert!(FileDevice::open(&dir.path().join("none"), Access::Read).is_err());
    }
}

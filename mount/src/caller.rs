//! The memory of who waits for an ioctl: what its struct points to does not come with
//! the request (spec 15 section 28).
//!
//! What can go wrong:
//! * the caller goes on while its memory is written: so a request is held for that
//!   time, and who was interrupted before gets nothing. Only the end of the whole
//!   connection (`umount -f`) lets a caller go all the same;
//! * the memory is a mapping of this mount, and writing it asks this daemon for a page:
//!   so it is a thread of its own that writes, while nothing here is locked;
//! * a caller that cannot be named from here (another namespace of processes), or whose
//!   memory is not ours to write: EFAULT, with a line in the log.

use crate::session::Session;
use outrider_core::errno::Errno;
use std::rc::Rc;

/// Who waits for the answer to a request.
pub(crate) struct Caller {
    /// The connection it came by.
    pub session: Rc<Session>,
    /// The request.
    pub unique: u64,
    /// The thread that waits, as this process's namespace numbers it; 0 if it does not.
    pub pid: u32,
}

impl Caller {
    /// Writes to an address of the caller.
    ///
    /// # Errors
    /// EFAULT if not all of it could be written, EINTR if nobody waits any more.
    pub async fn write(&self, address: u64, bytes: Vec<u8>) -> Result<(), Errno> {
        let pid = i32::try_from(self.pid).unwrap_or_default();
        if pid == 0 {
            tracing::warn!("a caller in another namespace of processes cannot be answered");
            return Err(Errno::EFAULT);
        }
        let _held = self.session.hold(self.unique).ok_or(Errno::EINTR)?;
        let (tell, told) = tokio::sync::oneshot::channel();
        let write = move || {
            let _ = tell.send(write_memory(pid, address, &bytes));
        };
        let thread = std::thread::Builder::new().name("outrider-copy".into());
        thread.spawn(write).map_err(|error| {
            tracing::error!(%error, "no thread to answer a caller with");
            Errno::EAGAIN
        })?;
        told.await.unwrap_or(Err(Errno::EFAULT))
    }
}

fn write_memory(pid: i32, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    let local = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let remote = libc::iovec {
        iov_base: address as usize as *mut libc::c_void,
        iov_len: bytes.len(),
    };
    // SAFETY: `local` is only read, and lives until the call returns; `remote` is an
    // address of the other process, which the kernel checks.
    let written =
        unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(written) {
        Ok(written) if written == bytes.len() => Ok(()),
        Ok(_) => Err(Errno::EFAULT),
        Err(_) => {
            let error = std::io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EFAULT) {
                tracing::warn!(pid, %error, "the memory of a caller cannot be written");
            }
            Err(Errno::EFAULT)
        }
    }
}

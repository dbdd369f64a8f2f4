//! Locks that prove who has a device open on this host.
//!
//! All are byte-range locks of the open file description (`F_OFD_*`), far beyond
//! the end of any device. The kernel drops such a lock when the last reference
//! to the description goes, and requests in flight hold references: a lock that
//! is gone proves that no write of its holder can still arrive.
//!
//! * **liveness**: every metadata and data handle of a mount holds a shared lock
//!   on the byte of the mount's rid. The fence agent tests it.
//! * **slot**: one daemon per quorum slot of a volume, exclusive.
//! * **all of these at once**, exclusive: a command that has the volume to itself.
//!
//! What can go wrong: such locks are seen on this host only (and, for files on a
//! network file system, perhaps not even by it), so a free lock proves something
//! only about mounts known to run here; file systems without locks (then opening
//! fails with a message).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Byte ranges of the locks: beyond any device, below the largest file offset.
const LIVENESS_BASE: i64 = 1 << 61;
const SLOT_BASE: i64 = 1 << 60;

fn liveness_byte(id: u64) -> i64 {
    LIVENESS_BASE + (id & ((1 << 60) - 1)) as i64
}

fn ofd_lock(file: &impl AsFd, command: i32, kind: i32, start: i64) -> io::Result<libc::flock64> {
    ofd_lock_range(file, command, kind, start, 1)
}

/// `len` 0 is everything from `start` on.
fn ofd_lock_range(
    file: &impl AsFd,
    command: i32,
    kind: i32,
    start: i64,
    len: i64,
) -> io::Result<libc::flock64> {
    // SAFETY: a zeroed flock64 is valid.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = len;
    // SAFETY: the kernel reads and writes `lock` only.
    let res = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) };
    if res < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock)
}

/// Takes the shared liveness lock of mount `id` for as long as `file` is open.
///
/// # Errors
/// If the file system has no locks, or somebody holds the byte exclusively.
pub fn hold_liveness(file: &impl AsFd, id: u64) -> io::Result<()> {
    ofd_lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, liveness_byte(id)).map(drop)
}

/// Whether any process on this host still has the device open for mount `id`.
/// `file` must be a description of the asker's own.
///
/// # Errors
/// If the file system has no locks.
pub fn is_live(file: &impl AsFd, id: u64) -> io::Result<bool> {
    let lock = ofd_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, liveness_byte(id))?;
    Ok(lock.l_type != libc::F_UNLCK as i16)
}

/// Claims quorum slot `slot` of the volume on this host for as long as `file` is
/// open; false if another daemon has it. `file` must be open for writing.
///
/// # Errors
/// If the file system has no locks.
pub fn try_slot(file: &impl AsFd, slot: u8) -> io::Result<bool> {
    let start = SLOT_BASE + i64::from(slot);
    match ofd_lock(file, libc::F_OFD_SETLK, libc::F_WRLCK, start) {
        Ok(_) => Ok(true),
        Err(err) if matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(err) => Err(err),
    }
}

/// Keeps all mounts of this host away for as long as `file` is open; false if there
/// is one. `file` must be open for writing.
///
/// # Errors
/// If the file system has no locks.
pub fn try_alone(file: &impl AsFd) -> io::Result<bool> {
    match ofd_lock_range(file, libc::F_OFD_SETLK, libc::F_WRLCK, SLOT_BASE, 0) {
        Ok(_) => Ok(true),
        Err(err) if matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(err) => Err(err),
    }
}

/// Takes an exclusive lock on a whole file without waiting; false if it is held.
/// It ends with the last copy of the descriptor, that is with the process.
///
/// # Errors
/// What the system says.
pub fn try_lock_file(file: &impl AsFd) -> io::Result<bool> {
    use rustix::fs::{FlockOperation, flock};
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

/// Waits until nobody holds the exclusive lock on a file: until its daemon is gone.
///
/// # Errors
/// What the system says; an interruption by a signal is one of these.
pub fn wait_file_unlocked(file: &impl AsFd) -> io::Result<()> {
    use rustix::fs::{FlockOperation, flock};
    flock(file, FlockOperation::LockShared)?;
    flock(file, FlockOperation::Unlock)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn open(path: &std::path::Path) -> std::fs::File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    #[test]
    fn a_mount_is_live_until_its_last_handle_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two, asker) = (open(file.path()), open(file.path()), open(file.path()));
        let rid = 0xfedc_ba98_7654_3210;
        assert!(!is_live(&asker, rid).unwrap());
        hold_liveness(&one, rid).unwrap();
        hold_liveness(&two, rid).unwrap();
        assert!(is_live(&asker, rid).unwrap());
        assert!(!is_live(&asker, rid + 1).unwrap());
        drop(one);
        assert!(is_live(&asker, rid).unwrap());
        drop(two);
        assert!(!is_live(&asker, rid).unwrap());
    }

    #[test]
    fn a_slot_has_one_daemon() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (open(file.path()), open(file.path()));
        assert!(try_slot(&one, 0).unwrap());
        assert!(!try_slot(&two, 0).unwrap());
        assert!(try_slot(&two, 1).unwrap());
        drop(one);
        assert!(try_slot(&two, 0).unwrap());
    }

    #[test]
    fn who_wants_a_device_alone_waits_for_all_mounts_and_keeps_them_away() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two, alone) = (open(file.path()), open(file.path()), open(file.path()));
        hold_liveness(&one, 7).unwrap();
        assert!(try_slot(&two, 3).unwrap());
        assert!(!try_alone(&alone).unwrap());
        drop(one);
        assert!(!try_alone(&alone).unwrap());
        drop(two);
        assert!(try_alone(&alone).unwrap());
        let late = open(file.path());
        assert!(hold_liveness(&late, 8).is_err());
        assert!(!try_slot(&late, 0).unwrap());
        drop(alone);
        hold_liveness(&late, 8).unwrap();
    }

    #[test]
    fn a_locked_file_waits_for_its_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (open(file.path()), open(file.path()));
        assert!(try_lock_file(&one).unwrap());
        assert!(!try_lock_file(&two).unwrap());
        let path = file.path().to_owned();
        let waiter = std::thread::spawn(move || wait_file_unlocked(&open(&path)).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!waiter.is_finished());
        drop(one);
        waiter.join().unwrap();
    }
}

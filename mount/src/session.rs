//! One connection with the kernel: reads requests, polls each future once in
//! place, answers, and parks what has to wait.
//!
//! What can go wrong:
//! * the device goes away: a clean unmount or an abort; [`Ended`] tells which;
//! * a caller is interrupted: INTERRUPT names the request. A request that changes
//!   nothing is answered with EINTR at once and its result thrown away later; one
//!   that changes something runs on to its end, since a future of `Posix` must not
//!   be dropped half way;
//! * the kernel no longer wants an answer (ENOENT): references and handles in it
//!   are given back;
//! * a malformed request: EIO to the caller, a log line, nothing else.

use crate::abi::{self, init, op};
use crate::reply::Promise;
use crate::request;
use crate::serve;
use bytes::Bytes;
use outrider_core::env::{ALIGN, AlignedBuf, Gate, Signal, Task};
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Archive, Posix, WriteData};
use outrider_disk::{Reactor, spawn_polled};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Largest read or write request, in bytes.
pub const MAX_IO: usize = 1 << 20;
/// Where a request begins in its buffer: the data of a WRITE then lies on a page.
const START: usize = DATA - size_of::<abi::InHeader>() - size_of::<abi::WriteIn>();
const DATA: usize = ALIGN;
const BUFFER: usize = DATA + MAX_IO + ALIGN;
/// Writes of at least this many bytes keep the read buffer instead of being copied:
/// half of it is data then.
const KEEP_BUFFER: usize = MAX_IO / 2;
/// Requests served before other tasks of the thread get their turn.
const BATCH: usize = 32;

/// After so many rounds with one request each the session takes it that one caller
/// waits for each answer, and looks for a second request only once in as many.
const SINGLE: usize = 8;

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Unmounted: everything was answered.
    Unmounted,
    /// Aborted (`umount -f`, or the connection's `abort` file).
    Aborted,
}

/// How a session behaves.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Requests that the kernel may have under way in the background.
    pub max_background: u16,
    /// Let the kernel read ahead without a task that waits.
    pub async_read: bool,
    /// Let the kernel check permissions by mode and ACL: always, except in tests.
    pub posix_acl: bool,
    /// Answer STATX, with the time of birth. The kernel keeps every other attribute of
    /// a LOOKUP, but that time it must ask for: one more request for each cold stat of a
    /// program that wants it.
    pub birth_time: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            max_background: 1024,
            async_read: true,
            posix_acl: true,
            birth_time: false,
        }
    }
}

/// What was agreed with the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Minor protocol version in use.
    pub minor: u32,
    /// Flags in use.
    pub flags: u64,
    /// Largest request in bytes.
    pub max_write: u32,
}

impl Agreed {
    /// Whether all names can be made to expire at once.
    pub fn inc_epoch(&self) -> bool {
        self.minor >= abi::MINOR_INC_EPOCH
    }
}

/// A request that waits.
struct Parked {
    opcode: u32,
    /// It was answered with EINTR; its result goes nowhere.
    detached: bool,
    _task: Rc<dyn Task>,
}

/// The connection's state, shared by the requests under way.
pub struct Session {
    fd: Arc<OwnedFd>,
    options: SessionOptions,
    agreed: Cell<Agreed>,
    ready: Gate,
    parked: RefCell<HashMap<u64, Parked>>,
    /// Requests whose callers must go on waiting (see [`Session::hold`]), and whether
    /// one was interrupted meanwhile.
    held: RefCell<HashMap<u64, bool>>,
    drained: Signal,
    gone: Cell<bool>,
    destroyed: Cell<bool>,
    served: Cell<u64>,
}

/// The data of a WRITE, which begins [`DATA`] bytes into the buffer it was read
/// into: the buffer itself, if that pays, else a copy.
fn write_data(buf: &mut Option<AlignedBuf>, len: usize) -> WriteData {
    if len >= KEEP_BUFFER && len.is_multiple_of(ALIGN) {
        let buf = buf.take().expect("the buffer of this request");
        return WriteData::Blocks(buf.part(DATA, len));
    }
    let buf = buf.as_ref().expect("the buffer of this request");
    WriteData::Copied(Bytes::copy_from_slice(&buf[DATA..DATA + len]))
}

impl Session {
    /// A session over an open, non-blocking `/dev/fuse`.
    pub fn new(fd: Arc<OwnedFd>, options: SessionOptions) -> Rc<Self> {
        Rc::new(Self {
            fd,
            options,
            agreed: Cell::default(),
            ready: Gate::default(),
            parked: RefCell::default(),
            held: RefCell::default(),
            drained: Signal::default(),
            gone: Cell::new(false),
            destroyed: Cell::new(false),
            served: Cell::new(0),
        })
    }

    /// What was agreed; meaningful once [`Session::ready`] has completed.
    pub fn agreed(&self) -> Agreed {
        self.agreed.get()
    }

    /// Completes when the kernel and this side have agreed.
    pub async fn ready(&self) {
        self.ready.wait().await;
    }

    /// Requests read so far.
    pub fn served(&self) -> u64 {
        self.served.get()
    }

    pub(crate) fn options(&self) -> &SessionOptions {
        &self.options
    }

    pub(crate) fn promise(&self) -> Promise {
        Promise {
            names: self.agreed.get().inc_epoch(),
        }
    }

    /// Serves until the device is gone.
    ///
    /// # Errors
    /// What reading the device failed with, other than its end.
    pub async fn run<P: Posix + Archive + 'static>(
        self: &Rc<Self>,
        posix: Rc<P>,
    ) -> io::Result<Ended> {
        let reactor = Reactor::current();
        let mut buf = None;
        // Rounds in a row that found one request and no second.
        let mut single = 0_usize;
        loop {
            reactor.readable(&self.fd).await;
            let mut got = 0;
            while got < BATCH {
                if got == 1 && single >= SINGLE && !single.is_multiple_of(SINGLE) {
                    single += 1;
                    break;
                }
                match self.read(&mut buf) {
                    Ok(0) => return Ok(self.end(None)),
                    Ok(len) => {
                        self.serve(&posix, &mut buf, len);
                        got += 1;
                    }
                    Err(err) => match err.raw_os_error() {
                        Some(libc::EAGAIN) => {
                            single = if got == 1 { single + 1 } else { 0 };
                            break;
                        }
                        // The request was taken back before it could be read.
                        Some(libc::ENOENT | libc::EINTR) => {}
                        Some(errno @ (libc::ENODEV | libc::ECONNABORTED)) => {
                            return Ok(self.end(Some(errno)));
                        }
                        _ => return Err(err),
                    },
                }
            }
        }
    }

    fn end(&self, errno: Option<i32>) -> Ended {
        self.gone.set(true);
        // A clean unmount waits for every caller; what may still be under way is
        // what nobody waits for.
        let waiting = self
            .parked
            .borrow()
            .values()
            .any(|p| !matches!(p.opcode, op::RELEASE | op::RELEASEDIR) && !p.detached);
        if errno == Some(libc::ECONNABORTED) || waiting {
            Ended::Aborted
        } else {
            Ended::Unmounted
        }
    }

    /// Waits until no request is under way any more.
    pub async fn drained(&self) {
        self.drained
            .wait_for(|| self.parked.borrow().is_empty().then_some(()))
            .await;
    }

    fn read(&self, buf: &mut Option<AlignedBuf>) -> io::Result<usize> {
        let space = buf.get_or_insert_with(|| AlignedBuf::to_fill(BUFFER));
        Ok(rustix::io::read(&*self.fd, &mut space[START..])?)
    }

    fn serve<P: Posix + Archive + 'static>(
        self: &Rc<Self>,
        posix: &Rc<P>,
        buf: &mut Option<AlignedBuf>,
        len: usize,
    ) {
        self.served.set(self.served.get() + 1);
        // The request borrows the buffer, which a large WRITE takes along: the
        // bytes are looked at through a shared view that ends before that.
        let bytes = &buf.as_ref().expect("just filled")[START..START + len];
        let ext = self.agreed.get().flags & init::SETXATTR_EXT != 0;
        match request::parse(bytes, ext) {
            Ok(request) => {
                tracing::trace!(
                    unique = request.header.unique,
                    op = op::name(request.header.opcode),
                    ino = request.header.nodeid,
                    "request"
                );
                if let request::Op::Write { args, data } = request.op {
                    let (header, size) = (request.header, data.len());
                    let data = write_data(buf, size);
                    serve::write(self, posix, &header, &args, data);
                } else {
                    serve::dispatch(self, posix, &request);
                }
            }
            Err(err) => {
                tracing::error!(error = %err, "malformed request from the kernel");
                if let Some(header) = request::header(bytes) {
                    self.answer(header.unique, Err(Errno::EIO), &[]);
                }
            }
        }
    }

    /// Polls a request's future once and parks it if it waits.
    pub(crate) fn start(
        self: &Rc<Self>,
        header: &abi::InHeader,
        future: impl Future<Output = ()> + 'static,
    ) {
        let (unique, opcode) = (header.unique, header.opcode);
        spawn_polled(Box::pin(future), |task| {
            let parked = Parked {
                opcode,
                detached: false,
                _task: task,
            };
            self.parked.borrow_mut().insert(unique, parked);
        });
    }

    /// Ends a request that gets no answer.
    pub(crate) fn forget_parked(&self, unique: u64) -> bool {
        let mut parked = self.parked.borrow_mut();
        if parked.is_empty() {
            return true;
        }
        let wanted = parked.remove(&unique).is_none_or(|p| !p.detached);
        let empty = parked.is_empty();
        drop(parked);
        if empty {
            self.drained.wake_all();
        }
        wanted
    }

    /// Answers a request; false if the kernel does not want the answer, so that
    /// what it would have given must be taken back.
    pub(crate) fn answer(&self, unique: u64, result: Result<(), Errno>, parts: &[&[u8]]) -> bool {
        let result = result.map_err(for_users);
        self.forget_parked(unique) && self.send(unique, result, parts)
    }

    fn send(&self, unique: u64, result: Result<(), Errno>, parts: &[&[u8]]) -> bool {
        if self.gone.get() {
            return false;
        }
        let len: usize = parts.iter().map(|p| p.len()).sum();
        let header = abi::OutHeader {
            len: (size_of::<abi::OutHeader>() + len) as u32,
            error: result.err().map_or(0, |e| -e.0),
            unique,
        };
        let sent = match *parts {
            [] => rustix::io::write(&*self.fd, header.as_bytes()),
            [part] => {
                let slices = [IoSlice::new(header.as_bytes()), IoSlice::new(part)];
                rustix::io::writev(&*self.fd, &slices)
            }
            _ => self.send_many(&header, parts),
        };
        match sent {
            Ok(_) => true,
            Err(rustix::io::Errno::NOENT) => {
                tracing::debug!(unique, "the caller is gone");
                false
            }
            Err(err) => {
                if err != rustix::io::Errno::NODEV {
                    tracing::error!(unique, error = %err, "the kernel refused an answer");
                    if parts.iter().any(|p| !p.is_empty()) {
                        // It still waits for some answer.
                        self.send(unique, Err(Errno::EIO), &[]);
                    }
                }
                false
            }
        }
    }

    /// More parts than one `writev` takes are joined.
    fn send_many(&self, header: &abi::OutHeader, parts: &[&[u8]]) -> rustix::io::Result<usize> {
        let joined;
        let mut slices = vec![IoSlice::new(header.as_bytes())];
        if parts.len() < 1000 {
            slices.extend(parts.iter().map(|p| IoSlice::new(p)));
        } else {
            joined = parts.concat();
            slices.push(IoSlice::new(&joined));
        }
        rustix::io::writev(&*self.fd, &slices)
    }

    /// The kernel says that a caller was interrupted.
    pub(crate) fn interrupt(&self, unique: u64) {
        let mut parked = self.parked.borrow_mut();
        let Some(entry) = parked.get_mut(&unique) else {
            return;
        };
        let mut held = self.held.borrow_mut();
        let stays = held.get_mut(&unique).map(|interrupted| *interrupted = true);
        if entry.detached || stays.is_some() || !changes_nothing(entry.opcode) {
            tracing::debug!(unique, op = op::name(entry.opcode), "interrupted: runs on");
            return;
        }
        entry.detached = true;
        tracing::debug!(unique, op = op::name(entry.opcode), "interrupted");
        drop(parked);
        self.send(unique, Err(Errno::EINTR), &[]);
    }

    /// Lets the caller of a request wait even if it is interrupted, until what is given
    /// here is dropped: its memory is about to be used. `None` if it waits no more.
    pub(crate) fn hold(self: &Rc<Self>, unique: u64) -> Option<Held> {
        let parked = self.parked.borrow();
        if self.gone.get() || parked.get(&unique).is_some_and(|entry| entry.detached) {
            return None;
        }
        self.held.borrow_mut().insert(unique, false);
        Some(Held(Rc::clone(self), unique))
    }

    /// The kernel says goodbye (block device mounts only).
    pub(crate) fn destroy(&self) {
        self.destroyed.set(true);
    }

    /// Agrees with the kernel on version, flags and sizes.
    pub(crate) fn init(&self, unique: u64, args: &abi::InitIn, flags2: u32) {
        if args.major > abi::MAJOR {
            // The kernel asks again in our version.
            let out = abi::InitOut {
                major: abi::MAJOR,
                minor: abi::MINOR,
                ..abi::InitOut::default()
            };
            self.answer(unique, Ok(()), &[out.as_bytes()]);
            return;
        }
        if args.major < abi::MAJOR || args.minor < abi::MINOR_MIN {
            tracing::error!(
                major = args.major,
                minor = args.minor,
                "this kernel's FUSE is older than 7.31 (Linux 5.4)"
            );
            self.answer(unique, Err(Errno(libc::EPROTO)), &[]);
            return;
        }
        let (agreed, out) = negotiate(args, flags2, &self.options);
        self.agreed.set(agreed);
        tracing::debug!(
            minor = agreed.minor,
            flags = agreed.flags,
            "agreed with the kernel"
        );
        self.answer(unique, Ok(()), &[out.as_bytes()]);
        self.ready.open();
    }
}

/// A request whose caller stays where it is, whatever signals it gets.
pub(crate) struct Held(Rc<Session>, u64);

impl Drop for Held {
    fn drop(&mut self) {
        let interrupted = self.0.held.borrow_mut().remove(&self.1);
        if interrupted == Some(true) {
            self.0.interrupt(self.1);
        }
    }
}

/// Chooses from what the kernel offers.
/// The error as users know it: a mount that was cut off from its cluster answers as a
/// device that is gone.
fn for_users(error: Errno) -> Errno {
    match error {
        Errno::ENOLINK | Errno::ECONNABORTED | Errno::ESHUTDOWN => Errno::EIO,
        other => other,
    }
}

fn negotiate(args: &abi::InitIn, flags2: u32, options: &SessionOptions) -> (Agreed, abi::InitOut) {
    let mut offered = u64::from(args.flags);
    if offered & init::INIT_EXT != 0 {
        offered |= u64::from(flags2) << 32;
    }
    // Not ATOMIC_O_TRUNC: the kernel would let `O_RDONLY | O_TRUNC` cut a program that runs,
    // and only then say ETXTBSY. Without it a truncation is a request of its own.
    let mut wanted = init::EXPORT_SUPPORT
        | init::BIG_WRITES
        | init::DONT_MASK
        | init::HAS_IOCTL_DIR
        | init::DO_READDIRPLUS
        | init::READDIRPLUS_AUTO
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::ABORT_ERROR
        | init::MAX_PAGES
        // Targets never change while an inode number lives.
        | init::CACHE_SYMLINKS
        // Locks say when pages go; a changed mtime alone says nothing.
        | init::EXPLICIT_INVAL_DATA
        | init::HANDLE_KILLPRIV_V2
        | init::SETXATTR_EXT
        | init::INIT_EXT
        | init::CREATE_SUPP_GROUP
        | init::HAS_EXPIRE_ONLY
        | init::DIRECT_IO_ALLOW_MMAP;
    if options.posix_acl {
        wanted |= init::POSIX_ACL;
    }
    if options.async_read {
        wanted |= init::ASYNC_READ;
    }
    let flags = offered & wanted;
    let max_write = if flags & init::MAX_PAGES != 0 {
        MAX_IO as u32
    } else {
        128 << 10
    };
    let agreed = Agreed {
        minor: args.minor.min(abi::MINOR),
        flags,
        max_write,
    };
    let out = abi::InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR,
        max_readahead: args.max_readahead,
        flags: flags as u32,
        max_background: options.max_background,
        congestion_threshold: options.max_background / 4 * 3,
        max_write,
        time_gran: 1,
        max_pages: (max_write / 4096) as u16,
        flags2: (flags >> 32) as u32,
        ..abi::InitOut::default()
    };
    (agreed, out)
}

/// Whether the result of a request may be thrown away.
fn changes_nothing(opcode: u32) -> bool {
    matches!(
        opcode,
        op::LOOKUP
            | op::GETATTR
            | op::STATX
            | op::READLINK
            | op::READ
            | op::READDIR
            | op::READDIRPLUS
            | op::GETXATTR
            | op::LISTXATTR
            | op::STATFS
            | op::LSEEK
            | op::FSYNC
            | op::FSYNCDIR
            | op::SYNCFS
            | op::IOCTL
    )
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("agreed", &self.agreed.get())
            .field("parked", &self.parked.borrow().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kernel_offers_is_agreed_and_never_writeback() {
        let old = abi::InitIn {
            major: 7,
            minor: 31,
            max_readahead: 131_072,
            flags: 0x01ff_ffff & !(init::MAX_PAGES as u32),
        };
        let (agreed, out) = negotiate(&old, 0, &SessionOptions::default());
        assert_eq!(agreed.minor, 31);
        assert_eq!(u64::from(out.flags) & (1 << 16), 0, "no writeback cache");
        assert_eq!(u64::from(out.flags) & init::SETXATTR_EXT, 0);
        assert_eq!(out.flags2, 0);
        assert_eq!(out.max_write, 128 << 10);
        assert!(!agreed.inc_epoch());
        let new = abi::InitIn {
            minor: 45,
            flags: u32::MAX,
            ..old
        };
        let (agreed, out) = negotiate(&new, u32::MAX, &SessionOptions::default());
        assert!(agreed.inc_epoch());
        assert_eq!(out.max_pages, 256);
        assert_eq!(u64::from(out.flags) & (1 << 16 | 1 << 17 | 1 << 24), 0);
        assert_eq!(out.flags2, (agreed.flags >> 32) as u32);
        assert_ne!(agreed.flags & init::CREATE_SUPP_GROUP, 0);
    }
}

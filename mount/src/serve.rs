//! From a request to a call of `Posix` and back to an answer.
//!
//! Each kind of request makes its own small future, so that the fast path moves
//! little memory. What can go wrong: an answer that nobody wants any more. Then
//! lookups are forgotten and handles closed again, since the kernel never will.

use crate::abi::{self, op};
use crate::ioctl;
use crate::reply::{self, DirBlock};
use crate::request::{Op, Request, forgets};
use crate::session::Session;
use bytes::Bytes;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{
    Archive, Caller, Entry, Opened, Posix, Whence, WriteData, WriteHow, XattrSet,
};
use std::rc::Rc;
use zerocopy::{Immutable, IntoBytes};

const XATTR_CREATE: u32 = 1;
const XATTR_REPLACE: u32 = 2;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;
/// Largest readdir answer.
const DIR_MAX: u32 = 1 << 20;

fn caller(header: &abi::InHeader, groups: Vec<u32>) -> Caller {
    Caller {
        uid: header.uid,
        gid: header.gid,
        pid: header.pid,
        groups,
    }
}

/// All groups of a caller, where its process can be seen.
fn all_groups(pid: u32) -> Vec<u32> {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
        return Vec::new();
    };
    let line = status.lines().find_map(|l| l.strip_prefix("Groups:"));
    line.unwrap_or_default()
        .split_whitespace()
        .filter_map(|g| g.parse().ok())
        .collect()
}

/// What one request needs to answer itself.
pub(crate) struct Reply {
    session: Rc<Session>,
    unique: u64,
}

impl Reply {
    fn done(&self, result: Result<(), Errno>) -> bool {
        self.session.answer(self.unique, result, &[])
    }

    fn err(&self, errno: Errno) -> bool {
        self.done(Err(errno))
    }

    fn value<T: IntoBytes + Immutable>(&self, value: &T) -> bool {
        self.session
            .answer(self.unique, Ok(()), &[value.as_bytes()])
    }

    pub(crate) fn parts(&self, parts: &[&[u8]]) -> bool {
        self.session.answer(self.unique, Ok(()), parts)
    }

    fn entry<P: Posix>(&self, posix: &P, result: Result<Entry, Errno>) {
        match result {
            Ok(entry) => {
                let out = reply::entry_out(&entry, self.session.promise());
                if !self.value(&out) {
                    posix.forget(entry.attr.ino, 1);
                }
            }
            Err(errno) => {
                self.err(errno);
            }
        }
    }

    async fn created<P: Posix>(&self, posix: &P, result: Result<(Entry, Opened), Errno>) {
        match result {
            Ok((entry, opened)) => {
                let out = reply::entry_out(&entry, self.session.promise());
                let open = reply::open_out(&opened);
                if !self.parts(&[out.as_bytes(), open.as_bytes()]) {
                    posix.release(entry.attr.ino, opened.fh).await;
                    posix.forget(entry.attr.ino, 1);
                }
            }
            Err(errno) => {
                self.err(errno);
            }
        }
    }
}

/// Starts every kind of request but WRITE.
pub(crate) fn dispatch<P: Posix + Archive + 'static>(
    session: &Rc<Session>,
    posix: &Rc<P>,
    request: &Request<'_>,
) {
    let header = &request.header;
    let reply = || Reply {
        session: Rc::clone(session),
        unique: header.unique,
    };
    match request.op {
        Op::Forget { nlookup } => posix.forget(header.nodeid, nlookup),
        Op::BatchForget { list } => {
            for one in forgets(list) {
                posix.forget(one.nodeid, one.nlookup);
            }
        }
        Op::Interrupt { unique } => session.interrupt(unique),
        Op::NotifyReply => {}
        Op::Init { args, flags2 } => session.init(header.unique, &args, flags2),
        Op::Destroy => {
            session.destroy();
            reply().done(Ok(()));
        }
        Op::Other => {
            tracing::debug!(op = op::name(header.opcode), "not served");
            reply().err(Errno::ENOSYS);
        }
        Op::Lookup { .. }
        | Op::Mknod { .. }
        | Op::Mkdir { .. }
        | Op::Symlink { .. }
        | Op::Unlink { .. }
        | Op::Rmdir { .. }
        | Op::Rename { .. }
        | Op::Link { .. }
        | Op::Create { .. }
        | Op::Tmpfile { .. } => names(session, posix, request, reply()),
        Op::Open(_)
        | Op::Opendir(_)
        | Op::Read(_)
        | Op::Readdir { .. }
        | Op::Release(_)
        | Op::Releasedir(_)
        | Op::Fsync(_)
        | Op::Syncfs
        | Op::Fallocate(_)
        | Op::Lseek(_)
        | Op::Ioctl { .. } => files(session, posix, request, reply()),
        Op::Write { .. } => unreachable!("writes are served by `write`"),
        _ => inodes(session, posix, request, reply()),
    }
}

/// Starts a WRITE, whose data is owned.
pub(crate) fn write<P: Posix + 'static>(
    session: &Rc<Session>,
    posix: &Rc<P>,
    header: &abi::InHeader,
    args: &abi::WriteIn,
    data: WriteData,
) {
    let reply = Reply {
        session: Rc::clone(session),
        unique: header.unique,
    };
    let (cx, ino, posix) = (caller(header, Vec::new()), header.nodeid, Rc::clone(posix));
    let flags = args.flags as i32;
    let how = WriteHow {
        from_pages: args.write_flags & abi::WRITE_CACHE != 0,
        append: flags & libc::O_APPEND != 0,
        sync: flags & (libc::O_SYNC | libc::O_DSYNC) != 0,
        kill_suidgid: args.write_flags & abi::WRITE_KILL_SUIDGID != 0,
    };
    let (fh, offset) = (args.fh, args.offset);
    session.start(header, async move {
        match posix.write(&cx, ino, fh, offset, data, how).await {
            Ok(size) => reply.value(&abi::WriteOut { size, padding: 0 }),
            Err(errno) => reply.err(errno),
        };
    });
}

/// Requests about names in directories.
fn names<P: Posix + 'static>(
    session: &Rc<Session>,
    posix: &Rc<P>,
    request: &Request<'_>,
    reply: Reply,
) {
    let header = &request.header;
    let cx = caller(header, request.groups());
    let (ino, posix) = (header.nodeid, Rc::clone(posix));
    match request.op {
        Op::Lookup { name } => {
            let name = name.to_vec();
            session.start(header, async move {
                let found = posix.lookup(&cx, ino, &name).await;
                reply.entry(&*posix, found);
            });
        }
        Op::Mknod { args, name } => {
            let (name, rdev) = (name.to_vec(), reply::rdev_in(args.rdev));
            session.start(header, async move {
                let made = posix.mknod(&cx, ino, &name, args.mode, rdev, args.umask);
                let made = made.await;
                reply.entry(&*posix, made);
            });
        }
        Op::Mkdir { args, name } => {
            let name = name.to_vec();
            session.start(header, async move {
                let made = posix.mkdir(&cx, ino, &name, args.mode, args.umask).await;
                reply.entry(&*posix, made);
            });
        }
        Op::Symlink { name, target } => {
            let (name, target) = (name.to_vec(), target.to_vec());
            session.start(header, async move {
                let made = posix.symlink(&cx, ino, &name, &target).await;
                reply.entry(&*posix, made);
            });
        }
        Op::Unlink { name } => {
            let name = name.to_vec();
            session.start(header, async move {
                reply.done(posix.unlink(&cx, ino, &name).await);
            });
        }
        Op::Rmdir { name } => {
            let name = name.to_vec();
            session.start(header, async move {
                reply.done(posix.rmdir(&cx, ino, &name).await);
            });
        }
        Op::Rename {
            newdir,
            flags,
            name,
            new_name,
        } => {
            let (name, new_name) = (name.to_vec(), new_name.to_vec());
            session.start(header, async move {
                let renamed = posix.rename(&cx, ino, &name, newdir, &new_name, flags);
                reply.done(renamed.await);
            });
        }
        Op::Link { oldnodeid, name } => {
            let name = name.to_vec();
            session.start(header, async move {
                let linked = posix.link(&cx, oldnodeid, ino, &name).await;
                reply.entry(&*posix, linked);
            });
        }
        Op::Create { args, name } => {
            let name = name.to_vec();
            session.start(header, async move {
                let made = posix.create(&cx, ino, &name, args.mode, args.umask, args.flags);
                let made = made.await;
                reply.created(&*posix, made).await;
            });
        }
        Op::Tmpfile { args } => session.start(header, async move {
            let made = posix.tmpfile(&cx, ino, args.mode, args.umask, args.flags);
            let made = made.await;
            reply.created(&*posix, made).await;
        }),
        _ => unreachable!("dispatched elsewhere"),
    }
}

/// Requests about an inode's attributes, target and xattrs.
fn inodes<P: Posix + 'static>(
    session: &Rc<Session>,
    posix: &Rc<P>,
    request: &Request<'_>,
    reply: Reply,
) {
    let header = &request.header;
    let mut cx = caller(header, Vec::new());
    let (ino, posix) = (header.nodeid, Rc::clone(posix));
    match request.op {
        Op::Getattr => session.start(header, async move {
            match posix.getattr(&cx, ino).await {
                Ok((attr, valid)) => reply.value(&reply::attr_out(&attr, valid)),
                Err(errno) => reply.err(errno),
            };
        }),
        // The kernel then asks for no more of them, and uses what LOOKUP told.
        Op::Statx if !session.options().birth_time => {
            reply.err(Errno::ENOSYS);
        }
        Op::Statx => session.start(header, async move {
            match posix.getattr(&cx, ino).await {
                Ok((attr, valid)) => reply.value(&reply::statx_out(&attr, valid)),
                Err(errno) => reply.err(errno),
            };
        }),
        Op::Setattr(args) => {
            let set = reply::setattr_in(&args);
            session.start(header, async move {
                match posix.setattr(&cx, ino, &set).await {
                    Ok((attr, valid)) => reply.value(&reply::attr_out(&attr, valid)),
                    Err(errno) => reply.err(errno),
                };
            });
        }
        Op::Readlink => session.start(header, async move {
            match posix.readlink(&cx, ino).await {
                Ok(target) => reply.parts(&[&target]),
                Err(errno) => reply.err(errno),
            };
        }),
        Op::Statfs => session.start(header, async move {
            match posix.statfs().await {
                Ok(stat) => reply.value(&reply::statfs_out(&stat)),
                Err(errno) => reply.err(errno),
            };
        }),
        Op::Setxattr { flags, name, value } => {
            let how = match flags {
                0 => XattrSet::Any,
                XATTR_CREATE => XattrSet::Create,
                XATTR_REPLACE => XattrSet::Replace,
                _ => {
                    reply.err(Errno::EINVAL);
                    return;
                }
            };
            if name.starts_with(b"system.posix_acl") && cx.uid != 0 {
                // Whether the group bit survives depends on the caller's groups.
                cx.groups = all_groups(cx.pid);
            }
            let (name, value) = (name.to_vec(), value.to_vec());
            session.start(header, async move {
                reply.done(posix.setxattr(&cx, ino, &name, &value, how).await);
            });
        }
        Op::Getxattr { size, name } => {
            let name = name.to_vec();
            session.start(header, async move {
                let value = posix.getxattr(&cx, ino, &name).await;
                sized(&reply, size, value);
            });
        }
        Op::Listxattr { size } => session.start(header, async move {
            let names = posix.listxattr(&cx, ino).await;
            sized(&reply, size, names);
        }),
        Op::Removexattr { name } => {
            let name = name.to_vec();
            session.start(header, async move {
                reply.done(posix.removexattr(&cx, ino, &name).await);
            });
        }
        _ => unreachable!("dispatched elsewhere"),
    }
}

/// A value, or its size if that was asked, or ERANGE.
fn sized(reply: &Reply, size: u32, value: Result<Bytes, Errno>) {
    match value {
        Ok(value) if size == 0 => reply.value(&abi::GetxattrOut {
            size: value.len() as u32,
            padding: 0,
        }),
        Ok(value) if value.len() > size as usize => reply.err(Errno::ERANGE),
        Ok(value) => reply.parts(&[&value]),
        Err(errno) => reply.err(errno),
    };
}

/// Requests about open files and directories.
fn files<P: Posix + Archive + 'static>(
    session: &Rc<Session>,
    posix: &Rc<P>,
    request: &Request<'_>,
    reply: Reply,
) {
    let header = &request.header;
    let cx = caller(header, Vec::new());
    let (ino, posix) = (header.nodeid, Rc::clone(posix));
    match request.op {
        Op::Open(args) => session.start(header, async move {
            match posix.open(&cx, ino, args.flags).await {
                Ok(opened) => {
                    if !reply.value(&reply::open_out(&opened)) {
                        posix.release(ino, opened.fh).await;
                    }
                }
                Err(errno) => {
                    reply.err(errno);
                }
            };
        }),
        Op::Opendir(args) => session.start(header, async move {
            match posix.opendir(&cx, ino, args.flags).await {
                Ok(opened) => {
                    if !reply.value(&reply::open_out(&opened)) {
                        posix.releasedir(ino, opened.fh).await;
                    }
                }
                Err(errno) => {
                    reply.err(errno);
                }
            };
        }),
        Op::Read(args) => session.start(header, async move {
            let read = posix.read(&cx, ino, args.fh, args.offset, args.size);
            match read.await {
                Ok(pieces) => {
                    let parts: Vec<&[u8]> = pieces.iter().map(|p| &p[..]).collect();
                    let len: usize = parts.iter().map(|p| p.len()).sum();
                    assert!(len <= args.size as usize, "read {len} of {}", args.size);
                    reply.parts(&parts)
                }
                Err(errno) => reply.err(errno),
            };
        }),
        Op::Readdir { args, plus } => session.start(header, async move {
            readdir(&*posix, &cx, ino, &args, plus, &reply).await;
        }),
        Op::Release(args) => session.start(header, async move {
            posix.release(ino, args.fh).await;
            reply.done(Ok(()));
        }),
        Op::Releasedir(args) => session.start(header, async move {
            posix.releasedir(ino, args.fh).await;
            reply.done(Ok(()));
        }),
        Op::Fsync(args) => session.start(header, async move {
            let datasync = args.fsync_flags & abi::FSYNC_FDATASYNC != 0;
            reply.done(posix.fsync(&cx, ino, args.fh, datasync).await);
        }),
        Op::Syncfs => session.start(header, async move {
            reply.done(posix.syncfs().await);
        }),
        Op::Fallocate(args) => session.start(header, async move {
            let done = posix.fallocate(&cx, ino, args.fh, args.mode, args.offset, args.length);
            reply.done(done.await);
        }),
        Op::Lseek(args) => {
            let whence = match args.whence {
                SEEK_DATA => Whence::Data,
                SEEK_HOLE => Whence::Hole,
                _ => {
                    reply.err(Errno::EINVAL);
                    return;
                }
            };
            session.start(header, async move {
                match posix.lseek(&cx, ino, args.fh, args.offset, whence).await {
                    Ok(offset) => reply.value(&abi::LseekOut { offset }),
                    Err(errno) => reply.err(errno),
                };
            });
        }
        Op::Ioctl { args, data } => {
            let data = data.to_vec();
            let caller = crate::caller::Caller {
                session: Rc::clone(session),
                unique: header.unique,
                pid: header.pid,
            };
            session.start(header, async move {
                match ioctl::serve(&*posix, &cx, &caller, ino, &args, &data).await {
                    Ok((result, out)) => {
                        let head = abi::IoctlOut {
                            result,
                            ..abi::IoctlOut::default()
                        };
                        reply.parts(&[head.as_bytes(), &out])
                    }
                    Err(errno) => reply.err(errno),
                };
            });
        }
        _ => unreachable!("dispatched elsewhere"),
    }
}

async fn readdir<P: Posix>(
    posix: &P,
    cx: &Caller,
    ino: u64,
    args: &abi::ReadIn,
    plus: bool,
    reply: &Reply,
) {
    let limit = args.size.min(DIR_MAX) as usize;
    let mut block = DirBlock::new(limit, plus, reply.session.promise());
    let mut sink = |entry| block.push(&entry);
    let done = posix
        .readdir(cx, ino, args.fh, args.offset, plus, &mut sink)
        .await;
    let sent = match done {
        Ok(()) => reply.parts(&[block.bytes()]),
        Err(errno) => {
            reply.err(errno);
            false
        }
    };
    if !sent {
        for &ino in &block.looked_up {
            posix.forget(ino, 1);
        }
    }
}

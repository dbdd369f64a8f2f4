//! The programs that use the less usual part of POSIX (`plan::posix`), and what the
//! kernel does with the pages that they have changed through mappings.

use super::workload::{Scene, file_name};
use crate::kernel::{Handle, Launder};
use crate::model::{Call, ROOT, Reply, S_IFMT, S_IFREG, acl};
use crate::plan::posix::PosixOp;
use bytes::Bytes;
use outrider_core::env::LocalBoxFuture;
use outrider_core::fs::api::{Archive, Ino, Posix, SetAttr, XattrSet};
use std::ops::Range;
use std::rc::{Rc, Weak};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// About as long is a file made that is to be mapped.
const NEW_SIZE: u64 = 20_000;

/// A mount may be gone when its filesystem wants pages back.
struct Launderer<P>(Weak<Scene<P>>);

impl<P: Posix + Archive + 'static> Launder for Launderer<P> {
    fn write_back(&self, ino: Ino, pages: Range<u64>) -> LocalBoxFuture<'static, ()> {
        let scene = self.0.upgrade();
        Box::pin(async move {
            if let Some(scene) = scene {
                // What fails is in the records, and lost.
                let _ = scene.kernel.write_back(ino, &pages, &scene.desk).await;
            }
        })
    }
}

fn acl_name(default: bool) -> Bytes {
    Bytes::from_static(if default { acl::DEFAULT } else { acl::ACCESS })
}

impl<P: Posix + Archive + 'static> Scene<P> {
    /// Lets the kernel write dirty pages back when the filesystem asks for them.
    pub fn give_launder(self: &Rc<Self>) {
        let launder = Launderer(Rc::downgrade(self));
        self.kernel.caches().launder_with(Rc::new(launder));
    }
}

impl<P: Posix + Archive> Scene<P> {
    pub(super) async fn operate_posix(&self, op: &PosixOp) {
        let dir = |number: u16| self.table.borrow().dir(number);
        let any = |number: u16| self.table.borrow().any(number);
        let file = match op.file().map(|number| self.table.borrow().file(number)) {
            Some(Some(ino)) => ino,
            Some(None) => match self.new_file().await {
                Some(ino) => ino,
                None => return,
            },
            None => 0,
        };
        let acl_of = |obj: u16, default: bool| {
            let ino = if default { dir(obj) } else { any(obj) };
            (ino, acl_name(default))
        };
        let call = match *op {
            PosixOp::SetAcl {
                obj,
                default,
                dir: on_dir,
                shape,
                perms,
            } => Call::Setxattr {
                ino: if default && on_dir {
                    dir(obj)
                } else {
                    any(obj)
                },
                name: acl_name(default),
                value: acl::drawn(shape, perms),
                // The kernel passes no flags with ACLs.
                how: XattrSet::Any,
            },
            PosixOp::GetAcl { obj, default } => {
                let (ino, name) = acl_of(obj, default);
                Call::Getxattr { ino, name }
            }
            PosixOp::RemoveAcl { obj, default } => {
                let (ino, name) = acl_of(obj, default);
                Call::Removexattr { ino, name }
            }
            PosixOp::ChmodBits { obj, mode } => {
                let set = SetAttr {
                    mode: Some(u32::from(mode)),
                    ..SetAttr::default()
                };
                Call::Setattr { ino: any(obj), set }
            }
            PosixOp::OpenHandle { obj } => Call::ByHandle { ino: any(obj) },
            PosixOp::HandleParent { dir: d } => Call::HandleParent { ino: dir(d) },
            PosixOp::Exchange {
                dir: d,
                name,
                to,
                new,
                flags,
            } => Call::Exchange {
                dir: dir(d),
                name: file_name(name),
                to: dir(to),
                new: file_name(new),
                flags: u32::from(flags),
            },
            PosixOp::Punch {
                mode, offset, len, ..
            } => Call::Punch {
                ino: file,
                mode: u32::from(mode),
                offset,
                len,
            },
            PosixOp::ReadDirect { offset, len, .. } => {
                let call = Call::Read {
                    ino: file,
                    offset,
                    len,
                };
                return self.through(Call::OpenDirect { ino: file }, call).await;
            }
            PosixOp::WriteDirect {
                offset, len, sync, ..
            } => {
                let call = Call::Write {
                    ino: file,
                    offset,
                    len,
                    tag: self.desk.tag(),
                    append: false,
                    sync,
                };
                return self.through(Call::OpenDirect { ino: file }, call).await;
            }
            PosixOp::MapRead { offset, len, .. } => {
                return self.map(file, offset, u64::from(len), false).await;
            }
            PosixOp::MapWrite { offset, len, .. } => {
                return self.map(file, offset, u64::from(len), true).await;
            }
            PosixOp::OpenTrunc { hold, .. } => {
                return self.open(Call::OpenTrunc { ino: file }, hold).await;
            }
            PosixOp::Msync { .. } => {
                let all = 0..u64::MAX;
                let _ = self.kernel.write_back(file, &all, &self.desk).await;
                return;
            }
        };
        self.make(file, call).await;
    }

    /// A file for programs that need one; the same on all nodes, if it can be.
    async fn new_file(&self) -> Option<Ino> {
        let call = Call::Create {
            dir: ROOT,
            name: file_name(0),
            mode: 0o666,
            excl: false,
        };
        let (reply, handle) = self.call(call, None).await;
        self.hold(handle);
        match reply {
            Reply::Entry(attr) if attr.mode & S_IFMT == S_IFREG => Some(attr.ino),
            _ => None,
        }
    }

    /// Loads or stores through a mapping of a file, which stays mapped as long as the
    /// file is held open.
    async fn map(&self, ino: Ino, offset: u64, len: u64, store: bool) {
        if !self.kernel.caches().is_enabled() {
            return;
        }
        let Some(handle) = self.held_or_opened(ino).await else {
            return;
        };
        let (reply, _) = self.call(Call::Getattr { ino }, None).await;
        let Reply::Attr(attr) = reply else { return };
        let mut size = attr.size;
        if size == 0 && store {
            // As programs do that map a new file.
            size = offset % NEW_SIZE + len;
            let set = SetAttr {
                size: Some(size),
                ..SetAttr::default()
            };
            self.call(Call::Setattr { ino, set }, None).await;
        }
        if size == 0 {
            return;
        }
        let mut at = offset % size;
        let end = (at + len).min(size);
        let tag = self.desk.tag();
        while at < end {
            let stop = end.min((at / PAGE + 1) * PAGE);
            let (offset, len) = (at, (stop - at) as u32);
            let call = match store {
                true => Call::MapWrite {
                    ino,
                    offset,
                    len,
                    tag,
                },
                false => Call::MapRead { ino, offset, len },
            };
            self.call(call, Some(*handle)).await;
            at = stop;
        }
    }

    async fn held_or_opened(&self, ino: Ino) -> Option<Rc<Handle>> {
        if let Some(held) = self.held(ino) {
            return Some(held);
        }
        self.open(Call::Open { ino }, true).await;
        self.held(ino)
    }
}

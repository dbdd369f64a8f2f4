//! A filesystem in memory that is right by construction (it is the model),
//! and, on demand, wrong in one chosen way. It tests the judge: the right one
//! must pass every seed, each wrong one must be caught.

mod ledger;
mod shared;

use crate::backend::Host;
use crate::model::{Call, Contents, Context, Model, ROOT, Reply, S_IFDIR};
use crate::rng::Stream;
use crate::world::{MountError, System};
use bytes::Bytes;
use outrider_core::env::Duration;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{
    Attr, Caller, DirEntry, Entry, FiemapExtent, Ino, Inval, KernelCache, Opened, Posix, SetAttr,
    StatFs, Whence, WriteData, WriteHow, XattrSet,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// `O_DIRECT`.
const O_DIRECT: u32 = 0o40_000;

/// The ways in which the reference can be wrong.
pub const FLAWS: [&str; 15] = [
    "fsync_does_nothing",
    "crash_keeps_half",
    "tail_not_zeroed",
    "readdir_skips",
    "write_lost",
    "exclusive_create_opens",
    "rename_keeps_old_name",
    "unsynced_order",
    "acl_not_inherited",
    "chmod_leaves_acl",
    "deleted_handle_opens",
    "direct_write_leaves_pages",
    "mapped_page_lost",
    "walk_skips",
    "committed_seq_falls",
];

/// The ways in which it can be wrong in a world of several nodes.
pub const CLUSTER_FLAWS: [&str; 3] = ["handover_without_commit", "death_loses_half", "stale_reads"];

/// What the volume holds while no mount runs.
pub struct Volume {
    cluster: Option<shared::Shared>,
    durable: RefCell<Model>,
    ledger: RefCell<ledger::Ledger>,
    flaw: Option<&'static str>,
    next_ino: Cell<Ino>,
}

/// One mount of the reference.
pub struct Reference {
    host: Host,
    volume: Rc<Volume>,
    state: RefCell<Model>,
    rng: Stream,
    next_fh: Cell<u64>,
    kernel: Rc<dyn KernelCache>,
}

impl System for Reference {
    type Volume = Volume;
    type Fs = Reference;
    const TELLS_OTHER_KERNELS: bool = false;

    async fn make(_host: &Host, plan: &crate::plan::Plan) -> Result<Rc<Volume>, String> {
        let flaw = FLAWS
            .into_iter()
            .chain(CLUSTER_FLAWS)
            .find(|name| outrider_core::env::mutant(name));
        Ok(Rc::new(Volume {
            durable: RefCell::new(Model::new(S_IFDIR | 0o755)),
            ledger: RefCell::default(),
            cluster: plan.cluster.as_ref().map(|_| shared::Shared::default()),
            flaw,
            next_ino: Cell::new(1024),
        }))
    }

    async fn mount(
        host: &Host,
        _plan: &crate::plan::Plan,
        volume: &Rc<Volume>,
        kernel: Rc<dyn KernelCache>,
    ) -> Result<Rc<Self>, MountError> {
        let state = volume.durable.borrow().after_crash();
        let mount = Rc::new(Self {
            rng: Stream::new(host.sim.seed, "reference", host.sim.now()),
            host: host.clone(),
            volume: Rc::clone(volume),
            state: RefCell::new(state),
            next_fh: Cell::new(1),
            kernel,
        });
        let (weak, env) = (Rc::downgrade(&mount), host.env("commits"));
        let ticker = env.clone();
        crate::backend::spawn(
            &host.sim,
            &host.life,
            Box::pin(async move {
                loop {
                    ticker.sleep(Duration::from_millis(30)).await;
                    let Some(mount) = weak.upgrade() else { return };
                    mount.commit();
                }
            }),
        );
        Ok(mount)
    }

    fn fs(self: &Rc<Self>) -> Rc<Self> {
        Rc::clone(self)
    }

    async fn unmount(self: Rc<Self>) -> Result<(), String> {
        self.commit();
        Ok(())
    }

    async fn force_unmount(self: Rc<Self>) {}

    async fn check(_host: &Host, _volume: &Rc<Volume>, _clean: bool) -> Result<(), String> {
        Ok(())
    }
}

impl Reference {
    fn flawed(&self, flaw: &str) -> bool {
        self.volume.flaw == Some(flaw)
    }

    fn commit(&self) {
        if let Some(shared) = &self.volume.cluster {
            return shared.commit(self.host.life.seat());
        }
        let state = self.state.borrow();
        let mut durable = self.volume.durable.borrow_mut();
        if self.flawed("unsynced_order") && self.rng.chance(300) {
            // Only the root's entries, without what they name having been updated.
            let mut mixed = state.clone();
            for (ino, inode) in &durable.inodes {
                if mixed.inodes.contains_key(ino) && !inode.is_dir() {
                    mixed.inodes.insert(*ino, Rc::clone(inode));
                }
            }
            *durable = mixed;
            return;
        }
        if self.flawed("crash_keeps_half") && self.rng.chance(500) {
            let mut half = state.clone();
            let last = *half.inodes.keys().next_back().expect("the root");
            if last != ROOT {
                half.inodes.remove(&last);
            }
            *durable = half;
            return;
        }
        *durable = state.clone();
    }

    async fn run(&self, call: Call) -> Result<Reply, Errno> {
        let sim = &self.host.sim;
        if self.rng.chance(400) {
            sim.sleep(self.rng.below(200_000)).await;
        }
        let reply = match &self.volume.cluster {
            Some(shared) => shared.execute(self, &call),
            None => self.execute(&call),
        };
        if self.rng.chance(300) {
            sim.sleep(self.rng.below(100_000)).await;
        }
        match reply {
            Reply::Err(error) => Err(error),
            reply => Ok(reply),
        }
    }

    fn execute(&self, call: &Call) -> Reply {
        let now = self.host.sim.now();
        let wall = self.host.node.wall_nanos(now);
        let ino = self.volume.next_ino.get();
        self.volume.next_ino.set(ino + 1);
        // Calls of one moment have an order, too: that of their numbers.
        let cx = Context {
            start: ino,
            end: ino,
            wall: (wall, wall),
            ..Context::default()
        };
        let mut state = self.state.borrow_mut();
        let before = state.clone();
        let mut call = call.clone();
        if let Call::Create { excl, .. } = &mut call
            && self.flawed("exclusive_create_opens")
        {
            *excl = false;
        }
        let mut reply = state.answer(&call, ino, &cx);
        match (&call, &mut reply) {
            (Call::Setattr { ino, set }, Reply::Entry(_))
                if set.size.is_some() && self.flawed("tail_not_zeroed") =>
            {
                let block = set.size.unwrap_or(0) / 4096;
                let old = before.get(*ino).and_then(|inode| inode.blocks.get(&block));
                let inode = state.get_mut(*ino);
                if let (Some(old), Some(new)) = (old, inode.blocks.get_mut(&block)) {
                    *new = Rc::clone(old);
                }
            }
            (Call::Readdir { .. }, Reply::Names(names))
                if self.flawed("readdir_skips") && names.len() > 4 && self.rng.chance(200) =>
            {
                names.remove(3);
            }
            (Call::Create { .. } | Call::Mkdir { .. } | Call::Mknod { .. }, Reply::Entry(attr))
                if self.flawed("acl_not_inherited") && before.get(attr.ino).is_none() =>
            {
                state.get_mut(attr.ino).xattrs.clear();
            }
            (Call::Setattr { ino, set }, Reply::Entry(_))
                if set.mode.is_some() && self.flawed("chmod_leaves_acl") =>
            {
                if let Some(old) = before.get(*ino) {
                    state.get_mut(*ino).xattrs = old.xattrs.clone();
                }
            }
            (Call::ByHandle { ino }, answer @ Reply::Err(_))
                if self.flawed("deleted_handle_opens") =>
            {
                if let Some(attr) = state.attr(*ino) {
                    *answer = Reply::Entry(attr);
                }
            }
            (Call::WritePages { .. }, Reply::Number(_))
                if self.flawed("mapped_page_lost") && self.rng.chance(200) =>
            {
                *state = before;
            }
            (Call::Write { .. }, Reply::Number(_))
                if self.flawed("write_lost") && self.rng.chance(50) =>
            {
                *state = before;
            }
            (Call::Rename { dir, name, .. }, Reply::Done)
                if self.flawed("rename_keeps_old_name") && self.rng.chance(200) =>
            {
                let old = before.get(*dir).and_then(|inode| inode.entries.get(name));
                let inode = state.get_mut(*dir);
                if let Some(old) = old {
                    inode.entries.insert(name.clone(), *old);
                }
            }
            _ => {}
        }
        reply
    }

    async fn entry(&self, call: Call) -> Result<Entry, Errno> {
        // With others about it has no way to take back what the kernel keeps.
        let valid = match self.volume.cluster {
            Some(_) => Duration::ZERO,
            None => Duration::from_secs(3600),
        };
        match self.run(call).await? {
            Reply::Entry(attr) => Ok(Entry {
                attr,
                entry_valid: valid,
                attr_valid: valid,
            }),
            other => unreachable!("an entry, not {other:?}"),
        }
    }

    async fn attr_of(&self, call: Call) -> Result<(Attr, Duration), Errno> {
        let entry = self.entry(call).await?;
        Ok((entry.attr, entry.attr_valid))
    }

    async fn bytes(&self, call: Call) -> Result<Bytes, Errno> {
        match self.run(call).await? {
            Reply::Bytes(bytes) => Ok(bytes),
            other => unreachable!("bytes, not {other:?}"),
        }
    }

    async fn number(&self, call: Call) -> Result<u64, Errno> {
        match self.run(call).await? {
            Reply::Number(number) => Ok(number),
            other => unreachable!("a number, not {other:?}"),
        }
    }

    fn open_handle(&self) -> Opened {
        let fh = self.next_fh.get();
        self.next_fh.set(fh + 1);
        Opened {
            fh: fh << 1,
            keep_cache: self.volume.cluster.is_none(),
            direct_io: false,
        }
    }
}

fn owned(name: &[u8]) -> Bytes {
    Bytes::copy_from_slice(name)
}

impl Posix for Reference {
    async fn lookup(&self, _: &Caller, parent: Ino, name: &[u8]) -> Result<Entry, Errno> {
        let call = match name {
            b"." => Call::ByHandle { ino: parent },
            b".." => Call::HandleParent { ino: parent },
            name => Call::Lookup {
                dir: parent,
                name: owned(name),
            },
        };
        self.entry(call).await
    }

    fn forget(&self, _: Ino, _: u64) {}

    async fn getattr(&self, _: &Caller, ino: Ino) -> Result<(Attr, Duration), Errno> {
        self.attr_of(Call::Getattr { ino }).await
    }

    async fn setattr(
        &self,
        _: &Caller,
        ino: Ino,
        set: &SetAttr,
    ) -> Result<(Attr, Duration), Errno> {
        self.attr_of(Call::Setattr { ino, set: *set }).await
    }

    async fn readlink(&self, _: &Caller, ino: Ino) -> Result<Bytes, Errno> {
        self.bytes(Call::Readlink { ino }).await
    }

    async fn mknod(
        &self,
        _: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
        _: u32,
    ) -> Result<Entry, Errno> {
        let name = owned(name);
        self.entry(Call::Mknod {
            dir: parent,
            name,
            mode,
            rdev,
        })
        .await
    }

    async fn mkdir(
        &self,
        _: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        _: u32,
    ) -> Result<Entry, Errno> {
        let name = owned(name);
        self.entry(Call::Mkdir {
            dir: parent,
            name,
            mode,
        })
        .await
    }

    async fn unlink(&self, _: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        let name = owned(name);
        self.run(Call::Unlink { dir: parent, name }).await.map(drop)
    }

    async fn rmdir(&self, _: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        let name = owned(name);
        self.run(Call::Rmdir { dir: parent, name }).await.map(drop)
    }

    async fn symlink(
        &self,
        _: &Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> Result<Entry, Errno> {
        self.entry(Call::Symlink {
            dir: parent,
            name: owned(name),
            target: owned(target),
        })
        .await
    }

    async fn rename(
        &self,
        _: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        if flags & !1 != 0 {
            let call = Call::Exchange {
                dir: parent,
                name: owned(name),
                to: new_parent,
                new: owned(new_name),
                flags,
            };
            return self.run(call).await.map(drop);
        }
        self.run(Call::Rename {
            dir: parent,
            name: owned(name),
            to: new_parent,
            new: owned(new_name),
            noreplace: flags != 0,
        })
        .await
        .map(drop)
    }

    async fn link(
        &self,
        _: &Caller,
        ino: Ino,
        new_parent: Ino,
        new_name: &[u8],
    ) -> Result<Entry, Errno> {
        self.entry(Call::Link {
            ino,
            dir: new_parent,
            name: owned(new_name),
        })
        .await
    }

    async fn open(&self, _: &Caller, ino: Ino, flags: u32) -> Result<Opened, Errno> {
        let direct_io = flags & O_DIRECT != 0;
        self.run(match direct_io {
            true => Call::OpenDirect { ino },
            false => Call::Open { ino },
        })
        .await?;
        let opened = self.open_handle();
        Ok(Opened {
            // The kernel's handles say how they were opened.
            fh: opened.fh | u64::from(direct_io),
            direct_io,
            ..opened
        })
    }

    async fn create(
        &self,
        _: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        _: u32,
        flags: u32,
    ) -> Result<(Entry, Opened), Errno> {
        let entry = self.entry(Call::Create {
            dir: parent,
            name: owned(name),
            mode,
            excl: flags & 0o200 != 0,
        });
        Ok((entry.await?, self.open_handle()))
    }

    async fn tmpfile(
        &self,
        _: &Caller,
        parent: Ino,
        mode: u32,
        _: u32,
        _: u32,
    ) -> Result<(Entry, Opened), Errno> {
        let entry = self.entry(Call::Tmpfile { dir: parent, mode }).await?;
        Ok((entry, self.open_handle()))
    }

    async fn read(
        &self,
        _: &Caller,
        ino: Ino,
        _: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<Bytes>, Errno> {
        let call = Call::Read {
            ino,
            offset,
            len: size,
        };
        Ok(vec![self.bytes(call).await?])
    }

    async fn write(
        &self,
        _: &Caller,
        ino: Ino,
        fh: u64,
        offset: u64,
        data: WriteData,
        how: WriteHow,
    ) -> Result<u32, Errno> {
        if how.from_pages {
            let data = Contents(Bytes::copy_from_slice(&data));
            let call = Call::WritePages { ino, offset, data };
            return Ok(self.number(call).await? as u32);
        }
        // The bytes say which write they are from: find the tag that gives them.
        let len = data.len() as u32;
        let tag = (0..)
            .flat_map(|tag| [tag, tag | crate::model::FLAT])
            .find(|tag| {
                data.iter()
                    .take(64)
                    .zip(offset..)
                    .all(|(byte, at)| *byte == crate::model::pattern_byte(*tag, at))
                    && crate::model::pattern(*tag, offset, len)[..] == data[..]
            })
            .expect("a write of the workload");
        let call = Call::Write {
            ino,
            offset,
            len,
            tag,
            append: how.append,
            sync: how.sync,
        };
        let written = self.number(call).await?;
        if fh & 1 != 0 && !self.flawed("direct_write_leaves_pages") {
            // What was read meanwhile is in the kernel's pages.
            let (start, len) = (offset, written.max(1));
            let range = Inval::PageRange { ino, start, len };
            self.kernel.invalidate(vec![range]).await;
        }
        if how.sync && !self.flawed("fsync_does_nothing") {
            self.commit();
        }
        Ok(written as u32)
    }

    async fn release(&self, ino: Ino, _: u64) {
        self.execute(&Call::Release { ino });
    }

    async fn fsync(&self, _: &Caller, ino: Ino, _: u64, _: bool) -> Result<(), Errno> {
        self.run(Call::Fsync { ino }).await?;
        self.syncfs().await
    }

    async fn syncfs(&self) -> Result<(), Errno> {
        if !self.flawed("fsync_does_nothing") {
            self.commit();
        }
        Ok(())
    }

    async fn setxattr(
        &self,
        _: &Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: XattrSet,
    ) -> Result<(), Errno> {
        self.run(Call::Setxattr {
            ino,
            name: owned(name),
            value: owned(value),
            how,
        })
        .await
        .map(drop)
    }

    async fn getxattr(&self, _: &Caller, ino: Ino, name: &[u8]) -> Result<Bytes, Errno> {
        let name = owned(name);
        self.bytes(Call::Getxattr { ino, name }).await
    }

    async fn listxattr(&self, _: &Caller, ino: Ino) -> Result<Bytes, Errno> {
        self.bytes(Call::Listxattr { ino }).await
    }

    async fn removexattr(&self, _: &Caller, ino: Ino, name: &[u8]) -> Result<(), Errno> {
        let name = owned(name);
        self.run(Call::Removexattr { ino, name }).await.map(drop)
    }

    async fn opendir(&self, _: &Caller, _: Ino, _: u32) -> Result<Opened, Errno> {
        Ok(self.open_handle())
    }

    async fn readdir(
        &self,
        _: &Caller,
        ino: Ino,
        _: u64,
        offset: u64,
        _: bool,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<(), Errno> {
        let Reply::Names(names) = self.run(Call::Readdir { ino }).await? else {
            unreachable!("names");
        };
        for (index, (ino, dtype, name)) in names.into_iter().enumerate().skip(offset as usize) {
            let entry = DirEntry {
                ino,
                next: index as u64 + 1,
                dtype,
                name,
                entry: None,
            };
            if !sink(entry) {
                break;
            }
        }
        Ok(())
    }

    async fn releasedir(&self, _: Ino, _: u64) {}

    async fn statfs(&self) -> Result<StatFs, Errno> {
        Ok(StatFs::default())
    }

    async fn fallocate(
        &self,
        _: &Caller,
        ino: Ino,
        _: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        if mode & !1 != 0 {
            let call = Call::Punch {
                ino,
                mode,
                offset,
                len,
            };
            return self.run(call).await.map(drop);
        }
        self.run(Call::Fallocate {
            ino,
            keep: mode != 0,
            offset,
            len,
        })
        .await
        .map(drop)
    }

    async fn lseek(
        &self,
        _: &Caller,
        ino: Ino,
        _: u64,
        offset: u64,
        whence: Whence,
    ) -> Result<u64, Errno> {
        let hole = whence == Whence::Hole;
        self.number(Call::Seek { ino, offset, hole }).await
    }

    async fn fiemap(
        &self,
        _: &Caller,
        ino: Ino,
        _: u64,
        _: u64,
        _: usize,
    ) -> Result<Vec<FiemapExtent>, Errno> {
        match self.run(Call::Fiemap { ino }).await? {
            Reply::Extents(extents) => Ok(extents),
            other => unreachable!("extents, not {other:?}"),
        }
    }
}

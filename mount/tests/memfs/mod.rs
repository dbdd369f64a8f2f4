//! A small complete filesystem in memory, to test the front without the rest.
//!
//! Its files are byte vectors; it knows all that the front can ask for. Two
//! names are special: reading the xattr `user.block` waits for ever, and
//! `user.slow` waits a while. Its indexes are made up, see [`INDEXED`].

use bytes::Bytes;
use outrider_core::env::{Duration, Env, Gate, WallTime};
use outrider_core::errno::Errno;
use outrider_core::fs::api::{
    Archive, Attr, Caller, DirEntry, Entry, FiemapExtent, IndexEntry, Ino, InodeIndex, Opened,
    Posix, SetAttr, SetTime, StatFs, StatMore, Whence, WriteData, WriteHow, XattrSet,
};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};

const LONG: Duration = Duration::from_secs(3600);

#[derive(Default)]
struct Node {
    attr: Attr,
    data: Vec<u8>,
    entries: HashMap<Vec<u8>, (Ino, u64)>,
    order: BTreeMap<u64, Vec<u8>>,
    next_pos: u64,
    parent: Ino,
    xattrs: BTreeMap<Vec<u8>, Bytes>,
    opens: u32,
}

pub struct MemFs {
    env: Env,
    nodes: RefCell<HashMap<Ino, Node>>,
    next: Cell<Ino>,
    pub attr_valid: Cell<Duration>,
    pub blocked: Gate,
    pub syncs: Cell<u32>,
    pub forgotten: Cell<u64>,
    pub released: Cell<u64>,
}

type Res<T> = Result<T, Errno>;

/// Entries of each index: inode n at seq 2n. A walk from the one behind them waits for
/// `blocked`.
pub const INDEXED: u64 = 10_000;

impl Archive for MemFs {
    async fn walk_inodes(
        &self,
        _index: InodeIndex,
        first: IndexEntry,
        last: IndexEntry,
        max: usize,
    ) -> Res<Vec<IndexEntry>> {
        if first.major == u64::MAX {
            self.blocked.wait().await;
        }
        let all = (1..=INDEXED).map(|ino| IndexEntry {
            major: 2 * ino,
            ino,
        });
        let wanted = all.filter(|entry| (first..=last).contains(entry));
        Ok(wanted.take(max).collect())
    }

    async fn committed_seq(&self) -> Res<u64> {
        Ok(2 * INDEXED)
    }

    async fn stat_more(&self, ino: Ino) -> Res<StatMore> {
        self.with(ino, |node| {
            Ok(StatMore {
                meta_seq: 1,
                data_seq: 2,
                data_version: 3,
                online_blocks: node.attr.blocks / 8,
                offline_blocks: 5,
                crtime: node.attr.crtime,
            })
        })
    }
}

impl MemFs {
    pub fn new(env: &Env) -> Self {
        let fs = Self {
            env: env.clone(),
            nodes: RefCell::default(),
            next: Cell::new(2),
            attr_valid: Cell::new(LONG),
            blocked: Gate::default(),
            syncs: Cell::new(0),
            forgotten: Cell::new(0),
            released: Cell::new(0),
        };
        let now = fs.now();
        let attr = Attr {
            ino: 1,
            mode: libc::S_IFDIR | 0o755,
            nlink: 2,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            ..Attr::default()
        };
        fs.nodes.borrow_mut().insert(
            1,
            Node {
                attr,
                parent: 1,
                next_pos: 3,
                ..Node::default()
            },
        );
        fs
    }

    fn now(&self) -> WallTime {
        self.env.clock.wall()
    }

    fn with<T>(&self, ino: Ino, f: impl FnOnce(&mut Node) -> Res<T>) -> Res<T> {
        f(self.nodes.borrow_mut().get_mut(&ino).ok_or(Errno::ESTALE)?)
    }

    fn entry(&self, ino: Ino) -> Res<Entry> {
        let attr_valid = self.attr_valid.get();
        self.with(ino, |node| {
            Ok(Entry {
                attr: node.attr,
                entry_valid: LONG,
                attr_valid,
            })
        })
    }

    fn child(&self, parent: Ino, name: &[u8]) -> Res<Ino> {
        self.with(parent, |dir| {
            dir.entries.get(name).map(|e| e.0).ok_or(Errno::ENOENT)
        })
    }

    fn touch(&self, ino: Ino) {
        let now = self.now();
        let _ = self.with(ino, |node| {
            node.attr.mtime = now;
            node.attr.ctime = now;
            Ok(())
        });
    }

    fn add(&self, parent: Ino, name: &[u8], ino: Ino) -> Res<()> {
        self.with(parent, |dir| {
            if dir.entries.contains_key(name) {
                return Err(Errno::EEXIST);
            }
            let pos = dir.next_pos;
            dir.next_pos += 1;
            dir.entries.insert(name.to_vec(), (ino, pos));
            dir.order.insert(pos, name.to_vec());
            dir.attr.size += name.len() as u64;
            Ok(())
        })?;
        self.touch(parent);
        Ok(())
    }

    fn remove(&self, parent: Ino, name: &[u8]) -> Res<Ino> {
        let ino = self.with(parent, |dir| {
            let (ino, pos) = dir.entries.remove(name).ok_or(Errno::ENOENT)?;
            dir.order.remove(&pos);
            dir.attr.size -= name.len() as u64;
            Ok(ino)
        })?;
        self.touch(parent);
        Ok(ino)
    }

    fn make(&self, cx: &Caller, parent: Ino, mode: u32, umask: u32) -> Res<Ino> {
        let parent_acl = self.with(parent, |dir| {
            Ok(dir.xattrs.get(&b"system.posix_acl_default"[..]).cloned())
        })?;
        let (now, ino) = (self.now(), self.next.get());
        self.next.set(ino + 1);
        let mut node = Node {
            parent,
            next_pos: 3,
            ..Node::default()
        };
        let mode = if parent_acl.is_some() {
            mode
        } else {
            mode & !umask
        };
        let dir = mode & libc::S_IFMT == libc::S_IFDIR;
        if let Some(acl) = parent_acl {
            node.xattrs
                .insert(b"system.posix_acl_access".to_vec(), acl.clone());
            if dir {
                node.xattrs
                    .insert(b"system.posix_acl_default".to_vec(), acl);
            }
        }
        node.attr = Attr {
            ino,
            mode,
            nlink: 1 + u32::from(dir),
            uid: cx.uid,
            gid: cx.gid,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            ..Attr::default()
        };
        self.nodes.borrow_mut().insert(ino, node);
        Ok(ino)
    }

    fn make_named(&self, cx: &Caller, parent: Ino, name: &[u8], mode: u32, umask: u32) -> Res<Ino> {
        if name.len() > 255 {
            return Err(Errno::ENAMETOOLONG);
        }
        if self.child(parent, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let ino = self.make(cx, parent, mode, umask)?;
        self.add(parent, name, ino)?;
        Ok(ino)
    }

    fn unref(&self, ino: Ino) {
        let gone = self.with(ino, |n| Ok(n.attr.nlink == 0 && n.opens == 0));
        if gone == Ok(true) {
            self.nodes.borrow_mut().remove(&ino);
        }
    }

    fn opened(&self, ino: Ino) -> Res<Opened> {
        self.with(ino, |node| {
            node.opens += 1;
            Ok(Opened {
                fh: ino * 10,
                keep_cache: true,
                direct_io: false,
            })
        })
    }

    fn resize(&self, ino: Ino, size: u64) -> Res<()> {
        self.with(ino, |node| {
            node.data.resize(size as usize, 0);
            node.attr.size = size;
            node.attr.blocks = size.div_ceil(4096) * 8;
            Ok(())
        })?;
        self.touch(ino);
        Ok(())
    }
}

/// Mode bits of an ACL in its xattr form.
fn acl_mode(acl: &[u8], mode: u32) -> u32 {
    let (mut bits, mut group) = (mode & !0o777, None);
    let mut mask = None;
    for entry in acl.get(4..).unwrap_or_default().chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let perm = u32::from(u16::from_le_bytes([entry[2], entry[3]]));
        match tag {
            1 => bits |= perm << 6,
            4 => group = Some(perm),
            0x10 => mask = Some(perm),
            0x20 => bits |= perm,
            _ => {}
        }
    }
    bits | mask.or(group).unwrap_or(0) << 3
}

impl Posix for MemFs {
    async fn lookup(&self, _cx: &Caller, parent: Ino, name: &[u8]) -> Res<Entry> {
        match name {
            b"." => self.entry(parent),
            b".." => self.entry(self.with(parent, |n| Ok(n.parent))?),
            _ if name.len() > 255 => Err(Errno::ENAMETOOLONG),
            _ => self.entry(self.child(parent, name)?),
        }
    }

    fn forget(&self, _ino: Ino, count: u64) {
        self.forgotten.set(self.forgotten.get() + count);
    }

    async fn getattr(&self, _cx: &Caller, ino: Ino) -> Res<(Attr, Duration)> {
        let valid = self.attr_valid.get();
        self.with(ino, |node| Ok((node.attr, valid)))
    }

    async fn setattr(&self, cx: &Caller, ino: Ino, set: &SetAttr) -> Res<(Attr, Duration)> {
        if let Some(size) = set.size {
            self.resize(ino, size)?;
        }
        let now = self.now();
        let pick = |t: SetTime| match t {
            SetTime::Now => now,
            SetTime::At(t) => t,
        };
        self.with(ino, |node| {
            let attr = &mut node.attr;
            if let Some(mode) = set.mode {
                attr.mode = attr.mode & libc::S_IFMT | mode & 0o7777;
            }
            if set.kill_suidgid || set.uid.is_some() || set.gid.is_some() {
                attr.mode &= !0o6000;
            }
            attr.uid = set.uid.unwrap_or(attr.uid);
            attr.gid = set.gid.unwrap_or(attr.gid);
            attr.atime = set.atime.map_or(attr.atime, pick);
            attr.mtime = set.mtime.map_or(attr.mtime, pick);
            attr.ctime = now;
            Ok(())
        })?;
        self.getattr(cx, ino).await
    }

    async fn readlink(&self, _cx: &Caller, ino: Ino) -> Res<Bytes> {
        self.with(ino, |node| Ok(Bytes::copy_from_slice(&node.data)))
    }

    async fn mknod(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> Res<Entry> {
        let ino = self.make_named(cx, parent, name, mode, umask)?;
        self.with(ino, |node| {
            node.attr.rdev = rdev;
            Ok(())
        })?;
        self.entry(ino)
    }

    async fn mkdir(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> Res<Entry> {
        let ino = self.make_named(cx, parent, name, mode | libc::S_IFDIR, umask)?;
        self.with(parent, |dir| {
            dir.attr.nlink += 1;
            Ok(())
        })?;
        self.entry(ino)
    }

    async fn unlink(&self, _cx: &Caller, parent: Ino, name: &[u8]) -> Res<()> {
        let ino = self.remove(parent, name)?;
        self.with(ino, |node| {
            node.attr.nlink -= 1;
            Ok(())
        })?;
        self.unref(ino);
        Ok(())
    }

    async fn rmdir(&self, _cx: &Caller, parent: Ino, name: &[u8]) -> Res<()> {
        let ino = self.child(parent, name)?;
        if !self.with(ino, |node| Ok(node.entries.is_empty()))? {
            return Err(Errno::ENOTEMPTY);
        }
        self.remove(parent, name)?;
        self.with(ino, |node| {
            node.attr.nlink = 0;
            Ok(())
        })?;
        self.with(parent, |dir| {
            dir.attr.nlink -= 1;
            Ok(())
        })?;
        self.unref(ino);
        Ok(())
    }

    async fn symlink(&self, cx: &Caller, parent: Ino, name: &[u8], target: &[u8]) -> Res<Entry> {
        let ino = self.make_named(cx, parent, name, libc::S_IFLNK | 0o777, 0)?;
        self.with(ino, |node| {
            node.data = target.to_vec();
            node.attr.size = target.len() as u64;
            Ok(())
        })?;
        self.entry(ino)
    }

    async fn rename(
        &self,
        _cx: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: u32,
    ) -> Res<()> {
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(Errno::EINVAL);
        }
        let (ino, target) = (self.child(parent, name)?, self.child(new_parent, new_name));
        if flags & libc::RENAME_NOREPLACE != 0 && target.is_ok() {
            return Err(Errno::EEXIST);
        }
        if flags & libc::RENAME_EXCHANGE != 0 {
            let other = target?;
            self.remove(parent, name)?;
            self.remove(new_parent, new_name)?;
            self.add(parent, name, other)?;
            return self.add(new_parent, new_name, ino);
        }
        if let Ok(other) = target {
            if !self.with(other, |n| Ok(n.entries.is_empty()))? {
                return Err(Errno::ENOTEMPTY);
            }
            self.remove(new_parent, new_name)?;
            self.with(other, |n| {
                n.attr.nlink = n.attr.nlink.saturating_sub(1);
                Ok(())
            })?;
            self.unref(other);
        }
        self.remove(parent, name)?;
        self.with(ino, |n| {
            n.parent = new_parent;
            Ok(())
        })?;
        self.add(new_parent, new_name, ino)
    }

    async fn link(&self, _cx: &Caller, ino: Ino, parent: Ino, name: &[u8]) -> Res<Entry> {
        self.add(parent, name, ino)?;
        self.with(ino, |node| {
            node.attr.nlink += 1;
            Ok(())
        })?;
        self.entry(ino)
    }

    async fn open(&self, _cx: &Caller, ino: Ino, _flags: u32) -> Res<Opened> {
        self.opened(ino)
    }

    async fn create(
        &self,
        cx: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        umask: u32,
        flags: u32,
    ) -> Res<(Entry, Opened)> {
        let ino = match self.child(parent, name) {
            Ok(ino) if flags as i32 & libc::O_EXCL == 0 => ino,
            Ok(_) => return Err(Errno::EEXIST),
            Err(_) => self.make_named(cx, parent, name, mode, umask)?,
        };
        Ok((self.entry(ino)?, self.opened(ino)?))
    }

    async fn tmpfile(
        &self,
        cx: &Caller,
        parent: Ino,
        mode: u32,
        umask: u32,
        _flags: u32,
    ) -> Res<(Entry, Opened)> {
        let ino = self.make(cx, parent, mode, umask)?;
        self.with(ino, |node| {
            node.attr.nlink = 0;
            Ok(())
        })?;
        Ok((self.entry(ino)?, self.opened(ino)?))
    }

    async fn read(
        &self,
        _cx: &Caller,
        ino: Ino,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Res<Vec<Bytes>> {
        assert_eq!(fh, ino * 10);
        self.with(ino, |node| {
            let start = (offset as usize).min(node.data.len());
            let end = (start + size as usize).min(node.data.len());
            // In two pieces, to exercise vectors.
            let middle = start + (end - start) / 2;
            Ok(vec![
                Bytes::copy_from_slice(&node.data[start..middle]),
                Bytes::copy_from_slice(&node.data[middle..end]),
            ])
        })
    }

    async fn write(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        offset: u64,
        data: WriteData,
        how: WriteHow,
    ) -> Res<u32> {
        self.with(ino, |node| {
            let start = if how.append && !how.from_pages {
                node.data.len()
            } else {
                offset as usize
            };
            let end = start + data.len();
            if node.data.len() < end {
                node.data.resize(end, 0);
            }
            node.data[start..end].copy_from_slice(&data);
            node.attr.size = node.data.len() as u64;
            node.attr.blocks = node.attr.size.div_ceil(4096) * 8;
            if how.kill_suidgid {
                node.attr.mode &= !0o6000;
            }
            Ok(())
        })?;
        self.touch(ino);
        Ok(data.len() as u32)
    }

    async fn release(&self, ino: Ino, fh: u64) {
        assert_eq!(fh, ino * 10);
        self.released.set(self.released.get() + 1);
        let _ = self.with(ino, |node| {
            node.opens -= 1;
            Ok(())
        });
        self.unref(ino);
    }

    async fn fsync(&self, _cx: &Caller, _ino: Ino, _fh: u64, _datasync: bool) -> Res<()> {
        self.syncfs().await
    }

    async fn syncfs(&self) -> Res<()> {
        self.env.sleep(Duration::from_millis(2)).await;
        self.syncs.set(self.syncs.get() + 1);
        Ok(())
    }

    async fn setxattr(
        &self,
        _cx: &Caller,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: XattrSet,
    ) -> Res<()> {
        self.with(ino, |node| {
            match (how, node.xattrs.contains_key(name)) {
                (XattrSet::Create, true) => return Err(Errno::EEXIST),
                (XattrSet::Replace, false) => return Err(Errno::ENODATA),
                _ => {}
            }
            if name == b"system.posix_acl_access" {
                node.attr.mode = acl_mode(value, node.attr.mode);
            }
            node.xattrs
                .insert(name.to_vec(), Bytes::copy_from_slice(value));
            Ok(())
        })
    }

    async fn getxattr(&self, _cx: &Caller, ino: Ino, name: &[u8]) -> Res<Bytes> {
        match name {
            b"user.block" => self.blocked.wait().await,
            b"user.slow" => self.env.sleep(Duration::from_millis(300)).await,
            _ => {}
        }
        self.with(ino, |n| n.xattrs.get(name).cloned().ok_or(Errno::ENODATA))
    }

    async fn listxattr(&self, _cx: &Caller, ino: Ino) -> Res<Bytes> {
        self.with(ino, |node| {
            let names = node.xattrs.keys().flat_map(|k| [&k[..], b"\0"].concat());
            Ok(names.collect::<Vec<u8>>().into())
        })
    }

    async fn removexattr(&self, _cx: &Caller, ino: Ino, name: &[u8]) -> Res<()> {
        self.with(ino, |node| {
            node.xattrs.remove(name).map(drop).ok_or(Errno::ENODATA)
        })
    }

    async fn opendir(&self, _cx: &Caller, ino: Ino, _flags: u32) -> Res<Opened> {
        self.opened(ino)
    }

    async fn readdir(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        offset: u64,
        plus: bool,
        sink: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Res<()> {
        let nodes = self.nodes.borrow();
        let dir = nodes.get(&ino).ok_or(Errno::ESTALE)?;
        for (pos, name, target) in [(0, &b"."[..], ino), (1, b"..", dir.parent)] {
            let entry = DirEntry {
                ino: target,
                next: pos + 1,
                dtype: libc::DT_DIR,
                name: Bytes::copy_from_slice(name),
                entry: None,
            };
            if offset <= pos && !sink(entry) {
                return Ok(());
            }
        }
        for (&pos, name) in dir.order.range(offset.max(2)..) {
            let node = &nodes[&dir.entries[name].0];
            let entry = plus.then(|| Entry {
                attr: node.attr,
                entry_valid: LONG,
                attr_valid: self.attr_valid.get(),
            });
            let entry = DirEntry {
                ino: node.attr.ino,
                next: pos + 1,
                dtype: (node.attr.mode >> 12) as u8,
                name: Bytes::copy_from_slice(name),
                entry,
            };
            if !sink(entry) {
                break;
            }
        }
        Ok(())
    }

    async fn releasedir(&self, ino: Ino, fh: u64) {
        self.release(ino, fh).await;
    }

    async fn statfs(&self) -> Res<StatFs> {
        Ok(StatFs {
            blocks: 1000,
            free: 500,
            files: 1 << 20,
            files_free: 1 << 19,
        })
    }

    async fn fallocate(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Res<()> {
        match mode as i32 {
            0 => self.with(ino, |n| Ok(n.attr.size))?.max(offset + len),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let size = self.with(ino, |n| Ok(n.attr.size))?;
        self.resize(ino, size.max(offset + len))
    }

    async fn lseek(
        &self,
        _cx: &Caller,
        ino: Ino,
        _fh: u64,
        offset: u64,
        whence: Whence,
    ) -> Res<u64> {
        let size = self.with(ino, |n| Ok(n.attr.size))?;
        match whence {
            _ if offset >= size => Err(Errno::ENXIO),
            Whence::Data => Ok(offset),
            Whence::Hole => Ok(size),
        }
    }

    async fn fiemap(
        &self,
        _cx: &Caller,
        ino: Ino,
        start: u64,
        len: u64,
        max: usize,
    ) -> Res<Vec<FiemapExtent>> {
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        // One extent for each block, to need several answers.
        let blocks = self.with(ino, |n| Ok(n.attr.size))?.div_ceil(4096);
        let extents = (start / 4096..blocks).take(max).map(|b| FiemapExtent {
            logical: b * 4096,
            physical: (b + 7) * 4096,
            length: 4096,
            flags: u32::from(b + 1 == blocks),
        });
        Ok(extents.collect())
    }
}

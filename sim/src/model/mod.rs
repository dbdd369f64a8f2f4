//! The sequential POSIX model: what a filesystem of this kind may answer, one
//! request after the other.
//!
//! A [`Model`] is a whole filesystem as a value; cloning shares what does not
//! change. [`Model::apply`] takes a request and the answer that was seen and
//! gives the states that may follow: none, if the answer is wrong. Where the
//! specification leaves freedom (error precedence, times within the duration
//! of a call, what a failed write left) the model allows every choice.
//!
//! What can go wrong: a model stricter than the specification cries wolf, a
//! laxer one is deaf. `reference` with its planted faults tests both.

pub mod acl;
pub mod call;
mod execute;
pub mod memo;
pub mod recover;

pub use call::{Call, Contents, FLAT, Reply, pattern, pattern_byte};
pub use memo::{Memo, Page};

use bytes::Bytes;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Attr, Ino, SetAttr};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of a block of a file.
pub const BLOCK: u64 = 4096;
/// The root directory.
pub const ROOT: Ino = 1;

/// File type bits of a mode.
pub const S_IFMT: u32 = 0o170_000;
/// A directory.
pub const S_IFDIR: u32 = 0o040_000;
/// A regular file.
pub const S_IFREG: u32 = 0o100_000;
/// A symbolic link.
pub const S_IFLNK: u32 = 0o120_000;
/// The umask of all programs.
pub const UMASK: u32 = 0o022;

/// A time stamp known to lie in a range of the wall clock (nanoseconds since
/// 1970), and when (world time) the call that set it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Earliest possible value.
    pub low: i64,
    /// Latest possible value.
    pub high: i64,
    set_by: u64,
}

impl Stamp {
    /// A known value.
    pub fn exact(value: i64) -> Self {
        Self {
            low: value,
            high: value,
            set_by: 0,
        }
    }

    /// Set by a call: its range, or, if the call that set the old value ran at
    /// the same time, both ranges (their order is not known).
    fn set(&mut self, cx: &Context) {
        let together = cx.start <= self.set_by;
        let (low, high) = cx.wall;
        *self = Self {
            low: if together { self.low.min(low) } else { low },
            high: if together { self.high.max(high) } else { high },
            set_by: cx.end.max(self.set_by),
        };
    }

    /// May or may not have been set by a call.
    fn may_set(&mut self, cx: &Context) {
        self.low = self.low.min(cx.wall.0);
        self.high = self.high.max(cx.wall.1);
        self.set_by = cx.end.max(self.set_by);
    }

    fn admits(&self, value: i64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

/// Nanoseconds since 1970 as wall time.
pub fn wall_time(nanos: i64) -> outrider_core::env::WallTime {
    outrider_core::env::WallTime {
        sec: nanos.div_euclid(1_000_000_000),
        nsec: nanos.rem_euclid(1_000_000_000) as u32,
    }
}

/// A directory entry: its inode, and when the call that made it ran (world time).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// The inode.
    pub ino: Ino,
    /// Start and end of the call.
    pub born: (u64, u64),
}

/// A block, shared while nobody changes it.
pub type Block = Rc<Page>;

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Type and permissions.
    pub mode: u32,
    /// Link count.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Bytes (files), sum of name lengths (directories).
    pub size: u64,
    /// Contents change.
    pub mtime: Stamp,
    /// Inode change.
    pub ctime: Stamp,
    /// Extended attributes.
    pub xattrs: BTreeMap<Bytes, Bytes>,
    /// Written blocks of a file; absent ones are holes.
    pub blocks: BTreeMap<u64, Block>,
    /// Pages as programs have changed them through mappings and nobody has written them
    /// back: what is read, and what a crash takes along.
    pub dirty: BTreeMap<u64, Block>,
    /// Entries of a directory.
    pub entries: BTreeMap<Bytes, Dirent>,
    /// Directories: the parent.
    pub parent: Ino,
    /// Symbolic links: the target.
    pub target: Bytes,
    /// How many handles are open.
    pub opens: u32,
    /// Its digest.
    pub memo: Memo,
}

impl Inode {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    /// Whether it is unlinked and closed: it may be gone at any moment.
    pub fn is_ghost(&self) -> bool {
        self.nlink == 0 && self.opens == 0
    }

    /// Its bytes in a range; holes are zeros. The range is clipped to the size.
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let end = offset.saturating_add(len).min(self.size);
        let mut out = Vec::new();
        let mut at = offset;
        while at < end {
            let block = at / BLOCK;
            let stop = ((block + 1) * BLOCK).min(end);
            let within = (at % BLOCK) as usize..(at % BLOCK) as usize + (stop - at) as usize;
            match self.dirty.get(&block).or_else(|| self.blocks.get(&block)) {
                Some(bytes) => out.extend_from_slice(&bytes.bytes()[within]),
                None => out.resize(out.len() + within.len(), 0),
            }
            at = stop;
        }
        out
    }

    /// Frees what a truncate that a crash cut short has left (spec 14 section 11).
    fn finish_truncate(&mut self) {
        self.blocks.split_off(&self.size.div_ceil(BLOCK));
    }

    fn write(&mut self, offset: u64, tag: u64, len: u64) {
        self.finish_truncate();
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let block = at / BLOCK;
            let stop = ((block + 1) * BLOCK).min(end);
            let bytes = self
                .blocks
                .entry(block)
                .or_insert_with(|| Rc::new(Page::new([0; BLOCK as usize])));
            let dirty = self.dirty.get_mut(&block);
            for bytes in [Some(bytes), dirty].into_iter().flatten() {
                let bytes = Rc::make_mut(bytes).bytes_mut();
                for byte in at..stop {
                    bytes[(byte % BLOCK) as usize] = pattern_byte(tag, byte);
                }
            }
            at = stop;
        }
        self.size = self.size.max(end);
    }

    /// Stores to a page of a mapping.
    fn store(&mut self, offset: u64, tag: u64, len: u64) {
        let block = offset / BLOCK;
        let old = self.blocks.get(&block);
        let page = self.dirty.entry(block).or_insert_with(|| {
            let empty = || Rc::new(Page::new([0; BLOCK as usize]));
            old.map_or_else(empty, Rc::clone)
        });
        let bytes = Rc::make_mut(page).bytes_mut();
        for byte in offset..offset + len {
            bytes[(byte % BLOCK) as usize] = pattern_byte(tag, byte);
        }
    }

    /// A page is written back, as far as the file reaches.
    fn write_back(&mut self, offset: u64, data: &[u8]) {
        self.finish_truncate();
        let block = offset / BLOCK;
        let empty = || Rc::new(Page::new([0; BLOCK as usize]));
        let page = self.blocks.entry(block).or_insert_with(empty);
        Rc::make_mut(page).bytes_mut()[..data.len()].copy_from_slice(data);
        self.dirty.remove(&block);
        self.size = self.size.max(offset + data.len() as u64);
    }

    fn truncate(&mut self, size: u64) {
        self.finish_truncate();
        if size <= self.size {
            let keep = size.div_ceil(BLOCK);
            for pages in [&mut self.blocks, &mut self.dirty] {
                pages.split_off(&keep);
                if !size.is_multiple_of(BLOCK)
                    && let Some(bytes) = pages.get_mut(&(size / BLOCK))
                {
                    Rc::make_mut(bytes).bytes_mut()[(size % BLOCK) as usize..].fill(0);
                }
            }
        }
        self.size = size;
    }

    /// `DT_*` type.
    pub fn dtype(&self) -> u8 {
        (self.mode >> 12) as u8
    }
}

/// Which failures are nobody's fault at the time of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tolerance {
    /// Devices may fail: EIO.
    pub io: bool,
    /// The volume may be full: ENOSPC.
    pub space: bool,
    /// The mount is being severed: ENOLINK and the like.
    pub link: bool,
}

/// When and under which conditions a call ran.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// World time at its start.
    pub start: u64,
    /// World time at its end.
    pub end: u64,
    /// Least and greatest wall clock value while it ran.
    pub wall: (i64, i64),
    /// Which failures are allowed.
    pub tolerance: Tolerance,
    /// A multi-step change of the same object ran at the same time: what a
    /// reader saw is not compared.
    pub weak: bool,
    /// The mount that was asked (worlds of several nodes; else 0).
    pub seat: u32,
}

/// A whole filesystem.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// All inodes, including those that may be gone.
    pub inodes: BTreeMap<Ino, Rc<Inode>>,
}

impl Model {
    /// A new volume: an empty root directory.
    pub fn new(root_mode: u32) -> Self {
        let root = Inode {
            nlink: 2,
            parent: ROOT,
            mtime: Stamp {
                low: 0,
                high: i64::MAX,
                set_by: 0,
            },
            ..new_inode(root_mode, 0, &Context::default())
        };
        let root = Inode {
            ctime: root.mtime,
            ..root
        };
        Self {
            inodes: BTreeMap::from([(ROOT, Rc::new(root))]),
        }
    }

    /// An inode.
    pub fn get(&self, ino: Ino) -> Option<&Inode> {
        self.inodes.get(&ino).map(|inode| &**inode)
    }

    /// An inode that is there, to be changed.
    pub(crate) fn get_mut(&mut self, ino: Ino) -> &mut Inode {
        let inode = self.inodes.get_mut(&ino).expect("an inode of the model");
        let inode = Rc::make_mut(inode);
        inode.memo.forget();
        inode
    }

    /// All inodes reachable from the root, the root first.
    pub fn reachable(&self) -> Vec<Ino> {
        let mut found = vec![ROOT];
        let mut at = 0;
        while at < found.len() {
            if let Some(inode) = self.get(found[at]) {
                for entry in inode.entries.values() {
                    if !found.contains(&entry.ino) {
                        found.push(entry.ino);
                    }
                }
            }
            at += 1;
        }
        found
    }

    /// What a crash leaves of this state: no open files, and nothing unlinked.
    pub fn after_crash(&self) -> Self {
        let mut next = self.clone();
        next.inodes.retain(|_, inode| inode.nlink > 0);
        for inode in next.inodes.values_mut() {
            if inode.opens > 0 || !inode.dirty.is_empty() {
                let inode = Rc::make_mut(inode);
                inode.memo.forget();
                inode.opens = 0;
                inode.dirty.clear();
            }
        }
        next
    }

    /// The states that may follow if `call` was answered with `reply`.
    pub fn apply(&self, call: &Call, reply: &Reply, cx: &Context) -> Vec<Model> {
        if let Reply::Err(error) = reply
            && self.tolerates(*error, call, cx)
        {
            return self.after_failure(call, cx);
        }
        let mut next = self.clone();
        match next.execute(call, Some(reply), cx) {
            Ok(expected) => {
                if next.admits(call, expected, reply, cx) {
                    vec![next]
                } else {
                    Vec::new()
                }
            }
            Err(errors) => match reply {
                Reply::Err(error) if errors.contains(error) => vec![self.clone()],
                _ => Vec::new(),
            },
        }
    }

    /// The state that follows if `call`, whose answer nobody saw, took effect.
    /// `ino` is the number an inode made by it would have.
    pub fn take_effect(&self, call: &Call, ino: Option<Ino>, cx: &Context) -> Option<Model> {
        let mut next = self.clone();
        let made = ino.map(|ino| {
            Reply::Entry(Attr {
                ino,
                ..Attr::default()
            })
        });
        next.execute(call, made.as_ref(), cx).ok()?;
        Some(next)
    }

    fn tolerates(&self, error: Errno, call: &Call, cx: &Context) -> bool {
        match error {
            Errno::EIO => cx.tolerance.io,
            Errno::ENOSPC => cx.tolerance.space && call.allocates(),
            Errno::ENOLINK | Errno::ESHUTDOWN | Errno::ENOTCONN | Errno::ECONNABORTED => {
                cx.tolerance.link
            }
            Errno::ENOENT | Errno::ESTALE
                if cx.weak && matches!(call, Call::HandleParent { .. }) =>
            {
                true
            }
            // Unlinked and closed: its items may be going.
            Errno::ENOENT | Errno::ESTALE | Errno::ENODATA => {
                call.subjects().into_iter().flatten().any(|ino| {
                    self.get(ino).is_none_or(|inode| {
                        // Open elsewhere: here it can not be reached any more.
                        let elsewhere = cx.seat != 0 && inode.nlink == 0 && !call.needs_open();
                        inode.is_ghost() || elsewhere
                    })
                })
            }
            _ => false,
        }
    }

    /// What a failed call may have left: nothing, or for calls of several
    /// transactions what one of them did.
    fn after_failure(&self, call: &Call, cx: &Context) -> Vec<Model> {
        let mut states = vec![self.clone()];
        match call {
            Call::Write { ino, .. } | Call::Fallocate { ino, .. } if self.get(*ino).is_some() => {
                let mut next = self.clone();
                let inode = next.get_mut(*ino);
                inode.mtime.may_set(cx);
                inode.ctime.may_set(cx);
                states = vec![next];
                // It was written; what it waited for was the commit.
                if matches!(call, Call::Write { sync: true, .. }) && cx.tolerance.link {
                    states.extend(self.take_effect(call, None, cx));
                }
            }
            // The file was opened, cut, and closed again.
            Call::OpenTrunc { ino } => {
                let set = SetAttr {
                    size: Some(0),
                    ..SetAttr::default()
                };
                let cut = Call::Setattr { ino: *ino, set };
                states.extend(self.take_effect(&cut, None, cx));
            }
            // What was stored is lost.
            Call::WritePages { ino, offset, .. } if self.get(*ino).is_some() => {
                let mut next = self.clone();
                let inode = next.get_mut(*ino);
                inode.dirty.remove(&(offset / BLOCK));
                inode.mtime.may_set(cx);
                inode.ctime.may_set(cx);
                states = vec![next];
                if cx.tolerance.link {
                    states.extend(self.take_effect(call, None, cx));
                }
            }
            Call::Setattr { .. } => states.extend(self.take_effect(call, None, cx)),
            // An unlink whose commit of the deletion failed, and the like, have happened.
            _ if cx.tolerance.link => states.extend(self.take_effect(call, None, cx)),
            _ => {}
        }
        states
    }
}

impl Call {
    /// The inodes it names.
    pub fn subjects(&self) -> [Option<Ino>; 2] {
        match self {
            Call::Lookup { dir, .. }
            | Call::Mknod { dir, .. }
            | Call::Mkdir { dir, .. }
            | Call::Symlink { dir, .. }
            | Call::Create { dir, .. }
            | Call::Tmpfile { dir, .. }
            | Call::Unlink { dir, .. }
            | Call::Rmdir { dir, .. } => [Some(*dir), None],
            Call::Rename { dir, to, .. } | Call::Exchange { dir, to, .. } => {
                [Some(*dir), Some(*to)]
            }
            Call::Link { ino, dir, .. } => [Some(*ino), Some(*dir)],
            Call::Getattr { ino }
            | Call::Setattr { ino, .. }
            | Call::Readlink { ino }
            | Call::Open { ino }
            | Call::OpenDirect { ino }
            | Call::OpenTrunc { ino }
            | Call::ByHandle { ino }
            | Call::HandleParent { ino }
            | Call::Punch { ino, .. }
            | Call::MapRead { ino, .. }
            | Call::MapWrite { ino, .. }
            | Call::WritePages { ino, .. }
            | Call::Release { ino }
            | Call::Read { ino, .. }
            | Call::Write { ino, .. }
            | Call::Fsync { ino }
            | Call::Setxattr { ino, .. }
            | Call::Getxattr { ino, .. }
            | Call::Listxattr { ino }
            | Call::Removexattr { ino, .. }
            | Call::Readdir { ino }
            | Call::Fallocate { ino, .. }
            | Call::Seek { ino, .. }
            | Call::Fiemap { ino } => [Some(*ino), None],
            Call::Syncfs | Call::Statfs => [None, None],
        }
    }
}

/// An inode as just made by a call.
fn new_inode(mode: u32, rdev: u32, cx: &Context) -> Inode {
    let stamp = Stamp {
        low: cx.wall.0,
        high: cx.wall.1,
        set_by: cx.end,
    };
    Inode {
        mode,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev,
        size: 0,
        mtime: stamp,
        ctime: stamp,
        xattrs: BTreeMap::new(),
        blocks: BTreeMap::new(),
        dirty: BTreeMap::new(),
        entries: BTreeMap::new(),
        parent: 0,
        target: Bytes::new(),
        opens: 0,
        memo: Memo::default(),
    }
}

#[cfg(test)]
mod posix_tests;
#[cfg(test)]
mod tests;

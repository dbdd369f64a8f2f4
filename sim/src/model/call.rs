//! What is asked of a filesystem and what it answers, as values.

use bytes::Bytes;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Attr, FiemapExtent, Ino, SetAttr, StatFs, XattrSet};

/// One request at the level of a FUSE message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are what their names say, in `fs::api` terms
pub enum Call {
    Lookup {
        dir: Ino,
        name: Bytes,
    },
    Getattr {
        ino: Ino,
    },
    Setattr {
        ino: Ino,
        set: SetAttr,
    },
    Readlink {
        ino: Ino,
    },
    Mknod {
        dir: Ino,
        name: Bytes,
        mode: u32,
        rdev: u32,
    },
    Mkdir {
        dir: Ino,
        name: Bytes,
        mode: u32,
    },
    Symlink {
        dir: Ino,
        name: Bytes,
        target: Bytes,
    },
    Create {
        dir: Ino,
        name: Bytes,
        mode: u32,
        excl: bool,
    },
    Tmpfile {
        dir: Ino,
        mode: u32,
    },
    Unlink {
        dir: Ino,
        name: Bytes,
    },
    Rmdir {
        dir: Ino,
        name: Bytes,
    },
    Rename {
        dir: Ino,
        name: Bytes,
        to: Ino,
        new: Bytes,
        noreplace: bool,
    },
    Link {
        ino: Ino,
        dir: Ino,
        name: Bytes,
    },
    Open {
        ino: Ino,
    },
    /// With `O_DIRECT`: what goes through the handle bypasses the kernel's pages.
    OpenDirect {
        ino: Ino,
    },
    /// With `O_TRUNC`.
    OpenTrunc {
        ino: Ino,
    },
    Release {
        ino: Ino,
    },
    Read {
        ino: Ino,
        offset: u64,
        len: u32,
    },
    Write {
        ino: Ino,
        offset: u64,
        len: u32,
        tag: u64,
        append: bool,
        sync: bool,
    },
    Fsync {
        ino: Ino,
    },
    Syncfs,
    Setxattr {
        ino: Ino,
        name: Bytes,
        value: Bytes,
        how: XattrSet,
    },
    Getxattr {
        ino: Ino,
        name: Bytes,
    },
    Listxattr {
        ino: Ino,
    },
    Removexattr {
        ino: Ino,
        name: Bytes,
    },
    Readdir {
        ino: Ino,
    },
    Statfs,
    Fallocate {
        ino: Ino,
        keep: bool,
        offset: u64,
        len: u64,
    },
    Seek {
        ino: Ino,
        offset: u64,
        hole: bool,
    },
    Fiemap {
        ino: Ino,
    },
    /// Loads from a page of a mapping.
    MapRead {
        ino: Ino,
        offset: u64,
        len: u32,
    },
    /// Stores to a page of a shared mapping. Every program of the mount sees it at once,
    /// others when they look: the kernel must give the page back first.
    MapWrite {
        ino: Ino,
        offset: u64,
        len: u32,
        tag: u64,
    },
    /// The kernel writes a dirty page back, as far as the file reaches.
    WritePages {
        ino: Ino,
        offset: u64,
        data: Contents,
    },
    /// Finds an inode by its export handle (spec 12 section 19).
    ByHandle {
        ino: Ino,
    },
    /// Finds a directory's parent by its export handle.
    HandleParent {
        ino: Ino,
    },
    /// A rename with flags that are refused (spec 12 section 15).
    Exchange {
        dir: Ino,
        name: Bytes,
        to: Ino,
        new: Bytes,
        flags: u32,
    },
    /// A fallocate of a mode that is refused (spec 14 section 12).
    Punch {
        ino: Ino,
        mode: u32,
        offset: u64,
        len: u64,
    },
}

/// Bytes that a trace does not spell.
#[derive(Clone, PartialEq, Eq)]
pub struct Contents(pub Bytes);

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&Reply::Bytes(self.0.clone()).brief())
    }
}

impl Call {
    /// Its name, for the trace.
    pub fn name(&self) -> &'static str {
        match self {
            Call::Lookup { .. } => "lookup",
            Call::Getattr { .. } => "getattr",
            Call::Setattr { .. } => "setattr",
            Call::Readlink { .. } => "readlink",
            Call::Mknod { .. } => "mknod",
            Call::Mkdir { .. } => "mkdir",
            Call::Symlink { .. } => "symlink",
            Call::Create { .. } => "create",
            Call::Tmpfile { .. } => "tmpfile",
            Call::Unlink { .. } => "unlink",
            Call::Rmdir { .. } => "rmdir",
            Call::Rename { .. } => "rename",
            Call::Link { .. } => "link",
            Call::Open { .. } => "open",
            Call::OpenDirect { .. } => "opendirect",
            Call::OpenTrunc { .. } => "opentrunc",
            Call::Release { .. } => "release",
            Call::Read { .. } => "read",
            Call::Write { .. } => "write",
            Call::Fsync { .. } => "fsync",
            Call::Syncfs => "syncfs",
            Call::Setxattr { .. } => "setxattr",
            Call::Getxattr { .. } => "getxattr",
            Call::Listxattr { .. } => "listxattr",
            Call::Removexattr { .. } => "removexattr",
            Call::Readdir { .. } => "readdir",
            Call::Statfs => "statfs",
            Call::Fallocate { .. } => "fallocate",
            Call::Seek { .. } => "lseek",
            Call::Fiemap { .. } => "fiemap",
            Call::MapRead { .. } => "mapread",
            Call::MapWrite { .. } => "mapwrite",
            Call::WritePages { .. } => "writeback",
            Call::ByHandle { .. } => "byhandle",
            Call::HandleParent { .. } => "handleparent",
            Call::Exchange { .. } => "exchange",
            Call::Punch { .. } => "punch",
        }
    }

    /// Whether it may fail with ENOSPC (spec 12 section 9: operations that allocate).
    pub fn allocates(&self) -> bool {
        matches!(
            self,
            Call::Mknod { .. }
                | Call::Mkdir { .. }
                | Call::Symlink { .. }
                | Call::Create { .. }
                | Call::Tmpfile { .. }
                | Call::Rename { .. }
                | Call::Link { .. }
                | Call::Write { .. }
                | Call::WritePages { .. }
                | Call::Setxattr { .. }
                | Call::Removexattr { .. }
                | Call::Fallocate { .. }
        )
    }

    /// Whether it changes nothing that the model keeps.
    pub fn is_read_only(&self) -> bool {
        matches!(
            self,
            Call::Lookup { .. }
                | Call::Getattr { .. }
                | Call::Readlink { .. }
                | Call::Read { .. }
                | Call::Fsync { .. }
                | Call::Syncfs
                | Call::Getxattr { .. }
                | Call::Listxattr { .. }
                | Call::Readdir { .. }
                | Call::Statfs
                | Call::Seek { .. }
                | Call::Fiemap { .. }
                | Call::MapRead { .. }
                | Call::ByHandle { .. }
                | Call::HandleParent { .. }
                | Call::Exchange { .. }
                | Call::Punch { .. }
        )
    }

    /// Whether it only changes pages of the kernel, which a crash takes along.
    pub fn is_store(&self) -> bool {
        matches!(self, Call::MapWrite { .. })
    }

    /// Whether it opens a file that is there.
    pub fn opens(&self) -> Option<Ino> {
        match self {
            Call::Open { ino } | Call::OpenDirect { ino } | Call::OpenTrunc { ino } => Some(*ino),
            _ => None,
        }
    }

    /// The file whose size it sets, and the size.
    pub fn resizes(&self) -> Option<(Ino, u64)> {
        match self {
            Call::Setattr { ino, set } => set.size.map(|size| (*ino, size)),
            Call::OpenTrunc { ino } => Some((*ino, 0)),
            _ => None,
        }
    }

    /// Whether it goes through an open file.
    pub fn needs_open(&self) -> bool {
        matches!(
            self,
            Call::Read { .. }
                | Call::Write { .. }
                | Call::Fsync { .. }
                | Call::Fallocate { .. }
                | Call::Seek { .. }
                | Call::Punch { .. }
                | Call::MapRead { .. }
                | Call::MapWrite { .. }
                | Call::WritePages { .. }
                | Call::Release { .. }
        )
    }

    /// The file whose contents or size it changes, perhaps in several steps.
    pub fn changes_data_of(&self) -> Option<Ino> {
        match self {
            Call::Write { ino, .. } | Call::Fallocate { ino, .. } => Some(*ino),
            call => call.resizes().map(|(ino, _)| ino),
        }
    }

    /// The file that it may have put bytes in that are on the device before they are
    /// committed.
    pub fn writes_in(&self) -> Option<Ino> {
        match self {
            Call::WritePages { ino, .. } => Some(*ino),
            call => call.changes_data_of(),
        }
    }

    /// The file whose truncation it finishes first, in a transaction of its own, if a
    /// crash had cut one short (spec 14 section 11).
    pub fn finishes_truncation_of(&self) -> Option<Ino> {
        match self {
            Call::Fallocate { ino, .. } => Some(*ino),
            call => call.writes_in(),
        }
    }

    /// What it reads of which file: offset and length.
    pub fn reads(&self) -> Option<(Ino, u64, u32)> {
        match self {
            Call::Read { ino, offset, len } | Call::MapRead { ino, offset, len } => {
                Some((*ino, *offset, *len))
            }
            _ => None,
        }
    }

    /// The name that it gives to an inode, if it answers with that inode.
    pub fn makes(&self) -> Option<(Ino, &Bytes)> {
        match self {
            Call::Mknod { dir, name, .. }
            | Call::Mkdir { dir, name, .. }
            | Call::Symlink { dir, name, .. }
            | Call::Create { dir, name, .. }
            | Call::Link { dir, name, .. } => Some((*dir, name)),
            _ => None,
        }
    }

    /// The directories whose entries it changes.
    pub fn changes_entries_of(&self) -> [Option<Ino>; 2] {
        match self {
            Call::Unlink { dir, .. } | Call::Rmdir { dir, .. } => [Some(*dir), None],
            Call::Rename { dir, to, .. } => [Some(*dir), Some(*to)],
            call => [call.makes().map(|(dir, _)| dir), None],
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It failed.
    Err(Errno),
    /// Done.
    Done,
    /// An inode found or made.
    Entry(Attr),
    /// An inode found by a cached name, without its attributes.
    Found(Ino),
    /// Attributes.
    Attr(Attr),
    /// Contents, a target, a value, or a list of names each ended by NUL.
    Bytes(Bytes),
    /// Bytes written, or a position.
    Number(u64),
    /// Entries of a directory in order, `.` and `..` first: inode, `DT_*` type, name.
    Names(Vec<(Ino, u8, Bytes)>),
    /// Figures of the volume.
    Stat(StatFs),
    /// Extents.
    Extents(Vec<FiemapExtent>),
}

impl Reply {
    /// A short text for the trace.
    pub fn brief(&self) -> String {
        match self {
            Reply::Err(error) => error.name().to_owned(),
            Reply::Done => "ok".to_owned(),
            Reply::Found(ino) => format!("ino {ino} (cached)"),
            Reply::Entry(attr) | Reply::Attr(attr) => format!(
                "ino {} mode {:o} nlink {} size {} blocks {}",
                attr.ino, attr.mode, attr.nlink, attr.size, attr.blocks
            ),
            Reply::Bytes(bytes) => format!(
                "{} bytes {:08x}",
                bytes.len(),
                crate::trace::digest(bytes) as u32
            ),
            Reply::Number(number) => number.to_string(),
            Reply::Names(names) => format!("{} names", names.len()),
            Reply::Stat(stat) => format!("{stat:?}"),
            Reply::Extents(extents) => format!("{} extents", extents.len()),
        }
    }
}

/// Bit of the tags of writes whose place the writer can not know, as another node may
/// move the end of the file: all their bytes are the same.
pub const FLAT: u64 = 1 << 63;

/// The byte that the write with this tag puts at this offset: never zero.
pub fn pattern_byte(tag: u64, offset: u64) -> u8 {
    let offset = if tag & FLAT == 0 { offset } else { 0 };
    let mixed = (offset ^ (tag << 7)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    (mixed as u8).max(1)
}

/// The bytes of a write.
pub fn pattern(tag: u64, offset: u64, len: u32) -> Bytes {
    (offset..offset + u64::from(len))
        .map(|at| pattern_byte(tag, at))
        .collect::<Vec<u8>>()
        .into()
}

impl Reply {
    /// A digest for the trace.
    pub fn digest(&self) -> u64 {
        let mut digest = crate::trace::Digest::default();
        match self {
            Reply::Err(error) => digest.word(error.0 as u64),
            Reply::Done => digest.word(1000),
            Reply::Found(ino) => digest.word(*ino),
            Reply::Entry(attr) | Reply::Attr(attr) => {
                for word in [attr.ino, attr.size, attr.blocks, u64::from(attr.nlink)] {
                    digest.word(word);
                }
                for time in [attr.mtime, attr.ctime] {
                    digest.word(time.sec as u64);
                    digest.word(u64::from(time.nsec));
                }
            }
            Reply::Bytes(bytes) => digest.bytes(bytes),
            Reply::Number(number) => digest.word(*number),
            Reply::Names(names) => {
                for (ino, _, name) in names {
                    digest.word(*ino);
                    digest.bytes(name);
                }
            }
            Reply::Stat(stat) => {
                for word in [stat.blocks, stat.free, stat.files, stat.files_free] {
                    digest.word(word);
                }
            }
            Reply::Extents(extents) => {
                for extent in extents {
                    for word in [extent.logical, extent.physical, extent.length] {
                        digest.word(word);
                    }
                }
            }
        }
        digest.value()
    }
}

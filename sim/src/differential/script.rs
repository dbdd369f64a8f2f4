//! What is asked of both: calls, one after the other, drawn from a seed and from the
//! answers to the calls before.
//!
//! Only what a kernel would pass on is asked: names are of directories that exist, inodes
//! have a name or are open, nothing is moved into itself. So the same script can be played
//! on a filesystem behind a real kernel.

use crate::model::{Call, ROOT, Reply, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, acl, wall_time};
use crate::rng::Stream;
use bytes::Bytes;
use outrider_core::fs::api::{Ino, SetAttr, SetTime, XattrSet};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Names in a directory are drawn from so many.
const NAMES: u64 = 14;
/// Directories are made until there are so many.
const DIRS: usize = 7;
/// Files grow up to about this.
const LONG: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Longest read and write.
const PIECE: u64 = 70_000;
/// How much of a file one read of the last look gets.
const CHUNK: u32 = 128 << 10;

/// One call, and which of the open files it is about or opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is asked.
    pub call: Call,
    /// The number of the open file, for calls that open one or need one.
    pub file: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Dir,
    Link,
    Other,
}

fn kind_of(mode: u32) -> Kind {
    match mode & S_IFMT {
        S_IFREG => Kind::File,
        S_IFDIR => Kind::Dir,
        S_IFLNK => Kind::Link,
        _ => Kind::Other,
    }
}

/// Draws the next step, and learns from the answers.
pub struct Author {
    rng: Stream,
    left: usize,
    queue: VecDeque<Step>,
    /// Names of each directory that exists.
    dirs: BTreeMap<Ino, BTreeMap<Bytes, Ino>>,
    kinds: BTreeMap<Ino, (Kind, u64)>,
    /// Files without a name that are open.
    open: BTreeMap<u32, Ino>,
    next_file: u32,
    tag: u64,
    ending: bool,
}

impl Author {
    /// A script of about so many calls; a last look at everything comes on top.
    pub fn new(seed: u64, calls: usize) -> Self {
        Self {
            rng: Stream::new(seed, "differential", 0),
            left: calls,
            queue: VecDeque::new(),
            dirs: BTreeMap::from([(ROOT, BTreeMap::new())]),
            kinds: BTreeMap::new(),
            open: BTreeMap::new(),
            next_file: 0,
            tag: 0,
            ending: false,
        }
    }

    /// The next step, until there is none.
    pub fn next_step(&mut self) -> Option<Step> {
        loop {
            if let Some(step) = self.queue.pop_front() {
                self.left = self.left.saturating_sub(1);
                return Some(step);
            }
            if self.left == 0 {
                if self.ending {
                    return None;
                }
                self.ending = true;
                self.look();
            } else {
                self.draw();
            }
        }
    }

    /// What the answer to a step was.
    pub fn learn(&mut self, step: &Step, reply: &Reply) {
        match (&step.call, reply) {
            (_, Reply::Err(_)) => {}
            (
                Call::Create { dir, name, .. }
                | Call::Mknod { dir, name, .. }
                | Call::Mkdir { dir, name, .. }
                | Call::Symlink { dir, name, .. }
                | Call::Link { dir, name, .. },
                Reply::Entry(attr),
            ) => {
                let kind = kind_of(attr.mode);
                self.kinds.insert(attr.ino, (kind, attr.size));
                if kind == Kind::Dir {
                    self.dirs.insert(attr.ino, BTreeMap::new());
                }
                self.named(*dir, name, attr.ino);
            }
            (Call::Tmpfile { .. }, Reply::Entry(attr)) => {
                self.kinds.insert(attr.ino, (Kind::File, 0));
                self.open.extend(step.file.map(|file| (file, attr.ino)));
            }
            (Call::Unlink { dir, name } | Call::Rmdir { dir, name }, _) => {
                if let Some(ino) = self.dirs.get_mut(dir).and_then(|names| names.remove(name)) {
                    self.dirs.remove(&ino);
                }
            }
            (
                Call::Rename {
                    dir, name, to, new, ..
                },
                _,
            ) => {
                let moved = self.dirs.get_mut(dir).and_then(|names| names.remove(name));
                if let Some(ino) = moved {
                    if let Some(gone) = self.dirs.get(to).and_then(|names| names.get(new)) {
                        let gone = *gone;
                        self.dirs.remove(&gone);
                    }
                    self.named(*to, new, ino);
                }
            }
            (
                Call::Write {
                    ino, offset, len, ..
                },
                Reply::Number(_),
            ) => {
                let size = &mut self.kinds.entry(*ino).or_insert((Kind::File, 0)).1;
                *size = (*size).max(offset + u64::from(*len));
            }
            (Call::OpenTrunc { ino }, _) => {
                self.kinds.insert(*ino, (Kind::File, 0));
            }
            (Call::Setattr { ino, .. }, Reply::Attr(attr)) => {
                self.kinds.insert(*ino, (kind_of(attr.mode), attr.size));
            }
            _ => {}
        }
    }

    fn named(&mut self, dir: Ino, name: &Bytes, ino: Ino) {
        if let Some(names) = self.dirs.get_mut(&dir) {
            names.insert(name.clone(), ino);
        }
    }

    fn one<T: Copy>(&self, all: &[T]) -> Option<T> {
        (!all.is_empty()).then(|| self.rng.pick(all))
    }

    fn dir(&self) -> Ino {
        let all: Vec<Ino> = self.dirs.keys().copied().collect();
        self.rng.pick(&all)
    }

    /// A name, more often one that is there.
    fn name(&self, dir: Ino) -> Bytes {
        let there: Vec<&Bytes> = self.dirs[&dir].keys().collect();
        match there.is_empty() || self.rng.chance(300) {
            false => self.rng.pick(&there).clone(),
            true => self.some_name(),
        }
    }

    fn some_name(&self) -> Bytes {
        let number = self.rng.below(NAMES);
        match number {
            0 => Bytes::from(vec![b'l'; 255]),
            _ => format!("n{number}").into(),
        }
    }

    /// Inodes that can be reached by name.
    fn reachable(&self, wanted: impl Fn(Kind) -> bool) -> Vec<Ino> {
        let named = self.dirs.values().flat_map(|names| names.values());
        let all: BTreeSet<Ino> = named.copied().chain([ROOT]).collect();
        let kind = |ino: Ino| self.kinds.get(&ino).map_or(Kind::Dir, |(kind, _)| *kind);
        all.into_iter().filter(|ino| wanted(kind(*ino))).collect()
    }

    fn any(&self) -> Ino {
        self.rng.pick(&self.reachable(|kind| kind != Kind::Link))
    }

    fn file(&self) -> Option<Ino> {
        let mut all = self.reachable(|kind| kind == Kind::File);
        all.extend(self.open.values());
        self.one(&all)
    }

    /// Whether `dir` is `above` or below it.
    fn is_below(&self, dir: Ino, above: Ino) -> bool {
        let mut todo = vec![above];
        while let Some(at) = todo.pop() {
            if at == dir {
                return true;
            }
            todo.extend(
                self.dirs
                    .get(&at)
                    .into_iter()
                    .flat_map(|names| names.values()),
            );
        }
        false
    }

    fn size(&self, ino: Ino) -> u64 {
        self.kinds.get(&ino).map_or(0, |(_, size)| *size)
    }

    fn place(&self, ino: Ino) -> u64 {
        let place = match self.rng.below(4) {
            0 => 0,
            1 => self.size(ino),
            2 => self.rng.below(self.size(ino) + 1),
            _ => self.rng.below(LONG),
        };
        match self.rng.chance(400) {
            true => place / BLOCK * BLOCK,
            false => place,
        }
    }

    fn push(&mut self, call: Call) {
        self.queue.push_back(Step { call, file: None });
    }

    fn new_file(&mut self) -> u32 {
        self.next_file += 1;
        self.next_file
    }

    /// Reads or writes whole blocks with `O_DIRECT`.
    fn directly(&mut self, ino: Ino, offset: u64, len: u64) {
        let len = len as u32;
        self.tag += 1;
        let call = match self.rng.chance(500) {
            true => Call::Read { ino, offset, len },
            false => Call::Write {
                ino,
                offset,
                len,
                tag: self.tag,
                append: false,
                sync: false,
            },
        };
        let file = Some(self.new_file());
        for call in [Call::OpenDirect { ino }, call, Call::Release { ino }] {
            self.queue.push_back(Step { call, file });
        }
    }

    /// Asks with the file open: one that is open anyhow, or opened for it.
    fn with_file(&mut self, ino: Ino, call: Call) {
        let open = self.open.iter().find(|(_, of)| **of == ino);
        if let Some((file, _)) = open {
            let file = Some(*file);
            self.queue.push_back(Step { call, file });
            return;
        }
        let file = Some(self.new_file());
        for call in [Call::Open { ino }, call, Call::Release { ino }] {
            self.queue.push_back(Step { call, file });
        }
    }

    fn draw(&mut self) {
        let weights = [
            12, 4, 2, 2, 3, 7, 3, 7, 18, 6, 10, 7, 5, 3, 2, 2, 6, 6, 6, 4, 3, 3, 2, 2, 1, 1, 2, 8,
            3, 6,
        ];
        let drawn = self.rng.weighted(&weights);
        let dir = self.dir();
        match drawn {
            0 => self.create(dir),
            1 if self.dirs.len() < DIRS => self.push(Call::Mkdir {
                dir,
                name: self.some_name(),
                mode: 0o755,
            }),
            2 => self.push(Call::Symlink {
                dir,
                name: self.some_name(),
                target: vec![b't'; 1 + self.rng.below(200) as usize].into(),
            }),
            3 => {
                let (mode, rdev) = self.rng.pick(&[(0o010_644, 0), (0o020_600, 0x0010_0003)]);
                self.push(Call::Mknod {
                    dir,
                    name: self.some_name(),
                    mode,
                    rdev,
                });
            }
            5 => self.remove(dir),
            6 => self.remove_dir(dir),
            7 => self.rename(dir),
            13 => self.push(Call::Readdir { ino: dir }),
            14 => self.push(Call::Syncfs),
            15 => self.push(Call::Statfs),
            16 => self.push(Call::Getattr { ino: self.any() }),
            17 => self.push(Call::Lookup {
                dir,
                name: self.name(dir),
            }),
            18 => self.attributes(),
            19 => self.set_xattr(),
            20 => {
                let (ino, name) = (self.any(), self.xattr());
                self.push(Call::Getxattr { ino, name });
            }
            21 => self.push(Call::Listxattr { ino: self.any() }),
            22 => {
                let (ino, name) = (self.any(), self.xattr());
                self.push(Call::Removexattr { ino, name });
            }
            23 => {
                if let Some(ino) = self.one(&self.reachable(|kind| kind == Kind::Link)) {
                    self.push(Call::Readlink { ino });
                }
            }
            24 => {
                let file = Some(self.new_file());
                let call = Call::Tmpfile { dir, mode: 0o600 };
                self.queue.push_back(Step { call, file });
            }
            25 => {
                if let Some((file, ino)) = self.open.pop_first() {
                    self.queue.push_back(Step {
                        call: Call::Release { ino },
                        file: Some(file),
                    });
                }
            }
            27 => self.acl(),
            of_file => {
                if let Some(ino) = self.file() {
                    self.draw_of_file(of_file, ino, dir);
                }
            }
        }
    }

    fn draw_of_file(&mut self, drawn: usize, ino: Ino, dir: Ino) {
        let offset = self.place(ino);
        let len = 1 + self.rng.below(PIECE);
        match drawn {
            4 if !self.open.values().any(|open| *open == ino) => {
                let name = self.some_name();
                self.push(Call::Link { ino, dir, name });
            }
            8 => {
                self.tag += 1;
                let call = Call::Write {
                    ino,
                    offset,
                    len: len as u32,
                    tag: self.tag,
                    append: false,
                    sync: self.rng.chance(60),
                };
                self.with_file(ino, call);
            }
            10 => {
                let len = len as u32;
                self.with_file(ino, Call::Read { ino, offset, len });
            }
            9 | 11 => {
                let set = SetAttr {
                    size: Some(offset),
                    ..SetAttr::default()
                };
                self.push(Call::Setattr { ino, set });
            }
            12 => {
                let keep = self.rng.chance(500);
                self.with_file(
                    ino,
                    Call::Fallocate {
                        ino,
                        keep,
                        offset,
                        len,
                    },
                );
            }
            26 => self.with_file(ino, Call::Fsync { ino }),
            28 => {
                let file = Some(self.new_file());
                for call in [Call::OpenTrunc { ino }, Call::Release { ino }] {
                    self.queue.push_back(Step { call, file });
                }
            }
            29 => self.directly(ino, offset / BLOCK * BLOCK, len.next_multiple_of(BLOCK)),
            _ => {
                let hole = self.rng.chance(500);
                self.with_file(ino, Call::Seek { ino, offset, hole });
                self.push(Call::Fiemap { ino });
            }
        }
    }

    fn create(&mut self, dir: Ino) {
        let name = self.name(dir);
        // Of what is there a kernel opens only files.
        let there = self.dirs[&dir].get(&name).copied();
        if there.is_some_and(|ino| self.kinds[&ino].0 != Kind::File) {
            return;
        }
        let file = Some(self.new_file());
        let excl = there.is_none();
        let call = Call::Create {
            dir,
            name,
            mode: 0o644,
            excl,
        };
        self.queue.push_back(Step { call, file });
        // Its number is not known before it is answered: whatever it is, close it.
        let ino = there.unwrap_or(0);
        self.queue.push_back(Step {
            call: Call::Release { ino },
            file,
        });
    }

    fn remove(&mut self, dir: Ino) {
        let name = self.name(dir);
        let there = self.dirs[&dir].get(&name);
        if there.is_none_or(|ino| !self.dirs.contains_key(ino)) {
            self.push(Call::Unlink { dir, name });
        }
    }

    fn remove_dir(&mut self, dir: Ino) {
        let name = self.name(dir);
        let there = self.dirs[&dir].get(&name);
        if there.is_none_or(|ino| self.dirs.contains_key(ino)) {
            self.push(Call::Rmdir { dir, name });
        }
    }

    fn rename(&mut self, dir: Ino) {
        let (name, to) = (self.name(dir), self.dir());
        let new = self.name(to);
        let Some(source) = self.dirs[&dir].get(&name).copied() else {
            return;
        };
        let target = self.dirs[&to].get(&new).copied();
        let is_dir = |ino: Ino| self.dirs.contains_key(&ino);
        let odd = target.is_some_and(|ino| ino == source || is_dir(ino) != is_dir(source));
        if odd || is_dir(source) && self.is_below(to, source) {
            return;
        }
        let noreplace = self.rng.chance(200);
        self.push(Call::Rename {
            dir,
            name,
            to,
            new,
            noreplace,
        });
    }

    fn attributes(&mut self) {
        let ino = self.any();
        let mut set = SetAttr::default();
        match self.rng.below(3) {
            0 => set.mode = Some(0o400 + self.rng.below(0o400) as u32),
            1 => {
                set.uid = Some(self.rng.below(3) as u32);
                set.gid = Some(self.rng.below(3) as u32);
            }
            _ => {
                // Long ago: no clock of a run shows it.
                let time = SetTime::At(wall_time(self.rng.below(1 << 59) as i64));
                (set.atime, set.mtime) = (Some(time), Some(time));
            }
        }
        self.push(Call::Setattr { ino, set });
    }

    fn xattr(&self) -> Bytes {
        format!("trusted.x{}", self.rng.below(3)).into()
    }

    fn set_xattr(&mut self) {
        let (ino, name) = (self.any(), self.xattr());
        let len = self.rng.pick(&[0, 5, 300, 3000]);
        self.tag += 1;
        let value = crate::model::pattern(self.tag, 0, len);
        let how = self.rng.pick(&[
            XattrSet::Any,
            XattrSet::Any,
            XattrSet::Create,
            XattrSet::Replace,
        ]);
        self.push(Call::Setxattr {
            ino,
            name,
            value,
            how,
        });
    }

    /// Sets, reads or removes an ACL. Where a kernel refuses one by itself (malformed, or
    /// the default one of a file) none is drawn.
    fn acl(&mut self) {
        let default = self.rng.chance(400);
        let ino = match default {
            true => self.dir(),
            false => self.any(),
        };
        let name = Bytes::from_static(if default { acl::DEFAULT } else { acl::ACCESS });
        let call = match self.rng.below(4) {
            0 => Call::Getxattr { ino, name },
            1 => Call::Removexattr { ino, name },
            _ => Call::Setxattr {
                ino,
                name,
                value: acl::drawn(self.rng.below(11) as u8, self.rng.below(1 << 16) as u16),
                how: XattrSet::Any,
            },
        };
        self.push(call);
    }

    /// Looks at everything that can be seen, and closes what is open.
    fn look(&mut self) {
        for (file, ino) in std::mem::take(&mut self.open) {
            self.queue.push_back(Step {
                call: Call::Release { ino },
                file: Some(file),
            });
        }
        self.push(Call::Syncfs);
        for ino in self.reachable(|_| true) {
            self.push(Call::Getattr { ino });
            let kind = self.kinds.get(&ino).map_or(Kind::Dir, |(kind, _)| *kind);
            match kind {
                Kind::Dir => self.push(Call::Readdir { ino }),
                Kind::Link => self.push(Call::Readlink { ino }),
                Kind::File => {
                    self.push(Call::Fiemap { ino });
                    let mut offset = 0;
                    while offset < self.size(ino) {
                        self.with_file(
                            ino,
                            Call::Read {
                                ino,
                                offset,
                                len: CHUNK,
                            },
                        );
                        offset += u64::from(CHUNK);
                    }
                }
                Kind::Other => {}
            }
            if kind != Kind::Link {
                self.push(Call::Listxattr { ino });
            }
        }
        self.push(Call::Statfs);
    }
}

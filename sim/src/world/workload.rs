//! The programs: they turn the plan's operations into calls on what exists.

use super::life::Fate;
use super::{System, World};
use crate::backend::{Node, Sim};
use crate::kernel::{Handle, Kernel, Recorder};
use crate::model::{Call, Context, FLAT, Model, Reply, S_IFMT, S_IFREG, Tolerance, wall_time};
use crate::oracle::walk::Followers;
use crate::oracle::{Oracle, Violation};
use crate::plan::{LifePlan, PlanOp, Profile};
use bytes::Bytes;
use outrider_core::fs::api::{Archive, Ino, Posix, SetAttr, SetTime, XattrSet};
use std::cell::{Cell, RefCell, RefMut};
use std::collections::BTreeMap;
use std::rc::Rc;

/// What the workload knows to exist.
#[derive(Default)]
pub(super) struct Table {
    dirs: Vec<Ino>,
    files: Vec<Ino>,
    others: Vec<Ino>,
    held: BTreeMap<Ino, Vec<Rc<Handle>>>,
}

impl Table {
    /// Knows what there is now; what is held open stays so.
    pub fn know(&mut self, state: &Model) {
        let held = std::mem::take(&mut self.held);
        self.fill(state);
        self.held = held;
    }

    /// Knows what was observed, and nothing else.
    pub fn fill(&mut self, observed: &Model) {
        *self = Self::default();
        for ino in observed.reachable() {
            if let Some(inode) = observed.get(ino) {
                self.add(ino, inode.mode);
            }
        }
    }

    fn add(&mut self, ino: Ino, mode: u32) {
        let list = match mode & S_IFMT {
            crate::model::S_IFDIR => &mut self.dirs,
            S_IFREG => &mut self.files,
            _ => &mut self.others,
        };
        if !list.contains(&ino) {
            list.push(ino);
            // The newest ones are the most interesting.
            if list.len() > 24 {
                list.remove(1);
            }
        }
    }

    pub(super) fn dir(&self, number: u16) -> Ino {
        self.dirs[usize::from(number) % self.dirs.len()]
    }

    pub(super) fn file(&self, number: u16) -> Option<Ino> {
        let count = self.files.len();
        (count > 0).then(|| self.files[usize::from(number) % count])
    }

    pub(super) fn any(&self, number: u16) -> Ino {
        let all = self.dirs.len() + self.files.len() + self.others.len();
        let index = usize::from(number) % all;
        let mut lists = self.dirs.iter().chain(&self.files).chain(&self.others);
        *lists.nth(index).expect("an index below the number")
    }

    fn special(&self, ino: Ino) -> bool {
        self.others.contains(&ino)
    }
}

/// Where calls are written down, for the judge and the trace.
pub(super) struct Desk {
    sim: Rc<Sim>,
    node: Rc<Node>,
    fate: Rc<Fate>,
    oracle: Rc<RefCell<Oracle>>,
    followers: Rc<RefCell<Followers>>,
    steps: Rc<RefCell<Vec<(u64, i64, i64)>>>,
    pending: RefCell<BTreeMap<usize, Open>>,
    next: Cell<usize>,
    tolerance: Tolerance,
    tags: Rc<Cell<u64>>,
    count: Rc<dyn Fn()>,
    seat: u32,
}

/// What the desks of a world of several nodes share, and what is a node's own.
pub(super) struct Office {
    pub node: Rc<Node>,
    pub oracle: Rc<RefCell<Oracle>>,
    pub followers: Rc<RefCell<Followers>>,
    pub steps: Rc<RefCell<Vec<(u64, i64, i64)>>>,
    pub tags: Rc<Cell<u64>>,
    pub calls: Rc<Cell<u64>>,
    pub tolerance: Tolerance,
}

impl Desk {
    /// The desk of one mount among several.
    pub fn of_seat(office: Office, fate: &Rc<Fate>) -> Self {
        let calls = office.calls;
        Self {
            sim: Rc::clone(&fate.host.sim),
            node: office.node,
            fate: Rc::clone(fate),
            oracle: office.oracle,
            followers: office.followers,
            steps: office.steps,
            pending: RefCell::default(),
            next: Cell::new(0),
            tolerance: office.tolerance,
            tags: office.tags,
            count: Rc::new(move || calls.set(calls.get() + 1)),
            seat: fate.host.life.seat(),
        }
    }

    pub fn new<S: System>(world: &Rc<World<S>>, life: &LifePlan, fate: &Rc<Fate>) -> Self {
        let counting = Rc::clone(world);
        let errors = life.faults.iter().any(|fault| {
            matches!(
                fault,
                crate::plan::Fault::Disk(crate::plan::DiskFault::Error { .. })
            )
        });
        Self {
            sim: Rc::clone(&world.sim),
            node: Rc::clone(&world.node),
            fate: Rc::clone(fate),
            oracle: Rc::clone(&world.oracle),
            followers: Rc::clone(&world.followers),
            steps: Rc::clone(&world.steps),
            pending: RefCell::default(),
            next: Cell::new(0),
            tolerance: Tolerance {
                io: errors,
                space: world.plan.config.profile == Profile::Full || world.plan.config.stress.tight,
                link: false,
            },
            tags: Rc::clone(&world.tags),
            count: Rc::new(move || counting.calls.set(counting.calls.get() + 1)),
            seat: 0,
        }
    }

    /// The followers of the world.
    pub(super) fn followers(&self) -> RefMut<'_, Followers> {
        self.followers.borrow_mut()
    }

    /// An operation begins that the judge of calls is not told of.
    pub(super) fn count(&self) {
        self.fate.count_call();
        (self.count)();
    }

    /// A number for a call.
    pub(super) fn ticket(&self) -> u64 {
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        ticket as u64
    }

    /// An event of this mount.
    pub(super) fn tell(&self, kind: &'static str, args: &[u64], text: impl FnOnce() -> String) {
        let now = self.sim.now();
        self.sim.trace.event(now, self.node.id, kind, args, text);
    }

    pub(super) fn tag(&self) -> u64 {
        self.tags.set(self.tags.get() + 1);
        self.tags.get()
    }

    fn tag_of_append(&self) -> u64 {
        let flat = if self.seat == 0 { 0 } else { FLAT };
        self.tag() | flat
    }

    fn context(&self, start: u64, wall: i64) -> Context {
        let end = self.sim.now();
        let now = self.node.wall_nanos(end);
        let mut range = (wall.min(now), wall.max(now));
        for (at, before, after) in self.steps.borrow().iter() {
            if (start..=end).contains(at) {
                range.0 = range.0.min(*before).min(*after);
                range.1 = range.1.max(*before).max(*after);
            }
        }
        Context {
            start,
            end,
            wall: range,
            tolerance: Tolerance {
                link: self.fate.is_severed(),
                io: self.tolerance.io || self.fate.is_severed(),
                ..self.tolerance
            },
            weak: false,
            seat: self.seat,
        }
    }

    /// Adds the calls without an answer to a failure of liveness.
    pub fn name_hanging(&self, mut failure: Violation) -> Violation {
        for open in self.pending.borrow().values() {
            let mut text = format!("\n  no answer: {:?}", open.call);
            text.truncate(300);
            failure.text.push_str(&text);
        }
        for step in self.followers.borrow().walking() {
            failure.text.push_str(&format!("\n  no answer: {step}"));
        }
        failure
    }
}

/// A call without an answer so far.
struct Open {
    number: usize,
    start: u64,
    wall: i64,
    call: Call,
}

impl Recorder for Desk {
    fn begin(&self, call: &Call) -> usize {
        self.count();
        let ticket = self.ticket() as usize;
        let (start, subjects) = (self.sim.now(), call.subjects());
        let wall = self.node.wall_nanos(start);
        let args = [
            ticket as u64,
            subjects[0].unwrap_or(0),
            subjects[1].unwrap_or(0),
        ];
        self.sim
            .trace
            .event(start, self.node.id, call.name(), &args, || {
                let mut text = format!("?{ticket} {call:?}");
                text.truncate(400);
                text
            });
        // What a condemned mount does from now on counts no more.
        let number = if self.fate.is_condemned() {
            usize::MAX
        } else {
            let cx = self.context(start, wall);
            self.oracle.borrow_mut().begin(call.clone(), cx)
        };
        let open = Open {
            number,
            start,
            wall,
            call: call.clone(),
        };
        self.pending.borrow_mut().insert(ticket, open);
        ticket
    }

    fn end(&self, ticket: usize, reply: &Reply) {
        let Some(open) = self.pending.borrow_mut().remove(&ticket) else {
            return;
        };
        if self.fate.is_dead() || self.fate.is_condemned() {
            return;
        }
        let cx = self.context(open.start, open.wall);
        let args = [ticket as u64, reply.digest()];
        self.sim
            .trace
            .event(cx.end, self.node.id, "answer", &args, || {
                format!("!{ticket} {}", reply.brief())
            });
        self.oracle.borrow_mut().end(open.number, reply.clone(), cx);
    }
}

/// One mount with the programs that use it.
pub(super) struct Scene<P> {
    pub kernel: Kernel<P>,
    pub desk: Desk,
    pub table: RefCell<Table>,
}

/// The kernel with the desk that records what it is asked.
pub(super) struct Recorded<'a, P> {
    pub kernel: &'a Kernel<P>,
    pub desk: &'a Desk,
}

pub(super) fn file_name(number: u8) -> Bytes {
    if number % 7 == 3 {
        let mut name = vec![b'l'; 255];
        name[254] = number;
        return name.into();
    }
    Bytes::from(format!("n{number}"))
}

fn xattr_name(number: u8, special: bool) -> Bytes {
    let prefix = if special || number % 3 == 1 {
        "trusted"
    } else {
        "user"
    };
    Bytes::from(format!("{prefix}.x{number}"))
}

impl<P: Posix + Archive> Scene<P> {
    pub fn recorded(&self) -> Recorded<'_, P> {
        Recorded {
            kernel: &self.kernel,
            desk: &self.desk,
        }
    }

    /// Runs a list of operations, one after the other.
    pub async fn run(&self, ops: &[PlanOp]) {
        for op in ops {
            if self.desk.fate.is_dead() || self.desk.fate.is_condemned() {
                return;
            }
            self.operate(op).await;
        }
        // A moment of quiet has no calls under way: so nothing to write back either.
        self.kernel.write_all_back(&self.desk).await;
    }

    /// Syncs the filesystem.
    pub async fn sync(&self) {
        self.call(Call::Syncfs, None).await;
    }

    /// Closes all files held open.
    pub async fn close_all(&self) {
        let held = std::mem::take(&mut self.table.borrow_mut().held);
        for handle in held.into_values().flatten() {
            self.call(Call::Release { ino: handle.ino }, Some(*handle))
                .await;
        }
    }

    pub(super) async fn call(&self, call: Call, fh: Option<Handle>) -> (Reply, Option<Handle>) {
        let out = self.kernel.call(&call, fh, &self.desk).await;
        if let Reply::Entry(attr) = &out.0 {
            self.table.borrow_mut().add(attr.ino, attr.mode);
        }
        out
    }

    pub(super) fn hold(&self, handle: Option<Handle>) {
        if let Some(handle) = handle {
            let mut table = self.table.borrow_mut();
            table
                .held
                .entry(handle.ino)
                .or_default()
                .push(Rc::new(handle));
        }
    }

    pub(super) async fn release(&self, handle: Option<Handle>) {
        if let Some(handle) = handle {
            self.call(Call::Release { ino: handle.ino }, Some(handle))
                .await;
        }
    }

    /// A handle of a file that is held open.
    pub(super) fn held(&self, ino: Ino) -> Option<Rc<Handle>> {
        let table = self.table.borrow();
        table.held.get(&ino).and_then(|all| all.first().cloned())
    }

    /// Makes a call that needs an open file: with one held open, or by opening it.
    async fn with_file(&self, ino: Ino, call: Call) {
        if let Some(handle) = self.held(ino) {
            self.call(call, Some(*handle)).await;
            return;
        }
        self.through(Call::Open { ino }, call).await;
    }

    /// Makes a call through a file that is opened for it, in the way that is said.
    pub(super) async fn through(&self, open: Call, call: Call) {
        let (_, handle) = self.call(open, None).await;
        if handle.is_some() {
            self.call(call, handle).await;
            self.release(handle).await;
        }
    }

    async fn close(&self, ino: Ino) {
        let unused = {
            let mut table = self.table.borrow_mut();
            let handles = table.held.entry(ino).or_default();
            match handles.last() {
                // Somebody may be using it: a kernel would keep it open as long.
                Some(last) if Rc::strong_count(last) == 1 => handles.pop(),
                _ => None,
            }
        };
        self.release(unused.map(|handle| *handle)).await;
    }

    async fn operate(&self, op: &PlanOp) {
        let dir = |number: u16| self.table.borrow().dir(number);
        let any = |number: u16| self.table.borrow().any(number);
        let file = |number: u16| self.table.borrow().file(number);
        let file = match op {
            PlanOp::Truncate { file: number, .. }
            | PlanOp::Link { file: number, .. }
            | PlanOp::Open { file: number }
            | PlanOp::Close { file: number }
            | PlanOp::Read { file: number, .. }
            | PlanOp::Write { file: number, .. }
            | PlanOp::Append { file: number, .. }
            | PlanOp::Fsync { file: number, .. }
            | PlanOp::Fallocate { file: number, .. }
            | PlanOp::Seek { file: number, .. }
            | PlanOp::Fiemap { file: number } => match file(*number) {
                Some(ino) => ino,
                None => return,
            },
            _ => 0,
        };
        let call = match *op {
            PlanOp::Lookup { dir: d, name } => Call::Lookup {
                dir: dir(d),
                name: file_name(name),
            },
            PlanOp::Getattr { obj } => Call::Getattr { ino: any(obj) },
            PlanOp::Chmod { obj, mode } => {
                let set = SetAttr {
                    mode: Some(u32::from(mode)),
                    ..SetAttr::default()
                };
                Call::Setattr { ino: any(obj), set }
            }
            PlanOp::Chown { obj, uid, gid } => {
                let set = SetAttr {
                    uid: Some(u32::from(uid)),
                    gid: Some(u32::from(gid)),
                    ..SetAttr::default()
                };
                Call::Setattr { ino: any(obj), set }
            }
            PlanOp::Utimes { obj, at } => {
                let time = Some(SetTime::At(wall_time(at)));
                let set = SetAttr {
                    atime: time,
                    mtime: time,
                    ..SetAttr::default()
                };
                Call::Setattr { ino: any(obj), set }
            }
            PlanOp::Truncate { size, .. } => {
                let set = SetAttr {
                    size: Some(size),
                    ..SetAttr::default()
                };
                Call::Setattr { ino: file, set }
            }
            PlanOp::Readlink { obj } => {
                let ino = any(obj);
                if self.table.borrow().special(ino) {
                    self.readlink(ino).await;
                }
                return;
            }
            PlanOp::Mknod { dir: d, name, kind } => {
                let kinds = [0o010_000, 0o140_000, 0o020_000, 0o060_000];
                Call::Mknod {
                    dir: dir(d),
                    name: file_name(name),
                    mode: kinds[usize::from(kind) % 4] | 0o666,
                    rdev: if kind % 4 < 2 { 0 } else { 0x0010_0003 },
                }
            }
            PlanOp::Mkdir { dir: d, name } => Call::Mkdir {
                dir: dir(d),
                name: file_name(name),
                mode: 0o777,
            },
            PlanOp::Create {
                dir: d,
                name,
                excl,
                hold,
            } => {
                let call = Call::Create {
                    dir: dir(d),
                    name: file_name(name),
                    mode: 0o666,
                    excl,
                };
                return self.open(call, hold).await;
            }
            PlanOp::Tmpfile { dir: d } => {
                let call = Call::Tmpfile {
                    dir: dir(d),
                    mode: 0o600,
                };
                return self.open(call, true).await;
            }
            PlanOp::Symlink { dir: d, name, len } => Call::Symlink {
                dir: dir(d),
                name: file_name(name),
                target: vec![b't'; usize::from(len)].into(),
            },
            PlanOp::Unlink { dir: d, name } => Call::Unlink {
                dir: dir(d),
                name: file_name(name),
            },
            PlanOp::Rmdir { dir: d, name } => Call::Rmdir {
                dir: dir(d),
                name: file_name(name),
            },
            PlanOp::Rename {
                dir: d,
                name,
                to,
                new,
                noreplace,
            } => {
                let (from, to) = ((dir(d), name), (dir(to), new));
                return self.rename(from, to, noreplace).await;
            }
            PlanOp::Link { dir: d, name, .. } => Call::Link {
                ino: file,
                dir: dir(d),
                name: file_name(name),
            },
            PlanOp::Open { .. } => return self.open(Call::Open { ino: file }, true).await,
            PlanOp::Close { .. } => return self.close(file).await,
            PlanOp::Read { offset, len, .. } => Call::Read {
                ino: file,
                offset,
                len,
            },
            PlanOp::Write {
                offset, len, sync, ..
            } => Call::Write {
                ino: file,
                offset,
                len,
                tag: self.desk.tag(),
                append: false,
                sync,
            },
            PlanOp::Append { len, .. } => Call::Write {
                ino: file,
                offset: 0,
                len: len.min(20_000),
                tag: self.desk.tag_of_append(),
                append: true,
                sync: false,
            },
            PlanOp::Fsync { .. } => Call::Fsync { ino: file },
            PlanOp::Syncfs => Call::Syncfs,
            PlanOp::Setxattr {
                obj,
                name,
                len,
                how,
            } => {
                let ino = any(obj);
                Call::Setxattr {
                    ino,
                    name: xattr_name(name, self.table.borrow().special(ino)),
                    value: crate::model::pattern(self.desk.tag(), 0, u32::from(len)),
                    how: [XattrSet::Any, XattrSet::Create, XattrSet::Replace][usize::from(how) % 3],
                }
            }
            PlanOp::Getxattr { obj, name } => {
                let ino = any(obj);
                let name = xattr_name(name, self.table.borrow().special(ino));
                Call::Getxattr { ino, name }
            }
            PlanOp::Listxattr { obj } => Call::Listxattr { ino: any(obj) },
            PlanOp::Removexattr { obj, name } => {
                let ino = any(obj);
                let name = xattr_name(name, self.table.borrow().special(ino));
                Call::Removexattr { ino, name }
            }
            PlanOp::Readdir { dir: d, .. } => Call::Readdir { ino: dir(d) },
            PlanOp::Statfs => Call::Statfs,
            PlanOp::Fallocate {
                keep, offset, len, ..
            } => Call::Fallocate {
                ino: file,
                keep,
                offset,
                len,
            },
            PlanOp::Seek { offset, hole, .. } => Call::Seek {
                ino: file,
                offset,
                hole,
            },
            PlanOp::Fiemap { .. } => Call::Fiemap { ino: file },
            PlanOp::Posix(ref op) => return self.operate_posix(op).await,
            PlanOp::Walk { follower, max } => return self.walk(follower, usize::from(max)).await,
            PlanOp::Pause { micros } => return self.desk.sim.sleep(u64::from(micros) * 1000).await,
            PlanOp::Doom { requests } => return self.desk.fate.doom(u64::from(requests)),
        };
        self.make(file, call).await;
    }

    /// Makes a call; if it needs an open file, through one of `file`.
    pub(super) async fn make(&self, file: Ino, call: Call) {
        if call.needs_open() {
            self.with_file(file, call).await;
        } else {
            self.call(call, None).await;
        }
    }

    /// Makes a call that opens a file, which is held open or closed again.
    pub(super) async fn open(&self, call: Call, hold: bool) {
        let (_, handle) = self.call(call, None).await;
        if hold {
            self.hold(handle);
        } else {
            self.release(handle).await;
        }
    }

    async fn readlink(&self, ino: Ino) {
        // Only the kernel knows which of the special files are links: ask first.
        let (reply, _) = self.call(Call::Getattr { ino }, None).await;
        if let Reply::Attr(attr) = reply
            && attr.mode & S_IFMT == crate::model::S_IFLNK
        {
            self.call(Call::Readlink { ino }, None).await;
        }
    }

    async fn rename(&self, from: (Ino, u8), to: (Ino, u8), noreplace: bool) {
        // The kernel looks both names up before it renames.
        let (name, new) = (file_name(from.1), file_name(to.1));
        let source = Call::Lookup {
            dir: from.0,
            name: name.clone(),
        };
        let target = Call::Lookup {
            dir: to.0,
            name: new.clone(),
        };
        let (source, _) = self.call(source, None).await;
        let (target, _) = self.call(target, None).await;
        let ino = |reply: &Reply| match reply {
            Reply::Entry(attr) => Some(attr.ino),
            Reply::Found(ino) => Some(*ino),
            _ => None,
        };
        let (Some(source), target) = (ino(&source), ino(&target)) else {
            return;
        };
        if Some(source) == target {
            return;
        }
        let call = Call::Rename {
            dir: from.0,
            name,
            to: to.0,
            new,
            noreplace,
        };
        self.call(call, None).await;
    }
}

//! Looking at everything a mount shows.

use super::contents::whose;
use super::life::Fate;
use super::workload::Recorded;
use crate::backend::Sim;
use crate::kernel::{Handle, Kernel, Recorder};
use crate::model::{
    Block, Call, Dirent, Inode, Memo, Model, Page, ROOT, Reply, S_IFLNK, S_IFMT, Stamp,
};
use crate::trace::Link;
use bytes::Bytes;
use outrider_core::env::WallTime;
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Attr, Ino, Posix};
use std::collections::BTreeMap;
use std::rc::Rc;

/// How an audit deals with trouble.
pub(super) struct Auditor {
    sim: Rc<Sim>,
    fate: Rc<Fate>,
    patient: bool,
}

impl Auditor {
    /// Asks again after an I/O error: everything must be seen in the end.
    pub fn patient(sim: &Rc<Sim>, fate: &Rc<Fate>) -> Self {
        Self {
            sim: Rc::clone(sim),
            fate: Rc::clone(fate),
            patient: true,
        }
    }

    /// What an observer in a world of several nodes sees is in no record; of what one of
    /// a world of one node sees who reads along is told.
    fn trace(&self, call: &Call, reply: &Reply) {
        let host = &self.fate.host;
        if !self.patient {
            return;
        }
        let text = || match (call, reply) {
            (Call::Read { ino, offset, .. }, Reply::Bytes(bytes)) => {
                format!("inode {ino} from {offset}: {}", whose(bytes, *offset))
            }
            _ => format!("{call:?} {}", reply.brief()),
        };
        let (trace, now) = (&self.sim.trace, self.sim.now());
        if host.life.seat() == 0 {
            trace.remark(now, host.node.id, "look", Link::None, text);
        } else {
            trace.event(now, host.node.id, "look", &[reply.digest()], text);
        }
    }

    /// Takes errors as answers.
    pub fn hurried(sim: &Rc<Sim>, fate: &Rc<Fate>) -> Self {
        Self {
            patient: false,
            ..Self::patient(sim, fate)
        }
    }
}

struct Nobody;

impl Recorder for Nobody {
    fn begin(&self, _: &Call) -> usize {
        0
    }
    fn end(&self, _: usize, _: &Reply) {}
}

/// Something that takes calls.
pub(super) trait Asked {
    type Fs: Posix;
    async fn ask(&self, call: &Call, fh: Option<Handle>) -> (Reply, Option<Handle>);
}

impl<P: Posix> Asked for Kernel<P> {
    type Fs = P;
    async fn ask(&self, call: &Call, fh: Option<Handle>) -> (Reply, Option<Handle>) {
        self.call(call, fh, &Nobody).await
    }
}

impl<P: Posix> Asked for Recorded<'_, P> {
    type Fs = P;
    async fn ask(&self, call: &Call, fh: Option<Handle>) -> (Reply, Option<Handle>) {
        self.kernel.call(call, fh, self.desk).await
    }
}

type Seen<T> = Result<T, String>;

struct Look<'a, A> {
    kernel: &'a A,
    auditor: &'a Auditor,
}

/// Reads everything reachable from the root.
///
/// # Errors
/// A sentence about the call that failed or contradicted another one.
pub(super) async fn observe<A: Asked>(kernel: &A, auditor: &Auditor) -> Seen<Model> {
    let look = Look { kernel, auditor };
    let mut model = Model::default();
    let mut todo = vec![(ROOT, ROOT)];
    while let Some((ino, parent)) = todo.pop() {
        if model.inodes.contains_key(&ino) {
            continue;
        }
        let inode = look.inode(ino, parent).await?;
        for entry in inode.entries.values() {
            todo.push((entry.ino, ino));
        }
        model.inodes.insert(ino, Rc::new(inode));
    }
    Ok(model)
}

fn stamp(time: WallTime) -> Stamp {
    let nanos = time.sec.saturating_mul(1_000_000_000);
    Stamp::exact(nanos.saturating_add(i64::from(time.nsec)))
}

impl<A: Asked> Look<'_, A> {
    async fn ask(&self, call: Call, fh: Option<Handle>) -> Seen<(Reply, Option<Handle>)> {
        loop {
            let (reply, handle) = self.kernel.ask(&call, fh).await;
            self.auditor.trace(&call, &reply);
            match reply {
                Reply::Err(Errno::EIO) if self.auditor.patient => {
                    if self.auditor.fate.is_severed() {
                        return Err("severed".to_owned());
                    }
                    self.auditor.sim.sleep(100_000_000).await;
                }
                Reply::Err(error) => return Err(format!("{call:?} failed: {error}")),
                reply => return Ok((reply, handle)),
            }
        }
    }

    async fn attr(&self, ino: Ino) -> Seen<Attr> {
        match self.ask(Call::Getattr { ino }, None).await? {
            (Reply::Attr(attr), _) if attr.ino == ino => Ok(attr),
            (other, _) => Err(format!("attributes of inode {ino} are {other:?}")),
        }
    }

    async fn inode(&self, ino: Ino, parent: Ino) -> Seen<Inode> {
        let attr = self.attr(ino).await?;
        let mut inode = Inode {
            mode: attr.mode,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            size: attr.size,
            mtime: stamp(attr.mtime),
            ctime: stamp(attr.ctime),
            xattrs: self.xattrs(ino).await?,
            blocks: BTreeMap::new(),
            dirty: BTreeMap::new(),
            entries: BTreeMap::new(),
            parent: 0,
            target: Bytes::new(),
            opens: 0,
            memo: Memo::default(),
        };
        if inode.is_dir() {
            inode.parent = parent;
            inode.entries = self.entries(ino, parent).await?;
        } else if inode.is_file() {
            inode.blocks = self.blocks(ino, &attr).await?;
        } else if inode.mode & S_IFMT == S_IFLNK {
            let (reply, _) = self.ask(Call::Readlink { ino }, None).await?;
            if let Reply::Bytes(target) = reply {
                inode.target = target;
            }
        }
        Ok(inode)
    }

    async fn xattrs(&self, ino: Ino) -> Seen<BTreeMap<Bytes, Bytes>> {
        let (reply, _) = self.ask(Call::Listxattr { ino }, None).await?;
        let Reply::Bytes(list) = reply else {
            return Err(format!("the xattrs of inode {ino} are {reply:?}"));
        };
        let mut xattrs = BTreeMap::new();
        for name in list
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
        {
            let name = Bytes::copy_from_slice(name);
            let call = Call::Getxattr {
                ino,
                name: name.clone(),
            };
            if let (Reply::Bytes(value), _) = self.ask(call, None).await? {
                xattrs.insert(name, value);
            }
        }
        Ok(xattrs)
    }

    async fn entries(&self, ino: Ino, parent: Ino) -> Seen<BTreeMap<Bytes, Dirent>> {
        let (reply, _) = self.ask(Call::Readdir { ino }, None).await?;
        let Reply::Names(names) = reply else {
            return Err(format!("the entries of inode {ino} are {reply:?}"));
        };
        let mut entries = BTreeMap::new();
        for (index, (target, _, name)) in names.iter().enumerate() {
            match &name[..] {
                b"." if *target == ino => continue,
                b".." if *target == parent => continue,
                b"." | b".." => {
                    return Err(format!("{name:?} in inode {ino} leads to {target}"));
                }
                _ => {}
            }
            let born = (index as u64, index as u64);
            let entry = Dirent { ino: *target, born };
            if entries.insert(name.clone(), entry).is_some() {
                return Err(format!("{name:?} is twice in inode {ino}"));
            }
        }
        Ok(entries)
    }

    async fn blocks(&self, ino: Ino, attr: &Attr) -> Seen<BTreeMap<u64, Block>> {
        let (reply, _) = self.ask(Call::Fiemap { ino }, None).await?;
        let Reply::Extents(extents) = reply else {
            return Err(format!("the extents of inode {ino} are {reply:?}"));
        };
        let mut written: Vec<u64> = extents
            .iter()
            .filter(|extent| extent.flags & 0x802 == 0)
            .flat_map(|e| e.logical / 4096..(e.logical + e.length) / 4096)
            .collect();
        written.sort_unstable();
        written.dedup();
        if written.len() as u64 * 8 != attr.blocks {
            return Err(format!(
                "inode {ino} has {} written blocks, but counts {}",
                written.len(),
                attr.blocks / 8
            ));
        }
        let mut blocks = BTreeMap::new();
        if written.is_empty() {
            return Ok(blocks);
        }
        let (_, handle) = self.ask(Call::Open { ino }, None).await?;
        let mut at = 0;
        while at < written.len() {
            let run = (at..written.len().min(at + 64))
                .take_while(|index| written[*index] - written[at] == (*index - at) as u64)
                .count();
            let call = Call::Read {
                ino,
                offset: written[at] * 4096,
                len: run as u32 * 4096,
            };
            let (reply, _) = self.ask(call, handle).await?;
            let Reply::Bytes(bytes) = reply else {
                return Err(format!("the contents of inode {ino} are {reply:?}"));
            };
            for (index, block) in written[at..at + run].iter().enumerate() {
                let mut copy = [0; 4096];
                let from = (index * 4096).min(bytes.len());
                let to = (from + 4096).min(bytes.len());
                copy[..to - from].copy_from_slice(&bytes[from..to]);
                blocks.insert(*block, Rc::new(Page::new(copy)));
            }
            at += run;
        }
        self.ask(Call::Release { ino }, handle).await?;
        Ok(blocks)
    }
}

//! The filesystem in the merged view: inodes with their items, and what must
//! agree between them (spec 12 section 22, 13 section 17, 14 section 24, 11
//! section 12).
//!
//! Items come in key order, so all items of an inode come together and are
//! checked at once. What links inodes is kept in flat vectors, about 100 bytes
//! for each file, and compared at the end.

use super::census::Claim;
use super::cursor::{Ctx, Item};
use super::inode_state::InodeState;
use super::report::{Kind, Problem};
use super::srch::{Entry, SrchEntries};
use crate::format::*;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A directory entry, seen from either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Link {
    pub ino: u64,
    pub dir: u64,
    pub pos: u64,
    /// Hash of the value, which is equal in all items of the entry.
    pub value: u64,
    pub kind: u8,
}

/// What is kept of an inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    pub ino: u64,
    pub meta_seq: u64,
    pub data_seq: u64,
    pub nlink: u32,
    pub mode: u32,
    /// Link items naming it.
    pub backrefs: u32,
    /// Entries of type directory in it.
    pub subdirs: u32,
    pub entries: u32,
}

impl Summary {
    pub fn is_dir(&self) -> bool {
        dirent_type(self.mode) == Some(DT_DIR)
    }
    fn is_reg(&self) -> bool {
        dirent_type(self.mode) == Some(DT_REG)
    }
}

/// Collects the merged view.
pub(super) struct Namespace {
    pub ctx: Rc<Ctx>,
    current: Option<Box<InodeState>>,
    pub inodes: Vec<Summary>,
    pub dirents: Vec<Link>,
    pub backrefs: Vec<Link>,
    meta_index: Vec<(u64, u64)>,
    data_index: Vec<(u64, u64)>,
    orphans: Vec<u64>,
    totls: BTreeMap<Key, (u64, u64)>,
    /// Totals by the xattrs.
    pub want_totls: BTreeMap<Key, (u64, u64)>,
    indx: Vec<Key>,
    /// Index items by the xattrs.
    pub want_indx: Vec<Key>,
    /// Srch entries by the xattrs.
    pub want_srch: Vec<Entry>,
}

impl Namespace {
    pub fn new(ctx: &Rc<Ctx>) -> Self {
        Self {
            ctx: ctx.clone(),
            current: None,
            inodes: Vec::new(),
            dirents: Vec::new(),
            backrefs: Vec::new(),
            meta_index: Vec::new(),
            data_index: Vec::new(),
            orphans: Vec::new(),
            totls: BTreeMap::new(),
            want_totls: BTreeMap::new(),
            indx: Vec::new(),
            want_indx: Vec::new(),
            want_srch: Vec::new(),
        }
    }

    /// Takes a total.
    pub fn totl(&mut self, key: Key, total: u64, count: u64) {
        if key != Key::xattr_totl(key.first, key.second, key.third) {
            self.bad(
                Kind::Item,
                "the key of a total has fields that must be zero",
                key,
            );
        }
        self.totls.insert(key, (total, count));
    }

    /// Takes the next item in key order.
    pub fn item(&mut self, item: &Item) {
        self.ctx.report.borrow_mut().stats.items += 1;
        let key = item.key;
        let empty = item.value().is_empty();
        match (key.zone, key.kind) {
            (ZONE_INODE_INDEX, TYPE_META_SEQ)
                if key == Key::meta_seq(key.second, key.third) && empty =>
            {
                self.meta_index.push((key.third, key.second));
            }
            (ZONE_INODE_INDEX, TYPE_DATA_SEQ)
                if key == Key::data_seq(key.second, key.third) && empty =>
            {
                self.data_index.push((key.third, key.second));
            }
            (ZONE_ORPHAN, _) if key == Key::orphan(key.second) && empty => {
                self.orphans.push(key.second);
            }
            (ZONE_QUOTA, _) => self.quota(item),
            (ZONE_XATTR_INDX, 0) if empty => {
                self.gated(key);
                self.indx.push(key);
            }
            (ZONE_FS, _) => self.fs_item(item),
            _ => self.bad(
                Kind::Item,
                "an item of an unknown kind, or with a wrong key or value",
                key,
            ),
        }
    }

    fn bad(&self, kind: Kind, text: &str, key: Key) {
        self.ctx.add(Problem::error(kind, text).key(key));
    }

    fn gated(&self, key: Key) {
        if self.ctx.fmt_vers() < 2 {
            self.bad(
                Kind::Item,
                "an item of format version 2 on a volume of version 1",
                key,
            );
        }
    }

    fn quota(&self, item: &Item) {
        let key = item.key;
        self.gated(key);
        let bad = |text: &str| self.bad(Kind::Quota, text, key);
        let rule = match value_exact::<QuotaRuleVal>("quota rule", item.value()) {
            Ok(rule) => rule,
            Err(e) => return bad(&e.to_string()),
        };
        if key != Key::quota_rule(fnv1a64(item.value()), key.third) {
            bad("the key of a quota rule does not fit its value");
        }
        if rule.op > QUOTA_OP_DATA
            || rule.rule_flags & !QUOTA_RULE_FLAG_TOTL_COUNT != 0
            || rule.name_source.iter().any(|s| *s > QUOTA_NAME_GID)
            || rule
                .name_flags
                .iter()
                .any(|f| f & !QUOTA_NAME_FLAG_SELECT != 0)
            || rule.pad != [0; 7]
        {
            bad("a quota rule has unknown numbers or flags");
        }
    }

    fn fs_item(&mut self, item: &Item) {
        let ino = item.key.first;
        if self.current.as_ref().is_none_or(|c| c.ino != ino) {
            self.end_inode();
            self.current = Some(Box::new(InodeState::new(ino)));
        }
        if let Some(mut current) = self.current.take() {
            current.item(self, item);
            self.current = Some(current);
        }
    }

    /// Ends the inode whose items came last.
    fn end_inode(&mut self) {
        if let Some(current) = self.current.take() {
            current.finish(self);
        }
    }

    /// Claims the data blocks of a file extent.
    pub fn claim_data(&self, key: Key, blkno: u64, len: u64) {
        let claimed = self.ctx.data_mapped.borrow_mut().insert_range(blkno, len);
        let problem = match claimed {
            Ok(()) if blkno >= DATA_DEV_START_BLKNO => return,
            Ok(()) | Err(Claim::Outside) => {
                Problem::error(Kind::Extent, "a file extent is outside of the data device")
            }
            Err(Claim::Twice(block)) => {
                Problem::error(Kind::Census, "a data block is mapped by files twice").at(block)
            }
        };
        self.ctx.add(problem.key(key));
    }

    /// Compares everything that must agree. `logs` are all log trees.
    pub fn finish(mut self, logs: &[LogTrees], srch: &SrchEntries) {
        self.end_inode();
        let ctx = self.ctx.clone();
        {
            let stats = &mut ctx.report.borrow_mut().stats;
            stats.inodes = self.inodes.len() as u64;
            stats.entries = self.dirents.len() as u64;
            stats.orphans = self.orphans.len() as u64;
        }
        if ctx.fs_damaged.get() {
            let text = "links, indexes and counts were not compared, since items could not be read";
            ctx.add(Problem::note(Kind::Suspicious, text));
            return;
        }
        self.compare_links();
        let leaked = self.check_inodes();
        self.compare_orphans();
        self.compare_indexes(&leaked);
        self.compare_totls();
        self.compare_indx();
        self.compare_srch(srch);
        self.check_dir_tree();
        self.check_count(logs, leaked.len());
    }

    fn find(&self, ino: u64) -> Option<&Summary> {
        let at = self.inodes.binary_search_by_key(&ino, |s| s.ino).ok()?;
        Some(&self.inodes[at])
    }

    /// Each entry has its link item and the other way round; types match.
    fn compare_links(&mut self) {
        let mut dirents = std::mem::take(&mut self.dirents);
        dirents.sort_unstable();
        self.backrefs.sort_unstable();
        diff(&dirents, &self.backrefs, |link, missing_right| {
            let (text, key) = if missing_right {
                (
                    "a directory entry without its equal link item",
                    Key::readdir(link.dir, link.pos),
                )
            } else {
                (
                    "a link item without its equal directory entry",
                    Key::link_backref(link.ino, link.dir, link.pos),
                )
            };
            self.bad(Kind::Dirent, text, key);
        });
        for link in &dirents {
            let key = Key::readdir(link.dir, link.pos);
            match self.find(link.ino) {
                None => {
                    let text = format!(
                        "a directory entry names inode {}, which is not there",
                        link.ino
                    );
                    self.bad(Kind::Dirent, &text, key);
                }
                Some(target) if dirent_type(target.mode) != Some(link.kind) => {
                    let text = "the type of a directory entry is not its inode's";
                    let problem = Problem::error(Kind::Dirent, text).key(key);
                    let found = format!("type {}", link.kind);
                    self.ctx
                        .add(problem.want(format!("mode {:o}", target.mode), found));
                }
                Some(_) => {}
            }
        }
        self.dirents = dirents;
    }

    /// Link counts; returns inodes that failed creates of the original left.
    fn check_inodes(&self) -> Vec<u64> {
        let mut leaked = Vec::new();
        for s in &self.inodes {
            let bad = |text: &str, expected: u64| {
                let problem = Problem::error(Kind::Inode, text).key(Key::inode(s.ino));
                self.ctx.add(problem.want(expected, s.nlink));
            };
            let indexed = self.meta_index_has(s);
            if s.nlink == 1 && s.backrefs == 0 && s.entries == 0 && !indexed && s.ino != ROOT_INO {
                let text = "an inode that a failed create left behind, known to no directory";
                self.ctx
                    .add(Problem::note(Kind::LeakedInode, text).key(Key::inode(s.ino)));
                leaked.push(s.ino);
                continue;
            }
            if !s.is_dir() {
                if s.nlink != s.backrefs {
                    bad("the link count of an inode is wrong", u64::from(s.backrefs));
                }
                continue;
            }
            let linked = s.ino == ROOT_INO || s.backrefs == 1;
            let want = if linked { 2 + u64::from(s.subdirs) } else { 0 };
            if u64::from(s.nlink) != want {
                bad("the link count of a directory is wrong", want);
            }
            let most = u32::from(s.ino != ROOT_INO);
            if s.backrefs > most {
                let text = format!("a directory has {} names", s.backrefs);
                self.bad(Kind::Dirent, &text, Key::inode(s.ino));
            }
            if !linked && s.entries > 0 {
                self.bad(
                    Kind::Dirent,
                    "a removed directory has entries",
                    Key::inode(s.ino),
                );
            }
        }
        if self.find(ROOT_INO).is_none_or(|root| !root.is_dir()) {
            self.bad(
                Kind::Inode,
                "there is no root directory",
                Key::inode(ROOT_INO),
            );
        }
        leaked
    }

    fn meta_index_has(&self, s: &Summary) -> bool {
        // In key order the index is sorted by seq, then inode number.
        self.meta_index
            .binary_search_by_key(&(s.meta_seq, s.ino), |(ino, seq)| (*seq, *ino))
            .is_ok()
    }

    /// An orphan item for each inode without links, and no others.
    fn compare_orphans(&self) {
        let unlinked: Vec<u64> = self
            .inodes
            .iter()
            .filter(|s| s.nlink == 0)
            .map(|s| s.ino)
            .collect();
        diff(&self.orphans, &unlinked, |ino, missing_right| {
            let text = match (missing_right, self.find(*ino)) {
                (false, _) => "an inode without links has no orphan item",
                (true, None) => "an orphan item without its inode",
                (true, Some(_)) => "an orphan item of an inode that has links",
            };
            self.bad(Kind::Orphan, text, Key::orphan(*ino));
        });
    }

    /// One index item for each inode by its meta_seq, and for each regular file
    /// by its data_seq. The original left stale ones behind.
    fn compare_indexes(&mut self, leaked: &[u64]) {
        let mut meta = std::mem::take(&mut self.meta_index);
        let mut data = std::mem::take(&mut self.data_index);
        meta.sort_unstable();
        data.sort_unstable();
        let known = |s: &&Summary| leaked.binary_search(&s.ino).is_err();
        let want_meta: Vec<_> = self
            .inodes
            .iter()
            .filter(known)
            .map(|s| (s.ino, s.meta_seq))
            .collect();
        let files = self.inodes.iter().filter(known).filter(|s| s.is_reg());
        let want_data: Vec<_> = files.map(|s| (s.ino, s.data_seq)).collect();
        let report =
            |name: &str, make: fn(u64, u64) -> Key, have: &[(u64, u64)], want: &[(u64, u64)]| {
                diff(have, want, |(ino, seq), missing_right| {
                    let key = make(*seq, *ino);
                    if missing_right {
                        let text = format!("a stale {name} index item");
                        self.ctx.add(Problem::note(Kind::Index, text).key(key));
                    } else {
                        self.bad(
                            Kind::Index,
                            &format!("an inode has no {name} index item"),
                            key,
                        );
                    }
                });
            };
        report("meta_seq", Key::meta_seq, &meta, &want_meta);
        report("data_seq", Key::data_seq, &data, &want_data);
    }

    fn compare_totls(&mut self) {
        self.want_totls.retain(|_, sums| *sums != (0, 0));
        let have: Vec<_> = self.totls.iter().collect();
        let want: Vec<_> = self.want_totls.iter().collect();
        let (mut h, mut w) = (have.into_iter().peekable(), want.into_iter().peekable());
        loop {
            let key = match (h.peek(), w.peek()) {
                (None, None) => return,
                (Some((a, _)), Some((b, _))) => (*a).min(*b),
                (Some((key, _)), None) | (None, Some((key, _))) => key,
            };
            let sums = |side: Option<(&Key, &(u64, u64))>| side.map_or((0, 0), |(_, sums)| *sums);
            let found = sums(h.next_if(|(k, _)| *k == key));
            let expected = sums(w.next_if(|(k, _)| *k == key));
            if found != expected {
                let show = |(total, count): (u64, u64)| {
                    format!("{} by {}", total.cast_signed(), count.cast_signed())
                };
                let text = "a total is not the sum over its xattrs";
                let problem = Problem::error(Kind::Totl, text).key(*key);
                self.ctx.add(problem.want(show(expected), show(found)));
            }
        }
    }

    fn compare_indx(&mut self) {
        self.want_indx.sort_unstable();
        diff(&self.indx, &self.want_indx, |key, missing_right| {
            let text = if missing_right {
                "an xattr index item without its xattr"
            } else {
                "an indexed xattr without its index item"
            };
            self.bad(Kind::Indx, text, *key);
        });
    }

    fn compare_srch(&mut self, srch: &SrchEntries) {
        if srch.damaged {
            return;
        }
        self.want_srch.sort_unstable();
        let mut have: Vec<Entry> = srch.odd.iter().copied().collect();
        have.sort_unstable();
        diff(&have, &self.want_srch, |(hash, ino, id), missing_right| {
            let text = if missing_right {
                format!("a srch entry {hash:016x}.{ino}.{id} without its xattr")
            } else {
                format!("an xattr without its srch entry {hash:016x}.{ino}.{id}")
            };
            self.ctx.add(Problem::error(Kind::Srch, text));
        });
    }

    /// Linked directories form a tree under the root.
    fn check_dir_tree(&self) {
        let dirs: Vec<(u64, u64)> = self
            .backrefs
            .iter()
            .filter(|link| link.kind == DT_DIR)
            .map(|link| (link.ino, link.dir))
            .collect();
        const NEW: u8 = 0;
        const GOOD: u8 = 1;
        const ON_PATH: u8 = 2;
        const BAD: u8 = 3;
        let mut states = vec![NEW; dirs.len()];
        for start in 0..dirs.len() {
            let mut path = Vec::new();
            let mut at = start;
            let end = loop {
                match states[at] {
                    NEW => {}
                    ON_PATH => {
                        let text = "a directory is its own ancestor";
                        self.bad(Kind::Dirent, text, Key::inode(dirs[at].0));
                        break BAD;
                    }
                    known => break known,
                }
                states[at] = ON_PATH;
                path.push(at);
                let parent = dirs[at].1;
                if parent == ROOT_INO {
                    break GOOD;
                }
                match dirs.binary_search_by_key(&parent, |(ino, _)| *ino) {
                    Ok(next) => at = next,
                    // A missing or removed parent is reported with its entries.
                    Err(_) => break BAD,
                }
            };
            path.into_iter().for_each(|i| states[i] = end);
        }
    }

    fn check_count(&self, logs: &[LogTrees], leaked: usize) {
        let deltas = logs
            .iter()
            .map(|lt| lt.inode_count_delta.get().cast_unsigned());
        let count = deltas.fold(self.ctx.sb.inode_count.get(), u64::wrapping_add);
        let want = (self.inodes.len() - leaked) as u64;
        if count != want {
            let text = "the count of inodes is wrong";
            self.ctx
                .add(Problem::error(Kind::Count, text).want(want, count));
        }
    }
}

/// Walks two sorted slices and gives what only one of them has: `true` if it is
/// missing on the right.
fn diff<T: Ord>(left: &[T], right: &[T], mut only: impl FnMut(&T, bool)) {
    let (mut l, mut r) = (left.iter().peekable(), right.iter().peekable());
    loop {
        match (l.peek(), r.peek()) {
            (None, None) => return,
            (Some(a), Some(b)) if a == b => {
                l.next();
                r.next();
            }
            (Some(a), b) if b.is_none_or(|b| a < b) => {
                only(a, true);
                l.next();
            }
            (_, b) => {
                b.into_iter().for_each(|b| only(b, false));
                r.next();
            }
        }
    }
}

//! One inode with all its items, checked when the last has come.

use super::cursor::Item;
use super::namespace::{Link, Namespace, Summary};
use super::report::{Kind, Problem};
use crate::format::*;
use crate::fs::tags::{self, Tags};
use std::collections::BTreeSet;
use zerocopy::FromBytes;

/// An xattr whose parts are coming in.
struct PartialXattr {
    hash: u64,
    id: u64,
    bytes: Vec<u8>,
    want: usize,
    next_part: usize,
}

/// State of the inode whose items are coming in.
pub(super) struct InodeState {
    pub ino: u64,
    inode: Option<Inode>,
    any_key: Option<Key>,
    xattr: Option<PartialXattr>,
    xattr_names: BTreeSet<Vec<u8>>,
    xattr_ids: BTreeSet<u64>,
    acls: Vec<(Vec<u8>, Vec<u8>)>,
    /// Positions with value hashes, by name items and by position items.
    by_name: Vec<(u64, u64)>,
    by_pos: Vec<(u64, u64)>,
    same_hash: (u64, Vec<Vec<u8>>),
    name_bytes: u64,
    max_pos: u64,
    subdirs: u32,
    backrefs: u32,
    symlink: (u64, u64, u8),
    next_iblock: u64,
    online: u64,
    offline: u64,
    extents: u64,
    written_past_size: Option<Key>,
    mapped_past_size: Option<Key>,
}

impl InodeState {
    pub fn new(ino: u64) -> Self {
        Self {
            ino,
            inode: None,
            any_key: None,
            xattr: None,
            xattr_names: BTreeSet::new(),
            xattr_ids: BTreeSet::new(),
            acls: Vec::new(),
            by_name: Vec::new(),
            by_pos: Vec::new(),
            same_hash: (0, Vec::new()),
            name_bytes: 0,
            max_pos: 0,
            subdirs: 0,
            backrefs: 0,
            symlink: (0, 0, 0),
            next_iblock: 0,
            online: 0,
            offline: 0,
            extents: 0,
            written_past_size: None,
            mapped_past_size: None,
        }
    }

    fn is_unlinked(&self) -> bool {
        self.inode.is_some_and(|inode| inode.nlink.get() == 0)
    }

    /// Takes the next item.
    pub fn item(&mut self, ns: &mut Namespace, item: &Item) {
        self.any_key.get_or_insert(item.key);
        if item.key.kind != TYPE_XATTR {
            self.end_xattr(ns);
        }
        match item.key.kind {
            TYPE_INODE => self.inode(ns, item),
            TYPE_XATTR => self.xattr_part(ns, item),
            TYPE_DIRENT | TYPE_READDIR | TYPE_LINK_BACKREF => self.entry(ns, item),
            TYPE_SYMLINK => self.symlink_piece(ns, item),
            TYPE_DATA_EXTENT => self.extent(ns, item),
            _ => bad(ns, Kind::Item, "an item of an unknown type", item.key),
        }
    }

    fn inode(&mut self, ns: &Namespace, item: &Item) {
        if item.key != Key::inode(self.ino) {
            bad(
                ns,
                Kind::Inode,
                "the key of an inode item has fields that must be zero",
                item.key,
            );
        }
        match Inode::from_value(item.value(), ns.ctx.fmt_vers()) {
            Ok(inode) => self.inode = Some(inode),
            Err(e) => {
                bad(ns, Kind::Inode, &e.to_string(), item.key);
                // Present, though unreadable: its other items are not to be called stray.
                ns.ctx.fs_damaged.set(true);
                self.inode = Some(Inode::default());
            }
        }
    }

    fn entry(&mut self, ns: &mut Namespace, item: &Item) {
        let key = item.key;
        let (head, name) = match Dirent::from_value(item.value()) {
            Ok(parts) => parts,
            Err(e) => return bad(ns, Kind::Dirent, &e.to_string(), key),
        };
        let (ino, pos) = (head.ino.get(), head.pos.get());
        let value = fnv1a64(item.value());
        let want = match key.kind {
            TYPE_DIRENT => Key::dirent(self.ino, head.hash.get(), pos),
            TYPE_READDIR => Key::readdir(self.ino, pos),
            _ => Key::link_backref(self.ino, key.second, pos),
        };
        if key != want || (key.kind == TYPE_LINK_BACKREF && ino != self.ino) {
            bad(
                ns,
                Kind::Dirent,
                "the key of a directory entry does not fit its value",
                key,
            );
        }
        let link = |dir| Link {
            ino,
            dir,
            pos,
            value,
            kind: head.kind,
        };
        match key.kind {
            TYPE_DIRENT => {
                if head.hash.get() != dirent_hash(name) {
                    bad(
                        ns,
                        Kind::Dirent,
                        "the hash of a directory entry is not its name's",
                        key,
                    );
                }
                if name.contains(&0) || name.contains(&b'/') || name == b"." || name == b".." {
                    bad(
                        ns,
                        Kind::Dirent,
                        "a directory entry has an impossible name",
                        key,
                    );
                }
                self.unique_name(ns, key, name);
                self.name_bytes += name.len() as u64;
                self.max_pos = self.max_pos.max(pos);
                self.subdirs += u32::from(head.kind == DT_DIR);
                self.by_name.push((pos, value));
                if !(DIRENT_FIRST_POS..=DIRENT_LAST_POS).contains(&pos) {
                    bad(
                        ns,
                        Kind::Dirent,
                        "a directory entry has a reserved position",
                        key,
                    );
                }
                if head.pad != [0; 7] {
                    let text = "padding of a directory entry is not zero";
                    ns.ctx.add(Problem::note(Kind::Undefined, text).key(key));
                }
                ns.dirents.push(link(self.ino));
            }
            TYPE_READDIR => self.by_pos.push((pos, value)),
            _ => {
                self.backrefs += 1;
                ns.backrefs.push(link(key.second));
            }
        }
    }

    /// Equal names have equal hashes, so only neighbours need be compared.
    fn unique_name(&mut self, ns: &Namespace, key: Key, name: &[u8]) {
        if self.same_hash.0 != key.second {
            self.same_hash = (key.second, Vec::new());
        }
        if self.same_hash.1.iter().any(|have| have == name) {
            bad(ns, Kind::Dirent, "a name is in its directory twice", key);
        }
        self.same_hash.1.push(name.to_vec());
    }

    fn symlink_piece(&mut self, ns: &Namespace, item: &Item) {
        let (nr, bytes, before) = self.symlink;
        let value = item.value();
        let whole = nr * MAX_ITEM_VALUE as u64;
        if item.key != Key::symlink(self.ino, nr) || value.is_empty() || bytes != whole {
            let text = "pieces of a symlink target do not follow each other";
            bad(ns, Kind::Symlink, text, item.key);
        }
        let inner = &value[..value.len().saturating_sub(1)];
        if inner.contains(&0) || (nr > 0 && before == 0) {
            bad(ns, Kind::Symlink, "a symlink target holds a NUL", item.key);
        }
        let last = value.last().copied().unwrap_or(1);
        self.symlink = (nr + 1, bytes + value.len() as u64, last);
    }

    fn extent(&mut self, ns: &mut Namespace, item: &Item) {
        let key = item.key;
        let (last, len) = (key.second, key.third);
        let val = match value_exact::<DataExtentVal>("file extent", item.value()) {
            Ok(val) => val,
            Err(e) => return bad(ns, Kind::Extent, &e.to_string(), key),
        };
        ns.ctx.report.borrow_mut().stats.extents += 1;
        self.extents += 1;
        let start = last.checked_add(1).and_then(|end| end.checked_sub(len));
        let (Some(start), true) = (
            start.filter(|_| len > 0 && last <= MAX_IBLOCK),
            key.fourth == 0,
        ) else {
            return bad(ns, Kind::Extent, "a file extent makes no sense", key);
        };
        if start < self.next_iblock {
            bad(ns, Kind::Extent, "file extents overlap", key);
        }
        self.next_iblock = last + 1;
        let blkno = val.blkno.get();
        let both = EXTENT_FLAG_OFFLINE | EXTENT_FLAG_UNWRITTEN;
        let good = match (blkno, val.flags) {
            (0, flags) => flags == EXTENT_FLAG_OFFLINE,
            (_, flags) => flags == 0 || flags == EXTENT_FLAG_UNWRITTEN || flags == both,
        };
        if !good || val.pad != [0; 7] {
            bad(
                ns,
                Kind::Extent,
                "a file extent has an impossible mapping",
                key,
            );
        }
        let written = blkno != 0 && val.flags & EXTENT_FLAG_UNWRITTEN == 0;
        let offline = !written && val.flags & EXTENT_FLAG_OFFLINE != 0;
        self.online += if written { len } else { 0 };
        self.offline += if offline { len } else { 0 };
        if blkno != 0 {
            ns.claim_data(key, blkno, len);
        }
        let size = self.inode.map_or(0, |inode| inode.size.get());
        if last >= size.div_ceil(SM_BLOCK_SIZE as u64) {
            if written {
                self.written_past_size = Some(key);
            } else if offline {
                self.mapped_past_size = Some(key);
            }
        }
    }

    fn xattr_part(&mut self, ns: &mut Namespace, item: &Item) {
        let key = item.key;
        let same = |x: &PartialXattr| x.hash == key.second && x.id == key.third;
        if !self.xattr.as_ref().is_some_and(same) {
            self.end_xattr(ns);
            if key.fourth != 0 {
                if !self.is_unlinked() {
                    bad(ns, Kind::Xattr, "an xattr has no first part", key);
                }
                return;
            }
            let Ok((head, rest)) = Xattr::read_from_prefix(item.value()) else {
                return bad(
                    ns,
                    Kind::Xattr,
                    "the first part of an xattr is too short",
                    key,
                );
            };
            if rest.len() < usize::from(head.name_len) || head.name_len == 0 || head.pad != [0; 5] {
                return bad(ns, Kind::Xattr, "the head of an xattr makes no sense", key);
            }
            let want =
                size_of::<Xattr>() + usize::from(head.name_len) + usize::from(head.val_len.get());
            self.xattr = Some(PartialXattr {
                hash: key.second,
                id: key.third,
                bytes: Vec::with_capacity(want),
                want,
                next_part: 0,
            });
        }
        let Some(x) = &mut self.xattr else { return };
        let left = x.want - x.bytes.len().min(x.want);
        if usize::from(key.fourth) != x.next_part
            || item.value().len() != left.min(MAX_ITEM_VALUE)
            || left == 0
        {
            bad(
                ns,
                Kind::Xattr,
                "parts of an xattr do not follow each other",
                key,
            );
        }
        x.next_part = usize::from(key.fourth) + 1;
        x.bytes.extend_from_slice(item.value());
    }

    /// Checks an xattr whose parts have all come.
    fn end_xattr(&mut self, ns: &mut Namespace) {
        let Some(x) = self.xattr.take() else { return };
        let key = Key::xattr(self.ino, x.hash as u32, x.id, 0);
        ns.ctx.report.borrow_mut().stats.xattrs += 1;
        if x.bytes.len() != x.want {
            // Deleting an inode removes xattrs part by part.
            if !self.is_unlinked() {
                bad(ns, Kind::Xattr, "parts of an xattr are missing", key);
            }
            return;
        }
        let name_len = usize::from(x.bytes[2]);
        let (name, value) = x.bytes[size_of::<Xattr>()..].split_at(name_len);
        if u64::from(xattr_hash(name)) != x.hash {
            bad(
                ns,
                Kind::Xattr,
                "the hash of an xattr is not its name's",
                key,
            );
        }
        if !self.xattr_names.insert(name.to_vec()) {
            bad(ns, Kind::Xattr, "an inode has an xattr name twice", key);
        }
        if !self.xattr_ids.insert(x.id) {
            let text = "two xattrs of an inode have the same id";
            ns.ctx.add(Problem::note(Kind::Suspicious, text).key(key));
        }
        if self
            .inode
            .is_some_and(|inode| x.id >= inode.next_xattr_id.get())
        {
            bad(
                ns,
                Kind::Xattr,
                "the id of an xattr is not below next_xattr_id",
                key,
            );
        }
        if name.starts_with(b"system.posix_acl_") {
            self.acls.push((name.to_vec(), value.to_vec()));
        }
        self.xattr_tags(ns, key, x.id, name, value);
    }

    /// Notes what an xattr adds to totals, index and srch files.
    fn xattr_tags(&self, ns: &mut Namespace, key: Key, id: u64, name: &[u8], value: &[u8]) {
        let Ok(tags) = Tags::parse(name) else {
            return bad(
                ns,
                Kind::Xattr,
                "the tags of an xattr's name do not parse",
                key,
            );
        };
        if tags.srch {
            ns.want_srch.push((fnv1a64(name), self.ino, id));
        }
        if tags.indx {
            match tags::indx_numbers(name) {
                Ok((major, minor)) => ns
                    .want_indx
                    .push(Key::xattr_indx(major, minor, self.ino, id)),
                Err(_) => bad(
                    ns,
                    Kind::Indx,
                    "an indexed xattr's name does not parse",
                    key,
                ),
            }
        }
        if tags.totl {
            match (tags::totl_key(name), tags::parse_number(value)) {
                (Ok(totl), Ok(number)) => {
                    let sums = ns.want_totls.entry(totl).or_default();
                    *sums = (sums.0.wrapping_add(number), sums.1.wrapping_add(1));
                }
                _ => bad(
                    ns,
                    Kind::Totl,
                    "a totl xattr's name or value does not parse",
                    key,
                ),
            }
        }
    }

    /// Checks the inode against its items and hands on what links it to others.
    pub fn finish(mut self, ns: &mut Namespace) {
        self.end_xattr(ns);
        let Some(inode) = self.inode else {
            let key = self.any_key.unwrap_or(Key::inode(self.ino));
            return bad(ns, Kind::Inode, "items of an inode that is not there", key);
        };
        let kind = dirent_type(inode.mode.get());
        let key = Key::inode(self.ino);
        let wrong = |text: &str, expected: u64, found: u64| {
            let problem = Problem::error(Kind::Inode, text).key(key);
            ns.ctx.add(problem.want(expected, found));
        };
        self.check_fields(ns, &inode, kind);
        if !self.is_unlinked() {
            if inode.online_blocks.get() != self.online {
                wrong(
                    "online_blocks is wrong",
                    self.online,
                    inode.online_blocks.get(),
                );
            }
            if inode.offline_blocks.get() != self.offline {
                wrong(
                    "offline_blocks is wrong",
                    self.offline,
                    inode.offline_blocks.get(),
                );
            }
            self.check_size(ns, &inode, kind);
        }
        if kind != Some(DT_DIR) && !(self.by_name.is_empty() && self.by_pos.is_empty()) {
            bad(
                ns,
                Kind::Dirent,
                "an inode that is no directory has entries",
                key,
            );
        }
        if kind != Some(DT_LNK) && self.symlink.0 > 0 {
            bad(
                ns,
                Kind::Symlink,
                "an inode that is no symlink has a target",
                key,
            );
        }
        if kind != Some(DT_REG) && self.extents > 0 {
            bad(
                ns,
                Kind::Extent,
                "an inode that is no regular file has extents",
                key,
            );
        }
        self.check_positions(ns, &inode);
        self.check_past_size(ns, &inode);
        self.check_acls(ns, &inode, kind);
        ns.inodes.push(Summary {
            ino: self.ino,
            meta_seq: inode.meta_seq.get(),
            data_seq: inode.data_seq.get(),
            nlink: inode.nlink.get(),
            mode: inode.mode.get(),
            backrefs: self.backrefs,
            subdirs: self.subdirs,
            entries: self.by_name.len() as u32,
        });
    }

    fn check_fields(&self, ns: &Namespace, inode: &Inode, kind: Option<u8>) {
        let key = Key::inode(self.ino);
        if kind.is_none() {
            let text = format!("an inode has the unknown mode {:o}", inode.mode.get());
            bad(ns, Kind::Inode, &text, key);
        }
        let next = ns.ctx.sb.next_ino.get();
        if self.ino != ROOT_INO && !(FIRST_INO..next).contains(&self.ino) {
            let problem = Problem::error(Kind::Inode, "an inode number was never handed out");
            ns.ctx.add(
                problem
                    .key(key)
                    .want(format!("1 or 1024 to {}", next.saturating_sub(1)), self.ino),
            );
        }
        ns.ctx
            .check_seq("an inode's meta_seq", key, inode.meta_seq.get());
        ns.ctx
            .check_seq("an inode's data_seq", key, inode.data_seq.get());
        // Spec 12 has data_seq <= meta_seq, which is true of one mount only: another
        // mount may change the inode in a transaction that it opened earlier, and the
        // seqs are those of transactions.
        let known = INODE_FLAG_TRUNCATE
            | if ns.ctx.fmt_vers() < 2 {
                0
            } else {
                INODE_FLAG_RETENTION
            };
        if inode.flags.get() & !known != 0 {
            let text = format!("an inode has unknown flags {:#x}", inode.flags.get());
            bad(ns, Kind::Inode, &text, key);
        }
        let times = [inode.atime, inode.ctime, inode.mtime, inode.crtime];
        if times.iter().any(|t| t.nsec.get() >= 1_000_000_000) {
            bad(
                ns,
                Kind::Inode,
                "a time of an inode has too many nanoseconds",
                key,
            );
        }
        if times.iter().any(|t| t.pad != [0; 4]) {
            let text = "padding of an inode's times is not zero";
            ns.ctx.add(Problem::note(Kind::Undefined, text).key(key));
        }
    }

    fn check_size(&self, ns: &Namespace, inode: &Inode, kind: Option<u8>) {
        let (nr, bytes, last) = self.symlink;
        let (text, want) = match kind {
            Some(DT_DIR) => (
                "the size of a directory is not the sum of its names",
                self.name_bytes,
            ),
            Some(DT_LNK) => {
                if nr == 0 || last != 0 || bytes > SYMLINK_MAX as u64 {
                    bad(
                        ns,
                        Kind::Symlink,
                        "a symlink target does not end with one NUL",
                        Key::inode(self.ino),
                    );
                }
                ("the size of a symlink is not its target's", bytes)
            }
            _ => return,
        };
        if inode.size.get() != want {
            let problem = Problem::error(Kind::Inode, text).key(Key::inode(self.ino));
            ns.ctx.add(problem.want(want, inode.size.get()));
        }
    }

    /// Entries by name and by position are the same, each position once.
    fn check_positions(&mut self, ns: &Namespace, inode: &Inode) {
        let key = Key::inode(self.ino);
        self.by_name.sort_unstable();
        self.by_pos.sort_unstable();
        if self.by_name != self.by_pos {
            let differs = |(a, b): (&(u64, u64), &(u64, u64))| (a != b).then_some(a.0.min(b.0));
            let (long, short) = (self.by_name.len(), self.by_pos.len());
            let longer = if long > short {
                &self.by_name
            } else {
                &self.by_pos
            };
            let tail = longer.get(long.min(short)).map(|e| e.0);
            let pos = self
                .by_name
                .iter()
                .zip(&self.by_pos)
                .find_map(differs)
                .or(tail);
            let text = format!(
                "entries by name and by position differ, first at position {}",
                pos.unwrap_or(0)
            );
            bad(ns, Kind::Dirent, &text, key);
        }
        if self.by_name.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            bad(
                ns,
                Kind::Dirent,
                "two entries of a directory have the same position",
                key,
            );
        }
        if !self.by_name.is_empty() && self.max_pos >= inode.next_readdir_pos.get() {
            let text = "next_readdir_pos is not above every position";
            let problem = Problem::error(Kind::Inode, text).key(key);
            let want = format!("above {}", self.max_pos);
            ns.ctx.add(problem.want(want, inode.next_readdir_pos.get()));
        }
    }

    fn check_past_size(&self, ns: &Namespace, inode: &Inode) {
        if inode.flags.get() & INODE_FLAG_TRUNCATE != 0 || self.is_unlinked() {
            return;
        }
        if let Some(key) = self.written_past_size {
            let text = "written blocks past the end of a file";
            ns.ctx.add(Problem::note(Kind::Suspicious, text).key(key));
        }
        if let Some(key) = self.mapped_past_size {
            let text = "offline blocks past the end of a file";
            ns.ctx.add(Problem::note(Kind::Suspicious, text).key(key));
        }
    }

    /// ACLs parse, are where they may be, and agree with the mode.
    fn check_acls(&self, ns: &Namespace, inode: &Inode, kind: Option<u8>) {
        let key = Key::inode(self.ino);
        for (name, value) in &self.acls {
            let access = name == b"system.posix_acl_access";
            if !access && kind != Some(DT_DIR) {
                bad(
                    ns,
                    Kind::Xattr,
                    "an inode that is no directory has a default ACL",
                    key,
                );
            }
            match parse_acl(value) {
                Err(text) => bad(ns, Kind::Xattr, text, key),
                Ok(Some(group)) if access && u32::from(group) != inode.mode.get() >> 3 & 7 => {
                    bad(
                        ns,
                        Kind::Xattr,
                        "the mode of an inode does not fit its ACL",
                        key,
                    );
                }
                Ok(_) => {}
            }
        }
    }
}

/// Checks a stored ACL; the permissions that the mode's group bits must show.
fn parse_acl(value: &[u8]) -> Result<Option<u16>, &'static str> {
    if value.is_empty() {
        return Ok(None);
    }
    if value.len() < 4 || !(value.len() - 4).is_multiple_of(8) {
        return Err("an ACL has a wrong length");
    }
    if value[..4] != [2, 0, 0, 0] {
        return Err("an ACL has an unknown version");
    }
    let (mut last, mut group, mut mask) = (0, None, None);
    let (mut named, mut seen) = (false, 0);
    for entry in value[4..].chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let perm = u16::from_le_bytes([entry[2], entry[3]]);
        let repeats = tag == 2 || tag == 8;
        if ![1, 2, 4, 8, 0x10, 0x20].contains(&tag)
            || perm > 7
            || tag < last
            || (tag == last && !repeats)
        {
            return Err("an ACL is not valid");
        }
        last = tag;
        seen |= tag;
        named |= repeats;
        match tag {
            4 => group = Some(perm),
            0x10 => mask = Some(perm),
            _ => {}
        }
    }
    if seen & 0x25 != 0x25 || (named && mask.is_none()) {
        return Err("an ACL lacks entries");
    }
    Ok(mask.or(group))
}

fn bad(ns: &Namespace, kind: Kind, text: &str, key: Key) {
    ns.ctx.add(Problem::error(kind, text).key(key));
}

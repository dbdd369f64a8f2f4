//! POSIX ACLs as the model has them (spec 13 section 15): what may be set, how the
//! access ACL and the mode follow each other, and what new inodes inherit.
//!
//! Written from the specification, not from core: a rule that both have wrong in the
//! same way would be seen by nobody.

use super::execute::{Errors, Expected};
use super::{Context, Inode, Model, S_IFLNK, S_IFMT, UMASK};
use bytes::Bytes;
use outrider_core::errno::Errno;
use outrider_core::fs::api::Ino;

/// The xattr of the access ACL.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// The xattr of the default ACL.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NOBODY: u32 = u32::MAX;

const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o010;

/// Whether an xattr name is that of an ACL.
pub fn is_acl(name: &[u8]) -> bool {
    name == ACCESS || name == DEFAULT
}

/// Entries of an ACL: tag, permissions, user or group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Acl(Vec<(u16, u16, u32)>);

impl Acl {
    /// Reads a value; `None` if there are no entries.
    fn parse(value: &[u8]) -> Result<Option<Acl>, Errno> {
        let number = |from: usize, len: usize| {
            let bytes = value[from..from + len].iter().rev();
            bytes.fold(0, |sum, byte| sum << 8 | u32::from(*byte))
        };
        if value.len() < 4 {
            return Err(Errno::EINVAL);
        }
        if number(0, 4) != 2 {
            return Err(Errno::EOPNOTSUPP);
        }
        if !(value.len() - 4).is_multiple_of(8) {
            return Err(Errno::EINVAL);
        }
        let mut entries = Vec::new();
        for at in (4..value.len()).step_by(8) {
            let tag = number(at, 2) as u16;
            let id = match tag {
                USER | GROUP => number(at + 4, 4),
                USER_OBJ | GROUP_OBJ | MASK | OTHER => NOBODY,
                _ => return Err(Errno::EINVAL),
            };
            entries.push((tag, number(at + 2, 2) as u16, id));
        }
        Ok((!entries.is_empty()).then_some(Acl(entries)))
    }

    fn value(&self) -> Bytes {
        let mut value = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in &self.0 {
            value.extend(tag.to_le_bytes());
            value.extend(perm.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value.into()
    }

    fn count(&self, of: u16) -> usize {
        self.0.iter().filter(|(tag, _, _)| *tag == of).count()
    }

    fn is_valid(&self) -> bool {
        // The numbers of the tags are in the order in which they must come.
        let ordered = self.0.is_sorted_by_key(|(tag, _, _)| *tag);
        let one_each = [USER_OBJ, GROUP_OBJ, OTHER].map(|tag| self.count(tag)) == [1; 3];
        let named = self.count(USER) + self.count(GROUP);
        let masks = self.count(MASK);
        let sound = self.0.iter().all(|(tag, perm, id)| {
            let known = !matches!(*tag, USER | GROUP) || *id != NOBODY;
            *perm <= 7 && known
        });
        ordered && one_each && sound && masks <= 1 && (named == 0 || masks == 1)
    }

    /// The entries that stand for the three groups of bits of the mode.
    fn of_mode(&self) -> [(u16, u32); 3] {
        let group = if self.count(MASK) > 0 {
            MASK
        } else {
            GROUP_OBJ
        };
        [(USER_OBJ, 6), (group, 3), (OTHER, 0)]
    }

    fn mode(&self) -> u32 {
        let of = |tag| self.0.iter().find(|entry| entry.0 == tag);
        let bits = self.of_mode().map(|(tag, shift)| {
            let perm = of(tag).map_or(0, |entry| u32::from(entry.1));
            perm << shift
        });
        bits.into_iter().sum()
    }

    fn follow(&mut self, mode: u32) {
        for (tag, shift) in self.of_mode() {
            for entry in self.0.iter_mut().filter(|entry| entry.0 == tag) {
                entry.1 = (mode >> shift & 7) as u16;
            }
        }
    }

    /// Whether the mode says it all.
    fn is_base(&self) -> bool {
        self.0.len() == 3
    }
}

impl Inode {
    /// Sets the permission bits; the access ACL follows.
    pub(super) fn chmod(&mut self, mode: u32) {
        self.mode = (self.mode & S_IFMT) | (mode & 0o7777);
        if let Some(value) = self.xattrs.get_mut(ACCESS)
            && let Ok(Some(mut acl)) = Acl::parse(value)
        {
            acl.follow(mode);
            *value = acl.value();
        }
    }

    /// What a change of the owner takes away (spec 12 section 20).
    pub(super) fn lose_set_ids(&mut self) {
        if !self.is_dir() {
            self.mode &= !S_ISUID;
            if self.mode & S_IXGRP != 0 {
                self.mode &= !S_ISGID;
            }
        }
    }

    /// What an inode made in `dir` by root gets from it: group, set-group-id bit, ACLs,
    /// and a mode that the ACL or else the umask has masked.
    pub(super) fn inherit(&mut self, dir: &Inode) {
        if dir.mode & S_ISGID != 0 {
            self.gid = dir.gid;
            if self.is_dir() {
                self.mode |= S_ISGID;
            }
        }
        if self.mode & S_IFMT == S_IFLNK {
            return;
        }
        let default = dir.xattrs.get(DEFAULT);
        let Some(Ok(Some(mut acl))) = default.map(|value| Acl::parse(value)) else {
            self.mode &= !UMASK;
            return;
        };
        if self.is_dir() {
            self.xattrs.insert(Bytes::from_static(DEFAULT), acl.value());
        }
        let bits = acl.mode() & self.mode;
        acl.follow(bits);
        self.mode = (self.mode & !0o777) | bits;
        if !acl.is_base() {
            self.xattrs.insert(Bytes::from_static(ACCESS), acl.value());
        }
    }
}

impl Model {
    /// Sets an ACL, or takes it away.
    pub(super) fn set_acl(
        &mut self,
        ino: Ino,
        name: &Bytes,
        value: Option<&Bytes>,
        cx: &Context,
    ) -> Result<Expected, Errors> {
        let mut errors = Vec::new();
        let given = value.filter(|value| !value.is_empty());
        let acl = match given.map_or(Ok(None), |value| Acl::parse(value)) {
            Ok(acl) => acl,
            Err(error) => {
                errors.push(error);
                None
            }
        };
        if acl.as_ref().is_some_and(|acl| !acl.is_valid()) {
            errors.push(Errno::EINVAL);
        }
        let inode = match self.live(ino) {
            Ok(inode) => inode,
            Err(gone) => {
                errors.extend(gone);
                return Err(errors);
            }
        };
        if inode.mode & S_IFMT == S_IFLNK {
            errors.push(Errno::EOPNOTSUPP);
        }
        let misplaced = name == DEFAULT && !inode.is_dir();
        if misplaced && acl.is_some() {
            errors.extend([Errno::EINVAL, Errno::EACCES]);
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        if misplaced || (acl.is_none() && !inode.xattrs.contains_key(name)) {
            return Ok(Expected::Done);
        }
        let inode = self.get_mut(ino);
        let mut stays = acl;
        if name == ACCESS
            && let Some(acl) = &stays
        {
            inode.mode = (inode.mode & !0o777) | acl.mode();
            if acl.is_base() {
                stays = None;
            }
        }
        match stays {
            Some(acl) => _ = inode.xattrs.insert(name.clone(), acl.value()),
            None => _ = inode.xattrs.remove(name),
        }
        inode.ctime.set(cx);
        Ok(Expected::Done)
    }
}

/// The value that an operation of the workload sets: what kind of ACL follows from
/// `shape`, the permissions from `bits`.
pub fn drawn(shape: u8, bits: u16) -> Bytes {
    let perm = |nth: u32| bits.rotate_left(nth * 3) & 7;
    let (user, group, other) = (
        (USER_OBJ, perm(0), NOBODY),
        (GROUP_OBJ, perm(1), NOBODY),
        (OTHER, perm(2), NOBODY),
    );
    let mask = (MASK, perm(3), NOBODY);
    let named = |tag, id: u32| (tag, perm(id), id);
    let entries = match shape % 16 {
        0 => vec![user, group, other],
        1..=3 => vec![user, group, mask, other],
        4..=6 => vec![user, named(USER, 4), group, mask, other],
        7 | 8 => vec![user, group, named(GROUP, 5), mask, other],
        9 | 10 => {
            let users = (1..=u32::from(shape)).map(|id| named(USER, id));
            let groups = (1..=9).map(|id| named(GROUP, id));
            let middle = users.chain([group]).chain(groups);
            [user]
                .into_iter()
                .chain(middle)
                .chain([mask, other])
                .collect()
        }
        11 => Vec::new(),
        // Malformed ones.
        12 => vec![user, named(USER, 4), group, other],
        13 => vec![group, user, mask, other],
        14 => vec![user, group, (MASK, 8, NOBODY), other],
        _ => vec![user, group, mask, (0x40, 1, NOBODY), other],
    };
    Acl(entries).value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Call, ROOT, Reply, S_IFDIR, S_IFREG};
    use outrider_core::fs::api::{SetAttr, XattrSet};

    fn cx(time: u64) -> Context {
        Context {
            start: time,
            end: time + 1,
            ..Context::default()
        }
    }

    fn set(ino: Ino, name: &'static [u8], value: Bytes) -> Call {
        Call::Setxattr {
            ino,
            name: Bytes::from_static(name),
            value,
            how: XattrSet::Any,
        }
    }

    fn get(ino: Ino, name: &'static [u8]) -> Call {
        Call::Getxattr {
            ino,
            name: Bytes::from_static(name),
        }
    }

    /// One state after the call, or none.
    fn after(state: &Model, call: &Call, reply: Reply, time: u64) -> Option<Model> {
        let mut states = state.apply(call, &reply, &cx(time));
        assert!(states.len() <= 1);
        states.pop()
    }

    fn done(state: &Model, call: &Call, time: u64) -> Model {
        after(state, call, Reply::Done, time).expect("it may be done")
    }

    /// A state whose root has a default ACL, in which `make` is answered with inode 9.
    fn made(make: &Call, shape: u8, bits: u16) -> Model {
        let state = done(
            &Model::new(S_IFDIR | 0o755),
            &set(ROOT, DEFAULT, drawn(shape, bits)),
            1,
        );
        let mut state = state;
        state.answer(make, 9, &cx(5));
        state
    }

    #[test]
    fn every_shape_is_valid_or_refused_as_it_should_be() {
        for shape in 0..=255 {
            let parsed = Acl::parse(&drawn(shape, 0o6543));
            let valid = parsed.is_ok_and(|acl| acl.is_none_or(|acl| acl.is_valid()));
            assert_eq!(valid, shape % 16 < 12, "{shape}");
        }
    }

    #[test]
    fn an_access_acl_sets_the_mode_and_a_chmod_changes_the_acl() {
        let state = Model::new(S_IFDIR | 0o755);
        let acl = Acl(vec![
            (USER_OBJ, 6, NOBODY),
            (USER, 7, 4),
            (GROUP_OBJ, 5, NOBODY),
            (MASK, 4, NOBODY),
            (OTHER, 1, NOBODY),
        ]);
        let state = done(&state, &set(ROOT, ACCESS, acl.value()), 1);
        assert_eq!(state.get(ROOT).unwrap().mode, S_IFDIR | 0o641);
        let chmod = SetAttr {
            mode: Some(0o705),
            ..SetAttr::default()
        };
        let mut state = state;
        let call = Call::Setattr {
            ino: ROOT,
            set: chmod,
        };
        state.answer(&call, 0, &cx(5));
        let mut follows = acl.clone();
        follows.0[0].1 = 7;
        follows.0[3].1 = 0;
        follows.0[4].1 = 5;
        let read = get(ROOT, ACCESS);
        assert!(after(&state, &read, Reply::Bytes(follows.value()), 9).is_some());
        assert!(after(&state, &read, Reply::Bytes(acl.value()), 9).is_none());
        // One that the mode says wholly is not kept.
        let state = done(&state, &set(ROOT, ACCESS, drawn(0, 0o644)), 12);
        assert!(after(&state, &read, Reply::Err(Errno::ENODATA), 15).is_some());
    }

    #[test]
    fn what_is_made_inherits_or_the_judge_refuses_it() {
        let dir = Call::Mkdir {
            dir: ROOT,
            name: Bytes::from_static(b"d"),
            mode: 0o777,
        };
        let state = made(&dir, 4, 0o7654);
        let value = drawn(4, 0o7654);
        let inherited = state.get(9).unwrap();
        assert_eq!(inherited.xattrs[DEFAULT], value);
        assert_ne!(inherited.mode & 0o777, 0o755, "the umask is not used");
        let answer = Reply::Err(Errno::ENODATA);
        assert!(after(&state, &get(9, DEFAULT), answer.clone(), 9).is_none());
        assert!(after(&state, &get(9, ACCESS), answer, 9).is_none());
        let file = Call::Create {
            dir: ROOT,
            name: Bytes::from_static(b"f"),
            mode: 0o666,
            excl: true,
        };
        let state = made(&file, 4, u16::MAX);
        let file = state.get(9).unwrap();
        assert_eq!(file.mode, S_IFREG | 0o666, "masked by the mode asked for");
        assert!(!file.xattrs.contains_key(DEFAULT));
        let kept = Acl::parse(&file.xattrs[ACCESS]).unwrap().unwrap();
        assert_eq!(kept.mode(), 0o666);
    }

    #[test]
    fn malformed_and_misplaced_acls_are_refused() {
        let mut state = Model::new(S_IFDIR | 0o755);
        let file = Call::Create {
            dir: ROOT,
            name: Bytes::from_static(b"f"),
            mode: 0o666,
            excl: true,
        };
        state.answer(&file, 9, &cx(1));
        let invalid = Reply::Err(Errno::EINVAL);
        for (ino, name, shape) in [(9, DEFAULT, 4), (ROOT, ACCESS, 12), (ROOT, DEFAULT, 13)] {
            let call = set(ino, name, drawn(shape, 0o777));
            assert!(after(&state, &call, invalid.clone(), 5).is_some());
            assert!(after(&state, &call, Reply::Done, 5).is_none());
        }
        // An empty one takes away what may not be there.
        done(&state, &set(9, DEFAULT, drawn(11, 0)), 9);
        done(&state, &set(9, ACCESS, drawn(11, 0)), 9);
    }

    #[test]
    fn a_group_directory_gives_its_group_and_owners_lose_set_ids() {
        let mut state = Model::new(S_IFDIR | 0o2755);
        state.get_mut(ROOT).gid = 3;
        let dir = Call::Mkdir {
            dir: ROOT,
            name: Bytes::from_static(b"d"),
            mode: 0o777,
        };
        state.answer(&dir, 9, &cx(1));
        let made = state.get_mut(9);
        assert_eq!((made.mode, made.gid), (S_IFDIR | 0o2755, 3));
        let mut file = Inode::clone(made);
        file.mode = S_IFREG | 0o6755;
        file.lose_set_ids();
        assert_eq!(file.mode, S_IFREG | 0o755);
    }
}

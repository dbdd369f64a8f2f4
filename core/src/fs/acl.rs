//! POSIX ACLs, stored as xattrs (spec 13 section 15).
//!
//! What can go wrong: an access ACL that disagrees with the mode. Whoever changes
//! one of them changes the other in the same transaction.

use super::Fs;
use super::api::{Caller, Ino};
use super::change::{Change, Locked};
use super::error::FsResult;
use super::inode::{Inode, S_IFDIR, S_IFMT, S_ISGID};
use super::xattr::Stored;
use crate::env::mutant;
use crate::errno::Errno;
use crate::locks::Mode;
use bytes::Bytes;

const VERSION: u32 = 2;
const ENTRY: usize = 8;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;

/// Which of an inode's two ACLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Of the inode itself.
    Access,
    /// Of a directory, for what is made in it.
    Default,
}

impl Kind {
    /// Name of the xattr.
    pub const fn name(self) -> &'static [u8] {
        match self {
            Kind::Access => b"system.posix_acl_access",
            Kind::Default => b"system.posix_acl_default",
        }
    }
}

/// The ACL that an xattr name stands for.
pub(super) fn kind(name: &[u8]) -> Option<Kind> {
    [Kind::Access, Kind::Default]
        .into_iter()
        .find(|kind| kind.name() == name)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AclEntry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// An ACL: its entries in stored order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Acl {
    entries: Vec<AclEntry>,
}

impl Acl {
    /// Parses a stored value; `None` if it has no entries.
    fn parse(value: &[u8]) -> Result<Option<Acl>, Errno> {
        let (version, rest) = value.split_first_chunk().ok_or(Errno::EINVAL)?;
        if u32::from_le_bytes(*version) != VERSION {
            return Err(Errno::EOPNOTSUPP);
        }
        let (chunks, []) = rest.as_chunks::<ENTRY>() else {
            return Err(Errno::EINVAL);
        };
        let mut entries = Vec::with_capacity(chunks.len());
        for [t0, t1, p0, p1, id @ ..] in chunks {
            let tag = u16::from_le_bytes([*t0, *t1]);
            let id = match tag {
                USER | GROUP => u32::from_le_bytes(*id),
                USER_OBJ | GROUP_OBJ | MASK | OTHER => NO_ID,
                _ => return Err(Errno::EINVAL),
            };
            entries.push(AclEntry {
                tag,
                perm: u16::from_le_bytes([*p0, *p1]),
                id,
            });
        }
        Ok((!entries.is_empty()).then_some(Acl { entries }))
    }

    fn encode(&self) -> Bytes {
        let mut out = VERSION.to_le_bytes().to_vec();
        for entry in &self.entries {
            out.extend_from_slice(&entry.tag.to_le_bytes());
            out.extend_from_slice(&entry.perm.to_le_bytes());
            out.extend_from_slice(&entry.id.to_le_bytes());
        }
        out.into()
    }

    /// The rules of a whole ACL: order, one of each owner, mask where needed.
    fn validate(&self) -> Result<(), Errno> {
        let mut state = USER_OBJ;
        let mut needs_mask = false;
        for entry in &self.entries {
            if entry.perm & !7 != 0 {
                return Err(Errno::EINVAL);
            }
            state = match (state, entry.tag) {
                (USER_OBJ, USER_OBJ) => USER,
                (USER, USER) | (GROUP, GROUP) if entry.id != NO_ID => {
                    needs_mask = true;
                    entry.tag
                }
                (USER, GROUP_OBJ) => GROUP,
                (GROUP, MASK) => OTHER,
                (GROUP, OTHER) if !needs_mask => 0,
                (OTHER, OTHER) => 0,
                _ => return Err(Errno::EINVAL),
            };
        }
        if state == 0 {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }

    fn perm(&mut self, tag: u16) -> Option<&mut u16> {
        self.entries
            .iter_mut()
            .find(|entry| entry.tag == tag)
            .map(|entry| &mut entry.perm)
    }

    /// The entry that stands for the group bits of the mode.
    fn group_tag(&self) -> u16 {
        if self.entries.iter().any(|entry| entry.tag == MASK) {
            MASK
        } else {
            GROUP_OBJ
        }
    }

    /// Permission bits that the ACL stands for.
    fn mode(&mut self) -> u32 {
        let group = self.group_tag();
        let mut bits = |tag| self.perm(tag).map_or(0, |perm| u32::from(*perm & 7));
        bits(USER_OBJ) << 6 | bits(group) << 3 | bits(OTHER)
    }

    /// Whether the mode says it all.
    fn is_base(&self) -> bool {
        self.entries
            .iter()
            .all(|e| matches!(e.tag, USER_OBJ | GROUP_OBJ | OTHER))
    }

    /// Puts the permission bits of a mode in the entries they stand for.
    fn set_mode(&mut self, mode: u32) {
        let group = self.group_tag();
        for (tag, shift) in [(USER_OBJ, 6), (group, 3), (OTHER, 0)] {
            if let Some(perm) = self.perm(tag) {
                *perm = (mode >> shift & 7) as u16;
            }
        }
    }
}

/// Checks a stored ACL before it is shown.
pub(super) fn reencode(value: &[u8]) -> FsResult<Bytes> {
    if value.is_empty() {
        return Err(Errno::ENODATA.into());
    }
    Ok(Acl::parse(value)?.ok_or(Errno::ENODATA)?.encode())
}

/// ACLs of a new inode.
#[derive(Clone, Debug, Default)]
pub(super) struct NewAcls {
    access: Option<Bytes>,
    default: Option<Bytes>,
}

impl NewAcls {
    /// As xattrs.
    pub fn xattrs(&self) -> impl Iterator<Item = (&'static [u8], &[u8])> {
        [(Kind::Access, &self.access), (Kind::Default, &self.default)]
            .into_iter()
            .filter_map(|(kind, value)| value.as_deref().map(|value| (kind.name(), value)))
    }
}

impl Fs {
    /// ACLs of an inode made in `dir`; masks `mode` (section 15, Creation).
    pub(super) async fn new_acls(
        &self,
        locked: &Locked,
        dir: &Inode,
        cx: &Caller,
        gid: u32,
        mode: &mut u32,
        umask: u32,
    ) -> FsResult<NewAcls> {
        let mut acls = NewAcls::default();
        // Mutant: breaks spec 13 section 15, Creation.
        let inherits = self.config.policy.acl && !mutant("acl_not_inherited");
        let default = if inherits && dir.next_xattr_id != 0 {
            self.stored(locked, dir.ino, Kind::Default.name()).await?
        } else {
            None
        };
        let parsed = match default {
            Some(stored) => Acl::parse(&stored.value())?,
            None => None,
        };
        let Some(mut acl) = parsed else {
            *mode &= !(umask & 0o777);
            return Ok(acls);
        };
        if *mode & S_IFMT == S_IFDIR {
            acls.default = Some(acl.encode());
        }
        let masked = acl.mode() & *mode;
        acl.set_mode(masked);
        *mode = (*mode & !0o777) | masked;
        if !acl.is_base() {
            acls.access = Some(acl.encode());
            if !cx.may_set_gid(gid) {
                *mode &= !S_ISGID;
            }
        }
        Ok(acls)
    }

    /// Sets or removes an ACL (section 15, Set).
    ///
    /// # Errors
    /// EPERM for others than the owner, EINVAL for a malformed ACL, EOPNOTSUPP
    /// on symlinks and under `noacl`.
    pub(super) async fn set_acl(
        &self,
        cx: &Caller,
        ino: Ino,
        kind: Kind,
        value: Option<&[u8]>,
    ) -> FsResult<()> {
        if !self.config.policy.acl {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let acl = match value {
            Some(value) if !value.is_empty() => Acl::parse(value)?,
            _ => None,
        };
        if let Some(acl) = &acl {
            acl.validate()?;
        }
        let locked = self.lock_inodes(&[ino], Mode::Write).await?;
        let _local = self.local.alone(ino).await;
        let mut inode = self.load(&locked, ino).await?;
        if inode.is_symlink() {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if !cx.is_root() && cx.uid != inode.uid {
            return Err(Errno::EPERM.into());
        }
        if kind == Kind::Default && !inode.is_dir() {
            return if acl.is_some() {
                Err(Errno::EINVAL.into())
            } else {
                Ok(())
            };
        }
        let stored = self.stored(&locked, ino, kind.name()).await?;
        if stored.is_none() && acl.is_none() {
            return Ok(());
        }
        let mut change = self.change(&locked, &[inode.touch(false)], true).await?;
        let now = self.now();
        let done = async {
            change
                .put_acl(cx, &mut inode, kind, acl, stored.as_ref())
                .await?;
            inode.changed(now);
            change.put_inode(&mut inode, false).await
        }
        .await;
        change.finish(done).await
    }

    /// The access ACL that a chmod has to follow, if there is one.
    pub(super) async fn acl_for_chmod(
        &self,
        locked: &Locked,
        inode: &Inode,
    ) -> FsResult<Option<(Acl, Stored)>> {
        // Mutant: breaks spec 13 section 15, chmod.
        let follows = self.config.policy.acl && !mutant("chmod_leaves_acl");
        if !follows || inode.next_xattr_id == 0 || inode.is_symlink() {
            return Ok(None);
        }
        let Some(stored) = self.stored(locked, inode.ino, Kind::Access.name()).await? else {
            return Ok(None);
        };
        Ok(Acl::parse(&stored.value())?.map(|acl| (acl, stored)))
    }
}

impl Change<'_> {
    async fn put_acl(
        &mut self,
        cx: &Caller,
        inode: &mut Inode,
        kind: Kind,
        acl: Option<Acl>,
        stored: Option<&Stored>,
    ) -> FsResult<()> {
        let mut value = acl.as_ref().map(Acl::encode);
        if let (Kind::Access, Some(mut acl)) = (kind, acl) {
            inode.mode = (inode.mode & !0o777) | acl.mode();
            if !cx.may_set_gid(inode.gid) {
                inode.mode &= !S_ISGID;
            }
            if acl.is_base() {
                value = None;
            }
        }
        self.put_xattr(inode, kind.name(), stored, value.as_deref())
            .await
    }

    /// Makes the access ACL follow the mode that `inode` has now.
    pub(super) async fn put_chmod_acl(
        &mut self,
        inode: &mut Inode,
        mut acl: Acl,
        stored: &Stored,
    ) -> FsResult<()> {
        acl.set_mode(inode.mode);
        let value = (!acl.is_base()).then(|| acl.encode());
        self.put_xattr(inode, Kind::Access.name(), Some(stored), value.as_deref())
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// u::rw-, u:1000:r--, g::r--, m::r--, o::--- (spec 13 section 18).
    const VECTOR: [u8; 44] = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 255,
        255, 255, 255, 0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 0, 0, 255, 255, 255, 255,
    ];

    fn acl(entries: &[(u16, u16, u32)]) -> Acl {
        let entries = entries
            .iter()
            .map(|&(tag, perm, id)| AclEntry { tag, perm, id })
            .collect();
        Acl { entries }
    }

    #[test]
    fn the_vector_of_the_spec_parses_and_encodes() {
        let mut parsed = Acl::parse(&VECTOR).unwrap().unwrap();
        assert_eq!(parsed.encode(), VECTOR[..]);
        assert_eq!(parsed.validate(), Ok(()));
        assert_eq!(parsed.mode(), 0o640);
        assert!(!parsed.is_base());
        parsed.set_mode(0o751);
        assert_eq!(parsed.mode(), 0o751);
        assert_eq!(
            *parsed.perm(GROUP_OBJ).unwrap(),
            4,
            "the mask stands for the group"
        );
    }

    #[test]
    fn malformed_values_are_refused() {
        assert_eq!(Acl::parse(&VECTOR[..3]), Err(Errno::EINVAL));
        assert_eq!(Acl::parse(&VECTOR[..11]), Err(Errno::EINVAL));
        assert_eq!(Acl::parse(&[1, 0, 0, 0]), Err(Errno::EOPNOTSUPP));
        assert_eq!(Acl::parse(&VECTOR[..4]), Ok(None));
        let mut bad_tag = VECTOR;
        bad_tag[4] = 3;
        assert_eq!(Acl::parse(&bad_tag), Err(Errno::EINVAL));
    }

    #[test]
    fn whole_acls_have_their_rules() {
        let base = [
            (USER_OBJ, 6, NO_ID),
            (GROUP_OBJ, 4, NO_ID),
            (OTHER, 0, NO_ID),
        ];
        assert_eq!(acl(&base).validate(), Ok(()));
        let bad: [&[(u16, u16, u32)]; 6] = [
            &base[..2],
            &[base[0], base[2]],
            &[base[0], (USER, 4, 7), base[1], base[2]],
            &[base[1], base[0], base[2]],
            &[(USER_OBJ, 8, NO_ID), base[1], base[2]],
            &[base[0], base[1], base[2], base[2]],
        ];
        for entries in bad {
            assert_eq!(acl(entries).validate(), Err(Errno::EINVAL), "{entries:?}");
        }
    }
}

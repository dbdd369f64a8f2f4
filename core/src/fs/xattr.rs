//! Extended attributes (spec 13 sections 1 to 7 and 10 to 14).
//!
//! An xattr is a head, its name and its value, cut in items of 896 bytes. One
//! transaction rewrites all of them, so nobody sees parts of two values.
//!
//! What can go wrong: a total or an index item that does not match the stored
//! xattrs. They change in the transaction of the xattr, and are undone with it.

use super::api::{Caller, Ino, XattrSet};
use super::change::{Change, Locked};
use super::error::{FsError, FsResult};
use super::inode::Inode;
use super::tags::{self, Tags};
use super::{Fs, acl};
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::{self, Key, MAX_ITEM_VALUE, XATTR_MAX_NAME_LEN, XATTR_MAX_VAL_LEN, Xattr};
use crate::locks::{LockGuard, Mode, Scope};
use bytes::Bytes;
use zerocopy::{FromBytes, IntoBytes};

const HEAD: usize = size_of::<Xattr>();
/// Privileges that a write by somebody else takes away.
const CAPABILITY: &[u8] = b"security.capability";

/// An xattr as found: its first part, and where the others are.
#[derive(Clone, Debug)]
pub(super) struct Head {
    hash: u32,
    id: u64,
    name_len: usize,
    val_len: usize,
    first: Bytes,
}

impl Head {
    fn parse(key: &Key, first: Bytes) -> FsResult<Self> {
        let corrupt = |what| FsError::Corrupt { key: *key, what };
        if key.fourth != 0 {
            return Err(corrupt("an xattr without its first part"));
        }
        let (head, _) = Xattr::read_from_prefix(&first)
            .map_err(|_| corrupt("an xattr shorter than its head"))?;
        let (name_len, val_len) = (usize::from(head.name_len), usize::from(head.val_len.get()));
        if name_len == 0 || HEAD + name_len > first.len() {
            return Err(corrupt("an xattr's name lies outside its first part"));
        }
        let head = Head {
            hash: key.second as u32,
            id: key.third,
            name_len,
            val_len,
            first,
        };
        if head.first.len() != head.part_len(0) {
            return Err(corrupt("the first part of an xattr has a wrong length"));
        }
        Ok(head)
    }

    fn total(&self) -> usize {
        HEAD + self.name_len + self.val_len
    }

    fn parts(&self) -> usize {
        self.total().div_ceil(MAX_ITEM_VALUE)
    }

    fn part_len(&self, part: usize) -> usize {
        MAX_ITEM_VALUE.min(self.total() - part * MAX_ITEM_VALUE)
    }

    fn name(&self) -> &[u8] {
        &self.first[HEAD..HEAD + self.name_len]
    }

    fn key(&self, ino: Ino, part: usize) -> Key {
        Key::xattr(ino, self.hash, self.id, part as u8)
    }
}

/// Pieces of an xattr's items.
fn pieces(name: &[u8], value: &[u8]) -> Vec<Bytes> {
    let head = Xattr {
        val_len: (value.len() as u16).into(),
        name_len: name.len() as u8,
        ..Xattr::default()
    };
    let whole = Bytes::from([head.as_bytes(), name, value].concat());
    (0..whole.len().div_ceil(MAX_ITEM_VALUE))
        .map(|n| whole.slice(n * MAX_ITEM_VALUE..whole.len().min((n + 1) * MAX_ITEM_VALUE)))
        .collect()
}

/// Refuses names of no namespace that we have (section 2).
fn check_namespace(name: &[u8], mode: Option<u32>) -> FsResult<()> {
    let bare = [&b"user."[..], b"trusted.", b"security.", b"scoutfs."];
    let Some(prefix) = bare.iter().find(|prefix| name.starts_with(prefix)) else {
        return Err(Errno::EOPNOTSUPP.into());
    };
    if name.len() == prefix.len() {
        return Err(Errno::EINVAL.into());
    }
    if let Some(mode) = mode
        && name.starts_with(b"user.")
        && !matches!(
            mode & super::inode::S_IFMT,
            super::inode::S_IFREG | super::inode::S_IFDIR
        )
    {
        return Err(Errno::EPERM.into());
    }
    Ok(())
}

impl Fs {
    /// Finds an xattr by name, under the inode's lock.
    pub(super) async fn find_xattr(
        &self,
        guard: &LockGuard,
        ino: Ino,
        name: &[u8],
    ) -> FsResult<Option<Head>> {
        let hash = format::xattr_hash(name);
        let last = Key::xattr(ino, hash, u64::MAX, u8::MAX);
        let mut key = Key::xattr(ino, hash, 0, 0);
        while let Some((at, first)) = self.log.next(guard, &key, &last).await? {
            let head = Head::parse(&at, first)?;
            if head.name() == name {
                return Ok(Some(head));
            }
            probe("fs.xattr_hash_collision");
            let Some(id) = head.id.checked_add(1) else {
                break;
            };
            key = Key::xattr(ino, hash, id, 0);
        }
        Ok(None)
    }

    /// All parts of an xattr, with their lengths checked.
    async fn xattr_parts(&self, guard: &LockGuard, ino: Ino, head: &Head) -> FsResult<Vec<Bytes>> {
        let mut parts = vec![head.first.clone()];
        for part in 1..head.parts() {
            let key = head.key(ino, part);
            let piece = self.log.lookup(guard, &key).await?;
            match piece {
                Some(piece) if piece.len() == head.part_len(part) => parts.push(piece),
                _ => {
                    return Err(FsError::Corrupt {
                        key,
                        what: "missing part of an xattr",
                    });
                }
            }
        }
        Ok(parts)
    }

    /// Value of an xattr, under the inode's lock.
    pub(super) async fn xattr_value(
        &self,
        guard: &LockGuard,
        ino: Ino,
        head: &Head,
    ) -> FsResult<Bytes> {
        let start = HEAD + head.name_len;
        if head.parts() == 1 {
            return Ok(head.first.slice(start..));
        }
        Ok(Bytes::from(self.xattr_parts(guard, ino, head).await?.concat()).slice(start..))
    }

    /// GETXATTR.
    ///
    /// # Errors
    /// ENODATA, EOPNOTSUPP.
    pub(super) async fn do_getxattr(&self, ino: Ino, name: &[u8]) -> FsResult<Bytes> {
        let kind = acl::kind(name);
        if kind.is_some() && !self.config.policy.acl {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if kind.is_none() {
            check_namespace(name, None)?;
        }
        if name.len() > XATTR_MAX_NAME_LEN {
            return Err(Errno::ENODATA.into());
        }
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let _local = self.local.shared(ino).await;
        let head = self.find_xattr(locked.of(ino), ino, name).await?;
        // Mutant: breaks spec 13 section 15, Caching.
        if kind.is_some() && !mutant("acl_not_taken_back") {
            // It keeps ACLs, and that there are none, however long attributes are good.
            self.beliefs.keeps(ino, self.env.clock.now());
        }
        let head = head.ok_or(Errno::ENODATA)?;
        let value = self.xattr_value(locked.of(ino), ino, &head).await?;
        match kind {
            Some(_) => acl::reencode(&value),
            None => Ok(value),
        }
    }

    /// LISTXATTR: names without the hide tag, or with `hidden` only those with it.
    ///
    /// # Errors
    /// ESTALE if the inode is gone.
    pub(super) async fn do_listxattr(&self, ino: Ino, hidden: bool) -> FsResult<Bytes> {
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let _local = self.local.shared(ino).await;
        let guard = locked.of(ino);
        let mut names = Vec::new();
        if self.load(&locked, ino).await?.next_xattr_id == 0 {
            return Ok(Bytes::new());
        }
        let last = Key::xattr(ino, u32::MAX, u64::MAX, u8::MAX);
        let mut key = Key::xattr(ino, 0, 0, 0);
        while let Some((at, first)) = self.log.next(guard, &key, &last).await? {
            let head = Head::parse(&at, first)?;
            let hides = Tags::parse(head.name()).is_ok_and(|tags| tags.hide);
            if hides == hidden {
                names.extend_from_slice(head.name());
                names.push(0);
            }
            key = Key::xattr(ino, head.hash, head.id, u8::MAX);
            if key == last {
                break;
            }
            key = key.inc();
        }
        Ok(names.into())
    }

    /// SETXATTR and, without value, REMOVEXATTR (which passes `Replace`).
    ///
    /// # Errors
    /// Those of spec 13 section 5, in its order.
    pub(super) async fn do_setxattr(
        &self,
        cx: &Caller,
        ino: Ino,
        name: &[u8],
        value: Option<&[u8]>,
        how: XattrSet,
    ) -> FsResult<()> {
        if let Some(kind) = acl::kind(name) {
            return self.set_acl(cx, ino, kind, value).await;
        }
        check_namespace(name, None)?;
        let tags = Tags::parse(name)?;
        let mut locked = self.lock_inodes(&[ino], Mode::Write).await?;
        let _local = self.local.alone(ino).await;
        let mut inode = self.load(&locked, ino).await?;
        check_namespace(name, Some(inode.mode))?;
        self.check_set(cx, &inode, name, value, tags)?;
        let found = self.find_xattr(locked.of(ino), ino, name).await?;
        match (&found, how) {
            (None, XattrSet::Replace) => return Err(Errno::ENODATA.into()),
            (Some(_), XattrSet::Create) => return Err(Errno::EEXIST.into()),
            (None, _) if value.is_none() => return Ok(()),
            _ => {}
        }
        let effects = self
            .effects(&locked, &inode, name, value, tags, found.as_ref())
            .await?;
        if tags.indx && found.is_some() && value.is_some() {
            return Ok(());
        }
        if tags.totl {
            self.lock_zone(&mut locked, Scope::Totl, Mode::WriteOnly)
                .await?;
        } else if tags.indx {
            self.lock_zone(&mut locked, Scope::Indx, Mode::WriteOnly)
                .await?;
        }
        let old = match &found {
            Some(head) => Some((head, self.xattr_parts(locked.of(ino), ino, head).await?)),
            None => None,
        };
        let mut change = self.change(&locked, &[inode.touch(false)], true).await?;
        let now = self.now();
        let done = async {
            change
                .apply_effects(ino, effects, inode.next_xattr_id)
                .await?;
            match (old, value) {
                (Some((head, old)), Some(value)) => {
                    change
                        .replace_parts(ino, head, old, pieces(name, value))
                        .await?;
                }
                (Some((head, old)), None) => change.delete_parts(ino, head, old).await?,
                (None, Some(value)) => change.create_xattr(&mut inode, name, value).await?,
                (None, None) => {}
            }
            inode.changed(now);
            change.put_inode(&mut inode, false).await
        }
        .await;
        change.finish(done).await
    }

    fn check_set(
        &self,
        cx: &Caller,
        inode: &Inode,
        name: &[u8],
        value: Option<&[u8]>,
        tags: Tags,
    ) -> FsResult<()> {
        if name.len() > XATTR_MAX_NAME_LEN {
            return Err(Errno::ERANGE.into());
        }
        if value.is_some_and(|value| value.len() > XATTR_MAX_VAL_LEN) {
            return Err(Errno::E2BIG.into());
        }
        if tags.any() && !cx.is_root() {
            return Err(Errno::EPERM.into());
        }
        if tags.totl {
            tags::totl_key(name)?;
        }
        if tags.indx {
            if self.config.fmt_vers < 2 {
                return Err(Errno::EOPNOTSUPP.into());
            }
            tags::indx_numbers(name)?;
        }
        if inode.is_retained() && name.starts_with(b"user.") {
            return Err(Errno::EPERM.into());
        }
        Ok(())
    }

    /// What a change does to the total or the index of its tag.
    async fn effects(
        &self,
        locked: &Locked,
        inode: &Inode,
        name: &[u8],
        value: Option<&[u8]>,
        tags: Tags,
        found: Option<&Head>,
    ) -> FsResult<Effects> {
        let mut effects = Effects::default();
        if tags.totl {
            let old = match found {
                Some(head) => {
                    let text = self
                        .xattr_value(locked.of(inode.ino), inode.ino, head)
                        .await?;
                    Some(tags::parse_number(&text)?)
                }
                None => None,
            };
            let new = value.map(tags::parse_number).transpose()?;
            let total = new.unwrap_or(0).wrapping_sub(old.unwrap_or(0));
            let count = u64::from(new.is_some()).wrapping_sub(u64::from(old.is_some()));
            effects.total = Some((tags::totl_key(name)?, total, count));
        }
        if tags.indx {
            if value.is_some_and(|value| !value.is_empty()) {
                return Err(Errno::EINVAL.into());
            }
            let (major, minor) = tags::indx_numbers(name)?;
            effects.indx = Some((major, minor, found.map(|head| head.id), value.is_some()));
        }
        Ok(effects)
    }

    /// Strips what a write by somebody else takes away: set-id bits and the
    /// capability xattr. The caller stores the inode.
    ///
    /// # Errors
    /// If the item cache failed.
    pub(super) async fn strip_privs(
        &self,
        change: &mut Change<'_>,
        inode: &mut Inode,
    ) -> FsResult<()> {
        inode.strip_ids();
        change.drop_capability(inode).await
    }

    /// An xattr with all its parts, read for a change.
    pub(super) async fn stored(
        &self,
        locked: &Locked,
        ino: Ino,
        name: &[u8],
    ) -> FsResult<Option<Stored>> {
        let guard = locked.of(ino);
        let Some(head) = self.find_xattr(guard, ino, name).await? else {
            return Ok(None);
        };
        let parts = self.xattr_parts(guard, ino, &head).await?;
        Ok(Some(Stored { head, parts }))
    }

    /// Deletes all xattrs of an inode that is being deleted, a transaction for
    /// each item (spec 13 section 14). Can be repeated after a crash.
    pub(super) async fn delete_xattrs(&self, locked: &Locked, ino: Ino) -> FsResult<()> {
        let last = Key::xattr(ino, u32::MAX, u64::MAX, u8::MAX);
        let guard = locked.of(ino).clone();
        let mut zone: Option<(Scope, LockGuard)> = None;
        // Never from the front again: until a merge there is a deletion item for each
        // that is gone, and to skip them all for every one takes quadratic time.
        let mut from = Key::xattr(ino, 0, 0, 0);
        while let Some((key, value)) = self.log.next(&guard, &from, &last).await? {
            let effects = deletion_effects(&key, &value);
            let wanted = match &effects {
                Effects { total: Some(_), .. } => Some(Scope::Totl),
                Effects { indx: Some(_), .. } => Some(Scope::Indx),
                _ => None,
            };
            if let Some(scope) = wanted
                && zone.as_ref().is_none_or(|(had, _)| *had != scope)
            {
                // Never both at once.
                drop(zone.take());
                zone = Some((scope, self.locks.lock(scope, Mode::WriteOnly).await?));
            }
            let mut one = Locked::default();
            one.push(guard.clone());
            if let Some((_, zone)) = &zone {
                one.push(zone.clone());
            }
            let mut change = self.change(&one, &[], false).await?;
            let done = async {
                change.apply_effects(ino, effects, 0).await?;
                change.delete(key, value).await
            }
            .await;
            change.finish(done).await?;
            if key == last {
                break;
            }
            from = key.inc();
        }
        Ok(())
    }
}

/// An xattr with all its parts.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    head: Head,
    parts: Vec<Bytes>,
}

impl Stored {
    /// Its value.
    pub fn value(&self) -> Bytes {
        let start = HEAD + self.head.name_len;
        Bytes::from(self.parts.concat()).slice(start..)
    }
}

/// Changes beside the xattr's own items.
#[derive(Debug, Default)]
struct Effects {
    total: Option<(Key, u64, u64)>,
    /// Major, minor, the id if it is known, and whether to create.
    indx: Option<(u8, u64, Option<u64>, bool)>,
}

/// What the deletion of one xattr item does beside. A tagged name or value that
/// does not parse has no effect: the inode must go all the same (section 19.10).
fn deletion_effects(key: &Key, value: &Bytes) -> Effects {
    let mut effects = Effects::default();
    if key.fourth != 0 {
        return effects;
    }
    let Ok(head) = Head::parse(key, value.clone()) else {
        return effects;
    };
    let Ok(tags) = Tags::parse(head.name()) else {
        return effects;
    };
    if tags.totl {
        let number = (head.parts() == 1)
            .then(|| tags::parse_number(&value[HEAD + head.name_len..]).ok())
            .flatten();
        match (tags::totl_key(head.name()), number) {
            (Ok(total), Some(n)) => effects.total = Some((total, n.wrapping_neg(), u64::MAX)),
            _ => tracing::error!(%key, "a totl xattr that does not parse is deleted"),
        }
    }
    if tags.indx {
        match tags::indx_numbers(head.name()) {
            Ok((major, minor)) => effects.indx = Some((major, minor, Some(head.id), false)),
            Err(_) => tracing::error!(%key, "an indx xattr that does not parse is deleted"),
        }
    }
    effects
}

impl Change<'_> {
    async fn apply_effects(&mut self, ino: Ino, effects: Effects, next_id: u64) -> FsResult<()> {
        if let Some((major, minor, id, create)) = effects.indx {
            let key = Key::xattr_indx(major, minor, ino, id.unwrap_or(next_id));
            self.force(key, ino, create).await?;
        }
        if let Some((key, total, count)) = effects.total {
            self.add_total(key, total, count).await?;
        }
        Ok(())
    }

    /// Adds an xattr that does not exist yet; the caller stores the inode.
    pub(super) async fn create_xattr(
        &mut self,
        inode: &mut Inode,
        name: &[u8],
        value: &[u8],
    ) -> FsResult<()> {
        let id = inode.next_xattr_id;
        inode.next_xattr_id = id.checked_add(1).ok_or(Errno::ENOSPC)?;
        let hash = format::xattr_hash(name);
        for (part, piece) in pieces(name, value).into_iter().enumerate() {
            self.create(Key::xattr(inode.ino, hash, id, part as u8), piece)
                .await?;
        }
        Ok(())
    }

    /// Removes the capability xattr of a file that loses its privileges.
    pub(super) async fn drop_capability(&mut self, inode: &mut Inode) -> FsResult<()> {
        if inode.next_xattr_id == 0 {
            return Ok(());
        }
        let stored = self.stored(inode.ino, CAPABILITY).await?;
        self.put_xattr(inode, CAPABILITY, stored.as_ref(), None)
            .await
    }

    /// Stores or removes the xattr `name`, of which `stored` exists.
    pub(super) async fn put_xattr(
        &mut self,
        inode: &mut Inode,
        name: &[u8],
        stored: Option<&Stored>,
        value: Option<&[u8]>,
    ) -> FsResult<()> {
        match (stored, value) {
            (Some(stored), Some(value)) => {
                let new = pieces(name, value);
                self.replace_parts(inode.ino, &stored.head, stored.parts.clone(), new)
                    .await
            }
            (Some(stored), None) => {
                self.delete_parts(inode.ino, &stored.head, stored.parts.clone())
                    .await
            }
            (None, Some(value)) => self.create_xattr(inode, name, value).await,
            (None, None) => Ok(()),
        }
    }

    /// Changes a value: every part is rewritten (section 6).
    async fn replace_parts(
        &mut self,
        ino: Ino,
        head: &Head,
        old: Vec<Bytes>,
        new: Vec<Bytes>,
    ) -> FsResult<()> {
        let both = old.len().min(new.len());
        for (part, piece) in new.iter().enumerate().skip(both) {
            self.create(head.key(ino, part), piece.clone()).await?;
        }
        for part in (0..both).rev() {
            self.update(head.key(ino, part), new[part].clone(), old[part].clone())
                .await?;
        }
        for (part, piece) in old.into_iter().enumerate().skip(both) {
            self.delete(head.key(ino, part), piece).await?;
        }
        Ok(())
    }

    async fn delete_parts(&mut self, ino: Ino, head: &Head, old: Vec<Bytes>) -> FsResult<()> {
        for (part, piece) in old.into_iter().enumerate().rev() {
            self.delete(head.key(ino, part), piece).await?;
        }
        Ok(())
    }
}

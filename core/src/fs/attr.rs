//! Attributes: getattr and setattr (spec 12 sections 5 and 20).
//!
//! What can go wrong: changing a retained inode, and leaving set-id bits on a
//! file whose owner or size was changed by somebody else.

use super::Fs;
use super::api::{Attr, Caller, Ino, SetAttr, SetTime};
use super::change::Locked;
use super::error::FsResult;
use super::inode::{Inode, S_IFMT};
use crate::env::{Duration, WallTime};
use crate::errno::Errno;
use crate::locks::Mode;

/// Largest file size.
const SIZE_MAX: u64 = i64::MAX as u64;

impl Caller {
    /// Whether it has the capabilities of root. Credentials of a caller outside
    /// the initial user namespace never have uid 0 here.
    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Whether a set-group-id bit may stand on its file of group `gid`.
    pub(super) fn may_set_gid(&self, gid: u32) -> bool {
        self.is_root() || self.gid == gid || self.groups.contains(&gid)
    }
}

impl Fs {
    /// GETATTR.
    ///
    /// # Errors
    /// ESTALE if the inode is gone.
    pub(super) async fn do_getattr(&self, ino: Ino) -> FsResult<(Attr, Duration)> {
        let locked = self.lock_inodes(&[ino], Mode::Read).await?;
        let inode = self.load(&locked, ino).await?;
        Ok((inode.attr(), self.attr_valid(ino)))
    }

    /// SETATTR.
    ///
    /// # Errors
    /// EPERM under retention, EISDIR or EINVAL for a size of what has none.
    pub(super) async fn do_setattr(&self, ino: Ino, set: &SetAttr) -> FsResult<(Attr, Duration)> {
        let locked = self.lock_inodes(&[ino], Mode::Write).await?;
        let _local = self.local.alone(ino).await;
        let mut inode = self.load(&locked, ino).await?;
        if inode.is_retained() {
            return Err(Errno::EPERM.into());
        }
        if let Some(size) = set.size {
            check_size(&inode, size)?;
            self.data_set_size(&locked, &mut inode, size).await?;
        }
        if has_more(set) {
            self.set_attributes(&locked, &mut inode, set).await?;
        }
        Ok((inode.attr(), self.attr_valid(ino)))
    }

    async fn set_attributes(
        &self,
        locked: &Locked,
        inode: &mut Inode,
        set: &SetAttr,
    ) -> FsResult<()> {
        let now = self.now();
        let acl = match set.mode {
            Some(_) => self.acl_for_chmod(locked, inode).await?,
            None => None,
        };
        let mut change = self.change(locked, &[inode.touch(false)], false).await?;
        let mut changed = inode.clone();
        apply(&mut changed, set, now);
        let done = async {
            if strips(set) {
                change.drop_capability(&mut changed).await?;
            }
            if let Some((acl, found)) = acl {
                change.put_chmod_acl(&mut changed, acl, &found).await?;
            }
            change.put_inode(&mut changed, false).await
        }
        .await;
        change.finish(done).await?;
        self.table.set_atime(inode.ino, None);
        *inode = changed;
        Ok(())
    }

    /// Notes that a file was read. Never writes anything: the time reaches the
    /// item with the next change, if at all (spec 12 section 20).
    pub(crate) fn accessed(&self, inode: &Inode) {
        let now = self.now();
        let due = match self.config.policy.atime {
            super::AtimePolicy::Never => false,
            super::AtimePolicy::Always => true,
            super::AtimePolicy::Relative => {
                inode.atime <= inode.mtime
                    || inode.atime <= inode.ctime
                    || now.sec.saturating_sub(inode.atime.sec) >= 24 * 3600
            }
        };
        if due {
            self.table.set_atime(inode.ino, Some(now));
        }
    }
}

fn check_size(inode: &Inode, size: u64) -> FsResult<()> {
    if inode.is_dir() {
        return Err(Errno::EISDIR.into());
    }
    if !inode.is_reg() {
        return Err(Errno::EINVAL.into());
    }
    if size > SIZE_MAX {
        return Err(Errno::EFBIG.into());
    }
    Ok(())
}

/// Whether there is more to do than to set a size. A request without anything is
/// `chown(-1, -1)`: it moves ctime.
fn has_more(set: &SetAttr) -> bool {
    set.size.is_none()
        || *set
            != (SetAttr {
                size: set.size,
                ..SetAttr::default()
            })
}

/// Whether privileges of the file go with this change.
fn strips(set: &SetAttr) -> bool {
    set.kill_suidgid || set.uid.is_some() || set.gid.is_some()
}

fn apply(inode: &mut Inode, set: &SetAttr, now: WallTime) {
    let at = |time| match time {
        SetTime::Now => now,
        SetTime::At(time) => time,
    };
    if strips(set) {
        inode.strip_ids();
    }
    inode.uid = set.uid.unwrap_or(inode.uid);
    inode.gid = set.gid.unwrap_or(inode.gid);
    if let Some(mode) = set.mode {
        inode.mode = (inode.mode & S_IFMT) | (mode & 0o7777);
    }
    inode.atime = set.atime.map_or(inode.atime, at);
    inode.mtime = set.mtime.map_or(inode.mtime, at);
    inode.changed(now);
    inode.ctime = set.ctime.unwrap_or(now);
}

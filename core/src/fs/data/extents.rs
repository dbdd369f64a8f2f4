//! A file's extent items (spec 14 sections 2 to 4): keyed by their last block, so
//! that one forward seek finds the extent that contains or follows a block.
//!
//! What can go wrong: a partial change. Every item change goes through
//! [`Change`], whose journal undoes it; counts live in the inode, which the caller
//! writes in the same change.

use super::super::Fs;
use super::super::change::Change;
use super::super::error::{FsError, FsResult};
use super::super::inode::Inode;
use super::LAST_BLOCK;
use crate::format::{DataExtentVal, EXTENT_FLAG_OFFLINE, EXTENT_FLAG_UNWRITTEN, Key};
use crate::locks::LockGuard;
use bytes::Bytes;
use zerocopy::{FromBytes, IntoBytes};

/// One extent of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First logical block.
    pub start: u64,
    /// Number of blocks, at least 1.
    pub len: u64,
    /// Data block of the first one; 0 if none is mapped.
    pub blkno: u64,
    /// `EXTENT_FLAG_*` bits.
    pub flags: u8,
}

impl Extent {
    /// Block after the last.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Whether it has blocks.
    pub fn is_mapped(&self) -> bool {
        self.blkno != 0
    }

    /// Whether its blocks hold data: mapped and written.
    pub fn is_written(&self) -> bool {
        self.is_mapped() && self.flags & EXTENT_FLAG_UNWRITTEN == 0
    }

    /// Whether its data is in the archive only.
    pub fn is_offline(&self) -> bool {
        self.flags & EXTENT_FLAG_OFFLINE != 0
    }

    /// The part of it in `[start, end)`, which must overlap it.
    pub fn part(&self, start: u64, end: u64) -> Extent {
        let from = self.start.max(start);
        let to = self.end().min(end);
        assert!(
            from < to,
            "extent {self:?} does not reach into {start}..{end}"
        );
        let blkno = if self.is_mapped() {
            self.blkno + (from - self.start)
        } else {
            0
        };
        Extent {
            start: from,
            len: to - from,
            blkno,
            flags: self.flags,
        }
    }

    fn is_hole(&self) -> bool {
        self.blkno == 0 && self.flags == 0
    }

    fn joins(&self, right: &Extent) -> bool {
        self.end() == right.start
            && self.flags == right.flags
            && match (self.blkno, right.blkno) {
                (0, 0) => true,
                (left, right) => left != 0 && left + self.len == right,
            }
    }

    fn key(&self, ino: u64) -> Key {
        Key::data_extent(ino, self.end() - 1, self.len)
    }

    fn value(&self) -> Bytes {
        let value = DataExtentVal {
            blkno: self.blkno.into(),
            flags: self.flags,
            ..Default::default()
        };
        Bytes::copy_from_slice(value.as_bytes())
    }

    fn decode(key: Key, value: &[u8]) -> FsResult<Extent> {
        let corrupt = |what| FsError::Corrupt { key, what };
        let disk = DataExtentVal::ref_from_bytes(value)
            .map_err(|_| corrupt("an extent's value has 16 bytes"))?;
        let (last, len) = (key.second, key.third);
        if last > LAST_BLOCK || len == 0 || len > last + 1 {
            return Err(corrupt("the extent does not lie in the file"));
        }
        let (blkno, flags) = (disk.blkno.get(), disk.flags);
        match (blkno != 0, flags) {
            (true, 0 | EXTENT_FLAG_UNWRITTEN)
            | (false, EXTENT_FLAG_OFFLINE)
            | (true, BOTH_FLAGS) => {}
            _ => return Err(corrupt("the extent's flags do not go together")),
        }
        Ok(Extent {
            start: last + 1 - len,
            len,
            blkno,
            flags,
        })
    }

    /// What it adds to the online and offline counts.
    fn counts(&self) -> (u64, u64) {
        if self.is_written() {
            (self.len, 0)
        } else if self.is_offline() {
            (0, self.len)
        } else {
            (0, 0)
        }
    }
}

const BOTH_FLAGS: u8 = EXTENT_FLAG_OFFLINE | EXTENT_FLAG_UNWRITTEN;

impl Fs {
    /// The extent with the smallest end above `block`: it contains the block or
    /// starts later.
    pub(super) async fn next_extent(
        &self,
        guard: &LockGuard,
        ino: u64,
        block: u64,
    ) -> FsResult<Option<Extent>> {
        let from = Key::data_extent(ino, block, 1);
        let last = Key::data_extent(ino, u64::MAX, u64::MAX);
        match self.log.next(guard, &from, &last).await? {
            Some((key, value)) => Extent::decode(key, &value).map(Some),
            None => Ok(None),
        }
    }

    /// The extents that reach into blocks `[start, end)`, cut to it.
    pub(super) async fn extents_in(
        &self,
        guard: &LockGuard,
        ino: u64,
        start: u64,
        end: u64,
    ) -> FsResult<Vec<Extent>> {
        let mut found = Vec::new();
        let mut at = start;
        while at < end {
            let Some(extent) = self.next_extent(guard, ino, at).await? else {
                break;
            };
            if extent.start >= end {
                break;
            }
            found.push(extent.part(start, end));
            at = extent.end();
        }
        Ok(found)
    }
}

/// Sets what blocks `[new.start, new.end())` of the inode are: they must lie in
/// one extent or in one hole. Blocks 0 and no flags make a hole. Neighbours that
/// continue each other are joined.
///
/// # Errors
/// EIO if the range crosses an extent's border, which the caller must prevent.
pub async fn set(
    fs: &Fs,
    change: &mut Change<'_>,
    inode: &mut Inode,
    mut new: Extent,
) -> FsResult<()> {
    let ino = inode.ino;
    let (start, end) = (new.start, new.end());
    let guard = change.locked().of(ino);
    let around = fs
        .next_extent(guard, ino, start)
        .await?
        .filter(|e| e.start < end);
    let (mut joins_left, mut joins_right) = (true, true);
    if let Some(old) = around {
        if start < old.start || end > old.end() {
            let what = "the range to set crosses the extent's border";
            return Err(FsError::Corrupt {
                key: old.key(ino),
                what,
            });
        }
        remove(change, inode, old).await?;
        if old.start < start {
            joins_left = false;
            let rest = old.part(old.start, start);
            if rest.joins(&new) && !new.is_hole() {
                new = Extent {
                    start: rest.start,
                    len: rest.len + new.len,
                    blkno: rest.blkno,
                    ..new
                };
            } else {
                insert(change, inode, rest).await?;
            }
        }
        if old.end() > end {
            joins_right = false;
            let rest = old.part(end, old.end());
            if new.joins(&rest) && !new.is_hole() {
                new.len += rest.len;
            } else {
                insert(change, inode, rest).await?;
            }
        }
    }
    if new.is_hole() {
        return Ok(());
    }
    if joins_right && new.end() <= LAST_BLOCK {
        let right = fs.next_extent(guard, ino, new.end()).await?;
        if let Some(right) = right.filter(|right| new.joins(right)) {
            remove(change, inode, right).await?;
            new.len += right.len;
        }
    }
    if joins_left && new.start > 0 {
        let left = fs.next_extent(guard, ino, new.start - 1).await?;
        if let Some(left) = left.filter(|left| left.joins(&new)) {
            remove(change, inode, left).await?;
            new = Extent {
                start: left.start,
                len: left.len + new.len,
                blkno: left.blkno,
                ..new
            };
        }
    }
    insert(change, inode, new).await
}

async fn insert(change: &mut Change<'_>, inode: &mut Inode, extent: Extent) -> FsResult<()> {
    change.create(extent.key(inode.ino), extent.value()).await?;
    let (online, offline) = extent.counts();
    inode.online_blocks = inode.online_blocks.saturating_add(online);
    inode.offline_blocks = inode.offline_blocks.saturating_add(offline);
    Ok(())
}

/// Takes a whole extent out.
///
/// # Errors
/// If the item cache failed.
pub async fn remove(change: &mut Change<'_>, inode: &mut Inode, extent: Extent) -> FsResult<()> {
    change.delete(extent.key(inode.ino), extent.value()).await?;
    let (online, offline) = extent.counts();
    inode.online_blocks = inode.online_blocks.saturating_sub(online);
    inode.offline_blocks = inode.offline_blocks.saturating_sub(offline);
    Ok(())
}

//! The key that names every metadata item: 32 bytes on disk in one order,
//! compared in another (spec 01 sections 4 and 11).
//!
//! What can go wrong: hashes run over all stored bytes, so padding must be zero.
//! [`Key::to_bytes`] always writes it so; [`DiskKey::pad`] keeps what was read.

use super::consts::*;
use super::structs::DiskKey;
use std::fmt;

/// A key in native form. Its derived order is the comparison order of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Zone: the kind of things.
    pub zone: u8,
    /// Most significant number; the inode number in the FS zone.
    pub first: u64,
    /// Type within the zone.
    pub kind: u8,
    /// Second number.
    pub second: u64,
    /// Third number.
    pub third: u64,
    /// Least significant number.
    pub fourth: u8,
}

/// An inclusive range of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyRange {
    /// First key of the range.
    pub start: Key,
    /// Last key of the range.
    pub end: Key,
}

impl Key {
    /// All fields zero: "no key", and the start of everything.
    pub const ZEROS: Key = Key::new(0, 0, 0, 0, 0, 0);
    /// All fields maximal: the end of everything, and the key of the right spine.
    pub const ONES: Key = Key::new(u8::MAX, u64::MAX, u8::MAX, u64::MAX, u64::MAX, u8::MAX);

    /// A key from its fields in comparison order.
    pub const fn new(zone: u8, first: u64, kind: u8, second: u64, third: u64, fourth: u8) -> Self {
        Self {
            zone,
            first,
            kind,
            second,
            third,
            fourth,
        }
    }

    /// Whether this is [`Key::ZEROS`].
    pub fn is_zeros(&self) -> bool {
        *self == Self::ZEROS
    }

    /// Whether this is [`Key::ONES`].
    pub fn is_ones(&self) -> bool {
        *self == Self::ONES
    }

    /// The next key; wraps from [`Key::ONES`] to [`Key::ZEROS`].
    #[must_use]
    pub const fn inc(self) -> Self {
        let mut k = self;
        k.fourth = k.fourth.wrapping_add(1);
        if k.fourth == 0 {
            k.third = k.third.wrapping_add(1);
            if k.third == 0 {
                k.second = k.second.wrapping_add(1);
                if k.second == 0 {
                    k.kind = k.kind.wrapping_add(1);
                    if k.kind == 0 {
                        k.first = k.first.wrapping_add(1);
                        if k.first == 0 {
                            k.zone = k.zone.wrapping_add(1);
                        }
                    }
                }
            }
        }
        k
    }

    /// The previous key; wraps from [`Key::ZEROS`] to [`Key::ONES`].
    #[must_use]
    pub const fn dec(self) -> Self {
        let mut k = self;
        k.fourth = k.fourth.wrapping_sub(1);
        if k.fourth == u8::MAX {
            k.third = k.third.wrapping_sub(1);
            if k.third == u64::MAX {
                k.second = k.second.wrapping_sub(1);
                if k.second == u64::MAX {
                    k.kind = k.kind.wrapping_sub(1);
                    if k.kind == u8::MAX {
                        k.first = k.first.wrapping_sub(1);
                        if k.first == u64::MAX {
                            k.zone = k.zone.wrapping_sub(1);
                        }
                    }
                }
            }
        }
        k
    }

    /// The 32 bytes as stored, padding zero.
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut b = [0; 32];
        b[0..8].copy_from_slice(&self.first.to_le_bytes());
        b[8..16].copy_from_slice(&self.second.to_le_bytes());
        b[16..24].copy_from_slice(&self.third.to_le_bytes());
        b[24] = self.fourth;
        b[25] = self.zone;
        b[26] = self.kind;
        b
    }

    /// The key in 32 stored bytes; padding is ignored.
    pub fn from_bytes(b: &[u8; 32]) -> Self {
        let word = |at: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&b[at..at + 8]);
            u64::from_le_bytes(w)
        };
        Self {
            zone: b[25],
            first: word(0),
            kind: b[26],
            second: word(8),
            third: word(16),
            fourth: b[24],
        }
    }
}

/// Constructors of the items' keys (spec 01 section 11).
impl Key {
    /// META_SEQ index item of an inode.
    pub const fn meta_seq(seq: u64, ino: u64) -> Self {
        Self::new(ZONE_INODE_INDEX, 0, TYPE_META_SEQ, seq, ino, 0)
    }
    /// DATA_SEQ index item of a regular file.
    pub const fn data_seq(seq: u64, ino: u64) -> Self {
        Self::new(ZONE_INODE_INDEX, 0, TYPE_DATA_SEQ, seq, ino, 0)
    }
    /// Orphan item of an inode.
    pub const fn orphan(ino: u64) -> Self {
        Self::new(ZONE_ORPHAN, 0, TYPE_ORPHAN, ino, 0, 0)
    }
    /// Quota rule by the hash of its value and a collision number.
    pub const fn quota_rule(hash: u64, nr: u64) -> Self {
        Self::new(ZONE_QUOTA, 0, TYPE_QUOTA_RULE, hash, nr, 0)
    }
    /// Total named by three numbers.
    pub const fn xattr_totl(a: u64, b: u64, c: u64) -> Self {
        Self::new(ZONE_XATTR_TOTL, a, 0, b, c, 0)
    }
    /// Index item of an xattr, packed as one 200 bit number.
    pub const fn xattr_indx(major: u8, minor: u64, ino: u64, xid: u64) -> Self {
        Self::new(
            ZONE_XATTR_INDX,
            ((major as u64) << 56) | (minor >> 8),
            0,
            (minor << 56) | (ino >> 8),
            (ino << 56) | (xid >> 8),
            (xid & 0xff) as u8,
        )
    }
    /// The `(major, minor, ino, xid)` of an [`Key::xattr_indx`] key.
    pub const fn xattr_indx_fields(&self) -> (u8, u64, u64, u64) {
        (
            (self.first >> 56) as u8,
            (self.first << 8) | (self.second >> 56),
            (self.second << 8) | (self.third >> 56),
            (self.third << 8) | (self.fourth as u64),
        )
    }
    /// Inode item.
    pub const fn inode(ino: u64) -> Self {
        Self::new(ZONE_FS, ino, TYPE_INODE, 0, 0, 0)
    }
    /// Part of an xattr.
    pub const fn xattr(ino: u64, name_hash: u32, id: u64, part: u8) -> Self {
        Self::new(ZONE_FS, ino, TYPE_XATTR, name_hash as u64, id, part)
    }
    /// Directory entry by name hash.
    pub const fn dirent(dir: u64, hash: u64, pos: u64) -> Self {
        Self::new(ZONE_FS, dir, TYPE_DIRENT, hash, pos, 0)
    }
    /// Directory entry by position.
    pub const fn readdir(dir: u64, pos: u64) -> Self {
        Self::new(ZONE_FS, dir, TYPE_READDIR, pos, 0, 0)
    }
    /// Directory entry by the inode it names.
    pub const fn link_backref(ino: u64, dir: u64, pos: u64) -> Self {
        Self::new(ZONE_FS, ino, TYPE_LINK_BACKREF, dir, pos, 0)
    }
    /// Piece of a symlink target.
    pub const fn symlink(ino: u64, nr: u64) -> Self {
        Self::new(ZONE_FS, ino, TYPE_SYMLINK, nr, 0, 0)
    }
    /// File extent by its last logical block and its length, both in small blocks.
    pub const fn data_extent(ino: u64, last: u64, len: u64) -> Self {
        Self::new(ZONE_FS, ino, TYPE_DATA_EXTENT, last, len, 0)
    }
    /// The name of the rename lock; never an item.
    pub const fn rename_lock() -> Self {
        Self::new(ZONE_LOCK, 0, TYPE_RENAME, 0, 0, 0)
    }
    /// Log tree number `nr` of mount `rid`.
    pub const fn log_trees(rid: u64, nr: u64) -> Self {
        Self::new(ZONE_LOG_TREES, rid, 0, nr, 0, 0)
    }
    /// Mounted client item of `rid`.
    pub const fn mounted_client(rid: u64) -> Self {
        Self::new(ZONE_MOUNTED_CLIENT, rid, 0, 0, 0, 0)
    }
    /// Rotated srch log file with its root at `blkno`.
    pub const fn srch_log(blkno: u64) -> Self {
        Self::new(ZONE_SRCH, 0, TYPE_SRCH_LOG, blkno, 0, 0)
    }
    /// Sorted srch file of `blocks` blocks with its root at `blkno`.
    pub const fn srch_blocks(blocks: u64, blkno: u64) -> Self {
        Self::new(ZONE_SRCH, 0, TYPE_SRCH_BLOCKS, blocks, blkno, 0)
    }
    /// Pending srch compaction.
    pub const fn srch_pending(id: u64) -> Self {
        Self::new(ZONE_SRCH, 0, TYPE_SRCH_PENDING, id, 0, 0)
    }
    /// Srch compaction that mount `rid` works on.
    pub const fn srch_busy(rid: u64, id: u64) -> Self {
        Self::new(ZONE_SRCH, 0, TYPE_SRCH_BUSY, rid, id, 0)
    }
    /// Free extent by its last block.
    pub const fn free_extent_blkno(last: u64, len: u64) -> Self {
        Self::new(ZONE_FREE_EXTENT_BLKNO, last, 0, len, 0, 0)
    }
    /// Free extent by its order, greatest first, then its last block.
    pub const fn free_extent_order(last: u64, len: u64) -> Self {
        let order = super::hash::free_extent_order(len);
        Self::new(ZONE_FREE_EXTENT_ORDER, u64::MAX - order, 0, last, len, 0)
    }
    /// Status of the running log merge.
    pub const fn log_merge_status() -> Self {
        Self::new(ZONE_LOG_MERGE_STATUS, 0, 0, 0, 0, 0)
    }
    /// A range still to be merged: its start with the zone replaced.
    pub const fn log_merge_range(start: Key) -> Self {
        Self {
            zone: ZONE_LOG_MERGE_RANGE,
            ..start
        }
    }
    /// A merge request given to mount `rid`.
    pub const fn log_merge_request(rid: u64, seq: u64) -> Self {
        Self::new(ZONE_LOG_MERGE_REQUEST, rid, 0, seq, 0, 0)
    }
    /// A finished merge request.
    pub const fn log_merge_complete(seq: u64) -> Self {
        Self::new(ZONE_LOG_MERGE_COMPLETE, seq, 0, 0, 0, 0)
    }
    /// A merged log tree whose blocks are being freed.
    pub const fn log_merge_freeing(seq: u64) -> Self {
        Self::new(ZONE_LOG_MERGE_FREEING, seq, 0, 0, 0, 0)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{}.{}.{}.{}.{}",
            self.zone, self.first, self.kind, self.second, self.third, self.fourth
        )
    }
}

impl From<Key> for DiskKey {
    fn from(k: Key) -> Self {
        Self {
            first: k.first.into(),
            second: k.second.into(),
            third: k.third.into(),
            fourth: k.fourth,
            zone: k.zone,
            kind: k.kind,
            pad: [0; 5],
        }
    }
}

impl From<DiskKey> for Key {
    fn from(k: DiskKey) -> Self {
        k.key()
    }
}

impl DiskKey {
    /// The native key; padding is ignored.
    pub const fn key(&self) -> Key {
        Key::new(
            self.zone,
            self.first.get(),
            self.kind,
            self.second.get(),
            self.third.get(),
            self.fourth,
        )
    }
}

impl KeyRange {
    /// Every key.
    pub const ALL: KeyRange = KeyRange {
        start: Key::ZEROS,
        end: Key::ONES,
    };

    /// The range `start..=end`.
    pub const fn new(start: Key, end: Key) -> Self {
        Self { start, end }
    }

    /// Whether `key` is in the range.
    pub fn contains(&self, key: &Key) -> bool {
        self.start <= *key && *key <= self.end
    }

    /// Compares ranges; overlapping ranges are equal (spec 01 section 4).
    pub fn compare(&self, other: &KeyRange) -> std::cmp::Ordering {
        if self.end < other.start {
            std::cmp::Ordering::Less
        } else if self.start > other.end {
            std::cmp::Ordering::Greater
        } else {
            std::cmp::Ordering::Equal
        }
    }

    /// Whether the ranges share a key.
    pub fn overlaps(&self, other: &KeyRange) -> bool {
        self.compare(other).is_eq()
    }

    /// The shared keys of both ranges, if any.
    pub fn intersect(&self, other: &KeyRange) -> Option<KeyRange> {
        self.overlaps(other).then(|| KeyRange {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        })
    }
}

impl fmt::Display for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} - {}", self.start, self.end)
    }
}

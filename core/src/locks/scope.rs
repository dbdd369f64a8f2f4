//! Lock names: the start key of a fixed range (spec 10 section 2).

use crate::format::{
    Key, KeyRange, TYPE_DATA_SEQ, TYPE_META_SEQ, TYPE_ORPHAN, TYPE_RENAME, ZONE_FS,
    ZONE_INODE_INDEX, ZONE_LOCK, ZONE_ORPHAN, ZONE_QUOTA, ZONE_XATTR_INDX, ZONE_XATTR_TOTL,
};

/// Inodes, or seqs, per lock.
const GROUP_MASK: u64 = 1023;

/// What a lock covers. Ranges of different scopes never overlap, and every node
/// MUST use exactly these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Nothing; serialises renames between directories.
    Rename,
    /// All FS-zone items of the 1024 inodes around this number.
    InodeGroup(u64),
    /// All quota rules.
    Quota,
    /// All orphan items.
    Orphans,
    /// All totals of xattrs.
    Totl,
    /// All xattr index items.
    Indx,
    /// `meta_seq` index items of the 1024 seqs around this one.
    MetaSeq(u64),
    /// `data_seq` index items of the 1024 seqs around this one.
    DataSeq(u64),
}

impl Scope {
    /// The same scope named by the first number of its group, so that equal
    /// locks compare equal.
    pub const fn normal(self) -> Scope {
        match self {
            Scope::InodeGroup(ino) => Scope::InodeGroup(ino & !GROUP_MASK),
            Scope::MetaSeq(seq) => Scope::MetaSeq(seq & !GROUP_MASK),
            Scope::DataSeq(seq) => Scope::DataSeq(seq & !GROUP_MASK),
            other => other,
        }
    }

    /// The keys covered; `start` is the lock's name on the wire.
    pub fn range(self) -> KeyRange {
        let key = |zone, kind, first, second| Key {
            zone,
            first,
            kind,
            second,
            third: 0,
            fourth: 0,
        };
        let whole = |zone| KeyRange {
            start: key(zone, 0, 0, 0),
            end: Key { zone, ..Key::ONES },
        };
        let index = |kind, seq: u64| KeyRange {
            start: key(ZONE_INODE_INDEX, kind, 0, seq & !GROUP_MASK),
            end: Key {
                third: u64::MAX,
                ..key(ZONE_INODE_INDEX, kind, 0, seq | GROUP_MASK)
            },
        };
        match self {
            Scope::InodeGroup(ino) => KeyRange {
                start: key(ZONE_FS, 0, ino & !GROUP_MASK, 0),
                end: Key {
                    zone: ZONE_FS,
                    first: ino | GROUP_MASK,
                    ..Key::ONES
                },
            },
            Scope::MetaSeq(seq) => index(TYPE_META_SEQ, seq),
            Scope::DataSeq(seq) => index(TYPE_DATA_SEQ, seq),
            Scope::Orphans => KeyRange {
                start: key(ZONE_ORPHAN, TYPE_ORPHAN, 0, 0),
                end: key(ZONE_ORPHAN, TYPE_ORPHAN, 0, u64::MAX),
            },
            Scope::Quota => whole(ZONE_QUOTA),
            Scope::Totl => whole(ZONE_XATTR_TOTL),
            Scope::Indx => whole(ZONE_XATTR_INDX),
            Scope::Rename => {
                let only = key(ZONE_LOCK, TYPE_RENAME, 0, 0);
                KeyRange {
                    start: only,
                    end: only,
                }
            }
        }
    }

    /// The scope whose lock covers `key`; `None` for keys that no lock covers.
    pub fn covering(key: &Key) -> Option<Scope> {
        Some(match (key.zone, key.kind) {
            (ZONE_FS, _) => Scope::InodeGroup(key.first).normal(),
            (ZONE_INODE_INDEX, TYPE_META_SEQ) => Scope::MetaSeq(key.second).normal(),
            (ZONE_INODE_INDEX, TYPE_DATA_SEQ) => Scope::DataSeq(key.second).normal(),
            (ZONE_ORPHAN, TYPE_ORPHAN) => Scope::Orphans,
            (ZONE_QUOTA, _) => Scope::Quota,
            (ZONE_XATTR_TOTL, _) => Scope::Totl,
            (ZONE_XATTR_INDX, _) => Scope::Indx,
            (ZONE_LOCK, TYPE_RENAME) => Scope::Rename,
            _ => return None,
        })
    }

    /// The scope named by a start key from the wire; `None` if the key is not
    /// the start of a lock's range.
    pub fn from_start(key: &Key) -> Option<Scope> {
        Scope::covering(key).filter(|scope| scope.range().start == *key)
    }
}

//! What a check found.

use crate::format::Key;
use serde::Serialize;
use std::collections::BTreeMap;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; a volume of the original may have it and works.
    Note,
    /// An invariant is broken.
    Error,
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A device can not be read.
    Device,
    /// Super block.
    Super,
    /// Quorum block or configuration.
    Quorum,
    /// A referenced block does not verify.
    Block,
    /// Structure inside a btree block.
    BtreeBlock,
    /// Structure of a tree: levels, key ranges.
    Tree,
    /// A block is owned twice.
    Census,
    /// A block is owned by nothing.
    Leak,
    /// An item whose key or value is not what its kind must be.
    Item,
    /// Allocator lists and extents.
    Alloc,
    /// Log trees items.
    LogTrees,
    /// Bloom blocks.
    Bloom,
    /// Log merge items.
    LogMerge,
    /// Srch files and compactions.
    Srch,
    /// Mounted clients.
    MountedClient,
    /// Inode items and what must agree with them.
    Inode,
    /// Directory entries and links.
    Dirent,
    /// Orphan items.
    Orphan,
    /// Seq indexes.
    Index,
    /// Xattrs.
    Xattr,
    /// Symlink targets.
    Symlink,
    /// File extents.
    Extent,
    /// Totals over xattrs.
    Totl,
    /// Index over xattrs.
    Indx,
    /// Quota rules.
    Quota,
    /// Counters of the whole volume.
    Count,
    /// AVL heights as the original's mkfs writes them.
    MkfsHeight,
    /// An inode that a failed create of the original left behind.
    LeakedInode,
    /// Bytes that the original leaves undefined.
    Undefined,
    /// Legal, but rare enough to look at.
    Suspicious,
}

impl Kind {
    /// Whether a note of this kind is an error where only this implementation
    /// wrote the volume.
    fn strict(self) -> bool {
        self != Self::Suspicious
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub kind: Kind,
    /// The block it was found in, in units of that kind of block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block: Option<u64>,
    /// The item it was found in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// What should be there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// What is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// A sentence.
    pub text: String,
}

impl Problem {
    /// An error.
    pub fn error(kind: Kind, text: impl Into<String>) -> Self {
        Self::new(Severity::Error, kind, text)
    }

    /// A note.
    pub fn note(kind: Kind, text: impl Into<String>) -> Self {
        Self::new(Severity::Note, kind, text)
    }

    fn new(severity: Severity, kind: Kind, text: impl Into<String>) -> Self {
        Self {
            severity,
            kind,
            block: None,
            key: None,
            expected: None,
            found: None,
            text: text.into(),
        }
    }

    /// Names the block.
    #[must_use]
    pub fn at(mut self, blkno: u64) -> Self {
        self.block = Some(blkno);
        self
    }

    /// Names the item.
    #[must_use]
    pub fn key(mut self, key: Key) -> Self {
        self.key = Some(key.to_string());
        self
    }

    /// Says what was expected and what was found.
    #[must_use]
    pub fn want(mut self, expected: impl ToString, found: impl ToString) -> Self {
        self.expected = Some(expected.to_string());
        self.found = Some(found.to_string());
        self
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}", self.text)?;
        if let Some(block) = self.block {
            write!(f, " [block {block}]")?;
        }
        if let Some(key) = &self.key {
            write!(f, " [key {key}]")?;
        }
        if let (Some(expected), Some(found)) = (&self.expected, &self.found) {
            write!(f, " (expected {expected}, found {found})")?;
        }
        Ok(())
    }
}

/// How the volume was left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The super block could not be read: nothing was checked.
    #[default]
    Unreadable,
    /// No mount is recorded.
    Unmounted,
    /// Mounts are recorded: it is mounted, or was when its hosts crashed.
    InUse,
}

/// Sizes of what was checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Large metadata blocks read and verified.
    pub blocks_read: u64,
    /// Large blocks referenced by something.
    pub meta_referenced: u64,
    /// Large blocks that are free.
    pub meta_free: u64,
    /// Large blocks that nothing owns.
    pub meta_leaked: u64,
    /// Data blocks mapped by files.
    pub data_mapped: u64,
    /// Data blocks that are free.
    pub data_free: u64,
    /// Data blocks that nothing owns.
    pub data_leaked: u64,
    /// Leaf blocks without items; legal after merges.
    pub empty_leaves: u64,
    /// Log trees.
    pub log_trees: u64,
    /// Items of the merged view.
    pub items: u64,
    /// Inodes of the merged view.
    pub inodes: u64,
    /// Inodes of the merged view with no links.
    pub orphans: u64,
    /// Directory entries of the merged view.
    pub entries: u64,
    /// Xattrs of the merged view.
    pub xattrs: u64,
    /// File extents of the merged view.
    pub extents: u64,
}

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// How the volume was left.
    pub state: State,
    /// Number of errors, those not listed included.
    pub errors: u64,
    /// Number of notes, those not listed included.
    pub notes: u64,
    /// Findings in the order they were made; at most a number of each kind.
    pub problems: Vec<Problem>,
    /// Sizes.
    pub stats: Stats,
    #[serde(skip)]
    listed: BTreeMap<(Severity, Kind), usize>,
    #[serde(skip)]
    limit: usize,
    #[serde(skip)]
    strict: bool,
}

impl Report {
    pub(super) fn new(strict: bool, limit: usize) -> Self {
        Self {
            strict,
            limit,
            ..Self::default()
        }
    }

    /// Whether no invariant is broken and everything was checked.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.state != State::Unreadable
    }

    /// Adds a finding.
    pub(super) fn add(&mut self, mut problem: Problem) {
        if self.strict && problem.kind.strict() {
            problem.severity = Severity::Error;
        }
        match problem.severity {
            Severity::Error => self.errors += 1,
            Severity::Note => self.notes += 1,
        }
        let listed = self
            .listed
            .entry((problem.severity, problem.kind))
            .or_default();
        *listed += 1;
        if *listed <= self.limit {
            self.problems.push(problem);
        }
    }
}

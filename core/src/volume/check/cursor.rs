//! Reading for a check: every block is bounded, verified and claimed once, so
//! that no damage leads astray or in circles.

use super::block::{ItemAt, parse_btree_block};
use super::census::{Census, Claim};
use super::memo::Memo;
use super::report::{Kind, Problem, Report};
use crate::env::{AlignedBuf, BlockDevice};
use crate::format::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Told how far a check has come: blocks accounted for so far, and all blocks.
pub type Progress = Rc<dyn Fn(u64, u64)>;

/// What all parts of a check share.
pub(super) struct Ctx {
    pub meta: Rc<dyn BlockDevice>,
    pub fsid: u64,
    pub sb: SuperBlock,
    pub report: RefCell<Report>,
    /// Large blocks that something refers to.
    pub referenced: RefCell<Census>,
    /// Large blocks that are free.
    pub free: RefCell<Census>,
    /// Large blocks that are freed by unfinished work and may still be referenced.
    pub pending: RefCell<Census>,
    /// Data blocks mapped by files.
    pub data_mapped: RefCell<Census>,
    /// Data blocks that are free.
    pub data_free: RefCell<Census>,
    /// Items of the filesystem could not be read: what should agree with them is unknown.
    pub fs_damaged: Cell<bool>,
    /// Something could not be read: what it owned looks leaked.
    pub damaged: Cell<bool>,
    pub progress: Option<Progress>,
    pub memo: Option<Rc<Memo>>,
    /// A buffer for the next block.
    pub spare: Cell<Option<AlignedBuf>>,
}

/// What a check needs of a block of some kind: a function of the block's bytes alone.
pub(super) trait Parse: 'static {
    const MAGIC: Magic;
    /// Takes apart a block that was verified.
    fn parse(block: &[u8]) -> Self;
}

impl Ctx {
    pub fn add(&self, problem: Problem) {
        self.report.borrow_mut().add(problem);
    }

    pub fn fmt_vers(&self) -> u64 {
        self.sb.fmt_vers.get()
    }

    /// Checks a seq against the super block's.
    pub fn check_seq(&self, what: impl std::fmt::Display, key: Key, seq: u64) {
        if seq > self.sb.seq.get() {
            self.add(
                Problem::error(
                    Kind::Count,
                    format!("{what} has a seq above the super block's"),
                )
                .key(key)
                .want(format!("at most {}", self.sb.seq.get()), seq),
            );
        }
    }

    /// Claims a referenced block; false if it must not be followed.
    pub fn claim(&self, blkno: u64, what: &str) -> bool {
        let total = self.sb.total_meta_blocks.get();
        if blkno < META_DEV_START_BLKNO || blkno >= total {
            self.add(
                Problem::error(
                    Kind::Block,
                    format!("{what} refers outside of the metadata device"),
                )
                .at(blkno)
                .want(format!("2 to {}", total.saturating_sub(1)), blkno),
            );
            return false;
        }
        if !self.referenced.borrow_mut().insert(blkno) {
            self.add(
                Problem::error(
                    Kind::Census,
                    format!("{what} refers to a block that is in use elsewhere"),
                )
                .at(blkno),
            );
            return false;
        }
        if let Some(progress) = &self.progress {
            let done = self.referenced.borrow().count() + self.free.borrow().count();
            progress(done, total);
        }
        true
    }

    /// Claims a free metadata extent.
    pub fn claim_free(&self, start: u64, len: u64, what: &str) {
        if start < META_DEV_START_BLKNO {
            let text = format!("{what} holds a block that is never free");
            self.add(Problem::error(Kind::Census, text).at(start));
            return;
        }
        let claimed = self.free.borrow_mut().insert_range(start, len);
        self.report_claim(claimed, "metadata", start, len, what);
    }

    /// Claims a free data extent.
    pub fn claim_data_free(&self, start: u64, len: u64, what: &str) {
        if start < DATA_DEV_START_BLKNO {
            let text = format!("{what} holds a data block that is never free");
            self.add(Problem::error(Kind::Census, text).at(start));
            return;
        }
        let claimed = self.data_free.borrow_mut().insert_range(start, len);
        self.report_claim(claimed, "data", start, len, what);
    }

    fn report_claim(
        &self,
        claimed: Result<(), Claim>,
        dev: &str,
        start: u64,
        len: u64,
        what: &str,
    ) {
        let problem = match claimed {
            Ok(()) => return,
            Err(Claim::Outside) => {
                let text = format!("{what} holds {len} blocks outside of the {dev} device");
                Problem::error(Kind::Alloc, text).at(start)
            }
            Err(Claim::Twice(block)) => {
                let text = format!("{what} holds a {dev} block that is free elsewhere too");
                Problem::error(Kind::Census, text).at(block)
            }
        };
        self.add(problem);
    }

    /// Reads and verifies a claimed block, or remembers it.
    pub async fn read<T: Parse>(&self, r: &BlockRef, what: &str) -> Option<Rc<T>> {
        let blkno = r.blkno.get();
        let offset = blkno << LG_BLOCK_SHIFT;
        if let Some(known) = self.memo.as_ref().and_then(|memo| memo.find(offset, r)) {
            self.report.borrow_mut().stats.blocks_read += 1;
            return Some(known);
        }
        let damaged = |text: String| {
            self.damaged.set(true);
            self.add(Problem::error(Kind::Block, text).at(blkno));
        };
        let buf = self.spare.take();
        let buf = buf.unwrap_or_else(|| AlignedBuf::zeroed(LG_BLOCK_SIZE));
        let (buf, result) = self.meta.read(offset, buf).await;
        if let Err(e) = result {
            damaged(format!("{what}: {e}"));
            return None;
        }
        self.report.borrow_mut().stats.blocks_read += 1;
        if let Err(e) = verify_ref(&buf, T::MAGIC, self.fsid, r) {
            damaged(format!("{what}: {e}"));
            return None;
        }
        let contents = Rc::new(T::parse(&buf));
        self.spare.set(Some(buf));
        if let Some(memo) = &self.memo {
            memo.keep(offset, LG_BLOCK_SIZE, r, contents.clone());
        }
        Some(contents)
    }
}

/// A btree block: its items in key order, with the bytes of their values only.
struct Node {
    level: u8,
    items: Vec<ItemAt>,
    /// All values; `val_off` of the items is where each begins.
    values: Vec<u8>,
    problems: Vec<Problem>,
}

impl Parse for Node {
    const MAGIC: Magic = Magic::Btree;

    fn parse(block: &[u8]) -> Self {
        let mut parsed = parse_btree_block(block);
        let total = parsed.items.iter().map(|item| item.val_len).sum();
        let mut values = Vec::with_capacity(total);
        for item in &mut parsed.items {
            let value = &block[item.val_off..item.val_off + item.val_len];
            item.val_off = values.len();
            values.extend_from_slice(value);
        }
        Self {
            level: parsed.level,
            items: parsed.items,
            values,
            problems: parsed.problems,
        }
    }
}

/// An item read by a cursor.
#[derive(Clone)]
pub(super) struct Item {
    pub key: Key,
    pub seq: u64,
    pub flags: u8,
    pub blkno: u64,
    node: Rc<Node>,
    off: usize,
    len: usize,
}

impl Item {
    pub fn value(&self) -> &[u8] {
        &self.node.values[self.off..self.off + self.len]
    }

    pub fn is_deletion(&self) -> bool {
        self.flags & ITEM_FLAG_DELETION != 0
    }
}

/// How a tree is walked.
#[derive(Clone, Debug, Default)]
pub(super) struct TreeSpec {
    /// Name in findings.
    pub name: String,
    /// Blocks claimed before are shared with an older version: skip them quietly.
    pub shared: bool,
    /// The root is a subtree: the end of its key range is not known.
    pub subtree: bool,
    /// Blocks of keys before this one are gone.
    pub from: Option<Key>,
    /// The tree holds items of the filesystem.
    pub fs: bool,
}

struct Level {
    node: Rc<Node>,
    blkno: u64,
    pos: usize,
    start: Key,
}

/// Walks a tree in key order and gives its items; claims and verifies each block
/// on the way and skips what is damaged.
pub(super) struct Cursor {
    ctx: Rc<Ctx>,
    spec: TreeSpec,
    stack: Vec<Level>,
    pending_root: Option<(BlockRef, u8)>,
}

impl Cursor {
    pub fn new(ctx: &Rc<Ctx>, root: &BtreeRoot, spec: TreeSpec) -> Self {
        let bad_root = |text: &str| {
            ctx.damaged.set(true);
            let text = format!("{}: {text}", spec.name);
            let found = format!("height {} block {}", root.height, root.block_ref);
            ctx.add(Problem::error(Kind::Tree, text).want("a sound root", found));
            ctx.fs_damaged.set(ctx.fs_damaged.get() || spec.fs);
            None
        };
        let pending_root = if (root.height == 0) != root.block_ref.is_null() {
            bad_root("the root has a height without a block, or a block without a height")
        } else if root.height > BTREE_MAX_HEIGHT {
            bad_root("the tree is higher than 20")
        } else if root.height == 0 {
            None
        } else {
            Some((root.block_ref, root.height - 1))
        };
        Self {
            ctx: ctx.clone(),
            spec,
            stack: Vec::new(),
            pending_root,
        }
    }

    /// The tree's name in findings.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The next item in key order.
    pub async fn next(&mut self) -> Option<Item> {
        if let Some((root, level)) = self.pending_root.take() {
            let end = (!self.spec.subtree).then_some(Key::ONES);
            self.push(root, level, Key::ZEROS, end).await;
        }
        while let Some(top) = self.stack.last_mut() {
            let node = &top.node;
            let Some(item) = node.items.get(top.pos).copied() else {
                self.stack.pop();
                continue;
            };
            let at = top.pos;
            top.pos += 1;
            if node.level == 0 {
                return Some(Item {
                    key: item.key,
                    seq: item.seq,
                    flags: item.flags,
                    blkno: top.blkno,
                    node: Rc::clone(node),
                    off: item.val_off,
                    len: item.val_len,
                });
            }
            let previous = at.checked_sub(1).map(|pos| node.items[pos].key.inc());
            let start = previous.unwrap_or(top.start);
            if self.spec.from.is_some_and(|from| item.key < from) {
                continue;
            }
            let value = &node.values[item.val_off..item.val_off + item.val_len];
            let (Ok(child), level) = (value_exact::<BlockRef>("reference", value), node.level - 1)
            else {
                self.damage();
                continue;
            };
            self.push(child, level, start, Some(item.key)).await;
        }
        None
    }

    /// Reads the rest of the tree for its blocks only.
    pub async fn drain(mut self) {
        while self.next().await.is_some() {}
    }

    fn damage(&self) {
        self.ctx.damaged.set(true);
        if self.spec.fs {
            self.ctx.fs_damaged.set(true);
        }
    }

    async fn push(&mut self, r: BlockRef, level: u8, start: Key, end: Option<Key>) {
        let blkno = r.blkno.get();
        if self.spec.shared && self.ctx.referenced.borrow().contains(blkno) {
            return;
        }
        let node = match self.ctx.claim(blkno, &self.spec.name) {
            true => self.ctx.read::<Node>(&r, &self.spec.name).await,
            false => None,
        };
        let Some(node) = node else {
            self.damage();
            return;
        };
        for problem in &node.problems {
            self.ctx.add(problem.clone().at(blkno));
        }
        if node.level != level {
            let text = format!("{}: wrong level of a block", self.spec.name);
            self.ctx.add(
                Problem::error(Kind::Tree, text)
                    .at(blkno)
                    .want(level, node.level),
            );
            self.damage();
            return;
        }
        self.check_range(blkno, level, &node.items, start, end);
        if node.items.is_empty() {
            self.empty(blkno, level);
        }
        self.stack.push(Level {
            node,
            blkno,
            pos: 0,
            start,
        });
    }

    fn empty(&self, blkno: u64, level: u8) {
        if level == 0 {
            self.ctx.report.borrow_mut().stats.empty_leaves += 1;
            return;
        }
        let text = format!("{}: a parent block without items", self.spec.name);
        self.ctx.add(Problem::error(Kind::Tree, text).at(blkno));
        self.damage();
    }

    /// Keys must lie in the range the parents give; a parent's last key ends it.
    fn check_range(&self, blkno: u64, level: u8, items: &[ItemAt], start: Key, end: Option<Key>) {
        let (Some(first), Some(last)) = (items.first(), items.last()) else {
            return;
        };
        let bad = |text: &str, expected: String, found: Key| {
            let text = format!("{}: {text}", self.spec.name);
            let problem = Problem::error(Kind::Tree, text).at(blkno);
            self.ctx.add(problem.key(found).want(expected, found));
        };
        if first.key < start {
            bad(
                "a key before its block's range",
                format!("from {start}"),
                first.key,
            );
        }
        if let Some(end) = end {
            if last.key > end {
                bad(
                    "a key after its block's range",
                    format!("up to {end}"),
                    last.key,
                );
            } else if level > 0 && last.key != end {
                bad(
                    "the last key of a parent is not its range's end",
                    end.to_string(),
                    last.key,
                );
            }
        }
        if level > 0
            && let Some(item) = items.iter().find(|i| i.seq != 0 || i.flags != 0)
        {
            bad(
                "a parent item has a seq or flags",
                "seq 0 flags 0".into(),
                item.key,
            );
        }
    }
}

//! Walking from the root to a leaf, with and without changing the tree
//! (spec 02 sections 10 to 13).
//!
//! A changing walk makes the path dirty from the top, splits full blocks and
//! joins thin ones as it comes by, and starts again from the root after each
//! such change. So a parent always has room for one more child, and a child
//! that is joined has a sibling.

use super::layout::{self, Direction, NONE, NewItem, REF_LEN};
use super::{BtreeError, avl, verify_block};
use crate::block::{Block, BlockError, Cache, Corruption, Tx};
use crate::env::{mutant, probe};
use crate::format::{BTREE_MAX_HEIGHT, BlockRef, BtreeRoot, Key, Magic};
use std::rc::Rc;
use zerocopy::IntoBytes;

/// The keys that a block covers, and where to go on beside it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Covered {
    /// First key of the block.
    pub(super) start: Key,
    /// Last key of the block.
    pub(super) end: Key,
    /// A key in the leaf before this one.
    pub(super) before: Option<Key>,
    /// A key in the leaf after this one.
    pub(super) after: Option<Key>,
}

impl Covered {
    const ALL: Self = Self {
        start: Key::ZEROS,
        end: Key::ONES,
        before: None,
        after: None,
    };

    /// Narrows to the child item at `off` of parent `b`.
    fn descend(&mut self, b: &[u8], off: usize) {
        let prev = avl::prev(b, off);
        if prev != NONE {
            let key = layout::key(b, prev);
            self.start = key.inc();
            self.before = Some(key);
        }
        self.end = layout::key(b, off);
        if avl::next(b, off) != NONE {
            self.after = Some(self.end.inc());
        }
    }
}

/// Reads and validates a btree block of the expected level.
pub(super) async fn read_block(
    cache: &Cache,
    block_ref: &BlockRef,
    level: u8,
) -> Result<Rc<Block>, BtreeError> {
    let block = cache.read_ref(block_ref, Magic::Btree).await?;
    block.check_once(|bytes| verify_block(bytes, layout::head(bytes).level))?;
    let found = layout::head(block.bytes()).level;
    if found != level {
        return Err(corrupt(
            block_ref,
            format!("level {found}, expected {level}"),
        ));
    }
    Ok(block)
}

/// Whether a block lies where its parent says. Without that, moving items between
/// siblings would make items twice; and parents that are reached by more ways than one
/// would make walks of exponential length.
fn check_place(b: &[u8], block_ref: &BlockRef, covered: &Covered) -> Result<(), BtreeError> {
    let (first, last) = (avl::first(b), avl::last(b));
    if first == NONE {
        return Ok(());
    }
    let (first, last) = (layout::key(b, first), layout::key(b, last));
    if first < covered.start || last > covered.end {
        let (start, end) = (covered.start, covered.end);
        let what = format!("its items {first} to {last} are outside of {start} to {end}");
        return Err(corrupt(block_ref, what));
    }
    check_end(b, block_ref, covered)
}

/// The part of [`check_place`] that reads need: the last key of a parent that is not
/// the root is the key of its own item above.
fn check_end(b: &[u8], block_ref: &BlockRef, covered: &Covered) -> Result<(), BtreeError> {
    if layout::is_leaf(b) {
        return Ok(());
    }
    match avl::last(b) {
        NONE => Err(corrupt(block_ref, "a parent without children".into())),
        off if layout::key(b, off) == covered.end => Ok(()),
        off => {
            let (last, end) = (layout::key(b, off), covered.end);
            let what = format!("its last key is {last}, its parent says {end}");
            Err(corrupt(block_ref, what))
        }
    }
}

pub(super) fn corrupt(block_ref: &BlockRef, what: String) -> BtreeError {
    BtreeError::Block(BlockError::Corrupt(Corruption {
        blkno: block_ref.blkno.get(),
        what,
    }))
}

/// Checks a root: the height is one of the format, and null exactly for empty trees.
///
/// # Errors
/// `BadRoot` names what it says.
pub fn check_root(root: &BtreeRoot) -> Result<(), BtreeError> {
    let empty = root.height == 0;
    if root.height > BTREE_MAX_HEIGHT || empty != root.block_ref.is_null() {
        return Err(BtreeError::BadRoot {
            block_ref: root.block_ref,
            height: root.height,
        });
    }
    Ok(())
}

/// The child item of a parent for `key`.
pub(super) fn find_child(b: &[u8], block_ref: &BlockRef, key: &Key) -> Result<usize, BtreeError> {
    match avl::at_or_after(b, key) {
        NONE => Err(corrupt(block_ref, format!("it has no child for key {key}"))),
        off => Ok(off),
    }
}

/// The leaf (or block of `stop_level`) that covers `key`; `None` in an empty tree.
pub(super) async fn walk_read(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
    stop_level: u8,
) -> Result<Option<(BlockRef, Rc<Block>, Covered)>, BtreeError> {
    check_root(root)?;
    if root.height <= stop_level {
        return Ok(None);
    }
    let mut covered = Covered::ALL;
    let mut block_ref = root.block_ref;
    let mut level = root.height - 1;
    loop {
        let block = read_block(cache, &block_ref, level).await?;
        if level == stop_level {
            return Ok(Some((block_ref, block, covered)));
        }
        if level + 1 < root.height {
            check_end(block.bytes(), &block_ref, &covered)?;
        }
        let off = find_child(block.bytes(), &block_ref, key)?;
        covered.descend(block.bytes(), off);
        block_ref = layout::child_ref(block.bytes(), off);
        level -= 1;
    }
}

/// What a changing walk is for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Intent {
    /// Make room for a value of this length.
    pub(super) insert: Option<usize>,
    /// Refill thin blocks.
    pub(super) delete: bool,
    /// The root is a level-1 block of a higher tree: leave it one.
    pub(super) subtree: bool,
}

/// A dirty leaf.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirtyLeaf {
    pub(super) blkno: u64,
    pub(super) covered: Covered,
    /// Whether the leaf is the root.
    pub(super) is_root: bool,
}

/// Result of a changing walk.
#[derive(Clone, Copy, Debug)]
pub(super) enum Walked {
    Leaf(DirtyLeaf),
    /// The tree has no blocks.
    Empty,
    /// The subtree's root is too thin or too full to be changed by itself (ERANGE).
    SubtreeLimit,
}

/// The parent that a walk came through: a dirty block and the child's slot.
#[derive(Clone, Copy)]
struct Parent {
    blkno: u64,
    off: usize,
    level: u8,
    /// The keys of the parent itself.
    covered: Covered,
}

impl Parent {
    /// The keys of the child at slot `off`.
    fn child(&self, tx: &Tx, off: usize) -> Covered {
        let mut covered = self.covered;
        tx.view(self.blkno, |b| covered.descend(b, off));
        covered
    }
}

/// Bytes below which a block is refilled: a quarter.
pub(super) fn low_mark(tx: &Tx) -> usize {
    usize::from(tx.policy().btree_space) / 4
}

fn space(tx: &Tx) -> usize {
    usize::from(tx.policy().btree_space)
}

/// Whether `leaf` has room for a value of `len`.
pub(super) fn leaf_has_room(tx: &Tx, b: &[u8], len: usize) -> bool {
    layout::has_room(b, len, space(tx))
}

/// Allocates a dirty btree block of `level` without items.
async fn new_block(tx: &Tx, level: u8) -> Result<BlockRef, BtreeError> {
    let mut block_ref = BlockRef::default();
    tx.dirty_ref(&mut block_ref, Magic::Btree).await?;
    tx.edit(block_ref.blkno.get(), |b| layout::init_block(b, level));
    Ok(block_ref)
}

/// Makes the path to the leaf for `key` dirty. An empty tree gets a leaf if the
/// walk is to insert.
pub(super) async fn walk_dirty(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    intent: Intent,
) -> Result<Walked, BtreeError> {
    check_root(root)?;
    if root.height == 0 {
        if intent.insert.is_none() {
            return Ok(Walked::Empty);
        }
        *root = BtreeRoot::new(new_block(tx, 0).await?, 1);
    }
    loop {
        if let Some(done) = descend_dirty(tx, root, key, intent).await? {
            return Ok(done);
        }
    }
}

/// One descent; `None` if the tree was split or joined on the way.
async fn descend_dirty(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    intent: Intent,
) -> Result<Option<Walked>, BtreeError> {
    let mut covered = Covered::ALL;
    let mut parent: Option<Parent> = None;
    let mut block_ref = root.block_ref;
    let mut level = root.height - 1;
    loop {
        dirty_child(tx, root, parent, &mut block_ref, level).await?;
        let blkno = block_ref.blkno.get();
        if intent.subtree && level == 1 && subtree_limit(tx, blkno) {
            return Ok(Some(Walked::SubtreeLimit));
        }
        if let Some(len) = intent.insert.or(intent.delete.then_some(0)) {
            let need = if level == 0 { len } else { REF_LEN };
            if try_split(tx, root, parent, block_ref, level, need).await? {
                return Ok(None);
            }
        }
        if intent.delete
            && let Some(parent) = parent
            && try_join(tx, root, parent, block_ref, level).await?
        {
            return Ok(None);
        }
        if level == 0 {
            return Ok(Some(Walked::Leaf(DirtyLeaf {
                blkno,
                covered,
                is_root: parent.is_none(),
            })));
        }
        let above = covered;
        let (off, child) = tx.view(blkno, |b| {
            let off = find_child(b, &block_ref, key)?;
            covered.descend(b, off);
            Ok::<_, BtreeError>((off, layout::child_ref(b, off)))
        })?;
        parent = Some(Parent {
            blkno,
            off,
            level,
            covered: above,
        });
        block_ref = child;
        level -= 1;
    }
}

/// Makes one block of the path dirty and stores its new reference above it.
async fn dirty_child(
    tx: &Tx,
    root: &mut BtreeRoot,
    parent: Option<Parent>,
    block_ref: &mut BlockRef,
    level: u8,
) -> Result<(), BtreeError> {
    let block = read_block(tx.cache(), block_ref, level).await?;
    if let Some(above) = parent {
        check_place(block.bytes(), block_ref, &above.child(tx, above.off))?;
    }
    let old = *block_ref;
    tx.dirty_from(block_ref, &block, Magic::Btree).await?;
    drop(block);
    if old != *block_ref {
        match parent {
            None => root.block_ref = *block_ref,
            Some(above) => tx.edit(above.blkno, |b| {
                layout::set_child_ref(b, above.off, block_ref);
            }),
        }
    }
    Ok(())
}

fn subtree_limit(tx: &Tx, blkno: u64) -> bool {
    let limit = tx.view(blkno, |b| {
        layout::total_bytes(b) < low_mark(tx) || !layout::has_room(b, REF_LEN, space(tx))
    });
    if limit {
        probe("merge_subtree_limit");
    }
    limit
}

/// Gives a block room for a value of `need` bytes: compacts it, or splits it and
/// returns true (spec 02 section 12).
async fn try_split(
    tx: &Tx,
    root: &mut BtreeRoot,
    parent: Option<Parent>,
    block_ref: BlockRef,
    level: u8,
    need: usize,
) -> Result<bool, BtreeError> {
    let right = block_ref.blkno.get();
    let (has_room, total) = tx.view(right, |b| {
        (layout::has_room(b, need, space(tx)), layout::total_bytes(b))
    });
    if has_room {
        return Ok(false);
    }
    if total * 100 / space(tx) < 80 {
        tx.edit(right, layout::compact);
        return Ok(false);
    }
    if parent.is_none() && root.height >= BTREE_MAX_HEIGHT {
        return Err(corrupt(
            &block_ref,
            "a tree of the greatest height is full".into(),
        ));
    }
    let left_ref = new_block(tx, level).await?;
    let left = left_ref.blkno.get();
    let above = match parent {
        Some(above) => above.blkno,
        None => match grow_root(tx, root, block_ref).await {
            Ok(blkno) => blkno,
            Err(err) => {
                probe("split_root_failed");
                tx.free_block(left).await?;
                return Err(err);
            }
        },
    };
    tx.edit2(left, right, |dst, src| {
        layout::move_items(dst, src, Direction::Left, total / 2);
    });
    let greatest = tx.view(left, |b| layout::key(b, avl::last(b)));
    tx.edit(above, |b| create_child(b, greatest, &left_ref));
    Ok(true)
}

/// Puts a new root over the old one.
async fn grow_root(tx: &Tx, root: &mut BtreeRoot, old: BlockRef) -> Result<u64, BtreeError> {
    let top = new_block(tx, root.height).await?;
    tx.edit(top.blkno.get(), |b| create_child(b, Key::ONES, &old));
    *root = BtreeRoot::new(top, root.height + 1);
    Ok(top.blkno.get())
}

fn create_child(b: &mut [u8], key: Key, child: &BlockRef) {
    let new = NewItem {
        key,
        seq: 0,
        flags: 0,
        value: child.as_bytes(),
    };
    layout::create_item(b, new);
}

/// Refills a thin block from a sibling; true if the tree changed (spec 02 section 13).
async fn try_join(
    tx: &Tx,
    root: &mut BtreeRoot,
    parent: Parent,
    block_ref: BlockRef,
    level: u8,
) -> Result<bool, BtreeError> {
    let low = low_mark(tx);
    let blkno = block_ref.blkno.get();
    if tx.view(blkno, layout::total_bytes) >= low {
        return Ok(false);
    }
    let (prev, next) = tx.view(parent.blkno, |b| {
        (avl::prev(b, parent.off), avl::next(b, parent.off))
    });
    let (sib_off, direction) = match (prev, next) {
        (NONE, NONE) => return Ok(false),
        (NONE, next) => (next, Direction::Left),
        (prev, _) => (prev, Direction::Right),
    };
    let mut sib_ref = tx.view(parent.blkno, |b| layout::child_ref(b, sib_off));
    let sib_parent = Parent {
        off: sib_off,
        ..parent
    };
    dirty_child(tx, root, Some(sib_parent), &mut sib_ref, level).await?;
    let sib = sib_ref.blkno.get();
    let sib_total = tx.view(sib, layout::total_bytes);
    let to_move = if sib_total <= 2 * low { sib_total } else { low };
    // An empty sibling is freed and the block may move up: have the list entries
    // for both before anything changes.
    if tx.remaining().freed < 2 {
        return Err(BlockError::FreedFull.into());
    }
    tx.edit2(blkno, sib, |b, sib| {
        if layout::mid_free(b) < to_move + layout::MAX_ITEM_BYTES {
            layout::compact(b);
        }
        layout::move_items(b, sib, direction, to_move);
    });
    let sib_empty = tx.view(sib, layout::nr_items) == 0;
    let keys = JoinKeys {
        own: tx.view(blkno, last_key),
        sibling: tx.view(sib, last_key),
    };
    probe("btree.join");
    tx.edit(parent.blkno, |b| {
        fix_parent_keys(b, parent.off, sib_off, direction, sib_empty, keys);
    });
    if sib_empty {
        tx.free_block(sib).await?;
    }
    let is_root = parent.level + 1 == root.height;
    if is_root && tx.view(parent.blkno, layout::nr_items) == 1 {
        *root = BtreeRoot::new(block_ref, root.height - 1);
        tx.free_block(parent.blkno).await?;
    }
    Ok(true)
}

/// The greatest keys of joined blocks, `None` for empty ones.
struct JoinKeys {
    own: Option<Key>,
    sibling: Option<Key>,
}

fn last_key(b: &[u8]) -> Option<Key> {
    // Mutant: breaks spec 02 section 13 step 7, as the original once did: the
    // last array slot is not the greatest item.
    if mutant("join_wrong_parent_key") && layout::nr_items(b) > 0 {
        return Some(layout::key(b, layout::slot(layout::nr_items(b) - 1)));
    }
    match avl::last(b) {
        NONE => None,
        off => Some(layout::key(b, off)),
    }
}

/// Updates the parent after a join. No key is ever taken from an empty block:
/// the block that takes over an empty right sibling takes over its key too.
fn fix_parent_keys(
    b: &mut [u8],
    own_off: usize,
    sib_off: usize,
    direction: Direction,
    sib_empty: bool,
    keys: JoinKeys,
) {
    match (direction, sib_empty) {
        (Direction::Left, true) => {
            if keys.own.is_none() {
                probe("join_of_two_empty_blocks");
            }
            let end = layout::key(b, sib_off);
            let own = layout::child_ref(b, own_off);
            // The sibling's item stays, with our reference: its slot may move.
            layout::set_child_ref(b, sib_off, &own);
            debug_assert!(layout::key(b, sib_off) == end);
            layout::delete_item(b, own_off);
        }
        (Direction::Left, false) => {
            let key = keys.own.expect("items were moved to this block");
            layout::set_parent_key(b, own_off, key);
        }
        (Direction::Right, true) => {
            if keys.own.is_none() {
                probe("join_of_two_empty_blocks");
            }
            layout::delete_item(b, sib_off);
        }
        (Direction::Right, false) => {
            let key = keys.sibling.expect("the sibling still has items");
            layout::set_parent_key(b, sib_off, key);
        }
    }
}

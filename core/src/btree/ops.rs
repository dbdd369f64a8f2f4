//! Operations on one item (spec 02 section 14).

use super::layout::{self, NONE, NewItem};
use super::walk::{DirtyLeaf, Intent, Walked, walk_dirty, walk_read};
use super::{BtreeError, Item, avl, hash};
use crate::block::{Cache, Tx};
use crate::format::{BtreeRoot, Key, MAX_ITEM_VALUE};
use bytes::Bytes;

fn to_item(b: &[u8], off: usize) -> Item {
    let it = layout::item_ref(b, off);
    Item {
        key: it.key,
        seq: it.seq,
        flags: it.flags,
        value: Bytes::copy_from_slice(it.value),
    }
}

/// The item with `key` (spec 02 section 14).
///
/// # Errors
/// Read errors; stale roots.
pub async fn lookup(
    cache: &Cache,
    root: &BtreeRoot,
    key: &Key,
) -> Result<Option<Item>, BtreeError> {
    let Some((_, block, _)) = walk_read(cache, root, key, 0).await? else {
        return Ok(None);
    };
    Ok(match hash::search(block.bytes(), key) {
        NONE => None,
        off => Some(to_item(block.bytes(), off)),
    })
}

/// The first item at or after `key`.
///
/// # Errors
/// As [`lookup`].
pub async fn next(cache: &Cache, root: &BtreeRoot, key: &Key) -> Result<Option<Item>, BtreeError> {
    let mut walk_key = *key;
    loop {
        let Some((_, block, covered)) = walk_read(cache, root, &walk_key, 0).await? else {
            return Ok(None);
        };
        let off = avl::at_or_after(block.bytes(), key);
        if off != NONE {
            return Ok(Some(to_item(block.bytes(), off)));
        }
        match covered.after {
            Some(after) => walk_key = after,
            None => return Ok(None),
        }
    }
}

/// The last item at or before `key`.
///
/// # Errors
/// As [`lookup`].
pub async fn prev(cache: &Cache, root: &BtreeRoot, key: &Key) -> Result<Option<Item>, BtreeError> {
    let mut walk_key = *key;
    loop {
        let Some((_, block, covered)) = walk_read(cache, root, &walk_key, 0).await? else {
            return Ok(None);
        };
        let off = avl::at_or_before(block.bytes(), key);
        if off != NONE {
            return Ok(Some(to_item(block.bytes(), off)));
        }
        match covered.before {
            Some(before) => walk_key = before,
            None => return Ok(None),
        }
    }
}

pub(super) fn check_len(key: &Key, len: usize) -> Result<(), BtreeError> {
    if len > MAX_ITEM_VALUE {
        return Err(BtreeError::ValueLength { key: *key, len });
    }
    Ok(())
}

/// A walk that ends in a leaf; `None` in an empty tree.
async fn walk_to_leaf(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    intent: Intent,
) -> Result<Option<DirtyLeaf>, BtreeError> {
    match walk_dirty(tx, root, key, intent).await? {
        Walked::Leaf(leaf) => Ok(Some(leaf)),
        Walked::Empty => Ok(None),
        Walked::SubtreeLimit => unreachable!("only merges walk subtrees"),
    }
}

async fn walk_for_insert(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    len: usize,
) -> Result<DirtyLeaf, BtreeError> {
    let intent = Intent {
        insert: Some(len),
        ..Intent::default()
    };
    let leaf = walk_to_leaf(tx, root, key, intent).await?;
    Ok(leaf.expect("a walk to insert makes a leaf"))
}

/// Adds an item with seq 0 and no flags.
///
/// # Errors
/// `Exists`, `ValueLength`; block errors.
pub async fn insert(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    value: &[u8],
) -> Result<(), BtreeError> {
    check_len(key, value.len())?;
    let leaf = walk_for_insert(tx, root, key, value.len()).await?;
    tx.edit(leaf.blkno, |b| {
        if hash::search(b, key) != NONE {
            return Err(BtreeError::Exists(*key));
        }
        layout::create_item(b, new_item(key, value));
        Ok(())
    })
}

fn new_item<'a>(key: &Key, value: &'a [u8]) -> NewItem<'a> {
    NewItem {
        key: *key,
        seq: 0,
        flags: 0,
        value,
    }
}

/// Replaces the value of an existing item.
///
/// # Errors
/// `NotFound`, `ValueLength`; block errors.
pub async fn update(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    value: &[u8],
) -> Result<(), BtreeError> {
    check_len(key, value.len())?;
    if root.height == 0 {
        return Err(BtreeError::NotFound(*key));
    }
    let leaf = walk_for_insert(tx, root, key, value.len()).await?;
    tx.edit(leaf.blkno, |b| match hash::search(b, key) {
        NONE => Err(BtreeError::NotFound(*key)),
        off => {
            layout::update_item(b, off, value);
            Ok(())
        }
    })
}

/// Adds an item or replaces its value.
///
/// # Errors
/// `ValueLength`; block errors.
pub async fn force(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
    value: &[u8],
) -> Result<(), BtreeError> {
    check_len(key, value.len())?;
    let leaf = walk_for_insert(tx, root, key, value.len()).await?;
    tx.edit(leaf.blkno, |b| match hash::search(b, key) {
        NONE => layout::create_item(b, new_item(key, value)),
        off => layout::update_item(b, off, value),
    });
    Ok(())
}

/// Removes an item.
///
/// # Errors
/// `NotFound`; block errors.
pub async fn delete(tx: &Tx, root: &mut BtreeRoot, key: &Key) -> Result<(), BtreeError> {
    let intent = Intent {
        delete: true,
        ..Intent::default()
    };
    let not_found = BtreeError::NotFound(*key);
    let Some(leaf) = walk_to_leaf(tx, root, key, intent).await? else {
        return Err(not_found);
    };
    let (off, nr) = tx.view(leaf.blkno, |b| (hash::search(b, key), layout::nr_items(b)));
    if off == NONE {
        return Err(not_found);
    }
    if leaf.is_root && nr == 1 {
        tx.free_block(leaf.blkno).await?;
        *root = BtreeRoot::default();
    } else {
        tx.edit(leaf.blkno, |b| layout::delete_item(b, off));
    }
    Ok(())
}

/// Takes back an insert of this transaction: reads and joins nothing, because
/// the path is dirty already, so it can not fail for want of a device. The leaf
/// may become thin.
///
/// # Errors
/// `NotFound`, and violated budgets.
pub(crate) async fn undo_insert(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: &Key,
) -> Result<(), BtreeError> {
    let not_found = BtreeError::NotFound(*key);
    let Some(leaf) = walk_to_leaf(tx, root, key, Intent::default()).await? else {
        return Err(not_found);
    };
    tx.edit(leaf.blkno, |b| match hash::search(b, key) {
        NONE => Err(not_found),
        off => {
            layout::delete_item(b, off);
            Ok(())
        }
    })
}

/// Makes the path to an existing item dirty, so that changing this item later in
/// the transaction reads and copies nothing.
///
/// # Errors
/// `NotFound`; block errors.
pub async fn dirty(tx: &Tx, root: &mut BtreeRoot, key: &Key) -> Result<(), BtreeError> {
    let leaf = walk_to_leaf(tx, root, key, Intent::default()).await?;
    let found = leaf.is_some_and(|leaf| tx.view(leaf.blkno, |b| hash::search(b, key) != NONE));
    if found {
        Ok(())
    } else {
        Err(BtreeError::NotFound(*key))
    }
}

/// Splits or joins every block on the path to `key` that needs it (spec 02 section 15).
///
/// # Errors
/// Block errors.
pub async fn rebalance(tx: &Tx, root: &mut BtreeRoot, key: &Key) -> Result<(), BtreeError> {
    if root.height == 0 {
        return Ok(());
    }
    let intent = Intent {
        insert: Some(MAX_ITEM_VALUE),
        delete: true,
        ..Intent::default()
    };
    walk_to_leaf(tx, root, key, intent).await?;
    Ok(())
}

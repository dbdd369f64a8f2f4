//! Filling, emptying and joining lists of free metadata blocks (spec 03 section 7).
//!
//! All of it works on lists that are *not* the running transaction's: copying their
//! blocks takes from and gives to the running ones.
//!
//! What can go wrong: a head that no longer matches its chain. `first_nr` and
//! `total_nr` change together with the blocks; a failure half way is for the caller
//! to treat as the end of the transaction.

use super::{AllocError, alloc_extent, ext_mod, insert_extent};
use crate::block::{ListBlock, ListBlockMut, Tx};
use crate::env::probe;
use crate::format::{AllocListHead, AllocRoot, BlockRef, Magic};

/// Whether the transaction has room for `extents` changes of a tree and `extra` entries.
pub fn has_room(tx: &Tx, root: &AllocRoot, extents: u32, extra: u32) -> bool {
    let need = 1 + ext_mod(root.root.height) * extents + extra;
    tx.remaining().fits(need)
}

fn check_not_running(tx: &Tx, head: &AllocListHead) -> Result<(), AllocError> {
    if tx.is_running(head) {
        Err(AllocError::RunningList)
    } else {
        Ok(())
    }
}

/// Makes the first block of a list dirty, a new one if there is none.
async fn dirty_first(tx: &Tx, head: &mut AllocListHead) -> Result<(), AllocError> {
    if !head.block_ref.is_null() {
        tx.read_first(head).await?;
    }
    Ok(tx.dirty_ref(&mut head.block_ref, Magic::AllocList).await?)
}

/// Fills a list that has fewer than `lo` entries from `root` up to `target`; may
/// stop early with success when the transaction is low.
///
/// # Errors
/// `NoSpace` if `root` is empty, `RunningList`; btree errors.
pub async fn fill_list(
    tx: &Tx,
    head: &mut AllocListHead,
    root: &mut AllocRoot,
    lo: u32,
    target: u32,
) -> Result<(), AllocError> {
    check_not_running(tx, head)?;
    if head.first_nr.get() >= lo {
        return Ok(());
    }
    if root.total_len.get() == 0 {
        probe("fill_list_no_space");
        return Err(AllocError::NoSpace);
    }
    if !has_room(tx, root, 1, 1) {
        probe("fill_list_low");
        return Ok(());
    }
    dirty_first(tx, head).await?;
    while head.first_nr.get() < target && has_room(tx, root, 1, 0) {
        let count = target - head.first_nr.get();
        let extent = match alloc_extent(tx, root, u64::from(count)).await {
            Err(AllocError::NoExtent) => {
                probe("fill_list_no_space");
                return Err(AllocError::NoSpace);
            }
            other => other?,
        };
        tx.edit(head.block_ref.blkno.get(), |bytes| {
            let mut block = ListBlockMut::new(bytes);
            for blkno in extent.start..extent.start + extent.len {
                block.add(head, blkno);
            }
        });
    }
    Ok(())
}

/// Moves a list's blocks to `root` as extents; may stop early with success,
/// leaving the rest.
///
/// # Errors
/// `Overlap`, `RunningList`; btree errors.
pub async fn empty_list(
    tx: &Tx,
    head: &mut AllocListHead,
    root: &mut AllocRoot,
) -> Result<(), AllocError> {
    check_not_running(tx, head)?;
    let mut sorted = 0;
    while !head.block_ref.is_null() && has_room(tx, root, 1, 1) {
        if head.first_nr.get() == 0 {
            trim(tx, head).await?;
            continue;
        }
        dirty_first(tx, head).await?;
        let list = head.block_ref.blkno.get();
        let (start, len) = tx.edit(list, |bytes| {
            if sorted != list {
                ListBlockMut::new(bytes).sort();
            }
            leading_run(ListBlock::new(bytes))
        });
        sorted = list;
        insert_extent(tx, root, start, len).await?;
        tx.edit(list, |bytes| {
            ListBlockMut::new(bytes).remove(head, len as u32)
        });
    }
    Ok(())
}

/// The consecutive block numbers at the front of a sorted list block.
fn leading_run(block: ListBlock<'_>) -> (u64, u64) {
    let entries = block.entries();
    let start = entries[0].get();
    let run = entries
        .iter()
        .zip(start..)
        .take_while(|(entry, at)| entry.get() == *at);
    (start, run.count() as u64)
}

/// Drops the empty first block of a list.
async fn trim(tx: &Tx, head: &mut AllocListHead) -> Result<(), AllocError> {
    let next = ListBlock::new(tx.read_first(head).await?.bytes())
        .head()
        .next;
    let first_nr = match next.is_null() {
        true => 0,
        false => ListBlock::new(tx.read_list(&next).await?.bytes())
            .head()
            .nr
            .get(),
    };
    tx.free_block(head.block_ref.blkno.get()).await?;
    head.block_ref = next;
    head.first_nr = first_nr.into();
    Ok(())
}

/// Puts the blocks of `src` in front of `dst`; `src` becomes empty, flags too.
///
/// # Errors
/// `RunningList`; block errors.
pub async fn splice_list(
    tx: &Tx,
    dst: &mut AllocListHead,
    src: &mut AllocListHead,
) -> Result<(), AllocError> {
    check_not_running(tx, dst)?;
    check_not_running(tx, src)?;
    if src.block_ref.is_null() {
        *src = AllocListHead::default();
        return Ok(());
    }
    tx.read_first(src).await?;
    let mut first = BlockRef::default();
    let mut before: Option<u64> = None;
    let mut next = src.block_ref;
    while !next.is_null() {
        let mut this = next;
        next = ListBlock::new(tx.read_list(&this).await?.bytes())
            .head()
            .next;
        tx.dirty_ref(&mut this, Magic::AllocList).await?;
        match before {
            None => first = this,
            Some(before) => set_next(tx, before, this),
        }
        before = Some(this.blkno.get());
    }
    let tail = before.expect("src has a block");
    set_next(tx, tail, dst.block_ref);
    dst.block_ref = first;
    dst.first_nr = src.first_nr;
    dst.total_nr += src.total_nr.get();
    *src = AllocListHead::default();
    Ok(())
}

fn set_next(tx: &Tx, blkno: u64, next: BlockRef) {
    tx.edit(blkno, |bytes| ListBlockMut::new(bytes).head().next = next);
}

/// Sets or clears the LOW flag of a list head.
pub fn set_list_low(head: &mut AllocListHead, low: bool) {
    head.flags = (head.flags.get() & !crate::format::ALLOC_FLAG_LOW | u32::from(low)).into();
}

/// Whether a list head has the LOW flag.
pub fn list_is_low(head: &AllocListHead) -> bool {
    head.flags.get() & crate::format::ALLOC_FLAG_LOW != 0
}

//! Filling lists from extents, emptying them into extents, chaining them
//! (spec 03 section 7).
//!
//! All take their blocks from a running transaction and work on other lists
//! than its own: that is what ends the recursion.

use super::{AllocError, alloc_extent, ext_mod, insert_extent};
use crate::block::{BlockError, Corruption, ListBlock, ListBlockMut, Tx};
use crate::env::probe;
use crate::format::{ALLOC_FLAG_LOW, AllocListHead, AllocRoot, BlockRef, Magic};

/// Room that one step of [`recycle_list`] needs: the running lists' own copies, and
/// copies of the first blocks of both lists.
const RECYCLE_ROOM: u32 = 6;

/// Whether the transaction has room for `extents` changes of a tree and `extra` entries.
pub fn has_room(tx: &Tx, root: &AllocRoot, extents: u32, extra: u32) -> bool {
    tx.remaining()
        .fits(1 + ext_mod(root.root.height) * extents + extra)
}

fn check_not_running(tx: &Tx, head: &AllocListHead) -> Result<(), AllocError> {
    if tx.is_running(head) {
        return Err(AllocError::RunningList);
    }
    Ok(())
}

/// Makes the first block of a list dirty: a new one if there is none. Its
/// entries are sorted.
async fn dirty_first(tx: &Tx, head: &mut AllocListHead) -> Result<(), AllocError> {
    if head.block_ref.is_null() {
        head.first_nr = 0.into();
        tx.dirty_ref(&mut head.block_ref, Magic::AllocList).await?;
        return Ok(());
    }
    let block = tx.read_first(head).await?;
    tx.dirty_from(&mut head.block_ref, &block, Magic::AllocList)
        .await?;
    tx.edit(head.block_ref.blkno.get(), |b| ListBlockMut::new(b).sort());
    Ok(())
}

/// Fills a list that has fewer than `lo` entries from `root` up to `target`; may
/// stop early with success when the transaction is low.
///
/// # Errors
/// `NoSpace` if `root` is empty before, `RunningList`; btree errors. What was
/// moved until then stays moved.
pub async fn fill_list(
    tx: &Tx,
    head: &mut AllocListHead,
    root: &mut AllocRoot,
    lo: u32,
    target: u32,
) -> Result<(), AllocError> {
    check_not_running(tx, head)?;
    let target = target.min(tx.policy().list_max);
    if head.first_nr.get() >= lo.min(target) || !has_room(tx, root, 1, 0) {
        return Ok(());
    }
    dirty_first(tx, head).await?;
    while head.first_nr.get() < target {
        if !has_room(tx, root, 1, 0) {
            probe("fill_stopped_early");
            return Ok(());
        }
        let count = u64::from(target - head.first_nr.get());
        let extent = match alloc_extent(tx, root, count).await {
            Err(AllocError::NoExtent) => {
                probe("fill_without_extents");
                return Err(AllocError::NoSpace);
            }
            extent => extent?,
        };
        tx.edit(head.block_ref.blkno.get(), |b| {
            let mut block = ListBlockMut::new(b);
            for blkno in extent.start..extent.end() {
                block.add(head, blkno);
            }
        });
    }
    Ok(())
}

/// Makes room for `need` more entries in both running lists in the middle of a
/// transaction: a new first block of the freed list, and blocks of `root`, the tree that
/// lists are filled from in this transaction (spec 05 section 8). A step of it needs
/// room for one change of `root` itself.
///
/// # Errors
/// `NoSpace` if `root` has too little; btree errors. What was moved until then stays moved.
pub async fn widen_running(tx: &Tx, root: &mut AllocRoot, need: u32) -> Result<(), AllocError> {
    if tx.remaining().freed < need {
        tx.rotate_freed().await?;
    }
    while tx.remaining().avail < need {
        let room = tx.policy().list_max - tx.remaining().avail;
        let extent = match alloc_extent(tx, root, u64::from(room)).await {
            Err(AllocError::NoExtent) => return Err(AllocError::NoSpace),
            extent => extent?,
        };
        probe("running_list_widened");
        tx.add_avail(extent.start..extent.end()).await?;
    }
    Ok(())
}

/// Moves a list's blocks to `root` as extents; may stop early with success, after
/// `runs` extents or when the transaction is low, leaving the rest.
///
/// # Errors
/// `Overlap`, `RunningList`; btree errors. What was moved until then stays moved.
pub async fn empty_list(
    tx: &Tx,
    head: &mut AllocListHead,
    root: &mut AllocRoot,
    mut runs: u32,
) -> Result<(), AllocError> {
    check_not_running(tx, head)?;
    while !head.block_ref.is_null() {
        if runs == 0 || !has_room(tx, root, 1, 1) {
            probe("empty_stopped_early");
            return Ok(());
        }
        if head.first_nr.get() == 0 {
            trim(tx, head).await?;
            continue;
        }
        let blkno = head.block_ref.blkno.get();
        if !tx.is_dirty(blkno) {
            dirty_first(tx, head).await?;
            continue;
        }
        // Lists of this transaction, such as those just spliced, are not sorted.
        let (start, len) = tx.edit(blkno, |b| {
            ListBlockMut::new(b).sort_if_needed();
            leading_run(ListBlock::new(b))
        });
        tx.check_range(start)?;
        tx.check_range(start + u64::from(len) - 1)?;
        insert_extent(tx, root, start, u64::from(len)).await?;
        tx.edit(blkno, |b| ListBlockMut::new(b).remove(head, len));
        runs -= 1;
    }
    Ok(())
}

/// Moves blocks of a freed list straight into an avail list that has fewer than `lo`
/// entries, up to `target`, without any tree: for when space is so low that the trees
/// have nothing and the running list can not pay for changing one.
///
/// Both lists belong to the pair that is idle now (spec 03 section 11). What is on its
/// freed list is referred to by no super that is stable when the pair runs: the blocks
/// were freed before this commit, or stop being referred to with it. So they may be
/// allocated in the next commit, as those of a tree that has changed its role.
///
/// # Errors
/// `RunningList`; block errors. What was moved until then stays moved.
pub async fn recycle_list(
    tx: &Tx,
    freed: &mut AllocListHead,
    avail: &mut AllocListHead,
    lo: u32,
    target: u32,
) -> Result<(), AllocError> {
    check_not_running(tx, freed)?;
    check_not_running(tx, avail)?;
    let target = target.min(tx.policy().list_max);
    if avail.first_nr.get() >= lo.min(target) {
        return Ok(());
    }
    while avail.first_nr.get() < target && !freed.block_ref.is_null() {
        if !tx.remaining().fits(RECYCLE_ROOM) {
            probe("recycle_stopped_early");
            return Ok(());
        }
        if freed.first_nr.get() == 0 {
            trim(tx, freed).await?;
            continue;
        }
        for head in [&mut *freed, &mut *avail] {
            if head.block_ref.is_null() || !tx.is_dirty(head.block_ref.blkno.get()) {
                dirty_first(tx, head).await?;
            }
        }
        probe("freed_blocks_recycled");
        let count = freed.first_nr.get().min(target - avail.first_nr.get());
        let blknos: Vec<u64> = tx.view(freed.block_ref.blkno.get(), |b| {
            let entries = &ListBlock::new(b).entries()[..count as usize];
            entries.iter().map(|blkno| blkno.get()).collect()
        });
        for blkno in &blknos {
            tx.check_range(*blkno)?;
        }
        tx.edit(freed.block_ref.blkno.get(), |b| {
            ListBlockMut::new(b).remove(freed, count);
        });
        tx.edit(avail.block_ref.blkno.get(), |b| {
            let mut block = ListBlockMut::new(b);
            for blkno in blknos {
                block.add(avail, blkno);
            }
        });
    }
    Ok(())
}

/// The consecutive numbers at the front of a sorted block with entries.
fn leading_run(block: ListBlock<'_>) -> (u64, u32) {
    let entries = block.entries();
    let start = entries[0].get();
    let run = (start..)
        .zip(entries)
        .take_while(|(want, b)| b.get() == *want);
    (start, run.count() as u32)
}

/// Removes the empty first block of a list.
async fn trim(tx: &Tx, head: &mut AllocListHead) -> Result<(), AllocError> {
    let block = tx.read_first(head).await?;
    let next = ListBlock::new(block.bytes()).head().next;
    let first_nr = if next.is_null() {
        0
    } else {
        let after = tx.read_list(&next).await?;
        ListBlock::new(after.bytes()).head().nr.get()
    };
    drop(block);
    tx.free_block(head.block_ref.blkno.get()).await?;
    head.block_ref = next;
    head.first_nr = first_nr.into();
    Ok(())
}

/// Reads a list whole and compares it with its head. Whoever takes over a list that
/// somebody else made must know that: afterwards the counts of the heads are trusted.
///
/// # Errors
/// Block errors: what is wrong, if the list is not what its head says.
pub async fn verify_list(tx: &Tx, head: &AllocListHead) -> Result<(), AllocError> {
    let said = head.total_nr.get();
    let mut found = 0;
    if !head.block_ref.is_null() {
        let mut block = tx.read_first(head).await?;
        // A list that comes back to itself has more than any head says.
        for _ in 0..tx.cache().total_blocks() {
            let list = ListBlock::new(block.bytes()).head();
            let next = list.next;
            found += u64::from(list.nr.get());
            if next.is_null() || found > said {
                break;
            }
            block = tx.read_list(&next).await?;
        }
    }
    let first = head.first_nr.get();
    if found != said || (head.block_ref.is_null() && first != 0) {
        let blkno = head.block_ref.blkno.get();
        let what = format!(
            "a list of {found} entries, its head says {said} and {first} in its first block"
        );
        return Err(BlockError::Corrupt(Corruption { blkno, what }).into());
    }
    Ok(())
}

/// Puts the blocks of `src` in front of `dst`; `src` becomes empty, flags too.
/// Costs one allocation and one free for each block of `src`.
///
/// # Errors
/// `RunningList`; those of [`verify_list`] for `src`; block errors. Then both are still
/// whole lists.
pub async fn splice_list(
    tx: &Tx,
    dst: &mut AllocListHead,
    src: &mut AllocListHead,
) -> Result<(), AllocError> {
    check_not_running(tx, dst)?;
    check_not_running(tx, src)?;
    verify_list(tx, src).await?;
    if src.block_ref.is_null() {
        return Ok(());
    }
    let tail = dirty_chain(tx, &mut src.block_ref).await?;
    tx.edit(tail.blkno.get(), |b| {
        ListBlockMut::new(b).head().next = dst.block_ref;
    });
    dst.block_ref = src.block_ref;
    dst.first_nr = src.first_nr;
    dst.total_nr += src.total_nr.get();
    *src = AllocListHead::default();
    Ok(())
}

/// Makes every block of a chain dirty; the last one.
async fn dirty_chain(tx: &Tx, first: &mut BlockRef) -> Result<BlockRef, BlockError> {
    dirty_list(tx, first).await?;
    let mut at = *first;
    loop {
        let mut next = tx.view(at.blkno.get(), |b| ListBlock::new(b).head().next);
        if next.is_null() {
            return Ok(at);
        }
        dirty_list(tx, &mut next).await?;
        tx.edit(at.blkno.get(), |b| ListBlockMut::new(b).head().next = next);
        at = next;
    }
}

async fn dirty_list(tx: &Tx, block_ref: &mut BlockRef) -> Result<(), BlockError> {
    let block = tx.read_list(block_ref).await?;
    tx.dirty_from(block_ref, &block, Magic::AllocList).await
}

/// Sets or clears the LOW flag of a list head.
pub fn set_list_low(head: &mut AllocListHead, low: bool) {
    head.flags = (head.flags.get() & !ALLOC_FLAG_LOW | u32::from(low)).into();
}

/// Whether a list head has the LOW flag.
pub fn list_is_low(head: &AllocListHead) -> bool {
    head.flags.get() & ALLOC_FLAG_LOW != 0
}

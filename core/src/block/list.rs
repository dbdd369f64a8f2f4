//! Alloc list blocks: block numbers in a chain of blocks (spec 01 section 9,
//! spec 03 section 4).
//!
//! Only the first block of a list is ever added to or removed from, and only
//! its owner reads it. What can go wrong: a head whose `first_nr` differs from
//! its block's `nr`; every room check uses it, so it is checked when read.

use super::Corruption;
use crate::format::{
    ALLOC_LIST_MAX_BLOCKS, AllocListBlock, AllocListHead, BlockRef, META_DEV_START_BLKNO,
    read_header,
};
use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

const HEAD: usize = size_of::<AllocListBlock>();

/// A list block, to be read.
#[derive(Clone, Copy)]
pub(crate) struct ListBlock<'a>(&'a [u8]);

impl<'a> ListBlock<'a> {
    /// Views a verified (or own) block.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn head(&self) -> &'a AllocListBlock {
        AllocListBlock::ref_from_prefix(self.0)
            .expect("a whole block")
            .0
    }

    fn slots(&self) -> &'a [U64] {
        <[U64]>::ref_from_bytes(&self.0[HEAD..]).expect("a whole number of entries")
    }

    /// The valid entries.
    pub(crate) fn entries(&self) -> &'a [U64] {
        let head = self.head();
        let start = head.start.get() as usize;
        &self.slots()[start..start + head.nr.get() as usize]
    }
}

/// A dirty list block.
pub(crate) struct ListBlockMut<'a>(&'a mut [u8]);

impl<'a> ListBlockMut<'a> {
    pub(crate) fn new(bytes: &'a mut [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn head(&mut self) -> &mut AllocListBlock {
        AllocListBlock::mut_from_prefix(self.0)
            .expect("a whole block")
            .0
    }

    fn slots(&mut self) -> &mut [U64] {
        <[U64]>::mut_from_bytes(&mut self.0[HEAD..]).expect("a whole number of entries")
    }

    /// Adds one entry and counts it in `list`, the list's head.
    ///
    /// # Panics
    /// If the block is full.
    pub(crate) fn add(&mut self, list: &mut AllocListHead, blkno: u64) {
        let (start, nr) = (self.head().start.get(), self.head().nr.get());
        let at = if ((start + nr) as usize) < ALLOC_LIST_MAX_BLOCKS {
            start + nr
        } else {
            assert!(start > 0, "adding block {blkno} to a full list block");
            self.head().start = (start - 1).into();
            start - 1
        };
        self.slots()[at as usize] = blkno.into();
        self.head().nr = (nr + 1).into();
        list.first_nr += 1;
        list.total_nr += 1;
    }

    /// Removes `count` entries from the front.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn remove(&mut self, list: &mut AllocListHead, count: u32) {
        let head = self.head();
        let nr = head.nr.get();
        assert!(count <= nr, "removing {count} of {nr} list entries");
        head.nr -= count;
        if count == nr {
            head.start = 0.into();
        } else {
            head.start += count;
        }
        list.first_nr -= count;
        list.total_nr -= u64::from(count);
    }

    /// Sorts the valid entries ascending.
    pub(crate) fn sort(&mut self) {
        let (start, nr) = (self.head().start.get(), self.head().nr.get());
        let valid = &mut self.slots()[start as usize..(start + nr) as usize];
        valid.sort_unstable_by_key(|blkno| blkno.get());
    }

    /// Sorts unless the entries are in order already.
    pub(crate) fn sort_if_needed(&mut self) {
        let entries = ListBlock::new(self.0).entries();
        if !entries.is_sorted_by_key(|blkno| blkno.get()) {
            self.sort();
        }
    }

    /// Exchanges the first and the last entry (for a planted bug).
    pub(crate) fn last_first(&mut self) {
        let (start, nr) = (self.head().start.get(), self.head().nr.get());
        self.slots().swap(start as usize, (start + nr - 1) as usize);
    }

    /// The first valid entry.
    pub(crate) fn first(&mut self) -> Option<u64> {
        ListBlock::new(self.0).entries().first().map(|b| b.get())
    }
}

/// Checks the counters of a list block.
///
/// # Errors
/// If entries would lie outside of the block.
pub fn verify_list(bytes: &[u8]) -> Result<(), Corruption> {
    let head = ListBlock::new(bytes).head();
    let (start, nr) = (head.start.get(), head.nr.get());
    let end = u64::from(start) + u64::from(nr);
    if end > ALLOC_LIST_MAX_BLOCKS as u64 {
        return Err(Corruption {
            blkno: read_header(bytes).blkno.get(),
            what: format!("list entries {start}+{nr} of {ALLOC_LIST_MAX_BLOCKS}"),
        });
    }
    Ok(())
}

/// Checks a list block against the head that refers to it and the volume's size.
///
/// # Errors
/// If `first_nr` differs, or an entry is no block of the volume.
pub(crate) fn verify_first(
    bytes: &[u8],
    head: &AllocListHead,
    total_blocks: u64,
) -> Result<(), Corruption> {
    let corrupt = |what| Corruption {
        blkno: read_header(bytes).blkno.get(),
        what,
    };
    let block = ListBlock::new(bytes);
    let (nr, first_nr) = (block.head().nr.get(), head.first_nr.get());
    if nr != first_nr {
        return Err(corrupt(format!(
            "{nr} entries, its list head says {first_nr}"
        )));
    }
    let good = META_DEV_START_BLKNO..total_blocks;
    match block.entries().iter().find(|b| !good.contains(&b.get())) {
        Some(bad) => Err(corrupt(format!(
            "entry {bad} is outside of the volume's blocks {good:?}"
        ))),
        None => Ok(()),
    }
}

/// The block numbers that a list block holds and the reference to the next
/// block of the list, for walkers such as `check`.
///
/// # Errors
/// As [`verify_list`].
pub fn list_entries(bytes: &[u8]) -> Result<(Vec<u64>, BlockRef), Corruption> {
    verify_list(bytes)?;
    let block = ListBlock::new(bytes);
    let entries = block.entries().iter().map(|b| b.get()).collect();
    Ok((entries, block.head().next))
}

/// The head of a list of one block that holds `entries` in a block of
/// `bytes`, for mkfs: fills everything but the block header.
///
/// # Panics
/// If there are more entries than a block holds.
pub fn list_head_of(bytes: &mut [u8], block_ref: BlockRef, entries: &[u64]) -> AllocListHead {
    let mut head = AllocListHead {
        block_ref,
        ..AllocListHead::default()
    };
    bytes[size_of::<crate::format::BlockHeader>()..].fill(0);
    let mut block = ListBlockMut::new(bytes);
    for blkno in entries {
        block.add(&mut head, *blkno);
    }
    head
}

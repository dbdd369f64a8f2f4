//! Validation of a whole btree block (spec 02 section 20, the per-block part).
//!
//! Everything that code follows is checked: counters, AVL links and order, value
//! places, the hash table. What needs other blocks (key ranges, references) is
//! the walk's and `check`'s work.

use super::avl;
use super::hash;
use super::layout::{
    NONE, REF_LEN, head, item, item_bytes, mid_free, nr_items, slot, total_bytes, value_bytes,
    values_end,
};
use crate::block::Corruption;
use crate::format::{
    BTREE_HEAD_SIZE, BTREE_ITEM_SIZE, BTREE_MAX_HEIGHT, BTREE_VALUE_ALIGN, ITEM_FLAG_DELETION,
    LG_BLOCK_SIZE, MAX_ITEM_VALUE, read_header,
};

/// An AVL tree of 1115 items is at most this deep.
const MAX_DEPTH: usize = 16;

/// Checks a whole btree block by itself: every invariant of spec 02 section 20
/// but those that need other blocks. `level` is the expected level. The header
/// was checked before.
///
/// AVL heights are not compared in blocks of at most two items: mkfs of the
/// original stores wrong ones.
///
/// # Errors
/// The first thing found to be wrong.
///
/// # Panics
/// If `bytes` is not a large block.
pub fn verify_block(bytes: &[u8], level: u8) -> Result<(), Corruption> {
    assert_eq!(bytes.len(), LG_BLOCK_SIZE, "not a btree block");
    let check = Check { b: bytes, level };
    let res = check.counters().and_then(|()| {
        check.items()?;
        check.values()?;
        check.tree()?;
        check.hash()
    });
    res.map_err(|what| Corruption {
        blkno: read_header(bytes).blkno.get(),
        what,
    })
}

struct Check<'a> {
    b: &'a [u8],
    level: u8,
}

impl Check<'_> {
    fn is_slot(&self, off: usize) -> bool {
        off >= BTREE_HEAD_SIZE
            && off < slot(nr_items(self.b))
            && (off - BTREE_HEAD_SIZE).is_multiple_of(BTREE_ITEM_SIZE)
    }

    fn counters(&self) -> Result<(), String> {
        let head = head(self.b);
        if head.level != self.level || self.level >= BTREE_MAX_HEIGHT {
            return Err(format!("level {}, expected {}", head.level, self.level));
        }
        let (nr, end) = (nr_items(self.b), values_end(self.level));
        if slot(nr) + mid_free(self.b) > end {
            return Err(format!(
                "{nr} items and a gap of {} bytes reach past byte {end}",
                mid_free(self.b)
            ));
        }
        Ok(())
    }

    fn items(&self) -> Result<(), String> {
        let mut total = 0;
        for i in 0..nr_items(self.b) {
            let it = item(self.b, slot(i));
            let len = it.val_len.get() as usize;
            total += item_bytes(len);
            if it.key.pad != [0; 5] || it.pad != [0; 3] || it.node.pad != 0 {
                return Err(format!(
                    "item {} has padding that is not zero",
                    it.key.key()
                ));
            }
            if len > MAX_ITEM_VALUE || self.level > 0 && len != REF_LEN {
                return Err(format!("item {} has a value of {len} bytes", it.key.key()));
            }
            let deletion = it.flags == ITEM_FLAG_DELETION && len == 0 && self.level == 0;
            if it.flags != 0 && !deletion {
                return Err(format!(
                    "item {} has flags {:#x} and {len} bytes",
                    it.key.key(),
                    it.flags
                ));
            }
        }
        if total != total_bytes(self.b) {
            return Err(format!(
                "items take {total} bytes, the head says {}",
                total_bytes(self.b)
            ));
        }
        Ok(())
    }

    fn values(&self) -> Result<(), String> {
        let mut values: Vec<(usize, usize)> = (0..nr_items(self.b))
            .map(|i| item(self.b, slot(i)))
            .filter(|it| it.val_len.get() > 0)
            .map(|it| (it.val_off.get() as usize, it.val_len.get() as usize))
            .collect();
        values.sort_unstable();
        let mut free_from = slot(nr_items(self.b)) + mid_free(self.b);
        for (at, len) in values {
            if !at.is_multiple_of(BTREE_VALUE_ALIGN) || at < free_from {
                return Err(format!(
                    "a value of {len} bytes at {at} overlaps what ends at {free_from}"
                ));
            }
            free_from = at + value_bytes(len);
        }
        if free_from > values_end(self.level) {
            return Err(format!("a value ends at {free_from}, past the values"));
        }
        Ok(())
    }

    /// Walks the AVL tree in order with an explicit stack.
    fn tree(&self) -> Result<(), String> {
        let mut seen = 0;
        let mut last = None;
        let real = self.subtree(avl::root(self.b), NONE, 0, &mut |off| {
            seen += 1;
            let key = item(self.b, off).key.key();
            if last.is_some_and(|last| last >= key) {
                return Err(format!("item {key} is out of order"));
            }
            last = Some(key);
            Ok(())
        });
        real?;
        if seen != nr_items(self.b) {
            return Err(format!("{seen} of {} items are linked", nr_items(self.b)));
        }
        Ok(())
    }

    /// Checks one subtree and returns its real height. The depth is bounded, and
    /// a node linked twice breaks the key order or the parent links.
    fn subtree(
        &self,
        off: usize,
        above: usize,
        depth: usize,
        visit: &mut dyn FnMut(usize) -> Result<(), String>,
    ) -> Result<u8, String> {
        if off == NONE {
            return Ok(0);
        }
        if !self.is_slot(off) || depth >= MAX_DEPTH {
            return Err(format!("bad AVL link to byte {off} at depth {depth}"));
        }
        let node = item(self.b, off).node;
        if super::layout::from_link(node.parent.get()) != above {
            return Err(format!(
                "the item at byte {off} has parent link {}",
                node.parent
            ));
        }
        let left = self.subtree(avl::left(self.b, off), off, depth + 1, visit)?;
        visit(off)?;
        let right = self.subtree(avl::right(self.b, off), off, depth + 1, visit)?;
        let real = left.max(right) + 1;
        if left.abs_diff(right) > 1 {
            return Err(format!(
                "the item at byte {off} has children of heights {left} and {right}"
            ));
        }
        if node.height != real && nr_items(self.b) > 2 {
            return Err(format!(
                "the item at byte {off} has height {}, its subtree {real}",
                node.height
            ));
        }
        Ok(real)
    }

    fn hash(&self) -> Result<(), String> {
        if self.level > 0 {
            return Ok(());
        }
        let nr = nr_items(self.b);
        let used = hash::count_used(self.b, |off| self.is_slot(off))
            .map_err(|off| format!("the hash table refers to byte {off}"))?;
        if used != nr {
            return Err(format!("{used} hash buckets are used for {nr} items"));
        }
        for i in 0..nr {
            let key = item(self.b, slot(i)).key.key();
            if hash::search(self.b, &key) != slot(i) {
                return Err(format!("item {key} is not found by its hash"));
            }
        }
        Ok(())
    }
}

//! The structure inside one btree block, found out without trusting any of it
//! (spec 02 section 20). Shares no code with the btree that writes blocks, so
//! that one mistake can not hide another.

use super::report::{Kind, Problem};
use crate::format::*;
use zerocopy::FromBytes;

/// A parsed item: where its parts are.
#[derive(Clone, Copy, Debug)]
pub struct ItemAt {
    /// Byte of the item in the block.
    pub offset: usize,
    /// Key.
    pub key: Key,
    /// Item seq.
    pub seq: u64,
    /// Item flags.
    pub flags: u8,
    /// Byte of the value; 0 if it is empty or outside of the block.
    pub val_off: usize,
    /// Bytes of the value; 0 if it is outside of the block.
    pub val_len: usize,
}

/// A block's items in key order, and what is wrong with the block.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Items, ascending by key.
    pub items: Vec<ItemAt>,
    /// Level in the header.
    pub level: u8,
    /// Findings, without block number.
    pub problems: Vec<Problem>,
}

/// Findings listed for one block at most.
const MAX_PROBLEMS: usize = 8;

struct Checker<'a> {
    block: &'a [u8],
    head: BtreeBlock,
    raw: Vec<BtreeItem>,
    end: usize,
    out: Parsed,
}

/// Parses a large block whose header was verified.
pub fn parse_btree_block(block: &[u8]) -> Parsed {
    let (head, _) = BtreeBlock::read_from_prefix(block).expect("a large block holds a head");
    let mut c = Checker {
        block,
        head,
        raw: Vec::new(),
        end: if head.level == 0 {
            BTREE_HASH_START
        } else {
            LG_BLOCK_SIZE
        },
        out: Parsed {
            level: head.level,
            ..Parsed::default()
        },
    };
    if c.read_items() {
        c.check_values();
        c.check_avl();
        c.check_hash();
    }
    c.out.problems.truncate(MAX_PROBLEMS);
    c.out
}

fn item_offset(slot: usize) -> usize {
    BTREE_HEAD_SIZE + slot * BTREE_ITEM_SIZE
}

impl Checker<'_> {
    fn bad(&mut self, text: impl Into<String>) {
        if self.out.problems.len() < MAX_PROBLEMS {
            self.out
                .problems
                .push(Problem::error(Kind::BtreeBlock, text));
        }
    }

    fn bad_want(&mut self, text: &str, expected: impl ToString, found: impl ToString) {
        if self.out.problems.len() < MAX_PROBLEMS {
            let p = Problem::error(Kind::BtreeBlock, text).want(expected, found);
            self.out.problems.push(p);
        }
    }

    /// Reads the items; false if their number can not be true.
    fn read_items(&mut self) -> bool {
        let nr = usize::from(self.head.nr_items.get());
        if item_offset(nr) > self.end {
            let most = (self.end - BTREE_HEAD_SIZE) / BTREE_ITEM_SIZE;
            self.bad_want(
                "too many items in a btree block",
                format!("at most {most}"),
                nr,
            );
            return false;
        }
        if self.head.pad != [0; 7] {
            self.bad("padding of a btree block is not zero");
        }
        for slot in 0..nr {
            let at = item_offset(slot);
            let (item, _) = BtreeItem::read_from_prefix(&self.block[at..])
                .expect("checked to be inside the block");
            self.raw.push(item);
            self.out.items.push(self.item_at(at, &item));
        }
        let mut order = std::mem::take(&mut self.out.items);
        order.sort_by_key(|item| item.key);
        if let Some(pair) = order.windows(2).find(|pair| pair[0].key == pair[1].key) {
            let text = format!("key {} is in a btree block twice", pair[0].key);
            self.bad(text);
        }
        order.dedup_by_key(|item| item.key);
        self.out.items = order;
        true
    }

    fn item_at(&self, offset: usize, item: &BtreeItem) -> ItemAt {
        let off = usize::from(item.val_off.get());
        let len = usize::from(item.val_len.get());
        let inside = len > 0 && off >= BTREE_HEAD_SIZE && off + len <= self.end;
        ItemAt {
            offset,
            key: item.key.key(),
            seq: item.seq.get(),
            flags: item.flags,
            val_off: if inside { off } else { 0 },
            val_len: if inside { len } else { 0 },
        }
    }

    /// Item fields, value places, and the space counters.
    fn check_values(&mut self) {
        let gap_start = item_offset(self.raw.len());
        let mid_free = usize::from(self.head.mid_free_len.get());
        let mut total = 0;
        let mut spans = Vec::new();
        let raw = std::mem::take(&mut self.raw);
        for item in &raw {
            let key = item.key.key();
            let len = usize::from(item.val_len.get());
            let off = usize::from(item.val_off.get());
            let room = len.next_multiple_of(BTREE_VALUE_ALIGN);
            total += BTREE_ITEM_SIZE + room;
            if item.node.pad != 0 || item.pad != [0; 3] || item.key.pad != [0; 5] {
                self.bad(format!("padding of item {key} is not zero"));
            }
            if item.flags & !ITEM_FLAG_DELETION != 0 {
                self.bad(format!("unknown flags {:#x} of item {key}", item.flags));
            }
            if item.flags & ITEM_FLAG_DELETION != 0 && len != 0 {
                self.bad(format!("deletion item {key} has a value of {len} bytes"));
            }
            if len > MAX_ITEM_VALUE {
                self.bad(format!(
                    "value of item {key} has {len} bytes, more than 896"
                ));
            }
            if self.head.level > 0 && len != size_of::<BlockRef>() {
                self.bad(format!(
                    "value of parent item {key} has {len} bytes, not 16"
                ));
            }
            if len == 0 {
                if off != 0 {
                    self.bad(format!("empty value of item {key} has the offset {off}"));
                }
            } else if off % BTREE_VALUE_ALIGN != 0
                || off < gap_start + mid_free
                || off + room > self.end
            {
                self.bad(format!("value of item {key} at {off} is misplaced"));
            } else {
                spans.push((off, off + room, key));
            }
        }
        self.raw = raw;
        spans.sort_unstable();
        if let Some(pair) = spans.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            let text = format!("values of items {} and {} overlap", pair[0].2, pair[1].2);
            self.bad(text);
        }
        let found = usize::from(self.head.total_item_bytes.get());
        if found != total {
            self.bad_want("total_item_bytes of a btree block is wrong", total, found);
        }
        let first = spans.first().map_or(self.end, |span| span.0);
        if gap_start + mid_free > first {
            let most = first.saturating_sub(gap_start);
            self.bad_want("mid_free_len of a btree block is too large", most, mid_free);
        }
    }

    /// Slot of a node offset.
    fn slot_of(&self, node: u16) -> Option<usize> {
        let node = usize::from(node).checked_sub(item_offset(0) - BTREE_NODE_BASE)?;
        let slot = node / BTREE_ITEM_SIZE;
        (node % BTREE_ITEM_SIZE == 0 && slot < self.raw.len()).then_some(slot)
    }

    /// The AVL tree: every item reached once, in order, with right parents and heights.
    fn check_avl(&mut self) {
        let root = self.head.item_root.get();
        if self.raw.is_empty() {
            if root != 0 {
                self.bad("a btree block without items has an AVL root");
            }
            return;
        }
        let mut heights = vec![0u8; self.raw.len()];
        // (node, parent, lower bound, upper bound), then the same again after its children.
        let mut stack = vec![(root, 0u16, None::<Key>, None::<Key>, false)];
        let mut seen = vec![false; self.raw.len()];
        let mut wrong_height = 0;
        while let Some((node, parent, low, high, done)) = stack.pop() {
            let Some(slot) = self.slot_of(node) else {
                self.bad(format!("AVL link {node} of a btree block leads nowhere"));
                return;
            };
            let links = self.raw[slot].node;
            let key = self.raw[slot].key.key();
            let child_height =
                |this: &Self, link: u16| this.slot_of(link).map_or(0, |s| heights[s]);
            if done {
                let left = child_height(self, links.left.get());
                let right = child_height(self, links.right.get());
                heights[slot] = left.max(right).saturating_add(1);
                if left.abs_diff(right) > 1 {
                    self.bad(format!("AVL subtree of item {key} is out of balance"));
                }
                wrong_height += usize::from(links.height != heights[slot]);
                continue;
            }
            if std::mem::replace(&mut seen[slot], true) {
                self.bad(format!("item {key} is in the AVL tree twice"));
                return;
            }
            if links.parent.get() != parent {
                self.bad_want(
                    &format!("AVL parent of item {key}"),
                    parent,
                    links.parent.get(),
                );
            }
            if low.is_some_and(|low| key <= low) || high.is_some_and(|high| key >= high) {
                self.bad(format!("item {key} is out of order in the AVL tree"));
            }
            stack.push((node, parent, low, high, true));
            if links.left.get() != 0 {
                stack.push((links.left.get(), node, low, Some(key), false));
            }
            if links.right.get() != 0 {
                stack.push((links.right.get(), node, Some(key), high, false));
            }
        }
        let reached = seen.iter().filter(|s| **s).count();
        if reached != self.raw.len() {
            self.bad_want(
                "items in the AVL tree of a btree block",
                self.raw.len(),
                reached,
            );
        }
        if wrong_height > 0 {
            self.wrong_heights(wrong_height);
        }
    }

    /// Two items with the heights 1 and 0 are what the original's mkfs writes.
    fn wrong_heights(&mut self, wrong: usize) {
        let mkfs = self.raw.len() == 2
            && read_header(self.block).seq.get() == 1
            && self.raw.iter().map(|i| i.node.height).eq([1, 0]);
        let text = format!("{wrong} AVL heights in a btree block are wrong");
        if mkfs {
            let text = format!("{text}, as the original's mkfs leaves them");
            self.out
                .problems
                .push(Problem::note(Kind::MkfsHeight, text));
        } else {
            self.bad(text);
        }
    }

    /// The leaf hash table: each item is found by the search rule, nothing else is in it.
    fn check_hash(&mut self) {
        if self.head.level != 0 {
            return;
        }
        let table = &self.block[BTREE_HASH_START..];
        let bucket =
            |at: usize| usize::from(u16::from_le_bytes([table[2 * at], table[2 * at + 1]]));
        let used = table.chunks_exact(2).filter(|b| *b != [0, 0]).count();
        if used != self.raw.len() {
            self.bad_want("used buckets of a leaf's hash table", self.raw.len(), used);
        }
        let raw = std::mem::take(&mut self.raw);
        for (slot, item) in raw.iter().enumerate() {
            let key = item.key.key();
            let home = leaf_bucket(&key);
            let found = (0..BTREE_HASH_BUCKETS)
                .map(|i| bucket((home + i) % BTREE_HASH_BUCKETS))
                .take_while(|offset| *offset != 0)
                .any(|offset| offset == item_offset(slot));
            if !found {
                self.bad(format!("item {key} is not found by the leaf's hash table"));
            }
        }
        self.raw = raw;
    }
}

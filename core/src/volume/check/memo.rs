//! What one check of a device remembers for the next: the contents of blocks,
//! verified and parsed. Blocks of the metadata device are never changed in place,
//! so after a commit all but a few are the same, and a check that remembers them
//! neither reads nor verifies nor parses them again. What is *made* of them (who
//! owns which block, the namespace) is made anew each time: nothing about the
//! volume as a whole is remembered, only what is a function of one block's bytes.
//!
//! What can go wrong: bytes that change behind its back. A block is remembered by
//! its number, and is the same only as long as nobody writes there; seq and
//! checksum are no proof, as what is to be found are blocks that were written by
//! mistake. So this is for who sees every write to the device, and says so.

use crate::format::{BlockRef, LG_BLOCK_SIZE};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

struct Known {
    len: u64,
    /// The reference that it was verified against.
    block_ref: BlockRef,
    contents: Rc<dyn Any>,
    /// The last check that met it.
    check: u64,
}

/// The blocks of one metadata device, between checks. See [`super::CheckOptions::memo`].
#[derive(Default)]
pub struct Memo {
    fsid: Cell<u64>,
    check: Cell<u64>,
    /// How many blocks this check has met.
    met: Cell<usize>,
    /// By the byte at which they begin.
    blocks: RefCell<BTreeMap<u64, Known>>,
}

impl Memo {
    /// The bytes of the device from `offset` on are not what they were, or may not be.
    pub fn forget(&self, offset: u64, len: u64) {
        let mut blocks = self.blocks.borrow_mut();
        let near = offset.saturating_sub(LG_BLOCK_SIZE as u64)..offset.saturating_add(len);
        let touched = |(at, known): (&u64, &Known)| (at + known.len > offset).then_some(*at);
        let touched: Vec<u64> = blocks.range(near).filter_map(touched).collect();
        for at in touched {
            blocks.remove(&at);
        }
    }

    /// Nothing is known about the device any more.
    pub fn forget_all(&self) {
        self.blocks.borrow_mut().clear();
    }

    /// Number of blocks that are remembered.
    pub fn len(&self) -> usize {
        self.blocks.borrow().len()
    }

    /// Whether no block is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A check begins, of the volume with this fsid.
    pub(super) fn begin(&self, fsid: u64) {
        if self.fsid.replace(fsid) != fsid {
            self.forget_all();
        }
        self.check.set(self.check.get() + 1);
        self.met.set(0);
    }

    /// The check has ended: what it did not meet belongs to nothing any more, and is
    /// forgotten when there is as much of it as of the rest.
    pub(super) fn end(&self) {
        let mut blocks = self.blocks.borrow_mut();
        if blocks.len() > 2 * self.met.get() {
            let check = self.check.get();
            blocks.retain(|_, known| known.check == check);
        }
    }

    fn meet(&self) -> u64 {
        self.met.set(self.met.get() + 1);
        self.check.get()
    }

    /// The contents of the block at `offset`, if it was verified against the very same
    /// reference, as a block of the same kind.
    pub(super) fn find<T: 'static>(&self, offset: u64, block_ref: &BlockRef) -> Option<Rc<T>> {
        let mut blocks = self.blocks.borrow_mut();
        let known = blocks.get_mut(&offset)?;
        if known.block_ref != *block_ref {
            return None;
        }
        let contents = Rc::clone(&known.contents).downcast().ok()?;
        known.check = self.meet();
        Some(contents)
    }

    /// Remembers a block of `len` bytes that was verified.
    pub(super) fn keep(&self, offset: u64, len: usize, r: &BlockRef, contents: Rc<dyn Any>) {
        let known = Known {
            len: len as u64,
            block_ref: *r,
            contents,
            check: self.meet(),
        };
        self.blocks.borrow_mut().insert(offset, known);
    }
}

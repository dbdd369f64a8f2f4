//! Digests of states, so that a search can tell that it has been there.
//!
//! An inode and a page keep theirs until they change. What can go wrong: a change
//! that does not go through [`Model::get_mut`] or [`Page::bytes_mut`] leaves an
//! old digest behind, and a search takes two states for one.

use super::{BLOCK, Inode, Model, Stamp};
use crate::trace::{Digest, digest};
use std::cell::Cell;

/// A digest that is computed when first asked for. A copy starts without one.
#[derive(Debug, Default)]
pub struct Memo(Cell<Option<u64>>);

impl Memo {
    fn get(&self, compute: impl FnOnce() -> u64) -> u64 {
        if self.0.get().is_none() {
            self.0.set(Some(compute()));
        }
        self.0.get().expect("just set")
    }

    /// What it is about changes.
    pub(super) fn forget(&self) {
        self.0.set(None);
    }
}

impl Clone for Memo {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for Memo {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Memo {}

/// A block of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    bytes: [u8; BLOCK as usize],
    memo: Memo,
}

impl Page {
    /// Those bytes.
    pub fn new(bytes: [u8; BLOCK as usize]) -> Self {
        Self {
            bytes,
            memo: Memo::default(),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; BLOCK as usize] {
        &self.bytes
    }

    /// Its bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8; BLOCK as usize] {
        self.memo.forget();
        &mut self.bytes
    }

    /// The digest of its bytes.
    pub fn digest(&self) -> u64 {
        self.memo.get(|| digest(&self.bytes))
    }
}

impl Stamp {
    fn words(&self) -> [u64; 3] {
        [self.low as u64, self.high as u64, self.set_by]
    }
}

impl Inode {
    /// The digest of all that it is.
    pub fn digest(&self) -> u64 {
        self.memo.get(|| self.compute_digest())
    }

    fn compute_digest(&self) -> u64 {
        let mut digest = Digest::default();
        let numbers = [self.mode, self.nlink, self.uid, self.gid, self.rdev];
        for number in numbers.into_iter().chain([self.opens]) {
            digest.word(u64::from(number));
        }
        digest.word(self.size);
        digest.word(self.parent);
        for word in [self.mtime, self.ctime].iter().flat_map(Stamp::words) {
            digest.word(word);
        }
        digest.bytes(&self.target);
        digest.word(self.xattrs.len() as u64);
        for (name, value) in &self.xattrs {
            digest.bytes(name);
            digest.bytes(value);
        }
        for pages in [&self.blocks, &self.dirty] {
            digest.word(pages.len() as u64);
            for (block, page) in pages {
                digest.word(*block);
                digest.word(page.digest());
            }
        }
        for (name, entry) in &self.entries {
            digest.bytes(name);
            for word in [entry.ino, entry.born.0, entry.born.1] {
                digest.word(word);
            }
        }
        digest.value()
    }
}

impl Model {
    /// The digest of the whole state.
    pub fn digest(&self) -> u64 {
        let mut digest = Digest::default();
        for (ino, inode) in &self.inodes {
            digest.word(*ino);
            digest.word(inode.digest());
        }
        digest.value()
    }
}

//! Telling an old reference from corruption (spec 02 section 18).

use crate::format::BlockRef;

/// Remembers the roots of the last stale read of one retrying reader.
///
/// A reader that got a stale block fetches newer roots and starts again with
/// nothing kept. If the roots did not advance since the previous stale read the
/// version they name is unreadable: corruption.
#[derive(Clone, Debug, Default)]
pub struct StaleCheck {
    saved: [BlockRef; 2],
}

impl StaleCheck {
    /// A reader that has met no stale block yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Called after a stale read with the one or two root references just used
    /// (null for none): true to retry with fresh roots, false for EIO.
    #[must_use]
    pub fn retry(&mut self, used: [BlockRef; 2]) -> bool {
        if used == self.saved {
            crate::env::probe("stale_roots_did_not_advance");
            return false;
        }
        self.saved = used;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_roots_twice_are_corruption_and_advancing_ones_retry() {
        let refs = |a, b| [BlockRef::new(a, 7), BlockRef::new(b, 9)];
        let mut check = StaleCheck::new();
        assert!(check.retry(refs(5, 6)));
        assert!(check.retry(refs(5, 8)));
        assert!(!check.retry(refs(5, 8)));
        assert!(check.retry(refs(5, 6)));
    }
}

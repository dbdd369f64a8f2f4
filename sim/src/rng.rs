//! Seeded random numbers, in independent streams, so that one more draw in one
//! place changes nothing in another.
//!
//! All streams of a thread, which is one world's, can be turned to other numbers at
//! once ([`turn`]): what was drawn before stays as it was.

use outrider_core::env::Entropy;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use std::cell::{Cell, RefCell};

thread_local! {
    /// How often the streams of this thread were turned, and to what.
    static TURN: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// From now on every stream of this thread, also one that is not made yet, gives other
/// numbers, which follow from `to`.
pub fn turn(to: u64) {
    TURN.set((TURN.get().0 + 1, to));
}

/// One stream of random numbers.
pub struct Stream {
    rng: RefCell<ChaCha8Rng>,
    key: [u8; 32],
    turned: Cell<u64>,
}

impl Stream {
    /// The stream `name` (and `index`) of a world built from `seed`.
    pub fn new(seed: u64, name: &str, index: u64) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&index.to_le_bytes());
        let mut hash = crate::trace::Digest::default();
        hash.bytes(name.as_bytes());
        key[16..24].copy_from_slice(&hash.value().to_le_bytes());
        Self {
            rng: RefCell::new(ChaCha8Rng::from_seed(key)),
            key,
            turned: Cell::new(0),
        }
    }

    /// A uniform number below `bound`, which must not be zero.
    pub fn below(&self, bound: u64) -> u64 {
        self.range(0, bound)
    }

    /// True `permille` times out of a thousand.
    pub fn chance(&self, permille: u64) -> bool {
        self.below(1000) < permille
    }

    /// One of the given values.
    pub fn pick<T: Copy>(&self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// An index drawn by weight.
    pub fn weighted(&self, weights: &[u32]) -> usize {
        let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
        let mut at = self.below(total);
        for (index, weight) in weights.iter().enumerate() {
            if at < u64::from(*weight) {
                return index;
            }
            at -= u64::from(*weight);
        }
        unreachable!("the draw is below the sum of the weights")
    }
}

impl Entropy for Stream {
    fn next_u64(&self) -> u64 {
        let (turned, to) = TURN.get();
        if self.turned.replace(turned) != turned {
            let mut key = self.key;
            key[24..].copy_from_slice(&to.to_le_bytes());
            *self.rng.borrow_mut() = ChaCha8Rng::from_seed(key);
        }
        self.rng.borrow_mut().next_u64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_changes_what_comes_and_nothing_that_came() {
        let draws = |to: Option<u64>| {
            let run = move || {
                let old = Stream::new(1, "old", 0);
                let mut all = vec![old.next_u64()];
                to.into_iter().for_each(turn);
                let new = Stream::new(1, "new", 0);
                all.extend([old.next_u64(), old.next_u64(), new.next_u64()]);
                all
            };
            crate::world::on_fresh_thread(run).unwrap()
        };
        let (plain, one, two) = (draws(None), draws(Some(1)), draws(Some(2)));
        assert_eq!(one, draws(Some(1)));
        assert!(plain[0] == one[0] && one[0] == two[0]);
        for at in 1..4 {
            assert!(plain[at] != one[at] && one[at] != two[at] && plain[at] != two[at]);
        }
    }
}

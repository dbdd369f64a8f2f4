//! Seeded random numbers, in independent streams, so that one more draw in one
//! place changes nothing in another.

use outrider_core::env::Entropy;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use std::cell::RefCell;

/// One stream of random numbers.
pub struct Stream(RefCell<ChaCha8Rng>);

impl Stream {
    /// The stream `name` (and `index`) of a world built from `seed`.
    pub fn new(seed: u64, name: &str, index: u64) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&index.to_le_bytes());
        let mut hash = crate::trace::Digest::default();
        hash.bytes(name.as_bytes());
        key[16..24].copy_from_slice(&hash.value().to_le_bytes());
        Self(RefCell::new(ChaCha8Rng::from_seed(key)))
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
        self.0.borrow_mut().next_u64()
    }
}

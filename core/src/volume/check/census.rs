//! Which blocks of a device are claimed: a bitmap in chunks, where a chunk that
//! is all claimed costs a few bytes, so that huge free extents are cheap.

use std::collections::BTreeMap;

const CHUNK_BITS: u64 = 32768;
const WORDS: usize = (CHUNK_BITS / 64) as usize;

enum Chunk {
    Full,
    Bits(Box<[u64; WORDS]>, u64),
}

impl Chunk {
    /// The members of one word of it.
    fn word(&self, at: usize) -> u64 {
        match self {
            Self::Full => u64::MAX,
            Self::Bits(bits, _) => bits[at],
        }
    }
}

/// The bits of word `at` that lie in `[from, end)`.
fn mask(at: usize, from: u64, end: u64) -> u64 {
    let start = at as u64 * 64;
    let low = from.saturating_sub(start);
    let high = end.saturating_sub(start).min(64);
    if low >= high {
        return 0;
    }
    u64::MAX << low & u64::MAX >> (64 - high)
}

/// The words in which `[from, end)` has bits.
fn words(from: u64, end: u64) -> std::ops::Range<usize> {
    (from / 64) as usize..end.div_ceil(64) as usize
}

/// A set of block numbers below a limit.
pub struct Census {
    limit: u64,
    chunks: BTreeMap<u64, Chunk>,
    count: u64,
}

/// Why a range could not be claimed whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is outside of `[start, limit)`.
    Outside,
    /// This block of it was claimed before; the others are claimed now.
    Twice(u64),
}

impl Census {
    /// An empty set of numbers below `limit`.
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            chunks: BTreeMap::new(),
            count: 0,
        }
    }

    /// Number of members.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether `block` is a member.
    pub fn contains(&self, block: u64) -> bool {
        match self.chunks.get(&(block / CHUNK_BITS)) {
            None => false,
            Some(Chunk::Full) => true,
            Some(Chunk::Bits(bits, _)) => bit(bits, block % CHUNK_BITS),
        }
    }

    /// Claims one block; false if it was a member or is not below the limit.
    pub fn insert(&mut self, block: u64) -> bool {
        self.insert_range(block, 1).is_ok()
    }

    /// Claims `len` blocks from `start`.
    ///
    /// # Errors
    /// [`Claim::Outside`] (nothing is claimed) or the first block claimed twice.
    pub fn insert_range(&mut self, start: u64, len: u64) -> Result<(), Claim> {
        let end = start
            .checked_add(len)
            .filter(|end| *end <= self.limit && len > 0)
            .ok_or(Claim::Outside)?;
        let mut twice = None;
        let mut at = start;
        while at < end {
            let chunk = at / CHUNK_BITS;
            let stop = end.min((chunk + 1) * CHUNK_BITS);
            let found = self.insert_in_chunk(chunk, at % CHUNK_BITS, stop - at);
            twice = twice.or(found.map(|bit| chunk * CHUNK_BITS + bit));
            at = stop;
        }
        twice.map_or(Ok(()), |block| Err(Claim::Twice(block)))
    }

    /// Sets bits of one chunk; the first that was set before.
    fn insert_in_chunk(&mut self, chunk: u64, from: u64, len: u64) -> Option<u64> {
        if len == CHUNK_BITS && !self.chunks.contains_key(&chunk) {
            self.chunks.insert(chunk, Chunk::Full);
            self.count += CHUNK_BITS;
            return None;
        }
        let entry = self
            .chunks
            .entry(chunk)
            .or_insert_with(|| Chunk::Bits(Box::new([0; WORDS]), 0));
        let Chunk::Bits(bits, set) = entry else {
            return Some(from);
        };
        let mut twice = None;
        let mut new = 0;
        for at in words(from, from + len) {
            let asked = mask(at, from, from + len);
            let had = bits[at] & asked;
            if had != 0 {
                twice = twice.or(Some(at as u64 * 64 + u64::from(had.trailing_zeros())));
            }
            bits[at] |= asked;
            new += u64::from((asked & !had).count_ones());
        }
        *set += new;
        self.count += new;
        if *set == CHUNK_BITS {
            *entry = Chunk::Full;
        }
        twice
    }

    /// The first members that two sets share, at most `most`.
    pub fn common(a: &Census, b: &Census, most: usize) -> Vec<u64> {
        let mut found = Vec::new();
        for (chunk, mine) in &a.chunks {
            let Some(theirs) = b.chunks.get(chunk) else {
                continue;
            };
            for at in 0..WORDS {
                let mut both = mine.word(at) & theirs.word(at);
                while both != 0 {
                    if found.len() >= most {
                        return found;
                    }
                    let bit = u64::from(both.trailing_zeros());
                    found.push(chunk * CHUNK_BITS + at as u64 * 64 + bit);
                    both &= both - 1;
                }
            }
        }
        found
    }

    /// Ranges of `[start, limit)` that hold no member of any of the sets, as
    /// `(start, len)` in order.
    pub fn missing(sets: &[&Census], start: u64) -> Vec<(u64, u64)> {
        let limit = sets.first().map_or(0, |set| set.limit);
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut add = |at: u64, len: u64| match ranges.last_mut() {
            Some((start, have)) if *start + *have == at => *have += len,
            _ => ranges.push((at, len)),
        };
        let mut at = start;
        while at < limit {
            let chunk = at / CHUNK_BITS;
            let stop = limit.min((chunk + 1) * CHUNK_BITS);
            let found: Vec<&Chunk> = sets.iter().filter_map(|s| s.chunks.get(&chunk)).collect();
            let whole = found.is_empty();
            if whole || found.iter().any(|chunk| matches!(chunk, Chunk::Full)) {
                if whole {
                    add(at, stop - at);
                }
                at = stop;
                continue;
            }
            let base = chunk * CHUNK_BITS;
            for word in words(at - base, stop - base) {
                let claimed = found.iter().fold(0, |bits, chunk| bits | chunk.word(word));
                let mut free = mask(word, at - base, stop - base) & !claimed;
                while free != 0 {
                    let from = free.trailing_zeros();
                    let len = (free >> from).trailing_ones();
                    add(base + word as u64 * 64 + u64::from(from), u64::from(len));
                    free &= !mask(0, u64::from(from), u64::from(from + len));
                }
            }
            at = stop;
        }
        ranges
    }
}

fn bit(bits: &[u64; WORDS], at: u64) -> bool {
    bits[(at / 64) as usize] >> (at % 64) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Entropy as _;
    use crate::env::testing::TestEntropy;
    use std::collections::BTreeSet;

    /// Against sets of plain numbers, with ranges that cross words and chunks.
    #[test]
    fn it_is_what_a_set_of_numbers_is() {
        let limit = 3 * CHUNK_BITS + 100;
        for seed in 0..20 {
            let entropy = TestEntropy::new(seed);
            let made = || {
                let (mut census, mut plain) = (Census::new(limit), BTreeSet::new());
                for _ in 0..30 {
                    let most = [3, 70, 200, CHUNK_BITS + 70][entropy.range(0, 4) as usize];
                    let start = entropy.range(0, limit);
                    let len = entropy.range(1, most).min(limit - start);
                    let range = start..start + len;
                    let twice = range.clone().find(|block| plain.contains(block));
                    let want = twice.map_or(Ok(()), |block| Err(Claim::Twice(block)));
                    assert_eq!(census.insert_range(start, len), want);
                    plain.extend(range);
                    assert_eq!(census.count(), plain.len() as u64);
                }
                (census, plain)
            };
            let ((a, plain_a), (b, plain_b)) = (made(), made());
            let both: Vec<u64> = plain_a.intersection(&plain_b).copied().collect();
            assert_eq!(Census::common(&a, &b, usize::MAX), both);
            assert_eq!(Census::common(&a, &b, 5), both[..both.len().min(5)]);
            let missing = Census::missing(&[&a, &b], 7);
            assert!(missing.windows(2).all(|two| two[0].0 + two[0].1 < two[1].0));
            let blocks = missing.iter().flat_map(|range| range.0..range.0 + range.1);
            let owned = |block: &u64| plain_a.contains(block) || plain_b.contains(block);
            assert!(blocks.eq((7..limit).filter(|block| !owned(block))));
        }
    }

    #[test]
    fn ranges_are_claimed_once() {
        let mut census = Census::new(200_000);
        assert_eq!(census.insert_range(10, 100_000), Ok(()));
        assert_eq!(census.count(), 100_000);
        assert!(census.contains(10) && census.contains(100_009));
        assert!(!census.contains(9) && !census.contains(100_010));
        assert_eq!(census.insert_range(100_000, 20), Err(Claim::Twice(100_000)));
        assert!(census.contains(100_019));
        assert_eq!(census.insert_range(199_999, 2), Err(Claim::Outside));
        assert_eq!(census.insert_range(u64::MAX, 2), Err(Claim::Outside));
        assert_eq!(census.insert_range(5, 0), Err(Claim::Outside));
        assert!(!census.insert(10) && census.insert(5));
        let missing = Census::missing(&[&census], 2);
        assert_eq!(missing, [(2, 3), (6, 4), (100_020, 99_980)]);
        let mut other = Census::new(200_000);
        other.insert_range(100_020, 99_980).unwrap();
        assert!(Census::common(&census, &other, 9).is_empty());
        other.insert_range(7, 3).unwrap();
        other.insert_range(20, 3).unwrap();
        assert_eq!(Census::common(&census, &other, 2), [20, 21]);
        assert_eq!(Census::missing(&[&census, &other], 4), [(4, 1), (6, 1)]);
    }
}

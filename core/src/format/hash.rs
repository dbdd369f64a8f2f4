//! Hash functions of the format (spec 01 section 16).

use super::consts::{BLOOM_BITS, BLOOM_NRS, BTREE_HASH_BUCKETS};
use super::key::Key;

/// CRC-32C with the register started at all ones and **no final inversion**
/// (spec 01 section 2): the complement of the usual CRC-32C.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32)
}

/// FNV-1a of 32 bits.
pub const fn fnv1a32(bytes: &[u8]) -> u32 {
    let mut h: u32 = 0x811c_9dc5;
    let mut i = 0;
    while i < bytes.len() {
        h = (h ^ bytes[i] as u32).wrapping_mul(0x0100_0193);
        i += 1;
    }
    h
}

/// FNV-1a of 64 bits: srch hashes, quota rule hashes.
pub const fn fnv1a64(bytes: &[u8]) -> u64 {
    let mut h: u64 = 0xcbf2_9ce4_8422_2325;
    let mut i = 0;
    while i < bytes.len() {
        h = (h ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    h
}

/// The 32 bits picked evenly from a name that make the upper half of its dirent hash.
pub fn name_fingerprint(name: &[u8]) -> u32 {
    let bits = name.len() * 8;
    let skip = (bits / 32).max(1);
    let mut out = 0;
    for (i, at) in (0..bits).step_by(skip).take(32).enumerate() {
        let bit = u32::from(name[at / 8] >> (7 - at % 8)) & 1;
        out |= bit << (31 - i);
    }
    out
}

/// Hash of a directory entry's name.
pub fn dirent_hash(name: &[u8]) -> u64 {
    (u64::from(name_fingerprint(name)) << 32) | u64::from(fnv1a32(name))
}

/// Hash of an xattr's full name.
pub fn xattr_hash(name: &[u8]) -> u32 {
    crc32c(name)
}

/// Bucket of a key in the hash table of its leaf block.
pub fn leaf_bucket(key: &Key) -> usize {
    leaf_bucket_bytes(&key.to_bytes())
}

/// As [`leaf_bucket`], from the key's stored bytes.
pub const fn leaf_bucket_bytes(key: &[u8; 32]) -> usize {
    fnv1a32(key) as usize % BTREE_HASH_BUCKETS
}

/// Numbers of the bits that a lock's start key sets in a bloom block.
pub fn bloom_bits(key: &Key) -> [u32; BLOOM_NRS] {
    let mut h = fnv1a64(&key.to_bytes());
    let mut bits = [0; BLOOM_NRS];
    for bit in &mut bits {
        *bit = (h as u32) % BLOOM_BITS;
        h >>= 19;
    }
    bits
}

/// Order of a free extent of `len` blocks: `floor(log8(len))` (spec 01 section 11).
pub const fn free_extent_order(len: u64) -> u64 {
    ((63 - (len | 1).leading_zeros()) / 3) as u64
}

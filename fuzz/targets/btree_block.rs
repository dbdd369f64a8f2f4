//! A large block with any content, for both judges of btree blocks.
#![no_main]
use outrider_core::btree::{block_items, verify_block};
use outrider_core::format::LG_BLOCK_SIZE;
use outrider_core::volume::check::parse_btree_block;
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut block = vec![0; LG_BLOCK_SIZE];
    let n = bytes.len().min(LG_BLOCK_SIZE);
    block[..n].copy_from_slice(&bytes[..n]);
    let parsed = parse_btree_block(&block);
    if verify_block(&block, parsed.level).is_ok() {
        block_items(&block, |_| {});
    }
});

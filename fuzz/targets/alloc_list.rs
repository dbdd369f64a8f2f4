//! A large block with any content as an alloc list block.
#![no_main]
use outrider_core::block::list_entries;
use outrider_core::format::LG_BLOCK_SIZE;
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut block = vec![0; LG_BLOCK_SIZE];
    let n = bytes.len().min(LG_BLOCK_SIZE);
    block[..n].copy_from_slice(&bytes[..n]);
    let _ = list_entries(&block);
});

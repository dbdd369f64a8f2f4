//! A large block with any content as a srch leaf.
#![no_main]
use outrider_core::format::{LG_BLOCK_SIZE, SRCH_ENTRIES_START, SrchBlock};
use outrider_core::volume::check::decode_entries;
use zerocopy::FromBytes;
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut block = vec![0; LG_BLOCK_SIZE];
    let n = bytes.len().min(LG_BLOCK_SIZE);
    block[..n].copy_from_slice(&bytes[..n]);
    let (head, _) = SrchBlock::read_from_prefix(&block).expect("a whole block");
    let _ = decode_entries(&head, &block[SRCH_ENTRIES_START..]);
});

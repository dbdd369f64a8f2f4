//! A large block with any content: both judges of btree blocks, and every operation on
//! those that pass.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrider_core::hurt::tree::block(bytes));

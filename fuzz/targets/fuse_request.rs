//! Any bytes as a FUSE request, in both dialects.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrider_mount::request::fuzz(bytes));

//! Sound trees with a few bytes changed, under every operation.
#![no_main]
use outrider_core::hurt::tree::Trees;
thread_local! { static TREES: Trees = Trees::new(); }
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TREES.with(|trees| trees.exercise(bytes)));

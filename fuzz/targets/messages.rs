//! Messages of mounts, servers, lock clients and servers, and quorum members, changed
//! after framing.
#![no_main]
use outrider_core::hurt::messages::{Wires, datagrams};
thread_local! { static WIRES: Wires = Wires::new(); }
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| match bytes.split_first() {
    Some((first, rest)) if first % 8 == 0 => datagrams(rest),
    Some((_, rest)) => WIRES.with(|wires| wires.exercise(rest)),
    None => {}
});

//! A stream in chunks, whose sizes its first byte decides.
#![no_main]
use outrider_core::wire::Decoder;
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else { return };
    let mut decoder = Decoder::default();
    for chunk in rest.chunks(usize::from(*first) + 1) {
        decoder.push(chunk);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => assert!(frame.seq > 0 && frame.id > 0),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});

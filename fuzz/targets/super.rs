//! A super block with any content and a good CRC.
#![no_main]
use outrider_core::env::DeviceRole;
use outrider_core::format::{Magic, SM_BLOCK_SIZE, SUPER_BLKNO, init_header, seal};
use outrider_core::volume::{check_quorum_config, parse_super};
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut block = vec![0; SM_BLOCK_SIZE];
    init_header(&mut block, Magic::Super, 1, SUPER_BLKNO, 1);
    let n = bytes.len().min(SM_BLOCK_SIZE - 32);
    block[32..32 + n].copy_from_slice(&bytes[..n]);
    seal(&mut block);
    if let Ok(sb) = parse_super(&block, DeviceRole::Meta, Some(1)) {
        let _ = check_quorum_config(&sb.qconf);
    }
});

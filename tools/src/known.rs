//! Recognizes what a device holds already, so that mkfs does not destroy it
//! unasked: filesystems, partition tables, volume managers, swap.

use crate::filedev::FileDevice;
use outrider_core::env::{AlignedBuf, BlockDevice, DeviceError};
use outrider_core::format::Magic;

/// Bytes at an offset that tell a kind of content.
struct Signature {
    name: &'static str,
    offset: usize,
    bytes: &'static [u8],
}

const fn sig(name: &'static str, offset: usize, bytes: &'static [u8]) -> Signature {
    Signature {
        name,
        offset,
        bytes,
    }
}

/// Bytes at the start of a device that are looked at.
const HEAD: usize = 160 * 1024;

const SIGNATURES: &[Signature] = &[
    sig("ScoutFS", 65540, &Magic::Super.value().to_le_bytes()),
    sig("ext2, ext3 or ext4", 1080, &[0x53, 0xef]),
    sig("XFS", 0, b"XFSB"),
    sig("Btrfs", 65536 + 64, b"_BHRfS_M"),
    sig("LVM physical volume", 0, b"LABELONE"),
    sig("LVM physical volume", 512, b"LABELONE"),
    sig("LVM physical volume", 1024, b"LABELONE"),
    sig("LVM physical volume", 1536, b"LABELONE"),
    sig("swap", 4096 - 10, b"SWAPSPACE2"),
    sig("swap", 4096 - 10, b"SWAP-SPACE"),
    sig("swap", 65536 - 10, b"SWAPSPACE2"),
    sig("GPT partition table", 512, b"EFI PART"),
    sig("GPT partition table", 4096, b"EFI PART"),
    sig("NTFS", 3, b"NTFS    "),
    sig("exFAT", 3, b"EXFAT   "),
    sig("FAT", 54, b"FAT12   "),
    sig("FAT", 54, b"FAT16   "),
    sig("FAT", 82, b"FAT32   "),
    sig("MBR partition table or boot sector", 510, &[0x55, 0xaa]),
    sig("LUKS", 0, b"LUKS\xba\xbe"),
    sig("MD RAID", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    sig("MD RAID", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    sig("F2FS", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    sig("GFS2", 65536, &[0x01, 0x16, 0x19, 0x70]),
    sig("OCFS2", 8192, b"OCFSV2"),
    sig("ReiserFS", 65536 + 52, b"ReIsEr"),
    sig("JFS", 32768, b"JFS1"),
    sig("ISO 9660", 32769, b"CD001"),
    sig("squashfs", 0, b"hsqs"),
    sig("EROFS", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    sig(
        "bcache",
        4096 + 24,
        &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca],
    ),
    sig(
        "bcachefs",
        4096 + 24,
        &[0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9],
    ),
    sig("ZFS", 131_072, &[0x0c, 0xb1, 0xba, 0x00]),
    sig(
        "ZFS",
        131_072,
        &[0x00, 0x00, 0x00, 0x00, 0x00, 0xba, 0xb1, 0x0c],
    ),
    sig("DRBD", 4096, b"\x83\x74\x02\x6b"),
];

/// The first kind of content recognized on a device.
///
/// # Errors
/// If the device can not be read.
pub async fn recognize(dev: &FileDevice) -> Result<Option<&'static str>, DeviceError> {
    let len = HEAD.min(usize::try_from(dev.size()).unwrap_or(HEAD));
    if len < 4096 {
        return Ok(None);
    }
    let (head, result) = dev.read(0, AlignedBuf::zeroed(len)).await;
    result?;
    if let Some(name) = recognize_head(&head) {
        return Ok(Some(name));
    }
    recognize_tail(dev).await
}

fn recognize_head(head: &[u8]) -> Option<&'static str> {
    let found = SIGNATURES.iter().find(|s| {
        head.get(s.offset..s.offset + s.bytes.len())
            .is_some_and(|bytes| bytes == s.bytes)
    });
    found.map(|s| s.name)
}

/// RAID metadata of versions 0.90 and 1.0 and the backup GPT are at the end.
async fn recognize_tail(dev: &FileDevice) -> Result<Option<&'static str>, DeviceError> {
    const TAIL: u64 = 128 * 1024;
    const MD: [u8; 4] = [0xfc, 0x4e, 0x2b, 0xa9];
    let size = dev.size();
    if size < TAIL {
        return Ok(None);
    }
    let start = size - TAIL;
    let (tail, result) = dev.read(start, AlignedBuf::zeroed(TAIL as usize)).await;
    result?;
    let v090 = (size & !0xffff) - 0x10000;
    let v10 = ((size / 512 - 16) & !7) * 512;
    for at in [v090, v10] {
        let at = (at - start) as usize;
        if tail[at..at + 4] == MD {
            return Ok(Some("MD RAID"));
        }
    }
    if &tail[tail.len() - 512..tail.len() - 504] == b"EFI PART" {
        return Ok(Some("GPT partition table"));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_on::block_on;
    use crate::filedev::Access;
    use std::os::unix::fs::FileExt;

    #[test]
    fn contents_are_recognized() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let look = || {
            let dev = FileDevice::open(file.path(), Access::Read).unwrap();
            block_on(recognize(&dev)).unwrap()
        };
        assert_eq!(look(), None);
        for s in SIGNATURES {
            file.as_file()
                .write_all_at(s.bytes, s.offset as u64)
                .unwrap();
            let found = look().expect("something is found");
            // Some kinds share bytes with a later one; the name must be of either.
            assert!(SIGNATURES.iter().any(|s| s.name == found));
            let zeros = vec![0; s.bytes.len()];
            file.as_file()
                .write_all_at(&zeros, s.offset as u64)
                .unwrap();
        }
        file.as_file()
            .write_all_at(b"EFI PART", (1 << 20) - 512)
            .unwrap();
        assert_eq!(look(), Some("GPT partition table"));
    }

    #[test]
    fn tiny_files_hold_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(100).unwrap();
        let dev = FileDevice::open(file.path(), Access::Read).unwrap();
        assert_eq!(block_on(recognize(&dev)).unwrap(), None);
    }
}

//! Volumes made by the original, unpacked into memory devices.
//!
//! The archives in `core/tests/golden` are tar files with GNU sparse members,
//! compressed by zstd; only their data is held, so 64 GiB devices fit.

use crate::env::testing::MemDevice;
use std::collections::BTreeMap;
use std::io::Read;

/// The devices of a golden volume.
pub struct Golden {
    /// The metadata device.
    pub meta: MemDevice,
    /// The data device.
    pub data: MemDevice,
}

/// Unpacks a volume by name: `a`, `a1`, `asmall`, `b` or `c1`.
///
/// # Panics
/// If the repository's archives are not there, or damaged.
pub fn golden(name: &str) -> Golden {
    let path = format!(
        "{}/tests/golden/{name}.img.tar.zst",
        env!("CARGO_MANIFEST_DIR")
    );
    let file = std::fs::File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let reader = std::io::BufReader::new(file);
    let stream = ruzstd::decoding::StreamingDecoder::new(reader).expect("a zstd stream");
    let mut devices = unpack(stream);
    let mut take = |suffix: &str| {
        let member = format!("{name}.{suffix}");
        devices
            .remove(&member)
            .unwrap_or_else(|| panic!("{path} has no member {member}"))
    };
    Golden {
        meta: take("meta"),
        data: take("data"),
    }
}

/// Reads all members of a tar stream with GNU sparse headers.
fn unpack(mut tar: impl Read) -> BTreeMap<String, MemDevice> {
    let mut members = BTreeMap::new();
    let mut header = [0; 512];
    loop {
        tar.read_exact(&mut header).expect("a tar header");
        if header.iter().all(|b| *b == 0) {
            return members;
        }
        let name = String::from_utf8_lossy(&header[..100])
            .trim_end_matches('\0')
            .to_owned();
        let stored = number(&header[124..136]);
        let kind = header[156];
        let mut map = Vec::new();
        let mut size = stored;
        if kind == b'S' {
            size = number(&header[483..495]);
            entries(&header[386..482], &mut map);
            let mut more = header[482] != 0;
            while more {
                let mut ext = [0; 512];
                tar.read_exact(&mut ext).expect("a sparse header");
                entries(&ext[..504], &mut map);
                more = ext[504] != 0;
            }
        } else {
            map.push((0, stored));
        }
        let device = MemDevice::new(size);
        for (offset, len) in map.iter().filter(|(_, len)| *len > 0) {
            let mut bytes = vec![0; *len as usize];
            tar.read_exact(&mut bytes).expect("member data");
            device.poke(*offset, &bytes);
        }
        let mut pad = vec![0; (stored.next_multiple_of(512) - stored) as usize];
        tar.read_exact(&mut pad).expect("member padding");
        members.insert(name, device);
    }
}

fn entries(bytes: &[u8], map: &mut Vec<(u64, u64)>) {
    for entry in bytes.chunks_exact(24) {
        if entry[0] != 0 {
            map.push((number(&entry[..12]), number(&entry[12..])));
        }
    }
}

/// A number of a tar header: octal digits, or base 256 if the first bit is set.
fn number(field: &[u8]) -> u64 {
    if field[0] & 0x80 != 0 {
        let rest = field[1..].iter();
        return rest.fold(0, |n, b| n << 8 | u64::from(*b));
    }
    let digits = field.iter().filter(|b| b.is_ascii_digit());
    digits.fold(0, |n, b| n << 3 | u64::from(b - b'0'))
}

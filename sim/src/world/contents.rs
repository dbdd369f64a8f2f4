//! Whose bytes these are, in words, for who reads a replay along. Every write of a
//! workload puts bytes that follow from its number and the place (`model::pattern_byte`).

use crate::model::{FLAT, pattern_byte};
use std::fmt::Write as _;

/// Numbers of writes that are tried.
const TAGS: u64 = 4096;
/// How many stretches are told.
const TOLD: usize = 6;
/// Shorter stretches of bytes prove nothing.
const SHORT: usize = 3;

/// How many bytes at `at` are those of the write `tag`.
fn run(bytes: &[u8], offset: u64, at: usize, tag: u64) -> usize {
    let matches =
        |(index, byte): &(usize, &u8)| **byte == pattern_byte(tag, offset + (at + index) as u64);
    bytes[at..].iter().enumerate().take_while(matches).count()
}

/// What lies in a file from `offset` on: `53 (1 byte)`, `4096 of write 7, 300 zeros`.
pub(super) fn whose(bytes: &[u8], offset: u64) -> String {
    if bytes.is_empty() {
        return "nothing".to_owned();
    }
    let (mut text, mut at, mut told) = (String::new(), 0, 0);
    let mut last = None;
    while at < bytes.len() {
        if told == TOLD {
            let _ = write!(text, ", and {} more bytes", bytes.len() - at);
            break;
        }
        let comma = if at == 0 { "" } else { ", " };
        let zeros = bytes[at..].iter().take_while(|byte| **byte == 0).count();
        // The write that the last stretch was of is the likeliest.
        let tags = last
            .into_iter()
            .chain((0..TAGS).flat_map(|tag| [tag, tag | FLAT]));
        let of = tags
            .map(|tag| (run(bytes, offset, at, tag), tag))
            .find(|(run, _)| *run >= SHORT);
        let len = if zeros > 0 {
            let _ = write!(text, "{comma}{zeros} zeros");
            zeros
        } else if let Some((run, tag)) = of {
            let _ = write!(text, "{comma}{run} of write {}", tag & !FLAT);
            last = Some(tag);
            run
        } else {
            let some: Vec<String> = bytes[at..].iter().take(SHORT).map(hex).collect();
            let _ = write!(text, "{comma}{}", some.join(" "));
            some.len()
        };
        at += len;
        told += 1;
    }
    let _ = write!(text, " ({} bytes)", bytes.len());
    text
}

fn hex(byte: &u8) -> String {
    format!("{byte:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::pattern;

    #[test]
    fn a_file_is_told_by_the_writes_it_is_made_of() {
        let mut bytes = pattern(7, 100, 50).to_vec();
        bytes.extend([0; 20]);
        bytes.extend_from_slice(&pattern(9 | FLAT, 170, 10));
        let told = whose(&bytes, 100);
        assert_eq!(told, "50 of write 7, 20 zeros, 10 of write 9 (80 bytes)");
        assert_eq!(whose(&[], 5), "nothing");
        let one = pattern(3, 0, 1);
        assert_eq!(whose(&one, 0), format!("{:02x} (1 bytes)", one[0]));
    }
}

//! Numbers and sizes of the command line (spec 17 section 9).

use outrider_core::errno::Errno;

/// Parses a number: decimal, `0x` hexadecimal or `0` octal.
///
/// # Errors
/// The message and error number that the commands report.
pub fn parse_u64(text: &str) -> Result<u64, (Errno, String)> {
    let invalid = || (Errno::EINVAL, format!("invalid 64bit value: '{text}'"));
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    if digits.is_empty() || !digits.bytes().all(|b| (b as char).is_digit(radix)) {
        return Err(invalid());
    }
    u64::from_str_radix(digits, radix).map_err(|_| (Errno::ERANGE, invalid().1))
}

/// Parses a size: a number with an optional suffix K, M, G, T or P (powers of 1024).
///
/// # Errors
/// The message and error number that the commands report.
pub fn parse_size(text: &str) -> Result<u64, (Errno, String)> {
    let Some(last) = text.chars().last() else {
        return Err((Errno::EINVAL, "invalid 64bit value: ''".into()));
    };
    let shift = match last.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        'P' => 50,
        c if c.is_ascii_hexdigit() => 0,
        _ => return Err((Errno::EINVAL, format!("unknown suffix: '{text}'"))),
    };
    let digits = if shift > 0 {
        &text[..text.len() - 1]
    } else {
        text
    };
    let number = parse_u64(digits)?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| (Errno::ERANGE, format!("size too big: '{text}'")))
}

/// A size with two decimals in the greatest unit that keeps it at 1 or more.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KB", "MB", "GB", "TB", "PB", "EB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) > 0 {
        unit += 1;
    }
    let scale = 1u64 << (10 * unit);
    format!("{:.2} {}", bytes as f64 / scale as f64, UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_bases() {
        assert_eq!(parse_u64("0"), Ok(0));
        assert_eq!(parse_u64("19"), Ok(19));
        assert_eq!(parse_u64("0x1F"), Ok(31));
        assert_eq!(parse_u64("010"), Ok(8));
        for bad in ["", "0x", "08", "+1", "-1", "1 ", "one"] {
            assert_eq!(parse_u64(bad).unwrap_err().0, Errno::EINVAL, "{bad}");
        }
        let big = parse_u64("18446744073709551616");
        assert_eq!(big.unwrap_err().0, Errno::ERANGE);
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("64G"), Ok(64 << 30));
        assert_eq!(parse_size("1k"), Ok(1024));
        assert_eq!(parse_size("0x10M"), Ok(16 << 20));
        assert_eq!(parse_size("2P"), Ok(2 << 50));
        assert_eq!(parse_size("5X").unwrap_err().1, "unknown suffix: '5X'");
        let big = parse_size("16385P").unwrap_err();
        assert_eq!(big, (Errno::ERANGE, "size too big: '16385P'".into()));
    }

    #[test]
    fn people_read_two_decimals() {
        assert_eq!(human(64 << 30), "64.00 GB");
        assert_eq!(human(1536), "1.50 KB");
        assert_eq!(human(7), "7.00 B");
    }
}

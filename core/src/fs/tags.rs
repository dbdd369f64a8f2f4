//! Tags in the names of `scoutfs.` xattrs, and the numbers in them (spec 13
//! sections 8 and 9).
//!
//! What can go wrong: treating a stored name differently at deletion than at set.
//! There is one parser, it looks at nothing but the name, and both use it.

use crate::errno::Errno;
use crate::format::{Key, XATTR_TOTL_MAX_TEXT};

const PREFIX: &[u8] = b"scoutfs.";
const TAG_LEN: usize = 5;

/// Tags of a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    /// Not listed.
    pub hide: bool,
    /// In the application's index of inodes.
    pub indx: bool,
    /// Found by name over the volume.
    pub srch: bool,
    /// Counts towards a total.
    pub totl: bool,
}

impl Tags {
    /// Tags of an xattr's name; none for names without the prefix.
    ///
    /// # Errors
    /// EINVAL for an unknown or doubled tag, and for totl with indx.
    pub fn parse(name: &[u8]) -> Result<Tags, Errno> {
        let mut tags = Tags::default();
        if name.len() < PREFIX.len() + TAG_LEN + 1 || !name.starts_with(PREFIX) {
            return Ok(tags);
        }
        let mut rest = &name[PREFIX.len()..];
        while let Some(tag) = rest.get(..TAG_LEN) {
            let seen = match tag {
                b"hide." => &mut tags.hide,
                b"indx." => &mut tags.indx,
                b"srch." => &mut tags.srch,
                b"totl." => &mut tags.totl,
                _ => break,
            };
            if std::mem::replace(seen, true) {
                return Err(Errno::EINVAL);
            }
            rest = &rest[TAG_LEN..];
        }
        if !tags.any() || (tags.totl && tags.indx) {
            return Err(Errno::EINVAL);
        }
        Ok(tags)
    }

    /// Whether there is any.
    pub fn any(&self) -> bool {
        self.hide || self.indx || self.srch || self.totl
    }
}

/// Parses a number of a totl name or value or of an indx name.
///
/// # Errors
/// EINVAL by the rules of spec 13 section 9.
pub fn parse_number(text: &[u8]) -> Result<u64, Errno> {
    if text.is_empty() || text.len() > XATTR_TOTL_MAX_TEXT {
        return Err(Errno::EINVAL);
    }
    if text[0] == b'+' || text[text.len() - 1] == b'\n' {
        return Err(Errno::EINVAL);
    }
    // A NUL ends the number as it does in the original; one newline before it too.
    let text = match text.iter().position(|&b| b == 0) {
        Some(end) => text[..end].strip_suffix(b"\n").unwrap_or(&text[..end]),
        None => text,
    };
    let (digits, base) = match text {
        [b'0', b'x' | b'X', rest @ ..] if rest.first().is_some_and(u8::is_ascii_hexdigit) => {
            (rest, 16)
        }
        [b'0', ..] => (text, 8),
        _ => (text, 10),
    };
    if digits.is_empty() {
        return Err(Errno::EINVAL);
    }
    let mut value: u64 = 0;
    for &byte in digits {
        let digit = char::from(byte).to_digit(base).ok_or(Errno::EINVAL)?;
        value = value
            .checked_mul(u64::from(base))
            .and_then(|v| v.checked_add(u64::from(digit)))
            .ok_or(Errno::EINVAL)?;
    }
    Ok(value)
}

/// The last `N` dot-separated numbers of a name, each preceded by a dot.
///
/// # Errors
/// EINVAL if there are fewer dots, or a field is no number.
pub fn dotted<const N: usize>(name: &[u8]) -> Result<[u64; N], Errno> {
    let mut numbers = [0; N];
    let mut rest = name;
    for number in numbers.iter_mut().rev() {
        let dot = rest.iter().rposition(|&b| b == b'.').ok_or(Errno::EINVAL)?;
        *number = parse_number(&rest[dot + 1..])?;
        rest = &rest[..dot];
    }
    Ok(numbers)
}

/// Key of the total that a totl xattr counts towards.
///
/// # Errors
/// EINVAL if the name does not end in three numbers.
pub fn totl_key(name: &[u8]) -> Result<Key, Errno> {
    let [a, b, c] = dotted(name)?;
    Ok(Key::xattr_totl(a, b, c))
}

/// Major and minor number of an indx xattr.
///
/// # Errors
/// EINVAL if the name does not end in two numbers, the first below 256.
pub fn indx_numbers(name: &[u8]) -> Result<(u8, u64), Errno> {
    let [major, minor] = dotted(name)?;
    Ok((u8::try_from(major).map_err(|_| Errno::EINVAL)?, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(name: &str) -> Result<String, Errno> {
        let t = Tags::parse(name.as_bytes())?;
        let named = [
            (t.hide, "hide"),
            (t.indx, "indx"),
            (t.srch, "srch"),
            (t.totl, "totl"),
        ];
        Ok(named
            .iter()
            .filter(|(set, _)| *set)
            .map(|(_, n)| *n)
            .collect::<Vec<_>>()
            .join("+"))
    }

    #[test]
    fn names_parse_as_the_spec_says() {
        let ok = |name, tags: &str| assert_eq!(shown(name).as_deref(), Ok(tags), "{name}");
        let bad = |name| assert_eq!(shown(name), Err(Errno::EINVAL), "{name}");
        ok("scoutfs.hide.a", "hide");
        ok("scoutfs.hide.", "");
        ok("scoutfs.foo", "");
        bad("scoutfs.foobar");
        ok("scoutfs.hide.srch.x", "hide+srch");
        ok("scoutfs.srch.hide.x", "hide+srch");
        bad("scoutfs.hide.hide.x");
        ok("scoutfs.hide.srch.", "hide+srch");
        bad("scoutfs.totl.indx.1.2.3");
        bad("scoutfs.HIDE.xy");
        ok("user.hide.abcdefgh", "");
        ok("trusted.scoutfs.hide.x", "");
    }

    #[test]
    fn numbers_parse_as_the_spec_says() {
        let ok = |text: &[u8], n| assert_eq!(parse_number(text), Ok(n), "{text:?}");
        let bad = |text: &[u8]| assert_eq!(parse_number(text), Err(Errno::EINVAL), "{text:?}");
        ok(b"0", 0);
        ok(b"1", 1);
        ok(b"18446744073709551615", u64::MAX);
        ok(b"010", 8);
        for text in [
            "08",
            "0x",
            "+1",
            "-1",
            " 1",
            "1 ",
            "1\n",
            "",
            "18446744073709551616",
        ] {
            bad(text.as_bytes());
        }
        ok(b"0x10", 16);
        ok(b"0X1f", 31);
        ok(b"0xffffffffffffffff", u64::MAX);
        ok(b"01777777777777777777777", u64::MAX);
        ok(format!("{}1", "0".repeat(22)).as_bytes(), 1);
        bad(format!("{}1", "0".repeat(23)).as_bytes());
        ok(b"12\0", 12);
        ok(b"12\0junk", 12);
        ok(b"10\n\0", 10);
        bad(b"10\n\n\0");
        bad(b"\0");
    }

    #[test]
    fn dotted_numbers_are_taken_from_the_end() {
        assert_eq!(
            totl_key(b"scoutfs.totl.test.1.2.3"),
            Ok(Key::xattr_totl(1, 2, 3))
        );
        assert_eq!(
            totl_key(b"scoutfs.totl.1.2.3"),
            Ok(Key::xattr_totl(1, 2, 3))
        );
        assert_eq!(totl_key(b"scoutfs.totl.a.b.1.2"), Err(Errno::EINVAL));
        assert_eq!(
            totl_key(b"scoutfs.totl.x.0x10.010.9"),
            Ok(Key::xattr_totl(16, 8, 9))
        );
        assert_eq!(indx_numbers(b"scoutfs.indx.t.5.100"), Ok((5, 100)));
        assert_eq!(indx_numbers(b"scoutfs.indx.t.256.1"), Err(Errno::EINVAL));
        assert_eq!(
            dotted::<2>(b"1.2"),
            Err(Errno::EINVAL),
            "each needs its dot"
        );
    }
}

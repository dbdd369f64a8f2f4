//! Error codes of the wire (spec 08 section 2): six errnos have a number, every
//! other one travels as EINVAL.

use crate::errno::Errno;

/// Greatest error code of a valid message.
pub const MAX_ERROR: u8 = 6;

/// The code that carries `errno`.
pub const fn wire_from_errno(errno: Errno) -> u8 {
    match errno {
        Errno::ENOENT => 1,
        Errno::ENOMEM => 2,
        Errno::EIO => 3,
        Errno::ENOSPC => 4,
        Errno::ENOLINK => 6,
        _ => 5,
    }
}

/// The error behind a code; `Ok` for 0. `None` is an invalid message.
pub const fn errno_from_wire(code: u8) -> Option<Result<(), Errno>> {
    Some(match code {
        0 => Ok(()),
        1 => Err(Errno::ENOENT),
        2 => Err(Errno::ENOMEM),
        3 => Err(Errno::EIO),
        4 => Err(Errno::ENOSPC),
        5 => Err(Errno::EINVAL),
        6 => Err(Errno::ENOLINK),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_as_itself_and_others_become_einval() {
        for code in 1..=MAX_ERROR {
            let Some(Err(errno)) = errno_from_wire(code) else {
                panic!("code {code} is an error")
            };
            assert_eq!(wire_from_errno(errno), code);
        }
        assert_eq!(errno_from_wire(0), Some(Ok(())));
        assert_eq!(errno_from_wire(7), None);
        assert_eq!(errno_from_wire(0xea), None);
        for other in [
            Errno::EEXIST,
            Errno::EAGAIN,
            Errno::ESTALE,
            Errno::EOPNOTSUPP,
        ] {
            assert_eq!(wire_from_errno(other), 5);
        }
    }
}

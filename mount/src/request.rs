//! Requests as the kernel sends them, checked before anything looks at them.
//!
//! What can go wrong: a request that is shorter than its kind needs, a name
//! without its NUL, a count that does not fit. Each is a [`ParseError`]; nothing
//! here panics, whatever the bytes (there is a fuzz target).

use crate::abi::{self, op};
use thiserror::Error;
use zerocopy::FromBytes;

/// Why a request could not be understood.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ParseError {
    /// Not even a header.
    #[error("a request of {0} bytes, less than its header")]
    NoHeader(usize),
    /// The header's length is not that of the request.
    #[error("a request of {got} bytes says that it has {said}")]
    Length {
        /// Bytes read.
        got: usize,
        /// Bytes said.
        said: u32,
    },
    /// The body is too short for its kind.
    #[error("request {name} is too short")]
    Short {
        /// The request.
        name: &'static str,
    },
    /// A name or value is missing or malformed.
    #[error("request {name} has a malformed name")]
    Name {
        /// The request.
        name: &'static str,
    },
}

/// A request's kind and arguments, borrowed from the read buffer.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // named after the kernel's requests and fields
pub enum Op<'a> {
    Lookup {
        name: &'a [u8],
    },
    Forget {
        nlookup: u64,
    },
    BatchForget {
        list: &'a [u8],
    },
    Getattr,
    Statx,
    Setattr(abi::SetattrIn),
    Readlink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Mknod {
        args: abi::MknodIn,
        name: &'a [u8],
    },
    Mkdir {
        args: abi::MkdirIn,
        name: &'a [u8],
    },
    Unlink {
        name: &'a [u8],
    },
    Rmdir {
        name: &'a [u8],
    },
    Rename {
        newdir: u64,
        flags: u32,
        name: &'a [u8],
        new_name: &'a [u8],
    },
    Link {
        oldnodeid: u64,
        name: &'a [u8],
    },
    Open(abi::OpenIn),
    Opendir(abi::OpenIn),
    Create {
        args: abi::CreateIn,
        name: &'a [u8],
    },
    Tmpfile {
        args: abi::CreateIn,
    },
    Read(abi::ReadIn),
    Write {
        args: abi::WriteIn,
        data: &'a [u8],
    },
    Readdir {
        args: abi::ReadIn,
        plus: bool,
    },
    Statfs,
    Release(abi::ReleaseIn),
    Releasedir(abi::ReleaseIn),
    Fsync(abi::FsyncIn),
    Setxattr {
        flags: u32,
        name: &'a [u8],
        value: &'a [u8],
    },
    Getxattr {
        size: u32,
        name: &'a [u8],
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a [u8],
    },
    Init {
        args: abi::InitIn,
        flags2: u32,
    },
    Interrupt {
        unique: u64,
    },
    Destroy,
    Ioctl {
        args: abi::IoctlIn,
        data: &'a [u8],
    },
    Fallocate(abi::FallocateIn),
    Lseek(abi::LseekIn),
    Syncfs,
    NotifyReply,
    /// A request that is not served: ENOSYS, which the kernel remembers.
    Other,
}

/// A whole request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Who asks and for which inode.
    pub header: abi::InHeader,
    /// What is asked.
    pub op: Op<'a>,
    /// Request extensions, not yet checked.
    extensions: &'a [u8],
}

struct Body<'a> {
    rest: &'a [u8],
    name: &'static str,
}

impl<'a> Body<'a> {
    fn take<T: FromBytes>(&mut self) -> Result<T, ParseError> {
        let (value, rest) =
            T::read_from_prefix(self.rest).map_err(|_| ParseError::Short { name: self.name })?;
        self.rest = rest;
        Ok(value)
    }

    /// A string ended by a NUL.
    fn string(&mut self) -> Result<&'a [u8], ParseError> {
        let end = self
            .rest
            .iter()
            .position(|&b| b == 0)
            .ok_or(ParseError::Name { name: self.name })?;
        let (text, rest) = self.rest.split_at(end);
        self.rest = &rest[1..];
        Ok(text)
    }

    /// A name: a string that is not empty and has no slash.
    fn entry(&mut self) -> Result<&'a [u8], ParseError> {
        let text = self.string()?;
        if text.is_empty() || text.contains(&b'/') {
            return Err(ParseError::Name { name: self.name });
        }
        Ok(text)
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], ParseError> {
        if len > self.rest.len() {
            return Err(ParseError::Short { name: self.name });
        }
        let (bytes, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(bytes)
    }
}

/// The header alone, if the bytes have one: for answering a malformed request.
pub fn header(bytes: &[u8]) -> Option<abi::InHeader> {
    abi::InHeader::read_from_prefix(bytes).ok().map(|(h, _)| h)
}

/// Understands one request. `setxattr_ext` tells which SETXATTR was negotiated.
///
/// # Errors
/// [`ParseError`] if the bytes are not a request.
pub fn parse(bytes: &[u8], setxattr_ext: bool) -> Result<Request<'_>, ParseError> {
    let header = header(bytes).ok_or(ParseError::NoHeader(bytes.len()))?;
    if header.len as usize != bytes.len() {
        return Err(ParseError::Length {
            got: bytes.len(),
            said: header.len,
        });
    }
    let name = op::name(header.opcode);
    let rest = &bytes[size_of::<abi::InHeader>()..];
    let ext_len = usize::from(header.total_extlen) * 8;
    let body_len = rest
        .len()
        .checked_sub(ext_len)
        .ok_or(ParseError::Short { name })?;
    let (rest, extensions) = rest.split_at(body_len);
    let mut body = Body { rest, name };
    let op = parse_op(&mut body, header.opcode, setxattr_ext)?;
    Ok(Request {
        header,
        op,
        extensions,
    })
}

fn parse_op<'a>(body: &mut Body<'a>, opcode: u32, ext: bool) -> Result<Op<'a>, ParseError> {
    Ok(match opcode {
        op::LOOKUP => Op::Lookup {
            name: body.entry()?,
        },
        op::FORGET => Op::Forget {
            nlookup: body.take::<abi::ForgetIn>()?.nlookup,
        },
        op::BATCH_FORGET => {
            let count = body.take::<abi::BatchForgetIn>()?.count as usize;
            let len = count
                .checked_mul(size_of::<abi::ForgetOne>())
                .ok_or(ParseError::Short { name: body.name })?;
            Op::BatchForget {
                list: body.bytes(len)?,
            }
        }
        op::GETATTR => {
            body.take::<abi::GetattrIn>()?;
            Op::Getattr
        }
        op::STATX => {
            body.take::<abi::StatxIn>()?;
            Op::Statx
        }
        op::SETATTR => Op::Setattr(body.take()?),
        op::READLINK => Op::Readlink,
        op::SYMLINK => Op::Symlink {
            name: body.entry()?,
            target: body.string()?,
        },
        op::MKNOD => Op::Mknod {
            args: body.take()?,
            name: body.entry()?,
        },
        op::MKDIR => Op::Mkdir {
            args: body.take()?,
            name: body.entry()?,
        },
        op::UNLINK => Op::Unlink {
            name: body.entry()?,
        },
        op::RMDIR => Op::Rmdir {
            name: body.entry()?,
        },
        op::RENAME => Op::Rename {
            newdir: body.take::<abi::RenameIn>()?.newdir,
            flags: 0,
            name: body.entry()?,
            new_name: body.entry()?,
        },
        op::RENAME2 => {
            let args: abi::Rename2In = body.take()?;
            Op::Rename {
                newdir: args.newdir,
                flags: args.flags,
                name: body.entry()?,
                new_name: body.entry()?,
            }
        }
        op::LINK => Op::Link {
            oldnodeid: body.take::<abi::LinkIn>()?.oldnodeid,
            name: body.entry()?,
        },
        op::OPEN => Op::Open(body.take()?),
        op::OPENDIR => Op::Opendir(body.take()?),
        op::CREATE => Op::Create {
            args: body.take()?,
            name: body.entry()?,
        },
        op::TMPFILE => Op::Tmpfile { args: body.take()? },
        op::READ => Op::Read(body.take()?),
        op::WRITE => {
            let args: abi::WriteIn = body.take()?;
            Op::Write {
                args,
                data: body.bytes(args.size as usize)?,
            }
        }
        op::READDIR | op::READDIRPLUS => Op::Readdir {
            args: body.take()?,
            plus: opcode == op::READDIRPLUS,
        },
        op::STATFS => Op::Statfs,
        op::RELEASE => Op::Release(body.take()?),
        op::RELEASEDIR => Op::Releasedir(body.take()?),
        op::FSYNC | op::FSYNCDIR => Op::Fsync(body.take()?),
        op::SETXATTR => parse_setxattr(body, ext)?,
        op::GETXATTR => Op::Getxattr {
            size: body.take::<abi::GetxattrIn>()?.size,
            name: body.string()?,
        },
        op::LISTXATTR => Op::Listxattr {
            size: body.take::<abi::GetxattrIn>()?.size,
        },
        op::REMOVEXATTR => Op::Removexattr {
            name: body.string()?,
        },
        op::INIT => Op::Init {
            args: body.take()?,
            // Kernels before 7.36 end here.
            flags2: body.take::<u32>().unwrap_or(0),
        },
        op::INTERRUPT => Op::Interrupt {
            unique: body.take::<abi::InterruptIn>()?.unique,
        },
        op::DESTROY => Op::Destroy,
        op::IOCTL => {
            let args: abi::IoctlIn = body.take()?;
            Op::Ioctl {
                args,
                data: body.bytes(args.in_size as usize)?,
            }
        }
        op::FALLOCATE => Op::Fallocate(body.take()?),
        op::LSEEK => Op::Lseek(body.take()?),
        op::SYNCFS => Op::Syncfs,
        op::NOTIFY_REPLY => Op::NotifyReply,
        _ => Op::Other,
    })
}

fn parse_setxattr<'a>(body: &mut Body<'a>, ext: bool) -> Result<Op<'a>, ParseError> {
    let (size, flags) = if ext {
        let args: abi::SetxattrIn = body.take()?;
        (args.size, args.flags)
    } else {
        let args: abi::SetxattrCompatIn = body.take()?;
        (args.size, args.flags)
    };
    Ok(Op::Setxattr {
        flags,
        name: body.string()?,
        value: body.bytes(size as usize)?,
    })
}

impl Request<'_> {
    /// The supplementary groups that the kernel sent along.
    pub fn groups(&self) -> Vec<u32> {
        let mut rest = self.extensions;
        while let Ok((head, tail)) = abi::ExtHeader::read_from_prefix(rest) {
            let size = head.size as usize;
            let Some(len) = size.checked_sub(size_of::<abi::ExtHeader>()) else {
                break;
            };
            if len > tail.len() {
                break;
            }
            if head.kind == abi::EXT_GROUPS
                && let Ok((count, list)) = u32::read_from_prefix(&tail[..len])
            {
                return list
                    .chunks_exact(4)
                    .take(count as usize)
                    .map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]]))
                    .collect();
            }
            rest = &tail[len..];
        }
        Vec::new()
    }
}

/// The (inode, count) pairs of a BATCH_FORGET.
pub fn forgets(list: &[u8]) -> impl Iterator<Item = abi::ForgetOne> + '_ {
    list.chunks_exact(size_of::<abi::ForgetOne>())
        .filter_map(|one| abi::ForgetOne::read_from_bytes(one).ok())
}

/// What a fuzzer calls: understands any bytes, in both dialects, and looks at
/// everything that a request offers.
pub fn fuzz(bytes: &[u8]) {
    for ext in [false, true] {
        if let Ok(request) = parse(bytes, ext) {
            let groups = request.groups();
            assert!(groups.len() <= bytes.len());
            if let Op::BatchForget { list } = request.op {
                assert!(forgets(list).count() * 16 == list.len());
            }
        }
    }
    // The same bytes as a body of every kind of request.
    for opcode in 0..=op::COPY_FILE_RANGE_64 + 1 {
        let mut body = Body {
            rest: bytes,
            name: op::name(opcode),
        };
        let _ = parse_op(&mut body, opcode, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn request(opcode: u32, body: &[u8], ext: &[u8]) -> Vec<u8> {
        let header = abi::InHeader {
            len: (40 + body.len() + ext.len()) as u32,
            opcode,
            unique: 7,
            nodeid: 1,
            total_extlen: (ext.len() / 8) as u16,
            ..abi::InHeader::default()
        };
        [header.as_bytes(), body, ext].concat()
    }

    #[test]
    fn names_are_checked() {
        let bytes = request(op::LOOKUP, b"file\0", b"");
        let parsed = parse(&bytes, true).unwrap();
        assert!(matches!(parsed.op, Op::Lookup { name: b"file" }));
        for bad in [&b"file"[..], b"\0", b"a/b\0", b""] {
            let bytes = request(op::LOOKUP, bad, b"");
            assert!(matches!(parse(&bytes, true), Err(ParseError::Name { .. })));
        }
    }

    #[test]
    fn groups_come_from_the_extension() {
        let args = abi::CreateIn::default();
        let body = [args.as_bytes(), b"x\0"].concat();
        let mut ext = Vec::new();
        for word in [24u32, abi::EXT_GROUPS, 2, 100, 200, 0] {
            ext.extend(word.to_ne_bytes());
        }
        let bytes = request(op::CREATE, &body, &ext);
        assert_eq!(parse(&bytes, true).unwrap().groups(), [100, 200]);
    }

    #[test]
    fn both_setxattr_dialects_are_understood() {
        let long = abi::SetxattrIn {
            size: 3,
            flags: 1,
            ..Default::default()
        };
        let body = [long.as_bytes(), b"user.a\0abc"].concat();
        let bytes = request(op::SETXATTR, &body, b"");
        let Op::Setxattr { flags, name, value } = parse(&bytes, true).unwrap().op else {
            panic!("not a setxattr")
        };
        assert_eq!((flags, name, value), (1, &b"user.a"[..], &b"abc"[..]));
        let short = abi::SetxattrCompatIn { size: 3, flags: 2 };
        let body = [short.as_bytes(), b"user.a\0abc"].concat();
        let bytes = request(op::SETXATTR, &body, b"");
        let Op::Setxattr { flags, name, value } = parse(&bytes, false).unwrap().op else {
            panic!("not a setxattr")
        };
        assert_eq!((flags, name, value), (2, &b"user.a"[..], &b"abc"[..]));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..20_000 {
            let len = (next() % 200) as usize;
            let mut bytes: Vec<u8> = (0..len).map(|_| next() as u8).collect();
            if len >= 40 && next() % 4 != 0 {
                bytes[..4].copy_from_slice(&(len as u32).to_ne_bytes());
                bytes[4..8].copy_from_slice(&((next() % 56) as u32).to_ne_bytes());
                if next() % 2 == 0 {
                    bytes[36..40].fill(0);
                }
            }
            fuzz(&bytes);
        }
    }
}

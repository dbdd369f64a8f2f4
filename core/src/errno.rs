//! Error numbers as users of the mount see them (Linux values).
//!
//! Layers below have error enums of their own; they become an [`Errno`] in one
//! place, `fs::error`. The wire carries its own codes (spec 08).

/// A positive Linux error number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $value:literal, $doc:literal;)*) => {
        impl Errno {
            $(#[doc = $doc] pub const $name: Errno = Errno($value);)*

            /// The symbolic name, or `E?` for a number that core does not use.
            pub const fn name(self) -> &'static str {
                match self.0 { $($value => stringify!($name),)* _ => "E?" }
            }
        }
    };
}

errnos! {
    EPERM = 1, "Operation not permitted";
    ENOENT = 2, "No such file or directory";
    EINTR = 4, "Interrupted";
    EIO = 5, "I/O error";
    ENXIO = 6, "No such address (seek past the end)";
    E2BIG = 7, "Value too big";
    EBADF = 9, "Bad file handle";
    EAGAIN = 11, "Try again";
    ENOMEM = 12, "Out of memory";
    EACCES = 13, "Permission denied";
    EFAULT = 14, "Bad address";
    EBUSY = 16, "Busy";
    EEXIST = 17, "File exists";
    EXDEV = 18, "Cross-device link";
    ENODEV = 19, "No such device";
    ENOTDIR = 20, "Not a directory";
    EISDIR = 21, "Is a directory";
    EINVAL = 22, "Invalid argument";
    ENOTTY = 25, "Unknown ioctl";
    EFBIG = 27, "File too large";
    ENOSPC = 28, "No space left on device";
    EROFS = 30, "Read-only file system";
    EMLINK = 31, "Too many links";
    ERANGE = 34, "Result too large";
    EDEADLK = 35, "Deadlock avoided";
    ENAMETOOLONG = 36, "Name too long";
    ENOSYS = 38, "Not implemented";
    ENOTEMPTY = 39, "Directory not empty";
    ELOOP = 40, "Too many levels";
    ENODATA = 61, "No data (no such xattr)";
    ENOLINK = 67, "Link severed (forced unmount or fenced)";
    EOVERFLOW = 75, "Value too large for its type";
    EMSGSIZE = 90, "Message of a wrong length";
    EOPNOTSUPP = 95, "Not supported";
    ECONNABORTED = 103, "Connection aborted";
    ENOBUFS = 105, "No buffer space (internal: refill and retry)";
    ENOTCONN = 107, "Not connected";
    ESHUTDOWN = 108, "Shut down";
    ETIMEDOUT = 110, "Timed out";
    ESTALE = 116, "Stale handle";
    EDQUOT = 122, "Quota exceeded";
}

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::error::Error for Errno {}

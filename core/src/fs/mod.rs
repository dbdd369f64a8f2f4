//! The POSIX face of the volume: inodes, directories, xattrs, ACLs, file data.

pub mod api;

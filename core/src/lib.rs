//! Outrider's core: the whole filesystem, with no I/O, no threads and no clock
//! of its own. Everything that is not computation comes through [`env`].
//!
//! Modules from the ground up; a module uses those above it, never those below
//! (docs/design.md section 2).

pub mod alloc;
pub mod archive;
pub mod block;
pub mod btree;
pub mod client;
pub mod env;
pub mod errno;
pub mod format;
pub mod fs;
pub mod guard;
#[cfg(any(test, feature = "testing"))]
pub mod hurt;
pub mod locks;
pub mod log;
pub mod node;
pub mod notice;
pub mod quorum;
pub mod secure;
pub mod server;
pub mod volume;
pub mod wire;

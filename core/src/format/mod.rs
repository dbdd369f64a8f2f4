//! Every structure of the disk and the wire, keys, hashes and block headers
//! (spec 01, and the messages of 08 to 11).
//!
//! Nothing here does I/O or keeps state. Structures have the sizes and offsets
//! of the format by assertion when compiling; all integers are little endian.

mod consts;
mod hash;
mod header;
mod items;
mod key;
mod net;
mod structs;
mod values;

pub use consts::*;
pub use hash::*;
pub use header::*;
pub use items::*;
pub use key::*;
pub use net::*;
pub use structs::*;
pub use values::*;

#[cfg(test)]
mod tests;

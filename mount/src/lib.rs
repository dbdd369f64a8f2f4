//! The FUSE front: requests in, invalidations out, actors on threads; and what a
//! mount needs of its host: options, a record of itself, fence agents.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    reason = "this crate faces the real machine"
)]

pub mod fence;
pub mod options;

//! Test vectors of the format.

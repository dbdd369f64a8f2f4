//! Tests of the block layer.

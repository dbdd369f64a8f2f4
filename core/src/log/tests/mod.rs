//! Tests of items and transactions: the cache alone against a plain map, and the
//! whole log over a memory device with a server of the test's own.

mod cache;

//! Damage: volumes, trees and messages that no correct peer would write, and what
//! must hold when they are used. For tests, which draw the damage from seeds, and for
//! the fuzz targets, which draw it from a fuzzer's bytes: one driver for both.
//!
//! What must hold: every call ends, with a result or an error, in a bounded number of
//! steps. A panic is a failure, and so is a call that waits for ever although nothing
//! that it waits for can come: then a forced unmount must end it.

pub mod messages;
pub mod tree;
pub mod volume;

use crate::env::testnet::{TestNet, TestNetHandle};
use crate::env::{Env, LocalBoxFuture};
use crate::fs::api::{Inval, KernelCache};
use crate::server::{FenceAgent, FenceError, FenceRequest};
use std::rc::Rc;

#[cfg(test)]
mod tests;

/// A kernel that caches nothing.
pub(crate) struct NoKernel;

impl KernelCache for NoKernel {
    fn invalidate(&self, _: Vec<Inval>) -> LocalBoxFuture<'static, Vec<Inval>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

/// Whoever had these volumes mounted is gone.
pub(crate) struct AllGone;

impl FenceAgent for AllGone {
    fn fence(&self, _: &Env, _: FenceRequest) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A network of one's own.
pub(crate) fn network() -> Rc<TestNetHandle> {
    Rc::new(TestNetHandle(Rc::new(TestNet::default())))
}

/// Numbers from bytes, zeros after the end.
pub struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    /// Reads `bytes` from the front.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all bytes are used.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// The next two bytes as a number.
    pub fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }

    /// Up to `n` bytes.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        front
    }
}

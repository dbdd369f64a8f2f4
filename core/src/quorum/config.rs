//! The slots of the quorum configuration, checked at mount (spec 09 section 2).

use crate::format::{QUORUM_MAX_SLOTS, QuorumConfig};
use std::net::SocketAddrV4;
use thiserror::Error;

/// Why a member can not take part (EINVAL at mount).
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No slot has an address.
    #[error("the volume has no quorum slots")]
    Empty,
    /// The own slot has no address.
    #[error("quorum slot {0} is not configured")]
    NotPresent(usize),
    /// An address that no host can have.
    #[error("quorum slot {slot} has the invalid address {addr}")]
    Address {
        /// The slot.
        slot: usize,
        /// Its address.
        addr: SocketAddrV4,
    },
    /// The same address and port twice.
    #[error("quorum slots {first} and {second} both have address {addr}")]
    Duplicate {
        /// One slot.
        first: usize,
        /// The other.
        second: usize,
        /// Their address.
        addr: SocketAddrV4,
    },
}

/// Addresses of the present slots, as read at mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    addrs: [Option<SocketAddrV4>; QUORUM_MAX_SLOTS],
}

impl Slots {
    /// The present slots, unchecked: enough for a client to find the server.
    pub fn of(config: &QuorumConfig) -> Self {
        let mut addrs = [None; QUORUM_MAX_SLOTS];
        for (nr, addr) in config.present() {
            addrs[nr] = Some(addr);
        }
        Self { addrs }
    }

    /// The slots for a member in slot `own`.
    ///
    /// # Errors
    /// If an address is impossible or used twice, or the own slot is absent.
    pub fn checked(config: &QuorumConfig, own: usize) -> Result<Self, ConfigError> {
        let slots = Self::of(config);
        if slots.count() == 0 {
            return Err(ConfigError::Empty);
        }
        if slots.addr(own).is_none() {
            return Err(ConfigError::NotPresent(own));
        }
        for (slot, addr) in slots.iter() {
            let ip = addr.ip();
            if ip.is_multicast()
                || ip.is_broadcast()
                || ip.octets()[0] == 0
                || addr.port() == 0
                || addr.port() == u16::MAX
            {
                return Err(ConfigError::Address { slot, addr });
            }
            if let Some((second, _)) = slots.iter().find(|(nr, a)| *nr > slot && *a == addr) {
                return Err(ConfigError::Duplicate {
                    first: slot,
                    second,
                    addr,
                });
            }
        }
        Ok(slots)
    }

    /// Address of a slot; `None` if it is not present or out of range.
    pub fn addr(&self, slot: usize) -> Option<SocketAddrV4> {
        self.addrs.get(slot).copied().flatten()
    }

    /// Present slots with their addresses, in slot order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, SocketAddrV4)> + '_ {
        self.addrs
            .iter()
            .enumerate()
            .filter_map(|(nr, addr)| Some((nr, (*addr)?)))
    }

    /// Number of present slots.
    pub fn count(&self) -> usize {
        self.iter().count()
    }

    /// Votes that make a leader: 1 of 1 or 2 slots, else a majority.
    pub fn votes_needed(&self) -> usize {
        match self.count() {
            0..=2 => 1,
            n => n / 2 + 1,
        }
    }
}

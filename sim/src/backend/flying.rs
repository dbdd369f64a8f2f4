//! What is under way between the nodes and their devices, and between each other: for
//! whoever looks at a moment (`world::snapshot`). Nothing here decides anything.

use crate::plan::DiskOp;
use outrider_core::env::DeviceRole;
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::rc::{Rc, Weak};

/// A list of things that leave it by themselves.
pub(super) struct Ledger<T> {
    next: Cell<u64>,
    all: RefCell<BTreeMap<u64, T>>,
}

impl<T> Default for Ledger<T> {
    fn default() -> Self {
        Self {
            next: Cell::new(0),
            all: RefCell::default(),
        }
    }
}

impl<T> Ledger<T> {
    /// Lists something until the entry is dropped.
    pub fn enter(self: &Rc<Self>, what: T) -> Entry<T> {
        let id = self.next.get();
        self.next.set(id + 1);
        self.all.borrow_mut().insert(id, what);
        Entry {
            ledger: Rc::downgrade(self),
            id,
        }
    }

    /// Strikes out what is no more.
    pub fn keep(&self, keep: impl Fn(&T) -> bool) {
        self.all.borrow_mut().retain(|_, what| keep(what));
    }

    /// What is listed, the oldest first.
    pub fn list(&self) -> Vec<T>
    where
        T: Clone,
    {
        self.all.borrow().values().cloned().collect()
    }
}

/// Something listed.
pub(super) struct Entry<T> {
    ledger: Weak<Ledger<T>>,
    id: u64,
}

impl<T> Drop for Entry<T> {
    fn drop(&mut self) {
        if let Some(ledger) = self.ledger.upgrade() {
            ledger.all.borrow_mut().remove(&self.id);
        }
    }
}

/// A request that a device has not ended. Times are nanoseconds of the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Request {
    /// Whose.
    pub node: u32,
    /// Of which device.
    #[serde(serialize_with = "role_name")]
    pub device: DeviceRole,
    /// What.
    pub op: DiskOp,
    /// Where.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// Since when.
    pub asked: u64,
    /// When it ends, if its machine does not stand still then.
    pub ends: u64,
}

fn role_name<S: serde::Serializer>(role: &DeviceRole, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{role:?}"))
}

/// Bytes on their way through the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flying {
    /// From where.
    pub from: Ipv4Addr,
    /// To where.
    pub to: Ipv4Addr,
    /// A datagram, or a piece of a stream.
    pub datagram: bool,
    /// How many bytes; 0 for the end of a stream.
    pub bytes: usize,
    /// Since when.
    pub sent: u64,
    /// When it arrives.
    pub arrives: u64,
}

/// What of one direction of a stream has arrived and is not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Waiting {
    /// From where.
    pub from: Ipv4Addr,
    /// To where.
    pub to: Ipv4Addr,
    /// Bytes that the reader has not taken.
    pub unread: usize,
    /// Pieces that a partition holds back.
    pub held: usize,
}

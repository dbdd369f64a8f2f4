//! What happened, as a running hash and (on replay) event by event.
//!
//! The hash covers time, node, kind and arguments of every event, so that two
//! runs of a seed can be compared without keeping either.

use std::cell::{Cell, RefCell};

/// A 64 bit digest (FNV-1a over words, mixed), stable everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    /// Adds one number.
    pub fn word(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }

    /// Adds bytes and their number.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
        let rest = chunks.remainder();
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            self.word(u64::from_le_bytes(word));
        }
    }

    /// The digest so far.
    pub fn value(self) -> u64 {
        let x = self.0;
        let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        x ^ (x >> 32)
    }
}

/// The digest of some bytes.
pub fn digest(bytes: &[u8]) -> u64 {
    let mut digest = Digest::default();
    digest.bytes(bytes);
    digest.value()
}

/// The digest of a long stretch of bytes. It has another value than [`digest`], which takes
/// one word after the other: here four are on their way at a time.
pub fn digest_of_long(bytes: &[u8]) -> u64 {
    let mut lanes = [0, 1, 2, 3].map(|lane| {
        let mut digest = Digest::default();
        digest.word(lane);
        digest
    });
    let mut chunks = bytes.chunks_exact(32);
    for chunk in &mut chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            lane.word(u64::from_le_bytes(bytes));
        }
    }
    let mut digest = Digest::default();
    for lane in lanes {
        digest.word(lane.0);
    }
    digest.word(bytes.len() as u64);
    digest.bytes(chunks.remainder());
    digest.value()
}

/// Something that happened, for who reads along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Simulated nanoseconds.
    pub nanos: u64,
    /// Its number; remarks have none.
    pub number: Option<u64>,
    /// Of which node.
    pub node: u32,
    /// What kind.
    pub kind: &'static str,
    /// What exactly.
    pub text: String,
    /// What it belongs to: the end of a fault, or the message that arrives here.
    pub link: Link,
}

/// What a remark belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    /// Nothing.
    #[default]
    None,
    /// It lasts until this time.
    Until(u64),
    /// A message with this number leaves for this node.
    Sends(u64, u32),
    /// The message with this number arrives.
    Gets(u64),
}

/// A time as the lines of events have it: seconds, microseconds, nanoseconds.
pub fn seconds(nanos: u64) -> String {
    let (sec, ns) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    format!("{sec}.{:06}.{:03}", ns / 1000, ns % 1000)
}

impl Event {
    /// One line: time, number, node, kind, text.
    pub fn line(&self) -> String {
        let time = seconds(self.nanos);
        let number = self.number.map_or("-".to_owned(), |n| format!("#{n}"));
        format!(
            "{time:>16} {number:<7} n{} {:<10} {}",
            self.node, self.kind, self.text
        )
    }
}

/// Receives the events of a replay.
pub type Sink = Box<dyn FnMut(Event)>;

/// The events of one world.
#[derive(Default)]
pub struct Trace {
    digest: Cell<Digest>,
    count: Cell<u64>,
    messages: Cell<u64>,
    sink: RefCell<Option<Sink>>,
}

impl Trace {
    /// A trace that also hands its events to `sink`, if there is one.
    pub fn new(sink: Option<Sink>) -> Self {
        Self {
            sink: RefCell::new(sink),
            ..Self::default()
        }
    }

    /// Records one event at `nanos` of simulated time. `text` is asked for only
    /// if somebody reads along; what it says must follow from the arguments.
    pub fn event(
        &self,
        nanos: u64,
        node: u32,
        kind: &'static str,
        args: &[u64],
        text: impl FnOnce() -> String,
    ) {
        let mut digest = self.digest.get();
        digest.word(nanos);
        digest.word(u64::from(node));
        digest.bytes(kind.as_bytes());
        for arg in args {
            digest.word(*arg);
        }
        self.digest.set(digest);
        let number = self.count.get() + 1;
        self.count.set(number);
        self.tell(nanos, Some(number), node, kind, Link::None, text);
    }

    /// Says something that follows from the events and is no part of the digest.
    pub fn remark(
        &self,
        nanos: u64,
        node: u32,
        kind: &'static str,
        link: Link,
        text: impl FnOnce() -> String,
    ) {
        self.tell(nanos, None, node, kind, link, text);
    }

    fn tell(
        &self,
        nanos: u64,
        number: Option<u64>,
        node: u32,
        kind: &'static str,
        link: Link,
        text: impl FnOnce() -> String,
    ) {
        if let Some(sink) = &mut *self.sink.borrow_mut() {
            sink(Event {
                nanos,
                number,
                node,
                kind,
                text: text(),
                link,
            });
        }
    }

    /// Whether somebody reads along.
    pub fn is_logging(&self) -> bool {
        self.sink.borrow().is_some()
    }

    /// A number for a message that leaves.
    pub fn next_message(&self) -> u64 {
        self.messages.replace(self.messages.get() + 1)
    }

    /// Digest of all events so far.
    pub fn hash(&self) -> u64 {
        self.digest.get().value()
    }

    /// Number of events so far.
    pub fn count(&self) -> u64 {
        self.count.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_of_a_long_stretch_sees_every_bit_and_the_order() {
        let bytes: Vec<u8> = (0..4101_u32).map(|at| ((at * 7) >> 3) as u8).collect();
        let whole = digest_of_long(&bytes);
        assert_eq!(whole, digest_of_long(&bytes.clone()));
        for at in (0..bytes.len()).step_by(17).chain([4096, 4100]) {
            let mut other = bytes.clone();
            other[at] ^= 1 << (at % 8);
            assert_ne!(whole, digest_of_long(&other), "byte {at}");
        }
        for (one, other) in [(0, 8), (0, 32), (8, 40), (3, 4)] {
            let mut swapped = bytes.clone();
            swapped.swap(one, other);
            assert_ne!(whole, digest_of_long(&swapped), "bytes {one} and {other}");
        }
        assert_ne!(digest_of_long(&[0; 32]), digest_of_long(&[0; 64]));
        assert_ne!(digest_of_long(&[]), digest_of_long(&[0]));
    }
}

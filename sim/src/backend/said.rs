//! What passes over the simulated network, in words, for who reads a replay along.
//!
//! Nothing of it is done in a sweep. What can go wrong: bytes that cannot be read
//! (encrypted, or cut): then only their number is told.

use super::net::SimNet;
use crate::trace::Link;
use outrider_core::format::{
    Key, NetCmd, NetLock, QUORUM_MSG_HEARTBEAT, QUORUM_MSG_REQUEST_VOTE, QUORUM_MSG_RESIGNATION,
    QUORUM_MSG_VOTE, QuorumMessage,
};
use outrider_core::locks::Mode;
use outrider_core::wire::Decoder;
use std::net::Ipv4Addr;
use zerocopy::FromBytes;

impl SimNet {
    /// Tells who reads along of a message that leaves, and gives its number.
    pub(super) fn leaves(
        &self,
        from: Ipv4Addr,
        to: Ipv4Addr,
        what: impl FnOnce() -> String,
    ) -> Option<u64> {
        let trace = &self.sim.trace;
        if from == to || !trace.is_logging() {
            return None;
        }
        let number = trace.next_message();
        let link = Link::Sends(number, node_of(to));
        trace.remark(self.sim.now(), node_of(from), "send", link, || {
            format!("to n{}: {}", node_of(to), what())
        });
        Some(number)
    }

    /// Tells who reads along that a message has arrived.
    pub(super) fn arrives(&self, message: u64, to: Ipv4Addr) {
        let (now, link) = (self.sim.now(), Link::Gets(message));
        let trace = &self.sim.trace;
        trace.remark(now, node_of(to), "arrive", link, String::new);
    }
}

/// The number of the node with this address.
fn node_of(ip: Ipv4Addr) -> u32 {
    let [_, _, high, low] = ip.octets();
    ((u32::from(high) << 8) | u32::from(low)).saturating_sub(1)
}

/// What a datagram says.
pub(super) fn datagram(bytes: &[u8]) -> String {
    let Ok(message) = QuorumMessage::read_from_bytes(bytes) else {
        return format!("{} bytes", bytes.len());
    };
    let kind = match message.kind {
        QUORUM_MSG_REQUEST_VOTE => "REQUEST_VOTE",
        QUORUM_MSG_VOTE => "VOTE",
        QUORUM_MSG_HEARTBEAT => "HEARTBEAT",
        QUORUM_MSG_RESIGNATION => "RESIGNATION",
        _ => "a message of no known kind",
    };
    format!("{kind} of term {}", message.term.get())
}

/// What the messages in a piece of a stream are.
pub(super) fn frames(bytes: &[u8]) -> String {
    let mut decoder = Decoder::default();
    decoder.push(bytes);
    let mut said = Vec::new();
    while let Ok(Some(frame)) = decoder.next_frame() {
        let way = if frame.response { " answer" } else { "" };
        let what = match &frame.body {
            Err(errno) => format!(" {errno}"),
            Ok(payload) if frame.cmd == NetCmd::Lock => lock(payload),
            Ok(_) => String::new(),
        };
        said.push(format!("{:?}{way} {}{what}", frame.cmd, frame.id));
    }
    if said.is_empty() {
        return format!("{} bytes", bytes.len());
    }
    said.join(", ")
}

fn lock(payload: &[u8]) -> String {
    let Ok(lock) = NetLock::read_from_bytes(payload) else {
        return String::new();
    };
    let mode = |byte| Mode::from_wire(byte).map_or(format!("mode {byte}"), |m| format!("{m:?}"));
    let (key, old, new) = (
        Key::from(lock.key),
        mode(lock.old_mode),
        mode(lock.new_mode),
    );
    format!(" of {}.{}: {old} to {new}", key.zone, key.first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_core::format::ZONE_FS;
    use outrider_core::wire::Frame;
    use zerocopy::IntoBytes;

    #[test]
    fn messages_are_told_in_words() {
        let message = NetLock {
            key: Key::new(ZONE_FS, 4096, 0, 0, 0, 0).into(),
            old_mode: 1,
            ..NetLock::default()
        };
        let frame = Frame {
            seq: 1,
            recv_seq: 0,
            id: 7,
            cmd: NetCmd::Lock,
            response: true,
            body: Ok(message.as_bytes().to_vec().into()),
        };
        let said = frames(&frame.to_bytes());
        assert!(said.starts_with("Lock answer 7 of "), "{said}");
        assert!(said.ends_with("Read to Null"), "{said}");
        assert_eq!(frames(b"abc"), "3 bytes");
        assert_eq!(datagram(b"abc"), "3 bytes");
        assert_eq!(node_of(Ipv4Addr::new(10, 0, 1, 3)), 258);
    }
}

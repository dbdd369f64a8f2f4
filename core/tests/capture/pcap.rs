//! Reads a capture of loopback traffic: Ethernet, IPv4, TCP streams put together
//! again, UDP datagrams.
//!
//! What can go wrong: a segment that is lost, repeated or out of order. Repeats are
//! dropped, early ones kept until their turn, and a hole that is never filled fails
//! the test.

use std::collections::BTreeMap;
use std::io::Read;

/// One end: the port. All addresses of the capture are 127.0.0.1.
pub type Port = u16;

/// A datagram.
pub struct Udp {
    /// Sender's port.
    pub from: Port,
    /// Receiver's port.
    pub to: Port,
    /// Payload.
    pub bytes: Vec<u8>,
}

/// Something that happens to a TCP connection, in the order of the capture.
#[derive(Debug, PartialEq, Eq)]
pub enum Tcp {
    /// The connection was made; the first port is the client's.
    Open(Port, Port),
    /// The next bytes of the stream from the first port to the second.
    Bytes(Port, Port, Vec<u8>),
    /// The first port ended its direction to the second.
    Fin(Port, Port),
    /// Nobody listens at the first port.
    Refused(Port, Port),
}

/// A whole capture.
#[derive(Default)]
pub struct Capture {
    /// Datagrams in order.
    pub udp: Vec<Udp>,
    /// What happened to connections, in order.
    pub tcp: Vec<Tcp>,
}

const RECORD: usize = 16;
const ETHERNET: usize = 14;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// One direction of a connection.
#[derive(Default)]
struct Direction {
    /// Sequence number of the next byte.
    next: u32,
    /// Segments that came before their turn, by distance from the first byte.
    early: BTreeMap<u32, Vec<u8>>,
}

/// Unpacks a zstd file.
pub fn unzstd(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/golden/e/{name}", env!("CARGO_MANIFEST_DIR"));
    let file = std::fs::File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut stream = ruzstd::decoding::StreamingDecoder::new(file).expect("a zstd stream");
    let mut out = Vec::new();
    stream.read_to_end(&mut out).expect("a whole stream");
    out
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes[..2].try_into().expect("two bytes"))
}

/// Reads a capture file.
pub fn read(name: &str) -> Capture {
    let file = unzstd(name);
    assert_eq!(le32(&file), 0xa1b2_c3d4, "microseconds, little endian");
    assert_eq!(le32(&file[20..]), 1, "Ethernet");
    let mut capture = Capture::default();
    let mut streams = BTreeMap::new();
    let mut rest = &file[24..];
    while !rest.is_empty() {
        let (kept, sent) = (le32(&rest[8..]), le32(&rest[12..]));
        assert_eq!(kept, sent, "no packet is cut");
        let packet = &rest[RECORD..RECORD + kept as usize];
        rest = &rest[RECORD + kept as usize..];
        assert_eq!(be16(&packet[12..]), 0x0800, "IPv4");
        let ip = &packet[ETHERNET..];
        let head = usize::from(ip[0] & 15) * 4;
        let payload = &ip[head..usize::from(be16(&ip[2..]))];
        let (from, to) = (be16(payload), be16(&payload[2..]));
        match ip[9] {
            17 => capture.udp.push(Udp {
                from,
                to,
                bytes: payload[8..].to_vec(),
            }),
            6 => segment(&mut capture.tcp, &mut streams, (from, to), payload),
            other => panic!("protocol {other}"),
        }
    }
    for (ports, stream) in &streams {
        assert!(stream.early.is_empty(), "a hole in the stream {ports:?}");
    }
    capture
}

fn segment(
    out: &mut Vec<Tcp>,
    streams: &mut BTreeMap<(Port, Port), Direction>,
    (from, to): (Port, Port),
    tcp: &[u8],
) {
    let (seq, flags) = (be32(&tcp[4..]), tcp[13]);
    let data = &tcp[usize::from(tcp[12] >> 4) * 4..];
    if flags & SYN != 0 {
        let stream = Direction {
            next: seq.wrapping_add(1),
            early: BTreeMap::new(),
        };
        streams.insert((from, to), stream);
        if flags & ACK != 0 {
            out.push(Tcp::Open(to, from));
        }
        return;
    }
    if flags & RST != 0 {
        out.push(Tcp::Refused(from, to));
        return;
    }
    let stream = streams.get_mut(&(from, to)).expect("a SYN came first");
    // Less than half the number space away: early. More: seen before.
    let ahead = seq.wrapping_sub(stream.next);
    if !data.is_empty() && ahead < 1 << 31 {
        stream.early.insert(seq, data.to_vec());
    }
    while let Some(data) = stream.early.remove(&stream.next) {
        stream.next = stream.next.wrapping_add(data.len() as u32);
        out.push(Tcp::Bytes(from, to, data));
    }
    if flags & FIN != 0 {
        assert!(stream.early.is_empty(), "a hole before the end");
        out.push(Tcp::Fin(from, to));
    }
}

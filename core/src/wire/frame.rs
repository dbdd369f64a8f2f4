//! Framing (spec 08 section 2): a 32 byte header, then up to 1100 bytes.
//!
//! What can go wrong: a chunk that ends in the middle of a header or payload, and
//! bytes that are no message at all. The decoder keeps at most one message that is
//! not whole yet, and judges a header before it waits for the payload, so that
//! garbage never makes it hold more than one header's worth of promise.

use super::error::{MAX_ERROR, errno_from_wire, wire_from_errno};
use crate::errno::Errno;
use crate::format::{NET_FLAG_RESPONSE, NET_MAX_DATA_LEN, NetCmd, NetHeader};
use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Size of a message's header in bytes.
pub const HEADER_LEN: usize = size_of::<NetHeader>();

/// Why bytes are not a message. Each breaks the connection.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// Sequence number 0.
    #[error("message with seq 0")]
    ZeroSeq,
    /// Request number 0.
    #[error("message with id 0")]
    ZeroId,
    /// No such command.
    #[error("message with unknown command {0}")]
    Command(u8),
    /// Flags that do not exist.
    #[error("message with unknown flags {0:#04x}")]
    Flags(u8),
    /// No such error code.
    #[error("message with unknown error code {0}")]
    ErrorCode(u8),
    /// A longer payload than any message has.
    #[error("message with {0} bytes of payload")]
    TooLong(u16),
    /// A request that carries an error.
    #[error("request {cmd:?} with error code {code}")]
    RequestError {
        /// Command of the request.
        cmd: NetCmd,
        /// The code.
        code: u8,
    },
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Sender's sequence number.
    pub seq: u64,
    /// Greatest seq the sender had received.
    pub recv_seq: u64,
    /// Number of the request.
    pub id: u64,
    /// Command.
    pub cmd: NetCmd,
    /// Whether this answers a request.
    pub response: bool,
    /// Payload, or the error of a response.
    pub body: Result<Bytes, Errno>,
}

impl Frame {
    /// Appends the message to `out`.
    ///
    /// # Panics
    /// If the payload is longer than a message may be, or a request carries an error.
    pub fn encode(&self, out: &mut BytesMut) {
        let (error, data): (u8, &[u8]) = match &self.body {
            Ok(data) => (0, data),
            Err(errno) => (wire_from_errno(*errno), &[]),
        };
        assert!(data.len() <= NET_MAX_DATA_LEN, "payload of {}", data.len());
        assert!(self.response || error == 0, "a request carries no error");
        assert!(self.seq > 0 && self.id > 0, "numbers start at 1");
        let header = NetHeader {
            seq: self.seq.into(),
            recv_seq: self.recv_seq.into(),
            id: self.id.into(),
            data_len: (data.len() as u16).into(),
            cmd: self.cmd as u8,
            flags: if self.response { NET_FLAG_RESPONSE } else { 0 },
            error,
            pad: [0; 3],
        };
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(data);
    }

    /// The message as bytes of its own.
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::new();
        self.encode(&mut out);
        out.freeze()
    }
}

/// Checks everything that a header alone can tell (spec 08 section 2, points 1 to 4).
fn judge(header: &NetHeader) -> Result<NetCmd, FrameError> {
    if header.seq.get() == 0 {
        return Err(FrameError::ZeroSeq);
    }
    if header.id.get() == 0 {
        return Err(FrameError::ZeroId);
    }
    let cmd = NetCmd::from_value(header.cmd).ok_or(FrameError::Command(header.cmd))?;
    if header.flags & !NET_FLAG_RESPONSE != 0 {
        return Err(FrameError::Flags(header.flags));
    }
    if header.error > MAX_ERROR {
        return Err(FrameError::ErrorCode(header.error));
    }
    if usize::from(header.data_len.get()) > NET_MAX_DATA_LEN {
        return Err(FrameError::TooLong(header.data_len.get()));
    }
    if header.flags & NET_FLAG_RESPONSE == 0 && header.error != 0 {
        return Err(FrameError::RequestError {
            cmd,
            code: header.error,
        });
    }
    Ok(cmd)
}

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: BytesMut,
}

impl Decoder {
    /// Adds bytes as they came from the stream.
    pub fn push(&mut self, chunk: &[u8]) {
        self.bytes.extend_from_slice(chunk);
    }

    /// The next whole message; `None` until more bytes come.
    ///
    /// # Errors
    /// The first invalid header. The stream is of no use after it.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Ok((header, _)) = NetHeader::read_from_prefix(&self.bytes) else {
            return Ok(None);
        };
        let cmd = judge(&header)?;
        let len = usize::from(header.data_len.get());
        if self.bytes.len() < HEADER_LEN + len {
            return Ok(None);
        }
        self.bytes.advance(HEADER_LEN);
        // A copy, so that a small payload that is kept does not keep a whole chunk.
        let data = Bytes::copy_from_slice(&self.bytes[..len]);
        self.bytes.advance(len);
        let error = errno_from_wire(header.error).expect("judged above");
        Ok(Some(Frame {
            seq: header.seq.get(),
            recv_seq: header.recv_seq.get(),
            id: header.id.get(),
            cmd,
            response: header.flags & NET_FLAG_RESPONSE != 0,
            body: error.map(|()| data),
        }))
    }
}

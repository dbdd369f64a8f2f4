//! Greetings (spec 08 section 4): who is at the other end, and whether they knew
//! each other before. Pure functions; client and listener carry the bytes.

use super::frame::Frame;
use super::listener::GreetingInfo;
use crate::errno::Errno;
use crate::format::{NET_GREETING_FLAG_FAREWELL, NET_GREETING_FLAG_QUORUM, NetCmd, NetGreeting};
use bytes::Bytes;
use std::net::SocketAddrV4;
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Why a client does not accept a server's greeting.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum GreetingError {
    /// Something else came first.
    #[error("the server's first message is no greeting response")]
    NotAGreeting,
    /// The server said no.
    #[error("the server refused the greeting: {0}")]
    Refused(Errno),
    /// A wrong length, volume, format version or mount, or no term.
    #[error("the server's greeting does not belong to this mount and volume")]
    Mismatch,
}

/// The client's request. `recv_seq` is the connection's.
pub fn request(seq: u64, recv_seq: u64, id: u64, greeting: &NetGreeting) -> Frame {
    Frame {
        seq,
        recv_seq,
        id,
        cmd: NetCmd::Greeting,
        response: false,
        body: Ok(Bytes::copy_from_slice(greeting.as_bytes())),
    }
}

/// The server's answer to greeting `id`.
pub fn response(seq: u64, id: u64, body: Result<NetGreeting, Errno>) -> Frame {
    Frame {
        seq,
        recv_seq: 0,
        id,
        cmd: NetCmd::Greeting,
        response: true,
        body: body.map(|greeting| Bytes::copy_from_slice(greeting.as_bytes())),
    }
}

/// The client's judgement of the server's first message: the server's term.
///
/// # Errors
/// The socket is closed and another attempt made after the back-off.
pub fn accept_response(frame: &Frame, asked: &NetGreeting) -> Result<u64, GreetingError> {
    if frame.cmd != NetCmd::Greeting || !frame.response {
        return Err(GreetingError::NotAGreeting);
    }
    let bytes = frame
        .body
        .as_ref()
        .map_err(|e| GreetingError::Refused(*e))?;
    let answer = NetGreeting::read_from_bytes(bytes).map_err(|_| GreetingError::Mismatch)?;
    let same = answer.fsid == asked.fsid && answer.fmt_vers == asked.fmt_vers;
    match answer.server_term.get() {
        term if same && term != 0 => Ok(term),
        _ => Err(GreetingError::Mismatch),
    }
}

/// The server's first judgement of a greeting request.
///
/// # Errors
/// EINVAL for a wrong length, volume or format version, and for a rid that no
/// mount has.
pub fn judge_request(
    payload: &[u8],
    peer: SocketAddrV4,
    fsid: u64,
    fmt_vers: u64,
    term: u64,
) -> Result<GreetingInfo, Errno> {
    let greeting = NetGreeting::read_from_bytes(payload).map_err(|_| Errno::EINVAL)?;
    let rid = greeting.rid.get();
    if greeting.fsid.get() != fsid
        || greeting.fmt_vers.get() != fmt_vers
        || rid == 0
        || rid == u64::MAX
    {
        return Err(Errno::EINVAL);
    }
    let flags = greeting.flags.get();
    let client_term = greeting.server_term.get();
    Ok(GreetingInfo {
        rid,
        peer,
        quorum: flags & NET_GREETING_FLAG_QUORUM != 0,
        farewell: flags & NET_GREETING_FLAG_FAREWELL != 0,
        client_term,
        first_contact: client_term != term,
    })
}

/// What an accepted greeting does to the client's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// There was none: make one.
    New,
    /// The client has nothing to do with the one there is: free it and make one.
    Replace,
    /// The socket takes the session over.
    Move,
    /// A later attempt of this client was here first, or its state is gone.
    Refuse,
}

/// The session that a client has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Current {
    /// Id of the greeting that attached it: the larger, the more recent.
    pub greeting_id: u64,
    /// Whether anything but greetings was received on it.
    pub used: bool,
}

/// Decides how a socket with greeting `id` is attached (spec 08 section 4, server
/// step 6).
///
/// A client that names another term, or none, never saw this server's answer. Then
/// a session that is unused was made for a greeting whose answer was lost: it is
/// kept, with whatever was queued for the client meanwhile (13.4). A used one is of
/// a time before the client went to another server and came back: it is replaced,
/// since the client started its numbers again.
pub fn decide(current: Option<Current>, id: u64, greeting: &GreetingInfo) -> Attach {
    match current {
        Some(current) if current.greeting_id >= id => Attach::Refuse,
        Some(current) if greeting.first_contact && current.used => Attach::Replace,
        Some(_) => Attach::Move,
        None if greeting.first_contact || greeting.farewell => Attach::New,
        None => Attach::Refuse,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const TERM: u64 = 7;

    fn greeting(client_term: u64, farewell: bool) -> GreetingInfo {
        GreetingInfo {
            rid: 5,
            peer: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1),
            quorum: false,
            farewell,
            client_term,
            first_contact: client_term != TERM,
        }
    }

    fn current(greeting_id: u64, used: bool) -> Option<Current> {
        Some(Current { greeting_id, used })
    }

    #[test]
    fn the_table_of_who_is_what() {
        for farewell in [false, true] {
            for other in [0, 6] {
                let greeting = greeting(other, farewell);
                assert_eq!(decide(None, 3, &greeting), Attach::New);
                assert_eq!(decide(current(2, false), 3, &greeting), Attach::Move);
                assert_eq!(decide(current(2, true), 3, &greeting), Attach::Replace);
            }
            for used in [false, true] {
                let same = greeting(TERM, farewell);
                assert_eq!(decide(current(2, used), 3, &same), Attach::Move);
                for (late, term) in [(3, 0), (3, 6), (4, TERM)] {
                    let got = decide(current(late, used), 3, &greeting(term, farewell));
                    assert_eq!(got, Attach::Refuse);
                }
            }
        }
        assert_eq!(decide(None, 3, &greeting(TERM, false)), Attach::Refuse);
        assert_eq!(decide(None, 3, &greeting(TERM, true)), Attach::New);
    }
}

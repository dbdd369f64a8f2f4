//! Connections between holders of the key: the Noise handshake
//! `Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`, then records of
//! `length u16 (big endian) | ciphertext`.
//!
//! ```text
//! client -> server   "ORNOISE1" | e, authenticated by the key      56 bytes
//! server -> client   "ORNOISE1" | e, ee                            56 bytes
//! both               records of at most 65535 bytes of ciphertext
//! ```
//!
//! Both sides prove that they have the key, and each connection has keys of its own
//! that die with it: who records it and gets the cluster key later reads nothing.
//! The first message can be repeated by anybody who saw it, but only who made it can
//! go on from the answer, and the server does nothing before it has read a record.
//!
//! The handshake runs in a task of its own, so accepting never waits for a peer.
//! What can go wrong: a peer that never finishes it. Its socket counts as a stranger
//! of the listener, which bounds their number and time.

use super::{ClusterKey, Seams};
use crate::env::{
    Entropy, Gate, LocalBoxFuture, NetError, Stream, StreamReader, StreamWriter, Task, probe,
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, HandshakeState, TransportState};
use std::cell::RefCell;
use std::rc::{Rc, Weak};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
/// First bytes in each direction, and part of what the handshake authenticates.
const HELLO: &[u8; 8] = b"ORNOISE1";
/// A Noise message of the handshake: an ephemeral key and a tag.
const HANDSHAKE_LEN: usize = 48;
/// Bytes that encryption adds.
const TAG_LEN: usize = 16;
/// Bytes of a record's length.
const HEAD_LEN: usize = 2;
/// Most bytes of ciphertext in a record.
const RECORD_MAX: usize = 65_535;

const NOT_SPOKEN: &str = "the peer does not use a cluster key";
const OTHER_KEY: &str = "the peer has another cluster key";
const CLOSED: &str =
    "the peer closed the connection during the handshake: it has another cluster key, or none";
const FORGED: &str = "a record of the connection is not authentic";

/// Which end this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// This node connected: it speaks first.
    Connected,
    /// This node accepted.
    Accepted,
}

/// Random bytes for one handshake, drawn through the entropy seam beforehand.
struct Drawn(Vec<u8>);

impl Random for Drawn {
    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), snow::Error> {
        let rest = self
            .0
            .len()
            .checked_sub(out.len())
            .ok_or(snow::Error::Rng)?;
        out.copy_from_slice(&self.0.split_off(rest));
        Ok(())
    }
}

/// snow's own primitives, with our randomness.
struct Resolver {
    seed: [u8; 64],
}

impl Resolver {
    fn new(entropy: &dyn Entropy) -> Self {
        let mut seed = [0; 64];
        for word in seed.chunks_exact_mut(8) {
            word.copy_from_slice(&entropy.next_u64().to_le_bytes());
        }
        Self { seed }
    }
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Drawn(self.seed.to_vec())))
    }
    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        DefaultResolver.resolve_dh(choice)
    }
    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }
    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

fn handshake(key: &ClusterKey, entropy: &dyn Entropy, side: Side) -> HandshakeState {
    let params = PATTERN.parse().expect("a pattern that snow knows");
    let built = Builder::with_resolver(params, Box::new(Resolver::new(entropy)))
        .psk(0, key.stream())
        .and_then(|builder| builder.prologue(HELLO))
        .and_then(|builder| match side {
            Side::Connected => builder.build_initiator(),
            Side::Accepted => builder.build_responder(),
        });
    built.expect("the pattern needs nothing else")
}

/// How far a connection is.
enum Phase {
    Handshake,
    Open {
        reader: Option<Box<dyn StreamReader>>,
        writer: Option<Box<dyn StreamWriter>>,
        /// Ciphertext that came with the handshake.
        early: BytesMut,
        transport: Box<TransportState>,
    },
    Failed(NetError),
}

struct Shared {
    phase: RefCell<Phase>,
    /// The handshake ended, well or badly.
    decided: Gate,
    task: RefCell<Option<Rc<dyn Task>>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut().take() {
            task.abort();
        }
    }
}

/// Wraps a connection; the handshake begins at once.
pub(super) fn secure(seams: &Seams, key: &ClusterKey, stream: Stream, side: Side) -> Stream {
    let Stream {
        reader,
        writer,
        local,
        peer,
    } = stream;
    let shared = Rc::new(Shared {
        phase: RefCell::new(Phase::Handshake),
        decided: Gate::default(),
        task: RefCell::new(None),
    });
    let state = handshake(key, &*seams.entropy, side);
    let weak: Weak<Shared> = Rc::downgrade(&shared);
    let task = seams.spawner.spawn_local(
        "noise handshake",
        Box::pin(async move {
            let phase = match shake_hands(state, side, reader, writer).await {
                Ok(open) => open,
                Err(error) => {
                    probe("secure_handshake_failed");
                    Phase::Failed(error)
                }
            };
            if let Some(shared) = weak.upgrade() {
                shared.phase.replace(phase);
                shared.decided.open();
            }
        }),
    );
    shared.task.replace(Some(task));
    Stream {
        reader: Box::new(Reader {
            shared: shared.clone(),
            bytes: BytesMut::new(),
            inner: None,
        }),
        writer: Box::new(Writer { shared }),
        local,
        peer,
    }
}

async fn shake_hands(
    mut state: HandshakeState,
    side: Side,
    mut reader: Box<dyn StreamReader>,
    mut writer: Box<dyn StreamWriter>,
) -> Result<Phase, NetError> {
    let mut early = BytesMut::new();
    if side == Side::Connected {
        writer.write(next_message(&mut state)).await?;
    }
    let heard = hear(&mut *reader, &mut early).await?;
    let read = state.read_message(&heard, &mut [0; HANDSHAKE_LEN]);
    read.map_err(|_| NetError::Untrusted(OTHER_KEY))?;
    if side == Side::Accepted {
        writer.write(next_message(&mut state)).await?;
    }
    let transport = state.into_transport_mode().expect("both messages are done");
    probe("secure_handshake_done");
    Ok(Phase::Open {
        reader: Some(reader),
        writer: Some(writer),
        early,
        transport: Box::new(transport),
    })
}

/// The own message of the handshake.
fn next_message(state: &mut HandshakeState) -> Bytes {
    let mut out = [0; HELLO.len() + HANDSHAKE_LEN];
    out[..HELLO.len()].copy_from_slice(HELLO);
    let written = state.write_message(&[], &mut out[HELLO.len()..]);
    assert!(written == Ok(HANDSHAKE_LEN), "a message of the handshake");
    Bytes::copy_from_slice(&out)
}

/// The peer's message of the handshake; what came behind it stays in `early`.
async fn hear(reader: &mut dyn StreamReader, early: &mut BytesMut) -> Result<BytesMut, NetError> {
    loop {
        // Judged as it comes: who speaks something else does not get to finish.
        let seen = early.len().min(HELLO.len());
        if early[..seen] != HELLO[..seen] {
            return Err(NetError::Untrusted(NOT_SPOKEN));
        }
        if early.len() >= HELLO.len() + HANDSHAKE_LEN {
            early.advance(HELLO.len());
            return Ok(early.split_to(HANDSHAKE_LEN));
        }
        let chunk = match reader.read().await {
            Ok(chunk) if chunk.is_empty() => return Err(NetError::Untrusted(CLOSED)),
            // A refusal with our bytes unread is a reset.
            Err(NetError::Reset) => return Err(NetError::Untrusted(CLOSED)),
            other => other?,
        };
        early.extend_from_slice(&chunk);
    }
}

struct Reader {
    shared: Rc<Shared>,
    /// Ciphertext that is no whole record yet.
    bytes: BytesMut,
    inner: Option<Box<dyn StreamReader>>,
}

impl Reader {
    /// Waits for the handshake and takes the reading half.
    async fn opened(&mut self) -> Result<&mut Box<dyn StreamReader>, NetError> {
        if self.inner.is_none() {
            self.shared.decided.wait().await;
            match &mut *self.shared.phase.borrow_mut() {
                Phase::Open { reader, early, .. } => {
                    self.inner = reader.take();
                    self.bytes = std::mem::take(early);
                }
                Phase::Failed(error) => return Err(error.clone()),
                Phase::Handshake => unreachable!("it was decided"),
            }
        }
        self.inner.as_mut().ok_or(NetError::Reset)
    }

    /// Decrypts all whole records.
    fn decrypt(&mut self) -> Result<BytesMut, NetError> {
        let mut plain = BytesMut::new();
        let mut phase = self.shared.phase.borrow_mut();
        let Phase::Open { transport, .. } = &mut *phase else {
            return Err(NetError::Reset);
        };
        while let Some(head) = self.bytes.first_chunk::<HEAD_LEN>() {
            let len = usize::from(u16::from_be_bytes(*head));
            if len < TAG_LEN {
                return Err(NetError::Untrusted(FORGED));
            }
            let Some(record) = self.bytes.get(HEAD_LEN..HEAD_LEN + len) else {
                break;
            };
            let start = plain.len();
            plain.resize(start + len - TAG_LEN, 0);
            let read = transport.read_message(record, &mut plain[start..]);
            read.map_err(|_| {
                probe("secure_record_forged");
                NetError::Untrusted(FORGED)
            })?;
            self.bytes.advance(HEAD_LEN + len);
        }
        Ok(plain)
    }
}

impl StreamReader for Reader {
    fn read(&mut self) -> LocalBoxFuture<'_, Result<Bytes, NetError>> {
        Box::pin(async {
            self.opened().await?;
            loop {
                let plain = self.decrypt()?;
                if !plain.is_empty() {
                    return Ok(plain.freeze());
                }
                let inner = self.inner.as_mut().expect("opened above");
                let chunk = inner.read().await?;
                if chunk.is_empty() {
                    // Cut in the middle of a record: as if the network had.
                    let cut = !self.bytes.is_empty();
                    return if cut { Err(NetError::Reset) } else { Ok(chunk) };
                }
                self.bytes.extend_from_slice(&chunk);
            }
        })
    }
}

struct Writer {
    shared: Rc<Shared>,
}

impl Writer {
    /// Waits for the handshake and takes the writing half, with what `bytes` become
    /// on the wire. The half is put back when all is written: a write that is given
    /// up has cut a record, and the connection is of no use any more.
    async fn sealed(&self, bytes: &[u8]) -> Result<(Box<dyn StreamWriter>, Bytes), NetError> {
        self.shared.decided.wait().await;
        let mut phase = self.shared.phase.borrow_mut();
        let (writer, transport) = match &mut *phase {
            Phase::Open {
                writer, transport, ..
            } => (writer.take().ok_or(NetError::Reset)?, transport),
            Phase::Failed(error) => return Err(error.clone()),
            Phase::Handshake => unreachable!("it was decided"),
        };
        let mut out = BytesMut::with_capacity(bytes.len() + HEAD_LEN + TAG_LEN);
        for plain in bytes.chunks(RECORD_MAX - TAG_LEN) {
            let len = plain.len() + TAG_LEN;
            out.put_u16(len as u16);
            let start = out.len();
            out.resize(start + len, 0);
            let written = transport.write_message(plain, &mut out[start..]);
            // Fails only after 2^64 records.
            written.map_err(|error| NetError::Other(error.to_string()))?;
        }
        Ok((writer, out.freeze()))
    }

    fn put_back(&self, half: Box<dyn StreamWriter>) {
        if let Phase::Open { writer, .. } = &mut *self.shared.phase.borrow_mut() {
            *writer = Some(half);
        }
    }
}

impl StreamWriter for Writer {
    fn write(&mut self, bytes: Bytes) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async move {
            let (mut writer, out) = self.sealed(&bytes).await?;
            writer.write(out).await?;
            self.put_back(writer);
            Ok(())
        })
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, Result<(), NetError>> {
        Box::pin(async {
            let (mut writer, _) = self.sealed(&[]).await?;
            writer.shutdown().await?;
            self.put_back(writer);
            Ok(())
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The other half may live on.
        if let Phase::Open { writer, .. } = &mut *self.shared.phase.borrow_mut() {
            writer.take();
        }
    }
}

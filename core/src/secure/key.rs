//! The cluster key and its file.
//!
//! A key is 256 random bits, made by `outrider keygen` and kept in a file on each
//! node that only root may read. It is never stored on the shared devices; what is
//! stored there is its *id*, a one-way function of the key, so that a mount with
//! another key or none is told so before it says a word on the network.
//!
//! What can go wrong: a passphrase in place of random bits, which could be guessed
//! from the id. The file format has no place for one.

use crate::env::Entropy;
use blake2::Blake2sMac256;
use blake2::digest::{FixedOutput, Mac};
use std::fmt;
use std::sync::Arc;
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes of a key.
pub const KEY_LEN: usize = 32;
/// First word of the line that holds the key.
const TAG: &str = "outrider-cluster-key-1";

/// What may be known of a key: enough to tell two apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 16]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is no key.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum KeyError {
    /// No line begins with the tag.
    #[error("it holds no line \"{TAG} KEY\"; make one with: outrider keygen FILE")]
    Absent,
    /// More than one does.
    #[error("it holds more than one key")]
    Several,
    /// Not 64 hex digits.
    #[error("its key is not 64 hex digits")]
    Digits,
}

struct Secrets {
    stream: Zeroizing<[u8; KEY_LEN]>,
    datagram: Zeroizing<[u8; KEY_LEN]>,
    id: KeyId,
}

/// The key of a cluster. Crosses threads; never shown.
#[derive(Clone)]
pub struct ClusterKey(Arc<Secrets>);

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({})", self.0.id)
    }
}

impl PartialEq for ClusterKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for ClusterKey {}

/// A key for one use, so that no two uses ever share one.
fn derive(key: &[u8; KEY_LEN], usage: &str) -> Zeroizing<[u8; KEY_LEN]> {
    let mut mac = <Blake2sMac256 as Mac>::new_from_slice(key).expect("32 bytes are a key");
    Mac::update(&mut mac, b"outrider cluster key: ");
    Mac::update(&mut mac, usage.as_bytes());
    Zeroizing::new(mac.finalize_fixed().into())
}

impl ClusterKey {
    /// The key of these bits.
    pub fn from_bytes(key: &[u8; KEY_LEN]) -> Self {
        let id = derive(key, "id");
        Self(Arc::new(Secrets {
            stream: derive(key, "streams"),
            datagram: derive(key, "datagrams"),
            id: KeyId(id[..16].try_into().expect("half of it")),
        }))
    }

    /// Reads the contents of a key file. Empty lines and lines that begin with `#`
    /// are ignored.
    ///
    /// # Errors
    /// If there is not one key in it.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut found = None;
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let digits = line.strip_prefix(TAG).ok_or(KeyError::Absent)?.trim();
            if found.replace(digits).is_some() {
                return Err(KeyError::Several);
            }
        }
        let digits = found.ok_or(KeyError::Absent)?.as_bytes();
        if digits.len() != 2 * KEY_LEN {
            return Err(KeyError::Digits);
        }
        let mut key = Zeroizing::new([0; KEY_LEN]);
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |d: u8| char::from(d).to_digit(16).ok_or(KeyError::Digits);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(Self::from_bytes(&key))
    }

    /// A new key: the contents of its file.
    pub fn generate(entropy: &dyn Entropy) -> Zeroizing<String> {
        let mut key = Zeroizing::new([0; KEY_LEN]);
        for word in key.chunks_exact_mut(8) {
            word.copy_from_slice(&entropy.next_u64().to_le_bytes());
        }
        let mut text = Zeroizing::new(String::with_capacity(256));
        text.push_str(
            "# Cluster key of an Outrider volume: whoever has it may join the cluster,\n",
        );
        text.push_str("# read the volume and change it. Keep it from everybody but root.\n");
        text.push_str(TAG);
        text.push(' ');
        for byte in key.iter() {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(u32::from(digit), 16).expect("a digit"));
            }
        }
        text.push('\n');
        text
    }

    /// What tells keys apart.
    pub fn id(&self) -> KeyId {
        self.0.id
    }

    /// Pre-shared key of connections.
    pub(crate) fn stream(&self) -> &[u8; KEY_LEN] {
        &self.0.stream
    }

    /// Key of datagrams.
    pub(crate) fn datagram(&self) -> &[u8; KEY_LEN] {
        &self.0.datagram
    }
}

//! The file that holds a cluster key.
//!
//! What can go wrong: others on this host reading it, or putting another one in its
//! place. A file that anybody but its owner may read or write is refused, and so is
//! one that belongs neither to the reader nor to root.

use outrider_core::env::Entropy;
use outrider_core::secure::{ClusterKey, KeyError};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;
use zeroize::Zeroizing;

/// Longest key file.
const LEN_MAX: u64 = 4096;

/// Why a key file is not used.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// The system did not give it.
    #[error("cluster key file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a directory, a device or such.
    #[error("cluster key file {}: it is no regular file", .0.display())]
    Kind(PathBuf),
    /// Others could have put it there.
    #[error(
        "cluster key file {}: it belongs to user {owner}, neither to root nor to this user",
        path.display()
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Others may read or write it.
    #[error(
        "cluster key file {}: its mode is {mode:04o}, others may read or write it; chmod 600 it",
        path.display()
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// There is no key in it.
    #[error("cluster key file {}: {source}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: KeyError,
    },
}

impl KeyFileError {
    /// The system's number for it.
    pub fn raw_os_error(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Owner { .. } | Self::Mode { .. } => libc::EPERM,
            Self::Kind(_) | Self::Key { .. } => libc::EINVAL,
        }
    }
}

/// Reads a key file after checking who else can.
///
/// # Errors
/// As [`KeyFileError`].
pub fn read(path: &Path) -> Result<ClusterKey, KeyFileError> {
    let failed = |source| KeyFileError::Io {
        path: path.to_owned(),
        source,
    };
    // Nonblocking: opening a pipe would wait for a writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(KeyFileError::Kind(path.to_owned()));
    }
    let own = rustix::process::geteuid().as_raw();
    if meta.uid() != own && meta.uid() != 0 {
        return Err(KeyFileError::Owner {
            path: path.to_owned(),
            owner: meta.uid(),
        });
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Mode {
            path: path.to_owned(),
            mode,
        });
    }
    let mut text = Zeroizing::new(String::with_capacity(LEN_MAX as usize));
    file.take(LEN_MAX)
        .read_to_string(&mut text)
        .map_err(failed)?;
    ClusterKey::parse(&text).map_err(|source| KeyFileError::Key {
        path: path.to_owned(),
        source,
    })
}

/// Makes a key and its file, which must not exist, for its owner only.
///
/// # Errors
/// What the system says; no half a file is left.
pub fn create(path: &Path, entropy: &dyn Entropy) -> Result<ClusterKey, KeyFileError> {
    let failed = |source| KeyFileError::Io {
        path: path.to_owned(),
        source,
    };
    let text = ClusterKey::generate(entropy);
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all());
    if let Err(source) = written {
        let _ = std::fs::remove_file(path);
        return Err(failed(source));
    }
    Ok(ClusterKey::parse(&text).expect("what was just made"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_core::env::testing::TestEntropy;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_file_that_others_can_reach_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        let made = create(&path, &*TestEntropy::new(1)).expect("made");
        assert_eq!(read(&path).expect("read"), made);
        let again = create(&path, &*TestEntropy::new(2)).unwrap_err();
        assert_eq!(again.raw_os_error(), libc::EEXIST, "never over another key");
        for (mode, good) in [
            (0o400, true),
            (0o640, false),
            (0o604, false),
            (0o620, false),
        ] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("chmod");
            let got = read(&path);
            assert_eq!(got.is_ok(), good, "mode {mode:o}: {got:?}");
        }
        let kind = read(dir.path()).unwrap_err();
        assert!(matches!(kind, KeyFileError::Kind(_)), "{kind}");
        let absent = read(&dir.path().join("absent")).unwrap_err();
        assert!(absent.to_string().contains("absent"), "{absent}");
        let empty = dir.path().join("empty");
        std::fs::write(&empty, "secret").expect("write");
        std::fs::set_permissions(&empty, Permissions::from_mode(0o600)).expect("chmod");
        assert!(matches!(
            read(&empty).unwrap_err(),
            KeyFileError::Key { .. }
        ));
    }
}

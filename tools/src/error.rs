//! How a command fails: details on one line, then `PROGRAM: COMMAND failed:
//! STRERROR (ERRNO)` (spec 17 section 9).

use outrider_core::errno::Errno;
use outrider_core::volume::VolumeError;
use std::fmt::Display;
use std::path::Path;

/// A failed command.
#[derive(Debug)]
pub struct CmdError {
    errno: Errno,
    details: String,
}

impl CmdError {
    /// A failure with its error number and a sentence for people.
    pub fn new(errno: Errno, details: impl Display) -> Self {
        Self {
            errno,
            details: details.to_string(),
        }
    }

    /// A system call on a path that failed; `what` says what was tried.
    pub fn io(what: &str, path: &Path, e: &std::io::Error) -> Self {
        let errno = Errno(e.raw_os_error().unwrap_or(Errno::EIO.0));
        let text = strerror(errno);
        let path = path.display();
        Self::new(
            errno,
            format!("failed to {what} '{path}': {text} ({})", errno.0),
        )
    }

    /// An ioctl that failed; `what` is the text that scripts compare.
    pub fn ioctl(what: &str, e: &std::io::Error) -> Self {
        let errno = Errno(e.raw_os_error().unwrap_or(Errno::EIO.0));
        let text = strerror(errno);
        Self::new(errno, format!("{what}: {text} ({})", errno.0))
    }

    /// Prints details and failure line on stderr.
    pub fn report(&self, program: &str, command: &str) {
        if !self.details.is_empty() {
            eprintln!("{}", self.details);
        }
        let text = strerror(self.errno);
        eprintln!("{program}: {command} failed: {text} ({})", self.errno.0);
    }
}

impl Display for CmdError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.details)
    }
}

impl From<VolumeError> for CmdError {
    fn from(e: VolumeError) -> Self {
        Self::new(e.errno(), e)
    }
}

/// The system's text for an error number.
pub fn strerror(errno: Errno) -> String {
    let text = std::io::Error::from_raw_os_error(errno.0).to_string();
    match text.rsplit_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

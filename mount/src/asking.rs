//! Fence requests as directories that an agent outside answers (spec 09 section 9.1):
//! `fence/RID/` with `rid`, `ipv4_addr`, `reason`, `elapsed_secs`, `fenced`, `error`.
//!
//! What can go wrong:
//! * Half a request seen by an agent. The directory gets its name when it is complete.
//! * An answer overlooked. Any write to `fenced` or `error` counts, whatever is
//!   written: what is watched is that the file was touched, not what it says.
//! * Both written, or an error after success. `error` counts first: a mount that
//!   somebody could not fence is not fenced.

use crate::rundir::Stamp;
use outrider_core::env::{Duration, Either, Env, LocalBoxFuture, Time, race};
use outrider_core::server::{FenceAgent, FenceError, FenceRequest};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Time between two looks at the answer files.
const POLL: Duration = Duration::from_millis(50);

/// Asks by directories, and another agent, if there is one, by its own ways. The first
/// success counts; a failure of the other one is logged, and the directory stays for
/// somebody who can do more.
pub struct Asking {
    dir: PathBuf,
    other: Option<Arc<dyn FenceAgent>>,
}

impl Asking {
    /// Makes the requests in `dir`.
    pub fn new(dir: PathBuf, other: Option<Arc<dyn FenceAgent>>) -> Self {
        Self { dir, other }
    }
}

impl FenceAgent for Asking {
    fn can_prove(&self) -> bool {
        self.other.as_ref().is_some_and(|other| other.can_prove())
    }

    fn is_gone(&self, rid: u64) -> bool {
        self.other.as_ref().is_some_and(|other| other.is_gone(rid))
    }

    fn fence(
        &self,
        env: &Env,
        request: FenceRequest,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        let (env, dir, rid) = (env.clone(), self.dir.clone(), request.rid);
        let other = self.other.as_ref().map(|other| other.fence(&env, request));
        Box::pin(async move {
            let shown = Shown::publish(&dir, request, env.clock.now());
            let unseen = |e: &io::Error| FenceError::Failed {
                rid,
                detail: format!("showing the request in {}: {e}", dir.display()),
            };
            let (shown, other) = match (shown, other) {
                (Ok(shown), None) => return wait(&env, rid, shown).await,
                (Err(e), None) => return Err(unseen(&e)),
                (Err(e), Some(other)) => {
                    tracing::warn!(error = %unseen(&e), "no agent outside can see it");
                    return other.await;
                }
                (Ok(shown), Some(other)) => (shown, other),
            };
            let other = async {
                if let Err(error) = other.await {
                    let dir = dir.display();
                    tracing::warn!(%error, %dir, "waiting for a fence agent outside");
                    std::future::pending::<()>().await;
                }
            };
            match race(other, wait(&env, rid, shown)).await {
                Either::Left(()) => Ok(()),
                Either::Right(answer) => {
                    tracing::info!(rid = format_args!("{rid:016x}"), "answered from outside");
                    answer
                }
            }
        })
    }
}

/// Waits until an agent has answered.
async fn wait(env: &Env, rid: u64, mut shown: Shown) -> Result<(), FenceError> {
    let failed = |detail: String| FenceError::Failed { rid, detail };
    loop {
        match shown.answer() {
            Ok(None) => {}
            Ok(Some(Answer::Fenced)) => return Ok(()),
            Ok(Some(Answer::Error)) => {
                return Err(failed("the fence agent wrote an error".to_owned()));
            }
            Err(e) => return Err(failed(format!("reading the agent's answer: {e}"))),
        }
        shown.tick(env.clock.now());
        env.sleep(POLL).await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Fenced,
    Error,
}

/// A request that agents can see; removed when dropped.
struct Shown {
    path: PathBuf,
    fenced: Stamp,
    error: Stamp,
    since: Time,
    elapsed: u64,
}

impl Shown {
    fn publish(dir: &Path, request: FenceRequest, now: Time) -> io::Result<Self> {
        let name = format!("{:016x}", request.rid);
        let new = dir.join(format!(".{name}.new"));
        let path = dir.join(&name);
        // Of a server that was stopped in the middle.
        let _ = fs::remove_dir_all(&new);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&new)?;
        for (file, text) in [
            ("rid", name),
            ("ipv4_addr", request.addr.ip().to_string()),
            ("reason", request.reason.name().to_owned()),
            ("elapsed_secs", "0".to_owned()),
            ("fenced", "0".to_owned()),
            ("error", "0".to_owned()),
        ] {
            fs::write(new.join(file), text)?;
        }
        fs::rename(&new, &path)?;
        Ok(Self {
            fenced: Stamp::of(&path.join("fenced"))?,
            error: Stamp::of(&path.join("error"))?,
            path,
            since: now,
            elapsed: 0,
        })
    }

    fn answer(&self) -> io::Result<Option<Answer>> {
        // A file that is gone was taken away by somebody who had no business there: no
        // answer, and no proof of anything.
        let touched = |file: &str, before: Stamp| -> io::Result<bool> {
            Ok(Stamp::of(&self.path.join(file))? != before)
        };
        if touched("error", self.error)? {
            return Ok(Some(Answer::Error));
        }
        Ok(touched("fenced", self.fenced)?.then_some(Answer::Fenced))
    }

    fn tick(&mut self, now: Time) {
        let elapsed = now.since(self.since).as_secs();
        if elapsed != self.elapsed {
            self.elapsed = elapsed;
            let _ = fs::write(self.path.join("elapsed_secs"), elapsed.to_string());
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_core::server::FenceReason;

    fn request() -> FenceRequest {
        FenceRequest {
            rid: 0xfeed,
            addr: "10.0.0.3:4000".parse().unwrap(),
            reason: FenceReason::ClientReconnect,
        }
    }

    #[test]
    fn a_request_has_the_files_that_agents_read_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let mut shown = Shown::publish(dir.path(), request(), Time(0)).unwrap();
        let path = dir.path().join("000000000000feed");
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap();
        assert_eq!(read("rid"), "000000000000feed");
        assert_eq!(read("ipv4_addr"), "10.0.0.3");
        assert_eq!(read("reason"), "client_reconnect");
        assert_eq!((read("fenced"), read("error")), ("0".into(), "0".into()));
        shown.tick(Time(0) + Duration::from_secs(7));
        assert_eq!(read("elapsed_secs"), "7");
        assert_eq!(shown.answer().unwrap(), None);
        drop(shown);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn any_write_answers_and_an_error_outweighs_success() {
        let dir = tempfile::tempdir().unwrap();
        for (file, answer) in [("fenced", Answer::Fenced), ("error", Answer::Error)] {
            let shown = Shown::publish(dir.path(), request(), Time(0)).unwrap();
            // Time stamps of files have the grain of the system's timer.
            std::thread::sleep(std::time::Duration::from_millis(20));
            fs::write(shown.path.join(file), "0").unwrap();
            assert_eq!(shown.answer().unwrap(), Some(answer));
            fs::write(shown.path.join("error"), "1").unwrap();
            assert_eq!(shown.answer().unwrap(), Some(Answer::Error));
        }
    }

    #[test]
    fn a_request_that_somebody_removed_is_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let shown = Shown::publish(dir.path(), request(), Time(0)).unwrap();
        fs::remove_dir_all(&shown.path).unwrap();
        assert!(shown.answer().is_err());
    }
}

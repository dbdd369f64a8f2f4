//! Writes shown state on a thread of its own: a runtime directory on a slow disk must
//! not hold up the filesystem (replacing a file takes ext4 milliseconds).
//!
//! Of each file only the newest content is kept. What can not be written is logged and
//! tried again; who shows does not wait.

use super::replace;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Queue {
    pending: BTreeMap<PathBuf, String>,
    writing: bool,
    over: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut queue = self.queue();
        while !queue.over {
            let Some((path, text)) = queue.pending.pop_first() else {
                queue = self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.writing = true;
            drop(queue);
            let written = replace(&path, &text, 0o444);
            queue = self.queue();
            queue.writing = false;
            if let Err(error) = written {
                tracing::debug!(%error, path = %path.display(), "runtime directory");
                // Unless there is something newer by now.
                queue.pending.entry(path).or_insert(text);
                (queue, _) = self
                    .changed
                    .wait_timeout_while(queue, RETRY, |queue| !queue.over)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.changed.notify_all();
        }
    }
}

/// See the head of this file. Dropped, it writes no more.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there can be none.
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("outrider-rundir".into())
            .spawn(move || own.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Replaces a file, soon.
    pub(super) fn write(&self, path: PathBuf, text: String) {
        self.shared.queue().pending.insert(path, text);
        self.shared.changed.notify_all();
    }

    /// Waits until everything is written.
    #[cfg(test)]
    pub(super) fn settle(&self) {
        let busy = |queue: &mut Queue| queue.writing || !queue.pending.is_empty();
        drop(self.shared.changed.wait_while(self.shared.queue(), busy));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.queue().over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_newest_content_is_there_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::start().unwrap();
        for nr in 0..500 {
            for name in ["a", "b"] {
                writer.write(dir.path().join(name), format!("{name}{nr}"));
            }
        }
        writer.settle();
        for name in ["a", "b"] {
            let text = fs::read_to_string(dir.path().join(name)).unwrap();
            assert_eq!(text, format!("{name}499"));
        }
    }

    #[test]
    fn what_could_not_be_written_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let later = dir.path().join("later");
        let writer = Writer::start().unwrap();
        writer.write(later.join("a"), "1".into());
        std::thread::sleep(Duration::from_millis(50));
        fs::create_dir(&later).unwrap();
        writer.settle();
        assert_eq!(fs::read_to_string(later.join("a")).unwrap(), "1");
    }

    #[test]
    fn its_end_does_not_wait_for_what_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::start().unwrap();
        writer.write(dir.path().join("nowhere/a"), "1".into());
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

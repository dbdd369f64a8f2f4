//! Plays a script on a filesystem, without a kernel in between.

use super::script::Step;
use crate::ask::{Answer, ask};
use crate::model::{Call, Reply};
use outrider_core::errno::Errno;
use outrider_core::fs::api::{Caller, Opened, Posix};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Who plays.
pub struct Player<P> {
    fs: Rc<P>,
    cx: Caller,
    /// What the filesystem calls the script's open files.
    open: RefCell<BTreeMap<u32, u64>>,
}

impl<P: Posix> Player<P> {
    /// A player on this filesystem.
    pub fn new(fs: Rc<P>) -> Self {
        Self {
            fs,
            cx: Caller::default(),
            open: RefCell::default(),
        }
    }

    /// Makes a call, and gives its answer.
    pub async fn play(&self, step: &Step) -> Reply {
        self.perform(step).await.unwrap_or_else(Reply::Err)
    }

    fn opened(&self, step: &Step, opened: &Opened) {
        let file = step.file.expect("what opens a file has a number for it");
        self.open.borrow_mut().insert(file, opened.fh);
    }

    async fn perform(&self, step: &Step) -> Result<Reply, Errno> {
        let fh = step.file.and_then(|file| match step.call {
            Call::Release { .. } => self.open.borrow_mut().remove(&file),
            _ => self.open.borrow().get(&file).copied(),
        });
        Ok(match ask(&*self.fs, &self.cx, &step.call, fh).await? {
            Answer::Reply(reply) => reply,
            Answer::Entry(entry) => Reply::Entry(entry.attr),
            Answer::Created(entry, opened) => {
                self.opened(step, &opened);
                Reply::Entry(entry.attr)
            }
            Answer::Opened(_, opened) => {
                self.opened(step, &opened);
                Reply::Done
            }
        })
    }
}

//! The devices are checked when a server's commit has reached them: what lies there
//! then is what a crash would leave that loses nothing, so it must be a whole volume. A
//! state that only one commit shows, and the next one puts right, is seen this way
//! though nobody dies at that moment.
//!
//! Looking costs no simulated time, draws nothing and is no event: worlds do the same
//! with and without. It reads the medium, unflushed writes included, and remembers from
//! one commit to the next what blocks nobody has written to have in them
//! (`outrider_core::volume::check::Memo`). The checks after crashes and at the end
//! remember nothing, and what they report must be what this would.
//!
//! What can go wrong: taking for damage what is none. Between commits nothing that a
//! stable super block reaches is written: servers and mounts write to blocks that it
//! lists as free, file data are not looked at, and a super or a quorum block is one
//! sector, there or not. What is wrong with the devices because of a fence agent that
//! lied is not the filesystem's doing: the late write that shows the lie is reported at
//! the latest when it lands, and its verdict goes before this one's.

use super::life::violation;
use crate::backend::Sim;
use crate::backend::disk::Disks;
use crate::oracle::Violation;
use outrider_core::env::{BlockDevice, DeviceRole, Either, Gate, race};
use outrider_core::format::{SM_BLOCK_SIZE, SUPER_BLKNO};
use outrider_core::volume::check::{CheckOptions, Memo, Report, check};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

/// Checks the devices of a world at its commits, or some of them.
pub struct Commits {
    disks: Weak<Disks>,
    memo: Rc<Memo>,
    /// Every so many commits; 0 for none.
    every: u32,
    /// Commits, counted from a number of the seed's, so that seeds look at others each.
    seen: Cell<u64>,
    broken: RefCell<Option<Violation>>,
    doom: Gate,
}

/// How simulated volumes are checked.
pub(super) fn options(memo: Option<Rc<Memo>>) -> CheckOptions {
    CheckOptions {
        strict: true,
        memo,
        ..CheckOptions::default()
    }
}

/// What is wrong, if anything is.
pub(super) fn verdict(report: &Report) -> Result<(), String> {
    if report.errors == 0 {
        return Ok(());
    }
    let shown: Vec<String> = report
        .problems
        .iter()
        .take(4)
        .map(|problem| format!("{problem:?}"))
        .collect();
    Err(format!("{} errors: {}", report.errors, shown.join("; ")))
}

/// Whether a check that remembers earlier ones says what one says that does not.
fn agree(remembering: &Report, whole: &Report) -> Result<(), String> {
    if remembering == whole {
        return Ok(());
    }
    Err(format!(
        "a check that remembers earlier ones says otherwise than a whole one: \
         {remembering:?} and {whole:?}"
    ))
}

/// The output of a future that waits for nothing.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("a look at a medium waits for nothing"),
    }
}

impl Commits {
    /// Checks every so many commits from now on; the volume has been made.
    pub(super) fn install(sim: &Rc<Sim>, disks: &Rc<Disks>, every: u32) {
        let commits = Rc::new(Self {
            disks: Rc::downgrade(disks),
            memo: Rc::default(),
            every,
            seen: Cell::new(sim.seed % u64::from(every.max(1))),
            broken: RefCell::default(),
            doom: Gate::default(),
        });
        sim.set_commits(Rc::clone(&commits));
        let tracing = Rc::downgrade(sim);
        disks.add_watch(move |landed| {
            let sup = SUPER_BLKNO * SM_BLOCK_SIZE as u64;
            if landed.role != DeviceRole::Meta || landed.offset != sup {
                return;
            }
            if let Some(sim) = tracing.upgrade() {
                commits.landed(sim.now(), landed.node);
            }
        });
    }

    fn landed(&self, now: u64, node: u32) {
        let seen = self.seen.get() + 1;
        self.seen.set(seen);
        if self.every == 0 || !seen.is_multiple_of(u64::from(self.every)) || self.doom.is_open() {
            return;
        }
        let Some(report) = self.look() else { return };
        let mut result = verdict(&report);
        // Slow, so only where nothing is to be fast.
        if cfg!(debug_assertions)
            && let Some(whole) = self.check(None)
        {
            result = result.and(agree(&report, &whole));
        }
        if let Err(text) = result {
            let (secs, nanos) = (now / 1_000_000_000, now % 1_000_000_000);
            let text = format!(
                "{text}; seen at {secs}.{nanos:09} s, when node {node} had written a super block"
            );
            *self.broken.borrow_mut() = Some(violation("check", text));
            self.doom.open();
        }
    }

    fn check(&self, memo: Option<Rc<Memo>>) -> Option<Report> {
        let disks = self.disks.upgrade()?;
        let [meta, data]: [Rc<dyn BlockDevice>; 2] =
            [DeviceRole::Meta, DeviceRole::Data].map(|role| disks.bare(role));
        Some(at_once(check(meta, data, &options(memo))))
    }

    /// Checks what is there now; what was there before is remembered.
    fn look(&self) -> Option<Report> {
        match self.disks.upgrade()?.take_changes(DeviceRole::Meta) {
            None => self.memo.forget_all(),
            Some(changes) => {
                for (offset, len) in changes {
                    self.memo.forget(offset, len);
                }
            }
        }
        self.check(Some(Rc::clone(&self.memo)))
    }

    /// Compares a whole check of the devices, which nobody has written to since it began,
    /// with one that remembers.
    pub(super) fn compare(&self, whole: &Report) -> Result<(), String> {
        if self.every == 0 {
            return Ok(());
        }
        let remembering = self.look();
        remembering.map_or(Ok(()), |report| agree(&report, whole))
    }

    async fn broken(&self) -> Violation {
        self.doom.wait().await;
        let broken = self.broken.take();
        broken.expect("the gate was opened for a reason")
    }
}

/// Lets a world go on until it ends, or until a check at a commit has found something.
pub(super) async fn until_broken(
    sim: &Rc<Sim>,
    all: impl Future<Output = Result<(), Violation>>,
) -> Result<(), Violation> {
    let Some(commits) = sim.commits() else {
        return all.await;
    };
    match race(commits.broken(), all).await {
        Either::Left(broken) => Err(broken),
        Either::Right(result) => result,
    }
}

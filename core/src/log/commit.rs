//! The commit task: one commit at a time, in the order of spec 04 section 6.
//!
//! | phase | steps | on failure |
//! |---|---|---|
//! | drain | no new holds, wait for the last | |
//! | A | 1 start file data, 2 items and bloom bits, 3 cached data extent, 4 close the lists, 5 write blocks, 6 wait for file data, 6a flush both devices, 7 COMMIT_LOG_TREES, 8 clean | after 2 s again, from what is not done yet |
//! | B | GET_LOG_TREES | after 2 s again, alone |
//!
//! What can go wrong: any step, at any time. Each keeps what it has not done:
//! items not yet put in the tree (`tree`), blocks that are dirty until the flush
//! succeeded (`block::Tx`), file data that is dirty until it is written and
//! flushed ([`DirtyData`]). An error answer of the server means "unknown", so the
//! same commit is sent again; the server knows it by its seq.

use super::trans::Open;
use super::{DirtyData, Inner, Life, Log, LogError};
use crate::env::{Either, mutant, probe, race};
use crate::format::LogTrees;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

impl Log {
    /// Opens the first transaction and starts to commit. Holds wait until it is open.
    pub fn start(&self) {
        let inner = self.inner.clone();
        self.inner.env.spawn("log.commit", async move {
            if let Either::Left(()) = race(inner.severed(), inner.run()).await {
                inner.throw_away();
            }
        });
    }

    /// Completes when a transaction is open (or the mount is severed).
    ///
    /// # Errors
    /// `Severed`.
    pub async fn opened(&self) -> Result<(), LogError> {
        let inner = &self.inner;
        let open = || match inner.check_alive() {
            Ok(()) => (inner.trans_seq() != 0).then_some(Ok(())),
            Err(error) => Some(Err(error)),
        };
        inner.changed.wait_for(open).await
    }

    /// Asks for a commit soon, without waiting for it.
    pub fn trigger_commit(&self) {
        self.inner.trigger();
    }

    /// Makes everything that was done before this call durable and visible to all
    /// nodes (spec 04 section 7.1). Must not be called with a hold.
    ///
    /// # Errors
    /// `Severed`: it may be lost.
    pub async fn sync(&self) -> Result<(), LogError> {
        let inner = &self.inner;
        if inner.life.get() == Life::Severed {
            // Also if nothing is lost: who asks is to learn that this mount is.
            return Err(LogError::Severed);
        }
        if inner.reopening.get() {
            // The commit is durable and nobody has been let in since: there is
            // nothing that this call could have to wait for.
            return Ok(());
        }
        if inner.is_clean() {
            // Whatever was done is in an earlier transaction, which is durable.
            probe("log.sync_clean");
            return Ok(());
        }
        let seen = inner.commits.get();
        inner.trigger();
        // Mutant: breaks spec 04 I16, what fsync promised is in the stable super.
        if mutant("fsync_answers_early") {
            return Ok(());
        }
        let done = || match inner.life.get() {
            Life::Severed => Some(Err(LogError::Severed)),
            Life::Ended => Some(Ok(())),
            Life::Running | Life::Ending => (inner.commits.get() > seen).then_some(Ok(())),
        };
        inner.changed.wait_for(done).await
    }

    /// Unmount: refuses new holds, commits once more, opens no transaction that
    /// anybody will use (the server takes the last record back).
    ///
    /// # Errors
    /// `Severed`: what was not committed is lost.
    pub async fn shutdown(&self) -> Result<(), LogError> {
        let inner = &self.inner;
        if inner.life.get() == Life::Running {
            inner.life.set(Life::Ending);
            inner.wake_commit.wake_all();
            inner.changed.wake_all();
        }
        let done = || match inner.life.get() {
            Life::Severed => Some(Err(LogError::Severed)),
            Life::Ended => Some(Ok(())),
            Life::Running | Life::Ending => None,
        };
        inner.changed.wait_for(done).await
    }

    /// Forced unmount, or the mount was fenced: everything dirty is thrown away
    /// and every waiter fails. Can not be undone.
    pub fn sever(&self) {
        self.inner.sever();
    }

    /// Whether the mount was cut off.
    pub fn is_severed(&self) -> bool {
        self.inner.life.get() == Life::Severed
    }
}

impl Inner {
    /// Whether a transaction is open that nobody has entered: there is nothing that
    /// a commit could make durable.
    fn is_clean(&self) -> bool {
        let open = self.open.borrow();
        self.life.get() == Life::Running
            && !self.writing.get()
            && open.as_ref().is_some_and(|open| !open.is_used())
    }

    pub(super) fn trigger(&self) {
        // A commit under way serves whoever asks now: its holders are gone.
        if !self.writing.get() {
            self.triggered.set(true);
            self.wake_commit.wake_all();
        }
    }

    fn sever(&self) {
        if !matches!(self.life.get(), Life::Severed | Life::Ended) {
            probe("log.severed");
            self.life.set(Life::Severed);
            self.changed.wake_all();
            self.wake_commit.wake_all();
        }
    }

    async fn severed(&self) {
        let severed = || (self.life.get() == Life::Severed).then_some(());
        self.changed.wait_for(severed).await;
    }

    fn throw_away(&self) {
        *self.open.borrow_mut() = None;
        *self.cache.borrow_mut() = super::ItemCache::new(self.policy.page_items);
        *self.snapshot.borrow_mut() = None;
        self.changed.wake_all();
    }

    async fn run(&self) {
        self.open_next().await;
        self.reopen();
        loop {
            self.wait_for_work().await;
            let ending = self.life.get() == Life::Ending;
            self.commit().await;
            if ending {
                self.life.set(Life::Ended);
                self.changed.wake_all();
                return;
            }
        }
    }

    async fn wait_for_work(&self) {
        let work = || (self.triggered.get() || self.life.get() != Life::Running).then_some(());
        let deadline = self.env.clock.sleep_until(self.deadline.get());
        if let Either::Right(()) = race(self.wake_commit.wait_for(work), deadline).await {
            probe("log.deadline_commit");
        }
    }

    async fn commit(&self) {
        self.writing.set(true);
        self.triggered.set(false);
        let drained = || (self.holders.get() == 0).then_some(());
        self.wake_commit.wait_for(drained).await;
        let open = self.open.borrow().clone().expect("a transaction is open");
        let mut failures = 0_u64;
        while let Err(error) = self.phase_a(&open).await {
            self.failed("commit", &error).await;
            open.tree.lock().await.note_retry();
            failures += 1;
        }
        if failures > 0 {
            probe("log.commit_retried");
            tracing::info!(failures, "the commit succeeded after failures");
        }
        drop(open);
        // Durable from here on: who waits for that goes on while the next
        // transaction is opened.
        self.reopening.set(true);
        self.commits.set(self.commits.get() + 1);
        self.changed.wake_all();
        self.open_next().await;
        self.reopening.set(false);
        self.reopen();
    }

    /// Lets holders in.
    fn reopen(&self) {
        self.writing.set(false);
        self.deadline
            .set(self.env.clock.now() + self.policy.sync_delay);
        self.changed.wake_all();
    }

    /// After a failed attempt: severs the mount if trying again is useless, else pauses.
    async fn failed(&self, what: &'static str, error: &LogError) {
        if error.is_severed() {
            tracing::error!(%error, "{what} ends with the mount");
            self.sever();
            // This task is dropped at its next suspension.
            std::future::pending::<()>().await;
        }
        probe("log.retry");
        tracing::warn!(%error, "{what} failed, will be tried again");
        self.env.sleep(self.policy.retry_delay).await;
    }

    /// Phase A. Everything done stays done, so it may be called again.
    async fn phase_a(&self, open: &Open) -> Result<(), LogError> {
        let data: Vec<Rc<dyn DirtyData>> = self.dirty_data.borrow().clone();
        data.iter().for_each(|data| data.start_writeback()); // 1
        self.insert_pending(open).await?; // 2
        open.tree
            .lock()
            .await
            .set_bloom(&open.tx, &self.bloomed)
            .await?;
        self.yield_point("log.commit.items").await;
        open.data.lock().await.return_cached(&open.tx).await?; // 3
        open.tx.prepare_commit(); // 4
        open.tx.write_blocks_durably().await?; // 5
        self.yield_point("log.commit.written").await;
        // Mutant: breaks spec 04 section 14, file data is stable before step 7.
        if mutant("data_not_flushed") {
            open.tx.flush().await?;
        } else {
            wait_all(&data).await?; // 6
            self.flush(open, &data).await?; // 6a
        }
        let record = open.committed_record().await;
        self.yield_point("log.commit.flushed").await;
        self.server.commit_log_trees(&record).await?; // 7
        self.yield_point("log.commit.answered").await;
        self.clean(&record); // 8
        Ok(())
    }

    async fn yield_point(&self, name: &'static str) {
        probe(name);
        self.env.spawner.yield_point(name).await;
    }

    /// Both devices at once.
    async fn flush(&self, open: &Open, data: &[Rc<dyn DirtyData>]) -> Result<(), LogError> {
        let flush_data = async {
            // Nothing of it was written since the last flush, or all of it durable.
            let covered = !data.iter().any(|data| data.needs_flush());
            if covered || !self.blocks.policy().flush {
                return Ok(());
            }
            self.data_dev.flush().await
        };
        let (meta, flushed) = join(open.tx.flush(), flush_data).await;
        data.iter().for_each(|data| data.flushed(flushed.is_ok()));
        if flushed.is_err() || meta.is_err() {
            probe("log.flush_failed");
        }
        // Mutant: breaks spec 04 section 14, a failed flush promises nothing.
        if mutant("flush_error_ignored") {
            return Ok(());
        }
        flushed.map_err(LogError::Data)?;
        Ok(meta?)
    }

    /// Step 8: what was dirty is in the stable super. Can not fail.
    fn clean(&self, record: &LogTrees) {
        self.read_barrier.set(self.read_barrier.get() + 1);
        *self.snapshot.borrow_mut() = None;
        let cache = &mut *self.cache.borrow_mut();
        cache.clean();
        cache.reclaim(self.policy.cache_bytes, None);
        tracing::debug!(
            seq = record.get_trans_seq.get(),
            nr = record.nr.get(),
            "committed"
        );
    }

    /// Phase B, and the first transaction.
    async fn open_next(&self) {
        let last = self.trans_seq();
        let record = loop {
            let got = self.server.get_log_trees().await;
            match got {
                Ok(record) if record.get_trans_seq.get() > last => break record,
                Ok(record) => {
                    let seq = record.get_trans_seq.get();
                    tracing::error!(seq, last, "the server opened a transaction of the past");
                    self.failed(
                        "opening a transaction",
                        &LogError::Server(crate::errno::Errno::EIO),
                    )
                    .await;
                }
                Err(error) => self.failed("opening a transaction", &error.into()).await,
            }
        };
        self.bloomed.borrow_mut().follow(&record);
        *self.open.borrow_mut() = Some(Rc::new(Open::new(self, record)));
    }
}

async fn wait_all(data: &[Rc<dyn DirtyData>]) -> Result<(), LogError> {
    let mut failed = None;
    for data in data {
        let written = data.wait().await;
        failed = failed.or(written.err());
    }
    failed.map_or(Ok(()), |error| Err(LogError::Data(error)))
}

/// Runs both until both are done.
async fn join<A: Future, B: Future>(left: A, right: B) -> (A::Output, B::Output) {
    let (mut left, mut right) = (pin!(left), pin!(right));
    let (mut left_out, mut right_out) = (None, None);
    poll_fn(|cx| {
        if left_out.is_none()
            && let Poll::Ready(out) = left.as_mut().poll(cx)
        {
            left_out = Some(out);
        }
        if right_out.is_none()
            && let Poll::Ready(out) = right.as_mut().poll(cx)
        {
            right_out = Some(out);
        }
        match (left_out.is_some(), right_out.is_some()) {
            (true, true) => Poll::Ready(()),
            _ => Poll::Pending,
        }
    })
    .await;
    (
        left_out.expect("the left one is done"),
        right_out.expect("the right one is done"),
    )
}

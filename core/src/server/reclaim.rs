//! Taking back what a mount held that left or was fenced (spec 04 section 16, 09
//! section 10): the persistent part. Locks, open inodes and the connection are
//! the caller's.
//!
//! One pass is one commit. Every step can be repeated; the mounted client item is
//! deleted last, in a commit of its own, so that a crash anywhere leaves the "to do"
//! mark.
//!
//! What can go wrong: reclaiming a mount that can still write. Its free blocks go
//! to others; only a fence, or its farewell, comes before this.

use super::error::{OrFatal, Result};
use super::items;
use super::log_trees::Progress;
use super::store::{Dirty, Store};
use crate::env::probe;
use crate::format::{Key, SrchCompact};
use std::rc::Rc;

impl Store {
    /// One pass; `More` asks for another commit. [`Store::delete_mounted`] comes after
    /// the last.
    ///
    /// # Errors
    /// The server stops with any of them.
    pub(super) async fn reclaim_pass(self: &Rc<Self>, rid: u64) -> Result<Progress> {
        self.change(async |d| {
            if self.reclaim_log_tree(d, rid).await? == Progress::More {
                return Ok(Progress::More);
            }
            self.cancel_compactions(d, rid).await.or_fatal()?;
            self.cancel_merge_requests(d, rid).await.or_fatal()?;
            Ok(Progress::Done)
        })
        .await
    }

    /// The end of a reclaim: these mounts are no more, all at once.
    ///
    /// # Errors
    /// The server stops with any of them.
    pub(super) async fn delete_mounted(self: &Rc<Self>, rids: &[u64]) -> Result<()> {
        self.change(async |d| {
            for &rid in rids {
                let key = Key::mounted_client(rid);
                items::delete(&self.tx, &mut d.sup.mounted_clients, key)
                    .await
                    .or_fatal()?;
            }
            Ok(())
        })
        .await
    }

    /// Finalizes the newest log tree of a mount that is gone, if it is not yet.
    pub(super) async fn reclaim_log_tree(&self, d: &mut Dirty, rid: u64) -> Result<Progress> {
        let newest = items::newest_log_trees(&self.cache, &d.sup.logs_root, rid).await?;
        let Some(mut log) = newest.filter(|log| !log.is_finalized()) else {
            return Ok(Progress::Done);
        };
        if log.is_open() {
            probe("server.reclaim.open_transaction");
        }
        probe("server.reclaim.log_tree");
        self.finalize(d, &mut log, true).await
    }

    /// Lets others do the srch compactions that the mount was busy with. They
    /// start again from the stored state: what the mount wrote since lies in
    /// blocks of the stored meta_avail. (Dropping them, as the original does,
    /// would leak what earlier rounds wrote; spec 06 H3.)
    async fn cancel_compactions(&self, d: &mut Dirty, rid: u64) -> Result<()> {
        let (first, last) = (Key::srch_busy(rid, 0), Key::srch_busy(rid, u64::MAX));
        let busy: Vec<(Key, SrchCompact)> =
            items::all(&self.cache, &d.sup.srch_root, first, last).await?;
        for (key, compact) in busy {
            probe("server.reclaim.compaction");
            let pending = Key::srch_pending(compact.id.get());
            items::put(&self.tx, &mut d.sup.srch_root, pending, &compact).await?;
            items::delete(&self.tx, &mut d.sup.srch_root, key).await?;
        }
        Ok(())
    }
}

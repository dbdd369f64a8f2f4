//! Every block of a volume is in exactly one place (spec 03 section 20), and the
//! log trees records obey their invariants (spec 04 section 17).

use super::FSID;
use crate::alloc::{FreeExtent, read_extents};
use crate::block::{Cache, Policy, list_entries};
use crate::btree;
use crate::env::DeviceRole;
use crate::env::testing::{MemDevice, TestEntropy, block_on};
use crate::format::*;
use crate::server::items;
use crate::volume::read_super;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::rc::Rc;
use zerocopy::FromBytes;

/// What a volume holds.
pub struct Census {
    pub sup: SuperBlock,
    pub logs: Vec<LogTrees>,
    pub mounted: Vec<u64>,
    /// Free or freed data blocks.
    pub free_data: u64,
    owners: BTreeMap<u64, String>,
    problems: Vec<String>,
    cache: Rc<Cache>,
}

/// Counts every block of the volume; whatever is wrong is an error.
pub fn census(meta: &MemDevice) -> Result<Census, String> {
    let copy = meta.snapshot();
    block_on(async move {
        let sup = read_super(&*copy.handle(), DeviceRole::Meta, Some(FSID))
            .await
            .map_err(|err| err.to_string())?;
        let entropy = TestEntropy::new(0);
        let cache = Cache::new(copy.handle(), entropy, FSID, Rc::new(Policy::default()));
        cache.set_total_blocks(sup.total_meta_blocks.get());
        let mut census = Census {
            sup,
            logs: Vec::new(),
            mounted: Vec::new(),
            free_data: 0,
            owners: BTreeMap::new(),
            problems: Vec::new(),
            cache,
        };
        census.count().await.map_err(|err| err.to_string())?;
        census.finish()
    })
}

impl Census {
    fn own(&mut self, blkno: u64, owner: &str) {
        if let Some(other) = self.owners.insert(blkno, owner.to_owned()) {
            self.problems
                .push(format!("block {blkno} is {owner} and {other}"));
        }
    }

    fn require(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.problems.push(what());
        }
    }

    async fn count(&mut self) -> Result<(), super::super::ServerError> {
        let sup = self.sup;
        for (root, name) in [
            (sup.fs_root, "fs_root"),
            (sup.logs_root, "logs_root"),
            (sup.log_merge, "log_merge"),
            (sup.mounted_clients, "mounted_clients"),
            (sup.srch_root, "srch_root"),
        ] {
            self.tree(&root, name, None).await?;
        }
        for root in sup.meta_alloc {
            self.extents(&root, true, "meta_alloc").await?;
        }
        self.extents(&sup.data_alloc, false, "data_alloc").await?;
        for head in sup.server_meta_avail.iter().chain(&sup.server_meta_freed) {
            self.list(head, "server list").await?;
        }
        self.logs = items::all_log_trees(&self.cache, &sup.logs_root).await?;
        for log in self.logs.clone() {
            self.log_trees(&log).await?;
        }
        let mounted = items::all_mounted(&self.cache, &sup.mounted_clients).await?;
        self.mounted = mounted.into_iter().map(|(rid, _)| rid).collect();
        self.merge().await
    }

    async fn tree(
        &mut self,
        root: &BtreeRoot,
        name: &str,
        from: Option<Key>,
    ) -> Result<(), super::super::ServerError> {
        let mut todo = Vec::new();
        if root.height > 0 {
            todo.push((root.block_ref, root.height - 1, Key::ONES));
        }
        while let Some((block_ref, level, greatest)) = todo.pop() {
            if from.is_some_and(|from| greatest < from) {
                continue;
            }
            let block = self.cache.read_ref(&block_ref, Magic::Btree).await?;
            let found = btree::verify_block(block.bytes(), level);
            self.require(found.is_ok(), || format!("{name}: {found:?}"));
            self.own(block_ref.blkno.get(), name);
            let (head, rest) = BtreeBlock::ref_from_prefix(block.bytes()).expect("a head");
            let nr = usize::from(head.nr_items.get());
            let bytes = &rest[..nr * size_of::<BtreeItem>()];
            for item in <[BtreeItem]>::ref_from_bytes(bytes).expect("items") {
                if level > 0 {
                    let at = usize::from(item.val_off.get());
                    let child = BlockRef::read_from_bytes(&block.bytes()[at..at + 16]);
                    todo.push((child.expect("a reference"), level - 1, item.key.key()));
                }
            }
        }
        Ok(())
    }

    async fn extents(
        &mut self,
        root: &AllocRoot,
        meta: bool,
        name: &str,
    ) -> Result<(), super::super::ServerError> {
        self.tree(&root.root, name, None).await?;
        let mut found: Vec<FreeExtent> = Vec::new();
        read_extents(&self.cache, root, &mut |extent| found.push(extent)).await?;
        let total: u64 = found.iter().map(|extent| extent.len).sum();
        let counted = root.total_len.get();
        self.require(total == counted, || {
            format!("{name}: {total} blocks, not {counted}")
        });
        for extent in found {
            if !meta {
                self.free_data += extent.len;
                continue;
            }
            for blkno in extent.start..extent.start + extent.len {
                self.own(blkno, "free extent");
            }
        }
        Ok(())
    }

    async fn list(
        &mut self,
        head: &AllocListHead,
        name: &str,
    ) -> Result<(), super::super::ServerError> {
        let (mut block_ref, mut total, mut first) = (head.block_ref, 0, true);
        while !block_ref.is_null() {
            let block = self.cache.read_ref(&block_ref, Magic::AllocList).await?;
            self.own(block_ref.blkno.get(), name);
            let (entries, next) = list_entries(block.bytes()).expect("a list block");
            if first {
                let nr = head.first_nr.get() as usize;
                self.require(nr == entries.len(), || format!("{name}: first_nr {nr}"));
            }
            first = false;
            total += entries.len() as u64;
            for blkno in entries {
                self.own(blkno, "list entry");
            }
            block_ref = next;
        }
        let counted = head.total_nr.get();
        self.require(total == counted, || {
            format!("{name}: {total} entries, not {counted}")
        });
        Ok(())
    }

    async fn log_trees(&mut self, log: &LogTrees) -> Result<(), super::super::ServerError> {
        let name = format!("log tree {:x}.{}", log.rid.get(), log.nr.get());
        self.tree(&log.item_root, &name, None).await?;
        if !log.bloom_ref.is_null() {
            self.cache.read_ref(&log.bloom_ref, Magic::Bloom).await?;
            self.own(log.bloom_ref.blkno.get(), &name);
        }
        self.list(&log.meta_avail, &name).await?;
        self.list(&log.meta_freed, &name).await?;
        self.extents(&log.data_avail, false, &name).await?;
        self.extents(&log.data_freed, false, &name).await?;
        let (get, commit) = (log.get_trans_seq.get(), log.commit_trans_seq.get());
        let seq = self.sup.seq.get();
        self.require(commit <= get && get <= seq, || {
            format!("{name}: I2 {commit} {get} {seq}")
        });
        if log.is_finalized() {
            let empty = log.meta_avail == AllocListHead::default()
                && log.meta_freed == AllocListHead::default()
                && log.data_avail == AllocRoot::default()
                && log.data_freed == AllocRoot::default()
                && log.srch_file == SrchFile::default();
            let at = log.finalize_seq.get();
            let holds = empty && get == commit && at > 0 && at <= seq;
            self.require(holds, || format!("{name}: I3 {log:?}"));
        } else {
            let rid = log.rid.get();
            let newer = self
                .logs
                .iter()
                .any(|l| l.rid.get() == rid && l.nr > log.nr);
            let holds = !newer && log.finalize_seq.get() == 0 && log.flags.get() == 0;
            self.require(holds, || format!("{name}: I1 or I4"));
        }
        Ok(())
    }

    async fn merge(&mut self) -> Result<(), super::super::ServerError> {
        let root = self.sup.log_merge;
        let status: Option<LogMergeStatus> =
            items::get(&self.cache, &root, Key::log_merge_status()).await?;
        let (first, last) = items::zone(ZONE_LOG_MERGE_FREEING);
        let freeing: Vec<(Key, LogMergeFreeing)> =
            items::all(&self.cache, &root, first, last).await?;
        for (_, item) in freeing {
            self.tree(&item.root, "freeing", Some(item.key.key()))
                .await?;
        }
        let (first, last) = items::zone(ZONE_LOG_MERGE_REQUEST);
        let requests: Vec<(Key, LogMergeRequest)> =
            items::all(&self.cache, &root, first, last).await?;
        for (_, request) in &requests {
            self.list(&request.meta_avail, "merge request").await?;
            self.list(&request.meta_freed, "merge request").await?;
        }
        let nr = status.map_or(0, |status| status.nr_requests.get());
        let found = requests.len() as u64;
        self.require(nr == found, || format!("M2: {found} requests, not {nr}"));
        self.completions().await
    }

    /// Blocks of a completion: its subtree is new where it differs from the fs
    /// root's, and what it freed is still in use there (M8).
    async fn completions(&mut self) -> Result<(), super::super::ServerError> {
        let (first, last) = items::zone(ZONE_LOG_MERGE_COMPLETE);
        let all: Vec<(Key, LogMergeComplete)> =
            items::all(&self.cache, &self.sup.log_merge, first, last).await?;
        for (_, comp) in all {
            if comp.meta_avail.block_ref.is_null() && comp.meta_freed.block_ref.is_null() {
                continue;
            }
            self.list(&comp.meta_avail, "completion").await?;
            let before = std::mem::take(&mut self.owners);
            self.tree(&comp.root, "completion", None).await?;
            let subtree = std::mem::replace(&mut self.owners, before);
            for blkno in subtree.into_keys() {
                self.owners
                    .entry(blkno)
                    .or_insert_with(|| "completion".into());
            }
            let before = std::mem::take(&mut self.owners);
            self.list(&comp.meta_freed, "completion").await?;
            let freed = std::mem::replace(&mut self.owners, before);
            for (blkno, owner) in freed {
                self.owners.entry(blkno).or_insert(owner);
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Self, String> {
        for blkno in META_DEV_START_BLKNO..self.sup.total_meta_blocks.get() {
            if !self.owners.contains_key(&blkno) {
                self.problems.push(format!("block {blkno} is nowhere"));
            }
        }
        if self.problems.is_empty() {
            return Ok(self);
        }
        let shown: Vec<String> = self.problems.iter().take(8).cloned().collect();
        Err(format!(
            "{} problems: {}",
            self.problems.len(),
            shown.join("; ")
        ))
    }

    /// The visible value of every fs item: the greatest seq wins.
    pub fn visible(&self) -> BTreeMap<Key, Bytes> {
        let mut winners: BTreeMap<Key, (u64, Option<Bytes>)> = BTreeMap::new();
        let roots = self.logs.iter().map(|log| log.item_root);
        for root in std::iter::once(self.sup.fs_root).chain(roots) {
            for (key, (seq, value)) in self.items_of(&root) {
                let old = winners.get(&key);
                if old.is_none_or(|(newest, _)| *newest < seq) {
                    winners.insert(key, (seq, value));
                }
            }
        }
        let live = winners
            .into_iter()
            .filter_map(|(key, (_, value))| Some((key, value?)));
        live.collect()
    }

    /// All items of one tree.
    pub fn items_of(&self, root: &BtreeRoot) -> super::mount::Items {
        block_on(async {
            let mut found = BTreeMap::new();
            let mut from = Key::ZEROS;
            while let Some(item) = btree::next(&self.cache, root, &from).await.expect("reads") {
                let deleted = item.flags & ITEM_FLAG_DELETION != 0;
                found.insert(item.key, (item.seq, (!deleted).then_some(item.value)));
                from = item.key.inc();
            }
            found
        })
    }
}

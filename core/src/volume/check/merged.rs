//! The merged view of the filesystem's items: fs_root overlaid by all log trees
//! (spec 01 section 15, 04 sections 13 and 17, 05 sections 9 and 10).
//!
//! All trees are walked side by side in key order, so that no item is held
//! longer than its key.

use super::cursor::{Ctx, Cursor, Item};
use super::report::{Kind, Problem};
use super::server_trees::MergeState;
use crate::format::*;
use std::rc::Rc;

/// A tree of the merged view.
pub(super) struct Source {
    name: String,
    pub cursor: Cursor,
    /// The log trees item; `None` for fs_root.
    pub log: Option<LogTrees>,
    /// Bits of the log tree's bloom block, if it could be read.
    pub bloom: Option<Rc<[u8]>>,
    /// Whether it is an input of the running merge.
    pub input: bool,
    last_lock: Option<Key>,
}

/// An item as readers see it.
pub(super) enum View {
    /// An ordinary item.
    Item(Item),
    /// A total: sum and count.
    Totl(Key, u64, u64),
}

/// Walks the sources side by side.
pub(super) struct Merged {
    ctx: Rc<Ctx>,
    merge: MergeState,
    sources: Vec<Source>,
    heads: Vec<Option<Item>>,
    /// The versions of one item, while they are looked at.
    versions: Vec<(usize, Item)>,
}

impl Source {
    pub fn new(
        cursor: Cursor,
        log: Option<LogTrees>,
        bloom: Option<Rc<[u8]>>,
        input: bool,
    ) -> Self {
        let name = cursor.name().to_owned();
        Self {
            name,
            cursor,
            log,
            bloom,
            input,
            last_lock: None,
        }
    }

    /// Checks that need only the item and its tree.
    fn check(&mut self, ctx: &Ctx, merge: &MergeState, item: &Item) {
        let bad = |kind, text: String| {
            ctx.add(Problem::error(kind, text).at(item.blkno).key(item.key));
        };
        if !(ZONE_INODE_INDEX..=ZONE_FS).contains(&item.key.zone) {
            bad(Kind::Item, format!("{}: item of a foreign zone", self.name));
        }
        ctx.check_seq(format_args!("{}: item", self.name), item.key, item.seq);
        if item.key.zone == ZONE_XATTR_TOTL
            && !item.is_deletion()
            && item.value().len() != size_of::<XattrTotlVal>()
        {
            bad(
                Kind::Item,
                format!("{}: total of a wrong length", self.name),
            );
        }
        let Some(lt) = &self.log else {
            if item.is_deletion() {
                bad(Kind::Item, "fs_root holds a deletion item".into());
            }
            return;
        };
        if item.seq > lt.max_item_seq.get() {
            let text = format!("{}: item seq above max_item_seq", self.name);
            let problem = Problem::error(Kind::LogTrees, text)
                .at(item.blkno)
                .key(item.key);
            ctx.add(problem.want(format!("at most {}", lt.max_item_seq.get()), item.seq));
        }
        if let Some(status) = merge.status.as_ref().filter(|_| self.input)
            && item.seq >= status.seq.get()
        {
            let text = format!(
                "{}: item of a merge input is newer than the merge",
                self.name
            );
            bad(Kind::LogMerge, text);
        }
        let lock = lock_start(&item.key);
        if self.last_lock != Some(lock) {
            self.last_lock = Some(lock);
            let has = |bits: &[u8], n: u32| bits[(n / 8) as usize] >> (n % 8) & 1 == 1;
            let missing = match &self.bloom {
                Some(bits) => bloom_bits(&lock).iter().any(|n| !has(bits, *n)),
                None => lt.bloom_ref.is_null(),
            };
            if missing {
                let text = format!("{}: the bloom block lacks the lock {lock}", self.name);
                bad(Kind::Bloom, text);
            }
        }
    }
}

/// Start key of the cluster lock that covers an item (spec 10 section 2).
fn lock_start(key: &Key) -> Key {
    const GROUP: u64 = !(INODE_GROUP_NR - 1);
    match key.zone {
        ZONE_FS => Key::new(ZONE_FS, key.first & GROUP, 0, 0, 0, 0),
        ZONE_INODE_INDEX => Key::new(key.zone, 0, key.kind, key.second & GROUP, 0, 0),
        ZONE_ORPHAN => Key::new(key.zone, 0, TYPE_ORPHAN, 0, 0, 0),
        zone => Key::new(zone, 0, 0, 0, 0, 0),
    }
}

impl Merged {
    pub async fn new(ctx: &Rc<Ctx>, merge: MergeState, sources: Vec<Source>) -> Self {
        let mut merged = Self {
            ctx: ctx.clone(),
            merge,
            heads: vec![None; sources.len()],
            versions: Vec::new(),
            sources,
        };
        for i in 0..merged.sources.len() {
            merged.advance(i).await;
        }
        merged
    }

    async fn advance(&mut self, i: usize) {
        let source = &mut self.sources[i];
        self.heads[i] = source.cursor.next().await;
        if let Some(item) = &self.heads[i] {
            source.check(&self.ctx, &self.merge, item);
        }
    }

    /// The next item that exists.
    pub async fn next(&mut self) -> Option<View> {
        loop {
            let keys = self.heads.iter().flatten().map(|item| &item.key);
            let key = *keys.min()?;
            let mut items = std::mem::take(&mut self.versions);
            for i in 0..self.heads.len() {
                if let Some(item) = self.heads[i].take_if(|item| item.key == key) {
                    items.push((i, item));
                    self.advance(i).await;
                }
            }
            let view = if key.zone == ZONE_XATTR_TOTL {
                self.resolve_totl(key, &items)
            } else {
                self.resolve(items.drain(..))
            };
            items.clear();
            self.versions = items;
            if view.is_some() {
                return view;
            }
        }
    }

    /// The greatest seq wins; equal seqs must be equal copies.
    fn resolve(&self, items: impl Iterator<Item = (usize, Item)>) -> Option<View> {
        let mut best: Option<(usize, Item)> = None;
        for (i, item) in items {
            if let Some((other, have)) = &best
                && have.seq == item.seq
                && (have.value() != item.value() || have.flags != item.flags)
            {
                let text = format!(
                    "{} and {} hold different versions of an item with the same seq {}",
                    self.sources[*other].name, self.sources[i].name, item.seq
                );
                self.ctx.add(
                    Problem::error(Kind::Item, text)
                        .at(item.blkno)
                        .key(item.key),
                );
            }
            if best.as_ref().is_none_or(|(_, have)| item.seq > have.seq) {
                best = Some((i, item));
            }
        }
        best.map(|(_, item)| item)
            .filter(|item| !item.is_deletion())
            .map(View::Item)
    }

    /// Totals are sums: of fs_root, of all trees that are no inputs, and of the
    /// inputs unless this key was merged (spec 05 section 10, the exact rule).
    fn resolve_totl(&self, key: Key, items: &[(usize, Item)]) -> Option<View> {
        let merged = self.merge.is_merged(&key);
        let (mut total, mut count) = (0u64, 0u64);
        for (i, item) in items {
            if self.sources[*i].input && merged {
                continue;
            }
            if let Ok(val) = value_exact::<XattrTotlVal>("total", item.value()) {
                total = total.wrapping_add(val.total.get());
                count = count.wrapping_add(val.count.get());
            }
        }
        ((total, count) != (0, 0)).then_some(View::Totl(key, total, count))
    }
}

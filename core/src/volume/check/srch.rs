//! Srch files and compactions (spec 06 section 12, S1 to S6).

use super::cursor::{Ctx, Parse};
use super::report::{Kind, Problem};
use super::server_trees::{ListUse, check_key, tree, value, walk_list};
use crate::env::HashSet;
use crate::format::*;
use std::collections::BTreeSet;
use std::rc::Rc;
use zerocopy::FromBytes;

/// Greatest height whose coverage fits 64 bits.
const MAX_HEIGHT: u8 = 6;

/// An entry as a number triple, in comparison order.
pub(super) type Entry = (u64, u64, u64);

/// Entries that occur an odd number of times, and whether all could be read.
#[derive(Default)]
pub(super) struct SrchEntries {
    pub odd: HashSet<Entry>,
    pub damaged: bool,
}

impl SrchEntries {
    fn toggle(&mut self, entry: Entry) {
        if !self.odd.remove(&entry) {
            self.odd.insert(entry);
        }
    }
}

/// What is to be learned from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contents {
    /// An unsorted log file.
    Log,
    /// A sorted file.
    Sorted,
    /// Output of unfinished work: sorted, its entries do not count.
    Output,
    /// An input being deleted, as far as `(blk, pos)`: only its blocks matter.
    Deleting { blk: u64, pos: u64 },
}

/// Checks the files of log trees and srch_root with its compactions. Lists whose
/// entries may still be referenced are returned for later.
pub(super) async fn check_srch(
    ctx: &Rc<Ctx>,
    logs: &[LogTrees],
) -> (SrchEntries, Vec<AllocListHead>) {
    let mut entries = SrchEntries::default();
    let mut pending = Vec::new();
    for lt in logs {
        walk_file(ctx, &lt.srch_file, Contents::Log, &mut entries).await;
    }
    let mut ids = BTreeSet::new();
    let mut cursor = tree(ctx, "srch_root", &ctx.sb.srch_root);
    while let Some(item) = cursor.next().await {
        match (item.key.zone, item.key.kind) {
            (ZONE_SRCH, kind @ (TYPE_SRCH_LOG | TYPE_SRCH_BLOCKS)) => {
                let Some(file) = value::<SrchFile>(ctx, "srch file", &item) else {
                    entries.damaged = true;
                    continue;
                };
                let blkno = file.block_ref.blkno.get();
                let (key, contents) = if kind == TYPE_SRCH_LOG {
                    (Key::srch_log(blkno), Contents::Log)
                } else {
                    (Key::srch_blocks(file.blocks.get(), blkno), Contents::Sorted)
                };
                check_key(ctx, "srch file", &item, key);
                walk_file(ctx, &file, contents, &mut entries).await;
            }
            (ZONE_SRCH, kind @ (TYPE_SRCH_PENDING | TYPE_SRCH_BUSY)) => {
                let Some(comp) = value::<SrchCompact>(ctx, "srch compaction", &item) else {
                    continue;
                };
                let id = comp.id.get();
                let key = if kind == TYPE_SRCH_PENDING {
                    Key::srch_pending(id)
                } else {
                    Key::srch_busy(item.key.second, id)
                };
                check_key(ctx, "srch compaction", &item, key);
                if !ids.insert(id) {
                    let text = "two srch compactions have the same id";
                    ctx.add(Problem::error(Kind::Srch, text).key(item.key));
                }
                check_compaction(ctx, item.key, &comp).await;
                pending.push(comp.meta_freed);
            }
            _ => {
                let text = "srch_root holds an item that does not belong there";
                ctx.add(
                    Problem::error(Kind::Item, text)
                        .at(item.blkno)
                        .key(item.key),
                );
            }
        }
    }
    entries.damaged |= ctx.damaged.get();
    (entries, pending)
}

async fn check_compaction(ctx: &Rc<Ctx>, key: Key, comp: &SrchCompact) {
    let bad = |text: &str| ctx.add(Problem::error(Kind::Srch, text).key(key));
    let nr = usize::from(comp.nr);
    if nr == 0 || nr > SRCH_COMPACT_NR {
        bad("a srch compaction has a wrong number of inputs");
    }
    let inputs = &comp.input[..nr.min(SRCH_COMPACT_NR)];
    walk_list(
        ctx,
        &comp.meta_avail,
        "a srch compaction's meta_avail",
        ListUse::Free,
    )
    .await;
    let mut ignored = SrchEntries::default();
    match comp.flags {
        SRCH_COMPACT_FLAG_LOG | SRCH_COMPACT_FLAG_SORTED => {
            walk_file(ctx, &comp.out, Contents::Output, &mut ignored).await;
        }
        SRCH_COMPACT_FLAG_DELETE => {
            for input in inputs {
                let (blk, pos) = (input.blk.get(), input.pos.get());
                let contents = Contents::Deleting { blk, pos };
                walk_file(ctx, &input.sfl, contents, &mut ignored).await;
            }
        }
        _ => bad("a srch compaction has not exactly one kind of work"),
    }
}

/// Leaf blocks below one reference at `level` (0 is a leaf).
fn coverage(level: u8) -> u64 {
    (SRCH_PARENT_REFS as u64).saturating_pow(u32::from(level))
}

/// Walks a file's blocks, claims them, and decodes its entries.
async fn walk_file(ctx: &Rc<Ctx>, file: &SrchFile, contents: Contents, out: &mut SrchEntries) {
    let (height, blocks) = (file.height, file.blocks.get());
    let root = file.block_ref;
    let bad = |text: String| {
        ctx.add(Problem::error(Kind::Srch, text).at(root.blkno.get()));
    };
    if height == 0 {
        if *file != SrchFile::default() {
            bad("an empty srch file has contents".into());
        }
        return;
    }
    let need = (1..=MAX_HEIGHT).find(|h| coverage(h - 1) >= blocks);
    if blocks == 0 || need != Some(height) || root.is_null() {
        bad(format!(
            "a srch file of {blocks} blocks has the height {height}"
        ));
        out.damaged = true;
        return;
    }
    if let Contents::Deleting { pos, .. } = contents
        && pos > u64::from(height)
    {
        return;
    }
    let mut walk = Leaves {
        nr: 0,
        last: None,
        contents,
    };
    // (reference, level, first leaf below it)
    let mut stack = vec![(root, height - 1, 0u64)];
    while let Some((r, level, first)) = stack.pop() {
        let is_root = level == height - 1;
        if !is_root && is_gone(contents, level, first) {
            continue;
        }
        if r.is_null() {
            bad(format!(
                "a srch file of {blocks} blocks lacks block {first}"
            ));
            out.damaged = true;
            continue;
        }
        if !ctx.claim(r.blkno.get(), "a srch file") {
            out.damaged = true;
            continue;
        }
        if level == 0 {
            match ctx.read::<Leaf>(&r, "a srch file").await {
                Some(leaf) => walk.leaf(ctx, file, r.blkno.get(), &leaf, out),
                None => out.damaged = true,
            }
            continue;
        }
        let Some(parent) = ctx.read::<Parent>(&r, "a srch file").await else {
            out.damaged = true;
            continue;
        };
        let step = coverage(level - 1);
        let mut children = Vec::new();
        for i in 0..SRCH_PARENT_REFS {
            let at = first + i as u64 * step;
            if at >= blocks {
                break;
            }
            let child = parent.refs.get(i).copied().unwrap_or_default();
            children.push((child, level - 1, at));
        }
        stack.extend(children.into_iter().rev());
    }
    let counts = !matches!(contents, Contents::Deleting { .. });
    if counts && walk.nr != file.entries.get() && !ctx.damaged.get() {
        let problem = Problem::error(Kind::Srch, "a srch file miscounts its entries");
        ctx.add(
            problem
                .at(root.blkno.get())
                .want(walk.nr, file.entries.get()),
        );
    }
}

/// Whether the deletion of a file has passed a block (spec 06 section 9).
fn is_gone(contents: Contents, level: u8, first: u64) -> bool {
    let Contents::Deleting { blk, pos } = contents else {
        return false;
    };
    let freeing = pos.max(1);
    let parent = u64::from(level) + 1;
    parent < freeing || (parent == freeing && first < blk)
}

/// A parent block of a file: its references, without the null ones at the end.
struct Parent {
    refs: Vec<BlockRef>,
}

impl Parse for Parent {
    const MAGIC: Magic = Magic::SrchParent;

    fn parse(block: &[u8]) -> Self {
        let refs = block[size_of::<BlockHeader>()..].chunks_exact(size_of::<BlockRef>());
        let read = |bytes| BlockRef::read_from_prefix(bytes).expect("16 bytes").0;
        let mut refs: Vec<BlockRef> = refs.take(SRCH_PARENT_REFS).map(read).collect();
        while refs.pop_if(|last| *last == BlockRef::default()).is_some() {}
        Self { refs }
    }
}

/// A leaf block of a file.
struct Leaf {
    first: Entry,
    last: Entry,
    tail: Entry,
    entries: Result<Vec<Entry>, String>,
}

impl Parse for Leaf {
    const MAGIC: Magic = Magic::SrchBlock;

    fn parse(block: &[u8]) -> Self {
        let (head, _) = SrchBlock::read_from_prefix(block).expect("a whole block");
        Self {
            first: triple(&head.first),
            last: triple(&head.last),
            tail: triple(&head.tail),
            entries: decode_entries(&head, &block[SRCH_ENTRIES_START..]),
        }
    }
}

struct Leaves {
    nr: u64,
    last: Option<Entry>,
    contents: Contents,
}

fn triple(e: &SrchEntry) -> Entry {
    (e.hash.get(), e.ino.get(), e.id.get())
}

impl Leaves {
    fn leaf(&mut self, ctx: &Ctx, file: &SrchFile, blkno: u64, leaf: &Leaf, out: &mut SrchEntries) {
        if matches!(self.contents, Contents::Deleting { .. }) {
            return;
        }
        let bad = |text: String| ctx.add(Problem::error(Kind::Srch, text).at(blkno));
        let entries = match &leaf.entries {
            Ok(entries) => entries,
            Err(text) => {
                bad(text.clone());
                out.damaged = true;
                return;
            }
        };
        if entries.is_empty() {
            let text = "a srch block without entries, as the original may leave it";
            ctx.add(Problem::note(Kind::Srch, text).at(blkno));
            return;
        }
        self.nr += entries.len() as u64;
        let least = entries.iter().min().copied();
        let greatest = entries.iter().max().copied();
        let tail = entries.last().copied();
        if least != Some(leaf.first) || greatest != Some(leaf.last) {
            bad("a srch block's first or last entry is wrong".into());
        }
        if tail != Some(leaf.tail) {
            bad("a srch block's tail is not its last entry".into());
        }
        if least < Some(triple(&file.first)) || greatest > Some(triple(&file.last)) {
            bad("a srch block has entries outside of its file's range".into());
        }
        for entry in entries.iter().copied() {
            if self.contents != Contents::Log && self.last.is_some_and(|last| entry < last) {
                bad("a sorted srch file is not in order".into());
            }
            self.last = Some(entry);
            if self.contents != Contents::Output {
                out.toggle(entry);
            }
        }
    }
}

/// Decodes the entries of a leaf (spec 06 section 2).
///
/// # Errors
/// A sentence about what does not fit.
pub fn decode_entries(head: &SrchBlock, bytes: &[u8]) -> Result<Vec<Entry>, String> {
    let end = head.entry_bytes.get() as usize;
    if end > bytes.len() {
        return Err(format!("a srch block counts {end} bytes of entries"));
    }
    let mut entries = Vec::new();
    let mut last = [0u64; 3];
    let mut at = 0;
    while at < end {
        if at > SRCH_SAFE_BYTES {
            return Err("a srch entry starts beyond the safe limit".into());
        }
        let Some(lengths) = bytes.get(at..at + 2) else {
            return Err("a srch entry is cut off".into());
        };
        let lengths = u16::from_le_bytes([lengths[0], lengths[1]]);
        at += 2;
        for (i, field) in last.iter_mut().enumerate() {
            let len = usize::from(lengths >> (4 * i) & 0xf).min(8);
            let Some(stored) = bytes.get(at..at + len) else {
                return Err("a srch entry is cut off".into());
            };
            let mut word = [0; 8];
            word[..len].copy_from_slice(stored);
            let z = u64::from_le_bytes(word);
            let diff = (z >> 1) ^ (z & 1).wrapping_neg();
            *field = field.wrapping_add(diff);
            at += len;
        }
        entries.push((last[0], last[1], last[2]));
    }
    if at != end || entries.len() != head.entry_nr.get() as usize {
        return Err(format!(
            "a srch block of {} entries in {end} bytes decodes to {} in {at}",
            head.entry_nr.get(),
            entries.len()
        ));
    }
    Ok(entries)
}

//! Printing a volume: every structure and item of its metadata device as a
//! stream of records, for people as text and for programs as one JSON object a
//! line (spec 17 section 12).
//!
//! What can not be read is printed as a problem and passed over; references are
//! followed once, so damage neither stops the print nor makes it endless.

mod fields;
mod record;
mod values;

pub use record::Record;

use super::VolumeError;
use super::check::{Census, decode_entries, parse_btree_block};
use super::superblock::{parse_super, read_large, read_quorum_block, read_small};
use crate::env::{AlignedBuf, BlockDevice, DeviceRole};
use crate::format::*;
use fields::{alloc_root, btree_root, header, list_head};
use serde_json::json;
use std::cell::RefCell;
use std::rc::Rc;
use zerocopy::FromBytes;

/// What to print.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrintOptions {
    /// Leave out what grows with the volume: items of the filesystem, free
    /// extents, list entries, srch entries.
    pub skip_huge: bool,
}

/// Takes the records one by one.
pub type Sink<'a> = dyn FnMut(Record) + 'a;

struct Printer<'a> {
    meta: Rc<dyn BlockDevice>,
    fsid: u64,
    fmt_vers: u64,
    skip_huge: bool,
    seen: RefCell<Census>,
    out: &'a mut Sink<'a>,
}

/// Prints all metadata of a volume.
///
/// # Errors
/// If the super block can not be read.
pub async fn print<'a>(
    meta: Rc<dyn BlockDevice>,
    options: PrintOptions,
    out: &'a mut Sink<'a>,
) -> Result<(), VolumeError> {
    let role = DeviceRole::Meta;
    let block = read_small(&*meta, role, SUPER_BLKNO).await?;
    let sb = parse_super(&block, role, None)?;
    let blocks = meta.size() >> LG_BLOCK_SHIFT;
    let mut p = Printer {
        meta,
        fsid: sb.hdr.fsid.get(),
        fmt_vers: sb.fmt_vers.get(),
        skip_huge: options.skip_huge,
        seen: RefCell::new(Census::new(blocks)),
        out,
    };
    p.emit(fields::super_block(&sb));
    p.quorum().await;
    p.server(&sb).await;
    let logs = p.logs(&sb).await;
    for lt in &logs {
        p.log_tree(lt).await;
    }
    p.merge(&sb).await;
    p.srch(&sb).await;
    if !p.skip_huge {
        p.tree("fs_root", &sb.fs_root, &mut Vec::new()).await;
    }
    Ok(())
}

/// Prints one large block as what its header says it is, whether or not anything refers
/// to it. The block after the first, number 1, has the super block and the quorum's.
///
/// # Errors
/// If the super block or the block can not be read.
pub async fn print_block<'a>(
    meta: Rc<dyn BlockDevice>,
    blkno: u64,
    out: &'a mut Sink<'a>,
) -> Result<(), VolumeError> {
    let role = DeviceRole::Meta;
    let block = read_small(&*meta, role, SUPER_BLKNO).await?;
    let sb = parse_super(&block, role, None)?;
    let mut p = Printer {
        fsid: sb.hdr.fsid.get(),
        fmt_vers: sb.fmt_vers.get(),
        skip_huge: false,
        seen: RefCell::new(Census::new(0)),
        meta,
        out,
    };
    if blkno == SUPER_BLKNO >> (LG_BLOCK_SHIFT - SM_BLOCK_SHIFT) {
        p.emit(fields::super_block(&sb));
        p.quorum().await;
        return Ok(());
    }
    let block = read_large(&*p.meta, blkno).await?;
    let hdr = read_header(&block);
    let magic = Magic::from_value(hdr.magic.get());
    let own = BlockRef {
        blkno: blkno.into(),
        seq: hdr.seq,
    };
    let verified = magic.map(|magic| verify_ref(&block, magic, p.fsid, &own));
    if let Some(Err(error)) = &verified {
        p.problem("block", blkno, error.to_string());
    }
    match magic {
        Some(Magic::Btree) if verified == Some(Ok(())) => {
            p.btree_block("block", &block, None);
        }
        Some(Magic::AllocList) => p.list_block("block", None, &block),
        Some(Magic::Bloom) => p.bloom_block("block", &block),
        Some(Magic::SrchParent) => {
            p.srch_parent("block", None, &block);
        }
        Some(Magic::SrchBlock) => p.srch_block("block", &block),
        _ => {
            let record = Record::new("block", 0).with("hdr", header(&hdr));
            p.emit(record);
        }
    }
    Ok(())
}

impl Printer<'_> {
    fn emit(&mut self, record: Record) {
        (self.out)(record);
    }

    fn problem(&mut self, what: &str, blkno: u64, text: String) {
        let record = Record::new("problem", 0)
            .with("where", what)
            .with("blkno", blkno)
            .with("text", text);
        self.emit(record);
    }

    async fn quorum(&mut self) {
        for slot in 0..QUORUM_MAX_SLOTS {
            match read_quorum_block(&*self.meta, self.fsid, slot).await {
                Ok(block) => self.emit(fields::quorum_block(slot, &block)),
                Err(e) => self.problem("quorum", QUORUM_BLKNO + slot as u64, e.to_string()),
            }
        }
    }

    async fn server(&mut self, sb: &SuperBlock) {
        self.tree("mounted_clients", &sb.mounted_clients, &mut Vec::new())
            .await;
        for (i, head) in sb.server_meta_avail.iter().enumerate() {
            self.list(&format!("server_meta_avail[{i}]"), head).await;
        }
        for (i, head) in sb.server_meta_freed.iter().enumerate() {
            self.list(&format!("server_meta_freed[{i}]"), head).await;
        }
        for (i, root) in sb.meta_alloc.iter().enumerate() {
            self.alloc(&format!("meta_alloc[{i}]"), root).await;
        }
        self.alloc("data_alloc", &sb.data_alloc).await;
    }

    async fn logs(&mut self, sb: &SuperBlock) -> Vec<LogTrees> {
        let mut values = Vec::new();
        self.tree("logs_root", &sb.logs_root, &mut values).await;
        let logs = values.iter().filter(|(key, _)| key.zone == ZONE_LOG_TREES);
        logs.filter_map(|(_, v)| LogTrees::read_from_bytes(v).ok())
            .collect()
    }

    async fn log_tree(&mut self, lt: &LogTrees) {
        let name = |what: &str| format!("{what} of {:016x} nr {}", lt.rid.get(), lt.nr.get());
        self.list(&name("meta_avail"), &lt.meta_avail).await;
        self.list(&name("meta_freed"), &lt.meta_freed).await;
        self.alloc(&name("data_avail"), &lt.data_avail).await;
        self.alloc(&name("data_freed"), &lt.data_freed).await;
        self.bloom(&name("bloom"), &lt.bloom_ref).await;
        self.srch_file(&name("srch_file"), &lt.srch_file).await;
        if !self.skip_huge {
            self.tree(&name("item_root"), &lt.item_root, &mut Vec::new())
                .await;
        }
    }

    async fn merge(&mut self, sb: &SuperBlock) {
        let mut values = Vec::new();
        self.tree("log_merge", &sb.log_merge, &mut values).await;
        for (key, value) in values {
            if key.zone == ZONE_LOG_MERGE_REQUEST
                && let Ok(req) = LogMergeRequest::read_from_bytes(&value)
            {
                let seq = req.seq.get();
                self.list(
                    &format!("meta_avail of merge request {seq}"),
                    &req.meta_avail,
                )
                .await;
                self.list(
                    &format!("meta_freed of merge request {seq}"),
                    &req.meta_freed,
                )
                .await;
            }
            if key.zone == ZONE_LOG_MERGE_COMPLETE
                && let Ok(comp) = LogMergeComplete::read_from_bytes(&value)
            {
                let seq = comp.seq.get();
                self.list(
                    &format!("meta_avail of merge completion {seq}"),
                    &comp.meta_avail,
                )
                .await;
                self.list(
                    &format!("meta_freed of merge completion {seq}"),
                    &comp.meta_freed,
                )
                .await;
                if !self.skip_huge {
                    let name = format!("root of merge completion {seq}");
                    self.tree(&name, &comp.root, &mut Vec::new()).await;
                }
            }
        }
    }

    async fn srch(&mut self, sb: &SuperBlock) {
        let mut values = Vec::new();
        self.tree("srch_root", &sb.srch_root, &mut values).await;
        for (key, value) in values {
            match key.kind {
                TYPE_SRCH_LOG | TYPE_SRCH_BLOCKS => {
                    if let Ok(file) = SrchFile::read_from_bytes(&value) {
                        self.srch_file(&format!("srch file {key}"), &file).await;
                    }
                }
                _ => {
                    if let Ok(comp) = SrchCompact::read_from_bytes(&value) {
                        let name =
                            |what: &str| format!("{what} of srch compaction {}", comp.id.get());
                        self.list(&name("meta_avail"), &comp.meta_avail).await;
                        self.list(&name("meta_freed"), &comp.meta_freed).await;
                        self.srch_file(&name("out"), &comp.out).await;
                    }
                }
            }
        }
    }

    /// Reads a block that was not printed before.
    async fn read(&mut self, what: &str, r: &BlockRef, magic: Magic) -> Option<AlignedBuf> {
        let blkno = r.blkno.get();
        if blkno < META_DEV_START_BLKNO || !self.seen.borrow_mut().insert(blkno) {
            let text = "referenced twice, or outside of the device".to_owned();
            self.problem(what, blkno, text);
            return None;
        }
        let result = match read_large(&*self.meta, blkno).await {
            Ok(block) => match verify_ref(&block, magic, self.fsid, r) {
                Ok(()) => return Some(block),
                Err(e) => e.to_string(),
            },
            Err(e) => e.to_string(),
        };
        self.problem(what, blkno, result);
        None
    }

    async fn alloc(&mut self, what: &str, root: &AllocRoot) {
        if root.root.is_empty() {
            return;
        }
        self.emit(
            Record::new("alloc_root", 0)
                .with("name", what)
                .with("root", alloc_root(root)),
        );
        if !self.skip_huge {
            self.tree(what, &root.root, &mut Vec::new()).await;
        }
    }

    async fn list(&mut self, what: &str, head: &AllocListHead) {
        let mut next = head.block_ref;
        while !next.is_null() {
            let Some(block) = self.read(what, &next, Magic::AllocList).await else {
                return;
            };
            self.list_block(what, Some(head), &block);
            let (lb, _) = AllocListBlock::read_from_prefix(&block).expect("a whole block");
            next = lb.next;
        }
    }

    fn list_block(&mut self, what: &str, head: Option<&AllocListHead>, block: &[u8]) {
        let (lb, entries) = AllocListBlock::read_from_prefix(block).expect("a whole block");
        let mut record = Record::new("alloc_list_block", 0).with("name", what);
        if let Some(head) = head {
            record = record.with("head", list_head(head));
        }
        let record = record
            .with("hdr", header(&lb.hdr))
            .with("next", fields::block_ref(&lb.next))
            .with("start", lb.start.get())
            .with("nr", lb.nr.get());
        let (start, nr) = (lb.start.get() as usize, lb.nr.get() as usize);
        let range = start.saturating_mul(8)..start.saturating_add(nr).saturating_mul(8);
        let record = match entries.get(range) {
            Some(_) if self.skip_huge => record,
            Some(bytes) => record.with("extents", fields::blknos_as_extents(bytes)),
            None => record.with("problem", "the entries do not fit in the block"),
        };
        self.emit(record);
    }

    async fn bloom(&mut self, what: &str, r: &BlockRef) {
        if r.is_null() {
            return;
        }
        if let Some(block) = self.read(what, r, Magic::Bloom).await {
            self.bloom_block(what, &block);
        }
    }

    fn bloom_block(&mut self, what: &str, block: &[u8]) {
        let (bloom, _) = BloomBlock::read_from_prefix(block).expect("a whole block");
        let record = Record::new("bloom_block", 0)
            .with("name", what)
            .with("hdr", header(&bloom.hdr))
            .with("total_set", bloom.total_set.get());
        self.emit(record);
    }

    /// Walks a tree: its blocks and items. Values of server items are kept for
    /// what hangs on them.
    async fn tree(&mut self, what: &str, root: &BtreeRoot, keep: &mut Vec<(Key, Vec<u8>)>) {
        if root.block_ref.is_null() {
            return;
        }
        let record = Record::new("btree_root", 0)
            .with("name", what)
            .with("root", btree_root(root));
        self.emit(record);
        let fs = what == "fs_root" || what.starts_with("item_root") || what.starts_with("root of");
        let alloc = what.starts_with("meta_alloc") || what.starts_with("data_");
        let mut stack = vec![root.block_ref];
        while let Some(r) = stack.pop() {
            let Some(block) = self.read(what, &r, Magic::Btree).await else {
                continue;
            };
            let keep = (!fs && !alloc).then_some(&mut *keep);
            let children = self.btree_block(what, &block, keep);
            stack.extend(children.into_iter().rev());
        }
    }

    /// Prints a block of a tree and its items; gives its children.
    fn btree_block(
        &mut self,
        what: &str,
        block: &[u8],
        mut keep: Option<&mut Vec<(Key, Vec<u8>)>>,
    ) -> Vec<BlockRef> {
        let parsed = parse_btree_block(block);
        self.emit(fields::btree_block(what, block, &parsed));
        let mut children = Vec::new();
        for (i, item) in parsed.items.iter().enumerate() {
            let (raw, _) = BtreeItem::read_from_prefix(&block[item.offset..])
                .expect("parsed to be inside the block");
            let value = &block[item.val_off..item.val_off + item.val_len];
            let record = fields::item(i, item, &raw);
            if parsed.level > 0 {
                let child = BlockRef::read_from_bytes(value).unwrap_or_default();
                children.push(child);
                self.emit(record.with("ref", fields::block_ref(&child)));
                continue;
            }
            let decoded = if raw.flags & ITEM_FLAG_DELETION != 0 {
                json!({ "deleted": true })
            } else {
                values::decode(&item.key, value, self.fmt_vers)
            };
            self.emit(record.with("value", decoded));
            if let Some(keep) = &mut keep {
                keep.push((item.key, value.to_vec()));
            }
        }
        children
    }

    async fn srch_file(&mut self, what: &str, file: &SrchFile) {
        if file.height == 0 {
            return;
        }
        let record = Record::new("srch_file", 0)
            .with("name", what)
            .with("file", fields::srch_file(file));
        self.emit(record);
        if self.skip_huge {
            return;
        }
        let mut stack = vec![(file.block_ref, file.height.min(8) - 1)];
        while let Some((r, level)) = stack.pop() {
            let magic = if level == 0 {
                Magic::SrchBlock
            } else {
                Magic::SrchParent
            };
            let Some(block) = self.read(what, &r, magic).await else {
                continue;
            };
            if level == 0 {
                self.srch_block(what, &block);
                continue;
            }
            let refs = self.srch_parent(what, Some(level), &block);
            stack.extend(refs.into_iter().rev().map(|r| (r, level - 1)));
        }
    }

    /// Prints a parent of srch blocks; gives its children.
    fn srch_parent(&mut self, what: &str, level: Option<u8>, block: &[u8]) -> Vec<BlockRef> {
        let refs: Vec<BlockRef> = block[size_of::<BlockHeader>()..]
            .chunks_exact(size_of::<BlockRef>())
            .filter_map(|bytes| BlockRef::read_from_bytes(bytes).ok())
            .filter(|r| !r.is_null())
            .collect();
        let mut record = Record::new("srch_parent", 0)
            .with("name", what)
            .with("hdr", header(&read_header(block)));
        if let Some(level) = level {
            record = record.with("level", level);
        }
        let shown: Vec<_> = refs.iter().map(fields::block_ref).collect();
        self.emit(record.with("refs", shown));
        refs
    }

    fn srch_block(&mut self, what: &str, block: &[u8]) {
        let (head, entries) = SrchBlock::read_from_prefix(block).expect("a whole block");
        let record = Record::new("srch_block", 0)
            .with("name", what)
            .with("hdr", header(&head.hdr))
            .with("first", fields::srch_entry(&head.first))
            .with("last", fields::srch_entry(&head.last))
            .with("tail", fields::srch_entry(&head.tail))
            .with("entry_nr", head.entry_nr.get())
            .with("entry_bytes", head.entry_bytes.get());
        let record = match decode_entries(&head, entries) {
            Ok(found) => {
                let text = |(hash, ino, id): (u64, u64, u64)| format!("{hash:016x}.{ino}.{id}");
                record.with("entries", found.into_iter().map(text).collect::<Vec<_>>())
            }
            Err(e) => record.with("problem", e),
        };
        self.emit(record);
    }
}

#[cfg(test)]
mod tests;

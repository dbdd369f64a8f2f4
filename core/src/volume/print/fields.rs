//! Structures of the format as printed fields.

use super::super::check::{ItemAt, Parsed};
use super::record::Record;
use crate::format::*;
use serde_json::{Value, json};
use zerocopy::FromBytes;

fn hex64(n: u64) -> String {
    format!("{n:016x}")
}

pub(super) fn header(h: &BlockHeader) -> Value {
    json!({
        "crc": format!("{:08x}", h.crc.get()),
        "magic": format!("{:08x}", h.magic.get()),
        "fsid": hex64(h.fsid.get()),
        "blkno": h.blkno.get(),
        "seq": h.seq.get(),
    })
}

pub(super) fn block_ref(r: &BlockRef) -> Value {
    json!({ "blkno": r.blkno.get(), "seq": r.seq.get() })
}

pub(super) fn btree_root(r: &BtreeRoot) -> Value {
    json!({ "blkno": r.block_ref.blkno.get(), "seq": r.block_ref.seq.get(), "height": r.height })
}

pub(super) fn alloc_root(r: &AllocRoot) -> Value {
    json!({
        "blkno": r.root.block_ref.blkno.get(),
        "seq": r.root.block_ref.seq.get(),
        "height": r.root.height,
        "total_len": r.total_len.get(),
        "flags": r.flags.get(),
    })
}

pub(super) fn list_head(h: &AllocListHead) -> Value {
    json!({
        "blkno": h.block_ref.blkno.get(),
        "seq": h.block_ref.seq.get(),
        "total_nr": h.total_nr.get(),
        "first_nr": h.first_nr.get(),
        "flags": h.flags.get(),
    })
}

pub(super) fn srch_entry(e: &SrchEntry) -> String {
    format!("{:016x}.{}.{}", e.hash.get(), e.ino.get(), e.id.get())
}

pub(super) fn srch_file(f: &SrchFile) -> Value {
    json!({
        "first": srch_entry(&f.first),
        "last": srch_entry(&f.last),
        "blkno": f.block_ref.blkno.get(),
        "seq": f.block_ref.seq.get(),
        "blocks": f.blocks.get(),
        "entries": f.entries.get(),
        "height": f.height,
    })
}

pub(super) fn time(t: &Timespec) -> String {
    format!("{}.{:09}", t.sec.get(), t.nsec.get())
}

pub(super) fn address(a: &InetAddr) -> String {
    match a.v4() {
        Some(addr) => addr.to_string(),
        None => format!("family {}", a.family.get()),
    }
}

/// Block numbers as runs `first,count`.
pub(super) fn blknos_as_extents(bytes: &[u8]) -> Vec<String> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for entry in bytes.chunks_exact(8) {
        let mut word = [0; 8];
        word.copy_from_slice(entry);
        let blkno = u64::from_le_bytes(word);
        match runs.last_mut() {
            Some((start, nr)) if start.checked_add(*nr) == Some(blkno) => *nr += 1,
            _ => runs.push((blkno, 1)),
        }
    }
    runs.iter()
        .map(|(start, nr)| format!("{start},{nr}"))
        .collect()
}

pub(super) fn super_block(sb: &SuperBlock) -> Record {
    let uuid: String = sb
        .uuid
        .iter()
        .enumerate()
        .map(|(i, b)| {
            let dash = if [4, 6, 8, 10].contains(&i) { "-" } else { "" };
            format!("{dash}{b:02x}")
        })
        .collect();
    let slots = sb
        .qconf
        .slots
        .iter()
        .enumerate()
        .filter(|(_, s)| s.family.get() != AF_NONE);
    let slots: Vec<Value> = slots
        .map(|(nr, slot)| json!({ "slot": nr, "addr": address(slot) }))
        .collect();
    let volopt = &sb.volopt;
    Record::new("super", 0)
        .with("hdr", header(&sb.hdr))
        .with("fmt_vers", sb.fmt_vers.get())
        .with("flags", sb.flags.get())
        .with("uuid", uuid)
        .with("seq", sb.seq.get())
        .with("next_ino", sb.next_ino.get())
        .with("inode_count", sb.inode_count.get())
        .with("total_meta_blocks", sb.total_meta_blocks.get())
        .with("total_data_blocks", sb.total_data_blocks.get())
        .with("meta_alloc[0]", alloc_root(&sb.meta_alloc[0]))
        .with("meta_alloc[1]", alloc_root(&sb.meta_alloc[1]))
        .with("data_alloc", alloc_root(&sb.data_alloc))
        .with("server_meta_avail[0]", list_head(&sb.server_meta_avail[0]))
        .with("server_meta_avail[1]", list_head(&sb.server_meta_avail[1]))
        .with("server_meta_freed[0]", list_head(&sb.server_meta_freed[0]))
        .with("server_meta_freed[1]", list_head(&sb.server_meta_freed[1]))
        .with("fs_root", btree_root(&sb.fs_root))
        .with("logs_root", btree_root(&sb.logs_root))
        .with("log_merge", btree_root(&sb.log_merge))
        .with("mounted_clients", btree_root(&sb.mounted_clients))
        .with("srch_root", btree_root(&sb.srch_root))
        .with("volopt_set_bits", volopt.set_bits.get())
        .with(
            "data_alloc_zone_blocks",
            volopt.data_alloc_zone_blocks.get(),
        )
        .with("quorum_config_version", sb.qconf.version.get())
        .with("quorum_slots", slots)
}

pub(super) fn quorum_block(slot: usize, block: &QuorumBlock) -> Record {
    let mut record = Record::new("quorum_block", 0)
        .with("slot", slot)
        .with("write_nr", block.write_nr.get())
        .with("hdr", header(&block.hdr));
    for kind in QuorumEventKind::ALL {
        let event = block.event(kind);
        let value = json!({
            "rid": hex64(event.rid.get()),
            "term": event.term.get(),
            "write_nr": event.write_nr.get(),
            "ts": time(&event.ts),
        });
        record = record.with(kind.name(), value);
    }
    record
}

pub(super) fn btree_block(name: &str, block: &[u8], parsed: &Parsed) -> Record {
    let (head, _) = BtreeBlock::read_from_prefix(block).expect("a whole block");
    let mut record = Record::new("btree_block", 0)
        .with("name", name)
        .with("level", head.level)
        .with("nr_items", head.nr_items.get())
        .with("item_root", head.item_root.get())
        .with("total_item_bytes", head.total_item_bytes.get())
        .with("mid_free_len", head.mid_free_len.get())
        .with("hdr", header(&head.hdr));
    if head.level == 0 {
        let buckets = block[BTREE_HASH_START..].chunks_exact(2).enumerate();
        let used: Vec<String> = buckets
            .map(|(i, b)| (i, u16::from_le_bytes([b[0], b[1]])))
            .filter(|(_, offset)| *offset != 0)
            .map(|(i, offset)| format!("{i},{offset}"))
            .collect();
        record = record.with("item_hash", used);
    }
    if !parsed.problems.is_empty() {
        let problems: Vec<String> = parsed.problems.iter().map(ToString::to_string).collect();
        record = record.with("problems", problems);
    }
    record
}

pub(super) fn item(index: usize, item: &ItemAt, raw: &BtreeItem) -> Record {
    Record::new("item", 1)
        .with("nr", index)
        .with("key", item.key.to_string())
        .with("seq", item.seq)
        .with("flags", item.flags)
        .with("off", item.offset)
        .with("parent", raw.node.parent.get())
        .with("left", raw.node.left.get())
        .with("right", raw.node.right.get())
        .with("height", raw.node.height)
        .with("val_off", raw.val_off.get())
        .with("val_len", raw.val_len.get())
}

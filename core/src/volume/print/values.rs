//! Item values as printed fields, by the key's zone and type.

use super::fields::{address, alloc_root, block_ref, btree_root, list_head, srch_file, time};
use crate::format::*;
use serde_json::{Value, json};
use zerocopy::FromBytes;

/// Decodes a value; one that does not fit its key is shown as bytes.
pub(super) fn decode(key: &Key, value: &[u8], fmt_vers: u64) -> Value {
    let decoded = match key.zone {
        ZONE_FS => fs_value(key, value, fmt_vers),
        ZONE_FREE_EXTENT_BLKNO => Some(free_extent(key.first, key.second)),
        ZONE_FREE_EXTENT_ORDER => Some(free_extent(key.second, key.third)),
        _ => index_value(key, value).or_else(|| server_value(key, value)),
    };
    decoded.unwrap_or_else(|| json!({ "undecoded": text(value) }))
}

fn free_extent(last: u64, len: u64) -> Value {
    json!({
        "kind": "free extent",
        "blkno": last.wrapping_add(1).wrapping_sub(len),
        "len": len,
        "end": last,
        "order": free_extent_order(len),
    })
}

/// Bytes as text, with everything unprintable escaped.
fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

fn fs_value(key: &Key, value: &[u8], fmt_vers: u64) -> Option<Value> {
    Some(match key.kind {
        TYPE_INODE => inode(key, &Inode::from_value(value, fmt_vers).ok()?),
        TYPE_XATTR => xattr(key, value),
        TYPE_DIRENT | TYPE_READDIR | TYPE_LINK_BACKREF => {
            let (d, name) = Dirent::from_value(value).ok()?;
            json!({
                "kind": "dirent",
                "dir": if key.kind == TYPE_LINK_BACKREF { key.second } else { key.first },
                "hash": format!("{:016x}", d.hash.get()),
                "pos": d.pos.get(),
                "type": d.kind,
                "ino": d.ino.get(),
                "name": text(name),
            })
        }
        TYPE_SYMLINK => json!({
            "kind": "symlink", "ino": key.first, "nr": key.second, "target": text(value),
        }),
        TYPE_DATA_EXTENT => {
            let e = DataExtentVal::read_from_bytes(value).ok()?;
            json!({
                "kind": "extent",
                "ino": key.first,
                "iblock": key.second.wrapping_add(1).wrapping_sub(key.third),
                "len": key.third,
                "blkno": e.blkno.get(),
                "flags": e.flags,
            })
        }
        _ => return None,
    })
}

fn inode(key: &Key, i: &Inode) -> Value {
    json!({
        "kind": "inode",
        "ino": key.first,
        "size": i.size.get(),
        "version": i.version.get(),
        "proj": i.proj.get(),
        "nlink": i.nlink.get(),
        "uid": i.uid.get(),
        "gid": i.gid.get(),
        "mode": format!("{:06o}", i.mode.get()),
        "rdev": format!("{:#x}", i.rdev.get()),
        "flags": i.flags.get(),
        "next_readdir_pos": i.next_readdir_pos.get(),
        "next_xattr_id": i.next_xattr_id.get(),
        "meta_seq": i.meta_seq.get(),
        "data_seq": i.data_seq.get(),
        "data_version": i.data_version.get(),
        "online_blocks": i.online_blocks.get(),
        "offline_blocks": i.offline_blocks.get(),
        "atime": time(&i.atime),
        "ctime": time(&i.ctime),
        "mtime": time(&i.mtime),
        "crtime": time(&i.crtime),
    })
}

fn xattr(key: &Key, value: &[u8]) -> Value {
    let mut shown = json!({
        "kind": "xattr",
        "ino": key.first,
        "name_hash": format!("{:08x}", key.second),
        "id": key.third,
        "part": key.fourth,
    });
    let mut bytes = value;
    if key.fourth == 0
        && let Ok((head, rest)) = Xattr::read_from_prefix(value)
        && let Some((name, start)) = rest.split_at_checked(usize::from(head.name_len))
    {
        shown["name_len"] = head.name_len.into();
        shown["val_len"] = head.val_len.get().into();
        shown["name"] = text(name).into();
        bytes = start;
    }
    shown["bytes"] = text(bytes).into();
    shown
}

fn index_value(key: &Key, value: &[u8]) -> Option<Value> {
    Some(match (key.zone, key.kind) {
        (ZONE_INODE_INDEX, kind) => json!({
            "kind": "index",
            "index": if kind == TYPE_META_SEQ { "meta_seq" } else { "data_seq" },
            "major": key.second,
            "ino": key.third,
        }),
        (ZONE_ORPHAN, _) => json!({ "kind": "orphan", "ino": key.second }),
        (ZONE_XATTR_TOTL, _) => {
            let t = XattrTotlVal::read_from_bytes(value).ok()?;
            json!({
                "kind": "xattr totl",
                "name": format!("{}.{}.{}", key.first, key.second, key.third),
                "total": t.total.get().cast_signed(),
                "count": t.count.get().cast_signed(),
            })
        }
        (ZONE_XATTR_INDX, _) => {
            let (major, minor, ino, xid) = key.xattr_indx_fields();
            json!({ "kind": "xattr indx", "major": major, "minor": minor, "ino": ino, "xid": xid })
        }
        (ZONE_QUOTA, _) => {
            let q = QuotaRuleVal::read_from_bytes(value).ok()?;
            json!({
                "kind": "quota rule",
                "hash": format!("{:016x}", key.second),
                "coll_nr": key.third,
                "prio": q.prio,
                "name_val": q.name_val.map(|v| v.get()),
                "name_source": q.name_source,
                "name_flags": q.name_flags,
                "op": q.op,
                "limit": q.limit.get(),
                "rule_flags": q.rule_flags,
            })
        }
        _ => return None,
    })
}

fn server_value(key: &Key, value: &[u8]) -> Option<Value> {
    Some(match key.zone {
        ZONE_LOG_TREES => log_trees(&LogTrees::read_from_bytes(value).ok()?),
        ZONE_MOUNTED_CLIENT => {
            let m = MountedClient::read_from_bytes(value).ok()?;
            json!({
                "kind": "mounted client",
                "rid": format!("{:016x}", key.first),
                "addr": address(&m.addr),
                "flags": m.flags,
            })
        }
        ZONE_SRCH => match key.kind {
            TYPE_SRCH_LOG | TYPE_SRCH_BLOCKS => {
                let f = SrchFile::read_from_bytes(value).ok()?;
                let kind = if key.kind == TYPE_SRCH_LOG {
                    "srch log"
                } else {
                    "srch blocks"
                };
                json!({ "kind": kind, "file": srch_file(&f) })
            }
            _ => srch_compact(key, &SrchCompact::read_from_bytes(value).ok()?),
        },
        _ => merge_value(key, value)?,
    })
}

fn log_trees(lt: &LogTrees) -> Value {
    let zones = (0..DATA_ALLOC_MAX_ZONES)
        .filter(|zone| lt.data_alloc_zones[(zone / 64) as usize].get() >> (zone % 64) & 1 == 1);
    json!({
        "kind": "log trees",
        "rid": format!("{:016x}", lt.rid.get()),
        "nr": lt.nr.get(),
        "meta_avail": list_head(&lt.meta_avail),
        "meta_freed": list_head(&lt.meta_freed),
        "item_root": btree_root(&lt.item_root),
        "bloom_ref": block_ref(&lt.bloom_ref),
        "data_avail": alloc_root(&lt.data_avail),
        "data_freed": alloc_root(&lt.data_freed),
        "srch_file": srch_file(&lt.srch_file),
        "inode_count_delta": lt.inode_count_delta.get(),
        "get_trans_seq": lt.get_trans_seq.get(),
        "commit_trans_seq": lt.commit_trans_seq.get(),
        "max_item_seq": lt.max_item_seq.get(),
        "finalize_seq": lt.finalize_seq.get(),
        "flags": lt.flags.get(),
        "data_alloc_zone_blocks": lt.data_alloc_zone_blocks.get(),
        "data_alloc_zones": zones.collect::<Vec<u64>>(),
    })
}

fn srch_compact(key: &Key, c: &SrchCompact) -> Value {
    let inputs = c.input.iter().take(usize::from(c.nr)).map(|input| {
        json!({
            "file": srch_file(&input.sfl), "blk": input.blk.get(), "pos": input.pos.get(),
        })
    });
    json!({
        "kind": if key.kind == TYPE_SRCH_PENDING { "srch pending" } else { "srch busy" },
        "id": c.id.get(),
        "nr": c.nr,
        "flags": c.flags,
        "meta_avail": list_head(&c.meta_avail),
        "meta_freed": list_head(&c.meta_freed),
        "out": srch_file(&c.out),
        "in": inputs.collect::<Vec<Value>>(),
    })
}

fn merge_value(key: &Key, value: &[u8]) -> Option<Value> {
    let key_text = |k: &DiskKey| k.key().to_string();
    Some(match key.zone {
        ZONE_LOG_MERGE_STATUS => {
            let s = LogMergeStatus::read_from_bytes(value).ok()?;
            json!({
                "kind": "merge status",
                "next_range_key": key_text(&s.next_range_key),
                "nr_requests": s.nr_requests.get(),
                "nr_complete": s.nr_complete.get(),
                "seq": s.seq.get(),
            })
        }
        ZONE_LOG_MERGE_RANGE => {
            let r = LogMergeRange::read_from_bytes(value).ok()?;
            json!({ "kind": "merge range", "start": key_text(&r.start), "end": key_text(&r.end) })
        }
        ZONE_LOG_MERGE_REQUEST => {
            let r = LogMergeRequest::read_from_bytes(value).ok()?;
            json!({
                "kind": "merge request",
                "meta_avail": list_head(&r.meta_avail),
                "meta_freed": list_head(&r.meta_freed),
                "logs_root": btree_root(&r.logs_root),
                "root": btree_root(&r.root),
                "start": key_text(&r.start),
                "end": key_text(&r.end),
                "input_seq": r.input_seq.get(),
                "rid": format!("{:016x}", r.rid.get()),
                "seq": r.seq.get(),
                "flags": r.flags.get(),
            })
        }
        ZONE_LOG_MERGE_COMPLETE => {
            let c = LogMergeComplete::read_from_bytes(value).ok()?;
            json!({
                "kind": "merge completion",
                "meta_avail": list_head(&c.meta_avail),
                "meta_freed": list_head(&c.meta_freed),
                "root": btree_root(&c.root),
                "start": key_text(&c.start),
                "end": key_text(&c.end),
                "remain": key_text(&c.remain),
                "rid": format!("{:016x}", c.rid.get()),
                "seq": c.seq.get(),
                "flags": c.flags.get(),
            })
        }
        ZONE_LOG_MERGE_FREEING => {
            let f = LogMergeFreeing::read_from_bytes(value).ok()?;
            json!({
                "kind": "merge freeing",
                "root": btree_root(&f.root),
                "key": key_text(&f.key),
                "seq": f.seq.get(),
            })
        }
        _ => return None,
    })
}

//! Collects what is known of volumes. Nothing is locked and nobody is asked: files are
//! read that mounts replace each second, and blocks that members write.
//!
//! What can go wrong: a mount that is killed leaves its directory behind; its lock is
//! free then, and it is not shown. One that is stopped leaves old contents: their age
//! is told.

use crate::block_on::block_on;
use crate::error::CmdError;
use crate::filedev::{Access, FileDevice};
use outrider_core::env::DeviceRole;
use outrider_core::errno::Errno;
use outrider_core::format::{QuorumBlock, QuorumEventKind};
use outrider_core::quorum::{Slots, find_server};
use outrider_core::volume::{read_quorum_block, read_super};
use outrider_disk::lock::try_lock_file;
use outrider_mount::daemon::full_path;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// A mount of this host.
struct Mount {
    fsid: String,
    meta: PathBuf,
    mountpoint: PathBuf,
    shown: Value,
}

/// One value for each volume that was asked for, by fsid.
pub fn volumes(base: &Path, paths: &[PathBuf]) -> Result<Vec<Value>, CmdError> {
    let mounts = mounts(base);
    // By volume: a path of its metadata device.
    let mut wanted: BTreeMap<String, PathBuf> = BTreeMap::new();
    for path in paths {
        let (fsid, meta) = named(path, &mounts)?;
        wanted.insert(fsid, meta);
    }
    if paths.is_empty() {
        for mount in &mounts {
            wanted.insert(mount.fsid.clone(), mount.meta.clone());
        }
    }
    let one = |(fsid, meta): (&String, &PathBuf)| volume(fsid, meta, &mounts);
    Ok(wanted.iter().map(one).collect())
}

/// The volume that an argument names.
fn named(path: &Path, mounts: &[Mount]) -> Result<(String, PathBuf), CmdError> {
    // Before anything is opened: the mount there may not answer.
    let full = full_path(path);
    if let Some(mount) = mounts.iter().find(|mount| mount.mountpoint == full) {
        return Ok((mount.fsid.clone(), mount.meta.clone()));
    }
    let device = FileDevice::open(path, Access::Read).map_err(|_| {
        let text = format!(
            "'{}' is neither a mount point of this host's mounts nor a metadata device",
            path.display()
        );
        CmdError::new(Errno::EINVAL, text)
    })?;
    let sup = block_on(read_super(&device, DeviceRole::Meta, None)).map_err(|e| {
        let text = format!("'{}' is not a metadata device: {e}", path.display());
        CmdError::new(e.errno(), text)
    })?;
    let fsid = format!("{:016x}", sup.hdr.fsid.get());
    Ok((fsid, full))
}

/// All mounts whose directories are below `base` and that live.
fn mounts(base: &Path) -> Vec<Mount> {
    let mut found: Vec<Mount> = fs::read_dir(base)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| mount(&entry.path()))
        .collect();
    found.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
    found
}

fn mount(dir: &Path) -> Option<Mount> {
    let lock = File::open(dir.join(".lock")).ok()?;
    if try_lock_file(&lock).unwrap_or(false) {
        // Its process is gone.
        return None;
    }
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
    let line = |name: &str| read(name).map(|text| text.trim_end_matches('\n').to_owned());
    let (fsid, rid) = (line("fsid")?, line("rid")?);
    let meta = PathBuf::from(line("mount_options/metadev_path")?);
    let mountpoint = PathBuf::from(line("mountpoint")?);
    let mut shown: Value = read("status.json")
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_else(|| json!({ "rid": rid }));
    let age = fs::metadata(dir.join("status.json"))
        .and_then(|meta| meta.modified())
        .ok()
        .and_then(|time| time.elapsed().ok());
    shown["age_secs"] = json!(age.map(|age| age.as_secs_f64()));
    shown["mountpoint"] = json!(mountpoint);
    shown["dir"] = json!(dir);
    shown["pid"] = json!(line("pid").and_then(|pid| pid.parse::<u32>().ok()));
    Some(Mount {
        fsid,
        meta,
        mountpoint,
        shown,
    })
}

fn volume(fsid: &str, meta: &Path, mounts: &[Mount]) -> Value {
    let mine = mounts.iter().filter(|mount| mount.fsid == fsid);
    let mine: Vec<&Value> = mine.map(|mount| &mount.shown).collect();
    let (leader, members, error) = match quorum(fsid, meta) {
        Ok((leader, members)) => (leader, members, None),
        Err(error) => (Value::Null, Vec::new(), Some(error)),
    };
    // That of the greatest term: one that was replaced may not know it yet.
    let servers = mine.iter().map(|mount| &mount["server"]);
    let server = servers
        .filter(|server| server.is_object())
        .max_by_key(|server| server["term"].as_u64());
    json!({
        "fsid": fsid,
        "meta": meta,
        "leader": leader,
        "members": members,
        "quorum_error": error,
        "server": server,
        "mounts": mine,
    })
}

/// Leader and members, as the quorum blocks say.
fn quorum(fsid: &str, meta: &Path) -> Result<(Value, Vec<Value>), String> {
    let device = FileDevice::open(meta, Access::Read)
        .map_err(|_| format!("the metadata device {} can not be opened", meta.display()))?;
    let text = |e: outrider_core::volume::VolumeError| e.to_string();
    let sup = block_on(read_super(&device, DeviceRole::Meta, None)).map_err(text)?;
    if format!("{:016x}", sup.hdr.fsid.get()) != fsid {
        return Err(format!("{} holds another volume now", meta.display()));
    }
    let slots = Slots::of(&sup.qconf);
    let mut blocks: Vec<(usize, QuorumBlock)> = Vec::new();
    for (slot, _) in slots.iter() {
        let read = read_quorum_block(&device, sup.hdr.fsid.get(), slot);
        blocks.push((slot, block_on(read).map_err(text)?));
    }
    let leads = find_server(blocks.iter().map(|(slot, block)| (*slot, block)));
    let mut leader = Value::Null;
    let mut members = Vec::new();
    for ((slot, block), (_, addr)) in blocks.iter().zip(slots.iter()) {
        let event = |kind| block.event(kind);
        let rid = format!("{:016x}", event(QuorumEventKind::Begin).rid.get());
        let present = block.may_be_running();
        let term = [QuorumEventKind::Term, QuorumEventKind::Elect]
            .map(|kind| event(kind).term.get())
            .into_iter()
            .max();
        let is_leader = leads == Some(*slot);
        if is_leader {
            let elect = event(QuorumEventKind::Elect);
            let fence = event(QuorumEventKind::Fence);
            leader = json!({
                "slot": slot,
                "addr": addr.to_string(),
                "rid": format!("{:016x}", elect.rid.get()),
                "term": elect.term.get(),
                // Until then it waits for earlier leaders to be fenced.
                "serves": fence.term.get() == elect.term.get(),
            });
        }
        members.push(json!({
            "slot": slot,
            "addr": addr.to_string(),
            "rid": present.then_some(rid),
            "present": present,
            "leads": is_leader,
            "term": term,
        }));
    }
    Ok((leader, members))
}

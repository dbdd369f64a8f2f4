//! What the runtime directory shows of a running mount, and what is taken from it:
//! the quorum's state at once, everything else each second.
//!
//! What can go wrong: a reader that takes an old state for the present one. The file
//! `status.json` is written anew each second even if nothing changed, so its age says
//! whether its mount still runs.

use crate::counters::Counters;
use crate::rundir::RunDir;
use outrider_core::env::{Duration, Env};
use outrider_core::errno::Errno;
use outrider_core::format::{Key, VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT, VolumeOptions};
use outrider_core::locks::{Mode, Scope};
use outrider_core::node::Mount;
use outrider_core::server::ServerReport;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::rc::Rc;

/// Time between two looks at the quorum's state and the options.
const SHOW_PERIOD: Duration = Duration::from_millis(200);
/// Looks for each time that everything is shown.
const SHOW_ALL_EVERY: u32 = 5;
/// Times that everything is shown for each time that the volume options are read.
const VOLOPT_EVERY: u32 = 10;
/// Most waiting locks told.
const WAITS_MAX: usize = 64;

/// Keeps the runtime directory up to date, until it is taken away.
pub fn show_state(
    env: &Env,
    mount: &Rc<Mount>,
    shown: &Rc<RefCell<Option<RunDir>>>,
    counters: Counters,
) {
    let (ticks, mount, shown) = (env.clone(), Rc::downgrade(mount), shown.clone());
    env.spawn("rundir", async move {
        let mut nr: u32 = 0;
        while let Some(mount) = mount.upgrade() {
            match shown.borrow_mut().as_mut() {
                Some(dir) => show_quorum(dir, &mount, &ticks),
                None => return,
            }
            if nr.is_multiple_of(SHOW_ALL_EVERY) {
                show_all(&shown, &mount, &counters);
            }
            volume_options(
                &shown,
                &mount,
                nr.is_multiple_of(SHOW_ALL_EVERY * VOLOPT_EVERY),
            )
            .await;
            drop(mount);
            ticks.sleep(SHOW_PERIOD).await;
            nr = nr.wrapping_add(1);
        }
    });
}

fn show_quorum(dir: &mut RunDir, mount: &Mount, env: &Env) {
    if let Some(status) = mount.quorum_status() {
        dir.show_quorum(&status, env.clock.now());
    }
    if let Some(ms) = dir.asked_heartbeat() {
        tracing::info!(ms, "quorum_heartbeat_timeout_ms was changed");
        mount.set_heartbeat_timeout(Duration::from_millis(ms));
    }
}

fn show_all(shown: &Rc<RefCell<Option<RunDir>>>, mount: &Mount, counters: &Counters) {
    let mut sums = counters.sums();
    let own = mount.fs().orphan_counters();
    for (name, count) in [
        ("inode_deleted", &own.inode_deleted),
        ("orphan_scan", &own.scan),
        ("orphan_scan_attempts", &own.scan_attempts),
        ("orphan_scan_empty", &own.scan_empty),
        ("orphan_scan_item", &own.scan_item),
        ("orphan_scan_error", &own.scan_error),
    ] {
        sums.insert(name.to_owned(), count.get());
    }
    let mut shown = shown.borrow_mut();
    let Some(dir) = shown.as_mut() else { return };
    dir.show_counters(&sums);
    dir.show("client_locks", client_locks(mount));
    dir.show("status.json", format!("{:#}\n", status(mount)));
    // It is there for the next time.
    mount.reports().ask();
}

/// Sets what was written, and shows what is in use: at once after a change, and from
/// time to time, since other mounts may change it.
async fn volume_options(shown: &Rc<RefCell<Option<RunDir>>>, mount: &Mount, read: bool) {
    let asked = match shown.borrow_mut().as_mut() {
        Some(dir) => dir.asked_zone_blocks(),
        None => return,
    };
    let mut options = VolumeOptions {
        set_bits: VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT.into(),
        ..VolumeOptions::default()
    };
    let changed = asked.is_some();
    let done = match asked {
        None => Ok(()),
        Some(Ok(Some(blocks))) => {
            options.data_alloc_zone_blocks = blocks.into();
            mount
                .client()
                .set_volopt(&options)
                .await
                .map_err(|e| e.errno())
        }
        Some(Ok(None)) => mount
            .client()
            .clear_volopt(&options)
            .await
            .map_err(|e| e.errno()),
        Some(Err(())) => Err(Errno::EINVAL),
    };
    if let Err(errno) = done {
        tracing::warn!(
            errno = errno.0,
            "the volume option that was written is refused"
        );
    }
    // Without a server there is nothing to be known, and nobody is kept waiting.
    if !(read || changed) || mount.client().detached_for().is_some() {
        return;
    }
    let Ok(now) = mount.client().get_volopt().await else {
        return;
    };
    let set = now.set_bits.get() & VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT != 0;
    let blocks = set.then(|| now.data_alloc_zone_blocks.get());
    if let Some(dir) = shown.borrow_mut().as_mut()
        && let Err(error) = dir.show_zone_blocks(blocks, changed)
    {
        tracing::debug!(%error, "runtime directory");
    }
}

/// A key as in the original's lock files.
fn key_text(key: &Key) -> String {
    format!(
        "{}.{}.{}.{}.{}.{}",
        key.zone, key.first, key.kind, key.second, key.third, key.fourth
    )
}

/// Lines of spec 17 section 6.
fn client_locks(mount: &Mount) -> String {
    let mut text = String::new();
    for lock in mount.locks().table() {
        let range = lock.scope.range();
        let [_, read, write, write_only] = lock.users;
        let [_, wait_read, wait_write, wait_write_only] = lock.wanted;
        let line = format!(
            "start {} end {} refresh_gen {} mode {} waiters: rd {wait_read} wr {wait_write} \
             wo {wait_write_only} users: rd {read} wr {write} wo {write_only}\n",
            key_text(&range.start),
            key_text(&range.end),
            lock.refresh_gen,
            lock.mode as u8,
        );
        text.push_str(&line);
    }
    text
}

/// A lock in words.
pub fn lock_name(key: &Key) -> String {
    match Scope::from_start(key) {
        Some(Scope::InodeGroup(ino)) => format!("inodes {ino}..{}", ino | 1023),
        Some(Scope::MetaSeq(seq)) => format!("meta_seq index {seq}..{}", seq | 1023),
        Some(Scope::DataSeq(seq)) => format!("data_seq index {seq}..{}", seq | 1023),
        Some(Scope::Rename) => "rename".to_owned(),
        Some(Scope::Orphans) => "orphans".to_owned(),
        Some(Scope::Quota) => "quota".to_owned(),
        Some(Scope::Totl) => "xattr totals".to_owned(),
        Some(Scope::Indx) => "xattr index".to_owned(),
        None => key_text(key),
    }
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Null => "none",
        Mode::Read => "read",
        Mode::Write => "write",
        Mode::WriteOnly => "write_only",
    }
}

fn hex(rid: u64) -> String {
    format!("{rid:016x}")
}

fn modes(counts: &[usize; Mode::COUNT]) -> Value {
    json!({ "read": counts[1], "write": counts[2], "write_only": counts[3] })
}

/// What `outrider status` reads.
fn status(mount: &Mount) -> Value {
    let table = mount.locks().table();
    let mut held = [0; Mode::COUNT];
    for lock in &table {
        held[lock.mode as usize] += 1;
    }
    let waits = table.iter().filter(|lock| lock.waiters > 0);
    let waits: Vec<Value> = waits
        .take(WAITS_MAX)
        .map(|lock| {
            json!({
                "lock": lock_name(&lock.scope.range().start),
                "tasks": lock.waiters,
                "has": mode_name(lock.mode),
            })
        })
        .collect();
    let client = mount.client();
    let quorum = mount.quorum_status().map(|status| {
        let member = status.member;
        json!({
            "slot": member.slot,
            "term": member.term,
            "role": format!("{:?}", member.role).to_lowercase(),
            "server_term": member.server_start_term,
            "server_fenced": member.server_fenced,
        })
    });
    json!({
        "rid": hex(mount.rid()),
        "fsid": hex(mount.supers().meta.hdr.fsid.get()),
        "pid": std::process::id(),
        "quorum": quorum,
        "client": {
            "server_term": client.server_term(),
            "detached_secs": client.detached_for().map(|time| time.as_secs_f64()),
            "commits": mount.log().commits(),
            "locks": table.len(),
            "held": modes(&held),
            "waits": waits,
        },
        "server": mount.reports().report().map(|report| server(&report)),
    })
}

fn server(report: &ServerReport) -> Value {
    let clients: Vec<Value> = report
        .clients
        .iter()
        .map(|client| {
            json!({
                "rid": hex(client.rid),
                "addr": client.addr.to_string(),
                "connected": client.connected,
                "recovering": client.recovering,
            })
        })
        .collect();
    let fencing = report.fencing.iter();
    let fencing: Vec<Value> = fencing
        .map(|(rid, reason)| json!({ "rid": hex(*rid), "reason": reason }))
        .collect();
    let waits: Vec<Value> = report
        .waits
        .iter()
        .map(|wait| {
            let holders = wait.holders.iter();
            let holders: Vec<Value> = holders
                .map(|(rid, mode)| json!({ "rid": hex(*rid), "mode": mode_name(*mode) }))
                .collect();
            json!({
                "lock": lock_name(&wait.key),
                "rid": hex(wait.rid),
                "mode": mode_name(wait.mode),
                "holders": holders,
            })
        })
        .collect();
    json!({
        "term": report.term,
        "commits": report.commits,
        "seq": report.seq,
        "clients": clients,
        "fencing": fencing,
        "locks": report.locks,
        "granted": modes(&report.granted),
        "waiting": report.waiting,
        "waits": waits,
        "merge": {
            "open": report.merge.open,
            "finalized": report.merge.finalized,
            "running": report.merge.running,
        },
        "meta_blocks": { "free": report.meta_blocks.0, "total": report.meta_blocks.1 },
        "data_blocks": { "free": report.data_blocks.0, "total": report.data_blocks.1 },
    })
}

//! The state of clusters in words and columns.

use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// A mount whose state is older than this does not run as it should.
const OLD_SECS: f64 = 3.0;

/// All volumes.
pub fn all(volumes: &[Value], base: &Path) -> String {
    if volumes.is_empty() {
        return format!("no mounts on this host (looked in {})\n", base.display());
    }
    let texts: Vec<String> = volumes.iter().map(volume).collect();
    texts.join("\n")
}

fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Columns as wide as their widest cell, two blanks apart.
fn table(out: &mut String, rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|at| width(at).unwrap_or(0)).collect();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        let _ = writeln!(out, "  {}", line.join("  ").trim_end());
    }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn volume(volume: &Value) -> String {
    let mut out = format!(
        "volume {} on {}\n",
        word(&volume["fsid"]),
        word(&volume["meta"])
    );
    leader(&mut out, volume);
    members(&mut out, volume);
    mounts(&mut out, volume);
    match &volume["server"] {
        Value::Null => {
            out.push_str("server: not on this host, or not up yet: no clients, locks and waits\n");
        }
        server => self::server(&mut out, server, volume),
    }
    out
}

/// Where a mount is, if it is one of this host's.
fn place(volume: &Value, rid: &Value) -> String {
    let mounts = list(&volume["mounts"]).iter();
    let mut found = mounts.filter(|mount| mount["rid"] == *rid);
    match found.next() {
        Some(mount) => format!("{} ({})", word(rid), word(&mount["mountpoint"])),
        None => word(rid),
    }
}

fn leader(out: &mut String, volume: &Value) {
    let leader = &volume["leader"];
    let _ = match (leader, &volume["quorum_error"]) {
        (Value::Null, Value::String(error)) => writeln!(out, "leader: not known: {error}"),
        (Value::Null, _) => writeln!(out, "leader: none"),
        _ => writeln!(
            out,
            "leader: slot {} at {}, term {}, mount {}{}",
            leader["slot"],
            word(&leader["addr"]),
            leader["term"],
            place(volume, &leader["rid"]),
            match leader["serves"].as_bool() {
                Some(true) => "",
                _ => ", waits until earlier leaders are fenced",
            }
        ),
    };
}

fn members(out: &mut String, volume: &Value) {
    let mut rows = vec![row(["slot", "address", "mount", "term", "state"])];
    for member in list(&volume["members"]) {
        let state = match (member["leads"].as_bool(), member["present"].as_bool()) {
            (Some(true), _) => "leader",
            (_, Some(true)) => "member",
            _ => "not mounted",
        };
        rows.push(vec![
            word(&member["slot"]),
            word(&member["addr"]),
            place(volume, &member["rid"]),
            word(&member["term"]),
            state.to_owned(),
        ]);
    }
    if rows.len() > 1 {
        out.push_str("members:\n");
        table(out, &rows);
    }
}

fn mounts(out: &mut String, volume: &Value) {
    let mut rows = vec![row([
        "mount point",
        "mount",
        "pid",
        "role",
        "locks",
        "commits",
        "tasks that wait",
        "state",
    ])];
    for mount in list(&volume["mounts"]) {
        let client = &mount["client"];
        let waits = list(&client["waits"]).iter();
        let tasks: u64 = waits.filter_map(|wait| wait["tasks"].as_u64()).sum();
        let state = match (mount["age_secs"].as_f64(), client["detached_secs"].as_f64()) {
            (None, _) => "starts".to_owned(),
            (Some(age), _) if age > OLD_SECS => format!("silent for {age:.0} s"),
            (_, Some(secs)) => format!("without a server for {secs:.1} s"),
            _ => "connected".to_owned(),
        };
        let role = match &mount["quorum"] {
            Value::Null => "client".to_owned(),
            quorum => word(&quorum["role"]),
        };
        rows.push(vec![
            word(&mount["mountpoint"]),
            word(&mount["rid"]),
            word(&mount["pid"]),
            role,
            word(&client["locks"]),
            word(&client["commits"]),
            tasks.to_string(),
            state,
        ]);
    }
    if rows.len() > 1 {
        out.push_str("mounts on this host:\n");
        table(out, &rows);
    }
}

fn server(out: &mut String, server: &Value, volume: &Value) {
    let granted = &server["granted"];
    let merge = &server["merge"];
    let percent = |blocks: &Value| {
        let (free, total) = (blocks["free"].as_f64(), blocks["total"].as_f64());
        let free = free.zip(total).filter(|(_, total)| *total > 0.0);
        free.map_or(0.0, |(free, total)| free * 100.0 / total)
    };
    let _ = writeln!(
        out,
        "server: term {}, {} commits, seq {}, {:.1}% of metadata and {:.1}% of data free",
        server["term"],
        server["commits"],
        server["seq"],
        percent(&server["meta_blocks"]),
        percent(&server["data_blocks"]),
    );
    let _ = writeln!(
        out,
        "merge: {}, {} log trees wait for one, {} are written",
        match merge["running"].as_bool() {
            Some(true) => "runs",
            _ => "none runs",
        },
        merge["finalized"],
        merge["open"],
    );
    let mut rows = vec![row(["client", "address", "state"])];
    for client in list(&server["clients"]) {
        let flag = |name: &str| client[name].as_bool() == Some(true);
        let state = match (flag("connected"), flag("recovering")) {
            (_, true) => "has not come back to this server yet",
            (true, _) => "connected",
            _ => "connection lost",
        };
        rows.push(vec![
            place(volume, &client["rid"]),
            word(&client["addr"]),
            state.to_owned(),
        ]);
    }
    let _ = writeln!(out, "clients: {}", rows.len() - 1);
    if rows.len() > 1 {
        table(out, &rows);
    }
    for fence in list(&server["fencing"]) {
        let rid = place(volume, &fence["rid"]);
        let _ = writeln!(out, "fencing: {rid}, {}", word(&fence["reason"]));
    }
    let _ = writeln!(
        out,
        "locks: {} held: {} read, {} write, {} write only; {} requests wait",
        server["locks"],
        granted["read"],
        granted["write"],
        granted["write_only"],
        server["waiting"],
    );
    for wait in list(&server["waits"]) {
        let holders = list(&wait["holders"]).iter();
        let holders: Vec<String> = holders
            .map(|h| format!("{} ({})", place(volume, &h["rid"]), word(&h["mode"])))
            .collect();
        let holders = match holders.is_empty() {
            true => "the end of recovery".to_owned(),
            false => holders.join(", "),
        };
        let _ = writeln!(
            out,
            "  {} wants to {} {}, waits for {holders}",
            place(volume, &wait["rid"]),
            word(&wait["mode"]),
            word(&wait["lock"]),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_cluster_is_shown_with_who_waits_for_whom() {
        let volume = json!({
            "fsid": "00000000000000aa", "meta": "/dev/m", "quorum_error": null,
            "leader": {"slot": 0, "addr": "10.0.0.1:1", "rid": "01", "term": 7, "serves": true},
            "members": [
                {"slot": 0, "addr": "10.0.0.1:1", "rid": "01", "present": true, "leads": true, "term": 7},
                {"slot": 1, "addr": "10.0.0.2:1", "rid": null, "present": false, "leads": false, "term": 3},
            ],
            "mounts": [{"rid": "01", "pid": 5, "mountpoint": "/m", "age_secs": 9.0,
                "quorum": {"role": "leader"},
                "client": {"locks": 3, "commits": 4, "detached_secs": null,
                    "waits": [{"lock": "rename", "tasks": 2, "has": "none"}]}}],
            "server": {"term": 7, "commits": 9, "seq": 99,
                "clients": [{"rid": "01", "addr": "10.0.0.1:9", "connected": true, "recovering": false}],
                "fencing": [{"rid": "02", "reason": "client_reconnect"}],
                "locks": 1, "granted": {"read": 0, "write": 1, "write_only": 0}, "waiting": 1,
                "waits": [{"lock": "rename", "rid": "01", "mode": "write",
                    "holders": [{"rid": "02", "mode": "write"}]}],
                "merge": {"open": 2, "finalized": 1, "running": false},
                "meta_blocks": {"free": 50, "total": 100}, "data_blocks": {"free": 1, "total": 4}},
        });
        let text = all(&[volume], Path::new("/run"));
        for part in [
            "leader: slot 0 at 10.0.0.1:1, term 7, mount 01 (/m)\n",
            "1     10.0.0.2:1  -        3     not mounted\n",
            "silent for 9 s\n",
            "50.0% of metadata and 25.0% of data free\n",
            "fencing: 02, client_reconnect\n",
            "  01 (/m) wants to write rename, waits for 02 (write)\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        assert!(all(&[], Path::new("/run/x")).contains("/run/x"));
    }
}

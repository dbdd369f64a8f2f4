//! `outrider fenced` against requests as the server shows them: agents that succeed,
//! fail, hang, come late, and one with SCSI-3 persistent reservations over a fake
//! `sg_persist`.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::disallowed_macros,
    missing_docs
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const RID: &str = "00000000deadbeef";
const OWN: &str = "1111111111111111";

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(place.mount().join("fence")).unwrap();
        fs::create_dir(place.mount().join("mount_options")).unwrap();
        fs::write(place.mount().join("fsid"), "2222222222222222\n").unwrap();
        fs::write(place.mount().join("rid"), format!("{OWN}\n")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mount(&self) -> PathBuf {
        self.path("base/f.222222.r.111111")
    }

    fn request(&self, rid: &str) -> PathBuf {
        let dir = self.mount().join("fence").join(rid);
        fs::create_dir(&dir).unwrap();
        for (name, text) in [
            ("rid", rid),
            ("ipv4_addr", "10.0.0.9"),
            ("reason", "client_recovery"),
            ("elapsed_secs", "0"),
            ("fenced", "0"),
            ("error", "0"),
        ] {
            fs::write(dir.join(name), text).unwrap();
        }
        dir
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn fenced(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outrider"));
        command
            .args(["fenced", "--base"])
            .arg(self.path("base"))
            .env("OUTRIDER_STATE_DIR", self.path("state"))
            .env_remove("SCOUTFS_FENCED_CONFIG_FILE");
        command
    }

    fn once(&self, run: &Path, more: &[&str]) -> Output {
        self.fenced()
            .args(["--once", "--json", "--run"])
            .arg(run)
            .args(more)
            .output()
            .unwrap()
    }
}

fn read(path: &Path, name: &str) -> String {
    fs::read_to_string(path.join(name)).unwrap()
}

fn events(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            value["event"].as_str().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn an_agent_of_the_original_is_run_by_its_config_file_and_environment() {
    let place = Place::new();
    let request = place.request(RID);
    let agent = place.script(
        "agent",
        "echo \"$1 $2 rid=$SCOUTFS_FENCED_REQ_RID ip=$SCOUTFS_FENCED_REQ_IP\" >> \"$(dirname $0)/log\"",
    );
    let conf = place.path("fenced.conf");
    let text = format!(
        "SCOUTFS_FENCED_DELAY=1\nSCOUTFS_FENCED_RUN={}\nSCOUTFS_FENCED_RUN_ARGS=\"-a b\"\n",
        agent.display()
    );
    fs::write(&conf, text).unwrap();
    let output = place
        .fenced()
        .arg("--once")
        .env("SCOUTFS_FENCED_CONFIG_FILE", &conf)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        read(place.dir.path(), "log"),
        format!("-a b rid={RID} ip=10.0.0.9\n")
    );
    assert_eq!(
        (read(&request, "fenced"), read(&request, "error")),
        ("1".into(), "0".into())
    );
    // Answered is answered.
    let again = place.once(&agent, &[]);
    assert!(again.status.success() && events(&again).is_empty());
}

#[test]
fn a_failing_agent_is_tried_again_and_then_an_error_is_written() {
    let place = Place::new();
    let request = place.request(RID);
    let agent = place.script(
        "agent",
        "echo x >> \"$(dirname $0)/log\"; echo no power >&2; exit 1",
    );
    let output = place.once(&agent, &["--retries", "2"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(events(&output), ["request", "retry", "retry", "failed"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("no power"));
    assert_eq!(read(place.dir.path(), "log").lines().count(), 3);
    assert_eq!(
        (read(&request, "fenced"), read(&request, "error")),
        ("0".into(), "1".into())
    );
}

#[test]
fn one_that_fails_at_first_succeeds_at_last() {
    let place = Place::new();
    let request = place.request(RID);
    let agent = place.script(
        "agent",
        "d=$(dirname $0); test -e $d/seen && exit 0; touch $d/seen; exit 1",
    );
    let output = place.once(&agent, &["--retries", "1"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(events(&output), ["request", "retry", "fenced"]);
    assert_eq!(read(&request, "fenced"), "1");
}

#[test]
fn a_hanging_agent_is_killed_and_does_not_hold_up_the_others() {
    let place = Place::new();
    let slow = place.request(RID);
    let fast = place.request("00000000000000aa");
    let agent = place.script(
        "agent",
        &format!("test $SCOUTFS_FENCED_REQ_RID = {RID} && sleep 1000; exit 0"),
    );
    let start = Instant::now();
    let output = place.once(&agent, &["--retries", "0", "--timeout", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(read(&fast, "fenced"), "1");
    assert_eq!(
        (read(&slow, "fenced"), read(&slow, "error")),
        ("0".into(), "1".into())
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("did not end"));
}

#[test]
fn a_request_that_vanishes_is_no_failure() {
    let place = Place::new();
    let request = place.request(RID);
    let agent = place.script("agent", &format!("rm -r {}; exit 0", request.display()));
    let output = place.once(&agent, &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(events(&output), ["request", "withdrawn"]);
    assert!(!request.exists());
}

#[test]
fn the_daemon_answers_requests_as_they_come() {
    let place = Place::new();
    let agent = place.script("agent", "exit 0");
    let mut daemon = place
        .fenced()
        .args(["--delay", "0", "--run"])
        .arg(&agent)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    for rid in [RID, "00000000000000aa"] {
        let request = place.request(rid);
        let deadline = Instant::now() + Duration::from_secs(60);
        while read(&request, "fenced") == "0" {
            assert!(Instant::now() < deadline, "no answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        // As the server does when it has reclaimed the mount.
        fs::remove_dir_all(&request).unwrap();
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn without_a_program_or_with_a_bad_file_it_says_so() {
    let place = Place::new();
    let none = place
        .fenced()
        .args(["--once", "--config", "/nowhere/x"])
        .output()
        .unwrap();
    assert_eq!(none.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&none.stderr).contains("/nowhere/x"));
    let conf = place.path("conf");
    fs::write(&conf, "SCOUTFS_FENCED_RUN=$X\n").unwrap();
    let bad = place
        .fenced()
        .args(["--once", "--config"])
        .arg(&conf)
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&bad.stderr).contains("line 1"));
}

#[test]
fn the_local_agent_proves_nothing_about_mounts_it_does_not_know() {
    let place = Place::new();
    let request = place.request(RID);
    let output = place
        .fenced()
        .args(["--once", "--agent", "local", "--retries", "0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(read(&request, "error"), "1");
    assert!(String::from_utf8_lossy(&output.stdout).contains("no record"));
}

/// Keeps keys and the reservation of each device in files, as a device would.
const FAKE_SG: &str = r#"
state="$FAKE_SG_STATE"
for dev; do :; done
name="$state/$(basename "$dev")"
touch "$name.keys" "$name.type"
rk=0; sark=0; type=0; op=
for arg; do
  case "$arg" in
    --param-rk=*) rk="${arg#*=}";;
    --param-sark=*) sark="${arg#*=}";;
    --prout-type=*) type="${arg#*=}";;
    --read-keys|--read-reservation|--register-ignore|--register|--reserve|--preempt-abort) op="$arg";;
  esac
done
echo "$op $(basename "$dev")" >> "$state/calls"
has() { grep -qx "0x$1" "$name.keys"; }
conflict() { echo "persistent reserve out: Reservation conflict" >&2; exit 24; }
case "$op" in
  --read-keys) echo "  PR generation=0x4, keys follow:"; sed 's/^/    /' "$name.keys";;
  --read-reservation)
    if [ "$(cat "$name.type")" = 7 ]; then
      echo "    scope: LU_SCOPE,  type: Write Exclusive, all registrants"
    else echo "  PR generation=0x4, there is NO reservation held"; fi;;
  --register-ignore) has "$sark" || echo "0x$sark" >> "$name.keys";;
  --register) has "$rk" || conflict; sed -i "/^0x$rk\$/d" "$name.keys";;
  --reserve) has "$rk" || conflict; echo "$type" > "$name.type";;
  --preempt-abort) has "$rk" || conflict; [ -e "$state/broken" ] || sed -i "/^0x$sark\$/d" "$name.keys";;
  *) exit 1;;
esac
"#;

#[test]
fn the_scsi_agent_takes_keys_away_and_believes_only_what_it_reads() {
    let place = Place::new();
    let bin = place.path("bin");
    let state = place.path("sg");
    fs::create_dir(&bin).unwrap();
    fs::create_dir(&state).unwrap();
    place.script("bin/sg_persist", FAKE_SG);
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let set = |dev: &str, keys: &[&str], kind: &str| {
        let text: String = keys.iter().map(|key| format!("0x{key}\n")).collect();
        fs::write(state.join(format!("{dev}.keys")), text).unwrap();
        fs::write(state.join(format!("{dev}.type")), kind).unwrap();
    };
    let fence = || {
        let _ = fs::remove_dir_all(place.mount().join("fence").join(RID));
        let request = place.request(RID);
        let output = place
            .fenced()
            .args(["--once", "--agent", "scsi", "--retries", "0"])
            .args(["--device", "/dev/meta", "--device", "/dev/data"])
            .env("PATH", &path)
            .env("FAKE_SG_STATE", &state)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (read(&request, "fenced") == "1", said)
    };
    for dev in ["meta", "data"] {
        set(dev, &[OWN, "deadbeef", "77"], "7");
    }
    let (done, said) = fence();
    assert!(done, "{said}");
    for dev in ["meta", "data"] {
        let keys = fs::read_to_string(state.join(format!("{dev}.keys"))).unwrap();
        assert_eq!(keys, format!("0x{OWN}\n0x77\n"));
    }
    assert!(fence().0, "fencing again is harmless");

    set("data", &[OWN, "deadbeef"], "");
    let (done, said) = fence();
    assert!(!done && said.contains("no reservation"), "{said}");

    set("data", &["deadbeef"], "7");
    let (done, said) = fence();
    assert!(!done && said.contains("not registered"), "{said}");

    set("data", &[OWN, "deadbeef"], "7");
    fs::write(state.join("broken"), "").unwrap();
    let (done, said) = fence();
    assert!(!done && said.contains("still registered"), "{said}");
}

//! SCSI-3 persistent reservations through `sg_persist` (package sg3-utils): the key of
//! a mount is its rid, the reservation of both devices is "Write Exclusive, all
//! registrants", so a host whose key was taken away cannot write any more, whatever it
//! still has in its queues.
//!
//! What can go wrong:
//! * A device without a reservation. Then keys keep nobody out: it is an error, not a
//!   fence.
//! * Two mounts of one volume on one host. Keys belong to the path between host and
//!   device, so the second mount would take the first one's place: not supported.
//! * `sg_persist` that hangs, as it does on a dead path: it is killed after a limit.

use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Write Exclusive, all registrants.
const TYPE: &str = "7";
/// What `sg_persist` calls it.
const TYPE_NAME: &str = "Write Exclusive, all registrants";
/// How long one command may take.
const PATIENCE: Duration = Duration::from_secs(8);

/// How long the output of a program that has ended may take.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);

fn failed(text: String) -> io::Error {
    io::Error::other(text)
}

/// Runs a program to its end, or kills it. The output, if it succeeded.
///
/// # Errors
/// If it cannot be run, fails, or takes longer than `limit`; the text says which.
pub fn run_limited(command: &mut Command, limit: Duration) -> io::Result<String> {
    use std::os::unix::process::CommandExt;
    let name = command.get_program().to_string_lossy().into_owned();
    let deadline = Instant::now() + limit;
    // A group of its own, so that what it started can be ended with it.
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(format!("{name}: {e}")))?;
    // What the program left running may keep its pipes open for ever.
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        let (send, text) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(pipe) = pipe {
                let _ = pipe.take(1 << 20).read_to_end(&mut text);
            }
            let _ = send.send(String::from_utf8_lossy(&text).into_owned());
        });
        move || text.recv_timeout(OUTPUT_PATIENCE).unwrap_or_default()
    };
    let out = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(out());
            }
            let said = err();
            let said = said.trim().replace('\n', "; ");
            return Err(failed(format!("{name}: {status}: {said}")));
        }
        if Instant::now() >= deadline {
            // SAFETY: a signal to the group of our own child, which was not waited for.
            unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
            let _ = child.wait();
            return Err(failed(format!(
                "{name} did not end within {} seconds",
                limit.as_secs_f32()
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn sg_persist(device: &Path, args: &[&str]) -> io::Result<String> {
    let mut command = Command::new("sg_persist");
    command.arg("--no-inquiry").args(args).arg(device);
    run_limited(&mut command, PATIENCE)
        .map_err(|e| failed(format!("{}: {}: {e}", device.display(), args.join(" "))))
}

/// The keys registered on a device.
///
/// # Errors
/// If `sg_persist` fails.
pub fn keys(device: &Path) -> io::Result<Vec<u64>> {
    let text = sg_persist(device, &["--in", "--read-keys"])?;
    Ok(text
        .lines()
        .filter_map(|line| u64::from_str_radix(line.trim().strip_prefix("0x")?, 16).ok())
        .collect())
}

/// Registers a mount's key and takes part in the reservation.
///
/// # Errors
/// If the device does not take them.
pub fn register(device: &Path, rid: u64) -> io::Result<()> {
    let key = format!("{rid:x}");
    sg_persist(
        device,
        &["--out", "--register-ignore", &format!("--param-sark={key}")],
    )?;
    sg_persist(
        device,
        &[
            "--out",
            "--reserve",
            &format!("--param-rk={key}"),
            &format!("--prout-type={TYPE}"),
        ],
    )?;
    check_reserved(device)
}

/// Takes a mount's key back, at its clean end.
///
/// # Errors
/// If `sg_persist` fails.
pub fn unregister(device: &Path, rid: u64) -> io::Result<()> {
    let key = format!("--param-rk={rid:x}");
    sg_persist(device, &["--out", "--register", &key, "--param-sark=0"]).map(drop)
}

fn check_reserved(device: &Path) -> io::Result<()> {
    let text = sg_persist(device, &["--in", "--read-reservation"])?;
    match text.contains(TYPE_NAME) {
        true => Ok(()),
        false => Err(failed(format!(
            "{}: there is no reservation of type \"{TYPE_NAME}\", so keys keep nobody out",
            device.display()
        ))),
    }
}

/// Takes the key of mount `victim` away from a device, in the name of mount `own`, and
/// makes sure that it is gone. Done already is done.
///
/// # Errors
/// If the victim may still be able to write.
pub fn fence(device: &Path, own: u64, victim: u64) -> io::Result<()> {
    check_reserved(device)?;
    let before = keys(device)?;
    if !before.contains(&own) {
        return Err(failed(format!(
            "{}: mount {own:016x} of this host is not registered; mount with -o scsi_pr",
            device.display()
        )));
    }
    if before.contains(&victim) {
        sg_persist(
            device,
            &[
                "--out",
                "--preempt-abort",
                &format!("--param-rk={own:x}"),
                &format!("--param-sark={victim:x}"),
                &format!("--prout-type={TYPE}"),
            ],
        )?;
    }
    check_reserved(device)?;
    match keys(device)?.contains(&victim) {
        false => Ok(()),
        true => Err(failed(format!(
            "{}: key {victim:x} is still registered",
            device.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_killed_with_what_it_started() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & wait"]);
        let start = Instant::now();
        let error = run_limited(&mut command, Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_program_that_leaves_something_running_has_ended_all_the_same() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 3 & exit 0"]);
        let start = Instant::now();
        run_limited(&mut command, Duration::from_secs(60)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_program_that_fails_is_named_with_what_it_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such host >&2; exit 3"]);
        let error = run_limited(&mut command, Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("no such host"), "{error}");
    }
}

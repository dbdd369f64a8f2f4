//! The first difference of two runs, as the command tells it: of two plans, with another
//! program, and with another commit's. The other commit is a small crate of the same name
//! in a repository of its own, which prints a log that was made before.
#![cfg(madsim)]

use std::fs::{create_dir_all, read_to_string, remove_dir_all, write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const SIM: &str = env!("CARGO_BIN_EXE_outrider-sim");

/// What a command came to: exit code, output, errors.
fn sim(args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(SIM).args(args).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

/// A log, with the text of one event changed.
fn changed(log: &str, number: usize) -> (String, String) {
    let mut lines: Vec<&str> = log.lines().collect();
    let events = lines.iter().filter(|line| line.contains('#'));
    let event = *events.clone().nth(number).expect("so many events");
    let at = lines.iter().position(|line| *line == event).expect("it");
    let other = format!("{event}, or not");
    lines[at] = &other;
    (lines.join("\n"), other)
}

/// A program that prints a text, and how it ends.
fn script(dir: &Path, text: &str, code: i32) -> PathBuf {
    let (log, file) = (dir.join("log"), dir.join("script"));
    write(&log, text).expect("a file");
    let lines = format!("#!/bin/sh\ncat {}\nexit {code}\n", log.display());
    write(&file, lines).expect("a file");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&file, mode).expect("its mode");
    file
}

#[test]
fn two_plans_and_two_programs_are_compared() {
    let dir = tempfile::tempdir().expect("a directory");
    let (code, text, _) = sim(&["diff", "3", "3"]);
    assert!(
        code == Some(0) && text.ends_with("events, all the same\n"),
        "{text}"
    );
    let (code, text, _) = sim(&["diff", "3", "--binary", SIM]);
    assert!(
        code == Some(0) && text.ends_with("events, all the same\n"),
        "{text}"
    );
    let redrawn = ["diff", "3", "--stress", "--binary", SIM, "--redraw"];
    let (code, text, _) = sim(&redrawn);
    assert!(code == Some(0) && !text.contains("another plan"), "{text}");
    let (code, text, _) = sim(&["diff", "3", "4", "--context", "2"]);
    assert_eq!(code, Some(1), "{text}");
    for sign in ["- ", "+ "] {
        // Two events, and the outcome.
        let lines = text.lines().filter(|line| line.starts_with(sign));
        assert_eq!(lines.count(), 3, "{text}");
    }
    assert!(text.ends_with("+ 4: no failure\n"), "{text}");

    let (_, log, _) = sim(&["replay", "3", "--log"]);
    let (other, line) = changed(&log, 40);
    let file = script(dir.path(), &other, 0);
    let file = file.to_str().expect("UTF-8");
    let (code, text, error) = sim(&["diff", "3", "--binary", file, "--json"]);
    assert_eq!(code, Some(1), "{error}");
    let found: serde_json::Value = serde_json::from_str(&text).expect("an object");
    assert_eq!(found["equal"], false);
    assert_eq!(found["other"]["lines"][0], line.as_str());
    assert_eq!(found["before"].as_array().map(Vec::len), Some(8));
    assert_eq!(found["one"]["events"], found["other"]["events"]);
    assert_eq!(found["other"]["outcome"], "no failure");

    // What another program remarks on the same events makes no difference.
    let fewer = log.lines().filter(|line| !line.contains(" -       n0 "));
    let fewer: Vec<&str> = fewer.collect();
    assert!(fewer.len() < log.lines().count(), "it remarks something");
    script(dir.path(), &fewer.join("\n"), 0);
    let (code, text, _) = sim(&["diff", "3", "--binary", file]);
    assert!(
        code == Some(0) && text.ends_with("all the same\n"),
        "{text}"
    );

    // What is not in the lines is in the digest.
    let digest = found["one"]["digest"].as_str().expect("a digest");
    script(dir.path(), &log.replace(digest, "0123456789abcdef"), 0);
    let (code, text, _) = sim(&["diff", "3", "--binary", file]);
    assert!(
        code == Some(1) && text.contains("their digests are not"),
        "{text}"
    );

    // One that cannot read the plan says why.
    let lines = "#!/bin/sh\necho 'unknown variant `msync`' >&2\nexit 2\n";
    write(file, lines).expect("a file");
    let (code, _, error) = sim(&["diff", "3", "--binary", file]);
    assert!(
        code == Some(2) && error.contains("could not run this"),
        "{error}"
    );
    assert!(error.contains("unknown variant `msync`"), "{error}");
    // One that leaves something out of it as well, though it says nothing.
    let lines = format!(
        "#!/bin/sh\n{SIM} \"$@\" || exit\nfor saved; do :; done\n\
         sed -i 's/\"poll_cost\":[0-9]*,//' \"$saved\"\n"
    );
    write(file, lines).expect("a file");
    let (code, text, error) = sim(&["diff", "3", "--binary", file]);
    assert!(
        code == Some(0) && text.contains("does not know config.poll_cost"),
        "{text}{error}"
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_str().expect("UTF-8");
    let refused = [
        (&["diff", "3"][..], "required"),
        (
            &["diff", "3", "4", "--commit", "HEAD"],
            "cannot be used with",
        ),
        (&["diff", "3", "4", "--redraw"], "cannot be used with"),
        (&["diff", "3", "--recorded"], "does not say at which commit"),
        (&["diff", "3", "--binary", "/nonexistent"], "No such file"),
        (
            &["diff", "3", "--commit", "HEAD", "--repo", path],
            "in no work tree of git",
        ),
        (
            &["diff", "3", "--commit", "HEAD", "--repo", "/nonexistent"],
            "no directory",
        ),
    ];
    for (args, why) in refused {
        let (code, _, error) = sim(args);
        assert!(code == Some(2) && error.contains(why), "{args:?}: {error}");
    }
}

/// A repository whose simulator prints a log.
struct Repository(PathBuf);

impl Repository {
    fn new(dir: PathBuf) -> Self {
        create_dir_all(dir.join("src")).expect("directories");
        write(
            dir.join("Cargo.toml"),
            "[package]\nname = \"outrider-sim\"\nversion = \"0.1.0\"\nedition = \"2024\"\n",
        )
        .expect("a file");
        write(dir.join(".gitignore"), "/target\nCargo.lock\n").expect("a file");
        let main = "fn main() { print!(\"{}\", include_str!(\"log\")); }\n";
        write(dir.join("src/main.rs"), main).expect("a file");
        let new = Self(dir);
        new.git(&["init", "--quiet"]);
        new
    }

    fn git(&self, args: &[&str]) -> String {
        let out = Command::new("git")
            .current_dir(&self.0)
            .args([
                "-c",
                "user.name=Nobody",
                "-c",
                "user.email=nobody@example.org",
            ])
            .args(["-c", "commit.gpgsign=false"])
            .args(args)
            .output()
            .expect("git runs");
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{args:?}: {error}");
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    fn commit(&self, log: &str) -> String {
        write(self.0.join("src/log"), log).expect("a file");
        self.git(&["add", "."]);
        self.git(&["commit", "--quiet", "-m", "a log"]);
        self.git(&["rev-parse", "HEAD"])
    }
}

#[test]
fn another_commit_is_built_once_and_compared() {
    let dir = tempfile::tempdir().expect("a directory");
    let repository = Repository::new(dir.path().join("repo"));
    let (_, log, _) = sim(&["replay", "3", "--log"]);
    let (other, line) = changed(&log, 100);
    let first = repository.commit(&other);
    let second = repository.commit(&log);
    let repo = repository.0.to_str().expect("UTF-8");
    let diff = |what: &str, more: &[&str]| {
        let args = [&["diff", what, "--repo", repo], more].concat();
        sim(&args)
    };

    let (code, text, error) = diff("3", &["--commit", "HEAD"]);
    assert!(
        code == Some(0) && error.contains("kept for the next time"),
        "{text}{error}"
    );
    let (code, text, error) = diff("3", &["--commit", "HEAD~1"]);
    assert!(
        code == Some(1) && text.contains(&format!("+ {line}\n")),
        "{text}{error}"
    );
    assert!(
        text.contains(&format!("+ commit {}: no failure", &first[..12])),
        "{text}"
    );
    // Nothing is built again.
    let (code, _, error) = diff("3", &["--commit", &second]);
    assert!(code == Some(0) && error.is_empty(), "{error}");

    // The commit in a file.
    let file = dir.path().join("case.json");
    let name = file.to_str().expect("UTF-8");
    sim(&["replay", "3", "--save", name]);
    let plan: serde_json::Value =
        serde_json::from_str(&read_to_string(&file).expect("it is there")).expect("a plan");
    let case = serde_json::json!({ "commit": first, "plan": plan["plan"] });
    write(&file, case.to_string()).expect("a file");
    let (code, text, error) = diff(name, &["--recorded"]);
    assert!(
        code == Some(1) && text.contains(&format!("+ {line}\n")),
        "{text}{error}"
    );
    let (code, _, error) = diff(name, &["--commit", "v7"]);
    assert!(
        code == Some(2) && error.contains("knows no commit \"v7\""),
        "{error}"
    );
    let (code, _, error) = diff(name, &["--recorded", "--redraw"]);
    assert!(code == Some(2) && error.contains("is for seeds"), "{error}");

    // What was broken off, or removed, is made again.
    let built = repository.0.join("target/outrider-diff");
    let broken: [fn(&Path); 3] = [
        |built| std::fs::remove_file(built.join("checkout/.git")).expect("it is there"),
        |built| remove_dir_all(built.join("checkout")).expect("it is there"),
        |built| remove_dir_all(built).expect("it is there"),
    ];
    for harm in broken {
        let _ = std::fs::remove_file(built.join(&second));
        harm(&built);
        let (code, _, error) = diff("3", &["--commit", &second]);
        assert_eq!(code, Some(0), "{error}");
    }
    // A checkout that was killed leaves a lock, and files of neither commit.
    let _ = std::fs::remove_file(built.join(&first));
    let lock = repository.git(&[
        "-C",
        "target/outrider-diff/checkout",
        "rev-parse",
        "--git-path",
        "index.lock",
    ]);
    write(lock, "").expect("a file");
    write(built.join("checkout/src/main.rs"), "half a f").expect("a file");
    let (code, _, error) = diff("3", &["--commit", &first]);
    assert_eq!(code, Some(1), "{error}");
    assert_eq!(repository.git(&["status", "--porcelain"]), "");

    // One that cannot be built, and what is wrong with it.
    write(repository.0.join("src/main.rs"), "fn main() { nothing }").expect("a file");
    repository.commit(&log);
    let (code, _, error) = diff("3", &["--commit", "HEAD"]);
    assert!(
        code == Some(2) && error.contains("could not build the simulator"),
        "{error}"
    );
    assert!(error.contains("cannot find value `nothing`"), "{error}");
}

//! The first event in which two runs differ: of two plans, or of one plan with this
//! program and with that of another commit.
//!
//! Each run is a process `replay FILE --log`, and its lines are what is compared: that is
//! what the simulator of any commit prints. Both run at once and are read line by line, so
//! a log of any length takes no memory. They are read to their ends, for what came of them.
//!
//! Another commit may remark more or less on the same events. So what it remarks is shown,
//! and only events are compared, which have numbers; of two runs of this program both are.
//!
//! What can go wrong: another commit that does not know all of the plan. What it cannot
//! read is an error, with its own words; what it leaves out without a word is found in the
//! plan that it saves (`--save`), and told. And lines that are the same while what they
//! leave out is not: then the digests of all events differ, which is told as well.

use super::Drawn;
use super::commit::{Build, short};
use outrider_sim::case::Case;
use serde_json::{Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  \
    outrider-sim diff small.json smaller.json\n  \
    outrider-sim diff small.json small.json --without-mutant\n  \
    outrider-sim diff 17 --profile cluster --commit HEAD~3\n  \
    outrider-sim diff failures/check-17.json --recorded\n  \
    outrider-sim diff 17 --binary ../artefacts/outrider-sim\n\n\
    Another commit is checked out and built in a directory of its own, target/outrider-diff\n\
    of the repository: nothing of the work tree is touched. The program is kept there for\n\
    the next time; `rm -r target/outrider-diff` and `git worktree prune` remove everything.\n\n\
    Exit code 0: they do the same; 1: they differ; 2: it could not run or build.",
    group = clap::ArgGroup::new("with").required(true)
)]
pub struct Args {
    /// A seed, or a file with a plan.
    one: String,
    /// Another one.
    #[arg(group = "with")]
    other: Option<String>,
    /// Run ONE with the simulator of this commit as well.
    #[arg(long, group = "with")]
    commit: Option<String>,
    /// As --commit, with the commit at which the failure in the file ONE was seen.
    #[arg(long, group = "with")]
    recorded: bool,
    /// Run ONE with this outrider-sim as well.
    #[arg(long, group = "with", value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Let the other commit or program draw the seed itself. Otherwise both run the plan
    /// that this one draws.
    #[arg(long, conflicts_with = "other")]
    redraw: bool,
    /// The git repository with the commit; otherwise that of the current directory.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["other", "binary"])]
    repo: Option<PathBuf>,
    /// Where the commit is checked out and built; otherwise target/outrider-diff in the
    /// repository.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["other", "binary"])]
    worktree: Option<PathBuf>,
    #[command(flatten)]
    drawn: Drawn,
    /// Switch the planted bug of the other one off: what does the bug change first?
    #[arg(long)]
    without_mutant: bool,
    /// How many events to show before and after.
    #[arg(long, default_value_t = 8)]
    context: usize,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

/// One of the two programs at work.
struct Run {
    /// How it is called in what is printed.
    name: String,
    child: Child,
    lines: BufReader<ChildStdout>,
    /// Where its errors go, and the plan that it has run.
    errors: PathBuf,
    saved: PathBuf,
    /// Whether remarks are compared as well, and are events in what follows.
    remarks: bool,
    /// Events so far.
    events: u64,
    /// What came after the last event.
    tail: Vec<String>,
}

impl Drop for Run {
    fn drop(&mut self) {
        // An error has come first, or it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this is the line of an event: a time is first.
fn is_event(line: &str) -> bool {
    let time = line.trim_start().split(' ').next().unwrap_or_default();
    let parts: Vec<&str> = time.split('.').collect();
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    matches!(parts[..], [_, micros, nanos] if micros.len() == 6 && nanos.len() == 3)
        && parts.iter().all(|part| digits(part))
}

/// Whether the line of an event is a remark: it has no number.
fn is_remark(line: &str) -> bool {
    line.split_whitespace().nth(1) == Some("-")
}

impl Run {
    /// Starts one. `what` are a file or a seed, and what else it is told.
    fn start(name: String, program: &Path, what: &[String], dir: &Path) -> Result<Self, String> {
        let says = |e: std::io::Error| format!("{}: {e}", program.display());
        let (errors, saved) = (dir.join("errors"), dir.join("saved.json"));
        let mut child = Command::new(program)
            .arg("replay")
            .args(what)
            .args(["--log", "--save"])
            .arg(&saved)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).map_err(says)?)
            .spawn()
            .map_err(says)?;
        let lines = BufReader::new(child.stdout.take().expect("it is piped"));
        Ok(Self {
            name,
            child,
            lines,
            errors,
            saved,
            remarks: true,
            events: 0,
            tail: Vec::new(),
        })
    }

    /// Whether a line is to be compared.
    fn counts(&self, line: &str) -> bool {
        self.remarks || !is_remark(line)
    }

    /// The line of its next event or remark.
    fn next(&mut self) -> Result<Option<String>, String> {
        loop {
            let mut line = Vec::new();
            let read = self.lines.read_until(b'\n', &mut line);
            let read = read.map_err(|e| format!("{}: {e}", self.name))?;
            if read == 0 {
                return Ok(None);
            }
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if is_event(&line) {
                self.events += u64::from(self.counts(&line));
                self.tail.clear();
                return Ok(Some(line));
            }
            self.tail.push(line);
        }
    }

    /// From `first` on as many lines as are shown.
    fn goes_on(&mut self, first: Option<String>, count: usize) -> Result<Vec<String>, String> {
        let mut lines = Vec::from_iter(first);
        while !lines.is_empty() && lines.len() < count {
            match self.next()? {
                Some(line) => lines.push(line),
                None => break,
            }
        }
        Ok(lines)
    }

    /// Reads what is left.
    fn finish(&mut self) -> Result<(), String> {
        while self.next()?.is_some() {}
        let status = self.child.wait().map_err(|e| e.to_string())?;
        if matches!(status.code(), Some(0 | 1)) {
            return Ok(());
        }
        let said = std::fs::read(&self.errors).map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&said);
        Err(format!(
            "{} could not run this ({status}): {}",
            self.name,
            said.trim()
        ))
    }

    /// What came of it, as it says.
    fn outcome(&self) -> String {
        let is = |line: &String| line.starts_with("FAILED (") || line == "no failure";
        match self.tail.iter().position(is) {
            Some(at) => self.tail[at..].join("\n"),
            None => "said nothing of how it ended".to_owned(),
        }
    }

    /// The digest of all events, as it says.
    fn digest(&self) -> Option<&str> {
        let mut lines = self.tail.iter();
        let digest = lines.find_map(|line| line.split_once(" simulated seconds, events "));
        digest.and_then(|(_, rest)| rest.split(',').next())
    }

    /// The plan that it has run.
    fn plan(&self) -> Option<Value> {
        let text = std::fs::read_to_string(&self.saved).ok()?;
        let mut saved: Value = serde_json::from_str(&text).ok()?;
        let plan = saved.get_mut("plan").map(Value::take);
        Some(plan.unwrap_or(saved))
    }

    fn to_json(&self, lines: &[String]) -> Value {
        json!({
            "name": self.name, "events": self.events, "digest": self.digest(),
            "outcome": self.outcome(), "lines": lines,
        })
    }
}

/// What of `ours` is not in `theirs`, as paths.
fn left_out(ours: &Value, theirs: &Value, path: &str, found: &mut BTreeSet<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, value) in ours {
                let path = format!("{path}.{key}");
                match theirs.get(key) {
                    Some(other) => left_out(value, other, &path, found),
                    None => {
                        found.insert(path.trim_start_matches('.').to_owned());
                    }
                }
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            let path = format!("{path}[]");
            for (value, other) in ours.iter().zip(theirs) {
                left_out(value, other, &path, found);
            }
        }
        _ => {}
    }
}

/// What two runs have in common, and where that ends.
#[derive(Default)]
struct Difference {
    /// Events that are the same.
    same: u64,
    /// The last of them.
    before: VecDeque<String>,
    /// What each goes on with; both empty if they do the same.
    after: [Vec<String>; 2],
}

impl Difference {
    /// Reads both until they differ, and as far as is shown.
    fn find(one: &mut Run, other: &mut Run, context: usize) -> Result<Self, String> {
        let mut found = Self::default();
        loop {
            let left = one.next()?;
            if let Some(line) = left.as_ref().filter(|line| !one.counts(line)) {
                found.passed(line, context);
                continue;
            }
            let mut right = other.next()?;
            while right.as_ref().is_some_and(|line| !other.counts(line)) {
                right = other.next()?;
            }
            if left != right {
                found.after = [one.goes_on(left, context)?, other.goes_on(right, context)?];
                return Ok(found);
            }
            let Some(line) = left else {
                return Ok(found);
            };
            found.same += 1;
            found.passed(&line, context);
        }
    }

    fn passed(&mut self, line: &str, context: usize) {
        self.before.push_back(line.to_owned());
        if self.before.len() > context {
            self.before.pop_front();
        }
    }
}

impl Args {
    /// The program that runs the other one, and its name; nothing: this one.
    fn other_program(&self, recorded: Option<&str>) -> Result<Option<(PathBuf, String)>, String> {
        if let Some(binary) = &self.binary {
            let found = binary.canonicalize();
            let found = found.map_err(|e| format!("{}: {e}", binary.display()))?;
            return Ok(Some((found, binary.display().to_string())));
        }
        let commit = match (&self.commit, recorded) {
            (Some(commit), _) => commit,
            (None, Some(commit)) if self.recorded => commit,
            (None, None) if self.recorded => {
                return Err(format!("{} does not say at which commit", self.one));
            }
            _ => return Ok(None),
        };
        let repo = self.repo.as_deref().unwrap_or(Path::new("."));
        let build = Build::of(commit, repo, self.worktree.as_deref())?;
        let name = format!("commit {}", short(&build.hash));
        Ok(Some((build.program()?, name)))
    }
}

/// A file with the plan of a case, and the planted bug.
fn written(case: &Case, file: PathBuf) -> Result<Vec<String>, String> {
    // A plan alone can be read by more commits than a case.
    let text = serde_json::to_string(&case.plan).map_err(|e| e.to_string())?;
    std::fs::write(&file, text).map_err(|e| format!("{}: {e}", file.display()))?;
    let file = file.into_os_string().into_string();
    let mut what = vec![file.map_err(|name| format!("{name:?} is no UTF-8"))?];
    if let Some(mutant) = &case.mutant {
        what.extend(["--mutant".to_owned(), mutant.clone()]);
    }
    Ok(what)
}

/// Runs the command.
pub fn run(args: &Args) -> Result<bool, String> {
    let one = args.drawn.case(&args.one)?;
    let mut other = match &args.other {
        Some(what) => args.drawn.case(what)?,
        None => one.clone(),
    };
    if args.without_mutant {
        other.mutant = None;
    }
    if args.redraw && args.one.parse::<u64>().is_err() {
        return Err(format!("--redraw is for seeds: {} is drawn", args.one));
    }
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let program = args.other_program(one.commit.as_deref())?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let sub = |name: &str| -> Result<PathBuf, String> {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(dir)
    };
    let (ours, theirs) = (sub("one")?, sub("other")?);
    let what = written(&one, ours.join("plan.json"))?;
    let mut what_other = written(&other, theirs.join("plan.json"))?;
    if args.redraw {
        what_other[0] = args.one.clone();
        what_other.extend(args.drawn.drawing.arguments());
    }
    let name = match program {
        Some(_) => "this program".to_owned(),
        None => args.one.clone(),
    };
    let same_program = program.is_none();
    let (program, name_other) = program.unwrap_or_else(|| {
        let without = if args.without_mutant {
            " without the bug"
        } else {
            ""
        };
        let what = args.other.as_ref().unwrap_or(&args.one);
        (own.clone(), format!("{what}{without}"))
    });
    let mut left = Run::start(name, &own, &what, &ours)?;
    let mut right = Run::start(name_other, &program, &what_other, &theirs)?;
    (left.remarks, right.remarks) = (same_program, same_program);
    let found = Difference::find(&mut left, &mut right, args.context)?;
    left.finish()?;
    right.finish()?;

    let equal = found.after.iter().all(Vec::is_empty);
    let digests_differ = match (left.digest(), right.digest()) {
        (Some(one), Some(other)) => equal && one != other,
        _ => false,
    };
    let same = equal && !digests_differ && left.outcome() == right.outcome();
    let mut unknown = BTreeSet::new();
    let mut another_plan = false;
    if !same_program && let Some(plan) = right.plan() {
        let ours = serde_json::to_value(&other.plan).map_err(|e| e.to_string())?;
        if args.redraw {
            another_plan = plan != ours;
        } else {
            left_out(&ours, &plan, "", &mut unknown);
        }
    }
    if args.json {
        let [after, after_other] = &found.after;
        let summary = json!({
            "equal": same, "same": found.same, "before": found.before,
            "one": left.to_json(after), "other": right.to_json(after_other),
            "digests_differ": digests_differ,
            "unknown_to_other": unknown, "another_plan": another_plan,
        });
        println!("{summary}");
        return Ok(same);
    }
    for path in &unknown {
        println!("{} does not know {path}: it ran without", right.name);
    }
    if another_plan {
        println!("{} draws another plan", right.name);
    }
    if same {
        println!("{} events, all the same", found.same);
        return Ok(true);
    }
    if !equal {
        for line in &found.before {
            println!("  {line}");
        }
        for (sign, lines) in ['-', '+'].iter().zip(&found.after) {
            for line in lines {
                println!("{sign} {line}");
            }
        }
    }
    println!(
        "the first {} events are the same, of {} and {}",
        found.same, left.events, right.events
    );
    if digests_differ {
        println!("but their digests are not: something differs that the lines leave out");
    }
    for (sign, run) in [('-', &left), ('+', &right)] {
        println!("{sign} {}: {}", run.name, run.outcome());
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_sim::trace::{Event, Link};

    #[test]
    fn lines_of_events_are_told_from_others() {
        for nanos in [0, 7_577_398_893, 123_456_789_000_000_001] {
            let event = Event {
                nanos,
                number: Some(1),
                node: 0,
                kind: "write",
                text: "Meta".to_owned(),
                link: Link::None,
            };
            assert!(is_event(&event.line()), "{}", event.line());
            assert!(!is_remark(&event.line()));
            let remark = Event {
                number: None,
                ..event
            };
            assert!(is_event(&remark.line()) && is_remark(&remark.line()));
        }
        for other in [
            "",
            "seed 3 profile Full: 376 operations",
            "  reached tx.written_durably 9 times",
            "277 calls judged in 3 steps, 9 events, 8 polls, 1.500 simulated seconds",
            "FAILED (check): 1.000000.000",
            "0.2 s",
            "1..",
        ] {
            assert!(!is_event(other), "{other}");
        }
    }

    #[test]
    fn what_the_other_leaves_out_of_a_plan_is_found_at_any_depth() {
        let ours = json!({ "seed": 1, "config": { "a": 1, "b": 2 },
            "lives": [{ "x": 1 }, { "x": 1, "y": 2 }, { "y": 3 }] });
        let theirs = json!({ "seed": 1, "config": { "a": 5, "old": 0 },
            "lives": [{ "x": 1 }, { "x": 1 }, {}] });
        let mut found = BTreeSet::new();
        left_out(&ours, &theirs, "", &mut found);
        let expected = ["config.b", "lives[].y"].map(str::to_owned);
        assert_eq!(found, BTreeSet::from(expected));
    }
}

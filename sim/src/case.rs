//! A failure, kept as a file: the plan, what was seen, and where to find it again.
//!
//! What can go wrong: the code has changed since, and the plan does something else
//! now. The digest of the events that is kept tells ([`Case::is_as_recorded`]).

use crate::oracle::Violation;
use crate::plan::Plan;
use crate::world::Outcome;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Which promise was broken.
    pub kind: String,
    /// What was seen and what was expected.
    pub text: String,
    /// Failures with the same signature are likely to have one cause.
    pub signature: String,
    /// Digest of all events, 16 hex digits.
    pub events: String,
}

/// A plan with what is known of it. Files in `seeds/` may also be a plan alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The commit of the work tree in which it was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The planted bug that was switched on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mutant: Option<String>,
    /// What was seen; absent from plans that nobody has run yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Seen>,
    /// The plan.
    pub plan: Plan,
}

/// Failures with the same signature are likely to have one cause: the kind, and the
/// text's first words or the place of a panic, without numbers.
pub fn signature(violation: &Violation) -> String {
    let text = violation.text.lines().next().unwrap_or_default();
    let place = text
        .rfind("(at ")
        .map(|at| text[at + 4..].trim_end_matches(')'));
    match violation.kind {
        "panic" => format!("panic {}", place.unwrap_or("somewhere")),
        // What they say first is which calls there were.
        kind @ ("answers" | "durability") => kind.to_owned(),
        kind => {
            // A check counts its problems first; the first one's own words say more.
            let text = text.split_once("text: \"").map_or(text, |(_, words)| words);
            let words: String = text
                .chars()
                .take_while(|c| !c.is_ascii_digit() && *c != '(' && *c != '[')
                .take(60)
                .collect();
            format!("{kind} {}", words.trim())
        }
    }
}

impl Case {
    /// A plan nobody has run yet.
    pub fn of(plan: Plan) -> Self {
        Self {
            commit: None,
            mutant: None,
            seen: None,
            plan,
        }
    }

    /// A failure that was just seen; nothing if there was none.
    pub fn failed(plan: Plan, mutant: Option<&str>, outcome: &Outcome) -> Option<Self> {
        let failure = outcome.failure.as_ref()?;
        Some(Self {
            commit: commit(),
            mutant: mutant.map(str::to_owned),
            seen: Some(Seen {
                kind: failure.kind.to_owned(),
                text: failure.text.clone(),
                signature: signature(failure),
                events: format!("{:016x}", outcome.event_hash),
            }),
            plan,
        })
    }

    /// Whether a run did just what was recorded; nothing if nothing was.
    pub fn is_as_recorded(&self, outcome: &Outcome) -> Option<bool> {
        let seen = self.seen.as_ref()?;
        // A panic ends a world before its events are summed up.
        let events = outcome.failure.as_ref().is_some_and(|f| f.kind == "panic")
            || seen.events == format!("{:016x}", outcome.event_hash);
        let signature = outcome.failure.as_ref().map(signature);
        Some(events && signature.as_deref() == Some(&seen.signature))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong, with the file's name.
    pub fn load(file: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        Self::parse(&text).map_err(|e| format!("{}: {e}", file.display()))
    }

    fn parse(text: &str) -> Result<Self, serde_json::Error> {
        let value: serde_json::Value = serde_json::from_str(text)?;
        if value.get("plan").is_some() {
            serde_json::from_value(value)
        } else {
            serde_json::from_value(value).map(Self::of)
        }
    }

    /// Writes a file, whole or not at all.
    ///
    /// # Errors
    /// What is wrong, with the file's name.
    pub fn save(&self, file: &Path) -> Result<(), String> {
        let says = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
        let text = serde_json::to_string(self).map_err(|e| says(&e))?;
        let mut other = file.as_os_str().to_owned();
        other.push(".new");
        std::fs::write(&other, text + "\n").map_err(|e| says(&e))?;
        std::fs::rename(&other, file).map_err(|e| says(&e))
    }
}

/// The commit, as a CI system or the work tree says.
fn commit() -> Option<String> {
    let given = ["GITHUB_SHA", "CI_COMMIT_SHA"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok());
    given.or_else(|| {
        let git = std::process::Command::new("git")
            .args(["rev-parse", "HEAD"])
            .output()
            .ok()?;
        let text = String::from_utf8(git.stdout).ok()?;
        git.status.success().then(|| text.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_and_without_what_was_seen_are_read() {
        let plan = Plan::from_seed(1, None);
        let alone = serde_json::to_string(&plan).unwrap();
        assert_eq!(Case::parse(&alone).unwrap(), Case::of(plan.clone()));
        let outcome = Outcome {
            failure: Some(Violation {
                kind: "check",
                text: "block 77 is free twice".to_owned(),
            }),
            event_hash: 5,
            ..Outcome::default()
        };
        let case = Case::failed(plan, Some("bug"), &outcome).unwrap();
        let read = Case::parse(&serde_json::to_string(&case).unwrap()).unwrap();
        assert_eq!(read, case);
        assert_eq!(read.is_as_recorded(&outcome), Some(true));
        let other = Outcome {
            event_hash: 6,
            ..outcome
        };
        assert_eq!(read.is_as_recorded(&other), Some(false));
        assert!(Case::parse("{\"plan\": 3}").is_err());
    }

    #[test]
    fn signatures_leave_out_what_differs_from_run_to_run() {
        let of = |kind, text: &str| {
            signature(&Violation {
                kind,
                text: text.to_owned(),
            })
        };
        assert_eq!(
            of("check", "block 77 is free twice"),
            of("check", "block 12 is lost")
        );
        assert_eq!(
            of("panic", "left: 3 (at core/src/a.rs:7)"),
            "panic core/src/a.rs:7"
        );
        assert_ne!(
            of("liveness", "the unmount takes 3 s"),
            of("liveness", "calls hang")
        );
    }
}

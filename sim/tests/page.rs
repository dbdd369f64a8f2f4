//! The page of a run, in a real browser: Chromium opens it, runs its program, and
//! says what it has found, with the curve of `explain` where there is one. Skips itself, and says so, where there is no Chromium.
#![cfg(madsim)]

use outrider_sim::plan::{Plan, Profile};
use outrider_sim::show::{Facts, page};
use outrider_sim::world::{self, Options, node::Outrider};
use std::process::Command;
use std::sync::{Arc, Mutex};

/// Runs a plan and makes its page; also the number of events, and of failures.
fn page_of(plan: &Plan, mutant: Option<&'static str>) -> (String, usize, bool) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&events);
    let outcome = world::run::<Outrider>(
        plan,
        Options {
            mutant,
            sink: Some(Box::new(move || {
                Box::new(move |event| kept.lock().expect("one thread").push(event))
            })),
            ..Options::default()
        },
    );
    let failure = outcome.failure.map(|f| (f.kind.to_owned(), f.text));
    let failed = failure.is_some();
    let facts = Facts {
        failure,
        mutant: mutant.map(str::to_owned),
        command: "outrider-sim replay 0".to_owned(),
        explain: failed.then(curve),
    };
    let events = events.lock().expect("the world has ended");
    (page(plan, &events, &facts), events.len(), failed)
}

/// What `explain` says of a run, as far as the page needs it.
fn curve() -> serde_json::Value {
    let point = |nanos: u64, same: u32| {
        serde_json::json!({
            "nanos": nanos, "events": 1, "same": same, "other": 0, "runs": 10,
            "share": f64::from(same) / 10.0, "low": 0.1, "high": 0.9,
        })
    };
    serde_json::json!({
        "points": [point(0, 2), point(400_000_000, 9), point(700_000_000, 10)],
        "jumps": [{
            "from": 0, "until": 400_000_000, "before": 0.2, "after": 0.9,
            "happened": ["one", "two"], "others": {}, "then": [],
        }],
        "verdict": "it was open, and then it was not",
    })
}

#[test]
fn a_browser_shows_a_run() {
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let Some(browser) = browsers.into_iter().find(|name| {
        let version = Command::new(name).arg("--version").output();
        version.is_ok_and(|out| out.status.success())
    }) else {
        println!("skipped: there is no Chromium here");
        return;
    };
    world::remember_panics();
    let dir = tempfile::tempdir().expect("a directory");
    let worlds = [
        (Plan::from_seed(0, None), Some("freed_block_reused")),
        (Plan::from_seed(1, Some(Profile::Cluster)), None),
    ];
    for (number, (plan, mutant)) in worlds.iter().enumerate() {
        let (text, events, failed) = page_of(plan, *mutant);
        assert_eq!(failed, mutant.is_some());
        let file = dir.path().join(format!("{number}.html"));
        std::fs::write(&file, text).expect("the page is written");
        let out = Command::new(browser)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
            .arg(format!(
                "--user-data-dir={}",
                dir.path().join("profile").display()
            ))
            .arg(format!("file://{}", file.display()))
            .output()
            .expect("the browser runs");
        let dom = String::from_utf8_lossy(&out.stdout);
        let ready = format!("data-ready=\"{events} events");
        assert!(
            dom.contains(&ready),
            "the page's program did not end: no {ready}"
        );
        assert_eq!(
            dom.contains("<h1 id=\"title\">") && dom.contains(": FAILED ("),
            failed
        );
        let moments = if failed { 3 } else { 0 };
        assert!(dom.contains(&format!(" messages, {moments} moments\"")));
        assert_eq!(
            dom.contains("it was open, and then it was not</div>"),
            failed
        );
        assert!(
            dom.contains("<td class=\"t mono\">"),
            "the tables are empty"
        );
    }
}

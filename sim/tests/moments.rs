//! States of a world at its moments: looking changes nothing, and what is seen agrees
//! with what the events tell.
#![cfg(madsim)]

use outrider_sim::disk_model::Medium;
use outrider_sim::plan::{Plan, Profile};
use outrider_sim::trace::Event;
use outrider_sim::world::snapshot::{Moments, Snapshot};
use outrider_sim::world::{self, Options, Outcome, node::Outrider};
use std::process::Command;
use std::sync::{Arc, Mutex};

type Seen = Vec<(Snapshot, Medium)>;

fn run(plan: &Plan, moments: Option<(Vec<u64>, u64)>) -> (Outcome, Vec<Event>, Seen) {
    world::remember_panics();
    let (events, seen) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(Mutex::new(Vec::new())),
    );
    let (kept, states) = (Arc::clone(&events), Arc::clone(&seen));
    let options = Options {
        sink: Some(Box::new(move || {
            Box::new(move |event| kept.lock().expect("one thread").push(event))
        })),
        moments: moments.map(|(at, every)| Moments {
            at,
            every: Some(every),
            each: Box::new(move |state, medium| {
                states.lock().expect("one thread").push((state, medium));
            }),
        }),
        ..Options::default()
    };
    let outcome = world::run::<Outrider>(plan, options);
    let events = std::mem::take(&mut *events.lock().expect("the world has ended"));
    let seen = std::mem::take(&mut *seen.lock().expect("the world has ended"));
    (outcome, events, seen)
}

/// The requests of a state end as it says, unless somebody dies or a fault comes first.
fn requests_end(state: &Snapshot, events: &[Event]) -> usize {
    let sure = state.requests.iter().filter(|request| {
        let until = request.ends + 10_000;
        let mut between = events
            .iter()
            .filter(|e| (state.nanos..until).contains(&e.nanos));
        !between.any(|event| matches!(event.kind, "DEATH" | "FENCED" | "BLACKOUT" | "pause"))
            && !state.frozen.contains(&request.node)
            // What ended while its machine stood still is handed over later.
            && request.ends >= state.nanos
            && request.ends + 1_000_000 < events.last().expect("events").nanos
    });
    let found = sure.map(|request| {
        let text = format!(
            "{:?} {:#x}+{:#x}",
            request.device, request.offset, request.len
        );
        let ended = events.iter().any(|event| {
            event.kind == request.op.event()
                && event.node == request.node
                && event.text.starts_with(&text)
                && (request.ends..request.ends + 100_000).contains(&event.nanos)
        });
        let near = events
            .iter()
            .filter(|e| e.nanos.abs_diff(request.ends) < 200_000);
        let near: Vec<String> = near.map(Event::line).collect();
        assert!(ended, "{request:?} at {}: {near:#?}", state.nanos);
    });
    found.count()
}

#[test]
fn looking_changes_nothing_and_sees_what_is_there() {
    let worlds = [
        Plan::from_seed(3, None),
        Plan::from_seed(6, Some(Profile::Cluster)),
    ];
    let (mut checked, mut locks, mut dirty, mut leaders) = (0, 0, 0, 0);
    for plan in &worlds {
        let (base, events, none) = run(plan, None);
        assert!(none.is_empty());
        // In the middle of every call that takes its time.
        let asked = events.iter().filter(|event| event.text.starts_with('?'));
        let wanted: Vec<u64> = asked.step_by(2).map(|event| event.nanos + 1).collect();
        let (outcome, again, seen) = run(plan, Some((wanted.clone(), 500_000_000)));
        assert_eq!(
            (outcome, &again),
            (base, &events),
            "looking changes nothing"
        );
        assert!(seen.len() >= wanted.len());
        for (state, _) in &seen {
            checked += requests_end(state, &events);
            let before: Vec<&Event> = events
                .iter()
                .filter(|e| e.number.is_some_and(|number| number <= state.events))
                .collect();
            assert!(before.iter().all(|event| event.nanos <= state.nanos));
            for (node, call) in &state.calls {
                let number = call.split(' ').nth(1).expect("a number");
                let asked = before.iter().filter(|event| {
                    event.node == *node && event.text.split(' ').next() == Some(number)
                });
                assert!(asked.count() > 0, "{call}");
            }
            for mount in &state.mounts {
                locks += mount.locks.len();
                dirty += mount.transaction.dirty_items;
                let quorum = mount.quorum.iter();
                leaders += quorum.filter(|member| member.role == "leader").count();
            }
            assert!(state.to_string().contains("node 0"));
        }
        let last = events.iter().rposition(|event| event.kind == "DEATH");
        let died = events[last.expect("somebody dies in the end")].clone();
        let after = seen.iter().filter(|(state, _)| state.nanos > died.nanos);
        for (state, _) in after {
            assert!(state.mounts.iter().all(|mount| mount.node != died.node));
        }
    }
    assert!(
        checked > 20 && locks > 100 && dirty > 10 && leaders > 10,
        "{checked} {locks} {dirty} {leaders}"
    );
}

fn replay(args: &[&str]) -> (bool, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_outrider-sim"))
        .args(["replay", "3"])
        .args(args)
        .output()
        .expect("the command runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.success(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn the_command_shows_states_and_metadata_of_a_moment() {
    let (well, text, _) = replay(&["--at", "700ms", "--block", "1", "--json"]);
    assert!(well);
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON"))
        .collect();
    let state = &lines
        .iter()
        .find(|l| l.get("state").is_some())
        .expect("a state")["state"];
    assert_eq!(state["nanos"], 700_000_000);
    assert!(state["mounts"].is_array() && state["requests"].is_array());
    let records = lines.iter().filter(|l| l["record"] == "super");
    assert_eq!(records.count(), 1);
    assert!(lines.last().expect("the outcome")["outcome"]["event_hash"].is_string());

    let (well, whole, _) = replay(&["--at", "700ms", "--print"]);
    assert!(well && whole.contains("btree_block") && whole.contains("== 0.700000.000 s"));
    let (well, every, _) = replay(&["--snapshot-every", "200ms"]);
    assert!(well && every.matches("== ").count() > 3);

    let (well, _, error) = replay(&["--at", "100000s"]);
    assert!(!well && error.contains("ended before"), "{error}");
    let (well, _, error) = replay(&["--at", "700ms", "--block", "99999999"]);
    assert!(!well && error.contains("block 99999999"), "{error}");
    let (well, _, error) = replay(&["--at", "soon"]);
    assert!(!well && error.contains("12.5s"), "{error}");
}

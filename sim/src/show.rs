//! A run as a page that people look at: lanes of nodes over time, with calls,
//! messages, disk, locks and faults, and the causal past of any event.
//!
//! The page stands alone: it loads nothing. What can go wrong: text of the run that
//! the browser takes for markup. Everything is handed over as JSON in which `<` is
//! escaped, and put into the page as text.

use crate::model::{FLAT, pattern_byte};
use crate::plan::Plan;
use crate::trace::{Event, Link};
use serde_json::{Value, json};

const PAGE: &str = include_str!("show.html");
/// Stands in the page where the data goes.
const PLACE: &str = "\"DATA\"";

/// What the page says beside the events.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The failure: which promise was broken, and how.
    pub failure: Option<(String, String)>,
    /// The planted bug that was switched on.
    pub mutant: Option<String>,
    /// How to run it again.
    pub command: String,
    /// When it became inevitable: what `outrider-sim explain --json` prints.
    pub explain: Option<Value>,
}

#[cfg(madsim)]
impl Facts {
    /// What a case and its outcome say.
    pub fn of(case: &crate::case::Case, outcome: &crate::world::Outcome) -> Self {
        let failure = outcome.failure.as_ref();
        Self {
            failure: failure.map(|failure| (failure.kind.to_owned(), failure.text.clone())),
            mutant: case.mutant.clone(),
            ..Self::default()
        }
    }
}

/// The page of a run.
pub fn page(plan: &Plan, events: &[Event], facts: &Facts) -> String {
    let nodes = plan.cluster.as_ref().map_or(1, |c| c.nodes.len());
    let byte = facts.failure.as_ref().and_then(|(_, text)| Byte::of(text));
    let data = json!({
        "seed": plan.seed,
        "header": plan.header(),
        "nodes": nodes,
        "mutant": facts.mutant,
        "command": facts.command,
        "explain": facts.explain,
        "failure": facts.failure.as_ref().map(|(kind, text)| json!({"kind": kind, "text": text})),
        "events": events.iter().map(|event| row(event, byte.as_ref())).collect::<Vec<Value>>(),
    });
    // In JSON `<` appears in strings only, where it may be written so.
    let data = data.to_string().replace('<', "\\u003c");
    PAGE.replacen(PLACE, &data, 1)
}

/// The byte of a file that a failure is about.
struct Byte {
    ino: u64,
    at: u64,
}

/// The number that follows the last of some words, each looked for behind the one before.
fn number_behind(text: &str, words: &[&str]) -> Option<u64> {
    let rest = words.iter().try_fold(text, |text, word| {
        text.split_once(word).map(|(_, behind)| behind)
    })?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

impl Byte {
    /// As comparisons of contents name it (`model::recover`).
    fn of(failure: &str) -> Option<Self> {
        let ino = number_behind(failure, &["inode "])?;
        let at = number_behind(failure, &[&format!("inode {ino}: byte ")])?;
        Some(Self { ino, at })
    }

    /// What a call puts there, if it is a write of it.
    fn put_by(&self, call: &str) -> Option<u8> {
        let of = |field: &str| number_behind(call, &["Write {", field]);
        let (offset, len, tag) = (of(" offset: ")?, of(" len: ")?, of(" tag: ")?);
        let covered = (offset..offset + len).contains(&self.at) || tag & FLAT != 0;
        (of(" ino: ")? == self.ino && covered).then(|| pattern_byte(tag, self.at))
    }

    /// What a look at the file showed there (`world::contents` words it).
    fn seen_by(&self, look: &str) -> Option<u8> {
        if number_behind(look, &["inode "])? != self.ino {
            return None;
        }
        let mut at = number_behind(look, &[" from "])?;
        let (_, told) = look.split_once(": ")?;
        for part in told.split(" (").next()?.split(", ") {
            let mut words = part.split(' ');
            let run: Option<u64> = words.next().and_then(|word| word.parse().ok());
            let (len, byte) = match (run, words.next()) {
                (Some(run), Some("zeros")) => (run, Some(0)),
                (Some(run), Some("of")) => {
                    let tag = number_behind(part, &["write "])?;
                    (run, Some(pattern_byte(tag, self.at)))
                }
                // A few bytes, each in two digits.
                _ => {
                    let bytes: Vec<&str> = part.split(' ').collect();
                    let place = self.at.checked_sub(at).map(|place| place as usize);
                    let byte = place.and_then(|place| bytes.get(place));
                    let byte = byte.and_then(|byte| u8::from_str_radix(byte, 16).ok());
                    (bytes.len() as u64, byte)
                }
            };
            if (at..at + len).contains(&self.at) {
                return byte;
            }
            at += len;
        }
        None
    }
}

/// `[nanos, number, node, kind, text, link...]`
fn row(event: &Event, byte: Option<&Byte>) -> Value {
    let mut text = event.text.clone();
    if let Some(byte) = byte {
        if let Some(put) = byte.put_by(&event.text) {
            text += &format!(" (puts {put:#04x} at byte {})", byte.at);
        } else if let Some(seen) = byte.seen_by(&event.text).filter(|_| event.kind == "look") {
            text += &format!(" (shows {seen:#04x} at byte {})", byte.at);
        }
    }
    let mut row = vec![
        json!(event.nanos),
        json!(event.number),
        json!(event.node),
        json!(event.kind),
        json!(text),
    ];
    match event.link {
        Link::None => {}
        Link::Until(until) => row.extend([json!("until"), json!(until)]),
        Link::Sends(message, to) => row.extend([json!("sends"), json!(message), json!(to)]),
        Link::Gets(message) => row.extend([json!("gets"), json!(message)]),
    }
    Value::Array(row)
}

/// The run in the format of the Perfetto trace viewer (Chrome's JSON): a process for
/// each node, with a row for its calls, its disk, its probes and its messages.
pub fn perfetto(events: &[Event]) -> String {
    let mut out = Vec::new();
    let micros = |nanos: u64| nanos as f64 / 1000.0;
    let mut open = std::collections::BTreeMap::new();
    let mut nodes = std::collections::BTreeSet::new();
    for event in events {
        nodes.insert(event.node);
        let row = match event.kind {
            "read" | "write" | "flush" => "disk",
            "probe" => "probes",
            "send" | "arrive" => "messages",
            "fault" => "faults",
            _ => "calls",
        };
        let base = json!({
            "pid": event.node, "tid": row, "ts": micros(event.nanos),
            "name": event.kind, "args": {"text": event.text},
        });
        let mut entry = base.clone();
        let place = (event.node, call_number(event).map(str::to_owned));
        if event.kind == "answer" {
            if let Some(mut begun) = open.remove(&place) {
                let begin: &mut Value = &mut begun;
                let from = begin["ts"].as_f64().unwrap_or_default();
                begin["ph"] = json!("X");
                begin["dur"] = json!(micros(event.nanos) - from);
                begin["args"]["answer"] = json!(event.text);
                out.push(begun);
            }
            continue;
        }
        if event.text.starts_with('?') && place.1.is_some() {
            open.insert(place, base);
            continue;
        }
        match event.link {
            Link::Until(until) => {
                entry["ph"] = json!("X");
                entry["dur"] = json!(micros(until) - micros(event.nanos));
            }
            Link::Sends(message, _) | Link::Gets(message) => {
                let mut flow = entry.clone();
                if let Link::Sends(..) = event.link {
                    flow["ph"] = json!("s");
                } else {
                    flow["ph"] = json!("f");
                    flow["bp"] = json!("e");
                }
                flow["id"] = json!(message);
                flow["name"] = json!("message");
                flow["cat"] = json!("message");
                entry["ph"] = json!("X");
                entry["dur"] = json!(0.2);
                out.push(flow);
            }
            Link::None => {
                entry["ph"] = json!("i");
                entry["s"] = json!("t");
            }
        }
        out.push(entry);
    }
    // Calls that nobody answered.
    for (_, mut begun) in open {
        begun["ph"] = json!("i");
        begun["s"] = json!("t");
        out.push(begun);
    }
    for node in nodes {
        out.push(json!({
            "ph": "M", "name": "process_name", "pid": node, "args": {"name": format!("node {node}")},
        }));
    }
    json!({"traceEvents": out, "displayTimeUnit": "ms"}).to_string()
}

/// The number by which a call and its answer are known, as `?7 ...` and `!7 ...`.
fn call_number(event: &Event) -> Option<&str> {
    let rest = event.text.strip_prefix(['?', '!'])?;
    rest.split(' ').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(nanos: u64, kind: &'static str, text: &str, link: Link) -> Event {
        Event {
            nanos,
            number: Some(nanos),
            node: 0,
            kind,
            text: text.to_owned(),
            link,
        }
    }

    #[test]
    fn text_of_a_run_is_no_markup() {
        let events = [event(1, "create", "?0 </script><b>", Link::None)];
        let page = page(&Plan::from_seed(1, None), &events, &Facts::default());
        assert!(!page.contains("</script><b>"));
        assert!(!page.contains(PLACE));
        assert!(page.contains("?0 \\u003c/script>"));
    }

    #[test]
    fn writes_of_the_byte_that_is_wrong_say_what_they_put_there() {
        let text =
            "no state; nearest (1 inodes differ): inode 1024: byte 12288 is 0xcf, expected 0x07";
        let byte = Byte::of(text).unwrap();
        assert_eq!((byte.ino, byte.at), (1024, 12288));
        let call = |ino: u64, offset: u64| {
            format!("?7 Write {{ ino: {ino}, offset: {offset}, len: 4096, tag: 5, append: false }}")
        };
        assert_eq!(
            byte.put_by(&call(1024, 12000)),
            Some(pattern_byte(5, 12288))
        );
        assert_eq!(byte.put_by(&call(1025, 12000)), None);
        assert_eq!(byte.put_by(&call(1024, 0)), None);
        assert_eq!(byte.put_by("?7 Open { ino: 1024 }"), None);
        assert!(Byte::of("inode 1024 is missing").is_none());
        let row = row(
            &event(1, "write", &call(1024, 12000), Link::None),
            Some(&byte),
        );
        assert!(row[4].as_str().unwrap().ends_with("at byte 12288)"));
        let look = "inode 1024 from 8192: 4096 of write 7, 20 zeros, 5 of write 9 (4121 bytes)";
        let seen = |at| Byte { ino: 1024, at }.seen_by(look);
        assert_eq!(seen(12287), Some(pattern_byte(7, 12287)));
        assert_eq!((seen(12288), seen(12307)), (Some(0), Some(0)));
        assert_eq!(seen(12308), Some(pattern_byte(9, 12308)));
        assert_eq!((seen(12313), seen(100)), (None, None));
        let few = Byte { ino: 3, at: 1 }.seen_by("inode 3 from 0: 1b 37 53 (3 bytes)");
        assert_eq!(few, Some(0x37));
    }

    #[test]
    fn a_trace_has_calls_with_their_length_and_messages_with_their_ends() {
        let events = [
            event(1_000, "create", "?0 Create", Link::None),
            event(2_000, "send", "to n1", Link::Sends(5, 1)),
            event(3_000, "arrive", "", Link::Gets(5)),
            event(4_000, "answer", "!0 ok", Link::None),
            event(5_000, "fault", "a stall", Link::Until(9_000)),
            event(6_000, "unlink", "?1 Unlink", Link::None),
        ];
        let trace: Value = serde_json::from_str(&perfetto(&events)).unwrap();
        let all = trace["traceEvents"].as_array().unwrap();
        let named = |name: &str| all.iter().filter(|e| e["name"] == name).collect::<Vec<_>>();
        assert_eq!(named("create")[0]["dur"], json!(3.0));
        assert_eq!(named("message").len(), 2);
        assert_eq!(named("fault")[0]["dur"], json!(4.0));
        assert_eq!(named("unlink")[0]["ph"], json!("i"));
    }
}

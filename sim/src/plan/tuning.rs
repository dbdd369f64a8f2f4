//! What somebody wants to be other than a seed draws it: a profile from a file, and
//! single values from the command line.
//!
//! Every value has a key (`cluster.cuts`). A seed draws what it always draws; where a
//! value is given for a key, it replaces the draw. Several values in a list are one of
//! them, which each seed draws from a stream of its own.
//!
//! What can go wrong: a key that nothing asks for, or a value that makes no sense there.
//! Both are refused, with the key and where it was said.

use super::{Config, PROFILES, Profile, posix};
use crate::rng::Stream;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// What a value of a key may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A probability, 0 to 1.
    Chance,
    /// One that is tried until it fails: at most 0.9.
    Repeated,
    /// A whole number.
    Count(u64, u64),
    /// Yes or no.
    Flag,
    /// One of some names.
    Name(&'static [&'static str]),
}

use Kind::{Chance, Count, Flag, Name, Repeated};

/// Names of the operations, in the order of their weights.
pub const OPERATIONS: [&str; super::OP_KINDS] = [
    "lookup",
    "getattr",
    "chmod",
    "chown",
    "utimes",
    "truncate",
    "readlink",
    "mknod",
    "mkdir",
    "create",
    "tmpfile",
    "symlink",
    "unlink",
    "rmdir",
    "rename",
    "link",
    "open",
    "close",
    "read",
    "write",
    "append",
    "fsync",
    "syncfs",
    "setxattr",
    "getxattr",
    "listxattr",
    "removexattr",
    "readdir",
    "statfs",
    "fallocate",
    "seek",
    "fiemap",
];

/// Names of all operations.
fn operations() -> Vec<&'static str> {
    OPERATIONS.into_iter().chain(posix::NAMES).collect()
}

/// All keys, but those of `config` and `ops`, with what they mean.
const KEYS: [(&str, Kind, &str); 39] = [
    (
        "workload.lives",
        Count(1, 20),
        "lives of the mount, in a world of one node",
    ),
    (
        "workload.operations",
        Count(1, 10_000),
        "operations of such a world",
    ),
    ("workload.tasks", Count(1, 16), "tasks at a time"),
    (
        "workload.window",
        Count(1, 200),
        "operations between two moments of quiet",
    ),
    ("workload.big", Flag, "long and far writes"),
    (
        "workload.max_file",
        Count(1, 1 << 40),
        "usual bytes of a file",
    ),
    (
        "workload.posix",
        Chance,
        "an ACL, a handle, a mapping or the like instead of another operation",
    ),
    (
        "workload.walks",
        Chance,
        "a walk over an index of inodes instead of another operation",
    ),
    ("workload.sync", Chance, "a sync in a moment of quiet"),
    (
        "workload.audit",
        Chance,
        "everything is read in a moment of quiet",
    ),
    (
        "ends.clean_last",
        Chance,
        "the last life ends with an unmount",
    ),
    ("ends.force", Chance, "a life ends with a forced unmount"),
    (
        "ends.unmount",
        Count(0, 1000),
        "weight of an unmount among the other ends",
    ),
    (
        "ends.kill",
        Count(0, 1000),
        "weight of the end of the process",
    ),
    ("ends.power", Count(0, 1000), "weight of a power loss"),
    ("faults.errors", Count(0, 50), "I/O errors in a life"),
    ("faults.stall", Chance, "a stall of a device in a life"),
    (
        "faults.wall_steps",
        Count(0, 50),
        "steps of the wall clock in a life",
    ),
    ("faults.reset", Chance, "a reset of all streams in a life"),
    ("faults.partition", Chance, "a partition in a life"),
    ("cluster.nodes", Count(2, 9), "nodes"),
    (
        "cluster.members",
        Count(1, 9),
        "members of the quorum, at most all nodes",
    ),
    ("cluster.rounds", Count(1, 30), "rounds"),
    ("cluster.operations", Count(1, 64), "operations of a round"),
    ("cluster.cuts", Repeated, "one more partition in a round"),
    ("cluster.bad", Repeated, "one more bad link in a round"),
    ("cluster.resets", Repeated, "one more reset in a round"),
    ("cluster.pauses", Repeated, "one more pause in a round"),
    (
        "cluster.steps",
        Repeated,
        "one more step of a clock in a round",
    ),
    (
        "cluster.disk",
        Repeated,
        "one more fault of a device in a round",
    ),
    (
        "cluster.deaths",
        Chance,
        "the death of each node in a round",
    ),
    (
        "cluster.at_steps",
        Chance,
        "a world in which mounts die at steps of the crash tables",
    ),
    ("cluster.blackout", Chance, "a blackout in a round"),
    (
        "cluster.rolling",
        Flag,
        "one node after the other ends and comes back",
    ),
    (
        "cluster.agents",
        Name(&["Prompt", "Slow", "Fail", "Hang", "Bar", "Lie", "Local"]),
        "fence agents",
    ),
    (
        "cluster.heartbeat_ms",
        Count(100, 600_000),
        "heartbeat timeout",
    ),
    (
        "cluster.keepalive_ms",
        Count(100, 600_000),
        "keepalive timeout",
    ),
    ("cluster.keyed", Flag, "the volume has a cluster key"),
    (
        "cluster.core",
        Flag,
        "a last phase in which a majority goes on alone",
    ),
];

/// The built-in profiles that are files.
const BUILT_IN: [(&str, &str); 7] = [
    ("smoke", include_str!("../../profiles/smoke.toml")),
    ("crash", include_str!("../../profiles/crash.toml")),
    ("liveness", include_str!("../../profiles/liveness.toml")),
    ("elections", include_str!("../../profiles/elections.toml")),
    ("disk", include_str!("../../profiles/disk.toml")),
    ("enospc", include_str!("../../profiles/enospc.toml")),
    (
        "performance",
        include_str!("../../profiles/performance.toml"),
    ),
];

/// The profiles that are part of the code, with their names.
fn all_coded() -> impl Iterator<Item = (String, Profile)> {
    let all = PROFILES.into_iter().chain([Profile::Cluster]);
    all.map(|profile| (format!("{profile:?}").to_lowercase(), profile))
}

fn coded(name: &str) -> Option<Profile> {
    let found = all_coded().find(|(own, _)| own == name);
    found.map(|(_, profile)| profile)
}

/// Names of all profiles.
pub fn names() -> Vec<String> {
    all_coded()
        .map(|(name, _)| name)
        .chain(BUILT_IN.iter().map(|(name, _)| (*name).to_owned()))
        .collect()
}

/// The text of a built-in profile that is a file.
pub fn text_of(name: &str) -> Option<&'static str> {
    let found = BUILT_IN.iter().find(|(own, _)| *own == name);
    found.map(|(_, text)| *text)
}

/// The keys with their meanings, a line each.
pub fn keys() -> String {
    let mut text = String::new();
    for (key, kind, what) in KEYS {
        let kind = match kind {
            Chance => "0 to 1".to_owned(),
            Repeated => "0 to 0.9".to_owned(),
            Count(from, to) => format!("{from} to {to}"),
            Flag => "true or false".to_owned(),
            Name(names) => names.join(", "),
        };
        text += &format!("  {key:24} {what} ({kind})\n");
    }
    text += &format!(
        "  {:24} weight of an operation: {}\n",
        "ops.NAME",
        operations().join(", ")
    );
    text += &format!(
        "  {:24} anything of what a replay prints as Config\n",
        "config.FIELD"
    );
    text
}

/// What is wanted other than drawn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    /// The profile that all seeds have.
    pub profile: Option<Profile>,
    /// The values of each key; one of them, if there are several.
    values: BTreeMap<String, Vec<Value>>,
}

impl Tuning {
    /// Only a profile.
    pub fn of(profile: Option<Profile>) -> Self {
        let values = BTreeMap::new();
        Self { profile, values }
    }

    /// A profile by its name, or from a file.
    ///
    /// # Errors
    /// What is wrong with it, with the key and the file's name.
    pub fn load(name: &str) -> Result<Self, String> {
        if let Some(profile) = coded(name) {
            return Ok(Self::of(Some(profile)));
        }
        if let Some(text) = text_of(name) {
            return Self::parse(text, false).map_err(|e| format!("profile {name}: {e}"));
        }
        let file = Path::new(name);
        let ending = file.extension().and_then(|ending| ending.to_str());
        let json = match ending {
            Some("toml") => false,
            Some("json") => true,
            _ => {
                let names = names().join(", ");
                return Err(format!(
                    "there is no profile {name}: profiles are {names}, or a file *.toml or *.json"
                ));
            }
        };
        let text = std::fs::read_to_string(file).map_err(|e| format!("{name}: {e}"))?;
        Self::parse(&text, json).map_err(|e| format!("{name}: {e}"))
    }

    fn parse(text: &str, json: bool) -> Result<Self, String> {
        let table: Map<String, Value> = if json {
            serde_json::from_str(text).map_err(|e| e.to_string())?
        } else {
            toml::from_str(text).map_err(|e| e.to_string())?
        };
        let mut tuning = Self::default();
        for (key, value) in table {
            match (key.as_str(), value) {
                ("base", Value::String(name)) => {
                    let base = coded(&name).ok_or_else(|| {
                        let names: Vec<String> = all_coded().map(|(name, _)| name).collect();
                        format!("base: {name:?} is none of {}", names.join(", "))
                    })?;
                    tuning.profile = Some(base);
                }
                ("about", Value::String(_)) => {}
                (_, value) => tuning.flatten(key, value)?,
            }
        }
        Ok(tuning)
    }

    fn flatten(&mut self, key: String, value: Value) -> Result<(), String> {
        match value {
            Value::Object(table) => {
                for (name, value) in table {
                    self.flatten(format!("{key}.{name}"), value)?;
                }
                Ok(())
            }
            Value::Array(values) if !values.is_empty() => self.put(key, values),
            value => self.put(key, vec![value]),
        }
    }

    fn put(&mut self, key: String, values: Vec<Value>) -> Result<(), String> {
        for value in &values {
            check(&key, value).map_err(|e| format!("{key}: {e}"))?;
        }
        self.values.insert(key, values);
        Ok(())
    }

    /// Takes `KEY=VALUE`, or `KEY=VALUE,VALUE`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn set(&mut self, text: &str) -> Result<(), String> {
        let (key, given) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
        let values = given.split(',').map(|value| {
            serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()))
        });
        self.put(key.trim().to_owned(), values.collect())
            .map_err(|e| format!("--set {e}"))
    }

    /// The values of a seed.
    pub(super) fn of_seed(&self, seed: u64) -> Knobs {
        let pick = |(key, values): (&String, &Vec<Value>)| {
            let index = match values.len() {
                1 => 0,
                // A stream for each key: one more in a file changes no other.
                many => {
                    let number = crate::trace::digest(key.as_bytes());
                    Stream::new(seed, "tuning", number).below(many as u64)
                }
            };
            (key.clone(), values[index as usize].clone())
        };
        Knobs {
            values: self.values.iter().map(pick).collect(),
            drawn: RefCell::default(),
        }
    }
}

/// Whether a key may have a value.
fn check(key: &str, value: &Value) -> Result<(), String> {
    if let Some(field) = key.strip_prefix("config.") {
        let mut config = super::Plan::from_seed(0, None).config;
        return set_in_config(&mut config, field, value);
    }
    let kind = match key.strip_prefix("ops.") {
        Some(name) if operations().contains(&name) => Count(0, 10_000),
        Some(_) => return Err(format!("operations are {}", operations().join(", "))),
        None => {
            let found = KEYS.iter().find(|(name, _, _)| *name == key);
            let Some((_, kind, _)) = found else {
                return Err(format!(
                    "there is no such key; there are\n{}",
                    keys().trim_end()
                ));
            };
            *kind
        }
    };
    let in_range = |most: f64| value.as_f64().is_some_and(|v| (0.0..=most).contains(&v));
    let (fits, wanted) = match kind {
        Chance => (in_range(1.0), "a number from 0 to 1".to_owned()),
        Repeated => (in_range(0.9), "a number from 0 to 0.9".to_owned()),
        Count(from, to) => (
            value.as_u64().is_some_and(|v| (from..=to).contains(&v)),
            format!("a whole number from {from} to {to}"),
        ),
        Flag => (value.is_boolean(), "true or false".to_owned()),
        Name(names) => (
            value.as_str().is_some_and(|v| names.contains(&v)),
            format!("one of {}", names.join(", ")),
        ),
    };
    match fits {
        true => Ok(()),
        false => Err(format!("{value} is not {wanted}")),
    }
}

/// Replaces a field, `stress.slow_by` for one further in.
fn set_in_config(config: &mut Config, field: &str, value: &Value) -> Result<(), String> {
    let mut whole = serde_json::to_value(&*config).map_err(|e| e.to_string())?;
    let mut place = &mut whole;
    for name in field.split('.') {
        let fields: Vec<String> = match &*place {
            Value::Object(map) => map.keys().cloned().collect(),
            _ => Vec::new(),
        };
        place = place
            .get_mut(name)
            .ok_or_else(|| format!("{name} is none of {}", fields.join(", ")))?;
    }
    if field == "profile" {
        return Err("the profile of a file is its `base`".to_owned());
    }
    *place = value.clone();
    *config = serde_json::from_value(whole).map_err(|e| e.to_string())?;
    Ok(())
}

/// The values of one seed, and what was drawn or taken for each key that was asked for.
#[derive(Debug, Default)]
pub struct Knobs {
    values: BTreeMap<String, Value>,
    drawn: RefCell<BTreeMap<String, Value>>,
}

impl Knobs {
    fn note(&self, key: &str, value: impl Into<Value>) {
        self.drawn.borrow_mut().insert(key.to_owned(), value.into());
    }

    /// A chance in thousandths.
    pub(super) fn chance(&self, key: &'static str, drawn: u64) -> u64 {
        let given = self.values.get(key).and_then(Value::as_f64);
        let chance = given.map_or(drawn, |share| (share * 1000.0).round() as u64);
        self.note(key, chance as f64 / 1000.0);
        chance
    }

    /// A number.
    pub(super) fn count(&self, key: &'static str, drawn: u64) -> u64 {
        let count = self.given(key).unwrap_or(drawn);
        self.note(key, count);
        count
    }

    /// A number that is only there if it was given.
    pub(super) fn given(&self, key: &str) -> Option<u64> {
        let given = self.values.get(key).and_then(Value::as_u64);
        if let Some(count) = given {
            self.note(key, count);
        }
        given
    }

    /// Yes or no.
    pub(super) fn flag(&self, key: &'static str, drawn: bool) -> bool {
        let given = self.values.get(key).and_then(Value::as_bool);
        self.note(key, given.unwrap_or(drawn));
        given.unwrap_or(drawn)
    }

    /// One of some values that can be written down.
    pub(super) fn name<T>(&self, key: &'static str, drawn: T) -> T
    where
        T: serde::Serialize + serde::de::DeserializeOwned,
    {
        let given = self.values.get(key).cloned();
        let value = given.and_then(|value| serde_json::from_value(value).ok());
        let value = value.unwrap_or(drawn);
        self.note(key, serde_json::to_value(&value).unwrap_or_default());
        value
    }

    /// The weights of operations with these names.
    pub(super) fn weights(&self, names: &[&str], weights: &mut [u32]) {
        for (name, weight) in names.iter().zip(weights.iter_mut()) {
            let given = self.values.get(&format!("ops.{name}"));
            if let Some(given) = given.and_then(Value::as_u64) {
                *weight = given as u32;
            }
        }
        let drawn = names.iter().zip(weights.iter());
        let drawn = drawn.filter(|(_, weight)| **weight > 0);
        let mut noted = self.drawn.borrow_mut();
        let all = noted.entry("ops".to_owned());
        let all = all.or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(all) = all {
            all.extend(drawn.map(|(name, weight)| ((*name).to_owned(), Value::from(*weight))));
        }
    }

    /// Replaces what was drawn for the whole world.
    pub(super) fn config(&self, config: &mut Config) {
        for (key, value) in &self.values {
            if let Some(field) = key.strip_prefix("config.") {
                // They were looked at when they came.
                let set = set_in_config(config, field, value);
                set.expect("a value that was checked");
            }
        }
    }

    /// What was drawn, and in capitals what was given, a line for each group of keys.
    pub fn header(&self) -> String {
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (key, value) in self.drawn.borrow().iter() {
            let (group, name) = key.split_once('.').unwrap_or((key, ""));
            let mark = if self.values.contains_key(key) {
                " (given)"
            } else {
                ""
            };
            let text = match value {
                Value::Object(map) => {
                    let all = map.iter().map(|(name, value)| format!("{name} {value}"));
                    all.collect::<Vec<_>>().join(", ")
                }
                value => format!("{name} {value}{mark}"),
            };
            groups.entry(group.to_owned()).or_default().push(text);
        }
        let lines = groups.iter();
        let lines: Vec<String> = lines
            .map(|(group, values)| format!("drawn {group}: {}", values.join(", ")))
            .collect();
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;

    #[test]
    fn what_nobody_wants_otherwise_is_as_drawn() {
        for seed in 0..200 {
            for profile in [None, Some(Profile::Cluster), Some(Profile::Clock)] {
                let (plan, _) = Plan::tuned(seed, &Tuning::of(profile), false);
                assert_eq!(plan, Plan::from_seed(seed, profile));
                let (plan, _) = Plan::tuned(seed, &Tuning::of(profile), true);
                assert_eq!(plan, Plan::stressed(seed, profile));
            }
        }
    }

    /// Every built-in profile can be read, and draws other plans than its base.
    #[test]
    fn built_in_profiles_are_no_other_names() {
        for (name, _) in BUILT_IN {
            let tuning = Tuning::load(name).unwrap();
            let others = (0..20).filter(|seed| {
                Plan::tuned(*seed, &tuning, false).0 != Plan::from_seed(*seed, tuning.profile)
            });
            assert_eq!(others.count(), 20, "{name}");
        }
        for name in names() {
            Tuning::load(&name).unwrap();
        }
        let elections = Tuning::load("elections").unwrap();
        let nodes = |seed| {
            Plan::tuned(seed, &elections, false)
                .0
                .cluster
                .unwrap()
                .nodes
                .len()
        };
        let drawn: std::collections::BTreeSet<usize> = (0..40).map(nodes).collect();
        assert_eq!(drawn, std::collections::BTreeSet::from([3, 4, 5]));
        let crash = Tuning::load("crash").unwrap();
        for seed in 0..40 {
            let plan = Plan::tuned(seed, &crash, false).0;
            assert!(plan.lives.len() >= 3);
            assert!(plan.lives.iter().all(|life| life.faults.is_empty()
                && matches!(
                    life.end,
                    crate::plan::End::Kill(_) | crate::plan::End::PowerLoss(..)
                )));
        }
    }

    #[test]
    fn single_values_replace_what_was_drawn() {
        let mut tuning = Tuning::of(Some(Profile::Default));
        for text in [
            "ends.kill=1",
            "ends.clean_last=0",
            "ends.force=0",
            "workload.tasks=7",
            "config.stress.slow_by=77",
            "config.yield_permille=900",
            "ops.fiemap=0",
        ] {
            tuning.set(text).unwrap();
        }
        for stress in [false, true] {
            let (plan, knobs) = Plan::tuned(5, &tuning, stress);
            // Bursts of stressed worlds have ends of their own.
            let killed =
                |life: &crate::plan::LifePlan| matches!(life.end, crate::plan::End::Kill(_));
            assert!(stress || plan.lives.iter().all(killed));
            assert_eq!(plan.config.stress.slow_by, 77);
            assert_eq!(plan.config.yield_permille, 900);
            let header = knobs.header();
            assert!(
                header.contains("tasks 7 (given)") && header.contains("drawn ends"),
                "{header}"
            );
            assert!(!header.contains("fiemap"), "{header}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let mut tuning = Tuning::default();
        for (text, says) in [
            ("cluster.cats=1", "cluster.cats: there is no such key"),
            (
                "cluster.cuts=1.5",
                "cluster.cuts: 1.5 is not a number from 0 to 0.9",
            ),
            ("cluster.agents=Kind", "is not one of Prompt"),
            ("ops.fly=3", "operations are lookup"),
            ("config.names=many", "config.names"),
            ("config.stress.fast=1", "fast is none of"),
            ("config.profile=Full", "base"),
            ("workload.lives", "is not KEY=VALUE"),
        ] {
            let error = tuning.set(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        assert_eq!(tuning, Tuning::default());
        let dir = tempfile::tempdir().unwrap();
        let load = |name: &str, text: &str| {
            let file = dir.path().join(name);
            std::fs::write(&file, text).unwrap();
            Tuning::load(file.to_str().unwrap())
        };
        let well = load(
            "own.toml",
            "base = \"cluster\"\n[cluster]\nnodes = [3, 5]\n",
        )
        .unwrap();
        assert_eq!(
            well,
            load(
                "own.json",
                r#"{"base": "cluster", "cluster": {"nodes": [3, 5]}}"#
            )
            .unwrap()
        );
        for (name, text, says) in [
            (
                "bad.toml",
                "[cluster]\nnodes = 30\n",
                "cluster.nodes: 30 is not a whole number",
            ),
            (
                "bad.json",
                r#"{"base": "nothing"}"#,
                "base: \"nothing\" is none of default",
            ),
            ("bad.toml", "nodes", "bad.toml: "),
        ] {
            let error = load(name, text).unwrap_err();
            assert!(error.contains(name) && error.contains(says), "{error}");
        }
        assert!(
            Tuning::load("none")
                .unwrap_err()
                .contains("profiles are default")
        );
        assert!(
            Tuning::load("none.toml")
                .unwrap_err()
                .starts_with("none.toml: ")
        );
    }
}

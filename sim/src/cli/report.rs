//! What CI systems read: shards of a sweep, JUnit files, annotations.
//!
//! What can go wrong: shards that leave a seed out. Seed number `n` of a sweep (from
//! 0) belongs to shard `n % N + 1` of `N`, whatever the number of seeds.

use outrider_sim::case::signature;
use outrider_sim::world::Outcome;
use std::fmt::Write as _;

/// One part of a sweep that is spread over several machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which, from 0.
    index: u64,
    /// Of how many.
    count: u64,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Shard = Shard { index: 0, count: 1 };

    /// `K/N`, K from 1.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not K/N with K from 1 to N");
        let (index, count) = text.split_once('/').ok_or_else(wrong)?;
        let index: u64 = index.trim().parse().map_err(|_| wrong())?;
        let count: u64 = count.trim().parse().map_err(|_| wrong())?;
        if index == 0 || index > count {
            return Err(wrong());
        }
        Ok(Self {
            index: index - 1,
            count,
        })
    }

    /// The shard that a batch system gives this job: GitLab's `parallel`, a Slurm job
    /// array, an indexed Kubernetes job (whose manifest sets `JOB_COMPLETIONS`).
    ///
    /// # Errors
    /// If its variables are no numbers, or do not fit each other.
    pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, String> {
        let number = |name: &str| -> Result<Option<u64>, String> {
            let parse = |text: String| text.parse().map_err(|_| format!("{name}={text}"));
            get(name).map(parse).transpose()
        };
        let systems = [
            ("CI_NODE_INDEX", "CI_NODE_TOTAL", Some(1)),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", None),
            ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", Some(0)),
        ];
        for (index, count, first) in systems {
            let (Some(at), Some(count)) = (number(index)?, number(count)?) else {
                continue;
            };
            let first = match first {
                Some(first) => first,
                None => number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0),
            };
            let at = at.checked_sub(first).filter(|at| *at < count);
            let index = at.ok_or_else(|| format!("{index} is not one of {count}"))?;
            return Ok(Some(Self { index, count }));
        }
        Ok(None)
    }

    /// How many of the first `seeds` seeds are its own.
    pub fn len(self, seeds: u64) -> u64 {
        seeds.saturating_sub(self.index).div_ceil(self.count)
    }

    /// Its n-th seed, counted from the first of the sweep.
    pub fn nth(self, n: u64) -> u64 {
        n * self.count + self.index
    }
}

/// Text for XML, without what XML cannot have.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A JUnit file: a test case for each failing seed, and one for those that pass.
pub fn junit(outcomes: &[&Outcome], seconds: f64, replay: impl Fn(u64) -> String) -> String {
    let failed: Vec<&&Outcome> = outcomes.iter().filter(|o| o.failure.is_some()).collect();
    let passed = outcomes.len() - failed.len();
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <testsuite name=\"outrider-sim sweep\" tests=\"{}\" failures=\"{}\" time=\"{seconds:.3}\">\n\
         <testcase classname=\"outrider-sim\" name=\"{passed} seeds without a failure\"/>\n",
        failed.len() + 1,
        failed.len()
    );
    for outcome in failed {
        let Some(failure) = &outcome.failure else {
            continue;
        };
        let _ = writeln!(
            out,
            "<testcase classname=\"outrider-sim\" name=\"seed {}\"><failure type=\"{}\" message=\"{}\">{}\n{}</failure></testcase>",
            outcome.seed,
            escaped(failure.kind),
            escaped(&signature(failure)),
            escaped(&failure.text),
            escaped(&replay(outcome.seed))
        );
    }
    out.push_str("</testsuite>\n");
    out
}

/// A line that GitHub shows as an annotation of the run.
pub fn annotation(outcome: &Outcome, replay: &str) -> Option<String> {
    let failure = outcome.failure.as_ref()?;
    let clip = |text: &str| text.chars().take(2000).collect::<String>();
    let data = |text: &str| {
        let text = text.replace('%', "%25").replace('\r', "%0D");
        text.replace('\n', "%0A")
    };
    let title = format!("seed {}: {}", outcome.seed, signature(failure));
    let title = data(&title).replace(':', "%3A").replace(',', "%2C");
    let text = data(&format!("{}\n{replay}", clip(&failure.text)));
    Some(format!("::error title={title}::{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_sim::oracle::Violation;

    #[test]
    fn every_seed_is_in_one_shard() {
        for seeds in [0, 1, 5, 100, 101] {
            for count in 1..8 {
                let mut all: Vec<u64> = (1..=count)
                    .map(|k| Shard::parse(&format!("{k}/{count}")).unwrap())
                    .flat_map(|shard| (0..shard.len(seeds)).map(move |n| shard.nth(n)))
                    .collect();
                all.sort_unstable();
                assert_eq!(all, (0..seeds).collect::<Vec<u64>>());
            }
        }
        for wrong in ["", "0/3", "4/3", "a/3", "1", "1/0"] {
            assert!(Shard::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn batch_systems_say_which_shard_it_is() {
        let of = |vars: &[(&str, &str)]| {
            Shard::from_environment(|name| {
                let found = vars.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let second = Some(Shard { index: 1, count: 4 });
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(
            of(&[("CI_NODE_INDEX", "2"), ("CI_NODE_TOTAL", "4")]),
            Ok(second)
        );
        let slurm = [
            ("SLURM_ARRAY_TASK_ID", "11"),
            ("SLURM_ARRAY_TASK_MIN", "10"),
            ("SLURM_ARRAY_TASK_COUNT", "4"),
        ];
        assert_eq!(of(&slurm), Ok(second));
        let kubernetes = [("JOB_COMPLETION_INDEX", "1"), ("JOB_COMPLETIONS", "4")];
        assert_eq!(of(&kubernetes), Ok(second));
        assert_eq!(of(&[("JOB_COMPLETION_INDEX", "1")]), Ok(None));
        assert!(of(&[("CI_NODE_INDEX", "5"), ("CI_NODE_TOTAL", "4")]).is_err());
        assert!(of(&[("CI_NODE_INDEX", "x"), ("CI_NODE_TOTAL", "4")]).is_err());
    }

    #[test]
    fn reports_are_well_formed_whatever_the_failure_says() {
        let outcome = Outcome {
            seed: 7,
            failure: Some(Violation {
                kind: "answers",
                text: "a <b> & \"c\"\u{1}\n50%: d, e".to_owned(),
            }),
            ..Outcome::default()
        };
        let passed = Outcome::default();
        let xml = junit(&[&passed, &outcome], 1.5, |seed| format!("replay {seed}"));
        assert!(xml.contains("tests=\"2\" failures=\"1\""));
        assert!(xml.contains("a &lt;b&gt; &amp; &quot;c&quot;\u{fffd}\n50%: d, e\nreplay 7"));
        let line = annotation(&outcome, "replay 7").unwrap();
        assert_eq!(line.lines().count(), 1);
        assert!(
            line.starts_with("::error title=seed 7%3A answers::a <b>"),
            "{line}"
        );
        assert!(line.ends_with("%0A50%25: d, e%0Areplay 7"), "{line}");
        assert_eq!(annotation(&passed, ""), None);
    }
}

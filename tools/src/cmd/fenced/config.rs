//! The configuration file of the original's fence daemon: shell assignments of
//! SCOUTFS_FENCED_DELAY, SCOUTFS_FENCED_RUN and SCOUTFS_FENCED_RUN_ARGS (spec 09
//! section 9.1).
//!
//! What can go wrong: a file that only a shell understands. What is more than a plain
//! assignment is refused by its line, not guessed at.

use std::path::PathBuf;
use std::time::Duration;

/// Where the file is, unless `SCOUTFS_FENCED_CONFIG_FILE` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/scoutfs/scoutfs-fenced.conf";

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Pause between two looks.
    pub delay: Option<Duration>,
    /// Program that fences.
    pub run: Option<PathBuf>,
    /// Its arguments.
    pub args: Vec<String>,
}

impl Config {
    /// Reads assignments, one a line; `#` starts a comment, other names are ignored.
    ///
    /// # Errors
    /// The first line that is no plain assignment, or a value that makes no sense.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut config = Self::default();
        for (number, line) in text.lines().enumerate() {
            let wrong = |why: &str| format!("line {}: {why}: {line:?}", number + 1);
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let line = line.strip_prefix("export ").unwrap_or(line);
            let (name, value) = line
                .split_once('=')
                .ok_or_else(|| wrong("is no assignment"))?;
            let value = unquote(value).map_err(wrong)?;
            match name.trim_end() {
                "SCOUTFS_FENCED_DELAY" => {
                    let seconds: u64 = value
                        .parse()
                        .map_err(|_| wrong("the delay is no number of seconds"))?;
                    config.delay = Some(Duration::from_secs(seconds));
                }
                "SCOUTFS_FENCED_RUN" => {
                    config.run = (!value.is_empty()).then(|| PathBuf::from(value));
                }
                "SCOUTFS_FENCED_RUN_ARGS" => {
                    config.args = value.split_whitespace().map(str::to_owned).collect();
                }
                other if other.contains(char::is_whitespace) => {
                    return Err(wrong("is no plain assignment"));
                }
                _ => {}
            }
        }
        Ok(config)
    }
}

/// The value of a shell word in single, double or no quotes, a comment after it aside.
fn unquote(value: &str) -> Result<String, &'static str> {
    let after = |rest: &str| {
        let rest = rest.trim();
        rest.is_empty() || rest.starts_with('#')
    };
    if let Some(rest) = value.strip_prefix('\'') {
        let (inner, rest) = rest.split_once('\'').ok_or("a quote is not closed")?;
        return match after(rest) {
            true => Ok(inner.to_owned()),
            false => Err("something follows the quotes"),
        };
    }
    if let Some(rest) = value.strip_prefix('"') {
        let (inner, rest) = rest.split_once('"').ok_or("a quote is not closed")?;
        if inner.contains(['$', '`', '\\']) {
            return Err("only plain values are understood, no expansions");
        }
        return match after(rest) {
            true => Ok(inner.to_owned()),
            false => Err("something follows the quotes"),
        };
    }
    let (word, rest) = match value.find(char::is_whitespace) {
        Some(end) => value.split_at(end),
        None => (value, ""),
    };
    if word.contains(['$', '`', '\\', '\'', '"', ';', '&', '|', '(', ')', '<', '>']) {
        return Err("only plain values are understood, no expansions");
    }
    match after(rest) {
        true => Ok(word.to_owned()),
        false => Err("something follows the value"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_original_are_read() {
        let text = "# fencing\nSCOUTFS_FENCED_DELAY=1\n\n\
                    export SCOUTFS_FENCED_RUN=\"/usr/libexec/fence-it\" # ours\n\
                    SCOUTFS_FENCED_RUN_ARGS='--fast  -x y'\nOTHER=thing\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.delay, Some(Duration::from_secs(1)));
        assert_eq!(config.run, Some(PathBuf::from("/usr/libexec/fence-it")));
        assert_eq!(config.args, ["--fast", "-x", "y"]);
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn what_only_a_shell_understands_is_refused_by_its_line() {
        for text in [
            "SCOUTFS_FENCED_RUN=$HOME/agent",
            "SCOUTFS_FENCED_RUN=\"`which agent`\"",
            "SCOUTFS_FENCED_RUN='open",
            "SCOUTFS_FENCED_DELAY=soon",
            "SCOUTFS_FENCED_RUN=a b",
            "if true; then",
            "source /etc/other",
        ] {
            let error = Config::parse(&format!("\n{text}\n")).unwrap_err();
            assert!(error.starts_with("line 2: "), "{text}: {error}");
        }
    }
}

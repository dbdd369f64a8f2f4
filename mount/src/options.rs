//! Mount options (spec 17 section 2): comma separated, unknown or malformed ones
//! are refused by name.

use outrider_core::env::Duration;
use outrider_core::fs::AtimePolicy;
use outrider_core::node::NodeConfig;
use outrider_core::server::FenceAgent;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;

/// An option that was refused (EINVAL).
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OptionError {
    /// Nobody knows it.
    #[error("unknown mount option {0:?}")]
    Unknown(String),
    /// It needs a value, or may not have one.
    #[error("mount option {0:?}: {1}")]
    Value(String, String),
    /// It may be given once.
    #[error("mount option {0:?} is given twice")]
    Twice(&'static str),
    /// It must be given.
    #[error("mount option metadev_path=DEVICE is missing")]
    NoMetadev,
}

/// Who fences, on the operator's choice. Requests are shown in the runtime directory
/// in any case, and an agent outside may answer them first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FenceChoice {
    /// Kill and proof by this host's records; for mounts that are not on record here
    /// the agent outside is waited for.
    #[default]
    Local,
    /// Only the agent outside, as with the original.
    Agent,
    /// The operator's word.
    AssumeDead,
}

/// Who ends a mount that does not show that it may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchdogChoice {
    /// A process beside it.
    Helper,
    /// The machine's watchdog.
    Device(PathBuf),
}

/// All options of one mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// `metadev_path`.
    pub metadev_path: PathBuf,
    /// `quorum_slot_nr`; without it the mount is a plain client.
    pub quorum_slot: Option<usize>,
    /// `acl` or `noacl`.
    pub acl: bool,
    /// `data_prealloc_blocks`.
    pub data_prealloc_blocks: u64,
    /// `data_prealloc_contig_only`.
    pub data_prealloc_contig_only: bool,
    /// `ino_alloc_per_lock`.
    pub ino_alloc_per_lock: u64,
    /// `lock_idle_count`.
    pub lock_idle_count: usize,
    /// `log_merge_wait_timeout_ms`.
    pub log_merge_wait: Duration,
    /// `orphan_scan_delay_ms`.
    pub orphan_scan_delay: Duration,
    /// `quorum_heartbeat_timeout_ms`.
    pub heartbeat_timeout: Duration,
    /// `tcp_keepalive_timeout_ms`.
    pub keepalive: Duration,
    /// `fence=local`, `fence=agent` or `fence=assume-dead`; ours.
    pub fence: FenceChoice,
    /// `scsi_pr`: register the rid as key of persistent reservations; ours.
    pub scsi_pr: bool,
    /// `run_dir`: where the runtime directory is made; ours.
    pub run_dir: Option<PathBuf>,
    /// `watchdog`: ours.
    pub watchdog: Option<WatchdogChoice>,
    /// `watchdog_timeout_ms`; ours. Three quarters of the heartbeat timeout by default.
    pub watchdog_timeout: Option<Duration>,
    /// `out_of_touch_timeout_ms`: how long without a server until this mount gives up;
    /// `None`, written as 0, waits for ever. Ours.
    pub out_of_touch: Option<Duration>,
    /// `cluster_key`: file of the volume's key; ours.
    pub cluster_key: Option<PathBuf>,
    /// `birth_time`: statx(2) tells it, for one more request per cold stat; ours.
    pub birth_time: bool,
    /// `ro`.
    pub read_only: bool,
    /// `allow_other`: other users than the daemon's may use the mount.
    pub allow_other: bool,
    /// `suid`, `dev`, `exec` and their opposites, `noatime` and such: for mount(2).
    pub flags: Vec<String>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            metadev_path: PathBuf::new(),
            quorum_slot: None,
            acl: true,
            data_prealloc_blocks: 2048,
            data_prealloc_contig_only: true,
            ino_alloc_per_lock: 1024,
            lock_idle_count: 10_000,
            log_merge_wait: Duration::from_millis(500),
            orphan_scan_delay: Duration::from_millis(10_000),
            heartbeat_timeout: Duration::from_millis(10_000),
            keepalive: Duration::from_millis(24_000),
            fence: FenceChoice::Local,
            scsi_pr: false,
            run_dir: None,
            watchdog: None,
            watchdog_timeout: None,
            out_of_touch: Some(Duration::from_secs(300)),
            cluster_key: None,
            birth_time: false,
            read_only: false,
            allow_other: false,
            flags: Vec::new(),
        }
    }
}

/// Range of `quorum_heartbeat_timeout_ms`.
const HEARTBEAT_MS: (u64, u64) = (2000, 60_000);

/// Options that go to mount(2) or mean nothing to a daemon.
const PASSED: [&str; 20] = [
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "sync",
    "async",
    "dirsync",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
];

impl MountOptions {
    /// Parses the argument of `-o`.
    ///
    /// # Errors
    /// The first option that is unknown, malformed or out of range.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut options = Self::default();
        let mut scan_seen = false;
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (part, None),
            };
            options.set(name, value, &mut scan_seen)?;
        }
        if options.metadev_path.as_os_str().is_empty() {
            return Err(OptionError::NoMetadev);
        }
        if options.watchdog_time() >= options.heartbeat_timeout {
            return Err(OptionError::Value(
                "watchdog_timeout_ms".into(),
                "must be below quorum_heartbeat_timeout_ms, or it comes too late".into(),
            ));
        }
        Ok(options)
    }

    fn set(
        &mut self,
        name: &str,
        value: Option<&str>,
        scan_seen: &mut bool,
    ) -> Result<(), OptionError> {
        let ms = |low, high| number(name, value, low, high).map(Duration::from_millis);
        match (name, value) {
            ("metadev_path", Some(path)) if !path.is_empty() => {
                self.metadev_path = PathBuf::from(path);
            }
            ("run_dir", Some(path)) if path.starts_with('/') => {
                self.run_dir = Some(PathBuf::from(path));
            }
            ("run_dir", _) => {
                return Err(OptionError::Value(name.into(), "is a full path".into()));
            }
            ("quorum_slot_nr", _) => {
                if self.quorum_slot.is_some() {
                    return Err(OptionError::Twice("quorum_slot_nr"));
                }
                self.quorum_slot = Some(number(name, value, 0, 14)? as usize);
            }
            ("acl", None) => self.acl = true,
            ("noacl", None) => self.acl = false,
            ("data_prealloc_blocks", _) => {
                self.data_prealloc_blocks = number(name, value, 1, (1 << 52) - 1)?;
            }
            ("data_prealloc_contig_only", _) => {
                self.data_prealloc_contig_only = number(name, value, 0, 1)? == 1;
            }
            ("ino_alloc_per_lock", _) => {
                self.ino_alloc_per_lock = number(name, value, 1, 1024)?;
            }
            ("lock_idle_count", _) => {
                self.lock_idle_count = number(name, value, 32, 100_000)? as usize;
            }
            ("log_merge_wait_timeout_ms", _) => self.log_merge_wait = ms(100, 60_000)?,
            ("orphan_scan_delay_ms", _) => {
                if std::mem::replace(scan_seen, true) {
                    return Err(OptionError::Twice("orphan_scan_delay_ms"));
                }
                self.orphan_scan_delay = ms(100, 60_000)?;
            }
            ("quorum_heartbeat_timeout_ms", _) => {
                let (low, high) = HEARTBEAT_MS;
                self.heartbeat_timeout = ms(low, high)?;
            }
            ("out_of_touch_timeout_ms", Some("0")) => self.out_of_touch = None,
            ("out_of_touch_timeout_ms", _) => {
                self.out_of_touch = Some(ms(10_000, u64::from(u32::MAX))?);
            }
            ("tcp_keepalive_timeout_ms", _) => self.keepalive = ms(3001, u64::from(u32::MAX))?,
            ("fence", Some("local")) => self.fence = FenceChoice::Local,
            ("fence", Some("agent")) => self.fence = FenceChoice::Agent,
            ("fence", Some("assume-dead")) => self.fence = FenceChoice::AssumeDead,
            ("fence", _) => {
                return Err(OptionError::Value(
                    name.into(),
                    "is local, agent or assume-dead".into(),
                ));
            }
            ("cluster_key", Some(path)) if !path.is_empty() => {
                self.cluster_key = Some(PathBuf::from(path));
            }
            ("cluster_key", _) => {
                return Err(OptionError::Value(name.into(), "needs a file".into()));
            }
            ("watchdog", Some("helper")) => self.watchdog = Some(WatchdogChoice::Helper),
            ("watchdog", Some(path)) if path.starts_with('/') => {
                self.watchdog = Some(WatchdogChoice::Device(PathBuf::from(path)));
            }
            ("watchdog", _) => {
                return Err(OptionError::Value(
                    name.into(),
                    "is helper or the full path of a watchdog device".into(),
                ));
            }
            ("watchdog_timeout_ms", _) => {
                self.watchdog_timeout = Some(ms(1000, HEARTBEAT_MS.1)?);
            }
            ("scsi_pr", None) => self.scsi_pr = true,
            ("birth_time", None) => self.birth_time = true,
            ("ro", None) => self.read_only = true,
            ("rw" | "defaults", None) => {}
            ("allow_other", None) => self.allow_other = true,
            (flag, None) if PASSED.contains(&flag) => self.flags.push(flag.to_owned()),
            ("metadev_path" | "acl" | "noacl", _) => {
                return Err(OptionError::Value(name.into(), "has a wrong value".into()));
            }
            _ => return Err(OptionError::Unknown(name.to_owned())),
        }
        Ok(())
    }

    /// After what time of silence the watchdog ends the mount: before others may declare
    /// it dead.
    pub fn watchdog_time(&self) -> Duration {
        let default = self.heartbeat_timeout * 3 / 4;
        self.watchdog_timeout.unwrap_or(default)
    }

    /// A `quorum_heartbeat_timeout_ms`, as it is written while mounted.
    ///
    /// # Errors
    /// If it is no number, or not allowed.
    pub fn parse_heartbeat(text: &str) -> Result<u64, OptionError> {
        let (low, high) = HEARTBEAT_MS;
        number("quorum_heartbeat_timeout_ms", Some(text), low, high)
    }

    /// How access times move: the last flag about them counts, as in mount(8).
    fn atime(&self) -> AtimePolicy {
        let policy = |flag: &String| match flag.as_str() {
            "noatime" => Some(AtimePolicy::Never),
            "strictatime" | "norelatime" => Some(AtimePolicy::Always),
            "relatime" | "atime" => Some(AtimePolicy::Relative),
            _ => None,
        };
        let last = self.flags.iter().rev().find_map(policy);
        last.unwrap_or_default()
    }

    /// What the mount is told.
    pub fn node_config(&self, fence: Arc<dyn FenceAgent>) -> NodeConfig {
        let mut config = NodeConfig::new(self.quorum_slot, fence);
        config.heartbeat_timeout = self.heartbeat_timeout;
        config.keepalive = self.keepalive;
        config.locks.idle_count = self.lock_idle_count;
        config.fs.acl = self.acl;
        config.fs.atime = self.atime();
        config.fs.inodes_per_lock = self.ino_alloc_per_lock;
        config.fs.orphan_scan_delay = self.orphan_scan_delay;
        config.fs.data.prealloc_blocks = self.data_prealloc_blocks;
        config.fs.data.prealloc_contig_only = self.data_prealloc_contig_only;
        config.server.log_merge_wait_timeout = self.log_merge_wait;
        config.out_of_touch = self.out_of_touch;
        config.server.keepalive_timeout = self.keepalive;
        config
    }
}

/// A number in decimal, 0x hex or 0 octal, within bounds.
fn number(name: &str, value: Option<&str>, low: u64, high: u64) -> Result<u64, OptionError> {
    let wrong = |why: String| OptionError::Value(name.to_owned(), why);
    let text = value.ok_or_else(|| wrong("needs a value".to_owned()))?;
    match parse_number(text) {
        Some(number) if (low..=high).contains(&number) => Ok(number),
        Some(number) => Err(wrong(format!("{number} is not in {low}..={high}"))),
        None => Err(wrong(format!("{text:?} is not a number"))),
    }
}

/// A number in decimal, 0x hex or 0 octal.
pub fn parse_number(text: &str) -> Option<u64> {
    let parsed = if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        u64::from_str_radix(hex, 16)
    } else if text.len() > 1 && text.starts_with('0') {
        u64::from_str_radix(&text[1..], 8)
    } else {
        text.parse()
    };
    parsed.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_original_are_taken() {
        let text = "metadev_path=/dev/x,quorum_slot_nr=0,,noacl,data_prealloc_blocks=0x10,\
                    ino_alloc_per_lock=010,quorum_heartbeat_timeout_ms=3000,nosuid";
        let options = MountOptions::parse(text).unwrap();
        assert_eq!(options.quorum_slot, Some(0));
        assert!(!options.acl);
        assert_eq!(
            (options.data_prealloc_blocks, options.ino_alloc_per_lock),
            (16, 8)
        );
        assert_eq!(options.heartbeat_timeout, Duration::from_millis(3000));
        assert_eq!(options.flags, ["nosuid"]);
    }

    #[test]
    fn wrong_ones_are_refused_by_name() {
        for (text, named) in [
            ("quorum_slot_nr=0", "metadev_path"),
            ("metadev_path=x,nonsense", "nonsense"),
            ("metadev_path=x,quorum_slot_nr=15", "quorum_slot_nr"),
            (
                "metadev_path=x,quorum_slot_nr=1,quorum_slot_nr=1",
                "quorum_slot_nr",
            ),
            (
                "metadev_path=x,tcp_keepalive_timeout_ms=3000",
                "tcp_keepalive_timeout_ms",
            ),
            (
                "metadev_path=x,data_prealloc_blocks=0",
                "data_prealloc_blocks",
            ),
            ("metadev_path=x,data_prealloc_blocks=ten", "ten"),
            ("metadev_path=x,acl=1", "acl"),
            ("metadev_path=x,fence=maybe", "fence"),
            ("metadev_path=x,run_dir=here", "run_dir"),
            ("metadev_path=x,cluster_key", "cluster_key"),
            ("metadev_path=x,watchdog", "watchdog"),
            ("metadev_path=x,watchdog=dog", "watchdog"),
            (
                "metadev_path=x,watchdog_timeout_ms=10",
                "watchdog_timeout_ms",
            ),
            (
                "metadev_path=x,quorum_heartbeat_timeout_ms=3000,watchdog=helper,watchdog_timeout_ms=3000",
                "watchdog_timeout_ms",
            ),
        ] {
            let error = MountOptions::parse(text).unwrap_err();
            assert!(error.to_string().contains(named), "{text}: {error}");
        }
    }
}

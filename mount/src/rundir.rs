//! The runtime directory of a mount: what the original shows in sysfs, under the same
//! names with the same contents (spec 17 section 5), in plain files, since a FUSE
//! daemon has no sysfs.
//!
//! ```text
//! BASE/f.FFFFFF.r.RRRRRR/        top 24 bits of fsid and rid; BASE is /run/outrider
//!   fsid rid format_version data_device_maj_min
//!   mount_options/NAME           quorum_heartbeat_timeout_ms may be written
//!   quorum/is_leader quorum/status              members only
//!   fence/RID/...                one per pending fence request, on the leader
//!   volume_options/data_alloc_zone_blocks       may be written; an empty line clears
//!   counters/NAME
//!   client_locks                 in debugfs with the original
//!   mountpoint pid status.json   ours; the last is what `outrider status` reads
//! ```
//!
//! Files are replaced whole, so a reader never sees half of one.
//!
//! What can go wrong: directories of mounts that were killed stay behind. Each holds a
//! lock while its mount lives; a new mount removes those whose lock is free.

mod writer;

use crate::options::{MountOptions, parse_number};
use outrider_core::env::{Duration, Time};
use outrider_core::format::QuorumEventKind;
use outrider_core::quorum::{AgentStatus, Role};
use outrider_disk::lock::try_lock_file;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use writer::Writer;

/// The volume option that there is.
const ZONE_BLOCKS: &str = "volume_options/data_alloc_zone_blocks";

/// The option that may be changed while mounted.
const HEARTBEAT: &str = "mount_options/quorum_heartbeat_timeout_ms";

/// The default base: `OUTRIDER_RUN_DIR`, or `/run/outrider` for root, or `outrider`
/// under the user's runtime directory, or a directory of the user's own under the
/// temporary one.
pub fn default_base() -> PathBuf {
    if let Some(dir) = std::env::var_os("OUTRIDER_RUN_DIR") {
        return PathBuf::from(dir);
    }
    let user = rustix::process::getuid();
    let own = || std::env::temp_dir().join(format!("outrider-{}", user.as_raw()));
    let run = Path::new("/run");
    match std::env::var_os("XDG_RUNTIME_DIR") {
        _ if user.is_root() && rustix::fs::access(run, rustix::fs::Access::WRITE_OK).is_ok() => {
            run.join("outrider")
        }
        Some(dir) => PathBuf::from(dir).join("outrider"),
        None => own(),
    }
}

/// The name of a mount's directory, as the original's.
pub fn dir_name(fsid: u64, rid: u64) -> String {
    format!("f.{:06x}.r.{:06x}", fsid >> 40, rid >> 40)
}

/// What does not change while mounted.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The volume.
    pub fsid: u64,
    /// The mount.
    pub rid: u64,
    /// Format version of the volume.
    pub format_version: u64,
    /// Data device.
    pub data: &'a Path,
    /// Where it is mounted.
    pub mountpoint: &'a Path,
    /// Its options.
    pub options: &'a MountOptions,
}

/// A mount's directory; removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held while the mount lives.
    _lock: File,
    /// The option file as it was last written here.
    heartbeat: Option<(Stamp, u64)>,
    /// The volume option's file as it was last written here, and its text.
    zone_blocks: Option<(Stamp, String)>,
    shown: Option<AgentStatus>,
    counters: BTreeMap<String, u64>,
    /// Gone only while the directory is being removed.
    writer: Option<Writer>,
}

/// Tells whether a file was written since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    ino: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    /// Of the file that is there now.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self {
            ino: meta.ino(),
            size: meta.size(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

impl RunDir {
    /// Makes the directory with what does not change.
    ///
    /// # Errors
    /// What the system says; the path is in the text.
    pub fn create(base: &Path, facts: &Facts<'_>) -> io::Result<Self> {
        let named = |path: &Path, e: io::Error| {
            io::Error::new(e.kind(), format!("{}: {e}", path.display()))
        };
        fs::create_dir_all(base).map_err(|e| named(base, e))?;
        sweep(base);
        let path = base.join(dir_name(facts.fsid, facts.rid));
        let made = Self::take(&path).and_then(|lock| Self::fill(&path, lock, facts));
        made.map_err(|e| named(&path, e))
    }

    /// Makes the directory under another name first, so that it never has its name
    /// without its lock held: a mount that starts at the same time would remove it.
    fn take(path: &Path) -> io::Result<File> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let new = path.with_file_name(format!(".{name}.{}", std::process::id()));
        match fs::remove_dir_all(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => fs::create_dir(&new)?,
        }
        let taken = File::create(new.join(".lock")).and_then(|lock| {
            if try_lock_file(&lock)? {
                fs::rename(&new, path).map(|()| lock)
            } else {
                Err(io::Error::other("somebody else has locked it"))
            }
        });
        if taken.is_err() {
            let _ = fs::remove_dir_all(&new);
        }
        taken
    }

    fn fill(path: &Path, lock: File, facts: &Facts<'_>) -> io::Result<Self> {
        let mut dir = Self {
            path: path.to_owned(),
            _lock: lock,
            heartbeat: None,
            zone_blocks: None,
            shown: None,
            counters: BTreeMap::new(),
            writer: Some(Writer::start()?),
        };
        let data = fs::metadata(facts.data)?;
        // Of a plain file there is no device number to tell.
        let rdev = match data.file_type().is_block_device() {
            true => data.rdev(),
            false => 0,
        };
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        dir.write("data_device_maj_min", &format!("{major}:{minor}\n"))?;
        dir.write("format_version", &format!("{}\n", facts.format_version))?;
        dir.write("fsid", &format!("{:016x}\n", facts.fsid))?;
        dir.write("rid", &format!("{:016x}\n", facts.rid))?;
        dir.write("mountpoint", &format!("{}\n", facts.mountpoint.display()))?;
        dir.write("pid", &format!("{}\n", std::process::id()))?;
        fs::create_dir(path.join("counters"))?;
        fs::create_dir(path.join("volume_options"))?;
        dir.show_zone_blocks(None, true)?;
        fs::create_dir(path.join("mount_options"))?;
        for (name, value) in shown_options(facts.options) {
            dir.write(&format!("mount_options/{name}"), &value)?;
        }
        if facts.options.quorum_slot.is_some() {
            fs::create_dir(path.join("quorum"))?;
            fs::create_dir(path.join("fence"))?;
            dir.write("quorum/is_leader", "0")?;
            dir.write("quorum/status", "")?;
        }
        dir.offer_heartbeat(facts.options.heartbeat_timeout.as_millis() as u64)?;
        Ok(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where fence requests appear.
    pub fn fence_dir(&self) -> PathBuf {
        self.path.join("fence")
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        replace(&self.path.join(name), text, 0o444)
    }

    /// Replaces a file, soon, without waiting for it.
    pub fn show(&self, name: &str, text: String) {
        if let Some(writer) = &self.writer {
            writer.write(self.path.join(name), text);
        }
    }

    /// Shows the quorum agent's state, if it is another than was shown.
    pub fn show_quorum(&mut self, status: &AgentStatus, now: Time) {
        if self.shown.as_ref() == Some(status) {
            return;
        }
        let leads = |status: &AgentStatus| status.member.is_leader();
        if self.shown.as_ref().map(leads) != Some(leads(status)) {
            self.show("quorum/is_leader", u8::from(leads(status)).to_string());
        }
        self.show("quorum/status", quorum_status(status, now));
        self.shown = Some(status.clone());
    }

    fn offer_heartbeat(&mut self, ms: u64) -> io::Result<()> {
        let path = self.path.join(HEARTBEAT);
        replace(&path, &ms.to_string(), 0o644)?;
        self.heartbeat = Some((Stamp::of(&path)?, ms));
        Ok(())
    }

    /// The heartbeat timeout in milliseconds that somebody wrote, once. What is not
    /// allowed is logged and taken back.
    pub fn asked_heartbeat(&mut self) -> Option<u64> {
        let path = self.path.join(HEARTBEAT);
        let (stamp, ms) = self.heartbeat?;
        if Stamp::of(&path).ok() == Some(stamp) {
            return None;
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        if text.is_empty() {
            // Truncated; what follows is not written yet.
            return None;
        }
        let asked = MountOptions::parse_heartbeat(text.trim_end_matches('\n'));
        let accepted = asked.as_ref().map_or(ms, |asked| *asked);
        if let Err(error) = &asked {
            tracing::warn!(%error, path = %path.display(), "what was written is refused");
        }
        if let Err(error) = self.offer_heartbeat(accepted) {
            tracing::debug!(%error, "runtime directory");
        }
        asked.ok()
    }
}

impl RunDir {
    /// Shows counters that have changed.
    pub fn show_counters(&mut self, sums: &BTreeMap<String, u64>) {
        for (name, count) in sums {
            if self.counters.get(name) != Some(count) {
                self.show(&format!("counters/{name}"), format!("{count}\n"));
                self.counters.insert(name.clone(), *count);
            }
        }
    }

    /// Shows the volume option in use; with `anew` also if the file says so already,
    /// as after a value that was refused.
    ///
    /// # Errors
    /// What the system says.
    pub fn show_zone_blocks(&mut self, blocks: Option<u64>, anew: bool) -> io::Result<()> {
        let text = blocks.map_or_else(String::new, |blocks| blocks.to_string());
        let path = self.path.join(ZONE_BLOCKS);
        if let Some((stamp, shown)) = &self.zone_blocks
            && !anew
            && (*shown == text || Stamp::of(&path).ok() != Some(*stamp))
        {
            // It is right, or somebody has written it meanwhile: that comes first.
            return Ok(());
        }
        replace(&path, &text, 0o644)?;
        self.zone_blocks = Some((Stamp::of(&path)?, text));
        Ok(())
    }

    /// What somebody wrote to the volume option, once: a number, `None` to clear it, or
    /// an error for what is neither.
    pub fn asked_zone_blocks(&mut self) -> Option<Result<Option<u64>, ()>> {
        let path = self.path.join(ZONE_BLOCKS);
        let (stamp, _) = self.zone_blocks.as_ref()?;
        let found = Stamp::of(&path).ok()?;
        if found == *stamp {
            return None;
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        // Truncated; what follows is not written yet.
        let first = text.chars().next()?;
        self.zone_blocks = Some((found, text.clone()));
        Some(match first {
            '\n' | '\r' => Ok(None),
            _ if text.len() >= 32 => Err(()),
            _ => parse_number(text.trim_end_matches('\n'))
                .map(Some)
                .ok_or(()),
        })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.writer.take();
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Replaces a file whole.
fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.new"));
    fs::write(&new, text)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, path)
}

/// Removes the directories of mounts that are gone.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with("f.") && name.contains(".r.")) {
            continue;
        }
        // Without its lock file it is just being made, or just being removed.
        let Ok(lock) = File::open(entry.path().join(".lock")) else {
            continue;
        };
        if try_lock_file(&lock).unwrap_or(false) {
            tracing::info!(path = %entry.path().display(), "removing what a dead mount left");
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// `mount_options/`: names and contents of spec 17 section 2.
fn shown_options(options: &MountOptions) -> Vec<(&'static str, String)> {
    let ms = |time: Duration| time.as_millis().to_string();
    let slot = options.quorum_slot.map_or(-1, |slot| slot as i64);
    vec![
        (
            "data_prealloc_blocks",
            options.data_prealloc_blocks.to_string(),
        ),
        (
            "data_prealloc_contig_only",
            u8::from(options.data_prealloc_contig_only).to_string(),
        ),
        ("ino_alloc_per_lock", options.ino_alloc_per_lock.to_string()),
        ("lock_idle_count", options.lock_idle_count.to_string()),
        ("log_merge_wait_timeout_ms", ms(options.log_merge_wait)),
        ("metadev_path", options.metadev_path.display().to_string()),
        ("orphan_scan_delay_ms", ms(options.orphan_scan_delay)),
        ("quorum_slot_nr", format!("{slot}\n")),
        ("tcp_keepalive_timeout_ms", ms(options.keepalive)),
    ]
}

/// `quorum/status`: lines of spec 17 section 5.
fn quorum_status(status: &AgentStatus, now: Time) -> String {
    let member = &status.member;
    let (role, role_name) = match member.role {
        Role::Follower => (0, "follower"),
        Role::Candidate => (1, "candidate"),
        Role::Leader => (2, "leader"),
    };
    // The last event of the own server: numbers of the quorum block's events.
    let event = match (member.server_start_term, member.server_fenced) {
        (0, _) => 0,
        (_, false) => QuorumEventKind::Elect as u32,
        (_, true) => QuorumEventKind::Fence as u32,
    };
    let left = member.timeout.since(now);
    format!(
        "quorum_slot_nr {}\nterm {}\nserver_start_term {}\nserver_event {}\nrole {} ({})\n\
         vote_for {}\nvote_bits 0x{:x} (count {})\ntimeout_in_secs {}.{:09}\n",
        member.slot,
        member.term,
        member.server_start_term,
        event,
        role,
        role_name,
        member.vote_for.map_or(-1, |slot| slot as i64),
        member.vote_bits,
        member.vote_bits.count_ones(),
        left.as_secs(),
        left.subsec_nanos(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts<'a>(options: &'a MountOptions, dir: &'a Path) -> Facts<'a> {
        Facts {
            fsid: 0xabcd_ef01_2345_6789,
            rid: 0x1234_5678_9abc_def0,
            format_version: 2,
            data: dir,
            mountpoint: dir,
            options,
        }
    }

    fn member() -> MountOptions {
        MountOptions::parse("metadev_path=/dev/x,quorum_slot_nr=1").unwrap()
    }

    #[test]
    fn the_tree_has_the_names_and_contents_of_the_originals_sysfs() {
        let base = tempfile::tempdir().unwrap();
        let options = member();
        let mut dir = RunDir::create(base.path(), &facts(&options, base.path())).unwrap();
        assert_eq!(dir.path(), base.path().join("f.abcdef.r.123456"));
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("fsid"), "abcdef0123456789\n");
        assert_eq!(read("rid"), "123456789abcdef0\n");
        assert_eq!(read("format_version"), "2\n");
        assert_eq!(read("data_device_maj_min"), "0:0\n");
        assert_eq!(read("quorum/is_leader"), "0");
        assert_eq!(read("mount_options/quorum_slot_nr"), "1\n");
        assert_eq!(read("mount_options/metadev_path"), "/dev/x");
        assert_eq!(read("mount_options/data_prealloc_blocks"), "2048");
        assert_eq!(read(HEARTBEAT), "10000");
        let mut status = AgentStatus::default();
        status.member.role = Role::Leader;
        status.member.term = 9;
        status.member.vote_bits = 5;
        dir.show_quorum(&status, Time(0));
        dir.writer.as_ref().unwrap().settle();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("quorum/is_leader"), "1");
        let shown = read("quorum/status");
        assert!(shown.contains("term 9\n"), "{shown}");
        assert!(shown.contains("role 2 (leader)\n"), "{shown}");
        assert!(shown.contains("vote_bits 0x5 (count 2)\n"), "{shown}");
        let path = dir.path().to_owned();
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn a_written_heartbeat_timeout_is_taken_once_and_a_bad_one_is_taken_back() {
        let base = tempfile::tempdir().unwrap();
        let options = member();
        let mut dir = RunDir::create(base.path(), &facts(&options, base.path())).unwrap();
        let path = dir.path().join(HEARTBEAT);
        assert_eq!(dir.asked_heartbeat(), None);
        fs::write(&path, "3000\n").unwrap();
        assert_eq!(dir.asked_heartbeat(), Some(3000));
        assert_eq!(dir.asked_heartbeat(), None);
        for bad in ["0", "-1", "1000000", "soon"] {
            fs::write(&path, bad).unwrap();
            assert_eq!(dir.asked_heartbeat(), None, "{bad}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "3000", "{bad}");
        }
    }

    #[test]
    fn mounts_that_start_at_the_same_time_do_not_remove_each_others_directories() {
        let base = tempfile::tempdir().unwrap();
        let options = member();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (base, options) = (base.path(), &options);
                scope.spawn(move || {
                    for nr in 1..100 {
                        let own = Facts {
                            rid: (thread * 1000 + nr) << 40,
                            ..facts(options, base)
                        };
                        let dir = RunDir::create(base, &own).unwrap();
                        assert!(dir.path().join("quorum/is_leader").exists());
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_mount_left_is_removed_and_a_live_one_stays() {
        let base = tempfile::tempdir().unwrap();
        let options = member();
        let live = RunDir::create(base.path(), &facts(&options, base.path())).unwrap();
        let dead = base.path().join("f.000000.r.000001");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(".lock"), "").unwrap();
        let other = base.path().join("something");
        fs::create_dir(&other).unwrap();
        let second = Facts {
            rid: 7 << 40,
            ..facts(&options, base.path())
        };
        let _second = RunDir::create(base.path(), &second).unwrap();
        assert!(!dead.exists());
        assert!(other.exists() && live.path().exists());
    }
}

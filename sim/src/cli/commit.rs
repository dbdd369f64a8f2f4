//! The simulator of another commit: checked out beside the work tree, built, and kept.
//!
//! One directory has all of it: `checkout`, a work tree of git's that goes from commit to
//! commit, `target`, where cargo builds (so that the next commit needs little), and the
//! program of each commit under its full hash.
//!
//! What can go wrong: an interrupted run. A program has its name only once it is whole; a
//! checkout that git does not take is made anew; and nobody else works in the directory
//! meanwhile, as a lock is held that ends with its process. Also two settings that would
//! lead cargo elsewhere: `CARGO_TARGET_DIR` and the like do not reach it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The simulator of a commit, whether it has been built or not.
pub struct Build {
    /// The full hash of the commit.
    pub hash: String,
    /// The top of the repository.
    repo: PathBuf,
    /// The directory that has all of it.
    dir: PathBuf,
}

/// As much of a hash as people read.
pub fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// A command of git's in a directory, wherever a hook or the like points it.
fn git(dir: &Path) -> Command {
    let mut command = Command::new("git");
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(name);
    }
    command.arg("-C").arg(dir);
    command
}

/// Why a command could not be started.
fn not_started(name: &str, error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => format!("{name} is not installed, or not in PATH"),
        _ => format!("{name}: {error}"),
    }
}

/// What git says.
fn ask(dir: &Path, args: &[&str]) -> Result<Output, String> {
    let output = git(dir).args(args).output();
    output.map_err(|e| not_started("git", &e))
}

fn first_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.lines().next().unwrap_or_default().to_owned()
}

impl Build {
    /// The build of `commit` in the repository of the directory `repo`, in `dir` or where
    /// builds are usually.
    ///
    /// # Errors
    /// There is no repository, or no such commit.
    pub fn of(commit: &str, repo: &Path, dir: Option<&Path>) -> Result<Self, String> {
        if !repo.is_dir() {
            return Err(format!("{} is no directory", repo.display()));
        }
        let top = ask(repo, &["rev-parse", "--show-toplevel"])?;
        if !top.status.success() {
            return Err(format!(
                "{} is in no work tree of git: {} (--repo DIR names one)",
                repo.display(),
                first_line(&top.stderr)
            ));
        }
        let repo = PathBuf::from(first_line(&top.stdout));
        let name = format!("{commit}^{{commit}}");
        let args = ["rev-parse", "--verify", "--quiet", "--end-of-options"];
        let hash = ask(&repo, &[&args[..], &[&name]].concat())?;
        if !hash.status.success() {
            let repo = repo.display();
            return Err(format!("{repo} knows no commit {commit:?}"));
        }
        let dir = match dir {
            Some(dir) => std::path::absolute(dir).map_err(|e| e.to_string())?,
            None => repo.join("target/outrider-diff"),
        };
        Ok(Self {
            hash: first_line(&hash.stdout),
            repo,
            dir,
        })
    }

    /// The program, built unless it is there.
    ///
    /// # Errors
    /// It cannot be checked out, or cargo cannot build it.
    pub fn program(&self) -> Result<PathBuf, String> {
        let program = self.dir.join(&self.hash);
        if program.exists() {
            return Ok(program);
        }
        let says = |e: std::io::Error| format!("{}: {e}", self.dir.display());
        std::fs::create_dir_all(&self.dir).map_err(says)?;
        let lock = File::create(self.dir.join("lock")).map_err(says)?;
        lock.lock().map_err(says)?;
        if program.exists() {
            return Ok(program); // somebody else was faster
        }
        self.check_out()?;
        let built = self.build()?;
        let new = self.dir.join("new");
        std::fs::copy(&built, &new)
            .and_then(|_| std::fs::rename(&new, &program))
            .map_err(|e| format!("{}: {e}", built.display()))?;
        eprintln!(
            "kept for the next time: {} (to remove all of them: rm -r {}; git worktree prune)",
            program.display(),
            self.dir.display()
        );
        Ok(program)
    }

    /// Brings the checkout to the commit.
    fn check_out(&self) -> Result<(), String> {
        let tree = self.dir.join("checkout");
        eprintln!("commit {}: to {}", short(&self.hash), tree.display());
        if self.is_ours(&tree)? && self.go(&tree)? {
            return Ok(());
        }
        if tree.exists() {
            std::fs::remove_dir_all(&tree).map_err(|e| format!("{}: {e}", tree.display()))?;
        }
        // Twice: it may still be known, and even locked, from a run that was killed.
        let added = git(&self.repo)
            .args(["worktree", "add", "--force", "--force", "--detach"])
            .args([tree.as_os_str(), OsStr::new(&self.hash)])
            .output()
            .map_err(|e| not_started("git", &e))?;
        if !added.status.success() {
            let said = String::from_utf8_lossy(&added.stderr);
            return Err(format!("git worktree add: {}", said.trim()));
        }
        Ok(())
    }

    /// Whether git takes the directory for the top of a work tree of this repository. Half
    /// of one it does not: the work tree around it would be the answer.
    fn is_ours(&self, tree: &Path) -> Result<bool, String> {
        if !tree.is_dir() {
            return Ok(false);
        }
        let same = |one: &Path, other: &Path| {
            let real = |path: &Path| path.canonicalize().ok();
            real(one).is_some() && real(one) == real(other)
        };
        let of = |dir: &Path| -> Result<(PathBuf, PathBuf), String> {
            let top = ask(dir, &["rev-parse", "--show-toplevel"])?;
            let common = ask(dir, &["rev-parse", "--git-common-dir"])?;
            Ok((
                PathBuf::from(first_line(&top.stdout)),
                dir.join(first_line(&common.stdout)),
            ))
        };
        let ((top, common), (_, ours)) = (of(tree)?, of(&self.repo)?);
        Ok(same(&top, tree) && same(&common, &ours))
    }

    /// Goes from one commit to another; whether it did.
    fn go(&self, tree: &Path) -> Result<bool, String> {
        let went = ask(
            tree,
            &["checkout", "--quiet", "--force", "--detach", &self.hash],
        )?;
        let cleaned = ask(tree, &["clean", "-ffdxq"])?;
        Ok(went.status.success() && cleaned.status.success())
    }

    /// Lets cargo build what is checked out.
    fn build(&self) -> Result<PathBuf, String> {
        let target = self.dir.join("target");
        eprintln!("building it in {}", target.display());
        let mut cargo = Command::new("cargo");
        for name in [
            "RUSTFLAGS", // would hide the flags of the commit, without which there is no simulator
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET",
            "CARGO_BUILD_TARGET_DIR",
        ] {
            cargo.env_remove(name);
        }
        let status = cargo
            .current_dir(self.dir.join("checkout"))
            .args(["build", "--release", "--package", "outrider-sim"])
            .args(["--bin", "outrider-sim", "--target-dir"])
            .arg(&target)
            .stdin(std::process::Stdio::null())
            .stdout(std::io::stderr())
            .status()
            .map_err(|e| not_started("cargo", &e))?;
        if !status.success() {
            let hash = short(&self.hash);
            return Err(format!(
                "cargo could not build the simulator of commit {hash} ({status})"
            ));
        }
        Ok(target.join("release/outrider-sim"))
    }
}

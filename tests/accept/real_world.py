#!/usr/bin/env python3
"""Does with a mount of `outrider up` what people do with a filesystem.

usage: real_world.py OUTRIDER_BINARY WORK_DIR [--steps LIST] [--repo DIR]
                     [--sources TARBALL ...] [--crate DIR] [--files N]

  git      clones a repository into the mount, commits, packs, and runs `git fsck`
  build    unpacks source packages (--sources, tarballs with configure and make) in
           the mount, builds them there and runs their own `make check`; with --crate
           builds a copy of a Rust crate and its workspace there as well
  files    copies a tree of N files (20000) by rsync; `sha256sum -c` before and after
           a remount; rsync must then find nothing to do
  sqlite   transactions in rollback and WAL mode, two writers, integrity_check before
           and after a remount

Every step ends with a clean unmount, `outrider check` and a new mount. Prints one
line for each part with its seconds; exits 0 if everything held, 1 at the first thing
that did not.
"""
import argparse
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

PROMPT = "ready: "


class Failed(Exception):
    pass


def run(*args, cwd=None, env=None, quiet=True):
    """Runs a program; its output is shown only if it fails."""
    done = subprocess.run(args, cwd=cwd, env=env, text=True, errors="replace",
                          stdout=subprocess.PIPE if quiet else None,
                          stderr=subprocess.STDOUT if quiet else None)
    if done.returncode != 0:
        tail = "\n".join((done.stdout or "").splitlines()[-30:])
        raise Failed(f"{' '.join(args)} ended with {done.returncode}:\n{tail}")
    return done.stdout


class Mount:
    """`outrider up`, which people are told to use."""

    def __init__(self, binary, work):
        self.binary, self.dir = os.path.abspath(binary), os.path.join(work, "volume")
        self.mnt = os.path.join(self.dir, "mnt/0")
        self.daemon = None

    def start(self):
        self.daemon = subprocess.Popen([self.binary, "up", self.dir], text=True,
                                       stdout=subprocess.PIPE)
        for line in self.daemon.stdout:
            if line.startswith(PROMPT):
                return
        raise Failed(f"`outrider up` ended with {self.daemon.wait()}")

    def stop(self):
        """A clean end, and a look at the devices."""
        self.daemon.send_signal(signal.SIGTERM)
        code = self.daemon.wait(timeout=300)
        self.daemon = None
        if code != 0:
            raise Failed(f"`outrider up` ended with {code}")
        run(self.binary, "check", os.path.join(self.dir, "meta"),
            os.path.join(self.dir, "data"))

    def again(self):
        self.stop()
        self.start()

    def abandon(self):
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            subprocess.run(["umount", "-l", self.mnt], stderr=subprocess.DEVNULL)


class Watch:
    """Prints what a part took."""

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        self.start = time.monotonic()
        return self

    def __exit__(self, kind, *_):
        word = "FAILED" if kind else "ok"
        print(f"{word:7}{time.monotonic() - self.start:8.1f} s  {self.what}", flush=True)


def git(mount, args):
    clone = os.path.join(mount.mnt, "clone")
    ident = ["-c", "user.name=accept", "-c", "user.email=accept@example.org",
             "-c", "core.fsync=all", "-c", "safe.directory=*"]
    with Watch(f"git clone of {os.path.basename(args.repo)}"):
        run("git", "-c", "safe.directory=*", "clone", "--no-hardlinks", "--no-local",
            args.repo, clone)
    with Watch("git fsck and status of the clone"):
        run("git", *ident, "fsck", "--full", "--strict", cwd=clone)
        if run("git", *ident, "status", "--porcelain", cwd=clone):
            raise Failed("the fresh clone differs from its commit")
    with Watch("git: 20 commits, branches, rebase, gc"):
        for nr in range(20):
            with open(os.path.join(clone, "accept.txt"), "a") as f:
                f.write(f"line {nr}\n")
            run("git", *ident, "add", "-A", cwd=clone)
            run("git", *ident, "commit", "-qm", f"commit {nr}", cwd=clone)
        run("git", *ident, "checkout", "-qb", "side", "HEAD~10", cwd=clone)
        with open(os.path.join(clone, "side.txt"), "w") as f:
            f.write("side\n")
        run("git", *ident, "add", "-A", cwd=clone)
        run("git", *ident, "commit", "-qm", "side", cwd=clone)
        run("git", *ident, "rebase", "-q", "@{-1}", cwd=clone)
        run("git", *ident, "gc", "-q", "--aggressive", "--prune=now", cwd=clone)
    with Watch("git fsck after a remount"):
        mount.again()
        run("git", *ident, "fsck", "--full", "--strict", cwd=clone)
        if run("git", *ident, "status", "--porcelain", cwd=clone):
            raise Failed("the work tree differs from its commit")


def build(mount, args):
    for tarball in args.sources:
        name = os.path.basename(tarball)
        where = os.path.join(mount.mnt, "build-" + name)
        os.makedirs(where)
        with Watch(f"unpack {name}"):
            run("tar", "-xf", os.path.abspath(tarball), "--strip-components=1", cwd=where)
        env = dict(os.environ, FORCE_UNSAFE_CONFIGURE="1")
        with Watch(f"configure and make {name}"):
            run("./configure", cwd=where, env=env)
            run("make", "-j2", cwd=where, env=env)
        with Watch(f"make check of {name}"):
            run("make", "check", cwd=where, env=env)
        with Watch(f"make check of {name} after a remount"):
            mount.again()
            run("make", "check", cwd=where, env=env)
    if args.crate:
        crate = os.path.abspath(args.crate)
        name, workspace = os.path.basename(crate), os.path.dirname(crate)
        where = os.path.join(mount.mnt, "workspace")
        with Watch(f"copy the workspace of {name}"):
            ignore = shutil.ignore_patterns("target", ".git", "corpus", "seeds")
            shutil.copytree(workspace, where, symlinks=True, ignore=ignore)
        env = dict(os.environ, CARGO_TARGET_DIR=os.path.join(where, "target"))
        cargo = ["cargo", "build", "--offline"]
        with Watch(f"cargo build of {name} and its dependencies"):
            run(*cargo, cwd=os.path.join(where, name), env=env)
        with Watch("cargo finds nothing to do after a remount"):
            mount.again()
            said = run(*cargo, cwd=os.path.join(where, name), env=env)
            if "Compiling" in said:
                raise Failed(f"cargo built again:\n{said}")
    if not args.sources and not args.crate:
        print("skipped          build: no --sources and no --crate")


def make_tree(top, count):
    """`count` files of many sizes and kinds of names, with links and odd modes."""
    rng = random.Random(20_000)
    sums = []
    for nr in range(count):
        where = os.path.join(top, f"d{nr % 97}", f"e{nr % 13}")
        os.makedirs(where, exist_ok=True)
        size = rng.choice([0, 1, 100, 3000, 4096, 4097, 20_000])
        if nr % 1000 == 0:
            size = 5_000_000
        content = rng.randbytes(size)
        path = os.path.join(where, f"f{nr} \u00e4" if nr % 50 == 0 else f"f{nr}")
        with open(path, "wb") as f:
            f.write(content)
        os.chmod(path, rng.choice([0o644, 0o600, 0o755, 0o444]))
        os.utime(path, ns=(nr * 10**9 + 7, nr * 10**9 + 123_456_789))
        if nr % 100 == 0:
            os.link(path, path + ".hard")
            os.symlink(os.path.basename(path), path + ".soft")
        sums.append((hashlib.sha256(content).hexdigest(), os.path.relpath(path, top)))
    with open(os.path.join(top, "SUMS"), "w") as f:
        f.writelines(f"{digest}  {path}\n" for digest, path in sums)


def files(mount, args):
    source, copy = os.path.join(args.work, "source"), os.path.join(mount.mnt, "copy")
    if os.path.exists(source):
        shutil.rmtree(source)
    with Watch(f"make {args.files} files elsewhere"):
        make_tree(source, args.files)
    rsync = ["rsync", "-aHAX", "--numeric-ids"]
    with Watch(f"rsync of {args.files} files into the mount"):
        run(*rsync, source + "/", copy + "/")
    with Watch("sha256sum -c"):
        run("sha256sum", "--quiet", "-c", "SUMS", cwd=copy)
    with Watch("sha256sum -c after a remount"):
        mount.again()
        run("sha256sum", "--quiet", "-c", "SUMS", cwd=copy)
    with Watch("rsync finds nothing to do"):
        for _ in range(2):
            said = run(*rsync, "-i", "--checksum", "--delete", source + "/", copy + "/")
            if said:
                raise Failed(f"rsync found differences:\n{said[:2000]}")
    with Watch("rm -r of the copy"):
        shutil.rmtree(copy)
        mount.again()
        if os.path.exists(copy):
            raise Failed("the removed tree is back")
    shutil.rmtree(source)


WRITER = """
import sqlite3, sys
path, nr, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
db = sqlite3.connect(path, timeout=120)
db.execute("pragma synchronous=full")
for n in range(count):
    with db:
        db.execute("insert into t values (?, ?, ?)", (nr, n, "x" * (n * 37 % 3000)))
        db.execute("update c set n = n + 1")
"""


def sqlite_in(mount, mode, count):
    path = os.path.join(mount.mnt, f"{mode}.db")
    with Watch(f"sqlite, {mode} journal: 2 writers, {count} transactions each"):
        db = sqlite3.connect(path)
        said = db.execute(f"pragma journal_mode={mode}").fetchone()[0]
        if said != mode:
            raise Failed(f"sqlite chose journal mode {said}")
        db.execute("create table t (w, n, x, primary key (w, n))")
        db.execute("create table c (n)")
        db.execute("insert into c values (0)")
        db.commit()
        db.close()
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(nr), str(count)])
                   for nr in range(2)]
        for writer in writers:
            if writer.wait() != 0:
                raise Failed("a writer failed")
        sqlite_is_whole(path, 2 * count)
    with Watch(f"sqlite, {mode} journal: integrity_check after a remount"):
        mount.again()
        sqlite_is_whole(path, 2 * count)


def sqlite_is_whole(path, rows):
    db = sqlite3.connect(path)
    said = db.execute("pragma integrity_check").fetchall()
    if said != [("ok",)]:
        raise Failed(f"integrity_check of {path}: {said[:5]}")
    found = db.execute("select count(*) from t").fetchone()[0]
    counted = db.execute("select n from c").fetchone()[0]
    db.close()
    if (found, counted) != (rows, rows):
        raise Failed(f"{path} has {found} rows and counts {counted}, not {rows}")


def sqlite(mount, _args):
    for mode in ("delete", "truncate", "persist", "wal"):
        sqlite_in(mount, mode, 200)


STEPS = {"git": git, "build": build, "files": files, "sqlite": sqlite}


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    parser.add_argument("binary")
    parser.add_argument("work")
    parser.add_argument("--steps", default=",".join(STEPS))
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--repo", default=os.path.dirname(os.path.dirname(here)))
    parser.add_argument("--sources", nargs="*", default=[])
    parser.add_argument("--crate")
    parser.add_argument("--files", type=int, default=20_000)
    args = parser.parse_args()
    args.work = os.path.abspath(args.work)
    args.repo = os.path.abspath(args.repo)
    steps = args.steps.split(",")
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        sys.exit(f"no such step: {unknown[0]} (there are {', '.join(STEPS)})")
    os.makedirs(args.work, exist_ok=True)
    mount = Mount(args.binary, args.work)
    try:
        mount.start()
        for step in steps:
            STEPS[step](mount, args)
        mount.stop()
    except Failed as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
    finally:
        mount.abandon()
    print("everything held")


if __name__ == "__main__":
    main()

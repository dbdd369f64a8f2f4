#!/usr/bin/env python3
"""What several mounts cost: creates by one and by two, a file that goes back and forth,
and the same with a cluster key.

usage: multi_bench.py OUTRIDER_BINARY WORK_DIR [--port PORT] [--files N] [--rounds N]

Two volumes in files, one with a cluster key, each mounted twice: by a quorum member, which
leads, and by a plain client. Rounds of both volumes take turns, so that a busy machine is as
unfair to one as to the other. Needs root. Prints medians of the rounds.
"""
import argparse
import os
import shutil
import statistics
import subprocess
import time

from cluster import Cluster, together


def create(top, count):
    for nr in range(count):
        os.close(os.open(os.path.join(top, f"f{nr}"), os.O_CREAT | os.O_WRONLY))


def timed(body):
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


class Volume:
    def __init__(self, args, name, port):
        work = os.path.join(os.path.abspath(args.work), name)
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        binary = os.path.abspath(args.binary)
        options, mkfs = "", []
        if name == "key":
            key = os.path.join(work, "cluster.key")
            subprocess.run([binary, "keygen", key], check=True, stdout=subprocess.DEVNULL)
            options, mkfs = f"cluster_key={key}", ["--cluster-key", key]
        self.args, self.figures, self.round_nr = args, {}, 0
        self.cluster = Cluster(binary, work, port, nodes=2, members=1, options=options, mkfs=mkfs)
        self.cluster.make()
        self.cluster.up()

    def add(self, what, value):
        self.figures.setdefault(what, []).append(value)

    def dir(self, node, what):
        """A directory that this mount made itself, in a lock group of its own."""
        path = os.path.join(self.cluster.mnt(node), f"{what}{self.round_nr}.{node}")
        os.mkdir(path)
        return path

    def cpu(self):
        """Seconds of processor that the daemons have used."""
        ticks = 0
        for node in (0, 1):
            with open(f"/proc/{self.cluster.pid(node)}/stat") as f:
                fields = f.read().rsplit(") ", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def counters(self, node, names):
        time.sleep(1.2)
        found = []
        for name in names:
            try:
                found.append(int(self.cluster.shown(node, f"counters/{name}")))
            except FileNotFoundError:
                found.append(0)
        return found

    def round(self):
        count = self.args.files
        for node, who in ((0, "leader"), (1, "client")):
            top = self.dir(node, "alone")
            before = self.cpu()
            self.add(f"creates per second, {who} alone", count / timed(lambda: create(top, count)))
            self.add(f"processor time of the daemons for a create, {who} alone, us",
                     (self.cpu() - before) * 1e6 / count)
        tops = [self.dir(node, "both") for node in (0, 1)]
        before = self.cpu()
        took = timed(lambda: together(*(lambda top=top: create(top, count) for top in tops)))
        self.add("creates per second, both at once", 2 * count / took)
        self.add("processor time of the daemons for a create, both at once, us",
                 (self.cpu() - before) * 1e6 / (2 * count))
        mnt = self.cluster.mnt(1)
        each = [timed(lambda: os.statvfs(mnt)) for _ in range(200)]
        self.add("question and answer (statfs), ms", 1000 * statistics.median(each))
        fd = os.open(os.path.join(self.dir(1, "sync"), "f"), os.O_CREAT | os.O_RDWR)

        def change():
            os.pwrite(fd, b"x", 0)
            os.fsync(fd)
        self.add("commit (write and fsync), ms",
                 1000 * statistics.median(timed(change) for _ in range(50)))
        os.close(fd)
        self.ping_pong()
        self.round_nr += 1

    def ping_pong(self):
        name = os.path.join(f"pp{self.round_nr}.1", "f")
        self.dir(1, "pp")
        paths = [os.path.join(self.cluster.mnt(node), name) for node in (0, 1)]
        os.close(os.open(paths[1], os.O_CREAT | os.O_WRONLY))
        fds = [os.open(path, os.O_RDWR) for path in paths]
        names = ["locks_revoke", "locks_revoke_commits"]
        before = self.counters(1, names)
        each = [timed(lambda: os.setxattr(fds[nr % 2], "user.a", b"%d" % nr))
                for nr in range(200)]
        after = self.counters(1, names)
        self.add("xattr written in turn, ms", 1000 * statistics.median(each))
        self.add("xattr written in turn, worst ms", 1000 * max(each))
        self.add("... commits for each turn of the client",
                 (after[1] - before[1]) / 100)
        each = [timed(lambda: os.getxattr(fds[nr % 2], "user.a") if nr % 2
                      else os.setxattr(fds[0], "user.a", b"%d" % nr)) for nr in range(200)]
        self.add("xattr written here, read there, ms", 1000 * statistics.median(each))
        for fd in fds:
            os.close(fd)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("binary")
    args.add_argument("work")
    args.add_argument("--port", type=int, default=47700)
    args.add_argument("--files", type=int, default=4000)
    args.add_argument("--rounds", type=int, default=5)
    args = args.parse_args()
    volumes = {}
    try:
        for name in ("no key", "key"):
            volumes[name] = Volume(args, name.replace(" ", "-"), args.port + len(volumes))
        for _ in range(args.rounds):
            for volume in volumes.values():
                volume.round()
        plain, keyed = volumes["no key"].figures, volumes["key"].figures
        print(f"| median of {args.rounds} rounds | no key | key |\n|---|---|---|")
        for what in plain:
            print(f"| {what} | {statistics.median(plain[what]):.2f} "
                  f"| {statistics.median(keyed[what]):.2f} |")
    finally:
        for volume in volumes.values():
            volume.cluster.destroy()


if __name__ == "__main__":
    main()

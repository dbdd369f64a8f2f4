#!/usr/bin/env python3
"""Three mounts under load; in each round one of them dies, stops, is cut off or leaves.

usage: failover.py OUTRIDER_BINARY WORK_DIR [ROUNDS] [--port PORT] [--seed SEED] [--kinds a,b] [--netns]

Each round draws one of: kill -9 of the leader, kill -9 of a client, SIGSTOP for longer
than the timeouts and then SIGCONT, a network cut (only with --netns, which puts each
mount into a network namespace of its own behind one bridge), a clean unmount of the
leader. Checked:

* the survivors go on: operations on them are answered again;
* every file that was fsynced is there with its contents, as is the last value of a
  counter that goes from mount to mount through a lock;
* nobody healthy was fenced: the daemons that were left alone still run;
* `outrider check` finds nothing wrong, every few rounds and at the end.

Prints a line for each round and, at the end, the median and the worst time from the
death of a leader to the first answer on a survivor. Needs root. Exits 0 if all is right.
"""
import argparse
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

from cluster import Cluster, limited, wait_until

KINDS = ["kill_leader", "kill_client", "stop", "leave", "cut"]
# A fence needs the silence of the heartbeats, an election, and a reconnect timeout
# of the client's connection; answers are waited for well beyond that.
ANSWER_SECONDS = 90
# Metadata is written to new places all the time: large sparse files would fill the disk.
META, DATA = 16 << 30, 24 << 30


class NetnsCluster(Cluster):
    """Mounts in network namespaces: node N has 10.213.0.N+1 on a bridge."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.tag = f"or{self.port}"

    def address(self, node):
        return f"10.213.0.{node + 1}"

    def ip(self, *words):
        subprocess.run(["ip", *words], check=True)

    def make(self):
        self.ip("link", "add", self.tag, "type", "bridge")
        self.ip("link", "set", self.tag, "up")
        for node in range(self.nodes):
            space, outer = f"{self.tag}-{node}", f"{self.tag}v{node}"
            self.ip("netns", "add", space)
            self.ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            self.ip("link", "set", outer, "master", self.tag, "up")
            for words in (["addr", "add", f"{self.address(node)}/24", "dev", "eth0"],
                          ["link", "set", "eth0", "up"], ["link", "set", "lo", "up"]):
                self.ip("-n", space, *words)
        super().make()

    def command(self, node, options):
        # `nsenter` keeps the mount namespace, which `ip netns exec` does not.
        return ["nsenter", f"--net=/run/netns/{self.tag}-{node}",
                *super().command(node, options)]

    def cut(self, node, away):
        self.ip("link", "set", f"{self.tag}v{node}", "down" if away else "up")

    def destroy(self):
        super().destroy()
        for node in range(self.nodes):
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{node}"], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", self.tag], stderr=subprocess.DEVNULL)


class Worker:
    """A process that works on one mount for one life of it, and notes in a file
    outside what it was promised."""

    def __init__(self, cluster, node, life):
        self.notes = os.path.join(cluster.work, f"notes.{node}.{life}")
        self.beat = os.path.join(cluster.work, f"beat.{node}")
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setpgid(0, 0)
                self.work(cluster.mnt(node), node, life)
            except OSError as error:
                print(f"worker {node}.{life}: {error}", file=sys.stderr)
            finally:
                os._exit(0)

    def work(self, mnt, node, life):
        rng = random.Random(node * 1000 + life)
        top = os.path.join(mnt, f"w{node}")
        os.makedirs(top, exist_ok=True)
        count = 0
        with open(self.notes, "a") as notes:
            while True:
                content = rng.randbytes(rng.choice([10, 4096, 5000, 70_000, 300_000]))
                name = f"w{node}/l{life}-{count}"
                with open(os.path.join(mnt, name), "wb") as f:
                    f.write(content)
                    f.flush()
                    if count % 3 == 0:
                        os.fsync(f.fileno())
                        notes.write(f"{name} {hashlib.sha256(content).hexdigest()}\n")
                        notes.flush()
                # Everybody appends to one file: its lock goes around.
                with open(os.path.join(mnt, "shared"), "ab") as f:
                    f.write(b"%d %d %d\n" % (node, life, count))
                if count >= 60:
                    old = f"w{node}/l{life}-{count - 59}"
                    if (count - 59) % 3:
                        os.unlink(os.path.join(mnt, old))
                count += 1
                with open(self.beat, "w") as beat:
                    beat.write(str(time.time()))

    def end(self):
        """Kills it. What hangs in the kernel ends with its mount."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def reap(self):
        os.waitpid(self.pid, 0)


class Test:
    def __init__(self, cluster, rng, kinds):
        self.cluster, self.rng, self.kinds = cluster, rng, kinds
        self.lives = [0] * cluster.nodes
        self.workers = {}
        self.times, self.victim = [], ""

    def mount(self, node):
        self.cluster.start(node)

    def work(self, node):
        self.lives[node] += 1
        self.workers[node] = Worker(self.cluster, node, self.lives[node])

    def stop_work(self, nodes):
        workers = [self.workers.pop(node) for node in nodes if node in self.workers]
        for worker in workers:
            worker.end()
        return workers

    def answered(self, node, start, seconds=ANSWER_SECONDS):
        """Seconds from `start` to an answer that needs the server: a durable new file
        in a directory that others have used."""
        path = os.path.join(self.cluster.mnt(node), f"probe{node}")

        def ask():
            with open(path, "ab") as f:
                f.write(b"x")
                f.flush()
                os.fsync(f.fileno())
        why = limited(ask, seconds)
        if why:
            raise AssertionError(f"mount {node} does not answer: {why}")
        return time.monotonic() - start

    def alive(self, nodes):
        for node in nodes:
            assert self.cluster.procs[node].poll() is None, f"healthy mount {node} ended"

    def round(self, kind):
        cluster = self.cluster
        wait_until(lambda: cluster.leader() is not None, 60, "a leader")
        leader = cluster.leader()
        others = [node for node in range(cluster.nodes) if node != leader]
        victim = leader
        if kind == "kill_client" or kind in ("stop", "cut") and self.rng.random() < 0.5:
            victim = self.rng.choice(others)
        rest = [node for node in range(cluster.nodes) if node != victim]
        self.victim = f"{'leader' if victim == leader else 'client'} {victim}"
        start = time.monotonic()
        limit = cluster.heartbeat_ms / 1000
        ended = False
        if kind in ("kill_leader", "kill_client"):
            cluster.kill(victim)
            ended = True
        elif kind == "leave":
            workers = self.stop_work([victim])
            for worker in workers:
                worker.reap()
            start = time.monotonic()
            cluster.unmount(victim, ANSWER_SECONDS)
            ended = True
        elif kind == "stop":
            os.kill(cluster.pid(victim), signal.SIGSTOP)
            time.sleep(limit * self.rng.uniform(1.5, 4))
            os.kill(cluster.pid(victim), signal.SIGCONT)
        elif kind == "cut":
            cluster.cut(victim, True)
            time.sleep(limit * self.rng.uniform(1.5, 4))
            cluster.cut(victim, False)
        took = max(self.answered(node, start) for node in rest)
        if kind == "kill_leader":
            self.times.append(took)
        self.alive(rest)
        fenced = False
        if not ended:
            # It was silent for longer than the timeouts: it may have been declared
            # dead, and then has to end by itself; or it goes on.
            fenced = self.settles(victim)
        for worker in self.stop_work([victim]) if ended or fenced else []:
            worker.reap()
        if ended or fenced:
            self.mount(victim)
            cluster.wait_up(victim, ANSWER_SECONDS)
            self.work(victim)
        return self.victim + (", declared dead" if fenced else ""), took

    def settles(self, victim):
        """Whether a silenced mount ended by itself; else it must answer again."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            if self.cluster.procs[victim].poll() is not None:
                self.cluster.procs[victim] = None
                self.cluster.detach(victim)
                return True
            path = os.path.join(self.cluster.mnt(victim), f"settle{victim}")
            if limited(lambda: open(path, "ab").close(), 5) is None:
                return False
        raise AssertionError(f"mount {victim} neither ends nor answers")

    def verify(self):
        """Everything promised is there, seen from a drawn mount."""
        mnt = self.cluster.mnt(self.rng.randrange(self.cluster.nodes))
        checked = 0
        for name in os.listdir(self.cluster.work):
            if not name.startswith("notes."):
                continue
            with open(os.path.join(self.cluster.work, name)) as notes:
                lines = [line.split() for line in notes if line.endswith("\n")]
            for path, digest in lines:
                with open(os.path.join(mnt, path), "rb") as f:
                    found = hashlib.sha256(f.read()).hexdigest()
                assert found == digest, f"{path} is not what was synced"
                checked += 1
        return checked

    def verify_shared(self):
        """Each mount's appends are whole and in order, in each of its lives: what was
        seen by the next writer through the lock is never lost."""
        with open(os.path.join(self.cluster.mnt(0), "shared"), "rb") as f:
            lines = f.read().splitlines()
        last = {}
        for line in lines:
            node, life, count = (int(word) for word in line.split())
            assert count == last.get((node, life), -1) + 1, (line, last.get((node, life)))
            last[(node, life)] = count
        return len(lines)

    def check(self):
        """Ends all mounts cleanly, checks the volume, and mounts again."""
        for worker in self.stop_work(range(self.cluster.nodes)):
            worker.reap()
        checked, lines = self.verify(), self.verify_shared()
        self.cluster.unmount_all()
        problems = self.cluster.check()
        assert not problems, "\n".join(problems[:20])
        print(f"     {checked} synced files and {lines} appends are there, check is clean",
              flush=True)

    def begin(self):
        self.cluster.up()
        for node in range(self.cluster.nodes):
            self.work(node)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("binary")
    args.add_argument("work")
    args.add_argument("rounds", nargs="?", type=int, default=100)
    args.add_argument("--port", type=int, default=47300)
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--heartbeat-ms", type=int, default=2000)
    args.add_argument("--check-every", type=int, default=10)
    args.add_argument("--kinds", default="")
    args.add_argument("--netns", action="store_true")
    args = args.parse_args()
    kinds = [kind for kind in args.kinds.split(",") if kind]
    kinds = kinds or [kind for kind in KINDS if args.netns or kind != "cut"]
    shutil.rmtree(args.work, ignore_errors=True)
    make = NetnsCluster if args.netns else Cluster
    cluster = make(os.path.abspath(args.binary), os.path.abspath(args.work), args.port,
                   heartbeat_ms=args.heartbeat_ms, meta_bytes=META, data_bytes=DATA)
    rng = random.Random(args.seed)
    test = Test(cluster, rng, kinds)
    code = 1
    try:
        cluster.make()
        test.begin()
        time.sleep(1)
        for nr in range(args.rounds):
            kind = rng.choice(kinds)
            start = time.monotonic()
            try:
                what, took = test.round(kind)
            except (AssertionError, TimeoutError, RuntimeError, OSError):
                print(f"{nr:3} {kind:12} {test.victim}: fails after "
                      f"{time.monotonic() - start:.2f} s", flush=True)
                raise
            print(f"{nr:3} {kind:12} {what}: answers after {took:.2f} s, "
                  f"round {time.monotonic() - start:.1f} s", flush=True)
            time.sleep(rng.uniform(0, 1))
            if (nr + 1) % args.check_every == 0 or nr + 1 == args.rounds:
                test.check()
                if nr + 1 < args.rounds:
                    test.begin()
                    time.sleep(1)
        code = 0
    except (AssertionError, TimeoutError, RuntimeError, OSError) as error:
        print(f"FAIL {error!r}", flush=True)
    finally:
        test.stop_work(range(cluster.nodes))
        cluster.destroy()
    if test.times:
        print(f"leader killed {len(test.times)} times: service after "
              f"{statistics.median(test.times):.2f} s (median), {max(test.times):.2f} s (worst); "
              f"heartbeat timeout {args.heartbeat_ms / 1000:.1f} s")
    print("all right" if code == 0 else "failed")
    sys.exit(code)


if __name__ == "__main__":
    main()

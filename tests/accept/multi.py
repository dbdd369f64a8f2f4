#!/usr/bin/env python3
"""Mounts that come, go, die and are given up, while others go on.

usage: multi.py OUTRIDER_BINARY WORK_DIR [--port PORT] [--only NAME,...] [--long]

Each case makes a volume and its mounts, each in a process of its own, and is named
after the original's test whose promises it checks, where there is one. What the original's
tests steer by triggers and ioctls is steered by mount options, runtime directories and
signals here. Needs root. Exits 0 if all cases pass and `outrider check` finds nothing after
each.
"""
import argparse
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback

from cluster import Cluster, libc, limited, together, wait_until

CASES = []
LONG = False


def case(seconds=120, **how):
    def add(body):
        CASES.append((body, seconds, how))
        return body
    return add


def put(path, data=b"", sync=False):
    with open(path, "wb") as f:
        f.write(data)
        if sync:
            f.flush()
            os.fsync(f.fileno())


def get(path):
    with open(path, "rb") as f:
        return f.read()


def handle_of(path):
    raw = ctypes.create_string_buffer(struct.pack("<Ii", 64, 0) + bytes(64))
    mount_id = ctypes.c_int()
    assert libc.name_to_handle_at(-100, path.encode(), raw, ctypes.byref(mount_id), 0) == 0
    return raw


def is_gone(top, raw):
    """Whether the inode of a handle does not exist any more."""
    top_fd = os.open(top, os.O_RDONLY)
    try:
        fd = libc.open_by_handle_at(top_fd, raw, os.O_RDONLY)
        number = ctypes.get_errno()
        if fd >= 0:
            os.close(fd)
            return False
        assert number == errno.ESTALE, os.strerror(number)
        return True
    finally:
        os.close(top_fd)


def leader_of(cluster):
    wait_until(lambda: cluster.leader() is not None, 60, "a leader")
    return cluster.leader()


def answers(cluster, node, seconds=60):
    """A durable change through this mount."""
    path = os.path.join(cluster.mnt(node), f"alive{node}")
    why = limited(lambda: put(path, b"x", sync=True), seconds)
    assert why is None, f"mount {node}: {why}"


# --- the inode indexes, by the ioctls of the original ---------------------------------

META_SEQ, DATA_SEQ = 0, 1
END = (2**64 - 1, 2**64 - 1)


def walk(top, index, first=(0, 0), last=END, count=1000):
    """WALK_INODES: at most `count` pairs of a seq and an inode number."""
    into = ctypes.create_string_buffer(24 * max(count, 1))
    arg = bytearray(struct.pack("<QQIIQQIIQIB11x", *first, 0, 0, *last, 0, 0,
                                ctypes.addressof(into), count, index))
    fd = os.open(top, os.O_RDONLY)
    try:
        given = fcntl.ioctl(fd, 0x4048E801, arg)
    finally:
        os.close(fd)
    assert given <= count
    entries = [struct.unpack_from("<QQII", into, 24 * nr) for nr in range(given)]
    assert all(minor == pad == 0 for _, _, minor, pad in entries), entries
    return [entry[:2] for entry in entries]


def behind(entry):
    return (entry[0], entry[1] + 1)


def seqs_of(path):
    """STAT_MORE: meta_seq and data_seq."""
    out = bytearray(56)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x8038E805, out)
    finally:
        os.close(fd)
    return struct.unpack_from("<QQ", out)


def sync_all(c, nodes):
    """Makes everything durable on all mounts: a mount whose transaction is empty holds
    back what is listed."""
    for node in nodes:
        put(os.path.join(c.mnt(node), f"touched{node}"), b"x", sync=True)


@case()
def simple_inode_index(c):
    """Inodes are listed at their last change, once, in order, when it is durable."""
    top = c.mnt(0)
    names = [os.path.join(top, f"f{nr}") for nr in range(50)]
    for name in names:
        put(name, b"x" * 5000)
    sync_all(c, range(3))
    inos = {os.stat(name).st_ino: name for name in names}
    for node in range(3):
        listed = walk(c.mnt(node), DATA_SEQ)
        assert listed == sorted(listed)
        assert {ino for _, ino in listed} >= set(inos), listed
        for seq, ino in walk(c.mnt(node), META_SEQ):
            assert ino not in inos or seq == seqs_of(inos[ino])[0]
    # A change that is not of the contents moves one of the two.
    old = seqs_of(names[0])
    os.chmod(names[0], 0o600)
    os.unlink(names[1])
    gone = next(ino for ino, name in inos.items() if name == names[1])
    moved = os.stat(names[0]).st_ino
    assert (old[0], moved) not in walk(top, META_SEQ), "it has moved, durable or not"
    sync_all(c, range(3))
    new = seqs_of(names[0])
    assert new[0] > old[0] and new[1] == old[1], (old, new)
    for node in range(3):
        listed = walk(c.mnt(node), META_SEQ)
        assert [entry for entry in listed if entry[1] == moved] == [(new[0], moved)]
        assert (old[1], moved) in walk(c.mnt(node), DATA_SEQ)
        wait_until(lambda n=node: gone not in [ino for _, ino in walk(c.mnt(n), META_SEQ)], 60,
                   "the deletion of an inode")
        assert len(walk(c.mnt(node), META_SEQ, count=7)) == 7
        assert walk(c.mnt(node), META_SEQ, count=0) == []
        only = (new[0], moved)
        assert walk(c.mnt(node), META_SEQ, only, only) == [only]
    out = subprocess.run([c.binary, "walk-inodes", "-p", top, "meta_seq", "0", "-1"],
                         capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split() for line in out if not line.startswith("#")]
    assert [(int(row[1]), int(row[3])) for row in rows] == walk(top, META_SEQ)
    one = subprocess.run([c.binary, "stat", "-s", "meta_seq", names[0]],
                         capture_output=True, text=True, check=True).stdout
    assert int(one) == new[0]


@case()
def index_readers_race_with_writers(c):
    """Who follows an index misses no change, whoever writes where meanwhile."""
    end = time.monotonic() + 15
    # Each of them is a process of its own.
    done = os.path.join(c.work, "done")
    shown = {(node, index): os.path.join(c.work, f"shown-{node}-{index}")
             for node in range(3) for index in (META_SEQ, DATA_SEQ)}

    def write(node):
        rng = random.Random(node)
        top = os.path.join(c.mnt(node), f"d{node}")
        os.mkdir(top)
        nr = 0
        while time.monotonic() < end:
            # Its own files, and those of the others.
            of = rng.choice([node, node, rng.randrange(3)])
            path = os.path.join(c.mnt(node), f"d{of}", f"f{rng.randrange(40)}")
            try:
                if rng.random() < 0.7:
                    put(path, b"x" * rng.randrange(9000), sync=rng.random() < 0.05)
                else:
                    os.unlink(path)
            except FileNotFoundError:
                pass
            nr += 1
        assert nr > 100, f"only {nr} changes in 15 s"

    def follow(node, index):
        at, entries, steps = (0, 0), set(), 0
        while True:
            last = os.path.exists(done)
            found = walk(c.mnt(node), index, at, count=20)
            steps += 1
            assert found == sorted(found) and (not found or found[0] >= at)
            entries.update(found)
            if found:
                at = behind(found[-1])
            elif last:
                break
            else:
                time.sleep(0.05)
        assert steps > 10, f"only {steps} steps"
        put(shown[node, index], json.dumps(sorted(entries)).encode())

    def all_of_it():
        together(*(lambda node=node: write(node) for node in range(3)))
        sync_all(c, range(3))
        sync_all(c, range(3))
        put(done)
    together(all_of_it, *(lambda which=which: follow(*which) for which in shown))
    seen = {which: {tuple(entry) for entry in json.loads(get(path))}
            for which, path in shown.items()}
    top = c.mnt(1)
    count = 0
    for directory, _, names in os.walk(top):
        for path in [directory] + [os.path.join(directory, name) for name in names]:
            ino, seqs = os.stat(path).st_ino, seqs_of(path)
            for (node, index), entries in seen.items():
                if index == DATA_SEQ and path == directory:
                    continue
                assert (seqs[index], ino) in entries or "touched" in path or path == top, (
                    f"{path}, inode {ino} at {seqs}, was never shown to {node}, {index}")
                count += 1
    assert count > 100, count


# --- load against locks that come and go --------------------------------------------

@case(options="orphan_scan_delay_ms=100")
def lock_pr_cw_conflict(c):
    """Scans that read the orphans' zone race with unlinks that only write to it."""
    def churn(node):
        top = os.path.join(c.mnt(node), f"d{node}")
        os.mkdir(top)
        end = time.monotonic() + 20
        nr = 0
        while time.monotonic() < end:
            names = [os.path.join(top, f"{nr}-{k}") for k in range(20)]
            fds = [os.open(name, os.O_CREAT | os.O_WRONLY) for name in names]
            for name in names:
                os.unlink(name)
            for fd in fds:
                os.close(fd)
            nr += 1
        assert nr > 20, f"only {nr} rounds in 20 s"
    together(*(lambda node=node: churn(node) for node in range(3)))
    scans = [int(c.shown(node, "counters/orphan_scan")) for node in range(3)]
    assert min(scans) > 20, scans


@case(options="lock_idle_count=32,ino_alloc_per_lock=1")
def lock_shrink_read_race(c):
    """Readers are right while locks are given back under them all the time."""
    top = os.path.join(c.mnt(0), "d")
    os.mkdir(top)
    for nr in range(300):
        put(os.path.join(top, str(nr)), b"%d" % nr * 500)

    def read(node, seed):
        rng = random.Random(seed)
        end = time.monotonic() + 20
        count = 0
        while time.monotonic() < end:
            nr = rng.randrange(300)
            assert get(os.path.join(c.mnt(node), "d", str(nr))) == b"%d" % nr * 500
            count += 1
        assert count > 200, count

    def change():
        end = time.monotonic() + 20
        while time.monotonic() < end:
            nr = random.randrange(300)
            os.utime(os.path.join(c.mnt(1), "d", str(nr)))
            time.sleep(0.01)
    together(*(lambda s=s: read(s % 3, s) for s in range(6)), change)

    def users():
        """Locks with users, by the columns that the original's scripts look at."""
        table = c.shown(0, "client_locks").splitlines()
        assert len(table) < 200, f"{len(table)} locks are kept"
        assert all(line.startswith("start ") and line.count("users:") == 1 for line in table)
        return [line for line in table if line.split()[17:22:2] != ["0"] * 3]
    wait_until(lambda: not users(), 10, "locks without users")


@case(180)
def lock_recover_invalidate(c):
    """Leaders change under mounts that take one file from each other all the time."""
    path = "shared"
    put(os.path.join(c.mnt(0), path))
    stop = os.path.join(c.work, "stop")

    def append(node):
        count = 0
        while not os.path.exists(stop):
            with open(os.path.join(c.mnt(node), path), "ab") as f:
                f.write(b"%d %d\n" % (node, count))
            count += 1
        put(os.path.join(c.work, f"count{node}"), b"%d" % count)
    for nr in range(4):
        leader = leader_of(c)
        others = [node for node in range(3) if node != leader]
        workers = [threading.Thread(target=together, args=(lambda node=node: append(node),))
                   for node in others]
        for worker in workers:
            worker.start()
        time.sleep(1)
        c.unmount(leader)
        time.sleep(1)
        c.start(leader)
        c.wait_up(leader)
        time.sleep(0.5)
        put(stop)
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive(), f"round {nr}: an appending process hangs"
        lines = get(os.path.join(c.mnt(leader), path)).split(b"\n")[:-1]
        for node in others:
            mine = [int(line.split()[1]) for line in lines if line.startswith(b"%d " % node)]
            count = int(get(os.path.join(c.work, f"count{node}")))
            assert mine == list(range(count)), f"round {nr}: mount {node} appended {count}"
            os.unlink(os.path.join(c.work, f"count{node}"))
        os.unlink(stop)
        put(os.path.join(c.mnt(leader), path))


# --- mounts that come and go ----------------------------------------------------------

@case(240, nodes=5, members=3)
def client_unmount_recovery(c):
    """Clients unmount cleanly while the leader is replaced, and a new server recovers."""
    for nr in range(4):
        for node in (3, 4):
            put(os.path.join(c.mnt(node), f"r{nr}.{node}"), b"%d" % node * 1000)
        leader = leader_of(c)
        c.kill(leader)
        procs = [(node, c.procs[node]) for node in (3, 4)]
        for node, proc in procs:
            proc.send_signal(signal.SIGTERM)
        for node, proc in procs:
            assert proc.wait(timeout=90) == 0, f"mount {node} did not unmount cleanly"
            c.procs[node] = None
        for node in (leader, 3, 4):
            c.start(node)
        for node in (leader, 3, 4):
            c.wait_up(node)
        for node in (3, 4):
            for at in range(5):
                found = get(os.path.join(c.mnt(at), f"r{nr}.{node}"))
                assert found == b"%d" % node * 1000, (nr, node, at)


@case(240, nodes=5, members=3)
def mount_unmount_race(c):
    """Mounts and unmounts at random, many at once, for half a minute."""
    rng = random.Random(5)
    end = time.monotonic() + 30
    count = 0
    while time.monotonic() < end:
        # Two of three members stay, so that there is a majority to say goodbye to.
        leaving = rng.sample([3, 4], rng.randint(0, 2))
        leaving += rng.sample([0, 1, 2], rng.randint(0, 1))
        procs = [(node, c.procs[node]) for node in leaving]
        for _, proc in procs:
            time.sleep(rng.uniform(0, 0.05))
            proc.send_signal(signal.SIGTERM)
        rng.shuffle(procs)
        for node, proc in procs:
            assert proc.wait(timeout=60) == 0, f"mount {node} ended with {proc.returncode}"
            c.procs[node] = None
            c.start(node)
        time.sleep(rng.uniform(0, 0.3))
        for node, _ in procs:
            c.wait_up(node)
        for node in leaving:
            put(os.path.join(c.mnt(node), f"f{node}"), b"%d" % count)
        count += len(procs)
    assert count > 20, count
    for node in range(5):
        answers(c, node)


# --- mounts that are forced to end ----------------------------------------------------

@case(300)
def fence_and_reclaim(c):
    """A client, the leader, all are forced to end: what was synced is there afterwards."""
    def check(what):
        for node in range(3):
            for name in written:
                found = get(os.path.join(c.mnt(node), name))
                assert found == name.encode() * 100, f"{what}: {name} on mount {node}"
    written = []

    def write(what):
        for node in range(3):
            name = f"{what}.{node}"
            put(os.path.join(c.mnt(node), name), name.encode() * 100, sync=True)
            written.append(name)
    write("client")
    leader = leader_of(c)
    client = (leader + 1) % 3
    c.force_unmount(client)
    for node in range(3):
        if node != client:
            answers(c, node)
    c.start(client)
    c.wait_up(client)
    check("client")
    write("leader")
    leader = leader_of(c)
    c.force_unmount(leader)
    for node in range(3):
        if node != leader:
            answers(c, node)
    c.start(leader)
    c.wait_up(leader)
    check("leader")
    write("all")
    for node in range(3):
        c.force_unmount(node)
    c.up()
    check("all")
    def reclaimed():
        return sum(int(c.shown(node, "counters/reclaimed_open_logs")) for node in range(3))
    # What is shown is written anew now and then.
    wait_until(lambda: reclaimed() > 0, 10, "open log trees of the dead reclaimed")


@case(300)
def quorum_heartbeat_timeout(c):
    """When the leader is forced to end the next one comes within timeout - 1 s and + 5 s."""
    for ms in (3000, 6000, 10_000) + ((29_000,) if LONG else ()):
        for node in range(3):
            path = os.path.join(c.shown_dir(node), "mount_options/quorum_heartbeat_timeout_ms")
            with open(path, "w") as f:
                f.write(f"{ms}\n")
        time.sleep(1)
        assert [c.shown(n, "mount_options/quorum_heartbeat_timeout_ms") for n in range(3)] \
            == [str(ms)] * 3
        wait_until(lambda: len(c.says_it_leads()) == 1, 30, "one leader")
        leader = c.says_it_leads()[0]
        start = time.monotonic()
        c.force_unmount(leader)
        wait_until(lambda: len(c.says_it_leads()) == 1, 60, "the next leader")
        took = time.monotonic() - start
        assert ms / 1000 - 1 <= took <= ms / 1000 + 5, f"{ms} ms: {took:.1f} s"
        c.start(leader)
        c.wait_up(leader)


@case(240, options="orphan_scan_delay_ms=500")
def orphan_inodes(c):
    """Unlinked open files live, and are deleted once their users have closed or died."""
    top = c.mnt(0)

    def holder(node, names, ready):
        """A process that keeps files open until it is killed."""
        pid = os.fork()
        if pid == 0:
            fds = [os.open(os.path.join(c.mnt(node), name), os.O_RDWR) for name in names]
            put(ready, b"%d" % len(fds))
            time.sleep(1000)
            os._exit(0)
        wait_until(lambda: os.path.exists(ready), 20, "open files")
        os.unlink(ready)
        return pid

    def reap(pid):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def files(what, count=5):
        names = [f"{what}{nr}" for nr in range(count)]
        for name in names:
            put(os.path.join(top, name), b"x" * 100_000, sync=True)
        raws = [handle_of(os.path.join(top, name)) for name in names]
        return names, raws
    ready = os.path.join(c.work, "ready")
    # Open on another mount, unlinked here; the holder dies.
    names, raws = files("held")
    pid = holder(1, names, ready)
    for name in names:
        os.unlink(os.path.join(top, name))
    time.sleep(3)
    assert not any(is_gone(c.mnt(1), raw) for raw in raws), "deleted while open on mount 1"
    reap(pid)
    wait_until(lambda: all(is_gone(c.mnt(2), raw) for raw in raws), 30, "deletion after the close")
    # The mount that has them open is killed.
    names, raws = files("killed")
    pid = holder(1, names, ready)
    for name in names:
        os.unlink(os.path.join(top, name))
    answers(c, 0)
    c.kill(1)
    reap(pid)
    c.start(1)
    c.wait_up(1)
    wait_until(lambda: all(is_gone(c.mnt(1), raw) for raw in raws), 60, "deletion after the kill")
    # All mounts die with unlinked files open.
    names, raws = files("all")
    pids = [holder(node, names, ready) for node in range(3)]
    for name in names:
        os.unlink(os.path.join(top, name))
    for node in range(3):
        answers(c, node)
    for node in range(3):
        c.kill(node)
    for pid in pids:
        reap(pid)
    c.up()
    wait_until(lambda: all(is_gone(c.mnt(0), raw) for raw in raws), 60, "deletion after the crash")


# --- a full volume --------------------------------------------------------------------

# Each mount takes some GiB for itself, so a volume must be larger than these; space is
# taken by fallocate, which writes nothing.
ROOMY = 24 << 30
CHUNK = 256 << 20


def take(path, size=CHUNK):
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.posix_fallocate(fd, 0, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def fill(c, node, what="first"):
    """Takes space until there is none; returns how many chunks that were."""
    for nr in range(1000):
        try:
            take(os.path.join(c.mnt(node), f"fill-{what}-{node}-{nr}"))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return nr
    raise AssertionError("it never gets full")


@case(300, data_bytes=ROOMY)
def enospc_is_seen_by_all(c):
    """A volume that one mount fills is full for all, and has room for all again."""
    counts = [fill(c, node) for node in range(3)]
    assert counts[0] > 30 and sum(counts) > 70, counts
    for node in range(3):
        assert fill(c, node, "again") == 0, f"mount {node} finds more"
    for name in os.listdir(c.mnt(1)):
        if name.startswith("fill"):
            os.unlink(os.path.join(c.mnt(1), name))
    data = os.urandom(1 << 20) * 16
    for node in range(3):
        path = os.path.join(c.mnt(node), f"again{node}")

        def has_room():
            try:
                put(path, data, sync=True)
                return True
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                return False
        wait_until(has_room, 60, f"room for mount {node}")
        assert get(path) == data


@case(300, data_bytes=ROOMY)
def cross_mount_data_free(c):
    """What one mount allocates another frees, twice the volume's size over, without ENOSPC."""
    for nr in range(2 * ROOMY // CHUNK):
        take(os.path.join(c.mnt(nr % 3), f"f{nr}"))
        if nr >= 3:
            os.unlink(os.path.join(c.mnt((nr + 1) % 3), f"f{nr - 3}"))


# --- mounts that must not write ---------------------------------------------------------

@case(180, options="fence=agent")
def users_of_a_fenced_mount_get_eio(c):
    """A mount that was declared dead while it was stopped answers EIO, then ends."""
    # The leader: of another mount that is stopped the kernel keeps the connection alive.
    victim = leader_of(c)
    path = os.path.join(c.mnt(victim), "f")
    put(path, b"a" * 8192, sync=True)
    fd = os.open(path, os.O_RDWR)
    assert os.pread(fd, 10, 0) == b"a" * 10
    page = mmap.mmap(fd, 4096)
    rid, pid = c.rid(victim), c.pid(victim)
    os.kill(pid, signal.SIGSTOP)
    others = [node for node in range(3) if node != victim]
    requests = [os.path.join(c.shown_dir(node), "fence", rid) for node in others]
    wait_until(lambda: any(map(os.path.isdir, requests)), 60, "a fence request")
    leader = next(node for node, path in zip(others, requests) if os.path.isdir(path))
    request = os.path.join(c.shown_dir(leader), "fence", rid)
    # The agent of this case does nothing, which is as if it could not: the mount has
    # to find out by itself.
    with open(os.path.join(request, "fenced"), "w") as f:
        f.write("1\n")
    wait_until(lambda: not os.path.isdir(request), 30, "reclaim")
    other = os.path.join(c.mnt(leader), "f")
    put(other, b"b" * 8192, sync=True)
    os.kill(pid, signal.SIGCONT)

    def eio(body, what):
        try:
            body()
        except OSError as error:
            assert error.errno == errno.EIO, f"{what}: {error}"
            return
        raise AssertionError(f"{what}: no error")
    eio(lambda: (os.pwrite(fd, b"late", 0), os.fsync(fd)), "write")
    eio(lambda: os.fsync(fd), "fsync")
    eio(lambda: os.pread(fd, 10, 0), "read")
    eio(lambda: os.stat(path), "stat")
    eio(lambda: os.listdir(c.mnt(victim)), "readdir")
    eio(lambda: put(os.path.join(c.mnt(victim), "new")), "create")
    page.close()
    os.close(fd)
    proc, c.procs[victim] = c.procs[victim], None
    assert proc.wait(timeout=30) != 0, "it ended as if nothing was lost"
    c.detach(victim)
    assert get(other) == b"b" * 8192, "a late write"
    c.start(victim)
    c.wait_up(victim)
    assert get(path) == b"b" * 8192


@case(120, options="watchdog=helper", heartbeat_ms=4000)
def a_watchdog_ends_a_mount_that_is_stopped(c):
    """With watchdog=helper a stopped mount is killed before others could declare it dead."""
    for node in range(3):
        answers(c, node)
    # Under load and idle, it is fed.
    time.sleep(8)
    for node in range(3):
        assert c.procs[node].poll() is None, f"mount {node} was ended for nothing"
    leader = leader_of(c)
    start = time.monotonic()
    os.kill(c.pid(leader), signal.SIGSTOP)
    proc = c.procs[leader]
    wait_until(lambda: proc.poll() is not None, 10, "the watchdog")
    took = time.monotonic() - start
    assert proc.returncode == -signal.SIGKILL, proc.returncode
    assert took < 4, f"{took:.1f} s: the heartbeat timeout is 4 s"
    c.kill(leader)
    for node in range(3):
        if node != leader:
            answers(c, node)
    c.start(leader)
    c.wait_up(leader)
    # A clean end takes it along.
    before = helpers()
    c.unmount((leader + 1) % 3)
    wait_until(lambda: len(helpers()) == len(before) - 1, 10, "the helper's end")
    c.start((leader + 1) % 3)
    c.wait_up((leader + 1) % 3)


def helpers():
    found = []
    for pid in os.listdir("/proc"):
        try:
            if pid.isdigit() and get(f"/proc/{pid}/comm") == b"outrider-watch\n":
                found.append(pid)
        except OSError:
            pass
    return found


# --- what is shown ----------------------------------------------------------------------

@case(120)
def status_shows_the_cluster(c):
    """`outrider status` tells leader, members and clients, and who waits for whom."""
    def status(*args):
        done = subprocess.run([c.binary, "status", "--run-dir", c.run_dir, *args], check=True,
                              stdout=subprocess.PIPE, text=True)
        return done.stdout

    def volume(*args):
        volumes = json.loads(status("--json", *args))["volumes"]
        assert len(volumes) == 1, volumes
        return volumes[0]
    leader = leader_of(c)
    wait_until(lambda: volume()["server"] is not None, 10, "what the server knows")
    rids = [c.rid(node) for node in range(3)]
    wait_until(lambda: all(x["connected"] for x in volume()["server"]["clients"]), 10, "clients")
    for args in ((), (c.mnt(1),), (c.meta,)):
        seen = volume(*args)
        assert (seen["leader"]["rid"], seen["leader"]["slot"]) == (rids[leader], leader), \
            (args, seen["leader"], rids, leader)
        assert [x["present"] for x in seen["members"]] == [True] * 3
        assert sorted(x["rid"] for x in seen["server"]["clients"]) == sorted(rids)
        assert len(seen["mounts"]) == 3
    # A stopped mount has a lock that another one wants.
    holder = (leader + 1) % 3
    waiter = (leader + 2) % 3
    os.mkdir(os.path.join(c.mnt(holder), "d"))
    put(os.path.join(c.mnt(holder), "d/f"), b"x")
    os.setxattr(os.path.join(c.mnt(holder), "d/f"), "user.a", b"1")
    os.kill(c.pid(holder), signal.SIGSTOP)
    pid = os.fork()
    if pid == 0:
        os.setxattr(os.path.join(c.mnt(waiter), "d/f"), "user.a", b"2")
        os._exit(0)

    def waits():
        return [w for w in volume()["server"]["waits"] if w["rid"] == rids[waiter]
                and any(h["rid"] == rids[holder] for h in w["holders"])]
    wait_until(waits, 10, "who waits for whom")
    wait_until(lambda: "silent for" in status(), 10, "a silent mount")
    text = status(c.mnt(leader))
    assert f"waits for {rids[holder]}" in text, text
    os.kill(c.pid(holder), signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0
    # Another may lead by now: the stopped mount is a member too.
    wait_until(lambda: (volume()["server"] or {"waits": 1})["waits"] == [], 20,
               "an end of waiting")
    refused = subprocess.run([c.binary, "status", "--run-dir", c.run_dir, "/etc/passwd"],
                             stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 1 and "/etc/passwd" in refused.stderr, refused


@case(60)
def volume_options_are_set_by_writing(c):
    """volume_options/data_alloc_zone_blocks is set through one mount and shown by all."""
    def path(node):
        return os.path.join(c.shown_dir(node), "volume_options/data_alloc_zone_blocks")

    def write(node, text):
        with open(path(node), "w") as f:
            f.write(text)

    def shown():
        return [get(path(node)) for node in range(3)]
    assert shown() == [b""] * 3
    write(1, "1048576\n")
    wait_until(lambda: shown() == [b"1048576"] * 3, 30, "the option on all mounts")
    for bad in ("5", "lots", "1" * 40):
        write(0, bad)
        wait_until(lambda: get(path(0)) == b"1048576", 10, f"{bad!r} taken back")
    write(2, "\n")
    wait_until(lambda: shown() == [b""] * 3, 30, "the option cleared")


def run(body, seconds, how, args):
    work = os.path.join(os.path.abspath(args.work), body.__name__[:20])
    shutil.rmtree(work, ignore_errors=True)
    cluster = Cluster(os.path.abspath(args.binary), work, args.port, **how)
    try:
        cluster.make()
        cluster.up()
        # In a thread, not in a process: a case starts and ends mounts.
        failure = []

        def guarded():
            try:
                body(cluster)
            except BaseException as error:  # of whatever kind, the case has failed
                failure.append(f"{error!r}")
                traceback.print_exc()
        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            return f"hangs ({seconds} s)"
        if failure:
            return failure[0]
        cluster.unmount_all()
        problems = cluster.check()
        return "check: " + problems[0] if problems else None
    except (TimeoutError, RuntimeError, OSError) as error:
        return f"{error!r}"
    finally:
        cluster.destroy()


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("binary")
    args.add_argument("work")
    args.add_argument("--port", type=int, default=47600)
    args.add_argument("--only", default="", help="names of cases, comma separated")
    args.add_argument("--long", action="store_true", help="the longest timeouts too")
    args = args.parse_args()
    global LONG
    LONG = args.long
    wanted = [name for name in args.only.split(",") if name]
    failed = []
    for body, seconds, how in CASES:
        name = body.__name__
        if wanted and name not in wanted:
            continue
        start = time.monotonic()
        why = run(body, seconds, how, args)
        promise = body.__doc__.strip().splitlines()[0]
        print(f"{'ok  ' if why is None else 'FAIL'} {time.monotonic() - start:6.1f} s  "
              f"{name}: {promise}" + (f" [{why}]" if why else ""), flush=True)
        if why:
            failed.append(name)
    print(f"{len(failed)} failed: {' '.join(failed)}" if failed else "all right")
    # A case that hangs has a thread that never ends.
    sys.stdout.flush()
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()

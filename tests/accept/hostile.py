#!/usr/bin/env python3
"""Attacks the ports of a running cluster from this host, and looks whether its users notice.

usage: hostile.py OUTRIDER_BINARY WORK_DIR [--minutes M] [--port PORT] [--no-key] [--cross] [--json]

Makes a volume in files, mounts it three times (slots 0 to 2 on 127.0.0.1 to 127.0.0.3),
with a cluster key unless --no-key is given, and lets each mount's users write, fsync,
rename and read what they wrote. Then, in turns of equal length:

  calm       nobody attacks: what the users get by themselves
  garbage    random bytes, valid headers with nonsense, other volumes' greetings
  flood      connections as fast as they are made; datagrams as fast as they are sent
  slow       readers that never read, writers of one byte a second, half-open sockets
  keys       nodes with a wrong key (their handshakes, their datagrams) and with none
  replay     what was recorded on the wire before (raw socket on loopback, root only)

Only loopback addresses are touched; sockets and rates are bounded. Exits 0 if no user
saw an error, no daemon died, nobody was fenced, leadership never changed, memory did
not grow, the log names what came, and `outrider check` is clean at the end.
"""
import argparse
import atexit
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
ATTACKER = "127.0.0.66"
SOCKETS_MAX = 600
PHASES = ["calm", "garbage", "flood", "slow", "keys", "replay"]
# Growth of a daemon's memory under attack that counts as a leak, beyond what its
# caches gain in calm.
GROWTH_MAX_KIB = 64 << 10


def note(text):
    print(text, file=sys.stderr, flush=True)


class Cluster:
    def __init__(self, binary, work, port, keyed):
        self.binary, self.work, self.port, self.keyed = binary, work, port, keyed
        self.meta, self.data = os.path.join(work, "meta"), os.path.join(work, "data")
        self.key = os.path.join(work, "cluster.key")
        self.daemons, self.logs, self.mnts = [], [], []
        self.env = dict(os.environ, OUTRIDER_STATE_DIR=os.path.join(work, "state"),
                        OUTRIDER_LOG="info")

    def run(self, *args, **kw):
        return subprocess.run([self.binary, *args], env=self.env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)

    def make(self):
        for path in (self.meta, self.data):
            with open(path, "wb") as f:
                f.truncate(12 << 30)
        args = ["mkfs", "-f", "-A"]
        for slot, host in enumerate(HOSTS):
            args += ["-Q", f"{slot},{host},{self.port}"]
        if self.keyed:
            if os.path.exists(self.key):
                os.unlink(self.key)
            made = self.run("keygen", self.key)
            if made.returncode:
                sys.exit(f"keygen: {made.stderr}")
            args += ["--cluster-key", self.key]
        made = self.run(*args, self.meta, self.data)
        if made.returncode:
            sys.exit(f"mkfs: {made.stderr}")

    def options(self, slot, key):
        options = f"metadev_path={self.meta},quorum_slot_nr={slot}"
        return options + (f",cluster_key={key}" if key else "")

    def mount(self):
        for slot in range(len(HOSTS)):
            mnt = os.path.join(self.work, f"mnt{slot}")
            os.makedirs(mnt, exist_ok=True)
            log = open(os.path.join(self.work, f"log{slot}"), "w")
            options = self.options(slot, self.key if self.keyed else None)
            self.daemons.append(subprocess.Popen(
                [self.binary, "mount", "--foreground", "-o", options, self.data, mnt],
                env=self.env, stdout=log, stderr=log))
            self.logs.append(log.name)
            self.mnts.append(mnt)
        deadline = time.time() + 120
        while not all(os.path.ismount(mnt) for mnt in self.mnts):
            if self.died() or time.time() > deadline:
                sys.exit("not mounted: " + self.log()[-2000:])
            time.sleep(0.05)

    def died(self):
        return [d.pid for d in self.daemons if d.poll() is not None]

    def log(self):
        return "".join(open(log, errors="replace").read() for log in self.logs)

    def memory(self):
        """Resident memory of the daemons in KiB."""
        out = []
        for daemon in self.daemons:
            with open(f"/proc/{daemon.pid}/status") as f:
                out.append(int(re.search(r"VmRSS:\s*(\d+)", f.read()).group(1)))
        return out

    def descriptors(self):
        return [len(os.listdir(f"/proc/{d.pid}/fd")) for d in self.daemons]

    def kill(self):
        """Leaves nothing behind, whatever went wrong."""
        for daemon, mnt in zip(self.daemons, self.mnts):
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
                subprocess.run(["umount", "-l", mnt], stderr=subprocess.DEVNULL)

    def unmount(self):
        """All at once: the last majority of members leaves together."""
        for daemon in self.daemons:
            daemon.send_signal(signal.SIGTERM)
        ended = []
        for daemon in self.daemons:
            try:
                ended.append(daemon.wait(timeout=120))
            except subprocess.TimeoutExpired:
                daemon.kill()
                ended.append("did not end")
        return ended

    def refusals(self):
        """A mount with another key, or none, is told why and takes part in nothing."""
        if not self.keyed:
            return []
        other = os.path.join(self.work, "other.key")
        if not os.path.exists(other):
            self.run("keygen", other)
        wrong = []
        mnt = os.path.join(self.work, "mnt-refused")
        os.makedirs(mnt, exist_ok=True)
        for key, told in ((other, "cluster key is"), (None, "has a cluster key")):
            options = self.options(0, key).replace("quorum_slot_nr=0,", "")
            options = options.replace(",quorum_slot_nr=0", "")
            got = self.run("mount", "--foreground", "-o", options, self.data, mnt, timeout=60)
            if got.returncode == 0 or told not in got.stderr:
                wrong.append(f"a mount with the key {key} was not refused: {got.stderr}")
        return wrong


class User(threading.Thread):
    """Works in one mount, looks at it from another one, notes how long each turn takes."""

    def __init__(self, nr, mnts, cross):
        super().__init__(daemon=True)
        self.nr, self.mnts, self.cross = nr, mnts, cross
        self.errors, self.delays = [], []
        self.stopped = threading.Event()

    def run(self):
        rng = random.Random(self.nr)
        own = os.path.join(self.mnts[self.nr], f"user{self.nr}")
        other = os.path.join(self.mnts[(self.nr + 1) % len(self.mnts)], f"user{self.nr}")
        os.makedirs(own, exist_ok=True)
        count = 0
        while not self.stopped.is_set():
            begin = time.monotonic()
            try:
                name = f"f{count % 200}"
                content = rng.randbytes(rng.choice([10, 4096, 20_000]))
                with open(os.path.join(own, name + ".tmp"), "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                os.rename(os.path.join(own, name + ".tmp"), os.path.join(own, name))
                with open(os.path.join(own, name), "rb") as f:
                    if f.read() != content:
                        self.errors.append(f"{own}/{name} is not what was written")
                # Each tenth is looked at from another node, which takes its locks there.
                if self.cross and count % 10 == 9 and os.stat(os.path.join(other, name)).st_size != len(content):
                    self.errors.append(f"{other}/{name} is not what was written")
            except OSError as error:
                self.errors.append(f"user {self.nr}: {error}")
                time.sleep(0.2)
            self.delays.append((time.monotonic(), time.monotonic() - begin))
            count += 1
            time.sleep(0.02)


class Attack:
    """All attacks of one kind until the deadline; counts what was done."""

    def __init__(self, cluster, deadline):
        self.targets = [(host, cluster.port) for host in HOSTS]
        self.deadline, self.count = deadline, 0
        self.rng = random.Random(7)
        self.held = []

    def over(self):
        return time.monotonic() >= self.deadline

    def connect(self):
        s = socket.socket()
        s.settimeout(0.5)
        try:
            s.bind((ATTACKER, 0))
            s.connect(self.rng.choice(self.targets))
        except OSError:
            s.close()
            return None
        self.count += 1
        return s

    def hold(self, s):
        self.held.append(s)
        if len(self.held) > SOCKETS_MAX:
            self.held.pop(0).close()

    def greeting(self, fsid):
        header = struct.pack("<QQQHBBB3x", 1, 0, 1, 40, 0, 0, 0)
        return header + struct.pack("<QQQQQ", fsid, 2, 0, self.rng.getrandbits(63) | 1, 2)

    def garbage(self):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((ATTACKER, 0))
        while not self.over():
            s = self.connect()
            if s is None:
                time.sleep(0.01)
                continue
            kind = self.rng.randrange(5)
            data = self.rng.randbytes(self.rng.choice([1, 31, 32, 72, 1500, 20_000]))
            if kind == 1:
                data = struct.pack("<QQQHBBB3x", 1, 0, 1, 1100, 7, 0, 0) + data
            elif kind == 2:
                data = self.greeting(self.rng.getrandbits(64))
            elif kind == 3:
                data = b"GET / HTTP/1.0\r\n\r\n"
            elif kind == 4:
                data = b"ORNOISE1" + data
            try:
                s.sendall(data)
                if self.rng.random() < 0.5:
                    s.recv(100)
            except OSError:
                pass
            s.close()
            for _ in range(5):
                size = self.rng.choice([0, 1, 32, 96, 1400])
                udp.sendto(self.rng.randbytes(size), self.rng.choice(self.targets))
                self.count += 1
            time.sleep(0.002)

    def flood(self):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((ATTACKER, 0))
        junk = [self.rng.randbytes(n) for n in (32, 96, 1200)]
        while not self.over():
            for _ in range(50):
                s = self.connect()
                if s is not None:
                    self.hold(s)
            for _ in range(1000):
                try:
                    udp.sendto(self.rng.choice(junk), self.rng.choice(self.targets))
                    self.count += 1
                except OSError:
                    pass
            # A bounded flood: it is to be survived, not to measure this machine.
            time.sleep(0.01)

    def slow(self):
        while not self.over():
            s = self.connect()
            if s is not None:
                kind = self.rng.randrange(3)
                try:
                    if kind == 0:
                        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                        s.sendall(self.greeting(self.rng.getrandbits(64))[:50])
                    elif kind == 1:
                        s.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                self.hold(s)
            for s in self.held[::20]:
                try:
                    s.send(b"\0")
                except OSError:
                    pass
            time.sleep(0.05)

    def keys(self):
        """A node of another cluster: its handshake, a replayed first message, its datagrams."""
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((ATTACKER, 0))
        while not self.over():
            s = self.connect()
            if s is not None:
                try:
                    s.sendall(b"ORNOISE1" + self.rng.randbytes(48))
                    s.recv(100)
                    s.sendall(self.rng.randbytes(200))
                except OSError:
                    pass
                s.close()
            host, port = self.rng.choice(self.targets)
            head = b"ORQ1" + struct.pack("<I", self.rng.randrange(3))
            for addr in (self.rng.choice(HOSTS), host):
                ip = struct.unpack(">I", socket.inet_aton(addr))[0]
                head += struct.pack("<IH", ip, port)
            head += struct.pack("<IQQ", 0, self.rng.getrandbits(64), self.count + 1)
            udp.sendto(head + self.rng.randbytes(56), (host, port))
            # And without any key, as the original speaks, with a term that would win.
            plain = struct.pack("<QQQBB2x", 0, 0, 1 << 40, self.rng.randrange(4), 1)
            udp.sendto(plain + self.rng.randbytes(4), (host, port))
            self.count += 2
            time.sleep(0.01)

    def replay(self, recorded):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((ATTACKER, 0))
        datagrams, streams = recorded
        while not self.over():
            for to, data in self.rng.sample(datagrams, min(100, len(datagrams))):
                udp.sendto(data, to)
                # And to the others, for whom it was not meant.
                udp.sendto(data, self.rng.choice(self.targets))
                self.count += 2
            if streams:
                s = self.connect()
                if s is not None:
                    try:
                        s.sendall(self.rng.choice(streams))
                        s.recv(100)
                    except OSError:
                        pass
                    s.close()
            time.sleep(0.05)


def record(port, seconds, recorded):
    """Records the cluster's traffic from the loopback interface."""
    datagrams, streams = [], {}
    try:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    except (OSError, AttributeError):
        return
    raw.bind(("lo", 0))
    raw.settimeout(0.2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            packet = raw.recv(65536)
        except socket.timeout:
            continue
        head = (packet[0] & 15) * 4
        sport, dport = struct.unpack(">HH", packet[head:head + 4])
        to = (socket.inet_ntoa(packet[16:20]), dport)
        if dport != port or to[0] not in HOSTS:
            continue
        if packet[9] == 17 and len(datagrams) < 5000:
            datagrams.append((to, packet[head + 8:]))
        elif packet[9] == 6:
            offset = (packet[head + 12] >> 4) * 4
            streams.setdefault(sport, bytearray()).extend(packet[head + offset:])
    recorded[0].extend(datagrams)
    recorded[1].extend(bytes(s[:60_000]) for s in streams.values() if s)


def percentile(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * part))] if values else 0.0


def leaders(log):
    """Elections that the log tells of."""
    return len(re.findall(r'event="elect"', re.sub(r"\x1b\[[0-9;]*m", "", log)))


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("binary")
    args.add_argument("work")
    args.add_argument("--minutes", type=float, default=10)
    args.add_argument("--port", type=int, default=21400)
    args.add_argument("--no-key", action="store_true")
    args.add_argument("--cross", action="store_true",
                      help="users look at each other's files from their own mounts")
    args.add_argument("--json", action="store_true")
    args = args.parse_args()
    work = os.path.abspath(args.work)
    os.makedirs(work, exist_ok=True)
    cluster = Cluster(os.path.abspath(args.binary), work, args.port, not args.no_key)
    cluster.make()
    atexit.register(cluster.kill)
    recorded = ([], [])
    # From before the first mount, so that handshakes and elections are recorded too.
    recorder = threading.Thread(target=record, args=(args.port, 25, recorded), daemon=True)
    recorder.start()
    cluster.mount()
    users = [User(nr, cluster.mnts, args.cross) for nr in range(len(HOSTS))]
    wrong, report = [], []
    try:
        for user in users:
            user.start()
        recorder.join()
        elected = leaders(cluster.log())
        seconds = args.minutes * 60 / len(PHASES)
        for phase in PHASES:
            begin = time.monotonic()
            before = cluster.memory()
            attack = Attack(cluster, begin + seconds)
            if phase == "calm":
                time.sleep(seconds)
            elif phase == "replay":
                attack.replay(recorded)
            else:
                getattr(attack, phase)()
            peak = max(cluster.descriptors())
            for s in attack.held:
                s.close()
            done = [d for user in users for at, d in user.delays if at >= begin]
            grown = max(now - was for was, now in zip(before, cluster.memory()))
            row = {
                "phase": phase, "seconds": round(time.monotonic() - begin), "sent": attack.count,
                "user_calls": len(done),
                "median_ms": round(percentile(done, 0.5) * 1000, 1),
                "p99_ms": round(percentile(done, 0.99) * 1000, 1),
                "worst_ms": round(max(done, default=0) * 1000, 1),
                "errors": sum(len(user.errors) for user in users),
                "memory_kib": cluster.memory(), "grown_kib": grown, "descriptors": peak,
            }
            report.append(row)
            note("  ".join(f"{k} {v}" for k, v in row.items()))
            if cluster.died():
                wrong.append(f"{phase}: a daemon died")
                break
            if not done:
                wrong.append(f"{phase}: no user's call ended")
            if phase != "calm" and grown > GROWTH_MAX_KIB + max(0, report[0]["grown_kib"]):
                wrong.append(f"{phase}: memory grew by {grown} KiB")
        wrong += cluster.refusals()
        log = cluster.log()
        if leaders(log) != elected:
            wrong.append(f"{leaders(log) - elected} elections during the attacks")
        if "fencing" in log.lower() and "declared dead" in log:
            wrong.append("somebody was fenced")
        expected = ["connection dropped"]
        if cluster.keyed:
            expected += ["quorum datagram dropped: not made with this cluster's key",
                         "does not use a cluster key", "another cluster key"]
            if recorded[0]:
                expected.append("quorum datagram dropped: repeated")
        wrong += [f"the log does not say {text!r}" for text in expected if text not in log]
        if len(log) > 4 << 20:
            wrong.append(f"the logs have {len(log)} bytes")
    finally:
        for user in users:
            user.stopped.set()
        for user in users:
            user.join(timeout=30)
        ended = cluster.unmount()
    if any(ended):
        wrong.append(f"the daemons ended with {ended}")
    for user in users:
        wrong += user.errors[:3]
    check = cluster.run("check", cluster.meta, cluster.data)
    if check.returncode:
        wrong.append(f"check: {check.stdout}{check.stderr}")
    result = {"keyed": cluster.keyed, "recorded": [len(recorded[0]), len(recorded[1])],
              "phases": report, "wrong": wrong}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print("wrong:\n  " + "\n  ".join(wrong) if wrong else "no user noticed anything")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

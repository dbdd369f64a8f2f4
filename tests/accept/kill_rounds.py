#!/usr/bin/env python3
"""Kills the daemon under a writer, again and again, and looks at what is left.

usage: kill_rounds.py OUTRIDER_BINARY WORK_DIR [ROUNDS]

Each round: mount, let writers run that fsync and note what they synced, `kill -9`
the daemon at a random moment, run `outrider check`, mount again, and compare every
noted file. Exits 0 if nothing that was synced is missing or different.
"""
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time


def sh(*args, **kw):
    return subprocess.run(args, check=True, **kw)


class Volume:
    def __init__(self, binary, work):
        self.binary, self.work = binary, work
        self.meta, self.data = os.path.join(work, "meta"), os.path.join(work, "data")
        self.mnt = os.path.join(work, "mnt")
        self.daemon = None

    def make(self):
        os.makedirs(self.mnt, exist_ok=True)
        for path in (self.meta, self.data):
            with open(path, "wb") as f:
                f.truncate(64 << 30)
        sh(self.binary, "mkfs", "-f", "-Q", "0,127.0.0.1,47123", self.meta, self.data,
           stdout=subprocess.DEVNULL)

    def mount(self):
        options = f"metadev_path={self.meta},quorum_slot_nr=0,quorum_heartbeat_timeout_ms=2000"
        self.daemon = subprocess.Popen(
            [self.binary, "mount", "--foreground", "-o", options, self.data, self.mnt])
        deadline = time.time() + 60
        while not os.path.ismount(self.mnt):
            if self.daemon.poll() is not None or time.time() > deadline:
                sys.exit("the volume was not mounted")
            time.sleep(0.02)

    def kill(self):
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        subprocess.run(["umount", "-l", self.mnt], stderr=subprocess.DEVNULL)

    def unmount(self):
        sh(self.binary, "umount", self.mnt)
        self.daemon.wait(timeout=60)

    def check(self):
        return subprocess.run([self.binary, "check", self.meta, self.data],
                              stdout=subprocess.PIPE, text=True)


def writer(mnt, nr, round_nr, synced, stop):
    """Makes, rewrites, renames and fsyncs files; notes what fsync promised."""
    rng = random.Random(round_nr * 100 + nr)
    count = 0
    try:
        top = os.path.join(mnt, f"w{nr}")
        os.makedirs(top, exist_ok=True)
        while not stop.is_set():
            content = rng.randbytes(rng.choice([10, 4096, 5000, 70_000, 600_000]))
            path = os.path.join(top, f"r{round_nr}-{count}")
            with open(path + ".tmp", "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.rename(path + ".tmp", path)
            fd = os.open(top, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            synced[path] = hashlib.sha256(content).hexdigest()
            if rng.random() < 0.2 and count > 3:
                gone = os.path.join(top, f"r{round_nr}-{rng.randrange(count)}")
                # From here on it may be there or not.
                if synced.pop(gone, None) is not None:
                    os.unlink(gone)
            count += 1
    except OSError:
        pass  # the daemon is gone


def verify(synced):
    wrong = []
    for path, digest in synced.items():
        try:
            with open(path, "rb") as f:
                if hashlib.sha256(f.read()).hexdigest() != digest:
                    wrong.append(f"{path}: contents differ")
        except OSError as error:
            wrong.append(f"{path}: {error}")
    return wrong


def main():
    binary, work = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 50
    volume = Volume(binary, work)
    volume.make()
    synced = {}
    recovery = []
    for round_nr in range(rounds):
        begin = time.time()
        volume.mount()
        recovery.append(time.time() - begin)
        wrong = verify(synced)
        if wrong:
            sys.exit(f"round {round_nr}: lost after a crash:\n" + "\n".join(wrong[:10]))
        stop = threading.Event()
        threads = [threading.Thread(target=writer, args=(volume.mnt, nr, round_nr, synced, stop))
                   for nr in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0.05, 1.5))
        volume.kill()
        stop.set()
        for thread in threads:
            thread.join()
        check = volume.check()
        if check.returncode != 0:
            sys.exit(f"round {round_nr}: check says\n{check.stdout}")
        print(f"round {round_nr}: {len(synced)} files promised, check clean", flush=True)
    volume.mount()
    wrong = verify(synced)
    volume.unmount()
    check = volume.check()
    if wrong or check.returncode != 0:
        sys.exit("at the end: " + "\n".join(wrong[:10]) + check.stdout)
    recovery.sort()
    print(f"{rounds} rounds, {len(synced)} synced files whole, check clean; "
          f"mount after a crash took {recovery[len(recovery) // 2]:.2f} s (median), "
          f"{recovery[-1]:.2f} s (worst)")


if __name__ == "__main__":
    main()

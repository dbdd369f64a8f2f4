#!/usr/bin/env python3
"""Mounts in all the ways there are, for real, and reads what is said when it fails.

usage: mounts.py OUTRIDER_BINARY WORK_DIR [PORT]

Needs root, /dev/fuse, fusermount3, losetup, unshare and overlayfs. Uses two ports
from PORT (47300) on. Tries: an unprivileged user's mount, loop devices as devices of
the volume, `mount -t` and `umount` with this program as their helper (in a mount
namespace of its own), what umount says about how the daemon ended, and mistakes at
mount time. WORK_DIR has to be reachable by user nobody. Exits 0 if all is as it
should be, 1 with the list of what is not.
"""
import os
import shutil
import signal
import subprocess
import sys
import time

GIB = 1 << 30
problems = []


def check(what, fine, said=""):
    print(f"{'ok' if fine else 'WRONG':6} {what}", flush=True)
    if not fine:
        problems.append(f"{what}: {said}")


def run(*args, **kw):
    kw.setdefault("timeout", 120)
    return subprocess.run(args, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, **kw)


def must(*args, **kw):
    done = run(*args, **kw)
    if done.returncode != 0:
        sys.exit(f"{' '.join(args)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


class Volume:
    def __init__(self, binary, work, name, port):
        self.binary, self.dir = binary, os.path.join(work, name)
        self.mnt, self.port = os.path.join(self.dir, "mnt"), port
        os.makedirs(self.mnt)
        self.meta, self.data = os.path.join(self.dir, "meta"), os.path.join(self.dir, "data")
        for path in (self.meta, self.data):
            with open(path, "wb") as f:
                f.truncate(64 * GIB)

    def mkfs(self):
        must(self.binary, "mkfs", "-f", "-Q", f"0,127.0.0.1,{self.port}", self.meta, self.data)

    def options(self, **more):
        options = {"metadev_path": self.meta, "quorum_slot_nr": "0",
                   "quorum_heartbeat_timeout_ms": "2000", **more}
        return ",".join(f"{key}={value}" for key, value in options.items() if value is not None)

    def mount(self, data=None, mnt=None, **more):
        return run(self.binary, "mount", "-o", self.options(**more),
                   data or self.data, mnt or self.mnt)

    def umount(self, *flags):
        return run(self.binary, "umount", *flags, self.mnt)

    def daemon(self):
        """The pid of the daemon, from the options that it was started with."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    args = f.read().split(b"\0")
            except OSError:
                continue
            if b"--foreground" in args and self.mnt.encode() in args:
                return int(pid)
        return None

    def is_clean(self):
        return run(self.binary, "check", self.meta, self.data)

    def file(self, name):
        return os.path.join(self.mnt, name)


def write(path, text):
    with open(path, "w") as f:
        f.write(text)


def read(path):
    with open(path) as f:
        return f.read()


def unprivileged(binary, work):
    home = os.path.join(work, "nobody")
    os.makedirs(home)
    shutil.chown(home, "nobody")
    env = {"PATH": os.environ["PATH"], "HOME": home}
    volume = os.path.join(home, "volume")
    mnt = os.path.join(volume, "mnt/0")

    become = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"]

    def as_nobody(*args):
        return run(*become, *args, env=env)

    def up():
        daemon = subprocess.Popen([*become, binary, "up", volume],
                                  env=env, text=True, stdout=subprocess.PIPE)
        for line in daemon.stdout:
            if line.startswith("ready"):
                return daemon
        return None

    homeless = run(*become, binary, "up", volume, env=dict(env, HOME="/nonexistent"))
    check("nobody: a home that is not there is named",
          homeless.returncode != 0 and "/nonexistent" in homeless.stdout, homeless.stdout)
    daemon = up()
    check("nobody: `outrider up` mounts by fusermount3", daemon is not None)
    if daemon is None:
        return
    said = as_nobody("sh", "-c", f"echo hello > {mnt}/f && mkdir {mnt}/d && cat {mnt}/f")
    check("nobody: writes and reads", said.stdout == "hello\n", said.stdout)
    said = as_nobody("stat", "-c", "%U", f"{mnt}/f")
    check("nobody: owns the file", said.stdout == "nobody\n", said.stdout)
    try:
        os.stat(mnt)
        check("nobody: others, root too, are kept out", False)
    except PermissionError:
        check("nobody: others, root too, are kept out", True)
    said = as_nobody(binary, "umount", mnt)
    check("nobody: unmounts", said.returncode == 0, said.stdout)
    check("nobody: the daemon ends well", daemon.wait(60) == 0)
    daemon = up()
    said = as_nobody("cat", f"{mnt}/f")
    check("nobody: finds it again", said.stdout == "hello\n", said.stdout)
    daemon.terminate()
    check("nobody: SIGTERM unmounts", daemon.wait(60) == 0)
    check("nobody: nothing is left mounted", not os.path.ismount(mnt))


def loops(binary, work, port):
    volume = Volume(binary, work, "loop", port)
    files = (volume.meta, volume.data)
    devices = [must("losetup", "-f", "--show", path).strip() for path in files]
    try:
        volume.meta, volume.data = devices
        volume.mkfs()
        said = volume.mount()
        check("loop devices: mount", said.returncode == 0, said.stdout)
        with open(volume.file("big"), "wb") as f:
            f.write(b"x" * 50_000_000)
            os.fsync(f.fileno())
        busy = run(binary, "mkfs", "-f", "-Q", f"0,127.0.0.1,{port}", *devices)
        check("loop devices: mkfs refuses a mounted volume", busy.returncode != 0, busy.stdout)
        said = volume.umount()
        check("loop devices: umount", said.returncode == 0, said.stdout)
        said = volume.is_clean()
        check("loop devices: check", said.returncode == 0, said.stdout)
        said = volume.mount()
        same = read(volume.file("big")) == "x" * 50_000_000 if said.returncode == 0 else False
        check("loop devices: it is there again", same, said.stdout)
        check("loop devices: umount again", volume.umount().returncode == 0)
    finally:
        for device in devices:
            run("losetup", "-d", device)


def helpers(binary, work, port):
    """`mount -t fuse.outrider` and `umount`, with /sbin seen only by this test."""
    volume = Volume(binary, work, "helper", port)
    volume.mkfs()
    for name in ("upper", "work"):
        os.makedirs(os.path.join(work, name))
    script = f"""
        set -e
        sbin=$(readlink -f /sbin)
        mount -t tmpfs tmpfs {work}/upper
        mkdir {work}/upper/u {work}/upper/w
        mount -t overlay -o lowerdir=$sbin,upperdir={work}/upper/u,workdir={work}/upper/w o $sbin
        ln -s {binary} $sbin/mount.fuse.outrider
        ln -s {binary} $sbin/umount.fuse.outrider
        mount -t fuse.outrider -o _netdev,{volume.options()} {volume.data} {volume.mnt}
        findmnt -n -o FSTYPE,SOURCE {volume.mnt}
        echo hello > {volume.mnt}/f
        umount {volume.mnt}
        {binary} check {volume.meta} {volume.data} > /dev/null && echo clean
        for round in 1 2 3 4 5 6; do
            mount -t fuse.outrider -o {volume.options()} {volume.data} {volume.mnt}
            echo $round >> {volume.mnt}/f
            umount {volume.mnt}
        done
        mount -t fuse.outrider -o {volume.options()} {volume.data} {volume.mnt}
        tr '\\n' ' ' < {volume.mnt}/f
        umount {volume.mnt}
        ! mount -t fuse.outrider -o metadev_path=/nowhere {volume.data} {volume.mnt}
    """
    said = run("unshare", "-m", "sh", "-c", script)
    lines = said.stdout.splitlines()
    check("helpers: mount -t fuse.outrider and umount",
          said.returncode == 0, said.stdout)
    check("helpers: a mount waits for the daemon before it, whatever umount(8) did",
          "hello 1 2 3 4 5 6 " in said.stdout, said.stdout)
    check("helpers: the type and the source are shown",
          any(line.split() == ["fuse.outrider", volume.data] for line in lines), said.stdout)
    check("helpers: umount waits until the daemon has committed", "clean" in lines, said.stdout)
    check("helpers: a failed mount says what is wrong", "/nowhere" in said.stdout, said.stdout)


def words(volume):
    """What umount says about how the daemon ended."""
    said = volume.mount()
    check("umount: first mount", said.returncode == 0, said.stdout)
    write(volume.file("kept"), "kept")
    fd = os.open(volume.file("kept"), os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    said = volume.umount("-f")
    check("umount -f: ends an idle mount, and says what that means",
          said.returncode == 0 and "lost" in said.stdout, said.stdout)
    said = volume.mount()
    kept = said.returncode == 0 and read(volume.file("kept")) == "kept"
    check("umount -f: the next mount fences it and finds what was synced", kept, said.stdout)
    os.kill(volume.daemon(), signal.SIGKILL)
    time.sleep(1)
    said = volume.umount()
    check("umount: a killed daemon is no success",
          said.returncode != 0 and "killed" in said.stdout, said.stdout)
    said = volume.mount()
    check("umount: mount after the kill", said.returncode == 0, said.stdout)
    busy = os.open(volume.file("kept"), os.O_RDONLY)
    said = volume.umount()
    check("umount: a busy mount stays", said.returncode != 0 and "busy" in said.stdout, said.stdout)
    os.close(busy)
    said = volume.umount()
    check("umount: clean", said.returncode == 0 and not said.stdout, said.stdout)
    said = volume.is_clean()
    check("umount: the volume checks clean", said.returncode == 0, said.stdout)
    said = volume.umount()
    check("umount: nothing is mounted there", said.returncode != 0 and volume.mnt in said.stdout,
          said.stdout)


def mistakes(volume):
    def refused(what, said, *names):
        fine = said.returncode != 0 and all(name in said.stdout for name in names)
        check(f"mistake: {what}", fine and not os.path.ismount(volume.mnt),
              f"exit {said.returncode}: {said.stdout}")

    refused("no such metadata device", volume.mount(metadev_path="/nowhere"), "/nowhere")
    refused("no metadata device", volume.mount(metadev_path=None), "metadev_path")
    refused("no such data device", volume.mount(data="/nowhere"), "/nowhere")
    refused("no such directory", volume.mount(mnt=volume.dir + "/no"), volume.dir + "/no")
    refused("a file as mount point", volume.mount(mnt="/etc/passwd"), "/etc/passwd")
    refused("the devices swapped", volume.mount(data=volume.meta, metadev_path=volume.data))
    refused("one device twice", volume.mount(data=volume.meta))
    refused("an unknown option", volume.mount(nonsense="1"), "nonsense")
    refused("a slot that is not configured", volume.mount(quorum_slot_nr="5"), "5")
    refused("a slot that is no number", volume.mount(quorum_slot_nr="x"), "quorum_slot_nr")
    empty = os.path.join(volume.dir, "empty")
    with open(empty, "wb") as f:
        f.truncate(64 * GIB)
    refused("a device without a volume", volume.mount(metadev_path=empty))
    taken = subprocess.Popen([sys.executable, "-c",
                              f"import socket,time; s=socket.socket(socket.AF_INET,"
                              f"socket.SOCK_DGRAM); s.bind(('127.0.0.1',{volume.port}));"
                              f"print('ok',flush=True); time.sleep(600)"],
                             stdout=subprocess.PIPE)
    taken.stdout.readline()
    refused("a port that is taken", volume.mount(), "slot 0")
    taken.kill()
    taken.wait()
    said = volume.is_clean()
    check("mistakes leave the volume clean", said.returncode == 0, said.stdout)
    said = volume.mount()
    check("mistake: then it mounts", said.returncode == 0, said.stdout)
    said = volume.mount()
    check("mistake: the same volume and directory twice",
          said.returncode != 0 and volume.mnt in said.stdout, said.stdout)
    other = os.path.join(volume.dir, "other")
    os.makedirs(other)
    said = volume.mount(mnt=other)
    check("mistake: the same slot twice", said.returncode != 0 and "slot 0" in said.stdout,
          said.stdout)
    write(volume.file("alive"), "alive")
    check("the first mount lives on", read(volume.file("alive")) == "alive")
    said = volume.umount()
    check("and ends well", said.returncode == 0, said.stdout)
    said = volume.is_clean()
    check("and is clean", said.returncode == 0, said.stdout)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    work, port = os.path.abspath(sys.argv[2]), int((sys.argv + ["47300"])[3])
    os.makedirs(work, exist_ok=True)
    os.chmod(work, 0o755)
    binary = shutil.copy(sys.argv[1], os.path.join(work, "outrider"))
    os.chmod(binary, 0o755)
    os.environ["OUTRIDER_STATE_DIR"] = os.path.join(work, "state")
    volume = Volume(binary, work, "plain", port + 1)
    volume.mkfs()
    mistakes(volume)
    words(volume)
    loops(binary, work, port)
    helpers(binary, work, port)
    del os.environ["OUTRIDER_STATE_DIR"]
    unprivileged(binary, work)
    if problems:
        print("\n".join(["", f"{len(problems)} problems:", *problems]), file=sys.stderr)
        sys.exit(1)
    print("all as it should be")


if __name__ == "__main__":
    main()

"""Several mounts of one volume on this machine, each a process on its own loopback
address: what the long scripts beside this file share.

What can go wrong: a case that hangs takes its mount with it. Cases run in processes
of their own with a time limit, and a mount is killed, never waited for, at the end.
"""
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback

SMALL = 64 << 30
MNT_FORCE, MNT_DETACH = 1, 2
libc = ctypes.CDLL(None, use_errno=True)


def wait_until(done, seconds, what):
    """Waits for a condition; fails with what was waited for."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.02)


class Cluster:
    """A volume and its mounts. `loop` puts loop devices over the two files."""

    def __init__(self, binary, work, port, nodes=3, heartbeat_ms=2000, loop=False,
                 options="", mkfs=(), data_bytes=SMALL, members=None,
                 meta_bytes=SMALL):
        self.binary, self.work, self.port = binary, work, port
        self.nodes, self.heartbeat_ms, self.loop = nodes, heartbeat_ms, loop
        self.options, self.mkfs, self.data_bytes = options, list(mkfs), data_bytes
        self.meta_bytes = meta_bytes
        # Mounts of the lowest numbers are quorum members, the others plain clients.
        self.members = nodes if members is None else members
        self.run_dir = os.path.join(work, "run")
        self.procs = [None] * nodes
        self.loops = []

    def mnt(self, node):
        return os.path.join(self.work, f"m{node}")

    def mounts(self):
        return [self.mnt(node) for node in range(self.nodes)]

    def address(self, node):
        return f"127.0.0.{node + 1}"

    def make(self):
        os.makedirs(self.work, exist_ok=True)
        self.meta = os.path.join(self.work, "meta")
        self.data = os.path.join(self.work, "data")
        for path, size in ((self.meta, self.meta_bytes), (self.data, self.data_bytes)):
            with open(path, "wb") as f:
                f.truncate(size)
        if self.loop:
            for name in ("meta", "data"):
                made = subprocess.run(["losetup", "--find", "--show", getattr(self, name)],
                                      check=True, stdout=subprocess.PIPE, text=True)
                self.loops.append(made.stdout.strip())
                setattr(self, name, self.loops[-1])
        slots = []
        for node in range(self.nodes):
            if node < self.members:
                slots += ["-Q", f"{node},{self.address(node)},{self.port}"]
            os.makedirs(self.mnt(node), exist_ok=True)
        subprocess.run([self.binary, "mkfs", "-f", "-A", *self.mkfs, *slots, self.meta, self.data],
                       check=True, stdout=subprocess.DEVNULL)

    def command(self, node, options):
        return [self.binary, "mount", "--foreground", "-o", options, self.data, self.mnt(node)]

    def start(self, node):
        """Starts a mount without waiting for it."""
        options = (f"metadev_path={self.meta},run_dir={self.run_dir},"
                   f"quorum_heartbeat_timeout_ms={self.heartbeat_ms}")
        if node < self.members:
            options += f",quorum_slot_nr={node}"
        if self.options:
            options += "," + self.options
        log = open(os.path.join(self.work, f"log{node}"), "ab")
        self.procs[node] = subprocess.Popen(self.command(node, options), stdout=log, stderr=log)
        log.close()

    def is_up(self, node):
        proc = self.procs[node]
        if proc is None:
            return False
        if proc.poll() is not None:
            raise RuntimeError(f"mount {node} ended with {proc.returncode}, see log{node}")
        with open("/proc/self/mounts") as table:
            return any(line.split()[1] == os.path.realpath(self.work) + f"/m{node}"
                       for line in table)

    def wait_up(self, node, seconds=60):
        wait_until(lambda: self.is_up(node), seconds, f"mount {node}")

    def up(self):
        """Starts all mounts. A majority is needed, so they start together."""
        for node in range(self.nodes):
            if self.procs[node] is None:
                self.start(node)
        for node in range(self.nodes):
            self.wait_up(node)

    def pid(self, node):
        return self.procs[node].pid

    def leader(self):
        """The mount whose server listens, or None."""
        for node, proc in enumerate(self.procs):
            if proc is not None and self.listens(node):
                return node
        return None

    def shown_dir(self, node):
        """The runtime directory of a mount."""
        for name in os.listdir(self.run_dir):
            path = os.path.join(self.run_dir, name)
            try:
                with open(os.path.join(path, "pid")) as f:
                    if int(f.read()) == self.pid(node):
                        return path
            except (FileNotFoundError, NotADirectoryError, ValueError):
                pass  # of a mount that comes or goes just now
        raise FileNotFoundError(f"the runtime directory of mount {node}")

    def shown(self, node, name):
        """What a file of a mount's runtime directory says.

        Counters come a moment after the mount: a thread of their own writes them.
        """
        path = os.path.join(self.shown_dir(node), name)
        wait_until(lambda: os.path.exists(path), 10, path)
        with open(path) as f:
            return f.read()

    def rid(self, node):
        return self.shown(node, "rid").strip()

    def says_it_leads(self):
        """The mounts whose runtime directory says that they lead."""
        alive = [n for n in range(self.members) if self.procs[n] is not None]
        return [n for n in alive if self.shown(n, "quorum/is_leader") == "1"]

    def force_unmount(self, node, seconds=30):
        """The mount ends at once and loses what was not synced.

        By the kernel's `abort` file: `umount -f` of a mount that nobody is waiting on
        can not be told from `umount` by the daemon, which then commits.
        """
        proc, self.procs[node] = self.procs[node], None
        with open("/proc/self/mountinfo") as table:
            device = [line.split()[2] for line in table if line.split()[4] == self.mnt(node)]
        with open(f"/sys/fs/fuse/connections/{device[-1].split(':')[1]}/abort", "w") as f:
            f.write("1")
        try:
            proc.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.procs[node] = proc
            raise TimeoutError(f"mount {node} goes on after its end") from None
        self.detach(node)

    def listens(self, node):
        try:
            with open(f"/proc/{self.pid(node)}/net/tcp") as table:
                lines = table.readlines()[1:]
        except OSError:
            return False
        octets = [int(part) for part in self.address(node).split(".")]
        local = "".join(f"{part:02X}" for part in reversed(octets)) + f":{self.port:04X}"
        return any(line.split()[1] == local and line.split()[3] == "0A" for line in lines)

    def kill(self, node):
        """kill -9, and takes what it left mounted away."""
        proc, self.procs[node] = self.procs[node], None
        if proc is None:
            return
        proc.send_signal(signal.SIGKILL)
        self.detach(node)
        proc.wait()

    def detach(self, node):
        # By force: a thread of the daemon may be in the kernel, waiting for a page
        # that is locked until a request of this mount ends, and keep it alive.
        path = self.mnt(node).encode()
        libc.umount2(path, MNT_FORCE)
        libc.umount2(path, MNT_DETACH)

    def unmount(self, node, seconds=60):
        """A clean unmount."""
        proc, self.procs[node] = self.procs[node], None
        proc.send_signal(signal.SIGTERM)
        try:
            code = proc.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.procs[node] = proc
            raise TimeoutError(f"mount {node} did not end within {seconds} s") from None
        if code != 0:
            raise RuntimeError(f"mount {node} ended with {code}, see log{node}")

    def unmount_all(self):
        alive = [node for node in range(self.nodes) if self.procs[node] is not None]
        for node in alive:
            self.procs[node].send_signal(signal.SIGTERM)
        for node in alive:
            proc, self.procs[node] = self.procs[node], None
            try:
                code = proc.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.procs[node] = proc
                raise TimeoutError(f"mount {node} did not end") from None
            if code != 0:
                raise RuntimeError(f"mount {node} ended with {code}, see log{node}")

    def check(self):
        """Problems that `outrider check` reports, none if clean."""
        done = subprocess.run([self.binary, "check", self.meta, self.data],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return [] if done.returncode == 0 else done.stdout.splitlines() or ["failed"]

    def destroy(self):
        """Ends everything, whatever state it is in."""
        for node in range(self.nodes):
            if self.procs[node] is not None:
                self.procs[node].send_signal(signal.SIGCONT)
            self.kill(node)
        for loop in self.loops:
            subprocess.run(["losetup", "-d", loop], stderr=subprocess.DEVNULL)
        self.loops = []
        for name in ("meta", "data"):
            try:
                os.unlink(os.path.join(self.work, name))
            except FileNotFoundError:
                pass


def child(body):
    """Runs `body` in a process; returns its pid. An exception is its exit code 1."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:  # whatever it was, the parent has to hear of it
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def together(*bodies):
    """Runs all at the same time, a process each; fails if one fails."""
    pids = [child(body) for body in bodies]
    failed = 0
    for pid in pids:
        failed += os.waitpid(pid, 0)[1] != 0
    if failed:
        raise AssertionError(f"{failed} of {len(pids)} processes failed")


def limited(body, seconds):
    """Runs `body` in a process group of its own; returns None, or why it failed."""
    def grouped():
        os.setpgid(0, 0)
        body()
    pid = child(grouped)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None if status == 0 else "failed"
        if time.monotonic() > deadline:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(pid, signal.SIGKILL)
            # It may hang in the kernel for ever: it is not waited for.
            return f"hangs ({seconds} s)"
        time.sleep(0.01)


def renameat2(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags) != 0:
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err), old)


def link_open(fd, path):
    """Gives an open file without a name one."""
    if libc.linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, path.encode(), 0x400) != 0:
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err), path)

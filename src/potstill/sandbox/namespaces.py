"""The backend `namespaces`: Linux and Python alone. Warm processes in namespaces of their own fork a child for each program."""

import contextlib
import json
import os
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from potstill.sandbox import seccomp
from potstill.sandbox._watch import Run, Streams, control_pair, rlimits, sealed, watch
from potstill.sandbox.backend import Ended, Job, Unfit, renewed
from potstill.sandbox.interpreter import ENVIRONMENT, FLAGS, USER, becomes, executable, plan
from potstill.sandbox.verdict import Limits

_FOLDER = Path(__file__).parent
_START_S = 30.0
_REMEDIES = {
    "unshare": "allow user namespaces (sysctl user.max_user_namespaces, a container's seccomp profile), or install bubblewrap",
    "mount": "where AppArmor forbids it (Ubuntu 24.04 and later), install bubblewrap with its AppArmor profile",
    "syscall": "Linux 5.12 or later is needed; else install bubblewrap",
}


class Gone(Exception):
    """A zygote no longer answers."""


class Zygote:
    """A warm process: one program at a time.

    Raises:
        Unfit: when its namespaces cannot be made here.
    """

    def __init__(self) -> None:
        ours, theirs = control_pair()
        self.control = ours
        words = [executable(), *FLAGS, str(_FOLDER / "zygote.py"), str(_FOLDER / "guest.py"), str(theirs.fileno())]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,
                )
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self.control.settimeout(_START_S)
        try:
            self.control.send(json.dumps(plan().plain()).encode())
            self._expect(b"u")
            self.control.send(b"two" if _map_users(self.process.pid, becomes()) else b"one")
            self._expect(b"r")
        except OSError as error:
            raise Unfit(f"its process did not start: {error}") from error
        self.control.settimeout(None)

    def _expect(self, word: bytes) -> None:
        heard = self.control.recv(1024)
        if heard != word:
            why = heard[1:].decode("utf-8", "replace") or "its process ended"
            raise Unfit(why, _REMEDIES.get(why.partition("(")[0], ""))

    def run(self, job: Job, limits: Limits) -> Ended:
        """One program, to its end.

        Raises:
            Gone: the process had ended before the program reached it.
        """
        if self.process.poll() is not None:  # the keeper; what it kept ends with it
            raise Gone
        with Streams(job) as streams:
            run = Run(limits, kill=partial(self._say, b"k"))
            self._send(job, limits, streams)
            streams.handed_over()
            return watch(run, streams, {self.control.fileno(): partial(self._hear, run)})

    def _send(self, job: Job, limits: Limits, streams: Streams) -> None:
        words = json.dumps({"limits": rlimits(limits), "disk": limits.disk_mb << 20}).encode()
        sent = [sealed(job.program.encode("utf-8", "surrogatepass")), sealed(seccomp.program())]
        try:
            socket.send_fds(self.control, [words], [*sent, *streams.theirs])
        except OSError as error:
            raise Gone from error
        finally:
            for fd in sent:
                os.close(fd)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it has gone: `_hear` notices
            self.control.send(word)

    def _hear(self, run: Run) -> bool:
        if not run.hear(self.control):
            run.trouble = "the sandbox's process was killed"
        return not run.trouble

    def close(self) -> None:
        """End it and all in it."""
        self.control.close()
        if process := getattr(self, "process", None):
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _map_users(pid: int, user: int | None) -> bool:
    """Say who is who in a new user namespace; whether the superuser is there too, to build the root and then become `user`."""
    if user is not None:
        for name in ("gid_map", "uid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{USER} {user} 1\n")
        return True
    Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/gid_map").write_text(f"{USER} {os.getegid()} 1\n")
    Path(f"/proc/{pid}/uid_map").write_text(f"{USER} {os.geteuid()} 1\n")
    return False


@dataclass(eq=False)
class Namespaces:
    """A pool of warm processes.

    Args:
        workers: programs at a time; None for one less than the cores that this process may use, and at least one.

    Raises:
        Unfit: when namespaces cannot be had here; why, and what would help.
    """

    workers: int | None = None
    name: str = field(default="namespaces", init=False)

    def __post_init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise Unfit("namespaces are Linux's")
        if seccomp.machine() not in seccomp.ARCHITECTURES:
            raise Unfit(f"there is no filter of system calls for {seccomp.machine()}")
        plan()
        self._closed = False
        self._begin()
        self._idle.append(Zygote())
        renewed(self)

    def _begin(self) -> None:
        self._free = threading.Semaphore(self.workers or max(1, len(os.sched_getaffinity(0)) - 1))
        self._lock = threading.Lock()
        self._idle: list[Zygote] = []

    def after_fork(self) -> None:
        theirs = self._idle
        self._begin()
        for zygote in theirs:
            zygote.close()

    def run(self, job: Job, limits: Limits) -> Ended:
        with self._free:
            for _ in range(3):
                zygote = self._take()
                try:
                    ended = zygote.run(job, limits)
                except Gone:  # while it was idle: the program has not run
                    zygote.close()
                    continue
                except BaseException:
                    zygote.close()
                    raise
                self._give_back(zygote, ended)
                return ended
        return Ended(False, None, None, None, b"", b"", 0.0, trouble="the sandbox's processes are killed as soon as they start")

    def _take(self) -> Zygote:
        with self._lock:
            assert not self._closed, "the sandbox is closed"
            if self._idle:
                return self._idle.pop()
        return Zygote()

    def _give_back(self, zygote: Zygote, ended: Ended) -> None:
        with self._lock:
            if not ended.trouble and not self._closed:
                self._idle.append(zygote)
                return
        zygote.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for zygote in idle:
            zygote.close()

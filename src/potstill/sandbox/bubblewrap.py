"""The backend `bubblewrap`: one sandbox of its own for each program, made by `bwrap`; the reference for the others."""

import contextlib
import functools
import importlib.util
import marshal
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from potstill.sandbox import seccomp
from potstill.sandbox._watch import Run, Streams, rlimits, sealed, watch
from potstill.sandbox.backend import Ended, Job, Unfit
from potstill.sandbox.interpreter import DEVICES, ENVIRONMENT, FLAGS, USER, all_may_read, executable, plan
from potstill.sandbox.verdict import Limits

_GUEST = "/run/guest.pyc"
_OLDEST = (0, 8)  # --disable-userns, --size
_SIGKILL = 9


@dataclass
class Bubblewrap:
    """Programs in bubblewrap.

    Attributes:
        version: of bubblewrap.

    Raises:
        Unfit: when it is not installed or too old, or no filter is known for this machine.
    """

    name: str = field(default="bubblewrap", init=False)
    version: str = field(default="", init=False)

    def __post_init__(self) -> None:
        found = shutil.which("bwrap", path="/usr/bin:/bin:/usr/local/bin")
        if found is None:
            raise Unfit("bwrap is not installed", "install the system's package bubblewrap")
        self._command = found
        self.version = _version(found)
        if seccomp.machine() not in seccomp.ARCHITECTURES:
            raise Unfit(f"there is no filter of system calls for {seccomp.machine()}")
        seen = plan()
        # the superuser really becomes another user, where that one can read the interpreter
        drops = os.geteuid() == 0 and all_may_read(seen)
        # where it stays the superuser, without rights, it still owns the machine's devices
        self._filter = seccomp.program(chmod=drops or os.geteuid() != 0)
        self._user = USER if drops else None

    def run(self, job: Job, limits: Limits) -> Ended:
        with contextlib.ExitStack() as stack:
            streams = stack.enter_context(Streams(job))
            began, started = os.pipe()
            stack.callback(os.close, began)
            with contextlib.ExitStack() as given:
                given.callback(os.close, started)
                parts = [sealed(part) for part in (_guest(), self._filter, job.program.encode("utf-8", "surrogatepass"))]
                for fd in parts:
                    given.callback(os.close, fd)
                try:
                    process = self._start(parts, started, streams.theirs, limits)
                except OSError as error:
                    return Ended(False, None, None, None, b"", b"", 0.0, trouble=f"bwrap did not start: {error}")
            streams.handed_over()
            os.set_blocking(began, False)
            stack.callback(_end, process)
            run = Run(limits, kill=process.kill)
            exit_fd = os.pidfd_open(process.pid)
            stack.callback(os.close, exit_fd)
            return watch(run, streams, {began: partial(_hear, run, began), exit_fd: partial(_exited, run, process, began)})

    def _start(self, parts: list[int], started: int, streams: list[int], limits: Limits) -> "subprocess.Popen[bytes]":
        guest, filter, program = parts
        stdin, stdout, stderr, *talk = streams
        words = [self._command, *_arguments(limits.disk_mb << 20), "--ro-bind-data", str(guest), _GUEST, "--remount-ro", "/"]
        numbers = (started, program, filter, *(talk or (-1, -1)), *rlimits(limits))
        words += ["--", executable(), *FLAGS, _GUEST, *map(str, numbers)]
        passed = (*parts, started, *talk)
        # its environment is empty: that of bubblewrap's own first process inside could be read
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=passed,
            env={},
            cwd="/",
            start_new_session=True,
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
        )

    def close(self) -> None:
        """Nothing lives longer than a run."""


def _version(command: str) -> str:
    try:
        told = subprocess.run([command, "--version"], capture_output=True, text=True, env={}, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unfit(f"{command} does not run: {error}") from error
    found = re.search(r"(\d+)\.(\d+)\S*", told)
    if found is None or (int(found[1]), int(found[2])) < _OLDEST:
        raise Unfit(f"{command} is {told.strip() or 'of no version'}", "0.8 or later is needed")
    return found[0]


@functools.cache
def _arguments(disk: int) -> tuple[str, ...]:
    """Namespaces, rights and mounts."""
    seen = plan()
    words = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--uid", str(USER), "--gid", str(USER), "--hostname", "sandbox", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    for path in (*seen.folders, *seen.files):
        words += ["--ro-bind", path, path]
    for path, target in seen.links:
        words += ["--symlink", target, path]
    for path in seen.hidden:
        words += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    for name in DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return (*words, "--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp", "--chdir", "/tmp")


@functools.cache
def _guest() -> bytes:
    """The guest as bytecode: compiling it takes as long as a small program."""
    code = compile(Path(__file__).with_name("guest.py").read_text(encoding="utf-8"), "guest.py", "exec")
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _hear(run: Run, fd: int) -> bool:
    try:
        heard = os.read(fd, 1024)
    except BlockingIOError:
        heard = b""
    if heard[:1] == b"s":
        run.began = int(heard[1:]) / 1e9
    elif heard:
        run.trouble = heard[1:].decode("utf-8", "replace")
    return False


def _exited(run: Run, process: "subprocess.Popen[bytes]", began: int) -> bool:
    """bwrap reports the program's end by its own status: 128 + N for signal N, and for a program that calls `exit(128 + N)`."""
    if run.began is None:  # one poll may see the end and not yet the start, which came before it
        _hear(run, began)
    code = process.wait()
    run.ended = time.monotonic()
    if code >= 0:
        run.status = code - 128 if 128 < code <= 192 else code << 8
    elif run.killed is None:
        run.trouble = "bubblewrap was killed"
    else:
        run.status = _SIGKILL
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait()

"""The backend `bubblewrap`: one sandbox of its own for each program, made by `bwrap`; the reference for the others."""

import contextlib
import functools
import importlib.util
import marshal
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from potstill.sandbox import seccomp
from potstill.sandbox._watch import Run, Streams, control_pair, rlimits, sealed, watch
from potstill.sandbox.backend import Ended, Job, Unfit, renewed
from potstill.sandbox.interpreter import DEVICES, ENVIRONMENT, FLAGS, USER, Plan, becomes, closed, executable, plan
from potstill.sandbox.verdict import Limits
from potstill.sandbox.zygote import BIND, NEW_MOUNTS, NODEV, NOSUID, RECURSIVE, SLAVE, Failed, call, mount

T = TypeVar("T")
_GUEST = "/run/guest.pyc"
_OLDEST = (0, 8)  # --disable-userns, --size


@dataclass(eq=False)
class Bubblewrap:
    """Programs in bubblewrap.

    Attributes:
        version: of bubblewrap.

    Raises:
        Unfit: when it is not installed or too old, there is no filter for this machine, or no other user than root.
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
        self._user = becomes()
        self._shut = [] if self._user is None else closed(seen)
        self.after_fork()
        self._started(lambda: None)
        renewed(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._starter: ThreadPoolExecutor | None = None

    def run(self, job: Job, limits: Limits) -> Ended:
        with contextlib.ExitStack() as stack:
            streams = stack.enter_context(Streams(job))
            control, theirs = control_pair()
            stack.enter_context(control)
            with theirs, contextlib.ExitStack() as given:
                parts = [sealed(part) for part in (_guest(), seccomp.program(), job.program.encode("utf-8", "surrogatepass"))]
                for fd in parts:
                    given.callback(os.close, fd)
                words = _words(parts, theirs.fileno(), streams.theirs, limits)
                try:
                    process = self._start(words, [*parts, theirs.fileno()], streams.theirs)
                except OSError as error:
                    return Ended(False, None, None, None, b"", b"", 0.0, trouble=f"bwrap did not start: {error}")
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")  # programs go first, not who trains
            streams.handed_over()
            stack.callback(_end, process)
            run = Run(limits, kill=process.kill)
            return watch(run, streams, {control.fileno(): partial(_hear, run, control)})

    def _start(self, words: list[str], passed: list[int], streams: list[int]) -> "subprocess.Popen[bytes]":
        stdin, stdout, stderr, *talk = streams
        start = partial(
            subprocess.Popen,
            [self._command, *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(*passed, *talk),
            # empty: that of bubblewrap's own first process inside could be read
            env={},
            cwd="/",
            start_new_session=True,
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
        )
        return self._started(start)

    def _started(self, start: Callable[[], T]) -> T:
        """Start by the thread that sees what programs must read, where this one's mounts would not let others see it."""
        if not self._shut:
            return start()
        with self._lock:
            starter = self._starter = self._starter or _starter(self._shut)
        return starter.submit(start).result()

    def close(self) -> None:
        """Nothing lives longer than a run, but for a thread."""
        if self._starter is not None:
            self._starter.shutdown()


def _starter(shut: list[str]) -> ThreadPoolExecutor:
    """A thread that starts processes, with mounts of its own, in which every user may enter the folders `shut`.

    There is nothing in them there but what programs must read. Processes that a thread starts see what it sees.

    Raises:
        Unfit: when mounts cannot be had.
    """
    starter = ThreadPoolExecutor(1, thread_name_prefix="bubblewrap")
    try:
        starter.submit(_open_up, shut, plan()).result()
    except Failed as error:
        starter.shutdown()
        where = f"other users may not enter {' and '.join(shut)}, where Python is"
        raise Unfit(
            f"{where}, and {error}", "use a Python that every user may read, or start potstill as another user"
        ) from None
    return starter


def _open_up(shut: list[str], seen: Plan) -> None:
    call("unshare", NEW_MOUNTS)  # and a file mode mask of its own
    mount("none", "/", None, RECURSIVE | SLAVE)
    os.umask(0o022)
    for folder in shut:
        below = [path for path in (*seen.folders, *seen.files) if path.startswith(f"{folder}/")]
        held = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in below}
        mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, "mode=755,size=1m")
        for path, fd in held.items():
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                os.makedirs(path)
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
            mount(f"/proc/self/fd/{fd}", path, None, BIND | RECURSIVE)
            os.close(fd)


def _words(parts: list[int], control: int, streams: list[int], limits: Limits) -> list[str]:
    """The command line: what is seen inside, then the guest and its numbers."""
    guest, filter, program = parts
    numbers = (control, program, filter, *(streams[3:] or (-1, -1)), *rlimits(limits))
    words = [*_arguments(limits.disk_mb << 20), "--ro-bind-data", str(guest), _GUEST, "--remount-ro", "/"]
    return [*words, "--", executable(), *FLAGS, _GUEST, *map(str, numbers)]


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
    words = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--as-pid-1"]
    words += ["--cap-drop", "ALL", "--uid", str(USER), "--gid", str(USER), "--hostname", "sandbox", "--clearenv"]
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
    words += ["--symlink", "/tmp", "/dev/shm"]
    return (*words, "--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp", "--chdir", "/tmp")


@functools.cache
def _guest() -> bytes:
    """The guest as bytecode: compiling it takes as long as a small program."""
    code = compile(Path(__file__).with_name("guest.py").read_text(encoding="utf-8"), "guest.py", "exec")
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _hear(run: Run, control: socket.socket) -> bool:
    if run.hear(control):
        return not run.over()
    # all that held the other side has gone, and nobody said how the program ended
    run.ended = time.monotonic()
    if run.began is None or run.killed is not None:
        run.status = signal.SIGKILL
    else:
        run.trouble = "bubblewrap was killed"
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait()

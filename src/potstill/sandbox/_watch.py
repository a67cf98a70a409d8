"""The parent's side of every run: its clock, what is kept of the output, and the end of a program that meets a limit."""

import contextlib
import glob
import json
import os
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from potstill.sandbox.backend import Ended, Job, Talk
from potstill.sandbox.interpreter import THREADS
from potstill.sandbox.verdict import Limits

START_S = 30.0  # until a program starts: the sandbox's own time, on a machine under load
END_S = 10.0  # from the kill to the end
_LOOK_S = 0.05
LOADED = 20.0  # the most that a run may take on the clock, in its limit's terms, where other processes hold the processor
FORBIDDEN = "that the filter forbids"  # SIGSYS does not say which
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
_SIGSYS, _SIGXCPU, _SIGKILL = 31, 24, 9
_TAIL = 256  # last bytes of standard error, where an uncaught exception names itself
_PIECE = 1 << 16
_REST = 1 << 20  # the most that a pipe holds

Limit = Literal["timeout", "memory", "output_limit"]


def rlimits(limits: Limits) -> list[int]:
    """As `guest.limit` reads them."""
    seconds = int(limits.time_s) + 1 + (limits.time_s % 1 > 0)
    return [limits.memory_mb << 20, limits.stack_mb << 20, limits.disk_mb << 20, limits.descriptors, seconds, THREADS]


def sealed(content: bytes, name: str = "potstill") -> int:
    """A descriptor of memory that nobody can change (of a nameless file where the system has no such memory); to be closed."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.seek(0)
            return os.dup(file.fileno())
    import fcntl

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(fd, left) :]
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, 1033, 0x1 | 0x2 | 0x4 | 0x8)  # F_ADD_SEALS: no more seals, no shrinking, no growing, no writing
    except BaseException:
        os.close(fd)
        raise
    return fd


@dataclass
class Streams:
    """The descriptors of one run: what the program gets, and the parent's ends; all are closed on leaving."""

    job: Job
    theirs: list[int] = field(default_factory=list)
    ours: list[int] = field(default_factory=list)
    talk: threading.Thread | None = None
    _raised: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> Self:
        try:
            self.theirs.append(sealed(self.job.stdin, "stdin"))
            for _ in range(2):
                read, write = os.pipe()
                os.set_blocking(read, False)
                self.theirs.append(write)
                self.ours.append(read)
            if self.job.talk is not None:
                self._begin_talk(self.job.talk)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
        if self.talk is not None:
            self.talk.join()
        if self._raised and error is None:
            raise self._raised[0]

    def _begin_talk(self, talk: Talk) -> None:
        to_program, our_writer = os.pipe()
        our_reader, from_program = os.pipe()
        self.theirs += [to_program, from_program]
        self.talk = threading.Thread(target=self._talk, args=(talk, our_reader, our_writer), daemon=True)
        self.talk.start()

    def _talk(self, talk: Talk, reader: int, writer: int) -> None:
        try:
            with open(reader, "rb") as hears, open(writer, "wb") as says:
                talk(hears, says)
        except OSError:
            pass  # the program has gone
        except BaseException as error:
            self._raised.append(error)

    def handed_over(self) -> None:
        """The program has its own copies."""
        while self.theirs:
            os.close(self.theirs.pop())

    def close(self) -> None:
        self.handed_over()
        while self.ours:
            os.close(self.ours.pop())


@dataclass
class Output:
    """One stream of a program: its beginning and its last bytes are kept."""

    fd: int
    most: int
    size: int = 0
    kept: bytearray = field(default_factory=bytearray)
    tail: bytes = b""

    def read(self) -> bool:
        """Take what is there; False at the end of the stream, or where nothing is left for now."""
        try:
            piece = os.read(self.fd, _PIECE)
        except BlockingIOError:
            return False
        self.size += len(piece)
        self.kept += piece[: max(0, self.most - len(self.kept))]
        self.tail = (self.tail + piece[-_TAIL:])[-_TAIL:]
        return bool(piece)


@dataclass
class Run:
    """A run as the parent sees it.

    Attributes:
        kill: ends the program for good.
        began, ended: seconds on the clock that all processes share; None until then.
        status: the wait status; None until it has ended.
        cpu_s: processor seconds, where the backend knows them.
        trouble: why nothing can be said of the program.
        limit: what the parent killed it for.
        pid: of the program, as this process sees it.
        waited_s: seconds that it was ready to run and other processes held the processor; they do not count.
        queued_s: seconds since its deadline that it may be waiting for the processor: the kernel says so when the wait is over.
        ran_ns: processor time at the last look; None before the first.
    """

    limits: Limits
    kill: Callable[[], None]
    began: float | None = None
    ended: float | None = None
    status: int | None = None
    cpu_s: float = 0.0
    trouble: str = ""
    limit: Limit | None = None
    asked: float = field(default_factory=time.monotonic)
    killed: float | None = None
    pid: int = 0
    waited_s: float = 0.0
    queued_s: float = 0.0
    ran_ns: int | None = None

    def hear(self, control: socket.socket) -> bool:
        """What the sandbox says on a descriptor that the program never has; False where nobody holds the other side any more.

        `s` and nanoseconds, from the program's process; `e` and a list of nanoseconds, wait status, processor seconds; `x` and
        why there was no start.
        """
        try:
            words, extra, _, _ = control.recvmsg(1024, socket.CMSG_SPACE(_CREDENTIALS.size))
        except ConnectionError:
            return False
        match words[:1]:
            case b"":
                return False
            case b"s":
                self.began = int(words[1:]) / 1e9
                self.pid, _, _ = _CREDENTIALS.unpack(extra[0][2])  # the kernel's word: this process's number for the sender
            case b"e":
                ended, self.status, self.cpu_s = json.loads(words[1:])
                self.ended = ended / 1e9
            case _:
                self.trouble = words[1:].decode("utf-8", "replace")
        return True

    def allowed_s(self) -> float:
        """Seconds on the clock."""
        return min(self.limits.time_s + self.waited_s + self.queued_s, LOADED * self.limits.time_s)

    def stop(self, limit: Limit | None) -> None:
        if self.killed is None:
            self.limit, self.killed = limit, time.monotonic()
            self.kill()

    def over(self) -> bool:
        return self.status is not None or bool(self.trouble)

    def deadline(self) -> float:
        if self.killed is not None:
            return self.killed + END_S
        return self.asked + START_S if self.began is None else self.began + self.allowed_s()

    def late(self) -> None:
        """The deadline has passed, and nothing that happened before it waits to be read."""
        if self.killed is not None:
            self.trouble = "the sandbox does not end"
        elif self.began is None:
            self.trouble = f"the sandbox did not start within {START_S:g} s"
            self.stop(None)
        else:
            self._look()
            if time.monotonic() >= self.deadline():
                self.stop("timeout")

    def _look(self) -> None:
        """At the deadline: move it by what the program has waited for the processor."""
        ran_ns, waited_ns, ready = held_up(self.pid)
        # threads wait for each other too: what they have run all together, it was not held up
        waited_ns = min(waited_ns, int((time.monotonic() - (self.began or 0.0)) * 1e9) - ran_ns)
        if waited_ns > self.waited_s * 1e9:
            self.waited_s, self.queued_s = waited_ns / 1e9, 0.0
        if ready and self.ran_ns in (None, ran_ns):
            self.queued_s = time.monotonic() - (self.began or 0.0) - self.limits.time_s - self.waited_s + _LOOK_S
        self.ran_ns = ran_ns


def control_pair() -> tuple[socket.socket, socket.socket]:
    """The parent's side and the sandbox's: messages come whole, and the kernel says from which process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def held_up(pid: int) -> tuple[int, int, bool]:
    """A process's nanoseconds of processor time; those that it was ready to run and did not, of its threads the longest; and
    whether the processor is all that it waits for now. Zeros where the system does not say."""
    ran, waited, states, whole = 0, 0, "", 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        whole = (int(user) + int(system)) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))  # with threads that have ended
    for folder in glob.glob(f"/proc/{pid}/task/*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            times, state = (Path(folder, name).read_text() for name in ("schedstat", "stat"))
            ran += int(times.split()[0])
            waited = max(waited, int(times.split()[1]))
            states += state.rpartition(")")[2].split()[0]
    # it runs, or has ended and its parent waits to say so: a first thread that ended before the others has no such state
    return max(ran, whole), waited, "R" in states or (states != "" and set(states) <= set("ZX"))


def watch(run: Run, streams: Streams, heard: dict[int, Callable[[], bool]]) -> Ended:
    """Read both outputs until the run is over.

    Args:
        run: its `kill` set; what `heard` learns goes in here.
        streams: handed over already.
        heard: what to do when a descriptor can be read; it is not asked again after False.
    """
    out, err = (
        Output(fd, kib << 10) for fd, kib in zip(streams.ours, (run.limits.stdout_kb, run.limits.stderr_kb), strict=True)
    )
    poll = select.poll()
    readers = {**heard, out.fd: out.read, err.fd: err.read}
    for fd in readers:
        poll.register(fd, select.POLLIN)
    while not run.over():
        wait = max(0.0, run.deadline() - time.monotonic())
        ready = poll.poll(wait * 1000)
        for fd, _ in ready:
            if not readers[fd]():
                poll.unregister(fd)
        if out.size > out.most:
            run.stop("output_limit")
        if not ready and time.monotonic() >= run.deadline():
            run.late()
    for stream in (out, err):
        _take_rest(stream)
    return _ended(run, out, err)


def _take_rest(stream: Output) -> None:
    """What a program that has ended left in the pipe, and no more: a process that it left behind may write for ever."""
    for _ in range(_REST // _PIECE):
        if not stream.read():
            break


def _ended(run: Run, out: Output, err: Output) -> Ended:
    wall_s = max(0.0, (run.ended or time.monotonic()) - run.began) if run.began is not None else 0.0
    status, signal = _status(run.status)
    limit = run.limit
    if out.size > out.most:
        limit = limit or "output_limit"
    if limit is None and (wall_s > run.allowed_s() or signal == _SIGXCPU or _used_up(run, signal)):
        limit = "timeout"
    if limit is None and status == 1 and err.tail.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
        limit = "memory"
    trouble = run.trouble
    if not trouble and run.began is None:
        trouble = f"the program did not start: {bytes(err.kept).decode('utf-8', 'replace').strip()[-300:] or 'nobody says why'}"
    denied = FORBIDDEN if signal == _SIGSYS and limit is None else ""
    return Ended(run.began is not None, limit, status, signal, bytes(out.kept), bytes(err.kept), wall_s, denied, trouble)


def _used_up(run: Run, signal: int | None) -> bool:
    """Killed by the kernel at the limit of processor time, of which the program ignored the first warning."""
    return signal == _SIGKILL and run.killed is None and run.cpu_s > rlimits(run.limits)[4]


def _status(waited: int | None) -> tuple[int | None, int | None]:
    if waited is None:
        return None, None
    if os.WIFSIGNALED(waited):
        return None, os.WTERMSIG(waited)
    return os.waitstatus_to_exitcode(waited), None

"""What runs a program: the one thing that all backends have in common."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol
from weakref import WeakSet

from potstill.sandbox.verdict import Limits


class Unfit(Exception):
    """A backend cannot work here: why, and what would help."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(f"{why}; {remedy}" if remedy else why)
        self.why, self.remedy = why, remedy


# reads what the program's side says and answers it, line by line; returns when it has heard enough
Talk = Callable[[BinaryIO, BinaryIO], None]


@dataclass(frozen=True)
class Job:
    """One program to run.

    Attributes:
        program: Python source; runs as the real `__main__`.
        stdin: what it may read.
        talk: None, or the parent's side of a private conversation: it gets a reader and a writer of the pair of descriptors
            that the program's side finds as 3 (to read) and 4 (to write). The program may forge whatever it says there.
    """

    program: str
    stdin: bytes = b""
    talk: Talk | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended, by what the parent saw alone.

    Attributes:
        started: whether the program's process got as far as the program, told on a descriptor that the program never has.
        limit: the limit that ended it, None where none did. `memory` is told by the wait status and by the sandbox, or by
            an uncaught MemoryError.
        status: the exit status; None where a signal ended it.
        signal: that signal.
        stdout, stderr: as far as they were kept.
        wall_s: seconds from the program's start to its end, by the parent's clock.
        denied: the system call that the filter killed it for, "" where none did.
        trouble: why nothing can be said of the program: the sandbox failed, not the program; "" where it did not.
    """

    started: bool
    limit: Literal["timeout", "memory", "output_limit"] | None
    status: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    wall_s: float
    denied: str = ""
    trouble: str = ""


class Backend(Protocol):
    """A way to run programs apart from this machine.

    Attributes:
        name: as recipes, reports and `doctor` name it.
    """

    name: str

    def run(self, job: Job, limits: Limits) -> Ended:
        """Run one program to its end; safe to call from several threads at once. Raises nothing of the program's making."""
        ...

    def close(self) -> None:
        """End all that it holds: processes, descriptors, folders."""
        ...


class Forked(Protocol):
    """What a forked process must not share with its parent: threads that it does not have, processes that are not its own."""

    def after_fork(self) -> None:
        """Let go of the parent's and begin anew; called in the forked process, which has one thread yet."""
        ...


_HELD: WeakSet[Forked] = WeakSet()


def renewed(thing: Forked) -> None:
    """Have `after_fork` called in each process that is forked from this one."""
    _HELD.add(thing)


def _after_fork() -> None:
    for thing in [*_HELD]:
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""What a program may use, how it ended, and what that is worth."""

from dataclasses import dataclass
from typing import Literal

from potstill.core.errors import UserError

Outcome = Literal["pass", "fail", "timeout", "memory", "output_limit", "crash", "denied", "abstain"]
OUTCOMES: tuple[Outcome, ...] = ("pass", "fail", "timeout", "memory", "output_limit", "crash", "denied", "abstain")

TIME_S = (0.01, 3600.0)
# CPython 3.11 prints with 16 MiB, and imports common modules with 20
MEMORY_MB = (32, 1 << 20)


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use; a run ends at the first that it meets.

    Attributes:
        time_s: seconds on the clock, counted by the parent; one second more of processor time.
        memory_mb: address space, MiB.
        stack_mb: MiB.
        stdout_kb: KiB of standard output; of standard error the first `stderr_kb` are kept, and the rest is read and dropped.
        disk_mb: MiB in the run's own temporary folder, and in any file.
        descriptors: open files.

    Raises:
        UserError: a limit that no program can run within, or none at all.
    """

    time_s: float = 4.0
    memory_mb: int = 512
    stack_mb: int = 64
    stdout_kb: int = 1024
    stderr_kb: int = 8
    disk_mb: int = 64
    descriptors: int = 128

    def __post_init__(self) -> None:
        _check("time_s", self.time_s, *TIME_S)
        _check("memory_mb", self.memory_mb, *MEMORY_MB)
        for name in ("stack_mb", "stdout_kb", "stderr_kb", "disk_mb"):
            _check(name, getattr(self, name), 1, 1 << 20)
        _check("descriptors", self.descriptors, 16, 1 << 20)


def _check(name: str, value: float, least: float, most: float) -> None:
    whole = isinstance(least, int)
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not right or not least <= value <= most:  # NaN is not
        raise UserError(f"{name} = {value!r}: must be a {'whole ' * whole}number from {least:g} to {most:.0f}")


@dataclass(frozen=True)
class Verdict:
    """What a run was worth.

    Attributes:
        outcome: `abstain` is no score: the sandbox did not start, the grader failed, the machine ran out of memory.
        reason: one line for a person; of a program's own words only what is quoted in it.
        wall_s: seconds that the program ran.
    """

    outcome: Outcome
    reason: str
    wall_s: float

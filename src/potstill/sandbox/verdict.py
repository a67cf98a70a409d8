"""What a program may use, how it ended, and what that is worth."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["pass", "fail", "timeout", "memory", "output_limit", "crash", "denied", "abstain"]
OUTCOMES: tuple[Outcome, ...] = ("pass", "fail", "timeout", "memory", "output_limit", "crash", "denied", "abstain")


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
    """

    time_s: float = 4.0
    memory_mb: int = 512
    stack_mb: int = 64
    stdout_kb: int = 1024
    stderr_kb: int = 8
    disk_mb: int = 64
    descriptors: int = 128


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

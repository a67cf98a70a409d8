"""The system calls that a program may make: a seccomp filter, assembled here, so that no library is needed.

It is an allow-list, because a deny-list goes stale with every kernel. A call that this list does not know gets ENOSYS, as from
an older kernel, and libraries fall back. Calls that honest code tries get EPERM. Calls that no honest program makes, and calls
of another architecture, end the program with SIGSYS, which the parent reads from the wait status.
"""

import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from potstill.sandbox import _syscalls

KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
EPERM, ENOTTY, ENOSYS = ERRNO | 1, ERRNO | 25, ERRNO | 38
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # x86_64: this bit in a number means another table of calls

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
_NUMBER, _ARCH, _ARGS = 0, 4, 16  # places in struct seccomp_data

_THREAD, _NEW = 0x00010000, 0x7E020000  # CLONE_THREAD; CLONE_NEW*
_TRACED = 0x00800000 | 0x2000 | 0x1000  # CLONE_UNTRACED, _PTRACE, _PIDFD
_KINDS_OF_SOCKET = 0xFFFFFFFF & ~(0o2000000 | 0o4000)  # all but SOCK_CLOEXEC and SOCK_NONBLOCK

Code = list[tuple[int, int, int, int]]  # struct sock_filter: code, jump if true, jump if false, operand


@dataclass(frozen=True)
class Test:
    """An argument of a call, and the values that it may have.

    Attributes:
        place: which argument, from 0.
        values: of which it must equal one; below 2^32.
        mask: the bits that count, of the lower 32; None for all 64.
    """

    place: int
    values: tuple[int, ...]
    mask: int | None = None


@dataclass(frozen=True)
class Check:
    """A call that is allowed where all tests of its arguments hold, and gets an error where one fails."""

    tests: tuple[Test, ...]
    otherwise: int = EPERM


CHECKS = {
    # a thread of this process, never a process
    "clone": Check((Test(0, (_THREAD,), _THREAD | _NEW | _TRACED),)),
    # descriptors, flags, locks; not F_SETPIPE_SZ (memory beyond the limit), F_SETOWN, F_NOTIFY
    "fcntl": Check((Test(1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034)),)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; not TIOCSTI
    "ioctl": Check((Test(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),), ENOTTY),
    # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA
    "prctl": Check((Test(0, (15, 16, 0x53564D41)),)),
    "prlimit64": Check((Test(0, (0,)),)),
    # an event loop wakes itself by a connected pair; nothing can be addressed with one
    "socketpair": Check((Test(0, (1,)), Test(1, (1,), _KINDS_OF_SOCKET))),
    "sendto": Check((Test(4, (0,)),)),
}


@lru_cache(maxsize=4)
def program(arch: str | None = None) -> bytes:
    """The filter: an array of struct sock_filter.

    Args:
        arch: `x86_64` or `aarch64`; None for this machine's.

    Raises:
        ValueError: no filter for that architecture.
    """
    arch = arch or machine()
    if arch not in ARCHITECTURES:
        raise ValueError(f"no seccomp filter for {arch}; there is one for {' and '.join(ARCHITECTURES)}")
    code: Code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, ARCHITECTURES[arch]), (_RETURN, 0, 0, KILL), (_LOAD, 0, 0, _NUMBER)]
    if arch == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, KILL)]
    code += _tree(_intervals(decisions(arch)))
    return b"".join(struct.pack("<HBBI", *one) for one in code)


def machine() -> str:
    """This machine's architecture, as `ARCHITECTURES` names it."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())


def decisions(arch: str) -> dict[int, int | Check]:
    """What is decided of each system call that the list knows; all others get ENOSYS."""
    actions: Mapping[str, int] = {"ALLOW": ALLOW, "REFUSE": EPERM, "KILL": KILL}
    found: dict[int, int | Check] = {}
    for group, action in actions.items():
        found.update((number, action) for number in numbers(group, arch).values())
    found.update((number, CHECKS[name]) for name, number in numbers("CHECKED", arch).items())
    return found


def numbers(group: str, arch: str) -> dict[str, int]:
    """The calls of a group that an architecture has."""
    lines = (entry.split(":") for entry in getattr(_syscalls, group).split())
    place = 1 + list(ARCHITECTURES).index(arch)
    return {line[0]: int(line[place]) for line in lines if line[place] != "-"}


def _intervals(known: Mapping[int, int | Check]) -> list[tuple[int, int | Check]]:
    """(first number, decision) wherever the decision changes; the first is 0, the last has no end."""
    found: list[tuple[int, int | Check]] = []
    for number in range(max(known) + 2):
        decision = known.get(number, ENOSYS)
        if not found or found[-1][1] != decision:
            found.append((number, decision))
    return found


def _tree(intervals: list[tuple[int, int | Check]]) -> Code:
    """Search by halves: the kernel runs this for every call."""
    if len(intervals) == 1:
        decision = intervals[0][1]
        return _check(decision) if isinstance(decision, Check) else [(_RETURN, 0, 0, decision)]
    middle = len(intervals) // 2
    low, high = _tree(intervals[:middle]), _tree(intervals[middle:])
    # a conditional jump reaches 255 instructions
    over = [(_AT_LEAST, len(low), 0, intervals[middle][0])]
    if len(low) > 255:
        over = [(_AT_LEAST, 0, 1, intervals[middle][0]), (_JUMP, 0, 0, len(low))]
    return over + low + high


def _check(check: Check) -> Code:
    return [step for test in check.tests for step in _test(test, check.otherwise)] + [(_RETURN, 0, 0, ALLOW)]


def _test(test: Test, otherwise: int) -> Code:
    """Goes on behind its end where the test holds, returns `otherwise` where not."""
    low, count = _ARGS + 8 * test.place, len(test.values)
    code: Code = [(_LOAD, 0, 0, low)]
    if test.mask is None:
        code = [(_LOAD, 0, 0, low + 4), (_EQUAL, 0, 1 + count, 0), *code]
    else:
        code.append((_AND, 0, 0, test.mask))
    code += [(_EQUAL, count - i, 0, value) for i, value in enumerate(test.values)]
    return [*code, (_RETURN, 0, 0, otherwise)]

"""The interpreter that programs run in, and the little of this machine that it needs to see."""

import functools
import glob
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.sandbox.backend import Unfit

# no user site, no current folder, no site-packages, no bytecode written; text is UTF-8 whatever the locale
FLAGS = ("-X", "utf8", "-s", "-P", "-S", "-B")
# a fixed hash seed: a program that prints a set has one verdict, not a lottery
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:strict"}
DEVICES = ("null", "zero", "random", "urandom")
THREADS = 256
USER = 65534  # whom programs run as
_SET_GROUP, _SET_USER = 1 << 6, 1 << 7  # capabilities


@dataclass(frozen=True)
class Plan:
    """What of this machine is seen inside, read-only, at its own path.

    Attributes:
        folders: with all below.
        files: single ones.
        links: (path, target).
        hidden: folders below `folders` that are empty inside: installed packages, which may hold answers, tasks and this one.
    """

    folders: tuple[str, ...]
    files: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def executable() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def plan() -> Plan:
    """The standard library, the system's libraries, the executable.

    Raises:
        Unfit: when the interpreter's library folder holds the home folder, or the interpreter may not be read.
    """
    if not os.access(executable(), os.X_OK):
        raise Unfit(f"this user may not start {executable()}", "install Python where every user may read it")
    roots = [name for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64") if os.path.isdir(name)]
    links = tuple((name, os.readlink(name)) for name in roots if os.path.islink(name))
    own = [f"{prefix}/{name}" for prefix in {sys.base_prefix, sys.base_exec_prefix} for name in ("lib", "lib64")]
    folders = sorted({os.path.realpath(name) for name in [*roots, *own] if os.path.isdir(name)})
    folders = [one for one in folders if not any(_below(one, other) for other in folders if other != one)]
    if holds := [one for one in folders if _below(os.path.realpath(os.path.expanduser("~")), one)]:
        raise Unfit(f"the home folder lies in {holds[0]}, which programs must read", "install Python in a folder of its own")
    files = [name for name in (executable(), "/etc/ld.so.cache") if os.path.isfile(name)]
    patterns = ("python3*/site-packages", "python3*/dist-packages")
    hidden = sorted({os.path.realpath(name) for one in folders for what in patterns for name in glob.glob(f"{one}/{what}")})
    found = Plan(tuple(folders), tuple(f for f in files if not any(_below(f, d) for d in folders)), links, tuple(hidden))
    if becomes() is not None:
        _check_that_others_may_read(found)
    return found


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def becomes() -> int | None:
    """The user whom the superuser becomes to run programs; None for any other user, who stays itself.

    The superuser of a user namespace may be another user outside, and no other user need exist there: it stays itself too.

    Raises:
        Unfit: when programs would run as the machine's superuser.
    """
    if os.geteuid() != 0:
        return None
    status = Path("/proc/self/status").read_text()
    rights = int(status.partition("CapEff:")[2].split()[0], 16)
    if rights & _SET_GROUP and rights & _SET_USER and all(_outside(name, USER) is not None for name in ("uid_map", "gid_map")):
        return USER
    if _outside("uid_map", 0) != 0:
        return None
    raise Unfit(
        "programs would run as the superuser, who may not become another user here",
        "start potstill as another user, or give the container the capabilities SETUID and SETGID",
    )


def _outside(name: str, inside: int) -> int | None:
    """What a user or group of this user namespace is outside it; None where there is no such one."""
    for line in Path(f"/proc/self/{name}").read_text().splitlines():
        first, outside, count = map(int, line.split())
        if first <= inside < first + count:
            return outside + inside - first
    return None


def closed(plan: Plan) -> list[str]:
    """The outermost folders above what is seen inside that only their owner may enter, as the superuser's home."""
    above = {str(parent) for path in (*plan.folders, *plan.files) for parent in Path(path).parents}
    shut = sorted(folder for folder in above if not os.stat(folder).st_mode & 0o001)
    return [one for one in shut if not any(_below(one, other) for other in shut if other != one)]


def _check_that_others_may_read(plan: Plan) -> None:
    """What lies below the folders is looked at in one place, the standard library's; the trial reads more."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    for path in (*plan.folders, *plan.files, library, f"{library}/os.py"):
        wanted = 0o005 if os.path.isdir(path) or path == executable() else 0o004
        if os.stat(path).st_mode & wanted != wanted:
            remedy = f"chmod -R o+rX {path}, use another Python, or start potstill as the user whom the file belongs to"
            raise Unfit(f"programs run as another user than the superuser, and other users may not read {path}", remedy)

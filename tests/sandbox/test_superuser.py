"""Started by the superuser, nothing inside a sandbox is the machine's superuser, and limits hold that the superuser escapes."""

import os
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from potstill.sandbox import interpreter
from potstill.sandbox.backend import Job, Unfit
from potstill.sandbox.interpreter import THREADS, becomes, closed, plan
from potstill.sandbox.verdict import Limits

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="asks what happens where the superuser starts it")


@ROOT
def test_no_process_of_a_sandbox_is_the_superusers(backend):
    before = set(psutil.Process().children())
    run = threading.Thread(target=backend.run, args=(Job("import time; time.sleep(3)"), Limits(time_s=20)))
    run.start()
    try:
        time.sleep(1)
        tops = [one for one in psutil.Process().children() if backend.name == "namespaces" or one not in before]
        inside = [
            one
            for top in tops
            for one in (top, *top.children(recursive=True))
            if "python" in one.name() or "bwrap" in one.name()
        ]
        found = [(one.name(), *one.uids(), *one.gids()) for one in inside]
    finally:
        run.join()
    assert len(found) >= 3
    assert {number for _, *numbers in found for number in numbers} == {interpreter.USER}


# with the smallest stacks that there are: memory is not what ends it
RAW_THREADS = """
import _thread, resource
_thread.stack_size(32768)
lock, n = _thread.allocate_lock(), 0
lock.acquire()
try:
    while n < 4000: _thread.start_new_thread(lock.acquire, ()); n += 1
except RuntimeError: pass
print(n, resource.getrlimit(resource.RLIMIT_NPROC)[0], flush=True)
import os; os._exit(0)
"""


def test_threads_are_limited(backend):
    ended = backend.run(Job(RAW_THREADS), Limits(time_s=20, memory_mb=4096))
    started, limit = map(int, ended.stdout.split())
    assert limit <= THREADS
    assert limit - 4 <= started < limit


def in_map(monkeypatch, user: int, rights: int, *lines: str) -> None:
    """Have `becomes` see this effective user, capabilities and user namespace."""
    texts = {
        "/proc/self/status": f"CapEff:\t{rights:016x}\n",
        **dict.fromkeys(("/proc/self/uid_map", "/proc/self/gid_map"), "\n".join(lines)),
    }
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(interpreter.Path, "read_text", lambda self: texts[str(self)])


ALL, NO_SETUID, WHOLE = (1 << 41) - 1, (1 << 41) - 1 - (1 << 7), "0 0 4294967295"


@pytest.mark.parametrize(
    ("user", "rights", "map", "found"),
    [
        (1000, 0, WHOLE, None),
        (0, ALL, WHOLE, interpreter.USER),
        (0, ALL, "0 100000 65536", interpreter.USER),
        (0, ALL, "0 1000 1", None),  # alone in its namespace, and an ordinary user outside
        (0, NO_SETUID, "0 1000 65536", None),
    ],
)
def test_whom_programs_become(monkeypatch, user, rights, map, found):
    in_map(monkeypatch, user, rights, map)
    assert becomes() == found


@pytest.mark.parametrize(("rights", "map"), [(NO_SETUID, WHOLE), (0, WHOLE), (ALL, "0 0 1")])
def test_never_the_machines_superuser(monkeypatch, rights, map):
    in_map(monkeypatch, 0, rights, map)
    with pytest.raises(Unfit, match=r"^programs would run as the superuser, .*; start potstill as another user, or give"):
        becomes()


def test_what_others_may_not_read_is_said(monkeypatch):
    library = os.path.dirname(os.path.realpath(os.__file__))
    stat = os.stat

    def shut(path, *args, **named):
        found = stat(path, *args, **named)
        return os.stat_result((found.st_mode & ~0o007, *found[1:])) if path == library else found

    monkeypatch.setattr(os, "stat", shut)
    monkeypatch.setattr(interpreter, "becomes", lambda: interpreter.USER)
    plan.cache_clear()
    try:
        with pytest.raises(Unfit, match=rf"other users may not read {library}; chmod -R o\+rX {library}, "):
            plan()
    finally:
        plan.cache_clear()


def test_outermost_shut_folders():
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        shut, below = Path(top, "shut"), Path(top, "shut", "open", "shut too")
        below.mkdir(parents=True)
        for folder, mode in ((Path(top), 0o755), (shut, 0o700), (below, 0o700)):
            folder.chmod(mode)
        assert closed(interpreter.Plan((str(below / "lib"), "/usr/lib"), (), (), ())) == [str(shut)]

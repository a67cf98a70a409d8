"""What every backend promises: a program ends as it does under a plain interpreter, within its limits, and leaves nothing."""

import os
import signal
import subprocess
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from potstill.sandbox import trial
from potstill.sandbox.backend import Job
from potstill.sandbox.interpreter import ENVIRONMENT, FLAGS, executable
from potstill.sandbox.verdict import Limits
from potstill.sandbox.weak import Weak

SMALL = Limits(time_s=0.5, memory_mb=128, stdout_kb=64)

ENDINGS = {
    "nothing": "",
    "a syntax error": "print(",
    "an exception": "print(1)\n1 / 0",
    "an exception of its own": "class Odd(BaseException): pass\nraise Odd('x')",
    "exit with words": "import sys; print(1); sys.exit('why')",
    "exit with None": "import sys; sys.exit(None)",
    "exit with True": "import sys; sys.exit(True)",
    "exit with 256": "import sys; sys.exit(256)",
    "exit with -1": "import sys; sys.exit(-1)",
    "exit without flushing": "import os; print(1); os._exit(3)",
    "a segmentation fault": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; print(1, flush=True); os.abort()",
    "kills itself": "import os; os.kill(os.getpid(), 9)",
    "terminates itself": "import os; os.kill(os.getpid(), 15)",
    "a status as of SIGKILL": "import sys; sys.exit(128 + 9)",
    "a status as of SIGSYS": "import sys; sys.exit(128 + 31)",
    "a status as of SIGXCPU": "import os; os._exit(128 + 24)",
    "catches its own interrupt": "import signal\ntry: signal.raise_signal(2)\nexcept KeyboardInterrupt: print('caught')",
    "closes its output": "import sys; print(1); sys.stdout.close()",
    "closes all descriptors": "import os; os.closerange(0, 64)",
    "at exit": "import atexit; atexit.register(print, 'last'); print('first')",
    "at exit after an exception": "import atexit; atexit.register(print, 'last'); 1 / 0",
    "a thread that outlives the program": (
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start(); print('early')"
    ),
    "a daemon thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start(); print(1)",
    "a last word": "class A:\n    def __del__(self): print('gone')\na = A()",
    "too deep": "def f(): f()\nf()",
    "not UTF-8": "import sys; sys.stdout.buffer.write(bytes([255, 0, 254]))",
    "half a character": "print('\\ud800')",
    "reads past the end": "input(); input(); input()",
    "standard error alone": "import sys; print('x' * 99, file=sys.stderr)",
    "an order of a set": "print({'a', 'b', 'c', 'd', 'e'}, hash('a'))",
    "forged words of a sandbox": "import sys; print('bwrap: no', file=sys.stderr); sys.exit(1)",
}


def _listening() -> None:
    """A shell's background jobs inherit that an interrupt is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("name", ENDINGS)
def test_ends_as_under_a_plain_interpreter(name, backend, tmp_path):
    ended = backend.run(Job(ENDINGS[name], b"1\n2\n"), Limits())
    (tmp_path / "main.py").write_text(ENDINGS[name])
    words = [executable(), *FLAGS, "main.py"]
    plain = subprocess.run(words, input=b"1\n2\n", capture_output=True, env=ENVIRONMENT, cwd=tmp_path, preexec_fn=_listening)
    code = plain.returncode
    assert (ended.stdout, ended.status, ended.signal) == (
        plain.stdout,
        code if code >= 0 else None,
        -code if code < 0 else None,
    )
    assert (ended.started, ended.limit, ended.denied, ended.trouble) == (True, None, "", "")
    assert bool(ended.stderr) == bool(plain.stderr)


LIMITED = {
    "sleeps": ("import time; time.sleep(9)", "timeout"),
    "computes": ("while True: pass", "timeout"),
    "drips": ("import time\nwhile True: print(1, flush=True); time.sleep(0.05)", "timeout"),
    "catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout"),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "floods": ("while True: print('x' * 9999)", "output_limit"),
    "floods on both": ("import sys\nwhile True: print('x' * 9999); print('x' * 9999, file=sys.stderr)", "output_limit"),
    "floods on standard error": ("import sys\nwhile True: print('x' * 9999, file=sys.stderr)", "timeout"),
    "one byte too much": ("import sys; sys.stdout.write('x' * (64 * 1024 + 1))", "output_limit"),
    "as much as is allowed": ("import sys; sys.stdout.write('x' * 64 * 1024)", None),
    "memory": ("x = bytearray(1 << 28)", "memory"),
    "memory, after many words": ("import sys\nprint('x' * 99999, file=sys.stderr)\nx = bytearray(1 << 28)", "memory"),
    "memory, by and by": ("x = []\nwhile True: x.append(bytes(1 << 20))", "memory"),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits(name, backend):
    source, limit = LIMITED[name]
    ended = backend.run(Job(source), SMALL)
    assert (ended.limit, ended.started, ended.trouble) == (limit, True, "")
    assert len(ended.stdout) <= SMALL.stdout_kb << 10
    assert len(ended.stderr) <= SMALL.stderr_kb << 10


def test_leaves_no_descriptor_thread_or_process(backend):
    jobs = [
        (Job("print(1)"), Limits()),
        (Job("while True: print(1)"), SMALL),
        (Job("1 / 0", talk=lambda hears, says: None), Limits()),
    ]
    jobs.append((Job("import time; time.sleep(9)", talk=lambda hears, says: hears.read()), Limits(time_s=0.1)))
    me = psutil.Process()

    def held():
        return len(os.listdir("/proc/self/fd")), me.num_threads(), len(me.children())

    for job, limits in jobs:
        backend.run(job, limits)
    before = held()
    for _ in range(4):
        for job, limits in jobs:
            assert not backend.run(job, limits).trouble
    until = time.monotonic() + 5  # what ends needs a moment; what is left behind stays
    while any(now > then for now, then in zip(held(), before, strict=True)) and time.monotonic() < until:
        time.sleep(0.05)
    after = held()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (after, before)  # an earlier test's may end too


def test_talk_goes_both_ways_and_its_errors_are_raised(backend):
    said = []

    def talk(hears, says):
        says.write(b"question\n")
        says.flush()
        said.append(hears.readline())

    ended = backend.run(Job("import os; os.write(4, os.read(3, 99).upper())", talk=talk), Limits())
    assert (said, ended.status) == ([b"QUESTION\n"], 0)

    def wrong(hears, says):
        raise ZeroDivisionError("of the parent's own making")

    with pytest.raises(ZeroDivisionError, match=r"^of the parent's own making$"):
        backend.run(Job("print(1)", talk=wrong), Limits())


def test_a_sandbox_killed_from_outside_is_trouble_and_the_next_run_works(backend):
    mine = psutil.Process()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(backend.run, Job("while True: pass"), Limits(time_s=20))
        busy = _once(lambda: [one for one in mine.children(recursive=True) if _busy(one)])
        top = busy[0]
        while top.ppid() != mine.pid:
            top = top.parent()
        top.kill()
        ended = run.result(20)
    assert ended.trouble
    assert ended.limit is None
    assert backend.run(Job("print(1)"), Limits()).stdout == b"1\n"


def _once(found):
    """What is found as soon as there is something; 20 s at most."""
    end = time.monotonic() + 20
    while not (there := found()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return there


def _busy(process):
    try:
        return process.cpu_times().user > 0.2
    except psutil.NoSuchProcess:
        return False


ORDINARY = """
import sys
sys.path.insert(0, {source!r})
from potstill.sandbox import trial
backend = trial.made({name!r})
print([probe for probe in trial.probe(backend) if not probe.held])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another user; as one, the other tests say it all")
def test_holds_for_an_ordinary_user_too(backend):
    """With the system's own interpreter, which every user may start."""
    source, python = str(Path(trial.__file__).parents[2]), "/usr/bin/python3"
    ready = [
        python,
        "-B",
        "-c",
        f"import sys; sys.path.insert(0, {source!r}); assert sys.version_info >= (3, 11); import potstill.sandbox.trial",
    ]
    who = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/", "env": {}}
    if not os.path.exists(python) or subprocess.run(ready, capture_output=True, **who).returncode:
        pytest.skip("no interpreter here that another user may start, or this source may not be read")
    done = subprocess.run(
        [python, "-B", "-c", ORDINARY.format(source=source, name=backend.name)], capture_output=True, text=True, **who
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# the backend `none` ends programs as the others do; it limits time and output alone


@pytest.mark.parametrize("name", ["an exception", "exit with words", "kills itself", "at exit", "not UTF-8"])
def test_weak_ends_as_a_plain_interpreter(name, tmp_path):
    test_ends_as_under_a_plain_interpreter(name, Weak(), tmp_path)


@pytest.mark.parametrize("name", ["sleeps", "catches everything", "floods on both", "as much as is allowed"])
def test_weak_limits(name):
    test_limits(name, Weak())


def test_weak_leaves_no_descriptor_thread_or_process():
    test_leaves_no_descriptor_thread_or_process(Weak())


def test_weak_talks():
    test_talk_goes_both_ways_and_its_errors_are_raised(Weak())


def test_weak_does_not_wait_for_a_process_left_behind_that_writes_for_ever(tmp_path):
    source = f"""
        import os, time
        if os.fork():
            while not os.path.exists({str(tmp_path / "pid")!r}): pass
            os._exit(0)
        os.setsid()
        open({str(tmp_path / "part")!r}, "w").write(str(os.getpid()))
        os.rename({str(tmp_path / "part")!r}, {str(tmp_path / "pid")!r})
        end = time.monotonic() + 20
        while time.monotonic() < end: os.write(1, b"x" * 9999)
    """
    ended = Weak().run(Job(textwrap.dedent(source)), Limits(stdout_kb=1 << 20))
    left = psutil.Process(int((tmp_path / "pid").read_text()))
    # where the run had waited for it, it would have ended: by itself, or by a pipe that nobody reads
    left.wait(10)
    assert (ended.status, ended.limit, ended.trouble) == (0, None, "")


def test_a_program_leaves_no_core_and_goes_first_where_memory_runs_out(backend):
    """A limit on core files does not hold back a handler that the host's core_pattern names."""
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(backend.run, Job("import time; time.sleep(1.5)"), Limits(time_s=4))
        deadline = time.monotonic() + 20
        mine: list[int] = []
        while not mine and time.monotonic() < deadline:
            time.sleep(0.2)
            programs = [p for p in psutil.Process().children(recursive=True) if p.status() == psutil.STATUS_SLEEPING]
            # who is not dumpable has its descriptors owned by the superuser
            mine = [p.pid for p in programs if _owner(p.pid, "") != 0 == _owner(p.pid, "fd")]
        assert mine
        if backend.name == "namespaces":  # bubblewrap is told when it has started, which may be too late for its child
            assert all(Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n" for pid in mine)
        assert ending.result().status == 0


def _owner(pid: int, name: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/{name}").st_uid
    except OSError:
        return None

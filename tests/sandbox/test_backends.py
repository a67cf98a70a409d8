"""Laws of all sandboxes: how a run ended, what it leaves, threads at once, and processes killed from outside."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from potstill.sandbox.backend import Job, Unfit
from potstill.sandbox.namespaces import Namespaces
from potstill.sandbox.verdict import Limits

LIMITS = Limits(time_s=5.0, memory_mb=256)
QUICK = Limits(time_s=0.3, memory_mb=256)

# what each program ends with: limit, status, signal, standard output
ENDS = {
    "print(1)": (None, 0, None, b"1\n"),
    "print(input() + '!')": (None, 0, None, b"in!\n"),
    "import sys; sys.exit(3)": (None, 3, None, b""),
    "import sys; sys.exit('words')": (None, 1, None, b""),
    "exit(256 + 7)": (None, 7, None, b""),
    "raise SystemExit": (None, 0, None, b""),
    "import os; print('lost'); os._exit(0)": (None, 0, None, b""),
    "1 / 0": (None, 1, None, b""),
    "print('a'": (None, 1, None, b""),
    "raise KeyboardInterrupt": (None, 1, None, b""),
    "import os; os.kill(os.getpid(), 9)": (None, None, 9, b""),
    "import os; os.abort()": (None, None, 6, b""),
    "import ctypes; ctypes.string_at(0)": (None, None, 11, b""),
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": (None, None, 15, b""),
    "x = bytearray(1 << 30)": ("memory", 1, None, b""),
    "try: bytearray(1 << 30)\nexcept MemoryError: print('caught')": (None, 0, None, b"caught\n"),
    "x = []\nwhile True: x.append(bytearray(1 << 20))": ("memory", 1, None, b""),
    "import os; os.fork()": (None, 1, None, b""),
    "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(2)'])": (None, 1, None, b""),
    "import threading; t = threading.Thread(target=print, args=(1,)); t.start()": (None, 0, None, b"1\n"),
    "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()": (
        None,
        0,
        None,
        b"late\n",
    ),
    "import atexit; atexit.register(print, 'bye'); print('hi')": (None, 0, None, b"hi\nbye\n"),
    "class A:\n    def __del__(self): print('gone')\na = A()": (None, 0, None, b"gone\n"),
    "import sys; sys.stdout.close()": (None, 0, None, b""),
    "import os; print('x'); os.close(1)": (None, 120, None, b""),
    "print({'a', 'b', 'c', 'd'} == {'d', 'c', 'b', 'a'}, hash('a') == hash('a'))": (None, 0, None, b"True True\n"),
    "import sys; print(sys.argv, __name__, __file__, sys.path[0])": (
        None,
        0,
        None,
        b"['/tmp/main.py'] __main__ /tmp/main.py /tmp\n",
    ),
    "print(open('/tmp/main.py').read()[:5])": (None, 0, None, b"print\n"),
    "import sys; print(sys.stdout.encoding, sys.stdout.errors, sys.getfilesystemencoding())": (
        None,
        0,
        None,
        b"utf-8 strict utf-8\n",
    ),
    "def f(n): return n and 1 + f(n - 1)\nprint(f(990))": (None, 0, None, b"990\n"),
    "def f(): f()\nf()": (None, 1, None, b""),
    "import os; print(os.getcwd(), sorted(os.listdir('.')), dict(os.environ))": (None, 0, None, b"/tmp ['main.py'] {}\n"),
    "from resource import *; print([getrlimit(x)[0] for x in (RLIMIT_STACK, RLIMIT_NOFILE, RLIMIT_CORE)])": (
        None,
        0,
        None,
        b"[67108864, 128, 0]\n",
    ),
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))": (None, 1, None, b""),
    "import os; open(os.devnull, 'w').write('x'); print(len(open('/dev/urandom', 'rb').read(3)))": (None, 0, None, b"3\n"),
    "import os; os.close(os.open('x', os.O_CREAT, 0)); print({os.getuid(), *os.getgroups()}, flush=True); open('x')": (
        None,
        1,
        None,
        b"{65534}\n",  # and no right to read what nobody may read
    ),
    "import os; os.chmod('/dev/null', 0)": (None, 1, None, b""),
    "import asyncio; asyncio.run(asyncio.sleep(0.01)); print('slept')": (None, 0, None, b"slept\n"),
    "open('big', 'wb').write(bytes(80 << 20))": (None, 1, None, b""),
    "import os; print([fd for fd in range(1024) if os.path.exists(f'/proc/self/fd/{fd}')], os.path.exists('/proc'))": (
        None,
        0,
        None,
        b"[] False\n",
    ),
    "import os\nfor fd in range(3, 1024):\n    try: os.fstat(fd); print(fd)\n    except OSError: pass": (None, 0, None, b""),
}


@pytest.mark.parametrize("source", ENDS)
def test_ends_as_it_must(backend, source):
    ended = backend.run(Job(source, stdin=b"in\n"), LIMITS)
    assert ended.trouble == ""
    assert ended.started
    assert (ended.limit, ended.status, ended.signal, ended.stdout) == ENDS[source], ended.stderr
    assert 0 < ended.wall_s < LIMITS.time_s


@pytest.mark.parametrize(
    "source",
    ["while True: pass", "import time; time.sleep(60)", "10 ** 10 ** 8", "import os, signal; os.kill(os.getpid(), 19)"],
)
def test_time_is_counted_by_the_parent(backend, source):
    ended = backend.run(Job(source), QUICK)
    assert (ended.limit, ended.trouble) == ("timeout", "")
    assert ended.wall_s >= QUICK.time_s


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_floods_are_cut(backend, stream):
    ended = backend.run(
        Job(f"import sys\nfor _ in range(4000): sys.{stream}.write('x' * 1000)"), Limits(stdout_kb=64, stderr_kb=8)
    )
    assert ended.trouble == ""
    if stream == "stdout":
        assert (ended.limit, len(ended.stdout)) == ("output_limit", 64 << 10)
    else:
        assert (ended.limit, ended.status, ended.stderr) == (None, 0, b"x" * (8 << 10))


def test_memory_error_after_a_flood_of_errors_is_memory(backend):
    ended = backend.run(Job("import sys; sys.stderr.write('x\\n' * 100_000); bytearray(1 << 40)"), LIMITS)
    assert ended.limit == "memory"


def test_traceback_is_the_interpreters_own(backend, tmp_path):
    """What a program's error prints is what `python main.py` prints, but for the place of the file."""
    source = "def f(x):\n    return 1 / x\n\nprint(f(0))\n"
    (tmp_path / "main.py").write_text(source)
    bare = subprocess.run([sys.executable, "-I", "-S", "-B", tmp_path / "main.py"], capture_output=True, text=True).stderr
    ended = backend.run(Job(source), LIMITS)
    assert ended.stderr.decode() == bare.replace(str(tmp_path), "/tmp")


def test_talk(backend):
    heard = []

    def talk(reader, writer):
        for number in range(3):
            writer.write(b"%d\n" % number)
            writer.flush()
            heard.append(reader.readline())

    source = "with open(3) as r, open(4, 'w') as w:\n    for line in r: print(int(line) + 10, file=w, flush=True)\nprint('end')"
    ended = backend.run(Job(source, talk=talk), LIMITS)
    assert heard == [b"10\n", b"11\n", b"12\n"]
    assert (ended.status, ended.stdout) == (0, b"end\n")


def test_talk_ends_with_a_program_that_says_nothing(backend):
    heard = []
    ended = backend.run(Job("import time; time.sleep(60)", talk=lambda reader, writer: heard.append(reader.read())), QUICK)
    assert (heard, ended.limit) == ([b""], "timeout")


def test_an_error_of_the_parents_side_is_no_programs(backend):
    def talk(reader, writer):
        raise ZeroDivisionError("of ours")

    with pytest.raises(ZeroDivisionError, match="of ours"):
        backend.run(Job("open(3).read()", talk=talk), LIMITS)


def test_nothing_is_left(backend):
    """Files, modules, builtins of one run, in the next."""
    first = "import builtins, json, os\nopen('left', 'w').write('x'); os.mkdir('d'); builtins.print = json.loads = None"
    assert backend.run(Job(first), LIMITS).status == 0
    second = "import json, os; print(sorted(os.listdir('/tmp')), json.loads('1'))"
    assert backend.run(Job(second), LIMITS).stdout == b"['main.py'] 1\n"


def descriptors() -> set[str]:
    return {
        f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}"
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


def children() -> list[str]:
    own = str(os.getpid())
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [words[0] for words in stats if words[1] == own]


def test_many_runs_leave_no_descriptor_and_no_child(backend):
    for source in ("print(1)", "import time; time.sleep(60)", "while True: print('x' * 1000)"):
        backend.run(Job(source), Limits(time_s=0.1, stdout_kb=8))
    before, children_before = descriptors(), len(children())
    for number in range(60 if backend.name == "bubblewrap" else 300):
        assert backend.run(Job(f"print({number})"), LIMITS).stdout == b"%d\n" % number
    backend.run(Job("import time; time.sleep(60)"), Limits(time_s=0.1))
    backend.run(Job("print(1)", talk=lambda reader, writer: None), LIMITS)
    assert descriptors() == before
    assert len(children()) == children_before


def test_threads_at_once(backend):
    found = {}

    def work(number):
        for _ in range(5):
            ended = backend.run(Job(f"print({number})", stdin=b"%d" % number), LIMITS)
            found.setdefault(number, set()).add((ended.stdout, ended.trouble))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {(b"%d\n" % number, "")} for number in range(6)}


@pytest.fixture
def namespaces():
    try:
        backend = Namespaces(1)
    except Unfit as unfit:
        pytest.skip(str(unfit))
    yield backend
    backend.close()


def test_a_killed_zygote_is_no_programs_fault(namespaces):
    keeper = namespaces._idle[0].process.pid
    timer = threading.Timer(0.5, os.kill, (keeper, signal.SIGKILL))
    timer.start()
    ended = namespaces.run(Job("import time; time.sleep(60)"), LIMITS)
    timer.join()
    assert ended.trouble == "the sandbox's process was killed"
    assert namespaces.run(Job("print(1)"), LIMITS).stdout == b"1\n"


def test_a_zygote_killed_while_idle_is_replaced(namespaces):
    process = namespaces._idle[0].process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert namespaces.run(Job("print(1)"), LIMITS).stdout == b"1\n"


def test_a_program_cannot_kill_its_zygote(namespaces):
    source = """
import os
assert os.getppid() == 1 and not os.path.exists('/proc')  # else the first process is not the zygote
for number in (2, 9, 15, 19):
    try: os.kill(1, number)
    except PermissionError: pass
print('alive')
"""
    process = namespaces._idle[0].process.pid
    ended = namespaces.run(Job(source), LIMITS)
    assert (ended.trouble, ended.stdout) == ("", b"alive\n"), ended.stderr
    assert namespaces.run(Job("print(1)"), LIMITS).stdout == b"1\n"
    assert namespaces._idle[0].process.pid == process


def test_a_killed_trainer_leaves_nothing(backend):
    """SIGKILL of the process that runs programs ends all that runs inside."""
    name = type(backend).__name__
    source = f"""
        from potstill.sandbox.backend import Job
        from potstill.sandbox.verdict import Limits
        from potstill.sandbox.{backend.name} import {name}
        backend = {name}()
        print("ready", flush=True)
        backend.run(Job("import time; x = bytearray(1 << 20); time.sleep(600)"), Limits(time_s=600))
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE)
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"ready\n"
        inside: set[int] = set()
        until = time.monotonic() + 20
        while len(inside) < 3 and time.monotonic() < until:  # outer, first process, program
            inside = below(trainer.pid)
            time.sleep(0.05)
        assert len(inside) >= 3
    finally:
        trainer.kill()
        trainer.communicate()
    until = time.monotonic() + 20
    while (left := [pid for pid in inside if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == []


def below(pid: int) -> set[int]:
    """Descendants of a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

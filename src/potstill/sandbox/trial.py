"""The trial of a sandbox: it is attacked before it is trusted. And the choice of one that holds."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from potstill.core.errors import UserError
from potstill.sandbox.backend import Backend, Ended, Job, Unfit
from potstill.sandbox.interpreter import executable
from potstill.sandbox.verdict import Limits

NAMES = ("namespaces", "bubblewrap")  # the first that holds is taken
_LIMITS = Limits(time_s=2.0, memory_mb=256, stdout_kb=64)


@dataclass(frozen=True)
class Probe:
    """One attack, or one honest program.

    Attributes:
        what: was tried.
        held: whether the sandbox did as it must.
        found: what was seen.
    """

    what: str
    held: bool
    found: str


class NoSandbox(UserError):
    """No sandbox is safe here: what was tried, why each failed, what would help."""


@dataclass
class _Scene:
    """What there is to steal and to reach on this machine during a trial."""

    folder: Path
    secret: str
    tcp: socket.socket
    abstract: socket.socket
    victim: subprocess.Popen[bytes]

    def fill(self, source: str) -> str:
        port, name = self.tcp.getsockname()[1], f"potstill-{self.secret}"
        places = {
            "SECRET": str(self.folder / "secret"),
            "DROP": str(self.folder / "drop"),
            "ABSTRACT": "\0" + name,
            "NAME": name,
        }
        head = "".join(f"{key} = {value!r}\n" for key, value in {**places, "PORT": port, "VICTIM": self.victim.pid}.items())
        return head + source


Judge = Callable[[_Scene, Ended], str]  # what is wrong, "" where nothing is

_READ = """
import os, glob
for place in [SECRET, '/etc/passwd', '/etc/shadow', *glob.glob('/proc/[0-9]*/environ')[:3]]:
    try: open(place, 'rb').read(1) and print('read', place)
    except OSError: pass
print('done')
"""
_ENVIRONMENT = """
import os
for name in os.environ: print('variable', name)
print('done')
"""
_CONNECT = """
import socket
for family, place in ((socket.AF_INET, ('127.0.0.1', PORT)), (socket.AF_UNIX, ABSTRACT)):
    try: socket.socket(family).connect(place); print('connected', place)
    except OSError: pass
print('done')
"""
# without a sandbox that holds, a probe must do no harm: it takes away what it wrote, and aims at one process of the trial's own
_WRITE = """
import os
for place in (DROP, *(os.path.join(folder, NAME) for folder in ('/', '/dev', '/usr', os.path.dirname(os.__file__)))):
    try:
        open(place, 'x').close()
        print('wrote', place)
        place == DROP or os.unlink(place)
    except OSError: pass
print('done')
"""
_FORK = """
import os
for start in (os.fork, getattr(os, 'forkpty', os.fork)):
    try: pid = start()
    except OSError: continue
    if not pid: os._exit(0)
    print('a process')
print('done')
"""
_THREADS = """
import _thread, os
_thread.stack_size(32768)
lock = _thread.allocate_lock()
lock.acquire()
try:
    for _ in range(400): _thread.start_new_thread(lock.acquire, ())
    print('400 threads')
except RuntimeError: pass
print('done', flush=True)
os._exit(0)
"""
_SIGNAL = """
import os, signal
try: os.kill(VICTIM, signal.SIGKILL)
except OSError: pass
print('done')
"""
_LEAVE = """
import builtins, sys
open('left', 'w').write('x'); builtins.left = sys.modules['left'] = 1
"""
_FOUND = "import os, sys, builtins; print(os.path.exists('left'), hasattr(builtins, 'left'), 'left' in sys.modules)"
_HONEST = """
import sys, math, json, threading
from dataclasses import dataclass
@dataclass
class A: x: int
done = []
t = threading.Thread(target=lambda: done.append(1)); t.start(); t.join()
print(sum(map(int, sys.stdin.read().split())) + len(done), A(1), bytearray(50 << 20)[-1], 'ñ')
exit()
"""


def _silent(scene: _Scene, ended: Ended) -> str:
    """The program got to its end, and had nothing to boast of; of what it could read only the place is said."""
    printed = ended.stdout.decode("utf-8", "replace").splitlines()
    if printed[-1:] != ["done"]:
        return f"it did not come to its end: {_end(ended)}"
    return "; ".join(printed[:-1])[:200]


def _reached(scene: _Scene, ended: Ended) -> str:
    waiting, _, _ = select.select([scene.tcp, scene.abstract], [], [], 0)
    return _silent(scene, ended) or ("a connection arrived" if waiting else "")


def _dropped(scene: _Scene, ended: Ended) -> str:
    return _silent(scene, ended) or ("a file appeared" if (scene.folder / "drop").exists() else "")


def _killed(scene: _Scene, ended: Ended) -> str:
    return _silent(scene, ended) or ("" if scene.victim.poll() is None else "another process was killed")


def _limited(limit: str) -> Judge:
    return lambda scene, ended: "" if ended.limit == limit else f"ended by {_end(ended)}"


def _prints(text: str) -> Judge:
    return lambda scene, ended: (
        "" if ended.stdout == text.encode() and ended.status == 0 else f"{_end(ended)}; {ended.stdout[:100]!r}"
    )


def _end(ended: Ended) -> str:
    words = f"limit {ended.limit}, status {ended.status}, signal {ended.signal}"
    return words + (f", {ended.stderr.decode('utf-8', 'replace').strip()[-200:]}" if ended.stderr else "")


@dataclass(frozen=True)
class _Try:
    what: str
    source: str
    wrong: Judge
    limits: Limits = _LIMITS
    stdin: bytes = b""
    first: str = ""


_TRIES = (
    _Try("an honest program passes", _HONEST, _prints("7 A(x=1) 0 ñ\n"), stdin=b"1 2\n3\n"),
    _Try("reads no secret", _READ, _silent),
    _Try("sees no environment", _ENVIRONMENT, _silent),
    _Try("reaches no socket", _CONNECT, _reached),
    _Try("writes no file", _WRITE, _dropped),
    _Try("starts no process", _FORK, _silent),
    _Try("threads are limited", _THREADS, _silent, Limits(time_s=2.0, memory_mb=2048)),
    _Try("signals nobody", _SIGNAL, _killed),
    _Try("memory is limited", "x = bytearray(1 << 30)", _limited("memory")),
    _Try("time is limited", "while True: pass", _limited("timeout"), Limits(time_s=0.2)),
    _Try("output is limited", "while True: print('x' * 1000)", _limited("output_limit")),
    _Try("leaves nothing", _FOUND, _prints("False False False\n"), first=_LEAVE),
)


def probe(backend: Backend) -> list[Probe]:
    """Attack a sandbox, and see that an honest program passes; under two seconds on an idle machine."""
    with _scene() as scene:
        return [_tried(backend, scene, one) for one in _TRIES]


def _tried(backend: Backend, scene: _Scene, one: _Try) -> Probe:
    if one.first:
        backend.run(Job(scene.fill(one.first)), one.limits)
    ended = backend.run(Job(scene.fill(one.source), one.stdin), one.limits)
    wrong = ended.trouble or one.wrong(scene, ended)
    return Probe(one.what, not wrong, wrong or "held")


@contextlib.contextmanager
def _scene() -> Iterator[_Scene]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potstill-trial-")))
        secret = secrets.token_hex(8)
        (folder / "secret").write_text(secret)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0potstill-{secret}")
        abstract.listen()
        victim = stack.enter_context(subprocess.Popen([executable(), "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE))
        stack.callback(victim.kill)
        yield _Scene(folder, secret, tcp, abstract, victim)


def choose(name: str | None = None, workers: int | None = None) -> Backend:
    """The sandbox of that name, or the first that holds; `none` is none, and is not tried.

    Args:
        name: one of NAMES, `none`, or None for the first that holds.
        workers: programs at a time; None for the processor's cores less one.

    Raises:
        NoSandbox: with what was tried, why each failed, and what would help.
    """
    if name == "none":
        from potstill.sandbox.weak import Weak

        return Weak()
    if name is not None and name not in NAMES:
        raise NoSandbox(f"no sandbox is called {name!r}; there are {' and '.join(NAMES)}")
    reasons: list[str] = []
    for one in NAMES if name is None else (name,):
        try:
            backend = made(one, workers)
        except Unfit as unfit:
            reasons.append(f"  {one}: {unfit}")
            continue
        failed = [probe for probe in tried(backend) if not probe.held]
        if not failed:
            return backend
        backend.close()
        reasons.append(f"  {one}: does not hold: " + "; ".join(f"{probe.what}: {probe.found}" for probe in failed))
    raise NoSandbox("no sandbox is safe here, so no program is run\n" + "\n".join(reasons) + f"\n  {_remedy()}")


def _remedy() -> str:
    if sys.platform != "linux":
        return "sandboxes need Linux: use a Linux machine or a container, or --unsafe-no-sandbox if you trust every program"
    return "docs/sandbox.md says more of each remedy; --unsafe-no-sandbox only if you trust every program"


def made(name: str, workers: int | None = None) -> Backend:
    """A backend, not tried.

    Raises:
        Unfit: why it cannot be had here.
    """
    if sys.platform != "linux":
        raise Unfit(f"needs Linux, this is {platform.system()}")
    if name == "bubblewrap":
        from potstill.sandbox.bubblewrap import Bubblewrap

        return Bubblewrap()
    from potstill.sandbox.namespaces import Namespaces

    return Namespaces(workers)


def tried(backend: Backend) -> list[Probe]:
    """Its trial, or the one that this user, kernel, boot and version remember; only one that held is remembered."""
    path = _folder() / f"{backend.name}-{_key(backend)}.json"
    if remembered := _remembered(path):
        return remembered
    found = probe(backend)
    if all(one.held for one in found):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
            part.replace(path)
    return found


def _remembered(path: Path) -> list[Probe]:
    """The trial in a file; empty unless each of today's probes is there and held."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = [Probe(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
        if [one.what for one in found] == [one.what for one in _TRIES] and all(one.held is True for one in found):
            return found
    return []


def _folder() -> Path:
    home = os.path.expanduser("~")
    if home == "~":  # a user without a home: no file can be written below this, so nothing is remembered
        home = os.devnull
    return Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "potstill" / "sandbox"


def _key(backend: Backend) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    facts = [boot.read_text() if boot.exists() else str(time.time()), platform.release(), platform.version(), sys.version]
    facts += [executable(), str(os.geteuid()), backend.name, getattr(backend, "version", ""), _sources()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


@functools.cache
def _sources() -> str:
    """This package's own text: another version is tried again."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()

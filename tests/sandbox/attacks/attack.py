"""What an attack is: a program, and a canary that proves that it did what it must not."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from potstill.sandbox.backend import Ended
from potstill.sandbox.verdict import Limits

BEGINS = "print('BEGAN', flush=True)\n"
QUICK = Limits(time_s=2.0)


@dataclass
class Scene:
    """What there is to steal, to reach and to break on this machine while an attack runs."""

    folder: Path
    secret: str
    victim: subprocess.Popen[bytes]
    sockets: dict[str, socket.socket]
    inherited: int

    def fill(self, source: str) -> str:
        """The attack's source with this scene's places in it."""
        return Template(source).substitute(
            SECRET_FILE=self.folder / "secret.txt",
            DROP=self.folder / "drop",
            UNIX=self.folder / "socket",
            MARK=f"potstill-{self.secret}",
            ABSTRACT=f"potstill-{self.secret}",
            VICTIM=self.victim.pid,
            PARENT=os.getpid(),
            INHERITED=self.inherited,
            **{name.upper(): sock.getsockname()[1] for name, sock in self.sockets.items() if name in ("tcp", "tcp6", "udp")},
        )

    def reached(self, name: str) -> bool:
        """Whether somebody connected to, or wrote to, a socket of this scene."""
        sock = self.sockets[name]
        with suppress(BlockingIOError):
            if sock.type == socket.SOCK_DGRAM:
                return bool(sock.recv(100))
            sock.accept()[0].close()
            return True
        return False

    def dropped(self) -> bool:
        """Whether there is a file outside the sandbox that a program must not be able to write; takes it away."""
        path = self.folder / "drop"
        found = path.exists()
        path.unlink(missing_ok=True)
        return found

    def victim_state(self) -> str:
        """R or S for running, T for stopped, Z or X for dead."""
        return Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.victim.pid, signal.SIGKILL)
        self.victim.wait()
        for sock in self.sockets.values():
            sock.close()
        os.close(self.inherited)


def scene_in(folder: Path) -> Scene:
    secret = f"swordfish-{os.getpid()}"
    (folder / "secret.txt").write_text(secret)
    victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)", f"potstill-{secret}"])
    inherited = os.open(folder / "secret.txt", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    places = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "tcp6": (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
        "udp": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0potstill-{secret}"),
        "unix": (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
    }
    return Scene(folder, secret, victim, {name: _listening(*place) for name, place in places.items()}, inherited)


def _listening(family: int, kind: int, place: object) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.bind(place)
    if kind == socket.SOCK_STREAM:
        sock.listen()
    sock.setblocking(False)
    return sock


Canary = Callable[[Scene, Ended], bool]


@dataclass(frozen=True)
class Attack:
    """A hostile program.

    Attributes:
        source: with $NAMES of the scene.
        fired: whether it did what it must not.
        limits: of its run.
        then: a second program, run after the first; `fired` is asked of its end.
        as_root: whether a weak sandbox is broken by the superuser only.
        wait_s: how long what it left behind may take before the canary is asked.
    """

    source: str
    fired: Canary
    limits: Limits = QUICK
    then: str = ""
    wait_s: float = 0.0
    as_root: bool = False
    tidy: Callable[[Scene], None] = field(default=lambda scene: None)


def fires(attack: Attack, backend, scene: Scene) -> bool:
    """Run the attack; say whether its canary fired."""
    from potstill.sandbox.backend import Job

    try:
        for source in filter(None, (attack.source, attack.then)):
            ended = backend.run(Job(program=BEGINS + scene.fill(source), stdin=b"1 2 3\n"), attack.limits)
            assert ended.stdout.startswith(b"BEGAN"), ended  # what does not run breaks nothing, and proves nothing
        time.sleep(attack.wait_s)
        return attack.fired(scene, ended)
    finally:
        attack.tidy(scene)


def printed(text: str) -> Canary:
    """The program's output holds a text, of which $NAMES are the scene's."""
    return lambda scene, ended: scene.fill(text).encode() in ended.stdout


def printed_secret(scene: Scene, ended: Ended) -> bool:
    """The program's output holds the secret."""
    return scene.secret.encode() in ended.stdout


def dropped(scene: Scene, ended: Ended) -> bool:
    """There is a file outside the sandbox."""
    return scene.dropped()


def reached(name: str) -> Canary:
    """A socket of this machine heard from the program."""
    return lambda scene, ended: scene.reached(name)

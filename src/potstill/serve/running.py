"""The server's life: its address, its start, its end."""

import asyncio
import ipaddress
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError
from potstill.edges.llamacpp import AHEAD
from potstill.serve.app import Limits, State, application
from potstill.serve.connections import configuration
from potstill.serve.installed import check_installed
from potstill.serve.offers import offers_of, picked
from potstill.serve.shelf import Opened, Opening, Shelf, drafter_of, open_offer

GRACE_S = 10.0  # for answers on their way, when the server is asked to stop
STOPPING = "the server is stopping"


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Attributes:
        port: 0: any that is free.
        names: hosts, besides addresses, under which clients know it.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    names: tuple[str, ...] = ()

    def listening(self) -> socket.socket:
        """A socket that listens.

        Raises:
            UserError: the port is in use or not allowed, or the host is none of this machine's.
        """
        family, where = self._resolved()
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(where)
            found.listen(128)
        except OSError as error:
            found.close()
            remedy = "choose another with --port, or 0 for any that is free"
            raise UserError(f"port {self.port} of {self.host} cannot be had ({error.strerror}); {remedy}") from None
        return found

    def loopback(self) -> bool:
        """Whether this machine alone can reach it.

        Raises:
            UserError: no such host.
        """
        return ipaddress.ip_address(self._resolved()[1][0]).is_loopback

    def _resolved(self) -> tuple[int, Any]:
        """Its family and the address that its name stands for."""
        try:
            family, _, _, _, where = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except (socket.gaierror, UnicodeError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--host {self.host}: no such address ({said})") from None
        return family, where


_KEY = "a key has at least 8 printable ASCII characters without spaces"


def key_of(file: Path | None, variable: str | None) -> str:
    """The key that requests must carry; "" where none is wanted.

    Raises:
        UserError: it is empty, is not plain ASCII, or cannot be read.
    """
    if file is not None and variable is not None:
        raise UserError("give --key-file or --key-env, not both")
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
            open_to_all = bool(file.stat().st_mode & stat.S_IROTH)
        except (OSError, ValueError) as error:
            raise UserError(f"--key-file {file}: cannot be read ({error})") from None
        if open_to_all:
            raise UserError(f"--key-file {file}: everybody on this machine can read it; chmod 600 {file}")
        where = f"--key-file {file}"
    elif variable is not None:
        if variable not in os.environ:
            made = f"export {variable}=$(openssl rand -hex 16)"
            raise UserError(f"--key-env {variable}: no such variable is set; {_KEY}: {made}")
        key, where = os.environ[variable].strip(), f"--key-env {variable}"
    else:
        return ""
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where}: {_KEY}")
    return key


def check_key(address: Address, key: str, *, without: bool) -> None:
    """Refuse to let other machines ask without a key, unless that is asked for.

    Args:
        without: whether the user said `--no-key`.

    Raises:
        UserError: there is no key where one is needed, or one with `--no-key`.
    """
    if without and key:
        raise UserError("--no-key with a key: leave out one of the two")
    if not (key or without or address.loopback()):
        raise UserError(
            f"--host {address.host}: other machines could ask without a key; give one by --key-env NAME or --key-file FILE, "
            "or say --no-key if everybody who reaches this machine may ask"
        )


def serve(
    target: str,
    address: Address,
    opening: Opening,
    limits: Limits,
    *,
    key: str = "",
    models: Sequence[str] = (),
    draft: str = "",
    ahead: int = AHEAD,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a target until SIGINT or SIGTERM, then let answers end for `GRACE_S` and cut those that do not.

    Args:
        models: that the playground compares at first.
        draft: `RUN:MODEL` or `FILE.gguf` that writes `ahead` tokens before the served model looks; "": none.
        say: for the lines that tell where it is.

    Raises:
        UserError: a package, the run, the model, its files or the port is not as it must be.
    """
    check_installed()
    offers = offers_of(target)
    chosen = picked(offers, models)
    drafter = drafter_of(offers[0], offers_of(draft)[0], opening, ahead) if draft else None
    teacher = next((offer.id for offer in offers if offer.role == "teacher"), "")
    with address.listening() as listening:
        say(f"opening {offers[0].id}")
        opened = open_offer(offers[0], opening, drafter)
        shelf = Shelf(offers, opening, opened)
        state = State(shelf, limits, offers[0].id, chosen, teacher)
        try:
            for line in _told(address, listening, opened, state, key):
                say(line)
            asyncio.run(_run(state, listening, key, address.names, say))
        finally:
            shelf.close()
        say("stopped")


def _told(address: Address, listening: socket.socket, opened: Opened, state: State, key: str) -> Iterator[str]:
    port = listening.getsockname()[1]
    host = f"[{address.host}]" if ":" in address.host else address.host
    engine = opened.engine
    drafter = opened.drafter
    ahead = f", {drafter.offer.id} {drafter.ahead} tokens ahead" if drafter is not None else ""
    yield (
        f"serving {opened.offer.id} by {engine.runtime}{ahead}: {engine.positions:,} tokens of context, "
        f"{engine.most} answers at once, {state.limits.queue} may wait"
    )
    others = len(state.shelf.offers) - 1
    yield f"OpenAI's API  http://{host}:{port}/v1" + (f"  ({others} more models open when they are asked)" if others else "")
    yield f"playground    http://{host}:{port}/"
    if not address.loopback():
        yield "any machine that reaches this one can ask" + (" with the key" if key else ": there is no key")


async def _run(state: State, listening: socket.socket, key: str, names: Sequence[str], say: Callable[[str], None]) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to us: the library's way ends in the default of a signal, and so not with 0."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    app = application(state, key=key, names=names)
    config = configuration(app, timeout_graceful_shutdown=round(GRACE_S) + 5)
    server = Server(config)
    with _stopped_by_signals(state, server, say):
        await server.serve(sockets=[listening])


@contextmanager
def _stopped_by_signals(state: State, server: Any, say: Callable[[str], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets answers end, the second cuts them."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if state.stopping:
            state.cut()
            return
        state.stopping = STOPPING
        server.should_exit = True
        say(f"stopping: answers that are being written have {GRACE_S:g} s to end; Ctrl-C again cuts them")
        loop.call_later(GRACE_S, state.cut)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):
                loop.remove_signal_handler(number)

"""A server in this process, for tests: real models, real sockets."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from potstill.data.prompts import Prompts
from potstill.edges.llamacpp_stream import Wish
from potstill.serve.app import Limits, State, application
from potstill.serve.connections import configuration
from potstill.serve.engine import Answer, Engine
from potstill.serve.offers import Offer
from potstill.serve.shelf import Opened, Opening, Shelf, open_offer


@dataclass(frozen=True)
class Site:
    """A server that runs.

    Attributes:
        opened: the served model.
    """

    port: int
    state: State
    opened: Opened
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def health(self) -> tuple[int, dict[str, Any]]:
        status, body, _ = self.send("GET", "/healthz")
        return status, json.loads(body)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        """One request as it is, and its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def post(self, path: str, value: Any, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        return self.send("POST", path, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def until_idle(self, seconds: float = 10.0) -> None:
        """Wait until no answer is being written."""
        end = time.monotonic() + seconds
        while self.state.admission().running or self.state.admission().waiting:
            assert time.monotonic() < end, "answers are still being written"
            time.sleep(0.02)


def offer(folder: Any, id: str, role: str = "kd", **more: Any) -> Offer:
    return Offer(id, id.title(), role, f"path:{folder}", Prompts(), **more)


def answered(engine: Engine, prompt: list[int], wish: Wish, **more: Any) -> tuple[list[str], Answer]:
    """The pieces of one answer, and what is known of it."""
    answer = Answer(engine, prompt, wish, **more)

    async def work() -> list[str]:
        return [piece.text async for piece in answer.pieces()]

    return asyncio.run(work()), answer


@contextmanager
def serving(
    offers: Sequence[Offer],
    *,
    opened: Opened | None = None,
    opening: Opening | None = None,
    limits: Limits | None = None,
    key: str = "",
    teacher: str = "",
    names: Sequence[str] = (),
    **connecting: Any,
) -> Iterator[Site]:
    """A server while inside; the first offer is the one that it serves."""
    import uvicorn

    opening = opening or Opening("torch", context=8192)
    opened = opened or open_offer(offers[0], opening)
    shelf = Shelf(offers, opening, opened)
    state = State(shelf, limits or Limits(max_tokens=8000), offers[0].id, [one.id for one in offers], teacher)
    config = configuration(application(state, key=key, names=names), port=0, **connecting)
    server = uvicorn.Server(config)
    loops = list[asyncio.AbstractEventLoop]()

    async def work() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        (listening,) = server.servers[0].sockets
        yield Site(listening.getsockname()[1], state, opened, loops[0])
    finally:
        server.should_exit = True
        thread.join(20)
        shelf.close()
    assert not thread.is_alive()

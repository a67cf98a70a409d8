"""What every request passes before anything reads it: who asks, from where, and how much it brings."""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from potstill.serve.protocol import Refusal

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
OPEN = ("/", "/healthz")  # without a key: the page holds no data, and asks for the key itself
READ_S = 30.0  # for a whole body
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """An ASGI application that hands on requests of this site or of programs, with a key where one is set.

    A page of another site cannot ask: its browser sends `Origin` or `Sec-Fetch-Site`, and no answer allows another origin. A
    name that is pointed at this machine (DNS rebinding) shows in `Host`: only addresses, `localhost` and `names` are taken.

    Args:
        key: what `Authorization: Bearer` must hold; "": nothing.
        names: hosts, besides addresses, under which this server is known.
        most_bytes: of a body; a larger one is refused by its announced length, before it is read.
    """

    def __init__(self, app: Any, *, key: str, names: Collection[str], most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes
        self._key = key.encode()
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
                return
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            self._check_site(scope, headers)
            self._check_key(scope["path"], headers)
            self._check_length(scope, headers)
        except Refusal as refusal:
            await refuse(send_guarded, refusal, close=True)
            return
        await self.app(scope, receive, send_guarded)

    def _check_site(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self._known(host):
            raise Refusal(
                403,
                f"this server is not known as {host[:100]!r}; ask its address, or start it with --allow-host NAME",
                "host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"{scope.get('scheme', 'http')}://{host}".lower():
            raise Refusal(403, f"pages of {origin[:100]!r} may not ask this server", "origin")
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        link = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"  # to the page, which may be followed
        if foreign and not link:
            raise Refusal(403, "pages of other sites may not ask this server", "origin")

    def _known(self, host: str) -> bool:
        name = _name(host)
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if not self._key or path in OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise Refusal(401, "the key is missing or wrong", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_length(self, scope: Scope, headers: dict[str, str]) -> None:
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be JSON: send Content-Type: application/json", "content_type")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self.most_bytes:
            raise _too_long(self.most_bytes)


class Vanished(Exception):
    """The client closed the connection, or does not read."""


async def body_of(receive: Receive, most_bytes: int) -> bytes:
    """A request's body, counted while it comes.

    Raises:
        Refusal: 413, or 408: it did not come in time.
        Vanished: the client is gone.
    """
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(READ_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Vanished
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most_bytes:
                    raise _too_long(most_bytes)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {READ_S:.0f} s", "timeout") from None


def _too_long(most_bytes: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most_bytes:,} bytes", "body_too_large")


async def refuse(send: Send, refusal: Refusal, close: bool = False) -> None:
    """Answer with an error as OpenAI writes them.

    Args:
        close: the connection, whose body was not read.
    """
    body = json.dumps(refusal.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """A host without its port, in small letters."""
    try:
        found = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
    return found.lower().rstrip(".")

"""Connections of clients: how the library is set, and how long one may be silent before its request is there."""

import asyncio
from typing import Any

HEAD_S = 10.0  # for a request line and its headers
IDLE_S = 15  # between two requests
CONNECTIONS = 512


def configuration(app: Any, *, head_s: float = HEAD_S, connections: int = CONNECTIONS, **more: Any) -> Any:
    """How uvicorn serves an application.

    Args:
        head_s: a connection whose request has not come so far is closed. The library times only what follows an answer, and
            counts silent connections: a few hundred would keep everybody else out.
        connections: at once.
        more: of `uvicorn.Config`.
    """
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol  # by httptools or h11, whichever is installed

    class Hasty(base):
        """Closes a connection whose headers do not come in time; the beginning of a later request counts as well."""

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel()  # headers are complete; from here bodies and answers have limits of their own
            elif self.timeout_keep_alive_task is None and self._late is None:
                self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self._late = self.loop.call_later(head_s, self.transport.close)

        def _cancel(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return uvicorn.Config(
        app,
        http=Hasty,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=IDLE_S,
        limit_concurrency=connections,
        **more,
    )

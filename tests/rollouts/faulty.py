"""A small server of OpenAI's API that does what a test says, request by request."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-1234"


@dataclass
class Reply:
    """What goes out for one request.

    Attributes:
        sent: share of the body that is sent before the connection is closed.
        read: is set once the client has read it all and gone.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent: float = 1.0
    delay_s: float = 0.0
    read: threading.Event | None = None


def chat(text: str | None, ended: str = "stop", usage: Any = (3, 2), **more: Any) -> dict[str, Any]:
    """A whole answer of `/chat/completions`."""
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if usage else None
    return {"choices": [{"message": {"content": text}, "finish_reason": ended, **more}], "usage": counts}


def error(message: str, code: str = "") -> dict[str, Any]:
    return {"error": {"message": message, "code": code}}


@dataclass
class Server:
    """Attributes:
    asked: path and body of each request, in the order of their arrival.
    most: requests that were open at the same time.
    """

    url: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most: int = 0


@contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Reply | dict[str, Any]], port: int = 0) -> Iterator[Server]:
    """A server while inside.

    Args:
        answer: number of the request (from 0) and its body -> what to send.
    """
    server, lock, open_now = Server(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.asked)
                server.asked.append((self.path, body))
                server.keys.append(self.headers.get("Authorization"))
                open_now[0] += 1
                server.most = max(server.most, open_now[0])
            found = answer(number, body)
            reply = found if isinstance(found, Reply) else Reply(found)
            done.wait(reply.delay_s)
            with lock:
                open_now[0] -= 1  # before the answer goes out: with it in hand the client may ask again at once
            self.send(reply)

        def send(self, reply: Reply) -> None:
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: int(reply.sent * len(data))])
            if reply.read is not None:
                self.rfile.read()  # ends when the client closes
                reply.read.set()

        def log_message(self, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:  # a client that gave up is no fault of the test's
            pass

    done = threading.Event()
    http = Quiet(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        done.set()
        http.shutdown()
        http.server_close()

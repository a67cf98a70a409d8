"""A server under load: sixteen streams that never rest, among clients that vanish and clients that ask for nonsense.

    python benchmarks/serve.py RUN:MODEL                     # ten seconds
    python benchmarks/serve.py RUN:MODEL --minute            # sixty
    python benchmarks/serve.py FILE.gguf --engine torch

Starts `potstill serve` as a process of its own, with `--streams` places and no queue for more than these clients. For the time
given, `--clients` clients stream answers one after another with OpenAI's client, one vanishes each half second in the middle of
its answer, and one sends in turn what must be refused: broken JSON, bytes that are not UTF-8, a prompt that is too long, a huge
body, an unknown model, a page of another site. Then the server is asked to stop in the middle of an answer.

Printed: answers, tokens per second of all streams together, time to the first token, the statuses of the refusals, memory and
threads of the server (llama.cpp's process included) after a third of the time and at the end, and how it ended. It fails where
a status is another than it should be, an answer is broken, or the server does not end with 0.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _bench import facts

QUESTIONS = ["Write a program that prints {}.", "What is {} plus 7?", "Tell me about the number {}.", "¿Cuánto es {} por 3?"]
CHAT = "/v1/chat/completions"


class Load:
    """Clients of one server, and what they saw."""

    def __init__(self, port: int, model: str, max_tokens: int) -> None:
        self.port, self.model, self.max_tokens = port, model, max_tokens
        self.first_s: list[float] = []
        self.answers = self.pieces = 0  # a piece of text is a token, but for characters of several
        self.broken: list[str] = []
        self.refused: Counter[str] = Counter()
        self.vanished = 0
        self.over = threading.Event()

    def body(self, text: str, **more: Any) -> dict[str, Any]:
        """A request for an answer."""
        return {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": self.max_tokens, **more}

    def streaming(self, number: int) -> None:
        """One answer after another."""
        import openai

        with openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=300) as client:
            n = number
            while not self.over.is_set():
                n += 17
                text, begun, first = QUESTIONS[n % len(QUESTIONS)].format(n), time.perf_counter(), 0.0
                try:
                    asked = self.body(text, temperature=0.7, seed=n, stream_options={"include_usage": True})
                    for chunk in client.chat.completions.create(**asked, stream=True):
                        if chunk.choices and chunk.choices[0].delta.content:
                            first = first or time.perf_counter() - begun
                            self.pieces += 1
                        if chunk.usage is not None:
                            self.answers += 1
                            self.first_s.append(first)
                except Exception as error:
                    self.broken.append(repr(error)[:200])

    def vanishing(self) -> None:
        """Clients that close in the middle."""
        while not self.over.wait(0.5):
            body = json.dumps(self.body("Count to one thousand.", stream=True)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", self.port), 60) as sock:
                sock.sendall(head.encode() + body)
                sock.recv(500)
            self.vanished += 1

    def refusals(self) -> None:
        """What must be refused, one after the other."""
        good = json.dumps(self.body("Hi")).encode()
        long = json.dumps(self.body("word " * 100_000)).encode()
        json_type = {"Content-Type": "application/json"}
        wrong: list[tuple[str, int, bytes, dict[str, str]]] = [
            ("broken JSON", 400, b"{", json_type),
            ("not UTF-8", 400, b'{"model": "\xff"}', json_type),
            ("too long", 400, long, json_type),
            ("huge", 413, b"", {**json_type, "Content-Length": "5000000000"}),
            ("no such model", 404, good.replace(self.model.encode(), b"none"), json_type),
            ("another site", 403, good, {**json_type, "Origin": "https://attacker.example"}),
        ]
        while not self.over.wait(0.2):
            for name, status, body, headers in wrong:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                try:
                    connection.request("POST", CHAT, body, headers)
                    found = connection.getresponse().status
                    self.refused[f"{name}: {found}"] += 1
                    if found != status:
                        self.broken.append(f"{name}: {found} instead of {status}")
                finally:
                    connection.close()


def resources(pid: int) -> dict[str, int]:
    """Of a process and its children."""
    import psutil

    own = psutil.Process(pid)
    family = [own, *own.children(recursive=True)]
    return {"resident_bytes": sum(p.memory_info().rss for p in family), "threads": sum(p.num_threads() for p in family)}


def main() -> None:
    """Measure, print, fail where something was wrong."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--minute", action="store_true", help="for sixty seconds instead of ten")
    parser.add_argument("--seconds", type=float, help="for so long")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--draft", metavar="FILE", help="a smaller model that writes ahead of it")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--save", type=Path, help="also write that object to a file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    seconds = asked.seconds or (60.0 if asked.minute else 10.0)
    words = [sys.executable, "-m", "potstill", "serve", asked.target, "--port", "0", "--engine", asked.engine]
    words += ["--draft", asked.draft] if asked.draft else []
    words += ["--streams", str(asked.streams), "--queue", str(asked.clients + 8), "--context", str(asked.context)]
    words += ["--max-tokens", str(asked.max_tokens)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert server.stdout is not None
    try:
        lines = [server.stdout.readline() for _ in range(4)]
        if not lines[-1]:
            raise SystemExit("the server did not start; see above")
        found = measure(server, lines, asked, seconds)
    finally:
        server.kill()
        server.wait()
    for name, value in found.items():
        print(f"{name:<22}{value}")
    if asked.save:
        asked.save.write_text(json.dumps(found, indent=2) + "\n")
    if asked.json:
        print(json.dumps(found))
    if found["broken"] or found["exit_code"]:
        raise SystemExit(f"broken: {found['broken'][:5]}, exit code {found['exit_code']}")


def measure(server: "subprocess.Popen[str]", lines: list[str], asked: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Put it under load and stop it."""
    assert server.stdout is not None
    told = lines[1].partition(" by ")
    port = int(lines[2].split(":")[2].split("/")[0])
    load = Load(port, told[0].removeprefix("serving ").strip(), asked.max_tokens)
    threads = [threading.Thread(target=load.streaming, args=(n,)) for n in range(asked.clients)]
    threads += [threading.Thread(target=load.vanishing), threading.Thread(target=load.refusals)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    early = resources(server.pid)
    time.sleep(max(0.0, begun + seconds - time.perf_counter()))
    taken, pieces, late = time.perf_counter() - begun, load.pieces, resources(server.pid)
    load.over.set()
    for thread in threads:
        thread.join(120)
    final = Load(port, load.model, asked.max_tokens)  # its answer may be cut
    last = threading.Thread(target=final.streaming, args=(1,))
    last.start()
    time.sleep(0.5)
    final.over.set()
    server.send_signal(signal.SIGTERM)
    last.join(60)
    code = server.wait(60)
    first = sorted(load.first_s) or [0.0]
    return {
        "runtime": told[2].partition(":")[0],
        "clients": asked.clients,
        "streams": asked.streams,
        "seconds": round(taken, 1),
        "answers": load.answers,
        "tokens_per_s": round(pieces / taken, 1),
        "first_token_s": {"median": round(statistics.median(first), 3), "p95": round(first[int(0.95 * (len(first) - 1))], 3)},
        "vanished": load.vanished,
        "refused": dict(sorted(load.refused.items())),
        "early": early,
        "late": late,
        "broken": load.broken,
        "exit_code": code,
        **facts(),
    }


if __name__ == "__main__":
    main()

"""Headless Chromium, told what to do over a pipe, and a file server that writes down what it is asked for."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Where a folder's files are served, without any header of ours, while inside."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


class Page:
    """One tab.

    Attributes:
        requests: the address of everything that the page and its workers asked for.
        said: errors and warnings of its console.
    """

    def __init__(self, to_browser: Any, from_browser: Any) -> None:
        self._to, self._from = to_browser, from_browser
        self._number = 0
        self._session: str | None = None
        self._buffer = b""
        self.requests: list[str] = []
        self.said: list[str] = []

    def open(self, url: str, width: int = 1280, height: int = 800, language: str = "en") -> None:
        """In a new tab, as far as the address is there."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        agent = self.call("Browser.getVersion")["userAgent"]
        self.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.resize(width, height)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int) -> None:
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._send(message)
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def value(self, script: str) -> Any:
        """What a script gives, awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"].get("description", done["exceptionDetails"]["text"]))
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until a script gives something true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{script} after {seconds} s; the page says {self.value('document.body.innerText')!r}; {self.said}"
                )
            time.sleep(0.05)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, *, ctrl: bool = False) -> None:
        for kind in ("keyDown", "keyUp"):
            how: dict[str, Any] = {"modifiers": 2} if ctrl else {}
            if key == "Enter" and kind == "keyDown" and not ctrl:
                how = {"text": "\r"}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **how)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _send(self, message: dict[str, Any]) -> None:
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = self._from.read1(65536)
            if not piece:
                raise RuntimeError("Chromium ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Target.attachedToTarget":
                self._number += 1
                told = {"id": self._number, "method": "Network.enable", "sessionId": params["sessionId"]}
                if params["targetInfo"]["type"] != "page":
                    self._send(told)
            case "Runtime.exceptionThrown":
                self.said.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.said.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser of its own that reaches this machine alone, its profile in the folder."""
    assert CHROMIUM is not None
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    words += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--disable-background-networking"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

    def as_three_and_four() -> None:
        os.dup2(given[0], 3)
        os.dup2(given[1], 4)

    browser = subprocess.Popen(
        [CHROMIUM, *words],
        pass_fds=(3, 4),
        preexec_fn=as_three_and_four,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (theirs_in, theirs_out, *given):
        os.close(fd)
    with os.fdopen(ours_out, "wb") as to_browser, os.fdopen(ours_in, "rb") as from_browser:
        page = Page(to_browser, from_browser)
        try:
            yield page
        finally:
            page._session = None
            try:
                page.call("Browser.close")
                browser.wait(10)
            except Exception:
                browser.kill()
                browser.wait()

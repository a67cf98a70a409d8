"""Headless Chromium, spoken to through its own pipe: no other package is needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here: apt-get install chromium")


class Tab:
    """One page.

    Attributes:
        seen: what the browser told of it: requests, messages of the console, errors.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._held, self._count = write, read, b"", 0
        self._session = ""
        self.seen: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._count:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self.seen.append(told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            more = os.read(self._read, 1 << 16)
            assert more, "the browser ended"
            self._held += more
        line, _, self._held = self._held.partition(b"\0")
        return json.loads(line)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's, in CSS pixels; a narrow one is a phone's."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go to an address and wait until it is there."""
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def do(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.do(f"Boolean({script})"):
            assert time.monotonic() < end, f"never: {script}; the page says: {self.do('document.body.innerText')}"
            time.sleep(0.05)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """A key; `modifiers` is 2 for Ctrl."""
        for type in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=type, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)

    def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        box = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))

    def told(self, method: str) -> list[dict[str, Any]]:
        """Parameters of all events of a kind."""
        self.do("1")
        return [event["params"] for event in self.seen if event.get("method") == method]

    def complaints(self) -> list[str]:
        """Errors of scripts, and what the browser refused or warned of."""
        found = [str(event["exceptionDetails"]) for event in self.told("Runtime.exceptionThrown")]
        found += [
            entry["entry"]["text"] for entry in self.told("Log.entryAdded") if entry["entry"]["level"] in ("error", "warning")
        ]
        return found


@contextmanager
def tab(language: str = "en-US") -> Iterator[Tab]:
    """A new browser with one page, closed afterwards."""
    assert CHROMIUM is not None
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()

    def pipes() -> None:
        os.dup2(their_read, 103)
        os.dup2(their_write, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [CHROMIUM, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        words += [f"--user-data-dir={profile}", f"--lang={language}", f"--accept-lang={language}", "--no-first-run"]
        browser = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=pipes
        )
        os.close(their_read)
        os.close(their_write)
        try:
            yield Tab(our_write, our_read)
        finally:
            os.close(our_write)
            os.close(our_read)
            browser.terminate()
            browser.wait(10)

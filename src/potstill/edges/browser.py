"""A headless browser of the Chromium family, told what to do over a pipe, and the file server that it is shown.

The protocol: chromedevtools.github.io/devtools-protocol. A pipe and no port, so that nobody else on the machine speaks to it.
"""

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
_START_S, _CLOSE_S = 60, 10
_MEASURED = "dataset.measured"  # where a page's script writes what it measured; older exports have no such word
# the browser reads commands from file 3 and answers in file 4
_AS_THREE_AND_FOUR = """
import os, sys
for given, wanted in zip(sys.argv[1:3], (3, 4)):
    os.dup2(int(given), wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserFailed(Exception):
    """The browser ended, gave no answer in time, or the page did not do what was asked."""


@dataclass(frozen=True)
class PageTiming:
    """How a page that runs a model was measured, by the page's own clock.

    Attributes:
        browser: name and version.
        load_s: from its first script until the model is ready, files from this machine.
        first_s: until the first token of an answer.
        tokens_per_s: of the tokens after the first.
        tokens: of the answer.
        prompt: tokens of what was asked.
    """

    browser: str
    load_s: float
    first_s: float
    tokens_per_s: float
    tokens: int
    prompt: int


def browser_found(named: str = "") -> str | None:
    """Where a browser lies: the named one, else the first known; None: nowhere on PATH."""
    return next(filter(None, map(shutil.which, (named,) if named else PROGRAMS)), None)


def measure_page(folder: Path, program: str, tokens: int, timeout_s: float = 600) -> PageTiming:
    """Open a web export's folder in a browser with an empty profile, and have the page write so many tokens greedily.

    Raises:
        BrowserFailed: it did not, or is of an export that is older than measuring.
    """
    script = folder / "page.js"
    if not script.is_file() or _MEASURED not in script.read_text(encoding="utf-8", errors="replace"):
        raise BrowserFailed("its page.js knows no measuring, as in older exports; export it again")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        file_server(folder) as url,
        browsing(program, Path(profile), timeout_s=timeout_s) as page,
    ):
        page.open(f"{url}/?measure={tokens}")
        page.wait(f"document.body?.{_MEASURED} || document.body?.dataset.failed", timeout_s)
        if failed := page.value("document.body.dataset.failed"):
            raise BrowserFailed(f"the page says: {failed}")
        return _timing(page.version(), *page.value(f"[document.body.{_MEASURED}, document.body.dataset.loadedMs]"))


def _timing(browser: str, measured: str, loaded_ms: str) -> PageTiming:
    """What a page says that it measured; it may be anybody's page.

    Raises:
        BrowserFailed: these are no figures.
    """
    try:
        told = json.loads(measured)
        load_s, first_s, rate = float(loaded_ms) / 1000, float(told["first_s"]), float(told["tokens_per_s"])
        if all(math.isfinite(figure) and figure > 0 for figure in (load_s, first_s, rate)):
            return PageTiming(browser, load_s, first_s, rate, int(told["tokens"]), int(told["prompt"]))
    except (ValueError, TypeError, LookupError):  # an infinite rate is null in JSON
        pass
    raise BrowserFailed(f"the page measured {measured[:200]}, which are no figures")


def has_sandbox() -> bool:
    """Whether a browser keeps its pages in a sandbox here; Chromium has none for root."""
    return os.geteuid() != 0


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Where a folder's files are served on this machine alone, without any header of ours, while inside."""
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

    def __init__(self, to_browser: int, from_browser: int, timeout_s: float) -> None:
        self._to, self._from, self._timeout_s = to_browser, from_browser, timeout_s
        self._number = 0
        self._session: str | None = None
        self._buffer = b""
        self.requests: list[str] = []
        self.said: list[str] = []

    def attach(self) -> None:
        """Take an empty new tab."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def open(self, url: str) -> None:
        """In a new tab, as far as the address is there."""
        self.attach()
        self.go(url)

    def version(self) -> str:
        """The browser's name and version, such as "Chrome 150.0.1"."""
        return self.call("Browser.getVersion")["product"].removeprefix("Headless").replace("/", " ")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._send(message)
        end = time.monotonic() + self._timeout_s  # of the answer: a page may say other things without an end
        while True:
            answer = self._read(end)
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserFailed(f"{method}: {answer['error']}")
                return answer["result"]

    def value(self, script: str) -> Any:
        """What a script gives, awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            told = done["exceptionDetails"]
            raise BrowserFailed(told.get("exception", {}).get("description", told["text"]))
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until a script gives something true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            if time.monotonic() > end:
                shown = self.value("document.body?.innerText")
                raise BrowserFailed(f"{script} after {seconds} s; the page says {shown!r}; {self.said}")
            time.sleep(0.05)

    def close(self) -> None:
        """The browser, and all its tabs."""
        self._session = None
        self.call("Browser.close")

    def _send(self, message: dict[str, Any]) -> None:
        try:
            left = json.dumps(message).encode() + b"\0"
            while left:
                left = left[os.write(self._to, left) :]
        except OSError as error:
            raise BrowserFailed("the browser ended") from error

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                raise BrowserFailed(f"the browser gave no answer for {self._timeout_s:g} s")
            piece = os.read(self._from, 65536)
            if not piece:
                raise BrowserFailed("the browser ended")
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
                if params["targetInfo"]["type"] != "page":
                    self._send({"id": self._number, "method": "Network.enable", "sessionId": params["sessionId"]})
            case "Runtime.exceptionThrown":
                self.said.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.said.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))


P = TypeVar("P", bound=Page)


@contextmanager
def browsing(program: str, profile: Path, of: type[P] = Page, timeout_s: float = 60) -> Iterator[P]:
    """A browser that reaches this machine alone, while inside.

    Args:
        profile: a folder for what it keeps.
        of: the class of its tab.
        timeout_s: in which it must answer a command.

    Raises:
        BrowserFailed: it does not start.
    """
    import fcntl

    from_browser, theirs_out = os.pipe()
    theirs_in, to_browser = os.pipe()
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]  # clear of 3 and 4
    words = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    words += [f"--user-data-dir={profile}", "--disable-background-networking"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    words += [] if has_sandbox() else ["--no-sandbox"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _AS_THREE_AND_FOUR, *map(str, given), program, *words],
        pass_fds=given,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for fd in (theirs_in, theirs_out, *given):
        os.close(fd)
    page = of(to_browser, from_browser, _START_S)
    try:
        page.version()  # it is there
        page._timeout_s = timeout_s
        yield page
    finally:
        try:
            page._timeout_s = _CLOSE_S  # one that is silent is not waited for
            with suppress(BrowserFailed, subprocess.TimeoutExpired):
                page.close()
                process.wait(_CLOSE_S)
        finally:  # whatever comes meanwhile, such as Ctrl-C
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it left
            process.wait()
            os.close(to_browser)
            os.close(from_browser)

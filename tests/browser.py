"""Headless Chromium for tests: what the product does with it, and what people do with keys and screens."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from potstill.edges import browser
from potstill.edges.browser import file_server as file_server

CHROMIUM = browser.browser_found()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


class Page(browser.Page):
    """A tab that has a size and a language, and takes keys."""

    def open(self, url: str, width: int = 1280, height: int = 800, language: str = "en") -> None:
        self.attach()
        agent = self.call("Browser.getVersion")["userAgent"]
        self.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.resize(width, height)
        self.go(url)

    def resize(self, width: int, height: int) -> None:
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )

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


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser of its own that reaches this machine alone, its profile in the folder."""
    assert CHROMIUM is not None
    with browser.browsing(CHROMIUM, folder / "profile", Page) as page:
        yield page

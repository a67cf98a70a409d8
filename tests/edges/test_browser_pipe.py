"""A browser that is silent, or talks without an answer, is not waited for; whatever ends its use, it is gone afterwards."""

import os
import sys
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, needs_chromium

from potstill.edges import browser
from potstill.edges.browser import BrowserFailed, Page, browsing, measure_page

# it answers the first command, which asks for its version, and no other
DEAF = """
import os, time
os.write(4, b'{"id": 1, "result": {"product": "Deaf/1"}}\\0')
while True:
    time.sleep(0.01)
"""
CHATTERING = DEAF + '    os.write(4, b\'{"method": "Page.frameResized", "params": {}}\\0\')\n'


def program(folder: Path, script: str) -> str:
    path = folder / "browser"
    path.write_text(f"#!{sys.executable}\nimport os\nopen({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))\n{script}")
    path.chmod(0o755)
    return str(path)


def alive(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("script", [DEAF, CHATTERING], ids=["deaf", "chattering"])
def test_a_browser_without_answers_is_given_up_and_gone(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "_CLOSE_S", 0.2)
    with browsing(program(tmp_path, script), tmp_path, timeout_s=0.2) as page:
        with pytest.raises(BrowserFailed, match=r"gave no answer for 0\.2 s"):
            page.value("1")
        assert alive(tmp_path)
        page._timeout_s = 600  # as one who waits for a page that computes
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert not alive(tmp_path)


def test_ctrl_c_while_a_browser_is_closed_leaves_none_behind(tmp_path: Path) -> None:
    class Interrupting(Page):
        def close(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), browsing(program(tmp_path, DEAF), tmp_path, Interrupting):
        assert alive(tmp_path)
    assert not alive(tmp_path)


def test_a_page_that_is_older_than_measuring_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "page.js").write_text("document.body.dataset.loadedMs = 1;")
    with pytest.raises(BrowserFailed, match="knows no measuring, as in older exports; export it again"):
        measure_page(tmp_path, "no-such-browser", 8)


@needs_chromium
@pytest.mark.parametrize("rate", ["null", '"fast"'])
def test_a_page_without_figures_is_said_to_have_none(rate: str, tmp_path: Path) -> None:
    """null is what an infinite rate is in JSON, of a clock that did not move."""
    told = f'{{"tokens": 8, "prompt": 9, "first_s": 0.1, "tokens_per_s": {rate}}}'
    (tmp_path / "index.html").write_text("<!doctype html><body><script src=page.js></script>")
    (tmp_path / "page.js").write_text(f"document.body.dataset.loadedMs = 1; document.body.dataset.measured = '{told}';")
    assert CHROMIUM is not None
    with pytest.raises(BrowserFailed, match="which are no figures"):
        measure_page(tmp_path, CHROMIUM, 8)

"""Asking a run to stop, once in peace and twice at once."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from potstill.core.errors import Interrupted
from potstill.core.progress import Progress
from potstill.edges import ranks


class Stopper:
    """Ctrl-C and SIGTERM ask for a stop; a second Ctrl-C does not wait."""

    AGAIN_S = 5.0  # torchrun passes a terminal's Ctrl-C on to processes that got it already

    def __init__(self, progress: Progress) -> None:
        self.asked, self._since = False, 0.0
        self._progress = progress

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while inside; other threads than the main one cannot."""
        try:
            before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            if ranks.several() and time.monotonic() - self._since < self.AGAIN_S:
                return
            raise KeyboardInterrupt
        self.asked, self._since = True, time.monotonic()
        if ranks.several():  # said when all have agreed: the signal may mean that one of them is gone
            return
        self._progress.note("stopping: saving first (Ctrl-C again to stop at once)")

    def check(self, where: str) -> None:
        if any(ranks.gathered(self.asked)):
            raise Interrupted(f"stopped {where}; run the same command again to go on")

"""Asking a run to stop: answered at once, whatever the main thread is doing."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from potstill.core.errors import Interrupted
from potstill.core.progress import Progress
from potstill.edges import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVING = "stopping: saving first (Ctrl-C again to stop at once)"
AT_ONCE = "stopped at once; what was saved is kept: run the same command again to go on"


class Stopper:
    """Ctrl-C and SIGTERM.

    The first ends the work where it is, which is safe because files are whole or absent; after `hold` it only sets `asked`,
    and the work saves before it ends. The second never waits. Python itself answers a signal only between two of its own
    instructions, and one backward pass is one instruction: so a thread of its own reads the signals and answers.

    Args:
        at_once: end the process where its main thread does not obey; for programs, not for libraries.

    Attributes:
        asked: whether a stop was asked for.
    """

    AGAIN_S = 5.0  # torchrun passes a terminal's Ctrl-C on to processes that got it already
    OBEY_S = 2.0  # from the first Ctrl-C until a process with nothing to save is ended

    def __init__(self, progress: Progress | None = None, *, at_once: bool = False) -> None:
        self.asked = False
        self.progress = progress if progress is not None else Progress("quiet")
        self._at_once = at_once
        self._held, self._since = False, 0.0
        self._seen = self._handled = 0  # signals, by the thread that answers and by the main one
        self._ears: _Ears | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while inside; other threads than the main one cannot, and once is enough."""
        if self._ears is not None or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._ears = _Ears(self)
        try:
            yield
        finally:
            self._ears.close()
            self._ears = None

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """While inside, signals do what they did before `listening`."""
        heard = self._ears is not None
        if self._ears is not None:
            self._ears.close()
            self._ears = None
        try:
            yield
        finally:
            if heard:
                self._ears = _Ears(self)

    def hold(self) -> None:
        """From here on there is something to save: a stop waits until the work looks at `asked`."""
        self._held = True

    def released(self) -> None:
        """From here on there is nothing to save."""
        self._held = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While inside, a stop does not wait: for a part that can be done again.

        Raises:
            KeyboardInterrupt: a stop is asked for, or was before.
        """
        held = self._held
        try:
            self._held = False
            if self.asked and not ranks.several():
                raise KeyboardInterrupt
            yield
        finally:
            self._held = held

    def check(self, where: str) -> None:
        """Stop here when asked to.

        Raises:
            Interrupted: so it is.
        """
        if any(ranks.gathered(self.asked)):
            raise Interrupted(f"stopped {where}; run the same command again to go on")

    def handle(self, number: int, frame: Any) -> None:
        """In the main thread, as soon as that comes to itself."""
        first, self.asked = not self.asked, True
        if ranks.met():  # they save together, once all have agreed
            if first:
                self._since = time.monotonic()
            elif time.monotonic() - self._since >= self.AGAIN_S:
                raise KeyboardInterrupt
            return
        self._handled += 1
        if not self._held or max(self._handled, self._seen) > 1:
            raise KeyboardInterrupt

    def answer(self, number: int) -> float | None:
        """In the listening thread, at once; how many seconds to give the main thread, None: as many as it needs."""
        self._seen += 1
        if ranks.met():
            # torchrun sends SIGTERM also when one process is gone, and then nobody is stopping; a busy machine lets this thread
            # answer when all has been said
            if self._seen == 1 and number == signal.SIGINT and ranks.first() and ranks.several():
                self.progress.say(SAVING)
            return None
        if self._seen == 1:
            self.progress.say(SAVING if self._held else "stopping")
        elif self._at_once:
            self.end()
        return self.OBEY_S if self._at_once and not self._held else None

    def leave(self) -> None:
        """End a program that was asked to stop without the seconds that torch takes to free all it has; else do nothing."""
        if self._at_once and self.asked and ranks.world() == 1:  # several take leave of one another
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)

    def overdue(self) -> None:
        """The main thread has not obeyed in time."""
        if not self._held:
            self.end()

    def end(self) -> None:
        """End the process here and now, as a kill would, but with a word and a tidy terminal."""
        self.progress.restore()
        with suppress(OSError):
            os.write(2, f"{AT_ONCE}\n".encode())
        os._exit(130)


class _Ears:
    """Signals, as the operating system delivers them, read by a thread."""

    def __init__(self, stopper: Stopper) -> None:
        self._stopper = stopper
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, stopper.handle) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="potstill-signals", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        wait: float | None = None
        while True:
            ready, _, _ = select.select([self._reader], [], [], wait)
            if not ready:
                wait = None
                self._stopper.overdue()
                continue
            numbers = os.read(self._reader, 64)
            if not numbers:
                os.close(self._reader)
                return
            for number in numbers:
                if number in SIGNALS:
                    wait = self._stopper.answer(number)

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # which ranks want to keep to their very end
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.close(self._writer)
        if not sys.is_finalizing():
            self._thread.join(1.0)  # longer only where nobody reads what it says

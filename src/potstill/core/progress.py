"""What a person sees while long work runs, and the figures that are kept."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from potstill.core.artifact import write_text
from potstill.core.errors import UserError

Mode = Literal["auto", "bar", "lines", "quiet"]
OWN = ("step", "model", "row")  # what stages count; other counts, such as "validation row", are parts of these


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner for a person at a terminal, while nothing can be counted."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


class Progress:
    """One line of progress per stage: a live bar in a terminal, plain lines elsewhere, nothing when quiet."""

    LINE_EVERY_S = 10.0

    def __init__(self, mode: Mode = "auto") -> None:
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self.mode = mode
        self._live: Any = None
        self._task: Any = None
        self._name = ""
        self._said = self._last = 0.0
        self._begun: dict[str, float] = {}  # when each thing that is counted began
        self._counted: dict[str, int] = {}
        self._told: dict[str, int] = {}  # how often its count was told since then

    def note(self, text: str) -> None:
        """A line that stays; none when quiet."""
        if self.mode != "quiet":
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays, also when quiet: an answer to the user."""
        live = self._live
        if live is not None:
            live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def restore(self) -> None:
        """Give the terminal back as it was, from any thread, before the process is ended."""
        if self._live is not None:
            with suppress(OSError):
                os.write(2, b"\r\x1b[K\x1b[?25h")  # clear the bar's line, show the cursor

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Everything between is shown as one stage."""
        self._name = name
        self._said = self._last = time.monotonic()
        self._begun, self._counted, self._told = {}, {}, {}
        if self.mode == "bar":
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._live = Bar(
                TextColumn("{task.fields[name]:<14}", style="bold", markup=False),
                BarColumn(24),
                TextColumn("{task.fields[figures]}", markup=False),  # names of models, as the user wrote them
                console=Console(stderr=True),
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task("", total=None, name=name, figures=title)
        elif self.mode == "lines":
            self.note(f"{name:<14} {title}")
        try:
            yield
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = self._task = None

    def update(self, done: int, total: int | None, what: str = "step", start: int = 0, tick: str = "", **figures: str) -> None:
        """`done` of `total` things called `what`; a stage may count several things in turn.

        Args:
            total: None where it is not known beforehand.
            start: where a resumed stage began, so that the time left is honest.
            tick: what each call is, where many pass before one more is done: how many there were is shown too.
        """
        now = time.monotonic()
        if what not in self._begun or done < self._counted[what]:  # counted for the first time, or from the beginning again
            self._begun[what], self._told[what] = self._last, 0
        self._counted[what], self._last = done, now
        self._told[what] += 1
        text = f"{what} {done:,}" if total is None else f"{what} {done}/{total}"
        if total is not None:
            rate = (done - start) / max(now - self._begun[what], 1e-9)
            figures["left"] = clock((total - done) / rate) if rate > 0 else "?"
        if tick:
            figures = {tick: f"{self._told[what]:,}", **figures}
        text = "  ".join([text, *(f"{name} {value}" for name, value in figures.items())])
        if self._live is not None:
            self._live.update(self._task, completed=done, total=total, figures=text)
        elif self.mode == "lines" and self._is_due(now, what, done == total):
            self._said = now
            self.note(f"{self._name:<14} {text}")

    def _is_due(self, now: float, what: str, last: bool) -> bool:
        """Whether a line is worth it: one in a while, and the last of the stage's own count or of a long one."""
        return now - self._said >= self.LINE_EVERY_S or (last and (what in OWN or now - self._begun[what] >= self.LINE_EVERY_S))


class MetricsLog:
    """Every figure of a stage, one JSON object a line in `metrics.jsonl`, and in TensorBoard when asked for.

    A silent one keeps nothing: of several processes one writes.
    """

    def __init__(self, folder: Path, sinks: tuple[str, ...] = (), silent: bool = False) -> None:
        self.path, self.silent = folder / "metrics.jsonl", silent
        self._writer: Any = None
        if "tensorboard" in sinks and not silent:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("log = ['tensorboard'] needs the package: pip install 'potstill[tensorboard]'") from None
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Forget what was written after a checkpoint's step, and all without one, so that a resumed stage writes it once."""
        if self.silent:
            return
        kept = [line for line in self.read() if line["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, **figures: float) -> None:
        if self.silent:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def read(self) -> list[dict[str, Any]]:
        """The figures so far; a line cut short by a kill is left out."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

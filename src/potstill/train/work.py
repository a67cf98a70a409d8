"""What a stage works in: its folder, its log, its progress, and whether it was asked to stop."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from potstill.core.component import Settings
from potstill.core.progress import MetricsLog, Progress
from potstill.edges import ranks

T = TypeVar("T")
SHOWN_EVERY = 64  # rows


class CheckpointRules(Settings):
    """When training state is saved; has no influence on the result."""

    every_minutes: float = Field(default=10.0, gt=0, description="minutes between checkpoints")
    every_steps: int | None = Field(default=None, ge=1, description="also every so many optimiser steps")


@dataclass
class Work:
    """A stage's work folder; renamed into the artifact once the stage has finished.

    Attributes:
        folder: exists; may hold what an interrupted run of the same fingerprint left.
        name: the stage's name, for messages.
        sinks: further places for figures, such as "tensorboard".
        stop_requested: true after Ctrl-C.
        hold: called once there is something to save: from then on Ctrl-C waits until the stage looks at `stop_requested`, or
            has finished. Before, it ends the stage where it is.
        interruptible: a context; while inside, Ctrl-C raises KeyboardInterrupt though the stage holds.
    """

    folder: Path
    name: str
    progress: Progress = field(default_factory=lambda: Progress("quiet"))
    checkpoint: CheckpointRules = field(default_factory=CheckpointRules)
    sinks: tuple[str, ...] = ()
    stop_requested: Callable[[], bool] = lambda: False
    hold: Callable[[], None] = lambda: None
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext

    def __post_init__(self) -> None:
        if ranks.first():  # another one might make it again after it was renamed
            self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(self.folder, self.sinks, silent=not ranks.first())

    def note(self, line: str) -> None:
        """A line for a person, under the stage's name."""
        self.progress.note(f"{self.name:<14} {line}")

    def watched(self, rows: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """The same rows, counted on the progress line as they pass: `what 128/400`, or `what 128` without a total."""
        for done, row in enumerate(rows, 1):
            yield row
            if done % SHOWN_EVERY == 0 or done == total:
                self.progress.update(done, total, what)

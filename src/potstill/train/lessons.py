"""What each optimiser step reads: rows of data, or what the student wrote of them."""

from collections.abc import Mapping
from typing import Any, Protocol

from potstill.data.batches import Order, StepRow, rows_of
from potstill.data.store import TokenStore


class Lessons(Protocol):
    """The rows of every step, from the seed and the step's number, and of sampled ones the student as it is then.

    Attributes:
        total: optimiser steps.
        writes: whether the student is asked for some of the rows.
    """

    total: int
    writes: bool

    @property
    def generated(self) -> int:
        """Tokens drawn so far, each once, however often it is learned."""
        ...

    def __call__(self, step: int) -> list[StepRow]:
        """The rows of a step, counted from 0; asked for in order, from where training goes on."""
        ...

    def rows(self, step: int) -> list[int]:
        """Numbers of the rows of data that the step takes."""
        ...

    def check(self, step: int, means: Mapping[str, float]) -> None:
        """Look at a step's figures before its update.

        Raises:
            UserError: they say that something is wrong.
        """
        ...

    def figures(self) -> Mapping[str, float]:
        """What the curves show of the last step's rows."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        ...


class Data:
    """Rows of data, epoch after epoch.

    Args:
        order: of the store's rows.
        total: optimiser steps.
        last: rows of the whole run; None where steps alone bound it.
    """

    generated = 0
    writes = False

    def __init__(self, store: TokenStore, order: Order, total: int, last: int | None) -> None:
        self.store, self.order, self.total, self.last = store, order, total, last

    def rows(self, step: int) -> list[int]:
        """Numbers of a step's rows in the store."""
        return self.order.step(step, self.last)

    def __call__(self, step: int) -> list[StepRow]:
        return rows_of(self.store, self.rows(step))

    def check(self, step: int, means: Mapping[str, float]) -> None:
        pass

    def figures(self) -> Mapping[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

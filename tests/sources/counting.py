"""How rows that are left out are counted."""

from collections import Counter

from potstill.core.types import Example
from potstill.sources import Source


def left_out(source: Source) -> Counter[str]:
    """How many rows are left out of all splits together, by reason."""
    counted: Counter[str] = Counter()

    def skip(example: Example, reason: str) -> None:
        counted[reason] += 1

    list(source.rows(skip))
    return counted

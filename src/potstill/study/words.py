"""Lists and counts in a sentence."""

from collections.abc import Sequence


def plain(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def joined(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"

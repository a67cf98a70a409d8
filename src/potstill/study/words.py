"""Lists and counts in a sentence."""

from collections.abc import Mapping, Sequence


def plain(value: float | None) -> str:
    """`1,234`, or `unknown`."""
    return "unknown" if value is None else f"{value:,.0f}"


def joined(names: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def bits_in_words(bits: int) -> str:
    """`4 bits`; also where nobody knows, since four are what is usual."""
    return f"{bits or 4} bits"


def reasons(counts: Mapping[str, int]) -> str:
    """`3 too long, 1 empty`; what was counted 0 times is left out."""
    return ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)

"""How figures are written, the same on the page, in the card and in the terminal."""

import math
from collections.abc import Sequence
from typing import Any

MISSING = "–"


def decimals(unit: str, ci: Sequence[float] | None = None) -> int:
    """Digits after the point: one on a scale of 0 to 100, else three; more for an interval that would look empty."""
    base = 1 if unit in ("0–100", "%") else 3
    if not ci or abs(ci[1] - ci[0]) <= 1e-9 * max(abs(ci[0]), abs(ci[1])):
        return base  # a point, but for rounding
    return min(6, max(base, 1 - math.floor(math.log10(abs(ci[1] - ci[0])))))


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Fixed digits with a true minus sign; never "−0.0"."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "−")


def interval(ci: Sequence[float] | None, digits: int, *, signed: bool = False) -> str:
    """`[1.2, 3.0]`; a bound of 0.004 keeps its digits, because whether an interval touches 0 is the verdict."""
    if ci is None:
        return "[no interval]"
    low, high = (
        number(bound, digits if bound == 0 else min(9, max(digits, -math.floor(math.log10(abs(bound))))), signed=signed)
        if abs(bound) < 0.5 * 10.0**-digits
        else number(bound, digits, signed=signed)
        for bound in ci
    )
    return f"[{low}, {high}]"


def estimate(value: float | None, ci: Sequence[float] | None, unit: str, *, signed: bool = False) -> str:
    """`41.2 [39.8, 42.6]`."""
    digits = decimals(unit, ci)
    return number(value, digits, signed=signed) + (f" {interval(ci, digits, signed=signed)}" if ci else "")


def amount(value: float, metric: Any, digits: int) -> str:
    """`2.1 points of Rouge-L`, `0.120 nats/token of NLL`; the metric is a `MetricInfo`."""
    unit = "points" if metric.unit in ("0–100", "%") else metric.unit
    return (
        f"{number(abs(value), digits)} {unit} of {metric.title}" if unit else f"{number(abs(value), digits)} of {metric.title}"
    )


def count(value: float | None) -> str:
    """`181 k`, `1.54 B`: three significant digits."""
    if value is None:
        return MISSING
    for scale, suffix in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale * 0.9995:
            return _three(value / scale) + suffix
    return f"{value:.0f}"


def scientific(value: float) -> str:
    """`1.3e-06`; of nothing `0`."""
    return f"{value:.1e}" if value else "0"


def size(value: float | None) -> str:
    """Bytes in decimal units: `724 kB`, `1.03 GB`."""
    if value is None:
        return MISSING
    for scale, suffix in ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")):
        if abs(value) >= scale * 0.9995:
            return _three(value / scale) + suffix
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """`12.3 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _three(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(abs(value), 1.0) * 1.0005)))}f}"

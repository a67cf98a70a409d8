"""Models that began as one, compared where each had taken as much as the others: at equal tokens, at equal FLOPs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Curve = Mapping[str, Any]
Axis = Literal["tokens", "flops"]
AXES: tuple[Axis, ...] = ("tokens", "flops")
VALIDATED = "validation_"  # begins the name of each figure that was taken on validation rows
ALIKE = 0.01  # budgets this near to one another are equal: the last validations compare them already


@dataclass(frozen=True)
class Reached:
    """A figure at the budget: mean over seeds, and the least and the most of them."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Arm:
    """One model.

    Attributes:
        whole: what all of its training took, mean over seeds; None: unknown.
        share: the budget as a share of it.
        reached: figure -> at the budget; None: not measured, or not up to there.
    """

    name: str
    role: str
    whole: float | None
    share: float | None
    reached: dict[str, Reached | None]


@dataclass(frozen=True)
class Budget:
    """Arms of one beginning at the largest budget that all of them reached.

    Attributes:
        budget: tokens read and written, or floating-point operations; of arms that took unknown amounts nothing is said.
        differ: whether the arms took different amounts; else their last validations say the same.
    """

    axis: Axis
    budget: float
    figures: tuple[str, ...]
    arms: tuple[Arm, ...]
    differ: bool


def budgets(curves: Sequence[Curve]) -> list[Budget]:
    """For each beginning that several models share, their figures on validation rows at equal tokens and at equal FLOPs.

    Args:
        curves: per model and seed, {"name", "role", "seed", "began", "points": [{"read", "written", "flops", "validation_…"}]}.
            Curves of equal `began` are of one starting model and the same validation rows.
    """
    found = []
    for arms in _groups(curves):
        figures = tuple(dict.fromkeys(n for seeds in arms.values() for c in seeds for p in c["points"] for n in _figures(p)))
        found += [one for axis in AXES if (one := _at_equal(axis, arms, figures)) is not None]
    return found


def _groups(curves: Sequence[Curve]) -> list[dict[str, list[Curve]]]:
    """Models by what all their seeds began as; those that share it with none are left out."""
    models: dict[str, list[Curve]] = {}
    for curve in curves:
        models.setdefault(curve["name"], []).append(curve)
    groups: dict[tuple[Any, ...], dict[str, list[Curve]]] = {}
    for name, seeds in models.items():
        if all(curve.get("began") for curve in seeds):
            one = len({curve["began"] for curve in seeds}) == 1
            began = {curve["began"] if one else (str(curve["seed"]), curve["began"]) for curve in seeds}
            groups.setdefault(tuple(sorted(began)), {})[name] = seeds
    return [arms for arms in groups.values() if len(arms) > 1]


def _at_equal(axis: Axis, arms: Mapping[str, Sequence[Curve]], figures: Sequence[str]) -> Budget | None:
    """None where fewer than two arms took a known amount."""
    ends = {name: [_last(curve, axis) for curve in seeds] for name, seeds in arms.items()}
    known = {name: [x for x in xs if x is not None] for name, xs in ends.items() if None not in xs}
    if len(known) < 2:
        return None
    budget = min(x for xs in known.values() for x in xs)
    most = max(x for xs in known.values() for x in xs)
    found = []
    for name, seeds in arms.items():
        whole = math.fsum(known[name]) / len(known[name]) if name in known else None
        reached = {figure: _over_seeds(seeds, axis, figure, budget) if name in known else None for figure in figures}
        found.append(Arm(name, seeds[0]["role"], whole, budget / whole if whole else None, reached))
    return Budget(axis, budget, tuple(figures), tuple(found), most > (1 + ALIKE) * budget)


def _over_seeds(seeds: Sequence[Curve], axis: Axis, figure: str, budget: float) -> Reached | None:
    values = [interpolated(_line(curve, axis, figure), budget) for curve in seeds]
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return None
    return Reached(math.fsum(there) / len(there), min(there), max(there))


def interpolated(line: Sequence[tuple[float, float]], x: float) -> float | None:
    """The height at x of a line through points in the order of their x, straight between them; None outside of them."""
    before = [point for point in line if point[0] <= x]
    after = [point for point in line if point[0] > x]
    if not before or (not after and before[-1][0] < x):
        return None
    (x0, y0), (x1, y1) = before[-1], after[0] if after else before[-1]
    return y0 if x0 == x else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _line(curve: Curve, axis: Axis, figure: str) -> list[tuple[float, float]]:
    found = [(amount(point, axis), point.get(figure)) for point in curve["points"]]
    return sorted(((x, y) for x, y in found if x is not None and y is not None), key=lambda point: point[0])


def _last(curve: Curve, axis: Axis) -> float | None:
    """The amount at the last validation; None where it is unknown, or nothing was validated."""
    found = [amount(point, axis) for point in curve["points"] if _figures(point)]
    return max((x for x in found if x is not None), default=None) if None not in found else None


def amount(point: Mapping[str, Any], axis: Axis) -> float | None:
    """Tokens read and written, or floating-point operations, up to a validation; None: unknown."""
    if axis == "flops":
        return point.get("flops")
    read, written = point.get("read"), point.get("written")
    return read + written if read is not None and written is not None else None


def _figures(point: Mapping[str, Any]) -> list[str]:
    return [name for name, value in point.items() if name.startswith(VALIDATED) and value is not None]

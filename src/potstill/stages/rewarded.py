"""What became of each reward over a run, and whether the form alone was learned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from potstill.rewards import Reward
from potstill.train.grading import names_of

FEWEST = 8  # rounds; with fewer nothing is said of a rise
FULL = 0.95  # of a reward that judges correctness, which is at most 1: from there it can hardly rise
ERRORS = 2.0  # standard errors of the difference that a rise has to exceed


@dataclass(frozen=True)
class Course:
    """One reward over a run: means over its first and its last quarter of rounds.

    Attributes:
        rose: whether the last is above the first by more than two standard errors; None: too few rounds to tell.
        correctness: whether the reward judges the answer itself, not its form.
        attribution: its share of the advantages' variance, mean over the rounds that had any; None: none had.
    """

    first: float
    last: float
    rose: bool | None
    correctness: bool
    attribution: float | None
    highest: float | None = None  # of a round's means; None: of a run of an earlier version


def courses(lines: Sequence[Mapping[str, float]], rewards: Sequence[Reward]) -> dict[str, Course]:
    """Each reward's course, from the lines of metrics.jsonl; of a reward that never gave a figure there is none."""
    rounds = rounds_of(lines)
    found = {}
    for name, reward in zip(names_of(rewards), rewards, strict=True):
        curve = [line[key] for line in rounds if (key := f"samples_reward_{name}") in line]
        parts = [line[key] for line in rounds if (key := f"samples_attribution_{name}") in line]
        if curve:
            first, last, up = rose(curve)
            part = sum(parts) / len(parts) if parts else None
            found[name] = Course(first, last, up, type(reward).correctness, part, max(curve))
    return found


def rounds_of(lines: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The lines of metrics.jsonl with which a round of answers began."""
    return [line for line in lines if line.get("samples_age") == 0]


def rose(curve: Sequence[float]) -> tuple[float, float, bool | None]:
    """Means of a curve's first and last quarter, and whether it rose between them."""
    quarter = max(1, len(curve) // 4)
    first, last = curve[:quarter], curve[-quarter:]
    (low, spread), (high, other) = _mean_and_error(first), _mean_and_error(last)
    return low, high, high - low > max(ERRORS * math.hypot(spread, other), 1e-9) if len(curve) >= FEWEST else None


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    count, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, count - 1)
    return mean, math.sqrt(variance / count)


def format_only(found: Mapping[str, Course]) -> bool:
    """Whether a reward of the form rose, and of one or more that judge correctness none did, though it could have."""
    judged = [course.rose for course in found.values() if course.correctness and course.first < FULL]
    return any(c.rose for c in found.values() if not c.correctness) and bool(judged) and not any(judged)


def summary_of(found: Mapping[str, Course]) -> dict[str, Any]:
    """For an artifact's summary."""
    return {"rewards": {name: asdict(course) for name, course in found.items()}, "format_only": format_only(found)}


def in_words(summary: Mapping[str, Any]) -> str:
    """For the line that says a stage is done: each reward's two means, after `format only` where that is so."""
    found = {name: Course(**course) for name, course in summary.get("rewards", {}).items()}
    said = [f"{name} {course.first:.3g} → {course.last:.3g}" for name, course in found.items()]
    said += [f"no answer ever earned {name}" for name, course in found.items() if course.correctness and course.highest == 0]
    if summary.get("format_only"):
        return f"format only: rewards of the form rose, correctness did not ({', '.join(said)})"
    if found and not any(course.correctness for course in found.values()):
        said.append("no reward judges correctness")
    return ", ".join(said)

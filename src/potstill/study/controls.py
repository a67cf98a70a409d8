"""Whether a control was trained like what it controls."""

from collections.abc import Sequence
from typing import Any

from potstill.study.records import ModelRow

EQUAL_WITHIN = 0.01  # relative; a last, smaller batch makes counts differ by less


def unequal(x: float | None, y: float | None) -> bool:
    return x is not None and y is not None and abs(x - y) > EQUAL_WITHIN * max(x, y)


def equal_tokens(a: ModelRow, b: ModelRow) -> bool | None:
    if unequal(a.mean_tokens(), b.mean_tokens()) or unequal(a.mean_steps(), b.mean_steps()):
        return False
    return None if a.mean_tokens() is None or b.mean_tokens() is None else True


def trained_apart(a: ModelRow, b: ModelRow) -> dict[str, tuple[Any, Any]]:
    """Each setting of training in which two models differ, with both values; nothing where one's training is unknown."""
    if a.trained_with is None or b.trained_with is None:
        return {}
    keys = dict.fromkeys((*a.trained_with, *b.trained_with))
    values = {key: (a.trained_with.get(key, "unset"), b.trained_with.get(key, "unset")) for key in keys if key != "searched"}
    searched = _searched(a), _searched(b)
    alike = {key for key in searched[0] if _same_values(searched[0][key], searched[1].get(key, ()))}
    picked = {key for key in values for field in alike if key == field or key.startswith(f"{field}.")}
    return {key: (x, y) for key, (x, y) in values.items() if x != y and key not in picked}


def searched_apart(a: ModelRow, b: ModelRow) -> list[str]:
    """A sentence for each setting that was searched for one of two models and not over the same values for the other.

    Values that a search picked may differ: each method has its own best ones. What must be equal is what was tried.
    """
    if a.trained_with is None or b.trained_with is None:
        return []
    told = []
    for key in dict.fromkeys((*_searched(a), *_searched(b))):
        x, y = (_searched(row).get(key, ()) for row in (a, b))
        if _same_values(x, y):
            continue
        more, less, most, least = (a, b, len(x), len(y)) if len(x) >= len(y) else (b, a, len(y), len(x))
        if most == 1:  # one value is no search
            continue
        over = "over other values" if least == most else f"over {_values(least)}"
        theirs = over if least else "was not"
        favours = f": this favours {more.name}" if most > least else ""
        told.append(f"{more.name}'s {key} was searched over {_values(most)}, {less.name}'s {theirs}{favours}.")
    return told


def _searched(row: ModelRow) -> dict[str, Any]:
    return (row.trained_with or {}).get("searched", {})


def _same_values(x: Sequence[Any], y: Sequence[Any]) -> bool:
    """The same ones, in whatever order; they may be tables."""
    return len(x) == len(y) and all(value in y for value in x)


def _values(count: int) -> str:
    return "1 value" if count == 1 else f"{count} values"

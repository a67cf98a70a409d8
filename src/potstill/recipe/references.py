"""What stages name: each other, files and folders; what is not there, comes too late, or does not fit."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import Problem
from potstill.recipe.header import Header
from potstill.recipe.healing import Healed
from potstill.recipe.judged import Judged
from potstill.recipe.places import place_of
from potstill.stages.base import Stage
from potstill.stages.refs import StageRef


def twice_named(stages: Sequence[Judged]) -> Iterator[Problem]:
    """Names that an earlier stage has already."""
    names = _names(stages)
    for i, judged in enumerate(stages):
        first = names.index(names[i])
        if names[i] is not None and names[i] != "" and first < i:
            yield Problem(f"{judged.label}.name", f"{stages[first].label} already has this name", repr(names[i]))


def reference_problems(stages: Sequence[Judged], number: int) -> Iterator[Problem]:
    """What is wrong with the references of one stage to others."""
    names, judged = _names(stages), stages[number]
    for place, target, ref in _references(judged):
        where, shown = f"{judged.label}.{place}", repr(f"stage:{target}")
        if target in names[:number]:
            made = stages[names.index(target)].stage
            if made is not None and ref is not None and made.makes not in ref.accepts:
                yield Problem(where, f"'{target}' makes {_a(made.makes)}, and this needs {_a(ref.accepts[0])}", shown)
        else:
            yield Problem(where, _not_earlier(target, names, number, stages), shown)


def _not_earlier(target: str, names: Sequence[Any], number: int, stages: Sequence[Judged]) -> str:
    """Why a reference finds no earlier stage."""
    if target == names[number]:
        return "refers to its own stage; a stage can only use earlier ones"
    if (name := _name(stages[number])) in _needed_by(target, stages):
        return f"'{target}' in turn needs '{name}'; stages cannot need each other"
    if target in names:
        return f"'{target}' comes later; move it before this stage"
    return f"no earlier stage of that name{suggest(target, [name for name in names[:number] if isinstance(name, str)])}"


def _references(judged: Judged, scheme: str = "stage") -> Iterator[tuple[str, str, StageRef | None]]:
    """Place and target of each `stage:NAME` (or `path:FOLDER`) of the file.

    Where a default or a placeholder stands for what the file says, references are read off the bare table.
    """
    if judged.stage is not None:
        for place, ref in judged.stage.references():
            if ref.scheme == scheme and not judged.wounded(place):
                yield place, ref.target, ref
    known = {problem.place for problem in judged.problems}
    for place, target in _bare_references(judged.raw, (), scheme):
        if (judged.stage is None or judged.wounded(place)) and f"{judged.label}.{place}" not in known:
            yield place, target, None


def _bare_references(raw: Any, loc: tuple[int | str, ...], scheme: str) -> Iterator[tuple[str, str]]:
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        if isinstance(value, str) and (found := re.fullmatch(rf"{scheme}:(\S+)", value)):
            yield place_of("", (*loc, key)), found[1]
        yield from _bare_references(value, (*loc, key), scheme)


def mismatches(stages: Sequence[Judged], number: int) -> Iterator[Problem]:
    """What does not fit between a stage and those that it refers to, where both say what the file says."""
    judged = stages[number]
    if judged.stage is None:
        return
    earlier: dict[str, Stage] = {}
    for other in stages[:number]:
        if other.stage is not None:
            earlier.setdefault(str(other.raw.get("name")), other.stage)
    used = [other for name in _needs(judged) for other in stages[:number] if _name(other) == name]
    for place, rule in judged.stage.mismatches(earlier):
        words = set(re.findall(r"\w+", place))
        guessed = any(words & set(re.findall(r"\w+", wound)) for other in used for wound in other.healed.wounds)
        if not guessed and not judged.wounded(place):
            yield Problem(f"{judged.label}.{place}", rule)


def header_path(header: Healed[Header], beside: Path | None) -> Iterator[Problem]:
    """The file of the recipe's own `data`, if it is not there.

    Args:
        beside: the recipe's own folder, where a path that counts from the current one may have been meant to start.
    """
    data = header.value.data if header.value is not None else None
    path = getattr(data, "path", None)
    if isinstance(path, str) and not header.wounded("data.path") and (rule := _missing(path, beside)):
        yield Problem("data.path", rule, repr(path))


def stage_paths(judged: Judged, beside: Path | None) -> Iterator[Problem]:
    """Files and folders that one stage names itself, and that are not there."""
    known = {problem.place for problem in judged.problems}
    own = judged.raw.get("data") if isinstance(judged.raw, dict) else None
    path = own.get("path") if isinstance(own, dict) else getattr(own, "path", None)
    reads = judged.stage is None or bool(judged.stage.sources())
    reported = bool(known & {f"{judged.label}.data.path", f"{judged.label}.data"})
    if isinstance(path, str) and reads and not reported and (rule := _missing(path, beside)):
        yield Problem(f"{judged.label}.data.path", rule, repr(path))
    for place, target, _ in _references(judged, "path"):
        if rule := _missing(target, beside):
            yield Problem(f"{judged.label}.{place}", rule, repr(f"path:{target}"))


def _missing(path: str, beside: Path | None) -> str | None:
    """Why there is no such file or folder, or None."""
    full = Path(os.path.expanduser(path))  # unlike pathlib's, leaves the home of nobody as it is
    if os.path.exists(full):  # unlike pathlib's, false for a name that is too long
        return None
    rule = "no such file" if full.suffix else "no such folder"
    if path.startswith("~") or full.is_absolute():
        return rule + suggest(full.name, _listed(full.parent))
    if beside is not None and os.path.exists(beside / full):
        near = f"; did you mean '{os.path.relpath(beside / full)}', beside the recipe?"
    else:
        near = suggest(full.name, _listed(full.parent))
    return f"{rule}{near} (relative to the current directory {Path.cwd()})"


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):  # no folder, not ours to read, a zero byte
        return []


def _needs(judged: Judged) -> list[str]:
    return [target for _, target, _ in _references(judged)]


def _needed_by(name: str, stages: Sequence[Judged]) -> set[str]:
    """Every stage that the named one refers to, directly or through others."""
    needs = {_name(judged): _needs(judged) for judged in stages}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for target in needs.get(waiting.pop(), []):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def _name(judged: Judged) -> str:
    """The name that others refer to; empty where it is no text."""
    name = judged.raw.get("name") if isinstance(judged.raw, dict) else None
    return name if isinstance(name, str) else ""


def _names(stages: Sequence[Judged]) -> list[Any]:
    return [judged.raw.get("name") if isinstance(judged.raw, dict) else None for judged in stages]


def _a(noun: str) -> str:
    if noun == "rows":
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

"""What stages name: each other, files and folders; what is not there, comes too late, or does not fit."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.core.component import suggest
from potstill.core.errors import Problem
from potstill.recipe.header import Header
from potstill.stages.base import Stage
from potstill.stages.refs import StageRef


def reference_problems(stages: list[Stage | None], names: list[Any]) -> Iterator[Problem]:
    needs = {stage.name: [ref.target for _, ref in stage.references() if ref.scheme == "stage"] for stage in stages if stage}
    for i, stage in enumerate(stages):
        for field, ref in stage.references() if stage else []:
            if ref.scheme != "stage":
                continue
            place, shown = f"stage[{i}].{field}", repr(str(ref))
            earlier = names[:i]
            if ref.target in earlier:
                made = stages[earlier.index(ref.target)]
                if made is not None and made.makes not in ref.accepts:
                    rule = f"'{ref.target}' makes {_a(made.makes)}, and this needs {_a(ref.accepts[0])}"
                    yield Problem(place, rule, shown)
            elif ref.target == names[i]:
                yield Problem(place, "refers to its own stage; a stage can only use earlier ones", shown)
            elif names[i] in _needed_by(ref.target, needs):
                yield Problem(place, f"'{ref.target}' in turn needs '{names[i]}'; stages cannot need each other", shown)
            elif ref.target in names:
                yield Problem(place, f"'{ref.target}' comes later; move it before this stage", shown)
            else:
                yield Problem(
                    place,
                    f"no earlier stage of that name{suggest(ref.target, [n for n in earlier if isinstance(n, str)])}",
                    shown,
                )


def mismatches(stages: list[Stage | None]) -> Iterator[Problem]:
    earlier: dict[str, Stage] = {}
    for i, stage in enumerate(stages):
        if stage is not None:
            for field, rule in stage.mismatches(earlier):
                yield Problem(f"stage[{i}].{field}", rule)
            earlier[stage.name] = stage


def _needed_by(name: str, needs: dict[str, list[str]]) -> set[str]:
    """Every stage that the named one refers to, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for target in needs.get(waiting.pop(), []):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def path_problems(header: Header | None, stages: list[Stage | None]) -> Iterator[Problem]:
    def missing(path: str) -> str | None:
        full = Path(os.path.expanduser(path))  # unlike pathlib's, leaves the home of nobody as it is
        if os.path.exists(full):  # unlike pathlib's, false for a name that is too long
            return None
        near = suggest(full.name, [p.name for p in full.parent.iterdir()] if os.path.isdir(full.parent) else [])
        return f"no such file{near}" if full.suffix else f"no such folder{near}"

    seen = set()
    shared = getattr(header.data, "path", None) if header and header.data else None
    for i, stage in enumerate(stages):
        for source in stage.sources() if stage else []:
            path = getattr(source, "path", None)
            if path is not None and path not in seen and (rule := missing(path)):
                yield Problem("data.path" if path == shared else f"stage[{i}].data.path", rule, repr(path))
            seen.add(path)
        for field, ref in stage.references() if stage else []:
            if isinstance(ref, StageRef) and ref.scheme == "path" and (rule := missing(ref.target)):
                yield Problem(f"stage[{i}].{field}", rule, repr(str(ref)))

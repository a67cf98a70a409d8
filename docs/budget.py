"""Models of a run at equal tokens and at equal FLOPs, from their validations: python docs/budget.py runs/gkd

The run need not have reached its evaluation; models are those that its evaluate stages name. Amounts at a validation are
counted; a run of an older version, whose validations hold no counts, is read as if they had grown in proportion to the steps.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.core.artifact import read_json
from potstill.core.errors import UserError
from potstill.core.numbers import MISSING, count
from potstill.run.folder import artifacts_of, find_run
from potstill.stages.lineage import Place, curve
from potstill.study.budget import VALIDATED, Arm, Budget, Reached, budgets

NAMES = {"tokens": "tokens (read and written)", "flops": "FLOP"}


def curves_of(run: Path) -> list[dict[str, Any]]:
    """A curve for each model and seed that a run's evaluate stages name and that was trained to its end there."""
    made = artifacts_of(run)
    found = []
    for row in _rows(run):
        for ident, artifact in made.items():
            if f"stage:{ident.partition('@')[0]}" == row["model"]:
                place = Place(f"path:{artifact.folder}", artifact)
                if place.trained is not None and "data" in place.summary:
                    found.append(curve(row["name"], row["role"], place))
    return found


def _rows(run: Path) -> Iterator[dict[str, str]]:
    seen = set()
    for stage in read_json(run / "recipe.json")["table"]["stage"]:
        for row in stage.get("study", ()) if stage["kind"] == "evaluate" else ():
            if row["name"] not in seen:
                seen.add(row["name"])
                yield row


def page(curves: Sequence[dict[str, Any]]) -> str:
    """Markdown: what each model's training took, then a table for each budget."""
    lines = ["| model | seeds | tokens read | tokens written | FLOP |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(one["name"] for one in curves):
        own = [one["spent"] for one in curves if one["name"] == name]
        cells = (count(_mean([spent[key] for spent in own])) for key in ("read", "written", "flops"))
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    found = budgets(curves)
    if not found:
        return "\n".join(
            [*lines, "", "No two of these models began as one, were validated alike, and took amounts that are known."]
        )
    return "\n\n".join(["\n".join(lines), *map(table, found)])


def table(budget: Budget) -> str:
    """One line for each model: mean over seeds, and the least and the most of them."""
    names = [figure.removeprefix(VALIDATED) for figure in budget.figures]
    alike = "" if budget.differ else "; all took as much, within 1 %"
    lines = [
        f"At equal {NAMES[budget.axis]}: {count(budget.budget)}{alike}. Validation rows; mean over seeds (least … most).",
        "",
        "| model | share of its training | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    return "\n".join(lines + [_line(arm, budget.figures) for arm in budget.arms])


def _line(arm: Arm, figures: Sequence[str]) -> str:
    share = MISSING if arm.share is None else f"{arm.share:.0%}"
    return f"| {arm.name} | {share} | {' | '.join(_cell(arm.reached[figure]) for figure in figures)} |"


def _cell(found: Reached | None) -> str:
    if found is None:
        return MISSING
    spread = f" ({found.low:.3f} … {found.high:.3f})" if found.low < found.high else ""
    return f"{found.mean:.3f}{spread}"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None


if __name__ == "__main__":
    try:
        print(page(curves_of(find_run(sys.argv[1]))))
    except UserError as error:
        sys.exit(f"error: {error}")

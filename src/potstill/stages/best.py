"""The best of several models, by their validations."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import Field, field_validator, model_validator

from potstill.core.artifact import MANIFEST, Artifact, Makes, write_json
from potstill.core.component import suggest
from potstill.core.errors import Problem, UserError
from potstill.metrics import Metric
from potstill.sources import Source
from potstill.stages.base import Context, Stage
from potstill.stages.lineage import SWEEP, Place, as_chosen, points
from potstill.stages.outlook import Cost, Outlook, Prospect
from potstill.stages.refs import StageRef
from potstill.stages.training import FIGURE, known_figures

CURVE = 40  # points of a candidate's loss that the report draws


class TrainedRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: a model that was validated while it was trained here."""

    schemes = ("stage", "path")
    accepts: ClassVar[tuple[Makes, ...]] = ("model",)


class Best(Stage, kind="best"):
    """Keep the model whose last validation was the best. A recipe's `sweep` makes this stage by itself.

    Where models are trained per seed, the mean over all seeds decides, so that every seed keeps the same candidate. Test rows
    have no part in it. Of equals the first is kept.
    """

    across_seeds: ClassVar[bool] = True

    candidates: tuple[TrainedRef, ...] = Field(min_length=1, description="stages that validate while they train")
    by: str = Field(
        default="validation_rouge_l", description="the last validation's figure: `validation_` and one of `validation.metrics`"
    )
    values: tuple[dict[str, Any], ...] = Field(default=(), description="for each candidate, the fields that were swept")
    data: Source | None = Field(default=None, description="checked before training: its validation split must not be empty")

    @model_validator(mode="after")
    def _values_of_each(self) -> "Best":
        if self.values and len(self.values) != len(self.candidates):
            raise ValueError(f"values has {len(self.values)} entries for {len(self.candidates)} candidates")
        return self

    @field_validator("by")
    @classmethod
    def _of_a_metric(cls, by: str) -> str:
        known = known_figures()
        if by not in known:
            raise ValueError(f"must be one of {', '.join(known)}{suggest(by, known)}")
        return by

    def metric(self) -> type[Metric]:
        """What `by` measures."""
        return cast(type[Metric], Metric.kinds[self.by.removeprefix(FIGURE)])

    def mismatches(self, earlier: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
        for number, ref in enumerate(self.candidates):
            stage = earlier.get(ref.target) if ref.scheme == "stage" else None
            validation = getattr(stage, "validation", None)
            if stage is not None and validation is None:
                yield (
                    f"candidates[{number}]",
                    f"'{ref.target}' is not validated while it is made, so nothing can be picked by it",
                )
            elif validation is not None and self.by not in validation.figures():
                measured = ", ".join(validation.figures())
                yield "by", f"'{ref.target}' does not measure {self.by} while it trains (it measures {measured})"

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        with suppress(UserError):  # rows that cannot be read are the problem of the stages that learn them
            if self.data is not None and next(self.data.examples("validation"), None) is None:
                rule = "the validation split is empty, so there is nothing to pick by; give it more rows, or set data.splits"
                yield Problem("data", rule)

    def prospect(self, outlook: Outlook) -> Prospect | None:
        return outlook.model(self.candidates[0])

    def cost(self, outlook: Outlook) -> Cost:
        found = self.prospect(outlook)
        return Cost(parameters=found.size.parameters) if found is not None else Cost()

    def closing(self, summary: dict[str, Any]) -> str:
        best = summary["best"]
        picked = best["candidates"][best["chosen"]]
        return f"picked {picked['label']} out of {len(best['candidates'])} by {best['by']} ({picked['mean']:.4g})"

    def run(self, context: Context) -> dict[str, Any]:
        found = [[as_chosen(artifact) for artifact in context.artifacts(ref)] for ref in self.candidates]
        scores = [[self.score(artifact) for artifact in seeds] for seeds in found]
        means = [math.fsum(each) / len(each) for each in scores]  # exact, whichever seed comes first
        best = (max if self.metric().higher_is_better else min)(means)
        number = means.index(best)
        table = []
        for ref, artifacts, mean, each in zip(self.candidates, found, means, scores, strict=True):
            values = self.values[len(table)] if self.values else {"model": ref.target}
            label = ", ".join(shown(value) for value in values.values())
            by_seed = sorted((Place("", a).seed or 0, score, a.folder) for a, score in zip(artifacts, each, strict=True))
            table.append({"label": label, "values": values, "mean": mean, "by_seed": [(s, score) for s, score, _ in by_seed]})
            table[-1]["curves"] = [{"seed": seed, "points": points(_lines(folder), CURVE)} for seed, _, folder in by_seed]
        chosen = found[number][0]  # of several seeds, the first is one's own
        take(chosen.folder, context.work.folder)
        swept = list(self.values[0]) if self.values else ["model"]
        name = context.work.name.partition("@")[0]
        metric = self.metric()
        sweep = {
            "stage": name,
            "kind": chosen.kind,
            "by": self.by,
            "title": metric.title,
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            "fields": swept,
            "chosen": number,
            "candidates": table,
        }
        write_json(context.work.folder / SWEEP, sweep)
        bare = [{key: value for key, value in row.items() if key != "curves"} for row in table]
        return {
            **chosen.summary,
            "trained": {**chosen.summary["trained"], "searched": self._searched()},
            "best": {**sweep, "candidates": bare},
            "chosen": {"kind": chosen.kind, "name": chosen.name, "stage": chosen.stage, "fingerprint": chosen.fingerprint},
        }

    def _searched(self) -> dict[str, list[Any]]:
        """Each swept setting with the values tried, by its name in the record `Trained`."""
        found: dict[str, list[Any]] = {}
        for values in self.values:
            for field, value in values.items():
                tried = found.setdefault("start" if field in ("model", "student") else field, [])
                tried += [value] if value not in tried else []
        return found

    def score(self, artifact: Artifact) -> float:
        """The last validation's figure; of a model that healing left as it was, the first one's.

        Raises:
            UserError: there is none.
        """
        measured = [line[self.by] for line in _lines(artifact.folder) if line.get(self.by) is not None]
        if not measured or not math.isfinite(measured[-1]):
            raise UserError(
                f"{self.name or self.kind}: {artifact.name} has no {self.by}, so nothing can be picked by it; it needs "
                "validation.times of at least 1, and validation rows that fit prompts.max_prompt_tokens"
            )
        return measured[0 if Place("", artifact).as_it_was else -1]


def take(source: Path, into: Path) -> None:
    """The files of a model's folder, as hard links where the file system has them; the manifest alone stays behind."""
    for left in into.iterdir():  # by a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    skipped = shutil.ignore_patterns(MANIFEST, SWEEP)
    shutil.copytree(source, into, ignore=skipped, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def shown(value: Any) -> str:
    """A swept value for people: `0.0001`, `generalised_jsd beta 0.5`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        rest = [f"{key} {shown(inner)}" for key, inner in value.items() if key != "kind"]
        return " ".join([str(value["kind"]), *rest] if "kind" in value else rest)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)


def _lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

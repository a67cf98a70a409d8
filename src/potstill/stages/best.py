"""The best of several models, by their validations."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.core.artifact import MANIFEST, Artifact, Makes, write_json
from potstill.core.errors import UserError
from potstill.sources import Source
from potstill.stages.base import Context, Stage
from potstill.stages.lineage import SWEEP, Place, as_chosen, points
from potstill.stages.refs import StageRef

By = Literal["validation_rouge_l", "validation_nll"]
HIGHER_IS_BETTER = {"validation_rouge_l": True, "validation_nll": False}
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

    candidates: tuple[TrainedRef, ...] = Field(min_length=1, description="stages of kind sft or distill to choose from")
    by: By = Field(default="validation_rouge_l", description="the last validation's figure; Rouge-L: highest, NLL: lowest")
    values: tuple[dict[str, Any], ...] = Field(default=(), description="for each candidate, the fields that were swept")
    data: Source | None = Field(default=None, description="rows; looked at before training, lest there be none to validate on")

    @model_validator(mode="after")
    def _values_of_each(self) -> "Best":
        if self.values and len(self.values) != len(self.candidates):
            raise ValueError(f"values has {len(self.values)} entries for {len(self.candidates)} candidates")
        return self

    def preflight(self) -> None:
        if self.data is not None and next(self.data.examples("validation"), None) is None:
            raise UserError(
                f"{self.name or self.kind}: the validation split of the data of kind '{self.data.kind}' is empty, so there is "
                "nothing to pick by; give it more rows, or set data.splits"
            )

    def run(self, context: Context) -> dict[str, Any]:
        found = [[as_chosen(artifact) for artifact in context.artifacts(ref)] for ref in self.candidates]
        scores = [[self.score(artifact) for artifact in seeds] for seeds in found]
        means = [math.fsum(each) / len(each) for each in scores]  # exact, whichever seed comes first
        best = (max if HIGHER_IS_BETTER[self.by] else min)(means)
        number = means.index(best)
        table = []
        for ref, artifacts, mean, each in zip(self.candidates, found, means, scores, strict=True):
            values = self.values[len(table)] if self.values else {"model": ref.target}
            told = ", ".join(shown(value) for value in values.values())
            by_seed = sorted((Place("", a).seed or 0, score, a.folder) for a, score in zip(artifacts, each, strict=True))
            table.append({"label": told, "values": values, "mean": mean, "by_seed": [(s, score) for s, score, _ in by_seed]})
            table[-1]["curves"] = [{"seed": seed, "points": points(_lines(folder), CURVE)} for seed, _, folder in by_seed]
        chosen = found[number][0]  # of several seeds, the first is one's own
        take(chosen.folder, context.work.folder)
        swept = list(self.values[0]) if self.values else ["model"]
        name = context.work.name.partition("@")[0]
        sweep = {"stage": name, "kind": chosen.kind, "by": self.by, "fields": swept, "chosen": number, "candidates": table}
        write_json(context.work.folder / SWEEP, sweep)
        bare = [{key: value for key, value in row.items() if key != "curves"} for row in table]
        return {
            **chosen.summary,
            "best": {**sweep, "candidates": bare},
            "chosen": {"kind": chosen.kind, "name": chosen.name, "stage": chosen.stage, "fingerprint": chosen.fingerprint},
        }

    def score(self, artifact: Artifact) -> float:
        """The last validation's figure.

        Raises:
            UserError: there is none.
        """
        measured = [line[self.by] for line in _lines(artifact.folder) if line.get(self.by) is not None]
        if not measured or not math.isfinite(measured[-1]):
            raise UserError(
                f"{self.name or self.kind}: {artifact.name} has no {self.by}, so nothing can be picked by it; it needs "
                "validation.times of at least 1, and validation rows that fit prompts.max_prompt_tokens"
            )
        return measured[-1]


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

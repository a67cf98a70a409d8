"""Where the models of a study lie, and what their artifacts say of how they were made."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from potstill.core.artifact import Artifact, fingerprint
from potstill.edges.models import bytes_of
from potstill.stages.base import Context, ModelRef

PRINT = 16  # characters of a fingerprint that a study keeps


class Place:
    """One model of one seed: where it lies, and what its artifact says of it."""

    def __init__(self, where: str, artifact: Artifact | None) -> None:
        self.where, self.artifact = where, artifact
        self.kind = artifact.kind if artifact else ""
        self.summary: dict[str, Any] = artifact.summary if artifact else {}
        self.origin = str(artifact.stage.get("model", "")) if artifact else ""
        self.seed: int | None = artifact.stage.get("seed") if artifact and self.kind in ("sft", "distill") else None
        if artifact and "@" in artifact.name:
            self.seed = int(artifact.name.rpartition("@")[2])

    def trained_with(self) -> dict[str, Any] | None:
        """What a control must have in common with what it controls, by name; None where nothing was trained."""
        if self.artifact is None or self.kind not in ("sft", "distill"):
            return None
        stage = self.artifact.stage
        return {
            **{f"optim.{name}": value for name, value in stage["optim"].items()},
            "data": fingerprint(stage["data"])[:PRINT],
            "prompts": fingerprint(stage["prompts"])[:PRINT],
            "start": stage["model" if self.kind == "sft" else "student"],
            "init": _in_words(stage.get("init")),
            "adapter": _in_words(stage.get("adapter")),
        }

    def bytes(self, model: Any) -> int:
        """On disk; of a hub model, as it lies in memory."""
        if self.where.startswith("path:"):
            return bytes_of(Path(self.where.removeprefix("path:")).expanduser())
        return sum(p.numel() * p.element_size() for p in model.parameters())


def _in_words(table: dict[str, Any] | None) -> str:
    """As a caveat of the report names it."""
    return "none" if table is None else f"({', '.join(f'{key} {value}' for key, value in table.items() if value is not None)})"


def places(context: Context, ref: ModelRef) -> list[Place]:
    """Where a reference leads: one place, or one per seed."""
    if ref.scheme == "stage":
        return [Place(f"path:{artifact.folder}", artifact) for artifact in context.artifacts(ref)]
    if ref.scheme == "path" and (Path(ref.target).expanduser() / "artifact.json").is_file():
        return [Place(str(ref), artifact) for artifact in context.artifacts(ref)]
    return [Place(str(ref), None)]


def lineage(models: Iterable[tuple[str, str, Place]], context: Context) -> dict[str, Any]:
    """What the report shows of how the models were made: curves, data statistics, quantisation errors, provenance.

    Args:
        models: name, role and place of each.
    """
    curves, data, quantization = [], [], []
    for name, role, place in models:
        artifact = place.artifact
        if artifact is None:
            continue
        summary = artifact.summary
        if artifact.kind in ("sft", "distill"):
            lines = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
            curves.append({"name": name, "role": role, "seed": place.seed, "points": _points(lines)})
            data.append(
                {
                    "stage": artifact.name,
                    "seed": place.seed,
                    **summary["data"],
                    "trained_response_tokens": summary["response_tokens"],
                    "steps": summary["steps"],
                }
            )
        if artifact.kind == "quantize":
            keys = ("method", "layers", "kept", "bits_per_weight", "calibration_tokens")
            quantization.append({"stage": artifact.name, **{key: summary[key] for key in keys}})
    return {"curves": curves, "data": data, "quantization": quantization, "provenance": dict(context.provenance)}


def _points(lines: list[dict[str, Any]], limit: int = 200) -> list[dict[str, Any]]:
    """Loss averaged over windows, so that a curve has at most `limit` points, and every validation."""
    losses = [line for line in lines if "loss" in line]
    window = max(1, -(-len(losses) // limit))
    points = []
    for begin in range(0, len(losses), window):
        group = losses[begin : begin + window]
        means = {key: sum(line[key] for line in group) / len(group) for key in ("loss", "ce", "divergence") if key in group[0]}
        points.append({"epoch": group[-1]["epoch"], "step": group[-1]["step"], **means})
    keep = ("epoch", "step", "validation_rouge_l", "validation_nll")
    points += [{key: line[key] for key in keep if key in line} for line in lines if "validation_rouge_l" in line]
    return sorted(points, key=lambda point: point["step"])

"""Where the models of a study lie, and what their artifacts say of how they were made."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.core.artifact import Artifact, fingerprint, read_json
from potstill.edges.models import bytes_of
from potstill.stages.base import Context, ModelRef
from potstill.study.records import Trained

PRINT = 16  # characters of a fingerprint that a study keeps
SWEEP = "sweep.json"  # in an artifact of kind `best`: all candidates, their curves, and which was picked


def as_chosen(artifact: Artifact) -> Artifact:
    """What a stage of kind `best` has kept, as the stage that trained it; any other artifact as it is."""
    if artifact.kind != "best":
        return artifact
    chosen = artifact.summary["chosen"]
    return replace(artifact, kind=chosen["kind"], stage=chosen["stage"])


class Place:
    """One model of one seed: where it lies, and what its artifact says of it."""

    def __init__(self, where: str, artifact: Artifact | None) -> None:
        artifact = as_chosen(artifact) if artifact else None
        self.where, self.artifact = where, artifact
        self.kind = artifact.kind if artifact else ""
        self.summary: dict[str, Any] = artifact.summary if artifact else {}
        self.origin = str(artifact.stage.get("model", "")) if artifact else ""
        self.seed: int | None = artifact.stage.get("seed") if artifact and self.kind in ("sft", "distill") else None
        if artifact and "@" in artifact.name:
            self.seed = int(artifact.name.rpartition("@")[2])

    def trained(self) -> Trained | None:
        """How this model was trained; None where nothing was trained."""
        if self.artifact is None or self.kind not in ("sft", "distill"):
            return None
        stage, data = self.artifact.stage, self.summary["data"]
        optim = {name: value for name, value in stage["optim"].items() if name != "lr"}
        return Trained(
            by=self.kind,
            seed=self.seed or 0,
            start=stage["model" if self.kind == "sft" else "student"],
            init=_in_words(stage.get("init")),
            adapter=_in_words(stage.get("adapter")),
            teacher=stage.get("teacher"),
            data=fingerprint(stage["data"])[:PRINT],
            prompts=fingerprint(stage["prompts"])[:PRINT],
            rows=data["rows"],
            order=fingerprint([stage["data"], stage["prompts"], data["rows"], stage["optim"]["batch_size"], self.seed])[:PRINT],
            steps=self.summary["steps"],
            rows_seen=self.summary["rows"],
            response_tokens=self.summary["response_tokens"],
            tokens=self.summary["tokens"],
            epochs=self.summary["epochs"],
            lr=stage["optim"]["lr"],
            optim=optim,
            searched=self.searched(),
            left_out=data["dropped"],
            shortened=data["context_shortened"],
        )

    def searched(self) -> dict[str, list[Any]]:
        """The values that a sweep tried before it picked, by field; empty where nothing was swept."""
        best = self.summary.get("best")
        values: dict[str, list[Any]] = {}
        for candidate in best["candidates"] if best else ():
            for field, value in candidate["values"].items():
                tried = values.setdefault("start" if field in ("model", "student") else field, [])
                tried += [value] if value not in tried else []
        return values

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
    sweeps: dict[str, Any] = {}
    for name, role, place in models:
        artifact = place.artifact
        if artifact is None:
            continue
        summary = artifact.summary
        if artifact.kind in ("sft", "distill"):
            lines = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
            curves.append({"name": name, "role": role, "seed": place.seed, "points": points(lines)})
            data.append(
                {
                    "stage": artifact.name,
                    "seed": place.seed,
                    **summary["data"],
                    "settings": _settings(artifact.stage),
                    "trained_response_tokens": summary["response_tokens"],
                    "steps": summary["steps"],
                }
            )
        if (artifact.folder / SWEEP).is_file():  # the same for every seed
            sweep = read_json(artifact.folder / SWEEP)
            sweeps.setdefault(sweep["stage"], {"name": name, "role": role, **sweep})
        if artifact.kind == "quantize":
            keys = ("method", "layers", "kept", "bits_per_weight", "calibration_tokens")
            quantization.append({"stage": artifact.name, **{key: summary[key] for key in keys}})
    made = {"curves": curves, "data": data, "quantization": quantization, "sweeps": [*sweeps.values()]}
    return {**made, "provenance": dict(context.provenance)}


def _settings(stage: dict[str, Any]) -> dict[str, Any]:
    """How a stage trained, in flat words; its inputs, data and prompts are told elsewhere."""
    left_out = ("name", "kind", "seed", "per_seed", "data", "prompts", "validation", "shard_teacher")
    flat: dict[str, Any] = {}
    for key, value in stage.items():
        if key in left_out or value is None:
            continue
        parts = {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {name: inner for name, inner in parts.items() if inner is not None}
    return flat


def points(lines: list[dict[str, Any]], limit: int = 200) -> list[dict[str, Any]]:
    """Loss averaged over windows, so that a curve has at most `limit` points, and every validation."""
    losses = [line for line in lines if "loss" in line]
    window = max(1, -(-len(losses) // limit))
    made = []
    for begin in range(0, len(losses), window):
        group = losses[begin : begin + window]
        means = {key: sum(line[key] for line in group) / len(group) for key in ("loss", "ce", "divergence") if key in group[0]}
        made.append({"epoch": group[-1]["epoch"], "step": group[-1]["step"], **means})
    keep = ("epoch", "step", "validation_rouge_l", "validation_nll")
    made += [{key: line[key] for key in keep if key in line} for line in lines if "validation_rouge_l" in line]
    return sorted(made, key=lambda point: point["step"])

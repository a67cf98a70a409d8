"""Where the models of a study lie, and what their artifacts say of how they were made."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from potstill.core.artifact import MANIFEST, PRINT, Artifact, fingerprint, read_json
from potstill.core.errors import UserError
from potstill.edges.models import Size, bytes_of, config_of, size_of
from potstill.stages.base import Context, Stage
from potstill.stages.cost import reading_flops
from potstill.stages.refs import ModelRef
from potstill.stages.spent import Basis, Bought, Spent, spent, tally_of
from potstill.stages.training import FIGURE, TrainingStage
from potstill.study.records import Healing, Trained
from potstill.train.loop import SAMPLED

SWEEP = "sweep.json"  # in an artifact of kind `best`: all candidates, their curves, and which was picked


def as_chosen(artifact: Artifact) -> Artifact:
    """What was picked out of several, as the stage that made it; any other artifact as it is."""
    chosen = artifact.summary.get("chosen")
    return artifact if chosen is None else replace(artifact, kind=chosen["kind"], stage=chosen["stage"])


def made_here(ref: str) -> Artifact | None:
    """The artifact in the folder that a `path:` names; None: it names none, or what was not made here."""
    folder = Path(ref.removeprefix("path:")).expanduser()
    return Artifact.load(folder) if ref.startswith("path:") and (folder / MANIFEST).is_file() else None


def behind(artifact: Artifact, ref: str) -> Artifact | None:
    """The artifact that a field of another one names, of several seeds the first; None: not made here, or removed since."""
    return _named(ref, artifact.parents, lambda: ancestry(artifact))


def _named(ref: str, parents: Mapping[str, str], among: Callable[[], Mapping[str, Artifact]]) -> Artifact | None:
    if not ref.startswith("stage:"):
        return made_here(ref)
    prints = [print_ for name, print_ in parents.items() if name.partition("@")[0] == ref.removeprefix("stage:")]
    return among().get(prints[0]) if prints else None


def ancestry(artifact: Artifact) -> dict[str, Artifact]:
    """An artifact and all that it was made from or taught by, by fingerprint: of its run's folder, or named by path.

    What was removed since is left out.
    """
    found: dict[str, Artifact] = {}
    waiting = [artifact]
    while waiting:
        one = waiting.pop()
        if one.fingerprint in found:
            continue
        found[one.fingerprint] = one
        made_from = set(one.parents.values())
        beside = [Artifact.load(file.parent) for file in one.folder.parent.glob("*/artifact.json")] if made_from else []
        waiting += [other for other in beside if other.fingerprint in made_from]
        named = [str(one.stage.get(field) or "") for field in ("model", "student", "teacher", "cache")]
        named.append(str((one.stage.get("data") or {}).get("stage") or ""))  # rows that a stage of another run wrote
        waiting += filter(None, map(made_here, named))
    return found


def trained_as(artifact: Artifact) -> Artifact:
    """The artifact whose stage trained a model: itself, or the one that it was made from without training."""
    source = str(artifact.stage.get("model", ""))
    if "optim" in artifact.stage or not source:
        return artifact
    if source.startswith("path:"):
        found = made_here(source)
        return trained_as(as_chosen(found)) if found is not None else artifact
    for file in artifact.folder.parent.glob("*/artifact.json"):
        found = Artifact.load(file.parent)
        if found.makes == "model" and found.fingerprint in artifact.parents.values():
            return trained_as(as_chosen(found))
    return artifact


class Place:
    """One model of one seed: where it lies, and what its artifact says of it."""

    def __init__(self, where: str, artifact: Artifact | None) -> None:
        self.made = artifact
        self.where, self.artifact = where, as_chosen(artifact) if artifact else None
        self.summary: dict[str, Any] = artifact.summary if artifact else {}
        self.origin = str(self.summary.get("made_from", ""))  # of a model that was changed without training
        trained = self.summary.get("trained")
        self.trained = Trained.model_validate(trained) if trained is not None else None
        healing = self.summary.get("healing")
        self.healing = Healing(student=str(self.summary["trained"]["start"]), **healing) if healing else None
        reads = self.summary.get("teacher_reads") if trained is not None else None
        self.teacher_reads: str | None = reads if isinstance(reads, str) else None
        self.seed: int | None = self.trained.seed if self.trained is not None else None
        if artifact and "@" in artifact.name:
            self.seed = int(artifact.name.rpartition("@")[2])

    @cached_property
    def ancestry(self) -> dict[str, Artifact]:
        """What it was made from or taught by, itself included, by fingerprint."""
        return ancestry(self.made) if self.made is not None else {}

    @property
    def as_it_was(self) -> bool:
        """Whether what training made of it was not kept."""
        return self.healing is not None and not self.healing.kept

    def came_from(self, ref: str, other: "Place", called: str) -> bool:
        """Whether another model, which the study calls `called`, is what this one's own stage calls `ref`.

        A stage's name alone does not tell: another run may have a stage of the same name.
        """
        if not ref.startswith("stage:"):
            return ref == called
        if other.made is None:
            return False
        return other.made.fingerprint in self.ancestry and other.made.name.partition("@")[0] == ref.removeprefix("stage:")

    def bytes(self, model: Any) -> int:
        """On disk; of a hub model, as it lies in memory."""
        if self.where.startswith("path:"):
            return bytes_of(Path(self.where.removeprefix("path:")).expanduser())
        return sum(p.numel() * p.element_size() for p in model.parameters())


def places(context: Context, ref: ModelRef) -> list[Place]:
    """Where a reference leads: one place, or one per seed."""
    found = context.made(ref)
    if ref.scheme == "stage":
        return [Place(f"path:{artifact.folder}", artifact) for artifact in found]
    return [Place(str(ref), found[0] if found else None)]


def lineage(models: Iterable[tuple[str, str, Place]], context: Context) -> dict[str, Any]:
    """What the report shows of how the models were made: curves, data statistics, quantisation errors, cuts, provenance.

    Args:
        models: name, role and place of each.
    """
    curves, data, quantization, rewarded = [], [], [], []
    sweeps: dict[str, Any] = {}
    cuts: dict[str, dict[str, Any]] = {}
    written: dict[str, dict[str, Any]] = {}
    for name, role, place in models:
        artifact = place.artifact
        if artifact is None:
            continue
        summary = artifact.summary
        if place.trained is not None and not place.as_it_was and "data" in summary:
            curves.append(curve(name, role, place))
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
        if summary.get("rewards"):
            told = {key: summary[key] for key in ("rewards", "format_only")}
            rewarded.append({"name": name, "role": role, "seed": place.seed, **told})
        for made_by in place.ancestry.values():  # a cut that several models begin with is told once
            if made_by.summary.get("cut"):
                cuts.setdefault(made_by.fingerprint, {"stage": made_by.name, **made_by.summary["cut"]})
            if made_by.makes == "rows":
                written.setdefault(made_by.fingerprint, {"stage": made_by.name, **made_by.summary})
        if (artifact.folder / SWEEP).is_file():  # the same for every seed
            sweep = read_json(artifact.folder / SWEEP)
            sweeps.setdefault(sweep["stage"], {"name": name, "role": role, **sweep})
        if "bits_per_weight" in summary:
            keys = ("method", "layers", "kept", "bits_per_weight", "calibration_tokens")
            quantization.append({"stage": artifact.name, **{key: summary[key] for key in keys if key in summary}})
    made = {
        "curves": curves,
        "data": data,
        "quantization": quantization,
        "sweeps": [*sweeps.values()],
        "cuts": [*cuts.values()],
        "rewarded": rewarded,
        "written": [*written.values()],
    }
    return {**made, "provenance": dict(context.provenance)}


def _settings(stage: dict[str, Any]) -> dict[str, Any]:
    """How a stage trained, in flat words; its inputs, data and prompts stand elsewhere."""
    left_out = ("name", "kind", "seed", "per_seed", "data", "prompts", "validation", "shard_teacher")
    flat: dict[str, Any] = {}
    for key, value in stage.items():
        if key in left_out or value is None:
            continue
        parts = {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {name: inner for name, inner in parts.items() if inner is not None}
    return flat


def curve(name: str, role: str, place: Place) -> dict[str, Any]:
    """What a report draws of how one model of one seed was trained here, and what that took."""
    assert place.artifact is not None
    lines = [json.loads(line) for line in (place.artifact.folder / "metrics.jsonl").read_text().splitlines()]
    ledger, summary = Ledger.of(place), place.summary
    whole = ledger.at({"step": summary["steps"], "epoch": summary["epochs"]})
    drawn = points(lines, spends=ledger.at)
    return {"name": name, "role": role, "seed": place.seed, "points": drawn, "began": began(place), "spent": whole}


def began(place: Place) -> str:
    """Equal for models that began as one and were validated on the same rows: their validations can be compared."""
    trained, artifact = place.trained, place.artifact
    assert trained is not None
    assert artifact is not None
    validation = artifact.stage.get("validation") or {}
    asked = [validation.get(name) for name in ("rows", "max_new_tokens")]
    start = _behind(place, trained.start)
    model = start.fingerprint if start is not None else trained.start
    return fingerprint([model, trained.init, trained.data, trained.prompts, *asked])[:PRINT]


def points(
    lines: list[dict[str, Any]], limit: int = 200, spends: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: {}
) -> list[dict[str, Any]]:
    """Losses and figures of own answers averaged over windows, so that a curve has at most `limit` points; every validation.

    Args:
        spends: what training had taken by a validation's line.
    """
    steps = [line for line in lines if not any(name.startswith(FIGURE) for name in line)]
    window = max(1, -(-len(steps) // limit))
    made = []
    for begin in range(0, len(steps), window):
        group = steps[begin : begin + window]
        names = dict.fromkeys(name for line in group for name in line if name in _DRAWN or name.startswith(SAMPLED))
        means = {name: _mean([line[name] for line in group if name in line]) for name in names}
        made.append({"epoch": group[-1]["epoch"], "step": group[-1]["step"], **means})
    for line in lines:
        figures = {key: value for key, value in line.items() if key.startswith(FIGURE)}
        if figures:
            made.append({"epoch": line["epoch"], "step": line["step"], **figures, **spends(line)})
    return sorted(made, key=lambda point: point["step"])


_DRAWN = ("loss", "ce", "divergence")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Ledger:
    """What a model's training took, up to any of its validations.

    Attributes:
        stage: None: it cannot be read any more.
        basis: None: its models are not known.
        bought: whether a teacher wrote its rows before.
    """

    summary: dict[str, Any]
    stage: TrainingStage | None
    basis: Basis | None
    bought: bool

    @classmethod
    def of(cls, place: Place) -> "Ledger":
        """Of a model that was trained here."""
        assert place.artifact is not None
        stage = _stage_of(place.artifact)
        bought = (place.artifact.stage.get("data") or {}).get("stage") is not None
        return cls(place.summary, stage, _basis(place) if stage is not None else None, bought)

    def at(self, line: dict[str, Any]) -> dict[str, Any]:
        """Of a line with `step` and `epoch`, as the fields of `Spent`."""
        tally = tally_of(line, self.summary, self.summary["data"]["rows"])
        if self.stage is None or self.basis is None:
            return asdict(Spent(tally.tokens, None if self.bought else tally.generated_tokens, None))
        return asdict(spent(self.stage, tally, self.basis))


def _stage_of(artifact: Artifact) -> TrainingStage | None:
    try:
        stage = Stage.parse({"kind": artifact.kind, **artifact.stage})
    except (ValidationError, PydanticCustomError):  # of another version, or of a kind that is not here
        return None
    return stage if isinstance(stage, TrainingStage) else None


def _basis(place: Place) -> Basis | None:
    assert place.artifact is not None
    data, student = place.summary["data"], _size(f"path:{place.artifact.folder}")
    if student is None:
        return None
    return Basis(
        student,
        _size_behind(place, place.artifact.stage.get("teacher")),
        place.summary.get("signal", {}).get("kept", ""),
        data["rows"],
        data["prompt_tokens"] / data["rows"],
        data["response_tokens"] / data["rows"],
        _bought(place),
        _size_behind(place, place.artifact.stage.get("reference")),
    )


def _bought(place: Place) -> Bought:
    """What the rows took that a `generate` stage wrote, those that were left out as well."""
    assert place.artifact is not None
    ref = (place.artifact.stage.get("data") or {}).get("stage")
    if ref is None:
        return Bought()
    writer = _behind(place, ref)
    if writer is None or writer.summary["uncounted"]:
        return Bought(None, None)
    size = _size_behind(Place("", writer), writer.stage.get("model"))
    drawn, read = writer.summary["response_tokens"], writer.summary["prompt_tokens"]
    if size is None:
        return Bought(drawn, None)
    # a prompt is read once for all of its answers; then every answer is read once more, to be scored
    writing = reading_flops(size, read / writer.stage["samples"] + drawn, drawn)
    return Bought(drawn, writing + reading_flops(size, read + drawn, drawn))


def rollouts(place: Place) -> int | None:
    """Answers drawn for a model's training: while it trained, and before for the rows that it read; None where unknown."""
    if place.artifact is None or place.trained is None:
        return None
    ref = (place.artifact.stage.get("data") or {}).get("stage")
    writer = _behind(place, ref) if ref is not None else None
    before = 0 if ref is None else writer.summary.get("answers") if writer is not None else None
    own = place.summary.get("rollouts", None if place.trained.generated_tokens else 0)
    return None if before is None or own is None else before + own


def _behind(place: Place, ref: str) -> Artifact | None:
    """The artifact that a stage's own field names."""
    picked = place.summary.get("chosen")
    made = place.ancestry.get(picked["fingerprint"]) if picked is not None else place.made
    return _named(ref, made.parents if made is not None else {}, lambda: place.ancestry)


def _size_behind(place: Place, ref: str | None) -> Size | None:
    if ref is None:
        return None
    if not ref.startswith("stage:"):
        return _size(ref)
    found = _behind(place, ref)
    return _size(f"path:{found.folder}") if found is not None else None


def _size(where: str) -> Size | None:
    try:
        return size_of(config_of(where, offline_shape=True))
    except UserError:  # out of reach now
        return None

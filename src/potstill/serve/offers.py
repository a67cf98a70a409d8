"""Which models a target offers: those of a run and its study, or one file."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from potstill.core.artifact import Artifact
from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.data.prompts import Prompts
from potstill.run.folder import artifacts_of, find_run, whole
from potstill.run.models import pick
from potstill.stages.lineage import as_chosen
from potstill.stages.verified import VERIFIED, refuse_changed, written_as

GGUF = ".gguf"
FILE_ORDER = ("q4_0", "f16", "bf16", "q8_0", "f32")  # which of a model's own files is served
ROLE_OF = {"pretrain": "base", "sft": "sft", "distill": "kd", "minillm": "kd", "grpo": "rl", "quantize": "quantized"}
PICKED = (("base",), ("sft", "start"), ("kd", "rl"), ("quantized",), ("teacher",))  # one of each is compared at first


@dataclass(frozen=True)
class Offer:
    """A model that can be asked.

    Attributes:
        id: its name in the API.
        title: its name for people.
        role: as in a study.
        where: `path:…` or `hf:…`.
        prompts: how it is asked.
        file: of llama.cpp with the same weights; None where there is none.
        parameters: None: not known before it is opened.
        artifact: None: it was not made here.
        exported: what `file` is of; None: of nothing that was made here.
    """

    id: str
    title: str
    role: str
    where: str
    prompts: Prompts
    file: Path | None = None
    parameters: int | None = None
    artifact: Artifact | None = None
    exported: Artifact | None = None

    def doubted(self) -> bool:
        """Whether nothing says what the bytes of its file should be."""
        return self.file is not None and self.exported is None and written_as(self.file) is None


def offers_of(target: str) -> list[Offer]:
    """What `RUN[:MODEL]` or `FILE.gguf` offers, the served model first.

    The models of a run's study, by their names in it; those of a run without one. Of models trained per seed the first.

    Raises:
        UserError: no such run, model or file.
    """
    if target.lower().endswith(GGUF):
        return [_of_file(Path(target).expanduser())]
    served = pick(target)
    run = find_run(target.partition(":")[0])
    artifacts = artifacts_of(run)
    rows, prompts = _rows(artifacts)
    reserved = {_title(artifact) for artifact in artifacts.values()}  # a stage's own name is always the stage
    first = _of_artifact(served, _role(served), "", artifacts.values(), prompts)
    found = [first]
    for name, role, ref in rows:
        artifact = _behind(ref, artifacts)
        if artifact is not None:
            offer = _of_artifact(artifact, role, name, artifacts.values(), prompts)
        elif ref.startswith("stage:"):
            continue  # not finished
        else:
            offer = Offer(_free(_slug(name), found, reserved), name, role, ref, prompts)
        if offer.where == first.where:
            found[0] = first = replace(offer, id=first.id)
        elif all(offer.where != other.where for other in found):
            if any(offer.id == other.id for other in found):  # of two seeds the one that is served has the name
                offer = replace(offer, id=_free(offer.id, found, reserved))
            found.append(offer)
    assert len({offer.id for offer in found}) == len(found)
    return found


def picked(offers: Sequence[Offer], names: Sequence[str]) -> list[str]:
    """The ids that the playground compares at first: `names`, or one of each role in the order of the pipeline: the served
    model and what it was made from, where they have the role.

    Raises:
        UserError: a name is none of the offers'.
    """
    if names:
        return [named(offers, name).id for name in names]
    served = offers[0].artifact
    near = {ident.partition("@")[0] for ident in served.parents} | {offers[0].id} if served is not None else {offers[0].id}
    chosen: list[str] = []
    for roles in PICKED:
        of_role = [offer for role in roles for offer in offers if offer.role == role]
        chosen += [offer.id for offer in sorted(of_role, key=lambda offer: offer.id not in near)[:1]]
    return chosen if offers[0].id in chosen else [offers[0].id, *chosen]


def named(offers: Sequence[Offer], name: str) -> Offer:
    """The offer of this id or title.

    Raises:
        UserError: there is none.
    """
    for offer in offers:
        if name in (offer.id, offer.title):
            return offer
    known = [offer.id for offer in offers]
    raise UserError(f"no model '{name}'{suggest(name, known)} (there are: {', '.join(known)})")


def checked(offer: Offer, *, file: bool) -> Offer:
    """The offer, once its files were compared with what their manifests say.

    Args:
        file: whether the file that was exported of it for llama.cpp is to be opened, and so is compared too; a file that stands
            alone is the model itself, whatever opens it.

    Raises:
        UserError: one of them is damaged or gone.
    """
    for artifact in (offer.artifact, offer.exported if file else None):
        if artifact is not None:
            whole(artifact.folder.parent.parent, artifact)
    if offer.file is not None and offer.exported is None:
        refuse_changed(offer.file)
    if offer.artifact is None and offer.where.startswith("path:") and not Path(offer.where.removeprefix("path:")).exists():
        raise UserError(f"{offer.where.removeprefix('path:')}: no such file or folder")
    return offer


def _of_file(file: Path) -> Offer:
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a RUN[:MODEL] or the path of a .gguf file")
    return Offer(file.stem, file.stem, "other", f"path:{file}", Prompts(), file)


def _of_artifact(artifact: Artifact, role: str, title: str, others: Iterable[Artifact], default: Prompts) -> Offer:
    chosen = as_chosen(artifact)
    own = chosen.stage.get("prompts")
    name = _title(artifact)
    file, exported = _exported(artifact, others) or (None, None)
    return Offer(
        id=name,
        title=title or name,
        role=role,
        where=f"path:{artifact.folder}",
        prompts=Prompts.model_validate(own) if own is not None else default,
        file=file,
        parameters=artifact.summary.get("parameters"),
        artifact=artifact,
        exported=exported,
    )


def _role(artifact: Artifact) -> str:
    return ROLE_OF.get(as_chosen(artifact).kind, "other")


def _exported(artifact: Artifact, others: Iterable[Artifact]) -> tuple[Path, Artifact] | None:
    """A file of llama.cpp that some stage exported of this very model, and that did not fail its last verification."""
    files: list[tuple[Path, Artifact]] = []
    for other in others:
        if other.makes == "export" and artifact.fingerprint in other.parents.values():
            source = str(other.stage.get("model", "")).removeprefix("stage:")
            if source in (artifact.name, _title(artifact)):
                names = [name for name in other.files or {} if name.endswith(GGUF) and "-as-" not in name]
                files += [(other.folder / name, other) for name in names if name not in _failed(other)]
    rank = {f"model-{type}{GGUF}": i for i, type in enumerate(FILE_ORDER)}
    there = [one for one in files if one[0].is_file()]
    return min(there, key=lambda one: rank.get(one[0].name, len(rank)), default=None)


def _failed(export: Artifact) -> set[str]:
    """Its files that answered otherwise than the model when they were verified last."""
    try:
        found = json.loads((export.folder / VERIFIED).read_text(encoding="utf-8"))
        return {one["file"] for one in found["files"] if not one["passed"]}
    except (OSError, ValueError, LookupError, TypeError):  # not verified, or the record is damaged and says nothing
        return set()


def _rows(artifacts: dict[str, Artifact]) -> tuple[list[tuple[str, str, str]], Prompts]:
    """Name, role and reference of the models that the run's last study measures, else of all its models; how they are asked."""
    studies = [artifact for artifact in artifacts.values() if artifact.makes == "evaluation"]
    if studies:
        stage: dict[str, Any] = studies[-1].stage
        rows = [(row["name"], row.get("role", "other"), str(row["model"])) for row in stage.get("study", ())]
        return rows, Prompts.model_validate(stage.get("prompts", {}))
    models = [artifact for artifact in artifacts.values() if artifact.makes == "model"]
    rows = [(_title(artifact), _role(artifact), f"stage:{_title(artifact)}") for artifact in models]
    teachers = [str(as_chosen(artifact).stage.get("teacher") or "") for artifact in models]
    teacher = next((ref for ref in teachers if ref), "")
    if teacher:
        rows = [row for row in rows if row[2] != teacher] + [("teacher", "teacher", teacher)]
    prompts = next((artifact.stage["prompts"] for artifact in reversed(models) if artifact.stage.get("prompts")), {})
    return rows, Prompts.model_validate(prompts)


def _title(artifact: Artifact) -> str:
    return artifact.name.partition("@")[0]


def _behind(ref: str, artifacts: dict[str, Artifact]) -> Artifact | None:
    """The first seed's artifact of a stage."""
    stage = ref.removeprefix("stage:") if ref.startswith("stage:") else None
    return next((one for one in artifacts.values() if one.makes == "model" and _title(one) == stage), None)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "model"


def _free(slug: str, offers: Sequence[Offer], reserved: Collection[str] = ()) -> str:
    taken = {offer.id for offer in offers} | set(reserved)
    return next(name for name in chain([slug], (f"{slug}-{n}" for n in count(2))) if name not in taken)

"""What a stage's result depends on, as one digest: the same digest means the same result."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from potstill.core.artifact import OWN_CHECKSUMS, Artifact, Hashes, fingerprint
from potstill.core.component import Component
from potstill.core.errors import UserError
from potstill.edges.models import content_id
from potstill.sources import Source
from potstill.stages.base import Stage, walk
from potstill.train.loop import in_bf16

# Raised whenever training, quantisation or evaluation give other numbers for the same fields: what an older potstill made
# is then made again, and half-finished training does not go on under other mathematics.
CODE = 11


class Fingerprints:
    """Fingerprints of stages, remembering the hashes of big files between runs."""

    def __init__(self, folder: Path) -> None:
        self.hashes = Hashes(folder / "hashes.json")
        self._sources: dict[str, str] = {}

    def source(self, source: Source) -> str:
        """Of the rows a source gives, wherever its file lies."""
        spec = source.spec()
        key = fingerprint(spec)
        if key not in self._sources:
            path = getattr(source, "path", None)
            content = None
            if path is not None:
                stat = Path(path).expanduser().stat()
                remembered = f"{Path(path).expanduser().resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{source.kind}"
                content = self.hashes.known.get(remembered)
                if content is None:
                    content = self.hashes.known[remembered] = source.content_hash()
            self._sources[key] = fingerprint(
                [{k: v for k, v in spec.items() if k != "path"}, source.version, content or source.content_hash()]
            )
        return self._sources[key]

    def of(self, stage: Stage, parents: dict[str, str], bf16: bool | None = None) -> str:
        """Of a stage: its fields, its data, its inputs; names and places do not count, what `auto` is on this machine does.

        Args:
            bf16: whether `auto` is bfloat16; default: as on this machine.
        """
        fields = _without(stage.spec(), stage.ignored)
        spec: dict[str, Any] = _as_there(fields, in_bf16("auto") if bf16 is None else bf16)
        if stage.sources():
            spec["data"] = [self.source(source) for source in stage.sources()]
        models = {}
        for place, ref in stage.references():
            if ref.scheme in ("hf", "path") and "model" in ref.accepts:
                models[place] = content_id(str(ref), self.hashes.known)
            elif ref.scheme == "path":
                models[place] = self.artifact(Path(ref.target).expanduser())
        versions = {place: value.version for place, value in walk(stage) if isinstance(value, Component)}
        return fingerprint([CODE, spec, versions, models, parents])

    def artifact(self, folder: Path) -> str:
        """Of an artifact that lies elsewhere, which its manifest vouches for.

        Raises:
            UserError: there is none, or a file of it is not as its manifest says.
        """
        artifact = Artifact.load(folder)
        if artifact.files is None or artifact.makes in OWN_CHECKSUMS:
            return artifact.fingerprint
        if damage := artifact.damage(self.hashes):
            raise UserError(f"{folder} is damaged: {damage}; run the recipe that made it again, or copy it again")
        return artifact.content

    def save(self) -> None:
        """Remember what was hashed, if anything new was."""
        self.hashes.save()


def _without(fields: dict[str, Any], ignored: Iterable[str]) -> dict[str, Any]:
    """Fields without those of some names; `api.retries` is one of a group."""
    left = {key: value for key, value in fields.items() if key not in ignored}
    for name in ignored:
        group, _, inner = name.partition(".")
        if inner and isinstance(left.get(group), dict):
            left[group] = {key: value for key, value in left[group].items() if key != inner}
    return left


def _as_there(spec: Any, bf16: bool) -> Any:
    """The same fields, with the precision that a machine takes for `auto`."""
    if isinstance(spec, list | tuple):
        return [_as_there(value, bf16) for value in spec]
    if not isinstance(spec, dict):
        return spec
    precise = {"precision": "bf16" if bf16 else "fp32"} if spec.get("precision") == "auto" else {}
    return {key: _as_there(value, bf16) for key, value in spec.items()} | precise

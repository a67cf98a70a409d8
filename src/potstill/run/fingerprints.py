"""What a stage's result depends on, as one digest: the same digest means the same result."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.core.artifact import Artifact, fingerprint, write_json
from potstill.core.component import Component
from potstill.edges.models import content_id
from potstill.sources import Source
from potstill.stages.base import Stage, walk

# Raised whenever training, quantisation or evaluation give other numbers for the same fields: what an older potstill made
# is then made again, and half-finished training does not go on under other mathematics.
CODE = 3


class Fingerprints:
    """Fingerprints of stages, remembering the hashes of big files between runs."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "hashes.json"
        self._hashes: dict[str, Any] = {}
        if self._file.is_file():
            with suppress(ValueError):  # damaged: hashed again
                found = json.loads(self._file.read_text(encoding="utf-8"))
                self._hashes = found if isinstance(found, dict) else {}
        self._known = dict(self._hashes)
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
                content = self._hashes.get(remembered)
                if content is None:
                    content = self._hashes[remembered] = source.content_hash()
            self._sources[key] = fingerprint(
                [{k: v for k, v in spec.items() if k != "path"}, source.version, content or source.content_hash()]
            )
        return self._sources[key]

    def of(self, stage: Stage, parents: dict[str, str]) -> str:
        """Of a stage: its fields, its data, its inputs; names and places do not count."""
        spec = {key: value for key, value in stage.spec().items() if key not in stage.ignored}
        if stage.sources():
            spec["data"] = [self.source(source) for source in stage.sources()]
        models = {}
        for place, ref in stage.references():
            if ref.scheme in ("hf", "path") and "model" in ref.accepts:
                models[place] = content_id(str(ref), self._hashes)
            elif ref.scheme == "path":
                models[place] = Artifact.load(Path(ref.target).expanduser()).fingerprint
        versions = {place: value.version for place, value in walk(stage) if isinstance(value, Component)}
        return fingerprint([CODE, spec, versions, models, parents])

    def save(self) -> None:
        """Remember what was hashed, if anything new was."""
        if self._hashes != self._known:
            write_json(self._file, self._hashes)

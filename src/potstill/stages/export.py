"""A model that leaves the house."""

import shutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from potstill.core.artifact import MANIFEST, Artifact, Makes, file_hash, write_text
from potstill.core.errors import UserError
from potstill.edges.models import load_model, load_tokenizer, stored_dtype
from potstill.exporters import Exporter
from potstill.exporters.gguf import Gguf
from potstill.exporters.safetensors import Safetensors
from potstill.quant.packed import packed_of
from potstill.report.card import model_card
from potstill.stages.base import Context, ModelRef, Stage, StudyRef
from potstill.stages.report import report_from


class Export(Stage, kind="export"):
    """Write a model in formats that other programs load, with a model card that carries the study's table.

    With several seeds the first seed's model is exported.
    """

    makes: ClassVar[Makes] = "export"
    gathers: ClassVar[bool] = True
    version: ClassVar[int] = 2  # 2: dtype as stored, ends of turn, a name for people, only q4_0 of a quantised model

    model: ModelRef = Field(description="what is exported")
    formats: tuple[Exporter, ...] = Field(default=(Safetensors(), Gguf()), description="exporters, each writing its files")
    study: StudyRef | None = Field(default=None, description="an evaluation whose table goes on the model card")

    def run(self, context: Context) -> dict[str, Any]:
        folder = context.work.folder
        for left in folder.iterdir():  # by a run that was killed: every file here is to be this one's
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        where = context.where(self.model)
        model, tokenizer = load_model(where, stored_dtype(where)), load_tokenizer(where)
        packed = packed_of(model, where)
        name = _name_of(where, context)
        written: list[Path] = []
        for exporter in self.formats:
            written += exporter.write(model, tokenizer, packed, folder, name=name)
        if self.study is not None:
            report = report_from(context.artifacts(self.study)[0].folder)
            row = next((row for row in report["rows"] if row["model"] == str(self.model)), None)
            if row is None:
                raise UserError(
                    f"{context.work.name}: {self.study} did not measure {self.model}, so its card would have no figures"
                )
            note = _told(row["seeds"], written, bool(packed))
            write_text(folder / "README.md", model_card(report, model_row=row["name"], note=note))
        return {"files": {str(file.relative_to(folder)): [file.stat().st_size, file_hash(file)] for file in written}}


def _name_of(where: str, context: Context) -> str:
    """What people call the model: recipe and stage of one that was made here, else its folder's or the hub's name."""
    scheme, _, target = where.partition(":")
    if scheme == "hf":
        return target.partition("@")[0].rpartition("/")[2]
    folder = Path(target).expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        return folder.name
    artifact = Artifact.load(folder)
    return " ".join(part for part in (artifact.recipe, artifact.name.partition("@")[0]) if part) or folder.name


def _told(seeds: list[Any], written: list[Path], quantised: bool) -> str:
    """What the card says of these very files."""
    files = [path.name for path in written if path.suffix in (".gguf", ".safetensors")]
    told = f"Weights: {', '.join(f'`{name}`' for name in files)}"
    told += f", of seed {seeds[0]}." if len(seeds) > 1 else "."
    wide = [f"`{name}`" for name in files if "q4_0." not in name]
    if quantised and wide:
        told += f" This is a model of four-bit weights, which stand in a wider type in {', '.join(wide)}."
    if len(seeds) > 1:
        told += f" The figures below are means over the seeds {', '.join(map(str, seeds))}."
    return told

"""A model that leaves the house."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from potstill.core.artifact import Artifact, Makes, file_hash, write_text
from potstill.core.errors import Problem, UserError
from potstill.data.exported import exported_template
from potstill.data.prompts import Prompts
from potstill.edges.machine import resting_memory
from potstill.edges.models import PACKED, load_model, load_tokenizer
from potstill.exporters import Exporter
from potstill.exporters.gguf import Gguf
from potstill.exporters.safetensors import Safetensors
from potstill.quant.packed import load_packed
from potstill.report.card import model_card
from potstill.stages.base import Context, Stage
from potstill.stages.lineage import as_chosen, places
from potstill.stages.outlook import Cost, Outlook
from potstill.stages.refs import ModelRef, StudyRef
from potstill.stages.report import report_from


class Export(Stage, kind="export"):
    """Write a model in formats that other programs load, with a model card that carries the study's table.

    With several seeds the first seed's model is exported.
    """

    makes: ClassVar[Makes] = "export"
    gathers: ClassVar[bool] = True

    model: ModelRef = Field(description="what is exported")
    formats: tuple[Exporter, ...] = Field(default=(Safetensors(), Gguf()), description="exporters, each writing its files")
    study: StudyRef | None = Field(default=None, description="an evaluation whose table goes on the model card")

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        try:
            outlook.model(self.model)
        except UserError as error:
            yield Problem("model", str(error), repr(str(self.model)))

    def cost(self, outlook: Outlook) -> Cost:
        found = outlook.model(self.model)
        if found is None:
            return Cost()
        parameters = found.size.parameters
        written = 4 * parameters + 2 * parameters + (round(0.6 * found.size.body) if found.quantised else 0)
        memory = round(resting_memory() + 8 * parameters)
        return Cost(parameters=parameters, memory_bytes=memory, output_bytes=written)

    def closing(self, summary: dict[str, Any]) -> str:
        return ", ".join(name for name in summary["files"] if name.endswith((".safetensors", ".gguf")))

    def run(self, context: Context) -> dict[str, Any]:
        folder = context.work.folder
        for left in folder.iterdir():  # by a run that was killed: every file here is to be this one's
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        where = context.where(self.model)
        model, tokenizer = load_model(where), load_tokenizer(where)
        _as_trained(context, self.model, tokenizer)
        packed_file = Path(where.removeprefix("path:")) / PACKED
        packed = load_packed(packed_file) if where.startswith("path:") and packed_file.is_file() else {}
        written: list[Path] = []
        for exporter in self.formats:
            written += exporter.write(model, tokenizer, packed, folder)
        if self.study is not None:
            report = report_from(context.artifacts(self.study)[0].folder)
            row = next((row for row in report["rows"] if row["model"] == str(self.model)), None)
            if row is None:
                raise UserError(
                    f"{context.work.name}: {self.study} did not measure {self.model}, so its card would have no figures"
                )
            write_text(folder / "README.md", model_card(report, model_row=row["name"], note=_told(row["seeds"], written)))
        return {"files": {str(file.relative_to(folder)): [file.stat().st_size, file_hash(file)] for file in written}}


def _as_trained(context: Context, ref: ModelRef, tokenizer: Any) -> None:
    """Give the tokenizer the chat template that writes what the model was trained on; a model not made here keeps its own."""
    artifact = places(context, ref)[0].artifact
    trained = _trained(artifact).stage.get("prompts") if artifact is not None else None
    if trained is not None:
        tokenizer.chat_template = exported_template(tokenizer, Prompts.model_validate(trained))


def _trained(artifact: Artifact) -> Artifact:
    """The artifact whose stage trained a model: itself, or the one that it was made from without training."""
    source = str(artifact.stage.get("model", ""))
    if "optim" in artifact.stage or not source:
        return artifact
    if source.startswith("path:"):
        folder = Path(source.removeprefix("path:")).expanduser()
        return _trained(as_chosen(Artifact.load(folder))) if (folder / "artifact.json").is_file() else artifact
    for file in artifact.folder.parent.glob("*/artifact.json"):
        found = Artifact.load(file.parent)
        if found.makes == "model" and found.fingerprint in artifact.parents.values():
            return _trained(as_chosen(found))
    return artifact


def _told(seeds: list[Any], written: list[Path]) -> str:
    """What the card says of these very files."""
    files = ", ".join(f"`{path.name}`" for path in written if path.suffix in (".gguf", ".safetensors"))
    if len(seeds) < 2:
        return f"Weights: {files}."
    return f"Weights: {files}, of seed {seeds[0]}. The figures below are means over the seeds {', '.join(map(str, seeds))}."

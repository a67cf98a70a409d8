"""A model that leaves the house."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from potstill.core.artifact import MANIFEST, Artifact, Makes, file_hash, write_json, write_text
from potstill.core.errors import Problem, UserError
from potstill.data.exported import exported_template
from potstill.data.prompts import Prompts
from potstill.edges.codes import bits_in
from potstill.edges.machine import resting_memory
from potstill.edges.models import load_stored, load_tokenizer, positions_of, stored_dtype
from potstill.exporters import Exporter
from potstill.exporters.gguf import Gguf
from potstill.exporters.modelfile import modelfile
from potstill.exporters.safetensors import Safetensors
from potstill.quant.packed import Packed, packed_of
from potstill.report.card import model_card
from potstill.report.tools import MODELFILE, how_to_run
from potstill.report.verified import figures_in_words, section
from potstill.stages.base import Context, Stage
from potstill.stages.cost import left_over
from potstill.stages.lineage import as_chosen, places, trained_as
from potstill.stages.outlook import Cost, Outlook
from potstill.stages.passages import passages_for
from potstill.stages.reference import Reference, full_precision
from potstill.stages.refs import ModelRef, StudyRef
from potstill.stages.report import report_from
from potstill.stages.runtimes import trouble_with
from potstill.stages.verified import VERIFIED, exported_in, unverified, verify_files


class Export(Stage, kind="export"):
    """Write a model in formats that other programs load, with a model card that carries the study's table.

    With several seeds the first seed's model is exported.
    """

    makes: ClassVar[Makes] = "export"
    gathers: ClassVar[bool] = True
    # 7: opens folders and pages too; 6: opens its GGUF files; a Modelfile, and lines for people's programs
    version: ClassVar[int] = 7

    model: ModelRef = Field(description="what is exported")
    formats: tuple[Exporter, ...] = Field(default=(Safetensors(), Gguf()), description="exporters, each writing its files")
    study: StudyRef | None = Field(default=None, description="an evaluation whose table goes on the model card")
    verify: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="open every file in its runtime, compare it with the model and refuse one that answers otherwise; auto: "
        "those whose runtime is installed",
    )

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        found, tokenizer = None, None
        try:
            found = outlook.model(self.model)
            tokenizer = found.tokenizer() if found is not None else None
        except UserError as error:
            yield Problem("model", str(error), repr(str(self.model)))
        for trouble in trouble_with(self._holds(quantised=0)) if self.verify == "always" else ():
            yield Problem("verify", f"{trouble}, or set it to 'auto'", "'always'")
        yield from self._study_problems(outlook)
        twice = self._written_twice(quantised=found.bits if found is not None else 0)
        if twice:
            yield Problem("formats", f"two of them write {twice[0]}; leave one out, or give it other types")
        if found is not None and tokenizer is not None:
            refused = self.refusals(found.config, tokenizer, quantised=found.bits)
            yield from (Problem("formats", rule) for rule in refused)

    def _study_problems(self, outlook: Outlook) -> Iterator[Problem]:
        """A study of the recipe that does not measure the model."""
        study = outlook.stage(self.study)
        measured = [str(row.model) for row in getattr(study, "study", ())]
        if measured and str(self.model) not in measured:
            yield Problem(
                "study", f"{self.study} does not measure {self.model}, so its card would have no figures", str(self.study)
            )

    def _written_twice(self, *, quantised: int) -> list[str]:
        """Files that two of the formats would write."""
        names = self._holds(quantised=quantised)
        return sorted({name for name in names if names.count(name) > 1})

    def _holds(self, *, quantised: int) -> list[str]:
        """The files of weights that the formats will make."""
        return [name for exporter in self.formats for name in exporter.holds("float32", quantised=quantised)]

    def cost(self, outlook: Outlook) -> Cost:
        found = outlook.model(self.model)
        if found is None:
            return Cost()
        parameters = found.size.parameters
        written = 4 * parameters + 2 * parameters + (round(0.6 * found.size.body) if found.bits else 0)
        opened = 0 if self.verify == "never" else 4 * parameters  # each file in turn, beside the model
        memory = round(resting_memory() + left_over(found.size) + 8 * parameters + opened)
        return Cost(parameters=parameters, memory_bytes=memory, output_bytes=written)

    def closing(self, summary: dict[str, Any]) -> str:
        names = ", ".join(name for name in summary["files"] if name.endswith((".safetensors", ".gguf", "index.html")))
        record = summary["verified"]
        left_out = record["not_verified"]
        told = [f"verified: {figures_in_words(one)}" for one in record["files"]]
        told += [f"not verified: {', '.join(left_out)} ({next(iter(left_out.values()))})"] if left_out else []
        return "; ".join([names, *told])

    def refusals(self, config: Any, tokenizer: Any, *, quantised: int) -> list[str]:
        """Why the formats would refuse a model, all of them, as far as its config and tokenizer tell."""
        found = [exporter.problems(config, tokenizer, quantised=quantised) for exporter in self.formats]
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    def run(self, context: Context) -> dict[str, Any]:
        folder, name = context.work.folder, context.work.name
        for left in folder.iterdir():  # by a run that was killed: every file here is to be this one's
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        report = self._report(context)
        where = context.where(self.model)
        model, tokenizer = load_stored(where), load_tokenizer(where)
        as_trained(places(context, self.model)[0].artifact, tokenizer)
        packed = packed_of(model, where)
        bits = bits_in(packed)
        refused = self.refusals(model.config, tokenizer, quantised=bits)
        if refused:
            raise UserError("\n".join(f"{name}: {rule}" for rule in refused))
        written: list[Path] = []
        for exporter in self.formats:
            files = exporter.write(model, tokenizer, packed, folder, name=_name_of(where))
            twice = sorted(file.name for file in files if file in written)
            if twice:
                raise UserError(f"{name}: two of its formats write {twice[0]}; leave one out, or give it other types")
            written += files
        ggufs = sorted((f for f in written if f.parent == folder and f.suffix == ".gguf"), key=lambda f: f.stat().st_size)
        if ggufs:
            write_text(folder / MODELFILE, modelfile(model, tokenizer, [file.name for file in ggufs]))
            written.append(folder / MODELFILE)
        verified = self._verified(context, model, tokenizer, bool(packed))
        beside = {str(file.relative_to(folder)): file.stat().st_size for file in written}
        if report is not None:
            row = next(row for row in report["rows"] if row["model"] == str(self.model))
            kept = stored_dtype(where, rest=True) if packed else next(model.parameters()).dtype
            stored = str(kept).removeprefix("torch.")
            held: dict[str, str] = {}
            for exporter in self.formats:
                held |= exporter.holds(stored, quantised=bits)
            if _all_packed(model, packed):  # what these files hold besides is float32
                held = {name: type for name, type in held.items() if name not in ("model-q4_0.gguf", "model-q8_0.gguf")}
            note = " ".join(filter(None, (_note(row["seeds"], written, bits, folder), _rounded(stored, held, bits))))
            write_text(
                folder / "README.md", model_card(report, model_row=row["name"], note=note, files=beside, verified=verified)
            )
        elif told := how_to_run(beside):
            write_text(folder / "README.md", "\n".join([told.rstrip("\n"), "", *section(verified), ""]))
        return {
            "files": {str(file.relative_to(folder)): [file.stat().st_size, file_hash(file)] for file in written},
            "verified": verified,
        }

    def _verified(self, context: Context, model: Any, tokenizer: Any, quantised: bool) -> dict[str, Any]:
        """What comparing the files with the model gave, written beside them.

        Raises:
            UserError: a file does not answer as the model does.
        """
        folder, work = context.work.folder, context.work
        names = exported_in(folder)
        if self.verify == "never":
            record = unverified(names, "the recipe says verify = 'never'")
        else:
            artifact = places(context, self.model)[0].artifact
            own = load_tokenizer(context.where(self.model))  # rows as they were trained, by the template as it was then
            passages = passages_for(artifact, own, positions_of(model.config))
            ours = Reference(model, tokenizer, passages, str(self.model), full_precision(artifact) if quantised else "")
            heard = lambda done, total, name: work.progress.update(done, total, "position", file=name)  # noqa: E731
            record = verify_files(folder, names, ours, heard=heard)
        for name, why in record["not_verified"].items():
            work.note(f"{name} is not verified: {why}")
        failed = [f"{one['file']}: {one['why']}" for one in record["files"] if not one["passed"]]
        if failed:
            raise UserError(
                f"{work.name}: not finished, because a file does not answer as {self.model} does: {'; '.join(failed)}; if "
                f"nothing here says why, please report it; {work.name}.verify = 'never' writes the files all the same, and "
                "their card says so"
            )
        write_json(folder / VERIFIED, record)
        return record

    def _report(self, context: Context) -> dict[str, Any] | None:
        """The study's report, which must have measured the model."""
        if self.study is None:
            return None
        report = report_from(context.artifacts(self.study)[0].folder)
        if not any(row["model"] == str(self.model) for row in report["rows"]):
            raise UserError(
                f"{context.work.name}: {self.study} did not measure {self.model}, so its card would have no figures"
            )
        return report


def as_trained(artifact: Artifact | None, tokenizer: Any) -> None:
    """Give the tokenizer the chat template that writes what the model was trained on; a model not made here keeps its own."""
    trained = trained_as(as_chosen(artifact)).stage.get("prompts") if artifact is not None else None
    if trained is not None:
        tokenizer.chat_template = exported_template(tokenizer, Prompts.model_validate(trained))


def _name_of(where: str) -> str:
    """What people call the model: recipe and stage of one that was made here, else its folder's or the hub's name."""
    scheme, _, target = where.partition(":")
    if scheme == "hf":
        return target.partition("@")[0].rpartition("/")[2]
    folder = Path(target).expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        return folder.name
    artifact = Artifact.load(folder)
    return " ".join(part for part in (artifact.recipe, artifact.name.partition("@")[0]) if part) or folder.name


_BITS = {4: "four-bit", 8: "eight-bit"}
_EXACT = {"float32": {"float32"}, "bfloat16": {"bfloat16", "float32"}, "float16": {"float16", "float32"}}


def _all_packed(model: Any, packed: Mapping[str, Packed]) -> bool:
    """Whether every matrix of a model has codes, embeddings among them."""
    matrices = [name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return bool(packed) and all(name in packed for name in matrices)


def _rounded(stored: str, held: dict[str, str], quantised: int) -> str:
    """What the card says of files whose type does not hold the measured weights exactly; "" where all do.

    Args:
        held: type of the matrices of each file of weights, by the file's name; of a four-bit file those that are not four-bit.
    """
    by_type: dict[str, list[str]] = {}
    for name, type in held.items():
        if type not in _EXACT.get(stored, {stored}):
            by_type.setdefault(type, []).append(f"`{name}`")
    if not by_type:
        return ""
    which = f"The weights that are not {_BITS[quantised]} were" if quantised else "The weights were"
    types = "; ".join(f"to {type} in {', '.join(names)}" for type, names in by_type.items())
    return f"{which} rounded from {stored}: {types}. The figures below are of the model before that rounding."


def _note(seeds: list[Any], written: list[Path], quantised: int, folder: Path) -> str:
    """What the card says of these very files."""
    files = [path.relative_to(folder).as_posix() for path in written if path.suffix in (".gguf", ".safetensors", ".bin")]
    weights_line = f"Weights: {', '.join(f'`{name}`' for name in files)}"
    weights_line += f", of seed {seeds[0]}." if len(seeds) > 1 else "."
    wide = [f"`{name}`" for name in files if "/" not in name and "q4_0." not in name and "q8_0." not in name]
    if quantised and wide:
        weights_line += f" This is a model of {_BITS[quantised]} weights, which stand in a wider type in {', '.join(wide)}."
    if len(seeds) > 1:
        weights_line += f" The figures below are means over the seeds {', '.join(map(str, seeds))}."
    return weights_line

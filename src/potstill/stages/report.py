"""The page that says whether distilling helped."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from potstill.core.artifact import Artifact, Makes, read_json
from potstill.core.errors import UserError
from potstill.report.build import Made, report_of, write_report
from potstill.stages.base import Context, Stage
from potstill.stages.refs import DeviceRef, ExportRef, StudyRef
from potstill.stages.verified import record_beside


class Report(Stage, kind="report"):
    """Turn a study into `report.json` and one self-contained `report.html`: verdict first, then what it rests on."""

    makes: ClassVar[Makes] = "report"
    gathers: ClassVar[bool] = True
    # 8: the key `quantized`; 7: which files were verified, and pages in a browser; 6: what was measured on a device
    # 5: how programs ended; 4: what training took, own answers, and models at equal budgets
    version: ClassVar[int] = 8

    study: StudyRef = Field(description="the evaluation that is reported")
    exports: tuple[ExportRef, ...] = Field(
        default=(), description="exports of models of the study: the report names their files, sizes and commands"
    )
    device: DeviceRef | None = Field(
        default=None, description="latency and memory of exported files, shown with the models' quality beside them"
    )

    def mismatches(self, earlier: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
        study = earlier.get(self.study.target) if self.study.scheme == "stage" else None
        measured = {str(row.model) for row in getattr(study, "study", ())}
        for number, ref in enumerate(self.exports):
            export = earlier.get(ref.target) if ref.scheme == "stage" else None
            model = getattr(export, "model", None)
            if measured and model is not None and str(model) not in measured:
                yield f"exports[{number}]", f"'{ref.target}' exports {model}, which '{self.study.target}' does not measure"

    def run(self, context: Context) -> dict[str, Any]:
        exports = [context.artifacts(ref)[0] for ref in self.exports]
        device = context.artifacts(self.device)[0] if self.device is not None else None
        report = report_from(context.artifacts(self.study)[0].folder, exports, device)
        measured = [row["model"] for row in report["rows"]]
        self._check(exports, measured, context.work.name)
        timed = [*device.summary["files"], *device.summary.get("pages", ())] if device is not None else ()
        if others := [one["model"] for one in timed if one["model"] not in measured]:
            raise UserError(
                f"{context.work.name}: {self.device} measured files of {', '.join(others)}, and {self.study} no such model; "
                "add a row for it, or leave its export out of the device stage"
            )
        write_report(report, context.work.folder)
        return {"verdicts": [verdict["sentence"] for verdict in report["verdicts"]]}

    def _check(self, exports: Sequence[Artifact], measured: Sequence[str], who: str) -> None:
        """Refuse an export of a model that was not measured, and a second one of the same model."""
        models = [str(export.stage.get("model")) for export in exports]
        for number, (ref, model) in enumerate(zip(self.exports, models, strict=True)):
            if model not in measured:
                raise UserError(f"{who}: {ref} exports {model}, which {self.study} does not measure; leave it out of exports")
            if model in models[:number]:
                raise UserError(
                    f"{who}: {self.exports[models.index(model)]} and {ref} both export {model}; name one in exports"
                )


def report_from(evaluation: Path, exports: Sequence[Artifact] = (), device: Artifact | None = None) -> dict[str, Any]:
    """The report of an evaluation artifact, with what it kept of how its models were made, the files of `exports` and how
    they were verified last, and what was measured of them on a device.

    Raises:
        UserError: the evaluation is damaged, or another version of potstill made it.
    """
    made = read_json(evaluation / "lineage.json")
    if any("unit" not in sweep for sweep in made.get("sweeps", ())):
        raise UserError(f"{evaluation} was made by an older potstill: run the recipe again")
    shipped = {
        str(export.stage["model"]): (str(export.folder), {name: size for name, (size, _) in export.summary["files"].items()})
        for export in exports
    }
    verified = {str(export.stage["model"]): record_beside(export) for export in exports}
    measured = device.summary if device is not None else {}
    return report_of(evaluation, Made(**{**made, "device": measured, "verified": verified}), shipped)

"""The page that says whether distilling helped."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from potstill.core.artifact import Makes, read_json
from potstill.report.build import report_of, write_report
from potstill.stages.base import Context, Stage
from potstill.stages.refs import StudyRef


class Report(Stage, kind="report"):
    """Turn a study into `report.json` and one self-contained `report.html`: verdict first, then what it rests on."""

    makes: ClassVar[Makes] = "report"
    gathers: ClassVar[bool] = True

    study: StudyRef = Field(description="the evaluation that is reported")

    def run(self, context: Context) -> dict[str, Any]:
        report = report_from(context.artifacts(self.study)[0].folder)
        write_report(report, context.work.folder)
        return {"verdicts": [verdict["sentence"] for verdict in report["verdicts"]]}


def report_from(evaluation: Path) -> dict[str, Any]:
    """The report of an evaluation artifact, with what it kept of how its models were made."""
    return report_of(evaluation, **read_json(evaluation / "lineage.json"))

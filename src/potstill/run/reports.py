"""The report of a run, whether or not the run has finished."""

from pathlib import Path
from typing import Any

from potstill.core.artifact import Artifact
from potstill.core.errors import UserError
from potstill.report.build import read_report
from potstill.run.folder import stages_of, whole
from potstill.stages.report import report_from


def report_of(run: Path) -> tuple[dict[str, Any], str]:
    """What the run's report says, and a line on where its page is; of a run that goes on, from its finished evaluation.

    Raises:
        UserError: neither a report nor an evaluation is finished, or it is damaged.
    """
    stages = stages_of(run)
    found = {ident: artifact for ident, artifact in stages.items() if artifact is not None}
    waiting = [ident for ident in stages if ident not in found]
    reports = [artifact for artifact in found.values() if artifact.makes == "report"]
    evaluations = [artifact for artifact in found.values() if artifact.makes == "evaluation"]
    if reports:
        report = whole(run, reports[-1])
        page = report.folder / "report.html" if waiting or not (run / "report.html").is_file() else run / "report.html"
        return read_report(report.folder), f"report  {page}"
    if not waiting:
        raise UserError(f"{run}: the recipe has no report stage; add [[stage]] kind = 'report' with study = 'stage:…'")
    still = f"{len(found)} of {len(stages)} stages are finished; not finished, or damaged: {', '.join(waiting)}"
    if not evaluations:
        raise UserError(f"{run}: there is nothing to report yet ({still}); run its recipe again if nothing runs it now")
    evaluation = whole(run, evaluations[-1])
    exports = [artifact for artifact in found.values() if artifact.makes == "export" and _there(artifact)]
    device = next((artifact for artifact in found.values() if artifact.makes == "measurement"), None)
    return report_from(evaluation.folder, exports, device), f"no page yet: {still}"


def _there(export: Artifact) -> bool:
    """Whether all files of an export are still there, in their size."""
    files = {export.folder / name: size for name, (size, _) in export.summary["files"].items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())

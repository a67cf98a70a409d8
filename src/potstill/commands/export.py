"""A finished model of a run in another format, without a recipe."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.core.artifact import Artifact
from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.core.numbers import size
from potstill.core.progress import Progress
from potstill.edges.models import bits_of
from potstill.exporters import Exporter
from potstill.exporters.web import FOLDER
from potstill.report.ship import how_to_run
from potstill.report.verified import figures_in_words
from potstill.run.folder import artifacts_of, find_run
from potstill.run.models import pick, talks_in_turns
from potstill.run.runner import run_stage
from potstill.stages.export import Export


def export(target: str, kinds: Sequence[str], out: Path | None, wllama: str, progress: Progress) -> Artifact:
    """Write the model that `RUN[:MODEL]` names in these formats; the same again does nothing.

    Args:
        out: the folder; default: `exports/RUN-MODEL`.
        wllama: where wllama lies, for a web page.

    Raises:
        UserError: no such model or format, or a format refuses the model.
    """
    for kind in kinds:
        if kind not in Exporter.kinds:
            raise UserError(
                f"--to {kind}: no such format{suggest(kind, Exporter.kinds)} (there are: {', '.join(Exporter.kinds)})"
            )
    if wllama and "web" not in kinds:
        raise UserError("--wllama is for --to web; leave it out")
    artifact = pick(_smallest(target))
    fields: dict[str, dict[str, Any]] = {"web": {"wllama": wllama, "remember": talks_in_turns(artifact)}}
    formats: Any = tuple(Exporter.parse({"kind": kind, **fields.get(kind, {})}) for kind in dict.fromkeys(kinds))
    name = artifact.name.partition("@")[0]
    folder = out or Path("exports") / f"{artifact.recipe or 'model'}-{name}"
    model: Any = f"path:{artifact.folder.resolve()}"
    return run_stage(Export(model=model, formats=formats), folder, progress=progress)


def _smallest(target: str) -> str:
    """`RUN` as `RUN:MODEL` with the run's last four-bit model, if any; controls that were rounded count last."""
    folder, _, name = target.partition(":")
    if name:
        return target
    models = {ident: artifact for ident, artifact in artifacts_of(find_run(folder)).items() if artifact.makes == "model"}
    four_bit = {ident: artifact for ident, artifact in models.items() if bits_of(f"path:{artifact.folder}") == 4}
    solved = [ident for ident, artifact in four_bit.items() if artifact.summary.get("method") != "rtn"]
    chosen = next(reversed(solved or [*four_bit]), None)
    return f"{folder}:{chosen.partition('@')[0]}" if chosen is not None else target


def next_steps(made: Artifact) -> list[str]:
    """What was written, and the command that runs each."""
    told = [figures_in_words(one) for one in made.summary.get("verified", {}).get("files", ())]  # an older export has none
    source = f"  made from {made.stage['model']}" if "model" in made.stage else ""
    lines = [f"{made.folder}{source}", *(f"  verified: {one}" for one in told)]
    for name in made.summary["files"]:
        command = how_to_run(str(made.folder / name))
        lines += [f"  {command}"] if command else []
    if any(name == f"{FOLDER}/index.html" for name in made.summary["files"]):
        where = shlex.quote(str(made.folder / FOLDER))
        page = sum(of_file for name, (of_file, _) in made.summary["files"].items() if name.startswith(f"{FOLDER}/"))
        lines.append(f"  python -m http.server --bind 127.0.0.1 -d {where}  # {size(page)}, http://127.0.0.1:8000")
    return lines

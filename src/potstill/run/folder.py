"""A finished run's folder and what lies in it."""

from pathlib import Path

from potstill.core.artifact import Artifact, read_json
from potstill.core.errors import UserError


def find_run(run: str | Path) -> Path:
    """A run's folder by path, or by name under `runs/`.

    Raises:
        UserError: there is no finished run there.
    """
    for folder in (Path(run), Path("runs") / str(run)):
        if (folder / "run.json").is_file():
            return folder
        if (folder / "artifacts").is_dir():
            raise UserError(f"{folder}: the run has not finished; run its recipe again to go on")
    raise UserError(f"{run}: no run there; give a folder such as runs/quickstart")


def artifacts_of(run: Path) -> dict[str, Artifact]:
    """A finished run's artifacts by node id."""
    return {ident: Artifact.load(run / "artifacts" / name) for ident, name in read_json(run / "run.json").items()}

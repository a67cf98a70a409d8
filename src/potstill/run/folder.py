"""A run's folder: what lies in it, what is done, and what its recipe no longer uses."""

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from potstill.core.artifact import MANIFEST, Artifact, Hashes, read_json, write_json
from potstill.core.errors import UserError
from potstill.core.numbers import size

RUN = "run.json"
NAMED = 10  # folders that a message lists


def find_run(run: str | Path) -> Path:
    """A run's folder by path, or by name under `runs/`; it need not have finished.

    Raises:
        UserError: there is no run there, or none of its stages was begun.
    """
    for folder in (Path(run), Path("runs") / str(run)):
        if (folder / RUN).is_file():
            return folder
        if (folder / "artifacts").is_dir():
            raise UserError(f"{folder}: the run has not begun its first stage; run its recipe again")
    raise UserError(f"{run}: no run there; give a folder such as runs/quickstart")


def write_run(run: Path, folders: dict[str, str]) -> None:
    """Write down, before the first stage, where each stage's artifact will lie."""
    write_json(run / RUN, folders)


def stages_of(run: Path) -> dict[str, Artifact | None]:
    """A run's artifacts by node id, in its order; None: not finished, or its manifest is damaged.

    Raises:
        UserError: the list of stages is damaged.
    """
    listed = read_json(run / RUN)
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise UserError(f"{run / RUN}: damaged (no list of stages); run the recipe again, which writes it")
    return {ident: _readable(run / "artifacts" / name) for ident, name in listed.items()}


def artifacts_of(run: Path) -> dict[str, Artifact]:
    """The artifacts of a run that are finished, by node id."""
    return {ident: artifact for ident, artifact in stages_of(run).items() if artifact is not None}


def _readable(folder: Path) -> Artifact | None:
    try:
        return Artifact.load(folder)
    except UserError:
        return None


def whole(run: Path, artifact: Artifact) -> Artifact:
    """The same artifact, once its files were compared with its manifest.

    Raises:
        UserError: one of them is damaged or gone.
    """
    hashes = Hashes(run / "hashes.json")
    damage = artifact.damage(hashes) if artifact.files is not None else ""  # older versions listed none
    hashes.save()
    if damage:
        raise UserError(f"{artifact.name} is damaged: {damage} in {artifact.folder}; run the recipe again to make it again")
    return artifact


@dataclass(frozen=True)
class Leftover:
    """A folder that no stage of the recipe uses.

    Attributes:
        bytes: what the disk gets back; files that another folder shares do not count.
        unfinished: whether it was a stage in progress.
    """

    folder: Path
    bytes: int
    unfinished: bool


def leftovers(run: Path, used: Iterable[Path]) -> list[Leftover]:
    """Folders among a run's artifacts that are not in use, the largest first: of earlier settings, or of another recipe."""
    kept = {folder.name for folder in used}
    folder = run / "artifacts"
    found = [path for path in folder.iterdir() if path.name not in kept] if folder.is_dir() else []
    folders = [path for path in found if path.is_dir() and not path.is_symlink() and _is_ours(path)]
    links = Counter(stat.st_ino for path in folders for stat in _stats(path))
    return sorted(
        (Leftover(path, _freed(path, links), path.name.startswith(".work-")) for path in folders),
        key=lambda left: (-left.bytes, left.folder.name),
    )


def _is_ours(folder: Path) -> bool:
    return folder.name.startswith(".work-") or (folder / MANIFEST).is_file()


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # somebody deletes it now
            stat = path.lstat()
            if S_ISREG(stat.st_mode):
                yield stat


def _freed(folder: Path, links: Counter[int]) -> int:
    own = {stat.st_ino: stat for stat in _stats(folder)}
    return sum(stat.st_size for inode, stat in own.items() if links[inode] >= stat.st_nlink)


def leftover_note(found: list[Leftover], recipe: str) -> list[str]:
    """For people, in one line: how many, how large, and what names them; no line where there are none.

    Args:
        recipe: its file; what is none was made of a command's words.
    """
    if not found:
        return []
    where = f"they lie in {found[0].folder.parent}"
    named = "`potstill plan` with the same recipe, --set and --out names them"
    return [f"{_counted(found)}; {named if Path(recipe).is_file() else where}"]


def leftover_lines(found: list[Leftover]) -> list[str]:
    """For people: what it is, how large, and the command that deletes it."""
    if not found:
        return []
    lines = [f"{_counted(found)}; to delete:"]
    for left in found[:NAMED]:
        what = ", unfinished" if left.unfinished else ""
        lines.append(f"  rm -r {shlex.quote(str(left.folder))}  # {size(left.bytes)}{what}")
    if len(found) > NAMED:
        lines.append(f"  and {len(found) - NAMED} smaller ones beside them")
    return lines


def _counted(found: list[Leftover]) -> str:
    count = "1 folder" if len(found) == 1 else f"{len(found)} folders"
    return f"{count} of other settings, not used by this recipe as it stands, {size(sum(left.bytes for left in found))}"

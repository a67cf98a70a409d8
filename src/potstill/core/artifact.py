"""Folders that are either whole or absent: fingerprints, work in progress, the lock on a run."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from potstill.core.errors import UserError

Makes = Literal["model", "cache", "evaluation", "export", "report"]
MANIFEST = "artifact.json"
PRINT = 16  # characters of a fingerprint that are kept where two are only compared


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file that we wrote.

    Raises:
        UserError: it is not there or no longer JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete its folder and run again") from None


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn what a disk refuses into a UserError that says what is kept and how to go on."""
    again = "what was finished and the last checkpoint are kept: run the same command again to go on"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" of {error.filename}" if error.filename else ""
            raise UserError(f"{doing}: no space left on the disk{where}; free some, {again}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            where = error.filename or "its files"
            raise UserError(f"{doing}: cannot write {where} ({error.strerror}); choose another folder with --out") from error
        raise
    except Exception as error:  # safetensors and tokenizers report the same as text
        if "os error 28" in str(error):
            raise UserError(f"{doing}: no space left on the disk; free some, {again}") from error
        raise


@dataclass(frozen=True)
class Artifact:
    """A finished stage's folder.

    Attributes:
        folder: where it lies; its manifest is `artifact.json`.
        name: the stage's name in its recipe, with `@seed` where students are trained per seed.
        kind: the stage's kind.
        makes: what it holds, and so who may refer to it.
        fingerprint: of the resolved stage, its data and its parents' fingerprints.
        parents: fingerprints of the artifacts it was made from, by name.
        stage: the resolved stage, as `Stage.spec()` gives it.
        summary: figures that reports and later stages read.
    """

    folder: Path
    name: str
    kind: str
    makes: Makes
    fingerprint: str
    parents: dict[str, str] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    created: str = ""
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_gpu_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Artifact":
        """Read a finished artifact.

        Raises:
            UserError: the folder holds no readable manifest.
        """
        meta = read_json(folder / MANIFEST)
        return cls(folder=folder, **meta)

    def commit(self, work: Path) -> "Artifact":
        """Write the manifest into the work folder, then rename the whole into place."""
        meta = asdict(self)
        del meta["folder"]
        write_json(work / MANIFEST, meta)
        _sync_files(work)
        if self.folder.exists():  # a folder without a readable manifest: nothing that anyone could use
            shutil.rmtree(self.folder)
        work.replace(self.folder)
        return Artifact.load(self.folder)  # as a later run will find it: JSON knows no tuples


def _sync_files(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


@contextmanager
def file_lock(path: Path, what: Path) -> Iterator[None]:
    """Hold a lock file while inside; the operating system lets go when the holder dies, however it dies.

    Raises:
        UserError: another process holds it; says which, and that `what` is in use.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise UserError(f"{what} is in use by {holder}; wait, or choose --out") from None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # its holder took it away between our opening and our locking it
    with file:
        file.seek(0)
        file.truncate()
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

"""Folders that are either whole or absent: fingerprints, work in progress, the lock on a run."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from potstill.core.errors import UserError

Makes = Literal["model", "cache", "rows", "evaluation", "export", "measurement", "report"]
MANIFEST = "artifact.json"
PRINT = 16  # characters of a fingerprint that are kept where two are only compared
SEAL = "manifest"  # in a manifest: the fingerprint of all the rest
OWN_CHECKSUMS: tuple[Makes, ...] = ("cache",)  # each row carries its checksum, and a lost row is computed again by itself
WITH_TIMES = "tensorboard/"  # files whose bytes hold clock times
WRITTEN_LATER = ("README.md", "verify.json")  # a card that people complete, a verification that is repeated


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
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder where a file must be; delete it and run again") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete its folder and run again") from None


class Hashes:
    """SHA-256 of files, each read once: remembered in a file of their own by path, size and times of change.

    Attributes:
        known: hash by `path:size:times`; other readers of files may add theirs.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.known: dict[str, Any] = self._read()
        self._saved = dict(self.known)

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):  # absent or damaged: the files are read again
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def of(self, path: Path) -> str:
        """The file's hash, from memory while the file has not changed."""
        key = _as_it_stands(path)
        if key not in self.known:
            self.known[key] = file_hash(path)
        return self.known[key]

    def knows(self, path: Path) -> bool:
        """Whether `of` needs not read the file."""
        return _as_it_stands(path) in self.known

    def learn(self, artifact: "Artifact") -> None:
        """Remember the files of an artifact that was written a moment ago."""
        for name, (_, digest) in (artifact.files or {}).items():
            self.known[_as_it_stands(artifact.folder / name)] = digest

    def save(self) -> None:
        """Write down what is new, beside what other processes wrote; a disk that refuses only costs the next reader time."""
        if self.known != self._saved:
            with suppress(OSError):
                write_json(self._file, {**self._read(), **self.known})
                self._saved = dict(self.known)


def _as_it_stands(path: Path) -> str:
    stat = path.stat()  # the time of the last change of status, too: no program can set it back
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


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
        contents: their `content`, by name.
        files: size in bytes and SHA-256 of each of its files, by its path in the folder; None: an older version listed none.
        stage: the resolved stage, as `Stage.spec()` gives it.
        summary: figures that reports and later stages read.
    """

    folder: Path
    name: str
    kind: str
    makes: Makes
    fingerprint: str
    parents: dict[str, str] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] | None = None
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
        """Read a finished artifact's manifest.

        Raises:
            UserError: the folder holds no readable manifest, or one that was changed since.
        """
        meta = read_json(folder / MANIFEST)
        try:
            if (seal := meta.pop(SEAL, None)) is not None and seal != fingerprint(meta):
                raise ValueError
            files = meta.pop("files", None)
            listed = None if files is None else {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
            return cls(folder=folder, files=listed, **meta)
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{folder / MANIFEST}: damaged (not as it was written); delete its folder and run again") from None

    @property
    def content(self) -> str:
        """SHA-256 over the paths and hashes of its files, but for those that hold clock times."""
        return fingerprint(
            {name: digest for name, (_, digest) in (self.files or {}).items() if not name.startswith(WITH_TIMES)}
        )

    def damage(self, hashes: Hashes | None = None) -> str:
        """The first file that is not as the manifest says, and in what; "" where all are.

        Sizes are compared always, contents when `hashes` is given. Files that the manifest does not list are not looked at:
        caches grow.
        """
        if self.files is None:
            return "its manifest lists no files"
        for name, (size, digest) in self.files.items():
            path = self.folder / name
            try:
                found = path.stat().st_size if path.is_file() else None
                if found is None:
                    return f"{name} is missing"
                if found != size:
                    return f"{name} has {found:,} bytes instead of {size:,}"
                if hashes is not None and self.makes not in OWN_CHECKSUMS and hashes.of(path) != digest:
                    return f"{name} has the right size and another content"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        return ""

    def unread(self, hashes: Hashes) -> int:
        """Bytes that `damage` would read to compare contents."""
        if self.makes in OWN_CHECKSUMS:
            return 0
        there = ((self.folder / name, size) for name, (size, _) in (self.files or {}).items())
        return sum(size for path, size in there if path.is_file() and not hashes.knows(path))

    def commit(self, work: Path) -> "Artifact":
        """Write the manifest into the work folder, then rename the whole into place.

        What lies there already goes: a folder without a readable manifest, or one that was found damaged.
        """
        _open_to_all(work)
        meta = asdict(self) | {"files": _listed(work)}
        del meta["folder"]
        write_json(work / MANIFEST, meta | {SEAL: fingerprint(meta)})
        _sync_files(work)
        if self.folder.exists():
            (self.folder / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted must not look finished
            shutil.rmtree(self.folder)
        work.replace(self.folder)
        return Artifact.load(self.folder)  # as a later run will find it: JSON knows no tuples


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of each file of a work folder, but for the manifest and what may be written again."""
    files = {path.relative_to(folder).as_posix(): path for path in _files_in(folder)}
    own = (MANIFEST, f".{MANIFEST}.tmp", *WRITTEN_LATER)
    return {name: (path.stat().st_size, file_hash(path)) for name, path in files.items() if name not in own}


def _open_to_all(folder: Path) -> None:
    """Give files the permissions that the user's mask allows: safetensors writes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in _files_in(folder):
        path.chmod(0o666 & ~mask)


def _sync_files(folder: Path) -> None:
    for path in _files_in(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def held_by(path: Path) -> str | None:
    """Who holds a lock file now; None: nobody."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except OSError:
        return path.read_text(encoding="utf-8").strip() or "another process"


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

"""What a teacher said of rows it has read, on disk: found again by the row's token ids, checksummed row by row."""

import fcntl
import hashlib
import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.core.artifact import read_json, write_json
from potstill.core.errors import UserError

FORMAT = 1
ABOUT = "cache.json"
# one record of a part's index: the row's key, where its values begin, how many tokens, checksums of values and of itself
RECORD = np.dtype([("key", "<u8", 2), ("offset", "<u8"), ("tokens", "<u4"), ("values", "<u4"), ("self", "<u4")])
MERGED = 4096  # new records kept in a dictionary before they join the sorted table


def row_key(prompt: np.ndarray, response: np.ndarray) -> bytes:
    """128 bits that stand for a row's token ids and for where its response begins."""
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    digest.update(np.ascontiguousarray(prompt, dtype="<u4").tobytes())
    digest.update(np.ascontiguousarray(response, dtype="<u4").tobytes())
    return digest.digest()


class RowCache:
    """Rows of values by key, in a folder that any number of processes may fill and read.

    Each writer appends to a part of its own, `part-000.values` and `part-000.index`: values first, then their record, so a
    killed writer leaves at most values that no record speaks of. A record's own checksum is compared when it is taken
    in, its row's whenever that is read; what does not fit (a flipped bit, a truncated file) is missing, and only that is
    computed again. Values are read
    with `pread` straight into the batch rather than through a mapping: of a file that was cut short, a mapping kills the
    process where a short read is a row to compute again.

    Args:
        folder: made when missing.
        identity: all that decides the values besides the row; written once, compared at each opening.
        width: bytes per token.
        say: gets one line for each thing a person should know.
        about: for people and error messages; not compared.
        mend: write the folder's description again where it is damaged; only where the folder's name vouches for it.

    Attributes:
        lost: rows found damaged so far.
        readonly: whether the disk refused, so that nothing more is kept.

    Raises:
        UserError: the folder holds values of another identity; says what differs.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        width: int,
        *,
        say: Callable[[str], None] = lambda line: None,
        about: dict[str, Any] | None = None,
        mend: bool = False,
    ) -> None:
        self.folder, self.width, self._say = folder, width, say
        self.lost = 0
        self.readonly = False
        self._values: list[Any] = []  # open files, by part
        self._names: list[str] = []
        self._taken: list[int] = []  # bytes of each part's index that were read
        self._writer: tuple[int, Any] | None = None  # part and index file, once something was written
        self._open_files: list[Any] = []
        self._closed = weakref.finalize(self, _close, self._open_files)
        self._table, self._parts = np.empty(0, RECORD), np.empty(0, np.int32)  # sorted by key
        self._firsts = np.empty(0, np.uint64)  # of the keys, by themselves: a search in the table's column copies it first
        self._fresh: dict[bytes, tuple[int, Any]] = {}
        wanted = {"format": FORMAT, "width": width, **identity}
        if not (folder / ABOUT).is_file():
            aside = folder / f"{ABOUT}.{os.getpid()}.{id(self)}"  # several may make it at once, all the same
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(aside, {"identity": wanted, "about": about or {}})
                aside.replace(folder / ABOUT)
            except OSError as error:
                self._give_up(error)
        if (folder / ABOUT).is_file():
            found = _identity(folder)
            if found is None and not mend:
                raise UserError(f"{folder / ABOUT}: damaged; delete {folder} and run again")
            if found is None:  # the folder is named by its identity, and its rows are checked one by one
                say(f"{folder / ABOUT} was damaged; it is written again")
                write_json(folder / ABOUT, {"identity": wanted, "about": about or {}})
            elif found != wanted:
                raise UserError(_differences(found, wanted))
        self.refresh()

    def refresh(self) -> None:
        """Read what any process has written since the last call."""
        for path in sorted(self.folder.glob("part-*.index")):
            if path.stem not in self._names:
                try:
                    self._add_part(path.stem, path.with_suffix(".values").open("rb"))
                except OSError:
                    self._say(f"{path.with_suffix('.values')} cannot be read: its rows are computed again")
                    continue
            part = self._names.index(path.stem)
            if self._writer is not None and self._writer[0] == part:
                continue
            raw = _read_from(path, self._taken[part])
            raw = raw[: len(raw) - len(raw) % RECORD.itemsize]
            if not raw:
                continue
            self._taken[part] += len(raw)
            table = _whole(raw)
            ends = table["offset"] + table["tokens"].astype(np.uint64) * np.uint64(self.width)
            kept = table[ends <= os.fstat(self._values[part].fileno()).st_size]
            lost = len(raw) // RECORD.itemsize - len(kept)
            if lost:
                self.lost += lost
                self._say(f"{self.folder}: {path.stem} is cut short or damaged: {lost:,} rows of it are computed again")
            if len(kept) >= MERGED:
                self._join(kept, np.full(len(kept), part, np.int32))
            else:
                self._remember((record["key"].tobytes(), (part, record)) for record in kept)

    def _add_part(self, name: str, values: Any) -> int:
        self._names.append(name)
        self._open_files.append(values)
        self._values.append(values)
        self._taken.append(0)
        return len(self._names) - 1

    def _records(self, key: bytes) -> Iterator[tuple[int, Any]]:
        if key in self._fresh:
            yield self._fresh[key]
        first, second = np.frombuffer(key, dtype="<u8")
        at = int(np.searchsorted(self._firsts, first))
        while at < len(self._table) and self._firsts[at] == first:
            if self._table["key"][at, 1] == second:
                yield int(self._parts[at]), self._table[at]
            at += 1

    def __contains__(self, key: bytes) -> bool:
        return any(True for _ in self._records(key))

    def read(self, key: bytes, out: np.ndarray) -> bool:
        """Fill `out`, uint8 [tokens, width], with a row's values; False when they are not there or no longer whole."""
        found = False
        for part, record in self._records(key):
            if record["tokens"] != len(out):
                continue
            view = memoryview(out.reshape(-1).data)
            found = True
            try:
                whole = os.preadv(self._values[part].fileno(), [view], int(record["offset"])) == len(view)
            except OSError:  # a block that the disk cannot give any more
                whole = False
            if whole and zlib.crc32(view) == record["values"]:
                return True
        if found:
            if not self.lost:
                self._say(f"{self.folder}: rows are damaged (their checksums do not fit); these are computed again")
            self.lost += 1
            self._fresh.pop(key, None)
            self._drop(key)
        return False

    def _drop(self, key: bytes) -> None:
        first, second = np.frombuffer(key, dtype="<u8")
        keep = ~((self._firsts == first) & (self._table["key"][:, 1] == second))
        self._table, self._parts, self._firsts = self._table[keep], self._parts[keep], self._firsts[keep]

    def append(self, key: bytes, values: np.ndarray) -> bool:
        """Store a row's values, uint8 [tokens, width]; after a disk error, warn once and return False."""
        if self.readonly:
            return False
        try:
            part, index = self._writer or self._open()
            file = self._values[part]
            offset = file.seek(0, os.SEEK_END)
            data = np.ascontiguousarray(values).tobytes()
            _write(file, data)
            record = np.zeros((), RECORD)
            record["key"] = np.frombuffer(key, dtype="<u8")
            record["offset"], record["tokens"], record["values"] = offset, len(values), zlib.crc32(data)
            record["self"] = zlib.crc32(record.tobytes()[:-4])
            _write(index, record.tobytes())
        except OSError as error:
            self._give_up(error)
            return False
        self._remember([(key, (part, record[()]))])
        return True

    def _remember(self, records: Iterable[tuple[bytes, tuple[int, Any]]]) -> None:
        self._fresh.update(records)
        if len(self._fresh) >= MERGED:
            fresh = self._fresh.values()
            self._join(np.array([record for _, record in fresh], RECORD), np.array([part for part, _ in fresh], np.int32))
            self._fresh.clear()

    def _join(self, table: np.ndarray, parts: np.ndarray) -> None:
        table, parts = np.concatenate([table, self._table]), np.concatenate([parts, self._parts])
        firsts = np.ascontiguousarray(table["key"][:, 0])
        order = np.argsort(firsts, kind="stable")
        self._table, self._parts, self._firsts = table[order], parts[order], firsts[order]

    def _open(self) -> tuple[int, Any]:
        """A part that no other process writes: an old one to go on with, or a new one."""
        for number in range(10_000):
            name = f"part-{number:03}"
            index = (self.folder / f"{name}.index").open("ab", buffering=0)
            try:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                index.close()
                continue
            except OSError:  # a file system without locks
                index.close()
                raise
            torn = os.fstat(index.fileno()).st_size % RECORD.itemsize
            if torn:  # a writer killed within a record
                index.truncate(os.fstat(index.fileno()).st_size - torn)
            file = (self.folder / f"{name}.values").open("a+b", buffering=0)
            self._open_files += [index, file]
            part = self._names.index(name) if name in self._names else self._add_part(name, file)
            self._values[part] = file
            self._writer = part, index
            return self._writer
        raise OSError(f"{self.folder}: no free part")

    def _give_up(self, error: OSError) -> None:
        self.readonly = True
        self._say(
            f"the teacher's cache in {self.folder} cannot be written ({error.strerror or error}); "
            "what it lacks is computed again whenever it is needed"
        )

    def missing(self, keys: Iterable[bytes]) -> Iterator[bytes]:
        """Those rows that are not there, by the index; values are checked when they are read."""
        return (key for key in keys if key not in self)

    def bytes(self) -> int:
        """Of all parts, on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("part-*"))

    def close(self) -> None:
        """Let go of the files; happens by itself when nobody holds the cache any more."""
        self._closed()


def _close(files: list[Any]) -> None:
    for file in files:
        file.close()


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a disk that fills up takes a part
        view = view[file.write(view) :]


def _read_from(path: Path, begin: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read()


def _whole(raw: bytes) -> np.ndarray:
    """The records of an index that are as they were written."""
    size = RECORD.itemsize
    table = np.frombuffer(raw, RECORD)
    good = [zlib.crc32(raw[at : at + size - 4]) == own for at, own in zip(range(0, len(raw), size), table["self"], strict=True)]
    return table[np.array(good, dtype=bool)]


def _identity(folder: Path) -> dict[str, Any] | None:
    """What a folder says it holds; None where that cannot be read any more."""
    try:
        found = read_json(folder / ABOUT)
    except UserError:
        return None
    found = found.get("identity") if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """In words a user can act on."""
    words = {
        "teacher": "another teacher said it: its weights or tokenizer are others",
        "format": "another version of potstill wrote it",
        "code": "another version of potstill wrote it",
    }
    names = {"width": "bytes per token"}
    parts = [
        words.get(
            name,
            f"its {names.get(name, name)} is {found.get(name, 'not there')}, and {wanted.get(name, 'not there')} is asked for",
        )
        for name in sorted(found.keys() | wanted.keys(), key=lambda name: (name == "width", name))
        if found.get(name) != wanted.get(name)
    ]
    return "; ".join(parts)


def keys_of(pairs: Sequence[tuple[Any, Any]] | Any) -> Iterator[bytes]:
    """The key of every row of a token store, or of pairs of (prompt ids, response ids)."""
    for i in range(len(pairs)):
        yield row_key(*(np.asarray(part) for part in pairs[i]))

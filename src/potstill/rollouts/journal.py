"""Rows that are written one by one and read back after a kill: a line for each, on the disk before the next one is counted."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from potstill.core.artifact import write_text


class Answer(NamedTuple):
    """One answer as it is kept.

    Attributes:
        tokens, prompt_tokens: as the tokenizer or the server counts them; None where a server does not say.
        mean_logp: of its tokens under the model itself, in nats; None where it is not known.
        reasoned: whether reasoning came beside it, which is not kept.
    """

    text: str
    finished: bool
    tokens: int | None = None
    prompt_tokens: int | None = None
    mean_logp: float | None = None
    reasoned: bool = False


class Journal:
    """What was written for each row, by the row's number; a row is there as a whole or not at all.

    Each line is one JSON object with a checksum. A line that a kill cut short, or that is damaged, is taken out when the
    journal is opened, so that its row is written again.

    Attributes:
        rows: what was written so far; None: the row was refused, its prompt is too long.
        lost: damaged lines that were taken out, a half one at the end not counted.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lost = path, 0
        self.rows: dict[int, list[Answer] | None] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._repair(path.read_bytes() if path.is_file() else b"")
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._length = os.fstat(self._fd).st_size

    def _repair(self, data: bytes) -> None:
        *lines, half = data.split(b"\n")
        kept = [line for line in lines if self._read(line)]
        self.lost = len(lines) - len(kept)
        if half or self.lost:
            write_text(self.path, "".join(line.decode() + "\n" for line in kept))

    def _read(self, line: bytes) -> bool:
        """Take in a line; false where it is damaged."""
        try:
            checksum, _, text = line.partition(b" ")
            if int(checksum, 16) != zlib.crc32(text):
                return False
            row, answers = json.loads(text)
            self.rows[row] = [Answer(*answer) for answer in answers] if answers is not None else None
        except (ValueError, TypeError):
            return False
        return True

    def add(self, written: Mapping[int, Sequence[Answer] | None]) -> None:
        """Keep what was written for some rows.

        Raises:
            OSError: the disk refuses; nothing of these rows is kept.
        """
        texts = [json.dumps([row, answers], ensure_ascii=True, allow_nan=False).encode() for row, answers in written.items()]
        data = memoryview(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts))
        try:
            rest = data
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._length)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error
        self._length += len(data)
        self.rows |= {row: [*answers] if answers is not None else None for row, answers in written.items()}

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

"""Files of rows: opened with clear refusals, decompressed where their first bytes say so, and hashed."""

import bz2
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Callable
from difflib import get_close_matches
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError

_HEAD = 512  # bytes, in which every kind of file below shows what it is
_PIECE = 1 << 16  # bytes read at a time
_REFUSED = {
    b"PK\x03\x04": "is a zip archive, as Excel's .xlsx files are; unzip it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "is an old Office file; save the sheet as CSV",
    b"PAR1": 'is a Parquet file; set data.kind = "parquet"',
    b"ARROW1": 'is an Arrow file; save it as Parquet and set data.kind = "parquet"',
    b"\x04\x22\x4d\x18": "is compressed with LZ4; decompress it with `lz4 -d`",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it and name one file of it",
    b"\x5d\0\0": "is an old .lzma file; decompress it with `unlzma`",
    b"\xff\xfe": "is UTF-16 text; save the file as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save the file as UTF-8",
}


def open_text(path: str) -> "BufferedReader[Any]":
    """The bytes of a file of text; gzip, bzip2, xz and Zstandard are recognised by the file's first bytes and decompressed.

    Raises:
        UserError: as `open_bytes`; or the file is an archive, a workbook, Parquet or UTF-16; later, from the reader: the
            compressed file is truncated or damaged.
    """
    file = open_bytes(path)
    try:
        opener = _opener(file.peek(_HEAD)[:_HEAD])
        opened: BufferedReader[Any] = BufferedReader(_Decompressed(path, file, opener(file)), _PIECE) if opener else file
        _refuse_other_kinds(path, opened.peek(_HEAD)[:_HEAD])
    except BaseException:
        file.close()
        raise
    return opened


def open_bytes(path: str) -> BufferedReader:
    """The bytes of a file as they are.

    Raises:
        UserError: the file is missing, a folder or forbidden.
    """
    file = Path(os.path.expanduser(path))
    try:
        return file.open("rb")
    except FileNotFoundError:
        folder = file.parent
        if not folder.is_dir():
            raise UserError(f"{path}: no such folder as {folder.absolute()}; check data.path") from None
        raise UserError(f"{path}: no such file in {folder.absolute()}{_alike(file)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name one file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; try `chmod u+r {path}`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check data.path") from None


def _alike(file: Path) -> str:
    """A file of the folder with nearly that name; its ending, which many share, says nothing."""
    there = {other.name.partition(".")[0]: other for other in sorted(file.parent.iterdir())}
    close = get_close_matches(file.name.partition(".")[0], there, n=1, cutoff=0.6)
    return f"; did you mean '{there[close[0]]}'?" if close else "; check data.path"


def bare_name(path: str) -> str:
    """The name in small letters, without the ending of compression."""
    return re.sub(r"\.(gz|bz2|xz|zst)$", "", Path(path).name.lower())


def is_table(path: str) -> bool:
    """Whether the name says CSV or TSV."""
    return bare_name(path).endswith((".csv", ".tsv", ".tab"))


def sha256(path: str) -> str:
    """The hex digest of the file's bytes as they lie on disk, read in pieces.

    Raises:
        UserError: the file cannot be opened.
    """
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_other_kinds(path: str, head: bytes) -> None:
    told = next((told for magic, told in _REFUSED.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        told = "is a tar archive; unpack it and name one file of it"
    if told:
        raise UserError(f"{path}: {told}")


def _opener(head: bytes) -> Callable[[BufferedReader], Any] | None:
    """What decompresses a file that begins so. No such beginning is UTF-8 text but bzip2's, of which ten bytes are compared."""
    if head.startswith(b"\x1f\x8b"):
        return lambda file: gzip.GzipFile(fileobj=file, mode="rb")
    if head.startswith(b"\xfd7zXZ\0"):
        return lambda file: _Streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):  # π of a block, √π of an empty stream
        return lambda file: _Streams(file, bz2.BZ2Decompressor)
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"*M\x18" and head[0] & 0xF0 == 0x50):  # or a frame to skip
        return _zstandard
    return None


def _zstandard(file: BufferedReader) -> Any:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise UserError(f"{file.name}: this pyarrow reads no Zstandard; decompress the file with `zstd -d`")
    return pyarrow.CompressedInputStream(file, "zstd")


class _Streams:
    """bzip2 or xz streams, one after another, as `cat a.xz b.xz` leaves them.

    The readers of Python's standard library pass over whatever follows the first stream and is none itself, and so would
    lose the rows of a second stream with a damaged head.
    """

    def __init__(self, file: BufferedReader, new: Callable[[], Any]) -> None:
        self._file, self._new, self._stream = file, new, new()

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end.

        Raises:
            EOFError: the file ends inside a stream.
        """
        while True:
            rest = b""
            if self._stream.eof:
                rest = self._after_stream(self._stream.unused_data)
                if not rest:
                    return b""
                self._stream = self._new()
            elif self._stream.needs_input:
                rest = self._file.read(_PIECE)
                if not rest:
                    raise EOFError("ends inside a compressed stream")
            if data := self._stream.decompress(rest, size):
                return data

    def _after_stream(self, rest: bytes) -> bytes:
        """What follows a stream and its padding."""
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._file.read(_PIECE)):
                break
        return rest


class _Decompressed(RawIOBase):
    """A reader of decompressed bytes that says what is wrong with the file in our words, and closes the file with itself."""

    def __init__(self, path: str, file: BufferedReader, inner: Any) -> None:
        self._path, self._file, self._inner = path, file, inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise UserError(
                f"{self._path}: the compressed file is truncated or damaged ({error}); copy or download it again"
            ) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

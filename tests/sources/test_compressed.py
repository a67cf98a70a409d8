"""Compressed files are read whole or refused."""

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from test_kinds_of_files import zstandard

from potstill.core.errors import UserError
from potstill.sources.dolly import Dolly
from potstill.sources.jsonl import Jsonl
from potstill.sources.squad import Squad

ROWS = "".join(json.dumps({"instruction": f"{number}?", "response": "x" * number}) + "\n" for number in range(300)).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
}


def read(file: Path, data: bytes) -> int:
    file.write_bytes(data)
    return len(list(Jsonl(path=str(file), on_empty="skip").rows()))


@pytest.mark.parametrize("name", ["rows.jsonl.SUFFIX", "rows.jsonl"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_first_bytes_decide_and_not_the_name(suffix: str, name: str, tmp_path: Path) -> None:
    file, data = tmp_path / name.replace("SUFFIX", suffix), COMPRESS[suffix](ROWS)
    assert read(file, data) == 299
    assert Jsonl(path=str(file)).content_hash() == hashlib.sha256(data).hexdigest()
    assert read(file, ROWS) == 299, "a browser has decompressed it, and left its name"


def test_a_frame_to_skip_before_the_first_one_of_zstandard(tmp_path: Path) -> None:
    """As pzstd writes."""
    assert read(tmp_path / "rows", b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard(ROWS)) == 299


@pytest.mark.parametrize("suffix", COMPRESS)
def test_streams_one_after_another(suffix: str, tmp_path: Path) -> None:
    half = ROWS.index(b"\n", len(ROWS) // 2) - 5  # inside a line
    data = COMPRESS[suffix](ROWS[:half]) + COMPRESS[suffix](ROWS[half:])
    assert read(tmp_path / "rows", data) == 299


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("harm", ["cut", "cut in its head", "cut in its second stream", "followed by something else"])
def test_a_truncated_or_damaged_file_is_refused(suffix: str, harm: str, tmp_path: Path) -> None:
    whole = COMPRESS[suffix](ROWS)
    harmed = {
        "cut": whole[:-3],
        "cut in its head": whole[:12],
        "cut in its second stream": whole + whole[:-3],
        "followed by something else": whole + b"Not found",
    }[harm]
    with pytest.raises(UserError) as caught:
        read(tmp_path / "rows", harmed)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'rows'}: the compressed file is truncated or damaged (")
    assert told.endswith("); copy or download it again")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_changed_byte_is_found_by_the_checksum(suffix: str, tmp_path: Path) -> None:
    data = bytearray(COMPRESS[suffix](ROWS))
    data[len(data) // 2] ^= 1
    with pytest.raises(UserError, match="truncated or damaged"):
        read(tmp_path / "rows", bytes(data))


def test_other_sources_read_compressed_files_too(tmp_path: Path) -> None:
    row = {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "qa"}
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(row).encode()))
    for source in (Dolly(path=str(file)), Squad(path=str(file))):
        assert [example.response for example in source.rows()] == ["Ann"]

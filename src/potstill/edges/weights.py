"""Weight files as they lie on disk: whether they are whole, what they hold, and what identifies a model."""

import json
import struct
from pathlib import Path
from typing import Any

from potstill.core.artifact import file_hash, fingerprint
from potstill.core.errors import UserError
from potstill.edges.hub import commit_of, folder_of, hub_name

PACKED = "packed.safetensors"
_HASHES: dict[str, Any] = {}  # of this process


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path}: truncated in its header ({size:,} bytes); copy or download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: not a safetensors file (its header is no JSON); copy or download it again") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < expected:
        raise UserError(f"{path}: truncated, {size:,} of {expected:,} bytes; copy or download it again")
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be whole.

    Raises:
        UserError: there are none, only pickled ones, one is missing, or one is truncated.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of weight files; copy or download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            lost = f"{missing[0]} is missing ({len(missing)} of {len(names)} weight files)"
            raise UserError(f"path:{folder}: {lost}; copy or download it again")
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if not files:
        if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise UserError(
                f"path:{folder}: has pickled weights only, and unpickling can run code; save it once with "
                "save_pretrained(…) in an environment you trust, which writes safetensors"
            )
        raise UserError(f"path:{folder}: holds no model.safetensors")
    for file in files:
        header_of(file)
    return files


def content_id(where: str, hashes: dict[str, Any] | None = None) -> str:
    """What identifies a model's content: file hashes for a folder, the commit for a hub name.

    `hashes` remembers file hashes by path, size and time, so that gigabytes are read once; default: while the process lives.
    """
    folder = folder_of(where)
    if folder is None:
        name, revision = hub_name(where)
        return f"{name}@{commit_of(name, revision)}"
    hashes = hashes if hashes is not None else _HASHES
    named = [path for pattern in ("*.json", "*.jinja", "*.txt", PACKED) for path in sorted(folder.glob(pattern))]
    files = [*weight_files(folder), *(path for path in named if path.name != "artifact.json")]
    found = {}
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in hashes:
            hashes[key] = file_hash(file)
        found[file.name] = hashes[key]
    return fingerprint(found)


def bytes_of(folder: Path) -> int:
    """Bytes of a model's weights on disk; quantised layers count in their packed form."""
    files = weight_files(folder)
    packed = folder / PACKED
    if not packed.is_file():
        return sum(file.stat().st_size for file in files)
    replaced = {name.rpartition(".")[0] for name in header_of(packed)}
    rest = 0
    for file in files:
        for name, entry in header_of(file).items():
            if name.removesuffix(".weight") not in replaced:
                rest += entry["data_offsets"][1] - entry["data_offsets"][0]
    return packed.stat().st_size + rest

"""Weight files as they lie on disk: whether they are whole, what they hold, and what identifies a model."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.artifact import file_hash, fingerprint
from potstill.core.errors import UserError
from potstill.edges.hub import INDEX, WEIGHTS, commit_of, folder_of, gguf_of, hub_name, indexed

PACKED = "packed.safetensors"
# what transformers reads beside weights: configuration, tokenizers of all kinds, chat templates
READ = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")
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
            header.pop("__metadata__", None)
            expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise UserError(f"{path}: not a safetensors file (its header is no JSON); copy or download it again") from None
    if size < expected:
        raise UserError(f"{path}: truncated, {size:,} of {expected:,} bytes; copy or download it again")
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be whole.

    Raises:
        UserError: there are none, only pickled ones, two sets of them, one is missing, or one is truncated.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    files = [single] if single.is_file() else []
    if index.is_file():
        names = indexed(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            lost = f"{missing[0]} is missing ({len(missing)} of {len(names)} weight files)"
            raise UserError(f"path:{folder}: {lost}; copy or download it again")
        if files and names != [WEIGHTS]:
            raise UserError(
                f"path:{folder}: holds two sets of weights, {WEIGHTS} and the {len(names)} files that {INDEX} names; "
                "move one of them out of the folder"
            )
        files = [folder / name for name in names]
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


@dataclass(frozen=True)
class Stored:
    """A tensor as its file's header describes it.

    Attributes:
        dtype: as safetensors spells it, such as BF16.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self, name: str) -> Any:
        """The tensor itself, on the CPU, in the dtype of the file."""
        from safetensors import safe_open

        with safe_open(str(self.file), framework="pt") as tensors:
            return tensors.get_tensor(name)


def stored_in(files: list[Path]) -> dict[str, Stored]:
    """All tensors of a model's weight files by name, from the headers alone.

    Raises:
        UserError: two files hold a tensor of one name.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, entry in header_of(file).items():
            if name in found:
                raise UserError(
                    f"{file}: '{name}' stands in {found[name].file.name} as well, and either could be meant; "
                    "copy or download the weight files again"
                )
            found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]))
    return found


def bits_of(where: str) -> int:
    """Of the codes beside a model's weights, of its linear layers where embeddings have others; 0 where there are none.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(where.removeprefix("path:")).expanduser() / PACKED
    if not where.startswith("path:") or not file.is_file():
        return 0
    try:
        stored = {entry["dtype"] for name, entry in header_of(file).items() if name.endswith(".codes")}
    except UserError as error:
        raise UserError(f"{file}: not the codes of a quantised model ({error}); quantise the model again") from error
    return 4 if "U8" in stored else 8  # of four bits two lie in a byte


def content_id(where: str, hashes: dict[str, Any] | None = None) -> str:
    """What identifies a model's content: file hashes for a folder or a GGUF file, the commit for a hub name.

    `hashes` remembers file hashes by path, size and time, so that gigabytes are read once; default: while the process lives.
    """
    hashes = hashes if hashes is not None else _HASHES
    if (gguf := gguf_of(where)) is not None:
        return fingerprint({"gguf": _hash_of(gguf, hashes)})
    folder = folder_of(where)
    if folder is None:
        name, revision = hub_name(where)
        return f"{name}@{commit_of(name, revision)}"
    named = [path for pattern in (*READ, PACKED) for path in sorted(folder.glob(pattern))]
    files = [*weight_files(folder), *(path for path in named if path.name != "artifact.json")]
    return fingerprint({file.relative_to(folder).as_posix(): _hash_of(file, hashes) for file in files})


def _hash_of(file: Path, hashes: dict[str, Any]) -> Any:
    stat = file.stat()
    key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    if key not in hashes:
        hashes[key] = file_hash(file)
    return hashes[key]


def bytes_of(folder: Path) -> int:
    """Bytes of a model's weights on disk; quantised layers count in their packed form, a GGUF file as it is."""
    if folder.is_file():
        return folder.stat().st_size
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

"""A GGUF file's header: keys and tensors, checked against the file's length, and a tensor's values.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from potstill.core.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file's header describes it.

    Attributes:
        shape: outermost dimension first, as torch has it.
        type: ggml's number of its encoding.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file.

    Attributes:
        where: the file as the user named it, for messages.
    """

    where: str
    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    @cached_property
    def own(self) -> dict[str, Any]:
        """Hyper-parameters, without the architecture's name before each."""
        begin = f"{self.architecture}."
        return {key.removeprefix(begin): value for key, value in self.keys.items() if key.startswith(begin)}

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.where}: {why}")


def whole_number(file: Gguf, key: str, default: int | None = None) -> int:
    """A key that must be one whole number."""
    value = file.own.get(key, default)
    if not isinstance(value, int):
        what = "lacks" if value is None else "has a value for each layer in"
        raise file.refuse(f"it {what} '{file.architecture}.{key}'; convert the model again")
    return value


_READ: dict[tuple[str, int, int], Gguf] = {}  # by path, size and time: vocabularies take a second to read


def read(where: str, path: Path) -> Gguf:
    """The header of a file, checked against the file's length.

    Raises:
        UserError: not a GGUF file, truncated, one of several parts, or of an unknown version or encoding.
    """
    stat = path.stat()
    known = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if known not in _READ:
        _READ[known] = _read(where, path, stat.st_size)
    return _READ[known]


def _read(where: str, path: Path, size: int) -> Gguf:
    again = "copy or download it again"
    if _SPLIT.search(path.name):
        raise UserError(
            f"{where}: one part of a model in several files; join them with llama.cpp's `llama-gguf-split --merge`, and name "
            "the joined file"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{where}: not a GGUF file (it does not begin with GGUF); {again}")
        try:
            version, tensors, keys = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise UserError(f"{where}: GGUF version {version} is not known (2 and 3 are); convert the model again")
            found = dict(_key(file) for _ in range(keys))
            infos = [_info(file) for _ in range(tensors)]
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, KeyError) as error:
            raise UserError(f"{where}: truncated or damaged in its header ({size:,} bytes); {again}") from error
        begin = -(-file.tell() // (alignment := int(found.get("general.alignment", 32)))) * alignment
    if found.get("split.count", 0) > 1:
        raise UserError(
            f"{where}: one part of a model in {found['split.count']} files; join them with llama-gguf-split --merge"
        )
    placed = {name: Tensor(shape, type, begin + offset) for name, shape, type, offset in infos}
    whole = Gguf(where, path, found, placed)
    expected = max((tensor.offset + _bytes(whole, name) for name, tensor in placed.items()), default=begin)
    if size < expected:
        raise UserError(f"{where}: truncated, {size:,} of {expected:,} bytes; {again}")
    return whole


def _number(file: BinaryIO, form: str) -> Any:
    (value,) = struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
    return value


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    data = file.read(length) if length < 2**31 else b""
    if len(data) < length:
        raise struct.error("text ends early")
    return data.decode("utf-8", "surrogateescape")


def _key(file: BinaryIO) -> tuple[str, Any]:
    name = _text(file)
    return name, _value(file, _number(file, "I"))


def _value(file: BinaryIO, type: int) -> Any:
    if type == _STRING:
        return _text(file)
    if type != _ARRAY:
        return _number(file, _SCALARS[type])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in (_STRING, _ARRAY):
        return [_value(file, inner) for _ in range(count)]
    form = f"<{count}{_SCALARS[inner]}"
    return list(struct.unpack(form, file.read(struct.calcsize(form))))


def _info(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
    return name, shape[::-1], _number(file, "I"), _number(file, "Q")


def _bytes(file: Gguf, name: str) -> int:
    """Bytes of a tensor in the file.

    Raises:
        UserError: its encoding is not known.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    tensor = file.tensors[name]
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
    except (ValueError, KeyError):
        raise file.refuse(f"'{name}' is stored in an encoding that is not known here (ggml type {tensor.type})") from None
    if tensor.shape and tensor.shape[-1] % block:
        raise file.refuse(f"'{name}' has rows of {tensor.shape[-1]}, and its encoding blocks of {block}; download it again")
    return math.prod(tensor.shape) // block * size


def values(file: Gguf, name: str) -> Any:
    """A tensor as float32, its codes multiplied out as ggml does.

    Raises:
        UserError: the `gguf` package cannot decode its encoding.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    tensor = file.tensors[name]
    type = GGMLQuantizationType(tensor.type)
    raw = np.memmap(file.path, np.uint8, "r", tensor.offset, (_bytes(file, name),))
    plain = {"F64": np.float64, "F32": np.float32, "F16": np.float16}.get(type.name)
    if plain is not None:
        return raw.view(plain).reshape(tensor.shape).astype(np.float32)
    try:
        rows = raw.reshape(*tensor.shape[:-1], -1)
        return np.ascontiguousarray(dequantize(rows, type), dtype=np.float32).reshape(tensor.shape)
    except NotImplementedError:
        raise file.refuse(
            f"'{name}' is stored as {type.name}, which cannot be decoded here; take a file of another type"
        ) from None

"""Plain values as JSON with tags, between a judge and a program that it does not trust: no pickle, no eval, no repr.

Both sides run this file, so it imports nothing but the standard library. Safety does not rest on the side that packs, because
a hostile program packs as it likes: it rests on `unpacked`, which makes values of Python's own types and nothing else.
"""

from __future__ import annotations

import json
import math

TYPE_CHECKING = False  # `typing` takes longer to import than most programs to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Packed = Any  # None, bool, int, float, str, or [tag, body]

DEPTH = 64  # containers inside containers
LINE_BYTES = 8 * 2**20  # of one message
_SAFE_INT = 2**53  # beyond it as hexadecimal digits: Python refuses decimal digits past 4,300


class NotPlain(Exception):
    """What cannot be sent, or what was received and is no plain value."""


def message(packed: Packed) -> bytes:
    """One line of JSON.

    Raises:
        NotPlain: when it is longer than LINE_BYTES.
    """
    line = json.dumps(packed, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > LINE_BYTES:
        raise NotPlain(f"a value of more than {LINE_BYTES >> 20} MiB")
    return line


def parsed(line: bytes) -> Packed:
    """The JSON of a line.

    Raises:
        NotPlain: when it is not one whole line of JSON within the limits.
    """
    if not line.endswith(b"\n"):
        raise NotPlain("an unfinished message")
    try:
        return json.loads(line.decode("ascii"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise NotPlain("a message that is no JSON") from error


def _no_constant(name: str) -> float:
    raise ValueError(name)


def packed(value: Any, other: Callable[[Any], Packed], depth: int = DEPTH) -> Packed:
    """A value of Python's own types, or of a subclass of one, by its content.

    Args:
        value: what to send.
        other: packs what is not plain, or raises NotPlain.
        depth: containers that may still be opened.

    Raises:
        NotPlain: when containers are nested too deep, as in a list that holds itself.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < _SAFE_INT else ["int", hex(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else ["float", str(float(value))]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", [packed(value.real, other), packed(value.imag, other)]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if depth == 0:
        raise NotPlain(f"a value nested more than {DEPTH} deep")
    kind: Any
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [packed(item, other, depth - 1) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        pairs = [[packed(k, other, depth - 1), packed(v, other, depth - 1)] for k, v in dict.items(value)]
        return ["dict", pairs]
    return other(value)


def unpacked(data: Packed, other: Callable[[str, Any], Any], depth: int = DEPTH) -> Any:
    """The value; exactly of Python's own types, whatever the sender claims.

    Args:
        data: what `parsed` gave.
        other: makes a value of a tag that is not among the plain ones, or raises NotPlain.
        depth: containers that may still be opened.

    Raises:
        NotPlain: when it is anything else.
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if depth == 0:
        raise NotPlain(f"a value nested more than {DEPTH} deep")
    if type(data) is not list or len(data) != 2 or type(data[0]) is not str:
        raise NotPlain("a value without a tag")
    tag, body = data
    try:
        if tag in _CONTAINERS:
            if type(body) is not list:
                raise NotPlain(f"a {tag} without items")
            return _CONTAINERS[tag](unpacked(item, other, depth - 1) for item in body)
        if tag == "dict":
            return {unpacked(key, other, depth - 1): unpacked(value, other, depth - 1) for key, value in body}
        if tag in _ATOMS:
            return _ATOMS[tag](body)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise NotPlain(f"a {tag} that is none") from error
    return other(tag, body)


def _hexadecimal(digits: str) -> int:
    return int(digits, 16)


def _not_finite(name: str) -> float:
    if name not in ("nan", "inf", "-inf"):
        raise ValueError(name)
    return float(name)


def _complex(parts: list[Packed]) -> complex:
    real, imag = (part if type(part) is float else _ATOMS["float"](part[1]) for part in parts)
    return complex(real, imag)


_CONTAINERS: dict[str, Callable[..., Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_ATOMS: dict[str, Callable[[Any], Any]] = {
    "int": _hexadecimal,
    "float": _not_finite,
    "bytes": bytes.fromhex,
    "complex": _complex,
}

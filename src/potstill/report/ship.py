"""What there is to ship: files, their sizes, and the command that runs each."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from potstill.study.records import ModelRow

WEIGHTS = (".gguf", ".safetensors")
_ASK = (
    'from transformers import pipeline; chat = pipeline("text-generation", {folder}); '
    'print(chat([{{"role": "user", "content": "Hello"}}])[0]["generated_text"][-1]["content"])'
)


@dataclass(frozen=True)
class ShippedFile:
    """One file of weights that holds a model as it was measured.

    Attributes:
        command: what runs it in a shell; empty for a format that none is known for.
    """

    name: str
    path: str
    bytes: int
    command: str


@dataclass(frozen=True)
class Size:
    """How large a model is, and what has that size.

    Attributes:
        of: a file's name, or "not exported": the size of the weights as the run keeps them, which is the size of no file.
    """

    bytes: int | None
    of: str


def shipped_files(files: Mapping[str, int], folder: str | None = None) -> list[ShippedFile]:
    """The weights among the files of a folder, name -> bytes; the smallest first."""
    weights = [(name, size) for name, size in files.items() if PurePath(name).suffix in WEIGHTS]
    found = []
    for name, size in sorted(weights, key=lambda item: (item[1], item[0])):
        path = str(PurePath(folder or ".") / name)
        found.append(ShippedFile(name, path, size, how_to_run(path)))
    return found


def how_to_run(path: str) -> str:
    """The shell command that asks a file of weights: a conversation in llama.cpp, one question in transformers."""
    if path.endswith(".gguf"):
        return f"llama-cli -m {shlex.quote(path)} -cnv"
    if path.endswith(".safetensors"):
        needs = "  # pip install compressed-tensors" if PurePath(path).parent.name == "compressed-tensors" else ""
        return f"python -c {shlex.quote(_ASK.format(folder=json.dumps(str(PurePath(path).parent), ensure_ascii=False)))}{needs}"
    return ""


def size_of(row: ModelRow) -> Size:
    """The smallest shipped file with its name, or the sum of a model's shards; without files the size as the run keeps it."""
    return size_of_files(row.files) or Size(row.bytes, "not exported")


def size_of_files(names: Mapping[str, int]) -> Size | None:
    """That of the weights among files, name -> bytes; None where there are none."""
    files = shipped_files(names)
    if not files:
        return None
    one = next((file for file in files if file.name.endswith(".gguf")), None)
    if one is not None:
        return Size(one.bytes, one.name)
    name = files[0].name if len(files) == 1 else f"{len(files)} files *.safetensors"
    return Size(sum(file.bytes for file in files), name)

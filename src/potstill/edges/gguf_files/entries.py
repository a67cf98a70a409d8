"""The entries of a GGUF file's vocabulary: names and types by id."""

import re
from typing import Any

from potstill.edges.gguf_files.header import Gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # llama.cpp's token types
GIVEN_BLANKS = -1  # ours: of runs of blanks that SentencePiece was given as tokens
BLANK = "▁"
_PADDING = re.compile(r"\[+PAD\d+\]+")


def tokens_of(file: Gguf) -> tuple[list[str], list[int]]:
    """Names and types by id. Runs of blanks that SentencePiece was given as tokens are written as it writes them."""
    names = listed(file, "tokens")
    types = listed(file, "token_type") if "tokenizer.ggml.token_type" in file.keys else [NORMAL] * len(names)
    if len(types) != len(names):
        raise file.refuse(f"it has {len(names):,} tokens and {len(types):,} token types; download it again")
    if file.keys.get("tokenizer.ggml.model") == "llama":
        blanks = [type == USER_DEFINED and not name.strip(" ") for name, type in zip(names, types, strict=True)]
        names = [name.replace(" ", BLANK) if blank else name for name, blank in zip(names, blanks, strict=True)]
        types = [GIVEN_BLANKS if blank else type for type, blank in zip(types, blanks, strict=True)]
    return names, types


def vocabulary_of(names: list[str], types: list[int]) -> dict[str, int]:
    """Ids by name, without the entries that only fill the embedding's rows."""
    entries = enumerate(zip(names, types, strict=True))
    return {name: id for id, (name, type) in entries if not (type == UNUSED and _PADDING.fullmatch(name))}


def listed(file: Gguf, name: str) -> list[Any]:
    found = file.keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list):
        raise file.refuse(f"it holds no tokenizer.ggml.{name}; convert the model again with its tokenizer")
    return found

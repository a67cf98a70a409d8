"""What every BPE tokenizer's own description (`tokenizer.json`) says of its merges."""

from collections.abc import Iterator, Mapping
from typing import Any

from potstill.exporters._networks import INSTEAD

Merge = tuple[str, str]


def merges_of(model: Mapping[str, Any]) -> list[Merge]:
    """Pairs that are merged, by rank: the lowest first, wherever it stands in a word."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def bpe_problems(model: Mapping[str, Any]) -> Iterator[str]:
    """Settings that llama.cpp's tokenizers do not have."""
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            yield f"the gguf exporter cannot express the tokenizer's {field} = {model[field]!r}; {INSTEAD}"


def steps(part: Mapping[str, Any] | None) -> list[Any]:
    """A normalizer's or pre-tokenizer's steps, one by one."""
    inner = part or {}
    for name in ("normalizers", "pretokenizers"):
        if inner.get("type") == "Sequence" and name in inner:
            return inner[name]
    return [inner] if inner else []

"""Speculative decoding in llama.cpp: a draft model writes tokens ahead, and the model checks them in one pass."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError
from potstill.edges import gguf_files
from potstill.edges.gguf_files.entries import tokens_of, vocabulary_of
from potstill.edges.llamacpp import Served, completing

_ROWS_APART = 128  # llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE, rows that only pad included
_BEGINNINGS = ("model", "add_bos_token", "add_eos_token")


@dataclass(frozen=True)
class Drafts:
    """Tokens that a draft model wrote, and those of them that the model kept."""

    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Drafts") -> "Drafts":
        return Drafts(self.drafted + other.drafted, self.accepted + other.accepted)

    def __sub__(self, other: "Drafts") -> "Drafts":
        return Drafts(self.drafted - other.drafted, self.accepted - other.accepted)

    @property
    def acceptance(self) -> float | None:
        """Per cent of the drafted tokens that were kept; None where nothing was drafted."""
        return 100 * self.accepted / self.drafted if self.drafted else None


NO_DRAFTS = Drafts()


def drafts_in(timings: dict[str, Any]) -> Drafts:
    """What llama.cpp's `timings` of an answer say of drafts; it leaves both counts out where nothing was drafted."""
    return Drafts(timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))


def check_draft(file: Path, draft: Path) -> None:
    """Refuse a draft model whose token ids mean something else than the model's.

    Stricter than llama.cpp, which looks neither at the first five ids nor at tokens that one of the two has behind the last of
    the other: of those a draft could hold ids that the model has not.

    Raises:
        UserError: with the first id or setting in which the two files differ; or one of them cannot be read.
    """
    ours, theirs = (gguf_files.read(str(path), path) for path in (draft, file))
    remedy = "a draft model needs the tokenizer of the model that it drafts for: choose a student of the same family"
    for name in _BEGINNINGS:
        own, other = (one.keys.get(f"tokenizer.ggml.{name}") for one in (ours, theirs))
        if own != other:
            raise UserError(
                f"{draft} cannot draft for {file}: tokenizer.ggml.{name} is {own!r} in one, {other!r} in the other; {remedy}"
            )
    mine, its = ({id: token for token, id in vocabulary_of(*tokens_of(one)).items()} for one in (ours, theirs))
    apart = min((id for id in mine.keys() | its.keys() if mine.get(id) != its.get(id)), default=None)
    if apart is not None:
        raise UserError(
            f"{draft} cannot draft for {file}: token {apart:,} is {mine.get(apart)!r} in one, {its.get(apart)!r} in the other "
            f"({len(mine):,} and {len(its):,} tokens); {remedy}"
        )
    rows = [len(tokens_of(one)[0]) for one in (ours, theirs)]
    if abs(rows[0] - rows[1]) > _ROWS_APART:
        raise UserError(
            f"{draft} cannot draft for {file}: {rows[0]:,} rows of embeddings against {rows[1]:,}, padding included, and "
            f"llama.cpp takes a difference of {_ROWS_APART}; {remedy}"
        )


@dataclass(frozen=True)
class Written:
    """A greedy answer.

    Attributes:
        seconds: from the request to its end, prompt included, by the clock of who asks.
    """

    text: str
    tokens: int
    seconds: float
    drafts: Drafts


def written(server: Served, prompt: list[int], most: int) -> Written:
    """The greedy answer to a prompt, nothing of the prompt remembered.

    Args:
        most: tokens of the answer; it may end before.

    Raises:
        Refused: the server died, or does not take the prompt.
    """
    body = json.dumps({"prompt": prompt, "n_predict": most, "temperature": 0, "cache_prompt": False}).encode()
    begun = time.perf_counter()
    with completing(server, body) as answer:
        found = json.loads(answer.read())
    seconds = time.perf_counter() - begun
    return Written(found["content"], found["tokens_predicted"], seconds, drafts_in(found["timings"]))

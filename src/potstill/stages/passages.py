"""Rows on which an exported file is compared with the model that it was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from potstill.core.artifact import Artifact
from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.data.tricky import CHATS
from potstill.edges.models import Tokenizer
from potstill.edges.tokens import begun, encode
from potstill.sources import Source
from potstill.stages.lineage import ancestry, as_chosen, trained_as

_ROWS = 4
_ANSWER = 64  # tokens of an answer that positions are chosen from
Pair = tuple[list[int], list[int]]
Places = list[tuple[list[int], list[int]]]  # of each row its tokens, and the places before which the next is predicted


@dataclass(frozen=True)
class Passages:
    """Rows to compare on.

    Attributes:
        own: prompt and answer of rows that the model was made for, in tokens; none where they cannot be had.
        built_in: likewise of texts of any model: a model that is sure of its own rows shows little there.
        of: which rows these are, in words.
    """

    own: list[Pair]
    built_in: list[Pair]
    of: str

    @property
    def first(self) -> list[int]:
        """The first prompt."""
        return [*self.own, *self.built_in][0][0]

    def chosen(self, count: int) -> Places:
        """Of each row its tokens and the places before which the next token is predicted: half in either kind."""
        half = count // 2 if self.own else 0
        return self._evenly(self.own, half) + self._evenly(self.built_in, count - half)

    def _evenly(self, pairs: list[Pair], count: int) -> Places:
        """Places evenly over the answers of some rows."""
        rows = [(prompt + answer[:_ANSWER], len(prompt)) for prompt, answer in pairs]
        places = [(n, p) for n, (ids, begin) in enumerate(rows) for p in range(max(begin, 1), len(ids))]
        count = min(count, len(places))
        taken = {places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)}
        found = [(ids, sorted(p for m, p in taken if m == n)) for n, (ids, _) in enumerate(rows)]
        return [(ids, at) for ids, at in found if at]


def passages_for(model: Artifact | None, tokenizer: Tokenizer, positions: int | None) -> Passages:
    """Rows that the model's training held out, else learned, as they were rendered, where they can be read; and built-in texts.

    Args:
        model: None: it was not made here.
        positions: that the model has; None: nothing bounds them.
    """
    room = positions or 2**31
    cut = max(1, room // 2)  # of a model with very few positions
    built_in = [(prompt[:cut], answer[: room - min(cut, len(prompt))]) for prompt, answer in _built_in(tokenizer)]
    named = f"{len(built_in)} built-in texts"
    trained = trained_as(as_chosen(model)) if model is not None else None
    for split in ("validation", "test", "train") if trained is not None else ():
        pairs = _rows(trained, split, tokenizer)  # pyright: ignore[reportArgumentType]
        pairs = [(prompt, answer) for prompt, answer in pairs if len(prompt) + _ANSWER <= room]
        if pairs:
            of = f"{len(pairs)} {split} rows of {trained.name}"  # pyright: ignore[reportOptionalMemberAccess]
            return Passages(pairs, built_in, f"{of} and {named}")
    return Passages([], built_in, named)


def _rows(trained: Artifact | None, split: Any, tokenizer: Tokenizer) -> list[Pair]:
    """The first rows of a split, as they were trained; none where they cannot be read any more."""
    if trained is None or "data" not in trained.stage:
        return []
    try:
        source = Source.parse(trained.stage["data"])
        assert isinstance(source, Source)
        writer = source.written_by()
        if writer is not None:
            name = writer.target
            made = [one for one in ancestry(trained).values() if one.makes == "rows" and one.name.partition("@")[0] == name]
            source = source.found_in(made[0].folder if writer.scheme == "stage" else Path(name).expanduser())
        renderer = Renderer(tokenizer, Prompts.model_validate(trained.stage.get("prompts", {})))
        found = []
        for pair in instruction_pairs(source.examples(split), renderer, Counts()):
            found.append(pair)
            if len(found) == _ROWS:
                break
        return found
    except (UserError, ValidationError, PydanticCustomError, IndexError, OSError):
        return []


def _built_in(tokenizer: Tokenizer) -> list[Pair]:
    """The built-in texts through the chat template; as plain text where there is none, or it does not take them."""
    try:
        renderer = Renderer(tokenizer, Prompts(max_tokens=4096, max_prompt_tokens=2048))
        rows = [Example(key=asked, instruction=asked, response=said) for asked, said in CHATS]
        pairs = list(instruction_pairs(rows, renderer, Counts()))
    except UserError:
        pairs = []
    if pairs:
        return pairs
    rows = [begun(tokenizer, encode(tokenizer, f"{asked}\n\n{said}")) for asked, said in CHATS]
    return [(ids[: len(ids) // 3 + 1], ids[len(ids) // 3 + 1 :]) for ids in rows]

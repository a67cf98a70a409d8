"""Rewards, asked before anything is trained what they pay for answers that solve nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.tokens import encode
from potstill.edges.vocabulary import Tokenizer
from potstill.rewards import Answered, Reward
from potstill.rewards.probes import beating
from potstill.sources import Source
from potstill.stages.set_aside import failing
from potstill.train.grading import refuse_unfit

T = TypeVar("T")


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most so many of them, evenly spaced."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]


def probed_rows(data: Source, renderer: Renderer, count: int, judge: Reward | None) -> list[Example]:
    """Training rows, read without a token store: of `count` evenly spaced ones those that fit and whose reference passes.

    Args:
        judge: a reward that runs programs, where there is one.

    Raises:
        UserError: a row cannot be read or rendered, or the sandbox could not judge a reference.
    """
    drawn = evenly([*data.examples("train")], count)
    fitting = [row for row in drawn if any(True for _ in instruction_pairs([row], renderer, Counts()))]
    aside = failing(fitting, judge) if judge is not None else {}
    return [renderer.scored(row) for place, row in enumerate(fitting) if place not in aside]


def refuse_probes(rewards: Sequence[Reward], rows: Sequence[Example], tokenizer: Tokenizer, longest: int) -> None:
    """Refuse rewards that training would climb without solving anything.

    Args:
        rows: as metrics and rewards see them; none: nothing is asked.
        longest: tokens of the longest answer that may be sampled.

    Raises:
        UserError: an answer that solves nothing is worth more than a row's reference, or a reward grades no reference.
    """
    if not rows:
        return
    # as a model that learned the rows would write them, which has the reasoning where the template shows it
    rows = [replace(row, reasoning="") for row in rows]

    def tokens(text: str) -> int:
        return len(encode(tokenizer, text)) + 1

    refuse_unfit(rewards, [Answered(row, row.response, tokens(row.response), True) for row in rows])
    if found := beating(rewards, rows, tokens, longest):
        raise UserError(f"rewards: {found[0].sentence()}")

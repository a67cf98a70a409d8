"""What a model wrote when it was asked: prompts in, samples with their log-probabilities out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import Field, model_validator

from potstill.core.component import Settings
from potstill.core.types import Turn


class Sampling(Settings):
    """How tokens are drawn. The cuts apply to the tempered distribution in this order: `top_k`, `top_p`, `min_p`."""

    temperature: float = Field(default=1.0, ge=0, le=100, description="at 0 the likeliest token is taken, the first of equals")
    top_k: int | None = Field(default=None, ge=1, description="only the so many likeliest tokens; default: all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="only the likeliest tokens that together reach this probability")
    min_p: float = Field(default=0.0, ge=0, lt=1, description="only tokens with this share of the likeliest one's probability")
    max_new_tokens: int = Field(default=128, ge=1, description="longest answer, in tokens; a longer one is cut there")

    @model_validator(mode="after")
    def _greedy_has_no_cuts(self) -> "Sampling":
        if self.temperature == 0 and not self.whole:
            raise ValueError("top_k, top_p and min_p are for sampling; leave them out at temperature 0")
        return self

    @property
    def whole(self) -> bool:
        """Whether every token can be drawn."""
        return self.top_k is None and self.top_p == 1 and self.min_p == 0


@dataclass(frozen=True)
class Asked:
    """One prompt, in the forms that engines read.

    Attributes:
        ids: its tokens, ready to be continued by the answer; empty where no tokenizer is known.
        turns: the same as messages, for an engine that applies a chat template of its own; empty where there are none.
        text: the same as plain text, for an engine that has a tokenizer of its own; empty where only tokens or turns say it.
    """

    ids: tuple[int, ...] = ()
    turns: tuple[Turn, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Usage:
    """Tokens as a server counted them; None where it does not say."""

    prompt_tokens: int | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True)
class Rollout:
    """One sample.

    Attributes:
        prompt: the number of the prompt that it answers.
        ids: the tokens that were drawn, the one that ends the answer included; empty where an engine gives text alone.
        logp_N: float32, in nats, of each of them under the distribution that it was drawn from (tempered, cut); at temperature
            0, where nothing is drawn, the model's own, those of temperature 1. Empty where the engine does not say.
        text: the answer without the token that ends it.
        finished: whether it ended of itself; else it was cut at `max_new_tokens`.
        usage: what a server counted; None where the tokens are here to be counted.
        reasoned: whether a server gave reasoning apart from the answer; it is no part of the text.
    """

    prompt: int
    ids: list[int]
    logp_N: np.ndarray
    text: str
    finished: bool
    usage: Usage | None = None
    reasoned: bool = False


class Engine(Protocol):
    """Draws answers from a model, wherever that model is."""

    def __call__(
        self,
        prompts: Sequence[Asked],
        samples: int,
        sampling: Sampling,
        seed: int,
        on_rollouts: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """`samples` answers of each prompt, those of a prompt beside each other, in the order of the prompts.

        The number that draws a token follows from seed, the prompt's tokens, the sample's number and the token's position
        alone; a prompt that occurs again in one call counts its samples on.

        Args:
            on_rollouts: gets, as they come, how many answers are finished, of how many.

        Raises:
            UserError: a prompt and its answer need more positions than the model has; an engine that does not answer.
        """
        ...

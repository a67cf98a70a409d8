"""Answers of a transformers model in this process, on any machine."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch

from potstill.core.errors import UserError
from potstill.data.rollout import Asked, Rollout, Sampling
from potstill.edges.decoding import BATCH_ROWS, Read, draw_answers
from potstill.edges.drawing import Drawing
from potstill.edges.models import Model, Tokenizer
from potstill.edges.sampling import check_room, decode, stops_of

Precision = Literal["fp32", "bf16"] | None  # under bfloat16 autocast, without, or as the context is


class Local:
    """The engine of a transformers model: it answers with the weights that the model has when it is asked.

    A prompt is read once for all of its samples; see `draw_answers`. Log-probabilities are float32, however the model computes.
    The model's mode, its gradients and torch's random state are as before afterwards.

    Args:
        stop_ids: tokens that end an answer, as the template has them; those of `stops_of` are added.
        precision: "bf16": under autocast, "fp32": without; default: as the context is in which the engine is asked. Autocast
            casts weights that are not trained at every token again; load such a model in bfloat16 instead.
        most: rows in flight. It decides memory and speed, and answers to rounding only.
        vocab: leading token ids that can be drawn; default: all that the model has.
        read: how prompts are read and continued; default: by the model alone.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        *,
        precision: Precision = None,
        most: int = BATCH_ROWS,
        vocab: int | None = None,
        read: Read | None = None,
    ) -> None:
        self.model, self.tokenizer, self.most, self.vocab, self.read = model, tokenizer, most, vocab, read
        self.precision: Precision = precision
        self.stop_ids = stops_of(model, tokenizer, list(stop_ids))

    def __call__(
        self,
        prompts: Sequence[Asked],
        samples: int,
        sampling: Sampling,
        seed: int,
        on_rollouts: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """See `Engine`.

        Raises:
            UserError: a prompt has no tokens, or one that the model does not know; a prompt and its answer need more positions
                than the model has; the model's logits are not numbers.
        """
        check_prompts(self.model, prompts, sampling)
        earlier = occurrences(prompts)

        def uniform(i: int, s: int) -> np.ndarray:
            return uniforms(seed, prompts[i].ids, earlier[i] * samples + s, sampling.max_new_tokens)

        with arithmetic(self.model, self.precision):
            found = draw_answers(
                self.model,
                [prompt.ids for prompt in prompts],
                samples=samples,
                stop_ids=self.stop_ids,
                max_new_tokens=sampling.max_new_tokens,
                drawing=Drawing(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, self.vocab),
                uniform=uniform if sampling.temperature > 0 else None,
                most=self.most,
                on_ended=on_rollouts,
                read=self.read,
            )
        return [
            Rollout(i, each.ids, each.logp_N, decode(self.tokenizer, each.ids, self.stop_ids), each.finished)
            for i, of_prompt in enumerate(found)
            for each in of_prompt
        ]


def check_prompts(model: Model, prompts: Sequence[Asked], sampling: Sampling, who: str = "the model") -> None:
    """Refuse prompts that a model cannot read or answer.

    Raises:
        UserError: a prompt has no tokens, or one that the model does not know; a prompt and its answer need more positions than
            the model has.
    """
    known = model.get_input_embeddings().weight.shape[0]
    for i, prompt in enumerate(prompts):
        if not prompt.ids:
            raise UserError(f"prompt {i} has no tokens, and {who} needs one to begin with; give it at least one")
        if not 0 <= min(prompt.ids) <= max(prompt.ids) < known:
            wrong = next(token for token in prompt.ids if not 0 <= token < known)
            raise UserError(
                f"prompt {i} has the token {wrong}, and {who} knows {known} tokens, from 0; "
                "make prompts with the model's own tokenizer"
            )
    check_room(model, max((len(prompt.ids) for prompt in prompts), default=0), sampling.max_new_tokens, who)


def arithmetic(model: Model, precision: Precision) -> AbstractContextManager[object]:
    """The context that an engine's forward passes run in."""
    if precision is None:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def uniforms(seed: int, prompt: Sequence[int], sample: int, count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of a sample's own, float64; the k-th one is the same for every `count` > k."""
    key = hashlib.blake2b(f"{seed} {sample} {' '.join(map(str, prompt))}".encode(), digest_size=16)
    return np.random.Generator(np.random.PCG64(int.from_bytes(key.digest(), "little"))).random(count)


def occurrences(prompts: Sequence[Asked]) -> list[int]:
    """Of each prompt, how often it was there before."""
    seen: dict[tuple[int, ...], int] = {}
    found = []
    for prompt in prompts:
        found.append(seen.get(tuple(prompt.ids), 0))
        seen[tuple(prompt.ids)] = found[-1] + 1
    return found

"""Answers from a transformers model, each sample with its own row in the batch."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.core.errors import UserError
from potstill.data.rollout import Asked, Rollout, Sampling
from potstill.edges.decoding import decode_batch
from potstill.edges.models import Model, Tokenizer, positions_of
from potstill.edges.sampling import BATCH_ROWS, decode, stops_of


class Plain:
    """An `Engine` over a loaded model, greedy or sampled over the whole vocabulary.

    It gives no log-probabilities and computes a prompt again for each of its samples.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = stops_of(model, tokenizer, [*stop_ids])

    def __call__(
        self,
        prompts: Sequence[Asked],
        samples: int,
        sampling: Sampling,
        seed: int,
        on_rollouts: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """As `Engine`. Raises UserError also for top_k, top_p and min_p, which it cannot."""
        if not sampling.whole:
            raise UserError("top_k, top_p and min_p are not for local models yet; leave them out")
        self._check_room(prompts, sampling)
        drawn: Counter[tuple[int, ...]] = Counter()
        rows = []
        for number, asked in enumerate(prompts):
            for _ in range(samples):
                rows.append((number, asked.ids, drawn[asked.ids]))
                drawn[asked.ids] += 1
        found: dict[int, Rollout] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))  # of nearly one length beside each other
        for begin in range(0, len(order), BATCH_ROWS):
            batch = order[begin : begin + BATCH_ROWS]
            found |= dict(zip(batch, self._batch([rows[i] for i in batch], sampling, seed), strict=True))
            if on_rollouts is not None:
                on_rollouts(len(found), len(rows))
        return [found[i] for i in range(len(rows))]

    def _batch(self, rows: Sequence[tuple[int, tuple[int, ...], int]], sampling: Sampling, seed: int) -> list[Rollout]:
        def uniform(b: int) -> Tensor:
            _, ids, sample = rows[b]
            return uniforms(seed, ids, sample, sampling.max_new_tokens)

        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]
        new = decode_batch(
            self.model,
            [ids for _, ids, _ in rows],
            stop_ids=self.stop_ids,
            pad_id=pad_id,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            uniform=uniform if sampling.temperature > 0 else None,
        )
        return [
            Rollout(
                prompt=number,
                ids=ids,
                logp_N=np.zeros(0, np.float32),
                text=decode(self.tokenizer, ids, self.stop_ids),
                finished=ids[-1] in self.stop_ids,
            )
            for (number, _, _), ids in zip(rows, new, strict=True)
        ]

    def _check_room(self, prompts: Sequence[Asked], sampling: Sampling) -> None:
        limit, longest = positions_of(self.model.config), max((len(asked.ids) for asked in prompts), default=0)
        if limit is not None and longest + sampling.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest:,} tokens and an answer of up to max_new_tokens = {sampling.max_new_tokens:,} are more "
                f"than the model's {limit:,} positions; lower sampling.max_new_tokens or prompts.max_prompt_tokens"
            )


def uniforms(seed: int, ids: Sequence[int], sample: int, count: int) -> Tensor:
    """Numbers in [0, 1), float64 [count], that follow from seed, prompt and sample number alone."""
    digest = hashlib.blake2b(repr((seed, tuple(ids), sample)).encode(), digest_size=16).digest()
    return torch.from_numpy(np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big"))).random(count))

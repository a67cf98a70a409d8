"""Answers whose tokens are drawn from a mixture of teacher and student: MiniLLM, Gu et al., arXiv:2306.08543, equation 4."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import UserError
from potstill.data.rollout import Asked, Rollout, Sampling
from potstill.edges.decoding import BATCH_ROWS, Batch, undisturbed
from potstill.edges.models import Model, Tokenizer
from potstill.rollouts.local import Local, Precision, arithmetic, check_prompts


class Mixed:
    """The engine of s = α·p + (1−α)·q over the tokens that both share, p the teacher's and q the student's next token.

    A rollout's log-probabilities are those under s. Two models are read side by side, each with a cache of its own; rows enter
    and leave as in `draw_answers`, where the caches of both allow it.

    Args:
        stop_ids: tokens that end an answer, as the template has them; those of `stops_of` are added.
        alpha: 0 ≤ α < 1.
        vocab: leading token ids that both share; no other is drawn.
        most: rows in flight.
        precision: of the forward passes; see `Local`.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        alpha: float,
        vocab: int,
        most: int = BATCH_ROWS,
        precision: Precision = None,
    ) -> None:
        self.student, self.teacher, self.alpha, self.vocab = student, teacher, alpha, vocab
        self.precision: Precision = precision
        self._local = Local(student, tokenizer, stop_ids, precision=precision, most=most, vocab=vocab, read=self._read)

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
            UserError: sampling that is not at temperature 1 over all tokens; a prompt has no tokens, or one that a model does
                not know; a prompt and its answer need more positions than a model has; logits that are not numbers.
        """
        if sampling.temperature != 1 or not sampling.whole:
            raise UserError("a mixture is sampled at temperature 1 without top_k, top_p and min_p; leave them out")
        check_prompts(self.teacher, prompts, sampling, "the teacher")
        with arithmetic(self.student, self.precision), undisturbed(self.teacher):
            return self._local(prompts, samples, sampling, seed, on_rollouts)

    def _read(self, prompts: Sequence[Sequence[int]]) -> "_Pair":
        return _Pair(self.mixture, Batch(self.student, prompts), Batch(self.teacher, prompts))

    def mixture(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """log(αp + (1−α)q) over the shared tokens."""
        logq_BV = F.log_softmax(student_BV[:, : self.vocab], dim=-1)
        if self.alpha == 0:
            return logq_BV
        logp_BV = F.log_softmax(teacher_BV[:, : self.vocab], dim=-1)
        return torch.logaddexp(logq_BV + np.log1p(-self.alpha), logp_BV + np.log(self.alpha))


class _Pair:
    """The same rows as two models read them; their logits are those of the mixture."""

    def __init__(self, mixture: Callable[[Tensor, Tensor], Tensor], *both: Batch) -> None:
        self.mixture, self.both = mixture, both
        self.joins, self.moves = all(batch.joins for batch in both), all(batch.moves for batch in both)

    @property
    def logits_BV(self) -> Tensor:
        return self.mixture(*(batch.logits_BV for batch in self.both))

    def step(self, token_B: Tensor, live_B: Tensor) -> None:
        for batch in self.both:
            batch.step(token_B, live_B)

    def pick(self, rows: list[int]) -> None:
        for batch in self.both:
            batch.pick(rows)

    def alone(self, rows: list[int]) -> "_Pair":
        return _Pair(self.mixture, *(batch.alone(rows) for batch in self.both))

    def join(self, other: "_Pair", slots: list[int], rows: list[int]) -> None:
        for batch, theirs in zip(self.both, other.both, strict=True):
            batch.join(theirs, slots, rows)

    def trim(self) -> None:
        for batch in self.both:
            batch.trim()

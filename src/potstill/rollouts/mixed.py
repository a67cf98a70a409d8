"""Answers whose tokens are drawn from a mixture of teacher and student: MiniLLM, Gu et al., arXiv:2306.08543, equation 4."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.core.errors import UserError
from potstill.data.rollout import Asked, Rollout, Sampling
from potstill.edges.decoding import BATCH_ROWS, Batch, undisturbed
from potstill.edges.drawing import Drawing
from potstill.edges.models import Model, Tokenizer
from potstill.edges.sampling import check_room, decode, stops_of
from potstill.rollouts.local import Precision, arithmetic, occurrences, uniforms


class Mixed:
    """The engine of s = α·p + (1−α)·q over the tokens that both share, p the teacher's and q the student's next token.

    A rollout's log-probabilities are those under s. Two models are read side by side, each with a cache of its own; a row that
    has ended stays in its batch until all of that batch have.

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
        self.student, self.teacher, self.tokenizer = student, teacher, tokenizer
        self.alpha, self.vocab, self.most = alpha, vocab, most
        self.precision: Precision = precision
        self.stop_ids = stops_of(student, tokenizer, list(stop_ids))

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
            UserError: sampling that is not at temperature 1 over all tokens; a prompt and its answer need more positions than a
                model has; logits that are not numbers.
        """
        if sampling.temperature != 1 or not sampling.whole:
            raise UserError("a mixture is sampled at temperature 1 without top_k, top_p and min_p; leave them out")
        for model in (self.student, self.teacher):
            check_room(model, max((len(prompt.ids) for prompt in prompts), default=0), sampling.max_new_tokens)
        earlier, count = occurrences(prompts), sampling.max_new_tokens
        rows = [(i, earlier[i] * samples + s) for i in range(len(prompts)) for s in range(samples)]
        order = sorted(range(len(rows)), key=lambda n: len(prompts[rows[n][0]].ids))
        found: dict[int, Rollout] = {}
        for begin in range(0, len(order), self.most):
            some = order[begin : begin + self.most]
            asked = [prompts[rows[n][0]].ids for n in some]
            numbers = [uniforms(seed, ids, rows[n][1], count) for n, ids in zip(some, asked, strict=True)]
            with undisturbed(self.student), undisturbed(self.teacher), arithmetic(self.student, self.precision):
                drawn = self._batch(asked, np.stack(numbers), count)
            for n, (ids, logp, finished) in zip(some, drawn, strict=True):
                text = decode(self.tokenizer, ids, self.stop_ids)
                found[n] = Rollout(rows[n][0], ids, np.array(logp, dtype=np.float32), text, finished)
            if on_rollouts is not None:
                on_rollouts(len(found), len(rows))
        return [found[n] for n in range(len(rows))]

    def _batch(
        self, prompts: Sequence[Sequence[int]], uniform_BN: np.ndarray, count: int
    ) -> list[tuple[list[int], list[float], bool]]:
        batches = [Batch(model, prompts) for model in (self.student, self.teacher)]
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        finished = [False] * len(prompts)
        draw = Drawing(temperature=1.0)
        for n in range(count):
            student_BV, teacher_BV = (batch.logits_BV for batch in batches)
            u_B = torch.from_numpy(uniform_BN[:, n].copy()).to(student_BV.device)
            token_B, logp_B = draw(self.mixture(student_BV, teacher_BV), u_B)
            assert logp_B is not None
            live = [not done for done in finished]
            for b, (token, logp) in enumerate(zip(token_B.tolist(), logp_B.tolist(), strict=True)):
                if live[b]:
                    answers[b][0].append(token)
                    answers[b][1].append(logp)
                    finished[b] = token in self.stop_ids
            if all(finished) or n + 1 == count:
                break
            live_B = torch.tensor([not done for done in finished], device=token_B.device)
            for batch in batches:
                batch.step(token_B, live_B)
        return [(*answer, done) for answer, done in zip(answers, finished, strict=True)]

    def mixture(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """log(αp + (1−α)q) over the shared tokens."""
        logq_BV = F.log_softmax(student_BV[:, : self.vocab], dim=-1)
        if self.alpha == 0:
            return logq_BV
        logp_BV = F.log_softmax(teacher_BV[:, : self.vocab], dim=-1)
        return torch.logaddexp(logq_BV + np.log1p(-self.alpha), logp_BV + np.log(self.alpha))

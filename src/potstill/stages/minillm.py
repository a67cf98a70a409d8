"""Reverse KL of whole answers, learned from the student's own."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from potstill.data.batches import StepRow
from potstill.data.prompts import Renderer
from potstill.data.rollout import Engine
from potstill.data.store import TokenStore
from potstill.edges.decoding import undisturbed
from potstill.edges.models import Model
from potstill.edges.vocabulary import Tokenizer
from potstill.losses import minillm
from potstill.losses.minillm import Estimator
from potstill.losses.objective import Objective
from potstill.rollouts.local import Local
from potstill.rollouts.mixed import Mixed
from potstill.stages.base import Context
from potstill.stages.cost import head_memory, reading_flops, teacher_bytes
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf
from potstill.stages.spent import Basis, Tally, own_tokens
from potstill.stages.start import Student
from potstill.stages.taught import Taught
from potstill.teachers.signals import Recalled
from potstill.teachers.teacher import facts_of
from potstill.train.lessons import Lessons
from potstill.train.loop import autocast, in_bf16
from potstill.train.rounds import Pace, Rounds, RoundSamples


class MiniLLM(Taught, kind="minillm"):
    """Teach a student by the reverse KL of whole answers, from answers that it writes with the teacher's help.

    Gu et al., MiniLLM, arXiv:2306.08543. Each round answers prompts by the mixture of teacher and student, and
    `samples.updates` steps learn from all of its answers; beside them each step reads rows of data of its own as plain text.
    Loss: that of `estimator`, averaged over the sampled tokens, plus `text` times the cross-entropy, averaged over the tokens
    of the data.

    The student learns in evaluation mode, without dropout, as it does in its authors' code: else the probabilities of the first
    update would not be those that the answers were judged by.
    """

    estimator: Estimator = Estimator()
    samples: RoundSamples = RoundSamples()
    text: float = Field(
        default=1.0,
        ge=0,
        description="weight of the cross-entropy of optim.batch_size rows of data in each step, against forgetting; 0: none",
    )

    @model_validator(mode="after")
    def _rounds_divide(self) -> "MiniLLM":
        if problem := self.samples.problem(self.optim.batch_size):
            raise ValueError(f"samples: {problem}")
        return self

    def dropout(self) -> bool:
        return False

    def pace(self, rows: int) -> tuple[int, int]:
        steps = self._pace().steps(self.optim, rows)
        return steps, steps * self.optim.batch_size * (2 if self.text else 1)

    def _pace(self) -> Pace:
        return Pace.of(self.samples, self.optim, self.text > 0)

    def read(self, model: Prospect, rows: RowsOf) -> float:
        steps, _ = self.pace(rows.kept)
        return steps * (self._own_read(model, rows) + (self.optim.batch_size * rows.tokens if self.text else 0))

    def learned(self, rows: RowsOf) -> float:
        steps, _ = self.pace(rows.kept)
        return steps * self.optim.batch_size * (self.own_answer(rows) + (rows.response if self.text else 0))

    def _own_read(self, model: Prospect, rows: RowsOf) -> float:
        """Tokens that a pass over a round's answers reads."""
        return self.answers_read(model, rows, self._pace().prompts, self.samples.per_prompt)

    def new_tokens(self) -> int:
        return self.samples.max_new_tokens

    def teacher_stays(self) -> bool:
        return True

    def beside(self, objective: Objective) -> tuple[Any, int]:
        own = _own(objective)
        return _signal_of(own).teacher, own.vocab

    def cost(self, outlook: Outlook) -> Cost:
        cost, teacher, student = super().cost(outlook), outlook.model(self.teacher), self.prospect(outlook)
        if teacher is None or student is None or cost.step is None or cost.steps is None or cost.memory_bytes is None:
            return cost
        rows, batch, precision = cost.rows[0], self.optim.batch_size, self.optim.precision
        rounds = math.ceil(cost.steps / self.samples.updates)
        flops, seconds = cost.flops or 0.0, cost.seconds
        # besides training: answers are judged by both, and in every step the teacher's distributions are made again
        for reader, again in ((student, 0), (teacher, cost.steps)):
            size, probe = reader.size, outlook.probe(reader.config, rows, precision)
            tokens, responses = rounds * self._own_read(student, rows), (rounds + again) * batch * self.own_answer(rows)
            flops += reading_flops(size, tokens, responses)
            if seconds is not None and probe is not None:
                seconds += probe.scored_seconds(tokens, responses)
        writers = [student, teacher] if self.estimator.alpha else [student]
        written = self.written(outlook, writers, rows, self._pace().prompts, self.samples.per_prompt)
        flops += rounds * written.flops
        memory = cost.memory_bytes + written.memory_bytes
        memory += head_memory(teacher.size, cost.step.row_tokens * batch, teacher=True)
        memory += teacher_bytes(teacher.size, self.teacher_precision, precision)
        return replace(
            cost,
            flops=flops,
            seconds=seconds + rounds * written.seconds if seconds is not None else None,
            memory_bytes=round(memory),
            step=replace(cost.step, teacher=teacher.size, flops=flops / cost.steps),
        )

    def flops(self, tally: Tally, basis: Basis) -> float | None:
        learning, teacher, pace = super().flops(tally, basis), basis.teacher, self._pace()
        if learning is None or teacher is None:
            return None
        asked = tally.rows * pace.prompts / pace.rows
        drawn, writers = tally.generated_tokens, [basis.student, *([teacher] if self.estimator.alpha else [])]
        # answers are judged in the passes of one update
        prompts = (own_tokens(tally, basis, asked) - tally.sampled_tokens) / self.samples.updates
        judging = sum(reading_flops(size, prompts + drawn, drawn) for size in (basis.student, teacher))
        writing = sum(reading_flops(size, asked * basis.prompt + drawn, drawn) for size in writers)
        reading = reading_flops(teacher, 0, tally.sampled_tokens)  # what was judged is kept, but for the distributions
        return learning + writing + judging + reading

    def objective(self, context: Context, tokenizer: Tokenizer, store: TokenStore, student: Student) -> Objective:
        teacher = self.teacher_of(context, tokenizer, store)
        return minillm.MiniLLM(Recalled(teacher.live()), self.estimator, teacher.vocab)

    def lessons(
        self, context: Context, renderer: Renderer, store: TokenStore, student: Student, objective: Objective
    ) -> Lessons:
        own, model = _own(objective), student.model
        signal = _signal_of(own)

        def judge(rows: Sequence[StepRow]) -> tuple[list[StepRow], dict[str, float]]:
            signal.forget()
            with undisturbed(model), autocast(self.optim.precision):
                told = minillm.judged(
                    model, signal, rows, self.estimator, own.vocab, self.optim.pass_tokens(model.config.hidden_size)
                )
            return told.rows, told.figures

        engine = self._engine(model, _signal_of(own).teacher, renderer, own.vocab)
        return Rounds(store, self.optim, self.samples, self.text, engine, judge, self.seed, self.watch(context))

    def _engine(self, student: Model, teacher: Model, renderer: Renderer, vocab: int) -> Engine:
        """Of the mixture; where it is the student alone, of the student alone."""
        tokenizer, stop_ids, alpha = renderer.tokenizer, renderer.stop_ids, self.estimator.alpha
        precision = "bf16" if in_bf16(self.optim.precision) else "fp32"
        if alpha == 0:
            return Local(student, tokenizer, stop_ids, precision=precision, vocab=vocab)
        return Mixed(student, teacher, tokenizer, stop_ids, alpha, vocab, precision=precision)

    def facts(self, context: Context, tokenizer: Tokenizer, objective: Objective) -> dict[str, Any]:
        return {"signal": facts_of(_own(objective).signal), **super().facts(context, tokenizer, objective)}


def _own(objective: Objective) -> minillm.MiniLLM:
    assert isinstance(objective, minillm.MiniLLM)
    return objective


def _signal_of(objective: minillm.MiniLLM) -> Recalled:
    assert isinstance(objective.signal, Recalled)
    return objective.signal

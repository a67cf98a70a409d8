"""Reinforcement learning from rewards, by groups of the model's own answers."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, model_validator

from potstill.core.errors import Problem, UserError
from potstill.core.types import Example
from potstill.data.batches import StepRow
from potstill.data.prompts import Renderer
from potstill.data.rollout import Rollout
from potstill.data.store import TokenStore
from potstill.edges.decoding import undisturbed
from potstill.edges.models import config_of
from potstill.edges.vocabulary import Tokenizer, check_rows, load_tokenizer, shared_vocabulary
from potstill.losses.objective import Objective
from potstill.losses.policy import Policy, PolicyGradient
from potstill.losses.targets import Signal
from potstill.rewards import Answered, Reward
from potstill.rollouts.local import Local
from potstill.scorers import programs
from potstill.stages.base import Context
from potstill.stages.cost import FLOAT, head_memory, reading_flops, teacher_bytes
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf
from potstill.stages.probed import evenly, probed_rows, refuse_probes
from potstill.stages.programs import program_problems
from potstill.stages.refs import ModelRef
from potstill.stages.rewarded import courses, in_words, rounds_of, summary_of
from potstill.stages.set_aside import REFERENCE_FAILS, failing_rows
from potstill.stages.spent import Basis, Tally
from potstill.stages.start import Student
from potstill.stages.taught import Paired
from potstill.teachers.signals import Live, Recalled, Unadapted
from potstill.teachers.teacher import facts_of, frozen, load_teacher
from potstill.train.grading import Grades, graded, names_of
from potstill.train.groups import Groups, GroupSamples
from potstill.train.lessons import Lessons
from potstill.train.loop import autocast, in_bf16
from potstill.train.rounds import Pace
from potstill.train.work import Work


class GRPO(Paired, kind="grpo"):
    """Raise the rewards of a model's own answers by group-relative policy optimisation.

    Shao et al., DeepSeekMath, arXiv:2402.03300. Each round answers `optim.batch_size / samples.per_prompt` prompts of the
    training rows, `per_prompt` times each; an answer's advantage is its reward less its group's mean, and `samples.updates`
    optimiser steps learn from all answers of the round by `policy`. A row's response is not learned: rewards may compare
    answers with it.

    The model learns in evaluation mode, without dropout: else the probabilities of an answer's first update would not be those
    that it was drawn by. The summary's `rewards` says for each reward how it began and ended and what part of the advantages'
    variance was its own, and `format_only` whether rewards of the form rose and those that judge correctness did not.
    """

    version: ClassVar[int] = 3  # 3: max_length without abstained answers; 2: rows whose reference fails set aside, redraws

    model: ModelRef = Field(description="what is trained")
    teacher: ModelRef | None = Field(
        default=None, description="what `policy.beta_kd` keeps the model near to, of the same tokenizer; default: none"
    )
    reference: ModelRef | None = Field(
        default=None,
        description="what `policy.beta` keeps the model near to; default: the model as it begins, with `adapter` by switching "
        "that off, else by a frozen copy. Where a reference is named, the KL to it is shown even with beta = 0",
    )
    rewards: tuple[Reward, ...] = Field(
        min_length=1, description="what an answer is worth: the sum of these, each times its weight"
    )
    policy: Policy = Field(
        default=Policy(),
        description="what is minimised; a preset's name (`recommended`, `paper`, `deepseek`, `dr_grpo`, `dapo`) or a table",
    )
    samples: GroupSamples = GroupSamples()
    probe_rows: int = Field(
        default=8,
        ge=0,
        description="rows on which answers that solve nothing (empty, tags alone, the prompt again, very long …) must not be "
        "worth more than the reference, tried by `check` and before the first step; 0: not tried",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> "GRPO":
        if problem := self.samples.problem(self.optim.batch_size):
            raise ValueError(f"samples: {problem}")
        if self.policy.beta_kd and self.teacher is None:
            raise ValueError(f"policy.beta_kd = {self.policy.beta_kd:g} needs a teacher; name one, or leave beta_kd out")
        if self.teacher is not None and not self.policy.beta_kd:
            raise ValueError("teacher is for policy.beta_kd > 0; set that too, or leave teacher out")
        return self

    def learner(self) -> tuple[str, ModelRef]:
        return "model", self.model

    def taught_by(self) -> ModelRef | None:
        return self.teacher

    def dropout(self) -> bool:
        return False

    def pace(self, rows: int) -> tuple[int, int]:
        steps = self._pace().steps(self.optim, rows)
        return steps, steps * self.optim.batch_size

    def _pace(self) -> Pace:
        return Pace.of(self.samples, self.optim, False)

    def read(self, model: Prospect, rows: RowsOf) -> float:
        steps, _ = self.pace(rows.kept)
        return steps * self._own_read(model, rows)

    def learned(self, rows: RowsOf) -> float:
        _, answers = self.pace(rows.kept)
        return answers * self.own_answer(rows)

    def _own_read(self, model: Prospect, rows: RowsOf) -> float:
        """Tokens that a pass over a round's answers reads."""
        return self.answers_read(model, rows, self._pace().prompts, self.samples.per_prompt)

    def new_tokens(self) -> int:
        return self.samples.max_new_tokens

    def teacher_stays(self) -> bool:
        return self.teacher is not None

    def beside(self, objective: Objective) -> tuple[Any, int] | None:
        own = _own(objective)
        return (own.signal.teacher, own.vocab) if isinstance(own.signal, Live | Recalled) else None

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        yield from self._reference_problems(outlook)
        unjudged = [*self._test_problems()]
        yield from unjudged or self._probe_problems(outlook)

    def _reference_problems(self, outlook: Outlook) -> Iterator[Problem]:
        if self.reference is None:
            return
        try:
            found = outlook.model(self.reference)
            if found is None:
                return
            theirs, ours = found.tokenizer(), outlook.tokenizer(self.model)
            if theirs is not None and ours is not None:
                shared_vocabulary(theirs, ours, str(self.reference), str(self.model))
                check_rows(found.size.vocab, theirs, str(self.reference))
        except UserError as error:
            yield Problem("reference", str(error), repr(str(self.reference)))
            return
        yield from self.room_problems(outlook, f"the reference {self.reference}", found, self.samples.max_new_tokens)

    def _test_problems(self) -> Iterator[Problem]:
        """Rewards that need tests, on rows of which none has any that can be run, or where no sandbox is safe."""
        needing = [(i, reward) for i, reward in enumerate(self.rewards) if reward.needs_tests()]
        if needing:
            yield from program_problems([reward for _, reward in needing], self.data, "train", f"rewards[{needing[0][0]}]")

    def _probe_problems(self, outlook: Outlook) -> Iterator[Problem]:
        """What probes will say of the rewards when the stage begins, as far as rows and tokenizer are there."""
        if self.data.foretold:
            return
        with suppress(UserError):  # the model's or the rows' own problem
            tokenizer = outlook.tokenizer(self.model)
            if tokenizer is None:
                return
            rows = probed_rows(self.data, Renderer(tokenizer, self.prompts), self.probe_rows, self._judge())
            try:
                self._refuse_probes(rows, tokenizer)
            except UserError as error:
                yield Problem("rewards", str(error).removeprefix("rewards: "))

    def _refuse_probes(self, rows: Sequence[Example], tokenizer: Tokenizer) -> None:
        refuse_probes(self.rewards, rows, tokenizer, self.samples.max_new_tokens)

    def notes(self) -> Iterator[str]:
        if not any(reward.correctness for reward in self.rewards):
            yield (
                "no reward judges whether an answer is right, only its form; add `tests` or `answer`, or mean it: a model that "
                "learns the form alone is called so"
            )
        if self.policy.ratio == "sequence" and self.samples.updates > 1:
            yield (
                f"policy.ratio = 'sequence' with samples.updates = {self.samples.updates}: the product over a whole answer "
                "leaves the clip range in a round's second update, and most tokens are then not learned; set "
                "samples.updates = 1, or policy.ratio = 'token'"
            )

    def cost(self, outlook: Outlook) -> Cost:
        cost, student = super().cost(outlook), self.prospect(outlook)
        if student is None or cost.step is None or cost.steps is None or cost.memory_bytes is None:
            return cost
        rows, batch, precision = cost.rows[0], self.optim.batch_size, self.optim.precision
        rounds = math.ceil(cost.steps / self.samples.updates)
        flops, seconds, memory = cost.flops or 0.0, cost.seconds, float(cost.memory_bytes)
        for reader, times, distributions in self._readers(outlook, student, rounds, cost.steps):
            probe = outlook.probe(reader.config, rows, precision)
            tokens, responses = times * self._own_read(student, rows), distributions * batch * self.own_answer(rows)
            flops += reading_flops(reader.size, tokens, responses)
            if seconds is not None and probe is not None:
                seconds += probe.scored_seconds(tokens, responses)
        written = self.written(outlook, [student], rows, self._pace().prompts, self.samples.per_prompt)
        draws = rounds * (1 + self.policy.redraws)  # as if every prompt were replaced each time
        reference = self._reference_of(outlook, student)
        if reference is not None:
            memory += head_memory(reference.size, cost.step.row_tokens * batch, teacher=True)
            memory += FLOAT * reference.size.parameters if self.reference is not None or self.adapter is None else 0
        teacher = outlook.model(self.teacher) if self.teacher is not None else None
        if teacher is not None:
            memory += head_memory(teacher.size, cost.step.row_tokens * batch, teacher=True)
            memory += teacher_bytes(teacher.size, self.teacher_precision, precision)
        flops += draws * written.flops
        return replace(
            cost,
            flops=flops,
            seconds=seconds + draws * written.seconds if seconds is not None else None,
            memory_bytes=round(memory + written.memory_bytes),
            step=replace(cost.step, teacher=teacher.size if teacher is not None else None, flops=flops / cost.steps),
        )

    def _readers(self, outlook: Outlook, student: Prospect, rounds: int, steps: int) -> Iterator[tuple[Prospect, float, float]]:
        """Who reads answers besides training: how often all of them, and how often it makes their distributions."""
        reference = self._reference_of(outlook, student)
        yield student, *self._read_again(rounds, steps, reference is not None)
        if reference is not None:
            yield reference, rounds, rounds
        teacher = outlook.model(self.teacher) if self.teacher is not None else None
        if teacher is not None:
            yield teacher, rounds, steps

    def _read_again(self, rounds: float, steps: float, reference: bool) -> tuple[float, float]:
        """How often the student reads all answers besides learning from them, and how often it makes their distributions."""
        judged = rounds if self.samples.updates > 1 else 0
        beforehand = steps if self.policy.ratio != "token" or (reference and not judged) else 0
        return judged, judged + beforehand

    def _reference_of(self, outlook: Outlook, student: Prospect) -> Prospect | None:
        if self.reference is not None:
            return outlook.model(self.reference)
        return student if self.policy.beta else None

    def flops(self, tally: Tally, basis: Basis) -> float | None:
        learning, student, drawn = super().flops(tally, basis), basis.student, tally.generated_tokens
        reference = basis.reference if self.reference is not None else student if self.policy.beta else None
        unknown = (self.reference is not None and reference is None) or (self.teacher is not None and basis.teacher is None)
        if learning is None or unknown:
            return None
        once = 1 / self.samples.updates  # of what is learned: a round's answers are read so once for all of its updates
        again, distributions = self._read_again(once, 1, reference is not None)
        judging = reading_flops(student, again * tally.tokens, distributions * tally.sampled_tokens)
        if reference is not None:
            judging += reading_flops(reference, once * tally.tokens, once * tally.sampled_tokens)
        teaching = reading_flops(basis.teacher, once * tally.tokens, tally.sampled_tokens) if basis.teacher is not None else 0.0
        return learning + judging + teaching + reading_flops(student, tally.rows * basis.prompt + drawn, drawn)

    def objective(self, context: Context, tokenizer: Tokenizer, store: TokenStore, student: Student) -> Objective:
        reference, temperature = self._reference_signal(context, tokenizer, student), self.samples.temperature
        if self.teacher is None:
            return PolicyGradient(self.policy, shared_vocabulary(tokenizer, tokenizer), temperature, reference=reference)
        teacher = self.teacher_of(context, tokenizer, store)
        signal = Recalled(teacher.live()) if self.samples.updates > 1 else teacher.live()
        return PolicyGradient(self.policy, teacher.vocab, temperature, signal, reference)

    def rows_aside(self, work: Work) -> dict[int, str]:
        """Rows whose own reference fails the tests that a reward judges answers by: there a right answer would not be paid."""
        judge = self._judge()
        if judge is None:
            return {}
        examples = list(self.data.examples("train"))
        return dict.fromkeys(failing_rows(examples, judge, work.folder, work.name), REFERENCE_FAILS)

    def _judge(self) -> Reward | None:
        """The first reward that runs programs."""
        return next((reward for reward in self.rewards if reward.needs_tests()), None)

    def lessons(
        self, context: Context, renderer: Renderer, store: TokenStore, student: Student, objective: Objective
    ) -> Lessons:
        own, model, settings = _own(objective), student.model, self.optim
        examples = list(self.data.examples("train"))

        def example(row: int) -> Example:
            return renderer.scored(examples[store.number(row)])

        def grade(rows: Sequence[int], found: Sequence[Rollout]) -> Grades:
            known = {row: example(row) for row in dict.fromkeys(rows)}
            return graded(
                self.rewards,
                [
                    Answered(known[row], renderer.said(answer.text), len(answer.ids), answer.finished)
                    for row, answer in zip(rows, found, strict=True)
                ],
            )

        def judge(rows: Sequence[StepRow]) -> tuple[list[StepRow], dict[str, float]]:
            if isinstance(own.signal, Recalled):
                own.signal.forget()
            with undisturbed(model), autocast(settings.precision):
                told = own.judged(model, rows, settings.pass_tokens(model.config.hidden_size))
            return told.rows, told.figures

        self._refuse_probes([example(row) for row in evenly(range(len(store)), self.probe_rows)], renderer.tokenizer)
        engine = Local(
            model,
            renderer.tokenizer,
            renderer.stop_ids,
            precision="bf16" if in_bf16(settings.precision) else "fp32",
            vocab=own.vocab,
        )
        names, watch = names_of(self.rewards), self.watch(context)
        return Groups(store, settings, self.samples, own, engine, grade, names, judge, self.seed, watch, context.work.note)

    def _reference_signal(self, context: Context, tokenizer: Tokenizer, student: Student) -> Signal | None:
        """What KL is measured from; the model is still as it begins.

        Raises:
            UserError: the named one has another tokenizer.
        """
        if self.reference is not None:
            where = context.where(self.reference)
            theirs = load_tokenizer(where)
            shared_vocabulary(theirs, tokenizer, str(self.reference), str(self.model))
            check_rows(config_of(where).vocab_size, theirs, str(self.reference))
            return Live(load_teacher(where, "auto", in_bf16(self.optim.precision)))
        if not self.policy.beta:
            return None
        return Unadapted(student.model) if self.adapter is not None else Live(frozen(copy.deepcopy(student.model)))

    def facts(self, context: Context, tokenizer: Tokenizer, objective: Objective) -> dict[str, Any]:
        own = _own(objective)
        signal = {"signal": facts_of(own.signal)} if own.signal is not None else {}
        judged_by = {"sandbox": programs.sandbox()} if any(reward.needs_tests() for reward in self.rewards) else {}
        lines = context.work.metrics.read()
        return {
            **signal,
            **judged_by,
            **super().facts(context, tokenizer, objective),
            **summary_of(courses(lines, self.rewards)),
            "rollouts": round(sum(line["samples_drawn"] for line in rounds_of(lines))),
        }

    def closing(self, summary: dict[str, Any]) -> str:
        said = in_words(summary)
        return f"{super().closing(summary)}; {said}" if said else super().closing(summary)


def _own(objective: Objective) -> PolicyGradient:
    assert isinstance(objective, PolicyGradient)
    return objective

"""What the stages have in common in which a teacher's distributions are learned, or a student's own answers."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from potstill.core.errors import Problem, UserError
from potstill.data.batches import group_tokens
from potstill.data.store import TokenStore
from potstill.edges import ranks
from potstill.edges.models import check_positions, config_of, positions_of
from potstill.edges.packed import shares
from potstill.edges.vocabulary import Tokenizer, check_known, check_rows, load_tokenizer, own_tokens, shared_vocabulary
from potstill.losses.objective import Objective
from potstill.quant.int8 import int8_problems
from potstill.stages.base import Context, answer_problems, position_problems
from potstill.stages.cost import answer_flops, answer_memory, answer_seconds
from potstill.stages.outlook import Outlook, Prospect, RowsOf
from potstill.stages.refs import ModelRef
from potstill.stages.training import TrainingStage
from potstill.teachers.reading import TeacherReads, foreign_form
from potstill.teachers.teacher import Teacher, TeacherPrecision, longest
from potstill.train.loop import in_bf16


@dataclass(frozen=True)
class Written:
    """What one round of answers takes."""

    flops: float
    seconds: float
    memory_bytes: float


class Paired(TrainingStage):
    """A student that may write answers, and may have a teacher: the two share a tokenizer, and read the rows alike."""

    teacher_precision: TeacherPrecision = Field(
        default="auto",
        description="of its weights; auto: bf16 when training in bf16, else fp32; int8: body in a quarter of fp32",
    )
    teacher_reads: TeacherReads = Field(
        default="own",
        description="own: refuse a teacher whose chat template gives other tokens than the student's; "
        "student: let it read the student's form all the same",
    )

    @abstractmethod
    def taught_by(self) -> ModelRef | None:
        """The teacher, where there is one."""

    def new_tokens(self) -> int | None:
        """Tokens of the longest answer that the student writes while it is trained; None where it writes none."""
        return None

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        ref, teacher = self.taught_by(), None
        if ref is not None:
            try:
                teacher = outlook.model(ref)
            except UserError as error:
                yield Problem("teacher", str(error), repr(str(ref)))
            if teacher is not None:
                yield from self._teacher_problems(outlook, ref, teacher)
        yield from self._answer_problems(outlook, ref, teacher)

    def _teacher_problems(self, outlook: Outlook, ref: ModelRef, teacher: Prospect) -> Iterator[Problem]:
        theirs, ours = teacher.tokenizer(), None
        with suppress(UserError):  # the student's own problem
            ours = outlook.tokenizer(self.reader())
        if theirs is not None and ours is not None:
            yield from self.pair_problems(teacher.size.vocab, theirs, ours)
        yield from position_problems(outlook, self, teacher.config, f"the teacher {ref}")
        yield from self._validation_problems(outlook, teacher.config, f"the teacher {ref}", against_teacher=True)
        if self.teacher_precision == "int8":
            yield from (Problem("teacher_precision", rule, "'int8'") for rule in int8_problems(teacher.config))

    def pair_problems(self, rows: int, theirs: Tokenizer, ours: Tokenizer) -> Iterator[Problem]:
        """What keeps student and teacher from being a pair.

        Args:
            rows: of the teacher's output layer.
        """
        try:
            shared_vocabulary(theirs, ours, str(self.taught_by()), str(self.reader()))
            check_rows(rows, theirs, str(self.taught_by()))
            self._foreign(theirs, ours, self.name)
        except UserError as error:
            yield Problem("teacher", str(error).removeprefix(f"{self.name}: "))

    def _answer_problems(self, outlook: Outlook, ref: ModelRef | None, teacher: Prospect | None) -> Iterator[Problem]:
        """What the student writes: by whom, and whether it fits the positions of all models that read it."""
        new = self.new_tokens()
        if new is None:
            return
        if ranks.several():
            yield Problem("samples", "the student writes its answers in one process alone; leave out --processes")
        student = None
        with suppress(UserError):  # said at its own field
            student = self.prospect(outlook)
        for who, reader in ((self.reader(), student), (ref, teacher)):
            if reader is not None:
                yield from self.room_problems(outlook, f"{who}", reader, new)

    def room_problems(self, outlook: Outlook, who: str, reader: Prospect, new: int) -> Iterator[Problem]:
        """Whether the longest prompt and an answer of so many tokens fit a model's positions."""
        try:
            prompt = outlook.rows(self.data, self.prompts, self.reader(), "train").longest_prompt
        except UserError:  # the rows' own problem
            return
        yield from answer_problems("samples.max_new_tokens", new, prompt, positions_of(reader.config), who)

    def written(self, outlook: Outlook, writers: Sequence[Prospect], rows: RowsOf, asked: int, per_prompt: int) -> Written:
        """What so many answers to each of so many prompts take together, each token of them read by all the writers."""
        longest, mean = self.new_tokens() or 0, round(self.own_answer(rows))
        probes = [outlook.probe(writer.config, rows, self.optim.precision) for writer in writers]
        return Written(
            sum(answer_flops(writer.size, rows, asked, mean, per_prompt) for writer in writers),
            sum(answer_seconds(probe, rows, asked, mean, per_prompt) for probe in probes if probe is not None),
            sum(answer_memory(writer.config, rows, asked * per_prompt, longest) for writer in writers),
        )

    def own_answer(self, rows: RowsOf) -> float:
        """Mean tokens of an answer that the student writes: as of data, and at most those that it may write."""
        return min(self.new_tokens() or 0, rows.response)

    def answers_read(self, model: Prospect, rows: RowsOf, asked: int, per_prompt: int) -> float:
        """Tokens that a pass over so many answers to each of so many prompts reads."""
        answer = self.own_answer(rows)
        if not shares(model.config):
            return asked * per_prompt * (rows.prompt + answer)
        return asked * group_tokens(rows.prompt, answer, per_prompt, self.optim.pass_tokens(model.size.hidden))

    def watch(self, context: Context) -> Callable[[int, int], None]:
        """Shows how many answers are finished, of how many; and the token that is drawn, because many end together at last."""
        return lambda done, total: context.work.progress.update(done, total, "answers", tick="token")

    def teacher_of(self, context: Context, tokenizer: Tokenizer, store: TokenStore, shard: bool = False) -> Teacher:
        """The teacher, not loaded yet.

        Args:
            shard: of several processes each holds a part.

        Raises:
            UserError: it is no teacher for this student and these rows; says why.
        """
        ref = self.taught_by()
        assert ref is not None
        work, where = context.work, context.where(ref)
        theirs = load_tokenizer(where)
        vocab = shared_vocabulary(theirs, tokenizer, str(ref), str(self.reader()))
        check_rows(config_of(where).vocab_size, theirs, str(ref))
        if said := own_tokens(theirs, tokenizer, str(ref), str(self.reader())):
            work.note(f"{work.name:<14} {said}")
        check_known(store.largest_id(), vocab, tokenizer, work.name)
        check_positions(config_of(where), longest(store), f"{work.name}: teacher")
        ranks.on_first(lambda: self._foreign(theirs, tokenizer, work.name))
        bf16 = in_bf16(self.optim.precision)
        return Teacher(where, self.teacher_precision, bf16, vocab, work.note, shard, context.code)

    def _foreign(self, theirs: Tokenizer, ours: Tokenizer, who: str) -> str | None:
        """How the teacher's own form of the rows differs from the student's, which it is made to read; None: not at all.

        Raises:
            UserError: it differs, and nothing says to read it so.
        """
        return foreign_form(ours, theirs, self.prompts, self.data.examples("train"), self.teacher_reads, who)

    def facts(self, context: Context, tokenizer: Tokenizer, objective: Objective) -> dict[str, Any]:
        ref = self.taught_by()
        if ref is None:
            return {}
        theirs = load_tokenizer(context.where(ref))
        return {"teacher_reads": ranks.on_first(lambda: self._foreign(theirs, tokenizer, context.work.name))}


class Taught(Paired):
    """A student that learns a teacher's distributions."""

    student: ModelRef = Field(description="what is trained")
    teacher: ModelRef = Field(description="what it learns from; tune it on the task first")

    def learner(self) -> tuple[str, ModelRef]:
        return "student", self.student

    def taught_by(self) -> ModelRef:
        return self.teacher

"""All models of a study on the same test rows."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from potstill.core.artifact import PRINT, Makes, fingerprint, read_json, write_json
from potstill.core.component import suggest
from potstill.core.errors import Interrupted, Problem, UserError
from potstill.core.types import Split
from potstill.data.prompts import Renderer
from potstill.edges.machine import resting_memory
from potstill.edges.models import (
    Tokenizer,
    check_known,
    check_positions,
    config_of,
    load_model,
    other_tokens,
    positions_of,
    shared_vocabulary,
)
from potstill.metrics import DraftMetric, Metric, ModelMetric, SampledMetric, TokenMetric
from potstill.metrics.decode_speed import DecodeSpeed
from potstill.metrics.exact_match import ExactMatch
from potstill.metrics.kl_to_teacher import KLToTeacher
from potstill.metrics.nll import NLL
from potstill.metrics.rouge_l import RougeL
from potstill.scorers.programs import sandbox
from potstill.stages.base import Context, DataStage
from potstill.stages.cost import answer_memory, answer_seconds, left_over, scoring_memory
from potstill.stages.known import question_hashes
from potstill.stages.lineage import Place, lineage, places
from potstill.stages.measure import Asked, Beside, Decoding, Measured, asking, measure
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf
from potstill.stages.programs import program_problems
from potstill.stages.readers import Rendered, Row, known_in_words, known_rows, readable
from potstill.stages.refs import ModelRef
from potstill.stages.set_aside import set_aside
from potstill.stages.study_record import info, study_of
from potstill.study.power import TYPICAL_SD, smallest_difference
from potstill.study.records import NO_PRIMARY
from potstill.study.words import joined, reasons
from potstill.teachers.reading import TeacherReads, difference, foreign_form
from potstill.train.work import Work


class Evaluate(DataStage, kind="evaluate"):
    """Measure every model of a study on the same rows: text metrics on generated answers, token metrics on the references.

    Each model is asked in the form of its own chat template and stops at its own ends; a row that does not fit one of them is
    left out for all. Where the models' tokenizers differ, nll is per byte of the reference, and kl_to_teacher is taken only of
    models that share the teacher's. Rows trained per seed are measured for each seed. Every generated answer is kept in
    `answers.jsonl`, those drawn for pass_at_k and how each program ended as well.

    The summary's `teacher_reads` and `left_out` name the models of another template than the teacher's, with the first
    difference: those whose form the teacher was made to read, and those of whom kl_to_teacher was not taken.
    """

    # 7: compare, rollouts, outcomes of programs; 6: samples stand alone, tokenizers may differ; 5: origins, training rows
    version: ClassVar[int] = 7
    makes: ClassVar[Makes] = "evaluation"
    gathers: ClassVar[bool] = True

    study: tuple[Row, ...] = Field(min_length=1, description="the models, in the order of the report")
    split: Literal["validation", "test"] = Field(default="test", description="rows that no training stage saw")
    rows: int | None = Field(default=None, ge=1, description="use so many rows, drawn from the split by a hash")
    teacher_reads: TeacherReads = Field(
        default="own",
        description="own: of models of another chat template than the teacher's, kl_to_teacher is left out, or refused where "
        "metrics name it; student: the teacher reads their form",
    )
    metrics: tuple[Metric, ...] = (RougeL(), ExactMatch(), NLL(), KLToTeacher(), DecodeSpeed())
    primary: str = Field(default="rouge_l", description="the metric of the verdict")
    compare: tuple[tuple[str, str], ...] = Field(
        default=(),
        description="pairs [a, b] of names in `study`: a is compared with b, the first pair in the headline; default: what the "
        "roles say",
    )
    decoding: Decoding = Decoding()
    ask: tuple[str, ...] = Field(default=(), description="prompts of your own; the report shows what each model answers")

    @field_validator("study")
    @classmethod
    def _names_differ(cls, study: tuple[Row, ...]) -> tuple[Row, ...]:
        twice = [name for name, n in Counter(row.name for row in study).items() if n > 1]
        if twice:
            raise ValueError(f"two rows are called '{twice[0]}'; names must differ")
        return study

    @model_validator(mode="after")
    def _compared_are_measured(self) -> "Evaluate":
        names = [row.name for row in self.study]
        for number, pair in enumerate(self.compare):
            for name in pair:
                if name not in names:
                    raise ValueError(f"compare[{number}]: no row of `study` is called '{name}'{suggest(name, names)}")
            if pair[0] == pair[1]:
                raise ValueError(f"compare[{number}]: '{pair[0]}' is compared with itself; name two rows")
            if pair in self.compare[:number]:
                raise ValueError(f"compare[{number}]: [{pair[0]}, {pair[1]}] stands there twice")
        return self

    @model_validator(mode="after")
    def _primary_is_measured(self) -> "Evaluate":
        names = [str(metric.kind) for metric in self.metrics if not isinstance(metric, ModelMetric)]
        if self.primary not in names:
            raise ValueError(f"primary = '{self.primary}' is none of the metrics ({', '.join(names)})")
        if any(metric.needs_teacher for metric in self.metrics if metric.kind == self.primary):
            raise ValueError(f"primary = '{self.primary}' compares with the teacher, whose own figure is 0; {NO_PRIMARY}")
        teachers = [row.name for row in self.study if row.role == "teacher"]
        if len(teachers) > 1:
            raise ValueError(f"'{teachers[0]}' and '{teachers[1]}' both have role = 'teacher'; give one of them role = 'other'")
        if self._asks_for_teacher() and self.teacher() is None:
            raise ValueError("the metric kl_to_teacher needs a row with role = 'teacher'")
        return self

    def _asks_for_teacher(self) -> bool:
        """Whether a metric against the teacher is wished for; the default metrics do without where it cannot be."""
        wished = self.metrics if "metrics" in self.model_fields_set else ()
        return any(metric.needs_teacher for metric in self.metrics if metric in wished)

    def teacher(self) -> Row | None:
        """The study model that the others are compared with."""
        return next((row for row in self.study if row.role == "teacher"), None)

    def reader(self) -> ModelRef:
        return self.study[0].model

    def splits(self) -> tuple[Split, ...]:
        return (self.split,)

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        models: list[Prospect | None] = []
        for number, row in enumerate(self.study):
            try:
                models.append(outlook.model(row.model))
            except UserError as error:
                models.append(None)
                yield Problem(f"study[{number}].model", str(error), repr(str(row.model)))
        unread = list(super().problems(outlook))
        yield from unread
        rows_read = not any(problem.place == "data" for problem in unread)  # else each model would be blamed for the rows
        for number, (row, model) in enumerate(zip(self.study, models, strict=True)):
            for rule in self._reading_problems(outlook, row, model, rows_read=rows_read) if model is not None else ():
                yield Problem(f"study[{number}].model", rule, repr(str(row.model)))
        yield from self._known_problems(outlook)
        tokenizers = [model.tokenizer() if model is not None else None for model in models]
        yield from self._pair_problems(tokenizers, rows_read=rows_read)
        yield from program_problems(self.metrics, self.data, self.split, "metrics")

    def _reading_problems(self, outlook: Outlook, row: Row, model: Prospect, *, rows_read: bool) -> Iterator[str]:
        """What keeps a model from reading the rows, from answering them, and from being asked and measured.

        Args:
            rows_read: whether the rows themselves can be read.
        """

        def check_rows() -> None:
            rows = outlook.rows(self.data, self.prompts, row.model, self.split)
            check_positions(model.config, rows.longest, row.name)
            self._check_answers(model.config, rows.longest_prompt, row.name)

        checks = [lambda: self._check_asked(model.tokenizer()), lambda: self._check_model_metrics(model.config, row.name)]
        for check in [check_rows, *checks] if rows_read else checks:
            try:
                check()
            except UserError as error:
                yield str(error)

    def _check_asked(self, tokenizer: Tokenizer | None) -> None:
        """Refuse prompts of the user's own that the model's template or `prompts` do not take."""
        renderer = Renderer(tokenizer, self.prompts) if tokenizer is not None and self.ask else None
        for number, prompt in enumerate(self.ask if renderer is not None else ()):
            found = renderer.prompt(asking(prompt))  # pyright: ignore[reportOptionalMemberAccess]
            if not prompt.strip() or found.ids is None:
                why = "is empty" if not prompt.strip() else found.reason
                raise UserError(f"ask[{number}]: {why}; write another prompt, or raise prompts.max_prompt_tokens")

    def _pair_problems(self, tokenizers: Sequence[Tokenizer | None], *, rows_read: bool) -> Iterator[Problem]:
        """Models whose tokens cannot be compared with the first's, or whose form of the rows the teacher does not read.

        Args:
            tokenizers: of the study's models; None where one is not known.
            rows_read: whether the rows can be read, in the teacher's form too.
        """
        teacher = self.teacher()
        compared = teacher is not None and rows_read and self._asks_for_teacher()
        theirs = tokenizers[self.study.index(teacher)] if compared else None
        if None not in tokenizers and (
            alone := self._no_kin(dict(zip((row.name for row in self.study), tokenizers, strict=True)))
        ):
            yield Problem("metrics", alone)
            return
        for number, (row, tokenizer) in enumerate(zip(self.study, tokenizers, strict=True)):
            place, mine = f"study[{number}].model", tokenizers[0]
            if tokenizer is None or mine is None:
                continue
            apart = other_tokens(mine, tokenizer, self.study[0].name, row.name)
            if apart and self._of_tokens():
                yield Problem(place, self._unlike(apart, row.name), repr(str(row.model)))
                continue
            if theirs is None or self.teacher_reads == "student" or other_tokens(theirs, tokenizer):
                continue
            try:
                rows = self.data.examples(self.split)
                foreign_form(tokenizer, theirs, self.prompts, rows, "own", f"kl_to_teacher of {row.name}")
            except UserError as error:
                yield Problem(place, f"{error}; or leave kl_to_teacher out", repr(str(row.model)))

    def _of_tokens(self) -> list[str]:
        """The metrics whose values depend on how a tokenizer cuts text."""
        return [str(m.kind) for m in self.metrics if isinstance(m, TokenMetric) and not m.per_byte and not m.needs_teacher]

    def _unlike(self, apart: str, name: str) -> str:
        """Why models of different tokenizers cannot be compared by these metrics, and the remedy."""
        return f"{apart}; {joined(self._of_tokens())} of them have no common unit: give `metrics` without, or leave {name} out"

    def _no_kin(self, tokenizers: Mapping[str, Tokenizer]) -> str:
        """Why a metric against the teacher that was asked for by name can be taken of no other model; "" where it can.

        Args:
            tokenizers: of each study model, by its name.
        """
        teacher = self.teacher()
        others = [row.name for row in self.study if row is not teacher]
        if teacher is None or not others or not self._asks_for_teacher():
            return ""
        apart = [other_tokens(tokenizers[teacher.name], tokenizers[name], teacher.name, name) for name in others]
        if not all(apart):
            return ""
        return f"kl_to_teacher compares token by token, and {apart[0]}; give `metrics` without it"

    def _known_problems(self, outlook: Outlook) -> Iterator[Problem]:
        """Rows that a stage of the recipe will train on, where its data or splits are not the study's own."""
        trained: dict[str, str] = {}
        for row in self.study:
            for stage in outlook.behind(row.model):
                if [source.spec() for source in stage.sources()] != [self.data.spec()]:
                    trained.setdefault(stage.name, row.name)
        if not trained:
            return
        try:
            asked = set(question_hashes(self.data.examples(self.split)).tolist())
            for name, row in trained.items():
                learned = (example for example in outlook.stages[name].learned_rows() if example.weight)
                rows = len(asked.intersection(question_hashes(learned).tolist()))
                if rows:
                    yield Problem("data", known_in_words(name, rows, len(asked), self.split, row))
        except UserError:  # rows that cannot be read are the problem of the stage that reads them
            return

    def cost(self, outlook: Outlook) -> Cost:
        rows = outlook.rows(self.data, self.prompts, self.reader(), self.split)
        asked = min(self.rows or rows.kept, rows.kept)
        models = [found for row in self.study if (found := outlook.model(row.model)) is not None]
        held = self.teacher()
        teacher = outlook.model(held.model) if held is not None and any(m.needs_teacher for m in self.metrics) else None
        if not models:
            return Cost(rows=(rows,))
        beside = teacher.size.parameters if teacher is not None else 0
        of_models = [found.size.parameters for found in models]
        largest = max(of_models) + beside
        runs = sum(outlook.seeds_of(row.model) for row in self.study if outlook.model(row.model) is not None)
        return Cost(
            tokens=round(asked * rows.tokens * runs),
            seconds=self._seconds(outlook, rows, asked),
            memory_bytes=round(
                resting_memory()
                + 4 * largest
                + (2 * max(of_models) if self.decoding.precision == "bf16" else 0)
                + 4 * max(of_models)  # the file of the one that is loaded, which counts while it is mapped
                + left_over(models[0].size)
                + max(
                    *(scoring_memory(found, rows, asked, teacher=teacher is not None) for found in models),
                    *(answer_memory(found.config, rows, asked, self._decoded(rows)) for found in models),
                )
            ),
            rows=(rows,),
        )

    def _seconds(self, outlook: Outlook, rows: RowsOf, asked: int) -> float | None:
        """Of all models at each of their seeds: answers, scores of references, the teacher beside them, and model metrics."""
        decoded = self._decoded(rows)
        alone = sum(metric.tokens() for metric in self.metrics if isinstance(metric, ModelMetric))
        scored = any(isinstance(metric, TokenMetric) for metric in self.metrics)
        held = self.teacher()
        teacher = outlook.model(held.model) if held is not None and any(m.needs_teacher for m in self.metrics) else None
        beside = outlook.probe(teacher.config, rows) if teacher is not None else None
        total = 0.0
        for row in self.study:
            found = outlook.model(row.model)
            if found is None:
                continue
            probe = outlook.probe(found.config, rows)
            if probe is None:
                return None
            said = outlook.probe(found.config, rows, self.decoding.precision)
            seconds = answer_seconds(said or probe, rows, asked, decoded) + probe.alone_seconds(alone)
            drawn = sum(metric.samples for metric in self.metrics if isinstance(metric, SampledMetric))
            seconds += answer_seconds(said or probe, rows, drawn * asked, decoded) if drawn else 0.0
            seconds += probe.scored_seconds(asked * rows.tokens, asked * rows.response) if scored else 0.0
            seconds += beside.scored_seconds(asked * rows.tokens, asked * rows.response) if beside is not None else 0.0
            drafted = sum(metric.tokens() for metric in self.metrics if isinstance(metric, DraftMetric))
            seconds += beside.alone_seconds(drafted) if beside is not None and row is not held else 0.0
            total += outlook.seeds_of(row.model) * seconds
        return total

    def _decoded(self, rows: RowsOf) -> int:
        """Tokens of the longest answer of a batch, as long as that of some row."""
        return min(self.decoding.max_new_tokens, max((response for _, response in rows.lengths), default=1))

    def could_show(self, outlook: Outlook) -> str:
        compared = [row for row in self.study if row.role in ("kd", "rl", "sft")] or list(self.study)
        metric = next(metric for metric in self.metrics if metric.kind == self.primary)
        if len(self.study) < 2:
            return ""
        try:
            rows = outlook.rows(self.data, self.prompts, self.reader(), self.split)
        except UserError:  # it is among the problems
            return ""
        asked = min(self.rows or rows.kept, rows.kept)
        if not asked:
            return ""
        if metric.unit not in TYPICAL_SD:
            return f"{self.name}: how much rows differ by {metric.title} is not known, so not what could be shown."
        reach = smallest_difference(
            rows=asked,
            clusters=_clusters_drawn(asked, rows.kept, rows.keys),
            seeds=max(outlook.seeds_of(row.model) for row in compared),
            sd_rows=TYPICAL_SD[metric.unit],
        )
        return f"{self.name}: {reach.sentence(info(metric))}"

    def closing(self, summary: dict[str, Any]) -> str:
        left = sum(summary["dropped"].values())
        return f"{summary['test_rows']:,} {self.split} rows" + (
            f", {left:,} left out: {reasons(summary['dropped'])}" if left else ""
        )

    def run(self, context: Context) -> dict[str, Any]:
        work = context.work
        teacher_row = self.teacher()
        metrics = [m for m in self.metrics if teacher_row is not None or not m.needs_teacher]
        jobs = [(row, place) for row in self.study for place in places(context, row.model)]
        teachers = (
            places(context, teacher_row.model) if teacher_row is not None and any(m.needs_teacher for m in metrics) else []
        )
        against = [teacher_of(place, teachers) for _, place in jobs]
        named = [(row.name, place) for row, place in jobs]
        who = self.name or "evaluate"
        found = readable([(name, place.where) for name, place in named], self.data, self.prompts, self.split, self.rows, who)
        found = set_aside(found, metrics, work.folder, who)
        examples, read = found.examples, found.read
        spoken = self._spoken(jobs, read, against)
        against = [teacher if number not in spoken.strangers else "" for number, teacher in enumerate(against)]
        self._check_room(jobs, read, against)
        foreign = self._foreign(jobs, read, against)
        untaken = {jobs[number][0].name: words for number, words in spoken.strangers.items()}
        untaken |= foreign if self.teacher_reads == "own" else {}
        known = known_rows(named, examples, self.split, work)
        files = [work.folder / f"partial-{number:03}.json" for number in range(len(jobs))]
        teacher, loaded = Beside(), ""
        asked = Asked(examples, self.ask, self.decoding)
        # all models of one teacher together: each teacher is loaded once, and one at a time
        for done, number in enumerate(sorted(range(len(jobs)), key=lambda number: against[number])):
            row, place = jobs[number]
            if not files[number].is_file():
                work.progress.update(done, len(jobs), "model", now=row.name)
                if against[number] != loaded:
                    teacher = Beside()  # let go of before the next one comes
                    teacher, loaded = Beside(load_model(against[number])), against[number]
                kept = [m for m in metrics if not (m.needs_teacher and row.name in untaken)]
                kept = [m for m in kept if not (isinstance(m, DraftMetric) and row is teacher_row)]
                watch = partial(work.progress.update, what="answers", model=row.name)
                got = measure(place, kept, asked, read[place.where], teacher, spoken.tokens[number], watch)
                write_json(files[number], asdict(got))
            work.progress.update(done + 1, len(jobs), "model", now=row.name)
            if work.stop_requested():
                raise Interrupted(
                    f"{work.name}: stopped after model {done + 1} of {len(jobs)}; run the same command again to go on"
                )
        results = [Measured(**read_json(file)) for file in files]
        study = study_of(
            self, jobs, results, metrics, found, foreign | untaken, self._near_duplicates(jobs, work), known, apart=spoken.apart
        )
        study.save(work.folder)
        with (work.folder / "answers.jsonl").open("w", encoding="utf-8") as answers:
            for i, example in enumerate(examples):
                answers.write(json.dumps({"key": fingerprint(example.key)[:16], **_given(i, jobs, results)}) + "\n")
        made = lineage([(row.name, row.role, place) for row, place in jobs], context)
        write_json(work.folder / "lineage.json", {**made, "asked": self._asked(jobs, results)})
        for file in work.folder.glob("partial-*.json"):
            file.unlink()
        return {
            "test_rows": len(examples),
            "dropped": found.left_out,
            "test_response_tokens": sum(study.tokens),
            "teacher_reads": foreign if self.teacher_reads == "student" else {},
            "left_out": {"kl_to_teacher": untaken} if untaken else {},
            "language_in_use": self.data.language_note(),
            **({"sandbox": sandbox()} if any(metric.runs_programs for metric in metrics) else {}),
        }

    def _asked(self, jobs: list[tuple[Row, Place]], results: list[Measured]) -> list[dict[str, Any]]:
        """Each of the user's own prompts with the answer of each model's first seed."""
        first: dict[str, list[str]] = {}
        for (row, _), result in zip(jobs, results, strict=True):
            first.setdefault(row.name, result.asked)
        return [
            {"prompt": prompt, "answers": {name: answers[i] for name, answers in first.items()}}
            for i, prompt in enumerate(self.ask)
        ]

    def _spoken(self, jobs: list[tuple[Row, Place]], read: dict[str, Rendered], against: list[str]) -> "_Spoken":
        """Which token ids each model is scored over, and whose tokens are not the teacher's.

        Raises:
            UserError: tokenizers differ, and a metric cannot be without equal tokens.
        """
        shared_of = cache(shared_vocabulary)  # models of one form share one tokenizer here: each pair is compared once
        tokenizers = [read[place.where].renderer.tokenizer for _, place in jobs]
        strangers: dict[int, str] = {}
        tokens: list[int] = []
        for number, (tokenizer, teacher) in enumerate(zip(tokenizers, against, strict=True)):
            theirs = read[teacher].renderer.tokenizer if teacher else tokenizer
            words = other_tokens(theirs, tokenizer)
            strangers |= {number: "its tokenizer is another one"} if words else {}
            tokens.append(shared_of(tokenizer if words else theirs, tokenizer))
        if alone := self._no_kin({row.name: tokenizer for (row, _), tokenizer in zip(jobs, tokenizers, strict=True)}):
            raise UserError(f"{self.name or 'evaluate'}: {alone}")
        apart = False
        for tokenizer, (row, _) in zip(tokenizers, jobs, strict=True):
            words = other_tokens(tokenizers[0], tokenizer, jobs[0][0].name, row.name)
            if words and self._of_tokens():
                raise UserError(f"{self.name or 'evaluate'}: {self._unlike(words, row.name)}")
            apart = apart or bool(words)
        if not apart:  # scores of one study are of the same tokens
            tokens = [min(shared_of(tokenizers[0], tokenizer) for tokenizer in tokenizers)] * len(jobs)
        for (row, place), shared in zip(jobs, tokens, strict=True):
            own = read[place.where]
            if any(isinstance(metric, TokenMetric) for metric in self.metrics):
                largest = max(max(*prompt, *response) for prompt, response in own.pairs)
                check_known(largest, shared, own.renderer.tokenizer, f"{self.name or 'evaluate'}: {row.name}")
        return _Spoken(tokens, strangers, apart)

    def _check_room(self, jobs: list[tuple[Row, Place]], read: dict[str, Rendered], against: list[str]) -> None:
        """Refuse before the first model is loaded what would run past the positions of one of them."""
        for (row, place), teacher in zip(jobs, against, strict=True):
            own = read[place.where]
            longest = max(len(prompt) + len(response) for prompt, response in own.pairs)
            check_positions(config_of(place.where), longest, row.name)
            self._check_answers(config_of(place.where), max(len(prompt) for prompt, _ in own.pairs), row.name)
            self._check_model_metrics(config_of(place.where), row.name)
            if teacher:
                check_positions(config_of(teacher), longest, f"the teacher, on the rows of {row.name}")

    def _check_model_metrics(self, config: Any, who: str) -> None:
        for metric in self.metrics:
            for rule in metric.problems(config) if isinstance(metric, ModelMetric) else ():
                raise UserError(f"{who}: {rule}")

    def _check_answers(self, config: Any, prompt: int, who: str) -> None:
        """Refuse answers that would run past a model's positions."""
        limit = positions_of(config)
        if limit is not None and prompt + self.decoding.max_new_tokens > limit:
            raise UserError(
                f"{who}: a prompt of {prompt} tokens and an answer of up to decoding.max_new_tokens = "
                f"{self.decoding.max_new_tokens} are more than the model's {limit} positions; lower "
                "decoding.max_new_tokens or prompts.max_prompt_tokens"
            )

    def _foreign(self, jobs: list[tuple[Row, Place]], read: dict[str, Rendered], against: list[str]) -> dict[str, str]:
        """Models that read the rows otherwise than their teacher does, by name, each with the first difference.

        Raises:
            UserError: there are some, a metric against the teacher is asked for by name, and nothing says to take it so.
        """
        found: dict[str, str] = {}
        for (row, place), teacher in zip(jobs, against, strict=True):
            if not teacher or read[place.where] is read[teacher]:
                continue
            ours, theirs = read[place.where], read[teacher]
            pairs = zip(ours.pairs, theirs.pairs, strict=True)
            words = (difference(mine, other, ours.renderer, theirs.renderer) for mine, other in pairs)
            first = next((found for found in words if found is not None), None)
            if first is not None:
                found.setdefault(row.name, first)
        if found and self._asks_for_teacher() and self.teacher_reads == "own":
            name, first = min(found.items())
            raise UserError(
                f"{self.name or 'evaluate'}: kl_to_teacher compares token by token, and {name} and its teacher read the rows "
                f"in different forms: {first}; leave the metric out, or set teacher_reads = 'student' to let the teacher read "
                "the other's form"
            )
        return found

    def _near_duplicates(self, jobs: list[tuple[Row, Place]], work: Work) -> str:
        """What is to be said of test rows that training rows of these data nearly repeat; empty where no model read them."""
        own = fingerprint(self.data.spec())[:PRINT]
        if not any(place.trained is not None and place.trained.data == own for _, place in jobs):
            return ""
        work.progress.update(0, 1, "near-duplicates")
        found = self.data.near_duplicates()
        work.progress.update(1, 1, "near-duplicates")
        return found.sentence() if found.count.get(self.split) and not found.dropped else ""


@dataclass(frozen=True)
class _Spoken:
    """How the tokens of the study's models compare.

    Attributes:
        tokens: of each model and seed, leading token ids that its scores are over.
        strangers: number of model and seed -> how its tokens differ from its teacher's.
        apart: whether the models have different tokenizers.
    """

    tokens: list[int]
    strangers: dict[int, str]
    apart: bool


def _given(i: int, jobs: Sequence[tuple[Row, Place]], results: Sequence[Measured]) -> dict[str, Any]:
    """What each model gave to one test row, by seed; with programs how they ended, and samples with theirs, by metric."""
    found: dict[str, Any] = {"answers": {}, "outcomes": {}, "samples": {}}
    for (row, _), result in zip(jobs, results, strict=True):
        found["answers"].setdefault(row.name, []).append(result.answers[i])
        for key, by_metric in (("outcomes", result.outcomes), ("samples", result.samples)):
            for metric, each in by_metric.items():
                found[key].setdefault(row.name, {}).setdefault(metric, []).append(each[i])
    return {key: value for key, value in found.items() if value}


def _clusters_drawn(asked: int, rows: int, keys: int) -> int:
    """Different keys to be expected among rows drawn from all, whose keys have equally many: K · (1 − (1 − f)^(rows/K))."""
    if not keys:
        return asked
    return max(1, round(keys * (1 - (1 - asked / rows) ** (rows / keys))))


def teacher_of(place: Place, teachers: Sequence[Place]) -> str:
    """Place of the teacher that a model is compared with: that of its own seed, else the first; "" where there is none."""
    same = (teacher for teacher in teachers if place.seed is not None and teacher.seed == place.seed)
    first = teachers[0].where if teachers else ""
    return next((teacher.where for teacher in same), first)

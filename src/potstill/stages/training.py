"""What the training stages have in common: rows to tokens, validation by epoch, saving, the record of what was trained."""

import heapq
import math
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator

from potstill.core.artifact import PRINT, fingerprint
from potstill.core.component import Settings
from potstill.core.errors import Problem, UserError
from potstill.core.numbers import count
from potstill.core.types import Example, Split
from potstill.data.prompts import Renderer
from potstill.data.store import (
    Counts,
    NumberedPair,
    Pair,
    TokenStore,
    WeightedPair,
    instruction_pairs,
    mask_preview,
    to_raise,
    too_many_left_out,
    weighted_pairs,
)
from potstill.edges import ranks
from potstill.edges.models import Model, check_positions, config_of, positions_of, save_model
from potstill.edges.sampling import generate
from potstill.edges.vocabulary import Tokenizer, check_vocabulary, load_tokenizer
from potstill.inits import Init, Read
from potstill.losses.objective import Objective
from potstill.losses.scoring import mean_nll, token_sums
from potstill.metrics import AnswerMetric, Metric, SampledMetric, TextMetric, TokenMetric
from potstill.metrics.nll import NLL
from potstill.metrics.rouge_l import RougeL
from potstill.sources import Source
from potstill.stages.base import Context, DataStage, answer_problems, position_problems
from potstill.stages.cost import answer_seconds, training_cost, training_flops
from potstill.stages.known import Noted
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf, made_from
from potstill.stages.programs import program_problems
from potstill.stages.refs import ModelRef
from potstill.stages.scores import Scored, add_sampled, answer_scores, text_scores
from potstill.stages.spent import Basis, Tally
from potstill.stages.start import Adapter, Student, load_student, start_problems, started
from potstill.study.records import Trained
from potstill.teachers.teacher import longest
from potstill.train.lessons import Lessons
from potstill.train.loop import Optim, Totals, autocast, fit, in_bf16
from potstill.train.team import full_model
from potstill.train.work import Work

FIGURE = "validation_"  # before a metric's kind: the name of its figure in metrics.jsonl


def of_rows(metric: type[Metric] | Metric) -> bool:
    """Whether a metric can be measured while training: of rows, not of the model as a whole."""
    cls = metric if isinstance(metric, type) else type(metric)
    return issubclass(cls, TextMetric | SampledMetric | TokenMetric | AnswerMetric)


def known_figures() -> list[str]:
    """Every name that a validation can give a figure."""
    return sorted(f"{FIGURE}{kind}" for kind, metric in Metric.kinds.items() if of_rows(cast(type[Metric], metric)))


class Validation(Settings):
    """What is measured while training, on validation rows only: for curves, and for picking among the values of a sweep."""

    times: int = Field(default=5, ge=0, description="evenly spaced, the last at the end, and once at the start; 0: none")
    rows: int = Field(default=64, ge=1, description="validation rows used")
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer generated for text metrics, in tokens")
    metrics: tuple[Metric, ...] = Field(
        default=(RougeL(), NLL()),
        min_length=1,
        description="of answers and tokens; against a teacher where one runs beside the student",
    )

    @field_validator("metrics")
    @classmethod
    def _of_rows(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        for metric in metrics:
            if not of_rows(metric):
                raise ValueError(f"'{metric.kind}' cannot be measured while training; name text metrics, or nll")
        return metrics

    def figures(self) -> dict[str, Metric]:
        """What is written to metrics.jsonl, by name."""
        return {f"{FIGURE}{metric.kind}": metric for metric in self.metrics}

    def asks(self, against_teacher: bool) -> bool:
        """Whether answers are written, and, where so asked, read by a teacher."""
        answers = [metric for metric in self.metrics if not isinstance(metric, TokenMetric)]
        return bool(self.times) and any(metric.needs_teacher or not against_teacher for metric in answers)

    def against_teacher(self) -> list[str]:
        """Kinds of the metrics that compare with a teacher."""
        return [str(metric.kind) for metric in self.metrics if metric.needs_teacher]


@dataclass(frozen=True)
class Validator:
    """Measures a model on a fixed draw of validation rows.

    Attributes:
        teacher: what metrics against a teacher compare with, and the leading token ids that both share.
    """

    settings: Validation
    renderer: Renderer
    work: Work
    examples: Sequence[Example]
    pairs: Sequence[Pair]
    teacher: tuple[Any, int] | None = None

    @classmethod
    def on(
        cls,
        source: Source,
        settings: Validation,
        renderer: Renderer,
        work: Work,
        teacher: tuple[Any, int] | None = None,
    ) -> "Validator | None":
        """None where nothing is to be validated, or no validation row fits."""
        if not settings.times:
            return None
        examples, pairs = [], []
        for example in ranks.on_first(lambda: sample_rows(source, "validation", settings.rows)):
            for pair in instruction_pairs([example], renderer, Counts()):
                examples.append(renderer.scored(example))
                pairs.append(pair)
        return cls(settings, renderer, work, examples, pairs, teacher) if pairs else None

    def __call__(self, model: Model) -> dict[str, float]:
        return {**self._of_answers(model), **self._of_samples(model), **self._of_references(model)}

    def _of_answers(self, model: Model) -> dict[str, float]:
        wanted = [m for m in self.settings.metrics if isinstance(m, TextMetric | AnswerMetric)]
        if not wanted:
            return {}
        answers = generate(
            model,
            self.renderer.tokenizer,
            [prompt for prompt, _ in self.pairs],
            stop_ids=self.renderer.stop_ids,
            max_new_tokens=self.settings.max_new_tokens,
            on_rows=self._watch,
        )
        said = [self.renderer.said(answer) for answer in answers.texts]
        scores = text_scores(wanted, said, self.examples).scores
        teacher, vocab = self.teacher or (None, model.get_output_embeddings().weight.shape[0])
        wrote = [(prompt, ids) for (prompt, _), ids in zip(self.pairs, answers.ids, strict=True)]
        scores |= answer_scores(model, teacher, wrote, vocab, wanted)[0]
        return _means(scores)

    def _of_samples(self, model: Model) -> dict[str, float]:
        scored, prompts, most = Scored(), [prompt for prompt, _ in self.pairs], self.settings.max_new_tokens
        add_sampled(scored, self.settings.metrics, model, self.renderer, prompts, self.examples, most, self._watch)
        return _means(scored.scores)

    def _watch(self, done: int, total: int) -> None:
        self.work.progress.update(done, total, "validation answers", tick="token")

    def _of_references(self, model: Model) -> dict[str, float]:
        wanted = [m for m in self.settings.metrics if isinstance(m, TokenMetric)]
        rows, found = model.get_output_embeddings().weight.shape[0], {}
        for needs in (False, True):  # what needs no teacher is over the whole vocabulary
            measures = {f"{FIGURE}{m.kind}": m for m in wanted if m.needs_teacher == needs}
            teacher, vocab = self.teacher if needs and self.teacher is not None else (None, rows)
            found |= token_sums(model, teacher, self.pairs, vocab, measures) if measures else {}
        tokens = sum(len(response) for _, response in self.pairs)
        return {name: math.fsum(values) / tokens for name, values in found.items()}


def _means(scores: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Of each metric over the rows that have a score."""
    given = {name: [score for score in values if score is not None] for name, values in scores.items()}
    return {f"{FIGURE}{name}": sum(values) / len(values) for name, values in given.items() if values}


class TrainingStage(DataStage):
    """A stage that starts from a model and trains it on rows; what is minimised is its own."""

    shared: ClassVar[bool] = True
    validated: ClassVar[bool] = True

    init: Init | None = Field(default=None, description="how the model is cut first; default: not at all")
    adapter: Adapter | None = Field(default=None, description="train low-rank adapters only; default: every weight")
    optim: Optim = Optim()
    validation: Validation = Validation()
    save_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="of the weights that are saved; auto: float32, as training keeps and validation measures them. Rounding to "
        "16 bits undoes changes smaller than half a last place, which are most of what small learning rates make",
    )

    @abstractmethod
    def learner(self) -> tuple[str, ModelRef]:
        """The field that names the model that is trained, and what it names."""

    @abstractmethod
    def objective(self, context: Context, tokenizer: Tokenizer, store: TokenStore, student: Student) -> Objective:
        """What is minimised over these rows; the student knows how it was cut."""

    def lessons(
        self, context: Context, renderer: Renderer, store: TokenStore, student: Student, objective: Objective
    ) -> Lessons | None:
        """What each step reads; None: the store's rows."""
        return None

    def begun(self, context: Context, student: Student) -> Student:
        """The student as it trains, made of the one that was loaded."""
        return student

    def write(self, context: Context, model: Model, merged: Any, tokenizer: Tokenizer, stop_ids: list[int]) -> None:
        """Save the trained model into the work folder.

        Args:
            merged: what the student's `merge` gave.
        """
        save_model(model, tokenizer, context.work.folder, stop_ids, dtype=self.saved_in())

    def rows_aside(self, work: Work) -> dict[int, str]:
        """Numbers of training rows that fit and must not be learned from, and why."""
        return {}

    def dropout(self) -> bool:
        """Whether the model is in training mode while it learns."""
        return True

    def pace(self, rows: int) -> tuple[int, int] | None:
        """Optimiser steps over so many rows of data, and rows that these learn from; None: as `optim` alone has it."""
        return None

    def read(self, model: Prospect, rows: RowsOf) -> float | None:
        """Tokens that all steps read, where the model writes some of the rows; None: each row is read whole."""
        return None

    def learned(self, rows: RowsOf) -> float | None:
        """Response tokens that all steps learn, where the model writes some of the rows; None: those of the rows."""
        return None

    def teacher_stays(self) -> bool:
        """Whether a teacher runs beside the student all along."""
        return False

    def beside(self, objective: Objective) -> tuple[Any, int] | None:
        """That teacher, and the leading token ids that both share."""
        return None

    @model_validator(mode="after")
    def _validated_by_what_is_there(self) -> "TrainingStage":
        if not self.teacher_stays() and (names := self.validation.against_teacher()):
            raise ValueError(
                f"validation.metrics: '{names[0]}' needs a teacher that runs beside the student all along "
                "(distill with samples, or signal = 'live'); leave it out"
            )
        return self

    def taught_by(self) -> ModelRef | None:
        """What the model learns from besides rows."""
        return None

    def facts(self, context: Context, tokenizer: Tokenizer, objective: Objective) -> dict[str, Any]:
        """What the summary says besides, once training has ended."""
        return {}

    def reader(self) -> ModelRef:
        return self.learner()[1]

    def splits(self) -> tuple[Split, ...]:
        return ("train", "validation") if self.validation.times else ("train",)

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        yield from super().problems(outlook)
        place, ref = self.learner()
        yield from start_problems(outlook, place, ref, self.init, self.adapter)
        if self.validation.times:
            yield from program_problems(self.validation.metrics, self.data, "validation", "validation.metrics")
        with suppress(UserError):  # said by `start_problems`
            found = self.prospect(outlook)
            if found is not None:
                yield from position_problems(outlook, self, found.config, str(ref))
                yield from self._validation_problems(outlook, found.config, str(ref), against_teacher=False)

    def _validation_problems(self, outlook: Outlook, config: Any, who: str, against_teacher: bool) -> Iterator[Problem]:
        """Answers to validation rows that would run past a model's positions."""
        limit, new = positions_of(config), self.validation.max_new_tokens
        if limit is None or not self.validation.asks(against_teacher):
            return
        try:
            prompt = outlook.rows(self.data, self.prompts, self.reader(), "validation").longest_prompt
            if prompt + new > limit:  # of all rows, of which some are drawn
                prompt = self._longest_asked(outlook.tokenizer(self.reader())) or prompt
        except UserError:  # the rows' own problem
            return
        yield from answer_problems("validation.max_new_tokens", new, prompt, limit, who)

    def _longest_asked(self, tokenizer: Tokenizer | None) -> int:
        """Tokens of the longest prompt that is asked while training; 0: not known, or none is."""
        if tokenizer is None:
            return 0
        drawn = sample_rows(self.data, "validation", self.validation.rows)
        pairs = instruction_pairs(drawn, Renderer(tokenizer, self.prompts), Counts())
        return max((len(prompt) for prompt, _ in pairs), default=0)

    def prospect(self, outlook: Outlook) -> Prospect | None:
        return made_from(started(outlook.model(self.learner()[1]), self.init), bits=0)

    def cost(self, outlook: Outlook) -> Cost:
        found = self.prospect(outlook)
        if found is None:
            return Cost()
        rows = outlook.rows(self.data, self.prompts, self.reader(), "train")
        cost = training_cost(
            outlook,
            found,
            self.optim,
            rows,
            self.prompts.max_tokens,
            frozen=self.adapter is not None,
            adaptable=self.could_adapt(),
            pace=self.pace(rows.kept),
            read=self.read(found, rows),
            learned=self.learned(rows),
        )
        full = outlook.model(self.learner()[1])
        choosing = choosing_seconds(outlook, self.init, full, rows, self.optim.precision) if full is not None else 0.0
        if cost.seconds is None or choosing is None:
            return cost
        return replace(cost, seconds=cost.seconds + choosing + self._validating(outlook, found))

    def _validating(self, outlook: Outlook, model: Prospect) -> float:
        """Seconds of all validations, the one before the first step among them."""
        settings = self.validation
        if not settings.times:
            return 0.0
        rows = outlook.rows(self.data, self.prompts, self.reader(), "validation")
        probe, asked = outlook.probe(model.config, rows, self.optim.precision), min(settings.rows, rows.kept)
        if probe is None:
            return 0.0
        seconds = 0.0
        if any(isinstance(metric, TextMetric | AnswerMetric) for metric in settings.metrics):
            seconds += answer_seconds(probe, rows, asked, settings.max_new_tokens)
        for metric in settings.metrics:
            if isinstance(metric, SampledMetric):
                seconds += answer_seconds(probe, rows, asked, settings.max_new_tokens, metric.samples)
        if any(isinstance(metric, TokenMetric) for metric in settings.metrics):
            seconds += probe.scored_seconds(asked * rows.tokens, asked * rows.response)
        return (settings.times + 1) * seconds

    def flops(self, tally: Tally, basis: Basis) -> float | None:
        """Floating-point operations of all models up to some step, as the plan reckons them; None: a model is not known."""
        return training_flops(basis.student, self.optim, tally.tokens, tally.response_tokens)

    def could_adapt(self) -> bool:
        """Whether adapters are not trained, and could be."""
        return self.adapter is None

    def closing(self, summary: dict[str, Any]) -> str:
        return trained_in_words(summary)

    def learned_rows(self) -> Iterator[Example]:
        return self.data.examples("train")

    def saved_in(self) -> Any:
        """The torch dtype of the saved weights."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.save_dtype, torch.float32)

    def run(self, context: Context) -> dict[str, Any]:
        _, start = self.learner()
        work, where = context.work, context.where(start)
        tokenizer = load_tokenizer(where)
        renderer = Renderer(tokenizer, self.prompts)
        student = load_student(
            work.name,
            where,
            self.init,
            self.adapter,
            self.seed,
            calibration(work, self.data, renderer, self.init, config_of(where), self.optim.precision),
        )
        student = self.begun(context, student)
        student = replace(student, layers=layers_of(context, start, student.keep, config_of(where)))
        model = student.model
        check_vocabulary(model, tokenizer, work.name)
        store = training_rows(work, self.data, renderer, self.rows_aside(work))
        check_positions(model.config, longest(store), work.name)
        objective = self.objective(context, tokenizer, store, student)
        validate = Validator.on(self.data, self.validation, renderer, work, self.beside(objective))
        totals = fit(
            model,
            store,
            objective,
            self.optim,
            work,
            seed=self.seed,
            validate=validate,
            validations=self.validation.times,
            lessons=self.lessons(context, renderer, store, student, objective),
            dropout=self.dropout(),
        )
        trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        merged = student.merge()
        with full_model(model) as plain:
            if plain is not None:
                self.write(context, plain, merged, tokenizer, renderer.stop_ids)
        taught_by = self.taught_by()
        teacher = str(taught_by) if taught_by is not None else self.data.teacher()
        cut = in_words(self.init) if self.init is not None else already_cut(context, start)
        record = trained_record(self, store, totals, str(start), teacher, cut)
        summary = {
            **asdict(totals),
            "trained_parameters": trained_parameters,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": rows_in_words(store, renderer),
            "trained": record.model_dump(mode="json"),
            **({"cut": student.cut} if student.cut else {}),
            "layers": student.layers,
            **self.facts(context, tokenizer, objective),
        }
        tidy(context)
        return summary


def trained_record(
    stage: Any, store: TokenStore, totals: Totals, start: str, teacher: str | None = None, init: str = "none"
) -> Trained:
    """How a stage trained its model, for whoever compares it with another one.

    Args:
        stage: has the fields `seed`, `optim`, `data` and `prompts`, and perhaps `adapter`.
        init: how the model that training began from was cut, in words.
        totals: what `fit` returned.
    """
    precision = "bf16" if in_bf16(stage.optim.precision) else "fp32"
    settings = stage.optim.model_dump(mode="json") | {"precision": precision}
    return Trained(
        by=str(stage.kind),
        seed=stage.seed,
        start=start,
        init=init,
        adapter=in_words(getattr(stage, "adapter", None)),
        teacher=teacher,
        data=fingerprint(stage.data.origin())[:PRINT],
        prompts=fingerprint(stage.prompts.model_dump(mode="json"))[:PRINT],
        rows=store.counts.rows,
        order=fingerprint([store.digest(), stage.seed, stage.optim.batch_size, totals.rows])[:PRINT],
        steps=totals.steps,
        rows_seen=totals.rows,
        response_tokens=totals.response_tokens,
        tokens=totals.tokens,
        generated_tokens=totals.generated_tokens,
        epochs=totals.epochs,
        lr=settings.pop("lr"),
        optim=settings,
        left_out=dict(store.counts.dropped),
        shortened=store.counts.context_shortened,
    )


def summary_of(context: Context, ref: ModelRef) -> dict[str, Any]:
    """What the stage that made a model says of it; {} of a model that no stage made."""
    made = context.made(ref)
    return made[0].summary if made else {}


def layers_of(context: Context, ref: ModelRef, keep: Sequence[int], config: Any) -> dict[str, Any]:
    """Which layers a model has of the one that it was first cut from, and how many that one has.

    Args:
        ref, config: of the model that a stage cut, or left as it was.
        keep: the layers of it that stay.
    """
    count = config.num_hidden_layers
    before = summary_of(context, ref).get("layers")
    if not isinstance(before, dict):  # nothing was cut, or it is a list of how each layer was rounded
        before = {"keep": list(range(count)), "of": count}
    return {"keep": [before["keep"][layer] for layer in keep], "of": before["of"]}


def already_cut(context: Context, ref: ModelRef) -> str:
    """How an earlier stage cut the model that training begins with, in words; "none" where none did."""
    summary = summary_of(context, ref)
    return str(summary.get("init") or summary.get("trained", {}).get("init", "none"))


def calibration(work: Work, source: Source, renderer: Renderer, init: Init | None, config: Any, precision: str) -> Read:
    """Lets a model read training rows, always the same ones, and gives its NLL in nats per token of their responses.

    Args:
        init, config: how which model is cut, for the progress line.
        precision: of the products.

    Raises:
        UserError: no training row fits.
    """
    pairs: dict[int, list[Pair]] = {}
    reads, total = 0, init.calibration(config).reads + 1 if init is not None else None

    def nll(model: Model, rows: int) -> float:
        nonlocal reads
        if rows not in pairs:
            pairs[rows] = list(instruction_pairs(sample_rows(source, "train", rows), renderer, Counts()))
        if not pairs[rows]:
            raise UserError("no training row fits prompts.max_tokens to calibrate the cut on")
        reads += 1
        work.progress.update(reads, total, "calibration read")
        with autocast(precision):
            return mean_nll(model, pairs[rows])

    return nll


def choosing_seconds(outlook: Outlook, init: Init | None, full: Prospect, rows: RowsOf, precision: str) -> float | None:
    """Seconds until calibration rows have chosen what stays of a model; None where it cannot be known."""
    if init is None or not init.calibration(full.config).rows:
        return 0.0
    takes = init.calibration(full.config)
    probe, asked = outlook.probe(full.config, rows, precision), min(takes.rows, rows.kept)
    return None if probe is None else (takes.passes + 1) * probe.scored_seconds(asked * rows.tokens, asked * rows.response)


def training_rows(work: Work, source: Source, renderer: Renderer, aside: Mapping[int, str]) -> TokenStore:
    """The training split as tokens.

    Args:
        aside: numbers of rows that must not enter, and why.

    Raises:
        UserError: no row is left; says why.
    """
    counts = Counts()
    rows = work.watched(source.examples("train", counts.dropped), "rows read")
    noted = Noted()
    pairs = weighted_pairs(noted(rows), renderer, counts, aside)
    store = tokenised(work.folder / "tokens", pairs, counts, f"{work.name}: training rows of {source.kind}")
    if ranks.first():
        noted.save(work.folder)
    counts = store.counts
    if lost := too_many_left_out(counts.rows, counts.dropped, counts.longest, renderer.prompts.most_left_out):
        raise UserError(f"{work.name}: {lost}")
    return store


def tokenised(folder: Path, pairs: Iterable[Pair | WeightedPair | NumberedPair], counts: Counts, what: str) -> TokenStore:
    """Rows as tokens, written by the first process and read by all."""
    return TokenStore(folder, ranks.on_first(lambda: TokenStore.write(folder, pairs, counts, what).counts))


def rows_in_words(store: TokenStore, renderer: Renderer) -> dict[str, Any]:
    """What the report shows of a stage's rows."""
    counts, tokenizer = store.counts, renderer.tokenizer
    return {
        "rows": counts.rows,
        "prompt_tokens": counts.prompt_tokens,
        "response_tokens": counts.response_tokens,
        "context_shortened": counts.context_shortened,
        "ends_removed": counts.ends_removed,
        "too_long": counts.longest,
        "begins_with": counts.begins_with,
        "dropped": dict(counts.dropped),
        "end_of_turn": tokenizer.convert_ids_to_tokens(renderer.end_of_turn_id),
        "mask_preview": mask_preview(store, tokenizer),
    }


def trained_in_words(summary: dict[str, Any]) -> str:
    """A training stage's closing line: rows that entered and those that did not, before what was made of them."""
    data = summary.get("data", {})
    parts = []
    if data:
        left = sum(data["dropped"].values())
        parts.append(f"{data['rows']:,} of {data['rows'] + left:,} rows" if left else f"{data['rows']:,} rows")
        parts += [f"{n:,} left out: {reason}" for reason, n in data["dropped"].items() if n]
        if data.get("too_long"):
            parts.append(f"the longest has {data['too_long']:,} tokens ({to_raise(data['dropped'])})")
        if data["context_shortened"]:
            parts.append(f"{data['context_shortened']:,} contexts shortened to fit prompts.max_prompt_tokens")
    parts += [f"{summary['steps']:,} steps", f"{count(summary['response_tokens'])} learned tokens"]
    parts += [f"{count(drawn)} generated tokens"] if (drawn := summary.get("generated_tokens")) else []
    parts.append(f"{count(summary['parameters'])} parameters")
    signal = summary.get("signal", {})
    if "rows_read" in signal:
        parts.append(f"teacher: {signal['rows_computed']:,} rows computed, {signal['rows_read']:,} read back")
    return ", ".join(parts)


def tidy(context: Context) -> None:
    """Training state and token files are not part of the artifact."""
    context.work.metrics.close()
    for name in ("checkpoints", "tokens") if ranks.first() else ():
        shutil.rmtree(context.work.folder / name, ignore_errors=True)


def hash_order(example: Example) -> str:
    """Where a row stands when rows are drawn by a hash, so that a part of a split is no more of one kind than the whole."""
    return fingerprint([example.key, example.instruction, example.response])


def sample_rows(source: Source, split: Split, count: int) -> list[Example]:
    """At most `count` rows of a split, chosen and ordered by `hash_order`."""
    return heapq.nsmallest(count, source.examples(split), key=hash_order)


def in_words(settings: Settings | None) -> str:
    """As a caveat of the report names it."""
    table = getattr(settings, "spec", lambda: settings.model_dump(mode="json") if settings is not None else None)()
    if table is None:
        return "none"
    return f"({', '.join(f'{key} {value}' for key, value in table.items() if value is not None)})"

"""All models of a study on the same test rows."""

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from potstill.core.artifact import Makes, fingerprint, read_json, write_json
from potstill.core.component import Settings
from potstill.core.errors import Interrupted, UserError
from potstill.core.types import Abstain, Example
from potstill.data.prompts import Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.models import check_vocabulary, load_model, load_tokenizer, shared_vocabulary
from potstill.edges.sampling import generate
from potstill.losses.scoring import token_sums
from potstill.metrics import Metric, ModelMetric, TextMetric, TokenMetric
from potstill.metrics.decode_speed import DecodeSpeed
from potstill.metrics.exact_match import ExactMatch
from potstill.metrics.kl_to_teacher import KLToTeacher
from potstill.metrics.nll import NLL
from potstill.metrics.rouge_l import RougeL
from potstill.quant.packed import packed_of
from potstill.stages.base import Context, DataStage, ModelRef
from potstill.stages.lineage import PRINT, Place, lineage, places
from potstill.stages.training import hash_order
from potstill.study.records import Decoding as StudyDecoding
from potstill.study.records import MetricInfo, ModelRow, RowRole, Study, TestRow


class Row(Settings):
    """One model of a study."""

    name: str = Field(min_length=1, max_length=40, description="as the report prints it")
    model: ModelRef
    role: RowRole = Field(default="other", description="what it is compared as: base, sft, kd, quantized, rtn, teacher")


class Decoding(Settings):
    """How answers are generated."""

    method: Literal["greedy", "sample"] = Field(
        default="greedy", description="sample: the paper's way, over the whole vocabulary"
    )
    temperature: float = Field(default=1.0, gt=0, description="of sampling")
    max_new_tokens: int = Field(default=128, ge=1, description="longest answer, in tokens")
    seed: int = Field(default=10, ge=0, description="of sampling; the paper's is 10")


class Evaluate(DataStage, kind="evaluate"):
    """Measure every model of a study on the same rows: text metrics on generated answers, token metrics on the references.

    Rows trained per seed are measured for each seed. Every generated answer is kept in `answers.jsonl`.
    """

    version: ClassVar[int] = 2  # 2: the teacher of the same seed; what a control was trained with
    makes: ClassVar[Makes] = "evaluation"
    gathers: ClassVar[bool] = True

    study: tuple[Row, ...] = Field(min_length=1, description="the models, in the order of the report")
    split: Literal["validation", "test"] = Field(default="test", description="rows that no training stage saw")
    rows: int | None = Field(default=None, ge=1, description="use so many rows, drawn from the split by a hash")
    metrics: tuple[Metric, ...] = (RougeL(), ExactMatch(), NLL(), KLToTeacher(), DecodeSpeed())
    primary: str = Field(default="rouge_l", description="the metric of the verdict")
    decoding: Decoding = Decoding()

    @field_validator("study")
    @classmethod
    def _names_differ(cls, study: tuple[Row, ...]) -> tuple[Row, ...]:
        twice = [name for name, n in Counter(row.name for row in study).items() if n > 1]
        if twice:
            raise ValueError(f"two rows are called '{twice[0]}'; names must differ")
        return study

    @model_validator(mode="after")
    def _primary_is_measured(self) -> "Evaluate":
        names = [str(metric.kind) for metric in self.metrics if not isinstance(metric, ModelMetric)]
        if self.primary not in names:
            raise ValueError(f"primary = '{self.primary}' is none of the metrics ({', '.join(names)})")
        asked_for = "metrics" in self.model_fields_set  # the default metrics do without a teacher where there is none
        if asked_for and any(map(_needs_teacher, self.metrics)) and self.teacher() is None:
            raise ValueError("the metric kl_to_teacher needs a row with role = 'teacher'")
        return self

    def teacher(self) -> Row | None:
        """The row that the others are held against."""
        return next((row for row in self.study if row.role == "teacher"), None)

    def run(self, context: Context) -> dict[str, Any]:
        work = context.work
        teacher_row = self.teacher()
        metrics = [m for m in self.metrics if teacher_row is not None or not _needs_teacher(m)]
        jobs = [(row, place) for row in self.study for place in places(context, row.model)]
        first = load_tokenizer(jobs[0][1].where)
        vocab = min(shared_vocabulary(first, load_tokenizer(place.where), self.study[0].name, row.name) for row, place in jobs)
        renderer = Renderer(first, self.prompts)
        counts = Counts()
        examples, prompts, pairs = self._rows(renderer, counts)
        teachers = places(context, teacher_row.model) if teacher_row is not None and any(map(_needs_teacher, metrics)) else []
        against = [teacher_of(place, teachers) for _, place in jobs]
        files = [work.folder / f"partial-{number:03}.json" for number in range(len(jobs))]
        teacher, loaded = None, ""
        # all models of one teacher together: each teacher is loaded once, and one at a time
        for done, number in enumerate(sorted(range(len(jobs)), key=lambda number: against[number])):
            row, place = jobs[number]
            if not files[number].is_file():
                work.progress.update(done, len(jobs), "model", now=row.name)
                if against[number] != loaded:
                    teacher = None  # let go of before the next one comes
                    teacher, loaded = load_model(against[number]), against[number]
                write_json(files[number], self._measure(place, metrics, teacher, vocab, renderer, examples, prompts, pairs))
            work.progress.update(done + 1, len(jobs), "model", now=row.name)
            if work.stop_requested():
                raise Interrupted(
                    f"{work.name}: stopped after model {done + 1} of {len(jobs)}; run the same command again to go on"
                )
        results = [read_json(file) for file in files]
        study = self._study(jobs, results, metrics, examples, pairs, counts)
        study.save(work.folder)
        with (work.folder / "answers.jsonl").open("w", encoding="utf-8") as answers:
            for i, example in enumerate(examples):
                of_row: dict[str, list[str]] = {}
                for (row, _), result in zip(jobs, results, strict=True):
                    of_row.setdefault(row.name, []).append(result["answers"][i])
                answers.write(json.dumps({"key": fingerprint(example.key)[:16], "answers": of_row}) + "\n")
        write_json(work.folder / "lineage.json", lineage([(row.name, row.role, place) for row, place in jobs], context))
        for file in work.folder.glob("partial-*.json"):
            file.unlink()
        return {"test_rows": len(examples), "dropped": dict(counts.dropped), "test_response_tokens": sum(study.tokens)}

    def _rows(self, renderer: Renderer, counts: Counts) -> tuple[list[Example], list[list[int]], list[Any]]:
        found: list[tuple[Example, Any]] = []
        examples, prompts, pairs = [], [], []
        for example in self.data.examples(self.split, counts.dropped):
            pair = next(iter(instruction_pairs([example], renderer, counts)), None)
            if pair is None:
                continue
            found.append((example, pair))
        found.sort(key=lambda row: hash_order(row[0]))
        for example, pair in found[: self.rows]:
            examples.append(example)
            prompts.append(pair[0])
            pairs.append(pair)
        if not examples:
            why = ", ".join(f"{n:,} {reason}" for reason, n in counts.dropped.items()) or "the split is empty"
            raise UserError(f"{self.name or 'evaluate'}: no {self.split} row of {self.data.kind} is left ({why})")
        return examples, prompts, pairs

    def _measure(
        self,
        place: Place,
        metrics: list[Metric],
        teacher: Any,
        vocab: int,
        renderer: Renderer,
        examples: list[Example],
        prompts: list[list[int]],
        pairs: list[Any],
    ) -> dict[str, Any]:
        model = load_model(place.where)
        packed_of(model, place.where)  # refuses codes that no longer stand for the weights: its size counts them
        check_vocabulary(model, renderer.tokenizer, place.where)
        # llama.cpp does not normalise, Qwen2's tokenizer does: answers are compared in one form
        answers = [
            unicodedata.normalize("NFC", answer)
            for answer in generate(
                model,
                renderer.tokenizer,
                prompts,
                stop_ids=renderer.stop_ids,
                max_new_tokens=self.decoding.max_new_tokens,
                temperature=self.decoding.temperature if self.decoding.method == "sample" else 0.0,
                seed=self.decoding.seed,
            )
        ]
        scores: dict[str, Sequence[float | None]] = {}
        for metric in metrics:
            if isinstance(metric, TextMetric):
                values = [metric(answer, example) for answer, example in zip(answers, examples, strict=True)]
                scores[str(metric.kind)] = [None if isinstance(v, Abstain) else v for v in values]
        measures = {str(m.kind): m for m in metrics if isinstance(m, TokenMetric)}
        if measures:
            scores.update(token_sums(model, teacher, pairs, vocab, measures))
        of_model = {str(m.kind): m(model, renderer.tokenizer) for m in metrics if isinstance(m, ModelMetric)}
        return {
            "answers": answers,
            "scores": scores,
            "of_model": of_model,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": place.bytes(model),
        }

    def _study(
        self,
        jobs: list[tuple[Row, Place]],
        results: list[dict[str, Any]],
        metrics: list[Metric],
        examples: list[Example],
        pairs: list[Any],
        counts: Counts,
    ) -> Study:
        rows = []
        for row in self.study:
            mine = [(place, result) for (r, place), result in zip(jobs, results, strict=True) if r is row]
            summaries = [place.summary for place, _ in mine]
            trained = mine[0][0].kind in ("sft", "distill")
            speeds = [result["of_model"].get("decode_speed") for _, result in mine]
            rows.append(
                ModelRow(
                    name=row.name,
                    role=row.role,
                    model=str(row.model),
                    source=next((r.name for r in self.study if str(r.model) == mine[0][0].origin), None),
                    parameters=mine[0][1]["parameters"],
                    bytes=mine[0][1]["bytes"],
                    decode_tokens_per_s=sum(speeds) / len(speeds) if all(s is not None for s in speeds) else None,
                    trained_response_tokens=tuple(s["response_tokens"] for s in summaries) if trained else None,
                    optimizer_steps=tuple(s["steps"] for s in summaries) if trained else None,
                    trained_with=mine[0][0].trained_with(),
                    seeds=tuple(place.seed for place, _ in mine),
                    scores={name: tuple(tuple(result["scores"][name]) for _, result in mine) for name in mine[0][1]["scores"]},
                )
            )
        return Study(
            metrics=tuple(
                MetricInfo(
                    name=str(m.kind),
                    title=m.title,
                    unit=m.unit,
                    higher_is_better=m.higher_is_better,
                    over="tokens" if isinstance(m, TokenMetric) else "rows",
                )
                for m in metrics
                if not isinstance(m, ModelMetric)
            ),
            primary=self.primary,
            rows=tuple(rows),
            tokens=tuple(len(response) for _, response in pairs),
            examples=tuple(
                TestRow(
                    key=fingerprint(e.key)[:16],
                    prompt="\n\n".join(part for part in (e.context, e.instruction) if part),
                    references=e.references,
                    language=e.language,
                    tag=e.tag,
                )
                for e in examples
            ),
            decoding=StudyDecoding(
                method=self.decoding.method,
                temperature=self.decoding.temperature if self.decoding.method == "sample" else None,
                max_new_tokens=self.decoding.max_new_tokens,
            ),
            prompts=fingerprint(self.prompts.model_dump(mode="json"))[:PRINT],
            data={**self.data.spec(), "split": self.split, "rows": len(examples), "dropped": dict(counts.dropped)},
        )


def _needs_teacher(metric: Metric) -> bool:
    return isinstance(metric, TokenMetric) and metric.needs_teacher


def teacher_of(place: Place, teachers: Sequence[Place]) -> str:
    """Where the teacher lies that a model is held against: that of its own seed, else the first; "" where there is none."""
    same = (teacher for teacher in teachers if place.seed is not None and teacher.seed == place.seed)
    first = teachers[0].where if teachers else ""
    return next((teacher.where for teacher in same), first)

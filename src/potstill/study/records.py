"""What the evaluate stage measured: every score of every model on every test row, before any averaging."""

import json
import math
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from potstill.core.errors import UserError
from potstill.study.words import joined

NO_PRIMARY = "so it cannot say whether the teacher was ahead: take a metric that needs no teacher, such as 'rouge_l' or 'nll'"
NO_SANDBOX = "none"  # the backend's name
RowRole = Literal["base", "start", "sft", "kd", "rl", "quantized", "rtn", "teacher", "candidate", "other"]


class _Record(BaseModel):
    """Frozen; keeps fields that it does not know, so that a newer writer loses nothing."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class MetricInfo(_Record):
    """One metric's name and direction.

    Attributes:
        over: "rows" averages the scores over test rows; "tokens" divides the summed scores by the response tokens, "bytes" by
            the bytes of the references.
        against_teacher: whether it compares a model with the teacher token by token, so that both must read one form.
    """

    name: str
    title: str = ""
    unit: str = ""
    higher_is_better: bool = True
    over: Literal["rows", "tokens", "bytes"] = "rows"
    against_teacher: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """The least and the largest value that there can be; infinite where the unit does not say."""
        if self.unit in ("0–100", "%"):
            return 0.0, 100.0
        return (0.0, math.inf) if self.unit in ("nats/token", "nats/byte") else (-math.inf, math.inf)

    def gain(self, difference: float) -> float:
        """A difference with its sign turned so that more is better."""
        return difference if self.higher_is_better else -difference

    @model_validator(mode="before")
    @classmethod
    def _titled(cls, value: Any) -> Any:
        return {**value, "title": value.get("title") or value.get("name", "")} if isinstance(value, dict) else value


class TestRow(_Record):
    """One test row: what was asked and what is accepted.

    Attributes:
        key: of what the row is about (a paragraph, a module); rows with equal keys are one cluster.
    """

    __test__ = False  # not a test, whatever pytest thinks

    key: str
    prompt: str
    references: tuple[str, ...] = ()
    language: str = "en"
    tag: str = ""


class Decoding(_Record):
    """How the answers were generated."""

    method: Literal["greedy", "sample"] = "greedy"
    temperature: float | None = None
    max_new_tokens: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"


class Trained(_Record):
    """How one model of one seed was trained, as the stage that trained it says; whether two are alike is read here alone.

    Attributes:
        by: kind of the stage, for the reader; nothing is decided by it.
        start: the model that training began from.
        init: how that model was cut, in words.
        adapter: which weights trained, in words.
        teacher: what taught it; None: rows alone.
        data: fingerprint of the data source.
        prompts: fingerprint of the prompts.
        rows: different rows that entered training.
        order: fingerprint of the rows, their order and batches: equal means the same rows in the same order.
        rows_seen: rows that entered, counted in every epoch.
        response_tokens: tokens that entered the loss, over all epochs.
        tokens: tokens read, over all epochs.
        generated_tokens: tokens that were drawn for it while it trained.
        optim: the optimiser's other settings.
        searched: settings picked from several values: the recipe's name, such as `optim.lr`, -> values tried; what `student` or
            `model` named is `start`.
        left_out: training rows left out, by reason.
        shortened: contexts shortened.
    """

    by: str
    seed: int
    start: str
    init: str = "none"
    adapter: str = "none"
    teacher: str | None = None
    data: str
    prompts: str
    rows: int
    order: str
    steps: int
    rows_seen: int
    response_tokens: int
    tokens: int
    generated_tokens: int = 0
    epochs: float
    lr: float
    optim: dict[str, Any] = {}
    searched: dict[str, list[Any]] = {}
    left_out: dict[str, int] = {}
    shortened: int = 0


class Healing(_Record):
    """What healing did to the divergence of one quantised model of one seed from its teacher, on validation rows.

    Attributes:
        student: what was healed, as the stage refers to it.
        kl_before, kl_after: mean KL, nats per token.
        kept: False: it had grown, so the model is its student as it was.
    """

    student: str
    kl_before: float
    kl_after: float
    kept: bool


class ModelRow(_Record):
    """One model (one line of the results table), with the scores of each of its training seeds.

    Attributes:
        made_from: what a model was made from without training, as its stage refers to it; empty: nothing, or unknown.
        source: the name of the row that is `made_from`; None: it was not measured. Guessed from the names where `made_from` is
            empty too.
        bits: of the codes of its quantised layers; 0: it has none, or nobody knows.
        taught_by: names of the rows that taught this model; empty: none of its teachers was measured; None: found by comparing
            `Trained.teacher` with the rows' `model`.
        known_rows: test rows that this model, or one that it was made from or taught by, was trained on.
        parameters: weights, counted once where tied.
        bytes: size of the weights as the run keeps them, 4-bit layers packed; of a hub model as it lies in memory. Not the size
            of any file.
        folder: where the shipped files lie.
        files: the shipped files that hold this model as it was measured, name -> bytes; empty where nothing was exported.
        decode_tokens_per_s: generated tokens per second; None where not measured.
        trained: how it was trained, one record per seed; None where nothing was trained or nobody knows.
        healing: per seed, what healing did; None: it was not healed, or that was not measured.
        equals: the row, or where it was not measured the model as the stage refers to it, that this one is, because healing was
            kept for no seed; None: none.
        rollouts: per seed, answers that were drawn for its training, while it trained or before; None: unknown.
        format_only: per seed, whether rewards of the form rose and none that judges correctness did; None: not rewarded.
        abstentions: metric -> why it gave no score -> answers, over all seeds.
        cut_answers: per seed, answers that reached `max_new_tokens`; None: not counted.
        template: fingerprint of the tokens that the model read the test rows as; None: unknown.
        teacher_reads: how the student's form of the rows, in which its teacher was made to read them in training, differs from
            the teacher's own; None: not at all, no teacher, or unknown.
        apart: how the form that it was asked in differs from the form of the teacher that it is compared with token by token;
            None: not at all, or not compared.
        tokens: response tokens of each test row in this model's form of the rows, where they are not `Study.tokens`.
        outcomes: metric that runs programs -> seed -> test row -> how each program that the score rests on ended: an outcome
            of the sandbox, `no_parse` or `no_program`.
        unsafe: whether a stage that made this model ran programs without a sandbox.
        seeds: training seeds; (None,) where nothing was trained.
        scores: metric -> seed -> test row; None where the metric abstained. A NaN or infinity becomes None too:
            a model that failed on a row must not be averaged, and the report counts such rows aloud.
    """

    name: str
    role: RowRole = "other"
    model: str = ""
    made_from: str = ""
    source: str | None = None
    bits: int = 0
    taught_by: tuple[str, ...] | None = None
    known_rows: int = 0
    parameters: int | None = None
    bytes: int | None = None
    folder: str | None = None
    files: dict[str, int] = {}
    decode_tokens_per_s: float | None = None
    trained: tuple[Trained, ...] | None = None
    healing: tuple[Healing, ...] | None = None
    equals: str | None = None
    rollouts: tuple[int, ...] | None = None
    format_only: tuple[bool, ...] | None = None
    abstentions: dict[str, dict[str, int]] = {}
    cut_answers: tuple[int, ...] | None = None
    template: str | None = None
    teacher_reads: str | None = None
    apart: str | None = None
    tokens: tuple[int, ...] | None = None
    outcomes: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {}
    unsafe: bool = False
    seeds: tuple[int | None, ...] = (None,)
    scores: dict[str, tuple[tuple[float | None, ...], ...]]

    @field_validator("seeds", mode="before")
    @classmethod
    def _some_seed(cls, value: Any) -> Any:
        return (None,) if value is None or len(value) == 0 else value

    @field_validator("scores", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        def finite(score: Any) -> Any:
            return None if score is None or not math.isfinite(score) else float(score)

        return {metric: [[finite(score) for score in seed] for seed in seeds] for metric, seeds in value.items()}

    def scores_SN(self, metric: str) -> np.ndarray | None:
        """Scores [seeds, test rows], NaN where the metric abstained; None when this metric was not taken of this model."""
        scores = self.scores.get(metric)
        return None if scores is None else np.array(scores, dtype=float).reshape(len(self.seeds), -1)


class JudgedBy(_Record):
    """What ran the programs of answers.

    Attributes:
        backend: of the sandbox, or NO_SANDBOX.
        version: of the backend; of one that the kernel alone makes, the kernel's.
        python: that ran the programs.
    """

    backend: str
    version: str = ""
    python: str = ""

    @property
    def unsafe(self) -> bool:
        return self.backend == NO_SANDBOX


class Study(_Record):
    """All scores of one evaluation.

    Attributes:
        tokens: response tokens of each test row, in the form that most models read: the weights of token metrics.
        bytes: of each test row's answer as UTF-8: the weights of metrics over bytes; empty where there is none.
        prompts: fingerprint of the prompts that the models were asked with, as in `Trained.prompts`; None: unknown.
        languages: language -> test rows.
        shortened: test rows whose context was cut.
        left_out: test rows that were left out, by reason; of no other split.
        of_rows: rows of the split, before some were left out or only a part was drawn; None: those scored and those left out.
        near_duplicates: how many held-out rows are nearly repeated in training, in words; empty: none, or not looked for.
        compare: names of the models that are compared, a with b, the headline's first; empty: as the roles say.
        judged_by: what ran the programs of answers, several where the evaluation went on elsewhere; empty: none was run.
        unfit: metric -> why its figures cannot be trusted on the language of these rows.
    """

    metrics: tuple[MetricInfo, ...]
    primary: str
    rows: tuple[ModelRow, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...] = ()
    examples: tuple[TestRow, ...]
    decoding: Decoding = Decoding()
    prompts: str | None = None
    languages: dict[str, int] = {}
    shortened: int = 0
    left_out: dict[str, int] = {}
    of_rows: int | None = None
    near_duplicates: str = ""
    compare: tuple[tuple[str, str], ...] = ()
    judged_by: tuple[JudgedBy, ...] = ()
    unfit: dict[str, str] = {}
    data: dict[str, Any] = {}

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        N = len(self.examples)
        if self.primary not in {metric.name for metric in self.metrics}:
            raise ValueError(f"primary = '{self.primary}' is none of the metrics ({', '.join(m.name for m in self.metrics)})")
        if self.metric(self.primary).against_teacher:
            raise ValueError(f"primary = '{self.primary}' compares with the teacher, whose own figure is 0; {NO_PRIMARY}")
        if len(self.tokens) != N:
            raise ValueError(f"tokens has {len(self.tokens)} entries for {N} test rows")
        if len(self.bytes) != N and any(metric.over == "bytes" for metric in self.metrics):
            raise ValueError(f"bytes has {len(self.bytes)} entries for {N} test rows")
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called '{name}'; names must differ")
        for name in (name for pair in self.compare for name in pair if name not in names):
            raise ValueError(f"compare names '{name}', which is no model of the study ({', '.join(names)})")
        for row in self.rows:
            for what in ("trained", "healing", "cut_answers", "rollouts", "format_only"):
                per_seed = getattr(row, what)
                if per_seed is not None and len(per_seed) != len(row.seeds):
                    raise ValueError(f"{row.name}: {what} has {len(per_seed)} entries for {len(row.seeds)} seeds")
            for metric, seeds in row.outcomes.items():
                if len(seeds) != len(row.seeds) or any(len(rows) != N for rows in seeds):
                    raise ValueError(f"{row.name}: outcomes of {metric} are not {len(row.seeds)} seeds × {N} test rows")
            for metric, seeds in row.scores.items():
                if len(seeds) != len(row.seeds) or any(len(scores) != N for scores in seeds):
                    shape = f"{len(seeds)} × {[len(scores) for scores in seeds]}"
                    raise ValueError(f"{row.name}: scores of {metric} are {shape}, not {len(row.seeds)} seeds × {N} test rows")
        return self

    def metric(self, name: str) -> MetricInfo:
        """The metric of this name. Raises KeyError."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)

    def with_role(self, *roles: str) -> list[ModelRow]:
        """The models of these roles, in the order of the roles, then of the study."""
        return [row for role in roles for row in self.rows if row.role == role]

    def row(self, name: str) -> ModelRow:
        """The model of this name. Raises KeyError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def teachers_of(self, row: ModelRow) -> list[ModelRow] | None:
        """The measured models that taught this one, those of role teacher first; None where none did, or nobody knows."""
        refs = {trained.teacher for trained in row.trained or () if trained.teacher is not None}
        if not refs:
            return None
        if row.taught_by is None and not all(other.model for other in self.with_role("teacher")):
            return None
        own = [r for r in self.rows if (r.model in refs if row.taught_by is None else r.name in row.taught_by)]
        return sorted(own, key=lambda other: other.role != "teacher")

    def teacher_of(self, row: ModelRow) -> ModelRow | None:
        """The measured model that taught this one; of one that none taught, the teacher of the distilled models.

        None where it was not measured: another model of role teacher does not stand for it.
        """
        own = self.teachers_of(row)
        if own is not None:
            return own[0] if own else None
        distilled = [self.teachers_of(kd) for kd in self.with_role("kd")]
        of_these = [teacher for known in distilled for teacher in known or ()]
        if distilled and None not in distilled:
            return of_these[0] if of_these else None
        return next(iter(self.with_role("teacher")), None)

    def with_files(self, name: str, folder: Path | str, files: dict[str, int]) -> Self:
        """The same study, in which the model of this name is shipped as these files, name -> bytes."""
        own = {"folder": str(folder), "files": files}
        return self.model_copy(
            update={"rows": tuple(row.model_copy(update=own) if row.name == name else row for row in self.rows)}
        )

    def clusters_N(self) -> np.ndarray:
        """The number of each test row's cluster: 0, 1 … in the order of the keys, so that the rows' order changes no draw."""
        numbers = {key: number for number, key in enumerate(sorted({example.key for example in self.examples}))}
        return np.array([numbers[example.key] for example in self.examples], dtype=np.int64)

    def unsafe_in_words(self) -> str:
        """What was run without a sandbox, and what that means; "" where nothing was."""
        parts = ["the programs of the test answers"] if any(one.unsafe for one in self.judged_by) else []
        parts += (
            [f"programs that {joined([row.name for row in self.rows if row.unsafe])} learned from"]
            if any(row.unsafe for row in self.rows)
            else []
        )
        if not parts:
            return ""
        return (
            f"Judged WITHOUT A SANDBOX (--unsafe-no-sandbox): {joined(parts)} ran with all rights of the user, so a program "
            "could change what judges it. Believe no figure that rests on them."
        )

    def tokens_of(self, row: ModelRow) -> tuple[int, ...]:
        """Response tokens of each test row in a model's own form: the weights of its token metrics."""
        return row.tokens if row.tokens is not None else self.tokens

    def weights_N(self, row: ModelRow, metric: MetricInfo) -> np.ndarray:
        """By what the sum of a model's scores is divided, test row by test row: its own tokens, bytes, or 1."""
        counted = {"rows": (1,) * len(self.examples), "tokens": self.tokens_of(row), "bytes": self.bytes}
        return np.asarray(counted[metric.over], dtype=float)

    def comparable(self, a: ModelRow, b: ModelRow, metric: MetricInfo) -> bool:
        """Whether two models' values have one unit: nats per token of unequal forms of the references have not."""
        return metric.over != "tokens" or self.tokens_of(a) == self.tokens_of(b)

    def cluster_count(self) -> int:
        """Different keys of test rows."""
        return len({example.key for example in self.examples})

    def save(self, folder: Path | str) -> None:
        """Write `study.json` into the folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(self.model_dump(mode="json"), Path(folder) / "study.json", sort=False)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read `study.json` from the folder.

        Raises:
            UserError: there is none, or it is not a study.
        """
        path = Path(folder) / "study.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: run the evaluate stage first") from None
        except ValidationError as e:
            first = e.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{path} is not a study: {place + ': ' if place else ''}{first['msg']}; "
                "where an older potstill made it, run the recipe again"
            ) from None


def load_answers(folder: Path | str) -> list[dict[str, Any]]:
    """Read `answers.jsonl`: line i holds the key of test row i and, per model, one answer per seed.

    Raises:
        UserError: there is none, or a line is not JSON.
    """
    path = Path(folder) / "answers.jsonl"
    try:
        # split("\n"), not splitlines(): an answer may hold U+2028, which JSON leaves unescaped
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run the evaluate stage first") from None
    answers = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                answers.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise UserError(f"{path}:{number} is not JSON ({e.msg}); the file was cut off? evaluate again") from None
    return answers


def write_json(value: Any, path: Path, *, sort: bool = True) -> None:
    """Write plain JSON: UTF-8, stable layout, no NaN. Lone surrogates, which UTF-8 refuses, are written as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort, indent=1) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))

"""Answers that a teacher writes for rows, as rows to train on."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from potstill.core.artifact import Makes, fingerprint
from potstill.core.errors import Problem, UserError
from potstill.core.numbers import count
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer, conversation, in_plain_text
from potstill.data.rollout import Asked, Rollout, Sampling
from potstill.data.templates import opened_tag
from potstill.edges.machine import resting_memory
from potstill.edges.models import Model, content_id, load_model, load_tokenizer, positions_of
from potstill.edges.sampling import BATCH_ROWS
from potstill.losses.scoring import token_sums
from potstill.rollouts.api import OpenAI, TooLong
from potstill.rollouts.crew import Alone, Crew, Stop
from potstill.rollouts.journal import Answer, Journal
from potstill.rollouts.local import Local, arithmetic
from potstill.scorers.programs import sandbox
from potstill.sources import Source
from potstill.sources.stage import HELD_OUT, WRITTEN, held_out, row_of
from potstill.stages.base import Context, DataStage, answer_problems, empty_split
from potstill.stages.cost import answer_memory, answer_seconds, left_over
from potstill.stages.filters import Filters, Judged, Sieve
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf
from potstill.stages.programs import program_problems
from potstill.stages.refs import ModelRef
from potstill.study.words import reasons
from potstill.train.loop import Precision, in_bf16
from potstill.train.work import Work

LEFT_OUT = "left_out.jsonl"  # in the artifact: answers that a filter left out, with the reason
SHOWN = 5  # rows that the summary, and so the report, shows
NO_ANSWER = ("response too long", "empty response")  # what is wrong with a reference is no matter where an answer is written
TOO_LONG = "prompt too long for the server"
BYTES_PER_TOKEN = 5.0  # of JSON, roughly

Written = dict[int, list[Answer] | None]  # of each row; None: its prompt turned out to be too long


class Generate(DataStage, kind="generate"):
    """Let a teacher write answers to a source's training rows; they are rows to train on: `data = "stage:NAME"`.

    `sft` on them is sequence-level distillation, which needs no common tokenizer. Kim and Rush, "Sequence-Level Knowledge
    Distillation", 2016, take the likeliest answer by beam search; ours is greedy or sampled.

    Each row is on the disk before the next one is counted, and a run that goes on asks only for what is missing, also after
    filters or the budget were changed.
    """

    makes: ClassVar[Makes] = "rows"
    ignored: ClassVar[tuple[str, ...]] = (
        *DataStage.ignored,
        *(f"api.{name}" for name in ("key_env", "in_flight", "timeout_s", "retries", "backoff_s")),
    )

    model: ModelRef | None = Field(default=None, description="who writes, loaded here; or give `api`")
    api: OpenAI | None = Field(default=None, description="who writes, behind an OpenAI-compatible endpoint; or give `model`")
    precision: Precision = Field(
        default="auto",
        description="of the products of a model that is loaded here; auto: bf16 on a GPU that has it, else fp32",
    )
    samples: int = Field(default=1, ge=1, description="answers for each row")
    sampling: Sampling = Sampling()
    filters: Filters = Filters()
    budget: int | None = Field(
        default=None, ge=1, description="most tokens of answers; rows are asked in order while a whole one still fits"
    )
    batch_rows: int = Field(default=BATCH_ROWS, ge=1, description="rows that a model loaded here answers together")

    @model_validator(mode="after")
    def _one_writer(self) -> "Generate":
        if (self.model is None) == (self.api is None):
            raise ValueError("needs one of model and api")
        if self.api is not None and self.precision != "auto":
            raise ValueError("precision is of a model that is loaded here; an endpoint has its own, so leave it out")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(f"samples = {self.samples} at temperature 0 would all be the same; set sampling.temperature")
        if self.filters.best is not None and self.samples == 1:
            raise ValueError("filters.best chooses among several answers; set samples, or leave it out")
        least = self.samples * self.sampling.max_new_tokens
        if self.budget is not None and self.budget < least:
            raise ValueError(
                f"budget = {self.budget} is less than one row may take: samples · sampling.max_new_tokens = {least}"
            )
        return self

    def reader(self) -> ModelRef | None:
        return self.model

    def writes(self) -> tuple[Source, int]:
        return self.data, 1 if self.filters.best is not None else self.samples

    def teacher(self) -> str:
        """Who writes, as reports and studies name it."""
        return str(self.model) if self.api is None else f"{self.api.model} at {self.api.url}"

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        found = list(super().problems(outlook))
        writer, rows = None, None
        try:
            writer = outlook.model(self.model) if self.model is not None else None
        except UserError as error:
            yield Problem("model", str(error), repr(str(self.model)))
        try:
            rows = outlook.rows(self.data, self.prompts, self.model if writer is not None else None, "train")
        except UserError:
            yield from found
        else:  # how long references are is no matter where answers are written
            yield from (each for each in found if each.place != "data" and not each.place.startswith("prompts.max"))
            if not _asked_of(rows):
                yield Problem("data", empty_split(rows))
        yield from program_problems([self.filters.metric], self.data, "train", "filters.metric")
        if self.api is not None:
            yield from self._endpoint_problems()
        elif writer is not None and rows is not None:
            yield from self._position_problems(writer, rows)

    def _endpoint_problems(self) -> Iterator[Problem]:
        assert self.api is not None
        try:
            self.api.key()
        except UserError as error:
            yield Problem("api.key_env", str(error), repr(self.api.key_env))
        if refused := self.api.refuses(self.sampling):
            yield Problem("sampling", refused)
        if self.filters.best == "likelihood" and not (
            self.api.logprobs and self.sampling.whole and self.sampling.temperature == 1
        ):
            rule = "an endpoint says it only with api.logprobs = true, at temperature 1 without cuts; or set best = 'metric'"
            yield Problem("filters.best", rule, "'likelihood'")

    def _position_problems(self, writer: Prospect, rows: RowsOf) -> Iterator[Problem]:
        most = min(self.prompts.max_prompt_tokens, rows.longest_prompt)
        limit = positions_of(writer.config)
        yield from answer_problems("sampling.max_new_tokens", self.sampling.max_new_tokens, most, limit, str(self.model))

    def cost(self, outlook: Outlook) -> Cost:
        rows = outlook.rows(self.data, self.prompts, self.model, "train")
        asked, answer = _asked_of(rows), min(rows.response or self.sampling.max_new_tokens, self.sampling.max_new_tokens)
        if self.budget is not None:
            asked = min(asked, int(self.budget // (self.samples * answer)))
        written = asked * self.samples * answer
        cost = Cost(
            tokens=round(asked * self.samples * rows.prompt + written),
            response_tokens=round(written),
            output_bytes=round(BYTES_PER_TOKEN * (written + asked * rows.prompt)),
            rows=(rows,),
        )
        if self.model is None:
            return replace(cost, note=f"how long {self.teacher()} takes is not known")
        found = outlook.model(self.model)
        if found is None:
            return cost
        probe, rows_at_once = outlook.probe(found.config, rows, self.precision), self.batch_rows * self.samples
        weights = 4 + (2 if in_bf16(self.precision) else 0)  # bytes: cast once for a batch of answers
        memory = resting_memory() + weights * found.size.parameters + left_over(found.size)
        return replace(
            cost,
            parameters=found.size.parameters,
            seconds=answer_seconds(probe, rows, asked, round(answer), self.samples) if probe is not None else None,
            memory_bytes=round(memory + answer_memory(found.config, rows, rows_at_once, self.sampling.max_new_tokens)),
            less_memory="lower batch_rows",
        )

    def closing(self, summary: dict[str, Any]) -> str:
        return written_in_words(summary)

    def run(self, context: Context) -> dict[str, Any]:
        work = context.work
        writer: Writer = _Endpoint(self.api, self) if self.api is not None else _Loaded(self, context)
        left_out: Counter[str] = Counter()
        examples, asked = [], []
        for example in work.watched(self.data.examples("train", left_out), "rows read"):
            prompt = writer.asked(example)
            if isinstance(prompt, str):
                left_out[prompt] += 1
                continue
            examples.append(example)
            asked.append(prompt)
        if not asked:
            raise UserError(
                f"{work.name}: no training row of {self.data.kind} can be asked ({reasons(left_out) or 'there is none'})"
            )
        with Journal(self._journal(context, writer, asked)) as journal:
            if journal.rows:
                work.note(f"{len(journal.rows):,} of {len(asked):,} rows are written already")
            if journal.lost:
                work.note(f"{journal.lost:,} rows were damaged on the disk, and are written again")
            rows_asked = self._write(writer, asked, journal, work)
            answers = {row: journal.rows[row] for row in range(rows_asked)}
        return self._keep(context, examples, answers, left_out)

    def _journal(self, context: Context, writer: "Writer", asked: Sequence[Asked]) -> Path:
        """The file that keeps what was written, named by all that decides it; filters and the budget do not."""
        hashed = hashlib.sha256()
        for prompt in asked:
            hashed.update(repr((prompt.ids, prompt.turns, prompt.text)).encode("utf-8", "surrogatepass"))
        sampling = self.sampling.model_dump(mode="json")
        decides = [self.version, writer.identity(), sampling, self.samples, self.seed, writer.batch, hashed.hexdigest()]
        folder = context.shared if context.shared is not None else context.work.folder.parent
        return folder / "written" / f"{fingerprint(decides)[:24]}.jsonl"

    def _write(self, writer: "Writer", asked: Sequence[Asked], journal: Journal, work: Work) -> int:
        """Ask for what the journal lacks; how many rows, from the first on, are written in the end.

        Blocks of rows follow from the rows' order and the budget alone, never from what was there before or came first: a run
        that goes on ends as one that was not stopped.
        """

        already = len(journal.rows)

        def told(rows: int) -> None:
            work.progress.update(rows, len(asked), "row", start=already, tokens=count(purse.paid))

        def write(block: range) -> Written:
            prompts = [asked[row] for row in block]
            return writer.write(block, prompts, _seed(self.seed, block.start), lambda rows: told(block.start + rows), stop)

        def keep(written: Written) -> None:
            journal.add({row: answers for row, answers in written.items() if row not in journal.rows})

        stop = Stop()
        crew: Crew[range, Written] | Alone[range, Written]
        crew = Crew(write, writer.at_once, stop) if writer.at_once > 1 else Alone(write)
        purse = _Purse(self.budget, self.samples * self.sampling.max_new_tokens)
        begin = 0
        try:
            while begin < len(asked) or crew.busy:
                size = purse.rows(min(writer.batch, len(asked) - begin))
                if size and crew.busy < writer.at_once:
                    block = range(begin, begin + size)
                    begin += size
                    if all(row in journal.rows for row in block):
                        purse.pay(self._tokens(journal, block))
                    else:
                        purse.reserve(size)
                        crew.give(block)
                    continue
                if not crew.busy:
                    break  # the budget has no room for another row
                try:
                    block, written = crew.take()
                except UserError as error:
                    if crew.busy:
                        work.note(f"{error}; answers that are in flight are awaited")
                    for _, written in crew.rest():  # they are paid for
                        keep(written)
                    raise
                keep(written)
                purse.release(len(block))
                purse.pay(self._tokens(journal, block))
                told(len(journal.rows))
        finally:
            crew.close()
        return begin

    def _tokens(self, journal: Journal, block: range) -> int:
        """Tokens of a block's answers; of one that nobody counted as many as it may have."""
        most = self.sampling.max_new_tokens
        answers = (answer for row in block for answer in journal.rows[row] or ())
        return sum(answer.tokens if answer.tokens is not None else most for answer in answers)

    def _keep(
        self,
        context: Context,
        examples: Sequence[Example],
        answers: Mapping[int, Sequence[Answer] | None],
        left_out: Counter[str],
    ) -> dict[str, Any]:
        """Write the artifact's files; its summary."""
        folder, sieve = context.work.folder, Sieve(self.filters)
        filtered: Counter[str] = Counter()
        kept: list[Judged] = []
        shown: list[dict[str, Any]] = []
        answered = 0
        with _Lines(folder / WRITTEN) as rows, _Lines(folder / LEFT_OUT) as others:
            for number, found in answers.items():
                if found is None:
                    left_out[TOO_LONG] += 1
                    continue
                judged = sieve(examples[number], found)
                for one in judged:
                    line = self._row(examples[number], one)
                    (others if one.reason else rows)({**line, "reason": one.reason} if one.reason else line)
                filtered.update(one.reason for one in judged if one.reason)
                mine = [one for one in judged if not one.reason]
                answered += bool(mine)
                kept += mine
                shown += [_shown(examples[number], mine[0])] if mine and len(shown) < SHOWN else []
        with _Lines(folder / HELD_OUT) as rows:
            for example, split in held_out(self.data):
                rows({**row_of(example), "split": split})
        every = [answer for found in answers.values() for answer in found or ()]
        if not kept:
            raise UserError(
                f"{context.work.name}: of {len(every):,} answers none is left ({reasons(filtered)}); look at what was written, "
                "raise sampling.max_new_tokens where answers are cut, or set `filters` otherwise"
            )
        return {
            "teacher": self.teacher(),
            "rows": len(kept),
            "answered": answered,
            "asked": len(answers),
            "not_asked": len(examples) - len(answers),
            "rows_left_out": dict(left_out),
            "answers": len(every),
            "filtered": dict(filtered),
            "reasoned": sum(answer.reasoned for answer in every),
            **_counted(every),
            "kept_tokens": _sum(one.answer.tokens for one in kept),
            "mean_logp": _mean([one.answer.mean_logp for one in kept if one.answer.mean_logp is not None]),
            "samples": self.samples,
            "sampling": self.sampling.model_dump(mode="json"),
            **({"sandbox": sandbox()} if self.filters.metric.runs_programs else {}),
            "shown": shown,
        }

    def _row(self, example: Example, one: Judged) -> dict[str, Any]:
        """A row as the artifact holds it: the source's columns with the answer as response, and how it came to be."""
        answer = one.answer
        references = tuple(text for text in example.references if text.strip())
        written = {
            "teacher": self.teacher(),
            "sampling": self.sampling.model_dump(mode="json"),
            "sample": one.sample,
            "finished": answer.finished,
            "tokens": answer.tokens,
            "mean_logp": answer.mean_logp,
            "score": one.score,
            "source_references": references,
        }
        said = replace(example, response=answer.text, references=(), reasoning="", tool_calls=())
        return {**row_of(said), "written": written}


class Writer(Protocol):
    """Who writes.

    Attributes:
        batch: rows that are written together.
        at_once: such batches that are in work at the same time.
    """

    batch: int
    at_once: int

    def identity(self) -> Any:
        """All of it that decides an answer."""
        ...

    def asked(self, example: Example) -> Asked | str:
        """A row's prompt, or why it cannot be asked."""
        ...

    def write(
        self, rows: Sequence[int], prompts: Sequence[Asked], seed: int, on_rows: Callable[[int], None], stop: Stop
    ) -> Written:
        """The answers of each row; None where its prompt turned out to be too long.

        Args:
            on_rows: gets, as they come, about how many rows are done.
            stop: set when other rows have failed; nothing that costs is begun from then on.
        """
        ...


class _Loaded:
    """A model in this process."""

    at_once = 1

    def __init__(self, stage: Generate, context: Context) -> None:
        assert stage.model is not None
        self.stage, self.where, self.batch = stage, context.where(stage.model), stage.batch_rows
        self.renderer = Renderer(load_tokenizer(self.where), stage.prompts)
        self.precision: Literal["fp32", "bf16"] = "bf16" if in_bf16(stage.precision) else "fp32"
        self._model: Model | None = None

    def identity(self) -> Any:
        precision = [self.precision] if self.precision != "fp32" else []
        return [content_id(self.where), self.stage.prompts.model_dump(mode="json"), *precision]

    def asked(self, example: Example) -> Asked | str:
        prompt = self.renderer.prompt(example)
        if prompt.ids is None:
            return prompt.reason
        opened = opened_tag(self.renderer.text(example, "")) if self.renderer.prompts.format == "chat" else ""
        return Asked(ids=tuple(prompt.ids), text=opened)  # the text is kept for the answer, whose beginning it is

    def write(
        self, rows: Sequence[int], prompts: Sequence[Asked], seed: int, on_rows: Callable[[int], None], stop: Stop
    ) -> Written:
        if self._model is None:
            self._model = load_model(self.where)
        stage, bare = self.stage, [Asked(ids=prompt.ids) for prompt in prompts]
        engine = Local(self._model, self.renderer.tokenizer, self.renderer.stop_ids, precision=self.precision)
        rollouts = engine(bare, stage.samples, stage.sampling, seed, lambda n, _: on_rows(n // stage.samples))
        logp = self._mean_logp([(list(bare[one.prompt].ids), one.ids) for one in rollouts])
        answers = [self._answer(one, prompts[one.prompt], value) for one, value in zip(rollouts, logp, strict=True)]
        return _by_row(rows, rollouts, answers, stage.samples)

    def _answer(self, rollout: Rollout, asked: Asked, logp: float | None) -> Answer:
        said = self.renderer.said(rollout.text)
        finished = rollout.finished or said != rollout.text.strip()  # ended by text, where the template has no token for it
        return Answer(asked.text + said, finished, len(rollout.ids), len(asked.ids), logp)

    def _mean_logp(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
        """Of each answer's tokens under the model itself, whatever they were drawn by; in nats."""
        model = self._model
        assert model is not None
        vocab = model.get_output_embeddings().weight.shape[0]
        measure = {"logp": lambda logq, target, _: logq.gather(-1, target[:, None]).squeeze(-1)}
        with arithmetic(model, self.precision):
            sums = token_sums(model, None, pairs, vocab, measure)["logp"]
        return [total / len(ids) for total, (_, ids) in zip(sums, pairs, strict=True)]


class _Endpoint:
    """A server."""

    batch = 1

    def __init__(self, api: OpenAI, stage: Generate) -> None:
        self.api, self.stage = api, stage
        self.at_once = max(1, api.in_flight // stage.samples)
        self._api = api.model_copy(update={"in_flight": min(api.in_flight, stage.samples)})

    def identity(self) -> Any:
        return [self.api.url, self.api.model, self.api.extensions, self.api.logprobs]

    def asked(self, example: Example) -> Asked | str:
        return asked_of(example, self.stage.prompts)

    def write(
        self, rows: Sequence[int], prompts: Sequence[Asked], seed: int, on_rows: Callable[[int], None], stop: Stop
    ) -> Written:
        try:
            rollouts = self._api(prompts, self.stage.samples, self.stage.sampling, seed, stop=stop)
        except TooLong:
            return dict.fromkeys(rows)
        return _by_row(rows, rollouts, [_as_told(rollout) for rollout in rollouts], self.stage.samples)


def asked_of(example: Example, prompts: Prompts) -> Asked | str:
    """A row's prompt for a server that applies a template of its own, or why it cannot be asked."""
    if example.tools:
        return "tools, which an endpoint is not given"
    if prompts.format == "chat":
        return Asked(turns=tuple(conversation(example, example.context, prompts)))
    if example.since or any(turn.tool_calls or turn.reasoning for turn in example.history):
        return f"tool calls or reasoning, which format = '{prompts.format}' cannot write"
    return Asked(text=in_plain_text(example, prompts.format, example.context))


def _as_told(rollout: Rollout) -> Answer:
    usage = rollout.usage
    logp = float(rollout.logp_N.mean(dtype="float64")) if rollout.logp_N.size else None
    counts = (usage.answer_tokens, usage.prompt_tokens) if usage is not None else (None, None)
    return Answer(rollout.text, rollout.finished, *counts, mean_logp=logp, reasoned=rollout.reasoned)


def _by_row(rows: Sequence[int], rollouts: Sequence[Rollout], answers: Sequence[Answer], samples: int) -> Written:
    found: dict[int, list[Answer]] = {row: [] for row in rows}
    for rollout, answer in zip(rollouts, answers, strict=True):
        found[rows[rollout.prompt]].append(answer)
    assert all(len(one) == samples for one in found.values())
    return {**found}


@dataclass
class _Purse:
    """A budget in tokens: nothing is begun that may not be paid for.

    Attributes:
        each: most that one row may take.
        paid: what rows took.
        reserved: rows that are in work.
    """

    budget: int | None
    each: int
    paid: int = 0
    reserved: int = 0

    def rows(self, wanted: int) -> int:
        """How many rows may begin; none while it depends on what rows in work will take."""
        if self.budget is None:
            return wanted
        affordable = (self.budget - self.paid - self.reserved * self.each) // self.each
        return min(wanted, max(0, affordable)) if not self.reserved or affordable >= wanted else 0

    def reserve(self, rows: int) -> None:
        self.reserved += rows

    def release(self, rows: int) -> None:
        self.reserved -= rows

    def pay(self, tokens: int) -> None:
        self.paid += tokens


class _Lines:
    """A file of JSON objects, one a line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()


def _seed(seed: int, row: int) -> int:
    """Of the block that begins with a row: a prompt that occurs in two blocks must not get the same answers."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=4).digest(), "big") >> 1


def _asked_of(rows: RowsOf) -> int:
    """Rows whose prompts fit, whatever their references are like."""
    return rows.kept + sum(rows.left_out.get(reason, 0) for reason in NO_ANSWER)


def _counted(answers: Sequence[Answer]) -> dict[str, Any]:
    """Cost in tokens; `uncounted`: answers of which nobody said it."""
    prompt, answer = (_sum(values) for values in ((a.prompt_tokens for a in answers), (a.tokens for a in answers)))
    uncounted = sum(one.tokens is None or one.prompt_tokens is None for one in answers)
    return {"prompt_tokens": prompt, "response_tokens": answer, "tokens": prompt + answer, "uncounted": uncounted}


def _sum(values: Any) -> int:
    return sum(value for value in values if value is not None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(example: Example, one: Judged) -> dict[str, Any]:
    cut = 400  # characters
    return {
        "instruction": example.instruction[:cut],
        "answer": one.answer.text[:cut],
        "reference": example.response[:cut],
        "mean_logp": one.answer.mean_logp,
    }


def written_in_words(summary: Mapping[str, Any]) -> str:
    """`1,200 of 1,400 answers kept, for 380 of 400 rows (left out: 200 cut …), 51k tokens written`."""
    left = f" (left out: {reasons(summary['filtered'])})" if summary["filtered"] else ""
    parts = [f"{summary['rows']:,} of {summary['answers']:,} answers kept{left}"]
    parts.append(f"for {summary['answered']:,} of {summary['asked']:,} rows asked")
    if summary["not_asked"]:
        parts.append(f"{summary['not_asked']:,} rows not asked: the budget is spent")
    if any(summary["rows_left_out"].values()):
        parts.append(f"rows left out: {reasons(summary['rows_left_out'])}")
    parts.append(f"{count(summary['response_tokens'])} tokens written, {count(summary['prompt_tokens'])} read")
    if summary.get("reasoned"):
        parts.append(f"{summary['reasoned']:,} answers came with reasoning, which is not kept")
    if summary["uncounted"]:
        parts.append(f"{summary['uncounted']:,} answers of unknown cost: the server does not say")
    return ", ".join(parts)

"""What can be known before anything runs: models by their configs, tokenizers, rows, and what a pass costs here."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from potstill.core.errors import UserError
from potstill.core.types import Example, Split
from potstill.data.prompts import Prompts, Renderer, template_problems
from potstill.data.store import Counts, instruction_pairs
from potstill.edges.machine import resting_memory
from potstill.edges.models import Size, bits_of, config_of, size_of, weight_problems
from potstill.edges.packed import check_exact
from potstill.edges.vocabulary import load_tokenizer
from potstill.sources import Source
from potstill.stages.refs import StageRef
from potstill.study.words import reasons
from potstill.train.probe import Probe, probe

CHARACTERS_PER_TOKEN = 3.6  # English prose under a vocabulary of 150,000, where no tokenizer can be had
TEMPLATE = 40  # characters that a prompt's template adds, likewise
READ_ROWS = 20_000  # rows of a split that are rendered one by one; of more, this many, drawn evenly, stand for all


@dataclass(frozen=True)
class Prospect:
    """A model that is there, or that a stage will make.

    Attributes:
        config: its transformers config.
        size: its parameters.
        tokenizer: gives its tokenizer; None where it cannot be had yet.
        where: `path:…` or `hf:…` of a model that is there; "" of one to be made.
        bits: of the weights of its quantised layers; 0 where it has none.
    """

    config: Any
    size: Size
    tokenizer: Callable[[], Any | None] = lambda: None
    where: str = ""
    bits: int = 0


@dataclass(frozen=True)
class RowsOf:
    """The rows of one split as tokens.

    Attributes:
        kept: rows that fit.
        left_out: rows that do not enter, by reason.
        shortened: rows whose context lost its end.
        prompt, response: mean tokens of a kept row.
        longest, longest_prompt: tokens of the longest kept row, and of the longest kept prompt.
        too_long: tokens of the longest row that is too long; 0 where none is.
        lengths: (prompt, response) tokens of some kept rows.
        keys: different keys of kept rows: the bootstrap's groups.
        counted: whether tokens were counted by the model's own tokenizer in answers that are there; else they are guessed.
        share: of the split's rows that were read.
    """

    split: Split
    kept: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    shortened: int = 0
    prompt: float = 0.0
    response: float = 0.0
    longest: int = 0
    longest_prompt: int = 0
    too_long: int = 0
    lengths: tuple[tuple[int, int], ...] = ()
    keys: int = 0
    counted: bool = True
    share: float = 1.0

    @property
    def tokens(self) -> float:
        """Mean tokens of a kept row."""
        return self.prompt + self.response

    @property
    def rows(self) -> int:
        return self.kept + sum(self.left_out.values())

    def sentence(self) -> str:
        """`train: 227 of 248 rows (left out: 21 response too long, the longest 131 tokens); 41 + 18 tokens a row …`."""
        text = f"{self.split}: {self.kept:,} of {self.rows:,} rows"
        longest = f", the longest {self.too_long:,} tokens" if self.too_long else ""
        text += f" (left out: {left}{longest})" if (left := reasons(self.left_out)) else ""
        text += f", {self.shortened:,} contexts shortened" if self.shortened else ""
        text += f"; {self.prompt:.0f} + {self.response:.0f} tokens a row, {self.longest:,} at most"
        text += "" if self.counted else ", guessed: no tokenizer, or no answers yet"
        return text + ("" if self.share == 1 else f", from {self.share:.0%} of the rows")


@dataclass(frozen=True)
class Step:
    """What one optimiser step trains; for what several GPUs would make of it.

    Attributes:
        row_tokens: mean tokens of a row.
        longest: tokens of the longest row allowed.
        flops: of a step, all GPUs together.
        shard_teacher: whether each GPU would hold a part of the teacher.
    """

    size: Size
    teacher: Size | None
    row_tokens: float
    longest: int
    flops: float
    shard_teacher: bool = False


@dataclass(frozen=True)
class Cost:
    """What a stage takes; None where it cannot be known yet.

    Attributes:
        tokens, response_tokens: that pass through the model, over all epochs.
        seconds: on this machine.
        memory_bytes: of the process at its peak.
        output_bytes: written and kept.
        cache_bytes: written, of a teacher's targets.
        less_memory: the field that would lower the peak, and how.
        rows: what it reads.
        note: why something is not known.
    """

    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    response_tokens: int | None = None
    flops: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    output_bytes: int | None = None
    cache_bytes: int | None = None
    less_memory: str = ""
    rows: tuple[RowsOf, ...] = ()
    step: Step | None = None
    note: str = ""


class Describes(Protocol):
    """What the outlook asks of a stage."""

    name: str

    def reading(self, folder: Callable[[StageRef], Path | None], foretold: Callable[[str], Any]) -> Any: ...

    def prospect(self, outlook: "Outlook") -> Prospect | None: ...


class Outlook:
    """The stages so far, what they will make, and what was found out about rows and models; each thing is looked up once.

    Args:
        done: folders of stages that are done already, by name: what they made is looked at instead of guessed.
        measure: whether passes may be timed, which takes seconds for each config.
        seeds: how many seeds a stage with `per_seed` is repeated for.
    """

    def __init__(self, done: Mapping[str, str] | None = None, *, measure: bool = False, seeds: int = 1) -> None:
        self.done = dict(done or {})
        resting_memory()  # measured before models come
        self.seeds = seeds
        self.measure = measure
        self.stages: dict[str, Any] = {}
        self.kept: set[str] = set()  # teachers' targets that an earlier stage will have kept
        self._models: dict[str, Prospect | UserError | None] = {}
        self._rows: dict[tuple[Any, ...], RowsOf] = {}
        self._probes: dict[str, Probe | None] = {}

    def share(self, other: "Outlook") -> None:
        """Take over what another one found out about rows, models that are there, and passes."""
        self._models |= {key: found for key, found in other._models.items() if not key.startswith("stage:")}
        self._rows, self._probes = other._rows, other._probes

    def reading(self, stage: Describes) -> Any:
        """A stage whose rows are those that an earlier one wrote, or else those that it will write them for."""

        def folder(ref: StageRef) -> Path | None:
            return Path(self.done[ref.target]) if ref.target in self.done else None

        return stage.reading(folder, self.stages.get)

    def add(self, stage: Describes) -> None:
        """Take in a stage; later ones may refer to it."""
        stage = self.reading(stage)
        self.stages[stage.name] = stage
        folder = self.done.get(stage.name)
        try:
            self._models[f"stage:{stage.name}"] = there(f"path:{folder}") if folder else stage.prospect(self)
        except UserError:  # the stage's own problem, which it tells itself
            self._models[f"stage:{stage.name}"] = None

    def stage(self, ref: StageRef | None) -> Any | None:
        """The stage of the recipe that a reference names; None: it names none, or one that is not known yet."""
        return self.stages.get(ref.target) if ref is not None and ref.scheme == "stage" else None

    def model(self, ref: StageRef) -> Prospect | None:
        """The model behind a reference; None where nothing is known of it yet.

        Raises:
            UserError: it is no model, or cannot be read.
        """
        key = str(ref)
        if ref.scheme == "stage":
            found = self._models.get(key)
        else:
            if key not in self._models:
                try:
                    self._models[key] = there(key)
                except UserError as error:
                    self._models[key] = error
            found = self._models[key]
        if isinstance(found, UserError):
            raise found
        return found

    def behind(self, ref: StageRef) -> list[Any]:
        """The stages that make what a reference names, and all that these refer to in turn."""
        found: dict[str, Any] = {}
        waiting = [ref]
        while waiting:
            one = waiting.pop()
            stage = self.stage(one)
            if stage is not None and stage.name not in found:
                found[stage.name] = stage
                waiting += [inner for _, inner in stage.references()]
        return list(found.values())

    def seeds_of(self, ref: StageRef) -> int:
        """How many seeds the models behind a reference will have: a stage is repeated for its own sake or for its inputs'."""
        stage = self.stage(ref)
        if stage is None:
            return 1
        if stage.per_seed:
            return self.seeds
        return 1 if stage.gathers else max((self.seeds_of(inner) for _, inner in stage.references()), default=1)

    def tokenizer(self, ref: StageRef) -> Any | None:
        """The tokenizer of a model; None where it cannot be had yet."""
        found = self.model(ref)
        return found.tokenizer() if found is not None else None

    def rows(self, data: Source, prompts: Prompts, ref: StageRef | None, split: Split) -> RowsOf:
        """The rows of a split as a model sees them.

        Raises:
            UserError: a row cannot be read or rendered; names it.
        """
        tokenizer = self.tokenizer(ref) if ref is not None else None
        key = (str(data.spec()), prompts.model_dump_json(), split, id(tokenizer) if tokenizer is not None else None)
        if key not in self._rows:
            rows = read_rows(data, prompts, tokenizer, split)
            self._rows[key] = replace(rows, counted=False) if data.foretold and split == "train" else rows
        return self._rows[key]

    def rows_left_out(self) -> list[tuple[str, str]]:
        """What is known of rows that do not enter, or lose a part of their context, once for each split and way to read it.

        Each with the fields of its source, as `str(source.spec())` has them.
        """
        lossy = ((spec, rows) for (spec, *_), rows in self._rows.items() if any(rows.left_out.values()) or rows.shortened)
        found = ((spec, rows.sentence()) for spec, rows in lossy)
        return list(dict.fromkeys(found))

    def template_problems(self, data: Source, prompts: Prompts, ref: StageRef | None, split: Split) -> list[str]:
        """Every habit of the reader's chat template that breaks the law of prompts on these rows."""
        tokenizer = self.tokenizer(ref) if ref is not None else None
        return template_problems(tokenizer, prompts, data.examples(split)) if tokenizer is not None else []

    def probe(self, config: Any, rows: RowsOf, precision: str = "auto") -> Probe | None:
        """What a pass of a config takes here; None where it is not to be measured."""
        if not self.measure or not rows.lengths:
            return None
        key = f"{config.to_json_string()}{precision}"
        if key not in self._probes:
            try:
                self._probes[key] = probe(config, rows.lengths, precision)
            except UserError:  # of a hybrid, whose first layers alone are of one kind and cannot be read
                self._probes[key] = None
        return self._probes[key]


class _Loaded:
    """A model's tokenizer, loaded when it is first asked for."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self) -> Any | None:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any | None:
        try:
            return load_tokenizer(self.where)
        except UserError:
            if self.where.startswith("hf:"):  # out of reach now is no mistake of the recipe's
                return None
            raise


def there(where: str) -> Prospect:
    """A model that can be looked at.

    Raises:
        UserError: it is no model, or cannot be read.
    """
    config = config_of(where, offline_shape=True)
    if where.startswith("path:"):
        for problem in weight_problems(where):
            raise UserError(problem)
    tokenizer = _Loaded(where)
    tokenizer()  # or a stage would find out after hours that there is none
    check_exact(config)
    return Prospect(config, size_of(config), tokenizer, where, bits_of(where))


def made_from(found: Prospect | None, **changed: Any) -> Prospect | None:
    """A model that a stage makes of another one, whose tokenizer it keeps."""
    return replace(found, **{"where": "", **changed}) if found is not None else None


def read_rows(data: Source, prompts: Prompts, tokenizer: Any | None, split: Split) -> RowsOf:
    """Read a split's rows and count their tokens; every row is parsed, at most `READ_ROWS` are rendered.

    Raises:
        UserError: a row cannot be read or rendered; names it.
    """
    left_out: Counter[str] = Counter()
    examples = data.examples(split, left_out)
    if tokenizer is None:
        return _guessed(split, examples, prompts, left_out)
    total = sum(1 for _ in data.examples(split))
    every = -(-total // READ_ROWS) if total else 1
    renderer, counts = Renderer(tokenizer, prompts), Counts()
    seen: list[Example] = []

    def chosen() -> Iterator[Example]:
        for number, example in enumerate(examples):
            if number % every == 0:
                seen.append(example)
                yield example

    lengths = [(len(prompt), len(response)) for prompt, response in instruction_pairs(chosen(), renderer, counts)]
    scale = total / len(seen) if seen else 1.0
    left_out.update({reason: round(n * scale) for reason, n in counts.dropped.items()})
    kept = round(len(lengths) * scale)
    return RowsOf(
        split,
        kept,
        dict(left_out),
        round(counts.context_shortened * scale),
        _mean([prompt for prompt, _ in lengths]),
        _mean([response for _, response in lengths]),
        max((prompt + response for prompt, response in lengths), default=0),
        max((prompt for prompt, _ in lengths), default=0),
        counts.longest,
        tuple(lengths[:256]),
        round(len({example.key for example in seen}) * scale),
        share=1 / scale,
    )


def _guessed(split: Split, examples: Iterable[Example], prompts: Prompts, left_out: Counter[str]) -> RowsOf:
    """Tokens from characters."""
    lengths, keys = [], set()
    for example in examples:
        asked = len(example.instruction) + len(example.context) + TEMPLATE
        prompt = min(round(asked / CHARACTERS_PER_TOKEN), prompts.max_prompt_tokens)
        response = round(len(example.response) / CHARACTERS_PER_TOKEN) + 1
        keys.add(example.key)
        if prompt + response > prompts.max_tokens:
            left_out["response too long"] += 1
        else:
            lengths.append((prompt, response))
    return RowsOf(
        split,
        len(lengths),
        dict(left_out),
        0,
        _mean([prompt for prompt, _ in lengths]),
        _mean([response for _, response in lengths]),
        max((prompt + response for prompt, response in lengths), default=0),
        max((prompt for prompt, _ in lengths), default=0),
        0,
        tuple(lengths[:256]),
        len(keys),
        counted=False,
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0

"""What all stages share: their names, their references to each other, and what they are given to work with."""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from potstill.core.artifact import MANIFEST, Artifact, Makes
from potstill.core.component import Component, Settings
from potstill.core.errors import Problem, UserError
from potstill.core.types import Example, Split
from potstill.data.prompts import Prompts
from potstill.data.store import to_raise, too_many_left_out
from potstill.edges.models import positions_of
from potstill.sources import Source
from potstill.stages.outlook import Cost, Outlook, Prospect, RowsOf
from potstill.stages.refs import ModelRef, StageRef
from potstill.study.words import reasons
from potstill.train.work import Work


@dataclass
class Context:
    """What a running stage is given.

    Attributes:
        work: its folder, log and progress.
        inputs: for each `stage:NAME` it refers to, the artifacts (several when students are trained per seed).
        provenance: what a report prints of how it came to be.
        lineage: every finished artifact of the run so far, for reports.
        shared: a folder that the run's stages share; what lies there can be computed again. None: next to the work folder.
        code: number of the mathematics in use: values that others made in `shared` are not read. See `fingerprints.CODE`.
    """

    work: Work
    inputs: Mapping[str, Sequence[Artifact]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    lineage: Sequence[Artifact] = ()
    shared: Path | None = None
    code: int = 0

    def artifacts(self, ref: StageRef) -> list[Artifact]:
        """All artifacts behind a reference: one, or one per seed."""
        if ref.scheme == "stage":
            return list(self.inputs[ref.target])
        return [Artifact.load(Path(ref.target).expanduser())]

    def made(self, ref: StageRef) -> list[Artifact]:
        """`artifacts`; none of a model that no stage made."""
        no_stage = ref.scheme == "hf" or (ref.scheme == "path" and not (Path(ref.target).expanduser() / MANIFEST).is_file())
        return [] if no_stage else self.artifacts(ref)

    def where(self, ref: ModelRef) -> str:
        """`path:…` or `hf:…` of a reference to one model."""
        return f"path:{self.inputs[ref.target][0].folder}" if ref.scheme == "stage" else str(ref)


NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
SWEPT = re.compile(rf"{NAME.pattern}\.[A-Za-z0-9_.,=+-]+")  # `kd.lr=0.0001`: one value of a sweep; no user writes such a name
RESERVED = {"name", "description", "seeds", "log", "data", "prompts", "checkpoint", "sweep", "stage"}
NAME_RULE = "must be letters, digits, '-' or '_', begin with a letter, and not be one of " + ", ".join(sorted(RESERVED))


class Stage(Component):
    """One step: reads artifacts, writes one.

    `name`, `seed` and the fields below are common to all; a stage's `run` writes into `context.work.folder` and returns the
    summary that its manifest keeps.
    """

    makes: ClassVar[Makes] = "model"
    gathers: ClassVar[bool] = False  # sees all seeds of its inputs at once, instead of being repeated for each
    across_seeds: ClassVar[bool] = False  # is repeated for each seed, and yet sees all: its own first
    validated: ClassVar[bool] = False  # measures itself while it trains, by `validation`; so its fields can be swept
    shared: ClassVar[bool] = False  # under torchrun all processes run it together, instead of the first alone
    ignored: ClassVar[tuple[str, ...]] = ("name", "per_seed")  # fields that cannot change the result

    name: str = Field(default="", description="how later stages refer to it")
    seed: int = Field(default=0, ge=0, lt=2**31, description="order of rows, sampling, new weights")
    per_seed: bool = Field(default=False, description="train once for each of the recipe's `seeds`")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if name and not SWEPT.fullmatch(name) and (not NAME.fullmatch(name) or name in RESERVED):
            raise ValueError(NAME_RULE)
        return name

    def references(self) -> list[tuple[str, StageRef]]:
        """Every reference in the stage's fields, with its place."""
        return [(place, value) for place, value in walk(self) if isinstance(value, StageRef)]

    def reading(self, folder: Callable[[StageRef], Path | None], foretold: Callable[[str], "Stage | None"]) -> "Stage":
        """The same stage, where what it reads is bound to what an earlier one wrote.

        Args:
            folder: of what a stage made; None where it has not run.
            foretold: a stage that has not run, by its name.
        """
        return self

    def writes(self) -> tuple[Source, int] | None:
        """The rows that it writes answers for, and how many for each; None where it writes none."""
        return None

    def sources(self) -> list[Source]:
        """The data it reads."""
        data = getattr(self, "data", None)
        return [data] if data is not None else []

    def mismatches(self, earlier: Mapping[str, "Stage"]) -> Iterator[tuple[str, str]]:
        """What does not fit the stages that it refers to, by their fields alone: place and rule of each."""
        return iter(())

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        """What cannot succeed, as far as it can be known before anything runs; places are fields of this stage."""
        return iter(())

    def notes(self) -> Iterator[str]:
        """What a person must know of its fields before it runs, and what to do about it."""
        return iter(())

    def learned_rows(self) -> Iterator[Example]:
        """The rows whose answers a model will be trained on; none where nothing is trained."""
        return iter(())

    def prospect(self, outlook: Outlook) -> Prospect | None:
        """The model that this stage will make; None where it makes none, or too little is known.

        Raises:
            UserError: there can be no such model; `problems` says so too.
        """
        return None

    def cost(self, outlook: Outlook) -> Cost:
        """What this stage takes. Raises UserError like `prospect`."""
        return Cost()

    def could_show(self, outlook: Outlook) -> str:
        """The smallest difference that it could show, in words; "" where it compares nothing."""
        return ""

    def closing(self, summary: dict[str, Any]) -> str:
        """The stage's own figures for the line that says it is done."""
        return ""

    @abstractmethod
    def run(self, context: Context) -> dict[str, Any]:
        """Do the work; return the summary."""


def walk(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside a stage's fields with its place, the stage itself first."""
    yield place, value
    if isinstance(value, Settings):
        for name in type(value).model_fields:
            yield from walk(getattr(value, name), f"{place}.{name}" if place else name)
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from walk(item, f"{place}[{i}]")


class DataStage(Stage):
    """A stage that reads rows. `data` and `prompts` default to the recipe's own."""

    data: Source = Field(description="rows; default: the recipe's `data`")
    prompts: Prompts = Field(default=Prompts(), description="how rows become tokens; default: the recipe's `prompts`")

    def reading(self, folder: Callable[[StageRef], Path | None], foretold: Callable[[str], Stage | None]) -> Stage:
        ref = self.data.written_by()
        if ref is None or ref.scheme != "stage":
            return self
        found = folder(ref)
        if found is not None:
            return self.model_copy(update={"data": self.data.found_in(found)})
        writer = foretold(ref.target)
        writes = writer.writes() if writer is not None else None
        return self.model_copy(update={"data": self.data.foretold_by(*writes)}) if writes is not None else self

    def reader(self) -> ModelRef | None:
        """The model whose tokenizer and template turn the rows into tokens; None: the stage's own tokenizer."""
        return None

    def splits(self) -> tuple[Split, ...]:
        """The splits it reads; the first must not be empty."""
        return ("train",)

    def problems(self, outlook: Outlook) -> Iterator[Problem]:
        reader = self.reader()
        try:
            if reader is not None:
                outlook.tokenizer(reader)
        except UserError:  # the stage says so at its own field; the rows may be wrong too
            reader = None
        for number, split in enumerate(self.splits()):
            try:
                rows = outlook.rows(self.data, self.prompts, reader, split)
            except UserError as error:
                yield from self._unread(outlook, reader, split, error)
                return
            if not rows.counted and (rows.kept or any(rows.left_out.values())):
                continue  # lengths guessed from characters refuse nothing
            if not rows.kept and number == 0:
                yield Problem("data", empty_split(rows))
            elif lost := too_many_left_out(rows.kept, rows.left_out, rows.too_long, self.prompts.most_left_out):
                prompt, response = (rows.left_out.get(f"{part} too long", 0) for part in ("prompt", "response"))
                field = "max_prompt_tokens" if prompt > response else "max_tokens"
                yield Problem(f"prompts.{field}", f"{split} split: {lost}", str(getattr(self.prompts, field)))

    def _unread(self, outlook: Outlook, reader: ModelRef | None, split: Split, error: UserError) -> Iterator[Problem]:
        """What a row's refusal comes from: each habit of the template once, else the row itself."""
        try:
            habits = outlook.template_problems(self.data, self.prompts, reader, split)
        except UserError:  # the rows themselves cannot be read
            habits = []
        yield from (Problem("prompts", habit) for habit in habits)
        if not habits:
            yield Problem("data", str(error))


def position_problems(outlook: Outlook, stage: "DataStage", config: Any, who: str) -> Iterator[Problem]:
    """Rows that run past a model's positions."""
    limit = positions_of(config)
    try:
        read = [outlook.rows(stage.data, stage.prompts, stage.reader(), split) for split in stage.splits()]
    except UserError:  # the rows' own problem
        return
    longest = max((rows.longest for rows in read), default=0)
    if limit is not None and longest > limit:
        rule = f"a row has {longest:,} tokens, and {who} has {limit:,} positions; set it to at most {limit:,}"
        yield Problem("prompts.max_tokens", rule, str(stage.prompts.max_tokens))


def answer_problems(field: str, new: int, prompt: int, limit: int | None, who: str) -> Iterator[Problem]:
    """An answer behind the longest prompt that runs past a model's positions.

    Args:
        field: that says how long an answer may be, `new` tokens.
        limit: the positions; None: there is none.
    """
    if limit is None or prompt + new <= limit:
        return
    if prompt < limit:
        rule = f"a prompt of {prompt:,} tokens and an answer are up to {prompt + new:,}, and {who} has {limit:,} positions; "
        yield Problem(field, f"{rule}set it to at most {limit - prompt:,}, or lower prompts.max_prompt_tokens", str(new))
    else:
        remedy = f"set it to at most {limit - new:,}" if new < limit else f"lower it, and {field} = {new:,} too"
        rule = f"a prompt has {prompt:,} tokens, and {who} {limit:,} positions, which leave none for an answer; {remedy}"
        yield Problem("prompts.max_prompt_tokens", rule)


def empty_split(rows: RowsOf) -> str:
    """Why no row of a split is left, and the remedy."""
    why = f" ({reasons(rows.left_out)})" if rows.left_out else ""
    fields = to_raise(rows.left_out, rows.too_long)
    remedy = f"raise {fields}" if fields else "give it more rows, or set data.splits"
    return f"the {rows.split} split is empty{why}; {remedy}"

"""What all stages share: their names, their references to each other, and what they are given to work with."""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, GetCoreSchemaHandler, field_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from potstill.core.artifact import Artifact, Makes
from potstill.core.component import Component, Settings
from potstill.core.errors import UserError
from potstill.core.types import Split
from potstill.data.prompts import Prompts
from potstill.sources import Source
from potstill.train.work import Work


class StageRef(str):
    """`stage:NAME`: what an earlier stage made."""

    schemes: ClassVar[tuple[str, ...]] = ("stage",)
    accepts: ClassVar[tuple[Makes, ...]] = ("evaluation",)

    @property
    def scheme(self) -> str:
        return self.partition(":")[0]

    @property
    def target(self) -> str:
        return self.partition(":")[2]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def _parse(cls, value: Any) -> "StageRef":
        if isinstance(value, Artifact):
            value = f"path:{value.folder}"
        if not isinstance(value, str | Path):
            raise PydanticCustomError("reference", "must be text such as '{scheme}:…'", {"scheme": cls.schemes[0]})
        scheme, colon, target = str(value).partition(":")
        if not colon or scheme not in cls.schemes or not target:
            known = " or ".join(f"'{scheme}:…'" for scheme in cls.schemes)
            raise PydanticCustomError("reference", "must begin with {known}", {"known": known})
        return cls(value)


class ModelRef(StageRef):
    """`stage:NAME`, `hf:ORG/NAME` (or `hf:ORG/NAME@REVISION`), or `path:FOLDER`: a model."""

    schemes = ("stage", "hf", "path")
    accepts = ("model",)


class CacheRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: what a `cache` stage made."""

    schemes = ("stage", "path")
    accepts = ("cache",)


class StudyRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: an evaluation."""

    schemes = ("stage", "path")


@dataclass
class Context:
    """What a running stage is given.

    Attributes:
        work: its folder, log and progress.
        inputs: for each `stage:NAME` it refers to, the artifacts (several when students are trained per seed).
        provenance: what a report prints of how it came to be.
        lineage: every finished artifact of the run so far, for reports.
        shared: a folder that the run's stages share; what lies there can be computed again. None: next to the work folder.
    """

    work: Work
    inputs: Mapping[str, Sequence[Artifact]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    lineage: Sequence[Artifact] = ()
    shared: Path | None = None

    def artifacts(self, ref: StageRef) -> list[Artifact]:
        """All artifacts behind a reference: one, or one per seed."""
        if ref.scheme == "stage":
            return list(self.inputs[ref.target])
        return [Artifact.load(Path(ref.target).expanduser())]

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
    shared: ClassVar[bool] = False  # under torchrun all processes run it together, instead of the first alone
    validated: ClassVar[bool] = False  # validates while it trains, so that a sweep can pick by that
    ignored: ClassVar[tuple[str, ...]] = ("name", "per_seed")  # fields that cannot change the result

    name: str = Field(default="", description="how later stages refer to it")
    seed: int = Field(default=0, ge=0, lt=2**31, description="order of rows, sampling, new weights")
    per_seed: bool = Field(default=False, description="train anew for each of the recipe's `seeds`")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if name and not SWEPT.fullmatch(name) and (not NAME.fullmatch(name) or name in RESERVED):
            raise ValueError(NAME_RULE)
        return name

    def references(self) -> list[tuple[str, StageRef]]:
        """Every reference in the stage's fields, with its place."""
        return [(place, value) for place, value in walk(self) if isinstance(value, StageRef)]

    def sources(self) -> list[Source]:
        """The data it reads."""
        data = getattr(self, "data", None)
        return [data] if data is not None else []

    def mismatches(self, earlier: Mapping[str, "Stage"]) -> Iterator[tuple[str, str]]:
        """What does not fit the stages that it refers to, by their fields alone: place and rule of each."""
        return iter(())

    def preflight(self) -> None:
        """Refuse, before hours of work on earlier stages, what cannot succeed.

        Raises:
            UserError: the data cannot be read, or the split that the stage needs is empty.
        """

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

    def preflight(self) -> None:
        split: Split = getattr(self, "split", "train")
        skipped: Counter[str] = Counter()
        if next(self.data.examples(split, skipped), None) is None:
            why = f" ({', '.join(f'{n:,} {reason}' for reason, n in skipped.items())})" if skipped else ""
            raise UserError(
                f"{self.name or self.kind}: the {split} split of the data of kind '{self.data.kind}' is empty{why}; "
                "give it more rows, or set data.splits"
            )

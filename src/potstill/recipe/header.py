"""A recipe's own fields, and what a checked recipe is."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from potstill.core.component import Settings
from potstill.data.prompts import Prompts
from potstill.sources import Source
from potstill.stages.base import NAME, Stage
from potstill.train.work import CheckpointRules


class Header(Settings):
    """A recipe's own fields; what stages share stands here once."""

    name: str = Field(description="the run's folder is runs/NAME unless --out says otherwise")
    description: str = ""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="stages with per_seed = true are trained for each")
    log: tuple[Literal["tensorboard"], ...] = Field(default=(), description="where figures go besides metrics.jsonl")
    checkpoint: CheckpointRules = CheckpointRules()
    data: Source | None = Field(default=None, description="rows for every stage that names none")
    prompts: Prompts = Field(default=Prompts(), description="how rows become tokens, for every stage that does not say")
    sweep: dict[str, Any] = Field(default={}, description='values of stages\' fields to try: "STAGE.FIELD" = [ … ], and `by`')

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("must be letters, digits, '-' or '_', and begin with a letter")
        return name

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
            raise ValueError("must be different whole numbers from 0 to 2147483647")
        return seeds


@dataclass(frozen=True)
class Recipe:
    """Checked stages in order, and the file they came from; a swept stage stands there once for each value, then as `best`."""

    header: Header
    stages: tuple[Stage, ...]
    source: str
    table: dict[str, Any]

    @property
    def name(self) -> str:
        return self.header.name

"""A recipe's own fields, and what a checked recipe is."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from potstill.core.component import Settings
from potstill.core.errors import Problem, RecipeError
from potstill.data.prompts import Prompts
from potstill.recipe.places import by_file, within
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


@dataclass(frozen=True)
class Parsed:
    """A recipe file as far as it could be read, with all that is wrong in it.

    Attributes:
        table: what the file says, with overrides.
        header: None where its `name` is missing or wrong; a wrong field aside from that stands at its default.
        stages: one for each `[[stage]]`, a swept one with the first of its values; None where it cannot be read without a
            guess. Fields that are wrong stand at their defaults: `wounds` names them.
        labels: what messages call each of `stages`: its name, or `stage[2]`.
        expanded: the readable stages in order, a swept one once for each value and then as `best`.
        wounds: for each of `stages`, the places that are not the file's.
        problems: all mistakes, in the order of the file.
        recipe: None where there are problems.
    """

    source: str
    table: dict[str, Any]
    header: Header | None
    stages: tuple[Stage | None, ...]
    labels: tuple[str, ...]
    expanded: tuple[Stage, ...]
    wounds: tuple[tuple[str, ...], ...]
    problems: tuple[Problem, ...]
    recipe: Recipe | None

    def checked(self, more: Iterable[Problem] = ()) -> Recipe:
        """The recipe, if neither the file nor what was found since has a mistake.

        Args:
            more: problems that a preflight found, with places that begin with the stage's name. Those at a place that the
                file has wrong, for the stage or for all stages, are left out, because they only follow from that mistake.

        Raises:
            RecipeError: all problems, in the order of the file.
        """
        known = {problem.place for problem in self.problems} - set(self.labels)
        fresh = [
            problem
            for problem in more
            if not self._wounded(problem.place) and not any(within(wrong, self._written(problem.place)) for wrong in known)
        ]
        problems = by_file([*self.problems, *fresh], self.table)
        if problems or self.recipe is None:
            raise RecipeError(Path(self.source).name, problems)
        return self.recipe

    def _wounded(self, place: str) -> bool:
        """Whether a place of a stage, or one in it, stands at a default because the file has it wrong."""
        return any(
            within(place, f"{label}.{wound}") or within(f"{label}.{wound}", place)
            for label, wounds in zip(self.labels, self.wounds, strict=True)
            if within(place, label) and place != label
            for wound in wounds
        )

    def _written(self, place: str) -> str:
        """Where the file says what a stage has at a place: `data` for `kd.data` where only the header names rows."""
        raw_stages = self.table.get("stage")
        for label, raw in zip(self.labels, raw_stages if isinstance(raw_stages, list) else (), strict=False):
            field = place.removeprefix(f"{label}.")
            shared = field.partition(".")[0]
            if field != place and shared in ("data", "prompts") and isinstance(raw, dict) and shared not in raw:
                return field
        return place

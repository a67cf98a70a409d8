"""The two ways a run can end early through no fault of ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(Exception):
    """A mistake that the user can mend: says what, where and the remedy. The command line exits with 2."""


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """A refusal inside says whose it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the work so far is saved. The command line exits with 130."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: its place, what stood there, and the rule it breaks."""

    place: str
    rule: str
    value: str | None = None

    def __str__(self) -> str:
        return f"{self.place} = {self.value}" if self.value is not None else self.place


class RecipeError(UserError):
    """All the mistakes of one recipe, in the order of the file."""

    def __init__(self, source: str, problems: Sequence[Problem], what: str = "") -> None:
        """
        Args:
            what: of the problems, after their number.
        """
        self.source, self.problems = source, list(problems)
        count = ("1 problem" if len(problems) == 1 else f"{len(problems)} problems") + what
        width = min(48, max(len(str(problem)) for problem in problems))
        lines = [f"  {problem!s:<{width}}  {problem.rule}" for problem in problems]
        super().__init__("\n".join([f"{source}: {count}", *lines]))

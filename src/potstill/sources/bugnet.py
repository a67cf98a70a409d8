"""Programs that failed, with what was said of them, and the program that was accepted."""

from typing import ClassVar

from pydantic import Field

from potstill.core.types import Case, Example, Tests
from potstill.sources._cells import Row, column, text
from potstill.sources._published import LeftOut, Published, fenced, optional
from potstill.sources._repair import repair


class BugNet(Published, kind="bugnet"):
    """Consecutive attempts at a contest problem, the last one accepted. Jercan, alexjercan/bugnet, 2023, out of CodeNet.

    From the hub, or from `path` with the same rows as JSON lines: `problem_id, language, original_status, fail, pass, error`,
    and where there are any `description, input, output`. Rows in `only`'s language; others are left out. Split by problem. The
    program is judged by `input` and `output` where a row has both; rows without have no tests, and the metric `repaired`
    abstains from them.
    """

    needed: ClassVar[tuple[str, ...]] = ("instruction", "response")

    hub: str = Field(default="alexjercan/bugnet", min_length=1, description="name of the data set on the hub")
    subset: str | None = Field(default="Python", min_length=1, description="the data set's configuration")
    only: str = Field(default="Python", min_length=1, description="language of the rows that are read, as the rows name it")
    statement: bool = Field(default=True, description="show the problem's description, where a row has one")

    def example(self, row: Row, place: str) -> Example:
        failing, accepted = text(row, "fail", place), text(row, "pass", place)
        told = optional(row, "description", place).strip() if self.statement else ""
        message = optional(row, "error", place).strip() or optional(row, "original_status", place).strip()
        stdin, stdout = optional(row, "input", place), optional(row, "output", place)
        example = Example(
            key=str(column(row, "problem_id", place)),
            instruction=repair(failing, task=told, message=message) if failing.strip() else "",
            response=fenced(accepted) if accepted.strip() else "",
            language="en",
            tag=optional(row, "original_status", place),
            tests=Tests(cases=(Case(stdin, stdout),)) if stdin.strip() and stdout.strip() else None,
        )
        if (found := optional(row, "language", place)) and found != self.only:
            raise LeftOut(example, f"not in {self.only}")
        return example

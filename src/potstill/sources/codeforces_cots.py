"""Contest problems with chains of thought."""

from typing import Any, ClassVar

from pydantic import Field

from potstill.core.types import Case, Example, Tests
from potstill.sources._cells import Row, text
from potstill.sources._published import LeftOut, Published, cases, items, optional


class CodeforcesCots(Published, kind="codeforces_cots"):
    """Problems of Codeforces, answered by R1 with its thoughts. Penedo et al., open-r1/codeforces-cots, 2025; CC BY 4.0.

    From the hub, or from `path` with the same rows as JSON lines: `id, title, description, input_format, output_format, note,
    examples, generation, finish_reason`. Rows of the shape `id, title, statement, tests` (each test `kind, input, output`) are
    read too; where these have no `generation`, they are questions alone. Split by problem: all answers to one lie in one split.

    Tests are `official_tests` where a row has them, else the `examples`, which the statement shows: a program can pass those by
    printing them. Of rows with `tests` those not of kind "sample" judge, where there are any. Left out: answers that were cut
    (`finish_reason` other than "stop") and interactive problems.
    """

    needed: ClassVar[tuple[str, ...]] = ("instruction",)

    hub: str = Field(default="open-r1/codeforces-cots", min_length=1, description="name of the data set on the hub")
    subset: str | None = Field(default="solutions_py", min_length=1, description="the data set's configuration")

    def example(self, row: Row, place: str) -> Example:
        key = text(row, "id", place)
        judged, shown = _tests(row, place)
        example = Example(
            key=key,
            instruction=text(row, "statement", place).strip() if "statement" in row else _statement(row, shown, place),
            response=optional(row, "generation", place).strip(),
            language="en",
            tests=Tests(cases=judged) if judged else None,
        )
        if optional(row, "finish_reason", place) not in ("", "stop"):
            raise LeftOut(example, "the answer was cut")
        if optional(row, "interaction_format", place).strip():
            raise LeftOut(example, "an interactive problem")
        return example


def _tests(row: Row, place: str) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The tests that judge, and those that the statement shows."""
    if "tests" in row:
        every = items(row, "tests", place)
        hidden = [test for test in every if not (isinstance(test, dict) and test.get("kind") == "sample")]
        return cases(hidden or every, "tests", place), ()
    shown = cases(items(row, "examples", place), "examples", place) if "examples" in row else ()
    official: list[Any] = items(row, "official_tests", place) if "official_tests" in row else []
    return cases(official, "official_tests", place) or shown, shown


def _statement(row: Row, shown: tuple[Case, ...], place: str) -> str:
    parts = [text(row, "title", place), text(row, "description", place)]
    for name, title in (("input_format", "Input"), ("output_format", "Output")):
        if told := optional(row, name, place).strip():
            parts.append(f"{title}\n{told}")
    parts += [f"Example input:\n{case.stdin.rstrip()}\nExample output:\n{case.expected.rstrip()}" for case in shown]
    if note := optional(row, "note", place).strip():
        parts.append(f"Note\n{note}")
    return "\n\n".join(part.strip() for part in parts if part.strip())

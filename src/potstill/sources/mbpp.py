"""Short Python problems with asserts."""

from typing import ClassVar

from pydantic import Field

from potstill.core.types import Example, Tests
from potstill.sources._cells import Row, texts
from potstill.sources._published import Published, fenced, first_of, optional, unix
from potstill.sources._survey import asked_key


class Mbpp(Published, kind="mbpp"):
    """Functions to write, judged by asserts. Austin et al., arXiv:2108.07732; CC BY 4.0.

    From the hub, or from `path` with the same rows (`text, code, test_list` and, where there are any, `test_setup_code`,
    `test_imports`, `challenge_test_list`) as JSON lines; the sanitised rows, whose question is `prompt`, too. Split by
    question. The statement shows the first `shown` asserts, without which nobody could know the function's name; all asserts
    judge.
    """

    needed: ClassVar[tuple[str, ...]] = ("instruction", "response")

    hub: str = Field(default="google-research-datasets/mbpp", min_length=1, description="name of the data set on the hub")
    subset: str | None = Field(default="full", min_length=1, description="the data set's configuration")
    shown: int = Field(default=1, ge=1, description="asserts that the statement shows")
    challenge: bool = Field(default=False, description="whether the data set's challenge asserts judge too")

    def example(self, row: Row, place: str) -> Example:
        asked = first_of(row, ("text", "prompt"), place).strip()
        asserts = texts(row, "test_list", place)
        more = texts(row, "challenge_test_list", place) if self.challenge and "challenge_test_list" in row else ()
        setup = [unix(optional(row, "test_setup_code", place))]
        setup += texts(row, "test_imports", place) if "test_imports" in row else ()
        judged = "\n".join(part for part in (*setup, *(unix(test) for test in (*asserts, *more))) if part.strip())
        shown = "\n".join(unix(test).strip() for test in asserts[: self.shown])
        code = first_of(row, ("code",), place)
        return Example(
            key=asked_key(asked),
            instruction=f"{asked}\nThe program must pass this test:\n{shown}" if shown else asked,
            response=fenced(code) if code.strip() else "",
            language="en",
            tests=Tests(asserts=judged) if asserts else None,
        )

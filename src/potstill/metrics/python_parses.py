"""Whether an answer is Python at all."""

from typing import ClassVar

from potstill.core.types import Example
from potstill.metrics import TextMetric
from potstill.scorers.code import PYTHON, blocks, statements


class PythonParses(TextMetric, kind="python_parses"):
    """100 when the answer parses as the running Python and holds at least one statement, else 0. Nothing is run.

    An answer that does not parse as it stands is read again without what is outside its fenced blocks (```) of Python. A word
    of prose, such as `yes`, is Python too: a name.
    """

    version: ClassVar[int] = 2  # 2: reads what is inside fences
    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Parses"

    def __call__(self, answer: str, example: Example) -> float:
        return 100.0 * bool(statements(answer) or statements(_fenced(answer)))


def _fenced(answer: str) -> str:
    """What is inside the fences of Python."""
    return "\n".join(block.code for block in blocks(answer) if block.language in {"", *PYTHON})

"""Whether an answer is Python at all."""

import ast
import warnings
from typing import ClassVar

from potstill.core.types import Example
from potstill.metrics import TextMetric


class PythonParses(TextMetric, kind="python_parses"):
    """100 when the answer parses as Python and holds at least one statement, else 0. Nothing is run."""

    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Parses"

    def __call__(self, answer: str, example: Example) -> float:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes and the like are the model's business
                return 100.0 * bool(ast.parse(answer).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return 0.0

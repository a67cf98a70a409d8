"""Whether an answer is Python at all."""

import ast
import re
import warnings
from typing import ClassVar

from potstill.core.types import Example
from potstill.metrics import TextMetric

# a fence that is never closed ends with the answer, which may have been cut
_FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*(\w*)[^\n]*\n(.*?)(?:^ {0,3}\1[ \t]*$|\Z)", re.M | re.S)
_PYTHON = {"", "python", "python3", "py"}


class PythonParses(TextMetric, kind="python_parses"):
    """100 when the answer parses as the running Python and holds at least one statement, else 0. Nothing is run.

    Where the answer holds fenced blocks (```), what is in those of Python is parsed, and the prose around them is not. A word
    of prose, such as `yes`, is Python too: a name.
    """

    version: ClassVar[int] = 2  # 2: reads what is inside fences
    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Parses"

    def __call__(self, answer: str, example: Example) -> float:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes and the like are the model's business
                return 100.0 * bool(ast.parse(_code(answer)).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # nested past what Python reads is no program either
            return 0.0


def _code(answer: str) -> str:
    """What is inside the fences, else all of the answer."""
    blocks = _FENCED.findall(answer.replace("\r\n", "\n"))
    if not blocks:
        return answer
    return "\n".join(code for _, language, code in blocks if language.lower() in _PYTHON)

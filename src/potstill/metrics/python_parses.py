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

    An answer that does not parse as it stands is read again without what is outside its fenced blocks (```) of Python. A word
    of prose, such as `yes`, is Python too: a name.
    """

    version: ClassVar[int] = 2  # 2: reads what is inside fences
    unit: ClassVar[str] = "%"
    title: ClassVar[str] = "Parses"

    def __call__(self, answer: str, example: Example) -> float:
        return 100.0 * (_parses(answer) or _parses(_fenced(answer)))


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the model's business
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # nested past what Python reads is no program either
        return False


def _fenced(answer: str) -> str:
    """What is inside the fences of Python."""
    blocks = _FENCED.findall(answer.replace("\r\n", "\n"))
    return "\n".join(code for _, language, code in blocks if language.lower() in _PYTHON)

"""Programs inside answers: fenced blocks, and which of them is the program."""

import ast
import re
import warnings
from dataclasses import dataclass

from potstill.scorers.thoughts import answer_of

# a fence that is never closed ends with the answer, which may have been cut
_FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*(\w*)[^\n]*\n(.*?)(?:^ {0,3}\1[ \t]*$|\Z)", re.M | re.S)
PYTHON = frozenset({"python", "python3", "py"})


@dataclass(frozen=True)
class Block:
    """One fenced block of Markdown.

    Attributes:
        language: the first word after the fence, in small letters; "" where there is none.
    """

    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, in order; of CommonMark's fences those that begin a line."""
    found = _FENCED.findall(text.replace("\r\n", "\n"))
    return [Block(language.lower(), code) for _, language, code in found]


def without_blocks(text: str) -> str:
    """A text without its fenced blocks."""
    return _FENCED.sub("", text.replace("\r\n", "\n"))


def program_of(text: str) -> str:
    """The Python program of an answer; "" where there is none.

    It is looked for in the answer alone (`thoughts.answer_of`), never in a thought. The last fenced block that is labelled
    `python`, `python3` or `py`; else the last block without a label; else, where the answer has no block at all, the whole
    answer. Blocks in another language are no programs.
    """
    answer = answer_of(text)
    found = blocks(answer)
    for labels in (PYTHON, {""}):
        if fitting := [block.code for block in found if block.language in labels]:
            return fitting[-1].strip("\n")
    return "" if found else answer


def statements(code: str) -> int | None:
    """Statements at the top level of a text, read as the running Python reads it; None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the model's business
            return len(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # nested past what Python reads is no program either
        return None

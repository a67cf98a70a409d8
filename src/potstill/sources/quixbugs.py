"""Classic algorithms with one line wrong."""

import ast
import math
from typing import Any

from pydantic import Field

from potstill.core.errors import UserError
from potstill.core.types import Example, Tests
from potstill.sources._cells import Row, text
from potstill.sources._published import Published, fenced, items, unix
from potstill.sources._repair import repair

# tuples and iterators are lists in the tests' JSON
_SAME = """\
import math
def plain(value):
    return value if isinstance(value, (str, int, float, bool, type(None))) else [plain(item) for item in value]
def same(found, wanted, within=0):
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(found, wanted, rel_tol=1e-9, abs_tol=within)
    return found == wanted
"""


class QuixBugs(Published, kind="quixbugs"):
    """Functions with a bug in one line, the repaired function, and calls with their results. Lin et al., 2017; MIT.

    From `path`, JSON lines `name, fail, pass, tests`, each test a list of arguments and the result. Split by function. Tuples
    and iterators equal lists, floats are equal within 1e-9 of their size. Of `pass` the function counts, not the texts after it
    that name other solutions.
    """

    hub: str = Field(default="", description="not on the hub in this shape; name path")

    def rows(self, skip: Any = None) -> Any:
        if not self.path:
            raise UserError("data.path: quixbugs reads a local file; name its rows, JSON lines with name, fail, pass and tests")
        return super().rows(skip)

    def content_hash(self) -> str:
        if not self.path:
            raise UserError("data.path: quixbugs reads a local file; name its rows, JSON lines with name, fail, pass and tests")
        return super().content_hash()

    def example(self, row: Row, place: str) -> Example:
        name, failing, passing = (text(row, column, place) for column in ("name", "fail", "pass"))
        return Example(
            key=name,
            instruction=repair(failing) if failing.strip() else "",
            response=fenced(_without_texts(passing)) if passing.strip() else "",
            language="en",
            tests=Tests(asserts=_asserts(name, items(row, "tests", place), place)),
        )


def _asserts(name: str, tests: list[Any], place: str) -> str:
    lines = []
    for number, test in enumerate(tests, 1):
        if not (isinstance(test, list) and len(test) == 2):
            raise UserError(f"{place}: column 'tests', item {number} is no pair of arguments and result")
        given, wanted = test
        given = given if isinstance(given, list) else [given]
        args = ", ".join(map(_literal, given))
        within = f", {_literal(given[1])}" if name == "sqrt" and len(given) == 2 else ""  # its second argument
        lines.append(f"assert same(plain({name}({args})), {_literal(wanted)}{within})")
    if not lines or not name.isidentifier():
        raise UserError(f"{place}: needs a function's name and at least one test")
    return _SAME + "\n".join(lines)


def _literal(value: Any) -> str:
    """A value of JSON in Python's words; infinity has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return repr(value)


def _without_texts(program: str) -> str:
    """A program without the texts that stand between its statements."""
    program = unix(program)
    try:
        body = ast.parse(program).body
    except SyntaxError:
        return program
    lines = program.split("\n")
    for node in reversed(body):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            del lines[node.lineno - 1 : node.end_lineno]
    return unix("\n".join(lines))

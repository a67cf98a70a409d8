"""Solutions of LeetCode problems with bugs of known kinds."""

import ast
import re

from pydantic import Field

from potstill.core.types import Example, Tests
from potstill.sources._cells import Row, texts
from potstill.sources._published import LeftOut, Published, fenced, first_of, optional
from potstill.sources._repair import repair

_EXAMPLE = re.compile(r"Input:?\s*(?P<input>.+?)\s*Output:?\s*(?P<output>.+?)\s*(?:Explanation.*)?\Z", re.S)
_WORDS = {"true": "True", "false": "False", "null": "None"}
# what LeetCode imports before every program
_BEFORE = (
    "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "from bisect import *\nfrom collections import *\nfrom functools import *\nfrom heapq import *\nfrom itertools import *\n"
    "from math import ceil, comb, factorial, floor, gcd, inf, log, log2, sqrt\nfrom typing import *"
)


class DebugBench(Published, kind="debugbench"):
    """Programs with bugs that a model put in, and the programs without. Tian et al., arXiv:2401.04621; Apache-2.0.

    From the hub, or from `path` as JSON lines: `slug, description, examples, buggy, fixed`, and where there are any `bug_type,
    error, explanation`; the hub's names `buggy_code, solution, subtype, bug_explanation` are read too. Split by problem
    (`slug`).

    The data set has no tests. Where the examples of the statement are plain values, such as `n = 12, k = 3`, they judge: the
    program passes when its method returns what the examples say. Problems on trees or linked lists and with several accepted
    results have none, or a reference that fails; the metric `repaired` abstains from rows without tests.
    """

    hub: str = Field(default="Rtian/DebugBench", min_length=1, description="name of the data set on the hub")
    statement: bool = Field(default=True, description="show the problem's description")

    def example(self, row: Row, place: str) -> Example:
        buggy, fixed = first_of(row, ("buggy", "buggy_code"), place), first_of(row, ("fixed", "solution"), place)
        told = optional(row, "description", place)
        examples = texts(row, "examples", place) if "examples" in row else ()
        asserts = _asserts(fixed, examples)
        found = Example(
            key=first_of(row, ("slug",), place),
            instruction=repair(buggy, task=told if self.statement else "", message=optional(row, "error", place))
            if buggy.strip()
            else "",
            response=fenced(fixed) if fixed.strip() else "",
            language="en",
            tag=first_of(row, ("bug_type", "subtype"), place) if {"bug_type", "subtype"} & row.keys() else "",
            tests=Tests(asserts=asserts, before=_BEFORE) if asserts else None,
        )
        if optional(row, "language", place).lower() not in ("", "python", "python3"):
            raise LeftOut(found, "not in Python")
        return found


def _asserts(fixed: str, examples: tuple[str, ...]) -> str:
    """Calls of the only public method with each example's arguments; "" where one example is not of plain values."""
    method = _method(fixed)
    if method is None or not examples:
        return ""
    name, parameters = method
    lines = []
    for example in examples:
        found = _EXAMPLE.search(example)
        arguments = _arguments(found["input"]) if found else None
        wanted = _plain(found["output"]) if found else None
        if arguments is None or wanted is None or set(arguments) != set(parameters):
            return ""
        given = ", ".join(_as(arguments[name], annotation) for name, annotation in parameters.items())
        lines.append(f"assert Solution().{name}({given}) == {wanted}")
    return "\n".join(lines)


def _as(value: str, annotation: str) -> str:
    """A value as its parameter takes it: the examples write floats without a point."""
    return f"{value}.0" if annotation == "float" and value.lstrip("-").isdigit() else value


def _method(program: str) -> tuple[str, dict[str, str]] | None:
    """Name, and parameters with their annotations, of the only public method of `class Solution`.

    None where it takes or gives something else than plain values.
    """
    try:
        body = ast.parse(program.replace("\r\n", "\n")).body
    except (SyntaxError, ValueError):
        return None
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    if [node.name for node in classes] != ["Solution"] or "Node" in program:
        return None
    methods = [node for node in classes[0].body if isinstance(node, ast.FunctionDef) and node.args.args]
    public = [node for node in methods if not node.name.startswith("_")]
    annotated = [node for node in public if node.returns is not None]
    chosen = annotated if len(annotated) == 1 else public
    if len(chosen) != 1 or ast.unparse(chosen[0].returns or ast.Constant(None)) == "None":
        return None
    return chosen[0].name, {arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in chosen[0].args.args[1:]}


def _arguments(written: str) -> dict[str, str] | None:
    """The arguments of `n = 12, s = "ab"`, as Python; None where one is not a plain value."""
    try:
        call = ast.parse(f"f({_in_python(written)})", mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(call, ast.Call) or call.args:
        return None
    found = {word.arg or "": _plain(ast.unparse(word.value)) for word in call.keywords}
    return {name: value for name, value in found.items() if value is not None} if all(found.values()) else None


def _plain(written: str) -> str | None:
    """A literal of JSON or Python as Python; None where it is none."""
    try:
        return repr(ast.literal_eval(_in_python(written.strip())))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _in_python(written: str) -> str:
    """With Python's words for true, false and null, outside of quotes."""
    parts = re.split(r'("(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')', written)
    words = (re.sub(r"\b(true|false|null)\b", lambda found: _WORDS[found[0]], part) for part in parts[::2])
    quoted = [*parts[1::2], ""]
    return "".join(word + quote for word, quote in zip(words, quoted, strict=True))

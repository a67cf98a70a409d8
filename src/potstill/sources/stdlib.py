"""Docstring → function, out of the running Python's standard library."""

import ast
import hashlib
import inspect
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from potstill.core.types import Example
from potstill.sources import Skip, Source
from potstill.sources._cells import digest

_Function = ast.FunctionDef | ast.AsyncFunctionDef

_INSTALLED_LATER = {"dist-packages", "site-packages", "ensurepip", "__pycache__"}
_TESTS_AND_DATA = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}


class Stdlib(Source, kind="stdlib"):
    """Functions and methods with a docstring; the first paragraph is asked, the source without the docstring answers.

    The kind of pairs that PyTorrent (Bahrami et al., 2021) collects from packages. Split by top-level module, so that
    no module straddles splits; the same pair in two modules counts once. Rows depend on the version of Python.
    """

    version: ClassVar[int] = 3  # 2: modules that ask the same are joined; 3: keys without typography

    max_lines: int = Field(default=40, ge=2, description="longest function, in lines of source without the docstring")

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        seen: set[str] = set()
        for module, name, paragraph, code in _pairs():
            instruction = f"Write a Python function named `{name}`: {paragraph}"
            pair = digest(instruction, code)
            if len(code.splitlines()) <= self.max_lines and pair not in seen:
                seen.add(pair)
                yield Example(key=module, instruction=instruction, response=code, language="en", tag=module)

    def content_hash(self) -> str:
        return _content()


def _files() -> Iterator[tuple[str, Path]]:
    """Each source file with its top-level module, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if (_INSTALLED_LATER | _TESTS_AND_DATA).isdisjoint(parts):
            yield parts[0], file


@cache  # as the rows are, which are those of this process
def _content() -> str:
    hashed = hashlib.sha256(sys.version.encode())
    for module, file in _files():
        hashed.update(module.encode() + hashlib.sha256(file.read_bytes()).digest())
    return hashed.hexdigest()


@cache  # some 5 MB; to parse the library again for every split would take seconds
def _pairs() -> tuple[tuple[str, str, str, str], ...]:
    return tuple((module, *found) for module, file in _files() for found in _functions(file))


def _functions(file: Path) -> Iterator[tuple[str, str, str]]:
    """Name, first paragraph of the docstring, and source without it, of each function that these three identify."""
    with tokenize.open(file) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        source = opened.read()
        tree = ast.parse(source)
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, _Function) and len(node.body) > 1:
            docstring = ast.get_docstring(node, clean=False)
            paragraph = " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())
            code = _without_docstring(node, lines) if paragraph else None
            if code:
                yield node.name, paragraph, code


def _without_docstring(node: _Function, lines: list[str]) -> str | None:
    """The function's own lines, dedented; None when that would change what it does."""
    first = min(part.lineno for part in (node, *node.decorator_list)) - 1
    head, rest = lines[first : node.body[0].lineno - 1], lines[node.body[0].end_lineno : node.end_lineno]
    while rest and not rest[0].strip():
        rest.pop(0)
    code = textwrap.dedent("\n".join(head + rest))
    del node.body[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = ast.parse(code).body
    except SyntaxError:  # the docstring shared a line, or a string of several lines reaches left of the function
        return None
    return code if len(copy) == 1 and ast.dump(copy[0]) == ast.dump(node) else None

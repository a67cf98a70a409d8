"""Pairs out of the standard library: real functions, none changed, none with its docstring."""

import ast
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import pytest

from potstill.core.types import Example
from potstill.sources.stdlib import Stdlib, _functions


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return list(Stdlib().rows())


def test_some_five_thousand_pairs(rows: list[Example]) -> None:
    assert 4500 < len(rows) < 7000
    assert len({(row.instruction, row.response) for row in rows}) == len(rows)
    assert len(Counter(row.key for row in rows)) > 120


def test_each_answer_is_one_function_without_docstring(rows: list[Example]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows[::7]:
            (function,) = ast.parse(row.response).body
            assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            assert row.instruction.startswith(f"Write a Python function named `{function.name}`: ")
            assert len(row.response.splitlines()) <= 40


def test_a_known_function(rows: list[Example]) -> None:
    (row,) = [row for row in rows if row.key == "bisect" and "`insort_right`" in row.instruction]
    assert row.instruction == (
        "Write a Python function named `insort_right`: Insert item x in list a, and keep it sorted assuming a is sorted."
    )
    assert row.response.startswith("def insort_right(a, x, lo=0, hi=None, *, key=None):\n    if key is None:")


def test_docstrings_that_cannot_be_taken_out(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        textwrap.dedent('''
        def same_line(): "Doc."; return 1

        def only_docstring():
            """Doc."""

        class Thing:
            @property
            def kept(self):
                """One
                line.

                More.
                """

                # why
                return 1

            def reaches_left(self):
                """Doc."""
                return """
        left"""

            def would_change(self):
                """Doc."""
                return """
                    indented"""
        ''')
    )
    assert list(_functions(file)) == [("kept", "One line.", "@property\ndef kept(self):\n    # why\n    return 1")]


def test_content_hash_is_that_of_the_interpreter() -> None:
    assert Stdlib().content_hash() == Stdlib(max_lines=9).content_hash()

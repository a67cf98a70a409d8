"""Published data sets of one shape: what a row becomes, and which rows are left out."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES  # pyright: ignore[reportAttributeAccessIssue]
from counting import left_out
from judged import judging
from writing import write_cache

from potstill.core.errors import UserError
from potstill.core.types import Case, Example
from potstill.scorers.code import program_of
from potstill.scorers.numbers import judged_answer
from potstill.scorers.programs import failing_references, grades_of
from potstill.sources import Source
from potstill.sources.bugnet import BugNet
from potstill.sources.codeforces_cots import CodeforcesCots
from potstill.sources.debugbench import DebugBench
from potstill.sources.gsm8k import Gsm8k
from potstill.sources.mbpp import Mbpp
from potstill.sources.quixbugs import QuixBugs
from potstill.sources.stage import example_of, row_of

WriteRows = Callable[..., str]
RUNNING = sorted(set(SHAPES) - {"gsm8k"})


def one(source: Source) -> Example:
    (example,) = source.rows()
    return example


def rows_of(kind: str, write_rows: WriteRows, count: int = 3) -> list[Example]:
    source = Source.parse({"kind": kind, "path": write_rows(map(SHAPES[kind], range(3, 3 + count)))})
    assert isinstance(source, Source)
    return list(source.rows())


@pytest.mark.parametrize("kind", RUNNING)
def test_references_pass_and_empty_programs_do_not(kind: str, write_rows: WriteRows) -> None:
    rows = rows_of(kind, write_rows)
    with judging():
        assert failing_references(rows) == {}
        assert all(getattr(grade, "outcome", "") == "fail" for grade in grades_of([""] * 3, rows))


@pytest.mark.parametrize("kind", ["bugnet", "quixbugs", "debugbench"])
def test_the_broken_program_fails(kind: str, write_rows: WriteRows) -> None:
    rows = rows_of(kind, write_rows)
    with judging():
        grades = grades_of([row.instruction for row in rows], rows)
    assert all(getattr(grade, "outcome", "pass") != "pass" for grade in grades)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_written_row_keeps_its_tests(kind: str, write_rows: WriteRows) -> None:
    import json

    for row in rows_of(kind, write_rows):
        assert example_of(json.loads(json.dumps(row_of(row))), "here") == row


@pytest.mark.parametrize("kind", sorted(set(SHAPES) - {"quixbugs"}))
def test_rows_of_the_hub_are_those_of_a_file(kind: str, write_rows: WriteRows, hub_cache: Path) -> None:
    commit = write_cache([SHAPES[kind](n) for n in range(3, 6)], hub_cache)
    hub = Source.parse({"kind": kind, "hub": "someone/rows", "revision": commit, "subset": None})
    assert isinstance(hub, Source)
    assert list(hub.rows()) == rows_of(kind, write_rows)
    assert hub.content_hash() == commit


def test_gsm8k(write_rows: WriteRows) -> None:
    path = write_rows([SHAPES["gsm8k"](7)])
    assert one(Gsm8k(path=path)).response == "It is 7.\n#### 7"
    assert "<<7*1=7>>" in one(Gsm8k(path=path, calculations=True)).response
    thinking = one(Gsm8k(path=path, think=True))
    assert thinking.response == "<think>\nIt is 7.\n</think>\n<answer>\n7\n</answer>"
    for row in (one(Gsm8k(path=path)), thinking):
        assert [judged_answer(said, row) for said in ("7", "#### 7.0", "so it is 8")] == [1, 1, 0]


def test_gsm8k_without_a_final_number_is_refused_where_thoughts_are_parted(write_rows: WriteRows) -> None:
    path = write_rows([{"question": "?", "answer": "7"}])
    with pytest.raises(UserError, match=f"{path}:1: column 'answer' has no `####`"):
        list(Gsm8k(path=path, think=True).rows())


def test_mbpp(write_rows: WriteRows) -> None:
    tests = ["assert f(1) == 2", "assert f(2) == 3"]
    row = {"text": "Add one.", "code": "def f(x):\r\n  return x + 1", "test_list": tests, "test_setup_code": "import math"}
    example = one(Mbpp(path=write_rows([{**row, "challenge_test_list": ["assert f(9) == 10"]}])))
    assert example.instruction == "Add one.\nThe program must pass this test:\nassert f(1) == 2"
    assert example.response == "```python\ndef f(x):\n  return x + 1\n```"
    assert example.tests is not None
    assert example.tests.asserts == "import math\nassert f(1) == 2\nassert f(2) == 3"
    shown = one(Mbpp(path=write_rows([{**row, "challenge_test_list": ["assert f(9) == 10"]}]), shown=2, challenge=True))
    assert "assert f(2) == 3" in shown.instruction
    assert shown.tests is not None
    assert "f(9)" in shown.tests.asserts


def test_codeforces_leaves_out_what_cannot_be_learned(write_rows: WriteRows) -> None:
    row = SHAPES["codeforces_cots"](1)
    path = write_rows([row, {**row, "finish_reason": "length"}, {**row, "interaction_format": "ask"}])
    assert len(list(CodeforcesCots(path=path).rows())) == 1
    assert left_out(CodeforcesCots(path=path, splits={"validation": 0, "test": 0})) == {  # pyright: ignore[reportArgumentType]
        "the answer was cut": 1,
        "an interactive problem": 1,
    }


def test_codeforces_statement_and_tests(write_rows: WriteRows) -> None:
    row = SHAPES["codeforces_cots"](1)
    example = one(CodeforcesCots(path=write_rows([row])))
    assert example.instruction == (
        "Problem 1\n\nAdd 1 to n.\n\nInput\nn\n\nOutput\nthe sum\n\nExample input:\n1\nExample output:\n2"
    )
    assert example.tests is not None
    assert example.tests.cases == (Case("1\n", "2\n"),)
    official = one(CodeforcesCots(path=write_rows([{**row, "official_tests": [{"input": "5\n", "output": "6\n"}]}])))
    assert official.tests is not None
    assert official.tests.cases == (Case("5\n", "6\n"),)


def test_contests_of_another_shape_are_questions(write_rows: WriteRows) -> None:
    tests = [{"kind": "sample", "name": "s", "input": "1", "output": "2"}, {"kind": "secret", "input": "3", "output": "4"}]
    rows = [{"id": "a/b", "title": "t", "statement": "Add one.", "tests": tests}]
    example = one(CodeforcesCots(path=write_rows(rows)))
    assert (example.key, example.instruction, example.response) == ("a/b", "Add one.", "")
    assert example.tests is not None
    assert example.tests.cases == (Case("3", "4"),)
    samples = one(CodeforcesCots(path=write_rows([{**rows[0], "tests": tests[:1]}])))
    assert samples.tests is not None
    assert samples.tests.cases == (Case("1", "2"),)


def test_bugnet(write_rows: WriteRows) -> None:
    row = {**SHAPES["bugnet"](1), "description": "Add one."}
    path = write_rows([row, {**row, "language": "C++"}, {**row, "input": "", "error": "NameError: x"}])
    first, second = BugNet(path=path).rows()
    assert first.instruction == (
        "Repair the program.\n\nTask: Add one.\n\nProgram:\n```python\nprint(int(input()) - 1)\n```\n\nMessage:\nWrong Answer"
    )
    assert (first.key, first.tag, program_of(first.response)) == ("p00001", "Wrong Answer", "print(int(input()) + 1)")
    assert second.tests is None
    assert second.instruction.endswith("Message:\nNameError: x")
    assert left_out(BugNet(path=path, splits={"validation": 0, "test": 0})) == {"not in Python": 1}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("examples", "asserts"),
    [
        (["Input: n = 1\nOutput: true\nExplanation: x = 2"], "assert Solution().add(1) == True"),
        (['Input: n = "true, null"\nOutput: [null,"a"]'], "assert Solution().add('true, null') == [None, 'a']"),
        (["Input: n = 1\nOutput: 2", "Input: m = 1\nOutput: 2"], ""),
        (["Input: n = [1,2\nOutput: 2"], ""),
        (["Input: n = f(1)\nOutput: 2"], ""),
        (["Input: n = 1\nOutput: 2.00000, either way"], ""),
        ([], ""),
    ],
)
def test_debugbench_examples_become_asserts_where_all_are_plain(
    examples: list[str], asserts: str, write_rows: WriteRows
) -> None:
    example = one(DebugBench(path=write_rows([{**SHAPES["debugbench"](1), "examples": examples}])))
    assert (example.tests.asserts if example.tests else "") == asserts


def test_debugbench_gives_floats_where_floats_are_taken(write_rows: WriteRows) -> None:
    program = "class Solution:\n    def half(self, n: float) -> float:\n        return n / 2"
    row = {**SHAPES["debugbench"](1), "fixed": program, "examples": ["Input: n = 1\nOutput: 0.5"]}
    example = one(DebugBench(path=write_rows([row])))
    assert example.tests is not None
    assert example.tests.asserts == "assert Solution().half(1.0) == 0.5"


def test_debugbench_without_a_plain_method_has_no_tests(write_rows: WriteRows) -> None:
    row = SHAPES["debugbench"](1)
    for program in (
        "class Solution:\n    def add(self, n: Optional[ListNode]) -> int:\n        return 2",
        "class Solution:\n    def add(self, n: int) -> None:\n        n += 1",
        "class Stack:\n    def add(self, n: int) -> int:\n        return 2",
        "def add(n):\n    return 2",
        "class Solution:\n    def add(self, n: int) -> int\n        return 2",
    ):
        assert one(DebugBench(path=write_rows([{**row, "fixed": program}]))).tests is None


def test_quixbugs_compares_iterators_tuples_and_floats(write_rows: WriteRows) -> None:
    program = "def f(a, b):\n    yield (a, b / 3)\n    yield True"
    row = {
        "name": "f",
        "fail": "def f(a, b):\n    yield 1",
        "pass": program,
        "tests": [[[1, 1], [[1, 0.3333333333333333], True]]],
    }
    example = one(QuixBugs(path=write_rows([row])))
    with judging():
        right, near, wrong = grades_of(
            [example.response, example.response.replace("b / 3", "b / 3.001"), example.response.replace("True", "1")],
            [example] * 3,
        )
    assert [getattr(grade, "outcome", "") for grade in (right, near, wrong)] == ["pass", "fail", "fail"]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gsm8k", {"question": None}, None),
        ("gsm8k", {"answer": 3}, "column 'answer' holds a number, not text"),
        ("mbpp", {"test_list": "assert f(1) == 2"}, "column 'test_list' holds text, not a list of texts"),
        ("codeforces_cots", {"examples": "1 2"}, "column 'examples' holds text, not a list"),
        ("codeforces_cots", {"examples": ["1"]}, "column 'examples', item 1 holds no object"),
        ("codeforces_cots", {"examples": [{"input": "1"}]}, "column 'examples', item 1: no column 'output'"),
        ("quixbugs", {"tests": [[1]]}, "column 'tests', item 1 is no pair of arguments and result"),
        ("quixbugs", {"tests": []}, "needs a function's name and at least one test"),
        ("quixbugs", {"name": "f(1) or f"}, "needs a function's name and at least one test"),
        ("bugnet", {"fail": ["x"]}, "column 'fail' holds a list, not text"),
        ("debugbench", {"examples": 3}, "column 'examples' holds a number, not a list of texts"),
    ],
)
def test_rows_of_a_wrong_shape(kind: str, change: dict[str, Any], message: str | None, write_rows: WriteRows) -> None:
    path = write_rows([{**SHAPES[kind](1), **change}])
    source = Source.parse({"kind": kind, "path": path})
    assert isinstance(source, Source)
    if message is None:
        assert list(source.rows()) == []
        return
    with pytest.raises(UserError) as caught:
        list(source.rows())
    assert message in str(caught.value)
    assert f"{path}:1" in str(caught.value)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_missing_column_is_named(kind: str, write_rows: WriteRows) -> None:
    source = Source.parse({"kind": kind, "path": write_rows([{"nothing": 1}])})
    assert isinstance(source, Source)
    with pytest.raises(UserError, match=r":1: no column '\w+'"):
        list(source.rows())


def test_quixbugs_says_that_it_needs_a_file() -> None:
    with pytest.raises(UserError, match=r"data\.path: quixbugs reads a local file"):
        list(QuixBugs().rows())


@pytest.mark.shared
@pytest.mark.parametrize(
    ("kind", "file", "rows", "tested"),
    [
        ("gsm8k", "gsm8k/test.jsonl", 819, 0),
        ("mbpp", "mbpp/mbpp.jsonl", 974, 974),
        ("codeforces_cots", "codejam/rows.jsonl", 120, 120),
        ("quixbugs", "quixbugs/rows.jsonl", 20, 20),
        ("debugbench", "debugbench-python/rows.jsonl", 1189, 878),
    ],
)
def test_real_rows(kind: str, file: str, rows: int, tested: int, shared_data: Path) -> None:
    source = Source.parse({"kind": kind, "path": str(shared_data / file)})
    assert isinstance(source, Source)
    found = list(source.rows())
    assert (len(found), sum(row.tests is not None for row in found)) == (rows, tested)
    splits = Counter(source.split_of(row) for row in found)
    assert min(splits.values()) > 0

"""What `plan` says: readable at any width, and of the memory that a stage takes."""

import io
import json

import pytest
from rich.console import Console
from tiny_run import call

from potstill.commands.plan import Line, Plan, estimate, print_plan
from potstill.recipe.parse import load_recipe
from potstill.stages.outlook import Cost, RowsOf

WIDTHS = (60, 80, 100, 140)


def printed(plan: Plan, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_plan(plan, console)
    return console.file.getvalue().splitlines()


@pytest.fixture
def large() -> Plan:
    """Every column at its widest."""
    rows = RowsOf("train", 227, {"response too long": 21}, 3, 41.0, 18.0, 110, 60, 131, keys=9)
    cost = Cost(
        3_090_000_000, 123_456, 987_654_321, 123_456_789, 1e21, 360_000.0, 999_000_000_000, 12_300_000_000, rows=(rows,)
    )
    names = ("teacher", "a-stage-with-a-very-long-name-indeed@2147483647", "kd.lr=0.0001,ratio=0.9@1")
    return Plan("wide", tuple(Line(name, "distill", "to do", 1, cost, too_large=True) for name in names))


@pytest.mark.parametrize("width", WIDTHS)
def test_no_figure_is_cut_at_any_width(large: Plan, width: int) -> None:
    lines = printed(large, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for figure in ("3.09 B", "123,456", "988 M", "100:00:00", "999 GB", "12.3 GB"):
        assert text.count(figure) >= len(large.lines), figure
    assert "".join(text.split()).count("a-stage-with-a-very-long-name-indeed@2147483647") or "a-stage" in text


def test_rows_left_out_are_said_with_the_longest(large: Plan) -> None:
    text = " ".join(" ".join(printed(large, 100)).split())
    assert "train: 227 of 248 rows (left out: 21 response too long, the longest 131 tokens), 3 contexts shortened" in text
    assert "41 + 18 tokens a row, 110 at most" in text


def test_what_does_not_fit_is_marked(large: Plan) -> None:
    text = " ".join(" ".join(printed(large, 100)).split())
    assert "! teacher needs about 999 GB of memory, and this machine has" in text


def test_a_plan_is_kept_and_a_done_stage_shows_what_it_took(place) -> None:
    """Memory and time are compared on larger models by benchmarks/plan.py: here nearly all memory is the test's own."""
    planned = {line.stage: line.cost for line in estimate(load_recipe(place.recipe), place.out, measure=True).lines}
    assert place.run("--quiet").exit_code == 0
    for row in json.loads(call("plan", place.recipe, "--out", str(place.out), "--json").stdout):
        foreseen = planned[row["stage"]]
        assert row["state"] == "done"
        assert (foreseen.seconds or 0) > 0
        assert foreseen.steps == row["steps"]
        assert foreseen.tokens == pytest.approx(row["tokens"], rel=0.1)

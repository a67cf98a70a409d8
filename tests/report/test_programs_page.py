"""How programs ended, which answers are shown beside one another, and what is said where nothing held the programs."""

import html
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.report import build_report, model_card
from potstill.report.build import Made
from potstill.report.html import OUTCOMES, render_html
from potstill.sandbox.verdict import OUTCOMES as OF_THE_SANDBOX
from potstill.sandbox.weak import Weak
from potstill.study.analysis import analyse
from potstill.study.programs import changed, proportional, tallies
from potstill.study.records import NO_SANDBOX, JudgedBy, MetricInfo, ModelRow, Study, TestRow

BEFORE = ("fail", "fail", "pass", "pass", "crash", "no_parse", "abstain", "timeout", "pass", "no_program")
AFTER = ("pass", "fail", "fail", "pass", "pass", "pass", "pass", "timeout", "pass", "fail")
N = len(BEFORE)
HOSTILE = "</pre><script>alert(1)</script> {{ 7 * 7 }} <img src=x onerror=alert(1)>"


def model(name: str, role: Any, *seeds: tuple[str, ...], **changes: Any) -> ModelRow:
    scores = [[None if one == "abstain" else 100.0 * (one == "pass") for one in seed] for seed in seeds]
    values: dict[str, Any] = {
        "name": name,
        "role": role,
        "model": f"stage:{name}",
        "seeds": tuple(range(1, len(seeds) + 1)),
        "scores": {"pass_at_1": scores},
        "outcomes": {"pass_at_1": [[(one,) for one in seed] for seed in seeds]},
    }
    return ModelRow(**{**values, **changes})


def study_of(*rows: ModelRow, backend: str = "namespaces", **changes: Any) -> Study:
    values: dict[str, Any] = {
        "metrics": (MetricInfo(name="pass_at_1", title="pass@1", unit="%"),),
        "primary": "pass_at_1",
        "rows": rows or (model("Start", "start", BEFORE, BEFORE), model("GRPO", "rl", AFTER, AFTER)),
        "tokens": (1,) * N,
        "examples": tuple(TestRow(key=str(n), prompt=HOSTILE, references=(HOSTILE,)) for n in range(N)),
        "judged_by": (JudgedBy(backend=backend, version="1.2.3", python="3.99"),),
    }
    return Study(**{**values, **changes})


def report_of(study: Study, **made: Any) -> dict[str, Any]:
    texts = {row.name: [f"{HOSTILE} {row.name}"] * len(row.seeds) for row in study.rows}
    answers = [{"key": example.key, "answers": texts} for example in study.examples]
    return build_report(study, answers, Made(**made), resamples=50)


def test_each_program_is_counted_once_over_all_seeds():
    (start, grpo) = tallies(study_of(model("Start", "start", BEFORE), model("GRPO", "rl", AFTER, BEFORE)))
    assert start.counts == {"pass": 3, "fail": 2, "timeout": 1, "crash": 1, "no_parse": 1, "no_program": 1, "abstain": 1}
    assert (start.programs, grpo.programs) == (N, 2 * N)
    assert grpo.counts["pass"] == start.counts["pass"] + 6
    assert sum(grpo.counts.values()) == grpo.programs


def test_an_outcome_of_a_newer_sandbox_is_counted_too():
    (found,) = tallies(study_of(model("Start", "start", ("stolen", *BEFORE[1:]))))
    assert found.counts["stolen"] == 1
    assert sum(found.counts.values()) == N


def test_rows_are_grouped_by_what_became_of_them():
    study = study_of()
    found = changed(study, analyse(study, resamples=50).headline)
    assert found is not None
    assert (found.b, found.a) == ("Start", "GRPO")
    assert found.rows == {"gained": [0, 4, 5], "lost": [2], "both pass": [3, 8], "neither passes": [1, 7, 9]}  # 6 abstained
    shown = found.shown()
    assert len(shown) == 8
    assert [row for row, group in shown if group == "lost"] == [2]
    for group in found.rows:  # the first ones of each group, none left out between them
        mine = [row for row, other in shown if other == group]
        assert mine == found.rows[group][: len(mine)]


@pytest.mark.parametrize("sizes", [(1, 0, 40, 59), (3, 3, 3, 3), (0, 0, 0, 2), (100, 1, 1, 1), (0, 0, 0, 0), (5, 70, 20, 5)])
def test_seats_are_in_proportion(sizes: tuple[int, ...]):
    named = {str(number): size for number, size in enumerate(sizes)}
    given = proportional(named, 8)
    total = sum(sizes)
    assert sum(given.values()) == min(8, total)
    for group, size in named.items():
        assert (given[group] >= 1) == (size > 0)
        assert given[group] <= size
        assert given[group] <= max(1, 1 + 8 * size / max(1, total))


def test_answers_stand_side_by_side_with_their_outcome_and_as_text():
    report = report_of(study_of())
    page = render_html(report)
    assert [example["row"] for example in report["examples"] if example["group"] == "lost"] == [2]
    lost = page.partition("Row 2: lost")[2].partition("</article>")[0]
    before, after = lost.index(f"{html.escape(HOSTILE)} Start</pre>"), lost.index(f"{html.escape(HOSTILE)} GRPO</pre>")
    assert lost.index("✓ passes") < before < lost.index("✗ fails") < after
    assert "<script" not in page
    assert "<img" not in page
    assert "3 gained, 1 lost, 2 both pass, 3 neither passes" in page


def test_the_table_has_the_figures_numbers():
    page = render_html(report_of(study_of()))
    section = page.partition("How the programs ended")[2].partition("<h2>")[0]
    line = section.partition("Start<small>")[2].partition("</tr>")[0]
    assert '<td class="n">6<small>30.0%</small></td>' in line  # 3 passes in each of two seeds, of 20
    assert "namespaces</code>, 1.2.3, by Python 3.99" in section
    assert "3 passes" not in section


def test_every_outcome_of_the_sandbox_has_words():
    assert set(OUTCOMES) == {*OF_THE_SANDBOX, "no_parse", "no_program"}


@pytest.mark.parametrize("how", ["evaluation", "training"])
def test_without_a_sandbox_it_is_said_first_and_in_red(how: str):
    rows = (model("Start", "start", BEFORE), model("GRPO", "rl", AFTER, unsafe=how == "training"))
    report = report_of(study_of(*rows, backend="none" if how == "evaluation" else "namespaces"))
    page = render_html(report)
    assert page.index('<p class="unsafe" role="alert">') < page.index("<h1>")
    who = "the programs of the test answers" if how == "evaluation" else "programs that GRPO learned from"
    assert f"WITHOUT A SANDBOX (--unsafe-no-sandbox): {who} ran" in page
    card = model_card(report, model_row="GRPO")
    assert card.index("**⚠ Judged WITHOUT A SANDBOX") < card.index("## What was shown")
    assert ("run by: no sandbox" in card) == (how == "evaluation")


def test_without_a_sandbox_no_claim_is_free_of_doubt():
    worse, better = ("fail",) * N, ("pass",) * N
    rows = (model("Start", "start", worse, worse), model("GRPO", "rl", better, better))
    assert analyse(study_of(*rows), resamples=200).verdicts[0].doubts == ()
    assert analyse(study_of(*rows, backend="none"), resamples=200).verdicts[0].doubts == ("judged without a sandbox",)


def test_the_backend_that_holds_nothing_is_known_by_its_name():
    assert Weak().name == NO_SANDBOX


def test_with_a_sandbox_nothing_is_red():
    report = report_of(study_of())
    assert report["unsafe"] == ""
    assert 'class="unsafe"' not in render_html(report)
    assert "SANDBOX" not in model_card(report, model_row="GRPO")
    assert "sandbox `namespaces` (1.2.3), Python 3.99" in model_card(report, model_row="GRPO")


def test_figure_five_has_every_panel():
    points = [
        {"step": step, "epoch": step, "loss": 0.0, "samples_reward_total": 1.0, "samples_reward_tests": 0.5}
        | {"samples_kl": 0.01, "samples_length": 90.0 + step}
        for step in (1, 2)
    ]
    page = render_html(report_of(study_of(), curves=({"name": "GRPO", "role": "rl", "seed": 1, "points": points},)))
    section = page.partition("What it was rewarded for")[2].partition("<h2>")[0]
    for title in ("Reward, all together", "Reward: tests", "KL to where it began", "Length of answers, tokens"):
        assert title in section
    assert "On its own answers" not in page


def test_outcomes_of_another_shape_are_refused():
    with pytest.raises(ValidationError, match="outcomes of pass_at_1 are not 1 seeds × 10 test rows"):
        study_of(model("Start", "start", BEFORE, outcomes={"pass_at_1": [[("pass",)]]}))

"""The page on what a model was rewarded for: there where rewards were, and loud where the form alone was learned."""

from typing import Any

from fake_study import fake_answers, fake_study

from potstill.report import build_report
from potstill.report.build import Made
from potstill.report.html import render_html
from potstill.study.records import ModelRow

COURSES = {
    "tests": {"first": 0.1, "last": 0.1, "rose": False, "correctness": True, "attribution": 0.25},
    "think_format": {"first": 0.2, "last": 0.9, "rose": True, "correctness": False, "attribution": 0.75},
}


def curve(seed: int) -> dict[str, Any]:
    points = [
        {
            "step": step,
            "epoch": step,
            "loss": 0.0,
            "samples_reward_total": step / 9,
            "samples_reward_tests": 0.1,
            "samples_kl": 0.01,
        }
        for step in range(1, 9)
    ]
    return {"name": "GRPO", "role": "rl", "seed": seed, "points": points}


def page_of(*rewarded: dict[str, Any], curves: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], str]:
    study = fake_study(12)
    study = study.model_copy(update={"rows": tuple(_rewarded(row, rewarded) for row in study.rows)})
    report = build_report(study, fake_answers(study), Made(curves=curves, rewarded=rewarded), resamples=50)
    return report, render_html(report)


def _rewarded(row: ModelRow, rewarded: tuple[dict[str, Any], ...]) -> ModelRow:
    """The fake study's KD as if it had learned from rewards, in as many seeds as are told."""
    only = tuple(one["format_only"] for one in rewarded)
    return row.model_copy(update={"format_only": only}) if row.name == "KD" and only else row


def one(seed: int, *, format_only: bool) -> dict[str, Any]:
    return {"name": "GRPO", "role": "rl", "seed": seed, "rewards": COURSES, "format_only": format_only}


def test_rewards_are_drawn_and_told() -> None:
    report, page = page_of(one(1, format_only=False), curves=(curve(1),))
    section = page.partition("What it was rewarded for")[2].partition("<h2>")[0]
    for words in (
        "Reward, all together",
        "Reward: tests",
        "KL to where it began",
        "think_format",
        "correctness",
        "75%",
        "not shown",
    ):
        assert words in section
    assert "Format only" not in page
    assert "format only" not in page
    assert not any("format only" in caveat for caveat in report["caveats"])


def test_format_only_is_said_first() -> None:
    report, page = page_of(one(1, format_only=True), one(2, format_only=False), curves=(curve(1), curve(2)))
    assert report["caveats"][0].startswith("KD: format only: ")
    assert "in 1 of 2 seeds" in report["caveats"][0]
    assert page.count("</span> format only</span>") == 1  # of the seed that it is


def test_without_rewards_nothing_is_said() -> None:
    _, page = page_of(curves=({"name": "SFT", "role": "sft", "seed": 1, "points": [{"epoch": 1, "step": 1, "loss": 1.0}]},))
    assert "rewarded for" not in page

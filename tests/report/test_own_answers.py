"""The page on what models did on their own answers, and on what training took: there where there is something to say."""

from typing import Any

import pytest
from fake_study import SCRIPT, fake_answers, fake_study

from potstill.report import build_report
from potstill.report.build import Made
from potstill.report.html import render_html

SECTIONS = ("On its own answers", "What training took", "At equal")
SAMPLES = ("samples_divergence", "samples_length", "samples_cut", "samples_ce", "samples_gap")


def curve(name: str, role: str, samples: dict[str, float], validated: dict[str, float], seed: int = 1) -> dict[str, Any]:
    points: list[dict[str, Any]] = []
    for n in range(5):
        points.append({"epoch": n / 4, "step": 10 * n, "loss": 1.0, **samples})
        taken = {"read": 900.0 * n * seed, "written": 100.0 * n, "flops": 1e15 * n}
        points.append(
            {"epoch": n / 4, "step": 10 * n, **{f"validation_{k}": v - n / 10 for k, v in validated.items()}, **taken}
        )
    whole = {"read": 3600.0 * seed, "written": 400.0, "flops": 4e15}
    return {"name": name, "role": role, "seed": seed, "began": "one", "points": points, "spent": whole}


def page_of(*curves: dict[str, Any]) -> tuple[dict[str, Any], str]:
    study = fake_study(12)
    report = build_report(study, fake_answers(study), Made(curves), resamples=50)
    return report, render_html(report)


OWN = dict.fromkeys(SAMPLES, 0.25)
ON_BOTH = {"kl_on_answers": 0.9, "kl_to_teacher": 0.6, "rouge_l": 30.0}


def test_a_study_without_own_answers_says_nothing_of_them() -> None:
    _, page = page_of(curve("SFT", "sft", {}, {"rouge_l": 40.0}))
    assert "What training took" in page
    assert not any(words in page for words in ("On its own answers", "Exposure gap", "At equal"))
    bare = {"name": "SFT", "role": "sft", "seed": 1, "points": [{"epoch": 1, "step": 1, "loss": 1.0}]}
    assert not any(words in page_of(bare)[1] for words in SECTIONS)  # as older versions kept it
    assert not any(words in page_of()[1] for words in SECTIONS)


def test_every_figure_of_own_answers_is_drawn_with_its_unit() -> None:
    _, page = page_of(curve("KD", "kd", {**OWN, "divergence": 0.1}, ON_BOTH), curve("SFT", "sft", {}, {"rouge_l": 40.0}))
    own = page.partition("On its own answers")[2].partition("<h2>")[0]
    for title in (
        "Divergence in training, nats/token",
        "KL to teacher, validation, nats/token",
        "Length of own answers, tokens",
        "Own answers that were cut, share",
        "Surprisal of own tokens, nats/token",
        "Writing against training, nats/token",
    ):
        assert title in own
    learning = page.partition("<h2>Learning")[2].partition("<h2>")[0]
    assert "Rouge-L on the validation rows" in learning
    assert "KL to teacher" not in learning


def test_minillm_brings_its_own_names() -> None:
    own = {"samples_reverse_kl": 0.5, "samples_nll": 1.0, "samples_length": 9.0}
    _, page = page_of(curve("MiniLLM", "kd", own, {"rouge_l": 30.0}))
    assert "Divergence in training" in page
    assert "Surprisal of own tokens" in page
    assert "Length of own answers" in page
    assert "Own answers that were cut" not in page
    assert "Exposure gap" not in page


def test_the_exposure_gap_is_own_answers_less_references() -> None:
    curves = [curve("KD", "kd", OWN, {**ON_BOTH, "kl_on_answers": 0.9 + seed / 10}, seed) for seed in (1, 2, 3)]
    report, page = page_of(*curves)
    (found,) = report["exposure"]
    assert found["first"] == pytest.approx({"on_answers": 1.1, "on_references": 0.6, "gap": 0.5})
    assert found["last"] == pytest.approx({"on_answers": 0.7, "on_references": 0.2, "gap": 0.5})
    assert "Exposure gap" in page


def test_models_of_one_role_are_told_apart() -> None:
    """Two models in one colour would be one line to the reader."""
    _, page = page_of(*(curve(name, "kd", OWN, ON_BOTH) for name in ("KD one", "KD two", "KD three")))
    own = page.partition("On its own answers")[2].partition("<h2>")[0]
    assert all(f"stroke: var(--{colour})" in own for colour in ("kd", "step6", "step0"))


def test_what_training_took_is_the_mean_over_seeds_and_unknown_where_one_is() -> None:
    curves = [curve("KD", "kd", {}, {"rouge_l": 30.0}, seed) for seed in (1, 2, 3)]
    report, page = page_of(*curves, curve("SFT", "sft", {}, {"rouge_l": 40.0}))
    assert [one["read"] for one in report["spent"]] == [7200.0, 3600.0]
    took = page.partition("What training took")[2].partition("<h3>")[0]
    assert "7.20 k" in took
    assert "3.60 k" in took
    assert "4.00 P" in took
    assert "At equal 4.00 k tokens read and written" in page
    assert "At equal 4.00 P FLOP" not in page
    curves[1]["spent"]["flops"] = None
    assert page_of(*curves)[0]["spent"][0]["flops"] is None


def test_hostile_names_are_escaped() -> None:
    curves = [curve(SCRIPT, "kd", OWN, ON_BOTH), curve("SFT", "sft", {}, {"rouge_l": 40.0}, seed=2)]
    assert "<script" not in page_of(*curves)[1]

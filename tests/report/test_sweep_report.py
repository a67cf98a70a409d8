"""What the report says of values that were tried: the pick, the figure, and whether the control was searched alike."""

import io
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from fake_study import SCRIPT, fake_answers, fake_study, trained_record
from rich.console import Console

from potstill.report.build import Made, build_report, picked_in_words
from potstill.report.html import render_html
from potstill.report.table import print_table
from potstill.study.analysis import analyse

BY_NLL = {"by": "validation_nll", "title": "NLL", "unit": "nats/token", "higher_is_better": False}
RATES = [1e-5, 5e-5, 1e-4, 5e-4]


def fake_sweep(values: list[Any] = RATES, chosen: int = 2, seeds: tuple[int, ...] = (1, 2), **changes: Any) -> dict[str, Any]:
    candidates = []
    for number, value in enumerate(values):
        curves = []
        for seed in seeds:
            points = [{"epoch": e / 2, "step": e, "loss": 3.0 - number / 5 - e / 9 + seed / 50} for e in range(1, 11)]
            points += [
                {"epoch": e, "step": 2 * e, "validation_rouge_l": 10.0 + 3 * number + e, "validation_nll": 3.0 - e / 5}
                for e in range(6)
            ]
            curves.append({"seed": seed, "points": points})
        by_seed = [[seed, 20.0 + number + seed / 10] for seed in seeds]
        mean = sum(score for _, score in by_seed) / len(seeds)
        values_of = {"optim.lr": value}
        candidates.append({"label": str(value), "values": values_of, "mean": mean, "by_seed": by_seed, "curves": curves})
    about = {"name": "KD", "role": "kd", "stage": "kd", "kind": "distill", "by": "validation_rouge_l", "fields": ["optim.lr"]}
    about |= {"title": "Rouge-L", "unit": "0–100", "higher_is_better": True}
    return {**about, "chosen": chosen, "candidates": candidates, **changes}


def report_with(*sweeps: dict[str, Any]) -> dict[str, Any]:
    study = fake_study(12)
    return build_report(study, fake_answers(study), Made(sweeps=sweeps), resamples=50)


def test_the_pick_is_told_in_words():
    assert picked_in_words(fake_sweep()) == (
        "KD: optim.lr 0.0001 was picked out of 1e-05 (20.1), 5e-05 (21.1), 0.0001 (22.1), 0.0005 (23.1): "
        "the highest mean over 2 seeds of Rouge-L on validation rows."
    )


def test_a_pick_at_the_edge_is_told():
    assert picked_in_words(fake_sweep(chosen=3)).endswith("the largest value tried: one beyond it may be better still.")
    assert picked_in_words(fake_sweep(chosen=0)).endswith("the smallest value tried: one beyond it may be better still.")
    words = picked_in_words(fake_sweep(["forward_kl", "reverse_kl"], 1, (1,), **BY_NLL, fields=["divergence"]))
    assert words.endswith("the lowest figure of NLL on validation rows.")


def test_page_table_and_json_say_it():
    report = report_with(fake_sweep(), fake_sweep(name="SFT", stage="sft", role="sft"))
    page = render_html(report)
    assert [sweep["sentence"] in page for sweep in report["sweeps"]] == [True, True]
    assert page.index("Values tried") < page.index("Data and loss mask")
    told = io.StringIO()
    print_table(report, Console(width=100, file=told))
    assert "KD: optim.lr 0.0001 was picked out of" in " ".join(told.getvalue().split())


def figures_of(page: str) -> list[str]:
    return re.findall(r'<svg role="img" aria-label="[^"]*one line per value.*?</svg>', page, flags=re.S)


def test_the_figure_has_a_line_for_each_value_and_panel_and_the_pages_colours():
    page = render_html(report_with(fake_sweep(), fake_sweep(name="SFT", stage="sft")))
    found = figures_of(page)
    assert len(found) == 2
    for svg in found:
        ElementTree.fromstring(svg.replace("xlink:href", "href"))
        for panel in ("Training loss", "Rouge-L on the validation rows", "NLL on the validation rows"):
            assert panel in svg
        for step in (0, 2, 4, 6):  # four values, spread over the whole ramp
            assert svg.count(f"stroke: var(--step{step})") >= 3 * 3
        assert "0.0001 (picked)" in svg
        assert "Picked: 0.0001." in svg
        assert not re.search(r"#010[23][0-9a-f]{2}", svg)
    for step in range(7):
        assert len(re.findall(rf"--step{step}: #", page)) == 2, "a colour for either theme"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_values_can_be_drawn(count: int):
    assert len(figures_of(render_html(report_with(fake_sweep([i / 10 + 0.1 for i in range(count)], 0, (1,)))))) == 1


def test_a_sweep_without_curves_has_no_figure():
    sweep = fake_sweep()
    for candidate in sweep["candidates"]:
        candidate["curves"] = []
    page = render_html(report_with(sweep))
    assert figures_of(page) == []
    assert "was picked out of" in page


def test_a_report_without_sweeps_says_nothing_of_them():
    report = report_with()
    assert report["sweeps"] == []
    assert "Values tried" not in render_html(report)


def test_hostile_names_are_escaped():
    sweep = fake_sweep([SCRIPT, "</svg>"], 0, name=SCRIPT, fields=[SCRIPT])
    for candidate in sweep["candidates"]:
        candidate["label"] = SCRIPT
    assert SCRIPT not in render_html(report_with(sweep))


# The control


def compared(kd: dict[str, Any], sft: dict[str, Any]) -> tuple[str, list[str]]:
    """The headline, and the caveats that speak of training, of a KD and an SFT model trained so."""
    study = fake_study(60)
    own = {"KD": {"by": "distill", **kd}, "SFT": sft}
    rows = tuple(
        row.model_copy(update={"trained": tuple(trained_record(seed, **own[row.name]) for seed in row.seeds)})
        if row.name in own
        else row
        for row in study.rows
    )
    analysis = analyse(study.model_copy(update={"rows": rows}), resamples=50)
    return analysis.headline.sentence, [c for c in analysis.caveats if "searched" in c or "alike" in c]


def searched(lr: float, *values: float, **more: Any) -> dict[str, Any]:
    return {"lr": lr, **({"searched": {"optim.lr": list(values)}} if values else {}), **more}


def test_both_searched_over_the_same_values_may_end_with_different_ones():
    headline, caveats = compared(searched(5e-4, *RATES), searched(1e-5, *reversed(RATES)))
    assert "NOT" not in headline
    assert caveats == []


def test_whole_tables_may_be_searched_alike():
    tables = {"searched": {"optim": [{"lr": 1e-5}, {"lr": 5e-4, "warmup": 0.1}]}}
    kd = {"lr": 5e-4, "optim": {"warmup": 0.1}, **tables}
    assert compared(kd, {"lr": 1e-5, "optim": {"warmup": 0.0}, **tables})[1] == []


def test_a_student_that_alone_was_searched_is_favoured_and_the_headline_says_so():
    headline, caveats = compared(searched(5e-4, *RATES), searched(1e-5))
    told = "KD's optim.lr was searched over 4 values, SFT's was not: this favours KD."
    assert headline.endswith(f" This is NOT equal tuning: {told}")
    assert caveats[0].startswith("SFT and KD were not trained alike: optim.lr 1e-05 against 0.0005.")
    assert caveats[1].startswith(told)


def test_it_is_told_even_where_the_pick_is_the_controls_own_value():
    headline, caveats = compared(searched(5e-4, *RATES), searched(5e-4))
    assert "NOT equal tuning" in headline
    assert len(caveats) == 1


def test_a_control_that_was_searched_more_is_favoured():
    headline, _ = compared(searched(5e-4, *RATES[:2]), searched(1e-5, *RATES))
    assert "SFT's optim.lr was searched over 4 values, KD's over 2 values: this favours SFT." in headline


def test_other_values_are_told_without_a_favourite():
    headline, _ = compared(searched(5e-4, *RATES), searched(1e-3, 1e-3, *RATES[1:]))
    assert "KD's optim.lr was searched over 4 values, SFT's over other values." in headline


def test_what_only_distilling_has_is_a_search_too():
    kd = searched(5e-4, *RATES)
    kd["searched"] |= {"divergence": ["forward_kl", {"kind": "generalised_jsd", "beta": 0.5}]}
    headline, _ = compared(kd, searched(1e-5, *RATES))
    assert "KD's divergence was searched over 2 values, SFT's was not: this favours KD." in headline
    assert "optim.lr" not in headline


def test_one_value_is_no_search():
    headline, caveats = compared(searched(5e-4, 5e-4), searched(1e-5, 1e-5))
    assert "NOT equal tuning" not in headline
    assert [caveat for caveat in caveats if "alike" in caveat]

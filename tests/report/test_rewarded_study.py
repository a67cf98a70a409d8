"""Verdicts on models that learned from rewards: over their start, over a control at equal rollouts, and by form alone."""

from typing import Any

import pytest
from fake_study import trained_record
from pydantic import ValidationError

from potstill.study.analysis import Analysis, analyse
from potstill.study.records import MetricInfo, ModelRow, Study, TestRow
from potstill.study.verdicts import Verdict

N, SEEDS = 200, (1, 2, 3)
ROLES = {"Start": "start", "GRPO": "rl", "GRPO 2": "rl", "RS + SFT": "sft", "GRPO 4-bit": "quantized", "Other": "other"}
START = "stage:start"


def model(name: str, passed: int, **changes: Any) -> ModelRow:
    """A model that passes the first so many of the test rows, in every seed."""
    role = ROLES[name]
    own = (None,) if role == "start" else SEEDS
    scores = [[100.0 * (n < passed) for n in range(N)] for _ in own]
    values: dict[str, Any] = {"name": name, "role": role, "model": f"stage:{name.lower()}", "seeds": own}
    if role == "start":
        values["model"] = START
    if role in ("rl", "sft"):
        about = {"by": "grpo" if role == "rl" else "sft", "start": START}
        values |= {"trained": tuple(trained_record(seed, **about) for seed in own), "rollouts": (2_560,) * len(own)}
    return ModelRow(**{**values, "scores": {"pass_at_1": scores}, **changes})


def analysed(*rows: ModelRow, **changes: Any) -> Analysis:
    study = Study(
        metrics=(MetricInfo(name="pass_at_1", title="pass@1", unit="%"),),
        primary="pass_at_1",
        rows=rows,
        tokens=(1,) * N,
        examples=tuple(TestRow(key=str(n), prompt="") for n in range(N)),
        **changes,
    )
    return analyse(study, resamples=1_000)


def verdict(found: Analysis, key: str, a: str = "GRPO") -> Verdict:
    return next(v for v in found.verdicts if v.key == key and v.a == a)


def test_the_headline_is_of_the_start_and_names_the_control():
    found = analysed(model("Start", 40), model("GRPO", 80), model("RS + SFT", 60))
    headline = found.headline
    assert headline.about is not None
    assert (headline.about.key, headline.about.a, headline.about.b) == ("rl_over_start", "GRPO", "Start")
    assert (headline.verdict, headline.shown_as, headline.about.difference) == ("helped", "helped", 20.0)
    assert headline.about.values == (40.0, 20.0)
    assert headline.sentence.startswith("Learning from rewards helped: GRPO is better than Start by 20.0 points of pass@1 [")
    assert "Before 20.0, after 40.0." in headline.sentence
    assert "Over RS + SFT, at equal rollouts: +10.0 [" in headline.sentence
    assert verdict(found, "rl_over_sft").label == "better"
    assert verdict(found, "sft_over_start", "RS + SFT").difference == 10.0
    assert "KD" not in " ".join([headline.sentence, *(v.question + v.sentence for v in found.verdicts), *found.caveats])


def test_the_difference_is_paired_by_row():
    """Rows that both pass or both fail say nothing: 10 of 200 rows won and none lost is shown, whatever the rest does."""
    found = verdict(analysed(model("Start", 95), model("GRPO", 105)), "rl_over_start")
    assert found.ci is not None
    assert 0 < found.ci[0] < 5.0 < found.ci[1] < 9.0  # unpaired: 5 ± 9.8


def test_start_is_what_training_began_with():
    other = tuple(trained_record(seed, by="grpo", start="hf:Elsewhere") for seed in SEEDS)
    found = analysed(model("Start", 40), model("GRPO", 80, trained=other), model("RS + SFT", 60))
    assert not [v for v in found.verdicts if v.key == "rl_over_start"]
    assert found.headline.verdict == "not shown"
    assert "the control was not trained alike" in verdict(found, "rl_over_sft").doubts
    assert any("differ in the model that training began from" in caveat for caveat in found.caveats)


@pytest.mark.parametrize("rollouts", [(2_000,) * 3, None])
def test_unequal_rollouts_are_a_doubt(rollouts: tuple[int, ...] | None):
    found = analysed(model("Start", 40), model("GRPO", 80), model("RS + SFT", 60, rollouts=rollouts))
    claim = verdict(found, "rl_over_sft")
    assert claim.shown_as == "in doubt"
    assert "not at equal rollouts" in claim.doubts
    assert "Over RS + SFT, NOT at equal rollouts" in found.headline.sentence
    said = "GRPO drew 2,560 answers, RS + SFT 2,000" if rollouts else "is not known"
    assert said in claim.sentence
    assert any(said in caveat for caveat in found.caveats)


def test_format_only_stands_in_the_verdict():
    found = analysed(model("Start", 40), model("GRPO", 40, format_only=(True, False, True)))
    assert found.headline.label == "format only"
    said = "rewards of the form rose in 2 of 3 seeds, and none that judges correctness did."
    assert f"Format only: {said}" in found.headline.sentence
    assert found.caveats[0] == f"GRPO: format only: {said}"
    risen = analysed(model("Start", 40), model("GRPO", 80, format_only=(True, False, True)))
    assert (risen.headline.verdict, risen.headline.shown_as) == ("helped", "in doubt")
    assert said.rstrip(".") in risen.headline.sentence
    clean = analysed(model("Start", 40), model("GRPO", 40, format_only=(False,) * 3))
    assert "ormat only" not in clean.headline.sentence + clean.headline.label + " ".join(clean.caveats)


def test_one_seed_of_training_is_a_doubt():
    scores = {"pass_at_1": [[100.0 * (n < 80) for n in range(N)]]}
    record = trained_record(1, by="grpo", start=START)
    once = model("GRPO", 80, seeds=(1,), trained=(record,), rollouts=(2_560,), scores=scores)
    found = analysed(model("Start", 40), once)
    assert found.headline.shown_as == "in doubt"
    assert "one seed of GRPO" in found.headline.sentence
    assert any("no control of rejection sampling and SFT" in caveat for caveat in found.caveats)


def test_a_study_names_its_comparisons():
    rows = (model("Start", 40), model("GRPO", 80), model("GRPO 2", 60), model("RS + SFT", 60))
    pairs = (("GRPO", "RS + SFT"), ("GRPO 2", "GRPO"))
    found = analysed(*rows, compare=pairs)
    assert [(v.key, v.a, v.b) for v in found.verdicts] == [("rl_over_sft", *pairs[0]), ("compared", *pairs[1])]
    assert found.headline.about == found.verdicts[0]
    assert found.verdicts[1].label == "worse"
    assert any(caveat.startswith("2 pairs of models are compared") for caveat in found.caveats)
    with pytest.raises(ValidationError, match="compare names 'Nobody'"):
        analysed(*rows, compare=(("GRPO", "Nobody"),))


def test_a_base_that_only_one_model_was_compared_with_is_not_shipped_for_it():
    """A base that solves nothing, and an arm without a start that solves nothing: neither is worse than the other."""
    base = model("Other", 0, role="base", model="hf:Base")
    zero = model("GRPO 2", 0, trained=tuple(trained_record(seed, by="grpo", start="hf:Base") for seed in SEEDS))
    compare = (("GRPO", "Start"), ("GRPO 2", "Other"))
    found = analysed(base, zero, model("Start", 70), model("GRPO", 74), compare=compare)
    assert verdict(found, "rl_over_start", "GRPO 2").b == "Other"
    assert found.ship.name == "GRPO"


def test_what_to_ship_is_not_shown_worse_than_another():
    assert analysed(model("Start", 40), model("GRPO", 80), model("RS + SFT", 60)).ship.name == "GRPO"
    assert analysed(model("Start", 40), model("GRPO", 40), model("RS + SFT", 40)).ship.name == "Start"
    assert analysed(model("Start", 40), model("GRPO", 60), model("RS + SFT", 80)).ship.name == "RS + SFT"
    aside = model("Other", 60, role="base")  # that nothing is shown better than it says nothing: nobody compared it
    found = analysed(aside, model("Start", 40), model("GRPO", 80), compare=(("GRPO", "Start"),))
    assert found.ship.name == "GRPO"
    packed = model("GRPO 4-bit", 80, source="GRPO", made_from="stage:grpo")
    assert analysed(model("Start", 40), model("GRPO", 80), packed).ship.name == "GRPO 4-bit"
    lossy = packed.model_copy(update={"scores": model("GRPO 4-bit", 60).scores})
    found = analysed(model("Start", 40), model("GRPO", 80), lossy).ship
    assert found.name == "GRPO"
    assert "4 bits hurt" in found.sentence


def test_no_share_of_a_start_is_kept():
    """Who wrote the rows of rejection sampling is in its record as its teacher; it is no teacher of the study."""
    own = tuple(trained_record(seed, by="sft", start=START, teacher=START) for seed in SEEDS)
    found = analysed(model("Start", 40), model("GRPO", 80), model("RS + SFT", 60, trained=own))
    assert not [v for v in found.verdicts if v.key in ("retention", "teacher_over_sft")]

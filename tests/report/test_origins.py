"""No verdict about a model by the scores of another one: what was not measured is said, and never guessed."""

import pytest
from fake_study import fake_study, trained_record
from test_doubts import GOOD, SEEDS, analysed, study_of, with_row

from potstill.report.build import build_report
from potstill.study.analysis import Analysis
from potstill.study.records import Healing, Study


def keys(found: Analysis) -> set[tuple[str, str, str]]:
    return {(verdict.key, verdict.a, verdict.b) for verdict in found.verdicts}


def test_a_quantised_model_whose_origin_was_not_measured_has_no_four_bit_verdict():
    study = with_row(fake_study(), "KD 4-bit", made_from="stage:other", source=None)  # its name begins with "KD" all the same
    found = analysed(study)
    assert not [key for key in keys(found) if key[1] == "KD 4-bit" and key[0] in ("quantized", "retention", "gptq_over_rtn")]
    assert any("KD 4-bit was made from (stage:other) was not measured" in caveat for caveat in found.caveats)
    assert found.ship.name != "KD 4-bit"


def test_rounding_is_a_control_of_the_same_model_only():
    study = with_row(fake_study(), "KD 4-bit", made_from="stage:kd", source="KD")
    assert ("gptq_over_rtn", "KD 4-bit", "KD 4-bit RTN") in keys(analysed(study))
    other = with_row(study, "KD 4-bit RTN", made_from="stage:sft", source="SFT")
    assert "gptq_over_rtn" not in {key for key, *_ in keys(analysed(other))}


def test_two_models_of_one_origin_that_was_not_measured_are_still_compared():
    study = fake_study()
    for name in ("KD 4-bit", "KD 4-bit RTN"):
        study = with_row(study, name, made_from="stage:x")
    assert ("gptq_over_rtn", "KD 4-bit", "KD 4-bit RTN") in keys(analysed(study))
    apart = with_row(study, "KD 4-bit RTN", made_from="stage:y")
    assert "gptq_over_rtn" not in {key for key, *_ in keys(analysed(apart))}


def against_teacher(study: Study) -> Study:
    metrics = tuple(m.model_copy(update={"against_teacher": m.name == "kl_to_teacher"}) for m in study.metrics)
    return study.model_copy(update={"metrics": metrics})


def test_a_distance_to_the_teacher_is_no_primary_metric_and_answers_no_question_about_the_teacher():
    study = against_teacher(fake_study())
    table = study.model_dump()
    with pytest.raises(ValueError, match="compares with the teacher, whose own figure is 0"):
        Study.model_validate({**table, "primary": "kl_to_teacher"})
    for row in table["rows"]:
        row["scores"].setdefault("kl_to_teacher", [[0.0] * len(study.examples)])  # the teacher's own
    found = analysed(Study.model_validate(table))
    by_kl = {verdict.key for verdict in found.verdicts if verdict.metric == "kl_to_teacher"}
    assert "kd_over_sft" in by_kl
    assert not by_kl & {"teacher_over_sft", "retention"}


def test_a_gain_in_likeness_to_a_teacher_that_is_not_ahead_is_in_doubt():
    found = analysed(against_teacher(fake_study(means={"Teacher": 30.0})))
    (verdict,) = [v for v in found.verdicts if (v.key, v.metric) == ("kd_over_sft", "kl_to_teacher")]
    assert "the teacher is not shown better than SFT" in verdict.doubts


def taught_by(study: Study, teacher: str) -> Study:
    return with_row(study, "KD", trained=tuple(trained_record(seed, by="distill", teacher=teacher) for seed in SEEDS))


def test_a_teacher_that_never_taught_is_no_teacher():
    study = taught_by(with_row(study_of(GOOD), "Teacher", model="stage:teacher"), "stage:another")
    found = analysed(study)
    assert found.headline.shown_as == "in doubt"
    assert "the teacher of KD was not measured" in found.headline.sentence
    assert found.caveats[0].startswith("stage:another, which taught KD, was not measured, and Teacher did not teach it")
    assert not {key for key, *_ in keys(found)} & {"teacher_over_sft", "retention"}
    assert analysed(taught_by(study, "stage:teacher")).headline.shown_as == "helped"


def test_the_study_may_say_itself_which_rows_taught():
    study = with_row(with_row(study_of(GOOD), "Teacher", model="path:elsewhere/teacher"), "KD", taught_by=("Teacher",))
    assert ("retention", "KD", "Teacher") in keys(analysed(study))
    assert analysed(with_row(study, "KD", taught_by=())).headline.shown_as == "in doubt"


def test_a_measured_model_of_any_role_that_taught_is_the_teacher():
    study = taught_by(with_row(study_of(GOOD), "Teacher", model="stage:big", role="other"), "stage:big")
    assert {("teacher_over_sft", "Teacher", "SFT"), ("retention", "KD", "Teacher")} <= keys(analysed(study))


def test_a_student_of_its_own_control_had_nothing_to_learn():
    study = taught_by(with_row(study_of({"KD": 45.0, "SFT": 40.0}), "SFT", model="stage:sft"), "stage:sft")
    found = analysed(study)
    assert found.headline.shown_as == "in doubt"
    assert "teacher_over_sft" not in {key for key, *_ in keys(found)}


@pytest.mark.parametrize(("split", "shown"), [("validation", "in doubt"), ("test", "helped")])
def test_rows_that_picked_a_setting_do_not_test_it(split: str, shown: str):
    study = study_of(GOOD, data={"split": split})
    searched = {"optim.lr": [1e-5, 1e-4]}
    for name, about in (("KD", {"by": "distill", "teacher": "stage:teacher"}), ("SFT", {"by": "sft"})):
        records = tuple(trained_record(seed, searched=searched, **about) for seed in SEEDS)
        study = with_row(study, name, trained=records)
    found = analysed(study)
    assert found.headline.shown_as == shown
    assert ("these rows picked optim.lr" in found.headline.sentence) == (split == "validation")
    assert any("use split = 'test'" in caveat for caveat in found.caveats) == (split == "validation")


def test_a_model_that_was_trained_on_test_rows_is_in_doubt():
    found = analysed(with_row(study_of(GOOD), "KD", known_rows=7))
    assert found.headline.shown_as == "in doubt"
    assert "KD was trained on some of these rows" in found.headline.sentence
    assert any(caveat.startswith("Test rows were trained on: KD 7 of 60.") for caveat in found.caveats)


def healed(study: Study, kept: tuple[bool, ...], **changes: object) -> Study:
    """`KD 4-bit RTN` as a model that was healed of `KD 4-bit`, per seed to half of its KL or away from it."""
    done = tuple(Healing(student="stage:kd 4-bit", kl_before=0.2, kl_after=0.1 if one else 0.4, kept=one) for one in kept)
    return with_row(study, "KD 4-bit RTN", role="quantized", made_from="stage:kd", source="KD", healing=done, **changes)


def test_a_row_whose_healing_was_kept_for_some_seeds_says_for_which_many():
    records = tuple(trained_record(seed, by="heal", start="stage:kd 4-bit") for seed in (1, 2, 3))
    study = healed(fake_study(), (True, False, True), trained=records)
    report = build_report(study, [])
    (row,) = [row for row in report["rows"] if row["name"] == "KD 4-bit RTN"]
    assert row["healing"].endswith("0.2 -> 0.133 nats/token, 33% less, kept for 2 of 3 seeds")
    (caveat,) = [one for one in report["caveats"] if "healing" in one]
    assert caveat.endswith("0.2 -> 0.4 nats/token for 1 of 3 seeds, which are stage:kd 4-bit as it was.")
    assert ("compared", "KD 4-bit RTN", "KD 4-bit") in keys(analysed(study))
    whole = healed(study, (True, True, True))
    assert not [one for one in build_report(whole, [])["caveats"] if "healing" in one]


def test_a_row_whose_healing_was_kept_for_no_seed_is_asked_nothing_that_its_student_is_not():
    study = healed(fake_study(), (False, False, False), equals="KD 4-bit")
    rounded = study.row("KD 4-bit").model_copy(
        update={"name": "rounded", "role": "rtn", "made_from": "stage:kd", "source": "KD"}
    )
    study = with_row(study.model_copy(update={"rows": (*study.rows, rounded)}), "KD 4-bit", made_from="stage:kd", source="KD")
    found = keys(analysed(study))
    assert ("gptq_over_rtn", "KD 4-bit", "rounded") in found
    assert ("gptq_over_rtn", "KD 4-bit RTN", "rounded") not in found
    assert ("compared", "KD 4-bit RTN", "KD 4-bit") not in found

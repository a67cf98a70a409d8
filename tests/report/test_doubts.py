"""What turns a headline amber, what is said of zero, of the floor, of rows and answers that were lost, and what to ship."""

from typing import Any

import numpy as np
import pytest
from fake_study import fake_study, trained_record

from potstill.core.errors import UserError
from potstill.study.analysis import Analysis, analyse
from potstill.study.bootstrap import Sample
from potstill.study.floor import near_floor
from potstill.study.power import TYPICAL_SD, smallest_difference
from potstill.study.questions import Question
from potstill.study.records import MetricInfo, ModelRow, Study, TestRow
from potstill.study.verdicts import difference_verdict

ROLES = {"KD": "kd", "SFT": "sft", "Base": "base", "KD 4-bit": "quantized", "SFT 4-bit": "quantized", "Teacher": "teacher"}
SEEDS = (1, 2, 3, 4, 5)


def study_of(
    means: dict[str, float], *, N: int = 60, seeds: tuple[int, ...] = SEEDS, unit: str = "0–100", **changes: Any
) -> Study:
    """One metric, higher is better on a scale, lower in nats; rows of one difficulty, a little luck, trained alike."""
    rng = np.random.default_rng(0)
    difficulty_N = rng.uniform(-1, 1, N)
    rows = []
    for name, mean in means.items():
        trained = ROLES[name] in ("kd", "sft")
        own = seeds if trained or ROLES[name] == "quantized" else (None,)
        scores_SN = mean + 0.1 * mean * difficulty_N + rng.normal(0, 0.002, (len(own), N)) * mean
        about = {"by": "distill", "teacher": "stage:teacher"} if ROLES[name] == "kd" else {"by": "sft"}
        records = tuple(trained_record(seed, **about) for seed in own) if trained else None
        rows.append(ModelRow(name=name, role=ROLES[name], seeds=own, trained=records, scores={"m": scores_SN.tolist()}))
    values = {
        "metrics": (MetricInfo(name="m", title="M", unit=unit, higher_is_better=unit != "nats/token"),),
        "primary": "m",
        "rows": tuple(rows),
        "tokens": (1,) * N,
        "examples": tuple(TestRow(key=str(n), prompt="") for n in range(N)),
    }
    return Study(**{**values, **changes})


def analysed(study: Study) -> Analysis:
    return analyse(study, resamples=1_000)


def with_row(study: Study, name: str, **changes: Any) -> Study:
    rows = tuple(row.model_copy(update=changes) if row.name == name else row for row in study.rows)
    return study.model_copy(update={"rows": rows})


GOOD = {"KD": 45.0, "SFT": 40.0, "Base": 20.0, "Teacher": 60.0}


def test_a_clean_gain_is_green():
    found = analysed(study_of(GOOD))
    assert (found.headline.verdict, found.headline.shown_as, found.headline.label) == ("helped", "helped", "helped")
    assert found.verdicts[0].doubts == ()


@pytest.mark.parametrize("teacher", [0.0, 39.0, 40.0])
def test_a_teacher_that_is_not_better_than_the_control_makes_it_amber(teacher: float):
    found = analysed(study_of({**GOOD, "Teacher": teacher}))
    assert (found.headline.verdict, found.headline.shown_as) == ("helped", "in doubt")
    assert "In doubt: the teacher is not shown better than SFT." in found.headline.sentence
    assert "there was nothing to teach" in found.caveats[0]
    kept = [v for v in found.verdicts if v.key == "retention"]
    assert not any("keeps" in v.sentence for v in kept)


def test_a_teacher_whose_lead_is_within_luck_is_not_shown_better():
    study = study_of({**GOOD, "Teacher": 40.5})
    noise_N = np.random.default_rng(3).normal(0, 20, 60)
    teacher = study.row("Teacher").scores_SN("m")
    assert teacher is not None
    study = with_row(study, "Teacher", scores={"m": tuple(map(tuple, (teacher + noise_N - noise_N.mean()).tolist()))})
    assert analysed(study).headline.shown_as == "in doubt"


def test_no_teacher_is_a_caveat():
    found = analysed(study_of({name: GOOD[name] for name in ("KD", "SFT")}))
    assert found.headline.shown_as == "helped"
    assert "No teacher was measured" in found.caveats[0]


@pytest.mark.parametrize("means", [{"KD": 6.2, "SFT": 1.1, "Teacher": 50.0}, {"KD": 12.0, "SFT": 10.0, "Teacher": 90.0}])
def test_scores_near_the_floor_make_it_amber(means: dict[str, float]):
    found = analysed(study_of(means))
    assert (found.headline.verdict, found.headline.shown_as) == ("helped", "in doubt")
    assert "both score near the floor" in found.headline.sentence
    assert any("All students score near the floor of M" in caveat for caveat in found.caveats)
    assert found.ship.name is None


@pytest.mark.parametrize(
    ("unit", "higher", "a", "b", "teacher", "expected"),
    [
        ("%", True, 9.9, 0.0, None, True),
        ("%", True, 10.0, 0.0, None, False),
        ("%", True, 20.0, 12.0, 90.0, True),
        ("%", True, 23.0, 12.0, 90.0, False),
        ("%", False, 95.0, 99.0, None, True),
        ("%", False, 5.0, 3.0, None, False),
        ("nats/token", False, 5.0, 6.0, 2.0, True),
        ("nats/token", False, 4.5, 6.0, 2.0, False),
        ("words", True, 0.0, 0.0, 9.0, False),
        ("%", True, None, 1.0, None, False),
    ],
)
def test_the_floor_of_each_scale(unit: str, higher: bool, a: float, b: float, teacher: float, expected: bool):
    assert near_floor(MetricInfo(name="m", unit=unit, higher_is_better=higher), a, b, teacher) is expected


def test_one_seed_makes_it_amber_and_says_why():
    found = analysed(study_of(GOOD, seeds=(1,)))
    assert found.headline.shown_as == "in doubt"
    assert "In doubt: one seed." in found.headline.sentence
    assert "Another seed could turn the verdict" in " ".join(found.caveats)


def test_a_base_trained_once_is_given_like_any_other_base():
    made_here = with_row(study_of(GOOD), "Base", seeds=(7,), trained=(trained_record(7, by="pretrain"),))
    verdict = next(v for v in analysed(made_here).verdicts if v.key == "sft_over_base")
    assert (verdict.verdict, verdict.doubts) == ("helped", ())


def test_which_model_was_trained_once_is_named():
    once = study_of(GOOD)
    scores = once.row("SFT").scores_SN("m")
    assert scores is not None
    once = with_row(once, "SFT", seeds=(1,), trained=(trained_record(1, by="sft"),), scores={"m": scores[:1].tolist()})
    assert "In doubt: one seed of SFT" in analysed(once).headline.sentence


def test_a_metric_unfit_for_the_rows_makes_it_amber():
    study = study_of(GOOD, unfit={"m": "it finds no words in Chinese"})
    found = analysed(study)
    assert found.headline.shown_as == "in doubt"
    assert "M is unfit for these rows: it finds no words in Chinese." in found.caveats


@pytest.mark.parametrize(
    ("key", "words"),
    [("kd_over_sft", "the interval ends at 0."), ("quantized", "a loss of up to"), ("sft_over_base", "ends at 0")],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_that_ends_at_zero_does_not_make_scores_the_same(key: str, words: str, sign: int):
    study = study_of({"KD": 1.0, "SFT": 1.0}, N=12)
    question = Question(key, "?", study.row("KD"), study.row("SFT"))
    sample = Sample(sign * np.eye(12)[0], np.ones(12), {}, (), 12, 12)
    replicates_R = sign * np.array([0.0] * 100 + [0.35] * 800 + [0.99] * 100)
    found = difference_verdict(question, study.metrics[0], sample, replicates_R)
    assert found.ci == ((0, 0.99) if sign == 1 else (-0.99, 0))
    assert found.verdict == "not shown"
    assert "the same" not in found.sentence
    assert (words if sign == -1 or key != "quantized" else "the interval ends at 0") in found.sentence


def test_scores_that_differ_by_rounding_alone_are_the_same():
    study = study_of({"KD": 40.0, "SFT": 40.0})
    x = study.row("SFT").scores_SN("m")
    assert x is not None
    study = with_row(study, "KD", scores={"m": tuple(map(tuple, (x * (1 + 4e-16)).tolist()))})
    found = analysed(study).verdicts[0]
    assert (found.difference, found.ci, found.verdict) == (0, (0, 0), "not shown")


def test_not_shown_says_what_could_have_been_shown():
    study = study_of({"KD": 40.0, "SFT": 40.0})
    rng = np.random.default_rng(1)
    x = study.row("SFT").scores_SN("m")
    assert x is not None
    study = with_row(study, "KD", scores={"m": tuple(map(tuple, (x + rng.normal(0, 9, x.shape)).tolist()))})
    found = analysed(study).verdicts[0]
    assert found.verdict == "not shown"
    assert found.ci is not None
    half = (found.ci[1] - found.ci[0]) / 2
    assert found.could_show == pytest.approx(half)
    assert found.sentence.endswith(f"These rows and seeds could have shown a difference of about {half:.1f} points of M.")


def test_a_difference_stays_on_its_scale():
    found = analysed(study_of({"KD": 97.0, "SFT": 3.0}, seeds=(1, 2)))
    apart = with_row(study_of({"KD": 97.0, "SFT": 3.0}, seeds=(1, 2)), "SFT", scores={"m": ((0.0,) * 60, (60.0,) * 60)})
    assert found.verdicts[0].ci is not None
    wide = analysed(apart).verdicts[0].ci
    assert wide is not None
    assert (wide[0], wide[1]) == (-100.0, 100.0)


def test_rows_contexts_and_answers_that_were_lost_are_told():
    study = study_of(GOOD, left_out={"prompt too long": 20, "never": 0}, shortened=7, decoding={"max_new_tokens": 16})
    records = tuple(
        trained_record(seed, by="distill", rows=1, left_out={"longer than max_tokens": 247}, shortened=1) for seed in SEEDS
    )
    study = with_row(study, "KD", trained=records, cut_answers=(10, 0, 2, 0, 0))
    told = " ".join(analysed(study).caveats)
    assert "Training rows were left out: KD 247 of 248 (247 longer than max_tokens)." in told
    assert "Contexts of training rows were shortened: KD 1 of 1." in told
    assert "20 of 80 test rows were left out before scoring (20 prompt too long)." in told
    drawn = analysed(study.model_copy(update={"of_rows": 900, "near_duplicates": "3 of 60 test rows are nearly repeated"}))
    assert "20 of 900 test rows were left out before scoring (20 prompt too long)." in drawn.caveats
    assert any("3 of 60 test rows are nearly repeated. A model may know" in caveat for caveat in drawn.caveats)
    assert "The contexts of 7 of 60 test rows were shortened" in told
    assert "Answers reached the limit of 16 tokens and were cut there: KD 12 of 300." in told
    quiet = " ".join(analysed(study_of(GOOD)).caveats)
    assert not any(word in quiet for word in ("left out", "shortened", "limit", "unfit", "form"))


def test_forms_that_differ_are_told():
    study = study_of(GOOD)
    for name, template in (("KD", "a"), ("SFT", "a"), ("Base", "a"), ("Teacher", "b")):
        study = with_row(study, name, template=template)
    kl = MetricInfo(name="kl", title="KL", unit="nats/token", against_teacher=True)
    study = with_row(study, "KD", teacher_reads="at token 1", apart="at token 2")
    study = with_row(study, "SFT", apart="at token 2", scores={**study.row("SFT").scores, "kl": study.row("SFT").scores["m"]})
    study = study.model_copy(update={"metrics": (*study.metrics, kl)})
    told = " ".join(analysed(study).caveats)
    assert "asked in different forms, each in that of its own template (KD, SFT and Base; Teacher)" in told
    assert "The teacher of KD was made to read the rows in the student's form, which is not its own: at token 1." in told
    assert "KL was not taken of KD, which the teacher reads in another form: at token 2." in told
    assert "For KL of SFT the teacher was made to read the rows in a form that is not its own: at token 2." in told


def test_abstentions_are_told_with_their_reasons():
    study = study_of(GOOD, seeds=(1,))
    x = study.row("KD").scores["m"][0]
    study = with_row(study, "KD", scores={"m": ((None, None, *x[2:]),)}, abstentions={"m": {"the sandbox died": 2}})
    assert "M gave no score for some answers (KD 2 of 60: 2 the sandbox died)" in " ".join(analysed(study).caveats)


def test_fewer_than_six_groups_are_a_caveat_and_no_verdict():
    study = study_of(GOOD)
    shared = tuple(example.model_copy(update={"key": str(n % 5)}) for n, example in enumerate(study.examples))
    found = analysed(study.model_copy(update={"examples": shared}))
    assert found.headline.verdict == "not shown"
    assert "Only 5 clusters (titles, modules …) of test rows: fewer than 6 clusters give no verdict at all." in found.caveats


def test_records_must_be_one_per_seed():
    row = study_of(GOOD).row("KD")
    short = row.model_copy(update={"trained": (trained_record(1),)})
    with pytest.raises(ValueError, match="KD: trained has 1 entries for 5 seeds"):
        Study(**{**dict(study_of(GOOD)), "rows": (short,)})


def test_a_study_with_records_survives_its_file(tmp_path: Any):
    study = fake_study(6)
    study.save(tmp_path)
    assert Study.load(tmp_path) == study
    with pytest.raises(UserError, match="does not exist"):
        Study.load(tmp_path / "none")


# What to ship


@pytest.mark.parametrize(
    ("means", "name", "why"),
    [
        (GOOD, "KD", "it is better than SFT"),
        ({**GOOD, "KD": 40.0}, "SFT", "KD is not shown better, and it needs no teacher"),
        ({**GOOD, "KD": 30.0}, "SFT", "KD is not shown better"),
        ({**GOOD, "Base": 50.0}, "Base", "it scores higher than KD"),
        ({"KD": 45.0, "Teacher": 60.0}, None, "without an SFT-only student nobody knows"),
        ({**GOOD, "KD 4-bit": 44.99}, "KD 4-bit", "at 4 bits it is smaller, and no loss is shown"),
        ({**GOOD, "KD 4-bit": 30.0}, "KD", "at full precision, because 4 bits hurt"),
        ({**GOOD, "KD": 40.0, "KD 4-bit": 40.0}, "SFT", "its 4-bit form was not measured (KD 4-bit came from another model)"),
        ({**GOOD, "Teacher": 30.0}, "KD", "in doubt (the teacher is not shown better than SFT)"),
        ({"Teacher": 60.0}, None, "no student was measured"),
    ],
)
def test_what_to_ship(means: dict[str, float], name: str | None, why: str):
    study = study_of(means)
    if "KD 4-bit" in means and means["KD 4-bit"] == 44.99:
        x = study.row("KD").scores_SN("m")
        assert x is not None
        noise_N = np.random.default_rng(2).normal(0, 0.5, x.shape[1])
        study = with_row(study, "KD 4-bit", scores={"m": tuple(map(tuple, (x + noise_N - noise_N.mean()).tolist()))})
    found = analysed(study).ship
    assert found.name == name
    assert why in found.sentence


# What can be shown


def test_the_smallest_difference_is_the_half_width_that_the_interval_will_have():
    rng = np.random.default_rng(4)
    N, S = 200, 4
    halves = []
    for _ in range(30):
        kd = 50 + rng.normal(0, 2.0, (S, 1)) + rng.normal(0, 20, N)
        study = study_of({"KD": 50.0, "SFT": 50.0}, N=N, seeds=(1, 2, 3, 4))
        study = with_row(study, "KD", scores={"m": tuple(map(tuple, kd.tolist()))})
        study = with_row(study, "SFT", scores={"m": ((50.0,) * N,) * S})
        ci = analyse(study, resamples=500).verdicts[0].ci
        assert ci is not None
        halves.append((ci[1] - ci[0]) / 2)
    expected = smallest_difference(rows=N, seeds=S, sd_rows=20, sd_seeds=2.0).difference
    assert np.mean(halves) == pytest.approx(expected, rel=0.1)


def test_the_smallest_difference_falls_with_rows_and_seeds_and_rises_with_clusters_shared():
    sd = TYPICAL_SD["0–100"]
    base = smallest_difference(rows=400, seeds=3, sd_rows=sd).difference
    assert smallest_difference(rows=1600, seeds=3, sd_rows=sd).difference < base
    assert smallest_difference(rows=400, seeds=10, sd_rows=sd).difference < base
    assert smallest_difference(rows=400, seeds=2, sd_rows=sd).difference > base
    assert smallest_difference(rows=400, clusters=10, seeds=3, sd_rows=sd).difference > base
    metric = MetricInfo(name="m", title="M", unit="0–100")
    assert "can show no difference" in smallest_difference(rows=50, clusters=5, sd_rows=sd).sentence(metric)
    one = smallest_difference(rows=100, clusters=20, sd_rows=sd).sentence(metric)
    assert one.startswith("100 test rows in 20 groups and 1 seed can show a difference of about ")
    assert "training luck is not in it" in one

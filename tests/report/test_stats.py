"""Laws of the bootstrap and of the verdicts, an independent oracle, and a broken bootstrap that a law rejects."""

from typing import Any

import numpy as np
import pytest
from fake_study import fake_study

from potstill.study.analysis import analyse
from potstill.study.bootstrap import Sample, percentile_interval, resample
from potstill.study.records import MetricInfo, ModelRow, Study, TestRow
from potstill.study.verdicts import Verdict

ROWS = {"KD": "kd", "SFT": "sft", "Base": "base", "KD 4-bit": "quantized", "KD RTN": "rtn", "Teacher": "teacher"}


def study_of(
    scores: dict[str, Any],
    *,
    seeds: tuple[int | None, ...] = (None,),
    tokens: Any = None,
    keys: Any = None,
    **changes: Any,
) -> Study:
    """One metric, [seeds, rows] or [rows] of scores per model; models with fewer seeds than told have none."""
    arrays = {name: np.atleast_2d(np.asarray(value, dtype=float)) for name, value in scores.items()}
    N = next(iter(arrays.values())).shape[1]
    metric = {"name": "m", "title": "M", "unit": "%", "over": "rows" if tokens is None else "tokens", **changes}
    rows = [
        ModelRow(name=name, role=ROWS[name], seeds=seeds if len(x) == len(seeds) else (None,), scores={"m": x.tolist()})
        for name, x in arrays.items()
    ]
    return Study(
        metrics=(MetricInfo(**metric),),
        primary="m",
        rows=tuple(rows),
        tokens=tuple([1] * N if tokens is None else tokens),
        examples=tuple(TestRow(key=str(key), prompt="") for key in (range(N) if keys is None else keys)),
    )


def verdict(study: Study, key: str = "kd_over_sft", **options: Any) -> Verdict:
    return next(v for v in analyse(study, **{"resamples": 1_000, **options}).verdicts if v.key == key)


def scores(N: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(50, 15, N)


@pytest.mark.parametrize("seeds", [(None,), (1, 2, 3)])
def test_identical_scores_differ_by_exactly_nothing(seeds):
    x = np.stack([scores(40, seed=s) for s in range(len(seeds))])
    found = verdict(study_of({"KD": x, "SFT": x, "Base": x[0]}, seeds=seeds))
    assert (found.difference, found.ci, found.verdict) == (0, (0, 0), "not shown")
    assert "the scores are the same" in found.sentence


def test_a_constant_shift_helps_and_its_interval_is_a_point():
    x = scores(40)
    found = verdict(study_of({"KD": x + 5, "SFT": x}))
    assert found.verdict == "helped"
    assert found.ci == pytest.approx((5, 5))
    assert verdict(study_of({"KD": x - 5, "SFT": x})).verdict == "hurt"


def test_direction_turns_where_lower_is_better_and_nothing_else_does():
    x = scores(40)
    up = verdict(study_of({"KD": x + 5, "SFT": x}, higher_is_better=False))
    down = verdict(study_of({"KD": x - 5, "SFT": x}, higher_is_better=False))
    assert (up.verdict, down.verdict) == ("hurt", "helped")
    assert up.difference == pytest.approx(5)
    assert "KD is worse than SFT by 5.0" in up.sentence


def test_swapping_the_models_mirrors_the_interval():
    a, b = scores(40), scores(40, seed=1)
    one, other = verdict(study_of({"KD": a, "SFT": b})), verdict(study_of({"KD": b, "SFT": a}))
    assert one.ci == pytest.approx((-other.ci[1], -other.ci[0]))


def test_token_metrics_are_ratios_of_sums():
    study = study_of({"KD": [2.0, 30.0] * 10, "SFT": [1.0, 10.0] * 10}, tokens=[1, 10] * 10)
    analysis = analyse(study, resamples=200)
    assert analysis.estimates["KD"]["m"].value == pytest.approx(320 / 110)
    assert analysis.verdicts[0].difference == pytest.approx((320 - 110) / 110)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(7)
    hits = 0
    for repeat in range(200):
        x = rng.normal(50, 15, 60)
        low, high = verdict(study_of({"KD": x + 2 + rng.normal(0, 5, 60), "SFT": x}), resamples=500, seed=repeat).ci
        hits += low <= 2 <= high
    assert 0.90 <= hits / 200 <= 0.985


def test_interval_over_seeds_covers_and_plain_seed_resampling_would_not():
    rng = np.random.default_rng(8)
    hits = rows_only = 0
    for repeat in range(200):
        x = rng.normal(50, 15, 60)
        kd = x + 2 + rng.normal(0, 1.5, (5, 1)) + rng.normal(0, 2, (5, 60))
        sft = np.tile(x, (5, 1))
        low, high = verdict(study_of({"KD": kd, "SFT": sft}, seeds=(1, 2, 3, 4, 5)), resamples=500, seed=repeat).ci
        hits += low <= 2 <= high
        low, high = verdict(study_of({"KD": kd.mean(0), "SFT": x}), resamples=500, seed=repeat).ci
        rows_only += low <= 2 <= high
    assert 0.88 <= hits / 200 <= 0.985
    assert rows_only / 200 < 0.75


def test_variance_over_seeds_is_inflated_to_be_unbiased():
    deviations = np.array([-1.0, 1.0])
    sample = Sample(np.zeros(5), np.ones(5), {(1, 2): deviations}, (), 5, 5)
    variance = resample([sample], resamples=20_000, seed=0).var()
    assert variance == pytest.approx(deviations.var(ddof=1) / 2, rel=0.03)


def unpaired_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The deliberately broken one: it draws other rows for each model."""
    ones = np.ones(len(a))
    draws = [
        resample([Sample(x, ones, {}, (), len(x), len(x))], resamples=2_000, seed=seed)[0] for seed, x in enumerate((a, b))
    ]
    found = percentile_interval(draws[0] - draws[1])
    assert found is not None
    return found


def paired_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    found = verdict(study_of({"KD": a, "SFT": b}), resamples=2_000).ci
    assert found is not None
    return found


def shift_law(interval: Any) -> bool:
    """A constant shift between paired scores leaves nothing to luck, so the interval is a point."""
    x = scores(50)
    low, high = interval(x + 3, x)
    return high - low < 1e-9


def test_shift_law_accepts_the_paired_bootstrap_and_rejects_an_unpaired_one():
    assert shift_law(paired_interval)
    assert not shift_law(unpaired_interval)


K_CLUSTERS, CLUSTER_SIZE, ICC = 20, 10, 0.3


def coverage(keys: Any, repeats: int = 200) -> float:
    """How often the interval holds the truth where 30% of a difference's variance is common to a cluster."""
    rng = np.random.default_rng(11)
    hits = 0
    for repeat in range(repeats):
        common = np.repeat(rng.normal(0, np.sqrt(ICC), K_CLUSTERS), CLUSTER_SIZE)
        luck = common + rng.normal(0, np.sqrt(1 - ICC), K_CLUSTERS * CLUSTER_SIZE)
        x = rng.normal(50, 15, K_CLUSTERS * CLUSTER_SIZE)
        low, high = verdict(study_of({"KD": x + 2 + luck, "SFT": x}, keys=keys), resamples=500, seed=repeat).ci
        hits += low <= 2 <= high
    return hits / repeats


def cluster_law(keys: Any) -> bool:
    return 0.90 <= coverage(keys) <= 0.985


def test_coverage_law_accepts_drawing_clusters_and_rejects_drawing_rows():
    assert cluster_law(np.repeat(np.arange(K_CLUSTERS), CLUSTER_SIZE))
    assert not cluster_law(np.arange(K_CLUSTERS * CLUSTER_SIZE))
    assert coverage(np.arange(K_CLUSTERS * CLUSTER_SIZE)) < 0.8


def test_with_unique_keys_rows_are_drawn_as_ever():
    a, b = scores(40), scores(40, seed=3)
    w = np.random.default_rng(2).integers(1, 50, 40)
    found = verdict(study_of({"KD": a, "SFT": b}, tokens=w), seed=6)
    drawn = np.random.default_rng([6, 0]).integers(0, 40, size=(1_000, 40))
    expected = np.quantile((a - b)[drawn].sum(1) / w[drawn].sum(1), [0.025, 0.975])
    assert found.ci == pytest.approx(tuple(expected), rel=1e-9)
    assert (found.rows, found.clusters) == (40, 40)


def test_clusters_may_differ_in_size_and_stand_in_any_order():
    keys = np.random.default_rng(4).integers(0, 12, 70)
    a, b, w = scores(70), scores(70, seed=3), np.random.default_rng(2).integers(1, 50, 70)
    order = np.argsort(keys, kind="stable")
    mixed = verdict(study_of({"KD": a, "SFT": b}, tokens=w, keys=keys), resamples=20_000)
    drawn = np.random.default_rng(1).integers(0, 12, size=(20_000, 12))
    sums, weights = np.bincount(keys, a - b), np.bincount(keys, w)
    expected = np.quantile(sums[drawn].sum(1) / weights[drawn].sum(1), [0.025, 0.975])
    assert mixed.difference == pytest.approx((a - b).sum() / w.sum())
    assert mixed.ci == pytest.approx(tuple(expected), abs=0.05 * (expected[1] - expected[0]))
    ordered = verdict(study_of({"KD": a[order], "SFT": b[order]}, tokens=w[order], keys=keys[order]), resamples=20_000)
    assert ordered.ci == pytest.approx(mixed.ci, abs=0.05 * (expected[1] - expected[0]))


def test_rows_of_too_few_clusters_give_no_verdict_however_many_they_are():
    x = scores(60)
    analysis = analyse(study_of({"KD": x + 5, "SFT": x}, keys=np.arange(60) % 5), resamples=100)
    assert analysis.verdicts[0].verdict == "not shown"
    assert "on 60 test rows in 5 clusters: too few" in analysis.headline[2]
    assert analysis.verdicts[0].clusters == 5
    told = " ".join(analysis.caveats)
    assert "60 test rows fall into 5 groups that share a key; the bootstrap draws groups" in told
    assert "Only 5 clusters (titles, modules …) of test rows" in told
    assert "groups" not in " ".join(analyse(study_of({"KD": x, "SFT": x}), resamples=100).caveats)
    one = analyse(study_of({"KD": x + 5, "SFT": x}, keys=["a"] * 60), resamples=100)
    assert one.verdicts[0].ci is None


def test_pairing_narrows_the_interval():
    x = scores(80)
    y = x + np.random.default_rng(1).normal(1, 3, 80)
    (low, high), (wide_low, wide_high) = paired_interval(y, x), unpaired_interval(y, x)
    assert high - low < 0.5 * (wide_high - wide_low)


def test_agrees_with_scipy():
    from scipy.stats import bootstrap as scipy_bootstrap

    a, b = scores(60), scores(60, seed=3) * 0.3 + 30
    w = np.random.default_rng(2).integers(1, 50, 60)
    ours = verdict(study_of({"KD": a, "SFT": b}, tokens=w), resamples=20_000).ci

    def difference(a: np.ndarray, b: np.ndarray, w: np.ndarray, axis: int) -> np.ndarray:
        return (a - b).sum(axis) / w.sum(axis)

    options = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": 20_000, "batch": 2_000}
    theirs = scipy_bootstrap((a, b, w), difference, rng=np.random.default_rng(0), **options).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


def test_same_seed_same_numbers_and_chunks_do_not_matter(monkeypatch):
    study = fake_study(50)
    whole = analyse(study, resamples=300, seed=4)
    monkeypatch.setattr("potstill.study.bootstrap._CELLS", 50 * 100)
    assert analyse(study, resamples=300, seed=4).verdicts == whole.verdicts
    assert analyse(study, resamples=300, seed=5).verdicts != whole.verdicts


def test_seeds_are_paired_only_when_the_lists_are_equal():
    luck = np.array([[-2.0], [0.0], [2.0]])
    x = scores(60)
    paired = study_of({"KD": x + 1 + luck, "SFT": x + luck}, seeds=(1, 2, 3))
    assert verdict(paired).ci == pytest.approx((1, 1))
    apart = paired.model_copy(update={"rows": (paired.rows[0], paired.rows[1].model_copy(update={"seeds": (4, 5, 6)}))})
    low, high = verdict(apart).ci
    assert high - low > 2
    assert any("not have the same seeds" in caveat for caveat in analyse(apart, resamples=10).caveats)


def test_abstained_rows_leave_both_sides_and_are_counted():
    x = scores(40)
    kd = x + 1
    kd[:3] = np.nan
    sft = x.copy()
    sft[:3] = 1e6  # would swamp the rest
    analysis = analyse(study_of({"KD": kd, "SFT": sft}), resamples=200)
    assert analysis.verdicts[0].difference == pytest.approx(1)
    assert analysis.verdicts[0].rows == 37
    assert analysis.estimates["KD"]["m"].abstained == 3
    assert any("KD 3 of 40" in caveat for caveat in analysis.caveats)


def test_a_model_that_never_scored_gives_no_number_and_no_verdict():
    analysis = analyse(study_of({"KD": [np.nan] * 40, "SFT": scores(40)}), resamples=100)
    assert analysis.estimates["KD"]["m"].value is None
    assert analysis.headline[0] == "not shown"
    assert "nothing can be said" in analysis.headline[2]


@pytest.mark.parametrize("N", [1, 2, 5])
def test_unanimous_rows_are_no_verdict_when_there_are_too_few(N):
    x = scores(N)
    found = verdict(study_of({"KD": x + 5, "SFT": x, "KD 4-bit": x - 9}))
    assert found.verdict == "not shown"
    assert verdict(study_of({"KD": x, "SFT": x, "KD 4-bit": x - 9}), "four_bits").label == "not shown"


def test_an_empty_test_set_says_that_it_says_nothing():
    study = fake_study(0)
    analysis = analyse(study, resamples=10)
    assert analysis.headline[0] == "not shown"
    assert "Only 0 test rows" in " ".join(analysis.caveats)


def test_four_bits_tells_the_loss_that_is_still_possible():
    x = scores(100)
    noise = np.random.default_rng(1).normal(0, 4, 100)
    found = verdict(study_of({"KD": x, "KD 4-bit": x + noise - noise.mean()}), "four_bits")
    assert found.label == "no loss shown"
    assert f"a loss of up to {-found.ci[0]:.1f} points" in found.sentence
    assert verdict(study_of({"KD": x, "KD 4-bit": x - 2}), "four_bits").sentence.startswith("4 bits hurt")


def test_four_bits_falls_back_on_the_model_it_came_from():
    x = scores(40)
    found = verdict(study_of({"SFT": x, "KD 4-bit": x, "KD RTN": x - 1}), "four_bits")
    assert (found.a, found.b) == ("KD 4-bit", "SFT")
    assert verdict(study_of({"SFT": x, "KD 4-bit": x, "KD RTN": x - 1}), "gptq_over_rtn").verdict == "helped"


def test_retention_is_a_ratio_of_means_with_an_interval():
    x = scores(60)
    found = verdict(study_of({"KD": 0.96 * x, "SFT": x, "Teacher": x}), "retention")
    assert found.difference == pytest.approx(96)
    assert found.ci == pytest.approx((96, 96))
    assert found.verdict == "measured"
    assert found.sentence == "KD keeps 96.0% [96.0, 96.0] of the teacher's M."
    assert not [v for v in analyse(study_of({"KD": x, "Teacher": 0 * x}), resamples=50).verdicts if v.key == "retention"]


def test_without_an_sft_student_distilling_is_not_shown_however_near_the_teacher():
    x = scores(60)
    outcome, _, sentence = analyse(study_of({"KD": x, "Base": x - 40, "Teacher": x}), resamples=100).headline
    assert outcome == "not shown"
    assert "no SFT-only student" in sentence


def with_training(study: Study, **trained: tuple[int | None, int | None]) -> Study:
    rows = [
        row.model_copy(
            update=dict(zip(("trained_response_tokens", "optimizer_steps"), [(t,) for t in trained[row.name]], strict=True))
        )
        for row in study.rows
    ]
    return study.model_copy(update={"rows": tuple(rows)})


def test_unequal_tokens_are_said_in_the_headline():
    study = study_of({"KD": scores(60) + 5, "SFT": scores(60)})
    unequal = analyse(with_training(study, KD=(4000, 10), SFT=(1000, 10)), resamples=50)
    assert "NOT at equal tokens: KD trained on 4.00 times the response tokens of SFT" in unequal.headline[2]
    assert any("NOT compared at equal tokens: 4,000 against 1,000" in caveat for caveat in unequal.caveats)
    steps = analyse(with_training(study, KD=(1000, 20), SFT=(1000, 10)), resamples=50)
    assert "2.00 times the optimizer steps" in steps.headline[2]
    equal = analyse(with_training(study, KD=(1004, 10), SFT=(1000, 10)), resamples=50)
    assert "equal" not in equal.headline[2]
    assert "is not known" in analyse(with_training(study, KD=(1000, 10), SFT=(None, None)), resamples=50).headline[2]


def trained_alike_but(study: Study, prompts: str | None = None, **told: dict[str, Any] | None) -> Study:
    common = {"optim.lr": 1e-5, "optim.steps": 9, "data": "d", "prompts": "p", "start": "stage:a"}
    with_all = {name: None if own is None else common | own for name, own in told.items()}
    rows = tuple(row.model_copy(update={"trained_with": with_all[row.name]}) for row in study.rows)
    return study.model_copy(update={"rows": rows, "prompts": prompts})


def test_a_control_trained_otherwise_is_told():
    study = study_of({"KD": scores(60) + 5, "SFT": scores(60)})
    apart = trained_alike_but(study, KD={"optim.lr": 5e-4, "start": "stage:b"}, SFT={})
    analysis = analyse(apart, resamples=50)
    expected = "SFT and KD were not trained alike: optim.lr 1e-05 against 0.0005; start stage:a against stage:b"
    assert any(caveat.startswith(expected) for caveat in analysis.caveats)
    assert "NOT like against like: SFT and KD differ in the model that training began from." in analysis.headline[2]
    tuned = analyse(trained_alike_but(study, KD={"optim.lr": 5e-4}, SFT={}), resamples=50)
    assert "not trained alike: optim.lr 1e-05 against 0.0005." in " ".join(tuned.caveats)
    assert "NOT like" not in tuned.headline[2]
    data = analyse(trained_alike_but(study, KD={}, SFT={"data": "e", "prompts": "q"}), resamples=50)
    assert "differ in training data and prompts." in data.headline[2]
    more = analyse(trained_alike_but(study, KD={"optim.new": 1}, SFT={}), resamples=50)
    assert "optim.new unset against 1" in " ".join(more.caveats)


@pytest.mark.parametrize("sft", [{}, None])
def test_a_control_trained_alike_or_elsewhere_is_not_accused(sft):
    analysis = analyse(trained_alike_but(study_of({"KD": scores(60), "SFT": scores(60)}), KD={}, SFT=sft), resamples=50)
    assert "alike" not in " ".join(analysis.caveats)
    assert "NOT like" not in analysis.headline[2]


def test_prompts_other_than_those_of_training_are_told():
    study = study_of({"KD": scores(60), "SFT": scores(60), "Base": scores(60)})
    told = {"KD": {}, "SFT": {"prompts": "q"}, "Base": None}
    asked = analyse(trained_alike_but(study, "p", **told), resamples=50)
    assert "not those that SFT trained with" in " ".join(asked.caveats)
    for prompts, sft in (("p", {}), (None, {"prompts": "q"})):
        quiet = analyse(trained_alike_but(study, prompts, **{**told, "SFT": sft}), resamples=50)
        assert "prompts of this evaluation" not in " ".join(quiet.caveats)


def test_caveats_speak_of_seeds_rows_sampling_and_dropped_rows():
    one = " ".join(analyse(fake_study(20, seeds=(1,)), resamples=10).caveats)
    assert "trained with one seed" in one
    assert "Only 20 test rows" in one
    two = " ".join(analyse(fake_study(40, seeds=(1, 2)), resamples=10).caveats)
    assert "Fewer than 4 seeds (KD: 2, SFT: 2)" in two
    assert "3 test rows were dropped before scoring (3 too long)" in two
    sampled = fake_study(40, decoding={"method": "sample", "temperature": 1.0})
    assert "sampled at temperature 1.0" in " ".join(analyse(sampled, resamples=10).caveats)

"""Laws of the bootstrap and of the verdicts, an independent oracle, and a broken bootstrap that a law rejects."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_study import fake_study, trained_record

from potstill.study.analysis import analyse
from potstill.study.bootstrap import Sample, few_clusters, percentile_interval, resample, student
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


@pytest.mark.parametrize(("score", "unit"), [(0.0, "%"), (100.0, "%"), (0.0, "nats/token"), (50.0, "%")])
def test_scores_that_are_all_at_an_end_of_their_scale_leave_room_for_rows_that_were_not_drawn(score, unit):
    study = study_of({"KD": np.full(40, score), "SFT": np.full(40, score)}, unit=unit)
    found = analyse(study, resamples=100)
    ci = found.estimates["KD"]["m"].ci
    assert ci is not None
    share = (abs(ci[1] - ci[0])) / 100
    if unit == "%" and score in (0, 100):
        assert score in ci
        # a share of so many is missed by 40 draws once in forty
        assert (1 - share) ** 40 == pytest.approx(0.025)
        assert "the scores are the same, and on other rows could differ by up to 8.8 points of M" in found.verdicts[0].sentence
    else:
        assert share == 0


@pytest.mark.parametrize("differing", [5, 6])
def test_right_and_wrong_rows_need_as_many_that_differ_as_the_sign_test(differing):
    wrong, right = np.zeros(60), np.zeros(60)
    right[:differing] = 100.0
    found = verdict(study_of({"KD": right, "SFT": wrong}), resamples=4_000)
    assert found.ci is not None
    assert found.ci[0] > 0
    # by luck alone 2 · 0.5^n
    assert found.verdict == ("helped" if 2 * 0.5**differing < 0.05 else "not shown")
    assert ("they differ in 5 rows, too few for a verdict" in found.sentence) == (differing == 5)


def test_more_right_rows_never_lower_the_end_of_the_interval():
    ends = []
    for right in range(6):
        x = np.zeros(40)
        x[:right] = 100.0
        ci = analyse(study_of({"KD": x, "SFT": x}), resamples=4_000).estimates["KD"]["m"].ci
        assert ci is not None
        ends.append(ci[1])
    assert ends == sorted(ends)


@pytest.mark.parametrize(("rows", "shipped"), [(40, "KD"), (90, "KD 4-bit")])
def test_four_bits_are_not_shipped_for_a_few_rows_that_are_all_alike(rows, shipped):
    x = np.tile([0.0, 100.0], rows // 2)
    study = study_of({"KD": x, "SFT": np.zeros(rows), "KD 4-bit": x})
    assert analyse(study, resamples=500).ship.name == shipped


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


@pytest.mark.parametrize("S", [2, 3, 4, 10])
def test_the_seeds_part_is_students_t_times_the_standard_error(S: int):
    from scipy.stats import t

    values_S = np.random.default_rng(S).normal(0, 3, S)
    sample = Sample(np.zeros(5), np.ones(5), {tuple(range(S)): values_S - values_S.mean()}, (), 5, 5)
    low, high = np.quantile(resample([sample], resamples=200_000, seed=0)[0], [0.025, 0.975])
    expected = t.ppf(0.975, S - 1) * values_S.std(ddof=1) / np.sqrt(S)
    assert high == pytest.approx(expected, rel=0.05)
    assert low == pytest.approx(-expected, rel=0.05)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 30, 200])
def test_students_points_are_those_of_scipy(df: int):
    from scipy.stats import t

    assert student(df) == pytest.approx(t.ppf(0.975, df), rel=2e-3)


def seed_coverage(S: int, luck: float, *, paired: bool, K: int = 40, draw: Any = resample) -> float:
    """How often intervals of 400 studies hold a true difference of 0: rows' noise 1, and training luck in each model."""
    rng = np.random.default_rng(S)
    studies = []
    for _ in range(400):
        rows_K = rng.normal(0, np.sqrt(K), K)
        kd_S, sft_S = rng.normal(0, luck, (2, S))
        groups = {tuple(range(S)): kd_S - sft_S} if paired else {tuple(range(S)): kd_S, tuple(range(S, 2 * S)): -sft_S}
        deviations = {seeds: values_S - values_S.mean() for seeds, values_S in groups.items()}
        studies.append(Sample(rows_K + kd_S.mean() - sft_S.mean(), np.ones(K), deviations, (), K, K))
    intervals = [percentile_interval(values_R) for values_R in draw(studies, resamples=2_000, seed=0)]
    return float(np.mean([found is not None and found[0] <= 0 <= found[1] for found in intervals]))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("luck", [1, 5, 20])
@pytest.mark.parametrize("S", [2, 3, 5, 10])
def test_coverage_law_few_seeds_hold_what_they_say(S: int, luck: float, paired: bool):
    assert seed_coverage(S, luck, paired=paired) >= 0.93


def drawing_seeds(samples: Any, *, resamples: int, seed: int) -> np.ndarray:
    """The deliberately broken one: it draws the seeds themselves with replacement, as a plain bootstrap does."""
    rng = np.random.default_rng(seed)
    values_MR = resample([replace(sample, deviations={}) for sample in samples], resamples=resamples, seed=seed)
    for sample, values_R in zip(samples, values_MR, strict=True):
        for seeds, deviation_S in sample.deviations.items():
            S = len(seeds)
            values_R += np.sqrt(S / (S - 1)) * (rng.multinomial(S, [1 / S] * S, size=resamples) / S @ deviation_S)
    return values_MR


def test_coverage_law_rejects_drawing_the_seeds_themselves():
    assert seed_coverage(3, 5, paired=True, draw=drawing_seeds) < 0.90


@pytest.mark.parametrize("K", [6, 12, 40])
def test_coverage_law_few_clusters_hold_what_they_say(K: int):
    assert seed_coverage(2, 0, paired=True, K=K) >= 0.925


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
    study = study_of({"KD": a, "SFT": b}, tokens=w)
    found = verdict(study, seed=6)
    drawn = np.random.default_rng([6, 0]).integers(0, 40, size=(1_000, 40))
    by_key = np.array(
        sorted(range(40), key=lambda n: study.examples[n].key)
    )  # clusters are numbered in the order of their keys
    plain = np.quantile((a - b)[by_key][drawn].sum(1) / w[by_key][drawn].sum(1), [0.025, 0.975])
    value = (a - b).sum() / w.sum()
    expected = value + few_clusters(40) * (plain - value)
    assert few_clusters(40) == pytest.approx(1.0445, abs=1e-3)  # √(40/39) · 2.0227 / 1.96
    assert found.ci == pytest.approx(tuple(expected), rel=1e-9)
    assert (found.rows, found.clusters) == (40, 40)


def test_clusters_may_differ_in_size_and_stand_in_any_order():
    keys = np.random.default_rng(4).integers(0, 12, 70)
    a, b, w = scores(70), scores(70, seed=3), np.random.default_rng(2).integers(1, 50, 70)
    order = np.argsort(keys, kind="stable")
    mixed = verdict(study_of({"KD": a, "SFT": b}, tokens=w, keys=keys), resamples=20_000)
    drawn = np.random.default_rng(1).integers(0, 12, size=(20_000, 12))
    sums, weights = np.bincount(keys, a - b), np.bincount(keys, w)
    plain, value = np.quantile(sums[drawn].sum(1) / weights[drawn].sum(1), [0.025, 0.975]), sums.sum() / weights.sum()
    expected = value + few_clusters(12) * (plain - value)
    assert mixed.difference == pytest.approx((a - b).sum() / w.sum())
    assert mixed.ci == pytest.approx(tuple(expected), abs=0.05 * (expected[1] - expected[0]))
    ordered = verdict(study_of({"KD": a[order], "SFT": b[order]}, tokens=w[order], keys=keys[order]), resamples=20_000)
    assert ordered.ci == pytest.approx(mixed.ci, abs=0.05 * (expected[1] - expected[0]))


def test_rows_of_too_few_clusters_give_no_verdict_however_many_they_are():
    x = scores(60)
    analysis = analyse(study_of({"KD": x + 5, "SFT": x}, keys=np.arange(60) % 5), resamples=100)
    assert analysis.verdicts[0].verdict == "not shown"
    assert "on 60 test rows in 5 clusters: too few" in analysis.headline.sentence
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
    width, value = theirs.high - theirs.low, (a - b).sum() / w.sum()
    expected = [value + few_clusters(60) * (bound - value) for bound in (theirs.low, theirs.high)]
    assert ours == pytest.approx(tuple(expected), abs=0.03 * width)


@pytest.mark.parametrize("seeds", [((1, 2, 3), (4, 5, 6)), ((1, 2, 3), (1, 2))])
def test_neither_the_order_of_models_nor_of_rows_changes_an_interval(seeds):
    rng = np.random.default_rng(5)
    rows = [
        ModelRow(name=name, role=role, seeds=own, scores={"m": rng.normal(50, 9, (len(own), 30)).tolist()})
        for name, role, own in (("KD", "kd", seeds[0]), ("SFT", "sft", seeds[1]), ("Other", "other", (7, 8)))
    ]
    examples = tuple(TestRow(key=str(n % 11), prompt="") for n in range(30))
    metrics = (MetricInfo(name="m", title="M", unit="0–100"),)
    made = [
        Study(metrics=metrics, primary="m", rows=order, tokens=(1,) * 30, examples=examples)
        for order in itertools.permutations(rows)
    ]
    mixed = rng.permutation(30)
    turned = [
        row.model_copy(update={"scores": {"m": tuple(tuple(s[n] for n in mixed) for s in row.scores["m"])}}) for row in rows
    ]
    shuffled = tuple(examples[n] for n in mixed)
    made.append(Study(metrics=metrics, primary="m", rows=tuple(turned), tokens=(1,) * 30, examples=shuffled))
    found = [analyse(study, resamples=400) for study in made]
    for other in found[1:]:
        assert other.verdicts[0].ci == pytest.approx(found[0].verdicts[0].ci, rel=1e-9)
        for name in ("KD", "SFT", "Other"):
            assert other.estimates[name]["m"].ci == pytest.approx(found[0].estimates[name]["m"].ci, rel=1e-9)


def test_same_seed_same_numbers_and_chunks_do_not_matter(monkeypatch):
    study = fake_study(50)
    whole = analyse(study, resamples=300, seed=4)
    monkeypatch.setattr("potstill.study.bootstrap._CELLS", 50 * 100)
    for one, other in zip(analyse(study, resamples=300, seed=4).verdicts, whole.verdicts, strict=True):
        assert one.ci == (pytest.approx(other.ci, rel=1e-12) if other.ci is not None else None)
        assert one.sentence == other.sentence
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
    assert analysis.headline.verdict == "not shown"
    assert "nothing can be said" in analysis.headline.sentence


@pytest.mark.parametrize("N", [1, 2, 5])
def test_unanimous_rows_are_no_verdict_when_there_are_too_few(N):
    x = scores(N)
    found = verdict(study_of({"KD": x + 5, "SFT": x, "KD 4-bit": x - 9}))
    assert found.verdict == "not shown"
    assert verdict(study_of({"KD": x, "SFT": x, "KD 4-bit": x - 9}), "quantized").label == "not shown"


def test_an_empty_test_set_says_that_it_says_nothing():
    study = fake_study(0)
    analysis = analyse(study, resamples=10)
    assert analysis.headline.verdict == "not shown"
    assert "Only 0 test rows" in " ".join(analysis.caveats)


def test_four_bits_tells_the_loss_that_is_still_possible():
    x = scores(100)
    noise = np.random.default_rng(1).normal(0, 4, 100)
    found = verdict(study_of({"KD": x, "KD 4-bit": x + noise - noise.mean()}), "quantized")
    assert found.label == "no loss shown"
    assert f"a loss of up to {-found.ci[0]:.1f} points" in found.sentence
    assert verdict(study_of({"KD": x, "KD 4-bit": x - 2}), "quantized").sentence.startswith("4 bits hurt")


def test_four_bits_falls_back_on_the_model_it_came_from():
    x = scores(40)
    found = verdict(study_of({"SFT": x, "KD 4-bit": x, "KD RTN": x - 1}), "quantized")
    assert (found.a, found.b) == ("KD 4-bit", "SFT")
    assert verdict(study_of({"SFT": x, "KD 4-bit": x, "KD RTN": x - 1}), "gptq_over_rtn").verdict == "helped"


def test_retention_is_a_ratio_of_means_with_an_interval_and_no_difference():
    x = scores(60)
    found = verdict(study_of({"KD": 0.96 * x, "SFT": x - 20, "Teacher": x}), "retention")
    assert (found.difference, found.ratio) == (None, pytest.approx(96))
    assert found.ci == pytest.approx((96, 96))
    assert found.verdict == "measured"
    assert found.sentence == "KD keeps 96.0% [96.0, 96.0] of the teacher's M."
    assert not [v for v in analyse(study_of({"KD": x, "Teacher": 0 * x}), resamples=50).verdicts if v.key == "retention"]


def test_a_share_of_a_teacher_that_is_not_ahead_is_no_share_kept():
    x = scores(60)
    found = verdict(study_of({"KD": 1.09 * x, "SFT": x + 1, "Teacher": x}), "retention")
    assert found.label == "teacher not ahead"
    assert found.sentence.endswith("Teacher is not shown better than SFT, so that is no share kept.")
    alone = verdict(study_of({"KD": 1.09 * x, "Teacher": x}), "retention")
    assert (alone.label, "keeps" in alone.sentence) == ("above the teacher", False)


def test_without_an_sft_student_distilling_is_not_shown_however_near_the_teacher():
    x = scores(60)
    headline = analyse(study_of({"KD": x, "Base": x - 40, "Teacher": x}), resamples=100).headline
    assert (headline.verdict, headline.about) == ("not shown", None)
    assert "no SFT-only student" in headline.sentence


def with_training(study: Study, **changes: dict[str, Any] | None) -> Study:
    """The same study, its models trained alike but for what is told; None: nobody knows."""
    rows = []
    for row in study.rows:
        own = changes.get(row.name)
        trained = None if own is None else tuple(trained_record(seed, **own) for seed in row.seeds)
        rows.append(row.model_copy(update={"trained": trained}))
    return study.model_copy(update={"rows": tuple(rows)})


TAUGHT = {"by": "distill", "teacher": "stage:teacher"}


def test_unequal_tokens_are_said_in_the_headline():
    study = study_of({"KD": scores(60) + 5, "SFT": scores(60)})
    few, many = {"response_tokens": 1000, "steps": 10}, {"response_tokens": 4000, "steps": 10}
    unequal = analyse(with_training(study, KD=TAUGHT | many, SFT=few), resamples=50)
    assert "NOT at equal tokens: KD trained on 4.00 times the response tokens of SFT" in unequal.headline.sentence
    assert unequal.headline.shown_as == "in doubt"
    assert any("NOT compared at equal tokens: 4,000 against 1,000" in caveat for caveat in unequal.caveats)
    steps = analyse(with_training(study, KD=TAUGHT | few | {"steps": 20}, SFT=few), resamples=50)
    assert "2.00 times the optimizer steps" in steps.headline.sentence
    equal = analyse(with_training(study, KD=TAUGHT | few | {"response_tokens": 1004}, SFT=few), resamples=50)
    assert "equal" not in equal.headline.sentence
    assert "is not known" in analyse(with_training(study, KD=TAUGHT, SFT=None), resamples=50).headline.sentence


@pytest.mark.parametrize("by", ["distill", "gkd", "grpo", "anything"])
def test_law_nothing_is_decided_by_the_kind_of_a_stage(by: str):
    study = study_of({"KD": scores(60) + 5, "SFT": scores(60), "Base": scores(60)})
    told = [
        analyse(with_training(study, KD=TAUGHT | {"by": kind, "steps": 1880}, SFT={}), resamples=50) for kind in ("distill", by)
    ]
    assert told[0].headline == told[1].headline
    assert told[0].caveats == told[1].caveats
    assert told[1].verdicts[0].equal_tokens is False
    assert "2.00 times the optimizer steps" in told[1].headline.sentence


def test_tokens_are_compared_seed_by_seed_where_the_seeds_are_the_same():
    x = np.stack([scores(40, seed=s) for s in (1, 2)])
    study = study_of({"KD": x, "SFT": x}, seeds=(1, 2))
    kd = tuple(trained_record(seed, **TAUGHT, response_tokens=tokens) for seed, tokens in ((1, 500), (2, 1500)))
    sft = tuple(trained_record(seed, response_tokens=1000) for seed in (1, 2))
    rows = tuple(row.model_copy(update={"trained": t}) for row, t in zip(study.rows, (kd, sft), strict=True))
    found = analyse(study.model_copy(update={"rows": rows}), resamples=50)
    assert found.verdicts[0].equal_tokens is False


def test_a_control_that_was_taught_or_saw_other_rows_is_none():
    study = study_of({"KD": scores(60) + 5, "SFT": scores(60)})
    taught = analyse(with_training(study, KD=TAUGHT, SFT={"teacher": "stage:other"}), resamples=50)
    assert "SFT is NO control: stage:other taught it." in taught.headline.sentence
    assert taught.headline.shown_as == "in doubt"
    untaught = analyse(with_training(study, KD={}, SFT={}), resamples=50)
    assert "KD was NOT distilled: no teacher taught it." in untaught.headline.sentence
    fewer = analyse(with_training(study, KD=TAUGHT, SFT={"rows": 1}), resamples=50)
    assert "differ in the number of training rows" in fewer.headline.sentence
    order = analyse(with_training(study, KD=TAUGHT, SFT={"order": "other"}), resamples=50)
    assert "saw their training rows in another order" in " ".join(order.caveats)
    assert "NOT" not in order.headline.sentence


def test_a_control_trained_otherwise_is_told():
    study = study_of({"KD": scores(60) + 5, "SFT": scores(60)})
    analysis = analyse(with_training(study, KD=TAUGHT | {"lr": 5e-4, "start": "stage:b"}, SFT={}), resamples=50)
    expected = "SFT and KD were not trained alike: optim.lr 1e-05 against 0.0005; start stage:base against stage:b"
    assert any(caveat.startswith(expected) for caveat in analysis.caveats)
    assert "NOT like against like: SFT and KD differ in the model that training began from." in analysis.headline.sentence
    tuned = analyse(with_training(study, KD=TAUGHT | {"lr": 5e-4}, SFT={}), resamples=50)
    assert "not trained alike: optim.lr 1e-05 against 0.0005." in " ".join(tuned.caveats)
    assert "NOT like" not in tuned.headline.sentence
    data = analyse(with_training(study, KD=TAUGHT, SFT={"data": "e", "prompts": "q"}), resamples=50)
    assert "differ in training data and prompts." in data.headline.sentence
    more = analyse(with_training(study, KD=TAUGHT | {"optim": {"batch_size": 16, "new": 1}}, SFT={}), resamples=50)
    assert "optim.new unset against 1" in " ".join(more.caveats)


@pytest.mark.parametrize("sft", [{}, None])
def test_a_control_trained_alike_or_elsewhere_is_not_accused(sft):
    study = with_training(study_of({"KD": scores(60), "SFT": scores(60)}), KD=TAUGHT, SFT=sft)
    analysis = analyse(study, resamples=50)
    assert "alike" not in " ".join(analysis.caveats)
    assert "NOT like" not in analysis.headline.sentence


def test_prompts_other_than_those_of_training_are_told():
    study = study_of({"KD": scores(60), "SFT": scores(60), "Base": scores(60)})
    apart = with_training(study, KD=TAUGHT, SFT={"prompts": "q"})
    asked = analyse(apart.model_copy(update={"prompts": "p"}), resamples=50)
    assert "not those that SFT trained with" in " ".join(asked.caveats)
    for quiet in (apart, with_training(study, KD=TAUGHT, SFT={}).model_copy(update={"prompts": "p"})):
        assert "prompts of this evaluation" not in " ".join(analyse(quiet, resamples=50).caveats)


def test_caveats_speak_of_seeds_rows_sampling_and_rows_left_out():
    one = " ".join(analyse(fake_study(20, seeds=(1,)), resamples=10).caveats)
    assert "trained with one seed" in one
    assert "Only 20 test rows" in one
    two = " ".join(analyse(fake_study(40, seeds=(1, 2)), resamples=10).caveats)
    assert "Fewer than 5 seeds (KD: 2, SFT: 2)" in two
    assert "12.7 standard errors with 2 seeds" in two
    assert "3 of 43 test rows were left out before scoring (3 prompt too long)" in two
    sampled = fake_study(40, decoding={"method": "sample", "temperature": 1.0})
    assert "sampled at temperature 1.0" in " ".join(analyse(sampled, resamples=10).caveats)


def test_tokens_of_unequal_forms_are_no_common_unit():
    """Each model's NLL is per token of its own form; where the forms have other lengths, nothing is compared by it."""
    metrics = (
        MetricInfo(name="m", title="M", unit="0–100"),
        MetricInfo(name="nll", title="NLL", unit="nats/token", higher_is_better=False, over="tokens"),
    )
    text, nats = [[50.0, 60.0] * 5], [[4.0, 8.0] * 5]
    rows = tuple(
        ModelRow(name=name, role=role, seeds=(1,), tokens=own, scores={"m": text, "nll": nats})
        for name, role, own in (("KD", "kd", None), ("SFT", "sft", (9,) * 10), ("Base", "base", None))
    )
    examples = tuple(TestRow(key=str(n), prompt="") for n in range(10))
    found = analyse(Study(metrics=metrics, primary="m", rows=rows, tokens=(2,) * 10, examples=examples), resamples=100)
    assert found.estimates["KD"]["nll"].value == pytest.approx(3.0)
    assert found.estimates["SFT"]["nll"].value == pytest.approx(6 / 9)
    assert {(v.a, v.b, v.metric) for v in found.verdicts if v.key != "retention"} == {("KD", "SFT", "m"), ("SFT", "Base", "m")}
    assert any("(KD and Base 20; SFT 90), so NLL per token cannot be compared" in caveat for caveat in found.caveats)


@pytest.mark.parametrize(("base", "says"), [("hf:o/full", "Cutting and fine-tuning hurt"), ("stage:cut", "Fine-tuning hurt")])
def test_a_student_cut_out_of_its_base_is_not_said_to_be_hurt_by_fine_tuning(base, says):
    """Unless the base is the student as it was cut."""
    rng = np.random.default_rng(1)
    base_N = rng.uniform(40, 60, 30)
    cut = tuple(trained_record(seed, by="sft", init="abc", start="stage:cut") for seed in (1, 2, 3, 4, 5))
    rows = (
        ModelRow(name="SFT", role="sft", seeds=(1, 2, 3, 4, 5), trained=cut, scores={"m": [(base_N - 20).tolist()] * 5}),
        ModelRow(name="Base", role="base", model=base, scores={"m": [base_N.tolist()]}),
    )
    examples = tuple(TestRow(key=str(n), prompt="") for n in range(30))
    metrics = (MetricInfo(name="m", title="M", unit="0–100"),)
    found = analyse(Study(metrics=metrics, primary="m", rows=rows, tokens=(1,) * 30, examples=examples), resamples=200)
    assert found.verdicts[0].sentence.startswith(f"{says}: SFT is worse than Base by 20.0")


def _given(means: dict[str, float], roles: dict[str, str], N: int = 40) -> Study:
    """Models of one metric, their scores a fixed distance apart with a little noise on each row."""
    rng = np.random.default_rng(3)
    level_N = rng.uniform(30, 60, N)
    rows = tuple(
        ModelRow(name=name, role=roles[name], scores={"m": [(level_N + mean + rng.normal(0, 1, N)).tolist()]})
        for name, mean in means.items()
    )
    examples = tuple(TestRow(key=str(n), prompt="") for n in range(N))
    metrics = (MetricInfo(name="m", title="M", unit="0–100"),)
    return Study(metrics=metrics, primary="m", rows=rows, tokens=(1,) * N, examples=examples)


def test_candidates_are_compared_with_the_base_and_each_other_and_nothing_is_said_to_have_helped():
    roles = {"old": "base", "new": "candidate", "alike": "candidate", "big": "teacher"}
    found = analyse(_given({"old": 0, "new": 10, "alike": 0, "big": 20}, roles), resamples=500)
    assert {(v.a, v.b): v.verdict for v in found.verdicts if v.key == "compared"} == {
        ("new", "old"): "better",
        ("alike", "old"): "not shown",
        ("big", "old"): "better",
        ("alike", "new"): "worse",
        ("big", "new"): "better",
        ("big", "alike"): "better",
    }
    assert found.headline.label == "better"
    assert found.headline.sentence.startswith("new is better than old by ")
    assert {(v.a, v.label[-4:]) for v in found.verdicts if v.key == "retention"} == {("new", "kept"), ("alike", "kept")}
    assert found.ship.name == "new"
    assert found.ship.sentence == "Ship new: it is better than old and alike."
    assert any(caveat.startswith("6 pairs of models are compared") for caveat in found.caveats)
    said = " ".join([found.ship.sentence, *found.caveats, *(f"{v.sentence} {v.label} {v.verdict}" for v in found.verdicts)])
    assert not any(word in said for word in ("istill", "helped", "hurt", "student", "taught"))


def test_where_no_candidate_is_shown_better_the_base_is_kept():
    found = analyse(_given({"old": 0, "new": 0}, {"old": "base", "new": "candidate"}), resamples=500)
    (verdict,) = found.verdicts
    assert (verdict.verdict, verdict.label) == ("not shown", "no difference shown")
    assert verdict.sentence.startswith("Not shown that new and old differ: new − old is ")
    assert found.ship.sentence == "Ship old: no other model is shown better than it by M."


def test_a_teacher_that_is_not_ahead_of_the_base_leaves_no_share_to_keep():
    roles = {"old": "base", "new": "candidate", "big": "teacher"}
    found = analyse(_given({"old": 0, "new": 10, "big": -5}, roles), resamples=500)
    (share,) = (v for v in found.verdicts if v.key == "retention")
    assert share.label == "teacher not ahead"
    assert found.ship.sentence == "Ship new: it is better than old."


def test_sums_over_bytes_are_divided_by_the_bytes_of_the_same_rows():
    """Nats 4 and 8 on answers of 2 and 6 bytes: (4 + 8) / (2 + 6), whatever the tokens."""
    metrics = (
        MetricInfo(name="m", title="M", unit="0–100"),
        MetricInfo(name="nll", title="NLL", unit="nats/byte", higher_is_better=False, over="bytes"),
    )
    rows = tuple(
        ModelRow(name=name, role=role, tokens=tokens, scores={"m": [[5.0] * 10], "nll": [[4.0, 8.0] * 5]})
        for name, role, tokens in (("a", "base", None), ("b", "candidate", (9,) * 10))
    )
    examples = tuple(TestRow(key=str(n), prompt="") for n in range(10))
    study = Study(metrics=metrics, primary="m", rows=rows, tokens=(2,) * 10, bytes=(2, 6) * 5, examples=examples)
    found = analyse(study, resamples=100)
    assert [found.estimates[name]["nll"].value for name in "ab"] == [pytest.approx(1.5)] * 2
    assert ("b", "a", "nll") in {(v.a, v.b, v.metric) for v in found.verdicts}
    with pytest.raises(ValueError, match="bytes has 0 entries for 10 test rows"):
        Study(metrics=metrics, primary="m", rows=rows, tokens=(2,) * 10, examples=examples)

"""Whether a difference is more than luck: a paired bootstrap over clusters of test rows and training seeds, and its verdicts.

For a model with scores x[s, n] (seed s, test row n) and weights w[n] (1, or the response tokens of the row) the value is

    mean over s of  Σ_n x[s, n] / Σ_n w[n]

Test rows with equal keys (questions on one paragraph, functions of one module) form one cluster: they rise and fall
together, so that drawing them one by one makes intervals too narrow (20 clusters of 10 rows, of whose variance 30% is
the cluster's: 95% intervals cover 67%; Cameron, Gelbach and Miller, Bootstrap-based improvements for inference with
clustered errors, 2008). One resample draws K of the K clusters with replacement, each with all its rows, *the same ones
for every model*, and S seeds with replacement, the same ones for models with equal lists of seeds. The value remains a
ratio of sums over all rows drawn. It is computed as (resampled clusters, all seeds) + √(S/(S−1)) · (mean deviation
of the drawn seeds from their average). A plain bootstrap over S seeds has only (S−1)/S of the variance, half of it
with two seeds; the factor mends that. What it cannot mend is that two or three seeds say little about their own spread:
such intervals remain too narrow, and a caveat says so (simulated with luck of the seeds twice that of the rows:
95% intervals cover 87% with two seeds, 93% with three). Luck that is particular to a row *and* a seed enters both
terms, which widens the interval a little (compare Owen, The pigeonhole bootstrap, 2007).

Intervals are percentile intervals (Efron and Tibshirani, An introduction to the bootstrap, 1993, chapter 13).
A comparison uses the rows on which both models have a score from all of their seeds; a row on which a metric abstained
is left out on both sides, never set to 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from potstill.study.records import MetricInfo, ModelRow

LEVEL = 0.95
_CELLS = 4_000_000  # entries of the resampling matrix held at once: 32 MB


@dataclass(frozen=True)
class Sample:
    """A statistic ready to be resampled: sums of seed-averaged scores and of weights per cluster, and the seeds' deviations.

    Attributes:
        deviations: for each list of seeds, how far the value of each lies from their average.
        rows, clusters: how many were scored.
    """

    scores_K: np.ndarray
    weights_K: np.ndarray
    deviations: dict[tuple[int | None, ...], np.ndarray]
    by_seed: tuple[float | None, ...]
    rows: int
    clusters: int

    @property
    def value(self) -> float | None:
        weight = self.weights_K.sum()
        return float(self.scores_K.sum() / weight) if self.rows and weight > 0 else None

    @classmethod
    def of(
        cls, row: ModelRow, metric: MetricInfo, tokens: Sequence[int], clusters_N: np.ndarray, keep_N: np.ndarray
    ) -> "Sample":
        """The statistic of one model over the rows to keep; the model must have scores there."""
        scores_SN = row.scores_SN(metric.name)
        assert scores_SN is not None
        scores_SN = np.where(keep_N, scores_SN, 0.0)
        weights_N = keep_N * (np.asarray(tokens, dtype=float) if metric.over == "tokens" else 1.0)
        K = int(clusters_N.max(initial=-1)) + 1
        scores_K = np.bincount(clusters_N, scores_SN.mean(0), minlength=K)
        weights_K = np.bincount(clusters_N, weights_N, minlength=K)
        if weights_N.sum() == 0:
            return cls(scores_K, weights_K, {}, (None,) * len(scores_SN), 0, 0)
        by_seed = scores_SN.sum(1) / weights_N.sum()
        deviations = {row.seeds: by_seed - by_seed.mean()} if len(by_seed) > 1 else {}
        kept = len(np.unique(clusters_N[keep_N]))
        return cls(scores_K, weights_K, deviations, tuple(map(float, by_seed)), int(keep_N.sum()), kept)

    def minus(self, other: "Sample") -> "Sample":
        """The difference on the same rows, taken before resampling so that equal scores give exactly 0."""
        deviations = dict(self.deviations)
        for seeds, deviation in other.deviations.items():
            deviations[seeds] = deviations[seeds] - deviation if seeds in deviations else -deviation
        return Sample(self.scores_K - other.scores_K, self.weights_K, deviations, (), self.rows, self.clusters)


def resample(samples: Sequence[Sample], *, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap every sample with the same draws of clusters, and of seeds where the lists of seeds are equal.

    Returns:
        [samples, resamples]; NaN where a resample drew no scored row.
    """
    if not samples:
        return np.empty((0, resamples))
    K = len(samples[0].scores_K)
    columns_KM = np.stack([column for sample in samples for column in (sample.scores_K, sample.weights_K)], axis=1)
    sums_RM = np.concatenate([counts_RK @ columns_KM for counts_RK in _cluster_counts(K, resamples, seed)])
    with np.errstate(divide="ignore", invalid="ignore"):
        values_MR = (sums_RM[:, 0::2] / sums_RM[:, 1::2]).T
    shares: dict[tuple[int | None, ...], np.ndarray] = {}
    for sample, values_R in zip(samples, values_MR, strict=True):
        for seeds, deviation_S in sample.deviations.items():
            S = len(seeds)
            if seeds not in shares:
                rng = np.random.default_rng([seed, 1, len(shares)])
                shares[seeds] = rng.multinomial(S, [1 / S] * S, size=resamples) / S
            values_R += np.sqrt(S / (S - 1)) * (shares[seeds] @ deviation_S)
    return values_MR


def percentile_interval(replicates: np.ndarray) -> tuple[float, float] | None:
    """The middle 95% of the replicates that are finite; None when none is."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) == 0:
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def scored(row: ModelRow, metric: MetricInfo) -> np.ndarray | None:
    """[test rows], True where every seed has a score; None when this metric was not taken of this model."""
    scores_SN = row.scores_SN(metric.name)
    return None if scores_SN is None else np.asarray(np.isfinite(scores_SN).all(axis=0))


def _cluster_counts(K: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample drew each cluster: chunks of [resamples, K], the same for the same seed."""
    rng = np.random.default_rng([seed, 0])
    chunk = max(1, _CELLS // max(1, K))
    for start in range(0, resamples, chunk):
        R = min(chunk, resamples - start)
        if K == 0:
            yield np.zeros((R, 0))
            continue
        drawn = rng.integers(0, K, size=(R, K)) + K * np.arange(R)[:, None]
        yield np.bincount(drawn.ravel(), minlength=R * K).reshape(R, K).astype(float)
